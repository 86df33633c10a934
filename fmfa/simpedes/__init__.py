"""SimPEDES: a rendered pedestrian benchmark whose every pixel and phrase is accounted for."""

from .camera import CAMERAS, render
from .canvas import PARTS
from .captions import STYLES, describe
from .generate import DOMAINS, SCALES, Recipe, generate, recipe
from .people import Person, change, draw_person, population
from .truth import is_simpedes, read_dataset_record, read_parts, read_truth

__all__ = [
    "CAMERAS", "DOMAINS", "PARTS", "SCALES", "STYLES", "Person", "Recipe", "change", "describe", "draw_person",
    "generate", "is_simpedes", "population", "read_dataset_record", "read_parts", "read_truth", "recipe", "render",
]  # fmt: skip
