"""YAML to a validated model: every problem at once, each with its line, and `key=value` overrides.

Used for recipes and for suites. The reader follows YAML 1.2's core rules where YAML 1.1 surprises (`1e-4` is a number,
`no` is a word), builds plain values only, and refuses aliases, tags and duplicate keys.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from ctxext.errors import ArtefactError, RecipeError, UsageError, did_you_mean, unknown_name
from ctxext.files import shipped_directory
from ctxext.recipe.schema import Recipe
from ctxext.rope.methods import BROKEN_METHODS

ModelT = TypeVar("ModelT", bound=BaseModel)
KeyPath = tuple[str | int, ...]
Check = Callable[[dict[str, Any]], Iterable[tuple[KeyPath, str]]]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema."""


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
):
    _CoreLoader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # Decimal only: YAML 1.1 reads 010 as eight.
    digits = loader.construct_scalar(node).replace("_", "")
    if len(digits) > 30:
        raise yaml.constructor.ConstructorError(None, None, "integer with too many digits", node.start_mark)
    return int(digits)


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which YAML 1.1 or 1.2 would read as something else."""


_PlainDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_CoreLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_CoreLoader.yaml_implicit_resolvers}
}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Other styles fold line breaks, of which Unicode has five.
    style = '"' if re.search("[\n\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _represent_text)


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as text that `parse_document` reads back unchanged."""
    text: str = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text


