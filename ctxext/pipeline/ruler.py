"""`ctxext eval MODEL --ruler-file FILE`: RULER's own files, answered and scored as RULER does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctxext.errors import UnsupportedModelError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.backend import Backend
from ctxext.evaluation.ruler_file import (
    RulerBuilder,
    RulerFile,
    RulerScores,
    read_ruler_files,
    require_reach,
    ruler_identity,
    ruler_scores,
    ruler_suite,
)
from ctxext.evaluation.run import evaluate_prompts
from ctxext.evaluation.sharding import this_launch
from ctxext.files import write_json_atomic
from ctxext.model.load import choose_device, choose_dtype, load_tokenizer, short_name
from ctxext.pipeline.arms import ArmSpec, OpenedArm, open_arm
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import environment_facts
from ctxext.rope.verify import verify_positions
from ctxext.train.signals import StopRequest

SCORES_NAME = "ruler.json"


def evaluate_ruler_files(
    model: str,
    names: Sequence[str],
    *,
    reporter: Reporter,
    task: str | None = None,
    length_tokens: int | None = None,
    output: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    beyond_reach: bool = False,
) -> Path:
    """Answer and score every line of the files, print RULER's own numbers, and return the folder.

    Args:
        names: files, or folders with some.
        task, length_tokens: what the paths do not say.
        beyond_reach: also ask prompts longer than the model reaches.

    Raises:
        CtxextError: model or files missing or damaged, prompts out of the model's reach.
    """
    files = read_ruler_files(names, task=task, length_tokens=length_tokens)
    for file in files:
        reporter.info(
            f"{file.path}: {file.task}, {len(file.rows)} samples of {len(set(file.texts))} texts, "
            f"{file.length_tokens:,} tokens (by {file.length_from})"
        )
    arm = open_arm(ArmSpec("base"), model=model, revision=revision)
    tokenizer = load_tokenizer(arm.source)
    builder = RulerBuilder(tokenizer, files)
    samples = [sample for file in files for sample in file.samples]
    if not beyond_reach:
        require_reach(builder, samples, arm.reach, arm.source.name)
    folder = Path(output) if output else Path("runs") / f"ruler-{short_name(arm.source.name)}"
    device = choose_device()
    loaded = arm.load(dtype=choose_dtype(dtype, device), device=device)
    try:
        reporter.info(verify_positions(loaded, arm.config).summary())
    except UnsupportedModelError as error:  # evaluating needs no RoPE; a RoPE that differs from its config is an error
        reporter.info(f"positions not verified: {error}")
    backend: Backend = Answerer(loaded, tokenizer)
    environment = environment_facts(str(device), str(loaded.dtype).removeprefix("torch."))
    with StopRequest() as stop:
        results = evaluate_prompts(
            backend,
            builder,
            samples,
            ruler_suite(files),
            folder=folder,
            title=f"{arm.source.name}: RULER's own files",
            identity={"weights": arm.identity(), **backend.identity(), **ruler_identity()},
            facts={"arm": "base", "environment": environment, "ruler_files": [file.about() for file in files]},
            reporter=reporter,
            check_stop=lambda: stop.check("finished samples are saved"),
        )
    if this_launch().is_main:
        scores = ruler_scores(results)
        _write(folder, arm, scores, files)
        for line in scores.lines():
            reporter.info(line)
    return folder


def _write(folder: Path, arm: OpenedArm, scores: RulerScores, files: Sequence[RulerFile]) -> None:
    write_json_atomic(
        folder / SCORES_NAME,
        {
            "model": arm.source.name,
            "original_length": arm.original_length,
            "reach": arm.reach,
            **scores.to_json(),
            "files": [file.about() for file in files],
        },
    )
