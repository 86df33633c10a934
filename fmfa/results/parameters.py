"""Parameters of the notebooks that evaluate a run and compare the runs of a folder, checked."""

from dataclasses import dataclass, fields
from pathlib import Path

from fmfa.errors import ConfigError
from fmfa.results.files import row_and_seed
from fmfa.simpedes import SCALES

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ModelParameters:
    """What a notebook can say of the model of a weight file that does not record it; "" and 0 are not said."""

    vocabulary: str
    backbone: str
    image_height: int
    image_width: int
    stride: int
    position_grid: str

    @property
    def model(self) -> dict[str, str | int]:
        """The parameters of `fmfa.systems.load_system` that describe a model."""
        return {parameter.name: getattr(self, parameter.name) for parameter in fields(ModelParameters)}


@dataclass(frozen=True)
class EvaluateParameters(ModelParameters):
    """Parameters of `notebooks/03_evaluate.ipynb`, checked."""

    run: str
    dataset: str
    root: str
    scale: str
    data_seed: int
    split: str
    sentence: str
    folder: str
    queries: int
    phrases: int
    counterfactuals: int
    device: str
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        if self.phrases < 0:
            raise ConfigError(f"phrases is {self.phrases}; expected 0 (none) or more")
        if self.counterfactuals < 0:
            raise ConfigError(f"counterfactuals is {self.counterfactuals}; expected 0 (none) or more")
        _require_data(self)
        if not 1 <= self.queries <= 20:
            raise ConfigError(f"queries is {self.queries}; expected 1 to 20 pictures a grid")


@dataclass(frozen=True)
class CompareParameters:
    """Parameters of `notebooks/04_ablation.ipynb`, checked."""

    results: str
    baseline: str
    tuning: str
    away: list
    split: str
    seed: int

    def __post_init__(self) -> None:
        """Check that there are the results folders, and runs of the baseline row in the first; raises ConfigError."""
        for folder in (self.results, *self.away):
            _require_results(folder)
        rows = sorted({row_and_seed(path.parent.name)[0] for path in Path(self.results).glob("*/run.json")})
        if self.baseline not in rows:
            raise ConfigError(f"baseline is {self.baseline!r}; {self.results} has runs of the rows {', '.join(rows)}")


@dataclass(frozen=True)
class VisualiseParameters(ModelParameters):
    """Parameters of `notebooks/05_visualise.ipynb`, checked."""

    runs: list
    dataset: str
    root: str
    scale: str
    data_seed: int
    split: str
    phrases: int
    positions: list
    queries: int
    results: str
    device: str
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        _require_data(self)
        if not 1 <= self.phrases <= 12:
            raise ConfigError(f"phrases is {self.phrases}; expected 1 to 12, a column of pictures each")
        if not 1 <= self.queries <= 20:
            raise ConfigError(f"queries is {self.queries}; expected 1 to 20, a figure each")
        if self.results:
            _require_results(self.results)


def _require_data(chosen: EvaluateParameters | VisualiseParameters) -> None:
    if chosen.split not in _SPLITS:
        raise ConfigError(f"split is {chosen.split!r}; expected one of {', '.join(_SPLITS)}")
    if chosen.scale not in ("", *SCALES):
        raise ConfigError(f"scale is {chosen.scale!r}; expected one of {', '.join(SCALES)}, or empty for the run's")
    if chosen.data_seed < -1:
        raise ConfigError(f"data_seed is {chosen.data_seed}; expected 0 or more, or -1 for the run's")


def _require_results(folder: str) -> None:
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is no folder; expected one with a folder a run, as `make study` writes")
