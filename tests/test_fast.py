"""Updates through fixed buffers against the step as it is written; and that none of it would break a CUDA graph."""

import dataclasses
import math
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support import Ranks, assert_same, batch, copies, greatest_difference, in_float64, recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ali_dist import checkpoint, fast
from ali_dist.fast import PlainUpdates, StaticUpdates, updates_of
from ali_dist.finite import NonFinite
from ali_dist.levers import FAST, PLAIN, Levers
from ali_dist.meter import Meter
from ali_dist.run import RunFolder
from ali_dist.state import TrainState
from ali_dist.tables import NETWORKS
from kernels import dispatch

CPU = torch.device("cpu")
ALL = Levers(**{field.name: True for field in dataclasses.fields(Levers)})
EACH = {field.name: dataclasses.replace(PLAIN, **{field.name: True}) for field in dataclasses.fields(Levers)}


def start(levers=ALL, static=True, device=CPU, impl="ref", **changes) -> TrainState:
    settings = recipe(**changes)
    shape = NETWORKS[settings.networks].image
    return TrainState(settings, torch.full(shape, 0.3, dtype=torch.float64), device, impl, levers, static)


def batches(state: TrainState, update: int) -> list:
    settings = state.recipe
    shape = NETWORKS[settings.networks].image
    count = settings.optim.accumulate
    labelled = settings.micro_batch - settings.streamed
    return [batch(settings.micro_batch, shape=shape, seed=10 * update + i, labelled=labelled) for i in range(count)]


def make(state: TrainState, first: int, count: int, advance=None) -> dict[str, float]:
    """Updates first, first + 1, …; the measures of all of them together."""
    meter = Meter(state.device)
    advance = advance(state, meter) if advance else updates_of(state, meter)
    for update in range(first, first + count):
        advance(batches(state, update))
    advance.settle()
    return meter.collect()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"batch_size": 16, "accumulate": 2},
        {"flips": True},
        {"networks": "small-conditional"},
        {"networks": "small-classes", "labels": 10, "labelled_batch": 3},
        {"networks": "small-classes", "labels": 10, "labelled_batch": 3, "feature_matching": True},
    ],
    ids=str,
)
def test_fixed_buffers_give_the_steps_very_bits(changes):
    mine, theirs = start(**changes), start(**changes)
    measures = make(mine, 0, 3), make(theirs, 0, 3, PlainUpdates)
    assert measures[0] == measures[1] and "loss/d" in measures[0] and "grad_norm/decoder" in measures[0]
    assert mine.num_images == theirs.num_images == 3 * mine.recipe.optim.batch_size
    assert_same(mine.tensors(), theirs.tensors())
    assert not torch.equal(*(state.averaged.decoder[0].weight for state in (mine, start(**changes))))


def test_a_changed_learning_rate_counts_from_the_next_update():
    states = start(), start()
    advances = [kind(state, Meter(CPU)) for kind, state in zip((StaticUpdates, PlainUpdates), states, strict=True)]
    for update, lr in enumerate((3e-4, 3e-4, 1e-2, 1e-5)):
        for state, advance in zip(states, advances, strict=True):
            for optimizer in state.optimizers.values():
                optimizer.param_groups[0]["lr"] = lr
            before = state.model.decoder[0].weight.detach().clone()
            advance(batches(state, update))
            moved = (state.model.decoder[0].weight - before).abs().max().item()
            assert moved <= 5 * lr and (moved > 0.1 * lr)
    assert_same(states[0].tensors(), states[1].tensors())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_in_the_middle_and_continued(tmp_path, precision):
    straight, first = start(precision=precision), start(precision=precision)
    make(straight, 0, 4)
    make(first, 0, 2)
    path = checkpoint.save(RunFolder(tmp_path), first)
    second = start(precision=precision)
    checkpoint.load(path, second)
    make(second, 2, 2)
    assert second.num_images == straight.num_images
    assert_same(second.tensors(), straight.tensors())
    plain = start(static=False, levers=PLAIN, precision=precision)
    checkpoint.load(path, plain)  # a run may go on without the levers, and back
    assert_same(plain.averaged.state_dict(), first.averaged.state_dict())


