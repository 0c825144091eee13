"""The contract of a RoPE method: every own method keeps it, every broken one is told which promise it breaks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict

from ctxext.rope.base import BaseRope, Float64Array, RopeMethod, RopeTable
from ctxext.rope.contract import DEFAULT_BASES, assert_contract, check_method
from ctxext.rope.formulas import Linear, Ntk, Yarn
from ctxext.rope.methods import METHODS, create_method

RISING = [1.0 + index / 8 for index in range(32)]
NEEDED: dict[str, dict[str, Any]] = {
    "none": {"control": True},
    "longrope": {"long_factor": RISING},
    "frequency-map": {"ratios": [1 / factor for factor in RISING]},
}
OF_64_DIMENSIONS = [base for base in DEFAULT_BASES if base.rotary_dim == 64]


@pytest.mark.parametrize("name", METHODS)
def test_every_own_method_keeps_the_contract(name: str) -> None:
    assert_contract(create_method(name, **NEEDED.get(name, {})), OF_64_DIMENSIONS if name in NEEDED else DEFAULT_BASES)


WITH_PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("yarn", {"attention_factor": 1.3}),
    ("yarn", {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}),
    ("ntk-by-parts", {"truncate": False}),
    ("theta", {"theta": 1e8}),
    ("theta", {"multiple": 4.0}),
    ("dynamic", {"growth": 2.0}),
    ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    ("longrope", {"long_factor": RISING, "attention_factor": 1.1}),
    ("longrope", {"long_factor": RISING, "short_factor": [1.0] * 31 + [1.5]}),
    ("longrope", {"long_factor": RISING, "short_factor": [1.0] * 31 + [1.5], "attention_factor": 1.1}),
    ("frequency-map", {"frequencies": [2.0**-index for index in range(32)], "attention_factor": 0.9}),
    ("cope", {"dimensions": 5}),
    ("resonance", {"after": "linear"}),
    ("resonance", {"after": "ntk"}),
    ("resonance", {"after": "none"}),
]


@pytest.mark.parametrize(("name", "parameters"), WITH_PARAMETERS, ids=lambda value: str(value)[:30])
def test_the_contract_holds_for_other_parameters_too(name: str, parameters: dict[str, Any]) -> None:
    assert_contract(create_method(name, **parameters), OF_64_DIMENSIONS)


RANDOM_BASES = st.builds(
    BaseRope,
    theta=st.floats(1e3, 1e7),
    rotary_dim=st.integers(4, 64).map(lambda quarter: 4 * quarter),
    original_length=st.integers(1, 64).map(lambda thousands: 1024 * thousands),
)


@settings(max_examples=150)
@given(base=RANDOM_BASES, factor=st.sampled_from([1.5, 2.0, 8.0, 32.0]), name=st.sampled_from(sorted(METHODS)))
def test_own_methods_keep_the_contract_on_any_model(base: BaseRope, factor: float, name: str) -> None:
    rising = np.geomspace(1.0, factor, base.rotary_dim // 2).tolist()
    needed: dict[str, dict[str, Any]] = {
        "none": {"control": True},
        "longrope": {"long_factor": rising},
        "frequency-map": {"ratios": [1 / value for value in rising]},
        "cope": {"dimensions": min(20, base.rotary_dim // 2)},
    }
    assert_contract(create_method(name, factor=factor, **needed.get(name, {})), [base])


class Halved(Linear):
    """A sound method, from which each mutant below departs in one respect."""

    summary = "position interpolation under another name"
    when = "in tests"
    source = "-"
    method: Literal["halved"] = "halved"  # type: ignore[assignment]


def test_the_method_that_the_mutants_depart_from_is_sound() -> None:
    assert_contract(Halved())


class Bfloat16Table(Halved):
    def table(self, base: BaseRope) -> RopeTable:
        sound = super().table(base)
        bits = sound.inv_freq.view(np.uint32) & np.uint32(0xFFFF0000)
        return replace(sound, inv_freq=bits.view(np.float32))


class DoublePrecision(Halved):
    def table(self, base: BaseRope) -> RopeTable:
        return replace(super().table(base), inv_freq=self.inv_freq(base))


class OneForEveryDimension(Halved):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        return np.repeat(super().inv_freq(base), 2)


class NotDeterministic(Halved):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        return super().inv_freq(base) * (1 + 1e-6 * np.random.default_rng().random())


_SEEN = itertools.count()


class RemembersItsLastModel(Halved):
    def attention_multiplier(self, base: BaseRope) -> float:
        return 1.0 + next(_SEEN) * 1e-9


class NotANumber(Halved):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        frequencies = super().inv_freq(base).copy()
        frequencies[7] = np.nan
        return frequencies


class Zero(Halved):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        frequencies = super().inv_freq(base).copy()
        frequencies[-1] = 0.0
        return frequencies


class NegativeAttention(Halved):
    def attention_multiplier(self, base: BaseRope) -> float:
        return -1.0


class ForgetsTheta(Halved):
    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {"rope_type": "linear", "factor": self.resolved_factor()}


class ForgetsPartialRotary(Halved):
    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {"rope_type": "linear", "rope_theta": base.theta, "factor": self.resolved_factor()}


class OwnType(Halved):
    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {**self._common(base, "halved"), "factor": self.resolved_factor()}


class NumpyInTheDict(Halved):
    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {**self._common(base, "linear"), "factor": np.float32(self.resolved_factor())}


class AnotherFactorInTheDict(Halved):
    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return {**self._common(base, "linear"), "factor": 2 * self.resolved_factor()}


class AttentionFactorMissing(Halved):
    identity_at_one = False

    def attention_multiplier(self, base: BaseRope) -> float:
        return 1.2


class OriginalLengthMissing(Yarn):
    method: Literal["halved"] = "halved"  # type: ignore[assignment]

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        parameters = super().stock_parameters(base)
        return parameters and {k: v for k, v in parameters.items() if k != "original_max_position_embeddings"}


class NotMonotone(Halved):
    last = None

    def inv_freq(self, base: BaseRope) -> Float64Array:
        frequencies = super().inv_freq(base).copy()
        frequencies[[-2, -1]] = frequencies[[-1, -2]]
        return frequencies

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return None


class Raises(NotMonotone):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        return Linear(factor=self.factor).inv_freq(base) * np.where(np.arange(base.rotary_dim // 2) == 0, 100.0, 1.0)


class WrongFirst(Halved):
    first = "kept"


class WrongLast(Halved):
    last = "kept"


class NotLowered(Ntk):
    method: Literal["halved"] = "halved"  # type: ignore[assignment]
    first = "lowered"


class NoIdentity(Halved):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        return super().inv_freq(base) / 2

    def stock_parameters(self, base: BaseRope) -> dict[str, Any] | None:
        return None


class NoSummary(Halved):
    summary = ""


class Loose(Halved):
    model_config = ConfigDict(extra="ignore")


class NotStored(Halved):
    secret: float = 1.0

    def model_post_init(self, context: Any, /) -> None:
        object.__setattr__(self, "secret", self.secret + 1.0)


class Crashes(Halved):
    def inv_freq(self, base: BaseRope) -> Float64Array:
        raise ZeroDivisionError("division by zero")


class NoMaximum(Halved):
    def maximum_length(self, base: BaseRope) -> int:
        return 4096.0  # type: ignore[return-value]


MUTANTS: dict[type[RopeMethod], str] = {
    Bfloat16Table: "float32: .*rounded to half precision",
    DoublePrecision: "float32: .*float64",
    OneForEveryDimension: "one frequency for each pair of dimensions: ",
    NotDeterministic: "deterministic: ",
    RemembersItsLastModel: "deterministic: ",
    NotANumber: r"finite: .*inv_freq\[7\]",
    Zero: "positive: ",
    NegativeAttention: "finite: the attention factor",
    ForgetsTheta: "plain dict: .*rope_theta",
    ForgetsPartialRotary: "plain dict: .*partial_rotary_factor is lost",
    OwnType: "plain dict: .*'halved'",
    NumpyInTheDict: "plain dict: .*JSON",
    AnotherFactorInTheDict: "round trip: frequency",
    AttentionFactorMissing: "transformers: the attention factor",
    OriginalLengthMissing: "transformers: frequency",
    NotMonotone: "monotone: frequency .* above the one before",
    Raises: "monotone: frequency 0 is raised",
    WrongFirst: "first frequency: declared kept",
    WrongLast: "last frequency: declared kept",
    NotLowered: "first frequency: declared lowered",
    NoIdentity: "identity at factor 1: ",
    NoSummary: r"described: NoSummary\.summary",
    Loose: "strict: ",
    NotStored: "survives a stored recipe: ",
    Crashes: "refuses with a CtxextError: ZeroDivisionError",
    NoMaximum: "maximum length: ",
}


@pytest.mark.parametrize(("mutant", "promise"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_method_is_told_which_promise_it_breaks(mutant: type[RopeMethod], promise: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)'halved' breaks the contract.*\n  {promise}"):
        assert_contract(mutant(method="halved"))


def test_a_broken_dict_is_noticed_by_both_readers() -> None:
    for mutant in (AnotherFactorInTheDict(), AttentionFactorMissing(), OriginalLengthMissing()):
        promises = [problem.partition(":")[0] for problem in check_method(mutant)]
        assert promises == ["round trip", "transformers"]


def test_a_method_that_refuses_every_model_is_not_sound() -> None:
    problems = check_method(create_method("longrope", long_factor=[2.0] * 3))
    assert problems == [
        "accepts some model: rope.long_factor: rope.long_factor must have one entry for each of the model's "
        "frequencies; got '3 entries'; expected 32 (half of 64 rotary dimensions)."
    ]


def test_the_case_that_shows_the_problem_is_named() -> None:
    (problem,) = [problem for problem in check_method(WrongLast()) if problem.startswith("last frequency")]
    assert "at factor 2 of a model with theta 10000, 64 dimensions, 2048 positions" in problem
    assert "more)" in problem


# ---- a method of another distribution, added for real -----------------------------------------------------------

PLUGIN = """
from typing import Literal
from ctxext.rope.base import RopeMethod

