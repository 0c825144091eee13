"""Contamination guard: does training text hold what the evaluation asks about?

Two things must not be trained on: the documents of the haystack (a model that has learned them by heart finds what does
not belong there more easily) and the wordings of needles and questions. Looked for are 13 words in a row of a haystack
document (the length of GPT-3's guard, Brown et al. 2020, arXiv:2005.14165, appendix C), and fixed parts of wordings.
A training document counts when such runs hold 50 of its words (the length of Lee et al. 2022, arXiv:2107.06499) or half
of them: one quoted sentence is no contamination, and said apart. A wording counts at once. How words are compared:
`ctxext.data.runs`; what it finds is compared as text before it counts, so no finding is an accident of hashing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ctxext.data.runs import Batch, Hashes, Ints, batches, plain_words
from ctxext.errors import ArtefactError
from ctxext.files import fingerprint

Policy = Literal["refuse", "exclude", "report"]

RUN_WORDS = 13
# How the name of a wording begins.
WORDING = "wording of "
LEAST_WORDS = 50
_LEAST_SHARE = 0.5
# A fixed part of a wording counts from this many words on, or from fewer when it is most of its text.
_PHRASE_WORDS = 6
_SHORT_PHRASE_WORDS = 4
_SHORT_PHRASE_SHARE = 0.6
# Longer ones are cut into parts, any of which counts: training text may quote a wording with other numbers in it.
_LONGEST_PART_WORDS = 8
# Names and numbers of drawn samples differ; runs of words that this share of the samples has are the wording.
_FIXED_SHARE = 0.08
_NUM_SHOWN = 5
_MOST_NAMED = 2
_ENOUGH_CHARACTERS = 1000
_EXCERPT_CHARACTERS = 160


@dataclass(frozen=True)
class Finding:
    """A training document that overlaps with what is evaluated.

    Attributes:
        document: its number among the texts that were scanned.
        reference: what it overlaps with.
        num_words: words of the document that stand in such runs.
        of_words: words of the document.
        excerpt: the first such run, as the document has it.
    """

    document: int
    reference: str
    num_words: int
    of_words: int
    excerpt: str


@dataclass(frozen=True)
class ContaminationResult:
    """What a scan found and what was done about it.

    Attributes:
        references: what was looked for.
        fingerprint: of all reference texts.
        num_quoting: documents that share shorter passages only.
        names: how people know the documents of the findings.
    """

    policy: Policy
    references: tuple[str, ...]
    fingerprint: str
    num_documents: int
    num_words: int
    findings: tuple[Finding, ...]
    num_quoting: int
    names: Mapping[int, str]

    @property
    def documents(self) -> tuple[int, ...]:
        """Documents that overlap, ascending."""
        return tuple(sorted({finding.document for finding in self.findings}))

    @property
    def excluded(self) -> dict[int, str]:
        """Documents that training must not read, with the reason; what `choose_documents` takes."""
        if self.policy != "exclude":
            return {}
        return {finding.document: f"holds text of {finding.reference}" for finding in reversed(self.findings)}

    @property
    def found(self) -> bool:
        """Whether text that is evaluated on is read in training all the same."""
        return bool(self.findings) and self.policy == "report"

    def under(self, policy: Policy) -> ContaminationResult:
        """The same findings under a policy.

        Raises:
            ArtefactError: the policy is `refuse`, and a text overlaps.
        """
        if self.findings and policy == "refuse":
            raise ArtefactError(
                f"{len(self.documents):,} of {self.num_documents:,} training documents hold text that the evaluation "
                "uses",
                where=self.names[self.findings[0].document],
                got=self.findings[0].excerpt,
                hint="Set data.contamination=exclude to leave them out, or choose another suite or other sources.",
            )
        return replace(self, policy=policy)

    def sentence(self) -> str:
        """For plan, console and report."""
        if not self.references:
            return "contamination not checked: the evaluation's text is generated anew for every prompt"
        if not self.findings:
            quoting = f" ({self.num_quoting:,} quote fewer than {LEAST_WORDS} words)" if self.num_quoting else ""
            return (
                f"no contamination: none of {self.num_documents:,} training documents holds text of "
                f"{_listed(_grouped(self.references))}{quoting}"
            )
        share = sum(finding.num_words for finding in self.findings) / max(self.num_words, 1)
        held = _listed(_grouped(dict.fromkeys(finding.reference for finding in self.findings)))
        count = f"{len(self.documents):,} of {self.num_documents:,} training documents"
        if self.policy == "exclude":
            return f"{count} hold text of {held} and are left out of training"
        return f"contamination: {count} hold text of {held} ({share:.2%} of all words), and training reads them"

    def lines(self) -> list[str]:
        """The findings with the longest overlap, one line each."""
        longest = sorted(self.findings, key=lambda finding: (-finding.num_words, finding.document))
        shown = [
            f"{self.names.get(finding.document, finding.document)}: {finding.num_words:,} of its {finding.of_words:,} "
            f'words are of {finding.reference}: "{finding.excerpt}"'
            for finding in longest[:_NUM_SHOWN]
        ]
        more = len(longest) - len(shown)
        return [*shown, f"and {more:,} more"] if more else shown

    def to_json(self) -> dict[str, Any]:
        """For `--json` and run folders."""
        return {
            "policy": self.policy,
            "references": list(self.references),
            "fingerprint": self.fingerprint,
            "num_documents": self.num_documents,
            "num_words": self.num_words,
            "num_quoting": self.num_quoting,
            "found": self.found,
            "sentence": self.sentence(),
            "findings": [{"name": self.names.get(f.document), **asdict(f)} for f in self.findings],
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> ContaminationResult:
        """The way back from `to_json`."""
        rows = [dict(row) for row in values["findings"]]
        names = {row["document"]: row.pop("name") for row in rows}
        return ContaminationResult(
            policy=values["policy"],
            references=tuple(values["references"]),
            fingerprint=values["fingerprint"],
            num_documents=values["num_documents"],
            num_words=values["num_words"],
            findings=tuple(Finding(**row) for row in rows),
            num_quoting=values["num_quoting"],
            names=names,
        )


class Guard:
    """Finds the texts that are evaluated on in training text.

    Args:
        documents: haystack documents by the haystack's name; shorter ones than 13 words are looked for as a whole.
        wordings: fixed parts of wordings by their name, see `fixed_parts`; each counts as a whole.
    """

    def __init__(self, documents: Mapping[str, Sequence[str]], wordings: Mapping[str, Sequence[str]]) -> None:
        self.references = (*documents, *wordings)
        self.fingerprint = fingerprint([[name, list(texts)] for name, texts in (*documents.items(), *wordings.items())])
        self._num_documents = len(documents)
        collected: dict[int, list[tuple[int, str]]] = {}
        for number, texts in enumerate((*documents.values(), *wordings.values())):
            for text in texts:
                # Enough of a long text to know whether it has 13 words, which counting them all would make slow.
                words = min(len(plain_words(text[:_ENOUGH_CHARACTERS])), RUN_WORDS)
                if words >= _SHORT_PHRASE_WORDS:
                    collected.setdefault(words, []).append((number, text))
        self._tables = {length: _Table(texts, length) for length, texts in collected.items()}

    def scan(self, texts: Iterable[str], policy: Policy, name_of: Callable[[int], str] = str) -> ContaminationResult:
        """Scan all texts and do what the policy asks for.

        Args:
            name_of: how people know a document, by its number.

        Raises:
            ArtefactError: the policy is `refuse`, and a text overlaps.
        """
        findings, quoting, num_documents, num_words = list[Finding](), set[int](), 0, 0
        if self._tables:
            for first, batch in batches(texts):
                for finding, counts in self._of_batch(first, batch):
                    if counts:
                        findings.append(finding)
                    else:
                        quoting.add(finding.document)
                num_documents = first + len(batch.first_word) - 1
                num_words += len(batch.words)
        names = {finding.document: name_of(finding.document) for finding in findings}
        return ContaminationResult(
            policy="report",
            references=self.references,
            fingerprint=self.fingerprint,
            num_documents=num_documents,
            num_words=num_words,
            findings=tuple(findings),
            num_quoting=len(quoting - names.keys()),
            names=names,
        ).under(policy)

    def _of_batch(self, first: int, batch: Batch) -> Iterator[tuple[Finding, bool]]:
        """Overlaps of a batch, and whether each counts."""
        covered: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for length, hashes, inside in batch.runs(list(self._tables)):
            table = self._tables[length]
            for word, reference in table.matches(batch, hashes, inside):
                document = int(np.searchsorted(batch.first_word, word, side="right")) - 1
                covered.setdefault((document, reference), []).append((word, length))
        for (document, reference), hits in sorted(covered.items()):
            words = {place for word, length in hits for place in range(word, word + length)}
            of_words = int(batch.first_word[document + 1] - batch.first_word[document])
            excerpt = " ".join(batch.text(*min(hits)).split())
            finding = Finding(
                document=first + document,
                reference=self.references[reference],
                num_words=len(words),
                of_words=of_words,
                excerpt=excerpt if len(excerpt) <= _EXCERPT_CHARACTERS else f"{excerpt[:_EXCERPT_CHARACTERS]}...",
            )
            is_wording = reference >= self._num_documents
            yield finding, is_wording or len(words) >= LEAST_WORDS or len(words) >= _LEAST_SHARE * of_words


class _Table:
    """All runs of one length in the reference texts: sorted hashes, and where each stands."""

    def __init__(self, texts: Sequence[tuple[int, str]], length: int) -> None:
        self._length = length
        self._batches = [(first, batch) for first, batch in batches(text for _, text in texts)]
        self._reference = np.array([reference for reference, _ in texts], dtype=np.int64)
        hashes, numbers, places = [], [], []
        for number, (_, batch) in enumerate(self._batches):
            for _, found, inside in batch.runs([length]):
                hashes.append(found[inside])
                places.append(np.flatnonzero(inside))
                numbers.append(np.full(len(places[-1]), number, dtype=np.int32))
        joined = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)
        self._hashes, first_seen = np.unique(joined, return_index=True)
        self._batch_of = np.concatenate(numbers)[first_seen] if hashes else np.zeros(0, dtype=np.int32)
        self._word_of: Ints = np.concatenate(places)[first_seen] if hashes else np.zeros(0, dtype=np.int64)
        # A table of bits in front of the binary search: 16 places a run keep 15 of 16 foreign runs out.
        self._bits = max(16, min(30, int(np.ceil(np.log2(16 * len(self._hashes) + 1)))))
        self._seen: npt.NDArray[np.bool_] = np.zeros(1 << self._bits, dtype=np.bool_)
        self._seen[self._slots(self._hashes)] = True

    def _slots(self, hashes: Hashes) -> Hashes:
        return hashes >> np.uint64(64 - self._bits)

    def matches(self, batch: Batch, hashes: Hashes, inside: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """(word at which a known run begins, number of its reference), for runs whose words are the same."""
        if not len(self._hashes):
            return
        maybe = np.flatnonzero(np.take(self._seen, self._slots(hashes)) & inside)
        at = np.minimum(np.searchsorted(self._hashes, hashes[maybe]), len(self._hashes) - 1)
        known = self._hashes[at] == hashes[maybe]
        for word, place in zip(maybe[known].tolist(), at[known].tolist(), strict=True):
            first, reference_batch = self._batches[self._batch_of[place]]
            there = int(self._word_of[place])
            mine, its = batch.text(word, self._length), reference_batch.text(there, self._length)
            if mine == its or plain_words(mine) == plain_words(its):
                text = first + int(np.searchsorted(reference_batch.first_word, there, side="right")) - 1
                yield word, int(self._reference[text])


def fixed_parts(samples: Sequence[Sequence[str]]) -> list[str]:
    """The wording that drawn samples have in common: what is neither a name nor a number nor anything else drawn.

    Args:
        samples: the texts (introduction, facts, question) of every sample.

    Returns:
        Runs of words, each of 6 to 8 words, or shorter where that is most of its text ("the pass key is").
    """
    least = max(round(_FIXED_SHARE * len(samples)), 2)
    seen: Counter[tuple[str, ...]] = Counter()
    texts = {text: plain_words(text) for sample in samples for text in sample}
    for sample in samples:
        seen.update({run for text in sample for run in _runs(texts[text])})
    parts: dict[str, None] = {}
    for words in texts.values():
        fixed = [seen[run] >= least for run in _runs(words)]
        for begin, end in _stretches(fixed):
            part = words[begin : end + _SHORT_PHRASE_WORDS - 1]
            if len(part) >= _PHRASE_WORDS or len(part) >= _SHORT_PHRASE_SHARE * len(words):
                size = min(len(part), _LONGEST_PART_WORDS)
                parts.update(dict.fromkeys(" ".join(part[at : at + size]) for at in range(len(part) - size + 1)))
    return list(parts)


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + _SHORT_PHRASE_WORDS]) for at in range(len(words) - _SHORT_PHRASE_WORDS + 1)]


def _stretches(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(begin, end) of every longest row of true flags."""
    begin = None
    for place, flag in enumerate([*flags, False]):
        if flag and begin is None:
            begin = place
        elif not flag and begin is not None:
            yield begin, place
            begin = None


def _grouped(references: Iterable[str]) -> list[str]:
    """Haystacks by name, many wordings by their number."""
    names = list(references)
    wordings = [name for name in names if name.startswith(WORDING)]
    if len(wordings) <= _MOST_NAMED:
        return names
    return [*(name for name in names if name not in wordings), f"the wordings of {len(wordings)} tasks"]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
