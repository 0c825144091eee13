"""Synthetic retrieval data for training: facts, and questions about them.

It trains *retrieval*, which is not context extension; a recipe declares its share and every report repeats it.

    records      one statement in prose, one question about it
    tables       a small table of keys and values, one row is asked for
    references   statements that name one another: two or three have to be joined, and one more leads astray
    mixed        any of the three

All are kept apart from every evaluation task: other wordings (no "magic number", no "pass key"), other keys (people
with first and last name, places, goods), other answers (codes of digits with letters, dashes or slashes, never a bare
number, a word or a UUID) and another structure (questions are followed by their answers inside running text). One
exception stands for the sake of recorded results: a twelfth of the values of `records` are bare numbers of five digits,
which is what a pass key looks like; plans whose suite asks for such numbers say so. `passkey` is the evaluation's own
wording; only the tiny demonstration model uses it, and says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

PASSKEY_FACT = " the pass key is {value}."
PASSKEY_QUESTION = " what is the pass key? the pass key is"
PASSKEY_DIGITS = 5

_LETTERS = "BCDFGHKLMNPRSTVWX"
_FIRST = """
    Alma Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Kavya Lionel Maren Nadia Oskar Petra Quentin Rosa
    Stefan Tamar Ulrich Vera Wendel Xenia Yusuf Zora
    """.split()
_LAST = """
    Abbott Bergman Castell Dorsey Engel Fontaine Grieve Holm Ibarra Jansen Keller Lindqvist Moreau Novak Okafor
    Pereira Quist Rahman Soler Tanaka Ueda Voss Weber Yilmaz Zeman
    """.split()
_PLACES = [
    "the east pump house",
    "the old tram depot",
    "the lower greenhouse",
    "the chapel annex",
    "the ferry landing",
    "the north stairwell",
    "the quarry office",
    "the seed vault",
    "the tide station",
    "the upper reservoir",
    "the print shop",
    "the map room",
    "the brewery yard",
    "the signal tower",
    "the fish market",
    "the observatory dome",
]
_GOODS = [
    "barley",
    "copper wire",
    "dried figs",
    "felt hats",
    "glass beads",
    "hemp rope",
    "ink bottles",
    "juniper oil",
    "lamp wicks",
    "maple syrup",
    "nutmeg",
    "oak barrels",
    "paper reams",
    "quartz lenses",
    "rye flour",
    "saffron",
    "tin cups",
    "wool yarn",
]


@dataclass(frozen=True)
class Fact:
    """One fact and the question about it.

    Attributes:
        statements: each goes somewhere into the text, apart from the others.
        question: goes to the end of the window, followed by `answer`.
    """

    statements: tuple[str, ...]
    question: str
    answer: str

    @property
    def statement(self) -> str:
        """All statements in one piece."""
        return "".join(self.statements)


# (kind of subject, statement, question, answer); {s} is the subject, {v} the value.
_RECORDS: tuple[tuple[str, str, str, str], ...] = (
    (
        "person",
        "\nNote for the porter: {s}'s locker opens with the combination {v}.\n",
        "\nQuestion: With which combination does {s}'s locker open?\nAnswer:",
        " {v}\n",
    ),
    (
        "goods",
        "\nThe crate of {s} was entered in the ledger under {v}.\n",
        "\nUnder which entry does the ledger list the crate of {s}? It is listed under",
        " {v}.\n",
    ),
    (
        "place",
        "\nMeter reading taken at {s}: {v}.\n",
        "\nLooking back, the meter reading that was taken at {s} came to",
        " {v}.\n",
    ),
    (
        "person",
        "\n({s} can be reached at extension {v}.)\n",
        "\nQ: At which extension can {s} be reached?\nA:",
        " {v}\n",
    ),
    (
        "place",
        "\nThe spare door at {s} was last serviced under work order {v}.\n",
        "\nWork order of the last service of the spare door at {s}:",
        " {v}\n",
    ),
    (
        "goods",
        "\nSupplier's reference for {s} - {v} - valid until further notice.\n",
        "\nTo order {s} again, quote the supplier's reference, which the text above gives as",
        " {v}.\n",
    ),
)


# (kind of subject, first lines, one row, question, answer); one row of a table is asked for.
_TABLES: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "person",
        "\nLocker roll, as checked on Friday\n",
        "  {s} ... {v}\n",
        "\nBeside the name of {s} the locker roll has",
        " {v}.\n",
    ),
    (
        "goods",
        "\n| goods in store | lot |\n|---|---|\n",
        "| {s} | {v} |\n",
        "\nQ: Which lot does the store's table give to {s}?\nA:",
        " {v}\n",
    ),
    (
        "place",
        "\nstation;reading\n",
        "{s};{v}\n",
        "\nTaken from the list of stations and readings, {s} stands at",
        " {v}.\n",
    ),
    (
        "goods",
        "\nTariff sheet.\n",
        "- {s}: {v}\n",
        "\nQuestion: What does the tariff sheet set against {s}?\nAnswer:",
        " {v}\n",
    ),
)
_TABLE_ROWS = (3, 7)

# (links of the chain, the last link, question, answer); {p} and {q} are people, {g} goods, {l} a place. The last link
# comes a second time, about somebody or something else, so that a reader who skips the chain has two values.
_CHAINS: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    (
        ("\nThe stock book for {g} is kept by {p}.\n", "\n{p} has moved into {l}.\n"),
        "\nVisitors to {l} ring bell {v}.\n",
        "\nWhoever looks for the keeper of the stock book for {g} has to ring bell",
        " {v}.\n",
    ),
    (
        ("\nEvery delivery of {g} is signed for by {p}.\n",),
        "\nMessages for {p} are left in tray {v}.\n",
        "\nQ: In which tray does one leave a message for the person who signs for {g}?\nA:",
        " {v}\n",
    ),
    (
        ("\nWhile {p} is away, {q} takes over the post.\n",),
        "\n{q} collects parcels against slip {v}.\n",
        "\nDuring the absence of {p}, parcels are therefore handed out against slip",
        " {v}.\n",
    ),
    (
        ("\nThe spring order of {g} went to {l}.\n",),
        "\nThe goods lift at {l} starts with badge {v}.\n",
        "\nQuestion: Which badge starts the lift where the spring order of {g} was brought?\nAnswer:",
        " {v}\n",
    ),
    (
        ("\n{p} shares a desk with {q}.\n", "\n{q} reports to the office in {l}.\n"),
        "\nThe office in {l} files its papers under {v}.\n",
        "\nPapers of the one who sits beside {p} end up under",
        " {v}.\n",
    ),
)


def make_fact(style: str, rng: random.Random) -> Fact:
    """Draw one fact.

    Raises:
        ValueError: unknown style.
    """
    if style == "passkey":
        value = str(rng.randrange(10 ** (PASSKEY_DIGITS - 1), 10**PASSKEY_DIGITS))
        return Fact((PASSKEY_FACT.format(value=value),), PASSKEY_QUESTION, f" {value}.")
    if style == "mixed":
        return rng.choice((lambda: _record(rng, _code), lambda: _table(rng), lambda: _chain(rng)))()
    if style not in _MAKERS:
        raise ValueError(f"unknown style of facts {style!r}")
    return _MAKERS[style](rng)


def _record(rng: random.Random, value_of: Callable[[random.Random], str]) -> Fact:
    kind, statement, question, answer = rng.choice(_RECORDS)
    subject = _SUBJECTS[kind](rng)
    value = value_of(rng)
    return Fact((statement.format(s=subject, v=value),), question.format(s=subject), answer.format(v=value))


def _table(rng: random.Random) -> Fact:
    kind, first_lines, row, question, answer = rng.choice(_TABLES)
    subjects = _distinct(kind, rng, rng.randint(*_TABLE_ROWS))
    values = [_code(rng) for _ in subjects]
    asked = rng.randrange(len(subjects))
    rows = "".join(row.format(s=subject, v=value) for subject, value in zip(subjects, values, strict=True))
    return Fact((first_lines + rows,), question.format(s=subjects[asked]), answer.format(v=values[asked]))


def _chain(rng: random.Random) -> Fact:
    links, last, question, answer = rng.choice(_CHAINS)
    people, places = _distinct("person", rng, 4), _distinct("place", rng, 2)
    names = {"p": people[0], "q": people[1], "l": places[0], "g": _SUBJECTS["goods"](rng), "v": _code(rng)}
    others = {"p": people[2], "q": people[3], "l": places[1], "v": _code(rng)}
    statements = [*(link.format(**names) for link in links), last.format(**names), last.format(**others)]
    return Fact(tuple(statements), question.format(**names), answer.format(**names))


_SUBJECTS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda rng: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
    "place": lambda rng: rng.choice(_PLACES),
    "goods": lambda rng: rng.choice(_GOODS),
}
_MAKERS: dict[str, Callable[[random.Random], Fact]] = {
    "records": lambda rng: _record(rng, _record_value),
    "tables": _table,
    "references": _chain,
}


def _distinct(kind: str, rng: random.Random, count: int) -> list[str]:
    if kind == "person":
        firsts, lasts = rng.sample(_FIRST, count), rng.sample(_LAST, count)
        return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    return rng.sample(_PLACES if kind == "place" else _GOODS, count)


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _record_value(rng: random.Random) -> str:
    """A number of four to six digits or a code; runs of digits are never seven long."""
    form = rng.randrange(4)
    if form == 0:
        return f"{rng.randrange(1, 10)}{_digits(rng, rng.choice((3, 4, 5)))}"
    return _code_of_form(form, rng)


def _code(rng: random.Random) -> str:
    """Digits with dashes, letters or a slash between them; never a bare number."""
    return _code_of_form(rng.randrange(1, 5), rng)


def _code_of_form(form: int, rng: random.Random) -> str:
    if form == 1:
        return f"{_digits(rng, 2)}-{_digits(rng, 2)}-{_digits(rng, 2)}"
    if form == 2:
        return f"{rng.choice(_LETTERS)}{rng.choice(_LETTERS)}-{_digits(rng, 4)}"
    if form == 3:
        return f"{_digits(rng, 4)}/{_digits(rng, 4)}"
    return f"{rng.choice(_LETTERS)}{_digits(rng, 3)}.{_digits(rng, 2)}"
