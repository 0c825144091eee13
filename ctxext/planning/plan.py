"""Recipe + base config -> plan: every derived number, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ctxext.errors import CtxextError
from ctxext.evaluation.arms import CONTROL_TASK
from ctxext.evaluation.suite import Sample, load_suite, resolve_samples
from ctxext.files import fingerprint
from ctxext.model.adaptation import adapt, frozen_notes, trained_parts
from ctxext.model.assumptions import assumed_by_default
from ctxext.model.attention_choice import planned_attention
from ctxext.model.liger import check_liger
from ctxext.model.load import choose_device, load_config, resolve_source, weights_fingerprint
from ctxext.model.lora import num_trainable
from ctxext.model.quantised import check_bitsandbytes, quantisation_note
from ctxext.model.routers import auxiliary_coefficient_in_use, check_routers
from ctxext.model.savings import check_savings
from ctxext.model.start import check_start
from ctxext.planning.cost import ModelShape, attention_width, num_matrix_parameters
from ctxext.planning.data_plan import data_lines, facts_notes
from ctxext.planning.identity import decisive_values
from ctxext.planning.parallel_plan import check_parallel
from ctxext.planning.periodic_plan import evaluated_steps, periodic_suite
from ctxext.planning.training_notes import training_notes
from ctxext.recipe.load import KeyPath
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import OnExisting, base_ropes, text_config
from ctxext.rope.methods import RopeMethod
from ctxext.rope.patchers import apply_method
from ctxext.rope.reference import describe_positions

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """Every number that a run follows.

    Attributes:
        arms: names of the evaluated arms, in order.
        prefill_tokens: prompt tokens of one arm's evaluation.
        train_flops, evaluation_flops: of one training with what is evaluated meanwhile, and of all arms' evaluations.
        adaptation: lora, qlora or full.
        trained: what trains, by kind (`model.adaptation.TrainedPart`).
        trainable_bytes: trained weights, gradients in float32 and both AdamW moments, in float32 or 8 bits.
        disk_bytes: see `disk_bytes`.
        cache_bytes: KV cache of the longest evaluated prompt, in float32.
        weights: fingerprint of the base weights.
        plan_id: hash of everything that changes results.
        decides: everything that changes results, by key.
        positions: the extended config's RoPE in one line.
        notes: what the model's config does not say, or says otherwise elsewhere; what facts share with the suite;
            advice.
        data: what training reads, in words.
        attention: which implementation trains, and why.
        parallel: how processes share the work (`parallel_plan.ParallelPlan`); None where nobody asked.
        memory: a training step's memory, traced (`memory_plan.MemoryPlan`); None where nobody asked.
    """

    plan_id: str
    decides: dict[str, Any]
    weights: str
    model: str
    model_type: str
    original_length: int
    target_length: int
    factor: float
    method: str
    rope_parameters: dict[str, Any]
    positions: str
    notes: list[str]
    attention_factor: float
    num_parameters: int
    num_trainable: int
    adaptation: str
    trained: list[dict[str, Any]]
    window_mode: str
    window_tokens: int
    windows_per_step: int
    steps: int
    train_tokens: int
    facts_share: float
    activation_checkpointing: bool
    arms: list[str]
    suite: dict[str, Any]
    num_samples: int
    prefill_tokens: int
    longest_prompt: int
    train_flops: float
    evaluation_flops: float
    trainable_bytes: int
    cache_bytes: int
    merged_bytes: int
    disk_bytes: int
    data: list[str]
    attention: str
    memory: dict[str, Any] | None = None
    parallel: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


def arms_of(recipe: Recipe) -> list[str]:
    """Which arms the run evaluates, in order."""
    evaluation = recipe.evaluation
    arms = ["base"] if evaluation.before else []
    arms += ["untrained"] if evaluation.untrained else []
    arms += ["extended" if recipe.rope.method != "none" else "control"]
    arms += ["control"] if evaluation.control else []
    return arms


def make_plan(recipe: Recipe) -> Plan:
    """Derive every number; reads the model's config and no weights.

    Raises:
        CtxextError: whatever is wrong with model, method, lengths or suite.
    """
    source = resolve_source(recipe.model.source, recipe.model.revision)
    config = load_config(source)
    base = base_ropes(config, recipe.on_existing)[0]
    method: RopeMethod = recipe.rope.resolved(base.original_length, recipe.target_length)
    extended = apply_method(config, recipe.rope, recipe.target_length, recipe.on_existing)
    suite = load_suite(recipe.evaluation.suite)
    samples = resolve_samples(suite, base.original_length, recipe.target_length)
    text = text_config(config)
    weights = weights_fingerprint(source, config)
    counts = _count_parameters(config, recipe, weights, describe_positions(extended))
    window_tokens = recipe.data.windows.length or recipe.target_length
    checkpointing = recipe.train.uses_activation_checkpointing(window_tokens)
    elsewhere = recipe.train.memory.device_gib is not None  # planned for another machine than this one
    device_type = "cuda" if elsewhere else choose_device().type
    check_parallel(recipe)
    check_savings(recipe.train, window_tokens, device_type)
    check_bitsandbytes(recipe, config, device_type)
    check_liger(recipe.train, device_type)
    attention = planned_attention(recipe, extended)
    shape = ModelShape(counts.matrices, text.num_hidden_layers, attention_width(text))
    window_flops = shape.train_flops(window_tokens, checkpointing, full=recipe.adaptation == "full")
    train_tokens = recipe.train.steps * recipe.train.windows_per_step * window_tokens
    arms = arms_of(recipe)
    during = periodic_suite(recipe.train, base.original_length, recipe.target_length)
    samples_during = [] if during is None else resolve_samples(during, base.original_length, recipe.target_length)
    decides = decisive_values(
        recipe,
        suite,
        during,
        window_tokens=window_tokens,
        weights=weights,
        start=counts.start_sha256,
        positions={"theta": base.theta, **text_config(extended).rope_parameters},
        auxiliary_loss=counts.auxiliary_loss,
    )
    return Plan(
        weights=weights,
        plan_id=fingerprint(decides),
        decides=decides,
        model=recipe.model.source,
        model_type=str(text.model_type),
        original_length=base.original_length,
        target_length=recipe.target_length,
        factor=recipe.target_length / base.original_length,
        method=method.method,
        rope_parameters=text_config(extended).rope_parameters,
        positions=describe_positions(extended),
        notes=[
            *assumed_by_default(source, config),
            *counts.notes,
            *facts_notes(recipe.data, suite),
            *training_notes(config, recipe.train),
        ],
        attention_factor=method.attention_multiplier(base),
        num_parameters=counts.total,
        num_trainable=counts.trainable,
        adaptation=recipe.adaptation,
        trained=counts.trained,
        window_mode=recipe.data.windows.mode,
        window_tokens=window_tokens,
        windows_per_step=recipe.train.windows_per_step,
        steps=recipe.train.steps,
        train_tokens=train_tokens,
        facts_share=recipe.data.facts.share if recipe.data.facts else 0.0,
        activation_checkpointing=checkpointing,
        arms=arms,
        suite={"name": recipe.evaluation.suite, **suite.model_dump(mode="json")},
        num_samples=len(samples),
        prefill_tokens=sum(sample.cell.length_tokens for sample in samples),
        longest_prompt=max(sample.cell.length_tokens for sample in samples),
        train_flops=train_tokens / window_tokens * window_flops
        + len(evaluated_steps(recipe.train)) * evaluation_flops(shape, samples_during),
        evaluation_flops=len(arms) * evaluation_flops(shape, samples),
        trainable_bytes=counts.trainable * 2 * (_FLOAT32_BYTES + recipe.train.moment_bytes),
        cache_bytes=cache_bytes(text, max(sample.cell.length_tokens for sample in samples), _FLOAT32_BYTES),
        merged_bytes=counts.total * _FLOAT32_BYTES,
        disk_bytes=disk_bytes(recipe, counts.total, counts.trainable),
        data=data_lines(recipe.data, window_tokens),
        attention=attention.describe(),
    )


def disk_bytes(recipe: Recipe, num_parameters: int, num_trainable: int) -> int:
    """The most that a run has on disk beside its evaluations, as if all weights were float32.

    The merged model, and for every training its checkpoints (one more than are kept, because the oldest goes after the
    newest is there, and one more where the best is kept) and what it has trained.
    """
    train = recipe.train
    checkpoint = num_trainable * (_FLOAT32_BYTES + 2 * train.moment_bytes)
    kept = train.keep_checkpoints + 1 + (train.evaluate is not None)
    trainings = 1 + recipe.evaluation.control
    return num_parameters * _FLOAT32_BYTES + trainings * (kept * checkpoint + num_trainable * _FLOAT32_BYTES)


def evaluation_flops(shape: ModelShape, samples: list[Sample]) -> float:
    """Prefill cost of all samples of one arm."""
    return sum(shape.prefill_flops(sample.cell.length_tokens) for sample in samples)


def cache_bytes(text: Any, num_tokens: int, dtype_bytes: int) -> int:
    """KV cache: 2 x layers x KV heads x head_dim x bytes x tokens."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * num_kv_heads * head_dim * dtype_bytes * num_tokens)


