"""What `ctxext eval` was asked for, made definite before any weight is loaded: arms, samples, cost, and what is wrong.

Everything that can be refused is refused here; hours of work should not end in a length that leaves no room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ctxext.errors import UsageError
from ctxext.evaluation.answerer import BatchSize, parse_batch_size
from ctxext.evaluation.backends.choice import NO_LOSSES, BackendChoice
from ctxext.evaluation.conclusions import coverage_sentence
from ctxext.evaluation.effective_length import bound_feasibility, independent_samples
from ctxext.evaluation.perplexity import longest_positions
from ctxext.evaluation.prompt import suite_builder
from ctxext.evaluation.selection import (
    affordable,
    describe_samples,
    limited,
    parse_depths,
    parse_lengths,
    with_grid,
)
from ctxext.evaluation.sharding import this_launch
from ctxext.evaluation.suite import Sample, Suite, load_suite, resolve_samples
from ctxext.model.load import choose_device, choose_dtype, load_tokenizer, short_name
from ctxext.pipeline.arms import OpenedArm, open_arm, parse_arms
from ctxext.pipeline.console import duration
from ctxext.pipeline.patch import on_existing_of
from ctxext.pipeline.reporter import Reporter
from ctxext.planning.cost import estimated_seconds, measured_flops_per_second, model_shape

MOST_ANSWER_TOKENS = 8192


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
class Evaluation:
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
        """Where the arm's samples go."""
        return arm_folder(self.folder, arm.name, len(self.arms))


def arm_folder(folder: Path, name: str, num_arms: int) -> Path:
    """Where an arm's samples lie in a folder of `ctxext eval`; a single arm's lie in the folder itself."""
    return folder if num_arms == 1 else folder / "arms" / name


def prepare_evaluation(request: EvaluationRequest, reporter: Reporter) -> Evaluation:
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
    return Evaluation(
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
