"""The shipped systems: their checkpoints, and the recipe that trains them from nothing.

README.md says what they can do.

    gemma2/, llama3/   the checkpoints: router/ and experts/{math,code,instruction}/
    architectures.py   the tiny configurations of the two families, and how they write conversations
    tokenizer.py       a byte-level BPE of 512 entries, learnt from the tasks
    corpus.py          training files: samples of the tasks as JSON lines
    workshop.py        trains one base, three experts and the routers, each once
    ship.py            exports the routers, tunes λ, and puts the best system into its folder

`python -m fr_export.tiny --family gemma2` does all of it. The room stands above training, evaluation and the export,
and uses all three.
"""
