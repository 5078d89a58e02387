"""The bundle's schema: what `manifest.json` says, checked on reading."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)  # fmt: skip

from fusionroute.runtime.arguments import LONGEST, shown
from fusionroute.runtime.errors import BundleError, one_line
from fusionroute.runtime.file_entry import LARGEST, File, InsidePath, Name, Size, Strict
from fusionroute.runtime.kv_precisions import KV_PRECISIONS, KvName
from fusionroute.runtime.manifest_file import NAME, SIGNATURE, read_manifest, write_manifest
from fusionroute.runtime.strict_json import check_json
from fusionroute.runtime.window import Window

BASE, FUSION = "base", "fusion"  # names of engines that are no model's
# what this version reads at most, and writes. Format 1 has no `tensors`: each weight was a file; from 3 on a variant may have a `pair`,
# from 4 on `kv`; from 5 on files have their `blake3`, a pair may have `every_expert`, and a variant `windows`
FORMAT: Final = 5
Fusion = Literal["weighted", "additive"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]  # ONNX Runtime tells graphs of lengths with 32 bits


def an_int(value: object) -> object:
    """Refuse what equals an int and is none, such as true."""
    if type(value) is not int:
        raise ValueError("expected a whole number")
    return value


class Model(Strict):
    """One language model of the system.

    Its KV cache is `layers` pairs of buffers [1, kv_heads, capacity, head_size].
    """

    name: Name
    layers: Count
    kv_heads: Count
    head_size: Count
    parameters: Annotated[int, Field(ge=1, le=LARGEST)]


class Profile(Strict):
    """Largest sizes that engines are built for. Of a model: tokens in a call, keys that it reads, positions that it
    returns logits for.

    Of the fusion graph: rows that it fuses, candidates that it returns, and ids that it penalises in each row. The
    smallest are 1 (penalised: 0).
    """

    tokens: Count
    keys: Count
    positions: Count
    rows: Count
    candidates: Count
    penalised: Annotated[int, Field(ge=0, lt=1 << 31)]


class Engines(Strict):
    """Engines built from the graphs of one variant, by the names of `Variant.engine_graphs`. They run with this version
    of the library, on these GPUs only.

    `sms` are compute capabilities: 86 for SM86.
    """

    flavour: Annotated[str, Field(pattern="^(rtx|tensorrt)$")]
    version: Name
    sms: Annotated[list[int], Field(min_length=1)]
    engines: dict[str, InsidePath]
    profile: Profile


class Adapting(Strict):
    """What it takes to make an expert of an adapter, see `runtime.adapters.unadapted`.

    unadapted: the factors of the base without an adapter. layout: how factors lie in the graph's inputs.
    """

    unadapted: InsidePath
    layout: InsidePath


class Pair(Strict):
    """One graph that router and expert pass through together, and the factors that make an expert of it.

    every_expert: whether `graph` has a segment for each row of the routing head, else one for whichever expert reads.
    head: the graph that makes logits of the hidden states that `graph` gives, None where it gives logits itself;
    `head_is_linear`: whether the head may run on fused hidden states. factors: expert → a safetensors file with the
    values of the graph's inputs `delta.…`, under their names. Where `adapting` is None, no expert can be added.
    """

    graph: InsidePath
    every_expert: bool = False
    head: InsidePath | None = None
    head_is_linear: bool = False
    factors: dict[str, InsidePath]
    adapting: Adapting | None = None

    @property
    def files(self) -> set[str]:
        """All files that it names."""
        adapting = set() if self.adapting is None else {self.adapting.unadapted, self.adapting.layout}
        return {*self.graph_paths, *self.factors.values(), *adapting}

    @property
    def graph_paths(self) -> list[str]:
        """Its graphs."""
        return [self.graph] if self.head is None else [self.graph, self.head]


class Variant(Strict):
    """One precision for one target: a graph per model (router first), or one for all of them; and the fusion graph.

    `pair`: the one graph; `graphs` is then that of experts which it does not serve. `kv`: the precision of keys and
    values, where it is not that of the activations. `windows`: by model, where some layers do with the end of a text.
    `weight_bytes`: bytes of weights that one token reads of each model, which are all but the embedding rows of other
    tokens (of an expert beside a `pair`: its factors); empty in bundles of older versions. `operators`: the ONNX operators
    of its graphs, for targets whose builder must know them.
    """

    target: Name
    precision: Name
    graphs: dict[str, InsidePath]
    fusion_graph: InsidePath
    bits_per_weight: Annotated[float, Field(allow_inf_nan=False)]
    weight_bytes: dict[str, Size] = Field(default_factory=dict)
    operators: list[str] = Field(default_factory=list)
    engines: list[Engines] = Field(default_factory=list)
    pair: Pair | None = None
    kv: KvName | None = None
    windows: dict[str, Window] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def without_news(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `pair`, `kv` and `windows` out where there are none: older versions read such variants."""
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if value or name not in ("pair", "kv", "windows")}

    @property
    def graph_paths(self) -> list[str]:
        """The graphs of its language models, each once."""
        return [*([] if self.pair is None else self.pair.graph_paths), *self.graphs.values()]

    @property
    def engine_graphs(self) -> dict[str, str]:
        """The graphs that engines are built from, by the engines' names: of the models, or BASE; and FUSION."""
        return (self.graphs if self.pair is None else {BASE: self.pair.graph}) | {FUSION: self.fusion_graph}

    @property
    def kv_bits(self) -> int:
        """Bits of one value in the KV caches: those of `kv`, else 16 where the graphs compute in half precision, else 32."""
        if self.kv is not None:
            return KV_PRECISIONS[self.kv].bits
        if self.target == "ort:cpu":  # its kernels compute in fp32, whatever the weights are
            return 32
        half = self.precision in ("fp16", "bf16") if self.target == "portable" else self.precision != "fp32"
        return 16 if half else 32

    def kv_bytes_per_token(self, model: Model) -> int:
        """Bytes of keys and values that a token takes in a model's cache."""
        return 2 * model.layers * model.kv_heads * model.head_size * self.kv_bits // 8


