import pytest
import torch
from kernel_checks import run

from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout
from kernels.random import dropout_ref, dropout_scale, dropout_threshold, keep_mask, philox

ZEROS, ONES = ([0] * 4, [0] * 2), ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2)
PI = ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [  # the known answers published with Random123
        (7, *ZEROS, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (7, *ONES, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (7, *PI, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
        (10, *ZEROS, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (10, *ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (10, *PI, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_known_answers(rounds, counter, key, expected):
    c0, c1, c2, c3 = counter
    words = philox(torch.tensor([[c0], [c2]]), torch.tensor([[c1], [c3]]), torch.tensor(key), rounds)
    assert torch.cat(words).tolist() == expected


@pytest.mark.parametrize("shape", ((4, 16, 5, 5), (3, 5, 7, 7), (9, 24), (7, 3), (2, 1, 3, 3)), ids=str)
@pytest.mark.parametrize("seed", (0, -1, 2**40 + 11))
def test_mask_is_the_same_in_triton_and_torch_in_every_layout(shape, seed, device):
    rng = torch.tensor([seed, 2**33 + 5], device=device)
    keep = keep_mask(torch.empty(shape, device=device), 0.3, rng, 7)
    layouts = [torch.ones(shape, device=device)]
    if len(shape) == 4:
        layouts.append(layouts[0].contiguous(memory_format=torch.channels_last))
    for x in layouts:
        y = bias_leaky_relu_dropout(x, None, dropout=0.3, rng=rng, offset=7, impl="triton")
        assert torch.equal(y != 0, keep)
        assert torch.equal(y, dropout_ref(x, 0.3, rng, 7))


def test_mask_backward_is_the_mask_forward(device):
    x = torch.ones(128, 64, device=device, requires_grad=True)
    inputs = {"x": x, "rng": torch.tensor([1, 2], device=device), "bias": None}
    seeds = [torch.ones_like(x)]
    both = run(bias_leaky_relu_dropout, inputs, seeds, dropout=0.5, impl="triton")
    assert torch.equal(both["out0"], both["dx"])


@pytest.mark.parametrize("p", (0.2, 0.5))
def test_mask_has_the_mean_and_is_independent(p):
    """Over seeds, steps, offsets and neighbours: shares within 5 standard deviations, correlations likewise."""
    x = torch.empty(2**18 + 5, 1)
    draws = [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1 + 2**32, 0, 0), (1, 2**32, 0)]
    masks = torch.stack([keep_mask(x, p, torch.tensor([s, t]), o).flatten().double() for s, t, o in draws])
    n, kept = x.numel(), 1 / dropout_scale(p)
    assert ((masks.mean(1) - kept).abs() <= 5 * (p * (1 - p) / n) ** 0.5).all()
    rows = torch.cat([masks[:, :-8], masks[:1, 1:-7], masks[:1, 8:]])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() <= 5 / n**0.5


def test_the_same_seed_and_step_draw_the_same_mask_again():
    x, rng = torch.empty(64, 64), torch.tensor([5, 9])
    first = keep_mask(x, 0.2, rng, 3)
    rng[1] += 1
    assert not torch.equal(keep_mask(x, 0.2, rng, 3), first)
    assert torch.equal(keep_mask(x, 0.2, torch.tensor([5, 9]), 3), first)


def test_refuses_what_it_cannot_draw(device):
    x, rng = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    assert dropout_threshold(0.2) == 13107
    for arguments in (
        {"dropout": 1.0, "rng": rng},
        {"dropout": -0.1, "rng": rng},
        {"dropout": 0.2},
        {"dropout": 0.2, "rng": rng.int()},
        {"dropout": 0.2, "rng": rng, "offset": 2**31},
    ):
        with pytest.raises(ValueError, match="dropout"):
            bias_leaky_relu_dropout(x, None, **arguments)
