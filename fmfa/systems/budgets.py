"""What the shipped weights cost to pre-train, side by side."""

import json
from pathlib import Path

import pandas as pd

from fmfa.data.datasets import DATA
from fmfa.pretrain import pretraining_budget


def pretraining_table(folder: str | Path = DATA) -> pd.DataFrame:
    """What each pre-trained tiny model saw and cost, read from the records beside the weights.

    Args:
        folder: where the records `tiny_*.json` lie.

    Returns:
        One row a model: pairs seen, parameters (trained, and kept for retrieval), operations a pair and in all (forward
        and backward, a multiplication and an addition as two), time, and R@1 in percent among 512 held-out pairs. A
        budget that a record lacks is counted anew.
    """
    rows = {}
    for path in sorted(Path(folder).glob("tiny_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "curve" not in record:
            continue  # a configuration
        method, end = record.get("settings", {}).get("method", "clip"), record["curve"][-1]
        budget = record.get("budget") or pretraining_budget(method)
        operations = budget["training_flops_a_pair"]
        rows[path.stem] = {
            "pairs seen": f"{end['pairs']:,}",
            "trained parameters": f"{budget['parameters']:,}",
            "kept for retrieval": f"{budget['retrieval_parameters']:,}",
            "MFLOP a pair": f"{operations / 1e6:,.0f}",
            "TFLOP in all": f"{operations * end['pairs'] / 1e12:,.0f}",
            "minutes": f"{record['seconds'] / 60:.0f} on {record['device']}",
            "held-out R@1 (%)": f"{100 * end['held_out_R@1']:.1f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("weights")
