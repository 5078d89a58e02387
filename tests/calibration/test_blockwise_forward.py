"""A walk over small blocks made by hand, against numpy; cut off, saved and taken up again at every place."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.calibration.block import Block
from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.calibration.text_runs import gathered
from fusionroute.runtime.errors import FusionError, InputError
from tests.support.small_blocks import LAYERS, RNG, TABLE, TEXTS, WEIGHTS, H, blocks, expected


class Seen(dict[tuple[str, int], np.ndarray]):
    """What a walk showed; fails at the `last` call."""

    last = -1

    def __call__(self, matrix: str, text: int, x: np.ndarray) -> None:
        assert (matrix, text) not in self
        if len(self) == self.last:
            raise KeyboardInterrupt
        self[matrix, text] = x.copy()


def new(texts: list[np.ndarray] = TEXTS, identity: str = "", cut: list[Block] | None = None) -> BlockwiseForward:
    return BlockwiseForward(cut or blocks(), texts, lambda ids: TABLE[ids][None], WEIGHTS.__getitem__, threads=1, identity=identity)


def whole(walk: BlockwiseForward) -> Seen:
    seen = Seen()
    while not walk.done:
        walk.step(seen)
    return seen


def test_every_matrix_sees_what_numpy_computes() -> None:
    walk = new()
    seen = whole(walk)
    assert len(seen) == (LAYERS + 1) * len(TEXTS)
    for (matrix, text), x in seen.items():
        assert x.shape == (len(TEXTS[text]), H) and x.dtype == np.float32
        np.testing.assert_allclose(x, expected(TEXTS[text], WEIGHTS)[matrix], rtol=2e-5, atol=1e-5)
    for text, states in enumerate(walk.states):
        assert len(states) == 1
        np.testing.assert_array_equal(states[0][0], seen["lm_head", text])


def test_observing_stays_and_advancing_does_not_look() -> None:
    walk, stepping = new(), whole(new())
    seen = Seen()
    while not walk.done:
        before = walk.position
        walk.observe(seen)
        assert walk.position == before
        walk.advance()
        assert walk.position == before + 1
    assert seen.keys() == stepping.keys()
    for key, x in seen.items():
        np.testing.assert_array_equal(x, stepping[key])


def test_other_weights_for_one_block() -> None:
    """As a quantised block is walked: what follows sees its outputs, what came before does not."""
    other = RNG.standard_normal((H, H)).astype(np.float32)
    walk, seen = new(), Seen()
    while not walk.done:
        walk.step(seen, {"layers.1.w": other} if walk.position == 1 else {})
    for (matrix, text), x in seen.items():
        np.testing.assert_allclose(x, expected(TEXTS[text], WEIGHTS | {"layers.1.w": other})[matrix], rtol=2e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"Block layers\.0 does not read 'layers\.1\.w': expected some of layers\.0\.w"):
        new().step(seen, {"layers.1.w": other})


def test_equal_blocks_share_a_session() -> None:
    walk = new()
    whole(walk)
    assert len(walk._sessions) == 3, "the first layer, the others, the head"


@pytest.mark.parametrize("at", range(LAYERS + 2))
def test_taken_up_again_after_every_block(tmp_path: Path, at: int) -> None:
    walk, all_of_it = new(), whole(new())
    for _ in range(at):
        walk.step(Seen())
    walk.save(tmp_path / "states", {"mine": np.arange(at)})
    again = new()
    assert again.restore(tmp_path / "states")["mine"].tolist() == list(range(at))
    assert again.position == at
    rest = whole(again)
    assert len(rest) == (LAYERS + 1 - at) * len(TEXTS)
    for key, x in rest.items():
        np.testing.assert_array_equal(x, all_of_it[key])


@given(st.lists(st.integers(1, 50)), st.integers(1, 120))
def test_texts_are_gathered_in_order_up_to_so_many_tokens(lengths: list[int], tokens: int) -> None:
    groups = list(gathered(lengths, tokens))
    assert [number for group in groups for number in group] == list(range(len(lengths)))
    sizes = [sum(lengths[number] for number in group) for group in groups]
    assert all(tokens <= size < tokens + max(lengths) for size in sizes[:-1]) and all(size > 0 for size in sizes)


def test_a_weight_is_read_once_for_all_passes_through_a_block() -> None:
    names: list[str] = []

    def read(name: str) -> np.ndarray:
        names.append(name)
        return WEIGHTS[name]

    walk = BlockwiseForward(blocks(), TEXTS, lambda ids: TABLE[ids][None], read, threads=1)
    while not walk.done:
        walk.observe(Seen())
        walk.peek()
        walk.advance()
    assert sorted(names) == sorted(WEIGHTS)


def test_cut_off_within_a_block(tmp_path: Path) -> None:
    walk, seen = new(), Seen()
    walk.step(seen)
    walk.save(tmp_path / "states")
    seen.last = len(seen) + 1
    with pytest.raises(KeyboardInterrupt):
        walk.step(seen)
    calls: list[Callable[[], None]] = [
        lambda: walk.step(Seen()),
        lambda: walk.observe(Seen()),
        walk.advance,
        lambda: walk.save(tmp_path / "x"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"cut off within block layers\.1: restore saved states or begin again"):
            call()
    walk.restore(tmp_path / "states")
    np.testing.assert_array_equal(whole(walk)["lm_head", 1], whole(new())["lm_head", 1])
    walk, seen = new(), Seen()
    seen.last = 1
    with pytest.raises(KeyboardInterrupt):
        walk.observe(seen)
    np.testing.assert_array_equal(whole(walk)["lm_head", 1], whole(new())["lm_head", 1])  # observing changes no state


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    walk = new()
    walk.step(Seen())
    walk.save(tmp_path / "states")
    others = [new(TEXTS[:2]), new([TEXTS[0], TEXTS[2], TEXTS[1]]), new(identity="other weights"), new(cut=blocks()[:2])]
    for other in others:
        with pytest.raises(InputError, match="holds the states of other blocks, texts or weights: remove it and begin again"):
            other.restore(tmp_path / "states")
        assert other.position == 0
    (tmp_path / "states").write_bytes((tmp_path / "states").read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        new().restore(tmp_path / "states")


def test_nothing_behind_the_last_block() -> None:
    walk = new()
    whole(walk)
    with pytest.raises(InputError, match="passed all 4 blocks: start a new one"):
        walk.step(Seen())


BAD: dict[str, tuple[list[np.ndarray], str]] = {
    "none": ([], "There is no calibration text: expected at least one"),
    "empty": ([TEXTS[0], TEXTS[0][:0]], r"Calibration text 1 is int32 \[0\]: expected a vector of at least one integer"),
    "matrix": ([TEXTS[0][None]], r"Calibration text 0 is int32 \[1, 1\]"),
    "floats": ([np.zeros(3)], r"Calibration text 0 is float64 \[3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_texts_that_are_none(name: str) -> None:
    texts, words = BAD[name]
    with pytest.raises(InputError, match=words):
        new(texts)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(
        FusionError, match=r"ONNX Runtime cannot run block layers\.0 on text 0 of 1 tokens .*; expected weights of"
    ) as caught:
        new().step(Seen(), {"layers.0.w": np.zeros((H + 1, H), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_graph_that_onnx_runtime_does_not_know() -> None:
    first = blocks()[0]
    broken = Block("layers.0", b"no graph", first.states_in, first.states_out, first.observed, first.channels, first.weights)
    with pytest.raises(FusionError, match=r"cannot load block layers\.0 .*; install a newer onnxruntime"):
        new(cut=[broken]).step(Seen())
