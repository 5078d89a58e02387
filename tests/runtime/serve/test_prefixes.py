"""Requests that begin alike read their beginning once."""

from tests.support.server import Served, wait_until


def test_a_second_request_reads_what_is_new(server: Served, router_reads: list[int]) -> None:
    ids, counts = [5 + number % 90 for number in range(400)], []
    for ending in ([7, 8, 9], [9, 8, 7], [9, 8, 7, 6]):
        router_reads.clear()
        answer = server.complete([*ids, *ending], temperature=0, max_tokens=1, ignore_eos=True)
        assert answer.json()["usage"]["prompt_tokens"] == 400 + len(ending)
        wait_until(lambda: server.idle)
        counts.append(sum(router_reads))
    assert counts[0] >= 400 and max(counts[1:]) < 12
