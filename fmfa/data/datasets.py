"""Open a data set by name: SimPEDES, made on first use, or a copy of a real one."""

from pathlib import Path

from fmfa.data.annotations import SIMPEDES, Dataset, canonical_name, find_annotation, read_dataset
from fmfa.errors import ConfigError
from fmfa.files import PROJECT
from fmfa.simpedes.generate import DOMAINS, generate, recipe

DATA = PROJECT / "data"


def project_path(name: str) -> str:
    """`name`, or the file of that name below the project where it lies only there: notebooks start in other folders."""
    there = PROJECT / name
    return str(there) if name and not Path(name).exists() and there.is_file() else name


def which_dataset(name: str, root: str | Path = "") -> str:
    """The canonical name of a data set; without `name` what the file at `root` says, without either SimPEDES-street.

    Raises:
        ConfigError: no such name.
        AnnotationError: no file at `root`, or one of another data set than `name`.
    """
    if root:
        return find_annotation(root, name)[1]
    name = canonical_name(name)
    return f"{SIMPEDES}-{DOMAINS[0]}" if name in ("", SIMPEDES) else name


def open_dataset(
    name: str = "",
    root: str | Path = "",
    *,
    scale: str = "small",
    seed: int = 0,
    drop_empty_captions: bool = False,
) -> Dataset:
    """Open a data set.

    Args:
        name: `SimPEDES-street`, `-station` or `-night`, one of the three real sets, or a name of your own; see
            `which_dataset`.
        root: its folder or annotation file. SimPEDES without one lies under `data/simpedes/`, and is written
            there on first use.
        scale: of SimPEDES without a root: tiny, small, standard, large or wide.
        seed: of SimPEDES without a root, and of the identities held out where a set has no validation split.
        drop_empty_captions: leave captions without a word out, and pictures that have no other.

    Raises:
        ConfigError: a real or own data set without `root`, or an unknown SimPEDES domain or scale.
        AnnotationError: the files cannot be read as a data set, or are of another one than `name`.
    """
    name = which_dataset(name, root)
    if not root and name.startswith(SIMPEDES):
        domain = name.removeprefix(f"{SIMPEDES}-")
        root = generate(DATA / "simpedes" / f"{domain}-{scale}-{seed}", recipe(scale, domain, seed))
    if not root:
        raise ConfigError(
            f"data set {name!r} needs `root`, the folder that holds its annotation file and `imgs/`; "
            f"only {SIMPEDES} is made by the project itself"
        )
    return read_dataset(root, name, seed=seed, drop_empty_captions=drop_empty_captions)
