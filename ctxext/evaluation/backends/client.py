"""HTTP with an OpenAI-compatible server: what is tried again, and what each failure means to the user.

The API key comes from the environment, goes into one header, and is struck out of everything that is shown.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from ctxext.errors import ResourceError, UsageError

API_KEY_VARIABLE = "OPENAI_API_KEY"
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
_KNOWN_ENDS = ("/chat/completions", "/completions", "/models")
# How servers say that a prompt is too long: vLLM, SGLang, llama.cpp, OpenAI.
_TOO_LONG = ("context", "max_model_len", "maximum input length", "too long", "longer than", "too many tokens")


@dataclass(frozen=True)
class Reply:
    """What a server answered; `words` is its error message in one line, empty without one."""

    status: int
    value: dict[str, Any]
    words: str = ""

    @property
    def ok(self) -> bool:
        """Whether the request was served."""
        return 200 <= self.status < 300

    @property
    def says_too_long(self) -> bool:
        """Whether the error is about the prompt's length."""
        return not self.ok and any(word in self.words.lower() for word in _TOO_LONG)


class ServerClient:
    """Requests to one server.

    Args:
        base_url: as OpenAI's clients take it, usually ending in `/v1`.
        timeout_seconds: for one answer.
        num_retries: after 429, 5xx and timeouts; with growing pauses, or as long as the server asks for.
        num_connections: kept open.
        environ: where `OPENAI_API_KEY` is looked up.

    Raises:
        UsageError: no such address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_seconds: float = 600.0,
        num_retries: int = 5,
        num_connections: int = 8,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.base_url = api_root(base_url)
        self._key = environ.get(API_KEY_VARIABLE) or ""
        self._timeout = (min(_CONNECT_SECONDS, timeout_seconds), timeout_seconds)
        self._num_retries = num_retries
        self._stopped = threading.Event()
        self._session = requests.Session()
        # Otherwise a proxy of the environment would be asked for servers on this machine.
        self._session.trust_env = not _is_loopback(self.base_url)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=num_connections))

    def get(self, path: str, *, outside_root: bool = False) -> Reply:
        """GET below the API root, or below the server's own root; tried once, and an error is a reply like others."""
        return self._request("GET", self._url(path, outside_root), None)

    def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """POST JSON below the API root.

        Raises:
            UsageError: the API key is refused.
            ResourceError: nobody answers, or only errors come, however often it is tried.
        """
        return self._request("POST", self._url(path, False), body)

    def stop(self) -> None:
        """Wait no longer before trying again."""
        self._stopped.set()

    def _url(self, path: str, outside_root: bool) -> str:
        root = self.base_url.removesuffix("/v1") if outside_root else self.base_url
        return f"{root}/{path}"

    def _request(self, method: str, url: str, body: Mapping[str, Any] | None) -> Reply:
        for attempt in range(self._num_retries + 1):
            last = attempt == self._num_retries or self._stopped.is_set()
            try:
                response = self._session.request(
                    method, url, json=body, timeout=self._timeout, auth=self._authorise, allow_redirects=False
                )
            except requests.Timeout as error:
                # An address that takes no connection at all will not take the next one.
                if last or method == "GET" or isinstance(error, requests.ConnectTimeout):
                    raise self._silent(f"no answer within {self._timeout[1]:g} seconds") from None
                self._wait(attempt, None)
                continue
            except requests.RequestException as error:
                raise self._silent(self._struck_out(_reason(error))) from None
            reply = self._reply(response)
            if method == "POST" and reply.status in _TRANSIENT and not reply.says_too_long:
                if last:
                    raise ResourceError(
                        "the server keeps answering with errors",
                        where=self.base_url,
                        got=f"HTTP {reply.status}: {reply.words}",
                        hint="What was answered before is saved; run the same command again to go on.",
                    )
                self._wait(attempt, response.headers.get("Retry-After"))
                continue
            self._refuse(reply, response.headers.get("Location"))
            return reply
        raise AssertionError("unreachable")

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Given as `auth`, so that no .netrc puts another password in its place.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _wait(self, attempt: int, asked: str | None) -> None:
        try:
            seconds = float(asked) if asked else _FIRST_WAIT_SECONDS * 2**attempt
        except ValueError:  # a date
            seconds = _FIRST_WAIT_SECONDS * 2**attempt
        self._stopped.wait(min(max(seconds, 0.0), _LONGEST_WAIT_SECONDS))

    def _reply(self, response: requests.Response) -> Reply:
        try:
            value = response.json()
        except ValueError:
            value = None
        fields = value if isinstance(value, dict) else {}
        ok = 200 <= response.status_code < 300
        words = "" if ok else self._struck_out(_error_words(fields, response.text))
        return Reply(response.status_code, fields, words)

    def _refuse(self, reply: Reply, location: str | None) -> None:
        if reply.status in (401, 403):
            raise UsageError(
                "the server refuses the API key" if self._key else "the server wants an API key",
                where=self.base_url,
                got=f"HTTP {reply.status}: {reply.words}",
                hint=f"Set the environment variable {API_KEY_VARIABLE}.",
            )
        if 300 <= reply.status < 400:
            raise UsageError(
                "the server is elsewhere",
                where=self.base_url,
                got=f"HTTP {reply.status} to {location or 'nowhere'}",
                hint="Give the new address as --base-url.",
            )

    def _silent(self, reason: str) -> ResourceError:
        return ResourceError(
            "the server does not answer",
            where=self.base_url,
            got=reason,
            hint="Is it running, and is --base-url right? What was answered before is saved.",
        )

    def _struck_out(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def api_root(base_url: str) -> str:
    """The address below which `completions` and `models` lie; `/v1` is added where only a server is named.

    Raises:
        UsageError: not an http address, or one with a password in it.
    """
    text = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        named = False
    if not named:
        raise UsageError(
            "not the address of a server", where="--base-url", got=base_url, expected="such as http://localhost:8000/v1"
        )
    if "@" in parts.netloc:
        raise UsageError("an address must hold no password", where="--base-url", hint=f"Use {API_KEY_VARIABLE}.")
    if parts.query or parts.fragment:
        raise UsageError("an address without ? and # is expected", where="--base-url", got=base_url)
    for end in _KNOWN_ENDS:
        text = text.removesuffix(end)
    return text if urlsplit(text).path.strip("/") else f"{text}/v1"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: requests.RequestException) -> str:
    text = str(error)
    for known in ("Connection refused", "Name or service not known", "nodename nor servname", "No route to host"):
        if known in text:
            return known.lower()
    if isinstance(error, requests.exceptions.SSLError):
        return "no trusted TLS connection"
    if "RemoteDisconnected" in text or "Connection reset" in text or "Connection aborted" in text:
        return "the connection was closed without an answer"
    return text.splitlines()[0][:200] if text else type(error).__name__


def _error_words(value: Mapping[str, Any], text: str) -> str:
    """The message of an error reply, in whichever place this server puts it."""
    error = value.get("error", value)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("msg") or text
    return " ".join(str(error).split())[:400] or "no message"
