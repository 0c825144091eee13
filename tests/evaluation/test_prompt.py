"""Prompts: exactly as long as asked, the needle whole and where it should be, whatever the tokenizer does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import NAMES, made_tokenizer
from support import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ctxext.data.boundaries import encode_plain
from ctxext.errors import UsageError
from ctxext.evaluation.haystack import Haystack, HaystackReader, load_haystack
from ctxext.evaluation.prompt import Prompt, PromptBuilder
from ctxext.evaluation.suite import Cell, Sample
from ctxext.evaluation.tasks.base import Span
from ctxext.evaluation.tasks.needle import WORDINGS

LENGTHS = (450, 451, 700, 1237)
DEPTHS = (0.0, 0.1, 0.5, 0.77, 1.0)


@pytest.fixture(scope="module", params=NAMES[:3], ids=lambda name: name.replace(" ", "-"))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return made_tokenizer(request.param)


def builder_for(tokenizer: Any, haystack: str = "generated-words", wording: str = "ruler", seed: int = 0) -> Any:
    reader = HaystackReader(load_haystack(haystack), lambda text: encode_plain(tokenizer, text))
    return PromptBuilder(tokenizer, reader, wording, seed)


def sample(length: int, depth: float, index: int = 0) -> Sample:
    return Sample(Cell("needle", length, depth), index)


def occurrences(ids: list[int], part: list[int]) -> list[int]:
    return [start for start in range(len(ids) - len(part) + 1) if ids[start : start + len(part)] == part]


def parts(tokenizer: Any, prompt: Prompt, wording: str = "ruler") -> tuple[list[int], list[int], list[int]]:
    """Ids of intro, needle and question, encoded apart."""
    form, filled = WORDINGS[wording], {"key": prompt.key, "value": prompt.expected}
    intro = encode_plain(tokenizer, form.intro) if form.intro else []
    return intro, *(encode_plain(tokenizer, text.format(**filled)) for text in (form.needle, form.question))


@pytest.mark.parametrize("wording", ["ruler", "passkey"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_have_exactly_the_asked_length_with_the_needle_whole_and_once(
    tokenizer: PreTrainedTokenizerFast, length: int, depth: float, wording: str
) -> None:
    prompt = builder_for(tokenizer, wording=wording).build(sample(length, depth))
    _, fact, question = parts(tokenizer, prompt, wording)
    assert len(prompt.input_ids) == length
    assert occurrences(prompt.input_ids, fact) == [prompt.needle_position]
    assert prompt.spans == (Span(prompt.needle_position, prompt.needle_position + len(fact), asked=True),)
    assert prompt.input_ids[-len(question) :] == question
    assert f" {prompt.expected}." in tokenizer.decode(fact)


@given(length=st.integers(450, 1500), depth=st.floats(0.0, 1.0), index=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_any_length_and_depth_is_met_exactly(length: int, depth: float, index: int) -> None:
    prompt = builder_for(byte_tokenizer()).build(sample(length, depth, index))
    assert len(prompt.input_ids) == length
    assert len(occurrences(prompt.input_ids, parts(byte_tokenizer(), prompt)[1])) == 1


def test_depth_0_and_1_lie_exactly_at_the_ends_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = builder_for(tokenizer)
    first, last = builder.build(sample(700, 0.0)), builder.build(sample(700, 1.0))
    intro, _, _ = parts(tokenizer, first)
    assert first.needle_position == len(intro) + (1 if tokenizer.bos_token else 0)
    _, fact, question = parts(tokenizer, last)
    assert last.needle_position == 700 - len(question) - len(fact)


def test_the_needle_stands_behind_the_nearest_sentence_end(tokenizer: PreTrainedTokenizerFast) -> None:
    for depth in (0.1, 0.33, 0.5, 0.77):
        prompt = builder_for(tokenizer).build(sample(1237, depth))
        before = tokenizer.decode(prompt.input_ids[: prompt.needle_position])
        assert before.rstrip(" ").endswith((".", "\n", "!", "?")), depth
        assert prompt.needle_position / 1237 == pytest.approx(depth, abs=0.15)


def test_bos_stands_once_at_the_start_and_never_inside(tokenizer: PreTrainedTokenizerFast) -> None:
    for wording in ("ruler", "passkey"):
        ids = builder_for(tokenizer, wording=wording).build(sample(700, 0.5)).input_ids
        expected = [0] if tokenizer.bos_token else []
        assert [place for place, token in enumerate(ids) if token == tokenizer.bos_token_id] == expected
        assert tokenizer.eos_token_id not in ids


def test_equal_seed_and_sample_give_the_same_prompt_whatever_was_built_before() -> None:
    tokenizer = byte_tokenizer()
    fresh = builder_for(tokenizer, "python-docs").build(sample(1237, 0.5, 3))
    used = builder_for(tokenizer, "python-docs")
    for depth in DEPTHS:
        used.build(sample(900, depth))
    assert used.build(sample(1237, 0.5, 3)) == fresh
    assert builder_for(tokenizer, "python-docs", seed=1).build(sample(1237, 0.5, 3)).input_ids != fresh.input_ids


def test_every_sample_has_a_haystack_key_and_value_of_its_own() -> None:
    builder = builder_for(byte_tokenizer())
    prompts = [builder.build(sample(700, depth, index)) for depth in DEPTHS for index in range(4)]
    assert len({prompt.haystack_sha256 for prompt in prompts}) == len(prompts) == 20
    assert len({prompt.expected for prompt in prompts}) == len(prompts)
    assert len({prompt.prompt_sha256 for prompt in prompts}) == len(prompts)


def test_a_haystack_never_repeats_a_document() -> None:
    documents = tuple(f"<document {number:04d}> " + "text " * (number % 7 + 1) for number in range(80))
    reader = HaystackReader(Haystack("numbered", documents, ""), lambda text: list(text.encode()))
    whole = bytes(reader.tokens("seed", 1900)).decode()
    found = [piece[:15] for piece in whole.split("\n\n")]
    assert len(found) > 40
    assert len(set(found)) == len(found)


def test_generated_haystacks_never_repeat_a_sentence() -> None:
    reader = HaystackReader(load_haystack("generated-words"), lambda text: list(text.encode()))
    sentences = bytes(reader.tokens("seed", 60_000)).decode().split(". ")
    assert len(set(sentences)) == len(sentences) > 1000


def test_python_documentation_is_never_trained_on() -> None:
    import pydoc_data.topics

    from ctxext.data.readers.builtin import stdlib_files

    files = stdlib_files()
    assert len(files) > 400
    assert not [path for path in files if "pydoc_data" in path.parts]
    haystack = load_haystack("python-docs")
    assert haystack.documents is not None
    assert len(haystack.documents) == len(pydoc_data.topics.topics) > 50


def test_a_length_without_room_for_text_is_refused_with_the_smallest_that_has() -> None:
    builder = builder_for(byte_tokenizer(), wording="passkey")
    with pytest.raises(UsageError, match="leaves no room for text") as caught:
        builder.build(sample(70, 0.5))
    smallest = int(str(caught.value.expected).split()[2])
    assert len(builder.build(sample(smallest, 0.5)).input_ids) == smallest
    with pytest.raises(UsageError, match="leaves no room"):
        builder.build(sample(smallest - 1, 0.5))


def test_a_haystack_shorter_than_the_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer()
    reader = HaystackReader(Haystack("short", ("one.", "two."), ""), lambda text: encode_plain(tokenizer, text))
    with pytest.raises(UsageError, match="never repeats text inside a prompt"):
        PromptBuilder(tokenizer, reader, "passkey", 0).build(sample(200, 0.5))
