"""Each parser on inputs that keep their form and say odd things; a long run guided by coverage: `tests/attacks/fuzz`."""

import random

import pytest

from tests.attacks.fuzz.mutations import mutated
from tests.attacks.fuzz.seeds import SEEDS
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


def test_the_seeds_are_taken() -> None:
    """Else everything would be refused at once."""
    from fusionroute.runtime.graph_file import external_files
    from fusionroute.runtime.graph_tensors import positions
    from fusionroute.runtime.manifest import Manifest
    from fusionroute.runtime.tokenizer_limits import unbounded

    assert Manifest.parse(SEEDS["manifest"][0], "it").experts == ["a"]
    assert external_files(SEEDS["graph"][0]) == {"w/r.bin"} and positions(SEEDS["graph"][0]) == 8
    assert unbounded(SEEDS["tokenizer"][0]) is None
