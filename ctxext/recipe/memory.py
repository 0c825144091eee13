"""What training may pay, in time or host memory, to hold longer windows on a device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ctxext.recipe.base import Block, PositiveInt

_TILES_ABOVE_TOKENS = 16_384
_TILE_TOKENS = 8_192


class MemoryBlock(Block):
    """Savings beside activation checkpointing; none of them changes what is computed.

    Attributes:
        checkpoint_every_n_layers: of activation checkpointing: 1 keeps every layer's input and nothing else, larger
            values leave the layers between as they are, which is faster and needs more memory.
        offload: keep the layers' inputs in host memory from forward to backward; needs an accelerator and activation
            checkpointing.
        tile_tokens: compute norms, MLPs and linear layers of the decoder in tiles of so many tokens; `auto` is 8,192
            above 16,384 tokens in one pass, and `off` below.
        device_gib: what the plan is judged against, GiB of one device; the memory of this machine's own when left out.
            With it, a plan assumes an accelerator that has bfloat16.
    """

    checkpoint_every_n_layers: PositiveInt = 1
    offload: bool = False
    tile_tokens: Literal["auto", "off"] | PositiveInt = "auto"
    device_gib: Annotated[float, Field(gt=0)] | None = None

    def tile(self, tokens_in_one_pass: int) -> int | None:
        """Tokens of a tile; None where nothing is tiled."""
        if self.tile_tokens == "auto":
            return _TILE_TOKENS if tokens_in_one_pass > _TILES_ABOVE_TOKENS else None
        return None if self.tile_tokens == "off" else self.tile_tokens
