"""CLIP, IRRA and FMFA as systems: the two-stream model of a configuration, its tokenizer and its weights."""

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import DATA, SIMPEDES, project_path
from fmfa.errors import ConfigError
from fmfa.models.clip import ClipRetriever, objectives
from fmfa.text.tokens import CLIP_VOCABULARY, Tokenizer, clip_tokenizer, small_tokenizer
from fmfa.training.config import TrainConfig
from fmfa.weights.loading import LoadReport, load_weights

TINY_BACKBONE, TINY_WEIGHTS = DATA / "tiny_clip_config.json", DATA / "tiny_clip.safetensors"
FULL_BACKBONE, FULL_WEIGHTS = "ViT-B-16-quickgelu", "openai"
ONLY_IVT = ("text_weights", "vocabulary", "mask_image", "mask_text")


def build_clip_model(config: TrainConfig, dataset: Dataset | None = None) -> ClipRetriever:
    """The model of a resolved configuration, with random weights.

    The ID loss has one class per training identity. FMFA's release has one per training pair, of which those beyond
    the identities are never right; so has the preset `released`, but not on SimPEDES.

    Raises:
        ConfigError: the parts do not fit, or a setting that belongs to IVT is given.
    """
    for name in ONLY_IVT:
        if value := getattr(config, name):
            raise ConfigError(f"{name} is {value!r}, but method {config.method!r} has no such thing: it belongs to ivt")
    backbone = config.backbone or (TINY_BACKBONE if config.dataset.startswith(SIMPEDES) else FULL_BACKBONE)
    identities = 0
    if dataset is not None:
        train = dataset.split("train")
        per_pair = config.method == "fmfa" and config.preset == "released" and not config.dataset.startswith(SIMPEDES)
        identities = len(train) if per_pair else int(train["label"].max()) + 1
    return ClipRetriever(
        backbone,
        objectives(config.method, config.preset, config.dataset, **config.objective_overrides()),
        identities=identities,
        image_size=(config.image_height, config.image_width),
        stride=config.stride,
        seed=config.seed,
    )


def load_clip_start(config: TrainConfig, model: ClipRetriever) -> LoadReport:
    """Load the weights that training starts from; raises CheckpointError as `load_weights`."""
    shipped = config.dataset.startswith(SIMPEDES) and not config.backbone
    weights = project_path(config.weights) or (TINY_WEIGHTS if shipped else FULL_WEIGHTS)
    return load_weights(model, weights, position_grid=config.grid)


def clip_tokenizer_of(model: ClipRetriever) -> Tokenizer:
    """The tokenizer of a backbone, known by the size of its vocabulary.

    Raises:
        ConfigError: no tokenizer of that size is known.
    """
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
