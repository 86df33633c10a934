"""The small vocabularies: the text that they are learnt from, and how.

`python -m fmfa.pretraining.vocabulary data/vocabulary.json` makes the shipped vocabulary.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import models, trainers

from fmfa.pretraining.stream import web_pair
from fmfa.simpedes.generate import pictures, recipe
from fmfa.text.bytepair import (
    _WORDS,
    END,
    MASK,
    PAD,
    START,
    _byte_characters,
    _byte_level,
    clean_caption,
)


def vocabulary_corpus() -> Iterator[str]:
    """Yield captions of training identities of the domains with sentences, and alt-texts of the stream."""
    for domain in ("street", "station"):
        for record, _, _ in pictures(recipe("standard", domain, images=2), "train", 0, 240):
            yield from (caption["text"] for caption in record["captions"])
    for index in range(4000):
        yield web_pair(0, index)[1]


def train_small_vocabulary(captions: Iterable[str], size: int, path: str | Path) -> None:
    """Learn a byte-pair vocabulary of at most `size` ids and write it as a `tokenizers` JSON file.

    Ids: 0 padding, 1..256 the bytes, then the merges in the order in which they were learnt, then mask,
    start and end. Fewer than `size` ids result where no pair of pieces occurs twice any more. Pieces
    carry no end-of-word mark, which would cost 256 more ids. The file depends on the arguments only.
    """
    alphabet = list(_byte_characters().values())
    learner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 4,
        min_frequency=2,
        initial_alphabet=alphabet,
        special_tokens=[],
        show_progress=False,
    )
    words = (word for caption in captions for word in _WORDS.findall(clean_caption(caption)))
    learner.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [PAD, *alphabet, *map("".join, merges), MASK, START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    _byte_level(models.BPE(vocab=vocabulary, merges=merges)).save(str(path))


if __name__ == "__main__":
    train_small_vocabulary(vocabulary_corpus(), 1024, sys.argv[1])
