"""`ctxext ask`: long documents, one question, the answer, and what it took. The check everybody does by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import torch

from ctxext.data.boundaries import encode_plain, leading_marker
from ctxext.errors import ResourceError, UnsupportedModelError, UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.backend import Backend, NoAnswerError
from ctxext.evaluation.backends.choice import BackendChoice, open_backend, source_stop_ids
from ctxext.evaluation.prompt import ChatFrame
from ctxext.evaluation.scoring import degenerate_kind, final_answer
from ctxext.files import format_bytes
from ctxext.model.load import choose_device, choose_dtype, load_tokenizer
from ctxext.model.peaks import peak_resident_bytes
from ctxext.model.placement import placement
from ctxext.pipeline.arms import ArmSpec, OpenedArm, open_arm
from ctxext.pipeline.documents import Document, read_documents
from ctxext.pipeline.reporter import Reporter
from ctxext.rope.verify import verify_positions

# The plain form for models without a chat template; where such a model goes on with the next question, its answer ends.
_PLAIN_QUESTION = "\n\nQuestion: {question}\nAnswer:"
_NEXT_QUESTION = "\nQuestion:"


@dataclass(frozen=True)
class AskRequest:
    """What `ctxext ask` was asked.

    Attributes:
        files: text files, `-` for the standard input.
        thinking: let a model that can think aloud do so.
        plain: the completion form although there is a chat template.
        beyond_reach: ask although it takes more positions than the model has.
    """

    model: str
    files: Sequence[str]
    question: str
    max_new_tokens: int = 256
    thinking: bool = False
    plain: bool = False
    beyond_reach: bool = False
    dtype: str = "auto"
    revision: str | None = None
    backend: BackendChoice = field(default_factory=BackendChoice)


@dataclass(frozen=True)
class AskPrompt:
    """The prompt as ids, and how many of them are each document's."""

    ids: list[int]
    document_tokens: list[int]
    form: str


@dataclass(frozen=True)
class Asked:
    """An answer and what it took.

    Attributes:
        ended: `stop` when the model ended its answer, `length` when the answer's tokens ran out.
        degenerate: `empty` or `repeating` when the answer is none.
        prefill_seconds: until the first answer token is known; None where only the whole is seen (a server).
        answer_seconds: of the answer tokens behind the first, or of everything.
        peak_bytes: of this process (of the GPU when there is one); None where it is not known.
    """

    model: str
    question: str
    answer: str
    thoughts: str
    files: list[dict[str, Any]]
    form: str
    num_document_tokens: int
    num_prompt_tokens: int
    num_answer_tokens: int
    reach: int
    ended: str
    degenerate: str | None
    prefill_seconds: float | None
    answer_seconds: float
    peak_bytes: int | None
    backend: str
    device: str
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        speeds = {
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "answer_tokens_per_second": self.answer_tokens_per_second,
        }
        return {**asdict(self), **{name: None if value is None else round(value, 2) for name, value in speeds.items()}}

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """How quickly the prompt was read."""
        return self.num_prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def answer_tokens_per_second(self) -> float | None:
        """How quickly the answer was written."""
        if self.prefill_seconds is None or self.num_answer_tokens < 2 or not self.answer_seconds:
            return None
        return (self.num_answer_tokens - 1) / self.answer_seconds

    def summary(self) -> list[str]:
        """Lines for people, below the answer."""
        took = []
        if self.prefill_seconds is None:
            took.append(f"{self.num_prompt_tokens:,} tokens read and {self.num_answer_tokens:,} written in ")
            took[0] += f"{self.answer_seconds:.1f} s"
        else:
            speed = self.prefill_tokens_per_second or 0.0
            took.append(f"{self.num_prompt_tokens:,} tokens read in {self.prefill_seconds:.1f} s ({speed:,.0f}/s)")
            written = self.answer_tokens_per_second
            took.append(f"{self.num_answer_tokens:,} written" + (f" ({written:,.1f}/s)" if written else ""))
        if self.peak_bytes:
            took.append(f"peak memory {format_bytes(self.peak_bytes)}")
        lines = [", ".join(took)]
        if self.ended == "length":
            lines.append("the answer is cut off: give more with --max-new-tokens")
        if self.degenerate == "repeating":
            lines.append("the answer repeats itself, as models do beyond the positions they know")
        elif self.degenerate == "empty":
            lines.append("the model answered nothing")
        return lines


