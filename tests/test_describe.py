import json
import sys

import pytest

from ali_dist import cli
from ali_dist.describe import main
from ali_dist.recipes import RECIPES

NAMES = ["encoder", "decoder", "discriminator_x", "discriminator_z", "discriminator_joint"]


@pytest.fixture
def describe(monkeypatch, capsys):
    def call(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["describe", *argv])
        main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("dataset", sorted(RECIPES))
def test_json_structure_and_totals(describe, dataset):
    tree = json.loads(describe("--dataset", dataset, "--json"))
    assert list(tree["networks"]) == NAMES
    for network in tree["networks"].values():
        for key in ("parameters", "flops"):
            assert network[key] == sum(layer[key] for layer in network["layers"]) > 0
    for key in ("parameters", "flops"):
        assert tree[key] == sum(network[key] for network in tree["networks"].values())
    assert tree["networks"]["decoder"]["layers"][-1]["shape"] == tree["networks"]["encoder"]["input"] == tree["image"]
    assert tree["networks"]["discriminator_joint"]["layers"][-1]["shape"] == [1, 1, 1]


def test_layers_of_svhn(describe):
    networks = json.loads(describe("--dataset", "svhn", "--json"))["networks"]
    assert networks["encoder"]["layers"][1] == {
        "layer": "4/2/64",
        "embedding": 0,
        "shape": [64, 13, 13],
        "batch_norm": True,
        "bias": "none",
        "dropout": 0.0,
        "activation": "lrelu",
        "parameters": 4 * 4 * 32 * 64 + 2 * 64,
        "flops": 2 * 4 * 4 * 32 * 64 * 13 * 13,
    }
    transposed, last = networks["decoder"]["layers"][1], networks["decoder"]["layers"][-1]
    assert (transposed["layer"], transposed["shape"]) == ("T4/2/128", [128, 10, 10])
    assert transposed["flops"] == 2 * 4 * 4 * 256 * 128 * 4 * 4
    assert (last["bias"], last["activation"], last["parameters"]) == ("pixel", "sigmoid", 32 * 3 + 3 * 32 * 32)
    assert networks["discriminator_joint"]["input"] == [1024, 1, 1]


def test_text_has_each_network_and_its_parameters(describe):
    text = describe("--dataset", "cifar10")
    for name, parameters in zip(NAMES, ("3,118,496", "981,152", "1,396,032", "163,840", "1,051,137"), strict=True):
        table = text[text.index(f"{name}  input") :].split("\n\n")[0]
        assert table.splitlines()[-1].split()[:2] == ["total", parameters]
    assert "6,710,657 parameters" in text
    assert "maxout" in text and "pixel" in text


def test_conditional_networks_say_where_the_embedding_lies(describe):
    text = describe("--dataset", "celeba", "--conditional")
    for layer in ("1/1/512       +256", "T4/1/512      +256", "1/1/2048      +256"):
        assert layer in text
    assert "embedding  input 40x1x1" in text and "10,496" in text
    networks = json.loads(describe("--dataset", "cifar10", "--conditional", "--json"))["networks"]
    assert [*networks] == ["embedding", *NAMES]
    assert networks["embedding"]["parameters"] == 10 * 64 + 64
    assert networks["decoder"]["layers"][0]["parameters"] == 4 * 4 * (64 + 64) * 256 + 2 * 256


def test_a_data_set_without_labelled_networks_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["describe", "--dataset", "folder", "--conditional"])
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == 2 and "--conditional is for celeba, cifar10, digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, expected", [("cifar", "did you mean 'cifar10'"), ("zzz", "known: celeba, cifar10, digits")]
)
def test_unknown_name_is_one_line_and_code_2(monkeypatch, capsys, name, expected):
    monkeypatch.setattr(sys, "argv", ["describe", "--dataset", name])
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"unknown data set {name!r}" in err and expected in err
