import json

import numpy as np
import pytest

from ali_dist.bench.order import Flags, measure
from ali_dist.data.types import BLOCK

RNG = np.random.default_rng(0)


def test_measures_of_known_orders():
    n, size = 4096, 64
    stored = np.arange(n)
    kept = measure([stored, stored], size)
    names = list(kept)
    assert [kept[name] for name in names] == pytest.approx([1, 1, 1 / n, 1, 1])
    blocks, inside = RNG.permutation(n // BLOCK), [RNG.permutation(BLOCK) for _ in range(n // BLOCK)]
    by_block = (blocks[:, None] * BLOCK + np.stack(inside)).ravel()
    assert measure([by_block, by_block], size)[names[3]] == 1
    uniform = measure([RNG.permutation(n) for _ in range(10)], size)
    assert uniform[names[0]] < 0.03 and uniform[names[1]] < 0.03
    assert uniform[names[2]] == pytest.approx(1 / 3, abs=0.01)
    assert uniform[names[3]] == pytest.approx(16 * (1 - (15 / 16) ** 64), abs=0.1)
    assert uniform[names[4]] == pytest.approx(1 - (1 - 1 / 64) ** 63, abs=0.02)


def test_the_command_reads_no_image(data, capsys):
    Flags(dataset="digits", data=str(data), epochs=2, json=True).run()
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 1437 and result["ours"].keys() == result["uniform"].keys()
    Flags(dataset="digits", data=str(data), epochs=2).run()
    assert "different blocks in a batch" in capsys.readouterr().out
