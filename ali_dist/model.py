"""A trained ALI for use: no trainer, no network access, nothing unpickled."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ali_dist import checkpoint, exported, remote
from ali_dist.data.store import Bucket
from ali_dist.nets import ALI
from ali_dist.recipe import Recipe, UserError
from ali_dist.run import RunFolder
from ali_dist.state import derived_seed
from ali_dist.tables import NETWORKS

Weights = Literal["averaged", "raw"]
Features = Literal["script", "paper"]
Array = Tensor | np.ndarray
Labels = Array | int | None


def find_checkpoint(path: str | Path) -> Path:
    """The folder that `path` names: itself, a checkpoint or an exported model, or a run's newest checkpoint.

    UserError when there is none.
    """
    path = Path(path).expanduser()
    if (path / "manifest.json").exists() or exported.is_exported(path):
        return path
    saves = RunFolder(path).saved()
    if not saves:
        raise UserError(f"no checkpoint at {path}: give a run's folder, one of its checkpoints or an exported model")
    return saves[-1]


def find(words: str, storage: str) -> str | Path:
    """What a command line names, as `load` takes it: that itself, or a run by its name below the folder or address.

    UserError when there is no checkpoint in either place; at an address that is for `load` to find.
    """
    if remote.is_bucket(words):
        return words
    run = remote.run_at(storage, words, "read")
    if run.bucket:
        return run.bucket.address
    given, named = Path(words).expanduser(), run.root.expanduser()
    for path in (given, named):
        with suppress(UserError):
            return find_checkpoint(path)
    raise UserError(
        f"no checkpoint at {given}, nor at {named}: give a run, one of its checkpoints or an exported model; "
        "a run's name is looked up in --storage"
    )


def load(path: str | Path, weights: Weights = "averaged", device: str | torch.device = "cpu") -> "Model":
    """The model of a run folder (its newest checkpoint), of one checkpoint folder, or of an exported one.

    A run or checkpoint may also be at an address of s3 or gs. Checksums are verified first. Raises UserError when there
    is none, it is damaged, or it lacks these weights.
    """
    run, folder = remote.checkpoint_at(str(path)) if remote.is_bucket(path) else (None, find_checkpoint(path))
    if exported.is_exported(folder):
        recipe, config, tensors = exported.read(folder)
        if config["weights"] != weights:
            raise UserError(
                f"{folder} holds {config['weights']} weights only: load it with weights={config['weights']!r}"
            )
    else:
        checkpoint.verify(folder)
        recipe = checkpoint.read_recipe(folder)
        tensors = checkpoint.read_tensors(folder, {"averaged": "averaged", "raw": "model"}[weights])
    net = ALI(NETWORKS[recipe.networks], max_sigma=recipe.max_sigma)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise checkpoint.Damaged(f"checkpoint {folder} does not fit its recipe: {error}") from error
    net = net.to(device=device, memory_format=torch.channels_last).eval()
    return Model(net, recipe, folder, bucket=run.bucket if run else None)


def untrained(recipe: Recipe, mean_image: Tensor) -> "Model":
    """The recipe's networks as they were before the first update: what a trained model is to be compared with."""
    torch.manual_seed(derived_seed(recipe.seed, "weights"))
    net = ALI(NETWORKS[recipe.networks], max_sigma=recipe.max_sigma)
    net.reset_parameters(mean_image, recipe.embedding_std)
    return Model(net.to(memory_format=torch.channels_last).eval(), recipe, None)


