"""Statistics of the positions that a model serves, against numpy; interrupted runs go on bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.calibration.blockwise_forward import BlockwiseForward, See
from fusionroute.calibration.observe import observe
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import NOBODY, RecordedText
from fusionroute.calibration.serving_masks import Mask, serving_masks
from fusionroute.runtime.errors import InputError
from tests.support.small_blocks import LAYERS, TABLE, WEIGHTS, H, V, blocks, expected


def texts(seed: int = 0, count: int = 4) -> list[RecordedText]:
    """Random texts in which expert 2 never answers."""
    rng = np.random.default_rng(seed)
    recorded = []
    for _ in range(count):
        prompt, new = rng.integers(1, 5), rng.integers(1, 6)
        experts = [NOBODY] * (prompt - 1) + rng.integers(0, 2, new).tolist() + [NOBODY]
        recorded.append(RecordedText(rng.integers(0, V, prompt + new).astype(np.int32), np.array(experts, np.int8)))
    return recorded


TEXTS = texts()


def observed(masks: list[Mask], texts: list[RecordedText] = TEXTS, **options: Any) -> dict[str, Observer]:
    return observe(blocks(), texts, masks, lambda ids: TABLE[ids][None], WEIGHTS.__getitem__, threads=1, **options)


def same(one: dict[str, Observer], other: dict[str, Observer]) -> None:
    assert list(one) == list(other)
    for matrix in one:
        for name, value in vars(one[matrix]).items():
            np.testing.assert_array_equal(value, vars(other[matrix])[name])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.sampled_from([None, 0, 1, 2]))
def test_what_is_served_and_nothing_else(seed: int, model: int | None) -> None:
    recorded = texts(seed)
    masks = serving_masks(recorded, model)
    for matrix, observer in observed(masks, recorded).items():
        rows = [
            expected(text.ids, WEIGHTS)[matrix][mask.head if matrix == "lm_head" else np.arange(mask.body)]
            for text, mask in zip(recorded, masks, strict=True)
        ]
        x = np.concatenate(rows)
        assert observer.rows == len(x)
        assert observer.channel_absmax.shape == (H,)
        if len(x):
            np.testing.assert_allclose(observer.channel_absmax, np.abs(x).max(0), rtol=1e-4)
            np.testing.assert_allclose(observer.mean_square, np.square(x.astype(np.float64)).mean(0), rtol=1e-4)
            np.testing.assert_allclose([observer.minimum, observer.maximum], [x.min(), x.max()], rtol=1e-4)


def test_an_expert_that_serves_nothing(tmp_path: Path) -> None:
    done: list[float] = []
    observers = observed(serving_masks(TEXTS, 2), advance=done.append, states=tmp_path / "states")
    assert list(observers) == [*(f"layers.{layer}.w" for layer in range(LAYERS)), "lm_head"]
    assert all(observer.rows == 0 and observer.channel_absmax.shape == (H,) for observer in observers.values())
    assert sum(done) == LAYERS + 1 and not list(tmp_path.iterdir())


def test_a_model_that_serves_nothing_reads_the_first_eight_texts() -> None:
    recorded, embedded = texts(count=10), list[list[int]]()

    def embed(ids: np.ndarray) -> np.ndarray:
        embedded.append(ids.tolist())
        rows: np.ndarray = TABLE[ids][None]
        return rows

    observe(blocks(), recorded, serving_masks(recorded, 2), embed, WEIGHTS.__getitem__, threads=1)
    assert embedded == [np.concatenate([text.ids for text in recorded[:8]]).tolist()]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("after", range(LAYERS + 1))
def test_killed_and_taken_up_again(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, states = serving_masks(TEXTS, 0), tmp_path / "cache" / "states"
    whole = observed(masks)
    done: list[float] = []

    def advance(amount: float) -> None:
        done.append(amount)
        if sum(done) == after:
            raise Killed

    with pytest.raises(Killed):
        observed(masks, advance=advance, states=states, every=0.0)
    assert states.exists() == (after > 0)
    done.clear()
    steps = 0
    original = BlockwiseForward.step

    def counted(self: BlockwiseForward, see: See, **options: Any) -> None:
        nonlocal steps
        steps += 1
        original(self, see, **options)

    monkeypatch.setattr(BlockwiseForward, "step", counted)
    same(observed(masks, states=states, every=0.0, advance=lambda amount: done.append(amount)), whole)
    assert steps == LAYERS + 1 - after and sum(done) == LAYERS + 1
    assert not list(states.parent.glob("*")), "gone when done"


def left_behind(path: Path, masks: list[Mask], **options: Any) -> None:
    """What a walk leaves that is killed after two blocks."""
    blocks_done: list[float] = []

    def advance(amount: float) -> None:
        blocks_done.append(amount)
        if sum(blocks_done) == 2:
            raise Killed

    with pytest.raises(Killed):
        observed(masks, states=path, every=0.0, advance=advance, **options)


def test_files_that_do_not_belong_are_overwritten(tmp_path: Path) -> None:
    masks, states = serving_masks(TEXTS, 0), tmp_path / "states"
    whole = observed(masks)
    moved = [Mask(mask.body, mask.head[:1]) for mask in masks]
    others: dict[str, tuple[list[Mask], dict[str, Any]]] = {
        "another model's part": (serving_masks(TEXTS, 1), {}),
        "other answers": (moved, {}),
        "other weights": (masks, {"identity": "other"}),
    }
    for which, options in others.values():
        left_behind(states, which, **options)
        same(observed(masks, states=states), whole)
        assert not states.exists()
    left_behind(states, masks)
    for content in (b"", b"nonsense", states.read_bytes()[:-5], states.read_bytes()[:-1] + b"\xff"):
        states.write_bytes(content)
        same(observed(masks, states=states), whole)


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    same(observed(serving_masks(TEXTS, 0), states=tmp_path / "file" / "states", every=0.0), observed(serving_masks(TEXTS, 0)))


def test_activations_that_are_not_finite() -> None:
    def read(name: str) -> np.ndarray:
        return np.full_like(WEIGHTS[name], np.inf) if name == "layers.1.w" else WEIGHTS[name]

    with pytest.raises(InputError, match=r"The activations that enter layers\.2\.w are not all finite"):
        observe(blocks(), TEXTS, serving_masks(TEXTS, 0), lambda ids: TABLE[ids][None], read, threads=1)
