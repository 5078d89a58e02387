"""Task accuracy of exported bundles, measured through the runtime. Needs no torch.

    questions.py  prompts with references, by domain      methods.py   the decoding methods that are compared
    reading.py    each model's outputs, computed once     sequence.py  selection among whole answers
    worker.py     one process's share of the questions    pool.py      many processes
    run.py        one bundle: questions → outcomes        study.py     many bundles: λ, report and pictures
    outcomes.py   answers per question, and their files   scoring.py   F1 and BLEU
    bootstrap.py  confidence intervals                    lambdas.py   λ over its range, and the best one
    routing.py, token_classes.py   which expert the tokens came from
    report.py, figures.py          numbers, tables, pictures

`python -m fr_export.evaluate BUNDLE` is the command.
"""

from fusionroute.fr_export.evaluation.outcomes import Outcomes, Results, load_results, save_results
from fusionroute.fr_export.evaluation.run import evaluate

__all__ = ["Outcomes", "Results", "evaluate", "load_results", "save_results"]