class Manifest(Strict):
    """Everything a runtime must know of a bundle before it opens its other files.

    `lam_curve`: pairs of λ and accuracy on the validation split; None where λ was not tuned. `routing_rows`: whom the
    rows of the routing head stand for, where some of them have no expert any more; empty: they are those of `experts`.
    """

    format: Annotated[Literal[1, 2, 3, 4, 5], BeforeValidator(an_int)]
    family: Name
    models: Annotated[list[Model], Field(min_length=2)]
    fusion: Fusion
    lam: Share
    lam_curve: list[tuple[Share, Share]] | None = None
    vocab_size: Annotated[int, Field(ge=2, lt=1 << 31)]
    max_seq_len: Annotated[int, Field(ge=2, lt=1 << 31)]
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: list[int]
    variants: Annotated[list[Variant], Field(min_length=1)]
    files: dict[InsidePath, File]
    routing_rows: list[Name] = Field(default_factory=list)

    @model_serializer(mode="wrap")
    def of_its_format(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what versions that read its format do not know: `blake3` of files that were added to an older bundle,
        `every_expert` of its pairs, and `routing_rows` where they are the experts.
        """
        fields: dict[str, Any] = serialise(self)
        if self.format < 5:
            for entry in fields["files"].values():
                entry.pop("blake3", None)
            for pair in (variant["pair"] for variant in fields["variants"] if "pair" in variant):
                del pair["every_expert"]
        return fields if self.routing_rows else {name: value for name, value in fields.items() if name != "routing_rows"}

    @model_validator(mode="after")
    def belong_together(self) -> "Manifest":
        """Check that every variant has a graph for every model, and that every graph and engine is among the files."""
        for name in self.files:
            if both := next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in self.files), None):
                raise ValueError(f"{both} is a file and a folder")
        if own := next((name for name in (NAME, SIGNATURE) if name in self.files), None):
            raise ValueError(f"{own} is listed among the files that it describes")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name")
        if self.routing_rows:
            self.check_rows(names[1:])
        if wrong := [end for end in self.eos_token_ids if not 0 <= end < self.vocab_size]:
            raise ValueError(f"the end-of-sequence token {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        kinds = [(variant.target, variant.precision) for variant in self.variants]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ValueError(f"there are two variants for {twice[0]} in {twice[1]}")
        for variant in self.variants:
            pair = variant.pair
            of_models, kind = (variant.graphs, "graphs") if pair is None else (pair.factors | variant.graphs, "factors or graphs")
            expected = names if pair is None else names[1:]
            if of_models.keys() != set(expected):
                raise ValueError(f"the variant {variant.precision} has {kind} for {', '.join(of_models)} instead of {', '.join(expected)}")
            if pair is not None and (not pair.factors or pair.factors.keys() & variant.graphs.keys()):
                raise ValueError(f"the variant {variant.precision} has a graph for several models, and others for the same")
            paths = {*of_models.values(), variant.fusion_graph} | (pair.files if pair else set())
            if unknown := sorted(paths - self.files.keys()):
                raise ValueError(f"the file {unknown[0]} of the variant {variant.precision} is not among the files")
            layers = {model.name: model.layers for model in self.models if model.name in variant.graphs}
            if without := [name for name, own in variant.windows.items() if max(own.layers) >= layers.get(name, 0)]:
                raise ValueError(f"the variant {variant.precision} has windows in layers that {without[0]} has not")
            for built in variant.engines:
                if built.engines.keys() != variant.engine_graphs.keys():
                    raise ValueError(
                        f"the variant {variant.precision} has engines for {', '.join(built.engines)} instead of {', '.join(variant.engine_graphs)}"
                    )
                if unknown := sorted(set(built.engines.values()) - self.files.keys()):
                    raise ValueError(f"the engine {unknown[0]} is not among the files")
        return self

    def check_rows(self, experts: list[str]) -> None:
        """Raise ValueError unless every expert has a row, in their order, and all variants can leave rows out."""
        if len(set(self.routing_rows)) < len(self.routing_rows) or experts != [row for row in self.routing_rows if row in experts]:
            raise ValueError(f"the experts {', '.join(experts)} are not in the order of the routing rows {', '.join(self.routing_rows)}")
        if whole := next((variant for variant in self.variants if variant.pair is None), None):
            raise ValueError(f"the variant {whole.precision} has a graph per model, which needs an expert for each routing row")

    @property
    def experts(self) -> list[str]:
        """Expert names in the order of the routing head's rows."""
        return [model.name for model in self.models[1:]]

    @property
    def rows(self) -> list[str]:
        """Whom the rows of the routing head stand for: the experts, and those that were removed."""
        return self.routing_rows or self.experts

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a bundle folder, in place of an older one and its signature. Raises OSError."""
        write_manifest(folder, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check a bundle's manifest. Raises BundleError for a folder that is no bundle of this format."""
        return cls.parse(read_manifest(folder), str(folder / NAME))

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "Manifest":
        """A manifest from its text. Raises BundleError, which says `where` it was read."""
        try:
            check_json(text)
        except ValueError as error:
            raise BundleError(f"{where} does not fit the bundle format ({one_line(error)}); export the bundle again.") from error
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] != "missing" and first["loc"] == ("format",):
                raise BundleError(
                    f"{where} has the format {shown(first['input'])}, and this version reads 1 to {FORMAT}: update fusionroute, or "
                    "export the bundle again."
                ) from error
            field = ".".join(str(part)[:LONGEST] for part in first["loc"]) or "the file"
            message = first["msg"].removeprefix("Value error, ")
            raise BundleError(f"{where} does not fit the bundle format ({field}: {message}); export the bundle again.") from error
