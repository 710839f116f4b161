import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from numbered import Numbered, prepare
from PIL import Image

from ali_dist.data.index import load_index
from ali_dist.data.lossless import decode, encode
from ali_dist.data.shards import Reader, blocks, pieces, verify
from ali_dist.recipe import UserError


@hypothesis.given(
    st.integers(0, 5), st.sampled_from([1, 2, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1)
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_nothing_is_lost(n, channels, height, width, seed):
    x = np.random.default_rng(seed).integers(0, 256, (n, channels, height, width), dtype=np.uint8)
    assert np.array_equal(decode(encode(x), x.shape), x)


def test_smooth_images_shrink():
    rows = np.add.outer(np.arange(64), np.arange(64))
    x = np.stack([rows, rows + 3, rows + 9]).astype(np.uint8)[None]
    assert len(encode(x)) < x.nbytes / 10


def test_data_of_another_shape_or_damaged_is_refused():
    x = Numbered(1)[0][0][None]
    for data, shape in [
        (encode(x), (2, 3, 4, 4)),
        (encode(x), (1, 3, 4, 3)),
        (encode(x)[:-3], x.shape),
        (b"no zstd at all", x.shape),
        (b"", x.shape),
    ]:
        with pytest.raises(ValueError, match="zstd|bytes"):
            decode(data, shape)


def test_compressed_shards_hold_the_same_images(index, tmp_path):
    small = prepare(tmp_path, compress=True)
    assert small.mean_image.equal(index.mean_image)
    verify(small)
    for split in index.splits:
        plan = [pieces(blocks(one.shards(split)), 0, index.images(split)) for one in (index, small)]
        for (x, y), (x_small, y_small) in zip(
            Reader(index, split).read(plan[0]), Reader(small, split).read(plan[1]), strict=True
        ):
            assert np.array_equal(x, x_small) and np.array_equal(y, y_small)
    path = small.store.path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="has changed"):
        verify(load_index(tmp_path, "numbered"))


def test_the_flag(tmp_path, command):
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        smooth = np.cumsum(rng.integers(0, 3, (64, 64, 3)), axis=0).astype(np.uint8)
        Image.fromarray(smooth).save(folder / f"{i}.png")
    flags = ["--dataset", "folder", "--source", tmp_path / "pictures"]
    for name, extra in [("plain", []), ("small", ["--compress"])]:
        assert command(*flags, "--data", tmp_path / name, "--verify", *extra)[0] == 0
    plain, small = (load_index(tmp_path / name, "folder") for name in ("plain", "small"))
    assert plain.mean_image.equal(small.mean_image)
    assert small.shards("train")[0].bytes < 0.7 * plain.shards("train")[0].bytes
