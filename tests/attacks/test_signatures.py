"""Signed bundles that somebody has changed, in any way: all are refused by who names the signer's key."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute.fr_export.bundle.staged_folder import StagedBundle
from fusionroute.runtime import BundleError, FusionRuntime, signing
from fusionroute.runtime.manifest import Manifest
from tests.support.bundles import edit, rehash
from tests.support.staging import stage

SIGNATURE = "manifest.json.sig"
OTHER = "The signature of {} is not of its manifest by the owner of that key: get the bundle, or the key, from its signer again."


@pytest.fixture
def public(bundle: Path, tmp_path: Path) -> Path:
    """Signs `bundle`; the public key."""
    public = signing.write_new_key(tmp_path / "key")
    text = (bundle / "manifest.json").read_bytes()
    (bundle / SIGNATURE).write_bytes(signing.sign(text, signing.private_key(tmp_path / "key")))
    return public


def refusal(bundle: Path, public: Path) -> str:
    with pytest.raises(BundleError) as caught:
        FusionRuntime.load(bundle, "fp32", "cpu", threads=1, verify_key=public)
    return str(caught.value)


def test_a_signed_bundle_loads_again_and_again(bundle: Path, public: Path) -> None:
    for _ in range(2):
        FusionRuntime.load(bundle, "fp32", "cpu", threads=1, verify_key=public).close()


def test_each_flipped_bit_of_the_manifest_and_of_the_signature_is_noticed(bundle: Path, public: Path) -> None:
    draw = random.Random(4)
    for name, count in (("manifest.json", 60), (SIGNATURE, 20)):
        content = (bundle / name).read_bytes()
        for bit in draw.sample(range(8 * len(content)), count):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (bundle / name).write_bytes(changed)
            sentence = refusal(bundle, public)
            assert sentence == OTHER.format(bundle) or (name == "manifest.json" and sentence.startswith(f"{bundle / name} cannot be read"))
        (bundle / name).write_bytes(content)


def replace_with_rehash(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes().replace(b"<eos>", b"<EOS>"))
    rehash(bundle, "tokenizer.json")


def space(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes() + b" ")


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "another file with its hash": replace_with_rehash,
    "another λ": lambda bundle: edit(bundle, lambda manifest: manifest.update(lam=0.25)),
    "the same JSON in other bytes": space,
    "no signature's bytes": lambda bundle: (bundle / SIGNATURE).write_bytes(b""),
    "a short signature": lambda bundle: (bundle / SIGNATURE).write_bytes((bundle / SIGNATURE).read_bytes()[:63]),
    "a signature of zeros": lambda bundle: (bundle / SIGNATURE).write_bytes(bytes(64)),
    "somebody else's signature": lambda bundle: (bundle / SIGNATURE).write_bytes(
        signing.sign(
            (bundle / "manifest.json").read_bytes(), signing.private_key(signing.write_new_key(bundle.parent / "theirs").with_suffix(""))
        )
    ),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=list(MANIFESTS))
def test_the_manifest_must_be_the_signed_one(bundle: Path, public: Path, change: Callable[[Path], object]) -> None:
    change(bundle)
    assert refusal(bundle, public) == OTHER.format(bundle)


def test_without_its_signature(bundle: Path, public: Path) -> None:
    (bundle / SIGNATURE).unlink()
    assert refusal(bundle, public) == (
        f"{bundle} is not signed, and a key was named to verify it with: get it from its signer again, or leave the key out."
    )


@pytest.mark.parametrize("name", sorted(["tokenizer.json", "graphs/weights/router.bin", "graphs/fusion.onnx", "report.json"]))
def test_files_must_be_the_signed_ones(bundle: Path, public: Path, name: str) -> None:
    """Also after a load that remembers them: a file that was changed since, a missing one, and one too many."""
    path = bundle / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refusal(bundle, public) == (
        f"{path} was changed after the export (its BLAKE3 differs from the manifest); export the bundle again."
    )
    path.unlink()
    assert refusal(bundle, public) == f"The bundle {bundle} lacks {name}; copy or export it again."
    path.write_bytes(content)
    path.with_name("new.bin").write_bytes(b"more")
    assert refusal(bundle, public) == (
        f"{path.with_name('new.bin')} does not belong to the bundle (the manifest does not name it); remove it or export the bundle again."
    )


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.write_bytes(bytes(65))])
def test_a_signature_that_is_no_file_of_64_bytes(bundle: Path, public: Path, make: Callable[[Path], object]) -> None:
    (bundle / SIGNATURE).unlink()
    make(bundle / SIGNATURE)
    assert refusal(bundle, public).startswith(f"{bundle / SIGNATURE} cannot be read (")
    with pytest.raises(BundleError, match="cannot be read"):
        FusionRuntime.load(bundle, "fp32", "cpu", verify=True)


def test_a_manifest_names_no_signature_of_itself(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["files"].update({SIGNATURE: {"sha256": "0" * 64, "bytes": 64}}))
    with pytest.raises(BundleError, match=r"manifest\.json\.sig is listed among the files that it describes"):
        Manifest.read(bundle)


def test_an_export_over_a_signed_bundle_says_that_the_new_one_is_not(tmp_path: Path, log: list[str]) -> None:
    out = tmp_path / "bundle"
    stage(out, "old")
    (out / SIGNATURE).write_bytes(bytes(64))
    stage(out, "new", force=True)
    assert not (out / SIGNATURE).exists()
    assert log == [f"The bundle that was at {out} was signed, and this one is not: sign it with `fusionroute sign`."]
    with StagedBundle(out, True):
        pass
