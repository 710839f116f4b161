"""The figures cell by cell, and the command that draws them."""

import dataclasses
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from support import recipe

from ali_dist import checkpoint, figures
from ali_dist.data.stream import validation
from ali_dist.model import load
from ali_dist.nets import ALI
from ali_dist.pictures import GAP, labelled, to_uint8
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder
from ali_dist.state import TrainState
from ali_dist.tables import NETWORKS, conditional
from ali_dist.views import FIGURES, Fixed, fixed, people, shown

CPU = torch.device("cpu")
ATTRIBUTES = (
    "Attractive Bald Bangs Black_Hair Blond_Hair Brown_Hair Eyeglasses Male Mouth_Slightly_Open Receding_Hairline "
    "Smiling Wavy_Hair Wearing_Hat Young"
).split()


def network(name: str = "small") -> ALI:
    """With weights that make every code and label show."""
    net = ALI(NETWORKS[name])
    net.reset_parameters(torch.full(net.nets.image, 0.5))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        if net.embedding is not None:
            net.embedding.weight.mul_(300)
    return net.eval()


@pytest.fixture(scope="module")
def given(digits) -> Fixed:
    return fixed(digits, recipe(), 4, CPU)


@torch.no_grad()
def cells(name: str, net: ALI, given: Fixed) -> torch.Tensor:
    return FIGURES[name](net, given).cells


def close(mine, theirs) -> bool:
    """Batches of other sizes round otherwise."""
    return mine.shape == theirs.shape and (mine.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["small", "small-conditional"])
