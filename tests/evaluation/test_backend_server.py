"""A server as backend: the same answers as in this process, and every failure said in words.

The server is `real_server.py`: `recipes:tiny` behind HTTP in a process of its own, answering with plain `generate`;
it is asked on loopback.
"""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_server import CHAT_TEMPLATE, CONTEXT, CUT_TO, KEY, LIVES_FOR, MODEL, serving

from ctxext.errors import CtxextError, ResourceError, UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.backend import NoAnswerError
from ctxext.evaluation.backends.client import API_KEY_VARIABLE, ServerClient, api_root
from ctxext.evaluation.backends.connect import connect
from ctxext.evaluation.backends.kinds import without_folders
from ctxext.evaluation.backends.server import ServerBackend
from ctxext.evaluation.engine import evaluate_samples
from ctxext.evaluation.prompt import Prompt, suite_builder
from ctxext.evaluation.store import SampleResult, SampleStore
from ctxext.evaluation.suite import Suite, resolve_samples
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source

NUM_ANSWER_TOKENS = 7


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    with serving() as addresses:
        yield addresses


@pytest.fixture(scope="module")
def here() -> Answerer:
    """The same model in this process."""
    source = resolve_source("recipes:tiny")
    model = load_model(source, load_config(source), dtype=torch.float32, device=torch.device("cpu"))
    return Answerer(model, load_tokenizer(source))


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(resolve_source("recipes:tiny"))


def suite(*lengths: int, num_samples: int = 3, **changes: Any) -> Suite:
    rows = [{"length": length, "depths": [0.0, 0.7], "samples": num_samples} for length in lengths]
    values = {"wording": "passkey", "haystack": "generated-words", "max_new_tokens": NUM_ANSWER_TOKENS}
    return Suite.model_validate({"description": "", "grid": rows, **values, **changes})


def prompts(asked: Suite, tokenizer: Any) -> list[Prompt]:
    builder = suite_builder(asked, tokenizer)
    return [builder.build(sample) for sample in resolve_samples(asked, 128, 512)]


def client(address: str, *, key: str | None = None, **options: Any) -> ServerClient:
    return ServerClient(
        address,
        environ={API_KEY_VARIABLE: key} if key else {},
        **{"timeout_seconds": 60.0, "num_retries": 2, **options},
    )


def connected(address: str, tokenizer: Any, **options: Any) -> ServerBackend:
    key = options.pop("key", None)
    return connect(tokenizer, client(address, key=key), **options)


def evaluated(backend: Any, asked: Suite, folder: Path) -> dict[str, SampleResult]:
    store = SampleStore(folder, {}, {})
    evaluate_samples(backend, suite_builder(asked, backend.tokenizer), asked, resolve_samples(asked, 128, 512), store)
    return store.results


def seen(address: str) -> list[dict[str, Any]]:
    """Bodies of all requests that a server has had so far."""
    with urllib.request.urlopen(f"{address}/seen") as response:
        bodies: list[dict[str, Any]] = json.load(response)["seen"]
    return bodies


