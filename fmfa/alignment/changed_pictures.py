"""The same person in the same scene with one attribute changed (SimPEDES only)."""

import numpy as np

from fmfa.simpedes import CAMERAS, Person, change, render
from fmfa.simpedes.people import ATTRIBUTES, options

VISIBLE = 0.003
"""Fraction of the crop that a part must cover, and that a change must alter: 9 of 96 x 32 pixels."""
ALTERED = 16
"""Grey levels in any channel from which on a pixel counts as altered."""
WHOLE = "person"  # the part of phrases that speak of the whole person
_CAMERAS = {camera.name: camera for cameras in CAMERAS.values() for camera in cameras}


def visible_enough(record: dict, part: str) -> bool:
    """Say whether the part that a phrase speaks of covers at least `VISIBLE` of a picture."""
    return part == WHOLE or record["visible"][part] >= VISIBLE


def picture_of(record: dict, size: tuple[int, int], person: Person | None = None) -> np.ndarray:
    """Render the picture of a truth record again, or another person with the same camera, view, light and noise.

    Args:
        record: of `fmfa.simpedes.read_truth`.
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
