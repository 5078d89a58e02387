"""Signatures and keys: standard files, checked with the algorithm of another implementation; and who loses a signature."""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")  # the extra "sign"

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fusionroute.runtime import BundleError, FusionRuntime, InputError, UnavailableError, signing
from fusionroute.runtime.adapters.expert_files import add_expert, remove_expert
from fusionroute.runtime.archive import pack, unpack
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands import VERBS
from fusionroute.runtime.commands.verbs import program
from fusionroute.runtime.manifest import Manifest
from tests.support.commands import Command, in_folder
from tests.support.numpy_adapters import write_adapter

SIGNATURE = "manifest.json.sig"
PEM = serialization.Encoding.PEM
UNSIGNED = "{} is not signed any more, since its manifest is another now: sign it again with `fusionroute sign`."


@pytest.fixture
def key(tmp_path: Path) -> Path:
    signing.write_new_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    with in_folder("fusionroute", lambda: program(VERBS, "")(), tmp_path, monkeypatch, capsys) as run:
        yield run


def signed(bundle: Path, key: Path) -> Path:
    """Sign a bundle; returns the public key."""
    text = (bundle / "manifest.json").read_bytes()
    (bundle / SIGNATURE).write_bytes(signing.sign(text, signing.private_key(key)))
    return key.with_name(f"{key.name}.pub")


def test_keys_are_standard_files_that_only_their_owner_reads(key: Path) -> None:
    public = key.with_name("key.pub")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().startswith("-----BEGIN PRIVATE KEY-----\n") and public.read_text().startswith("-----BEGIN PUBLIC KEY-----\n")
    assert signing.private_key(key).public_key() == signing.public_key(public)
    for path in (key, public):
        with pytest.raises(InputError, match=f"^{path} exists, and a key is never overwritten: name another file.$"):
            signing.write_new_key(path)


