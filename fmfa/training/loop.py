"""Epochs and steps of a training run: losses, gradients, metrics, validation and checkpoints."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fmfa.errors import FmfaError, TrainingError
from fmfa.files import said_plainly
from fmfa.models.distributed import largest, total, world_size
from fmfa.models.outputs import ModelOutput, Retriever
from fmfa.progress import progress_bar
from fmfa.records import METRICS, MetricsLog
from fmfa.training.checkpoints import (
    EPOCH,
    WEIGHTS,
    Progress,
    best_checkpoint,
    checked,
    find_checkpoint,
    prune_checkpoints,
    read_optimizer,
    read_state,
    read_weights,
    write_checkpoint,
)
from fmfa.training.config import TrainConfig
from fmfa.training.optimizer import build_optimizer, set_learning_rate

SELECTION = "R@1"
NAMED = 8  # records described in an error message
READ_EVERY = 16  # steps between looks at losses and statistics on a GPU, which must wait for it
SMALLEST_SCALE = 1e-4  # of fp16's loss; a gradient that overflows even there is no matter of the scale


class Batches(Protocol):
    """Where training gets its batches; equal arguments must give equal batches."""

    def count(self, epoch: int) -> int:
        """Batches of an epoch, equal on all ranks."""

    def read(self, epoch: int, start: int) -> Iterable[dict[str, Tensor]]:
        """This rank's part of the epoch's batches from number `start` on, on the CPU."""

    def describe(self, rows: Tensor) -> list[str]:
        """The pictures and captions of the batch field `rows`, for an error message."""


@dataclass(frozen=True)
class _Step:
    """Which records a step read, what was found on each batch, and the gradient's norm, both on the device."""

    number: int
    group: tuple[dict[str, Tensor], ...]  # the batches' field `rows` alone: pictures of many steps would fill memory
    found: list[tuple[list[str], Tensor]]
    norm: Tensor


