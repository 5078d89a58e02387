"""Many mixed requests to two runtimes in one process, and what of the memory grows:
`python -m benchmarks.soak BUNDLE [--requests 5000] [--warm-up 1500] [--every 500]`.

15 kinds of request, with texts of random lengths: greedy, sampled, penalised, pinned to an expert, one model alone,
stopped by a string, cancelled before and while it runs, late, dropped, scored, chats, sessions that rewind, texts that
begin alike, and wrong arguments. One runtime drafts and reads ahead in the background, the other does neither.

Prints, every so many requests: resident memory of its own, what malloc has handed out in small pieces and in large ones
(whole mappings), what it keeps for later, objects that the garbage collector tracks, and Python's own memory where
`--trace` asks for it (it takes twice the time). Resident memory that grows while nothing that is handed out does is pages
of buffers that were touched for the first time (KV caches are handed out whole), or room between pieces.
"""

import argparse
import contextlib
import ctypes
import gc
import random
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from fusionroute.runtime import FusionError, FusionRuntime
from fusionroute.runtime.process_memory import resident

Request = Callable[[FusionRuntime, random.Random], object]


class Mallinfo(ctypes.Structure):
    """`mallinfo2` of glibc ≥ 2.33: bytes, but for counts."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]  # fmt: skip


def malloc() -> tuple[int, int, int]:
    """Bytes handed out in small pieces, and as whole mappings; bytes that are kept for later. Zeros without glibc."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0, 0, 0
    ask.restype = Mallinfo
    info = ask()
    return info.uordblks, info.hblkhd, info.fordblks


def prompt(rt: FusionRuntime, draw: random.Random) -> list[int]:
    """Ids of a random length, up to half of the context."""
    return [draw.randrange(5, rt.vocab_size) for _ in range(draw.randint(1, min(200, rt.max_seq_len // 2)))]


def cancelled_before(rt: FusionRuntime, draw: random.Random) -> None:
    """Its event is set already."""
    cancel = threading.Event()
    cancel.set()
    rt.generate(prompt(rt, draw), 8, cancel=cancel)


def cancelled_while(rt: FusionRuntime, draw: random.Random) -> None:
    """Another thread sets its event."""
    cancel = threading.Event()
    timer = threading.Timer(0.005, cancel.set)
    timer.start()
    rt.generate(prompt(rt, draw), 16, cancel=cancel)
    timer.join()


def dropped(rt: FusionRuntime, draw: random.Random) -> None:
    """A stream that nobody reads to its end, and one that nobody begins."""
    next(rt.stream(prompt(rt, draw), 8), None)
    rt.stream(prompt(rt, draw), 8)


def rewound(rt: FusionRuntime, draw: random.Random) -> None:
    """A session that goes back and on."""
    session = rt.session()
    session.append(prompt(rt, draw))
    session.steps(6)
    session.rewind(draw.randint(0, len(session)))
    session.append([draw.randrange(5, 60)])
    session.step()


def alike(rt: FusionRuntime, draw: random.Random) -> None:
    """Two texts that begin alike."""
    ids = [7, 8, 9] * 15
    rt.generate([*ids, draw.randrange(5, 60)], 4)
    rt.generate([*ids, draw.randrange(5, 60)], 4)


def wrong(rt: FusionRuntime, draw: random.Random) -> None:
    """Arguments that are refused."""
    for ids, options in (([-1], {}), ([rt.vocab_size], {}), ([5], {"temperature": -1.0}), ([5] * (rt.max_seq_len + 1), {})):
        with contextlib.suppress(FusionError):
            rt.generate(ids, 4, **options)  # type: ignore[arg-type]


def chat(rt: FusionRuntime, draw: random.Random) -> None:
    """Text, through the template where there is one."""
    with contextlib.suppress(FusionError):
        rt.generate([{"role": "user", "content": f"{draw.randrange(99)}+{draw.randrange(99)}="}], 6)


def chat_and_wrong(rt: FusionRuntime, draw: random.Random) -> None:
    """One after the other."""
    chat(rt, draw)
    wrong(rt, draw)


KINDS: dict[str, Request] = {
    "greedy": lambda rt, draw: rt.generate(prompt(rt, draw), 8),
    "sampled": lambda rt, draw: rt.generate(prompt(rt, draw), 8, temperature=0.8, top_p=0.9, seed=draw.randrange(99)),
    "top-k": lambda rt, draw: rt.generate(prompt(rt, draw), 8, temperature=1.1, top_k=5, min_p=0.01, seed=draw.randrange(99)),
    "penalised": lambda rt, draw: rt.generate(prompt(rt, draw), 8, repetition_penalty=1.2),
    "pinned": lambda rt, draw: rt.generate(prompt(rt, draw), 8, expert=draw.choice(rt.expert_names)),
    "router alone": lambda rt, draw: rt.generate(prompt(rt, draw), 8, lam=1.0),
    "stopped": lambda rt, draw: rt.generate("12+30=" if rt.tokenizer else [5, 6], 8, stop=["4", "zz"] if rt.tokenizer else ()),
    "cancelled before": cancelled_before,
    "cancelled while it runs": cancelled_while,
    "late": lambda rt, draw: rt.generate(prompt(rt, draw), 32, deadline=0.003),
    "dropped": dropped,
    "scored": lambda rt, draw: rt.score(prompt(rt, draw), positions=[0]),
    "rewound": rewound,
    "alike": alike,
    "chat and wrong arguments": chat_and_wrong,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--warm-up", type=int, default=1500)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--trim", action="store_true", help="let malloc give back what it keeps, before each look")
    given = parser.parse_args()
    draw, warm = random.Random(0), 0.0
    if given.trace:
        tracemalloc.start()
    start = time.monotonic()
    with (
        FusionRuntime.load(given.bundle, given.precision, "cpu", threads=1) as plain,
        FusionRuntime.load(given.bundle, given.precision, "cpu", threads=1, speculation="auto", catch_up="background") as drafting,
    ):
        print(f"{len(KINDS)} kinds of request; MB\nrequests  resident    small   mapped     kept  objects   Python  seconds")
        for number in range(given.requests + 1):
            if number % given.every == 0 or number == given.warm_up:
                gc.collect()
                if given.trim:
                    ctypes.CDLL(None).malloc_trim(0)
                own, (small, mapped, spare), traced = resident().anonymous, malloc(), tracemalloc.get_traced_memory()[0]
                warm = own if number == given.warm_up else warm
                sizes = " ".join(f"{size / 1e6:8.2f}" for size in (own, small, mapped, spare))
                growth = f"  {own / warm - 1:+.2%} since the warm-up" if number > given.warm_up else ""
                print(
                    f"{number:8}  {sizes} {len(gc.get_objects()):8} {traced / 1e6:8.2f} {time.monotonic() - start:8.0f}{growth}", flush=True
                )
            draw.choice([*KINDS.values()])(draw.choice([plain, drafting]), draw)


if __name__ == "__main__":
    main()
