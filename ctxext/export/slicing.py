"""The first layers of a checkpoint as a checkpoint of its own: enough to see how a program reads its positions.

Every layer of a type rotates alike, so two layers show what thirty do; a slow reader is asked about those.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ctxext.errors import ArtefactError, UsageError
from ctxext.export.stored import INDEX_NAME, SINGLE_NAME, checkpoint_tensors
from ctxext.files import MANIFEST_NAME, directory_atomic, read_json, require_free_space, write_json_atomic

_LAYER_NUMBER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_FEWEST = 2


def layers_that_show_everything(text_config: Any) -> int:
    """How many first layers hold every kind of layer that the config names; at least two, at most all."""
    total = int(text_config.num_hidden_layers)
    needed = min(_FEWEST, total)
    for name in ("layer_types", "no_rope_layers"):
        kinds = getattr(text_config, name, None) or []
        if len(kinds) == total:
            needed = max(needed, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return needed


def slice_layers(checkpoint: Path, destination: Path, num_layers: int) -> Path:
    """Write the first `num_layers` layers of `checkpoint`, with everything that is not a layer, as `destination`.

    Raises:
        UsageError: not between 1 and the number of layers.
        ArtefactError: no safetensors checkpoint, one whose layers are not numbered as usual, or the destination exists.
        ResourceError: not enough disk.
    """
    config = read_json(checkpoint / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    total = text.get("num_hidden_layers")
    if not isinstance(total, int):
        raise ArtefactError("the config has no num_hidden_layers", where=str(checkpoint / "config.json"))
    if not 1 <= num_layers <= total:
        raise UsageError("no such number of layers", where="num_layers", got=num_layers, expected=f"1 to {total}")
    text["num_hidden_layers"] = num_layers
    for name, value in text.items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            text[name] = value[:num_layers]
    weights = checkpoint_tensors(checkpoint)
    numbers = {name: _layer_number(name) for name in weights.tensors}
    if not any(number == total - 1 for number in numbers.values()):
        raise ArtefactError("the weights show no numbered layers", where=str(checkpoint))
    kept = [name for name, number in numbers.items() if number is None or number < num_layers]
    require_free_space(destination, sum(weights.tensors[name].num_bytes for name in kept), "a slice of the model")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with directory_atomic(destination) as partial:
        write_json_atomic(partial / "config.json", config)
        save_file({name: weights.read(name) for name in kept}, partial / SINGLE_NAME, metadata={"format": "pt"})
        for file in checkpoint.iterdir():
            if _belongs_to_the_model(file) and file.name not in {"config.json", MANIFEST_NAME, INDEX_NAME}:
                shutil.copyfile(file, partial / file.name)
    return destination


def _layer_number(name: str) -> int | None:
    found = _LAYER_NUMBER.search(f".{name}")
    return int(found.group(1)) if found else None


def _belongs_to_the_model(file: Path) -> bool:
    """Tokenizer, generation config and the like; no weights."""
    return file.is_file() and file.suffix in {".json", ".model", ".txt", ".jinja"}
