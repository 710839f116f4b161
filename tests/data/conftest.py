import numbered
import pytest

from ali_dist import prepare
from ali_dist.data.index import Index


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Index:
    """The default numbered set, only to be read."""
    return numbered.prepare(tmp_path_factory.mktemp("numbered"))


@pytest.fixture
def command(run_command):
    """`ali_dist.prepare` in this process."""

    def run(*args):
        """Exit code, stdout, stderr."""
        return run_command(prepare.main, ["prepare", *map(str, args)])

    return run
