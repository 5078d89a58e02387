"""Bundles on the Hugging Face hub. Needs the runtime and huggingface_hub alone: boards pull without torch.

push.py        a bundle to a repository, in one commit
pull.py        and back, its manifest first
model_card.py  README.md, made from the bundle's report
errors.py      what goes wrong with a hub, in one sentence each
"""