@pytest.mark.parametrize("lever", [*EACH, "all", "none"])
@pytest.mark.parametrize("networks, size", [("small-dry", 8), ("small-alone", 8)])
def test_each_lever_leaves_the_update_as_it_is(float64, lever, networks, size):
    levers = {**EACH, "all": ALL, "none": PLAIN}[lever]
    # A larger epsilon: where a gradient is nearly 0, Adam's first steps would make lr-sized moves of its rounding
    settings = {"networks": networks, "batch_size": size, "adam_eps": 1e-4}
    mine, theirs = start(levers, **settings), start(PLAIN, static=False, **settings)
    assert mine.one_sweep == (networks == "small-alone" and levers.one_sweep)
    assert mine.stacked_seeds == (levers.stacked_seeds and not mine.one_sweep)
    for state in (mine, theirs):
        with torch.random.fork_rng():
            for parameter in state.model.parameters():  # away from zero biases and tiny weights
                parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
    measures = [make(state, 0, 2) for state in (mine, theirs)]
    assert measures[0] == pytest.approx(measures[1], rel=1e-9, abs=1e-12)
    assert greatest_difference(mine.model.state_dict(), theirs.model.state_dict()) <= 1e-10
    assert greatest_difference(mine.averaged.state_dict(), theirs.averaged.state_dict()) <= 1e-10


