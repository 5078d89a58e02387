"""Stage 5, the comparison: every exported precision beside plain torch, and whether it keeps its bound.

torch_reference.py      plain torch in fp32: full prefix, every model, no cache
engine_graph_on_cpu.py  graphs for TensorRT run on ONNX Runtime's CPU provider, as their engines run
half_on_cpu.py          what a GPU's half-precision graphs compute, on a CPU
compare.py, metrics.py  an exported bundle beside the reference, position by position
bounds.py               what each precision may lose
report.py               report.json, and the table on the terminal
"""
