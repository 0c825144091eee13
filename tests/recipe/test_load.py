"""A recipe file is read as its author meant it, or refused with every problem, its line and what to write instead."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ctxext.errors import ArtefactError, RecipeError, UsageError, exit_code_of
from ctxext.evaluation.suite import Suite, load_suite
from ctxext.files import shipped_directory
from ctxext.recipe.load import (
    Document,
    apply_overrides,
    find_shipped,
    json_schema,
    load_recipe,
    parse_document,
    read_document,
    recipe_for_model,
    shipped_names,
    to_yaml,
    validate_document,
)
from ctxext.recipe.schema import Recipe

MINIMAL = """\
model:
  source: some/model
target_length: 4096
"""

SHIPPED_RECIPES = sorted(shipped_directory("recipes").glob("*.yaml"))
SHIPPED_SUITES = sorted(shipped_directory("evals").joinpath("suites").rglob("*.yaml"))


def values_of(text: str) -> dict[str, Any]:
    return parse_document(text, "r.yaml").values


def problems_of(text: str, *overrides: str) -> list[str]:
    """Every problem of a recipe's text; fails when there is none."""
    with pytest.raises(RecipeError) as caught:
        validate_document(apply_overrides(parse_document(text, "r.yaml"), overrides), Recipe)
    assert exit_code_of(caught.value) == 2
    return caught.value.problems


def recipe_of(text: str, *overrides: str) -> Recipe:
    return validate_document(apply_overrides(parse_document(text, "r.yaml"), overrides), Recipe)


