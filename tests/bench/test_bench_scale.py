"""Weak scaling: the parts' arithmetic, the projection's formula, and a real run of two processes."""

import json
import math

import pytest

from ali_dist import simulate
from ali_dist.bench import __main__ as command
from ali_dist.bench import scale
from ali_dist.describe import describe
from ali_dist.tables import NETWORKS

FLAGS = scale.Flags(dataset="digits", batch_per_worker=16, to=(8,))
SECONDS = {scale.OURS: 0.40, scale.OWN_NORM: 0.30, scale.ALONE: 0.25}
MEASURED = {
    1: {"seconds": {scale.OURS: 0.2}, "rounds": {scale.OURS: [0.2]}},
    2: {
        "seconds": SECONDS,
        "rounds": {name: [seconds] for name, seconds in SECONDS.items()},
        "all_reduce": 0.2,
        "small_all_reduce": 0.01,
        "bf16_gradient_difference": 1e-3,
    },
}
BYTES = 4 * describe(NETWORKS["digits"])["parameters"]


def test_the_parts_add_up():
    part = scale.parts(FLAGS, MEASURED, 2)
    assert part["efficiency"] == pytest.approx(0.5)
    assert part["images_per_s"] == pytest.approx(2 * 16 / 0.4)
    costs = ("sharing_the_machine", "gradients_exposed", "synchronised_norm")
    assert [part[name] for name in costs] == pytest.approx([0.05, 0.05, 0.1])
    assert 0.2 + sum(part[name] for name in costs) == pytest.approx(0.4)  # alone, and what makes it slower
    assert part["gradients_hidden_share"] == pytest.approx(0.75)  # 0.05 of 0.2 seconds show
    assert part["latency"] == pytest.approx(0.005)
    assert part["bytes_per_s"] == pytest.approx(BYTES / 0.19)  # a ring of two sends each byte once
    quick = {**MEASURED[2], "small_all_reduce": 0.001}  # and yet batch norm took 0.1 s: it waited for the other worker
    norms = sum(row.bn for _, rows in NETWORKS["digits"].parts().values() for row in rows)
    assert scale.parts(FLAGS, {**MEASURED, 2: quick}, 2)["latency"] == pytest.approx(0.1 / (2 * norms))


def test_the_projection_is_the_printed_formula():
    two, eight = scale.projected(FLAGS, {"measured": MEASURED})
    speed, latency = BYTES / 0.19, 0.005
    for row, n in ((two, 2), (eight, 8)):
        ring = 2 * (n - 1) * (BYTES / n / speed + latency)
        tree = 2 * (BYTES / speed + math.ceil(math.log2(n)) * latency)
        maps = [r.maps for _, rows in NETWORKS["digits"].parts().values() for r in rows if r.bn]
        norms = sum(2 * (n - 1) * (4 * (2 * c + 1) / speed + latency) for c in maps)
        assert (row["workers"], row["compute"]) == (n, pytest.approx(0.25))
        assert row["gradients"] == pytest.approx(0.25 * min(ring, tree))
        assert row["batch_norm"] == pytest.approx(norms)
        assert row["update"] == pytest.approx(0.25 + row["gradients"] + norms, rel=1e-3)
        assert row["efficiency"] == pytest.approx(0.25 / row["update"])
    text = "\n".join(scale.lines(FLAGS, {"measured": MEASURED, "projected": [two, eight]}))
    assert "weak-scaling efficiency 50%" in text and "75% of it hidden" in text and "measured 400.0 ms" in text
    assert scale.FORMULA in text


def test_simulate_repeats_the_projection(run_command):
    """The command that is printed gives the printed numbers."""
    result = {"measured": MEASURED, "projected": scale.projected(FLAGS, {"measured": MEASURED})}
    (words,) = [line.split()[3:] for line in scale.lines(FLAGS, result) if "ali_dist.simulate" in line]
    code, out, err = run_command(simulate.main, ["simulate", *words, "--trials", "1", "--json"])
    assert code == 0, err
    one, two, eight = json.loads(out)["simulated"]
    assert sum(one["update_ms"].values()) == pytest.approx(250)
    for simulated, row in ((two, result["projected"][0]), (eight, result["projected"][1])):
        assert sum(simulated["update_ms"].values()) == pytest.approx(1e3 * row["update"], rel=2e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workers", "2"], "1 among them"),
        (["--workers", "1", "0"], "must be positive"),
        (["--batch-per-worker", "1"], "--batch-per-worker must be at least 2"),
        (["--dataset", "digit"], "did you mean 'digits'"),
    ],
)
def test_bad_flags(run_command, flags, message):
    code, _, err = run_command(command.main, ["bench", "scale", *flags])
    assert code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.slow
def test_two_real_processes(run_command):
    words = ["scale", "--batch-per-worker", "2", "--rounds", "1", "--updates", "1", "--to", "8", "--json"]
    code, out, err = run_command(command.main, ["bench", *words])
    assert code == 0, err
    result = json.loads(out)
    assert list(result["measured"]) == ["1", "2"] and [row["workers"] for row in result["projected"]] == [2, 8]
    found = result["measured"]["2"]
    buckets = {f"buckets of {size} MB" for size in scale.BUCKETS}
    assert found["seconds"].keys() == {scale.OURS, scale.OWN_NORM, scale.ALONE, scale.BF16} | buckets
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert 1e-4 < found["bf16_gradient_difference"] < 1e-2  # bfloat16 rounds by up to 2^-9
