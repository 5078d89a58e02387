"""Sources that are no folder of safetensors with a whole model: each kind in files of its own.

lora.py           a PEFT LoRA folder: its tensors by module, its texts
merge_lora.py     an adapter over the tensors of its base
adapter_base.py   where its base lies
whole.py          which kind a whole model is; one line per kind
model_folder.py   a Hugging Face folder: safetensors, in floating point or quantised
quantised.py      which methods of quantisation are read; one file each reads them
grouped.py        integers in groups with scales and zero points, which these have in common
slow_tokenizer.py a tokenizer.json from a tokenizer.model
gguf.py           a GGUF file: gguf_file.py opens it, gguf_tensors.py reads rows, gguf_texts.py makes the files that it
                  lacks with gguf_config.py and gguf_tokenizer.py
low_rank.py       tensors made while they are read: base + scale · B·A, DoRA's magnitudes, replaced rows
"""
