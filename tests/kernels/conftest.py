"""Without a GPU the kernels run in Triton's interpreter, which must be on before triton is first imported.

Where another test of the same process imported triton earlier, these tests run in a process of their own instead
(test_kernel_process.py) and are skipped here.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

# This folder has the package's name: with the root on the path, `import kernels` finds the package and not the folder.
sys.path.append(str(Path(__file__).parents[2]))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import dispatch  # noqa: E402

RUNNABLE = torch.cuda.is_available() or dispatch.INTERPRET


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="triton was imported without its interpreter: run by test_kernel_process.py")
    for item in items:
        here = Path(__file__).parent in item.path.parents
        if here and not RUNNABLE and item.path.name not in ("test_kernel_process.py", "test_kernel_aot.py"):
            item.add_marker(skip)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Fills memory from torch.empty and its kin with NaN, so an output left unwritten cannot pass."""

    def poison(make):
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
