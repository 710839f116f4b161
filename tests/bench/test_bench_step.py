import dataclasses
import json
import sys

import pytest
import torch

from ali_dist.bench import __main__ as command
from ali_dist.bench import step as bench
from ali_dist.bench.floors import floor, products
from ali_dist.bench.plain import PlainALI
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES
from ali_dist.tables import NETWORKS

CPU = torch.device("cpu")


def recipe(name, batch_size):
    return dataclasses.replace(RECIPES[name], optim=dataclasses.replace(RECIPES[name].optim, batch_size=batch_size))


@pytest.mark.parametrize(
    "name",
    ("digits", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cifar10", "svhn", "celeba", "tinyimagenet"))),
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
    flops, seconds, rows = floor(NETWORKS[name], 2, CPU)
    assert flops > 0 and seconds > 0
    assert sum(row[key]["times"] for row in rows for key in row if isinstance(row[key], dict)) == sum(
        p.forward + p.input_grad + p.weight_grad for p in products(NETWORKS[name], 2)
    )


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
