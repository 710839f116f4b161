import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ali_dist.bench import __main__ as command
from ali_dist.bench import data as bench
from ali_dist.bench import inputs
from ali_dist.bench.bars import bars
from ali_dist.bench.children import Failed, environment, run
from ali_dist.bench.peers import PEERS
from ali_dist.bench.processes import TICKS, cached_share, cpu_seconds, drop, files_below, warm
from ali_dist.bench.reader import contents, measure
from ali_dist.data.index import Index, load_index
from ali_dist.data.pack import new_folder, pack
from ali_dist.data.table import DATASETS
from ali_dist.data.types import SHARD
from ali_dist.recipe import UserError

SHAPE = (3, 64, 64)
CLASSES = {"cat": 110, "dog": 120, "owl": 100}  # images; every tenth is held out
HERE = Path(sys.executable)


def jpeg(seed: int, size: int = 64) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((size, size)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number, (name, images) in enumerate(CLASSES.items()):
        (folder / name).mkdir()
        for i in range(images):
            (folder / name / f"{i:04d}.jpg").write_bytes(jpeg(1000 * number + i))
    return folder


@pytest.fixture(scope="module")
def data_folder(source, tmp_path_factory) -> Path:
    folder, spec = tmp_path_factory.mktemp("data"), DATASETS["folder"]
    with new_folder(folder, spec.name) as partial:
        pack(spec, spec.open(source, {}), source, partial)
    return folder


@pytest.fixture(scope="module")
def index(data_folder) -> Index:
    return load_index(data_folder, "folder")


@pytest.fixture(scope="module")
def sources(index, data_folder, source, tmp_path_factory) -> dict[str, Path]:
    """What the peers read, by its kind."""
    work = tmp_path_factory.mktemp("work")
    shards = inputs.shards(index, data_folder, 0, work)
    files = inputs.files(index, index.images("train"), source, work)
    return {"shards": shards, "pixels": inputs.pixels(shards, work), "files": files}


def altered(pixels: Path, out: Path, change) -> Path:
    """Another pixels folder, after change(x, y)."""
    x, y = np.load(pixels / "x.npy"), np.load(pixels / "y.npy")
    change(x, y)
    out.mkdir()
    np.save(out / "x.npy", x)
    np.save(out / "y.npy", y)
    return out


def epoch(pixels: Path):
    return contents(PEERS["memmap"].open(pixels, 0), SHAPE)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.packages])
def test_a_peer_delivers_every_image_with_its_label_once(name, sources, tmp_path, monkeypatch):
    if not name.startswith("ours"):
        monkeypatch.setattr("webdataset.utils.enforce_security", False)  # as in a process without our stream
    peer, folder = PEERS[name], sources[PEERS[name].reads]
    if peer.convert:
        peer.convert(folder, tmp_path)
        folder = tmp_path
    epochs = peer.open(folder, 0)
    assert contents(epochs, SHAPE) == epoch(sources["pixels"])
    if name.startswith("ours"):
        epochs.stream.close()


def test_the_expected_images_are_the_data_sets(sources, index):
    expected = epoch(sources["pixels"])
    assert expected["images"] == index.images("train") == sum(CLASSES.values()) - 33
    counts = index.notes["train"].label_counts
    assert expected["labels"] == {str(label): count for label, count in enumerate(counts)}


def test_contents_do_not_depend_on_order_or_batches(sources):
    x, y = (torch.from_numpy(np.load(sources["pixels"] / name)) for name in ("x.npy", "y.npy"))
    order = torch.randperm(len(y))
    batches = [(x[rows].contiguous(memory_format=torch.channels_last), y[rows]) for rows in order.split(50)]
    assert contents(batches, SHAPE) == epoch(sources["pixels"])


def a_pixel(x, y):
    x[7, 2, 63, 0] ^= 1


def two_labels_exchanged(x, y):
    j = int(np.flatnonzero(y != y[0])[0])
    y[[0, j]] = y[[j, 0]]


