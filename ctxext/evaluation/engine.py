"""Evaluate samples with one model: answer what is not stored yet, score it, store it.

Long prompts that begin with the same tokens are answered along one trunk (`ctxext.evaluation.trunk`), others of equal
length together as far as the backend likes, everything else alone; the stored answers are the same. Such units of work
do not depend on what is stored already, on other units or on the number of processes that share them. One prompt of
every run is answered once more in another way (`ctxext.evaluation.self_check`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from ctxext.data.boundaries import encode_plain
from ctxext.evaluation.backend import Answer, Backend, NoAnswerError, SelfCheck, Work, batches, is_out_of_memory
from ctxext.evaluation.prompt import Prompt, hash_ids
from ctxext.evaluation.results import write_results
from ctxext.evaluation.scoring import degenerate_kind, final_answer, score_all
from ctxext.evaluation.sharding import ALONE, Processes, owners
from ctxext.evaluation.store import SampleResult, SampleStore
from ctxext.evaluation.suite import Sample, Suite

# Prompts are answered along one trunk when they have at least this part in common (rounded down to a power of two, so
# prompts of very different lengths do not: all lengths on one trunk would save 4% more at 11 depths and 2 samples).
_SHARED_PART = 8
_FEWEST_SHARED = 32
# Up to here a pass over several prompts is worth more than a shared beginning: one alone leaves the machine idle.
_SHORT_TOKENS = 1024
# What is left of the prefill when 11 depths share a trunk, and the length where attention costs as much as the rest in
# models of a hundred million parameters: only for shares of work.
_SHARING_COST = 0.6
_QUADRATIC_TOKENS = 8192

OnSample = Callable[[SampleResult], None]


class Builder(Protocol):
    """Makes the prompts: `PromptBuilder` those of a suite."""

    def build(self, sample: Sample) -> Prompt:
        """The prompt of a sample; equal samples give equal prompts."""


@dataclass(frozen=True)
class EngineReport:
    """How the answers of a run were made.

    Attributes:
        kernels: attention kernels of the prefill; none: attention was computed from plain matrix products.
        num_sharing: prompts that were answered along a shared trunk, in all processes.
        plain_reason: why prompts that begin alike were answered one by one all the same, if there were any.
        work: prompt tokens, those really prefilled, answer tokens, those verified without a pass each.
        self_check: None when everything was stored already.
        num_processes: how many had a share of the work.
    """

    kernels: list[str]
    num_sharing: int
    plain_reason: str | None
    work: Work
    self_check: SelfCheck | None
    num_processes: int = 1


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
    backend: Backend,
    builder: Builder,
    suite: Suite,
    samples: list[Sample],
    store: SampleStore,
    on_sample: OnSample | None = None,
    processes: Processes = ALONE,
) -> EngineReport:
    """Answer and store this process's share of the samples that are not stored yet.

    What does not fit into the memory is stored as missing, longer cells of its row are skipped, the rest goes on.

    Args:
        on_sample: called with every sample of the share, stored ones included.
        processes: which share is this process's; each has a store of its own in the same folder.
    """

    def tell(sample_ids: Iterable[str]) -> None:
        for sample_id in sample_ids:
            if on_sample is not None:
                on_sample(store.results[sample_id])

    plan = processes.from_main(lambda: _plan(backend, builder, samples))
    units, limits = _share(plan, store, processes), _Limits()
    sharing_here = any(unit[0].sample_id in plan.sharing for unit in units)
    check: SelfCheck | None = None
    try:
        for unit in units:
            prompts = [builder.build(sample) for sample in unit]
            missing = [p for p in prompts if store.finished(p.sample.sample_id, p.prompt_sha256) is None]
            sharing = len(unit) > 1 and unit[0].sample_id in plan.sharing
            waiting = {prompt.sample.sample_id for prompt in missing}
            if sharing:
                tell(prompt.sample.sample_id for prompt in prompts if prompt.sample.sample_id not in waiting)
            for results in _answered_unit(backend, missing, suite, sharing, limits):
                # All of a batch is stored before anyone is told: a listener may stop the evaluation.
                for result in results:
                    store.add(result)
                    limits.note(result)
                if check is None and (sharing or not sharing_here):
                    check = _checked(backend, missing, results)
                if sharing:
                    tell(result.sample_id for result in results)
            if not sharing:
                tell(sample.sample_id for sample in unit)
    finally:
        if processes.is_main:
            write_results(store.folder)  # a stop after the last answer leaves nothing to do but this
    kernels = backend.kernels() if check is not None else []
    return EngineReport(kernels, len(plan.sharing), plan.plain_reason, backend.work, check)


@dataclass
class _Limits:
    """Lengths that did not fit into the memory, by row of the grid (task, depth)."""

    failed: dict[tuple[str, float], int] = field(default_factory=dict)

    def note(self, result: SampleResult) -> None:
        """Remember a result that says so."""
        if result.status == "out_of_memory":
            row = result.task, result.depth
            self.failed[row] = min(result.length_tokens, self.failed.get(row, result.length_tokens))

    def reason_to_skip(self, sample: Sample) -> str | None:
        """Why a sample need not be tried."""
        cell = sample.cell
        failed = self.failed.get((cell.task, cell.depth))
        if failed is None or cell.length_tokens < failed:
            return None
        return f"not tried: this depth ran out of memory at {failed:,} tokens"


@dataclass(frozen=True)
class _Plan:
    """Samples that are answered together, in order; ids of those that share a trunk; why others do not."""

    units: list[list[Sample]]
    sharing: set[str]
    plain_reason: str | None


def _share(plan: _Plan, store: SampleStore, processes: Processes) -> list[list[Sample]]:
    """The units of this process, in the plan's order; what is stored already costs nothing."""
    costs = []
    for unit in plan.units:
        known = (store.results.get(sample.sample_id) for sample in unit)
        open_samples = [
            sample for sample, found in zip(unit, known, strict=True) if found is None or found.status != "ok"
        ]
        lengths = [sample.cell.length_tokens for sample in open_samples]
        part = _SHARING_COST if len(lengths) > 1 and unit[0].sample_id in plan.sharing else 1.0
        costs.append(part * sum(length * (1 + length / _QUADRATIC_TOKENS) for length in lengths))
    owner = owners(costs, processes.count)
    return [unit for unit, index in zip(plan.units, owner, strict=True) if index == processes.index]


