import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import NUMBERED, Numbered, numbers, prepare

from ali_dist.data.fingerprint import fingerprint
from ali_dist.data.index import load_index
from ali_dist.data.pack import check_counts, new_folder, pack, plan
from ali_dist.data.shards import verify
from ali_dist.data.stream import Stream, validation
from ali_dist.data.types import BadImage, OpenSource, Sample
from ali_dist.data.write import PERMUTATION_SEED
from ali_dist.recipe import UserError


def stored(index, split):
    batches = list(validation(index, split, count=10**6, batch_size=1000))
    return torch.cat([batch.x for batch in batches]).numpy(), torch.cat([batch.y for batch in batches]).numpy()


def test_every_sample_comes_back_exactly(index):
    order = {"train": np.random.default_rng(PERMUTATION_SEED).permutation(5003), "valid": np.arange(301)}
    for split, rows in order.items():
        x, y = stored(index, split)
        samples = Numbered(len(rows))
        assert (numbers(x) == rows).all() and (y == rows % 10).all()
        assert all((x[at] == samples[i][0]).all() for at, i in enumerate(rows.tolist()))
    assert [shard.images for shard in index.shards("train")] == [2048, 2048, 907]
    assert index.classes == tuple("abcdefghij") and index.shape == (3, 4, 4)


@pytest.mark.parametrize("n", [5003, 37])
def test_mean_image_is_over_the_first_training_images(tmp_path, n):
    index = prepare(tmp_path, train=n)
    x, _ = stored(index, "train")
    assert index.mean_image.dtype == torch.float64
    assert np.allclose(index.mean_image.numpy(), x[:500].mean(0) / 255, rtol=0, atol=1e-15)


def test_two_runs_write_the_same_bytes(tmp_path):
    one, other = (prepare(tmp_path / name).store.path for name in ("one", "other"))
    files = sorted(path.name for path in one.iterdir())
    assert files == ["index.json", *(f"train-{i:06d}.tar" for i in range(3)), "valid-000000.tar"]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    for rows in json.loads((one / "index.json").read_text())["splits"].values():
        for shard in rows["shards"]:
            fresh = fingerprint(one / shard["name"])
            assert (fresh["sha256"], fresh["bytes"]) == (shard["sha256"], shard["bytes"])


def test_progress_is_in_images(tmp_path):
    spec, seen = replace(NUMBERED, counts={"train": 300, "valid": 10}), []
    with new_folder(tmp_path, spec.name) as folder:
        pack(spec, spec.open(None, spec.counts), None, folder, lambda *at: seen.append(at))
    assert seen == [(300, 310), (310, 310)]


def test_a_wrong_count_is_an_error(tmp_path):
    with pytest.raises(UserError, match="a.zip has 300 train images instead of 301: .*fetch it again"):
        opened = NUMBERED.open(None, {"train": 300})
        check_counts(replace(NUMBERED, counts={"train": 301}), opened, "a.zip")


def test_an_error_leaves_nothing_and_keeps_the_old(tmp_path):
    old = prepare(tmp_path, train=10)
    with pytest.raises(KeyError):
        with new_folder(tmp_path, "numbered") as folder:
            (folder / "shards" / "train-000000.tar").write_bytes(b"half")
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["numbered"]
    verify(old)
    assert prepare(tmp_path, train=20).images("train") == 20
    assert [path.name for path in tmp_path.iterdir()] == ["numbered"]


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "numbered").mkdir()
    (tmp_path / "numbered" / "thesis.txt").write_text("only copy")
    with pytest.raises(UserError, match="numbered is there but is no prepared data set"):
        prepare(tmp_path)
    assert (tmp_path / "numbered" / "thesis.txt").read_text() == "only copy"


KILLED = """
import sys, time
from pathlib import Path
from numbered import NUMBERED
from ali_dist.data.pack import new_folder, pack, plan

def progress(done, total):
    if done >= 4096:
        print("far", flush=True)
        time.sleep(60)

with new_folder(Path(sys.argv[1]), "numbered", plan(NUMBERED, dict(NUMBERED.counts), None)) as folder:
    pack(NUMBERED, NUMBERED.open(None, NUMBERED.counts), None, folder, progress)
"""


