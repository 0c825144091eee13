"""Connect to an OpenAI-compatible server: which model it serves, and in which form it takes prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ctxext.data.boundaries import encode_plain, leading_marker
from ctxext.errors import UsageError, did_you_mean
from ctxext.evaluation.backends.client import Reply, ServerClient
from ctxext.evaluation.backends.forms import Form, PlainText, TokenIds, UserTurn
from ctxext.evaluation.backends.kinds import (
    ServerFacts,
    greedy_fields,
    owner_of,
    served_models,
    server_facts,
    without_folders,
)
from ctxext.evaluation.backends.server import ServerBackend

FormName = Literal["auto", "completions", "chat"]
_NOT_THERE = frozenset({404, 405, 501})


def connect(
    tokenizer: Any,
    client: ServerClient,
    *,
    model_name: str | None = None,
    form: FormName = "auto",
    concurrency: int = 4,
    stop_ids: Sequence[int] = (),
    report: Callable[[str], None] = lambda line: None,
) -> ServerBackend:
    """Ask the server what it is and how it can be asked.

    Args:
        model_name: as the server names it; the only one served when left out.
        form: `completions` or `chat` to insist on an endpoint.
        report: told what was found.

    Raises:
        UsageError: a wrong model name, key or endpoint.
        ResourceError: nobody answers.
    """
    if concurrency < 1:
        raise UsageError("at least one request at a time is needed", where="--concurrency", got=concurrency)
    served = served_models(client)
    name = _chosen(client, served, model_name)
    facts = server_facts(client, served, name)
    found = _form(client, tokenizer, facts, name, form, [str(entry["id"]) for entry in served])
    backend = ServerBackend(client, tokenizer, found, name, facts, concurrency=concurrency, stop_ids=stop_ids)
    report(backend.describe())
    return backend


def _chosen(client: ServerClient, served: list[dict[str, Any]], asked: str | None) -> str:
    """The name that requests carry.

    Raises:
        UsageError: none was asked for and it is not clear which, or the server certainly does not serve it.
    """
    names = [str(entry["id"]) for entry in served]
    if asked is None:
        if len(names) == 1:
            return names[0]
        raise UsageError(
            "which of the server's models is meant?" if names else "the server does not say what it serves",
            where=client.base_url,
            got=_shortlist(names) or None,
            hint="Name it with --model-name.",
        )
    for name in names:
        if asked in (name, without_folders(name)):
            return name
    if names and all(owner_of(entry) != "other" for entry in served):
        raise _not_served(asked, names)  # llama.cpp would answer all the same, with the model it has
    return asked  # others load models that they do not list; the first question tells


def _form(
    client: ServerClient, tokenizer: Any, facts: ServerFacts, name: str, wanted: FormName, names: list[str]
) -> Form:
    """The first form that the server takes and counts right: ids, text, a user's turn.

    Raises:
        UsageError: it takes none.
    """
    if wanted == "chat":
        return UserTurn(tokenizer)
    marker = tuple(leading_marker(tokenizer))
    ids = [*marker, *encode_plain(tokenizer, "The capital of France is")]
    forms: list[Form] = [TokenIds(), PlainText(tokenizer, marker)]
    if marker:
        forms.append(PlainText(tokenizer))
    off_by: dict[int, Form] = {}
    reply = Reply(0, {})
    for form in forms:
        body = {"model": name, "max_tokens": 1, "temperature": 0, **greedy_fields(facts.kind, ()), **form.fields(ids)}
        reply = client.post(form.path, body)
        if reply.status in _NOT_THERE:
            break
        if reply.ok:
            usage = reply.value.get("usage")
            read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            if not isinstance(read, int) or read == len(ids):
                return form
            off_by.setdefault(abs(read - len(ids)), form)
    if off_by:
        return off_by[min(off_by)]
    if names and name not in names:
        raise _not_served(name, names)
    if reply.status in _NOT_THERE and wanted == "auto":
        return UserTurn(tokenizer)
    raise UsageError(
        "the server does not take completions",
        where=f"{client.base_url}/completions",
        got=f"HTTP {reply.status}: {reply.words}",
        hint="Is --base-url the address that ends in /v1?",
    )


def _not_served(name: str, names: list[str]) -> UsageError:
    near = did_you_mean(name, names)
    return UsageError(
        "the server does not serve this model",
        where="--model-name",
        got=name,
        expected=f"one of {_shortlist(names)}",
        hint=f"Did you mean '{near}'?" if near else None,
    )


def _shortlist(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
