"""Answering prompts of equal length together changes nothing but the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import byte_tokenizer, tiny_model

from ctxext.data.boundaries import encode_plain
from ctxext.errors import UsageError
from ctxext.evaluation import answerer as answering
from ctxext.evaluation.answerer import BATCH_TOKENS, PREFILL_CHUNK, Answer, Answerer, parse_batch_size
from ctxext.evaluation.engine import evaluate_samples
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.prompt import PromptBuilder
from ctxext.evaluation.store import SampleResult, SampleStore, load_samples
from ctxext.evaluation.suite import Suite, load_suite, resolve_samples
from ctxext.model.cache import RewindableCache
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source


class RecordingAnswerer(Answerer):
    """Notes the size of every batch; refuses more than `most` prompts as a small machine would."""

    def __init__(self, *arguments: object, most: int = 1 << 20, **options: int) -> None:
        super().__init__(*arguments, **options)
        self.sizes: list[int] = []
        self.most = most

    def answer_together(self, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[Answer]:
        self.sizes.append(len(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return super().answer_together(prompts, max_new_tokens, **options)


def suite_of(*lengths: int, samples: int = 2) -> Suite:
    rows = [{"length": length, "depths": [0.0, 0.5, 1.0], "samples": samples} for length in lengths]
    values = {"description": "t", "wording": "passkey", "haystack": "generated-words", "grid": rows}
    return Suite.model_validate({**values, "max_new_tokens": 7, "loss_block_tokens": 32})


def builder_of(tokenizer: object, suite: Suite) -> PromptBuilder:
    reader = HaystackReader(load_haystack(suite.haystack), lambda text: encode_plain(tokenizer, text))
    return PromptBuilder(tokenizer, reader, suite.wording, suite.seed, suite)


def evaluate(folder: Path, suite: Suite, most: int = 1 << 20) -> tuple[list[SampleResult], list[int]]:
    tokenizer = byte_tokenizer()
    answerer = RecordingAnswerer(tiny_model(initializer_range=0.2), tokenizer, most=most)
    samples = resolve_samples(suite, 128, 512)
    evaluate_samples(answerer, builder_of(tokenizer, suite), suite, samples, SampleStore(folder, {}, {}))
    return load_samples(folder), answerer.sizes


def without_time(results: list[SampleResult]) -> list[SampleResult]:
    return [replace(result, seconds=0.0, loss_blocks=[]) for result in results]


def test_the_shipped_model_answers_alike_alone_and_together() -> None:
    source, suite = resolve_source("recipes:tiny"), load_suite("tiny")
    model = load_model(source, load_config(source), dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = load_tokenizer(source)
    answerer, builder = Answerer(model, tokenizer), builder_of(tokenizer, suite)
    prompts = [builder.build(sample) for sample in resolve_samples(suite, 128, 512) if sample.index == 0]
    answers: set[tuple[int, ...]] = set()
    for length in (64, 120, 248, 376, 504):
        alike = [prompt.input_ids for prompt in prompts if len(prompt.input_ids) == length]
        assert len(alike) == 5
        for ids, together in zip(alike, answerer.answer_together(alike, 7), strict=True):
            alone = answerer.answer(ids, 7)
            assert together.ids == alone.ids
            assert together.losses.shape == (length - 1,)
            assert float((together.losses - alone.losses).abs().max()) < 1e-4
            answers.add(tuple(alone.ids))
    assert len(answers) > 12, "answers differ from prompt to prompt, so equal ones mean something"


def test_each_row_ends_at_its_own_stop_token() -> None:
    model = tiny_model(initializer_range=0.2, eos_token_id=None)
    prompts = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(1)).tolist()
    free = [Answerer(model, byte_tokenizer()).answer(prompt, 10).ids for prompt in prompts]
    stop = free[0][2]
    model.generation_config.eos_token_id = stop
    answers = Answerer(model, byte_tokenizer()).answer_together(prompts, 10)
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert [answer.ids for answer in answers] == expected
    assert len({len(ids) for ids in expected}) > 1


def test_batches_hold_neighbours_of_equal_length_and_long_prompts_stay_alone(tmp_path: Path) -> None:
    samples, sizes = evaluate(tmp_path, suite_of(100, 300, PREFILL_CHUNK + 1))
    assert sizes == [3, 3, 1, 1, 1] * 2
    resolved = resolve_samples(suite_of(100, 300, PREFILL_CHUNK + 1), 128, 512)
    assert [sample.sample_id for sample in samples] == [sample.sample_id for sample in resolved]


def test_batch_size_follows_from_the_prompts_length() -> None:
    answerer = Answerer(tiny_model(), byte_tokenizer())
    assert answerer.batch_size(64) == BATCH_TOKENS // 64
    assert answerer.batch_size(504) == BATCH_TOKENS // 504
    for length in (PREFILL_CHUNK + 1, 2048, 12288, 10**6):
        assert answerer.batch_size(length) == 1
    assert Answerer(tiny_model(), byte_tokenizer(), chunk_tokens=8192).batch_size(8000) == 1


def test_stored_results_do_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(100, 300)
    together, sizes = evaluate(tmp_path / "together", suite)
    monkeypatch.setattr(answering, "BATCH_TOKENS", 1)
    alone, single_sizes = evaluate(tmp_path / "alone", suite)
    assert (sizes, single_sizes) == ([3] * 4, [1] * 12)
    assert without_time(together) == without_time(alone)
    for first, second in zip(together, alone, strict=True):
        assert first.loss_blocks == pytest.approx(second.loss_blocks, abs=1e-4)


@pytest.mark.parametrize(("most", "expected"), [(3, [6, 3, 3]), (1, [6, 3, 1, 1, 1, 3, 1, 1, 1])])
def test_a_batch_that_does_not_fit_is_answered_in_parts(tmp_path: Path, most: int, expected: list[int]) -> None:
    suite = suite_of(100)
    whole, _ = evaluate(tmp_path / "whole", suite)
    split, sizes = evaluate(tmp_path / "split", suite, most=most)
    assert sizes == expected
    assert without_time(split) == without_time(whole)
    assert {result.status for result in split} == {"ok"}


def test_batches_get_smaller_once_one_did_not_fit(tmp_path: Path) -> None:
    class SmallModel(torch.nn.Module):
        """Runs at most two rows."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def get_decoder(self) -> Any:
            def run(input_ids: torch.Tensor, **options: Any) -> Any:
                sizes.append(len(input_ids))
                if len(input_ids) > 2:
                    raise torch.OutOfMemoryError("tried to allocate too much")
                return self.inner.get_decoder()(input_ids, **options)

            return run

    sizes: list[int] = []
    suite, tokenizer = suite_of(100, 200, samples=4), byte_tokenizer()
    samples = sorted(resolve_samples(suite, 128, 512), key=lambda sample: sample.cell.length_tokens)
    answerer = Answerer(SmallModel(tiny_model(initializer_range=0.2)), tokenizer)
    evaluate_samples(answerer, builder_of(tokenizer, suite), suite, samples, SampleStore(tmp_path, {}, {}))
    assert [size for size in sizes if size > 2] == [12, 6, 3]
    assert {result.status for result in load_samples(tmp_path)} == {"ok"}
    assert answerer.batch_size(100) == 1


