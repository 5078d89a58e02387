"""TensorRT and TensorRT-RTX: engines built from a bundle's graphs, and run on a CUDA device.

Nothing is imported before it is used.
"""
