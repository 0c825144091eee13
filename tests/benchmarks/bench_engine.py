"""The engine against transformers' plain `generate`: a needle at 11 depths, 2 samples sharing a haystack.

    python tests/benchmarks/bench_engine.py [--length 2048] [--depths 11] [--samples 2] [--layers 30] [--threads 1]
    python tests/benchmarks/bench_engine.py --memory [--length 16384]

The model is the quickstart's SmolLM2-135M; with fewer `--layers` it answers nonsense, in the same proportions of time.
Seconds are CPU seconds of this process, which other work on the machine disturbs least. `--memory` prefills one prompt
and adds up the bytes of all tensors alive, weights included.
"""

from __future__ import annotations

import argparse
import random
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxext.data.boundaries import encode_plain
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.trunk import kept_lengths, visiting_order
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source
from ctxext.recipe.load import find_shipped, read_document

MAX_NEW_TOKENS = 16
INTRO = "A special magic number is hidden within the following text. Make sure to memorize it.\n"
NEEDLE = "\nOne of the special magic numbers for {key} is: {value}.\n"
QUESTION = "\nThe special magic number for {key} mentioned in the provided text is"


class PeakBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in self._known or storage._cdata in given:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def load(layers: int | None) -> tuple[Any, Any]:
    """The quickstart's model and tokenizer, or its first layers."""
    source = resolve_source(read_document(find_shipped("quickstart", "recipes", "recipe")).values["model"]["source"])
    model = load_model(source, load_config(source), dtype=torch.float32, device=torch.device("cpu"))
    if layers is not None:
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
    return model, load_tokenizer(source)


def make_prompts(tokenizer: Any, length: int, depths: int, samples: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts of `length` tokens over one haystack, and the expected answers."""
    reader = HaystackReader(load_haystack("python-docs"), lambda text: encode_plain(tokenizer, text))
    hay = reader.tokens("bench", length)
    draw = random.Random(0)
    for number in range(depths * samples):
        value = str(draw.randrange(10**6, 10**7))
        key = draw.choice(("amber-anchor", "brisk-basket", "calm-candle"))
        intro, needle, question = (
            encode_plain(tokenizer, text.format(key=key, value=value)) for text in (INTRO, NEEDLE, QUESTION)
        )
        room = length - len(intro) - len(needle) - len(question)
        split = round((number % depths) / max(depths - 1, 1) * room)
        ids = [*intro, *hay[:split], *needle, *hay[split:room], *question]
        yield ids, encode_plain(tokenizer, f" {value}")


def naive(model: Any, ids: list[int]) -> list[int]:
    """Plain greedy `generate`."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


def prefill_cost(config: Any, start: int, end: int) -> float:
    """FLOPs of running tokens start .. end - 1: matrix products, and attention to all tokens before."""
    inner, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * inner + 2 * kv + 3 * config.intermediate_size)
    linear = 2 * weights * (end - start)
    return config.num_hidden_layers * (linear + 4 * inner * (end**2 - start**2) / 2)


def compare(asked: argparse.Namespace) -> None:
    """Time both ways on the same prompts, and say how close the engine comes to what sharing can save."""
    model, tokenizer = load(asked.layers)
    made = list(make_prompts(tokenizer, asked.length, asked.depths, asked.samples))
    prompts, expected = [ids for ids, _ in made], [answer for _, answer in made]
    layers = model.config.num_hidden_layers
    print(f"{asked.length} tokens, {asked.depths} depths x {asked.samples} samples, {layers} layers")
    naive(model, prompts[0][:64])  # first calls pay for what later ones find ready
    Answerer(model, tokenizer).answer(prompts[0][:64], 2)
    answerer = Answerer(model, tokenizer)
    started = time.process_time()
    plain = [naive(model, ids) for ids in prompts]
    plain_seconds = time.process_time() - started
    right = sum(ids[: len(answer)] == answer for ids, answer in zip(plain, expected, strict=True))
    print(f"plain generate {plain_seconds:7.1f} CPU s, {right} of {len(prompts)} right", flush=True)
    started = time.process_time()
    found = dict(answerer.answer_sharing(prompts, MAX_NEW_TOKENS, measure_loss=False, hoped_for=expected))
    engine_seconds = time.process_time() - started
    order = visiting_order(prompts)
    kept = kept_lengths([prompts[number] for number in order])
    whole = sum(prefill_cost(model.config, 0, len(ids)) for ids in prompts)
    shared = sum(prefill_cost(model.config, keep, len(prompts[n])) for n, keep in zip(order, kept, strict=True))
    identical = sum(found[number].ids == ids for number, ids in enumerate(plain))
    ratio, limit = plain_seconds / engine_seconds, whole / shared
    work = answerer.work
    print(f"engine         {engine_seconds:7.1f} CPU s, {identical} of {len(prompts)} answers identical")
    print(f"prefilled {work.num_prefilled} of {work.num_prompt_tokens} prompt tokens")
    print(f"{work.num_verified} of {work.num_answer_tokens} answer tokens verified without a pass of their own")
    print(f"kernels: {', '.join(answerer.kernels())}")
    print(
        f"{ratio:.2f} times faster; sharing alone can save {limit:.2f} times (prefill FLOPs): {ratio / limit:.0%} of it"
    )


def memory(asked: argparse.Namespace) -> None:
    """Peak tensor bytes of one answer, losses included."""
    model, tokenizer = load(asked.layers)
    ids = next(make_prompts(tokenizer, asked.length, 1, 1))[0]
    config = model.config
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * len(ids)
    for measure_loss in (False, True):
        with PeakBytes() as seen:
            Answerer(model, tokenizer).answer(ids, 2, measure_loss=measure_loss)
        print(
            f"{len(ids)} tokens, {config.num_hidden_layers} layers, {'with' if measure_loss else 'no'} losses: weights "
            f"{weights / 2**20:.0f} + KV {kv / 2**20:.0f} + other {(seen.peak - kv) / 2**20:.0f} MiB = "
            f"{(weights + seen.peak) / (weights + kv):.2f} x (weights + KV)",
            flush=True,
        )


def main() -> None:
    """Compare times, or measure memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int)
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    asked.length = asked.length or (16384 if asked.memory else 2048)
    torch.set_num_threads(asked.threads)
    (memory if asked.memory else compare)(asked)


if __name__ == "__main__":
    main()
