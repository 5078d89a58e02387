"""Requests that begin alike read their beginning once."""

from typing import Any

import pytest

from fusionroute.runtime.backends.ort_cpu import OrtCache
from tests.support.server import Served, wait_until


def test_a_second_request_reads_what_is_new(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forward = OrtCache.forward

    def noted(self: OrtCache, ids: Any, positions: Any) -> Any:
        if self._model.model.name == "router":
            read.append(len(ids))
        return forward(self, ids, positions)

    monkeypatch.setattr(OrtCache, "forward", noted)
    ids, counts = [5 + number % 90 for number in range(400)], []
    for ending in ([7, 8, 9], [9, 8, 7], [9, 8, 7, 6]):
        read.clear()
        answer = server.complete([*ids, *ending], temperature=0, max_tokens=1, ignore_eos=True)
        assert answer.json()["usage"]["prompt_tokens"] == 400 + len(ending)
        wait_until(lambda: server.idle)
        counts.append(sum(read))
    assert counts[0] >= 400 and max(counts[1:]) < 12
