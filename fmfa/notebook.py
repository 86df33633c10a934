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
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model

import fmfa.errors
from fmfa.errors import ConfigError, nearest, told
from fmfa.files import PROJECT, said_plainly, status_record, whole_file

KERNEL = "python3"
QUIET_KERNEL = "--IPKernelApp.log_level=ERROR"  # no warning about the connection to this machine
# A kernel ends with a killed runner by itself, but not while it starts.
BOUND_KERNEL = "--IPKernelApp.exec_lines=__import__('fmfa.processes').processes.end_with({})"
START_TIMEOUT = 120  # seconds; importing torch on a busy machine is slow


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
        parameters: values for the cell tagged `parameters`; see `resolve_parameters`. Relative paths
            among them start in this process' working folder; those of the defaults in the notebook's folder.
        timeout: seconds that a single cell may take; None for no limit.
        html: export the executed notebook as HTML.

    Returns:
        The record: notebook, output, given (the parameters as given), parameters (all of them, resolved), and what
        `fmfa.files.status_record` adds.

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
    record = {"notebook": str(notebook), "output": str(output), "given": given, "parameters": resolved}
    failing = f"{output} cannot be written"
    with said_plainly(failing):
        output.parent.mkdir(parents=True, exist_ok=True)
        for stale in (output, output.with_suffix(".html")):
            stale.unlink(missing_ok=True)
    try:
        with status_record(status_path(output), record, failing):
            _execute(notebook, output, {name: resolved[name] for name in given}, timeout)
    finally:
        if html and output.exists():
            _export_html(output)
    return record


def refresh_notebook(notebook: str | Path) -> None:
    """Execute a notebook at its defaults and write it back with its outputs, in one normal form.

    Nothing of this machine and moment is left but what the cells measure: no execution times, warnings, random ids,
    addresses of objects or paths of the project's folder. Raises as `run_notebook`, and then changes nothing.
    """
    stored = nbformat.read(notebook, as_version=4)
    with TemporaryDirectory() as folder:
        output = run_notebook(notebook, Path(folder) / "executed.ipynb", html=False)["output"]
        executed = nbformat.read(output, as_version=4)
    for cell, done in zip(stored.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = done.execution_count
            cell.outputs = [shown for shown in done.outputs if shown.get("name") != "stderr"]
            for data in (shown.data for shown in cell.outputs if "image/png" in shown.get("data", {})):
                data["image/png"] = _with_palette(data["image/png"])
    stored.metadata = {name: stored.metadata[name] for name in ("kernelspec", "language_info")}
    text = nbformat.writes(stored).replace(f"{PROJECT}{os.sep}", "").replace(str(PROJECT), ".")
    text = re.sub(r" at 0x[0-9a-f]+>", ">", text)
    tables = dict.fromkeys(re.findall(r"\bT_[0-9a-f]{5}(?![0-9a-f])", text))  # of pandas' Styler
    for number, name in enumerate(tables):
        text = text.replace(name, f"T_{number:05}")
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
            print_parameters(notebook_parameters(options.notebook))
            return 0
        os.environ["TQDM_DISABLE"] = "1"  # also for the kernel, whose bars would fill the notebook
        if options.in_place:
            if options.output or options.pairs or options.file:
                parser.error("--in-place takes neither an output nor parameters: it executes at the defaults")
            refresh_notebook(options.notebook)
            return 0
        if options.output is None:
            parser.error("the output is missing")
        record = run_notebook(options.notebook, options.output, given_parameters(options), timeout=options.timeout)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:  # cell, kernel, time limit
        told = getattr(error, "evalue", error) if _is_ours(error) else error
        where = "" if options.in_place else f"\nrecord: {status_path(options.output)}"
        print(f"error: {told}{where}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {options.output or options.notebook} cannot be written: {error}", file=sys.stderr)
        return 1
    print(Path(record["output"]).with_suffix(".html"))
    return 0


def _execute(notebook: Path, output: Path, given: Mapping[str, Any], timeout: int | None) -> None:
    # papermill fills in `{name}` within paths, so braces of real folders are doubled
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]
    execute = partial(
        papermill.execute_notebook,
        *paths,
        dict(given),
        kernel_name=KERNEL,
        language="python",
        cwd=notebook.parent,
        progress_bar=False,
        start_timeout=START_TIMEOUT,
        execution_timeout=timeout,
        extra_arguments=[QUIET_KERNEL, BOUND_KERNEL.format(os.getpid())],
    )
    try:
        execute()
    except DeadKernelError:  # in a cell
        raise
    except RuntimeError:  # the kernel did not start
        execute()


