"""The evaluator: equal to plain `generate` and plain cross entropy, and right about models whose answers are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import byte_tokenizer, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from ctxext.data.boundaries import encode_plain
from ctxext.evaluation.answerer import Answer, Answerer
from ctxext.evaluation.backend import NoAnswerError
from ctxext.evaluation.cells import cell_counts
from ctxext.evaluation.conclusions import Arm
from ctxext.evaluation.engine import block_means, evaluate_samples
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.heatmap import heatmap
from ctxext.evaluation.prompt import PromptBuilder
from ctxext.evaluation.store import SampleResult, SampleStore, by_length, grid_of, load_samples
from ctxext.evaluation.suite import GridRow, Suite, resolve_samples
from ctxext.rope.patchers import extend_config

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tiny_config(initializer_range=0.2, eos_token_id=None),
    "llama with YaRN": lambda: extend_config(tiny_config(initializer_range=0.2, eos_token_id=None), target_length=256),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=16),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, use_parallel_residual=False),
}
PROMPT = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(5)).tolist()
CHUNKS = (1, 7, 50, 64, 99, 100, 101, 4096)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


def generated(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    """What transformers' own greedy search answers."""
    prompt = torch.tensor([ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_answers_equal_plain_generate_for_every_chunk_size(model: PreTrainedModel, chunk: int) -> None:
    answer = Answerer(model, byte_tokenizer_without_eos(), chunk_tokens=chunk).answer(PROMPT, 12)
    assert answer.ids == generated(model, PROMPT, 12)
    assert len(set(answer.ids)) > 1


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_equal_plain_cross_entropy_for_every_chunk_size(model: PreTrainedModel, chunk: int) -> None:
    answer = Answerer(model, byte_tokenizer_without_eos(), chunk_tokens=chunk).answer(PROMPT, 1)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    expected = nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(PROMPT[1:]), reduction="none")
    assert answer.losses.shape == (99,)
    assert float((answer.losses - expected).abs().max()) < 1e-4


def byte_tokenizer_without_eos() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def test_an_answer_ends_with_the_first_stop_token_of_the_generation_config() -> None:
    model = tiny_model(initializer_range=0.2, eos_token_id=None)
    free = generated(model, PROMPT, 12)
    stop = next(token for place, token in enumerate(free) if place >= 3 and token not in free[:place])
    for stops in (stop, [999, stop]):
        model.generation_config = GenerationConfig(eos_token_id=stops)
        answer = Answerer(model, byte_tokenizer()).answer(PROMPT, 12)
        assert answer.ids == free[: free.index(stop) + 1] == generated(model, PROMPT, 12)


def test_the_tokenizers_end_token_stops_where_the_model_names_none() -> None:
    model = tiny_model(initializer_range=0.2, eos_token_id=None)
    free = generated(model, PROMPT, 6)
    tokenizer = byte_tokenizer_without_eos()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[0])
    assert Answerer(model, tokenizer).answer(PROMPT, 6).ids == free[:1]


def test_block_means_put_the_loss_of_predicting_token_t_at_position_t() -> None:
    losses = torch.arange(1.0, 10.0)  # of tokens 1 .. 9; token 0 has none
    assert block_means(losses, 4) == [2.0, 5.5, 8.5]
    assert block_means(losses, 10) == [5.0]
    assert block_means(losses, 1) == list(range(1, 10))
    assert block_means(losses[:3], 4) == [2.0]
    assert block_means(losses[:4], 4) == [2.0, 4.0]


def test_block_means_weighted_by_their_tokens_give_the_mean_loss() -> None:
    losses = torch.rand(99, generator=torch.Generator().manual_seed(0)) * 5
    for width in (7, 32, 50, 99, 100):
        blocks = block_means(losses, width)
        sizes = [len(range(max(start, 1), min(start + width, 100))) for start in range(0, 100, width)]
        mean = sum(block * size for block, size in zip(blocks, sizes, strict=True)) / 99
        assert mean == pytest.approx(float(losses.mean()), abs=1e-5)


# Models whose answers are known.

QUESTION = " what is the pass key? the pass key is"
FACT = re.compile(r" the pass key is (\d{5})\.")
Sees = Callable[[float], bool]


