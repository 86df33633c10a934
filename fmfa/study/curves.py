"""Curves and grids of study.yml: R@1 over one setting, and what became of every pair of two."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from fmfa.errors import ConfigError
from fmfa.evaluation.statistics import further_run, hierarchical_interval
from fmfa.models.objectives import objectives
from fmfa.study.results import METRICS, Results, Rows
from fmfa.training.config import TrainConfig

OWN = "own"


def sensitivity_table(results: Results, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """R@1 (percent) of every point of the hyper-parameter curves, with intervals over seeds and identities.

    Beside its points a curve has its system's own row, which is not trained again for it, if there are results of that
    row (it has the method's name).

    Returns:
        Columns curve, row, value, seeds, queries, estimate, low, high; `own` is True for the system's own row, and
        `further_low`, `further_high` are where one further training of that row would lie
        (`fmfa.evaluation.statistics.further_run`): what one seed of a point must leave to mean anything. Empty without
        a curve.
    """
    queries, lines, levels = results.queries(split), [], results.rows(split)
    scatter = levels.scatter()
    runs = results.runs[results.runs["run"].isin(queries)]
    points = runs[runs["point"].map(len) == 1]
    points = points.assign(value=[float(*point.values()) for point in points["point"]])
    for curve, part in points.groupby("curve"):
        for (value, row), point in part.groupby(["value", "row"]):
            for run in point.itertuples():
                levels.add(row, run.seed, queries[run.run])
            lines.append({"curve": curve, "row": row, "value": value, OWN: False} | _level(levels, row, seed))
        value, config = part[["value", "config"]].iloc[-1]
        if (method := config.get("method")) in levels.runs:
            low, high = 100 * np.array(further_run(levels.values(method), scatter))
            line = {"curve": curve, "row": method, "value": own_value(config, value), OWN: True}
            lines.append(line | {"further_low": low, "further_high": high} | _level(levels, method, seed))
    names = ["curve", "row", "value", OWN, "seeds", "queries", "estimate", "low", "high", "further_low", "further_high"]
    return pd.DataFrame(lines, columns=names).sort_values(["curve", "value"], kind="stable", ignore_index=True)


def own_value(config: dict, value: float) -> float:
    """The value that a point's system has by itself of what the point sets to `value`; NaN where that is not known."""
    try:
        point = TrainConfig.from_dict(config)
        start = TrainConfig(method=point.method, preset=point.preset, dataset=point.dataset)
        own: dict[str, Any] = start.resolved().to_dict()
        if point.method != "ivt":
            own |= asdict(objectives(point.method, point.preset, point.dataset))
        given = point.to_dict() | point.objective_overrides()
    except (ConfigError, TypeError):  # a record of another version of the package
        return np.nan
    set_to = [name for name, setting in given.items() if type(own.get(name)) is float and setting == value]
    return next((own[name] for name in set_to if own[name] != value), np.nan)


def grid_table(results: Results, split: str = "test") -> pd.DataFrame:
    """What became of every point of the grids, which vary two settings at once.

    Returns:
        One line per point, means over its seeds: grid, the two settings by name, seeds; R@1 in percent on validation of
        the `start`, of the `best` epoch and of the `last` one, and `R@1` on the split. Empty without a grid.
    """
    means = results.means(split)[METRICS[0]]
    runs = results.runs[(results.runs["point"].map(len) == 2) & results.runs["run"].isin(means.index)]
    if runs.empty:
        return pd.DataFrame()
    metrics = results.metrics[(results.metrics["split"] == "val") & (results.metrics["metric"] == METRICS[0])]
    validation = 100 * metrics.sort_values("epoch").groupby("run")["value"].agg(
        start="first", best=lambda values: values.iloc[1:].max(), last="last"
    )  # fmt: skip
    points = pd.DataFrame(list(runs["point"]), index=runs["run"]).astype(float)
    table = pd.concat([points, validation.loc[runs["run"]], means.loc[runs["run"]]], axis=1).assign(seeds=1)
    table.insert(0, "grid", runs["curve"].to_numpy())
    keys, values = ["grid", *points], ["start", "best", "last", METRICS[0]]
    return table.groupby(keys, as_index=False).agg({"seeds": "sum"} | dict.fromkeys(values, "mean"))


def _level(rows: Rows, row: str, seed: int) -> dict[str, float]:
    found = hierarchical_interval(100 * rows.values(row), rows.identity, np.random.default_rng(seed))
    return {"seeds": len(rows.runs[row]), "queries": len(rows.identity), "estimate": found.estimate, "low": found.low,
            "high": found.high}  # fmt: skip
