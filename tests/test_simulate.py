import json
import math
import random
import sys
from dataclasses import replace

import pytest

from ali_dist import cli
from ali_dist.data.stream import Stream
from ali_dist.describe import describe
from ali_dist.recipe import UserError
from ali_dist.simulate import (
    Assumptions,
    all_gather,
    all_reduce,
    busiest_share,
    check,
    live,
    main,
    simulate,
    update_seconds,
)
from ali_dist.tables import NETWORKS

ASSUMED = Assumptions(dataset="celeba", images_per_s=500.0, trials=20)


@pytest.mark.parametrize("batch, lanes, workers", [(10, 24, 3), (7, 6, 2), (25, 5, 5), (16, 12, 4)])
def test_the_busiest_share_is_that_of_real_streams(digits, batch, lanes, workers):
    most = 0
    for rank in range(workers):
        settings = {"seed": 0, "lanes": lanes, "micro_batch": batch, "rank": rank, "world": workers}
        with Stream(digits, "train", **settings) as stream:
            most = max(most, *(len(next(stream).rows) for _ in range(math.lcm(lanes, batch) // batch)))
    assert busiest_share(batch, lanes, workers) == most >= batch / workers


def test_collectives_cost_what_their_messages_do():
    assumed = replace(ASSUMED, local_gbit=8.0, network_gbit=4.0, latency_us=1000.0)  # 1 and 0.5 Gbyte a second
    assert all_reduce(assumed, 1, 1e9) == all_gather(assumed, 1, 1e9) == 0
    assert all_reduce(assumed, 2, 1e9) == pytest.approx(1 + 2e-3)
    assert all_reduce(assumed, 8, 1e9) == pytest.approx(2 * 7 / 8 + 14e-3)
    assert all_reduce(assumed, 16, 1e9) == pytest.approx(2 * 15 / 16 / 0.5 + 30e-3)  # two hosts
    assert all_reduce(assumed, 4096, 0) == pytest.approx(2 * 12e-3)  # a tree
    assert all_gather(assumed, 8, 1e6) == pytest.approx(7 * (1e-3 + 1e-3))


def test_an_update_is_computing_alone_on_one_worker():
    nets = check(ASSUMED)
    parts = update_seconds(ASSUMED, nets, 1)
    assert parts == {"compute": 16 / 500, "gradients": 0, "batch_norm": 0, "data_wait": 0}
    slow = update_seconds(replace(ASSUMED, read_gbyte=1e-4), nets, 2)
    assert sum(slow.values()) == pytest.approx(2 * 16 * math.prod(nets.image) / 1e5)  # the storage decides
    hidden, shown = (update_seconds(replace(ASSUMED, overlap=share), nets, 64)["gradients"] for share in (1, 0))
    assert hidden == 0 < shown


@pytest.mark.parametrize("interval", [50.0, 300.0, 3000.0])
def test_failures_cost_what_dalys_exact_model_says(interval):
    """Expected seconds for one interval of work: M exp(R / M) (exp((interval + save) / M) - 1)."""
    save, failures, restart = 10.0, 2000.0, 40.0
    expected = failures * math.exp(restart / failures) * math.expm1((interval + save) / failures)
    lives = [live(interval, save, failures, restart, 4e5, random.Random(seed)) for seed in range(100)]
    assert sum(life["kept"] for life in lives) / 100 == pytest.approx(interval / expected, rel=0.02)
    assert sum(life["restarts"] for life in lives) / 100 == pytest.approx(4e5 / failures, rel=0.03)
    # What is neither kept nor lost went to saving and restarting
    assert all(life["kept"] + life["lost_seconds"] / 4e5 < 1 for life in lives)


def test_without_failures_only_saving_costs():
    life = live(90.0, 10.0, 1e15, 60.0, 1e5, random.Random(0))
    assert life == {"kept": pytest.approx(0.9), "lost_seconds": 0, "restarts": 0}


def test_more_workers_are_faster_but_less_efficient_and_save_more_often():
    rows = [simulate(ASSUMED, workers) for workers in (1, 8, 64, 512)]
    for few, many in zip(rows, rows[1:], strict=False):
        assert few["efficiency"] > many["efficiency"] and few["images_per_s"] < many["images_per_s"]
        assert few["daly_interval_s"] > many["daly_interval_s"] and few["restarts"] <= many["restarts"]
    assert rows[0]["efficiency"] == pytest.approx(1, abs=0.01) and rows[0]["interval_s"] == 3600
    assert rows[0]["checkpoint_bytes"] == 16 * describe(NETWORKS["celeba"])["parameters"]
    assert simulate(ASSUMED, 64) == rows[2]  # the same seed draws the same failures


def test_the_interval_that_is_used_loses_less_than_others(monkeypatch):
    bad = replace(ASSUMED, hours_between_failures=500.0, write_gbyte=0.02, trials=100)
    best = simulate(bad, 64)
    assert best["interval_s"] == best["daly_interval_s"]
    for factor in (0.2, 5):
        monkeypatch.setattr("ali_dist.simulate.best_interval", lambda *_, f=factor: f * best["daly_interval_s"])
        assert simulate(bad, 64)["efficiency"] < best["efficiency"]


def test_the_command_prints_what_it_assumed(monkeypatch, capsys):
    words = ["simulate", "--dataset", "celeba", "--images-per-s", "500", "--workers", "1", "8", "--trials", "3"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    text = capsys.readouterr().out
    assert "latency_us 10.0" in text and "images_per_s 500.0" in text and len(text.splitlines()) == 6
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    main()
    tree = json.loads(capsys.readouterr().out)
    assert tree["assumptions"]["hours_between_failures"] == 50_000
    assert [row["workers"] for row in tree["simulated"]] == [1, 8]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--images-per-s 0", "--images-per-s must be positive, not 0.0"),
        ("--images-per-s 9 --workers 8 -1", "--workers must be positive, not 8 -1"),
        ("--images-per-s 9 --overlap 2", "--overlap must lie between 0 and 1, not 2.0"),
        ("--images-per-s 9 --dataset celebb", "did you mean 'celeba'"),
    ],
)
def test_wrong_values_are_one_line_and_code_2(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["simulate", "--dataset", "celeba", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1) and message in err


def test_no_failure_rate_is_refused():
    with pytest.raises(UserError, match="--hours-between-failures must be positive"):
        check(replace(ASSUMED, hours_between_failures=math.inf))
