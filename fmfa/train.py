"""Train a system without a notebook, in one process or, through a launcher, in several.

`python -m fmfa.train RUN_FOLDER -p method fmfa -p epochs 8`
`torchrun --nproc-per-node 4 -m fmfa.train RUN_FOLDER -p method fmfa`
"""

import argparse
import os
import sys
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from torch import distributed

from fmfa.errors import ConfigError, FmfaError
from fmfa.notebook import (
    Parameters,
    add_parameter_options,
    declare_parameters,
    given_parameters,
    print_parameters,
    resolve_parameters,
)
from fmfa.systems import run_training
from fmfa.training.config import TrainConfig
from fmfa.training.fit import launched_processes, launched_rank

INTERRUPTED = 130  # a shell's exit status for Ctrl-C


def config_parameters() -> type[Parameters]:
    """Every field of `TrainConfig` as a parameter; the help names the choices if there are any."""
    defaults = {}
    for field in fields(TrainConfig):
        setting: Any = field.default  # pydantic's, with the help and the limits
        choices = ", ".join(map(repr, get_args(field.type))) if get_origin(field.type) is Literal else ""
        defaults[field.name] = setting.default, setting.description + (f"; one of {choices}" if choices else "")
    return declare_parameters(defaults)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 trained, 1 training failed, 2 bad parameters, 130 Ctrl-C.

    Only the first process prints what all would print; an error of another one names its process.
    """
    description = "Train a system, or go on with an interrupted run, in RUN_FOLDER."
    parser = argparse.ArgumentParser(prog="python -m fmfa.train", description=description)
    parser.add_argument("folder", nargs="?", metavar="RUN_FOLDER", help="made when it is not there")
    add_parameter_options(parser)
    options = parser.parse_args(arguments)
    rank = launched_rank()
    if options.help_parameters:
        if rank == 0:
            print_parameters(config_parameters())
        return 0
    if options.folder is None:
        parser.error("the run folder is missing")
    if rank:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        launched_processes()
        config = TrainConfig(**resolve_parameters(config_parameters(), given_parameters(options)))
        config.resolved()
    except FmfaError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    who = f"process {rank}: " if rank else ""
    try:
        run_training(config, options.folder)
    except FmfaError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except RuntimeError as error:
        if " by peer" not in str(error):  # as gloo tells that another process has ended
            raise
        print(f"process {rank}: ended, because another process did, whose message says why", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if rank == 0:
            print(stop or "interrupted before the first step", file=sys.stderr)
        return INTERRUPTED
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if rank == 0:
        print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
