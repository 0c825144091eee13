"""What the parts of a causal language model are: by the type of their modules and by structure, never by their names.

Works on a model as it was loaded and on one that is being trained, with adapters or parametrisations on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

Kind = Literal[
    "attention",
    "MLP",
    "experts",
    "routers",
    "input embedding",
    "output embedding",
    "tied embeddings",
    "norms",
    "other layers",
]
KINDS: tuple[Kind, ...] = (
    "attention",
    "MLP",
    "experts",
    "routers",
    "input embedding",
    "output embedding",
    "tied embeddings",
    "norms",
    "other layers",
)

# A norm's epsilon, which no other module with nothing but vectors has.
_EPSILONS = ("eps", "epsilon", "variance_epsilon", "norm_eps")
# Names of transformers' classes; attention and MLPs have no common type.
_ATTENTION_CLASSES = ("attention", "attn")
_MLP_CLASSES = ("mlp", "feedforward", "ffn")
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")


def causal_lm(model: Any) -> Any:
    """The transformers model itself, below an adapter or as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def plain_name(name: str) -> str:
    """A base parameter's name as the loaded model had it, without what training has put around it."""
    name = _PARAMETRIZED.sub(r"\1\2", name.removeprefix("base_model.model."))
    return name.replace(".base_layer.", ".")


def is_adapter_name(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter and not to the base."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def parameter_kinds(model: Any) -> dict[str, Kind]:
    """Kind of every parameter, adapters' included, by its name in `model.named_parameters()`.

    An adapter is of the kind of what it adapts.
    """
    base = causal_lm(model)
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    kinds: dict[str, Kind] = {}
    seen: set[int] = set()
    for name, parameter, kind in _walk(base, "", "other layers", _Landmarks(base)):
        if id(parameter) not in seen:  # a tied one counts once, under the name that comes first
            seen.add(id(parameter))
            kinds[prefix + name] = kind
    return kinds


def is_tied(base: Any) -> bool:
    """Whether input and output embedding are one parameter."""
    head = base.get_output_embeddings()
    return head is not None and _first_weight(head) is _first_weight(base.get_input_embeddings())


class _Landmarks:
    """What kinds are recognised by, found once for a model."""

    def __init__(self, base: Any) -> None:
        self.input, self.output = _inner(base.get_input_embeddings()), _inner(base.get_output_embeddings())
        self.tied = is_tied(base)
        self.router_classes = router_classes(base)
        self.experts: set[int] = set()
        self.shared_gates: set[int] = set()
        for module in base.modules():
            children = [_inner(child) for child in module.children()]
            if any(isinstance(child, self.router_classes) for child in children):
                self.experts |= {id(child) for child in children if _holds_stacks(child)}
                self.shared_gates |= {
                    id(child) for child in children if isinstance(child, nn.Linear) and child.out_features == 1
                }

    def kind(self, module: nn.Module, inherited: Kind) -> Kind:
        """Kind of a module whose parent is of kind `inherited`."""
        if module is self.input or module is self.output:
            if self.tied:
                return "tied embeddings"
            return "input embedding" if module is self.input else "output embedding"
        if is_norm(module):
            return "norms"
        if isinstance(module, self.router_classes) or id(module) in self.shared_gates:
            return "routers"
        if id(module) in self.experts:
            return "experts"
        name = type(module).__name__.lower()
        if any(part in name for part in _ATTENTION_CLASSES):
            return "attention"
        if inherited == "other layers" and any(part in name for part in _MLP_CLASSES):
            return "MLP"
        return inherited


def router_classes(base: nn.Module) -> tuple[type[nn.Module], ...]:
    """Classes of the modules that choose experts, as the model's own classes declare them for recording."""
    found: set[type[nn.Module]] = set()
    for module in base.modules():
        declared = getattr(type(module), "_can_record_outputs", None)
        recorder = declared.get("router_logits") if isinstance(declared, dict) else None
        for entry in recorder if isinstance(recorder, list | tuple) else [recorder]:
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                found.add(target)
    return tuple(found)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: nothing but vectors, and an epsilon."""
    own = dict(own_parameters(module))
    has_epsilon = any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)
    inside = any(
        True for name, child in module.named_children() if name != "parametrizations" for _ in child.parameters()
    )
    return bool(own) and has_epsilon and not inside and all(parameter.ndim == 1 for parameter in own.values())


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters by name, parametrised ones too; not those of the modules inside it."""
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for name, entry in lists.items():
            if isinstance(entry.original, nn.Parameter):
                yield name, entry.original


def _walk(
    module: nn.Module, path: str, inherited: Kind, landmarks: _Landmarks
) -> Iterator[tuple[str, nn.Parameter, Kind]]:
    kind = landmarks.kind(_inner(module), inherited)
    dot = f"{path}." if path else ""
    for name, parameter in module.named_parameters(recurse=False):
        yield dot + name, parameter, kind
    for name, child in module.named_children():
        yield from _walk(child, dot + name, kind, landmarks)


def _inner(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _holds_stacks(module: Any) -> bool:
    """Whether a module owns weights of several experts in one: [experts, ..., ...]."""
    convolutions = (nn.Conv1d, nn.Conv2d)
    return not isinstance(module, convolutions) and any(p.ndim == 3 for _, p in own_parameters(module))


def _first_weight(module: Any) -> Any:
    return next((parameter for _, parameter in own_parameters(_inner(module))), None)
