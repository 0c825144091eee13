"""Which backend answers: the one place that turns the options of a command line into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from ctxext.errors import ArtefactError, UsageError, first_line, unknown_name
from ctxext.evaluation.answerer import stop_ids
from ctxext.evaluation.backend import Backend
from ctxext.evaluation.backends.client import ServerClient
from ctxext.evaluation.backends.connect import FormName, connect
from ctxext.evaluation.backends.vllm import load_vllm
from ctxext.model.load import ModelSource, quiet
from ctxext.model.placement import require_device_map

BackendName = Literal["transformers", "openai", "vllm"]
BACKENDS: tuple[BackendName, ...] = ("transformers", "openai", "vllm")
# Servers and vLLM give log-probabilities of a prompt only at the price of their prefix cache, most servers not at all.
NO_LOSSES = "Losses by position were not measured: this backend does not tell them."
_ENDPOINTS: tuple[FormName, ...] = ("auto", "completions", "chat")


@dataclass(frozen=True)
class BackendChoice:
    """A backend as it was asked for; `backend_choice` makes one from a command line.

    Attributes:
        name: `transformers` is the model in this process, by ctxext's own engine.
        base_url, model_name, endpoint, concurrency, timeout_seconds: of a server.
        device_map: spreads a model in this process over several devices.
    """

    name: BackendName = "transformers"
    base_url: str | None = None
    model_name: str | None = None
    endpoint: FormName = "auto"
    concurrency: int = 4
    timeout_seconds: float = 600.0
    device_map: str | None = None

    @property
    def loads_here(self) -> bool:
        """Whether this process loads the weights with transformers."""
        return self.name == "transformers"


def backend_choice(
    name: str = "transformers",
    *,
    base_url: str | None = None,
    model_name: str | None = None,
    endpoint: str = "auto",
    concurrency: int | None = None,
    timeout_seconds: float | None = None,
    device_map: str | None = None,
) -> BackendChoice:
    """The options of a command line as one choice.

    Raises:
        UsageError: an unknown name, or options of another backend.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS, where="--backend")
    if endpoint not in _ENDPOINTS:
        raise unknown_name("endpoint", endpoint, _ENDPOINTS, where="--endpoint")
    of_servers = {
        "--base-url": base_url,
        "--model-name": model_name,
        "--concurrency": concurrency,
        "--timeout": timeout_seconds,
        "--endpoint": None if endpoint == "auto" else endpoint,
    }
    given = [option for option, value in of_servers.items() if value is not None]
    if name != "openai" and given:
        raise UsageError("options of a server without one", where=given[0], hint="Add --backend openai.")
    if name == "openai" and base_url is None:
        raise UsageError(
            "which server?", where="--backend openai", expected="--base-url, such as http://localhost:8000/v1"
        )
    if device_map is not None and name != "transformers":
        raise UsageError("only models that this process loads can be spread", where="--device-map", got=name)
    if concurrency is not None and concurrency < 1:
        raise UsageError("at least one request at a time is needed", where="--concurrency", got=concurrency)
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise UsageError("not a time to wait", where="--timeout", got=timeout_seconds, expected="seconds above 0")
    return BackendChoice(
        name=name,
        base_url=base_url,
        model_name=model_name,
        endpoint=endpoint,
        concurrency=concurrency or BackendChoice.concurrency,
        timeout_seconds=timeout_seconds or BackendChoice.timeout_seconds,
        device_map=None if device_map is None else require_device_map(device_map),
    )


def open_backend(
    choice: BackendChoice,
    source: ModelSource,
    config: Any,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    max_length_tokens: int,
    own_positions: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Backend:
    """A server, or vLLM in this process; a model in this process needs no opening but an `Answerer`.

    Args:
        config: under which the model is asked.
        max_length_tokens: longest prompt and answer together.
        own_positions: the config was extended on loading. A server cannot be told; vLLM is.
        report: told what was opened, line by line.

    Raises:
        CtxextError: the server or vLLM is not there, or does not take what is asked for.
    """
    stops = sorted(source_stop_ids(source, config, tokenizer))
    if choice.name == "vllm":
        backend = load_vllm(
            source,
            config,
            tokenizer,
            dtype=dtype,
            max_length_tokens=max_length_tokens,
            stop_ids=stops,
            own_positions=own_positions,
        )
        report(backend.describe())
        return backend
    if own_positions:
        raise UsageError(
            "a server has the positions that it was started with",
            where="--backend openai",
            hint="Write the extended model with `ctxext patch`, serve that, and evaluate it as it is.",
        )
    assert choice.base_url is not None
    client = ServerClient(
        choice.base_url, timeout_seconds=choice.timeout_seconds, num_connections=max(choice.concurrency, 1)
    )
    return connect(
        tokenizer,
        client,
        model_name=choice.model_name,
        form=choice.endpoint,
        concurrency=choice.concurrency,
        stop_ids=stops,
        report=report,
    )


def source_stop_ids(source: ModelSource, config: Any, tokenizer: Any) -> set[int]:
    """Token ids that end an answer, without loading the model: as `Answerer` finds them.

    Raises:
        ArtefactError: settings for generation with which the model would not load either.
    """
    try:
        with quiet():
            generation = GenerationConfig.from_pretrained(source.location, revision=source.revision or "main")
    except OSError:  # none there, or no JSON: transformers then makes one from the config as well
        generation = GenerationConfig.from_model_config(config)
    except Exception as error:  # ValueError, TypeError ... for one thing: a value that makes no sense
        raise ArtefactError(
            f"could not read the model's generation_config.json ({first_line(error)})", where=source.name
        ) from error
    return stop_ids(SimpleNamespace(generation_config=generation), tokenizer)
