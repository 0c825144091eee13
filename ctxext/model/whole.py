"""Parameters of the base that are trained whole: float32 while they are trained, computed with as the base computes.

Updates of a bfloat16 weight are lost when they are smaller than its last bit: at a learning rate of 2e-5 AdamW changes
nothing that is larger than about 0.01. So the weight itself is float32, and the model computes with it rounded to the
dtype that the base was loaded in, by `torch.nn.utils.parametrize`: what is trained is what the merged checkpoint
computes, and no activation becomes float32 because a weight is. Cost: 16 bytes a parameter (weight, gradient, two
moments), and a rounded copy while a module runs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ctxext.model.parts import causal_lm, is_adapter_name, parameter_kinds, plain_name

_EMBEDDINGS_AND_NORMS = ("input embedding", "output embedding", "tied embeddings", "norms")


class _Rounded(nn.Module):
    """A float32 weight as the base computes with it; gradients pass unchanged, and add up in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def embeddings_and_norms(base: Any) -> list[str]:
    """Names of the parameters of input and output embedding and of every norm (LongLoRA, arXiv:2309.12307)."""
    return [name for name, kind in parameter_kinds(base).items() if kind in _EMBEDDINGS_AND_NORMS]


def train_whole(base: nn.Module, names: Collection[str]) -> None:
    """Make parameters of `base` trainable, in float32.

    A tied parameter stays one parameter: every module that has it computes with it.
    """
    chosen = {id(parameter): parameter for name, parameter in base.named_parameters() if name in set(names)}
    owners = [
        (module, name, chosen[id(parameter)], parameter.dtype)
        for module in base.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in chosen
    ]
    for parameter in chosen.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for module, name, parameter, dtype in owners:
        if dtype != parameter.dtype:
            parametrize.register_parametrization(module, name, _Rounded(dtype), unsafe=True)


def whole_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The base's parameters that are trained, by the names that the base gives them."""
    return {
        plain_name(name): parameter
        for name, parameter in causal_lm(model).named_parameters()
        if parameter.requires_grad and not is_adapter_name(name)
    }


def compute_dtype(model: Any) -> torch.dtype:
    """What `model` computes in: the dtype that its base was loaded in, also where its weights are float32 by now."""
    embedding = causal_lm(model).get_input_embeddings()
    if parametrize.is_parametrized(embedding, "weight"):
        rounded: _Rounded = embedding.parametrizations.weight[0]
        return rounded.dtype
    weight: Tensor = embedding.weight
    return weight.dtype
