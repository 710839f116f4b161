"""The command, in this process but for one test."""

import json
import subprocess
import sys

import pytest

from ali_dist.data.index import load_index


def test_digits_from_nothing_to_verified(command, tmp_path):
    data = tmp_path / "a b"
    code, out, err = command("--dataset", "digits", "--data", data, "--verify")
    assert (code, err) == (0, "")
    assert "packed 1,797 images" in out and "verified" in out and "1,437" in out and str(data / "digits") in out
    index = load_index(data, "digits")
    assert index.images("train") == 1437 and index.images("valid") == 360 and index.shape == (1, 32, 32)
    assert json.loads((data / "digits" / "index.json").read_text())["source"] is None

    before = (data / "digits").stat().st_ino
    code, out, err = command("--dataset", "digits", "--data", data)
    assert code == 0 and "already prepared" in out and (data / "digits").stat().st_ino == before

    shard = data / "digits" / "valid-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert command("--dataset", "digits", "--data", data)[0] == 0
    code, out, err = command("--dataset", "digits", "--data", data, "--verify")
    assert code == 2 and f"error: shard {shard} has" in err and "--force" in err and err.count("\n") == 1

    assert command("--dataset", "digits", "--data", data, "--force")[0] == 0
    assert command("--dataset", "digits", "--data", data, "--verify")[0] == 0


def test_a_set_of_an_older_version_is_prepared_again(command, tmp_path):
    assert command("--dataset", "digits", "--data", tmp_path)[0] == 0
    path = tmp_path / "digits" / "index.json"
    text = path.read_text()
    path.write_text(text.replace('"version": 2', '"version": 1', 1))
    code, out, err = command("--dataset", "digits", "--data", tmp_path, "--verify")
    assert (code, err) == (0, "") and "another version" in out and "packed 1,797 images" in out
    assert path.read_text() == text


def test_dry_run_writes_nothing(command, tmp_path):
    code, out, _ = command("--dataset", "digits", "--data", tmp_path / "new", "--dry-run")
    assert code == 0 and "would write 1,437 train images in 1 shards" in out
    assert not (tmp_path / "new").exists()


def test_the_data_folder_comes_from_the_environment(command, tmp_path, monkeypatch):
    monkeypatch.setenv("ALI_DIST_DATA", str(tmp_path / "here"))
    assert command("--dataset", "digits")[0] == 0
    assert (tmp_path / "here" / "digits" / "index.json").exists()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--dataset", "cifar"], "unknown data set 'cifar': did you mean 'cifar10'? known: celeba, cifar10, digits"),
        (["--dataset", "cifar10", "--workers", "-1"], "--workers must not be negative, not -1"),
        (["--dataset", "cifar10", "--size", "64"], "--size 64: the images of cifar10 are 32x32, leave it out"),
        (["--dataset", "folder", "--size", "48"], "--size 48: there are networks for images of 32 and 64 pixels only"),
        (["--dataset", "cifar10", "--source", "/no/such"], "--source /no/such does not exist"),
        (["--dataset", "digits", "--source", "/no/such"], "digits comes with a library: leave --source out"),
        (["--dataset", "cifar10", "--source", __file__], "test_prepare.py cannot be read"),
        (["--dataset", "tinyimagenet", "--source", __file__], "test_prepare.py is no zip archive"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command, tmp_path, args, complaint):
    code, out, err = command("--data", tmp_path, *args)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and complaint in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command("--dataset", "digits", "--data", tmp_path / "file" / "below")
    assert code == 2 and err == f"error: cannot write to {tmp_path / 'file' / 'below'}: Not a directory\n"


def test_a_full_disk(command, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ali_dist.data.pack.os.fsync", full)
    code, _, err = command("--dataset", "digits", "--data", tmp_path)
    assert code == 2 and err == f"error: cannot write to {tmp_path}: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_as_a_real_command(tmp_path):
    command = [sys.executable, "-m", "ali_dist.prepare", "--datset", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and "--dataset" in done.stderr
