import pytest
from numbered import prepare

from ali_dist.data.index import Index


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Index:
    """The default numbered set, only to be read."""
    return prepare(tmp_path_factory.mktemp("numbered"))
