"""Merging: experts of one base become a single model, without training.

These are baselines that FusionRoute is compared with.

    formulas.py  average, task arithmetic, DARE, on arrays
    models.py    the same on whole checkpoints

`python -m fr_export.training.merge` is the command.
"""
