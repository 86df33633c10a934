"""What evaluated runs leave behind, and the tables and figures that compare them."""

from fmfa.results.alignment import correlation_table, counterfactual_table, grounding_table
from fmfa.results.claims import SHIPPED, claims_in_short, claims_table
from fmfa.results.comparisons import rows_paired_table, shuffled_table
from fmfa.results.curves import grid_table, sensitivity_table
from fmfa.results.domains import cross_domain_table
from fmfa.results.figures import (
    plot_against_retrieval,
    plot_claims,
    plot_comparison,
    plot_domains,
    plot_grid,
    plot_power,
    plot_sensitivity,
)
from fmfa.results.files import METRICS, export_results, read_queries, save_evaluation
from fmfa.results.names import results_split, trained_on
from fmfa.results.parameters import CompareParameters, EvaluateParameters
from fmfa.results.power import components_table, gains_table, power_table
from fmfa.results.selection import epochs_table, score_epochs, selection_table
from fmfa.results.tables import published_table, readable, result_table, run_results, seeds_table, tuning_table

__all__ = [
    "METRICS",
    "SHIPPED",
    "CompareParameters",
    "EvaluateParameters",
    "claims_in_short",
    "claims_table",
    "components_table",
    "correlation_table",
    "counterfactual_table",
    "cross_domain_table",
    "epochs_table",
    "export_results",
    "gains_table",
    "grid_table",
    "grounding_table",
    "plot_against_retrieval",
    "plot_claims",
    "plot_comparison",
    "plot_domains",
    "plot_grid",
    "plot_power",
    "plot_sensitivity",
    "power_table",
    "published_table",
    "read_queries",
    "readable",
    "result_table",
    "results_split",
    "rows_paired_table",
    "run_results",
    "save_evaluation",
    "score_epochs",
    "seeds_table",
    "selection_table",
    "sensitivity_table",
    "shuffled_table",
    "trained_on",
    "tuning_table",
]
