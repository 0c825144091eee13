"""The cost counts what a token is really multiplied with."""

from __future__ import annotations

import torch
from support import tiny_config
from transformers import MixtralConfig, MixtralForCausalLM

from ctxext.planning.cost import model_shape, num_matrix_parameters


def mixture(num_experts: int, per_token: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=num_experts,
        num_experts_per_tok=per_token,
    )
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def test_a_token_costs_the_experts_that_it_is_sent_to() -> None:
    experts = 2 * 3 * 32 * 48  # two layers with three matrices an expert
    few, more, many = mixture(4, 1), mixture(4, 3), mixture(8, 3)
    assert num_matrix_parameters(more) - num_matrix_parameters(few) == 2 * experts
    routers = 2 * 4 * 32  # four further outputs in each of two routers
    assert num_matrix_parameters(many) - num_matrix_parameters(more) == routers


def test_untied_input_embeddings_multiply_nothing() -> None:
    tied, untied = (model_shape(tiny_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.num_matrix_parameters == untied.num_matrix_parameters
