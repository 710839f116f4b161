import pytest
import torch
from kernel_checks import error
from torch import nn

from kernels.adam import BLOCK, adam, adam_ref
from kernels.flat_adam import FlatAdam

impls = pytest.mark.parametrize("impl", ("ref", "triton"))
BETAS = (0.5, 0.999)


def buffers(size, device, dtype=torch.float32, steps=1, copy=None):
    zeros = torch.zeros(3, size, dtype=dtype, device=device).unbind()
    names = dict(zip(("param", "exp_avg", "exp_avg_sq"), zeros, strict=True))
    if copy is not None:
        names["copy"] = torch.full((size,), float("nan"), dtype=copy, device=device)
    return names | {"step": torch.zeros(steps, device=device), "lr": torch.tensor(1e-2, dtype=dtype, device=device)}


@pytest.mark.parametrize("betas", (BETAS, (0.9, 0.999), (0.0, 0.0)), ids=str)
@pytest.mark.parametrize("size", (1, 1023, 2 * BLOCK + 3))
def test_twenty_updates_are_as_exact_as_float64(size, betas, device):
    mine, exact = buffers(size, device), buffers(size, device, torch.float64)
    options = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-8}
    for scale in torch.logspace(-3, 3, 20).tolist():
        grad = torch.randn(size, device=device) * scale
        adam(grad=grad, **mine, **options, impl="triton")
        adam_ref(grad=grad, **exact, **options)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert error(mine[name], exact[name]) <= 1e-6, name
    assert mine["step"].item() == 20


