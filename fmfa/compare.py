"""Compare scored systems: `python -m fmfa.compare A.record B.record ...`, records of `python -m fmfa.score`.

Every pair is tested over the identities of the split, and over seeds where both systems have several records of one
name. p values are corrected by Holm's method over all pairs. A system's rank is 1 plus the number of systems that are
shown to be better, so that systems which cannot be told apart from the best share its rank; its interval ends at the
rank that it would have behind all systems that are not shown to be worse.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.errors import ConfigError, FmfaError
from fmfa.evaluation.score_record import ScoreRecord, read_record
from fmfa.evaluation.statistics import RowComparison, compare_rows, hierarchical_interval, holm
from fmfa.files import said_plainly, whole_file
from fmfa.plots.comparison import plot_ranking
from fmfa.plots.data import use_style
from fmfa.study.levels import readable, shown
from fmfa.study.results import METRICS

ALPHA = 0.05


def group_records(records: Mapping[str, ScoreRecord]) -> dict[str, list[ScoreRecord]]:
    """Records of the same split by system, in order of their seeds.

    Args:
        records: by the file that each is from.

    Raises:
        ConfigError: their splits differ, two records are of the same system and seed, or there is one system.
    """
    systems: dict[str, list[ScoreRecord]] = {}
    first_path, first = next(iter(records.items()))
    people = first.queries.by_identity()[["identity", "queries"]]
    for path, record in records.items():
        if record.split.fingerprint != first.split.fingerprint:
            raise ConfigError(f"{path} and {first_path} are of different splits: {_difference(record, first)}")
        own = record.queries.by_identity()[["identity", "queries"]]
        if own["queries"].sum() != record.split.captions or not np.array_equal(own, people):
            raise ConfigError(
                f"{path}: its {own['queries'].sum():,} queries are not those of its split; score it again"
            )
        if record.seed in [other.seed for other in systems.get(record.system, ())]:
            raise ConfigError(f"{path}: {record.system} with seed {record.seed} is there twice; give it another --name")
        systems.setdefault(record.system, []).append(record)
    if len(systems) < 2:
        raise ConfigError(f"found records of {', '.join(systems)} alone; expected two systems or more")
    return {name: sorted(found, key=lambda record: record.seed) for name, found in systems.items()}


def _difference(first: ScoreRecord, second: ScoreRecord) -> str:
    one, other = first.split, second.split
    sizes = [
        f"{s.version or s.dataset} {s.split} ({s.images:,} pictures, {s.captions:,} captions)" for s in (one, other)
    ]
    if one.pictures == other.pictures:
        return f"{sizes[0]}, the same pictures with other captions; score both on one annotation file"
    same = " with other pictures or identities" if sizes[0] == sizes[1] else f" and {sizes[1]}"
    return f"{sizes[0]}{same}; scores on them do not compare"


def compare_systems(
    systems: Mapping[str, Sequence[ScoreRecord]], metric: str = "R@1", margin: float = 1.0, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank systems and compare each pair of them.

    Args:
        systems: as `group_records` gives them.
        metric: that is tested: R@1, R@5, R@10, mAP or mINP.
        margin: points within which two systems are equivalent.
        seed: of bootstrap and permutations.

    Returns:
        Two tables. One row per system, best first: `rank` to `last rank`, `system`, `seeds`, each metric in percent
        and the tested one with `low` and `high`, `cost`, `selected`. One row per pair: `first`, `second`, `difference`,
        `low`, `high` (points, 95 %), `p` (of no difference) and `p equivalent` (of a difference of at least the
        margin), both corrected, and `verdict`.
    """
    tables = {name: [record.queries.by_identity() for record in found] for name, found in systems.items()}
    counts = next(iter(tables.values()))[0]["queries"].to_numpy()
    identity = np.repeat(np.arange(len(counts)), counts)
    values = {
        name: {m: np.stack([np.repeat(t[m].to_numpy() / counts, counts) for t in found]) for m in METRICS}
        for name, found in tables.items()
    }
    pairs = list(combinations(systems, 2))
    found = [_compared(values[a][metric], values[b][metric], identity, seed) for a, b in pairs]
    table = pd.DataFrame(pairs, columns=["first", "second"])
    for name in ("estimate", "low", "high"):
        table[name.replace("estimate", "difference")] = [100 * getattr(one.difference, name) for one in found]
    table["p"] = holm(np.nan_to_num([one.p_value if one.seeds > 1 else one.p_networks for one in found], nan=1.0))
    table["p equivalent"] = holm(np.nan_to_num([one.equivalence(margin / 100) for one in found], nan=1.0))
    apart, ahead = table["p"] <= ALPHA, table["difference"] > 0
    winner, loser = table["first"].where(ahead, table["second"]), table["second"].where(ahead, table["first"])
    alike = (table["p equivalent"] <= ALPHA).map({True: f"equivalent within {margin:g}", False: ""})
    table["verdict"] = (winner + " is better").where(apart, "").str.cat(alike, ", ").str.strip(", ")
    table["verdict"] = table["verdict"].replace("", "cannot be told apart")
    lines = []
    for name, records in systems.items():
        mean = hierarchical_interval(values[name][metric], identity, np.random.default_rng(seed))
        line: dict[str, int | float | str] = {"rank": 1 + int((apart & (loser == name)).sum())}
        line |= {"last rank": len(systems) - int((apart & (winner == name)).sum()), "system": name}
        line |= {"seeds": len(records)} | {m: 100 * float(values[name][m].mean()) for m in METRICS}
        line |= {"low": 100 * mean.low, "high": 100 * mean.high, "cost": str(records[0].cost)}
        lines.append(line | {"selected": ", ".join(sorted({record.selected for record in records}))})
    ranking = pd.DataFrame(lines).sort_values(["rank", metric], ascending=[True, False], kind="stable")
    return ranking.reset_index(drop=True), table


