"""Stop strings cut the streamed text as if it were whole; tokens that may begin one wait."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.text_stream import TextStream
from tests.support.tokenizers import id_of, joined, one_byte, streamed, text_of, token


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


NAMES = ("<bos>", "<eos>")


def special_reference(pieces: Sequence[str], stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one; stop strings with a special token see it spelled."""
    spelled = "".join(pieces)
    shown = [place for piece, start in starts(pieces) if piece not in NAMES for place in range(start, start + len(piece))]
    text = "".join(spelled[place] for place in shown)
    places = [shown[text.find(string)] for string in stop if string in text]
    places += [spelled.find(string) for string in stop if any(name in string for name in NAMES) and string in spelled]
    end = min(places, default=len(spelled))
    return "".join(spelled[place] for place in shown if place < end), bool(places)


def starts(pieces: Sequence[str]) -> list[tuple[str, int]]:
    return [(piece, sum(map(len, pieces[:number]))) for number, piece in enumerate(pieces)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", ".", *NAMES]), max_size=15),
    st.lists(st.lists(st.sampled_from(["a", "b", ".", *NAMES]), min_size=1, max_size=3).map("".join), max_size=3),
)
def test_stop_strings_name_special_tokens(pieces: list[str], stop: list[str]) -> None:
    text = text_of("byte level")
    ids = [id for piece in pieces for id in ([id_of("byte level", piece)] if piece in NAMES else text.encode(piece, special=False))]
    tokens, stopped = streamed(text, ids, stop)
    assert (joined(tokens), stopped) == special_reference(pieces, stop)


def test_a_special_token_that_is_a_stop_string_stops_at_once() -> None:
    text, end = text_of("byte level"), id_of("byte level", "<eos>")
    stream = TextStream(text, ["<eos>"])
    (x,) = text.encode("x", special=False)
    assert [each.text for each in stream.push(token(x))] == ["x"]
    assert [each.text for each in stream.push(token(end))] == [""] and stream.stopped


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_special_token_stops_behind_half_a_character(kind: str) -> None:
    text, end = text_of(kind), id_of(kind, "<eos>")
    first, second, third = (one_byte(kind, byte) for byte in "€".encode())
    whole = streamed(text, [first, second, third, end, first], ["<eos>"])
    assert (joined(whole[0]), whole[1], len(whole[0])) == ("€", True, 4)
    half = streamed(text, [first, second, end, third], ["<eos>"])
    assert (joined(half[0]), half[1], len(half[0])) == (text.decode([first, second]), True, 3)
    other = streamed(text, [first, second, end, third], ["x<eos>"])  # is none, so the character goes on
    assert (joined(other[0]), other[1]) == ("€", False)
