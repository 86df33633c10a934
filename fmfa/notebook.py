"""Notebooks with checked parameters, executed by papermill; a record is left even on failure.

`python -m fmfa.notebook NOTEBOOK OUTPUT -p name value -f parameters.yml`
"""

import argparse
import ast
import io
import json
import math
import os
import re
import shlex
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

import fmfa.errors
from fmfa.errors import ConfigError
from fmfa.files import PROJECT, said_plainly, whole_file
from fmfa.simpedes.generate import SCALES

KERNEL = "python3"
QUIET_KERNEL = "--IPKernelApp.log_level=ERROR"  # not one warning a notebook about its connection to this machine
# A kernel ends with a killed runner by itself, but not while it starts.
BOUND_KERNEL = "--IPKernelApp.exec_lines=__import__('fmfa.processes').processes.end_with({})"
START_TIMEOUT = 120  # seconds; importing torch on a busy machine is slow
FOLDERS = ("root", "run", "runs", "folder", "results", "tuning", "away")
"""Parameters that are paths."""
FILES = ("weights", "text_weights", "backbone", "vocabulary")
"""Parameters that are paths or names of something that is fetched."""
PLAIN_TYPES = {kind.__name__: kind for kind in (str, int, float, bool, list)}
Config = TypeVar("Config")
_SPLITS = ("train", "val", "test")


def status_path(output: str | Path) -> Path:
    """Where the status record of an executed notebook lies: `name.status.json` beside `name.ipynb`."""
    return Path(output).with_suffix(".status.json")


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout: int | None = None,
    html: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Execute a notebook from its own folder with the kernel `python3`.

    Beside `output` lie afterwards, on failure too, the record (`status_path`) and an HTML page. The record
    is there from the start with status "running", so that a killed run shows. A kernel that does not start
    is tried once more; a cell that fails is not. With bad parameters nothing is made or changed.

    Args:
        notebook: the notebook to run; it is not changed.
        output: where the executed notebook goes (`.ipynb`); folders are made. Kept on failure, up to and
            including the cell that failed.
        parameters: values for the cell tagged `parameters`; see `convert_value`. Relative paths
            among them start in this process' working folder; those of the defaults in the notebook's folder.
        timeout: seconds that a single cell may take; None for no limit.
        html: export the executed notebook as HTML.
        progress: show papermill's progress bar, and let the notebook show the package's.

    Returns:
        The record: notebook, output, html, status ("finished"), error (None), started, finished (UTC),
        given (the parameters as given), parameters (all of them, resolved), kernel_starts.

    Raises:
        ConfigError: unknown parameter, value of another type, or `output` is not a notebook of its own or cannot be
            written.
        papermill.PapermillExecutionError: a cell failed.
    """
    notebook, output = Path(notebook).absolute(), Path(output).absolute()
    if output.suffix != ".ipynb" or output.resolve() == notebook.resolve():
        raise ConfigError(f"the output {output} must be an .ipynb file other than the notebook itself")
    given = dict(parameters or {})
    resolved = resolve_parameters(notebook_parameters(notebook), given)
    record: dict[str, Any] = {
        "notebook": str(notebook),
        "output": str(output),
        "html": None,
        "status": "running",
        "error": None,
        "started": _now(),
        "finished": None,
        "given": given,
        "parameters": resolved,
        "kernel_starts": 0,
    }
    with said_plainly(f"{output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        for stale in (output, output.with_suffix(".html")):
            stale.unlink(missing_ok=True)
        _write(record)
    try:
        _execute(record, timeout, progress)
        record["status"] = "finished"
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        record |= {"status": "interrupted" if stopped else "failed", "error": _describe(error)}
        raise
    finally:
        record["finished"] = _now()
        _write(record)
        if html and output.exists():
            record["html"] = str(_export_html(output))
            _write(record)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 finished, 1 a cell failed, 2 bad parameters."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.notebook", description=run_notebook.__doc__.split("\n")[0])
    parser.add_argument("notebook", help="notebook to run")
    parser.add_argument("output", nargs="?", help="executed notebook; record and HTML are written beside it")
    add_parameter_options(parser)
    parser.add_argument("--timeout", type=int, help="seconds that a cell may take")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    options = parser.parse_args(arguments)
    try:
        if options.help_parameters:
            print_parameters(notebook_parameters(options.notebook).values())
            return 0
        if options.output is None:
            parser.error("the output is missing")
        given = given_parameters(options)
        record = run_notebook(
            options.notebook, options.output, given, timeout=options.timeout, progress=options.progress
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:  # cell, kernel, time limit
        told = error.evalue if _is_ours(error) else error
        print(f"error: {told}\nrecord: {status_path(options.output)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {options.output} cannot be written: {error}", file=sys.stderr)
        return 1
    print(record["html"])
    return 0


def _execute(record: dict[str, Any], timeout: int | None, progress: bool) -> None:
    notebook, output = Path(record["notebook"]), Path(record["output"])
    # papermill fills in `{name}` within paths, so braces of real folders are doubled
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]
    while True:
        record["kernel_starts"] += 1
        try:
            with _progress_bars(progress):
                papermill.execute_notebook(
                    *paths,
                    {name: record["parameters"][name] for name in record["given"]},
                    kernel_name=KERNEL,
                    language="python",
                    cwd=notebook.parent,
                    progress_bar=progress,
                    start_timeout=START_TIMEOUT,
                    execution_timeout=timeout,
                    extra_arguments=[QUIET_KERNEL, BOUND_KERNEL.format(os.getpid())],
                )
            return
        except RuntimeError:  # of a kernel; a failing cell is a PapermillExecutionError
            if record["kernel_starts"] > 1 or _any_cell_started(output):
                raise


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Keep `progress_bar` quiet in the kernel, which inherits the environment, unless it is wanted."""
    before = os.environ.get("TQDM_DISABLE")
    if not shown:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE", None)
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _any_cell_started(output: Path) -> bool:
    if not output.exists():
        return False
    # Not the cells' "status": papermill sets it to "completed" when the kernel never started.
    cells = nbformat.read(output, as_version=4).cells
    return any(cell.metadata.get("papermill", {}).get("start_time") for cell in cells)


