"""ONNX Runtime's execution providers for NVIDIA GPUs: a row of the table each, and sessions that really run on them.

Options, and why (nothing is set that these sources do not speak of):

- CUDA, https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html.
  `arena_extend_strategy=kSameAsRequested`: the default, kNextPowerOfTwo, grows the arena by powers of two, of which
  weights that are loaded once leave much unused. `use_tf32=0`: the only fp32 product is the routing head, which decides
  who answers, and TF32 keeps 10 bits of its inputs. Left as they are: `gpu_mem_limit` (no budget is known here),
  `cudnn_conv_algo_search` and `prefer_nhwc` (there are no convolutions), `user_compute_stream` (every run ends with a
  wait, which orders models).
- TensorRT, https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html. `trt_profile_*_shapes`: one
  engine for every chunk; without them it is built again when a shape leaves the range seen so far. `trt_engine_cache_*`
  and `trt_timing_cache_*`: the next start loads what this one built. Cached engines are found by the graph's file name
  and structure, not by its weights (TRTGenerateId in core/providers/tensorrt/tensorrt_execution_provider_utils.h), so
  that each graph gets a folder named by its hash. `trt_fp16_enable`, `trt_bf16_enable` and `trt_int8_enable` stay off:
  the network is strongly typed only then (tensorrt_execution_provider.cc), as the graphs ask.
- TensorRT-RTX, https://nvidia.github.io/TensorRT-RTX-EP-ABI/_generated/provider-options.html: `nv_profile_*_shapes` and
  `nv_runtime_cache_path` alike.
- CUDA graphs (`enable_cuda_graph`, `trt_cuda_graph_enable`) stay off. GroupQueryAttention reads `total_sequence_length`
  on the host at every launch (contrib_ops/cuda/bert/group_query_attention.cc): a captured step would keep the first
  one. With TensorRT no shape may change between runs (https://github.com/microsoft/onnxruntime/pull/16081), and prompts
  and decoding share a session.

The package holds libraries that are looked for only when a session is made: without CUDA or cuDNN, ONNX Runtime 1.31
opens it on the CPU and only logs that (seen here), so that a session is asked for its providers. The first one is of a
tiny model: an fp16 graph on the CPU can crash the process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.runtime import cache
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.device_buffers import Place
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import UnavailableError, one_line
from fusionroute.runtime.files import cache_folder, private_folder
from fusionroute.runtime.machine import installed
from fusionroute.runtime.tensorrt.library import device_sm
from fusionroute.runtime.tensorrt.profile import profile_of, shapes

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Manifest

CUDA = "CUDAExecutionProvider"
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
NEGATION = bytes.fromhex(  # the ONNX model y = −x, float32 [1]
    "08083a320a0b0a017812017922034e65671201705a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
RANGES = ("min", "opt", "max")

# (manifest, folder for what is worth keeping) → the provider's options
Options = Callable[["Manifest", Path], dict[str, str]]
Providers = list[tuple[str, dict[str, str]]]  # names and options, the first first


def cuda_options(manifest: Manifest, cache: Path) -> dict[str, str]:
    """For CUDA."""
    return dict(CUDA_OPTIONS)


def tensorrt_options(manifest: Manifest, cache: Path) -> dict[str, str]:
    """For TensorRT."""
    engine_cache = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return engine_cache | {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)} | profile("trt", manifest)


def rtx_options(manifest: Manifest, cache: Path) -> dict[str, str]:
    """For TensorRT-RTX."""
    return {"nv_runtime_cache_path": str(cache)} | profile("nv", manifest)


def no_options(manifest: Manifest, cache: Path) -> dict[str, str]:
    """For a provider that takes none."""
    return {}


def profile(prefix: str, manifest: Manifest) -> dict[str, str]:
    """Smallest, usual and largest shape of the models' free inputs, as `input_ids:1x512,key_positions:4096,…`."""
    free = shapes(profile_of(manifest), manifest.vocab_size)
    names = ("input_ids", "key_positions", "logit_positions")
    return {
        f"{prefix}_profile_{which}_shapes": ",".join(f"{name}:{'x'.join(map(str, free[name][place]))}" for name in names)
        for place, which in enumerate(RANGES)
    }


def keep(folder: Path) -> None:
    """Create a graph's folder in the cache, or note that it is used.

    Raises UnavailableError where it cannot be created. One that exists but cannot be written to is used as it is.
    """
    if not folder.exists():
        cache.prune()
        try:
            private_folder(folder.parents[1].name)
            folder.mkdir(0o700, parents=True, exist_ok=True)  # another process may do the same now
        except OSError as error:
            raise UnavailableError(
                f"What the provider compiles cannot be kept in {folder} ({one_line(error)}): name another cache folder in XDG_CACHE_HOME."
            ) from error
    with suppress(OSError):
        cache.use(folder.parent)


@dataclass(frozen=True)
class Provider:
    """An execution provider and what the backend has to know of it.

    extra: of this package, that installs it. memory: ONNX Runtime's name of the device's memory. fallback: another
    provider for the nodes that it refuses, and for the fusion graph, whose sums in double precision TensorRT does not
    have; where that is not in the build either, the CPU does both. plugin: a module that brings the provider to an
    onnxruntime built without it. level: of graph optimisation. TensorRT must find the graph as it was exported, with
    its Q/DQ.
    """

    name: str
    extra: str
    options: Options
    memory: str = "cuda"
    fallback: str | None = None
    plugin: str | None = None
    level: str = "ORT_ENABLE_ALL"


