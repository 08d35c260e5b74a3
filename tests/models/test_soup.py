"""Model soups: the mean of the weights of checkpoints, tensor by tensor, or what does not fit."""

import pytest
import torch

from asl.errors import DataError, UsageError
from asl.models import checkpoint, create_model
from asl.models.soup import soup
from asl.models.weights import load_weights

NAMES = {0: "cat", 1: "dog", 2: "cow"}
CONFIG = {"model_name": "test_resnet", "head": "linear", "image_size": 48}


def state(seed):
    torch.manual_seed(seed)
    model = create_model("test_resnet", 3)
    for name, buffer in model.named_buffers():
        buffer.copy_(seed + 1 if name.endswith("tracked") else torch.rand_like(buffer))
    return model.state_dict()


def write(path, *seeds, best="ema", **parts):
    """A checkpoint with an averaged and a regular set of weights, or with one set."""
    sets = {"model": state(seeds[0])}
    if len(seeds) == 2:
        sets = {"ema": state(seeds[0]), "regular": state(seeds[1]), "best": best}
    about = {"num_classes": 3, "idx_to_class": NAMES, "config": CONFIG, "epoch": 7}
    checkpoint.save(path, {**sets, **about, **parts})
    return path


def assert_mean(made, *states):
    assert made.keys() == states[0].keys()
    for name, tensor in made.items():
        if tensor.is_floating_point():
            mean = sum(each[name] for each in states) / len(states)
            torch.testing.assert_close(tensor, mean)
        else:
            assert torch.equal(tensor, states[0][name])


def test_a_soup_of_the_same_checkpoint_is_that_checkpoint(tmp_path):
    path = write(tmp_path / "a.pt", 0, 1)
    made, own = soup([path] * 3), checkpoint.load(path)
    for which in ("ema", "regular"):
        assert all(torch.equal(made[which][name], own[which][name]) for name in own[which])
    assert made["best"] == "ema"


def test_each_set_is_the_mean_of_those_of_the_parents(tmp_path):
    paths = [write(tmp_path / "a.pt", 0, 1), write(tmp_path / "b.pt", 2, 3)]
    checkpoint.save(tmp_path / "soup.pt", soup(paths))
    made = checkpoint.load(tmp_path / "soup.pt")
    assert_mean(made["ema"], state(0), state(2))
    assert_mean(made["regular"], state(1), state(3))
    assert made["ema"]["bn1.num_batches_tracked"] == 1
    assert (made["idx_to_class"], made["config"], made["num_classes"]) == (NAMES, CONFIG, 3)
    assert made["parents"] == [str(path) for path in paths]
    assert "epoch" not in made
    load_weights(create_model("test_resnet", 3), tmp_path / "soup.pt", fresh_head=False)


@pytest.mark.parametrize(
    ("bests", "best"), [(("regular",) * 2, "regular"), (("regular", "ema"), "ema")]
)
def test_the_best_set_is_that_of_all_or_the_averaged_one(bests, best, tmp_path):
    paths = [write(tmp_path / f"{n}.pt", n, n + 2, best=each) for n, each in enumerate(bests)]
    assert soup(paths)["best"] == best


def test_a_file_with_one_set_meets_the_best_of_the_other(tmp_path):
    paths = [write(tmp_path / "a.pt", 0, 1, best="regular"), write(tmp_path / "b.pt", 2)]
    made = soup(paths)
    assert_mean(made["model"], state(1), state(2))
    assert not made.keys() & {"ema", "regular", "best"}


def without(name):
    return {key: tensor for key, tensor in state(1).items() if key != name}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"idx_to_class": {**NAMES, 1: "fox"}}, "class 1 is fox there, dog here"),
        ({"idx_to_class": {0: "cat", 1: "dog"}}, "class 2 is missing there, cow here"),
        ({"config": {**CONFIG, "model_name": "test_vit"}}, "model_name is test_vit there, test_re"),
        ({"config": {**CONFIG, "head": "bottleneck"}}, "head is bottleneck there, linear here"),
        ({"model": without("bn1.weight")}, "bn1.weight is missing there, .32,. here"),
        ({"model": {**state(1), "x": torch.ones(2)}}, "x is .2,. there, missing here"),
        ({"model": {**state(1), "fc.bias": torch.ones(4)}}, "fc.bias is .4,. there, .3,. here"),
    ],
)
def test_what_does_not_fit_is_named(parts, message, tmp_path):
    paths = write(tmp_path / "a.pt", 0), write(tmp_path / "b.pt", 1, **parts)
    with pytest.raises(DataError, match=rf"b\.pt does not fit to .*a\.pt: {message}"):
        soup(paths)


def test_one_checkpoint_makes_no_soup(tmp_path):
    with pytest.raises(UsageError, match="two checkpoints or more"):
        soup([write(tmp_path / "a.pt", 0)])
