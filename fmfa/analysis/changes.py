"""Counterfactuals of SimPEDES: a picture with one attribute changed, or a caption with one word changed.

Only SimPEDES can be asked: its pictures are rendered again with the same camera, view, light and noise.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fmfa.data.annotations import Dataset
from fmfa.errors import AnnotationError, ConfigError
from fmfa.simpedes.camera import CAMERAS, SEASONS, render
from fmfa.simpedes.people import ATTRIBUTES, SIDES, Person, change, options
from fmfa.simpedes.truth import is_simpedes, read_dataset_record, read_truth
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

    record: dict  # truth of the picture, `fmfa.simpedes.truth.read_truth`
    text: str  # the caption
    phrase: dict
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
    """Makes counterfactuals of one SimPEDES folder.

    Args:
        dataset: a SimPEDES.
        rng: chooses the new values.

    Raises:
        AnnotationError: `dataset` is no SimPEDES.
    """

    def __init__(self, dataset: Dataset, rng: np.random.Generator):
        root = dataset.images.parent
        if not is_simpedes(root):
            raise AnnotationError(f"{root} is no SimPEDES: only its pictures can be rendered again with a change")
        recipe = read_dataset_record(root)["recipe"]
        self._images, self._rng = dataset.images, rng
        self._size, self._season = (recipe["height"], recipe["width"]), SEASONS[recipe["domain"]]

    def picture(self, site: Site) -> Counterfactual | None:
        """Change the picture; None where no other value can be seen.

        Raises:
            AnnotationError: the stored picture is not what the renderer makes of its truth record.
        """
        stored = np.asarray(Image.open(self._images / site.record["file_path"]))
        if not np.array_equal(picture_of(site.record, self._size), stored):
            raise AnnotationError(
                f"{self._images / site.record['file_path']} is not what the renderer makes of its truth record, so a "
                "change cannot be told from the rest; delete the folder and let SimPEDES be written again"
            )
        for value, person in self._others(site):
            changed = picture_of(site.record, self._size, person)
            if is_altered(stored, changed):
                return Counterfactual(site, value, changed)
        return None

    def caption(self, site: Site) -> Counterfactual | None:
        """Change the caption; None where no single word can be replaced."""
        found = changed_caption(site.text, site.phrase, site.attribute, [value for value, _ in self._others(site)])
        return Counterfactual(site, *found) if found else None

    def _others(self, site: Site) -> list[tuple[str, Person]]:
        """The values that the words rule out, in random order, each with its person."""
        person = Person(**site.record["attributes"])
        people = changed_people(person, site.attribute, self._season, self._rng)
        false = [(v, p) for v, p in people.items() if v not in site.phrase["told"][site.attribute]]
        return [false[i] for i in self._rng.permutation(len(false))]


def read_sites(dataset: Dataset, split: str) -> Iterator[Site]:
    """Yield every place of a split where a caption truly tells an attribute of a part that is visible enough.

    Raises:
        AnnotationError: `dataset` holds no ground truth of the split.
    """
    for record in read_truth(dataset.images.parent, split):
        for caption in record["captions"]:
            for phrase in caption["phrases"]:
                if visible_enough(record, phrase["part"]):
                    for attribute in phrase["told"]:
                        if attribute not in phrase["mistakes"]:
                            yield Site(record, caption["text"], phrase, attribute)


def draw_counterfactuals(dataset: Dataset, split: str, pairs: int = 300, seed: int = 0) -> list[Counterfactual]:
    """Draw up to `pairs` changed pictures and up to `pairs` changed captions of a split.

    Attributes take turns, so that each has as many pairs as the split allows; an attribute is asked of a picture once.
    A pure function of its arguments.

    Raises:
        ConfigError: `pairs` is below 1.
        AnnotationError: `dataset` is no SimPEDES, or its pictures are not those of this renderer.
    """
    if pairs < 1:
        raise ConfigError(f"pairs is {pairs}; expected 1 or more counterfactuals of each kind")
    places: dict[str, list[Site]] = {name: [] for name in ATTRIBUTES}
    for site in read_sites(dataset, split):
        places[site.attribute].append(site)
    found = []
    for number in range(2):
        rng = np.random.default_rng([seed, number])
        changer = Changer(dataset, rng)
        make = (changer.picture, changer.caption)[number]
        turns = deque(_made(sites, make, rng) for sites in places.values())
        drawn: list[Counterfactual] = []
        while turns and len(drawn) < pairs:
            turn = turns.popleft()
            if made := next(turn, None):
                drawn.append(made)
                turns.append(turn)
        found += drawn
    return found


def _made(
    sites: Sequence[Site], make: Callable[[Site], Counterfactual | None], rng: np.random.Generator
) -> Iterator[Counterfactual]:
    asked: set[str] = set()
    for i in rng.permutation(len(sites)):
        picture = sites[i].record["file_path"]
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


def visible_enough(record: dict, part: str) -> bool:
    """Say whether the part that a phrase speaks of covers at least `VISIBLE` of a picture."""
    return part == WHOLE or record["visible"][part] >= VISIBLE


def picture_of(record: dict, size: tuple[int, int], person: Person | None = None) -> np.ndarray:
    """Render the picture of a truth record again, or another person with the same camera, view, light and noise.

    Args:
        record: of `fmfa.simpedes.truth.read_truth`.
        size: height and width of the data set's pictures.
        person: who is shown; the record's own person when left out, which gives the stored picture bit by bit.

    Returns:
        uint8 [H, W, 3].
    """
    shown = person or Person(**record["attributes"])
    return render(shown, _CAMERAS[record["camera"]], record["seed"], size).image


def changed_people(person: Person, attribute: str, season: str, rng: np.random.Generator) -> dict[str, Person]:
    """Return the same person with every other value of one attribute that the population of a season knows.

    Nothing else changes, save what comes or goes with the value (a bag's colour goes with the bag, a shoulder bag gets
    a side). Values that would force another change are left out: white sneakers do not become boots, which are
    never white.
    """
    found = {}
    for value in options(attribute, person.to_dict(), season):
        if value != getattr(person, attribute):
            changed = change(person, attribute, rng, season, value)
            if _nothing_else_changes(person, changed, attribute) and _possible(changed, season):
                found[value] = changed
    return found


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
