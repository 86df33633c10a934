"""A two-layer CLIP and a batch for it."""

import torch

from fmfa.models.clip import ClipRetriever

CONTEXT, VOCABULARY = 12, 40


START, END, MASK = VOCABULARY - 2, VOCABULARY - 1, VOCABULARY - 3


def config(vision=(), text=(), **other):
    return {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": [48, 16],
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            **dict(vision),
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": 32,
            "heads": 2,
            "layers": 2,
            **dict(text),
        },
        **other,
    }


def batch(size=4, longest=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(size, CONTEXT, dtype=torch.int64)
    for row, words in enumerate(torch.randint(1, longest - 1, (size,), generator=generator).tolist()):
        ids[row, 0], ids[row, words + 1] = START, END
        ids[row, 1 : words + 1] = torch.randint(1, MASK, (words,), generator=generator)
    masked, labels = ids.clone(), torch.zeros_like(ids)
    masked[:, 1], labels[:, 1] = MASK, ids[:, 1]
    return {
        "images": torch.randn(size, 3, 48, 16, generator=generator),
        "caption_ids": ids,
        "masked_ids": masked,
        "masked_labels": labels,
        "labels": torch.arange(size) // 2,
    }


def retriever(wanted=None, **arguments):
    return ClipRetriever(config(), wanted, identities=2, **arguments)
