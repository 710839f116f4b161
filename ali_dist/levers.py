"""What makes an update fast and changes nothing but rounding: one switch each, so that each can be measured alone."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Levers:
    """The defaults are what every run gets; where a device or recipe has no use for a lever it does nothing."""

    one_sweep: bool = True
    """Where D judges each pair alone, one backward pass through it for both losses instead of one for each."""
    stacked_seeds: bool = False
    """Elsewhere too: both losses' gradients side by side, on small planes as the rows of one product."""
    graph: bool = True
    """On a GPU, a whole update as one CUDA graph."""
    weight_copies: bool = True
    """With the fused Adam in bfloat16: convolutions read the rounded weights that it writes, instead of rounding."""
    overlap_adam: bool = False
    """In a graph: the discriminator's Adam beside the backward pass of encoder and decoder."""
    branches: bool = False
    """In a graph: the encoder beside the decoder, and D_x beside D_z."""
    tune_convolutions: bool = False
    """On a GPU, cuDNN times its algorithms and takes the fastest; two runs may then differ in rounding."""
    bf16_gradients: bool = False
    """Workers exchange gradients in bfloat16, half the bytes; each number is then rounded to 8 bits of precision."""


FAST = Levers()
PLAIN = Levers(**{field.name: False for field in dataclasses.fields(Levers)})
