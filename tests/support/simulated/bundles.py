"""Bundles of hand-written graphs with the exporter's inputs and outputs: small enough for hundreds of runs; any wrong
key changes the result.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fusionroute.fr_export.graphs.fusion_graph import write_fusion_graph
from fusionroute.runtime.adapters.factor_file import write_factors
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.limits import DELTA, EXPERT
from fusionroute.runtime.manifest import FORMAT, Engines, Manifest, Model, Pair, Profile, Variant
from tests.support.simulated.tensorrt import VERSION, plan

VOCAB, WIDTH, HEADS, SIZE, CAPACITY, CHUNK = 40, 16, 2, 8, 320, 4


def language_model(seed: int, experts: int = 0, layers: int = 2, rows: bool = False, pair: bool = False) -> onnx.ModelProto:
    """A transformer without norms or MLPs, in fp32; `experts` > 0 makes it a router.

    `rows`: it returns only the new keys and values, as graphs for TensorRT 10.3 do. `pair`: it reads an expert's text
    too, with factors of the last matrix of each layer.
    """
    random = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {
        "embedding": random.normal(size=(VOCAB, WIDTH)),
        "places": random.normal(size=(CAPACITY, WIDTH)),
        "head": random.normal(size=(WIDTH, VOCAB)),
        "routes": random.normal(size=(WIDTH, experts)),
    }
    for layer in range(layers):
        weights |= {f"{layer}.{kind}.w": random.normal(size=(WIDTH, WIDTH)) / 4 for kind in ("query", "key", "value", "out")}
    whole: dict[str, np.ndarray] = {
        "heads": np.array([0, 0, HEADS, SIZE]), "flat": np.array([0, 0, WIDTH]), "zero": np.array([0]), "one": np.array([1]),
        "two": np.array([2]), "first": np.array(0), "step": np.array(1),
    }  # fmt: skip
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items() if array.size]
    constants += [numpy_helper.from_array(array.astype(np.int64), name) for name, array in whole.items()]
    constants.append(numpy_helper.from_array(np.array(-1e30, np.float32), "far"))
    factors = delta_shapes(layers) if pair else {}
    shared = {*(constant.name for constant in constants), *factors}
    nodes: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    for prefix in ("", EXPERT) if pair else ("",):
        text = TextNodes(nodes, shared, prefix)
        text.read(layers, rows, with_factors=bool(prefix))
        answers: list[tuple[str, list[int | str]]] = [("logits", [1, f"{prefix}K", VOCAB])]
        if experts and not prefix:
            text.add("MatMul", ["last", "routes"], "routing")
            answers.append(("routing", [1, "K", experts]))
        caches = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        kv = [1, HEADS, CAPACITY, SIZE]
        caches_out: tuple[str, list[int | str]] = ("new", [1, HEADS, f"{prefix}S", SIZE]) if rows else ("present", [*kv])
        integers = {"input_ids": [1, f"{prefix}S"], "write_index": [1], "key_positions": [f"{prefix}T"], "logit_positions": [f"{prefix}K"]}
        inputs += [helper.make_tensor_value_info(prefix + name, TensorProto.INT64, shape) for name, shape in integers.items()]
        inputs += [helper.make_tensor_value_info(f"{prefix}past.{name}", TensorProto.FLOAT, kv) for name in caches]
        outputs += [helper.make_tensor_value_info(prefix + name, TensorProto.FLOAT, shape) for name, shape in answers]
        outputs += [helper.make_tensor_value_info(f"{prefix}{caches_out[0]}.{name}", TensorProto.FLOAT, caches_out[1]) for name in caches]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in factors.items()]
    graph = helper.make_graph(nodes, "model", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def delta_shapes(layers: int) -> dict[str, tuple[int, int]]:
    """The inputs of a pair's graph for an expert."""
    return {f"{DELTA}{layer}.out.w.{part}": shape for layer in range(layers) for part, shape in (("a", (WIDTH, 8)), ("b", (8, WIDTH)))}


