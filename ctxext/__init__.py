"""ctxext extends the context window of pretrained language models, and proves that the extension works.

Importing it loads neither torch nor transformers; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxext.errors import CtxextError
    from ctxext.export.patch import patch_checkpoint
    from ctxext.recipe.load import load_recipe
    from ctxext.recipe.schema import Recipe
    from ctxext.rope.live import patch_model, unpatch
    from ctxext.rope.patchers import extend_config
    from ctxext.rope.verify import verify_positions

# Where the optional bitsandbytes is installed, importing peft imports it, and on some CPUs it then warns of kernels for
# inference that it would like to download. ctxext uses none of them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

_PLACES = {
    "CtxextError": "ctxext.errors",
    "Recipe": "ctxext.recipe.schema",
    "extend_config": "ctxext.rope.patchers",
    "load_recipe": "ctxext.recipe.load",
    "patch_checkpoint": "ctxext.export.patch",
    "patch_model": "ctxext.rope.live",
    "unpatch": "ctxext.rope.live",
    "verify_positions": "ctxext.rope.verify",
}

__all__ = [
    "CtxextError",
    "Recipe",
    "__version__",
    "extend_config",
    "load_recipe",
    "patch_checkpoint",
    "patch_model",
    "unpatch",
    "verify_positions",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'ctxext' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
