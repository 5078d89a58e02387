"""What `auto` chooses, and the sentences for machines that lack something.

The packages are stand-ins: there is no GPU here.
"""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends import DEVICES, KNOWN, BackendOptions
from fusionroute.runtime.backends.device_buffers import Place
from fusionroute.runtime.backends.ort_cpu import OrtCpu
from fusionroute.runtime.backends.ort_gpu import OrtGpu
from fusionroute.runtime.backends.providers import CUDA, NEGATION, PROVIDERS, Opener, keep
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cache import USER
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.files import cache_folder
from fusionroute.runtime.manifest import Variant
from tests.runtime.providers.conftest import CPU, on_cpu
from tests.support.commands import in_folder

GPU = "fusionroute.runtime.backends.providers.device_sm"


class Opened:
    """A stand-in for a session."""

    def __init__(self, providers: list[str]):
        self.get_providers = lambda: providers


def package(monkeypatch: pytest.MonkeyPatch, available: list[str], opens: Any = None, devices: Any = None) -> list[Any]:
    """A stand-in for onnxruntime with some providers; returns what its sessions were opened with."""
    opened: list[Any] = []

    def session(content: bytes, settings: Any, **arguments: Any) -> Any:
        opened.append((content, arguments, settings)) if content != NEGATION else None
        assert content == NEGATION or not opens, "a graph is opened on a provider that does not load"
        if isinstance(opens, Exception):
            raise opens
        names = [name for name, _ in arguments.get("providers", ())] or [device.ep_name for device in settings.devices]
        return Opened(opens or [*names, "CPUExecutionProvider"])

    class Settings(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
            self.devices = devices

    module = SimpleNamespace(
        __version__="1.99", get_available_providers=lambda: available, preload_dlls=lambda: print("Failed to load libcudnn.so"),
        SessionOptions=Settings, GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel, InferenceSession=session,
        get_ep_devices=lambda: devices or [], register_execution_provider_library=lambda name, path: None,
    )  # fmt: skip
    monkeypatch.setattr("fusionroute.runtime.backends.ort.import_module", lambda name: module)
    return opened


def test_this_onnxruntime_has_no_gpu_providers(bundles: dict[str, Path]) -> None:
    for device in PROVIDERS:
        extra = PROVIDERS[device].extra
        with pytest.raises(
            UnavailableError, match=rf"^This onnxruntime \(.*\) has no \w+ExecutionProvider: .*pip install 'fusionroute\[{extra}\]'\)\.$"
        ), patch(GPU, return_value=86):  # fmt: skip
            FusionRuntime.load(bundles["llama3"], device=device)


def test_two_packages_that_overwrite_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, ["CPUExecutionProvider"])
    monkeypatch.setattr("fusionroute.runtime.backends.providers.installed", lambda name: True)
    with pytest.raises(
        UnavailableError, match="onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install the extra 'gpu'"
    ):
        Opener(PROVIDERS["cuda"])


def test_no_package_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(
        UnavailableError, match=r"^This backend needs onnxruntime: install the extra 'gpu' \(pip install 'fusionroute\[gpu\]'\)\.$"
    ):
        Opener(PROVIDERS["cuda"])


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, [CUDA])
    with patch(GPU, return_value=None), pytest.raises(UnavailableError, match=r"needs an NVIDIA GPU and its driver.*device='cpu'"):
        Opener(PROVIDERS["cuda"])