class TextNodes:
    """The nodes of one text; but for the names that are `shared`, theirs begin with a prefix."""

    def __init__(self, nodes: list[onnx.NodeProto], shared: set[str], prefix: str):
        self._nodes, self._shared, self._prefix = nodes, shared, prefix

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        """A node with one output; returns its name without prefix."""
        named = [name if name in self._shared else self._prefix + name for name in inputs]
        self._nodes.append(helper.make_node(op, named, [self._prefix + output], **attributes))
        return output

    def read(self, layers: int, rows: bool, with_factors: bool) -> None:
        """All but the routing."""
        add = self.add
        add("Shape", ["input_ids"], "count", start=1)
        add("Squeeze", ["count"], "count0")
        add("Range", ["first", "count0", "step"], "steps")
        add("Add", ["steps", "write_index"], "positions")
        add("Gather", ["embedding", "input_ids"], "words")
        add("Gather", ["places", "positions"], "where")
        state = add("Add", ["words", "where"], "x")
        add("Shape", ["key_positions"], "keys")
        add("Unsqueeze", ["positions", "one"], "rows")
        add("LessOrEqual", ["key_positions", "rows"], "seen")
        for layer in range(layers):
            parts = {}
            for kind in ("query", "key", "value"):
                add("MatMul", [state, f"{layer}.{kind}.w"], f"{layer}.{kind}.flat")
                add("Reshape", [f"{layer}.{kind}.flat", "heads"], f"{layer}.{kind}.split")
                parts[kind] = add("Transpose", [f"{layer}.{kind}.split"], f"{layer}.{kind}", perm=[0, 2, 1, 3])
            for kind in ("key", "value"):
                name = f"{layer}.{kind}"
                if rows:
                    add("Identity", [parts[kind]], f"new.{name}")
                add("TensorScatter", [f"past.{name}", parts[kind], "write_index"], f"present.{name}", axis=2, mode="linear")
                parts[kind] = add("Slice", [f"present.{name}", "zero", "keys", "two"], f"{name}.used")
            add("Transpose", [parts["key"]], f"{layer}.turned", perm=[0, 1, 3, 2])
            add("MatMul", [parts["query"], f"{layer}.turned"], f"{layer}.scores")
            add("Where", ["seen", f"{layer}.scores", "far"], f"{layer}.masked")
            add("Softmax", [f"{layer}.masked"], f"{layer}.shares", axis=-1)
            add("MatMul", [f"{layer}.shares", parts["value"]], f"{layer}.mixed")
            add("Transpose", [f"{layer}.mixed"], f"{layer}.joined", perm=[0, 2, 1, 3])
            wide = add("Reshape", [f"{layer}.joined", "flat"], f"{layer}.wide")
            gain = add("MatMul", [wide, f"{layer}.out.w"], f"{layer}.gain")
            if with_factors:
                add("MatMul", [wide, f"{DELTA}{layer}.out.w.a"], f"{layer}.low")
                add("MatMul", [f"{layer}.low", f"{DELTA}{layer}.out.w.b"], f"{layer}.delta")
                gain = add("Add", [gain, f"{layer}.delta"], f"{layer}.total")
            state = add("Add", [state, gain], f"{layer}.x")
        add("Gather", [state, "logit_positions"], "last", axis=1)
        add("MatMul", ["last", "head"], "logits")