def _plan(backend: Backend, builder: Builder, samples: list[Sample]) -> _Plan:
    """Group samples by the first tokens of their prompts; prompts are built again when their turn comes."""
    groups: dict[tuple[str, int], list[Sample]] = {}
    longest = 0
    for sample in samples:
        length = sample.cell.length_tokens
        if length <= _SHORT_TOKENS and backend.batch_size(length) > 1:
            continue  # short prompts share forward passes instead
        prompt = builder.build(sample)
        num_tokens = len(prompt.input_ids)
        num_shared = max(1 << ((num_tokens // _SHARED_PART).bit_length() - 1), _FEWEST_SHARED)
        if num_tokens > num_shared:
            head = hash_ids(prompt.input_ids[:num_shared]), prompt.max_new_tokens
            groups.setdefault(head, []).append(sample)
            longest = max(longest, num_tokens + prompt.max_new_tokens)
    groups = {head: members for head, members in groups.items() if len(members) > 1}
    reason = backend.reason_against_sharing(longest) if groups else None
    trunks = {} if reason else {sample.sample_id: group for group in groups.values() for sample in group}
    units: list[list[Sample]] = []
    for shares, neighbours in groupby(samples, key=lambda sample: sample.sample_id in trunks):
        if not shares:
            units += batches(backend, list(neighbours), lambda sample: sample.cell.length_tokens)
            continue
        for sample in neighbours:
            group = trunks[sample.sample_id]
            if sample is group[0]:
                units.append(group)
    return _Plan(units, set(trunks), reason)


def _answered_unit(
    backend: Backend, prompts: list[Prompt], suite: Suite, sharing: bool, limits: _Limits
) -> Iterator[list[SampleResult]]:
    """Results in portions that belong together; `limits` is asked again for every portion."""
    reasons = {prompt.sample.sample_id: limits.reason_to_skip(prompt.sample) for prompt in prompts}
    yield [_skipped(prompt, reason) for prompt in prompts if (reason := reasons[prompt.sample.sample_id])]
    prompts = [prompt for prompt in prompts if not reasons[prompt.sample.sample_id]]
    if not sharing:
        yield _in_parts(backend, prompts, len(prompts), suite)
        return
    done: set[str] = set()
    for result in _answered_along_trunk(backend, prompts, suite):
        done.add(result.sample_id)
        yield [result]
    # What did not fit beside the others may fit alone.
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.input_ids)):
        if prompt.sample.sample_id not in done:
            reason = limits.reason_to_skip(prompt.sample)
            yield [_skipped(prompt, reason)] if reason else _answered(backend, [prompt], suite)


def _answered_along_trunk(backend: Backend, prompts: list[Prompt], suite: Suite) -> Iterator[SampleResult]:
    """Results in the order of the prompts' prefix tree, until all are there or the backend gives up."""
    if not prompts:
        return
    started = time.perf_counter()
    try:
        answers = backend.answer_sharing(
            [prompt.input_ids for prompt in prompts],
            prompts[0].max_new_tokens,
            measure_loss=suite.measure_loss,
            hoped_for=_hoped_for(backend, prompts),
        )
        for number, answer in answers:
            seconds = time.perf_counter() - started
            yield _scored(backend, prompts[number], answer, suite, seconds)
            started = time.perf_counter()
    except (NoAnswerError, RuntimeError, MemoryError) as error:
        _require_expected(error)


def _answered(backend: Backend, prompts: list[Prompt], suite: Suite) -> list[SampleResult]:
    """Results of prompts of equal length; what fails together is asked again in parts half as large."""
    if not prompts:
        return []
    if len({(prompt.max_new_tokens, len(prompt.input_ids)) for prompt in prompts}) > 1:
        return [result for prompt in prompts for result in _answered(backend, [prompt], suite)]
    started = time.perf_counter()
    try:
        answers = backend.answer_together(
            [prompt.input_ids for prompt in prompts],
            prompts[0].max_new_tokens,
            measure_loss=suite.measure_loss,
            hoped_for=_hoped_for(backend, prompts),
        )
    except (NoAnswerError, RuntimeError, MemoryError) as error:
        status, reason = _require_expected(error)
    else:
        seconds = (time.perf_counter() - started) / len(prompts)
        return [
            _scored(backend, prompt, answer, suite, seconds) for prompt, answer in zip(prompts, answers, strict=True)
        ]
    # Not inside the except clause, which would keep the tensors of the failed pass.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if len(prompts) == 1:
        return [_result(prompts[0], status=status, reason=reason)]
    return _in_parts(backend, prompts, len(prompts) // 2, suite)


def _in_parts(backend: Backend, prompts: list[Prompt], most: int, suite: Suite) -> list[SampleResult]:
    """At most so many together; fewer once the backend knows that fewer fit."""
    results: list[SampleResult] = []
    while prompts:
        size = min(most, backend.batch_size(len(prompts[0].input_ids)))
        results += _answered(backend, prompts[:size], suite)
        prompts = prompts[size:]
    return results


def _require_expected(error: Exception) -> tuple[str, str]:
    """Status and reason for a backend's failure that ends no evaluation; everything else is raised again."""
    if isinstance(error, NoAnswerError):
        return error.status, error.reason
    if is_out_of_memory(error):
        return "out_of_memory", "out of memory"
    raise error


def _skipped(prompt: Prompt, reason: str) -> SampleResult:
    return _result(prompt, status="skipped", reason=reason)


def _hoped_for(backend: Backend, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The expected answers as the model would go on from the prompts; a guess, which decides nothing but the time."""
    return [encode_plain(backend.tokenizer, f" {', '.join(prompt.answers)}") for prompt in prompts]


def _checked(backend: Backend, prompts: list[Prompt], results: list[SampleResult]) -> SelfCheck | None:
    """The self-check of the first result that has an answer."""
    for result in results:
        if result.status == "ok":
            prompt = next(prompt for prompt in prompts if prompt.sample.sample_id == result.sample_id)
            return backend.self_check(prompt, Answer(result.answer_ids, torch.empty(0)))
    return None


def _scored(backend: Backend, prompt: Prompt, answer: Answer, suite: Suite, seconds: float) -> SampleResult:
    text = backend.tokenizer.decode(answer.ids, skip_special_tokens=True)
    said = final_answer(text) if prompt.thinking else text
    scores = score_all(said, prompt.answers, prompt.distractors, metric=prompt.metric)
    cut_off = suite.apply_chat_template and _cut_off(backend, prompt, answer)
    metric, score = next(iter(scores.items()))
    return _result(
        prompt,
        answer=text,
        answer_ids=answer.ids,
        score=score,
        scores=scores,
        metric=metric,
        degenerate=degenerate_kind(text, answer.ids, cut_off=cut_off),
        loss_blocks=block_means(answer.losses, suite.loss_block_tokens) if suite.measure_loss else [],
        loss_block_tokens=suite.loss_block_tokens,
        seconds=round(seconds, 3),
        said_besides=answer.facts,
    )


def _cut_off(backend: Backend, prompt: Prompt, answer: Answer) -> bool:
    """Whether the answer ended with its token budget instead of a stop."""
    return len(answer.ids) >= prompt.max_new_tokens and answer.ids[-1] not in backend.tokenizer.all_special_ids


def _result(
    prompt: Prompt, status: str = "ok", said_besides: Mapping[str, Any] | None = None, **facts: Any
) -> SampleResult:
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
        facts={**prompt.facts, **(said_besides or {})},
        **facts,
    )
