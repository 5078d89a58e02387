"""Vector clocks: what each stream, and the host, knows to be over."""

from __future__ import annotations

from collections import Counter


class Clock(Counter[int]):
    """Actor → how many of its steps are known to be over."""

    def knows(self, actor: int, tick: int) -> bool:
        """Whether a step of an actor is ordered before now."""
        return self[actor] >= tick

    def join(self, other: Clock) -> None:
        """Know what the other knows too."""
        for actor, tick in other.items():
            if tick > self[actor]:
                self[actor] = tick

    def copy(self) -> Clock:
        """A clock of its own."""
        return Clock(self)
