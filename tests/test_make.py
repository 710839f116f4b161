"""The make commands and shell scripts, in a copy of the project below a path with spaces."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ali_dist import checkpoint
from ali_dist.run import RunFolder

pytestmark = pytest.mark.xdist_group("nodes")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path):
    """The project's files in a folder with spaces, with this environment in place of its own .venv."""
    copy = tmp_path / "a clone of it"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv" / "bin").mkdir(parents=True)
    for tool in ("python", "ray", "ruff"):
        (copy / ".venv" / "bin" / tool).write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / tool}" "$@"\n')
        (copy / ".venv" / "bin" / tool).chmod(0o755)
    (copy / ".venv" / ".done").touch()
    return copy


def make(copy, *words, **env):
    kept = {k: v for k, v in os.environ.items() if k == "RAY_HEAD_FLAGS" or not k.startswith("RAY_")}
    env = {**kept, **env}
    return subprocess.run(["make", *words], cwd=copy, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture
def short_folder():
    """Ray puts sockets below it, whose paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


def ray_processes(folder: str) -> list[str]:
    """Those below the folder that run; dead ones may wait for a parent that never asks for them."""
    listed = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True, check=True).stdout
    found = [line for line in listed.splitlines() if line[0] != "Z" and folder in line]
    return [line for line in found if "raylet" in line or "gcs_server" in line]


@pytest.mark.slow
def test_make_train_twice_trains_continues_and_stops_what_it_started(copy, short_folder):
    for num_images, message in ((64, "64 / 64 images"), (128, "continuing at 64 images")):
        flags = f"--dataset digits --batch-size 16 --num-images {num_images} --tick-images 32"
        done = make(copy, "train", f"TRAIN_FLAGS={flags}", ALI_DIST_DATA=str(copy / "my data"), TMPDIR=short_folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert message in done.stdout
        for named in ("samples ", "reconstructions ", "checkpoint ", "tensorboard --logdir"):
            assert named in done.stdout
    (samples,) = {line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("samples ")}
    assert Path(samples).is_file() and Path(samples).is_relative_to(copy)
    checkpoint.verify(RunFolder(copy / "runs" / "digits").saved()[-1])
    assert not ray_processes(short_folder)


def test_the_test_command_runs_all_but_the_soak_and_ci_runs_it(copy):
    assert "pytest -n 3 --dist loadgroup -m 'not soak'" in make(copy, "-n", "test").stdout
    listed = subprocess.run(
        [copy / ".ci" / "run"], cwd="/", capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": "n"}
    )
    assert "pytest -n 3 --dist loadgroup -m 'not soak'" in listed.stdout


def test_setup_makes_the_environment_once_from_the_pins(copy):
    assert "pip install" not in make(copy, "-n", "setup").stdout
    (copy / ".venv" / ".done").unlink()
    planned = make(copy, "-n", "setup").stdout
    assert "-c constraints.txt" in planned and "-e '.[test]'" in planned


def test_an_old_python_is_refused_with_the_version_it_needs(copy):
    old = copy / "old python"
    old.write_text("#!/bin/sh\necho 'Python 3.11 or newer is needed, not 3.9' >&2; exit 1\n")
    old.chmod(0o755)
    (copy / ".venv" / ".done").unlink()
    done = make(copy, "setup", f"PYTHON='{old}'")
    assert done.returncode != 0 and "3.11 or newer" in done.stderr


def test_every_pin_satisfies_its_range_and_nothing_is_unpinned():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *itertools.chain.from_iterable(extras.values())]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            assert requirement.extras <= extras.keys()
            continue
        assert requirement.specifier.contains(pins[requirement.name]), text


def test_scripts_without_arguments_or_a_cluster_say_what_they_need():
    done = subprocess.run([ROOT / "launch" / "local.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([ROOT / "launch" / "submit.sh"], capture_output=True, text=True, env=env)
    assert done.returncode != 0 and "RAY_API_SERVER_ADDRESS" in done.stderr
