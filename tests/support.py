"""What the tests share: a tiny random Llama with a byte tokenizer, a recipe and a suite for it, a silent reporter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctxext.evaluation.store import SampleResult
from ctxext.evaluation.suite import Sample
from ctxext.model.load import quiet
from ctxext.pipeline.recipes import recipe_of
from ctxext.planning.plan import Plan
from ctxext.recipe.schema import Recipe
from ctxext.train.loop import TrainHooks, TrainStart
from ctxext.train.metrics import StepMetrics

ORIGINAL_LENGTH = 128
TARGET_LENGTH = 256
EOS = "<|end|>"

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `qlora`)"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and an end token: 257 ids, any text encodes, every text has as many tokens as bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*alphabet, EOS])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Llama with 2 layers and 2 heads of 16, which knows 128 positions."""
    return LlamaConfig(
        **{
            "vocab_size": 260,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": ORIGINAL_LENGTH,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": 256,
            **changes,
        }
    )


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random model in eval mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).eval()


def save_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Model and tokenizer in a folder."""
    with quiet():
        tiny_model(seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_suite(path: Path, *rows: Mapping[str, Any], **changes: Any) -> Path:
    """A suite of pass keys in generated words; one sample in two places of 100 and of 240 tokens by default."""
    # Copies of the lists: YAML would write the second use of one as an alias, which a suite must not have.
    grid = [{**row, "depths": [*row["depths"]]} for row in rows] or [
        {"length": 100, "depths": [0.0, 0.5], "samples": 1},
        {"length": 240, "depths": [0.0, 0.5], "samples": 1},
    ]
    values = {
        "description": "tiny",
        "wording": "passkey",
        "haystack": "generated-words",
        "grid": grid,
        "max_new_tokens": 7,
        "loss_block_tokens": 32,
        **changes,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def recipe_values(model: str, suite: str, output_dir: str) -> dict[str, Any]:
    """A recipe that takes 128 positions to 256 in four steps of two short windows."""
    return {
        "model": {"source": model},
        "target_length": TARGET_LENGTH,
        "data": {
            "sources": [{"kind": "generated-words"}],
            "windows": {"mode": "skip-wise", "length": 96},
            "facts": {"share": 0.5, "style": "passkey"},
        },
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {
            "steps": 4,
            "windows_per_step": 2,
            "learning_rate": 0.01,
            "checkpoint_every": 2,
            "trackers": [],
        },
        "evaluation": {"suite": suite},
        "output_dir": output_dir,
    }


@dataclass
class Job:
    """A recipe file with its model and suite, below one folder."""

    folder: Path
    recipe_path: Path
    output: Path

    def recipe(self, *overrides: str) -> Recipe:
        """The checked recipe with `key=value` settings."""
        return recipe_of(str(self.recipe_path), list(overrides))


def make_job(folder: Path, *, model_seed: int = 0, **suite: Any) -> Job:
    """Write model, suite and recipe below `folder`."""
    model = save_tiny_model(folder / "models" / "tiny", model_seed)
    suite_path = write_suite(folder / "suite.yaml", *suite.pop("rows", ()), **suite)
    output = folder / "run"
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(str(model), str(suite_path), str(output)), sort_keys=False))
    return Job(folder, path, output)


@dataclass
class SilentReporter:
    """Keeps what a run tells; `on_step` and `on_sample` are called after every training step and every answer."""

    on_step: Callable[[StepMetrics], None] | None = None
    on_sample: Callable[[SampleResult], None] | None = None
    messages: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    starts: list[TrainStart] = field(default_factory=list)
    samples: list[SampleResult] = field(default_factory=list)

    def plan(self, plan: Plan, estimated_seconds: float, output_dir: str) -> None:
        self.messages.append(plan.plan_id)

    def stage(self, number: int, count: int, title: str) -> None:
        self.stages.append(title)

    def info(self, text: str) -> None:
        self.messages.append(text)

    @contextmanager
    def evaluation(self, title: str, samples: list[Sample]) -> Iterator[Callable[[SampleResult], None]]:
        def keep(result: SampleResult) -> None:
            self.samples.append(result)
            if self.on_sample is not None:
                self.on_sample(result)

        yield keep

    @contextmanager
    def training(self, title: str, steps: int) -> Iterator[TrainHooks]:
        yield TrainHooks(on_start=self.starts.append, on_step=self.on_step or (lambda metrics: None))

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: None


def child_environment(**changes: str) -> dict[str, str]:
    """One thread, so that results of different processes are comparable to the bit, and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **changes}


def cli(*arguments: str) -> list[str]:
    """The command that runs ctxext."""
    return [sys.executable, "-m", "ctxext.cli", *arguments]


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        cli(*arguments), cwd=cwd, env=child_environment(), text=True, capture_output=True, timeout=300
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of the steps in a training's `metrics.jsonl`, without those of its monitors."""
    return [line for line in json_lines(run / "metrics.jsonl") if "monitor" not in line]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing a file beyond `num_bytes` fails as on a full disk: the kernel refuses, nothing is simulated."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