def _export_html(output: Path) -> None:
    page, _ = HTMLExporter(embed_images=True).from_filename(str(output))
    with whole_file(output.with_suffix(".html")) as partial_page:
        partial_page.write_text(page, encoding="utf-8")


def _is_ours(error: Exception) -> bool:
    """Whether a cell ended with an error that is written for users, who need no traceback then."""
    return hasattr(fmfa.errors, getattr(error, "ename", ""))


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
    values: dict[str, Any] = {}
    if options.file is not None:
        try:
            values = yaml.safe_load(Path(options.file).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read parameters from {options.file}: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{options.file} holds a {type(values).__name__}; expected lines `name: value`")
    return values | dict(options.pairs)


def _path(value: str) -> str:
    return os.path.abspath(os.path.expanduser(value)) if value else value


def _path_or_name(value: str) -> str:
    path = os.path.expanduser(value)
    there = os.path.isfile(path) or (os.sep in path and os.path.isdir(path))
    return os.path.abspath(path) if there and os.path.realpath(path) != str(PROJECT / path) else path


def _runs_folder(path: str) -> str:
    if path and not Path(path).is_dir():
        raise ValueError(f"{path} is no folder; expected a folder with one folder per run, as `make study` writes")
    return path


_Path = Annotated[str, AfterValidator(_path)]
_PathOrName = Annotated[str, AfterValidator(_path_or_name)]
_RunsFolder = Annotated[_Path, AfterValidator(_runs_folder)]
_Count = Annotated[int, Field(ge=0)]
KINDS: dict[str, Any] = {
    **dict.fromkeys(("root", "cache", "run", "folder", "gallery", "export", "tuning"), _Path),
    **dict.fromkeys(("weights", "text_weights", "backbone", "vocabulary"), _PathOrName),
    "runs": list[_Path],
    "results": _RunsFolder,
    "away": list[_RunsFolder],
    "scale": Literal["", "tiny", "small", "standard", "large", "wide"],
    "split": Literal["train", "val", "test"],
    "seed": _Count,
    "data_seed": Annotated[int, Field(ge=-1)],
    "queries": Annotated[int, Field(ge=1, le=20)],
    "k": Annotated[int, Field(ge=1, le=100)],
    "phrases": _Count,
    "counterfactuals": _Count,
    "pair": Annotated[int, Field(ge=0, le=23)],  # the smallest scale tests on 24 people
}
"""What the parameters of this name are in every notebook, where their type does not say it.

Paths come out absolute: `~` is the user's home, a relative one starts in this process' working folder. What may also
be the name of something that is fetched stays as it is where no such file is there, or the file is the project's, so
that records are the same anywhere.
"""
TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "list": yaml.safe_load,
}
"""The types of parameters, and how text is read as one."""


def _from_text(kind: type, value: Any) -> Any:
    """Text (from a command line, or YAML's `1e-5`) read as a value of `kind`; all else, and other text, as it is."""
    if type(value) is not str:
        return value
    if re.search("[\ud800-\udfff]", value):  # as a shell gives bytes that are not UTF-8; no record can take them
        raise ValueError("should be valid Unicode")
    try:
        return TYPES[kind.__name__](value)
    except (ValueError, KeyError, yaml.YAMLError):
        return value