def ask(request: AskRequest, reporter: Reporter, stdin: BinaryIO | None = None) -> Asked:
    """Ask one question about documents.

    Raises:
        CtxextError: a document that is no text, a model that is missing, more positions than the model has.
    """
    if not request.question.strip():
        raise UsageError("the question is empty", where="QUESTION")
    if request.max_new_tokens < 1:
        raise UsageError("an answer needs a token", where="--max-new-tokens", got=request.max_new_tokens)
    documents = read_documents(request.files, stdin)
    arm = open_arm(ArmSpec("base"), model=request.model, revision=request.revision)
    tokenizer = load_tokenizer(arm.source)
    prompt = ask_prompt(tokenizer, documents, request.question, thinking=request.thinking, plain=request.plain)
    needed = len(prompt.ids) + request.max_new_tokens
    for document, count in zip(documents, prompt.document_tokens, strict=True):
        reporter.info(f"{document.name}: {count:,} tokens")
    reporter.info(
        f"with question, {prompt.form} and up to {request.max_new_tokens:,} answer tokens {needed:,} positions; "
        f"the model reaches {arm.reach:,}"
    )
    if needed > arm.reach and not request.beyond_reach:
        raise _too_long(request, prompt, needed, arm.reach)
    if request.backend.loads_here:
        return _asked_here(request, documents, prompt, arm, tokenizer, reporter)
    return _asked_elsewhere(request, documents, prompt, arm, tokenizer, reporter)


def ask_prompt(
    tokenizer: Any, documents: Sequence[Document], question: str, *, thinking: bool = False, plain: bool = False
) -> AskPrompt:
    """The prompt: documents, then the question, in the chat template where there is one.

    What looks like a special token in a document is text.
    """
    titles = [f"{document.name}:\n\n" if len(documents) > 1 else "" for document in documents]
    texts = [
        _encode_text(tokenizer, f"{title}{document.text.rstrip()}")
        for title, document in zip(titles, documents, strict=True)
    ]
    between = encode_plain(tokenizer, "\n\n")
    body = [token for number, ids in enumerate(texts) for token in ([*between, *ids] if number else ids)]
    counts = [len(ids) for ids in texts]
    asked = question.strip()
    if getattr(tokenizer, "chat_template", None) and not plain:
        frame = ChatFrame.of(tokenizer, thinking)
        ids = [*frame.before, *body, *_encode_text(tokenizer, f"\n\n{asked}"), *frame.after]
        return AskPrompt(ids, counts, "chat template")
    if thinking:
        raise UsageError("thinking needs a chat template", where="--thinking")
    ids = [*leading_marker(tokenizer), *body, *_encode_text(tokenizer, _PLAIN_QUESTION.format(question=asked))]
    return AskPrompt(ids, counts, "plain form")


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)


def _too_long(request: AskRequest, prompt: AskPrompt, needed: int, reach: int) -> UsageError:
    rest = len(prompt.ids) - sum(prompt.document_tokens)
    target = reach
    while target < needed:
        target *= 2
    return UsageError(
        f"document, question and answer take {needed:,} positions "
        f"({sum(prompt.document_tokens):,} + {rest:,} + {request.max_new_tokens:,})",
        where=request.model,
        expected=f"at most {reach:,}, which this model reaches",
        hint=f"Extend it: ctxext extend {request.model} --target-length {target}. Or see it fail with --beyond-reach.",
    )


