"""Answer prompts: chunked prefill into a KV cache, loss by position on the way, greedy decoding.

The prefill runs in chunks, so that no [S, S] mask and no [S, V] logits ever exist; answers equal plain `generate`.
Short prompts of equal length share forward passes: a small model spends most of their time between the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ctxext.evaluation.prompt import Prompt, PromptBuilder
from ctxext.evaluation.scoring import NUMBER_MATCH, degenerate_kind, number_match
from ctxext.evaluation.store import SampleResult, SampleStore
from ctxext.evaluation.suite import Sample, Suite
from ctxext.model.loss import DecoderHead, token_losses

PREFILL_CHUNK = 1024
# Prompt tokens that are answered together; only prompts that fit into one prefill chunk share a batch.
BATCH_TOKENS = 4096

OnSample = Callable[[SampleResult], None]


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of a prompt and the prompt's own next-token losses [S - 1] ([0] when not measured)."""

    ids: list[int]
    losses: Tensor


class Answerer:
    """Greedy answers of one model.

    Args:
        model: a causal LM in eval mode.
        chunk_tokens: prompt tokens a prefill step.
    """

    def __init__(self, model: Any, tokenizer: Any, chunk_tokens: int = PREFILL_CHUNK) -> None:
        self._model = model
        self._parts = DecoderHead(model)
        self._device = model.device
        self._stop_ids = stop_ids(model, tokenizer)
        self.tokenizer = tokenizer
        self._chunk = chunk_tokens

    def batch_size(self, length_tokens: int) -> int:
        """How many prompts of this length are answered together; one when a prompt fills more than a prefill chunk."""
        return max(BATCH_TOKENS // length_tokens, 1) if length_tokens <= self._chunk else 1

    def answer(self, input_ids: list[int], max_new_tokens: int, *, measure_loss: bool = True) -> Answer:
        """Prefill, then decode greedily until a stop token or `max_new_tokens`."""
        return self.answer_together([input_ids], max_new_tokens, measure_loss=measure_loss)[0]

    @torch.inference_mode()
    def answer_together(
        self, prompts: list[list[int]], max_new_tokens: int, *, measure_loss: bool = True
    ) -> list[Answer]:
        """Answers to prompts of equal length, each as if it were alone: no row is padded and none sees another.

        Raises:
            ValueError: prompts of different lengths.
        """
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError(f"prompts of one length expected, got lengths {sorted({len(p) for p in prompts})}")
        ids = torch.tensor(prompts, device=self._device)
        cache = DynamicCache(config=self._model.config)
        losses: list[Tensor] = [torch.empty(len(prompts), 0)]
        hidden = torch.empty(0)
        for start in range(0, ids.shape[1], self._chunk):
            piece = ids[:, start : start + self._chunk]
            hidden = self._parts.hidden_states(piece, past_key_values=cache, use_cache=True)
            if not measure_loss:
                continue
            targets = ids[:, start + 1 : start + 1 + piece.shape[1]]
            flat = token_losses(hidden[:, : targets.shape[1]].flatten(0, 1), self._parts.head, targets.flatten())
            losses.append(flat.view(targets.shape).cpu())
        answers = self._decode(hidden, cache, max_new_tokens)
        return [Answer(answer, row) for answer, row in zip(answers, torch.cat(losses, dim=1), strict=True)]

    def _decode(self, hidden: Tensor, cache: DynamicCache, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens of every row from the prompts' last hidden states [B, S, D]."""
        answers: list[list[int]] = [[] for _ in hidden]
        going = set(range(len(answers)))
        while True:
            tokens = self._parts.head(hidden[:, -1:]).argmax(-1)
            for row in sorted(going):
                token = int(tokens[row])
                answers[row].append(token)
                if token in self._stop_ids or len(answers[row]) >= max_new_tokens:
                    going.remove(row)
            if not going:
                return answers
            hidden = self._parts.hidden_states(tokens, past_key_values=cache, use_cache=True)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end an answer: the generation config's, else the tokenizer's."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    if stop is None:
        stop = tokenizer.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


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
) -> None:
    """Answer and store every sample that is not stored yet; out of memory marks a sample as missing and goes on."""
    too_long: int | None = None
    for batch in _batches(answerer, samples):
        prompts = [builder.build(sample) for sample in batch]
        missing = [p for p in prompts if store.finished(p.sample.sample_id, p.prompt_sha256) is None]
        if too_long is not None and missing and len(missing[0].input_ids) >= too_long:
            results = [_result(prompt, status="out_of_memory") for prompt in missing]
        else:
            results = _answered(answerer, missing, suite)
            if any(result.status == "out_of_memory" for result in results):
                too_long = batch[0].cell.length_tokens
        # All of a batch is stored before anyone is told: a listener may stop the evaluation.
        for result in results:
            store.add(result)
        if on_sample is not None:
            for prompt in prompts:
                on_sample(store.results[prompt.sample.sample_id])
    store.write_results()


def _batches(answerer: Answerer, samples: list[Sample]) -> Iterator[list[Sample]]:
    """Neighbours of equal length, in the given order, as many at a time as the answerer takes."""
    for length, group in groupby(samples, key=lambda sample: sample.cell.length_tokens):
        alike, size = list(group), answerer.batch_size(length)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _answered(answerer: Answerer, prompts: list[Prompt], suite: Suite) -> list[SampleResult]:
    """Results of prompts of equal length; when they are too many for the memory together, one after the other."""
    if not prompts:
        return []
    started = time.perf_counter()
    with suppress(torch.OutOfMemoryError):
        answers = answerer.answer_together(
            [prompt.input_ids for prompt in prompts], suite.max_new_tokens, measure_loss=suite.measure_loss
        )
        seconds = (time.perf_counter() - started) / len(prompts)
        return [
            _scored(answerer, prompt, answer, suite, seconds) for prompt, answer in zip(prompts, answers, strict=True)
        ]
    if len(prompts) == 1:
        return [_result(prompts[0], status="out_of_memory")]
    return [result for prompt in prompts for result in _answered(answerer, [prompt], suite)]


def _scored(answerer: Answerer, prompt: Prompt, answer: Answer, suite: Suite, seconds: float) -> SampleResult:
    text = answerer.tokenizer.decode(answer.ids, skip_special_tokens=True)
    return _result(
        prompt,
        answer=text,
        answer_ids=answer.ids,
        score=number_match(text, prompt.needle.value),
        metric=NUMBER_MATCH,
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
        key=prompt.needle.key,
        expected=prompt.needle.value,
        **facts,
    )
