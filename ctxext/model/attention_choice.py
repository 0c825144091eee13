"""Which implementation computes attention in training: from device, number format, heads, masks and family.

What `train.attention: auto` becomes, the first row that fits:

| layers of the model                              | CUDA                          | ROCm           | MPS, CPU       |
|--------------------------------------------------|-------------------------------|----------------|----------------|
| in both directions                               | refused                       | refused        | refused        |
| scores soft-capped (Gemma 2)                     | flash_attention_3, _2 or flex | flex_attention | slow (eager)   |
| attention sinks (gpt-oss), no `sdpa` in the class | flex_attention               | flex_attention | slow (eager)   |
| chunks shorter than the training window (Llama 4) | flex_attention               | flex_attention | slow (sdpa)    |
| documents isolated, layers not full or sliding   | refused                       | refused        | refused        |
| documents isolated, or sliding windows shorter than the training window | ctxext_documents, on every device    |||
| keys and values of different widths (DeepSeek)   | sdpa                          | sdpa           | ctxext_documents |
| plainly causal                                   | sdpa                          | sdpa           | sdpa           |

`sdpa` without a mask is right wherever it can be had: PyTorch picks cuDNN's or its own flash kernel on CUDA (on Hopper
1.7-2.3 times faster than flash-attn 2), AOTriton's on ROCm, its own on MPS and on CPUs. `ctxext_documents` is
`ctxext.model.documents`. flash-attn is chosen where it is installed, the numbers have half precision and a head has at
most 256 dimensions; flex_attention where Triton can compile it, for it has no backward pass on CPUs.

*Slow* is what holds a matrix of all queries by all keys, as scores or as a mask. It is refused unless
`train.allow_slow`; so is anything asked for that would do the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from ctxext.errors import ResourceError, UnsupportedModelError, UsageError
from ctxext.files import format_bytes
from ctxext.model.documents import DOCUMENTS
from ctxext.model.load import choose_device, choose_dtype, model_class
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import text_config

DeviceKind = Literal["cuda", "rocm", "mps", "cpu", "other"]

_WHERE = "train.attention"
_HALF = (torch.float16, torch.bfloat16)
_FLASH_HEAD_DIM = 256
_FLASH = ("flash_attention_3", "flash_attention_2", "flash_attention_4")
_SOFT_CAPPING_FLASH = ("flash_attention_3", "flash_attention_2")
_FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
_ORDER = ("sdpa", DOCUMENTS, *_FLASH, "flex_attention")
# Of a CUDA device's compute capability, the least that the package's kernels run on.
_LEAST_CAPABILITY = {"flash_attention_2": 8, "flash_attention_3": 8, "flash_attention_4": 9}
_ISOLABLE = {"full_attention", "sliding_attention"}
_MASKED = {"sliding_attention", "chunked_attention"}  # kinds of layers that `sdpa` needs a mask for


@dataclass(frozen=True)
class AttentionChoice:
    """What computes attention, and why.

    Attributes:
        implementation: its name in transformers' `attn_implementation`.
        why: in words.
        slow: what it holds of all queries by all keys; None where a fused kernel without a mask is expected.
        alternatives: other implementations that would compute the same here without a slow path.
    """

    implementation: str
    why: str
    slow: str | None = None
    alternatives: tuple[str, ...] = ()

    def describe(self) -> str:
        """For the plan: 'sdpa (plainly causal: ...)'."""
        slow = f"; slow: {self.slow}" if self.slow else ""
        return f"{self.implementation} ({self.why}{slow})"


@dataclass(frozen=True)
class AttentionHost:
    """Where attention runs.

    Attributes:
        kind: of the device.
        packages: `flash_attention_N` and `flex_attention`, as far as they can run; None where it is another machine.
        capability: major version of a CUDA device; None where it is not known.
    """

    kind: DeviceKind
    packages: Set[str] | None = frozenset()
    capability: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> AttentionHost:
        """This machine's."""
        if device.type != "cuda":
            return cls("cpu" if device.type == "cpu" else "mps" if device.type == "mps" else "other")
        packages = {name for name in _FLASH if _flash_installed(name)}
        if importlib.util.find_spec("triton") is not None:
            packages.add("flex_attention")
        if torch.version.hip is not None:
            return cls("rocm", frozenset(packages))
        return cls("cuda", frozenset(packages), torch.cuda.get_device_capability(device)[0])


