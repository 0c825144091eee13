"""Arms of an evaluation: models, adapters and variants patched on loading, which are all asked the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ctxext.errors import UsageError
from ctxext.export.merge import merged_in_memory
from ctxext.files import sha256_file
from ctxext.model.load import ModelSource, load_config, load_model, resolve_source, short_name, weights_fingerprint
from ctxext.model.trained import ADAPTER_WEIGHTS
from ctxext.model.windowed import attention_for
from ctxext.pipeline.patch import method_parameters
from ctxext.pipeline.report import arm_labels
from ctxext.pipeline.verify import find_checkpoint
from ctxext.rope.families import OnExisting, base_ropes, length_before_scaling, text_config
from ctxext.rope.methods import RopeMethod, create_method
from ctxext.rope.patchers import apply_method
from ctxext.train.adapter import (
    PROVENANCE_NAME,
    adapter_config,
    base_of,
    load_adapter,
    read_provenance,
)

_METHOD_PREFIX = "method:"
_ACCEPTED = "base, untrained, NAME=MODEL (a folder, adapter, run or hub id), or NAME=method:yarn[,beta_fast=64]"


@dataclass(frozen=True)
class ArmSpec:
    """One `--arm`, as the user wrote it.

    Attributes:
        source: the model; None for the one that the command names.
        method: RoPE method to apply on loading; None to take the model as it is.
    """

    name: str
    source: str | None = None
    method: RopeMethod | None = None


@dataclass(frozen=True)
class OpenedArm:
    """What an arm is, before any weight is loaded.

    Attributes:
        config: with the positions that the arm is evaluated under.
        adapter: folder of an adapter on top of `source`.
        original_length: before extension.
        reach: positions that the arm claims to have.
    """

    name: str
    label: str
    source: ModelSource
    config: PreTrainedConfig
    original_length: int
    reach: int
    adapter: Path | None = None
    method: str = "as it is"

    def identity(self) -> dict[str, Any]:
        """What identifies the weights; the positions are the config's business."""
        identity = {"source": self.source.name, "fingerprint": weights_fingerprint(self.source, self.config)}
        if self.adapter is not None:
            identity["adapter"] = sha256_file(self.adapter / ADAPTER_WEIGHTS)[:16]
        return identity

    def load(self, *, dtype: torch.dtype, device: torch.device, device_map: str | None = None) -> PreTrainedModel:
        """The model, an adapter merged into it in memory.

        Raises:
            ArtefactError: weights missing or unreadable.
        """
        attention = attention_for(self.config, device)
        model = load_model(
            self.source, self.config, dtype=dtype, device=device, attention=attention, device_map=device_map
        )
        if self.adapter is None:
            return model
        ready: PreTrainedModel = merged_in_memory(load_adapter(self.adapter, model))
        return ready


def parse_arms(texts: Sequence[str], *, model: str | None, method: str, target_length: int | None) -> list[ArmSpec]:
    """Arms from the command line; without any, the one model as it is.

    Args:
        method: of the arm `untrained`, with parameters as in `yarn,beta_fast=64`.

    Raises:
        UsageError: an arm that cannot be made, or a name twice.
    """
    if not texts:
        if model is None:
            raise UsageError("no model to evaluate", where="ctxext eval", expected="a model, or --arm NAME=MODEL")
        return [ArmSpec("base")]
    specs = [_parse(text, method) for text in texts]
    names = [spec.name for spec in specs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("an arm is given twice", where="--arm", got=", ".join(doubled))
    if model is None and (unnamed := [spec.name for spec in specs if spec.source is None]):
        raise UsageError(
            "these arms are variants of a model, and the command names none",
            where="--arm",
            got=", ".join(unnamed),
            expected="ctxext eval MODEL --arm ...",
        )
    if target_length is None and (patched := [spec.name for spec in specs if spec.method is not None]):
        raise UsageError(
            "these arms are extended on loading, and the command does not say how far",
            where="--arm",
            got=", ".join(patched),
            expected="--target-length N",
        )
    return specs


def _parse(text: str, method: str) -> ArmSpec:
    name, given, what = text.partition("=")
    if not name or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
        raise UsageError("not an arm", where="--arm", got=text, expected=_ACCEPTED)
    if not given:
        if name == "base":
            return ArmSpec(name)
        if name == "untrained":
            return ArmSpec(name, method=_method(method))
        raise UsageError("this arm needs a model", where="--arm", got=text, expected=_ACCEPTED)
    if not what:
        raise UsageError("this arm names no model", where="--arm", got=text, expected=_ACCEPTED)
    if what.startswith(_METHOD_PREFIX):
        return ArmSpec(name, method=_method(what.removeprefix(_METHOD_PREFIX)))
    return ArmSpec(name, source=what)


def _method(text: str) -> RopeMethod:
    name, *settings = text.split(",")
    return create_method(name, **method_parameters(settings))


def open_arm(
    spec: ArmSpec,
    *,
    model: str | None,
    revision: str | None = None,
    target_length: int | None = None,
    on_existing: OnExisting = "refuse",
) -> OpenedArm:
    """Find the arm's model, config and lengths; loads no weights.

    Raises:
        CtxextError: no such model or adapter, a method that does not fit it.
    """
    name = spec.source or model
    assert name is not None
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        folder = find_checkpoint(folder)  # a run: its merged checkpoint, else what it trained
        name = str(folder)
    label = arm_labels(spec.method.method if spec.method else "extended").get(spec.name, spec.name)
    if (folder / "adapter_config.json").is_file():
        provenance = read_provenance(folder)
        return OpenedArm(
            name=spec.name,
            label=label,
            source=base_of(provenance),
            config=adapter_config(folder),
            original_length=int(provenance["original_length"]),
            reach=int(provenance["target_length"]),
            adapter=folder,
            method=str(provenance.get("method", {}).get("method", "unknown")),
        )
    source = resolve_source(name, revision if spec.source is None else None)
    config = load_config(source)
    if spec.method is None:
        original, reach = lengths_of(source, text_config(config))
        if spec.name not in arm_labels("extended"):
            label = spec.name
        elif spec.name == "extended":
            label = f"extended: {short_name(source.name)}"
        return OpenedArm(spec.name, label, source, config, original, reach)
    assert target_length is not None
    original = base_ropes(config, on_existing)[0].original_length
    extended = apply_method(config, spec.method, target_length, on_existing)
    return OpenedArm(spec.name, label, source, extended, original, target_length, method=spec.method.method)


def lengths_of(source: ModelSource, text: Any) -> tuple[int, int]:
    """The length before extension and the positions that the model reaches.

    From ctxext.json where there is one (dynamic scaling and portable checkpoints hide one of them), else the config.
    """
    folder = Path(source.location)
    if (folder / PROVENANCE_NAME).is_file():
        provenance = read_provenance(folder)
        return int(provenance["original_length"]), int(provenance["target_length"])
    reach = int(text.max_position_embeddings)
    return (length_before_scaling(text) if getattr(text, "rope_parameters", None) else reach), reach
