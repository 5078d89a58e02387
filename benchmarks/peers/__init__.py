"""The same models and prompts in other runtimes, beside this one: `python -m benchmarks.peers`.

Each peer is one file (fusionroute, genai, llama, openvino, optimum, torch) that runs as a process in an environment of
its own, so it imports nothing here except `worker`, which answers requests, and `workaround`, which fuses models around
a runtime that cannot.

| file | |
|---|---|
| environments, models | the packages of each peer, and the models that it builds once |
| process | peers as processes, asked in turns |
| comparison | what is measured: one model alone, and fused systems |
| tables, chart | docs/performance.md and its picture |
"""
