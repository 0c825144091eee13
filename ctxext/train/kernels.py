"""The attention that training runs on, proven with the prepared model before the first step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig

from ctxext.errors import ResourceError
from ctxext.model.attention import Proving, prove_attention
from ctxext.model.attention_choice import AttentionHost, attention_of
from ctxext.model.whole import compute_dtype
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import text_config


def proven_kernels(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, recipe: Recipe, config: PreTrainedConfig
) -> list[str]:
    """Names of the attention kernels that a forward and a backward pass of the prepared loss module run.

    Gradients are dropped afterwards, parameters are as before; dropout draws random numbers.

    Raises:
        CtxextError: see `prove_attention`.
    """
    dtype = compute_dtype(accelerator.unwrap_model(model).model)
    isolated = recipe.data.windows.positions == "per-document"
    vocab_size = text_config(config).vocab_size
    proving = Proving(model, accelerator.backward, vocab_size, dtype, accelerator.device, isolated)
    choice = attention_of(recipe, config, AttentionHost.of(accelerator.device), dtype)
    try:
        return prove_attention(choice, proving, recipe.train.allow_slow)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "out of memory before the first step, in a window of a hundred tokens",
            where="train",
            hint="The device has no room beside the weights; `ctxext plan` says what would save some.",
        ) from error
    finally:
        optimizer.zero_grad(set_to_none=True)
