import dataclasses
import json
import math

import pytest
from support import recipe

from ali_dist.recipe import Recipe, UserError
from ali_dist.recipes import CONDITIONAL, RECIPES, SEMI_SUPERVISED, find

POSITIVE = (
    "lr adam_eps batch_size accumulate ema_half_life num_images tick_images save_images keep sample_images "
    "validate_images validate_count lanes embedding_std max_sigma"
)


@pytest.mark.parametrize("name", POSITIVE.split())
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_what_must_be_positive_names_its_flag(name, value):
    with pytest.raises(UserError) as error:
        recipe(**{name: value})
    assert str(error.value) == f"--{name.replace('_', '-')} must be positive, not {value}"


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan])
def test_betas_lie_between_0_and_1(name, value):
    with pytest.raises(UserError, match=f"^--{name} must be at least 0 and below 1, not {value}$"):
        recipe(**{name: value})
    assert getattr(recipe(**{name: 0}).optim, name) == 0


def test_seed_must_not_be_negative():
    with pytest.raises(UserError, match="^--seed must not be negative, not -1$"):
        recipe(seed=-1)


def test_micro_batches_have_the_same_size():
    assert recipe(batch_size=12, accumulate=3).micro_batch == 4
    with pytest.raises(UserError, match="^--batch-size 10 is not a multiple of --accumulate 4: .*same size$"):
        recipe(batch_size=10, accumulate=4)


@pytest.mark.parametrize("table", [RECIPES, CONDITIONAL, SEMI_SUPERVISED])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_json_round_trip(name, table):
    mine = dataclasses.replace(table.get(name, RECIPES[name]), seed=7)
    assert Recipe.from_json(json.loads(json.dumps(mine.to_json()))) == mine


def test_json_with_missing_unknown_or_wrong_fields_is_refused():
    tree = recipe().to_json()
    missing = {k: v for k, v in tree.items() if k != "optim"}
    unknown = {**tree, "optim": {**tree["optim"], "momentum": 1}}
    wrong = {**tree, "lanes": "many"}
    for bad in (missing, unknown, wrong, []):
        with pytest.raises(UserError, match="^not a recipe of this version"):
            Recipe.from_json(bad)
    with pytest.raises(UserError, match="--lanes must be positive"):
        Recipe.from_json({**tree, "lanes": 0})


def test_differences_name_flags_and_both_values():
    mine, theirs = recipe(), recipe(lr=1e-3, batch_size=16, seed=3, precision="bf16")
    assert sorted(mine.differences(theirs)) == [
        "--batch-size: 8 -> 16",
        "--lr: 0.0003 -> 0.001",
        "--precision: fp32 -> bf16",
        "--seed: 0 -> 3",
    ]


def test_differences_ignore_the_schedule():
    schedule = {f.name: 77 for f in dataclasses.fields(recipe().schedule)}
    assert recipe().differences(recipe(**schedule)) == []


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().seed = 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": -1}, "--labels must not be negative, not -1"),
        ({"feature_matching": True}, "--feature-matching and --supervised-only are for semi-supervised training"),
        ({"supervised_only": True}, "are for semi-supervised training: give --labels"),
        ({"labels": 10, "supervised_only": True, "feature_matching": True}, "exclude each other"),
        ({"labels": 10, "labelled_batch": 8}, "--labelled-batch must be positive and below --batch-size, not 8"),
        ({"labels": 10, "labelled_batch": 0}, "--labelled-batch must be positive and below --batch-size, not 0"),
        ({"labels": 10, "labelled_batch": 3, "accumulate": 2}, "--labelled-batch 3 is not a multiple of --accumulate"),
    ],
)
def test_semi_supervised_fields_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_validation_is_never_on_training_images():
    assert recipe().valid_split == "valid"
    assert SEMI_SUPERVISED["svhn"].train_split == "valid" and SEMI_SUPERVISED["svhn"].valid_split == "train"


def test_share_of_labelled_images():
    assert recipe().labelled_share == 0
    assert recipe(labels=10, labelled_batch=2).labelled_share == 0.25
    assert recipe(labels=10, supervised_only=True).labelled_share == 1  # whatever --labelled-batch says


def test_recipes_of_earlier_versions_are_read():
    tree = recipe().to_json()
    for later in ("semi", "train_split", "embedding_std", "train_embedding", "max_sigma"):
        del tree[later]
    assert Recipe.from_json(tree) == recipe()


def test_find_says_what_there_is():
    assert find("cifar10") is RECIPES["cifar10"]
    assert find("cifar10", conditional=True).networks == "cifar10-conditional"
    assert find("cifar10", labels=True).semi.labels == 1_000
    for words, message in (
        ({"dataset": "cifar"}, "did you mean 'cifar10'"),
        ({"dataset": "folder", "conditional": True}, "--conditional is for celeba, .*no such networks for folder"),
        ({"dataset": "celeba", "labels": True}, "--labels is for cifar10, digits, svhn: .*no such networks for celeba"),
        ({"dataset": "cifar10", "labels": True, "conditional": True}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=message):
            find(**words)
