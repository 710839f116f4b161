import dataclasses
import json
import sys

import pytest
import torch

from ali_dist.bench import __main__ as command
from ali_dist.bench import step as bench
from ali_dist.bench.floors import floor, memory_floor, products
from ali_dist.bench.plain import PlainALI
from ali_dist.bench.ways import lever_sets
from ali_dist.levers import PLAIN, Levers
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES
from ali_dist.tables import NETWORKS

CPU = torch.device("cpu")


def recipe(name, batch_size):
    return dataclasses.replace(RECIPES[name], optim=dataclasses.replace(RECIPES[name].optim, batch_size=batch_size))


@pytest.mark.parametrize(
    "name",
    (
        "digits",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar10", "svhn")),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("celeba", "tinyimagenet")),
    ),
)
def test_all_ways_compute_the_same_losses_and_gradients(name):
    found = bench.check(recipe(name, 4), CPU, compiled=False)
    assert set(found) == {"joint", "separate"}
    assert all(0 <= value <= 1e-9 for row in found.values() for value in row.values())


def test_a_way_that_computes_something_else_is_refused(monkeypatch):
    exact = PlainALI.score
    monkeypatch.setattr(PlainALI, "score", lambda self, x, z: exact(self, x, z) * (1 + 1e-6))
    with pytest.raises(RuntimeError, match="joint computes something else"):
        bench.check(recipe("digits", 4), CPU, compiled=False)


def test_products_of_a_step_add_up():
    """FLOPs by hand from the networks' single passes, as `describe` prints them."""
    from ali_dist.describe import describe

    nets = NETWORKS["tinyimagenet"]
    single = {name: network["flops"] for name, network in describe(nets)["networks"].items()}
    first = {name: network["layers"][0]["flops"] for name, network in describe(nets)["networks"].items()}
    expected = sum(3 * single[name] - first[name] for name in ("encoder", "decoder"))
    expected += 2 * sum(4 * single[f"discriminator_{part}"] for part in ("x", "z", "joint"))
    # The first layers of D pass one gradient on, for half of the pairs, instead of two for all.
    expected -= 3 * (first["discriminator_x"] + first["discriminator_z"])
    mine = sum(
        product.flops * (product.forward + product.input_grad + product.weight_grad) for product in products(nets, 1)
    )
    assert mine == expected


@pytest.mark.parametrize("name", ("digits", "cifar10"))
def test_each_product_alone_runs(name, monkeypatch):
    monkeypatch.setattr("ali_dist.bench.floors.SECONDS", 0.0)
    found = floor(NETWORKS[name], 2, CPU)
    assert found.flops > 0 and found.seconds > 0 and found.again() > 0
    count = sum(p.forward + p.input_grad + p.weight_grad for p in products(NETWORKS[name], 2))
    assert sum(row[key]["times"] for row in found.rows for key in row if isinstance(row[key], dict)) == count
    assert sum(times for times, _ in found.calls) == count


def test_the_least_that_must_move():
    """By hand for one layer of D: 64 images of 32x32x3 through a 5x5 convolution to 28x28x32, one sweep."""
    first = next(p for p in products(NETWORKS["cifar10"], 32) if p.layer == "discriminator_x 1")
    sides, out = 3 * 32 * 32 + 32 * 28 * 28, 32 * 28 * 28
    assert (first.row.kernel, first.row.maps, first.images) == (5, 32, 64)
    assert first.moved == 2 * 64 * (2 * sides + 5 * out)
    found = memory_floor(NETWORKS["cifar10"], 32, 1000, CPU)
    assert found["bytes"] == sum(p.moved for p in products(NETWORKS["cifar10"], 32)) + 42_000
    assert found["seconds"] == found["bytes"] / found["bytes_per_s"] > 0


def test_the_sweeps_through_d():
    """D without batch norm is gone back through once, and its first layer for the samples alone."""
    for name, sweeps in (("cifar10", 1), ("digits", 2)):
        assert {p.input_grad for p in products(NETWORKS[name], 1) if "_joint" in p.layer} == {sweeps}


def test_levers_are_timed_each_and_together_and_a_failing_one_is_named(monkeypatch, capsys):
    def fails(self, batch):
        if self.state.levers.one_sweep and not self.state.levers.graph:
            raise RuntimeError("no such kernel\nand more")
        self.update([batch])

    monkeypatch.setattr("ali_dist.bench.ways.Ours.step", fails)
    monkeypatch.setattr("ali_dist.bench.floors.SECONDS", 0.0)
    words = "--dataset digits --batch-size 2 --seconds 0.01 --levers --only ours: --json".split()
    monkeypatch.setattr(sys, "argv", ["bench", "step", *words])
    command.main()
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["ways"]}
    assert set(rows) == {"ours: none", "ours: one_sweep", "ours: stacked_seeds", "ours"}
    failed = rows["ours: one_sweep"]
    assert failed["failed"] == "RuntimeError: no such kernel" and "median" not in failed
    assert rows["ours: none"]["loss_d"] == pytest.approx(rows["ours"]["loss_d"], rel=1e-2)


def test_on_a_gpu_every_lever_is_timed():
    sets = lever_sets(torch.device("cuda"))
    names = [field.name for field in dataclasses.fields(Levers)]
    assert set(sets) >= {"none", "all", *names, *(f"graph, {name}" for name in names if name != "graph")}
    assert sets["graph, branches"] == dataclasses.replace(PLAIN, graph=True, branches=True)
    assert all(getattr(sets["all"], name) for name in names) and not any(getattr(sets["none"], name) for name in names)


def test_the_command_times_every_way_in_one_run(monkeypatch, capsys):
    flags = ["step", "--dataset", "digits", "--batch-size", "2", "--seconds", "0.01", "--no-compile", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    monkeypatch.setattr("ali_dist.bench.floors.SECONDS", 0.0)
    command.main()
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["ways"]] == ["separate fp32", "separate bf16", "joint bf16", "ours"]
    assert all(row["updates"] >= 3 and row["images_per_s"] > 0 for row in result["ways"])
    assert result["ways"][-1]["ratio"] == 1
    kept = [row.get("kept_bytes_per_image") for row in result["ways"]]
    assert kept[:2] == [None, None] and 0 < kept[3] < kept[2]  # less than plain PyTorch keeps
    assert result["floor"]["flops"] == sum(
        product.flops * (product.forward + product.input_grad + product.weight_grad)
        for product in products(NETWORKS["digits"], 2)
    )


@pytest.mark.parametrize("flags", (["--batch-size", "1"], ["--seconds", "0"], ["--dataset", "digit"]))
def test_bad_flags(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["bench", "step", *flags])
    with pytest.raises(UserError):
        command.main()
