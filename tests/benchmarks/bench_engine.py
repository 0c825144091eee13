"""The engine against transformers' plain `generate`, on the same prompts.

    python tests/benchmarks/bench_engine.py [--length 2048] [--depths 11] [--samples 2] [--layers 30] [--threads 1]
    python tests/benchmarks/bench_engine.py --fast
    python tests/benchmarks/bench_engine.py --memory [--length 16384]

Without more: a needle at 11 depths, 2 samples sharing a haystack, as `ctxext eval` asks them. `--fast`: all 11 needles
in one text, each asked in turn (the task `needle_sweep`). Both ways take turns, prompt by prompt, so that whatever else
the machine does disturbs them alike; with `--rounds` the quickest of several counts for every prompt. Seconds are CPU
seconds of this process, with wall seconds beside them. `--memory` prefills one prompt and adds up the bytes of all
tensors alive, weights included. The model is the quickstart's SmolLM2-135M; with fewer `--layers` it answers nonsense,
in the same proportions of time.
"""

from __future__ import annotations

import argparse
import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxext.data.boundaries import encode_plain
from ctxext.evaluation.answerer import Answerer, stop_ids
from ctxext.evaluation.prompt import Prompt, suite_builder
from ctxext.evaluation.scoring import score_all
from ctxext.evaluation.suite import Suite, resolve_samples
from ctxext.evaluation.trunk import kept_lengths, visiting_order
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source
from ctxext.recipe.load import find_shipped, read_document

# CPU and wall seconds by the number of the prompt.
Times = dict[int, tuple[float, float]]


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


def make_prompts(tokenizer: Any, asked: argparse.Namespace) -> list[Prompt]:
    """The prompts of a suite of one length, in the suite's order."""
    depths = [number / max(asked.depths - 1, 1) for number in range(asked.depths)]
    task = {"task": "needle_sweep", "needles": depths} if asked.fast else {"task": "needle"}
    values = {
        "description": "benchmark",
        "haystack": "python-docs",
        "haystacks": "shared",
        "tasks": [task],
        "grid": [{"length": asked.length, "depths": depths, "samples": asked.samples}],
    }
    suite = Suite.model_validate(values)
    builder = suite_builder(suite, tokenizer)
    return [builder.build(sample) for sample in resolve_samples(suite, asked.length, asked.length)]


def naive(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int) -> list[int]:
    """Plain greedy `generate`, with the engine's stop tokens."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids(model, tokenizer)) or None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


class Clock:
    """CPU and wall seconds of what ran since the last look."""

    def __init__(self) -> None:
        self.look()

    def look(self) -> tuple[float, float]:
        now = time.process_time(), time.perf_counter()
        last = getattr(self, "_last", now)
        self._last = now
        return now[0] - last[0], now[1] - last[1]


def prefill_cost(config: Any, start: int, end: int) -> float:
    """FLOPs of running tokens start .. end - 1: matrix products, and attention to all tokens before."""
    inner, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * inner + 2 * kv + 3 * config.intermediate_size)
    linear = 2 * weights * (end - start)
    return config.num_hidden_layers * (linear + 4 * inner * (end**2 - start**2) / 2)


def one_round(model: Any, tokenizer: Any, prompts: list[Prompt]) -> tuple[Times, Times, list[int], Answerer]:
    """Answer every prompt both ways, in turns; returns the times of each and the prompts answered alike."""
    answerer, budget = Answerer(model, tokenizer), prompts[0].max_new_tokens
    hopes = [encode_plain(tokenizer, f" {prompt.answers[0]}") for prompt in prompts]
    plain, engine, alike = dict[int, tuple[float, float]](), dict[int, tuple[float, float]](), list[int]()
    ids = [prompt.input_ids for prompt in prompts]
    found = answerer.answer_sharing(ids, budget, measure_loss=False, hoped_for=hopes)
    clock = Clock()
    for number, answer in found:
        engine[number] = clock.look()
        expected = naive(model, tokenizer, ids[number], budget)
        plain[number] = clock.look()
        alike += [number] if answer.ids == expected else []
        prompt, text = prompts[number], tokenizer.decode(expected, skip_special_tokens=True)
        score = max(score_all(text, prompt.answers, prompt.distractors, metric=prompt.metric).values())
        print(
            f"  {prompt.sample.sample_id}: engine {engine[number][0]:6.2f}, plain {plain[number][0]:6.2f} CPU s, "
            f"{'identical' if answer.ids == expected else 'DIFFERENT'}, {'right' if score else 'wrong'}",
            flush=True,
        )
        clock.look()
    return plain, engine, alike, answerer


def compare(asked: argparse.Namespace) -> None:
    """Time both ways on the same prompts, and say how close the engine comes to what sharing can save."""
    model, tokenizer = load(asked.layers)
    prompts = make_prompts(tokenizer, asked)
    name, layers = prompts[0].sample.cell.task, model.config.num_hidden_layers
    print(
        f"{name}: {asked.length} tokens, {asked.depths} depths x {asked.samples} samples, {layers} layers", flush=True
    )
    naive(model, tokenizer, prompts[0].input_ids[:64], 2)  # first calls pay for what later ones find ready
    Answerer(model, tokenizer).answer(prompts[0].input_ids[:64], 2)
    rounds = [one_round(model, tokenizer, prompts) for _ in range(asked.rounds)]
    ids = [prompt.input_ids for prompt in prompts]
    order = visiting_order(ids)
    kept = kept_lengths([ids[number] for number in order])
    whole = sum(prefill_cost(model.config, 0, len(row)) for row in ids)
    shared = sum(prefill_cost(model.config, keep, len(ids[n])) for n, keep in zip(order, kept, strict=True))
    answerer, work, limit = rounds[-1][3], rounds[-1][3].work, whole / shared
    print(f"{min(len(alike) for _, _, alike, _ in rounds)} of {len(prompts)} answers identical")
    print(f"prefilled {work.num_prefilled} of {work.num_prompt_tokens} prompt tokens")
    print(f"{work.num_verified} of {work.num_answer_tokens} answer tokens verified without a pass of their own")
    print(f"kernels: {', '.join(answerer.kernels())}")
    for kind, seconds in enumerate(("CPU", "wall")):
        plain, engine = (
            sum(min(times[side][number][kind] for times in rounds) for number in range(len(prompts))) for side in (0, 1)
        )
        print(
            f"{seconds} seconds: plain generate {plain:.1f}, engine {engine:.1f}: {plain / engine:.2f} times faster; "
            f"sharing alone can save {limit:.2f} times (prefill FLOPs), {plain / engine / limit:.0%} of it",
            flush=True,
        )


def memory(asked: argparse.Namespace) -> None:
    """Peak tensor bytes of one answer, losses included."""
    asked.depths = asked.samples = 1
    model, tokenizer = load(asked.layers)
    ids = make_prompts(tokenizer, asked)[0].input_ids
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
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    asked.length = asked.length or (16384 if asked.memory else 2048)
    torch.set_num_threads(asked.threads)
    (memory if asked.memory else compare)(asked)


if __name__ == "__main__":
    main()
