"""The networks, built from their tables: G_z, G_x and the joint discriminator D (arXiv:1606.00704, appendix A)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ali_dist.batchnorm import BatchNormLeakyReLU
from ali_dist.tables import BN_EPS, BN_MOMENTUM, INIT_STD, Networks, Row, plane_shapes

Gather = Callable[[Tensor], Tensor]  # this rank's [K] -> every rank's [W, K]; see ali_dist.dist.gather


class _Maxout(torch.autograd.Function):
    """Greatest of each pair of adjacent channels, [N, 2C, H, W] -> [N, C, H, W]; a tie's gradient is the first's.

    As one function because autograd's own way through slices or a fifth dimension takes several times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        first, second = x[:, 0::2], x[:, 1::2]
        ctx.save_for_backward(first >= second)
        return torch.maximum(first, second)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (first_wins,) = ctx.saved_tensors
        n, c, h, w = dy.shape
        dx = dy.new_empty(n, h, w, 2 * c).permute(0, 3, 1, 2)
        dx[:, 0::2] = dy * first_wins
        dx[:, 1::2] = dy * ~first_wins
        return dx


class Layer(nn.Module):
    """One row of a table: [N, C, H, W] -> [N, C', H', W'].

    Convolutions whose kernel covers the whole plane are matrix products: the same sums, many times faster than
    convolution routines make them on 1x1 planes.
    """

    def __init__(self, row: Row, in_shape: tuple[int, int, int], slope: float, gather: Gather | None) -> None:
        super().__init__()
        self.row, self.slope = row, slope
        (out_shape,) = plane_shapes(in_shape, [row])
        channels = (in_shape[0], row.maps) if row.transposed else (row.maps, in_shape[0])
        self.weight = nn.Parameter(torch.empty(*channels, row.kernel, row.kernel))
        self.covers_plane = (1 if row.transposed else row.kernel) == in_shape[1] == in_shape[2]
        if row.bias == "channel":
            self.bias = nn.Parameter(torch.empty(row.maps))
        elif row.bias == "pixel":
            self.bias = nn.Parameter(torch.empty(out_shape))
        else:
            self.bias = None
        self.bn = (
            BatchNormLeakyReLU(row.maps, eps=BN_EPS, momentum=BN_MOMENTUM, slope=slope, gather=gather)
            if row.bn
            else None
        )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.bn is not None:
            self.bn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        row = self.row
        x = self.convolve(F.dropout(x, row.dropout, self.training))
        if self.bn is not None:
            return self.bn(x)
        if row.bias == "pixel":
            x = x.float() + self.bias
        if row.act == "lrelu":
            return F.leaky_relu(x, self.slope)
        if row.act == "maxout":
            return _Maxout.apply(x)
        return torch.sigmoid(x) if row.act == "sigmoid" else x

    def convolve(self, x: Tensor) -> Tensor:
        row, weight = self.row, self.weight
        bias = self.bias if row.bias == "channel" else None
        if not self.covers_plane:
            return (F.conv_transpose2d if row.transposed else F.conv2d)(x, weight, bias, stride=row.stride)
        # In channels_last memory these permutations and reshapes copy nothing.
        if row.transposed:
            matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])  # [k*k*O, I]
            bias = bias if bias is None else bias.repeat(row.kernel**2)
            planes = F.linear(x.flatten(1), matrix, bias).view(-1, row.kernel, row.kernel, row.maps)
            return planes.permute(0, 3, 1, 2)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # [O, k*k*I]
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, bias)[:, :, None, None]


class Chain(nn.Sequential):
    """The layers of one network."""

    def __init__(self, shape: tuple[int, int, int], rows: tuple[Row, ...], slope: float, gather: Gather | None) -> None:
        inputs = [shape, *plane_shapes(shape, rows)]
        super().__init__(*(Layer(row, inputs[i], slope, gather) for i, row in enumerate(rows)))


class Discriminator(nn.Module):
    """D(x, z): D_x's and D_z's features side by side along channels, then the joint layers, to one logit."""

    def __init__(self, nets: Networks, gather: Gather | None) -> None:
        super().__init__()
        parts = nets.parts()
        self.x = Chain(*parts["discriminator_x"], nets.slope, gather)
        self.z = Chain(*parts["discriminator_z"], nets.slope, gather)
        self.joint = Chain(*parts["discriminator_joint"], nets.slope, gather)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x [N, C, H, W], z [N, latent, 1, 1] -> logits [N]."""
        return self.joint(torch.cat([self.x(x), self.z(z)], dim=1)).flatten()


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

    `gather` makes batch norm see the batches of all workers as one. Parameters are uninitialised until
    `reset_parameters`, so that shapes can be built on the meta device.
    """

    def __init__(self, nets: Networks, gather: Gather | None = None) -> None:
        super().__init__()
        self.nets = nets
        parts = nets.parts()
        self.encoder = Chain(*parts["encoder"], nets.slope, gather)
        self.decoder = Chain(*parts["decoder"], nets.slope, gather)
        self.discriminator = Discriminator(nets, gather)

    def reset_parameters(self, mean_image: Tensor) -> None:
        """Section 1's initialisation; `mean_image` float [C, H, W] in [0, 1] sets the decoder's output bias."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.reset_parameters()
        mean = mean_image.double().clamp(1e-7, 1 - 1e-7)
        with torch.no_grad():
            self.decoder[-1].bias.copy_(torch.logit(mean))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C, H, W] in [0, 1] -> mu and log_sigma, [N, latent] each."""
        mu, log_sigma = self.encoder(x).flatten(1).chunk(2, dim=1)
        return mu, log_sigma

    def decode(self, z: Tensor) -> Tensor:
        """z [N, latent] -> x_tilde [N, C, H, W] in (0, 1)."""
        return self.decoder(z[:, :, None, None])

    def discriminate(self, x: Tensor, z: Tensor) -> Tensor:
        """x [N, C, H, W], z [N, latent] -> float32 logits [N]."""
        return self.discriminator(x, z[:, :, None, None]).float()

    def forward(self, x: Tensor, z: Tensor, eps: Tensor) -> Pass:
        """One pass over both joints: x in [0, 1] [N, C, H, W], z ~ p(z) and eps ~ N(0, I) [N, latent].

        D runs once on the stacked halves, so its batch norm and dropout see both together.
        """
        mu, log_sigma = self.encode(x)
        z_hat = mu.float() + torch.exp(log_sigma.float()) * eps
        x_tilde = self.decode(z)
        logits = self.discriminate(torch.cat([x, x_tilde.to(x.dtype)]), torch.cat([z_hat, z]))
        logits_q, logits_p = logits.chunk(2)
        return Pass(logits_q, logits_p, mu, log_sigma, z_hat, x_tilde)
