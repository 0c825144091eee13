"""The patcher for a model that is in memory already: in a notebook, or inside another trainer.

What a model built from the extended config would have differently is found by building that model without weights,
and put into the live one: rotary modules, and plain numbers that follow from the config (the softmax scale of
multi-head latent attention). Nothing is monkeypatched; `unpatch` puts the former parts back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import add_hook_to_module

from ctxext.errors import UsageError
from ctxext.rope.families import OnExisting, original_length, text_config
from ctxext.rope.patchers import extend_config
from ctxext.rope.verify import RopeVerification, verify_positions

_ATTRIBUTE = "_ctxext_patch"
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class _Patch:
    """What a live model had before it was patched."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    attributes: list[tuple[torch.nn.Module, str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)


def patch_model(
    model: torch.nn.Module,
    *,
    method: str = "yarn",
    target_length: int,
    on_existing: OnExisting = "refuse",
    **method_parameters: Any,
) -> RopeVerification:
    """Rewrite the RoPE of a model in memory, in place, and verify it.

    Weights stay where and what they are; saving the model afterwards writes the extended config. A model wrapped by
    peft is patched inside its wrapper. The tokenizer's `model_max_length` is the caller's to raise.

    Args:
        model: a transformers model, or a peft model around one.
        method, target_length, on_existing, method_parameters: as for `extend_config`.

    Raises:
        UsageError: patched already, or bad arguments.
        UnsupportedModelError: the model has no RoPE that can be rewritten.
        PositionsNotInEffectError: the rewrite did not take effect; the model is then as it was.
    """
    core = _core(model)
    if getattr(core, _ATTRIBUTE, None) is not None:
        raise UsageError("the model is patched already", where=type(core).__name__, hint="Call unpatch(model) first.")
    extended = extend_config(
        core.config, method=method, target_length=target_length, on_existing=on_existing, **method_parameters
    )
    before, after = _skeleton(core, core.config), _skeleton(core, extended)
    patch = _Patch()
    setattr(core, _ATTRIBUTE, patch)
    try:
        _take_over(core, before, after, patch)
        _take_config(core, extended, patch)
        return verify_positions(core, core.config, target_length)
    except BaseException:
        unpatch(model)
        raise


def unpatch(model: torch.nn.Module) -> None:
    """Undo `patch_model`: the model is again exactly what it was.

    Raises:
        UsageError: the model was not patched.
    """
    core = _core(model)
    patch: _Patch | None = getattr(core, _ATTRIBUTE, None)
    if patch is None:
        raise UsageError("the model is not patched", where=type(core).__name__)
    for name, module in patch.modules.items():
        core.set_submodule(name, module)
    for module, name, value in patch.attributes:
        setattr(module, name, value)
    text = text_config(core.config)
    for name, value in patch.config.items():
        setattr(text, name, value)
    for name in patch.added:
        delattr(text, name)
    delattr(core, _ATTRIBUTE)


def _core(model: torch.nn.Module) -> Any:
    """The transformers model itself, out of its peft wrapper."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "config") or not hasattr(inner.config, "get_text_config"):
        raise UsageError(
            "patch_model takes a transformers model, or a peft model around one",
            where="model",
            got=type(model).__name__,
        )
    return inner


def _skeleton(core: Any, config: Any) -> torch.nn.Module:
    """The same class built from `config`, parameters on the meta device, buffers real."""
    with init_empty_weights(include_buffers=False):
        skeleton: torch.nn.Module = type(core)(copy.deepcopy(config))
    return skeleton


def _take_over(core: Any, before: torch.nn.Module, after: torch.nn.Module, patch: _Patch) -> None:
    live, old = dict(core.named_modules()), dict(before.named_modules())
    for name, new in after.named_modules():
        if any(buffer.endswith("inv_freq") for buffer, _ in new.named_buffers(recurse=False)):
            former = live[name]
            device = next(former.buffers(recurse=False)).device
            patch.modules[name] = former
            new.to(device).train(former.training)
            if hasattr(former, "_hf_hook"):  # a model spread over devices by Accelerate
                add_hook_to_module(new, former._hf_hook)
            core.set_submodule(name, new)
            continue
        for attribute, value in vars(new).items():
            differs = isinstance(value, _PLAIN) and value != vars(old[name]).get(attribute)
            if differs and attribute in vars(live[name]):
                patch.attributes.append((live[name], attribute, vars(live[name])[attribute]))
                setattr(live[name], attribute, value)


def _take_config(core: Any, extended: Any, patch: _Patch) -> None:
    """Write the extended values into the live config object, which the model's modules share."""
    text, new = text_config(core.config), text_config(extended)
    for name in ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "head_dim"):
        if name not in vars(new) or vars(new)[name] == vars(text).get(name):
            continue
        if name in vars(text):
            patch.config[name] = vars(text)[name]
        else:
            patch.added.add(name)
        setattr(text, name, copy.deepcopy(vars(new)[name]))
    assert original_length(core.config)
