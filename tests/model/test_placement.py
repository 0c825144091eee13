"""A model whose layers lie in different places answers as one that lies in one. Places here: memory and disk."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import byte_tokenizer, save_tiny_model

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.model.cache import PreallocatedLayer, RewindableCache
from ctxext.model.load import load_config, load_model, resolve_source
from ctxext.model.placement import input_device, placement, require_device_map
from ctxext.rope.verify import verify_positions

CPU = torch.device("cpu")
PROMPT = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(5)).tolist()
MODULES = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2", "model.norm", "lm_head")
IN_MEMORY = dict.fromkeys(MODULES, "cpu")
SPREAD: dict[str, str | int] = {**IN_MEMORY, "model.layers.1": "disk", "model.layers.3": "disk"}
WITH_EMBEDDING: dict[str, str | int] = {**SPREAD, "model.embed_tokens": "disk", "lm_head": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_hidden_layers": 4, "tie_word_embeddings": False, "initializer_range": 0.2, "eos_token_id": None}
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), **shape)


def loaded(folder: Path, device_map: Any = None) -> Any:
    source = resolve_source(str(folder))
    return load_model(source, load_config(source), dtype=torch.float32, device=CPU, device_map=device_map)


@pytest.mark.parametrize("device_map", [SPREAD, WITH_EMBEDDING, "auto"], ids=["layers", "embedding-and-head", "auto"])
def test_a_spread_model_answers_as_a_whole_one(folder: Path, device_map: Any) -> None:
    whole, spread = loaded(folder), loaded(folder, device_map)
    assert input_device(spread) == CPU
    tokenizer = byte_tokenizer()
    expected = Answerer(whole, tokenizer, chunk_tokens=30).answer(PROMPT, 12)
    found = Answerer(spread, tokenizer, chunk_tokens=30).answer(PROMPT, 12)
    assert found.ids == expected.ids
    assert len(set(found.ids)) > 1
    # Weights that are read from disk lie elsewhere in memory, so products may sum in another order: float32 noise.
    assert float((found.losses - expected.losses).abs().max()) < 5e-6
    if device_map != "auto":
        assert any(parameter.is_meta for parameter in spread.parameters())
        assert verify_positions(spread, whole.config).num_modules == 1


def test_the_placement_is_said(folder: Path) -> None:
    assert placement(loaded(folder)) is None
    assert placement(loaded(folder, SPREAD)) == "spread over cpu (6 parts), disk (2 parts)"


def test_the_offload_folder_goes_with_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = loaded(folder, SPREAD)
    assert [path.name.startswith("ctxext-offload-") for path in tmp_path.iterdir()] == [True]
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtefactError):
        loaded(broken, SPREAD)
    assert list(tmp_path.iterdir()) == [broken]


def test_cached_keys_lie_where_their_layer_computes_them() -> None:
    # `meta` stands for a second device: it has shapes and a place, which is what is asked about here.
    layers = [PreallocatedLayer(8), PreallocatedLayer(8)]
    for layer, device in zip(layers, ("cpu", "meta"), strict=True):
        for _ in range(2):
            piece = torch.zeros(1, 2, 3, 4, device=device)
            keys, values = layer.update(piece, piece)
        assert keys.device.type == values.device.type == device
        assert keys.shape[2] == 6


def test_a_rewound_cache_stays_where_it_is() -> None:
    from support import tiny_config

    cache = RewindableCache(tiny_config(), 16)
    for number, device in enumerate(("cpu", "meta")):
        piece = torch.zeros(1, 1, 5, 16, device=device)
        cache.update(piece, piece, number)
    cache.rewind(3)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"]
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 3]


def test_an_unknown_device_map_is_refused() -> None:
    assert require_device_map("auto") == "auto"
    with pytest.raises(UsageError, match="--device-map") as raised:
        require_device_map("autp")
    assert "Did you mean 'auto'?" in raised.value.sentence()
