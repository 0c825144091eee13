"""`torch.compile` of the decoder's layers, one by one: they are alike, so that one compilation serves all."""

from __future__ import annotations

from torch import nn

from ctxext.model.parts import causal_lm


def compile_layers(model: nn.Module) -> int:
    """Compile every decoder layer in place, hooks and checkpoints included; happens when it first runs.

    Returns:
        How many layers.
    """
    layers = causal_lm(model).get_decoder().layers
    for layer in layers:
        layer.compile()
    return len(layers)
