"""The run folder's records: what was run with which outcome, and its metrics."""

import contextlib
import csv
import os
import socket
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fmfa.errors import ConfigError, TrainingError
from fmfa.files import flush, read_json, said_plainly, whole_file, write_json
from fmfa.provenance import git_state, package_versions

RECORD, METRICS = "run.json", "metrics.csv"
METRIC_COLUMNS = ("run", "split", "epoch", "step", "metric", "value")
_FIELDS = {
    **dict.fromkeys(("status", "started", "host", "device", "data"), str),
    **dict.fromkeys(("process", "seed", "steps", "best_epoch"), int),
    **dict.fromkeys(("config", "versions", "git"), dict),
    **dict.fromkeys(("finished", "error"), str | None),
    **{"resumed": list, "best": float | int | None},
}


@contextlib.contextmanager
def run_record(folder: str | Path, **content: Any) -> Iterator[dict[str, Any]]:
    """Keep `run.json` in `folder` while the body runs, and note how the body ended.

    The record holds `content`, versions, commit, times and the status: "running" inside, then "finished",
    "interrupted" (Ctrl-C, SystemExit) or "failed" with the error. A folder that was run before keeps its
    first start time and lists the later ones under `resumed`. What the body adds to the yielded dict is
    written at its end.

    Raises:
        TrainingError: the record cannot be written.
        Whatever the body raises.
    """
    path = Path(folder) / RECORD
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
    with _written(path):
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
    with _written(path):
        write_json(path, record)


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
            datetime.fromisoformat(record.get(name) or _now())
    except ValueError as error:
        return {"status": "unreadable", "error": str(error)}
    return record


class MetricsLog:
    """The long-form metrics file of a run: one value a line, appended; a resumed run goes on with its checkpoint's."""

    def __init__(self, folder: str | Path, kept: bytes = b"") -> None:
        """Begin `metrics.csv` in `folder` with `kept`, what a checkpoint keeps of it (empty = start anew).

        Raises:
            TrainingError: the file cannot be written.
        """
        self.path, self.run = Path(folder) / METRICS, Path(folder).name
        with _written(self.path), whole_file(self.path) as part:
            part.write_bytes(kept or f"{','.join(METRIC_COLUMNS)}\n".encode())

    def add(self, split: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Append one line a value; `epoch` and `step` count what is complete (0 = before training).

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
    return said_plainly(
        f"{path} cannot be written; start the same run again when it can be, and it goes on from its last checkpoint",
        TrainingError,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