def test_a_provider_that_does_not_load_is_not_mistaken_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime opens such a session on the CPU."""
    package(monkeypatch, [CUDA], opens=["CPUExecutionProvider"])
    with (
        patch(GPU, return_value=86),
        pytest.raises(UnavailableError, match=r"1\.99 cannot load CUDAExecutionProvider, which needs NVIDIA's libraries"),
    ):
        FusionRuntime.load(bundles["llama3"], device="cuda")
    package(monkeypatch, [CUDA], opens=RuntimeError("CUDA failure 35"))
    with (
        patch(GPU, return_value=86),
        pytest.raises(
            UnavailableError,
            match=r"cannot open a model with CUDAExecutionProvider \(CUDA failure 35\): export the bundle for the CPU too \(--target ort:cpu\), or",
        ),
    ):
        FusionRuntime.load(bundles["llama3"], device="cuda")
    assert capsys.readouterr() == ("", "")


def test_options_name_every_free_input_and_a_folder_for_each_graph(monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Path]) -> None:
    opened = package(monkeypatch, [CUDA, "TensorrtExecutionProvider"])
    bundle = Bundle.open(bundles["llama3"])
    names = list(bundle.variant("tensorrt", "fp32").graphs.values())[:2]
    with patch(GPU, return_value=86):
        opener = Opener(PROVIDERS["ort-tensorrt"])
    for name in names:
        opener.open(bundle, name)
    opener.open_fusion(bundle, "graphs/fusion.onnx")
    (first, second), fusion = (arguments["providers"] for _, arguments, _ in opened[:2]), opened[2][1]["providers"]
    assert [name for name, _ in first] == ["TensorrtExecutionProvider", CUDA] and [name for name, _ in fusion] == [CUDA]
    options = first[0][1]
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,key_positions:1,logit_positions:1"
    assert options["trt_profile_max_shapes"] == "input_ids:1x320,key_positions:320,logit_positions:320"
    folders = [Path(each[0][1]["trt_engine_cache_path"]) for each in (first, second)]
    assert folders[0] != folders[1] and all(folder.is_dir() and cache_folder() in folder.parents for folder in folders)
    assert all(arguments["enable_fallback"] == 0 for _, arguments, _ in opened)
    contents = [(bundles["llama3"] / name).read_bytes() for name in (*names, "graphs/fusion.onnx")]
    assert [content for content, _, _ in opened] == contents, "the bytes that were hashed"
    graph = onnxruntime.InferenceSession(str(bundles["llama3"] / names[0]), providers=["CPUExecutionProvider"])
    free = {value.name for value in graph.get_inputs() if any(isinstance(size, str) for size in value.shape)}
    assert {part.split(":")[0] for part in options["trt_profile_opt_shapes"].split(",")} == free


def test_two_loads_at_once_create_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between the look and the creation of the one, the other creates it."""
    folder = tmp_path / "providers" / "x-1" / "digest"
    monkeypatch.setattr("fusionroute.runtime.cache.prune", lambda: folder.mkdir(parents=True))
    keep(folder)
    assert folder.is_dir() and [entry.name for entry in folder.parent.glob(f"{USER}*")] == [f"{USER}{os.getpid()}"]


