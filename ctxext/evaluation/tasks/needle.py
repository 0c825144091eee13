"""Needles: facts hidden in text, a question about them at the end, and the control without a needle.

`ruler` uses the wording of RULER's needle tasks (Hsieh et al. 2024, arXiv:2404.06654; NVIDIA/RULER,
scripts/data/synthetic/constants.py and niah.py), singular or plural as RULER forms it, so that results can be read
beside other people's; `passkey` is the older short form (Mohtashami and Jaggi 2023, arXiv:2305.16300), made of few
words so that a model of a million parameters can learn it.

Samples of a single plain needle are drawn by `make_needle`, whose order of draws recorded baselines depend on.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ctxext.data.facts import PASSKEY_FACT, PASSKEY_QUESTION
from ctxext.data.words import WORDS
from ctxext.errors import UsageError
from ctxext.evaluation.clusters import NEEDLES_FACT
from ctxext.evaluation.grid import Depth, GridRow
from ctxext.evaluation.haystack import HaystackChoice
from ctxext.evaluation.tasks.base import Draft, Item, MetricName, Task
from ctxext.evaluation.tasks.bodies import InList, InText
from ctxext.files import fingerprint

_ADJECTIVES = """
    amber brisk calm daring eager faint gaudy humble idle jolly keen lively mellow noble odd placid quaint rustic
    sly tidy upbeat vivid witty zesty bold crisp dusty fancy grand hasty
    """.split()
_NOUNS = """
    anchor basket candle dagger easel falcon goblet harbor inkwell jacket kettle lantern magnet needle oyster
    pillow quiver ribbon saddle thimble umbrella violin walnut zipper beacon cradle ferry gutter hammock ladder
    """.split()
_RULER_DIGITS = 7

Kind = Literal["numbers", "words", "uuids"]


@dataclass(frozen=True)
class Wording:
    """Text around a haystack; `{key}` and `{value}` are filled in.

    Attributes:
        intro: before the text.
        needle: the fact.
        question: after the text, ending where the model's answer begins.
        answer_prefix: the end of `question` that begins the answer.
        num_digits: of the value.
        has_key: whether fact and question name a key.
    """

    intro: str
    needle: str
    question: str
    answer_prefix: str
    num_digits: int
    has_key: bool

    def ask(self, key: str) -> tuple[str, str]:
        """The question about `key` without its end, and that end, which begins the answer."""
        prefix = self.answer_prefix.format(key=key)
        return self.question.format(key=key).removesuffix(prefix), prefix


def ruler_wording(kind: Kind, several: bool) -> Wording:
    """RULER's texts for values of a kind; for one value RULER turns the plural template into the singular."""
    asked = kind if several else kind.removesuffix("s")
    are_all, are = ("are all", "are") if several else ("is", "is")
    hidden = f"Some special magic {asked} are" if several else f"A special magic {asked} is"
    prefix = f" The special magic {asked} for {{key}} mentioned in the provided text {are}"
    return Wording(
        intro=f"{hidden} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {asked} afterwards.\n",
        needle=f"\nOne of the special magic {kind} for {{key}} is: {{value}}.\n",
        question=f"\nWhat {are_all} the special magic {asked} for {{key}} mentioned in the provided text?{prefix}",
        answer_prefix=prefix,
        num_digits=_RULER_DIGITS,
        has_key=True,
    )


WORDINGS: dict[str, Wording] = {
    "ruler": ruler_wording("numbers", several=False),
    "passkey": Wording(
        intro="",
        needle=PASSKEY_FACT,
        question=PASSKEY_QUESTION,
        answer_prefix=" the pass key is",
        num_digits=5,
        has_key=False,
    ),
}


@dataclass(frozen=True)
class Needle:
    """One sample's fact and question, as text; the question ends before the answer's prefix."""

    intro: str
    needle: str
    question: str
    answer_prefix: str
    key: str
    value: str


def make_needle(wording: str, rng: random.Random) -> Needle:
    """Draw key and value for one sample; the value has no leading zero."""
    form = WORDINGS[wording]
    key = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}" if form.has_key else ""
    value = str(rng.randrange(10 ** (form.num_digits - 1), 10**form.num_digits))
    question, answer_prefix = form.ask(key)
    return Needle(
        intro=form.intro,
        needle=form.needle.format(key=key, value=value),
        question=question,
        answer_prefix=answer_prefix,
        key=key,
        value=value,
    )


