"""Who is in SimPEDES: attribute vectors, their frequencies, and families of look-alikes."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

COLOURS = {
    "black": (30, 30, 34),
    "white": (238, 238, 234),
    "grey": (132, 133, 136),
    "red": (198, 30, 38),
    "blue": (38, 96, 205),
    "navy": (27, 36, 86),
    "light blue": (146, 194, 236),
    "green": (38, 142, 66),
    "dark green": (28, 66, 42),
    "yellow": (242, 208, 46),
    "orange": (240, 126, 26),
    "pink": (245, 150, 188),
    "purple": (122, 58, 166),
    "brown": (104, 66, 38),
    "beige": (216, 192, 150),
}
HAIR_COLOURS = {
    "black": (28, 24, 24),
    "brown": (92, 58, 34),
    "blond": (222, 186, 104),
    "red": (172, 74, 30),
    "grey": (168, 168, 170),
}
SKINS = {"light": (240, 200, 172), "medium": (204, 152, 112), "dark": (122, 80, 54)}


@dataclass(frozen=True)
class Person:
    """The attribute vector of one identity; every value is a word, "none" where the thing is absent.

    Sides are the person's own left and right.
    """

    gender: str
    build: str
    skin: str
    hair_colour: str
    hair_style: str
    beard: str
    headwear: str
    headwear_colour: str
    glasses: str
    scarf_colour: str
    top: str
    top_colour: str
    top_pattern: str
    pattern_colour: str
    outer: str
    outer_colour: str
    lower: str
    lower_colour: str
    shoes: str
    shoes_colour: str
    bag: str
    bag_colour: str
    bag_side: str
    held: str
    held_colour: str
    held_side: str

    def to_dict(self) -> dict[str, str]:
        """Return the attributes as a plain dictionary, in declaration order."""
        return dict(vars(self))


ATTRIBUTES = tuple(field.name for field in fields(Person))
SIDES = ("bag_side", "held_side")
# What a family's members may differ in, with the chance of each: often confused things come often.
FAMILY_CHANGES = {
    "hair_style": 2, "hair_colour": 1.5, "headwear": 1.5, "headwear_colour": 1, "glasses": 1.5,
    "scarf_colour": 1, "top_colour": 2, "top_pattern": 1.5, "top": 1, "outer": 1, "outer_colour": 2,
    "lower": 1, "lower_colour": 2, "shoes": 0.7, "shoes_colour": 2.5, "bag": 2, "bag_colour": 2, "held": 1.5,
}  # fmt: skip
_Weights = dict[str, float]
_GARMENT: _Weights = {
    "black": 5, "white": 3.5, "grey": 3, "blue": 2.5, "navy": 2, "red": 2.2, "light blue": 1.2, "green": 1.2,
    "dark green": 0.8, "yellow": 1, "orange": 0.8, "pink": 1.2, "purple": 0.9, "brown": 1, "beige": 1.2,
}  # fmt: skip
_JEANS: _Weights = {"blue": 4, "navy": 3, "light blue": 1.5, "black": 1, "grey": 0.8}
_TROUSERS: _Weights = {"black": 5, "grey": 2.5, "beige": 1.6, "brown": 1.3, "dark green": 0.8, "white": 0.8, "red": 0.3}
_SHOES: _Weights = {
    "black": 4, "white": 4, "grey": 1.8, "brown": 1, "red": 1.2, "blue": 1, "green": 0.4, "pink": 0.6, "yellow": 0.5,
    "orange": 0.4,
}  # fmt: skip
_LEATHER: _Weights = {"black": 5, "brown": 3, "beige": 0.7, "grey": 0.6, "red": 0.3}
_BAG: _Weights = {
    "black": 5, "brown": 1.6, "red": 1.4, "blue": 1.5, "navy": 0.8, "grey": 1.4, "green": 0.8, "white": 0.8,
    "pink": 0.8, "yellow": 0.7, "orange": 0.6, "purple": 0.6, "beige": 0.8,
}  # fmt: skip
_ACCESSORY: _Weights = {
    "black": 3, "white": 1.5, "grey": 1.2, "red": 1.6, "blue": 1.4, "navy": 0.8, "green": 0.8, "yellow": 0.8,
    "pink": 0.7, "orange": 0.5, "beige": 0.8, "purple": 0.5, "brown": 0.5,
}  # fmt: skip
_HELD_COLOURS: dict[str, _Weights] = {
    "phone": {"black": 3, "white": 1},
    "cup": {"white": 3, "red": 1, "green": 1, "brown": 1},
    "book": {"blue": 1.5, "red": 1.5, "white": 1, "yellow": 1, "green": 1},
    "suitcase": _BAG,
}


def pick(rng: np.random.Generator, weights: _Weights) -> str:
    """Draw one key with probability proportional to its weight."""
    threshold = rng.random() * sum(weights.values())
    for value, weight in weights.items():
        threshold -= weight
        if threshold < 0:
            return value
    return value


_PATTERNS: dict[str, _Weights] = {
    "t-shirt": {"plain": 5, "striped": 1.6, "logo": 1.8},
    "shirt": {"plain": 5, "checked": 2, "striped": 0.8},
    "sweater": {"plain": 5, "striped": 1.5},
    "dress": {"plain": 4, "dotted": 1.5, "striped": 0.8},
    "hoodie": {"plain": 5, "logo": 1.5},
    "tank top": {"plain": 1},
}
_DARK = ("black", "navy", "dark green", "brown", "purple", "blue", "red", "green")
_NONE: _Weights = {"none": 1}


def options(name: str, person: dict[str, str], season: str) -> _Weights:
    """Return the values an attribute may take, with weights, given the attributes before it ("warm" or "cold")."""
    man, cold = person.get("gender") == "man", season == "cold"
    match name:
        case "gender":
            return {"man": 1, "woman": 1}
        case "build":
            return {"average": 6, "slim": 2, "heavy": 2}
        case "skin":
            return {"light": 5, "medium": 3, "dark": 2}
        case "hair_colour":
            return {"black": 4, "brown": 3, "blond": 2, "red": 0.8, "grey": 1}
        case "hair_style" if man:
            return {"short": 8, "bald": 1, "long": 0.3, "ponytail": 0.2}
        case "hair_style":
            return {"long": 4, "shoulder": 3, "ponytail": 2.5, "bun": 1.5, "short": 0.9}
        case "beard":
            return {"none": 4, "beard": 1} if man else _NONE
        case "headwear" if cold:
            return {"none": 9, "beanie": 2.5, "cap": 1.2, "hat": 0.5}
        case "headwear":
            return {"none": 11, "cap": 2.2, "hat": 0.9, "beanie": 0.3}
        case "glasses":
            return {"none": 8, "glasses": 2, "sunglasses": 1}
        case "scarf_colour":
            return {"none": 40 if cold else 150, **_ACCESSORY}
        case "top" if cold:
            kinds = {"t-shirt": 2, "shirt": 2.5, "sweater": 3, "hoodie": 2}
            return kinds if man else {**kinds, "dress": 1.5}
        case "top":
            kinds = {"t-shirt": 5, "shirt": 2.5, "sweater": 1, "hoodie": 1, "tank top": 1}
            return kinds if man else {**kinds, "dress": 1.5}
        case "top_pattern":
            return _PATTERNS[person["top"]]
        case "pattern_colour":
            if person["top_pattern"] == "plain":
                return _NONE
            return {"white": 4, "yellow": 1} if person["top_colour"] in _DARK else {"black": 2, "navy": 1, "red": 1}
        case "outer" if person["top"] == "dress":
            return {"none": 7, "jacket": 1.5, "coat": 1.5 if cold else 0.3}
        case "outer" if cold:
            return {"none": 3, "jacket": 4, "coat": 2.5, "vest": 0.8}
        case "outer":
            return {"none": 8, "jacket": 2, "vest": 0.6}
        case "lower" if person["top"] == "dress":
            return _NONE
        case "lower":
            kinds = {"jeans": 4, "trousers": 4} if cold else {"jeans": 3.5, "trousers": 3, "shorts": 2.5}
            return kinds if man else {**kinds, "skirt": 2.2}
        case "lower_colour":
            return {"jeans": _JEANS, "trousers": _TROUSERS, "none": _NONE}.get(person["lower"], _GARMENT)
        case "shoes" if cold:
            return {"sneakers": 3, "shoes": 2, "boots": 3}
        case "shoes":
            return {"sneakers": 5, "shoes": 2, "boots": 0.8}
        case "shoes_colour":
            return _SHOES if person["shoes"] == "sneakers" else _LEATHER
        case "bag":
            return {"none": 4, "backpack": 3, "shoulder bag": 2, "handbag": 0.4 if man else 2}
        case "bag_side":
            return {"left": 1, "right": 1} if person["bag"] in ("shoulder bag", "handbag") else _NONE
        case "held":
            return {"none": 6, "phone": 1.5, "cup": 1.2, "book": 1, "suitcase": 0.8}
        case "held_side" if person["held"] != "none":
            free: _Weights = {"left": 1, "right": 1}
            if person["bag"] == "handbag":  # the handbag keeps its hand
                del free[person["bag_side"]]
            return free
        case "top_colour":
            return _GARMENT
        case "held_colour" if person["held"] != "none":
            return _HELD_COLOURS[person["held"]]
        case "outer_colour" | "bag_colour" | "headwear_colour" if person[name.removesuffix("_colour")] != "none":
            return {"outer_colour": _GARMENT, "bag_colour": _BAG, "headwear_colour": _ACCESSORY}[name]
        case "outer_colour" | "bag_colour" | "headwear_colour" | "held_colour" | "held_side":
            return _NONE
    raise KeyError(name)


_DEPENDENTS = {
    "top": ("top_pattern", "pattern_colour"),
    "top_pattern": ("pattern_colour",),
    "top_colour": ("pattern_colour",),
    "outer": ("outer_colour",),
    "lower": ("lower_colour",),
    "shoes": ("shoes_colour",),
    "bag": ("bag_colour", "bag_side", "held_side"),
    "held": ("held_colour", "held_side"),
    "headwear": ("headwear_colour",),
}


def draw_person(rng: np.random.Generator, season: str = "warm") -> Person:
    """Draw a person from the population of a season, "warm" or "cold"."""
    values: dict[str, str] = {}
    for name in ATTRIBUTES:
        values[name] = pick(rng, options(name, values, season))
    return Person(**values)


def change(person: Person, name: str, rng: np.random.Generator, season: str = "warm", value: str = "") -> Person:
    """Return `person` with another value of one attribute, drawn or given.

    Attributes that hang on it (a bag's colour on the bag) are redrawn only where their old value no longer fits.
    """
    values = person.to_dict()
    others = {k: w for k, w in options(name, values, season).items() if k != values[name]}
    values[name] = value or pick(rng, others)
    for dependent in _DEPENDENTS.get(name, ()):
        legal = options(dependent, values, season)
        if values[dependent] not in legal:
            values[dependent] = pick(rng, legal)
    return Person(**values)


def changeable(person: Person) -> _Weights:
    """Return the attributes in which a look-alike of this person may differ, with weights."""
    return {
        name: weight
        for name, weight in FAMILY_CHANGES.items()
        if not (name.endswith("_colour") and name != "scarf_colour" and getattr(person, name) == "none")
        and not (person.top == "dress" and name in ("top", "lower", "outer"))
        and not (name == "hair_colour" and person.hair_style == "bald")
        and not (name == "top_pattern" and person.top == "tank top")
        and not (name == "top" and person.top == "dress")
    }


def appearance(person: Person) -> tuple[str, ...]:
    """Return what tells identities apart: every attribute but the sides."""
    return tuple(value for name, value in person.to_dict().items() if name not in SIDES)


def draw_family(rng: np.random.Generator, size: int, season: str) -> list[Person]:
    """Draw `size` people who differ from the first in one or two attributes, and from each other.

    No two of them differ by the side of a bag or of a held thing alone.
    """
    base = draw_person(rng, season)
    family, seen = [base], {appearance(base)}
    while len(family) < size:
        person, choices = base, changeable(base)
        for _ in range(2 if rng.random() < 0.4 else 1):
            name = pick(rng, choices)
            person = change(person, name, rng, season)
            tied = {name, *_DEPENDENTS.get(name, ()), *(k for k, v in _DEPENDENTS.items() if name in v)}
            choices = {k: w for k, w in choices.items() if k not in tied}
        if appearance(person) not in seen and (person.top == "dress") == (base.top == "dress"):
            seen.add(appearance(person))
            family.append(person)
    return family


def population(
    seed: list[int], count: int, family_size: int, season: str, first: int = 0
) -> Iterator[tuple[int, int, Person]]:
    """Yield (identity index, family index, Person) for `count` identities from index `first` on.

    Family f is a pure function of (seed, f), so any slice can be made alone and in constant memory. `first` must be a
    multiple of `family_size`; a last family may be cut short.
    """
    for index in range(first, first + count, family_size):
        family = index // family_size
        rng = np.random.default_rng([*seed, 1, family])
        for member, person in enumerate(draw_family(rng, family_size, season)[: first + count - index]):
            yield index + member, family, person
