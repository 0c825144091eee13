"""Which keys of a recipe decide what a training gives, and which may change when it is resumed.

Every key has one of four effects:

- `fixed`: another model, or other weights that train: nothing of an earlier training can be used.
- `results`: other losses and weights. Going on with another value mixes two trainings.
- `last-bits`: the same computation in another order; results differ as between two machines.
- `none`: where things are written, how often, what is watched and measured.

All but `none` are part of a plan's identity. What a run evaluates has no effect on its training; samples have an
identity of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["fixed", "results", "last-bits", "none"]

# By block, so that every key stands here by its name; a test compares this table with the schema.
_TABLE: dict[str, dict[Effect, str]] = {
    "": {"fixed": "rope on_existing target_length adaptation", "results": "stages", "none": "output_dir"},
    "model": {"results": "source revision dtype", "none": "description"},
    # `preset` is what gave the sources; the value `none` of `cache` reads in another order, see `planning.identity`.
    "data": {"results": "contamination seed", "none": "preset cache"},
    "data.sources": {
        "results": "kind paths name config split text_field messages_field revision include weight min_tokens "
        "max_tokens",
        "none": "streaming max_bad_rows",
    },
    "data.windows": {"results": "mode length chunks skips packing positions"},
    "data.length": {"results": "long_from long_share upsample", "none": "allow_short"},
    "data.facts": {"results": "share style per_window"},
    "lora": {
        "fixed": "rank targets routers experts weight_decomposed embeddings_and_norms",
        "results": "alpha dropout rank_stabilized start_from",
    },
    "train": {
        "fixed": "optimizer",
        "results": "steps windows_per_step learning_rate warmup decay weight_decay max_grad_norm router_loss "
        "router_jitter seed",
        "last-bits": "windows_per_device attention compile loss activation_checkpointing",
        # A run that stopped at a value that is not finite may go on leaving such steps out: none came before.
        "none": "allow_slow probe non_finite max_hours checkpoint_every keep_checkpoints trackers",
    },
    "train.memory": {"last-bits": "tile_tokens", "none": "checkpoint_every_n_layers offload device_gib"},
    "train.monitors": {"none": "attention_every"},
    "train.evaluate": {"results": "every suite stop_after"},
    # How many processes really run is compared with the checkpoint: `processes` below.
    "parallel": {"last-bits": "shard sequence sequence_engine", "none": "processes"},
    "evaluation": {"none": "suite before untrained control recorded"},
    "evaluation.gates": {"none": "tail effective_length short_context_cost better_than by"},
}

WINDOWS_BALANCED = "windows-balanced-together"
# What else decides, besides the keys of a recipe.
_BESIDES: dict[str, Effect] = {
    "base-weights": "fixed",
    "rope-parameters": "fixed",
    "left-out-documents": "results",
    "training-tokens": "results",
    "dtype-in-use": "results",
    # `train.windows_per_device` of a model with an auxiliary loss, which depends on what passes together.
    WINDOWS_BALANCED: "results",
    "device": "last-bits",
    "attention-in-use": "last-bits",
    "processes": "results",
}

_EFFECTS: dict[str, Effect] = _BESIDES | {
    f"{block}.{key}" if block else key: effect
    for block, effects in _TABLE.items()
    for effect, keys in effects.items()
    for key in keys.split()
}

# Keys that came after the first plans were made, with the value under which a run is what it was before there was the
# key: then they are left out of a plan's identity. When a default changes later, the value here stays.
LATER: dict[str, Any] = {
    "adaptation": "lora",
    "lora.routers": False,
    "lora.experts": False,
    "lora.rank_stabilized": False,
    "lora.weight_decomposed": False,
    "lora.embeddings_and_norms": False,
    "lora.start_from": None,
    "train.decay": "cosine",
    "train.optimizer": "adamw",
    "train.attention": "auto",
    "train.compile": False,
    "train.memory.tile_tokens": None,
    "train.loss": "torch",
    "train.router_jitter": 0.0,
    "train.router_loss": None,
    "train.evaluate": None,
    "parallel.shard": "auto",
    "parallel.sequence": 1,
    "parallel.sequence_engine": "ulysses",
}

_WORDS: dict[Effect, str] = {
    "fixed": "another model; cannot be resumed",
    "results": "changes results",
    "last-bits": "changes the last bits only",
    "none": "changes nothing",
}
_STRENGTH: tuple[Effect, ...] = ("fixed", "results", "last-bits", "none")
_LONGEST_VALUE = 40


def effect_of(key: str) -> Effect:
    """A key's effect: its own, that of the block it lies in, or the strongest of the keys below it.

    Raises:
        KeyError: not a key of a recipe.
    """
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (found := _EFFECTS.get(".".join(parts[:length]))) is not None:
            return found
    below = [effect for name, effect in _EFFECTS.items() if name.startswith(f"{key}.")]
    if not below:
        raise KeyError(key)
    return min(below, key=_STRENGTH.index)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested blocks as `block.key`; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of flat values those that decide results, the keys of `LATER` only where they say something."""
    found = {key: value for key, value in values.items() if _says_something(key, value)}
    if "data.sources" in found:
        found["data.sources"] = [
            {key: value for key, value in source.items() if _says_something(f"data.sources.{key}", value)}
            for source in found["data.sources"]
        ]
    return found


def _says_something(key: str, value: Any) -> bool:
    return effect_of(key) != "none" and not (key in LATER and LATER[key] == value)


@dataclass(frozen=True)
class Difference:
    """A value that is not what it was.

    Attributes:
        stored: in the run so far; None also for a key that was not there.
        new: what is asked for now.
    """

    key: str
    stored: Any
    new: Any
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        """For `inexact.json` and what is made from it."""
        return {"key": self.key, "stored": self.stored, "new": self.new, "effect": self.effect}

    def words(self) -> str:
        """'train.seed 0 -> 1'."""
        return f"{self.key} {_shown(self.stored)} -> {_shown(self.new)}"


def differences(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """In which decisive values two runs differ, the gravest first."""
    found = [
        Difference(key, stored.get(key, LATER.get(key)), new.get(key, LATER.get(key)), effect_of(key))
        for key in sorted({*stored, *new})
        if stored.get(key, LATER.get(key)) != new.get(key, LATER.get(key))
    ]
    return sorted(found, key=lambda difference: _STRENGTH.index(difference.effect))


def table(found: Sequence[Difference]) -> str:
    """Differences as lines of equal columns for the terminal."""
    rows = [("setting", "stored", "now", "effect")]
    rows += [(d.key, _shown(d.stored), _shown(d.new), _WORDS[d.effect]) for d in found]
    return "\n".join("  " + line for line in _aligned(rows))


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
