"""A simulated CUDA device with TensorRT: streams run in any order that events allow, engines run ONNX graphs.

`machine.Machine` holds the state, `cuda.Cuda` and `tensorrt.TensorRt` stand in for `cuda.bindings.runtime` and
`tensorrt_rtx`; `install.simulated` puts them in place, and the runtime runs on them unchanged.
"""
