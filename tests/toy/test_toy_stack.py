import dataclasses

import pytest
import torch

from ali_dist.recipe import UserError
from ali_dist.toy.recipe import ToyRun
from ali_dist.toy.stack import Stack, initial_weights, saved

CPU = torch.device("cpu")
SMALL = {"epochs": 4, "train_points": 300, "batch_size": 50}


def runs(count=2, **changes):
    return [
        ToyRun(**{"model": "ali", "seed": s, "lr": 1e-3 * (s + 1), "beta1": 0.2 * s, **SMALL, **changes})
        for s in range(count)
    ]


def tensors(stack):
    everything = dict(stack.weights) | {f"averaged.{name}": t for name, t in stack.averaged.items()}
    for r, views in enumerate(stack.views):
        for name, view in views.items():
            everything |= {f"adam.{r}.{name}.{key}": t for key, t in stack.adam.state[view].items()}
    return {name: t.detach().clone() for name, t in everything.items()}


def test_a_run_does_not_depend_on_its_stack():
    together = Stack(runs(3), CPU)
    losses = together.train_epoch()
    for r, run in enumerate(runs(3)):
        alone = Stack([run], CPU)
        mine = alone.train_epoch()
        for name in losses:
            torch.testing.assert_close(losses[name][r], mine[name][0], rtol=1e-4, atol=1e-4)
        for name, weight in alone.weights.items():
            # Where a gradient is only rounding, Adam still moves by the learning rate, in either direction.
            moved = (together.weights[name][r] - weight[0]).abs()
            assert moved.mean() < 0.05 * run.lr, name


def test_runs_differ_by_their_seeds_and_settings():
    stack = Stack(runs(2), CPU)
    stack.train_epoch()
    assert not torch.equal(*stack.weights["decoder.1.weight"])
    assert torch.equal(initial_weights(runs()[0])["decoder.1.weight"], initial_weights(runs()[0])["decoder.1.weight"])
    with pytest.raises(ValueError, match="stack"):
        Stack([runs()[0], dataclasses.replace(runs()[1], epochs=5)], CPU)


ALL_AT_ONCE = {"average_steps": 5, "lr_final": 0.1, "cycle": 1.0, "near_energy": 1.0, "nearest": 1.0}


@pytest.mark.parametrize("model, changes", [("ali", ALL_AT_ONCE), ("vae", {})])
def test_an_interrupted_stack_continues_bit_for_bit(tmp_path, model, changes):
    def new():
        return Stack(runs(model=model, **changes), CPU)

    whole = new()
    assert not whole.load(tmp_path)
    for _ in range(3):
        whole.train_epoch()
    first = new()
    first.train_epoch()
    first.save(tmp_path)
    first.train_epoch()  # lost with the process
    second = new()
    assert second.load(tmp_path) and second.epoch == 1
    second.train_epoch()
    second.save(tmp_path)
    third = new()
    third.load(tmp_path)
    third.train_epoch()
    mine, theirs = tensors(whole), tensors(third)
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert [path.name for path in saved(tmp_path)] == ["state-000002"]
    assert third.seconds > second.seconds - 1e-9


def test_a_half_written_state_does_not_count(tmp_path):
    stack = Stack(runs(), CPU)
    stack.train_epoch()
    stack.save(tmp_path)
    partial = tmp_path / ".state-000002.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    again = Stack(runs(), CPU)
    assert again.load(tmp_path) and again.epoch == 1
    again.train_epoch()
    again.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state-000002"]


def test_a_state_of_other_runs_is_refused(tmp_path):
    stack = Stack(runs(), CPU)
    stack.train_epoch()
    stack.save(tmp_path)
    with pytest.raises(UserError, match="other runs"):
        Stack(runs(lr=5e-4), CPU).load(tmp_path)


def test_schedules():
    run = runs(beginning=0.5, lr_final=0.1, lr=1e-3, epochs=10)[0]
    assert run.lr_at(0) == run.lr_at(5) == 1e-3
    assert run.lr_at(7.5) == pytest.approx(0.55e-3)
    assert run.lr_at(10) == pytest.approx(1e-4)
    drawn = dataclasses.replace(run, nearest=4.0, near_energy=8.0)
    assert [drawn.near_energy_at(epoch) for epoch in (0, 2.5, 5, 10)] == [0, 2, 4, 8]
    assert [drawn.nearest_at(epoch) for epoch in (0, 2.5, 5, 10)] == [0, 2, 4, 4]
    plain = runs()[0]
    assert plain.lr_at(3.7) == plain.lr


def test_the_discriminator_may_learn_faster():
    slow, fast = (Stack(runs(1, discriminator_lr=ratio), CPU) for ratio in (1, 10))
    start = {name: t.detach().clone() for name, t in slow.weights.items()}
    for stack in (slow, fast):
        stack.step(stack.batches()(0))

    def moved(stack, name):
        return (stack.weights[name] - start[name]).abs().max()

    torch.testing.assert_close(moved(fast, "decoder.2.weight"), moved(slow, "decoder.2.weight"))
    ratio = moved(fast, "discriminator.1.weight") / moved(slow, "discriminator.1.weight")
    torch.testing.assert_close(ratio, torch.tensor(10.0), rtol=1e-3, atol=0)


def test_terms_are_of_the_coming_points():
    stack = Stack(runs(2, energy=0.5, nearest=2.0), CPU)
    batch = stack.batches()
    first, last = batch(0), batch(5)
    assert (first.terms.cycle, first.terms.energy, first.terms.nearest) == (0, 0.5, 0)
    assert last.terms.nearest == pytest.approx(2 * (5 / 6) / 2)
    for r in range(2):
        assert torch.equal(first.terms.points[r, :50], first.x[r]) and torch.equal(last.terms.points[r, :50], last.x[r])
        assert torch.equal(last.terms.points[r, 50:100], first.x[r])  # the epoch's order starts anew
    assert Stack(runs(2), CPU).batches()(0).terms is None


def test_averages_follow_the_weights():
    stack = Stack(runs(average_steps=20, lr=1e-3), CPU)
    start = stack.averaged["decoder.4.bias"].clone()
    for _ in range(4):
        stack.train_epoch()
    averaged, last = stack.averaged["decoder.4.bias"], stack.weights["decoder.4.bias"]
    assert not torch.equal(averaged, start) and not torch.equal(averaged, last)
    assert torch.equal(stack.result()["decoder.4.bias"], averaged)


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"beta1": 1.0}, "--beta1"),
        ({"seed": -1}, "--seed"),
        ({"epochs": 0}, "--epochs"),
        ({"train_points": 301}, "--train-points"),
        ({"beginning": 1.0}, "--beginning"),
        ({"near_energy": -1.0}, "--near-energy"),
        ({"cycle": -1.0}, "--cycle"),
        ({"energy": 1.0, "model": "gan"}, "--energy is for ali"),
        ({"model": "gans"}, "did you mean 'gan'"),
    ],
)
def test_bad_settings_are_refused(changes, flag):
    with pytest.raises(UserError, match=flag):
        runs(1, **changes)
