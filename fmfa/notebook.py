"""Notebooks with checked parameters, executed by papermill; a record is left even on failure.

`python -m fmfa.notebook NOTEBOOK OUTPUT -p name value -f parameters.yml`
"""

import argparse
import ast
import json
import os
import re
import shlex
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar

import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model

import fmfa.errors
from fmfa.errors import ConfigError, nearest, told
from fmfa.files import PROJECT, said_plainly, whole_file, write_json

KERNEL = "python3"
QUIET_KERNEL = "--IPKernelApp.log_level=ERROR"  # no warning about the connection to this machine
# A kernel ends with a killed runner by itself, but not while it starts.
BOUND_KERNEL = "--IPKernelApp.exec_lines=__import__('fmfa.processes').processes.end_with({})"
START_TIMEOUT = 120  # seconds; importing torch on a busy machine is slow
FOLDERS = ("root", "cache", "run", "runs", "folder", "gallery", "export", "results", "tuning", "away")
"""Parameters that are paths."""
FILES = ("weights", "text_weights", "backbone", "vocabulary")
"""Parameters that are paths or names of something that is fetched."""
PLAIN_TYPES = {kind.__name__: kind for kind in (str, int, float, bool, list)}
Config = TypeVar("Config")


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
        write_json(status_path(output), record)
    try:
        _execute(record, timeout)
        record["status"] = "finished"
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        record |= {"status": "interrupted" if stopped else "failed", "error": _describe(error)}
        raise
    finally:
        record["finished"] = _now()
        write_json(status_path(output), record)
        if html and output.exists():
            record["html"] = str(_export_html(output))
            write_json(status_path(output), record)
    return record


def refresh_notebook(notebook: str | Path) -> None:
    """Execute a notebook at its defaults and write it back with its outputs, in one normal form.

    Nothing of this machine and moment is left but what the cells measure: no execution times, warnings, random ids,
    addresses of objects or paths of the project's folder. Raises as `run_notebook`, and then changes nothing.
    """
    kept = nbformat.read(notebook, as_version=4)
    with TemporaryDirectory() as folder:
        output = run_notebook(notebook, Path(folder) / "executed.ipynb", html=False)["output"]
        executed = nbformat.read(output, as_version=4)
    for cell, done in zip(kept.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = done.execution_count
            cell.outputs = [shown for shown in done.outputs if shown.get("name") != "stderr"]
            for data in (shown.data for shown in cell.outputs if "image/png" in shown.get("data", {})):
                data["image/png"] = _with_palette(data["image/png"])
    kept.metadata = {name: kept.metadata[name] for name in ("kernelspec", "language_info")}
    text = nbformat.writes(kept).replace(f"{PROJECT}{os.sep}", "").replace(str(PROJECT), ".")
    text = re.sub(r" at 0x[0-9a-f]+>", ">", text)
    for number, found in enumerate(dict.fromkeys(re.findall(r"\bT_[0-9a-f]{5}(?![0-9a-f])", text))):  # pandas' Styler
        text = text.replace(found, f"T_{number:05}")
    with whole_file(Path(notebook)) as partial:
        partial.write_text(text.rstrip() + "\n", encoding="utf-8")


def _with_palette(png: str) -> str:
    """The same picture (PNG in base64) in 256 colours, about a third of the size."""
    small = BytesIO()
    with Image.open(BytesIO(b64decode(png))) as figure:
        figure.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return b64encode(small.getvalue()).decode()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 finished, 1 a cell failed, 2 bad parameters."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.notebook", description="Run a notebook with parameters")
    parser.add_argument("notebook", help="notebook to run")
    parser.add_argument("output", nargs="?", help="executed notebook; record and HTML are written beside it")
    add_parameter_options(parser)
    parser.add_argument("--in-place", action="store_true", help="at the defaults, and write the outputs back into it")
    parser.add_argument("--timeout", type=int, help="seconds that a cell may take")
    options = parser.parse_args(arguments)
    try:
        if options.help_parameters:
            print_parameters(notebook_parameters(options.notebook).values())
            return 0
        os.environ["TQDM_DISABLE"] = "1"  # also for the kernel, whose bars would fill the notebook
        if options.in_place:
            if options.output or options.pairs or options.file:
                parser.error("--in-place takes neither an output nor parameters: it executes at the defaults")
            refresh_notebook(options.notebook)
            return 0
        if options.output is None:
            parser.error("the output is missing")
        given = given_parameters(options)
        done = run_notebook(options.notebook, options.output, given, timeout=options.timeout)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:  # cell, kernel, time limit
        told = getattr(error, "evalue", error) if _is_ours(error) else error
        record = "" if options.in_place else f"\nrecord: {status_path(options.output)}"
        print(f"error: {told}{record}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {options.output or options.notebook} cannot be written: {error}", file=sys.stderr)
        return 1
    print(done["html"])
    return 0


