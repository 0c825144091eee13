"""What every family does to its logits is what the loss does to them, or the family is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from rope.tiny_families import build, causal_families, tiny_family_config
from support import byte_tokenizer, tiny_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ctxext.errors import UnsupportedModelError
from ctxext.evaluation.answerer import Answerer
from ctxext.model import loss as loss_module
from ctxext.model.logits import HANDLED, REFUSED, logit_change
from ctxext.model.loss import DecoderHead
from ctxext.model.loss_proof import prove_loss

# Values that change the logits of tiny models beyond any tolerance; some defaults change nothing.
_STRONG = {
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    "logit_scale": 0.25,
    "logits_scaling": 8.0,
    "lm_head_multiplier": 0.5,
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": 91,
    "dim_model_base": 16,  # of MiniCPM3, whose logits_scaling is made of it
}
_LARGEST = 20_000_000  # parameters; a few families have no sizes that the tests know


def strong(config: PreTrainedConfig) -> PreTrainedConfig:
    for name, value in _STRONG.items():
        if getattr(config, name, None) is not None and (config.model_type, name) != ("minicpm3", "logits_scaling"):
            setattr(config, name, value)
    return config


def small_model(family: str) -> PreTrainedModel | None:
    """A tiny random model of a family; None where none can be built or run."""
    try:
        config = strong(tiny_family_config(family))
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in build(config).parameters()) > _LARGEST:
                return None
        model = build(config)
        with torch.no_grad():
            model(torch.arange(4)[None], use_cache=False)
    except Exception:  # any family may refuse in any way
        return None
    return model


def test_no_family_has_a_loss_that_is_not_its_own() -> None:
    proved, refused = set(), set()
    for family in causal_families():
        model = small_model(family)
        if model is None:
            continue
        if family in REFUSED:
            with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
                prove_loss(model)
            refused.add(family)
        else:
            assert prove_loss(model), family
            proved.add(family)
    assert len(proved) >= 125
    assert len(refused) >= 14
    assert len(proved & set(HANDLED)) >= 20
    assert {"llama4", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"} <= proved


@pytest.mark.parametrize("family", sorted(HANDLED))
def test_loss_and_gradients_of_a_family_that_changes_its_logits_are_the_plain_ones(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_WHOLE_LOGITS", 0)
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 8)
    model = small_model(family)
    if model is None:
        pytest.skip("no tiny model of it can be built")
    ids = (torch.arange(20)[None] * 7) % 80 + 10
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    losses, gradients = [], []
    for plain in (True, False):
        model.zero_grad()
        if plain:
            logits = model(**arguments).logits
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        else:
            parts = DecoderHead(model)
            loss = parts.summed_loss(parts.hidden_states(**arguments)[0, :-1], ids[0, 1:])
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for name, expected in gradients[0].items():
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((gradients[1][name] - expected).abs().max()) < 1e-4 * scale, name


def test_a_known_setting_in_an_unknown_family_is_refused_by_name() -> None:
    model = tiny_model()
    logit_change(model.config)
    model.config.logit_scale = 1.0
    logit_change(model.config)
    model.config.logits_scaling = 8.0
    with pytest.raises(UnsupportedModelError, match=r"config\.logits_scaling: .*llama"):
        logit_change(model.config)


class SecretlyScaled(type(tiny_model())):  # type: ignore[misc]
    """A Llama whose class does something to its logits that no setting tells."""

    scale = 1.01

    def forward(self, *args: object, **kwargs: object) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.scale
        return output


@pytest.mark.parametrize(("scale", "dtype"), [(1.01, torch.float32), (1.1, torch.bfloat16), (torch.nan, torch.float32)])
def test_the_proof_finds_a_change_that_is_not_in_the_config(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SecretlyScaled(tiny_model(initializer_range=0.5).config).to(dtype)
    model.scale = 1.0
    assert prove_loss(model)
    model.scale = scale
    with pytest.raises(UnsupportedModelError, match="SecretlyScaled: the loss"):
        prove_loss(model)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "nanochat", "llama", "mixtral", "hy_v4"])
def test_the_proof_holds_in_half_precision(family: str) -> None:
    model = small_model(family)
    assert model is not None
    assert prove_loss(model.bfloat16())


def test_the_proof_leaves_training_mode_and_random_state_as_they_were() -> None:
    model = tiny_model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert prove_loss(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_not_there_are_left_alone() -> None:
    with torch.device("meta"):
        model: nn.Module = tiny_model()
    assert not prove_loss(model)
    assert not prove_loss(nn.Linear(2, 2))


def test_evaluation_measures_the_loss_of_changed_logits() -> None:
    model = build(strong(tiny_family_config("gemma2", vocab_size=260)))
    ids = (torch.arange(40)[None] * 7) % 250
    losses = Answerer(model, byte_tokenizer()).answer(ids[0].tolist(), 1).losses
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    expected = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    torch.testing.assert_close(losses.float(), expected, rtol=1e-4, atol=1e-4)
