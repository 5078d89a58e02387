"""Stage 1, what the user brings: Hugging Face folders, checked to belong together before any work is done.

hub.py              a source → a local folder (downloads safetensors and text files only)
config_file.py      its config.json as plain JSON, and the family that it names
checkpoint.py       one causal LM on disk: config, tokenizer, and for a router the routing head
weights.py          its tensors, read lazily, slice by slice
tensors.py          where one tensor comes from
stored_blocks.py    tensors that are stored in quantised blocks
sources/            sources that are no folder of safetensors with a whole model
source_report.py    what a checkpoint was made from, for the report
torch_model.py      a checkpoint of any source as a transformers model
system.py           a router and its experts as one system
deltas.py           what sets an expert apart from the router, where both adapt one base
fusion_settings.py  how logits are fused: the command line, the router's fusion.json, or the default
"""
