"""The traced memory of a training step is what the step really takes, and says what to change when it is too much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support import Job, make_job, tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from ctxext.data.packing import PackedWindow
from ctxext.errors import UsageError
from ctxext.model.adaptation import adapt
from ctxext.model.lora import add_lora
from ctxext.model.offload import host_copies, offload_layer_inputs
from ctxext.model.savings import Savings, apply_savings, savings_of
from ctxext.planning.allocator import peak_growth_bytes
from ctxext.planning.memory import Sharding, StepMemory, StepShape, trace_step
from ctxext.planning.memory_plan import memory_rows, plan_memory
from ctxext.planning.plan import make_plan
from ctxext.planning.trace import Ledger
from ctxext.recipe.adaptation import Adaptation
from ctxext.recipe.schema import LoraBlock, TrainBlock
from ctxext.train.step import SummedLoss, run_step

GIB = 1024**3
LORA = LoraBlock(rank=4)
TOKENS = 600
SAVINGS = [
    Savings(),
    Savings(tile_tokens=128),
    Savings(checkpoint_every=2),
    Savings(checkpoint_every=1),
    Savings(checkpoint_every=1, tile_tokens=128),
]


def small_config() -> LlamaConfig:
    """Four layers, so that they weigh more than the rest."""
    return tiny_config(num_hidden_layers=4, hidden_size=64, intermediate_size=192)


def window(num_tokens: int) -> PackedWindow:
    return PackedWindow([token % 97 for token in range(num_tokens)], list(range(num_tokens)), [0], 0)


def measured(config: PreTrainedConfig, savings: Savings) -> int:
    return measured_step(config, savings, "sdpa", window(TOKENS))


def measured_step(
    config: PreTrainedConfig,
    savings: Savings,
    attention: str,
    of: PackedWindow,
    adaptation: Adaptation = "lora",
    lora: LoraBlock = LORA,
) -> int:
    """What the CPU's allocator had handed out at most in a real step, the second one, weights and moments included."""
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model: Any = adapt(base, adaptation, lora, seed=0).train()
    apply_savings(model, savings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    loss, optimizer = accelerator.prepare(SummedLoss(model), torch.optim.AdamW(trained, lr=1e-4))
    run_step(accelerator, loss, optimizer, [window(16)], 1, 1.0)
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    held = sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers(), *state])
    step = peak_growth_bytes(lambda: run_step(accelerator, loss, optimizer, [of], 1, 1.0), torch.device("cpu"))
    return held + step


def traced(config: PreTrainedConfig, savings: Savings, **changes: Any) -> StepMemory:
    shape = StepShape(**{"windows": 1, "window_tokens": TOKENS, "dtype": torch.float32, "device": "cpu", **changes})
    return trace_step(config, LORA, savings, shape, SummedLoss)


@pytest.mark.parametrize("savings", SAVINGS, ids=Savings.describe)
def test_traced_and_measured_peaks_agree(savings: Savings) -> None:
    memory = traced(small_config(), savings)
    assert sum(memory.split.values()) == memory.peak_bytes
    assert memory.peak_bytes == pytest.approx(measured(small_config(), savings), rel=0.1)


@pytest.mark.parametrize(
    ("adaptation", "lora"),
    [
        ("full", LoraBlock()),
        ("lora", LoraBlock(rank=4, embeddings_and_norms=True)),
        ("lora", LoraBlock(rank=4, weight_decomposed=True)),
    ],
    ids=["full", "embeddings and norms", "DoRA"],
)
def test_traced_and_measured_peaks_agree_whatever_trains(adaptation: Adaptation, lora: LoraBlock) -> None:
    config, savings = small_config(), Savings(checkpoint_every=1)
    shape = StepShape(windows=1, window_tokens=TOKENS, dtype=torch.float32, device="cpu")
    memory = trace_step(config, lora, savings, shape, SummedLoss, adaptation=adaptation)
    real = measured_step(config, savings, "sdpa", window(TOKENS), adaptation, lora)
    assert memory.peak_bytes == pytest.approx(real, rel=0.1)
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if adaptation == "lora":  # two embeddings and nine norms, or nothing
        numbers = (2 * 260 + 9) * 64 if lora.embeddings_and_norms else 0
    assert memory.split.get("trained weights", 0) == 4 * numbers


