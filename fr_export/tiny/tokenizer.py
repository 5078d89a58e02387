"""A byte-level BPE tokenizer of 512 entries, learnt from the tasks, with the special tokens of a family."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fusionroute.fr_export.tasks.domains import DOMAINS, draw_many
from fusionroute.fr_export.tasks.generators import WORDS
from fusionroute.fr_export.tiny.architectures import VOCABULARY, Architecture


def build_tokenizer(architecture: Architecture) -> Any:
    """Train the tokenizer (of transformers).

    Digits stay single; the post-processor puts the begin-of-sequence token in front.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| {4}| ?[^\s\p{L}\p{N}]+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(architecture.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{architecture.bos} $A",
        pair=f"{architecture.bos} $A {architecture.bos} $B",
        special_tokens=[(architecture.bos, tokenizer.token_to_id(architecture.bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=architecture.bos,
        eos_token=architecture.eos,
        pad_token=architecture.pad,
        chat_template=architecture.chat_template,
        model_max_length=architecture.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    texts = [f"{s.prompt}\n{s.answer}\n" for domain in DOMAINS for s in draw_many(domain, "train", 2000, seed=0)]
    roles = ["user\n", "model\n", "assistant\n\n", "system\n\n"] * 2000
    return [*texts, *roles, *(f"{w} {w} {w.upper()} {w.upper()}" for w in WORDS * 50)]