def test_convolutions_compute_with_the_copies_and_train_the_weights():
    """What Adam wrote is what autocast would round to; and the copy is what is read, not the weight."""
    mine, theirs = start(EACH["weight_copies"], precision="bf16"), start(PLAIN, precision="bf16")
    assert {layer.rounded.dtype for layer in mine.model.encoder} == {torch.bfloat16}
    assert all(layer.rounded is None for layer in theirs.model.encoder)
    make(mine, 0, 3), make(theirs, 0, 3)
    assert_same(mine.tensors(), theirs.tensors())
    layer = mine.model.encoder[0]
    assert torch.equal(layer.rounded, layer.weight.bfloat16()) and layer.weight.grad is None
    x = torch.rand(4, 1, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.zero_()
        assert layer.convolve(x).any()
        assert not mine.model.eval().encoder[0].convolve(x).any()  # outside training the weights count


def test_nothing_of_an_update_has_another_place_in_the_next():
    """A graph replays addresses: all that one update reads or writes, and the next, is where it was."""
    state = start(precision="bf16")
    advance = StaticUpdates(state, Meter(CPU))

    def places() -> dict[str, int]:
        fixed = {f"input {i}": t for i, t in enumerate(advance.inputs[0])} | state.tensors()
        fixed |= {f"measure {name}": moments for name, moments in advance.measures.moments.items()}
        fixed |= {"skip": advance.skip, "weight": advance.weight, "flags": state.finite.flags}
        return {name: tensor.data_ptr() for name, tensor in fixed.items()}

    advance(batches(state, 0))
    first, losses = places(), []
    for update in range(1, 4):
        rng, noise = advance.inputs[0].rng.tolist(), advance.inputs[0].z.clone()
        advance(batches(state, update))
        assert advance.inputs[0].rng.tolist()[1] == rng[1] + 8 and not torch.equal(advance.inputs[0].z, noise)
        advance.settle()
        assert places() == first
        losses.append(advance.meter.collect()["loss/d"])
    assert len(set(losses)) == 3
    assert state.optimizers["generator"].state[state.generator[0]]["step"] == 4


class NoHost(TorchDispatchMode):
    """Fails where a launch on `device` would wait for the host or be given memory of it: what no capture allows."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_pinned", "_pin_memory")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        assert not any(name.startswith(wait) for wait in self.WAITS), f"{name} reads from the device"
        masks = [t for t in tree_leaves(args[1:]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        assert name not in ("index", "index_put_") or not masks, "a mask's number of rows is read from the device"
        assert name != "lift_fresh", "a tensor made of Python numbers comes from the host's memory"
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert all(t.device.type == self.device for t in tensors), f"{name} mixes devices"
        self.count += 1
        return out


@pytest.mark.skipif(not dispatch.INTERPRET, reason="with a GPU kernels take no tensors without data")
@pytest.mark.parametrize("networks", ["small-dry", "digits", "cifar10", "tinyimagenet", "small-conditional"])
@pytest.mark.parametrize("levers", [ALL, PLAIN], ids=["all", "none"])
def test_a_whole_update_on_the_kernels_needs_nothing_of_the_host(networks, levers):
    """On tensors without data, where reading a number is impossible, and the kernels' launches are not made."""
    state = start(levers, device=torch.device("meta"), impl="triton", networks=networks)
    advance = StaticUpdates(state, Meter(state.device))
    given = [fast.prepare(state, one, 0) for one in batches(state, 0)]
    advance.fill(given, 8)
    advance.update()  # makes the meter's and the optimizers' tensors, as the updates before the capture do
    with NoHost("meta") as mode:
        advance.update()
        advance.update()
    assert mode.count > 500


@pytest.mark.parametrize("changes", [{}, {"networks": "small-classes-dry", "labels": 10, "labelled_batch": 3}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_update_reads_nothing_back(precision, changes):
    state = start(**{"networks": "small-dry", **changes}, precision=precision)
    advance = StaticUpdates(state, Meter(CPU))
    advance(batches(state, 0))
    with NoHost("cpu") as mode:
        advance.update()
    assert mode.count > 500


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("networks", ["digits", "cifar10"])
@pytest.mark.parametrize("lever", [*EACH, "default", "all"])
def test_on_a_gpu_replays_make_the_updates_that_launches_make(lever, networks, precision, monkeypatch):
    """Ten updates of which seven are replayed, against as many launched; they differ from one to the next."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    levers = {**EACH, "default": FAST, "all": ALL}[lever]
    levers = dataclasses.replace(levers, graph=True)
    settings = {"networks": networks, "precision": precision, "batch_size": 16, "adam_eps": 1e-4, "lr": 1e-4}
    states = [start(each, None, torch.device("cuda"), "auto", **settings) for each in (levers, PLAIN)]
    advances = [updates_of(state, Meter(state.device)) for state in states]
    assert [type(advance) for advance in advances] == [StaticUpdates, PlainUpdates]
    losses: list[list[float]] = [[], []]
    for update in range(10):
        for state, advance, found in zip(states, advances, losses, strict=True):
            advance(batches(state, update))
            advance.settle()
            found.append(advance.meter.collect()["loss/d"])
    assert advances[0].graph is not None, advances[0].failure
    assert len(set(losses[0])) == 10
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for name, average in states[1].averaged.state_dict().items():
        mine = states[0].averaged.state_dict()[name]
        assert (mine - average).double().norm() <= tolerance * average.double().norm() + 1e-6, name


@pytest.mark.parametrize("spoil", ["item", "tensor", "mask"])
def test_what_would_break_a_capture_is_caught(spoil):
    x = torch.ones(3)
    does = {
        "item": lambda: x.sum().item(),
        "tensor": lambda: x + torch.tensor([1.0, 2.0, 3.0]),
        "mask": lambda: x[x > 0],
    }
    with pytest.raises(AssertionError), NoHost("cpu"):
        does[spoil]()


@pytest.mark.parametrize("levers", [FAST, EACH["overlap_adam"]], ids=["together", "overlapped"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_moves_nothing_from_then_on(levers, value):
    state = start(levers, precision="bf16")
    meter = Meter(CPU)
    advance = StaticUpdates(state, meter)
    advance(batches(state, 0))
    advance.settle()
    state.finite.check([0])
    kept = copies({name: t for name, t in state.tensors().items() if "running" not in name and "batches" not in name})
    handle = state.model.discriminator.joint[0].bias.register_hook(lambda gradient: gradient * value)
    advance(batches(state, 1))
    handle.remove()
    advance(batches(state, 2))  # which is good, but comes after
    advance.settle()
    with pytest.raises(NonFinite, match="^grad_norm/discriminator not finite in the update after 8 images$"):
        state.finite.check([8, 16])
    assert_same(kept, {name: state.tensors()[name] for name in kept})


def test_a_bad_loss_is_named_too():
    state = start(FAST)
    state.model.encoder[0].weight.data.fill_(math.nan)
    advance = StaticUpdates(state, Meter(CPU))
    advance(batches(state, 0))
    with pytest.raises(NonFinite, match="grad_norm/encoder.*loss/d"):
        state.finite.check([0])


class Casts(TorchDispatchMode):
    """The shapes of all that is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.add(args[0].shape)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("copies", [True, False])
def test_no_weight_is_rounded_again(copies):
    # 7 images: no activation has a weight's shape
    state = start(EACH["weight_copies"] if copies else PLAIN, precision="bf16", batch_size=7)
    weights = {p.shape for p in state.model.parameters() if p.dim() == 4 and p.shape[2] > 1}
    with Casts() as mode:
        make(state, 0, 1)
    assert bool(weights & mode.shapes) != copies and len(weights) > 3


@contextmanager
def cuda_that(records):
    """A stand-in for torch.cuda's graphs: `records(graph)` is what happens at the end of a capture."""

    @contextmanager
    def graph(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield
        records(graph)

    fake = SimpleNamespace(replay=lambda: None)
    with (
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "CUDAGraph", lambda: fake),
        mock.patch.object(torch.cuda, "graph", graph),
    ):
        yield fake


def captured(state: TrainState) -> StaticUpdates:
    """As on a GPU, on a CPU: without streams, and so that a capture runs what it records."""
    advance = StaticUpdates(state, Meter(CPU))
    advance.gpu = True
    return advance


def test_after_the_first_updates_the_graph_is_replayed():
    state = start()
    advance, replayed = captured(state), []
    with cuda_that(lambda graph: None) as graph:
        for update in range(fast.WARM_UP):
            advance(batches(state, update))
        assert advance.graph is None
        with mock.patch.object(advance, "update"):  # a capture makes no update
            graph.replay = lambda: replayed.append(advance.inputs[0].rng.tolist()[1])
            for update in range(fast.WARM_UP, fast.WARM_UP + 2):
                advance(batches(state, update))
    assert advance.graph is graph and replayed == [8 * fast.WARM_UP, 8 * fast.WARM_UP + 8]
    assert state.num_images == 8 * (fast.WARM_UP + 2)


def test_where_capture_fails_updates_go_on_and_one_line_says_why(caplog):
    def fails(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    state, plain = start(), start()
    advance = captured(state)
    with cuda_that(fails), mock.patch.object(advance, "update", lambda: None):  # a capture makes no update
        for update in range(fast.WARM_UP + 3):
            advance(batches(state, update))
    assert advance.graph is None
    make(plain, 0, fast.WARM_UP + 3)
    assert_same(state.tensors(), plain.tensors())
    (line,) = caplog.records
    assert "operation not permitted when stream is capturing)" in line.getMessage() and "--no-fast" in line.getMessage()


def rank_run(rank: int, static: bool, overlap: bool) -> dict[str, dict[str, torch.Tensor]]:
    shares = [[0, 2, 3, 5, 6, 8, 9, 11], [1, 4, 7, 10]]
    settings = {"networks": "small-dry", "batch_size": 12, "adam_eps": 1e-4, "lr": 1e-3}
    levers = dataclasses.replace(PLAIN, overlap_adam=overlap)
    with in_float64(), mock.patch("ali_dist.layers.INIT_STD", 0.1):
        state = start(levers, static, **settings)
        meter = Meter(CPU)
        advance = updates_of(state, meter)
        for update in range(2):
            advance([batch(12, shares[rank], seed=update)])
        advance.settle()
        measures = {name: torch.tensor(value, dtype=torch.float64) for name, value in meter.collect().items()}
    kind = {"data_parallel": torch.tensor(isinstance(state.forward, torch.nn.parallel.DistributedDataParallel))}
    return {"model": copies(state.model.state_dict()), "averaged": copies(state.averaged.state_dict())} | {
        "measures": measures,
        "kind": kind,
    }


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_add_their_gradients_up_as_data_parallel_does(ranks: Ranks, overlap):
    mine, theirs = ranks.run(2, rank_run, True, overlap), ranks.run(2, rank_run, False, False)
    for one, other in zip(mine, theirs, strict=True):
        assert not one["kind"]["data_parallel"] and other["kind"]["data_parallel"]
        for part in ("model", "averaged", "measures"):
            assert greatest_difference(one[part], other[part]) <= 1e-10, part
    assert_same(mine[0]["model"], mine[1]["model"])


def rank_gradients(rank: int, static: bool, bf16: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Adam's first moments after one update, which are half the gradient, and the weights."""
    levers = dataclasses.replace(PLAIN, bf16_gradients=bf16)
    state = start(levers, static, networks="small-dry", batch_size=12, adam_eps=1e-4)
    updates_of(state, Meter(CPU))([batch(12, [[0, 2, 3, 5, 6, 8, 9, 11], [1, 4, 7, 10]][rank])])
    moments = {name: t for name, t in state.tensors().items() if name.startswith("adam.") and "exp_avg" in name}
    return {"moments": copies(moments), "model": copies(state.model.state_dict())}


@pytest.mark.parametrize("static", [False, True])
def test_gradients_exchanged_in_bfloat16(ranks: Ranks, static):
    rounded, exact = (ranks.run(2, rank_gradients, static, bf16) for bf16 in (True, False))
    assert_same(rounded[0]["model"], rounded[1]["model"])
    names = [name for name in exact[0]["moments"] if not name.endswith("_sq")]
    assert names
    mine, theirs = (torch.cat([one[0]["moments"][n].flatten().double() for n in names]) for one in (rounded, exact))
    difference = (mine - theirs).norm() / theirs.norm()
    assert 1e-4 < difference < 2**-7  # three roundings of 2^-9 at most each, and not none


def test_a_classifier_alone_takes_the_step_as_it_is_written():
    state = start(networks="small-classes", labels=10, supervised_only=True)
    assert not state.static and isinstance(updates_of(state, Meter(CPU)), PlainUpdates)
    assert state.why_not_static == "--supervised-only has none"


@pytest.mark.parametrize("size, labelled, lanes", [(12, 0, 24), (12, 0, 8), (10, 0, 24), (16, 4, 24), (16, 5, 24)])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
def test_shares_that_change_are_foreseen(size, labelled, lanes, workers):
    """A graph's buffers keep their shape, so that a worker must get as many images each time."""
    semi = {"labels": 10, "labelled_batch": labelled} if labelled else {}
    settings, streamed = recipe(batch_size=size, lanes=lanes, **semi), size - labelled
    assert settings.streamed == streamed
    shares = set()
    for number in range(lanes):
        dealt = [(number * streamed + row) % lanes % workers for row in range(streamed)]
        shares.add(tuple(dealt.count(rank) for rank in range(workers)))
    why = settings.why_not_static(workers)
    if lanes % workers:  # where it may come out even, but nobody relies on it
        assert why
    else:
        assert bool(why) == (len(shares) > 1)
    assert not why or f"{streamed} streamed" in why and f"--lanes {lanes} " in why and f"{workers} workers" in why