class _Distinct:
    """Draws keys or values of a kind that differ from one another, each in one step and never again until it fits."""

    def __init__(self, kind: Kind, *, many: bool) -> None:
        self._kind = kind
        # 900 pairs for a few needles, 185,000 for a text made of them.
        self._first: Sequence[str] = WORDS if many else _ADJECTIVES
        self._second: Sequence[str] = WORDS if many else _NOUNS
        self._used: set[int] = set()

    def draw(self, rng: random.Random) -> str:
        """One more."""
        if self._kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if self._kind == "numbers":
            low = 10 ** (_RULER_DIGITS - 1)
            return str(low + self._free(rng, 9 * low))
        first, second = divmod(self._free(rng, len(self._first) * len(self._second)), len(self._second))
        return f"{self._first[first]}-{self._second[second]}"

    def _free(self, rng: random.Random, size: int) -> int:
        """The first free place from a random one on."""
        place = rng.randrange(size)
        assert len(self._used) < size
        while place in self._used:
            place = (place + 1) % size
        self._used.add(place)
        return place


class NeedleTask(Task):
    """One or several needles.

    Attributes:
        wording: `ruler`, or `passkey` for a single five-digit number without a key.
        haystack: as for every task, or `needles`: the whole text is made of further needles (RULER's multikey 2, 3).
        keys, values: kinds of keys and values.
        num_keys: needles with different keys; all that are not asked for are distractors.
        num_values: values of each key, every one in a needle of its own.
        num_queries: keys asked for together.
    """

    task: Literal["needle"]
    haystack: HaystackChoice | Literal["needles"] | None = None  # type: ignore[assignment]
    wording: Literal["ruler", "passkey"] = "ruler"
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: Annotated[int, Field(ge=1, le=64)] = 1
    num_values: Annotated[int, Field(ge=1, le=16)] = 1
    num_queries: Annotated[int, Field(ge=1, le=16)] = 1

    summary: ClassVar[str] = "find a fact, or several, hidden in text"
    when: ClassVar[str] = "the first thing to measure: retrieval by length and depth; options make it RULER's 8 tasks"
    source: ClassVar[str] = "RULER (arXiv:2404.06654); passkey: arXiv:2305.16300"
    placed: ClassVar[bool] = True

    @model_validator(mode="after")
    def _consistent(self) -> NeedleTask:
        if self.wording == "passkey" and not self._plain:
            raise ValueError("the passkey wording has one number and no key; for more, use wording ruler")
        if self.num_queries > self.num_keys:
            raise ValueError(f"num_queries ({self.num_queries}) is more than num_keys ({self.num_keys})")
        return self

    @property
    def _plain(self) -> bool:
        """The single needle with a number: today's only, and yesterday's, whose samples stay as they are."""
        options = (self.keys, self.values, self.num_keys, self.num_values, self.num_queries)
        return options == ("words", "numbers", 1, 1, 1) and self.haystack != "needles"

    @property
    def variant(self) -> str:
        """The wording alone for the single needle, whose samples and baselines are older than the options."""
        return self.wording if self._plain else super().variant + str(self.haystack == "needles")

    @property
    def own_haystack(self) -> HaystackChoice | None:
        """None when the text is made of needles."""
        return None if self.haystack == "needles" else self.haystack

    @property
    def spread(self) -> bool:
        """With several asked needles no single depth describes a sample."""
        return self.num_values * self.num_queries > 1

    @property
    def metric_name(self) -> str:
        """Whole numbers for a single number, RULER's substring otherwise."""
        return self.metric or ("number_match" if not self.spread and self.values == "numbers" else "string_match_all")

    @property
    def num_answer_tokens(self) -> int:
        """A number of seven digits is at most 16 tokens; RULER allows 128 for all."""
        return self.max_new_tokens or (16 if self._plain else 128)

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """Draw the needles; the asked one of a single question stands at `depth`, all others anywhere."""
        if self._plain:
            one = make_needle(self.wording, rng)
            return Draft(
                intro=one.intro,
                question=one.question,
                answer_prefix=one.answer_prefix,
                body=InText((Item(one.needle, depth),) if self.placed else (), depth),
                answers=(one.value,),
                key=one.key,
            )
        form = ruler_wording(self.values, several=self.spread)
        listed = self.haystack == "needles"
        keys, values = _Distinct(self.keys, many=listed), _Distinct(self.values, many=True)
        drawn = {keys.draw(rng): [values.draw(rng) for _ in range(self.num_values)] for _ in range(self.num_keys)}
        asked = rng.sample(list(drawn), self.num_queries)
        items = [
            Item(
                form.needle.format(key=key, value=value),
                depth if key in asked and not self.spread else rng.random(),
                asked=key in asked,
            )
            for key, of_key in drawn.items()
            for value in of_key
        ]
        named = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        question, answer_prefix = form.ask(named)
        return Draft(
            intro=form.intro,
            question=question,
            answer_prefix=answer_prefix,
            body=self._body(items, form, keys, values),
            answers=tuple(value for key in asked for value in drawn[key]),
            distractors=tuple(value for key, of_key in drawn.items() if key not in asked for value in of_key),
            key=named,
        )

    def _body(self, items: list[Item], form: Wording, keys: _Distinct, values: _Distinct) -> InText | InList:
        if self.haystack != "needles":
            return InText(tuple(items))

        def another(rng: random.Random) -> str:
            return form.needle.strip().format(key=keys.draw(rng), value=values.draw(rng))

        lines = tuple(Item(item.text.strip(), item.depth, item.asked) for item in items)
        return InList(lines, another, separator="\n", cut_last=True)


