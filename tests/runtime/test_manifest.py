"""Manifests that do not fit their bundle, lead out of it, or are none; and how one is written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest
from tests.support.bundles import Change, edit, refusal


def first(content: dict[str, Any]) -> dict[str, Any]:
    variant: dict[str, Any] = content["variants"][0]
    return variant


def weights(content: dict[str, Any]) -> dict[str, Any]:
    file: dict[str, Any] = next(entry for entry in content["files"].values() if "tensors" in entry)
    return file


def escape(path: str) -> dict[str, Change]:
    """The ways in which a manifest may lead out of its bundle."""

    def file(content: dict[str, Any]) -> None:
        content["files"][path] = next(iter(content["files"].values()))

    def graph(content: dict[str, Any]) -> None:
        first(content)["graphs"]["router"] = path

    def fusion(content: dict[str, Any]) -> None:
        first(content)["fusion_graph"] = path

    return {f"{where}-{path!r}": change for where, change in (("file", file), ("graph", graph), ("fusion", fusion))}


ESCAPES = {
    name: change
    for path in ("../x.onnx", "/etc/passwd", "graphs/../../x", "..\\x", "graphs/\0", ".", "")
    for name, change in escape(path).items()
}


@pytest.mark.parametrize("name", ESCAPES)
def test_manifests_that_lead_out_of_the_bundle(bundle: Path, name: str) -> None:
    edit(bundle, ESCAPES[name])
    assert "is not a path inside the bundle" in refusal(bundle)


def other_graph(content: dict[str, Any]) -> None:
    first(content)["graphs"]["router"] = "graphs/none.onnx"


MANIFESTS: dict[str, tuple[Change, str]] = {
    "unknown format": (lambda m: m.update(format=6), "has the format 6, and this version reads 1 to 5: update fusionroute"),
    "overlapping tensors": (lambda m: weights(m)["tensors"][1].update(offset=1), "inside the one before it"),
    "tensors beyond the file": (lambda m: weights(m)["tensors"][-1].update(bytes=10**9), "its tensors end at byte"),
    "unknown field": (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
    "missing field": (lambda m: m.pop("files"), "files: Field required"),
    "no variants": (lambda m: m.update(variants=[]), "variants"),
    "router only": (lambda m: m.update(models=m["models"][:1]), "models"),
    "two of a name": (lambda m: m["models"][2].update(name=m["models"][1]["name"]), "two models have the same name"),
    "model without graph": (lambda m: first(m)["graphs"].pop("router"), "has graphs for"),
    "graph without hash": (lambda m: m["files"].pop(first(m)["graphs"]["router"]), "is not among the files"),
    "graph that is nowhere": (other_graph, "graphs/none.onnx of the variant"),
    "lambda out of range": (lambda m: m.update(lam=1.5), "lam: Input should be less than or equal to 1"),
    "curve out of range": (lambda m: m.update(lam_curve=[[0.5, 1.5]]), "lam_curve.0.1: Input should be less than or equal to 1"),
    "unknown fusion": (lambda m: m.update(fusion="product"), "fusion: Input should be 'weighted' or 'additive'"),
    "hash that is none": (lambda m: next(iter(m["files"].values())).update(sha256="abc"), "sha256"),
    "other hash that is none": (lambda m: next(iter(m["files"].values())).update(blake3="abc"), "blake3"),
    "format that is no number": (lambda m: m.update(format=True), "has the format True, and this version reads 1 to 5: update"),
    "format of another type": (lambda m: m.update(format=2.0), "has the format 2.0, and this version reads 1 to 5: update"),
    "lambda that is a bool": (lambda m: m.update(lam=True), "lam: Input should be a valid number"),
    "lambda that is a text": (lambda m: m.update(lam="0.4"), "lam: Input should be a valid number"),
    "length that is a text": (lambda m: m.update(max_seq_len="64"), "max_seq_len: Input should be a valid integer"),
    "length beyond 32 bits": (lambda m: m.update(max_seq_len=1 << 31), "max_seq_len: Input should be less than 2147483648"),
    "size beyond 64 bits": (lambda m: weights(m).update(bytes=1 << 63), "bytes: Input should be less than or equal to 9223372036854775807"),
    "bits that are no number": (lambda m: first(m).update(bits_per_weight=float("nan")), "(NaN is no number of JSON)"),
    "two variants": (lambda m: m["variants"].append(first(m)), "there are two variants for ort:cpu in fp32"),
    "end outside the vocabulary": (
        lambda m: m.update(eos_token_ids=[1, m["vocab_size"]]),
        "(the file: the end-of-sequence token 300 is outside the vocabulary of 300)",
    ),
    "end below zero": (lambda m: m.update(eos_token_ids=[-1]), "the end-of-sequence token -1 is outside the vocabulary"),
    "more layers": (lambda m: m["models"][0].update(layers=m["models"][0]["layers"] + 1), "does not have the inputs"),
    "other kv heads": (lambda m: m["models"][1].update(kv_heads=7), "does not have the inputs"),
    "other head size": (lambda m: m["models"][0].update(head_size=8), "does not have the inputs"),
    "other vocabulary": (lambda m: m.update(vocab_size=m["vocab_size"] - 1), "does not have the inputs"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_do_not_fit(bundle: Path, name: str) -> None:
    change, words = MANIFESTS[name]
    edit(bundle, change)
    sentence = refusal(bundle)
    assert words in sentence


def test_a_curve_of_lambda_is_optional_and_kept(bundle: Path) -> None:
    edit(bundle, lambda m: m.pop("lam_curve"))
    assert Manifest.read(bundle).lam_curve is None
    tuned = Manifest.read(bundle).model_copy(update={"lam": 0.25, "lam_curve": [(0.0, 0.5), (0.25, 0.75)]})
    tuned.write(bundle)
    assert Manifest.read(bundle) == tuned
    Bundle.open(bundle).verify()


def test_a_manifest_is_replaced_in_one_step(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = (bundle / "manifest.json").read_bytes(), sorted(bundle.iterdir())

    def fails(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        Manifest.read(bundle).write(bundle)
    assert (bundle / "manifest.json").read_bytes() == before and sorted(bundle.iterdir()) == files


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"lam":', '"lam": 0.9, "lam":', "(the key 'lam' stands twice)"),
        ('"tokenizer.json":', '"tokenizer.json": {}, "tokenizer.json":', "(the key 'tokenizer.json' stands twice)"),
        ('"family":', '"family": ' + "[" * 100_000 + "]" * 100_000 + ', "colour":', "(it is nested too deeply)"),
        ('"vocab_size":', '"vocab_size": ' + "9" * 5000 + ', "colour":', "(it has a number of 5000 digits)"),
        ('"lam":', '"lam": 1e999, "colour":', "lam: Input should be a finite number"),
    ],
    ids=["twice", "a file twice", "deep", "digits", "infinite"],
)
def test_json_that_readers_could_understand_in_two_ways(bundle: Path, old: str, new: str, words: str) -> None:
    text = json.dumps(json.loads((bundle / "manifest.json").read_text()))
    (bundle / "manifest.json").write_text(text.replace(old, new, 1))
    assert words in refusal(bundle)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": 1}', b"\xff\xfe\x00", b"[" * 100_000])
def test_manifests_that_are_none(bundle: Path, text: bytes) -> None:
    (bundle / "manifest.json").write_bytes(text)
    assert "manifest.json" in refusal(bundle)


CACHES = [("ort:cpu", "fp16", 32), ("ort:cpu", "fp32", 32), ("ort:cuda", "fp32", 32), ("ort:cuda", "int8", 16), ("tensorrt", "bf16", 16)]


@pytest.mark.parametrize(
    ("target", "precision", "bits"), [*CACHES, ("portable", "int8", 32), ("portable", "fp16", 16), ("portable", "bf16", 16)]
)
def test_caches_are_as_wide_as_the_graphs_compute(bundle: Path, target: str, precision: str, bits: int) -> None:
    variant = Manifest.read(bundle).variants[0]
    name = "".join(list(precision))  # as a file has it: equal, and not the same
    assert variant.model_copy(update={"target": target, "precision": name}).kv_bits == bits


def test_the_first_file_that_is_not_listed_is_named(bundle: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        first(content)["graphs"]["router"], first(content)["fusion_graph"] = "graphs/b.onnx", "graphs/a.onnx"

    edit(bundle, change)
    assert "(the file: the file graphs/a.onnx of the variant " in refusal(bundle)


def test_a_manifest_of_more_than_64_mib_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", (1 << 26) + 1)
    assert (
        refusal(bundle) == f"{bundle / 'manifest.json'} cannot be read (it has more than 67108864 bytes); copy or export the bundle again."
    )
