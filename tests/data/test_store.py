"""Shards behind http, s3 and gs: the same images in the same order as from a folder, whatever the network does."""

import os
import socket
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import servers
from numbered import numbers, prepare
from servers import running

from ali_dist.data import store
from ali_dist.data.index import load_index
from ali_dist.data.shards import verify
from ali_dist.data.store import open_store
from ali_dist.data.stream import Stream, validation
from ali_dist.recipe import UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server(index):
    with running() as server:
        server.put(index.store.path.parent, "/sets/")
        yield server


@pytest.fixture
def bucket(index, monkeypatch):
    """The address of a prefix in moto's s3, filled with the data set."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in index.store.path.iterdir():
        client.put_object(Bucket="images", Key=f"sets/numbered/{path.name}", Body=path.read_bytes())
    yield client
    server.stop()


def take(index, count=60, world=1):
    """Numbers of the images of the first `count` batches of 100, of all ranks together."""
    total = np.full((count, 100), -1)
    for rank in range(world):
        with Stream(index, "train", seed=3, lanes=24, micro_batch=100, rank=rank, world=world) as stream:
            for t, batch in enumerate(islice(stream, count)):
                total[t, batch.rows] = numbers(batch.x)
                assert np.array_equal(batch.y, total[t, batch.rows] % 10)
    return total


def same(remote, local):
    assert (take(remote) == take(local)).all() and (take(remote, world=3) == take(local)).all()
    batches = zip(
        validation(remote, "valid", count=301, batch_size=100),
        validation(local, "valid", count=301, batch_size=100),
        strict=True,
    )
    assert all((a.x == b.x).all() for a, b in batches)
    verify(remote)


def test_http(index, server):
    remote = load_index(f"{server.address}/sets", "numbered")
    same(remote, index)
    assert all(asked for path, asked in server.requests if path.endswith(".tar"))  # parts alone, never whole shards


def test_s3(index, bucket):
    same(load_index("s3://images/sets", "numbered"), index)


def test_gs(index):
    # In a process of its own: some calls of pyarrow's client keep the interpreter from answering
    words = [sys.executable, servers.__file__, index.store.path.parent, "/images/sets/"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        options = f"endpoint_override=127.0.0.1:{int(server.stdout.readline())}&scheme=http&retry_limit_seconds=5"
        same(load_index(f"gs://anonymous@images/sets?{options}", "numbered"), index)
        server.kill()


def cut(handler):
    asked = handler.headers["Range"].removeprefix("bytes=")
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {asked}/{len(handler.server.files[handler.path])}")
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    handler.wfile.write(b"x" * 100)
    handler.connection.shutdown(socket.SHUT_RDWR)


FAULTS = {
    "server error": lambda handler: handler.reply(500, b""),
    "too many requests": lambda handler: handler.reply(429, b""),
    "closed at once": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "cut": cut,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_tried_again(index, server, fault):
    remote = load_index(f"{server.address}/sets", "numbered")
    server.faults += [FAULTS[fault]] * 3
    assert (take(remote, 10) == take(index, 10)).all()
    assert not server.faults


def test_lasting_faults_are_an_error_that_names_the_file(server):
    remote = load_index(f"{server.address}/sets", "numbered")
    server.faults += [FAULTS["server error"]] * 1000
    with pytest.raises(UserError, match=r"cannot read http://.*/sets/numbered/train-00000\d\.tar, 5 times .*500"):
        take(remote)


def test_a_server_without_ranges_is_named(server):
    remote = load_index(f"{server.address}/sets", "numbered")
    server.faults += [lambda handler: handler.reply(200, handler.server.files[handler.path])] * 1000
    with pytest.raises(UserError, match="does not give parts of files"):
        take(remote)


def test_wrong_bytes_missing_and_short_files(server):
    remote = load_index(f"{server.address}/sets", "numbered")
    name = "/sets/numbered/train-000001.tar"
    right = server.files[name]
    for content, complaint in [
        (right[:1000] + b"?" + right[1001:], "has changed"),
        (right[:5000], "has 5,000 bytes|is shorter"),
        (right + b"more", "bytes instead of"),
        (None, "is missing"),
    ]:
        server.files.pop(name, None)
        if content is not None:
            server.files[name] = content
        with pytest.raises(UserError, match=rf"train-000001\.tar .*({complaint}).*prepare numbered in a folder"):
            take(remote)


def test_s3_errors(bucket):
    remote = load_index("s3://images/sets", "numbered")
    bucket.delete_object(Bucket="images", Key="sets/numbered/train-000002.tar")
    with pytest.raises(UserError, match=r"shard s3://images/sets/numbered/train-000002\.tar is missing"):
        take(remote)
    with pytest.raises(UserError, match="no data set 'numbered' in s3://images/other"):
        load_index("s3://images/other", "numbered")


@pytest.mark.parametrize("address", ["pipe:cat /etc/passwd", "file:///etc", "ftp://host/sets", "gopen://x", "hf://x/y"])
def test_other_kinds_of_address_are_refused(address):
    with pytest.raises(UserError, match=r"--data .*(give a folder, or an address)"):
        load_index(address, "numbered")


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    verify(prepare(tmp_path / "pipe:echo"))


def test_passwords_are_not_shown():
    for address in ("https://me:secret@host/sets", "s3://me:secret@bucket/sets?secret=secret"):
        assert "secret" not in str(open_store(address, "numbered"))


def test_nothing_runs_and_nothing_is_rewritten(index, tmp_path):
    """webdataset's own openers run pipes and rewrite addresses where the environment says so; none of it is used."""
    sprung = tmp_path / "sprung"
    code = (
        "import sys; from pathlib import Path; from ali_dist.data.index import load_index;"
        "from ali_dist.data.shards import verify; verify(load_index(Path(sys.argv[1]), 'numbered'));"
        "import webdataset as wds\n"
        "try: list(wds.WebDataset(f'pipe:touch {sys.argv[2]}', shardshuffle=False, handler=wds.reraise_exception))\n"
        "except ValueError as error: print('refused:', error)"
    )
    environment = {**os.environ, "GOPEN_REWRITE": f"/=pipe:touch {sprung};", "WDS_SECURE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, index.store.path.parent, sprung], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout.startswith("refused:"), done
    assert not sprung.exists()
