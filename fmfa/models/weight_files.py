"""Reading weight files without running what is in them: safetensors, torch files, TorchScript archives."""

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fmfa.errors import CheckpointError

OUTER_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")
WRAPPERS = ("module", "_orig_mod")  # of DataParallel and torch.compile, at any depth of a name
SETTINGS = ("easydict.EasyDict", "yacs.config.CfgNode")  # dictionaries that training codes keep beside the weights
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file by name, on the CPU.

    Reads safetensors, files of `torch.save` (with `weights_only`, so no code runs) and TorchScript archives such as
    OpenAI's CLIP files (only their tensors; the code in the archive is never executed), each known by its content,
    whatever the file's name. What only wraps a state dict is taken away: an outer key (`OUTER_KEYS`, or any other if
    it is the only one that holds tensors), `module.` and `_orig_mod.` in names, and `model.` before them.

    Raises:
        CheckpointError: no such file, not a weight file, damaged, one that only unsafe loading could read, or one
            whose tensors have no, equal or unprintable names.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a local weight file")
    try:
        content = _read(path)
    except Exception as error:  # of a damaged file the readers raise nearly anything
        raise CheckpointError(
            f"{path}: cannot be read safely ({_reason(path, error)}). Expected safetensors, a torch file that holds "
            "nothing but tensors and plain values, or a TorchScript archive"
        ) from None  # torch's own message advises unsafe loading
    state = _state_dict(content)
    if not state:
        held = f"a dictionary with {_listed(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{path}: holds no tensors by name; expected a state dict, alone or under {', '.join(OUTER_KEYS)}, "
            f"found {held}"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = _unwrapped(str(name))
        if plain in tensors or not plain.isprintable():
            what = "two tensors named" if plain in tensors else "a tensor with the unprintable name"
            raise CheckpointError(f"{path}: holds {what} {plain!r}; expected a state dict with a name for each tensor")
        tensors[plain] = value
    return tensors


def require_numbers(name: str, tensor: Tensor, source: str | Path) -> None:
    """Refuse a tensor that a model cannot hold.

    Raises:
        CheckpointError: it is sparse, without values, not of a floating-point type, or not finite everywhere.
    """
    kind = ""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "sparse" if "sparse" in str(tensor.layout) else "without dense values"
    elif not tensor.is_floating_point():
        kind = f"of type {str(tensor.dtype).removeprefix('torch.')}"
    elif wrong := tensor.numel() - int(tensor.float().isfinite().sum()):
        kind = f"not finite in {wrong:,} of {tensor.numel():,} values (NaN or infinity)"
    if kind:
        raise CheckpointError(
            f"{source}: tensor {name} is {kind}; expected dense finite floating-point numbers. The file is damaged, "
            "or no checkpoint of a sound training: take another one"
        )


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:  # safetensors' header
            return load_file(path)
        file.seek(0)
        if _is_torchscript(path):
            return _read_torchscript(path)
        with torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to report files that are no weights
            return torch.load(file, map_location="cpu", weights_only=True)


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, in the words of a reader who has only the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with path.open("rb") as file:
        start = file.read(200)
    if start.lstrip().startswith(b"<"):
        return "it is a web page: the download gave a page to read or to log in, so fetch the file itself again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the file itself with git lfs pull"
    if needed := re.search(r"GLOBAL (\S+) (?:was|whose)|refers to (\S+),", str(error)):
        return f"it refers to {needed[1] or needed[2]}, which is not allowed because it could run code"
    is_weights = start[8:9] == b"{" or start.startswith((b"PK", b"\x80"))
    return "damaged, cut short or of another kind" if is_weights else f"it begins with {start[:20]!r}"


def _state_dict(content: Any, depth: int = 3) -> dict[Any, Tensor] | None:
    """The tensors of a state dict by name, inside of what a training code saved around it; None without any."""
    if not isinstance(content, dict) or not depth:
        return None
    for key in OUTER_KEYS:
        if tensors := _state_dict(content.get(key), depth - 1):
            return tensors
    if tensors := _tensors(content):
        return tensors
    inside = [tensors for value in content.values() if (tensors := _tensors(value))]
    return inside[0] if len(inside) == 1 else None


def _tensors(content: Any) -> dict[Any, Tensor]:
    entries = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in entries if isinstance(value, Tensor)}


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "model":
        parts = parts[1:]
    return ".".join(parts)


def _listed(content: Mapping) -> str:
    return ", ".join(repr(key) for key in list(content)[:8]) or "nothing"


def _harmless_globals() -> list:
    """Classes that training codes leave in checkpoints and whose reconstruction runs no code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.dtype(kind) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [
        argparse.Namespace,
        np.dtype,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        *((OrderedDict, name) for name in SETTINGS),
        *{type(kind) for kind in kinds},
    ]


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _ScriptObject:
    """Stands for any TorchScript class: holds what the archive says its attributes are."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds the object tree of a TorchScript archive from an allow-list; runs no code of it."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return _ScriptObject
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"the archive refers to {module}.{name}, which is not allowed")

    def persistent_load(self, identifier: tuple) -> Tensor:
        _, dtype, key, _, count = identifier
        raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        if len(raw) < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} is cut short")
        return torch.frombuffer(raw, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).split("/")[0]
        tree = _TensorUnpickler(archive, root).load()
    tensors: dict[str, Tensor] = {}

    def collect(node: object, prefix: str) -> None:
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _ScriptObject):
                collect(value, f"{prefix}{name}.")

    collect(tree, "")
    return tensors
