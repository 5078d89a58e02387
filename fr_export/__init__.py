"""Checkpoint → graph → precision → bundle: everything that needs torch, transformers and onnx."""
