"""The networks, built from their tables: G_z, G_x and the joint discriminator D (arXiv:1606.00704, appendix A)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ali_dist.layers import Chain, Embedding, Layer, Wiring, beside
from ali_dist.losses import evidence
from ali_dist.seeds import Both, for_both
from ali_dist.streams import branch, join
from ali_dist.tables import INIT_STD, Networks
from kernels import bias_leaky_relu_dropout, decoder_head, image_pair, joint_input, latent_pair


class Discriminator(nn.Module):
    """D(x, z): D_x's and D_z's features side by side along channels, then the joint layers, to one or K logits.

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
        self.side: torch.cuda.Stream | None = None
        self.joint_dropout, self.embedding_offset = joint_dropout, 2 + len(self.x) + len(self.z) + len(self.joint)

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        rng: Tensor | None = None,
        c: Tensor | None = None,
        pair: bool = False,
        two_seeds: bool = False,
    ) -> tuple[Tensor | Both, Tensor | Both]:
        """float32 logits [N] or [N, K], and what the last layer makes them of, [N, F, 1, 1].

        x [N, C, H, W], z [N, latent, 1, 1], c the label's embedding [N, E, 1, 1] or None. `pair`: the first half of x
        is data, which needs no gradient. `two_seeds`: both results are for both losses (see ali_dist.seeds).
        """
        first_x, *hidden_x, last_x = self.x
        *hidden_z, last_z = self.z
        with branch(self.side):
            for layer in hidden_z:
                z = layer(z, rng, two_seeds)
            z = last_z.convolve(z, two_seeds=two_seeds)
        x = first_x.activate(first_x.convolve(x, pair, two_seeds), rng)
        for layer in hidden_x:
            x = layer(x, rng, two_seeds)
        x = last_x.convolve(x, two_seeds=two_seeds)
        join(self.side, *(z if two_seeds else [z]))
        others = [*last_x.others(), *last_z.others()]
        joined = partial(self._joined, rng=rng, c=c)
        joint = for_both(joined, [x, z], others) if two_seeds else joined(x, z)
        *hidden, head = self.joint
        for layer in hidden:
            joint = layer(joint, rng, two_seeds)
        logits = head(joint, two_seeds=two_seeds)
        if two_seeds:
            return tuple(each.flatten(1).squeeze(1) for each in logits), joint
        return logits.flatten(1).squeeze(1), joint

    def _joined(self, x: Tensor, z: Tensor, rng: Tensor | None, c: Tensor | None) -> Tensor:
        """The joint layers' input, of what the last convolutions of D_x and D_z made."""
        last_x, last_z = self.x[-1], self.z[-1]
        if last_x.bn is not None and last_z.row.act == "lrelu":
            return joint_input(x, z, z_bias=last_z.bias, c=c, **last_x.bn.arguments(rng))
        if c is not None and self.training:
            impl = last_x.wiring.impl
            c = bias_leaky_relu_dropout(c, None, 1.0, self.joint_dropout, rng, self.embedding_offset, impl)
        return beside(torch.cat([last_x.activate(x, rng), last_z.activate(z, rng)], dim=1), c)


