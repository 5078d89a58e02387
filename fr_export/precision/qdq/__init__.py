"""Weights between QuantizeLinear and DequantizeLinear: ONNX's own operators, which TensorRT and Optimum read."""
