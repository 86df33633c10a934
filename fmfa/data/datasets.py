"""Open a data set by name: SimPEDES, made on first use, or a copy of a real one."""

from dataclasses import dataclass
from pathlib import Path

from fmfa.data.annotations import Dataset, read_dataset
from fmfa.errors import ConfigError
from fmfa.simpedes import DOMAINS, SCALES, generate, recipe

PROJECT = Path(__file__).parents[2]
REAL = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
SIMPEDES = "SimPEDES"


def open_dataset(name: str, root: str | Path = "", *, scale: str = "small", seed: int = 0) -> Dataset:
    """Open a data set.

    Args:
        name: `SimPEDES-street` or `SimPEDES-station`, one of the three real sets, or a name of your own.
        root: its folder or annotation file. SimPEDES without one lies under `data/simpedes/`, and is written
            there on first use.
        scale: of SimPEDES without a root: tiny, small, standard or large.
        seed: of SimPEDES without a root, and of the identities held out where a set has no validation split.

    Raises:
        ConfigError: a real or own data set without `root`, or an unknown SimPEDES domain or scale.
        AnnotationError: the files cannot be read as a data set.
    """
    if name.startswith(SIMPEDES) and not root:
        domain = name.removeprefix(SIMPEDES).removeprefix("-") or DOMAINS[0]
        if domain not in DOMAINS:
            known = " or ".join(f"{SIMPEDES}-{d}" for d in DOMAINS)
            raise ConfigError(f"no data set {name!r}; expected {known}, {', '.join(REAL)}, or a root of your own")
        wanted = recipe(scale, domain, seed)
        root = generate(PROJECT / "data" / "simpedes" / f"{domain}-{scale}-{seed}", wanted)
    if not root:
        raise ConfigError(
            f"data set {name!r} needs `root`, the folder that holds its annotation file and `imgs/`; "
            f"only {SIMPEDES} is made by the project itself"
        )
    return read_dataset(root, SIMPEDES if name.startswith(SIMPEDES) else name, seed=seed)


@dataclass(frozen=True)
class DataParameters:
    """Parameters of `notebooks/01_data.ipynb`, checked."""

    dataset: str
    root: str
    scale: str
    seed: int
    decode: bool

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        if self.scale not in SCALES:
            raise ConfigError(f"scale is {self.scale!r}; expected one of {', '.join(SCALES)}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more")
