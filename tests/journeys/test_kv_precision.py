"""Keys and values in 8 and 4 bits: what is stored, what it takes, and that every way to read a text answers alike."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from rich.console import Console

from fusionroute.calibration.table import Table
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.keys_values import KeysValues, storage_of
from fusionroute.runtime.errors import BundleError, InputError, UnavailableError
from fusionroute.runtime.kv_precisions import KvName
from fusionroute.runtime.manifest import Manifest
from tests.support.adapters import make_adapted_system
from tests.support.bundles import edit
from tests.support.rounded_caches import fused, steps_of
from tests.support.speculation import draft_always, same
from tests.support.systems import Shape, make_system

PROMPTS = ["12+30=", "def f(x):", "Es war einmal", "a", "What is the colour of the sky?"]
LENGTH = 96
BITS = {"int8": 8, "int4": 4}


def exported(
    folder: Path, router: str, experts: dict[str, str], kv: KvName, precisions: tuple[str, ...], shared_base: bool = False,
    table: Path | None = None,
) -> Path:  # fmt: skip
    """A bundle that was calibrated on a few prompts, or by a table."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    request = Request(
        None, router, experts, precisions, ("ort:cpu",), folder / kv, max_seq_len=LENGTH, calibration=str(table or prompts), kv=kv,
        shared_base=shared_base,
    )  # fmt: skip
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        export(request, Stages(Console(quiet=True)))
    return request.out


@dataclass(frozen=True)
class Case:
    system: System
    bundles: dict[str, Path]  # precision of keys and values → bundle

    def text(self, length: int, seed: int = 0) -> list[int]:
        """Random ids."""
        ids: list[int] = np.random.default_rng(seed).integers(3, self.system.vocab_size, length).tolist()
        return ids


