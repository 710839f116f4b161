"""Features of a prepared data set as Parquet files: what is computed, each file's writing, and their manifest."""

import contextlib
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from ali_dist.data.index import Index, load_index
from ali_dist.data.shards import Piece, Reader, blocks
from ali_dist.model import Model, Weights, load
from ali_dist.recipe import UserError
from ali_dist.run import fingerprint, parse_json, write_json
from ali_dist.state import derived_seed

FEATURES = {
    "mu": "mu of q(z|x)",
    "log_sigma": "log sigma of q(z|x)",
    "z": "a draw from q(z|x) by --seed, the same for an image whoever draws it",
    "layers": "what the SVM reads, as the authors' script has it",
    "layers_paper": "the same, as the paper counts it",
}
LAYERS = {"layers": "script", "layers_paper": "paper"}
MANIFEST = "_manifest.json"  # readers of Parquet pass over names that begin with _ or .
VERSION = 1
SECONDS_BETWEEN_MANIFESTS = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """Shard `number` of a split, images [first, last) of its stored order: one Parquet file."""

    split: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.first:09d}-{self.last:09d}.parquet"


def parts(index: Index, splits: list[str]) -> list[Part]:
    """All files of these splits."""
    found = []
    for split in splits:
        first = 0
        for number, shard in enumerate(index.shards(split)):
            found.append(Part(split, number, first, first + shard.images))
            first += shard.images
    return found


class Encoder:
    """Writes one Part's file; a worker makes it once. The bytes depend on weights, images and options alone."""

    def __init__(
        self,
        checkpoint: Path | str,
        weights: Weights,
        source: tuple[Path | str, str],
        features: list[str],
        seed: int,
        out: Path,
    ) -> None:
        torch.set_num_threads(1)  # another number of threads rounds differently
        self.model = load(checkpoint, weights, "cuda" if torch.cuda.is_available() else "cpu")
        self.index = load_index(*source)
        self.features, self.seed, self.out = features, seed, out
        self.ahead = ThreadPoolExecutor(1)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """The manifest's row of the file, which is there whole or not at all. UserError when it can't be written."""
        part = Part(**part)
        path = self.out / part.name
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(part, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            return {"name": part.name, "rows": part.last - part.first, **fingerprint(path)}
        except OSError as error:
            raise UserError(f"can't write {path} ({error.strerror or error}): give --out a folder with room") from error

    def _write(self, part: Part, path: Path) -> None:
        """One row group a block, so that a block is all that is held in memory."""
        reader, writer = Reader(self.index, part.split), None
        pieces = list(blocks([reader.shards[part.number]]))
        first = part.first
        with open(path, "wb") as file:
            for piece, (x, y) in zip(pieces, reader.read(pieces, self.ahead), strict=True):
                table = self._table(part.split, piece, first, x, y)
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table, row_group_size=len(table))
                first += len(piece)
            writer.close()
            file.flush()
            os.fsync(file.fileno())

    def _table(self, split: str, piece: Piece, first: int, x: np.ndarray, y: np.ndarray) -> pa.Table:
        """A block's rows: `index` in the split, `label` or `attributes`, and the features float32 [F]."""
        seed = derived_seed(self.seed, "encode", split, first)
        columns = {
            "index": pa.array(np.arange(first, first + len(piece))),
            "attributes" if y.ndim == 2 else "label": _column(y),
        }
        found = computed(self.model, torch.tensor(x), torch.tensor(y), self.features, seed)
        return pa.table(columns | {name: _column(found[name].numpy()) for name in self.features})


def computed(model: Model, x: Tensor, y: Tensor, features: list[str], seed: int) -> dict[str, Tensor]:
    """These of FEATURES, float32 [N, F], of images x uint8 [N, C, H, W] with labels y."""
    label = y if model.labels else None
    found = {name: model.features(x, kind) for name, kind in LAYERS.items() if name in features}
    if {"mu", "log_sigma", "z"} & set(features):
        mu, log_sigma = model.posterior(x, label)
        eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(seed))
        found |= {"mu": mu, "log_sigma": log_sigma, "z": mu + log_sigma.exp() * eps}
    return found


class Manifest:
    """DIR/_manifest.json: how the features were made, and each finished file's rows, bytes and SHA-256.

    `encoding` is all that decides the values. UserError when the folder's own is another, or damaged.
    """

    def __init__(self, out: Path, encoding: dict[str, Any]) -> None:
        self.path, self.encoding, self.files, self.written = out / MANIFEST, encoding, {}, 0.0
        if not self.path.exists():
            return
        try:
            tree = parse_json(self.path.read_text(encoding="utf-8"))
            before, files = dict(tree["encoding"]), dict(tree["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete {out}, or choose another --out") from error
        changed = [
            f"{key}: {before.get(key)} -> {encoding.get(key)}"
            for key in sorted(before.keys() | encoding.keys())
            if before.get(key) != encoding.get(key)
        ]
        if changed:
            raise UserError(f"{out} holds another encoding ({'; '.join(changed)}): choose another --out, or delete it")
        self.files = files

    def whole(self, part: Part) -> bool:
        """Whether the part's file is there with the bytes that were written."""
        row = self.files.get(part.name)
        try:
            return bool(row) and row == {"rows": part.last - part.first, **fingerprint(self.path.parent / part.name)}
        except OSError:
            return False

    def add(self, row: dict[str, Any]) -> None:
        """Notes a finished file, on the disk within a second or so: what a crash forgets is only made again.

        UserError when the file, which another node may have written, is not to be seen here.
        """
        path = self.path.parent / row["name"]
        if not path.is_file():
            raise UserError(f"{path}, which a worker has written, is not here: give --out a folder that all nodes see")
        self.files[row["name"]] = {key: row[key] for key in ("rows", "bytes", "sha256")}
        if time.monotonic() - self.written > SECONDS_BETWEEN_MANIFESTS:
            self.write(complete=False)
            self.written = time.monotonic()

    def write(self, complete: bool) -> None:
        files = dict(sorted(self.files.items()))
        write_json(self.path, {"encoding": self.encoding, "complete": complete, "files": files})


def described(
    model: Model, weights: Weights, index: Index, splits: list[str], features: list[str], seed: int
) -> dict[str, Any]:
    """The `encoding` of a manifest."""
    images = {split: [[shard.sha256, shard.images] for shard in index.shards(split)] for split in sorted(splits)}
    return {
        "version": VERSION,
        "networks": model.recipe.networks,
        "model_sha256": weights_sha256(model.net),
        "weights": weights,
        "dataset": index.name,
        "images": {split: index.images(split) for split in splits},
        "images_sha256": hashlib.sha256(repr(images).encode()).hexdigest(),
        "features": features,
        "seed": seed if "z" in features else None,
        "versions": {"torch": torch.__version__, "pyarrow": pa.__version__},
    }


def weights_sha256(net: nn.Module) -> str:
    """Of all names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds the folder, made if need be, for this process; the system lets go of it when the process dies."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process encodes to {out}: wait for it, or choose another --out") from None
        for half_written in out.glob("*/.*.parquet.*"):
            half_written.unlink(missing_ok=True)
        yield


def _column(rows: np.ndarray) -> pa.Array:
    """[N] or [N, F]."""
    flat = pa.array(np.ascontiguousarray(rows).ravel())
    return flat if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
