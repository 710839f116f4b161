import pytest
import torch
from support import recipe

from ali_dist import checkpoint
from ali_dist.run import RunFolder
from ali_dist.state import TrainState


@pytest.fixture
def saved_run(tmp_path, digits):
    """A run's folder with one checkpoint, before any training, of small networks on digits."""
    run = RunFolder(tmp_path / "run")
    state = TrainState(recipe(), digits.mean_image, torch.device("cpu"))
    run.claim(state.recipe, "auto")
    checkpoint.save(run, state)
    return run.root
