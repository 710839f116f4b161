"""Files from strangers: whatever they hold, nothing in them runs, nothing outside is written, and one line says no."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import recipe

import ali_dist
from ali_dist import checkpoint, cli, prepare
from ali_dist.data.download import fetch, shown
from ali_dist.data.files import scan_tar
from ali_dist.data.index import load_index
from ali_dist.data.shards import verify
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder
from ali_dist.state import TrainState

SECRET = "hunter2-never-to-be-seen"
HUGE = (2**40).to_bytes(8, "little")  # a safetensors header of a terabyte


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_saved(trap: Trap) -> bytes:
    buffer = BytesIO()
    torch.save(trap, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory) -> Path:
    """A whole checkpoint of the small networks, only to be copied."""
    state = TrainState(recipe(), digits.mean_image, torch.device("cpu"))
    return checkpoint.save(RunFolder(tmp_path_factory.mktemp("saved")), state)


@pytest.fixture
def path(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)
    return tmp_path / "checkpoints" / saved.name


def promise(path: Path, **more) -> None:
    """Makes the manifest true of the files that are there, so that it hides nothing."""
    manifest = {}
    for file in path.iterdir():
        if file.name != "manifest.json":
            content = file.read_bytes()
            manifest[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({**manifest, **more}))


def refused(path: Path, digits) -> None:
    """By all that reads checkpoints."""
    state = TrainState(recipe(), digits.mean_image, torch.device("cpu"))
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.verify(path)
        checkpoint.load(path, state)
    with pytest.raises(UserError, match="checkpoint"):
        ali_dist.load(path)


@pytest.mark.parametrize("name", ["model", "averaged", "adam"])
@pytest.mark.parametrize("content", [HUGE + b"{}", b"\xff" * 64, b"", (8).to_bytes(8, "little") + b"[[[[[[[["])
def test_tensor_files_with_impossible_headers(path, digits, name, content):
    (path / f"{name}.safetensors").write_bytes(content)
    promise(path)
    state = TrainState(recipe(), digits.mean_image, torch.device("cpu"))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path, state)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, "[]", "null", "{}", '{"recipe": []}', '{"recipe": {"optim": 3}}', '{"recipe": "x", "num_images": 1}'],
)
def test_states_that_are_no_states(path, digits, text):
    (path / "state.json").write_text(text)
    promise(path)
    refused(path, digits)


@pytest.mark.parametrize(
    "key, value", [("num_images", "1"), ("num_images", -1), ("networks", "unheard of"), ("networks", [])]
)
def test_states_of_impossible_values(path, digits, key, value):
    tree = json.loads((path / "state.json").read_text())
    (tree if key in tree else tree["recipe"])[key] = value
    (path / "state.json").write_text(json.dumps(tree))
    promise(path)
    with pytest.raises(UserError):
        checkpoint.load(path, TrainState(recipe(), digits.mean_image, torch.device("cpu")))


def test_tensors_of_other_networks(path, digits):
    from safetensors.torch import save_file

    for name in ("model", "averaged"):
        save_file({"encoder.0.weight": torch.zeros(2, 2)}, path / f"{name}.safetensors")
    promise(path)
    refused(path, digits)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "null", "3", '{"model.safetensors": null}'])
def test_manifests_that_are_no_manifests(path, digits, text):
    (path / "manifest.json").write_text(text)
    refused(path, digits)


def test_manifests_name_nothing_outside_and_no_device(path, digits, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    empty = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (path / "zero").symlink_to("/dev/zero")  # says that it has 0 bytes, and never ends
    os.mkfifo(path / "pipe")
    for name in ("../../outside", str(outside), "zero", "pipe", ".", ".."):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({name: empty, **manifest}))
        refused(path, digits)
        (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(path)


def test_a_linked_tensor_file_is_refused_and_a_linked_folder_never_emptied(path, digits, tmp_path):
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(path, digits)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (path.parent / ".000000000009.partial").symlink_to(tmp_path / "precious")
    assert checkpoint.newest_whole(RunFolder(tmp_path))[0] is None
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("write", [lambda trap: pickle.dumps(trap), torch_saved], ids=["pickle", "torch.save"])
def test_no_file_of_a_run_or_a_data_set_is_unpickled(data, path, digits, tmp_path, write):
    """A trap in every file at once and one by one; each reader says no."""
    sprung = tmp_path / "sprung"
    trap = write(Trap(sprung))
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(trap)
        if file.name != "manifest.json":
            promise(path)
        if file.name not in ("adam.safetensors", "model.safetensors"):  # of no use to a reader
            with pytest.raises(UserError):
                ali_dist.load(path)
        with pytest.raises(UserError):
            checkpoint.verify(path)
            checkpoint.load(path, TrainState(recipe(), digits.mean_image, torch.device("cpu")))
        file.write_bytes(content)
        promise(path)
    run = RunFolder(tmp_path)
    run.recipe.write_bytes(trap)
    with pytest.raises(UserError):
        run.read_recipe()
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "digits" / "index.json").write_bytes(trap)
    with pytest.raises(UserError):
        load_index(tmp_path / "data", "digits")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # it would have worked


HOSTILE_MEMBERS = [
    "000000.pyd",
    "000000.pickle",
    "000000.pth",
    "../../outside",
    "/tmp/ali_dist-outside",
    "pipe:touch sprung",
]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """A member of a tar archive with its header and padding."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, target
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def rewrite(folder: Path, change) -> None:
    """Replaces each block's bytes by `change(bytes)`; the index's sizes and checksums are made true of that."""
    tree = json.loads((folder / "index.json").read_text())
    for shard in (shard for split in tree["splits"].values() for shard in split["shards"]):
        old, new, blocks = (folder / shard["name"]).read_bytes(), b"", []
        for offset, size, _ in shard["blocks"]:
            block = change(old[offset : offset + size])
            blocks.append((len(new), len(block), hashlib.sha256(block).hexdigest()))
            new += block
        new += bytes(2 * tarfile.BLOCKSIZE)
        (folder / shard["name"]).write_bytes(new)
        shard.update(blocks=blocks, bytes=len(new), sha256=hashlib.sha256(new).hexdigest())
    (folder / "index.json").write_text(json.dumps(tree))


