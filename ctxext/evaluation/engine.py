"""Answer prompts: chunked prefill into a KV cache, loss by position on the way, greedy decoding.

The prefill runs in chunks, so that no [S, S] mask and no [S, V] logits ever exist; answers equal plain `generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
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

OnSample = Callable[[SampleResult], None]


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of a prompt and the prompt's own next-token losses [S - 1]."""

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

    @torch.inference_mode()
    def answer(self, input_ids: list[int], max_new_tokens: int) -> Answer:
        """Prefill, then decode greedily until a stop token or `max_new_tokens`."""
        prompt = torch.tensor([input_ids], device=self._device)
        cache = DynamicCache(config=self._model.config)
        losses: list[Tensor] = []
        hidden = torch.empty(0)
        for start in range(0, prompt.shape[1], self._chunk):
            piece = prompt[:, start : start + self._chunk]
            hidden = self._parts.hidden_states(piece, past_key_values=cache, use_cache=True)
            targets = prompt[0, start + 1 : start + 1 + piece.shape[1]]
            losses.append(token_losses(hidden[0, : len(targets)], self._parts.head, targets).cpu())
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            token = int(self._parts.head(hidden[:, -1:]).argmax(-1))
            ids.append(token)
            if token in self._stop_ids or len(ids) == max_new_tokens:
                break
            hidden = self._parts.hidden_states(
                torch.tensor([[token]], device=self._device), past_key_values=cache, use_cache=True
            )
        return Answer(ids, torch.cat(losses))


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
    for sample in samples:
        prompt = builder.build(sample)
        result = store.finished(sample.sample_id, prompt.prompt_sha256)
        if result is None:
            if too_long is not None and sample.cell.length_tokens >= too_long:
                result = _result(prompt, status="out_of_memory")
            else:
                try:
                    result = _answered(answerer, prompt, suite)
                except torch.OutOfMemoryError:
                    too_long = sample.cell.length_tokens
                    result = _result(prompt, status="out_of_memory")
            store.add(result)
        if on_sample is not None:
            on_sample(result)
    store.write_results()


def _answered(answerer: Answerer, prompt: Prompt, suite: Suite) -> SampleResult:
    started = time.perf_counter()
    answer = answerer.answer(prompt.input_ids, suite.max_new_tokens)
    text = answerer.tokenizer.decode(answer.ids, skip_special_tokens=True)
    return _result(
        prompt,
        answer=text,
        answer_ids=answer.ids,
        score=number_match(text, prompt.needle.value),
        metric=NUMBER_MATCH,
        degenerate=degenerate_kind(text, answer.ids),
        loss_blocks=block_means(answer.losses, suite.loss_block_tokens),
        loss_block_tokens=suite.loss_block_tokens,
        seconds=round(time.perf_counter() - started, 3),
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
