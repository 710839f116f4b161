import math

import pytest
import torch
import torch.nn.functional as F
from support import SMALL

from ali_dist.layers import Chain, Layer, Wiring
from ali_dist.losses import evidence
from ali_dist.nets import ALI
from ali_dist.recipes import CONDITIONAL, RECIPES
from ali_dist.tables import NETWORKS, Row, plane_shapes
from kernels.random import keep_mask


def layer(row: Row, channels: int, size: int, slope: float = 0.1) -> Layer:
    """In float64 with random weights."""
    made = Layer(row, (channels, size, size), 0.0, 0, Wiring(slope)).double()
    made.reset_parameters()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def model(mean: float | torch.Tensor = 0.5, nets=SMALL) -> ALI:
    made = ALI(nets)
    made.reset_parameters(torch.as_tensor(mean).expand(nets.image))
    return made


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *CONDITIONAL.values()], ids=lambda recipe: recipe.networks)
def test_shapes_on_the_meta_device(recipe, monkeypatch):
    nets, seen = NETWORKS[recipe.networks], {}

    def recorded(convolve):
        def run(layer, x, *settings, **named):
            out = convolve(layer, x, *settings, **named)
            assert out.shape[1] == layer.row.maps
            seen[layer] = (len(out), layer.row.out_maps, *out.shape[2:])
            return out

        return run

    monkeypatch.setattr(Layer, "convolve", recorded(Layer.convolve))
    with torch.device("meta"):
        built = ALI(nets)
        built.reset_parameters(torch.empty(nets.image))
        noise = torch.empty(2, 5, nets.latent)
        y = torch.empty(5, nets.labels)
        out = built(torch.empty(5, *nets.image), *noise, torch.empty(2, dtype=torch.int64), y)
    expected = []
    for part, (shape, rows) in nets.parts().items():
        if part == "embedding":
            continue
        expected += [(10 if part.startswith("discriminator") else 5, *shape) for shape in plane_shapes(shape, rows)]
    expected.remove((5, *nets.image))  # the decoder's head is one op with what comes before it
    assert sorted(seen.values()) == sorted(expected)
    assert out.logits_q.shape == out.logits_p.shape == (5,)
    assert out.mu.shape == out.log_sigma.shape == out.z_hat.shape == (5, nets.latent)
    assert out.x_tilde.shape == (5, *nets.image)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", ["none", "channel"])
