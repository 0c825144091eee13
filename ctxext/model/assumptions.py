"""What transformers fills in where a config.json is silent: refused where a guess would be wrong, else told.

A base that is loaded with its family's default theta is the model that everybody loads. But nothing in a base model
depends on its original length, so a missing or outdated one (Llama 2 was first published with 2048) shows only after
it was extended from the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ctxext.errors import ArtefactError
from ctxext.model.load import ModelSource
from ctxext.rope.families import rope_groups, text_config

_LENGTH = "max_position_embeddings"
_THETAS = ("rope_theta", "rotary_emb_base", "global_rope_theta", "rope_local_base_freq", "local_rope_theta")
# Tokenizers without a limit carry 1e30.
_NO_LIMIT = 1_000_000_000


def assumed_by_default(source: ModelSource, config: PreTrainedConfig) -> list[str]:
    """What to tell a user about a base model's config, line by line; nothing for a GGUF file, which says it all.

    Args:
        config: as transformers read it.

    Raises:
        ArtefactError: the config.json does not say the original length, or holds a RoPE dict that lost its base.
    """
    if source.gguf_file:
        return []
    stored, _ = PreTrainedConfig.get_config_dict(source.location, revision=source.revision)
    text = text_config(config)
    length_names = {_LENGTH, (getattr(text, "attribute_map", None) or {}).get(_LENGTH, _LENGTH)}
    length = getattr(text, _LENGTH, None)
    if not length_names & set(_keys(stored)):
        raise ArtefactError(
            "the config.json does not say how many positions the model was trained for",
            where=f"{source.name}: {_LENGTH}",
            expected="a positive integer",
            hint=f"transformers would assume {length}; write the right number into the file.",
        )
    return [*_theta_notes(stored, config, source), *_length_notes(source, length)]


def _theta_notes(stored: dict[str, Any], config: PreTrainedConfig, source: ModelSource) -> Iterator[str]:
    if set(_THETAS) & set(_keys(stored)):
        return
    thetas = " and ".join(sorted({f"{parameters['rope_theta']:g}" for parameters in rope_groups(config).values()}))
    if "rope_parameters" in _keys(stored):
        raise ArtefactError(
            "the RoPE parameters in the config.json have lost their base",
            where=f"{source.name}: rope_parameters.rope_theta",
            expected="a number above 1",
            hint=f"transformers would assume {thetas}; write the right number into the file.",
        )
    yield f"{source.name}: the config.json does not say its RoPE base; its family's default {thetas} is assumed"


def _length_notes(source: ModelSource, length: Any) -> Iterator[str]:
    """Other files that speak of a longer model: what Llama 2's first config looked like."""
    for file, key, claimed in (
        ("tokenizer", "model_max_length", _tokenizer_limit(source)),
        ("generation config", "max_length", _generation_limit(source)),
    ):
        if isinstance(length, int) and length < claimed < _NO_LIMIT:
            yield (
                f"{source.name}: the config says {length} positions, its {file} {claimed} ({key}); if the model was "
                f"trained for {claimed}, correct {_LENGTH} before extending it"
            )


def _tokenizer_limit(source: ModelSource) -> int:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        limit = get_tokenizer_config(source.location, revision=source.revision).get("model_max_length")
    except (OSError, ValueError):  # whoever needs the tokenizer says what is wrong with it
        return 0
    return int(limit) if isinstance(limit, int | float) and limit == limit else 0


def _generation_limit(source: ModelSource) -> int:
    try:
        limit = GenerationConfig.from_pretrained(source.location, revision=source.revision or "main").max_length
    except (OSError, ValueError):  # most models have one, none needs it
        return 0
    return limit if isinstance(limit, int) else 0


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
