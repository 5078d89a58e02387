"""Texts that are saved and loaded: nothing is read again, tokens are those of a text that was read, and files are checked."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionroute.runtime import ClosedError, FusionRuntime, InputError, NumericalError, Session
from fusionroute.runtime.backends.pair_binding import PairBinding
from tests.support.bundles import edit
from tests.support.numpy_adapters import write_adapter

PROMPT = [5 + number % 80 for number in range(60)]
MORE = [70, 71, 72]
NO_TEXT = "holds no saved text, or was damaged: name a file that a session has saved, whole."


def load(bundle: Path, precision: str = "fp32", **options: Any) -> FusionRuntime:
    return FusionRuntime.load(bundle, precision, "cpu", threads=1, **options)


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["llama3", "gemma2", "one base"])
def bundle_of_a_kind(request: pytest.FixtureRequest, bundles: list[Path]) -> Path:
    """Read only."""
    bundle: Path = bundles[request.param]
    return bundle


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with load(bundles[0]) as runtime:
        yield runtime


@pytest.fixture
def saved(rt: FusionRuntime, tmp_path: Path) -> Path:
    """The prompt, read by the router and the first expert."""
    session = rt.session()
    session.append(PROMPT)
    session.read(rt.expert_names[:1])
    session.save(tmp_path / "text")
    return tmp_path / "text"


def tokens(session: Session, count: int = 8, **options: Any) -> list[tuple[int, str, float]]:
    return [(token.id, token.expert, token.logprob) for token in (session.step(**options) for _ in range(count))]


@pytest.mark.parametrize(("precision", "options"), [("fp32", {}), ("int8", {}), ("int8", {"exact": True})])
def test_tokens_are_those_of_a_text_that_was_read(bundle_of_a_kind: Path, precision: str, options: dict[str, Any], tmp_path: Path) -> None:
    """By another process's runtime: the prompt comes from the file, what is new is read, the rest is as ever."""
    with load(bundle_of_a_kind, precision, **options) as rt:
        for number, experts in enumerate(([], rt.expert_names[1:], None)):
            session = rt.session()
            session.append(PROMPT)
            session.read(experts)
            session.save(tmp_path / str(number))
        answered = rt.session()
        answered.append(PROMPT)
        tokens(answered, 5)
        answered.save(tmp_path / "answered")
        ids, expected_end = answered.token_ids, tokens(answered)
    with load(bundle_of_a_kind, precision, prefix_cache=0, **options) as rt:
        for number in range(3):
            fresh, session = rt.session(), rt.session()
            fresh.append([*PROMPT, *MORE])
            session.load(tmp_path / str(number))
            session.append(MORE)
            got, expected = tokens(session), tokens(fresh)
            assert [each[:2] for each in got] == [each[:2] for each in expected]
            np.testing.assert_allclose([each[2] for each in got], [each[2] for each in expected], atol=1e-4 if precision == "fp32" else 0)
        session.load(tmp_path / "answered")
        assert session.token_ids == ids and tokens(session) == expected_end, "bit for bit: it holds what the other one held"


def test_what_was_saved_is_not_read_again(rt: FusionRuntime, saved: Path, router_reads: list[int]) -> None:
    session = rt.session()
    session.load(saved)
    assert session.lags == dict(zip(rt.expert_names, [2, len(PROMPT)], strict=True)), "the newest tokens answer"
    session.append(MORE)
    session.step()
    assert router_reads == [2 + len(MORE)]


def test_one_base_reads_router_and_expert_in_one_pass(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int]] = []
    run = PairBinding.run

    def noted(self: PairBinding, segments: Any, lengths: Any) -> Any:
        passes.append((len(segments[0].positions), len(segments[1].positions)))
        return run(self, segments, lengths)

    monkeypatch.setattr(PairBinding, "run", noted)
    with load(bundles[2]) as rt:
        session = rt.session()
        session.append(PROMPT)
        session.read(rt.expert_names[:2])
        session.read()
        session.read()
    assert passes == [(1, 1), (0, 1), (0, 1)], "what was read is not read again"


