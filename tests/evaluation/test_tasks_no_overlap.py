"""The material of the tasks: questions share no word with their facts, and nothing of it is trained on."""

from __future__ import annotations

import pydoc_data.topics
import random
import re

from ctxext.data import facts
from ctxext.data.facts import make_fact
from ctxext.evaluation.suite import load_suite
from ctxext.evaluation.tasks import qa
from ctxext.evaluation.tasks.cloze import STATEMENTS
from ctxext.evaluation.tasks.no_overlap import NAMES, PAIRS

# Words without meaning of their own, which question and fact may share.
FUNCTION_WORDS = set("which person is has been was to the a an in of at and or for from with under over it on".split())


def stems(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", text.replace("{name}", "").lower())
    return {word[:4] for word in words if word not in FUNCTION_WORDS and len(word) > 2}


def test_no_question_shares_a_word_stem_with_its_fact() -> None:
    assert len(PAIRS) >= 36
    shared = {(fact, question): stems(fact) & stems(question) for fact, question in PAIRS}
    assert not {pair: words for pair, words in shared.items() if words}


def test_every_fact_names_its_person_once_and_no_two_facts_answer_one_question() -> None:
    assert all(fact.count("{name}") == 1 for fact, _ in PAIRS)
    assert len({question for _, question in PAIRS}) == len(PAIRS)
    assert len(set(NAMES)) == len(NAMES)


def test_names_stand_nowhere_in_the_haystack() -> None:
    text = "\n".join(pydoc_data.topics.topics.values()).lower()
    assert not [name for name in NAMES if name.lower() in text]


def test_cloze_statements_are_distinct_and_do_not_contain_their_answer() -> None:
    assert len({statement for statement, _ in STATEMENTS}) == len(STATEMENTS) >= 40
    assert not [s for s, answers in STATEMENTS if any(re.search(rf"\b{a}\b", s, re.IGNORECASE) for a in answers)]


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[at : at + 4]) for at in range(len(words) - 3)}


def test_training_facts_share_no_four_words_with_any_task() -> None:
    drawn = [make_fact("records", random.Random(number)) for number in range(1000)]
    training = set().union(*(runs(fact.statement + fact.question) for fact in drawn))
    evaluation = set[tuple[str, ...]]()
    for suite in ("ruler", "no-overlap", "short-guard"):
        for task in load_suite(suite).members:
            for number in range(20):
                draft = task.draft(random.Random(number), 4096, 0.5)
                items = " ".join(item.text for item in getattr(draft.body, "items", ()))
                evaluation |= runs(draft.intro) | runs(draft.question + draft.answer_prefix) | runs(items)
    assert len(training) > 300
    assert len(evaluation) > 300
    assert not training & evaluation


def test_names_of_people_are_not_those_of_training() -> None:
    assert not set(facts._FIRST) & {*NAMES, *qa._FIRST}
    assert not set(facts._LAST) & set(qa._LAST)
