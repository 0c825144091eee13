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

from ctxext.evaluation.conclusions import Arm, ArmName
from ctxext.evaluation.report import ReportFacts, cells_csv, terminal_table, visible, write_report, wrong_examples
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
        "accuracy_by_depth",
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
    assert len(sources) == 8
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
    # Table, picture, numbers and answers of three arms each.
    assert len(marks) == 12
    assert "Recorded on another machine" in page.text


def test_the_csv_counts_missing_apart_from_wrong() -> None:
    rows = list(csv.DictReader(cells_csv(ARMS[:1]).splitlines()))
    assert len(rows) == 2
    assert rows[1] | {"wilson_low": "", "wilson_high": ""} == {
        "arm": "base", "recorded": "false", "task": "needle", "length_tokens": "128", "depth": "0.5", "num_right": "0",
        "num_samples": "3", "num_missing": "1", "num_degenerate": "0", "wilson_low": "", "wilson_high": "",
    }  # fmt: skip
    # The upper end for none right of n is z^2 / (n + z^2).
    assert float(rows[1]["wilson_high"]) == pytest.approx(3.841459 / 6.841459, abs=1e-6)


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
