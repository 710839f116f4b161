import dataclasses
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import servers
from safetensors.torch import load_file
from support import greatest_difference, poisoned

from ali_dist import cli, worker
from ali_dist.levers import FAST, PLAIN
from ali_dist.meter import read_ticks
from ali_dist.recipes import RECIPES
from ali_dist.run import RunFolder

SHORT = "--networks small --precision fp32 --lr 3e-4 --batch-size 8 --num-images 40 --tick-images 16 --save-images 16"
SHORT += " --sample-images 16 --validate-images 16 --validate-count 16"


@pytest.fixture
def call(monkeypatch, run_command, data, tmp_path):
    """Runs the command in this process: exit code, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.delenv("ALI_DIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(flags: str, dataset: str = "digits", data: Path | None = data) -> tuple[int, str, str]:
        folder = ["--data", str(data)] if data else []
        return run_command(worker.main, ["worker", "--dataset", dataset, *folder, *shlex.split(flags)])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for handler in list(logging.getLogger("ali_dist").handlers):
        handler.close()
        logging.getLogger("ali_dist").removeHandler(handler)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_trains_end_to_end(call, tmp_path):
    code, out, err = call(SHORT)
    assert code == 0, err
    run = RunFolder(tmp_path / "runs" / "digits")
    assert [path.name for path in run.saved()] == ["000000000016", "000000000032", "000000000040"]
    assert [t["num_images"] for t in read_ticks(run.ticks)] == [16, 16, 32, 32, 40, 40]
    assert {f"figures/samples-{n:012d}.png" for n in (0, 16, 32, 40)} <= files(run.root)
    assert json.loads(run.recipe.read_text())["optim"]["batch_size"] == 8
    assert any("tfevents" in path.name for path in run.tensorboard.iterdir())
    assert len(run.log.read_text().splitlines()) == 3
    assert "40 / 40 images  100.0 %" in err and "ETA 0s" in err
    for path in (run.saved()[-1], run.figures / "samples-000000000040.png", run.tensorboard):
        assert str(path) in out
    assert (run.figures / "reconstructions-000000000040.png").exists()
    assert not [name for name in files(tmp_path) if "partial" in name]
    # A longer run under the same name continues; it may change the schedule
    code, out, err = call(SHORT + " --num-images 56 --keep 2")
    assert code == 0 and "continuing at 40 images" in err
    assert [path.name for path in run.saved()] == ["000000000048", "000000000056"]
    assert json.loads(run.recipe.read_text())["schedule"]["num_images"] == 56
    # One that is done has nothing to do
    before = [path.stat().st_mtime_ns for path in run.saved()]
    code, out, err = call(SHORT + " --num-images 56 --keep 2")
    assert code == 0 and str(run.saved()[-1]) in out
    assert [path.stat().st_mtime_ns for path in run.saved()] == before
    # Another recipe, or --resume never, is refused
    kept = run.recipe.read_text()
    code, out, err = call(SHORT + " --num-images 56 --lr 0.5 --seed 3")
    assert (code, err) == (
        2,
        f"error: run {run.root} was started with another recipe (--seed: 0 -> 3; --lr: 0.0003 -> 0.5): "
        "use its settings to continue it, or choose another --name\n",
    )
    code, out, err = call(SHORT + " --num-images 56 --resume never")
    assert (code, err) == (2, f"error: run {run.root} exists and --resume is never: choose another --name\n")
    assert run.recipe.read_text() == kept


def test_conditional_training(call, tmp_path):
    code, out, err = call("--conditional --dry-run")
    assert code == 0 and json.loads(out)["recipe"]["networks"] == "digits-conditional"
    short = SHORT.replace("small", "small-conditional")
    assert call(f"{short} --conditional --num-images 24")[0] == 0
    run = RunFolder(tmp_path / "runs" / "digits-conditional")
    assert [path.name for path in run.saved()] == ["000000000016", "000000000024"]
    assert {f"figures/conditional-{n:012d}.png" for n in (0, 16, 24)} <= files(run.root)
    assert call(f"{short} --conditional")[0] == 0  # goes on
    embeddings = [load_file(path / "model.safetensors")["embedding.weight"] for path in run.saved()]
    assert all(embedding.equal(embeddings[0]) for embedding in embeddings) and embeddings[0].any()
    code, _, err = call(f"{short} --conditional --train-embedding")
    assert code == 2 and "--train-embedding: False -> True" in err


def test_semi_supervised_training(call, tmp_path):
    short = SHORT.replace("small", "small-classes") + " --labels 20 --labelled-batch 4"
    code, out, err = call(f"{short} --num-images 24")
    assert code == 0, err
    run = RunFolder(tmp_path / "runs" / "digits-20-labels")
    record = json.loads(run.labels.read_text())
    assert sorted(record["classes"]) == sorted([*range(10), *range(10)]) and len(set(record["images"])) == 20
    assert (record["dataset"], record["split"], record["seed"]) == ("digits", "train", 0)
    assert "L_labelled 2." in err and err.count("images: test error ") == 2  # at 16 and at the end
    errors = [tick for tick in read_ticks(run.ticks) if "test/error" in tick]
    assert [tick["num_images"] for tick in errors] == [16, 24]
    assert all(0 < tick["test/error"] <= 1 and 0 < tick["test/error_raw"] <= 1 for tick in errors)
    assert call(short)[0] == 0  # goes on
    assert json.loads(run.labels.read_text()) == record
    # Through and through as if it had not been stopped
    assert call(f"{short} --name through")[0] == 0
    mine, theirs = (RunFolder(tmp_path / "runs" / name) for name in ("digits-20-labels", "through"))
    for group in ("model", "averaged"):
        one, other = (load_file(path.saved()[-1] / f"{group}.safetensors") for path in (mine, theirs))
        assert greatest_difference(one, other) == 0
    # Another draw than before is an error
    run.labels.write_text(json.dumps(record | {"images": record["images"][::-1]}))
    code, _, err = call(f"{short} --num-images 56")
    assert code == 2 and "names other images than the data set would give now" in err
    run.labels.write_text("{")
    code, _, err = call(f"{short} --num-images 56")
    assert code == 2 and "labels.json is damaged" in err


def test_supervised_baseline_training(call, tmp_path):
    short = SHORT.replace("small", "small-classes") + " --labels 20 --supervised-only"
    code, out, err = call(short)
    assert code == 0, err
    run = RunFolder(tmp_path / "runs" / "digits-20-labels-supervised")
    ticks = read_ticks(run.ticks)
    assert "test/error" in ticks[-1] and not any("loss/g" in name for tick in ticks for name in tick)
    first, last = (load_file(path / "model.safetensors") for path in (run.saved()[0], run.saved()[-1]))
    moved = {name.split(".")[0] for name in first if not first[name].equal(last[name])}
    assert moved == {"discriminator"}


def test_resumes_from_the_checkpoint_before_a_damaged_one(call, tmp_path):
    assert call(SHORT)[0] == 0
    run = RunFolder(tmp_path / "runs" / "digits")
    whole = load_file(run.saved()[-1] / "model.safetensors")
    with open(run.saved()[-1] / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    code, out, err = call(SHORT)
    assert code == 0
    assert "model.safetensors does not match its checksum; set aside as 000000000040.damaged" in err
    assert "continuing at 32 images" in err
    assert greatest_difference(load_file(run.saved()[-1] / "model.safetensors"), whole) < 1e-2
    assert [t["num_images"] for t in read_ticks(run.ticks)] == [16, 16, 32, 32, 40, 40]


@pytest.mark.parametrize(
    "flag, levers",
    [("", FAST), ("--no-fast", PLAIN), ("--bf16-gradients", dataclasses.replace(FAST, bf16_gradients=True))],
)
def test_fast_unless_told_otherwise(call, monkeypatch, flag, levers):
    seen = []
    monkeypatch.setattr(worker, "train", lambda state, *args, **named: seen.append(state.levers))
    call(f"{SHORT} {flag}")
    assert seen == [levers]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(call, monkeypatch, tmp_path, number):
    original = worker.train

    def interrupted(*args, **named):
        os.kill(os.getpid(), number)
        return original(*args, **named)

    monkeypatch.setattr(worker, "train", interrupted)
    code, out, err = call(SHORT)
    run = RunFolder(tmp_path / "runs" / "digits")
    assert code == 0 and [path.name for path in run.saved()] == ["000000000008"]
    assert str(run.saved()[-1]) in out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)


def test_a_signal_while_the_storage_is_away_ends_the_run_once_it_is_back(call, monkeypatch, tmp_path):
    original, run, away, timers = worker.train, RunFolder(tmp_path / "runs" / "digits"), tmp_path / "away", []

    def interrupted(*args, **named):
        os.rename(run.root, away)
        timers.append(threading.Timer(1.0, os.rename, (away, run.root)))
        timers[0].start()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(FileNotFoundError):
            run.stop.touch()
        timers[0].join()
        return original(*args, **named)

    monkeypatch.setattr(worker, "train", interrupted)
    code, _, err = call(SHORT)
    assert code == 0, err
    assert [path.name for path in run.saved()] == ["000000000008"] and run.stop.exists()
    run.stop.unlink()
    asked = threading.Event()
    asked.set()
    run.root.rename(away)
    assert worker.stop_asked(run, asked, "")  # and the handler's wish outlives what keeps it from being told
    assert not run.stop.exists()


def test_a_stopped_run_goes_on_when_started_again(call, tmp_path):
    run = RunFolder(tmp_path / "runs" / "digits")
    run.root.mkdir(parents=True)
    run.stop.touch()
    assert call(SHORT)[0] == 0
    assert run.saved()[-1].name == "000000000040"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch-size 0", "--batch-size must be positive, not 0"),
        ("--batch-size -8", "--batch-size must be positive, not -8"),
        ("--lr 0", "--lr must be positive, not 0"),
        ("--lr nan", "--lr must be positive, not nan"),
        ("--num-images -1", "--num-images must be positive, not -1"),
        ("--lanes 0", "--lanes must be positive, not 0"),
        ("--beta1 1", "--beta1 must be at least 0 and below 1, not 1"),
        ("--seed -1", "--seed must not be negative, not -1"),
        ("--keep 0", "--keep must be positive, not 0"),
        ("--cache-gb 0", "--cache-gb must be positive, not 0.0"),
        ("--data https://127.0.0.1:9/sets", "cannot read https://127.0.0.1:9/sets/digits/index.json"),
        ("--data pipe://x", "--data pipe://x: give a folder, or an address that begins with http"),
        ("--accumulate 3", "--batch-size 64 is not a multiple of --accumulate 3"),
        ("--num-workers 0", "--num-workers must be positive, not 0"),
        ("--num-workers -2", "--num-workers must be positive, not -2"),
        ("--max-failures -1", "--cpus-per-worker and --max-failures must not be negative"),
        ("--num-workers 4:2", "--min-workers must be between 1 and --num-workers 2, not 4"),
        ("--num-workers 1:2", "--min-workers is for jobs on Ray: use ali_dist.launch"),
        ("--num-workers=2:3 --lanes 2", "--lanes 2 can't feed --num-workers 3"),
        ("--on-nonfinite rollback --min-workers -1 --num-workers 1", "--min-workers must be between 1 and"),
        ("--batch-size 2 --num-workers 3", "--batch-size 2 in 1 micro-batch(es) is smaller than --num-workers 3"),
        ("--batch-size 8 --accumulate 4 --num-workers 3", "--batch-size 8 in 4 micro-batch(es) is smaller than"),
        ("--lanes 2 --num-workers 3", "--lanes 2 can't feed --num-workers 3"),
        ("--networks svhn", "has images of shape (1, 32, 32), but networks svhn take (3, 32, 32)"),
        ("--networks svhn --conditional", "--conditional needs networks that take labels: --networks svhn do not"),
        ("--train-embedding", "--train-embedding is for --conditional: these networks have no embedding"),
        ("--networks small-attributes", "has 10 classes, but networks small-attributes take 3"),
        ("--labels 15", "--labels 15 is not a multiple of the 10 classes: each gets as many"),
        ("--labels 2000", "--labels 2000: a class has only 1"),
        ("--labels 100 --networks digits", "--networks digits can't be trained with --labels: leave --networks out"),
        ("--networks digits-classes", "--networks digits-classes can't be trained without --labels"),
        ("--labels 100 --train-split valid", "--train-split valid is the split to test on: train on another"),
        ("--train-split extra", "has no split 'extra': it has train, valid"),
        ("--labels 100 --labelled-batch 64", "--labelled-batch must be positive and below --batch-size, not 64"),
        ("--labels 100 --conditional", "--conditional and --labels exclude each other"),
        ("--labels 100 --labelled-batch 63 --num-workers 2", "can't feed --num-workers 2 in batches of 1"),
        ("--labels 100 --repeats 3", "--repeats are parallel jobs on Ray: use ali_dist.launch"),
        ("--networks celebb", "unknown networks 'celebb': did you mean 'celeba'?"),
    ],
)
def test_wrong_values_are_one_line_and_code_2(call, tmp_path, flags, message):
    code, out, err = call(flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err
    assert files(tmp_path) == set()


def test_gpu_asked_for_but_absent(call, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = call("--gpu True")
    assert (code, err) == (2, "error: --gpu was given, but PyTorch sees no CUDA device here\n")
    assert files(tmp_path) == set()


@pytest.mark.parametrize("flags", ["--batch-sise 8", "--batch-size many", "--precision fp8", "--resume maybe"])
def test_wrong_usage_is_code_2_and_names_the_flag(call, tmp_path, flags):
    code, out, err = call(flags)
    assert code == 2 and flags.split()[0].removesuffix("sise") in err
    assert "Traceback" not in err
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    "name, message", [("digit", "unknown data set 'digit': did you mean 'digits'?"), ("qqq", "known: celeba, cifar10")]
)
def test_unknown_data_set(call, name, message):
    code, out, err = call("", dataset=name)
    assert (code, err.count("\n")) == (2, 1) and message in err


def test_no_data_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["worker"])
    with pytest.raises(SystemExit) as exit:
        cli.run(worker.main)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: --dataset is missing: one of digits, cifar10")


def test_missing_data_names_the_command(call, tmp_path):
    code, out, err = call("", data=tmp_path / "none")
    command = f"python -m ali_dist.prepare --dataset digits --data {tmp_path / 'none'}"
    assert (code, err.count("\n")) == (2, 1) and f"`{command}`" in err
    for dataset, source in (("cifar10", " --data"), ("celeba", " --source PATH --data")):  # the first is downloaded
        code, out, err = call("", dataset=dataset)
        assert code == 2 and f"python -m ali_dist.prepare --dataset {dataset}{source}" in err


def test_storage_that_is_a_file(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, err = call(f"{SHORT} --storage {tmp_path / 'file'}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"can't write to {tmp_path / 'file' / 'digits'}" in err and "--storage" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_storage_below_a_file(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, err = call(f"{SHORT} --storage {tmp_path / 'file' / 'below'}")
    assert (code, err.count("\n")) == (2, 1) and "can't write to" in err


def test_damaged_recipe_of_a_run(call, tmp_path):
    run = RunFolder(tmp_path / "runs" / "digits")
    run.root.mkdir(parents=True)
    for text in ("{", "[]", '{"dataset": "digits"}'):
        run.recipe.write_text(text)
        code, out, err = call(SHORT)
        assert (code, err.count("\n")) == (2, 1), text
        assert run.recipe.read_text() == text


def test_dry_run_writes_nothing(call, tmp_path):
    code, out, err = call(f"{SHORT} --name mine --dry-run")
    tree = json.loads(out)
    assert code == 0
    assert tree["run"] == str(tmp_path / "runs" / "mine")
    assert tree["recipe"]["optim"]["batch_size"] == 8 and tree["recipe"]["networks"] == "small"
    assert files(tmp_path) == set()


def test_flags_reach_the_recipe(call):
    flags = "--lr 0.01 --beta1 0.25 --seed 9 --lanes 12 --accumulate 2 --precision bf16 --ema-half-life 77 --dry-run"
    tree = json.loads(call(flags)[1])["recipe"]
    assert (tree["optim"]["lr"], tree["optim"]["beta1"], tree["optim"]["ema_half_life"]) == (0.01, 0.25, 77)
    assert (tree["seed"], tree["lanes"], tree["optim"]["accumulate"], tree["precision"]) == (9, 12, 2, "bf16")
    own = RECIPES["digits"].to_json()
    assert tree["optim"]["batch_size"] == own["optim"]["batch_size"] and tree["schedule"] == own["schedule"]


def test_data_folder_from_the_environment(call, monkeypatch, tmp_path):
    monkeypatch.setenv("ALI_DIST_DATA", str(tmp_path / "elsewhere"))
    code, out, err = call("", data=None)
    assert code == 2 and str(tmp_path / "elsewhere") in err


def test_trains_the_same_from_an_address_with_a_cache(call, data, tmp_path):
    with servers.running() as server:
        server.put(data, "/sets/")
        for name, place, flags in [
            ("local", data, ""),
            ("remote", f"{server.address}/sets", f"--cache {tmp_path / 'cache'} --cache-gb 0.001"),
        ]:
            code, _, err = call(f"{SHORT} --name {name} {flags}", data=place)
            assert code == 0, err
    local, remote = (RunFolder(tmp_path / "runs" / name).saved()[-1] for name in ("local", "remote"))
    for file in ("model.safetensors", "averaged.safetensors", "adam.safetensors"):
        assert (local / file).read_bytes() == (remote / file).read_bytes()
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("cache/*/*")) <= 1e6


def test_a_bad_number_is_one_line_and_code_2(call, monkeypatch, tmp_path):
    poisoned(monkeypatch)
    code, out, err = call(SHORT)
    assert code == 2
    assert err.count("\n") == 1 and "error: stopped: grad_norm/" in err
    assert str(tmp_path / "runs" / "digits" / "checkpoints") in err


def test_a_batch_smaller_than_torchruns_processes(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, out, err = call("--batch-size 2")
    assert code == 2 and "--batch-size 2" in err and "smaller" in err


def test_workers_that_torchrun_does_not_start_are_refused(call):
    code, out, err = call("--num-workers 2")
    assert code == 2 and "torchrun --nproc-per-node 2" in err


def torchrun(tmp_path, data, flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("worker_with_small_networks.py")), "--dataset", "digits"]
    command += ["--data", str(data), "--storage", str(tmp_path / "two"), *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_two_processes_of_torchrun_train_as_one(call, data, tmp_path):
    flags = SHORT.replace("small", "small-dry") + " --batch-size 9 --num-images 36 --validate-images 1000"
    assert call(f"{flags} --storage {tmp_path / 'one'}")[0] == 0
    done = torchrun(tmp_path, data, flags)
    assert done.returncode == 0, done.stderr
    one, two = RunFolder(tmp_path / "one" / "digits"), RunFolder(tmp_path / "two" / "digits")
    assert [path.name for path in one.saved()] == [path.name for path in two.saved()]
    for group in ("model", "averaged"):
        mine, theirs = (load_file(run.saved()[-1] / f"{group}.safetensors") for run in (one, two))
        assert greatest_difference(mine, theirs) <= 1e-4
    ours, theirs = read_ticks(one.ticks), read_ticks(two.ticks)
    assert [tick["num_images"] for tick in ours] == [tick["num_images"] for tick in theirs]
    for a, b in zip(ours, theirs, strict=True):
        numbers = [name for name in a if name.removeprefix("valid/").startswith(("loss/", "accuracy/", "mu/", "x_"))]
        assert len(numbers) > 8
        assert {name: a[name] for name in numbers} == pytest.approx({name: b[name] for name in numbers}, abs=1e-4)
    assert done.stderr.count("36 / 36 images") == 1  # only one of them logs
    assert done.stdout.count("checkpoint  ") == 1
