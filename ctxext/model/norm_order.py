"""Where a model's layers have their norms: seen in what attention receives, not guessed from names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ctxext.model.load import quiet

_TOKENS = 2


class _SeenError(Exception):
    """Ends the forward pass once attention is reached."""


def is_post_norm(config: PreTrainedConfig) -> bool:
    """Whether attention receives the residual stream as it is, so that the layers' norms stand behind their parts.

    Post-norm in this sense are the original transformer (a norm of the sum) and OLMo 2 and 3 or EXAONE 4 (a norm of
    what is added to it). Pre-norm is what normalises first, also if it normalises behind as well (Gemma 2 and 3).

    False also where it cannot be seen: no layer has a module called attention, or the model cannot run without values.
    """
    with quiet(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = _layer_with_attention(model)
    if found is None:
        return False
    received: list[Tensor | None] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(_hidden_states(args, kwargs))
        if len(received) == 2:
            raise _SeenError

    for module in found:
        module.register_forward_pre_hook(remember, with_kwargs=True)
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    mask = torch.ones((1, 1, _TOKENS, _TOKENS), dtype=torch.bool, device="meta")  # whole, or its values were asked for
    try:
        with torch.no_grad(), quiet():
            model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    except _SeenError:
        return received[0] is not None and received[0] is received[1]
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # whatever a model class needs values for
        return False
    return False


def _layer_with_attention(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The second such layer and its attention: ModernBERT's decoder normalises embeddings instead of its first layer's
    input."""
    found = [
        (layer, attention[0])
        for name, layers in model.named_modules()
        if name.endswith("layers") and isinstance(layers, nn.ModuleList)
        for layer in layers
        if (attention := [part for part in layer.modules() if type(part).__name__.endswith("Attention")])
    ]
    return found[min(1, len(found) - 1)] if found else None


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 3), None)
