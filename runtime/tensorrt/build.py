"""Build one engine from one graph, with TensorRT or TensorRT-RTX."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import FusionError, one_line
from fusionroute.runtime.files import cache_folder, locked, private_folder
from fusionroute.runtime.tensorrt.library import NAMES, capabilities, load
from fusionroute.runtime.tensorrt.operators import check
from fusionroute.runtime.tensorrt.profile import Shapes

Advance = Callable[[float], None]
LAYER = re.compile(r"\[(?:NODE|ONNX Layer): ?([^\]]+)\]|\{ForeignNode\[([^\]]+)\]\}|[Nn]ode ['\"]?([\w./:-]+)")


def build(
    graph: Path,
    content: bytes,
    engine: Path,
    flavour: str,
    profile: Mapping[str, Shapes],
    sms: tuple[int, ...] = (),
    operators: Iterable[str] = (),
    workspace: int | None = None,
    advance: Advance = lambda _: None,
) -> None:
    """Write `engine` from the content of an ONNX file. `graph`: its path, beside which its weights may lie.

    `profile` gives the shapes of every input that has a free dimension (of a shape input, its values). `sms` are the
    compute capabilities (86 for SM86) that TensorRT-RTX builds for; TensorRT builds for the GPU it runs on. `operators`
    are those of the graph, checked before anything is built. `workspace`: bytes of device memory that layers may use
    beside their tensors. `advance` is called with the shares of the work as they are done; they sum to 1. Raises
    FusionError subclasses, with the layer where the library names it, and OSError.
    """
    library = load(flavour)
    log = logger(library)
    builder = library.Builder(log)
    # TensorRT 10 builds weakly typed networks unless this is set; newer versions build no others
    flags = library.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = library.OnnxParser(network, log)
    check(operators, parser, flavour, library.__version__)
    if not parser.parse(content, str(graph)):
        raise FusionError(
            f"{NAMES[flavour]} {library.__version__} cannot read {graph.name} ({unread(parser) or log.last}); export it again."
        )
    config = builder.create_builder_config()
    if flavour == "rtx":
        targets = capabilities(library, sms)
        config.num_compute_capabilities = len(targets)
        for place, capability in enumerate(targets):
            config.set_compute_capability(capability, place)
    if workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, workspace)
    config.progress_monitor = progress(library, advance)
    shapes = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        value = network.get_input(place)
        if value.is_shape_tensor:
            shapes.set_shape_input(value.name, *profile[value.name])
        elif -1 in tuple(value.shape):
            shapes.set_shape(value.name, *profile[value.name])
    config.add_optimization_profile(shapes)
    with build_lock("build.lock"):  # each build may take all of the machine's memory
        serialised = builder.build_serialized_network(network, config)
    config.progress_monitor.check()
    if serialised is None:
        raise FusionError(f"{NAMES[flavour]} {library.__version__} cannot build {graph.name} ({log.last or 'it does not say why'}).")
    engine.write_bytes(memoryview(serialised))


def unread(parser: Any) -> str | None:
    """A parser's error about the first node that it cannot read; None without one."""
    if not parser.num_errors:
        return None
    error = parser.get_error(0)
    name = f"{error.node_operator()} '{error.node_name()}': " if error.node_name() else ""
    return name + " ".join(error.desc().split())


def logger(library: Any) -> Any:
    """A logger that prints nothing and keeps the first error, for the sentence that is raised."""

    class Log(library.ILogger):
        last = ""

        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR) and not self.last:
                self.last = told(message)

    return Log()


def told(message: str) -> str:
    """A library's error, shortened: the layer, where it names one, and at most 300 characters."""
    text = " ".join(message.split())
    layer = next((name for names in LAYER.findall(text) for name in names if name), None)
    text = re.sub(r"^\S*::\S+: Error Code \d+: ", "", text)
    short = text if len(text) <= 300 else text[:297] + "..."
    return f"layer {layer}: {short}" if layer and layer not in short[: len(layer) + 20] else short


def progress(library: Any, advance: Advance) -> Any:
    """A progress monitor that follows the outermost phases.

    What `advance` raises ends the build and is raised by `check`.
    """

    class Monitor(library.IProgressMonitor):
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.done = 0.0
            self.raised: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (parent, max(1, steps))

        def step_complete(self, name: str, step: int) -> bool:
            parent, steps = self.phases.get(name, (None, 1))
            if parent is None and self.raised is None:
                self._to((step + 1) / steps)
            return self.raised is None

        def phase_finish(self, name: str) -> None:
            parent, _ = self.phases.pop(name, (None, 1))
            if parent is None:
                self._to(1.0)

        def _to(self, share: float) -> None:
            try:
                if share > self.done:
                    advance(share - self.done)
                    self.done = share
            except BaseException as error:  # the library would swallow it
                self.raised = error

        def check(self) -> None:
            if self.raised is not None:
                raise self.raised

    return Monitor()


@contextlib.contextmanager
def build_lock(name: str) -> Iterator[None]:
    """Hold a lock of the cache folder, which builds of this user on this machine wait for.

    Raises FusionError where it cannot be created.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(private_folder(str(Path(name).parent)) / Path(name).name))
        except OSError as error:
            raise FusionError(
                f"The lock for builds cannot be made in {cache_folder()} ({one_line(error)}): name another with XDG_CACHE_HOME."
            ) from error
        yield
