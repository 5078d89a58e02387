"""Engines of a bundle, loaded by TensorRT or TensorRT-RTX: two modules with the same API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, FusionError, UnavailableError, one_line
from fusionroute.runtime.tensorrt.device import Device, Memory, Stream
from fusionroute.runtime.tensorrt.engines import fitting
from fusionroute.runtime.tensorrt.library import load

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Variant

BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2}


class Loader:
    """The engines of one variant that fit this machine's library and GPU.

    Raises UnavailableError where the library is missing or no engine fits, BundleError for an engine that was changed.
    """

    def __init__(self, bundle: Bundle, variant: Variant, flavour: str, device: Device):
        self._api = load(flavour)
        self._bundle = bundle
        self._built = fitting(bundle.folder, variant, flavour, str(self._api.__version__), device.sm)
        self.profile = self._built.profile
        self._mend = f"rebuild it with: fusionroute build {bundle.folder} --precision {variant.precision}"
        self._log = logger(self._api)
        self._runtime = self._api.Runtime(self._log)

    def load(self, name: str) -> Engine:
        """Deserialise the engine of a model, or the fusion graph's.

        Engines are native code, so their bytes are hashed first.
        """
        path = self._built.engines[name]
        try:
            content = self._bundle.read(path)
        except BundleError as error:
            raise BundleError(f"{str(error).rstrip('.')}; {self._mend}.") from error
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BundleError(
                f"{self._api.__name__} {self._api.__version__} cannot load {self._bundle.folder / path} ({self._log.last}); {self._mend}."
            )
        return Engine(self._api, engine, name, self._log)


def logger(api: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps the last error, for the sentence that is raised."""

    class Log(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.last = "it gives no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR):
                self.last = " ".join(message.split())

    return Log()


class Engine:
    """A deserialised engine: its tensors, and contexts to run it in."""

    def __init__(self, api: Any, engine: Any, name: str, log: Any):
        self.name, self._api, self._engine, self._log = name, api, engine, log
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self.shapes: dict[str, tuple[int, ...]] = {tensor: tuple(engine.get_tensor_shape(tensor)) for tensor in names}
        self.types: dict[str, str] = {tensor: engine.get_tensor_dtype(tensor).name for tensor in names}
        self.on_host = {tensor for tensor in names if engine.get_tensor_location(tensor) == api.TensorLocation.HOST}
        self.scratch = int(engine.device_memory_size_v2)

    def context(self, scratch: Memory, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Context:
        """A context with tensor addresses and input shapes set.

        Its working memory is `scratch`, of at least `self.scratch` bytes.
        """
        context = self._engine.create_execution_context(self._api.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise FusionError(f"TensorRT cannot make an execution context for {self.name} ({self._log.last}); free device memory.")
        context.set_device_memory(scratch.address, scratch.size)
        wrapped = Context(self.name, context, self._log)
        wrapped.bind(addresses)
        wrapped.shape(shapes)
        return wrapped

    def weights(self) -> Weights:
        """The weights, which can be evicted and restored. Raises UnavailableError where TensorRT cannot do that."""
        make = getattr(self._engine, "create_weights_manager", None)
        manager = make() if make else None
        if manager is None:
            raise UnavailableError(
                f"This {self._api.__name__} cannot evict the weights of {self.name}: load the bundle without a limit on the experts' memory."
            )
        return Weights(self.name, manager, self._api.TensorLocation.HOST, self._log)


class Context:
    """An execution context. After a graph was captured from it, it must not change."""

    def __init__(self, name: str, context: Any, log: Any):
        self._name, self._context, self._log = name, context, log

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set tensor addresses."""
        for tensor, address in addresses.items():
            checked(self._context.set_tensor_address(tensor, address), f"bind {tensor} of {self._name}", self._log)

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set input shapes."""
        for tensor, shape in shapes.items():
            checked(self._context.set_input_shape(tensor, shape), f"give {tensor} of {self._name} the shape {shape}", self._log)

    def run(self, stream: Stream) -> None:
        """Queue the engine."""
        checked(self._context.execute_async_v3(int(stream)), f"run {self._name}", self._log)

    def capturable(self, stream: Stream) -> bool:
        """Whether a CUDA graph may be captured now.

        TensorRT-RTX can be asked; TensorRT cannot, and always allows it.
        """
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(int(stream)))


class Weights:
    """An engine's weights, which may be evicted: contexts, captured graphs and virtual addresses stay valid."""

    def __init__(self, name: str, manager: Any, host: Any, log: Any):
        self._name, self._manager, self._host, self._log = name, manager, host, log
        self.size = int(manager.get_size())

    def save(self, memory: Memory, stream: Stream) -> None:
        """Copy them to pinned memory."""
        done = self._manager.save_to_buffer(memory.address, self.size, self._host, int(stream))
        checked(done, f"save the weights of {self._name}", self._log)

    def unload(self, stream: Stream) -> None:
        """Free their device memory, once `stream` has done its work."""
        checked(self._manager.unload(int(stream)), f"unload the weights of {self._name}", self._log)

    def restore(self, memory: Memory, stream: Stream) -> None:
        """Copy them back from pinned memory, on `stream`."""
        done = self._manager.restore_from_buffer(memory.address, self.size, self._host, int(stream))
        checked(done, f"bring back the weights of {self._name}", self._log)


def checked(done: bool, what: str, log: Any) -> None:
    """Raise FusionError where a call of TensorRT returned False."""
    if not done:
        raise FusionError(f"TensorRT cannot {what} ({one_line(Exception(log.last))}); build the engines again.")
