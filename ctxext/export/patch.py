"""The patcher for a checkpoint on disk: new config and tokenizer limit, weights linked or streamed, never loaded whole.

The result is an extended model that nothing was trained on. Weights change only where the portable form folds an
attention factor into query and key.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ctxext.errors import ArtefactError
from ctxext.export.checkpoint import older_form_gap, write_both_forms
from ctxext.export.merge import refuse_existing, safetensors_folder
from ctxext.export.proof import with_real_rotary_modules
from ctxext.export.stored import checkpoint_tensors
from ctxext.export.stream import row_scaling, stream_weights
from ctxext.files import directory_atomic, read_json, write_json_atomic, write_manifest
from ctxext.model.assumptions import assumed_by_default
from ctxext.model.load import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
    resolve_source,
    weights_fingerprint,
)
from ctxext.rope.families import OnExisting, base_ropes, rope_groups
from ctxext.rope.methods import RopeMethod, create_method
from ctxext.rope.patchers import apply_method
from ctxext.rope.portable import exported_form, fold_edits, is_portable
from ctxext.rope.verify import RopeVerification, verify_positions
from ctxext.train.adapter import PROVENANCE_NAME

# What belongs to a model beside config and weights.
_COMPANIONS = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "*.tiktoken", "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_LIMIT_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class PatchReport:
    """What was written.

    Attributes:
        folder: of the extended checkpoint.
        method: with its factor.
        original_length, target_length: positions before and after.
        portable: whether the frequencies are in the portable form.
        folded: attention factor folded into query and key, by layer type; empty when none was.
        older_form_gap: why transformers 4 will not read the config's positions; None when it will.
        weights: one line about the weight files.
        verification: of the positions that the written config gives.
        notes: what the source's config does not say, or says otherwise elsewhere.
    """

    folder: Path
    method: RopeMethod
    original_length: int
    target_length: int
    portable: bool
    folded: dict[str | None, float]
    older_form_gap: str | None
    weights: str
    verification: RopeVerification
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For people."""
        yield from self.notes
        yield (
            f"{self.method.method}: {self.original_length:,} to {self.target_length:,} positions "
            f"(factor {self.method.resolved_factor():g}); nothing was trained"
        )
        yield self.weights
        if self.portable:
            folded = " and ".join(f"{factor:.4f}" for factor in self.folded.values())
            yield "portable form" + (f": attention factor {folded} folded into query and key" if folded else "")
        if self.older_form_gap is not None:
            yield f"transformers 4 will not read these positions: {self.older_form_gap}"
        yield self.verification.summary()


def patch_checkpoint(
    source: str,
    destination: Path,
    *,
    method: str = "yarn",
    target_length: int,
    portable: bool | None = None,
    on_existing: OnExisting = "refuse",
    revision: str | None = None,
    link: bool = True,
    **method_parameters: Any,
) -> PatchReport:
    """Write an extended copy of a checkpoint without training.

    Args:
        source: as for every command: hub id, folder, GGUF file, `package:NAME/FILE`, `recipes:NAME`.
        destination: new folder.
        portable: write the frequencies as a map that every reader computes right, attention factor folded into the
            weights. None does so only where no stock type is read right everywhere.
        link: hard-link weight files that do not change; see `ctxext.export.stream`.
        method, target_length, on_existing, method_parameters: as for `extend_config`.

    Raises:
        ArtefactError: source missing or damaged, destination exists.
        UnsupportedModelError, UsageError: see `extend_config`; or the portable form would not be exact.
        ResourceError: not enough disk. Nothing half-written is left.
    """
    refuse_existing(destination)
    resolved_source = resolve_source(source, revision)
    config = load_config(resolved_source)
    asked = create_method(method, **method_parameters)
    base = base_ropes(config, "replace" if asked.method == "none" else on_existing)[0]
    notes = assumed_by_default(resolved_source, config)
    resolved = asked.resolved(base.original_length, target_length)
    extended = apply_method(config, asked, target_length, on_existing)
    written, folded = exported_form(extended, portable)
    if not resolved_source.gguf_file:
        _tokenizer_settings(Path(resolved_source.location) / _LIMIT_FILE)
    provenance = {
        "base": {
            "source": resolved_source.name,
            "revision": resolved_source.revision,
            "fingerprint": weights_fingerprint(resolved_source, config),
        },
        "method": resolved.model_dump(mode="json"),
        "on_existing": on_existing,
        "original_length": base.original_length,
        "target_length": target_length,
        "trained": False,
        "portable": any(map(is_portable, rope_groups(written).values())),
    }
    with directory_atomic(destination) as partial:
        if resolved_source.gguf_file:
            weights = _write_from_gguf(partial, resolved_source, extended, written, folded)
        else:
            weights = _write_streamed(partial, resolved_source, extended, written, folded, link)
        write_both_forms(partial)
        set_tokenizer_limit(partial, target_length)
        write_json_atomic(partial / PROVENANCE_NAME, provenance)
        reread = AutoConfig.from_pretrained(partial)
        verification = verify_positions(with_real_rotary_modules(reread), written, target_length)
        write_manifest(partial, kind="patched")
    return PatchReport(
        folder=destination,
        method=resolved,
        original_length=base.original_length,
        target_length=target_length,
        portable=bool(provenance["portable"]),
        folded=folded,
        older_form_gap=older_form_gap(written.to_dict()),
        weights=weights,
        verification=verification,
        notes=tuple(notes),
    )


def _write_streamed(
    folder: Path,
    source: ModelSource,
    extended: PreTrainedConfig,
    written: PreTrainedConfig,
    folded: dict[str | None, float],
    link: bool,
) -> str:
    base_folder = safetensors_folder(source)
    tensors = checkpoint_tensors(base_folder).tensors
    edits = {
        # Folding multiplies rows of a matrix, so that it can be done a few rows at a time.
        name: row_scaling(edit, tensors[name].num_rows) if len(tensors[name].shape) == 2 else edit
        for name, edit in fold_edits(extended, tensors, folded).items()
    }
    report = stream_weights(base_folder, folder, edits, link=link)
    written.save_pretrained(folder)
    for pattern in _COMPANIONS:
        for file in sorted(base_folder.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    return report.summary()


def _write_from_gguf(
    folder: Path,
    source: ModelSource,
    extended: PreTrainedConfig,
    written: PreTrainedConfig,
    folded: dict[str | None, float],
) -> str:
    import torch

    model = load_model(source, written, dtype=torch.float32, device=torch.device("cpu"))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, edit in fold_edits(extended, parameters, folded).items():
            parameters[name].copy_(edit(parameters[name].data))
    with quiet():
        model.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
    return "weights: converted from GGUF to float32 safetensors, in memory"


def set_tokenizer_limit(folder: Path, target_length: int) -> None:
    """Let the tokenizer's `model_max_length` say the same as the config.

    Raises:
        ArtefactError: the tokenizer's config is damaged.
    """
    path = folder / _LIMIT_FILE
    settings = _tokenizer_settings(path)
    if settings is not None:
        write_json_atomic(path, {**settings, "model_max_length": target_length})


def _tokenizer_settings(path: Path) -> dict[str, Any] | None:
    """A tokenizer_config.json; None when there is none."""
    if not path.is_file():
        return None
    values = read_json(path)
    if not isinstance(values, dict):
        raise ArtefactError("the tokenizer's config is no mapping", where=str(path), got=type(values).__name__)
    return values
