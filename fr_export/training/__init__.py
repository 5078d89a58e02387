"""Training of routers (arXiv:2601.05106): supervised fine-tuning with a routing loss, then complementary DPO.

    recipe.py        stages, numbers, presets            request.py   what one run is asked to do
    sample_format.py what a line of data must look like  check_data.py a summary of data files
    data.py          JSONL → rows of token ids           batches.py   rows → batches → optimizer steps
    expert_cache.py  the frozen experts' log-probabilities, computed once
    router.py        the LM with its routing head        losses.py    the paper's losses, as pure functions
    adapters.py      LoRA adapters in the LM             size.py      adapters or all weights, where nobody says
    trainer.py       one stage, on transformers' Trainer muon.py      the Muon optimizer
    train.py         one run from checks to folder       folder.py    the folder it writes, and the one it works in
    init_router.py   a router with an untrained head
    curves.py        the picture of the loss             merge/       the baselines that merge experts without training

Doors: `python -m fr_export.training`, `python -m fr_export.training.merge`, `python -m fr_export.training.tiny`.
"""
