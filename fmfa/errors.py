"""The errors that users are meant to read: what was found, what was expected, what to do."""

import re
import reprlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")
_SENTENCES = {
    "missing": "missing",
    "unexpected_keyword_argument": "unknown name",
    "extra_forbidden": "unknown name",
    "string_pattern_mismatch": "only letters, digits and _ . = + - make a name",
}


class FmfaError(ValueError):
    """Base of every error that the package raises on purpose."""

    def __init__(self, message: str = "") -> None:
        """The message is one sentence also of an error in a loader's process, which torch quotes in a traceback."""
        super().__init__(re.sub(r"(?s)^Caught \w+ in DataLoader.*\n[\w.]+Error: (.*)\n$", r"\1", message))


class AnnotationError(FmfaError):
    """An annotation file cannot be read as one of the supported data sets."""


class ImageError(FmfaError):
    """A picture is missing, damaged, too large, or lies outside the image folder."""


class CheckpointError(FmfaError):
    """A weight file does not fit the model, or is not a weight file."""


class ConfigError(FmfaError):
    """A parameter is unknown, of the wrong type or outside its range."""


class TrainingError(FmfaError):
    """Training cannot start or go on (fatal data check, non-finite loss, unfitting resume)."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def checked(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose values have their declared types, an int also where a float is declared.

    Limits are given as pydantic takes them. A value that does not fit is a ConfigError of one sentence; errors that
    the class' `__post_init__` raises for users come through as they are.
    """
    settings = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    made: Any = dataclass(frozen=True, config=settings)(cls)
    check: Callable[..., None] = made.__init__

    def build(self: Any, *values: Any, **named: Any) -> None:
        try:
            check(self, *values, **named)
        except ValidationError as error:
            own = error.errors()[0].get("ctx", {}).get("error")
            raise own if isinstance(own, FmfaError) else ConfigError(told(error)) from None

    made.__init__ = build
    return made


def setting(default: Any, help_text: str, **limits: Any) -> Any:
    """A field of a `checked` class, with its help and its limits as pydantic takes them."""
    return Field(default, description=help_text, **limits)


def told(error: ValidationError) -> str:
    """One sentence for the first thing that pydantic finds wrong: the place, what it should be, what was found."""
    first, *others = error.errors(include_url=False)
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    sentence = f"{place}: {_SENTENCES.get(first['type'], message)}"
    if not sentence.endswith((": missing", ": unknown name")):
        sentence += f", found {reprlib.repr(first['input'])}"
    if first["type"] == "literal_error":
        choices = re.findall("'(.*?)'", first["ctx"]["expected"])
        sentence += f"; {nearest(first['input'], choices)}".rstrip("; ")
    return sentence + (f" (and {len(others)} more)" if others else "")


def nearest(word: Any, names: Iterable[str]) -> str:
    """The hint `did you mean NAME? ` with the known name that is most like a word; empty if none is."""
    near = get_close_matches(str(word), names, n=1)
    return f"did you mean {near[0]}? " if near else ""
