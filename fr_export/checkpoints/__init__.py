"""Stage 1, what the user brings: Hugging Face folders, checked to belong together before any work is done.

hub.py              a source → a local folder (downloads safetensors and text files only)
config_file.py      its config.json as plain JSON, and the family that it names
checkpoint.py       one causal LM on disk: config, tokenizer, and for a router the routing head
weights.py          its tensors, read lazily from safetensors, slice by slice
system.py           a router and its experts as one system
fusion_settings.py  how logits are fused: the command line, the router's fusion.json, or the default
"""