def test_trained_weights_are_float32_and_activations_stay_as_small_as_the_base_makes_them() -> None:
    """Beside a bfloat16 base, training embeddings and norms adds their own bytes and no float32 activations."""
    config = tiny_config(num_hidden_layers=8, hidden_size=64, intermediate_size=128, vocab_size=64)
    shape = StepShape(windows=1, window_tokens=8192, dtype=torch.bfloat16, device="cuda")
    plain, whole = (
        trace_step(config, LoraBlock(rank=4, embeddings_and_norms=on), Savings(1), shape, SummedLoss)
        for on in (False, True)
    )
    trained = whole.split["trained weights"]
    inputs = 8 * 8192 * 64 * 2
    assert trained == (2 * 64 * 64 + 17 * 64) * 4
    assert whole.peak_bytes - plain.peak_bytes < 5 * trained + 0.25 * inputs


def test_every_saving_saves() -> None:
    peaks = [traced(small_config(), savings).peak_bytes for savings in SAVINGS]
    everything, tiles, second, every, both = peaks
    assert both < every < second < everything
    assert both < tiles < everything


def test_offloading_moves_the_layers_inputs_to_the_host_and_nothing_else() -> None:
    config, on_device = small_config(), traced(small_config(), Savings(1, tile_tokens=64), device="cuda")
    offloaded = traced(config, Savings(1, True, 64), device="cuda")
    inputs = config.num_hidden_layers * TOKENS * config.hidden_size * 4
    assert (on_device.host_bytes, offloaded.host_bytes) == (0, inputs)
    assert on_device.peak_bytes - offloaded.peak_bytes == pytest.approx(inputs, rel=0.5)


def test_offloaded_inputs_come_back_as_they_were() -> None:
    results = []
    for hooks in (False, True):
        x = torch.linspace(-1, 1, 64, dtype=torch.float32).requires_grad_()
        if hooks:
            with host_copies():
                y = x.sin().exp()
        else:
            y = x.sin().exp()
        results.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*results)


def test_offloading_is_refused_where_it_saves_nothing() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config())
    with pytest.raises(UsageError, match="there already"):
        offload_layer_inputs(model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config())
    with pytest.raises(UsageError, match="no checkpointed layers"):
        offload_layer_inputs(model)


def test_adapter_inputs_are_not_copied_to_float32_under_autocast() -> None:
    """bfloat16 -> float32 -> bfloat16 changes nothing, so the losses are equal to the bit."""
    losses, sizes = [], []
    for saved in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(small_config(), dtype=torch.bfloat16)
        model: Any = add_lora(base, LORA, seed=0).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if saved:
            apply_savings(model, Savings())
        ids = torch.arange(2, 90)[None]
        with Ledger() as ledger, ledger.phase("forward"), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = SummedLoss(model)(ids, torch.arange(88)[None])
        sizes.append(ledger.peak(["forward"]).num_bytes)
        loss.backward()
        losses.append((loss.item(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*losses, strict=True))
    assert sizes[1] < 0.95 * sizes[0]


def llama_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1_048_576,
        tie_word_embeddings=False,
    )


def test_an_8b_model_fits_one_device_at_131072_and_at_a_million_tokens() -> None:
    """Two depths of the 8B shape give the rest: layers are alike, and a trace of all 32 takes seconds more."""
    peaks = {}
    for tokens in (131_072, 1_048_576):
        shape = StepShape(1, tokens, torch.bfloat16)
        depths = []
        for num_layers in (2, 4):
            config = llama_8b()
            config.num_hidden_layers = num_layers
            depths.append(trace_step(config, LoraBlock(), Savings(1, True, 8192), shape, SummedLoss))
        per_layer = (depths[1].peak_bytes - depths[0].peak_bytes) / 2
        peaks[tokens] = (depths[0].peak_bytes + 30 * per_layer) / GIB
        assert depths[1].host_bytes == 4 * tokens * 4096 * 2
    assert peaks[131_072] < 40
    assert peaks[1_048_576] < 141


