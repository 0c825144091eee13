"""Synthetic retrieval data for training: facts, and questions about them.

It trains *retrieval*, which is not context extension; a recipe declares its share and every report repeats it.

The `records` style is kept apart from every evaluation task: other wordings (no "magic number", no "pass key"), other
keys (people, places and crates instead of adjective-noun pairs), other values (never a bare number of seven digits) and
another structure (questions are followed by their answers inside running text). `passkey` is the evaluation's own
wording; only the tiny demonstration model uses it, and says so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PASSKEY_FACT = " the pass key is {value}."
PASSKEY_QUESTION = " what is the pass key? the pass key is"
PASSKEY_DIGITS = 5

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
        statement: goes somewhere into the text.
        question: goes to the end of the window, followed by `answer`.
    """

    statement: str
    question: str
    answer: str


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


def make_fact(style: str, rng: random.Random) -> Fact:
    """Draw one fact.

    Raises:
        ValueError: unknown style.
    """
    if style == "passkey":
        value = str(rng.randrange(10 ** (PASSKEY_DIGITS - 1), 10**PASSKEY_DIGITS))
        return Fact(PASSKEY_FACT.format(value=value), PASSKEY_QUESTION, f" {value}.")
    if style != "records":
        raise ValueError(f"unknown style of facts {style!r}")
    kind, statement, question, answer = rng.choice(_RECORDS)
    subject = {
        "person": lambda: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
        "place": lambda: rng.choice(_PLACES),
        "goods": lambda: rng.choice(_GOODS),
    }[kind]()
    value = _record_value(rng)
    return Fact(statement.format(s=subject, v=value), question.format(s=subject), answer.format(v=value))


def _record_value(rng: random.Random) -> str:
    """A code whose runs of digits are never seven long."""

    def digits(count: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(count))

    form = rng.randrange(4)
    if form == 0:
        return f"{rng.randrange(1, 10)}{digits(rng.choice((3, 4, 5)))}"
    if form == 1:
        return f"{digits(2)}-{digits(2)}-{digits(2)}"
    if form == 2:
        return f"{rng.choice('BCDFGHKLMNPRSTVWX')}{rng.choice('BCDFGHKLMNPRSTVWX')}-{digits(4)}"
    return f"{digits(4)}/{digits(4)}"
