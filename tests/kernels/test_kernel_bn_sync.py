"""Two and three processes with unequal batches are one process with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bn_ranks import CASES, OPTIONS, draw
from kernel_checks import double, error, run

from kernels.bn_leaky_relu import bn_leaky_relu, bn_leaky_relu_ref

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank left: {(case, impl): [one dict a rank]}."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), max(len(images) for images in CASES.values())
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "bn_ranks.py")]
    processes = [subprocess.Popen([*command, str(rank), str(ranks), str(folder)], env=env) for rank in range(ranks)]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return {
        (case, impl): [torch.load(folder / f"{case} {impl} {rank}.pt") for rank in range(len(images))]
        for case, images in CASES.items()
        for impl in ("ref", "triton")
    }


@pytest.mark.parametrize("impl", ("ref", "triton"))
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_one_process(case, impl, results):
    inputs, seed = draw(case)
    inputs = {name: double(value) for name, value in inputs.items()}
    expected = run(bn_leaky_relu_ref, inputs, [seed], **OPTIONS)
    ranks = results[case, impl]
    joined = {name: torch.cat([rank[name] for rank in ranks]) for name in ("out0", "dx")}
    joined |= {name: sum(rank[name] for rank in ranks) for name in ("dweight", "dbias")}
    assert error(joined["out0"], expected["out0"]) <= 1e-6
    for name in ("dx", "dweight", "dbias"):
        assert error(joined[name], expected[name]) <= 1e-5, name
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert error(ranks[0][name], inputs[name]) <= 1e-6, name
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), name


def test_one_image_over_all_ranks_is_refused():
    def gather(rows):
        return torch.stack([rows, torch.zeros_like(rows)])

    for impl in ("ref", "triton") if not torch.cuda.is_available() else ("ref",):
        with pytest.raises(ValueError, match="over all ranks"):
            bn_leaky_relu(torch.zeros(1, 4), None, None, reduce=gather, impl=impl)