def _compared(first: np.ndarray, second: np.ndarray, identity: np.ndarray, seed: int) -> RowComparison:
    if len(first) != len(second):  # seeds that cannot be paired
        first, second = first.mean(axis=0, keepdims=True), second.mean(axis=0, keepdims=True)
    return compare_rows(first, second, identity, np.random.default_rng(seed))


def printed(ranking: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A ranking as text: ranks with their interval, the tested metric with its own."""
    ranks = [f"{first} [{first}, {last}]" if first < last else str(first)
             for first, last in zip(ranking["rank"], ranking["last rank"])]  # fmt: skip
    levels = [shown(level) for level in zip(ranking[metric], ranking["low"], ranking["high"])]
    table = ranking.drop(columns=["last rank", "low", "high"])
    return readable(table.assign(rank=ranks, **{metric: levels}))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 compared, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.compare", description="Compare scored systems.")
    parser.add_argument("records", nargs="+", metavar="RECORD", help="files of python -m fmfa.score")
    parser.add_argument("--metric", default=METRICS[0], choices=METRICS, help="that is tested")
    parser.add_argument("--margin", type=float, default=1.0, help="points within which systems are equivalent")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and permutations")
    for name, what in (("csv", "the ranking"), ("latex", "the ranking"), ("pairs", "the pairs as CSV"), ("figure", "")):
        parser.add_argument(f"--{name}", default="", metavar="FILE", help=f"also write {what or 'a figure (png, pdf)'}")
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.margin < 100:
            raise ConfigError(f"--margin is {options.margin}; expected points between 0 and 100")
        kind = Path(options.figure or "x.png").suffix[1:]
        if kind not in ("png", "pdf", "svg"):
            raise ConfigError(f"--figure {options.figure}: expected a file name that ends in .png, .pdf or .svg")
        systems = group_records({path: read_record(path) for path in options.records})
        ranking, pairs = compare_systems(systems, options.metric, options.margin, options.seed)
        text = printed(ranking, options.metric)
        print(text.to_string(index=False), readable(pairs, digits=3).to_string(index=False), sep="\n\n")
        written = {options.csv: ranking.to_csv(index=False), options.pairs: pairs.to_csv(index=False)}
        written[options.latex] = text.style.hide(axis="index").format(escape="latex").to_latex(hrules=True)
        with said_plainly("the comparison cannot be written"):
            for path, content in written.items():
                if path:
                    with whole_file(path) as file:
                        file.write_text(content, encoding="utf-8")
            if options.figure:
                use_style()
                with whole_file(options.figure) as file:
                    plot_ranking(ranking, options.metric).savefig(file, format=kind)
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
