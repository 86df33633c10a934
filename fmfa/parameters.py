"""The parameters cell of a notebook: what it declares, and values converted and checked against it."""

import ast
import io
import math
import os
import re
import tokenize
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import nbformat
import yaml

from fmfa.errors import ConfigError

PROJECT = Path(__file__).parents[1]
FOLDERS = ("root", "run", "runs", "folder", "results", "tuning", "away")
"""Parameters that are paths."""
FILES = ("weights", "text_weights", "backbone", "vocabulary")
"""Parameters that are paths or names of something that is fetched."""

PLAIN_TYPES = {kind.__name__: kind for kind in (str, int, float, bool, list)}

Config = TypeVar("Config")


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = literal  # help` of a parameters cell."""

    name: str
    type: type
    default: str | int | float | bool | list
    help: str


def notebook_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """Parameters that a notebook declares in its one cell tagged `parameters`; none without such a cell.

    Raises:
        ConfigError: the file is missing or no notebook, several cells are tagged, or a line is not of the
            form that `read_parameters` asks for.
    """
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except FileNotFoundError:
        raise ConfigError(f"{notebook}: no such notebook") from None
    except Exception as error:  # nbformat lets JSON, schema and attribute errors through
        raise ConfigError(f"{notebook} is not a readable notebook: {error}") from error
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise ConfigError(f"{notebook} has {len(tagged)} cells tagged 'parameters'; keep one")
    try:
        return read_parameters(tagged[0]) if tagged else {}
    except ConfigError as error:
        raise ConfigError(f"{notebook}, parameters cell: {error}") from None


def read_parameters(source: str) -> dict[str, Parameter]:
    """Parse the source of a parameters cell: lines `name: type = literal  # help` and comments, no more.

    Types are str, int, float, bool and list (of those), because papermill neither sees nor converts
    anything else.

    Raises:
        ConfigError: a statement of another form, a default of another type, a name twice, no help comment.
    """
    try:
        body = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as error:
        raise ConfigError(f"not valid Python ({error})") from None
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, Parameter] = {}
    for node in body:
        parameter = _read_line(node, comments.get(node.end_lineno, "").lstrip("# ").rstrip())
        if parameter.name in found:
            raise ConfigError(f"{parameter.name} is declared twice")
        found[parameter.name] = parameter
    return found


def convert_value(parameter: Parameter, value: Any) -> str | int | float | bool | list:
    """Convert a value to a parameter's declared type, without guessing.

    Text (from a command line, or YAML's `1e-5`) is read as the declared type: booleans as `true` or
    `false`, lists as YAML (`[1, 2]`). Other values must have the type already; an int is taken for a float.
    Elements of a list are converted to the type of the default's first element, where there is one.

    Paths (`FOLDERS`, and of `FILES` what is there) come out absolute: `~` is the user's home, a relative path starts in
    this process' working folder. A file of the project keeps its path within it, so that records are the same anywhere.

    Raises:
        ConfigError: the value does not have the declared type and is no text of it, is not finite, or holds half a
            surrogate pair (as a shell gives bytes that are not UTF-8), which no record can take.
    """
    kind = parameter.type
    if type(value) is str and kind is not str:
        value = _from_text(kind, value, parameter)
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise _mismatch(parameter, value) from None
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _mismatch(parameter, value)
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise ConfigError(f"{parameter.name} is {value!r}, which is not valid Unicode: {parameter.help}")
    if kind is list and parameter.default:
        element = Parameter(f"{parameter.name}[]", type(parameter.default[0]), "", parameter.help)
        value = [convert_value(element, item) for item in value]
    return _absolute(parameter.name, value)


