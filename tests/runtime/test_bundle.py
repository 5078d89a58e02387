"""What opening a bundle refuses, and in what words; and that a whole one works wherever it lies."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from fusionroute.runtime import BundleError, FusionError, FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.bundle import Bundle, is_leftover
from fusionroute.runtime.files import partial_name
from fusionroute.runtime.manifest import Manifest
from tests.support.bundles import as_format, edit, refusal, rehash

PROMPT = [1, 5, 9]


def named(bundle: Path, kind: str) -> str:
    """The name of a file of a kind."""
    content = json.loads((bundle / "manifest.json").read_text())
    if kind == "graph":
        return str(next(iter(content["variants"][-1]["graphs"].values())))
    if kind == "weights":
        folder: Path = (bundle / content["variants"][-1]["fusion_graph"]).parent
        largest = max((folder / "weights").iterdir(), key=lambda path: path.stat().st_size)
        return largest.relative_to(bundle).as_posix()
    return {"fusion": str(content["variants"][-1]["fusion_graph"]), "tokenizer": "tokenizer.json", "report": "report.json"}[kind]


def test_a_path_that_the_system_refuses() -> None:
    with pytest.raises(BundleError, match="too long"):
        FusionRuntime.load("a" * 5000)


def test_what_a_killed_write_has_left_is_no_part_of_the_bundle(bundle: Path) -> None:
    left = partial_name(bundle / "manifest.json")
    left.write_text("{")
    Bundle.open(bundle).verify()
    left.rename(bundle / ".manifest.json.partial")
    with pytest.raises(BundleError, match="does not belong to the bundle"):
        Bundle.open(bundle).verify()


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("graphs/factors/new.safetensors", True),
        ("graphs/factors/new.bin", False),
        ("graphs/factors/deeper/new.safetensors", False),
        ("graphs/new.safetensors", False),
        ("new.safetensors", False),
    ],
)
def test_factors_of_an_expert_that_was_being_added_are_left_over(tmp_path: Path, name: str, left: bool) -> None:
    assert is_leftover(tmp_path / name, tmp_path) == left


def test_weights_are_found_by_the_folders_path_where_no_system_has_descriptors_as_paths(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusionroute.runtime.bundle.DESCRIPTORS", "/nowhere")
    opened = Bundle.open(bundle)
    with opened.graph("graphs/router.ort-cpu.fp32.onnx") as (content, weights):
        assert weights == str(bundle / "graphs") and content == (bundle / "graphs/router.ort-cpu.fp32.onnx").read_bytes()


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    assert "expected the folder that export.py wrote" in refusal(tmp_path / "nowhere")
    assert "is no bundle, since it holds no manifest.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "There is no bundle" in refusal(tmp_path / "file")
    (tmp_path / "manifest.json").mkdir()
    assert "cannot be read" in refusal(tmp_path)


KINDS = ("graph", "weights", "fusion", "tokenizer", "report")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_missing_or_truncated(bundle: Path, kind: str) -> None:
    name = named(bundle, kind)
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    assert f"{name} has {len(data) - 1} bytes where the manifest says {len(data)}" in refusal(bundle)
    (bundle / name).unlink()
    assert f"lacks {name}" in refusal(bundle)
    (bundle / name).mkdir()
    assert f"lacks {name}" in refusal(bundle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hash", ["BLAKE3", "SHA-256"])
def test_files_that_were_changed(bundle: Path, kind: str, hash: str) -> None:
    """Bundles of older formats have SHA-256s alone."""
    if hash == "SHA-256":
        edit(bundle, as_format(2))
    name = named(bundle, kind)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert (
        refusal(bundle) == f"{bundle / name} was changed after the export (its {hash} differs from the manifest); export the bundle again."
    )


def test_every_file_has_both_hashes(bundle: Path) -> None:
    for name, entry in Manifest.read(bundle).files.items():
        content = (bundle / name).read_bytes()
        assert entry.hashes == {"sha256": hashlib.sha256(content).hexdigest(), "blake3": blake3(content).hexdigest()}
        assert entry.bytes == len(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_looks_at_blake3_and_verify_at_both(bundle: Path, kind: str) -> None:
    name = named(bundle, kind)
    right = Manifest.read(bundle).files[name]
    edit(bundle, lambda m: m["files"][name].update(sha256="0" * 64))
    FusionRuntime.load(bundle).close()
    for verify in (lambda: Bundle.open(bundle).verify(), lambda: FusionRuntime.load(bundle, verify=True)):
        with pytest.raises(BundleError, match=rf"{name} was changed after the export \(its SHA-256 differs"):
            verify()
    edit(bundle, lambda m: m["files"][name].update(sha256=right.sha256, blake3="0" * 64))
    for load in (lambda: FusionRuntime.load(bundle), lambda: Bundle.open(bundle).verify()):
        with pytest.raises(BundleError, match=rf"{name} was changed after the export \(its BLAKE3 differs"):
            load()


@pytest.mark.parametrize("kind", ["graph", "fusion"])
def test_files_that_are_no_graph_with_a_manifest_that_agrees(bundle: Path, kind: str) -> None:
    name = named(bundle, kind)
    (bundle / name).write_bytes(b"no graph")
    rehash(bundle, name)
    assert refusal(bundle) == f"The graph {bundle / name} is refused, since it is no ONNX file; export the bundle again."


def test_a_tokenizer_that_is_none_with_a_manifest_that_agrees(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    rehash(bundle, "tokenizer.json")
    assert "cannot be read as a tokenizer.json" in refusal(bundle)


def test_a_chat_template_that_is_no_text_with_a_manifest_that_agrees(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_bytes(b"\xff\xfe")
    rehash(bundle, "chat_template.jinja")
    assert "chat_template.jinja" in refusal(bundle)


def test_extra_files_are_ignored_until_verified(bundle: Path) -> None:
    Bundle.open(bundle).verify()
    (bundle / "graphs" / "notes.txt").write_text("")
    FusionRuntime.load(bundle).close()
    with pytest.raises(BundleError, match=r"notes\.txt does not belong to the bundle"):
        FusionRuntime.load(bundle, verify=True)


def test_a_tokenizer_that_the_manifest_does_not_name_is_not_used(bundle: Path) -> None:
    edit(bundle, lambda content: content["files"].pop("tokenizer.json"))
    with FusionRuntime.load(bundle) as runtime:
        assert runtime.generate(PROMPT, 2).finish_reason in ("length", "stop")
        with pytest.raises(UnavailableError, match=r"has no tokenizer\.json: pass token ids"):
            runtime.generate("hello")


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_bundles_work_moved_linked_read_only_and_from_any_folder(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, original in enumerate(bundles):
        with FusionRuntime.load(original, threads=1) as runtime:
            expected = runtime.generate(PROMPT, 8).token_ids
        copy = Path(shutil.copytree(original, tmp_path / f"a folder {number}" / "copied ü"))
        moved = Path(shutil.move(copy, tmp_path / f"moved-{number}"))
        link = tmp_path / f"link-{number}"
        link.symlink_to(moved)
        for path in (*moved.rglob("*"), moved):
            path.chmod(path.stat().st_mode & 0o555)
        monkeypatch.chdir(tmp_path)
        before = states(moved)
        for place in (moved, link, Path(moved.name), f"{moved}/"):
            with FusionRuntime.load(place, threads=1, verify=True) as runtime:
                assert runtime.generate(PROMPT, 8).token_ids == expected
        assert states(moved) == before, "a bundle is never written to"
        for path in (moved, *moved.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(bundle: Path) -> None:
    name = named(bundle, "graph")
    (bundle / name).chmod(0)
    assert "cannot be read" in refusal(bundle)


ASKED: dict[str, tuple[dict[str, Any], type[FusionError], str]] = {
    "unknown device": ({"device": "tpu"}, InputError, "Unknown device 'tpu': use one of auto, cpu"),
    "unknown precision": ({"precision": "int3"}, UnavailableError, "no precision 'int3' for ort:cpu, only .*--precision int3"),
    "unknown fusion": ({"fusion": "product"}, InputError, "Unknown fusion 'product'"),
    "lambda": ({"lam": -0.1}, InputError, "expected a number from 0"),
    "threads": ({"threads": 0}, InputError, "expected 1 to 1024"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_bundle_cannot_serve(bundles: list[Path], name: str) -> None:
    options, kind, words = ASKED[name]
    with pytest.raises(kind, match=words):
        FusionRuntime.load(bundles[0], **options)


def test_a_target_that_was_not_exported(bundle: Path) -> None:
    edit(bundle, lambda content: [variant.update(target="ort:cuda") for variant in content["variants"]])
    with pytest.raises(UnavailableError, match=r"has no graphs for ort:cpu, only for ort:cuda: export it with --target ort:cpu"):
        FusionRuntime.load(bundle, device="cpu")


def test_without_onnxruntime(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"needs onnxruntime: install the extra 'cpu' \(pip install 'fusionroute\[cpu\]'\)"):
        FusionRuntime.load(bundles[0], device="cpu")


def test_prompts_beyond_the_context(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0]) as runtime:
        full = runtime.max_seq_len
        for count in (full, full + 1):
            with pytest.raises(
                InputError, match=f"has {count} tokens, which leaves no room in the context of {full}: shorten it or export"
            ):
                runtime.generate([1] * count)
        with pytest.raises(InputError, match=f"do not fit the context of {full}"):
            runtime.score([1] * (full + 1))
        with pytest.raises(InputError, match="outside the vocabulary"):
            runtime.generate([runtime.vocab_size])
        assert runtime.generate([1] * (full - 1), 5).finish_reason in ("length", "stop")
