"""A KV cache that is written in place and can be wound back.

transformers' `DynamicLayer` concatenates: every update copies all earlier keys and values, and for that moment holds
them twice. Here a layer has one buffer for the length that is known beforehand, an update copies the new tokens only,
and what the model sees is a view of the buffer's beginning. Winding back to an earlier length lets prompts that begin
alike share that beginning. Sliding-window layers forget what left their window, so their state is remembered at the
lengths that will be returned to. Everything else (state-space layers) cannot be wound back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ctxext.errors import UnsupportedModelError


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, H, S, D] of a full-attention layer, views of buffers of `capacity` tokens.

    What transformers does to a `DynamicLayer` (crop, beam search, repeating rows) works here too: a state that is no
    longer a view of the buffer is copied into a new one at the next update. More tokens than `capacity` are taken in
    larger buffers. Not for training: an update in place would change what the backward pass needs.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens [B, H, Q, D]; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self._key_buffer, self.keys = _appended(self._key_buffer, self.keys, key_states, self._capacity)
        self._value_buffer, self.values = _appended(self._value_buffer, self.values, value_states, self._capacity)
        return self.keys, self.values


def _appended(buffer: Tensor | None, held: Tensor, new: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The buffer with `new` behind `held`, and the view of both."""
    start = held.shape[2] if held.numel() else 0
    end = start + new.shape[2]
    if buffer is None or end > buffer.shape[2] or not _same_kind(buffer, new) or not _is_beginning(held, buffer):
        size = capacity if end <= capacity else end + end // 8
        larger = new.new_empty((*new.shape[:2], size, new.shape[3]))
        if start:
            larger[:, :, :start] = held
        buffer = larger
    buffer[:, :, start:end] = new
    return buffer, buffer[:, :, :end]


def _same_kind(buffer: Tensor, new: Tensor) -> bool:
    return (buffer.shape[:2], buffer.shape[3], buffer.dtype, buffer.device) == (
        new.shape[:2],
        new.shape[3],
        new.dtype,
        new.device,
    )


def _is_beginning(held: Tensor, buffer: Tensor) -> bool:
    """Whether `held` is a view of the first tokens of `buffer`, or empty."""
    return held.numel() == 0 or (
        held.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        and held.storage_offset() == buffer.storage_offset()
        and held.stride() == buffer.stride()
        and held.shape[:2] == buffer.shape[:2]
    )


class RewindableCache(Cache):
    """The cache that transformers would make for a config, with preallocated full-attention layers.

    Args:
        config: the model's config; it says which kind of layer stands where.
        capacity: tokens to make room for; more are taken, at the price of a copy.
    """

    def __init__(self, config: Any, capacity: int) -> None:
        stock = DynamicCache(config=config)
        # Exactly this class: its subclasses keep more than keys and values.
        layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in stock.layers]
        super().__init__(layers=layers)
        self._remembered: dict[int, list[_SlidingState]] = {}

    @property
    def obstacle(self) -> str | None:
        """Why this cache cannot be wound back, if so."""
        for number, layer in enumerate(self.layers):
            if type(layer) not in (PreallocatedLayer, DynamicSlidingWindowLayer, DummyLayer):
                return f"layer {number} keeps a state that cannot be wound back ({type(layer).__name__})"
        return None

    @property
    def forgets(self) -> bool:
        """Whether only remembered lengths can be returned to: some layers keep nothing but a window."""
        return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.layers)

    @property
    def length(self) -> int:
        """Tokens in the cache, as the first attention layer counts them."""
        return next((layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)), 0)

    def remember(self) -> None:
        """Make the present length one that `rewind` can return to."""
        # The tensors are replaced, never written to, by later updates: keeping them is enough.
        self._remembered[self.length] = [
            (layer.keys, layer.values, layer.cumulative_length) if layer.is_initialized else (None, None, 0)
            for layer in self.layers
            if isinstance(layer, DynamicSlidingWindowLayer)
        ]

    def rewind(self, length: int) -> None:
        """Forget all tokens behind the first `length`, exactly as if they had never been there.

        Raises:
            UnsupportedModelError: a layer that cannot be wound back, or not to this length.
        """
        if self.obstacle is not None or length > self.length:
            raise UnsupportedModelError(self.obstacle or f"the cache holds only {self.length} tokens", where="KV cache")
        if length == self.length:
            return
        if length == 0:
            self._remembered.clear()
            self.reset()  # type: ignore[no-untyped-call]
            return
        if self.forgets and length not in self._remembered:
            raise UnsupportedModelError(f"the state at {length} tokens was not remembered", where="KV cache")
        surplus = self.length - length
        states = iter(self._remembered.get(length, ()))
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.keys, layer.values, layer.cumulative_length = next(states)
            elif isinstance(layer, PreallocatedLayer):
                layer.crop(-surplus)
        self._remembered = {known: state for known, state in self._remembered.items() if known <= length}

    def keep_last(self, recording: bool) -> None:
        """With `recording`, sliding layers keep all of the next update, so that `drop` can take tokens off again."""
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.record_past = recording

    def drop(self, num_tokens: int) -> None:
        """Take the last tokens off; for sliding layers only of an update made under `keep_last(True)`."""
        self.crop(-num_tokens)


_SlidingState = tuple[Tensor | None, Tensor | None, int]
