"""What an adapter is added to, and how strongly: to its own base or to a sibling of it, times a factor.

A sibling is the same architecture with other weights, such as the instruction-tuned model that was made from the base.
What training changed is a difference of weights, and such differences of models with a common ancestor can be added
(Ilharco et al. 2022, arXiv:2212.04089; Huang et al. 2023, arXiv:2310.04799, for chat models). That it can be done says
nothing about how good the result is, so every such merge says that nothing was measured on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig, PreTrainedModel

from ctxext.errors import ArtefactError, UsageError
from ctxext.export.proof import meta_model
from ctxext.export.stored import read_header
from ctxext.model.load import ModelSource, load_config, load_tokenizer, resolve_source, weights_fingerprint
from ctxext.model.trained import ADAPTER_WEIGHTS, PEFT_PREFIX
from ctxext.rope.base import BaseRope
from ctxext.rope.families import base_ropes, text_config
from ctxext.rope.methods import create_method
from ctxext.rope.patchers import apply_method
from ctxext.train.adapter import (
    PROVENANCE_NAME,
    adapter_config,
    base_of,
    load_adapter,
    read_provenance,
)

# Beside what training wrote into ctxext.json: a factor other than 1, and the base where it is not the adapter's.
SCALE_KEY, TRAINED_ON_KEY = "adapter_scale", "adapter_trained_on"

# What decides how a layer computes without showing in the shapes of its weights.
_STRUCTURE = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "hidden_act",
)


@dataclass(frozen=True)
class Placement:
    """An adapter and the weights that it is added to.

    Attributes:
        adapter: folder written by ctxext.
        source: whose weights.
        config: the extended one of these weights.
        provenance: of what is merged.
        scale: what the adapter's change is multiplied by.
        warnings: what a user must know, one line each.
    """

    adapter: Path
    source: ModelSource
    config: PreTrainedConfig
    provenance: dict[str, Any]
    scale: float = 1.0
    warnings: tuple[str, ...] = ()

    @property
    def is_as_trained(self) -> bool:
        """Whether the adapter goes, at full strength, onto the base that it was trained on."""
        return self.scale == 1.0 and TRAINED_ON_KEY not in self.provenance

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """Put the adapter onto the weights, loaded with `config`."""
        wrapped = load_adapter(self.adapter, model)
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(self.scale)
        return wrapped


def place_adapter(adapter: Path, *, scale: float = 1.0, onto: str | None = None) -> Placement:
    """Find and check what an adapter is added to; no weights are loaded.

    Args:
        adapter: folder written by ctxext.
        scale: factor on what training changed; 0.5 is half of it.
        onto: another model than the adapter's base.

    Raises:
        ArtefactError: the folder is no adapter, its base is gone or changed, or `onto` is no sibling of the base.
        UsageError: a factor that is not positive, or one for an adapter whose change is no sum.
    """
    provenance = read_provenance(adapter)
    config = adapter_config(adapter)
    source = base_of(provenance)
    _check_scale(adapter, scale, onto)
    warnings: list[str] = []
    if scale != 1.0:
        provenance = {**provenance, SCALE_KEY: scale}
        warnings.append(
            f"the adapter was merged {scale:g} times as strong as it was trained; nothing was measured on it"
        )
    if onto is not None:
        sibling = resolve_source(onto)
        own = _sibling_config(adapter, provenance, source, sibling)
        warnings += _sibling_warnings(source, sibling)
        fingerprint = weights_fingerprint(sibling, load_config(sibling))
        base = {"source": sibling.name, "revision": sibling.revision, "fingerprint": fingerprint}
        provenance = {**provenance, "base": base, TRAINED_ON_KEY: provenance["base"]}
        source, config = sibling, own
    return Placement(adapter, source, config, provenance, scale, tuple(warnings))


def _check_scale(adapter: Path, scale: float, onto: str | None) -> None:
    if not 0 < scale < float("inf"):
        raise UsageError("the factor must be a positive number", where="--scale", got=scale, expected="0.5, 1, 1.5 ...")
    option = "--scale" if scale != 1.0 else "--onto"
    if scale == 1.0 and onto is None:
        return
    config = LoraConfig.from_pretrained(str(adapter))
    if config.modules_to_save:
        raise UsageError(
            "the adapter holds embeddings and norms that were trained whole and take the place of the base's; they are "
            "no sum that could be made weaker or added to other weights",
            where=option,
            got=str(adapter),
            hint="Merge it as it is, or train with lora.embeddings_and_norms=false.",
        )
    if config.use_dora:
        raise UsageError(
            "a weight-decomposed adapter (DoRA) replaces the length of every weight's rows; it is no sum that could be "
            "made weaker or added to other weights",
            where=option,
            got=str(adapter),
            hint="Merge it as it is, or train with lora.weight_decomposed=false.",
        )


def _sibling_config(
    adapter: Path, provenance: Mapping[str, Any], base: ModelSource, sibling: ModelSource
) -> PreTrainedConfig:
    """The sibling's own config with the adapter's RoPE rewrite.

    Raises:
        ArtefactError: it is no sibling; everything that differs is listed.
    """
    if (Path(base.location) / PROVENANCE_NAME).is_file():
        raise ArtefactError(
            "the adapter's base was trained by ctxext itself, so the adapter holds only the last part of the training",
            where=str(adapter),
            got=base.name,
            hint="Merge it into its own base.",
        )
    on_existing = provenance.get("on_existing", "refuse")
    ours, theirs = load_config(base), load_config(sibling)
    differences = list(_differences(adapter, ours, theirs, on_existing))
    if differences:
        width = max(len(name) for name, _, _ in differences)
        table = "".join(
            f"\n  {name:<{width}}  base {mine}, {sibling.name} {other}" for name, mine, other in differences
        )
        raise ArtefactError(
            f"the model is no sibling of the adapter's base; what differs:{table}\n",
            where="--onto",
            hint=f"The adapter fits models that were made from {base.name} without changing these.",
        )
    parameters = {key: value for key, value in provenance["method"].items() if key != "method"}
    method = create_method(provenance["method"]["method"], **parameters)
    return apply_method(theirs, method, int(provenance["target_length"]), on_existing)


def _differences(adapter: Path, base: Any, sibling: Any, on_existing: Any) -> Iterator[tuple[str, str, str]]:
    """(what, the base's, the sibling's) for everything that forbids adding the adapter."""
    mine, theirs = text_config(base), text_config(sibling)
    if mine.model_type != theirs.model_type:
        yield "model_type", str(mine.model_type), str(theirs.model_type)
        return  # nothing else can be compared
    for name in _STRUCTURE:
        pair = getattr(mine, name, None), getattr(theirs, name, None)
        if pair[0] != pair[1]:
            yield name, str(pair[0]), str(pair[1])
    yield from _rope_differences(base_ropes(base, on_existing), base_ropes(sibling, on_existing))
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
        for config in (base, sibling)
    ]
    places = {name.removeprefix(PEFT_PREFIX).split(".lora_")[0] for name in read_header(adapter / ADAPTER_WEIGHTS)}
    for name, shape in shapes[0].items():
        if name in places or name.rpartition(".")[0] in places:
            other = shapes[1].get(name)
            if other != shape:
                yield name, str(list(shape)), "none" if other is None else str(list(other))


def _rope_differences(base: list[BaseRope], sibling: list[BaseRope]) -> Iterator[tuple[str, str, str]]:
    if [rope.layer_type for rope in base] != [rope.layer_type for rope in sibling]:
        mine, theirs = ([rope.layer_type for rope in ropes] for ropes in (base, sibling))
        yield "layers with RoPE", str(mine), str(theirs)
        return
    for one, other in zip(base, sibling, strict=True):
        for entry in fields(BaseRope):
            pair = getattr(one, entry.name), getattr(other, entry.name)
            if pair[0] != pair[1]:
                of = f" of {one.layer_type}" if one.layer_type else ""
                yield f"RoPE {entry.name}{of}", str(pair[0]), str(pair[1])


def _sibling_warnings(base: ModelSource, sibling: ModelSource) -> list[str]:
    warnings = [
        f"nothing was measured on this model: the adapter was trained on {base.name} and is added to {sibling.name}; "
        "evaluate it before you use it"
    ]
    ours, theirs = (load_tokenizer(source).get_vocab() for source in (base, sibling))
    if ours != theirs:
        differing = sum(theirs.get(token) != number for token, number in ours.items())
        warnings.append(
            f"its tokenizer is {sibling.name}'s own, in which {differing:,} of the base's {len(ours):,} tokens are "
            f"missing or have another number and {len(theirs.keys() - ours.keys()):,} are new"
        )
    return warnings
