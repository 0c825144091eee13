"""Token-exact prompts: built from ids, so that a prompt of 12,288 tokens has 12,288 tokens.

Cutting at a sentence by decoding and encoding again changes the length in more than half of all cases; here a needle is
put between two tokens of the haystack, behind the nearest one that ends a sentence or a line.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ctxext.data.boundaries import SentenceEnds, encode_plain, leading_marker
from ctxext.errors import UsageError
from ctxext.evaluation.clusters import NOISE_FACT
from ctxext.evaluation.grid import GridRow
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.scoring import BESIDE, METRICS, NUMBER_MATCH
from ctxext.evaluation.suite import Sample, Suite
from ctxext.evaluation.tasks.base import Draft, Filled, Kit, NoRoomError, Span, Task
from ctxext.files import canonical_json, sha256_bytes

# Stands for the user's text while the chat template is rendered; no template writes it by itself.
_PLACEHOLDER = "CTXEXT0PLACEHOLDER0CTXEXT"
# Llama 3's templates write today's date otherwise, and a prompt must be the same tomorrow.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Prompt:
    """One sample's prompt.

    Attributes:
        answers: what is expected; the metric says whether all or any.
        metric: name of the deciding metric.
        spans: token ranges of everything that was placed, in the order the task names it.
        needle_position: index of the first asked item's first token (of the text's start, or of the place where the
            needle would be, when nothing is placed).
        haystack_sha256: of the haystack's ids; prompts with different ones are independent.
        key: what the question names.
        distractors: wrong answers that stand in the prompt.
        max_new_tokens: how long the answer may get.
        thinking: whether only what follows the model's thoughts is scored.
        facts: what else the task recorded.
    """

    sample: Sample
    input_ids: list[int]
    answers: tuple[str, ...]
    metric: str
    spans: tuple[Span, ...]
    needle_position: int
    haystack_sha256: str
    key: str
    distractors: tuple[str, ...]
    max_new_tokens: int
    thinking: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_sha256(self) -> str:
        """Identifies the prompt: equal hashes mean equal token ids."""
        return hash_ids(self.input_ids)

    @property
    def expected(self) -> str:
        """The expected answers as one text."""
        return " | ".join(self.answers)


def hash_ids(ids: list[int]) -> str:
    """SHA-256 of a list of token ids."""
    return sha256_bytes(b"".join(token.to_bytes(4, "little") for token in ids))


class PromptBuilder:
    """Builds the prompts of a suite for one tokenizer; `suite_builder` makes one from a suite.

    Args:
        tokenizer: a transformers tokenizer.
        reader: of the suite's haystack.
        wording: a key of `WORDINGS`, for a suite of the single needle.
        seed: the suite's seed.
        suite: tasks and form of the prompts; the single needle of `wording` when left out.
    """

    def __init__(
        self, tokenizer: Any, reader: HaystackReader, wording: str, seed: int, suite: Suite | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._suite = suite or _single_needle(wording, seed)
        self._seed = seed
        self._tasks = {task.cell_name: task for task in self._suite.members}
        self._readers: dict[str, HaystackReader] = {}
        self._kit_ends = SentenceEnds(tokenizer)
        self._padding = padding_id(tokenizer)
        self._frame = ChatFrame.of(tokenizer, self._suite.thinking) if self._suite.apply_chat_template else None

    def build(self, sample: Sample) -> Prompt:
        """The prompt of exactly `sample.cell.length_tokens` tokens, a pure function of suite and sample.

        Raises:
            UsageError: the length leaves no room for text, or the haystack is too short.
        """
        task, cell = self._tasks[sample.cell.task], sample.cell
        seed, haystack_seed = _seeds(self._suite, self._seed, task, sample)
        draft = task.draft(random.Random(seed), cell.length_tokens, cell.depth)
        before, after = self._around(task, draft)
        room = cell.length_tokens - len(before) - len(after)
        kit = Kit(self._encode, self._kit_ends, self._haystack(task, haystack_seed), self._padding, seed)
        try:
            body = self._filled(task, draft, room, kit)
        except NoRoomError as error:
            raise UsageError(
                "the length leaves no room for text around the needle",
                where=sample.sample_id,
                got=cell.length_tokens,
                expected=f"at least {cell.length_tokens - room + error.needed} tokens",
            ) from error
        input_ids = [*before, *body.ids, *after]
        assert len(input_ids) == cell.length_tokens
        return Prompt(
            sample=sample,
            input_ids=input_ids,
            answers=draft.answers,
            metric=task.metric_name,
            spans=tuple(span.moved(len(before)) for span in body.spans),
            needle_position=len(before) + body.position,
            haystack_sha256=self._haystack_hash(task, haystack_seed, body, cell.length_tokens),
            key=draft.key,
            distractors=draft.distractors,
            max_new_tokens=task.num_answer_tokens,
            thinking=self._suite.thinking,
            facts=draft.facts | self._text_facts(task, body),
        )

    def _filled(self, task: Task, draft: Draft, room: int, kit: Kit) -> Filled:
        """The body; for one of several questions, the one text of all and as much more as this question leaves."""
        if not draft.questions:
            return draft.body.fill(room, kit)
        all_around = (
            self._num_around(task, replace(draft, question=question, answer_prefix=prefix))
            for question, prefix in draft.questions
        )
        surplus = max(all_around) - self._num_around(task, draft)
        body = draft.body.fill(room - surplus, kit)
        num_hay = len(body.haystack or ())
        return replace(body, ids=[*body.ids, *kit.haystack(num_hay + surplus)[num_hay:]])

    def _num_around(self, task: Task, draft: Draft) -> int:
        return sum(map(len, self._around(task, draft)))

    def _haystack(self, task: Task, seed: str) -> Callable[[int], list[int]]:
        reader = self._reader
        if task.own_haystack is not None and task.own_haystack != self._suite.haystack:
            name = canonical_json(task.model_dump(mode="json")["haystack"])
            if name not in self._readers:
                self._readers[name] = HaystackReader(load_haystack(task.own_haystack), self._encode)
            reader = self._readers[name]
        return lambda num_tokens: reader.tokens(seed, num_tokens)

    def _text_facts(self, task: Task, body: Filled) -> dict[str, Any]:
        """Noise is one text for all samples, which is therefore no cluster (`ctxext.evaluation.clusters`)."""
        noise = body.haystack is not None and (task.own_haystack or self._suite.haystack) == "noise"
        return {NOISE_FACT: "noise"} if noise else {}

    def _haystack_hash(self, task: Task, seed: str, body: Filled, length: int) -> str:
        if body.haystack is None:
            return hash_ids(body.ids)
        if self._suite.haystacks == "shared":
            # Needles of different size leave different room in the one haystack, which has one hash all the same.
            return hash_ids(self._haystack(task, seed)(length))
        return hash_ids(body.haystack)

    def _around(self, task: Task, draft: Draft) -> tuple[list[int], list[int]]:
        """Ids before and behind the body."""
        first = self._suite.question_first if task.question_first is None else task.question_first
        prefix = draft.answer_prefix if self._suite.answer_prefix else ""
        intro = [self._encode(draft.intro)] if draft.intro else []
        if first:
            intro += [self._encode(draft.question.removeprefix("\n")), self._encode("\n")]
        if self._frame is not None:
            question = [] if first else [self._encode(draft.question)]
            answer = [self._encode(prefix.lstrip())] if prefix.strip() else []
            return _joined([self._frame.before, *intro]), _joined([*question, self._frame.after, *answer])
        # Question and answer prefix are one text here, as the model reads them: encoded together.
        return _joined([leading_marker(self._tokenizer), *intro]), self._encode(
            prefix if first else draft.question + prefix
        )

    def _encode(self, text: str) -> list[int]:
        return encode_plain(self._tokenizer, text)


def draft_of(suite: Suite, sample: Sample) -> Draft:
    """What a sample asks and expects, as texts; needs neither haystack nor tokenizer.

    Raises:
        KeyError: the suite has no such task.
        UsageError: the task has no sample of this length.
    """
    task = suite.member(sample.cell.task)
    seed, _ = _seeds(suite, suite.seed, task, sample)
    return task.draft(random.Random(seed), sample.cell.length_tokens, sample.cell.depth)


def _seeds(suite: Suite, suite_seed: int, task: Task, sample: Sample) -> tuple[str, str]:
    """Roots of the sample's own randomness and of its haystack's."""
    root, cell = f"{suite_seed}/{task.variant}", sample.cell
    if suite.haystacks == "own" and not task.one_text:
        own = f"{root}/{sample.sample_id}"
        return own, f"{own}/haystack"
    own = f"{root}/{cell.task}/{cell.length_tokens}/{sample.index}"
    if suite.haystacks != "shared":
        return own, f"{own}/haystack"
    return own, f"{suite_seed}/{cell.length_tokens}/haystack"


def suite_builder(suite: Suite, tokenizer: Any) -> PromptBuilder:
    """The builder of a suite's prompts.

    Raises:
        CtxextError: the haystack cannot be read, or the tokenizer has no chat template where one is asked for.
    """
    reader = HaystackReader(load_haystack(suite.haystack), lambda text: encode_plain(tokenizer, text))
    return PromptBuilder(tokenizer, reader, suite.wording, suite.seed, suite)


def prompt_identity(suite: Suite) -> dict[str, Any]:
    """What of a suite determines the answers. The grid does not: a wider grid reuses the samples it shares."""
    plain = {"haystack_sha256": load_haystack(suite.haystack).sha256, "seed": suite.seed}
    form = suite.model_dump(mode="json", include={"haystacks", "question_first", "answer_prefix"})
    chat = suite.model_dump(mode="json", include={"apply_chat_template", "thinking"})
    if suite.tasks is None:
        return {
            "wording": suite.wording,
            "haystack": suite.model_dump(mode="json")["haystack"],
            **plain,
            "max_new_tokens": suite.max_new_tokens,
            "metric": NUMBER_MATCH,
            **form,
            **chat,
        }
    return {
        "tasks": {task.cell_name: _task_identity(task) for task in suite.tasks},
        "haystack": suite.model_dump(mode="json")["haystack"],
        **plain,
        **form,
        **chat,
    }


def _task_identity(task: Task) -> dict[str, Any]:
    own = None if task.own_haystack is None else load_haystack(task.own_haystack)
    return {
        **task.model_dump(mode="json", exclude={"grid", "name"}, exclude_defaults=True),
        "task": task.task_name,
        "max_new_tokens": task.num_answer_tokens,
        "metric": [METRICS[name].versioned for name in (task.metric_name, *BESIDE[task.metric_name])],
        "files": task.fingerprints(),
        "haystack_sha256": own.sha256 if own else None,
    }


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes before and behind the user's text, as ids."""

    before: list[int]
    after: list[int]

    @staticmethod
    def of(tokenizer: Any, thinking: bool) -> ChatFrame:
        """Render the template once, with thinking switched on or off where it knows how.

        Raises:
            UsageError: no template, or one that changes the user's text.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the tokenizer has no chat template",
                where="apply_chat_template",
                hint="Base models are asked with apply_chat_template: false.",
            )
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACEHOLDER}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
            date_string=_DATE,
        )
        before, found, after = rendered.partition(_PLACEHOLDER)
        if not found or _PLACEHOLDER in after:
            raise UsageError("the chat template does not show the user's text once", where="apply_chat_template")
        return ChatFrame(*(encode_plain(tokenizer, text) if text else [] for text in (before, after)))


def padding_id(tokenizer: Any) -> int:
    """The id that fills what no whole unit fits into: a line break, or a full stop where there is none."""
    for text in ("\n", "."):
        ids = encode_plain(tokenizer, text)
        if ids and str(tokenizer.decode(ids[-1:])).strip(" ") == text:
            return ids[-1]
    return encode_plain(tokenizer, " a")[-1]


def _joined(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def _single_needle(wording: str, seed: int) -> Suite:
    grid = [GridRow(length=32, depths=[0.0], samples=1)]
    return Suite.model_validate({"description": "", "wording": wording, "seed": seed, "grid": grid})
