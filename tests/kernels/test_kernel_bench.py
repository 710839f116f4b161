import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import bench, timing
from kernels.ops import OPS
from kernels.timing import Time

ROOT = Path(__file__).parents[2]
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a device")


def broken(op):
    """`op` with one number of its first output wrong."""

    def function(*args, **kwargs):
        y = op.function(*args, **kwargs)
        return y + torch.nn.functional.one_hot(torch.tensor(0), y.numel()).view_as(y)

    return dataclasses.replace(op, function=function)


@no_device
def test_table_on_a_cpu_counts_and_says_that_nothing_was_timed(capsys):
    assert bench.main(["maxout", "adam", "--batch", "128", "512"]) == 0
    out = capsys.readouterr().out
    assert "nothing was timed" in out and " us " not in out
    rows = [line for line in out.splitlines() if line.startswith(("maxout ", "adam "))]
    assert len(rows) == 3 * 2 * 2 * 2 + 2
    first = next(row for row in rows if "D_x 2 x512" in row and "dropout" in row and "forward" in row)
    assert f"{1.5 * 2 * 4 * 256 * 64 * 13 * 13 / 1e6:.2f} MB   1 launches | eager" in first


@no_device
def test_json_on_a_cpu(capsys):
    assert bench.main(["latent_pair", "--json", "--batch", "128"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["timed"] is False and result["copy_bytes_per_second"] is None and "nothing was timed" in result["note"]
    )
    assert result["date"] and result["device"].startswith("CPU") and result["versions"]["torch"] == torch.__version__
    assert result["command"] == "python -m kernels.bench latent_pair --json --batch 128"
    row = result["rows"][0]
    assert (row["op"], row["batch"], row["direction"], row["dtype"]) == ("latent_pair", 128, "forward", "bfloat16")
    assert row["counts"]["ours"] == {"bytes": 128 * 512 * (2 * 2 + 6), "launches": 1}
    assert "times" not in row


def test_an_op_that_is_wrong_gets_no_figures(capsys, monkeypatch):
    monkeypatch.setitem(OPS, "maxout", broken(OPS["maxout"]))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e12)
    assert bench.main(["maxout", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == [] and "out0 is off by" in result["red"]["maxout"]
    assert bench.main(["maxout"]) == 1
    assert "RED, no figures: plain, torch.float32" in capsys.readouterr().out


def test_an_op_that_raises_is_wrong(monkeypatch):
    def raises(**inputs):
        raise RuntimeError("no such kernel")

    assert bench.gate(dataclasses.replace(OPS["maxout"], function=raises), "cpu").endswith(
        "RuntimeError: no such kernel"
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["maxoot"], "did you mean 'maxout'?"),
        (["zzz"], "one of "),
        (["maxout", "--batch", "0"], "--batch must be positive"),
    ],
)
def test_bad_arguments(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@no_device
def test_command_turns_the_interpreter_on():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.bench", "adam"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RED" not in done.stdout and "G_z and G_x" in done.stdout


def test_rows_with_times(monkeypatch):
    """Ratios are peer / kernels, way by way; a peer that failed says so in its place."""
    row = next(row for row in bench.cases(OPS["maxout"], [128], torch.bfloat16) if row["direction"] == "forward")
    times = {
        "ours": {"launched": Time(4e-6, 3e-6, 5e-6), "graph": Time(2e-6, 1e-6, 3e-6)},
        "eager": {"launched": Time(12e-6, 11e-6, 13e-6), "graph": Time(8e-6, 7e-6, 9e-6)},
        "compile": {"launched": Time(6e-6, 5e-6, 7e-6), "graph": "RuntimeError: not captured"},
    }
    monkeypatch.setattr(bench, "time_case", lambda *case: times)
    timed = bench.with_times(row, 2e13)
    assert timed["ratios"] == {
        "eager": {"launched": pytest.approx(3), "graph": pytest.approx(4)},
        "compile": {"launched": 1.5},
    }
    assert timed["bytes_per_second"] == pytest.approx(row["counts"]["ours"]["bytes"] / 2e-6)
    assert timed["share_of_copy"] == pytest.approx(timed["bytes_per_second"] / 2e13)
    text = bench.line(json.loads(json.dumps(timed)))
    assert "2.0 us [1.0, 3.0]" in text and "eager launched 3.00x, graph 4.00x" in text
    assert "graph failed: RuntimeError: not captured" in text
    times["ours"]["graph"] = "OutOfMemoryError: too large"
    assert "failed: OutOfMemoryError" in bench.line(bench.with_times(row, 2e13))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_calls_to_time_compute_the_op(op, device):
    """The kernels, the reference and the rivals that run here: the same outputs and gradients, however often called."""
    shape, dtype, options = (4, 16, 4, 4), op.dtypes[0], list(op.options.values())[0]
    functions = {"ours": lambda **inputs: op.function(**inputs, impl="triton"), "reference": op.reference}
    functions |= {name: rival for name, rival in op.rivals.items() if device == "cuda" or name != "cudnn"}
    for backward in (False, True)[: 1 + bool(op.cost(shape, dtype).backward_launches)]:
        expected = None
        for name, function in functions.items():
            torch.manual_seed(0)
            sets = [op.inputs(shape, dtype, device) for _ in range(2)]
            with timing.native_dropout(op):
                calls = timing.calls_of(function, sets, options, backward)
                first, again = ([call() for call in calls] for _ in range(2))
            if first[0] is None:  # an op that updates its inputs
                updated = ("param", "exp_avg", "exp_avg_sq", "copy")
                first = again = [[inputs[key] for key in updated] for inputs in sets]
            torch.testing.assert_close(again, first, rtol=0, atol=0, msg=name)
            expected = expected or first
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_peers_draw_pytorchs_own_masks():
    op = OPS["bias_leaky_relu_dropout"]
    inputs = op.inputs((64, 64), torch.float32)
    with timing.native_dropout(op):
        first, second = (op.reference(**inputs, dropout=0.5) for _ in range(2))
    assert not torch.equal(first == 0, second == 0)
    first, second = (op.reference(**inputs, dropout=0.5) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backward", (False, True))
def test_times_on_a_device(backward):
    op = OPS["maxout"]
    times = timing.time_case(op, (256, 64, 13, 13), torch.bfloat16, op.options["dropout"], backward)
    assert all(isinstance(time, Time) and time.median > 0 for both in times.values() for time in both.values()), times
    assert timing.copy_bandwidth() > 1e10
