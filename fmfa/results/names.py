"""Under which names the files of an evaluation lie in a run folder."""

import re
from pathlib import Path

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import which_dataset
from fmfa.records import RECORD, read_record


def trained_on(folder: str | Path) -> str:
    """Name the data set that a run was trained on, by its record; "" where there is none."""
    name = read_record(folder).get("config", {}).get("dataset", "")
    return which_dataset(name) if name else ""


def results_split(folder: str | Path, dataset: Dataset, split: str) -> str:
    """Name a split in the files of a run's folder: "test", or "test@SimPEDES-station" on another data set than its own.

    So a cross-domain evaluation never takes the place of the run's own, and tables read it as a split of that name.
    A folder whose record is a link to a run elsewhere holds one evaluation, and keeps the plain name.
    """
    own, name = trained_on(folder), dataset.name
    if not own or own == name or (Path(folder) / RECORD).is_symlink():
        return split
    return f"{split}@{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
