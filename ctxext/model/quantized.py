"""What bitsandbytes does for training, an optional extra: the optimizer's moments in 8 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from ctxext.errors import ResourceError
from ctxext.recipe.schema import Recipe


def check_bitsandbytes(recipe: Recipe, device_type: str) -> None:
    """Refuse, before any work, what bitsandbytes would have to do and cannot.

    Raises:
        ResourceError: it is not installed, or does not do this on the device.
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


def _uses(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Recipe key, its value, and what does without."""
    if recipe.train.optimizer == "adamw-8bit":
        yield "train.optimizer", recipe.train.optimizer, "train.optimizer=adamw"
