"""The toy study's networks as tables, one `Row` a layer (arXiv:1606.00704, appendix A; the authors' ali_mixture.py)."""

from dataclasses import dataclass
from typing import Literal

X_DIM = 2
Z_DIM = 2
PIECES = 5  # of maxout

Activation = Literal["bn_relu", "maxout", "linear"]


@dataclass(frozen=True, slots=True)
class Row:
    """A matrix product and what follows it: batch norm and ReLU (no bias), a bias and maxout, or a bias alone."""

    units: int
    act: Activation

    @property
    def columns(self) -> int:
        """Columns of the weight matrix: a maxout unit has one for each of its pieces."""
        return self.units * PIECES if self.act == "maxout" else self.units


@dataclass(frozen=True, slots=True)
class Network:
    """A chain of layers on inputs of `inputs` numbers."""

    inputs: int
    rows: tuple[Row, ...]

    def sizes(self) -> list[tuple[int, Row]]:
        """Each row with the size of its input."""
        return list(zip([self.inputs, *(row.units for row in self.rows)], self.rows, strict=False))


def hidden(act: Activation, units: int, count: int) -> tuple[Row, ...]:
    return (Row(units, act),) * count


# z_hat = f([x, eps]): a change of variables, not a Gaussian.
ENCODER = Network(X_DIM + Z_DIM, (*hidden("bn_relu", 400, 2), Row(Z_DIM, "linear")))
DECODER = Network(Z_DIM, (*hidden("bn_relu", 400, 4), Row(X_DIM, "linear")))
JOINT_DISCRIMINATOR = Network(X_DIM + Z_DIM, (*hidden("maxout", 200, 3), Row(1, "linear")))
X_DISCRIMINATOR = Network(X_DIM, JOINT_DISCRIMINATOR.rows)
GAUSSIAN_ENCODER = Network(X_DIM, (*hidden("bn_relu", 400, 2), Row(2 * Z_DIM, "linear")))  # [mu, log_sigma]

# Model -> the networks it trains. Inverse mapping and post-hoc inference also use a GAN's decoder, unchanged.
MODELS = {
    "ali": {"encoder": ENCODER, "decoder": DECODER, "discriminator": JOINT_DISCRIMINATOR},
    "gan": {"decoder": DECODER, "discriminator": X_DISCRIMINATOR},
    "inverse": {"encoder": ENCODER},
    "posthoc": {"encoder": ENCODER, "discriminator": JOINT_DISCRIMINATOR},
    "vae": {"encoder": GAUSSIAN_ENCODER, "decoder": DECODER},
}
