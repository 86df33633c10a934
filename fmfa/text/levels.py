"""Multi-level alignment's texts: a word-level, a phrase-level and a sentence-level text of a caption.

How IVT (Shu et al. 2022) cuts captions, after its released code, for the three real data sets; and a
clean variant for data whose true phrases are known. All draws come from the generator given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from fmfa.errors import ConfigError
from fmfa.text.bytepair import Span

SHORTEST_PIECE = 5  # characters; a piece must have more
LevelForm = Literal["attributes", "clauses", "true_spans"]
LEVEL_FORMS: dict[str, LevelForm] = {
    "CUHK-PEDES": "attributes",
    "ICFG-PEDES": "clauses",
    "RSTPReid": "clauses",
}


class LevelTexts(NamedTuple):
    """The three texts of one caption, and how many of them fell back to the whole caption."""

    word: str
    phrase: str
    sentence: str
    fallbacks: int


def phrase_candidates(caption: str) -> list[str]:
    """The phrase-level pieces of a caption, in order, repetitions kept (each is drawn equally often).

    Full stops, then `[`, then `]` are stripped from the ends; every sentence between full stops gives
    its longest comma clause (the first of equals) and all its other clauses joined again. Pieces of at
    most five characters are left out. The list is empty for a caption without a long enough clause.
    """
    return sentence_pieces(_without_outer_marks(caption))


def clause_candidates(caption: str) -> list[str]:
    """The clauses between full stops and commas, in order: the "word" level of ICFG-PEDES and RSTPReid.

    Outer marks are stripped and short clauses left out as in `phrase_candidates`.
    """
    clauses = _without_outer_marks(caption).replace(",", ".").split(".")
    return _long_enough(clauses)


def sentence_pieces(caption: str) -> list[str]:
    """As `phrase_candidates`, without stripping outer marks: CUHK-PEDES' word level without attributes."""
    pieces = []
    for sentence in caption.split("."):
        clauses = sentence.split(",")
        longest = max(range(len(clauses)), key=lambda i: len(clauses[i]))
        rest = clauses[:longest] + clauses[longest + 1 :]
        pieces += [clauses[longest], ",".join(rest).strip(",")]
    return _long_enough(pieces)


def join_attributes(phrases: Sequence[str], generator: np.random.Generator) -> str:
    """Between one and all of the phrases, drawn without repetition in random order, joined by commas.

    CUHK-PEDES' word level on its offline attribute phrases. `phrases` must not be empty.
    """
    count = int(generator.integers(1, len(phrases), endpoint=True))
    return ",".join(phrases[i] for i in generator.permutation(len(phrases))[:count])


def text_levels(
    caption: str,
    generator: np.random.Generator,
    *,
    form: LevelForm = "clauses",
    attributes: Mapping[str, str] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> LevelTexts:
    """Draw the word-level and the phrase-level text of a caption; the sentence level is all of it.

    Args:
        caption: the caption; the sentence level and every fallback is its lower-cased text.
        generator: the only source of the draws.
        form: how the word level is formed. "attributes" (CUHK-PEDES): some of the attribute phrases,
            or a sentence piece where the record has none. "clauses" (ICFG-PEDES, RSTPReid): one clause.
            In both the phrase level is one of `phrase_candidates`. "true_spans": the phrases at
            `spans` replace the cutting; the word level joins some of them by the attribute rule and
            the phrase level is one of them.
        attributes: name -> phrase, form "attributes" only; None or empty if there are none.
        spans: character spans [start, end) of the caption's phrases, form "true_spans" only.

    Returns:
        The texts; where a level has no candidate or draws an empty text (the released code raises or
        goes on with nothing), the whole caption is used, and `fallbacks` counts it (0, 1 or 2).

    Raises:
        ConfigError: unknown form, or "true_spans" without spans.
    """
    if form == "true_spans":
        phrases = _true_phrases(caption, spans)
        word = join_attributes(phrases, generator) if phrases else ""
        phrase = _draw(phrases, generator)
    elif form in ("attributes", "clauses"):
        if form == "clauses":
            word = _draw(clause_candidates(caption), generator)
        elif attributes:
            word = join_attributes(list(attributes.values()), generator)
        else:
            word = _draw(sentence_pieces(caption), generator)
        phrase = _draw(phrase_candidates(caption), generator)
    else:
        raise ConfigError(f"text levels of form {form!r}: use 'attributes', 'clauses' or 'true_spans'")
    whole = caption.lower()
    return LevelTexts(word or whole, phrase or whole, whole, (not word) + (not phrase))


@dataclass(frozen=True)
class LevelReader:
    """`text_levels` of the rows of a caption table: the `levels` hook of the training data.

    Attributes:
        form: see `text_levels`. "attributes" reads each caption's attribute phrases (name -> phrase) from the column
            `att`; a table without it, or a row without a dictionary in it, has none. "true_spans" reads each caption's
            phrase spans (pairs of characters) from the column `spans`.
    """

    form: LevelForm

    def __call__(self, caption: str, row: Mapping[str, Any], generator: np.random.Generator) -> LevelTexts:
        """The levels of one caption; `row` holds the fields of its table row. Raises as `text_levels`."""
        attributes = row.get("att") if isinstance(row.get("att"), Mapping) else None
        return text_levels(caption, generator, form=self.form, attributes=attributes, spans=row.get("spans"))

    def fallbacks(self, table: pd.DataFrame, generator: np.random.Generator) -> int:
        """How many word- and phrase-level texts of one pass over the table are the whole caption."""
        rows = table.to_dict("records")
        return sum(self(row["caption"], row, generator).fallbacks for row in rows)


def _without_outer_marks(caption: str) -> str:
    return caption.strip(".").strip("[").strip("]")


def _long_enough(pieces: Sequence[str]) -> list[str]:
    # The length is taken before spaces are stripped, as released: " belts" of a list counts six.
    return [piece.strip() for piece in pieces if len(piece) > SHORTEST_PIECE]


def _draw(candidates: Sequence[str], generator: np.random.Generator) -> str:
    return candidates[int(generator.integers(len(candidates)))] if candidates else ""


def _true_phrases(caption: str, spans: Sequence[tuple[int, int]] | None) -> list[str]:
    if spans is None:
        raise ConfigError(
            "text levels of form 'true_spans' need the character spans of the phrases, which only SimPEDES has; "
            "take the released cut on other data"
        )
    return [caption[start:end].strip() for start, end in spans]


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
