"""What the chosen attention gains over eager attention, and whether something better was left: measured, one layer.

Eager attention holds all scores of all heads: at the length that is trained it would not fit, so that both run at a
length that does. Their times and bytes grow with its square, and the ratio at the longer length is rather larger. The
outputs and gradients are compared on the way: a kernel that computes something else than eager attention is refused.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama

from ctxext.errors import CtxextError, ResourceError, first_line
from ctxext.files import format_bytes
from ctxext.model.attention_choice import AttentionChoice
from ctxext.model.documents import cumulative_arguments, documents_of
from ctxext.model.load import model_class
from ctxext.planning.allocator import peak_growth_bytes
from ctxext.rope.families import text_config

# A chosen setting may cost this share of the throughput of the best that could be had.
_TOLERATED_COST = 0.3
_BUDGET_BYTES = {"cpu": 1 << 27}
_DEVICE_BUDGET_BYTES = 1 << 32
_ROUND_TOKENS = 128
# Scores, their softmax in float32, its copy, and the gradients of each: bytes of a head and a pair of tokens.
_EAGER_BYTES = 20
_REPEATS = 2
# Of the largest element; half precision keeps 8 bits, and scores are rounded before they are summed.
_LARGEST_ERROR = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LayerCost:
    """Forward and backward pass of one layer's attention."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class AttentionGain:
    """One layer's attention, forward and backward, beside eager attention and what else could compute it.

    Attributes:
        implementation: that was chosen.
        length_tokens: that was measured.
        chosen, eager: their costs.
        others: seconds of the alternatives that ran.
        error: largest difference of output and gradients to eager's, relative to eager's largest element.
    """

    implementation: str
    length_tokens: int
    chosen: LayerCost
    eager: LayerCost
    others: dict[str, float]
    error: float

    @property
    def speedup(self) -> float:
        """How many times as fast as eager attention."""
        return self.eager.seconds / self.chosen.seconds

    @property
    def memory_ratio(self) -> float:
        """How many times as much memory eager attention takes."""
        return self.eager.peak_bytes / max(self.chosen.peak_bytes, 1)

    @property
    def cost(self) -> tuple[str, float]:
        """The fastest of all, and the share of its throughput that the choice costs."""
        name, seconds = min(
            {**self.others, "eager": self.eager.seconds, self.implementation: self.chosen.seconds}.items(),
            key=lambda item: item[1],
        )
        return name, 1 - seconds / self.chosen.seconds

    def describe(self) -> str:
        """In one line."""
        return (
            f"{self.implementation} at {self.length_tokens:,} tokens, one layer forward and backward: "
            f"{self.speedup:.1f} times as fast as eager attention in {format_bytes(self.chosen.peak_bytes)} "
            f"instead of {format_bytes(self.eager.peak_bytes)}"
        )

    def require_worthwhile(self, allow_slow: bool) -> None:
        """Refuse a choice that is slow, or wrong.

        Raises:
            ResourceError: it costs more than 30% of the throughput of the fastest, and `allow_slow` is off; or its
                results are not eager attention's.
        """
        name, cost = self.cost
        if cost > _TOLERATED_COST and not allow_slow:
            raise ResourceError(
                f"{self.implementation} costs {cost:.0%} of the attention speed that {name} reaches here",
                where="train.attention",
                got=f"{self.chosen.seconds * 1e3:.1f} ms a layer at {self.length_tokens:,} tokens",
                hint=f"Use train.attention={name if name != 'eager' else 'auto'}; train.allow_slow=true trains all the "
                "same.",
            )


