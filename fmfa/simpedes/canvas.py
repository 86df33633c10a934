"""A painter of simple solids: projects body parts to polygons and fills them, nearest last.

Body coordinates, in metres: `l` to the person's own left, `f` forward, `u` up from the ground. Everything is
drawn once, into a canvas of palette indices; colours and part labels are then two look-up tables over the same
canvas. That is what makes a change of colour leave all other pixels alone, and part maps exact.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin, sqrt

import numpy as np
from PIL import Image, ImageDraw

PARTS = (
    "background", "occluder", "skin", "hair", "headwear", "glasses", "scarf", "top", "outer", "dress", "lower",
    "shoes", "bag", "held",
)  # fmt: skip
SHADES = 3  # in shadow, lit, highlight
_SHADE_GAIN = ((0.72, 0), (1.0, 0), (1.08, 10))
_ROUND = [(cos(radians(a)), sin(radians(a))) for a in range(-90, 91, 30)]
Profile = list[tuple[float, float, float, float]]  # (u, half-width along l, half-depth along f, offset along f)


@dataclass(frozen=True)
class View:
    """Where the camera stands and how the person moves; angles in degrees, lengths in metres.

    `yaw` 0 is a front view, 90 shows the person's right side (facing image right), 180 the back. `shift_x` and
    `shift_u` move the person in the crop, `scale` is pixels a metre at 96 rows. `light` is -1 or 1, the lit side.
    """

    yaw: float = 0.0
    pitch: float = 8.0
    stride: float = 0.0  # swing of the legs, signed: which leg is in front
    arms: float = 8.0  # how far the arms hang from the body
    shift_x: float = 0.0
    shift_u: float = 0.0
    scale: float = 46.0
    light: int = 1


class Canvas:
    """Collects polygons with depths, then paints them; `size` is (height, width) of the picture in pixels."""

    def __init__(self, view: View, size: tuple[int, int], supersampling: int):
        self.view, self.size, self.supersampling = view, size, supersampling
        self._cos, self._sin = cos(radians(view.yaw)), sin(radians(view.yaw))
        self._pitch_cos, self._pitch_sin = cos(radians(view.pitch)), sin(radians(view.pitch))
        rows, columns = size[0] * supersampling, size[1] * supersampling
        self.unit = view.scale * rows / 96  # canvas pixels a metre
        self._x0 = columns / 2 + view.shift_x * self.unit
        self._y0 = 0.955 * rows - view.shift_u * self.unit
        self.palette = np.zeros((256, 4), np.uint8)  # RGB and an opaque mark; index 0 is transparent
        self.part_of = np.zeros(256, np.uint8)
        self._patterned = np.arange(256, dtype=np.uint8)
        self._pattern_kind = ""
        self._next = 1
        self._polygons: list[tuple[float, int, list[tuple[float, float]], int]] = []

    def material(self, rgb: tuple[int, int, int], part: str) -> int:
        """Register a colour of a part and return its first index; the shades follow."""
        first = self._next
        for shade, (gain, lift) in enumerate(_SHADE_GAIN):
            self.palette[first + shade] = (*(min(255, int(c * gain + lift)) for c in rgb), 255)
            self.part_of[first + shade] = PARTS.index(part)
        self._next += SHADES
        return first

    def pattern(self, base: int, kind: str, rgb: tuple[int, int, int]) -> None:
        """Lay a pattern ("striped", "checked" or "dotted") in another colour over a material."""
        over = self.material(rgb, PARTS[self.part_of[base]])
        self._patterned[base : base + SHADES] = range(over, over + SHADES)
        self._pattern_kind = kind

    def facing(self, left: float, forward: float) -> float:
        """Return how near to the camera a body point is, in metres (negative: behind the person's axis)."""
        return self._cos * forward - self._sin * left

    def project(self, left: float, forward: float, up: float) -> tuple[float, float]:
        """Return canvas coordinates of a body point (orthographic)."""
        across = self._cos * left + self._sin * forward
        height = up * self._pitch_cos - self.facing(left, forward) * self._pitch_sin
        return self._x0 + across * self.unit, self._y0 - height * self.unit

    def polygon(self, points: list[tuple[float, float]], index: int, depth: float) -> None:
        """Add a filled polygon in canvas coordinates."""
        self._polygons.append((depth, len(self._polygons), points, index))

    def limb(
        self,
        start: Sequence[float],
        end: Sequence[float],
        radius_start: float,
        radius_end: float,
        material: int,
        depth: float,
    ) -> None:
        """Add a tapered, shaded capsule between two body points."""
        (ax, ay), (bx, by) = self.project(*start), self.project(*end)
        dx, dy = bx - ax, by - ay
        length = sqrt(dx * dx + dy * dy) or 1.0
        dx, dy = dx / length, dy / length
        for shade, shrink, move in ((0, 1.0, 0.0), (1, 0.78, 0.22)):
            ra, rb = radius_start * self.unit * shrink, radius_end * self.unit * shrink
            oa, ob = (r * move * self.view.light for r in (ra, rb))
            end_cap = [(bx + ob + rb * (c * dx - s * dy), by + rb * (c * dy + s * dx)) for c, s in _ROUND]
            start_cap = [(ax + oa - ra * (c * dx - s * dy), ay - ra * (c * dy + s * dx)) for c, s in _ROUND]
            self.polygon(end_cap + start_cap, material + shade, depth)

    def solid(self, profile: Profile, material: int, depth: float) -> None:
        """Add the silhouette of a stack of elliptic cross-sections, listed from top to bottom."""
        levels = []
        for up, width, thick, offset in profile:
            half = sqrt((width * self._cos) ** 2 + (thick * self._sin) ** 2) * self.unit
            levels.append((*self.project(0.0, offset, up), half))
        for shade, shrink, move in ((0, 1.0, 0.0), (1, 0.84, 0.14)):
            right = [(x + h * (shrink + move * self.view.light), y) for x, y, h in levels]
            left = [(x - h * (shrink - move * self.view.light), y) for x, y, h in reversed(levels)]
            self.polygon(right + left, material + shade, depth)

    def patch(
        self, profile: Profile, top: float, bottom: float, start: float, end: float, index: int, depth: float
    ) -> None:
        """Add the visible part of a surface patch of a solid.

        It spans heights `top` to `bottom` and angles `start` to `end` in degrees around the solid (0 is the front,
        positive towards the person's left); whatever lies on the far side is cut off.
        """
        first = (start + self.view.yaw + 180) % 360 - 180  # angle from the line of sight
        for turn in (0, -360):
            seen = max(-88.0, first + turn), min(88.0, first + turn + end - start)
            if seen[1] - seen[0] < 1.0:
                continue
            angles = [radians(a - self.view.yaw) for a in seen]
            edges: tuple[list, list] = ([], [])
            for step in range(4):
                up = top + (bottom - top) * step / 3
                width, thick, offset = _section(profile, up)
                for edge, angle in zip(edges, angles, strict=True):
                    edge.append(self.project(width * sin(angle), thick * cos(angle) + offset, up))
            self.polygon(edges[0] + edges[1][::-1], index, depth)

    def paint(self) -> np.ndarray:
        """Return the index canvas, uint8 [rows, columns] at the supersampled resolution."""
        image = Image.new("L", (self.size[1] * self.supersampling, self.size[0] * self.supersampling))
        draw = ImageDraw.Draw(image)
        for _, _, points, index in sorted(self._polygons, key=lambda p: (p[0], p[1])):
            draw.polygon(points, fill=index)
        canvas = np.array(image)
        if self._pattern_kind:
            rows, columns = canvas.shape
            y, x = np.arange(rows)[:, None], np.arange(columns)[None, :]
            step = max(
                2,
                round({"striped": 0.055, "checked": 0.033, "dotted": 0.026}[self._pattern_kind] * self.unit),
            )
            ys, xs = y // step, x // step
            grid = {
                "striped": ys % 2 == 0,
                "checked": (ys % 3 == 0) | (xs % 3 == 0),
                "dotted": ((ys + 2 * (xs // 3 % 2)) % 4 == 0) & (xs % 3 == 0),
            }[self._pattern_kind]
            canvas = np.where(grid, self._patterned[canvas], canvas)
        return canvas


def _section(profile: Profile, up: float) -> tuple[float, float, float]:
    for (u0, *a), (u1, *b) in itertools.pairwise(profile):
        if u1 <= up <= u0:
            t = (u0 - up) / (u0 - u1)
            width, thick, offset = (p + (q - p) * t for p, q in zip(a, b, strict=True))
            return width, thick, offset
    return profile[0][1:] if up > profile[0][0] else profile[-1][1:]
