"""Which models run: an expert that is not chosen never does, a pinned one answers every token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.ort_cpu import OrtCache

PROMPT = "12+30= and more"


def test_an_expert_that_is_not_chosen_never_runs(rt: FusionRuntime) -> None:
    session = rt.session()
    session.append(rt.encode(PROMPT))
    total = len(session)
    first = session.step()
    for name, lag in session.lags.items():
        assert lag == (1 if name == first.expert else total + 1)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the models that run from now on."""
    names: set[str] = set()
    forward = OrtCache.forward

    def noted(cache: OrtCache, *arguments: Any) -> Any:
        names.add(cache._model.model.name)
        return forward(cache, *arguments)

    monkeypatch.setattr(OrtCache, "forward", noted)
    return names


def test_a_pinned_expert_answers_every_token(rt: FusionRuntime) -> None:
    ids, free = rt.encode(PROMPT), rt.generate(PROMPT, 24)
    for name in rt.expert_names:
        pinned = rt.generate(PROMPT, 24, expert=name)
        assert set(pinned.experts) == {name}
        session = rt.session(expert=name)
        session.append(ids)
        assert [session.step().id for _ in pinned.token_ids] == pinned.token_ids
        assert session.lags == {other: 1 if other == name else len(session) for other in rt.expert_names}
        if set(free.experts) == {name}:
            assert pinned.token_ids == free.token_ids
    assert len({tuple(rt.generate(PROMPT, 24, expert=name).token_ids) for name in rt.expert_names}) == len(rt.expert_names)


def test_models_without_a_say_do_not_run(bundles: list[Path], ran: set[str]) -> None:
    """What remains is the logits of one model alone, which a model that reads the whole text anew gives too."""
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        ids, name = rt.encode(PROMPT), rt.expert_names[1]
        tokens = list(rt.stream(PROMPT, 8, lam=1.0))
        pinned = rt.generate(PROMPT, 8, lam=1.0, expert=name)
        rt.score(ids, lam=1.0)
        assert ran == {"router"}
        assert all(token.expert == rt.expert_names[int(token.routing.argmax())] for token in tokens)
        assert pinned.token_ids == [token.id for token in tokens] and set(pinned.experts) == {name}
        assert pinned.token_ids == anew(rt.backend.router, ids, 8)
        for number, name in enumerate(rt.expert_names):
            ran.clear()
            tokens = list(rt.stream(PROMPT, 8, lam=0.0, expert=name))
            assert ran == {name}
            assert [token.id for token in tokens] == anew(rt.backend.experts[number], ids, 8)
            assert all(np.isnan(token.routing).all() and token.routing.shape == (len(rt.expert_names),) for token in tokens)
        # both have a say
        for options in ({"lam": 0.0}, {"lam": 0.0, "expert": name, "fusion": "additive"}, {"expert": name}):
            ran.clear()
            rt.generate(PROMPT, 8, **options)
            assert "router" in ran and len(ran) > 1


def anew(model: Any, ids: list[int], count: int) -> list[int]:
    """Greedy tokens of one model that reads the whole text at every step."""
    tokens: list[int] = []
    for _ in range(count):
        text = [*ids, *tokens]
        tokens.append(int(model.cache().forward(text, (len(text) - 1,)).logits[0].argmax()))
    return tokens


def test_the_router_reads_what_it_missed(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        session, fresh = (rt.session(expert=rt.expert_names[0]) for _ in range(2))
        session.append(rt.encode(PROMPT))
        for _ in range(5):
            session.step(lam=0.0)
        fresh.append(session.token_ids)
        late, early = session.step(lam=0.5), fresh.step(lam=0.5)
        assert late.id == early.id and np.allclose(late.routing, early.routing, atol=1e-4) and late.logprob == pytest.approx(early.logprob)
