"""The caches of models that share one base: each reads in passes of the router's text and an expert's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fusionroute.runtime.backend import Segment

IDLE = Segment((0,), ())  # of a model that does not read: neither text of a pass may be empty


class JointPasses(Protocol):
    """What is bound for the passes of two texts."""

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int]) -> tuple[Any, Any]:
        """One pass of the router's segment and the expert's behind so many tokens: an output of each. That of an idle model
        means nothing.
        """
        ...


class JointCache:
    """One model's keys and values for one session (see `runtime.backend.Cache`), and the passes that write them."""

    def __init__(self, is_expert: bool):
        self.length, self._is_expert = 0, is_expert
        self._alone: JointPasses | None = None
        self._beside: tuple[JointCache, JointPasses] | None = None

    def bind(self, router: Any) -> JointPasses:
        """The passes of an expert beside the router, whose cache is given; None: those in which the other one is idle."""
        raise NotImplementedError

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Any:
        """See `runtime.backend.Cache.forward`."""
        self._alone = self._alone or self.bind(None)
        segment = Segment(ids, positions)
        if self._is_expert:
            _, output = self._alone.run((IDLE, segment), (0, self.length))
        else:
            output, _ = self._alone.run((segment, IDLE), (self.length, 0))
        self.length += len(ids)
        return output

    def beside(self, router: JointCache) -> JointPasses:
        """The passes that an expert's cache shares with the router's, bound once."""
        if self._beside is None or self._beside[0] is not router:
            self._beside = router, self.bind(router)
        return self._beside[1]


def read_both(router: JointCache, own: Segment, expert: JointCache, other: Segment) -> tuple[Any, Any]:
    """See `runtime.backend.Backend.forward_both`."""
    outputs = expert.beside(router).run((own, other), (router.length, expert.length))
    router.length += len(own.ids)
    expert.length += len(other.ids)
    return outputs
