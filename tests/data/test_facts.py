"""Training facts answer their own questions and share nothing with the evaluation's needles."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from ctxext.data import facts
from ctxext.data.facts import Fact, make_fact
from ctxext.evaluation.tasks import needle
from ctxext.evaluation.tasks.needle import WORDINGS, make_needle

NUM_DRAWN = 3000


def drawn(style: str) -> list[Fact]:
    return [make_fact(style, random.Random(f"{style}/{number}")) for number in range(NUM_DRAWN)]


RECORDS = drawn("records")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", re.sub(r"\{\w+\}", " ", text).lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """Runs of `length` words; a placeholder ends a run, since it holds no fixed word."""
    pieces = [words(piece) for piece in re.split(r"\{\w+\}", text)]
    return {tuple(piece[at : at + length]) for piece in pieces for at in range(len(piece) - length + 1)}


def training_templates() -> Iterator[str]:
    for _, statement, question, answer in facts._RECORDS:
        yield statement
        yield question + answer


def evaluation_templates() -> Iterator[str]:
    for wording in WORDINGS.values():
        yield from (wording.intro, wording.needle, wording.question)


@pytest.mark.parametrize("style", ["records", "passkey"])
def test_the_answer_stands_in_the_statement_and_not_in_the_question(style: str) -> None:
    for fact in drawn(style):
        value = fact.answer.strip(" .\n")
        assert len(value) >= 4
        assert fact.statement.count(value) == 1
        assert value not in fact.question


def test_statement_and_question_name_the_same_subject() -> None:
    subjects = [*facts._PLACES, *facts._GOODS, *(f"{first} {last}" for first in facts._FIRST for last in facts._LAST)]
    seen = set()
    for fact in RECORDS:
        named = [subject for subject in subjects if subject in fact.question]
        assert any(subject in fact.statement for subject in named)
        seen.add(max(named, key=len))
    assert len(seen) > 500


def test_every_template_is_drawn() -> None:
    for _, statement, _, _ in facts._RECORDS:
        start, _, end = statement.partition("{s}")
        share = (
            sum(start in fact.statement and end.partition("{v}")[0] in fact.statement for fact in RECORDS) / NUM_DRAWN
        )
        assert 0.12 < share < 0.22


def test_equal_seeds_give_equal_facts() -> None:
    assert drawn("records") == RECORDS


def test_training_text_shares_no_four_words_with_the_evaluation() -> None:
    training = set().union(*(runs(template, 4) for template in training_templates()))
    evaluation = set().union(*(runs(template, 4) for template in evaluation_templates()))
    assert len(training) > 30
    assert len(evaluation) > 20
    assert not training & evaluation


def test_drawn_facts_share_no_four_words_with_drawn_needles() -> None:
    training = set().union(*(runs(fact.statement + fact.question, 4) for fact in RECORDS))
    evaluation = set()
    for wording in WORDINGS:
        for number in range(500):
            sample = make_needle(wording, random.Random(number))
            evaluation |= runs(sample.intro, 4) | runs(sample.needle, 4) | runs(sample.question, 4)
    assert not training & evaluation


def test_training_facts_never_speak_of_magic_or_pass_keys() -> None:
    for fact in RECORDS:
        text = (fact.statement + fact.question + fact.answer).lower()
        assert "magic" not in text
        assert "special" not in text
        assert not re.search(r"pass\s?-?key", text)


def test_training_values_never_look_like_needle_values() -> None:
    for fact in RECORDS:
        assert not re.search(r"\d{7}", fact.statement + fact.question + fact.answer)
    assert {form.num_digits for form in WORDINGS.values()} == {5, 7}


def test_training_keys_are_never_adjective_noun_pairs() -> None:
    pairs = {f"{adjective}-{noun}" for adjective in needle._ADJECTIVES for noun in needle._NOUNS}
    for fact in RECORDS:
        text = (fact.statement + fact.question).lower()
        assert not any(pair in text for pair in re.findall(r"[a-z]+-[a-z]+", text) if pair in pairs)
    subjects = {subject.lower() for subject in [*facts._PLACES, *facts._GOODS]}
    assert not subjects & {pair.replace("-", " ") for pair in pairs}


def test_the_passkey_style_is_the_evaluations_own_wording() -> None:
    fact = make_fact("passkey", random.Random(0))
    wording = WORDINGS["passkey"]
    value = fact.answer.strip(" .")
    assert fact.statement == wording.needle.format(value=value)
    assert fact.question == wording.question
    assert len(value) == wording.num_digits


def test_unknown_styles_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown style"):
        make_fact("record", random.Random(0))