PROVIDERS = {
    "cuda": Provider(CUDA, "gpu", cuda_options),
    "ort-tensorrt": Provider("TensorrtExecutionProvider", "gpu", tensorrt_options, fallback=CUDA, level="ORT_ENABLE_BASIC"),
    "ort-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "ort-rtx", rtx_options,
        fallback=CUDA, plugin="onnxruntime_ep_nv_tensorrt_rtx", level="ORT_ENABLE_BASIC",
    ),
}  # fmt: skip


class Opener:
    """Opens graphs on a provider.

    Raises UnavailableError where this machine lacks the package, the provider or the GPU.
    """

    def __init__(self, provider: Provider):
        self.provider = provider
        self._ort = onnxruntime = ort.package(provider.extra)
        self._built_in = onnxruntime.get_available_providers()
        if provider.name not in self._built_in and provider.plugin is None:
            raise UnavailableError(self._missing())
        if provider.memory != "cpu" and device_sm() is None:
            raise UnavailableError(f"{provider.name} needs an NVIDIA GPU and its driver, and there is none here: use device='cpu'.")
        self._devices = [] if provider.name in self._built_in else self._register()
        if CUDA in self._built_in:
            with redirect_stdout(StringIO()):  # it prints what it does not find; the session tells whether that matters
                onnxruntime.preload_dlls()  # CUDA and cuDNN where pip put them

        self._session("a model", NEGATION, [(provider.name, {}), *self._fallback()], self._devices)

    def _missing(self) -> str:
        """The sentence for a provider that this onnxruntime does not have."""
        provider, extra = self.provider, self.provider.extra
        mend = f"install the extra '{extra}' (pip install 'fusionroute[{extra}]')"
        if installed("onnxruntime") and installed("onnxruntime-gpu"):
            return f"{provider.name} is missing since the packages onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then {mend}."
        return f"This onnxruntime ({self._ort.__version__}) has no {provider.name}: uninstall it, then {mend}."

    def _register(self) -> list[Any]:
        """The devices of a provider that comes as a plugin, see
        https://nvidia.github.io/TensorRT-RTX-EP-ABI/installation.html.
        """
        provider, onnxruntime = self.provider, self._ort
        assert provider.plugin is not None
        try:
            plugin = import_module(provider.plugin)
            if all(device.ep_name != provider.name for device in onnxruntime.get_ep_devices()):
                onnxruntime.register_execution_provider_library(provider.name, plugin.get_library_path())
            devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.name]
        except ImportError as error:
            raise UnavailableError(self._missing()) from error
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise UnavailableError(
                f"ONNX Runtime {onnxruntime.__version__} cannot register {provider.name} ({one_line(error)}): use device='cpu'."
            ) from error
        if not devices:
            raise UnavailableError(f"{provider.name} finds no GPU that it runs on (RTX 30 or later): use device='cuda' or 'cpu'.")
        return devices[:1]

    def open(self, bundle: Bundle, name: str) -> Any:
        """A session of a model's graph, a path in the bundle.

        The graph's SHA-256 names the folder of what the provider keeps for the next start.
        """
        provider, manifest = self.provider, bundle.manifest
        folder = cache_folder() / "providers" / f"{provider.name}-{self._ort.__version__}" / manifest.files[name].sha256[:16]
        options = provider.options(manifest, folder)
        if str(folder) in options.values():
            keep(folder)
        return self._of_bundle(bundle, name, [(provider.name, options), *self._fallback()], self._devices)

    def place(self, session: Any) -> Place:
        """Where a session's inputs lie."""
        alone = session.get_providers() == ["CPUExecutionProvider"]
        return Place(self._ort, session, "cpu" if alone else self.provider.memory)

    def open_fusion(self, bundle: Bundle, name: str) -> Any:
        """A session of the fusion graph, a path in the bundle."""
        provider = self.provider
        own: Providers = [] if provider.fallback else [(provider.name, {})]
        return self._of_bundle(bundle, name, own or self._fallback(), [])

    def _fallback(self) -> Providers:
        name = self.provider.fallback
        return [(name, dict(CUDA_OPTIONS))] if name is not None and name in self._built_in else []

    def _of_bundle(self, bundle: Bundle, name: str, providers: Providers, devices: list[Any]) -> Any:
        """A session of a bundle's graph, of the bytes that were hashed. Raises BundleError as `Bundle.graph` does.

        ONNX Runtime tells providers the folder of the weights as the model's, in which TensorRT's parser looks for them
        (LoadModel in core/session/inference_session.cc, Compile in tensorrt_execution_provider.cc).
        """
        with bundle.graph(name) as (content, weights):
            return self._session(str(bundle.folder / name), content, providers, devices, weights)

    def _session(self, name: str, graph: bytes, providers: Providers, devices: list[Any], weights: str | None = None) -> Any:
        onnxruntime = self._ort
        settings = ort.settings(onnxruntime, 1)  # the host only computes shapes
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, self.provider.level)
        names = [name for name, _ in providers] or ["CPUExecutionProvider"]
        arguments: dict[str, Any] = {"providers": providers or names}
        try:
            if devices:
                settings.add_provider_for_devices(devices, providers[0][1])
                arguments = {}
            # without the fallback to other providers: it prints, and hides what is wrong
            session = ort.open_session(onnxruntime, graph, settings, weights, enable_fallback=0, **arguments)
        except Exception as error:
            raise UnavailableError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {name} with {names[0]} "
                f"({one_line(error)}): use device='cpu', or mend its libraries."
            ) from error
        if names[0] not in session.get_providers():
            raise UnavailableError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {names[0]}, which needs NVIDIA's libraries as its page on requirements lists "
                "them: install those, or use device='cpu'."
            )
        return session
