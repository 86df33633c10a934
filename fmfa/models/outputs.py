"""What every retrieval model hands to training and evaluation."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Encoded:
    """One modality's features of a batch.

    Attributes:
        tokens: image: [B, 1+N, D], position 0 is the class token; text: [B, L, D], where L may be the
            longest caption of the batch instead of the full context.
        embedding: [B, D], not normalised; retrieval compares its cosine.
    """

    tokens: Tensor
    embedding: Tensor


@dataclass
class ModelOutput:
    """The training losses of a batch.

    Attributes:
        losses: the weighted parts by name; the total is their sum.
        features: the shared features that the losses meet in, with their graph attached, for
            gradient-norm logging: "image_tokens" and "text_tokens", and "masked_text_tokens" when the
            masked captions were encoded apart. A loss need not depend on each of them.
        stats: detached scalars worth logging.
    """

    losses: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, float | Tensor] = field(default_factory=dict)


class Retriever(nn.Module):
    """A model that encodes images and texts into one space; its forward takes a batch and returns a `ModelOutput`.

    Attributes:
        config: what it was built from, in plain values for a checkpoint's record.
    """

    config: dict[str, Any]

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode images, float [B, 3, H, W] normalised."""
        raise NotImplementedError

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode texts, int64 [B, L]."""
        raise NotImplementedError
