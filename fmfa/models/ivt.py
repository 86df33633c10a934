"""IVT: one vision transformer that encodes an image or a text, trained by one matching loss.

Shu et al., "See Finer, See More: Implicit Modality Alignment for Text-based Person Retrieval", 2022.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from timm.layers import Attention, DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.errors import ConfigError, checked
from fmfa.losses.matching import cmpm, pair_similarities, sdm
from fmfa.models.distributed import gather, largest, world_size
from fmfa.models.outputs import Encoded, ModelOutput, Retriever

AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
FromJson = BeforeValidator(lambda size: tuple(size) if isinstance(size, list) else size)  # which has no tuples
Size = Annotated[tuple[AtLeastOne, AtLeastOne], FromJson]
Share = Annotated[float, Field(ge=0, lt=1)]
MASKED_LOGIT = -10000.0  # what padding keys get, as released; a softmax gives them exactly 0


@checked
class IvtConfig:
    """Sizes, regularisation and objective of IVT; the defaults are the released CUHK-PEDES model's.

    Raises:
        ConfigError: a value of the wrong type or outside its range, or sizes that do not fit together.
    """

    width: AtLeastOne = 768
    depth: AtLeastOne = 12  # blocks
    heads: AtLeastOne = 12
    mlp_ratio: Positive = 4.0
    image_size: Size = (384, 128)  # height, width in pixels
    patch: AtLeastOne = 16
    stride: AtLeastOne = 12  # pixels; RSTPReid's released model has 16
    vocab_size: AtLeastOne = 30522
    positions: AtLeastOne = 512  # longest text
    token_types: AtLeastOne = 2  # rows of the table; only row 0 is used
    drop_path: Share = 0.1  # of the last block; rises linearly from 0 in the first
    text_dropout: Share = 0.1  # in the text stem
    mask_image: Share = 0.2  # largest share of image tokens dropped in training (BMM); 0 = off
    mask_text: Share = 0.2  # the same for text tokens
    loss: Literal["cmpm", "sdm"] = "cmpm"
    tau: Positive = 0.02  # temperature of SDM; CMPM has none

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")
        if min(self.image_size) < self.patch or self.stride > self.patch:
            raise ConfigError(
                f"patch {self.patch} at stride {self.stride} does not fit {self.image_size} pixels; "
                "the patch must fit into the image and the stride lie between 1 and the patch"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        height, width = self.image_size
        return (height - self.patch) // self.stride + 1, (width - self.patch) // self.stride + 1


class IvtRetriever(Retriever):
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
        return cls(IvtConfig(**config))

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
        loss = cmpm(*joint) if self.sizes.loss == "cmpm" else sdm(*joint, scale=1 / self.sizes.tau)
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


class PatchEmbed(nn.Module):
    """Overlapping patches: one convolution without padding, flattened row by row."""

    def __init__(self, patch: int, stride: int, width: int) -> None:
        """Square patches of `patch` pixels, `stride` pixels apart."""
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class BertEmbeddings(nn.Module):
    """BERT's embedding layer: word + position + token type 0, LayerNorm, dropout."""

    def __init__(self, config: IvtConfig) -> None:
        """Tables of the configured sizes."""
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.text_dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        embedded = self.word_embeddings(ids) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(embedded))


class Block(nn.Module):
    """A pre-norm transformer block whose attention and norms are shared by both modalities."""

    def __init__(self, config: IvtConfig, drop_path: float) -> None:
        """`drop_path` is the probability with which a sample skips a branch in training."""
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp_vis = Mlp(config.width, hidden)
        self.mlp_txt = Mlp(config.width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, mlp: str, key_bias: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D], with the MLP named; `key_bias` [B, 1, 1, N] is added to the logits."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), attn_mask=key_bias))
        return tokens + self.drop_path(getattr(self, mlp)(self.norm2(tokens)))


class SharedEncoder(nn.Module):
    """The one network: stems, shared blocks, shared final LayerNorm."""

    def __init__(self, config: IvtConfig) -> None:
        """Uninitialised tables; call `initialise` or load weights."""
        super().__init__()
        rows, columns = config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.width))
        self.type_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.width))
        self.patch_embed = PatchEmbed(config.patch, config.stride, config.width)
        self.embeddings = BertEmbeddings(config)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def image_stem(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1+N, D]: class token and patches with positions and types added."""
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return tokens + self.pos_embed + self.type_embed

    def forward(self, tokens: Tensor, mlp: str, mask: Tensor | None, kept: Tensor | None) -> Tensor:
        """Run the blocks on the stem's tokens.

        Args:
            tokens: [B, N, D].
            mlp: "mlp_vis" or "mlp_txt".
            mask: [B, N], 1 where a key may be attended, 0 for padding; None = all.
            kept: [K] positions from 1 that stay besides position 0; None = all.
        """
        if kept is not None:
            positions = torch.cat([kept.new_zeros(1), kept]).to(tokens.device)
            tokens = tokens[:, positions]
            mask = None if mask is None else mask[:, positions]
        bias = None if mask is None else ((1 - mask.to(tokens.dtype)) * MASKED_LOGIT)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, mlp, bias)
        return self.norm(tokens)


@torch.no_grad()
def initialise(encoder: SharedEncoder, generator: torch.Generator) -> None:
    """Fill the encoder with IVT's random initialisation, drawn from a CPU `generator`.

    Linear weights, class token, positions and types: truncated normal of std 0.02; patch convolution:
    normal of std sqrt(2 / (patch * patch * width)); BERT tables: normal of std 0.02 with a zero padding
    row; biases 0, LayerNorms 1 and 0.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Conv2d):
            side = module.kernel_size[0]
            std = (2 / (side * side * module.out_channels)) ** 0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for table in (encoder.cls_token, encoder.pos_embed, encoder.type_embed):
        nn.init.trunc_normal_(table, std=0.02, generator=generator)
