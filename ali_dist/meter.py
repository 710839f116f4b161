"""Numbers of a run: moments kept on the device, one collective a tick, three sinks with the same names."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ali_dist import dist
from ali_dist.patience import patiently
from ali_dist.run import append_line, read_lines

log = logging.getLogger(__name__)

SCALARS = (
    "loss/",
    "accuracy/",
    "error/",
    "grad_norm/",
)  # reported by their mean; everything else by mean, std, min, max

LAYOUT = {  # TensorBoard's "custom scalars" page: the first look that tells a healthy run from a sick one
    "ALI": {
        "losses": ["Multiline", ["^loss/d$", "^loss/g$"]],
        "D's accuracy (0.5 each: balance; 1: D has won)": ["Multiline", ["^accuracy/"]],
        "gradient norms": ["Multiline", ["^grad_norm/"]],
    },
    "Classes": {
        "error": ["Multiline", ["error"]],
        "loss on images with labels": ["Multiline", ["loss/labelled$"]],
    },
    "Encoder": {
        "mu": ["Multiline", ["^mu/"]],
        "sigma": ["Multiline", ["^sigma/"]],
        "z_hat": ["Multiline", ["^z_hat/"]],
    },
    "Data": {"damaged": ["Multiline", ["^data/"]]},
    "Speed": {
        "images a second": ["Multiline", ["^speed/images_per_s"]],
        "share of time waiting for data": ["Multiline", ["^speed/data_wait_share$"]],
    },
}


class Meter:
    """Collects tensors by name; every rank must report the same names between two `collect` calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: dict[str, Tensor] = {}

    @torch.no_grad()
    def report(self, values: Mapping[str, Tensor]) -> None:
        """Adds every element of each tensor (any shape) to its name's count, sum, sum of squares, min and max.

        After the first report of a name all happens on the device, in the same memory each time.
        """
        alike: dict[torch.Size, list[str]] = {}
        for name, value in values.items():
            alike.setdefault(value.shape, []).append(name)
            if name not in self.moments:
                self.moments[name] = torch.zeros(5, dtype=torch.float64, device=self.device)
                _forget(self.moments[name])
        for shape, names in alike.items():  # a few launches for all tensors of one shape
            if not shape.numel():
                continue
            rows = torch.stack([values[name].detach() for name in names]).double().reshape(len(names), -1)
            low, high = rows.aminmax(dim=1)
            count = torch.full_like(low, shape.numel())
            news = torch.stack([count, rows.sum(1), rows.square().sum(1), low, high], 1).unbind()
            self._add(dict(zip(names, news, strict=True)))

    def take(self, other: "Meter") -> None:
        """Adds what another meter on this device has collected, which forgets it."""
        for name, moments in other.moments.items():
            if name not in self.moments:
                self.moments[name] = moments.clone()
            else:
                self._add({name: moments})
            _forget(moments)

    def _add(self, news: dict[str, Tensor]) -> None:
        mine, theirs = [self.moments[name] for name in news], list(news.values())
        torch._foreach_add_([row[:3] for row in mine], [row[:3] for row in theirs])
        torch._foreach_minimum_([row[3:4] for row in mine], [row[3:4] for row in theirs])
        torch._foreach_maximum_([row[4:] for row in mine], [row[4:] for row in theirs])

    def collect(self) -> dict[str, float]:
        """Over all ranks and all reports since the last call: one number a loss, four a statistic; then forgets."""
        if not self.moments:
            return {}
        names = sorted(self.moments)
        rows = dist.gather(torch.stack([self.moments[name] for name in names])).cpu()  # [W, names, 5]
        self.moments = {}
        sums, low, high = rows[..., :3].sum(0), rows[..., 3].amin(0), rows[..., 4].amax(0)
        out = {}
        for i, name in enumerate(names):
            count, total, squares = sums[i].tolist()
            mean = total / count if count else math.nan
            if name.startswith(SCALARS):
                out[name] = mean
                continue
            variance = squares / count - mean * mean if count else math.nan
            out[f"{name}/mean"] = mean
            out[f"{name}/std"] = math.sqrt(max(variance, 0.0)) if variance == variance else math.nan
            out[f"{name}/min"], out[f"{name}/max"] = low[i].item(), high[i].item()
        return out


def _forget(moments: Tensor) -> None:
    moments[:3] = 0
    moments[3:4] = math.inf
    moments[4:] = -math.inf


class Sinks:
    """Rank 0's writers: `ticks.jsonl` and TensorBoard. Continuing a run at `num_images` drops what came later.

    UserError when the ticks can't be written for long. TensorBoard, which shows what is elsewhere too, may miss some.
    """

    def __init__(self, ticks: Path, tensorboard: Path, num_images: int) -> None:
        self.ticks, self.tensorboard = ticks, tensorboard
        patiently(lambda: _keep_ticks_up_to(ticks, num_images), f"write to {ticks}")
        self.writer: SummaryWriter | None = SummaryWriter(
            tensorboard, purge_step=num_images + 1 if num_images else None
        )
        if not num_images:
            self._show(lambda writer: writer.add_custom_scalars(LAYOUT))

    def scalars(self, values: Mapping[str, float], num_images: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"num_images": num_images, "time": time.time(), **finite}
        patiently(lambda: append_line(self.ticks, line), f"write to {self.ticks}")

        def show(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, num_images)
            writer.flush()

        self._show(show)

    def image(self, name: str, pixels: Tensor, num_images: int) -> None:
        """pixels uint8 [C, H, W]."""
        self._show(lambda writer: writer.add_image(name, pixels, num_images))

    def text(self, name: str, text: str) -> None:
        self._show(lambda writer: writer.add_text(name, text))

    def close(self) -> None:
        self._show(lambda writer: writer.close())

    def _show(self, draw: Callable[[SummaryWriter], None]) -> None:
        try:
            # A writer that has failed once fails for ever; a new one would make the folder of a storage that is away
            if self.writer is None and self.tensorboard.is_dir():
                self.writer = SummaryWriter(self.tensorboard)
            if self.writer is not None:
                draw(self.writer)
        except OSError as error:
            log.warning(f"TensorBoard misses a point: {error}")
            self.writer = None


def read_ticks(path: Path) -> list[dict[str, float]]:
    """The lines of a ticks.jsonl; a last line cut short by a crash is left out."""
    return read_lines(path)


def _keep_ticks_up_to(path: Path, num_images: int) -> None:
    kept = [tick for tick in read_ticks(path) if tick["num_images"] <= num_images]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(tick) + "\n" for tick in kept))
    os.replace(partial, path)