@pytest.fixture(scope="module", params=["gemma2", pytest.param("llama3", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Gemma-2 has softcaps and sliding windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("kv")
    router, experts = make_system(folder, Shape(request.param, layers=2, experts=2, tokenizer=True))
    bundles = {"int8": exported(folder, router, experts, "int8", ("fp32", "int8"))}
    bundles["int4"] = exported(folder, router, experts, "int4", ("fp32",), table=bundles["int8"] / "calibration.safetensors")
    return Case(System.open(FAMILIES[request.param], router, experts, max_seq_len=LENGTH), bundles)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_logits_are_those_of_torch_with_rounded_keys_and_values(case: Case, kv: str) -> None:
    """New tokens see each other as later ones see them: so a text may be read in any pieces."""
    manifest = Manifest.read(case.bundles[kv])
    variant = next(each for each in manifest.variants if each.precision == "fp32")
    ids = case.text(60)
    expected, routing = fused(case.system, [case.bundles[kv] / variant.graphs[each.name] for each in manifest.models], BITS[kv], ids)
    for chunk in (256, 7, 1):
        with FusionRuntime.load(case.bundles[kv], "fp32", "cpu") as rt:
            scores = rt.score(ids, chunk=chunk)
        # a value halfway between two steps falls to either side by the last bit
        np.testing.assert_allclose(scores.routing, routing, atol=0.02 * np.abs(routing).max())
        errors = np.abs(scores.logits - expected).max(-1) / np.abs(expected).max()
        assert np.median(errors) < 1e-4 and errors.max() < 0.05, errors


def test_what_is_stored_takes_what_the_manifest_says(case: Case) -> None:
    for kv, bundle in case.bundles.items():
        manifest = Manifest.read(bundle)
        assert manifest.format >= 4, "an older runtime would not know `kv`"
        for variant in manifest.variants:
            assert (variant.kv, variant.kv_bits) == (kv, BITS[kv])
            for model in manifest.models:
                values = 2 * model.layers * model.kv_heads * model.head_size
                assert variant.kv_bytes_per_token(model) == values * BITS[kv] // 8
                memory = KeysValues(model, LENGTH, storage_of(variant))
                assert memory.buffers.nbytes == LENGTH * variant.kv_bytes_per_token(model)


def test_exact_tokens_do_not_depend_on_drafts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    assert same(case.bundles["int8"], "int8", 12, exact=True) > 48


def test_rewinds_and_prefixes_answer_as_a_fresh_read_does(case: Case) -> None:
    with (
        FusionRuntime.load(case.bundles["int8"], "int8", "cpu", exact=True) as rt,
        FusionRuntime.load(case.bundles["int8"], "int8", "cpu", exact=True, prefix_cache=0) as anew,
    ):
        session, random = rt.session(), np.random.default_rng(1)
        ids: list[int] = []
        for number in range(20):
            length = int(random.integers(0, len(ids) + 1))
            session.rewind(length)
            ids = ids[:length] + case.text(int(random.integers(1, 9)), number)
            ids = ids[: LENGTH - 2]
            session.rewind(min(len(session), len(ids)))
            session.append(ids[len(session) :])
            fresh = anew.session()
            fresh.append(ids)
            token, expected = session.step(), fresh.step()
            assert (token.id, token.expert, token.logprob) == (expected.id, expected.expert, expected.logprob)
            session.rewind(len(ids))
        for tail in ([7, 8], [9]):  # the second takes over what the first one has read
            prompt = [*case.text(40), *tail]
            assert rt.generate(prompt, 8).token_ids == anew.generate(prompt, 8).token_ids


@pytest.mark.parametrize(("kv", "precision"), [("int8", "int8"), ("int4", "fp32")])
def test_a_saved_text_goes_on_as_a_fresh_one(case: Case, kv: str, precision: str, tmp_path: Path) -> None:
    """And the file takes as many bytes for a token as the buffers."""
    ids = case.text(50)
    options: dict[str, Any] = {"exact": True, "prefix_cache": 0}
    with FusionRuntime.load(case.bundles[kv], precision, "cpu", **options) as rt:
        session = rt.session()
        session.append(ids)
        session.read(rt.expert_names[:1])
        session.save(tmp_path / "text")
    manifest = Manifest.read(case.bundles[kv])
    variant = next(each for each in manifest.variants if each.precision == precision)
    values = 48 * sum(variant.kv_bytes_per_token(model) for model in manifest.models[:2])
    assert 0 < (tmp_path / "text").stat().st_size - values - 4 * 50 - 32 < 1000, "beside them a header"
    with FusionRuntime.load(case.bundles[kv], precision, "cpu", **options) as rt:
        loaded, fresh = rt.session(), rt.session()
        loaded.load(tmp_path / "text")
        assert loaded.lags == {rt.expert_names[0]: 2, rt.expert_names[1]: 50}
        fresh.append(ids)
        for _ in range(8):
            token, expected = loaded.step(), fresh.step()
            assert (token.id, token.expert, token.logprob) == (expected.id, expected.expert, expected.logprob)
    other = "int4" if kv == "int8" else "int8"
    refused = pytest.raises(InputError, match=r"text was saved with another bundle: load it there, or read its text again\.$")
    with FusionRuntime.load(case.bundles[other], "fp32", "cpu", **options) as rt, refused:
        rt.session().load(tmp_path / "text")


def test_one_base_stores_keys_and_values_in_steps_that_fit_all_its_models(tmp_path: Path) -> None:
    shape = Shape(layers=1, tokenizer=True)
    _, router, experts = make_adapted_system(tmp_path, shape, [{}, {"r": 3}, {"r": 2}])
    bundle = exported(tmp_path, router, experts, "int8", ("fp32",), shared_base=True)
    pair = Manifest.read(bundle).variants[0].pair
    assert pair is not None
    steps, models = steps_of(bundle / pair.graph), Table.load(bundle / "calibration.safetensors").models.values()
    values, keys = (np.max([each[f"present.0.{kind}"].channel_absmax for each in models], 0) for kind in ("value", "key"))
    np.testing.assert_allclose(steps["present.0.value"].ravel(), 1.25 * values / 127, rtol=1e-6)
    half = keys.reshape(shape.kv_heads, 2, -1)
    lengths = np.sqrt(half[:, :1] ** 2 + half[:, 1:] ** 2).repeat(2, 1)  # of a pair that is turned
    np.testing.assert_allclose(steps["present.0.key"].ravel(), lengths.ravel() / 127, rtol=1e-6)
    session_ids = np.random.default_rng(0).integers(3, 300, 50).tolist()
    with FusionRuntime.load(bundle, device="cpu", exact=True) as rt:
        whole = rt.score(session_ids).logits
        session = rt.session()
        session.append(session_ids[:20])
        session.step()
        session.rewind(9)
        session.append(session_ids[9:])
        assert session.step().id == whole[-1].argmax()


def test_a_bundle_whose_graphs_store_something_else_is_refused(case: Case, tmp_path: Path) -> None:
    def claim(kv: str | None) -> str:
        copy = Path(shutil.copytree(case.bundles["int8"], tmp_path / str(kv)))
        edit(copy, lambda content: [variant.update(kv=kv) if kv else variant.pop("kv") for variant in content["variants"]])
        with pytest.raises((BundleError, UnavailableError)) as caught:
            FusionRuntime.load(copy, "fp32", "cpu")
        return str(caught.value)

    for kv in (None, "int4"):
        assert "does not have the inputs and outputs that the manifest describes (the input past.0.key)" in claim(kv)
    assert claim("fp8") == (
        "ONNX Runtime keeps no keys and values in fp8 on a CPU: load another precision, or export with --kv fp32, int8 or int4."
    )
