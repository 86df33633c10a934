"""The text that the small vocabulary is learnt from: both domains' captions and the stream's alt-text.

`python -m fmfa.simpedes.vocabulary data/vocabulary.json` makes the shipped vocabulary.
"""

import sys
from collections.abc import Iterator

from ..text.tokens import train_small_vocabulary
from .generate import DOMAINS, pictures, recipe
from .stream import web_pair


def vocabulary_corpus(seed: int = 0, identities: int = 240, web: int = 4000) -> Iterator[str]:
    """Yield captions of training identities of both domains and alt-texts of the stream."""
    for domain in DOMAINS:
        for record, _, _ in pictures(recipe("standard", domain, seed, images=2), "train", 0, identities):
            yield from (caption["text"] for caption in record["captions"])
    for index in range(web):
        yield web_pair(seed, index)[1]


if __name__ == "__main__":
    train_small_vocabulary(vocabulary_corpus(), 1024, sys.argv[1])
