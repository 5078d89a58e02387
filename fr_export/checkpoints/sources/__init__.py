"""Sources that are no folder of safetensors with a whole model: each kind in files of its own.

lora.py           a PEFT LoRA folder: its tensors, put over those of its base
lora_config.py    its adapter_config.json: what each field means here, and which are refused
low_rank.py       tensors made while they are read: base + scale · B·A, DoRA's magnitudes, replaced rows
"""
