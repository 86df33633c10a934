"""The released codes' arithmetic, written plainly: a yardstick for the time, memory and results of the models here.

As released, each caption is encoded over its whole context in a pass of its own, all of open_clip's blocks run on all
positions, every masked-token position gets its logits over the vocabulary, and EFA compares all tokens of the batch in
one [B, B, N, L] tensor.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fmfa.losses import matching as losses
from fmfa.losses.efa import group_patches, ranking_cost
from fmfa.models.clip import ClipRetriever


def plain_losses(model: ClipRetriever, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weighted training losses of a batch, those of the model's own forward up to rounding.

    Args:
        model: whose towers are open_clip's CLIP, trained with ITC, SDM, A-SDM, ID, IRR or EFA in one process.
        batch: as the model's forward takes it.
    """
    wanted, labels = model.objectives, batch["labels"]
    image = _image_tokens(model, batch["images"])
    ids = batch["masked_ids" if wanted.retrieval_sees_mask else "caption_ids"]
    text = _text_tokens(model, ids)
    pooled = image[:, 0], text[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
    scale, found = 1 / wanted.tau, dict[str, Tensor]()
    if wanted.itc:
        found["itc"] = wanted.itc * losses.itc(*pooled, scale=scale)
    if wanted.sdm:
        found["sdm"] = wanted.sdm * losses.sdm(*pooled, labels, scale=scale, epsilon=wanted.sdm_epsilon)
    if wanted.asdm:
        found["asdm"] = wanted.asdm * losses.asdm(
            *pooled, labels, gradient=wanted.asdm_gradient, epsilon=wanted.sdm_epsilon, **wanted.asdm_weighting
        )
    if model.classifier is not None:
        logits = model.classifier(pooled[0]), model.classifier(pooled[1])
        found["id"] = wanted.id * losses.identity_loss(*logits, labels)
    if (head := model.irr) is not None:
        masked, memory = _text_tokens(model, batch["masked_ids"]), head.ln_pre_i(image)
        x = head.cross_attn(head.ln_pre_t(masked), memory, memory, need_weights=False)[0]
        words = head.mlm_head(head.ln_post(head.cross_modal_transformer(x)))
        loss = F.cross_entropy(words.flatten(0, 1).float(), batch["masked_labels"].flatten(), ignore_index=0)
        found["irr"] = wanted.irr * loss
    if wanted.efa:
        found["efa"] = wanted.efa * _efa(model, text, image[:, 1:], ids, labels)
    return found


def _image_tokens(model: ClipRetriever, images: Tensor) -> Tensor:
    visual = model.clip.visual
    return visual.ln_post(visual.transformer(visual._embeds(images))) @ visual.proj


def _text_tokens(model: ClipRetriever, ids: Tensor) -> Tensor:
    clip = model.clip
    x = clip.token_embedding(ids) + clip.positional_embedding
    return clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask)) @ clip.text_projection


def _efa(model: ClipRetriever, text: Tensor, patches: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    wanted = model.objectives
    joint = F.normalize(group_patches(text, patches, sigma=wanted.efa_sigma, keep=wanted.efa_keep), dim=-1)
    counted = torch.ones_like(ids, dtype=torch.bool)
    if wanted.efa_positions == "caption":
        counted = model.caption_positions(ids)
    terms = ((text, counted, wanted.efa_margin_text), (patches, None, wanted.efa_margin_image))
    costs = []
    for tokens, own, margin in terms:
        cosine = torch.einsum("ind,jld->ijnl", F.normalize(tokens, dim=-1), joint)
        best = cosine.masked_fill(~counted[None, :, None, :], -math.inf).amax(dim=-1).float() * wanted.efa_lambda
        if own is not None:
            best = best.masked_fill(~own[:, None, :], -math.inf)
        similarity = best.logsumexp(dim=-1) / wanted.efa_lambda
        costs.append(ranking_cost(similarity, labels, margin=margin, cost=wanted.efa_cost))
    return costs[0] + costs[1]
