"""`ctxext ask`: the prompt to the token, what is refused and in which words, an answer equal to plain `generate`'s."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from real_server import serving
from support import SilentReporter, byte_tokenizer, save_tiny_model, tiny_model

from ctxext.errors import ArtefactError, CtxextError, ResourceError, UsageError
from ctxext.evaluation.backends.choice import backend_choice, source_stop_ids
from ctxext.model.load import load_config, load_tokenizer, resolve_source
from ctxext.pipeline.ask import Asked, AskRequest, ask, ask_prompt
from ctxext.pipeline.documents import Document, read_documents

TEXT = "The gate opens at nine.\nIt closes at five.\n"
QUESTION = "When does it close?"
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights that know 128 positions; every byte is a token."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.2, eos_token_id=None))


@pytest.fixture
def report(tmp_path: Path) -> str:
    path = tmp_path / "report.txt"
    path.write_text(TEXT)
    return str(path)


def asked(model: str, *files: str, stdin: bytes | None = None, **changes: Any) -> tuple[Asked, list[str]]:
    reporter = SilentReporter()
    values = {"question": QUESTION, "max_new_tokens": 12, "dtype": "float32", **changes}
    answer = ask(AskRequest(model, files, **values), reporter, None if stdin is None else io.BytesIO(stdin))
    return answer, reporter.messages


def test_the_answer_is_what_plain_generate_says(model: str, report: str) -> None:
    answer, messages = asked(model, report)
    prompt = f"{TEXT.rstrip()}\n\nQuestion: {QUESTION}\nAnswer:"
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = tiny_model(initializer_range=0.2, eos_token_id=None).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
    )
    assert answer.answer == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert (answer.num_document_tokens, answer.num_prompt_tokens) == (len(TEXT.rstrip()), len(prompt))
    assert (answer.num_answer_tokens, answer.ended, answer.form) == (12, "length", "plain form")
    assert answer.prefill_seconds is not None
    assert answer.prefill_seconds > 0 < answer.answer_seconds
    assert answer.prefill_tokens_per_second == pytest.approx(answer.num_prompt_tokens / answer.prefill_seconds)
    assert answer.peak_bytes is not None
    assert answer.peak_bytes > 1 << 20
    assert any(f"{report}: {len(TEXT.rstrip())} tokens" in line for line in messages)
    assert any("the model reaches 128" in line for line in messages)
    assert any("cut off" in line for line in answer.summary())


def test_the_result_is_json(model: str, report: str) -> None:
    answer, _ = asked(model, report)
    stored = json.loads(json.dumps(answer.as_dict(), allow_nan=False))
    assert stored["files"] == [{"name": report, "num_tokens": len(TEXT.rstrip())}]
    assert stored["prefill_tokens_per_second"] > 0
    assert stored["answer_tokens_per_second"] > 0
    assert stored["backend"] == "transformers"


def test_a_document_beyond_the_models_reach_is_refused_with_advice(model: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 100)
    with pytest.raises(UsageError) as raised:
        asked(model, str(tmp_path / "long.txt"))
    sentence = raised.value.sentence()
    rest = len(f"\n\nQuestion: {QUESTION}\nAnswer:")
    assert f"take {499 + rest + 12} positions (499 + {rest} + 12)" in sentence
    assert "at most 128" in sentence
    assert "--target-length 1024" in sentence
    answer, _ = asked(model, str(tmp_path / "long.txt"), beyond_reach=True)
    assert answer.num_document_tokens == 499


def test_the_last_fitting_length_is_answered(model: str, tmp_path: Path) -> None:
    room = 128 - 12 - len(f"\n\nQuestion: {QUESTION}\nAnswer:")
    (tmp_path / "fits.txt").write_text("x" * room)
    assert asked(model, str(tmp_path / "fits.txt"))[0].num_prompt_tokens == 116
    (tmp_path / "fits.txt").write_text("x" * (room + 1))
    with pytest.raises(UsageError, match="take 129 positions"):
        asked(model, str(tmp_path / "fits.txt"))


def test_the_chat_template_frames_document_and_question(report: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = ask_prompt(tokenizer, [Document("report", TEXT)], QUESTION)
    assert tokenizer.decode(prompt.ids) == f"<user>{TEXT.rstrip()}\n\n{QUESTION}</user><bot>"
    assert prompt.form == "chat template"
    plain = ask_prompt(tokenizer, [Document("report", TEXT)], QUESTION, plain=True)
    assert tokenizer.decode(plain.ids) == f"{TEXT.rstrip()}\n\nQuestion: {QUESTION}\nAnswer:"


def test_special_tokens_in_a_document_are_text() -> None:
    tokenizer = byte_tokenizer()
    document = Document("report", "before <|end|> behind")
    prompt = ask_prompt(tokenizer, [document], "and <|end|>?")
    assert tokenizer.eos_token_id not in prompt.ids
    assert "before <|end|> behind" in tokenizer.decode(prompt.ids)
    assert tokenizer.eos_token_id in tokenizer("before <|end|> behind").input_ids  # it would have been one


def test_several_files_stand_in_order_under_their_names(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    prompt = ask_prompt(tokenizer, [Document("a.txt", "first\n"), Document("b.txt", "second")], "which?")
    assert tokenizer.decode(prompt.ids).startswith("a.txt:\n\nfirst\n\nb.txt:\n\nsecond\n\nQuestion: which?")
    assert prompt.document_tokens == [len("a.txt:\n\nfirst"), len("b.txt:\n\nsecond")]


def test_the_standard_input_is_a_file(model: str) -> None:
    answer, _ = asked(model, "-", stdin=TEXT.encode())
    assert answer.files == [{"name": "standard input", "num_tokens": len(TEXT.rstrip())}]
    with pytest.raises(UsageError, match="read once"):
        asked(model, "-", "-", stdin=TEXT.encode())
    with pytest.raises(ArtefactError, match="standard input: the document is empty"):
        asked(model, "-", stdin=b" \n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the document is empty"),
        (b" \n\t ", "the document is empty"),
        (b"%PDF-1.7 ...", "a PDF; extract its text first"),
        (b"PK\x03\x04....", "a ZIP archive, as .docx"),
        (gzip.compress(b"text"), "compressed with gzip"),
        (b"GGUF....", "model weights"),
        (b"text\x00text", "a binary file"),
        ("Grüße".encode("latin-1"), "not UTF-8 text: byte 0xfc at 2"),
        ("text".encode("utf-16") + b"\x00", "not UTF-16 text"),
    ],
    ids=["empty", "blank", "pdf", "zip", "gzip", "gguf", "binary", "latin-1", "half utf-16"],
)
def test_what_is_no_text_is_said_in_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ArtefactError) as raised:
        read_documents([str(path)])
    assert words in raised.value.sentence()
    assert str(path) in raised.value.sentence()
    assert "\n" not in raised.value.sentence()


def test_encodings_with_a_mark_and_line_ends_of_windows_are_read(tmp_path: Path) -> None:
    for number, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16")):
        path = tmp_path / f"{number}.txt"
        path.write_bytes("Grüße\r\nan alle".encode(encoding))
        assert read_documents([str(path)]) == [Document(str(path), "Grüße\nan alle")]


@pytest.mark.parametrize(
    "names", [["missing.txt"], ["."], ["a\x00b"], ["x" * 5000], []], ids=lambda names: str(names)[:9]
)
def test_files_that_cannot_be_read_are_errors_of_the_users(names: Sequence[str]) -> None:
    with pytest.raises(CtxextError):
        read_documents(names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "  "}, "the question is empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"thinking": True}, "thinking needs a chat template"),
    ],
    ids=["question", "tokens", "thinking"],
)
def test_wrong_requests_are_refused_before_weights_are_loaded(
    model: str, report: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        asked(model, report, **changes)


def test_a_device_map_gives_the_same_answer(model: str, report: str) -> None:
    plain, _ = asked(model, report)
    spread, _ = asked(model, report, backend=backend_choice(device_map="auto"))
    assert spread.answer == plain.answer


def test_a_server_is_asked_with_the_same_prompt(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text("Some words before. The pass key is 48213. Remember it. And some words behind.")
    files, question = [str(path)], "What is the pass key?"
    here, _ = asked("recipes:tiny", *files, question=question)
    with serving() as servers:
        there, messages = asked(
            "recipes:tiny", *files, question=question, backend=backend_choice("openai", base_url=servers["ids"])
        )
        with pytest.raises(ResourceError, match=r"rejects .* maximum context length is 100"):
            asked(
                "recipes:tiny",
                *files,
                question=question,
                max_new_tokens=90,
                beyond_reach=True,
                backend=backend_choice("openai", base_url=servers["short"]),
            )
    assert there.answer == here.answer
    assert there.num_prompt_tokens == here.num_prompt_tokens
    assert there.prefill_seconds is None
    assert there.prefill_tokens_per_second is None
    assert any("all 1 exact" in line for line in messages)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "opnai"}, "Did you mean 'openai'?"),
        ({"name": "openai"}, "--base-url"),
        ({"base_url": "http://localhost"}, "Add --backend openai"),
        ({"name": "vllm", "concurrency": 4}, "Add --backend openai"),
        ({"name": "vllm", "device_map": "auto"}, "--device-map"),
        ({"device_map": "atuo"}, "Did you mean 'auto'?"),
        ({"name": "openai", "base_url": "http://h", "concurrency": 0}, "--concurrency"),
        ({"name": "openai", "base_url": "http://h", "timeout_seconds": 0.0}, "--timeout"),
        ({"name": "openai", "base_url": "http://h", "endpoint": "chats"}, "Did you mean 'chat'?"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_backend_options_that_do_not_fit_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as raised:
        backend_choice(**options)
    assert words in raised.value.sentence()


def test_vllm_that_is_not_installed_is_said_with_what_to_do(model: str, report: str) -> None:
    with pytest.raises(UsageError, match=r"pip install 'ctxext\[vllm\]'"):
        asked(model, report, backend=backend_choice("vllm"))


def test_stop_tokens_are_known_without_loading_the_model() -> None:
    from transformers import AutoModelForCausalLM

    from ctxext.evaluation.answerer import stop_ids

    source = resolve_source("recipes:tiny")
    tokenizer = load_tokenizer(source)
    loaded = AutoModelForCausalLM.from_pretrained(source.location)
    assert source_stop_ids(source, load_config(source), tokenizer) == stop_ids(loaded, tokenizer) != set()
