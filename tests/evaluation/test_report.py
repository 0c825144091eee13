"""The report: complete, self-contained, safe against what a model answers, and honest beside its numbers."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from ctxext.evaluation.arms import Arm, ArmName
from ctxext.evaluation.failures import failure_kind, wrong_examples
from ctxext.evaluation.page import visible
from ctxext.evaluation.report import (
    ReportFacts,
    cells_csv,
    conclusions,
    coverage,
    shown_samples,
    summary,
    terminal_table,
    write_report,
)
from ctxext.evaluation.store import SampleResult

HOSTILE = '<script>alert("x")</script> <img src=https://evil.example/a.png> \u202eback & forth'

FACTS = ReportFacts(
    title="Tiny from 64 to 128",
    model="tiny <model>",
    method="YaRN, factor 2",
    original_length=64,
    target_length=128,
    windows="skip-wise (two chunks)",
    suite={"wording": "passkey", "grid": [{"length": 64}]},
    plan_id="0123abcd",
    model_description="instruction-tuned, restored from 4-bit weights",
    facts_share=0.7,
    facts_style="four wordings",
    seconds={"train": 12.5, "evaluate": 2.0},
    environment={"torch": "2.13.0", "device": {"name": "CPU"}},
    notes=["A note about https://example.org/."],
)


def sample(length: int, index: int, right: bool, answer: str = "", status: str = "ok") -> SampleResult:
    place = f"{length}/0.5000/{index}"
    return SampleResult(
        sample_id=f"needle/{place}",
        task="needle",
        length_tokens=length,
        depth=0.5,
        index=index,
        status=status,
        needle_position=length // 2,
        haystack_sha256=f"h{place}",
        prompt_sha256=f"p{place}",
        key="key",
        expected="12345",
        answer=answer or ("12345" if right else "54321"),
        score=float(right),
        degenerate=None,
        loss_blocks=[2.0] * (length // 32),
        loss_block_tokens=32,
    )


def arm(name: ArmName, beyond: str, recorded: bool = False, answer: str = "") -> Arm:
    far = [
        sample(128, i, mark == "1", answer, "ok" if mark != "x" else "out_of_memory") for i, mark in enumerate(beyond)
    ]
    return Arm(name, f"label of {name}", recorded, [sample(64, 0, True), *far], {"identity_hash": f"id-{name}"})


ARMS = [
    arm("base", "00x0", answer=HOSTILE),
    arm("extended", "1111"),
    arm("base", "000000", recorded=True),
    arm("control", "000000", recorded=True),
    arm("extended", "111111", recorded=True),
]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "report"
    assert write_report(path, FACTS, ARMS) == path / "index.html"
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def test_every_promised_file_is_there_and_nothing_else(folder: Path) -> None:
    pictures = [
        "heatmaps",
        "loss_by_position",
        "accuracy_by_length",
        "heatmap-base",
        "heatmap-extended",
    ]
    pictures += ["heatmap-recorded-base", "heatmap-recorded-control", "heatmap-recorded-extended"]
    files = {f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == files | {"index.html", "cells.csv", "summary.json"}


def test_the_page_runs_no_script_and_loads_nothing_from_outside(page: Page, folder: Path) -> None:
    policies = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies
    assert str(policies[0]).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [str(attributes["src"]) for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    links = [str(attributes["href"]) for _, attributes in page.tags if "href" in attributes]
    assert links
    assert all((folder / link).is_file() for link in links)
    assert "url(" not in (folder / "index.html").read_text(encoding="utf-8")


def test_answers_are_shown_as_text(page: Page, folder: Path) -> None:
    assert '<script>alert("x")</script>' in page.text
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "tiny &lt;model&gt;" in html
    assert "\u202e" not in html
    assert "\\u202eback" in html


def test_the_conclusions_come_first_and_the_training_on_facts_stands_beside_them(page: Page) -> None:
    text = page.text
    places = [
        text.index(words) for words in ("instruction-tuned", "Context extension is shown", "Your run", "label of base")
    ]
    assert places == sorted(places)
    assert "extension and retrieval together: 70% of the training windows" in text
    assert "skip-wise (two chunks)" in text
    assert "0123abcd" in text
    assert "device.name" in text


def test_recorded_arms_are_marked(page: Page) -> None:
    marks = [attributes for tag, attributes in page.tags if tag == "span" and attributes.get("class") == "recorded"]
    # Table, controls, heatmap, numbers and answers of three arms each.
    assert len(marks) == 15
    assert "Recorded on another machine" in page.text


def test_the_csv_counts_missing_apart_from_wrong() -> None:
    rows = list(csv.DictReader(cells_csv(ARMS[:1]).splitlines()))
    assert len(rows) == 2
    counts = {key: rows[1][key] for key in ("arm", "recorded", "task", "length_tokens", "depth", "num_right")}
    assert counts == {
        "arm": "base", "recorded": "false", "task": "needle", "length_tokens": "128", "depth": "0.5", "num_right": "0",
    }  # fmt: skip
    assert (rows[1]["num_samples"], rows[1]["num_missing"], rows[1]["num_endless"]) == ("3", "1", "0")
    # The upper end for none right of n is z^2 / (n + z^2).
    assert float(rows[1]["high"]) == pytest.approx(3.841459 / 6.841459, abs=1e-6)


def test_the_summary_holds_the_sentences_and_the_table(folder: Path) -> None:
    stored = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    claim = stored["statements"][0]
    assert claim["topic"] == "extension"
    assert claim["recorded"]
    assert claim["numbers"]["mcnemar_p"] == 2 * 0.5**6
    assert claim["sentence"].startswith("Recorded on another machine: Context extension is shown")
    assert [row["arm"] for row in stored["table"]] == ["base", "extended", "base", "control", "extended"]
    assert stored["table"][1]["lengths"]["128"]["num_right"] == 4
    assert stored["facts"]["plan_id"] == "0123abcd"


def test_writing_again_gives_the_same_bytes_and_removes_pictures_of_arms_that_are_gone(tmp_path: Path) -> None:
    write_report(tmp_path, FACTS, ARMS[:2])
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "heatmap-untrained.svg").write_text("old")
    (tmp_path / "tasks" / "vt").mkdir(parents=True)
    (tmp_path / "tasks" / "vt" / "heatmaps.svg").write_text("of a task that is gone")
    (tmp_path / "mine.txt").write_text("stays")
    write_report(tmp_path, FACTS, ARMS[:2])
    assert (tmp_path / "mine.txt").read_text() == "stays"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "mine.txt"} == first


def test_the_shortest_wrong_prompts_are_the_worst_and_five_are_shown() -> None:
    samples = [sample(128, i, False) for i in range(6)] + [sample(64, 7, False), sample(64, 8, True)]
    shown = wrong_examples(Arm("base", "base", False, samples, {}))
    assert [s.sample_id for s in shown] == ["needle/64/0.5000/7", *(f"needle/128/0.5000/{i}" for i in range(4))]


def test_long_answers_are_cut_and_control_characters_named() -> None:
    assert visible("a" * 400) == "a" * 300 + "…"
    assert visible("a\x1b[31m\nb") == "a\\u001b[31m\nb"


def test_the_terminal_gets_a_table_and_the_sentences_that_matter() -> None:
    table, sentences = terminal_table(ARMS, FACTS)
    stream = io.StringIO()
    Console(width=120, file=stream).print(table)
    text = stream.getvalue()
    assert "extended (recorded)" in text
    assert "6/6" in text
    assert "128 *" in text
    assert "Context extension is shown" in sentences[0]
    assert "Your run" in sentences[1]
    assert sentences[-1].startswith("This run trained extension and retrieval together")
    assert len(terminal_table(ARMS, replace(FACTS, facts_share=0.0))[1]) == len(sentences) - 1


def shapes(samples: list[SampleResult], name: str = "base", **run: object) -> Arm:
    return Arm(name, f"label of {name}", False, samples, {"identity": run})


def several_tasks(name: str, right: bool, *lengths: int) -> Arm:
    """Two needle tasks over three depths, a task whose answers have parts, and the control without a needle."""
    samples = []
    for length in lengths or (64, 120):
        for index, depth in enumerate((0.0, 0.5, 1.0)):
            for task in ("needle", "needle_noise"):
                one = sample(length, index, right)
                place = f"{task}/{length}/{depth:.4f}/{index}"
                facts = {"haystack": "noise"} if task == "needle_noise" else {}
                samples.append(replace(one, sample_id=place, task=task, depth=depth, prompt_sha256=place, facts=facts))
        parts = sample(length, 7, False)
        samples.append(
            replace(
                parts,
                sample_id=f"vt/{length}/0.5000/7",
                prompt_sha256=f"vt{length}",
                task="vt",
                score=0.5,
                answers=["12345", "98765"],
                answer="12345",
            )
        )
        none = sample(length, 8, False, answer="...")
        samples.append(
            replace(none, sample_id=f"no/{length}", prompt_sha256=f"no{length}", task="no_needle", degenerate="empty")
        )
    tasks = {"needle_noise": {"task": "needle", "haystack": "noise"}, "no_needle": {"task": "no_needle"}}
    return shapes(samples, name, haystack="python-docs", tasks=tasks, max_new_tokens=8)


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = [several_tasks("base", False), several_tasks("control", False), several_tasks("text-alone", True)]
    path = tmp_path_factory.mktemp("tasks")
    excerpts = {"needle/64/0.0000/0": "before <i>it</i> 12345 \u202e after"}
    perplexity = {
        "base": {
            "kind": "sliding-window", "window_tokens": 64, "stride_tokens": 32, "perplexity": 12.5, "loss": 2.526,
            "num_tokens": 256, "num_documents": 2, "blocks": [{"start": 0, "end": 128, "loss": 2.5, "num_tokens": 128}],
        }
    }  # fmt: skip
    write_report(path, FACTS, arms, excerpts=excerpts, perplexity=perplexity)
    return path


def test_one_page_holds_every_task_and_switches_without_a_script(tasks_folder: Path) -> None:
    html = (tasks_folder / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert "default-src 'none'" in html
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    switches = {str(a["id"]) for tag, a in page.tags if tag == "input"}
    labels = {str(a["for"]) for tag, a in page.tags if tag == "label"}
    assert switches == labels
    assert {"task-0", "task-1", "task-2", "task-3", "overview-all", "grid-0-arm-2", "grid-0-position"} <= switches
    for task in range(4):
        assert f"#task-{task}:checked ~ .panels .panel-{task} {{ display: block; }}" in html
    for number in range(3):
        assert f".arm-{number}:checked ~ .grids figure:not(.of-{number}) {{ display: none; }}" in html
    # In each group exactly one is chosen at first, so that something is shown without a click.
    groups: dict[str, int] = {}
    for tag, attributes in page.tags:
        if tag == "input":
            name = str(attributes["name"])
            groups[name] = groups.get(name, 0) + ("checked" in attributes)
    assert set(groups.values()) == {1}


def test_pictures_of_each_task_lie_in_a_folder_of_their_own_and_every_link_works(tasks_folder: Path) -> None:
    page = Page((tasks_folder / "index.html").read_text(encoding="utf-8"))
    links = {str(attributes["href"]) for _, attributes in page.tags if "href" in attributes}
    files = {path.relative_to(tasks_folder).as_posix() for path in tasks_folder.rglob("*") if path.is_file()}
    assert links == files - {"index.html"}
    assert {
        "tasks/vt/accuracy_by_length.png",
        "tasks/needle/heatmaps.svg",
        "heatmap-text-alone.png",
    } <= files
    assert "tasks/vt/heatmaps.svg" not in files  # its evidence has no depth


def test_every_cell_says_its_exact_numbers_when_pointed_at(tasks_folder: Path) -> None:
    page = Page((tasks_folder / "index.html").read_text(encoding="utf-8"))
    titles = [str(a["title"]) for tag, a in page.tags if tag == "td" and "title" in a]
    assert "depth 0, 64 tokens: 0 of 1 right, 95% interval 0.00 to 0.79, 1 independent text" in titles
    assert "vt, 64 tokens: 0 of 1 right, mean score 0.50, 95% interval 0.05 to 0.95, 1 independent text" in titles
    assert any(title.endswith("1 degenerate") for title in titles)
    assert any(title.startswith("position from 32, 64 tokens") for title in titles)


def test_controls_stand_apart_from_what_they_control(tasks_folder: Path) -> None:
    page = Page((tasks_folder / "index.html").read_text(encoding="utf-8"))
    assert "A control: these texts hold no needle" in page.text
    assert "Without a needle (chance level): base 0 of 2" in page.text
    stored = json.loads((tasks_folder / "summary.json").read_text(encoding="utf-8"))
    controls = stored["table"][0]["controls"]
    assert controls["chance"]["num_samples"] == 2
    assert controls["degenerate_inside"]["num_samples"] == 7
    # 14 prompts with a needle: what holds none belongs to no other number.
    assert sum(share["num_samples"] for share in stored["table"][0]["lengths"].values()) == 14
    chance = [s for s in stored["statements"] if s["topic"] == "chance"]
    assert len(chance) == 1
    rows = list(csv.DictReader((tasks_folder / "cells.csv").read_text().splitlines()))
    assert {(row["num_degenerate"], row["num_empty"]) for row in rows if row["task"] == "no_needle"} == {("1", "1")}


def test_arms_of_any_name_are_judged_against_the_control_arm_task_by_task(tasks_folder: Path) -> None:
    page = Page((tasks_folder / "index.html").read_text(encoding="utf-8"))
    assert "Beyond the original length, text-alone against the control arm" in page.text
    assert "Beyond the original length, task by task" in page.text
    assert "p values are adjusted for 3 comparisons (Holm)" in page.text


def test_repeated_noise_is_labelled_as_saliency(tasks_folder: Path) -> None:
    html = (tasks_folder / "index.html").read_text(encoding="utf-8")
    assert html.count("Saliency, not retrieval:") == 1
    assert b"repeated noise: saliency" in (tasks_folder / "tasks" / "needle_noise" / "heatmaps.svg").read_bytes()
    assert b"repeated noise" not in (tasks_folder / "tasks" / "needle" / "heatmaps.svg").read_bytes()


def test_the_worst_answers_come_with_their_text_and_the_kind_of_failure(tasks_folder: Path) -> None:
    html = (tasks_folder / "index.html").read_text(encoding="utf-8")
    assert "before &lt;i&gt;it&lt;/i&gt; <mark>12345</mark> \\u202e after" in html
    assert "another number" in Page(html).text
    assert "incomplete: 1 of 2" in Page(html).text
    arms = [several_tasks("base", False)]
    shown = [one.sample_id for _, one in shown_samples(arms)]
    assert "needle/64/0.0000/0" in shown
    assert not [name for name in shown if name.startswith("no/")]


def test_perplexity_stands_beside_the_answers(tasks_folder: Path) -> None:
    text = Page((tasks_folder / "index.html").read_text(encoding="utf-8")).text
    assert "12.50" in text
    assert "window 64, stride 32" in text
    stored = json.loads((tasks_folder / "summary.json").read_text(encoding="utf-8"))
    assert stored["perplexity"]["base"]["perplexity"] == 12.5
    assert (tasks_folder / "perplexity_by_position.svg").is_file()


@pytest.mark.parametrize("reaches", [False, True])
def test_a_suite_that_stops_short_of_the_target_is_flagged_in_every_output(tmp_path: Path, reaches: bool) -> None:
    facts = replace(FACTS, target_length=120 if reaches else 512)
    words = "Tested up to 120 tokens; nothing is claimed up to the target 512."
    sentence = "The longest prompt has 120 of the 512 tokens of the target length, so nothing is claimed beyond 120"
    arms = [several_tasks("base", True).of_task("needle")]
    write_report(tmp_path, facts, arms)
    pictures = sorted(tmp_path.glob("*.svg"))
    assert len(pictures) == 6
    # A narrow picture breaks the sentence into lines.
    assert [words[:23].encode() in picture.read_bytes() for picture in pictures] == [not reaches] * len(pictures)
    assert (sentence in Page((tmp_path / "index.html").read_text(encoding="utf-8")).text) is not reaches
    stored = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (stored["coverage"]["sentence"] is None) is reaches
    assert [s["topic"] for s in stored["statements"]].count("coverage") == (not reaches)
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    assert {(row["longest_tested"], row["target_length"]) for row in rows} == {("120", "120" if reaches else "512")}
    table, sentences = terminal_table(arms, facts)
    assert ("tested up to 120 only" in str(table.title)) is not reaches
    assert any("nothing is claimed beyond it" in text for text in sentences) is not reaches


def test_the_terminal_table_of_many_tasks_fits_80_columns() -> None:
    lengths = [64 * number for number in range(1, 9)]
    table, _ = terminal_table(
        [several_tasks("base", False, *lengths), several_tasks("extended", True, *lengths)], FACTS
    )
    stream = io.StringIO()
    Console(width=80, file=stream, color_system=None).print(table)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = stream.getvalue()
    assert "needle_noise" in text
    assert "no_needle" not in text
    assert "512 *" in text  # the longest length is always there
    assert "0.50" in text
    assert "…" not in text
    many = [several_tasks(f"arm {number}", True, *lengths) for number in range(11)]
    stream = io.StringIO()
    Console(width=80, file=stream, color_system=None).print(terminal_table(many, FACTS)[0])
    assert "needle_noise" not in stream.getvalue()
    assert stream.getvalue().count("arm 10") == 1  # only the means are left


def test_pictures_are_drawn_over_positions_when_asked_for(tmp_path: Path) -> None:
    arms = [several_tasks("base", True).of_task("needle")]
    write_report(tmp_path, FACTS, arms, over="position")
    assert b"position of the needle (token index)" in (tmp_path / "heatmap-base.svg").read_bytes()
    assert not (tmp_path / "heatmaps_by_position.svg").exists()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("54321", "another number"),
        ("12346.", "nearly right: one digit off"),
        ("1234", "nearly right: a part of it"),
        ("9123450", "inside something longer"),
        ("I do not know", "no number"),
    ],
)
def test_failures_are_told_apart(answer: str, kind: str) -> None:
    assert failure_kind(sample(64, 0, False, answer=answer)) == kind


def test_degenerate_and_missing_answers_are_kinds_of_their_own() -> None:
    assert failure_kind(replace(sample(64, 0, False), degenerate="endless")) == "endless"
    assert failure_kind(sample(64, 0, False, status="out_of_memory")) == "out of memory"
    assert failure_kind(sample(64, 0, True)) == ""


def test_room_for_the_answer_is_that_of_the_longest_task() -> None:
    grid = [{"length": 64, "depths": [0.5], "samples": 1}]
    tasks = [{"task": "needle"}, {"task": "needle", "name": "long", "max_new_tokens": 48}]
    facts = replace(FACTS, suite={"name": "mine", "description": "", "tasks": tasks, "grid": grid})
    assert facts.answer_tokens == 48
    assert replace(FACTS, suite={"max_new_tokens": 7, "other": 1}).answer_tokens == 7
    assert coverage(replace(facts, target_length=176), ARMS[:1]).reached
    assert not coverage(replace(facts, target_length=177), ARMS[:1]).reached


def test_an_arm_may_have_any_name(tmp_path: Path) -> None:
    arms = [arm("base", "00"), arm("../<b>ä/1</b>", "11")]
    write_report(tmp_path / "report", FACTS, arms)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert "<b>" not in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "no control arm was run" in conclusions(FACTS, arms)[0].sentence
    assert summary(FACTS, arms, [])["table"][1]["arm"] == "../<b>ä/1</b>"
