"""FLOPs of evaluation and training, and what they mean in time on this machine.

With n parameters in matrices (of a mixture's experts, those that a token is sent to), prefilling S tokens costs 2 n S +
2 layers x heads x head_dim x S^2 (causal attention computes half of 4 layers x heads x head_dim x S^2). A LoRA step
costs twice the forward pass for the matrices (frozen weights need no gradient of their own), a step of full fine-tuning
three times, and both three and a half times for attention.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ctxext.model.routers import experts_per_token
from ctxext.rope.families import text_config

# What a forward pass reaches of a plain matrix product's speed (SmolLM2-135M, two CPU cores, 2K-12K tokens: 0.7-0.8).
_EFFICIENCY = 0.7


@dataclass(frozen=True)
class ModelShape:
    """What the cost depends on."""

    num_matrix_parameters: int
    num_layers: int
    attention_width: int

    def prefill_flops(self, num_tokens: int) -> float:
        """One forward pass over a prompt."""
        return (
            2.0 * self.num_matrix_parameters * num_tokens + 2.0 * self.num_layers * self.attention_width * num_tokens**2
        )

    def train_flops(self, window_tokens: int, activation_checkpointing: bool, full: bool = False) -> float:
        """Forward and backward of one window; with `full`, every weight has a gradient as well."""
        matrices = 2.0 * self.num_matrix_parameters * window_tokens
        attention = 2.0 * self.num_layers * self.attention_width * window_tokens**2
        recomputed = matrices + attention if activation_checkpointing else 0.0
        return (3.0 if full else 2.0) * matrices + 3.5 * attention + recomputed


def model_shape(config: Any) -> ModelShape:
    """The shape of the model that `config` describes, counted on the real architecture without its memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = text_config(config)
    return ModelShape(num_matrix_parameters(model), text.num_hidden_layers, attention_width(text))


def num_matrix_parameters(model: Any) -> int:
    """Parameters that a token is multiplied with: of experts, those that it is sent to."""
    text = text_config(model.config)
    used = _share_of_experts(text)
    total: float = sum(
        parameter.numel() * (used if "experts" in name.split(".") else 1.0)
        for name, parameter in model.named_parameters()
    )
    if not getattr(text, "tie_word_embeddings", False):
        # The output embedding multiplies every token, the input embedding only looks rows up.
        total -= model.get_input_embeddings().weight.numel()
    return round(total)


def _share_of_experts(text: Any) -> float:
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        num_experts = getattr(text, name, None)
        if isinstance(num_experts, int) and num_experts > 0:
            return min(experts_per_token(text) / num_experts, 1.0)
    return 1.0


def attention_width(text: Any) -> int:
    """Width of all query heads together."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_attention_heads * head_dim)


def measured_flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Speed of a plain matrix product here: the best single run, since other programs only ever slow it down."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(left, left)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def estimated_seconds(flops: float, flops_per_second: float) -> float:
    """Time for `flops` of model work on a device whose plain matrix product runs at `flops_per_second`."""
    return flops / (flops_per_second * _EFFICIENCY)
