"""`ctxext compare`: only shared prompts are compared, what is not shared is said, and verdicts are words."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.known_answers import arm, blind, grid, limited, oracle
from rich.console import Console

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.store import SampleResult, SampleStore
from ctxext.pipeline.compare import Entry, compare, comparison_csv, comparison_table, load_entries, write_comparison


def entry(label: str, samples: list[SampleResult], original: int = 1024) -> Entry:
    return Entry(label, arm("extended", samples), original, 4096)


def stored(folder: Path, samples: list[SampleResult]) -> Path:
    store = SampleStore(folder, {"weights": {"source": folder.name}}, {})
    for sample in samples:
        store.add(sample)
    return folder


def printed(entries: list[Entry]) -> str:
    table, lines = comparison_table(compare(entries))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    for line in lines:
        console.print(line, markup=False)
    return " ".join(console.export_text().split())


def test_the_better_arm_is_named_and_every_length_judged_with_adjusted_p() -> None:
    comparison = compare([entry("base", grid(limited(1024))), entry("yarn", grid(oracle))])
    whole, *parts = comparison.tests
    assert whole.verdict.startswith("yarn is better than base (p = ")
    assert [part.brief.split(" ")[0] for part in parts] == ["alike", "better", "better"]
    assert all(part.p_adjusted >= part.comparison.p_value for part in parts)
    assert whole.comparison.num_pairs == 75
    assert not comparison.notes


def test_only_common_prompts_count_and_the_others_are_named() -> None:
    # The second arm has more prompts, all of them wrong: they must not pull its share down.
    extra = [replace(s, score=0.0, prompt_sha256=f"other {s.prompt_sha256}") for s in grid(oracle, [4096])]
    comparison = compare([entry("a", grid(oracle)), entry("b", [*grid(oracle), *extra])])
    assert len(comparison.common) == 75
    assert [score.value for scores in comparison.scores.values() for score in scores if score] == [1.0] * 6
    (note,) = comparison.notes
    assert "b: 25 of 100 scored prompts are not shared by all and left out of the table (25 at 4,096 tokens)" in note
    assert comparison.tests[0].brief == "alike"


def test_arms_without_a_common_prompt_are_not_compared() -> None:
    other = [replace(sample, prompt_sha256=f"x{sample.prompt_sha256}") for sample in grid(blind)]
    entries = [entry("a", grid(oracle)), entry("b", other, original=2048)]
    assert compare(entries).tests == []
    text = printed(entries)
    assert "No prompt is common to all arms" in text
    assert "different original lengths (1,024, 2,048 tokens)" in text
    assert "each arm's own prompts" in text


def test_shared_haystacks_are_tested_as_clusters() -> None:
    comparison = compare([entry("a", grid(blind, [4096], shared=True)), entry("b", grid(oracle, [4096], shared=True))])
    (test,) = comparison.tests
    assert (test.comparison.test, test.comparison.num_units) == ("sign flip", 5)
    assert test.verdict.startswith("not decided (p = 0.0625): only 5 clusters differ")
    assert "on 25 prompts of 5 haystacks" in printed(comparison.entries)


def test_other_metrics_are_pointed_out() -> None:
    rescored = [replace(sample, metric="string_match/1") for sample in grid(oracle)]
    assert "not scored by the same metrics (number_match/1, string_match/1)" in printed(
        [entry("a", grid(oracle)), entry("b", rescored)]
    )


def test_many_lengths_become_rows() -> None:
    lengths = [1024 * number for number in range(1, 9)]
    text = printed([entry("a", grid(oracle, lengths)), entry("b [bold]", grid(oracle, lengths))])
    assert "b [bold]" in text
    assert "8K" in text


def test_folders_of_samples_and_recorded_baselines_stand_side_by_side(tmp_path: Path) -> None:
    mine = stored(tmp_path / "mine", grid(oracle))
    entries = load_entries([str(mine), "tiny:extended", "tiny:base"])
    assert [e.label for e in entries] == ["mine", "tiny:extended", "tiny:base"]
    assert (entries[1].original_length, entries[1].target_length) == (128, 512)
    comparison = compare(entries[1:])
    assert len(comparison.common) == 500
    assert comparison.tests[0].verdict.startswith("tiny:extended is better than tiny:base")
    assert comparison.tests[0].brief.startswith("worse")  # of tiny:base, the later one


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = [str(stored(tmp_path / side / "same", grid(oracle))) for side in ("one", "two")]
    labels = [e.label for e in load_entries(names)]
    assert len(set(labels)) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["nothing-here"], "neither a folder nor a recorded baseline"),
        (["tiny:nobody"], "expected one of base, untrained, control, extended"),
        (["tiny:base"], "nothing to compare with"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_entries(names)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no evaluated samples here"):
        load_entries([str(tmp_path), "tiny:base"])


def test_everything_is_written_for_programs(tmp_path: Path) -> None:
    comparison = compare([entry("base", grid(blind)), entry("yarn", grid(oracle))])
    files = write_comparison(tmp_path, comparison)
    assert {file.name for file in files} == {path.name for path in tmp_path.iterdir()}
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert (written["num_common_prompts"], written["tests"][0]["only_first"]) == (75, 75)
    assert written["tests"][1]["length_tokens"] == 1024
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert len(rows) == 6
    assert (rows[0]["label"], rows[0]["score"], rows[0]["num_samples"]) == ("base", "0.0", "25")
    assert b"yarn" in (tmp_path / "accuracy_by_length.svg").read_bytes()


def test_a_suite_that_stops_short_of_the_target_is_flagged_in_every_output(tmp_path: Path) -> None:
    for target, reached in ((4096, True), (4105, False)):
        # Beside the longest prompt of 4,096 tokens an answer of 8 fits.
        entries = [replace(entry(label, grid(oracle)), target_length=target) for label in ("a", "b")]
        comparison = compare(entries)
        text = printed(entries)
        assert ("tested up to 4,096 of 4,105 tokens" in text) is not reached
        assert ("a: The longest prompt has 4,096 of the 4,105 tokens of the target length" in text) is not reached
        folder = tmp_path / str(target)
        write_comparison(folder, comparison)
        written = json.loads((folder / "comparison.json").read_text())
        assert [one["target_reached"] for one in written["arms"]] == [reached, reached]
        assert any("nothing is claimed beyond" in note for note in written["notes"]) is not reached
        rows = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
        assert {(row["longest_tested"], row["target_length"]) for row in rows} == {("4096", str(target))}
        for picture in ("heatmaps.svg", "accuracy_by_length.svg"):
            assert (b"Tested up to 4,096 tokens" in (folder / picture).read_bytes()) is not reached


def test_several_arms_are_adjusted_for_each_other() -> None:
    six = [replace(s, score=float(s.index > 0 or s.depth > 0.25)) for s in grid(oracle)]  # 6 of 75 wrong
    comparison = compare([entry("first", six), entry("better", grid(oracle)), entry("alike", six)])
    better, alike = [test for test in comparison.tests if test.place is None]
    assert better.comparison.p_value == pytest.approx(2 * 0.5**6)
    assert (better.p_adjusted, better.num_tests) == (pytest.approx(4 * 0.5**6), 2)
    assert better.verdict.startswith("no difference shown")
    assert alike.brief == "alike"
    assert "p adjusted for 2 comparisons" in printed(comparison.entries)


def test_the_control_without_a_needle_decides_nothing() -> None:
    chance = grid(oracle, [4096], task="no_needle")
    comparison = compare([entry("a", [*grid(blind), *chance]), entry("b", [*grid(blind), *chance])])
    (whole,) = [test for test in comparison.tests if test.place is None]
    assert whole.comparison.num_pairs == 75
    assert ("no_needle", 4096) in comparison.scores


def test_repeated_noise_is_pointed_out() -> None:
    noise = arm("base", grid(oracle))
    noise = replace(noise, run={"identity": {"haystack": "noise"}})
    text = printed([Entry("a", noise, 1024, 4096), entry("b", grid(oracle))])
    assert "those prompts test saliency, not retrieval" in text
