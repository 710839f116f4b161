"""--out of the commands that write files of their own."""

import pytest

from ali_dist import encode, export, figures


@pytest.mark.parametrize("command", [encode, export, figures])
def test_an_address_is_refused_before_anything_is_written(run_command, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_command(command.main, ["command", "no-run", "--out", "s3://bucket/out"])
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: --out must be a folder of this machine, not an address")
    assert not list(tmp_path.iterdir())
