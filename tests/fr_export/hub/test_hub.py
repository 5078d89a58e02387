"""Bundles to and from a hub: what is sent and what is not, what arrives, and every way in which it may fail."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fusionroute.fr_export.hub.model_card import MARK, model_card
from fusionroute.fr_export.hub.pull import pull
from fusionroute.fr_export.hub.push import push
from fusionroute.runtime import signing
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, FusionError, InputError, UnavailableError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.manifest_file import SIGNATURE
from tests.support.exporting import export_checkpoints
from tests.support.hub import TOKEN, Hub, Repository, running
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_model, make_system

NAME = "owner/system"
SHAPE = Shape(experts=2, layers=1, tokenizer=True)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A system, and the same system with another first expert and no second one."""
    folder = tmp_path_factory.mktemp("pushed")
    router, experts = make_system(folder, SHAPE)
    other = make_model(folder / "other", SHAPE, 77, expert=True)
    first = export_checkpoints(folder / "first", SHAPE, router, experts, ("int8",))
    second = export_checkpoints(folder / "second", SHAPE, router, experts | {"expert0": str(other)}, ("int8",))
    return Bundle.open(first), Bundle.open(second)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that huggingface_hub asks, by LFS and not by Xet, with the owner's token."""
    with running() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return hub.repositories[NAME].branches[branch]


def test_there_and_back(bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path) -> None:
    address = push(bundles[0], NAME, "a card\n")
    assert address.startswith(hub.address)
    assert files(hub) == contents(bundles[0].folder) | {"README.md": b"a card\n"}
    assert len(hub.repositories[NAME].commits) == 1, "nobody sees half a bundle"
    manifest = pull(NAME, tmp_path / "new" / "back")
    assert manifest == bundles[0].manifest
    assert contents(tmp_path / "new" / "back") == contents(bundles[0].folder)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]
    fetched = [path.rpartition("/resolve/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched[0].endswith("/manifest.json"), "the manifest comes first"


def test_another_push_sends_what_changed_and_removes_what_is_gone(bundles: tuple[Bundle, Bundle], hub: Hub) -> None:
    push(bundles[0], NAME, f"{MARK} old")
    files(hub)["graphs/old.onnx"] = b"of an older bundle"
    files(hub)["pictures/mine.png"] = b"a file of the owner's"
    old = json.loads(files(hub)["manifest.json"])
    old["files"]["graphs/old.onnx"] = next(iter(old["files"].values()))
    files(hub)["manifest.json"] = json.dumps(old).encode()
    hub.uploads.clear()
    push(bundles[1], NAME, f"{MARK} new")
    changed = {
        entry.sha256
        for name, entry in bundles[1].manifest.files.items()
        if entry.bytes >= 1000 and entry != bundles[0].manifest.files[name]
    }
    assert changed and set(hub.uploads) - {hashlib.sha256((bundles[1].folder / "manifest.json").read_bytes()).hexdigest()} == changed
    assert files(hub) == contents(bundles[1].folder) | {
        "README.md": f"{MARK} new".encode(),
        "pictures/mine.png": b"a file of the owner's",
    }
    files(hub)["README.md"] = b"my own text"
    push(bundles[0], NAME, f"{MARK} newer")
    assert files(hub)["README.md"] == b"my own text"


def test_a_signature_travels_and_goes_with_its_bundle(bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path) -> None:
    """Nothing but the manifest and the signature is fetched before they fit the key."""
    public = signing.write_new_key(tmp_path / "key")
    signing.write_new_key(tmp_path / "other")
    copy = Path(shutil.copytree(bundles[0].folder, tmp_path / "signed"))
    signature = signing.sign((copy / "manifest.json").read_bytes(), signing.private_key(tmp_path / "key"))
    (copy / SIGNATURE).write_bytes(signature)
    push(Bundle.open(copy, public), NAME, "card")
    assert files(hub)[SIGNATURE] == signature
    pull(NAME, tmp_path / "back", verify_key=public)
    assert contents(tmp_path / "back") == contents(copy)
    hub.requests.clear()
    with pytest.raises(BundleError, match=f"^The signature of {NAME} is not of its manifest by the owner of that key"):
        pull(NAME, tmp_path / "new", verify_key=tmp_path / "other.pub")
    assert not (tmp_path / "new").exists()
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"manifest.json", SIGNATURE}
    push(bundles[1], NAME, "card")
    assert SIGNATURE not in files(hub), "it is of another manifest"
    with pytest.raises(BundleError, match=f"^{NAME} is not signed, and a key was named to verify it with"):
        pull(NAME, tmp_path / "new", verify_key=public)


def test_an_interrupted_push_goes_on_where_it_stopped(bundles: tuple[Bundle, Bundle], hub: Hub) -> None:
    hub.fault = lambda method, path: 400 if "/commit/" in path else None
    with pytest.raises(UnavailableError, match=f"The hub refuses {NAME}"):
        push(bundles[0], NAME, "card")
    sent = len(hub.uploads)
    assert sent > 3 and files(hub) == {}
    hub.fault = lambda method, path: None
    push(bundles[0], NAME, "card")
    assert len(hub.uploads) == sent and files(hub).keys() == {*contents(bundles[0].folder), "README.md"}


def test_private_repositories_and_branches(
    bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundles[0], NAME, "card", private=True)
    push(bundles[1], NAME, "card", revision="next")
    assert hub.repositories[NAME].private
    assert pull(NAME, tmp_path / "main") == bundles[0].manifest
    assert pull(NAME, tmp_path / "next", revision="next") == bundles[1].manifest
    first = next(iter(hub.repositories[NAME].commits))
    assert pull(NAME, tmp_path / "commit", revision=first) == bundles[0].manifest
    with pytest.raises(UnavailableError, match=f"{NAME} has no revision 'none': name one of its branches, tags or commits"):
        pull(NAME, tmp_path / "none", revision="none")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UnavailableError, match=f"The hub has no repository {NAME}, or it is private: check the name, or log in"):
        pull(NAME, tmp_path / "stranger")


