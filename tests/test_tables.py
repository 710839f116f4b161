"""The tables against the paper's and the authors' published configuration, written down here a second time."""

import dataclasses

import pytest
import torch

from ali_dist.describe import describe
from ali_dist.nets import ALI
from ali_dist.recipes import CONDITIONAL, RECIPES, SEMI_SUPERVISED
from ali_dist.tables import BN_EPS, BN_MOMENTUM, INIT_STD, NETWORKS, Row, plane_shapes

PARTS = ("encoder", "decoder", "discriminator_x", "discriminator_z", "discriminator_joint")
PARAMETERS = {
    "tinyimagenet": (7_812_352, 3_164_224, 2_036_416, 4_722_688, 26_226_689),
    "celeba": (6_794_880, 11_811_392, 6_532_160, 1_310_720, 7_346_177),
    "svhn": (3_315_488, 1_767_584, 2_789_632, 394_240, 2_100_225),
    "cifar10": (3_118_496, 981_152, 1_396_032, 163_840, 1_051_137),
}
# kernel/stride/maps of each row; of D_x, D_z and D together also batch norm (B), bias (b) and dropout
GENERATORS = {
    "tinyimagenet": (
        "4/2/64 4/1/64 4/2/128 4/1/128 4/2/256 4/1/256 1/1/2048 1/1/2048 1/1/512",
        "1/1/2048 1/1/256 T4/1/256 T4/2/128 T4/1/128 T4/2/64 T4/1/64 T4/2/64 1/1/3",
    ),
    "celeba": (
        "2/1/64 7/2/128 5/2/256 7/2/256 4/1/512 1/1/512",
        "T4/1/512 T7/2/256 T5/2/256 T7/2/128 T2/1/64 1/1/3",
    ),
    "svhn": (
        "5/1/32 4/2/64 4/1/128 4/2/256 4/1/512 1/1/512 1/1/512",
        "T4/1/256 T4/2/128 T4/1/64 T4/2/32 T5/1/32 1/1/32 1/1/3",
    ),
    "cifar10": (
        "5/1/32 4/2/64 4/1/128 4/2/256 4/1/512 1/1/512 1/1/128",
        "T4/1/256 T4/2/128 T4/1/64 T4/2/32 T5/1/32 1/1/32 1/1/3",
    ),
}
DISCRIMINATORS = {
    "tinyimagenet": (
        "4/2/64-b-0.2 4/1/64-B-0.2 4/2/128-B-0.2 4/1/128-B-0.2 4/2/256-B-0.2 4/1/256-B-0.2",
        "1/1/2048-b-0.2 1/1/2048-b-0.2",
        "1/1/4096-b-0.2 1/1/4096-b-0.2 1/1/1-b-0.2",
    ),
    "celeba": (
        "2/1/64-b-0.2 7/2/128-B-0.2 5/2/256-B-0.2 7/2/256-B-0.2 4/1/512-B-0.2",
        "1/1/1024--0.2 1/1/1024--0.2",
        "1/1/2048-b-0.2 1/1/2048-b-0.2 1/1/1-b-0.2",
    ),
    "svhn": (
        "5/1/32-b-0.2 4/2/64-B-0.2 4/1/128-B-0.2 4/2/256-B-0.2 4/1/512-B-0.2",
        "1/1/512-b-0.2 1/1/512-b-0.2",
        "1/1/1024-b-0.2 1/1/1024-b-0.2 1/1/1-b-0.2",
    ),
    "cifar10": (
        "5/1/32-b-0.2 4/2/64-b-0.5 4/1/128-b-0.5 4/2/256-b-0.5 4/1/512-b-0.5",
        "1/1/512--0.2 1/1/512--0.5",
        "1/1/1024-b-0.5 1/1/1024-b-0.5 1/1/1-b-0.5",
    ),
}
SIZES = {  # of the planes after each of the encoder's and the decoder's rows
    "tinyimagenet": ((31, 28, 13, 10, 4, 1, 1, 1, 1), (1, 1, 4, 10, 13, 28, 31, 64, 64)),
    "celeba": ((63, 29, 13, 4, 1, 1), (4, 13, 29, 63, 64, 64)),
    "svhn": ((28, 13, 10, 4, 1, 1, 1), (4, 10, 13, 28, 32, 32, 32)),
    "cifar10": ((28, 13, 10, 4, 1, 1, 1), (4, 10, 13, 28, 32, 32, 32)),
}
IMAGE_LATENT_SLOPE = {
    "tinyimagenet": ((3, 64, 64), 256, 0.01),
    "celeba": ((3, 64, 64), 256, 0.02),
    "svhn": ((3, 32, 32), 256, 0.01),
    "cifar10": ((3, 32, 32), 64, 0.1),
    "digits": ((1, 32, 32), 64, 0.01),
}
PAPER = sorted(PARAMETERS)


