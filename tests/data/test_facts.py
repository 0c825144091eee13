"""Training facts answer their own questions and share neither wording nor forms with any evaluation task."""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from pydantic import TypeAdapter

from ctxext.data import facts
from ctxext.data.facts import Fact, make_fact
from ctxext.evaluation.tasks import needle
from ctxext.evaluation.tasks.base import Draft
from ctxext.evaluation.tasks.needle import WORDINGS
from ctxext.evaluation.tasks.registry import TASKS, AnyTask

NUM_DRAWN = 3000
NUM_DRAFTS = 120
SHARED_WORDS = 4
OWN_STYLES = ("records", "tables", "references", "mixed")
# Every task is drawn with its defaults; these are the options that change its texts.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "needle": [
        {"wording": "passkey"},
        {"values": "uuids", "keys": "uuids"},
        {"values": "words", "haystack": "needles"},
        {"num_keys": 4, "num_values": 2, "num_queries": 4},
    ],
    "variable_tracking": [{"num_chains": 4}],
    "common_words": [{"example": False}],
    "qa": [{"hops": 2}],
}
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# A twelfth of the values of `records`, for the sake of recorded results; the module says so.
FIVE_DIGITS = "form 99999"


@cache
def drawn(style: str) -> tuple[Fact, ...]:
    return tuple(make_fact(style, random.Random(f"{style}/{number}")) for number in range(NUM_DRAWN))


def text_of(fact: Fact) -> str:
    return fact.statement + fact.question + fact.answer


def value_of(fact: Fact) -> str:
    return fact.answer.strip().removesuffix(".")


@cache
def drafts() -> tuple[tuple[str, Draft], ...]:
    """Samples of every registered task and of its variants."""
    adapter: TypeAdapter[Any] = TypeAdapter(AnyTask)
    made = []
    for name in TASKS:
        for options in ({}, *VARIANTS.get(name, ())):
            task = adapter.validate_python({"task": name, **options})
            for number in range(NUM_DRAFTS):
                made.append((name, task.draft(random.Random(f"{options}/{number}"), 4096, number % 11 / 10)))
    return tuple(made)


def evaluation_texts() -> Iterator[str]:
    for number, (_, draft) in enumerate(drafts()):
        yield draft.intro
        yield draft.question + draft.answer_prefix
        yield from (item.text for item in getattr(draft.body, "items", ()))
        if hasattr(draft.body, "filler"):
            filler = random.Random(f"filler/{number}")
            yield from (draft.body.filler(filler) for _ in range(10))


def runs(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"[a-z']+", text.lower())
    return {tuple(found[at : at + SHARED_WORDS]) for at in range(len(found) - SHARED_WORDS + 1)}


def form(value: str) -> str:
    """What a key or an answer looks like: digits counted, words by their case, UUIDs as such."""
    if UUID.fullmatch(value):
        return "uuid"
    return re.sub(r"[a-z]+", "a", re.sub(r"[A-Z]+", "A", re.sub(r"\d", "9", value)))


def pattern_of(shape: str) -> re.Pattern[str] | None:
    """Finds the form in running text; None for plain words, which stand everywhere."""
    if shape == "uuid":
        return UUID
    if not re.search(r"\d|[^\sAa']", shape) or len(shape) > 24:
        return None
    parts = {"9": r"\d", "A": "[A-Z]+", "a": "[a-z]+"}
    body = "".join(parts.get(letter, re.escape(letter)) for letter in shape)
    return re.compile(rf"(?<![\w./-]){body}(?![\w/-])")


def names_in(values: set[str]) -> set[str]:
    return {word for value in values for word in re.findall(r"\b[A-Z][a-z]{2,}", value)}


@cache
def evaluation_side() -> tuple[set[tuple[str, ...]], set[str], list[tuple[str, re.Pattern[str]]], set[str]]:
    """Runs of words, forms of answers and keys, the patterns of those forms, and names, over all tasks."""
    wordings = set[tuple[str, ...]]().union(*(runs(text) for text in set(evaluation_texts())))
    answers, keys = set[str](), set[str]()
    for task, draft in drafts():
        answers |= {*draft.answers, *draft.distractors}
        if task not in ("no_overlap", "cloze"):  # whose keys are sentences
            keys |= set(re.split(r", and |, ", draft.key)) - {""}
    forms = {form(value) for value in answers | keys}
    patterns = [(shape, pattern) for shape in sorted(forms) if (pattern := pattern_of(shape))]
    return wordings, forms, patterns, names_in(answers | keys)


