"""Did the rewrite take effect? Every rotary module of a live model is compared with the reference.

Three things are compared, because each alone has been silently wrong somewhere: the stored frequencies (a cast of the
model to bf16 rounds them: 7 rad of error at position 4096), the attention factor, and the cos and sin that the module
really returns at positions on both sides of the original length. Layers that extension leaves alone (sliding-window
layers with a RoPE of their own) are compared with their own, unscaled reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctxext.errors import PositionsNotInEffectError
from ctxext.rope.base import Float64Array, RopeTable
from ctxext.rope.families import has_own_temperature, original_length, rope_groups, text_config
from ctxext.rope.methods import softmax_temperature
from ctxext.rope.reference import RELATIVE_TOLERANCE as RELATIVE_TOLERANCE
from ctxext.rope.reference import reference_tables, relative_tolerance

_BUFFER = "inv_freq"


@dataclass(frozen=True)
class RopeVerification:
    """What was compared. `largest_error` is relative, over all frequencies of all rotary modules."""

    num_modules: int
    num_frequencies: int
    largest_error: float
    attention_factor: float
    target_length: int
    layer_types: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        modules = "module" if self.num_modules == 1 else "modules"
        groups = f" for {' and '.join(self.layer_types)}" if self.layer_types else ""
        return (
            f"positions in effect: {self.num_modules} rotary {modules} x {self.num_frequencies} frequencies{groups} "
            f"match the reference (largest relative error {self.largest_error:.1e}), "
            f"attention factor {self.attention_factor:.4f}"
        )


@dataclass(frozen=True)
class RotaryModule:
    """A module that rotates, for one layer type (None: for all)."""

    name: str
    module: torch.nn.Module
    layer_type: str | None

    @property
    def inv_freq(self) -> Tensor:
        """Its frequencies, shape [rotary_dim / 2]."""
        buffer: Tensor = getattr(self.module, self._named(_BUFFER))
        return buffer

    @property
    def attention_scaling(self) -> float:
        """What it multiplies cos and sin by."""
        return float(getattr(self.module, self._named("attention_scaling"), 1.0))

    @property
    def path(self) -> str:
        """Name of the buffer, for messages."""
        return f"{self.name}.{self._named(_BUFFER)}"

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin as the module returns them, float32, shape [S, ...]; `positions` has shape [S]."""
        device = self.inv_freq.device
        probe = torch.zeros(1, len(positions), 1, dtype=torch.float32, device=device)
        keywords = {} if self._is_flat else {"layer_type": self.layer_type}
        shape = (3, 1, len(positions)) if hasattr(self.module, "mrope_section") else (1, len(positions))
        with torch.no_grad():
            output = self.module(probe, positions.to(device).expand(shape), **keywords)
        if isinstance(output, Tensor):  # complex numbers (Llama 4, DeepSeek-V2)
            return output[0].real.float().cpu(), output[0].imag.float().cpu()
        cos, sin = output
        return cos.reshape(-1, *cos.shape[-2:])[0].float().cpu(), sin.reshape(-1, *sin.shape[-2:])[0].float().cpu()

    @property
    def _is_flat(self) -> bool:
        return hasattr(self.module, _BUFFER)

    def _named(self, attribute: str) -> str:
        return attribute if self._is_flat else f"{self.layer_type}_{attribute}"


def rotary_modules(model: torch.nn.Module, layer_types: tuple[str | None, ...] = (None,)) -> list[RotaryModule]:
    """All modules that hold inverse frequencies, once for each layer type that they serve."""
    found = []
    for name, module in model.named_modules():
        for layer_type in layer_types:
            if layer_type is not None and isinstance(getattr(module, f"{layer_type}_{_BUFFER}", None), Tensor):
                found.append(RotaryModule(name, module, layer_type))
        if isinstance(getattr(module, _BUFFER, None), Tensor):
            served = [kind for kind in layer_types if kind is not None and kind in (*name.split("."), _type_of(module))]
            found.append(RotaryModule(name, module, served[0] if served else None))
    return found


def _type_of(module: torch.nn.Module) -> str | None:
    kind = getattr(module, "layer_type", None)
    return kind if isinstance(kind, str) else None


