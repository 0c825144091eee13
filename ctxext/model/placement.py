"""Models that are larger than one device: spread over several by transformers and Accelerate, layer by layer.

Accelerate moves what a layer is given to that layer's device; keys and values are made there, and the cache keeps them
there. Layers that no device has room for are kept in the machine's memory or on disk and brought in when they run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ctxext.errors import unknown_name

# Accelerate's names for how to share the layers out.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def require_device_map(name: str) -> str:
    """The name, when Accelerate knows it.

    Raises:
        UsageError: it does not.
    """
    if name not in DEVICE_MAPS:
        raise unknown_name("device map", name, DEVICE_MAPS, where="--device-map")
    return name


def input_device(model: Any) -> torch.device:
    """Where token ids belong: the device on which the model's embedding is computed.

    Not where its weights lie: offloaded ones are on `meta` until they run.
    """
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is None:
        found: torch.device = model.device
        return found
    return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)


def placement(model: Any) -> str | None:
    """Which share of a spread model lies where, in one line; None for a model on one device."""
    parts = getattr(model, "hf_device_map", None)
    if not parts or len(set(map(str, parts.values()))) < 2:
        return None
    count = Counter(str(device) for device in parts.values())
    return "spread over " + ", ".join(f"{_device_name(device)} ({number} parts)" for device, number in count.items())


def _device_name(device: str) -> str:
    return f"device {device}" if device.isdigit() else device
