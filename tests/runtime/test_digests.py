"""Hashes of contents that come in pieces."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import digests
from fusionroute.runtime.digests import Digest, digest_of

# of the text "abc": FIPS 180-2, appendix B, and the reference implementation of BLAKE3
KNOWN = {
    "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    "blake3": "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
}


def test_known_hashes() -> None:
    digest = Digest()
    for piece in (b"a", b"", b"bc"):
        digest.update(piece)
    assert (digest.hexdigests, digest.bytes) == (KNOWN, 3)
    only = Digest(["blake3"])
    only.update(memoryview(b"abc"))
    assert only.hexdigests == {"blake3": KNOWN["blake3"]}


@settings(deadline=None)
@given(content=st.binary(max_size=300), piece=st.integers(1, 100))
def test_a_file_is_hashed_whole(tmp_path_factory: pytest.TempPathFactory, content: bytes, piece: int) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "content"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "PIECE", piece)
        digest = digest_of(path)
    whole = Digest()
    whole.update(content)
    assert digest.hexdigests == whole.hexdigests and digest.bytes == len(content)
    assert digest.hexdigests["sha256"] == hashlib.sha256(content).hexdigest()