def language_model(model: torch.nn.Module, config: Any) -> torch.nn.Module:
    """The part of a multimodal model that reads text (the whole model otherwise)."""
    if text_config(config) is config:
        return model
    modules = dict(model.named_modules())
    named = [path for path in modules if path.split(".")[-1] in ("language_model", "text_model")]
    return modules[named[0]] if named else model


def verify_positions(model: torch.nn.Module, config: Any, target_length: int | None = None) -> RopeVerification:
    """Compare every rotary module of `model` with the reference that `config` asks for.

    Args:
        target_length: positions to check cos and sin up to; the config's maximum when left out.

    Raises:
        PositionsNotInEffectError: a module is missing, differs, or holds frequencies rounded to half precision.
        UnsupportedModelError: there is no reference for this kind of RoPE.
    """
    references = reference_tables(config)
    reach = target_length or original_length(config)
    modules = rotary_modules(language_model(model, config), tuple(references))
    missing = set(references) - {module.layer_type for module in modules}
    if not modules or missing:
        raise PositionsNotInEffectError(
            "the model has no rotary module" + (f" for {', '.join(map(str, missing))} layers" if modules else ""),
            where=type(model).__name__,
        )
    largest = 0.0
    for module in modules:
        if module.layer_type not in references:
            raise PositionsNotInEffectError(
                "a rotary module belongs to no layer type that the config names", where=module.path
            )
        largest = max(largest, _check_module(module, references[module.layer_type], reach, config))
    _check_temperature(model, config)
    extended = _extended_group(config, references)
    return RopeVerification(
        num_modules=len({id(module.module) for module in modules}),
        num_frequencies=len(references[extended].inv_freq),
        largest_error=largest,
        attention_factor=references[extended].attention_factor,
        target_length=reach,
        layer_types=tuple(str(kind) for kind in references if kind is not None),
    )


def _extended_group(config: Any, references: dict[str | None, RopeTable]) -> str | None:
    """The layer type that the summary speaks of: the first one that is scaled, else the last."""
    for layer_type, parameters in rope_groups(config).items():
        if parameters.get("rope_type", "default") != "default":
            return layer_type
    return list(references)[-1]


def _check_module(module: RotaryModule, reference: RopeTable, reach: int, config: Any) -> float:
    """Compare buffers, attention factor and rotation; returns the largest relative error of the frequencies.

    A table with a short range (two-range LongRoPE, dynamic) is checked on both sides of the original length: such
    modules swap their buffer when they are called.
    """
    if reference.short_inv_freq is None:
        parameters = rope_groups(config)[module.layer_type]
        error = _check_frequencies(module, reference, relative_tolerance(parameters))
        _check_rotation(module, reference, reach)
        return error
    short = replace(reference, inv_freq=reference.short_inv_freq, short_inv_freq=None)
    border, beyond = _lengths_of_ranges(config, module.layer_type, reach)
    error = _check_frequencies(module, short)
    _check_rotation(module, reference, beyond)
    error = max(error, _check_frequencies(module, reference))
    _check_rotation(module, short, border)  # and back, so that the check leaves the module as it found it
    return max(error, _check_frequencies(module, short))


def _lengths_of_ranges(config: Any, layer_type: str | None, reach: int) -> tuple[int, int]:
    """The longest sequence that rotates by the short range, and one that rotates by the long one, as `config` has it.

    Not as the module's own config has it, which may be another one.
    """
    parameters = rope_groups(config)[layer_type]
    if parameters["rope_type"] == "dynamic":
        original = original_length(config)
        return original - 1, 2 * original  # it goes back to the short range only *below* that length
    border = int(parameters["original_max_position_embeddings"])
    return border, max(reach, border + 1)


