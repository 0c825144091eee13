"""What a family's model class does to its logits between the output embedding and the loss.

Some classes multiply, divide or soft-cap their logits, and some cut padded words off. A loss made of hidden states
has to repeat that. The same name of a setting means a factor in one family and a divisor in the next, so families are
listed; a setting of that kind in a family that is not listed is refused, and `ctxext.model.loss_proof` compares with
the model's own logits whatever stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctxext.errors import UnsupportedModelError


@dataclass(frozen=True)
class LogitChange:
    """Logits times `factor`, by `divisor`, soft-capped, without the columns behind `vocab_size`; in this order.

    Attributes:
        soft_cap: c of c * tanh(logits / c).
    """

    factor: float = 1.0
    divisor: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The changed logits [N, V'] of the output embedding's [N, V]."""
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits[..., : self.vocab_size]

    def slope(self, changed: Tensor) -> Tensor | float:
        """By how much every one of the `changed` logits [N, V'] grows with its own unchanged logit."""
        scale = self.factor / self.divisor
        if self.soft_cap is None:
            return scale
        return (changed / self.soft_cap).square_().neg_().add_(1.0).mul_(scale)


UNCHANGED = LogitChange()


@dataclass(frozen=True)
class _Settings:
    """Names of the config's settings that hold the values of a `LogitChange`."""

    factor: str | None = None
    divisor: str | None = None
    soft_cap: str | None = None
    vocab_size: str | None = None


_CAPPED = _Settings(soft_cap="final_logit_softcapping")
_SCALED = _Settings(factor="logit_scale")
_DIVIDED = _Settings(divisor="logits_scaling")

# By the text config's model_type; read off the classes of transformers 5.23, and tested against every one of them.
HANDLED: dict[str, _Settings] = {
    "beam": _CAPPED,
    "cohere": _SCALED,
    "cohere2": _SCALED,
    "cohere2_moe": _SCALED,
    "cohere_compass_text": _SCALED,
    "falcon_h1": _Settings(factor="lm_head_multiplier"),
    "gemma2": _CAPPED,
    "gemma3_text": _CAPPED,
    "gemma3n_text": _CAPPED,
    "gemma4_text": _CAPPED,
    "gemma4_unified_text": _CAPPED,
    "granite": _DIVIDED,
    "granite_swa": _DIVIDED,
    "granitemoe": _DIVIDED,
    "granitemoe_swa": _DIVIDED,
    "granitemoehybrid": _DIVIDED,
    "granitemoeshared": _DIVIDED,
    "hyperclovax": _Settings(factor="logits_scaling"),
    "inkling2_text": _Settings(soft_cap="final_logit_softcapping", vocab_size="unpadded_vocab_size"),
    "inkling_text": _Settings(divisor="logits_mup_width_multiplier", vocab_size="unpadded_vocab_size"),
    "minicpm3": _DIVIDED,  # the hidden states before the output embedding, which comes to the same
    "nanochat": _CAPPED,
    "recurrent_gemma": _Settings(soft_cap="logits_soft_cap"),
    "vaultgemma": _CAPPED,
    "xlstm": _Settings(soft_cap="output_logit_soft_cap"),
}

_LAYERS = "its head has layers of its own before the output embedding"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bert",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "modernbert-decoder",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        _LAYERS,
    ),
    "musicgen_decoder": "it predicts several codebooks at once",
    "musicgen_melody_decoder": "it predicts several codebooks at once",
    "prophetnet": "it predicts several tokens at every position",
}

_KNOWN_SETTINGS = sorted({name for row in HANDLED.values() for name in vars(row).values() if name is not None})


def logit_change(config: Any) -> LogitChange:
    """What the model class of `config` does to its logits.

    Args:
        config: of a whole model or of its text part.

    Raises:
        UnsupportedModelError: a head that cannot be computed from hidden states and output embedding, or a setting that
            changes logits in a family where its meaning is not known.
    """
    text = config.get_text_config()
    if text.model_type in REFUSED:
        raise UnsupportedModelError(
            f"a loss without logits cannot be computed: {REFUSED[text.model_type]}",
            where="config.model_type",
            got=text.model_type,
        )
    settings = HANDLED.get(text.model_type)
    if settings is not None:
        values = {field: getattr(text, name, None) for field, name in vars(settings).items() if name is not None}
        return LogitChange(**{field: value for field, value in values.items() if value is not None})
    for name in _KNOWN_SETTINGS:
        value = getattr(text, name, None)
        if value not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"models of the type {text.model_type} may change their logits in a way that is not known here",
                where=f"config.{name}",
                got=value,
            )
    return UNCHANGED
