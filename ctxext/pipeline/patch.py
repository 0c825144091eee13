"""`ctxext patch`: an extended checkpoint without training, or the settings that do the same in another program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctxext.errors import UsageError
from ctxext.export.card import write_patch_card
from ctxext.export.patch import patch_checkpoint
from ctxext.export.settings import settings_for, settings_lines
from ctxext.model.load import load_config, resolve_source
from ctxext.recipe.load import Document, apply_overrides
from ctxext.rope.families import OnExisting, base_ropes, text_config
from ctxext.rope.methods import create_method
from ctxext.rope.patchers import apply_method


def method_parameters(settings: Sequence[str]) -> dict[str, Any]:
    """`beta_fast=64 truncate=false` as keyword arguments; values are read as YAML.

    Raises:
        UsageError: a setting without `=`, or of an unreadable value.
    """
    return dict(apply_overrides(Document("command line", {}, {}), settings).values)


def on_existing_of(choice: str) -> OnExisting:
    """The value of `--on-existing`.

    Raises:
        UsageError: unknown.
    """
    for accepted in ("refuse", "replace", "compose"):
        if choice == accepted:
            return accepted
    raise UsageError("unknown choice", where="--on-existing", got=choice, expected="refuse, replace or compose")


def patch_model_folder(
    source: str,
    destination: Path,
    *,
    method: str,
    target_length: int,
    portable: bool | None,
    on_existing: str,
    revision: str | None,
    settings: Sequence[str],
) -> Iterator[str]:
    """Write the checkpoint and its card; yields lines for people.

    Raises:
        CtxextError: see `patch_checkpoint`.
    """
    report = patch_checkpoint(
        source,
        destination,
        method=method,
        target_length=target_length,
        portable=portable,
        on_existing=on_existing_of(on_existing),
        revision=revision,
        **method_parameters(settings),
    )
    yield from report.lines()
    yield f"model card: {write_patch_card(destination, replace_edited=True)}"
    yield f"extended checkpoint: {report.folder}"


def settings_elsewhere(
    program: str,
    source: str,
    *,
    method: str,
    target_length: int,
    on_existing: str,
    revision: str | None,
    settings: Sequence[str],
) -> Iterator[str]:
    """The settings that give the same extension of an unpatched model in `program`, line by line.

    Raises:
        UsageError: unknown program, or one that has no such settings (the reason is in the message).
        UnsupportedModelError: one RoPE per layer type, which no program's flags can express.
    """
    config = load_config(resolve_source(source, revision))
    choice = on_existing_of(on_existing)
    base = base_ropes(config, choice)[0]
    if base.layer_type is not None:
        raise UsageError(
            "this model has one RoPE per layer type, which no program's settings can express",
            where="--for",
            got=program,
            hint="Write a checkpoint instead: ctxext patch MODEL OUT --target-length N",
        )
    extended = apply_method(config, create_method(method, **method_parameters(settings)), target_length, choice)
    parameters = text_config(extended).rope_parameters
    yield from settings_lines(settings_for(program, parameters, base.original_length, target_length, base.theta))
