"""The processes of a training run: what the launcher asked for, and Hugging Face Accelerate over them."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, get_int_from_env, parse_flag_from_env

from fmfa.devices import choose_device
from fmfa.errors import ConfigError
from fmfa.models.distributed import world_size
from fmfa.training.config import TrainConfig

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
COMMANDS = (
    "torchrun --nproc-per-node N -m fmfa.train ...  or  accelerate launch --multi_gpu --num_processes N "
    "--num_machines 1 -m fmfa.train ...  (both work on GPUs, and on a CPU as well)"
)


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
    if accelerator.distributed_type not in KINDS:
        kinds = ", ".join(kind.value for kind in KINDS)
        raise ConfigError(f"accelerate is set up for {accelerator.distributed_type.value}; expected one of {kinds}")
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
    return cpu


def _refuse_other_precision(config: TrainConfig) -> None:
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told not in ("no", config.precision):
        raise ConfigError(
            f"accelerate launch asks for {told}, the configuration for {config.precision}; give the precision as a "
            f"parameter (-p precision {told}) and leave --mixed_precision out"
        )
