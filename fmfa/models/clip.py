"""The two-stream model: a CLIP that returns every token, with the losses of CLIP, IRRA and FMFA."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fmfa import losses
from fmfa.errors import ConfigError
from fmfa.losses.efa import efa, group_patches
from fmfa.losses.grounding import grounding_hits, grounding_loss, phrase_targets, token_patch_cosine
from fmfa.models.backbone import backbone_config, build_clip
from fmfa.models.distributed import gather, largest, total, world_size
from fmfa.models.heads import CrossModalHead, identity_classifier
from fmfa.models.interfaces import Encoded, ModelOutput
from fmfa.models.objectives import Objectives, objectives
from fmfa.models.token_encoder import TokenEncoder

__all__ = ["ClipRetriever", "Objectives", "objectives"]


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
        """Random weights from `seed`; load others with `fmfa.weights.loading.load_weights`.

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
            self.irr = self.classifier = None
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
        image = self.encode_image(batch["images"])
        ids = batch[read]
        everywhere = together or wanted.needs_all_positions
        # ranks exchange text tokens, so they need one length
        length = ids.shape[1] if everywhere else int(largest(self.longest_caption(ids)))
        text = self.encode_text(ids, positions=length)
        output = ModelOutput({}, {"image_tokens": image.tokens, "text_tokens": text.tokens})
        self._match_embeddings(output, image, text, batch["labels"])
        if wanted.id:
            self._classify(output, image, text, batch["labels"])
        if wanted.irr:
            self._require(batch, "masked_ids", "masked_labels")
            masked = text.tokens
            if not together:
                masked = self.encode_text(batch["masked_ids"], positions=ids.shape[1]).tokens
                output.features["masked_text_tokens"] = masked
            self._predict_masked(output, masked, image.tokens, batch)
        where = self._true_patches(batch, length) if wanted.needs_parts else None
        if wanted.efa:
            self._align(output, image, text, ids, batch["labels"], where if wanted.efa_oracle else None)
        if wanted.grounding:
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
            output.losses["sdm"] = wanted.sdm * losses.sdm(images, texts, labels, scale=scale)
        if wanted.asdm:
            form = {"scale": scale, "alpha": wanted.asdm_alpha, "form": wanted.asdm_form}
            output.losses["asdm"] = wanted.asdm * losses.asdm(images, texts, labels, **form)
            with torch.no_grad():
                cosine = losses.cosine_similarity(texts, images)
                for name, rows in (("text", cosine), ("image", cosine.T)):
                    weights = losses.asdm_weights(rows, labels, **form)
                    output.stats[f"asdm_weight_{name}"] = weights.mean()
                    output.stats[f"asdm_weight_{name}_max"] = weights.max()

    def _classify(self, output: ModelOutput, image: Encoded, text: Encoded, labels: Tensor) -> None:
        logits = self.classifier(image.embedding), self.classifier(text.embedding)
        # each rank's mean counts by its share of the joint batch; DDP divides by the number of ranks
        share = world_size() * len(labels) / int(total(torch.tensor(len(labels), device=labels.device)))
        output.losses["id"] = self.objectives.id * share * losses.identity_loss(*logits, labels)
        for name, rows in zip(("image", "text"), logits, strict=True):
            output.stats[f"id_accuracy_{name}"] = (rows.argmax(dim=1) == labels).float().mean().detach()

    def _predict_masked(self, output: ModelOutput, text: Tensor, image: Tensor, batch: Mapping) -> None:
        labels = batch["masked_labels"]
        chosen = labels != 0
        valid = self.caption_positions(batch["masked_ids"]) if self.objectives.irr_padding_mask else None
        logits, targets = self.irr(text, image, chosen, valid), labels[chosen]
        count = total(chosen.sum()).clamp(min=1)
        loss = losses.masked_token_loss(logits, targets) * world_size() / count
        output.losses["irr"] = self.objectives.irr * loss
        output.stats["irr_accuracy"] = (logits.argmax(dim=1) == targets).sum().detach() / chosen.sum().clamp(min=1)

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
