"""A system ready to use: a model with its own tokenizer and picture transform, by name, file or run."""

import argparse
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from open_clip.factory import HF_HUB_PREFIX
from open_clip.pretrained import list_pretrained_tags_by_model

from fmfa.data.annotations import SIMPEDES, Dataset, canonical_name
from fmfa.data.datasets import DATA, open_dataset, project_path, which_dataset
from fmfa.data.images import ImageTransform, fmfa_evaluation, ivt_evaluation, resolve_image, tbps_clip_evaluation
from fmfa.devices import choose_device
from fmfa.errors import CheckpointError, ConfigError, TrainingError
from fmfa.evaluation.cost import TRAINING_HEADS
from fmfa.evaluation.evaluate import Evaluation, evaluate, gallery_of
from fmfa.files import PROJECT, read_json, whole_file
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.objectives import objectives
from fmfa.models.outputs import Retriever
from fmfa.models.rde import HEADS, RdeRetriever
from fmfa.models.weight_files import read_state_dict
from fmfa.models.weights import PREFIX as IVT_PREFIX
from fmfa.models.weights import (
    TBPS_CLIP,
    LoadReport,
    load_retriever,
    load_weights,
    recorded_model,
    start_from_vit_and_bert,
)
from fmfa.records import device_name
from fmfa.text.bytepair import Tokenizer, backbone_tokenizer
from fmfa.text.wordpiece import WordPieceTokenizer, wordpiece_tokenizer
from fmfa.training.checkpoints import STATE, WEIGHTS, checked, selected_checkpoint
from fmfa.training.config import TrainConfig
from fmfa.training.fit import CONFIG, launched_rank, run_config, train

NO_WEIGHTS = "none"
TRAINING_SETTINGS = ("objectives", "identities", "loss", "tau", "mask_image", "mask_text")
"""Of a model's configuration, what changes no embedding."""
START, VOCABULARY = "weights.txt", "vocab.txt"
TINY_BACKBONE, TINY_WEIGHTS = DATA / "tiny_clip_config.json", DATA / "tiny_clip.safetensors"
TINY_IRRA_WEIGHTS = DATA / "tiny_irra.safetensors"
"""An IRRA trained on SimPEDES, without its identity classifier."""
FULL_BACKBONE, FULL_WEIGHTS = "ViT-B-16-quickgelu", "openai"
ONLY_IVT = ("text_weights", "vocabulary", "mask_image", "mask_text")
TINY_IVT_BACKBONE, TINY_IVT_WEIGHTS = DATA / "tiny_ivt_config.json", DATA / "tiny_ivt.safetensors"
TINY_VOCABULARY, BERT = DATA / "wordpiece.txt", "google-bert/bert-base-uncased"
VIT = "vit_base_patch16_224.orig_in21k_ft_in1k"  # timm's name for the file that the released code starts from


@dataclass(frozen=True, eq=False)
class System:
    """What encodes pictures and captions: the model, its tokenizer and its evaluation transform."""

    model: Retriever
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
        """Encode and score a split; see `fmfa.evaluation.evaluate.evaluate`."""
        rows = dataset.split(split)
        return evaluate(self.model, rows, dataset.images, self.tokenizer, self.transform, seed=seed, progress=progress)


def build_system(config: TrainConfig, dataset: Dataset | None = None) -> System:
    """Build the model that a configuration describes, with its starting weights, for a data set.

    Backbone and weights left empty are the tiny CLIP or the tiny IVT in `data/` on SimPEDES. On other data they are
    OpenAI's ViT-B/16 (fetched by open_clip once), and for ivt an ImageNet ViT-B/16 with BERT (fetched by timm and from
    the Hugging Face hub); `weights="none"` starts from random weights. Without a data set there is no classifier, so
    the objectives must do without an ID loss.

    Raises:
        ConfigError: the parts do not fit.
        CheckpointError: the weights cannot be found, fetched or read, or leave a part of an encoder random.
    """
    config = config.resolved()
    shipped = config.dataset.startswith(SIMPEDES)
    model = _ivt(config, shipped) if config.method == "ivt" else _two_streams(config, dataset, shipped)
    report, weights = None, project_path(config.weights)
    if config.weights != NO_WEIGHTS:
        _refuse_damaged(weights)
        shipped = shipped and not config.backbone and not config.text_weights
        if isinstance(model, ClipRetriever):
            weights = weights or str(TINY_WEIGHTS if shipped else FULL_WEIGHTS)
        elif shipped:
            weights = weights or str(TINY_IVT_WEIGHTS)
        if weights and not config.text_weights:
            report = load_weights(model, weights, position_grid=config.grid)
        elif isinstance(model, IvtRetriever):
            bert = config.text_weights or BERT
            report = start_from_vit_and_bert(model, weights or VIT, bert, position_grid=config.grid)
    return _system(model, config.vocabulary, report)


