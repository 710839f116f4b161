"""Commands about runs in s3, what they refuse, and what strangers and secrets do there."""

import json
import time

import pytest
import torch
from support import poisoned

import ali_dist
from ali_dist import encoding, export, figures, launch, remote, status, worker
from ali_dist.data.index import load_index
from ali_dist.data.store import open_bucket
from ali_dist.evaluate import __main__ as evaluate
from ali_dist.recipe import UserError

pytestmark = pytest.mark.usefixtures("host")

SHORT = "--networks small --precision fp32 --lr 3e-4 --batch-size 8 --num-images 16 --tick-images 8 --save-images 8"
SHORT += " --sample-images 1000 --validate-images 1000 --validate-count 16"


@pytest.fixture
def train(run_command, data, storage):
    """Trains with one process and no Ray: exit code, stdout, stderr."""

    def run(flags: str = "", place: str = storage) -> tuple[int, str, str]:
        words = ["worker", "--dataset", "digits", "--data", str(data), "--storage", place, *f"{SHORT} {flags}".split()]
        return run_command(worker.main, words)

    return run


def test_the_commands_take_an_address(train, run_command, storage, data, tmp_path, host):
    address = f"{storage}/digits"
    code, out, err = train()
    assert code == 0, err
    for line in (f"run              {address}", f"checkpoint       {address}/checkpoints/000000000016"):
        assert line in out.splitlines()
    mine = remote.run_at(storage, "digits").saved()[-1]
    expected = ali_dist.load(mine)
    host("two")
    z = torch.randn(3, 4)
    for place in (address, f"{address}/", f"{address}/checkpoints/000000000016"):
        assert torch.equal(ali_dist.load(place).decode(z), expected.decode(z))
    assert torch.equal(ali_dist.load(address, weights="raw").decode(z), ali_dist.load(mine, weights="raw").decode(z))

    bucket, words = open_bucket(storage, "digits"), ["--data", str(data)]
    by_name = ["digits", "--storage", storage]
    for name, run in (("three", [address]), ("four", by_name)):
        host(name)
        code, out, err = run_command(evaluate.main, ["evaluate", *run, "--metrics", "posterior", *words])
        assert code == 0, err
    lines = [json.loads(line) for line in bucket.get("metrics.jsonl").splitlines()]
    assert [line["checkpoint"] for line in lines] == [f"{address}/checkpoints/000000000016"] * 2
    code, out, err = run_command(figures.main, ["figures", *by_name, "--figures", "samples", *words])
    assert (code, out) == (0, f"{address}/figures/samples-000000000016-labelled.png\n"), err
    assert bucket.get("figures/samples-000000000016-labelled.png").startswith(b"\x89PNG")
    code, out, err = run_command(export.main, ["export", *by_name, "--out", str(tmp_path / "model")])
    assert code == 0 and "`posterior`" in (tmp_path / "model" / "README.md").read_text(), err
    for words in ([address], by_name):
        code, out, err = run_command(status.main, ["status", *words])
        assert code == 0 and "finished" in out and f"{address}/checkpoints/000000000016, " in out, err
    # Going on takes no harm from what others have added
    assert train("--num-images 24")[0] == 0
    assert len(bucket.get("metrics.jsonl").splitlines()) == 2


def test_features_are_those_of_the_model_whichever_host_makes_them(train, storage, data, tmp_path, host):
    assert train()[0] == 0
    model, made = ali_dist.load(f"{storage}/digits"), []
    part = encoding.parts(load_index(data, "digits"), ["valid"])[0]
    for number, place in enumerate([model.checkpoint, f"{storage}/digits/checkpoints/000000000016"]):
        host(f"host {number}")
        encoder = encoding.Encoder(place, "averaged", (data, "digits"), ["mu"], 0, tmp_path / str(number))
        made.append(encoder({name: getattr(part, name) for name in ("split", "number", "first", "last")}))
    assert made[0] == made[1] and made[0]["rows"] == 360


def test_one_name_is_one_recipe_for_all_hosts(train, storage, host):
    assert train()[0] == 0
    before = open_bucket(storage, "digits").get("recipe.json")
    host("two")
    code, out, err = train("--seed 3")
    assert code == 2 and err == (
        f"error: run {storage}/digits was started with another recipe (--seed: 0 -> 3): "
        "use its settings to continue it, or choose another --name\n"
    )
    code, out, err = train("--resume never")
    assert code == 2 and f"run {storage}/digits exists and --resume is never" in err
    assert open_bucket(storage, "digits").get("recipe.json") == before


