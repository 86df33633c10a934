"""Which device a notebook or a training works on."""

import torch

from fmfa.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device of a parameter `device`: "auto" is a GPU where there is one.

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
