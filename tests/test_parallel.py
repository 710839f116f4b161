"""Real gloo ranks with unequal shares of a batch against one process with the whole of it."""

import dataclasses
from unittest import mock

import pytest
import torch
from support import Ranks, assert_same, batch, copies, greatest_difference, in_float64, recipe

from ali_dist import dist, objective
from ali_dist import step as steps
from ali_dist.levers import FAST, Levers
from ali_dist.state import TrainState
from ali_dist.supervised import supervised_step
from ali_dist.tables import NETWORKS

MEAN = torch.full((1, 32, 32), 0.3)
SHARES = {  # the rows of each rank, of micro-batches of 12
    1: [list(range(12))],
    2: [[0, 2, 3, 5, 6, 8, 9, 11], [1, 4, 7, 10]],
    3: [[0, 3, 4, 6, 7, 9, 10], [1, 5, 8, 11], [2]],
}
UPDATES = 2


def settings(accumulate: int = 1, networks: str = "small-dry", **changes):
    # A larger epsilon: where a gradient is nearly 0, Adam's first steps would make lr-sized moves of its rounding
    fixed = {"batch_size": 12 * accumulate, "accumulate": accumulate, "adam_eps": 1e-4, "lr": 1e-3}
    return recipe(networks=networks, **fixed, **changes)


def run(
    rank: int, recipe, shares: list[list[int]], variant: str = "", levers: Levers = FAST
) -> dict[str, dict[str, torch.Tensor]]:
    """State after each update, and gradients, on one rank."""
    shape = NETWORKS[recipe.networks].image
    state, original = (
        TrainState(recipe, MEAN.expand(shape), torch.device("cpu"), levers=levers),
        objective.per_image_losses,
    )

    def losses(a, b):
        both = original(a, b)
        if variant == "one rank does not count":
            return [loss * (rank != 1) for loss in both]
        if variant == "each rank counts the same":
            return [loss * recipe.micro_batch / (len(a) * dist.world_size()) for loss in both]
        return both

    if variant == "batch norm of its own":
        for module in state.model.modules():
            if hasattr(module, "reduce"):
                module.reduce = None
    out = {}
    for update in range(UPDATES):
        seeds = [10 * update + micro for micro in range(recipe.optim.accumulate)]
        with mock.patch.object(objective, "per_image_losses", losses):
            labelled = round(12 * recipe.labelled_share)
            advance = supervised_step if recipe.semi.supervised_only else steps.step
            micro = [batch(12, shares[rank], shape=shape, seed=seed, labelled=labelled) for seed in seeds]
            reports = advance(state, micro)
        trained = {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}
        out[f"gradients {update}"] = copies(trained)
        out[f"model {update}"] = copies(state.model.state_dict())
        out[f"averaged {update}"] = copies(state.averaged.state_dict())
        out[f"norms {update}"] = reports[-1]
    return out


def run64(*args):
    """In float64, with weights so large that no gradient is too small to tell apart."""
    with in_float64(), mock.patch("ali_dist.layers.INIT_STD", 0.1):
        return run(*args)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_unequal_shares_equal_one_worker(ranks: Ranks, world, accumulate):
    alone = run64(0, settings(accumulate), SHARES[1])
    together = ranks.run(world, run64, settings(accumulate), SHARES[world])
    for each in together:
        for name, tensors in alone.items():
            assert greatest_difference(each[name], tensors) <= 1e-10, name
        assert_same(each["model 1"], together[0]["model 1"])
    assert greatest_difference(alone["model 0"], alone["model 1"]) > 1e-3
    assert min(gradient.abs().max() for gradient in alone["gradients 0"].values()) > 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_sweep_through_d_does_as_well(ranks: Ranks, accumulate):
    alone = run64(0, settings(accumulate, "small-alone-dry"), SHARES[1])
    for each in ranks.run(3, run64, settings(accumulate, "small-alone-dry"), SHARES[3]):
        for name, tensors in alone.items():
            assert greatest_difference(each[name], tensors) <= 1e-10, name
    assert min(gradient.abs().max() for gradient in alone["gradients 0"].values()) > 1e-6


