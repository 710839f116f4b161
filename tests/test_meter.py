import json
import math

import numpy as np
import pytest
import torch
from support import Ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ali_dist.meter import Meter, Sinks, read_ticks

CPU = torch.device("cpu")


def reports(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "loss/d": torch.randn(3 + i, generator=generator),
            "mu": 5 + torch.randn(4, 2 + i, generator=generator),
            "grad_norm/encoder": torch.rand((), generator=generator),
        }
        for i in range(count)
    ]


def assert_moments(collected: dict[str, float], all_reports: list[dict[str, torch.Tensor]]) -> None:
    values = {name: np.concatenate([r[name].double().numpy().ravel() for r in all_reports]) for name in all_reports[0]}
    mu = values["mu"]
    expected = {
        "loss/d": values["loss/d"].mean(),
        "grad_norm/encoder": values["grad_norm/encoder"].mean(),
        "mu/mean": mu.mean(),
        "mu/std": mu.std(),
        "mu/min": mu.min(),
        "mu/max": mu.max(),
    }
    assert collected.keys() == expected.keys()
    for name, value in expected.items():
        assert collected[name] == pytest.approx(value, rel=1e-12, abs=1e-13), name


def test_moments_over_several_reports():
    meter = Meter(CPU)
    for report in reports(4):
        meter.report(report)
    assert_moments(meter.collect(), reports(4))


def test_collect_forgets():
    meter = Meter(CPU)
    meter.report(reports(1)[0])
    meter.collect()
    assert meter.collect() == {}
    meter.report(reports(1, seed=1)[0])
    assert_moments(meter.collect(), reports(1, seed=1))


def test_empty_reports_count_nothing():
    meter = Meter(CPU)
    meter.report({"mu": torch.empty(0), "loss/d": torch.empty(0)})
    meter.report({"mu": torch.tensor([2.0, 4.0])})
    out = meter.collect()
    assert math.isnan(out.pop("loss/d"))
    assert out == {"mu/mean": 3, "mu/std": 1, "mu/min": 2, "mu/max": 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_exact_in_low_precision(dtype):
    meter, value = Meter(CPU), torch.tensor(0.1, dtype=dtype)
    for _ in range(1000):
        meter.report({"loss/d": value})
    assert meter.collect()["loss/d"] == pytest.approx(value.double().item(), rel=1e-12)


def test_nan_shows():
    meter = Meter(CPU)
    meter.report({"loss/d": torch.tensor([1.0, math.nan]), "mu": torch.tensor([1.0, math.nan])})
    assert all(math.isnan(value) for value in meter.collect().values())


def collect_on(rank: int) -> dict[str, float]:
    meter = Meter(CPU)
    for report in reports(2 + rank, seed=rank):
        meter.report(report)
    return meter.collect()


def test_moments_over_ranks(ranks: Ranks):
    first, second = ranks.run(2, collect_on)
    assert first == second
    assert_moments(first, reports(2, seed=0) + reports(3, seed=1))


def sinks(tmp_path, num_images=0) -> Sinks:
    return Sinks(tmp_path / "ticks.jsonl", tmp_path / "tb", num_images)


def tensorboard(tmp_path) -> EventAccumulator:
    return EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0, "images": 0}).Reload()


def assert_tensorboard_equals(ticks, tmp_path) -> None:
    events = tensorboard(tmp_path)
    names = {name for tick in ticks for name in tick} - {"num_images", "time"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        expected = [(tick["num_images"], tick[name]) for tick in ticks if name in tick]
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_ticks_and_tensorboard_hold_the_same(tmp_path):
    out = sinks(tmp_path)
    out.scalars({"loss/d": 1.25, "mu/std": 0.1}, 100)
    out.scalars({"loss/d": 1.5, "mu/std": 0.2}, 200)
    out.scalars({"valid/loss/d": 1.75}, 200)
    out.close()
    ticks = read_ticks(tmp_path / "ticks.jsonl")
    assert [{k: v for k, v in tick.items() if k != "time"} for tick in ticks] == [
        {"num_images": 100, "loss/d": 1.25, "mu/std": 0.1},
        {"num_images": 200, "loss/d": 1.5, "mu/std": 0.2},
        {"num_images": 200, "valid/loss/d": 1.75},
    ]
    assert_tensorboard_equals(ticks, tmp_path)


def test_images_and_text_reach_tensorboard(tmp_path):
    out, pixels = sinks(tmp_path), torch.randint(0, 256, (1, 4, 6), dtype=torch.uint8)
    out.image("samples", pixels, 30)
    out.text("recipe", "batch_size")
    out.close()
    events = tensorboard(tmp_path)
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (30, 6, 4)
    (text,) = events.Tensors("recipe/text_summary")
    assert b"batch_size" in text.tensor_proto.string_val[0]


def test_nan_and_infinity_are_null_in_jsonl(tmp_path):
    out = sinks(tmp_path)
    out.scalars({"loss/d": math.nan, "loss/g": math.inf, "mu/min": -math.inf, "mu/max": 1.0}, 10)
    out.close()
    (line,) = (tmp_path / "ticks.jsonl").read_text().splitlines()
    tick = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (tick["loss/d"], tick["loss/g"], tick["mu/min"], tick["mu/max"]) == (None, None, None, 1.0)
    assert math.isnan(tensorboard(tmp_path).Scalars("loss/d")[0].value)


def test_continuing_drops_what_came_after_the_checkpoint(tmp_path):
    out = sinks(tmp_path)
    for num_images in (100, 200, 300):
        out.scalars({"loss/d": num_images / 100}, num_images)
    out.close()
    out = sinks(tmp_path, num_images=200)
    out.scalars({"loss/d": 33.0}, 310)
    out.close()
    ticks = read_ticks(tmp_path / "ticks.jsonl")
    assert [(tick["num_images"], tick["loss/d"]) for tick in ticks] == [(100, 1), (200, 2), (310, 33)]
    assert_tensorboard_equals(ticks, tmp_path)


def test_a_new_run_starts_with_no_ticks(tmp_path):
    (tmp_path / "ticks.jsonl").write_text('{"num_images": 50, "time": 0, "loss/d": 1}\n')
    sinks(tmp_path).close()
    assert read_ticks(tmp_path / "ticks.jsonl") == []


def test_a_half_written_last_line_is_left_out_and_mended(tmp_path):
    path = tmp_path / "ticks.jsonl"
    whole = '{"num_images": 100, "time": 0.5, "loss/d": 1.0}\n'
    path.write_text(whole + '{"num_images": 200, "time": 0.6, "lo')
    assert read_ticks(path) == [json.loads(whole)]
    out = sinks(tmp_path, num_images=200)
    out.scalars({"loss/d": 2.0}, 300)
    out.close()
    assert [json.loads(line)["num_images"] for line in path.read_text().splitlines()] == [100, 300]


def test_no_ticks_yet(tmp_path):
    assert read_ticks(tmp_path / "ticks.jsonl") == []
