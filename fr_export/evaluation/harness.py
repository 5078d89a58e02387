"""A bundle as a model of EleutherAI's lm-evaluation-harness: `lm_eval --model fusionroute --model_args bundle=DIR`.

The harness finds the class by its entry point in the group `lm_eval.models`. Releases up to 0.4.13 read no entry points:
there `python -m fusionroute.fr_export.evaluation.harness` is their command with this model among the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from fusionroute.runtime import FusionRuntime, UnavailableError
from fusionroute.runtime.chat import DEFAULT
from fusionroute.runtime.limits import FUSED, even
from fusionroute.runtime.prompt import chat_templates_of

MAX_GEN_TOKS = 256  # of tasks that name no limit, as with the harness's own models
TORCH_DEFAULT = "cuda:0"
Request = tuple[Any, list[int], list[int]]  # key of the answer in the harness's cache, context, continuation


class FusionRouteLM(TemplateLM):
    """Texts are read one at a time. A text that begins as the one before did is read from where they part."""

    def __init__(
        self,
        bundle: str,
        precision: str | None = None,
        device: str = "auto",
        lam: float | None = None,
        fusion: str | None = None,
        expert: str | None = None,
        threads: int | None = None,
        speculation: str = "off",
        max_length: int | None = None,
        verify_key: str | None = None,
        trusted: bool = False,
    ):
        """Model arguments are those of `FusionRuntime.load`; `expert` answers every token instead of the routed one.

        `max_length`: most tokens that are read at once, at most the bundle's context less one. Raises FusionError
        subclasses, UnavailableError for a bundle without tokenizer.
        """
        super().__init__()
        self.runtime = FusionRuntime.load(
            bundle,
            precision,
            device,
            lam=lam,
            fusion=fusion,
            threads=threads,
            speculation=speculation,
            verify_key=verify_key,
            trusted=trusted,
        )
        if self.runtime.tokenizer is None:
            raise UnavailableError(f"The bundle {bundle} has no tokenizer.json, which tasks need: export a system with one.")
        self._text, self._manifest, self._expert = self.runtime.tokenizer, self.runtime.bundle.manifest, expert
        self._templates = chat_templates_of(self.runtime.bundle)
        self._session = self.runtime.session(expert=expert)
        most = self.runtime.max_seq_len - 1  # the last token of a text is only predicted
        self.max_length = most if max_length is None else min(max_length, most)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> FusionRouteLM:
        """From the model arguments and what the harness adds: `--device`, and batch sizes, which change nothing here.

        The harness says cuda:0, a name of torch's, where nobody named a device: that is `auto`.
        """
        device = (additional_config or {}).get("device") or TORCH_DEFAULT
        named: dict[str, Any] = {} if device == TORCH_DEFAULT else {"device": device}
        return cls(**named | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> FusionRouteLM:
        """The same from `key=value,…`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The first end-of-sequence token."""
        return self._manifest.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning of sequence, else the end of one."""
        bos = self._manifest.bos_token
        return self._text.encode(bos, special=False)[0] if bos else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, by default with the BOS of tokenizer.json unless the text begins with it."""
        if add_special_tokens is None:
            bos = self._manifest.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self._text.encode(string, special=add_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        A text that is too long loses its beginning.
        """
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: requests[number][1])  # texts that begin alike follow each other
        for number in tqdm(order, desc="Running loglikelihood requests", disable=disable_tqdm):
            key, context, continuation = requests[number]
            room = max(self.max_length + 1 - len(continuation), 1)
            answers[number] = self._judge(context[-room:], continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[number])
        return answers

    def _judge(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Sum of the continuation's log-probabilities behind a context of at least one token; whether it is greedy."""
        session = self._session
        shared = sum(takewhile(bool, map(eq, session.token_ids, context)))
        # as the prefix cache does: no pass reads a single token, so figures do not depend on the order of the texts
        session.rewind(even(max(min(shared, len(context) - 2), 0)))
        session.append(context[len(session) :])
        total, greedy = 0.0, True
        rows = max(FUSED // self.runtime.vocab_size, 1)  # bounds memory
        for start in range(0, len(continuation), rows):
            ids = continuation[start : start + rows]
            logits = session.score(ids).logits
            chosen = logits[range(len(ids)), ids]
            peaks = logits.max(-1)
            normalisers = peaks + np.log(np.exp(logits - peaks[:, None]).sum(-1, dtype=np.float64))
            total += float((chosen - normalisers).sum())
            greedy &= bool((logits.argmax(-1) == ids).all())
        return total, greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length` tokens that each predict what none before did."""
        totals = []
        for (string,) in tqdm([each.args for each in requests], desc="Running rolling requests", disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1)
            judged = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows], disable_tqdm=True)
            totals.append(sum(total for total, _ in judged))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, an end of sequence, or `max_gen_toks`. A context that is too long loses its beginning.

        Generation arguments are those of `Sampling`; others raise InputError. Sampled texts take their seeds from
        Python's generator, which the harness seeds.
        """
        texts = []
        for context, given in tqdm([each.args for each in requests], desc="Running generate_until requests", disable=disable_tqdm):
            options = normalize_gen_kwargs(given, MAX_GEN_TOKS)
            until, most = [string for string in options.pop("until", []) if string], options.pop("max_gen_toks")
            if options.pop("do_sample"):
                options["seed"] = random.getrandbits(31)
            ids = self.tok_encode(context)[-max(self.max_length - most, 1) :]
            texts.append(self.runtime.generate(ids, most, stop=until, expert=self._expert, **options).text)
            self.cache_hook.add_partial("generate_until", (context, given), texts[-1])
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt` its last message is left open.

        Raises InputError where the template refuses the messages, UnavailableError without a template.
        """
        if self._templates is None:
            raise UnavailableError(f"The bundle {self.runtime.bundle.folder} has no chat_template.jinja: leave out --apply_chat_template.")
        return self._templates.render(chat_history, continue_final_message=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The bundle's template, which the harness records; None where none is asked for."""
        return self._templates.templates.get(DEFAULT) if chat_template and self._templates else None

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template by their content: the harness keeps prompts under it."""
        files = self._manifest.files
        return "-".join(["fusionroute", *(files[name].sha256[:12] for name in ("tokenizer.json", "chat_template.jinja") if name in files)])

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        runtime = self.runtime
        return {
            "bundle": runtime.bundle.folder.name,
            "precision": runtime.precision,
            "fusion": runtime.fusion,
            "lam": runtime.lam,
            "experts": runtime.expert_names,
        }


def main() -> None:
    """The harness's command line, with the model `fusionroute` registered whatever its release."""
    import lm_eval.models  # noqa: F401  registers the harness's own models, which it leaves out where there are others
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("fusionroute")(FusionRouteLM)
    cli_evaluate()


if __name__ == "__main__":
    main()
