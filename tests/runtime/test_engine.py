"""The public interface: forms of generation agree, seeds repeat, threads get what one thread gets."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime, InputError
from tests.support.speculation import draft_always

PROMPT = "12+30= and more"


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
    assert public(rt) == loaded | {
        "load",
        "encode",
        "decode",
        "prompt_ids",
        "generate",
        "stream",
        "score",
        "session",
        "close",
        "add_expert",
        "remove_expert",
    }
    session = rt.session()
    session.append([3, 4])
    session.step()
    assert public(session) == {
        "append", "read", "step", "steps", "score", "rewind", "clear", "save", "load", "close", "logits", "token_ids", "lags", "drafted",
            "accepted",
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


@pytest.mark.parametrize("options", [{}, {"speculation": "auto"}], ids=["plain", "drafts"])
@pytest.mark.parametrize("number", [0, 2], ids=["models", "one base"])
@pytest.mark.parametrize(("fusion", "lam"), [("weighted", 0.15), ("additive", 0.5)])
def test_the_log_probability_of_a_token_from_beyond_the_candidates(
    bundles: list[Path], fusion: str, lam: float, number: int, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are fused anew, with the weights of router and expert each in its place: here they differ by far."""
    if options:
        draft_always(monkeypatch)
    with FusionRuntime.load(bundles[number], "fp32", "cpu", fusion=fusion, lam=lam, **options) as rt:  # type: ignore[arg-type]
        prompt = rt.encode(PROMPT)
        tokens = list(rt.stream(prompt, 60, temperature=1e3, repetition_penalty=1.3, seed=1))
        ids = [*prompt, *(token.id for token in tokens)]
        rows = rt.score(ids[:-1], positions=range(len(prompt) - 1, len(ids) - 1)).logits.astype(np.float64)
        beyond = 0
        for token, row in zip(tokens, rows, strict=True):
            assert token.logprob == pytest.approx(row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum()), abs=2e-4)
            beyond += int(np.count_nonzero(row > row[token.id]) > 260)
        assert beyond > 1, "a nearly uniform draw leaves the 256 candidates now and then"
