"""IVT's pre-training on image-caption pairs: contrast (ITC), matching (ITM) and masked words (MLM).

Shu et al., "See Finer, See More: Implicit Modality Alignment for Text-based Person Retrieval", 2022; the
details are the released code's. Parameter names are those of the released pre-training checkpoints:
`encoder_vl.*`, `encoder_fusion.*`, `itm.*`, `temp`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel

from fmfa.errors import ConfigError
from fmfa.losses.matching import masked_token_loss
from fmfa.models.ivt import MASKED_LOGIT, IvtConfig, IvtRetriever
from fmfa.models.outputs import ModelOutput

INITIAL_TEMPERATURE = 0.5
LEAST_WEIGHT = 1e-4  # added to every negative's probability of being drawn


class FusionEncoder(nn.Module):
    """BERT layers with cross-attention to the image tokens, and BERT's masked-word head (transformers').

    The input is the shared encoder's text tokens, so the embedding layer of its own is bypassed: its word
    table serves as the head's decoder alone, and its other tables, kept for the released layout, are
    frozen. Dropout, of hidden values and attention, is `sizes.text_dropout`, BERT's 0.1.
    """

    def __init__(self, sizes: IvtConfig, depth: int = 6) -> None:
        """`depth` layers of the sizes of the shared encoder, not initialised; 6 layers are released."""
        super().__init__()
        bert = BertLMHeadModel(
            BertConfig(
                vocab_size=sizes.vocab_size,
                hidden_size=sizes.width,
                num_hidden_layers=depth,
                num_attention_heads=sizes.heads,
                intermediate_size=int(sizes.width * sizes.mlp_ratio),
                hidden_dropout_prob=sizes.text_dropout,
                attention_probs_dropout_prob=sizes.text_dropout,
                max_position_embeddings=sizes.positions,
                type_vocab_size=sizes.token_types,
                is_decoder=True,
                add_cross_attention=True,
            )
        )
        self.bert, self.cls = bert.bert, bert.cls
        tables = self.bert.embeddings
        for unused in (tables.position_embeddings, tables.token_type_embeddings, tables.LayerNorm):
            unused.requires_grad_(False)

    def forward(self, text_tokens: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Fuse text with images.

        Args:
            text_tokens: [B, L, D], of the shared encoder.
            attention_mask: [B, L], 1 for text and 0 for padding.
            image_tokens: [B, 1+N, D], of the shared encoder; every one may be attended.

        Returns:
            [B, L, D]; position 0 is the pair's token.
        """
        key_bias = ((1 - attention_mask.to(text_tokens.dtype)) * MASKED_LOGIT)[:, None, None]
        for layer in self.bert.encoder.layer:
            text_tokens = layer(text_tokens, key_bias, image_tokens)
        return text_tokens

    def words(self, fused: Tensor) -> Tensor:
        """Logits over the vocabulary: [..., D] -> [..., V]."""
        return self.cls(fused)


