"""IVT as a system: the single network of a configuration, its tokenizer and its weights."""

import json
from dataclasses import fields
from pathlib import Path

from fmfa.data.datasets import DATA, SIMPEDES, project_path
from fmfa.errors import CheckpointError, ConfigError
from fmfa.models.ivt import IvtRetriever
from fmfa.models.ivt_network import IvtConfig
from fmfa.text.wordpiece import WordPieceTokenizer, wordpiece_tokenizer
from fmfa.training.config import TrainConfig
from fmfa.weights.ivt import load_ivt, start_from_vit_and_bert
from fmfa.weights.loading import LoadReport

TINY_BACKBONE, TINY_WEIGHTS = DATA / "tiny_ivt_config.json", DATA / "tiny_ivt.safetensors"
TINY_VOCABULARY, BERT = DATA / "wordpiece.txt", "google-bert/bert-base-uncased"
VIT = "vit_base_patch16_224.orig_in21k_ft_in1k"  # timm's name for the file that the released code starts from


def build_ivt_model(config: TrainConfig) -> IvtRetriever:
    """The model of a resolved configuration, with random weights.

    Raises:
        ConfigError: the parts do not fit.
    """
    source = config.backbone or (TINY_BACKBONE if config.dataset.startswith(SIMPEDES) else "")
    sizes = (
        _backbone(source)
        | _objective(config)
        | {
            "image_size": (config.image_height, config.image_width),
            "stride": config.stride,
            "mask_image": config.mask_image,
            "mask_text": config.mask_text,
        }
    )
    return IvtRetriever(IvtConfig(**sizes), seed=config.seed)


def load_ivt_start(config: TrainConfig, model: IvtRetriever) -> LoadReport:
    """Load the weights that training starts from: an IVT file, or an ImageNet ViT and a BERT.

    Raises:
        CheckpointError: they cannot be found, fetched or read, or are of another shape.
    """
    shipped = config.dataset.startswith(SIMPEDES) and not config.backbone
    weights = project_path(config.weights) or (str(TINY_WEIGHTS) if shipped and not config.text_weights else "")
    if config.text_weights or not weights:
        return start_from_vit_and_bert(model, weights or VIT, config.text_weights or BERT, position_grid=config.grid)
    if not Path(weights).is_file():
        raise CheckpointError(
            f"weights {weights!r}: no such file. IVT starts from a local file (a released IVT checkpoint or an own "
            ".safetensors), from an ImageNet ViT with BERT as text_weights, or from 'none'"
        )
    return load_ivt(model, weights, position_grid=config.grid)


def ivt_tokenizer(model: IvtRetriever, vocabulary: str | Path = "") -> WordPieceTokenizer:
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
    tokenizer = wordpiece_tokenizer(vocabulary or BERT, sizes.positions)
    if tokenizer.vocab_size != sizes.vocab_size:
        raise ConfigError(
            f"the vocabulary {str(vocabulary or BERT)!r} has {tokenizer.vocab_size} pieces, the model "
            f"{sizes.vocab_size}; give the vocab.txt that belongs to the backbone"
        )
    return tokenizer


def _backbone(source: str | Path) -> dict:
    """Fields of `IvtConfig` from a JSON file; none, the released sizes, without one."""
    if not source:
        return {}
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone {str(source)!r}: expected a JSON file with IvtConfig's fields: {error}") from error
    known = [field.name for field in fields(IvtConfig)]
    if not isinstance(found, dict) or (unknown := sorted(set(found) - set(known))):
        what = f"unknown {', '.join(unknown)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise ConfigError(
            f"backbone {str(source)!r} holds {what}; expected an object with fields of {', '.join(known)}"
        )
    return found


def _objective(config: TrainConfig) -> dict:
    """Loss and temperature from `objectives`; CMPM without."""
    found = config.objective_overrides()
    chosen = {"loss": "cmpm", **found}
    if unknown := sorted(set(found) - {"loss", "tau"}):
        raise ConfigError(
            f"objectives names {', '.join(unknown)}, but ivt is trained with one loss and knows loss and tau alone: "
            '"loss=cmpm" (as released) or "loss=sdm tau=0.02"'
        )
    if "tau" in found and chosen["loss"] == "cmpm":
        raise ConfigError(f"objectives has tau={found['tau']}, but CMPM has no temperature: leave it out, or loss=sdm")
    tau = chosen.get("tau", 1)
    if type(tau) not in (int, float) or tau <= 0:
        raise ConfigError(f"objectives has tau={tau}; expected a temperature above 0, such as tau=0.02")
    return chosen
