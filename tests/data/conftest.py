import sys

import numbered
import pytest

from ali_dist import cli, prepare
from ali_dist.data.index import Index


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Index:
    """The default numbered set, only to be read."""
    return numbered.prepare(tmp_path_factory.mktemp("numbered"))


@pytest.fixture
def command(monkeypatch, capsys):
    """`ali_dist.prepare` in this process."""

    def run(*args):
        """Exit code, stdout, stderr."""
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
        code = 0
        try:
            cli.run(prepare.main)
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