@pytest.mark.parametrize(
    "kernel, stride, transposed, size",
    [
        *[(1, 1, False, 1), (4, 1, False, 4), (4, 2, False, 4), (7, 2, False, 7), (3, 1, False, 3)],
        *[(1, 1, False, 6), (4, 2, False, 9), (5, 1, False, 8), (2, 1, False, 5)],
        *[(1, 1, True, 1), (4, 1, True, 1), (4, 2, True, 1), (2, 1, True, 1)],
        *[(4, 2, True, 4), (5, 1, True, 3), (7, 2, True, 2), (4, 1, True, 4)],
    ],
)
def test_layer_is_the_convolution(kernel, stride, transposed, size, bias, memory_format):
    row = Row(kernel, stride, 6, bn=False, act="linear", bias=bias, transposed=transposed)
    mine = layer(row, 5, size).to(memory_format=memory_format)
    x = torch.randn(3, 5, size, size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    convolution = F.conv_transpose2d if transposed else F.conv2d
    expected = convolution(x, mine.weight, mine.bias, stride=stride)
    got = mine(x)
    assert got.shape == expected.shape == (3, *plane_shapes((5, size, size), [row])[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    wanted = [x, *mine.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_maxout_is_the_greater_of_adjacent_maps():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    mine = layer(Row(3, 1, 6, bn=False, act="maxout"), 4, 5)
    maps = F.conv2d(x, mine.weight, mine.bias)
    expected = torch.stack([torch.maximum(maps[:, i], maps[:, i + 1]) for i in (0, 2, 4)], dim=1)
    torch.testing.assert_close(mine(x), expected, rtol=0, atol=1e-12)


def test_untied_bias_and_sigmoid():
    mine = layer(Row(1, 1, 2, bn=False, act="sigmoid", bias="pixel"), 3, 4)
    assert mine.bias.shape == (2, 4, 4)
    x = torch.randn(5, 3, 4, 4)
    mine.float()
    torch.testing.assert_close(mine(x), torch.sigmoid(F.conv2d(x, mine.weight) + mine.bias[None]))


def test_leaky_relu_has_the_networks_slope():
    mine = layer(Row(1, 1, 4, bn=False), 3, 2, slope=0.25)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    y = F.conv2d(x, mine.weight, mine.bias)
    torch.testing.assert_close(mine(x), torch.where(y > 0, y, 0.25 * y), rtol=0, atol=1e-14)
    for name in ("tinyimagenet", "celeba", "svhn", "cifar10"):
        with torch.device("meta"):
            layers = [module for module in ALI(NETWORKS[name]).modules() if isinstance(module, Layer)]
        assert {layer.wiring.slope for layer in layers} == {NETWORKS[name].slope}
        assert {layer.bn.slope for layer in layers if layer.bn} == {NETWORKS[name].slope}


def test_batch_norm_in_training_and_evaluation():
    mine = layer(Row(3, 1, 4), 3, 5)
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, mine.weight)
    rows = y.transpose(0, 1).flatten(1)
    mean, var = rows.mean(1), rows.var(1, correction=0)
    scale, shift = mine.bn.weight.view(-1, 1, 1), mine.bn.bias.view(-1, 1, 1)

    def norm(mean, var):
        return F.leaky_relu((y - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-4).sqrt() * scale + shift, 0.1)

    torch.testing.assert_close(mine(x), norm(mean, var), rtol=0, atol=1e-11)
    torch.testing.assert_close(mine.bn.running_mean, 0.05 * mean, rtol=0, atol=1e-12)
    unbiased = rows.var(1, correction=1)
    torch.testing.assert_close(mine.bn.running_var, 0.95 + 0.05 * unbiased, rtol=0, atol=1e-12)
    assert mine.bn.num_batches_tracked == 1
    before = mine.bn.running_mean.clone(), mine.bn.running_var.clone()
    mine.eval()
    torch.testing.assert_close(mine(x), norm(*before), rtol=0, atol=1e-11)
    assert torch.equal(mine.bn.running_mean, before[0]) and torch.equal(mine.bn.running_var, before[1])
    assert mine.bn.num_batches_tracked == 1


@pytest.mark.parametrize("act", ["lrelu", "maxout"])
@pytest.mark.parametrize("bn", [False, True])
def test_a_layer_draws_the_next_ones_input_dropout_in_training_only(act, bn):
    if act == "maxout" and bn:
        return
    rows = (Row(1, 1, 8, bn=bn, act=act), Row(1, 1, 1, bn=False, dropout=0.25, act="linear"))
    chain, rng = Chain(((1, 64, 64), rows), Wiring(0.5), offset=3).double(), torch.tensor([1, 2])
    chain.apply(lambda module: module.reset_parameters() if isinstance(module, Layer) else None)
    x = torch.rand(2, 1, 64, 64, dtype=torch.float64) + 1
    hidden = chain[0](x, rng)
    plain = chain[0].eval()(x) if not bn else None
    assert 0.2 < (hidden == 0).double().mean() < 0.3
    if plain is not None:
        torch.testing.assert_close(hidden, plain * keep_mask(plain, 0.25, rng, 3) / 0.75)
        assert (plain != 0).all()
    assert torch.equal(chain.train()(x, rng), chain[1](hidden))


def test_every_rows_dropout_is_somebodys():
    """The tables' input dropout: D's two inputs by `ALI.forward`, each other row's by the layer before it."""
    for name, nets in NETWORKS.items():
        with torch.device("meta"):
            d = ALI(nets).discriminator
        for chain, rows in ((d.x, nets.discriminator_x), (d.z, nets.discriminator_z)):
            assert [layer.dropout for layer in chain][:-1] == [row.dropout for row in rows[1:]], name
            assert chain[-1].dropout == nets.discriminator_joint[0].dropout
        assert [layer.dropout for layer in d.joint] == [*(row.dropout for row in nets.discriminator_joint[1:]), 0]
        offsets = [layer.offset for chain in (d.x, d.z, d.joint) for layer in chain]
        assert offsets == list(range(2, 2 + len(offsets)))
        assert all(layer.bn is None or layer.bn.dropout == layer.dropout for layer in d.x)


def test_initialisation():
    made = model(nets=NETWORKS["digits"])
    weights = torch.cat([m.weight.flatten() for m in made.modules() if isinstance(m, Layer)])
    assert abs(weights.mean().item()) < 5e-5
    assert abs(weights.std().item() - 0.01) < 1e-4
    last = made.decoder[-1]
    for module in made.modules():
        if isinstance(module, Layer):
            assert module is last or module.bias is None or not module.bias.any()
            if module.bn:
                assert (module.bn.eps, module.bn.momentum) == (1e-4, 0.05)
                assert (module.bn.weight == 1).all() and not module.bn.bias.any()
                assert not module.bn.running_mean.any() and (module.bn.running_var == 1).all()


def test_output_bias_is_the_log_odds_of_the_mean_image():
    mean = torch.rand(SMALL.image, dtype=torch.float64)
    mean[0, 0, :2] = torch.tensor([0.0, 1.0])
    bias = model(mean).decoder[-1].bias
    clipped = mean.clamp(1e-7, 1 - 1e-7)
    torch.testing.assert_close(bias.double(), torch.log(clipped / (1 - clipped)), rtol=1e-6, atol=1e-6)
    assert bias[0, 0, :2].tolist() == pytest.approx([-16.118095, 16.118095])


def test_one_pass_of_d_over_both_halves():
    made, seen = model(nets=NETWORKS["small-dry"]), []
    nets = made.nets
    x, (z, eps) = torch.rand(3, *nets.image), torch.randn(2, 3, nets.latent)
    made.discriminator.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    out = made(x, z, eps)
    ((stacked_x, stacked_z, *_), (logits, _)), *more = seen
    assert not more
    assert torch.equal(stacked_x, torch.cat([x, out.x_tilde]))
    assert torch.equal(stacked_z.flatten(1), torch.cat([out.z_hat, z]))
    assert torch.equal(torch.cat([out.logits_q, out.logits_p]), logits)
    assert torch.equal(out.z_hat, out.mu + out.log_sigma.exp() * eps)


def test_the_encoder_ends_in_mu_then_log_sigma():
    made = model().eval()
    x = torch.rand(3, *SMALL.image)
    mu, log_sigma = made.encode(x)
    assert torch.equal(torch.cat([mu, log_sigma], dim=1), made.encoder(x).flatten(1))


def test_running_statistics_are_the_joint_batchs():
    """D's first batch norm sees q's and p's halves as one batch, not one after the other."""
    made = model(nets=NETWORKS["small-dry"])
    inputs = []
    made.discriminator.x[1].bn.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    made(torch.rand(4, *SMALL.image), *torch.randn(2, 4, SMALL.latent))
    (both,) = inputs
    assert len(both) == 8
    bn = made.discriminator.x[1].bn
    assert bn.num_batches_tracked == 1
    torch.testing.assert_close(bn.running_mean, 0.05 * both.mean((0, 2, 3)))


@pytest.mark.parametrize("name", ["small-conditional", "cifar10-conditional"])
def test_y_changes_what_every_network_says(name):
    made = model(nets=NETWORKS[name]).eval()
    nets = made.nets
    for module in made.modules():
        if isinstance(module, Layer):  # so that features stay alive without their batch's statistics
            torch.nn.init.normal_(module.weight, std=2 * module.weight[0].numel() ** -0.5)
    made.embedding.weight.mul_(100)
    x, z = torch.rand(1, *nets.image).expand(3, -1, -1, -1), torch.randn(1, nets.latent).expand(3, -1)
    y = torch.tensor([2, 2, 7])
    for out in (made.encode(x, y)[0], made.encode(x, y)[1], made.decode(z, y), made.score(x, z, y)):
        torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-5)
        assert (out[0] - out[2]).abs().max() > 1e-3
    # The same numbers as attributes, of which several may be 1
    one_hot = F.one_hot(y, nets.labels).to(torch.uint8)
    torch.testing.assert_close(made.decode(z, one_hot), made.decode(z, y))
    one_hot[0, 5] = 1
    assert (made.decode(z, one_hot)[0] - made.decode(z, y)[0]).abs().max() > 1e-4


def test_both_pairs_of_d_are_given_the_same_y(monkeypatch):
    made, seen = model(nets=NETWORKS["small-conditional-dry"]), []
    made.discriminator.register_forward_hook(lambda module, args, out: seen.append(args))
    y = torch.tensor([1, 4, 9])
    made(torch.rand(3, *made.nets.image), *torch.randn(2, 3, made.nets.latent), y=y)
    c = seen[0][3].flatten(1)
    expected = made.embedding.weight.T[y] + made.embedding.bias
    torch.testing.assert_close(c, torch.cat([expected, expected]))
    assert 0.005 < made.embedding.weight.std() < 0.02 and not made.embedding.bias.any()


def test_unconditional_networks_do_not_look_at_y():
    made = model().eval()
    z = torch.randn(3, SMALL.latent)
    assert torch.equal(made.decode(z, torch.tensor([1, 2, 3])), made.decode(z))
    assert "embedding" not in " ".join(made.state_dict())


def test_the_embeddings_size_is_the_recipes():
    made = ALI(NETWORKS["celeba-conditional"])
    for recipe, std in ((CONDITIONAL["celeba"], 0.01), (CONDITIONAL["cifar10"], 1.0)):
        assert recipe.embedding_std == std
        made.reset_parameters(torch.full(made.nets.image, 0.5), recipe.embedding_std)
        assert made.embedding.weight.std().item() == pytest.approx(std, rel=0.05) and not made.embedding.bias.any()
        assert made.encoder[1].weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_bounded_sigma():
    """log_sigma = m - softplus(m - raw, beta 4), with m the bound's logarithm; mu is left alone."""
    free, bounded = ALI(SMALL).double(), ALI(SMALL, max_sigma=2.0).double()
    free.reset_parameters(torch.full(SMALL.image, 0.5))
    with torch.no_grad():
        free.encoder[-1].bias[SMALL.latent :].copy_(torch.linspace(-2, 3, SMALL.latent))
    bounded.load_state_dict(free.state_dict())
    x = torch.rand(4, *SMALL.image, dtype=torch.float64)
    (mu, raw), (same_mu, log_sigma) = free.eval().encode(x), bounded.eval().encode(x)
    bound = math.log(2)
    assert torch.equal(mu, same_mu) and raw.max() > bound + 2 > bound - 2 > raw.min()
    expected = bound - (4 * (bound - raw)).exp().add(1).log() / 4
    torch.testing.assert_close(log_sigma, expected, rtol=1e-9, atol=1e-12)
    assert log_sigma.max() < bound
    (slope,) = torch.autograd.grad(log_sigma.sum(), bounded.encoder[-1].bias)
    assert (slope.flatten()[SMALL.latent :] > 0).all()  # one that is far above still finds back


def test_a_discriminator_of_classes_begins_undecided():
    nets = NETWORKS["cifar10-classes"]
    d = model(nets=nets).discriminator.eval()
    logits, _ = d(torch.rand(2, *nets.image), torch.randn(2, nets.latent, 1, 1))
    torch.testing.assert_close(evidence(logits), torch.zeros(2), rtol=0, atol=1e-4)
