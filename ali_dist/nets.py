"""The networks, built from their tables: G_z, G_x and the joint discriminator D (arXiv:1606.00704, appendix A).

What surrounds the convolutions is `kernels`: Triton on CUDA, plain torch on a CPU, the same functions either way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ali_dist.tables import BN_EPS, BN_MOMENTUM, INIT_STD, Networks, Row, plane_shapes
from kernels import (
    BatchNormLeakyReLU,
    bias_leaky_relu_dropout,
    decoder_head,
    image_pair,
    joint_input,
    latent_pair,
    maxout,
)


@dataclass(frozen=True, slots=True)
class Wiring:
    """What all layers of a model share."""

    slope: float
    gather: Callable[[Tensor], Tensor] | None = None
    """[*shape] of this rank -> [W, *shape] of all, which makes batch norm see all workers' images; see dist.gather."""
    impl: str = "auto"
    """Which implementation of the kernels: auto, ref or triton."""


class Layer(nn.Module):
    """One row of a table: [N, C, H, W] -> [N, C', H', W'].

    `dropout` is the next row's input dropout, drawn here because it costs nothing beside the activation; `offset` tells
    its mask apart from other layers'. Convolutions whose kernel covers the whole plane are matrix products: the same
    sums, many times faster than convolution routines make them on 1x1 planes.
    """

    def __init__(self, row: Row, in_shape: tuple[int, int, int], dropout: float, offset: int, wiring: Wiring) -> None:
        super().__init__()
        self.row, self.dropout, self.offset, self.wiring = row, dropout, offset, wiring
        (out_shape,) = plane_shapes(in_shape, [row])
        channels = (in_shape[0], row.maps) if row.transposed else (row.maps, in_shape[0])
        self.weight = nn.Parameter(torch.empty(*channels, row.kernel, row.kernel))
        self.covers_plane = (1 if row.transposed else row.kernel) == in_shape[1] == in_shape[2]
        shape = {"none": None, "channel": row.maps, "pixel": out_shape}[row.bias]
        self.register_parameter("bias", None if shape is None else nn.Parameter(torch.empty(shape)))
        self.bn = (
            BatchNormLeakyReLU(
                row.maps,
                eps=BN_EPS,
                momentum=BN_MOMENTUM,
                slope=wiring.slope,
                dropout=dropout,
                offset=offset,
                reduce=wiring.gather,
                impl=wiring.impl,
            )
            if row.bn
            else None
        )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.bn is not None:
            self.bn.reset_parameters()

    def forward(self, x: Tensor, rng: Tensor | None = None) -> Tensor:
        """`rng`: see ali_dist.state; needed in training where there is dropout."""
        return self.activate(self.convolve(x), rng)

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        row, weight = self.row, self.weight
        if not self.covers_plane:
            return (F.conv_transpose2d if row.transposed else F.conv2d)(x, weight, stride=row.stride)
        # In channels_last memory these permutations and reshapes copy nothing.
        if row.transposed:
            matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])  # [k*k*O, I]
            planes = F.linear(x.flatten(1), matrix).view(-1, row.kernel, row.kernel, row.maps)
            return planes.permute(0, 3, 1, 2)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # [O, k*k*I]
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix)[:, :, None, None]

    def activate(self, x: Tensor, rng: Tensor | None) -> Tensor:
        """Batch norm or bias, the activation, and the next row's dropout."""
        dropout = self.dropout if self.training else 0.0
        if self.bn is not None:
            return self.bn(x, rng)
        if self.row.act == "lrelu":
            return bias_leaky_relu_dropout(x, self.bias, self.wiring.slope, dropout, rng, self.offset, self.wiring.impl)
        if self.row.act == "maxout":
            return maxout(x, self.bias, dropout, rng, self.offset, self.wiring.impl)
        if self.bias is not None:  # in the bias's float32, whatever the convolution computed in
            x = x + (self.bias if self.row.bias == "pixel" else self.bias[:, None, None])
        return torch.sigmoid(x) if self.row.act == "sigmoid" else x


class Chain(nn.Sequential):
    """The layers of one network; `dropout_after` is the input dropout of what follows it."""

    def __init__(
        self,
        part: tuple[tuple[int, int, int], tuple[Row, ...]],
        wiring: Wiring,
        offset: int = 0,
        dropout_after: float = 0.0,
    ) -> None:
        shape, rows = part
        inputs = [shape, *plane_shapes(shape, rows)]
        dropouts = [*(row.dropout for row in rows[1:]), dropout_after]
        super().__init__(*(Layer(row, inputs[i], dropouts[i], offset + i, wiring) for i, row in enumerate(rows)))

    def forward(self, x: Tensor, rng: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, rng)
        return x


