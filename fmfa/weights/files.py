"""Reading weight files without running what is in them: safetensors, torch files, TorchScript archives."""

import argparse
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fmfa.errors import CheckpointError

OUTER_KEYS = ("model", "state_dict")
PREFIX = "module."
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

    Reads safetensors, files of `torch.save` (with `weights_only`, so no code runs) and TorchScript
    archives such as OpenAI's CLIP files (only their tensors; the code in the archive is never executed).
    An outer `model` or `state_dict` key and a `module.` prefix are taken away.

    Raises:
        CheckpointError: no such file, not a weight file, or one that only unsafe loading could read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a local weight file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif _is_torchscript(path):
            content = _read_torchscript(path)
        else:
            with torch.serialization.safe_globals(_harmless_globals()):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read safely ({reason}). Expected safetensors, a torch file that holds "
            "nothing but tensors and plain values, or a TorchScript archive. If you trust the file, save "
            "its state dict again with torch.save or safetensors"
        ) from error
    for key in OUTER_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if (isinstance(content, dict))
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name; expected a state dict")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def _harmless_globals() -> list:
    """Classes that training codes leave in checkpoints and whose reconstruction runs no code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.dtype(kind) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [
        argparse.Namespace,
        np.dtype,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
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
        super().__init__(archive.open(f"{root}/data.pkl"))
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
