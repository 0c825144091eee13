"""`ctxext eval`: one model or several arms, one suite, one folder of samples and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ctxext.errors import ArtefactError, UnsupportedModelError, UsageError
from ctxext.evaluation.answerer import Answerer, BatchSize, parse_batch_size
from ctxext.evaluation.backend import Backend
from ctxext.evaluation.backends.choice import NO_LOSSES, BackendChoice, open_backend
from ctxext.evaluation.backends.server import ServerBackend
from ctxext.evaluation.cells import Over
from ctxext.evaluation.conclusions import Arm, coverage_sentence
from ctxext.evaluation.effective_length import bound_feasibility, independent_samples
from ctxext.evaluation.gates import check_gates, gate_error
from ctxext.evaluation.perplexity import load_perplexity, longest_positions, measure_perplexity
from ctxext.evaluation.prompt import suite_builder
from ctxext.evaluation.report import ReportFacts, write_report
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.selection import (
    affordable,
    describe_samples,
    limited,
    parse_depths,
    parse_lengths,
    with_grid,
)
from ctxext.evaluation.sharding import this_launch
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import Sample, Suite, load_suite, resolve_samples, stored_suite
from ctxext.files import read_json, write_json_atomic
from ctxext.model.load import choose_device, choose_dtype, load_tokenizer, short_name
from ctxext.model.placement import placement
from ctxext.pipeline.arms import OpenedArm, open_arm, parse_arms
from ctxext.pipeline.console import duration
from ctxext.pipeline.excerpts import read_excerpts, write_excerpts
from ctxext.pipeline.patch import on_existing_of
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import environment_facts
from ctxext.planning.cost import estimated_seconds, measured_flops_per_second, model_shape
from ctxext.recipe.gates import GatesBlock
from ctxext.recipe.load import Document, apply_overrides, validate_document
from ctxext.rope.verify import verify_positions
from ctxext.train.signals import StopRequest

FACTS_NAME = "evaluation.json"
MOST_ANSWER_TOKENS = 8192
ARMS_FOLDER = "arms"


@dataclass(frozen=True)
class EvaluationRequest:
    """What `ctxext eval` was asked for.

    Attributes:
        model: as it is, or what arms are variants of.
        arms: `--arm` texts; none: the one model as it is.
        suite_settings: key=value that override the suite.
        lengths, depths, num_samples: another grid.
        limit: samples a task.
        max_minutes: of all arms together; drops samples, never the longest length.
        apply_chat_template, thinking, question_first: switched on in the suite.
        max_new_tokens: of every task's answers.
        target_length, method, on_existing: of arms that are extended on loading.
        beyond_reach: also ask prompts longer than the model reaches, to see it fail there.
        gates: key=value of `evaluation.gates`.
        backend: what answers; the model in this process by default.
        batch_size: prompts answered together by a model in this process; `auto` goes by the machine.
    """

    model: str | None
    arms: Sequence[str] = ()
    suite: str = "quick"
    suite_settings: Sequence[str] = ()
    output: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    lengths: str | None = None
    depths: str | None = None
    num_samples: int | None = None
    limit: int | None = None
    max_minutes: float | None = None
    apply_chat_template: bool = False
    thinking: bool = False
    max_new_tokens: int | None = None
    question_first: bool = False
    target_length: int | None = None
    method: str = "yarn"
    on_existing: str = "refuse"
    beyond_reach: bool = False
    gates: Sequence[str] = ()
    backend: BackendChoice = field(default_factory=BackendChoice)
    batch_size: str = "auto"


@dataclass(frozen=True)
class _Evaluation:
    """What all arms share."""

    suite: Suite
    arms: list[OpenedArm]
    samples: list[Sample]
    original_length: int
    target_length: int
    folder: Path
    device: torch.device
    dtype: torch.dtype
    backend: BackendChoice
    batch_size: BatchSize
    notes: list[str] = field(default_factory=list)

    def arm_folder(self, arm: OpenedArm) -> Path:
        """One arm lies in the folder itself."""
        return self.folder if len(self.arms) == 1 else self.folder / ARMS_FOLDER / arm.name


def evaluate_models(request: EvaluationRequest, reporter: Reporter) -> Path:
    """Evaluate every arm on the same prompts and return the folder.

    Raises:
        CtxextError: an arm or the suite missing, a length out of reach, an output folder of something else.
        GateError: everything was evaluated, and a gate is not met.
    """
    gates, launch = _gates(request.gates), this_launch()
    evaluation = _prepare(request, reporter)
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
        _check_gates(gates, evaluation, reporter)
    return evaluation.folder


def report_evaluation(folder: Path, over: Over = "depth") -> Path:
    """Draw everything again from the samples alone and return the page.

    Args:
        over: what the rows of the pictures are.

    Raises:
        ArtefactError: no such folder.
    """
    facts, arms = gather_evaluation(folder)
    texts = {arm.name: load_perplexity(_folder_of(folder, arms, arm)) for arm in arms}
    perplexity = {name: asdict(results[0]) for name, results in texts.items() if results}
    return write_report(
        folder / "report", facts, arms, excerpts=read_excerpts(folder), perplexity=perplexity, over=over
    )


def _folder_of(folder: Path, arms: Sequence[Arm], arm: Arm) -> Path:
    return folder if len(arms) == 1 else folder / ARMS_FOLDER / arm.name


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
        own = folder if len(labels) == 1 else folder / ARMS_FOLDER / entry["name"]
        samples = [sample for sample in load_samples(own) if sample.sample_id in wanted]
        if not samples:
            raise ArtefactError("the arm has no samples", where=str(own))
        arms.append(
            Arm(entry["name"], entry["label"], recorded=False, samples=samples, run=read_json(own / "run.json"))
        )
    return facts, arms


def _prepare(request: EvaluationRequest, reporter: Reporter) -> _Evaluation:
    """Everything that can be wrong is found here, before any weight is loaded; the cost is said."""
    specs = parse_arms(
        request.arms,
        model=request.model,
        method=request.method,
        target_length=request.target_length,
    )
    opened = [
        open_arm(
            spec,
            model=request.model,
            revision=request.revision,
            target_length=request.target_length,
            on_existing=on_existing_of(request.on_existing),
        )
        for spec in specs
    ]
    device = PartialState().device if this_launch().count > 1 else choose_device()
    dtype = choose_dtype(request.dtype, device)
    suite = with_grid(
        _suite(request),
        parse_lengths(request.lengths) if request.lengths is not None else None,
        parse_depths(request.depths) if request.depths is not None else None,
        request.num_samples,
    )
    originals = {arm.name: arm.original_length for arm in opened}
    original = originals.get("base", min(originals.values()))
    target = request.target_length or max(arm.reach for arm in opened)
    everything = resolve_samples(suite, original, target)
    samples = everything if request.limit is None else limited(everything, request.limit)
    if not request.arms and not request.beyond_reach:
        _require_reach(suite, samples, opened[0], longest_positions(suite, original, target))
    _require_buildable(suite, samples, load_tokenizer(opened[0].source))
    _require_same_prompts(opened, suite, samples)
    if request.backend.loads_here:
        samples = _within_time(samples, opened, request, device, dtype, reporter)
    else:
        _refuse_unknown_cost(request)
    notes = _notes(opened, suite, samples, everything, target)
    for note in notes:
        reporter.info(note)
    if not request.backend.loads_here:
        notes.append(NO_LOSSES)
    return _Evaluation(
        suite,
        opened,
        samples,
        original,
        target,
        _output_folder(request),
        device,
        dtype,
        request.backend,
        parse_batch_size(request.batch_size),
        notes,
    )


def _refuse_unknown_cost(request: EvaluationRequest) -> None:
    if request.max_minutes is not None:
        raise UsageError(
            "what another program's answers cost cannot be estimated here",
            where="--max-minutes",
            hint="Limit the samples with --limit, --samples or --lengths.",
        )


def _suite(request: EvaluationRequest) -> Suite:
    switches = {
        "apply_chat_template": request.apply_chat_template or request.thinking,
        "thinking": request.thinking,
        "question_first": request.question_first,
    }
    suite = load_suite(request.suite, [*request.suite_settings, *(f"{key}=true" for key, on in switches.items() if on)])
    budget = request.max_new_tokens
    if budget is None:
        return suite
    if not 1 <= budget <= MOST_ANSWER_TOKENS:
        raise UsageError(
            "not a number of answer tokens",
            where="--max-new-tokens",
            got=budget,
            expected=f"1 to {MOST_ANSWER_TOKENS:,}",
        )
    if suite.tasks is None:
        return suite.model_copy(update={"max_new_tokens": budget})
    tasks = [task.model_copy(update={"max_new_tokens": budget}) for task in suite.tasks]
    return suite.model_copy(update={"tasks": tasks})


def _within_time(
    samples: list[Sample],
    arms: Sequence[OpenedArm],
    request: EvaluationRequest,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> list[Sample]:
    """Say what the samples cost, and take fewer where the time is limited."""
    shape, speed = model_shape(arms[0].config), measured_flops_per_second(device, dtype)

    def seconds_of(sample: Sample) -> float:
        return len(arms) * estimated_seconds(shape.prefill_flops(sample.cell.length_tokens), speed)

    num_asked = len(samples)
    if request.max_minutes is not None:
        samples = affordable(samples, seconds_of, 60 * request.max_minutes)
    cost = duration(sum(map(seconds_of, samples)))
    each = f" for each of {len(arms)} arms" if len(arms) > 1 else ""
    dropped = f"; {num_asked - len(samples)} of {num_asked} dropped to stay within --max-minutes" * (
        len(samples) < num_asked
    )
    reporter.info(
        f"suite {request.suite}: {describe_samples(samples)}{each}; about {cost} at the matrix speed measured here, "
        f"less where prompts share text{dropped}"
    )
    return samples


def _notes(
    arms: Sequence[OpenedArm], suite: Suite, samples: Sequence[Sample], everything: Sequence[Sample], target: int
) -> list[str]:
    """What must be known beside the numbers, before they are there."""
    notes = []
    if len(samples) < len(everything):
        notes.append(f"{len(samples)} of the suite's {len(everything)} samples were asked; intervals are wider.")
    longest = max(sample.cell.length_tokens for sample in samples)
    if coverage := coverage_sentence(longest, target, suite.num_answer_tokens):
        notes.append(coverage)
    needles = [sample for sample in samples if suite.member(sample.cell.task).task_name == "needle"]
    if needles:
        notes.append(bound_feasibility(independent_samples(_places(suite, needles))))
    for arm in arms:
        if longest + suite.num_answer_tokens > arm.reach:
            notes.append(
                f"Arm {arm.name} reaches {arm.reach:,} positions; prompts of up to {longest:,} tokens are asked beyond."
            )
    return notes


def _places(suite: Suite, samples: Sequence[Sample]) -> Iterator[tuple[int, str]]:
    """Length and haystack of every sample, as far as the suite decides who shares one."""
    for sample in samples:
        haystack = {"own": sample.sample_id, "paired": str(sample.index), "shared": ""}[suite.haystacks]
        yield sample.cell.length_tokens, haystack


def _evaluate(
    arm: OpenedArm, evaluation: _Evaluation, environment: dict[str, Any], reporter: Reporter, stop: StopRequest
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
    if isinstance(backend, ServerBackend) and (lengths := backend.length_summary()):
        reporter.info(lengths)
    if evaluation.suite.perplexity and this_launch().is_main:
        for result in measure_perplexity(
            backend,
            evaluation.suite,
            folder,
            original_length=evaluation.original_length,
            target_length=evaluation.target_length,
            weights=identity,
            check_stop=lambda: stop.check("finished texts are saved"),
        ):
            reporter.info(f"{arm.name}: {result.sentence()}")
    if isinstance(backend, ServerBackend):
        backend.close()


def _backend(arm: OpenedArm, evaluation: _Evaluation, reporter: Reporter) -> Backend:
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


def _facts(request: EvaluationRequest, evaluation: _Evaluation, environment: dict[str, Any]) -> ReportFacts:
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
        notes=[*evaluation.notes, *_engine_notes(evaluation)],
    )


def _engine_notes(evaluation: _Evaluation) -> Iterator[str]:
    """A self-check that failed must stand beside the numbers."""
    for arm in evaluation.arms:
        path = evaluation.arm_folder(arm) / "engine.json"
        check = read_json(path).get("self_check") if path.is_file() else None
        if check and check["outcome"] == "different":
            yield (
                f"Arm {arm.name}: the engine's answer to {check['sample_id']} is not what plain generate answers; "
                "these results must not be relied on. Please report it."
            )


def _check_gates(gates: GatesBlock, evaluation: _Evaluation, reporter: Reporter) -> None:
    """Judge the arm `extended`, or the only one.

    Raises:
        GateError: a gate is not met.
    """
    _, arms = gather_evaluation(evaluation.folder)
    names = [arm.name for arm in arms]
    outcomes = check_gates(
        gates,
        arms,
        original_length=evaluation.original_length,
        judged="extended" if "extended" in names else names[-1],
        answer_tokens=evaluation.suite.num_answer_tokens,
    )
    write_json_atomic(evaluation.folder / "gates.json", [asdict(outcome) for outcome in outcomes])
    for outcome in outcomes:
        reporter.info(outcome.sentence)
    if error := gate_error(outcomes):
        raise error


def _gates(settings: Sequence[str]) -> GatesBlock | None:
    if not settings:
        return None
    return validate_document(apply_overrides(Document("--gate", {}, {}), settings), GatesBlock)


def _output_folder(request: EvaluationRequest) -> Path:
    if request.output:
        return Path(request.output)
    stem = short_name(request.model) if request.model else "arms"
    return Path("runs") / f"eval-{stem}-{Path(request.suite).stem}"


def _require_reach(suite: Suite, samples: Sequence[Sample], arm: OpenedArm, text_positions: int) -> None:
    """Refuse prompts that end, with their answers, beyond the positions that the model has.

    Args:
        text_positions: of the texts whose perplexity is measured.

    Raises:
        UsageError: the longest one does.
    """
    if text_positions > arm.reach:
        raise UsageError(
            "the suite measures the perplexity of longer texts than the model reaches",
            where=arm.source.name,
            got=text_positions,
            expected=f"at most {arm.reach:,} positions",
            hint="Use shorter texts, extend the model, or give --beyond-reach to see it fail there.",
        )
    longest = max(sample.cell.length_tokens for sample in samples)
    if longest + suite.num_answer_tokens > arm.reach:
        raise UsageError(
            f"the suite's longest prompt and its answer take {longest + suite.num_answer_tokens:,} positions "
            f"({longest:,} + {suite.num_answer_tokens})",
            where=arm.source.name,
            expected=f"at most {arm.reach:,}, which this model reaches",
            hint="Use shorter lengths, extend the model, or give --beyond-reach to see it fail there.",
        )


def _require_buildable(suite: Suite, samples: Sequence[Sample], tokenizer: Any) -> None:
    """Make the shortest and the longest prompt of every task: what cannot be made is known before hours of work.

    Raises:
        UsageError: a length that leaves no room, a haystack that is too short.
    """
    builder = suite_builder(suite, tokenizer)
    for task in {sample.cell.task for sample in samples}:
        own = sorted((s for s in samples if s.cell.task == task), key=lambda sample: sample.cell.length_tokens)
        for sample in (own[0], own[-1]):
            builder.build(sample)


def _require_same_prompts(arms: Sequence[OpenedArm], suite: Suite, samples: Sequence[Sample]) -> None:
    """Arms are compared on identical token ids, so their tokenizers must make the same prompts.

    Raises:
        UsageError: they do not.
    """
    if len(arms) < 2:
        return
    shortest = min(samples, key=lambda sample: sample.cell.length_tokens)
    first = suite_builder(suite, load_tokenizer(arms[0].source)).build(shortest).prompt_sha256
    for arm in arms[1:]:
        if arm.source == arms[0].source:
            continue
        if suite_builder(suite, load_tokenizer(arm.source)).build(shortest).prompt_sha256 != first:
            raise UsageError(
                f"the arms {arms[0].name} and {arm.name} have tokenizers that make different prompts, so they cannot "
                "be compared sample by sample",
                where="--arm",
                hint="Evaluate them one by one and put them side by side with `ctxext compare`.",
            )