def an_image_twice(x, y):
    j = int(np.flatnonzero(y == y[0])[1])
    x[j] = x[0]


@pytest.mark.parametrize("change", (a_pixel, two_labels_exchanged, an_image_twice))
def test_other_contents_are_told(change, sources, tmp_path):
    assert epoch(altered(sources["pixels"], tmp_path / "other", change)) != epoch(sources["pixels"])


@pytest.mark.parametrize(
    "x",
    (torch.zeros(2, *SHAPE), torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.zeros(3, *SHAPE, dtype=torch.uint8)),
)
def test_batches_of_another_kind_are_an_error(x):
    with pytest.raises(ValueError, match="it delivers"):
        contents([(x, torch.zeros(2, dtype=torch.long))], SHAPE)


def test_a_peer_that_delivers_other_images_is_refused(sources, tmp_path):
    other = altered(sources["pixels"], tmp_path / "other", a_pixel)
    ready = {"memmap": (HERE, sources["pixels"]), "memmap-random": (HERE, other)}
    said = []
    good, refused = bench.accepted(ready, sources["pixels"], SHAPE, said.append)
    assert list(good) == ["memmap"]
    assert "digest" in refused["memmap-random"]
    assert any("memmap-random is refused" in line for line in said)


def test_ours_must_not_be_refused(sources, tmp_path):
    other = altered(sources["pixels"], tmp_path / "other", two_labels_exchanged)
    with pytest.raises(RuntimeError, match="our stream: it delivers other images"):
        bench.accepted({"ours": (HERE, sources["shards"])}, other, SHAPE, lambda text: None)


def test_a_peer_that_fails_says_why(tmp_path):
    with pytest.raises(Failed, match="FileNotFoundError: .*x.npy"):
        run(HERE, 60, do="check", peer="memmap", folder=str(tmp_path), shape=SHAPE)


def test_a_peer_that_fails_while_it_is_timed_has_no_numbers(sources, monkeypatch):
    done = []

    def task(python, limit, **task):
        done.append(task["peer"])
        if task["peer"] == "memmap-random":
            raise Failed("no")
        return {}

    monkeypatch.setattr(bench, "run", task)
    ready = dict.fromkeys(("memmap", "memmap-random"), (HERE, sources["pixels"]))
    runs, failed = bench.rounds(ready, 0.1, 2, lambda text: None)
    assert failed == {"memmap-random": "no"}
    assert [len(runs["memmap", 0][state]) for state in ("cold", "warm")] == [1, 2]
    assert done.count("memmap-random") == 1


def test_ours_must_not_fail(sources, monkeypatch):
    def task(python, limit, **task):
        raise Failed("no")

    monkeypatch.setattr(bench, "run", task)
    with pytest.raises(RuntimeError, match="our stream: no"):
        bench.rounds({"ours": (HERE, sources["shards"])}, 0.1, 1, lambda text: None)


def test_a_measurement_crosses_epochs_and_counts_images(sources):
    count = len(np.load(sources["pixels"] / "y.npy"))
    row = measure(PEERS["memmap"], sources["pixels"], 0, 0.2, steady=True)
    assert row["first"]["ended"] and not row["steady"]["ended"]
    assert row["first"]["images"] == count - 256  # after the first batch, the rest of the first epoch
    assert row["steady"]["images"] > count
    assert row["steady"]["seconds"] >= 0.2
    assert row["first_batch_s"] > 0
    assert "steady" not in measure(PEERS["memmap"], sources["pixels"], 0, 0.01, steady=False)


BURN = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"


