"""Pickled weights are never read, since reading them can run code. What converts them is said instead."""

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def conversion(folder: str) -> str:
    """What to do with a folder of pickled weights: the end of a sentence. transformers reads them without running code."""
    return (
        f'convert them to safetensors: python -c "import shutil; from transformers import AutoModelForCausalLM as M; s = {folder!r}; '
        "o = s + '-safetensors'; shutil.copytree(s, o, ignore=shutil.ignore_patterns('*.bin*', '*.pt*', '*.ckpt')); "
        f"M.from_pretrained(s, dtype='auto').save_pretrained(o)\", and name {folder}-safetensors instead."
    )
