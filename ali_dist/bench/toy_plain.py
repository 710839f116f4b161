"""ALI as plain modules, one run at a time: what the stacks are checked against, and timed beside."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ali_dist.losses import per_image_losses
from ali_dist.tables import BN_EPS
from ali_dist.toy.models import Batch
from ali_dist.toy.nets import Weights
from ali_dist.toy.recipe import ToyRun
from ali_dist.toy.tables import MODELS, PIECES, Network, Row


class Maxout(nn.Linear):
    """[N, inputs] -> [N, units]; output p * units + c of the product is piece p of unit c."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (PIECES, -1)).amax(-2)


def layer(size: int, row: Row) -> nn.Module:
    if row.act == "bn_relu":
        return nn.Sequential(
            nn.Linear(size, row.units, bias=False), nn.BatchNorm1d(row.units, eps=BN_EPS), nn.ReLU(inplace=True)
        )
    return (Maxout if row.act == "maxout" else nn.Linear)(size, row.columns)


def network(table: Network) -> nn.Sequential:
    return nn.Sequential(*(layer(size, row) for size, row in table.sizes()))


class PlainALI:
    """One ALI run in eager PyTorch: nn.Linear, nn.BatchNorm1d, two backward passes, torch.optim.Adam as it comes."""

    def __init__(self, run: ToyRun, weights: Weights) -> None:
        """`weights`: one run's, without the leading R; see ali_dist.toy.stack.initial_weights."""
        self.nets = {name: network(table) for name, table in MODELS["ali"].items()}
        with torch.no_grad():
            for name, parameter in self.parameters():
                given = weights[name]
                parameter.copy_(given.T if name.endswith("weight") else given[0])
        generator = [*self.nets["encoder"].parameters(), *self.nets["decoder"].parameters()]
        self.groups = {"discriminator": list(self.nets["discriminator"].parameters()), "generator": generator}
        self.optimizers = {
            name: torch.optim.Adam(group, lr=run.lr, betas=(run.beta1, 0.999)) for name, group in self.groups.items()
        }

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the names that a stack has for them."""
        for name, net in self.nets.items():
            for i, part in enumerate(net):
                if isinstance(part, nn.Sequential):
                    yield f"{name}.{i}.weight", part[0].weight
                    yield f"{name}.{i}.scale", part[1].weight
                    yield f"{name}.{i}.shift", part[1].bias
                else:
                    yield f"{name}.{i}.weight", part.weight
                    yield f"{name}.{i}.bias", part.bias

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update from x, z and eps [B, 2]; L_D and L_G."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        z_hat = self.nets["encoder"](torch.cat([batch.x, batch.eps], -1))
        x_tilde = self.nets["decoder"](batch.z)
        pairs = torch.cat([torch.cat([batch.x, z_hat], -1), torch.cat([x_tilde, batch.z], -1)])
        a, b = self.nets["discriminator"](pairs).squeeze(-1).chunk(2)
        loss_d, loss_g = (loss.mean() for loss in per_image_losses(a, b))
        loss_d.backward(inputs=self.groups["discriminator"], retain_graph=True)
        loss_g.backward(inputs=self.groups["generator"])
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss_d.detach(), loss_g.detach()