def _export_html(output: Path) -> Path:
    page, _ = HTMLExporter(embed_images=True).from_filename(str(output))
    target = output.with_suffix(".html")
    with whole_file(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def _is_ours(error: Exception) -> bool:
    """Whether a cell ended with an error that is written for users, who need no traceback then."""
    return hasattr(fmfa.errors, getattr(error, "ename", ""))


def _describe(error: BaseException) -> dict[str, Any]:
    cell = getattr(error, "exec_count", None)
    kind = getattr(error, "ename", type(error).__name__)
    return {"type": kind, "message": str(getattr(error, "evalue", error)), "cell": cell}


def _write(record: dict[str, Any]) -> None:
    with whole_file(status_path(record["output"])) as partial:
        partial.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = literal  # help` of a parameters cell."""

    name: str
    type: type
    default: str | int | float | bool | list
    help: str


def print_parameters(parameters: Iterable[Parameter]) -> None:
    """Print one line `name: type = default  # help` a parameter, and where paths start."""
    for parameter in parameters:
        print(f"{parameter.name}: {parameter.type.__name__} = {parameter.default!r}  # {parameter.help}")
    print("# A relative path that you give starts where you are; ~ is your home folder.")


def notebook_command(record: Mapping[str, Any]) -> str:
    """Write the command that runs a notebook, to be pasted into a shell in the project's folder.

    Args:
        record: `notebook`, `output` and `given` (the parameters) as in the record of `run_notebook`; values
            in its `parameters`, if there, replace the given ones.
    """
    resolved = record.get("parameters") or {}
    given = {name: resolved.get(name, value) for name, value in record["given"].items()}
    python = in_project(sys.executable)
    words = ["python" if os.path.isabs(python) else python, "-m", "fmfa.notebook"]
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


@dataclass(frozen=True)
class ModelParameters:
    """What a notebook can say of the model of a weight file that does not record it; "" and 0 are not said."""

    vocabulary: str
    backbone: str
    image_height: int
    image_width: int
    stride: int
    position_grid: str

    @property
    def model(self) -> dict[str, str | int]:
        """The parameters of `fmfa.systems.load_system` that describe a model."""
        return {parameter.name: getattr(self, parameter.name) for parameter in fields(ModelParameters)}


@dataclass(frozen=True)
class EvaluateParameters(ModelParameters):
    """Parameters of `notebooks/04_evaluate.ipynb`, checked."""

    run: str
    dataset: str
    root: str
    scale: str
    data_seed: int
    split: str
    sentence: str
    folder: str
    queries: int
    phrases: int
    counterfactuals: int
    device: str
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        if self.phrases < 0:
            raise ConfigError(f"phrases is {self.phrases}; expected 0 (none) or more")
        if self.counterfactuals < 0:
            raise ConfigError(f"counterfactuals is {self.counterfactuals}; expected 0 (none) or more")
        _require_data(self)
        if not 1 <= self.queries <= 20:
            raise ConfigError(f"queries is {self.queries}; expected 1 to 20 pictures a grid")


@dataclass(frozen=True)
class VisualiseParameters(ModelParameters):
    """Parameters of `notebooks/06_visualise.ipynb`, checked."""

    runs: list
    dataset: str
    root: str
    scale: str
    data_seed: int
    split: str
    phrases: int
    positions: list
    queries: int
    results: str
    device: str
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        _require_data(self)
        if not 1 <= self.phrases <= 12:
            raise ConfigError(f"phrases is {self.phrases}; expected 1 to 12, a column of pictures each")
        if not 1 <= self.queries <= 20:
            raise ConfigError(f"queries is {self.queries}; expected 1 to 20, a figure each")
        if self.results:
            require_results(self.results)


def _require_data(chosen: EvaluateParameters | VisualiseParameters) -> None:
    if chosen.split not in _SPLITS:
        raise ConfigError(f"split is {chosen.split!r}; expected one of {', '.join(_SPLITS)}")
    if chosen.scale not in ("", *SCALES):
        raise ConfigError(f"scale is {chosen.scale!r}; expected one of {', '.join(SCALES)}, or empty for the run's")
    if chosen.data_seed < -1:
        raise ConfigError(f"data_seed is {chosen.data_seed}; expected 0 or more, or -1 for the run's")


def require_results(folder: str) -> None:
    """Raise ConfigError unless `folder` is a folder."""
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is no folder; expected one with a folder a run, as `make study` writes")


@dataclass(frozen=True)
class DataParameters:
    """Parameters of `notebooks/01_data.ipynb`, checked."""

    dataset: str
    root: str
    scale: str
    seed: int
    drop_empty_captions: bool
    decode: bool

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        if self.scale not in SCALES:
            raise ConfigError(f"scale is {self.scale!r}; expected one of {', '.join(SCALES)}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more")


if __name__ == "__main__":
    sys.exit(main())
