"""What a camera makes of a person: viewpoint, pose, background, light, blur, noise.

`render` is a pure function of (person, camera, seed). Every random number is drawn before or independently of the
person, and every step works on fixed neighbourhoods, so changing an attribute changes pixels near its part only.
Arithmetic that reaches a pixel is integer or plain IEEE, so the bytes do not depend on the processor.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fmfa.simpedes.canvas import PARTS, Canvas, View
from fmfa.simpedes.figure import draw_figure
from fmfa.simpedes.people import Person, pick

BASE_SIZE = (96, 32)  # (height, width) at which visibility is measured
SPREAD = 5  # pixels at 96 rows over which resolution loss and blur can carry a change
_SUPERSAMPLING = {96: 3, 128: 3}  # larger pictures need less


@dataclass(frozen=True)
class Camera:
    """One fixed camera. Angles in degrees, `blur` in pixels at 96 rows, `noise` in grey levels (standard deviation)."""

    name: str
    yaws: tuple[tuple[float, float], ...]  # (mean yaw, weight): which way people walk past it
    pitch: float
    resolution: float  # 1 is sharp, 0.6 was captured at 60 % of the rows and enlarged
    blur: float
    noise: float
    gain: float
    gamma: float
    cast: tuple[float, float, float]  # gains of red, green and blue
    wall: tuple[int, int, int]
    ground: tuple[int, int, int]
    horizon: float  # height of the wall's foot, as a fraction of the crop from the top
    occlusion: float = 0.12  # chance that something stands in front


_BOTH, _SIDES = ((0, 4), (180, 3), (35, 1), (-145, 1)), ((90, 3), (-90, 3), (45, 1.5), (-135, 1.5), (0, 1))
_MIXED = ((0, 2), (180, 2), (90, 1.5), (-90, 1.5), (45, 1), (-45, 1), (135, 1), (-135, 1))
CAMERAS = {
    "street": (
        Camera("street-0", _BOTH, 6, 1.0, 0.3, 4, 1.02, 1.0, (1.0, 1.0, 0.98), (168, 170, 166), (128, 126, 122), 0.42),
        Camera("street-1", _SIDES, 10, 0.85, 0.5, 6, 1.10, 0.95, (1.04, 1.0, 0.93), (190, 176, 150), (150, 140, 124), 0.5),
        Camera("street-2", _MIXED, 16, 0.75, 0.6, 7, 0.92, 1.05, (0.95, 1.0, 1.04), (112, 128, 112), (104, 104, 106), 0.3),
        Camera("street-3", _MIXED, 4, 0.9, 0.4, 5, 0.84, 1.10, (0.97, 1.0, 1.05), (134, 142, 156), (96, 98, 104), 0.55),
        Camera("street-4", _BOTH, 12, 0.7, 0.7, 9, 1.0, 1.0, (1.03, 1.0, 0.96), (156, 138, 120), (136, 132, 118), 0.36),
    ),
    "station": (
        Camera("station-0", _MIXED, 20, 0.7, 0.6, 8, 0.86, 1.06, (1.04, 1.0, 0.92), (176, 160, 128), (120, 108, 92), 0.25),
        Camera("station-1", _SIDES, 14, 0.65, 0.8, 8, 0.95, 1.0, (0.92, 1.03, 1.02), (170, 182, 180), (148, 152, 150), 0.4),
        Camera("station-2", _BOTH, 22, 0.6, 0.6, 11, 0.78, 1.1, (1.0, 1.0, 1.0), (96, 98, 102), (80, 80, 84), 0.22, 0.2),
        Camera("station-3", _MIXED, 9, 0.8, 0.9, 7, 1.12, 0.92, (1.0, 1.03, 0.95), (202, 204, 198), (176, 174, 166), 0.46),
    ),
    "night": (
        Camera("night-0", _MIXED, 38, 0.6, 0.8, 14, 0.66, 1.45, (1.25, 1.0, 0.62), (96, 92, 84), (84, 82, 78), 0.1),
        Camera("night-1", _MIXED, 46, 0.55, 0.7, 14, 0.62, 1.3, (0.78, 0.95, 1.28), (80, 84, 92), (72, 74, 80), 0.06),
        Camera("night-2", _BOTH, 30, 0.65, 0.9, 12, 0.72, 1.5, (1.1, 1.0, 0.85), (60, 60, 64), (60, 60, 62), 0.16, 0.2),
        Camera("night-3", _SIDES, 42, 0.7, 0.6, 16, 0.82, 1.6, (1.0, 1.0, 1.0), (110, 110, 110), (96, 96, 96), 0.08),
    ),
}  # fmt: skip
SEASONS = {"street": "warm", "station": "cold", "night": "cold"}


@dataclass(frozen=True)
class Rendering:
    """One picture and the truth about it."""

    image: np.ndarray  # uint8 [H, W, 3]
    parts: np.ndarray  # uint8 [H, W], positions in PARTS: what each pixel's centre shows
    samples: np.ndarray  # uint8 [S * H, S * W], the part that each sample of a pixel shows
    visible: dict[str, float]  # fraction of the crop that each part covers, measured at BASE_SIZE
    view: View
    occluder: str  # "none", "pole", "bench" or "bush"


def render(person: Person, camera: Camera, seed: list[int], size: tuple[int, int] = BASE_SIZE) -> Rendering:
    """Photograph a person.

    `seed` is anything `numpy.random.default_rng` takes; it fixes view, pose, background, light and noise. `size` is
    (height, width); the same seed at another size shows the same scene.
    """
    rng = np.random.default_rng(seed)
    view = draw_view(camera, rng)
    occluder = pick(rng, {"none": 1 - camera.occlusion, "pole": 0.4 * camera.occlusion,
                          "bench": 0.35 * camera.occlusion, "bush": 0.25 * camera.occlusion})  # fmt: skip
    place = rng.random(8)
    canvas, indices = _draw(person, view, size, occluder, place)
    base = indices if size == BASE_SIZE else _draw(person, view, BASE_SIZE, occluder, place)[1]
    step = canvas.supersampling
    samples = canvas.part_of[indices]
    parts = samples[step // 2 :: step, step // 2 :: step]
    canonical = samples if base is indices else canvas.part_of[base]
    covered = np.bincount(canonical.ravel(), minlength=len(PARTS)) / base.size
    background = draw_background(camera, view, size, rng)
    image = composite(canvas, indices, background)
    image = degrade(image, camera, rng)
    visible = dict(zip(PARTS, covered.round(6).tolist(), strict=True))
    return Rendering(image, parts, samples, visible, view, occluder)


def draw_view(camera: Camera, rng: np.random.Generator) -> View:
    """Draw viewpoint, pose and framing as this camera sees them."""
    yaw = float(pick(rng, {str(mean): weight for mean, weight in camera.yaws}))
    u = rng.random(8).tolist()
    return View(
        yaw=yaw + 40 * (u[0] - 0.5),
        pitch=camera.pitch + 6 * (u[1] - 0.5),
        stride=(17 * u[2] + 3) * (1 if u[3] < 0.5 else -1),
        arms=6 + 9 * u[4],
        shift_x=0.11 * (u[5] - 0.5),
        shift_u=0.09 * (u[6] - 0.4),
        scale=46 + 4 * (u[7] - 0.5),
        light=1 if camera.name[-1] in "024" else -1,
    )


def _draw(
    person: Person, view: View, size: tuple[int, int], occluder: str, place: np.ndarray
) -> tuple[Canvas, np.ndarray]:
    canvas = draw_figure(person, view, size, _SUPERSAMPLING.get(size[0], 2 if size[0] < 256 else 1))
    if occluder != "none":
        _add_occluder(canvas, occluder, place)
    return canvas, canvas.paint()


def _add_occluder(canvas: Canvas, kind: str, place: np.ndarray) -> None:
    rows, columns = (n * canvas.supersampling for n in canvas.size)
    grey = int(60 + 90 * place[0])
    colour = (40, 70 + int(40 * place[0]), 36) if kind == "bush" else (grey, grey - 4, grey - 10)
    paint = canvas.material(colour, "occluder")
    if kind == "pole":
        x, half = columns * (0.12 + 0.76 * place[1]), columns * (0.045 + 0.03 * place[2])
        for shade, right in ((0, 1.0), (1, 0.3)):
            canvas.polygon([(x - half, 0), (x + half * right, 0), (x + half * right, rows), (x - half, rows)],
                           paint + shade, 9 + shade)  # fmt: skip
    elif kind == "bench":
        top = rows * (0.80 + 0.1 * place[1])
        left, right = (0, columns * 0.7) if place[2] < 0.5 else (columns * 0.3, columns)
        for shade, y in ((1, top), (0, top + rows * 0.025)):
            canvas.polygon([(left, y), (right, y), (right, rows), (left, rows)], paint + shade, 9 + 1 - shade)
    else:
        x, r = columns * (0.0 if place[1] < 0.5 else 1.0), columns * (0.30 + 0.16 * place[2])
        for k in range(4):
            centre = (x + r * 0.5 * (place[3 + k] - 0.5), rows * (0.97 - 0.045 * k))
            ring = [(centre[0] + r * a, centre[1] + r * 0.8 * b) for a, b in _OCTAGON]
            canvas.polygon(ring, paint + k % 2, 9 + k)


_OCTAGON = [(1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7), (-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7)]


def draw_background(camera: Camera, view: View, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return wall, ground, clutter, now and then a passer-by, and the person's shadow: uint8 [H, W, 3]."""
    height, width = size
    draws = rng.random(64).tolist()
    shade = int(40 * (draws[0] - 0.5))
    image = Image.new("RGB", (width, height), tuple(c + shade for c in camera.wall))
    draw = ImageDraw.Draw(image)
    foot = height * (camera.horizon + 0.1 * (draws[1] - 0.5))
    for k in range(2 + int(4 * draws[2])):  # doors, windows, posters
        u = draws[8 + 6 * k : 14 + 6 * k]
        x, w, top = width * (1.3 * u[0] - 0.15), width * (0.08 + 0.4 * u[1]), foot * 0.9 * u[2]
        tint = tuple(int(c * (0.55 + 0.8 * v)) for c, v in zip(camera.wall, (u[3], 0.5 * u[3] + 0.5 * u[4], u[3])))
        draw.rectangle((x, top, x + w, foot), fill=tint)
    draw.rectangle((0, foot, width, height), fill=tuple(c - shade for c in camera.ground))
    if draws[3] < 0.35:  # a kerb or a line on the ground
        y = foot + (height - foot) * (0.15 + 0.6 * draws[4])
        draw.polygon([(0, y), (width, y + 0.04 * height), (width, y + 0.06 * height), (0, y + 0.03 * height)],
                     fill=tuple(min(255, c + 40) for c in camera.ground))  # fmt: skip
    if draws[5] < 0.12:
        _passer_by(draw, size, draws[50:60])
    x = width / 2 + view.shift_x * view.scale * height / 96
    y = 0.965 * height - view.shift_u * view.scale * height / 96
    draw.ellipse((x - 0.36 * width, y - 0.014 * height, x + 0.36 * width, y + 0.016 * height),
                 fill=tuple(int((c - shade) * 0.62) for c in camera.ground))  # fmt: skip
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.8 * height / 96)))


