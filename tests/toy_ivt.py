"""A narrow IVT and the released layout of its weights, written out by hand."""

import timm
import torch

from fmfa.models.ivt import IvtConfig

NARROW = IvtConfig(width=24, heads=2, vocab_size=40, positions=20)  # 12 blocks, 384 x 128, stride 12


UNUSED = {
    "temp",
    "classifier_img.weight",
    "bottleneck_img.weight",
    "bottleneck_img.bias",
    "bottleneck_img.running_mean",
    "bottleneck_img.running_var",
    "bottleneck_img.num_batches_tracked",
    "encoder_vl.embeddings.position_ids",
}


def released_shapes(config, identities=11003):
    """The released layout as its documentation lists it, written out independently of the model."""
    width, hidden = config.width, 4 * config.width
    tokens = {12: 311, 16: 193}[config.stride]
    shapes = {
        "temp": (),
        "encoder_vl.cls_token": (1, 1, width),
        "encoder_vl.pos_embed": (1, tokens, width),
        "encoder_vl.type_embed": (1, tokens, width),
        "encoder_vl.embeddings.position_ids": (1, config.positions),
        "encoder_vl.embeddings.word_embeddings.weight": (config.vocab_size, width),
        "encoder_vl.embeddings.position_embeddings.weight": (config.positions, width),
        "encoder_vl.embeddings.token_type_embeddings.weight": (2, width),
        "encoder_vl.embeddings.LayerNorm.weight": (width,),
        "encoder_vl.embeddings.LayerNorm.bias": (width,),
        "encoder_vl.patch_embed.proj.weight": (width, 3, 16, 16),
        "encoder_vl.patch_embed.proj.bias": (width,),
        "encoder_vl.norm.weight": (width,),
        "encoder_vl.norm.bias": (width,),
        "classifier_img.weight": (identities, width),
        "bottleneck_img.weight": (width,),
        "bottleneck_img.bias": (width,),
        "bottleneck_img.running_mean": (width,),
        "bottleneck_img.running_var": (width,),
        "bottleneck_img.num_batches_tracked": (),
    }
    for block in range(12):
        linears = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp_vis.fc1": (hidden, width),
            "mlp_vis.fc2": (width, hidden),
            "mlp_txt.fc1": (hidden, width),
            "mlp_txt.fc2": (width, hidden),
        }
        for name, shape in linears.items():
            shapes[f"encoder_vl.blocks.{block}.{name}.weight"] = shape
            shapes[f"encoder_vl.blocks.{block}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"encoder_vl.blocks.{block}.{name}"] = (width,)
    return shapes


def released_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in released_shapes(config, 30).items()}
    state["encoder_vl.embeddings.position_ids"] = torch.arange(config.positions)[None]
    state["bottleneck_img.num_batches_tracked"] = torch.tensor(0)
    return state


def vit_state(width=24, depth=12, patch=16):
    vit = timm.models.VisionTransformer(
        img_size=14 * patch, patch_size=patch, embed_dim=width, depth=depth, num_heads=2, num_classes=7
    )
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(value.shape, generator=generator) for name, value in vit.state_dict().items()}


def bert_state(prefix="", norm=("weight", "bias"), width=24, layers=12, words=40, positions=20):
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "embeddings.word_embeddings.weight": (words, width),
        "embeddings.position_embeddings.weight": (positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        f"embeddings.LayerNorm.{norm[0]}": (width,),
        f"embeddings.LayerNorm.{norm[1]}": (width,),
        "pooler.dense.weight": (width, width),
    }
    for i in range(layers):
        shapes |= {
            f"encoder.layer.{i}.attention.self.query.weight": (width, width),
            f"encoder.layer.{i}.attention.output.dense.weight": (width, width),
            f"encoder.layer.{i}.intermediate.dense.weight": (4 * width, width),
            f"encoder.layer.{i}.intermediate.dense.bias": (4 * width,),
            f"encoder.layer.{i}.output.dense.weight": (width, 4 * width),
            f"encoder.layer.{i}.output.dense.bias": (width,),
            f"encoder.layer.{i}.output.LayerNorm.{norm[0]}": (width,),
        }
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
