"""`--load`, `--save` and `--kv-memory`: a prompt is read once, and answers are those of a prompt that was read."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.commands import serve as serve_module
from fusionroute.runtime.engine import FusionRuntime as Runtime
from fusionroute.runtime.serve.settings import Settings
from tests.support.commands import Command

SYSTEM = "You are asked for sums, and you answer with a number. "


def generated(command: Command, bundle: Path, prompt: str, *options: object) -> list[int]:
    ended = command("generate", bundle, "--precision", "fp32", "--prompt", prompt, "--max-new-tokens", 5, "--json", *options)
    assert ended.status == 0, ended.err
    ids: list[int] = json.loads(ended.out)["token_ids"]
    return ids


def test_a_prompt_is_read_once(command: Command, bundles: list[Path], tmp_path: Path, router_reads: list[int]) -> None:
    file = tmp_path / "system"
    expected = [generated(command, bundles[0], SYSTEM + question) for question in ("", "12+30=")]
    router_reads.clear()
    assert generated(command, bundles[0], SYSTEM, "--save", file) == expected[0]
    length = sum(count for count in router_reads if count > 1)
    assert length == len(SYSTEM) + 1 and router_reads[1] in (2, 3), "with its BOS; the newest tokens are left to the answer"
    router_reads.clear()
    assert generated(command, bundles[0], f"{SYSTEM}12+30=", "--load", file) == expected[1]
    assert router_reads[0] <= 6 + 3
    assert generated(command, bundles[0], "7", "--load", file) == generated(command, bundles[0], "7"), "a prompt that begins otherwise"
    assert generated(command, bundles[0], SYSTEM, "--load", file, "--save", file, "--expert", "expert1")
    with FusionRuntime.load(bundles[0], "fp32") as rt, rt.session() as session:
        session.load(file)
        assert session.lags == {"expert0": len(SYSTEM) + 1, "expert1": 3}


def test_a_conversation_is_read_once(
    command: Command, bundles: list[Path], tmp_path: Path, router_reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(lines: str, *options: object) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        ended = command("chat", bundles[0], "--precision", "fp32", "--max-new-tokens", 4, "--system", SYSTEM, *options)
        assert ended.status == 0, ended.err
        return ended.out

    conversation, kept = tmp_path / "said.json", tmp_path / "kept"
    first = talk(f"12+30=\n/save {conversation}\n", "--save", kept)
    router_reads.clear()
    again = talk(f"/load {conversation}\nand now?\n", "--load", kept)
    with_file, last = router_reads[0], talk(f"/load {conversation}\nand now?\n")
    assert last == again and first and with_file < len(SYSTEM) < max(router_reads)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--load", "none"), "none cannot be read (No such file or directory): name a file that a session has saved."),
        (("--save", "/none/file"), "/none/file cannot be written, since /none is no folder: make it first."),
    ],
)
def test_files_that_cannot_be_used(command: Command, bundles: list[Path], options: tuple[str, str], sentence: str) -> None:
    ended = command("generate", bundles[0], "--prompt", "a", *options)
    assert (ended.status, ended.out) == (1, "") and ended.err.endswith(f"{sentence}\n")


def test_a_bound_that_a_prompt_does_not_fit(command: Command, bundles: list[Path], tmp_path: Path) -> None:
    """A mebibyte is 2,048 tokens of one model: 900 in two of them, not in three."""
    prompt = ("generate", bundles[0], "--prompt", "a" * 900, "--precision", "fp32", "--kv-memory", 1, "--max-new-tokens", 1)
    assert command(*prompt, "--expert", "expert0").status == 0
    ended = command(*prompt, "--save", tmp_path / "kept")
    assert (ended.status, ended.out) == (1, "") and " of the 1.0 MB of kv_memory: end other texts" in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sessions", "share"),
    [
        (("--kv-memory", "8"), 5, 8 << 20),
        (("--memory", "8"), 5, 8 << 20),
        (("--memory", "1"), 1, 1 << 20),
        (("--memory", "8", "--sessions", "3"), 3, 8 << 20),
        (("--sessions", "5"), 5, None),
        (("--memory", "16", "--precision", "fp32,int8"), 5, 8 << 20),
    ],
)
def test_serve_counts_sessions_by_the_bound_that_its_runtimes_have(
    command: Command, bundles: list[Path], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], sessions: int, share: int | None
) -> None:
    """A text of the full context takes 1.5 MiB: 1,024 tokens in three models of 512 bytes each."""
    served: list[Any] = []

    def listen(runtimes: list[Runtime], settings: Settings, _: Any) -> None:
        served.append((settings.sessions, [rt.options.kv_memory for rt in runtimes], [rt.options.prefix_cache for rt in runtimes]))

    monkeypatch.setattr(serve_module, "listen", listen)
    ended = command("serve", bundles[0], "--port", 0, *options)
    assert ended.status == 0, ended.err
    count = 1 + options.count("fp32,int8")
    assert served == [(sessions, [share] * count, [-(-sessions // count)] * count)]


def test_serve_keeps_texts_that_were_saved(
    command: Command, bundles: list[Path], tmp_path: Path, router_reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads = tmp_path / "system", list[int]()
    generated(command, bundles[0], SYSTEM, "--save", file)

    def listen(runtimes: list[Runtime], settings: Settings, _: Any) -> None:
        for question in ("1+1=", "another text", "2+2="):
            router_reads.clear()
            runtimes[0].generate(question if question == "another text" else SYSTEM + question, 1)
            reads.append(router_reads[0])

    monkeypatch.setattr(serve_module, "listen", listen)
    assert command("serve", bundles[0], "--port", 0, "--precision", "fp32", "--sessions", 1, "--load", file).status == 0
    assert reads[0] == reads[2] <= 4 + 3 and reads[1] > 10
    assert command("serve", bundles[0], "--port", 0, "--precision", "int8", "--load", file).err.endswith(
        f"{file} was saved with precision fp32, and this runtime has int8: load it there, or read its text again.\n"
    )
