"""`fusionroute chat`: answers are those of the whole conversation, and its commands do what they say."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.conversation import Conversation
from fusionroute.runtime.decoder import Decoder
from tests.support.bundles import rehash
from tests.support.commands import Command, Ended

Talk = Callable[..., Ended]


@pytest.fixture
def talk(command: Command, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Lines in, what is printed out."""

    def run(*lines: str, options: tuple[object, ...] = ("--max-new-tokens", 8)) -> Ended:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command("chat", bundles[0], "--precision", "fp32", *options)

    return run


def answers(bundle: Path, *lines: str, **options: Any) -> list[str]:
    """What the runtime answers, each time to all that was said."""
    messages: list[dict[str, str]] = []
    with FusionRuntime.load(bundle, precision="fp32", prefix_cache=0) as rt:
        for line in lines:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": rt.generate(messages, 8, **options).text})
    return [message["content"] for message in messages[1::2]]


def test_each_answer_knows_what_was_said(talk: Talk, bundles: list[Path]) -> None:
    first, second = answers(bundles[0], "12+30=", "and now?")
    assert talk("12+30=", "", "and now?").out.replace(" …\n", "\n") == f"{first}\n{second}\n"
    reset = talk("12+30=", "/reset", "12+30=").out.replace(" …\n", "\n")
    assert reset == f"{first}\n{first}\n"


def test_how_answers_are_chosen(talk: Talk, bundles: list[Path]) -> None:
    pinned = answers(bundles[0], "12+30=", expert="expert1", lam=0.1)[0]
    assert talk("/expert expert1", "/lambda 0.1", "12+30=").out.replace(" …\n", "\n") == f"{pinned}\n"
    free = answers(bundles[0], "12+30=")[0]
    assert talk("/expert expert1", "/expert auto", "/lambda 0.1", "/lambda auto", "12+30=").out.replace(" …\n", "\n") == f"{free}\n"
    sampled = answers(bundles[0], "12+30=", temperature=1.2, seed=3)[0]
    assert talk("/temperature 1.2", "12+30=", options=("--max-new-tokens", 8, "--seed", 3)).out.replace(" …\n", "\n") == f"{sampled}\n"


SAID = {
    "/foo": "There is no /foo: /help lists commands.",
    "/foo bar": "There is no /foo: /help lists commands.",
    "/reset now": "/reset takes no value.",
    "/expert": "/expert needs a value: /help shows which.",
    "/expert x": "Unknown expert 'x': use one of expert0, expert1, or auto.",
    "/lambda 2": "lam=2.0 is out of range: expected a number from 0 (expert only) to 1 (router only).",
    "/lambda much": "'much' is no number.",
    "/temperature -1": "temperature is -1.0, expected 0 or at least 0.001: use 0 for greedy decoding.",
    "/load /nowhere": "/nowhere cannot be read (No such file or directory): name a file that /save wrote.",
    "/save /nowhere/x": "/nowhere/x cannot be written (No such file or directory): name another file.",
    "/stats": "There was no answer yet.",
}


def test_what_is_wrong_is_said_and_the_program_goes_on(talk: Talk) -> None:
    ended = talk(*SAID, "/quit", "12+30=")
    assert (ended.status, ended.out.splitlines()) == (0, list(SAID.values()))


def test_saved_conversations(talk: Talk, bundles: list[Path], tmp_path: Path) -> None:
    first, second = answers(bundles[0], "12+30=", "and now?")
    file, other = tmp_path / "said.json", tmp_path / "other.json"
    talk("12+30=", f"/save {file}", f"/save {file}")
    assert json.loads(file.read_text()) == [{"role": "user", "content": "12+30="}, {"role": "assistant", "content": first}]
    assert talk(f"/load {file}", "and now?").out.replace(" …\n", "\n") == f"{second}\n"
    other.write_text("important")
    assert talk("12+30=", f"/save {other}").out.splitlines()[-1] == f"{other} holds no conversation: name a file that /save wrote."
    assert other.read_text() == "important" and [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


def test_ctrl_c_ends_the_answer_and_not_the_program(talk: Talk, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = answers(bundles[0], "12+30=", "12+30=")
    advance, steps = Decoder.advance, [0]

    def interrupted(self: Decoder, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return advance(self, *arguments)

    monkeypatch.setattr(Decoder, "advance", interrupted)
    ended = talk("12+30=", "/reset", "12+30=", "/stats")
    stopped, again, stats = ended.out.replace(" …\n", "\n").rsplit("\n", 3)[:3]
    assert ended.status == 0 and first.startswith(stopped) and len(stopped) < len(first) and again == first
    assert "first token after" in stats and second is not None


def test_a_conversation_is_read_from_where_it_goes_on(bundles: list[Path], router_reads: list[int]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        conversation = Conversation(rt, 4)
        list(conversation.ask("a long beginning " * 20))
        before, figures = sum(router_reads), conversation.figures
        list(conversation.ask("b"))
        assert before >= figures.prompt_tokens > 200
        assert sum(router_reads) - before < 60 and conversation.figures.prompt_tokens > figures.prompt_tokens
        with pytest.raises(InputError, match="leaves no room"):
            list(conversation.ask("c " * 2000))
        assert len(conversation.messages) == 4


def test_tools_reach_the_chat_template(command: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, file = [{"type": "function", "function": {"name": "f"}}], tmp_path / "tools.json"
    file.write_text(json.dumps(tools))
    (bundle / "chat_template.jinja").write_text("{{ messages[-1].content }}{{ tools | tojson }}")
    rehash(bundle, "chat_template.jinja")
    with FusionRuntime.load(bundle, precision="fp32") as rt:
        expected = rt.generate([{"role": "user", "content": "12+30="}], 8, tools=tools).text
        assert rt.generate("12+30=" + json.dumps(tools), 8).text != rt.generate("12+30=", 8).text
    monkeypatch.setattr("sys.stdin", io.StringIO("12+30=\n"))
    ended = command("chat", bundle, "--precision", "fp32", "--max-new-tokens", 8, "--tools", file)
    assert ended.out.replace(" …\n", "\n") == f"{expected}\n"
    assert command("chat", bundle, "--tools", tmp_path / "nowhere.json").status == 2


def test_a_bundle_without_a_chat_template_says_so(command: Command, bundle: Path) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    content["files"].pop("chat_template.jinja")
    (bundle / "manifest.json").write_text(json.dumps(content))
    ended = command("chat", bundle)
    assert ended.status == 1 and "has no chat_template.jinja" in ended.err