@impls
@pytest.mark.parametrize("grad_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradient_and_copy_of_any_type(grad_dtype, impl, device):
    mine = buffers(100, device, steps=5, copy=torch.bfloat16)
    exact = buffers(100, device, torch.float64)
    grad = torch.randn(100, device=device).to(grad_dtype)
    adam(grad=grad, **mine, impl=impl)
    adam_ref(grad=grad, **exact)
    assert error(mine["param"], exact["param"]) <= 1e-6
    assert torch.equal(mine["copy"], mine["param"].bfloat16())
    assert mine["step"].tolist() == [1] * 5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@impls
def test_nan_and_inf_stay_where_they_are(impl, device):
    mine, grad = buffers(64, device), torch.ones(64, device=device)
    grad[3], grad[5] = float("nan"), float("inf")
    theirs = nn.Parameter(torch.zeros(64, device=device))
    theirs.grad = grad.clone()
    torch.optim.Adam([theirs], 1e-2).step()
    adam(grad=grad, **mine, impl=impl)
    torch.testing.assert_close(mine["param"], theirs.detach(), equal_nan=True)
    assert mine["param"].isnan().nonzero().flatten().tolist() == [3, 5]


def test_refuses_what_it_cannot_update(device):
    given = buffers(8, device) | {"grad": torch.zeros(8, device=device)}
    for change, error_type in (
        ({"grad": torch.zeros(9, device=device)}, ValueError),
        ({"grad": torch.zeros(16, device=device)[::2]}, ValueError),
        ({"copy": torch.zeros(2, 4, device=device)}, ValueError),
        ({"step": torch.tensor(1.0, device=device)}, ValueError),
        ({"lr": torch.zeros(2, device=device)}, ValueError),
        ({"beta1": 1.0}, ValueError),
        ({"eps": -1.0}, ValueError),
        ({"exp_avg": given["exp_avg"].double()}, TypeError),
        ({"param": given["param"].bfloat16()}, TypeError),
        ({"grad": torch.zeros(8, device="meta")}, ValueError),
    ):
        with pytest.raises(error_type):
            adam(**(given | change))


def network(device):
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 5, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(45, 7)
    return nn.Sequential(*layers).to(device=device, memory_format=torch.channels_last)


def groups(net, lr=1e-3):
    return [{"params": list(net[0].parameters())}, {"params": list(net[3].parameters()), "lr": lr}]


def train(net, optimizer, steps, first=0, set_to_none=True):
    for i in range(first, first + steps):
        torch.manual_seed(i)
        x = torch.randn(4, 3, 5, 5, device=net[0].weight.device)
        optimizer.zero_grad(set_to_none)
        net(x).square().mean().backward()
        optimizer.step()


def assert_same(net, optimizer, other_net, other):
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert error(p, q) <= 1e-6
        assert p.stride() == q.stride()
        for name in ("exp_avg", "exp_avg_sq"):
            assert error(optimizer.state[p][name], other.state[q][name]) <= 1e-5
        assert optimizer.state[p]["step"].item() == other.state[q]["step"].item()


@impls
@pytest.mark.parametrize("how", ({"fused": True}, {"foreach": True}), ids=str)
def test_flat_adam_is_adam(how, impl, device):
    net, theirs = network(device), network(device)
    optimizer = FlatAdam(groups(net), 1e-4, BETAS, impl=impl)
    other = torch.optim.Adam(groups(theirs), 1e-4, BETAS, **how)
    train(net, optimizer, 20)
    train(theirs, other, 20)
    assert_same(net, optimizer, theirs, other)


@impls
@pytest.mark.parametrize("to_flat", (True, False))
def test_state_dicts_are_interchangeable(to_flat, impl, device):
    def adam_of(net, flat):
        return FlatAdam(groups(net), 1e-4, BETAS, impl=impl) if flat else torch.optim.Adam(groups(net), 1e-4, BETAS)

    straight, first, second = network(device), network(device), network(device)
    optimizers = adam_of(straight, to_flat), adam_of(first, not to_flat), adam_of(second, to_flat)
    train(straight, optimizers[0], 6)
    train(first, optimizers[1], 3)
    train(second, optimizers[2], 2, first=50)
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    train(second, optimizers[2], 3, first=3)
    assert_same(second, optimizers[2], straight, optimizers[0])


def test_state_from_before_the_first_update(device):
    net, fresh = network(device), network(device)
    optimizer = FlatAdam(net.parameters())
    train(net, optimizer, 2)
    optimizer.load_state_dict(torch.optim.Adam(fresh.parameters()).state_dict())
    for state in optimizer.state.values():
        assert not any(tensor.any() for tensor in state.values())


def test_takes_over_state_that_is_assigned(device):
    net, theirs = network(device), network(device)
    optimizer, other = FlatAdam(net.parameters()), torch.optim.Adam(theirs.parameters())
    train(theirs, other, 3)
    net.load_state_dict(theirs.state_dict())
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        optimizer.state[p] = {name: tensor.clone() for name, tensor in other.state[q].items()}
    train(net, optimizer, 3, first=3)
    train(theirs, other, 3, first=3)
    assert_same(net, optimizer, theirs, other)


def test_gradients_accumulate_in_the_flat_buffer(device):
    net, theirs = network(device), network(device)
    optimizer, other = FlatAdam(net.parameters()), FlatAdam(theirs.parameters())
    train(net, optimizer, 3, set_to_none=False)
    train(theirs, other, 3)
    assert len({p.grad.untyped_storage().data_ptr() for p in net.parameters()}) == 1
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@impls
def test_copies_follow_the_parameters(impl, device):
    net = network(device)
    optimizer = FlatAdam(net.parameters(), copy_dtype=torch.bfloat16, impl=impl)
    train(net, optimizer, 2)
    net[0].weight.data.add_(1)
    assert not torch.equal(optimizer.copies[net[0].weight], net[0].weight.bfloat16())
    optimizer.refresh_copies()
    assert set(optimizer.copies) == set(net.parameters())
    for p, copy in optimizer.copies.items():
        assert torch.equal(copy, p.bfloat16()) and copy.stride() == p.stride()


def test_rate_changes_as_number_and_as_tensor(device):
    nets = [network(device) for _ in range(2)]
    tensor = torch.tensor(1e-2, dtype=torch.float64, device=device)
    optimizers = FlatAdam(nets[0].parameters(), 1e-2), FlatAdam(nets[1].parameters(), tensor)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 2)
    optimizers[0].param_groups[0]["lr"] = 1e-3
    tensor.fill_(1e-3)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 2, first=2)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@impls
