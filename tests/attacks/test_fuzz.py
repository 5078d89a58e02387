"""Each parser on inputs that keep their form and say odd things; a long run guided by coverage: `tests/attacks/fuzz`."""

import random
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime.tensor_file import TensorFile
from tests.attacks.fuzz.mutations import mutated
from tests.attacks.fuzz.seeds import SEEDS, safetensors
from tests.attacks.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("inputs", [150, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_parser_takes_or_refuses_any_input(name: str, inputs: int) -> None:
    draw = random.Random(name)
    corpus = list(SEEDS[name])
    for seed in corpus:
        TARGETS[name](seed)
    for _ in range(inputs):
        content = mutated(name, draw.choice(corpus), draw)
        TARGETS[name](content)
        if len(corpus) < 50 and draw.random() < 0.1:
            corpus.append(content)


FOUND = {
    "texts that are repeated": {"shape": ["/a", 2**63]},
    "lists that are repeated": {"shape": [2**32 + 2, [0]]},
    "true for a size": {"shape": [True, 4]},
    "sizes below nothing": {"shape": [-2, -2]},
    "a fraction": {"shape": [0.5, 8]},
    "offsets of other types": {"data_offsets": [0, "16"]},
}


@pytest.mark.parametrize("entry", FOUND.values(), ids=list(FOUND))
def test_sizes_in_a_tensor_file_are_numbers(entry: dict[str, Any], tmp_path: Path) -> None:
    """What the fuzzer has found, and its kind: a header of 100 bytes that asked for gigabytes."""
    content = safetensors({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **entry}}, 16)
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError):
        TensorFile(tmp_path / "a.safetensors")


def test_the_seeds_are_taken() -> None:
    """Else everything would be refused at once."""
    from fusionroute.runtime.graph_file import external_files
    from fusionroute.runtime.graph_tensors import positions
    from fusionroute.runtime.manifest import Manifest
    from fusionroute.runtime.tokenizer_limits import unbounded

    assert Manifest.parse(SEEDS["manifest"][0], "it").experts == ["a"]
    assert external_files(SEEDS["graph"][0]) == {"w/r.bin"} and positions(SEEDS["graph"][0]) == 8
    assert unbounded(SEEDS["tokenizer"][0]) is None
