"""TrainState: everything that one update reads and writes."""

import copy
import hashlib
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from ali_dist import dist
from ali_dist.finite import Finite
from ali_dist.nets import ALI
from ali_dist.optim import Adam
from ali_dist.recipe import Optim, Recipe, UserError
from ali_dist.tables import NETWORKS
from kernels import FlatAdam
from kernels.dispatch import use_triton


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


class TrainState:
    """The networks, their averaged twin, both optimizers and the clock.

    `num_images`, the images seen by the whole job, is the only clock. Randomness has no state of its own: each update
    derives its noise and dropout from (seed, num_images), so a checkpoint needs no generator to continue exactly.
    `impl` says which implementation of the kernels to use: auto, ref or triton.
    """

    def __init__(self, recipe: Recipe, mean_image: Tensor, device: torch.device, impl: str = "auto") -> None:
        self.recipe, self.device = recipe, device
        self.num_images = 0
        self.finite = Finite(at_once=device.type == "cpu")
        torch.manual_seed(derived_seed(recipe.seed, "weights"))
        gather = dist.gather if dist.world_size() > 1 else None
        model = ALI(NETWORKS[recipe.networks], gather, impl, recipe.train_embedding)
        model.reset_parameters(mean_image, recipe.embedding_std)
        self.model = model.to(device=device, memory_format=torch.channels_last).train()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.discriminator = list(self.model.discriminator.parameters())
        self.generator = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        if self.model.embedding is not None:  # of which nothing is trained by default
            self.generator += self.model.embedding.parameters()
        alone = recipe.semi.supervised_only
        self.optimizers = {"discriminator": adam(self.discriminator, recipe.optim, impl)}
        if not alone:
            self.optimizers["generator"] = adam(self.generator, recipe.optim, impl)
        self.forward: nn.Module = self.model.discriminator if alone else self.model
        if dist.world_size() > 1:
            # static_graph would be silently wrong with the step's two backward passes.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer releases rename broadcast_buffers
                self.forward = nn.parallel.DistributedDataParallel(
                    self.forward,
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,  # batch norm already sees all workers, so its buffers are equal
                    gradient_as_bucket_view=True,
                )

    def average_weights(self) -> None:
        """Moves the averaged weights and batch-norm buffers towards the current ones, once an update."""
        optim = self.recipe.optim
        half_life = min(optim.ema_half_life, 0.05 * self.num_images)
        weight = 1 - 0.5 ** (optim.batch_size / half_life) if half_life else 1.0
        mine, theirs = self.averaged.state_dict(), self.model.state_dict()
        floats = [name for name in mine if mine[name].is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], weight)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name, the optimizers' under their parameters' names."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        out = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        out |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for optimizer in self.optimizers.values():
            for parameter, moments in optimizer.state.items():
                out |= {f"adam.{names[parameter]}.{key}": tensor for key, tensor in moments.items()}
        return out

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; RuntimeError when a weight is missing."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(below("model."))
        self.averaged.load_state_dict(below("averaged."))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    moments = below(f"adam.{names[parameter]}.")
                    if moments:  # none before the first update
                        # Fused Adam goes through parameter and moments in memory order, so they need one layout.
                        optimizer.state[parameter] = {
                            key: torch.empty_like(
                                parameter if t.shape == parameter.shape else t, device=self.device
                            ).copy_(t)
                            for key, t in moments.items()
                        }


def adam(parameters: list[nn.Parameter], optim: Optim, impl: str) -> Adam | torch.optim.Adam:
    """Adam in one launch where kernels run; on a CPU PyTorch's fused one, elsewhere its class."""
    try:
        plain = Adam if parameters[0].device.type == "cpu" else partial(torch.optim.Adam, fused=True)
        kind = partial(FlatAdam, impl=impl) if use_triton(impl, parameters[0]) else plain
    except RuntimeError as error:
        raise UserError(f"--impl {impl}: {error}") from error
    return kind(parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps)
