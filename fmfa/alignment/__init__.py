"""Are words aligned with the right pixels? Maps of phrases, compared with SimPEDES' true parts."""

from fmfa.alignment.grounding import measure_grounding

__all__ = ["measure_grounding"]
