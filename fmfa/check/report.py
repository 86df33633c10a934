"""What a data check says: one row a finding, and a verdict."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

SEVERITIES = ("fatal", "warning", "note", "ok")
EXAMPLES = 3

Finding = tuple[str, str, int, str]
"""Check, severity, count, detail."""


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What the check found.

    Attributes:
        dataset: the data set's name.
        table: one row a check, the worst first: `check`, `severity` ("fatal", "warning", "note", "ok"),
            `count` (int64, how many things were found) and `detail` (which, with the first few).
    """

    dataset: str
    table: pd.DataFrame

    @property
    def fatal(self) -> bool:
        """Whether training has to refuse this data set."""
        return bool((self.table["severity"] == "fatal").any())

    @property
    def verdict(self) -> str:
        """One plain sentence."""

        def names(severity):
            return self.table["check"][self.table["severity"] == severity].tolist()

        if fatal := names("fatal"):
            return f"{self.dataset} cannot be used for training: {', '.join(fatal)}."
        if warnings := names("warning"):
            return f"{self.dataset} can be used for training; look at the warnings first: {', '.join(warnings)}."
        return f"{self.dataset} can be used for training: no check found a fault."


def collect(dataset: str, findings: Iterable[Finding]) -> CheckReport:
    """Put findings into one table, the worst first, otherwise in the order in which they came."""
    table = pd.DataFrame(findings, columns=["check", "severity", "count", "detail"]).astype({"count": "int64"})
    rank = table["severity"].map(SEVERITIES.index)
    return CheckReport(dataset, table.iloc[np.argsort(rank, kind="stable")].reset_index(drop=True))


def finding(check: str, severity: str, found: Iterable[str], fine: str, advice: str = "") -> Finding:
    """A row that counts what was found and names the first few, or says `fine` when there is nothing."""
    found = list(found)
    if not found:
        return check, "ok", 0, fine
    more = f" and {len(found) - EXAMPLES:,} more" if len(found) > EXAMPLES else ""
    return (
        check,
        severity,
        len(found),
        "; ".join(found[:EXAMPLES]) + more + (f". {advice}." if advice else ""),
    )
