"""Sessions whose router says something else, for measurements that need a certain routing or wrong drafts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import Output


@contextmanager
def router_outputs(runtime: FusionRuntime, change: Callable[[Output], Output]) -> Iterator[None]:
    """Sessions that start here get the router's outputs as `change` returns them.

    Load the runtime with `prefix_cache=0`.
    """
    router = runtime.backend.router
    new_cache = router.cache

    def changed_cache() -> Any:
        cache = new_cache()
        forward = cache.forward

        def changed_forward(ids: Sequence[int], positions: Sequence[int]) -> Output:
            return change(forward(ids, positions))

        cache.forward = changed_forward  # type: ignore[method-assign]
        return cache

    with patch.object(router, "cache", changed_cache):
        yield
