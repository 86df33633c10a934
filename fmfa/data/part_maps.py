"""The truth that the oracles train on: which part each pixel shows and each token speaks of (SimPEDES only)."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from fmfa.simpedes.canvas import PARTS
from fmfa.simpedes.truth import Truth
from fmfa.text.bytepair import Span, Tokenizer
from fmfa.text.levels import swap_sides, swapped_span


class PartMaps:
    """Part maps and phrase parts of the rows of a caption table. Parts are positions in `canvas.PARTS`."""

    def __init__(self, table: pd.DataFrame, truth: Truth, tokenizer: Tokenizer) -> None:
        """Read the truth; the maps stay in memory, a byte per pixel.

        Args:
            table: of the split "train", one row per caption; `image` and `caption` are used.
            truth: of the data set.
            tokenizer: of the captions.

        Raises:
            AnnotationError: a row's picture or caption has no truth.
        """
        self._tokenizer = tokenizer
        self._images, self._captions = table["image"].tolist(), table["caption"].tolist()
        self._maps = truth.parts("train")
        self._phrases: list[list[tuple[Span, int]]] = [
            [((p["start"], p["end"]), PARTS.index(p["part"])) for p in phrases if p["part"] in PARTS]
            for phrases in truth.of_captions("train", table)
        ]

    def picture(self, row: int, size: tuple[int, int]) -> tv_tensors.Mask:
        """The part map of a row's picture, uint8 [1, H, W] at `size`: 1 + part.

        0 stays free for pixels that show nothing of the picture, which is what transforms fill in.
        """
        parts = tv_tensors.Mask(torch.from_numpy(self._maps[self._images[row]] + np.uint8(1))[None])
        return v2.functional.resize(parts, list(size), InterpolationMode.NEAREST_EXACT)

    def tokens(self, row: int, length: int, *, swapped: bool) -> Tensor:
        """The part that each token of a row's caption speaks of, int64 [length], -1 if none.

        Args:
            row: of the table.
            length: of the encoded caption.
            swapped: whether left and right were exchanged in it.
        """
        caption, phrases = self._captions[row], self._phrases[row]
        if swapped:
            phrases = [(swapped_span(caption, span), part) for span, part in phrases]
            caption = swap_sides(caption)
        parts = torch.full((length,), -1)
        for position, characters in enumerate(self._tokenizer.offsets(caption)[:length]):
            for (start, end), part in phrases:
                if characters and characters[0] < end and start < characters[1]:
                    parts[position] = part
        return parts