class Model:
    """Encoder and decoder of a checkpoint, in evaluation mode and float32.

    Images x are uint8, or float in [0, 1], [N, C, H, W]; images returned are float32 in [0, 1]; z is float32
    [N, latent]. A conditional model must be given the label y of each image, others must not: classes, integers [N]
    or one for all, or attributes [N, A] or [1, A]. ValueError says what does not fit. Everything works in batches of
    `batch_size`, so N may be large.
    """

    def __init__(
        self,
        net: ALI,
        recipe: Recipe,
        checkpoint: Path | None,
        batch_size: int = 256,
        bucket: Bucket | None = None,
    ) -> None:
        self.net, self.recipe, self.checkpoint, self.batch_size = net, recipe, checkpoint, batch_size
        self.bucket = bucket
        """The run's address, where it has one; then `checkpoint` is this host's copy."""
        self.latent = net.nets.latent
        self.shape = net.nets.image
        self.labels = net.nets.labels
        """Classes or attributes that a conditional model is given; 0 for an unconditional one."""

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def run(self) -> RunFolder:
        """The run that the checkpoint is of; UserError for an exported model."""
        if self.checkpoint is None or exported.is_exported(self.checkpoint):
            raise UserError(f"{self.checkpoint} is an exported model, which is of no run: give the run itself")
        return RunFolder(self.checkpoint.parent.parent, self.bucket)

    @property
    def place(self) -> str:
        """The checkpoint's folder or address, as its user finds it; what `load` takes, but for a password in it."""
        return self.run.shown(self.checkpoint) if self.bucket else str(self.checkpoint)

    @torch.no_grad()
    def encode(
        self, x: Array, y: Labels = None, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """mu of q(z|x) or q(z|x, y), [N, latent]; a draw z_hat instead with `sample`."""
        codes = []
        for mu, log_sigma in self._posteriors(x, y):
            if sample:
                mu = mu + log_sigma.exp() * torch.randn(mu.shape, generator=generator).to(self.device)
            codes.append(mu.cpu())
        return torch.cat(codes)

    @torch.no_grad()
    def posterior(self, x: Array, y: Labels = None) -> tuple[Tensor, Tensor]:
        """mu and log_sigma of q(z|x) or q(z|x, y), [N, latent] each."""
        mu, log_sigma = zip(*self._posteriors(x, y), strict=True)
        return torch.cat(mu).cpu(), torch.cat(log_sigma).cpu()

    def _posteriors(self, x: Array, y: Labels) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, label in zip(self.batches(x), self.label_batches(y, len(x)), strict=True):
            yield self.net.encode(batch, label)

    @torch.no_grad()
    def features(self, x: Array, kind: Features = "script") -> Tensor:
        """What the paper's SVM reads from the encoder (section 4.3): float32 [N, F], layers flattened side by side.

        "script" takes the batch-norm outputs of the last three hidden layers and mu, as the authors' script does (5376
        numbers on SVHN); "paper" the first of those three before and after its activation, the last one and mu, which
        makes the 8960 that the paper counts. ValueError for an encoder of fewer than three hidden layers, and for a
        conditional one, whose mu needs the label.
        """
        *layers, head = self.net.encoder
        if len(layers) < 3:
            raise ValueError(f"features need three hidden layers, this encoder has {len(layers)}")
        if self.labels:
            raise ValueError("features need an encoder that is not given the label, this one is conditional")
        rows = []
        for h in self.batches(x):
            hidden = []
            for layer in layers:
                h = layer.bn(layer.convolve(h))
                # Leaky ReLU is undone rather than left out: one pass serves both kinds.
                hidden.append((torch.where(h > 0, h, h / layer.wiring.slope), h))
            mu = head(h).flatten(1).chunk(2, dim=1)[0]
            (before, after), (middle, _), (last, _) = hidden[-3:]
            parts = {"script": (before, middle, last), "paper": (before, after, last)}[kind]
            rows.append(torch.cat([*(part.flatten(1) for part in parts), mu], dim=1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def classify(self, x: Array, *, generator: torch.Generator | None = None) -> Tensor:
        """Logits of the classes from D(x, z_hat), z_hat ~ q(z|x), [N, K]; ValueError unless D tells classes apart."""
        if not self.net.nets.classes:
            raise ValueError("this D has one logit: train it with --labels to tell classes apart")
        logits = []
        for batch in self.batches(x):
            eps = torch.randn(len(batch), self.latent, generator=generator).to(self.device)
            logits.append(self.net.classify(batch, None if self.recipe.semi.supervised_only else eps).cpu())
        return torch.cat(logits)

    @torch.no_grad()
    def decode(self, z: Tensor, y: Labels = None) -> Tensor:
        """x_tilde, [N, C, H, W]."""
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z must have shape [N, {self.latent}], not {list(z.shape)}")
        batches = zip(z.float().split(self.batch_size), self.label_batches(y, len(z)), strict=True)
        return torch.cat([self.net.decode(part.to(self.device), label).cpu() for part, label in batches])

    def reconstruct(self, x: Array, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """G_x(z_hat) with z_hat drawn from q(z|x), as the paper does, [N, C, H, W]."""
        return self.decode(self.encode(x, y, sample=True, generator=generator), y)

    def sample(self, n: int, y: Labels = None, *, seed: int | None = None) -> Tensor:
        """n images from z ~ N(0, I), [n, C, H, W]; the same ones for the same seed."""
        generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
        if seed is None:
            generator.seed()
        return self.decode(torch.randn(n, self.latent, generator=generator), y)

    @torch.no_grad()
    def interpolate(
        self,
        x1: Array,
        x2: Array,
        steps: int = 11,
        y1: Labels = None,
        y2: Labels = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decodings along the straight line between codes drawn for each pair of images, [N, steps, C, H, W].

        A conditional model goes along the straight line from y1 to y2 too.
        """
        z1, z2 = (self.encode(x, y, sample=True, generator=generator) for x, y in ((x1, y1), (x2, y2)))
        pairs = [v.to(self.device).split(max(1, self.batch_size // steps)) for v in (z1, z2)]
        labels = [self.label_batches(y, len(z1), max(1, self.batch_size // steps)) for y in (y1, y2)]
        parts = zip(*pairs, *labels, strict=True)
        return torch.cat([self.net.interpolate(*part, steps).cpu() for part in parts])

    def batches(self, x: Array) -> Iterator[Tensor]:
        x = torch.as_tensor(x)
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise ValueError(f"images must have shape [N, {', '.join(map(str, self.shape))}], not {list(x.shape)}")
        scale = 255 if x.dtype == torch.uint8 else 1
        for part in x.split(self.batch_size):
            yield part.to(self.device).contiguous(memory_format=torch.channels_last).float() / scale

    def label_batches(self, y: Labels, n: int, batch_size: int | None = None) -> list[Tensor | None]:
        """The labels of n images as the networks take them, batch by batch; a None each for an unconditional model."""
        batch_size = batch_size or self.batch_size
        if not self.labels:
            if y is not None:
                raise ValueError("y is for a conditional model, this one is unconditional")
            return [None] * -(-n // batch_size)
        if y is None:
            raise ValueError(f"a conditional model needs y: classes below {self.labels}, or {self.labels} attributes")
        y = torch.as_tensor(y)
        y = y.expand(n, *y.shape[1:]) if y.dim() == 0 or (y.dim() == 2 and len(y) == 1) else y
        if y.shape not in ((n,), (n, self.labels)):
            raise ValueError(f"y must have shape [{n}] or [{n}, {self.labels}], not {list(y.shape)}")
        if y.dim() == 1 and (y.is_floating_point() or (n and not 0 <= y.min() <= y.max() < self.labels)):
            raise ValueError(f"y must be integers from 0 to {self.labels - 1}, or have shape [{n}, {self.labels}]")
        return [part.to(self.device, torch.int64 if y.dim() == 1 else None) for part in y.split(batch_size)]
