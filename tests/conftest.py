import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# With the root on the path, `import kernels` finds the package and not the folder of its tests beside this file.
sys.path.append(str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import servers  # noqa: E402
from support import Ranks, in_float64  # noqa: E402

from ali_dist import cli, mirror  # noqa: E402
from ali_dist.data import store  # noqa: E402
from ali_dist.data.index import Index, load_index  # noqa: E402
from ali_dist.data.pack import new_folder, pack  # noqa: E402
from ali_dist.data.table import DATASETS  # noqa: E402

torch.set_num_threads(1)
# Ray's niceness of 15 would starve its workers beside the other tests: for `ray.init`, and for launch/local.sh.
os.environ["RAY_worker_niceness"] = "0"
os.environ["RAY_HEAD_FLAGS"] = '--system-config={"worker_niceness":0}'
# A shell's background job ignores SIGINT, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unlogged():
    """A run's handlers write to streams that pytest closes after the test."""
    yield
    logger = logging.getLogger("ali_dist")
    logger.propagate = True
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs a command's `main` in this process with argv `words`: exit code, stdout and stderr."""

    def run(main: Callable[[], None], words: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            cli.run(main)
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of prepared shards with the digits, only to be read."""
    folder, spec = tmp_path_factory.mktemp("data"), DATASETS["digits"]
    with new_folder(folder, spec.name) as partial:
        pack(spec, spec.open(None, spec.counts), None, partial)
    return folder


@pytest.fixture(scope="session")
def digits(data) -> Index:
    return load_index(data, "digits")


@pytest.fixture(scope="session")
def ranks():
    """Three processes for tests that need real ranks."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def s3_server():
    server = servers.S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A local s3 with an empty bucket, its `bucket`, a `client` to look into it, and `fault` (see servers.S3)."""
    import boto3

    settings = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_ENDPOINT_URL": s3_server.address,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3_server.client, s3_server.bucket = boto3.client("s3"), f"bucket-{uuid.uuid4().hex}"
    s3_server.client.create_bucket(Bucket=s3_server.bucket)
    yield s3_server
    s3_server.fault = lambda method, path: None


@pytest.fixture
def storage(s3) -> str:
    """An address for runs."""
    return f"s3://{s3.bucket}/runs"


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Sets which host this is, which is a folder for copies; what goes through a store goes fast."""
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_ROUNDS", 0.05)
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)

    def become(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    become("one")
    return become


@pytest.fixture
def float64():
    with in_float64():
        yield
