"""How a person looks: attributes to solids on a canvas."""

from collections.abc import Sequence
from math import cos, radians, sin

from fmfa.simpedes.canvas import Canvas, Profile, View
from fmfa.simpedes.people import COLOURS, HAIR_COLOURS, SKINS, Person

_TORSO = 0.03  # depth of the torso's front: arms at the sides come before it, held things after
_SIDE = {"left": 1, "right": -1}


def draw_figure(person: Person, view: View, size: tuple[int, int], supersampling: int = 3) -> Canvas:
    """Put a person on a new canvas of `size` (height, width) pixels; only attributes and view matter."""
    canvas = Canvas(view, size, supersampling)
    _Figure(person, canvas).draw()
    return canvas


class _Figure:
    def __init__(self, person: Person, canvas: Canvas):
        self.p, self.c = person, canvas
        man = person.gender == "man"
        girth = {"slim": 0.86, "average": 1.0, "heavy": 1.26}[person.build]
        self.girth = girth
        self.shoulder = (0.19 if man else 0.16) * (0.45 + 0.55 * girth)
        self.hip = (0.142 if man else 0.158) * girth
        self.waist = (0.148 if man else 0.118) * girth
        self.thick = 0.112 * girth * (1.2 if person.build == "heavy" else 1.0)
        self.skin = canvas.material(SKINS[person.skin], "skin")
        hair = SKINS[person.skin] if person.hair_style == "bald" else HAIR_COLOURS[person.hair_colour]
        self.hair = canvas.material(hair, "hair")
        self.ink = canvas.material((40, 30, 30), "skin")
        dress = person.top == "dress"
        self.top = canvas.material(COLOURS[person.top_colour], "dress" if dress else "top")
        self.pattern = self.top
        if person.top_pattern == "logo":
            self.pattern = canvas.material(COLOURS[person.pattern_colour], "top")
        elif person.top_pattern != "plain":
            canvas.pattern(self.top, person.top_pattern, COLOURS[person.pattern_colour])
        self.outer = self._coloured(person.outer_colour, "outer")
        self.lower = self.top if dress else self._coloured(person.lower_colour, "lower")
        self.shoes = self._coloured(person.shoes_colour, "shoes")
        self.sole = canvas.material((226, 226, 222), "shoes")
        self.shell = self.outer if person.outer != "none" else self.top  # what covers the torso
        puff = 0.0 if person.outer == "none" else 0.014
        hem = {"coat": 0.56, "jacket": 0.92, "vest": 0.95}.get(person.outer, 0.94)
        self.torso = self._trunk(puff, hem)

    def _coloured(self, colour: str, part: str) -> int:
        return 0 if colour == "none" else self.c.material(COLOURS[colour], part)

    def _trunk(self, puff: float, hem: float) -> Profile:
        t = self.thick + puff
        sections = [
            (1.475, 0.065 + puff, 0.06, -0.01), (1.43, self.shoulder * 0.86 + puff, t * 0.8, -0.01),
            (1.38, self.shoulder + puff, t, 0.0), (1.27, self.shoulder * 0.93 + puff, t * 1.06, 0.0),
            (1.08, self.waist + puff, t * (1.25 if self.p.build == "heavy" else 0.95), 0.01),
            (0.94, self.hip + puff * 1.5, t * 1.05, 0.0),
        ]  # fmt: skip
        if hem < 0.9:
            sections.append((hem, self.hip * 1.22 + puff, t * 1.3, 0.0))
        elif hem != 0.94:
            sections[-1] = (hem, *sections[-1][1:])
        return sections

    def draw(self) -> None:
        self._legs()
        self._trunk_and_clothes()
        self._arms()
        draw_head(self)
        draw_scarf(self)
        self._bag()

    def _legs(self) -> None:
        c, p = self.c, self.p
        bare = p.lower in ("shorts", "skirt") or p.top == "dress"
        for side in (1, -1):
            angle = radians(c.view.stride * side)
            hip = (side * self.hip * 0.55, 0.0, 0.88)
            knee = (side * self.hip * 0.52, sin(angle) * 0.40, 0.88 - cos(angle) * 0.40)
            bend = angle * (1.0 if angle > 0 else 1.9)
            ankle = (
                side * self.hip * 0.5,
                knee[1] + sin(bend) * 0.39 - 0.01,
                max(0.07, knee[2] - cos(bend) * 0.39),
            )
            depth = c.facing(knee[0], knee[1]) - 0.4  # all legs lie behind the hem of the top
            limb = self.skin if bare else self.lower
            wide = 1.0 if bare else (1.1 if p.lower == "jeans" else 1.22)
            g = 0.6 + 0.4 * self.girth
            c.limb(hip, knee, 0.082 * g, 0.058 * g * wide, limb, depth)
            c.limb(knee, ankle, 0.056 * g * wide, 0.036 * g * wide * wide, limb, depth)
            if p.lower == "jeans":  # a faded stripe down the thigh
                c.polygon(self._strip(hip, knee, 0.018), self.lower + 2, depth + 1e-3)
            if p.lower == "shorts":
                hem = tuple(h + (k - h) * 0.92 for h, k in zip(hip, knee, strict=True))
                c.limb(hip, hem, 0.088 * g, 0.082 * g, self.lower, depth + 2e-3)
            self._shoe(ankle, depth)
        if p.lower not in ("none", "skirt"):
            hips = [(1.02, self.waist, self.thick * 0.9, 0.0), (0.92, self.hip, self.thick, 0.0)]
            c.solid([*hips, (0.80, self.hip * 0.97, self.thick * 0.9, 0.0)], self.lower, -0.2)
        if p.lower == "skirt" or p.top == "dress":
            waist = (1.02, self.waist * 1.02, self.thick * 0.95, 0.0)
            hem = (0.56, self.hip * 1.36, self.thick * 1.55, 0.0)
            c.solid([waist, (0.90, self.hip * 1.03, self.thick * 1.1, 0.0), hem], self.lower, -0.2)

    def _strip(self, start: Sequence[float], end: Sequence[float], half: float) -> list[tuple[float, float]]:
        (ax, ay), (bx, by) = self.c.project(*start), self.c.project(*end)
        h = half * self.c.unit
        return [(ax - h, ay), (ax + h, ay), (bx + h, by), (bx - h, by)]

    def _shoe(self, ankle: Sequence[float], depth: float) -> None:
        c, p = self.c, self.p
        low = max(0.035, ankle[2] - 0.045)
        heel, toe = (ankle[0], ankle[1] - 0.03, low), (ankle[0] * 1.15, ankle[1] + 0.15, low - 0.005)
        c.limb(heel, toe, 0.05, 0.04, self.shoes, depth + 3e-3)
        if p.shoes == "boots":
            shaft = (ankle[0], ankle[1] * 0.8, ankle[2] + 0.20)
            c.limb(ankle, shaft, 0.05, 0.06, self.shoes, depth + 4e-3)
        if p.shoes == "sneakers":
            (hx, hy), (tx, ty) = c.project(*heel), c.project(*toe)
            r = 0.045 * c.unit
            left, right = min(hx, tx) - r, max(hx, tx) + r
            ground = max(hy, ty) + 0.8 * r
            sole = [
                (left, ground - 0.022 * c.unit),
                (right, ground - 0.022 * c.unit),
                (right, ground),
                (left, ground),
            ]
            c.polygon(sole, self.sole + 1, depth + 4e-3)

    def _trunk_and_clothes(self) -> None:
        c, p, torso = self.c, self.p, self.torso
        c.limb((0, 0, 1.42), (0, 0.01, 1.54), 0.055, 0.05, self.skin, -0.01)
        inner = self._trunk(0.0, 0.94)
        if p.top == "tank top" and p.outer == "none":
            c.solid(inner, self.skin, 0.0)
            low = [(1.36, self.shoulder * 0.8, self.thick, 0.0), *inner[3:]]
            c.solid(low, self.top, 1e-3)
            for side in (1, -1):
                for face in (0, 180):
                    mid = face + side * 32
                    c.patch(inner, 1.45, 1.33, mid - 11, mid + 11, self.top + 1, 2e-3)
        else:
            c.solid(torso, self.shell, 0.0)
        front = _TORSO
        if p.outer != "none":  # worn open: what is underneath shows in front
            c.patch(torso, 1.45, max(0.95, torso[-1][0]), -24, 24, self.top + 1, front - 6e-3)
            if p.outer == "coat" and p.top != "dress":
                c.patch(torso, 0.95, 0.57, -24, 24, self.lower + 1, front - 6e-3)
            if p.outer == "coat" and p.top == "dress":
                c.patch(torso, 0.95, 0.57, -24, 24, self.top + 1, front - 6e-3)
            for side in (1, -1):  # lapels
                c.patch(torso, 1.46, 1.25, side * 31 - 8, side * 31 + 8, self.outer + 2, front - 5e-3)
        if p.top == "shirt":
            c.patch(torso, 1.30 if p.outer != "none" else 1.44, 0.96, -2.5, 2.5, self.top, front - 4e-3)
            c.patch(torso, 1.475, 1.41, -40, 40, self.top + 2, front - 4e-3)
        if p.top in ("t-shirt", "dress", "tank top"):
            c.patch(torso, 1.475, 1.42, -28, 28, self.skin + 1, front - 4e-3)
        if p.top == "hoodie":
            hood = [(1.51, 0.05, 0.04, -0.075), (1.47, 0.115, 0.06, -0.075), (1.36, 0.09, 0.045, -0.10)]
            c.solid(hood, self.top, c.facing(0, -0.16))
            if p.outer == "none":
                c.patch(torso, 1.10, 0.99, -42, 42, self.top, front - 4e-3)
        if p.top_pattern == "logo":
            c.patch(torso, 1.33, 1.19, -26, 26, self.pattern + 1, front - 4e-3)
        if p.outer == "none" and p.top in ("sweater", "hoodie"):
            c.patch(torso, 0.975, 0.94, -180, 180, self.top, front - 4e-3)

    def _arms(self) -> None:
        c, p = self.c, self.p
        long_sleeves = p.outer in ("jacket", "coat") or p.top in ("shirt", "sweater", "hoodie")
        sleeve = self.outer if p.outer in ("jacket", "coat") else self.top
        g = 0.7 + 0.3 * self.girth
        wide = 1.22 if p.outer in ("jacket", "coat") else 1.08
        self.hands = {}
        for name, side in _SIDE.items():
            raised = p.held in ("phone", "cup", "book") and p.held_side == name
            out = radians(c.view.arms)
            swing = radians(14 if raised else -c.view.stride * side * 0.8)
            shoulder = (side * self.shoulder * 0.93, 0.0, 1.385)
            elbow = (
                shoulder[0] + side * sin(out) * 0.28,
                sin(swing) * 0.27,
                shoulder[2] - cos(swing) * cos(out) * 0.27,
            )
            if raised:
                hand = (side * self.shoulder * 0.55, elbow[1] + 0.15, elbow[2] + 0.09)
            else:
                lift = swing + 0.25
                hand = (
                    elbow[0] + side * sin(out) * 0.12,
                    elbow[1] + sin(lift) * 0.24,
                    elbow[2] - cos(lift) * 0.24,
                )
            self.hands[name] = hand
            depth = c.facing(elbow[0], elbow[1])
            near = depth if abs(c.facing(side, 0)) > 0.35 else depth + 0.02
            low = c.facing(hand[0], hand[1]) if raised else near
            upper_end = tuple(s + (e - s) * 0.62 for s, e in zip(shoulder, elbow, strict=True))
            if long_sleeves:
                c.limb(shoulder, elbow, 0.056 * g * wide, 0.048 * g * wide, sleeve, near)
                c.limb(elbow, hand, 0.047 * g * wide, 0.038 * wide, sleeve, low + 1e-3)
            else:
                c.limb(shoulder, elbow, 0.05 * g, 0.041 * g, self.skin, near)
                c.limb(elbow, hand, 0.040 * g, 0.032, self.skin, low + 1e-3)
                if p.top != "tank top":
                    c.limb(shoulder, upper_end, 0.057 * g, 0.055 * g, self.top, near + 1e-3)
            tip = tuple(h + (h - e) * 0.22 for h, e in zip(hand, elbow, strict=True))
            c.limb(hand, tip, 0.036, 0.032, self.skin, low + 2e-3)
            if p.held_side == name:
                self._held(tip, low + 4e-3)

    def _held(self, hand: Sequence[float], depth: float) -> None:
        c, p = self.c, self.p
        thing = c.material(COLOURS[p.held_colour], "held")
        left, forward, up = hand
        match p.held:
            case "phone":
                c.limb(
                    (left, forward + 0.02, up - 0.02),
                    (left, forward + 0.02, up + 0.09),
                    0.036,
                    0.036,
                    thing,
                    depth,
                )
            case "cup":
                c.limb((left, forward, up), (left, forward, up + 0.09), 0.038, 0.05, thing, depth)
                lid = c.material((226, 226, 222), "held")
                c.limb(
                    (left, forward, up + 0.10),
                    (left, forward, up + 0.115),
                    0.05,
                    0.045,
                    lid,
                    depth + 1e-3,
                )
            case "book":
                edges = ((-0.07, 0.0), (0.075, 0.05))
                corners = [(left + a, forward + b, up + h) for h in (-0.06, 0.13) for a, b in edges]
                order = (corners[0], corners[1], corners[3], corners[2])
                c.polygon([c.project(*corner) for corner in order], thing + 1, depth)
                foot, head = ((left - 0.07, forward, up + h) for h in (-0.06, 0.13))
                c.limb(foot, head, 0.014, 0.014, thing, depth + 1e-3)
            case "suitcase":
                side = _SIDE[p.held_side]
                across, behind = side * 0.25, -0.10
                box = [(across + a, behind + b) for a in (-0.10, 0.10) for b in (-0.06, 0.06)]
                self._box(box, 0.50, 0.06, thing, c.facing(across, behind) + 0.01)
                handle = c.material((40, 30, 30), "held")
                c.limb((across, behind, 0.5), hand, 0.01, 0.01, handle, c.facing(across, behind))

    def _box(
        self, footprint: Sequence[tuple[float, float]], top: float, bottom: float, material: int, depth: float
    ) -> None:
        """Add an upright box by the silhouette of its footprint, with a lighter lid and a darker edge."""
        c = self.c
        points = [c.project(a, b, u) for a, b in footprint for u in (top, bottom)]
        xs = sorted({x for x, _ in points})
        ys = [y for _, y in points]
        x0, x1, y0, y1 = xs[0], xs[-1], min(ys), max(ys)
        edge = 0.13 * (x1 - x0)
        c.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], material, depth)
        c.polygon([(x0 + edge, y0 + edge), (x1 - edge, y0 + edge), (x1 - edge, y1 - edge), (x0 + edge, y1 - edge)],
                  material + 1, depth + 1e-4)  # fmt: skip
        strip = y0 + 0.28 * (y1 - y0)
        c.polygon([(x0, strip), (x1, strip), (x1, strip + edge * 0.7), (x0, strip + edge * 0.7)],
                  material + 2, depth + 2e-4)  # fmt: skip

    def _bag(self) -> None:
        c, p = self.c, self.p
        if p.bag == "none":
            return
        cloth = c.material(COLOURS[p.bag_colour], "bag")
        if p.bag == "backpack":
            offset = -self.thick - 0.085
            pack = [(1.41, 0.07, 0.04, offset), (1.37, 0.135, 0.075, offset), (1.05, 0.145, 0.09, offset),
                    (1.01, 0.12, 0.07, offset)]  # fmt: skip
            c.solid(pack, cloth, c.facing(0, offset))
            c.patch(pack, 1.20, 1.05, 140, 220, cloth + 2, c.facing(0, offset) + 1e-3)
            for side in (1, -1):
                c.patch(self.torso, 1.46, 1.08, side * 42 - 9, side * 42 + 9, cloth + 1, 0.041)
        elif p.bag == "shoulder bag":
            side = _SIDE[p.bag_side]
            across, up = side * (self.hip + 0.075), 0.90
            for face in (1, -1):
                if c.facing(0, face) > -0.35:
                    start = (-side * self.shoulder * 0.55, face * self.thick * 0.9, 1.44)
                    end = (side * self.hip * 0.95, face * self.thick, 0.98)
                    c.limb(start, end, 0.016, 0.016, cloth, 0.042 if c.facing(0, face) > 0 else -0.005)
            footprint = [(across + a, 0.01 + b) for a in (-0.055, 0.055) for b in (-0.12, 0.12)]
            self._box(footprint, up + 0.09, up - 0.11, cloth, max(c.facing(across, 0.0), -0.15) + 0.05)
        else:
            left, forward, hand_up = self.hands[p.bag_side]
            depth = c.facing(left, forward) + 0.02
            top = hand_up - 0.13
            for b in (-0.07, 0.07):
                c.limb((left, forward, hand_up - 0.03), (left, forward + b, top), 0.012, 0.012, cloth, depth)
            footprint = [(left + a, forward + b) for a in (-0.06, 0.06) for b in (-0.125, 0.125)]
            self._box(footprint, top, top - 0.2, cloth, depth)


