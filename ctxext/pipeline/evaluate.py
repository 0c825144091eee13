"""`ctxext eval`: one model or several arms, one suite, one folder of samples and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctxext.errors import ArtefactError, UnsupportedModelError, UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.backend import Backend
from ctxext.evaluation.backends.choice import open_backend
from ctxext.evaluation.backends.server import ServerBackend
from ctxext.evaluation.cells import Over
from ctxext.evaluation.conclusions import Arm
from ctxext.evaluation.report import ReportFacts, write_report
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.sharding import this_launch
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import resolve_samples, stored_suite
from ctxext.files import read_json, write_json_atomic
from ctxext.model.load import load_tokenizer, short_name
from ctxext.model.placement import placement
from ctxext.pipeline.arms import OpenedArm
from ctxext.pipeline.evaluation_plan import Evaluation, EvaluationRequest, arm_folder, prepare_evaluation
from ctxext.pipeline.excerpts import read_excerpts, write_excerpts
from ctxext.pipeline.gates import enforce_gates
from ctxext.pipeline.report import self_check_notes, stored_perplexity
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import FACTS_NAME, environment_facts
from ctxext.recipe.gates import GatesBlock
from ctxext.recipe.load import Document, apply_overrides, validate_document
from ctxext.rope.verify import verify_positions
from ctxext.train.signals import StopRequest


def evaluate_models(request: EvaluationRequest, reporter: Reporter) -> Path:
    """Evaluate every arm on the same prompts and return the folder.

    Raises:
        CtxextError: an arm or the suite missing, a length out of reach, an output folder of something else.
        GateError: everything was evaluated, and a gate is not met.
    """
    gates, launch = _gates(request.gates), this_launch()
    evaluation = prepare_evaluation(request, reporter)
    environment = environment_facts(str(evaluation.device), str(evaluation.dtype).removeprefix("torch."))
    with StopRequest() as stop:
        for arm in evaluation.arms:
            _evaluate(arm, evaluation, environment, reporter, stop)
    if not launch.is_main:
        return evaluation.folder
    facts = _facts(request, evaluation, environment)
    write_json_atomic(
        evaluation.folder / FACTS_NAME,
        {
            **asdict(facts),
            "arms": [{"name": arm.name, "label": arm.label} for arm in evaluation.arms],
            "samples": [sample.sample_id for sample in evaluation.samples],
        },
    )
    _, arms = gather_evaluation(evaluation.folder)
    write_excerpts(evaluation.folder, evaluation.suite, load_tokenizer(evaluation.arms[0].source), arms)
    report_evaluation(evaluation.folder)
    if gates is not None:
        names = [arm.name for arm in arms]
        enforce_gates(
            gates,
            arms,
            evaluation.folder,
            reporter,
            original_length=evaluation.original_length,
            answer_tokens=evaluation.suite.num_answer_tokens,
            judged="extended" if "extended" in names else names[-1],
        )
    return evaluation.folder


def report_evaluation(folder: Path, over: Over = "depth") -> Path:
    """Draw everything again from the samples alone and return the page.

    Args:
        over: what the rows of the pictures are.

    Raises:
        ArtefactError: no such folder.
    """
    facts, arms = gather_evaluation(folder)
    perplexity = stored_perplexity({arm.name: arm_folder(folder, arm.name, len(arms)) for arm in arms})
    return write_report(
        folder / "report", facts, arms, excerpts=read_excerpts(folder), perplexity=perplexity, over=over
    )


def gather_evaluation(folder: Path) -> tuple[ReportFacts, list[Arm]]:
    """What a report shows, from a folder that `evaluate_models` has finished.

    Raises:
        ArtefactError: no such folder.
    """
    stored = read_json(folder / FACTS_NAME)
    labels = stored.pop("arms", None) or [{"name": "base", "label": short_name(stored["model"])}]
    kept = stored.pop("samples", None)
    facts = ReportFacts(**stored)
    suite = stored_suite(facts.suite)
    wanted = set(kept or [s.sample_id for s in resolve_samples(suite, facts.original_length, facts.target_length)])
    arms = []
    for entry in labels:
        own = arm_folder(folder, entry["name"], len(labels))
        samples = [sample for sample in load_samples(own) if sample.sample_id in wanted]
        if not samples:
            raise ArtefactError("the arm has no samples", where=str(own))
        arms.append(
            Arm(entry["name"], entry["label"], recorded=False, samples=samples, run=read_json(own / "run.json"))
        )
    return facts, arms


def _evaluate(
    arm: OpenedArm, evaluation: Evaluation, environment: dict[str, Any], reporter: Reporter, stop: StopRequest
) -> None:
    backend = _backend(arm, evaluation, reporter)
    identity, folder = arm.identity(), evaluation.arm_folder(arm)
    evaluate_arm(
        backend,
        evaluation.suite,
        folder=folder,
        title=arm.label if len(evaluation.arms) > 1 else arm.source.name,
        original_length=evaluation.original_length,
        target_length=evaluation.target_length,
        weights=identity,
        facts={"arm": arm.name, "environment": environment},
        reporter=reporter,
        check_stop=lambda: stop.check("finished samples are saved"),
        samples=evaluation.samples,
    )
    if isinstance(backend, ServerBackend):
        if lengths := backend.length_summary():
            reporter.info(lengths)
        backend.close()


def _backend(arm: OpenedArm, evaluation: Evaluation, reporter: Reporter) -> Backend:
    """What answers for an arm.

    Raises:
        UsageError: an arm that another program cannot be.
    """
    choice, tokenizer = evaluation.backend, load_tokenizer(arm.source)
    if choice.loads_here:
        model = arm.load(dtype=evaluation.dtype, device=evaluation.device, device_map=choice.device_map)
        try:
            reporter.info(f"{arm.name}: {verify_positions(model, arm.config).summary()}")
        except UnsupportedModelError as error:  # evaluating needs no RoPE; one that differs from its config is an error
            reporter.info(f"{arm.name}: positions not verified: {error}")
        if where := placement(model):
            reporter.info(where)
        return Answerer(model, tokenizer, batch_size=evaluation.batch_size)
    if arm.adapter is not None:
        raise UsageError(
            "this backend takes whole checkpoints, not adapters",
            where=f"--arm {arm.name}",
            hint="Merge it first: ctxext merge ADAPTER OUT.",
        )
    longest = max(sample.cell.length_tokens for sample in evaluation.samples)
    return open_backend(
        choice,
        arm.source,
        arm.config,
        tokenizer,
        dtype=evaluation.dtype,
        max_length_tokens=longest + evaluation.suite.num_answer_tokens,
        own_positions=arm.method != "as it is",
        report=reporter.info,
    )


def _facts(request: EvaluationRequest, evaluation: Evaluation, environment: dict[str, Any]) -> ReportFacts:
    arms = evaluation.arms
    model = request.model or arms[0].source.name
    return ReportFacts(
        title=f"{short_name(model)}: retrieval by position",
        model=model,
        method=", ".join(f"{arm.name}: {arm.method}" for arm in arms) if len(arms) > 1 else arms[0].method,
        original_length=evaluation.original_length,
        target_length=evaluation.target_length,
        windows="none (nothing was trained here)",
        suite={"name": request.suite, **evaluation.suite.model_dump(mode="json")},
        plan_id="-",
        environment=environment,
        notes=[
            *evaluation.notes,
            *self_check_notes({arm.name: evaluation.arm_folder(arm) for arm in arms}),
        ],
    )


def _gates(settings: Sequence[str]) -> GatesBlock | None:
    if not settings:
        return None
    return validate_document(apply_overrides(Document("--gate", {}, {}), settings), GatesBlock)
