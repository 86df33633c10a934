"""CLIP's cleaning of captions, and which characters of a caption each cleaned character came from."""

import html
import re
from difflib import SequenceMatcher

import ftfy

Span = tuple[int, int]

# Words and gaps. Repairs rarely reach over a gap, so each is aligned by itself.
_CHUNKS = re.compile(r"\s+|\S+")


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
    spans: list[Span] = []
    start = 0
    for old, new in zip(before, after):
        spans += [(start + first, start + last) for first, last in _chunk_alignment(old, new)]
        start += len(old)
    return spans


def _chunk_alignment(old: str, new: str) -> list[Span]:
    if len(old) == len(new):
        return [(i, i + 1) for i in range(len(old))]
    spans: list[Span] = []
    for operation, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if operation == "equal":
            spans += [(i, i + 1) for i in range(i1, i2)]
        elif operation == "replace":
            spans += [(i1, i2)] * (j2 - j1)
        elif operation == "insert":  # belongs to the character before it
            first = max(i1 - 1, 0)
            spans += [(first, first + 1)] * (j2 - j1)
    return spans
