"""Calls in answers of any text, and streams that pass text on before the answer is over."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusionroute.runtime.serve.requests import Function, Tool
from fusionroute.runtime.serve.tool_calls import StreamedCalls, read_calls
from fusionroute.runtime.text import Token

TOOLS = [Tool(type="function", function=Function(name="add"))]
CALL = '{"name": "add", "arguments": {"a": 1}}'
ANSWERS = {  # an answer → the text beside its calls, and how many calls there are
    CALL: ("", 1),
    f"\n {CALL} ": ("", 1),
    f"[{CALL}, {CALL}]": ("", 2),
    f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n": ("Let me see.", 1),
    f"<tool_call>{CALL}</tool_call> <tool_call>{CALL}": ("", 2),
    f" First <tool_call>{CALL}</tool_call>, then": (" First, then", 1),
    '{"name": "other"}': ('{"name": "other"}', 0),
    "<tool_call>no JSON</tool_call> ": ("<tool_call>no JSON</tool_call> ", 0),
    "a < b <tool": ("a < b <tool", 0),
    '{"name": ["add"]}': ('{"name": ["add"]}', 0),
    '{"name": {"add": 1}}': ('{"name": {"add": 1}}', 0),
    '{"name": "add", "arguments": {"a": 1e400}}': ('{"name": "add", "arguments": {"a": 1e400}}', 0),
    '{"name": "add", "arguments": NaN}': ('{"name": "add", "arguments": NaN}', 0),
    "": ("", 0),
}


def read(text: str) -> tuple[str, list[str]]:
    rest, calls = read_calls(text, TOOLS)
    return rest, [json.dumps(call["function"], sort_keys=True) for call in calls]


def streamed(pieces: list[str]) -> tuple[list[str], str, list[str]]:
    """What is passed on after each piece, what comes at the end, and the calls."""
    choice = StreamedCalls(TOOLS)
    passed = ["".join(token.text for token in choice.add(Token(0, "x", 0.0, np.zeros(1, np.float32), piece))) for piece in pieces]
    rest, tokens, calls = choice.finish()
    assert "".join(passed) + "".join(token.text for token in tokens) == "".join(pieces)  # no token is lost
    return passed, rest, [json.dumps(call["function"], sort_keys=True) for call in calls]


@pytest.mark.parametrize("answer", ANSWERS)
def test_calls_are_read_out_of_answers(answer: str) -> None:
    text, functions = read(answer)
    assert (text, len(functions)) == ANSWERS[answer]
    passed, rest, same = streamed(list(answer))
    assert ("".join(passed) + rest, same) == (text, functions)


@pytest.mark.parametrize(("arguments", "written"), [(r'"\ud800b\ud83d\ude00"', "�b😀"), (r'{"a": "\udc00"}', '{"a": "�"}')])
def test_arguments_are_text_whatever_the_model_escapes(arguments: str, written: str) -> None:
    _, [call] = read_calls(f'{{"name": "add", "arguments": {arguments}}}', TOOLS)
    assert call["function"]["arguments"] == written and written.encode()


def test_text_is_passed_on_at_once_and_calls_are_not() -> None:
    passed, rest, functions = streamed(["I", " add", " <", " b <", "tool", "s> ", "them", " \n", "<tool_call>", CALL, "</tool_call>"])
    assert passed == ["I", " add", "", " <", "", " b <tool", "s> them", "", "", "", ""]
    assert (rest, len(functions)) == ("", 1)


parts = st.sampled_from(["a", " ", "\n", "<", "<tool", "_call>", "<tool_call>", "</tool_call>", CALL, "{", "[", "]", "word ", ","])


@given(pieces=st.lists(parts, max_size=10))
@example(pieces=["<tool", "_call>", CALL])
@example(pieces=["a", " ", "<tool_call>", CALL, "</tool_call>", "\n", "a", "<tool_call>", "{"])
def test_a_stream_says_what_the_whole_answer_says(pieces: list[str]) -> None:
    passed, rest, functions = streamed(pieces)
    assert ("".join(passed) + rest, functions) == read("".join(pieces))
