"""Data that are away for a while: a folder that is renamed, a server that does not answer, disks that fail."""

import errno
import logging
import os
import threading
import time

import pytest
from numbered import numbers, prepare
from servers import running

from ali_dist import patience
from ali_dist.bench.nodes import wait_until
from ali_dist.data import store
from ali_dist.data.index import load_index
from ali_dist.data.stream import Stream
from ali_dist.recipe import UserError

ORDER = {"seed": 3, "lanes": 4, "micro_batch": 100, "prefetch": 1}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path / "sets", train=5003)
    return tmp_path / "sets"


def taken(index, count=60, at=None, action=None):
    """Numbers of the images of the first batches; `action` is done before batch `at`."""
    found = []
    with Stream(index, "train", **ORDER) as stream:
        for t in range(count):
            if t == at:
                action()
            found += numbers(next(stream).x).tolist()
    assert stream.reader.bad == {} and stream.reader.replaced == 0
    return found


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_folder_that_is_away_is_waited_for(folder, caplog, skip_bad):
    away = folder.with_name("away")

    def take():
        os.rename(folder, away)
        threading.Thread(target=come_back).start()

    def come_back():
        wait_until(lambda: "trying again for" in caplog.text, 60)
        os.rename(away, folder)

    undisturbed = taken(load_index(folder, "numbered"))
    index = load_index(folder, "numbered", patient=True, skip_bad=skip_bad)
    with caplog.at_level(logging.WARNING, "ali_dist"):
        assert taken(index, at=5, action=take) == undisturbed
    begun, ended = caplog.messages
    assert f"can't read data in {folder}/numbered (" in begun and "could read data in" in ended


@pytest.mark.parametrize("skip_bad", [False, True])
def test_without_patience_an_outage_is_an_error_and_no_damage(folder, skip_bad):
    index = load_index(folder, "numbered", skip_bad=skip_bad)
    with pytest.raises(UserError, match=r"cannot read .*/numbered/index\.json any more"):
        taken(index, at=5, action=lambda: os.rename(folder, folder.with_name("away")))


def test_an_outage_that_lasts_is_an_error_that_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(patience, "SECONDS_OF_PATIENCE", 0.2)
    index = load_index(folder, "numbered", patient=True)
    with pytest.raises(UserError, match=r"can't read data in .* for 0 s .*bring the storage back"):
        taken(index, at=5, action=lambda: os.rename(folder, folder.with_name("away")))


def test_a_deleted_shard_is_no_outage(folder):
    index = load_index(folder, "numbered", patient=True)
    (folder / "numbered" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard .*train-000001\.tar is missing"):
        taken(index)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_errors_of_a_network_file_system_are_waited_for(folder, monkeypatch, number):
    undisturbed, original, troubles = taken(load_index(folder, "numbered")), os.pread, [number] * 2

    def pread(descriptor, size, offset):
        if troubles:
            raise OSError(troubles.pop(), os.strerror(number))
        return original(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert taken(load_index(folder, "numbered", patient=True, skip_bad=True)) == undisturbed and not troubles


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_server_that_does_not_answer_for_long(folder, skip_bad):
    undisturbed = taken(load_index(folder, "numbered"))
    with running() as server:
        server.put(folder, "/sets/")
        index = load_index(f"{server.address}/sets", "numbered", patient=True, skip_bad=skip_bad)
        server.faults += [lambda handler: handler.reply(503, b"")] * (8 * store.ATTEMPTS + 3)
        assert taken(index) == undisturbed and not server.faults
        # A server that has lost all is away; one that has lost a shard has lost it
        kept = dict(server.files)
        begin = threading.Timer(0.8, lambda: server.files.update(kept))
        assert taken(index, at=5, action=lambda: (server.files.clear(), begin.start())) == undisturbed
        begin.join()
        index = load_index(f"{server.address}/sets", "numbered", patient=True)
        del server.files["/sets/numbered/train-000000.tar"]
        with pytest.raises(UserError, match=r"train-000000\.tar is missing"):
            taken(index)


def test_an_index_is_waited_for_too_but_not_at_the_users_start(folder):
    away = folder.with_name("away")
    os.rename(folder, away)
    with pytest.raises(UserError, match="no data set 'numbered'"):
        load_index(folder, "numbered")
    threading.Timer(0.3, lambda: os.rename(away, folder)).start()
    assert load_index(folder, "numbered", patient=True).images("train") == 5003


@pytest.mark.parametrize("remote", [False, True])
def test_a_stream_that_is_closed_waits_no_longer(folder, caplog, remote):
    with running() as server:
        server.put(folder, "/sets/")
        index = load_index(f"{server.address}/sets" if remote else folder, "numbered", patient=True)
        before = set(threading.enumerate())
        server.files.clear()
        os.rename(folder, folder.with_name("away"))
        with caplog.at_level(logging.WARNING, "ali_dist"), Stream(index, "train", **ORDER):
            wait_until(lambda: "trying again for" in caplog.text, 60)
            begin = time.monotonic()
        mine = [thread for thread in threading.enumerate() if thread not in before and "ali_dist" in thread.name]
        wait_until(lambda: not any(thread.is_alive() for thread in mine), 60)
        assert time.monotonic() - begin < patience.SECONDS_OF_PATIENCE / 2