Prepare = Callable[[Hub, pytest.MonkeyPatch], object]


def gated(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].gated = True
    patch.delenv("HF_TOKEN")


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import close_session

    close_session()  # it looks at the setting when it is made
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def unreachable(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


PULLS: dict[str, tuple[Prepare, str]] = {
    "not found": (lambda hub, _: hub.repositories.clear(), f"The hub has no repository {NAME}, or it is private"),
    "gated": (gated, f"{NAME} is gated: accept its conditions on the hub, then log in"),
    "offline": (offline, "HF_HUB_OFFLINE is set"),
    "no network": (unreachable, "The hub cannot be reached: check the network"),
    "server that fails": (lambda hub, _: setattr(hub, "fault", lambda m, p: 418 if "/resolve/" in p else None), f"The hub refuses {NAME}"),
    "no bundle": (lambda hub, _: files(hub).pop("manifest.json"), f"{NAME} holds no manifest.json, so it is no bundle"),
    "other manifest": (lambda hub, _: files(hub).update({"manifest.json": b'{"short_name": "app"}'}), "does not fit the bundle format"),
    "missing file": (lambda hub, _: files(hub).pop("tokenizer.json"), f"{NAME} lacks tokenizer.json"),
    "other size": (lambda hub, _: files(hub).update({"tokenizer.json": b"{}"}), "is not the file that the manifest describes"),
}


@pytest.mark.parametrize("name", PULLS)
def test_pulls_that_fail_leave_nothing(
    bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    push(bundles[0], NAME, "card")
    hub.requests.clear()
    prepare, words = PULLS[name]
    prepare(hub, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FusionError, match=words) as caught:
        pull(NAME, tmp_path / "back")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    weights = [path for method, path in hub.requests if method == "GET" and path.endswith(".bin")]
    assert not weights, "refused before anything large is fetched"


def test_content_that_is_not_what_the_hub_says(bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path) -> None:
    """Small files have no SHA-256 on the hub: they are hashed here."""
    push(bundles[0], NAME, "card")
    template = files(hub)["chat_template.jinja"]
    files(hub)["chat_template.jinja"] = bytes([template[0] ^ 1]) + template[1:]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=f"What {NAME} sent is not what its manifest describes"):
        pull(NAME, tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before


def test_pushes_that_are_refused(bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/model"] = Repository()
    hub.repositories["owner/model"].commit("main", {"model.safetensors": b"x", "README.md": b""})
    with pytest.raises(InputError, match=r"owner/model holds model\.safetensors and is no bundle: name another repository"):
        push(bundles[0], "owner/model", "card")
    with pytest.raises(UnavailableError, match="Your token gives no right to do this with stranger/system"):
        push(bundles[0], "stranger/system", "card")
    with pytest.raises(InputError, match=r"'owner/a--b' is no hub id such as owner/name"):
        push(bundles[0], "owner/a--b", "card")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UnavailableError, match="The hub does not know your token"):
        push(bundles[0], NAME, "card")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UnavailableError, match="To push, the hub must know who you are: log in"):
        push(bundles[0], NAME, "card")
    assert hub.uploads == [] and NAME not in hub.repositories
    with pytest.raises(InputError, match="exists and is not empty: name another folder"):
        pull(NAME, bundles[0].folder)


def test_the_card_has_the_figures_of_the_report(bundles: tuple[Bundle, Bundle]) -> None:
    decode = {"perplexity_ratio": 1.0123, "kl_mean": 2.5e-3, "greedy_agreement": 0.987, "routing_agreement": 0.991}
    common = {"target": "ort:cpu", "bytes": 1_500_000, "bits_per_weight": 8.5, "missed": [], "not_compared": None}
    report = {
        "notes": ["One prompt only."],
        "sources": [{"model": "router", "notes": []}, {"model": "expert0", "notes": ["it was quantised already"]}],
        "variants": [
            common | {"precision": "int8", "compared": {"decode": decode}},
            common | {"precision": "int4", "compared": None, "not_compared": "it is too large", "missed": ["KL 0.2"]},
        ],
    }
    card = model_card(bundles[0].manifest, report, NAME, "apache-2.0", ("owner/base", "owner/other"))
    text = card.split("---\n", 2)[2]
    assert ModelCard(card).data.to_dict() == {
        "library_name": "fusionroute", "pipeline_tag": "text-generation", "license": "apache-2.0",
        "base_model": ["owner/base", "owner/other"], "tags": ["fusionroute", "onnx"],
    }  # fmt: skip
    assert "| ort:cpu | int8 | 1.5 MB | 8.50 | +1.23% | 2.5e-03 | 98.7% | 99.1% |" in text
    assert "| ort:cpu | int4 | 1.5 MB | 8.50 | – | – | – | – |" in text
    assert "`expert0`, `expert1`" in text and f"fusionroute pull {NAME} system" in text and MARK in text
    for line in (
        "- One prompt only.",
        "- expert0: it was quantised already",
        "- int4 for ort:cpu misses its bound: KL 0.2.",
        "int4 for ort:cpu was not compared with torch: it is",
    ):
        assert line in text
    assert "names no licence" not in text and "names no licence" in model_card(bundles[0].manifest, {}, NAME)


def test_the_commands_as_processes_without_torch(bundles: tuple[Bundle, Bundle], hub: Hub, tmp_path: Path) -> None:
    """As users run them, with HF_ENDPOINT, where the exporter's packages are not installed."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors')));"
    script = f"{block} from fusionroute.fr_export.commands.main import main; main()"
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(tmp_path),
    }

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    ended = run("push", bundles[0].folder, NAME, "--license", "mit", "--base-model", "owner/base", "--private")
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith(hub.address)
    assert "license: mit\nbase_model:\n- owner/base\n" in files(hub)["README.md"].decode() and hub.repositories[NAME].private
    ended = run("pull", NAME, tmp_path / "back")
    count = len(Manifest.read(tmp_path / "back").files)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{tmp_path / 'back'}: {count} files, all with the hashes of the manifest\n"
    ended = run("pull", NAME, tmp_path / "back")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {tmp_path / 'back'} exists and is not empty: name another folder.\n"
    ended = run("pull", "nonsense", tmp_path / "other")
    assert ended.returncode == 2 and "is no hub id such as owner/name" in ended.stderr
