"""How often D is wrong about the class, after semi-supervised training (arXiv:1606.00704, section 4.4)."""

import torch

from ali_dist.data.index import Index
from ali_dist.evaluate.data import read, unseen_split
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import Model
from ali_dist.recipe import UserError

DRAWS = 3


def classification(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """Error on all test images: the mean over draws of z_hat, one an image; that of the draws' mean probabilities."""
    if not model.net.nets.classes:
        raise UserError(f"{model.checkpoint} tells no classes apart: --metrics classification is for --labels runs")
    split = unseen_split(model, index)
    images = index.images(split)
    wrong, wrong_together = map(sum, zip(*work.each(_wrong, images, model, index, split), strict=True))
    semi = model.recipe.semi
    return {
        "error": wrong / (DRAWS * images),
        "error_of_mean_probability": wrong_together / images,
        "draws": DRAWS,
        "seed": 0,
        "split": split,
        "test_images": images,
        "labels": semi.labels,
        "supervised_only": semi.supervised_only,
    }


def _wrong(model: Model, index: Index, split: str, chunk: Chunk) -> tuple[int, int]:
    batch, generator = read(index, split, chunk), chunk.generator()
    logits = torch.stack([model.classify(batch.x, generator=generator) for _ in range(DRAWS)])  # [draws, n, K]
    wrong = (logits.argmax(2) != batch.y).sum().item()
    return wrong, (logits.softmax(2).mean(0).argmax(1) != batch.y).sum().item()