def test_a_provider_s_folder_that_cannot_be_written_to_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    folder = tmp_path / "providers" / "x-1" / "digest"
    folder.mkdir(parents=True)
    monkeypatch.setattr(Path, "touch", refuses)  # modes do not bind every user
    monkeypatch.setattr(os, "utime", refuses)
    keep(folder)
    assert not list(folder.parent.glob(f"{USER}*"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnavailableError, match=r"cannot be kept in .*digest \(.*\): name another cache folder in XDG_CACHE_HOME\.$"):
        keep(tmp_path / "file" / "digest")


def test_a_plugin_without_a_gpu_that_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(get_library_path=lambda: "lib.so")
    monkeypatch.setattr("fusionroute.runtime.backends.providers.import_module", lambda name: plugin)
    package(monkeypatch, ["CPUExecutionProvider"])
    with patch(GPU, return_value=75), pytest.raises(UnavailableError, match="NvTensorRTRTXExecutionProvider finds no GPU that it runs on"):
        Opener(PROVIDERS["ort-rtx"])
    own = SimpleNamespace(ep_name=PROVIDERS["ort-rtx"].name)
    package(monkeypatch, ["CPUExecutionProvider"], devices=[own])
    with patch(GPU, return_value=86):
        assert Opener(PROVIDERS["ort-rtx"])._devices == [own]


def test_a_session_without_a_gpu_provider_reads_from_the_host(bundles: dict[str, Path]) -> None:
    """The fusion graph of a plugin's device: logits come to the host first."""
    opener = Opener(replace(CPU, memory="cpu"))
    opener.provider = replace(CPU, memory="cuda")
    place = opener.place(opener.open_fusion(Bundle.open(bundles["llama3"]), "graphs/fusion.onnx"))
    assert isinstance(place, Place) and place.memory == "cpu"


def test_auto_takes_the_first_that_opens_and_logs_the_rest(bundles: dict[str, Path], log: list[str]) -> None:
    tried: list[tuple[str, str]] = []

    def broken(device: str, error: Exception) -> Any:
        def opened(bundle: Bundle, variant: Variant, options: BackendOptions) -> Any:
            tried.append((device, variant.precision))
            raise error

        return DEVICES[device][0], opened

    def works(bundle: Bundle, variant: Variant, options: BackendOptions) -> Any:
        return OrtGpu(bundle, variant, CPU)

    broken_engines = {"tensorrt": broken("tensorrt", UnavailableError("No engines.")), "rtx": broken("rtx", OSError("libnvinfer"))}
    with (
        patch("fusionroute.runtime.backends.device_sm", return_value=86),
        patch.dict(DEVICES, broken_engines | {"cuda": (("ort:cuda",), works)}),
    ):
        with FusionRuntime.load(bundles["llama3"]) as rt:
            assert isinstance(rt.backend, OrtGpu) and rt.precision == "fp16"
            assert len(rt.generate([5, 9, 200], 4).token_ids)
        assert tried == [(device, precision) for device in ("tensorrt", "rtx") for precision in ("fp16", "fp32")]
        assert (
            log[0] == "device='auto' passes tensorrt in fp16 over: No engines."
            and log[2] == "device='auto' passes rtx in fp16 over: libnvinfer"
        )
        assert len(log) == 4


def test_auto_ends_on_the_cpu_whatever_is_broken(bundles: dict[str, Path], log: list[str]) -> None:
    folder = bundles["gemma2"].with_name("emulated")  # of which only the CPU runs a variant
    for gpu in (None, 86):
        with patch("fusionroute.runtime.backends.device_sm", return_value=gpu), FusionRuntime.load(folder) as rt:
            assert isinstance(rt.backend, OrtCpu) and not log
    mixed = bundles["llama3"]
    with (
        patch("fusionroute.runtime.backends.device_sm", return_value=86),
        pytest.raises(UnavailableError, match="has no graphs for ort:cpu"),
    ):
        FusionRuntime.load(mixed)  # no engines, no provider, and no graphs for the CPU
    assert [line.split(" over: ")[0] for line in log] == [
        f"device='auto' passes {device} in {precision}"
        for device, precision in (("tensorrt", "fp16"), ("tensorrt", "fp32"), ("rtx", "fp16"), ("rtx", "fp32"), ("cuda", "fp16"))
    ]


def test_a_budget_below_one_expert_is_refused_before_anything_is_opened(bundles: dict[str, Path]) -> None:
    """With the bytes of its weights in the bundle."""
    bundle = Bundle.open(bundles["llama3"])
    stored = bundle.stored_bytes(bundle.variant("ort:cuda", "fp16").graphs["expert1"])
    for device in ("cuda", "ort-tensorrt"):
        with pytest.raises(InputError, match=r"^expert_memory=100 does not hold the [0-9]+ bytes of one expert: allow at least as much"):
            FusionRuntime.load(bundles["llama3"], "fp16", device, expert_memory=100)
    with on_cpu("ort:cuda"), pytest.raises(InputError, match=f"expert_memory={stored - 1} does not hold the {stored} bytes of one expert"):
        FusionRuntime.load(bundles["llama3"], device="bound", expert_memory=stored - 1)


def test_a_failing_run_is_one_sentence(bundles: dict[str, Path]) -> None:
    with on_cpu("ort:cuda"), FusionRuntime.load(bundles["llama3"], device="bound") as rt:
        session = rt.session()
        session.append([5, 9])
        session.step()
        cache = session._decoder.readers.router.cache
        with pytest.raises(Exception, match=r"^ONNX Runtime failed on 1 tokens of router: "):
            cache.forward([10**6], (0,))
        assert np.isfinite(session.step().logprob), "and the session goes on"


def test_the_command_line_lists_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fusionroute.runtime.__main__ import main

    assert ("auto", *DEVICES) == KNOWN and set(PROVIDERS) < set(DEVICES)
    with in_folder("runtime", main, tmp_path, monkeypatch, capsys) as command:
        assert ", ".join(KNOWN) in " ".join(command("generate", "--help").out.split())
