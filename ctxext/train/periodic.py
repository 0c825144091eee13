"""Evaluation during training: a small suite every so many steps, the best checkpoint by it, and an early end.

Too many steps hurt (PoSE's authors among others), and the loss on training windows does not tell. What counts is, in
this order: the needles beyond the original length, which is what the extension is for; then the loss on short texts,
which is what it must not cost; then the earlier step. All of it is read back from stored samples, so that a resumed
training decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxext.errors import ArtefactError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.perplexity import load_perplexity
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.sharding import this_launch
from ctxext.evaluation.store import SampleResult, load_samples
from ctxext.evaluation.suite import Sample, Suite
from ctxext.model.placement import input_device
from ctxext.model.windowed import WINDOWED, attention_for
from ctxext.planning.periodic_plan import deciding_samples
from ctxext.recipe.monitors import PeriodicBlock
from ctxext.rope.families import text_config

FOLDER = Path("eval") / "during"
# Of an adapter's or merged folder's `ctxext.json`: which step's weights these are, and why.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Standing:
    """What one evaluation found.

    Attributes:
        beyond: mean score of the needles beyond the original length.
        short_loss: mean loss on short texts, in nats; None where the suite has none.
    """

    step: int
    beyond: float
    num_beyond: int
    short_loss: float | None

    @property
    def rank(self) -> tuple[float, float, int]:
        """Larger is better."""
        return (self.beyond, -math.inf if self.short_loss is None else -self.short_loss, -self.step)

    def text(self) -> str:
        """'needles beyond the original length 0.75 (8), short-context loss 2.413'."""
        loss = "" if self.short_loss is None else f", short-context loss {self.short_loss:.3f}"
        return f"needles beyond the original length {self.beyond:.2f} ({self.num_beyond}){loss}"


@dataclass(frozen=True)
class Chosen:
    """Which step's weights a training ends with, and why."""

    step: int
    last_step: int
    reason: str


class PeriodicEvaluation:
    """Evaluates the model in memory, adapter active, in all processes that were launched.

    Args:
        folder: of the arm; gets `eval/during/step-000040/`.
        weights: what identifies the arm's weights besides the step.
        environment: for `run.json`.
        last_step: is always evaluated.
    """

    def __init__(
        self,
        settings: PeriodicBlock,
        suite: Suite,
        tokenizer: Any,
        folder: Path,
        *,
        original_length: int,
        target_length: int,
        last_step: int,
        weights: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        self._settings = settings
        self._suite = suite
        self._tokenizer = tokenizer
        self._folder = folder / FOLDER
        self._original_length = original_length
        self._target_length = target_length
        self._last_step = last_step
        self._weights = weights
        self._environment = environment
        self._standings: list[Standing] = []

    @property
    def best(self) -> Standing | None:
        """The best evaluation so far."""
        return max(self._standings, key=lambda standing: standing.rank, default=None)

    @property
    def finished(self) -> bool:
        """Whether so many evaluations in a row were no better that training ends here."""
        patience, best = self._settings.stop_after, self.best
        if patience is None or best is None:
            return False
        return sum(standing.step > best.step for standing in self._standings) >= patience

    def due(self, step: int) -> bool:
        """Whether step `step` (from 1) is evaluated."""
        return step > 0 and (step % self._settings.every == 0 or step == self._last_step)

    def restore(self, step: int) -> None:
        """Take over what was found before step `step`, which may itself be unfinished.

        Raises:
            ArtefactError: an evaluation that decided something is gone.
        """
        self._standings = [self._stored(before) for before in range(1, step) if self.due(before)]

    def evaluate(
        self,
        model: Any,
        step: int,
        *,
        check_stop: Callable[[], None],
        precision: AbstractContextManager[Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate `model` as it is after `step`; what is stored already is not asked again.

        Args:
            model: the base model with its adapter inside; comes back in the mode that it was in.
            precision: the autocast of training.

        Returns:
            The line for `metrics.jsonl`.
        """
        started = time.perf_counter()
        with watching_only(model), precision or nullcontext():
            evaluate_arm(
                Answerer(model, self._tokenizer),
                self._suite,
                folder=self._of(step),
                title=f"step {step}",
                original_length=self._original_length,
                target_length=self._target_length,
                weights={**self._weights, "step": step},
                facts={"step": step, "environment": self._environment},
                reporter=_Silent(),
                check_stop=check_stop,
            )
        standing = this_launch().from_main(lambda: self._stored(step))  # the main process measures the short texts
        self._standings.append(standing)
        best = self.best
        assert best is not None
        return {
            "beyond_original": standing.beyond,
            "num_beyond": standing.num_beyond,
            "short_loss": standing.short_loss,
            "best_step": best.step,
            "seconds": time.perf_counter() - started,
            "text": standing.text() + (" (best so far)" if best.step == step else f" (best: step {best.step})"),
        }

    def chosen(self, last_step: int) -> Chosen:
        """Which step's weights to end with after `last_step`."""
        best = self.best
        assert best is not None
        why = f"{best.text()}; the best of {len(self._standings)} evaluations during training"
        if self.finished:
            why += f", which ended after {self._settings.stop_after} without a better one"
        return Chosen(best.step, last_step, why)

    def _of(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _stored(self, step: int) -> Standing:
        folder = self._of(step)
        deciding = deciding_samples(self._suite, self._original_length, self._target_length)
        wanted = {sample.sample_id for sample in deciding}
        found = [sample for sample in load_samples(folder) if sample.sample_id in wanted]
        if len(found) < len(wanted):
            raise ArtefactError(
                "an evaluation during training is not complete, so the best checkpoint is not known",
                where=str(folder),
                got=f"{len(found)} samples",
                expected=str(len(wanted)),
            )
        # What did not fit into memory was not found either.
        score = sum(sample.score for sample in found if sample.status == "ok") / len(found)
        return Standing(step, score, len(found), short_loss(folder, self._original_length))


def short_loss(folder: Path, original_length: int) -> float | None:
    """Mean loss on the first plain texts that fit into the original length."""
    for result in load_perplexity(folder):
        if (result.window_tokens or result.length_tokens) <= original_length:
            return result.loss
    return None


@contextmanager
def watching_only(model: Any) -> Iterator[None]:
    """Evaluation mode inside the block, uncompiled, with the attention that `ctxext eval` loads a model with.

    Modes, attention and random numbers are as before behind it.
    """
    modes = [(module, module.training) for module in model.modules()]
    device, text = input_device(model), text_config(model.config)
    attention = text._attn_implementation
    model.eval()
    if attention not in ("sdpa", WINDOWED):  # of training only: it may know no cache
        text._attn_implementation = attention_for(model.config, device)
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        text._attn_implementation = attention
        for module, training in modes:
            module.training = training


class _Silent:
    """Training shows its own progress; the result is one line there."""

    @contextmanager
    def evaluation(self, title: str, samples: list[Sample]) -> Iterator[Callable[[SampleResult], None]]:
        """Shows nothing."""
        yield lambda result: None

    def info(self, text: str) -> None:
        """Says nothing."""
