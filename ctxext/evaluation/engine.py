"""Evaluate samples with one model: answer what is not stored yet, score it, store it.

Long prompts that begin with the same tokens are answered along one trunk (`ctxext.evaluation.trunk`), short ones of
equal length together, everything else alone; the stored answers are the same. One prompt of every run is answered once
more by plain `generate` (`ctxext.evaluation.self_check`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ctxext.data.boundaries import encode_plain
from ctxext.evaluation.answerer import Answer, Answerer, Work
from ctxext.evaluation.prompt import Prompt, PromptBuilder, hash_ids
from ctxext.evaluation.scoring import degenerate_kind, final_answer, score_all
from ctxext.evaluation.self_check import SelfCheck, self_check
from ctxext.evaluation.store import SampleResult, SampleStore
from ctxext.evaluation.suite import Sample, Suite

__all__ = ["Answer", "Answerer", "EngineReport", "block_means", "evaluate_samples"]

# Prompts are answered along one trunk when they have at least this part in common (rounded down to a power of two, so
# prompts of very different lengths do not: all lengths on one trunk would save 4% more at 11 depths and 2 samples).
_SHARED_PART = 8
_FEWEST_SHARED = 32

OnSample = Callable[[SampleResult], None]


@dataclass(frozen=True)
class EngineReport:
    """How the answers of a run were made.

    Attributes:
        kernels: attention kernels of the prefill; none: attention was computed from plain matrix products.
        num_sharing: prompts that were answered along a shared trunk.
        plain_reason: why prompts that begin alike were answered one by one all the same, if there were any.
        work: prompt tokens, those really prefilled, answer tokens, those verified without a pass each.
        self_check: None when everything was stored already.
    """

    kernels: list[str]
    num_sharing: int
    plain_reason: str | None
    work: Work
    self_check: SelfCheck | None


def block_means(losses: Tensor, block_tokens: int) -> list[float]:
    """Mean loss of each block of positions; the loss of predicting token t belongs to position t.

    Args:
        losses: [S - 1], the loss of predicting tokens 1 .. S - 1.
    """
    blocks = []
    for start in range(0, len(losses) + 1, block_tokens):
        piece = losses[max(start - 1, 0) : start + block_tokens - 1]
        if len(piece):
            blocks.append(round(float(piece.double().mean()), 5))
    return blocks


def evaluate_samples(
    answerer: Answerer,
    builder: PromptBuilder,
    suite: Suite,
    samples: list[Sample],
    store: SampleStore,
    on_sample: OnSample | None = None,
) -> EngineReport:
    """Answer and store every sample that is not stored yet; out of memory marks a sample as missing and goes on."""

    def tell(sample_ids: Iterable[str]) -> None:
        for sample_id in sample_ids:
            if on_sample is not None:
                on_sample(store.results[sample_id])

    plan = _plan(answerer, builder, suite, samples)
    too_long: int | None = None
    check: SelfCheck | None = None
    try:
        for unit in plan.units:
            prompts = [builder.build(sample) for sample in unit]
            missing = [p for p in prompts if store.finished(p.sample.sample_id, p.prompt_sha256) is None]
            sharing = len(unit) > 1 and unit[0].sample_id in plan.sharing
            waiting = {prompt.sample.sample_id for prompt in missing}
            if sharing:
                tell(prompt.sample.sample_id for prompt in prompts if prompt.sample.sample_id not in waiting)
            for results in _answered_unit(answerer, missing, suite, sharing, too_long):
                # All of a batch is stored before anyone is told: a listener may stop the evaluation.
                for result in results:
                    store.add(result)
                    if result.status == "out_of_memory":
                        too_long = min(too_long or result.length_tokens, result.length_tokens)
                if check is None and (sharing or not plan.sharing):
                    check = _checked(answerer, missing, results)
                if sharing:
                    tell(result.sample_id for result in results)
            if not sharing:
                tell(sample.sample_id for sample in unit)
    finally:
        store.write_results()  # a stop after the last answer leaves nothing to do but this
    kernels = answerer.kernels() if check is not None else []
    return EngineReport(kernels, len(plan.sharing), plan.plain_reason, answerer.work, check)


@dataclass(frozen=True)
class _Plan:
    """Samples that are answered together, in order; ids of those that share a trunk; why others do not."""

    units: list[list[Sample]]
    sharing: set[str]
    plain_reason: str | None


def _plan(answerer: Answerer, builder: PromptBuilder, suite: Suite, samples: list[Sample]) -> _Plan:
    """Group samples by the first tokens of their prompts; prompts are built again when their turn comes."""
    groups: dict[tuple[str, int], list[Sample]] = {}
    longest = 0
    for sample in samples:
        if answerer.batch_size(sample.cell.length_tokens) > 1:
            continue  # short prompts share forward passes instead
        prompt = builder.build(sample)
        num_tokens = len(prompt.input_ids)
        num_shared = max(1 << ((num_tokens // _SHARED_PART).bit_length() - 1), _FEWEST_SHARED)
        if num_tokens > num_shared:
            head = hash_ids(prompt.input_ids[:num_shared]), prompt.max_new_tokens
            groups.setdefault(head, []).append(sample)
            longest = max(longest, num_tokens + prompt.max_new_tokens)
    groups = {head: members for head, members in groups.items() if len(members) > 1}
    reason = answerer.reason_against_sharing(longest) if groups else None
    trunks = {} if reason else {sample.sample_id: group for group in groups.values() for sample in group}
    units: list[list[Sample]] = []
    for shares, neighbours in groupby(samples, key=lambda sample: sample.sample_id in trunks):
        if not shares:
            units += _batches(answerer, list(neighbours))
            continue
        for sample in neighbours:
            group = trunks[sample.sample_id]
            if sample is group[0]:
                units.append(group)
    return _Plan(units, set(trunks), reason)


def _batches(answerer: Answerer, samples: list[Sample]) -> Iterator[list[Sample]]:
    """Neighbours of equal length, in the given order, as many at a time as the answerer takes."""
    for length, group in groupby(samples, key=lambda sample: sample.cell.length_tokens):
        alike, size = list(group), answerer.batch_size(length)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _answered_unit(
    answerer: Answerer, prompts: list[Prompt], suite: Suite, sharing: bool, too_long: int | None
) -> Iterator[list[SampleResult]]:
    """Results in portions that belong together; prompts from `too_long` tokens are not tried."""
    if too_long is not None:
        hopeless = [prompt for prompt in prompts if len(prompt.input_ids) >= too_long]
        yield [_result(prompt, status="out_of_memory") for prompt in hopeless]
        prompts = [prompt for prompt in prompts if len(prompt.input_ids) < too_long]
    if not sharing:
        yield _answered(answerer, prompts, suite)
        return
    done: set[str] = set()
    for result in _answered_along_trunk(answerer, prompts, suite):
        done.add(result.sample_id)
        yield [result]
    # What did not fit beside the others may fit alone.
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.input_ids)):
        if prompt.sample.sample_id in done:
            continue
        if too_long is not None and len(prompt.input_ids) >= too_long:
            yield [_result(prompt, status="out_of_memory")]
            continue
        results = _answered(answerer, [prompt], suite)
        if results[0].status == "out_of_memory":
            too_long = len(prompt.input_ids)
        yield results


def _answered_along_trunk(answerer: Answerer, prompts: list[Prompt], suite: Suite) -> Iterator[SampleResult]:
    """Results in the order of the prompts' prefix tree, until all are there or the memory is full."""
    if not prompts:
        return
    started = time.perf_counter()
    with suppress(torch.OutOfMemoryError):
        answers = answerer.answer_sharing(
            [prompt.input_ids for prompt in prompts],
            prompts[0].max_new_tokens,
            measure_loss=suite.measure_loss,
            hoped_for=_hoped_for(answerer, prompts),
        )
        for number, answer in answers:
            seconds = time.perf_counter() - started
            yield _scored(answerer, prompts[number], answer, suite, seconds)
            started = time.perf_counter()


