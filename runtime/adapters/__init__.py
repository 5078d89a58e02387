"""LoRA adapters as experts of a bundle whose models share one base: read with numpy alone, for boards without torch.

lora_config.py     adapter_config.json: what each field means here, and which are refused
peft_names.py      the names of the tensors in an adapter's file
lora_adapter.py    an adapter's factors and norms
factor_layout.py   how factors lie in the inputs of a bundle's graph
unadapted.py       what a bundle keeps so that adapters can be added
factor_file.py     an expert's factors in a file that readers can map
expert_files.py    experts are added to a bundle's folder, and removed from it
"""