def load_system(
    source: str | Path = "", device: str = "cpu", *, dataset: str = "", vocabulary: str = "", **model: str | int
) -> System:
    """Open trained weights: a run, or a weight file from anywhere.

    Args:
        source: a run folder (its best checkpoint on validation is taken), an own `.safetensors` checkpoint, a weight
            file of any layout that `load_weights` understands, weights that open_clip knows as MODEL/TAG
            (`ViT-B-16-quickgelu/openai`) or `hf-hub:...`, or empty for the shipped tiny CLIP. TBPS-CLIP's read pictures
            as their training did; RDE's search with both of their branches.
        device: where it works: auto (a GPU if available), cpu or cuda.
        dataset: name of the data that is searched, whose preset sizes a foreign file gets where `model` has none.
        vocabulary: of an IVT; empty for the one in its run folder, or the one of the model's size.
        model: `backbone`, `image_height`, `image_width`, `stride` and `position_grid` as in `TrainConfig`, for files
            that do not say what their model is; "" and 0 are not given.

    Raises:
        CheckpointError: nothing of that kind there, or it is damaged, or does not fit.
        ConfigError: no such device; the vocabulary of an IVT is not known; a parameter in `model` that does not fit, or
            is given for a run or own checkpoint, which knows its model.
    """
    source = project_path(str(source)) or str(TINY_WEIGHTS)
    given = {name: value for name, value in model.items() if value}
    if not _is_own(source):
        parameters = {"dataset": dataset, "vocabulary": vocabulary} | given
        config = _foreign(source, {name: value for name, value in parameters.items() if value})
        system = build_system(config)
        if system.report and any(name.startswith(tuple(HEADS)) for name in system.report.left_out):
            system = _with_second_branch(system, system.report)
        system.model.eval().to(choose_device(device))
        if system.report and system.report.layout == TBPS_CLIP:
            system = replace(system, transform=tbps_clip_evaluation(system.transform.size))
        return system
    if given:
        raise ConfigError(f"{source} knows its own model: leave out {', '.join(given)}")
    path = Path(source)
    if path.is_dir():
        path = selected_checkpoint(path) / WEIGHTS
    _refuse_damaged(path)
    run = _run_of(path)
    if not vocabulary and run and (run / VOCABULARY).is_file():
        vocabulary = str(run / VOCABULARY)
    return _system(load_retriever(path).to(choose_device(device)), vocabulary)


MODEL_OPTIONS = ("backbone", "vocabulary", "image_height", "image_width", "stride", "position_grid")
"""What can be said of the model of a weight file that does not record it."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options that say of a foreign weight file what it does not record; see `model_options`."""
    parser.add_argument("--backbone", default="", help="of a foreign weight file: an open_clip model or JSON file")
    parser.add_argument("--vocabulary", default="", help="of an IVT, if its run does not hold it")
    for name in ("image-height", "image-width", "stride"):
        parser.add_argument(f"--{name}", type=int, default=0, help="of a foreign weight file, pixels")
    parser.add_argument("--position-grid", default="", help="of a foreign weight file, such as 24x8")


def model_options(options: Any) -> dict[str, Any]:
    """What options or a notebook's parameters say of `MODEL_OPTIONS`, as `load_system` takes it."""
    return {name: value for name in MODEL_OPTIONS if (value := getattr(options, name))}


