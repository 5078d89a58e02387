"""Where the time of a decoding step goes on the GPU, kernel by kernel, as CUPTI tells it through torch."""

from importlib import import_module
from pathlib import Path

from benchmarks.gpu_check.outcome import Finding, Skipped
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import UnavailableError

STEPS, WARM_UP, SHOWN = 16, 8, 12


def profile(folder: Path, precision: str) -> Finding:
    """The longest kernels of STEPS steps of a bundle on ONNX Runtime's CUDA provider."""
    torch = import_module("torch")
    if not torch.cuda.is_available():
        raise Skipped("torch sees no GPU here, and the profiler comes with it")
    try:
        runtime = FusionRuntime.load(folder, precision, "cuda")
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    with runtime:
        session = runtime.session()
        session.append([1, 2, 3])
        for _ in range(WARM_UP):
            session.step()
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
            for _ in range(STEPS):
                session.step()
            torch.cuda.synchronize()
    totals = {event.key: (event.self_device_time_total, event.count) for event in profiler.key_averages() if event.self_device_time_total}
    if not totals:
        raise Skipped("the profiler saw no kernels: another tool may hold CUPTI, or counters are not permitted")
    whole = sum(time for time, _ in totals.values())
    longest = sorted(totals.items(), key=lambda entry: -entry[1][0])[:SHOWN]
    rows = [
        {"kernel": name, "share": time / whole, "microseconds_per_step": time / STEPS, "calls_per_step": count / STEPS}
        for name, (time, count) in longest
    ]
    first = ", ".join(f"{row['kernel'][:60]} {row['share']:.0%}" for row in rows[:3])
    says = f"{whole / STEPS / 1e3:.3f} ms of kernels in a step, {sum(count for _, count in totals.values()) / STEPS:.0f} launches; {first}"
    return Finding(True, says, {"kernels": rows, "microseconds_per_step": whole / STEPS})
