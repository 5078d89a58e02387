"""How close answers come to their references, apart from exact match."""

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_ORDER = 4  # of BLEU's longest n-grams


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD defines it (arXiv:1606.05250), 1 where both have none.

    Words are runs of letters and digits, and single marks. Unlike SQuAD's script this respects case, articles and
    punctuation, which the tasks ask for.
    """
    words, expected = (Counter(_WORD.findall(text)) for text in (answer, reference))
    if not words or not expected:
        return float(words == expected)
    return 2 * sum((words & expected).values()) / (sum(words.values()) + sum(expected.values()))


def bleu(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU from 0 to 100 (sacrebleu's defaults, arXiv:1804.08771).

    Only answers whose reference has at least four words count, in the score's own count of words. None where no
    reference is that long. Raises ModuleNotFoundError without sacrebleu.
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