def _with_second_branch(system: System, report: LoadReport) -> System:
    """RDE: the model that read its file's CLIP, with the branch that the file has beside it."""
    used = tuple(name for name in report.left_out if name.startswith(tuple(HEADS)))
    rest = tuple(name for name in report.left_out if name not in used)
    report = replace(report, loaded=report.loaded + used, left_out=rest, layout="RDE",
                     reasons={name: why for name, why in report.reasons.items() if name not in used})  # fmt: skip
    assert isinstance(system.model, ClipRetriever)
    model = RdeRetriever(system.model, read_state_dict(report.source), report.source)
    return replace(system, model=model, report=report)


def load_systems(sources: Sequence[str], device: str = "cpu", **parameters: Any) -> dict[str, System]:
    """Several systems by name, each as `load_system` opens it; parameters of a model go to those that need them.

    A system has the name of its folder or file, or its whole path where two would have the same name.
    """
    names = [Path(source).name if Path(source).is_dir() else Path(source).stem for source in sources]
    foreign = [source for source in sources if not _is_own(project_path(source))]
    systems = {}
    for source, name in zip(sources, names, strict=True):
        given = parameters
        if foreign and source not in foreign:
            given = {key: value for key, value in parameters.items() if key in ("dataset", "vocabulary")}
        systems[source if names.count(name) > 1 else name] = load_system(source, device, **given)
    return systems


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


def evaluate_start(
    source: str | Path, dataset: Dataset, split: str, device: str = "cpu", *, seed: int = 0
) -> Evaluation | None:
    """Encode and score a split with the weights that a run started from; see `load_start`.

    The features are kept in `.starts` beside the run folders, for all runs that start from the same encoders: a file is
    named after these, the captions' tokens, the pictures' bytes, the device, the threads and torch. A damaged one is
    made again, and where none can be written none is kept.
    """
    run, system = _run_of(Path(source)), load_start(source, dataset, device)
    if run is None or system is None:
        return None
    rows = dataset.split(split).reset_index(drop=True)
    gallery = gallery_of(rows)
    digest = hashlib.sha256(fingerprint(system, without=TRAINING_HEADS).encode())
    used = {name: value for name, value in system.model.config.items() if name not in TRAINING_SETTINGS}
    place = device_name(choose_device(device)), torch.get_num_threads(), torch.__version__
    digest.update(repr((sorted(used.items()), place)).encode())
    digest.update(system.tokenizer(rows["caption"].tolist()).numpy().tobytes())
    for path in (resolve_image(dataset.images, name) for name in gallery["image"]):
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"missing").digest())
    file = run.parent / ".starts" / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(file) as kept:
            text, image = (torch.from_numpy(kept[side]) for side in ("text", "image"))
        if (len(text), len(image)) == (len(rows), len(gallery)):
            return Evaluation(rows, gallery, text, image, seed)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):  # not there, or damaged
        pass
    found = system.evaluate(dataset, split, seed=seed)
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with whole_file(file) as part:
            np.savez(part, text=found.text_features.numpy(), image=found.image_features.numpy())
    return found


def fingerprint(system: System, without: tuple[str, ...] = ()) -> str:
    """Name a system by its weights, but for those whose names begin as said, and by how it reads pictures."""
    digest = hashlib.blake2b(repr(system.transform).encode(), digest_size=16)
    for name, tensor in sorted(system.model.state_dict().items()):
        if not name.startswith(without):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_training(config: TrainConfig, folder: str | Path) -> Path:
    """Open the data, build the system, train it and return the run folder; a finished run is left as it is.

    What became of every tensor of the starting weights is printed, and kept as `weights.txt`. A run of IVT keeps its
    vocabulary as `vocab.txt`, so that it can be reopened wherever it is moved.
    """
    config, folder = config.resolved(), Path(folder).expanduser()
    dataset = open_training_data(config)
    system = build_system(config, dataset)
    start = str(system.report or "random starting weights")
    if launched_rank() == 0:
        print(start)
    texts = {START: f"{start}\n"}
    if isinstance(system.tokenizer, WordPieceTokenizer):
        texts[VOCABULARY] = system.tokenizer.vocabulary_file()
        file = folder / VOCABULARY
        if file.is_file() and wordpiece_tokenizer(file).vocabulary != system.tokenizer.vocabulary:
            raise TrainingError(f"{file} is the vocabulary of another run; give a new folder, or that run's vocabulary")

    def validate(model: Retriever) -> dict[str, float]:
        rows = dataset.split("val")
        evaluation = evaluate(model, rows, dataset.images, system.tokenizer, system.transform, progress=False)
        return evaluation.metrics["text to image"].summary

    return train(config, system.model, dataset, system.tokenizer, folder, validate=validate, texts=texts)