def test_shards_with_members_of_every_hostile_kind(data, tmp_path):
    """Beside the arrays that the reader takes lie members that a careless one would run, follow or write."""
    folder, sprung = tmp_path / "data" / "digits", tmp_path / "sprung"
    shutil.copytree(data / "digits", folder)
    trap = pickle.dumps(Trap(sprung))
    hostile = b"".join(member(name, trap) for name in HOSTILE_MEMBERS)
    for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.CHRTYPE, ""), (tarfile.FIFOTYPE, "")):
        hostile += member("000000.x.npy", kind=kind, target=target)
    rewrite(folder, lambda block: hostile + block)
    before = set(tmp_path.rglob("*"))
    verify(load_index(tmp_path / "data", "digits"))
    assert set(tmp_path.rglob("*")) == before and not sprung.exists()
    assert not Path("/tmp/ali_dist-outside").exists()


def header(text: str) -> bytes:
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    "content",
    [
        header("__import__('os').mkdir('sprung')"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775807, 9), }"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }"),
        b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + b"{",
        b"",
    ],
)
def test_shards_whose_arrays_have_hostile_headers(data, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data / "digits", tmp_path / "data" / "digits")
    block = b"".join(member(f"000000.{name}", content) for name in ("y.npy", "x.npy", "x.zst"))
    rewrite(tmp_path / "data" / "digits", lambda _: block)
    with pytest.raises(UserError, match="train-000000.tar"):
        verify(load_index(tmp_path / "data", "digits"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["splits"]["train"]["shards"][0].update(name="../../../etc/passwd"),
        lambda tree: tree["splits"]["train"]["shards"][0].update(name="/etc/passwd"),
        lambda tree: tree["splits"]["train"]["shards"][0].update(name=["x"]),
        lambda tree: tree["splits"]["train"]["shards"][0].update(images=-5),
        lambda tree: tree["splits"]["train"]["shards"][0].update(images=10**30),
        lambda tree: tree["splits"]["train"]["shards"][0]["blocks"][0].__setitem__(0, -(10**9)),
        lambda tree: tree["splits"]["train"]["shards"][0]["blocks"][0].__setitem__(1, 10**15),
        lambda tree: tree["splits"]["train"]["shards"][0].update(code="import os"),
        lambda tree: tree.update(shape=[10**12, 10**12, 10**12]),
        lambda tree: tree.update(shape=[1, -1, -1]),
        lambda tree: tree.update(splits=[]),
        lambda tree: tree["mean_image"].update(sum=[]),
        lambda tree: tree["mean_image"].update(images=0),
    ],
)
def test_hostile_indexes(data, tmp_path, change):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "digits" / "index.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is damaged or of another version"):
        load_index(tmp_path / "data", "digits")
    file.write_text("[" * 10**6)
    with pytest.raises(UserError, match="nested too deeply"):
        load_index(tmp_path / "data", "digits")


