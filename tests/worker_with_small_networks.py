"""`python -m ali_dist.worker`, which also knows the tests' small networks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # as in conftest.py

import support  # noqa: E402, F401
import torch  # noqa: E402

from ali_dist import cli  # noqa: E402
from ali_dist.worker import main  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.run(main)