# Another machine with a CUDA device, of which nothing else is known.
ELSEWHERE = AttentionHost("cuda", None)


def planned_attention(recipe: Recipe, config: PreTrainedConfig) -> AttentionChoice:
    """What a recipe's attention becomes on the machine that it is planned for: this one, or one with a CUDA device.

    Args:
        config: of the extended model.

    Raises:
        CtxextError: see `choose_attention`.
    """
    if recipe.train.memory.device_gib is not None:
        dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
        return attention_of(recipe, config, ELSEWHERE, dtype)
    device = choose_device()
    return attention_of(recipe, config, AttentionHost.of(device), choose_dtype(recipe.model.dtype, device))


def attention_of(recipe: Recipe, config: PreTrainedConfig, host: AttentionHost, dtype: torch.dtype) -> AttentionChoice:
    """What a recipe's attention becomes.

    Args:
        config: of the extended model.
        dtype: that attention computes in.

    Raises:
        CtxextError: see `choose_attention`.
    """
    return choose_attention(
        config,
        host,
        dtype,
        recipe.train.attention,
        window_tokens=recipe.data.windows.length or recipe.target_length,
        isolated=recipe.data.windows.positions == "per-document",
        allow_slow=recipe.train.allow_slow,
    )


def choose_attention(
    config: PreTrainedConfig,
    host: AttentionHost,
    dtype: torch.dtype,
    asked: str = "auto",
    *,
    window_tokens: int,
    isolated: bool = False,
    allow_slow: bool = False,
) -> AttentionChoice:
    """Choose by the table above, or judge what was asked for; nothing is loaded.

    Args:
        isolated: the documents of a window do not see each other.

    Raises:
        UnsupportedModelError: nothing trains this model right.
        UsageError: what was asked for cannot compute this model's attention, or not here.
        ResourceError: it can, with a matrix of all queries by all keys, and `allow_slow` is off.
    """
    model = _Attention(config, window_tokens, isolated)
    model.refuse_untrainable()
    why_not = {name: _why_not(name, model, host, dtype) for name in _ORDER}
    # Without anything to isolate or to slide, DOCUMENTS is sdpa.
    same = {DOCUMENTS} if why_not["sdpa"] is None else set()
    possible = [name for name in _ORDER if why_not[name] is None and name not in same]
    if asked == "auto":
        # Of another machine only what comes with PyTorch is known to be there.
        known = [name for name in possible if host.packages is not None or name not in _FLASH]
        if known:
            return AttentionChoice(known[0], model.reason(known[0]), None, tuple(known[1:]))
        return _slow(model, host, allow_slow)
    others = tuple(name for name in possible if name != asked)
    if why_not[asked] is None:
        return AttentionChoice(asked, "as asked", None, others)
    if asked == "sdpa" and model.lacks_in_sdpa is None:
        if not allow_slow:
            raise _too_slow("sdpa", str(why_not["sdpa"]), others)
        return AttentionChoice("sdpa", "as asked", why_not["sdpa"], others)
    raise UsageError(
        str(why_not[asked]),
        where=_WHERE,
        got=asked,
        expected=f"auto or {', '.join(others)}" if others else "auto",
    )