def picture() -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_zip_archives_never_write_where_their_names_say(tmp_path, monkeypatch, capsys):
    archive = tmp_path / "in" / "archive.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(20):
            file.writestr(f"train/cat/{i}.png", picture())
            file.writestr(f"train/../../../evil/{i}.png", picture())
        file.writestr("/absolute/evil.png", picture())
        link = zipfile.ZipInfo("train/cat/link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    command = ["prepare", "--dataset", "folder", "--source", str(archive), "--data", str(tmp_path / "out" / "data")]
    monkeypatch.setattr(sys, "argv", [*command, "--workers", "1", "--on-bad-image", "skip"])
    try:
        cli.run(prepare.main)
    except SystemExit as exit:
        assert exit.code in (0, 2)
    written = {item for item in tmp_path.rglob("*") if item.is_file()} - {archive}
    assert all(item.is_relative_to(tmp_path / "out" / "data") for item in written)
    assert not any(item.is_symlink() for item in tmp_path.rglob("*"))
    assert not Path("/absolute/evil.png").exists() and "root:" not in "".join(capsys.readouterr())


def test_tar_archives_are_scanned_for_plain_files_only(tmp_path):
    with tarfile.open(tmp_path / "archive.tar", "w") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("../../evil")
        member.size = 4
        tar.addfile(member, BytesIO(b"evil"))
    before = set(tmp_path.rglob("*"))
    assert [name for name, _, _ in scan_tar(tmp_path / "archive.tar")] == ["../../evil"]
    assert set(tmp_path.rglob("*")) == before


def test_secrets_of_the_environment_reach_no_file_of_a_run(data, tmp_path):
    """Of a real process, with what a cluster's shell may hold."""
    names = ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "PASSWORD")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: SECRET for name in names}}
    script = str(Path(__file__).with_name("worker_with_small_networks.py"))
    flags = "--dataset digits --networks small --batch-size 8 --num-images 16 --validate-count 8 --tick-images 8"
    command = [sys.executable, script, *flags.split(), "--data", data, "--storage", tmp_path / "runs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = [item for item in (tmp_path / "runs").rglob("*") if item.is_file()]
    assert {item.suffix for item in files} >= {".json", ".jsonl", ".txt", ".safetensors", ".png"}
    assert any("tfevents" in item.name for item in files)
    assert not [item for item in files if SECRET.encode() in item.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


def test_secrets_of_an_address_are_neither_shown_nor_kept(tmp_path):
    url = f"http://me:{SECRET}@127.0.0.1:9/folder/a.zip?signature={SECRET}"
    assert shown(url) == "http://127.0.0.1:9/folder/a.zip?…" and shown("http://a/b.zip") == "http://a/b.zip"
    with pytest.raises(UserError) as error:
        fetch([url], tmp_path / "a.zip", None, pause=0)
    assert "http://127.0.0.1:9/folder/a.zip" in str(error.value) and SECRET not in str(error.value)
    assert not [item for item in tmp_path.rglob("*") if item.is_file() and SECRET.encode() in item.read_bytes()]
