"""IVT: one vision transformer that encodes an image or a text, trained by one matching loss.

Shu et al., "See Finer, See More: Implicit Modality Alignment for Text-based Person Retrieval", 2022.
"""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.errors import ConfigError
from fmfa.losses import pair_similarities, sdm
from fmfa.losses.projection import cmpm_joint
from fmfa.models.distributed import gather, largest, world_size
from fmfa.models.interfaces import Encoded, ModelOutput
from fmfa.models.ivt_network import IvtConfig, SharedEncoder, initialise


class IvtRetriever(nn.Module):
    """IVT with its training objective.

    The embedding of either modality is output token 0 after the final LayerNorm, without projection.
    Released fine-tuning is `loss="cmpm"` on batches of 3B rows (word, phrase, sentence); with batches
    of B rows it is IVT without multi-level alignment, and with both mask shares 0 IVT without
    bidirectional mask modelling.

    Attributes:
        sizes: what the model was built from.
        config: the same as plain values, for a checkpoint's record.
        encoder_vl: the network.
    """

    def __init__(self, sizes: IvtConfig, *, seed: int = 0) -> None:
        """Random weights from `seed`, which also starts the generator of dropped positions."""
        super().__init__()
        self.sizes = sizes
        self.config = asdict(sizes) | {"image_size": list(sizes.image_size)}
        self.encoder_vl = SharedEncoder(sizes)
        self.mask_generator = torch.Generator()
        initialise(self.encoder_vl, torch.Generator().manual_seed(seed))
        self.reseed(seed)

    @classmethod
    def from_config(cls, config: Mapping) -> "IvtRetriever":
        """Build the model that `config` (the attribute of that name, as JSON keeps it) describes."""
        return cls(IvtConfig(**{**config, "image_size": tuple(config["image_size"])}))

    def reseed(self, seed: int) -> None:
        """Restart the generator of dropped positions, for example at every step of a resumable run."""
        self.mask_generator.manual_seed(seed)

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> Encoded:
        """Encode images, float [B, 3, H, W] normalised to [-1, 1].

        Args:
            images: of the configured size.
            kept: [K] patch positions (1 = first patch) that are not dropped; None keeps all.

        Returns:
            tokens [B, 1+N, D] (1+K with `kept`, in its order), embedding [B, D].

        Raises:
            ConfigError: images of another size.
        """
        if tuple(images.shape[-2:]) != tuple(self.sizes.image_size):
            raise ConfigError(
                f"images of {tuple(images.shape[-2:])} pixels (height, width); the model was built for "
                f"{tuple(self.sizes.image_size)}: resize the images or build the model for their size"
            )
        tokens = self.encoder_vl(self.encoder_vl.image_stem(images), "mlp_vis", None, kept)
        return Encoded(tokens=tokens, embedding=tokens[:, 0])

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None, kept: Tensor | None = None) -> Encoded:
        """Encode texts.

        Args:
            ids: int64 [B, L], `[CLS]` first, padded with 0.
            attention_mask: [B, L], 1 for text and 0 for padding; None takes every id but 0 as text.
            kept: [K] positions from 1 that are not dropped; None keeps all.

        Returns:
            tokens [B, L, D] (1+K with `kept`), embedding [B, D].

        Raises:
            ConfigError: more positions than the position table has rows.
        """
        if ids.shape[1] > self.sizes.positions:
            raise ConfigError(
                f"texts of {ids.shape[1]} positions, the model has {self.sizes.positions}: "
                "shorten the captions or give the tokenizer the model's context_length"
            )
        mask = ids != 0 if attention_mask is None else attention_mask
        tokens = self.encoder_vl(self.encoder_vl.embeddings(ids), "mlp_txt", mask, kept)
        return Encoded(tokens=tokens, embedding=tokens[:, 0])

    def forward(
        self,
        batch: Mapping[str, Tensor],
        kept_image: Tensor | None = None,
        kept_text: Tensor | None = None,
    ) -> ModelOutput:
        """The training loss of a batch.

        In training mode each modality drops tokens at the same random positions of all rows (BMM; the
        image's are drawn first); unmasked features play no part in the step.

        Args:
            batch: `images`, `caption_ids`, `labels`, optionally `attention_mask`; B rows, or 3B with
                multi-level alignment.
            kept_image: positions used instead of a draw, as in `encode_image`.
            kept_text: positions used instead of a draw, as in `encode_text`.

        Returns:
            One loss, "cmpm" or "sdm", over the rows of all processes; the stats count dropped tokens and
            hold the mean cosines of matched and unmatched pairs.
        """
        images, (ids, attention_mask) = batch["images"], self._texts(batch)
        patches = self.encoder_vl.pos_embed.shape[1] - 1
        if self.training:
            kept_image = self._kept(kept_image, patches, self.sizes.mask_image)
            kept_text = self._kept(kept_text, ids.shape[1] - 1, self.sizes.mask_text)
        image = self.encode_image(images, kept_image)
        text = self.encode_text(ids, attention_mask, kept_text)
        joint = gather(image.embedding), gather(text.embedding), gather(batch["labels"])
        loss = cmpm_joint(*joint) if self.sizes.loss == "cmpm" else sdm(*joint, scale=1 / self.sizes.tau)
        return ModelOutput(
            losses={self.sizes.loss: loss},
            features={"image_tokens": image.tokens, "text_tokens": text.tokens},
            stats={
                "image_tokens_dropped": float(1 + patches - image.tokens.shape[1]),
                "text_tokens_dropped": float(ids.shape[1] - text.tokens.shape[1]),
                **pair_similarities(joint[1], joint[0], joint[2]),
            },
        )

    def _texts(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, padded to the longest text of all processes."""
        ids = batch["caption_ids"]
        mask = batch.get("attention_mask", ids != 0)
        if world_size() > 1 and self.training and self.sizes.mask_text:
            # Dropped positions are drawn from the padded length, which one process would share.
            padding = int(largest(torch.tensor(ids.shape[1], device=ids.device))) - ids.shape[1]
            ids, mask = F.pad(ids, (0, padding)), F.pad(mask, (0, padding))
        return ids, mask

    def _kept(self, given: Tensor | None, tokens: int, share: float) -> Tensor | None:
        if given is not None or share == 0:
            return given
        return draw_kept(tokens, share, self.mask_generator)


def draw_kept(tokens: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw which tokens stay under bidirectional mask modelling's token dropping.

    d is uniform over 0 ... floor(share * (tokens + 1)), position 0 counted as released; then d of the
    positions 1 ... tokens are dropped, all equally likely.

    Args:
        tokens: tokens besides position 0; padding counts.
        share: largest share dropped.
        generator: a CPU generator, the only source of the draw.

    Returns:
        int64 [tokens - d] on the CPU, in shuffled order.
    """
    order = 1 + torch.randperm(tokens, generator=generator)
    most = min(int(share * (tokens + 1)), tokens)
    dropped = int(torch.randint(most + 1, (), generator=generator))
    return order[dropped:]
