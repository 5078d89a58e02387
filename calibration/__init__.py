"""Calibration: which texts an exported system produces, and which activations enter each weight matrix on them.

    prompts.py            texts to calibrate on, and texts to report on
    side_by_side.py       the models of a bundle, each reading one token of several texts in a pass
    record.py             the system continues the prompts; which expert answered where
    serving_masks.py      from that: the positions that each model has to serve
    blockwise_forward.py  runs a model one decoder block at a time over all texts
    observers.py          statistics of one matrix's input, in memory that does not grow
    kernels.py            its loops over single values, which compiled.py has numba compile
    observe.py            the statistics of a whole model; an interrupted run goes on
    table.py              all texts and statistics of a system, in one file
    checksummed_file.py   safetensors files with a digest over everything they hold
    show.py, commands.py  `python -m calibration FILE`: what a table says

It needs the runtime alone, no torch and no exporter; to observe it takes numba, which the exporter's extra installs.
"""
