"""`ctxext verify`: checksums, config and live positions of a checkpoint, an adapter or a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ctxext.errors import ArtefactError, UnsupportedModelError
from ctxext.export.merge import describe_positions
from ctxext.files import MANIFEST_NAME, verify_manifest
from ctxext.model.load import load_config, load_model, resolve_source
from ctxext.rope.families import text_config
from ctxext.rope.methods import RopeMethod, create_method
from ctxext.rope.patchers import apply_method
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import PROVENANCE_NAME, adapter_config, base_of, load_adapter, read_provenance


def verify_checkpoint(folder: Path) -> Iterator[str]:
    """Check and tell, line by line.

    Raises:
        ArtefactError: something is missing, damaged, or not in effect.
    """
    if not folder.is_dir():
        raise ArtefactError("folder not found", where=str(folder))
    if (folder / "merged").is_dir():
        folder = folder / "merged"
    elif (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if (folder / MANIFEST_NAME).is_file():
        manifest = verify_manifest(folder)
        yield f"{folder}: {len(manifest['files'])} files, all checksums hold"
    else:
        yield f"{folder}: no manifest, so damaged files would not be noticed"
    device, dtype = torch.device("cpu"), torch.float32
    if (folder / "adapter_config.json").is_file():
        config = adapter_config(folder)
        provenance = read_provenance(folder)
        source = base_of(provenance)
        model = load_model(source, config, dtype=dtype, device=device)
        load_adapter(folder, model)
        yield f"adapter fits its base {source.name}"
    else:
        source = resolve_source(str(folder))
        config = load_config(source)
        if not getattr(text_config(config), "rope_parameters", None):
            raise UnsupportedModelError("the model has no rotary positions to verify", where=str(folder))
        model = load_model(source, config, dtype=dtype, device=device)
    if (folder / PROVENANCE_NAME).is_file():
        provenance = read_provenance(folder)
        source = base_of(provenance)
        asked = dict(provenance["method"])
        method: RopeMethod = create_method(asked.pop("method"), **asked)
        config = apply_method(
            load_config(source), method, provenance["target_length"], provenance.get("on_existing", "refuse")
        )
        lengths = f"{provenance['original_length']} to {provenance['target_length']}"
        yield f"made from {source.name}: {method.method}, {lengths} positions"
    yield f"config: {describe_positions(config)}"
    yield verify_positions(model, config).summary()