def test_cpu_time_of_children_counts_alive_or_ended():
    before = cpu_seconds()
    with subprocess.Popen([HERE, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alive = cpu_seconds() - before
        child.stdin.close()
        child.wait()
    assert alive >= 0.5 - 2 / TICKS
    assert cpu_seconds() - before >= alive


def test_pages_are_dropped_and_read_again(tmp_path):
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    kinds = {fields[1]: fields[2] for fields in mounts}
    if kinds[str(next(folder for folder in [tmp_path, *tmp_path.parents] if str(folder) in kinds))] in (
        "tmpfs",
        "ramfs",
    ):
        pytest.skip("the temporary folder is the page cache itself")
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b", "empty"):
        (tmp_path / name).write_bytes(b"x" * 2_000_000 * (name != "empty"))
    files = files_below(tmp_path)
    assert len(files) == 3
    drop(files)
    assert cached_share(files) == 0
    warm(files)
    assert cached_share(files) == 1


def test_the_first_shards_only(tmp_path, index, data_folder):
    images = index.images("train")
    many = dataclasses.replace(index, splits={"train": index.shards("train") * 5})
    assert [len(inputs.shards_of(many, n)) for n in (0, 1, SHARD, SHARD + 1, 3 * SHARD)] == [5, 1, 1, 2, 3]
    assert inputs.work_name(many, 1) != inputs.work_name(many, SHARD + 1)
    folder = inputs.shards(index, data_folder, 1, tmp_path)
    assert load_index(folder.parent, index.name).images("train") == images
    assert (folder / index.shards("train")[0].name).is_symlink()


def test_a_format_that_was_not_finished_is_made_again(tmp_path):
    def fails(folder):
        (folder / "half").touch()
        raise Failed("no")

    with pytest.raises(Failed):
        inputs.once(tmp_path / "format", fails)
    made = inputs.once(tmp_path / "format", lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert inputs.once(tmp_path / "format", fails) == made


def test_files_of_another_size_or_kind_are_no_source(index, tmp_path, digits):
    (tmp_path / "cat").mkdir()
    for i in range(20):
        (tmp_path / "cat" / f"{i}.jpg").write_bytes(jpeg(i, size=80))
    with pytest.raises(UserError, match="80x80"):
        inputs.files(index, 10, tmp_path, tmp_path / "work")
    with pytest.raises(UserError, match="no image files"):
        inputs.files(digits, 10, None, tmp_path / "work")


def test_peers_that_cannot_be_had_are_left_out_with_the_reason(tmp_path, sources):
    flags = bench.Flags(cache=str(tmp_path / "cache"), install=False)
    without_files = {kind: folder for kind, folder in sources.items() if kind != "files"}
    ready, left_out = bench.prepared(["memmap", "litdata", "webdataset"], without_files, tmp_path, flags, print)
    assert ready == {"memmap": (HERE, sources["pixels"])}
    assert "litdata==" in left_out["litdata"] and "--no-install" in left_out["litdata"]
    assert "--source" in left_out["webdataset"]


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_is_not_taken_for_one(tmp_path):
    packages = (str(tmp_path / "nothing.whl"),)
    with pytest.raises(Failed, match="can't be made"):
        environment(packages, tmp_path, True, print)
    with pytest.raises(Failed, match="not installed"):
        environment(packages, tmp_path, False, print)


def rates(per_core: float, images_per_s: float) -> dict:
    def spread(value):
        return {"median": value, "low": value, "high": value}

    return {
        "steady": {"per_core": spread(per_core), "images_per_s": spread(images_per_s)},
        "first_batch_s": spread(0.25),
        "memory": spread(301e6),
    }


def test_bars_take_the_better_of_each_peer():
    peers = {
        "ours": {"workers": {"0": rates(80_000, 60_000)}},
        "litdata": {"workers": {"0": rates(70_000, 30_000), "2": rates(10_000, 61_000)}},
        "webdataset": {"workers": {"0": rates(9_000, 1), "2": rates(1_000, 1)}},
        "webdataset-rgb8": {"workers": {"0": rates(10_000, 1)}},
        "memmap": {"workers": {"0": rates(9e9, 9e9)}},
        "memmap-random": {"workers": {"0": rates(400_000, 9e9)}},
    }
    found = [(row["measured"], row["met"]) for row in bars(peers, 1_090, 1_000)]
    assert found == [
        (8.0, True),
        (80_000 / 70_000, True),
        (60_000 / 61_000, False),
        (20.0, True),
        (20.0, False),
        (60_000, True),
        (0.25, True),
        (301.0, False),
        (1.09, True),
    ]
    alone = bars({"ours": peers["ours"]}, 1_101, 1_000)
    assert [row["measured"] for row in alone[:5]] == [None] * 5
    assert not any(row["met"] for row in alone[:5])
    assert not alone[-1]["met"]


def test_medians_and_extremes_over_the_rounds():
    def span(images, cpu):
        return {"images": images, "seconds": 2.0, "cpu_seconds": cpu, "others": 0.5, "ended": images != 100}

    warm = [
        {"first_batch_s": s, "memory": 1, "first": span(100, 1.0), "steady": span(n, 4.0), "cached": 1.0}
        for s, n in ((0.1, 400), (0.3, 800), (0.2, 200))
    ]
    cold = [{"first_batch_s": 1.0, "memory": 1, "first": span(50, 0.0), "cached": 0.25}]
    row = bench.summary({"warm": warm, "cold": cold})
    assert row["steady"]["images_per_s"] == {"median": 200, "low": 100, "high": 400}
    assert row["steady"]["per_core"] == {"median": 100, "low": 50, "high": 200}
    assert row["first_batch_s"] == {"median": 0.2, "low": 0.1, "high": 0.3}
    assert row["cold"]["images_per_s"]["median"] == 25
    assert row["cold"]["cached"] == 0.25
    assert not row["steady"]["later_epochs"]
    result = {"dataset": "d", "images": 1, "left_out": {"litdata": "no"}, "bars": []}
    text = bench.lines(result | {"peers": {"ours": {"disk_bytes": 1, "workers": {"0": row}}}})
    assert "STILL CACHED" in text[1]
    assert text[2].split() == ["litdata", "no", "numbers:", "no"]


@pytest.mark.slow
def test_the_command_measures_all_in_one_run(monkeypatch, capsys, index, data_folder, source, tmp_path):
    # Fewer processes, each of which imports PyTorch
    monkeypatch.setitem(PEERS, "webdataset", dataclasses.replace(PEERS["webdataset"], workers=(2,)))
    monkeypatch.delitem(PEERS, "memmap")
    monkeypatch.setattr(bench, "LIMIT", ("memmap-random",))
    flags = ["--data", data_folder, "--source", source, "--seconds", 0.2, "--rounds", 1, "--json"]
    flags += ["--peers", "webdataset,litdata", "--cache", tmp_path / "cache", "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", ["bench", "data", "--dataset", "folder", "--no-install", *map(str, flags)])
    command.main()
    result = json.loads(capsys.readouterr().out)
    assert list(result["peers"]) == ["ours", "webdataset", "memmap-random"]
    assert list(result["left_out"]) == ["litdata"]
    assert result["images"] == index.images("train")
    for peer in result["peers"].values():
        for row in peer["workers"].values():
            assert all(row[key]["per_core"]["median"] > 0 for key in ("steady", "first", "cold"))
    assert list(result["peers"]["webdataset"]["workers"]) == ["2"]
    assert result["peers"]["ours"]["disk_bytes"] > result["raw_bytes"]
    assert [row["name"] for row in result["bars"] if row["measured"] is None] == []
    shutil.rmtree(tmp_path / "work")


@pytest.mark.parametrize(
    "flags",
    (
        ["--dataset", "tinyimagnet"],
        ["--seconds", "0"],
        ["--rounds", "0"],
        ["--images", "-1"],
        ["--peers", "litdat"],
        ["--source", "/nowhere"],
        ["--dataset", "svhn"],
        ["--data", "s3://bucket/data"],
    ),
)
def test_bad_flags(monkeypatch, flags, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench", "data", "--data", str(tmp_path), *flags])
    with pytest.raises(UserError):
        command.main()
