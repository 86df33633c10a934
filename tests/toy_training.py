"""A model and batches as small as the training loop allows, for tests and the processes they start."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from formats import write_wordpiece
from PIL import Image
from torch import nn

from fmfa.data.annotations import Dataset
from fmfa.models.clip import ClipRetriever
from fmfa.models.distributed import gather
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.objectives import objectives
from fmfa.models.outputs import ModelOutput
from fmfa.text.bytepair import small_tokenizer
from fmfa.text.wordpiece import wordpiece_tokenizer
from fmfa.training.config import TrainConfig
from fmfa.training.fit import fit, train

ROWS, WIDTH = 24, 6


class ToyModel(nn.Module):
    """Two towers with dropout, a contrastive loss and a classifier; its draws come from `reseed` too."""

    def __init__(self, dropout=0.3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.image, self.text = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
            self.classifier = nn.Linear(5, 4)
        self.unused = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(dropout)
        self.generator = torch.Generator()
        self.calls = 0

    def reseed(self, seed):
        self.generator.manual_seed(seed)

    def forward(self, batch):
        if os.environ.get("KILL_AT") == f"{self.calls} {os.environ.get('RANK', 0)}":
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        image = self.dropout(self.image(batch["images"]))
        text = self.dropout(self.text(batch["captions"]))
        noise = 1 + 0.1 * torch.rand((), generator=self.generator)
        images, texts, labels = gather(image), gather(text), gather(batch["labels"])
        logits = texts @ images.T * noise
        match = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        identity = nn.functional.cross_entropy(self.classifier(images), labels)
        return ModelOutput(
            losses={"match": match, "id": identity},
            features={"image_tokens": image, "text_tokens": text},
            stats={"noise": noise, "constant": 2.0},
        )


class ToyBatches:
    """The rows in a new order every epoch, cut into this rank's share of batches of `size`."""

    def __init__(self, size=4, rank=0, processes=1, seed=0):
        draw = torch.Generator().manual_seed(11)
        self.images = torch.randn(ROWS, WIDTH, generator=draw)
        self.captions = torch.randn(ROWS, WIDTH, generator=draw)
        self.labels = torch.randint(4, (ROWS,), generator=draw)
        self.size, self.rank, self.processes, self.seed = size, rank, processes, seed

    def count(self, epoch):
        return -(-ROWS // self.size)

    def read(self, epoch, start):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
        for rows in order.split(self.size)[start:]:
            share = len(rows) // self.processes
            rows = rows[self.rank * share : (self.rank + 1) * share]
            fields = {"images": self.images, "captions": self.captions, "labels": self.labels}
            yield {"rows": rows, **{name: values[rows] for name, values in fields.items()}}

    def describe(self, rows):
        return [f"picture-{row}.jpg" for row in rows.tolist()]


def toy_config(**changes):
    values = {"method": "clip", "dataset": "toy", "epochs": 3, "warmup_epochs": 1, "learning_rate": 0.05}
    values |= {"batch_size": 4, "device": "cpu", "tensorboard": False, "checkpoint_every": 2, "seed": 5}
    return TrainConfig(**(values | changes))


def toy_validation(model):
    """A made-up R@1 that depends on the weights."""
    assert not model.training
    return {"R@1": 50 + float(model.image.weight.sum()), "mAP": 1.0}


def toy_fit(folder, model=None, *, validate=toy_validation, size=4, **changes):
    model = model or ToyModel()
    config = toy_config(batch_size=size, **changes)
    fit(config, model, lambda rank, n: ToyBatches(size, rank, n), folder, validate=validate)
    return model


TOKENIZER = small_tokenizer(context_length=16)
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": [32, 16], "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": TOKENIZER.vocab_size,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}


def write_pairs(folder):
    """Twelve noise pictures of five people with two captions each, the last person for validation."""
    draw = np.random.default_rng(2)
    rows = []
    for picture in range(12):
        identity = picture // 2 if picture < 10 else 9
        pixels = draw.integers(0, 255, (32, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{picture}.png")
        for words in ("a person in red", "someone with bag number"):
            rows.append((f"{picture}.png", identity, f"{words} {'very ' * (picture % 3)}{picture}"))
    table = pd.DataFrame(rows, columns=["image", "identity", "caption"])
    table["split"] = np.where(table["identity"] == 9, "val", "train")
    table["label"] = np.where(table["identity"] == 9, -1, table["identity"])
    table["record"] = np.arange(len(table)) // 2
    return Dataset("toy", folder, table)


def pairs_train(folder, pictures, **changes):
    """FMFA with all its losses on `write_pairs`, in as many processes as this one belongs to."""
    values = {"method": "fmfa", "optimizer": "sgd", "momentum": 0.0, "learning_rate": 1e-5, "epochs": 1}
    values |= {"image_height": 32, "image_width": 16, "batch_size": 8, "dataset": "toy", "device": "cpu"}
    values |= {"tensorboard": False, "schedule": "constant", "log_gradients_every": 1}
    config = TrainConfig(**(values | changes))
    wanted = objectives("fmfa", "paper", "toy", irr_depth=1, **config.objective_overrides())
    model = ClipRetriever(TINY_CLIP, wanted, identities=5, seed=1)
    train(config, model, write_pairs(Path(pictures)), TOKENIZER, folder)
    return model


def pairs_train_ivt(folder, pictures, **changes):
    """IVT with its three text levels, token dropping, drop path and dropout on `write_pairs`."""
    dataset = write_pairs(Path(pictures))
    write_wordpiece(dataset.table["caption"], Path(pictures) / "vocab.txt")
    tokenizer = wordpiece_tokenizer(Path(pictures) / "vocab.txt", 40)
    values = {"method": "ivt", "dataset": "toy", "image_height": 32, "image_width": 16, "stride": 8}
    values |= {"batch_size": 8, "instances": 4, "device": "cpu", "tensorboard": False}
    sizes = {"width": 32, "depth": 2, "heads": 2, "image_size": (32, 16), "patch": 8, "stride": 8}
    words = {"vocab_size": tokenizer.vocab_size, "positions": 40}
    model = IvtRetriever(IvtConfig(**sizes, **words), seed=1)
    train(TrainConfig(**(values | changes)), model, dataset, tokenizer, folder)
    return model


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        toy_fit(folder, tensorboard=True)
