"""What bitsandbytes does for training, an optional extra: a base in 4 bits, the optimizer's moments in 8.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314): the frozen linear layers lie in memory as 4-bit NormalFloat numbers in
blocks of 64 with one scale each, the scales themselves quantised, and every pass computes with them in the dtype that
the base would have had. Input and output embeddings, norms and routers stay as they are.

peft's `prepare_model_for_kbit_training` is not used: it makes float32 copies of embeddings and output embedding, which
at 128,000 words cost more than the 4-bit weights of eight layers save, and norms compute in float32 anyway.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ctxext.errors import ArtefactError, ResourceError, UnsupportedModelError, first_line
from ctxext.model.load import ModelSource, load_model, plain_attention, quiet
from ctxext.model.parts import parameter_kinds
from ctxext.recipe.schema import Recipe

# Key of an adapter's ctxext.json under which it says how the base was quantised that it was trained on.
QUANTISATION_KEY = "quantisation"
_TYPE, _DOUBLE = "nf4", True


def quantisation(dtype: torch.dtype) -> dict[str, Any]:
    """How `load_quantised` quantises, for artefacts; `dtype` is what is computed in."""
    return {"bits": 4, "type": _TYPE, "double": _DOUBLE, "compute": str(dtype).removeprefix("torch.")}


def check_bitsandbytes(recipe: Recipe, config: PreTrainedConfig, device_type: str) -> None:
    """Refuse, before any work, what bitsandbytes would have to do and cannot.

    Raises:
        ResourceError: it is not installed, or does not do this on the device.
        UnsupportedModelError: the base is quantised already.
    """
    for where, got, instead in _uses(recipe):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ResourceError(
                "this needs bitsandbytes, which is not installed",
                where=where,
                got=got,
                hint=f"Install the extra `qlora` (pip install 'ctxext[qlora]'), or use {instead}.",
            )
        if device_type == "mps":
            raise ResourceError(
                "bitsandbytes does not do this on Apple's GPUs",
                where=where,
                got=got,
                expected="CUDA, ROCm, XPU or CPU",
                hint=f"Use {instead}.",
            )
    stored = getattr(config, "quantization_config", None)
    if recipe.adaptation == "qlora" and stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", stored)
        raise UnsupportedModelError(
            "the base is quantised already, and an adapter of a quantised checkpoint has no weights to be merged into",
            where="model.source",
            got=str(getattr(method, "value", method)),
            hint="Take the model that it was made from; adaptation: qlora quantises it while it is loaded.",
        )


def _uses(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Recipe key, its value, and what does without."""
    if recipe.train.optimizer == "adamw-8bit":
        yield "train.optimizer", recipe.train.optimizer, "train.optimizer=adamw"
    if recipe.adaptation == "qlora":
        yield "adaptation", recipe.adaptation, "adaptation=lora"


