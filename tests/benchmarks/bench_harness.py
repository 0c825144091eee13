"""The engine against lm-evaluation-harness on the harness's own RULER needles: the same model, prompts and budget.

    pip install 'ctxext[harness]'
    python tests/benchmarks/bench_harness.py [--length 2048] [--samples 12] [--batch-size 1] [--layers 30] [--threads 1]

The harness makes the prompts of `niah_single_1` (a needle in repeated noise, which needs no download) and answers them
with its HFLM model class on transformers' `generate`; then the engine answers the same token ids with the same budget
of 128 tokens and the same stop token, along shared beginnings and with the expected answer verified in one pass. The
times are CPU seconds of this process, which other work on the machine disturbs least. Both sets of answers get the
harness's score, with Wilson 95% intervals.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from typing import Any

import torch
from bench_engine import load

from ctxext.data.boundaries import encode_plain
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.harness import require_harness
from ctxext.evaluation.scoring import string_match_all
from ctxext.evaluation.statistics import wilson
from ctxext.evaluation.trunk import num_shared_tokens

TASK = "niah_single_1"
BUDGET = 128


def harness_answers(model: Any, tokenizer: Any, asked: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """The harness's samples, and the CPU seconds in which it answered them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class Timed(HFLM):
        seconds = 0.0

        def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
            started = time.process_time()
            found: list[str] = super().generate_until(*args, **kwargs)
            Timed.seconds += time.process_time() - started
            return found

    reach = model.config.max_position_embeddings
    timed = Timed(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        max_length=reach,
        batch_size=asked.batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        manager = TaskManager(metadata={"tokenizer": folder, "max_seq_lengths": [asked.length]})
        found = simple_evaluate(
            timed, tasks=[TASK], limit=asked.samples, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    return found["samples"][TASK], Timed.seconds


def score(text: str, expected: list[str]) -> float:
    """RULER's score of one answer."""
    return string_match_all(text, expected)


def main() -> int:
    """Compare times and scores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=1, help="of the harness")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    version = require_harness()
    torch.set_num_threads(asked.threads)
    model, tokenizer = load(asked.layers)
    answerer = Answerer(model, tokenizer)
    answerer.answer(encode_plain(tokenizer, "The first call pays for what later ones find ready."), 4)

    samples, harness_seconds = harness_answers(model, tokenizer, asked)
    prompts = [list(tokenizer(sample["arguments"][0][0]).input_ids) for sample in samples]
    expected = [sample["target"] for sample in samples]
    hoped_for = [encode_plain(tokenizer, f" {', '.join(answers)}") for answers in expected]
    started = time.process_time()
    found = dict(answerer.answer_sharing(prompts, BUDGET, measure_loss=False, hoped_for=hoped_for))
    engine_seconds = time.process_time() - started

    texts = [tokenizer.decode(found[n].ids, skip_special_tokens=True) for n in range(len(prompts))]
    theirs = [sample["filtered_resps"][0] for sample in samples]
    shared = num_shared_tokens(prompts)
    right = [
        sum(score(text, answers) == 1.0 for text, answers in zip(row, expected, strict=True)) for row in (theirs, texts)
    ]
    equal = sum(mine.strip() == other.strip() for mine, other in zip(texts, theirs, strict=True))
    lengths = [len(ids) for ids in prompts]
    print(f"{TASK} of lm-evaluation-harness {version}, {asked.length} tokens: {len(prompts)} prompts of", end=" ")
    print(f"{min(lengths)}-{max(lengths)} tokens, {shared / sum(lengths):.0%} of which stand in shared beginnings")
    each = harness_seconds / len(prompts), engine_seconds / len(prompts)
    print(f"harness {harness_seconds:7.1f} CPU s, {each[0]:6.2f} a sample (batch {asked.batch_size})")
    print(f"engine  {engine_seconds:7.1f} CPU s, {each[1]:6.2f} a sample")
    work = answerer.work
    print(f"prefilled {work.num_prefilled} of {work.num_prompt_tokens} prompt tokens", end="; ")
    print(f"{work.num_verified} of {work.num_answer_tokens} answer tokens verified without a pass of their own")
    for name, count in zip(("harness", "engine "), right, strict=True):
        print(f"{name} right: {wilson(count, len(prompts)).text()}")
    print(f"{equal} of {len(prompts)} answers are the same text")
    print(f"{harness_seconds / engine_seconds:.2f} times faster a sample")
    return 0


if __name__ == "__main__":
    sys.exit(main())