def test_a_nan_is_told_there(train, storage, monkeypatch):
    poisoned(monkeypatch)
    code, out, err = train()
    assert code == 2 and f"the last good checkpoint is in {storage}/digits/checkpoints" in err
    found = status.status(remote.find("digits", storage), time.time())
    assert found["state"] == "failed" and "grad_norm/" in found["why"]


def test_what_was_asked_of_a_run_before_it_was_started_again_is_forgotten(train, storage):
    bucket = open_bucket(storage, "digits")
    for name in remote.CONTROL:
        bucket.put(name, b"")
    assert train()[0] == 0
    assert not bucket.has(*remote.CONTROL) and 16 in remote.saved(remote.run_at(storage, "digits"))


@pytest.mark.parametrize(
    "place, complaint",
    [
        ("ftp://host/runs", "--storage ftp://host/runs: give a folder, or an address that begins with s3:// or gs://"),
        ("https://me:hush@host/runs", "--storage https://host/runs: give a folder"),
        ("s3://bucket/../runs", "no part of a run's address may be empty or of dots"),
        ("s3://no-such-bucket/runs", "cannot write to --storage s3://no-such-bucket/runs/digits, 5 times"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(train, place, complaint):
    code, out, err = train(place=place)
    assert (code, err.count("\n")) == (2, 1) and complaint in err and "hush" not in err


def test_wrong_credentials_are_one_line(train, storage, s3):
    s3.fault = lambda method, path: 403
    code, out, err = train()
    assert (code, err.count("\n")) == (2, 1)
    assert f"error: cannot read --storage {storage}/digits, 5 times in a row" in err and "your credentials" in err


def test_repeats_need_a_folder(run_command, data, storage):
    words = ["launch", "--dataset", "digits", "--data", str(data), "--storage", storage, "--labels", "20"]
    code, out, err = run_command(launch.main, [*words, "--repeats", "2"])
    assert code == 2 and "--repeats needs a folder as --storage" in err


def test_what_is_not_there_is_one_line(run_command, storage):
    code, out, err = run_command(status.main, ["status", f"{storage}/nothing"])
    assert (code, err.count("\n")) == (2, 1) and f"no run at {storage}/nothing" in err
    for name in ("nothing", "nothing/checkpoints/000000000016"):
        with pytest.raises(UserError, match=f"no checkpoint at {storage}/{name}: give a run's address"):
            ali_dist.load(f"{storage}/{name}")


def test_passwords_are_shown_nowhere(train, s3, data, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    place = f"s3://somebody:hush@{s3.bucket}/runs"
    s3.fault = lambda method, path: 503 if "events" in path else None  # of which the log speaks
    with monkeypatch.context() as patch:
        patch.setattr("ali_dist.patience.SECONDS_OF_PATIENCE", 0.5)
        code, out, err = train(place=place)
    assert code == 2 and "could not be sent" in err and "hush" not in out + err
    s3.fault = lambda method, path: None
    code, out, err = train(place=place)
    assert code == 0 and "hush" not in out + err
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"hush" not in path.read_bytes(), path
        assert "hush" not in str(path)


def test_a_strangers_names_are_fetched_into_no_other_folder(train, storage, s3, tmp_path, host):
    assert train()[0] == 0
    before = {path for path in tmp_path.rglob("*") if "one" not in path.parts}
    for name in (
        "checkpoints/000000000016/../../../../../../../../evil.json",
        "checkpoints/000000000016/evil.sh",
        "checkpoints/evil/manifest.json",
        "../evil.json",
        "OWNER.../../evil",
    ):
        s3.client.put_object(Bucket=s3.bucket, Key=f"runs/digits/{name}", Body=b"evil")
    host("two")
    assert train("--num-images 24")[0] == 0
    ali_dist.load(f"{storage}/digits")
    status.status(remote.find("digits", storage), time.time())
    new = {path for path in tmp_path.rglob("*") if "one" not in path.parts} - before
    assert not [path for path in new if "evil" in path.name or tmp_path / "two" not in [path, *path.parents]]
