"""What only a machine with an NVIDIA GPU can tell, in one report: `make gpu-check`.

| file | checks |
|---|---|
| engines | engines are built for this GPU, and their weights are in its memory only once |
| logits | graphs on ONNX Runtime, and engines on the GPU, give the logits of the CPU backend in fp32 |
| texts | greedy texts equal those of the CPU; captured graphs and evicted experts change none |
| speed | INT8 against half precision |

`checks` says what runs on which bundle and in which order, `outcome` what a check returns, `report` writes the page.
"""
