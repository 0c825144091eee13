"""Stop tokens of a model that another program runs: as the model's own files say, and never silently others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import byte_tokenizer, save_tiny_model

from ctxext.errors import ArtefactError
from ctxext.evaluation.backends.choice import source_stop_ids
from ctxext.model.load import load_config, resolve_source


def stops(folder: Path) -> set[int]:
    source = resolve_source(str(folder))
    return source_stop_ids(source, load_config(source), byte_tokenizer())


def test_the_generation_config_decides_and_the_models_config_where_there_is_none(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stops(folder) == {7, 9}
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 11}))
    assert stops(folder) == {11}


@pytest.mark.parametrize("text", ["[1]", '{"max_new_tokens": -1}'])
def test_settings_that_make_no_sense_are_refused_with_their_cause(tmp_path: Path, text: str) -> None:
    folder = save_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"could not read the model's generation_config\.json"):
        stops(folder)
