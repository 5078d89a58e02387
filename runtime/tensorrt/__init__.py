"""Engines of TensorRT and TensorRT-RTX on a CUDA device; nothing here imports cuda or tensorrt before a device is opened."""
