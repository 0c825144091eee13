"""RULER's tasks whose answer lies all over the text: variable tracking, common words, frequent words.

Wordings and sizes are those of RULER (Hsieh et al. 2024, arXiv:2404.06654; NVIDIA/RULER, scripts/data/synthetic):
chains of `VAR X = VAR Y` in noise, ten words among a numbered list, three coded words whose frequencies follow a zeta
distribution. The first two begin with one worked example, as RULER's do.
"""

from __future__ import annotations

import random
import string
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ctxext.data.words import WORDS
from ctxext.errors import UsageError
from ctxext.evaluation.haystack import NOISE, HaystackChoice
from ctxext.evaluation.tasks.base import Draft, Item, MetricName, Task
from ctxext.evaluation.tasks.bodies import CodedWords, InText, NumberedWords

_TRACK_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_TRACK_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_TRACK_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
_EXAMPLE_NOISE_LINES = 4
_COMMON_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_COMMON_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_NUM_COMMON = 10
# RULER's repeats of common and uncommon words, and the example's size and repeats; below and from this length on.
_COMMON_LONG_FROM = 4096
_FREQUENT_INTRO = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
_FREQUENT_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
_FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def _names(rng: random.Random, count: int, letters: int) -> list[str]:
    """Distinct names of capital letters."""
    names = []
    for number in rng.sample(range(26**letters), count):
        name = ""
        for _ in range(letters):
            number, letter = divmod(number, 26)
            name += string.ascii_uppercase[letter]
        names.append(name)
    return names


def _chain(names: list[str], value: int) -> list[str]:
    """Assignments of `value` to the first name and of every name to the next."""
    return [
        f"VAR {names[0]} = {value}",
        *(f"VAR {name} = VAR {earlier}" for earlier, name in pairwise(names)),
    ]


class VariableTrackingTask(Task):
    """Follow assignments from variable to variable.

    Attributes:
        haystack: `noise` by default, as in RULER, whatever the suite's is.
        num_chains: chains with values of their own; one is asked for.
        num_hops: assignments after the first of a chain.
        example: whether a small worked example comes first.
    """

    task: Literal["variable_tracking"]
    haystack: HaystackChoice | None = "noise"
    num_chains: Annotated[int, Field(ge=1, le=16)] = 1
    num_hops: Annotated[int, Field(ge=1, le=16)] = 4
    example: bool = True

    summary: ClassVar[str] = "name every variable that a value reached through a chain of assignments"
    when: ClassVar[str] = "several places must be found and connected, in their order"
    source: ClassVar[str] = "RULER's vt (arXiv:2404.06654)"
    budget: ClassVar[int] = 30
    usual_metric: ClassVar[MetricName] = "string_match_all"

    @property
    def spread(self) -> bool:
        """A chain runs through the whole text."""
        return True

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """Every chain's assignments stand at random places in their order."""
        size = self.num_hops + 1
        names = _names(rng, size * self.num_chains, 5)
        chains = [names[start : start + size] for start in range(0, len(names), size)]
        values = rng.sample(range(10_000, 100_000), self.num_chains + 1)
        items = [
            Item(f"\n{line}\n", place, asked=number == 0)
            for number, chain in enumerate(chains)
            for line, place in zip(
                _chain(chain, values[number]), sorted(rng.random() for _ in range(size)), strict=True
            )
        ]
        question, prefix = self._question(values[0])
        return Draft(
            intro=(self._worked_example(rng, values[-1]) if self.example else "") + _TRACK_INTRO,
            question=question,
            answer_prefix=prefix,
            body=InText(tuple(items)),
            answers=tuple(chains[0]),
            distractors=tuple(name for chain in chains[1:] for name in chain),
            key=str(values[0]),
        )

    def _question(self, value: int) -> tuple[str, str]:
        return _TRACK_QUESTION.format(value=value), _TRACK_PREFIX.format(value=value, count=self.num_hops + 1)

    def _worked_example(self, rng: random.Random, value: int) -> str:
        names = _names(rng, self.num_hops + 1, 3)
        lines = [NOISE] * _EXAMPLE_NOISE_LINES
        for place, line in zip(
            sorted(rng.choices(range(len(lines) + 1), k=len(names)), reverse=True),
            reversed(_chain(names, value)),
            strict=True,
        ):
            lines.insert(place, line)
        question, prefix = self._question(value)
        return _TRACK_INTRO + "\n".join(lines) + question + prefix + " ".join(names) + "\n\n"


