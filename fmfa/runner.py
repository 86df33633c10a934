"""Run a notebook by papermill with strict parameters, and leave a record even when it fails.

`python -m fmfa.runner NOTEBOOK OUTPUT -p name value -f parameters.yml`
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

import fmfa.errors
from fmfa.arguments import add_parameter_options, given_parameters, print_parameters
from fmfa.errors import ConfigError
from fmfa.files import said_plainly, whole_file
from fmfa.parameters import notebook_parameters, resolve_parameters

KERNEL = "python3"
QUIET_KERNEL = "--IPKernelApp.log_level=ERROR"  # not one warning a notebook about its connection to this machine
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
        parameters: values for the cell tagged `parameters`; see `parameters.convert_value`. Relative paths
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
    parser = argparse.ArgumentParser(prog="python -m fmfa.runner", description=run_notebook.__doc__.split("\n")[0])
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


if __name__ == "__main__":
    sys.exit(main())
