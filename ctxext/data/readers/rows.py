"""One row of a file or dataset to one document, or the reason why it is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctxext.data.bad_rows import BadRows
from ctxext.data.documents import Message, TextDocument
from ctxext.recipe.data import SourceBlock

ROLES = ("system", "developer", "user", "assistant", "tool")
# The other common form of chat rows (ShareGPT): {"from": "human", "value": "..."}.
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

EMPTY = "no text in it"
EMPTY_FILE = "an empty file"
NUL = "it holds NUL bytes, which no text does"


class _UnusableError(Exception):
    """Why a row is no document: the kind of trouble, what was seen, and what to do."""

    def __init__(self, reason: str, got: str | None = None, hint: str | None = None) -> None:
        self.reason, self.got, self.hint = reason, got, hint
        super().__init__(reason)


def row_document(row: Any, source: SourceBlock, origin: str, where: object, bad: BadRows) -> TextDocument | None:
    """The document in `row`; None when there is none, which `bad` then counts.

    Raises:
        ArtefactError: the row is unusable, and more than the source allows are.
    """
    try:
        if not isinstance(row, Mapping):
            raise _UnusableError("the row is no object with fields", kind_of(row))
        if source.messages_field is not None:
            messages = _messages(_field(row, source.messages_field, "messages_field"))
            return TextDocument(origin, "\n\n".join(message.content for message in messages), messages)
        text = _field(row, source.text_field, "text_field")
        if not isinstance(text, str):
            raise _UnusableError(f"the field '{source.text_field}' holds no text", kind_of(text))
        return text_document(origin, text, where, bad)
    except _UnusableError as error:
        bad.refuse(where, error.reason, got=error.got, hint=error.hint)
    return None


def text_document(origin: str, text: str, where: object, bad: BadRows) -> TextDocument | None:
    """A document of `text`; None when it is empty or no text, which `bad` then counts.

    Raises:
        ArtefactError: it is unusable, and more than the source allows are.
    """
    trouble = _trouble_of(text)
    if trouble is not None:
        bad.refuse(where, trouble)
        return None
    if not text.strip():
        bad.leave_out(where, EMPTY)
        return None
    return TextDocument(origin, text)


def kind_of(value: Any) -> str:
    """A value's kind in the words of JSON, with the value when it is short."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    name = names.get(type(value), type(value).__name__)
    return f"{name} ({value!r})" if isinstance(value, (int, float)) and len(repr(value)) <= 40 else name


def _trouble_of(text: str) -> str | None:
    if "\x00" in text:
        return NUL
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds half of a surrogate pair, which is no character"
    return None


def _field(row: Mapping[str, Any], name: str, setting: str) -> Any:
    if name not in row:
        fields = ", ".join(sorted(str(key) for key in row)) or "none"
        raise _UnusableError(
            f"the row has no field '{name}'", f"fields: {fields[:200]}", f"Name the right field as {setting}."
        )
    return row[name]


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _UnusableError("the messages are no list with turns in it", kind_of(value))
    messages = tuple(_message(turn) for turn in value)
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise _UnusableError("the conversation has no turn of the assistant, so nothing in it would be learned")
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise _UnusableError("a turn is no object with role and content", kind_of(turn))
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if "content" in turn and turn["content"] is not None else turn.get("value")
    if isinstance(role, str):
        role = _OTHER_ROLES.get(role.lower(), role.lower())
    if role not in ROLES:
        raise _UnusableError(
            f"a turn has no known role ({', '.join(ROLES)})", kind_of(role) if role is None else str(role)
        )
    given = content
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        # Silence about calls of tools would teach answers that nothing in the context explains.
        calls = " (calls of tools are not supported)" if turn.get("tool_calls") else ""
        raise _UnusableError(f"a turn holds no text{calls}", kind_of(given))
    trouble = _trouble_of(content)
    if trouble is not None:
        raise _UnusableError(trouble)
    return Message(role, content)


def _joined(pieces: list[Any]) -> str | None:
    """The text of a turn that comes in typed pieces; None when one of them is a picture or the like."""
    texts = [piece.get("text") if isinstance(piece, Mapping) else None for piece in pieces]
    return "".join(str(text) for text in texts) if all(isinstance(text, str) for text in texts) else None