def geometry(row: Row) -> str:
    return f"{'T' if row.transposed else ''}{row.kernel}/{row.stride}/{row.maps}"


def columns(row: Row) -> str:
    norm_or_bias = ("B" if row.bn else "") + {"none": "", "channel": "b", "pixel": "untied"}[row.bias]
    return f"{geometry(row)}-{norm_or_bias}-{row.dropout}"


def counts(model: ALI) -> tuple[int, ...]:
    d = model.discriminator
    return tuple(sum(p.numel() for p in m.parameters()) for m in (model.encoder, model.decoder, d.x, d.z, d.joint))


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        assert counts(ALI(NETWORKS[name])) == PARAMETERS[name]
    networks = describe(NETWORKS[name])["networks"]
    assert tuple(networks[part]["parameters"] for part in PARTS) == PARAMETERS[name]


def test_parameter_counts_of_conditional_celeba_are_the_papers():
    """The last layer of G_z, the first of G_x and the first joint one take 256 numbers more; y has 40 attributes."""
    nets = NETWORKS["celeba-conditional"]
    with torch.device("meta"):
        model = ALI(nets)
    expected = (6_925_952, 13_908_544, *PARAMETERS["celeba"][2:4], 7_870_465)
    assert counts(model) == expected
    assert {name: tuple(buffer.shape) for name, buffer in model.embedding.named_buffers()} == {
        "weight": (256, 40),
        "bias": (256,),
    }
    assert not list(model.embedding.parameters())
    networks = describe(nets)["networks"]
    assert tuple(networks[part]["parameters"] for part in PARTS) == expected
    assert networks["embedding"]["parameters"] == 10_496
    assert RECIPES["celeba"].optim.batch_size == 100 and CONDITIONAL["celeba"].optim.batch_size == 128


@pytest.mark.parametrize("name", sorted(CONDITIONAL))
def test_conditional_networks_differ_at_three_rows_alone(name):
    plain, given = NETWORKS[RECIPES[name].networks], NETWORKS[CONDITIONAL[name].networks]
    assert given.labels == {"celeba": 40, "tinyimagenet": 200, "imagenet64": 1000}.get(name, 10)
    places = set()
    for part, (_, rows) in given.parts().items():
        if part == "embedding":
            continue
        for i, (row, other) in enumerate(zip(rows, plain.parts()[part][1], strict=True)):
            if row.embedding:
                places.add((part, i - len(rows) if part == "encoder" else i))
            assert row.embedding in (0, given.latent) and dataclasses.replace(row, embedding=0) == other
    assert places == {("encoder", -1), ("decoder", 0), ("discriminator_joint", 0)}


@pytest.mark.parametrize("name", ["svhn", "cifar10"])
def test_a_d_of_classes_has_that_many_logits(name):
    """Nine logits more, each with a weight for every map of the layer before and a bias."""
    plain, classes = NETWORKS[name], NETWORKS[f"{name}-classes"]
    assert (plain.classes, classes.classes) == (0, 10)
    with torch.device("meta"):
        mine, theirs = counts(ALI(classes)), counts(ALI(plain))
    width = plain.discriminator_joint[-2].out_maps
    assert mine == (*theirs[:-1], theirs[-1] + 9 * (width + 1))
    assert describe(classes)["networks"]["discriminator_joint"]["parameters"] == mine[-1]
    assert SEMI_SUPERVISED[name].networks == f"{name}-classes"


