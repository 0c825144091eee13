"""The single-needle task: one fact hidden in text, one question about it at the end.

`ruler` uses the wording of RULER's single needle with numbers (Hsieh et al. 2024, arXiv:2404.06654), so that results
can be read beside other people's; `passkey` is the older short form (Mohtashami and Jaggi 2023, arXiv:2305.16300), made
of few words so that a model of a million parameters can learn it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ctxext.data.facts import PASSKEY_FACT, PASSKEY_QUESTION

_ADJECTIVES = """
    amber brisk calm daring eager faint gaudy humble idle jolly keen lively mellow noble odd placid quaint rustic
    sly tidy upbeat vivid witty zesty bold crisp dusty fancy grand hasty
    """.split()
_NOUNS = """
    anchor basket candle dagger easel falcon goblet harbor inkwell jacket kettle lantern magnet needle oyster
    pillow quiver ribbon saddle thimble umbrella violin walnut zipper beacon cradle ferry gutter hammock ladder
    """.split()


@dataclass(frozen=True)
class Wording:
    """Text around a haystack; `{key}` and `{value}` are filled in.

    Attributes:
        intro: before the text.
        needle: the fact.
        question: after the text, ending where the model's answer begins.
        num_digits: of the value.
        has_key: whether fact and question name a key.
    """

    intro: str
    needle: str
    question: str
    num_digits: int
    has_key: bool


WORDINGS: dict[str, Wording] = {
    "ruler": Wording(
        intro="A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        needle="\nOne of the special magic numbers for {key} is: {value}.\n",
        question="\nWhat is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is",
        num_digits=7,
        has_key=True,
    ),
    "passkey": Wording(
        intro="",
        needle=PASSKEY_FACT,
        question=PASSKEY_QUESTION,
        num_digits=5,
        has_key=False,
    ),
}


@dataclass(frozen=True)
class Needle:
    """One sample's fact and question, as text."""

    intro: str
    needle: str
    question: str
    key: str
    value: str


def make_needle(wording: str, rng: random.Random) -> Needle:
    """Draw key and value for one sample; the value has no leading zero."""
    form = WORDINGS[wording]
    key = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}" if form.has_key else ""
    value = str(rng.randrange(10 ** (form.num_digits - 1), 10**form.num_digits))
    return Needle(
        intro=form.intro,
        needle=form.needle.format(key=key, value=value),
        question=form.question.format(key=key, value=value),
        key=key,
        value=value,
    )