def _execute(record: dict[str, Any], timeout: int | None) -> None:
    notebook, output = Path(record["notebook"]), Path(record["output"])
    # papermill fills in `{name}` within paths, so braces of real folders are doubled
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]
    while True:
        record["kernel_starts"] += 1
        try:
            papermill.execute_notebook(
                *paths,
                {name: record["parameters"][name] for name in record["given"]},
                kernel_name=KERNEL,
                language="python",
                cwd=notebook.parent,
                progress_bar=False,
                start_timeout=START_TIMEOUT,
                execution_timeout=timeout,
                extra_arguments=[QUIET_KERNEL, BOUND_KERNEL.format(os.getpid())],
            )
            return
        except RuntimeError:  # of a kernel; a failing cell is a PapermillExecutionError
            if record["kernel_starts"] > 1 or _any_cell_started(output):
                raise


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
    """Print one line `name: type = default  # help` per parameter, and where paths start."""
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
        ConfigError: not Python, a name twice, or a line of another form.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"not valid Python ({error})") from None
    lines = source.encode().splitlines()
    parameters: dict[str, Parameter] = {}
    for node in body:
        comment = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :].decode().strip().lstrip("# ")
        parameter = _read_line(node, comment)
        if parameter is None:
            types = ", ".join(PLAIN_TYPES)
            line = ast.unparse(node)
            raise ConfigError(f"{line!r} is not of the form `name: type = literal  # help` with a type of {types}")
        if parameter.name in parameters:
            raise ConfigError(f"{parameter.name} is declared twice")
        parameters[parameter.name] = parameter
    return parameters


def convert_value(parameter: Parameter, value: Any) -> str | int | float | bool | list:
    """Convert a value to a parameter's declared type, without guessing.

    Text (from a command line, or YAML's `1e-5`) is read as the declared type: booleans as `true` or
    `false`, lists as YAML (`[1, 2]`). Other values must have the type already; an int is taken for a float.
    Elements of a list are converted to the type of the default's first element, if there is one.

    Paths (`FOLDERS`, and of `FILES` what is there) come out absolute: `~` is the user's home, a relative path starts in
    this process' working folder. A file of the project keeps its path within it, so that records are the same anywhere.

    Raises:
        ConfigError: the value does not have the declared type and is no text of it, is not finite, or holds half a
            surrogate pair (as a shell gives bytes that are not UTF-8), which no record can take.
    """
    kind = parameter.type
    if type(value) is str and kind is not str:
        value = _from_text(kind, value, parameter)
    try:
        value = TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError:
        raise _mismatch(parameter, value) from None
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise ConfigError(f"{parameter.name} is {value!r}, which is not valid Unicode: {parameter.help}")
    if isinstance(parameter.default, list) and parameter.default:
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
            valid = ", ".join(declared) or "none"
            raise ConfigError(f"unknown parameter {name!r}; {nearest(name, declared)}valid are {valid}")
    return {
        name: convert_value(parameter, given[name]) if name in given else parameter.default
        for name, parameter in declared.items()
    }


