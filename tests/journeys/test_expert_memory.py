"""A system whose experts exceed the budget: resident memory stays within 5 % of it, and the text is the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.exporting import export_system
from tests.support.systems import Shape

pytestmark = pytest.mark.slow

PROGRAM = """
import gc, json, sys
from fusionroute import FusionRuntime
from fusionroute.runtime.process_memory import release_freed, resident

folder, precision = sys.argv[1:]
prompt = list(range(5, 25))

def load(budget):
    return FusionRuntime.load(folder, precision, "cpu", threads=2, expert_memory=budget, prefix_cache=0)

def taken():
    gc.collect()
    release_freed()
    return sum(resident())

def texts(rt):
    return [rt.generate(prompt, 6, expert=name).token_ids for name in rt.expert_names * 2]

with load(None) as rt:
    expected = texts(rt)
with load(1 << 40) as rt:
    size = max(rt.backend.experts[0].lease.func.__self__._sizes)
for experts in (1, 2, 3):
    budget = int(1.01 * experts * size)
    with load(budget) as rt:
        rt.generate(prompt, 6, lam=1.0)  # the router alone
        before = taken()
        assert texts(rt) == expected
        print(json.dumps({"experts": experts, "budget": budget, "grown": taken() - before}), flush=True)
"""


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_memory_is_that_of_the_budget(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, whose memory nothing else takes. Keys and values, which are no weights, are kept small."""
    shape = Shape(heads=16, kv_heads=1, head_dim=64, hidden=1024, vocab=2000, layers=10, experts=3, tokenizer=False)
    bundle, _ = export_system(tmp_path, shape, (precision,), max_seq_len=256)
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(bundle), precision], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for row in map(json.loads, ran.stdout.splitlines()):
        with capsys.disabled():
            print(f"{precision}, {row['experts']} experts: grown by {row['grown'] / row['budget']:.3f} of the budget")
        assert 0.95 <= row["grown"] / row["budget"] <= 1.05
