"""TrainState: everything that one update reads and writes."""

import copy
import hashlib
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ali_dist import dist
from ali_dist.finite import Finite
from ali_dist.layers import Layer
from ali_dist.levers import FAST, Levers
from ali_dist.nets import ALI
from ali_dist.optim import Adam
from ali_dist.recipe import Recipe, UserError
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
    `impl` says which implementation of the kernels to use: auto, ref or triton. `static`: updates go through fixed
    buffers (see ali_dist.fast), on a GPU by default where the levers ask for a graph.
    """

    def __init__(
        self,
        recipe: Recipe,
        mean_image: Tensor,
        device: torch.device,
        impl: str = "auto",
        levers: Levers = FAST,
        static: bool | None = None,
    ) -> None:
        self.recipe, self.device, self.levers = recipe, device, levers
        self.why_not_static = recipe.why_not_static(dist.world_size())
        self.static = not self.why_not_static and (levers.graph and device.type == "cuda" if static is None else static)
        self.num_images = 0
        self.finite = Finite(at_once=device.type == "cpu" and not self.static)
        torch.manual_seed(derived_seed(recipe.seed, "weights"))
        gather = dist.gather if dist.world_size() > 1 else None
        model = ALI(NETWORKS[recipe.networks], gather, impl, recipe.train_embedding, recipe.max_sigma)
        model.reset_parameters(mean_image, recipe.embedding_std)
        self.model = model.to(device=device, memory_format=torch.channels_last).train()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.discriminator = list(self.model.discriminator.parameters())
        self.generator = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        if self.model.embedding is not None:  # of which nothing is trained by default
            self.generator += self.model.embedding.parameters()
        alone = recipe.semi.supervised_only
        trained = {"discriminator": self.discriminator} | ({} if alone else {"generator": self.generator})
        kind = optimizer_kind(self, impl)
        self.optimizers = {name: kind(parameters) for name, parameters in trained.items()}
        self.averages = self._flat_averages() if self.static else []
        self.leaves = {name: self._use_copies(name) for name in ("discriminator", "generator")}
        self.one_sweep = levers.one_sweep and self.model.nets.judges_pairs_alone and not recipe.labelled_share
        self.stacked_seeds = levers.stacked_seeds and not self.one_sweep
        self.forward: nn.Module = self.model.discriminator if alone else self.model
        if dist.world_size() > 1 and not self.static:
            # static_graph would be silently wrong with the step's two backward passes.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer releases rename broadcast_buffers
                self.forward = nn.parallel.DistributedDataParallel(
                    self.forward,
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,  # batch norm already sees all workers, so its buffers are equal
                    gradient_as_bucket_view=True,
                )
            if levers.bf16_gradients:
                dist.send_in_bf16(self.forward)

    def averaging_weight(self, num_images: int) -> float:
        """How far the averaged weights move towards those of the update that ends at `num_images`."""
        optim = self.recipe.optim
        half_life = min(optim.ema_half_life, 0.05 * num_images)
        return 1 - 0.5 ** (optim.batch_size / half_life) if half_life else 1.0

    def average_weights(self, weight: float | Tensor) -> None:
        """Moves the averaged weights and batch-norm buffers towards the current ones, once an update."""
        if self.static:
            for averages, current in self.averages:
                averages.lerp_(current, weight) if averages.is_floating_point() else averages.copy_(current)
            return
        mine, theirs = self.averaged.state_dict(), self.model.state_dict()
        floats = [name for name in mine if mine[name].is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], weight)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])

    def _flat_averages(self) -> list[tuple[Tensor, Tensor]]:
        """Puts all that is averaged into a few flat tensors; each with what it follows."""
        twin = dict(zip(self.model.parameters(), self.averaged.parameters(), strict=True))
        pairs = []
        for name, optimizer in self.optimizers.items():
            pairs += optimizer.twins([twin[p] for p in getattr(self, name)])
        theirs, mine = list(self.averaged.buffers()), list(self.model.buffers())
        for dtype in {tensor.dtype for tensor in mine}:
            pairs.append(tuple(flattened([t for t in tensors if t.dtype == dtype]) for tensors in (theirs, mine)))
        return pairs

    def _use_copies(self, name: str) -> list[Tensor]:
        """Lets convolutions compute with the rounded weights where an optimizer keeps them; what gradients go to."""
        optimizer, leaves = self.optimizers.get(name), {p: p for p in getattr(self, name)}
        copies = optimizer.copies if isinstance(optimizer, FlatAdam) else {}
        for module in self.model.modules():
            exact = module is self.model.decoder[-1]  # decoder_head, which rounds nothing
            if isinstance(module, Layer) and module.weight in copies and not exact:
                module.rounded = leaves[module.weight] = copies[module.weight]
        return list(leaves.values())

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
            if isinstance(optimizer, FlatAdam):
                optimizer.refresh_copies()


def flattened(tensors: list[Tensor]) -> Tensor:
    """Moves contiguous tensors of one dtype into one flat tensor."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)
    return flat


def optimizer_kind(state: TrainState, impl: str) -> Callable[[list[nn.Parameter]], Adam | torch.optim.Adam]:
    """Adam in one launch where kernels run; on a CPU PyTorch's fused one, elsewhere its class."""
    optim, recipe = state.recipe.optim, state.recipe
    try:
        flat = state.static or use_triton(impl, state.discriminator[0])
    except RuntimeError as error:
        raise UserError(f"--impl {impl}: {error}") from error
    settings = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.adam_eps}
    if not flat:
        plain = Adam if state.device.type == "cpu" else partial(torch.optim.Adam, fused=True)
        return partial(plain, **settings)
    # DistributedDataParallel knows the parameters only, and gradients of several passes would add up in bfloat16.
    alone = (state.static or dist.world_size() == 1) and optim.accumulate == 1
    rounds = state.levers.weight_copies and recipe.precision == "bf16" and alone
    return partial(FlatAdam, impl=impl, copy_dtype=torch.bfloat16 if rounds else None, **settings)
