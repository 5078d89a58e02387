"""Recorded texts against plain torch: each token lies in the nucleus, each expert is the router's choice."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from rich.console import Console

from fusionroute.calibration import side_by_side
from fusionroute.calibration.record import NOBODY, RecordedText, candidates, record
from fusionroute.calibration.side_by_side import ReadTogether, SideBySide
from fusionroute.fr_export.bundle.recording import write_recording_bundle
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.batch_dimension import batched
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from tests.support.systems import Shape, make_system

PROMPTS = [[5, 7, 9, 11], [12, 30, 42], list(range(3, 22)), [8], [250, 3, 17, 90, 4, 66, 8]]
NEW, CONTEXT = 40, 96
SHAPES = {
    "llama3": Shape(layers=2),
    "gemma2": Shape("gemma2", layers=2, config={"final_logit_softcapping": 4.0}),  # else one token has all the probability
    "positions in the graph": Shape(layers=1, config={"head_dim": 24}),
}


@pytest.fixture(scope="module", params=SHAPES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, System]:
    folder, shape, stages = tmp_path_factory.mktemp("record"), SHAPES[request.param], Stages(Console(quiet=True))
    system = System.open(FAMILIES[shape.family], *make_system(folder, shape), max_seq_len=CONTEXT)
    traces = Traces(system, stages)
    return write_recording_bundle(system, {}, traces, FusionSettings(), Fp32(), folder / "bundle", stages), system


def opened(folder: Path, rows: int = side_by_side.MOST, texts: int = 10 * side_by_side.MOST) -> SideBySide:
    files = sorted(folder.glob("graphs/*.fp32.onnx"), key=lambda file: ("router" not in file.name, file.name))
    with patch.object(side_by_side, "MOST", rows):
        graphs = [ReadTogether(file, batched(file), [number]) for number, file in enumerate(files)]
        return SideBySide(graphs, CONTEXT, texts)


def recorded(
    folder: Path, prompts: list[list[int]] = PROMPTS, new: int = NEW, ends: tuple[int, ...] = (), seed: int = 0, rows: int = 4
) -> list[RecordedText]:
    with opened(folder, rows) as models:
        return list(record(models, prompts, new, frozenset(ends), (0.5, 0.5), seed))


def equal(one: RecordedText, other: RecordedText) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.experts, other.experts)


def test_what_the_system_does_on_its_own(exported: tuple[Path, System]) -> None:
    texts = recorded(exported[0])
    references = reference(exported[1], [text.ids.tolist() for text in texts], (0.5, 0.5))
    chosen = set()
    for prompt, text, expected in zip(PROMPTS, texts, references, strict=True):
        assert text.ids.dtype == np.int32 and text.experts.dtype == np.int8
        assert text.ids[: len(prompt)].tolist() == prompt and len(text.ids) == len(prompt) + NEW == len(text.experts)
        answered = np.flatnonzero(text.experts != NOBODY)
        assert answered.tolist() == list(range(len(prompt) - 1, len(text.ids) - 1))
        assert text.experts[answered].tolist() == expected.experts[answered].tolist()
        chosen |= set(text.experts[answered].tolist())
        for position in answered:
            logits = expected.logits[position].astype(np.float64)
            likely = np.exp(logits - logits.max())
            likely /= likely.sum()
            before = likely[likely > likely[text.ids[position + 1]]].sum()
            assert before < 0.95 + 1e-3, "a token outside of the top 95 %"
    assert len(chosen) > 1, "else the choice of experts was not tested"


def test_the_texts_are_those_of_the_runtime(exported: tuple[Path, System]) -> None:
    texts = recorded(exported[0], seed=7)
    with FusionRuntime.load(exported[0], threads=1) as runtime:
        for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            result = runtime.generate(prompt, NEW, temperature=1.0, top_p=0.95, seed=7 + number)
            tokens = text.ids[len(prompt) : len(prompt) + len(result.token_ids)].tolist()
            assert tokens == result.token_ids


def test_side_by_side_only_where_graphs_let_texts_differ_in_length(exported: tuple[Path, System], request: pytest.FixtureRequest) -> None:
    with opened(exported[0]) as models:
        assert models.rows == (1 if "positions" in request.node.name else side_by_side.MOST)
    with opened(exported[0], rows=40, texts=69) as models:
        assert models.rows == (1 if "positions" in request.node.name else 35), "two rounds of equal size"
        row = 2 * 2 * 4 * CONTEXT * 2 * 32 * len(exported[1].models)  # key and value, 2 layers, fp32, 2 heads of 32
    with patch.object(side_by_side, "CACHES", 3 * row), opened(exported[0]) as models:
        assert models.rows <= 3


def test_a_text_depends_on_its_own_prompt_and_seed_only(exported: tuple[Path, System]) -> None:
    texts = recorded(exported[0])
    assert all(map(equal, texts, recorded(exported[0])))
    for number, prompt in enumerate(PROMPTS):
        assert equal(recorded(exported[0], [prompt], seed=number)[0], texts[number])
    assert not all(map(equal, texts, recorded(exported[0], seed=100)))


def test_a_text_ends_with_its_end_of_sequence_token(exported: tuple[Path, System]) -> None:
    texts = recorded(exported[0], ends=tuple(range(0, 300, 4)))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        new = text.ids[len(prompt) :]
        assert new[-1] % 4 == 0 or len(new) == NEW
        assert (new[:-1] % 4 != 0).all()
        assert text.experts[-1] == NOBODY and text.experts[-2] != NOBODY
    assert min(len(text.ids) - len(prompt) for prompt, text in zip(PROMPTS, texts, strict=True)) < NEW, "else none ended early"


def test_candidates_are_the_largest_logits() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    logits[[5, 700]] = 9.0
    ids, values, normaliser = candidates(logits)
    assert ids.tolist() == np.argsort(-logits, kind="stable")[:256].tolist() and ids[:2].tolist() == [5, 700]
    np.testing.assert_array_equal(values, logits[ids])
    assert normaliser == pytest.approx(np.log(np.exp(logits.astype(np.float64)).sum()), rel=1e-6)
    assert len(candidates(logits[:10]).ids) == 10
