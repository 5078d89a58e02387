"""Attacks that work on software that does not look: each is made here, and refused in the sentence that is written out."""