class _Attention:
    """What a model asks of attention, as far as its config and its class tell."""

    def __init__(self, config: PreTrainedConfig, window_tokens: int, isolated: bool) -> None:
        text = text_config(config)
        self.tokens, self.isolated = window_tokens, isolated
        self.model_type = str(getattr(text, "model_type", "model"))
        self.num_heads = int(text.num_attention_heads)
        self.window = getattr(text, "sliding_window", None)
        self.layers = _layer_types(text, window_tokens)
        self.soft_cap = getattr(text, "attn_logit_softcapping", None)
        self.dropout = float(getattr(text, "attention_dropout", None) or 0.0)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // self.num_heads
        # Multi-head latent attention has keys and values of different widths.
        self.key_dim = int(getattr(text, "qk_head_dim", None) or head_dim)
        self.value_dim = int(getattr(text, "v_head_dim", None) or head_dim)
        self.head_dim = max(self.key_dim, self.value_dim)
        self.bidirectional = bool(getattr(text, "use_bidirectional_attention", False)) or not getattr(
            text, "is_causal", True
        )
        self.model_class: Any = model_class(config)

    def refuse_untrainable(self) -> None:
        """Refuse what no attention would train right."""
        if self.bidirectional:
            raise UnsupportedModelError(
                "the model attends in both directions, so it cannot be trained to predict the next token",
                where=self.model_type,
            )
        if self.isolated and not self.layers <= _ISOLABLE:
            raise UsageError(
                "these layers carry something from one document to the next, whatever attention does",
                where="data.windows.positions",
                got=", ".join(sorted(self.layers - _ISOLABLE)),
                expected="consecutive positions for this model",
            )

    @property
    def lacks_in_sdpa(self) -> str | None:
        """What PyTorch's attention cannot compute of this model, mask or not."""
        if self.soft_cap is not None:
            return f"{self.model_type} caps its attention scores at {self.soft_cap:g}, which sdpa leaves out"
        if not self.model_class._supports_sdpa:
            return f"transformers' {self.model_class.__name__} does not run on sdpa (attention sinks, mostly)"
        return None

    @property
    def lacks_in_documents(self) -> str | None:
        """What `ctxext_documents` cannot compute of this model."""
        if not self.layers <= _ISOLABLE:
            return f"layers of the kind {', '.join(sorted(self.layers - _ISOLABLE))}"
        if not getattr(self.model_class, "_supports_attention_backend", False):
            return f"transformers' {self.model_class.__name__} takes no registered attention function"
        return None

    def slow_in_sdpa(self, host: AttentionHost) -> str | None:
        """What PyTorch's attention would hold of all queries by all keys."""
        if self.isolated or self.layers & _MASKED:
            size = format_bytes(self.tokens**2)
            return f"a mask of {self.tokens:,} x {self.tokens:,} tokens, {size}"
        if self.key_dim != self.value_dim and host.kind not in ("cuda", "rocm"):
            widths = f"keys of {self.key_dim} and values of {self.value_dim} dimensions"
            return f"no fused kernel on {host.kind.upper()} takes {widths}; {self.scores_cost()}"
        return self.dropout_in_sdpa(host)

    def dropout_in_sdpa(self, host: AttentionHost) -> str | None:
        """What the model's dropout costs where PyTorch's fused kernels have none."""
        if self.dropout and host.kind not in ("cuda", "rocm"):
            return f"no fused kernel on {host.kind.upper()} has the model's attention_dropout; {self.scores_cost()}"
        return None

    def reason(self, implementation: str) -> str:
        """Why `auto` chose this."""
        if implementation == "sdpa":
            return "plainly causal: PyTorch's fused kernels, no mask"
        if implementation == DOCUMENTS:
            sliding = f"sliding windows of {self.window:,} tokens" if self.layers & _MASKED else ""
            documents = "isolated documents by cumulative lengths" if self.isolated else ""
            padded = f"heads of {self.key_dim} and {self.value_dim} dimensions padded to one width"
            parts = [sliding, documents, padded if self.key_dim != self.value_dim else ""]
            return ", ".join(part for part in parts if part) + "; no mask"
        lacking = self.lacks_in_sdpa or self.lacks_in_documents
        return f"{lacking}"

    def scores_cost(self) -> str:
        """What eager attention would hold of one layer."""
        size = format_bytes(4 * self.num_heads * self.tokens**2)
        return f"all scores of {self.num_heads} heads x {self.tokens:,} x {self.tokens:,} tokens, {size} a layer"


def _layer_types(text: Any, window_tokens: int) -> set[str]:
    """Kinds of the layers; those that see the whole training window count as full."""
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    for kind, reach in (("sliding_attention", window), ("chunked_attention", chunk)):
        if kind in kinds and (reach is None or window_tokens < reach):
            kinds = kinds - {kind} | {"full_attention"}
    return kinds


