"""The synthetic tasks of the shipped systems. Training draws samples from them, evaluation draws prompts.

generators.py  a random generator → a prompt and its only right answer
domains.py     the three domains, and prompts that need two of them
mistakes.py    wrong answers that look right
"""