# No file name, no model and no JSON can hold these.
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Document:
    """Plain values of a YAML document, and where every key path was written (`file:line` or the command line)."""

    source: str
    values: dict[str, Any]
    places: dict[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """The place of the nearest known ancestor of `path`."""
        for end in range(len(path), -1, -1):
            place = self.places.get(path[:end])
            if place is not None:
                return place
        return self.source


def parse_document(text: str, source: str) -> Document:
    """Parse YAML text into plain values with line numbers.

    Raises:
        RecipeError: not YAML, not a mapping, duplicate keys, aliases or tags.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(source, [f"{source}: the file is larger than 1 MiB, which no recipe is"])
    try:
        values, lines = _read_yaml(text)
    except _UnreadableError as error:
        raise RecipeError(source, [f"{_place(source, line)}: {message}" for line, message in error.problems]) from error
    if values is None:
        raise RecipeError(source, [f"{source}: the file is empty"])
    if not isinstance(values, dict):
        raise RecipeError(source, [f"{_place(source, lines[()])}: expected `key: value` lines"])
    return Document(
        source, values, {(): f"{source}:1"} | {path: _place(source, n) for path, n in lines.items() if path}
    )


def _place(source: str, line: int | None) -> str:
    return f"{source}:{line}" if line else source


class _UnreadableError(Exception):
    """Text that is not the plain YAML of a recipe, with the line of each problem where it is known."""

    def __init__(self, problems: list[tuple[int | None, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(message for _, message in problems))


def _read_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Plain values (None when empty) and the line of every key path."""
    try:
        loader = _CoreLoader(text)
        try:
            problems: list[tuple[int | None, str]] = list(_unsupported_tokens(text))
            if problems:
                raise _UnreadableError(problems)
            node = loader.get_single_node()
            if node is None:
                return None, {}
            lines: dict[KeyPath, int] = {(): node.start_mark.line + 1}
            _collect_lines(node, (), lines, problems)
            if problems:
                raise _UnreadableError(problems)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise _UnreadableError([(line, f"not valid YAML ({error.problem or error.context})")]) from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise _UnreadableError([(None, f"not valid YAML ({type(error).__name__}: {error})")]) from error


def _unsupported_tokens(text: str) -> Iterator[tuple[int, str]]:
    depth = 0
    for token in yaml.scan(text, Loader=_CoreLoader):
        line = token.start_mark.line + 1
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
            yield line, "anchors and aliases are not supported; write the value out"
        elif isinstance(token, yaml.TagToken):
            yield line, "tags are not supported; a value's form says its type"
        elif isinstance(token, _OPENING):
            depth += 1
        elif isinstance(token, _CLOSING):
            depth -= 1
        if depth > MAX_DEPTH:  # the time of yaml grows with its square
            raise _UnreadableError([(line, f"nested more than {MAX_DEPTH} levels deep, which no recipe is")])


def _collect_lines(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[tuple[int | None, str]]
) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:null":
                problems.append((line, "a key must be a plain word"))
                continue
            key = str(key_node.value)
            key_node.tag = "tag:yaml.org,2002:str"
            if key in seen:
                problems.append((line, f"'{key}' is given twice"))
            seen.add(key)
            lines[(*path, key)] = line
            _collect_lines(key_node, (*path, key), lines, problems)
            _collect_lines(value_node, (*path, key), lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect_lines(item, (*path, index), lines, problems)
    elif _UNUSABLE.search(node.value):
        problems.append(
            (node.start_mark.line + 1, "the text holds a character that no text can hold (NUL or half a pair)")
        )


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document with `a.b.c=value` settings applied; values are read as YAML.

    Raises:
        UsageError: an override without `=`, of an unreadable value, or through something that is not a block.
    """
    values = copy.deepcopy(document.values)
    places = dict(document.places)
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = tuple(key.strip().split("."))
        if not separator or not all(parts) or _UNUSABLE.search(key):
            raise UsageError("an override has the form key.subkey=value", where=_COMMAND_LINE, got=override)
        try:
            value, _ = _read_yaml(text)
        except _UnreadableError as error:
            raise UsageError(f"the override's value is {error}", where=key, got=text) from error
        block = values
        for end, part in enumerate(parts[:-1], start=1):
            if part not in block:
                places[parts[:end]] = _COMMAND_LINE
            following = block.setdefault(part, {})
            if not isinstance(following, dict):
                raise UsageError("an override goes through a value that is not a block", where=key, got=part)
            block = following
        block[parts[-1]] = value
        places = {path: place for path, place in places.items() if path[: len(parts)] != parts}
        places[parts] = _COMMAND_LINE
    return Document(document.source, values, places)


def validate_document(document: Document, schema: type[ModelT], checks: Sequence[Check] = ()) -> ModelT:
    """Validate plain values against `schema` and run `checks`; report everything that is wrong together.

    Args:
        checks: functions of the plain values that yield `(key path, message)`; they run even when the schema fails.

    Raises:
        RecipeError: with one line a problem.
    """
    problems: list[str] = []
    model: ModelT | None = None
    try:
        text = json.dumps(document.values)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(document.source, [f"{document.source}: a value is not plain data ({error})"]) from error
    try:
        model = schema.model_validate_json(text)
    except ValidationError as error:
        problems += _describe_all(error.errors(include_url=False), document, schema)
    for check in checks:
        for path, message in check(document.values):
            problems.append(f"{document.where(path)}: {_dotted(path)}: {message}")
    if problems or model is None:
        raise RecipeError(document.source, list(dict.fromkeys(problems)))
    return model


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _describe_all(details: Sequence[Any], document: Document, schema: type[BaseModel]) -> list[str]:
    """One line a mistake: pydantic reports every branch of a union, of which the user meant at most one."""
    by_path: dict[KeyPath, list[str]] = {}
    paths = [_without_union_tags(detail, document.values) for detail in details]
    for path, detail in zip(paths, details, strict=True):
        wrong_branch = detail["type"].endswith(("_type", "literal_error"))
        if not (wrong_branch and any(len(other) > len(path) and other[: len(path)] == path for other in paths)):
            by_path.setdefault(path, []).append(_message(path, detail, schema))
    return [
        f"{document.where(path)}: {_dotted(path) or 'recipe'}: {'; or '.join(dict.fromkeys(messages))}"
        for path, messages in by_path.items()
    ]


def _message(path: KeyPath, detail: Any, schema: type[BaseModel]) -> str:
    kind, got = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        accepted = _accepted_keys(schema, detail["loc"][:-1])
        return f"unknown key{_suggestion(str(path[-1]), accepted)} (accepted here: {', '.join(accepted)})"
    if kind in ("missing", "union_tag_not_found"):
        return "missing"
    if kind == "union_tag_invalid":
        tag, expected = str(detail["ctx"]["tag"]), str(detail["ctx"]["expected_tags"])
        if tag in BROKEN_METHODS:
            return f"the RoPE method '{tag}' of another distribution cannot be used ({BROKEN_METHODS[tag]})"
        return f"got '{_shortened(tag)}', expected one of {expected}{_suggestion(tag, _quoted(expected))}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    suggestion = _suggestion(got, _quoted(message)) if kind == "literal_error" and isinstance(got, str) else ""
    if isinstance(got, (str, int, float, bool, type(None))):
        message += f" (got {_shortened(repr(got))}){suggestion}"
    return message


def _suggestion(word: str, choices: Iterable[str]) -> str:
    near = did_you_mean(word, choices)
    return f"; did you mean '{near}'?" if near else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']+)'", text)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without_union_tags(detail: Any, values: Any) -> KeyPath:
    """The key path of a problem: pydantic puts union tags and branch names into locations, which no document has."""
    path: list[str | int] = []
    here = values
    location: KeyPath = detail["loc"]
    for number, part in enumerate(location):
        absent = detail["type"] == "missing" and number == len(location) - 1
        if isinstance(here, dict) and (part in here or absent):
            path.append(part)
            here = here.get(part) if isinstance(part, str) else None
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(detail["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _accepted_keys(schema: type[BaseModel], location: KeyPath) -> list[str]:
    candidates: list[type[BaseModel]] = [schema]
    for part in location:
        following: list[type[BaseModel]] = []
        for candidate in candidates:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                following += _block_types(field.annotation)
            elif isinstance(part, int):
                following.append(candidate)
            else:
                # A union's tag: narrow to the branch that has it as the value of its discriminator.
                tags = [candidate.model_fields[name] for name in ("method", "task") if name in candidate.model_fields]
                if any(part in get_args(tag.annotation) for tag in tags):
                    following.append(candidate)
        candidates = following or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _block_types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for argument in get_args(annotation) for block in _block_types(argument)]


def find_shipped(name: str, directory: str, kind: str) -> Path:
    """The file of a shipped recipe or suite, by name; an existing path is returned as it is.

    Raises:
        ArtefactError: the path does not exist.
        UsageError: no shipped file has that name, with a suggestion.
    """
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or len(path.parts) > 1:
        if not os.path.isfile(name):  # Path.is_file raises for names that are too long
            raise ArtefactError(f"{kind} file not found", where=name)
        return path
    folder = shipped_directory(directory.split("/")[0]).joinpath(*directory.split("/")[1:])
    found = folder / f"{name}.yaml"
    if not os.path.isfile(found):
        raise unknown_name(kind, name, shipped_names(directory))
    return found


def shipped_names(directory: str) -> list[str]:
    """Names of the shipped recipes (`recipes`) or suites (`evals/suites`)."""
    folder = shipped_directory(directory.split("/")[0]).joinpath(*directory.split("/")[1:])
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_document(path: Path) -> Document:
    """Read and parse a YAML file.

    Raises:
        ArtefactError: unreadable or not UTF-8.
        RecipeError: not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"could not read the file ({error})", where=str(path)) from error
    return parse_document(text, str(path))


def load_recipe(name: str, overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> Recipe:
    """Load a shipped recipe by name or a recipe file by path.

    Raises:
        RecipeError: everything that is wrong with it, with line numbers.
        UsageError, ArtefactError: no such recipe, unreadable file, malformed override.
    """
    document = read_document(find_shipped(name, "recipes", "recipe"))
    return validate_document(apply_overrides(document, overrides), Recipe, checks)


def recipe_for_model(source: str, target_length: int, overrides: Sequence[str] = (), method: str = "yarn") -> Recipe:
    """A recipe of defaults for a model named on the command line."""
    return validate_document(default_document(source, target_length, overrides, method), Recipe)


def default_document(source: str, target_length: int, overrides: Sequence[str], method: str) -> Document:
    """The document behind `ctxext extend MODEL --target-length N`."""
    values: dict[str, Any] = {"model": {"source": source}, "rope": {"method": method}, "target_length": target_length}
    return apply_overrides(Document(_COMMAND_LINE, values, {}), overrides)


def json_schema(schema: type[BaseModel] = Recipe) -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return TypeAdapter(schema).json_schema()
