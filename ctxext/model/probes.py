"""Probes that need no reference: does a model behave as one with working positions must, beyond its original length?

Short prompts whose position ids lie far apart stand for long ones, so that probing 128K positions costs a few dozen
tokens. Each probe says what it saw; only what can be told from logits alone is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TOKENS = 32
# Largest difference of logits that passes as rounding, relative to the largest logit. A float32 angle at position p is
# good to p * 6e-8 rad, so the allowance grows with the positions that are compared.
_ROUNDING = 2e-3
_ROUNDING_PER_POSITION = 4e-7
# A token far away must move some logit by more than this, relative to the largest.
_INFLUENCE = 1e-6


@dataclass(frozen=True)
class Probe:
    """One probe's outcome: what was tried, whether it holds, the figure, and what is accepted."""

    name: str
    holds: bool
    figure: str
    accepted: str

    def line(self) -> str:
        """One line for people."""
        return f"{self.name}: {self.figure}" + ("" if self.holds else f" (expected {self.accepted})")


def probe_model(
    model: Any, ids: list[int], original_length: int, target_length: int, *, fixed: bool
) -> Iterator[Probe]:
    """Probe a model in eval mode.

    Args:
        ids: tokens of some text, at least 8; the first 32 are used.
        original_length, target_length: the probes' positions lie around the first and up to the second.
        fixed: whether one table of frequencies holds at every length. With dynamic scaling and two-range LongRoPE
            logits do depend on absolute positions, and a cache keeps the angles of shorter sequences.
    """
    tokens = torch.tensor([ids[:_TOKENS]], device=model.get_input_embeddings().weight.device)
    count = tokens.shape[1]
    half = count // 2
    far = torch.cat([torch.arange(half), torch.arange(target_length - count + half, target_length)])
    yield _influence(model, tokens, far, half)
    if fixed:
        yield _relative(model, tokens, target_length - count)
        yield _cached(model, tokens, torch.arange(target_length - count, target_length))
    yield _padded(model, tokens, max(0, min(original_length, target_length - count) - count // 4))


def _logits(model: Any, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        output = model(
            input_ids=tokens,
            position_ids=positions.to(tokens.device).expand(tokens.shape),
            # All ones: without a mask transformers takes a jump in positions for a document boundary.
            attention_mask=torch.ones_like(tokens) if mask is None else mask,
            use_cache=False,
        )
    logits: Tensor = output.logits.float().cpu()
    return logits


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest logit; NaN counts as infinite."""
    difference = float((one - other).abs().max() / other.abs().max())
    return difference if difference == difference else float("inf")


def _influence(model: Any, tokens: Tensor, positions: Tensor, half: int) -> Probe:
    changed = tokens.clone()
    changed[0, 1:half] = tokens[0, 1:half].flip(0).roll(1)
    before = _logits(model, tokens, positions)[0, -1]
    moved = _difference(_logits(model, changed, positions)[0, -1], before)
    gap = int(positions[half] - positions[half - 1])
    return Probe(
        f"tokens {gap:,} positions back influence the last one",
        _INFLUENCE < moved < float("inf"),
        f"logits move by {moved:.1e}",
        f"more than {_INFLUENCE:.0e}",
    )


def _relative(model: Any, tokens: Tensor, shift: int) -> Probe:
    near = torch.arange(tokens.shape[1])
    difference = _difference(_logits(model, tokens, near + shift), _logits(model, tokens, near))
    accepted = _ROUNDING + shift * _ROUNDING_PER_POSITION
    return Probe(
        f"only distances matter (all positions shifted by {shift:,})",
        difference <= accepted,
        f"logits differ by {difference:.1e}",
        f"at most {accepted:.1e}",
    )


def _cached(model: Any, tokens: Tensor, positions: Tensor) -> Probe:
    whole = _logits(model, tokens, positions)[:, -4:]
    cache, steps = None, []
    cut = tokens.shape[1] - 4
    with torch.inference_mode():
        for start, end in [(0, cut), *((index, index + 1) for index in range(cut, tokens.shape[1]))]:
            output = model(
                input_ids=tokens[:, start:end],
                position_ids=positions[start:end][None].to(tokens.device),
                attention_mask=torch.ones_like(tokens[:, :end]),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps.append(output.logits[:, -1:].float().cpu())
    difference = _difference(torch.cat(steps[1:], dim=1), whole)
    return Probe(
        "decoding with a KV cache gives what a full pass gives",
        difference <= _ROUNDING,
        f"logits differ by {difference:.1e}",
        f"at most {_ROUNDING:.0e}",
    )


def _padded(model: Any, tokens: Tensor, start: int) -> Probe:
    """A batch of two rows, the shorter one padded on the left, against that row alone; positions cross `start`."""
    short = tokens[:, tokens.shape[1] // 3 :]
    padding = tokens.shape[1] - short.shape[1]
    row = torch.cat([tokens[:, :1].expand(1, padding), short], dim=1)
    batch = torch.cat([tokens, row])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    own = torch.arange(short.shape[1]) + start
    positions = torch.stack([torch.arange(tokens.shape[1]) + start, torch.cat([torch.zeros(padding).long(), own])])
    together = _logits(model, batch, positions, mask)[1:, padding:]
    difference = _difference(together, _logits(model, short, own))
    return Probe(
        "a left-padded row in a batch gives what it gives alone",
        difference <= _ROUNDING,
        f"logits differ by {difference:.1e}",
        f"at most {_ROUNDING:.0e}",
    )
