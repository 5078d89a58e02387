"""The public interface: forms of generation agree, options do what they say, bad arguments are refused."""

import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import ClosedError, FusionError, FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.options import RuntimeOptions
from tests.support.bundles import copy_with_ends

PROMPT = "12+30= and more"


@pytest.fixture(params=["int8", "fp32"])
def rt(request: pytest.FixtureRequest, bundles: list[Path]) -> Iterator[FusionRuntime]:
    """The first bundle in both precisions; one test below runs all bundles."""
    with FusionRuntime.load(bundles[0], precision=request.param) as runtime:
        yield runtime


def test_all_forms_of_generation_agree_on_every_bundle(bundles: list[Path]) -> None:
    for folder in bundles:
        with FusionRuntime.load(folder) as rt:
            result = rt.generate(PROMPT, max_new_tokens=24)
            streamed = list(rt.stream(PROMPT, max_new_tokens=24))
            session = rt.session()
            session.append(rt.encode(PROMPT))
            stepped = [session.step() for _ in range(len(result.token_ids))]
            assert result.token_ids == [t.id for t in streamed] == [t.id for t in stepped]
            assert result.experts == [t.expert for t in streamed] == [t.expert for t in stepped]
            assert result.logprobs == pytest.approx([t.logprob for t in streamed])
            assert result.text == "".join(t.text for t in streamed) == rt.decode(result.token_ids)
            assert set(result.experts) <= set(rt.expert_names)
            for token in streamed:
                assert token.routing.shape == (len(rt.expert_names),)
                assert rt.expert_names[int(token.routing.argmax())] == token.expert


def test_rewind_forgets(rt: FusionRuntime) -> None:
    ids = rt.encode(PROMPT)
    fresh, used = rt.session(), rt.session()
    fresh.append(ids)
    expected = [fresh.step().id for _ in range(10)]
    used.append([*ids, *expected[:3], 77, 78, 79])
    for _ in range(5):
        used.step()
    used.rewind(len(ids) + 3)
    assert len(used) == len(ids) + 3
    # the pass before the rewind was another one, and int8 may round differently: only fp32 is compared
    continued = [used.step().id for _ in range(7)]
    if rt.precision == "fp32":
        assert continued == expected[3:]