@dataclass(frozen=True)
class _Counts:
    total: int
    trainable: int
    matrices: int
    trained: list[dict[str, Any]]
    notes: list[str]
    start_sha256: str | None
    auxiliary_loss: bool


def _count_parameters(config: Any, recipe: Recipe, weights: str, positions: str) -> _Counts:
    """Counted on the real architecture, built without memory on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        check_routers(model, recipe.train)
        auxiliary_loss = auxiliary_coefficient_in_use(model, recipe.train.router_loss) > 0
        total = sum(parameter.numel() for parameter in model.parameters())
        matrices = num_matrix_parameters(model)
        notes = frozen_notes(model, recipe.adaptation, recipe.lora)
        notes += [quantisation_note(model)] if recipe.adaptation == "qlora" else []
        adapted = adapt(model, recipe.adaptation, recipe.lora, seed=0)
    trained = [part.to_json() for part in trained_parts(adapted, recipe.train.moment_bytes)]
    start = None
    if recipe.lora.start_from is not None:
        start = check_start(adapted, recipe.lora, base=recipe.model.source, fingerprint=weights, positions=positions)
        notes = [*notes, *start.notes]
    sha256 = start.sha256 if start else None
    return _Counts(total, num_trainable(adapted), matrices, trained, notes, sha256, auxiliary_loss)


def _on_existing(values: dict[str, Any]) -> OnExisting:
    choice = values.get("on_existing")
    return choice if choice in ("replace", "compose") else "refuse"


def length_checks(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What can be wrong between recipe and model: checked on plain values, so that it is reported with everything else.

    Only the values it needs have to be sound; about the others the schema speaks. Yields `(key path, message)`.
    """
    model, rope, target = values.get("model"), values.get("rope"), values.get("target_length")
    source = model.get("source") if isinstance(model, dict) else None
    revision = model.get("revision") if isinstance(model, dict) else None
    if not isinstance(source, str) or not source or not isinstance(revision, str | None):
        return
    try:
        found = resolve_source(source, revision)
        config = load_config(found)
        base = base_ropes(config, _on_existing(values))[0]
        assumed_by_default(found, config)  # refuses a config that does not say what extension rests on
    except CtxextError as error:
        yield ("model", "source"), str(error)
        return
    if not isinstance(target, int) or isinstance(target, bool) or target < 1:
        return
    if target <= base.original_length:
        yield (
            ("target_length",),
            f"{target} is not above the model's original length {base.original_length}, which it reaches unextended",
        )
    factor, implied = rope.get("factor") if isinstance(rope, dict) else None, target / base.original_length
    if (
        isinstance(factor, int | float)
        and not isinstance(factor, bool)
        and not math.isclose(factor, implied, rel_tol=1e-6)
    ):
        yield (
            ("rope", "factor"),
            f"{factor:g} contradicts target_length {target} / original length {base.original_length} = {implied:g}; "
            "leave rope.factor out, it is derived",
        )


def suite_check(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """The named suite exists and is valid."""
    evaluation = values.get("evaluation")
    name = evaluation.get("suite") if isinstance(evaluation, dict) else None
    if isinstance(name, str):
        try:
            suite = load_suite(name)
        except CtxextError as error:
            yield ("evaluation", "suite"), str(error)
            return
        measured = [task for task in suite.members if task.task_name != CONTROL_TASK]
        if len(measured) > 1:
            # Its report and conclusions are about one grid; several would be pooled into a number that means nothing.
            yield (
                ("evaluation", "suite"),
                f"'{name}' has {len(measured)} tasks; a run's suite has one, others are for `ctxext eval`",
            )
