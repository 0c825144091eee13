"""Every task: exactly as long as asked, evidence whole and once, the same sample whatever was built before."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import NAMES, made_tokenizer

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.prompt import PromptBuilder, suite_builder
from ctxext.evaluation.suite import Cell, Sample, Suite, load_suite
from ctxext.evaluation.tasks.base import Task
from ctxext.evaluation.tasks.registry import TASKS

LENGTHS = (3000, 3451, 4090)
TOKENIZERS = ("bytes", "byte-level BPE", "BPE with byte fallback")
MORE = [
    {"task": "needle", "wording": "passkey", "name": "passkey"},
    {"task": "needle", "values": "words", "name": "words"},
    {"task": "needle", "num_keys": 3, "name": "distractors"},
    {"task": "no_needle"},
    {"task": "key_value"},
    {"task": "no_overlap"},
    {"task": "needle_sweep", "needles": [0.0, 0.2, 0.37, 0.5, 0.8, 1.0]},
    {"task": "cloze"},
    {"task": "variable_tracking", "num_chains": 3, "name": "chains"},
]


def suite_of(tasks: list[dict[str, Any]], **changes: Any) -> Suite:
    values = {
        "description": "t",
        "haystack": "generated-words",
        "tasks": tasks,
        "grid": [{"length": 3000, "depths": [0.5], "samples": 1}],
        **changes,
    }
    return Suite.model_validate(values)


RULER = [task.model_dump(mode="json", exclude_defaults=True) for task in load_suite("ruler").members]
ALL = suite_of([*RULER, *MORE])
CELLS = [task.cell_name for task in ALL.members]


def builder(tokenizer: str = "bytes", suite: Suite = ALL) -> PromptBuilder:
    return suite_builder(suite, made_tokenizer(tokenizer))


def sample(name: str, length: int = 3000, depth: float = 0.5, index: int = 0) -> Sample:
    return Sample(Cell(name, length, depth), index)


def occurrences(ids: list[int], part: list[int]) -> list[int]:
    return [start for start in range(len(ids) - len(part) + 1) if ids[start : start + len(part)] == part]


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def building(request: pytest.FixtureRequest) -> tuple[Any, PromptBuilder]:
    return made_tokenizer(request.param), builder(request.param)


def test_the_shipped_suite_has_all_13_tasks_of_ruler_and_every_task_is_tried_here() -> None:
    assert len(RULER) == 13
    assert {task.task_name for task in ALL.members} == set(TASKS)
    assert len(NAMES) == 4


@pytest.mark.parametrize("name", CELLS)
def test_prompts_have_exactly_the_asked_length_with_every_item_whole_and_once(
    building: tuple[Any, PromptBuilder], name: str
) -> None:
    tokenizer, made = building
    for length, depth in zip(LENGTHS, (0.0, 0.37, 1.0), strict=True):
        prompt = made.build(sample(name, length, depth))
        assert len(prompt.input_ids) == length
        for span in prompt.spans:
            part = prompt.input_ids[span.start : span.end]
            assert occurrences(prompt.input_ids, part) == [span.start], tokenizer.decode(part)
        ordered = sorted(prompt.spans, key=lambda span: span.start)
        assert all(one.end <= other.start for one, other in pairwise(ordered))
        asked = [span.start for span in prompt.spans if span.asked]
        assert not asked or prompt.needle_position == asked[0]


@pytest.mark.parametrize("name", CELLS)
def test_every_answer_stands_in_the_text_and_none_where_none_should(
    building: tuple[Any, PromptBuilder], name: str
) -> None:
    tokenizer, made = building
    prompt = made.build(sample(name, 3451, 0.37))
    text = tokenizer.decode(prompt.input_ids)
    asked = "".join(tokenizer.decode(prompt.input_ids[span.start : span.end]) for span in prompt.spans if span.asked)
    if name == "no_needle":
        assert prompt.expected not in text
    elif name != "cloze":
        assert all(answer in (asked or text) for answer in prompt.answers)
        assert not set(prompt.distractors) & set(prompt.answers)


@pytest.mark.parametrize("name", ["niah_single_2", "niah_single_3", "niah_multikey_2", "niah_multikey_3", "key_value"])
def test_the_asked_item_stands_at_its_depth(building: tuple[Any, PromptBuilder], name: str) -> None:
    _, made = building
    places = [made.build(sample(name, 4097, depth)).needle_position / 4097 for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert places == sorted(places)
    assert places[0] < 0.13
    assert places[-1] > 0.7
    assert places[2] == pytest.approx(0.5, abs=0.13)


def test_the_document_that_answers_stands_where_the_cell_says_and_the_other_anywhere() -> None:
    made, second = builder("byte-level BPE"), []
    for index in range(30):
        prompt = made.build(sample("qa_2", 4097, 0.2, index))
        assert prompt.spans[0].start / 4097 == pytest.approx(0.24, abs=0.12)
        second.append(prompt.spans[1].start / 4097)
    assert min(second) < 0.25
    assert max(second) > 0.75


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery", "vt"])
def test_places_of_several_answers_lie_evenly_over_the_text(name: str) -> None:
    made = builder("byte-level BPE")
    prompts = [made.build(sample(name, 3000, 0.5, index)) for index in range(60)]
    starts = [span.start for prompt in prompts for span in prompt.spans if span.asked]
    low, high = min(starts), max(starts) + 1  # the text begins behind an example and ends before the question
    places = Counter(4 * (start - low) // (high - low) for start in starts)
    assert len(starts) >= 240
    assert all(0.17 < places[quarter] / len(starts) < 0.34 for quarter in range(4)), places


def test_the_asked_key_is_not_betrayed_by_its_place_among_the_needles() -> None:
    made, ranks = builder("byte-level BPE"), Counter[int]()
    for index in range(60):
        prompt = made.build(sample("niah_multikey_1", 3000, 0.5, index))
        starts = sorted(span.start for span in prompt.spans)
        ranks[starts.index(prompt.needle_position)] += 1
    assert ranks[1] + ranks[2] > ranks[0] + ranks[3] > 5  # at depth .5 among three at random


def test_samples_do_not_depend_on_what_was_built_before() -> None:
    wanted = [sample(name, 3000, 0.5, index) for name in CELLS for index in (0, 1)]
    made = builder()
    first = {one.sample_id: made.build(one) for one in wanted}
    random.Random(3).shuffle(wanted)
    again = builder()
    assert all(again.build(one) == first[one.sample_id] for one in wanted)
    assert len({prompt.prompt_sha256 for prompt in first.values()}) == len(wanted)


def test_where_the_question_stands_and_how_it_is_scored_changes_no_sample() -> None:
    tasks = [{"task": "needle", "num_keys": 3}, {"task": "key_value"}, {"task": "qa"}]
    plain = builder(suite=suite_of(tasks))
    other = builder(suite=suite_of(tasks, question_first=True))
    for task in tasks:
        one, two = (made.build(sample(str(task["task"]))) for made in (plain, other))
        assert (one.answers, one.key) == (two.answers, two.key)
        assert one.input_ids != two.input_ids


def test_question_first_asks_before_the_text_and_ends_with_the_answer_prefix() -> None:
    tokenizer = made_tokenizer("bytes")
    for wording, prefix in (("ruler", "mentioned in the provided text is"), ("passkey", " the pass key is")):
        tasks = [{"task": "needle", "wording": wording, "question_first": True}]
        prompt = builder(suite=suite_of(tasks)).build(sample("needle"))
        text = tokenizer.decode(prompt.input_ids)
        assert len(prompt.input_ids) == 3000
        assert text.endswith(prefix)
        assert text.count("?") == 1
        assert text.index("?") < prompt.needle_position


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "<|assistant|>{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}"
)


def chat_suite(**changes: Any) -> Suite:
    return suite_of([{"task": "needle"}, {"task": "common_words"}], apply_chat_template=True, **changes)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("thinking", [False, True])
def test_chat_prompts_have_exactly_the_asked_length_and_switch_thinking_off(name: str, thinking: bool) -> None:
    tokenizer = made_tokenizer(name)
    tokenizer.chat_template = CHAT
    try:
        for cell in ("needle", "common_words"):
            prompt = builder(name, chat_suite(thinking=thinking, answer_prefix=not thinking)).build(sample(cell, 3451))
            text = tokenizer.decode(prompt.input_ids).strip()
            assert len(prompt.input_ids) == 3451
            assert text.startswith("<|user|>")
            assert text.count("<|assistant|>") == 1
            assert text.endswith("<|assistant|>") == thinking
            assert ("</think>" in text) is not thinking
            assert prompt.thinking is thinking
    finally:
        tokenizer.chat_template = None


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        builder(suite=chat_suite())


def test_paired_samples_share_haystack_and_needle_over_all_depths() -> None:
    made = builder(suite=suite_of([{"task": "needle"}], haystacks="paired"))
    prompts = [[made.build(sample("needle", 3000, depth, index)) for depth in (0.0, 0.5, 1.0)] for index in (0, 1)]
    for row in prompts:
        assert len({(p.haystack_sha256, p.expected, p.key) for p in row}) == 1
        assert len({p.prompt_sha256 for p in row}) == 3
    assert prompts[0][0].haystack_sha256 != prompts[1][0].haystack_sha256
    assert prompts[0][0].expected != prompts[1][0].expected


def test_a_shared_haystack_has_one_hash_a_length_and_needles_of_their_own() -> None:
    made = builder("byte-level BPE", suite_of([{"task": "needle"}, {"task": "no_overlap"}], haystacks="shared"))
    prompts = [made.build(sample(name, 3000, 0.5, i)) for name in ("needle", "no_overlap") for i in range(4)]
    assert len({prompt.haystack_sha256 for prompt in prompts}) == 1
    assert len({prompt.expected for prompt in prompts[:4]}) == 4
    assert made.build(sample("needle", 3001)).haystack_sha256 != prompts[0].haystack_sha256


@pytest.mark.parametrize("name", CELLS)
def test_a_length_without_room_is_refused_with_one_that_has(name: str) -> None:
    made = builder("byte-level BPE")
    with pytest.raises(UsageError, match="leaves no room") as caught:
        made.build(sample(name, 40))
    enough = int(int(str(caught.value.expected).split()[2]) * 1.5)  # at another length another sample is drawn
    assert len(made.build(sample(name, enough)).input_ids) == enough


def test_frequent_words_stand_out_of_all_coded_words() -> None:
    prompt = builder().build(sample("fwe", 4090))
    counted = Counter(made_tokenizer("bytes").decode(prompt.input_ids).split())
    assert min(counted[word] for word in prompt.answers) > max(counted[word] for word in prompt.distractors) > 0


@pytest.mark.parametrize(("length", "repeats"), [(4090, (6, 1)), (12_000, (30, 3))])
def test_common_words_are_the_most_common_and_inside_no_other_word(length: int, repeats: tuple[int, int]) -> None:
    prompt = builder().build(sample("cwe", length))
    text = made_tokenizer("bytes").decode(prompt.input_ids)
    counted = Counter(text.rsplit("Below is a numbered list", 1)[1].split("\nQuestion")[0].split())
    assert {counted[answer] for answer in prompt.answers} == {repeats[0]}
    assert max(counted[word] for word in prompt.distractors) == repeats[1]
    assert not [word for word in prompt.distractors if any(answer in word for answer in prompt.answers)]


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Station {n} lies on hill {n}. "
                    + "It is quiet there. " * 6
                    + f"Its keeper is Ada{n}x.",
                    "qas": [
                        {"question": f"Who keeps station {n}?", "answers": [{"text": f"Ada{n}x"}], "id": str(n)},
                        {"question": "Unanswerable?", "answers": [], "is_impossible": True, "id": f"u{n}"},
                    ],
                }
                for n in range(60)
            ]
        }
    ]
}
HOTPOT = [
    {
        "question": f"Who leads the owner of boat {n}?",
        "answer": f"Bo{n}y" if n else "yes",
        "supporting_facts": [[f"boat {n}", 0], [f"firm {n}", 0]],
        "context": [
            [f"boat {n}", [f"Boat {n} belongs to firm {n}. ", "It floats. " * 9]],
            [f"firm {n}", [f"Firm {n} is led by Bo{n}y."]],
        ],
    }
    for n in range(60)
]


@pytest.mark.parametrize(("content", "num_spans"), [(SQUAD, 1), (HOTPOT, 2)])
def test_question_files_give_their_documents_and_no_second_answer(tmp_path: Path, content: Any, num_spans: int) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content))
    made = builder("byte-level BPE", suite_of([{"task": "qa", "file": str(path)}]))
    tokenizer = made_tokenizer("byte-level BPE")
    for index in range(10):
        prompt = made.build(sample("qa", 3000, 0.5, index))
        assert len(prompt.input_ids) == 3000
        assert len(prompt.spans) == num_spans
        assert tokenizer.decode(prompt.input_ids).count(prompt.expected) == 1
    with pytest.raises(ArtefactError, match="too few documents"):
        made.build(sample("qa", 30_000))


def test_other_files_are_refused_as_questions(tmp_path: Path) -> None:
    for number, content in enumerate(['{"rows": []}', "[1]", "no json"]):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        with pytest.raises(ArtefactError, match="not a file of questions"):
            builder(suite=suite_of([{"task": "qa", "file": str(path)}])).build(sample("qa"))


def test_every_task_says_what_it_is_when_to_use_it_and_where_it_comes_from() -> None:
    for name, kind in TASKS.items():
        assert issubclass(kind, Task), name
        assert min(map(len, (kind.summary, kind.when, kind.source))) >= 6


def test_a_text_of_needles_holds_the_asked_key_once_and_no_key_twice() -> None:
    tokenizer = made_tokenizer("bytes")
    for name in ("niah_multikey_2", "niah_multikey_3"):
        prompt = builder().build(sample(name, 4090))
        body = tokenizer.decode(prompt.input_ids).split("\nWhat is the special")[0]
        keys = [line.split(" for ")[1].split(" is: ")[0] for line in body.split("\n") if " is: " in line]
        assert len(keys) > 25
        assert len(set(keys)) == len(keys)
        assert keys.count(prompt.key) == 1