def layers_in_4_bits(model: Any) -> list[str]:
    """Names of the layers of a model, as it was loaded or on the meta device, that lie in 4 bits in training.

    All linear layers but output embedding and routers. Experts that are stacked into one weight are no linear layers.
    """
    kinds = parameter_kinds(model)
    kept = ("output embedding", "tied embeddings", "routers", None)
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and kinds.get(f"{name}.weight") not in kept
    ]


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model is made of, each counted once however many of them share a byte."""
    linear = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(linear.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def quantisation_note(model: Any) -> str:
    """How much of a model lies in 4 bits, for its plan."""
    names = layers_in_4_bits(model)
    inside = sum(model.get_submodule(name).weight.numel() for name in names)
    total = sum(parameter.numel() for parameter in model.parameters())
    text = f"the base is held in 4 bits (nf4): {len(names)} linear layers with {inside / total:.0%} of its parameters"
    if inside < total / 2:
        text += "; the rest, stacked experts or embeddings, stays in the model's dtype, so that little memory is saved"
    return text


def load_quantised(
    source: ModelSource,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
) -> PreTrainedModel:
    """Build the model from `config` and the source's weights with its linear layers in 4 bits, in eval mode.

    Args:
        config: extended or not; rotary frequencies stay float32.
        dtype: that everything is computed in, and of what is not quantised.
        attention: transformers' name of it; `plain_attention` when left out.

    Raises:
        ArtefactError: weights missing, truncated, or not all used.
        ResourceError: bitsandbytes cannot be imported.
    """
    linear = _linear_4bit()
    settings = _settings(config, dtype)
    if source.gguf_file:
        # transformers reads GGUF files through the same place that would quantise: dequantised first, as for training
        # without quantisation, in host memory.
        plain = load_model(source, config, dtype=dtype, device=torch.device("cpu"), attention=attention)
        model = _quantised(plain, config, settings, dtype, device, attention)
    else:
        model = load_model(source, config, dtype=dtype, device=device, attention=attention, quantisation=settings)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, linear)]
    for layer in layers:
        # On CPUs with AVX-512 and bfloat16 an evaluation would repack the weights for a kernel that rounds to bfloat16
        # and has no gradient, for good.
        layer.support_avx512bf16_for_cpu = False
    # How the weights lie in memory is no property of the model that the adapter belongs to.
    del model.config.quantization_config
    return model


def quantise_empty(model: Any, dtype: torch.dtype) -> None:
    """Make of a model on the meta device what `load_quantised` makes of one with weights.

    Raises:
        ResourceError: bitsandbytes cannot be imported.
    """
    linear: Any = _linear_4bit()
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    form: dict[str, Any] = {"compress_statistics": _DOUBLE, "quant_type": _TYPE, "quant_storage": dtype}
    for name in layers_in_4_bits(model):
        plain: Any = model.get_submodule(name)
        with torch.device("meta"):
            layer = linear(plain.in_features, plain.out_features, plain.bias is not None, dtype, **form)
        # Scales that are not quantised themselves, which come later: bitsandbytes keeps the first table that it makes
        # for those, and must not make it here.
        packed, state = quantize_4bit(plain.weight.data, **{**form, "compress_statistics": False})
        layer.weight = Params4bit(packed, quant_state=state, module=layer, bnb_quantized=True, **form)
        layer.quant_state = state
        layer.support_avx512bf16_for_cpu = False
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # where peft looks for it


def is_in_4_bits(module: nn.Module) -> bool:
    """Whether it is a linear layer that `load_quantised` or `quantise_empty` made."""
    return hasattr(module, "quant_state") and isinstance(module, nn.Linear)


def block_scales(layer: Any) -> dict[str, Tensor]:
    """All that gives the bytes of a layer in 4 bits their meaning."""
    found: dict[str, Tensor] = layer.weight.quant_state.as_dict(packed=True)
    return found


def set_block_scales(layer: Any, scales: dict[str, Tensor]) -> None:
    """Give a layer what `block_scales` found in another.

    It is kept beside the weight, where bitsandbytes finds it whenever FSDP2 has put another parameter in its place.
    """
    from bitsandbytes.functional import QuantState

    layer.quant_state = QuantState.from_dict(dict(scales), device=scales["absmax"].device)


def _settings(config: PreTrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    with quiet(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    quantised = set(layers_in_4_bits(model))
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantised]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=_TYPE,
        bnb_4bit_use_double_quant=_DOUBLE,
        bnb_4bit_compute_dtype=dtype,
        # Bytes seen as numbers of the model's dtype, as FSDP2 needs them: it shards parameters of one dtype.
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=kept or None,
    )


def _quantised(
    plain: PreTrainedModel,
    config: PreTrainedConfig,
    settings: BitsAndBytesConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
) -> PreTrainedModel:
    """The same model once more, its linear layers in 4 bits on `device`."""
    try:
        with quiet():
            model: Any = type(plain).from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=plain.state_dict(),
                dtype=dtype,
                attn_implementation=attention or plain_attention(config),
                quantization_config=settings,
                device_map={"": device},
            )
    except (RuntimeError, ValueError) as error:
        raise ArtefactError(f"could not quantise the model's weights ({first_line(error)})") from error
    model.eval()
    ready: PreTrainedModel = model
    return ready


def _linear_4bit() -> type[nn.Module]:
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError as error:
        raise ResourceError(
            f"bitsandbytes cannot be imported ({error})",
            where="adaptation",
            got="qlora",
            hint="Install the extra `qlora` (pip install 'ctxext[qlora]').",
        ) from error
    found: type[nn.Module] = Linear4bit
    return found
