"""What products compute with, read back from levels, scales and zero points."""

import numpy as np
import pytest

from fusionroute.fr_export.precision.blockwise import Quantised, pack, unpack, widened


@pytest.mark.parametrize(
    ("bits", "levels", "expected"), [(8, [0, 127, 128, 255], [-64, -0.5, 0, 63.5]), (4, [0, 7, 8, 15], [-4, -0.5, 0, 3.5])]
)
def test_levels_stand_about_the_middle_where_no_zero_points_are_stored(bits: int, levels: list[int], expected: list[float]) -> None:
    part = Quantised(np.array([[levels]], np.uint8), np.full((1, 1), 0.5, np.float32), None)
    assert widened(part, bits, 4).tolist() == [expected]
    assert widened(part, bits, 3).tolist() == [expected[:3]], "without padding"


def test_zero_points_are_of_their_block() -> None:
    levels = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], np.uint8)
    part = Quantised(levels, np.array([[1, 2], [4, 8]], np.float16), np.array([[1, 2], [3, 9]], np.uint8))
    weights = widened(part, 4, 4)
    assert weights.dtype == np.float32 and weights.tolist() == [[0, 1, 2, 4], [8, 12, -16, -8]]


@pytest.mark.parametrize("width", [1, 2, 7])
def test_two_levels_of_4_bits_share_a_byte(width: int) -> None:
    levels = np.arange(3 * width, dtype=np.uint8).reshape(3, width) % 16
    packed = pack(levels, 4)
    assert packed.shape == (3, -(-width // 2)) and packed[0, 0] == (levels[0, 0] | (levels[0, 1] << 4 if width > 1 else 0))
    assert np.array_equal(unpack(packed, 4)[:, :width], levels) and pack(levels, 8) is levels
