"""What pre-training does differently for CLIP and for IVT: model, words and the treatment of pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fmfa.data.datasets import DATA
from fmfa.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTransform,
    fmfa_training,
    ivt_evaluation,
    ivt_training,
)
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtConfig
from fmfa.models.objectives import Objectives
from fmfa.models.outputs import Retriever
from fmfa.pretraining.ivt_heads import IvtPretrainer
from fmfa.pretraining.span_masking import CONTEXT, SpanMasking, prepare_caption
from fmfa.text.bytepair import (
    Tokenizer,
    backbone_tokenizer,
)
from fmfa.text.wordpiece import WordPieceTokenizer, wordpiece_tokenizer

CONFIGS = {"clip": DATA / "tiny_clip_config.json", "ivt": DATA / "tiny_ivt_config.json"}
WORDPIECE = DATA / "wordpiece.txt"
FULL_WIDTH = 768  # that IVT's initial standard deviation of 0.02 was made for
Captions = Callable[[str, int], dict[str, Tensor]]
"""From a caption and the seed of all that is random to the rows of ids that a model reads, int64 [L]."""
# Settings that the other method does not have.
OWN = {"clip": ("tau",), "ivt": ("fusion_depth", "temperature", "matrix_scale")}


@dataclass(frozen=True, eq=False)
class Method:
    """The parts of a method.

    Attributes:
        model: with the weights that pre-training starts from.
        captions: from a caption to the ids that the model reads.
        plain: uint8 [3, H, W] to the network's float32, nothing random.
        augmented: of the pictures of a list.
        kept: beginning of the names of the parameters that retrieval needs.
        name: in words.
    """

    model: Retriever
    captions: Captions
    plain: nn.Module
    augmented: ImageTransform
    kept: str
    name: str

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors that retrieval needs."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name.startswith(self.kept)}


def ivt(settings: Mapping) -> Method:
    """An IVT with ITC, ITM and MLM, whose shared encoder alone is kept."""
    sizes, seed = IvtConfig(**settings["config"]), settings["seed"]
    vocabulary = settings["vocabulary"] or WORDPIECE
    tokenizer = wordpiece_tokenizer(vocabulary, min(CONTEXT, sizes.positions), sizes.vocab_size)
    model = IvtPretrainer(sizes, fusion_depth=settings["fusion_depth"], seed=seed)
    words = model.encoder_fusion.cls.predictions.decoder  # a table, not a matrix
    with torch.no_grad():
        model.temp.fill_(settings["temperature"])
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module is not words:
                module.weight.mul_(settings["matrix_scale"] or (FULL_WIDTH / sizes.width) ** 0.5)
        generator = torch.Generator().manual_seed(seed + 2)
        nn.init.normal_(model.encoder_vl.pos_embed, std=settings["position_std"], generator=generator)
    captions, plain = MaskedCaptions(tokenizer), ivt_evaluation(sizes.image_size).finish
    return Method(model, captions, plain, ivt_training(sizes.image_size), "encoder_vl.", "IVT's encoder")


def clip(settings: Mapping) -> Method:
    """A CLIP with ITC (InfoNCE at a fixed temperature)."""
    config = settings["config"]
    tokenizer = backbone_tokenizer(config["text_cfg"], settings["vocabulary"])
    objectives = Objectives(itc=1.0, tau=settings["tau"])
    model = ClipRetriever(config, objectives, position_std=settings["position_std"], seed=settings["seed"])
    augmented = fmfa_training(tuple(model.config["image_size"]))
    return Method(model, PlainCaptions(tokenizer), ClipPixels(), augmented, "", "CLIP")


METHODS: dict[str, Callable[[Mapping], Method]] = {"clip": clip, "ivt": ivt}


class ClipPixels(nn.Module):
    """uint8 to CLIP's normalised float32, by true division.

    torchvision's scaling differs in the last bit, which would change the shipped weights.
    """

    def forward(self, picture: Tensor) -> Tensor:
        """Normalise a picture [3, H, W]."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (picture.float() / 255 - mean) / std


class PlainCaptions:
    """A caption as it is: `caption_ids`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, caption: str, seed: int) -> dict[str, Tensor]:
        """Encode a caption; nothing is random."""
        return {"caption_ids": self.tokenizer([caption])[0]}


class MaskedCaptions:
    """A prepared caption with masked words: `caption_ids`, `masked_ids` and `masked_labels`."""

    def __init__(self, tokenizer: WordPieceTokenizer) -> None:
        self.tokenizer, self._masking = tokenizer, SpanMasking(tokenizer)

    def __call__(self, caption: str, seed: int) -> dict[str, Tensor]:
        """Encode a caption and hide words of it."""
        ids = self.tokenizer([prepare_caption(caption)])[0]
        masked_ids, masked_labels = self._masking(ids, np.random.default_rng(seed))
        return {"caption_ids": ids, "masked_ids": masked_ids, "masked_labels": masked_labels}
