"""Which device a notebook or a training works on, and that it computes there what it computed before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fmfa.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device of a parameter `device`: "auto" is a GPU if available.

    A chosen GPU multiplies in float32 as a CPU does: cuDNN's convolutions would otherwise round their inputs to TF32.

    Raises:
        ConfigError: another name, or "cuda" without a GPU.
    """
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}; expected one of {', '.join(DEVICES)}")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device is 'cuda', but torch sees no GPU; take 'cpu' or 'auto'")
    if name == "cpu" or not there:
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Hold torch to deterministic algorithms on a GPU, so that the same training gives the same bits, as on a CPU.

    An operation without one raises RuntimeError where it is called (torch: `use_deterministic_algorithms`).
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
