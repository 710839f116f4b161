import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ali_dist.data.stream import Stream
from ali_dist.recipes import RECIPES
from ali_dist.state import TrainState
from ali_dist.step import step

GOLDEN = Path(__file__).parent / "golden" / "digits.json"


def curves(index, batch_size: int, lr: float, updates: int) -> dict[str, list[float]]:
    """Mean losses of the digits recipe's first updates, in float32 on one thread."""
    base = RECIPES["digits"]
    optim = dataclasses.replace(base.optim, batch_size=batch_size, lr=lr)
    recipe = dataclasses.replace(base, precision="fp32", optim=optim)
    state = TrainState(recipe, index.mean_image, torch.device("cpu"))
    with Stream(index, "train", seed=recipe.seed, lanes=recipe.lanes, micro_batch=recipe.micro_batch) as stream:
        reports = [step(state, [next(stream)])[0] for _ in range(updates)]
    return {name: [report[name].mean().item() for report in reports] for name in ("loss/d", "loss/g")}


def test_the_first_updates_of_digits(digits):
    """Rounding differs between processors, and its effect grows from update to update."""
    assert torch.get_num_threads() == 1
    golden = json.loads(GOLDEN.read_text())
    got = curves(digits, golden["batch_size"], golden["lr"], golden["updates"])
    for name in ("loss/d", "loss/g"):
        assert len(golden[name]) == golden["updates"] == 20
        assert got[name][:5] == pytest.approx(golden[name][:5], rel=1e-4)
        assert got[name][5:] == pytest.approx(golden[name][5:], rel=1e-2)
