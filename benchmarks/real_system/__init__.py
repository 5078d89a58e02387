"""A FusionRoute system of a real language model: three LoRA experts and a LoRA router of SmolLM2-135M, on two cores.

    tasks.py             one prompt with its answer and its check; which split it belongs to
    math_problems.py     sums in words, in steps; the last number counts
    library_code.py      functions of Python's standard library; the next line counts
    formats.py           answers in a format that a program can check; and sums that ask for a format
    mistakes.py          wrong answers that look right, for preferences
    corpus.py            training files and test prompts
    workshop.py          the experts, the router and the baselines, each trained once
    readings.py          right answers, read by every model: perplexity of every method, λ and routing
    measure.py           answers that are generated: accuracy of every method and precision
    report.py            the tables of docs/real-system.md

`python -m benchmarks.real_system --help` is the command. docs/real-system.md says what came out.
"""
