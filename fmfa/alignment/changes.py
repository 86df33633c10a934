"""Counterfactuals of SimPEDES: a picture with one attribute changed, or a caption with one word changed.

Only SimPEDES can be asked: its pictures are rendered again with the same camera, view, light and noise.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fmfa.alignment.changed_captions import changed_caption
from fmfa.alignment.changed_pictures import changed_people, is_altered, picture_of, visible_enough
from fmfa.data.annotations import Dataset
from fmfa.errors import AnnotationError, ConfigError
from fmfa.simpedes import Person, is_simpedes, read_dataset_record, read_truth
from fmfa.simpedes.camera import SEASONS
from fmfa.simpedes.people import ATTRIBUTES

PICTURE, CAPTION = "picture", "caption"


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a caption that truly tells an attribute of a part that shows: where a change can be made."""

    record: dict  # truth of the picture, `fmfa.simpedes.read_truth`
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