def test_samples_decode_the_prior_draws_row_by_row(given, name):
    net = network(name)
    found = cells("samples", net, given)
    assert found.shape == (8, 8, 1, 32, 32)
    for i in range(64):
        with torch.no_grad():
            one = to_uint8(net.decode(given.z[i : i + 1], given.y[i : i + 1]))[0]
        assert close(found[i // 8, i % 8], one)
    assert len({found[i // 8, i % 8].numpy().tobytes() for i in range(64)}) == 64


@pytest.mark.parametrize("name", ["small", "small-conditional"])
def test_reconstructions_stand_right_of_their_originals(digits, given, name):
    net = network(name)
    found = cells("reconstructions", net, given)
    originals = next(validation(digits, "valid", count=32, batch_size=32))
    assert found.shape == (8, 8, 1, 32, 32)
    assert torch.equal(found[:, 0::2].flatten(0, 1), originals.x)
    with torch.no_grad():
        mu, log_sigma = net.encode(originals.x.float() / 255, originals.y)
        x_tilde = net.decode(mu + log_sigma.exp() * given.eps[:32], originals.y)
    assert close(found[:, 1::2].flatten(0, 1), to_uint8(x_tilde))


@pytest.mark.parametrize("name", ["small", "small-conditional"])
def test_interpolations_run_between_originals(digits, given, name):
    net = network(name)
    found = cells("interpolations", net, given)
    batch = next(validation(digits, "valid", count=20, batch_size=20))
    assert found.shape == (10, 13, 1, 32, 32)
    assert torch.equal(found[:, 0], batch.x[0::2]) and torch.equal(found[:, -1], batch.x[1::2])
    with torch.no_grad():
        mu, log_sigma = net.encode(batch.x.float() / 255, batch.y)
        z = mu + log_sigma.exp() * given.eps[:20]
        one_hot = torch.nn.functional.one_hot(batch.y, 10).float()
        for step in range(11):
            t = step / 10
            z_t, y_t = (v[0::2] * (1 - t) + v[1::2] * t for v in (z, one_hot))
            assert close(found[:, 1 + step], to_uint8(net.decode(z_t, y_t)))
    columns = FIGURES["interpolations"](net, given).columns
    assert (columns[0], columns[1], columns[6], columns[11], columns[12]) == ("x1", "0.0", "0.5", "1.0", "x2")


def test_classes_stand_in_columns_and_codes_in_rows(digits, given):
    net = network("small-conditional")
    view = FIGURES["conditional"](net, given)
    assert view.cells.shape == (8, 10, 1, 32, 32)
    for i in (0, 3, 7):
        for j in (0, 4, 9):
            with torch.no_grad():
                one = to_uint8(net.decode(given.z[i : i + 1], torch.tensor([j])))[0]
            assert close(view.cells[i, j], one)
    assert view.columns == tuple("abcdefghij") and view.legend[3] == "d: 3" and view.rows[7] == "z8"
    few = FIGURES["conditional"](net, given._replace(classes=digits.classes[:3]))
    assert torch.equal(few.cells, view.cells[:, :3])


PAPER = {  # columns a to l of the paper's figure
    **{"a": "", "b": "Black_Hair", "c": "Brown_Hair", "d": "Blond_Hair", "e": "Black_Hair Wavy_Hair"},
    **{"f": "Blond_Hair Bangs", "g": "Blond_Hair Receding_Hairline", "h": "Blond_Hair Bald"},
    **{"i": "Black_Hair Smiling", "j": "Black_Hair Smiling Mouth_Slightly_Open"},
    "k": "Black_Hair Smiling Mouth_Slightly_Open Eyeglasses",
    "l": "Black_Hair Smiling Mouth_Slightly_Open Eyeglasses Wearing_Hat",
}


def test_the_papers_sequence_of_attributes(given):
    nets = NETWORKS["small-faces"] = conditional(NETWORKS["small"], len(ATTRIBUTES))
    faces = given._replace(classes=(), attributes=tuple(ATTRIBUTES), y=torch.zeros(64, nets.labels, dtype=torch.uint8))
    net = network("small-faces")
    view = FIGURES["conditional"](net, faces)
    assert view.cells.shape == (4, 12, 1, 32, 32) and view.columns == tuple(PAPER)
    _, _, y = people(faces)
    for i, constant in enumerate(("Male Attractive Young", "Male Attractive", "Attractive Young", "Attractive")):
        for j, added in enumerate(PAPER.values()):
            on = {name for name, value in zip(ATTRIBUTES, y[i, j], strict=True) if value}
            assert on == {*constant.split(), *added.split()}
            with torch.no_grad():  # all from one z
                assert close(view.cells[i, j], to_uint8(net.decode(given.z[:1], y[i, j][None]))[0])
    del NETWORKS["small-faces"]


def test_what_a_model_can_show(given):
    everything = ["samples", "reconstructions", "interpolations", "conditional"]
    assert shown(network("small"), given) == everything[:3]
    assert shown(network("small-conditional"), given) == everything
    others = given._replace(classes=(), attributes=("Hat", "Coat", "Bag"), y=torch.zeros(64, 3, dtype=torch.uint8))
    assert shown(network("small-attributes"), others) == everything[:3]
    with pytest.raises(UserError, match="no attribute Male"):
        FIGURES["conditional"](network("small-attributes"), others)
    alone = given._replace(x=given.x[:1], y=given.y[:1])
    assert shown(network("small"), alone) == everything[:2]
    with torch.no_grad():
        assert FIGURES["samples"](network("small"), alone).cells.shape == (8, 8, 1, 32, 32)
        assert FIGURES["reconstructions"](network("small"), alone).cells.shape == (1, 8, 1, 32, 32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits) -> dict[str, RunFolder]:
    """A run with one checkpoint of each kind of networks."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name in ("small", "small-conditional"):
        made[name] = RunFolder(folder / name)
        state = TrainState(recipe(networks=name), digits.mean_image, CPU)
        state.averaged.load_state_dict(network(name).state_dict())
        state.num_images = 1208
        made[name].claim(state.recipe, "auto")
        checkpoint.save(made[name], state)
    return made


@pytest.fixture
def command(run_command, data):
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(flags: str, folder=data):
        return run_command(figures.main, ["figures", *shlex.split(flags), "--data", str(folder)])

    return run


def test_the_command_draws_all_and_every_pixel_is_the_models(command, runs, given, tmp_path):
    run = runs["small-conditional"]
    code, out, err = command(f"{run.root} --out {tmp_path / 'new' / 'folder'}")
    assert code == 0, err
    names = [f"{name}-000000001208-labelled.png" for name in FIGURES]
    assert [line.rpartition("/")[2] for line in out.splitlines()] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    net = load(run.root).net
    for name, file in zip(FIGURES, names, strict=True):
        with torch.no_grad():
            view = FIGURES[name](net, given)
        title = f"{name}, digits, 1,208 images, averaged weights"
        expected, _ = labelled(view.cells, title, view.rows, view.columns, view.legend)
        read = np.asarray(Image.open(tmp_path / "new" / "folder" / file))
        assert np.array_equal(read, expected.permute(1, 2, 0).numpy()), name


def test_figures_lie_beside_those_of_training_and_scale_exactly(command, runs):
    run = runs["small"]
    code, out, err = command(f"{run.root} --figures samples --scale 2 --weights raw")
    assert code == 0, err
    assert out == f"{run.figures / 'samples-000000001208-labelled.png'}\n"
    read = torch.from_numpy(np.array(Image.open(out.strip()))).permute(2, 0, 1)
    _, (top, left) = labelled(torch.zeros(8, 8, 1, 64, 64, dtype=torch.uint8), "title")
    first = read[:, top : top + 64, left : left + 64]
    assert torch.equal(first[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2), first)
    assert (read[:, top : top + 64, left + 64 : left + 64 + GAP] == 255).all()


def test_dry_run_draws_nothing(command, runs, tmp_path):
    code, out, _ = command(f"small --storage {runs['small'].root.parent} --dry-run --out {tmp_path / 'none'}")
    assert code == 0 and out.startswith("samples, reconstructions, interpolations of ")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("{small} --figures sample", "unknown figure 'sample': did you mean 'samples'?"),
        ("{small} --figures samples,conditional", "is unconditional: the conditional figure is of a run trained with"),
        ("{small} --scale 0", "--scale must be at least 1, not 0"),
        ("{small}/none", "no checkpoint at"),
        ("{small} --figures samples --out {small}/recipe.json", "can't write to"),
    ],
)
def test_bad_input_is_one_line(command, runs, flags, complaint):
    code, _, err = command(flags.format(small=runs["small"].root))
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and complaint in err


def test_a_data_set_with_other_classes_is_named(command, runs, digits, monkeypatch):
    other = dataclasses.replace(digits, classes=digits.classes[:7])
    monkeypatch.setattr(figures, "load_index", lambda *_: other)
    code, _, err = command(f"{runs['small-conditional'].root}")
    assert code == 2 and "has 7 classes, but networks small-conditional take 10" in err
