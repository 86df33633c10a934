"""Where a number came from: package versions, commit, device and a fingerprint of the data."""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from fmfa.data.annotations import Dataset

PACKAGES = (
    *("fmfa", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers"),
    *("accelerate", "safetensors", "numpy", "pandas", "pillow", "scipy", "statsmodels"),
)


def package_versions() -> dict[str, str | None]:
    """Version of Python and of each package that can change a number; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(folder: str | Path | None = None) -> dict[str, str | bool | None]:
    """Commit and dirty flag of the checkout that `folder` (the project's by default) is the root of.

    Both are None outside a checkout, without git, or (commit) before the first commit. A notebook counts by the code in
    it: Jupyter rewrites the rest of a file that is only looked at.
    """
    root = Path(folder) if folder else Path(__file__).resolve().parent.parent
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


def data_fingerprint(dataset: Dataset, sample: int = 64) -> str:
    """SHA-256 (hex) over the table's image, identity, split and caption columns and some pictures' bytes.

    Args:
        dataset: what is trained on.
        sample: how many pictures are read, evenly spaced over the sorted paths; a missing file counts as
            such, so that the fingerprint exists for any data set.
    """
    digest = hashlib.sha256()
    for column in ("image", "identity", "split", "caption"):
        values = [str(value).encode() for value in dataset.table[column]]
        digest.update(f"{column} {len(values)}\n".encode())
        for value in values:
            digest.update(len(value).to_bytes(8, "little") + value)
    paths = sorted(set(dataset.table["image"]))
    for index in np.unique(np.linspace(0, len(paths) - 1, min(sample, len(paths))).astype(int)):
        file = Path(dataset.images) / paths[index]
        content = file.read_bytes() if file.is_file() else b"missing"
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


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
    settings = {"capture_output": True, "timeout": 30, "encoding": "utf-8", "errors": "surrogateescape"}
    try:
        result = subprocess.run(["git", "-C", str(folder), *command], **settings)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
