"""How a prompt of token ids is put to a server: as it is, as text, or as a user's turn that the server frames.

Ids are exact. Text is tokenised again by the server, and a chat server writes its own template around it; what it then
reads may differ from what was asked for by a few tokens, which is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ctxext.errors import UsageError
from ctxext.evaluation.prompt import ChatFrame


class Form(Protocol):
    """One way to ask."""

    @property
    def name(self) -> str:
        """For people, and part of what identifies stored samples."""

    @property
    def path(self) -> str:
        """Of the endpoint, below the API root."""

    @property
    def exact(self) -> bool:
        """Whether the server must read exactly the prompt's tokens."""

    def fields(self, ids: list[int]) -> dict[str, Any]:
        """The part of the request that holds the prompt."""

    def answer(self, choice: Mapping[str, Any]) -> str:
        """The text of a reply's choice."""


@dataclass(frozen=True)
class TokenIds:
    """`/completions` with token ids."""

    name: str = "token ids"
    path: str = "completions"
    exact: bool = True

    def fields(self, ids: list[int]) -> dict[str, Any]:
        return {"prompt": ids}

    def answer(self, choice: Mapping[str, Any]) -> str:
        return str(choice.get("text") or "")


@dataclass(frozen=True)
class PlainText:
    """`/completions` with text.

    Attributes:
        marker: ids that begin every prompt and that the server writes by itself.
    """

    tokenizer: Any
    marker: tuple[int, ...] = ()
    name: str = "text"
    path: str = "completions"
    exact: bool = False

    def fields(self, ids: list[int]) -> dict[str, Any]:
        start = len(self.marker) if tuple(ids[: len(self.marker)]) == self.marker else 0
        return {"prompt": _text(self.tokenizer, ids[start:])}

    def answer(self, choice: Mapping[str, Any]) -> str:
        return str(choice.get("text") or "")


@dataclass(frozen=True)
class UserTurn:
    """`/chat/completions`: the prompt's own frame is taken off, the server writes its template."""

    tokenizer: Any
    name: str = "user turn"
    path: str = "chat/completions"
    exact: bool = False
    frames: dict[bool, ChatFrame] = field(default_factory=dict)

    def fields(self, ids: list[int]) -> dict[str, Any]:
        """The user's text, and whether to think where the template knows how.

        Raises:
            UsageError: the prompt is no user's turn of the tokenizer's chat template, or begins the answer.
        """
        frames = self._frames()
        fitting = [thinking for thinking in (False, True) if _framed(frames[thinking], ids)]
        if not fitting:
            raise UsageError(
                "the server takes nothing but chats, and this suite's prompts are none",
                where="--backend openai",
                hint="Set apply_chat_template: true and answer_prefix: false in the suite.",
            )
        # One template's end may be the end of the other's: the longer frame says more.
        thinking = max(fitting, key=lambda known: len(frames[known].before) + len(frames[known].after))
        frame = frames[thinking]
        text = _text(self.tokenizer, ids[len(frame.before) : len(ids) - len(frame.after)])
        fields: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        if frames[True] != frames[False]:
            fields["chat_template_kwargs"] = {"enable_thinking": thinking}
        return fields

    def answer(self, choice: Mapping[str, Any]) -> str:
        message = choice.get("message") or {}
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        said = str(message.get("content") or "")
        return f"<think>{thoughts}</think>{said}" if thoughts else said

    def _frames(self) -> dict[bool, ChatFrame]:
        if not self.frames:
            self.frames.update({thinking: ChatFrame.of(self.tokenizer, thinking) for thinking in (False, True)})
        return self.frames


def _framed(frame: ChatFrame, ids: list[int]) -> bool:
    end = len(ids) - len(frame.after)
    return len(frame.before) < end and ids[: len(frame.before)] == frame.before and ids[end:] == frame.after


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
