"""Signatures of bundles: Ed25519 over the bytes of manifest.json, which holds the hash of every other file.

Keys are PEM files as every tool writes them: PKCS #8 the private ones, SubjectPublicKeyInfo the public ones. The
signature is 64 bytes in a file of its own, so that `openssl pkeyutl -verify -rawin` checks it too. RFC 8032.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fusionroute.runtime.errors import BundleError, InputError, UnavailableError, reason
from fusionroute.runtime.regular_files import read_regular

# cryptography is imported where it is used: most bundles are loaded without a key.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MOST_BYTES = 1 << 16  # of a file with a key
MAKE = "`fusionroute sign --new-key` makes one"


def write_new_key(path: Path) -> Path:
    """Write a new private key to `path`, which only this user may read, and its public key to `path`.pub, which is returned.

    Raises InputError where one of the files exists, UnavailableError without the package cryptography, OSError.
    """
    require()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_name(f"{path.name}.pub")
    for each in (path, public_path):
        if each.exists() or each.is_symlink():
            raise InputError(f"{each} exists, and a key is never overwritten: name another file.")
    key, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for each, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        with os.fdopen(os.open(each, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    return public_path


def private_key(path: Path) -> Ed25519PrivateKey:
    """Raises InputError for all but a private Ed25519 key in PEM, UnavailableError without the package cryptography."""
    require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    text = key_text(path)
    try:
        key = load_pem_private_key(text, None)
    except TypeError as error:
        raise InputError(f"{path} is encrypted: `openssl pkey -in {path}` writes the key without its passphrase.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no private key in PEM: {MAKE}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is a key of another kind than Ed25519: {MAKE}.")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Raises InputError for all but a public Ed25519 key in PEM, UnavailableError without the package cryptography."""
    require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text = key_text(path)
    if b"PRIVATE KEY" in text:
        raise InputError(f"{path} is a private key, and signatures are checked with the public one: name {path}.pub.")
    try:
        key = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no public key in PEM: name the .pub file that its signer gave you.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} is a key of another kind than Ed25519: name the .pub file that its signer gave you.")
    return key


def require() -> None:
    """Raise UnavailableError where the package cryptography is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise UnavailableError("Signatures need the package 'cryptography': pip install 'fusionroute[sign]'.") from error


def key_text(path: Path) -> bytes:
    """The content of a file with a key. Raises InputError."""
    try:
        return read_regular(path.resolve().parent, path.resolve().name, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise InputError(f"The key {path} cannot be read ({reason(error)}): name a file that holds one.") from error


def sign(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signature of a manifest's bytes."""
    return key.sign(manifest)


def check(manifest: bytes, signature: bytes | None, key: Ed25519PublicKey, where: str) -> None:
    """Raise BundleError unless `signature` is that of the manifest's bytes by the owner of `key`; `where` names the bundle."""
    from cryptography.exceptions import InvalidSignature

    if signature is None:
        raise BundleError(
            f"{where} is not signed, and a key was named to verify it with: get it from its signer again, or leave the key out."
        )
    try:
        key.verify(signature, manifest)
    except InvalidSignature as error:
        raise BundleError(
            f"The signature of {where} is not of its manifest by the owner of that key: get the bundle, or the key, from its signer again."
        ) from error
