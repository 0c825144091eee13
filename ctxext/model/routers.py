"""Routers of mixture-of-experts models: which modules they are, whom they choose, what loss keeps them balanced.

transformers' classes say which modules give router logits. Many of them add an auxiliary loss for balanced experts
(Fedus et al. 2021, arXiv:2101.03961, equation 4), but inside `forward`, only when labels go in and
`output_router_logits` is on, which it is not by default: a loss computed outside the model loses it silently. Models
that balance by a bias (DeepSeek-V3 and its kind) add none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.recipe.train import TrainBlock

_KEY = "router_logits"


@dataclass(frozen=True)
class Router:
    """A module that scores experts.

    Attributes:
        name: in the model.
        index: of the logits in what the module returns.
    """

    name: str
    module: nn.Module
    index: int

    def logits(self, output: Any) -> Tensor:
        """Router logits [tokens, experts] of the module's output."""
        logits: Tensor = output[self.index] if isinstance(output, tuple) else output
        return logits.reshape(-1, logits.shape[-1])

    def chosen(self, output: Any, top_k: int) -> Tensor:
        """The experts [tokens, k] that were chosen: as the module says, else those with the highest logits."""
        logits = self.logits(output)
        for part in output if isinstance(output, tuple) else ():
            whole = isinstance(part, Tensor) and not part.is_floating_point() and part.dtype != torch.bool
            if whole and part.ndim >= 2 and part.numel() // part.shape[-1] == len(logits):
                found: Tensor = part.reshape(len(logits), -1)
                return found
        return logits.topk(top_k, dim=-1).indices


def routers_of(model: nn.Module) -> list[Router]:
    """Every router of a model, with or without adapters, in the order of its modules; none in dense models.

    Of some classes only whole blocks are known to give router logits: those are not here.
    """
    return [
        router for router in modules_with_router_logits(model) if re.search("Rout|Gat", type(router.module).__name__)
    ]


def modules_with_router_logits(model: nn.Module) -> list[Router]:
    """Every module whose output holds router logits, as transformers' classes say: routers, and blocks around them."""
    found: dict[int, Router] = {}
    for prefix, part in model.named_modules():
        for recorder in _recorders(part) if isinstance(part, PreTrainedModel) else ():
            for name, module in part.named_modules(prefix=prefix):
                if _matches(recorder, name, module):
                    found.setdefault(id(module), Router(name, module, recorder.index))
    places = {id(module): place for place, module in enumerate(model.modules())}
    return sorted(found.values(), key=lambda router: places[id(router.module)])


def _recorders(part: PreTrainedModel) -> Iterator[OutputRecorder]:
    specs: Any = (getattr(part, "_can_record_outputs", None) or {}).get(_KEY, [])
    for spec in specs if isinstance(specs, list) else [specs]:
        # As transformers' own capture: a bare class means the second of what its modules return.
        yield spec if isinstance(spec, OutputRecorder) else OutputRecorder(target_class=spec, index=1)


def _matches(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    if recorder.target_class is None or not isinstance(module, recorder.target_class):
        return False
    return recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."


def experts_per_token(config: Any) -> int:
    """How many experts a token gets, by the config."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k"):
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 1


def auxiliary_coefficient(model: Any) -> float | None:
    """What the model's class multiplies its auxiliary loss with; None where it has no such loss."""
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        value = vars(model).get(name)
        if value is not None and modules_with_router_logits(model):
            return float(value)
    return None


def auxiliary_coefficient_in_use(model: Any, router_loss: float | None) -> float:
    """What the auxiliary loss is multiplied with in training; 0.0 where the class has no such loss.

    Args:
        router_loss: of the recipe; goes before the model's own.
    """
    own = auxiliary_coefficient(model)
    if own is None:
        return 0.0
    return own if router_loss is None else router_loss


def forward_with_auxiliary_loss(model: Any, decoder: nn.Module, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, S, D] and the auxiliary loss without its coefficient, as the model's own class has it.

    Args:
        decoder: of the model; its logits are computed for the last token only.

    Raises:
        UnsupportedModelError: the class returns no such loss.
    """
    hidden: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda module, given, output: hidden.append(output.last_hidden_state))
    try:
        output = model(**arguments, output_router_logits=True, logits_to_keep=1)
    finally:
        handle.remove()
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise UnsupportedModelError(
            "the model has a coefficient of an auxiliary loss, but its class returns no such loss",
            where=type(model).__name__,
            hint="Set train.router_loss=0 to train without it.",
        )
    return hidden[0], loss


def check_routers(model: Any, train: TrainBlock) -> None:
    """Refuse settings for routers that the model does not have; also on meta tensors.

    Raises:
        UsageError: no routers, no auxiliary loss, or noise twice.
    """
    if train.router_loss and auxiliary_coefficient(model) is None:
        raise UsageError(
            "the model's class has no auxiliary loss for routers",
            where="train.router_loss",
            got=train.router_loss,
            hint="Leave train.router_loss out.",
        )
    if not train.router_jitter:
        return
    text = model.config.get_text_config()
    # Of PhiMoE, `router_jitter_noise` is the width of a threshold.
    names = ("input_jitter_noise", "moe_jitter_eps", *(() if text.model_type == "phimoe" else ("router_jitter_noise",)))
    own = [f"the config has {name} = {getattr(text, name)}" for name in names if getattr(text, name, None)]
    if own or not routers_of(model):
        raise UsageError(
            "noise on the inputs of routers is there already" if own else "the model has no routers to put noise on",
            where="train.router_jitter",
            got=own[0] if own else train.router_jitter,
            hint="Leave train.router_jitter out.",
        )
