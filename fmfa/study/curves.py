"""Curves and grids of a results folder: runs named CURVE=VALUE-SEED or GRID_NAME=VALUE_NAME=VALUE-SEED."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.errors import ConfigError
from fmfa.evaluation.statistics import further_run, hierarchical_interval
from fmfa.models.objectives import objectives
from fmfa.records import read_metrics, read_record
from fmfa.study.results import METRICS, find_queries, is_point, read_queries, row_and_seed, run_folders
from fmfa.training.config import TrainConfig

OWN = "own"


def point_of(row: str) -> tuple[str, dict[str, float]]:
    """Curve (or grid) and values by variable of a point's row, as `fmfa.study.definition.expand_rows` names it."""
    words = row.split("_")
    values = {name: float(value) for name, value in (word.split("=") for word in words if "=" in word)}
    return "_".join(word for word in words if "=" not in word) or next(iter(values)), values


def sensitivity_table(results: str | Path, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """R@1 (percent) of every point of the hyper-parameter curves of a folder, with intervals over seeds and identities.

    Beside its points a curve has its system's own row, which is not trained again for it, where the folder has that
    row (it has the method's name).

    Returns:
        Columns curve, row, value, seeds, queries, estimate, low, high; `own` is True for the system's own row, and
        `further_low`, `further_high` are where one further training of that row would lie
        (`fmfa.evaluation.statistics.further_run`): what one seed of a point must leave to mean anything. Empty where
        there is no curve.
    """
    points: dict[tuple[str, float], list[Path]] = {}
    for folder, curve, values in _points(results, split):
        if len(values) == 1:
            points.setdefault((curve, next(iter(values.values()))), []).append(folder)
    lines = []
    for (curve, value), folders in sorted(points.items()):
        lines.append({"curve": curve, "row": row_and_seed(folders[0].name)[0], "value": value, OWN: False}
                     | _level(folders, split, seed))  # fmt: skip
    examples = {curve: (value, folders[0]) for (curve, value), folders in points.items()}
    for curve, (value, folder) in examples.items():
        config = read_record(folder).get("config", {})
        row = config.get("method")
        own = [f for f in run_folders(results) if row_and_seed(f.name)[0] == row and find_queries(f, split)]
        if own:
            low, high = further_run(np.stack([_hits(folder, split) for folder in own]))
            lines.append({"curve": curve, "row": row, "value": own_value(config, value), OWN: True,
                          "further_low": 100 * low, "further_high": 100 * high} | _level(own, split, seed))  # fmt: skip
    names = ["curve", "row", "value", OWN, "seeds", "queries", "estimate", "low", "high", "further_low", "further_high"]
    return pd.DataFrame(lines, columns=names).sort_values(["curve", "value"], kind="stable", ignore_index=True)


def own_value(config: dict, value: float) -> float:
    """The value that a point's system has by itself of what the point sets to `value`; NaN where that is not known."""
    try:
        point = TrainConfig.from_dict(config)
        own = TrainConfig(method=point.method, preset=point.preset, dataset=point.dataset).resolved().to_dict()
        if point.method != "ivt":
            own |= asdict(objectives(point.method, point.preset, point.dataset))
        given = point.to_dict() | point.objective_overrides()
    except (ConfigError, TypeError):  # a record of another version of the package
        return np.nan
    set_to = [name for name, setting in given.items() if type(own.get(name)) is float and setting == value]
    return next((own[name] for name in set_to if own[name] != value), np.nan)


def grid_table(results: str | Path, split: str = "test") -> pd.DataFrame:
    """What became of every point of the folder's grids, which vary two settings at once.

    Returns:
        One line a point, means over its seeds: grid, the two settings by name, seeds; R@1 in percent on validation of
        the `start`, of the `best` epoch and of the `last` one, and `R@1` on the split. Empty where there is no grid.
    """
    lines = []
    for folder, grid, values in _points(results, split):
        if len(values) != 2:
            continue
        metrics = read_metrics(folder)
        chosen = (metrics["split"] == "val") & (metrics["metric"] == METRICS[0])
        validation = 100 * metrics[chosen].sort_values("epoch")["value"].to_numpy()
        lines.append({"grid": grid, **values, "seeds": 1, "start": validation[0], "best": validation[1:].max(),
                      "last": validation[-1], METRICS[0]: 100 * np.nanmean(_hits(folder, split))})  # fmt: skip
    if not lines:
        return pd.DataFrame()
    table = pd.DataFrame(lines)
    keys = list(table.columns[: table.columns.get_loc("seeds")])
    return table.groupby(keys, as_index=False).agg(dict.fromkeys(table.columns.drop(keys), "mean") | {"seeds": "sum"})


def _points(results: str | Path, split: str) -> Iterator[tuple[Path, str, dict[str, float]]]:
    for folder in run_folders(results, points=True):
        row = row_and_seed(folder.name)[0]
        if is_point(row) and find_queries(folder, split):
            yield folder, *point_of(row)


def _hits(folder: Path, split: str) -> np.ndarray:
    return read_queries(folder, split)[METRICS[0]].to_numpy(dtype=np.float64)


def _level(folders: list[Path], split: str, seed: int) -> dict[str, float]:
    hits = np.stack([_hits(folder, split) for folder in folders])
    identity = read_queries(folders[0], split)["identity"].to_numpy()
    found = hierarchical_interval(100 * hits, identity, np.random.default_rng(seed))
    return {"seeds": len(hits), "queries": hits.shape[1], "estimate": found.estimate, "low": found.low,
            "high": found.high}  # fmt: skip
