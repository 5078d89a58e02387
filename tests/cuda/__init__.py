"""The runtime's layer over CUDA, and TensorRT's backend above it, on a CUDA device: on the GPU that this machine has.

With `-p tests.support.host_cuda.plugin` they run on the host, behind NVIDIA's own binding.
`tests/runtime/tensorrt/test_binding.py` does so in a process of their own.
"""
