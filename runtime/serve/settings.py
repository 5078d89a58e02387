"""How a server listens, and what it bounds."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import psutil

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import Manifest

MOST_SESSIONS = 16  # unless told otherwise


@dataclass(frozen=True)
class Settings:
    """sessions: texts at once. queue: requests that wait beside them. body_bytes: of a request. seconds: a request may
    take, waiting included. drain_seconds: requests may go on after SIGTERM. cors: origins that browsers may call from.

    Raises InputError for a host beyond this machine without a key.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    insecure: bool = False
    cors: tuple[str, ...] = ()
    sessions: int = 1
    queue: int = 64
    body_bytes: int = 4 << 20
    seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.loopback and not self.api_key and not self.insecure:
            raise InputError(
                f"{self.host} is reached from other machines: give a key with --api-key or FUSIONROUTE_API_KEY, or say --insecure."
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def session_bytes(manifest: Manifest, precision: str) -> int:
    """Keys and values of all models for one text of the full context."""
    variants = [variant for variant in manifest.variants if variant.precision == precision]
    return max(sum(map(variant.kv_bytes_per_token, manifest.models)) for variant in variants) * manifest.max_seq_len


def kv_budget(given: int | None, sessions: int | None) -> int | None:
    """Bytes of keys and values that texts take at most, see `kv_memory` of `FusionRuntime.load`.

    By default half of what is free now; None, no bound, where only the number of texts was given.
    """
    return given if given or sessions else int(psutil.virtual_memory().available) // 2


def sessions_within(budget: int | None, each: int, most: int | None = None) -> int:
    """How many texts at once fit a budget in bytes, at least one: finished ones that are kept make room for them."""
    count = 1 if budget is None else max(1, budget // each)
    return count if most is None else min(most, count)
