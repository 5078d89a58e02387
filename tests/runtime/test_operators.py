"""The table of TensorRT's operators, engines held against machines, and what is refused without the library."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime.commands.build import build
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.manifest import Engines, Profile, Variant
from fusionroute.runtime.tensorrt.build import build_lock, told
from fusionroute.runtime.tensorrt.engines import fitting, with_engines
from fusionroute.runtime.tensorrt.library import installed_flavour, load, parse_sms
from fusionroute.runtime.tensorrt.operators import check, known, since, table

PROFILE = Profile(tokens=8, keys=16, positions=8, rows=8, candidates=8, penalised=16)


def engines(flavour: str, version: str, *sms: int) -> Engines:
    return Engines(flavour=flavour, version=version, sms=list(sms), engines={}, profile=PROFILE)


def variant(*built: Engines) -> Variant:
    return Variant(target="tensorrt", precision="int8", graphs={}, fusion_graph="f", bits_per_weight=8.0, engines=list(built))


def test_versions_have_what_older_ones_have_and_more() -> None:
    versions = list(table()["versions"])
    for older, newer in itertools.pairwise(versions):
        assert known(older) < known(newer)
    assert len(known("10.3")) == 150
    assert known("10.3.0.30") == known("10.3") and known("11.4.1") == known("10.15") and known("10.13") == known("10.5")
    assert not known("9.0")
    assert (since("MatMul"), since("Attention"), since("TensorScatter"), since("GroupQueryAttention")) == ("10.3", "10.14", "10.15", None)
    assert {*table()["sources"]} >= {"10.3", "10.15", "11"}


def test_a_graph_that_a_library_cannot_read_is_refused_by_the_operator() -> None:
    class Parser:
        def supports_operator(self, name: str) -> bool:
            return name in known("10.3")

    check(["MatMul", "Softmax"], Parser(), "tensorrt", "10.3.0")
    with pytest.raises(
        UnavailableError, match=r"^TensorRT 10\.3\.0 does not import the operator TensorScatter, which TensorRT has from 10\.15 on: .*\.$"
    ):
        check(["MatMul", "TensorScatter"], Parser(), "tensorrt", "10.3.0")
    with pytest.raises(UnavailableError, match=r"^TensorRT 10\.3\.0 does not import the operator MatMulNBits: install"):
        check(["MatMulNBits"], Parser(), "tensorrt", "10.3.0")


def test_engines_of_another_version_or_gpu_are_refused_with_the_way_to_rebuild() -> None:
    built = variant(engines("rtx", "1.7", 86, 89), engines("rtx", "1.6", 120), engines("tensorrt", "10.15", 87))

    def refusal(flavour: str, version: str, sm: int | None) -> str:
        with pytest.raises(UnavailableError) as raised:
            fitting(Path("b"), built, flavour, version, sm)
        assert str(raised.value).endswith(".") and str(raised.value).count(". ") == 0
        return str(raised.value)

    assert fitting(Path("b"), built, "rtx", "1.7", 89) is built.engines[0]
    assert fitting(Path("b"), built, "tensorrt", "10.15", 87) is built.engines[2]
    rebuild = "rebuild them here with: fusionroute build b --precision int8"
    assert refusal("rtx", "1.7", 75) == (
        f"The TensorRT-RTX engines of b for int8 are for sm86, sm89, sm120, but this machine's GPU is sm75: {rebuild}."
    )
    assert refusal("rtx", "1.8", 86) == (
        f"The TensorRT-RTX engines of b for int8 were built by version 1.7, but this machine has 1.8: {rebuild}."
    )
    assert "built by version 1.6, but this machine has 1.7" in refusal("rtx", "1.7", 120)
    assert "for sm87, but this machine's GPU is sm86" in refusal("tensorrt", "10.15", 86)
    assert "need an NVIDIA GPU, and there is none here" in refusal("rtx", "1.7", None)
    with pytest.raises(UnavailableError, match=r"has no TensorRT engines for int8: rebuild them here"):
        fitting(Path("b"), variant(engines("rtx", "1.7", 86)), "tensorrt", "10.15", 86)


def test_new_engines_take_the_place_of_those_for_the_same_gpus() -> None:
    old, other, new = engines("rtx", "1.6", 86), engines("rtx", "1.6", 89), engines("rtx", "1.7", 86)
    assert with_engines(variant(old, other), new).engines == [other, new]


def test_compute_capabilities_are_parsed() -> None:
    assert parse_sms("sm86+SM89+120+sm86") == (86, 89, 120)
    for text in ("", "sm86+", "sm86,sm89", "ampere"):
        with pytest.raises(InputError, match=r"is no compute capability: expected such as sm86\+sm89\+sm120\.$"):
            parse_sms(text)


@pytest.mark.parametrize(("flavour", "module", "extra"), [("rtx", "tensorrt_rtx", "rtx"), ("tensorrt", "tensorrt", "tensorrt")])
def test_a_missing_library_is_one_sentence(flavour: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UnavailableError, match=rf"is not installed: install the extra '{extra}' \(pip install 'fusionroute\[{extra}\]'\)\.$"
    ):
        load(flavour)
    for each in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, each, None)
    assert installed_flavour() is None


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Quantized constant (w)  is\nonly allowed)", "API Usage Error (Quantized constant (w) is only allowed)"),
        ("IBuilder::x: Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)", "layer a...b: Internal Error"),
        ("Error [ONNX Layer: /mlp/MatMul] no kernel", "Error [ONNX Layer: /mlp/MatMul] no kernel"),
    ],
)  # fmt: skip
def test_a_librarys_error_is_told_in_a_few_words(message: str, short: str) -> None:
    assert told(message).startswith(short)
    assert len(told(message * 50)) < 400


def test_building_needs_neither_torch_nor_onnx() -> None:
    packages = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime"}
    code = f"import sys, fusionroute.runtime.commands.build; print({packages} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_bundle_without_graphs_for_tensorrt_says_how_to_get_them(bundles: list[Path]) -> None:
    with pytest.raises(UnavailableError, match=r"has no graphs for tensorrt, only for ort:cpu: export it with --target tensorrt\.$"):
        build(bundles[0])


def test_one_build_at_a_time() -> None:
    inside, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with build_lock("build.lock"):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        with build_lock("build.lock"):
            order.append("second")

    threads: list[Any] = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and not order
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]
