"""The data check that comes before everything else, also as `python -m fmfa.check ROOT [--name ...]`."""

from typing import TYPE_CHECKING

from fmfa.check.content import check_captions, check_counts, check_identities
from fmfa.check.pictures import check_pictures
from fmfa.check.report import CheckReport, collect
from fmfa.data.annotations import Dataset
from fmfa.errors import ConfigError

if TYPE_CHECKING:  # It brings torch, which the processes that decode pictures have no use for.
    from fmfa.text.tokens import Tokenizer

__all__ = ["CheckReport", "check_dataset"]


def check_dataset(
    dataset: Dataset,
    *,
    context_length: int = 77,
    tokenizer: "Tokenizer | None" = None,
    decode: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> CheckReport:
    """Check pictures, captions, identities and counts of a data set; every check gives a row, passed or not.

    Args:
        dataset: what `read_dataset` returned.
        context_length: positions of the text encoder, start and end included. Words are counted against it,
            so that only captions which are too long for any tokenizer are found.
        tokenizer: finds all captions that it would cut, at its own context length.
        decode: decode every picture in full, and compare them. Without it only the presence of the files is looked
            at, and notes say so.
        workers: processes that decode; None for one a processor.
        progress: show a progress bar.

    Fatal are: a missing image folder, missing or unreadable pictures, links out of the folder, empty
    captions, a picture listed for two people, and identities or images shared between train and test. Copies of a
    picture under other names are found by their pixels and are warnings.

    Raises:
        ConfigError: `workers` or `context_length` is not positive.
        ImageError: a decoding process died.
    """
    for name, value in (("workers", workers), ("context_length", context_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
    table = dataset.table
    return collect(
        dataset.name,
        [
            *check_pictures(dataset.images, table, decode, workers, progress),
            *check_captions(table, context_length, tokenizer),
            *check_identities(table),
            *check_counts(dataset.name, table),
            *(("reading", "note", 0, note) for note in dataset.notes),
        ],
    )