@pytest.mark.parametrize("kind", ["llama", "head_dim of its own"])
def test_the_cache_is_as_large_as_a_batch_is_planned_with(kind: str) -> None:
    model = tiny_model(**({} if kind == "llama" else {"head_dim": 24, "num_key_value_heads": 2}))
    cache = RewindableCache(model.config, 50)
    with torch.no_grad():
        model(torch.zeros((1, 50), dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert answering.cache_bytes_a_token(model.config, model.dtype) == held / 50


@pytest.mark.parametrize("asked", [1, "3", 50])
def test_an_asked_batch_size_holds_for_all_lengths(tmp_path: Path, asked: int | str) -> None:
    answerer = Answerer(tiny_model(), byte_tokenizer(), batch_size=asked)
    assert [answerer.batch_size(length) for length in (32, 1000, 10**6)] == [int(asked)] * 3


@pytest.mark.parametrize("asked", [0, -2, "many", "", 2.5, True, None])
def test_a_batch_size_that_is_none_is_refused(asked: Any) -> None:
    with pytest.raises(UsageError, match="'auto' or a whole number from 1"):
        parse_batch_size(asked)


def test_an_interrupted_evaluation_keeps_its_batch_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    suite, tokenizer = suite_of(100, 300), byte_tokenizer()
    samples = resolve_samples(suite, 128, 512)
    answerer = RecordingAnswerer(tiny_model(initializer_range=0.2), tokenizer)

    class Stopped(Exception):  # noqa: N818 - a signal, not an error
        pass

    def stop(result: SampleResult) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        evaluate_samples(answerer, builder_of(tokenizer, suite), suite, samples, SampleStore(tmp_path, {}, {}), stop)
    assert len(load_samples(tmp_path)) == 3
    told: list[str] = []
    evaluate_samples(
        answerer,
        builder_of(tokenizer, suite),
        suite,
        samples,
        SampleStore(tmp_path, {}, {}),
        lambda result: told.append(result.sample_id),
    )
    assert answerer.sizes == [3] * 4
    assert told == [sample.sample_id for sample in samples]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 12


def test_prompts_of_different_lengths_are_refused() -> None:
    answerer = Answerer(tiny_model(), byte_tokenizer())
    with pytest.raises(ValueError, match="one length"):
        answerer.answer_together([[1, 2, 3], [1, 2]], 4)