def _ball(centre: float, height: float, width: float, thick: float, low: int = -90) -> Profile:
    """Return an ellipsoid's sections from its top down to `low` degrees."""
    angles = [radians(a) for a in range(90, low - 1, -18)]
    return [(centre + height * sin(a), max(width * cos(a), 1e-3), max(thick * cos(a), 1e-3), 0.0) for a in angles]


def draw_head(figure: _Figure) -> None:
    """Add skull, face, hair, beard, glasses and headwear of a `figure._Figure`."""
    c, p = figure.c, figure.p
    skull = _ball(1.625, 0.135, 0.102, 0.115)
    style, front = p.hair_style, 0.05
    if style in ("long", "shoulder"):
        end = 1.22 if style == "long" else 1.42
        locks = [(1.72, 0.06, 0.05, -0.03), (1.66, 0.112, 0.07, -0.035), (1.52, 0.12, 0.06, -0.055),
                 (end, 0.115 if style == "long" else 0.105, 0.045, -0.085)]  # fmt: skip
        c.solid(locks, figure.hair, c.facing(0, -0.17 if c.facing(0, -1) > 0 else -0.05))
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


def _glasses(figure: _Figure, skull: Profile, depth: float) -> None:
    c = figure.c
    frame = c.material((24, 24, 26), "glasses")
    lens = frame if figure.p.glasses == "sunglasses" else c.material((205, 222, 235), "glasses")
    c.patch(skull, 1.65, 1.637, -86, 86, frame + 1, depth)
    for side in (1, -1):
        c.patch(skull, 1.662, 1.606, side * 27 - 23, side * 27 + 23, frame + 1, depth)
        c.patch(skull, 1.652, 1.616, side * 27 - 15, side * 27 + 15, lens + 1, depth + 1e-4)


def _headwear(figure: _Figure, depth: float) -> None:
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


def draw_scarf(figure: _Figure) -> None:
    """Add a scarf of a `figure._Figure`, if there is one."""
    c, p = figure.c, figure.p
    if p.scarf_colour == "none":
        return
    wool = c.material(COLOURS[p.scarf_colour], "scarf")
    loop = [(1.52, 0.085, 0.09, 0.0), (1.49, 0.105, 0.11, 0.0), (1.425, 0.10, 0.105, 0.0)]
    c.solid(loop, wool, 0.047)
    c.patch(figure.torso, 1.44, 1.17, 8, 34, wool + 1, 0.049)
