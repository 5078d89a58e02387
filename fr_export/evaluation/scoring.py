"""How near answers come to their references, beside exact match."""

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_ORDER = 4  # of BLEU's longest n-grams


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD defines it (arXiv:1606.05250), 1 where both have none.

    Words are runs of letters and digits, and single marks. Unlike SQuAD's script this keeps case, articles and punctuation, which the
    tasks ask for.
    """
    found, expected = (Counter(_WORD.findall(text)) for text in (answer, reference))
    if not found or not expected:
        return float(found == expected)
    return 2 * sum((found & expected).values()) / (sum(found.values()) + sum(expected.values()))


def bleu(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU from 0 to 100 (sacrebleu's defaults, arXiv:1804.08771) of the answers whose reference is a text, however short.

    A text has at least one 4-gram, counted as the score itself counts words: "42" has none. None where no reference is a text.
    Raises ModuleNotFoundError without sacrebleu.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    pairs = [
        (answer, reference)
        for answer, reference in zip(answers, references, strict=True)
        if len(metric.tokenizer(reference).split()) >= _ORDER
    ]
    if not pairs:
        return None
    return float(metric.corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score)
