"""What a device can do at most, and what a process has used at most."""

from __future__ import annotations

import sys

import torch

# Dense bfloat16 matrix products, in TFLOPS, by words of the name that the driver gives. From the makers' data sheets
# (NVIDIA H100, H200, A100, HGX B200, L40S and L4 Tensor Core GPU; NVIDIA Ada and Ampere GA102 architecture papers for
# GeForce, with float32 accumulation; AMD Instinct MI250X, MI300X and MI325X), where sparse figures are halved.
_TFLOPS: dict[str, float] = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI250X": 383.0,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
}


def peak_flops_per_second(device_name: str) -> float | None:
    """Dense bfloat16 speed of a known GPU; None for others."""
    words = device_name.replace("-", " ").split()
    for name in sorted(_TFLOPS, key=len, reverse=True):
        parts = name.split()
        if any(words[start : start + len(parts)] == parts for start in range(len(words))):
            return _TFLOPS[name] * 1e12
    return None


def peak_resident_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that tensors have had at a time on an accelerator; on a CPU, what the process has had."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()
