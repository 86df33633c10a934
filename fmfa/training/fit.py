"""Training a retrieval model: one call for any model, on a CPU, one GPU or several processes, resumable."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, get_int_from_env, parse_flag_from_env
from torch import nn

from fmfa.data.annotations import Dataset, data_fingerprint
from fmfa.data.check import check_dataset
from fmfa.devices import choose_device, repeatable
from fmfa.errors import ConfigError, TrainingError
from fmfa.files import held_folder, read_json, said_plainly, whole_file, write_json
from fmfa.models.distributed import world_size
from fmfa.models.outputs import Retriever
from fmfa.records import device_name, read_record, run_record
from fmfa.text.bytepair import Tokenizer
from fmfa.training.batches import TableBatches
from fmfa.training.config import TrainConfig
from fmfa.training.loop import Batches, TrainingLoop

CONFIG = "config.json"
FREE = ("root", "cache", "device", "workers", "checkpoint_every", "keep_epochs", "log_gradients_every", "tensorboard")
"""Settings that may change when a run is resumed: they do not touch the weights it ends with."""
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
COMMANDS = (
    "torchrun --nproc-per-node N -m fmfa.train ...  or  accelerate launch --multi_gpu --num_processes N "
    "--num_machines 1 -m fmfa.train ...  (both work on GPUs, and on a CPU as well)"
)


def fit(
    config: TrainConfig,
    model: Retriever,
    batches: Callable[[int, int], Batches],
    folder: str | Path,
    *,
    validate: Callable[[Retriever], Mapping[str, float]] | None = None,
    data: str = "",
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Train a model, or go on with the run that `folder` holds.

    Weights, metrics and records go to `folder`: `config.json`, `run.json`, `weights.txt`, `metrics.csv`, `logs/` and
    `checkpoints/` (the last, and the best by validation R@1; the earlier epoch wins a tie; with
    `keep_epochs` the weights after every epoch as well). A run
    that was interrupted anywhere continues from its last complete checkpoint and ends, on the same
    machine with the same number of processes, with the same weights bit by bit. A finished run is left
    alone. All randomness inside the model is restarted every step from (seed, step, rank); a model with a
    method `reseed(seed)` gets (seed, step), equal on all ranks.

    Args:
        config: what to do; the preset's values are filled in here.
        model: forward takes a batch and returns a `ModelOutput`. It is trained in place.
        batches: gives the training data of (rank, number of processes).
        folder: the run folder, made when it is not there.
        validate: called with the model in evaluation mode on every rank (the models' encoders
            communicate); the metrics of rank 0 count and must contain R@1. Before training as well.
        data: fingerprint of the data; a resumed run must have the same.
        texts: what else the run folder keeps, by file name.

    Returns:
        The run folder.

    Raises:
        ConfigError: the machine cannot do what the configuration asks, or the folder cannot be made.
        TrainingError: the folder holds another run, another process trains in it, it cannot be written to, or the loss,
            its gradient or the validation is not finite.
        CheckpointError: a checkpoint cannot be written, or is damaged.
        KeyboardInterrupt: Ctrl-C, with a message that says where the run will go on.
    """
    config, folder = config.resolved(), Path(folder)
    _refuse_other_run(config, folder, data)
    if read_record(folder).get("status") == "finished":
        return folder
    accelerator = build_accelerator(config, folder)
    with said_plainly(f"the run folder {folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        notes = {}
        if accelerator.is_main_process:
            held.enter_context(held_folder(folder, TrainingError))
            with said_plainly(f"{folder} cannot be written to", TrainingError):
                write_json(folder / CONFIG, config.to_dict())
                for name, text in (texts or {}).items():
                    with whole_file(folder / name) as part:
                        part.write_text(text, encoding="utf-8")
            about = {"seed": config.seed, "data": data, "device": device_name(accelerator.device)}
            about |= {"config": config.to_dict(), "processes": accelerator.num_processes}
            notes = held.enter_context(run_record(folder, **about))
        held.enter_context(repeatable(accelerator.device))
        held.enter_context(_restored(accelerator, model))
        share = batches(accelerator.process_index, accelerator.num_processes)
        loop = TrainingLoop(config, model, share, folder, validate, accelerator)
        if config.tensorboard:
            purge = {"purge_step": loop.progress.step}
            with said_plainly(f"{folder / 'logs'} cannot be written", TrainingError):
                accelerator.init_trackers("", init_kwargs={"tensorboard": purge})
        try:
            loop.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(loop.where_it_stopped()) from None
        done = loop.progress
        notes |= {"best": done.best, "best_epoch": done.best_epoch, "steps": done.step}
    return folder


def train(
    config: TrainConfig,
    model: Retriever,
    dataset: Dataset,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    validate: Callable[[Retriever], Mapping[str, float]] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Train a model on the training split of a data set, after a look at the data; see `fit`.

    The pictures are not decoded for that look (`fmfa.data.check` does it), only looked for. Its warnings are printed.

    Raises:
        TrainingError: the data check calls the data unusable; and what `fit` raises.
    """
    config = config.resolved()
    report = check_dataset(dataset, tokenizer=tokenizer, decode=False, progress=False)
    if report.fatal:
        details = report.table["detail"][report.table["severity"] == "fatal"]
        raise TrainingError(f"{report.verdict} {' '.join(details)}")
    if launched_rank() == 0:
        for row in report.table[report.table["severity"] == "warning"].itertuples():
            print(f"warning: {row.check}: {row.detail}")
    wanted = getattr(model, "objectives", None)
    masked, parts = bool(wanted and wanted.needs_mask), bool(wanted and wanted.needs_parts)

    def batches(rank: int, processes: int) -> TableBatches:
        return TableBatches(config, dataset, tokenizer, masked=masked, parts=parts, rank=rank, processes=processes)

    return fit(config, model, batches, folder, validate=validate, data=data_fingerprint(dataset), texts=texts)


def run_config(folder: str | Path) -> TrainConfig:
    """The resolved configuration that a run folder keeps.

    Raises:
        TrainingError: there is none, or it is damaged.
    """
    path = Path(folder) / CONFIG
    try:
        # resolved once more, so that a run from before a setting existed has that setting's default
        return TrainConfig.from_dict(read_json(path)).resolved()
    except ConfigError as error:
        raise TrainingError(f"{path} is no run's configuration ({error}); take another run folder") from error


def _refuse_other_run(config: TrainConfig, folder: Path, data: str) -> None:
    if not (folder / CONFIG).is_file():
        return
    kept, record = run_config(folder).to_dict(), read_record(folder)
    if record.get("status") == "unreadable":
        raise TrainingError(
            f"{record['error']}. Restore it, or delete it: the run then goes on, but nothing tells whether it was "
            "started on these data"
        )
    differ = [
        f"{name} {kept[name]!r} there, {value!r} now"
        for name, value in config.to_dict().items()
        if name not in FREE and kept[name] != value
    ]
    known = record.get("data", data)
    if known != data:
        differ.append(f"data fingerprint {known[:12]!r} there, {data[:12]!r} now")
    if differ:
        raise TrainingError(
            f"{folder} holds another run: {'; '.join(differ)}. Give a new folder, or the old values to go on"
        )


@contextlib.contextmanager
def _restored(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Leave the random state and the model's forward as they were, and close the trackers."""
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for tracker in accelerator.trackers:
            with contextlib.suppress(OSError):  # the metrics are in the run's own file
                tracker.finish()
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)


def launched_rank() -> int:
    """This process' number as its launcher (torchrun, accelerate, MPI, Slurm) gave it; 0 without one."""
    return get_int_from_env(RANKS, 0)


def launched_processes() -> int:
    """The number of processes that the environment speaks of; 1 when it speaks of none.

    Raises:
        ConfigError: `accelerate launch` was told to start several and started one.
    """
    alone = not any(name in os.environ for name in SIZES)
    # accelerate sets the precision always, but the address only for several processes, which on a CPU it
    # leaves to mpirun
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch was told to train in several processes and started one (MASTER_ADDR is set, "
            "WORLD_SIZE is not): with --cpu, or where it finds no second GPU, it leaves them to mpirun. "
            f"Expected: {COMMANDS}. For one process leave out --num_processes, and unset MASTER_ADDR"
        )
    return get_int_from_env(SIZES, 1)


def build_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Accelerate's view of this process among all that train, on the device and in the precision configured.

    Args:
        config: resolved; `device`, `precision` and `tensorboard` are used.
        folder: the run folder; TensorBoard logs go to its `logs/`.

    Raises:
        ConfigError: the machine cannot do what the configuration asks, the launcher asks for something else
            than the configuration, or fewer processes found each other than were asked for.
    """
    asked = max(launched_processes(), world_size())
    cpu = _on_cpu(config)
    _refuse_other_precision(config)
    local = get_int_from_env(("LOCAL_WORLD_SIZE",), 1)
    if not cpu and local > torch.cuda.device_count():
        raise ConfigError(
            f"{local} processes on a machine with {torch.cuda.device_count()} GPUs; expected at most one each"
        )
    AcceleratorState._reset_state(reset_partial_state=True)  # it is global; an earlier run's must not stay
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        cpu=cpu,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(folder / "logs"),
        # a model may have parameters without a part in the loss, such as CLIP's logit scale
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.num_processes != asked:
        found = ", ".join(f"{name}={os.environ[name]}" for name in (*SIZES, "LOCAL_RANK") if name in os.environ)
        raise ConfigError(
            f"{asked} processes were asked for ({found or 'torch.distributed is initialised'}), but this one found "
            f"{accelerator.num_processes}: each would train alone and write to the same folder. Expected: {COMMANDS}"
        )
    return accelerator


def _on_cpu(config: TrainConfig) -> bool:
    told = parse_flag_from_env("ACCELERATE_USE_CPU")
    if config.device == "cuda" and told:
        raise ConfigError("device is 'cuda', but accelerate launch was told --cpu; take 'cpu' or 'auto', or no --cpu")
    cpu = told or choose_device(config.device).type == "cpu"
    if cpu and config.precision == "fp16":
        raise ConfigError("precision 'fp16' needs a GPU; on a CPU take 'fp32' or 'bf16'")
    if cpu and config.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise ConfigError(
            "compile is true, but there is no C++ compiler (g++, or what CXX names); install it, or train without"
        )
    return cpu


def _refuse_other_precision(config: TrainConfig) -> None:
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told not in ("no", config.precision):
        raise ConfigError(
            f"accelerate launch asks for {told}, the configuration for {config.precision}; give the precision as a "
            f"parameter (-p precision {told}) and leave --mixed_precision out"
        )
