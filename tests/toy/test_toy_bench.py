import json
import sys

import pytest

from ali_dist.recipe import UserError
from ali_dist.toy import bench


def test_it_reports_speeds_only_of_equal_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--runs", "2", "--steps", "1", "--rounds", "1", "--json"])
    bench.main()
    result = json.loads(capsys.readouterr().out)
    assert result["difference"] < 1e-5
    assert set(result["ratio"]) == {"plain eager", "stacked fp32", "stacked bf16"}
    assert all(rate > 0 for rate in result["models_steps_per_s"].values())
    monkeypatch.setattr(bench, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="no speed is reported"):
        bench.main()


def test_bad_arguments():
    with pytest.raises(UserError, match="--rounds"):
        bench.Flags(rounds=0)
