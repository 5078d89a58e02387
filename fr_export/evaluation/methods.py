"""The decoding methods that evaluations compare.

All are greedy; each chooses the logits that the next token comes from.

| name | next token |
|---|---|
| `fused` | FusionRoute as exported: router and routed expert (arXiv:2601.05106) |
| `lambda:X` | the same with λ = X in the weighted fusion |
| `token` | λ = 0: token-level selection without complementary logits, the paper's ablation |
| `router` | λ = 1: the router alone |
| `expert:NAME` | one expert alone |
| `collab` | the most certain expert of each token (Collab, arXiv:2503.21720, without its reward model) |
| `sequence` | of the experts' whole answers, the one with the highest mean log-probability per token |
| `sequence-routed` | the expert that the router chooses at the last token of the prompt answers alone |

The last two choose among finished answers: `fr_export.evaluation.sequence`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.fr_export.evaluation.reading import Ids, Place, TextReader
from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.backend import Output
from fusionroute.runtime.options import fusion_coefficients

SEQUENCE, SEQUENCE_ROUTED = "sequence", "sequence-routed"


@dataclass(frozen=True, slots=True)
class Answer:
    """One method's answer to a prompt.

    token_ids exclude the end-of-sequence token. experts: index of the expert behind each token, the end-of-sequence
    token included. logprob: mean log-probability per token, under the distribution that the method decoded from.
    """

    text: str
    token_ids: list[int]
    experts: list[int]
    logprob: float


class Draft:
    """An unfinished answer: its tokens so far, and how far each model has read them."""

    def __init__(self, readers: Sequence[TextReader], prompt: Ids):
        self._readers, self.ids = readers, prompt
        self._places: list[Place] = [reader.root for reader in readers]

    def read(self, model: int) -> Output:
        """Output of the router (0) or of expert `model` − 1 after the last token.

        logits float32 [V], routing float32 [n_experts] or None.
        """
        place = self._places[model]
        self._places[model], output = self._readers[model].read(place, self.ids[place.length :])
        return output


Method = Callable[[Draft], tuple[np.ndarray, int]]
"""Draft → the logits of the next token, float32 [V], and the index of the expert that it is attributed to."""


def fused(draft: Draft, router: float, expert: float) -> tuple[np.ndarray, int]:
    """FusionRoute (arXiv:2601.05106): router · logits of the router + expert · logits of the routed expert.

    The routed expert is the one with the highest routing score. A model whose weight is zero is not run.
    """
    routed = draft.read(0)
    assert routed.routing is not None
    choice = int(routed.routing.argmax())
    if not expert:
        return routed.logits, choice
    answered = draft.read(1 + choice).logits
    return np.float32(router) * routed.logits + np.float32(expert) * answered if router else answered, choice


def alone(draft: Draft, expert: int) -> tuple[np.ndarray, int]:
    """One expert answers every token."""
    return draft.read(1 + expert).logits, expert


def collab(draft: Draft, experts: int) -> tuple[np.ndarray, int]:
    """Every expert proposes its most likely token, and the most probable proposal wins. All experts read it."""
    rows = [draft.read(1 + expert).logits for expert in range(experts)]
    choice = int(np.argmax([_peak_logprob(row) for row in rows]))
    return rows[choice], choice


def method_named(name: str, experts: Sequence[str], fusion: str, lam: float) -> Method:
    """The method of a name in the table above. `fusion` and `lam` are those of `fused`.

    Raises InputError for an unknown name.
    """
    kind, colon, argument = name.partition(":")
    if name == "collab":
        return functools.partial(collab, experts=len(experts))
    if kind == "expert" and argument in experts:
        return functools.partial(alone, expert=list(experts).index(argument))
    if name == "fused":
        weights = fusion_coefficients(fusion, lam)
    elif name in ("router", "token"):
        weights = fusion_coefficients("weighted", float(name == "router"))
    elif kind == "lambda" and colon:
        try:
            weights = fusion_coefficients("weighted", float(argument))
        except ValueError as error:  # not a number, or one out of range
            raise InputError(f"'{name}' is no method: expected lambda:X with X from 0 to 1.") from error
    else:
        methods = ", ".join(
            ("fused", "router", "token", *(f"expert:{expert}" for expert in experts), "sequence", "sequence-routed", "collab")
        )
        raise InputError(f"Unknown method '{name}': expected some of {methods}, or lambda:X with X from 0 to 1.")
    return functools.partial(fused, router=weights[0], expert=weights[1])


def check(name: str, experts: Sequence[str]) -> None:
    """Raise InputError where `name` is not in the table above."""
    if name not in (SEQUENCE, SEQUENCE_ROUTED):
        method_named(name, experts, "weighted", 0.5)


class MethodDecoder:
    """Greedy decoding by any method, one prompt at a time. Methods share the outputs that models have computed."""

    def __init__(self, runtime: FusionRuntime):
        self.runtime = runtime
        guessing = runtime.precision == "fp32"
        models = (runtime.backend.router, *runtime.backend.experts)
        self._readers = [TextReader(model, runtime.vocab_size, runtime.backend.prefill_chunk, guessing) for model in models]
        self._ends = frozenset(runtime.bundle.manifest.eos_token_ids)
        self._prompt: Ids = ()

    def start(self, prompt: Sequence[int], guess: Sequence[int] = ()) -> None:
        """Begin with the token ids of a prompt.

        `guess` is an answer that some method is likely to give; it changes time, not answers. Raises InputError for a
        prompt that is empty or leaves no room in the context.
        """
        if not 0 < len(prompt) < self.runtime.max_seq_len:
            raise InputError(
                f"The prompt has {len(prompt)} tokens: expected at least 1, and fewer than the context of {self.runtime.max_seq_len}; "
                "shorten it or export with a larger --max-seq-len."
            )
        self._prompt = tuple(prompt)
        for reader in self._readers:
            reader.start(self._prompt, tuple(guess[: self.runtime.max_seq_len - len(prompt)]))

    def answer(self, method: Method, limit: int) -> Answer:
        """The method's answer.

        It ends at an end-of-sequence token, after `limit` tokens, or where the context is full.
        """
        draft = Draft(self._readers, self._prompt)
        experts: list[int] = []
        total = 0.0
        for _ in range(min(limit, self.runtime.max_seq_len - len(self._prompt))):
            row, expert = method(draft)
            total += _peak_logprob(row)
            experts.append(expert)
            token = int(row.argmax())
            if token in self._ends:
                break
            draft.ids += (token,)
        ids = list(draft.ids[len(self._prompt) :])
        return Answer(self.runtime.decode(ids), ids, experts, total / len(experts))


def _peak_logprob(row: np.ndarray) -> float:
    """Log-probability of the most likely token, computed in float64."""
    return -float(np.log(np.exp((row - row.max()).astype(np.float64)).sum()))
