"""Merged models: their numbers against plain torch, DARE's statistics, the written folder, and refusals."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.training.merge import models as module
from fusionroute.fr_export.training.merge.__main__ import app
from fusionroute.fr_export.training.merge.formulas import dare
from fusionroute.fr_export.training.merge.models import merge
from fusionroute.runtime.errors import InputError
from tests.support.commands import in_folder
from tests.support.systems import Shape, make_model

GEMMA = Shape("gemma2", layers=1, vocab=300, hidden=64, head_dim=16, tokenizer=True)
LLAMA = Shape("llama3", layers=1, vocab=300, hidden=64, head_dim=16, dtype=torch.bfloat16)


def models(folder: Path, shape: Shape, experts: int = 3) -> tuple[Path, list[Path]]:
    """A base and so many experts with weights of their own."""
    return make_model(folder / "base", shape, 0, False), [make_model(folder / f"e{n}", shape, 1 + n, True) for n in range(experts)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in float64."""
    tensors = {name: tensor.double() for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    assert tensors
    return tensors


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return models(tmp_path_factory.mktemp("gemma"), GEMMA)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return models(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.mark.parametrize("family", ["gemma", "llama"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_numbers(method: str, family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base, experts = request.getfixturevalue(family)
    merge(method, base, experts, tmp_path / "out", scale=0.3)
    start, own, merged = weights(base), [weights(expert) for expert in experts], weights(tmp_path / "out")
    assert merged.keys() == start.keys()
    assert ("lm_head.weight" in merged) == (family == "llama")
    rounding = 2e-6 if family == "gemma" else 2**-8  # of float32 arithmetic, and of storing bfloat16
    for name, tensor in merged.items():
        total = own[0][name] + own[1][name] + own[2][name]
        expected = total / 3 if method == "average" else start[name] * (1 - 3 * 0.3) + 0.3 * total
        torch.testing.assert_close(tensor, expected, rtol=rounding, atol=2e-6)


def test_dare_drops_and_rescales(gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = gemma
    merge("dare", base, experts[:1], tmp_path / "out", scale=0.5, drop=0.75)
    start, expert, merged = weights(base), weights(experts[0]), weights(tmp_path / "out")
    ratio = torch.cat([((merged[name] - start[name]) / (expert[name] - start[name])).flatten() for name in start])
    usable = torch.cat([(expert[name] - start[name]).abs().flatten() for name in start]) > 1e-2
    nonzero = ratio[usable] != 0
    torch.testing.assert_close(
        ratio[usable][nonzero], torch.full((int(nonzero.sum()),), 0.5 / 0.25, dtype=torch.float64), rtol=1e-4, atol=0
    )
    spread = (0.75 * 0.25 / len(nonzero)) ** 0.5
    assert abs(nonzero.double().mean() - 0.25) < 4 * spread


def test_dare_is_unbiased_and_drops_independently() -> None:
    random = np.random.default_rng(0)
    base, *experts = random.standard_normal((4, 100, 50), np.float32)
    differences = np.stack(experts).astype(float) - base
    runs, drop, scale = 200, 0.6, 0.5
    drawn = np.stack([dare(base, experts, scale, drop, random) for _ in range(runs)]).astype(float)
    # a difference d becomes d / (1 − p) or 0: variance d²·p / (1 − p), and where drops are independent these add up
    # over the experts
    spread = scale * np.sqrt((differences**2).sum(0) * drop / (1 - drop) / runs)
    score = (drawn.mean(0) - base - scale * differences.sum(0)) / spread
    assert abs(score.mean()) < 4 / score.size**0.5
    assert abs(score.std() - 1) < 4 / (2 * score.size) ** 0.5


def test_seeds(gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = gemma
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        merge("dare", base, experts, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_dropping_nothing_is_task_arithmetic(gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = gemma
    merge("dare", base, experts, tmp_path / "dare", scale=0.4, drop=0.0)
    merge("task_arithmetic", base, experts, tmp_path / "plain", scale=0.4)
    assert (tmp_path / "dare" / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_folder_is_a_model_with_the_first_experts_texts(gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = gemma
    out, first = tmp_path / "out", shutil.copytree(experts[0], tmp_path / "first")
    (first / "chat_template.jinja").write_text("{{ messages[0].content }}")
    merge("average", base, [first, *experts[1:]], out)
    texts = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*texts, "model.safetensors"])
    for name in texts:
        assert (out / name).read_bytes() == (first / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model.get_input_embeddings().weight.double(), weights(out)["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_dtype_is_the_first_experts(llama: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _, experts = llama
    single = make_model(tmp_path / "fp32", Shape(**{**vars(LLAMA), "dtype": torch.float32}), 9, False)
    merge("average", single, experts, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_shards(llama: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = llama
    merge("average", base, experts, tmp_path / "one")
    monkeypatch.setattr(module, "SHARD", "40KB")
    merge("average", base, experts, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def other_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"<unused0>"', '"<other>"'))


def other_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 8}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (other_vocabulary, "another vocabulary than the base (2 entries differ)"),
        (other_config, "differs from the base in sliding_window of config.json"),
        (no_weights, "holds no model.safetensors"),
        (not_finite, "holds values that are not finite"),
        (no_model, "is of model type 'gpt2'"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
    ],
)
def test_models_that_do_not_fit(harm: Callable[[Path], None], says: str, gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = gemma
    bad = shutil.copytree(experts[1], tmp_path / "bad")
    harm(bad)
    with pytest.raises(InputError) as caught:
        merge("average", base, [experts[0], bad], tmp_path / "out")
    assert says in str(caught.value) and str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path != bad] == []


def test_other_sizes_and_families(gemma: tuple[Path, list[Path]], llama: tuple[Path, list[Path]], tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", Shape(**{**vars(GEMMA), "vocab": 304}), 0, True)
    with pytest.raises(InputError, match=r"differs from the base in vocab_size of config\.json"):
        merge("average", gemma[0], [wider], tmp_path / "out")
    with pytest.raises(InputError, match="is of family llama3, the base of gemma2"):
        merge("average", gemma[0], llama[1], tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"scale": float("nan")}, "scale=nan is no finite number"),
        ({"drop": 1.0}, "drop=1.0 is out of range"),
        ({"drop": -0.1}, "drop=-0.1 is out of range"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"scale": 3e38}, "exceeds the range of torch.float32"),
    ],
)
def test_settings_out_of_range(setting: dict[str, float], says: str, gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        merge("dare", gemma[0], gemma[1], tmp_path / "out", **setting)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced(gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="a merge replaces nothing: name another folder with --out"):
        merge("average", *gemma, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "dear"
    with pytest.raises(InputError, match="name at least one expert"):
        merge("average", gemma[0], [], tmp_path / "new")


def test_command(
    gemma: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = gemma
    named = [part for expert in experts for part in ("--expert", expert)]
    out = tmp_path / "command"
    with in_folder("merge", app, tmp_path, monkeypatch, capsys) as run:
        first = run("--method", "dare", "--base", base, *named, "--scale", "0.5", "--drop", "0.25", "--seed", "3", "--out", out)
        assert first.status == 0, first.err
        merge("dare", base, experts, tmp_path / "function", scale=0.5, drop=0.25, seed=3)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "function" / "model.safetensors").read_bytes()

        again = run("--method", "average", "--base", base, *named, "--out", out)
        assert again.status == 1 and again.err.rstrip().endswith("name another folder with --out.") and "Traceback" not in again.err
        for wrong in (["--method", "ties"], ["--method", "average", "--scale", "1"], ["--method", "dare", "--drop", "1"]):
            refused = run(*wrong, "--base", base, *named, "--out", tmp_path / "refused")
            assert refused.status == 2, refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command", "function"]


def test_the_leftovers_of_a_killed_merge_are_removed(gemma: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Here the killed process had moved an empty folder aside and the new model into its place."""
    merge("average", *gemma, tmp_path / "out")
    (tmp_path / ".out.replaced-4194304").mkdir()  # no process has this number
    with pytest.raises(InputError, match="a merge replaces nothing"):
        merge("average", *gemma, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    with in_folder("merge", app, tmp_path, monkeypatch, capsys) as run:
        ended = run("--method", "average", "--base", "base", "--expert", "expert", "--out", "out")
    assert ended.status == 1
    assert ended.err == "error: Merging needs the package 'torch': install the extra 'export' (pip install 'fusionroute[export]').\n"
