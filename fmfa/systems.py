"""A system ready to use: model, tokenizer and picture transform that belong together."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import SIMPEDES, open_dataset
from fmfa.data.transforms import ImageTransform, fmfa_evaluation
from fmfa.errors import CheckpointError, ConfigError
from fmfa.evaluation import Evaluation, evaluate
from fmfa.models.clip import ClipRetriever, objectives
from fmfa.text.tokens import CLIP_VOCABULARY, Tokenizer, clip_tokenizer, small_tokenizer
from fmfa.training import train
from fmfa.training.checkpoints import selected_checkpoint
from fmfa.training.config import TrainConfig
from fmfa.weights.loading import LoadReport, load_weights
from fmfa.weights.own import load_retriever

DATA = Path(__file__).parents[1] / "data"
TINY_BACKBONE, TINY_WEIGHTS = DATA / "tiny_clip_config.json", DATA / "tiny_clip.safetensors"
FULL_BACKBONE, FULL_WEIGHTS = "ViT-B-16-quickgelu", "openai"
NO_WEIGHTS = "none"


@dataclass(frozen=True, eq=False)
class System:
    """What encodes pictures and captions: the model, its tokenizer and its evaluation transform."""

    model: nn.Module
    tokenizer: Tokenizer
    transform: ImageTransform
    report: LoadReport | None = None  # what was loaded from where, for a system about to be trained

    def evaluate(self, dataset: Dataset, split: str, *, seed: int = 0, progress: bool = True) -> Evaluation:
        """Encode and score a split; see `fmfa.evaluation.evaluate`."""
        rows = dataset.split(split)
        return evaluate(self.model, rows, dataset.images, self.tokenizer, self.transform, seed=seed, progress=progress)


def build_system(config: TrainConfig, dataset: Dataset) -> System:
    """Build the model that a configuration describes, with its starting weights, for a data set.

    Backbone and weights left empty are the tiny CLIP in `data/` on SimPEDES, and OpenAI's ViT-B/16 (fetched by
    open_clip once) on other data; `weights="none"` starts from random weights.

    Raises:
        ConfigError: the parts do not fit.
        CheckpointError: the weights cannot be found, fetched or read.
    """
    config = config.resolved()
    tiny = config.dataset.startswith(SIMPEDES)
    backbone = config.backbone or (TINY_BACKBONE if tiny else FULL_BACKBONE)
    weights = config.weights or (TINY_WEIGHTS if tiny and not config.backbone else FULL_WEIGHTS)
    if config.method == "ivt":
        raise ConfigError("method 'ivt' has no pre-trained tiny weights yet; its model is fmfa.models.ivt.IvtRetriever")
    identities = int(dataset.split("train")["label"].max()) + 1
    model = ClipRetriever(
        backbone,
        objectives(config.method, config.preset, config.dataset, **config.objective_overrides()),
        identities=identities,
        image_size=(config.image_height, config.image_width),
        stride=config.stride,
        seed=config.seed,
    )
    report = None if weights == NO_WEIGHTS else load_weights(model, weights)
    return System(model, _tokenizer(model), fmfa_evaluation(tuple(model.config["image_size"])), report)


def load_system(source: str | Path = "") -> System:
    """Reopen a trained system.

    Args:
        source: a run folder (its best checkpoint on validation is taken), an own `.safetensors` checkpoint, or empty
            for the shipped tiny CLIP.

    Raises:
        CheckpointError: nothing of that kind there.
    """
    path = Path(source) if source else TINY_WEIGHTS
    if path.is_dir():
        path = selected_checkpoint(path) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a run folder or a .safetensors checkpoint of this project")
    model, _ = load_retriever(path)
    return System(model, _tokenizer(model), fmfa_evaluation(tuple(model.config["image_size"])))


def run_training(config: TrainConfig, folder: str | Path) -> Path:
    """Open the data, build the system, train it and return the run folder; a finished run is left as it is."""
    dataset = open_dataset(config.dataset, config.root, scale=config.scale, seed=config.data_seed)
    system = build_system(config, dataset)

    def validate(model: nn.Module) -> dict[str, float]:
        rows = dataset.split("val")
        found = evaluate(model, rows, dataset.images, system.tokenizer, system.transform, progress=False)
        return found.metrics["text to image"].summary

    return train(config, system.model, dataset, system.tokenizer, folder, validate=validate)


def _tokenizer(model: ClipRetriever) -> Tokenizer:
    text = model.config["backbone"]["text_cfg"]
    context = text.get("context_length", 77)
    if text.get("vocab_size", CLIP_VOCABULARY) == CLIP_VOCABULARY:
        return clip_tokenizer(context)
    tokenizer = small_tokenizer(context_length=context)
    if tokenizer.vocab_size != text["vocab_size"]:
        raise ConfigError(
            f"the backbone has a vocabulary of {text['vocab_size']} tokens; known are CLIP's with {CLIP_VOCABULARY} "
            f"and data/vocabulary.json with {tokenizer.vocab_size}"
        )
    return tokenizer


def default_run_folder(config: TrainConfig) -> Path:
    """Where a run lies when no folder was named: `runs/`, by what was asked for and a hash of all parameters."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return DATA.parent / "runs" / f"{config.method}-{config.preset}-{config.dataset}-{config.seed}-{digest}"
