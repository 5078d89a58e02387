"""The forecast against what was measured: on SmolLM2, and on Gemma-2-2B's shape (docs/real-size.md)."""

from dataclasses import replace

import pytest

from fusionroute.fr_export.forecast.forecast import FEWEST_TOKENS, SHARE, Forecast, check_memory, default_tokens
from fusionroute.fr_export.forecast.stages import FASTER, LEAST, MOST, SLOWER, StageForecast, comparing, stages
from fusionroute.fr_export.forecast.work import Work
from fusionroute.fr_export.precision import SCHEMES, Scheme
from fusionroute.fr_export.verify.compare import TOKENS
from fusionroute.runtime.errors import FusionError

SMOLLM2 = Work(
    models=4, values=4 * 134_515_008, written=4 * 134_515_008, recorded=4 * 134_515_008, largest_model=134_515_008,
    largest_tensor=49_152 * 576, widest=1536, decomposed=0, traced_layers=30, layers=60, active_values=2 * 134_515_008, vocab_size=49_152, new_tokens=69 * 64, tokens=6477,
)  # fmt: skip
GEMMA = Work(
    models=3, values=7_843_000_000, written=7_843_000_000, recorded=7_843_000_000, largest_model=2_614_000_000,
    largest_tensor=256_000 * 2304, widest=9216, decomposed=0,
    traced_layers=26, layers=52,
    active_values=5_228_000_000, vocab_size=256_000, new_tokens=8 * 64, tokens=8 * 100,
)  # fmt: skip
CPU = [("ort:cpu", SCHEMES["ort:cpu"][name]) for name in ("fp32", "int8", "int4")]
# stage → seconds (None: no clean measurement) and peak MiB as measured
SMOLLM2_MEASURED = {
    "tracing": (4.0, 488), "writing int8 to record with": (3.9, 745), "recording": (22.0, 2715), "calibrating": (18.8, 974),
    "writing fp32 for ort:cpu": (3.9, 948), "writing int8 for ort:cpu": (35.7, 1091), "writing int4 for ort:cpu": (39.8, 1090),
    "reference in torch": (5.6, 1602), "comparing fp32 for ort:cpu": (7.3, 3712), "comparing int8 for ort:cpu": (4.4, 2858),
    "comparing int4 for ort:cpu": (5.4, 2440),
}  # fmt: skip
# by an earlier version; its 3,331 s of fitting were of loops that were not compiled yet
GEMMA_MEASURED = {"recording": (71, 5110), "calibrating": (66, 4492), "writing int4 for ort:cpu": (None, 4988)}


def by_name(parts: list[StageForecast]) -> dict[str, StageForecast]:
    return {part.name: part for part in parts}


@pytest.mark.parametrize(
    ("work", "plan", "measured"), [(SMOLLM2, CPU, SMOLLM2_MEASURED), (GEMMA, CPU[2:], GEMMA_MEASURED)], ids=["SmolLM2", "Gemma-2-2B"]
)
def test_what_was_measured_lies_in_the_range(
    work: Work, plan: list[tuple[str, Scheme]], measured: dict[str, tuple[float | None, float]]
) -> None:
    expected = by_name(stages(work, plan, "builtin", 0, 384, 1.0))
    assert measured.keys() <= expected.keys()
    for name, (seconds, _) in measured.items():
        part = expected[name]
        if seconds is None:
            continue
        assert FASTER * part.seconds <= seconds <= SLOWER * part.seconds, (name, part)
    peak = max(expected.values(), key=lambda part: part.memory)
    most = max(mebibytes for _, mebibytes in measured.values()) * 2**20
    assert LEAST * peak.memory <= most <= MOST * peak.memory, peak


def test_a_model_too_large_for_torch_is_not_compared() -> None:
    assert not list(comparing(GEMMA, CPU, 384)) and list(comparing(SMOLLM2, CPU, 384)) and not list(comparing(SMOLLM2, CPU, 0))