def eager_comparison(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    choice: AttentionChoice,
    *,
    window_tokens: int,
    isolated: bool = False,
    budget_bytes: int | None = None,
) -> AttentionGain:
    """Measure the chosen attention of one layer beside eager attention, and beside the choice's alternatives.

    Heads, key heads, head size, sliding window and soft-capping are the model's; queries, keys and values are random.
    Of a model that mixes full and sliding layers, one of each is measured, and the costs are averaged over the layers.
    Takes seconds: for the probe step, on each process or on one.

    Args:
        config: of the (extended) model.
        dtype: that attention computes in: under autocast, autocast's.
        choice: what `choose_attention` gave.
        window_tokens: of a training window; measured is this, or the longest that eager attention has room for.
        isolated: two documents a window instead of one.
        budget_bytes: room for eager attention; 128 MiB on a CPU, 4 GiB elsewhere when left out.

    Raises:
        ResourceError: the chosen attention fails here, or computes something else than eager attention.
    """
    text = text_config(config)
    budget = budget_bytes or _BUDGET_BYTES.get(device.type, _DEVICE_BUDGET_BYTES)
    longest = math.isqrt(budget // (_EAGER_BYTES * int(text.num_attention_heads)))
    length = min(window_tokens, max(longest - longest % _ROUND_TOKENS, _ROUND_TOKENS))
    layers = [_Layer(config, device, dtype, length, kind, share, isolated) for kind, share in _kinds(text).items()]
    eager, reference = _measured(layers, "eager", device)
    try:
        again = choice.implementation == "eager"
        chosen, results = (eager, reference) if again else _measured(layers, choice.implementation, device)
    except CtxextError:
        raise
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        raise ResourceError(
            f"the attention '{choice.implementation}' does not run here ({first_line(error)})", where="train.attention"
        ) from error
    difference = _difference(results, reference)
    if not difference <= _LARGEST_ERROR[dtype]:  # not a number counts as wrong
        raise ResourceError(
            f"the attention '{choice.implementation}' computes something else than eager attention here",
            where="train.attention",
            got=f"a relative difference of {difference:.1e}",
            expected=f"at most {_LARGEST_ERROR[dtype]:.0e}",
            hint="Choose another one.",
        )
    others = {}
    for name in choice.alternatives:
        try:
            others[name] = _measured(layers, name, device)[0].seconds
        except (CtxextError, RuntimeError, ImportError, ValueError, TypeError):
            continue  # what does not run is no alternative
    return AttentionGain(choice.implementation, length, chosen, eager, others, difference)


def _kinds(text: Any) -> dict[str, float]:
    """Share of the layers of each kind that a mask is made for."""
    window = getattr(text, "sliding_window", None)
    types = list(getattr(text, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    sliding = types.count("sliding_attention") / len(types) if window is not None else 0.0
    shares = {"full_attention": 1.0 - sliding, "sliding_attention": sliding}
    return {kind: share for kind, share in shares.items() if share}


class _Layer:
    """One layer's attention without its projections."""

    def __init__(
        self,
        config: PreTrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        length: int,
        kind: str,
        share: float,
        isolated: bool,
    ) -> None:
        text = copy.deepcopy(text_config(config))
        self.kind, self.share, self.text, self.device, self.isolated = kind, share, text, device, isolated
        found = model_class(config)
        self._eager: Callable[..., tuple[Tensor, Any]] = getattr(
            sys.modules[found.__module__], "eager_attention_forward", modeling_llama.eager_attention_forward
        )
        num_heads = int(text.num_attention_heads)
        num_kv = int(getattr(text, "num_key_value_heads", None) or num_heads)
        plain = getattr(text, "head_dim", None) or text.hidden_size // num_heads
        key_dim, value_dim = getattr(text, "qk_head_dim", None) or plain, getattr(text, "v_head_dim", None) or plain
        generator = torch.Generator().manual_seed(0)
        self.tensors = [
            torch.randn((1, length, heads, dim), generator=generator)
            .to(device=device, dtype=dtype)
            .transpose(1, 2)
            .requires_grad_()
            for heads, dim in ((num_heads, key_dim), (num_kv, key_dim), (num_kv, value_dim))
        ]
        self._module = _stand_in(text, num_heads // num_kv, key_dim, device, dtype)
        self._arguments: dict[str, Any] = {"scaling": key_dim**-0.5, "dropout": 0.0}
        if getattr(text, "attn_logit_softcapping", None) is not None:
            self._arguments["softcap"] = text.attn_logit_softcapping
        elif not found._supports_sdpa:
            self._arguments["s_aux"] = self._module.sinks
        if kind == "sliding_attention":
            self._arguments["sliding_window"] = text.sliding_window
        half = length // 2
        positions = torch.arange(length, device=device)[None]
        self.positions = torch.where(positions < half, positions, positions - half) if isolated else positions

    def run(self, implementation: str) -> list[Tensor]:
        """Output and the three gradients."""
        for tensor in self.tensors:
            tensor.grad = None
        self.text._attn_implementation = implementation
        arguments, mask = dict(self._arguments), self._mask()
        if implementation.startswith("flash_attention"):
            arguments["position_ids"] = self.positions
            if self.isolated:
                arguments |= cumulative_arguments(documents_of(self.positions.diff(dim=-1) != 1))
        attend: Callable[..., tuple[Tensor, Any]] = (
            self._eager if implementation == "eager" else AttentionInterface()[implementation]
        )
        out = attend(self._module, *self.tensors, mask, **arguments)[0]
        out.backward(torch.linspace(-1.0, 1.0, out.shape[-1], dtype=out.dtype, device=out.device).expand_as(out))
        return [out.detach(), *(tensor.grad for tensor in self.tensors if tensor.grad is not None)]

    def _mask(self) -> Any:
        make: Callable[..., Any] = (
            create_sliding_window_causal_mask if self.kind == "sliding_attention" else create_causal_mask
        )
        query = self.tensors[0]
        ones = torch.ones(self.positions.shape, dtype=torch.long, device=self.device)
        return make(
            config=self.text,
            inputs_embeds=torch.empty((1, query.shape[2], 1), device=self.device, dtype=query.dtype),
            attention_mask=None if self.isolated else ones,
            past_key_values=None,
            position_ids=self.positions,
        )


def _stand_in(text: Any, groups: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Any:
    """What attention functions look up in the layer that calls them."""
    module: Any = nn.Module()
    module.config, module.layer_idx, module.is_causal = text, 0, True
    module.num_key_value_groups, module.head_dim = groups, head_dim
    module.dtype_of_the_model = nn.Linear(1, 1, device=device, dtype=dtype)
    module.sinks = torch.zeros(int(text.num_attention_heads), device=device, dtype=dtype)
    return module.train()


def _measured(layers: list[_Layer], implementation: str, device: torch.device) -> tuple[LayerCost, list[Tensor]]:
    seconds, peak = 0.0, 0
    results: list[Tensor] = []
    for layer in layers:
        run = partial(layer.run, implementation)
        results += run()  # also warms up
        seconds += layer.share * min(_seconds(run, device) for _ in range(_REPEATS))
        peak = max(peak, peak_growth_bytes(run, device))
    return LayerCost(seconds, peak), results


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _difference(results: list[Tensor], reference: list[Tensor]) -> float:
    return max(
        float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
        for found, expected in zip(results, reference, strict=True)
    )
