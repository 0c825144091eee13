"""Which monitors watch a training."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from ctxext.evaluation.sharding import this_launch
from ctxext.model.peaks import peak_flops_per_second
from ctxext.planning.cost import measured_flops_per_second, model_shape
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import text_config
from ctxext.train.attention_entropy import AttentionMonitor
from ctxext.train.monitors import Monitor
from ctxext.train.router_load import RouterLoadMonitor
from ctxext.train.spikes import SpikeMonitor
from ctxext.train.throughput import ThroughputMonitor
from ctxext.train.token_counts import TokenCounts


def make_monitors(
    recipe: Recipe, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, original_length: int
) -> list[Monitor]:
    """The monitors that a recipe asks for, new ones for every arm.

    Args:
        config: the extended config, which says what can be watched in this model.
        original_length: before extension.
    """
    train = recipe.train
    warmup_steps = max(round(train.steps * train.warmup), 1)
    monitors: list[Monitor] = [
        SpikeMonitor(train.learning_rate, warmup_steps, TokenCounts(text_config(config).vocab_size)),
        _throughput(recipe, config, device, dtype),
    ]
    every = train.monitors.attention_every
    every = max(train.steps // 10, 1) if every is None else every
    if every and not reasons_against_attention(recipe):
        monitors.append(AttentionMonitor(every, train.steps, original_length, recipe.target_length))
    if not recipe.train.compile:  # it counts inside the layers; in models without routers, nothing
        monitors.append(RouterLoadMonitor(max(train.steps // 10, 1), train.steps))
    return monitors


def reasons_against_attention(recipe: Recipe) -> list[str]:
    """Why attention cannot be looked at in this run, for people; empty where it can."""
    reasons = []
    if recipe.train.compile:
        reasons.append("compiled layers")
    if recipe.parallel.sequence > 1:
        reasons.append("windows whose tokens are spread over processes")
    return reasons


def _throughput(
    recipe: Recipe, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> ThroughputMonitor:
    window_tokens = recipe.data.windows.length or recipe.target_length
    shape = model_shape(config)
    flops = shape.train_flops(window_tokens, activation_checkpointing=False, full=recipe.adaptation == "full")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    speed = peak_flops_per_second(name) if dtype == torch.bfloat16 else None
    source = f"data sheet of {name}, dense bfloat16"
    if speed is None:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            speed = measured_flops_per_second(device, dtype)
        source = f"matrix product measured on {name} at the start, {str(dtype).removeprefix('torch.')}"
    return ThroughputMonitor(recipe.train.windows_per_step * flops, this_launch().count * speed, source, device)
