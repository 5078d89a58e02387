"""Experts are added to a bundle's folder and removed from it: nothing else changes, and a kill leaves a whole bundle."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.adapters.expert_files import add_expert, remove_expert
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.bundle import FACTORS, Bundle
from fusionroute.runtime.commands import VERBS
from fusionroute.runtime.commands.verbs import program
from fusionroute.runtime.errors import BundleError, FusionError, InputError, UnavailableError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.manifest_file import NAME
from tests.support.bundles import as_format, edit
from tests.support.commands import in_folder
from tests.support.numpy_adapters import write_adapter


@pytest.fixture
def copy(shared: Path, tmp_path: Path) -> Path:
    """The bundle with one base, to change: experts expert0, expert1 and expert2."""
    return Path(shutil.copytree(shared, tmp_path / "bundle"))


@pytest.fixture
def adapter(copy: Path, tmp_path: Path) -> Path:
    return write_adapter(copy, tmp_path / "adapter")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unchanged(before: dict[str, bytes], after: dict[str, bytes]) -> bool:
    """Whether all that is neither the manifest nor an expert is as it was."""
    others = [{name: data for name, data in each.items() if name != NAME and not name.startswith(FACTORS)} for each in (before, after)]
    return others[0] == others[1]


def test_only_the_manifest_and_the_expert_s_file_change(copy: Path, adapter: Path) -> None:
    before = contents(copy)
    removed = remove_expert(copy, "expert1")
    assert removed.experts == ["expert0", "expert2"] and removed.rows == ["expert0", "expert1", "expert2"]
    without = contents(copy)
    assert unchanged(before, without) and len(before) == len(without) + 1
    Bundle.open(copy).verify()
    added = add_expert(copy, "expert1", adapter)
    assert added.experts == ["expert0", "expert1", "expert2"] and not added.routing_rows
    assert unchanged(before, contents(copy)) and len(contents(copy)) == len(before)
    Bundle.open(copy).verify()
    paths = {variant.pair.factors["expert1"] for variant in added.variants if variant.pair}
    assert len(paths) == 1, "all precisions read one file"
    sizes = {sum(array.nbytes for array in map_factors(copy / path).values()) for path in paths}
    assert {variant.weight_bytes["expert1"] for variant in added.variants} == sizes


@pytest.mark.parametrize("format", [3, 5])
def test_an_older_bundle_stays_one(copy: Path, adapter: Path, format: int) -> None:
    """Versions that read format 3 refuse fields that they do not know."""
    if format < 5:
        edit(copy, as_format(format))
    add_expert(copy, "expert1", adapter, replace=True)
    written = json.loads((copy / NAME).read_text())
    name = next(path for variant in written["variants"] if "pair" in variant for path in [variant["pair"]["factors"]["expert1"]])
    content = (copy / name).read_bytes()
    hashes = {"sha256": hashlib.sha256(content).hexdigest()} | ({"blake3": blake3(content).hexdigest()} if format == 5 else {})
    assert written["files"][name] == hashes | {"bytes": len(content)} and written["format"] == format
    assert all(("blake3" in entry) == (format == 5) for entry in written["files"].values())
    Bundle.open(copy).verify()


def test_rows_without_an_expert_are_not_chosen(shared: Path, copy: Path) -> None:
    """Tokens and scores are those of the other experts; an expert that comes back is chosen in its row as before."""
    ids = [5, 17, 40, 90, 120, 33, 8, 61]
    with FusionRuntime.load(shared, "fp32", "cpu") as whole:
        expected = whole.score(ids * 8)
        remove_expert(copy, "expert0")
        with FusionRuntime.load(copy, "fp32", "cpu") as rt:
            assert rt.expert_names == ["expert1", "expert2"]
            scores = rt.score(ids * 8)
            assert np.array_equal(scores.routing, expected.routing[:, 1:])
            assert np.array_equal(scores.experts, expected.routing[:, 1:].argmax(-1))
            assert (expected.experts == 0).any() and len(set(scores.experts)) == 2
            result = rt.generate(ids, 16)
            assert set(result.experts) <= {"expert1", "expert2"}
            pinned = [runtime.generate(ids, 8, expert="expert2").logprobs for runtime in (rt, whole)]
            assert pinned[0] == pytest.approx(pinned[1], abs=1e-5)


def test_an_expert_is_replaced_by_force_alone(copy: Path, adapter: Path) -> None:
    before = contents(copy)
    with pytest.raises(InputError, match=r"has an expert 'expert2' already: add --force to replace it\.$"):
        add_expert(copy, "expert2", adapter)
    assert contents(copy) == before
    manifest = add_expert(copy, "expert2", adapter, replace=True)
    assert manifest.experts == Bundle.open(copy).manifest.experts == ["expert0", "expert1", "expert2"]
    assert len(contents(copy)) == len(before) and unchanged(before, contents(copy))
    Bundle.open(copy).verify()


def first(tensors: dict[str, np.ndarray], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def widened(tensors: dict[str, np.ndarray]) -> None:
    name = first(tensors, "A.weight")
    tensors[name] = np.pad(tensors[name], ((0, 0), (0, 1)))


def infinite(tensors: dict[str, np.ndarray]) -> None:
    tensors[first(tensors, "B.weight")][0, 0] = np.inf


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "another base": ({"change": widened}, "and the bundle's base has"),
    "another module": (
        {"change": lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 4), np.float32),
                                                   "base_model.model.lm_head.lora_B.weight": np.zeros((4, 3), np.float32)})},
        "changes 'lm_head.weight', which no expert did when the bundle was exported",
    ),
    "an embedding": (
        {"change": lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": np.zeros((3, 4), np.float32)})},
        "changes 'model.embed_tokens.weight'",
    ),
    "one factor": ({"change": lambda tensors: tensors.pop(first(tensors, "B.weight"))}, "lacks the lora_B of"),
    "a bias": ({"change": lambda tensors: tensors.update({first(tensors, "B.weight").replace(".weight", ".bias"): np.zeros(4, np.float32)})},
               "has the lora_B.bias of"),
    "another rank": ({"r": 7}, "and rank 7 in its adapter_config.json"),
    "DoRA": ({"use_dora": True}, "is a DoRA adapter"),
    "no LoRA": ({"peft_type": "IA3"}, "is an adapter of type IA3"),
    "not finite": ({"change": infinite}, "holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_adapters_that_do_not_fit_leave_the_bundle_as_it_was(name: str, copy: Path, tmp_path: Path) -> None:
    options, words = UNFIT[name]
    remove_expert(copy, "expert0")
    before = contents(copy)
    with pytest.raises(InputError) as refusal:
        add_expert(copy, "expert0", write_adapter(copy, tmp_path / "adapter", **options))
    assert words in str(refusal.value) and str(refusal.value).endswith(".")
    assert contents(copy) == before


def test_what_cannot_be_added_or_removed(bundles: list[Path], copy: Path, adapter: Path, tmp_path: Path) -> None:
    refusals: list[tuple[type[FusionError], str, Callable[[], object]]] = [
        (InputError, "no row for 'poetry', only for expert0, expert1, expert2", lambda: add_expert(copy, "poetry", adapter)),
        (InputError, "There is no adapter folder", lambda: add_expert(copy, "expert0", tmp_path / "none", True)),
        (InputError, "holds no adapter_config.json", lambda: add_expert(copy, "expert0", copy, True)),
        (InputError, "There is no expert 'poetry' to remove", lambda: remove_expert(copy, "poetry")),
        (UnavailableError, "its models do not share one base: export .* --shared-base", lambda: add_expert(bundles[0], "expert0", adapter)),
        (UnavailableError, "its models do not share one base: export .* --shared-base", lambda: remove_expert(bundles[0], "expert0")),
        (BundleError, "There is no bundle at", lambda: remove_expert(tmp_path / "none", "expert0")),
    ]
    before = contents(copy)
    for kind, words, change in refusals:
        with pytest.raises(kind, match=words):
            change()
    assert contents(copy) == before
    remove_expert(copy, "expert0")
    remove_expert(copy, "expert2")
    with pytest.raises(InputError, match=r"'expert1' is the only expert"):
        remove_expert(copy, "expert1")


def test_manifests_whose_rows_do_not_fit(copy: Path) -> None:
    for rows, words in (
        (["expert1", "expert0", "expert2"], "are not in the order of the routing rows"),
        (["expert0", "expert1"], "are not in the order"),
        (["expert0", "expert1", "expert2", "expert2"], "are not in the order"),
    ):
        edit(copy, lambda content, rows=rows: content.update(routing_rows=rows))  # type: ignore[misc]
        with pytest.raises(BundleError, match=words):
            Manifest.read(copy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("what", ["add", "remove"])
def test_a_kill_leaves_the_old_or_the_new_bundle(what: str, copy: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each renaming and each removal of a file: the bundle verifies, and the next change cleans up."""
    if what == "add":
        remove_expert(copy, "expert0")
    old, ends = Manifest.read(copy), set()
    saved = contents(copy)
    for step in range(12):
        child = os.fork()
        if not child:
            left = step

            def dying(method: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    return method(*arguments, **options)

                return call

            monkeypatch.setattr(Path, "replace", dying(Path.replace))
            monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
            change(what, copy, adapter)
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        Bundle.open(copy).verify()
        ends.add(Manifest.read(copy) == old)
        if Manifest.read(copy) == old:
            new = change(what, copy, adapter)
            assert set(contents(copy)) == {*new.files, NAME}, "what was left behind is gone"
            Bundle.open(copy).verify()
        elif not done:
            other = remove_expert(copy, "expert2")
            assert set(contents(copy)) == {*other.files, NAME}
        shutil.rmtree(copy)
        for name, data in saved.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(data)
        if done:
            break
    assert done and ends == {True, False}


def change(what: str, bundle: Path, adapter: Path) -> Manifest:
    return add_expert(bundle, "expert0", adapter) if what == "add" else remove_expert(bundle, "expert0")


def test_the_commands_say_who_is_there(
    copy: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry() -> None:
        program(VERBS, "Tests.")(args=sys.argv[1:])

    with in_folder("fusionroute", entry, tmp_path, monkeypatch, capsys) as command:
        removed = command("remove-expert", str(copy), "expert1")
        assert removed.status == 0 and "experts expert0, expert2, " in removed.out and "rows without an expert: expert1" in removed.out
        assert "rows of the routing head without an expert: expert1" in " ".join(command("inspect", str(copy)).out.split())
        added = command("add-expert", str(copy), f"expert1={adapter}")
        assert added.status == 0 and "experts expert0, expert1, expert2, " in added.out and "rows without" not in added.out
        assert command("add-expert", str(copy), "expert1").status == 2
        refused = command("add-expert", str(copy), f"expert1={adapter}")
        assert refused.status == 1 and "add --force to replace it" in refused.err
        assert command("add-expert", str(copy), f"expert1={adapter}", "--force").status == 0
