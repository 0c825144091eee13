"""YAML to a validated model: every problem at once, each with its line, and `key=value` overrides.

Used for recipes and for suites. The reader follows YAML 1.2's core rules where YAML 1.1 surprises (`1e-4` is a number,
`no` is a word), builds plain values only, and refuses aliases and duplicate keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from ctxext.errors import ArtefactError, RecipeError, UsageError, did_you_mean, unknown_name
from ctxext.files import shipped_directory
from ctxext.recipe.schema import Recipe

ModelT = TypeVar("ModelT", bound=BaseModel)
KeyPath = tuple[str | int, ...]
Check = Callable[[dict[str, Any]], Iterable[tuple[KeyPath, str]]]

MAX_BYTES = 1 << 20


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


@dataclass(frozen=True)
class Document:
    """Plain values of a YAML document and the line of every key path."""

    source: str
    values: dict[str, Any]
    lines: dict[KeyPath, int]

    def where(self, path: KeyPath) -> str:
        """`file:line` of the nearest known ancestor of `path`."""
        for end in range(len(path), -1, -1):
            line = self.lines.get(path[:end])
            if line is not None:
                return f"{self.source}:{line}"
        return self.source


def parse_document(text: str, source: str) -> Document:
    """Parse YAML text into plain values with line numbers.

    Raises:
        RecipeError: not YAML, not a mapping, duplicate keys or aliases.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(source, [f"{source}: the file is larger than 1 MiB, which no recipe is"])
    try:
        loader = _CoreLoader(text)
        try:
            for token in yaml.scan(text, Loader=_CoreLoader):
                if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
                    where = f"{source}:{token.start_mark.line + 1}"
                    raise RecipeError(source, [f"{where}: anchors and aliases are not supported; write the value out"])
            node = loader.get_single_node()
            if node is None:
                raise RecipeError(source, [f"{source}: the file is empty"])
            if not isinstance(node, yaml.MappingNode):
                raise RecipeError(source, [f"{source}:{node.start_mark.line + 1}: expected `key: value` lines"])
            lines: dict[KeyPath, int] = {(): 1}
            problems: list[str] = []
            _collect_lines(node, (), lines, problems, source)
            if problems:
                raise RecipeError(source, problems)
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise RecipeError(source, [f"{where}: not valid YAML ({error.problem or error.context})"]) from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise RecipeError(source, [f"{source}: not valid YAML ({type(error).__name__}: {error})"]) from error
    return Document(source, values, lines)


def _collect_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[str], source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:null":
                problems.append(f"{source}:{line}: a key must be a plain word")
                continue
            key = str(key_node.value)
            key_node.tag = "tag:yaml.org,2002:str"
            if key in seen:
                problems.append(f"{source}:{line}: '{key}' is given twice")
            seen.add(key)
            lines[(*path, key)] = line
            _collect_lines(value_node, (*path, key), lines, problems, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect_lines(item, (*path, index), lines, problems, source)


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document with `a.b.c=value` settings applied; values are read as YAML.

    Raises:
        UsageError: an override without `=` or through something that is not a block.
    """
    values = json.loads(json.dumps(document.values))
    lines = dict(document.lines)
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            raise UsageError("an override has the form key.subkey=value", where="command line", got=override)
        try:
            value = yaml.load(text, Loader=_CoreLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError("the override's value is not valid YAML", where=key, got=text) from error
        block = values
        for part in parts[:-1]:
            following = block.setdefault(part, {})
            if not isinstance(following, dict):
                raise UsageError("an override goes through a value that is not a block", where=key, got=part)
            block = following
        block[parts[-1]] = value
        for end in range(1, len(parts) + 1):
            lines.pop(tuple(parts[:end]), None) if end == len(parts) else None
    return Document(document.source, values, lines)


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
    except (TypeError, ValueError) as error:
        raise RecipeError(document.source, [f"{document.source}: a value is not plain data ({error})"]) from error
    try:
        model = schema.model_validate_json(text)
    except ValidationError as error:
        problems += [_describe(detail, document, schema) for detail in error.errors(include_url=False)]
    for check in checks:
        for path, message in check(document.values):
            problems.append(f"{document.where(path)}: {_dotted(path)}: {message}")
    if problems or model is None:
        raise RecipeError(document.source, list(dict.fromkeys(problems)))
    return model


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _describe(detail: Any, document: Document, schema: type[BaseModel]) -> str:
    path = _without_union_tags(detail["loc"], document.values)
    where = document.where(path)
    name = _dotted(path) or "recipe"
    if detail["type"] == "extra_forbidden":
        accepted = _accepted_keys(schema, detail["loc"][:-1])
        near = did_you_mean(str(path[-1]), accepted)
        hint = f"; did you mean '{near}'?" if near else ""
        return f"{where}: {name}: unknown key{hint} (accepted here: {', '.join(accepted)})"
    if detail["type"] == "missing":
        return f"{where}: {name}: missing"
    if detail["type"] == "union_tag_invalid":
        expected = str(detail["ctx"]["expected_tags"])
        near = did_you_mean(str(detail["ctx"]["tag"]), re.findall(r"'([^']+)'", expected))
        hint = f"; did you mean '{near}'?" if near else ""
        key = f"{name}.{detail['ctx']['discriminator'].strip(chr(39))}"
        return f"{where}: {key}: got '{detail['ctx']['tag']}', expected one of {expected}{hint}"
    message = detail["msg"].removeprefix("Value error, ")
    got = detail.get("input")
    shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool, type(None))) else ""
    if detail["type"] == "literal_error" and isinstance(got, str):
        near = did_you_mean(got, re.findall(r"'([^']+)'", message))
        shown += f"; did you mean '{near}'?" if near else ""
    return f"{where}: {name}: {message}{shown}"


def _without_union_tags(location: KeyPath, values: Any) -> KeyPath:
    """Pydantic puts union tags and branch names into locations; keep the parts that exist in the document."""
    path: list[str | int] = []
    here = values
    for number, part in enumerate(location):
        last = number == len(location) - 1
        if isinstance(here, dict) and (part in here or last):
            path.append(part)
            here = here.get(part) if isinstance(part, str) else None
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
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
                method = candidate.model_fields.get("method")
                if method is not None and part in get_args(method.annotation):
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
        if not path.is_file():
            raise ArtefactError(f"{kind} file not found", where=name)
        return path
    folder = shipped_directory(directory.split("/")[0]).joinpath(*directory.split("/")[1:])
    found = folder / f"{name}.yaml"
    if not found.is_file():
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
    return apply_overrides(Document("command line", values, {}), overrides)


def json_schema(schema: type[BaseModel] = Recipe) -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return TypeAdapter(schema).json_schema()