def _asked_here(
    request: AskRequest,
    documents: Sequence[Document],
    prompt: AskPrompt,
    arm: OpenedArm,
    tokenizer: Any,
    reporter: Reporter,
) -> Asked:
    device = choose_device()
    model = arm.load(dtype=choose_dtype(request.dtype, device), device=device, device_map=request.backend.device_map)
    try:
        reporter.info(verify_positions(model, arm.config).summary())
    except UnsupportedModelError as error:  # asking needs no RoPE; a RoPE that differs from its config is an error
        reporter.info(f"positions not verified: {error}")
    if spread := placement(model):
        reporter.info(spread)
    answerer = Answerer(model, tokenizer)
    started = time.perf_counter()
    with reporter.progress("reading") as show, _first_token_clock(model, len(prompt.ids), show) as clock:
        try:
            answer = answerer.answer(prompt.ids, request.max_new_tokens, measure_loss=False)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory with {len(prompt.ids):,} tokens",
                where=request.model,
                hint="Try --dtype bfloat16, a shorter document, or --device-map auto.",
            ) from error
    finished = time.perf_counter()
    return _result(
        request,
        documents,
        prompt,
        arm,
        tokenizer,
        answer_ids=answer.ids,
        stops=answerer.stop_ids,
        prefill_seconds=clock() - started,
        answer_seconds=finished - clock(),
        peak_bytes=peak_resident_bytes(),
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


@contextmanager
def _first_token_clock(model: Any, num_tokens: int, show: Callable[[int, int], None]) -> Iterator[Callable[[], float]]:
    """Yields a function for the moment at which the first answer token was computed; shows how far the reading is.

    The output head runs for answer tokens only, so its first call ends the prefill.
    """
    moments: list[float] = []
    read = 0

    def chunk_read(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        nonlocal read
        read += int(keywords["input_ids"].shape[1])
        show(min(read, num_tokens), num_tokens)

    def head_ran(module: Any, arguments: Any, output: torch.Tensor) -> None:
        if not moments:
            if output.is_cuda:
                torch.cuda.synchronize(output.device)
            moments.append(time.perf_counter())

    handles = [
        model.get_decoder().register_forward_hook(chunk_read, with_kwargs=True),
        model.get_output_embeddings().register_forward_hook(head_ran),
    ]
    try:
        yield lambda: moments[0]
    finally:
        for handle in handles:
            handle.remove()


def _asked_elsewhere(
    request: AskRequest,
    documents: Sequence[Document],
    prompt: AskPrompt,
    arm: OpenedArm,
    tokenizer: Any,
    reporter: Reporter,
) -> Asked:
    if arm.adapter is not None:
        raise UsageError(
            "an adapter is merged in this process only",
            where=f"--backend {request.backend.name}",
            hint="Merge it with `ctxext merge` and ask the merged checkpoint.",
        )
    dtype = choose_dtype(request.dtype, choose_device())
    backend: Backend = open_backend(
        request.backend,
        arm.source,
        arm.config,
        tokenizer,
        dtype=dtype,
        max_length_tokens=len(prompt.ids) + request.max_new_tokens,
        report=reporter.info,
    )
    started = time.perf_counter()
    try:
        (answer,) = backend.answer_together([prompt.ids], request.max_new_tokens, measure_loss=False)
    except NoAnswerError as error:
        raise ResourceError(error.reason, where=request.model) from error
    summary = getattr(backend, "length_summary", lambda: None)()
    if summary:
        reporter.info(summary)
    stops = source_stop_ids(arm.source, arm.config, tokenizer)
    here = request.backend.name == "vllm"
    return _result(
        request,
        documents,
        prompt,
        arm,
        tokenizer,
        answer_ids=answer.ids,
        stops=stops,
        prefill_seconds=None,
        answer_seconds=time.perf_counter() - started,
        peak_bytes=peak_resident_bytes() if here else None,
        device="here" if here else "server",
        dtype=str(dtype).removeprefix("torch.") if here else "unknown",
        finish_reason=getattr(answer, "facts", {}).get("finish_reason"),
    )


def _result(
    request: AskRequest,
    documents: Sequence[Document],
    prompt: AskPrompt,
    arm: OpenedArm,
    tokenizer: Any,
    *,
    answer_ids: list[int],
    stops: set[int],
    finish_reason: str | None = None,
    prefill_seconds: float | None,
    answer_seconds: float,
    **machine: Any,
) -> Asked:
    text = str(tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()
    stopped = bool(answer_ids) and answer_ids[-1] in stops
    if prompt.form == "plain form" and _NEXT_QUESTION in text:
        text, stopped = text.partition(_NEXT_QUESTION)[0].strip(), True
    said = final_answer(text).strip() if request.thinking else text
    return Asked(
        model=arm.source.name,
        question=request.question.strip(),
        answer=said,
        thoughts=text.removesuffix(said).strip() if request.thinking else "",
        files=[
            {"name": document.name, "num_tokens": count}
            for document, count in zip(documents, prompt.document_tokens, strict=True)
        ],
        form=prompt.form,
        num_document_tokens=sum(prompt.document_tokens),
        num_prompt_tokens=len(prompt.ids),
        num_answer_tokens=len(answer_ids),
        reach=arm.reach,
        ended=finish_reason or ("stop" if stopped else "length"),
        degenerate=degenerate_kind(text, answer_ids),
        prefill_seconds=None if prefill_seconds is None else round(prefill_seconds, 3),
        answer_seconds=round(answer_seconds, 3),
        backend=request.backend.name,
        **machine,
    )