@pytest.mark.parametrize(
    "world, changes",
    [
        (2, {}),
        (3, {"accumulate": 2}),
        (3, {"networks": "small-conditional-dry"}),
        (3, {"networks": "small-classes-dry", "labels": 10, "labelled_batch": 5, "feature_matching": True}),
    ],
    ids=str,
)
def test_stacked_seeds_do_as_well(ranks: Ranks, world, changes):
    """Both losses' gradients go through batch norm over all ranks, in the order that all keep."""
    stacked = dataclasses.replace(FAST, stacked_seeds=True)
    alone = run64(0, settings(**changes), SHARES[1], "", dataclasses.replace(FAST, stacked_seeds=False))
    for each in ranks.run(world, run64, settings(**changes), SHARES[world], "", stacked):
        for name, tensors in alone.items():
            assert greatest_difference(each[name], tensors) <= 1e-10, name
    assert min(gradient.abs().max() for gradient in alone["gradients 0"].values()) > 1e-7


@pytest.mark.parametrize("train_embedding", [False, True])
def test_conditional_ranks_equal_one_worker(ranks: Ranks, train_embedding):
    conditional = settings(networks="small-conditional-dry", train_embedding=train_embedding)
    alone = run64(0, conditional, SHARES[1])
    for each in ranks.run(3, run64, conditional, SHARES[3]):
        for name, tensors in alone.items():
            assert greatest_difference(each[name], tensors) <= 1e-10, name
    moved = greatest_difference(*({"w": alone[f"model {i}"]["embedding.weight"]} for i in (0, 1)))
    assert (moved > 1e-5) == train_embedding
    assert ("embedding.weight" in alone["gradients 0"]) == train_embedding


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"feature_matching": True}, {"supervised_only": True}], ids=str)
def test_semi_supervised_ranks_equal_one_worker(ranks: Ranks, changes, accumulate):
    """With shares of which one has no labelled row at all (of 12, the last 5)."""
    semi = settings(accumulate, "small-classes-dry", labels=10, labelled_batch=5 * accumulate, **changes)
    alone = run64(0, semi, SHARES[1])
    for each in ranks.run(3, run64, semi, SHARES[3]):
        for name, tensors in alone.items():
            assert greatest_difference(each[name], tensors) <= 1e-10, name
    networks = {name.split(".")[0] for name in alone["gradients 0"]}
    only_d = "supervised_only" in changes  # and its z is 0
    assert networks == ({"discriminator"} if only_d else {"encoder", "decoder", "discriminator"})
    largest = {name: gradient.abs().max() for name, gradient in alone["gradients 0"].items()}
    assert all(value > 1e-7 for name, value in largest.items() if not (only_d and name.startswith("discriminator.z")))


@pytest.mark.parametrize("world", [2, 3])
def test_unequal_shares_equal_one_worker_in_float32(ranks: Ranks, world):
    alone = run(0, settings(), SHARES[1])
    for each in ranks.run(world, run, settings(), SHARES[world]):
        for name, tensors in alone.items():
            assert greatest_difference(each[name], tensors) <= 1e-5, name


@pytest.mark.parametrize("variant", ["one rank does not count", "each rank counts the same", "batch norm of its own"])
def test_wrong_variants_would_be_caught(ranks: Ranks, variant):
    alone = run64(0, settings(), SHARES[1])["gradients 0"]
    wrong = ranks.run(2, run64, settings(), SHARES[2], variant)[0]["gradients 0"]
    assert greatest_difference(wrong, alone) > 1e-3


def test_ranks_stay_equal_with_dropout(ranks: Ranks):
    first, second = ranks.run(2, run, settings(2, networks="small"), SHARES[2])
    for update in range(UPDATES):
        assert_same(first[f"model {update}"], second[f"model {update}"])
        assert_same(first[f"averaged {update}"], second[f"averaged {update}"])


def collectives(rank: int) -> dict[str, object]:
    out = {
        "gathered": dist.gather(torch.full((2, 3), float(rank))),
        "from_rank0": dist.from_rank0(7.5 + rank, torch.device("cpu")),
        "rank": dist.rank(),
        "world": dist.world_size(),
    }
    dist.barrier()
    return out


def test_collectives(ranks: Ranks):
    for rank, out in enumerate(ranks.run(3, collectives)):
        assert torch.equal(out["gathered"], torch.arange(3.0)[:, None, None].expand(3, 2, 3))
        assert (out["from_rank0"], out["rank"], out["world"]) == (7.5, rank, 3)


def test_collectives_alone():
    out = collectives(0)
    assert torch.equal(out["gathered"], torch.zeros(1, 2, 3))
    assert (out["from_rank0"], out["rank"], out["world"]) == (7.5, 0, 1)
