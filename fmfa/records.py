"""A run folder's records: configuration, provenance, outcome and metrics."""

import contextlib
import csv
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fmfa.errors import ConfigError, TrainingError
from fmfa.files import PROJECT, flush, now, read_json, said_plainly, status_record, whole_file

RECORD, METRICS = "run.json", "metrics.csv"
METRIC_COLUMNS = ("run", "split", "epoch", "step", "metric", "value")
_FIELDS = {
    **dict.fromkeys(("row", "status", "started", "host", "device", "data"), str),
    **dict.fromkeys(("process", "seed", "steps", "best_epoch"), int),
    **dict.fromkeys(("config", "versions", "git"), dict),
    **dict.fromkeys(("finished", "error"), str | None),
    **{"resumed": list, "best": float | int | None},
}
PACKAGES = (
    *("fmfa", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers"),
    *("accelerate", "safetensors", "numpy", "pandas", "pillow", "scipy", "statsmodels"),
)


@contextlib.contextmanager
def run_record(folder: str | Path, **content: Any) -> Iterator[dict[str, Any]]:
    """Keep `run.json` in `folder` while the body runs, and note how the body ended.

    The record holds `content`, `row` (`row_of` the folder's first name), versions, commit, and what `status_record`
    adds. A folder that was run before keeps its first start time and lists the later ones under `resumed`.

    Raises:
        TrainingError: the record cannot be written.
        Whatever the body raises.
    """
    path, earlier = Path(folder) / RECORD, read_record(folder)
    record: dict[str, Any] = {
        **content,
        "row": row_of(folder),
        "started": earlier.get("started", now()),
        "resumed": [*earlier.get("resumed", []), *([now()] if "started" in earlier else [])],
        "host": socket.gethostname(),
        "process": os.getpid(),
        "versions": package_versions(),
        "git": git_state(),
    }
    with status_record(path, record, _cannot_be_written(path), TrainingError):
        yield record


def read_record(folder: str | Path) -> dict[str, Any]:
    """The run's record; empty when there is none, status "unreadable" when it is not JSON of this layout."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    try:
        record = read_json(path)
        for name, kind in _FIELDS.items():
            if name in record and not isinstance(record[name], kind):
                raise ConfigError(f"{path}: {name} is {str(record[name])[:100]!r}; expected {kind}")
        for name in ("started", "finished"):
            datetime.fromisoformat(record.get(name) or now())
    except ValueError as error:
        return {"status": "unreadable", "error": str(error)}
    return record


def row_of(folder: str | Path) -> str:
    """The row of the study that a run belongs to: the record's, or without one what `make study` names its folder."""
    return read_record(folder).get("row") or re.sub(r"-\d+$", "", Path(folder).name)


class MetricsLog:
    """The long-form metrics file of a run: one value per line; a resumed run goes on with its checkpoint's."""

    def __init__(self, folder: str | Path, beginning: bytes = b"") -> None:
        """Begin `metrics.csv` in `folder` with `beginning`, what a checkpoint keeps of it (empty = start afresh).

        Raises:
            TrainingError: the file cannot be written.
        """
        self.path, self.run = Path(folder) / METRICS, Path(folder).name
        with _written(self.path), whole_file(self.path) as part:
            part.write_bytes(beginning or f"{','.join(METRIC_COLUMNS)}\n".encode())

    def add(self, split: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Append one line per value; `epoch` and `step` count what is complete (0 = before training).

        Raises:
            TrainingError: the file cannot be written.
        """
        with _written(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            rows = ((self.run, split, epoch, step, name, repr(float(v))) for name, v in values.items())
            csv.writer(file, lineterminator="\n").writerows(rows)

    def flushed_size(self) -> int:
        """Bytes in the file, once they are on disk.

        Raises:
            TrainingError: they cannot be written there.
        """
        with _written(self.path):
            flush(self.path)
            return self.path.stat().st_size


def read_metrics(folder: str | Path) -> pd.DataFrame:
    """A run's metrics, columns run, split, epoch, step, metric, value; empty when there are none.

    A last line that a crash tore is left out.

    Raises:
        TrainingError: the file is damaged.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        table = pd.DataFrame(list(csv.reader(lines[1:])), columns=list(METRIC_COLUMNS))
        return table.astype({"epoch": "int64", "step": "int64", "value": "float64"})
    except (OSError, ValueError, csv.Error) as error:
        raise TrainingError(
            f"{path} is damaged ({error}); put the copy in its place that lies in the run's checkpoints/last-*"
        ) from error


def _written(path: Path) -> contextlib.AbstractContextManager[None]:
    return said_plainly(_cannot_be_written(path), TrainingError)


def _cannot_be_written(path: Path) -> str:
    return f"{path} cannot be written; start the same run again when it can be, and it goes on from its last checkpoint"


def package_versions() -> dict[str, str | None]:
    """Version of Python and of each package that can change a number; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(folder: str | Path = PROJECT) -> dict[str, str | bool | None]:
    """Commit and dirty flag of the checkout that `folder` (the project's by default) is the root of.

    Both are None outside a checkout, without git, or (commit) before the first commit. A notebook counts by the code in
    it: Jupyter rewrites the rest of a file that is only looked at.
    """
    root = Path(folder)
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.rstrip("\n")).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "-z", "--no-renames")
    changed = [entry[3:] for entry in (status or "").split("\0") if entry]
    return {
        "commit": commit and commit.rstrip("\n"),
        "dirty": None if status is None else not all(_same_code(root, path) for path in changed),
    }


def device_name(device: str | torch.device) -> str:
    """The device in words: the GPU's name, or the processor with its number of cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _same_code(root: Path, path: str) -> bool:
    """Whether a changed file is a notebook whose code cells are those of the last commit."""
    if not path.endswith(".ipynb"):
        return False
    try:
        now, before = (root / path).read_text(encoding="utf-8"), _git(root, "show", f"HEAD:{path}")
        return before is not None and _code(now) == _code(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # missing, or no notebook
        return False


def _code(notebook: str) -> list[tuple[str, bool]]:
    """Source of each code cell, and whether parameters are put behind it."""
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), "parameters" in cell["metadata"].get("tags", [])) for cell in cells]


def _git(folder: Path, *command: str) -> str | None:
    command = ("git", "-C", str(folder), *command)
    try:
        result = subprocess.run(
            command, capture_output=True, timeout=30, encoding="utf-8", errors="surrogateescape", check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
