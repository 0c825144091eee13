"""Which server this is, and what it says about itself: model, version, context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ctxext.errors import CtxextError
from ctxext.evaluation.backends.client import ServerClient

# Servers that say so in their list of models, which is then complete.
KINDS = ("vllm", "sglang", "llamacpp")


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself.

    Attributes:
        kind: `vllm`, `sglang`, `llamacpp`, or `other`.
        version: None when it does not say.
        model: the served model, without the folders of the server's machine.
        context_tokens: prompt and answer together; None when it does not say.
    """

    kind: str
    version: str | None
    model: str
    context_tokens: int | None


def served_models(client: ServerClient) -> list[dict[str, Any]]:
    """The server's models; none when it keeps no list."""
    reply = client.get("models")
    entries = reply.value.get("data") if reply.ok else []
    return [entry for entry in entries or [] if isinstance(entry, dict) and entry.get("id")]


def owner_of(entry: Mapping[str, Any]) -> str:
    """Who serves a listed model: `vllm`, `sglang`, `llamacpp`, or `other`."""
    owner = str(entry.get("owned_by") or "").lower()
    return owner if owner in KINDS else "other"


def without_folders(name: str) -> str:
    """A model's name; of a path, which says where it lies on somebody's machine, the last part."""
    plain = name.replace("\\", "/")
    is_path = plain.startswith(("/", "./", "../", "~")) or plain[1:3] == ":/"
    return (PurePosixPath(plain).name if is_path else name) or name


def server_facts(client: ServerClient, served: list[dict[str, Any]], name: str) -> ServerFacts:
    """What the server says about itself and this model."""
    entry: dict[str, Any] = next((entry for entry in served if entry["id"] == name), {})
    kind = owner_of(entry)
    context, version = entry.get("max_model_len"), None
    if kind == "llamacpp":
        value = _outside(client, "props")
        settings = value.get("default_generation_settings")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        version = str(value.get("build_info") or "")
        version = None if "unknown" in version else version
    elif kind != "other":
        version = _outside(client, "version" if kind == "vllm" else "get_server_info").get("version")
    return ServerFacts(
        kind,
        str(version) if version else None,
        without_folders(name),
        context if isinstance(context, int) else None,
    )


def _outside(client: ServerClient, path: str) -> dict[str, Any]:
    """What a server says about itself beside the API; nothing when it does not, or not to us."""
    try:
        reply = client.get(path, outside_root=True)
    except CtxextError:
        return {}
    return reply.value if reply.ok else {}


def greedy_fields(kind: str, stop_ids: Sequence[int]) -> dict[str, Any]:
    """What makes an answer plainly greedy, for servers known to take it; others reject fields they do not know."""
    if kind == "vllm":
        # By default vLLM and SGLang take penalties from the model's generation_config.json.
        return {"repetition_penalty": 1.0, "stop_token_ids": list(stop_ids), "return_token_ids": True}
    if kind == "sglang":
        return {"repetition_penalty": 1.0, "stop_token_ids": list(stop_ids)}
    if kind == "llamacpp":
        return {"repeat_penalty": 1.0, "cache_prompt": True}
    return {}
