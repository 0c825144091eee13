"""What is trained: low-rank adapters, with or without embeddings and norms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctxext.recipe.base import Block, PositiveInt

Adaptation = Literal["lora", "qlora", "full"]


class LoraBlock(Block):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) by peft.

    Attributes:
        targets: names of the linear layers that get an adapter, or `all-linear`: all of them but the output embedding
            and what belongs to a mixture of experts.
        routers: with `all-linear`, also the routers of mixture-of-experts models, which stay frozen otherwise.
        experts: with `all-linear`, also the experts. Their weights are stacked into one, which peft adapts by adding
            the whole update to the whole stack in every forward pass: memory and time for a second set of experts.
        rank_stabilized: scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023,
            arXiv:2312.03732).
        weight_decomposed: train magnitude and direction apart (DoRA, Liu et al. 2024, arXiv:2402.09353).
        embeddings_and_norms: also train input and output embeddings and the norms, whole (LongLoRA, Chen et al. 2023,
            arXiv:2309.12307: what makes LoRA reach full fine-tuning at longer lengths).
        start_from: folder of an adapter, or run that trained one, that training goes on from (its first stage).
    """

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    routers: bool = False
    experts: bool = False
    rank_stabilized: bool = False
    weight_decomposed: bool = False
    embeddings_and_norms: bool = False
    start_from: str | None = None

    @model_validator(mode="after")
    def _mixtures_are_named_once(self) -> LoraBlock:
        for name in ("routers", "experts"):
            if getattr(self, name) and self.targets != "all-linear":
                raise ValueError(f"lora.{name} goes with targets: all-linear; name the {name} in lora.targets instead")
        return self

    @model_validator(mode="after")
    def _targets_are_some(self) -> LoraBlock:
        if not self.targets:
            raise ValueError("lora.targets is empty, so nothing would train")
        return self