def open_training_data(config: TrainConfig) -> Dataset:
    """Open the data set of a resolved configuration; AnnotationError if its text levels need a truth that it lacks."""
    dataset = open_dataset(
        config.dataset,
        config.root,
        scale=config.scale,
        seed=config.data_seed,
        drop_empty_captions=config.drop_empty_captions,
    )
    if config.text_levels == "spans":
        dataset.require_truth()
    return dataset


def open_test_data(
    sources: Sequence[str | Path], dataset: str = "", root: str | Path = "", scale: str = "", data_seed: int = -1
) -> Dataset:
    """Open the data set that trained systems are evaluated on; what is left open is as the first one's run had it.

    Scale and data seed of SimPEDES can be others: nobody of validation or test is trained on at any of them. The data
    seed of another set cannot: without a validation split it decides who was trained on.

    Args:
        sources: run folders or checkpoints, as `load_system` takes them; those in no run decide nothing.
        dataset: its name, as in `open_dataset`; empty with another root than the run's for what the file there says.
        root: its folder; empty with another name or a scale for SimPEDES made by the project.
        scale: of SimPEDES without a root; empty for the run's, or small.
        data_seed: of SimPEDES without a root, and of held-out identities; -1 for the run's, or 0.

    Raises:
        ConfigError: the seeds of the runs and `data_seed` differ on such a set, or see `open_dataset`.
        AnnotationError: the data set cannot be read, or is another one than `dataset`.
        TrainingError: a run's configuration is damaged.
    """
    runs = [_run_of(Path(source)) for source in sources if source]
    configs = {str(run): run_config(run) for run in runs if run}
    own = next(iter(configs.values()), TrainConfig())
    dataset = canonical_name(dataset)
    if not root and not scale and dataset in ("", own.dataset):
        root = own.root
    if not dataset and (not root or (own.root and os.path.realpath(root) == os.path.realpath(own.root))):
        dataset = own.dataset
    seeds = {run: config.data_seed for run, config in configs.items()}
    if data_seed >= 0:
        rendered = not root and which_dataset(dataset).startswith(SIMPEDES)
        seeds = ({} if rendered else seeds) | {"data_seed": data_seed}
    if len(set(seeds.values())) > 1:
        raise ConfigError(
            f"data seeds differ ({', '.join(f'{seed} of {name}' for name, seed in seeds.items())}): whom one holds out "
            "for validation, another trains on. Leave data_seed out, and evaluate runs of different data seeds apart"
        )
    seed, scale = next(iter(seeds.values()), 0), scale or own.scale
    return open_dataset(dataset, root, scale=scale, seed=seed, drop_empty_captions=own.drop_empty_captions)


def default_run_folder(config: TrainConfig) -> Path:
    """Where a run lies when no folder was named: `runs/`, by what was asked for and a hash of all parameters."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return PROJECT / "runs" / f"{config.method}-{config.preset}-{config.dataset}-{config.seed}-{digest}"


def _system(model: ClipRetriever | IvtRetriever, vocabulary: str | Path, report: LoadReport | None = None) -> System:
    height, width = model.config["image_size"]
    size = height, width
    if isinstance(model, IvtRetriever):
        return System(model, ivt_tokenizer(model, vocabulary), ivt_evaluation(size), report)
    return System(model, backbone_tokenizer(model.config["backbone"]["text_cfg"]), fmfa_evaluation(size), report)


def _is_own(source: str | Path) -> bool:
    """Whether it is a run folder, a checkpoint in one, or a file that records its model."""
    path = Path(source)
    return path.is_dir() or (path.parent / STATE).is_file() or bool(recorded_model(path))


def _foreign(source: str, parameters: dict[str, str | int]) -> TrainConfig:
    """The configuration of weights that do not record their model: a file, or a name that open_clip knows."""
    if Path(source).is_file():
        ivt = any(name.startswith(IVT_PREFIX) for name in read_state_dict(source))
        return TrainConfig.from_dict({"method": "ivt" if ivt else "clip", "weights": source} | parameters)
    name = "/".join(Path(source).parts[-2:])  # which a notebook takes for a path relative to the user's folder
    backbone, _, tag = (name, "", name) if name.startswith(HF_HUB_PREFIX) else name.rpartition("/")
    if not name.startswith(HF_HUB_PREFIX) and not list_pretrained_tags_by_model(backbone):
        raise CheckpointError(
            f"{source}: no such file or folder, and no weights that open_clip knows; expected a run folder, a weight "
            "file, or a model and its weights such as ViT-B-16-quickgelu/openai"
        )
    return TrainConfig.from_dict({"method": "clip", "backbone": backbone, "weights": tag} | parameters)


def _refuse_damaged(source: str | Path) -> None:
    """Look at the checksum of a file of a run's checkpoint; CheckpointError where it is another."""
    path = Path(source).absolute()
    if path.is_file() and (path.parent / STATE).is_file():
        checked(path.parent, path.name)


