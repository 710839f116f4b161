import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(torch.cuda.is_available() or dispatch.INTERPRET, reason="the tests run in this process")
@pytest.mark.timeout(600)
def test_in_own_process(request):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE),
        "-m",
        request.config.getoption("-m"),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]


def compiled(code):
    """Runs `code` in a process in which triton compiles for real."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_starts_no_device():
    code = "import torch, kernels; print(torch.cuda.is_initialized(), kernels.dispatch.INTERPRET)"
    assert compiled(code).split() == ["False", "False"]


def test_triton_by_name_on_a_cpu_without_the_interpreter_raises():
    code = (
        "import torch, kernels\n"
        "try: kernels.bias_leaky_relu_dropout(torch.zeros(2, 8), None, impl='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    assert "needs a CUDA tensor" in compiled(code)