class Discriminator(nn.Module):
    """D(x, z): D_x's and D_z's features side by side along channels, then the joint layers, to one logit.

    Its inputs come with the first rows' dropout already drawn, because whoever stacks the pairs draws it in passing.
    """

    def __init__(self, nets: Networks, wiring: Wiring) -> None:
        super().__init__()
        parts = nets.parts()
        joint_dropout = nets.discriminator_joint[0].dropout
        # Offsets 0 and 1 are the inputs' dropout; then one a layer.
        self.x = Chain(parts["discriminator_x"], wiring, 2, joint_dropout)
        self.z = Chain(parts["discriminator_z"], wiring, 2 + len(self.x), joint_dropout)
        self.joint = Chain(parts["discriminator_joint"], wiring, 2 + len(self.x) + len(self.z))

    def forward(self, x: Tensor, z: Tensor, rng: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], z [N, latent, 1, 1] -> float32 logits [N]."""
        *hidden_x, last_x = self.x
        *hidden_z, last_z = self.z
        for layer in hidden_x:
            x = layer(x, rng)
        for layer in hidden_z:
            z = layer(z, rng)
        x, z = last_x.convolve(x), last_z.convolve(z)
        if last_x.bn is not None and last_z.row.act == "lrelu":
            joint = joint_input(x, z, z_bias=last_z.bias, **last_x.bn.arguments(rng))
        else:
            joint = torch.cat([last_x.activate(x, rng), last_z.activate(z, rng)], dim=1)
        return self.joint(joint, rng).flatten()


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass of ALI yields, q first: logits float32 [N], codes [N, latent], images [N, C, H, W]."""

    logits_q: Tensor  # D(x, z_hat)
    logits_p: Tensor  # D(x_tilde, z)
    mu: Tensor
    log_sigma: Tensor
    z_hat: Tensor
    x_tilde: Tensor


class ALI(nn.Module):
    """Encoder, decoder and joint discriminator.

    Parameters are uninitialised until `reset_parameters`, so that shapes can be built on the meta device.
    """

    def __init__(self, nets: Networks, gather: Callable[[Tensor], Tensor] | None = None, impl: str = "auto") -> None:
        super().__init__()
        self.nets, self.impl = nets, impl
        wiring, parts = Wiring(nets.slope, gather, impl), nets.parts()
        self.encoder = Chain(parts["encoder"], wiring)
        self.decoder = Chain(parts["decoder"], wiring)
        self.discriminator = Discriminator(nets, wiring)

    def reset_parameters(self, mean_image: Tensor) -> None:
        """The authors' initialisation; `mean_image` float [C, H, W] in [0, 1] sets the decoder's output bias."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.reset_parameters()
        mean = mean_image.double().clamp(1e-7, 1 - 1e-7)
        with torch.no_grad():
            self.decoder[-1].bias.copy_(torch.logit(mean))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C, H, W] in [0, 1] -> mu and log_sigma, float32 [N, latent] each."""
        mu, log_sigma = self.encoder(x).flatten(1).chunk(2, dim=1)
        return mu, log_sigma

    def decode(self, z: Tensor) -> Tensor:
        """z [N, latent] -> x_tilde, float32 [N, C, H, W] in (0, 1)."""
        h = z[:, :, None, None]
        *hidden, last, head = self.decoder
        for layer in hidden:
            h = layer(h)
        norm = last.bn.arguments()
        for name in ("dropout", "rng", "offset"):  # the decoder has none
            del norm[name]
        return decoder_head(last.convolve(h), head_weight=head.weight, head_bias=head.bias, **norm)

    def forward(self, x: Tensor, z: Tensor, eps: Tensor, rng: Tensor | None = None) -> Pass:
        """One pass over both joints: x in [0, 1] [N, C, H, W], z ~ p(z) and eps ~ N(0, I) [N, latent].

        D runs once on the stacked halves, so its batch norm and dropout see both together. `rng` is dropout's int64
        [seed, step] on the device, needed in training.
        """
        encoded = self.encoder(x)
        x_tilde = self.decode(z)
        kind = "cuda" if x.is_cuda else "cpu"
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        drop_x, drop_z = (
            rows[0].dropout if self.training else 0.0 for rows in (self.nets.discriminator_x, self.nets.discriminator_z)
        )
        images = image_pair(x, x_tilde, dtype, drop_x, rng, 0, self.impl)
        codes, z_hat = latent_pair(encoded, eps, z, dtype, drop_z, rng, 1, self.impl)
        logits_q, logits_p = self.discriminator(images, codes, rng).chunk(2)
        mu, log_sigma = encoded.flatten(1).chunk(2, dim=1)
        return Pass(logits_q, logits_p, mu, log_sigma, z_hat, x_tilde)