def test_graphs_for_a_gpu_are_not_compared_and_engines_are_built() -> None:
    plan = [("ort:cuda", SCHEMES["ort:cuda"]["fp16"]), ("tensorrt", SCHEMES["tensorrt"]["int4"])]
    names = [part.name for part in stages(SMOLLM2, plan, "none", 3, 384, 1.0)]
    assert "building int4 engines" in names and "comparing fp16 for ort:cuda" not in names and "recording" not in names


@pytest.mark.parametrize("calibration", ["none", "table.safetensors"])
def test_nothing_is_recorded_without_need(calibration: str) -> None:
    parts = by_name(stages(SMOLLM2, CPU, calibration, 0, 384, 1.0))
    recorded = by_name(stages(SMOLLM2, CPU, "builtin", 0, 384, 1.0))
    assert "recording" not in parts and "calibrating" not in parts
    fitted = parts["writing int4 for ort:cpu"].seconds == recorded["writing int4 for ort:cpu"].seconds
    assert fitted == (calibration != "none")


def test_one_base_is_recorded_with_once_and_approximations_take_time() -> None:
    one = 134_515_008
    shared = by_name(stages(replace(SMOLLM2, written=one, recorded=one), CPU, "builtin", 0, 384, 1.0))
    whole = by_name(stages(SMOLLM2, CPU, "builtin", 0, 384, 1.0))
    assert whole["recording"].memory - shared["recording"].memory == pytest.approx(1.25 * 3 * one * 8.1 / 8, rel=0.01)
    assert shared["recording"].seconds == whole["recording"].seconds
    per_layer = 576 * 576 * 576 * 2 + 2 * 192 * 576 * 192 + 3 * 576 * 1536 * 576
    tuned = by_name(stages(replace(SMOLLM2, written=one, decomposed=3 * 30 * per_layer), CPU, "builtin", 0, 384, 1.0))
    measured = 3 * 30 * (2 * 0.03 + 3 * 0.05)  # seconds of one core for the singular values, from 30 to 50 ms for a matrix
    seconds = tuned["measuring what experts change"].seconds - shared["calibrating"].seconds
    assert FASTER * seconds <= measured <= SLOWER * seconds
    assert tuned["writing int8 for ort:cpu"].seconds > shared["writing int8 for ort:cpu"].seconds


def test_a_slow_machine_takes_longer() -> None:
    once, thrice = (stages(SMOLLM2, CPU, "builtin", 0, 384, slowness) for slowness in (1.0, 3.0))
    assert [part.seconds * 3 for part in once] == pytest.approx([part.seconds for part in thrice])
    assert [part.memory for part in once] == [part.memory for part in thrice]


def test_the_default_comparison_takes_a_tenth_of_the_time_at_most() -> None:
    for work in (SMOLLM2, replace(SMOLLM2, new_tokens=4 * SMOLLM2.new_tokens), replace(SMOLLM2, new_tokens=640, tokens=900)):
        tokens = default_tokens(work, CPU, "builtin", 0)
        assert FEWEST_TOKENS <= tokens <= TOKENS
        parts = stages(work, CPU, "builtin", 0, tokens, 1.0)
        compared = sum(part.seconds for part in comparing(work, CPU, tokens))
        longer = sum(part.seconds for part in comparing(work, CPU, tokens + 1))
        total = sum(part.seconds for part in parts)
        assert compared <= SHARE * total or tokens == FEWEST_TOKENS
        assert tokens == TOKENS or longer > SHARE * (total - compared + longer), "no more would fit"
    assert default_tokens(SMOLLM2, CPU[:1], "none", 0) == FEWEST_TOKENS, "an export of seconds is compared all the same"


def test_too_little_memory_is_refused_and_doubtful_is_not() -> None:
    forecast = Forecast(
        "llama3", 4096, [], [], 0, 0, peak_memory=(6_000_000_000, 10_000_000_000), peak_stage="recording", memory_available=0,
        seconds=(1, 2), compared_tokens=0, stages=[],
    )  # fmt: skip
    check_memory(forecast, 8_000_000_000)
    with pytest.raises(
        FusionError, match=r"^The stage 'recording' needs about 6\.0 to 10\.0 GB of memory, and this machine has 5\.0 GB .*\.$"
    ):
        check_memory(forecast, 5_000_000_000)
