"""Every expected error is one readable sentence and has the exit code of its family."""

from __future__ import annotations

import signal

import pytest

from ctxext import errors
from ctxext.errors import (
    ArtefactError,
    CtxextError,
    DivergedError,
    GateError,
    InterruptedRunError,
    PositionsNotInEffectError,
    RecipeError,
    ResourceError,
    ResumeError,
    UnsupportedModelError,
    UsageError,
    did_you_mean,
    exit_code_of,
    unknown_name,
)

EXIT_CODES: list[tuple[BaseException, int]] = [
    (UsageError("x"), 2),
    (RecipeError("r.yaml", ["x"]), 2),
    (ResumeError("x", where="r", table="t", hint="h"), 2),
    (UnsupportedModelError("x"), 3),
    (ArtefactError("x"), 3),
    (PositionsNotInEffectError("x"), 3),
    (ResourceError("x"), 4),
    (DivergedError("x"), 5),
    (GateError("x"), 6),
    (InterruptedRunError("x", signal_number=signal.SIGINT), 130),
    (InterruptedRunError("x", signal_number=signal.SIGTERM), 143),
    (InterruptedRunError("x", signal_number=None), 7),
    (KeyboardInterrupt(), 130),
    (ValueError("a bug"), 1),
    (MemoryError(), 1),
]


@pytest.mark.parametrize(("error", "code"), EXIT_CODES, ids=lambda value: type(value).__name__)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


def test_every_family_has_its_exit_code_tested() -> None:
    families = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CtxextError)}
    assert families - {CtxextError} == {type(error) for error, _ in EXIT_CODES if isinstance(error, CtxextError)}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UsageError("it failed"), "it failed."),
        (UsageError("it failed", where="here"), "here: it failed."),
        (UsageError("it failed", got="word"), "it failed; got 'word'."),
        (UsageError("it failed", got=0), "it failed; got 0."),
        (UsageError("it failed", got=""), "it failed; got ''."),
        (UsageError("it failed", expected="more"), "it failed; expected more."),
        (UsageError("it failed", hint="Try again."), "it failed. Try again."),
        (
            UsageError("it failed", where="a:3", got=[1], expected="2", hint="Try again."),
            "a:3: it failed; got [1]; expected 2. Try again.",
        ),
        (RecipeError("r.yaml", ["one"]), "1 problem in r.yaml:\n  one"),
        (RecipeError("r.yaml", ["one", "two"]), "2 problems in r.yaml:\n  one\n  two"),
    ],
)
def test_the_message_says_what_where_got_expected_and_what_next(error: CtxextError, sentence: str) -> None:
    assert str(error) == sentence


def test_only_near_words_are_suggested() -> None:
    assert did_you_mean("yran", ["yarn", "linear"]) == "yarn"
    assert did_you_mean("zzz", ["yarn", "linear"]) is None
    assert did_you_mean("yarn", []) is None


def test_unknown_names_list_what_is_accepted() -> None:
    assert str(unknown_name("method", "liner", ["yarn", "linear"], where="rope.method")) == (
        "rope.method: unknown method; got 'liner'; expected one of linear, yarn. Did you mean 'linear'?"
    )
