"""Conversations to token ids through the tokenizer's own chat template, with what the assistant said marked.

Only those tokens are learned that the assistant would have to produce: from behind the prompt for its turn up to the
token that ends the turn. Which these are is read off the ids, in one of two ways:

- a template with `{% generation %}` marks says so itself;
- for others, the conversation is rendered up to the prompt of each turn and up to the turn's end. The prompt must be a
  beginning of the whole, as text and as ids, and so must the turn with what was said in it. Where they are not (some
  templates change earlier turns once the conversation goes on), the conversation is refused: in training the model
  would see something else than when it is asked.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from ctxext.data.boundaries import encode_plain
from ctxext.data.documents import Message
from ctxext.errors import ArtefactError, UsageError, first_line

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ConversationError(ArtefactError):
    """This conversation cannot be learned from with this template; others may be fine.

    Attributes:
        reason: the kind of trouble, for counting.
    """

    def __init__(self, reason: str, where: str, got: str | None = None, hint: str | None = None) -> None:
        self.reason = reason
        super().__init__(reason, where=where, got=got, hint=hint)


def render_chat(tokenizer: Any, messages: Sequence[Message], origin: str) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Token ids of a conversation, and which of them the assistant produces.

    Raises:
        UsageError: the tokenizer has no chat template.
        ConversationError: the template does not take this conversation, or its prompts are not beginnings of it.
    """
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None
    if template is None:
        raise UsageError(
            "the tokenizer has no chat template, which conversations need",
            where="data.sources.messages_field",
            hint="Use an instruction model, or text_field with plain text.",
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    whole = _rendered(tokenizer, turns, origin)
    for number, turn in enumerate(turns, start=1):
        # Templates may take reasoning out of turns; nothing else of what was said.
        if turn["content"].strip() not in whole and "</think>" not in turn["content"]:
            raise ConversationError("the chat template leaves out what is said in a turn", f"{origin}, turn {number}")
    if _MARKED.search(template):
        return _by_marks(tokenizer, turns, origin)
    return _by_prompts(tokenizer, turns, whole, origin)


def _by_marks(tokenizer: Any, turns: list[dict[str, str]], origin: str) -> tuple[list[int], npt.NDArray[np.bool_]]:
    rendered = _applied(tokenizer, turns, origin, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = list(rendered["input_ids"]), np.asarray(rendered["assistant_masks"], dtype=bool)
    said = tokenizer.decode(
        [token for token, is_learned in zip(ids, learned, strict=True) if is_learned], skip_special_tokens=True
    )
    if not said.strip():
        raise ConversationError("the chat template marks no text as the assistant's", origin)
    return ids, learned


def _by_prompts(
    tokenizer: Any, turns: list[dict[str, str]], whole: str, origin: str
) -> tuple[list[int], npt.NDArray[np.bool_]]:
    text = _Tokenised(tokenizer, whole, origin)
    learned = np.zeros(len(text.ids), dtype=bool)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt = _rendered(tokenizer, turns[:number], origin, add_generation_prompt=True)
            end_of_turn = text.length_shared_with(_rendered(tokenizer, turns[: number + 1], origin))
            if not whole.startswith(prompt) or turn["content"].strip() not in whole[len(prompt) : end_of_turn]:
                raise _not_a_beginning("text", number, origin)
            begin = text.num_tokens_before(len(prompt), number)
            end = text.num_tokens_before(end_of_turn, number)
            learned[begin : text.last_produced(begin, end)] = True
    return text.ids, learned


class _Tokenised:
    """A rendered conversation as ids, and the places at which its text can be cut between two of them."""

    def __init__(self, tokenizer: Any, text: str, origin: str) -> None:
        self._tokenizer, self._text, self._origin = tokenizer, text, origin
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._ends: list[int] = []
        if getattr(tokenizer, "is_fast", False):
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            self.ids: list[int] = list(encoded.input_ids)
            self._starts = [begin for begin, _ in encoded.offset_mapping]
            self._ends = [end for _, end in encoded.offset_mapping]
        else:
            self.ids = encode_plain(tokenizer, text)
        self._special = special
        self._anchors = [at for at, token in enumerate(self.ids) if token in special] if self._ends else []

    def length_shared_with(self, turn: str) -> int:
        """How many characters of the text are also the beginning of a conversation that ends earlier.

        Some templates end a whole conversation with a token of its own; then it is the ids that both share.
        """
        if self._text.startswith(turn):
            return len(turn)
        shared = next((at for at, pair in enumerate(zip(turn, self._text, strict=False)) if pair[0] != pair[1]), 0)
        place = bisect_right(self._ends, shared)
        return self._ends[place - 1] if place else 0

    def num_tokens_before(self, length: int, turn: int) -> int:
        """How many ids the first `length` characters are; they must be the same ids alone as within the whole.

        Nothing merges across a special token, so comparing from the last one on is comparing from the beginning.
        """
        place = bisect_right(self._anchors, length, key=lambda at: self._ends[at]) - 1
        anchor = self._anchors[place] if place >= 0 else 0
        begin = self._starts[anchor] if place >= 0 else 0
        head = encode_plain(self._tokenizer, self._text[begin:length])
        end = anchor + len(head)
        if self.ids[anchor:end] != head:
            raise _not_a_beginning("token ids", turn, self._origin)
        return end

    def last_produced(self, begin: int, end: int) -> int:
        """`end` without the line break that some templates put behind the token that ends a turn."""
        cut = end
        while cut > begin and self.ids[cut - 1] not in self._special and not self._decoded(cut - 1).strip():
            cut -= 1
        return cut if cut > begin and self.ids[cut - 1] in self._special else end

    def _decoded(self, at: int) -> str:
        text: str = self._tokenizer.decode([self.ids[at]])
        return text


def _rendered(tokenizer: Any, turns: list[dict[str, str]], origin: str, **options: bool) -> str:
    text: str = _applied(tokenizer, turns, origin, tokenize=False, **options)
    return text


def _applied(tokenizer: Any, turns: list[dict[str, str]], origin: str, **options: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except (TemplateError, TypeError, IndexError, KeyError, ValueError) as error:
        raise ConversationError(
            "the chat template does not take this conversation", origin, first_line(error)
        ) from error


def _not_a_beginning(form: str, turn: int, origin: str) -> ConversationError:
    return ConversationError(
        f"with this chat template the prompt for a turn and what is said in it are, as {form}, no beginning of the "
        "whole conversation, so what the assistant says cannot be told from the rest",
        f"{origin}, turn {turn + 1}",
        hint="Use a chat template with {% generation %} marks, or conversations of one turn.",
    )