def test_others_share_what_was_loaded(rt: FusionRuntime, bundles: list[Path], tmp_path: Path, router_reads: list[int]) -> None:
    prompt = [90, *PROMPT]
    with rt.session() as session:
        session.append(prompt)
        session.read()
        session.save(tmp_path / "text")
    with load(bundles[0]) as other, load(bundles[0], prefix_cache=0) as anew:
        expected = anew.generate([*prompt, *MORE], 4).token_ids
        with other.session() as kept:
            kept.load(tmp_path / "text")
            router_reads.clear()
            assert other.generate([*prompt, *MORE], 4).token_ids == expected and router_reads[0] == len(MORE) + 3, "copied"
        other.generate([6, 7, 8], 1)
        router_reads.clear()
        assert other.generate([*prompt, *MORE], 4).token_ids == expected and router_reads[0] == len(MORE) + 3, "kept as a finished text"
        for use in (kept.step, kept.read, lambda: kept.append([5]), lambda: len(kept), lambda: kept.load(tmp_path / "text")):
            with pytest.raises(ClosedError, match=r"^The session was closed: begin another with `session`\.$"):
                use()
        kept.close()
        assert repr(kept).startswith("<Session of closed")


def test_a_sampled_text_goes_on_with_its_next_draw(rt: FusionRuntime, saved: Path) -> None:
    sessions = [rt.session(), rt.session()]
    for session in sessions:
        session.append([5])
        session.step(temperature=1.0, seed=3)
        session.load(saved)
    assert tokens(sessions[0], temperature=1.0, seed=3) == tokens(sessions[1], temperature=1.0, seed=3)


def test_experts_that_came_later_read_the_text_themselves(shared: Path, tmp_path: Path) -> None:
    """What another expert of that name has read is not theirs."""
    adapter = write_adapter(shared, tmp_path / "expert0", 1, rank=3)
    with load(shared, prefix_cache=0) as rt:
        names = rt.expert_names
        session = rt.session()
        session.append(PROMPT)
        session.read()
        session.save(tmp_path / "before")
        rt.add_expert(adapter)
        exchanged, fresh = rt.session(expert="expert0"), rt.session(expert="expert0")
        exchanged.load(tmp_path / "before")
        assert exchanged.lags == {name: len(PROMPT) if name == "expert0" else 2 for name in names}
        fresh.append(PROMPT)
        assert [each[0] for each in tokens(exchanged)] == [each[0] for each in tokens(fresh)]
        exchanged.save(tmp_path / "after")
        rt.remove_expert("expert2")
        fewer = rt.session()
        fewer.load(tmp_path / "after")
        assert fewer.lags == {"expert0": len(PROMPT) + 8, "expert1": 10}