def test_autograd_notices_the_update(impl, device):
    net = network(device)
    optimizer = FlatAdam(net.parameters(), impl=impl)
    train(net, optimizer, 1)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    loss = net(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_flat_adam_refuses(device):
    net = network(device)
    optimizer = FlatAdam(net.parameters())
    with pytest.raises(RuntimeError, match=r"parameter 0, \[5, 3, 3, 3\], has no gradient"):
        optimizer.step()
    variant = torch.optim.Adam(network(device).parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="FlatAdam has no amsgrad"):
        optimizer.load_state_dict(variant.state_dict())
    with pytest.raises(ValueError, match="FlatAdam has no weight_decay"):
        FlatAdam([{"params": list(network(device).parameters()), "weight_decay": 0.1}])
    with pytest.raises(TypeError, match="float32"):
        FlatAdam(network(device).bfloat16().parameters())
    train(net, optimizer, 1)
    optimizer.state[net[0].weight] = {}
    with pytest.raises(ValueError, match="equally many updates"):
        train(net, optimizer, 1)
    net, optimizer = network(device), FlatAdam(network(device).parameters())
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
        p.data = p.data.clone()
    with pytest.raises(RuntimeError, match="has left its flat buffer"):
        optimizer.step()


@impls
def test_nothing_moves_while_skip_is_set(impl, device):
    """Not even by gradients that are not numbers; and afterwards it is as if there had been no such update."""
    net, theirs = network(device), network(device)
    optimizer, other = (FlatAdam(n.parameters(), copy_dtype=torch.bfloat16, impl=impl) for n in (net, theirs))
    optimizer.found_inf = torch.zeros((), device=device)
    train(net, optimizer, 2)
    optimizer.found_inf.fill_(1)
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    optimizer.found_inf.zero_()
    train(net, optimizer, 2, first=2)
    train(theirs, other, 4)
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.copies[p], other.copies[q])
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


@impls
def test_gradients_of_copies_count_as_the_parameters(impl, device):
    net, theirs = network(device), network(device)
    optimizer = FlatAdam(net.parameters(), copy_dtype=torch.float32, impl=impl)
    other = FlatAdam(theirs.parameters(), impl=impl)
    for i in range(3):
        train(theirs, other, 1, first=i)
        torch.manual_seed(i)
        x = torch.randn(4, 3, 5, 5, device=device)
        optimizer.zero_grad()
        copies = {name: optimizer.copies[p] for name, p in net.named_parameters() if name != "3.bias"}
        torch.func.functional_call(net, copies, x).square().mean().backward()
        assert net[0].weight.grad is None and net[3].bias.grad is not None
        optimizer.step()
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_flat_tensors_hold_all_parameters_in_order(device):
    net, theirs = network(device), network(device)
    optimizer = FlatAdam(groups(net))
    pairs = optimizer.twins(list(theirs.parameters()))
    for (twin, flat), layer, other in zip(pairs, (net[0], net[3]), (theirs[0], theirs[3]), strict=True):
        assert torch.equal(twin, flat)
        flat.fill_(7)
        twin.fill_(5)
        assert all((p == 7).all() for p in layer.parameters()) and all((p == 5).all() for p in other.parameters())
    net(torch.ones(1, 3, 5, 5, device=device)).sum().backward()
    first, second = optimizer.gather()
    for flat, layer in ((first, net[0]), (second, net[3])):
        for parameters in ([layer.weight], [layer.bias], [layer.weight, layer.bias]):
            place = flat[optimizer.slice_of(parameters)]
            assert place.square().sum().item() == pytest.approx(sum(p.grad.square().sum().item() for p in parameters))
    with pytest.raises(ValueError):
        optimizer.slice_of(list(theirs.parameters()))