def violations(made: tuple[Fact, ...]) -> set[str]:
    """Everything that training facts have in common with an evaluation task."""
    wordings, forms, patterns, names = evaluation_side()
    found = set[str]()
    for fact in made:
        text = text_of(fact)
        found |= {f"words {' '.join(run)}" for run in runs(text) & wordings}
        found |= {f"form {shape}" for shape, pattern in patterns if pattern.search(text)}
        if form(value_of(fact)) in forms:
            found.add(f"form {form(value_of(fact))}")
        found |= {f"name {name}" for name in names_in({text}) & names}
        if re.search(r"magic|special|pass\s?-?key|\bVAR\b", text, re.IGNORECASE):
            found.add("a word of the evaluation's own")
    return found


@pytest.mark.parametrize("style", [*OWN_STYLES, "passkey"])
def test_the_answer_stands_once_in_the_statements_and_not_in_the_question(style: str) -> None:
    for fact in drawn(style):
        assert len(value_of(fact)) >= 4
        assert sum(statement.count(value_of(fact)) for statement in fact.statements) == 1
        assert value_of(fact) not in fact.question


def test_statement_and_question_name_the_same_subject() -> None:
    subjects = [*facts._PLACES, *facts._GOODS, *(f"{first} {last}" for first in facts._FIRST for last in facts._LAST)]
    for style in ("records", "tables"):
        seen = set()
        for fact in drawn(style):
            named = [subject for subject in subjects if subject in fact.question]
            assert any(subject in fact.statement for subject in named)
            seen.add(max(named, key=len))
        assert len(seen) > 400


def test_every_template_is_drawn() -> None:
    for _, statement, _, _ in facts._RECORDS:
        start, _, end = statement.partition("{s}")
        share = sum(start in f.statement and end.partition("{v}")[0] in f.statement for f in drawn("records"))
        assert 0.12 < share / NUM_DRAWN < 0.22
    for _, first_lines, _, _, _ in facts._TABLES:
        assert 0.2 < sum(fact.statement.startswith(first_lines) for fact in drawn("tables")) / NUM_DRAWN < 0.3
    for _, last, _, _ in facts._CHAINS:
        words = last.rpartition("}")[0].rpartition("}")[2].partition("{")[0]
        share = sum(words in fact.statements[-1] for fact in drawn("references")) / NUM_DRAWN
        assert 0.15 < share < 0.25


def test_mixed_draws_all_three_structures() -> None:
    sizes = [(len(fact.statements), fact.statement.count("\n")) for fact in drawn("mixed")]
    references = sum(count > 1 for count, _ in sizes)
    tables = sum(count == 1 and lines > 3 for count, lines in sizes)
    for share in (references, tables, NUM_DRAWN - references - tables):
        assert 0.28 < share / NUM_DRAWN < 0.39


def test_one_row_of_a_table_is_asked_for_and_any_row_may_be() -> None:
    places = set()
    for fact in drawn("tables"):
        rows = [line for line in fact.statement.splitlines() if re.search(r"\d\d", line)]
        assert 3 <= len(rows) <= 7
        assert len({row.replace(value_of(fact), "") for row in rows}) == len(rows)
        places.add(next(number for number, row in enumerate(rows) if value_of(fact) in row) / (len(rows) - 1))
    assert {0.0, 1.0} < places


