"""Dialects of ONNX: what a traced model's linear, norm and attention calls become for each kind of runtime."""
