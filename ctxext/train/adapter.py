"""The adapter folder: weights together with the extended config they were trained under.

An adapter alone knows nothing of RoPE: loaded on the unscaled base it gives other logits without any warning. So the
folder carries the extended `config.json` and a `ctxext.json`, and loading refuses when something disagrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ctxext.errors import ArtefactError, ResourceError
from ctxext.files import directory_atomic, read_json, verify_manifest, write_json_atomic, write_manifest
from ctxext.model.load import ModelSource, load_config, quiet, resolve_source, weights_fingerprint

PROVENANCE_NAME = "ctxext.json"


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, on the CPU."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def set_adapter_tensors(model: PeftModel, tensors: dict[str, Tensor], where: str) -> None:
    """Put stored weights into the model; every one must fit and none may be missing (peft itself only warns).

    Raises:
        ArtefactError: keys or shapes differ.
    """
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ArtefactError(
            f"the adapter does not fit the model ({len(missing)} weights missing, {len(unknown)} unknown)",
            where=where,
            got=(missing or unknown)[0],
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ArtefactError(
                "an adapter weight has another shape than the model asks for",
                where=f"{where}: {name}",
                got=str(tuple(tensor.shape)),
                expected=str(tuple(expected[name].shape)),
            )
    with quiet():
        set_peft_model_state_dict(model, tensors)


def save_adapter(folder: Path, model: PeftModel, provenance: dict[str, Any]) -> None:
    """Write the adapter folder atomically, replacing an older one; loadable by peft as it is.

    The extended config lies beside the weights as `config.json`; `ctxext.json` says what the adapter belongs to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tensor_write_errors(folder), directory_atomic(folder, replace=True) as partial:
        with quiet():
            model.save_pretrained(str(partial), save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty card
        _name_base(partial, str(provenance["base"]["source"]))
        base: Any = model.get_base_model()
        base.config.save_pretrained(partial)
        write_json_atomic(partial / PROVENANCE_NAME, provenance)
        write_manifest(partial)


def _name_base(folder: Path, source: str) -> None:
    # peft writes the path that the base was loaded from, which is a path of this machine for packages and files.
    path = folder / "adapter_config.json"
    config = read_json(path)
    config["base_model_name_or_path"] = source
    write_json_atomic(path, config)


def read_provenance(folder: Path) -> dict[str, Any]:
    """`ctxext.json` of an adapter or merged folder.

    Raises:
        ArtefactError: missing or malformed.
    """
    if not folder.is_dir():
        raise ArtefactError("folder not found", where=str(folder))
    if not (folder / PROVENANCE_NAME).is_file():
        raise ArtefactError(
            "the folder has no ctxext.json, so the positions it was trained with are unknown",
            where=str(folder),
            hint="Only folders written by ctxext can be used here.",
        )
    provenance = read_json(folder / PROVENANCE_NAME)
    if not isinstance(provenance, dict) or "base" not in provenance or "target_length" not in provenance:
        raise ArtefactError("ctxext.json is incomplete", where=str(folder / PROVENANCE_NAME))
    return provenance


def base_of(provenance: dict[str, Any]) -> ModelSource:
    """The base model that a folder was made from.

    Raises:
        ArtefactError: it is not there, or holds other weights by now.
    """
    base = provenance["base"]
    source = resolve_source(base["source"], base.get("revision"))
    expected = base.get("fingerprint")
    if expected is not None:
        actual = weights_fingerprint(source, load_config(source))
        if actual != expected:
            raise ArtefactError(
                "the base model's weights are not the ones that were trained on",
                where=source.name,
                got=actual,
                expected=f"weights with the fingerprint {expected}",
            )
    return source


def adapter_config(folder: Path) -> PreTrainedConfig:
    """The extended config beside an adapter, after checking the folder's checksums.

    Raises:
        ArtefactError: no adapter here, or a damaged one.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ArtefactError("not an adapter folder (it has no adapter_config.json)", where=str(folder))
    verify_manifest(folder)
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    return config


def load_adapter(folder: Path, model: PreTrainedModel) -> PeftModel:
    """Put a stored adapter onto a base model that was loaded with the adapter's extended config.

    Raises:
        ArtefactError: the model's RoPE is not the adapter's, or a weight is missing, unknown or misshapen.
    """
    stored = adapter_config(folder)
    ours, theirs = model.config.get_text_config().rope_parameters, stored.get_text_config().rope_parameters
    if ours != theirs:
        raise ArtefactError(
            "the model's RoPE is not the one the adapter was trained with",
            where=str(folder),
            got=str(ours),
            expected=str(theirs),
            hint="Load the base with the adapter folder's config.json.",
        )
    with quiet():
        wrapped = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    assert isinstance(wrapped, PeftModel)
    set_adapter_tensors(wrapped, read_tensors(folder / "adapter_model.safetensors"), str(folder))
    return wrapped


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ArtefactError: missing, truncated or not safetensors.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"could not read the tensors ({error})", where=str(path)) from error


@contextmanager
def tensor_write_errors(folder: Path) -> Iterator[None]:
    """Turn what safetensors raises on a full disk, which is no OSError, into our error.

    Raises:
        ResourceError: the tensors could not be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise ResourceError(
            f"could not write the tensors ({error})", where=str(folder), hint="Check free space and permissions."
        ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file (inside a directory that becomes visible atomically)."""
    save_file(tensors, path)
