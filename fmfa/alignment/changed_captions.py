"""A SimPEDES caption with one word changed, so that it tells another value of one attribute."""

import re
from collections.abc import Sequence

from fmfa.simpedes.people import SIDES
from fmfa.simpedes.words import COLOUR_WORDS, HAIR_WORDS, RARE, TYPE_WORDS, VAGUE, article

_HAIR_STYLES = (
    {"short": {"short"}, "long": {"long"}, "shoulder-length": {"shoulder"}},
    {"ponytail": {"ponytail"}, "bun": {"bun"}},
)  # words of one group may stand in each other's place
_PRONOUNS = {"he": "she", "she": "he", "his": "her", "her": "his"}
_WHERE = re.compile(r" (?:on|in|at) (?:his|her|their) (?:back|(?:left|right) (?:hand|side))\b")
_CARRYING = {"pulling": "holding", "holding": "pulling"}  # a suitcase, and all else
_SIDE = re.compile(r" (?:in|at) (?:his|her|their) (left|right) (?:hand|side)\b")


def changed_caption(text: str, phrase: dict, attribute: str, values: Sequence[str]) -> tuple[str, str] | None:
    """Let a caption tell another value of an attribute.

    The word that tells the attribute is replaced by the plainest one that means the new value and none of those
    that the old word allows. What hangs on it follows: the article; with another gender the pronouns; "pulling" and
    "holding" with a suitcase that comes or goes; and "on his back" is left out with another bag.

    Args:
        text: the caption.
        phrase: of the caption's truth; `told` holds the attribute.
        attribute: what to change.
        values: values to choose from, the best first; the first that can be put into words is taken.

    Returns:
        The value and the new caption, or None where the grammar leaves no single word to replace ("bald head", "hair
        down to the shoulders", a removed bag).
    """
    told = set(phrase["told"][attribute])
    if attribute in SIDES:
        return _other_side(text, phrase)
    for lexicon in _lexicons(attribute):
        said = _said(text[phrase["start"] : phrase["end"]], lexicon, told)
        if said is None:
            continue
        for value in values:
            if word := _word_for(value, lexicon, told):
                before, new, after = _replaced(text, phrase, said, word)
                if attribute == "gender":
                    return value, _with_pronouns_swapped(before + new + after)
                if attribute == "held" and "suitcase" in (value, *told):
                    before = re.sub(r"\b(pulling|holding)(?= (?:an? )?$)", lambda m: _CARRYING[m[0]], before)
                if attribute == "bag" and (where := _WHERE.match(after)):
                    after = after[where.end() :]
                return value, before + new + after
    return None


def _lexicons(attribute: str) -> tuple[dict[str, set[str]], ...]:
    if attribute == "hair_style":
        return _HAIR_STYLES
    if attribute == "hair_colour":
        return (HAIR_WORDS,)
    if attribute.endswith("_colour"):
        return (COLOUR_WORDS,)
    return (TYPE_WORDS[attribute],) if attribute in TYPE_WORDS else ()


def _said(words: str, lexicon: dict[str, set[str]], told: set[str]) -> tuple[int, int] | None:
    """Where in a phrase the word stands that means exactly `told`; None unless there is one such place."""
    found = [
        match.span()
        for word, means in lexicon.items()
        if means == told
        for match in re.finditer(rf"(?<![\w-]){re.escape(word)}(?![\w-])", words, re.IGNORECASE)
    ]
    whole = [(a, b) for a, b in found if not any((c, d) != (a, b) and c <= a and b <= d for c, d in found)]
    return whole[0] if len(whole) == 1 else None


def _word_for(value: str, lexicon: dict[str, set[str]], told: set[str]) -> str | None:
    fitting = [w for w, means in lexicon.items() if value in means and not means & told and w not in VAGUE]
    return min(fitting, key=lambda word: (word in RARE, len(lexicon[word])), default=None)


def _replaced(text: str, phrase: dict, said: tuple[int, int], word: str) -> tuple[str, str, str]:
    """What stands before the phrase, with its new article, the new phrase, and what follows."""
    before, old, after = text[: phrase["start"]], text[phrase["start"] : phrase["end"]], text[phrase["end"] :]
    if old[said[0]].isupper():
        word = word[0].upper() + word[1:]
    new = old[: said[0]] + word + old[said[1] :]
    old_article, new_article = article(old.lower()), article(new.lower())
    if old_article and re.search(rf"\b{old_article}$", before, re.IGNORECASE):
        if before[-len(old_article)].isupper():
            new_article = new_article.capitalize()
        before = before[: -len(old_article)] + new_article
    elif not old_article and phrase["part"] != "hair":  # a plural became a singular
        before += new_article
    return before, new, after


def _other_side(text: str, phrase: dict) -> tuple[str, str] | None:
    """Sides stand behind their noun phrase: "a cup in her left hand"."""
    match = _SIDE.match(text, phrase["end"])
    if match is None:
        return None
    side = "right" if match[1] == "left" else "left"
    return side, text[: match.start(1)] + side + text[match.end(1) :]


def _with_pronouns_swapped(text: str) -> str:
    def swap(match: re.Match) -> str:
        other = _PRONOUNS[match[0].lower()]
        return other.capitalize() if match[0][0].isupper() else other

    return re.sub(rf"\b(?:{'|'.join(_PRONOUNS)})\b", swap, text, flags=re.IGNORECASE)
