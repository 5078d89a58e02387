"""Models at a time: results in order, one error for all, and the same bundle as one after the other."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.precision import concurrency
from fusionroute.fr_export.precision.concurrency import MEMORY, Concurrency
from fusionroute.fr_export.precision.products import coarse_products, multiply
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.manifest import Manifest
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape, make_system


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(concurrency, "cores", lambda: count)


@pytest.mark.parametrize(
    ("count", "models", "memory", "expected"),
    [(2, 4, 1e6, (2, 1)), (8, 3, 1e6, (3, 2)), (1, 4, 1e6, (1, 1)), (8, 4, MEMORY / 2.5, (2, 4)), (8, 4, 3 * MEMORY, (1, 8))],
)
def test_how_many_at_a_time(cores: Callable[[int], None], count: int, models: int, memory: float, expected: tuple[int, int]) -> None:
    cores(count)
    assert Concurrency.of(models, memory) == Concurrency(*expected)


def test_results_come_in_order_and_torch_has_its_share_of_the_cores() -> None:
    def job(number: int, advance: Callable[[float], None]) -> tuple[int, int]:
        time.sleep(0.02 * (3 - number))  # the first is the slowest
        advance(number)
        return number, torch.get_num_threads()

    done: list[float] = []
    before = torch.get_num_threads()
    assert Concurrency(3, 5).each(job, range(4), done.append) == [(number, 5) for number in range(4)]
    assert sorted(done) == [0, 1, 2, 3] and torch.get_num_threads() == before


def test_when_one_fails_the_others_end_and_its_error_is_raised() -> None:
    """Whichever is first in order: the ones that were ended do not count."""
    ended = []

    def job(number: int, advance: Callable[[float], None]) -> None:
        if number == 1:
            raise ValueError("the weights of 1")
        try:
            for _ in range(1000):
                advance(1)
                time.sleep(0.01)
        finally:
            ended.append(number)

    start = time.perf_counter()
    with pytest.raises(ValueError, match="the weights of 1"):
        Concurrency(2, 1).each(job, range(8), lambda _: None)
    assert ended == [0] and time.perf_counter() - start < 5, "model 0 stopped, models 2 … 7 never began"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_the_bundle_does_not_depend_on_how_many_are_fitted_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: Callable[[int], None]
) -> None:
    """Models that share matrices, so that the later ones wait for the first: an embedding, and a whole layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("\n".join(f"tell me about {word} at length" for word in ("rain", "stone", "bread", "iron")))
    shape = Shape(experts=3, layers=2, tokenizer=True, config={"tie_word_embeddings": True})
    router, experts = make_system(tmp_path, shape)
    common = {name: tensor for name, tensor in load_file(Path(router) / "model.safetensors").items() if "layers.1." not in name}
    for folder in list(experts.values())[1:]:
        file = Path(folder) / "model.safetensors"
        save_file(load_file(file) | common, file, {"format": "pt"})
    files: list[dict[str, File]] = []
    for count in (1, 4):
        cores(count)
        out = export_checkpoints(
            tmp_path / f"bundle{len(files)}", shape, router, experts, ("int8", "int4"), calibration=str(tmp_path / "prompts.txt")
        )
        files.append({path: file for path, file in Manifest.read(out).files.items() if path.endswith((".onnx", ".bin"))})
    assert files[0] and files[1] == files[0]
    router_bytes, *others = (sum(tensor.bytes for tensor in file.tensors) for path, file in files[0].items() if path.endswith(".bin"))
    assert min(others) < router_bytes / 2, "what is shared is stored once"


def test_coarse_products_are_coarse_for_a_while_only() -> None:
    """A thousandth where the processor has bf16 products, else exact."""
    draw = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(64, 512, generator=draw).numpy() for _ in range(2))
    exact = x.astype(float) @ matrix.T.astype(float)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), coarse_products():
        assert abs(multiply(x, matrix) - exact).max() < 0.01 * abs(exact).max()
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert abs(multiply(x, matrix) - exact).max() < 1e-5 * abs(exact).max()
