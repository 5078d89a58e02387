"""Recorded texts against plain torch: each token lies in the nucleus, each expert is the router's choice."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fusionroute.calibration.record import NOBODY, RecordedText, record
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError
from tests.support.exporting import export_system
from tests.support.systems import Shape

PROMPTS: list[str | list[int]] = ["12+30=", [5, 7, 9, 11], "A prompt of more tokens than those."]
NEW, CONTEXT = 40, 96


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, System]:
    return export_system(tmp_path_factory.mktemp("record"), Shape(layers=1, tokenizer=True), ("fp32",), max_seq_len=CONTEXT)


@pytest.fixture
def runtime(exported: tuple[Path, System]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(exported[0], threads=1) as loaded:
        yield loaded


def recorded(runtime: FusionRuntime, prompts: list[str | list[int]] = PROMPTS, new: int = NEW, seed: int = 0) -> list[RecordedText]:
    return record(runtime, prompts, new, seed, lambda _: None)


def equal(one: RecordedText, other: RecordedText) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.experts, other.experts)


def test_what_the_system_does_on_its_own(exported: tuple[Path, System], runtime: FusionRuntime) -> None:
    texts = recorded(runtime)
    references = reference(exported[1], [text.ids.tolist() for text in texts], (0.5, 0.5))
    chosen = set()
    for prompt, text, expected in zip(PROMPTS, texts, references, strict=True):
        start = runtime.prompt_ids(prompt)
        assert text.ids.dtype == np.int32 and text.experts.dtype == np.int8
        assert text.ids[: len(start)].tolist() == start and len(text.ids) == len(start) + NEW == len(text.experts)
        answered = np.flatnonzero(text.experts != NOBODY)
        assert answered.tolist() == list(range(len(start) - 1, len(text.ids) - 1))
        assert text.experts[answered].tolist() == expected.experts[answered].tolist()
        chosen |= set(text.experts[answered].tolist())
        for position in answered:
            logits = expected.logits[position].astype(np.float64)
            likely = np.exp(logits - logits.max())
            likely /= likely.sum()
            before = likely[likely > likely[text.ids[position + 1]]].sum()
            assert before < 0.95 + 1e-3, "a token outside of the top 95 %"
    assert len(chosen) > 1, "else the choice of experts was not tested"


def test_a_text_depends_on_its_own_prompt_and_seed_only(runtime: FusionRuntime) -> None:
    texts = recorded(runtime)
    assert all(map(equal, texts, recorded(runtime)))
    for number, prompt in enumerate(PROMPTS):
        assert equal(recorded(runtime, [prompt], seed=number)[0], texts[number])
    assert not equal(recorded(runtime, seed=100)[0], texts[0])


def test_a_text_ends_with_its_end_of_sequence_token(runtime: FusionRuntime) -> None:
    manifest = runtime.bundle.manifest
    runtime.bundle.manifest = manifest.model_copy(update={"eos_token_ids": list(range(0, 300, 4))})
    texts = recorded(runtime)
    free = len(runtime.prompt_ids(PROMPTS[0]))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        new = text.ids[len(runtime.prompt_ids(prompt)) :]
        assert new[-1] % 4 == 0 or len(new) == NEW
        assert (new[:-1] % 4 != 0).all()
        assert text.experts[-1] == NOBODY and text.experts[-2] != NOBODY
    assert min(len(text.ids) for text in texts) < free + NEW, "else none ended early"


def test_a_prompt_that_is_too_long_keeps_its_beginning(runtime: FusionRuntime) -> None:
    ids = np.random.default_rng(0).integers(3, 300, 100).tolist()
    (text,) = recorded(runtime, [ids])
    assert len(text.ids) == runtime.max_seq_len
    assert text.ids[: CONTEXT - NEW].tolist() == ids[: CONTEXT - NEW]
    assert equal(text, recorded(runtime, [ids[: CONTEXT - NEW]])[0])
    assert len(recorded(runtime, [ids], new=CONTEXT - 1)[0].ids) == CONTEXT


def test_progress(runtime: FusionRuntime) -> None:
    done: list[float] = []
    record(runtime, PROMPTS, 1, 0, done.append)
    assert done == [1, 1, 1]


def test_wrong_arguments(runtime: FusionRuntime) -> None:
    for new in (0, -1, CONTEXT):
        with pytest.raises(InputError, match=rf"{new} new tokens per prompt are out of range: expected 1 to {CONTEXT - 1}"):
            recorded(runtime, new=new)
    with pytest.raises(InputError, match="no tokens"):
        recorded(runtime, [[5], []])