class CommonWordsTask(Task):
    """The ten words of a numbered list that appear most often.

    Attributes:
        common_repeats, uncommon_repeats: RULER's 30 and 3 (6 and 1 below 4,096 tokens) by default.
        example: whether a small worked example comes first.
    """

    task: Literal["common_words"]
    common_repeats: Annotated[int, Field(ge=2)] | None = None
    uncommon_repeats: Annotated[int, Field(ge=1)] | None = None
    example: bool = True

    summary: ClassVar[str] = "name the ten most common words of a long numbered list"
    when: ClassVar[str] = "the whole text counts, not one place; hard for small models at any length"
    source: ClassVar[str] = "RULER's cwe (arXiv:2404.06654), with words of our own"
    budget: ClassVar[int] = 120
    usual_metric: ClassVar[MetricName] = "string_match_all"

    @property
    def spread(self) -> bool:
        """The words stand everywhere."""
        return True

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """Common words are drawn from those that no other word contains, so that no substring scores."""
        long = length_tokens >= _COMMON_LONG_FROM
        common_repeats = self.common_repeats or (30 if long else 6)
        uncommon_repeats = self.uncommon_repeats or (3 if long else 1)
        # A numbered word has two tokens at least, so this many uncommon words never fit.
        vocabulary = _vocabulary(rng, length_tokens // (2 * uncommon_repeats) + _NUM_COMMON + 1)
        common, uncommon = _standing_alone(vocabulary, _NUM_COMMON)
        example = self._worked_example(rng, *((40, 10, 3) if long else (20, 3, 1))) if self.example else ""
        return Draft(
            intro=example + _COMMON_INTRO,
            question=_COMMON_QUESTION,
            answer_prefix=_COMMON_PREFIX,
            body=NumberedWords(common, uncommon, common_repeats, uncommon_repeats),
            answers=common,
            distractors=uncommon,
            facts={"common_repeats": common_repeats, "uncommon_repeats": uncommon_repeats},
        )

    def _worked_example(self, rng: random.Random, num_words: int, common: int, uncommon: int) -> str:
        words = rng.sample(WORDS, num_words)
        listed = words[:_NUM_COMMON] * common + words[_NUM_COMMON:] * uncommon
        rng.shuffle(listed)
        text, answer = (" ".join(f"{i}. {word}" for i, word in enumerate(w, 1)) for w in (listed, words[:_NUM_COMMON]))
        return f"{_COMMON_INTRO}{text}{_COMMON_QUESTION}{_COMMON_PREFIX} {answer}\n"


def _vocabulary(rng: random.Random, size: int) -> list[str]:
    """Distinct words; compounds (`snowbridge`) where there are not enough single ones."""
    if size <= len(WORDS):
        return rng.sample(WORDS, size)
    if size > len(WORDS) ** 2:
        raise UsageError(
            "common_words has too few words for this length", got=size, expected=f"{len(WORDS) ** 2} words"
        )
    pairs = rng.sample(range(len(WORDS) ** 2), size)
    compounds = (WORDS[pair // len(WORDS)] + WORDS[pair % len(WORDS)] for pair in pairs)
    return list(dict.fromkeys(compounds))


def _standing_alone(vocabulary: list[str], count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first `count` words that are inside no other word, and all the rest, each in their order."""
    everything = " ".join(vocabulary)
    alone = []
    for word in vocabulary:
        if everything.count(word) == 1:
            alone.append(word)
        if len(alone) == count:
            break
    chosen = set(alone)
    return tuple(alone), tuple(word for word in vocabulary if word not in chosen)


class FrequentWordsTask(Task):
    """The three most frequent coded words.

    Attributes:
        alpha: of the zeta distribution of frequencies; smaller is harder.
    """

    task: Literal["frequent_words"]
    alpha: Annotated[float, Field(gt=1.0, le=8.0)] = 2.0

    summary: ClassVar[str] = "name the three most frequent coded words"
    when: ClassVar[str] = "the whole text counts; no knowledge of a language helps"
    source: ClassVar[str] = "RULER's fwe (arXiv:2404.06654)"
    budget: ClassVar[int] = 50
    usual_metric: ClassVar[MetricName] = "string_match_all"

    @property
    def spread(self) -> bool:
        """The words stand everywhere."""
        return True

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """The most frequent word of all is replaced by dots, as in RULER."""
        # RULER has a fiftieth of the length; five is what three asked words, the dots and a rival need.
        size = max(length_tokens // 50, 5)
        words = [name.lower() for name in _names(rng, size, 6)]
        words[0] = "..."
        weights = [rank**-self.alpha for rank in range(1, size + 1)]
        total = _zeta(self.alpha)
        return Draft(
            intro=_FREQUENT_INTRO,
            question=_FREQUENT_QUESTION,
            answer_prefix=_FREQUENT_PREFIX,
            body=CodedWords(tuple(words), lambda n: [int(n * weight / total) for weight in weights], 3),
            answers=tuple(words[1:4]),
            distractors=tuple(words[4:]),
            facts={"alpha": self.alpha},
        )


def _zeta(alpha: float) -> float:
    """Riemann's zeta by Euler-Maclaurin after 50 terms, exact to 1e-12 for alpha above 1."""
    terms = 50
    tail = terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12
    tail -= alpha * (alpha + 1) * (alpha + 2) * terms ** (-alpha - 3) / 720
    return float(sum(rank**-alpha for rank in range(1, terms)) + tail)
