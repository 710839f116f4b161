"""The ways of reading the same images: ours, what a user would otherwise take, and the limit. One row each.

Runs in each peer's own environment, where neither our other dependencies nor the other peers need exist: every library
is imported where it is used. All deliver batches of 256: x uint8 [n, C, H, W], y int64 [n], in a new order each epoch.
Formats of arrays hold each image's bytes as they are and join them into a batch, which is every library's fastest.
"""

import functools
import importlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

BATCH = 256
CHUNK = 2**26  # bytes of a chunk or shard of the peers' formats
FILES = 8192  # images of a shard of JPEG files
OPERATORS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))

Batch = tuple[Tensor, Tensor]
Epochs = Iterable[Batch]  # an epoch each time it is iterated over


@dataclass(frozen=True, slots=True)
class Peer:
    """One way of reading.

    `open(folder, workers)` gives the epochs; `folder` is what `convert(source, folder)` made, or the source itself:
    "shards" (a prepared data set of ours), "pixels" (x.npy and y.npy) or "files" (a folder a
    class, named by its number).
    """

    reads: str
    open: Callable[[Path, int], Epochs]
    convert: Callable[[Path, Path], None] | None = None
    packages: tuple[str, ...] = ()
    """What its environment holds; none: ours."""
    workers: tuple[int, ...] = (0, 2)


def pixels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """x uint8 [N, C, H, W], memory-mapped, and y int64 [N]."""
    return np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy")


def image_files(folder: Path) -> list[tuple[Path, int]]:
    """All files with their classes, shuffled once."""
    found = sorted(path for path in folder.glob("*/*"))
    return [(found[i], int(found[i].parent.name)) for i in np.random.default_rng(0).permutation(len(found))]


def join(shape: tuple[int, ...], items: list[dict[str, Any]]) -> Batch:
    """A batch from images' bytes `x` and labels `y`."""
    x = torch.frombuffer(bytearray(b"".join([item["x"] for item in items])), dtype=torch.uint8)
    return x.view(-1, *shape), torch.tensor([item["y"] for item in items])


