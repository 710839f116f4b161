"""Adam on a CPU is PyTorch's fused one to the bit, and a run on one CPU worker never imports the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ali_dist.optim import Adam

SETTINGS = {"lr": 3e-3, "betas": (0.5, 0.999), "eps": 1e-8}
SHAPES = ((7,), (3, 5, 4, 4), (1, 1, 1, 1), (130, 33))


def parameters():
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    made[1].data = made[1].data.contiguous(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("missing", (None, 2))
def test_updates_are_pytorchs_to_the_bit(missing):
    mine, theirs = parameters(), parameters()
    own, reference = Adam(mine, **SETTINGS), torch.optim.Adam(theirs, **SETTINGS, fused=True)
    generator = torch.Generator().manual_seed(1)
    for number in range(5):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator) * 10.0 ** (i - 2)
            late = i == missing and number < 2  # a gradient that comes with the third update only
            a.grad, b.grad = (None, None) if late else (gradient.clone(), gradient.clone())
        own.step()
        reference.step()
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
            assert own.state.get(a, {}).keys() == reference.state[b].keys()
            for key, moment in reference.state[b].items():
                assert torch.equal(own.state[a][key], moment) and own.state[a][key].stride() == moment.stride()
                assert own.state[a][key].dtype == moment.dtype
    assert own.state[mine[0]]["step"] == 5


def test_without_any_gradient_nothing_happens():
    (parameter, *_) = parameters()
    before = parameter.clone()
    optimizer = Adam([parameter], **SETTINGS)
    optimizer.step()
    assert torch.equal(parameter, before) and not optimizer.state


def test_a_run_on_one_cpu_worker_imports_no_compiler(data, tmp_path):
    """Which takes longer than all else of a small run's start."""
    code = """
import sys
from ali_dist import cli, worker
cli.run(worker.main)
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    words = "--dataset digits --networks digits --batch-size 4 --num-images 4 --validate-count 4".split()
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--data", data, "--storage", tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