def write_bundle(folder: Path, experts: int = 3, seed: int = 0, layers: int = 2, rows: bool = False) -> Path:
    """A bundle without tokenizer: router, experts, fusion, and engines that stand for these very graphs."""
    (folder / "graphs").mkdir(parents=True)
    names = ["router", *(f"expert{number}" for number in range(experts))]
    graphs = {name: f"graphs/{name}.tensorrt.fp32.onnx" for name in names}
    for number, path in enumerate(graphs.values()):
        onnx.save(language_model(seed + number, experts if number == 0 else 0, layers, rows), folder / path)
    write_fusion_graph(folder / "graphs/fusion.onnx")
    spec = {"layers": layers, "kv_heads": HEADS, "head_size": SIZE, "parameters": 1000}
    target = "tensorrt:10.3" if rows else "tensorrt"
    variant = Variant(target=target, precision="fp32", graphs=graphs, fusion_graph="graphs/fusion.onnx", bits_per_weight=32)
    manifest = Manifest(
        format=FORMAT, family="llama3", models=[Model(name=name, **spec) for name in names], fusion="weighted", lam=0.5, vocab_size=VOCAB,
        max_seq_len=CAPACITY, bos_token=None, eos_token=None, eos_token_ids=[], variants=[variant],
        files={path: described(folder, path) for path in (*graphs.values(), "graphs/fusion.onnx")},
    )  # fmt: skip
    manifest.write(folder)
    return add_engines(folder, chunk=CHUNK)


def write_pair_bundle(folder: Path, experts: int = 3, seed: int = 0, layers: int = 2, rows: bool = False) -> Path:
    """As `write_bundle`, with one base: the experts are factors."""
    (folder / "graphs").mkdir(parents=True)
    target = "tensorrt:10.3" if rows else "tensorrt"
    path = "graphs/base.onnx"
    onnx.save(language_model(seed, experts, layers, rows, pair=True), folder / path)
    write_fusion_graph(folder / "graphs/fusion.onnx")
    factors = {}
    for number in range(experts):
        random, sizes = np.random.default_rng(100 + seed + number), delta_shapes(layers)
        arrays = [random.normal(size=size).astype(np.float32) / 2 for size in sizes.values()]
        entries = {name: ("F32", size) for name, size in sizes.items()}
        file, _ = write_factors(folder / "graphs/factors", f"expert{number}", entries, arrays)
        factors[f"expert{number}"] = file.relative_to(folder).as_posix()
    spec = {"layers": layers, "kv_heads": HEADS, "head_size": SIZE, "parameters": 1000}
    variant = Variant(
        target=target, precision="fp32", graphs={}, fusion_graph="graphs/fusion.onnx", bits_per_weight=32, pair=Pair(graph=path, factors=factors),
    )  # fmt: skip
    manifest = Manifest(
        format=FORMAT, family="llama3", models=[Model(name=name, **spec) for name in ("router", *factors)], fusion="weighted", lam=0.5,
        vocab_size=VOCAB, max_seq_len=CAPACITY, bos_token=None, eos_token=None, eos_token_ids=[], variants=[variant],
        files={name: described(folder, name) for name in (path, "graphs/fusion.onnx", *factors.values())},
    )  # fmt: skip
    manifest.write(folder)
    return add_engines(folder, chunk=CHUNK)


def add_engines(folder: Path, chunk: int, sms: tuple[int, ...] = (86, 89)) -> Path:
    """Give every variant for TensorRT in a bundle engines of both flavours that the simulated library runs."""
    manifest = Manifest.read(folder)
    files, variants = dict(manifest.files), []
    for variant in manifest.variants:
        if variant.target.startswith("tensorrt"):
            built = {}
            for name, graph in variant.engine_graphs.items():
                path = built[name] = f"engines/{name}.{variant.precision}.engine"
                (folder / "engines").mkdir(exist_ok=True)
                (folder / path).write_bytes(plan(folder / graph))
                files[path] = described(folder, path)
            limit = manifest.max_seq_len
            profile = Profile(
                tokens=chunk, keys=limit, positions=chunk, rows=chunk, candidates=min(512, manifest.vocab_size), penalised=limit
            )
            engines = [
                Engines(flavour=flavour, version=VERSION, sms=list(sms), engines=built, profile=profile) for flavour in ("rtx", "tensorrt")
            ]
            variant = variant.model_copy(update={"engines": engines})
        variants.append(variant)
    manifest.model_copy(update={"files": files, "variants": variants}).write(folder)
    return folder


def described(folder: Path, path: str) -> File:
    """A manifest's entry for a file."""
    content = (folder / path).read_bytes()
    return File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
