"""An OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve) as a backend.

Prompts are made with the model's own tokenizer, so their lengths are exact, and are sent as token ids where the server
takes them. What a server reads is compared with what was asked: one that cuts prompts, or writes something before them,
would be measured at other lengths than the report says. Losses by position are not measured: servers give
log-probabilities of a prompt only at the price of their prefix cache, most not at all.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from ctxext.data.boundaries import encode_plain
from ctxext.errors import CtxextError, ResourceError, UsageError
from ctxext.evaluation.backend import Answer, NoAnswerError, SelfCheck, Work
from ctxext.evaluation.backends.client import Reply, ServerClient
from ctxext.evaluation.backends.forms import Form
from ctxext.evaluation.backends.kinds import ServerFacts, greedy_fields
from ctxext.evaluation.backends.repeat import compared
from ctxext.evaluation.prompt import Prompt, hash_ids
from ctxext.evaluation.trunk import visiting_order

# A prompt tokenised again may lose or gain a few tokens; a server that reads fewer than this share cuts it.
_LEAST_SHARE = 0.98
_LEAST_TOKENS = 16
# Statuses of a request that is wrong in itself; the next one may be right.
_REJECTED = frozenset({400, 413, 422})


class ServerBackend:
    """Answers of a server; `ctxext.evaluation.backends.connect` makes one.

    Args:
        client: to the server.
        tokenizer: of the model, as in this process.
        form: how prompts are sent.
        model_name: as requests name it.
        facts: what the server says about itself.
        concurrency: requests at a time.
        stop_ids: tokens that end an answer, for servers that take them.
    """

    def __init__(
        self,
        client: ServerClient,
        tokenizer: Any,
        form: Form,
        model_name: str,
        facts: ServerFacts,
        *,
        concurrency: int = 4,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.work = Work()
        self.facts = facts
        self.form = form
        self.length_differences: Counter[int | None] = Counter()
        self._client = client
        self._model_name = model_name
        self._concurrency = concurrency
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="ctxext-server")
        # Outcomes of a group that failed as a whole: its prompts are asked for again one by one.
        self._kept: dict[tuple[str, int], Answer | NoAnswerError] = {}

    def batch_size(self, length_tokens: int) -> int:
        """Requests at a time."""
        return self._concurrency

    def reason_against_sharing(self, longest_tokens: int) -> str | None:
        """None: asking prompts that begin alike one after the other is right everywhere, and quick with a cache."""
        return None

    def kernels(self) -> list[str]:
        """Not known."""
        return []

    def identity(self) -> dict[str, Any]:
        """The served model and how it was asked; not where, and not with which version."""
        return {
            "backend": "openai",
            "server": self.facts.kind,
            "served_model": self.facts.model,
            "form": self.form.name,
        }

    def answer_together(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> list[Answer]:
        """Answers to all prompts, asked at the same time.

        Raises:
            NoAnswerError: the server rejects one, or answered some before it went away; asked again one by one, those
                that have an answer get it without another request.
            ResourceError: the server is gone.
        """
        found = dict(self._outcomes(prompts, range(len(prompts)), max_new_tokens))
        outcomes = [found[number] for number in range(len(prompts))]
        answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        if len(answers) < len(prompts):
            raise self._kept_for_later(prompts, found, max_new_tokens)
        return answers

    def answer_sharing(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> Iterator[tuple[int, Answer]]:
        """Answers as they come, asked in the order in which a prefix cache serves best; raises at the end."""
        failed: dict[int, Answer | NoAnswerError | ResourceError] = {}
        for number, outcome in self._outcomes(prompts, visiting_order(prompts), max_new_tokens):
            if isinstance(outcome, Answer):
                yield number, outcome
            else:
                failed[number] = outcome
        if failed:
            raise self._kept_for_later(prompts, failed, max_new_tokens)

    def self_check(self, prompt: Prompt, answer: Answer) -> SelfCheck:
        """Whether the server says the same when it is asked twice."""
        other = "the same server's second answer"
        try:
            again = self._ask(prompt.input_ids, prompt.max_new_tokens)
        except (NoAnswerError, CtxextError) as error:
            return SelfCheck(prompt.sample.sample_id, "not run", str(error), other=other)
        return compared(prompt.sample.sample_id, answer.ids, again.ids, other=other)

    def describe(self) -> str:
        """One line for people, before the run."""
        version = f" {self.facts.version}" if self.facts.version else ""
        name = "an OpenAI-compatible server" if self.facts.kind == "other" else self.facts.kind
        context = f", context {self.facts.context_tokens:,} tokens" if self.facts.context_tokens else ""
        return (
            f"{name}{version} serves {self.facts.model}{context}; prompts go as {self.form.name}, "
            f"{self._concurrency} at a time"
        )

    def length_summary(self) -> str | None:
        """What is to be said about prompt lengths as the server counted them; None before any answer."""
        total = sum(self.length_differences.values())
        if not total:
            return None
        unknown, same = self.length_differences[None], self.length_differences[0]
        if unknown == total:
            return "the server does not say how many prompt tokens it read: lengths are not checked"
        known = [
            difference for difference, count in self.length_differences.items() if difference is not None and count
        ]
        if same == total - unknown:
            return f"prompt lengths as the server counts them: all {same:,} exact"
        return (
            f"prompt lengths as the server counts them: {same:,} of {total - unknown:,} exact, "
            f"the others {min(d for d in known if d):+d} to {max(d for d in known if d):+d} tokens"
        )

    def close(self) -> None:
        """End the threads; requests under way are not waited for."""
        self._client.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _outcomes(
        self, prompts: Sequence[list[int]], order: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[int, Answer | NoAnswerError | ResourceError]]:
        """Outcomes as they come; an error of the user's is raised at once."""
        waiting: dict[Future[Answer], int] = {}
        for number in order:
            kept = self._kept.pop(_key(prompts[number], max_new_tokens), None)
            if kept is not None:
                yield number, kept
            else:
                waiting[self._pool.submit(self._ask, prompts[number], max_new_tokens)] = number
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    number = waiting.pop(future)
                    error = future.exception()
                    if error is None:
                        yield number, future.result()
                    elif isinstance(error, NoAnswerError | ResourceError):
                        yield number, error
                    else:
                        raise error
        finally:
            for future in waiting:
                future.cancel()

    def _kept_for_later(
        self,
        prompts: Sequence[list[int]],
        found: dict[int, Answer | NoAnswerError | ResourceError],
        max_new_tokens: int,
    ) -> Exception:
        """The error of a group; its other outcomes are kept for when its prompts are asked for one by one."""
        gone = [outcome for outcome in found.values() if isinstance(outcome, ResourceError)]
        if len(gone) == len(found):
            return gone[0]
        # What the server did not live to answer is stored as missing, the next run asks for it; the next group raises.
        settled = {
            number: NoAnswerError(str(outcome), status="no_answer") if isinstance(outcome, ResourceError) else outcome
            for number, outcome in found.items()
        }
        if len(prompts) > 1:
            self._kept |= {_key(prompts[number], max_new_tokens): outcome for number, outcome in settled.items()}
        return next(outcome for outcome in settled.values() if isinstance(outcome, NoAnswerError))

    def _ask(self, ids: list[int], max_new_tokens: int) -> Answer:
        reply = self._client.post(self.form.path, self._body(ids, max_new_tokens))
        if not reply.ok:
            raise self._refusal(reply, len(ids))
        choices = reply.value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise NoAnswerError("the server's reply holds no answer", status="no_answer")
        usage = reply.value.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        facts = self._checked_length(len(ids), usage.get("prompt_tokens"))
        finish = choices[0].get("finish_reason")
        if finish:
            facts["finish_reason"] = str(finish)
        answer_ids = choices[0].get("token_ids")
        if not isinstance(answer_ids, list):
            answer_ids = encode_plain(self.tokenizer, self.form.answer(choices[0]))
        self._count(len(ids), usage, reply.value.get("timings"), len(answer_ids))
        return Answer([int(token) for token in answer_ids], torch.empty(0), facts)

    def _body(self, ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model_name,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            **greedy_fields(self.facts.kind, self._stop_ids),
            **self.form.fields(ids),
        }

    def _refusal(self, reply: Reply, length: int) -> NoAnswerError | CtxextError:
        if reply.status in _REJECTED or reply.says_too_long:
            status = "out_of_range" if reply.says_too_long else "rejected"
            return NoAnswerError(f"the server rejects {length:,} tokens: {reply.words}", status=status)
        return UsageError(
            "the server does not take this request",
            where=f"{self._client.base_url}/{self.form.path}",
            got=f"HTTP {reply.status}: {reply.words}",
        )

    def _checked_length(self, asked: int, read: object) -> dict[str, Any]:
        """Facts of the sample when the server read another number of tokens.

        Raises:
            NoAnswerError: so few that it must have cut the prompt, or others than the ids it was given.
        """
        if not isinstance(read, int):
            with self._lock:
                self.length_differences[None] += 1
            return {}
        if read < asked * _LEAST_SHARE - _LEAST_TOKENS or (self.form.exact and read < asked):
            raise NoAnswerError(f"the server read {read:,} of {asked:,} tokens: it cuts prompts", status="rejected")
        with self._lock:
            self.length_differences[read - asked] += 1
        return {} if read == asked else {"server_prompt_tokens": read}

    def _count(self, asked: int, usage: dict[str, Any], timings: object, num_answer: int) -> None:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if cached is None and isinstance(timings, dict):
            cached = timings.get("cache_n")  # llama.cpp
        with self._lock:
            self.work.num_prompt_tokens += asked
            self.work.num_prefilled += asked - min(int(cached or 0), asked)
            self.work.num_answer_tokens += int(usage.get("completion_tokens") or num_answer)


def _key(ids: list[int], max_new_tokens: int) -> tuple[str, int]:
    return hash_ids(ids), max_new_tokens
