import pytest
import torch
from support import Ranks, assert_same, copies, recipe

from ali_dist.data.index import Index, load_index
from ali_dist.data.stream import Stream, validation
from ali_dist.losses import per_image_losses
from ali_dist.state import TrainState
from ali_dist.step import step
from ali_dist.watch import Grids, class_errors, validate

CPU = torch.device("cpu")


def started(index: Index, updates: int = 2, watch: bool = False, **changes) -> TrainState:
    """A state after a few updates, with or without a look at it after each."""
    settings = recipe(**{"validate_count": 50, **changes})
    state = TrainState(settings, index.mean_image, CPU)
    grids = Grids(index, state) if watch else None
    with Stream(index, "train", seed=0, lanes=24, micro_batch=settings.micro_batch) as stream:
        for _ in range(updates):
            step(state, [next(stream)])
            if watch:
                grids.draw(state)
                validate(state, index)
    return state


def cells(sheet: torch.Tensor) -> torch.Tensor:
    """[C, 8 * 32, 8 * 32] -> [row, column, C, 32, 32]."""
    return sheet.unflatten(1, (8, 32)).unflatten(3, (8, 32)).permute(1, 3, 0, 2, 4)


def test_reconstructions_hold_originals_in_the_odd_columns(digits):
    state = started(digits)
    pairs = cells(Grids(digits, state).draw(state)["reconstructions"])
    originals = next(validation(digits, "valid", count=32, batch_size=32)).x
    assert torch.equal(pairs[:, 0::2].flatten(0, 1), originals)  # columns 1, 3, 5 and 7 as people count
    assert not torch.equal(pairs[:, 1::2].flatten(0, 1), originals)


def test_grids_are_of_the_averaged_weights_and_always_of_the_same_codes(digits):
    state = started(digits)
    first = Grids(digits, state).draw(state)
    for parameter in state.model.parameters():
        parameter.data.zero_()
    again = Grids(digits, state).draw(state)
    assert_same(first, again)
    with torch.no_grad():
        state.averaged.decoder[-1].bias.fill_(50)
    changed = Grids(digits, state).draw(state)
    assert (changed["samples"] == 255).all() and not (first["samples"] == 255).all()
    assert (cells(changed["reconstructions"])[:, 1::2] == 255).all()


def test_samples_differ_and_depend_on_the_seed(digits):
    state = started(digits)
    with torch.no_grad():
        for parameter in state.averaged.decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    sheet = Grids(digits, state).draw(state)["samples"]
    assert len({bytes(cell.numpy().tobytes()) for cell in cells(sheet).flatten(0, 1)}) == 64
    other = Grids(digits, TrainState(recipe(seed=1), digits.mean_image, CPU)).draw(state)["samples"]
    assert not torch.equal(sheet, other)


def test_watching_leaves_training_bit_identical(digits):
    plain, watched = started(digits, 4), started(digits, 4, watch=True)
    assert_same(plain.tensors(), watched.tensors())
    assert watched.model.training and not watched.averaged.training


def test_validation_uses_population_statistics_current_weights_and_no_dropout(digits):
    state = started(digits)
    before = copies(state.tensors())
    numbers = validate(state, digits)
    assert numbers == validate(state, digits)
    assert_same(before, state.tensors())
    state.averaged.decoder[-1].bias.fill_(50)
    assert validate(state, digits) == numbers
    # The smallest encoder statistic, by hand
    images = next(validation(digits, "valid", count=50, batch_size=50)).x
    with torch.no_grad():
        mu, log_sigma = state.model.eval().encode(images.float() / 255)
    assert numbers["valid/mu/mean"] == pytest.approx(mu.double().mean().item(), rel=1e-4, abs=1e-8)
    assert numbers["valid/mu/std"] == pytest.approx(mu.double().std(correction=0).item(), rel=1e-4)
    assert numbers["valid/sigma/max"] == pytest.approx(log_sigma.exp().max().item(), rel=1e-5)


def test_validation_reads_as_many_images_as_asked(digits):
    state = started(digits, validate_count=20)
    state.model.discriminator.joint[-1].weight.data.zero_()  # every logit is the bias
    state.model.discriminator.joint[-1].bias.data.fill_(0.75)
    seen = []
    state.model.encoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    numbers = validate(state, digits)
    assert seen == [8, 8, 4]
    loss_d, loss_g = per_image_losses(*torch.full((2, 1), 0.75, dtype=torch.float64))
    assert numbers["valid/loss/d"] == pytest.approx(loss_d.item(), rel=1e-6)
    assert numbers["valid/loss/g"] == pytest.approx(loss_g.item(), rel=1e-6)


