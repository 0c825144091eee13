"""Answer prompts: chunked prefill into a KV cache, loss by position on the way, greedy decoding.

The prefill runs in chunks, so that no [S, S] mask and no [S, V] logits ever exist; answers equal plain `generate`.
Three things save work without changing an answer. Short prompts of equal length share forward passes: a small model
spends most of their time between the kernels. Long prompts that begin alike share that beginning's cache. And the
answer that is hoped for rides along with the prompt's last tokens: where greedy decoding would have chosen the same
tokens, one pass has verified what takes one pass a token otherwise; from the first other token on it goes on as always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ctxext.errors import UsageError
from ctxext.evaluation.backend import Answer, SelfCheck, Work, is_out_of_memory
from ctxext.evaluation.fast import MOST_GUESSED, Lookup
from ctxext.evaluation.prompt import Prompt
from ctxext.evaluation.self_check import self_check
from ctxext.evaluation.trunk import (
    frequencies_grow,
    kept_lengths,
    lengths_to_remember,
    reason_against_sharing,
    switching_length,
    visiting_order,
)
from ctxext.model.attention import running_kernels
from ctxext.model.cache import RewindableCache
from ctxext.model.causal import supports_chunked, using_chunked
from ctxext.model.loss import DecoderHead
from ctxext.model.loss_proof import prove_loss
from ctxext.model.placement import input_device
from ctxext.rope.families import head_dim, text_config

__all__ = ["Answer", "Answerer", "Work", "stop_ids"]

PREFILL_CHUNK = 1024
# Prompt tokens that are answered together; only prompts that fit into one prefill chunk share a batch.
BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 65536
_USED_PART = 0.8
# Positions whose logits exist at a time: 48 MiB in float32 with 49,152 words.
_LOSS_TOKENS = 256

BatchSize = int | Literal["auto"]


class Answerer:
    """Greedy answers of one model.

    Args:
        model: a causal LM in eval mode.
        chunk_tokens: prompt tokens a prefill step.
        batch_size: prompts that are answered together; `auto` goes by the machine. Halved when they do not fit.

    Raises:
        UsageError: a batch size that is none.
        UnsupportedModelError: losses that would not be the model's own.
    """

    def __init__(
        self, model: Any, tokenizer: Any, chunk_tokens: int = PREFILL_CHUNK, batch_size: BatchSize = "auto"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.work = Work()
        prove_loss(model)
        self._parts = DecoderHead(model)
        self._device = input_device(model)
        self.stop_ids = stop_ids(model, tokenizer)
        self._chunk = chunk_tokens
        self._chunked_attention = supports_chunked(model)
        self._grows = frequencies_grow(model.config)
        self._switch = switching_length(model.config)
        self._asked_batch = parse_batch_size(batch_size)
        self._most_tokens: int | None = None  # in a batch, once more than that did not fit

    def batch_size(self, length_tokens: int) -> int:
        """How many prompts of this length are answered together.

        `auto` on a CPU: as many as fit into a few prefill chunks, one when a prompt is longer than a chunk; on a GPU:
        as many as the free memory holds caches of.
        """
        if self._asked_batch != "auto":
            size = int(self._asked_batch)
        elif self._device.type == "cuda":
            size = _power_of_two_up_to(min(GPU_BATCH_TOKENS, self._tokens_that_fit()) // length_tokens)
        else:
            size = BATCH_TOKENS // length_tokens if length_tokens <= self._chunk else 1
        if self._most_tokens is not None:
            size = min(size, self._most_tokens // length_tokens)
        return max(size, 1)

    def _tokens_that_fit(self) -> int:
        """Tokens whose cache and passing states the free memory of the GPU holds."""
        config = text_config(self.model.config)
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        passing = 8 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        bytes_a_token = cache_bytes_a_token(config, self.model.dtype) + self.model.dtype.itemsize * passing
        return int(_USED_PART * (free + unused) / bytes_a_token)

    def reason_against_sharing(self, longest_tokens: int) -> str | None:
        """Why prompts of up to so many tokens (answer included) cannot share a beginning; None when they can."""
        return reason_against_sharing(self.model.config, longest_tokens)

    def kernels(self) -> list[str]:
        """The attention kernels of a prefill in two chunks, as PyTorch dispatches them."""
        return running_kernels(_InChunks(self))

    def self_check(self, prompt: Prompt, answer: Answer | None = None) -> SelfCheck:
        """Compare an answer (made here when not given) with plain `generate`'s."""
        return self_check(self, prompt, answer)

    def identity(self) -> dict[str, Any]:
        """RoPE and precision."""
        return model_identity(self.model)

    def answer(
        self,
        input_ids: list[int],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[int] = (),
    ) -> Answer:
        """Prefill, then decode greedily until a stop token or `max_new_tokens`."""
        return self.answer_together([input_ids], max_new_tokens, measure_loss=measure_loss, hoped_for=[hoped_for])[0]

    @torch.inference_mode()
    def answer_together(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> list[Answer]:
        """Answers to prompts of equal length, each as if it were alone: no row is padded and none sees another.

        Args:
            hoped_for: an answer for every prompt that greedy decoding may begin with; decides nothing but the time.

        Raises:
            ValueError: prompts of different lengths.
        """
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError(f"prompts of one length expected, got lengths {sorted({len(p) for p in prompts})}")
        try:
            return self._together(prompts, max_new_tokens, measure_loss, hoped_for)
        except (RuntimeError, MemoryError) as error:
            if len(prompts) > 1 and is_out_of_memory(error):
                self._most_tokens = len(prompts) * len(prompts[0]) // 2
            raise

    def _together(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        measure_loss: bool,
        hoped_for: Sequence[Sequence[int]],
    ) -> list[Answer]:
        ids = torch.tensor(prompts, device=self._device)
        cache = RewindableCache(self.model.config, ids.shape[1] + max_new_tokens)
        self.forget_lengths()
        guesses = self._guesses(cache, hoped_for, ids.shape[1], max_new_tokens)
        hidden, losses = self._prefill(ids, guesses, cache, measure_loss)
        lookup = None
        if len(prompts) == 1 and self._may_guess(cache, ids.shape[1], max_new_tokens):
            lookup = Lookup(ids.shape[1] + max_new_tokens)
            lookup.add(prompts[0])
        answers = self._decode(hidden, guesses, cache, max_new_tokens, lookup)
        return [Answer(answer, row) for answer, row in zip(answers, losses, strict=True)]

    @torch.inference_mode()
    def answer_sharing(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> Iterator[tuple[int, Answer]]:
        """The index of a prompt and its answer, as they come; tokens that several prompts begin with run once.

        Only for models without a `reason_against_sharing`.
        """
        order = visiting_order(prompts)
        kept = kept_lengths([prompts[number] for number in order])
        cache = RewindableCache(self.model.config, max(map(len, prompts)) + max_new_tokens)
        losses = torch.empty(1, 0)
        # What followed the last hoped-for answer, and all answers: the best guesses for the next ones. Known to these
        # prompts only, so that what is computed for them, to the last bit, does not depend on what came before.
        tail, said = list[int](), list[int]()
        for place, number in enumerate(order):
            ids = torch.tensor([prompts[number]], device=self._device)
            hopes = [[*hope, *tail] if hope else [] for hope in hoped_for[number : number + 1]]
            cache.rewind(kept[place])
            guesses = self._guesses(cache, hopes, ids.shape[1], max_new_tokens)
            returns = lengths_to_remember(kept, place) if cache.forgets else []
            hidden, new_losses = self._prefill(ids, guesses, cache, measure_loss, returns)
            losses = torch.cat([losses[:, : kept[place]], new_losses], dim=1)
            lookup = Lookup(len(said) + ids.shape[1] + max_new_tokens)
            for earlier in (said, prompts[number]):
                lookup.add(earlier)
            answer = self._decode(hidden, guesses, cache, max_new_tokens, lookup)[0]
            said += answer
            for hope in hoped_for[number : number + 1]:
                if hope and answer[: len(hope)] == list(hope):
                    tail = answer[len(hope) :]
            yield number, Answer(answer, losses[0])

    def _prefill(
        self, ids: Tensor, guesses: Tensor, cache: RewindableCache, measure_loss: bool, returns: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Run the tokens of `ids` [B, S] that `cache` does not hold yet, and `guesses` [B, G] behind them.

        Args:
            returns: lengths at which the cache must be able to come back.

        Returns:
            Hidden states of the last prompt token and of the guesses [B, 1 + G, D]; losses of predicting the tokens
            behind the first one that ran [B, ...] ([B, 0] when not measured).
        """
        start, end = cache.length, ids.shape[1]
        hidden, losses = torch.empty(0), [torch.empty(len(ids), 0)]
        for begin, stop in pairwise([start, *self._stops(start, end, returns)]):
            piece = ids[:, begin:stop]
            if stop == end and guesses.shape[1]:
                piece = torch.cat([piece, guesses], dim=1)
                cache.keep_last(True)
            hidden = self._forward(piece, cache)
            if stop in returns:
                cache.remember()
            if measure_loss:
                targets = ids[:, begin + 1 : stop + 1]
                losses.append(self._losses(hidden[:, : targets.shape[1]], targets))
            hidden = hidden[:, stop - begin - 1 :]
        self.work.num_prompt_tokens += ids.numel()
        self.work.num_prefilled += (end - start) * len(ids)
        return hidden, torch.cat(losses, dim=1)

    def _stops(self, start: int, end: int, returns: Sequence[int]) -> list[int]:
        """Where the passes of a prefill from `start` to `end` stop."""
        first = self._chunk
        if self._grows:
            first = end  # its last token decides the frequencies of all
        elif self._switch is not None and end > self._switch:
            first = max(first, self._switch + 1)  # no pass with the frequencies of short texts
        stops = range(start + first, end, self._chunk)
        return sorted({*stops, *(length for length in returns if start < length < end), end})

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [B, N] of `targets` [B, N] on the CPU, without the logits of a whole chunk."""
        pieces = [torch.empty(0)]
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()
        for start in range(0, len(flat_targets), _LOSS_TOKENS):
            part = slice(start, start + _LOSS_TOKENS)
            pieces.append(self._parts.token_losses(flat[part], flat_targets[part]).cpu())
        return torch.cat(pieces).view(targets.shape)

    def _decode(
        self, hidden: Tensor, guesses: Tensor, cache: RewindableCache, max_new_tokens: int, lookup: Lookup | None = None
    ) -> list[list[int]]:
        """Greedy tokens of every row from the last hidden states of prompt and guesses [B, 1 + G, D].

        Args:
            lookup: guesses how a single row goes on.
        """
        answers: list[list[int]] = [[] for _ in hidden]
        going = set(range(len(answers)))
        while True:
            tokens = self._parts.logits(hidden).argmax(-1).to(self._device)
            # Rows advance together, so all keep what the least lucky one has verified.
            agreed = int((tokens[:, :-1] == guesses).all(dim=0).long().cumprod(0).sum())
            if guesses.shape[1]:
                cache.drop(guesses.shape[1] - agreed)
                cache.keep_last(False)
            tokens = tokens[:, : agreed + 1]
            self.work.num_verified += agreed * len(tokens)
            for column in tokens.T.tolist():
                for row in sorted(going):
                    answers[row].append(column[row])
                    if column[row] in self.stop_ids or len(answers[row]) >= max_new_tokens:
                        going.remove(row)
            if not going:
                self.work.num_answer_tokens += sum(map(len, answers))
                return answers
            found: list[int] = []
            if lookup is not None:
                lookup.add(tokens[0].tolist())
                found = lookup.guess(min(MOST_GUESSED, max_new_tokens - len(answers[0]) - 1))
                cache.keep_last(bool(found))
            guesses = torch.tensor([found] * len(tokens), dtype=torch.long, device=self._device).view(len(tokens), -1)
            piece = torch.cat([tokens[:, -1:], guesses], dim=1)
            hidden = self._forward(piece, cache)[:, -piece.shape[1] :]

    def _guesses(
        self, cache: RewindableCache, hoped_for: Sequence[Sequence[int]], length: int, max_new_tokens: int
    ) -> Tensor:
        """Answer tokens [B, G] to verify together with the prompt; G is 0 where that would not be exact."""
        if not hoped_for or not self._may_guess(cache, length, max_new_tokens):
            return torch.empty(max(len(hoped_for), 1), 0, dtype=torch.long, device=self._device)
        size = min(max_new_tokens - 1, *map(len, hoped_for))
        return torch.tensor([list(row[:size]) for row in hoped_for], dtype=torch.long, device=self._device)

    def _may_guess(self, cache: RewindableCache, length: int, max_new_tokens: int) -> bool:
        """Whether several answer tokens can be run together and some of them taken back."""
        crosses = self._switch is not None and length <= self._switch < length + max_new_tokens
        return not (self._grows or crosses or cache.obstacle is not None)

    def _forward(self, ids: Tensor, cache: RewindableCache) -> Tensor:
        with using_chunked(self.model) if self._chunked_attention else nullcontext():
            return self._parts.hidden_states(ids, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def forget_lengths(self) -> None:
        """Dynamic RoPE keeps the frequencies of the longest text so far; a text of one token brings them back."""
        if self._grows:
            self._parts.hidden_states(torch.zeros((1, 1), dtype=torch.long, device=self._device), use_cache=False)


class _InChunks:
    """A model as `running_kernels` asks it, which runs its tokens in two chunks with a cache."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self.device = answerer._device

    def get_decoder(self) -> Any:
        return self._run

    def _run(self, input_ids: Tensor, use_cache: bool) -> None:
        cache = RewindableCache(self._answerer.model.config, input_ids.shape[1])
        for piece in input_ids.chunk(2, dim=1):
            self._answerer._forward(piece, cache)


def parse_batch_size(asked: int | str) -> BatchSize:
    """A number of prompts, or `auto`; also as text, as it stands on a command line.

    Raises:
        UsageError: something else.
    """
    if asked == "auto":
        return "auto"
    try:
        size = 0 if isinstance(asked, (bool, float)) else int(asked)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise UsageError("no batch size", where="batch_size", got=asked, expected="'auto' or a whole number from 1")
    return size


def _power_of_two_up_to(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number > 0 else 1


def cache_bytes_a_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim(config) * dtype.itemsize)


def model_identity(model: Any) -> dict[str, Any]:
    """What determines a loaded model's answers besides its weights: RoPE and precision."""
    return {
        "rope_parameters": getattr(text_config(model.config), "rope_parameters", None),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end an answer: the generation config's, else the tokenizer's."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    if stop is None:
        stop = tokenizer.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)
