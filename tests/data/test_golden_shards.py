"""Shards keep their bytes from version to version, so that prepared sets and their checksums stay good."""

import json
from dataclasses import replace

import pytest
import test_readers as small

from ali_dist.data.pack import new_folder, pack
from ali_dist.data.table import DATASETS

GOLDEN = {  # SHA-256 of each shard
    "cifar10": [
        "79d0a9ce82e1cecf6f2d8944eae517b1f97ce74d05b0a8aab3a7e6cefbb829bd",
        "2f446b0a051e3e242a6e05d5ee8594ae7393c89c612d6e2d552d1afe327bb83d",
        "9c16b69e7c0225d5962db35ece293f6c4772bd133fc64cdc5458d94e44fe2ef0",
    ],
    "tinyimagenet": [
        "411a9202d1a1ed2c8f536ddddc988bb93479033bcf008f8df0007a28bcf7c5bc",
        "f3ca3ab965dfd21405c86eafacd81b4791ac6edde4876bbecaf246d3a422e1db",
        "5354809a90211da813ed67c77fe7b70efbd7a610c48bd471994cb99bec729ae0",
    ],
    "digits": [
        "c9a4536c43e202590be927b986e04b2089417df3b94263e36de59435acd11089",
        "9484d4fbe10636d6c445c5cd66522c55e96b2f88c6da8252b88cc93e3325bd0b",
    ],
}
SUMS = {"cifar10": 17582048, "tinyimagenet": 3923968, "digits": 40417394}  # of the first training images' pixels


@pytest.mark.parametrize("name", GOLDEN)
def test_shards_are_the_same_to_the_byte(tmp_path, name):
    source, counts = None, DATASETS["digits"].counts
    if name == "cifar10":
        source, counts = small.write_tar(tmp_path / "c.tar.gz", small.cifar_files("python3")), small.COUNTS
    elif name == "tinyimagenet":
        source, counts = small.write_zip(tmp_path / "t.zip", small.tiny_files()), small.TINY
    spec = replace(DATASETS[name], counts=counts)
    with new_folder(tmp_path, name) as folder:
        pack(spec, spec.open(source, counts), source, folder)
    tree = json.loads((tmp_path / name / "index.json").read_text())
    assert [shard["sha256"] for split in tree["splits"].values() for shard in split["shards"]] == GOLDEN[name]
    assert sum(tree["mean_image"]["sum"]) == SUMS[name]
