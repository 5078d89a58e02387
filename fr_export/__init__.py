"""From checkpoints to a bundle: all that needs torch, transformers and onnx. One folder per stage, top to bottom.

export.py     the pipeline, which names the stages in order
commands/     the command lines
training/     how routers are made; evaluation/: how bundles are measured on tasks
verify/       every exported precision beside plain torch
bundle/       what is written, and where
precision/    how matrices are rounded, stored and read
graphs/       one trace per architecture and dialect, and what is done to it
checkpoints/  the Hugging Face folders that the user brings
families/     what is peculiar to a model family
hub/          bundles on the Hugging Face hub
tasks/        the synthetic tasks of the shipped systems
console/      progress on the terminal

A folder imports only those below it; `make lint` checks that.
"""
