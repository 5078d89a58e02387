"""Tokenizers that panic, hang or take all memory. The manifest agrees with each: its author wrote both."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import BundleError, FusionError, FusionRuntime, tokenizer_limits, tokenizer_trial
from fusionroute.runtime.regular_files import identity, open_regular
from fusionroute.runtime.tokenizer_limits import unbounded
from fusionroute.runtime.tokenizer_trial import try_tokenizer
from tests.support.bundles import rehash

Tokenizer = dict[str, Any]


def replace(pattern: dict[str, str], content: str) -> Tokenizer:
    return {"type": "Replace", "pattern": pattern, "content": content}


def precompiled(table: bytes) -> Tokenizer:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


DOUBLING = [replace({"String": "a"}, "aa")] * 40
PIECE = {"Sequence": {"id": "A", "type_id": 0}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "texts that double": ({"normalizer": {"type": "Sequence", "normalizers": DOUBLING}}, "it makes texts more than 64 times longer"),
    "sequences of sequences": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": DOUBLING[:4]}] * 2}},
        "it makes texts more than 64 times longer",
    ),
    "a character by many": ({"normalizer": replace({"Regex": "."}, "a" * 64)}, "it makes texts more than 64 times longer"),
    "decoded texts that double": ({"decoder": {"type": "Sequence", "decoders": DOUBLING}}, "it makes texts more than 64 times longer"),
    "nothing by something": ({"normalizer": replace({"String": ""}, "a")}, "it replaces nothing by something"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "a" * 1001}}, "it prepends more than 1000 characters"),
    "many steps": ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 101}}, "it has more than 100 steps"),
    "the text many times": (
        {"post_processor": {"type": "TemplateProcessing", "single": [PIECE] * 65, "pair": [], "special_tokens": {}}},
        "it makes texts more than 64 times longer",
    ),
    "a template of many pieces": (
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [PIECE] * 1001, "special_tokens": {}}},
        "its template has more than 1000 pieces",
    ),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "it has pieces without a character"),
    "a charsmap that asks for 4 GB": ({"normalizer": precompiled(b"\xfc\xff\xff\xff" + bytes(17))}, "its charsmap is cut off"),
    "a charsmap of nothing": ({"normalizer": precompiled(b"\0\0\0")}, "its charsmap is cut off"),
    "a charsmap of odd size": ({"normalizer": precompiled(b"\x03\0\0\0" + bytes(9))}, "its charsmap is cut off"),
    "a charsmap in no base64": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "äö"}}, "its charsmap is no base64"),
    "a step without a type": ({"normalizer": {}}, "it is no tokenizer: KeyError"),
    "a list of steps": ({"normalizer": []}, "it is no tokenizer: TypeError"),
}


@pytest.fixture
def whole(bundles: list[Path]) -> Tokenizer:
    tokenizer: Tokenizer = json.loads((bundles[0] / "tokenizer.json").read_bytes())
    return tokenizer


def put(bundle: Path, tokenizer: Tokenizer) -> None:
    (bundle / "tokenizer.json").write_bytes(json.dumps(tokenizer).encode())
    rehash(bundle, "tokenizer.json")


def load(bundle: Path, **options: Any) -> FusionRuntime:
    return FusionRuntime.load(bundle, "fp32", "cpu", threads=1, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_bound_is_refused(whole: Tokenizer, name: str) -> None:
    change, why = REFUSED[name]
    assert unbounded(json.dumps(whole).encode()) is None
    assert unbounded(json.dumps(whole | change).encode()) == why


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"", b"[]", b"null", b"\xff", b'{"normalizer": {"type": "Sequence", "normalizers": 5}}']
)
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    assert unbounded(content)


def test_a_load_ends_in_one_sentence(bundle: Path, whole: Tokenizer) -> None:
    put(bundle, whole | REFUSED["texts that double"][0])
    with pytest.raises(BundleError) as caught:
        load(bundle)
    sentence = "cannot be read as a tokenizer.json (it makes texts more than 64 times longer); export the bundle again."
    assert str(caught.value) == f"{bundle / 'tokenizer.json'} {sentence}"


HANGS = "import sys, time\ntime.sleep(600)"
TAKES_MEMORY = "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)\nbytearray(1 << 40)"
DIES = "import os\nos.abort()"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (HANGS, "reading it takes more than 1 seconds"),
        (TAKES_MEMORY, "reading it takes more memory than it may, or ends the process"),
        (DIES, "reading it takes more memory than it may, or ends the process"),
    ],
)
def test_a_trial_costs_only_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, why: str) -> None:
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(tokenizer_limits, "__file__", str(tmp_path / "program.py"))
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 1 if program == HANGS else 60)
    with pytest.raises(BundleError) as caught:
        try_tokenizer(b"{}", Path("tokenizer.json"))
    assert str(caught.value) == f"tokenizer.json cannot be read as a tokenizer.json ({why}); export the bundle again."


def test_a_trial_of_another_file_does_not_count(tmp_path: Path, bundles: list[Path]) -> None:
    """It begins before the bundle is opened, and files may be exchanged until then."""
    good, bad = (bundles[0] / "tokenizer.json").read_bytes(), b"no JSON"
    identities = []
    for name, content in (("good", good), ("bad", bad)):
        (tmp_path / name).write_bytes(content)
        with open_regular(tmp_path, name) as file:
            identities.append(identity(file))
    for began, loaded in (("bad", 0), ("good", 1)):
        trial = tokenizer_trial.Trial()
        with open_regular(tmp_path, began) as file:
            trial.begin(file)
        with ExitStack() as stack:
            stack.callback(trial.end)
            if loaded == 1:
                stack.enter_context(pytest.raises(BundleError, match="cannot be read as a tokenizer"))
            trial.decide((good, bad)[loaded], tmp_path / "tokenizer.json", identities[loaded])


def test_a_trial_reads_the_file_that_it_began_with(tmp_path: Path, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process, and nothing through a pipe."""
    (tmp_path / "tokenizer.json").write_bytes((bundles[0] / "tokenizer.json").read_bytes())
    trial = tokenizer_trial.Trial()
    with open_regular(tmp_path, "tokenizer.json") as file:
        trial.begin(file)
        own = identity(file)
    monkeypatch.setattr(subprocess, "Popen", None)
    trial.decide(b"not looked at: its identity tells", tmp_path / "tokenizer.json", own)
    trial.end()