def _check_frequencies(module: RotaryModule, reference: RopeTable, tolerance: float = RELATIVE_TOLERANCE) -> float:
    buffer = module.inv_freq
    if buffer.dtype != torch.float32:
        raise PositionsNotInEffectError(
            "the rotary frequencies are not float32; half precision turns far positions into noise",
            where=module.path,
            got=str(buffer.dtype),
            expected="torch.float32",
            hint="Load with from_pretrained(dtype=...) instead of casting the model.",
        )
    actual = buffer.detach().cpu().numpy()
    if actual.shape != reference.inv_freq.shape:
        raise PositionsNotInEffectError(
            "the number of rotary frequencies differs from the config",
            where=module.name,
            got=actual.shape[0],
            expected=str(reference.inv_freq.shape[0]),
        )
    # A frequency of 0 must be 0: dividing by the smallest number turns any other value into a huge error.
    errors = np.abs(actual - reference.inv_freq) / np.maximum(reference.inv_freq, np.finfo(np.float32).tiny)
    error = float(np.max(errors))
    if not error <= tolerance:
        worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
        raise PositionsNotInEffectError(
            "positions are not in effect: the rotary frequencies differ from the extended config",
            where=f"{module.path}[{worst}]",
            got=float(actual[worst]),
            expected=f"{reference.inv_freq[worst]:.8g}",
            hint="Load the model with the extended config; editing model.config after load does nothing.",
        )
    if not np.isclose(module.attention_scaling, reference.attention_factor, rtol=1e-6):
        raise PositionsNotInEffectError(
            "the attention factor is not in effect",
            where=f"{module.path.removesuffix(_BUFFER)}attention_scaling",
            got=module.attention_scaling,
            expected=f"{reference.attention_factor:.6g}",
        )
    return error


def _check_rotation(module: RotaryModule, reference: RopeTable, reach: int) -> None:
    """Compare cos and sin at a few positions below `reach` with float64 arithmetic."""
    positions = torch.tensor([0, 1, reach // 3, reach // 2, reach - 1])
    cos, sin = module.rotation(positions)
    frequencies = module.inv_freq.detach().cpu().numpy().astype(np.float64)  # after the call, which may swap them
    angles = positions.numpy()[:, None].astype(np.float64) * frequencies
    # A float32 angle of p radians is good to p * 6e-8 (half a unit in the last place).
    tolerance = (1e-5 + reach * 1.2e-7) * abs(reference.attention_factor)
    for label, actual, expected in (("cos", cos, np.cos(angles)), ("sin", sin, np.sin(angles))):
        if not _same_rotation(actual.numpy(), expected * reference.attention_factor, tolerance):
            raise PositionsNotInEffectError(
                f"the rotary module returns another {label} than its frequencies imply",
                where=module.name,
                hint="Something patches this model's rotary forward; remove the patch.",
            )


def _same_rotation(actual: Any, expected: Float64Array, tolerance: float) -> bool:
    """Whether cos or sin is right in any of the layouts in use: once, twice in halves, or each twice in a row."""
    count = expected.shape[-1]
    layouts = {
        count: [expected],
        2 * count: [np.concatenate([expected, expected], axis=-1), np.repeat(expected, 2, axis=-1)],
    }
    return any(
        actual.shape == layout.shape and bool(np.max(np.abs(actual - layout)) <= tolerance)
        for layout in layouts.get(actual.shape[-1], [])
    )


def _check_temperature(model: torch.nn.Module, config: Any) -> None:
    """Multi-head latent attention: the softmax scale that YaRN's `mscale_all_dim` asks for is in effect.

    Raises:
        PositionsNotInEffectError: an attention module has another one.
    """
    text = text_config(config)
    parameters = rope_groups(config).get(None)
    if parameters is None or not has_own_temperature(text):
        return
    mscale_all_dim = parameters.get("mscale_all_dim") or 0.0
    scaled = parameters.get("rope_type", "default") != "default" and mscale_all_dim
    temperature = softmax_temperature(float(parameters["factor"]), mscale_all_dim) if scaled else 1.0
    for name, module in model.named_modules():
        qk_head_dim, scaling = getattr(module, "qk_head_dim", None), getattr(module, "scaling", None)
        if not isinstance(qk_head_dim, int) or not isinstance(scaling, float):
            continue
        expected = qk_head_dim**-0.5 * temperature**2
        if not np.isclose(scaling, expected, rtol=1e-6):
            raise PositionsNotInEffectError(
                "the attention's softmax scale does not follow YaRN's temperature",
                where=f"{name}.scaling",
                got=scaling,
                expected=f"{expected:.6g}",
            )