@pytest.fixture
def killed(tmp_path):
    """A folder in which a process was killed when it had written two of four shards."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    )
    try:
        assert process.stdout.readline() == b"far\n"
    finally:
        process.kill()
        process.communicate()
    return tmp_path


def again(data, spec=NUMBERED):
    """Prepares the set as the killed process would have; the names of shards that were written, not found."""
    shards = (data / ".numbered.partial" / "shards").glob("*.tar")
    times = {path.name: path.stat().st_mtime_ns for path in shards}
    with new_folder(data, spec.name, plan(spec, dict(spec.counts), None)) as folder:
        pack(spec, spec.open(None, spec.counts), None, folder)
    verify(load_index(data, spec.name))
    assert [path.name for path in data.iterdir()] == ["numbered"]
    return [p.name for p in sorted((data / "numbered").glob("*.tar")) if times.get(p.name) != p.stat().st_mtime_ns]


def assert_same_files(folder, other):
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_a_killed_process_leaves_nothing_that_counts(killed):
    assert [path.name for path in killed.iterdir()] == [".numbered.partial"]
    with pytest.raises(UserError, match="no data set 'numbered'"):
        load_index(killed, "numbered")


def test_what_a_killed_process_finished_is_kept(killed, index):
    assert again(killed) == ["train-000002.tar", "valid-000000.tar"]
    assert_same_files(killed / "numbered", index.store.path)


@pytest.mark.parametrize("damage", ["a bit", "cut", "gone", "record", "half a record"])
def test_what_was_damaged_meanwhile_is_written_again(killed, index, damage):
    partial = killed / ".numbered.partial"
    shard, record = partial / "shards" / "train-000001.tar", partial / "rows" / "train-000001.json"
    data = shard.read_bytes()
    if damage == "a bit":
        shard.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    elif damage == "cut":
        shard.write_bytes(data[:-512])
    elif damage == "gone":
        shard.unlink()
    elif damage == "record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:40])
    (partial / "shards" / ".train-000002.0123").write_bytes(b"half a shard")
    (partial / "shards" / "index.json").write_text("{}")
    assert "train-000001.tar" in again(killed)
    assert_same_files(killed / "numbered", index.store.path)


def test_another_source_begins_anew(killed):
    assert len(again(killed, replace(NUMBERED, counts={"train": 5003, "valid": 300}))) == 4


def test_a_kill_between_the_two_renamings_loses_nothing(tmp_path):
    index = prepare(tmp_path, train=300)
    index.store.path.rename(tmp_path / ".numbered.old")
    with pytest.raises(KeyError):
        with new_folder(tmp_path, "numbered"):
            raise KeyError
    verify(load_index(tmp_path, "numbered"))


def test_two_processes_do_not_prepare_the_same_set(tmp_path):
    with new_folder(tmp_path, "numbered") as folder:
        with pytest.raises(UserError, match="numbered is being prepared in .* by another process: wait for it"):
            prepare(tmp_path)
        pack(NUMBERED, NUMBERED.open(None, NUMBERED.counts), None, folder)
    verify(load_index(tmp_path, "numbered"))


class Broken(Numbered):
    """Every 700th image cannot be read, every 500th was grey."""

    def __getitem__(self, i):
        if i % 700 == 0:
            raise BadImage(Path("a.zip"), f"{i}.jpg", "is empty")
        return Sample(*super().__getitem__(i), odd=("grey",) if i % 500 == 0 else (), name=f"{i}.jpg")


def test_images_left_out_are_counted_and_named(tmp_path):
    spec = replace(NUMBERED, counts={"train": 5003, "valid": 301})
    opened = OpenSource(tuple("abcdefghij"), {split: Broken(count) for split, count in spec.counts.items()})
    with pytest.raises(BadImage, match=r"a.zip: \d+.jpg is empty"):
        with new_folder(tmp_path, spec.name, plan(spec, dict(spec.counts), None)) as folder:
            pack(spec, opened, None, folder)
    with new_folder(tmp_path, spec.name, plan(spec, dict(spec.counts), None)) as folder:
        pack(spec, opened, None, folder, skip_bad=True)
    index = load_index(tmp_path, spec.name)
    verify(index)
    order = np.random.default_rng(PERMUTATION_SEED).permutation(5003)
    x, y = stored(index, "train")
    assert (numbers(x) == order[order % 700 != 0]).all() and (y == numbers(x) % 10).all()
    notes = index.notes["train"]
    assert sorted(int(name[:-4]) for name, _ in notes.bad) == list(range(0, 5003, 700))
    assert {reason for _, reason in notes.bad} == {"is empty"}
    count, names = notes.odd["grey"]
    assert count == len(names) == sum(i % 500 == 0 and i % 700 != 0 for i in range(5003))
    assert notes.label_counts == tuple(np.bincount(y, minlength=10).tolist())
    assert [len(index.notes["valid"].bad), index.images("valid")] == [1, 300]


def test_a_shard_that_loses_all_its_images_is_none(tmp_path):
    class Empty(Broken):
        def __getitem__(self, i):
            raise BadImage(Path("a.zip"), f"{i}.jpg", "is empty")

    spec = replace(NUMBERED, counts={"train": 10, "valid": 2})
    with new_folder(tmp_path, spec.name) as folder:
        pack(
            spec,
            OpenSource(tuple("abcdefghij"), {"train": Numbered(10), "valid": Empty(2)}),
            None,
            folder,
            skip_bad=True,
        )
    index = load_index(tmp_path, spec.name)
    assert index.images("valid") == 0 and index.shards("valid") == () and len(index.notes["valid"].bad) == 2


def test_attributes_are_stored_instead_of_classes(tmp_path):
    class Attributed(Numbered):
        def __getitem__(self, i):
            return super().__getitem__(i)[0], np.array([i % 2, i % 3 == 0, 1], np.uint8)

    spec, names = replace(NUMBERED, counts={"train": 2100, "valid": 5}), ("odd", "third", "all")
    splits = {split: Attributed(count) for split, count in spec.counts.items()}
    with new_folder(tmp_path, spec.name) as folder:
        pack(spec, OpenSource((), splits, attributes=names), None, folder)
    index = load_index(tmp_path, spec.name)
    verify(index)
    assert (index.classes, index.attributes) == ((), names)
    assert index.notes["train"].label_counts == (1050, 700, 2100)
    with Stream(index, "train", seed=0, lanes=2, micro_batch=64) as stream:
        batch = next(stream)
    n = numbers(batch.x)
    assert batch.y.dtype == torch.uint8 and (batch.y.numpy() == np.stack([n % 2, n % 3 == 0, n * 0 + 1], 1)).all()
    with tarfile.open(index.store.path / "valid-000000.tar") as archive:
        assert archive.getnames() == ["000000.attributes.npy", "000000.x.npy"]


def test_sets_of_earlier_versions_still_load(tmp_path):
    path = prepare(tmp_path, train=300).store.path / "index.json"
    tree = json.loads(path.read_text())
    for split in tree["splits"].values():
        del split["label_counts"], split["odd"], split["bad"]
    path.write_text(json.dumps(tree))
    index = load_index(tmp_path, "numbered")
    verify(index)
    assert index.attributes == () and index.notes["train"].bad == ()


def test_fingerprint_of_a_folder(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "b").write_text("bb")
        (tmp_path / name / "a").write_text("a")
    one, other = fingerprint(tmp_path / "one"), fingerprint(tmp_path / "other")
    assert one["bytes"] == 3 and one["sha256"] == other["sha256"]
    (tmp_path / "other" / "sub" / "b").write_text("bc")
    assert fingerprint(tmp_path / "other")["sha256"] != one["sha256"]
