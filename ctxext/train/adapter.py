"""The adapter folder: weights together with the extended config they were trained under.

An adapter alone knows nothing of RoPE: loaded on the unscaled base it gives other logits without any warning. So the
folder carries the extended `config.json` and a `ctxext.json`, and loading refuses when something disagrees.

Embeddings and norms that were trained whole lie in it as peft's `modules_to_save`, so that peft opens the folder as it
is. Here they are not wrapped as peft would, which keeps a second, frozen copy: they go into the base itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ctxext.errors import ArtefactError, ResourceError
from ctxext.files import directory_atomic, read_json, verify_manifest, write_json_atomic, write_manifest
from ctxext.model.load import ModelSource, load_config, load_model, quiet, resolve_source, weights_fingerprint
from ctxext.model.parts import is_tied, own_parameters
from ctxext.model.trained import ADAPTER_WEIGHTS, PEFT_PREFIX, peft_tensors, set_trained_tensors, trained_tensors
from ctxext.model.whole import compute_dtype, whole_parameters
from ctxext.rope.verify import verify_positions

PROVENANCE_NAME = "ctxext.json"


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """`trained_tensors` on the CPU, to be written."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(model).items()}


def save_trained(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, provenance: dict[str, Any]) -> None:
    """Write what was trained atomically: an adapter, or the whole model where that is what trains."""
    if isinstance(model, PeftModel):
        save_adapter(folder, model, provenance)
    else:
        save_whole_model(folder, model, tokenizer, provenance)