def test_a_reference_cannot_be_answered_from_the_statement_that_holds_the_value() -> None:
    """What the question names does not stand beside the value, and a second value stands there as well."""
    for fact in drawn("references"):
        holder = next(statement for statement in fact.statements if value_of(fact) in statement)
        named = [
            *re.findall(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b", fact.question),
            *(g for g in facts._GOODS if g in fact.question),
        ]
        assert named
        assert not any(name in holder for name in named)
        assert any(name in statement for name in named for statement in fact.statements)
        assert len({s for s in fact.statements if re.search(r"\d\d", s)}) == 2
        assert len(fact.statements) in (3, 4)


def test_the_chain_of_a_reference_leads_to_the_right_value() -> None:
    """Following shared names from the question reaches the value's statement and never the one that leads astray."""
    names = [*facts._PLACES, *facts._GOODS, *(f"{first} {last}" for first in facts._FIRST for last in facts._LAST)]
    for fact in drawn("references")[:600]:
        known = {name for name in names if name in fact.question}
        for _ in fact.statements:
            for statement in fact.statements:
                here = {name for name in names if name in statement}
                known |= here if known & here else set()
        holder = next(statement for statement in fact.statements if value_of(fact) in statement)
        astray = fact.statements[-1]
        assert any(name in holder for name in known)
        assert not any(name in astray for name in known)


@pytest.mark.parametrize("style", OWN_STYLES)
def test_equal_seeds_give_equal_facts(style: str) -> None:
    again = tuple(make_fact(style, random.Random(f"{style}/{number}")) for number in range(200))
    assert again == drawn(style)[:200]


def test_every_task_of_the_registry_is_compared() -> None:
    names = {name for name, _ in drafts()}
    assert names == set(TASKS)
    assert len(drafts()) >= NUM_DRAFTS * (len(TASKS) + sum(map(len, VARIANTS.values())))
    wordings, forms, patterns, proper_names = evaluation_side()
    assert len(wordings) > 300
    assert {"9999999", "99999", "uuid", "a-a", "A", "a", "Aa", "Aa A. Aa", "Aa & Aa"} <= forms
    assert len(patterns) >= 6
    assert {"Ashgrove", "Aldwin", "Beatrix", "Paris"} <= proper_names


@pytest.mark.parametrize("style", OWN_STYLES)
def test_training_facts_have_nothing_in_common_with_any_task(style: str) -> None:
    known = {FIVE_DIGITS} if style == "records" else set()
    assert violations(drawn(style)) == known


def test_the_known_exception_is_as_rare_as_the_module_says() -> None:
    share = sum(form(value_of(fact)) == "99999" for fact in drawn("records")) / NUM_DRAWN
    assert share == pytest.approx(1 / 12, abs=0.02)


def _mutants() -> dict[str, Callable[[random.Random], tuple[str, str, str]]]:
    """Statement, question and answer of styles that must be caught."""

    def code(rng: random.Random) -> str:
        return f"{rng.randrange(10, 99)}-{rng.randrange(10, 99)}-{rng.randrange(10, 99)}"

    def asked(subject: str, value: str) -> tuple[str, str, str]:
        return f"\nShelf of {subject}: {value}.\n", f"\nThe shelf of {subject} is", f" {value}.\n"

    def hyphenated(rng: random.Random) -> str:
        return f"{rng.choice(needle._ADJECTIVES)}-{rng.choice(needle._NOUNS)}"

    def an_uuid(rng: random.Random) -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def capitals(rng: random.Random) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=5))

    def ruler(rng: random.Random) -> tuple[str, str, str]:
        value = code(rng)
        form = WORDINGS["ruler"]
        return form.needle.format(key="rye", value=value), form.question.format(key="rye"), f" {value}."

    def pass_key(rng: random.Random) -> tuple[str, str, str]:
        value = code(rng)
        return f" the pass key is {value}.", " what is the pass key? the pass key is", f" {value}."

    return {
        "seven digits": lambda rng: asked("rye flour", str(rng.randrange(10**6, 10**7))),
        "five digits": lambda rng: asked("rye flour", str(rng.randrange(10**4, 10**5))),
        "uuids": lambda rng: asked("rye flour", an_uuid(rng)),
        "a word": lambda rng: asked("rye flour", rng.choice(["garden", "window"])),
        "a hyphenated pair": lambda rng: asked("rye flour", hyphenated(rng)),
        "an adjective-noun key": lambda rng: asked(hyphenated(rng), code(rng)),
        "an uuid as key": lambda rng: asked(an_uuid(rng), code(rng)),
        "a variable": lambda rng: asked("rye flour", capitals(rng)),
        "a chain of variables": lambda rng: asked(f"VAR {capitals(rng)}", code(rng)),
        "ruler's wording": ruler,
        "the pass key's wording": pass_key,
        "a person with an initial": lambda rng: asked("Alma J. Abbott", code(rng)),
        "a town of qa": lambda rng: asked("the depot in Ashgrove", code(rng)),
        "a firm of qa": lambda rng: asked("Abbott & Engel", code(rng)),
        "a name of no_overlap": lambda rng: asked("Aldwin", code(rng)),
        "qa's instruction": lambda rng: (
            "\nRye: 12-34-56.\n",
            "\nAnswer the question based on the given documents. Where is the rye?",
            " 12-34-56.\n",
        ),
        "kv's instruction": lambda rng: (
            "\nRye: 12-34-56.\n",
            "\nExtract the value corresponding to the rye.",
            " 12-34-56.\n",
        ),
    }


@pytest.mark.parametrize("mutant", sorted(_mutants()))
def test_styles_that_imitate_a_task_are_caught(mutant: str) -> None:
    made = [_mutants()[mutant](random.Random(number)) for number in range(30)]
    assert violations(tuple(Fact((statement,), question, answer) for statement, question, answer in made))


def test_the_passkey_style_is_the_evaluations_own_wording() -> None:
    fact = make_fact("passkey", random.Random(0))
    wording = WORDINGS["passkey"]
    value = value_of(fact)
    assert fact.statement == wording.needle.format(value=value)
    assert fact.question == wording.question
    assert len(value) == wording.num_digits
    assert violations(drawn("passkey")[:50])


def test_unknown_styles_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown style"):
        make_fact("record", random.Random(0))