def _answered(answerer: Answerer, prompts: list[Prompt], suite: Suite) -> list[SampleResult]:
    """Results of prompts of equal length; when they are too many for the memory together, one after the other."""
    if not prompts:
        return []
    if len({prompt.max_new_tokens for prompt in prompts}) > 1:
        return [result for prompt in prompts for result in _answered(answerer, [prompt], suite)]
    started = time.perf_counter()
    with suppress(torch.OutOfMemoryError):
        answers = answerer.answer_together(
            [prompt.input_ids for prompt in prompts],
            prompts[0].max_new_tokens,
            measure_loss=suite.measure_loss,
            hoped_for=_hoped_for(answerer, prompts),
        )
        seconds = (time.perf_counter() - started) / len(prompts)
        return [
            _scored(answerer, prompt, answer, suite, seconds) for prompt, answer in zip(prompts, answers, strict=True)
        ]
    if len(prompts) == 1:
        return [_result(prompts[0], status="out_of_memory")]
    return [result for prompt in prompts for result in _answered(answerer, [prompt], suite)]


def _hoped_for(answerer: Answerer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The expected answers as the model would go on from the prompts; a guess, which decides nothing but the time."""
    return [encode_plain(answerer.tokenizer, f" {', '.join(prompt.answers)}") for prompt in prompts]


def _checked(answerer: Answerer, prompts: list[Prompt], results: list[SampleResult]) -> SelfCheck | None:
    """The self-check of the first result that has an answer."""
    for result in results:
        if result.status == "ok":
            prompt = next(prompt for prompt in prompts if prompt.sample.sample_id == result.sample_id)
            return self_check(answerer, prompt, Answer(result.answer_ids, torch.empty(0)))
    return None


def _scored(answerer: Answerer, prompt: Prompt, answer: Answer, suite: Suite, seconds: float) -> SampleResult:
    text = answerer.tokenizer.decode(answer.ids, skip_special_tokens=True)
    said = final_answer(text) if prompt.thinking else text
    scores = score_all(said, prompt.answers, prompt.distractors, metric=prompt.metric)
    metric, score = next(iter(scores.items()))
    return _result(
        prompt,
        answer=text,
        answer_ids=answer.ids,
        score=score,
        scores=scores,
        metric=metric,
        degenerate=degenerate_kind(text, answer.ids),
        loss_blocks=block_means(answer.losses, suite.loss_block_tokens) if suite.measure_loss else [],
        loss_block_tokens=suite.loss_block_tokens,
        seconds=round(seconds, 3),
    )


def _result(prompt: Prompt, status: str = "ok", **facts: Any) -> SampleResult:
    cell = prompt.sample.cell
    return SampleResult(
        sample_id=prompt.sample.sample_id,
        task=cell.task,
        length_tokens=cell.length_tokens,
        depth=cell.depth,
        index=prompt.sample.index,
        status=status,
        needle_position=prompt.needle_position,
        haystack_sha256=prompt.haystack_sha256,
        prompt_sha256=prompt.prompt_sha256,
        key=prompt.key,
        expected=prompt.expected,
        answers=list(prompt.answers),
        spans=[[span.start, span.end, int(span.asked)] for span in prompt.spans],
        facts=prompt.facts,
        **facts,
    )