class IvtPretrainer(IvtRetriever):
    """IVT with its pre-training losses, each of weight 1: "itc", "itm" and "mlm".

    No token is dropped in pre-training (the mask shares play no part), and each process computes the
    losses of its own batch, both as released.

    Attributes:
        temp: ITC's temperature, learnt from 0.5 on and not clamped.
        encoder_fusion: the fusion encoder.
        itm: classifier of its token 0: 0 = not a pair, 1 = a pair.
    """

    def __init__(self, sizes: IvtConfig, *, fusion_depth: int = 6, seed: int = 0) -> None:
        """Random weights from `seed`; the shared encoder's are those of an `IvtRetriever` of this seed.

        The generator that drops tokens in fine-tuning draws the hard negatives here.
        """
        super().__init__(sizes, seed=seed)
        self.temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        self.encoder_fusion = FusionEncoder(sizes, fusion_depth)
        self.itm = nn.Linear(sizes.width, 2)
        _initialise(nn.ModuleList([self.encoder_fusion, self.itm]), torch.Generator().manual_seed(seed + 1))

    def forward(self, batch: Mapping[str, Tensor]) -> ModelOutput:  # type: ignore[override]  # nothing is dropped
        """The pre-training losses of a batch of pairs.

        Args:
            batch: `images`, `caption_ids`, `labels` (equal for equal pairs), `masked_ids` and
                `masked_labels` (the original id where a word is asked for, else 0), optionally
                `attention_mask`.

        Returns:
            The three losses; the stats are the accuracies of ITM and MLM and the temperature.

        Raises:
            ConfigError: a batch whose pairs all have one label, so that there are no negatives.
        """
        ids, labels = batch["caption_ids"], batch["labels"]
        mask = batch.get("attention_mask", ids != 0)
        image, text = self.encode_image(batch["images"]), self.encode_text(ids, mask)
        similarity = _similarity(image.embedding, text.embedding)
        itm_logits, matched = self._matching(image.tokens, text.tokens, mask, similarity, labels)
        word_logits, words = self._words(batch, image.tokens, mask)
        losses = {
            "itc": itc_uniform(similarity / self.temp.float(), labels),
            "itm": F.cross_entropy(itm_logits.float(), matched),
            "mlm": masked_token_loss(word_logits, words) / max(len(words), 1),
        }
        stats: dict[str, float | Tensor] = {
            "itm_accuracy": (itm_logits.detach().argmax(1) == matched).float().mean(),
            "temperature": self.temp.detach().clone(),
        }
        if len(words):
            stats["mlm_accuracy"] = (word_logits.detach().argmax(1) == words).float().mean()
        features = {"image_tokens": image.tokens, "text_tokens": text.tokens}
        return ModelOutput(losses=losses, features=features, stats=stats)

    def _matching(
        self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor, similarity: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ITM's logits [3B, 2] and labels [3B]: the pairs, each text's hard image, each image's hard text."""
        scaled = similarity.detach() / self.temp.detach().float()
        text_of_image = hard_negatives(scaled, labels, self.mask_generator)
        image_of_text = hard_negatives(scaled.T, labels, self.mask_generator)
        rows = torch.arange(len(labels), device=labels.device)
        texts, images = torch.cat([rows, rows, text_of_image]), torch.cat([rows, image_of_text, rows])
        fused = self.encoder_fusion(text_tokens[texts], mask[texts], image_tokens[images])
        return self.itm(fused[:, 0]), (torch.arange(len(texts), device=labels.device) < len(rows)).long()

    def _words(self, batch: Mapping[str, Tensor], image_tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """MLM's logits [M, V] and original ids [M] of the words asked for."""
        targets = batch["masked_labels"] != 0
        masked = self.encode_text(batch["masked_ids"], mask)
        fused = self.encoder_fusion(masked.tokens, mask, image_tokens)
        return self.encoder_fusion.words(fused[targets]), batch["masked_labels"][targets]


def itc_uniform(logits: Tensor, labels: Tensor) -> Tensor:
    """Contrastive loss whose targets are uniform over equal labels; the mean of both directions.

    Args:
        logits: [B, B] similarities over temperature, rows are images and columns texts, float32 or float64.
        labels: [B] integer.

    Returns:
        A scalar.
    """
    same = (labels[:, None] == labels[None]).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)  # symmetric, as rows of equal labels have equal sums
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def hard_negatives(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a column of another label for each row, with probability softmax(row) + 1e-4.

    The released code excludes the diagonal; with its labels, one of its own for every pair, that is the
    same.

    Args:
        logits: [B, B] similarities over temperature.
        labels: [B] integer.
        generator: a CPU generator, the only source of the draw.

    Returns:
        int64 [B], on the device of `logits`.

    Raises:
        ConfigError: a row has no column of another label.
    """
    other = labels[:, None] != labels[None]
    if not other.any(dim=1).all():
        raise ConfigError(
            f"a pre-training batch of {len(labels)} pairs without a negative (all have one label): matching needs "
            "pairs of at least two labels; use a larger batch"
        )
    weights = (logits.float().softmax(dim=1) + LEAST_WEIGHT) * other
    return torch.multinomial(weights.cpu(), 1, generator=generator)[:, 0].to(logits.device)


def _similarity(image: Tensor, text: Tensor) -> Tensor:
    """Dot products [B, B] in float32, as features that are not normalised need."""
    with torch.autocast(image.device.type, enabled=False):
        return image.float() @ text.float().T


@torch.no_grad()
def _initialise(modules: nn.Module, generator: torch.Generator) -> None:
    """BERT's: normal of std 0.02, biases 0, LayerNorms as they are built."""
    for module in modules.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
