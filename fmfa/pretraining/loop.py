"""The loop of pre-training: it resumes from a file and ends with the same weights as without interruption."""

import json
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmfa.errors import CheckpointError, ConfigError, TrainingError
from fmfa.files import whole_file
from fmfa.models.outputs import Retriever
from fmfa.pretraining.pairs import PretrainingPairs, collate_pairs
from fmfa.progress import progress_bar

POINTS = 40  # of the curve; the resume file is written at each


def pretrain_model(
    model: Retriever,
    training: Callable[..., PretrainingPairs],
    held_out: Mapping[str, Tensor],
    settings: Mapping,
    resume: Path,
) -> tuple[list[dict], float]:
    """Train a model in place, each step on the next `batch_size` positions.

    Args:
        model: in training mode, on its device, with the weights to start from.
        training: of `first` and `count`, the pairs of those positions.
        held_out: batch on the device, for the curve.
        settings: of `fmfa.pretrain.pretrain`.
        resume: file that an interrupted training goes on from.

    Returns:
        The curve (pairs seen, losses and statistics of the step, R@1 of the held-out pairs, seconds so far), and the
        seconds of all sessions.

    Raises:
        ConfigError: the resume file is of other settings.
        CheckpointError: the resume file is damaged, or cannot be written.
        TrainingError: a loss is not finite.
    """
    started, batch_size = time.time(), settings["batch_size"]
    steps, step, spent = settings["pairs"] // batch_size, 0, 0.0
    curve: list[dict] = []
    optimizer = _optimizer(model, settings["learning_rate"], settings["weight_decay"])
    if resume.exists():
        step, curve, spent = _go_on(resume, settings, model, optimizer)
    every = max(1, steps // POINTS)
    device = next(model.parameters()).device
    loader = DataLoader(
        training(first=step * batch_size, count=(steps - step) * batch_size),
        batch_size,
        num_workers=settings["workers"],
        prefetch_factor=8 if settings["workers"] else None,
        collate_fn=collate_pairs,
        generator=torch.Generator(),
    )
    with progress_bar(steps, "pre-training", "steps", initial=step) as bar:
        for batch in loader:
            rate = settings["learning_rate"] * warmup_cosine_rate(step / steps, settings["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = {key: value.to(device) for key, value in batch.items()}
            outcome = train_step(model, optimizer, batch, (settings["seed"], step), settings["precision"])
            step += 1
            bar.update()
            if step % every == 0 or step == steps:
                losses, stats = ({name: round(value.item(), 4) for name, value in x.items()} for x in outcome)
                if not all(map(math.isfinite, losses.values())):
                    raise TrainingError(
                        f"a loss is not finite after {step * batch_size:,} pairs ({losses}); lower learning_rate, or "
                        f"take precision fp32. {resume.name} holds the point before, if there was one"
                    )
                seconds = round(spent + time.time() - started, 1)
                curve.append({"pairs": step * batch_size, "losses": losses, "stats": stats,
                              "held_out_R@1": held_out_recall(model, held_out), "seconds": seconds})  # fmt: skip
                bar.set_postfix(losses | {"held_out": curve[-1]["held_out_R@1"]})
                state = {"settings": dict(settings), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _write(state | {"step": step, "curve": curve, "seconds": seconds}, resume)
                print(json.dumps(curve[-1]), flush=True)
    return curve, round(spent + time.time() - started, 1)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    seed: tuple[int, int],
    precision: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One update; everything random in it derives from `seed` alone. Returns losses and statistics."""
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    if reseed := getattr(model, "reseed", None):
        reseed(number)
    with torch.random.fork_rng():  # dropout and drop path draw from the default generators
        torch.manual_seed(number)
        with torch.autocast(batch["images"].device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(batch)
        optimizer.zero_grad(set_to_none=True)
        sum(output.losses.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return output.losses, output.stats


@torch.no_grad()
def held_out_recall(model: Retriever, batch: Mapping[str, Tensor]) -> float:
    """R@1 of text to image among the pairs of a batch, in eval mode."""
    model.eval()
    image = nn.functional.normalize(model.encode_image(batch["images"]).embedding, dim=-1)
    text = nn.functional.normalize(model.encode_text(batch["caption_ids"]).embedding, dim=-1)
    model.train()
    return round(float(((text @ image.T).argmax(1) == torch.arange(len(text), device=text.device)).float().mean()), 4)


def warmup_cosine_rate(progress: float, warmup: float) -> float:
    """Return the learning-rate factor at a share of all steps: linear over the share `warmup`, then cosine to 0."""
    if progress < warmup:
        return (progress + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)


def _go_on(
    resume: Path, settings: Mapping, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict], float]:
    """Load what the resume file holds and return step, curve and seconds.

    The number of workers alone may differ from the settings, as it changes no number.
    """
    try:
        with zipfile.ZipFile(resume) as archive:  # torch does not compare the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it is damaged")
        state = torch.load(resume, weights_only=True)
        before = state["settings"]
        names = sorted({*before, *settings} - {"workers"})
        if not (changed := [name for name in names if before.get(name) != settings.get(name)]):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return state["step"], state["curve"], state["seconds"]
    except Exception as error:  # of a damaged file the readers raise nearly anything
        raise CheckpointError(
            f"{resume} is not what an interrupted pre-training left, or is damaged ({type(error).__name__}); "
            "remove it to begin from the start"
        ) from error
    raise ConfigError(
        f"{resume}: belongs to a pre-training with other settings ({', '.join(changed)}); "
        "repeat its settings to go on, or remove the file to begin from the start"
    )


def _write(state: Mapping, path: Path) -> None:
    try:
        with whole_file(path) as part:
            torch.save(dict(state), part)
    except (OSError, RuntimeError) as error:  # torch has one of its own for a full disk
        raise CheckpointError(
            f"{path} cannot be written ({error}); make room and give the same command again"
        ) from error