def save_whole_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, provenance: dict[str, Any]) -> None:
    """Write a fully trained model as a checkpoint with its extended config, in the dtype that it computes in.

    It is what an adapter folder is for adapters: what was trained, as it was trained. The merged checkpoint made from
    it has the form that other programs read.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = compute_dtype(model)
    weights = {name: parameter.detach().to(dtype) for name, parameter in whole_parameters(model).items()}
    tokenizer.model_max_length = int(provenance["target_length"])
    with tensor_write_errors(folder), directory_atomic(folder, replace=True) as partial:
        with quiet():
            model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        # The native form of the positions, which is what "portable": false says.
        write_json_atomic(partial / PROVENANCE_NAME, {**provenance, "adaptation": "full", "portable": False})
        write_manifest(partial)


def load_trained(
    folder: Path, source: ModelSource, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """What `save_trained` wrote, ready to be merged: base and adapter, or the model itself.

    Args:
        source: of the base.
        config: the extended one that the folder must have been trained under.

    Raises:
        ArtefactError: the folder is damaged or was trained under other positions.
    """
    if (folder / "adapter_config.json").is_file():
        model = load_model(source, config, dtype=dtype, device=device)
        verify_positions(model, config)
        return load_adapter(folder, model)
    verify_manifest(folder)
    _require_same_rope(config, load_config(ModelSource(str(folder), str(folder))), folder)
    model = load_model(ModelSource(str(folder), str(folder)), config, dtype=dtype, device=device)
    verify_positions(model, config)
    return model


def save_adapter(folder: Path, model: PeftModel, provenance: dict[str, Any]) -> None:
    """Write the adapter folder atomically, replacing an older one; loadable by peft as it is.

    The extended config lies beside the weights as `config.json`; `ctxext.json` says what the adapter belongs to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    base: Any = model.get_base_model()
    with tensor_write_errors(folder), directory_atomic(folder, replace=True) as partial:
        save_file(_stored_tensors(model), partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _stored_config(model, str(provenance["base"]["source"])).save_pretrained(str(partial))
        base.config.save_pretrained(partial)
        write_json_atomic(partial / PROVENANCE_NAME, provenance)
        write_manifest(partial)


def _stored_config(model: PeftModel, source: str) -> LoraConfig:
    """The adapter's config as peft shall read it."""
    stored = copy.copy(model.peft_config[model.active_adapter])
    assert isinstance(stored, LoraConfig)
    stored.inference_mode = True
    # peft writes the path that the base was loaded from, which is a path of this machine for packages and files.
    stored.base_model_name_or_path = source
    modules = sorted({name.rpartition(".")[0] for name in _stored_whole(model)})
    if modules:
        stored.modules_to_save = [*(stored.modules_to_save or []), *modules]
        stored.ensure_weight_tying = _tied_by_peft(model.get_base_model())
    return stored


def _stored_tensors(model: PeftModel) -> dict[str, Tensor]:
    adapter = peft_tensors(model)
    whole = {PEFT_PREFIX + name: value for name, value in _stored_whole(model).items()}
    # Cloned: safetensors refuses two names of one tensor.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in (adapter | whole).items()}


def _stored_whole(model: PeftModel) -> dict[str, Tensor]:
    """Whole parameters under every name that peft asks for: a tied one under both of its names."""
    base: Any = model.get_base_model()
    whole: dict[str, Tensor] = dict(whole_parameters(model))
    source = next((name for name, value in whole.items() if value is _tied_parameter(base)), None)
    if source is not None:
        head = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
        whole[f"{head}.{source.rpartition('.')[2]}"] = whole[source]
    return whole


def _tied_parameter(base: Any) -> Tensor | None:
    if not is_tied(base):
        return None
    return next(parameter for _, parameter in own_parameters(base.get_input_embeddings()))


def _tied_by_peft(base: Any) -> bool:
    """Whether peft keeps the embeddings tied when they are saved whole: it knows them by their names."""
    name = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    return is_tied(base) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


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
    _require_same_rope(model.config, adapter_config(folder), folder)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    whole = whole_names(tensors, model, folder)
    with torch.no_grad():
        for key, name in whole.items():
            _put(model.get_parameter(name), tensors.pop(key), f"{folder}: {key}")
    with quiet():
        wrapped = get_peft_model(model, plain_lora_config(folder))
    assert isinstance(wrapped, PeftModel)
    set_trained_tensors(wrapped, tensors, str(folder))
    return wrapped


def _require_same_rope(config: PreTrainedConfig, stored: PreTrainedConfig, folder: Path) -> None:
    ours, theirs = config.get_text_config().rope_parameters, stored.get_text_config().rope_parameters
    if ours != theirs:
        raise ArtefactError(
            "the model's RoPE is not the one the adapter was trained with",
            where=str(folder),
            got=str(ours),
            expected=str(theirs),
            hint="Load the base with the adapter folder's config.json.",
        )


def plain_lora_config(folder: Path) -> LoraConfig:
    """A stored adapter's config without what is saved whole, which goes into the base itself."""
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.modules_to_save, config.ensure_weight_tying = None, False
    return config


def whole_names(keys: Iterable[str], base: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Those of an adapter's keys that are parameters of the base itself, and what the base calls them.

    Raises:
        ArtefactError: one is missing that the adapter's config names.
    """
    owned = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    names = {key: key.removeprefix(PEFT_PREFIX) for key in keys if key.startswith(PEFT_PREFIX)}
    whole = {key: name for key, name in names.items() if name in owned}
    saved = tuple(LoraConfig.from_pretrained(str(folder)).modules_to_save or ())
    needed = {name for name in owned if name.rpartition(".")[0].endswith(saved)} if saved else set()
    if missing := sorted(needed - set(whole.values())):
        raise ArtefactError(
            f"the adapter does not fit the model ({len(missing)} weights missing, 0 unknown)",
            where=str(folder),
            got=missing[0],
        )
    return whole


def _put(parameter: Tensor, stored: Tensor, where: str) -> None:
    """Give the base a parameter that was trained whole, rounded to the base's own dtype."""
    if parameter.shape != stored.shape:
        raise ArtefactError(
            "an adapter weight has another shape than the model asks for",
            where=where,
            got=str(tuple(stored.shape)),
            expected=str(tuple(parameter.shape)),
        )
    parameter.copy_(stored)


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