def _eleven_depths() -> list[float]:
    return [i / 10 for i in range(11)]


class NeedleSweepTask(Task):
    """All depths at once: as many needles as depths in one text, each asked in a prompt of its own.

    The prompts of a length differ in nothing but the question, so one prefill serves them all. Much harder than one
    needle in the text for a small model, and no measure of the same thing: these cells are never those of `needle`.

    Attributes:
        needles: the depths of the needles; the grid asks for all of them or for some.
    """

    task: Literal["needle_sweep"]
    needles: Annotated[list[Depth], Field(min_length=2, max_length=64, default_factory=_eleven_depths)]

    summary: ClassVar[str] = "a needle at every depth of one text, each asked in turn"
    when: ClassVar[str] = "a whole row of depths for the price of one prompt; harder than one needle, not comparable"
    source: ClassVar[str] = "ctxext, in the wording of RULER's multi-key needles (arXiv:2404.06654)"
    budget: ClassVar[int] = 16
    usual_metric: ClassVar[MetricName] = "number_match"

    @model_validator(mode="after")
    def _ascending(self) -> NeedleSweepTask:
        if any(low >= high for low, high in pairwise(self.needles)):
            raise ValueError("needles must be ascending depths, each once")
        return self

    @property
    def one_text(self) -> bool:
        """All depths of a length and index ask about the same prompt."""
        return True

    def grid_problem(self, rows: Sequence[GridRow]) -> str | None:
        """Depths without a needle cannot be asked for."""
        absent = sorted({depth for row in rows for depth in row.depths} - set(self.needles))
        if not absent:
            return None
        return f"{self.cell_name}: no needle at depth {absent[0]:g}; give `needles` or the task's `grid` other depths"

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """Draw all needles, the same for every depth, and ask for the one at `depth`."""
        form = ruler_wording("numbers", several=False)
        keys, values = _Distinct("words", many=False), _Distinct("numbers", many=True)
        drawn = {place: (keys.draw(rng), values.draw(rng)) for place in self.needles}
        if depth not in drawn:
            raise UsageError(
                "no needle stands at this depth",
                where=self.cell_name,
                got=depth,
                expected="one of " + ", ".join(f"{place:g}" for place in self.needles),
            )
        key, value = drawn[depth]
        questions = {other: form.ask(other) for other, _ in drawn.values()}
        return Draft(
            intro=form.intro,
            question=questions[key][0],
            answer_prefix=questions[key][1],
            body=InText(
                tuple(
                    Item(form.needle.format(key=other, value=found), place, asked=place == depth)
                    for place, (other, found) in drawn.items()
                )
            ),
            answers=(value,),
            distractors=tuple(found for place, (_, found) in drawn.items() if place != depth),
            key=key,
            questions=tuple(questions.values()),
            facts={NEEDLES_FACT: fingerprint(list(drawn.values()))},
        )


class NoNeedleTask(NeedleTask):
    """The same prompts without the needle: what is right here is right by chance, or the scoring is wrong."""

    task: Literal["no_needle"]  # type: ignore[assignment]

    summary: ClassVar[str] = "the needle's question about a text that holds no needle"
    when: ClassVar[str] = "control: the chance level, which should be 0"
    source: ClassVar[str] = "ctxext"
    placed: ClassVar[bool] = False

    @model_validator(mode="after")
    def _single(self) -> NoNeedleTask:
        if not self._plain:
            raise ValueError("the control without a needle has the single needle's options: wording only")
        return self

    @property
    def spread(self) -> bool:
        """What is not there has no depth."""
        return True

    @property
    def metric_name(self) -> str:
        """The single needle's."""
        return self.metric or "number_match"