def test_shared_weights_are_divided_and_gathered_layers_added() -> None:
    alone = traced(small_config(), Savings(1))
    shared = trace_step(
        small_config(), LORA, Savings(1), StepShape(1, TOKENS, torch.float32, "cpu"), SummedLoss, Sharding(weights=4)
    )
    assert shared.split["weights"] == -(-alone.split["weights"] // 4)
    assert shared.split["optimizer"] == -(-alone.split["optimizer"] // 4)
    assert alone.split["weights"] / 4 < shared.split["gathered layers"] < alone.split["weights"]
    assert shared.split["saved activations"] == alone.split["saved activations"]
    halves = trace_step(
        small_config(), LORA, Savings(1), StepShape(1, TOKENS, torch.float32, "cpu"), SummedLoss, Sharding(sequence=2)
    )
    assert halves.split["saved activations"] == pytest.approx(alone.split["saved activations"] / 2, rel=0.05)


def test_routed_experts_can_be_traced() -> None:
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    lora = LoraBlock(rank=4, targets=["q_proj", "v_proj"])
    shape = StepShape(1, TOKENS, torch.float32, "cpu")
    plain, tiles = (
        trace_step(config, lora, savings, shape, SummedLoss) for savings in (Savings(1), Savings(1, False, 64))
    )
    assert 0 < tiles.peak_bytes < plain.peak_bytes


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def test_a_plan_that_fits_has_no_advice(job: Job) -> None:
    memory = plan_memory(job.recipe(), SummedLoss)
    assert memory.traced is not None
    assert memory.advice == []
    (name, text), *_ = memory_rows(memory.to_json())
    assert name == "memory"
    assert "peaks at" in text
    assert "float32" in text


SQUEEZED = ("train.windows_per_device=2", "data.windows.length=200", "train.activation_checkpointing=false")


def test_advice_comes_in_the_order_of_its_price_and_ends_with_a_shorter_window(job: Job) -> None:
    memory = plan_memory(job.recipe(*SQUEEZED, "train.memory.device_gib=0.0001"), SummedLoss)
    assert memory.dtype == "bfloat16"  # as on an accelerator
    # Windows of 200 tokens have no tiles of 8,192, so those are not advised.
    starts = [
        "train.windows_per_device=1",
        "train.activation_checkpointing=true",
        "train.memory.offload=true",
        "no win",
    ]
    assert [line[: len(start)] for line, start in zip(memory.advice, starts, strict=True)] == starts
    assert ("to fit", f"1. {memory.advice[0]}") in memory_rows(memory.to_json())


def test_advice_ends_where_the_step_fits(job: Job) -> None:
    needs = plan_memory(job.recipe(*SQUEEZED, "train.memory.device_gib=80"), SummedLoss)
    assert needs.traced is not None
    assert needs.advice == []
    enough = 0.8 * needs.traced["peak_bytes"] / GIB
    memory = plan_memory(job.recipe(*SQUEEZED, f"train.memory.device_gib={enough}"), SummedLoss)
    assert ["which fits" in line for line in memory.advice] == [True]


def test_what_does_not_change_results_does_not_change_the_plans_id(job: Job) -> None:
    plan_id = make_plan(job.recipe()).plan_id
    for same in ("train.memory.device_gib=80", "train.memory.checkpoint_every_n_layers=2"):
        assert make_plan(job.recipe(same)).plan_id == plan_id
    assert make_plan(job.recipe("train.memory.tile_tokens=32")).plan_id != plan_id


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has something to offload")
def test_a_plan_refuses_offloading_that_training_here_would_refuse(job: Job) -> None:
    on = ("train.memory.offload=true", "train.activation_checkpointing=true")
    with pytest.raises(UsageError, match="there already"):
        make_plan(job.recipe(*on))
    with pytest.raises(UsageError, match="no checkpointed layers"):
        make_plan(job.recipe(on[0], "train.activation_checkpointing=false"))
    assert make_plan(job.recipe(*on, "train.memory.device_gib=80")).activation_checkpointing


def test_auto_tiles_long_passes_only() -> None:
    assert savings_of(TrainBlock(), 16_384).tile_tokens is None
    assert savings_of(TrainBlock(), 16_385) == Savings(checkpoint_every=1, tile_tokens=8192)
    assert savings_of(TrainBlock(windows_per_device=2), 16_384).tile_tokens == 8192
