"""Where a model sees a label: against closed forms, against torch, and on drawn shapes."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import interpolate

from asl import Predictor
from asl.errors import UsageError
from asl.evaluation.average import Renormalized, Scores
from asl.evaluation.explain import attention, check_explanation, grad_cam, heat_maps, overlay
from asl.evaluation.score import Scorer
from asl.images.decode import read_image
from asl.images.settings import ImageSettings
from asl.models.build import create_model, normalization
from asl.models.inference import for_inference
from asl.models.ml_decoder import ATTENTION_HEADS, WIDTH, MLDecoder

CPU = torch.device("cpu")


def scorer_of(model, size, name="a model"):
    return Scorer(
        (Scores(model.eval()),),
        (name,),
        ("only",),
        ("red", "green", "blue"),
        ((0.0,) * 3, (1.0,) * 3),
        ImageSettings(image_size=size),
        CPU,
        "off",
        (size,),
    )


@pytest.fixture
def images():
    return torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_under_mean_pooling_and_a_linear_head_grad_cam_is_the_class_activation_map(name, images):
    # Section 3.1 of the Grad-CAM paper: it generalises CAM, which needs no gradient.
    torch.manual_seed(0)
    model = create_model(name, 7).eval()
    with torch.no_grad():
        features = model.forward_features(images)[0]
        cam = torch.einsum("cf,fhw->chw", model.get_classifier().weight, features).relu()
    expected = cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12)
    assert grad_cam(model, images, range(7)) == pytest.approx(expected, abs=1e-4)
    assert grad_cam(for_inference(model), images, [5]) == pytest.approx(expected[5:6], abs=1e-3)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_grad_cam_of_a_transformer_is_by_the_tokens_that_go_into_its_last_block(name):
    torch.manual_seed(0)
    model = create_model(name, 3, image_size=160).eval()
    images = torch.rand(1, 3, 160, 160)
    seen = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits = model(images)
    hook.remove()
    [gradient] = torch.autograd.grad(logits[0, 2], seen[0])
    patches = model.num_prefix_tokens
    side = 160 // model.patch_embed.patch_size[0]
    weights = gradient[0, patches:].mean(0)
    expected = (seen[0][0, patches:] @ weights).relu().view(side, side).detach()
    expected = expected / expected.max().clamp_min(1e-12)
    [found] = grad_cam(model, images, [2])
    assert found == pytest.approx(expected, abs=1e-4)
    assert model(images).detach() == pytest.approx(
        logits.detach(), abs=1e-6
    )  # nothing is left in it


class Channels(nn.Module):
    """Sees how much more of red, green and blue than of the others there is, in 4 x 4 pixels."""

    num_features = 3

    def forward_features(self, images):
        others = torch.stack([images[:, [1, 2]], images[:, [0, 2]], images[:, [0, 1]]], dim=1)
        return nn.functional.avg_pool2d((images - others.amax(2)).relu(), 4)

    def forward_head(self, features):
        return 50 * features.mean((2, 3)) - 1

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def test_the_hot_spot_of_a_shape_lies_on_it(small_shapes):
    content = json.loads((small_shapes / "annotations/instances_train2014.json").read_text())
    names = {each["id"]: each["name"] for each in content["categories"]}
    scorer, looked = scorer_of(Channels(), 64), 0
    for image in content["images"]:
        objects = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        for number, colour in enumerate(("red", "green", "blue")):
            boxes = [o["bbox"] for o in objects if names[o["category_id"]].startswith(colour)]
            plain = [o for o in objects if names[o["category_id"]].split()[0] not in LIKE[colour]]
            if not boxes or len(plain) + len(boxes) < len(objects):
                continue
            pixels = read_image(small_shapes / "train2014" / image["file_name"])
            [heat] = heat_maps(scorer, pixels, [number], "gradcam")
            assert heat.shape == (64, 64)
            assert heat.max() == 1
            row, column = np.unravel_index(heat.argmax(), heat.shape)
            x, y = (column + 0.5) / 64 * image["width"], (row + 0.5) / 64 * image["height"]
            looked += 1
            edge = 4 / 64 * image["width"]
            assert any(
                left - edge <= x <= left + width + edge and top - edge <= y <= top + height + edge
                for left, top, width, height in boxes
            ), (image["file_name"], colour)
    assert looked >= 5


# Fills that are of a colour too, or may be.
LIKE = {
    "red": ("yellow", "pink", "striped", "dotted"),
    "green": ("yellow", "cyan", "striped", "dotted"),
    "blue": ("cyan", "pink", "striped", "dotted"),
}


@pytest.mark.parametrize(("shape", "channels_last"), [((1, 6, 4, 5), False), ((1, 4, 5, 6), True)])
def test_the_attention_of_an_ml_decoder_is_that_of_torch(shape, channels_last):
    torch.manual_seed(0)
    decoder = MLDecoder(6, 5, num_queries=3, channels_last=channels_last).eval()
    layer = decoder.decoder.layers[0]
    torch.nn.init.normal_(layer.multihead_attn.in_proj_bias)
    reference = nn.MultiheadAttention(WIDTH, ATTENTION_HEADS, batch_first=True).eval()
    reference.load_state_dict(layer.multihead_attn.state_dict())
    features = torch.randn(shape)
    with torch.no_grad():
        weights = decoder.attention(features)
    tokens = features if channels_last else features.movedim(1, -1)
    embedded = decoder.decoder.embed_standart(tokens.flatten(1, 2)).relu()
    queries = layer.norm1(2 * decoder.decoder.query_embed.weight)[None]
    _, expected = reference(queries, embedded, embedded)
    # Five classes have two queries each, the last one: one.
    assert weights == pytest.approx(expected[:, [0, 0, 1, 1, 2]].detach(), abs=1e-6)
    assert weights.sum(-1) == pytest.approx(torch.ones(1, 5), abs=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_attention_makes_a_map_from_low_to_high_and_grad_cam_takes_such_a_head_too(name):
    torch.manual_seed(0)
    model = for_inference(create_model(name, 4, "ml_decoder", image_size=160))
    images = torch.rand(1, 3, 160, 160)
    seen = []
    decoder = next(part for part in model.modules() if isinstance(part, MLDecoder))
    hook = decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(images)
    hook.remove()
    maps = attention(model, images, [1, 3])
    side = maps.shape[1]
    weights = decoder.attention(seen[0])[0, [1, 3], -(side**2) :].view(2, side, side)
    assert maps.amin((1, 2)).tolist() == [0, 0]
    assert maps.amax((1, 2)) == pytest.approx(torch.ones(2), abs=1e-5)
    assert torch.equal(maps.flatten(1).argsort(), weights.flatten(1).argsort())
    assert grad_cam(model, images, [1, 3]).shape == maps.shape


def test_several_checkpoints_are_explained_by_their_mean(untrained, tmp_path):
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    settings = {"device": "cpu", "image_size": 96}
    one = heat_maps(Predictor(untrained, **settings).scorer, image, [1, 2], "gradcam")
    two = heat_maps(Predictor([untrained] * 2, **settings).scorer, image, [1, 2], "gradcam")
    assert two == pytest.approx(one, abs=1e-6)
    assert one.shape == (2, 96, 96)


def test_a_model_normalised_otherwise_is_given_its_own_pixels():
    first = create_model("test_resnet", 3)
    assert normalization(first) != ((0.0,) * 3, (1.0,) * 3)
    zero_one = ((0.0,) * 3, (1.0,) * 3)
    wrapped = Renormalized(first, normalization(first), zero_one, CPU)
    image = torch.randint(256, (3, 96, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in normalization(first))
    expected = grad_cam(first.eval(), ((image / 255 - mean) / std)[None], [0])
    fine = interpolate(expected[None], size=(96, 96), mode="bilinear")[0]
    expected = (fine / fine.max()).numpy()
    found = heat_maps(scorer_of(wrapped, 96), image, [0], "gradcam")
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (lambda: create_model("test_resnet", 3), "attention", "its head is not ml_decoder"),
        (lambda: timm.create_model("levit_128s", num_classes=3), "gradcam", "tokens"),
        (lambda: create_model("test_resnet", 3), "gradcam", "one pixel"),
    ],
)
def test_a_model_that_gives_no_map_is_refused_by_name(model, how, message):
    size = 32 if message == "one pixel" else 224
    with pytest.raises(UsageError, match=f"^a model cannot be explained by {how}: .*{message}"):
        check_explanation(scorer_of(model(), size), how)


def test_an_overlay_is_pale_where_nothing_is_and_red_where_all_is():
    heat = np.zeros((8, 8), np.float32)
    heat[:, 6:] = 1
    shown = overlay(torch.full((3, 300, 800), 60, dtype=torch.uint8), heat, 400)
    assert shown.shape == (150, 400, 3)
    cold, hot = shown[75, 20].astype(int), shown[75, 390].astype(int)
    assert np.ptp(cold) < 12
    assert hot[0] - max(hot[1:]) > 30
