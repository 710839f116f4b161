"""ALI as one would write it from PyTorch's own modules, from the same tables and with the same weights' names."""

import torch
from torch import Tensor, nn

from ali_dist.tables import BN_EPS, BN_MOMENTUM, Networks, Row, plane_shapes


class PlainLayer(nn.Module):
    """A row of a table: dropout, convolution, batch norm or bias, activation, [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, row: Row, in_shape: tuple[int, int, int], slope: float) -> None:
        super().__init__()
        (out_shape,) = plane_shapes(in_shape, [row])
        kind = nn.ConvTranspose2d if row.transposed else nn.Conv2d
        self.dropout = nn.Dropout(row.dropout)
        self.conv = kind(in_shape[0], row.maps, row.kernel, row.stride, bias=row.bias == "channel")
        self.bias = nn.Parameter(torch.empty(out_shape)) if row.bias == "pixel" else None
        self.bn = nn.BatchNorm2d(row.maps, eps=BN_EPS, momentum=BN_MOMENTUM) if row.bn else None
        self.act, self.slope = row.act, slope

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.dropout(x) if self.dropout.p else x)
        if self.bias is not None:
            x = x + self.bias
        if self.bn is not None:
            x = self.bn(x)
        if self.act == "lrelu":
            return nn.functional.leaky_relu(x, self.slope)
        if self.act == "maxout":
            return torch.maximum(x[:, ::2], x[:, 1::2])
        return torch.sigmoid(x) if self.act == "sigmoid" else x


class PlainALI(nn.Module):
    """Encoder, decoder and discriminator of `nets`."""

    def __init__(self, nets: Networks) -> None:
        super().__init__()
        self.nets = nets

        def chain(name: str) -> nn.Sequential:
            shape, rows = nets.parts()[name]
            inputs = [shape, *plane_shapes(shape, rows)]
            return nn.Sequential(*(PlainLayer(row, inputs[i], nets.slope) for i, row in enumerate(rows)))

        self.encoder, self.decoder = chain("encoder"), chain("decoder")
        parts = ("x", "z", "joint")
        self.discriminator = nn.ModuleDict({name: chain(f"discriminator_{name}") for name in parts})

    def load(self, weights: dict[str, Tensor]) -> "PlainALI":
        """Takes the state dict of `ali_dist.nets.ALI`, whose layers hold the convolution's weights themselves."""
        names = self.state_dict().keys()
        self.load_state_dict(
            {name: weights[name if name in weights else name.replace(".conv.", ".")] for name in names}
        )
        return self

    def score(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits [N] of D(x, z): x [N, C, H, W], z [N, latent]."""
        d = self.discriminator
        return d["joint"](torch.cat([d["x"](x), d["z"](z[:, :, None, None])], 1)).flatten()

    def generate(self, x: Tensor, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z_hat ~ q(z|x) and x_tilde = G_x(z)."""
        mu, log_sigma = self.encoder(x).flatten(1).chunk(2, 1)
        return mu + log_sigma.exp() * eps, self.decoder(z[:, :, None, None])
