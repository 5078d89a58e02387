"""The harness's model against log-probabilities computed from logits by hand. `make test-lm-eval` runs the harness itself."""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import InputError, UnavailableError

TEXTS = st.text("ab 12+=\n", min_size=1, max_size=12)


def windows(tokens: list[int], prefix: int, length: int, context_len: int) -> Iterator[tuple[list[int], list[int]]]:
    """Every token once, with at least one before it: what the harness cuts of texts that fit twice at most."""
    assert context_len == 1
    yield [prefix, *tokens[: length - 1]], tokens[:length]
    if tokens[length:]:
        assert len(tokens) <= 2 * length
        yield tokens[-length - 1 : -1], tokens[length:]


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """The module, with a stand-in of the few things that it imports where lm_eval is not installed."""
    if find_spec("lm_eval"):
        from fusionroute.fr_export.evaluation import harness

        yield harness
        return

    class TemplateLM:
        def __init__(self) -> None:
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def normalize(options: dict[str, Any], most: int) -> dict[str, Any]:
        return {"max_gen_toks": most, "do_sample": False} | options

    def disjoint(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        return pair[0][: len(pair[0]) - len(pair[1]) + 1], pair[1]

    def arguments(string: str) -> dict[str, str]:
        return dict(pair.split("=") for pair in string.split(","))

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.models": {},
        "lm_eval.models.utils": {"normalize_gen_kwargs": normalize},
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": disjoint,
            "simple_parse_args_string": arguments,
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
        from fusionroute.fr_export.evaluation import harness

        yield harness
        patch.delitem(sys.modules, harness.__name__)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def model(harness: Any, random_bundle: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    model = harness.FusionRouteLM(str(random_bundle), request.param, "cpu", lam=0.3, threads=1)
    yield model
    model.runtime.close()


def expected(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of the whole text's fused logits: the log-probability of the continuation, and whether greedy decoding gives it."""
    logits = model.runtime.score([*context, *continuation]).logits[len(context) - 1 : -1].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = range(len(continuation))
    return float(np.log(probabilities[rows, continuation]).sum()), bool((logits.argmax(-1) == continuation).all())


def tasks(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@given(contexts=st.lists(TEXTS, min_size=1, max_size=3), choices=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=10, deadline=None)
def test_choices_are_judged_as_their_whole_texts_are(model: Any, contexts: list[str], choices: list[str]) -> None:
    requests = [(None, model.tok_encode(context), model.tok_encode(choice, False)) for context in contexts for choice in choices]
    answers = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert answers == model._loglikelihood_tokens(requests[::-1], disable_tqdm=True)[::-1]  # bit for bit, in any order
    if model.runtime.precision == "fp32":
        for (total, greedy), (_, context, continuation) in zip(answers, requests, strict=True):
            exact, is_greedy = expected(model, context, continuation)
            assert total == pytest.approx(exact, abs=1e-4) and greedy == is_greedy


def test_the_greedy_answer_is_the_greedy_one(model: Any) -> None:
    context = model.tok_encode("12+30=")
    answer = model.runtime.generate(context, 5).token_ids
    (_, greedy), (_, other) = model._loglikelihood_tokens([(None, context, answer), (None, context, [*answer[:-1], 3])], disable_tqdm=True)
    assert greedy and not other


def test_a_text_that_is_too_long_loses_its_beginning(harness: Any, random_bundle: Path) -> None:
    model = harness.FusionRouteLM(str(random_bundle), "fp32", "cpu", threads=1, max_length=6)
    context, continuation = list(range(10, 20)), [30, 31, 32]
    ((total, _),) = model._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
    assert total == pytest.approx(expected(model, context[-4:], continuation)[0], abs=1e-4)
    assert model.generate_until(tasks(("a" * 30, {"max_gen_toks": 2})), disable_tqdm=True) == [
        model.runtime.generate(model.tok_encode("a" * 30)[-4:], 2).text
    ]
    ids = model.tok_encode("12+30=42")
    first, rest = expected(model, [model.prefix_token_id], ids[:6])[0], expected(model, ids[2:6], ids[6:])[0]
    assert model.loglikelihood_rolling(tasks(("12+30=42",)), disable_tqdm=True) == [pytest.approx(first + rest, abs=1e-4)]


def test_texts_end_as_tasks_ask(model: Any) -> None:
    ids = model.tok_encode("12+30=")
    whole = model.runtime.generate(ids, 12).text
    stop = whole[4]
    greedy, short, sampled = model.generate_until(
        tasks(
            ("12+30=", {"until": [stop, ""], "max_gen_toks": 12}),
            ("12+30=", {"max_gen_toks": 3, "until": []}),
            ("12+30=", {"do_sample": True, "temperature": 0.7, "top_k": 1, "max_gen_toks": 12}),
        ),
        disable_tqdm=True,
    )
    assert greedy == whole[: whole.index(stop)]
    assert short == model.runtime.generate(ids, 3).text
    assert sampled == whole  # of one candidate
    with pytest.raises(InputError, match=r"^Unknown option num_beams: expected some of "):
        model.generate_until(tasks(("12+30=", {"num_beams": 4})), disable_tqdm=True)


def test_conversations_are_texts(model: Any) -> None:
    history = [{"role": "user", "content": "12+30="}, {"role": "assistant", "content": "It is "}]
    assert model.apply_chat_template(history) == "<bos>user: 12+30=\nassistant: It is \n"
    assert model.apply_chat_template(history, add_generation_prompt=False) == "<bos>user: 12+30=\nassistant: It is "
    assert model.tok_encode("<bos>user") == model.tok_encode("user")  # one BOS
    assert model.chat_template(True).startswith("{{ bos_token }}") and model.chat_template() is None
    assert model.tokenizer_name.startswith("fusionroute-") and len(model.tokenizer_name) == 37


def test_model_arguments_are_those_of_the_runtime(harness: Any, random_bundle: Path) -> None:
    create = harness.FusionRouteLM.create_from_arg_string
    model = create(f"bundle={random_bundle},precision=int8", {"batch_size": 1, "device": "cuda:0"})
    assert model.get_model_info() | {"experts": []} == {
        "bundle": random_bundle.name, "precision": "int8", "fusion": "weighted", "lam": 0.5, "experts": []
    }  # fmt: skip
    assert harness.FusionRouteLM.create_from_arg_obj({"bundle": str(random_bundle), "lam": 0.25}, {"device": "cpu"}).runtime.lam == 0.25
    with pytest.raises(InputError, match=r"^Unknown device 'mps': use one of auto, cpu, "):
        create(f"bundle={random_bundle}", {"device": "mps"})


def test_a_bundle_without_tokenizer_is_refused(harness: Any, random_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(random_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(UnavailableError, match=r"has no tokenizer\.json, which tasks need: export a system with one\.$"):
        harness.FusionRouteLM(str(bundle), "fp32", "cpu")
