"""What is trained of a model, as a recipe says: one place for training, its plan and its traced memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ctxext.model.lora import add_lora, lora_targets
from ctxext.model.parts import KINDS, Kind, is_adapter_name, parameter_kinds
from ctxext.model.start import start_from
from ctxext.model.whole import embeddings_and_norms, train_whole
from ctxext.recipe.adaptation import Adaptation, LoraBlock

_FLOAT32_BYTES = 4


def adapt(model: Any, adaptation: Adaptation, lora: LoraBlock, seed: int) -> nn.Module:
    """Make `model` trainable as asked: with an adapter around it, or itself.

    Everything that trains is float32; what is frozen stays as it was loaded.

    Args:
        model: a transformers model, as it was loaded.

    Raises:
        UsageError: a target that the model does not have.
        ArtefactError: an adapter to start from that does not fit.
    """
    if adaptation == "full":
        train_whole(model, [name for name, _ in model.named_parameters()])
        plain: nn.Module = model
        return plain
    whole = embeddings_and_norms(model) if lora.embeddings_and_norms else []
    adapted = add_lora(model, lora, seed)
    train_whole(model, whole)
    if not model.get_input_embeddings().weight.is_meta:
        start_from(adapted, lora)
    return adapted


@dataclass(frozen=True)
class TrainedPart:
    """What of one kind is trained.

    Attributes:
        kind: see `ctxext.model.parts`.
        by_lora: by adapters on it; else whole.
        num_bytes: with gradients in float32 and both of AdamW's moments.
    """

    kind: Kind
    by_lora: bool
    num_parameters: int
    num_tensors: int
    num_bytes: int

    def describe(self) -> str:
        """'LoRA on attention 1,024', 'norms 96'."""
        return f"{'LoRA on ' if self.by_lora else ''}{self.kind} {self.num_parameters:,}"

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


def trained_parts(model: Any, moment_bytes: int = _FLOAT32_BYTES) -> list[TrainedPart]:
    """What a model that `adapt` made trains, by kind.

    Args:
        moment_bytes: of one number in the optimizer's two moments.
    """
    copies = 2 * (_FLOAT32_BYTES + moment_bytes)
    kinds = parameter_kinds(model)
    found: dict[tuple[Kind, bool], list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((kinds[name], is_adapter_name(name)), []).append(parameter.numel())
    return [
        TrainedPart(kind, by_lora, sum(sizes), len(sizes), sum(sizes) * copies)
        for by_lora in (True, False)
        for kind in KINDS
        if (sizes := found.get((kind, by_lora)))
    ]


def frozen_notes(model: Any, adaptation: Adaptation, lora: LoraBlock) -> list[str]:
    """What of a loaded model gets no adapters although its linear layers do, and why."""
    return lora_targets(model, lora).notes if adaptation != "full" else []
