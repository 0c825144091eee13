"""The guard finds what was copied from the evaluation, however it is wrapped, and nothing that was not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxext.data.bad_rows import BadRows
from ctxext.data.contamination import LEAST_WORDS, RUN_WORDS, ContaminationResult, Guard, fixed_parts
from ctxext.data.runs import batches, plain_words
from ctxext.data.sources import read_part, source_parts
from ctxext.data.words import WORDS, document
from ctxext.errors import ArtefactError
from ctxext.evaluation.haystack import load_haystack
from ctxext.recipe.data import SourceBlock

HAYSTACK = [document(f"haystack/{number}", 30) for number in range(40)]
PASSAGE = " ".join(HAYSTACK[7].split()[20 : 20 + LEAST_WORDS])
REST = document("rest", 60)


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard({"haystack h": HAYSTACK}, {"wording of w": ["one of the special magic numbers for"]})


@pytest.mark.parametrize(
    "text",
    [
        f"{REST} {PASSAGE} {REST}",
        PASSAGE.upper(),
        "\n".join(PASSAGE.split()),
        f"# {PASSAGE.replace(' ', ' -- ').replace('.', ' ! ')}",
        f"{REST}“{PASSAGE.replace('.', '…')}”",
        f"    {PASSAGE.replace(' ', chr(0x00A0))}",
    ],
)
def test_a_copied_passage_is_found_in_any_dress(guard: Guard, text: str) -> None:
    result = guard.scan(["nothing here", text, REST], "report")
    assert result.documents == (1,)
    (finding,) = result.findings
    assert finding.reference == "haystack h"
    assert finding.num_words == LEAST_WORDS
    assert finding.of_words == len(plain_words(text))
    assert plain_words(finding.excerpt)[:5] == plain_words(PASSAGE)[:5]
    assert result.found
    assert "1 of 3" in result.sentence()


def test_a_quoted_sentence_is_told_apart_from_contamination(guard: Guard) -> None:
    quoted = " ".join(PASSAGE.split()[:RUN_WORDS])
    result = guard.scan([f"{REST} {quoted} {REST}"], "refuse")
    assert not result.findings
    assert result.num_quoting == 1
    assert "quote fewer than 50 words" in result.sentence()
    # Where it is most of a document, it is a copy.
    assert guard.scan([f"see: {quoted}"], "report").documents == (0,)


def test_fewer_words_in_a_row_are_no_overlap(guard: Guard) -> None:
    words = PASSAGE.split()
    broken = " ".join(word if number % (RUN_WORDS - 1) else f"{word} x" for number, word in enumerate(words))
    assert guard.scan([broken], "report").num_quoting == 0
    assert not guard.scan([broken], "report").findings


def test_a_wording_counts_at_once_and_with_any_value(guard: Guard) -> None:
    result = guard.scan([f"{REST} One of the special\nmagic numbers for big-cat is: 1234567. {REST}"], "report")
    assert [finding.reference for finding in result.findings] == ["wording of w"]
    assert not guard.scan([f"{REST} one of the special numbers for magic {REST}"], "report").findings


def test_equal_hashes_are_compared_as_text() -> None:
    """Bytes behind the 64th of a word are hashed without their order, so these two words have one hash."""
    one, other = (f"{'x' * 70}{tail}" for tail in ("ab", "ba"))
    guard = Guard({"haystack h": [f"the word {one} stands here"]}, {})
    assert guard.scan([f"the word {one} stands here"], "report").documents == (0,)
    result = guard.scan([f"the word {other} stands here"], "report")
    assert not result.findings
    assert not result.num_quoting


def test_short_reference_documents_are_looked_for_as_a_whole() -> None:
    guard = Guard({"haystack h": ["The grass is green. The sky is blue."]}, {})
    assert guard.scan(["the grass is green, the sky is blue"], "report").documents == (0,)
    assert not guard.scan(["the grass is green, the sky is red"], "report").findings


def test_runs_do_not_cross_from_one_document_into_the_next(guard: Guard) -> None:
    words = PASSAGE.split()
    halves = [" ".join(words[:12]), " ".join(words[12:24])]
    assert not guard.scan(halves, "report").findings
    assert guard.scan([" ".join(halves)], "report").documents == (0,)


def test_policies_refuse_leave_out_or_tell(guard: Guard) -> None:
    texts = [REST, PASSAGE]
    with pytest.raises(ArtefactError, match=r"^second: 1 of 2 training documents.*data\.contamination=exclude"):
        guard.scan(texts, "refuse", ["first", "second"].__getitem__)
    excluded = guard.scan(texts, "exclude")
    assert excluded.excluded == {1: "holds text of haystack h"}
    assert not excluded.found
    assert "left out" in excluded.sentence()
    told = guard.scan(texts, "report", ["first", "second"].__getitem__)
    assert told.excluded == {}
    assert told.found
    assert told.lines()[0].startswith(f"second: {LEAST_WORDS} of its {LEAST_WORDS} words are of haystack h")
    assert told.to_json()["findings"][0]["name"] == "second"
    kept = ContaminationResult.from_json(json.loads(json.dumps(told.to_json())))
    assert kept == told
    assert kept.under("exclude").excluded == excluded.excluded
    with pytest.raises(ArtefactError, match="second"):
        kept.under("refuse")


def test_without_fixed_texts_nothing_is_claimed() -> None:
    result = Guard({}, {}).scan([REST], "refuse")
    assert not result.found
    assert "not checked" in result.sentence()


def test_scripts_without_spaces_are_compared_by_character() -> None:
    text = "日本政府は木曜日に新しいエネルギー法を決定した。来年一月から施行される。"
    guard = Guard({"haystack h": [text]}, {})
    assert guard.scan([f"ニュース:{text[2:]}"], "report").documents == (0,)
    assert not guard.scan(["日本政府は金曜日に古いエネルギー法を廃止した。"], "report").findings


def test_pythons_library_is_clean_of_its_documentation_but_for_the_module_that_is_never_read() -> None:
    """The default training text against the default haystack: all files, and what is really read beside that module."""
    guard = Guard({"haystack python-docs": load_haystack("python-docs").documents or ()}, {})
    source = SourceBlock(kind="python-stdlib")
    parts = source_parts(source, 0)
    files = [Path(path) for part in parts for path in part.paths]
    assert len(files) > 400
    result = guard.scan((path.read_text(encoding="utf-8", errors="replace") for path in files), "report")
    assert {files[number].name for number in result.documents} == {"pdb.py"}
    (part,) = [part for part in parts if any(path.endswith("/pdb.py") for path in part.paths)]
    read = [document for _, document in read_part(source, part, 0, start=0, bad=BadRows())]
    assert not any(document.origin.startswith("pdb.py") for document in read)
    assert not guard.scan([document.text for document in read], "refuse").findings


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 80), st.integers(13, 40))
def test_the_quick_search_finds_what_a_plain_one_finds(seed: int, before: int, copied: int) -> None:
    rng = random.Random(seed)
    vocabulary = WORDS[:6]  # few words, so that runs of the same words abound
    reference = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 60))) for _ in range(5)]
    text = " ".join(rng.choices(vocabulary, k=before))
    source = rng.choice(reference).split()
    text = f"{text} {' '.join(source[:copied])}"
    known = set()
    for one in reference:
        words = one.split()
        size = min(RUN_WORDS, len(words))
        known |= {tuple(words[at : at + size]) for at in range(len(words) - size + 1)} if size >= 4 else set()
    mine = text.split()
    covered = {
        place
        for run in known
        for at in range(len(mine) - len(run) + 1)
        if tuple(mine[at : at + len(run)]) == run
        for place in range(at, at + len(run))
    }
    result = Guard({"haystack h": reference}, {}).scan([text], "report")
    assert result.num_words == len(mine)
    if result.findings:
        assert result.findings[0].num_words == len(covered)
    assert bool(result.findings) == bool(covered and (len(covered) >= LEAST_WORDS or 2 * len(covered) >= len(mine)))
    assert bool(result.num_quoting) == bool(covered and not result.findings)


def test_words_are_what_people_take_for_words() -> None:
    assert plain_words("Don't stop — “Hello” naïve CAFÉ a_b 12.5 x") == "don t stop hello naïve café a b 12 5 x".split()
    assert plain_words("日本語。テスト abc日x 한국") == [
        "日",
        "本",
        "語",
        "テ",
        "ス",
        "ト",
        "abc",
        "日",
        "x",
        "한",
        "국",
    ]
    assert plain_words("") == plain_words(" \n…") == []


def test_batches_hash_words_alike_wherever_they_stand() -> None:
    texts = [document(str(number)) for number in range(50)] + ["ÀÉ naïve", "", "x" * 200, "x" * 199 + "y"]
    one = np.concatenate([batch.words for _, batch in batches(texts, size=1)])
    for size in (100, 1 << 20):
        assert np.array_equal(np.concatenate([batch.words for _, batch in batches(texts, size=size)]), one)
    words = [word for text in texts for word in plain_words(text)]
    assert len(words) == len(one)
    by_word = dict(zip(words, one.tolist(), strict=True))
    assert len(set(by_word.values())) == len(by_word)
    assert [first for first, _ in batches(texts[:50], size=1)] == list(range(50))


def test_fixed_parts_are_the_wording_without_what_is_drawn() -> None:
    def sample(number: int) -> list[str]:
        rng = random.Random(number)
        key, value = f"{rng.choice(WORDS)}-{rng.choice(WORDS)}", rng.randrange(10**6, 10**7)
        return [
            f"One of the special magic numbers for {key} is: {value}.",
            f"What is the special magic number for {key} mentioned in the provided text?",
            f" the pass key is {value}.",
            " ".join(rng.choices(WORDS, k=40)),
            f"It was {rng.choice(WORDS)}.",
        ]

    assert set(fixed_parts([sample(number) for number in range(100)])) == {
        "one of the special magic numbers for",
        "what is the special magic number for",
        "the pass key is",
    }
    # Fewer than six words, and less than most of the text: said by anybody.
    assert "mentioned in the provided text" not in fixed_parts([sample(number) for number in range(100)])
