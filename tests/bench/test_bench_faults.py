import pytest

from ali_dist.bench import faults, soak
from ali_dist.bench.nodes import wait_until
from ali_dist.recipe import UserError


def test_table_shows_medians_ranges_bars_and_losses(monkeypatch):
    monkeypatch.setattr(faults, "head", lambda result: "head")
    rows = [{"seconds": s, "updates_repeated": u, "images_lost": 0} for s, u in ((9.0, 4), (7.0, 12), (30.0, 8))]
    table = faults.table({"faults": {"worker killed": rows, "storage away": rows[:1]}})
    head, titles, line, barless = table.splitlines()
    assert line.split() == ["worker", "killed", "9.0", "(7.0-30.0)", "12", "8", "0"]
    assert barless.split() == ["storage", "away", "9.0", "(9.0-9.0)", "-", "4", "0"]
    assert titles.split()[-1] == "lost" and len(line) == len(titles)


@pytest.mark.parametrize(
    "flags, message",
    [
        (faults.Flags(repeats=0), "--repeats must be positive, not 0"),
        (faults.Flags(only=("worker kiled",)), "did you mean 'worker killed'"),
        (soak.Flags(faults=0), "--faults must be positive, not 0"),
    ],
)
def test_wrong_values_are_errors_before_anything_starts(flags, message):
    with pytest.raises(UserError, match=message):
        flags.run()


def test_waiting_ends_with_the_process_that_was_waited_for():
    with pytest.raises(TimeoutError):
        wait_until(lambda: False, 60, alive=lambda: False)
    with pytest.raises(TimeoutError):
        wait_until(lambda: False, 0.1)
    wait_until(lambda: True, 0)
