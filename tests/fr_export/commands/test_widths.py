"""What the commands print fits a terminal of 80 columns, and no figure in it is cut."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusionroute.calibration import show as calibration
from fusionroute.fr_export.commands import train
from fusionroute.fr_export.evaluation.report import shown
from fusionroute.runtime.bench import table as bench
from fusionroute.runtime.commands import inspect
from fusionroute.runtime.manifest import Manifest, Model, Variant

SCORE = {"value": 0.7051, "low": 0.69, "high": 0.72}


def evaluation(console: Console) -> None:
    domain = {"accuracy": SCORE, "f1": SCORE, "bleu": 51.23}
    domains = dict.fromkeys(("math", "code", "instruction", "composite", "unseen"), domain)
    row = {"bundle": "dist/gemma2", "precision": "int8", "method": "sequence-routed", "domains": domains, "average": domain}
    against = {"difference": -0.0512, "low": -0.06, "high": -0.04, "p": 0.0123}
    console.print(*shown(console, [row | {"against_first": None}, row | {"against_first": against}]))


def benchmark(console: Console) -> None:
    row = {
        "precision": "int8-wo", "system": "fused:instruction+drafts", "first_token": 12.3456, "tokens_per_second": 1234.5, "times_first": 1.25,
        "p50": 0.01234, "p95": 0.02345, "p99": 0.03456, "own": 0.00056, "switches": 12, "catch_ups": [3, 25], "weight_bytes_per_token": 5_678_900_000,
        "bytes_per_second": 23.45e9, "bandwidth_share": 0.87, "acceptance_rate": 0.66,
    }  # fmt: skip
    precision = {
        "name": "int8-wo", "bits_per_weight": 8.51, "kv_bytes_per_token": 184_320, "bytes": 5_678_900_000, "memory": {"anonymous": 9_876_500_000, "mapped": 1_234_500_000},
        "device_memory": None, "load_seconds": 31.4, "quality": {"perplexity_ratio": 1.0123, "greedy_agreement": 0.9876},
    }  # fmt: skip
    machine = {"cores": 2, "read_bandwidth": 20e9}
    about = {
        "bundle": "dist/gemma2",
        "device": "cpu",
        "prompt_tokens": 128,
        "new_tokens": 64,
        "repeats": 5,
        "machine": machine,
        "notes": [],
    }
    bench.show(console, about | {"rows": [row], "precisions": [precision]})


def calibrated(console: Console) -> None:
    figures = {"rows": 123_456, "absmax": 1234.5, "p99.99": 123.4, "mse": 12.34, "outliers": 56.7}
    matrix = "model.model.layers.29.self_attn.qkv_proj.weight"
    summary = {"texts": 69, "tokens": 6477, "answered": 3999, "identity": "0123456789abcdef", "shares": {"math": 0.125}}
    calibration.show(console, summary | {"models": {"router": {matrix: figures}}})


def bundle(console: Console) -> None:
    models = [Model(name=name, layers=30, kv_heads=3, head_size=64, parameters=134_515_008) for name in ("router", "instruction")]
    variant = Variant(
        target="tensorrt:10.3",
        precision="int8-wo",
        graphs={model.name: f"graphs/{model.name}.tensorrt-10.3.int8-wo.onnx" for model in models},
        fusion_graph="f.onnx",
        bits_per_weight=8.123,
    )
    manifest = Manifest.model_construct(  # unchecked: it lists no files
        format=1,
        family="llama3",
        models=models,
        fusion="weighted",
        lam=0.5,
        lam_curve=None,
        vocab_size=49_152,
        max_seq_len=4096,
        bos_token=None,
        eos_token=None,
        eos_token_ids=[],
        variants=[variant],
        files={},
    )
    for line in inspect.summary(Path("dist") / "llama3", manifest):
        console.print(line)
    console.print(*inspect.models_table(console, manifest), *inspect.precisions_table(console, manifest))


def training(console: Console) -> None:
    last = {"lm_loss": 1.2345, "routing_loss": 0.1234, "dpo_loss": 0.5678, "reward_accuracy": 0.9123, "reward_margin": 1.4567}
    console.print(*train.stage_tables(console, [{"name": "mixed", "steps": 12345, "seconds": 12345.6, "peak_mib": 12345.6, "last": last}]))


OUTPUTS: dict[Callable[[Console], None], tuple[str, ...]] = {
    evaluation: ("70.5", "±1.5", "51.2", "-5.1", "0.012"),
    benchmark: ("12,345.6", "1,234.5", "1.25", "12.34", "34.56", "5,678.9", "23.45", "87%", "66%", "9,876.5", "+1.23%", "98.8%"),
    calibrated: ("123,456", "1234", "123.4", "12.34", "56.7", "12.5%"),
    bundle: ("134,515,008", "8.12", "23,040", "tensorrt:10.3"),
    training: ("12345", "12345.6", "12346", "1.234", "0.123", "0.568", "0.912", "1.457"),
}


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.__name__)
@pytest.mark.parametrize("width", [60, 80, 160])
def test_output_fits_the_terminal_and_its_figures_are_whole(output: Callable[[Console], None], width: int) -> None:
    file = io.StringIO()
    output(Console(file=file, width=width, highlight=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width, file.getvalue()
    assert not any("…" in line for line in lines)
    cells: list[Any] = file.getvalue().split()
    for figure in OUTPUTS[output]:
        assert figure in cells, figure