class KnownDecoder(nn.Module):
    """Reads the text so far out of the KV cache and predicts the next byte of a known answer.

    Token ids travel through the cache as keys of one number, so that chunks, batches and cropping act on them as on
    any model's keys.
    """

    def __init__(self, config: PreTrainedConfig, sees: Sees, max_tokens: int | None) -> None:
        super().__init__()
        self._config = config
        self._sees = sees
        self._max_tokens = max_tokens
        self._tokenizer: Any = byte_tokenizer()
        self._ids = {letter: encode_plain(self._tokenizer, letter)[0] for letter in " .0123456789"}

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **unused: Any) -> BaseModelOutputWithPast:
        ids = input_ids
        if past_key_values is not None:
            new = input_ids.float()[:, None, :, None]
            ids = past_key_values.update(new, new, 0)[0][:, 0, :, 0].long()
        if self._max_tokens is not None and ids.shape[1] > self._max_tokens:
            raise torch.OutOfMemoryError("tried to allocate too much")
        hidden = torch.zeros(*input_ids.shape, self._config.vocab_size)
        for number, row in enumerate(ids.tolist()):
            text = self._tokenizer.decode(row)
            begin = text.rfind(QUESTION)
            answered_from = begin + len(QUESTION) - 1 if begin >= 0 else len(text)
            answer = self._answer(text, begin + len(QUESTION)) if begin >= 0 else ""
            for place in range(max(answered_from, len(row) - input_ids.shape[1]), len(row)):
                partial = text[answered_from + 1 : place + 1]
                right = answer.startswith(partial) and len(partial) < len(answer)
                token = self._ids[answer[len(partial)]] if right else self._tokenizer.eos_token_id
                hidden[number, place - len(row), token] = 50.0
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _answer(self, text: str, num_prompt_tokens: int) -> str:
        match = FACT.search(text)
        if match and self._sees(match.start() / num_prompt_tokens):
            return f" {match[1]}."
        return " 00000."