class Thirds(RopeMethod):
    summary = "every frequency divided by three"
    when = "in tests"
    source = "-"
    identity_at_one = False
    method: Literal["thirds"] = "thirds"
    strength: float = 3.0

    def inv_freq(self, base):
        return base.inv_freq() / self.strength

class Clash(RopeMethod):
    summary = when = source = "-"
    method: Literal["yarn"] = "yarn"
    def inv_freq(self, base):
        return base.inv_freq()

class OtherName(Thirds):
    method: Literal["fourths"] = "fourths"

class Twice(Thirds):
    method: Literal["wanted-twice"] = "wanted-twice"

not_a_method = 3
"""
ENTRY_POINTS = """[ctxext.rope_methods]
thirds = ctxext_thirds:Thirds
yarn = ctxext_thirds:Clash
misnamed = ctxext_thirds:OtherName
gone = ctxext_thirds:Gone
number = ctxext_thirds:not_a_method
wanted-twice = ctxext_thirds:Twice
"""
OTHER_ENTRY_POINTS = """[ctxext.rope_methods]
wanted-twice = ctxext_thirds:Twice
"""
RECIPE = """
model:
  source: recipes:tiny
target_length: 512
rope:
  method: thirds
  strength: 4.0
data:
  sources:
    - kind: generated-words