@pytest.mark.parametrize("name", PAPER)
def test_generators_rows_are_the_papers(name):
    nets = NETWORKS[name]
    for rows, expected in zip((nets.encoder, nets.decoder), GENERATORS[name], strict=True):
        assert " ".join(map(geometry, rows)) == expected
        assert all(row.bn and row.act == "lrelu" and row.bias == "none" for row in rows[:-1])
        assert not any(row.dropout for row in rows)
        assert not rows[-1].bn
    assert (nets.encoder[-1].act, nets.encoder[-1].bias) == ("linear", "channel")
    assert (nets.decoder[-1].act, nets.decoder[-1].bias) == ("sigmoid", "pixel")


@pytest.mark.parametrize("name", PAPER)
def test_discriminators_rows_are_the_papers(name):
    nets = NETWORKS[name]
    parts = (nets.discriminator_x, nets.discriminator_z, nets.discriminator_joint)
    assert tuple(" ".join(map(columns, rows)) for rows in parts) == DISCRIMINATORS[name]
    hidden = [row for rows in parts for row in rows][:-1]
    assert {row.act for row in hidden} == {"maxout" if name == "cifar10" else "lrelu"}
    assert nets.discriminator_joint[-1].act == "linear"


@pytest.mark.parametrize("name", sorted(IMAGE_LATENT_SLOPE))
def test_image_latent_and_slope(name):
    nets = NETWORKS[name]
    assert (nets.image, nets.latent, nets.slope) == IMAGE_LATENT_SLOPE[name]
    assert nets.encoder[-1].maps == 2 * nets.latent


@pytest.mark.parametrize("name", PAPER)
def test_planes_have_the_papers_sizes(name):
    nets, latent = NETWORKS[name], NETWORKS[name].latent
    for rows, shape, sizes in zip((nets.encoder, nets.decoder), (nets.image, (latent, 1, 1)), SIZES[name], strict=True):
        assert [(h, w) for _, h, w in plane_shapes(shape, rows)] == [(size, size) for size in sizes]


def test_shared_constants():
    assert (BN_EPS, BN_MOMENTUM, INIT_STD) == (1e-4, 0.05, 0.01)


def test_recipes_have_the_papers_hyperparameters():
    batch_and_images = {
        "tinyimagenet": (128, 125 * 100_000),
        "imagenet64": (128, 125 * 1_281_167),
        "celeba": (100, 123 * 162_770),
        "svhn": (100, 100 * 531_131),
        "cifar10": (100, 6475 * 45_000),
    }
    assert set(RECIPES) == {*batch_and_images, "digits", "folder"}
    for name, (batch_size, num_images) in batch_and_images.items():
        recipe = RECIPES[name]
        optim = recipe.optim
        assert (optim.lr, optim.beta1, optim.beta2, optim.adam_eps) == (1e-4, 0.5, 0.999, 1e-8)
        assert (optim.batch_size, optim.accumulate, recipe.precision) == (batch_size, 1, "fp32")
        assert recipe.schedule.num_images == num_images
        assert recipe.schedule.validate_count == 5_000
        assert recipe.networks == ("tinyimagenet" if name == "imagenet64" else name)


def test_a_kernel_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="4x4 kernel does not fit a 3x3 plane"):
        Row(4, 1, 8).out_size(3)


def test_maxout_halves_the_maps():
    assert Row(1, 1, 512, bn=False, act="maxout").out_maps == 256
    assert Row(1, 1, 512).out_maps == 512


def test_a_row_has_a_bias_exactly_when_it_has_no_batch_norm():
    assert Row(1, 1, 8).bias == "none"
    assert Row(1, 1, 8, bn=False).bias == "channel"
    assert Row(1, 1, 8, bn=False, bias="none").bias == "none"
