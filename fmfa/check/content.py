"""Looking at the table of a data set: captions, identities, and counts against the published ones."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from fmfa.check.report import Finding, finding

if TYPE_CHECKING:
    from fmfa.text.tokens import Tokenizer

SPLITS = ("train", "val", "test")
OLDER = "RSTPReid, older split"
PUBLISHED = {
    ("CUHK-PEDES", "train"): (11003, 34054, 68126),
    ("CUHK-PEDES", "val"): (1000, 3078, 6158),
    ("CUHK-PEDES", "test"): (1000, 3074, 6156),
    ("ICFG-PEDES", "train"): (3102, 34674, 34674),
    ("ICFG-PEDES", "test"): (1000, 19848, 19848),
    ("RSTPReid", "train"): (3701, 18505, 37010),
    ("RSTPReid", "val"): (200, 1000, 2000),
    ("RSTPReid", "test"): (200, 1000, 2000),
    (OLDER, "train"): (3901, 19505, 39010),
    (OLDER, "val"): (100, 500, 1000),
    (OLDER, "test"): (100, 500, 1000),
}
"""Identities, images, captions by split, as the owners publish them.

CUHK-PEDES: Li et al., CVPR 2017. ICFG-PEDES: Ding et al., arXiv 2107.12666 (one caption an image). RSTPReid:
Zhu et al., ACM MM 2021 (five images per identity, two captions per image); the older split follows likewise.
"""


def check_captions(table: pd.DataFrame, tokenizer: "Tokenizer") -> Iterator[Finding]:
    """Yield findings on captions: without a word, cut by the tokenizer's context, shared between identities."""
    empty = ~table["caption"].str.contains(r"\w")
    yield finding(
        "empty captions",
        "fatal",
        _places(table[empty]),
        f"all {len(table):,} captions have words",
        "Write them, or leave them out: -p drop_empty_captions true, in python -m fmfa.check --drop-empty-captions",
    )
    lengths = pd.Series({caption: tokenizer.length(caption) for caption in table["caption"].unique()})
    context = f"the {tokenizer.context_length} positions that the tokenizer has"
    cut = table["caption"].map(lengths) > tokenizer.context_length
    yield finding(
        "captions longer than the context",
        "warning",
        _places(table[cut]),
        f"none needs more than {context}, the longest {lengths.max()}",
        f"They need more than {context}, so their ends are not read; the longest needs {lengths.max()}",
    )
    text = table["caption"].str.strip()
    identities = table[~empty].groupby(text[~empty])["identity"].nunique()
    copied = identities.index[identities > 1]
    yield finding(
        "captions copied onto other identities",
        "warning",
        _places(table[text.isin(copied)]),
        "no text stands at two identities",
        f"{len(copied):,} different texts; a query that fits two people counts one of them as wrong",
    )


def check_identities(table: pd.DataFrame) -> Iterator[Finding]:
    """Yield findings on identities and images that stand where they should not."""
    for things, column in (("identities", "identity"), ("images", "image")):
        pairs = table[[column, "split"]].drop_duplicates()
        pairs = pairs[pairs[column].duplicated(keep=False)]
        splits = pairs.groupby(column)["split"].agg(list)
        leak = any({"train", "test"} <= set(names) for names in splits)
        yield finding(
            f"{things} in two splits",
            "fatal" if leak else "warning",
            (f"{thing} ({', '.join(names)})" for thing, names in splits.items()),
            "none",
            "No model may be tested on what it was trained on" if leak else "",
        )
    names = table[["image", "identity"]].drop_duplicates()
    names = names[names["image"].duplicated(keep=False)].groupby("image")["identity"].agg(list)
    yield finding(
        "images named by two identities",
        "fatal",
        (f"{image} ({', '.join(map(str, identities))})" for image, identities in names.items()),
        "none",
        "List each picture for the one person whom it shows",
    )


def check_counts(name: str, table: pd.DataFrame) -> Iterator[Finding]:
    """Yield the counts of each split beside the published ones, and which RSTPReid split this is.

    Held-out validation identities count with train, as published; they have a row of their own as well.
    """
    held_out = table["held_out"] if "held_out" in table else pd.Series(False, index=table.index)
    split = table["split"].mask(held_out, "train")
    counts = {split: _counts(part) for split, part in table.groupby(split)}
    if name == "RSTPReid":
        name, version = _rstpreid_version(counts)
        yield version
    for split in SPLITS:
        found, published = counts.get(split), PUBLISHED.get((name, split))
        if found:
            beside = "; as published" if found == published else f"; published are {_spoken(published)}"
            severity = "ok" if found == published else "warning"
            if published is None:
                beside, severity = "; no published counts to compare with", "note"
            yield f"counts of {split}", severity, found[2], _spoken(found) + beside
        elif published or not held_out.any():
            beside = f"; published are {_spoken(published)}" if published else ""
            yield f"counts of {split}", "warning", 0, f"there is no {split} split{beside}"
    if held_out.any():
        found = _counts(table[held_out])
        yield (
            "counts of val",
            "note",
            found[2],
            f"{_spoken(found)}, held out of train and counted there as well",
        )


def _places(rows: pd.DataFrame) -> list[str]:
    return [f"{image} (record {record})" for image, record in zip(rows["image"], rows["record"])]


def _counts(part: pd.DataFrame) -> tuple[int, int, int]:
    return part["identity"].nunique(), part["image"].nunique(), len(part)


def _spoken(counts: tuple[int, int, int] | None) -> str:
    return "{:,} identities, {:,} images, {:,} captions".format(*counts) if counts else "none"


def _rstpreid_version(counts: dict[str, tuple[int, int, int]]) -> tuple[str, Finding]:
    check = "RSTPReid split version"
    found = tuple(counts.get(split, (0,))[0] for split in SPLITS)
    shown = " / ".join(map(str, found))
    for name, words in (("RSTPReid", "the usual split"), (OLDER, "the older split; results do not compare")):
        if found == tuple(PUBLISHED[name, split][0] for split in SPLITS):
            return name, (check, "note", 0, f"{shown} identities: {words}")
    known = "3701 / 200 / 200 or the older 3901 / 100 / 100"
    return "RSTPReid", (check, "warning", 1, f"{shown} identities, expected {known}")
