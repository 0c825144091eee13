"""Work that is saved without changing an answer: many keys in one prefill, and guesses from the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support import byte_tokenizer, tiny_model

from ctxext.data.boundaries import encode_plain
from ctxext.errors import UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.engine import evaluate_samples
from ctxext.evaluation.fast import MOST_GUESSED, Lookup
from ctxext.evaluation.prompt import Prompt, suite_builder
from ctxext.evaluation.store import SampleStore, load_samples
from ctxext.evaluation.suite import Cell, Sample, Suite, resolve_samples

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def sweep(*lengths: int, samples: int = 2, needles: Sequence[float] = DEPTHS, **changes: Any) -> Suite:
    values = {
        "description": "t",
        "haystack": "generated-words",
        "tasks": [{"task": "needle_sweep", "needles": list(needles), "max_new_tokens": 6}],
        "grid": [{"length": length, "depths": DEPTHS, "samples": samples} for length in lengths],
        "loss_block_tokens": 64,
        **changes,
    }
    return Suite.model_validate(values)


def prompts_of(suite: Suite) -> dict[tuple[int, int], list[Prompt]]:
    """By length and index, depths ascending."""
    builder = suite_builder(suite, byte_tokenizer())
    rows: dict[tuple[int, int], list[Prompt]] = {}
    for sample in resolve_samples(suite, 128, 512):
        rows.setdefault((sample.cell.length_tokens, sample.index), []).append(builder.build(sample))
    return rows


def generated(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    prompt = torch.tensor([ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(ids) :].tolist()


# The task.


@pytest.mark.parametrize("haystacks", ["own", "paired", "shared"])
def test_all_depths_of_a_row_ask_about_one_text_and_each_about_the_needle_at_its_depth(haystacks: str) -> None:
    tokenizer, rows = byte_tokenizer(), prompts_of(sweep(2000, 3001, haystacks=haystacks))
    assert len(rows) == 4
    for (length, _), prompts in rows.items():
        texts = set()
        for depth, prompt in zip(DEPTHS, prompts, strict=True):
            assert len(prompt.input_ids) == length
            assert prompt.sample.cell.depth == depth
            end = max(span.end for span in prompt.spans)
            texts.add(tuple(prompt.input_ids[:end]))
            (asked,) = [span for span in prompt.spans if span.asked]
            needle = tokenizer.decode(prompt.input_ids[asked.start : asked.end])
            assert needle == f"\nOne of the special magic numbers for {prompt.key} is: {prompt.expected}.\n"
            assert asked.start == prompt.needle_position == prompt.spans[DEPTHS.index(depth)].start
            assert tokenizer.decode(prompt.input_ids[-80:]).count(prompt.key) == 1
        assert len(texts) == 1
        assert len({prompt.expected for prompt in prompts}) == len({prompt.key for prompt in prompts}) == len(DEPTHS)
        assert [span.start for span in prompts[0].spans] == sorted(span.start for span in prompts[0].spans)
        for prompt in prompts:
            assert {prompt.expected, *prompt.distractors} == {other.expected for other in prompts}


@pytest.mark.parametrize(("haystack", "haystacks"), [("generated-words", "own"), ("noise", "own"), ("noise", "shared")])
def test_questions_about_one_text_are_one_cluster(tmp_path: Path, haystack: str, haystacks: str) -> None:
    suite = sweep(1500, haystack=haystack, haystacks=haystacks)
    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    samples, store = resolve_samples(suite, 128, 512), SampleStore(tmp_path, {}, {})
    evaluate_samples(Answerer(model, tokenizer), suite_builder(suite, tokenizer), suite, samples, store)
    clusters: dict[int, set[str]] = {}
    for result in load_samples(tmp_path):
        assert result.task == "needle_sweep"
        clusters.setdefault(result.index, set()).add(cluster_of(result))
    assert [len(of_index) for of_index in clusters.values()] == [1, 1]
    assert clusters[0] != clusters[1]


def test_one_prefill_serves_all_questions_and_answers_are_those_of_plain_generate(tmp_path: Path) -> None:
    suite = sweep(1500)
    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    builder, samples = suite_builder(suite, tokenizer), resolve_samples(suite, 128, 512)
    report = evaluate_samples(Answerer(model, tokenizer), builder, suite, samples, SampleStore(tmp_path, {}, {}))
    assert report.num_sharing == len(samples) == 10
    # Two texts of 1500 bytes, and eight times a question and its needle's neighbourhood.
    assert report.work.num_prefilled < 2 * 1500 + 8 * 200 < 0.35 * report.work.num_prompt_tokens
    answers = {result.sample_id: result.answer_ids for result in load_samples(tmp_path)}
    for sample in samples:
        assert answers[sample.sample_id] == generated(model, builder.build(sample).input_ids, 6)
    assert len({tuple(ids) for ids in answers.values()}) > 2


def test_depths_without_a_needle_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"needle_sweep: no needle at depth 0\.75"):
        sweep(1500, needles=[0.0, 0.25, 0.5, 1.0])
    with pytest.raises(ValidationError, match="ascending"):
        sweep(1500, needles=[0.5, 0.25])
    with pytest.raises(UsageError, match="no needle stands at this depth"):
        suite_builder(sweep(1500), byte_tokenizer()).build(Sample(Cell("needle_sweep", 1500, 0.3), 0))


def test_a_sweep_and_a_grid_of_single_needles_keep_their_own_cells() -> None:
    both = sweep(1500).model_copy(
        update={"tasks": [*sweep(1500).members, *Suite.model_validate(NEEDLE).members]},
    )
    names = {sample.cell.task for sample in resolve_samples(both, 128, 512)}
    assert names == {"needle", "needle_sweep"}
    alone = suite_builder(sweep(1500), byte_tokenizer())
    beside = suite_builder(both, byte_tokenizer())
    for sample in resolve_samples(sweep(1500), 128, 512):
        assert alone.build(sample) == beside.build(sample)


NEEDLE = {"description": "t", "tasks": [{"task": "needle"}], "grid": [{"length": 99, "depths": [0.5], "samples": 1}]}

# The lookup.


def plainly(text: list[int], most: int) -> list[int]:
    """The same guess by trying every place."""
    best: tuple[int, int] | None = None
    for end in range(len(text) - 1):
        alike = 0
        while alike <= end and alike < 16 and text[end - alike] == text[-1 - alike]:
            alike += 1
        if alike >= 2 and (best is None or (alike, end) >= best):
            best = alike, end
    return [] if best is None else text[best[1] + 1 : best[1] + 1 + most]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 6), st.integers(1, 50))
def test_a_guess_is_what_followed_the_longest_and_latest_likeness(text: list[int], most: int, room: int) -> None:
    lookup = Lookup(room)
    lookup.add(text[: len(text) // 2])
    lookup.add(text[len(text) // 2 :])
    assert lookup.guess(most) == (plainly(text, most) if most else [])


def test_guesses_from_the_text_save_passes_and_change_no_token() -> None:
    model, tokenizer = tiny_model(initializer_range=0.2, eos_token_id=None), byte_tokenizer()
    tokenizer.eos_token = None
    saved = 0
    for seed in range(6):
        ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        answerer = Answerer(model, tokenizer, chunk_tokens=50)
        # A random model soon says the same thing again and again.
        assert answerer.answer(ids, 80).ids == generated(model, ids, 80)
        saved += answerer.work.num_verified
    assert saved > 10


def test_answers_of_a_trunk_help_the_next_ones() -> None:
    model, tokenizer = tiny_model(initializer_range=0.2, eos_token_id=None), byte_tokenizer()
    tokenizer.eos_token = None
    ids = encode_plain(tokenizer, "nothing in here is said twice, or so one hopes")
    answerer = Answerer(model, tokenizer)
    first, second = (answer.ids for _, answer in answerer.answer_sharing([ids, ids], 30))
    alone = Answerer(model, tokenizer)
    assert first == second == alone.answer(ids, 30).ids == generated(model, ids, 30)
    assert answerer.work.num_verified > 2 * alone.work.num_verified + MOST_GUESSED
