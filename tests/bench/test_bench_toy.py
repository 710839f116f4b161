import json
import sys

import pytest

from ali_dist.bench import __main__ as command
from ali_dist.bench import toy
from ali_dist.recipe import UserError


def test_it_reports_speeds_only_of_equal_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "toy", "--runs", "2", "--steps", "1", "--rounds", "1", "--json"])
    command.main()
    result = json.loads(capsys.readouterr().out)
    assert result["difference"] < 1e-5 and result["threads"] == 1
    assert set(result["ratio"]) == {"plain eager", "stacked fp32", "stacked bf16"}
    assert all(rate > 0 for rate in result["models_steps_per_s"].values())
    text = "\n".join(toy.lines(result))
    assert "2 ALI runs" in text and text.count("models*steps/s") == 3
    monkeypatch.setattr(toy, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="no speed is reported"):
        command.main()


def test_bad_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "toy", "--rounds", "0"])
    with pytest.raises(UserError, match="--rounds must be at least 1"):
        command.main()
    for words in ([], ["toys"]):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit) as stop:
            command.main()
        assert stop.value.code == 2
