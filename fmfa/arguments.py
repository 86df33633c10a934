"""Parameters on a command line: `-p NAME VALUE`, `-f FILE` and `--help-parameters`, the same for every command."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fmfa.errors import ConfigError
from fmfa.parameters import PROJECT, Parameter


def add_parameter_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options `-p`, `-f` and `--help-parameters`."""
    parser.add_argument("-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("-f", dest="file", help="YAML or JSON file of parameters; -p goes before it")
    parser.add_argument("--help-parameters", action="store_true", help="list the parameters")


def given_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The values of a parsed command line, not converted: the file's, with those of `-p` in front.

    Raises:
        ConfigError: the file cannot be read or holds no mapping.
    """
    return _from_file(options.file) | dict(options.pairs)


def print_parameters(parameters: Iterable[Parameter]) -> None:
    """Print one line `name: type = default  # help` a parameter, and where paths start."""
    for parameter in parameters:
        print(f"{parameter.name}: {parameter.type.__name__} = {parameter.default!r}  # {parameter.help}")
    print("# A relative path that you give starts where you are; ~ is your home folder.")


def notebook_command(record: Mapping[str, Any]) -> str:
    """Write the command that runs a notebook, to be pasted into a shell in the project's folder.

    Args:
        record: `notebook`, `output` and `given` (the parameters) as in the record of `fmfa.runner.run_notebook`; values
            in its `parameters`, if there, replace the given ones.
    """
    resolved = record.get("parameters") or {}
    given = {name: resolved.get(name, value) for name, value in record["given"].items()}
    python = in_project(sys.executable)
    words = ["python" if os.path.isabs(python) else python, "-m", "fmfa.runner"]
    words += [in_project(record["notebook"]), in_project(record["output"])]
    return shlex.join([*words, *(word for name, value in given.items() for word in ("-p", name, in_project(value)))])


def in_project(value: Any) -> str:
    """Write a parameter as text; absolute paths within the project become relative to it, also those of a list."""
    if isinstance(value, list):
        return json.dumps([in_project(item) if isinstance(item, str) else item for item in value])
    text = str(value)
    inside = os.path.isabs(text) and Path(os.path.normpath(text)).is_relative_to(PROJECT)
    return os.path.relpath(text, PROJECT) if inside else text


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read parameters from {path}: {error}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected lines `name: value`")
    return values or {}
