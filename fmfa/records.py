"""The run folder's records: what was run with which outcome, its metrics, and all runs of a folder."""

import contextlib
import csv
import json
import os
import socket
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from fmfa.files import write_json
from fmfa.provenance import git_state, package_versions

RECORD, METRICS = "run.json", "metrics.csv"
METRIC_COLUMNS = ("run", "split", "epoch", "step", "metric", "value")


@contextlib.contextmanager
def run_record(folder: str | Path, **content: Any) -> Iterator[dict[str, Any]]:
    """Keep `run.json` in `folder` while the body runs, and note how the body ended.

    The record holds `content`, versions, commit, times and the status: "running" inside, then "finished",
    "interrupted" (Ctrl-C, SystemExit) or "failed" with the error. A folder that was run before keeps its
    first start time and lists the later ones under `resumed`. What the body adds to the yielded dict is
    written at its end.

    Raises:
        Whatever the body raises.
    """
    path = Path(folder) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_record(folder)
    record: dict[str, Any] = {
        **content,
        "status": "running",
        "started": earlier.get("started", _now()),
        "resumed": [*earlier.get("resumed", []), *([_now()] if "started" in earlier else [])],
        "finished": None,
        "error": None,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "versions": package_versions(),
        "git": git_state(),
    }
    write_json(path, record)
    try:
        yield record
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        record["status"] = "interrupted" if stopped else "failed"
        record["error"] = "".join(traceback.format_exception_only(error)).strip()
        record["finished"] = _now()
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is on its way
            write_json(path, record)
        raise
    record["status"], record["finished"] = "finished", _now()
    write_json(path, record)


def read_record(folder: str | Path) -> dict[str, Any]:
    """The run's record; empty when there is none, status "unreadable" when it is not JSON of this layout."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"status": "unreadable", "error": f"{path}: {error}"}
    if not isinstance(record, dict):
        return {"status": "unreadable", "error": f"{path}: expected an object, found {type(record).__name__}"}
    return record


def collect_runs(folder: str | Path, expected: Iterable[str] = ()) -> pd.DataFrame:
    """One row a run below `folder`, whatever became of it.

    Args:
        folder: searched at any depth for run records, metrics files and checkpoint folders; direct
            subfolders count as runs even when they are empty.
        expected: run names (paths relative to `folder`) that should be there.

    Returns:
        Columns `run`, `status` (finished, failed, interrupted, running, died: its process is gone without
        a word, missing: expected but not there, "no record", unreadable), `started`, `finished`, `error`,
        and the scalars of the record's `config`. Sorted by `run`.
    """
    root = Path(folder)
    marks = (*root.rglob(RECORD), *root.rglob(METRICS), *root.rglob("checkpoints"))
    found = {mark.parent for mark in marks}
    if root.is_dir():
        children = {child for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")}
        found |= {c for c in children if c.name != "checkpoints" and not any(c in f.parents for f in found)}
    names = {path.relative_to(root).as_posix() for path in found if path != root or (root / RECORD).is_file()}
    rows = []
    for name in sorted(names | set(expected)):
        record = read_record(root / name)
        status = record.get("status", "no record" if name in names else "missing")
        if status == "running" and record.get("host") == socket.gethostname():
            status = "running" if psutil.pid_exists(record.get("process", -1)) else "died"
        config = record.get("config")
        row = {"run": name, "status": status}
        row |= {key: record.get(key) for key in ("started", "finished", "error")}
        rows.append(row | {k: v for k, v in (config or {}).items() if k not in row and _scalar(v)})
    return pd.DataFrame(rows, columns=None if rows else ["run", "status", "started", "finished", "error"])


class MetricsLog:
    """The long-form metrics file of a run: one value a line, appended, cut back on resume."""

    def __init__(self, folder: str | Path, size: int = 0) -> None:
        """Open `metrics.csv` in `folder`, keeping its first `size` bytes (0 = start anew)."""
        self.path, self.run = Path(folder) / METRICS, Path(folder).name
        if size and self.path.is_file():
            os.truncate(self.path, size)
        else:
            with self.path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(METRIC_COLUMNS)

    def add(self, split: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Append one line a value; `epoch` and `step` count what is complete (0 = before training)."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows = ((self.run, split, epoch, step, name, repr(float(v))) for name, v in values.items())
            csv.writer(file, lineterminator="\n").writerows(rows)

    @property
    def size(self) -> int:
        """Bytes in the file, to be kept in a checkpoint."""
        return self.path.stat().st_size


def read_metrics(folder: str | Path) -> pd.DataFrame:
    """A run's metrics, columns run, split, epoch, step, metric, value; empty when there are none.

    A last line that a crash tore is left out.
    """
    path = Path(folder) / METRICS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    rows = list(csv.reader(lines[1:]))
    table = pd.DataFrame(rows, columns=list(METRIC_COLUMNS))
    return table.astype({"epoch": "int64", "step": "int64", "value": "float64"})


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
