"""A byte-level BPE tokenizer of 512 entries, learnt from the domains, with a family's special tokens."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fusionroute.fr_export.tasks.domains import DOMAINS, draw_many
from fusionroute.fr_export.tasks.generators import WORDS
from fusionroute.fr_export.training.architectures import VOCABULARY, Family


def build_tokenizer(family: Family) -> Any:
    """Train the tokenizer: digits stay single, and the post-processor puts the begin-of-sequence token in front."""
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
        special_tokens=list(family.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{family.bos} $A",
        pair=f"{family.bos} $A {family.bos} $B",
        special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        chat_template=family.chat_template,
        model_max_length=family.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    texts = [f"{s.prompt}\n{s.answer}\n" for domain in DOMAINS for s in draw_many(domain, "train", 2000, seed=0)]
    roles = ["user\n", "model\n", "assistant\n\n", "system\n\n"] * 2000
    return [*texts, *roles, *(f"{w} {w} {w.upper()} {w.upper()}" for w in WORDS * 50)]
