"""Pickled weights: they are never read, since reading one can run code. What converts them is said instead."""

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def conversion(source: str, name: str) -> str:
    """What to do with a folder or hub id that holds pickled weights only: the end of a sentence.

    transformers reads pickles with torch's `weights_only`, which runs no code. `name` begins that of the new folder.
    """
    out = f"{name}-safetensors"
    return (
        f'convert them to safetensors, which cannot run code: python -c "from transformers import AutoModelForCausalLM as M, '
        f"AutoTokenizer as T; s, o = {source!r}, {out!r}; M.from_pretrained(s, dtype='auto').save_pretrained(o); "
        f'T.from_pretrained(s).save_pretrained(o)", and name {out} instead.'
    )
