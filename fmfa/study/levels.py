"""Tables of levels: one system, every run, every row of the study, across domains, and as published."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from fmfa.data.annotations import Dataset
from fmfa.errors import ConfigError, told
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation
from fmfa.study.results import CEILING, CHANCE, METRICS, Level, Results, Rows, each_query, references

PUBLISHED = Path(__file__).parents[2] / "data" / "published.csv"


def result_table(systems: dict[str, Evaluation], dataset: Dataset, split: str) -> pd.DataFrame:
    """Percentages of each system with 95 % intervals over identities, above chance and below the ceiling.

    Args:
        systems: by name, all evaluated on the same split.
        dataset: what they were evaluated on; SimPEDES has a ceiling for val and test.
        split: of the data set.

    Returns:
        One row per system and direction, then chance and, if known, the ceiling; columns are the metrics, each
        a string "value [low, high]", and the numbers of queries and gallery items.
    """
    rows = []
    for name, evaluation in systems.items():
        for direction, values in evaluation.table().groupby("direction", sort=False):
            row = {"system": name, "direction": direction}
            row |= {v.metric: shown((v.value, v.low, v.high)) for v in values.itertuples()}
            rows.append(row | {"queries": values["queries"].iloc[0], "gallery": values["gallery"].iloc[0]})
    levels: dict[str, dict[str, float] | None] = {CHANCE: next(iter(systems.values())).chance[TEXT_TO_IMAGE]}
    if dataset.truth:
        levels[CEILING] = dataset.truth.ceiling(split)
    for name, known in levels.items():
        if known:
            percent = {metric: shown((100 * known[metric], None, None)) for metric in METRICS}
            rows.append({"system": name, "direction": TEXT_TO_IMAGE} | percent)
    return pd.DataFrame(rows, dtype=object).fillna("")


def shown(level: Level) -> str:
    """Write a level as "value [low, high]", or "value" without an interval."""
    value, low, high = level
    return f"{value:.1f}" if pd.isna(low) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def readable(table: pd.DataFrame | pd.Series, digits: int = 0) -> pd.DataFrame:
    """Write a table as text for readers.

    Missing values are empty cells, whole numbers have no decimal point, and nothing but 0 is shown as 0. All numbers of
    a column have one decimal if the largest is at least 1, such as percentages, and three if it is at least 0.01;
    smaller ones have three digits, those in a column of mixed values six. An index without name or labels and columns
    of empty cells are left out.

    Args:
        table: a Series becomes a table of two columns.
        digits: significant digits of each number by itself, for columns of different units; 0: as above.
    """
    table = table.to_frame() if isinstance(table, pd.Series) else table
    if any(table.index.names) or not pd.api.types.is_integer_dtype(table.index):
        table = table.reset_index(names=[name or "" for name in table.index.names])
    text = table.apply(_as_text, digits=digits)
    text = text.loc[:, (text != "").any()] if len(text) else text
    return text.set_axis([""] * len(text)).rename_axis(columns=None)


def _as_text(column: pd.Series, digits: int) -> pd.Series:
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    numbers = column.dropna().abs().loc[lambda sizes: sizes < np.inf] if numeric else pd.Series(dtype=float)
    column, largest = column.astype(object), numbers.max()
    if digits or not largest >= 0.01 or (numbers % 1 == 0).all():
        return column.map(lambda value: _cell(value, digits or (3 if numeric else 6)))
    return column.map(lambda value: _cell(value, 1, decimals=1 if largest >= 1 else 3))


def _cell(value: Any, digits: int, decimals: int = 0) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not pd.api.types.is_number(value) or abs(value) == np.inf:
        return str(value)
    if decimals and (value == 0 or round(value, decimals)):
        return f"{value + 0:,.{decimals}f}"
    if value % 1 == 0 or abs(value) >= 10**digits - 0.5:
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}"
    return f"{value:.{digits}g}"


def run_results(results: Results, split: str = "test") -> pd.DataFrame:
    """List every run: name, method, seed, status, best epoch and metrics in percent.

    Failed, interrupted and unevaluated runs stay in the table, with their status and empty metrics; of a run whose
    evaluation did not finish, or was changed since, the status says so. Chance, the zero-shot level and the ceiling
    follow with the status "reference".
    """
    runs = results.runs
    configs = pd.DataFrame(list(runs["config"]), columns=["method", "preset", "objectives"])
    status = [f"{status}; left out: {why}" if why else status for status, why in zip(runs["status"], runs["left_out"])]
    table = pd.concat([runs["run"], configs, runs["seed"]], axis=1).assign(status=status, best_epoch=runs["best_epoch"])
    table = table.join(results.means(split), on="run")
    levels = [{"run": name, "status": "reference"} | {metric: level[0] for metric, level in values.items()}
              for name, values in references(results, split).items()]  # fmt: skip
    return pd.concat([table, pd.DataFrame(levels)], ignore_index=True) if levels else table


def seeds_table(results: Results, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """Return the mean of each row of the study over its seeds, with 95 % intervals over seeds and identities.

    With one seed the interval is over identities alone. Chance, the zero-shot level of the starting weights and the
    ceiling of the captions follow, as far as the evaluations know them.
    """
    found, table = results.rows(split), []
    for name, runs in found.runs.items():
        row: dict[str, str | int] = {"row": name, "seeds": len(runs), "queries": len(found.identity)}
        for metric in METRICS:
            mean = found.mean(name, metric, seed)
            row[metric] = shown((100 * mean.estimate, 100 * mean.low, 100 * mean.high))
        table.append(row)
    for name, levels in references(results, split).items():
        table.append({"row": name, **{metric: shown(level) for metric, level in levels.items()}})
    return pd.DataFrame(table, dtype=object).fillna("")


def tuning_table(results: Results) -> pd.DataFrame:
    """Return validation R@1 (percent) of the best epoch of every finished run, by learning rate and method."""
    runs = results.runs[(results.runs["status"] == "finished") & results.runs["best"].notna()]
    done = pd.DataFrame(list(runs["config"]), columns=["learning_rate", "method"])
    done = done.rename(columns={"learning_rate": "learning rate"}).assign(**{"R@1": 100 * runs["best"].to_numpy()})
    if (done := done.dropna()).empty:
        return pd.DataFrame()
    return done.pivot_table(index="learning rate", columns="method", values="R@1", aggfunc="max")


def published_table() -> pd.DataFrame:
    """Return R@1 that papers publish on the real data sets, by method and starting weights."""
    table = read_published()
    table = table[~table["method"].str.startswith("ablation")]
    return table.pivot_table(index=["method", "initialisation"], columns="dataset", values="R1", sort=False)


def published_gains(first: str, second: str) -> pd.Series:
    """Published differences in R@1 (points), `first` minus `second`, by data set and starting weights.

    Measured by the papers' authors on real data, one run each, and not here. Empty where a method is not listed.
    """
    r1 = read_published().set_index(["dataset", "initialisation", "method"])["R1"].unstack("method")
    known = {first, second} <= set(r1.columns)
    return (r1[first] - r1[second]).dropna().rename("R@1 difference") if known else pd.Series(dtype=float)


class _Published(BaseModel):
    dataset: Annotated[str, Field(pattern=r"\S")]
    method: Annotated[str, Field(pattern=r"\S")]
    initialisation: Annotated[str, Field(pattern=r"\S")]
    R1: Annotated[float, Field(ge=0, le=100)]


def read_published() -> pd.DataFrame:
    """Read `data/published.csv`: dataset, method, initialisation and R1 (percent).

    Raises:
        ConfigError: the file is missing or no such CSV; a name is empty, a line is there twice, or R1 is no percentage.
    """
    lines = Annotated[list[_Published], Field(min_length=1)]
    try:
        with PUBLISHED.open(encoding="utf-8", newline="") as file:
            # more cells than in the first line become R1, which is no number then
            known = TypeAdapter(lines).validate_python(list(csv.DictReader(file, restkey="R1", strict=True)))
    except ValidationError as error:
        raise ConfigError(f"{PUBLISHED}, entry {told(error)}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{PUBLISHED} cannot be read as CSV ({error})") from error
    table = pd.DataFrame([line.model_dump() for line in known])
    if (twice := table.duplicated(["dataset", "method", "initialisation"])).any():
        raise ConfigError(f"{PUBLISHED}, entry {int(twice.argmax())}: the same data set, method and weights as before")
    return table


def cross_domain_table(results: Sequence[Results], split: str = "test", seed: int = 0) -> pd.DataFrame:
    """R@1 of the rows that were evaluated on another data set than they were trained on, there and at home.

    Args:
        results: for both directions between two domains the results of both.
        split: of the data sets.
        seed: of the bootstrap.

    Returns:
        One line per row, training set and test set; numbers in percent and points. `R@1` with `low` and `high` over
        seeds and identities. `drop` is the R@1 of the same row trained on the test set's own domain, minus this one, on
        the same queries over the seeds that both have, with `drop_low` and `drop_high`; empty where that row was not
        run. `own` is the R@1 of the same networks at home, on other queries. Empty where no row was tested elsewhere.

    Raises:
        ConfigError: no evaluated run, or two evaluations of a test set on different queries.
    """
    tests: dict[str, Rows] = {}  # by test set, the rows by name and training set
    for one in results:
        table = one.identities
        table = table[(table["of"] == "run") & (table["split"] == split) & table["run"].isin(one.compared()["run"])]
        for (row, number, home, away), part in table.groupby(["row", "seed", "trained_on", "tested_on"]):
            tests.setdefault(away, Rows({}, {})).add((row, home), number, each_query(part))
    if not tests:
        raise ConfigError(f"no run was evaluated on {split}: run notebooks/04_evaluate.ipynb first")
    travelled = {row for away, rows in tests.items() for row, home in rows.runs if home != away}
    places = sorted((row, home, away) for away, rows in tests.items() for row, home in rows.runs if row in travelled)
    return pd.DataFrame([_line(tests, *place, seed) for place in places])


def _line(tests: dict[str, Rows], row: str, home: str, away: str, seed: int) -> dict[str, Any]:
    rows = tests[away]
    level = rows.mean((row, home), seed=seed)
    line = {"row": row, "trained on": home, "tested on": away, "seeds": len(rows.runs[row, home]),
            "queries": len(rows.identity), "R@1": 100 * level.estimate, "low": 100 * level.low,
            "high": 100 * level.high}  # fmt: skip
    lost = rows.compare((row, away), (row, home), seed=seed) if home != away else None
    line |= dict.fromkeys(("drop", "drop_low", "drop_high"), np.nan)
    if lost:
        drop = lost.difference
        line |= {"drop": 100 * drop.estimate, "drop_low": 100 * drop.low, "drop_high": 100 * drop.high}
    own = tests[home].runs.get((row, home)) if home in tests else None
    return line | {"own": 100 * tests[home].values((row, home)).mean() if own else np.nan}
