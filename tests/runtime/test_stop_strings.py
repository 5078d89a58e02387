"""Stop strings cut the streamed text as if it were whole; tokens that may begin one wait."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.text import TextStream
from tests.support.tokenizers import id_of, joined, streamed, text_of, token


def reference(full: str, stop: Sequence[str]) -> str:
    met = [place for string in stop if (place := full.find(string)) >= 0]
    return full[: min(met)] if met else full


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "word piece"])
def test_stop_strings_cut_the_text_as_if_it_were_whole(kind: str) -> None:
    text = text_of(kind)
    alphabet = [text.encode(word, special=False) for word in ("a", "b", " the", "ab", "é", "😀", "aab", ".")]
    size = text._tokenizer.get_vocab_size()

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.one_of(st.sampled_from(alphabet), st.integers(0, size - 1).map(lambda id: [id])), max_size=25),
        st.lists(st.text("ab. ethé😀\ufffd", min_size=1, max_size=5), max_size=3),
    )
    def check(words: list[list[int]], stop: list[str]) -> None:
        ids = [id for word in words for id in word]
        tokens, stopped = streamed(text, ids, stop)
        full = text.decode(ids)
        assert joined(tokens) == reference(full, stop)
        assert stopped == any(string in full for string in stop)

    check()


def test_tokens_that_may_begin_a_stop_string_wait() -> None:
    text = text_of("byte level")
    stream = TextStream(text, ["END", "!!"])
    out = []
    for char in "xEyEN!zEND":
        (id,) = text.encode(char, special=False)
        out.append([each.text for each in stream.push(token(id))])
    assert out == [["x"], [], ["E", "y"], [], [], ["E", "N"], ["!", "z"], [], [], ["", "", ""]]
    assert stream.stopped
    assert stream.finish() == []


def test_a_token_that_holds_the_start_of_a_stop_string_is_cut() -> None:
    text = text_of("byte level")
    ids = [id_of("byte level", "<plain>"), *text.encode("x", special=False)]
    tokens, stopped = streamed(text, ids, ["in>x"])
    assert stopped
    assert [each.text for each in tokens] == ["<pla", ""]


def test_a_stop_string_that_never_ends_is_text_at_the_end() -> None:
    text = text_of("byte level")
    stream = TextStream(text, ["abc", "b"])
    (a,), (b,) = text.encode("a", special=False), text.encode("b", special=False)
    assert [stream.push(token(a)), stream.push(token(b))] == [[], []]  # "abc" would begin earlier
    assert [each.text for each in stream.finish()] == ["a", ""]
    assert stream.stopped
    assert [each.text for each in stream.push(token(a))] == [""]


def test_one_stop_string_need_not_be_in_a_list() -> None:
    text = text_of("byte level")
    assert joined(streamed(text, text.encode("one, two", special=False), ", ")[0]) == "one"


def test_wrong_stop_strings() -> None:
    with pytest.raises(InputError, match="stop string ''"):
        TextStream(text_of("byte level"), ["x", ""])
    with pytest.raises(InputError, match="stop string 7"):
        TextStream(text_of("byte level"), [7])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TextStream(None, ["x"])