@pytest.mark.parametrize("name", ["ids", "text", "like vllm"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_answers_equal_those_of_the_model_in_this_process(
    name: str, concurrency: int, servers: dict[str, str], here: Answerer, tokenizer: Any, tmp_path: Path
) -> None:
    # Text is tokenised again: a prompt that the model does not understand may then get another wrong answer.
    asked = suite(64, 120) if name == "text" else suite(64, 120, 250)
    there = evaluated(connected(servers[name], tokenizer, concurrency=concurrency), asked, tmp_path / "there")
    plain = evaluated(here, asked, tmp_path / "here")
    assert list(there) == list(plain) or set(there) == set(plain)
    assert {key: (r.status, r.answer.strip(), r.score) for key, r in there.items()} == {
        key: (r.status, r.answer.strip(), r.score) for key, r in plain.items()
    }
    scores = {result.score for result in there.values()}
    assert scores == ({1.0} if name == "text" else {0.0, 1.0})  # right inside the window, wrong beyond it
    assert not any(result.loss_blocks for result in there.values())


def test_prompts_go_as_ids_with_nothing_that_an_unknown_server_might_not_know(
    servers: dict[str, str], tokenizer: Any
) -> None:
    backend = connected(servers["ids"], tokenizer)
    (prompt, *_) = prompts(suite(90), tokenizer)
    backend.answer_together([prompt.input_ids], 5)
    expected = {"model": MODEL, "prompt": prompt.input_ids, "max_tokens": 5, "temperature": 0}
    assert seen(servers["ids"])[-1] == expected
    assert backend.length_summary() == "prompt lengths as the server counts them: all 1 exact"
    assert backend.identity() == {
        "backend": "openai",
        "server": "other",
        "served_model": MODEL,
        "form": "token ids",
    }
    assert backend.kernels() == []


def test_a_known_server_is_told_to_decode_plainly_and_asked_for_ids(servers: dict[str, str], tokenizer: Any) -> None:
    backend = connected(servers["like vllm"], tokenizer, stop_ids=[3, 1])
    (prompt, *_) = prompts(suite(90), tokenizer)
    (answer,) = backend.answer_together([prompt.input_ids], 5)
    body = seen(servers["like vllm"])[-1]
    assert (body["repetition_penalty"], body["stop_token_ids"], body["return_token_ids"]) == (1.0, [1, 3], True)
    assert len(answer.ids) == 5
    assert (backend.facts.kind, backend.facts.version, backend.facts.context_tokens) == ("vllm", "1.2.3", 512)


def test_text_that_reads_as_another_number_of_tokens_is_recorded(servers: dict[str, str], tokenizer: Any) -> None:
    backend = connected(servers["text"], tokenizer)
    assert backend.form.name == "text"
    ids = prompts(suite(120), tokenizer)[0].input_ids
    num_read = len(tokenizer(tokenizer.decode(ids)).input_ids)
    assert num_read == 119  # the filling line break and the text before it are one token when read together
    (answer,) = backend.answer_together([ids], 3)
    assert answer.facts["server_prompt_tokens"] == num_read  # type: ignore[attr-defined]
    assert "-1" in (backend.length_summary() or "")


def test_a_prompt_beyond_the_servers_context_is_missing_with_its_words_and_the_rest_goes_on(
    servers: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    results = evaluated(connected(servers["short"], tokenizer), suite(64, 120), tmp_path)
    statuses = {length: {r.status for r in results.values() if r.length_tokens == length} for length in (64, 120)}
    assert statuses == {64: {"ok"}, 120: {"out_of_range"}}
    backend = connected(servers["short"], tokenizer)
    with pytest.raises(NoAnswerError, match=f"maximum context length is {CONTEXT}"):
        backend.answer_together([[5] * 200], 7)


def test_one_rejected_prompt_costs_the_others_no_second_request(servers: dict[str, str], tokenizer: Any) -> None:
    backend = connected(servers["short"], tokenizer, concurrency=3)
    before = len(seen(servers["short"]))
    fitting, too_long = prompts(suite(64), tokenizer)[:2], prompts(suite(120), tokenizer)[0]
    group = [fitting[0].input_ids, too_long.input_ids, fitting[1].input_ids]
    with pytest.raises(NoAnswerError):
        backend.answer_together(group, 4)
    assert len(seen(servers["short"])) - before == 3
    alone = [backend.answer_together([group[0]], 4)[0], backend.answer_together([group[2]], 4)[0]]
    with pytest.raises(NoAnswerError):
        backend.answer_together([group[1]], 4)
    assert all(len(answer.ids) >= 4 for answer in alone)
    assert len(seen(servers["short"])) - before == 3


def test_a_server_that_cuts_prompts_is_found_out(servers: dict[str, str], tokenizer: Any) -> None:
    backend = connected(servers["cutting"], tokenizer)
    with pytest.raises(NoAnswerError, match=f"read {CUT_TO} of 90 tokens: it cuts prompts"):
        backend.answer_together([prompts(suite(90), tokenizer)[0].input_ids], 5)


def test_busy_and_failing_servers_are_asked_again(servers: dict[str, str], tokenizer: Any) -> None:
    before = len(seen(servers["flaky"]))
    backend = connected(servers["flaky"], tokenizer)  # its first two replies are 429 and 503
    assert len(seen(servers["flaky"])) - before == 3
    assert backend.answer_together([prompts(suite(64), tokenizer)[0].input_ids], 4)[0].ids


def test_a_server_that_only_fails_is_given_up(servers: dict[str, str], tokenizer: Any) -> None:
    with pytest.raises(ResourceError, match=r"keeps answering with errors; got 'HTTP 500: not now'") as raised:
        connected(servers["broken"], tokenizer)
    assert raised.value.exit_code == 4
    assert len(seen(servers["broken"])) == 3  # one try and two more


def test_what_was_answered_survives_a_server_that_dies_and_the_next_run_asks_for_the_rest(
    servers: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    asked = suite(64, 90)
    with pytest.raises(ResourceError, match="does not answer") as raised:
        evaluated(connected(servers["dying"], tokenizer, concurrency=3), asked, tmp_path)
    assert "saved" in raised.value.sentence()
    finished = {key for key, result in SampleStore(tmp_path, {}, {}).results.items() if result.status == "ok"}
    assert len(finished) == LIVES_FOR - 2  # beside the handshake and the self-check
    before = len(seen(servers["ids"]))
    results = evaluated(connected(servers["ids"], tokenizer), asked, tmp_path)
    assert {result.status for result in results.values()} == {"ok"}
    num_asked = len(seen(servers["ids"])) - before
    assert num_asked == 1 + len(results) - len(finished) + 1  # handshake, the rest, the self-check


def test_the_key_is_sent_and_shown_nowhere(
    servers: dict[str, str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, reason in ((None, "wants an API key"), ("wrong-and-secret", "refuses the API key")):
        with pytest.raises(UsageError, match=reason) as raised:
            connected(servers["key"], tokenizer, key=key)
        assert API_KEY_VARIABLE in raised.value.sentence()
        assert "secret" not in raised.value.sentence()
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    backend = connect(tokenizer, ServerClient(servers["key"]))
    evaluated(backend, suite(64, num_samples=1), tmp_path)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written + str(backend.describe()) + str(backend.identity()) + repr(vars(backend))


def test_a_netrc_file_does_not_replace_the_key(
    servers: dict[str, str], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert connected(servers["key"], tokenizer, key=KEY).facts.model == MODEL


def test_a_wrong_model_name_is_answered_with_what_is_served(servers: dict[str, str], tokenizer: Any) -> None:
    for name in ("like vllm", "ids"):
        with pytest.raises(UsageError, match="does not serve this model") as raised:
            connected(servers[name], tokenizer, model_name="tiny-servd")
        assert f"one of {MODEL}" in raised.value.sentence()
        assert f"Did you mean '{MODEL}'?" in raised.value.sentence()


def test_a_chat_server_gets_the_users_text_and_writes_its_own_template(servers: dict[str, str], tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    asked = suite(90, apply_chat_template=True, answer_prefix=False, num_samples=1)
    backend = connected(servers["chat"], tokenizer)
    assert backend.form.name == "user turn"
    built = prompts(asked, tokenizer)
    answers = backend.answer_together([prompt.input_ids for prompt in built], 5)
    body = seen(servers["chat"])[-1]
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert not message["content"].startswith("User:")
    assert all(len(answer.ids) > 0 for answer in answers)
    assert "90" not in (backend.length_summary() or "90") or backend.length_differences[0] == len(built)
    assert sum(backend.length_differences.values()) == len(built)


def test_a_chat_server_refuses_a_suite_that_begins_the_answer(servers: dict[str, str], tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    backend = connected(servers["chat"], tokenizer)
    for asked in (suite(90), suite(90, apply_chat_template=True)):
        with pytest.raises(UsageError, match="takes nothing but chats") as raised:
            backend.answer_together([prompts(asked, tokenizer)[0].input_ids], 5)
        assert "answer_prefix: false" in raised.value.sentence()


def test_the_self_check_asks_twice(servers: dict[str, str], tokenizer: Any) -> None:
    (prompt, *_) = prompts(suite(64), tokenizer)
    for name, outcome in (("ids", "identical"), ("dice", "different")):
        backend = connected(servers[name], tokenizer)
        (answer,) = backend.answer_together([prompt.input_ids], prompt.max_new_tokens)
        check = backend.self_check(prompt, answer)
        assert check.outcome == outcome
        assert "second answer" in check.summary()


def test_prompts_that_begin_alike_are_answered_as_alone(
    servers: dict[str, str], here: Answerer, tokenizer: Any
) -> None:
    backend = connected(servers["ids"], tokenizer, concurrency=2)
    ids = [prompt.input_ids for prompt in prompts(suite(90), tokenizer)]
    found = dict(backend.answer_sharing(ids, NUM_ANSWER_TOKENS))
    expected = [here.answer(prompt, NUM_ANSWER_TOKENS, measure_loss=False).ids for prompt in ids]
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in expected]
    assert [tokenizer.decode(found[number].ids).strip() for number in range(len(ids))] == texts
    assert backend.work.num_prompt_tokens == sum(map(len, ids))
    assert backend.work.num_answer_tokens == len(ids) * NUM_ANSWER_TOKENS


def test_nobody_there_and_nobody_answering_are_said_at_once(tokenizer: Any) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with pytest.raises(ResourceError, match="connection refused"):
            connected(f"http://127.0.0.1:{port}", tokenizer)
        listening.listen()
        with pytest.raises(ResourceError, match=r"no answer within 0\.2 seconds"):
            connect(tokenizer, client(f"http://127.0.0.1:{port}", timeout_seconds=0.2, num_retries=0))


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1", "https://host/v1"),
        ("https://host/openai/v1/chat/completions", "https://host/openai/v1"),
        ("http://host/v1/completions/", "http://host/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses_may_be_given_as_other_tools_want_them(given: str, root: str) -> None:
    assert api_root(given) == root


@pytest.mark.parametrize(
    "given", ["localhost:8000", "", "ftp://host", "http://", "http://host:port", "http://me:pw@host", "http://host?a=b"]
)
def test_a_wrong_address_is_a_clear_error_without_passwords(given: str) -> None:
    with pytest.raises(UsageError) as raised:
        api_root(given)
    assert "--base-url" in raised.value.sentence()
    assert "pw" not in raised.value.sentence()


def test_no_concurrency_is_refused(servers: dict[str, str], tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="--concurrency"):
        connected(servers["ids"], tokenizer, concurrency=0)


def test_paths_of_the_servers_machine_are_left_out() -> None:
    assert without_folders("/home/somebody/models/tiny.gguf") == "tiny.gguf"
    assert without_folders("C:\\models\\tiny.gguf") == "tiny.gguf"
    assert without_folders("org/model-7B") == "org/model-7B"


def test_errors_of_servers_are_the_users_to_mend() -> None:
    assert issubclass(ResourceError, CtxextError)
    assert not issubclass(NoAnswerError, CtxextError)
