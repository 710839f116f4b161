"""Every launch that the ops make on real layer shapes compiles for every target, without spills and with wide loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import TARGETS

HERE = Path(__file__).parent
MAX_REGISTERS = 128  # leaves a multiprocessor room for two blocks of 256 threads
MAX_NARROW_LOADS = 4  # scalars: seed and step, counters
DRAWN_THREE_TIMES = {("joint_input", "_backward_kernel"): 6}  # seed and step for the sums, for dx and for z's part
NO_TENSOR = ("_finish_kernel",)  # handles a few numbers a channel


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arguments",
    [
        ("sm_90", "--quick"),
        *(pytest.param((name, "--quick"), marks=pytest.mark.slow) for name in TARGETS if name != "sm_90"),
        *(pytest.param((name,), marks=pytest.mark.soak) for name in TARGETS),
    ],
    ids=" ".join,
)
def test_compiles_within_limits(arguments):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(HERE.parents[1])
    done = subprocess.run([sys.executable, HERE / "aot.py", *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= MAX_REGISTERS, row
        if row["kernel"] in NO_TENSOR:
            continue
        assert row["wide_loads"] > 0, row
        narrow = DRAWN_THREE_TIMES.get((row["op"], row["kernel"]), MAX_NARROW_LOADS)
        assert TARGETS[arguments[0]].backend == "hip" or row["narrow_loads"] <= narrow, row
