"""The papers' claims, the controls and the oracles as comparisons of rows, each with a verdict in one sentence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from fmfa.errors import ConfigError, told
from fmfa.evaluation.statistics import RowComparison, further_run, holm, holm_levels
from fmfa.study.levels import published_gains
from fmfa.study.results import CHANCE, SHUFFLED, Results, Rows, references

CLAIMS = Path(__file__).parents[2] / "data" / "claims.yml"
SHIPPED = CLAIMS.parent / "results" / "wide"  # of which seeds scatter least
LEVEL = 0.05
MARGIN = 0.01  # of R@1, below which a difference does not matter
HOLDS, FAILS, EQUAL, OPEN, MISSING = "holds", "does not hold", "equal within 1 point", "open", "not run"
ONE_SEED = "one seed: no verdict"
VERDICTS = (HOLDS, FAILS, EQUAL, OPEN, ONE_SEED, MISSING)
_SPOKEN = {HOLDS: ("holds", "hold"), FAILS: ("does not hold", "do not hold"), EQUAL: (f"is {EQUAL}", f"are {EQUAL}"),
           OPEN: ("is open", "are open"),
           ONE_SEED: ("has one seed and no verdict", "have one seed and no verdict"),
           MISSING: ("was not run", "were not run")}  # fmt: skip
AS_EXPECTED, UNEXPECTED = "as it must be", "not as it must be"
AS_REAL, NOT_REAL = "as on real data", "not as on real data"
_SIDES = {HOLDS: "above", FAILS: "below", EQUAL: "neither", OPEN: "neither"}


def claims_table(results: Results, split: str = "test", seed: int = 0, kind: str = "claims") -> pd.DataFrame:
    """Each claim of `data/claims.yml` with what was published, what was measured, and a verdict.

    Args:
        split: of the comparison.
        seed: of the bootstrap and the permutations.
        kind: "claims" of the papers, "parts" of those that average several comparisons, "controls" that must come
            out, "oracles" that use the true part maps, "recipes" of training, "forms", where paper and code differ, or
            "known", differences that were measured on real data.

    Returns:
        One line per claim. `published` is the range of the paper's differences in R@1 (points, real data, one run each,
        not measured here); `R@1 difference`, `low`, `high` and `p` are measured over seeds and identities as in
        `rows_paired_table`; `p (Holm)`, `low (Holm)` and `high (Holm)` are corrected over the table's
        claims that were run with several seeds (`corrected_columns`), as is `p (equal)`, the two one-sided
        tests that the difference is `MARGIN` or more. `verdict` is "holds" or "does not hold" if `p (Holm)` is at most
        0.05, by the sign of the difference, else "equal within 1 point" if `p (equal)` is, else "open"; "one seed: no
        verdict", and "not run". `mAP difference` and `verdict by mAP` are the same of mAP. A control is "as it must
        be", "not as it must be", or one of the last three; a known answer "as on real data" or not, by its sign.

    Raises:
        ConfigError: two runs were evaluated on different queries, or no such kind.
    """
    claims, rows = read_claims(kind), results.rows(split)
    compared, by_map = (
        [rows.compare(claim["row"], claim["minus"], metric, seed) for claim in claims] for metric in ("R@1", "mAP")
    )
    table = pd.DataFrame([_measured(rows, claim, one) for claim, one in zip(claims, compared, strict=True)])
    table = table.join(corrected_columns(compared))
    table["verdict"] = _verdicts(claims, compared, table)
    table["in words"] = [_in_words(*line) for line in zip(claims, table.to_dict("records"), strict=True)]
    table["mAP difference"] = [100 * one.difference.estimate if one else np.nan for one in by_map]
    table["verdict by mAP"] = _verdicts(claims, by_map, corrected_columns(by_map))
    beside = ["single", "level", "other", "further_low", "further_high"]
    table = table.drop(columns=["effect size", *beside], errors="ignore")
    first = [name for name in ("paper", "claim", "verdict", "in words") if name in table]
    return table[[*first, *table.columns.drop(first)]]


def claims_in_short(results: Results, table: pd.DataFrame, split: str = "test") -> str:
    """Say in one paragraph what a table of claims says: on which data, over how many seeds, and which verdicts.

    Args:
        results: what the table was made of.
        table: of `claims_table`.
        split: of the comparison.
    """
    rows, parts = results.rows(split), []
    if not rows.runs:
        return "no run was evaluated."
    for verdict in VERDICTS:
        names = [claim.rstrip(".") for claim in table.loc[table["verdict"] == verdict, "claim"]]
        listed = f" ({'; '.join(names)})" if verdict in (HOLDS, FAILS) else ""
        parts += [f"{len(names)} {_SPOKEN[verdict][len(names) > 1]}{listed}"] if names else []
    people, seeds = len(np.unique(rows.identity)), table.loc[table["seeds"] > 0, "seeds"]
    tested = results.own("identities", split)["tested_on"].iloc[0]
    counted = f", {seeds_in_words(seeds)} per row" if len(seeds) else ""
    corrected = "; corrected for the number of claims (Holm, 5 %)" if table["p (Holm)"].notna().any() else ""
    by_map = int((table["verdict by mAP"] == OPEN).sum())
    mean_precision = f" By mAP, {by_map} {_SPOKEN[OPEN][by_map != 1]}." if corrected else ""
    draw = " One seed is one draw: another training would give other numbers." if 1 in set(seeds) else ""
    return (
        f"{tested}, {len(rows.identity):,} queries of {people:,} identities{counted}. Of {len(table)} claims of the "
        f"papers {', '.join(parts)}{corrected}.{mean_precision}{draw}"
    )


def seeds_in_words(counts: Sequence[int]) -> str:
    """Numbers of seeds as text: "5 seeds", "1 to 5 seeds"."""
    fewest, most = min(counts), max(counts)
    return f"{fewest} to {most} seeds" if fewest < most else f"{most} seed" + "s" * int(most > 1)


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("must be one line of text")
    return text


_Line = Annotated[str, AfterValidator(_one_line)]


class _Claim(BaseModel, extra="forbid"):
    claim: _Line
    row: _Line
    minus: _Line
    paper: _Line = ""
    published: Annotated[list[str], Field(min_length=2, max_length=2)] = []  # two methods of published.csv
    expected: Literal["above", "below", "not above"] | None = None
    real: float | None = None  # points of R@1 on CUHK-PEDES
    source: _Line = ""


def read_claims(kind: str = "claims") -> list[dict[str, Any]]:
    """Read one kind of `data/claims.yml`: claim, row, minus and, where given, paper, published, expected, real
    and source.

    Raises:
        ConfigError: no such kind, or the file is missing, not YAML, or holds something else than such claims.
    """
    try:
        content = yaml.load(CLAIMS.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # every value is text
        known = TypeAdapter(dict[str, Annotated[list[_Claim], Field(min_length=1)]]).validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{CLAIMS}, {told(error)}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{CLAIMS} cannot be read as YAML ({type(error).__name__}: {error})") from error
    if kind not in known:
        raise ConfigError(f"kind is {kind!r}; {CLAIMS.name} has {', '.join(known) or 'no kinds'}")
    return [claim.model_dump(exclude_unset=True) for claim in known[kind]]


def _measured(rows: Rows, claim: dict[str, Any], compared: RowComparison | None) -> dict[str, Any]:
    line = {"paper": claim["paper"]} if "paper" in claim else {}
    line |= {name: claim[name] for name in ("claim", "row", "minus")}
    if "paper" in claim:
        line["published"] = _published(claim.get("published"))
    line |= {"real data": claim["real"], "source": claim["source"]} if "real" in claim else {}
    line |= difference_columns(compared)
    single = [name for name in (claim["row"], claim["minus"]) if len(rows.runs.get(name, ())) == 1]
    other = {claim["row"]: claim["minus"], claim["minus"]: claim["row"]}[single[0]] if len(single) == 1 else None
    if other and other in rows.runs:
        line |= _beside_further_run(rows, single[0], other)
    return line


def _beside_further_run(rows: Rows, single: str, other: str) -> dict[str, Any]:
    low, high = further_run(rows.values(other), rows.scatter())
    return {"single": single, "level": 100 * np.nanmean(rows.values(single)), "other": other,
            "further_low": 100 * low, "further_high": 100 * high}  # fmt: skip


def _published(methods: list[str] | None) -> str:
    gains = published_gains(*methods) if methods else pd.Series(dtype=float)
    return f"{gains.min():+.2f} to {gains.max():+.2f} (n = {len(gains)})" if len(gains) else ""


def _verdicts(
    claims: list[dict[str, Any]], compared: Sequence[RowComparison | None], corrected: pd.DataFrame
) -> list[str]:
    """The verdict on each claim by the corrected p values of its comparison."""
    verdicts = []
    for claim, one, p_different, p_equal in zip(claims, compared, corrected["p (Holm)"], corrected["p (equal)"]):
        verdict = EQUAL if p_equal <= LEVEL else OPEN
        if one is None or one.seeds == 1:
            verdict = ONE_SEED if one else MISSING
        elif p_different <= LEVEL:
            verdict = HOLDS if one.difference.estimate > 0 else FAILS
        if "expected" in claim and verdict in _SIDES:
            side = _SIDES[verdict]
            right = side == claim["expected"] or (claim["expected"] == "not above" and side != "above")
            verdict = AS_EXPECTED if right else UNEXPECTED if verdict in (HOLDS, FAILS) else OPEN
        elif "real" in claim and verdict in (HOLDS, FAILS):
            verdict = AS_REAL if (verdict == HOLDS) == (claim["real"] > 0) else NOT_REAL
        verdicts.append(verdict)
    return verdicts


def _in_words(claim: dict[str, Any], line: dict[str, Any]) -> str:
    if not line["seeds"]:
        return f"{line['row']} and {line['minus']} were not all run with the same seed."
    measured = f"{line['R@1 difference']:+.1f} [{line['low']:.1f}, {line['high']:.1f}] points of R@1"
    if line["seeds"] == 1:
        return f"These two networks differ by {measured}; {_one_seed(line)}"
    measured += f" over {line['seeds']} seeds, corrected [{line['low (Holm)']:.1f}, {line['high (Holm)']:.1f}]"
    different = line["p (Holm)"] <= LEVEL
    if "expected" in claim:
        side = ("above" if line["R@1 difference"] > 0 else "below") if different else "neither above nor below"
        if line["verdict"] == UNEXPECTED:
            return f"{measured}: {side}, where it must be {claim['expected']}."
        return f"{measured}: {side} by more than the noise."
    if different:
        return f"{measured}: {'better' if line['R@1 difference'] > 0 else 'worse'} by more than the noise."
    if line["verdict"] == EQUAL:
        return f"{measured}: the difference is shown to be below 1 point."
    if line["p"] <= LEVEL:
        return f"{measured}: more than the noise of one comparison, but not of all in this table."
    return f"{measured}: this is within the noise, and the noise is too large to call them equal."


def _one_seed(line: dict[str, Any]) -> str:
    if pd.isna(line.get("further_low", np.nan)):
        return "one seed says nothing about another training."
    side = "inside" if line["further_low"] <= line["level"] <= line["further_high"] else "outside"
    return (
        f"the one training of {line['single']}, {line['level']:.1f} %, lies {side} of where one further training of "
        f"{line['other']} would lie, {line['further_low']:.1f} to {line['further_high']:.1f} %."
    )


def rows_paired_table(results: Results, baseline_row: str, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """Compare every row of the study with a baseline row over the seeds that both have, on the same queries.

    Returns:
        One line per row, then the starting weights, chance and the ceiling. `R@1` is the row's mean in percent over all
        of its seeds; `R@1 difference`, `low`, `high` are points over seeds and identities (with one seed over
        identities alone); `p` is over seeds and identities too, and empty with one seed; `p (Holm)`, `low (Holm)` and
        `high (Holm)` are corrected over the table's rows (see `corrected_columns`); `p (these networks)` is the
        permutation test over identities, which knows nothing of seeds (see `compare_rows`). A row
        that shares no seed with the baseline has no difference.

    Raises:
        ConfigError: no run of the baseline row, or two runs were evaluated on different queries.
    """
    known = sorted(set(results.runs["row"]))
    if baseline_row not in known:
        raise ConfigError(f"baseline is {baseline_row!r}; the results have runs of the rows {', '.join(known)}")
    rows = results.rows(split)
    names = [name for name in rows.names if name != baseline_row]
    found = [rows.compare(name, baseline_row, seed=seed) for name in names]
    levels = ({"row": name, "minus": baseline_row, "R@1": 100 * np.nanmean(rows.values(name))} for name in names)
    table = pd.DataFrame([line | difference_columns(one) for line, one in zip(levels, found, strict=True)])
    if len(table):
        table = table.join(corrected_columns(found))
        table["p (these networks)"] = [one.p_networks if one else np.nan for one in found]
    table = pd.concat([table, _constants(results, split, rows, baseline_row)], ignore_index=True)
    return table.astype({"seeds": "Int64"}) if "seeds" in table else table


def difference_columns(found: RowComparison | None) -> dict[str, float]:
    """Columns of a comparison in points of R@1; empty numbers where there was nothing to compare."""
    if found is None:
        names = ("R@1 difference", "low", "high", "effect size", "p")
        return {"seeds": 0} | dict.fromkeys(names, np.nan)
    difference = found.difference
    return {"seeds": found.seeds, "R@1 difference": 100 * difference.estimate, "low": 100 * difference.low,
            "high": 100 * difference.high, "effect size": found.effect_size, "p": found.p_value}  # fmt: skip


def corrected_columns(family: Sequence[RowComparison | None]) -> pd.DataFrame:
    """Holm's correction of a family of comparisons; empty without p values.

    Returns:
        One line per comparison: `p (Holm)`, and `low (Holm)` and `high (Holm)`, the interval in points at the
        confidence level of the comparison in Holm's method (`fmfa.evaluation.statistics.holm_levels`), which leaves
        zero out just where `p (Holm)` is at most 0.05; and `p (equal)`, of the equivalence within `MARGIN`, corrected
        in the same way.
    """
    columns = ["p (Holm)", "low (Holm)", "high (Holm)", "p (equal)"]
    table = pd.DataFrame(np.nan, index=range(len(family)), columns=columns)
    known = [(place, one) for place, one in enumerate(family) if one and not np.isnan(one.p_value)]
    p_values, equal = [one.p_value for _, one in known], holm([one.equivalence(MARGIN) for _, one in known])
    for (place, one), p, level, same in zip(known, holm(p_values), holm_levels(p_values), equal, strict=True):
        interval = one.interval(level)
        table.loc[place] = p, 100 * interval.low, 100 * interval.high, same
    return table


def _constants(results: Results, split: str, rows: Rows, baseline: str) -> pd.DataFrame:
    """Levels without queries of their own: chance, the ceiling, and zero-shot where only its level was kept."""
    base = 100 * np.nanmean(rows.values(baseline)) if baseline in rows.names else np.nan
    known = {name: level["R@1"][0] for name, level in references(results, split).items() if name not in rows.starts}
    return pd.DataFrame(
        [
            {"row": name, "minus": baseline, "R@1": value, "R@1 difference": value - base}
            for name, value in known.items()
        ]
    )


def shuffled_table(results: Results, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """R@1 (percent) of every row whose captions were shuffled at evaluation, against chance; empty where none was.

    `at chance` says whether the 95 % interval over seeds and identities holds the chance level.
    """
    rows, levels, lines = results.rows(split, SHUFFLED), references(results, split), []
    for name in rows.runs:
        chance, mean = levels[CHANCE]["R@1"][0], rows.mean(name, seed=seed)
        low, high = 100 * mean.low, 100 * mean.high
        lines.append({"row": name, "seeds": len(rows.runs[name]), "R@1": 100 * mean.estimate, "low": low, "high": high,
                      "chance": chance, "at chance": bool(low <= chance <= high)})  # fmt: skip
    return pd.DataFrame(lines)