@pytest.mark.parametrize("path", SHIPPED_RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert validate_document(Document("again", recipe.model_dump(mode="json"), {}), Recipe) == recipe


@pytest.mark.parametrize("path", SHIPPED_SUITES, ids=lambda path: path.stem)
def test_every_shipped_suite_loads(path: Path) -> None:
    suite = load_suite(str(path))
    assert validate_document(Document("again", suite.model_dump(mode="json"), {}), Suite) == suite


def test_the_shipped_files_are_found_by_name() -> None:
    # What the two tests above covered; fewer would mean that a folder was not seen.
    assert len(SHIPPED_RECIPES) >= 1
    assert len(SHIPPED_SUITES) >= 4
    for name in shipped_names("recipes"):
        assert find_shipped(name, "recipes", "recipe") in SHIPPED_RECIPES
    for name in shipped_names("evals/suites"):
        assert find_shipped(name, "evals/suites", "suite") in SHIPPED_SUITES


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"unknown recipe.*Did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(UsageError, match=r"unknown suite.*Did you mean 'quick"):
        load_suite("quik")


@pytest.mark.parametrize("name", ["no/such.yaml", "a" * 5000 + ".yaml", "nul\0.yaml", "half\ud800pair.yaml"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(ArtefactError, match="not found"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["", "a" * 5000, "nul\0", "half\ud800pair"])
def test_impossible_names_are_unknown_names(name: str) -> None:
    with pytest.raises(UsageError, match="unknown recipe"):
        load_recipe(name)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: {source: caf\xe9}\n")
    with pytest.raises(ArtefactError, match="could not read"):
        read_document(path)


SCALARS: dict[str, Any] = {
    "1e-4": 1e-4,
    "5E3": 5e3,
    "2.": 2.0,
    ".5": 0.5,
    "-1.5e+2": -150.0,
    ".inf": math.inf,
    "-.inf": -math.inf,
    "010": 10,
    "0": 0,
    "-7": -7,
    "16_384": 16384,
    "no": "no",
    "off": "off",
    "yes": "yes",
    "on": "on",
    "y": "y",
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "1:30": "1:30",
    "2024-01-01": "2024-01-01",
    "0x10": "0x10",
    "0o10": "0o10",
    "1e": "1e",
    "'1e-4'": "1e-4",
    "'010'": "010",
    "=": "=",
    "<<": "<<",
}


@pytest.mark.parametrize(("text", "expected"), SCALARS.items())
def test_scalars_mean_what_they_look_like(text: str, expected: Any) -> None:
    value = values_of(f"key: {text}\n")["key"]
    assert value == expected
    assert type(value) is type(expected)


def test_not_a_number_is_read_as_such() -> None:
    assert math.isnan(values_of("key: .nan\n")["key"])


AWKWARD_TEXT = (
    """7e10 08 1e5 1e-4 010 0x10 no true null ~ 1:30 = << - ' " !x &x *x #a %x @x 2024-01-01 .inf 1_0.""".split()
)


@pytest.mark.parametrize(
    "text", [*AWKWARD_TEXT, "", " a ", "a: b", "a\nb", "a\r\nb", "a\x85b", "a\u2028b", "\ufeffa", "é中🙂"]
)
def test_written_text_comes_back_as_text(text: str) -> None:
    values = {"key": text, "list": [text, {"inner": text}]}
    assert values_of(to_yaml(values)) == values


def test_keys_are_words_whatever_they_look_like() -> None:
    assert values_of("010: a\nno: b\n1e3: c\ntrue: d\n<<: e\n") == {
        "010": "a",
        "no": "b",
        "1e3": "c",
        "true": "d",
        "<<": "e",
    }


NOT_PLAIN: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["r.yaml: the file is empty"]),
    "comments alone": ("# nothing\n", ["r.yaml: the file is empty"]),
    "null": ("~\n", ["r.yaml: the file is empty"]),
    "a list": ("\n- a\n- b\n", ["r.yaml:2: expected `key: value` lines"]),
    "a word": ("hello\n", ["r.yaml:1: expected `key: value` lines"]),
    "duplicate keys": ("a: 1\nb:\n  c: 1\n  c: 2\na: 2\n", ["r.yaml:4: 'c' is given", "r.yaml:5: 'a' is given"]),
    "duplicate keys in other forms": ("a: 1\n'a': 2\n", ["r.yaml:2: 'a' is given twice"]),
    "an alias": ("a: &x 1\nb: *x\n", ["r.yaml:1: anchors and", "r.yaml:2: anchors and"]),
    "a loop": ("a: &x [*x]\n", ["r.yaml:1: anchors and", "r.yaml:1: anchors and"]),
    "a list as key": ("? [a, b]\n: 1\n", ["r.yaml:1: a key must be a plain word"]),
    "a block as key": ("? {a: b}\n: 1\n", ["r.yaml:1: a key must be a plain word"]),
    "null as key": ("a: 1\n~: 1\n", ["r.yaml:2: a key must be a plain word"]),
    "python objects": ("a: 1\nb: !!python/object/apply:os.system [ls]\n", ["r.yaml:2: tags are not supported"]),
    "dates by tag": ("a: !!timestamp 2024-01-01\n", ["r.yaml:1: tags are not supported"]),
    "impossible tags": ("a: !!bool maybe\nb: !!timestamp x\n", ["r.yaml:1: tags", "r.yaml:2: tags"]),
    "sets": ("a: !!set {x, y}\n", ["r.yaml:1: tags are not supported"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["r.yaml:2: not valid YAML"]),
    "a tab": ("a:\n\tb: 1\n", ["r.yaml:2: not valid YAML"]),
    "an open bracket": ("a: [1, 2\n", ["r.yaml:2: not valid YAML"]),
    "a control character": ("a: \x00\n", ["r.yaml: not valid YAML"]),
    "an escaped NUL": ('a: 1\nb: "x\\0"\n', ["r.yaml:2: the text holds a character"]),
    "half a surrogate pair": ('a: [1, "\\ud800"]\n', ["r.yaml:1: the text holds a character"]),
    "half a pair in a key": ('"\\udfff": 1\n', ["r.yaml:1: the text holds a character"]),
    "endless digits": ("a: 1\nb: " + "9" * 5000 + "\n", ["r.yaml:2: not valid YAML (integer with too many digits)"]),
    "deep nesting": ("a: " + "[" * 500_000 + "]" * 500_000, ["r.yaml:1: nested more than 32 levels deep"]),
    "too large": ("a: '" + "x" * (1 << 20) + "'", ["r.yaml: the file is larger than 1 MiB"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_what_is_not_a_plain_mapping_is_refused_with_its_line(text: str, expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_document(text, "r.yaml")
    assert len(caught.value.problems) == len(expected)
    for problem, start in zip(caught.value.problems, expected, strict=True):
        assert problem.startswith(start)


def test_a_typo_in_a_key_gets_line_and_suggestion() -> None:
    (problem,) = problems_of(MINIMAL + "train:\n  steps: 5\n  learning_rat: 1e-4\n")
    assert problem.startswith(
        "r.yaml:6: train.learning_rat: unknown key; did you mean 'learning_rate'? (accepted here: "
    )
    assert "warmup" in problem


@pytest.mark.parametrize(
    ("block", "start"),
    [
        ("rope:\n  method: yran\n", "r.yaml:5: rope.method: got 'yran', expected one of"),
        (
            "rope:\n  method: yarn\n  beta_fsat: 32\n",
            "r.yaml:6: rope.beta_fsat: unknown key; did you mean 'beta_fast'?",
        ),
        ("data:\n  windows: {mode: full-lenght}\n", "r.yaml:5: data.windows.mode: "),
        ("data:\n  sources:\n    - kind: text\n      pathes: [a]\n", "r.yaml:7: data.sources.0.pathes: unknown key"),
        ("evaluaton: {}\n", "r.yaml:4: evaluaton: unknown key; did you mean 'evaluation'?"),
    ],
)
def test_typos_get_the_line_of_the_typo_and_a_suggestion(block: str, start: str) -> None:
    problem = problems_of(MINIMAL + block)[0]
    assert problem.startswith(start)
    assert "did you mean" in problem


def test_only_the_chosen_methods_keys_are_suggested() -> None:
    (problem,) = problems_of(MINIMAL + "rope:\n  method: linear\n  beta_fast: 32\n")
    assert problem == "r.yaml:6: rope.beta_fast: unknown key (accepted here: factor, method)"


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_of(
        "model:\n  source: ''\n  dtype: float8\n"
        "rope:\n  method: yarn\n  beta_fast: 1\n  beta_slow: 2\n"
        "target_length: -1\n"
        "data:\n  windows: {mode: skip-wise}\n  facts: {share: 1.5, style: record}\n"
        "lora: {rank: 0, ranks: 1}\n"
        "train:\n  steps: 10.5\n  learning_rate: .nan\n  trackers: [wanbd]\n  activation_checkpointing: maybe\n"
        "typo: 1\n"
    )
    lines = [
        "r.yaml:2: model.source: ",
        "r.yaml:3: model.dtype: ",
        "r.yaml:4: rope: beta_fast (1) must be greater than beta_slow (2)",
        "r.yaml:8: target_length: ",
        "r.yaml:10: data.windows: ",
        "r.yaml:11: data.facts.share: ",
        "r.yaml:11: data.facts.style: ",
        "r.yaml:12: lora.rank: ",
        "r.yaml:12: lora.ranks: unknown key; did you mean 'rank'?",
        "r.yaml:14: train.steps: ",
        "r.yaml:15: train.learning_rate: ",
        "r.yaml:16: train.trackers.0: ",
        "r.yaml:17: train.activation_checkpointing: ",
        "r.yaml:18: typo: unknown key",
    ]
    assert len(problems) == len(lines)
    for problem, start in zip(sorted(problems), sorted(lines), strict=True):
        assert problem.startswith(start)


def test_the_message_counts_and_lists_the_problems() -> None:
    with pytest.raises(RecipeError) as caught:
        validate_document(parse_document("target_length: 0\n", "r.yaml"), Recipe)
    assert str(caught.value).splitlines() == [
        "2 problems in r.yaml:",
        "  r.yaml:1: model: missing",
        "  r.yaml:1: target_length: Input should be greater than 0 (got 0)",
    ]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("rope: {factor: 2}\n", "r.yaml:4: rope.method: missing"),
        ("rope: yarn\n", "r.yaml:4: rope: "),
        ("lora: {targets: [1, 2]}\n", "r.yaml:4: lora.targets.0: "),
        ("lora:\n", "r.yaml:4: lora: "),
    ],
)
def test_what_has_the_wrong_form_is_named(block: str, problem: str) -> None:
    assert problems_of(MINIMAL + block)[0].startswith(problem)


def test_a_union_counts_as_one_mistake() -> None:
    (problem,) = problems_of(MINIMAL + "train: {activation_checkpointing: maybe}\n")
    assert "'auto'" in problem
    assert "; or " in problem


def test_long_values_are_not_repeated_in_full() -> None:
    (problem,) = problems_of(MINIMAL + f"output_dir: {{}}\nmodel2: {'x' * 9000}\n")[1:]
    assert len(problem) < 400
    (problem,) = problems_of(MINIMAL + f"evaluation: {{before: {'x' * 9000}}}\n")
    assert len(problem) < 400


def test_overrides_reach_into_blocks_lists_and_null() -> None:
    text = MINIMAL + "train: {steps: 5}\ndata:\n  facts: {share: 0.5}\n"
    recipe = recipe_of(
        text,
        "train.steps=7",
        "lora.targets=[q_proj, v_proj]",
        "data.facts=null",
        "rope.method=linear",
        "output_dir=a=b",
    )
    assert recipe.train.steps == 7
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert recipe.data.facts is None
    assert recipe.rope.method == "linear"
    assert recipe.output_dir == "a=b"
    assert recipe_of(text, "train={steps: 9}").train.steps == 9
    assert recipe_of(text, "train.steps=7", "train.steps=8").train.steps == 8
    assert recipe_of(text, "train.learning_rate=1e-3").train.learning_rate == 1e-3
    assert recipe_of(text, "model.description=").model.description is None


def test_overrides_leave_the_document_alone() -> None:
    document = parse_document(MINIMAL + "train: {steps: 5}\n", "r.yaml")
    apply_overrides(document, ["train.steps=7", "train.warmup=0.02"])
    assert document.values["train"] == {"steps": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "key.subkey=value"),
        ("=5", "key.subkey=value"),
        ("train..steps=5", "key.subkey=value"),
        (".=5", "key.subkey=value"),
        ("half\ud800=5", "key.subkey=value"),
        ("nul\0=5", "key.subkey=value"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps=&a [*a]", "anchors and aliases"),
        ("train.steps=!!bool maybe", "tags are not supported"),
        ("train.steps=!!timestamp x", "tags are not supported"),
        ("train={steps: 1, steps: 2}", "'steps' is given twice"),
        ("train.steps=" + "9" * 5000, "too many digits"),
        ("train.steps=" + "[" * 500_000, "nested more than"),
        ("target_length.deeper=5", "not a block"),
        ("model.source.deeper=5", "not a block"),
    ],
)
def test_malformed_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_overrides(parse_document(MINIMAL, "r.yaml"), [override])


def test_problems_of_overrides_do_not_blame_the_file() -> None:
    text = MINIMAL + "train:\n  steps: 5\ndata:\n  facts: {share: 0.5}\n"
    (problem,) = problems_of(text, "train.steps=0")
    assert problem.startswith("command line: train.steps: ")
    (problem,) = problems_of(text, "data.facts={share: 2}")
    assert problem.startswith("command line: data.facts.share: ")
    (problem,) = problems_of(text, "evaluation.suit=quick")
    assert problem.startswith("command line: evaluation.suit: unknown key; did you mean 'suite'?")
    (problem,) = problems_of(text + "lora: {rank: 0}\n", "train.steps=7")
    assert problem.startswith("r.yaml:8: lora.rank: ")


def test_a_recipe_for_a_model_has_defaults_and_takes_overrides() -> None:
    recipe = recipe_for_model("some/model", 8192, ["train.steps=3"], "linear")
    assert (recipe.model.source, recipe.target_length) == ("some/model", 8192)
    assert (recipe.train.steps, recipe.rope.method) == (3, "linear")
    with pytest.raises(RecipeError, match=r"command line: train\.steps"):
        recipe_for_model("some/model", 8192, ["train.steps=x"])


def test_checks_run_beside_a_failing_schema() -> None:
    with pytest.raises(RecipeError) as caught:
        validate_document(
            parse_document("target_length: 0\n", "r.yaml"),
            Recipe,
            [lambda values: [(("target_length",), "from a check")]],
        )
    assert len(caught.value.problems) == 3
    assert caught.value.problems[2] == "r.yaml:1: target_length: from a check"


def test_the_json_schema_names_every_block() -> None:
    assert set(json_schema()["properties"]) == set(Recipe.model_fields)
