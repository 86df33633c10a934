"""A system ready to use: model, tokenizer and picture transform that belong together."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fmfa.data.annotation_files import canonical_name
from fmfa.data.annotations import Dataset
from fmfa.data.datasets import PROJECT, open_dataset
from fmfa.data.transforms import ImageTransform, fmfa_evaluation, ivt_evaluation
from fmfa.devices import choose_device
from fmfa.errors import CheckpointError, ConfigError, TrainingError
from fmfa.evaluation import Evaluation, evaluate
from fmfa.files import said_plainly
from fmfa.models.ivt import IvtRetriever
from fmfa.systems.clip import TINY_WEIGHTS, build_clip_model, clip_tokenizer_of, load_clip_start
from fmfa.systems.ivt import build_ivt_model, ivt_tokenizer, load_ivt_start
from fmfa.text.tokens import Tokenizer
from fmfa.text.wordpiece import WordPieceTokenizer, wordpiece_tokenizer
from fmfa.training import CONFIG, run_config, train
from fmfa.training.checkpoints import STATE, WEIGHTS, checked, selected_checkpoint
from fmfa.training.config import TrainConfig
from fmfa.weights.loading import LoadReport
from fmfa.weights.own import load_retriever

NO_WEIGHTS = "none"
VOCABULARY = "vocab.txt"


@dataclass(frozen=True, eq=False)
class System:
    """What encodes pictures and captions: the model, its tokenizer and its evaluation transform."""

    model: nn.Module
    tokenizer: Tokenizer
    transform: ImageTransform
    report: LoadReport | None = None  # what was loaded from where, for a system about to be trained

    @property
    def objectives(self) -> dict[str, str | int | float | bool]:
        """What the model is trained for; of IVT the loss, its temperature if any, and the token dropping."""
        if not isinstance(self.model, IvtRetriever):
            return self.model.config["objectives"]
        names = ("loss", "tau", "mask_image", "mask_text")
        return {name: self.model.config[name] for name in names if name != "tau" or self.model.sizes.loss == "sdm"}

    def evaluate(self, dataset: Dataset, split: str, *, seed: int = 0, progress: bool = True) -> Evaluation:
        """Encode and score a split; see `fmfa.evaluation.evaluate`."""
        rows = dataset.split(split)
        return evaluate(self.model, rows, dataset.images, self.tokenizer, self.transform, seed=seed, progress=progress)


def build_system(config: TrainConfig, dataset: Dataset) -> System:
    """Build the model that a configuration describes, with its starting weights, for a data set.

    Backbone and weights left empty are the tiny CLIP or the tiny IVT in `data/` on SimPEDES. On other data they are
    OpenAI's ViT-B/16 (fetched by open_clip once), and for ivt an ImageNet ViT-B/16 with BERT (fetched by timm and from
    the Hugging Face hub); `weights="none"` starts from random weights.

    Raises:
        ConfigError: the parts do not fit.
        CheckpointError: the weights cannot be found, fetched or read.
    """
    config = config.resolved()
    ivt = config.method == "ivt"
    model = build_ivt_model(config) if ivt else build_clip_model(config, dataset)
    report = None
    if config.weights != NO_WEIGHTS:
        report = load_ivt_start(config, model) if ivt else load_clip_start(config, model)
    return _system(model, config.vocabulary, report)


def load_system(source: str | Path = "", device: str = "cpu") -> System:
    """Reopen a trained system.

    Args:
        source: a run folder (its best checkpoint on validation is taken), an own `.safetensors` checkpoint, or empty
            for the shipped tiny CLIP.
        device: where it works: auto (a GPU where there is one), cpu or cuda.

    Raises:
        CheckpointError: nothing of that kind there, or it is damaged.
        ConfigError: no such device, or the vocabulary of an IVT is neither in its run folder nor known by its size.
    """
    path = Path(source) if source else TINY_WEIGHTS
    if path.is_dir():
        path = selected_checkpoint(path) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a run folder or a .safetensors checkpoint of this project")
    if (path.parent / STATE).is_file():
        checked(path.parent, path.name)
    model, _ = load_retriever(path)
    run = _run_of(path)
    kept = run / VOCABULARY if run else None
    return _system(model.to(choose_device(device)), kept if kept and kept.is_file() else "")


def load_start(source: str | Path, dataset: Dataset, device: str = "cpu") -> System | None:
    """The system that a run started from, before its training; None for a checkpoint that lies in no run.

    Args:
        source: a run folder, or a checkpoint in one.
        dataset: any data set with a training split; it decides nothing but the size of an unused classifier.
        device: as in `load_system`.

    Raises:
        CheckpointError: the starting weights are no longer there.
        TrainingError: the run's configuration is damaged.
    """
    run = _run_of(Path(source))
    if run is None:
        return None
    system = build_system(run_config(run), dataset)
    system.model.to(choose_device(device))
    return system


def run_training(config: TrainConfig, folder: str | Path) -> Path:
    """Open the data, build the system, train it and return the run folder; a finished run is left as it is.

    A run of IVT keeps its vocabulary as `vocab.txt`, so that it can be reopened wherever it is moved.
    """
    config, folder = config.resolved(), Path(folder).expanduser()
    dataset = open_training_data(config)
    system = build_system(config, dataset)
    if config.method == "ivt":
        _keep_vocabulary(system.tokenizer, folder)

    def validate(model: nn.Module) -> dict[str, float]:
        rows = dataset.split("val")
        found = evaluate(model, rows, dataset.images, system.tokenizer, system.transform, progress=False)
        return found.metrics["text to image"].summary

    return train(config, system.model, dataset, system.tokenizer, folder, validate=validate)


def open_training_data(config: TrainConfig) -> Dataset:
    """Open the data set of a resolved configuration, with the true phrases where its text levels need them."""
    spans = config.text_levels == "spans"
    options = {"scale": config.scale, "seed": config.data_seed, "drop_empty_captions": config.drop_empty_captions}
    return open_dataset(config.dataset, config.root, spans=spans, **options)


def open_test_data(
    sources: Sequence[str | Path], dataset: str = "", root: str | Path = "", scale: str = "", data_seed: int = -1
) -> Dataset:
    """Open the data set that trained systems are evaluated on; what is left open is as the first one's run had it.

    The data seed cannot be another one: it decides which people of a set without a validation split were trained on.
    The scale can: on SimPEDES nobody of validation or test is trained on at any scale.

    Args:
        sources: run folders or checkpoints, as `load_system` takes them; those in no run decide nothing.
        dataset: its name, as in `open_dataset`; empty with another root than the run's for what the file there says.
        root: its folder; empty with another name or a scale for SimPEDES made by the project.
        scale: of SimPEDES without a root; empty for the run's, or small.
        data_seed: of SimPEDES without a root, and of held-out identities; -1 for the run's, or 0.

    Raises:
        ConfigError: the seeds of the runs and `data_seed` differ, or see `open_dataset`.
        AnnotationError: the data set cannot be read, or is another one than `dataset`.
        TrainingError: a run's configuration is damaged.
    """
    configs = {str(run): run_config(run) for run in map(_run_of, map(Path, filter(None, sources))) if run}
    seeds = {run: config.data_seed for run, config in configs.items()}
    seeds |= {"data_seed": data_seed} if data_seed >= 0 else {}
    if len(set(seeds.values())) > 1:
        raise ConfigError(
            f"data seeds differ ({', '.join(f'{seed} of {name}' for name, seed in seeds.items())}): whom one holds out "
            "for validation, another trains on. Leave data_seed out, and evaluate runs of different data seeds apart"
        )
    own = next(iter(configs.values()), TrainConfig())
    dataset = canonical_name(dataset)
    if not root and not scale and dataset in ("", own.dataset):
        root = own.root
    if not dataset and (not root or (own.root and os.path.realpath(root) == os.path.realpath(own.root))):
        dataset = own.dataset
    seed, scale = next(iter(seeds.values()), 0), scale or own.scale
    return open_dataset(dataset, root, scale=scale, seed=seed, drop_empty_captions=own.drop_empty_captions)


def default_run_folder(config: TrainConfig) -> Path:
    """Where a run lies when no folder was named: `runs/`, by what was asked for and a hash of all parameters."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return PROJECT / "runs" / f"{config.method}-{config.preset}-{config.dataset}-{config.seed}-{digest}"


def _system(model: nn.Module, vocabulary: str | Path, report: LoadReport | None = None) -> System:
    size = tuple(model.config["image_size"])
    if isinstance(model, IvtRetriever):
        return System(model, ivt_tokenizer(model, vocabulary), ivt_evaluation(size), report)
    return System(model, clip_tokenizer_of(model), fmfa_evaluation(size), report)


def _keep_vocabulary(tokenizer: WordPieceTokenizer, folder: Path) -> None:
    path = folder / VOCABULARY
    if not path.is_file():
        with said_plainly(f"the run folder {folder} cannot be made or written to"):
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save(path)
    elif wordpiece_tokenizer(path).vocabulary != tokenizer.vocabulary:
        raise TrainingError(f"{path} is the vocabulary of another run; give a new folder, or that run's vocabulary")


def _run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or lies in as RUN/checkpoints/NAME/model.safetensors."""
    if path.is_file() and path.absolute().parents[1].name == "checkpoints":
        path = path.absolute().parents[2]
    return path if (path / CONFIG).is_file() else None
