"""Task accuracy of exported bundles, through the runtime: decoding methods, outcomes per prompt, metrics with intervals. Needs no torch."""

from fusionroute.fr_export.evaluation.outcomes import Outcomes, Results, load_results, save_results
from fusionroute.fr_export.evaluation.run import evaluate

__all__ = ["Outcomes", "Results", "evaluate", "load_results", "save_results"]