class TrainingLoop:
    """A run between its start, or its last complete checkpoint, and its end; see `fmfa.training.fit.fit`."""

    def __init__(
        self,
        config: TrainConfig,
        model: Retriever,
        batches: Batches,
        folder: Path,
        validate: Callable[[Retriever], Mapping[str, float]] | None,
        accelerator: Accelerator,
    ) -> None:
        """Load the last complete checkpoint of `folder`, if there is one; `config` is resolved.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit the model.
            TrainingError: the processes found different checkpoints.
        """
        self.config, self.batches, self.folder, self.validate = config, batches, folder, validate
        self.accelerator, self.model = accelerator, model
        optimizer = build_optimizer(model, config)
        last = find_checkpoint(folder, "last")
        self.progress = read_state(last) if last else Progress()
        best, metrics = best_checkpoint(folder, self.progress), b""
        if best is not None:
            checked(best, WEIGHTS)
        if last is not None:
            metrics = checked(last, METRICS).read_bytes()
            read_weights(last, model)
        self.prepared, self.optimizer = accelerator.prepare(model, optimizer)
        self.forward = torch.compile(self.prepared) if config.compile else self.prepared
        if last is not None:
            read_optimizer(last, self.optimizer, accelerator.scaler)
        self.unread: list[_Step] = []
        self._agree()  # also a barrier: nothing may be deleted before every rank has read it
        self.metrics = None
        if accelerator.is_main_process:
            prune_checkpoints(folder, (last, best))
            self.metrics = MetricsLog(folder, metrics)

    def run(self) -> None:
        """Train up to the last epoch; without any, the weights that the run starts with are its result.

        Raises:
            TrainingError: the loss or the gradient is not finite.
            CheckpointError: a checkpoint cannot be written.
        """
        if self.validate and self.progress.step == 0:
            found = self._validate()
            self._log("val", 0, found)
            if self.config.epochs == 0:
                self._select(found)
        if self.config.epochs == 0:
            self._checkpoint()
        while self.progress.epoch < self.config.epochs:
            self._epoch()

    def where_it_stopped(self) -> str:
        """A sentence for a reader who interrupted the run."""
        last = find_checkpoint(self.folder, "last")
        start = f"from {last.name}" if last else "from the beginning (no checkpoint was due yet)"
        return (
            f"interrupted in epoch {self.progress.epoch + 1} of {self.config.epochs} after step "
            f"{self.progress.step}; starting the same run in {self.folder} again goes on {start}"
        )

    def _agree(self) -> None:
        step = self.progress.step
        newest, oldest = largest(torch.tensor([step, -step], device=self.accelerator.device)).tolist()
        if newest != -oldest:
            raise TrainingError(
                f"the processes found the run in {self.folder} at steps {-oldest} to {newest}, this one at {step}; "
                "the run folder must be one that all machines share"
            )

    def _epoch(self) -> None:
        config, progress = self.config, self.progress
        epoch, count = progress.epoch, self.batches.count(progress.epoch)
        self.prepared.train()
        shown = self.accelerator.is_main_process
        title = f"epoch {epoch + 1}/{config.epochs}"
        bar = progress_bar(count, title, "batches", initial=progress.batch, shown=shown)
        with bar:
            read = self.batches.read(epoch, progress.batch) if progress.batch < count else ()
            for group in _groups(read, config.accumulate):
                begun = time.perf_counter()
                set_learning_rate(self.optimizer, config, epoch + progress.batch / count)
                self._step(group)
                progress.step += 1
                progress.batch += len(group)
                every = config.checkpoint_every
                due = bool(every) and progress.step % every == 0 and progress.batch < count
                if due or progress.batch >= count:
                    self._read()
                self._add({"seconds": time.perf_counter() - begun})
                bar.update(len(group))
                if due:
                    self._checkpoint()
        self._end_epoch()

    def _end_epoch(self) -> None:
        config, progress = self.config, self.progress
        sums, steps = progress.sums, progress.sums["steps"]
        values = {name: value / steps for name, value in sums.items() if name not in ("seconds", "steps")}
        values |= {"learning_rate": self._rate(), "seconds": sums["seconds"]}
        progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, {}
        self._log("train", progress.epoch, values)
        found = {}
        if self.validate and (progress.epoch % config.evaluate_every == 0 or progress.epoch == config.epochs):
            found = self._validate()
            self._log("val", progress.epoch, found)
            self._select(found)
        if config.keep_epochs:
            self._write(EPOCH)
        self._checkpoint()
        text = f"epoch {progress.epoch}/{config.epochs}: loss {values['loss/total']:.4f}"
        text += f", validation {SELECTION} {100 * found[SELECTION]:.1f} %" if found else ""
        self.accelerator.print(f"{text}, {sums['seconds']:.0f} s")

    def _select(self, found: Mapping[str, float]) -> None:
        progress = self.progress
        if progress.best is None or found[SELECTION] > progress.best:
            progress.best, progress.best_epoch = found[SELECTION], progress.epoch
            self._write("best")

    def _step(self, group: tuple[dict[str, Tensor], ...]) -> None:
        config, accelerator, step = self.config, self.accelerator, self.progress.step
        seeds = np.random.SeedSequence((config.seed, step))
        if reseed := getattr(self.model, "reseed", None):
            reseed(int(seeds.generate_state(1)[0]))
        ranks = np.random.SeedSequence((config.seed, step, 1 + accelerator.process_index))
        torch.manual_seed(int(ranks.generate_state(1)[0]))
        every = config.log_gradients_every
        found: list[tuple[list[str], Tensor]] = []
        self.optimizer.zero_grad()
        for number, batch in enumerate(group, start=1):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            with nullcontext() if number == len(group) else accelerator.no_sync(self.prepared):
                logged = bool(every) and step % every == 0 and number == 1
                # outputs of a compiled graph are no functions of each other: losses would have no gradient in features
                output: ModelOutput = (self.prepared if logged else self.forward)(batch)
                found.append(self._values(output))
                if logged:
                    self._log("gradient", self.progress.epoch, gradient_norms(output))
                accelerator.backward(sum(output.losses.values()) / len(group))
        rows = tuple({name: value for name, value in batch.items() if name == "rows"} for batch in group)
        self.unread.append(_Step(step, rows, found, self._clip()))
        if len(self.unread) >= _steps_unread(accelerator):
            self._read()
        self.optimizer.step()
        if accelerator.scaler is not None:
            self._add({"skipped_steps": float(self.optimizer.step_was_skipped)})

    def _values(self, output: ModelOutput) -> tuple[list[str], Tensor]:
        """Names and values of losses and stats, the mean over ranks, so that all see the NaN of one; on the device."""
        parts: dict[str, float | Tensor] = {f"loss/{name}": value for name, value in output.losses.items()}
        parts |= {"loss/total": sum(output.losses.values()), **output.stats}
        device = self.accelerator.device
        numbers = [torch.as_tensor(value, device=device).detach().double() for value in parts.values()]
        return list(parts), total(torch.stack(numbers)) / world_size()

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is clipped if configured."""
        self.accelerator.unscale_gradients(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        return norm

    def _read(self) -> None:
        """Add what the steps since the last call found to the epoch's sums; only here a GPU is waited for.

        Raises:
            TrainingError: a loss, a statistic or a gradient is not finite; the first step with one is named.
        """
        steps, self.unread = self.unread, []
        every = [value for step in steps for value in (*(values for _, values in step.found), step.norm.double()[None])]
        numbers = iter(torch.cat(every).tolist() if every else ())
        for step in steps:
            sums: dict[str, float] = {}
            for batch, (names, _) in zip(step.group, step.found, strict=True):
                named = {name: next(numbers) for name in names}
                broken = [name for name, value in named.items() if not math.isfinite(value)]
                if broken:
                    what = "the loss" if "loss/total" in broken else f"the statistic {broken[0]}"
                    losses = ", ".join(f"{k.removeprefix('loss/')} {named[k]}" for k in named if k.startswith("loss/"))
                    self._stop(f"{what} is not finite ({losses})", step.number, [batch])
                for name, value in named.items():
                    sums[name] = sums.get(name, 0.0) + value / len(step.group)
            norm, scaler = next(numbers), self.accelerator.scaler
            if not math.isfinite(norm):
                if scaler is None or scaler.get_scale() < SMALLEST_SCALE:
                    what = f"the gradient is not finite (norm {norm}; loss {sums['loss/total']})"
                    self._stop(what, step.number, step.group)
                norm = 0.0  # the scaler leaves this step out and lowers its scale
            self._add({**sums, "gradient_norm": norm, "steps": 1.0})

    def _add(self, values: Mapping[str, float]) -> None:
        sums = self.progress.sums
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value

    def _stop(self, what: str, step: int, group: Iterable[Mapping[str, Tensor]]) -> None:
        rows = torch.cat([batch["rows"].cpu() for batch in group]) if all("rows" in b for b in group) else None
        records = "unknown (the batch has no field rows)"
        if rows is not None:
            named = self.batches.describe(rows)
            more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
            records = f"rows {rows.tolist()}: " + "; ".join(named[:NAMED]) + more
        raise TrainingError(
            f"{what} in epoch {self.progress.epoch + 1}, step {step + 1}, at learning rate "
            f"{self._rate():g} in {self.config.precision}. Batch: {records}. Look at these records, lower the "
            "learning rate, or train in fp32; the last checkpoint holds the weights before"
        )

    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _validate(self) -> dict[str, float]:
        assert self.validate is not None
        self.prepared.eval()
        progress, reason = self.progress, ""
        try:
            with torch.no_grad():
                found = {name: float(value) for name, value in self.validate(self.model).items()}
        except FmfaError:
            raise
        except ValueError as error:  # of similarities that are not finite
            found, reason = {SELECTION: math.nan}, f" ({error})"
        if SELECTION not in found:
            raise TrainingError(
                f"validation returned {', '.join(found) or 'nothing'}; expected {SELECTION} among it, "
                "which selects the best epoch"
            )
        if not math.isfinite(found[SELECTION]):
            raise TrainingError(
                f"{SELECTION} of the validation after epoch {progress.epoch}, step {progress.step} is "
                f"{found[SELECTION]}{reason}: the weights or what the model makes of them are no longer numbers, at "
                f"learning rate {self._rate():g} in {self.config.precision}. Lower the learning rate, or train in "
                "fp32; the last checkpoint holds the weights before"
            )
        return found

    def _log(self, split: str, epoch: int, values: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.add(split, epoch, self.progress.step, values)
        tagged = {f"{split}/{name}": value for name, value in values.items()}
        with said_plainly(f"{self.folder / 'logs'} cannot be written", TrainingError):
            self.accelerator.log(tagged, step=self.progress.step)

    def _checkpoint(self) -> None:
        if self.metrics is not None:
            self.progress.metrics_size = self.metrics.flushed_size()
            last = self._write("last")
            prune_checkpoints(self.folder, (last, best_checkpoint(self.folder, self.progress)))
        self.accelerator.wait_for_everyone()

    def _write(self, kind: str) -> Path | None:
        if not self.accelerator.is_main_process:
            return None
        kept = None
        if kind == "last":
            kept = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                kept["scaler"] = self.accelerator.scaler.state_dict()
        return write_checkpoint(self.folder, kind, self.model, self.progress, kept)


def _steps_unread(accelerator: Accelerator) -> int:
    """Steps between looks at what was found: 1 where nothing is waited for, or where the loss scale waits anyway."""
    return 1 if accelerator.device.type == "cpu" or accelerator.scaler is not None else READ_EVERY


def _groups(batches: Iterable, size: int) -> Iterator[tuple]:
    batches = iter(batches)
    while group := tuple(islice(batches, size)):
        yield group


def gradient_norms(output: ModelOutput) -> dict[str, float]:
    """L2 norm of the gradient that each loss sends into each shared feature, over all ranks.

    Returns:
        "LOSS/FEATURE" -> norm; 0 where a loss does not reach a feature.
    """
    names, features = zip(*output.features.items(), strict=True)
    squares = []
    for loss in output.losses.values():
        gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        squares += [loss.new_zeros(()) if g is None else g.float().square().sum() for g in gradients]
    # each rank's loss is the joint batch's, so a feature's gradient is counted once a rank
    norms = (total(torch.stack(squares)).sqrt() / world_size()).tolist()
    keys = [f"{loss}/{name}" for loss in output.losses for name in names]
    return dict(zip(keys, norms, strict=True))
