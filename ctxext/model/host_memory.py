"""Memory of the CPU that one training step frees and the next one asks for again: kept, and measured.

glibc gives large blocks back to the kernel as soon as they are freed and gets them again as pages of zeros, one fault a
page. A training step does that with every activation: on SmolLM2-135M it costs a fifth of the processor's time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Options of glibc's mallopt (malloc.h), and values that no block of a training step reaches.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _NEVER_MMAP = 2**31 - 1, 2**30
# Where glibc's own thresholds end up by themselves once large blocks were freed.
_LARGEST_MMAP, _LARGEST_TRIM = 32 * 2**20, 64 * 2**20


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Freed blocks stay with this process while the context is open, if `device` is the CPU and the C library glibc.

    Afterwards they go back to the kernel. Results are the same to the bit.
    """
    library = _glibc() if device.type == "cpu" else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _NEVER_MMAP)
    library.mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)
        library.malloc_trim(0)


@cache
def _glibc() -> Any | None:
    if not sys.platform.startswith("linux"):
        return None
    library: Any = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


class ResidentPeak:
    """How far this process's resident memory rises from `start` on, as Linux counts it; None elsewhere."""

    def __init__(self) -> None:
        self._before: int | None = None

    def start(self) -> None:
        """Forget what was before; freed memory goes back to the kernel first, so that it is not counted as in use."""
        library = _glibc()
        if library is None:
            return
        library.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except OSError:
            return
        self._before = _status_bytes("VmRSS")

    def growth_bytes(self) -> int | None:
        """From `start` to the highest point since."""
        if self._before is None:
            return None
        highest = _status_bytes("VmHWM")
        return None if highest is None else max(highest - self._before, 0)


def _status_bytes(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
