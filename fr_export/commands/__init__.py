"""The exporter's verbs, one file each: they read the command line, hand one request to a pipeline, and show its report.

    export.py    `python export.py`, `fusionroute export`
    train.py     `python -m fr_export.training`, `fusionroute train`
    evaluate.py  `python -m fr_export.evaluate`, `fusionroute evaluate`
    hub.py       `fusionroute push`, `fusionroute pull`
    optimum.py   `optimum-cli export fusionroute`

A new verb is one new file here and one line in the table of `main.py`.
"""
