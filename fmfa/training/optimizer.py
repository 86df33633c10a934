"""The optimiser: parameter groups by name, their learning-rate factors, and the rate of an epoch."""

import torch
from torch import nn

from fmfa.errors import TrainingError
from fmfa.training.config import TrainConfig
from fmfa.training.schedule import ivt_cosine, warmup_cosine


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

    `config` is resolved. The rates are those of epoch 0; `set_learning_rate` changes them by epoch.

    Raises:
        TrainingError: nothing in the model can be trained.
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    else:
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        betas = (config.beta1, config.beta2)
        optimizer = kind(groups, lr=config.learning_rate, betas=betas, eps=config.eps)
    set_learning_rate(optimizer, config, 0)
    return optimizer


def learning_rate(config: TrainConfig, epoch: int, factor: float = 1.0) -> float:
    """Learning rate of epoch `epoch` (from 0) for a group with `factor`, by the configured schedule."""
    base = config.learning_rate * factor
    if config.schedule in ("ivt", "ivt_from_1"):
        epoch += config.schedule == "ivt_from_1"
        return ivt_cosine(epoch, base=base, epochs=config.epochs, warmup_epochs=config.warmup_epochs)
    if config.schedule == "constant":
        return base
    return base * warmup_cosine(
        epoch,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_factor=config.warmup_factor,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, epoch: int) -> None:
    """Give every parameter group its rate of `epoch`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch, group["factor"])
