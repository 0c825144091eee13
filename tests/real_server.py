"""A small OpenAI-compatible server around a real model: `recipes:tiny` behind Python's own HTTP server.

Run as a program it serves on one port for each of `HABITS` and prints their addresses as JSON. Answers come from
transformers' `generate`, so they are independent of the evaluator's own engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "tiny-served"
KEY = "a-key-of-the-tests"
CHAT_TEMPLATE = (
    "{% for m in messages %}User: {{ m.content }}{% endfor %}{% if add_generation_prompt %}\nBot:{% endif %}"
)
CONTEXT = 100
CUT_TO = 50
LIVES_FOR = 5


@dataclass
class Habit:
    """How a server behaves; `seen` are the bodies of its POST requests."""

    takes_ids: bool = True
    takes_text: bool = True
    chat_only: bool = False
    key: str | None = None
    context: int | None = None
    cut_to: int | None = None
    errors_first: list[int] = field(default_factory=list)
    lives_for: int | None = None
    samples: bool = False
    owner: str = "tests"
    strict: bool = True
    seen: list[dict[str, Any]] = field(default_factory=list)


def habits() -> dict[str, Habit]:
    """A fresh set of servers."""
    return {
        "ids": Habit(takes_text=False),
        "text": Habit(takes_ids=False),
        "chat": Habit(chat_only=True),
        "key": Habit(key=KEY),
        "short": Habit(context=CONTEXT),
        "cutting": Habit(cut_to=CUT_TO),
        "flaky": Habit(errors_first=[429, 503]),
        "broken": Habit(errors_first=[500] * 1000),
        "dying": Habit(lives_for=LIVES_FOR),
        "dice": Habit(samples=True),
        "like vllm": Habit(owner="vllm", strict=False, context=512),
    }


@contextmanager
def serving() -> Iterator[dict[str, str]]:
    """Addresses of the servers of a process of their own, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of the tests ended with exit code {process.wait()}")
        yield json.loads(line)
    finally:
        process.stdin.close()  # what the server waits for
        process.wait(timeout=60)


class _Generator:
    """Greedy (or sampled) continuations, one at a time."""

    def __init__(self) -> None:
        import torch

        from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source

        source = resolve_source("recipes:tiny")
        torch.set_num_threads(1)
        self.tokenizer: Any = load_tokenizer(source)
        self._model: Any = load_model(
            source, load_config(source), dtype=torch.float32, device=torch.device("cpu"), attention="eager"
        )
        self._lock = threading.Lock()

    def answer(self, ids: list[int], max_new_tokens: int, samples: bool) -> list[int]:
        import torch
        from transformers import GenerationConfig

        stop = self._model.generation_config.eos_token_id
        sampling = {"do_sample": True, "temperature": 5.0, "top_k": 0} if samples else {"do_sample": False}
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=0, **sampling)
        prompt = torch.tensor([ids])
        with self._lock, torch.inference_mode():
            output = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        answer: list[int] = output[0, len(ids) :].tolist()
        return answer


_FIELDS = {"model", "prompt", "messages", "max_tokens", "temperature"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    habit: Habit
    generator: _Generator

    def do_GET(self) -> None:
        if self.path == "/seen":
            self._send(200, {"seen": self.habit.seen})
        elif not self._allowed():
            self._send(401, {"error": {"message": f"no such key: {self.headers.get('Authorization')}"}})
        elif self.path == "/v1/models":
            entry = {"id": MODEL, "object": "model", "owned_by": self.habit.owner, "max_model_len": self.habit.context}
            self._send(200, {"object": "list", "data": [entry]})
        elif self.path == "/version":
            self._send(200, {"version": "1.2.3"})
        else:
            self._send(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        habit = self.habit
        habit.seen.append(body)
        if habit.lives_for is not None and len(habit.seen) > habit.lives_for:
            self.close_connection = True
            self.server.socket.close()  # from here on connections are refused, as of a process that has died
            self.connection.close()
            return
        if not self._allowed():
            self._send(401, {"error": {"message": f"no such key: {self.headers.get('Authorization')}"}})
        elif habit.errors_first:
            self._send(habit.errors_first.pop(0), {"error": {"message": "not now"}}, {"Retry-After": "0"})
        elif body.get("model") != MODEL:
            self._send(404, {"error": {"message": f"the model {body.get('model')} does not exist"}})
        elif habit.strict and not set(body) <= _FIELDS:
            self._send(422, {"detail": f"unexpected fields: {sorted(set(body) - _FIELDS)}"})
        elif self.path == "/v1/chat/completions":
            tokenizer = self.generator.tokenizer
            text = tokenizer.apply_chat_template(
                body["messages"], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
            )
            self._answer(body, list(tokenizer(text).input_ids))
        elif self.path == "/v1/completions" and not habit.chat_only:
            prompt = body["prompt"]
            if isinstance(prompt, str) and habit.takes_text:
                self._answer(body, list(self.generator.tokenizer(prompt).input_ids))
            elif isinstance(prompt, list) and habit.takes_ids:
                self._answer(body, prompt)
            else:
                self._send(400, {"error": {"message": f"a prompt cannot be a {type(prompt).__name__}"}})
        else:
            self._send(404, {"error": {"message": "not found"}})

    def _answer(self, body: dict[str, Any], ids: list[int]) -> None:
        habit, generator = self.habit, self.generator
        assert body["temperature"] == 0
        if habit.context is not None and len(ids) + body["max_tokens"] > habit.context:
            message = f"This model's maximum context length is {habit.context} tokens, you sent {len(ids)}."
            self._send(400, {"error": {"message": message, "type": "BadRequestError"}})
            return
        ids = ids[-habit.cut_to :] if habit.cut_to else ids
        answer = generator.answer(ids, body["max_tokens"], habit.samples)
        text = generator.tokenizer.decode(answer, skip_special_tokens=True)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        more = {"token_ids": answer} if body.get("return_token_ids") else {}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(answer)}
        self._send(200, {"choices": [{"index": 0, "finish_reason": "length", **said, **more}], "usage": usage})

    def _allowed(self) -> bool:
        return self.habit.key is None or self.headers.get("Authorization") == f"Bearer {self.habit.key}"

    def _send(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


def main() -> None:
    """Serve until stdin ends."""
    generator = _Generator()
    addresses = {}
    for name, habit in habits().items():
        handler = type(f"{name}Handler", (_Handler,), {"habit": habit, "generator": generator})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        addresses[name] = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=_until_closed, args=(server,), daemon=True).start()
    print(json.dumps(addresses), flush=True)
    sys.stdin.read()
    os._exit(0)  # threads of closed servers are of no interest


def _until_closed(server: ThreadingHTTPServer) -> None:
    with suppress(OSError, ValueError):  # closed on purpose
        server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
