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
    tokenizer: "Tokenizer | None" = None,
    decode: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> CheckReport:
    """Check pictures, captions, identities and counts of a data set; every check gives a row, passed or not.

    Args:
        dataset: what `read_dataset` returned.
        tokenizer: whose tokens and context decide which captions are cut; None for CLIP's, on SimPEDES the one of the
            tiny CLIP.
        decode: decode every picture in full, and compare them. Without it only the presence of the files is looked
            at, and notes say so.
        workers: processes that decode; None for one a processor.
        progress: show a progress bar.

    Fatal are: a missing image folder, missing or unreadable pictures, empty captions, a picture listed for two people,
    and identities or images shared between train and test. Copies of a picture under other names are found by their
    pixels and are warnings; links that lead out of the folder are followed and noted.

    Raises:
        ConfigError: `workers` is not positive.
        ImageError: a decoding process died.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; expected 1 or more")
    table = dataset.table
    return collect(
        dataset.name,
        [
            *check_pictures(dataset.images, table, decode, workers, progress),
            *check_captions(table, tokenizer or _usual_tokenizer(dataset)),
            *check_identities(table),
            *check_counts(dataset.name, table),
            *(("reading", "note", 0, note) for note in dataset.notes),
        ],
    )


def _usual_tokenizer(dataset: Dataset) -> "Tokenizer":
    from fmfa.text.tokens import clip_tokenizer, small_tokenizer

    return small_tokenizer() if dataset.name.startswith("SimPEDES") else clip_tokenizer()
