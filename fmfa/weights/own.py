"""Own weight files: safetensors with a record of what the weights are and how they came about."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fmfa.errors import CheckpointError
from fmfa.files import whole_file
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtRetriever
from fmfa.weights.files import require_numbers


def save_checkpoint(path: str | Path, weights: nn.Module | Mapping[str, Tensor], record: Mapping) -> None:
    """Write weights as safetensors with their record, and the record once more as JSON beside it.

    Each file is written to a temporary name, flushed to disk and renamed, so an interruption leaves the
    old or the new checkpoint, never half of one. The safetensors file carries its own record, so the two
    cannot disagree.

    Args:
        path: ends in `.safetensors`; the JSON file has the same stem.
        weights: a module or its state dict.
        record: what JSON can hold; a retriever's `config` belongs under "model".

    Raises:
        CheckpointError: another suffix, or a record that JSON cannot hold.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: own checkpoints end in .safetensors")
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the record cannot be written as JSON: {error}") from error
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        save_file(state, part, metadata={"record": text})
    with whole_file(path.with_suffix(".json")) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Weights (on the CPU) and record of an own checkpoint.

    Raises:
        CheckpointError: no such file, not safetensors, or without a record.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except Exception as error:  # of a damaged file the readers raise nearly anything
        raise CheckpointError(
            f"{path}: not a checkpoint of this project ({type(error).__name__}: {error}); expected a "
            ".safetensors file with its record"
        ) from error


def recorded_model(path: str | Path) -> dict:
    """What an own checkpoint records of its model; empty for any other file or source."""
    with suppress(Exception), safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["record"])["model"])
    return {}


def recorded_grid(path: str | Path) -> tuple[int, int] | None:
    """Rows and columns of patches in the model of an own checkpoint; None where that is not known."""
    model = recorded_model(path)
    with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        patch = model["patch"] if "patch" in model else model["backbone"]["vision_cfg"].get("patch_size", 16)
        height, width = ((int(side) - patch) // model["stride"] + 1 for side in model["image_size"])
        return height, width
    return None


def load_retriever(path: str | Path) -> tuple[ClipRetriever | IvtRetriever, dict]:
    """Rebuild the retriever of an own checkpoint whose record has its `config` under "model".

    A configuration with a `backbone` is a `ClipRetriever`'s, one with a `patch` an `IvtRetriever`'s.

    Returns:
        The model in evaluation mode, and the record.

    Raises:
        CheckpointError: not such a checkpoint, or weights that do not fit the recorded model or are not dense finite
            floating-point numbers.
    """
    state, record = read_checkpoint(path)
    for name, tensor in state.items():
        require_numbers(name, tensor, path)
    try:
        model = _kind(record["model"]).from_config(record["model"])
        model.load_state_dict(state)
    except Exception as error:  # a record holds anything
        raise CheckpointError(f"{path}: its record does not describe its weights: {error}") from error
    return model.eval(), record


def _kind(config: Mapping) -> type[ClipRetriever] | type[IvtRetriever]:
    for name, kind in (("backbone", ClipRetriever), ("patch", IvtRetriever)):
        if name in config:
            return kind
    raise KeyError(f"{', '.join(config)}: neither a two-stream model's `backbone` nor IVT's `patch` among them")
