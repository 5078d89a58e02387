"""Lossless speculation: cheap drafts of the next tokens, verified several at a time by the models that choose them."""
