"""The texts that exported systems are measured on, and what the activations look like where each expert really works."""