def _passer_by(draw: ImageDraw.ImageDraw, size: tuple[int, int], u: list[float]) -> None:
    height, width = size
    x, top = width * (0.04 if u[0] < 0.5 else 0.96), height * (0.12 + 0.1 * u[1])
    tall, half = height * (0.62 + 0.1 * u[2]), width * 0.13
    coat, legs = (tuple(int(30 + 180 * v) for v in u[k : k + 3]) for k in (3, 6))
    draw.rectangle((x - half * 0.7, top + 0.5 * tall, x + half * 0.7, top + tall), fill=legs)
    draw.rounded_rectangle((x - half, top + 0.15 * tall, x + half, top + 0.56 * tall), half * 0.5, fill=coat)
    draw.ellipse((x - half * 0.5, top, x + half * 0.5, top + 0.17 * tall), fill=(150, 112, 88))


def composite(canvas: Canvas, indices: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay a painted canvas over a background of the output size; returns uint8 [H, W, 3]."""
    rows, columns = indices.shape
    painted = np.take(canvas.palette.view(np.uint32)[:, 0], indices)  # four bytes per pixel in one look-up
    # "RGBX" averages four plain channels; "RGBA" would be multiplied by its alpha on the way.
    figure = Image.frombuffer("RGBX", (columns, rows), painted.tobytes(), "raw", "RGBX", 0, 1)
    if canvas.supersampling > 1:
        figure = figure.reduce(canvas.supersampling)
    pixels = np.asarray(figure).astype(np.uint16)
    return (pixels[..., :3] + background * (255 - pixels[..., 3:]) // 255).astype(np.uint8)


def degrade(image: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Apply resolution, blur, light, colour cast and noise of a camera to uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    u = rng.random(8).tolist()
    picture = Image.fromarray(image)
    resolution = camera.resolution * (0.88 + 0.12 * u[0])
    if resolution < 0.97:
        small = (max(8, round(width * resolution)), max(24, round(height * resolution)))
        picture = picture.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BILINEAR)
    picture = picture.filter(ImageFilter.GaussianBlur(camera.blur * (0.5 + u[1]) * height / 96))
    gain, gamma = camera.gain * (0.88 + 0.24 * u[2]), camera.gamma * (0.94 + 0.12 * u[3])
    grey = [255 * (v / 255) ** gamma * gain for v in range(256)]
    table = [
        min(255, int(level * cast * tint + 0.5))
        for cast, tint in zip(camera.cast, (0.97 + 0.06 * jitter for jitter in u[4:7]), strict=True)
        for level in grey
    ]
    pixels = np.asarray(picture.point(table)).astype(np.int32)
    # Four bytes add up to something close to a normal variable of standard deviation 147.8, exactly the same everywhere.
    bytes_ = rng.integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    noise = bytes_.sum(axis=0, dtype=np.int32) - 510
    return np.clip(pixels + (noise * int(camera.noise * 64)) // (148 * 64), 0, 255).astype(np.uint8)
