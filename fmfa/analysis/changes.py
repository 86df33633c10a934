"""Counterfactuals of SimPEDES: a picture with one attribute changed, or a caption with one word changed.

Only SimPEDES can be asked: its pictures are rendered again with the same camera, view, light and noise.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fmfa.data.annotations import Dataset
from fmfa.errors import AnnotationError
from fmfa.simpedes.camera import CAMERAS, SEASONS, render
from fmfa.simpedes.people import ATTRIBUTES, SIDES, Person, change, options
from fmfa.simpedes.words import COLOUR_WORDS, HAIR_WORDS, RARE, TYPE_WORDS, VAGUE, article

PICTURE, CAPTION = "picture", "caption"
_HAIR_STYLES = (
    {"short": {"short"}, "long": {"long"}, "shoulder-length": {"shoulder"}},
    {"ponytail": {"ponytail"}, "bun": {"bun"}},
)  # words of one group may replace each other
_PRONOUNS = {"he": "she", "she": "he", "his": "her", "her": "his"}
_WHERE = re.compile(r" (?:on|in|at) (?:his|her|their) (?:back|(?:left|right) (?:hand|side))\b")
_CARRYING = {"pulling": "holding", "holding": "pulling"}  # a suitcase, and all else
_SIDE = re.compile(r" (?:in|at) (?:his|her|their) (left|right) (?:hand|side)\b")
VISIBLE = 0.003
"""Fraction of the crop that a part must cover, and that a change must alter: 9 of 96 x 32 pixels."""
ALTERED = 16
"""Grey levels in any channel from which on a pixel counts as altered."""
WHOLE = "person"  # the part of phrases that speak of the whole person
_CAMERAS = {camera.name: camera for cameras in CAMERAS.values() for camera in cameras}


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a caption that truly tells an attribute of a part that shows: where a change can be made."""

    phrase: dict[str, Any]  # a line of `fmfa.simpedes.truth.Truth.phrases`
    attribute: str


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """A picture, a caption that fits it, and what takes the place of one of them.

    Attributes:
        site: picture, caption, phrase and attribute.
        value: the attribute's new value.
        changed: the other picture, uint8 [H, W, 3], or the other caption.
    """

    site: Site
    value: str
    changed: np.ndarray | str

    @property
    def kind(self) -> str:
        """ "picture" or "caption": what was changed."""
        return CAPTION if isinstance(self.changed, str) else PICTURE

    @property
    def attribute(self) -> str:
        """What was changed."""
        return self.site.attribute


class Changer:
    """Makes counterfactuals of a split of SimPEDES.

    Args:
        dataset: a SimPEDES.
        split: of the data set.
        rng: chooses the new values.

    Raises:
        AnnotationError: `dataset` is no SimPEDES.
    """

    def __init__(self, dataset: Dataset, split: str, rng: np.random.Generator):
        truth = dataset.require_truth()
        recipe = truth.record["recipe"]
        self._images, self._rng = dataset.images, rng
        self._pictures = truth.pictures(split)[["attributes", "camera", "seed"]].to_dict("index")
        self._size, self._season = (recipe["height"], recipe["width"]), SEASONS[recipe["domain"]]

    def picture(self, site: Site) -> Counterfactual | None:
        """Change the picture; None where no other value can be seen.

        Raises:
            AnnotationError: the stored picture is not what the renderer makes of its truth record.
        """
        path, record = self._images / site.phrase["image"], self._pictures[site.phrase["image"]]
        stored = np.asarray(Image.open(path))
        person, view = Person(**record["attributes"]), (record["camera"], record["seed"], self._size)
        if not np.array_equal(picture_of(person, *view), stored):
            raise AnnotationError(
                f"{path} is not what the renderer makes of its truth record, so a change cannot be told from the rest; "
                "delete the folder and let SimPEDES be written again"
            )
        for value, other in self._others(site):
            changed = picture_of(other, *view)
            if is_altered(stored, changed):
                return Counterfactual(site, value, changed)
        return None

    def caption(self, site: Site) -> Counterfactual | None:
        """Change the caption; None where no single word can be replaced."""
        values = [value for value, _ in self._others(site)]
        replacement = changed_caption(site.phrase["caption"], site.phrase, site.attribute, values)
        return Counterfactual(site, *replacement) if replacement else None

    def _others(self, site: Site) -> list[tuple[str, Person]]:
        """The values that the words rule out, in random order, each with its person."""
        person = Person(**self._pictures[site.phrase["image"]]["attributes"])
        people = changed_people(person, site.attribute, self._season, self._rng)
        false = [(v, p) for v, p in people.items() if v not in site.phrase["told"][site.attribute]]
        return [false[i] for i in self._rng.permutation(len(false))]


