"""The words of IVT's pre-training: how captions are prepared, and which of their pieces are hidden.

Shu et al. 2022, as in the released code.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmfa.text.wordpiece import WordPieceTokenizer

CONTEXT = 50  # most positions of a pre-training caption, `[CLS]` included
WORDS = 50  # most words
SHARE, MOST = 0.25, 8  # of the pieces that are asked for
LONGER = 0.2  # chance of a span of two or three pieces instead of one
MASKED, RANDOM = 0.8, 0.1  # what becomes of a piece asked for; the rest stay
_CLEANED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), **dict.fromkeys("-/", " ")})


def prepare_caption(caption: str) -> str:
    """The text that pre-training reads: lower case, no punctuation, `-` and `/` as spaces, 50 words at most."""
    return " ".join(caption.lower().translate(_CLEANED).split()[:WORDS])


class SpanMasking:
    """Masked-word targets of rows of WordPiece ids.

    Of the n pieces of a caption, round(n / 4) are asked for, at least one and at most eight. They are found
    by visiting the pieces in random order: each brings its whole word, or with probability 0.2 the words
    that the two or three pieces from it on belong to. Pieces beyond the number are taken back at random,
    which can leave a word half hidden. Of the chosen pieces 80 % become `[MASK]`, 10 % another piece, and
    10 % stay.
    """

    def __init__(self, tokenizer: WordPieceTokenizer) -> None:
        """Read from the tokenizer which ids go on with a word (`##...`) and which are special (`[...]`)."""
        pieces = tokenizer.decode(range(tokenizer.vocab_size))
        self.mask_id = tokenizer.mask_id
        self._continues = np.array([piece.startswith("##") for piece in pieces])
        special = [piece.startswith("[") and piece.endswith("]") and len(piece) > 1 for piece in pieces]
        self._ordinary = np.flatnonzero(~np.array(special))

    def __call__(self, ids: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Hide pieces of one caption.

        Args:
            ids: int64 [L], `[CLS]` and pieces without padding; not changed.
            generator: the only source of the draws.

        Returns:
            The masked ids, and the labels: the original id where a piece is asked for, else 0. Both [L]; a
            caption without pieces has no targets.
        """
        masked, labels = ids.clone(), torch.zeros_like(ids)
        for position in self.targets(ids.tolist(), generator):
            labels[position] = ids[position]
            fate = generator.random()
            if fate < MASKED:
                masked[position] = self.mask_id
            elif fate < MASKED + RANDOM:
                masked[position] = int(generator.choice(self._ordinary))
        return masked, labels

    def targets(self, ids: Sequence[int], generator: np.random.Generator) -> list[int]:
        """The positions asked for, ascending; never position 0."""
        pieces = len(ids) - 1
        if pieces < 1:
            return []
        number = min(MOST, max(1, round(SHARE * pieces)))
        positions: set[int] = set()
        for start in 1 + generator.permutation(pieces):
            if len(positions) >= number:
                break
            if start not in positions:
                longer = generator.random() < LONGER
                stop = start + (int(generator.integers(2, 4)) if longer else 1)
                positions.update(self._whole_words(ids, int(start), min(int(stop), len(ids))))
        selection = generator.permutation(sorted(positions))[:number]
        return sorted(selection.tolist())

    def _whole_words(self, ids: Sequence[int], start: int, stop: int) -> range:
        """The span widened to the ends of its words."""
        while start > 1 and self._continues[ids[start]]:
            start -= 1
        while stop < len(ids) and self._continues[ids[stop]]:
            stop += 1
        return range(start, stop)