def test_programs_that_embed_python_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    with pytest.raises(BundleError, match="Expecting value"):
        try_tokenizer(b"no JSON", Path("tokenizer.json"))


def test_a_tokenizer_is_tried_once_unless_it_is_trusted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    monkeypatch.setattr("fusionroute.runtime.integrity.SETTLED", 0)
    monkeypatch.setattr(tokenizer_trial.Trial, "decide", lambda trial, content, path, file: tried.append(path))
    load(bundle, trusted=True).close()
    assert tried == []
    for _ in range(2):
        load(bundle).close()
    assert tried == [bundle / "tokenizer.json"], "the trusted load did not vouch for it"


def outside(table: bytes) -> bytes:
    """A trie of one unit, which leads to places that are not there."""
    return len(table).to_bytes(4, "little") + table


Use = Callable[[FusionRuntime], object]
FAILS: dict[str, tuple[dict[str, Any], Use]] = {
    "a charsmap that points outside": ({"normalizer": precompiled(outside(b"\xff\xff\xff\xff"))}, lambda rt: rt.generate("äöü", 2)),
    "an endless expression": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        lambda rt: rt.encode("a" * 40 + "!"),
    ),
    "a special token that is missing": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        lambda rt: rt.generate("12+30=", 2),
    ),
    "an unknown token that is missing": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, "added_tokens": [], "post_processor": None},
        lambda rt: rt.encode("12"),
    ),
    "more is stripped than there is": (
        {"decoder": {"type": "Strip", "content": "4", "start": 9, "stop": 9}},
        lambda rt: rt.decode([24, 22]),
    ),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_tokenizer_that_fails_costs_a_request(bundle: Path, whole: Tokenizer, name: str) -> None:
    """Panics of the native library are no Exceptions: callers that catch those would end."""
    change, use = FAILS[name]
    put(bundle, whole | change)
    with load(bundle) as runtime:
        for _ in range(2):
            with pytest.raises(FusionError, match=r"^The tokenizer fails on this text \(.*\); export the bundle again\.$"):
                use(runtime)
        assert len(runtime.score([5, 6, 7]).logits) == 3, "the process goes on"


def test_ctrl_c_is_no_error_of_the_tokenizer(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(bundles[0]) as runtime:
        assert runtime.tokenizer is not None

        class Interrupted:
            def encode_batch(self, texts: list[str], add_special_tokens: bool) -> None:
                raise KeyboardInterrupt

        monkeypatch.setattr(runtime.tokenizer, "_tokenizer", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            runtime.encode("a")
