"""The parameters of a training run: one flat, checked record of plain values, and the published presets."""

import ast
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from fmfa.data.annotations import SIMPEDES, canonical_name
from fmfa.data.datasets import which_dataset
from fmfa.errors import ConfigError, checked, nearest, setting
from fmfa.models.objectives import objectives

METHODS = ("clip", "irra", "fmfa", "ivt")

_LARGEST = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Open = Annotated[int, Field(ge=-1, le=_LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


@checked
class TrainConfig:
    """Everything that decides a training run, in values that a notebook's parameters can hold.

    `dataset` is kept in its canonical spelling. 0, -1 or "" means the preset's value if the help says so;
    `resolved` fills those in. Every field's help text and limits are in its pydantic field.

    Raises:
        ConfigError: a value of the wrong type, outside its range, or not among the choices.
    """

    method: Literal["clip", "irra", "fmfa", "ivt"] = setting("fmfa", "clip (ITC alone), irra, fmfa or ivt")
    preset: Literal["paper", "released"] = setting("paper", "paper's equations or released code")
    recipe: Literal["", "fmfa", "ivt"] = setting("", 'whose optimiser and batches; "" = own, on SimPEDES fmfa')
    objectives: str = setting("", 'changes to the losses, such as "asdm_alpha=5 efa=0", of ivt "loss=sdm tau=0.02"')
    dataset: str = setting("", 'SimPEDES-street, CUHK-PEDES, ... or your own name; "" = what the file at root says')
    root: str = setting("", 'folder of the data set, relative to where the command is given; "" makes SimPEDES')
    scale: Literal["tiny", "small", "standard", "large", "wide"] = setting("small", "of SimPEDES without a root")
    data_seed: Seed = setting(0, "of SimPEDES without a root, and of held-out identities")
    drop_empty_captions: bool = setting(False, "leave captions without a word out, which are refused otherwise")
    backbone: str = setting("", 'model name or configuration; "" = the data set\'s')
    weights: str = setting("", 'weight file or name; "" = the data set\'s')
    text_weights: str = setting("", "BERT for ivt by file or hub name; `weights` is an ImageNet ViT then")
    vocabulary: str = setting("", "ivt's vocab.txt or hub name; \"\" = the one of the backbone's size")
    position_grid: str = setting("", 'rows x columns of the weights\' positions, as "24x8"; "" = by their number')
    image_height: Count = setting(0, "pixels; 0 = the data set's")
    image_width: Count = setting(0, "pixels; 0 = the data set's")
    stride: Count = setting(0, "pixels between patches; 0 = the preset's")
    epochs: Open = setting(-1, "passes over the training captions; 0 = no training, -1 = the preset's")
    batch_size: Count = setting(0, "pairs in a batch over all processes; 0 = the preset's")
    instances: Open = setting(-1, "K of P x K sampling, 0 = random, -1 = the preset's")
    optimizer: Literal["", "adam", "adamw", "sgd"] = setting("", '"" = the preset\'s')
    learning_rate: float = setting(0.0, "base rate; 0 = the preset's", ge=0)
    weight_decay: float = setting(-1.0, "-1 = the preset's", ge=-1)
    eps: float = setting(0.0, "of Adam's denominator; 0 = the preset's", ge=0)
    beta1: float = setting(0.9, "Adam's mean of gradients", ge=0, le=0.999999)
    beta2: float = setting(0.999, "Adam's mean of squared gradients", ge=0, le=0.999999)
    momentum: float = setting(0.9, "of SGD", ge=0, le=0.999999)
    factors: Literal["", "irra", "ivt", "flat"] = setting("", 'rate factors; "" = the preset\'s')
    schedule: Literal["", "warmup_cosine", "ivt", "ivt_from_1", "linear", "constant"] = setting(
        "", '"" = the preset\'s'
    )
    warmup_epochs: float = setting(-1.0, "-1 = the preset's; by parts of an epoch for linear alone", ge=-1)
    warmup_factor: float = setting(0.1, "first epoch's rate by base rate; not for ivt", ge=0, le=1)
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "of the forward pass")
    compile: bool = setting(False, "compile the model (torch.compile): minutes first; results differ by rounding")
    accumulate: Positive = setting(1, "batches summed into one step")
    clip_norm: float = setting(0.0, "largest gradient norm; 0 = no clipping", ge=0)
    mask_rate: float = setting(0.15, "share of caption tokens masked for IRR", ge=0, le=0.9)
    augmentation: Literal["full", "none"] = setting("full", "of training pictures")
    pairs: Literal["true", "shuffled", "dropped"] = setting("true", '"shuffled": with captions of other people')
    wrong_share: float = setting(1.0, "of the captions that are shuffled or dropped", gt=0, le=1)
    flip: Literal["", "mirror", "swap", "off"] = setting("", 'of left and right in training; "" = the data set\'s')
    text_levels: Literal["", "off", "released", "spans"] = setting("", "IVT's MLA; \"\" = the preset's")
    mask_image: float = setting(-1.0, "IVT's BMM on pictures, -1 = released", ge=-1, le=0.9)
    mask_text: float = setting(-1.0, "IVT's BMM on captions, -1 = released", ge=-1, le=0.9)
    seed: Seed = setting(0, "of weights, sampling, augmentation, masking and dropout")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto uses a GPU if available")
    workers: Count = setting(0, "loader processes")
    cache: str = setting("", 'folder for the pictures in the size that is trained on; "" = none is kept on disk')
    evaluate_every: Positive = setting(1, "epochs between validations; the last is always validated")
    checkpoint_every: Count = setting(0, "steps between checkpoints within an epoch; 0 = none")
    keep_epochs: bool = setting(False, "keep the weights of every epoch, to tell what selecting on test would claim")
    log_gradients_every: Count = setting(0, "steps between gradient norms by loss; 0 = never")
    tensorboard: bool = setting(True, "write TensorBoard logs")

    def __post_init__(self) -> None:
        """Take any spelling for the data set's; check what limits cannot say."""
        object.__setattr__(self, "dataset", canonical_name(self.dataset))
        for name in ("weight_decay", "mask_image", "mask_text", "warmup_epochs"):
            if -1 < getattr(self, name) < 0:
                raise ConfigError(f"{name}: should be -1 or from 0, found {getattr(self, name)}")
        if self.pairs == "true" and self.wrong_share < 1:
            raise ConfigError(f"wrong_share is {self.wrong_share:g}, but pairs is true; expected shuffled or dropped")
        if self.pairs == "dropped" and self.wrong_share == 1:
            raise ConfigError("wrong_share is 1, but dropping all pairs leaves none; expected a share below 1")
        if self.position_grid and self.grid is None:
            raise ConfigError(f"position_grid is {self.position_grid!r}; expected rows x columns, such as 24x8")

    @property
    def grid(self) -> tuple[int, int] | None:
        """`position_grid` as (rows, columns); None if it is empty."""
        found = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", self.position_grid)
        return (int(found[1]), int(found[2])) if found else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Build from a mapping, as a notebook or a JSON file gives it.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), or a bad value.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ConfigError(
                f"unknown parameter {unknown[0]!r}; {nearest(unknown[0], known)}known are {', '.join(known)}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """All values by name, ready for JSON."""
        return asdict(self)

    def resolved(self) -> "TrainConfig":
        """The same run with every value that was left to the file, preset or recipe filled in; given values stay.

        Raises:
            ConfigError: a batch that is no whole number of identities, objectives that do not fit the method, or ones
                that read masked captions without a mask rate.
            AnnotationError: no name was given, and the file at `root` is not there or not one of several.
        """
        dataset = self.dataset
        if dataset in ("", SIMPEDES):
            dataset = which_dataset(dataset, self.root)
        open_values = {
            name: value
            for name, value in preset_values(self.method, self.preset, dataset, self.recipe).items()
            if getattr(self, name) in (0, -1, "") and getattr(self, name) == getattr(TrainConfig, name)
        }
        config = replace(self, dataset=dataset, **open_values)
        if config.instances and config.batch_size % config.instances:
            raise ConfigError(
                f"batch_size {config.batch_size} is not a multiple of instances {config.instances}; "
                "P x K sampling needs P whole identities of K pairs: change one of the two"
            )
        if config.method != "ivt" and not config.mask_rate:
            losses = objectives(config.method, config.preset, dataset, **config.objective_overrides())
            if losses.needs_mask:
                reader = "IRR" if losses.irr else "retrieval_sees_mask"
                raise ConfigError(
                    f"mask_rate is 0, but {reader} reads masked captions: give a rate above 0 (the papers' is 0.15), "
                    'or switch it off by objectives "irr=0 retrieval_sees_mask=False"'
                )
        return config

    def objective_overrides(self) -> dict[str, str | int | float | bool]:
        """`objectives` as a dict: "name=value" parts divided by spaces or commas, values as plain types.

        Raises:
            ConfigError: a part without "=", or a name given twice.
        """
        overrides: dict[str, str | int | float | bool] = {}
        for part in self.objectives.replace(",", " ").split():
            name, equals, text = part.partition("=")
            if not (name and equals and text):
                raise ConfigError(f'objectives has {part!r}; expected "name=value", such as "asdm_alpha=5"')
            if name in overrides:
                raise ConfigError(f"objectives names {name!r} twice; leave one of them out")
            try:
                overrides[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # a word, or what Python cannot parse
                overrides[name] = text
        return overrides


def preset_values(method: str, preset: str, dataset: str, recipe: str = "") -> dict[str, Any]:
    """What the papers and the released code set, by method and data set; SimPEDES has the project's own.

    FMFA: ACM TOMM 22(5), 2026. IRRA and the CLIP baseline share its recipe under `paper`, so that rows differ by their
    losses only. `released` has each release's own: FMFA's has one rate and decay for everything and half the rate,
    IRRA's (CVPR 2023) the rate and factors of `paper`; CLIP is trained as by IRRA's code. Both train half-precision
    weights with Adam's eps at 1e-3; `paper` trains in float32 and takes 1e-8.

    IVT: ECCVW 2022, the released fine-tuning under both presets, from epoch 0 with a warm-up that begins at its start.
    `released` counts epochs on CUHK-PEDES from 1, as the code does there, so that its first rate is 1.04e-3.

    What the releases do and `released` does not: they select the epoch on test, and IVT's code goes on for a 121st
    epoch at the final rate of 1e-5 on ICFG-PEDES and RSTPReid.

    Args:
        method: decides sizes, text levels and token dropping.
        preset: "paper" or "released"; IVT has only what was released.
        dataset: name of the data set, in any spelling.
        recipe: "fmfa" or "ivt" decides optimiser, rates, schedule, epochs and batches; "" is the method's own, on
            SimPEDES "fmfa" (with AdamW) for all.
    """
    dataset = canonical_name(dataset)
    ivt, rstp = method == "ivt", dataset == "RSTPReid"
    simpedes = dataset.startswith(SIMPEDES)
    recipe = recipe or ("ivt" if ivt and not simpedes else "fmfa")
    values: dict[str, Any] = {
        "recipe": recipe,
        "image_height": 384,
        "image_width": 128,
        "warmup_epochs": 5,
        "eps": 1e-8,
    }
    released = preset == "released"
    if recipe == "ivt":
        values |= _ivt_recipe(rstp, from_1=released and dataset == "CUHK-PEDES")
    else:
        values |= _fmfa_recipe(released, flat=released and method in ("fmfa", "ivt"), icfg=dataset == "ICFG-PEDES")
    values |= {
        "stride": 12 if ivt and not rstp else 16,
        "text_levels": "released" if ivt else "off",
        "mask_image": 0.2 if ivt else 0.0,
        "mask_text": 0.2 if ivt else 0.0,
        "flip": "mirror",
    }
    if not simpedes:
        return values
    values |= {"image_height": 96, "image_width": 32, "stride": 8, "flip": "swap", "epochs": 10, "warmup_epochs": 1}
    if recipe == "fmfa":
        # of 1e-4, 3e-4 and 1e-3 the best on validation for every method (data/results/tuning)
        values |= {"optimizer": "adamw", "learning_rate": 1e-3, "eps": 1e-8}
    return values


def _ivt_recipe(rstp: bool, *, from_1: bool) -> dict[str, str | int | float]:
    return {
        "optimizer": "sgd",
        "learning_rate": 5e-3,
        "weight_decay": 1e-4,
        "factors": "ivt",
        "schedule": "ivt_from_1" if from_1 else "ivt",
        "epochs": 120,
        "batch_size": 48 if rstp else 28,
        "instances": 4,
    }


def _fmfa_recipe(released: bool, *, flat: bool, icfg: bool) -> dict[str, str | int | float]:
    return {
        "optimizer": "adam",
        "learning_rate": 5e-6 if flat else 1e-5,
        "weight_decay": 4e-5,
        "eps": 1e-3 if released else 1e-8,
        "factors": "flat" if flat else "irra",
        "schedule": "warmup_cosine",
        "epochs": 100 if icfg and not released else 60,
        "batch_size": 64,
        "instances": 0,
    }
