"""Whether the losses and gradients of every update were finite, kept on the device until someone asks.

So no update of a GPU waits for the host, nor do captured ones; a CPU's are asked for before the optimizers move.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ali_dist import dist


class NonFinite(Exception):
    """A loss or gradient of the update that began at `num_images` is NaN or infinite; nothing since may be saved."""

    def __init__(self, names: list[str], num_images: int) -> None:
        super().__init__(f"{', '.join(names)} not finite in the update after {num_images:,} images")
        self.names, self.num_images = names, num_images


class Finite:
    """The verdict on all updates since the last `check`, the same on every rank.

    `at_once` says whether an update is to check itself before it moves anything: where that costs nothing, on a CPU.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.names: tuple[str, ...] = ()
        self.flags: Tensor | None = None  # uint8 [names]: all 1, or those of the first update that was not finite
        self.good: Tensor | None = None  # int64 []: updates before that one

    def note(self, values: dict[str, Tensor]) -> None:
        """Notes one update's numbers, the same names each time; starts a collective, but waits for nothing."""
        now = torch.isfinite(torch.stack([value.float() for value in values.values()])).to(torch.uint8)
        if self.flags is None:
            self.names, self.flags = tuple(values), torch.ones_like(now)
            self.good = torch.zeros((), dtype=torch.int64, device=now.device)
        everywhere = dist.gather(now).amin(0)
        self.flags.copy_(torch.where(self.flags.amin() > 0, everywhere, self.flags))
        self.good += self.flags.amin()

    def check(self, begun: Sequence[int]) -> None:
        """Waits for the device; NonFinite when one of the updates since the last call was not finite.

        They began at the images `begun`. To be called before anything of theirs is shown or saved, on every rank
        after the same update.
        """
        if self.flags is None:
            return
        *flags, good = torch.cat([self.flags.long(), self.good.view(1)]).tolist()
        if not all(flags):
            raise NonFinite([name for name, ok in zip(self.names, flags, strict=True) if not ok], begun[good])
        self.good.zero_()