class Cut(NamedTuple):
    """Where a pass is cut, so that each part can be gone back through by itself."""

    made: tuple[Tensor, Tensor] | tuple[Both, Both]  # what the part before made
    seen: tuple[Tensor, Tensor]  # the same as the part behind sees it: leaves, on which its backward leaves gradients


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass of ALI yields, q first: codes [N, latent], images [N, C, H, W], and of D logits float32 [N]
    or [N, K] and the features [N, F, 1, 1] that they are made of."""

    logits_q: Tensor  # D(x, z_hat)
    logits_p: Tensor  # D(x_tilde, z)
    features_q: Tensor
    features_p: Tensor
    mu: Tensor
    log_sigma: Tensor
    z_hat: Tensor
    x_tilde: Tensor
    cut: Cut | None = None  # in front of D: mu and log_sigma side by side, and x_tilde
    verdict: Cut | None = None  # behind D, with two seeds: its logits and features, made for both losses


class ALI(nn.Module):
    """Encoder, decoder and joint discriminator; in conditional networks all of them are given y.

    Parameters are uninitialised until `reset_parameters`, so that shapes can be built on the meta device. Where y is
    an argument it is classes int64 [N], or attributes [N, labels]; unconditional networks do not look at it.
    """

    def __init__(
        self,
        nets: Networks,
        gather: Callable[[Tensor], Tensor] | None = None,
        impl: str = "auto",
        train_embedding: bool = False,
        max_sigma: float | None = None,
    ) -> None:
        super().__init__()
        self.nets, self.impl, self.max_sigma, self.side = nets, impl, max_sigma, None
        wiring, parts = Wiring(nets.slope, gather, impl), nets.parts()
        self.encoder = Chain(parts["encoder"], wiring)
        self.decoder = Chain(parts["decoder"], wiring)
        self.discriminator = Discriminator(nets, wiring)
        width = nets.encoder[-1].embedding
        self.embedding = Embedding(nets.labels, width, train_embedding) if nets.labels else None

    def reset_parameters(self, mean_image: Tensor, embedding_std: float = INIT_STD) -> None:
        """The authors' initialisation; `mean_image` float [C, H, W] in [0, 1] sets the decoder's output bias."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.reset_parameters()
        if self.embedding is not None:
            self.embedding.reset_parameters(embedding_std)
        mean = mean_image.double().clamp(1e-7, 1 - 1e-7)
        with torch.no_grad():
            self.decoder[-1].bias.copy_(torch.logit(mean))
            if self.nets.classes:  # so that D begins undecided here too: K logits of 0 would be worth log K
                self.discriminator.joint[-1].bias.fill_(-math.log(self.nets.classes))

    def branch_on(self, side: torch.cuda.Stream | None) -> None:
        """Runs the encoder beside the decoder, and D_z beside D_x, on a second stream, and so backward."""
        self.side = self.discriminator.side = side

    def embed(self, y: Tensor | None) -> Tensor | None:
        """What the networks see of y: its embedding [N, E, 1, 1]; None in unconditional ones."""
        return None if self.embedding is None else self.embedding(y)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [N, C, H, W] in [0, 1] -> mu and log_sigma, float32 [N, latent] each."""
        mu, log_sigma = self._encoded(x, self.embed(y)).flatten(1).chunk(2, dim=1)
        return mu, log_sigma

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z [N, latent] -> x_tilde, float32 [N, C, H, W] in (0, 1)."""
        return self._decoded(z, self.embed(y))

    def score(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The logit of D(x, z), [N], for x [N, C, H, W] in [0, 1] and z [N, latent], without dropout."""
        return evidence(self.discriminator(x, z[:, :, None, None], c=self.embed(y))[0])

    def classify(self, x: Tensor, eps: Tensor | None) -> Tensor:
        """Logits [N, K] of the classes of x [N, C, H, W] in [0, 1], from D(x, z_hat) with the noise eps [N, latent].

        Without `eps` from D(x, 0): what a D trained alone has seen.
        """
        if eps is None:
            z = x.new_zeros(len(x), self.nets.latent)
        else:
            mu, log_sigma = self.encode(x)
            z = mu.float() + log_sigma.float().exp() * eps
        return self.discriminator(x, z[:, :, None, None])[0]

    def interpolate(self, z1: Tensor, z2: Tensor, y1: Tensor | None, y2: Tensor | None, steps: int) -> Tensor:
        """Decodings along the straight lines from z1 to z2 [N, latent], and from y1 to y2: [N, steps, C, H, W]."""
        t = torch.linspace(0, 1, steps, device=z1.device)[None, :, None]

        def line(start: Tensor, end: Tensor) -> Tensor:
            return (start[:, None] * (1 - t) + end[:, None] * t).flatten(0, 1)

        y = line(*map(self.embedding.numbers, (y1, y2))) if self.embedding is not None else None
        return self.decode(line(z1, z2), y).unflatten(0, (len(z1), steps))

    def _encoded(self, x: Tensor, c: Tensor | None) -> Tensor:
        """[mu, log_sigma] along channels, [N, 2 * latent, 1, 1]; log_sigma bends towards its bound 1/4 below it."""
        encoded = self.encoder(x, c=c)
        if self.max_sigma is None:
            return encoded
        mu, log_sigma = encoded.chunk(2, dim=1)
        bound = math.log(self.max_sigma)
        return torch.cat([mu, (bound - F.softplus(bound - log_sigma, beta=4)).to(mu.dtype)], dim=1)

    def _decoded(self, z: Tensor, c: Tensor | None) -> Tensor:
        h = beside(z[:, :, None, None], c)
        *hidden, last, head = self.decoder
        for layer in hidden:
            h = layer(h)
        norm = last.bn.arguments()
        for name in ("dropout", "rng", "offset"):  # the decoder has none
            del norm[name]
        return decoder_head(last.convolve(h), head_weight=head.weight, head_bias=head.bias, **norm)

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        eps: Tensor,
        rng: Tensor | None = None,
        y: Tensor | None = None,
        cut: bool = False,
        two_seeds: bool = False,
    ) -> Pass:
        """One pass over both joints: x in [0, 1] [N, C, H, W], z ~ p(z) and eps ~ N(0, I) [N, latent], y of x.

        D runs once on the stacked halves, so its batch norm and dropout see both together; x_tilde has the y of the x
        beside it. `rng` is dropout's int64 [seed, step] on the device, needed in training. `cut`: no gradient goes back
        from D into encoder and decoder by itself; with `two_seeds` none from the losses into D either.
        """
        c = self.embed(y)
        with branch(self.side):
            encoded = self._encoded(x, c)
        x_tilde = self._decoded(z, c)
        join(self.side, encoded)
        made = (encoded, x_tilde)
        if cut:
            encoded, x_tilde = (tensor.detach().requires_grad_() for tensor in made)
        kind = "cuda" if x.is_cuda else "cpu"
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        drop_x, drop_z = (
            rows[0].dropout if self.training else 0.0 for rows in (self.nets.discriminator_x, self.nets.discriminator_z)
        )
        images = image_pair(x, x_tilde, dtype, drop_x, rng, 0, self.impl)
        codes, z_hat = latent_pair(encoded, eps, z, dtype, drop_z, rng, 1, self.impl)
        # D takes the embedding as it is: an L_G that could change it there would hide y from D
        both = None if c is None else c.detach().to(dtype).repeat(2, 1, 1, 1)
        logits, features = judged = self.discriminator(images, codes, rng, both, pair=True, two_seeds=two_seeds)
        if two_seeds:
            logits, features = (both[0].detach().requires_grad_() for both in judged)
        mu, log_sigma = encoded.flatten(1).chunk(2, dim=1)
        before = Cut(made, (encoded, x_tilde)) if cut else None
        behind = Cut(judged, (logits, features)) if two_seeds else None
        return Pass(*logits.chunk(2), *features.chunk(2), mu, log_sigma, z_hat, x_tilde, before, behind)
