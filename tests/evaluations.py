"""Evaluations of made-up runs, as `04_evaluate` leaves them."""

import json

import pandas as pd

from fmfa.study.results import write_evaluation


def evaluate(folder, tables, split="test", **record):
    """Write tables, by name without ending, beside those that the run's evaluation has already; None takes one away."""
    path = folder / f"evaluation-{split}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"metrics": []}
    kept = {name.removesuffix(".csv"): pd.read_csv(folder / name) for name in known.get("files", ())}
    tables = {name: table for name, table in (kept | tables).items() if table is not None}
    write_evaluation(folder, split, {"split": split.split("@")[0]} | known | record, tables)
