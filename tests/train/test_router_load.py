"""Routers: what is counted is what they choose, a collapse is seen, and jitter is noise that checkpoints repeat."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rope.tiny_families import build, tiny_family_config
from support import SilentReporter, byte_tokenizer, recipe_values, step_lines, write_suite
from torch import Tensor, nn

from ctxext.errors import UsageError
from ctxext.model.loss_proof import prove_loss
from ctxext.model.router_jitter import add_router_jitter
from ctxext.model.routers import Router, check_routers, routers_of
from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of
from ctxext.recipe.schema import TrainBlock
from ctxext.train.metrics import StepMetrics, read_metrics
from ctxext.train.monitors import StepEvent
from ctxext.train.router_load import RouterLoadMonitor, _balance

IDS = (torch.arange(48).view(2, 24) * 7) % 80 + 10
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "phimoe", "jetmoe")


def event(step: int, auxiliary_loss: float | None = None) -> StepEvent:
    metrics = StepMetrics(step, 20, 1.0, 1.0, 1e-3, 10, 1.0, 1.0, auxiliary_loss)
    return StepEvent(metrics, [], nn.Linear(1, 1))


def model_of(family: str) -> Any:
    return build(tiny_family_config(family)).train()


def forward(model: Any) -> Tensor:
    torch.manual_seed(3)
    logits: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shares_are_those_of_the_experts_that_were_really_used(family: str) -> None:
    model = model_of(family)
    monitor = RouterLoadMonitor(1, 20)
    monitor.watch(model)
    monitor.before_step(1, [])
    forward(model)
    forward(model)  # two passes of one step
    (line,) = monitor.after_step(event(1))
    top_k, num_experts = line["experts_per_token"], line["num_experts"]
    assert (top_k, num_experts) == (model.config.num_experts_per_tok, 4)
    assert line["layers"] == [router.name for router in routers_of(model)]
    for shares, balance in zip(line["shares"], line["balance"], strict=True):
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)
        assert max(shares) <= 1 / top_k + 1e-4
        assert all(share * IDS.numel() * top_k == pytest.approx(round(share * IDS.numel() * top_k), abs=0.01)
                   for share in shares)  # whole tokens  # fmt: skip
        assert balance == pytest.approx(_balance(shares, top_k), abs=1e-3)


def test_the_counted_experts_of_mixtral_are_the_top_two_of_its_logits() -> None:
    model = model_of("mixtral")
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), output_router_logits=True).router_logits
    monitor = RouterLoadMonitor(1, 20)
    monitor.watch(model)
    monitor.before_step(1, [])
    forward(model)
    (line,) = monitor.after_step(event(1))
    for shares, scores in zip(line["shares"], logits, strict=True):
        counts = torch.bincount(scores.topk(2).indices.flatten(), minlength=4)
        assert shares == pytest.approx((counts / counts.sum()).tolist(), abs=1e-5)


def test_nothing_is_counted_between_steps_and_in_eval_mode() -> None:
    model = model_of("mixtral")
    monitor = RouterLoadMonitor(1, 20)
    monitor.watch(model)
    forward(model)
    monitor.before_step(1, [])
    model.eval()
    forward(model)
    assert monitor.after_step(event(1)) == []


def test_checkpoints_that_compute_layers_twice_change_no_share() -> None:
    lines = []
    for every in (None, 1, 2):
        model = model_of("mixtral")
        if every:
            model.activation_checkpointing_enable(every_n_layers=every)
        monitor = RouterLoadMonitor(1, 20)
        monitor.watch(model)
        monitor.before_step(1, [])
        forward(model).sum().backward()
        lines.append(monitor.after_step(event(1)))
    assert lines[0] == lines[1] == lines[2]


def test_balance_is_one_for_a_uniform_load_and_zero_when_all_tokens_share_their_experts() -> None:
    assert _balance([0.25] * 4, 2) == pytest.approx(1.0)
    assert _balance([0.5, 0.5, 0.0, 0.0], 2) == pytest.approx(0.0)
    assert _balance([0.5, 0.25, 0.25, 0.0], 2) == pytest.approx(0.5)
    assert _balance([0.5, 0.5], 2) == 1.0
    assert 0 < _balance([1 / 8] * 8 + [0.0] * 8, 2) < 1


class Loads(RouterLoadMonitor):
    """Is given counts instead of a model."""

    def given(self, step: int, *layers: list[int], auxiliary_loss: float | None = None) -> dict[str, Any]:
        self._top_k = 2
        self._routers = [Router(f"router {number}", nn.Identity(), 0) for number in range(len(layers))]
        self._counts = {number: torch.tensor([*counts, 0]) for number, counts in enumerate(layers)}
        (line,) = self.after_step(event(step, auxiliary_loss))
        return line


EVEN, UNEVEN, COLLAPSED = [10, 10, 10, 10, 10, 10, 10, 10], [30, 20, 15, 5, 4, 3, 2, 1], [38, 38, 2, 1, 1, 0, 0, 0]


def test_a_collapse_is_warned_of_once_a_layer_and_only_when_it_lasts() -> None:
    monitor = Loads(5, 100)
    lines = [monitor.given(step, EVEN, UNEVEN) for step in range(1, 21)]
    assert not any("warning" in line for line in lines)
    assert "warning" not in monitor.given(21, COLLAPSED, UNEVEN)  # one bad batch
    assert "warning" not in monitor.given(22, EVEN, UNEVEN)
    later = [monitor.given(step, EVEN, COLLAPSED) for step in range(23, 60)]
    warnings = [line["warning"] for line in later if "warning" in line]
    assert len(warnings) == 1
    assert "1 of 2" in warnings[0]
    assert "number 2" in warnings[0]
    assert "train.router_loss" in warnings[0]
    assert later[-1]["num_unused"] == 3
    assert later[-1]["max_load"] == pytest.approx(38 / 80 * 8, abs=1e-3)
    assert later[-1]["min_balance"] < 0.25 < later[-1]["mean_balance"]


def test_a_model_that_comes_collapsed_is_warned_of_after_ten_steps() -> None:
    monitor = Loads(5, 100)
    lines = [monitor.given(step, COLLAPSED) for step in range(1, 14)]
    assert ["warning" in line for line in lines] == [False] * 9 + [True] + [False] * 3


def test_a_balance_that_falls_to_less_than_half_is_a_collapse_above_the_fixed_limit_too() -> None:
    half = [40, 30, 6, 4, 2, 2, 1, 1]
    assert 0.25 < _balance([count / sum(half) for count in half], 2) < 0.5
    monitor = Loads(5, 100)
    for step in range(1, 11):
        monitor.given(step, EVEN)
    lines = [monitor.given(step, half) for step in range(11, 30)]
    assert sum("warning" in line for line in lines) == 1


def test_a_resumed_monitor_says_what_the_uninterrupted_one_says() -> None:
    whole, first, second = Loads(5, 100), Loads(5, 100), Loads(5, 100)
    script = [*[(EVEN, UNEVEN)] * 12, *[(EVEN, COLLAPSED)] * 20]
    expected = [whole.given(step, *layers) for step, layers in enumerate(script, start=1)]
    lines = [first.given(step, *layers) for step, layers in enumerate(script[:14], start=1)]
    second.restore(json.loads(json.dumps(first.state())))
    lines += [second.given(step, *layers) for step, layers in enumerate(script[14:], start=15)]
    assert lines == expected
    assert sum("warning" in line for line in expected) == 1


def test_jitter_reaches_routers_alone_and_only_in_training() -> None:
    model = model_of("mixtral")
    plain = forward(model).detach()
    seen: dict[str, list[Tensor]] = {"router": [], "experts": []}
    layer = model.model.layers[0].mlp
    assert add_router_jitter(model, 0.1) == 2
    layer.gate.register_forward_pre_hook(lambda module, given: seen["router"].append(given[0]))
    layer.experts.register_forward_pre_hook(lambda module, given: seen["experts"].append(given[0]))
    noisy = forward(model).detach()
    ratio = seen["router"][0] / seen["experts"][0]
    assert 0.9 <= float(ratio.min()) < 0.905
    assert 1.095 < float(ratio.max()) <= 1.1
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(noisy, plain)
    model.eval()
    assert torch.equal(forward(model), plain)
    assert prove_loss(model)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_activation_checkpoints_repeat_the_same_noise(family: str, every: int) -> None:
    gradients = []
    for checkpoints in (None, every):
        model = model_of(family)
        add_router_jitter(model, 0.3)
        if checkpoints:
            model.activation_checkpointing_enable(every_n_layers=checkpoints)
        forward(model).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_jitter_is_refused_where_there_is_nothing_to_put_it_on_or_some_already() -> None:
    check_routers(model_of("mixtral"), TrainBlock(router_jitter=0.01))
    check_routers(model_of("phimoe"), TrainBlock(router_jitter=0.01))
    for family, changes, match in (
        ("llama", {}, "no routers"),
        ("doge", {"is_moe": True}, "no routers"),  # its blocks route inside
        ("mixtral", {"router_jitter_noise": 0.1}, "there already"),
        ("phimoe", {"input_jitter_noise": 0.1}, "there already"),
    ):
        with pytest.raises(UsageError, match=rf"train\.router_jitter: .*{match}"):
            check_routers(build(tiny_family_config(family, **changes)), TrainBlock(router_jitter=0.01))


def test_a_run_of_a_mixture_of_experts_reports_load_and_auxiliary_loss_and_resumes_exactly(tmp_path: Path) -> None:
    config = tiny_family_config("mixtral", vocab_size=260, bos_token_id=None, eos_token_id=256, pad_token_id=None)
    config.router_aux_loss_coef = 0.1
    build(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    suite = write_suite(tmp_path / "suite.yaml")
    runs = []
    for name in ("whole", "parts"):
        values = recipe_values(str(tmp_path / "model"), str(suite), str(tmp_path / name))
        values["train"] |= {"router_jitter": 0.05, "activation_checkpointing": True, "windows_per_step": 4}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        runs.append(recipe_of(str(path), []))
    extend(runs[0], SilentReporter(), last_stage="train")

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend(runs[1], SilentReporter(on_step=stop), last_stage="train")
    extend(runs[1], SilentReporter(), last_stage="train")
    whole, parts = (step_lines(tmp_path / name) for name in ("whole", "parts"))
    for key in ("loss", "auxiliary_loss", "grad_norm"):
        assert [line[key] for line in whole] == [line[key] for line in parts]
    assert all(1.0 < line["auxiliary_loss"] / config.num_experts_per_tok < 4.0 for line in whole)
    loads = [read_metrics(tmp_path / name)[1]["router_load"] for name in ("whole", "parts")]
    assert loads[0] == loads[1]
    assert len(loads[0]) == 4
    assert all(line["auxiliary_loss"] == step["auxiliary_loss"] for line, step in zip(loads[0], whole, strict=True))
    assert math.isfinite(loads[0][0]["min_balance"])
