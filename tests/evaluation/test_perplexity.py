"""Perplexity: equal to whole forward passes of transformers, every token once, resumable, paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_answers import arm, blind, grid, oracle
from support import byte_tokenizer, tiny_model
from tokenizers import processors
from torch import nn

from ctxext.data.boundaries import encode_plain, leading_marker
from ctxext.errors import ArtefactError, RecipeError, UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.backend import Answer
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.perplexity import (
    LossBlock,
    PerplexityResult,
    TextLoss,
    Window,
    blocks_of,
    compare_perplexity,
    load_perplexity,
    longest_positions,
    measure_perplexity,
    text_losses,
    text_windows,
)
from ctxext.evaluation.short_context import short_guard
from ctxext.evaluation.suite import Suite, load_suite

GRID = [{"length": 100, "depths": [0.5], "samples": 1}]
SLIDING: dict[str, Any] = {"window": 64, "stride": 16, "documents": 3, "length": 150, "block_tokens": 32}
BY_POSITION: dict[str, Any] = {"documents": 3, "length": 150, "block_tokens": 32}


def suite_of(*blocks: dict[str, Any], **changes: Any) -> Suite:
    values = {"description": "", "haystack": "generated-words", "grid": GRID, "perplexity": list(blocks), **changes}
    return Suite.model_validate(values)


def measured(folder: Path, suite: Suite, model: Any = None, tokenizer: Any = None, **asked: Any) -> Any:
    backend = Answerer(model or tiny_model(), tokenizer or byte_tokenizer(), chunk_tokens=50)
    return measure_perplexity(
        backend, suite, folder, original_length=128, target_length=256, weights={"seed": 0}, **asked
    )


def with_marker() -> Any:
    """A byte tokenizer that begins every text with a token of its own, as Llama's does."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def naive_losses(model: Any, ids: list[int], num_marker: int, window: int, stride: int) -> dict[int, float]:
    """The textbook: a forward pass of transformers with labels for the last tokens, for every window."""
    losses: dict[int, float] = {}
    text, marker = ids[num_marker:], ids[:num_marker]
    room, previous_end = window - num_marker, 0
    for begin in range(0, len(text), stride):
        end = min(begin + room, len(text))
        piece = torch.tensor([[*marker, *text[begin:end]]])
        with torch.no_grad():
            logits = model(piece, use_cache=False).logits[0].float()
        each = nn.functional.cross_entropy(logits[:-1], piece[0, 1:], reduction="none").tolist()
        for place in range(max(previous_end, begin + (num_marker == 0)), end):
            losses[num_marker + place] = each[num_marker + place - begin - 1]
        previous_end = end
        if end == len(text):
            break
    return losses


@pytest.mark.parametrize("marker", [False, True], ids=["no marker", "marker"])
@pytest.mark.parametrize(("window", "stride", "length"), [(64, 16, 150), (64, 63, 200), (40, 1, 90), (100, 30, 100)])
def test_sliding_windows_equal_naive_forward_passes(marker: bool, window: int, stride: int, length: int) -> None:
    model, tokenizer = tiny_model(initializer_range=0.2), with_marker() if marker else byte_tokenizer()
    num_marker = len(leading_marker(tokenizer))
    assert num_marker == marker
    ids = [*leading_marker(tokenizer), *torch.randint(0, 256, (length - num_marker,)).tolist()]
    stride = min(stride, window - num_marker - (num_marker == 0))
    expected = naive_losses(model, ids, num_marker, window, stride)
    losses = text_losses(
        Answerer(model, tokenizer, chunk_tokens=50), ids, num_marker, text_windows(length, num_marker, window, stride)
    )
    assert list(expected) == list(range(1, length))
    assert losses.tolist() == pytest.approx(list(expected.values()), abs=1e-4)


