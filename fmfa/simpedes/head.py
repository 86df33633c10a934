"""Head, hair, face and what is worn on them."""

from math import cos, radians, sin

from .canvas import Profile
from .people import COLOURS


def _ball(centre: float, height: float, width: float, thick: float, offset: float = 0.0, low: int = -90) -> Profile:
    """Return an ellipsoid's sections from its top down to `low` degrees."""
    angles = [radians(a) for a in range(90, low - 1, -18)]
    return [(centre + height * sin(a), max(width * cos(a), 1e-3), max(thick * cos(a), 1e-3), offset) for a in angles]


def draw_head(figure) -> None:
    """Add skull, face, hair, beard, glasses and headwear of a `figure._Figure`."""
    c, p = figure.c, figure.p
    skull = _ball(1.625, 0.135, 0.102, 0.115)
    style, front = p.hair_style, 0.05
    if style in ("long", "shoulder"):
        end = 1.22 if style == "long" else 1.42
        back = [(1.72, 0.06, 0.05, -0.03), (1.66, 0.112, 0.07, -0.035), (1.52, 0.12, 0.06, -0.055),
                (end, 0.115 if style == "long" else 0.105, 0.045, -0.085)]  # fmt: skip
        c.solid(back, figure.hair, c.facing(0, -0.17 if c.facing(0, -1) > 0 else -0.05))
    c.solid(skull, figure.hair, front)
    hairline = 1.675 if style != "bald" else 1.76
    face = 62 if style in ("long", "shoulder") else 74
    c.patch(skull, hairline, 1.492, -face, face, figure.skin + 1, front + 1e-3)
    if style not in ("long", "shoulder"):  # nape and jaw
        c.patch(skull, 1.565, 1.492, -125, 125, figure.skin + 1, front + 1e-3)
    if c.facing(0, 1) > -0.2:
        c.limb((0, 0.108, 1.62), (0, 0.122, 1.595), 0.012, 0.016, figure.skin, front + 2e-3)
    for side in (1, -1):
        c.patch(skull, 1.647, 1.627, side * 24 - 8, side * 24 + 8, figure.ink, front + 3e-3)
    c.patch(skull, 1.558, 1.548, -16, 16, figure.ink + 2, front + 3e-3)
    if p.beard == "beard":
        c.patch(skull, 1.565, 1.492, -68, 68, figure.hair, front + 3.5e-3)
        c.patch(skull, 1.558, 1.546, -14, 14, figure.skin, front + 3.6e-3)
    if p.glasses != "none":
        _glasses(figure, skull, front + 4e-3)
    back = c.facing(0, -0.16)
    if style == "ponytail":
        c.limb((0, -0.12, 1.66), (0.015, -0.17, 1.36), 0.042, 0.026, figure.hair, back)
    if style == "bun":
        c.limb((0, -0.09, 1.74), (0, -0.10, 1.75), 0.062, 0.062, figure.hair, max(back, -0.01))
    if p.headwear != "none":
        _headwear(figure, front + 6e-3)


def _glasses(figure, skull: Profile, depth: float) -> None:
    c = figure.c
    frame = c.material((24, 24, 26), "glasses")
    lens = frame if figure.p.glasses == "sunglasses" else c.material((205, 222, 235), "glasses")
    c.patch(skull, 1.65, 1.637, -86, 86, frame + 1, depth)
    for side in (1, -1):
        c.patch(skull, 1.662, 1.606, side * 27 - 23, side * 27 + 23, frame + 1, depth)
        c.patch(skull, 1.652, 1.616, side * 27 - 15, side * 27 + 15, lens + 1, depth + 1e-4)


def _headwear(figure, depth: float) -> None:
    c, p = figure.c, figure.p
    cloth = c.material(COLOURS[p.headwear_colour], "headwear")
    match p.headwear:
        case "beanie":
            dome = [*_ball(1.655, 0.132, 0.112, 0.125, low=0)]
            c.solid([(1.815, 0.03, 0.03, 0.0), *dome], cloth, depth)
            c.patch(dome, 1.70, 1.655, -180, 180, cloth + 2, depth + 1e-4)
            c.patch(dome, 1.70, 1.655, 0, 180, cloth + 2, depth + 1e-4)
        case "cap":
            c.solid(_ball(1.672, 0.105, 0.108, 0.12, low=0), cloth, depth)
            visor = [(a, f, 1.672 - 0.1 * (f - 0.1)) for a, f in
                     ((0.085, 0.07), (0.075, 0.17), (0.0, 0.205), (-0.075, 0.17), (-0.085, 0.07))]  # fmt: skip
            rim = [c.project(a, f, u) for a, f, u in visor]
            thick = [(x, y + 0.022 * c.unit) for x, y in rim[::-1]]
            c.polygon(rim + thick, cloth, depth + (1e-4 if c.facing(0, 1) > 0 else -0.2))
        case "hat":
            brim = [(1.69, 0.18, 0.19, 0.0), (1.672, 0.20, 0.21, 0.0), (1.66, 0.18, 0.19, 0.0)]
            c.solid(
                [(1.80, 0.085, 0.09, 0.0), (1.79, 0.095, 0.105, 0.0), (1.67, 0.108, 0.12, 0.0)],
                cloth,
                depth,
            )
            c.solid(brim, cloth, depth + 1e-4)


def draw_scarf(figure) -> None:
    """Add a scarf of a `figure._Figure`, if there is one."""
    c, p = figure.c, figure.p
    if p.scarf_colour == "none":
        return
    wool = c.material(COLOURS[p.scarf_colour], "scarf")
    loop = [(1.52, 0.085, 0.09, 0.0), (1.49, 0.105, 0.11, 0.0), (1.425, 0.10, 0.105, 0.0)]
    c.solid(loop, wool, 0.047)
    c.patch(figure.torso, 1.44, 1.17, 8, 34, wool + 1, 0.049)
