"""A run's checkpoints: folders that are either complete or not there, the last, the best, on request every epoch's."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmfa.errors import CheckpointError
from fmfa.files import flush, write_json
from fmfa.weights.own import read_checkpoint, save_checkpoint

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
EPOCH = "epoch"  # kind of the checkpoints that stay


def write_checkpoint(
    folder: str | Path,
    kind: str,
    model: nn.Module,
    state: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write `checkpoints/KIND-STEP` under the run folder; it appears under that name when complete.

    Args:
        folder: the run folder.
        kind: "last", "best" or "epoch".
        model: its state dict goes to `model.safetensors`, its attribute `config` (if any) to the record.
        state: plain values with at least `step`, for `state.json`.
        optimizer: state dicts for `optimizer.pt`, tensors and plain values only.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); earlier ones are as before.
    """
    home = Path(folder) / "checkpoints"
    target = home / f"{kind}-{state['step']:08d}"
    unfinished = home / f".{target.name}.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        shape = getattr(model, "config", None)
        shape = asdict(shape) if is_dataclass(shape) else shape
        done = {name: state[name] for name in ("epoch", "step") if name in state}
        record = {"class": type(model).__name__, "model": shape, **done}
        save_checkpoint(unfinished / WEIGHTS, model, record)
        if optimizer is not None:
            torch.save(dict(optimizer), unfinished / OPTIMIZER)
        write_json(unfinished / STATE, dict(state))
        for file in (*unfinished.iterdir(), unfinished):
            flush(file)
        if target.exists():
            shutil.rmtree(target)
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
    return max((path for path in _complete(folder) if path.name.startswith(f"{kind}-")), default=None)


def selected_checkpoint(folder: str | Path) -> Path:
    """The checkpoint to evaluate: the best on validation, or the last of a run without validation.

    Raises:
        CheckpointError: the run has no complete checkpoint.
    """
    path = find_checkpoint(folder, "best") or find_checkpoint(folder, "last")
    if path is None:
        raise CheckpointError(
            f"{folder} has no complete checkpoint under checkpoints/; expected last-* or best-*: "
            "train it first, or give another run folder"
        )
    return path


def epoch_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a run's epochs, numbered from 1, in their order; empty unless it kept them (`keep_epochs`)."""
    return {read_state(path)["epoch"]: path for path in _complete(folder) if path.name.startswith(f"{EPOCH}-")}


def prune_checkpoints(folder: str | Path, keep: tuple[Path | None, ...]) -> None:
    """Delete every checkpoint of a run but those in `keep` and of whole epochs, and what interrupted writes left."""
    home = Path(folder) / "checkpoints"
    for path in home.iterdir() if home.is_dir() else ():
        if path.is_dir() and path not in keep and not path.name.startswith(f"{EPOCH}-"):
            shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE} cannot be read ({error}); delete the folder {path}") from error


def read_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: the file is damaged, or names or shapes differ from the model's.
    """
    try:
        model.load_state_dict(read_checkpoint(path / WEIGHTS)[0])
    except Exception as error:
        raise CheckpointError(
            f"{path / WEIGHTS} does not fit this {type(model).__name__}: {error}. "
            "Build the model from the run's own configuration"
        ) from error


def read_optimizer(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state dicts in a checkpoint's `optimizer.pt`, loaded without executing anything in the file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path / OPTIMIZER, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path / OPTIMIZER} cannot be read: {error}") from error


def _complete(folder: str | Path) -> list[Path]:
    home = Path(folder) / "checkpoints"
    return sorted(path for path in home.glob("[!.]*-*") if (path / STATE).is_file())
