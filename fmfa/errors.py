"""The errors that users are meant to read: what was found, what was expected, what to do."""

import re


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
