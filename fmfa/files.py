"""Files written whole or not at all, folders locked by one process, JSON and the records of what is running."""

import hashlib
import json
import os
import socket
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from fmfa.errors import ConfigError, FmfaError

LOCK = ".lock"
PROJECT = Path(__file__).parents[1]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the body writes there takes the name `path` once it is on disk.

    After an error, a kill or a crash `path` is as it was before. The folder must exist.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: str | Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON by `whole_file`; NaN and infinities are refused, as JSON has none.

    Raises:
        ValueError: a value that JSON cannot hold; the old file stays.
        OSError: the file cannot be written; the old file stays.
    """
    text = json.dumps(data, indent=1, allow_nan=False, default=_plain) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, error: type[FmfaError] = ConfigError) -> dict[str, Any]:
    """Read the object of a JSON file.

    Raises:
        error: the file is missing, not JSON, nested too deeply, or holds no object; the message names it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read as JSON ({type(reason).__name__}: {reason})") from reason
    if not isinstance(data, dict):
        raise error(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


@contextmanager
def status_record(
    path: str | Path, record: dict[str, Any], failing: str, error: type[FmfaError] = ConfigError
) -> Iterator[dict[str, Any]]:
    """Keep a JSON record of what the body does, what it adds to the yielded record included.

    Added are `status`, which is "running" inside, so that a killed body shows, then "finished", "interrupted" (Ctrl-C,
    SystemExit) or "failed", the times `started` (unless given) and `finished`, and `error` in words.

    Raises:
        error: the record cannot be written; the message begins with `failing`.
        Whatever the body raises.
    """
    record |= {"status": "running", "started": record.get("started", now()), "finished": None, "error": None}
    with said_plainly(failing, error):
        write_json(path, record)
    try:
        yield record
    except BaseException as reason:
        stopped = isinstance(reason, KeyboardInterrupt | SystemExit)
        record |= {"status": "interrupted" if stopped else "failed", "finished": now(), "error": _in_words(reason)}
        with suppress(OSError):  # a full disk must not hide the error that is on its way
            write_json(path, record)
        raise
    record |= {"status": "finished", "finished": now()}
    with said_plainly(failing, error):
        write_json(path, record)


def now() -> str:
    """The time, UTC in ISO format with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def content_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a record as JSON, without its own field `checksum`."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def said_plainly(doing: str, error: type[FmfaError] = ConfigError) -> Iterator[None]:
    """Turn an OSError of the body into `error`: "DOING: REASON", for folders and files that cannot be made or read."""
    try:
        yield
    except OSError as reason:
        raise error(
            f"{doing}: {reason.strerror or reason}" + (f" ({reason.filename})" if reason.filename else "")
        ) from reason


@contextmanager
def held_folder(folder: str | Path, error: type[FmfaError] = ConfigError) -> Iterator[None]:
    """Hold a folder against other processes while the body runs; the system releases it when this process ends.

    Raises:
        error: another process holds it (its number and host are named), or the folder cannot be written to.
    """
    path = Path(folder) / LOCK
    lock = FileLock(path)
    with said_plainly(f"{folder} cannot be written to", error):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = path.with_suffix(".holder")
            who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
            raise error(f"{folder} is in use by {who}; wait for it to end, or give another folder") from None
    try:
        with said_plainly(f"{folder} cannot be written to", error), whole_file(path.with_suffix(".holder")) as holder:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _in_words(error: BaseException) -> str:
    if kind := getattr(error, "ename", ""):  # of a notebook's cell
        return f"{kind}: {getattr(error, 'evalue', '')}"
    return "".join(traceback.format_exception_only(error)).strip()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return value.as_posix()
    raise ValueError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")
