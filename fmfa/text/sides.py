"""The words left and right, which a mirrored picture exchanges."""

import re

from fmfa.text.cleaning import Span


def swap_sides(caption: str) -> str:
    """Exchange the words "left" and "right" (any case, kept), as a mirrored picture calls for."""
    return re.sub(r"\b(left|right)\b", _other_side, caption, flags=re.IGNORECASE)


def swapped_span(caption: str, span: Span) -> Span:
    """Where the characters [start, end) of a caption are after `swap_sides`; both ends are ends of words."""
    start, end = span
    return len(swap_sides(caption[:start])), len(swap_sides(caption[:end]))


def _other_side(match: re.Match) -> str:
    word = match.group()
    other = "right" if word.lower() == "left" else "left"
    return other.upper() if word.isupper() else other.title() if word.istitle() else other
