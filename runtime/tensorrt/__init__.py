"""TensorRT and TensorRT-RTX: engines are built here from a bundle's graphs, with either library alone. Nothing is imported before it is used."""
