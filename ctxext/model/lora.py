"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants by peft, and which layers get it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from ctxext.errors import UsageError, did_you_mean
from ctxext.model.load import quiet
from ctxext.model.parts import is_tied, parameter_kinds
from ctxext.recipe.adaptation import LoraBlock


@dataclass
class LoraTargets:
    """What gets an adapter.

    Attributes:
        modules: linear layers, by full name.
        parameters: weights that are no linear layer's: stacked experts, and routers with a class of their own.
        notes: what `all-linear` leaves out, and why.
    """

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def lora_targets(model: PreTrainedModel, lora: LoraBlock) -> LoraTargets:
    """What a recipe's `lora` means for this model, which may lie on the meta device.

    Raises:
        UsageError: a target that the model does not have, or that cannot get an adapter of this kind.
    """
    found = _all_linear(model, lora) if lora.targets == "all-linear" else _named(model, lora.targets)
    if not found.modules and not found.parameters:
        raise UsageError("no layer of the model would get an adapter", where="lora.targets", got=str(lora.targets))
    for setting, value in (("dropout", lora.dropout), ("weight_decomposed", lora.weight_decomposed)):
        if found.parameters and value:
            raise UsageError(
                "peft computes adapters of weights that are no linear layer's without it",
                where=f"lora.{setting}",
                got=found.parameters[0],
                hint="Leave it out, or leave these weights out of lora.targets, lora.routers and lora.experts.",
            )
    return found


def add_lora(model: PreTrainedModel, lora: LoraBlock, seed: int) -> PeftModel:
    """Wrap `model` with freshly initialised LoRA on what `lora_targets` finds.

    LoRA weights are float32 whatever the base's dtype; the base is frozen.

    Raises:
        UsageError: see `lora_targets`.
    """
    targets = lora_targets(model, lora)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number is right
        lora_dropout=lora.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        use_rslora=lora.rank_stabilized,
        use_dora=lora.weight_decomposed,
        task_type="CAUSAL_LM",
    )
    with quiet():
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def num_trainable(model: torch.nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _all_linear(model: PreTrainedModel, lora: LoraBlock) -> LoraTargets:
    """Every linear layer but the output embedding, and of a mixture of experts only what was asked for."""
    kinds: dict[str, str] = dict(parameter_kinds(model))
    asked = {"routers": lora.routers, "experts": lora.experts}
    found = LoraTargets()
    for name in linear_layers(model):
        kind = kinds.get(f"{name}.weight")
        if kind not in (None, "output embedding", "tied embeddings") and asked.get(kind, True):
            found.modules.append(name)
    for name in _stacked(model, kinds):
        if asked[kinds[name]]:
            found.parameters.append(name)
    present = set(kinds.values())
    for kind, key in (("routers", "lora.routers"), ("experts", "lora.experts")):
        if kind in present and not asked[kind]:
            found.notes.append(f"{kind} get no adapters ({key}=true gives them some)")
        elif kind not in present and asked[kind]:
            raise UsageError("the model has none", where=key, got="true")
    diverted = _diverted(model, found.modules)
    if diverted:
        leaves = ", ".join(sorted({_leaf(name) for name in diverted}))
        found.modules = [name for name in found.modules if name not in diverted]
        found.notes.append(
            f"{len(diverted)} linear layers ({leaves}, outside the experts) get no adapters: peft takes these names of "
            "this family for its experts'"
        )
    return found


def _named(model: PreTrainedModel, targets: Iterable[str]) -> LoraTargets:
    kinds = parameter_kinds(model)
    linear, stacked = linear_layers(model), _stacked(model, kinds)
    found = LoraTargets()
    for target in targets:
        modules, parameters = _matching(target, linear), _matching(target, stacked)
        if not modules and not parameters:
            choices = sorted({_leaf(name) for name in (*linear, *stacked)})
            near = did_you_mean(target, choices)
            raise UsageError(
                "the model has no linear layer of this name",
                where="lora.targets",
                got=target,
                expected="all-linear, or names out of " + ", ".join(choices),
                hint=f"Did you mean '{near}'?" if near else None,
            )
        found.modules += [name for name in modules if name not in found.modules]
        found.parameters += [name for name in parameters if name not in found.parameters]
    _refuse_tied(model, found.modules)
    if diverted := _diverted(model, found.modules):
        raise UsageError(
            "peft takes this name of this family for its experts', and would put the adapter there",
            where="lora.targets",
            got=_leaf(diverted[0]),
            hint="Leave it out; the experts' own weights have other names.",
        )
    return found


def linear_layers(model: nn.Module) -> list[str]:
    """Full names of all linear layers, the output embedding included."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _stacked(model: nn.Module, kinds: dict[str, Any]) -> list[str]:
    """Weights of experts and routers that are matrices, or stacks of them, but in no linear layer."""
    linear = set(linear_layers(model))
    return [
        name
        for name, parameter in model.named_parameters()
        if kinds[name] in ("experts", "routers")
        and parameter.ndim in (2, 3)
        and name.rpartition(".")[0] not in linear
        # A stack's biases are matrices too.
        and not (kinds[name] == "experts" and parameter.ndim == 2)
    ]


def _matching(target: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _refuse_tied(model: Any, names: list[str]) -> None:
    head = model.get_output_embeddings()
    tied = is_tied(model)
    for name in names:
        if tied and model.get_submodule(name) is head:
            raise UsageError(
                "the output embedding is tied to the input embedding, which an adapter on it would change as well",
                where="lora.targets",
                got=name,
                hint="lora.embeddings_and_norms=true trains the tied weight itself.",
            )


def _diverted(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Linear layers whose names peft takes for something else.

    Adapters made with transformers 4 name experts as they were then, one by one; peft translates such names for
    families whose experts are stacked now, wherever the name occurs.
    """
    diverted = set()
    for leaf in {_leaf(name) for name in names}:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two fused names alone
            diverted.add(leaf)
            continue
        if config.target_parameters:
            diverted.add(leaf)
    return [name for name in names if _leaf(name) in diverted]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