def keep_shape(source: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, whose shape is written beside the data made of them."""
    x, y = pixels(source)
    np.save(out / "shape.npy", x.shape[1:])
    return x, y


def joiner(folder: Path) -> Callable[[list[dict[str, Any]]], Batch]:
    return functools.partial(join, tuple(np.load(folder / "shape.npy").tolist()))


class OurEpochs:
    """Our endless stream in portions of an epoch; the first is one exactly, later ones begin inside a batch."""

    def __init__(self, folder: Path, workers: int) -> None:
        from ali_dist.data.index import load_index
        from ali_dist.data.stream import Stream
        from ali_dist.recipes import RECIPES

        index = load_index(folder.parent, folder.name)
        self.images = index.images("train")
        self.stream = Stream(index, "train", seed=0, lanes=RECIPES["tinyimagenet"].lanes, micro_batch=BATCH)

    def __iter__(self) -> Iterator[Batch]:
        left = self.images
        while left > 0:
            batch = next(self.stream)
            yield batch.x[:left], batch.y[:left]
            left -= len(batch.y)


class Stored:
    """The pixels as a reader of a data set gives them."""

    def __init__(self, folder: Path) -> None:
        self.x, self.y = pixels(folder)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.x[i], int(self.y[i])


def write_compressed(source: Path, out: Path) -> None:
    """A data set as `prepare --compress` makes it."""
    from ali_dist.data.pack import new_folder, pack
    from ali_dist.data.types import DatasetSpec, OpenSource

    images = Stored(source)
    classes = tuple(map(str, range(int(images.y.max()) + 1)))
    spec = DatasetSpec(name="compressed", shape=images.x.shape[1:], counts={}, open=None)
    with new_folder(out, spec.name) as folder:
        pack(spec, OpenSource(classes, {"train": images}, serial=True), None, folder, compress=True)


class Memmap:
    """Copies out of one memory-mapped array: what is left when nothing but the bytes is moved."""

    def __init__(self, folder: Path, workers: int, *, random: bool) -> None:
        self.x, self.y = pixels(folder)
        self.random, self.rng = random, np.random.default_rng(0)

    def __iter__(self) -> Iterator[Batch]:
        order = self.rng.permutation(len(self.y)) if self.random else None
        for start in range(0, len(self.y), BATCH):
            rows = slice(start, start + BATCH) if order is None else order[start : start + BATCH]
            yield torch.from_numpy(np.array(self.x[rows])), torch.from_numpy(np.array(self.y[rows]))


def open_imagefolder(folder: Path, workers: int) -> Epochs:
    import_with_torchvision("torchvision")
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    images = ImageFolder(str(folder), PILToTensor())
    # Its classes are the folders in alphabetical order, ours their numbers
    numbers = [int(name) for name in images.classes]
    images.target_transform = numbers.__getitem__
    return DataLoader(images, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def write_jpeg_shards(source: Path, out: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=FILES, verbose=0) as writer:
        for i, (path, label) in enumerate(image_files(source)):
            writer.write({"__key__": f"{i:08d}", "jpg": path.read_bytes(), "cls": label})


def open_jpeg_shards(folder: Path, workers: int, *, decode: str) -> Epochs:
    import webdataset as wds

    shards = sorted(map(str, folder.glob("*.tar")))
    samples = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000)
    if decode == "own":
        samples = samples.map(_decode)
    else:
        samples = samples.decode(decode).to_tuple("jpg", "cls")
    batches = samples.batched(BATCH, collation_fn=_stack)
    return wds.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def _decode(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), int(sample["cls"])


def _stack(samples: list[tuple[np.ndarray, int]]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _rows(folder: str) -> Iterator[dict[str, Any]]:
    x, y = pixels(Path(folder))
    for image, label in zip(x, y, strict=True):
        yield {"x": image.tobytes(), "y": int(label)}


def write_arrow(source: Path, out: Path) -> None:
    from datasets import Dataset, Features, Value

    keep_shape(source, out)
    features = Features({"x": Value("binary"), "y": Value("int64")})
    rows = Dataset.from_generator(
        _rows, features=features, gen_kwargs={"folder": str(source)}, cache_dir=str(out / "cache")
    )
    rows.save_to_disk(str(out / "arrow"))
    shutil.rmtree(out / "cache")


def open_arrow(folder: Path, workers: int) -> Epochs:
    from datasets import load_from_disk

    rows = load_from_disk(str(folder / "arrow"))
    return DataLoader(
        rows, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, collate_fn=joiner(folder)
    )


@functools.lru_cache(1)
def _opened(folder: str) -> tuple[np.ndarray, np.ndarray]:
    return pixels(Path(folder))


def _row(folder: str, i: int) -> dict[str, Any]:
    x, y = _opened(folder)
    return {"x": x[i].tobytes(), "y": int(y[i])}


def write_litdata(source: Path, out: Path) -> None:
    import litdata

    _, y = keep_shape(source, out)
    row = functools.partial(_row, str(source))
    workers = min(os.cpu_count() or 1, len(y))
    litdata.optimize(row, list(range(len(y))), str(out / "chunks"), chunk_bytes=CHUNK, num_workers=workers)


def open_litdata(folder: Path, workers: int) -> Epochs:
    import litdata

    rows = litdata.StreamingDataset(str(folder / "chunks"), shuffle=True, drop_last=False)
    return litdata.StreamingDataLoader(
        rows,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=joiner(folder),
        drop_last=False,
    )


def write_mds(source: Path, out: Path) -> None:
    streaming = import_with_torchvision("streaming")
    keep_shape(source, out)
    with streaming.MDSWriter(
        out=str(out / "mds"), columns={"x": "bytes", "y": "int"}, size_limit=CHUNK, progress_bar=False
    ) as writer:
        for row in _rows(str(source)):
            writer.write(row)


def open_mds(folder: Path, workers: int) -> Epochs:
    streaming = import_with_torchvision("streaming")
    import_with_torchvision("streaming.base.util").clean_stale_shared_memory()
    rows = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    return DataLoader(
        rows, BATCH, num_workers=workers, persistent_workers=workers > 0, collate_fn=joiner(folder), drop_last=False
    )


def import_with_torchvision(name: str) -> Any:
    """Imports a module that needs torchvision.

    The registry's torchvision is built for CUDA: beside PyTorch for CPUs its compiled operators can't be loaded, and
    its import fails unless their names exist. Nothing here calls them.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError:
        import_with_torchvision.library = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as they do
        for schema in OPERATORS:
            import_with_torchvision.library.define(schema)
        return importlib.import_module(name)


COMMON = ("torch==2.13.0", "numpy==2.4.6", "pillow==13.0.0")
IMAGES_AND_ARRAYS = (*COMMON, "torchvision==0.28.0", "datasets==5.2.0", "litdata==0.2.76")
MOSAICML = ("torch==2.13.0", "numpy==2.1.3", "mosaicml-streaming==0.13.0")  # it wants an older numpy

PEERS: dict[str, Peer] = {
    "ours": Peer("shards", OurEpochs, workers=(0,)),
    "ours-compressed": Peer(
        "pixels", lambda folder, workers: OurEpochs(folder / "compressed", workers), write_compressed, workers=(0,)
    ),
    "litdata": Peer("pixels", open_litdata, write_litdata, IMAGES_AND_ARRAYS),
    "huggingface": Peer("pixels", open_arrow, write_arrow, IMAGES_AND_ARRAYS),
    "mosaicml": Peer("pixels", open_mds, write_mds, MOSAICML),
    "imagefolder": Peer("files", open_imagefolder, None, IMAGES_AND_ARRAYS),
    "webdataset": Peer("files", functools.partial(open_jpeg_shards, decode="own"), write_jpeg_shards),
    "webdataset-rgb8": Peer("files", functools.partial(open_jpeg_shards, decode="rgb8"), write_jpeg_shards),
    "memmap": Peer("pixels", functools.partial(Memmap, random=False), workers=(0,)),
    "memmap-random": Peer("pixels", functools.partial(Memmap, random=True), workers=(0,)),
}
