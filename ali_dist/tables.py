"""The networks of ALI as tables, one `Row` per line of the paper's tables (arXiv:1606.00704, appendix A).

Where the paper's tables and the authors' own code differ, the code's value stands, because it made the published
results; a comment at the row says so. The running size of the square plane is written beside each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

BN_EPS = 1e-4
BN_MOMENTUM = 0.05  # new = 0.95 * old + 0.05 * batch
INIT_STD = 0.01  # weights ~ N(0, 0.01^2), biases 0

Activation = Literal["lrelu", "maxout", "linear", "sigmoid"]
Bias = Literal["none", "channel", "pixel"]


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: input dropout, a valid (transposed) convolution, batch norm or bias, an activation.

    `maps` counts the convolution's feature maps; maxout with 2 pieces halves them. `bias` is one number a channel, or
    one a channel and pixel (untied), or none: by default a layer has a bias exactly when it has no batch norm. The
    label's embedding lies beside the input along channels, `embedding` of them, in conditional networks.
    """

    kernel: int
    stride: int
    maps: int
    bn: bool = True
    dropout: float = 0.0
    act: Activation = "lrelu"
    bias: Bias | None = None
    transposed: bool = False
    embedding: int = 0

    def __post_init__(self) -> None:
        if self.bias is None:
            object.__setattr__(self, "bias", "none" if self.bn else "channel")
        if self.bn and (self.act != "lrelu" or self.bias != "none"):
            raise ValueError(f"a layer with batch norm is leaky ReLU without bias, not {self}")

    @property
    def out_maps(self) -> int:
        return self.maps // 2 if self.act == "maxout" else self.maps

    def out_size(self, size: int) -> int:
        """Side of the output plane for an input plane of side `size`; ValueError when the kernel does not fit."""
        if self.transposed:
            return (size - 1) * self.stride + self.kernel
        if size < self.kernel:
            raise ValueError(f"a {self.kernel}x{self.kernel} kernel does not fit a {size}x{size} plane")
        return (size - self.kernel) // self.stride + 1


def T(kernel: int, stride: int, maps: int) -> Row:
    """A transposed convolution with batch norm and leaky ReLU."""
    return Row(kernel, stride, maps, transposed=True)


