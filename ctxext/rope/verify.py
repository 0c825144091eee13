"""Did the rewrite take effect? Every rotary module of a live model is compared with the reference.

Three things are compared, because each alone has been silently wrong somewhere: the stored frequencies (a cast of the
model to bf16 rounds them: 7 rad of error at position 4096), the attention factor, and the cos and sin that the module
really returns at positions on both sides of the original length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ctxext.errors import PositionsNotInEffectError, UnsupportedModelError
from ctxext.rope.families import text_config
from ctxext.rope.methods import READABLE_TYPES, BaseRope, RopeTable, method_from_rope_parameters

# transformers computes b^(2i/d) in float32: rounding the exponent is worth up to ln(b) * 6e-8, 8e-7 for b = 1e6.
RELATIVE_TOLERANCE = 3e-6


@dataclass(frozen=True)
class RopeVerification:
    """What was compared. `largest_error` is relative, over all frequencies of all rotary modules."""

    num_modules: int
    num_frequencies: int
    largest_error: float
    attention_factor: float
    target_length: int

    def summary(self) -> str:
        """One line for people."""
        modules = "module" if self.num_modules == 1 else "modules"
        return (
            f"positions in effect: {self.num_modules} rotary {modules} x {self.num_frequencies} frequencies match the "
            f"reference (largest relative error {self.largest_error:.1e}), attention factor {self.attention_factor:.4f}"
        )


def reference_table(config: Any) -> RopeTable:
    """Frequencies and attention factor that a model built from `config` must have, from our own formulas.

    Raises:
        UnsupportedModelError: no RoPE, one per layer type, or a rope type that ctxext has no method for.
    """
    text = text_config(config)
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" not in parameters or parameters.get("rope_type") not in READABLE_TYPES:
        raise UnsupportedModelError(
            "this version has no reference for the model's RoPE",
            where=f"{text.model_type}.rope_parameters",
            got=str(parameters.get("rope_type", "one per layer type" if parameters else "none")),
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    base = BaseRope(
        theta=float(parameters["rope_theta"]),
        rotary_dim=int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        original_length=int(parameters.get("original_max_position_embeddings") or text.max_position_embeddings),
    )
    return method_from_rope_parameters(parameters).table(base)


def rotary_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """All modules that hold inverse frequencies, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    }


def verify_positions(model: torch.nn.Module, config: Any) -> RopeVerification:
    """Compare every rotary module of `model` with the reference that `config` asks for.

    Raises:
        PositionsNotInEffectError: a module is missing, differs, or holds frequencies rounded to half precision.
        UnsupportedModelError: there is no reference for this kind of RoPE.
    """
    reference = reference_table(config)
    target_length = int(text_config(config).max_position_embeddings)
    modules = rotary_modules(model)
    if not modules:
        raise PositionsNotInEffectError("the model has no rotary module", where=type(model).__name__)
    largest = 0.0
    for name, module in modules.items():
        largest = max(largest, _check_frequencies(name, module, reference))
        _check_rotation(name, module, reference, target_length)
    return RopeVerification(
        num_modules=len(modules),
        num_frequencies=len(reference.inv_freq),
        largest_error=largest,
        attention_factor=reference.attention_factor,
        target_length=target_length,
    )


def _check_frequencies(name: str, module: torch.nn.Module, reference: RopeTable) -> float:
    buffer: Any = module.inv_freq
    if buffer.dtype != torch.float32:
        raise PositionsNotInEffectError(
            "the rotary frequencies are not float32; half precision turns far positions into noise",
            where=f"{name}.inv_freq",
            got=str(buffer.dtype),
            expected="torch.float32",
            hint="Load with from_pretrained(dtype=...) instead of casting the model.",
        )
    actual = buffer.detach().cpu().numpy()
    if actual.shape != reference.inv_freq.shape:
        raise PositionsNotInEffectError(
            "the number of rotary frequencies differs from the config",
            where=name,
            got=actual.shape[0],
            expected=str(reference.inv_freq.shape[0]),
        )
    error = float(np.max(np.abs(actual - reference.inv_freq) / reference.inv_freq))
    if not error <= RELATIVE_TOLERANCE:
        worst = int(np.argmax(np.abs(actual / reference.inv_freq - 1)))
        raise PositionsNotInEffectError(
            "positions are not in effect: the rotary frequencies differ from the extended config",
            where=f"{name}.inv_freq[{worst}]",
            got=float(actual[worst]),
            expected=f"{reference.inv_freq[worst]:.8g}",
            hint="Load the model with the extended config; editing model.config after load does nothing.",
        )
    scaling = float(getattr(module, "attention_scaling", 1.0))
    if not np.isclose(scaling, reference.attention_factor, rtol=1e-6):
        raise PositionsNotInEffectError(
            "the attention factor is not in effect",
            where=f"{name}.attention_scaling",
            got=scaling,
            expected=f"{reference.attention_factor:.6g}",
        )
    return error


def _check_rotation(name: str, module: torch.nn.Module, reference: RopeTable, target_length: int) -> None:
    """Compare cos and sin at a few positions up to the target length with float64 arithmetic."""
    buffer: Any = module.inv_freq
    positions = torch.tensor([[0, 1, target_length // 3, target_length // 2, target_length - 1]])
    probe = torch.zeros(1, positions.shape[1], 1, dtype=torch.float32, device=buffer.device)
    with torch.no_grad():
        cos, sin = module(probe, positions.to(buffer.device))
    angles = positions[0].numpy()[:, None].astype(np.float64) * buffer.detach().cpu().numpy().astype(np.float64)
    half = cos.shape[-1] // 2
    for label, actual, expected in (("cos", cos, np.cos(angles)), ("sin", sin, np.sin(angles))):
        got = actual[0, :, :half].float().cpu().numpy()
        # A float32 angle of p radians is good to p * 6e-8 (half a unit in the last place).
        tolerance = 1e-5 + target_length * 1.2e-7
        if np.max(np.abs(got - expected * reference.attention_factor)) > tolerance * reference.attention_factor:
            raise PositionsNotInEffectError(
                f"the rotary module returns another {label} than its frequencies imply",
                where=name,
                hint="Something patches this model's rotary forward; remove the patch.",
            )
