"""Adapter + its extended config -> a plain Hugging Face checkpoint, proven by reading it back.

The merged folder needs neither ctxext nor peft: stock `from_pretrained` gives the logits of base + adapter.

Plain LoRA on a base stored as safetensors is merged file by file, a block of rows at a time: W + scaling * (B @ A) in
float32, rounded once to the dtype that the base is stored in, whatever the model's size; embeddings and norms that were
trained whole take the base's place. Everything else (GGUF bases, DoRA, layers that transformers renames or fuses on
loading, another dtype asked for) is merged in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ctxext.errors import ArtefactError, ResourceError, UsageError
from ctxext.export.checkpoint import write_both_forms
from ctxext.export.placement import Placement, place_adapter
from ctxext.export.proof import (
    COMPUTED,
    ROUNDED_WEIGHTS,
    SAME_WEIGHTS,
    LogitDifference,
    LoraTarget,
    MergeProof,
    MergeTarget,
    WholeTarget,
    check_logits,
    device_for_logits,
    meta_model,
    probe,
    probe_ids,
    probe_logits,
    prove_by_samples,
    read_back,
)
from ctxext.export.quantised import TRAINED_IN_4_BITS, compare_with_quantised
from ctxext.export.stored import (
    FLOAT_TYPES,
    INDEX_NAME,
    SINGLE_NAME,
    StoredWeights,
    TensorInfo,
    checkpoint_tensors,
    read_header,
    read_index,
    read_tensor,
)
from ctxext.export.stream import RowwiseEdit, stream_weights
from ctxext.files import directory_atomic, require_free_space, write_json_atomic, write_manifest
from ctxext.model.load import (
    ModelSource,
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
    weights_fingerprint,
)
from ctxext.model.parts import causal_lm
from ctxext.model.quantised import QUANTISATION_KEY
from ctxext.model.trained import ADAPTER_WEIGHTS, PEFT_PREFIX, set_trained_tensors
from ctxext.rope.families import text_config
from ctxext.rope.portable import exported_form, fold_edits
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import (
    PROVENANCE_NAME,
    load_trained,
    plain_lora_config,
    read_provenance,
    tensor_write_errors,
    whole_names,
)

__all__ = [
    "MergeProof",
    "NotStreamableError",
    "merge_adapter",
    "merge_streamed",
    "merged_in_memory",
    "probe_ids",
    "probe_logits",
    "read_back",
    "refuse_existing",
    "safetensors_folder",
    "write_merged",
]

_GENERATION_NAME = "generation_config.json"
# Starting values that leave the base's weights alone; the others (PiSSA, LoftQ ...) subtract something from them.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


class NotStreamableError(ArtefactError):
    """This adapter or base can only be merged in memory."""


@dataclass(frozen=True)
class _StreamPlan:
    """Everything that must hold before a byte is written.

    Attributes:
        config: the extended one, as the merged folder shall have it.
        skeleton: the base without weights, for what only a model object knows.
        targets: what is merged, by tensor name of the checkpoint.
    """

    weights: StoredWeights
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    targets: Mapping[str, MergeTarget]


def merge_adapter(
    adapter: Path, destination: Path, dtype: str = "auto", *, scale: float = 1.0, onto: str | None = None
) -> MergeProof:
    """Merge a stored adapter into its base, streamed where that is possible (the proof says which way and why).

    Args:
        adapter: folder written by ctxext.
        destination: new folder.
        dtype: of the merged weights. `auto` keeps the dtype that the base is stored in; merged in memory, it is what
            the device computes best in.
        scale: what the adapter's change is multiplied by.
        onto: another model than the adapter's base, see `ctxext.export.placement`.

    Raises:
        ArtefactError: the folder is no adapter of ctxext, is damaged, does not fit its base or `onto`, or the
            destination exists.
        UsageError: a scale that makes no sense for this adapter.
        ResourceError: not enough disk.
    """
    device = choose_device()
    chosen_dtype = choose_dtype(dtype, device)
    refuse_existing(destination)
    if read_provenance(adapter).get("adaptation") == "full":
        return _write_whole(adapter, destination, chosen_dtype, device, scale=scale, onto=onto)
    placement = place_adapter(adapter, scale=scale, onto=onto)
    try:
        base_folder = safetensors_folder(placement.source)
        if dtype != "auto":
            _require_dtype(checkpoint_tensors(base_folder), chosen_dtype)
        return _beside_quantised(merge_streamed(placement, base_folder, destination), placement, device)
    except NotStreamableError as error:
        reason = error.what
    model = load_model(placement.source, placement.config, dtype=chosen_dtype, device=device)
    verify_positions(model, placement.config)
    wrapped = placement.apply(model)
    _, proof = write_merged(destination, wrapped, load_tokenizer(placement.source), placement.provenance)
    proof = replace(proof, way=f"merged in memory, not streamed: {reason}", warnings=placement.warnings)
    return _beside_quantised(proof, placement, device)


def _beside_quantised(proof: MergeProof, placement: Placement, device: torch.device) -> MergeProof:
    """The proof with how far the merged checkpoint is from what was trained, if that was quantised."""
    if QUANTISATION_KEY not in placement.provenance:
        return proof
    if not placement.is_as_trained:
        return replace(proof, quantised="the adapter was trained against a base in 4 bits")
    if proof.largest_logit_difference is None:
        return replace(proof, quantised=f"{TRAINED_IN_4_BITS}; how much that changes was not measured (memory)")
    merged = read_back(proof.folder, choose_dtype("auto", device), device)
    return replace(
        proof, quantised=compare_with_quantised(merged, placement.adapter, placement.source, placement.config)
    )


def _write_whole(
    folder: Path, destination: Path, dtype: torch.dtype, device: torch.device, *, scale: float, onto: str | None
) -> MergeProof:
    """The plain checkpoint of a model that was trained as a whole: only the form of its positions may change."""
    if scale != 1.0 or onto is not None:
        raise UsageError(
            "every weight was trained, so there is no adapter to make weaker or to add to another model",
            where="--scale" if scale != 1.0 else "--onto",
            got=str(folder),
        )
    source = ModelSource(str(folder), str(folder))
    model = load_trained(folder, source, load_config(source), dtype=dtype, device=device)
    # "portable": false is about the folder that is read; what is written has the form that every reader computes right.
    provenance = {key: value for key, value in read_provenance(folder).items() if key != "portable"}
    _, proof = write_merged(destination, model, load_tokenizer(source), provenance)
    return replace(proof, way="every weight was trained; written from memory")


def merge_streamed(
    adapter: Path | Placement,
    base_folder: Path,
    destination: Path,
    *,
    link: bool = True,
    proof: Literal["auto", "logits", "samples"] = "auto",
) -> MergeProof:
    """Merge file by file, holding a block of rows at a time.

    Args:
        adapter: folder written by ctxext, or what `place_adapter` made of it.
        base_folder: the base's safetensors (for a hub model: its snapshot).
        destination: new folder.
        link: hard-link weight files that the adapter does not touch; see `ctxext.export.stream` for what that means.
        proof: tensors are always compared by `samples`; `logits` needs memory for the model in float32; `auto` compares
            them when it fits.

    Raises:
        NotStreamableError: it takes a merge in memory.
        ArtefactError: adapter or base is damaged, they do not fit together, or the destination exists.
        ResourceError: not enough disk.
    """
    refuse_existing(destination)
    placement = place_adapter(adapter) if isinstance(adapter, Path) else adapter
    _require_weights_of(placement, base_folder)
    plan = _plan(placement, base_folder)
    tokenizer = load_tokenizer(placement.source)
    with directory_atomic(destination) as partial:
        edits = {name: _edit(target) for name, target in plan.targets.items()}
        report = stream_weights(base_folder, partial, edits, link=link)
        _write_config(partial, plan, base_folder)
        _write_companions(partial, tokenizer, placement.provenance)
        shown = prove_by_samples(partial, plan.weights, plan.targets, plan.config, destination)
        device = device_for_logits(plan.weights.num_parameters, choose_device())
        if proof == "logits" or (proof == "auto" and device is not None):
            found = _prove_by_logits(partial, placement, plan, tokenizer, device or torch.device("cpu"), destination)
            shown = replace(shown, largest_logit_difference=found.largest, choices=found.choices)
        write_manifest(partial, kind="merged")
    return replace(shown, way=f"merged file by file; {report.summary()}", warnings=placement.warnings)


def merged_in_memory(trained: Any) -> Any:
    """A model from `load_trained` as a plain one: an adapter merged into it, and spent by that."""
    merged = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    return merged.eval()


def write_merged(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, provenance: dict[str, Any]
) -> tuple[PreTrainedModel, MergeProof]:
    """Merge in memory, write atomically, read back and compare; returns the model that was read back.

    The adapter is merged into `model`'s own weights: it is spent afterwards.

    Raises:
        ArtefactError: the folder exists, or the checkpoint read back gives other logits or positions.
        ResourceError: not enough disk.
    """
    model.eval()
    base = causal_lm(model)
    target_length = int(provenance["target_length"])
    dtype, device = base.dtype, base.device
    require_free_space(
        folder, int(sum(p.numel() * p.element_size() for p in base.parameters()) * 1.05), "the merged checkpoint"
    )
    ids = probe_ids(tokenizer)
    expected = probe(model, ids, target_length)
    merged = merged_in_memory(model)
    same_weights = probe(merged, ids, target_length, like=expected)
    config = _take_exported_form(merged)
    with tensor_write_errors(folder), directory_atomic(folder) as partial:
        with quiet():
            merged.save_pretrained(partial)
        write_both_forms(partial)
        _write_companions(partial, tokenizer, provenance)
        del merged
        reloaded = read_back(partial, dtype, device)
        actual = probe(reloaded, ids, target_length, like=expected)
        check_logits(actual, same_weights, SAME_WEIGHTS[dtype], folder)
        found = check_logits(actual, expected, COMPUTED[dtype], folder)
        verification = verify_positions(reloaded, config)
        write_manifest(partial, kind="merged")
    return reloaded, MergeProof(folder, found.largest, verification, found.choices)


def _take_exported_form(merged: Any) -> PreTrainedConfig:
    """Give a merged model the form that every reader computes right; returns the config that is written.

    An attention factor that readers would misread goes into the weights. The model itself is spent: its rotary modules
    still have the former one.
    """
    written: PreTrainedConfig
    written, factors = exported_form(merged.config)
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for name, edit in fold_edits(merged.config, parameters, factors).items():
            parameters[name].copy_(edit(parameters[name].float()))
    merged.config = written
    return written


def refuse_existing(destination: Path) -> None:
    """Raise an ArtefactError when something is there."""
    if destination.exists():
        raise ArtefactError("the destination exists already", where=str(destination), hint="Choose another folder.")


def _write_companions(folder: Path, tokenizer: Any, provenance: dict[str, Any]) -> None:
    """What lies beside config and weights: the tokenizer with its new limit, and what the model was made from."""
    tokenizer.model_max_length = int(provenance["target_length"])
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
        raise ResourceError(f"could not write the tokenizer ({error})", where=str(folder)) from error
    write_json_atomic(folder / PROVENANCE_NAME, provenance)


def _write_config(folder: Path, plan: _StreamPlan, base_folder: Path) -> None:
    """Config and generation config, as `save_pretrained` of the merged model would write them."""
    plan.config.architectures = [type(plan.skeleton).__name__]
    if plan.weights.main_dtype is not None:
        plan.config.dtype = plan.weights.main_dtype
    plan.config.save_pretrained(folder)
    write_both_forms(folder)
    generation = base_folder / _GENERATION_NAME
    if generation.is_file():
        (folder / _GENERATION_NAME).write_bytes(generation.read_bytes())
    elif plan.skeleton.can_generate() and plan.skeleton.generation_config is not None:
        plan.skeleton.generation_config.save_pretrained(folder)


def safetensors_folder(source: ModelSource) -> Path:
    """Where the source's safetensors lie; a hub model's are fetched into the hub's cache.

    Raises:
        NotStreamableError: its weights are of another kind.
        ArtefactError: they cannot be fetched.
    """
    if source.gguf_file:
        raise NotStreamableError("the base is a GGUF file", where=source.name)
    folder = Path(source.location)
    is_local = folder.is_dir()
    if not is_local:
        folder = _snapshot(source, ["config.json", _GENERATION_NAME, SINGLE_NAME, INDEX_NAME])
    if (folder / SINGLE_NAME).is_file():
        return folder
    if not (folder / INDEX_NAME).is_file():
        raise NotStreamableError(
            "the base is not stored as safetensors",
            where=source.name,
            expected=f"{SINGLE_NAME} or {INDEX_NAME}",
            hint="Convert it: load it once with transformers and save_pretrained.",
        )
    # By name: some repositories hold the same weights once more under other names.
    return folder if is_local else _snapshot(source, sorted(set(read_index(folder / INDEX_NAME).values())))


safetensors_folder = safetensors_folder  # until ctxext.export.patch imports the public name


def _snapshot(source: ModelSource, names: list[str]) -> Path:
    try:
        with quiet():
            return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=names))
    except Exception as error:  # httpx, OSError, the hub's own errors ... for one thing: not reachable
        raise ArtefactError(
            f"could not fetch the model's weights ({type(error).__name__})",
            where=source.name,
            hint="Check the connection to the hub.",
        ) from error


def _require_dtype(weights: StoredWeights, asked: torch.dtype) -> None:
    stored = {FLOAT_TYPES.get(info.dtype) for info in weights.tensors.values()}
    if stored != {asked}:
        raise NotStreamableError(f"the base is stored in another dtype than {asked}", where=str(weights.folder))


def _require_weights_of(placement: Placement, base_folder: Path) -> None:
    """Raise an ArtefactError when `base_folder` holds other weights than those the adapter is to be added to."""
    location, expected = Path(placement.source.location), placement.provenance["base"].get("fingerprint")
    if location.is_dir() and location.resolve() != base_folder.resolve() and expected is not None:
        source = ModelSource(placement.source.name, str(base_folder))
        actual = weights_fingerprint(source, load_config(source))
        if actual != expected:
            raise ArtefactError(
                "the base model's weights are not the ones that were trained on",
                where=str(base_folder),
                got=actual,
                expected=f"weights with the fingerprint {expected}",
            )


def _plan(placement: Placement, base_folder: Path) -> _StreamPlan:
    """Match the adapter with the checkpoint's tensors; nothing is loaded but headers.

    Raises:
        NotStreamableError: the merge must be done in memory.
        ArtefactError: adapter and base do not fit together.
    """
    adapter, config = placement.adapter, placement.config
    lora = plain_lora_config(adapter)
    if lora.init_lora_weights not in _PLAIN_STARTS:
        raise NotStreamableError(f"the adapter changes its base at the start ({lora.init_lora_weights})")
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamableError("the base is quantised")
    if exported_form(config)[1]:
        raise NotStreamableError("its attention factor has to be folded into query and key")
    weights = checkpoint_tensors(base_folder)
    try:
        skeleton = meta_model(config)
    except Exception as error:  # whatever a model class raises; loading it for real says what is wrong
        raise NotStreamableError(f"the model cannot be built without weights ({type(error).__name__})") from error
    parameters = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    renamed = _renamed_on_loading(skeleton, weights)
    tied = {name for pair in skeleton.all_tied_weights_keys.items() for name in pair}
    file = adapter / ADAPTER_WEIGHTS
    places = read_header(file)
    whole = whole_names(places, skeleton, adapter)
    with quiet():
        wrapped = get_peft_model(skeleton, lora, low_cpu_mem_usage=True)
    assert isinstance(wrapped, PeftModel)
    stand_ins = {key: torch.empty(info.shape, device="meta") for key, info in places.items() if key not in whole}
    set_trained_tensors(wrapped, stand_ins, str(adapter))
    targets: dict[str, MergeTarget] = {}
    for key, parameter in whole.items():
        for name in _stored_names(parameter, skeleton, weights):
            if name in renamed:
                raise NotStreamableError(f"transformers loads {name} from tensors of other names or forms")
            _require_shape(weights, name, places[key].shape)
            targets[name] = WholeTarget(file, places[key])
    for layer, scaling in _plain_layers(wrapped).items():
        name = f"{layer.removeprefix(PEFT_PREFIX)}.weight"
        if name not in weights.tensors or name in renamed:
            raise NotStreamableError(f"transformers loads {name} from tensors of other names or forms")
        if name in tied:
            raise NotStreamableError(f"{name} is shared with another layer")
        _require_shape(weights, name, parameters[name])
        a, b = places[f"{layer}.lora_A.weight"], places[f"{layer}.lora_B.weight"]
        targets[name] = LoraTarget(file, a, b, scaling * placement.scale)
    return _StreamPlan(weights, config, skeleton, targets)


def _stored_names(name: str, skeleton: PreTrainedModel, weights: StoredWeights) -> list[str]:
    """Under which names the checkpoint holds a parameter: a tied one under either, or both.

    Raises:
        NotStreamableError: under none.
    """
    tied = {name} | {part for pair in skeleton.all_tied_weights_keys.items() if name in pair for part in pair}
    stored = sorted(tied & weights.tensors.keys())
    if not stored:
        raise NotStreamableError(f"transformers loads {name} from tensors of other names or forms")
    return stored


def _renamed_on_loading(skeleton: PreTrainedModel, weights: StoredWeights) -> set[str]:
    """Stored tensors that transformers 5 renames, splits, fuses or transposes on the way into the model."""
    try:  # no public interface, so another release may have it elsewhere
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError as error:
        raise NotStreamableError("this transformers does not tell which weights it renames on loading") from error
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters: Any = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    renamed = set()
    for name in weights.tensors:
        new_name, converter = rename_source_key(name, renamings, converters)
        if new_name != name or converter is not None:
            renamed |= {name, new_name}
    return renamed


def _plain_layers(model: PeftModel) -> dict[str, float]:
    """Scaling of every adapted layer by peft's name; they are all plain LoRA on linear layers.

    Raises:
        NotStreamableError: something else is trained as well.
    """
    scalings: dict[str, float] = {}
    adapter: str = model.active_adapter
    for name, layer in model.named_modules():
        if (
            type(layer) is LoraLinear
            and type(layer.base_layer) is torch.nn.Linear
            and not layer.lora_variant
            and not layer.fan_in_fan_out
        ):
            scalings[name] = float(layer.scaling[adapter])
    covered = {f"{name}.lora_{part}.weight" for name in scalings for part in "AB"}
    others = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - covered)
    if others:
        raise NotStreamableError(f"the adapter is more than plain LoRA on linear layers ({others[0]})")
    return scalings


def _require_shape(weights: StoredWeights, name: str, shape: tuple[int, ...]) -> None:
    info: TensorInfo = weights.tensors[name]
    if info.shape != shape:
        raise ArtefactError(
            "a weight of the base has another shape than the adapter's config asks for",
            where=f"{weights.folder}: {name}",
            got=str(info.shape),
            expected=str(shape),
        )
    if info.dtype not in FLOAT_TYPES:
        raise NotStreamableError(f"the base is stored in {info.dtype}", where=str(weights.folder))


def _edit(target: MergeTarget) -> RowwiseEdit:
    """W + scaling * (B @ A) for some rows, or the trained rows; they are read when they are needed."""
    if isinstance(target, WholeTarget):
        return RowwiseEdit(lambda rows, first: read_tensor(target.file, target.trained, first, len(rows)).float())

    def add(rows: Tensor, first: int) -> Tensor:
        a = read_tensor(target.file, target.a).float()
        b = read_tensor(target.file, target.b, first, rows.shape[0]).float()
        return rows.add_((b @ a).mul_(target.scaling))

    return RowwiseEdit(add)


def _prove_by_logits(
    folder: Path,
    placement: Placement,
    plan: _StreamPlan,
    tokenizer: Any,
    device: torch.device,
    destination: Path,
) -> LogitDifference:
    """Base + adapter first, then the merged checkpoint, both computed in float32; never both in memory.

    In half precision the computation alone would differ by more than a lost RoPE scaling does.
    """
    ids, target_length = probe_ids(tokenizer), int(text_config(plan.config).max_position_embeddings)
    tolerance = max(ROUNDED_WEIGHTS[FLOAT_TYPES[plan.weights.tensors[name].dtype]] for name in plan.targets)
    model = load_model(placement.source, plan.config, dtype=torch.float32, device=device)
    verify_positions(model, plan.config)
    expected = probe(placement.apply(model).eval(), ids, target_length)
    del model
    reloaded = read_back(folder, torch.float32, device)
    verify_positions(reloaded, plan.config)
    return check_logits(probe(reloaded, ids, target_length, like=expected), expected, tolerance, destination)