def _run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or lies in as RUN/checkpoints/NAME/model.safetensors."""
    if path.is_file() and (home := path.absolute().parent.parent).name == "checkpoints":
        path = home.parent
    return path if (path / CONFIG).is_file() else None


def _two_streams(config: TrainConfig, dataset: Dataset | None, shipped: bool) -> ClipRetriever:
    """The model of a resolved configuration, with random weights.

    The ID loss has one class per training identity. FMFA's release has one per training pair, of which those beyond
    the identities are never right; so has the preset `released`, but not on SimPEDES.
    """
    for name in ONLY_IVT:
        if value := getattr(config, name):
            raise ConfigError(f"{name} is {value!r}, but method {config.method!r} has no such thing: it belongs to ivt")
    identities = 0
    if dataset is not None:
        train = dataset.split("train")
        per_pair = config.method == "fmfa" and config.preset == "released" and not shipped
        identities = len(train) if per_pair else int(train["label"].max()) + 1
    return ClipRetriever(
        config.backbone or (TINY_BACKBONE if shipped else FULL_BACKBONE),
        objectives(config.method, config.preset, config.dataset, **config.objective_overrides()),
        identities=identities,
        image_size=(config.image_height, config.image_width),
        stride=config.stride,
        seed=config.seed,
    )


def _ivt(config: TrainConfig, shipped: bool) -> IvtRetriever:
    """The model of a resolved configuration, with random weights; the released sizes without a backbone."""
    objective, backbone = config.objective_overrides(), config.backbone or (str(TINY_IVT_BACKBONE) if shipped else "")
    if set(objective) - {"loss", "tau"} or ("tau" in objective and objective.get("loss") != "sdm"):
        raise ConfigError(
            f"objectives is {config.objectives!r}, but ivt is trained with one loss, and CMPM has no temperature: "
            'expected "loss=cmpm" (as released) or "loss=sdm tau=0.02"'
        )
    sizes = {
        **(read_json(backbone) if backbone else {}),
        **objective,
        "image_size": (config.image_height, config.image_width),
        "stride": config.stride,
        "mask_image": config.mask_image,
        "mask_text": config.mask_text,
    }
    try:
        return IvtRetriever(IvtConfig(**sizes), seed=config.seed)
    except ConfigError as error:
        raise ConfigError(f"no IVT of backbone {backbone or 'as released'!r}: {error}") from error


def ivt_tokenizer(model: IvtRetriever, vocabulary: str | Path) -> WordPieceTokenizer:
    """The WordPiece tokenizer of a model.

    Args:
        model: whose vocabulary and longest text it has.
        vocabulary: a vocab.txt or hub name; empty for the shipped one where the model has its size, else BERT's.

    Raises:
        ConfigError: it cannot be read or fetched, or has another size than the model's.
    """
    sizes = model.sizes
    if not vocabulary:
        tokenizer = wordpiece_tokenizer(TINY_VOCABULARY, sizes.positions)
        if tokenizer.vocab_size == sizes.vocab_size:
            return tokenizer
    return wordpiece_tokenizer(vocabulary or BERT, sizes.positions, sizes.vocab_size)