def resolve_parameters(declared: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """The complete parameters of a run: converted `given` values, defaults for the others.
    Raises:
        ConfigError: a name that is not declared (the valid ones are listed), or see `convert_value`.
    """
    for name in given:
        if name not in declared:
            near = get_close_matches(str(name), declared, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"unknown parameter {name!r}; {hint}valid are {', '.join(declared) or 'none'}")
    return {
        name: convert_value(parameter, given[name]) if name in given else parameter.default
        for name, parameter in declared.items()
    }


def check_parameters(
    config_type: type[Config], namespace: Mapping[str, Any], *, beside: tuple[str, ...] = ()
) -> Config:
    """Build a frozen dataclass from a notebook's parameters, right after the parameters cell.

    `config = check_parameters(TrainConfig, globals())` takes what the cell last declared (found in IPython's
    `In`, so a name misspelt in the cell is an error and not a silently unused value) and the present values.
    Fields that the cell leaves out keep the dataclass' defaults. The dataclass checks ranges itself.

    Args:
        config_type: dataclass whose fields have plain types.
        namespace: the notebook's `globals()`.
        beside: parameters of the cell that are not fields of the dataclass.

    Raises:
        ConfigError: no parameters cell was run; cell and dataclass disagree on a name or a type; a value
            has another type than declared; or the dataclass refuses.
    """
    declared = _last_declared(namespace)
    known = {field.name: field for field in fields(config_type)}
    values = {}
    for name, parameter in declared.items():
        if name in beside:
            continue
        if name not in known:
            raise ConfigError(f"the parameters cell has {name!r}, {config_type.__name__} has no such field")
        expected = getattr(known[name].type, "__name__", known[name].type)
        if expected != parameter.type.__name__:
            found = f"{name} is {parameter.type.__name__} in the parameters cell"
            raise ConfigError(f"{found}, {expected} in {config_type.__name__}")
        value = namespace[name]
        if type(value) is str and parameter.type is not str:
            raise _mismatch(parameter, value)
        values[name] = convert_value(parameter, value)
    required = (n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"the parameters cell lacks {', '.join(missing)}")
    return config_type(**values)


def _absolute(name: str, value: Any) -> Any:
    if type(value) is list:
        return [_absolute(name, item) for item in value]
    if name not in (*FOLDERS, *FILES) or not value or type(value) is not str:
        return value
    path = os.path.expanduser(value)
    if name in FILES:
        there = os.path.isfile(path) or (os.sep in path and os.path.isdir(path))
        if not there or os.path.realpath(path) == str(PROJECT / path):
            return path
    return os.path.abspath(path)


def _read_line(node: ast.stmt, help_text: str) -> Parameter:
    line = ast.unparse(node)
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
        raise ConfigError(f"{line!r} is not of the form `name: type = literal  # help`")
    kind = PLAIN_TYPES.get(ast.unparse(node.annotation))
    if kind is None:
        raise ConfigError(f"{line!r} has no plain type ({', '.join(PLAIN_TYPES)})")
    try:
        default = ast.literal_eval(node.value)
    except ValueError:
        raise ConfigError(f"{line!r} has an expression for a default; expected a literal") from None
    if type(default) is not kind:
        raise ConfigError(f"{line!r} has a default of type {type(default).__name__}")
    if not help_text:
        raise ConfigError(f"{line!r} has no help comment on its (last) line")
    return Parameter(node.target.id, kind, default, help_text)


def _from_text(kind: type, text: str, parameter: Parameter) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return yaml.safe_load(text) if kind is list else kind(text)
    except (ValueError, KeyError, yaml.YAMLError):
        raise _mismatch(parameter, text) from None


def _mismatch(parameter: Parameter, value: Any) -> ConfigError:
    wanted = {bool: "true or false", float: "a finite float"}.get(parameter.type, parameter.type.__name__)
    found = f"{parameter.name} is {value!r} ({type(value).__name__})"
    return ConfigError(f"{found}, expected {wanted}: {parameter.help}")


def _last_declared(namespace: Mapping[str, Any]) -> dict[str, Parameter]:
    for source in reversed(namespace.get("In", [])):
        try:
            if declared := read_parameters(source):
                return declared
        except ConfigError:
            continue  # a cell of another kind
    # nbval runs cells without history, so that `In` stays empty; the types of the declared names remain.
    if annotations := namespace.get("__annotations__"):
        return {name: Parameter(name, kind, namespace[name], "") for name, kind in annotations.items()}
    raise ConfigError("no parameters cell was run in this notebook: run it first (`name: type = literal  # help`)")