def _why_not(name: str, model: _Attention, host: AttentionHost, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot compute this model here without a slow path; None when it can."""
    if name == "sdpa":
        return model.lacks_in_sdpa or model.slow_in_sdpa(host)
    if name == DOCUMENTS:
        return model.lacks_in_sdpa or model.lacks_in_documents or model.dropout_in_sdpa(host)
    if name == "flex_attention":
        return _why_not_flex(model, host)
    return _why_not_flash(name, model, host, dtype)


def _why_not_flex(model: _Attention, host: AttentionHost) -> str | None:
    if host.kind not in ("cuda", "rocm"):
        return f"flex_attention has no backward pass on {host.kind.upper()}"
    if not model.model_class._supports_flex_attn:
        return f"transformers' {model.model_class.__name__} does not run on flex_attention"
    if model.dropout:
        return f"flex_attention has no dropout, and the model's attention_dropout is {model.dropout:g}"
    if host.packages is not None and "flex_attention" not in host.packages:
        return "flex_attention is compiled with Triton, which is not installed"
    return None


def _why_not_flash(name: str, model: _Attention, host: AttentionHost, dtype: torch.dtype) -> str | None:
    devices = ("cuda", "rocm") if name == "flash_attention_2" else ("cuda",)
    if host.kind not in devices:
        return f"{name} has no kernels for {host.kind.upper()}"
    if not model.model_class._supports_flash_attn:
        return f"transformers' {model.model_class.__name__} does not run on flash-attn"
    listed = getattr(model.model_class, "_compatible_flash_implementations", None)
    if listed is not None and name not in listed:
        return f"transformers' {model.model_class.__name__} does not run on {name}, only on {', '.join(listed)}"
    if dtype not in _HALF:
        return f"{name} computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')} (model.dtype)"
    if model.head_dim > _FLASH_HEAD_DIM:
        return f"{name} takes heads of at most {_FLASH_HEAD_DIM} dimensions, not {model.head_dim}"
    if model.soft_cap is not None and name not in _SOFT_CAPPING_FLASH:
        return f"{name} has no backward pass with soft-capped scores"
    if model.soft_cap is None and not model.model_class._supports_sdpa:
        return f"{name} would leave out what {model.model_type} adds to its scores"
    if model.dropout and name != "flash_attention_2":
        return f"{name} has no dropout, and the model's attention_dropout is {model.dropout:g}"
    if host.packages is None:
        return None
    least = _LEAST_CAPABILITY[name]
    if host.kind == "cuda" and host.capability is not None and host.capability < least:
        return f"{name} needs compute capability {least}, and this device has {host.capability}"
    if name not in host.packages:
        return f"{name} is not installed (the package {_FLASH_PACKAGES[name]}; extra [flash] for flash_attention_2)"
    return None


def _slow(model: _Attention, host: AttentionHost, allow_slow: bool) -> AttentionChoice:
    """What is left: with a mask of all queries by all keys, or with all scores."""
    if model.lacks_in_sdpa is None:
        name, why, cost = (
            "sdpa",
            model.lacks_in_documents or f"attention_dropout {model.dropout:g}",
            str(model.slow_in_sdpa(host)),
        )
    else:
        name, why, cost = "eager", model.lacks_in_sdpa, model.scores_cost()
    if not allow_slow:
        raise _too_slow(name, f"{why}; {cost}", (), host)
    return AttentionChoice(name, why, cost)


def _too_slow(name: str, cost: str, others: Sequence[str], host: AttentionHost | None = None) -> ResourceError:
    elsewhere = " or train on a CUDA device, where flex_attention computes it" if host is not None else ""
    return ResourceError(
        f"attention would take a slow path: {cost}",
        where=_WHERE,
        got=name,
        expected=f"auto or {', '.join(others)}" if others else None,
        hint=f"Use shorter windows{elsewhere}; train.allow_slow=true trains all the same."
        if not others
        else "train.allow_slow=true trains all the same.",
    )


def _flash_installed(name: str) -> bool:
    check = FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(name[-1])]["pkg_availability_check"]
    return bool(check())