def test_a_signature_is_the_one_of_rfc_8032() -> None:
    """The second test vector of its section 7.1: a key, a message of one byte, and their signature."""
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert signing.sign(b"\x72", key) == signature
    signing.check(b"\x72", signature, key.public_key(), "this")
    with pytest.raises(BundleError):
        signing.check(b"\x73", signature, key.public_key(), "this")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_checks_it_too(bundle: Path, key: Path) -> None:
    public = signed(bundle, key)
    arguments: list[str | Path] = [
        "-verify",
        "-pubin",
        "-inkey",
        public,
        "-rawin",
        "-in",
        bundle / "manifest.json",
        "-sigfile",
        bundle / SIGNATURE,
    ]
    assert "Verified" in subprocess.run(["openssl", "pkeyutl", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def test_what_is_no_key(tmp_path: Path, key: Path) -> None:
    other = rsa.generate_private_key(65537, 2048)
    files = {
        "rsa": other.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        "rsa.pub": other.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "locked": signing.private_key(key).private_bytes(
            PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
        ),
        "text": b"no key",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    sentences = {
        (signing.private_key, "rsa"): "is a key of another kind than Ed25519: `fusionroute sign --new-key` makes one.",
        (signing.private_key, "locked"): f"is encrypted: `openssl pkey -in {tmp_path / 'locked'}` writes the key without its passphrase.",
        (signing.private_key, "text"): "is no private key in PEM: `fusionroute sign --new-key` makes one.",
        (signing.private_key, "key.pub"): "is no private key in PEM: `fusionroute sign --new-key` makes one.",
        (signing.public_key, "rsa.pub"): "is a key of another kind than Ed25519: name the .pub file that its signer gave you.",
        (signing.public_key, "text"): "is no public key in PEM: name the .pub file that its signer gave you.",
        (signing.public_key, "key"): f"is a private key, and signatures are checked with the public one: name {key}.pub.",
    }
    for (read, name), sentence in sentences.items():
        with pytest.raises(InputError) as caught:
            read(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} {sentence}"
    with pytest.raises(InputError, match=r"nowhere cannot be read \(No such file or directory\): name a file that holds one.$"):
        signing.public_key(tmp_path / "nowhere")


def test_without_the_package(bundle: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    for use in (lambda: FusionRuntime.load(bundle, verify_key=key), lambda: signing.write_new_key(bundle / "another")):
        with pytest.raises(UnavailableError, match=r"^Signatures need the package 'cryptography': pip install 'fusionroute\[sign\]'.$"):
            use()
    FusionRuntime.load(bundle).close()


def test_sign_and_the_commands_that_verify(bundle: Path, tmp_path: Path, command: Command) -> None:
    """One command makes a key and signs; every command that reads the bundle takes the public one."""
    new_key = command("sign", bundle, "--new-key", "mine")
    assert (new_key.status, new_key.err) == (0, "")
    assert new_key.out.splitlines() == [
        "mine: your private key; keep it. mine.pub: the public key; give it to who loads your bundles.",
        f"{bundle}: signed, in {SIGNATURE}",
    ]
    verify = ("--verify-key", "mine.pub")
    assert command("inspect", bundle).out.splitlines()[-1] == "The manifest is signed; --verify-key tells by whom."
    assert command("inspect", bundle, *verify).out.splitlines()[-1] == "The manifest is signed by the owner of mine.pub."
    generate = ("generate", bundle, "--prompt", "12+30=", "--max-new-tokens", 3)
    assert command(*generate, *verify).out == command(*generate).out
    assert command("pack", bundle, "one.tar", *verify).status == command("unpack", "one.tar", "back", *verify).status == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").glob("manifest*")} == {
        name: (bundle / name).read_bytes() for name in ("manifest.json", SIGNATURE)
    }
    command("sign", "--new-key", "other")
    other = ("--verify-key", "other.pub")
    wrong = " is not of its manifest by the owner of that key: get the bundle, or the key, from its signer again.\n"
    for verb in (
        ("inspect", bundle),
        generate,
        ("bench", bundle),
        ("pack", bundle, "two.tar"),
        ("chat", bundle),
        ("serve", bundle),
        ("build", bundle),
        ("remove-expert", bundle, "a"),
    ):
        status, out, err = command(*verb, *other)
        assert (status, out, err.lstrip("\n")) == (1, "", f"error: The signature of {bundle}{wrong}")  # bench has begun a bar
    assert command("unpack", "one.tar", "new", *other) == (1, "", f"error: The signature of one.tar{wrong}")
    assert not (tmp_path / "new").exists() and not (tmp_path / "two.tar").exists()
    assert command("sign", bundle, "--key", "other").status == command("inspect", bundle, *other).status == 0


def test_wrong_usage_of_sign(bundle: Path, command: Command) -> None:
    for arguments in (["sign", bundle], ["sign", "--key", "k"], ["sign", bundle, "--key", "k", "--new-key", "l"]):
        assert command(*arguments).status == 2
    (bundle / "tokenizer.json").write_bytes(b"{}")
    command("sign", "--new-key", "mine")
    assert command("sign", bundle, "--key", "mine").err.startswith(f"error: {bundle / 'tokenizer.json'} has 2 bytes where")
    assert not (bundle / SIGNATURE).exists(), "nobody signs a broken bundle"


def test_an_archive_that_is_not_signed(bundle: Path, key: Path, tmp_path: Path) -> None:
    pack(Bundle.open(bundle), tmp_path / "plain.tar")
    with pytest.raises(BundleError, match=r"plain\.tar is not signed, and a key was named to verify it with"):
        unpack(tmp_path / "plain.tar", tmp_path / "new", verify_key=key.with_name("key.pub"))
    assert not (tmp_path / "new").exists()


def test_another_manifest_ends_the_signature(shared: Path, tmp_path: Path, key: Path, log: list[str]) -> None:
    """Experts that come and go, and every other writer of manifests, say so once."""
    copy = Path(shutil.copytree(shared, tmp_path / "bundle"))
    public, adapter = signed(copy, key), write_adapter(copy, tmp_path / "adapter")
    remove_expert(copy, "expert1", public)
    assert log == [UNSIGNED.format(copy)] and not (copy / SIGNATURE).exists()
    with pytest.raises(BundleError, match="is not signed"):
        add_expert(copy, "expert1", adapter, verify_key=public)
    add_expert(copy, "expert1", adapter)
    assert len(log) == 1
    signed(copy, key)
    with FusionRuntime.load(copy, "fp32", "cpu", verify_key=public) as runtime:
        assert len(runtime.generate([1, 5, 9], 2).experts) == 2
    Manifest.read(copy).write(copy)
    assert log == [UNSIGNED.format(copy)] * 2
