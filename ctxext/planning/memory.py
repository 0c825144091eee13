"""The memory of a training step, known without the machine: the step itself is traced on meta tensors.

Model, adapter, savings, loss and optimizer are those that training uses; only the numbers inside are missing. An
8-billion-parameter model takes seconds on one core and no weights. What is not traced is added and named: buffers
inside attention kernels, and for a sharded model the layers that are gathered. Not counted are the CUDA context (half a
GiB or so) and what the allocator loses to fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ctxext.errors import CtxextError, UnsupportedModelError, first_line
from ctxext.model.adaptation import adapt
from ctxext.model.documents import DOCUMENTS
from ctxext.model.parts import is_adapter_name
from ctxext.model.quantised import layers_in_4_bits
from ctxext.model.savings import Savings, apply_savings
from ctxext.planning.quantised import TracedLinear4bit, moments_in_8_bits, quantise_for_trace
from ctxext.planning.trace import FUSED, Ledger, Peak, fused_attention_on_meta
from ctxext.recipe.adaptation import Adaptation, LoraBlock

# Makes the loss module of a model with its adapter: called with input_ids and position_ids, gives the summed loss.
Objective = Callable[[Any], nn.Module]
_FORWARD, _BACKWARD, _UPDATE = "forward", "backward", "optimizer"


@dataclass(frozen=True)
class Sharding:
    """Several devices that share one model and one window.

    Attributes:
        weights: devices that share weights, gradients and optimizer (FSDP2 divides all three).
        sequence: devices that share a window's tokens.
    """

    weights: int = 1
    sequence: int = 1


ONE_DEVICE = Sharding()


@dataclass(frozen=True)
class StepShape:
    """How large one pass is, and in which numbers.

    Attributes:
        windows: in one pass.
        window_tokens: of each.
        dtype: of the base weights.
        device: whose attention kernels count.
        attention: which implementation computes it in training.
    """

    windows: int
    window_tokens: int
    dtype: torch.dtype
    device: Literal["cuda", "cpu"] = "cuda"
    attention: str = "sdpa"


@dataclass(frozen=True)
class StepMemory:
    """A training step's memory on one device.

    Attributes:
        peak_bytes: the most at one time.
        split: its parts: weights (frozen), adapters, trained weights, optimizer, gradients, saved activations,
            temporaries, gathered layers.
        operation: what was running, with the shape of what it made.
        phase: forward, backward or optimizer.
        host_bytes: the most that lay in host memory, one process.
    """

    peak_bytes: int
    split: dict[str, int]
    operation: str
    phase: str
    host_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


def trace_step(
    config: PreTrainedConfig,
    lora: LoraBlock,
    savings: Savings,
    shape: StepShape,
    objective: Objective,
    sharding: Sharding = ONE_DEVICE,
    adaptation: Adaptation = "lora",
    moment_bytes: int = 4,
) -> StepMemory:
    """Trace one training step of the model that `config` describes.

    Args:
        moment_bytes: of each of AdamW's moments, for one parameter: 4, or 1 with `adamw-8bit`.

    Raises:
        UnsupportedModelError: the model decides by values what it computes (routed experts in a Python loop), which
            meta tensors do not have.
    """
    model = _meta_model(config, adaptation, lora, savings, shape)
    loss = objective(model)
    update, moments = _update_with_moments(model, moment_bytes)
    tokens = -(-shape.window_tokens // sharding.sequence)
    ids = torch.zeros((shape.windows, tokens), dtype=torch.long, device="meta")
    ledger = Ledger(counts_kernel_buffers=shape.device == "cuda")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    quantised = [module for module in model.modules() if isinstance(module, TracedLinear4bit)]
    ledger.register("4-bit weights", (module.weight for module in quantised))
    ledger.register("scales of 4-bit weights", (buffer for module in quantised for buffer in module.buffers()))
    ledger.register("weights", (p for p in model.parameters() if not p.requires_grad))
    ledger.register("weights", model.buffers())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ledger.register("adapters", (p for name, p in named if is_adapter_name(name)))
    ledger.register("trained weights", (p for name, p in named if not is_adapter_name(name)))
    ledger.register("optimizer", moments)
    try:
        with fused_attention_on_meta(shape.device), ledger:
            with ledger.phase(_FORWARD):
                value = loss(ids, torch.zeros_like(ids))
            with ledger.phase(_BACKWARD):
                value.backward()
            del value
            ledger.rename("gradients", (p.grad for p in trained if p.grad is not None))
            with ledger.phase(_UPDATE):
                nn.utils.clip_grad_norm_(trained, max_norm=1.0)
                update()
    except CtxextError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"a training step of this model cannot be traced without values ({first_line(error)})",
            where=str(getattr(config, "model_type", "model")),
            hint="The plan leaves the memory out.",
        ) from error
    peak = ledger.peak((_FORWARD, _BACKWARD, _UPDATE))
    return _sharded(_as_memory(peak), _gathered_bytes(model), sharding.weights)


def _meta_model(
    config: PreTrainedConfig, adaptation: Adaptation, lora: LoraBlock, savings: Savings, shape: StepShape
) -> Any:
    # What runs without this device's kernels is traced as it is.
    as_it_is = {"sdpa", "eager"} | ({DOCUMENTS} if shape.device == "cpu" else set())
    attention = shape.attention if shape.attention in as_it_is else FUSED
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=shape.dtype, attn_implementation=attention)
        if adaptation == "qlora":
            quantise_for_trace(base, layers_in_4_bits(base))
        model = adapt(base, adaptation, lora, seed=0)
    model.train()
    apply_savings(model, savings)
    return model


def _update_with_moments(model: nn.Module, moment_bytes: int) -> tuple[Callable[[], object], list[Tensor]]:
    """The optimizer's step and state as they are from the second step on."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if moment_bytes == 1:  # bitsandbytes updates in place, without temporaries
        return lambda: None, [moment for parameter in trained for moment in moments_in_8_bits(parameter)]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return optimizer.step, state


def _as_memory(peak: Peak) -> StepMemory:
    return StepMemory(peak.num_bytes, peak.split, peak.operation, peak.phase, peak.host_bytes)


def _gathered_bytes(model: nn.Module) -> int:
    """What FSDP2 has on each device beside its share: two layers (one is fetched ahead) and what is in no layer."""
    layers = [
        _num_bytes(layer)
        for name, parts in model.named_modules()
        if name.endswith("layers") and isinstance(parts, nn.ModuleList)
        for layer in parts
    ]
    if not layers:
        return _num_bytes(model)
    return 2 * max(layers) + _num_bytes(model) - sum(layers)


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _sharded(memory: StepMemory, gathered_bytes: int, num_shards: int) -> StepMemory:
    if num_shards == 1:
        return memory
    split = dict(memory.split)
    for kind in ("weights", "4-bit weights", "adapters", "trained weights", "gradients", "optimizer"):
        if kind in split:
            split[kind] = -(-split[kind] // num_shards)
    split["gathered layers"] = gathered_bytes
    return replace(memory, split=split, peak_bytes=sum(split.values()))
