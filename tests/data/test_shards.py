import io
import os
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from numbered import SHAPE, Numbered, numbers, prepare

from ali_dist.data import block
from ali_dist.data.index import BLOCK, Block, Shard, load_index
from ali_dist.data.shards import Piece, Reader, blocks, pieces, verify
from ali_dist.data.stream import Stream, validation
from ali_dist.data.write import ShardWriter
from ali_dist.recipe import UserError


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_inside_a_member(path):
    os.truncate(path, path.stat().st_size // 2 + 100)


def cut_at_a_member_boundary(path):
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[4].offset)


def cut_inside_a_header(path):
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[4].offset + 100)


def spoil_a_header(path):
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[offset + 148] ^= 1  # its checksum
    path.write_bytes(data)


def swap_blocks(path):
    with tarfile.open(path) as tar:
        first, second, third = (tar.getmembers()[i].offset for i in (0, 2, 4))
    data = path.read_bytes()
    path.write_bytes(data[second:third] + data[first:second] + data[third:])


def replace(path):
    shutil.copy(path.with_name("train-000000.tar"), path)


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


DAMAGES = {
    flip_a_bit: "has changed",
    cut_inside_a_member: "bytes instead of",
    cut_at_a_member_boundary: "bytes instead of",
    cut_inside_a_header: "bytes instead of",
    spoil_a_header: "has changed",
    swap_blocks: "has changed",
    replace: "has changed",
    remove: "is missing",
    empty: "has 0 bytes instead of",
}


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES.items())
def test_damage_is_caught_and_named(tmp_path, damage, complaint):
    index = prepare(tmp_path, train=4096)
    damage(index.store.path / "train-000001.tar")
    for use in (
        lambda: list(islice(Stream(index, "train", seed=0, lanes=2, micro_batch=64), 64)),
        lambda: list(validation(index, "train", count=4096, batch_size=64)),
        lambda: verify(index),
    ):
        with pytest.raises(UserError, match=rf"train-000001\.tar .*{complaint}.* --dataset numbered .*--verify"):
            use()


def epoch(index, world=1, start=0):
    """Numbers of the images at all positions of the first epoch, from `start` on, and what the readers say."""
    n = index.images("train")
    total, bad, replaced = np.full(n - start, -1), {}, 0
    for rank in range(world):
        order = {"seed": 3, "lanes": 5, "micro_batch": 64, "num_images": start, "prefetch": 1}
        with Stream(index, "train", rank=rank, world=world, **order) as stream:
            for t, batch in enumerate(islice(stream, -(-(n - start) // 64))):
                at = 64 * t + batch.rows.numpy()
                total[at[at < n - start]] = numbers(batch.x)[at < n - start]
        bad |= stream.reader.bad
        replaced += stream.reader.replaced
    return total, bad, replaced


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES.items())
def test_damage_can_be_replaced_the_same_way_by_everyone(tmp_path, damage, complaint):
    index = prepare(tmp_path, train=5003)
    whole, *_ = epoch(index)
    damage(index.store.path / "train-000001.tar")
    index = load_index(tmp_path, "numbered", skip_bad=True)
    found, bad, replaced = epoch(index)
    assert complaint in bad.pop("train-000001.tar") and not bad
    wrong = found != whole
    in_blocks = len(index.shards("train")[1].blocks) * BLOCK
    assert 0 < wrong.sum() <= in_blocks and replaced >= wrong.sum()
    assert (np.bincount(found, minlength=5003)[whole[wrong]] == 0).all()  # never an image of a damaged block
    assert set(found) == set(whole[~wrong])
    for world, start in [(3, 0), (1, 2000), (2, 4321)]:
        again, bad, _ = epoch(index, world, start)
        assert (again == found[start:]).all() and bad.keys() <= {"train-000001.tar"}


def test_without_a_whole_shard_there_is_nothing_to_replace_with(tmp_path):
    index = prepare(tmp_path, train=5003)
    for path in index.store.path.glob("train-*"):
        empty(path)
    with pytest.raises(UserError, match="no shard is whole: shard .*bytes instead of"):
        epoch(load_index(tmp_path, "numbered", skip_bad=True))


def test_an_error_stays(tmp_path):
    index = prepare(tmp_path, train=300)
    remove(index.store.path / "train-000000.tar")
    with Stream(index, "train", seed=0, lanes=2, micro_batch=64) as stream:
        for _ in range(2):
            with pytest.raises(UserError, match="is missing"):
                next(stream)


def test_a_shard_replaced_during_a_run_is_caught(tmp_path):
    index = prepare(tmp_path, train=4096)
    verify(index)
    other = tmp_path / "other"
    shutil.copy(index.store.path / "train-000000.tar", other)
    os.replace(other, index.store.path / "train-000001.tar")
    with pytest.raises(UserError, match=r"train-000001\.tar has changed"):
        verify(index)


def rewritten(index, write):
    """The index of a one-shard set whose shard `write` has made anew, its checksum brought up to date."""
    path = index.store.path / "train-000000.tar"
    with ShardWriter(path) as writer:
        write(writer)
    row = {**writer.row(), "images": 300}
    row["blocks"] = tuple(Block(*block) for block in row["blocks"])
    index.splits["train"] = (Shard(**row),)
    return index


def arrays(*counts):
    samples = Numbered(sum(counts))
    x, y = (np.array(part) for part in zip(*(samples[i] for i in range(sum(counts))), strict=True))
    edges = np.cumsum(counts)[:-1]
    return zip(np.split(x, edges), np.split(y, edges), strict=True)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (arrays(256, 43), "block 1: it holds"),
        (arrays(255, 45), "block 0: it holds"),
    ],
)
def test_images_missing_in_spite_of_a_right_checksum(tmp_path, made, complaint):
    index = rewritten(prepare(tmp_path, train=300), lambda shard: [shard.add(x, y) for x, y in made])
    with pytest.raises(UserError, match=rf"train-000000\.tar .*{complaint}"):
        verify(index)