def read_sites(dataset: Dataset, split: str) -> Iterator[Site]:
    """Yield every place of a split where a caption truly tells an attribute of a part that is visible enough.

    Raises:
        AnnotationError: `dataset` holds no ground truth of the split.
    """
    truth = dataset.require_truth()
    visible = truth.pictures(split)["visible"].to_dict()
    for phrase in truth.phrases(split).to_dict("records"):
        if phrase["part"] == WHOLE or visible[phrase["image"]][phrase["part"]] >= VISIBLE:
            yield from (Site(phrase, name) for name in phrase["told"] if name not in phrase["mistakes"])


def draw_counterfactuals(dataset: Dataset, split: str, pairs: int, seed: int = 0) -> list[Counterfactual]:
    """Draw up to `pairs` changed pictures and up to `pairs` changed captions of a split.

    Attributes take turns, so that each has as many pairs as the split allows; an attribute is asked of a picture once.
    A pure function of its arguments.

    Raises:
        AnnotationError: `dataset` is no SimPEDES, or its pictures are not those of this renderer.
    """
    places: dict[str, list[Site]] = {name: [] for name in ATTRIBUTES}
    for site in read_sites(dataset, split):
        places[site.attribute].append(site)
    counterfactuals = []
    for number in range(2):
        rng = np.random.default_rng([seed, number])
        changer = Changer(dataset, split, rng)
        make = (changer.picture, changer.caption)[number]
        turns = deque(_made(sites, make, rng) for sites in places.values())
        drawn: list[Counterfactual] = []
        while turns and len(drawn) < pairs:
            turn = turns.popleft()
            if made := next(turn, None):
                drawn.append(made)
                turns.append(turn)
        counterfactuals += drawn
    return counterfactuals


def _made(
    sites: Sequence[Site], make: Callable[[Site], Counterfactual | None], rng: np.random.Generator
) -> Iterator[Counterfactual]:
    asked: set[str] = set()
    for i in rng.permutation(len(sites)):
        picture = sites[i].phrase["image"]
        if picture not in asked and (made := make(sites[i])):
            asked.add(picture)
            yield made


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
    """Where in a phrase the word is that means exactly `told`; None unless there is one such place."""
    spans = [
        match.span()
        for word, means in lexicon.items()
        if means == told
        for match in re.finditer(rf"(?<![\w-]){re.escape(word)}(?![\w-])", words, re.IGNORECASE)
    ]
    whole = [(a, b) for a, b in spans if not any((c, d) != (a, b) and c <= a and b <= d for c, d in spans)]
    return whole[0] if len(whole) == 1 else None


def _word_for(value: str, lexicon: dict[str, set[str]], told: set[str]) -> str | None:
    fitting = [w for w, means in lexicon.items() if value in means and not means & told and w not in VAGUE]
    return min(fitting, key=lambda word: (word in RARE, len(lexicon[word])), default=None)


def _replaced(text: str, phrase: dict, said: tuple[int, int], word: str) -> tuple[str, str, str]:
    """What comes before the phrase, with its new article, the new phrase, and what follows."""
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
    """Sides follow their noun phrase: "a cup in her left hand"."""
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


def picture_of(person: Person, camera: str, seed: list[int], size: tuple[int, int]) -> np.ndarray:
    """Render a picture by what its truth holds, or another person with the same camera, view, light and noise.

    Args:
        person: who is shown.
        camera: its name.
        seed: of view, light and noise.
        size: height and width of the data set's pictures.

    Returns:
        uint8 [H, W, 3]; for the person of the truth the stored picture bit by bit.
    """
    return render(person, _CAMERAS[camera], seed, size).image


def changed_people(person: Person, attribute: str, season: str, rng: np.random.Generator) -> dict[str, Person]:
    """Return the same person with every other value of one attribute that the population of a season knows.

    Nothing else changes, save what comes or goes with the value (a bag's colour goes with the bag, a shoulder bag gets
    a side). Values that would force another change are left out: white sneakers do not become boots, which are
    never white.
    """
    people = {}
    for value in options(attribute, person.to_dict(), season):
        if value != getattr(person, attribute):
            changed = change(person, attribute, rng, season, value)
            if _nothing_else_changes(person, changed, attribute) and _possible(changed, season):
                people[value] = changed
    return people


def _nothing_else_changes(person: Person, changed: Person, attribute: str) -> bool:
    pairs = ((getattr(person, n), getattr(changed, n)) for n in ATTRIBUTES if n != attribute)
    return all(old == new or "none" in (old, new) for old, new in pairs)


def _possible(person: Person, season: str) -> bool:
    values = person.to_dict()
    return all(value in options(name, values, season) for name, value in values.items())


def is_altered(picture: np.ndarray, changed: np.ndarray) -> bool:
    """Say whether two pictures differ by `ALTERED` grey levels in at least `VISIBLE` of their pixels."""
    difference = np.abs(picture.astype(np.int16) - changed).max(axis=2)
    return bool((difference >= ALTERED).mean() >= VISIBLE)
