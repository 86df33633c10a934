"""CLIP's cleaning of captions, and which characters of a caption each cleaned character came from."""

import html
import math
import re
from collections import Counter
from difflib import SequenceMatcher

import ftfy

Span = tuple[int, int]

# Words and gaps. Repairs rarely reach over a gap, so each is aligned by itself.
_CHUNKS = re.compile(r"\s+|\S+")
_MOST_MATCHES = 20_000  # pairs of equal characters in chunks that are aligned in one piece; 500 letters of prose
_WINDOW = 80  # characters of others aligned at a time; the longest entity has 33


def clean_caption(caption: str) -> str:
    """The text that a byte-pair tokenizer reads: CLIP's cleaning, as in open_clip."""
    return " ".join(_repair(caption).split()).lower()


def cleaned_with_origin(caption: str) -> tuple[str, list[Span]]:
    """`clean_caption`, and for each of its characters the span of `caption` that it came from.

    Spans are not empty, and neither their starts nor their ends ever run backwards.
    """
    repaired = _repair(caption)
    origin = _alignment(caption, repaired)
    spans: list[Span] = []
    previous_end = 0
    for word in re.finditer(r"\S+", repaired):
        if spans:
            spans.append((origin[previous_end][0], origin[word.start() - 1][1]))
        for i in range(*word.span()):
            # One letter may have a longer lower case: U+0130 becomes two.
            spans += [origin[i]] * len(repaired[i].lower())
        previous_end = word.end()
    return " ".join(repaired.split()).lower(), spans


def _repair(caption: str) -> str:
    # Printable ASCII without entities is what ftfy and unescape leave alone; they are most of the cost.
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return caption
    return html.unescape(html.unescape(ftfy.fix_text(caption)))


def _alignment(original: str, repaired: str) -> list[Span]:
    """For each character of `repaired` the non-empty span of `original` that it replaces, in order."""
    before, after = _CHUNKS.findall(original), _CHUNKS.findall(repaired)
    if [chunk.isspace() for chunk in before] != [chunk.isspace() for chunk in after]:
        before, after = [original], [repaired]
    changed = [(Counter(old), new) for old, new in zip(before, after) if len(old) != len(new)]
    matches = sum(counts[character] for counts, new in changed for character in new)
    window = max(len(original), len(repaired)) if matches <= _MOST_MATCHES else _WINDOW
    spans: list[Span] = []
    start = 0
    for old, new in zip(before, after):
        spans += [(start + first, start + last) for first, last in _chunk_alignment(old, new, window)]
        start += len(old)
    return spans


def _chunk_alignment(old: str, new: str, window: int) -> list[Span]:
    """As difflib aligns them, at most `window` characters at a time: it can take the cube of their number."""
    if len(old) == len(new):
        return [(i, i + 1) for i in range(len(old))]
    spans: list[Span] = []
    start = 0
    while len(spans) < len(new):
        done = len(spans)
        share = min(1.0, window / max(len(old) - start, len(new) - done))
        before = old[start : start + math.ceil(share * (len(old) - start))]
        after = new[done : done + math.ceil(share * (len(new) - done))]
        if before.startswith(after):
            spans += [(start + i, start + i + 1) for i in range(len(after))]
            start += len(after)
            continue
        blocks = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
        if share < 1:  # what matches in the first half is certain; the next window sees more of the second
            half = len(after) // 2 + 1
            blocks = [(i, j, min(size, half - j)) for i, j, size in blocks if j < half] or blocks
        i = j = 0
        for block_i, block_j, size in blocks:
            # A gap is replaced by a gap; without one, what is new belongs to the character before it.
            first, last = (i, block_i) if block_i > i else (i - 1, i)
            spans += [(max(start + first, 0), max(start + last, 1))] * (block_j - j)
            i, j = block_i + size, block_j + size
            spans += [(start + k, start + k + 1) for k in range(block_i, i)]
        start += i
    return spans
