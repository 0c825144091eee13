"""Prompts that begin alike share their beginning, and expected answers ride along: nothing changes but the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import byte_tokenizer, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from ctxext.evaluation.answerer import Answer, Answerer
from ctxext.evaluation.engine import EngineReport, evaluate_samples
from ctxext.evaluation.prompt import suite_builder
from ctxext.evaluation.self_check import self_check
from ctxext.evaluation.store import SampleResult, SampleStore, load_samples
from ctxext.evaluation.suite import Suite, resolve_samples
from ctxext.evaluation.trunk import (
    common_prefix,
    kept_lengths,
    lengths_to_remember,
    num_shared_tokens,
    reason_against_sharing,
    visiting_order,
)
from ctxext.model.windowed import WINDOWED

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tiny_config(initializer_range=0.2, eos_token_id=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "mixtral": lambda: MixtralConfig(**SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **SLIDING),
    "gemma3 windowed": lambda: Gemma3TextConfig(**SHAPE, **SLIDING, attn_implementation=WINDOWED),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=24),
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 4.0],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}


def random_ids(length: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


HAY = random_ids(150, 1)
# Needles at rising depths, two samples each, out of order; a longer prompt over the same haystack; an unrelated one.
PROMPTS = [
    *(
        [*HAY[:depth], *random_ids(9, depth + sample), *HAY[depth:], *random_ids(2, depth + sample)]
        for sample in (0, 1)
        for depth in (75, 0, 30, 150)
    ),
    [*HAY, *random_ids(60, 2)],
    random_ids(140, 3),
]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


def endless_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def generated(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    prompt = torch.tensor([ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(ids) :].tolist()


def plain_losses(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="none")


def test_answers_and_losses_along_a_trunk_are_those_of_every_prompt_alone(model: Any) -> None:
    answerer = Answerer(model, endless_tokenizer(), chunk_tokens=40)
    hopes = [generated(model, ids, 6)[: number % 7] for number, ids in enumerate(PROMPTS)]
    found = dict(answerer.answer_sharing(PROMPTS, 6, hoped_for=hopes))
    assert sorted(found) == list(range(len(PROMPTS)))
    for number, ids in enumerate(PROMPTS):
        assert found[number].ids == generated(model, ids, 6)
        assert found[number].losses.shape == (len(ids) - 1,)
        alone = Answerer(model, endless_tokenizer(), chunk_tokens=40).answer(ids, 6)
        assert float((found[number].losses - alone.losses).abs().max()) < 1e-5
        assert float((found[number].losses - plain_losses(model, ids)).abs().max()) < 1e-4
    assert answerer.work.num_prompt_tokens - answerer.work.num_prefilled == num_shared_tokens(PROMPTS) > 500
    assert len({tuple(answer.ids) for answer in found.values()}) > 5


@pytest.mark.parametrize("wrong_at", [0, 1, 3, None])
def test_a_hoped_for_answer_saves_passes_and_changes_no_token(model: Any, wrong_at: int | None) -> None:
    ids = PROMPTS[0]
    plain = generated(model, ids, 8)
    hope = plain[:6]
    if wrong_at is not None:
        hope[wrong_at] = (hope[wrong_at] + 1) % 256
    answerer = Answerer(model, endless_tokenizer(), chunk_tokens=40)
    assert answerer.answer(ids, 8, hoped_for=hope).ids == plain
    assert answerer.work.num_verified >= (6 if wrong_at is None else wrong_at)
    together = answerer.answer_together([ids, ids], 8, hoped_for=[hope, plain[:6]])
    assert [answer.ids for answer in together] == [plain, plain]


def test_a_stop_token_inside_a_hoped_for_answer_ends_it() -> None:
    model = tiny_model(initializer_range=0.2, eos_token_id=None)
    free = generated(model, PROMPTS[0], 8)
    model.generation_config.eos_token_id = free[3]
    answerer = Answerer(model, byte_tokenizer())
    for hope in (free[:7], free[:4], free[:2]):
        assert answerer.answer(PROMPTS[0], 8, hoped_for=hope).ids == free[: free.index(free[3]) + 1]


def test_a_usual_end_of_answers_is_learned_along_a_trunk_and_forgotten_behind_it() -> None:
    model = tiny_model(initializer_range=0.2, eos_token_id=None)
    answerer = Answerer(model, endless_tokenizer())
    plain = generated(model, PROMPTS[0], 8)
    for round_number in (1, 2):
        twice = dict(answerer.answer_sharing([PROMPTS[0]] * 2, 8, hoped_for=[plain[:3]] * 2))
        assert [twice[number].ids for number in (0, 1)] == [plain, plain]
        assert answerer.work.num_verified == round_number * (3 + 7)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_stay_exact_and_are_not_shared(kind: str) -> None:
    def fresh() -> Any:
        parameters = DYNAMIC if kind == "dynamic" else LONGROPE
        # Dynamic scaling takes max_position_embeddings for the length that the model was trained with.
        return tiny_model(
            initializer_range=0.2, eos_token_id=None, rope_parameters=parameters, max_position_embeddings=64
        )

    answerer = Answerer(fresh(), endless_tokenizer(), chunk_tokens=16)
    reason = answerer.reason_against_sharing(160)
    assert reason is not None
    assert kind in reason
    # Long, shorter, short, across the border, long again: what a prompt leaves behind must not reach the next one.
    for ids in (PROMPTS[8], PROMPTS[9], PROMPTS[0][:40], PROMPTS[0][:61], PROMPTS[1]):
        plain = generated(fresh(), ids, 6)
        answer = answerer.answer(ids, 6, hoped_for=plain)
        assert answer.ids == plain
        assert float((answer.losses - plain_losses(fresh(), ids)).abs().max()) < 1e-4


def test_why_not_is_said() -> None:
    assert reason_against_sharing(tiny_config(), 10**6) is None
    assert reason_against_sharing(tiny_config(rope_parameters=LONGROPE), 64) is None
    assert "64 tokens" in str(reason_against_sharing(tiny_config(rope_parameters=LONGROPE), 65))
    assert reason_against_sharing(tiny_config(rope_parameters={**LONGROPE, "long_factor": [1.0] * 8}), 10**6) is None
    assert "dynamic" in str(reason_against_sharing(tiny_config(rope_parameters=DYNAMIC), 10))
    hybrid = Qwen3NextConfig(**{**SHAPE, "num_hidden_layers": 4}, head_dim=16, num_experts=4)
    assert "LinearAttentionLayer" in str(reason_against_sharing(hybrid, 10))
    phi = Phi3Config(**SHAPE, original_max_position_embeddings=64)
    assert reason_against_sharing(phi, 10**6) is None


# The prefix tree.

lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=9)


@given(lists)
def test_visits_prefill_every_edge_of_the_prefix_tree_once_and_return_only_to_what_is_remembered(
    prompts: list[list[int]],
) -> None:
    order = visiting_order(prompts)
    assert sorted(order) == list(range(len(prompts)))
    ordered = [prompts[number] for number in order]
    edges = {tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)}
    alike = sum(common_prefix(a, b) for a, b in pairwise(ordered))
    assert sum(map(len, prompts)) - alike == len(edges)
    kept, known = kept_lengths(ordered), {0}
    for place, length in enumerate(kept):
        assert length in known
        known = {other for other in known if other <= length} | set(lengths_to_remember(kept, place))


def test_prompts_leave_the_trunk_in_the_order_of_their_depths() -> None:
    hay = list(range(100))
    depths = [80, 10, 50, 90, 0]
    prompts = [[*hay[:depth], 900 + depth, *hay[depth:]] for depth in depths]
    assert [depths[number] for number in visiting_order(prompts)] == [0, 10, 50, 80, 90]


# Whole evaluations.


class Small(Answerer):
    """Has room for so many prompts beside each other, and for prompts of so many tokens."""

    def __init__(self, *arguments: Any, most: int, longest: int = 10**6) -> None:
        super().__init__(*arguments, chunk_tokens=64)
        self.most, self.longest = most, longest

    def answer_together(self, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[Answer]:
        if len(prompts[0]) > self.longest:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return super().answer_together(prompts, max_new_tokens, **options)

    def answer_sharing(self, prompts: list[list[int]], *arguments: Any, **options: Any) -> Iterator[tuple[int, Answer]]:
        for count, found in enumerate(super().answer_sharing(prompts, *arguments, **options)):
            if count >= self.most:
                raise torch.OutOfMemoryError("tried to allocate too much")
            yield found


def grid(*lengths: int, haystacks: str = "shared") -> Suite:
    rows = [{"length": length, "depths": [0.0, 0.6, 0.8, 1.0], "samples": 2} for length in lengths]
    values = {"description": "t", "wording": "passkey", "haystack": "generated-words", "grid": rows}
    return Suite.model_validate({**values, "max_new_tokens": 7, "loss_block_tokens": 32, "haystacks": haystacks})


def evaluated(
    folder: Path, answerer: Answerer, haystacks: str = "shared", lengths: tuple[int, ...] = (300, 400)
) -> tuple[dict[str, SampleResult], EngineReport]:
    suite = grid(*lengths, haystacks=haystacks)
    builder = suite_builder(suite, byte_tokenizer())
    samples = resolve_samples(suite, 128, 512)
    told: list[str] = []
    store = SampleStore(folder, {}, {})
    report = evaluate_samples(answerer, builder, suite, samples, store, lambda result: told.append(result.sample_id))
    assert sorted(told) == sorted(sample.sample_id for sample in samples)
    return {result.sample_id: replace(result, seconds=0.0) for result in load_samples(folder)}, report


def same(first: dict[str, SampleResult], second: dict[str, SampleResult]) -> bool:
    return set(first) == set(second) and all(
        replace(first[name], loss_blocks=[]) == replace(second[name], loss_blocks=[])
        and first[name].loss_blocks == pytest.approx(second[name].loss_blocks, abs=2e-5)
        for name in first
    )


def test_a_shared_haystack_is_stored_like_plain_runs(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    shared, report = evaluated(tmp_path / "shared", Answerer(model, tokenizer, chunk_tokens=64))
    assert report.num_sharing == 12  # a needle at depth 0 comes before anything that could be shared
    assert report.work.num_prefilled < 0.8 * report.work.num_prompt_tokens
    assert report.plain_reason is None
    assert report.self_check is not None
    assert report.self_check.outcome == "identical"
    assert "_scaled_dot_product_flash_attention_for_cpu" in report.kernels
    whole, plain_report = evaluated(tmp_path / "plain", Answerer(model, tokenizer, chunk_tokens=512))
    assert plain_report.num_sharing == 0
    assert same(shared, whole)
    again, resumed = evaluated(tmp_path / "shared", Answerer(model, tokenizer, chunk_tokens=64))
    assert same(shared, again)
    assert resumed.work.num_prompt_tokens == 0


def test_haystacks_of_their_own_are_not_shared(tmp_path: Path) -> None:
    answerer = Answerer(tiny_model(initializer_range=0.2), byte_tokenizer(), chunk_tokens=64)
    _, report = evaluated(tmp_path, answerer, "own")
    assert report.num_sharing == 0
    assert report.work.num_prefilled == report.work.num_prompt_tokens


def test_models_that_cannot_share_are_answered_plainly_and_the_reason_is_kept(tmp_path: Path) -> None:
    model = tiny_model(initializer_range=0.2, rope_parameters=DYNAMIC)
    _, report = evaluated(tmp_path, Answerer(model, byte_tokenizer(), chunk_tokens=64))
    assert report.num_sharing == 0
    assert "dynamic" in str(report.plain_reason)
    assert report.self_check is not None
    assert report.self_check.passed


def test_a_trunk_that_does_not_fit_is_finished_one_by_one(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    whole, _ = evaluated(tmp_path / "whole", Answerer(model, tokenizer, chunk_tokens=64))
    for most in (0, 3):
        part, _ = evaluated(tmp_path / str(most), Small(model, tokenizer, most=most))
        assert same(whole, part)
    cut, _ = evaluated(tmp_path / "cut", Small(model, tokenizer, most=0, longest=350))
    statuses = {(result.length_tokens, result.index): result.status for result in cut.values()}
    assert statuses == {(300, 0): "ok", (300, 1): "ok", (400, 0): "out_of_memory", (400, 1): "skipped"}


def test_an_interrupted_trunk_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    whole, _ = evaluated(tmp_path / "whole", Answerer(model, tokenizer, chunk_tokens=64))
    lines = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines(keepends=True)
    evaluated(tmp_path / "part", Answerer(model, tokenizer, chunk_tokens=64))
    (tmp_path / "part" / "samples.jsonl").write_text("".join(lines[::3]))
    rest, report = evaluated(tmp_path / "part", Answerer(model, tokenizer, chunk_tokens=64))
    assert same(whole, rest)
    assert 0 < report.work.num_prompt_tokens < 16 * 400


# The self-check.


def prompt_of(tokenizer: Any) -> Any:
    suite = grid(300)
    return suite_builder(suite, tokenizer).build(resolve_samples(suite, 128, 512)[0])


def test_the_self_check_tells_right_from_wrong_and_from_nothing_to_compare_with() -> None:
    model, tokenizer = tiny_model(initializer_range=0.2), byte_tokenizer()
    # Settings of a chat model that greedy decoding does not know.
    model.generation_config.repetition_penalty = 1.5
    answerer, prompt = Answerer(model, tokenizer), prompt_of(tokenizer)
    check = self_check(answerer, prompt)
    assert check.outcome == "identical"
    assert check.passed
    answer = answerer.answer(prompt.input_ids, prompt.max_new_tokens)
    wrong = Answer([*answer.ids[:2], (answer.ids[2] + 1) % 256, *answer.ids[3:]], answer.losses)
    check = self_check(answerer, prompt, wrong)
    assert (check.outcome, check.first_difference, check.passed) == ("different", 2, False)
    assert "NOT" in check.summary()
    assert self_check(answerer, prompt, Answer(answer.ids[:3], answer.losses)).outcome == "different"


@pytest.mark.parametrize("haystacks", ["own", "paired", "shared"])
def test_stored_results_do_not_depend_on_the_order_of_the_cells(tmp_path: Path, haystacks: str) -> None:
    """Short prompts in batches, long ones along trunks, whatever the order they are asked in."""
    suite, model = grid(90, 120, 300, haystacks=haystacks), tiny_model(initializer_range=0.2)
    tokenizer = byte_tokenizer()
    samples = resolve_samples(suite, 128, 512)
    orders = [samples, samples[::-1], sorted(samples, key=lambda sample: (sample.cell.depth, sample.index))]
    found = []
    for number, order in enumerate(orders):
        folder = tmp_path / str(number)
        answerer = Answerer(model, tokenizer, chunk_tokens=128)
        evaluate_samples(answerer, suite_builder(suite, tokenizer), suite, order, SampleStore(folder, {}, {}))
        found.append({result.sample_id: replace(result, seconds=0.0) for result in load_samples(folder)})
    assert [list(results) for results in found[:2]] != [list(found[0])] * 2, "the orders differ"
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert len({tuple(result.answer_ids) for result in found[0].values()}) > 8
