"""A run's checkpoints: folders that are either complete or not there, the last, the best, on request every epoch's."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmfa.errors import CheckpointError
from fmfa.files import flush, read_json, write_json
from fmfa.models.weights import read_checkpoint, save_checkpoint
from fmfa.records import METRICS

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
EPOCH = "epoch"  # kind of the checkpoints that stay
_NAME = re.compile(rf"(last|best|{EPOCH})-(\d+)")
_CHECKSUMS = "sha256"


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps besides weights, optimiser and metrics.

    Attributes:
        epoch: complete epochs.
        batch: batches done in the epoch after those.
        step: optimiser steps since the start.
        best: selection value of the best epoch, None before the first validation.
        best_epoch: its number, counted from 1.
        sums: sums of the unfinished epoch's metrics over its steps.
        metrics_size: bytes of the metrics file that belong to this state.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    metrics_size: int = 0


def write_checkpoint(
    folder: str | Path,
    kind: str,
    model: nn.Module,
    progress: Progress,
    optimizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoints/KIND-STEP` under the run folder; it appears under that name when complete.

    Args:
        folder: the run folder.
        kind: "last", "best" or "epoch".
        model: its state dict goes to `model.safetensors`, its attribute `config` (if any) to the record.
        progress: goes to `state.json`, with SHA-256 checksums of itself and of the other files.
        optimizer: what training goes on with: state dicts for `optimizer.pt`, tensors and plain values only. The
            metrics so far are copied beside it.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); earlier ones are as before.
    """
    home = Path(folder) / "checkpoints"
    target = home / f"{kind}-{progress.step:08d}"
    unfinished = home / f".{target.name}.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        record = {
            "class": type(model).__name__,
            "model": getattr(model, "config", None),
            "epoch": progress.epoch,
            "step": progress.step,
        }
        save_checkpoint(unfinished / WEIGHTS, model, record)
        if optimizer is not None:
            torch.save(dict(optimizer), unfinished / OPTIMIZER)
            shutil.copyfile(Path(folder) / METRICS, unfinished / METRICS)
        checksums = {file.name: _file_checksum(file) for file in sorted(unfinished.iterdir())}
        checksums[STATE] = _checksum(asdict(progress), checksums)
        write_json(unfinished / STATE, {**asdict(progress), _CHECKSUMS: checksums})
        for file in (*unfinished.iterdir(), unfinished):
            flush(file)
        if target.exists():
            _remove(target)
        os.replace(unfinished, target)
        flush(home)
    except Exception as error:  # torch and safetensors report a full disk by classes of their own
        raise CheckpointError(
            f"checkpoint {target} could not be written ({type(error).__name__}: {error}); "
            f"complete before it: {', '.join(path.name for path in _complete(folder)) or 'none'}. "
            "Make room and start the same run again: it goes on from there"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def find_checkpoint(folder: str | Path, kind: str) -> Path | None:
    """The newest complete checkpoint of a kind ("last" or "best") in a run folder, or None."""
    return max(_complete(folder, kind), key=_step, default=None)


def selected_checkpoint(folder: str | Path) -> Path:
    """The checkpoint to evaluate: the best on validation, or the last of a run without validation.

    Raises:
        CheckpointError: the run has no complete checkpoint, or has lost its best.
    """
    path = find_checkpoint(folder, "best")
    if path is None and (last := find_checkpoint(folder, "last")):
        path = best_checkpoint(folder, read_state(last)) or last
    if path is None:
        raise CheckpointError(
            f"{folder} has no complete checkpoint under checkpoints/; expected last-* or best-*: "
            "train it first, or give another run folder"
        )
    return path


def epoch_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a run's epochs, numbered from 1, in their order; empty unless it kept them (`keep_epochs`)."""
    return {read_state(path).epoch: path for path in sorted(_complete(folder, EPOCH), key=_step)}


def best_checkpoint(folder: str | Path, progress: Progress) -> Path | None:
    """The best checkpoint that `progress` knows of (a later one is left from an interrupted run), or None without one.

    Raises:
        CheckpointError: it is no longer there.
    """
    if progress.best is None:
        return None
    for path in _complete(folder, "best"):
        if read_state(path).epoch == progress.best_epoch:
            return path
    home = Path(folder) / "checkpoints"
    raise CheckpointError(f"{home} has lost its best checkpoint, of epoch {progress.best_epoch}; {_advice(home)}")


def prune_checkpoints(folder: str | Path, keep: tuple[Path | None, ...]) -> None:
    """Delete every checkpoint of a run but those in `keep` and of whole epochs, and what interrupted writes left."""
    home = Path(folder) / "checkpoints"
    epochs = _complete(folder, EPOCH)
    for path in list(home.iterdir()) if home.is_dir() else ():
        if path.name.startswith(".") and _NAME.match(path.name[1:]):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and _NAME.fullmatch(path.name) and path not in (*keep, *epochs):
            _remove(path)


def read_state(path: Path) -> Progress:
    """How far the run was at a checkpoint, from its `state.json`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    return _read_state(path)[0]


def checked(path: Path, name: str) -> Path:
    """The file `name` of a checkpoint, after a look at its checksum.

    Raises:
        CheckpointError: the file is missing, or is not as it was written.
    """
    _, checksums = _read_state(path)
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; {_advice(path.parent)}")
    if (found := _file_checksum(file)) != checksums.get(name):
        raise CheckpointError(
            f"{file} is damaged: its SHA-256 begins with {found[:12]}, expected {str(checksums.get(name))[:12]} as in "
            f"{STATE}; {_advice(path.parent)}"
        )
    return file


def read_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: the file is damaged, or names or shapes differ from the model's.
    """
    file = checked(path, WEIGHTS)
    try:
        model.load_state_dict(read_checkpoint(file)[0])
    except Exception as error:
        raise CheckpointError(
            f"{file} does not fit this {type(model).__name__}: {error}. "
            "Build the model from the run's own configuration"
        ) from error


def read_optimizer(path: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
    """Put the state in a checkpoint's `optimizer.pt` into an optimiser and, of fp16, the loss scaler.

    Nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit.
    """
    file = checked(path, OPTIMIZER)
    try:
        kept = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(kept["optimizer"])
        if scaler is not None and "scaler" in kept:
            scaler.load_state_dict(kept["scaler"])
    except Exception as error:  # torch lets many kinds through
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}); {_advice(path.parent)}"
        ) from error


def _complete(folder: str | Path, kind: str = "") -> list[Path]:
    home = Path(folder) / "checkpoints"
    found = (path for path in sorted(home.glob(f"{kind}*")) if _NAME.fullmatch(path.name))
    return [path for path in found if (path / STATE).is_file()]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _remove(path: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it has its name."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _read_state(path: Path) -> tuple[Progress, dict[str, str]]:
    """`state.json`, and the checksums of the other files in it."""
    file = path / STATE
    try:
        state = read_json(file, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_advice(path.parent)}") from error
    checksums = state.pop(_CHECKSUMS, None)
    own = checksums.pop(STATE, None) if isinstance(checksums, dict) else None
    if own is None or own != _checksum(state, checksums):
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its values; {_advice(path.parent)}")
    return Progress(**state), checksums


def _file_checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _checksum(*values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _advice(home: Path) -> str:
    return f"restore it from a copy, or delete {home} and start the run again: it then begins from the start"
