"""What sources give: documents, and the parts in which a source can be read independently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, developer, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class TextDocument:
    """One source text; `origin` names it in messages, without this machine's folders.

    Attributes:
        text: what people read; empty when the source holds token ids alone.
        messages: of a conversation; these, not `text`, are what a model is trained on.
        ids: [N] of a document that was tokenised before.
    """

    origin: str
    text: str
    messages: tuple[Message, ...] | None = None
    ids: npt.NDArray[np.unsignedinteger[Any]] | None = field(default=None, compare=False)


# The position behind a document, from which reading its part goes on, and the document.
Positioned = tuple[int, TextDocument]
Documents = Iterator[Positioned]


@dataclass(frozen=True)
class Part:
    """A piece of a source that can be read alone: one file, several small ones, one shard of a dataset.

    Attributes:
        name: unique within its source, without this machine's folders.
        fingerprint: changes when the content does.
        paths: files or folders, for sources that lie on the disk.
        begin, end: the range of bytes, rows or documents that belongs to this part; no end means to the last.
        endless: generated without end; take what is needed.
    """

    name: str
    fingerprint: str
    paths: tuple[str, ...] = ()
    begin: int = 0
    end: int | None = None
    endless: bool = False
