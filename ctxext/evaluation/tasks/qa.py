"""Question answering over many documents, in RULER's wording (arXiv:2404.06654; NVIDIA/RULER, constants.py and qa.py).

Without a file the documents are generated records of invented people, firms and towns: one document answers the
question, or (`hops: 2`) two have to be joined; all others are of the same form. With a file in the format of SQuAD or
HotpotQA, its paragraphs are the documents. The document that answers stands at the cell's depth; in RULER it stands at
the same place in every sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.tasks.base import Draft, Item, MetricName, Task
from ctxext.evaluation.tasks.bodies import InList
from ctxext.files import sha256_bytes

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_INTRO = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"
_QUESTION = f"\n\n{_INSTRUCTION}\n\nQuestion: {{question}}"
_PREFIX = " Answer:"

_FIRST = """
    Abel Beatrix Caspian Delphine Edda Florin Ginevra Hendrik Isolde Jarek Klara Ludo Mirela Niels Odile Piet Ramona
    Soren Tilda Umberto Viggo Wanda Xaver Yvette Zoltan Anselm Britta Corin Dagmar Emeric
    """.split()
_LAST = """
    Alderink Brandvold Cassovary Dunmere Eskelson Farrowby Gildenhaus Hartwick Isterling Jorvaldson Kettleby Lindemuth
    Marchbanks Nordahl Ostrander Pellworth Quillfeather Rosenthorn Silverlake Thornquist Underhay Valdecourt Wexcombe
    Yarborough Zellweg Ambleton Birkenshaw Colquitt Drummondel Everdene
    """.split()
_MIDDLE = "ABCDEFGHJKLMNPRSTUVWY"
_TOWNS = """
    Ashgrove Bramwick Coldharrow Dunfell Eastmarsh Foxley Greyminster Hollowbrook Ironbridge Junipera Kestrelton
    Larkhaven Mossdale Northwater Oakenford Pinecastle Quarrydon Ravenspur Stonebeck Thistledown Uppervale Vinefield
    Westerlea Yewbarrow Zephyrton
    """.split()
_TRADES = """
    cartographer glassblower beekeeper locksmith surveyor bookbinder botanist cooper geologist harpist
    illustrator joiner lighthouse-keeper midwife navigator ornithologist potter saddler typesetter weaver
    """.split()
_WARES = """
    bells barometers bicycles candles clocks compasses curtains fountains gloves kites lenses maps mirrors organs
    paints sails stoves telescopes tiles violins
    """.split()


@dataclass(frozen=True)
class _Question:
    """A question with its documents; `evidence` and `others` are whole documents, `rest` draws further ones."""

    text: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...]
    rest: Callable[[random.Random], str]
    distractors: tuple[str, ...]
    key: str


class QaTask(Task):
    """A question about one of many documents.

    Attributes:
        file: SQuAD (v1, v2) or HotpotQA JSON; generated records without it.
        hops: of generated records: 1, or 2 for questions that join two documents.
    """

    task: Literal["qa"]
    file: str | None = None
    hops: Annotated[int, Field(ge=1, le=2)] = 1

    summary: ClassVar[str] = "answer a question from one (or two) of many documents"
    when: ClassVar[str] = "closest to use: documents, a question, a short answer; no download needed"
    source: ClassVar[str] = "RULER's qa wording (arXiv:2404.06654) with generated records, or SQuAD / HotpotQA files"
    usual_metric: ClassVar[MetricName] = "string_match_part"

    @model_validator(mode="after")
    def _one_source(self) -> QaTask:
        if self.file is not None and self.hops != 1:
            raise ValueError("hops belongs to generated records; a file has questions of its own")
        return self

    def draft(self, rng: random.Random, length_tokens: int, depth: float) -> Draft:
        """The first document of the evidence stands at `depth`, a second one anywhere."""
        asked = _of_file(self.file, rng) if self.file else _generated(rng, self.hops)
        places = [depth, *(rng.random() for _ in asked.evidence[1:])]
        return Draft(
            intro=_INTRO,
            question=_QUESTION.format(question=asked.text),
            answer_prefix=_PREFIX,
            body=InList(
                items=tuple(Item(text, place) for text, place in zip(asked.evidence, places, strict=True)),
                filler=asked.rest,
                separator="\n\n",
                numbering="Document {i}:\n",
                cut_last=True,
            ),
            answers=asked.answers,
            distractors=asked.distractors,
            key=asked.key,
        )

    def fingerprints(self) -> dict[str, str]:
        """The file's hash."""
        return {self.file: _read(self.file).sha256} if self.file else {}


