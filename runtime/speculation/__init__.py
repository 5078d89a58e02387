"""Lossless speculation: cheap guesses at the next tokens, verified several at a time by the models that would have chosen them."""
