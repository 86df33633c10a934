"""The trainings that the launchers' tests start in two processes: `launched_training.py FOLDER DATA`."""

import json
import sys
from pathlib import Path

from toy_training import toy_fit

from fmfa.systems import TINY_IVT_BACKBONE, TINY_IVT_WEIGHTS, run_training
from fmfa.training.config import METHODS, TrainConfig

STEPS = 2
BACKBONE = "ivt.json"


def parameters(method, data):
    """Two steps of plain gradient descent from the shipped weights, with every draw shared by the processes."""
    values = {"method": method, "root": str(data), "epochs": 1, "batch_size": 16, "device": "cpu"}
    values |= {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "log_gradients_every": 1}
    values |= {"tensorboard": False, "learning_rate": 1e-5 if method == "fmfa" else 1e-3}
    if method == "ivt":
        values |= {"backbone": str(Path(data).parent / BACKBONE), "weights": str(TINY_IVT_WEIGHTS)}
    return values


def write_backbone(folder):
    """The tiny IVT without dropout and drop path, which each process draws for its own rows."""
    sizes = json.loads(TINY_IVT_BACKBONE.read_text()) | {"drop_path": 0.0, "text_dropout": 0.0}
    (folder / BACKBONE).write_text(json.dumps(sizes))


def train_each(folder, data):
    for method in METHODS:
        run_training(TrainConfig(**parameters(method, data)), Path(folder) / method)


if __name__ == "__main__":
    home, dataset = map(Path, sys.argv[1:])
    train_each(home / "two", dataset)
    toy_fit(home / "cut", tensorboard=True)
    toy_fit(home / "whole", tensorboard=True)
