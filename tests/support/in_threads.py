"""Several threads that generate with one runtime at the same time."""

from collections.abc import Sequence
from threading import Thread

from fusionroute.runtime import FusionRuntime


def generated_together(rt: FusionRuntime, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The token ids behind each prompt, each from a thread of its own."""
    texts: dict[int, list[int]] = {}

    def work(number: int) -> None:
        texts[number] = rt.generate(prompts[number], tokens).token_ids

    workers = [Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [texts[number] for number in range(len(prompts))]
