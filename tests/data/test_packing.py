"""Training windows have exactly their length, carry each fact once with its question at the end, and are pure."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EOS, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ctxext.data import packing, words
from ctxext.data.facts import Fact, make_fact
from ctxext.data.packing import PackedWindow, WindowBuilder
from ctxext.data.tokenize import TokenStream, collect_tokens
from ctxext.errors import UsageError
from ctxext.recipe.data import DataBlock, FactsBlock, SourceBlock, WindowsBlock

TARGET = 4096
SKIP_WISE = WindowsBlock(mode="skip-wise", length=512)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@cache
def stream(num_tokens: int = 40_000) -> TokenStream:
    return collect_tokens(tokenizer(), [SourceBlock(kind="generated-words")], num_tokens, seed=0)


def builder(windows: WindowsBlock = SKIP_WISE, facts: FactsBlock | None = None, seed: int = 0) -> WindowBuilder:
    return WindowBuilder(stream(), DataBlock(windows=windows, facts=facts, seed=seed), tokenizer(), TARGET)


def facts_block(share: float = 1.0, per_window: int = 1, style: Any = "records") -> FactsBlock:
    return FactsBlock(share=share, per_window=per_window, style=style)


def text_of(ids: list[int]) -> str:
    """One character a token: bytes as they are, the end token as `|`."""
    text: str = tokenizer().decode(ids)
    return text.replace(EOS, "|")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Fact]:
    """Every fact that the builder draws, in order; the real ones."""
    facts: list[Fact] = []

    def recording(style: str, rng: random.Random) -> Fact:
        facts.append(make_fact(style, rng))
        return facts[-1]

    monkeypatch.setattr(packing, "make_fact", recording)
    return facts


@settings(max_examples=60)
@given(
    length=st.integers(400, 900),
    chunks=st.integers(2, 8),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    epoch=st.integers(0, 3),
    index=st.integers(0, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_have_exactly_their_length(
    length: int, chunks: int, share: float, epoch: int, index: int, seed: int
) -> None:
    windows = WindowsBlock(mode="skip-wise", length=length, chunks=chunks)
    window = builder(windows, facts_block(share), seed).build(epoch, index)
    assert len(window.input_ids) == length
    assert len(window.position_ids) == length
    positions = np.array(window.position_ids)
    assert positions[0] == 0
    assert (np.diff(positions) >= 1).all()
    assert positions[-1] < TARGET
    assert window.num_facts in (0, 1)


def test_full_length_windows_span_the_target_without_gaps() -> None:
    window = builder(WindowsBlock(), facts_block()).build(0, 3)
    assert window.position_ids == list(range(TARGET))
    assert len(window.input_ids) == TARGET


@pytest.mark.parametrize("style", ["records", "passkey"])
def test_a_fact_stands_once_and_answers_its_question_at_the_end(style: str, drawn: list[Fact]) -> None:
    build = builder(facts=facts_block(style=style)).build
    for index in range(70):
        drawn.clear()
        text = text_of(build(0, index).input_ids)
        (fact,) = drawn
        value = fact.answer.strip(" .\n")
        assert text.endswith(fact.question + fact.answer)
        body = text.removesuffix(fact.question + fact.answer)
        assert body.count(fact.statement) == 1
        assert body.count(value) == 1
        assert value in fact.statement


def test_several_facts_stand_once_each_before_all_questions(drawn: list[Fact]) -> None:
    build = builder(facts=facts_block(per_window=3), windows=WindowsBlock(mode="skip-wise", length=900)).build
    for index in range(40):
        drawn.clear()
        window = build(0, index)
        text = text_of(window.input_ids)
        assert window.num_facts == len(drawn) == 3
        first_question = min(text.index(fact.question + fact.answer) for fact in drawn)
        for fact in drawn:
            assert text.count(fact.statement) == 1
            assert text.count(fact.question + fact.answer) == 1
            assert text.index(fact.statement) < first_question
        assert len(text[first_question:]) == sum(len(fact.question + fact.answer) for fact in drawn)


def test_the_text_around_the_facts_is_unchanged(drawn: list[Fact]) -> None:
    plain, with_facts = builder(), builder(facts=facts_block(per_window=2))
    for index in range(40):
        drawn.clear()
        text = text_of(with_facts.build(0, index).input_ids)
        for fact in drawn:
            text = text.replace(fact.statement, "").replace(fact.question + fact.answer, "")
        assert text_of(plain.build(0, index).input_ids).startswith(text)


def test_windows_do_not_depend_on_what_was_built_before() -> None:
    places = [(epoch, index) for epoch in range(2) for index in range(20)]
    facts = facts_block(0.5, 2)
    in_order = {place: builder(facts=facts).build(*place) for place in places}
    shuffled = random.Random(0).sample(places, len(places))
    one = builder(facts=facts)
    assert {place: one.build(*place) for place in shuffled} == in_order


def test_epochs_and_seeds_draw_other_facts_and_positions() -> None:
    facts = facts_block()
    windows = [builder(facts=facts, seed=seed).build(epoch, 0) for seed in range(3) for epoch in range(3)]
    assert len({tuple(window.input_ids) for window in windows}) == 9
    assert len({tuple(window.position_ids) for window in windows}) == 9


def test_the_share_of_windows_with_facts_is_what_was_asked() -> None:
    build = builder(facts=facts_block(0.7)).build
    with_facts = sum(build(epoch, index).num_facts for epoch in range(5) for index in range(78))
    assert abs(with_facts / 390 - 0.7) < 0.08
    assert all(builder(facts=facts_block(0.0)).build(0, index).num_facts == 0 for index in range(30))


def test_statements_reach_both_ends_of_the_text(drawn: list[Fact]) -> None:
    build = builder(facts=facts_block()).build
    depths = []
    for epoch in range(4):
        for index in range(75):
            drawn.clear()
            text = text_of(build(epoch, index).input_ids)
            room = len(text) - len(drawn[0].statement + drawn[0].question + drawn[0].answer)
            depths.append(text.index(drawn[0].statement) / room)
    assert min(depths) == 0.0
    assert max(depths) == 1.0
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert (counts > 30).all()


def gap_of(window: PackedWindow) -> list[int]:
    """Indices at which the positions jump."""
    return [int(index) + 1 for index in np.flatnonzero(np.diff(window.position_ids) != 1)]


@pytest.mark.parametrize("chunks", [2, 4])
def test_a_gap_lies_between_the_statements_and_the_questions(chunks: int, drawn: list[Fact]) -> None:
    windows = WindowsBlock(mode="skip-wise", length=700, chunks=chunks)
    build = builder(windows, facts_block(per_window=2)).build
    covered = 0
    for index in range(50):
        drawn.clear()
        window = build(0, index)
        text = text_of(window.input_ids)
        last_end = max(text.index(fact.statement) + len(fact.statement) for fact in drawn)
        first_question = min(text.index(fact.question + fact.answer) for fact in drawn)
        gaps = gap_of(window)
        # A skip of zero, one in thousands, shows no gap at all.
        covered += any(last_end <= gap <= first_question for gap in gaps)
        if chunks == 2 and gaps:
            assert last_end <= gaps[0] <= first_question
    assert covered >= 49


@pytest.mark.parametrize("facts", [None, facts_block(), facts_block(per_window=2)], ids=["text", "one fact", "two"])
def test_documents_begin_where_the_window_says(facts: FactsBlock | None, drawn: list[Fact]) -> None:
    build = builder(facts=facts, windows=WindowsBlock(mode="skip-wise", length=900)).build
    num_after_end = num_others = 0
    for index in range(40):
        drawn.clear()
        window = build(0, index)
        text = text_of(window.input_ids)
        for start in window.document_starts:
            if start > 0 and not text.startswith(tuple(fact.statement for fact in drawn)):
                num_after_end += text[start - 1] == "|"
                num_others += text[start - 1] != "|"
        assert len(window.document_starts) in range(text[:-1].count("|"), text.count("|") + 2)
    assert num_after_end > 50
    # The document at which the source has given its share is cut, without an end token behind it.
    assert num_others <= 1


def test_generated_text_holds_no_word_of_the_questions() -> None:
    assert not {"magic", "number", "pass", "memorize", "quiz"} & set(words.WORDS)


def test_facts_that_leave_no_room_are_refused() -> None:
    windows = WindowsBlock(mode="skip-wise", length=160)
    with pytest.raises(UsageError, match=r"data\.facts\.per_window"):
        builder(windows, facts_block(per_window=8)).build(0, 0)


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    short = replace(stream(), ids=stream().ids[:100])
    with pytest.raises(UsageError, match="shorter than one window"):
        WindowBuilder(short, DataBlock(windows=SKIP_WISE), tokenizer(), TARGET)


def test_every_whole_window_of_the_stream_is_used() -> None:
    build = builder()
    assert build.num_windows == len(stream().ids) // 512
    joined = [token for index in range(build.num_windows) for token in build.build(0, index).input_ids]
    assert joined == [int(token) for token in stream().ids[: len(joined)]]