"""
SCRIPT = """
import json, sys, yaml
from pathlib import Path
from ctxext.errors import CtxextError, UsageError
from ctxext.recipe.load import load_recipe
from ctxext.rope.contract import check_method
from ctxext.rope.methods import BROKEN_METHODS, METHODS, create_method

def refusal(call):
    try:
        call()
    except CtxextError as error:
        return str(error)

recipe = load_recipe(sys.argv[1])
print(json.dumps({
    "listed": "thirds" in METHODS,
    "yarn": METHODS["yarn"].__module__,
    "created": create_method("thirds", strength=2.0).strength,
    "contract": check_method(create_method("thirds")),
    "recipe": [recipe.rope.method, recipe.rope.strength],
    "wrong parameter": refusal(lambda: create_method("thirds", strenght=2.0)),
    **{name: refusal(lambda: create_method(name)) for name in ("misnamed", "gone", "number", "wanted-twice")},
    "yarn is broken": BROKEN_METHODS["yarn"],
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process sees when a distribution with such entry points is installed."""
    site = tmp_path_factory.mktemp("site")
    for name, entries in (("thirds", ENTRY_POINTS), ("others", OTHER_ENTRY_POINTS)):
        info = site / f"ctxext_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ctxext-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
    (site / "ctxext_thirds.py").write_text(PLUGIN)
    (site / "recipe.yaml").write_text(RECIPE)
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(site / "recipe.yaml")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def test_an_entry_point_adds_a_method(seen: dict[str, Any]) -> None:
    assert seen["listed"]
    assert seen["created"] == 2.0
    assert seen["contract"] == []
    assert "strenght" in seen["wrong parameter"]


def test_a_recipe_can_name_a_method_of_another_distribution(seen: dict[str, Any]) -> None:
    assert seen["recipe"] == ["thirds", 4.0]


def test_a_broken_entry_point_is_one_clear_error(seen: dict[str, Any]) -> None:
    assert "'misnamed' of another distribution cannot be used" in seen["misnamed"]
    assert "its method field says 'fourths'" in seen["misnamed"]
    assert "no attribute 'Gone'" in seen["gone"]
    assert "is no RopeMethod class" in seen["number"]
    assert "Mend or uninstall" in seen["gone"]


def test_an_entry_point_cannot_take_over_an_own_method(seen: dict[str, Any]) -> None:
    assert seen["yarn"] == "ctxext.rope.formulas"
    assert "ctxext has a method of that name" in seen["yarn is broken"]


def test_a_name_that_two_distributions_add_is_neither(seen: dict[str, Any]) -> None:
    assert "both ctxext-" in seen["wanted-twice"]
    assert "add a method of that name" in seen["wanted-twice"]