class KnownAnswers(nn.Module):
    """A causal LM as the evaluator sees one; `sees` decides by relative position whether a fact is visible."""

    def __init__(self, sees: Sees, max_tokens: int | None = None) -> None:
        super().__init__()
        self.config = tiny_config(num_hidden_layers=1)
        self.generation_config = GenerationConfig(eos_token_id=self.config.eos_token_id)
        self.decoder = KnownDecoder(self.config, sees, max_tokens)
        self.head = nn.Linear(self.config.vocab_size, self.config.vocab_size, bias=False)
        self.head.weight.data = torch.eye(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


LENGTHS, DEPTHS = (120, 200, 320), (0.0, 0.25, 0.5, 0.75, 1.0)


def grid_suite(samples: int = 2) -> Suite:
    rows = [GridRow(length=length, depths=list(DEPTHS), samples=samples) for length in LENGTHS]
    return Suite(
        description="t",
        wording="passkey",
        haystack="generated-words",
        grid=rows,
        max_new_tokens=8,
        loss_block_tokens=32,
    )


def evaluate(
    model: Any, folder: Path, suite: Suite | None = None, chunk: int = 64, backend: type[Answerer] = Answerer
) -> list[SampleResult]:
    suite = suite or grid_suite()
    tokenizer = byte_tokenizer()
    reader = HaystackReader(load_haystack(suite.haystack), lambda text: encode_plain(tokenizer, text))
    builder = PromptBuilder(tokenizer, reader, suite.wording, suite.seed, suite)
    store = SampleStore(folder, {"model": "known"}, {})
    samples = resolve_samples(suite, 128, 320)
    evaluate_samples(backend(model, tokenizer, chunk_tokens=chunk), builder, suite, samples, store)
    return load_samples(folder)


def accuracy(samples: list[SampleResult]) -> dict[tuple[int, float], float | None]:
    return {
        (result.cell.length_tokens, result.cell.depth): result.proportion.value if result.proportion else None
        for result in grid_of(samples)
    }


@pytest.mark.parametrize("chunk", [16, 64, 4096])
def test_an_oracle_that_copies_the_needle_scores_1_in_every_cell(tmp_path: Path, chunk: int) -> None:
    samples = evaluate(KnownAnswers(lambda position: True), tmp_path, chunk=chunk)
    assert len(samples) == 30
    assert accuracy(samples) == {(length, depth): 1.0 for length in LENGTHS for depth in DEPTHS}
    assert all(sample.answer.strip() == f"{sample.expected}." for sample in samples)
    assert all(sample.degenerate is None for sample in samples)


def test_a_blind_model_scores_0_in_every_cell(tmp_path: Path) -> None:
    samples = evaluate(KnownAnswers(lambda position: False), tmp_path)
    assert accuracy(samples) == {(length, depth): 0.0 for length in LENGTHS for depth in DEPTHS}
    assert {sample.answer for sample in samples} == {" 00000."}


@pytest.mark.parametrize("hole", [(0.0, 0.08), (0.3, 0.5), (0.6, 0.9)])
def test_a_planted_hole_shows_at_exactly_its_place(tmp_path: Path, hole: tuple[float, float]) -> None:
    samples = evaluate(KnownAnswers(lambda position: not hole[0] <= position < hole[1]), tmp_path)
    for sample in samples:
        inside = hole[0] <= sample.needle_position / sample.length_tokens < hole[1]
        assert sample.score == float(not inside), sample.sample_id
    outcomes = {sample.score for sample in samples}
    assert outcomes == {0.0, 1.0}


def test_the_heatmap_shows_the_hole_in_its_cell_and_nowhere_else(tmp_path: Path) -> None:
    samples = evaluate(KnownAnswers(lambda position: not 0.3 <= position < 0.5), tmp_path)
    arm = Arm("base", "hole", False, [sample for sample in samples if sample.length_tokens == 320], {})
    shown = {depth: count.text() for (_, depth), count in cell_counts(arm).items()}
    assert shown == {0.0: "2/2", 0.25: "2/2", 0.5: "0/2", 0.75: "2/2", 1.0: "2/2"}
    blind = Arm("base", "hole", False, evaluate(KnownAnswers(lambda position: False), tmp_path / "blind"), {})
    drawn = heatmap([arm], original_length=128, target_length=320)
    assert drawn.png != heatmap([blind], original_length=128, target_length=320).png


def test_out_of_memory_marks_the_cell_as_missing_and_goes_on(tmp_path: Path) -> None:
    samples = evaluate(KnownAnswers(lambda position: True, max_tokens=250), tmp_path)
    expected = {(length, depth): None if length == 320 else 1.0 for length in LENGTHS for depth in DEPTHS}
    assert accuracy(samples) == expected
    # One sample a row was tried; the other of its cell needs as much.
    statuses = {(s.depth, s.index): s.status for s in samples if s.length_tokens == 320}
    assert statuses == {(depth, i): ("out_of_memory", "skipped")[i] for depth in DEPTHS for i in (0, 1)}
    assert {s.reason for s in samples if s.length_tokens == 320} == {
        "out of memory",
        "not tried: this depth ran out of memory at 320 tokens",
    }
    assert {s.reason for s in samples if s.length_tokens < 320} == {""}
    assert set(by_length(samples)) == {120, 200}
    arm = Arm("base", "small", False, samples, {})
    assert "out of memory" in cell_counts(arm)[320, 0.5].text()


def test_longer_cells_of_a_row_that_ran_out_of_memory_are_skipped_and_other_rows_go_on(tmp_path: Path) -> None:
    class SmallAtTheStart(Answerer):
        """Refuses prompts of 200 tokens and more whose needle stands early."""

        tried: ClassVar[list[int]] = []

        def answer_together(self, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[Answer]:
            text = self.tokenizer.decode(prompts[0])
            if len(prompts[0]) >= 200 and text.find(" the pass key is") < 40:
                self.tried.append(len(prompts[0]))
                raise torch.OutOfMemoryError("tried to allocate too much")
            return super().answer_together(prompts, max_new_tokens, **options)

    samples = evaluate(KnownAnswers(lambda position: True), tmp_path, backend=SmallAtTheStart, chunk=64)
    assert SmallAtTheStart.tried == [200]
    row = {(s.length_tokens, s.index): (s.status, s.reason) for s in samples if s.depth == 0.0}
    skipped = "skipped", "not tried: this depth ran out of memory at 200 tokens"
    assert row == {
        (120, 0): ("ok", ""),
        (120, 1): ("ok", ""),
        (200, 0): ("out_of_memory", "out of memory"),
        (200, 1): skipped,
        (320, 0): skipped,
        (320, 1): skipped,
    }
    assert {s.status for s in samples if s.depth > 0} == {"ok"}


def test_a_refusal_by_the_allocator_of_the_cpu_is_out_of_memory_and_a_bug_is_not(tmp_path: Path) -> None:
    class Huge(Answerer):
        def answer_together(self, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[Answer]:
            if len(prompts[0]) == 320:
                torch.empty(1 << 50)
            return super().answer_together(prompts, max_new_tokens, **options)

    class Broken(Answerer):
        def answer_together(self, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[Answer]:
            raise RuntimeError("shapes cannot be multiplied")

    samples = evaluate(KnownAnswers(lambda position: True), tmp_path / "huge", backend=Huge)
    assert {s.status for s in samples if s.length_tokens == 320} == {"out_of_memory", "skipped"}
    assert {s.status for s in samples if s.length_tokens < 320} == {"ok"}
    with pytest.raises(RuntimeError, match="multiplied"):
        evaluate(KnownAnswers(lambda position: True), tmp_path / "broken", backend=Broken)


def test_what_a_backend_refuses_is_missing_with_its_words_and_the_rest_goes_on(tmp_path: Path) -> None:
    class Refusing(Answerer):
        def answer_together(self, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[Answer]:
            if len(prompts[0]) == 200:
                raise NoAnswerError("the context is full", status="rejected")
            return super().answer_together(prompts, max_new_tokens, **options)

    samples = evaluate(KnownAnswers(lambda position: True), tmp_path, backend=Refusing, chunk=512)
    missing = {(s.status, s.reason) for s in samples if s.length_tokens == 200}
    assert missing == {("rejected", "the context is full")}
    assert {s.status for s in samples if s.length_tokens != 200} == {"ok"}


def test_missing_samples_are_tried_again_and_finished_ones_are_not(tmp_path: Path) -> None:
    evaluate(KnownAnswers(lambda position: True, max_tokens=250), tmp_path)
    first = (tmp_path / "samples.jsonl").read_text()
    # This model would answer everything wrong: whatever is right afterwards was reused.
    samples = evaluate(KnownAnswers(lambda position: False), tmp_path)
    assert accuracy(samples) == {
        (length, depth): 0.0 if length == 320 else 1.0 for length in LENGTHS for depth in DEPTHS
    }
    assert (tmp_path / "samples.jsonl").read_text().startswith(first)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 30 + 10


def test_a_wider_grid_reuses_the_samples_it_shares(tmp_path: Path) -> None:
    evaluate(KnownAnswers(lambda position: True), tmp_path, grid_suite(samples=1))
    samples = evaluate(KnownAnswers(lambda position: False), tmp_path, grid_suite(samples=2))
    assert {sample.score for sample in samples if sample.index == 0} == {1.0}
    assert {sample.score for sample in samples if sample.index == 1} == {0.0}


def test_stored_answers_and_losses_are_those_of_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model(initializer_range=0.2)
    suite = Suite(
        description="t",
        wording="passkey",
        haystack="generated-words",
        grid=[GridRow(length=length, depths=[0.0, 0.5], samples=2) for length in (100, 120)],
        max_new_tokens=8,
        loss_block_tokens=32,
    )
    samples = evaluate(model, tmp_path, suite, chunk=48)
    tokenizer = byte_tokenizer()
    reader = HaystackReader(load_haystack(suite.haystack), lambda text: encode_plain(tokenizer, text))
    builder = PromptBuilder(tokenizer, reader, suite.wording, suite.seed, suite)
    prompts = {s.sample_id: builder.build(s).input_ids for s in resolve_samples(suite, 128, 320)}
    assert len(samples) == 8
    for sample in samples:
        ids = prompts[sample.sample_id]
        assert sample.answer_ids == generated(model, ids, 8)
        assert sample.answer == tokenizer.decode(sample.answer_ids, skip_special_tokens=True)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        assert sample.loss_blocks == pytest.approx(block_means(losses, 32), abs=1e-4)
