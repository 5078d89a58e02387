"""Greedy texts of the GPU equal those of the CPU; captured graphs and evicted experts do not change them."""

from typing import Any
from unittest.mock import patch

from benchmarks.gpu_check.cpu_reference import Greedy, generate_greedily, greedy_texts, prompts
from benchmarks.gpu_check.outcome import Finding, Skipped
from benchmarks.gpu_check.setup import Setup
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Variant
from fusionroute.runtime.tensorrt.device import Device, Stream
from fusionroute.runtime.tensorrt.loading import Context

NEAR_TIE = 0.01  # logits: two tokens this close may change places by rounding alone
UNLIMITED = 1 << 50  # bytes


def same_tokens(setup: Setup, variant: Variant) -> Finding:
    """Texts in fp32 are those of the CPU backend, except behind a near tie."""
    if variant.precision != "fp32":
        raise Skipped("lower precisions choose other tokens now and then: see parity")
    expected = greedy_texts(setup.folder)
    texts = generate_all(setup, variant)
    differences: list[dict[str, Any]] = []
    for prompt, text, (ids, leads) in zip(prompts(setup.folder), texts, expected, strict=True):
        if text.ids != ids:
            first = next(index for index, (own, other) in enumerate(zip(text.ids, ids, strict=True)) if own != other)
            differences.append({"prompt": prompt[:8], "token": first, "lead": leads[first]})
    largest = max((difference["lead"] for difference in differences), default=0.0)
    says = f"{len(texts) - len(differences)} of {len(texts)} texts of {len(expected[0].ids)} tokens are equal"
    says += f"; the largest lead of the CPU's token where one leaves is {largest:.2g} logits" if differences else ""
    return Finding(largest <= NEAR_TIE, says, {"apart": differences})


def graph_replay(setup: Setup, variant: Variant) -> Finding:
    """Captured graphs are used, and give the tokens that the same engines give without them."""
    launches = 0
    launch = Stream.launch

    def count_launch(stream: Stream, graph: Any) -> None:
        nonlocal launches
        launches += 1
        launch(stream, graph)

    with patch.object(Stream, "launch", count_launch):
        captured = generate_all(setup, variant)
    with patch.object(Context, "capturable", lambda *_: False):
        plain = generate_all(setup, variant)
    equal = count_equal(captured, plain)
    says = f"{launches} launches of captured graphs, {equal} of {len(plain)} texts as without them"
    return Finding(launches > 0 and equal == len(plain), says, {"launches": launches, "equal": equal})


def eviction(setup: Setup, variant: Variant) -> Finding:
    """With device memory for one expert the tokens are the same."""
    try:
        with setup.runtime(variant.precision, UNLIMITED) as runtime:
            sizes = {name: device_bytes(model) for name, model in zip(runtime.expert_names, runtime.backend.experts, strict=True)}
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    budget = max(sizes.values())
    expected, without = generate_in_memory(setup, variant, None)
    texts, taken = generate_in_memory(setup, variant, budget)
    equal = count_equal(texts, expected)
    used = len({name for text in expected for name in text.experts})
    says = (
        f"with {budget / 1e6:.1f} MB for one expert's weights, {equal} of {len(texts)} texts from {used} experts are as without a limit, "
        f"in {taken / 1e6:.1f} MB of device memory instead of {without / 1e6:.1f}"
    )
    figures = {"weights": sizes, "device_memory": taken, "device_memory_without": without, "experts_used": used}
    return Finding(equal == len(texts), says, figures)


def generate_all(setup: Setup, variant: Variant) -> list[Greedy]:
    """The greedy text of every prompt."""
    with setup.runtime(variant.precision) as runtime:
        return [generate_greedily(runtime, prompt) for prompt in prompts(setup.folder)]


def generate_in_memory(setup: Setup, variant: Variant, expert_memory: int | None) -> tuple[list[Greedy], int]:
    """The greedy text of every prompt under a limit in bytes, and the device memory in bytes that the runtime takes."""
    device = Device()
    free = device.free_memory()
    with setup.runtime(variant.precision, expert_memory) as runtime:
        return [generate_greedily(runtime, prompt) for prompt in prompts(setup.folder)], free - device.free_memory()


def count_equal(texts: list[Greedy], others: list[Greedy]) -> int:
    """How many texts are equal, tokens and experts."""
    return sum(text == other for text, other in zip(texts, others, strict=True))


def device_bytes(model: Any) -> int:
    """Bytes of an expert's weights on the device."""
    return int(model.weights.size)
