"""The two-stream model: a CLIP that returns every token, its heads, and the losses of CLIP, IRRA and FMFA."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import LayerNorm, QuickGELU, Transformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from fmfa.data.pairs import masked_positions
from fmfa.errors import ConfigError
from fmfa.losses import matching as losses
from fmfa.losses.efa import efa, group_patches
from fmfa.losses.grounding import grounding_hits, grounding_loss, phrase_targets, token_patch_cosine
from fmfa.models.backbone import backbone_config, build_clip
from fmfa.models.blocks import attend, run_blocks
from fmfa.models.distributed import gather, largest, total, world_size
from fmfa.models.objectives import Objectives
from fmfa.models.outputs import Encoded, ModelOutput, Retriever

SIMILAR = 16  # captions that are encoded together on a CPU


class TokenEncoder(Retriever):
    """The encoding half of `fmfa.models.clip.ClipRetriever`, which builds its towers.

    Attributes:
        clip: open_clip's model.
    """

    clip: CLIP | CustomTextCLIP

    def encode_image(self, images: Tensor, *, tokens: bool = True) -> Encoded:
        """Encode images, float [B, 3, H, W] normalised.

        Args:
            images: of the model's size.
            tokens: whether every token is wanted, or only those that make the embedding.

        Returns:
            tokens [B, 1+N, D] (final LayerNorm and projection at every position; [B, 1, D] of the class token alone
            without `tokens` where that suffices), embedding [B, D].

        Raises:
            ConfigError: images of another size than the model's.
        """
        visual = self.clip.visual
        if tuple(images.shape[-2:]) != tuple(visual.image_size):
            raise ConfigError(
                f"images of {tuple(images.shape[-2:])} pixels (height, width); the model was built for "
                f"{tuple(visual.image_size)}: resize the images or build the model for their size"
            )
        images = images.to(visual.conv1.weight.dtype)
        alone = not tokens and visual.pool_type != "avg"
        positions = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device) if alone else None
        hidden = run_blocks(visual.transformer, visual._embeds(images), positions=positions)
        projected = visual.ln_post(hidden) @ visual.proj.to(hidden.dtype)  # [B, 1+N, width] -> [B, 1+N, D]
        if visual.pool_type != "avg":
            return Encoded(projected, projected[:, 0])
        if visual.final_ln_after_pool:
            pooled = visual.ln_post(hidden[:, 1:].mean(dim=1))
            return Encoded(projected, pooled @ visual.proj.to(pooled.dtype))
        return Encoded(projected, projected[:, 1:].mean(dim=1))

    def encode_text(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: int | None = None,
        tokens: bool = True,
    ) -> Encoded:
        """Encode captions, int64 [B, context length].

        By default a causal tower runs on the longest caption of the batch: what follows the end token
        cannot change what comes before it.

        Args:
            ids: token ids.
            attention_mask: not used: a CLIP text tower finds the end token itself.
            positions: how many context positions to run and return; None takes `longest_caption`.
            tokens: whether every token is wanted, or only the one that is the embedding.

        Returns:
            tokens [B, L, D] (final LayerNorm and projection at every position, or 0 some way behind a caption's end;
            [B, 1, D] without `tokens`), embedding [B, D] at the end token.
        """
        if positions is None and len(ids) > SIMILAR and ids.device.type == "cpu":
            return self._encode_by_length(ids, tokens)
        tower = getattr(self.clip, "text", self.clip)
        length = int(self.longest_caption(ids)) if positions is None else positions
        ids = ids[:, :length]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
        alone = not tokens and self._pool_type in ("argmax", "eos")
        ends = self.end_positions(ids)[:, None] if alone else None
        x = run_blocks(tower.transformer, x, causal=tower.attn_mask is not None, positions=ends)
        x = tower.ln_final(x)  # [B, L, width]
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection.to(x.dtype)  # [B, L, D]
        return self._pooled(x, ids)

    def _encode_by_length(self, ids: Tensor, tokens: bool) -> Encoded:
        """`encode_text` of few captions of similar length at a time, each as far as its longest."""
        order = self.end_positions(ids).argsort(stable=True)
        parts = [self.encode_text(ids[rows], tokens=tokens) for rows in order.split(SIMILAR)]
        longest, back = max(part.tokens.shape[1] for part in parts), order.argsort()
        every = [F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in parts]
        return self._pooled(torch.cat(every)[back], ids)

    def _pooled(self, tokens: Tensor, ids: Tensor) -> Encoded:
        """Tokens [B, L, D] of captions, or those at their ends [B, 1, D], with the embeddings, which depend on them."""
        if tokens.shape[1] == 1:
            return Encoded(tokens, tokens[:, 0])
        return Encoded(tokens, text_global_pool(tokens, ids[:, : tokens.shape[1]], self._pool_type, self._end_id))

    def longest_caption(self, ids: Tensor) -> Tensor:
        """Positions that the text tower needs for the embeddings of `ids` [B, L], an int64 scalar.

        Up to the last end token; all L where the tower is not causal or pools another position.
        """
        tower = getattr(self.clip, "text", self.clip)
        if tower.attn_mask is None or self._pool_type not in ("argmax", "eos"):
            return torch.tensor(ids.shape[1], device=ids.device)
        return self.end_positions(ids).max() + 1

    def end_positions(self, ids: Tensor) -> Tensor:
        """Position of each caption's end token, int64 [B]: the largest id, or the tower's own end id.

        A tower that pools the last position has no end token; there it is the last non-zero id.
        """
        if self._pool_type == "argmax":
            return ids.argmax(dim=1)
        if self._pool_type == "eos":
            return (ids == self._end_id).int().argmax(dim=1)
        return ids.shape[1] - 1 - ids.ne(0).flip(1).int().argmax(dim=1)

    def caption_positions(self, ids: Tensor) -> Tensor:
        """Bool [B, L]: start token to end token."""
        return torch.arange(ids.shape[1], device=ids.device) <= self.end_positions(ids)[:, None]

    @property
    def _pool_type(self) -> str:
        return self.clip.text_pool_type if hasattr(self.clip, "text_pool_type") else self.clip.text.pool_type

    @property
    def _end_id(self) -> int:
        return self.clip.text_eos_id if hasattr(self.clip, "text_eos_id") else self.clip.text.eos_id


class ClipRetriever(TokenEncoder):
    """CLIP for text-to-image person retrieval (IRRA, CVPR 2023; FMFA, TOMM 2026; plain CLIP).

    Attributes:
        clip: open_clip's model.
        irr: masked-token head, None where the objectives have no IRR.
        classifier: identity classifier, None where the objectives have no ID loss.
    """

    def __init__(
        self,
        backbone: str | Path | Mapping = "ViT-B-16-quickgelu",
        objectives: Objectives | None = None,
        *,
        identities: int = 0,
        image_size: tuple[int, int] | None = None,
        stride: int | None = None,
        position_std: float | None = None,
        seed: int = 0,
    ) -> None:
        """Random weights from `seed`; load others with `fmfa.models.weights.load_weights`.

        Args:
            backbone: see `fmfa.models.backbone.backbone_config`.
            objectives: training losses; None is plain CLIP (ITC).
            identities: classes of the ID loss, the training identities.
            image_size: (height, width); None keeps the configuration's.
            stride: of the patch embedding; None means the patch size.
            position_std: see `fmfa.models.backbone.build_clip`.
            seed: of the initial weights; the global generators are left as they were.

        Raises:
            ConfigError: the configuration does not fit.
        """
        super().__init__()
        self.objectives = objectives or Objectives(itc=1.0)
        config = backbone_config(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.clip = build_clip(config, image_size=image_size, stride=stride, position_std=position_std)
            width = config["embed_dim"]
            self.irr: CrossModalHead | None = None
            self.classifier: nn.Linear | None = None
            if self.objectives.irr:
                self.irr = CrossModalHead(
                    width,
                    self.clip.vocab_size,
                    depth=self.objectives.irr_depth,
                    heads=self.objectives.irr_heads or None,
                )
            if self.objectives.id:
                if identities < 1:
                    raise ConfigError(f"the ID loss needs the number of training identities, found {identities}")
                self.classifier = identity_classifier(width, identities)
        self.backbone = backbone if isinstance(backbone, str) else None
        self.config = {
            "backbone": config,
            "objectives": asdict(self.objectives),
            "identities": identities,
            "image_size": list(self.clip.visual.image_size),
            "stride": self.clip.visual.conv1.stride[0],
        }

    @classmethod
    def from_config(cls, config: Mapping) -> "ClipRetriever":
        """Build the model that `config` (the attribute of that name, as JSON keeps it) describes."""
        config = dict(config)
        return cls(
            config.pop("backbone"),
            Objectives(**config.pop("objectives")),
            image_size=tuple(config.pop("image_size")),
            **config,
        )

    def forward(self, batch: Mapping[str, Tensor]) -> ModelOutput:
        """Training losses of a batch; over several processes, of the joint batch.

        Args:
            batch: `images`, `labels` and, by objective, `caption_ids`, `masked_ids`, `masked_labels`,
                `part_maps`, `token_parts`.

        Returns:
            The weighted losses. The mean over processes of each one, and DDP's mean of its gradients,
            equal those of one process on the joint batch.

        Raises:
            ConfigError: the objectives need a field that the batch lacks.
        """
        wanted = self.objectives
        read = "masked_ids" if wanted.retrieval_sees_mask else "caption_ids"
        self._require(batch, "images", "labels", read)
        together = wanted.irr > 0 and wanted.retrieval_sees_mask
        patches = bool(wanted.irr or wanted.efa or wanted.grounding)
        image = self.encode_image(batch["images"], tokens=patches)
        ids = batch[read]
        everywhere = together or wanted.needs_all_positions
        words = together or bool(wanted.efa or wanted.grounding)
        # on a GPU no shape depends on a value, for which it would have to be waited
        length = ids.shape[1] if everywhere or ids.device.type != "cpu" else None
        if length is None and words and world_size() > 1:  # ranks exchange text tokens, so they need one length
            length = int(largest(self.longest_caption(ids)))
        apart = wanted.irr > 0 and not together
        if apart:
            self._require(batch, "masked_ids")
        if apart and length == ids.shape[1]:
            both = self.encode_text(torch.cat([ids, batch["masked_ids"]]), positions=length).tokens
            text, masked = self._pooled(both[: len(ids)], ids), both[len(ids) :]
        else:
            text = self.encode_text(ids, positions=length, tokens=words)
            masked = self.encode_text(batch["masked_ids"], positions=ids.shape[1]).tokens if apart else text.tokens
        output = ModelOutput({}, {"image_tokens": image.tokens, "text_tokens": text.tokens})
        self._match_embeddings(output, image, text, batch["labels"])
        if wanted.id:
            self._classify(output, image, text, batch["labels"])
        if wanted.irr:
            self._require(batch, "masked_labels")
            if apart:
                output.features["masked_text_tokens"] = masked
            self._predict_masked(output, masked, image.tokens, batch)
        where = self._true_patches(batch, text.tokens.shape[1]) if wanted.needs_parts else None
        if wanted.efa:
            self._align(output, image, text, ids, batch["labels"], where if wanted.efa_oracle else None)
        if where is not None and wanted.grounding:
            self._ground(output, image, text, where)
        return output

    def _require(self, batch: Mapping[str, Tensor], *names: str) -> None:
        if missing := [name for name in names if name not in batch]:
            raise ConfigError(
                f"the batch lacks {', '.join(missing)}, found {', '.join(sorted(batch))}: "
                "these objectives read them, so the data loader must supply them"
            )

    def _match_embeddings(self, output: ModelOutput, image: Encoded, text: Encoded, labels: Tensor) -> None:
        wanted, scale = self.objectives, 1 / self.objectives.tau
        images, texts, labels = gather(image.embedding), gather(text.embedding), gather(labels)
        output.stats |= losses.pair_similarities(texts, images, labels)
        if wanted.itc:
            output.losses["itc"] = wanted.itc * losses.itc(images, texts, scale=scale)
        if wanted.cmpm:
            output.losses["cmpm"] = wanted.cmpm * losses.cmpm(images, texts, labels)
        if wanted.sdm:
            output.losses["sdm"] = wanted.sdm * losses.sdm(
                images, texts, labels, scale=scale, epsilon=wanted.sdm_epsilon
            )
        if wanted.asdm:
            output.losses["asdm"] = wanted.asdm * losses.asdm(
                images,
                texts,
                labels,
                gradient=wanted.asdm_gradient,
                epsilon=wanted.sdm_epsilon,
                **wanted.asdm_weighting,
            )
            with torch.no_grad():
                cosine = losses.cosine_similarity(texts, images)
                for name, rows in (("text", cosine), ("image", cosine.T)):
                    weights = losses.asdm_weights(rows, labels, **wanted.asdm_weighting)
                    output.stats[f"asdm_weight_{name}"] = weights.mean()
                    output.stats[f"asdm_weight_{name}_max"] = weights.max()

    def _classify(self, output: ModelOutput, image: Encoded, text: Encoded, labels: Tensor) -> None:
        assert self.classifier is not None
        logits = self.classifier(image.embedding), self.classifier(text.embedding)
        # each rank's mean counts by its share of the joint batch; DDP divides by the number of ranks
        count = torch.tensor(len(labels), device=labels.device)
        share = world_size() * len(labels) / int(total(count)) if world_size() > 1 else 1.0
        output.losses["id"] = self.objectives.id * share * losses.identity_loss(*logits, labels)
        for name, rows in zip(("image", "text"), logits, strict=True):
            output.stats[f"id_accuracy_{name}"] = (rows.argmax(dim=1) == labels).float().mean().detach()

    def _predict_masked(self, output: ModelOutput, text: Tensor, image: Tensor, batch: Mapping) -> None:
        assert self.irr is not None
        labels = batch["masked_labels"]
        positions = batch["masked_positions"] if "masked_positions" in batch else masked_positions(labels)
        valid = self.caption_positions(batch["masked_ids"]) if self.objectives.irr_padding_mask else None
        logits, targets = self.irr(text, image, positions, valid).flatten(0, 1), labels.gather(1, positions).flatten()
        chosen = targets != 0
        loss = losses.masked_token_loss(logits, targets.masked_fill(~chosen, losses.IGNORED))
        output.losses["irr"] = self.objectives.irr * loss * world_size() / total(chosen.sum()).clamp(min=1)
        right = (logits.argmax(dim=1) == targets) & chosen
        output.stats["irr_accuracy"] = right.sum() / chosen.sum().clamp(min=1)

    def _true_patches(self, batch: Mapping[str, Tensor], length: int) -> Tensor:
        self._require(batch, "part_maps", "token_parts")
        patches = self.clip.visual.conv1
        spoken = batch["token_parts"][:, :length]
        return phrase_targets(batch["part_maps"], spoken, patch=patches.kernel_size, stride=patches.stride)

    def _align(
        self, output: ModelOutput, image: Encoded, text: Encoded, ids: Tensor, labels: Tensor, given: Tensor | None
    ) -> None:
        wanted = self.objectives
        patches, tokens = image.tokens[:, 1:], text.tokens
        joint = group_patches(tokens, patches, sigma=wanted.efa_sigma, keep=wanted.efa_keep, given=given)
        mask = None
        if wanted.efa_positions == "caption":
            mask = gather(self.caption_positions(ids)[:, : tokens.shape[1]].int()).bool()
        by_text, by_image = efa(
            gather(tokens),
            gather(patches),
            gather(joint),
            gather(labels),
            text_mask=mask,
            margin_text=wanted.efa_margin_text,
            margin_image=wanted.efa_margin_image,
            cost=wanted.efa_cost,
            sharpness=wanted.efa_lambda,
            chunk=wanted.efa_chunk,
        )
        output.losses["efa"] = wanted.efa * (by_text + by_image)
        output.stats |= {"efa_text": by_text.detach(), "efa_image": by_image.detach()}

    def _ground(self, output: ModelOutput, image: Encoded, text: Encoded, target: Tensor) -> None:
        cosine = token_patch_cosine(text.tokens, image.tokens[:, 1:])
        count = total(target.any(dim=2).sum()).clamp(min=1)
        loss = grounding_loss(cosine, target, temperature=self.objectives.grounding_tau) * world_size() / count
        output.losses["grounding"] = self.objectives.grounding * loss
        hits = grounding_hits(cosine.detach(), target)
        output.stats["grounding_hit"] = hits.sum() / max(len(hits), 1)


def head_count(width: int, heads: int | None = None) -> int:
    """Attention heads of a head of `width`: the number given, or one for each 64 channels, at least 1."""
    return heads or max(1, width // 64)


class CrossModalHead(nn.Module):
    """Implicit relation reasoning (IRR; Jiang and Ye, CVPR 2023): predict masked tokens using the image.

    The masked caption's tokens query all image tokens through one cross attention without residual;
    `depth` CLIP-style self-attention blocks and a vocabulary head follow. Module names are those of IRRA.
    """

    def __init__(self, width: int, vocab_size: int, *, depth: int = 4, heads: int | None = None) -> None:
        """Random weights with IRRA's standard deviations; `width` is the joint width D."""
        super().__init__()
        self.heads = head_count(width, heads)
        self.cross_attn = nn.MultiheadAttention(width, self.heads, batch_first=True)
        self.cross_modal_transformer = Transformer(width, depth, self.heads, act_layer=QuickGELU)
        self.ln_pre_t = LayerNorm(width)
        self.ln_pre_i = LayerNorm(width)
        self.ln_post = LayerNorm(width)
        dense, words = nn.Linear(width, width), nn.Linear(width, vocab_size)
        self.mlm_head = nn.Sequential(OrderedDict(dense=dense, gelu=QuickGELU(), ln=LayerNorm(width), fc=words))
        self._initialise(width, depth)
        nn.init.normal_(dense.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(words.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def _initialise(self, width: int, depth: int) -> None:
        attention, output, hidden = width**-0.5, width**-0.5 * (2 * depth) ** -0.5, (2 * width) ** -0.5
        for block in self.cross_modal_transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=attention)
            nn.init.normal_(block.attn.out_proj.weight, std=output)
            nn.init.normal_(block.mlp.c_fc.weight, std=hidden)
            nn.init.normal_(block.mlp.c_proj.weight, std=output)
        nn.init.normal_(self.cross_attn.in_proj_weight, std=attention)
        nn.init.normal_(self.cross_attn.out_proj.weight, std=output)

    def forward(
        self, text_tokens: Tensor, image_tokens: Tensor, positions: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Vocabulary logits at some positions.

        Args:
            text_tokens: [B, L, D] of the masked caption, all context positions.
            image_tokens: [B, 1+N, D], class token included.
            positions: int64 [B, K], those to predict (`masked_positions`); the last block and the vocabulary head run
                on them only.
            valid: [B, L] bool, text positions that self-attention may look at; None lets padding take
                part, as IRRA does.

        Returns:
            [B, K, V].
        """
        x = attend(self.cross_attn, self.ln_pre_t(text_tokens), self.ln_pre_i(image_tokens))
        x = run_blocks(self.cross_modal_transformer, x, valid=valid, positions=positions)
        return self.mlm_head(self.ln_post(x))


def identity_classifier(width: int, identities: int) -> nn.Linear:
    """Linear classifier from embeddings to identities: weights of standard deviation 0.001, bias 0."""
    classifier = nn.Linear(width, identities)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return classifier