def plain(kernel: int, stride: int, maps: int, dropout: float = 0.0, **columns: object) -> Row:
    """A convolution without batch norm, with a bias unless said otherwise."""
    return Row(kernel, stride, maps, bn=False, dropout=dropout, **columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """G_z (encoder), G_x (decoder) and the three parts of D, for images of shape `image` = (C, H, W).

    The encoder ends in 2 * latent maps, [mu, log_sigma] along channels. The joint network's input is D_x's features
    beside D_z's along channels. Conditional networks are given `labels` numbers y: a class one-hot, or attributes.
    """

    image: tuple[int, int, int]
    latent: int
    slope: float
    encoder: tuple[Row, ...]
    decoder: tuple[Row, ...]
    discriminator_x: tuple[Row, ...]
    discriminator_z: tuple[Row, ...]
    discriminator_joint: tuple[Row, ...]
    labels: int = 0

    @property
    def classes(self) -> int:
        """Classes of data that D tells apart; 0 where it has one logit."""
        logits = self.discriminator_joint[-1].maps
        return logits if logits > 1 else 0

    @property
    def judges_pairs_alone(self) -> bool:
        """Whether D's logit of a pair depends on no other pair: D has no batch norm."""
        return not any(row.bn for row in (*self.discriminator_x, *self.discriminator_z, *self.discriminator_joint))

    def parts(self) -> dict[str, tuple[tuple[int, int, int], tuple[Row, ...]]]:
        """Name -> (input shape (C, H, W), rows), in the order in which data flows."""
        joint = self.discriminator_x[-1].out_maps + self.discriminator_z[-1].out_maps
        latent = (self.latent, 1, 1)
        embedding = {"embedding": ((self.labels, 1, 1), (linear_head(self.encoder[-1].embedding),))}
        return {
            **(embedding if self.labels else {}),
            "encoder": (self.image, self.encoder),
            "decoder": (latent, self.decoder),
            "discriminator_x": (self.image, self.discriminator_x),
            "discriminator_z": (latent, self.discriminator_z),
            "discriminator_joint": ((joint, 1, 1), self.discriminator_joint),
        }


def plane_shapes(shape: tuple[int, int, int], rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """The (C, H, W) after each row, for an input of `shape`."""
    shapes = []
    for row in rows:
        shape = (row.out_maps, row.out_size(shape[1]), row.out_size(shape[2]))
        shapes.append(shape)
    return shapes


def image_head(channels: int) -> Row:
    """The decoder's last layer: 1x1 convolution, untied bias, sigmoid."""
    return Row(1, 1, channels, bn=False, act="sigmoid", bias="pixel")


def linear_head(maps: int, dropout: float = 0.0) -> Row:
    """The last layer of the encoder (2 * latent maps) and of the joint network (1 map: the logit)."""
    return plain(1, 1, maps, dropout, act="linear")


def conditional(nets: Networks, labels: int) -> Networks:
    """The networks given y: its linear embedding, as wide as z, at the three places of the paper's conditional CelebA.

    Beside the input of G_z's last layer, beside z for G_x, and beside D_x's and D_z's features for the joint layers.
    """

    def given(row: Row) -> Row:
        return replace(row, embedding=nets.latent)

    return replace(
        nets,
        labels=labels,
        encoder=(*nets.encoder[:-1], given(nets.encoder[-1])),
        decoder=(given(nets.decoder[0]), *nets.decoder[1:]),
        discriminator_joint=(given(nets.discriminator_joint[0]), *nets.discriminator_joint[1:]),
    )


def classifying(nets: Networks, classes: int) -> Networks:
    """The networks with a logit for each class instead of D's one; that of "generated" is 0 (see losses.py)."""
    *hidden, head = nets.discriminator_joint
    return replace(nets, discriminator_joint=(*hidden, replace(head, maps=classes)))


TINY_IMAGENET = Networks(
    image=(3, 64, 64),
    latent=256,
    slope=0.01,
    encoder=(
        Row(4, 2, 64),  # 31
        Row(4, 1, 64),  # 28
        Row(4, 2, 128),  # 13
        Row(4, 1, 128),  # 10
        Row(4, 2, 256),  # 4
        Row(4, 1, 256),  # 1
        Row(1, 1, 2048),
        Row(1, 1, 2048),
        linear_head(512),
    ),
    decoder=(
        Row(1, 1, 2048),  # 1
        Row(1, 1, 256),
        T(4, 1, 256),  # 4
        T(4, 2, 128),  # 10
        T(4, 1, 128),  # 13
        T(4, 2, 64),  # 28
        T(4, 1, 64),  # 31
        T(4, 2, 64),  # 64
        image_head(3),
    ),
    discriminator_x=(
        plain(4, 2, 64, 0.2),  # 31
        Row(4, 1, 64, dropout=0.2),  # 28
        Row(4, 2, 128, dropout=0.2),  # 13
        Row(4, 1, 128, dropout=0.2),  # 10
        Row(4, 2, 256, dropout=0.2),  # 4
        Row(4, 1, 256, dropout=0.2),  # 1
    ),
    discriminator_z=(plain(1, 1, 2048, 0.2), plain(1, 1, 2048, 0.2)),
    discriminator_joint=(plain(1, 1, 4096, 0.2), plain(1, 1, 4096, 0.2), linear_head(1, 0.2)),
)

CELEBA = Networks(
    image=(3, 64, 64),
    latent=256,
    slope=0.02,
    encoder=(
        Row(2, 1, 64),  # 63
        Row(7, 2, 128),  # 29
        Row(5, 2, 256),  # 13
        Row(7, 2, 256),  # 4
        Row(4, 1, 512),  # 1
        linear_head(512),
    ),
    decoder=(
        T(4, 1, 512),  # 4
        T(7, 2, 256),  # 13
        T(5, 2, 256),  # 29
        T(7, 2, 128),  # 63
        T(2, 1, 64),  # 64
        image_head(3),
    ),
    discriminator_x=(  # dropout 0.2 and no batch norm in the first row as in the code; the table says 0 and batch norm
        plain(2, 1, 64, 0.2),  # 63
        Row(7, 2, 128, dropout=0.2),  # 29
        Row(5, 2, 256, dropout=0.2),  # 13
        Row(7, 2, 256, dropout=0.2),  # 4
        Row(4, 1, 512, dropout=0.2),  # 1
    ),
    discriminator_z=(plain(1, 1, 1024, 0.2, bias="none"), plain(1, 1, 1024, 0.2, bias="none")),
    discriminator_joint=(plain(1, 1, 2048, 0.2), plain(1, 1, 2048, 0.2), linear_head(1, 0.2)),
)

SVHN = Networks(
    image=(3, 32, 32),
    latent=256,
    slope=0.01,
    encoder=(
        Row(5, 1, 32),  # 28
        Row(4, 2, 64),  # 13
        Row(4, 1, 128),  # 10
        Row(4, 2, 256),  # 4
        Row(4, 1, 512),  # 1
        Row(1, 1, 512),
        linear_head(512),
    ),
    decoder=(
        T(4, 1, 256),  # 4
        T(4, 2, 128),  # 10
        T(4, 1, 64),  # 13
        T(4, 2, 32),  # 28
        T(5, 1, 32),  # 32
        Row(1, 1, 32),
        image_head(3),
    ),
    discriminator_x=(
        plain(5, 1, 32, 0.2),  # 28
        Row(4, 2, 64, dropout=0.2),  # 13
        Row(4, 1, 128, dropout=0.2),  # 10
        Row(4, 2, 256, dropout=0.2),  # 4
        Row(4, 1, 512, dropout=0.2),  # 1
    ),
    discriminator_z=(plain(1, 1, 512, 0.2), plain(1, 1, 512, 0.2)),
    discriminator_joint=(plain(1, 1, 1024, 0.2), plain(1, 1, 1024, 0.2), linear_head(1, 0.2)),
)

CIFAR10 = replace(
    SVHN,
    latent=64,
    slope=0.1,
    encoder=(*SVHN.encoder[:-1], linear_head(128)),
    discriminator_x=(  # dropout as the paper's table; the authors' script drops elsewhere by a slip in its indices
        plain(5, 1, 32, 0.2, act="maxout"),  # 28
        plain(4, 2, 64, 0.5, act="maxout"),  # 13
        plain(4, 1, 128, 0.5, act="maxout"),  # 10
        plain(4, 2, 256, 0.5, act="maxout"),  # 4
        plain(4, 1, 512, 0.5, act="maxout"),  # 1
    ),
    discriminator_z=(
        plain(1, 1, 512, 0.2, act="maxout", bias="none"),
        plain(1, 1, 512, 0.5, act="maxout", bias="none"),
    ),
    discriminator_joint=(  # 256 + 256 maps in; the paper's table says 1024
        plain(1, 1, 1024, 0.5, act="maxout"),
        plain(1, 1, 1024, 0.5, act="maxout"),
        linear_head(1, 0.5),
    ),
)

DIGITS = Networks(  # not the paper's: its SVHN networks at half the width, for one grey channel
    image=(1, 32, 32),
    latent=64,
    slope=0.01,
    encoder=(
        Row(5, 1, 16),  # 28
        Row(4, 2, 32),  # 13
        Row(4, 1, 64),  # 10
        Row(4, 2, 128),  # 4
        Row(4, 1, 256),  # 1
        Row(1, 1, 256),
        linear_head(128),
    ),
    decoder=(
        T(4, 1, 128),  # 4
        T(4, 2, 64),  # 10
        T(4, 1, 32),  # 13
        T(4, 2, 16),  # 28
        T(5, 1, 16),  # 32
        Row(1, 1, 16),
        image_head(1),
    ),
    discriminator_x=(
        plain(5, 1, 16, 0.2),  # 28
        Row(4, 2, 32, dropout=0.2),  # 13
        Row(4, 1, 64, dropout=0.2),  # 10
        Row(4, 2, 128, dropout=0.2),  # 4
        Row(4, 1, 256, dropout=0.2),  # 1
    ),
    discriminator_z=(plain(1, 1, 256, 0.2), plain(1, 1, 256, 0.2)),
    discriminator_joint=(plain(1, 1, 512, 0.2), plain(1, 1, 512, 0.2), linear_head(1, 0.2)),
)

NETWORKS = {
    "tinyimagenet": TINY_IMAGENET,
    "celeba": CELEBA,
    "svhn": SVHN,
    "cifar10": CIFAR10,
    "digits": DIGITS,
    # Given y: 40 attributes as in the paper, or a class
    "celeba-conditional": conditional(CELEBA, 40),
    "cifar10-conditional": conditional(CIFAR10, 10),
    "svhn-conditional": conditional(SVHN, 10),
    "tinyimagenet-conditional": conditional(TINY_IMAGENET, 200),
    "imagenet64-conditional": conditional(TINY_IMAGENET, 1000),
    "digits-conditional": conditional(DIGITS, 10),
    # D tells classes apart, for semi-supervised training
    "svhn-classes": classifying(SVHN, 10),
    "cifar10-classes": classifying(CIFAR10, 10),
    "digits-classes": classifying(DIGITS, 10),
}
