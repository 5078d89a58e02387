"""Stage 5, the comparison of every exported precision with plain torch.

measure.py              every variant that this machine runs, compared
torch_reference.py      plain torch in fp32: full prefix, every model, no cache
engine_graph_on_cpu.py  graphs for TensorRT run on ONNX Runtime's CPU provider, as their engines run
half_on_cpu.py          what a GPU's half-precision graphs compute, on a CPU
compare.py, metrics.py  one variant beside the reference, position by position
bounds.py               which precisions miss their bounds
report.py               report.json, and the tables on the terminal
"""
