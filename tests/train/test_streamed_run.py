"""A run that reads a stream trains, and goes on from a checkpoint with exactly the windows that it would have read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from support import SilentReporter, make_job, step_lines

from ctxext.pipeline.extend import extend

SETTINGS = ("data.cache=none", "train.checkpoint_every=2", "train.keep_checkpoints=4")


def test_a_streamed_run_goes_on_exactly(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    extend(job.recipe(*SETTINGS), SilentReporter(), last_stage="train")
    expected = step_lines(job.output)
    assert [line["step"] for line in expected] == [1, 2, 3, 4]
    state = json.loads((job.output / "checkpoints" / "step-000002" / "stream.json").read_text())
    assert state["read"] == 4
    assert state["block"]["sources"][0]["num_tokens"] == 0

    interrupted = Path(shutil.copytree(job.output, tmp_path / "interrupted"))
    shutil.rmtree(interrupted / "adapter")
    shutil.rmtree(interrupted / "checkpoints" / "step-000004")
    extend(job.recipe(*SETTINGS, f"output_dir={interrupted}"), SilentReporter(), last_stage="train")
    again = step_lines(interrupted)
    assert [line["loss"] for line in again] == [line["loss"] for line in expected]
    assert [line["grad_norm"] for line in again] == [line["grad_norm"] for line in expected]


def test_isolated_documents_and_best_fit_windows_train(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    windows = '{"mode": "full-length", "packing": "best-fit", "positions": "per-document"}'
    recipe = job.recipe(f"data.windows={windows}", "data.length.allow_short=true", "data.facts=null")
    reporter = SilentReporter()
    extend(recipe, reporter, last_stage="train")
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert reporter.starts[0].kernels == [kernel, f"{kernel}_backward"]
    assert json.loads((job.output / "plan.json").read_text())["attention"].startswith("ctxext_documents")
    lines = step_lines(job.output)
    assert len(lines) == 4
    # Padding and the first tokens of documents are no targets.
    assert all(line["num_tokens"] < 2 * 255 for line in lines)