class Parameters(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """The parameters of a parameters cell, of the types that it declares and the `KINDS`, without guessing."""


def declare_parameters(defaults: Mapping[str, tuple[Any, str]]) -> type[Parameters]:
    """The parameters by name: default, whose type every value has, and help."""
    declared: dict[str, Any] = {}
    for name, (default, words) in defaults.items():
        kind = type(default)
        read = BeforeValidator(partial(_from_text, kind))
        declared[name] = Annotated[KINDS.get(name, kind), read], Field(default, description=words)
    return create_model("Parameters", __base__=Parameters, **declared)


def print_parameters(declared: type[Parameters]) -> None:
    """Print one line `name: type = default  # help` per parameter, and where paths start."""
    for name, field in declared.model_fields.items():
        print(f"{name}: {type(field.default).__name__} = {field.default!r}  # {field.description}")
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


def notebook_parameters(notebook: str | Path) -> type[Parameters]:
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
        return read_parameters("".join(tagged))
    except ConfigError as error:
        raise ConfigError(f"{notebook}, parameters cell: {error}") from None


def read_parameters(source: str) -> type[Parameters]:
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
    defaults: dict[str, tuple[Any, str]] = {}
    for node in body:
        comment = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :].decode().strip().lstrip("# ")
        match node:
            case ast.AnnAssign(target=ast.Name(name), annotation=ast.Name(kind), value=ast.expr() as value) if (
                comment and kind in TYPES and type(default := _literal(value)).__name__ == kind
            ):
                if name in defaults:
                    raise ConfigError(f"{name} is declared twice")
                defaults[name] = default, comment
            case _:
                form = f"`name: type = literal  # help` with a type of {', '.join(TYPES)}"
                raise ConfigError(f"{ast.unparse(node)!r} is not of the form {form}")
    return declare_parameters(defaults)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def resolve_parameters(declared: type[Parameters], given: Mapping[str, Any]) -> dict[str, Any]:
    """The complete parameters of a run: `given` values, defaults for the others.

    Text is read as the declared type: booleans as `true` or `false`, lists as YAML (`[1, 2]`). Other values must have
    the type already; an int is taken for a float.

    Raises:
        ConfigError: a name that is not declared (the valid ones are listed), a value that does not have the declared
            type and is no text of it, is not finite or not valid Unicode, or is none of `KINDS`.
    """
    names = declared.model_fields
    for name in given:
        if name not in names:
            valid = ", ".join(names) or "none"
            raise ConfigError(f"unknown parameter {name!r}; {nearest(name, names)}valid are {valid}")
    return _checked(declared, given).model_dump()


def _checked(declared: type[Parameters], values: Mapping[str, Any]) -> Parameters:
    try:
        return declared.model_validate(values)
    except ValidationError as error:
        about = declared.model_fields[str(error.errors()[0]["loc"][0])].description
        raise ConfigError(f"{told(error)} ({about})") from None


def check_parameters(namespace: Mapping[str, Any]) -> Parameters:
    """The parameters of a notebook, checked right after the parameters cell.

    `chosen = check_parameters(globals())` takes the present values of what the cell last declared (found in IPython's
    `In`). Relative paths start in the notebook's folder.

    Raises:
        ConfigError: no parameters cell was run, or a value is refused.
    """
    declared = _last_declared(namespace)
    return _checked(declared, {name: namespace[name] for name in declared.model_fields})


def _last_declared(namespace: Mapping[str, Any]) -> type[Parameters]:
    for source in reversed(namespace.get("In", [])):
        try:
            declared = read_parameters(source)
        except ConfigError:
            continue  # a cell of another kind
        if declared.model_fields:
            return declared
    # nbval runs cells without history, so that `In` stays empty.
    if annotations := namespace.get("__annotations__"):
        return declare_parameters({name: (namespace[name], "") for name in annotations})
    raise ConfigError("no parameters cell was run in this notebook: run it first (`name: type = literal  # help`)")


if __name__ == "__main__":
    sys.exit(main())
