"""An endless, identity-free stream of pictures with alt-text: to SimPEDES what the web is to CUHK-PEDES.

Another look (product shots of single garments, studio portraits, holiday snaps; sharp, well lit, from other
cameras), another language (two to eight words of alt-text, shop talk, noise) and other frequencies. No picture shows
a person of a SimPEDES split, and no person is shown twice.
"""

from dataclasses import replace

import numpy as np

from fmfa.simpedes.camera import BASE_SIZE, Camera, composite, degrade, draw_background, draw_view
from fmfa.simpedes.canvas import PARTS
from fmfa.simpedes.figure import draw_figure
from fmfa.simpedes.people import Person, draw_person, pick
from fmfa.simpedes.words import COLOUR_WORDS, HAIR_WORDS, TYPE_WORDS, VAGUE

_ALL_ROUND = ((0, 4), (45, 2), (-45, 2), (90, 1), (-90, 1), (180, 2), (135, 0.7), (-135, 0.7))
_PLAIN = (235, 235, 235)
_STUDIO = Camera("studio-0", ((0, 6), (40, 1), (-40, 1), (180, 1)), 2, 1.1, 0.15, 1.5, 1.05, 0.97, (1.0, 1.0, 1.0),
                 _PLAIN, (228, 228, 226), 0.9, 0.0)  # fmt: skip
_SNAP = Camera("snap-0", _ALL_ROUND, 5, 1.0, 0.4, 4, 1.05, 1.0, (1.02, 1.0, 0.98), (150, 160, 170), (130, 128, 110),
               0.45, 0.05)  # fmt: skip
_KINDS = {"product": 1.5, "studio": 2.5, "snap": 6}
# part -> (height of its middle in metres, pixels a metre)
_PRODUCTS = {"top": (1.2, 62), "outer": (1.12, 58), "dress": (1.0, 58), "lower": (0.55, 62), "shoes": (0.1, 95),
             "bag": (1.1, 80), "headwear": (1.72, 150)}  # fmt: skip


def web_pair(seed: int, index: int, size: tuple[int, int] = BASE_SIZE) -> tuple[np.ndarray, str]:
    """Return picture `index` of the stream of `seed`: uint8 [H, W, 3], and its alt-text.

    A pure function of its arguments. About one text in twelve belongs to another picture, as on the web.
    """
    rng = np.random.default_rng([seed, 9, index])
    person = draw_person(rng, pick(rng, {"warm": 1, "cold": 1}))
    kind = pick(rng, _KINDS)
    shown = [part for part in _PRODUCTS if _present(person, part)]
    part = shown[int(rng.random() * len(shown))]
    image, back = _photograph(person, kind, part, size, rng)
    described = draw_person(rng, "warm") if rng.random() < 0.08 else person
    if kind == "product" and _present(described, part):
        return image, _shop_talk(described, part, rng)
    return image, _alt_text(described, back, rng)


def _present(person: Person, part: str) -> bool:
    if part == "dress":
        return person.top == "dress"
    return person.top != "dress" if part == "top" else getattr(person, part) != "none"


def _photograph(
    person: Person, kind: str, part: str, size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, bool]:
    light = rng.random(6).tolist()
    if kind == "snap":  # everywhere is another place
        (r, g, b), (s, h, c) = ([int(60 + 170 * v) for v in rng.random(3)] for _ in range(2))
        camera = replace(
            _SNAP, pitch=18 * light[0], blur=0.7 * light[1], noise=1 + 7 * light[2], gain=0.85 + 0.3 * light[3],
            resolution=0.7 + 0.4 * light[4], wall=(r, g, b), ground=(s, h, c), horizon=0.2 + 0.5 * light[5],
        )  # fmt: skip
    else:
        camera = _STUDIO
    view = draw_view(camera, rng)
    if kind == "product":
        person = _laid_out(person, part)
        middle, scale = _PRODUCTS[part]
        yaw = 180.0 + 30 * (light[0] - 0.5) if part == "bag" and person.bag == "backpack" else 50 * (light[0] - 0.5)
        rows_above_ground = 0.455 * 96 / scale
        view = replace(view, yaw=yaw, pitch=0.0, scale=scale, shift_x=0.0, shift_u=rows_above_ground - middle)
    canvas = draw_figure(person, view, size)
    indices = canvas.paint()
    if kind == "product":
        canvas.palette[canvas.part_of != PARTS.index(part)] = 0
    plain = np.full((*size, 3), 150 + int(100 * light[2]), np.uint8)
    background = plain if kind != "snap" else draw_background(camera, view, size, rng)
    away = abs((view.yaw + 180) % 360 - 180)
    return degrade(composite(canvas, indices, background), camera, rng), away > 120