@pytest.mark.parametrize("matching", [False, True])
def test_validation_losses_of_a_d_that_tells_classes_apart(digits, matching):
    semi = {"labels": 10, "labelled_batch": 4, "feature_matching": matching}
    state = started(digits, networks="small-classes", validate_count=20, **semi)
    values = torch.linspace(-1, 1, 10, dtype=torch.float64)  # every logit is the bias
    state.model.discriminator.joint[-1].weight.data.zero_()
    state.model.discriminator.joint[-1].bias.data.copy_(values.view_as(state.model.discriminator.joint[-1].bias))
    numbers = validate(state, digits)
    p = torch.cat([values, torch.zeros(1)]).softmax(0)
    y = next(validation(digits, "valid", count=20, batch_size=20)).y
    labelled, generated = -p[y].log().mean().item(), p[-1].log().item()
    assert numbers["valid/loss/labelled"] == pytest.approx(labelled, rel=1e-6)
    expected = labelled - torch.log(1 - p[-1]).item() - generated
    assert numbers["valid/loss/d"] == pytest.approx(expected, rel=1e-6)
    assert numbers.get("valid/loss/g") == (None if matching else pytest.approx(expected - labelled, rel=1e-6))


def validate_on(rank: int, data) -> dict[str, float]:
    index = load_index(data, "digits")
    return validate(TrainState(recipe(validate_count=33), index.mean_image, CPU), index)


@pytest.mark.parametrize("world", [2, 3])
def test_validation_is_the_same_for_any_number_of_ranks(ranks: Ranks, data, world):
    alone = validate_on(0, data)
    together = ranks.run(world, validate_on, data)  # of the last batch's single row, the others have none
    assert all(numbers == together[0] for numbers in together)
    assert alone.keys() == together[0].keys()
    assert "valid/loss/d" in alone and "valid/x_tilde/std" in alone
    for name in alone:
        assert alone[name] == pytest.approx(together[0][name], rel=1e-5, abs=1e-7), name


def test_class_errors_are_those_of_d_on_all_test_images(digits):
    state = TrainState(recipe(networks="small-classes", labels=10, labelled_batch=4), digits.mean_image, CPU)
    for net, shift in ((state.model, 0), (state.averaged, 5)):  # so that each always says one class, not the same
        with torch.no_grad():
            net.discriminator.joint[-1].bias[shift] += 100
    before = copies(state.tensors())
    numbers = class_errors(state, digits)
    y = next(validation(digits, "valid", count=360, batch_size=360)).y
    assert numbers["test/error_raw"] == pytest.approx((y != 0).double().mean().item())
    assert numbers["test/error"] == pytest.approx((y != 5).double().mean().item())
    assert_same(before, state.tensors())
    assert state.model.training and not state.averaged.training


def classes_on(rank: int, data) -> dict[str, float]:
    index = load_index(data, "digits")
    settings = recipe(networks="small-classes", validate_count=33, labels=10, labelled_batch=4, batch_size=7)
    state = TrainState(settings, index.mean_image, CPU)
    with torch.no_grad():
        for net in (state.model, state.averaged):
            net.discriminator.joint[-1].weight.mul_(1e4)
    return class_errors(state, index) | validate(state, index)


def test_class_errors_are_the_same_for_any_number_of_ranks(ranks: Ranks, data):
    alone = classes_on(0, data)
    together = ranks.run(3, classes_on, data)  # the last batches have fewer rows than ranks
    assert all(numbers == together[0] for numbers in together)
    assert {"test/error", "test/error_raw", "valid/error/labelled", "valid/loss/labelled"} <= alone.keys()
    for name in alone:
        assert alone[name] == pytest.approx(together[0][name], rel=1e-4, abs=5e-3), name


def test_training_on_the_validation_split_is_judged_on_the_other(digits):
    state = TrainState(recipe(train_split="valid", validate_count=50), digits.mean_image, CPU)
    seen = []
    hook = state.model.encoder.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    validate(state, digits)
    hook.remove()
    expected = next(validation(digits, "train", count=50, batch_size=50)).x
    assert torch.equal(torch.cat(seen).mul(255).round().to(torch.uint8), expected)
    originals = cells(Grids(digits, state).draw(state)["reconstructions"])[:, 0::2].flatten(0, 1)
    assert torch.equal(originals, expected[:32])