def test_by_position_equals_one_forward_pass(tmp_path: Path) -> None:
    model = tiny_model(initializer_range=0.2)
    (result,) = measured(tmp_path, suite_of(BY_POSITION), model)
    reader = HaystackReader(load_haystack("generated-words"), lambda text: encode_plain(byte_tokenizer(), text))
    stream = reader.tokens("0/perplexity", 450)
    sums = torch.zeros(149, dtype=torch.double)
    for start in (0, 150, 300):
        ids = torch.tensor([stream[start : start + 150]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        sums += nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").double() / 3
    assert result.kind == "by-position"
    assert result.loss == pytest.approx(float(sums.mean()), abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(float(sums.mean())), rel=1e-4)
    assert result.num_tokens == 3 * 149
    assert [(block.start, block.end, block.num_tokens) for block in result.blocks] == [
        *((0, 32, 93), (32, 64, 96), (64, 96, 96), (96, 128, 96), (128, 150, 66)),
    ]
    assert result.blocks[1].loss == pytest.approx(float(sums[31:63].mean()), abs=1e-4)
    low, high = result.interval_95
    assert low < result.perplexity < high


@given(st.integers(2, 300), st.integers(0, 2), st.integers(2, 80), st.integers(1, 80))
def test_every_position_counts_in_exactly_one_window(length: int, marker: int, window: int, stride: int) -> None:
    room = window - marker
    if not 1 <= stride <= room - (marker == 0):
        with pytest.raises(ValueError, match="stride"):
            text_windows(length, marker, window, stride)
        return
    windows = text_windows(length, marker, window, stride)
    if length > marker:
        counted = [position for one in windows for position in range(one.scored, one.end)]
        assert counted == list(range(max(marker, 1), length))
    assert all(one.end - one.start <= room for one in windows)
    # Every counted token but those of the first window has at least window - stride tokens before it.
    assert all(one.scored - one.start >= room - stride for one in windows[1:])
    assert all(one.start >= marker for one in windows)


def test_a_text_without_window_is_read_in_one_piece() -> None:
    assert text_windows(100, 0, None, None) == [Window(0, 1, 100)]
    assert text_windows(100, 1, None, None) == [Window(1, 1, 100)]


def test_blocks_hold_the_mean_of_their_own_positions() -> None:
    losses = torch.arange(1.0, 10.0)  # of positions 1 .. 9
    assert blocks_of(losses, 1, 4) == [LossBlock(0, 4, 2.0, 3), LossBlock(4, 8, 5.5, 4), LossBlock(8, 10, 8.5, 2)]
    assert blocks_of(losses[:3], 1, 4) == [LossBlock(0, 4, 2.0, 3)]


class Counting(Answerer):
    """Counts the texts and stops like a kill after some of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(tiny_model(), byte_tokenizer())
        self.prompts = 0
        self._stop_after = stop_after

    def answer_together(self, prompts: Any, *args: Any, **kwargs: Any) -> list[Answer]:
        if self._stop_after is not None and self.prompts >= self._stop_after:
            raise KeyboardInterrupt
        self.prompts += len(prompts)
        return super().answer_together(prompts, *args, **kwargs)


def test_a_killed_measurement_goes_on_and_ends_with_the_same_result(tmp_path: Path) -> None:
    suite, asked = suite_of(BY_POSITION), {"original_length": 128, "target_length": 256, "weights": {"seed": 0}}
    whole = Counting()
    (expected,) = measure_perplexity(whole, suite, tmp_path / "whole", **asked)
    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(Counting(stop_after=2), suite, tmp_path / "killed", **asked)
    texts = tmp_path / "killed" / "perplexity-texts.jsonl"
    texts.write_bytes(texts.read_bytes() + b'{"torn')
    again = Counting()
    (result,) = measure_perplexity(again, suite, tmp_path / "killed", **asked)
    assert (whole.prompts, again.prompts) == (3, 1)
    assert result.blocks == expected.blocks
    assert (result.loss, result.interval_95, result.num_tokens) == (
        expected.loss,
        expected.interval_95,
        expected.num_tokens,
    )
    assert load_perplexity(tmp_path / "killed") == [result]
    more = Counting()
    (wider,) = measure_perplexity(more, suite_of({**BY_POSITION, "documents": 5}), tmp_path / "killed", **asked)
    assert (more.prompts, wider.num_documents) == (2, 5)
    assert [text.text_sha256 for text in wider.documents][:3] == [text.text_sha256 for text in result.documents]


def test_texts_of_other_weights_positions_or_windows_are_not_reused(tmp_path: Path) -> None:
    asked = {"original_length": 128, "target_length": 256}
    for suite, weights in (
        (suite_of(BY_POSITION), {"seed": 0}),
        (suite_of(BY_POSITION), {"seed": 1}),
        (suite_of(SLIDING), {"seed": 1}),
        (suite_of({**SLIDING, "stride": 32}), {"seed": 1}),
        (suite_of({**SLIDING, "stride": 32}, seed=7), {"seed": 1}),
    ):
        backend = Counting()
        measure_perplexity(backend, suite, tmp_path, weights=weights, **asked)
        assert backend.prompts >= 3


def test_several_measurements_have_a_file_each_and_old_files_go(tmp_path: Path) -> None:
    results = measured(tmp_path, suite_of(SLIDING, BY_POSITION))
    assert [result.kind for result in results] == ["sliding-window", "by-position"]
    assert load_perplexity(tmp_path) == results
    stored = json.loads((tmp_path / "perplexity.json").read_text())
    assert stored["window_tokens"] == 64
    assert set(stored["blocks"][0]) == {"start", "end", "loss", "num_tokens"}
    assert stored["haystack"] == "generated-words"
    # Context that grows helps no random model, but the same tokens count in both.
    assert results[0].num_tokens == results[1].num_tokens
    assert [result.kind for result in measured(tmp_path, suite_of(BY_POSITION))] == ["by-position"]
    assert [result.kind for result in load_perplexity(tmp_path)] == ["by-position"]
    (tmp_path / "perplexity.json").write_text('{"blocks": [], "documents": []}')
    with pytest.raises(ArtefactError, match=r"perplexity\.json: not a perplexity result"):
        load_perplexity(tmp_path)
    assert load_perplexity(tmp_path / "nowhere") == []


def test_progress_ends_with_all_tokens(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    measured(tmp_path, suite_of(SLIDING), on_progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    # 64 + 6 windows, the last one 6 tokens shorter than full: (150 - 64) / 16 is not whole
    assert told[-1][1] == 3 * (64 + 5 * 64 + (64 - 10))


def result_of(losses: list[list[float]], **changes: Any) -> PerplexityResult:
    texts = [
        TextLoss(str(number), [LossBlock(10 * i, 10 * i + 10, loss, 10) for i, loss in enumerate(row)], 0.0)
        for number, row in enumerate(losses)
    ]
    values = {
        **{"kind": "by-position", "window_tokens": None, "stride_tokens": None, "length_tokens": 20},
        **{"num_tokens": 20, "num_documents": len(texts), "loss": 1.0, "perplexity": math.e, "interval_95": None},
        **{"haystack": "h", "haystack_sha256": "", "identity_hash": "", "seconds": 0.0, "documents": texts},
    }
    return PerplexityResult(**{**values, **changes})


def test_two_models_are_compared_text_by_text() -> None:
    before = result_of([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]])
    after = result_of([[1.1, 2.1], [2.12, 3.12], [3.08, 4.08]])
    found = compare_perplexity(after, before)
    assert found is not None
    assert found.difference.num_pairs == 3
    assert found.increase == pytest.approx(math.expm1(0.1))
    low, high = found.increase_95
    assert 0.04 < low < found.increase < high < 0.17
    assert "after is worse" in found.sentence("after", "before")
    reverse = compare_perplexity(before, after)
    assert reverse is not None
    assert reverse.increase < 0
    assert "before is better" in reverse.sentence("before", "after")
    same = compare_perplexity(before, result_of([[1.1, 2.0], [1.9, 3.0], [3.0, 4.0]]))
    assert same is not None
    assert "no difference shown" in same.sentence("a", "b")


def test_a_comparison_can_be_limited_to_positions() -> None:
    before, after = result_of([[1.0, 2.0], [2.0, 3.0]]), result_of([[1.0, 2.5], [2.0, 3.5]])
    inside, beyond = compare_perplexity(after, before, end=10), compare_perplexity(after, before, start=10)
    assert inside is not None
    assert beyond is not None
    assert (inside.difference.mean, beyond.difference.mean) == (0.0, 0.5)
    assert compare_perplexity(after, before, start=20) is None


def test_only_equal_texts_and_equal_windows_are_compared() -> None:
    one = result_of([[1.0]])
    found = compare_perplexity(one, result_of([[0.9], [5.0]]))
    assert found is not None
    assert found.difference.num_pairs == 1
    assert "one text, no interval" in found.sentence("a", "b")
    assert compare_perplexity(one, result_of([])) is None
    other = result_of([[1.0]], kind="sliding-window", window_tokens=64, stride_tokens=16)
    with pytest.raises(UsageError, match="different windows"):
        compare_perplexity(one, other)


def test_short_haystacks_and_impossible_windows_are_one_sentence(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("All of it. " * 30)
    own = {"haystack": {"text": [str(book)]}}
    with pytest.raises(UsageError, match=r"too short for 3 texts of 150 tokens .*got 329.* at least 450"):
        measured(tmp_path, suite_of({**BY_POSITION, **own}))
    (result,) = measured(tmp_path, suite_of({**BY_POSITION, **own, "documents": 2}))
    assert "book.txt" in result.haystack
    with pytest.raises(UsageError, match="stride"):
        measured(tmp_path, suite_of({**SLIDING, "stride": 63}), tokenizer=two_markers())
    with pytest.raises(UsageError, match="larger than the text"):
        measured(tmp_path, suite_of({**SLIDING, "window": {"target": 1.0}}))
    with pytest.raises(UsageError, match="noise"):
        measured(tmp_path, suite_of(SLIDING, haystack="noise"))


def two_markers() -> Any:
    tokenizer = with_marker()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} {end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_a_model_whose_loss_is_no_number_is_an_error(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ArtefactError, match="not a number"):
        measured(tmp_path, suite_of(BY_POSITION), model)
    assert not (tmp_path / "perplexity.json").exists()


class NoLosses(Answerer):
    def answer_together(self, prompts: Any, *args: Any, **kwargs: Any) -> list[Answer]:
        return [Answer([1], torch.empty(0)) for _ in prompts]


class Full(Answerer):
    """Has memory for one prompt of at most 100 tokens."""

    def answer_together(self, prompts: Any, *args: Any, **kwargs: Any) -> list[Answer]:
        if len(prompts) * len(prompts[0]) > 100:
            raise torch.OutOfMemoryError
        return super().answer_together(prompts, *args, **kwargs)


def test_backends_without_losses_or_memory_say_so(tmp_path: Path) -> None:
    asked = {"original_length": 128, "target_length": 256, "weights": {}}
    with pytest.raises(UsageError, match="measures no losses"):
        measure_perplexity(NoLosses(tiny_model(), byte_tokenizer()), suite_of(SLIDING), tmp_path, **asked)
    full = Full(tiny_model(), byte_tokenizer())
    sliding, whole = measure_perplexity(full, suite_of(SLIDING, BY_POSITION), tmp_path, **asked)
    (free,) = measured(tmp_path / "free", suite_of(SLIDING))
    assert (sliding.missing, sliding.num_documents) == (None, 3)
    assert sliding.loss == pytest.approx(free.loss, abs=1e-5)
    assert (whole.loss, whole.num_documents, whole.blocks) == (None, 0, [])
    assert "150 tokens needs more memory" in whole.sentence()
    assert load_perplexity(tmp_path) == [sliding, whole]


def test_a_suite_says_what_is_wrong_with_its_perplexity(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    for block, problem in (
        ("{window: 64}", "window and stride belong together"),
        ("{window: 64, stride: 64}", "stride must be smaller than window"),
        ("{window: 64, stride: 8, length: 32}", "window must not be larger than length"),
        ("{haystack: noise}", "its perplexity says nothing"),
        ("{windw: 64}", "did you mean 'window'"),
    ):
        path.write_text(f"description: x\nperplexity: {block}\ngrid:\n- {{length: 64, depths: [0.5], samples: 1}}\n")
        with pytest.raises(RecipeError, match=rf"suite\.yaml:2: .*{problem}"):
            load_suite(str(path))


def test_suites_without_perplexity_are_written_as_before_and_others_read_back() -> None:
    assert "perplexity" not in suite_of().model_copy(update={"perplexity": None}).model_dump(mode="json")
    suite = suite_of(SLIDING, BY_POSITION)
    assert Suite.model_validate(suite.model_dump(mode="json")) == suite
    single = Suite.model_validate({**suite.model_dump(mode="json"), "perplexity": SLIDING})
    assert single.perplexity == suite.perplexity[:1]


def test_the_positions_that_a_measurement_needs_are_known_beforehand() -> None:
    assert longest_positions(suite_of(SLIDING), 128, 256) == 64
    assert longest_positions(suite_of(SLIDING, {}), 128, 256) == 256
    assert longest_positions(suite_of(), 128, 256) == 0
    assert longest_positions(suite_of({"window": {"original": 0.5}, "stride": 8}), 128, 256) == 64


def test_the_short_guard_is_as_bad_as_the_worse_of_texts_and_prompts() -> None:
    before = arm("base", grid(oracle, loss=2.0) + grid(oracle, task="cloze", loss=2.0))
    after = arm("extended", grid(oracle, loss=2.01) + grid(blind, task="cloze", loss=2.01))
    texts = [result_of([[3.0], [3.2], [3.1]]), result_of([[3.06], [3.24], [3.15]])]
    guard = short_guard(after, before, original_length=1024, after_texts=texts[1:], before_texts=texts[:1])
    assert guard.prompts is not None
    assert guard.texts is not None
    assert guard.texts.increase == pytest.approx(math.expm1(0.05))
    assert guard.bound == guard.texts.increase_95[1] > guard.prompts.perplexity_bound
    # Only the short prompts count, and what training on needles repaired does not hide what was forgotten.
    assert {name: found.num_pairs for name, found in guard.tasks.items()} == {"needle": 25, "cloze": 25}
    lines = guard.sentences("YaRN", "base")
    assert lines[0].startswith("Short-context cost of YaRN against base: the perplexity's increase is at most +")
    assert "YaRN is worse" in lines[1]
    assert any("base is better than YaRN" in line and line.startswith("cloze") for line in lines)


def test_the_short_guard_leaves_out_what_was_not_measured_alike() -> None:
    before, after = arm("base", grid(oracle)), arm("extended", grid(oracle))
    long = [result_of([[1.0], [2.0]], length_tokens=4096)]
    sliding = [result_of([[1.0]], kind="sliding-window", window_tokens=64, stride_tokens=16)]
    for mine, theirs in ((long, long), (sliding, [result_of([[1.0]])]), ([], long)):
        guard = short_guard(after, before, original_length=1024, after_texts=mine, before_texts=theirs)
        assert guard.texts is None
        assert guard.prompts is not None
    nothing = short_guard(arm("a", []), arm("b", []), original_length=1024)
    assert nothing.bound is None
    assert nothing.sentences("a", "b") == []
    single = short_guard(arm("a", []), arm("b", []), original_length=1024, after_texts=sliding, before_texts=sliding)
    assert single.sentences("a", "b")[0].endswith("has no upper bound (upper 95%).")
