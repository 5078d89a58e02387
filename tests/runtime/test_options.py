"""Options: bad ones are refused in one sentence before any work; other spellings of a value are taken."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.options import RuntimeOptions

BAD = {
    "empty prompt": ({"prompt": []}, InputError, "empty"),
    "prompt of the wrong kind": ({"prompt": [1.5]}, InputError, "str, a list of token ids, or a list of"),
    "prompt longer than the context": ({"prompt": [5] * 5000}, InputError, r"5000 tokens.*context of \d+.*shorten it"),
    "token outside the vocabulary": ({"prompt": [10**6]}, InputError, "Token id 1000000 is outside the vocabulary"),
    "negative token": ({"prompt": [3, -1]}, InputError, "Token id -1 is outside"),
    "temperature": ({"prompt": "a", "temperature": -1.0}, InputError, "temperature is -1.0"),
    "top-p": ({"prompt": "a", "top_p": 1.5}, InputError, "top_p is 1.5"),
    "unknown option": ({"prompt": "a", "temprature": 1.0}, InputError, "temprature"),
    "fusion": ({"prompt": "a", "fusion": "sum"}, InputError, "Unknown fusion 'sum'"),
    "lambda": ({"prompt": "a", "lam": 1.5}, InputError, "lam=1.5 is out of range"),
    "expert": ({"prompt": "a", "expert": "history"}, InputError, "Unknown expert 'history': use one of expert0, expert1"),
    "max_new_tokens": ({"prompt": "a", "max_new_tokens": 0}, InputError, "max_new_tokens=0"),
    "stop": ({"prompt": "a", "stop": ""}, InputError, "stop string"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_sentence(name: str, bundles: list[Path]) -> None:
    arguments, kind, sentence = BAD[name]
    with FusionRuntime.load(bundles[0]) as rt, pytest.raises(kind, match=sentence) as caught:
        rt.generate(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bad_sessions_and_scores(rt: FusionRuntime) -> None:
    session = rt.session()
    with pytest.raises(InputError, match="Unknown expert 'history'"):
        rt.session(expert="history")
    with pytest.raises(InputError, match="holds no tokens"):
        session.step()
    with pytest.raises(InputError, match="Unknown option temprature"):
        session.step(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="Cannot rewind to 3 tokens"):
        session.rewind(3)
    with pytest.raises(InputError, match=r"Position 9 is outside the 2 tokens"):
        rt.score([3, 4], positions=[9])
    session.append([3] * rt.max_seq_len)
    with pytest.raises(InputError, match="is full"):
        session.step()


LOADS = {
    "precision": ({"precision": "int2"}, UnavailableError, "no precision 'int2'.*--precision int2"),
    "device": ({"device": "tpu"}, InputError, "Unknown device 'tpu'"),
    "backend": ({"device": "cuda"}, UnavailableError, "no graphs for ort:cuda"),
    "threads": ({"threads": 0}, InputError, "threads=0"),
    "lambda": ({"lam": -0.1}, InputError, "lam=-0.1"),
}


@pytest.mark.parametrize("name", LOADS)
def test_bad_loads(name: str, bundles: list[Path]) -> None:
    arguments, kind, sentence = LOADS[name]
    with pytest.raises(kind, match=sentence):
        FusionRuntime.load(bundles[0], **arguments)  # type: ignore[arg-type]


REFUSED: dict[str, dict[str, Any]] = {
    "λ above 1": {"lam": 2},
    "λ that is no number": {"lam": "half"},
    "λ that is not a number": {"lam": float("nan")},
    "fusion": {"fusion": "sum"},
    "fusions": {"fusion": np.array(["weighted", "additive"])},
    "device": {"device": "nonsense"},
    "catch_up": {"catch_up": "eager"},
    "speculation": {"speculation": "on"},
    "no threads": {"threads": 0},
    "threads in parts": {"threads": 1.5},
    "threads as an answer": {"threads": True},
    "prefix_cache": {"prefix_cache": -1},
    "prefix_cache in parts": {"prefix_cache": 0.5},
    "expert_memory": {"expert_memory": 0},
    "endless expert_memory": {"expert_memory": float("inf")},
    "background with expert_memory": {"catch_up": "background", "expert_memory": 1 << 30},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_are_refused_before_anything_is_opened(name: str, tmp_path: Path) -> None:
    """The folder does not exist, which only whoever opens it can tell."""
    option = next(iter(REFUSED[name]))
    with pytest.raises(InputError, match=option) as caught:
        FusionRuntime.load(tmp_path / "nothing", **REFUSED[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("prefix_cache", False, 0),
        ("prefix_cache", True, 1),
        ("prefix_cache", np.int64(3), 3),
        ("threads", 2.0, 2),
        ("threads", np.int32(2), 2),
        ("threads", np.float32(2), 2),
        ("expert_memory", 1e9, 10**9),
        ("fusion", "", None),
    ],
)
def test_options_take_other_spellings_of_a_value(name: str, value: Any, expected: int | None) -> None:
    taken = getattr(RuntimeOptions(**{name: value}), name)
    assert taken == expected and type(taken) is type(expected)


def test_the_options_of_load_stand_in_one_place() -> None:
    parameters = dict(inspect.signature(FusionRuntime.load).parameters)
    for name in ("bundle", "verify", "verify_key", "trusted"):
        del parameters[name]
    assert {name: parameter.default for name, parameter in parameters.items()} == asdict(RuntimeOptions())