def check_parameters(
    config_type: type[Config], namespace: Mapping[str, Any], *, beside: tuple[str, ...] = ()
) -> Config:
    """Build a `checked` dataclass from a notebook's parameters, right after the parameters cell.

    `config = check_parameters(TrainConfig, globals())` takes the present values of what the cell last declared (found
    in IPython's `In`, so a name misspelt in the cell is an error and not a silently unused value).
    Fields that the cell leaves out keep the dataclass' defaults. Relative paths start in the notebook's folder.

    Args:
        config_type: the dataclass, or `Parameters`.
        namespace: the notebook's `globals()`.
        beside: parameters of the cell that are not fields of the dataclass.

    Raises:
        ConfigError: no parameters cell was run, it declares a name that the dataclass has not, or the dataclass
            refuses a value.
    """
    values = {name: _absolute(name, namespace[name]) for name in _last_declared(namespace) if name not in beside}
    known = [field.name for field in fields(config_type)] if is_dataclass(config_type) else values
    if unknown := [name for name in values if name not in known]:
        hint = nearest(unknown[0], known)
        raise ConfigError(f"the parameters cell has {unknown[0]!r}, {config_type.__name__} has no such field; {hint}")
    return config_type(**values)


def _folder(path: str) -> str:
    if path and not Path(path).is_dir():
        raise ValueError(f"{path} is no folder; expected a folder with one folder per run, as `make study` writes")
    return path


_Count = Annotated[int, Field(ge=0)]
LIMITS: dict[str, Any] = {
    "scale": Literal["", "tiny", "small", "standard", "large"],
    "split": Literal["train", "val", "test"],
    "seed": _Count,
    "data_seed": Annotated[int, Field(ge=-1)],
    "queries": Annotated[int, Field(ge=1, le=20)],
    "k": Annotated[int, Field(ge=1, le=100)],
    "phrases": _Count,
    "counterfactuals": _Count,
    "pair": Annotated[int, Field(ge=0, le=23)],  # the smallest scale tests on 24 people
    "results": Annotated[str, AfterValidator(_folder)],
    "away": list[Annotated[str, AfterValidator(_folder)]],
}
"""What the parameters of this name may be in every notebook, where their type does not say it."""
MODEL = ("vocabulary", "backbone", "image_height", "image_width", "stride", "position_grid")


class Parameters(SimpleNamespace):
    """The parameters of a notebook, checked by `LIMITS`."""

    def __init__(self, **values: Any) -> None:
        """Raises ConfigError for a value out of its limits."""
        kinds: dict[str, Any] = {name: (LIMITS[name], ...) for name in values.keys() & LIMITS.keys()}
        limited = create_model("Limited", __config__=ConfigDict(strict=True, extra="allow"), **kinds)
        try:
            super().__init__(**limited(**values).model_dump())
        except ValidationError as error:
            raise ConfigError(told(error)) from None

    def __getattr__(self, name: str) -> Any:
        """Raises ConfigError: the cell does not declare such a parameter."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise ConfigError(f"the parameters cell has no {name!r}; {nearest(name, vars(self))}".rstrip("; "))

    @property
    def model(self) -> dict[str, str | int]:
        """What is said of the model of a weight file that does not record it, for `fmfa.systems.load_system`."""
        return {name: getattr(self, name) for name in MODEL}


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


def _read_line(node: ast.stmt, comment: str) -> Parameter | None:
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and comment):
        return None
    kind = PLAIN_TYPES.get(ast.unparse(node.annotation))
    try:
        default = ast.literal_eval(node.value)
    except ValueError:
        return None
    return Parameter(node.target.id, kind, default, comment) if type(default) is kind else None


def _from_text(kind: type, text: str, parameter: Parameter) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return yaml.safe_load(text) if kind is list else kind(text)
    except (ValueError, KeyError, yaml.YAMLError):
        raise _mismatch(parameter, text) from None


def _mismatch(parameter: Parameter, value: Any) -> ConfigError:
    kinds: dict[type, str] = {bool: "true or false", float: "a finite float"}
    wanted = kinds.get(parameter.type, parameter.type.__name__)
    found = f"{parameter.name} is {value!r} ({type(value).__name__})"
    return ConfigError(f"{found}, expected {wanted}: {parameter.help}")


def _last_declared(namespace: Mapping[str, Any]) -> Iterable[str]:
    for source in reversed(namespace.get("In", [])):
        try:
            if declared := read_parameters(source):
                return declared
        except ConfigError:
            continue  # a cell of another kind
    # nbval runs cells without history, so that `In` stays empty.
    if annotations := namespace.get("__annotations__"):
        return annotations
    raise ConfigError("no parameters cell was run in this notebook: run it first (`name: type = literal  # help`)")


if __name__ == "__main__":
    sys.exit(main())