def test_a_file_is_safetensors_and_says_what_it_holds(rt: FusionRuntime, saved: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(saved)
    assert sorted(tensors) == ["keys_values.expert0", "keys_values.router", "sha256", "token_ids"]
    assert tensors["token_ids"].tolist() == PROMPT
    assert tensors["keys_values.router"].shape == (2, 2, 58, 32) and tensors["keys_values.router"].dtype == np.float32
    session = rt.session()
    session.load(saved)
    assert np.array_equal(session._decoder.readers.router.keys_values(58), tensors["keys_values.router"])


def refused(session: Session, file: Path) -> str:
    """The sentence that refuses a file; the text of the session stays."""
    ids, lags = session.token_ids, session.lags
    with pytest.raises(InputError) as caught:
        session.load(file)
    assert (session.token_ids, session.lags) == (ids, lags) and str(caught.value).startswith(f"{file} ")
    return str(caught.value).removeprefix(f"{file} ")


def test_a_text_of_another_system_is_refused(bundles: list[Path], bundle: Path, saved: Path) -> None:
    place = "load it there, or read its text again."
    edit(bundle, lambda content: content.update(lam=0.25))
    for rt, expected in (
        (load(bundles[0], "int8"), f"was saved with precision fp32, and this runtime has int8: {place}"),
        (load(bundles[0], exact=True), f"was saved with exact False, and this runtime has True: {place}"),
        (load(bundles[1]), f"was saved with another bundle: {place}"),
        (load(bundle), f"was saved with another bundle: {place}"),
    ):
        with rt:
            session = rt.session()
            session.append([5, 6, 7])
            session.step()
            assert refused(session, saved) == expected


def damaged(content: bytes, name: str) -> bytes:
    """A file that is other than it was written, but for its last bytes."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if name == "metadata":
        header["__metadata__"]["prompt"] = "7"
    if name == "longer than the text":
        header["keys_values.router"]["shape"][2] = 90
    if name == "length of another type":
        header["keys_values.router"]["shape"][2] = True
    if name == "no shape":
        header["keys_values.router"] = 5
    if name == "deep":
        return (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20)
    if name == "long header":
        return (1 << 62).to_bytes(8, "little") + content[8:]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize("name", ["metadata", "longer than the text", "length of another type", "no shape", "deep", "long header"])
def test_a_header_that_says_something_else_is_refused(rt: FusionRuntime, saved: Path, name: str) -> None:
    saved.write_bytes(damaged(saved.read_bytes(), name))
    assert refused(rt.session(), saved) == NO_TEXT


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_damage_is_seen(rt: FusionRuntime, saved: Path, data: st.DataObject) -> None:
    """One bit, the end, or more than the end."""
    content = bytearray(saved.read_bytes())
    file = saved.with_name("other")
    how = data.draw(st.sampled_from(["bit", "shorter", "longer"]))
    if how == "bit":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "shorter":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += b"x"
    file.write_bytes(content)
    sentence = refused(rt.session(), file)
    assert sentence == NO_TEXT or sentence.startswith("was saved with ")  # a bit of the hash of the bundle, or of its precision


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a link, and links are not followed: cp -rL copies what they lead to"),
        (os.mkfifo, "it is no regular file"),
    ],
)
def test_what_is_no_file_is_not_read(rt: FusionRuntime, tmp_path: Path, make: Callable[[Path], None], why: str) -> None:
    make(tmp_path / "text")
    assert refused(rt.session(), tmp_path / "text") == f"cannot be read ({why}): name a file that a session has saved."


def test_a_file_that_cannot_be_written_leaves_nothing(rt: FusionRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = rt.session()
    session.append(PROMPT)
    session.read()
    (tmp_path / "folder").mkdir()
    for file, why in (
        (tmp_path / "none" / "text", "No such file or directory"),
        (tmp_path / "folder", "Is a directory"),
        (Path(), "it is a folder"),
    ):
        with pytest.raises(InputError) as caught:
            session.save(file)
        assert str(caught.value) == f"{file} cannot be written ({why}): name another file."
    session.save(tmp_path / "text")
    before = (tmp_path / "text").read_bytes()
    session.append(MORE)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusionroute.runtime.saved_text.strips", full)
    with pytest.raises(InputError, match=r"text cannot be written \(No space left on device\): name another file\.$"):
        session.save(tmp_path / "text")
    assert (tmp_path / "text").read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["folder", "text"]


def test_an_empty_text_can_be_saved(rt: FusionRuntime, tmp_path: Path) -> None:
    session = rt.session()
    session.save(tmp_path / "text")
    session.append([5])
    session.read()
    session.load(tmp_path / "text")
    assert len(session) == 0


def test_numbers_that_are_none_are_told_by_the_next_step(rt: FusionRuntime, tmp_path: Path) -> None:
    """The file may be well made: its hash tells of accidents, not of who wrote it."""
    session = rt.session()
    session.append(PROMPT)
    session.read()
    session._decoder.readers.router.keys_values(58)[...] = np.nan
    session.save(tmp_path / "text")
    loaded = rt.session()
    loaded.load(tmp_path / "text")
    with pytest.raises(NumericalError, match="of router in fp32 hold NaN or infinity"):
        loaded.step()


def test_wrong_arguments(rt: FusionRuntime) -> None:
    session = rt.session()
    for wrong in (None, 5, "a\0b"):
        with pytest.raises(InputError, match=r"^file is .*, expected a path\.$"):
            session.save(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^Unknown expert 'sage': use one of expert0, expert1\.$"):
        session.read(["sage"])
