"""Downloads from a server on this machine that behaves as badly as it is told to."""

import hashlib
import http.server
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from archives import encoded, picture, write_zip

from ali_dist.data.download import fetch
from ali_dist.data.index import load_index
from ali_dist.data.table import DATASETS
from ali_dist.recipe import UserError

DATA = np.random.default_rng(0).bytes(3_000_000)
OTHER = np.random.default_rng(1).bytes(len(DATA))
MD5 = hashlib.md5(DATA).hexdigest()


@dataclass
class Behaviour:
    """What the server does with a path; each step is used up by one request, the last one stays."""

    steps: list[dict] = field(default_factory=lambda: [{}])
    requests: list[dict] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour = self.server.behaviours.get(self.path)
        if behaviour is None:
            return self.send_error(404)
        behaviour.requests.append(dict(self.headers))
        step = behaviour.steps.pop(0) if len(behaviour.steps) > 1 else behaviour.steps[0]
        if "status" in step:
            self.send_response(step["status"])
            for name, value in step.get("headers", {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data, etag = step.get("data", DATA), step.get("etag", '"one"')
        start = 0
        asked = self.headers.get("Range")
        if asked and step.get("ranges", True) and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + step.get('shift', 0)}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if etag:
            self.send_header("ETag", etag)
        if step.get("length", True):
            self.send_header("Content-Length", str(len(data) - start + step.get("lie", 0)))
        self.end_headers()
        self.wfile.write(data[start : start + step["cut"]] if "cut" in step else data[start:])
        if "stop" in step:
            self.wfile.flush()
            step["stop"].wait(60)

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.behaviours = True, {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def serve(server, *steps, path="/a.zip"):
    server.behaviours[path] = Behaviour(list(steps) or [{}])
    return server.url + path, server.behaviours[path]


def get(url, folder, md5=MD5, **options):
    fetch([url] if isinstance(url, str) else url, folder / "a.zip", md5, pause=0.001, **options)
    assert [path.name for path in folder.iterdir()] == ["a.zip"]
    return (folder / "a.zip").read_bytes()


def ranges(behaviour):
    return [request.get("Range") for request in behaviour.requests]


def test_a_plain_download_reports_bytes(server, tmp_path):
    url, behaviour = serve(server)
    seen = []
    assert get(url, tmp_path, report=lambda *at: seen.append(at)) == DATA
    assert seen[-1] == (len(DATA), len(DATA)) and seen == sorted(seen)
    assert get(url, tmp_path) == DATA and len(behaviour.requests) == 1  # there already


@pytest.mark.parametrize("md5", [MD5, None])
def test_cut_connections_are_gone_on_with(server, tmp_path, md5):
    url, behaviour = serve(server, {"cut": 1_000_000}, {"cut": 500_000}, {"cut": 0}, {})
    assert get(url, tmp_path, md5) == DATA
    assert ranges(behaviour) == [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500000-"]
    assert behaviour.requests[1]["If-Range"] == '"one"'


def test_a_server_without_ranges_begins_again(server, tmp_path):
    url, behaviour = serve(server, {"cut": 1_000_000, "ranges": False}, {"ranges": False})
    assert get(url, tmp_path) == DATA and len(behaviour.requests) == 2


@pytest.mark.parametrize("md5", [MD5, None])
def test_a_file_that_changed_meanwhile_begins_again(server, tmp_path, md5):
    url, _ = serve(server, {"cut": 1_000_000, "data": OTHER, "etag": '"old"'}, {})
    assert get(url, tmp_path, md5) == DATA


def test_a_change_that_the_server_hides_is_found_by_the_checksum(server, tmp_path):
    url, behaviour = serve(server, {"cut": 1_000_000, "data": OTHER}, {})
    assert get(url, tmp_path) == DATA
    assert ranges(behaviour) == [None, "bytes=1000000-", None]


def test_without_checksum_and_version_nothing_is_gone_on_with(server, tmp_path):
    url, behaviour = serve(server, {"cut": 1_000_000, "etag": None}, {"etag": None})
    assert get(url, tmp_path, None) == DATA and ranges(behaviour) == [None, None]


def test_another_part_than_asked_for(server, tmp_path):
    url, _ = serve(server, {"cut": 1_000_000}, {"shift": 5}, {})
    assert get(url, tmp_path) == DATA


def test_a_length_that_is_too_long(server, tmp_path):
    url, _ = serve(server, {"lie": 5000})
    assert get(url, tmp_path / "1") == DATA  # its checksum is right
    assert get(url, tmp_path / "2", None) == DATA  # asked for the rest, the server says that there is none
    url, _ = serve(server, {"lie": 5000, "ranges": False})
    with pytest.raises(UserError, match="ends after 3,000,000 of 3,005,000 bytes, 5 times in a row"):
        get(url, tmp_path / "3", None)


def test_a_length_that_is_too_short(server, tmp_path):
    url, _ = serve(server, {"lie": -5000})
    with pytest.raises(UserError, match="gives wrong bytes: their MD5 is .* instead of"):
        get(url, tmp_path)


def test_no_length(server, tmp_path):
    url, behaviour = serve(server, {"length": False, "cut": 1_000_000}, {"length": False})
    assert get(url, tmp_path / "1") == DATA and ranges(behaviour) == [None, "bytes=1000000-"]
    url, behaviour = serve(server, {"length": False, "ranges": False, "data": OTHER})
    with pytest.raises(UserError, match="gives wrong bytes"):
        get(url, tmp_path / "2")
    assert len(behaviour.requests) == 3


def test_wrong_bytes_never_pass(server, tmp_path):
    url, behaviour = serve(server, {"data": OTHER})
    complaint = f"cannot fetch a.zip: {url} gives wrong bytes: their MD5 is .* instead of {MD5}: .*--mirror"
    with pytest.raises(UserError, match=complaint):
        get(url, tmp_path)
    assert not (tmp_path / "a.zip").exists() and len(behaviour.requests) == 1
    (tmp_path / "a.zip").write_bytes(OTHER)  # nor do those that are there already
    assert get(serve(server)[0], tmp_path) == DATA


def test_mirrors_are_tried_in_order(server, tmp_path):
    urls = [serve(server, step, path=path)[0] for path, step in [("/1", {"data": OTHER}), ("/2", {"status": 403})]]
    last, behaviour = serve(server, path="/3")
    assert get([*urls, server.url + "/gone", last], tmp_path) == DATA and len(behaviour.requests) == 1
    with pytest.raises(UserError, match="/1 gives wrong bytes.*; .*/2 answers 403 Forbidden; .*/gone answers 404"):
        get([*urls, server.url + "/gone"], tmp_path / "other")


def test_a_busy_server_is_asked_again(server, tmp_path):
    url, _ = serve(server, {"status": 503}, {"status": 429}, {})
    assert get(url, tmp_path) == DATA
    url, behaviour = serve(server, {"status": 500}, path="/b.zip")
    with pytest.raises(UserError, match="b.zip answers 500 Internal Server Error, 5 times in a row"):
        get(url, tmp_path / "other")
    assert len(behaviour.requests) == 5


def test_nobody_there(tmp_path):
    with pytest.raises(UserError, match="breaks off .*refused.*, 5 times in a row"):
        get("http://127.0.0.1:9/a.zip", tmp_path)


def test_a_silent_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr("ali_dist.data.download.SECONDS", 0.2)
    release = threading.Event()
    url, _ = serve(server, {"cut": 1_000_000, "stop": release}, {})
    assert get(url, tmp_path) == DATA
    release.set()


def test_redirections_stay_with_http(server, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(DATA)
    target, _ = serve(server, path="/real")
    url, _ = serve(server, {"status": 302, "headers": {"Location": target}})
    assert get(url, tmp_path / "1") == DATA
    for place in (f"file://{secret}", "ftp://127.0.0.1/a"):
        url, _ = serve(server, {"status": 302, "headers": {"Location": place}}, path="/b.zip")
        with pytest.raises(UserError, match="cannot fetch a.zip"):
            get(url, tmp_path / "2")


def test_a_killed_download_is_gone_on_with(server, tmp_path):
    release = threading.Event()
    url, behaviour = serve(server, {"cut": 1_000_000, "stop": release}, {})
    script = f"""
from pathlib import Path
from ali_dist.data.download import fetch
fetch([{url!r}], Path({str(tmp_path)!r}) / "a.zip", {MD5!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    part = tmp_path / "a.zip.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == 1_000_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match="a.zip.part is being fetched by another process"):
        get(url, tmp_path)
    process.kill()
    process.wait()
    release.set()
    assert get(url, tmp_path) == DATA and ranges(behaviour)[-1] == "bytes=1000000-"


@pytest.fixture
def images(tmp_path):
    return write_zip(
        tmp_path / "images.zip", {f"a/{i}.png": encoded(picture(i), "PNG") for i in range(20)}
    ).read_bytes()


def test_prepare_from_an_address(server, tmp_path, command, images):
    url, behaviour = serve(server, {"cut": 50, "data": images}, {"data": images}, path="/my/images.zip?key=1")
    words = "--dataset", "folder", "--source", url, "--data", tmp_path, "--workers", 1
    code, out, _ = command(*words, "--dry-run")
    assert code == 0 and f"would fetch {url} into {tmp_path / 'downloads' / 'folder'}" in out
    assert not behaviour.requests and not (tmp_path / "downloads").exists()
    code, out, err = command(*words)
    assert code == 0 and "fetching images.zip into" in out and "packed 20 images" in out, err
    assert load_index(tmp_path, "folder").images("train") == 18
    code, out, _ = command(*words, "--force")
    assert code == 0 and "fetching" not in out


def test_prepare_from_mirrors(server, tmp_path, command, monkeypatch, images):
    spec = replace(
        DATASETS["folder"],
        archives=("images.zip",),
        address=f"{server.url}/official",
        md5={"images.zip": hashlib.md5(images).hexdigest()},
    )
    monkeypatch.setitem(DATASETS, "folder", spec)
    serve(server, {"data": images[:-1]}, path="/mirror/images.zip")
    official, behaviour = serve(server, {"data": images}, path="/official/images.zip")
    words = "--dataset", "folder", "--data", tmp_path, "--workers", 1
    code, out, err = command(*words, "--mirror", f"{server.url}/mirror/", f"{server.url}/gone")
    assert code == 0 and len(behaviour.requests) == 1, err
    assert not list((tmp_path / "downloads" / "folder").glob("*.part*"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["celeba"], "celeba needs --source: fetch img_align_celeba.zip (or its folder), list_attr_celeba.txt and"),
        (["imagenet64"], "imagenet64 needs --source: fetch ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and"),
        (["folder"], "folder needs --source: fetch a folder or zip of your own images"),
        (["cifar10", "--source", "ftp://x/a.tar.gz"], "only http:// and https:// can be downloaded from"),
        (["cifar10", "--source", "http://x/"], "--source http://x/ must end in the name of a file"),
        (["cifar10", "--mirror", "/mnt/mirror"], "--mirror /mnt/mirror: each must begin with http:// or https://"),
        (["cifar10", "--mirror", "file:///mnt"], "--mirror file:///mnt: only http:// and https://"),
        (["cifar10", "--source", __file__, "--mirror", "http://x"], "--mirror is for what is downloaded: leave it out"),
        (["digits", "--mirror", "http://x"], "--mirror is for what is downloaded: leave it out"),
    ],
)
def test_what_cannot_be_downloaded(command, tmp_path, words, complaint):
    code, out, err = command("--data", tmp_path, "--dataset", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and complaint in err
    if len(words) == 1:
        assert f"put it into {tmp_path}/downloads/{words[0]}" in err and f"--source {tmp_path}/downloads" in err
    assert not list(tmp_path.iterdir())


def test_official_addresses(command, tmp_path):
    for name, files in (("svhn", 3), ("cifar10", 1), ("tinyimagenet", 1)):
        code, out, _ = command("--data", tmp_path, "--dataset", name, "--dry-run")
        assert code == 0 and out.count("would fetch http") == files
        spec = DATASETS[name]
        assert all(f"{spec.address}/{file}" in out and spec.md5[file] for file in spec.archives)
    _, out, _ = command(
        "--data", tmp_path, "--dataset", "celeba", "--mirror", "https://files.local/celeba", "--dry-run"
    )
    assert "would fetch https://files.local/celeba/list_attr_celeba.txt into" in out