def _laid_out(person: Person, part: str) -> Person:
    """Take off what would cover the garment on sale."""
    off = {"held": "none", "held_side": "none", "scarf_colour": "none"}
    if part != "bag":
        off |= {"bag": "none", "bag_side": "none"}
    if part in ("top", "lower"):
        off |= {"outer": "none", "outer_colour": "none"}
    return replace(person, **off)


def _choose(rng: np.random.Generator, lexicon: dict[str, set[str]], value: str) -> str:
    fitting = [word for word, means in lexicon.items() if value in means and word not in VAGUE]
    return fitting[int(rng.random() ** 1.5 * len(fitting))]


def _named(person: Person, kind: str, rng: np.random.Generator) -> str:
    words = []
    if kind != "glasses" and rng.random() < 0.9:
        words.append(_choose(rng, COLOUR_WORDS, getattr(person, f"{kind}_colour")))
    if kind == "top" and person.top_pattern in ("striped", "checked", "dotted") and rng.random() < 0.7:
        words.append(_choose(rng, TYPE_WORDS["top_pattern"], person.top_pattern))
    words.append(_choose(rng, TYPE_WORDS[kind], getattr(person, kind)))
    return " ".join(words)


def _shop_talk(person: Person, part: str, rng: np.random.Generator) -> str:
    thing = _named(person, "top" if part == "dress" else part, rng)
    customer = "men" if person.gender == "man" else "women"
    form = pick(
        rng,
        {"{0}": 4, "{0} for {1}": 2, "new {0}, size m": 1, "{1}'s {0}": 2, "sale: {0}": 1, "{0} isolated": 1},
    )
    return form.format(thing, customer)


def _alt_text(person: Person, back: bool, rng: np.random.Generator) -> str:
    kinds = {
        "top": 3,
        "outer": 4,
        "lower": 3,
        "shoes": 1.5,
        "bag": 2,
        "held": 1,
        "headwear": 1.5,
        "glasses": 0.7,
    }
    there = {
        kind: weight
        for kind, weight in kinds.items()
        if getattr(person, kind) != "none" and not (back and kind in ("glasses", "held"))
    }
    things = []
    for _ in range(int(pick(rng, {"1": 1, "2": 2, "3": 2}))):
        if there:
            kind = pick(rng, there)
            del there[kind]
            things.append(_named(person, kind, rng))
    who = _choose(rng, TYPE_WORDS["gender"], person.gender)
    listed = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
    hair = ""
    if person.hair_style != "bald" and rng.random() < 0.3:
        length = {"long": "long ", "short": "short ", "shoulder": "shoulder-length "}.get(person.hair_style, "")
        hair = f"{length}{_choose(rng, HAIR_WORDS, person.hair_colour)} hair"
    if hair and rng.random() < 0.4:
        return f"{who} with {hair}"
    form = pick(rng, {
        "{who} in {things}": 4, "{who} with {things}": 1.5, "{things}": 2.5, "{who} wearing {things}": 2.5,
        "stock photo: {who}, {things}": 0.7, "street style {things}": 0.7, "portrait of a {who} in {things}": 0.7,
    })  # fmt: skip
    text = form.format(who=who, things=listed)
    return f"{text}, {hair}" if hair else text
