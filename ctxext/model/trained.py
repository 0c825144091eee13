"""The tensors that a model trains, by the names that they are stored under."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ctxext.errors import ArtefactError
from ctxext.model.load import quiet
from ctxext.model.parts import is_adapter_name
from ctxext.model.whole import whole_parameters

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """All that trains, by name: as peft names adapters and what lies below them, else as the model itself does."""
    whole = whole_parameters(model)
    if not isinstance(model, PeftModel):
        return dict(whole)
    return peft_tensors(model) | {PEFT_PREFIX + name: parameter for name, parameter in whole.items()}


def peft_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What peft would store of an adapter."""
    with quiet():
        tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def set_trained_tensors(model: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Put stored weights into a model that trains; every one must fit and none may be missing (peft itself only warns).

    Raises:
        ArtefactError: keys or shapes differ.
    """
    expected = trained_tensors(model)
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ArtefactError(
            f"the adapter does not fit the model ({len(missing)} weights missing, {len(unknown)} unknown)",
            where=where,
            got=(missing or unknown)[0],
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ArtefactError(
                "an adapter weight has another shape than the model asks for",
                where=f"{where}: {name}",
                got=str(tuple(tensor.shape)),
                expected=str(tuple(expected[name].shape)),
            )
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    with torch.no_grad():
        for name, parameter in whole_parameters(model).items():
            parameter.copy_(share_like(tensors[prefix + name], parameter))
    if isinstance(model, PeftModel):
        adapter = {name: share_like(x, expected[name]) for name, x in tensors.items() if is_adapter_name(name)}
        with quiet():
            set_peft_model_state_dict(model, adapter)


def share_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole `tensor`, as `like` is shared; `tensor` itself where that is not its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    # No communication: every process has the same tensor and takes its part.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