def test_an_expert_that_is_not_chosen_never_runs(rt: FusionRuntime) -> None:
    session = rt.session()
    session.append(rt.encode(PROMPT))
    total = len(session)
    first = session.step()
    for name, lag in session.lags.items():
        assert lag == (1 if name == first.expert else total + 1)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the models that run from now on."""
    names: set[str] = set()
    forward = OrtCache.forward

    def noted(cache: OrtCache, *arguments: Any) -> Any:
        names.add(cache._model.model.name)
        return forward(cache, *arguments)

    monkeypatch.setattr(OrtCache, "forward", noted)
    return names


def test_a_pinned_expert_answers_every_token(rt: FusionRuntime) -> None:
    ids, free = rt.encode(PROMPT), rt.generate(PROMPT, 24)
    for name in rt.expert_names:
        pinned = rt.generate(PROMPT, 24, expert=name)
        assert set(pinned.experts) == {name}
        session = rt.session(expert=name)
        session.append(ids)
        assert [session.step().id for _ in pinned.token_ids] == pinned.token_ids
        assert session.lags == {other: 1 if other == name else len(session) for other in rt.expert_names}
        if set(free.experts) == {name}:
            assert pinned.token_ids == free.token_ids
    assert len({tuple(rt.generate(PROMPT, 24, expert=name).token_ids) for name in rt.expert_names}) == len(rt.expert_names)


def test_models_without_a_say_do_not_run(bundles: list[Path], ran: set[str]) -> None:
    """What remains is the logits of one model alone, which a model that reads the whole text anew gives too."""
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids, name = rt.encode(PROMPT), rt.expert_names[1]
        tokens = list(rt.stream(PROMPT, 8, lam=1.0))
        pinned = rt.generate(PROMPT, 8, lam=1.0, expert=name)
        rt.score(ids, lam=1.0)
        assert ran == {"router"}
        assert all(token.expert == rt.expert_names[int(token.routing.argmax())] for token in tokens)
        assert pinned.token_ids == [token.id for token in tokens] and set(pinned.experts) == {name}
        assert pinned.token_ids == anew(rt.backend.router, ids, 8)
        for number, name in enumerate(rt.expert_names):
            ran.clear()
            tokens = list(rt.stream(PROMPT, 8, lam=0.0, expert=name))
            assert ran == {name}
            assert [token.id for token in tokens] == anew(rt.backend.experts[number], ids, 8)
            assert all(np.isnan(token.routing).all() and token.routing.shape == (len(rt.expert_names),) for token in tokens)
        # both have a say
        for options in ({"lam": 0.0}, {"lam": 0.0, "expert": name, "fusion": "additive"}, {"expert": name}):
            ran.clear()
            rt.generate(PROMPT, 8, **options)
            assert "router" in ran and len(ran) > 1


def anew(model: Any, ids: list[int], count: int) -> list[int]:
    """Greedy tokens of one model that reads the whole text at every step."""
    tokens: list[int] = []
    for _ in range(count):
        text = [*ids, *tokens]
        tokens.append(int(model.cache().forward(text, (len(text) - 1,)).logits[0].argmax()))
    return tokens


def test_the_router_reads_what_it_missed(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        session, fresh = (rt.session(expert=rt.expert_names[0]) for _ in range(2))
        session.append(rt.encode(PROMPT))
        for _ in range(5):
            session.step(lam=0.0)
        fresh.append(session.token_ids)
        late, early = session.step(lam=0.5), fresh.step(lam=0.5)
        assert late.id == early.id and np.allclose(late.routing, early.routing, atol=1e-4) and late.logprob == pytest.approx(early.logprob)


def test_a_seed_gives_the_same_text_again(rt: FusionRuntime) -> None:
    options = {"max_new_tokens": 24, "temperature": 1.5, "top_p": 0.95}
    first, again, other = (rt.generate(PROMPT, seed=seed, **options) for seed in (5, 5, 6))  # type: ignore[arg-type]
    assert first == again
    assert first.token_ids != other.token_ids


def test_sampling_draws_from_the_fused_distribution(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        row = rt.score(ids, positions=[len(ids) - 1]).logits[0].astype(np.float64) / 0.7
        top = np.sort(np.argsort(-row)[:8])
        expected = np.exp(row[top] - row[top].max())
        expected /= expected.sum()
        session = rt.session()
        session.append(ids)
        counts = np.zeros(rt.vocab_size)
        for _ in range(1500):
            counts[session.step(temperature=0.7, top_k=8, seed=1).id] += 1
            session.rewind(len(ids))
        assert counts.sum() == counts[top].sum()
        assert 0.5 * np.abs(counts[top] / counts.sum() - expected).sum() < 0.05


def test_repetition_penalty_is_that_of_the_paper(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        for _ in range(8):
            row = rt.score(ids, positions=[len(ids) - 1]).logits[0]
            seen = np.unique(ids)
            row[seen] = np.where(row[seen] > 0, row[seen] / 1.8, row[seen] * 1.8)
            result = rt.generate(ids, max_new_tokens=1, repetition_penalty=1.8)
            assert [*result.token_ids, *rt.bundle.manifest.eos_token_ids][0] == row.argmax()
            ids.append(int(row.argmax()))


def test_lambda_and_mode(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        router, expert, between = (rt.score(ids, lam=lam).logits for lam in (1.0, 0.0, 0.3))
        assert np.allclose(between, 0.3 * router + 0.7 * expert, atol=1e-4)
        assert not np.allclose(router, expert, atol=0.1)
        additive = rt.score(ids, fusion="additive").logits
        assert np.allclose(additive, router + expert, atol=1e-4)
        greedy = rt.generate(ids, 16, fusion="additive")
        assert greedy.token_ids == rt.generate(ids, 16, fusion="weighted", lam=0.5).token_ids


def test_scores_limited_to_positions(rt: FusionRuntime) -> None:
    ids = rt.encode(PROMPT)
    full = rt.score(ids)
    assert full.logits.shape == (len(ids), rt.vocab_size)
    asked = [5, 2, 5, len(ids) - 1]
    some = rt.score(ids, positions=asked)
    assert np.allclose(some.logits, full.logits[asked], atol=1e-4 if rt.precision == "fp32" else 0.3)
    assert (some.experts == full.experts[asked]).all()
    assert some.routing.shape == (4, len(rt.expert_names))
    assert rt.score(ids, positions=[]).logits.shape == (0, rt.vocab_size)


def test_scores_do_not_depend_on_how_many_rows_are_fused_at_once(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        whole = rt.score(ids).logits
        monkeypatch.setattr("fusionroute.runtime.limits.FUSED", 2 * rt.vocab_size)
        assert (rt.score(ids).logits == whole).all()


def test_logprob_is_of_the_fused_distribution_at_temperature_1(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids = rt.encode(PROMPT)
        tokens = list(rt.stream(ids, 12, temperature=1.3, repetition_penalty=1.2, seed=0))
        rows = rt.score([*ids, *(t.id for t in tokens)]).logits.astype(np.float64)
        for place, token in enumerate(tokens):
            row = rows[len(ids) - 1 + place]
            expected = row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum())
            assert token.logprob == pytest.approx(expected, abs=1e-3)


def test_why_a_text_ends(rt: FusionRuntime) -> None:
    long = rt.generate(PROMPT, max_new_tokens=10)
    assert long.finish_reason == "length" and len(long.token_ids) == 10
    stop = long.text[3:5]
    stopped = rt.generate(PROMPT, max_new_tokens=10, stop=stop)
    assert stopped.finish_reason == "stop" and stopped.text == long.text[: long.text.index(stop)]
    event = threading.Event()
    stream = rt.stream(PROMPT, max_new_tokens=10, cancel=event)
    next(stream)
    event.set()
    assert len(list(stream)) <= 1 and stream.finish_reason == "cancelled"
    closed = rt.stream(PROMPT, max_new_tokens=10, stop=None)
    next(closed)
    closed.close()
    assert closed.finish_reason == "cancelled" and not list(closed)
    full = rt.generate([5] * (rt.max_seq_len - 3), max_new_tokens=10)
    assert full.finish_reason == "length" and len(full.token_ids) <= 3


def test_the_end_of_sequence_token_ends_and_is_left_out(bundles: list[Path], tmp_path: Path) -> None:
    with FusionRuntime.load(bundles[0]) as rt:
        long = rt.generate(PROMPT, max_new_tokens=10)
    end = long.token_ids[4]
    with FusionRuntime.load(copy_with_ends(bundles[0], tmp_path / "bundle", [end])) as rt:
        for _ in range(2):  # by a new decoder and by one that the first text used
            ended = rt.generate(PROMPT, max_new_tokens=10)
            assert ended.finish_reason == "stop"
            assert ended.token_ids == long.token_ids[: long.token_ids.index(end)]


def test_ids_that_are_no_whole_numbers_are_refused_not_cut(rt: FusionRuntime) -> None:
    session = rt.session()
    with pytest.raises(InputError, match="not all whole numbers"):
        session.append([1, 2.5])  # type: ignore[list-item]
    session.append(np.array([1, 2], np.int32))
    assert session.token_ids == [1, 2]


def test_messages_use_the_chat_template(rt: FusionRuntime) -> None:
    ids = rt.prompt_ids([{"role": "user", "content": "hi"}])
    manifest = rt.bundle.manifest
    assert manifest.bos_token is not None
    assert "user" in rt.tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[union-attr]
    assert ids.count(rt.encode("")[0]) == 1, "one BOS, from the template"


BAD = {
    "empty prompt": ({"prompt": []}, InputError, "empty"),
    "prompt of the wrong kind": ({"prompt": [1.5]}, InputError, "str, a list of token ids, or a list of"),
    "prompt longer than the context": ({"prompt": [5] * 5000}, InputError, r"5000 tokens.*context of \d+.*shorten it"),
    "token outside the vocabulary": ({"prompt": [10**6]}, InputError, "Token id 1000000 is outside the vocabulary"),
    "negative token": ({"prompt": [3, -1]}, InputError, "Token id -1 is outside"),
    "temperature": ({"prompt": "a", "temperature": -1.0}, InputError, "temperature is -1.0"),
    "top-p": ({"prompt": "a", "top_p": 1.5}, InputError, "top_p is 1.5"),
    "unknown option": ({"prompt": "a", "temprature": 1.0}, InputError, "temprature"),
    "fusion": ({"prompt": "a", "fusion": "sum"}, InputError, "Unknown fusion 'sum'"),
    "lambda": ({"prompt": "a", "lam": 1.5}, InputError, "lam=1.5 is out of range"),
    "expert": ({"prompt": "a", "expert": "history"}, InputError, "Unknown expert 'history': use one of expert0, expert1"),
    "max_new_tokens": ({"prompt": "a", "max_new_tokens": 0}, InputError, "max_new_tokens=0"),
    "stop": ({"prompt": "a", "stop": ""}, InputError, "stop string"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_sentence(name: str, bundles: list[Path]) -> None:
    arguments, kind, sentence = BAD[name]
    with FusionRuntime.load(bundles[0]) as rt, pytest.raises(kind, match=sentence) as caught:
        rt.generate(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bad_sessions_and_scores(rt: FusionRuntime) -> None:
    session = rt.session()
    with pytest.raises(InputError, match="Unknown expert 'history'"):
        rt.session(expert="history")
    with pytest.raises(InputError, match="holds no tokens"):
        session.step()
    with pytest.raises(InputError, match="Unknown option temprature"):
        session.step(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="Cannot rewind to 3 tokens"):
        session.rewind(3)
    with pytest.raises(InputError, match=r"Position 9 is outside the 2 tokens"):
        rt.score([3, 4], positions=[9])
    session.append([3] * rt.max_seq_len)
    with pytest.raises(InputError, match="is full"):
        session.step()


LOADS = {
    "precision": ({"precision": "int2"}, UnavailableError, "no precision 'int2'.*--precision int2"),
    "device": ({"device": "tpu"}, InputError, "Unknown device 'tpu'"),
    "backend": ({"device": "cuda"}, UnavailableError, "no graphs for ort:cuda"),
    "threads": ({"threads": 0}, InputError, "threads=0"),
    "lambda": ({"lam": -0.1}, InputError, "lam=-0.1"),
}


@pytest.mark.parametrize("name", LOADS)
def test_bad_loads(name: str, bundles: list[Path]) -> None:
    arguments, kind, sentence = LOADS[name]
    with pytest.raises(kind, match=sentence):
        FusionRuntime.load(bundles[0], **arguments)  # type: ignore[arg-type]


REFUSED: dict[str, dict[str, Any]] = {
    "λ above 1": {"lam": 2},
    "λ that is no number": {"lam": "half"},
    "λ that is not a number": {"lam": float("nan")},
    "fusion": {"fusion": "sum"},
    "device": {"device": "nonsense"},
    "catch_up": {"catch_up": "eager"},
    "speculation": {"speculation": "on"},
    "no threads": {"threads": 0},
    "threads in parts": {"threads": 1.5},
    "threads as an answer": {"threads": True},
    "prefix_cache": {"prefix_cache": -1},
    "prefix_cache in parts": {"prefix_cache": 0.5},
    "expert_memory": {"expert_memory": 0},
    "endless expert_memory": {"expert_memory": float("inf")},
    "background with expert_memory": {"catch_up": "background", "expert_memory": 1 << 30},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_are_refused_before_anything_is_opened(name: str, tmp_path: Path) -> None:
    """The folder does not exist, which only whoever opens it can tell."""
    option = next(iter(REFUSED[name]))
    with pytest.raises(InputError, match=option) as caught:
        FusionRuntime.load(tmp_path / "nothing", **REFUSED[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("prefix_cache", False, 0),
        ("prefix_cache", True, 1),
        ("prefix_cache", np.int64(3), 3),
        ("threads", 2.0, 2),
        ("threads", np.int32(2), 2),
        ("threads", np.float32(2), 2),
        ("expert_memory", 1e9, 10**9),
        ("fusion", "", None),
    ],
)
def test_options_take_other_spellings_of_a_value(name: str, value: Any, expected: int | None) -> None:
    taken = getattr(RuntimeOptions(**{name: value}), name)
    assert taken == expected and type(taken) is type(expected)


def test_the_options_of_load_stand_in_one_place() -> None:
    parameters = dict(inspect.signature(FusionRuntime.load).parameters)
    for name in ("bundle", "verify"):
        del parameters[name]
    assert {name: parameter.default for name, parameter in parameters.items()} == asdict(RuntimeOptions())


def test_reprs_say_what_they_are(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", lam=0.25) as rt:
        session = rt.session(expert=rt.expert_names[1], lam=0.5)
        session.append([3, 4, 5])
        expected = f"<FusionRuntime of '{bundles[0]}': fp32 on cpu, experts {', '.join(rt.expert_names)}, fusion='weighted', lam=0.25>"
        assert repr(rt) == expected
        assert repr(session) == f"<Session of 3 tokens, fusion='weighted', lam=0.5, expert='{rt.expert_names[1]}'>"
    assert repr(rt) == expected.replace(">", ", closed>")


def test_public_names_are_meant_to_be_used(rt: FusionRuntime) -> None:
    def public(thing: object) -> set[str]:
        return {name for name in dir(thing) if not name.startswith("_")}

    loaded = {"bundle", "options", "precision", "expert_names", "vocab_size", "max_seq_len", "fusion", "lam", "tokenizer", "backend"}
    assert public(rt) == loaded | {"load", "encode", "decode", "prompt_ids", "generate", "stream", "score", "session", "close"}
    session = rt.session()
    session.append([3, 4])
    session.step()
    assert public(session) == {
        "append", "step", "steps", "rewind", "clear", "logits", "token_ids", "lags", "drafted", "accepted",
    }  # fmt: skip


def test_threads_get_what_one_thread_gets(rt: FusionRuntime) -> None:
    prompts = [f"{n}+{n + 1}=" for n in range(8)]
    expected = [rt.generate(prompt, 12).token_ids for prompt in prompts]
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        results[number] = rt.generate(prompts[number], 12).token_ids

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [results[n] for n in range(len(prompts))] == expected


def test_a_closed_runtime_says_so(bundles: list[Path]) -> None:
    rt = FusionRuntime.load(bundles[0])
    session, stream = rt.session(), rt.stream(PROMPT, 10)
    session.append([3, 4])
    next(stream)
    rt.close()
    rt.close()
    for use in (session.step, rt.session, lambda: next(stream), lambda: rt.generate(PROMPT), lambda: rt.score([3])):
        with pytest.raises(ClosedError, match="closed"):
            use()
    assert issubclass(ClosedError, FusionError)


LIGHT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "optimum"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Absent())
import numpy, pydantic
before = set(sys.modules)
from fusionroute import FusionRuntime
imported = set(sys.modules) - before
with FusionRuntime.load(sys.argv[1]) as rt:
    print(len(rt.generate("12+30=", 8).token_ids), *sorted(imported))
assert not {"torch", "transformers", "onnx"} & set(sys.modules)
"""


def test_the_runtime_needs_no_exporter_packages_and_imports_little(bundles: list[Path]) -> None:
    """Beyond NumPy and pydantic, `import fusionroute` imports nothing heavy and few modules of the library."""
    run = subprocess.run([sys.executable, "-c", LIGHT, str(bundles[0])], capture_output=True, text=True, check=True)
    count, *modules = run.stdout.split()
    packages = {module.partition(".")[0] for module in modules}
    assert count == "8"
    assert not packages & {"onnxruntime", "tokenizers", "jinja2", "typer", "rich", "asyncio", "multiprocessing", "matplotlib"}
    assert not [module for module in modules if module.startswith(("fusionroute.calibration", "fusionroute.fr_export"))]
    assert len(modules) < 220, "144 when this was written, of which 41 are our own"
