"""The optimiser: parameter groups by name, their learning-rate factors, and the rate of an epoch."""

import math
from typing import Any

import torch
from torch import nn

from fmfa.errors import TrainingError
from fmfa.training.config import TrainConfig

IVT_START, IVT_END = 5e-5, 1e-5  # rates of IVT's schedule before its warm-up and after its last epoch


def rate_factor(name: str, factors: str) -> tuple[float, bool]:
    """Learning-rate factor of a parameter, and whether weight decay applies to it.

    Args:
        name: the parameter's name in the model.
        factors: "irra": names with `cross` x5; every bias x2, without decay; `classifier` and `mlm_head`
            x5 (their biases too, without decay). "ivt": every bias x2. "flat": 1 for all.
    """
    bias = "bias" in name
    if factors == "ivt":
        return (2.0 if bias else 1.0), True
    if factors == "flat":
        return 1.0, True
    if "classifier" in name or "mlm_head" in name:
        return 5.0, not bias
    if bias:
        return 2.0, False
    return (5.0 if "cross" in name else 1.0), True


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """The trainable parameters as (name, parameter) pairs, grouped by learning-rate factor and decay.

    Returns:
        Groups with `params`, `factor` and `weight_decay`, in the order of their first parameter.

    Raises:
        TrainingError: nothing in the model can be trained.
    """
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decays = rate_factor(name, config.factors)
        decay = config.weight_decay if decays else 0.0
        group = groups.setdefault((factor, decays), {"params": [], "factor": factor, "weight_decay": decay})
        group["params"].append((name, parameter))
    if not groups:
        raise TrainingError("every parameter of the model is frozen; expected something to train")
    return list(groups.values())


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam (decay added to the gradient, as in the papers), AdamW or SGD over `parameter_groups`.

    `config` is resolved. The rates are those of the first step; `set_learning_rate` changes them.

    Raises:
        TrainingError: nothing in the model can be trained.
    """
    groups = parameter_groups(model, config)
    optimizer: torch.optim.Optimizer
    # With fp16 a fused one leaves overflowing steps out by itself, and they could not be counted.
    fused = config.precision != "fp16"
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    else:
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        betas = (config.beta1, config.beta2)
        optimizer = kind(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)
    set_learning_rate(optimizer, config, 0)
    return optimizer


def learning_rate(config: TrainConfig, time: float, factor: float = 1.0) -> float:
    """Learning rate after `time` epochs for a group with `factor`; "linear" changes by step, the others by epoch."""
    base, epoch = config.learning_rate * factor, math.floor(time)
    if config.schedule in ("ivt", "ivt_from_1"):
        epoch += config.schedule == "ivt_from_1"
        return ivt_cosine(epoch, base=base, epochs=config.epochs, warmup_epochs=config.warmup_epochs)
    if config.schedule == "constant":
        return base
    length: dict[str, Any] = {"epochs": config.epochs, "warmup_epochs": config.warmup_epochs}
    length["warmup_factor"] = config.warmup_factor
    return base * (warmup_linear(time, **length) if config.schedule == "linear" else warmup_cosine(epoch, **length))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, time: float) -> None:
    """Give every parameter group its rate after `time` epochs."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, time, group["factor"])


def warmup_linear(time: float, *, epochs: int, warmup_epochs: float, warmup_factor: float) -> float:
    """Factor on the base rate after `time` of `epochs` epochs: up from `warmup_factor` to 1, then down to 0."""
    if time < warmup_epochs:
        return warmup_factor + (1 - warmup_factor) * time / warmup_epochs
    return (epochs - time) / (epochs - warmup_epochs)


def warmup_cosine(epoch: int, *, epochs: int, warmup_epochs: float = 5, warmup_factor: float = 0.1) -> float:
    """Factor on the base learning rate: linear warm-up, then a cosine that starts where the warm-up ends.

    `epoch` counts from 0. Epoch e < `warmup_epochs` has `warmup_factor` + (1 - `warmup_factor`) *
    e / `warmup_epochs`; epoch `warmup_epochs` has 1; after `epochs` epochs the factor would be 0. This is the recipe
    of IRRA and FMFA (60 epochs, 5 of warm-up, from 0.1, down to 0).
    """
    if epoch < warmup_epochs:
        return warmup_factor + (1 - warmup_factor) * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1), 1.0)
    return (1 + math.cos(math.pi * progress)) / 2


def ivt_cosine(
    epoch: int,
    *,
    base: float,
    epochs: int = 120,
    warmup_epochs: float = 5,
) -> float:
    """Learning rate (not a factor) of IVT's released recipe, for a parameter group with rate `base`.

    `epoch` counts from 0. The warm-up leads linearly from `IVT_START` to `base`; the cosine's clock runs
    from epoch 0, not from the end of the warm-up, and ends at `IVT_END` after `epochs` epochs, where it
    stays. Start and end are absolute rates, so a bias group of twice the base rate is not twice the curve.
    """
    if epoch < warmup_epochs:
        return IVT_START + epoch * (base - IVT_START) / warmup_epochs
    if epoch >= epochs:
        return IVT_END
    return IVT_END + (base - IVT_END) * (1 + math.cos(math.pi * epoch / epochs)) / 2
