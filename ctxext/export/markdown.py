"""Foreign text inside Markdown: shown as it is, never as markup, HTML or a link."""

from __future__ import annotations

import re


class Markdown(str):
    """Text that is Markdown on purpose; everything else that a template prints is escaped."""


def escape(value: object) -> Markdown:
    """Plain text as Markdown that shows exactly that text, on one line: no markup, HTML, links or invisible marks."""
    if isinstance(value, Markdown):
        return value
    text = _one_line(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$@])", r"\\\1", text)
    return Markdown(text.replace("://", "\\://").replace("www.", "www\\."))


def code(value: object) -> Markdown:
    """A code span, whatever backticks the value holds."""
    text = _one_line(str(value))
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{pad}{text}{pad}{fence}")


def fenced(value: object, language: str = "") -> Markdown:
    """A code block, whatever fences the value holds."""
    text = str(value).rstrip("\n")
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
