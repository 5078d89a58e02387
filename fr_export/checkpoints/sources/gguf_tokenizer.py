"""tokenizer.json from the vocabulary in a GGUF file.

A GGUF holds tokens, their kinds, merges or scores, and the name of a pre-tokenizer. What this name stands for is
llama.cpp's knowledge: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fusionroute.fr_export.checkpoints.sources.gguf_file import GgufFile
from fusionroute.runtime.errors import InputError

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are matched whole in the text
SPACE = "▁"  # how sentencepiece writes a space

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
LLAMA3 = rf"{ENGLISH}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{ENGLISH}|{WORDS}|\p{{N}}|{REST}"
TEKKEN = r"|".join([*CASED, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"])
GPT4O = r"|".join([f"{CASED[0]}{ENGLISH}?", f"{CASED[1]}{ENGLISH}?", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"])


class Splitting(NamedTuple):
    """How text is cut before merging: by `pattern`, or as GPT-2 did (None), with each digit for itself if `digits`.

    `whole`: a piece that is a token is not merged from its parts. `bos`: texts begin with BOS unless the file says no.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


LIKE_LLAMA3 = Splitting(LLAMA3, whole=True, bos=True)
SPLITTINGS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt", "exaone4"), Splitting()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), Splitting(digits=True)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), LIKE_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), Splitting(QWEN2, nfc=True)),
    "tekken": Splitting(TEKKEN, whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splitting(GPT4O)),
}


def tokenizer_of(where: str, gguf_file: GgufFile) -> Tokenizer | None:
    """The tokenizer, or None for a file without one.

    Raises InputError for a kind of tokenizer, or of pre-tokenizer, that cannot be rebuilt.
    """
    kind = gguf_file.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in BUILDERS:
        raise InputError(f"{where} has a tokenizer of the kind '{kind}', which cannot be rebuilt: put its tokenizer.json beside it.")
    tokens: list[str] = gguf_file.get("tokenizer.ggml.tokens")
    tokenizer, bos = BUILDERS[kind](where, gguf_file, tokens)
    kinds = gguf_file.get("tokenizer.ggml.token_type", [])
    marked = [(token, each) for token, each in zip(tokens, kinds, strict=False) if each in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=each == CONTROL, normalized=False) for token, each in marked])
    add_ends(tokenizer, gguf_file, tokens, bos)
    return tokenizer


def byte_level(where: str, gguf_file: GgufFile, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A BPE over bytes, as GPT-2, Llama 3, Qwen and SmolLM have it; and whether texts begin with BOS by default."""
    name = gguf_file.get("tokenizer.ggml.pre", "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise InputError(
            f"{where} has the pre-tokenizer '{name}', which is not known here: put the tokenizer.json of the model it was made from beside it."
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in gguf_file.get("tokenizer.ggml.merges", []))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    if splitting.pattern is not None:
        first: Any = pre_tokenizers.Split(Regex(splitting.pattern), "isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True) if splitting.digits else None
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, in_bytes]) if first else in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.bos


def sentencepiece(where: str, gguf_file: GgufFile, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A sentencepiece BPE with bytes for unknown characters, as Llama 2, Mistral and Gemma have it. BOS is the default.

    llama.cpp merges by the score of the merged token; merges in the order of these scores do the same.
    """
    gemma = gguf_file.architecture.startswith("gemma")
    # the converter writes runs of spaces as such, where the vocabulary has ▁
    pieces = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    # Gemma's scores do not follow the order of its merges, its ids do
    scores = [-index for index in range(len(pieces))] if gemma else gguf_file.get("tokenizer.ggml.scores")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    unknown = gguf_file.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(vocabulary, merges_of(vocabulary, scores), unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    prefixed = gguf_file.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer, True


def merges_of(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third: those of the highest score first, of one token the longest left first.

    transformers writes the merges of such vocabularies in the same order (`generate_merges`).
    """
    ranked = []
    for token, index in vocabulary.items():
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], -cut, cut - len(token), left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in ranked]


def add_ends(tokenizer: Tokenizer, gguf_file: GgufFile, tokens: Sequence[str], bos: bool) -> None:
    """Let texts begin with BOS and end with EOS where the file, or else its kind of tokenizer, says so."""
    template, special = ["$A"], {}
    for key, default in (("bos", bos), ("eos", False)):
        index = gguf_file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and gguf_file.get(f"tokenizer.ggml.add_{key}_token", default):
            special[tokens[index]] = index
            template.insert(0 if key == "bos" else len(template), tokens[index])
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(template), special_tokens=list(special.items()))


BUILDERS = {"gpt2": byte_level, "llama": sentencepiece}
