"""The preallocated cache: what transformers' own holds, in place, and back to any earlier length."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_model
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer

from ctxext.errors import UnsupportedModelError
from ctxext.model.cache import PreallocatedLayer, RewindableCache
from ctxext.model.causal import using_chunked

IDS = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))


def sliding_model() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval()


MODELS = {"llama": lambda: tiny_model(initializer_range=0.2, eos_token_id=None), "sliding": sliding_model}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def states(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(2, 3, num_tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("capacity", [1, 30, 500])
def test_a_layer_holds_what_transformers_layer_holds_whatever_is_done_to_it(capacity: int) -> None:
    ours, theirs = PreallocatedLayer(capacity), DynamicLayer()
    actions = [
        lambda layer: layer.update(states(20, 1), states(20, 2)),
        lambda layer: layer.update(states(1, 3), states(1, 4)),
        lambda layer: layer.crop(-7),
        lambda layer: layer.update(states(9, 5), states(9, 6)),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.update(states(3, 7), states(3, 8)),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.update(states(5, 9), states(5, 10)),
        lambda layer: layer.reset(),
        lambda layer: layer.update(states(4, 11), states(4, 12)),
    ]
    for action in actions:
        action(ours)
        action(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        if theirs.is_initialized:
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_an_update_copies_new_tokens_only() -> None:
    layer = PreallocatedLayer(100)
    keys, _ = layer.update(states(60, 1), states(60, 2))
    place = keys.data_ptr()
    for step in range(40):
        keys, _ = layer.update(states(1, step), states(1, step))
        assert keys.data_ptr() == place
    layer.crop(-30)
    assert layer.update(states(30, 1), states(30, 2))[0].data_ptr() == place
    assert layer.update(states(1, 1), states(1, 2))[0].data_ptr() != place


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_answers_as_with_its_own_cache(model: Any, options: dict[str, Any]) -> None:
    arguments = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 12, **options}
    expected = model.generate(IDS, **arguments)
    found = model.generate(IDS, past_key_values=RewindableCache(model.config, 95), **arguments)
    assert torch.equal(found, expected)


def run(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model.get_decoder()(input_ids=ids, past_key_values=cache).last_hidden_state
    return hidden


def test_after_a_return_everything_is_as_if_the_later_tokens_had_never_been_there(model: Any) -> None:
    cache = RewindableCache(model.config, 100)
    run(model, IDS[:, :40], cache)
    cache.remember()
    run(model, IDS[:, 40:70], cache)
    cache.remember()
    run(model, IDS[:, 70:], cache)
    for length in (70, 40, 40):
        cache.rewind(length)
        assert cache.length == length
        plain = DynamicCache(config=model.config)
        run(model, IDS[:, :length], plain)
        assert float((run(model, IDS[:, 10:30], cache) - run(model, IDS[:, 10:30], plain)).abs().max()) < 1e-5
    cache.rewind(0)
    assert cache.length == 0
    fresh = run(model, IDS, DynamicCache(config=model.config))
    assert float((run(model, IDS, cache) - fresh).abs().max()) < 1e-5


@pytest.mark.parametrize("start", [4, 20, 60])
@pytest.mark.parametrize("dropped", [0, 1, 9])
def test_the_end_of_the_last_update_can_be_taken_off(model: Any, start: int, dropped: int) -> None:
    cache, plain = RewindableCache(model.config, 100), DynamicCache(config=model.config)
    run(model, IDS[:, :start], cache)
    cache.keep_last(True)
    run(model, IDS[:, start : start + 10], cache)
    cache.drop(dropped)
    cache.keep_last(False)
    kept = start + 10 - dropped
    run(model, IDS[:, :kept], plain)
    for ids in (IDS[:, kept : kept + 1], IDS[:, 60:70]):
        assert cache.length == plain.get_seq_length()
        assert float((run(model, ids, cache) - run(model, ids, plain)).abs().max()) < 1e-5


def test_a_window_that_was_not_remembered_is_an_error_and_not_a_guess() -> None:
    model = sliding_model()
    cache = RewindableCache(model.config, 100)
    run(model, IDS[:, :50], cache)
    with pytest.raises(UnsupportedModelError, match="not remembered"):
        cache.rewind(30)
    with pytest.raises(UnsupportedModelError, match="holds only 50"):
        cache.rewind(51)


def test_a_state_that_cannot_be_wound_back_is_named() -> None:
    config = Qwen3NextConfig(num_hidden_layers=4)
    cache = RewindableCache(config, 10)
    assert "layer 0" in str(cache.obstacle)
    with pytest.raises(UnsupportedModelError, match="LinearAttentionLayer"):
        cache.rewind(0)


def test_a_prefill_needs_little_besides_weights_and_cache() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "bench_engine.py"
    spec = importlib.util.spec_from_file_location("bench_engine", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    model = tiny_model()
    ids = torch.randint(0, 256, (1, 2048))
    kv = 2 * 2 * 16 * 4 * 2048  # keys and values, layers, width, bytes, tokens
    peaks = {}
    for name, cache in (("ours", RewindableCache(model.config, 2048)), ("stock", DynamicCache(config=model.config))):
        with using_chunked(model), torch.inference_mode(), bench.PeakBytes() as seen:
            for piece in ids.split(32, dim=1):
                model.get_decoder()(input_ids=piece, past_key_values=cache)
        peaks[name] = seen.peak / kv
    assert 1.0 <= peaks["ours"] < 1.1
    assert peaks["stock"] > 1.2
