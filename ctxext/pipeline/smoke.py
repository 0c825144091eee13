"""`ctxext extend --smoke`: every stage of a recipe with tiny numbers, in a folder of its own, and what that shows.

After the run training is taken back to its first step and done again from the checkpoint, which must give the weights
of the first time.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.sharding import this_launch
from ctxext.evaluation.smoke import smoke_suite
from ctxext.evaluation.suite import load_suite
from ctxext.files import read_json, write_json_atomic, write_text_atomic
from ctxext.pipeline.extend import output_folder
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import RunFolder
from ctxext.pipeline.stages import run_recipe
from ctxext.planning.plan import Plan
from ctxext.recipe.load import to_yaml
from ctxext.recipe.schema import Recipe
from ctxext.recipe.smoke import STEPS, smoke_recipe
from ctxext.train.adapter import read_tensors
from ctxext.train.checkpoint import checkpoint_path
from ctxext.train.metrics import read_metrics

MARK = "smoke.json"


@dataclass(frozen=True)
class SmokeResult:
    """What a smoke test has shown, and what not, in sentences for people."""

    folder: Path
    seconds: float
    shown: list[str]
    not_shown: list[str]


class _PlanTold:
    """A reporter that does not show the plan a second time."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def plan(self, plan: Plan, estimated_seconds: float, output_dir: str) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)


def run_smoke(recipe: Recipe, reporter: Reporter) -> SmokeResult:
    """Run everything that `recipe` would, tiny; the recipe's own output folder is never touched.

    Raises:
        CtxextError: what would have ended the real run as well.
        ArtefactError: the resumed training ended in other weights.
    """
    started = time.perf_counter()
    folder = smoke_folder(recipe)
    launch = this_launch()
    suite = smoke_suite(load_suite(recipe.evaluation.suite))
    if launch.is_main:
        _prepare(folder, to_yaml(suite.model_dump(mode="json")))
    launch.wait()
    tiny = smoke_recipe(recipe, suite=str(folder / "suite.yaml"), output_dir=str(folder), num_processes=launch.count)
    run = RunFolder(run_recipe(tiny, reporter))
    reporter.info("training once more from its first checkpoint")
    _resume_again(run, tiny, _PlanTold(reporter))
    seconds = time.perf_counter() - started
    return SmokeResult(folder, seconds, _shown(run, tiny), _not_shown(recipe, tiny, suite.grid[0].length))


def smoke_folder(recipe: Recipe) -> Path:
    """Beside the recipe's own output folder."""
    folder = output_folder(recipe)
    return folder.with_name(f"{folder.name}-smoke")


def _prepare(folder: Path, suite: str) -> None:
    """An empty folder, which an earlier smoke test may have filled and nobody else."""
    if folder.exists() and not (folder / MARK).is_file():
        raise UsageError(
            "the folder for the smoke test holds something else", where=str(folder), hint="Choose another output_dir=."
        )
    shutil.rmtree(folder, ignore_errors=True)
    write_json_atomic(folder / MARK, {"note": "made by ctxext extend --smoke; may be removed"})
    write_text_atomic(folder / "suite.yaml", suite)


def _resume_again(run: RunFolder, tiny: Recipe, reporter: Any) -> None:
    """Take training back to its first checkpoint, train again, and compare the weights."""
    last = checkpoint_path(run.path / "checkpoints", STEPS)
    before = read_tensors(last / "adapter.safetensors")
    this_launch().wait()  # until all have read
    if this_launch().is_main:
        shutil.rmtree(last)
        assert run.trained is not None
        shutil.rmtree(run.trained)
    this_launch().wait()
    run_recipe(tiny, reporter, last_stage="train")
    after = read_tensors(last / "adapter.safetensors")
    changed = [name for name in before if not after[name].equal(before[name])]
    if changed:
        raise ArtefactError(
            "training that was resumed from a checkpoint ended in other weights than before",
            where=str(last),
            got=f"{len(changed)} of {len(before)} tensors differ, {changed[0]} first",
            expected="the same bits",
            hint="Some operation of this model is not deterministic on this device; everything else has worked.",
        )


def _shown(run: RunFolder, tiny: Recipe) -> list[str]:
    plan, (lines, _) = read_json(run.path / "plan.json"), read_metrics(run.path)
    losses = ", ".join("skipped" if line["loss"] is None else f"{line['loss']:.3f}" for line in lines)
    arms = ", ".join(plan["arms"])
    stages = "" if tiny.stages is None else f", in {len(tiny.stages)} stages"
    return [
        f"the model loads, and its positions are in effect: {plan['original_length']:,} -> {plan['target_length']:,}",
        "the sources can be read, and windows made of them",
        f"training runs{stages}: {STEPS} steps, loss {losses}, at positions up to {plan['target_length']:,}",
        "a checkpoint is written, and training resumed from it ends in the same weights, to the bit",
        "the merged checkpoint is written, and stock transformers reads it back with the same logits",
        f"the suite's tasks can be asked and scored ({arms}), report and model card written",
    ]


def _not_shown(recipe: Recipe, tiny: Recipe, prompt_tokens: object) -> list[str]:
    length, wanted = tiny.data.windows.length, recipe.data.windows.length or recipe.target_length
    rows = [
        f"that a real step fits into memory: windows had {length:,} tokens instead of {wanted:,}; `ctxext plan` "
        "estimates that, and the probe before the first step measures it",
        f"that long prompts can be answered: these had {prompt_tokens:,} tokens",
        "that the model becomes any better: no number of this run means anything",
    ]
    if recipe.data.windows.mode == "full-length":
        rows.append("windows of the full length: positions skipped over it instead")
    if recipe.train.evaluate is not None:
        rows.append("the evaluation during training, which was left out")
    if left := [name for name in recipe.train.trackers if name != "tensorboard"]:
        rows.append(f"the trackers {', '.join(left)}, which were left out")
    return rows