def test_arrays_of_objects_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    def write(shard):
        x = np.zeros((256, *SHAPE), np.uint8)
        shard.add(x, np.zeros(256, np.int64))
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.array([Trap()], object), allow_pickle=True)
        trapped = [("y.npy", buffer.getvalue()), ("x.npy", buffer.getvalue())]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block, "encode", lambda *_: trapped)
            shard.add(x[:44], np.zeros(44, np.int64))

    index = rewritten(prepare(tmp_path, train=300), write)
    with pytest.raises(UserError, match=r"train-000000\.tar cannot be read"):
        verify(index)
    assert not (tmp_path / "sprung").exists()


def test_blocks_before_the_segment_are_not_read(index, monkeypatch):
    read = []
    part = index.store.part
    monkeypatch.setattr(index.store, "part", lambda name, offset, size: read.append(offset) or part(name, offset, size))
    list(Reader(index, "train").read(pieces(blocks(index.shards("train")), 1000, 1300)))
    assert read == [block.offset for block in index.shards("train")[0].blocks[3:6]]


def test_webdataset_itself_reads_the_shards(index):
    """The layout is plain: samples of .npy members, without any code of ours."""
    urls = [str(index.store.path / shard.name) for shard in index.shards("train")]
    found = [(s["x.npy"], s["y.npy"]) for s in wds.WebDataset(urls, shardshuffle=False).decode()]
    mine = Reader(index, "train").read(pieces(blocks(index.shards("train")), 0, index.images("train")))
    for (x, y), (x_mine, y_mine) in zip(found, mine, strict=True):
        assert np.array_equal(x, x_mine) and np.array_equal(y, y_mine)


def test_pieces_cut_shards_and_blocks():
    some = Block(0, 1, "")
    first, second = Shard("a", 0, 300, "", (some,) * 2), Shard("b", 0, 700, "", (some,) * 3)
    assert list(pieces(blocks([first, second]), 250, 600)) == [
        Piece(first, 0, 250, 256),
        Piece(first, 1, 0, 44),
        Piece(second, 0, 0, 256),
        Piece(second, 1, 0, 44),
    ]
    assert list(pieces(blocks([first, second]), 300, 300)) == []


def test_a_path_with_spaces_and_signs(tmp_path):
    verify(prepare(tmp_path / "a b::c {0..2} %20#?"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 2', '"version": 1'),
        ('"blocks": [[0,', '"blocks": [[0, 0, ""], [0,'),
        ('"blocks": [[0,', '"blocks": [[-1,'),
        ('"blocks": [[0,', '"blocks": [[99999999,'),
        ('"images": 5003', '"images": 5004'),
        ('"name": "train-000000.tar"', '"name": "../train-000000.tar"'),
        ('"sha256"', '"sha512"'),
        ('"splits"', '"parts"'),
        ("{", "["),
    ],
)
def test_a_damaged_index_is_named(tmp_path, old, new):
    path = prepare(tmp_path).store.path / "index.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=r"numbered/index\.json is damaged or of another version .* --force"):
        load_index(tmp_path, "numbered")


def test_an_index_of_another_set(tmp_path):
    prepare(tmp_path).store.path.rename(tmp_path / "digits")
    with pytest.raises(UserError, match="describes data set 'numbered', not 'digits'"):
        load_index(tmp_path, "digits")


def test_no_index_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=f"no data set 'digits' in {tmp_path}: .*--dataset digits --data {tmp_path}`"):
        load_index(tmp_path, "digits")
    with pytest.raises(UserError, match="--dataset cifar10 --data 'a b'`"):
        load_index(Path("a b"), "cifar10")