class _Names:
    """Names that differ, each drawn in one step: the next free one from a random place on."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def person(self, rng: random.Random) -> str:
        """First name, initial, last name: 18,900 of them."""
        place = self._free(rng, len(_FIRST) * len(_MIDDLE) * len(_LAST))
        place, last = divmod(place, len(_LAST))
        first, middle = divmod(place, len(_MIDDLE))
        return f"{_FIRST[first]} {_MIDDLE[middle]}. {_LAST[last]}"

    def _free(self, rng: random.Random, size: int) -> int:
        place = rng.randrange(size)
        if len(self._used) >= size:
            raise UsageError("qa has too few names for this length", expected=f"at most {size} documents")
        while place in self._used:
            place = (place + 1) % size
        self._used.add(place)
        return place


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _person(rng: random.Random, name: str, town: str) -> str:
    year, trade = rng.randrange(1900, 2000), _with_article(rng.choice(_TRADES))
    return (
        f"{name} was born in {town} in {year} and trained as {trade}. "
        f"After {rng.randrange(3, 30)} years in the trade, {name} joined the town council and later wrote a short "
        f"memoir about {rng.choice(_WARES)}."
    )


def _firm(rng: random.Random, firm: str, founder: str, ware: str) -> str:
    return (
        f"{firm} makes {ware} and employs {rng.randrange(12, 900)} people. It was founded by {founder} in "
        f"{rng.randrange(1900, 2000)}. Its catalogue lists {rng.randrange(20, 400)} models."
    )


def _generated(rng: random.Random, hops: int) -> _Question:
    """A question about one invented person, directly or through the firm that the person founded."""
    names = _Names()
    person, town = names.person(rng), rng.choice(_TOWNS)
    elsewhere = [other for other in _TOWNS if other != town]
    evidence = [_person(rng, person, town)]
    question, key = f"In which town was {person} born?", person
    if hops == 2:
        firm = f"{names.person(rng).split()[-1]} & {names.person(rng).split()[-1]}"
        evidence.insert(0, _firm(rng, firm, person, rng.choice(_WARES)))
        question, key = f"In which town was the founder of {firm} born?", firm

    def rest(filler: random.Random) -> str:
        # Other firms bear one name, this one two, so no other document can be meant.
        if hops == 2 and filler.random() < 0.5:
            founder = names.person(filler)
            return _firm(filler, f"{founder.split()[-1]} Works", founder, filler.choice(_WARES))
        return _person(filler, names.person(filler), filler.choice(elsewhere))

    return _Question(question, (town,), tuple(evidence), rest, tuple(elsewhere), key)


@dataclass(frozen=True)
class _File:
    """Questions of a file: (question, answers, documents that answer, documents about the same)."""

    documents: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    sha256: str


def _of_file(name: str, rng: random.Random) -> _Question:
    content = _read(name)
    question, answers, evidence = rng.choice(content.questions)
    others = [text for text in content.documents if text not in evidence and not _holds(text, answers)]
    rng.shuffle(others)
    queue = iter(others)

    def rest(filler: random.Random) -> str:
        text = next(queue, None)
        if text is None:
            raise ArtefactError("the file has too few documents for this length, and none is repeated", where=name)
        return text

    return _Question(question, answers, evidence, rest, (), question)


def _holds(text: str, answers: tuple[str, ...]) -> bool:
    return any(answer.lower() in text.lower() for answer in answers)


@lru_cache(maxsize=4)
def _read(name: str) -> _File:
    """Parse a SQuAD or HotpotQA file; only questions whose documents hold an answer are taken.

    Raises:
        ArtefactError: unreadable, or neither format.
    """
    try:
        raw = Path(name).read_bytes()
        values = json.loads(raw)
        rows = _squad(values) if isinstance(values, dict) else _hotpot(values)
    except OSError as error:
        raise ArtefactError(f"could not read the file ({error})", where=name) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"not a file of questions ({type(error).__name__}: {error})",
            where=name,
            expected="JSON in the format of SQuAD or HotpotQA",
        ) from error
    documents, questions = rows
    usable = tuple(row for row in questions if row[1] and _holds("\n".join(row[2]), row[1]))
    if not usable:
        raise ArtefactError("no question that a document answers", where=name)
    return _File(tuple(sorted(set(documents))), usable, sha256_bytes(raw))


_Row = tuple[str, tuple[str, ...], tuple[str, ...]]
_Rows = tuple[list[str], list[_Row]]


def _squad(values: Any) -> _Rows:
    documents, questions = list[str](), list[_Row]()
    for article in values["data"]:
        for paragraph in article["paragraphs"]:
            documents.append(paragraph["context"])
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible", False):
                    answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                    questions.append((qa["question"], answers, (paragraph["context"],)))
    return documents, questions


def _hotpot(values: Any) -> _Rows:
    documents, questions = list[str](), list[_Row]()
    for row in values:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
        documents += list(texts.values())
        titles = dict.fromkeys(title for title, _ in row.get("supporting_facts") or row["context"])
        evidence = tuple(texts[title] for title in titles if title in texts)
        # "yes" and "no" are right half of the time, and stand in no document.
        if row["answer"].lower() not in ("yes", "no"):
            questions.append((row["question"], (row["answer"],), evidence))
    return documents, questions
