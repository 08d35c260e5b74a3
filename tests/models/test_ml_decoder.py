import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from asl.errors import UsageError
from asl.models.build import create_model
from asl.models.heads import head_names
from asl.models.ml_decoder import MLDecoder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mldecoder.json").read_text())
HEADS = {f"{case['num_classes']} classes": case for case in GOLDEN["heads"]}


def official_tensor(name, shape):
    """Draw one tensor by its name, as the golden ones were."""
    generator = torch.Generator().manual_seed(zlib.crc32((GOLDEN["salt"] + name).encode()))
    tensor = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return tensor / tensor[0].numel() ** 0.5
    return tensor if name.endswith(".weight") else 0.1 * tensor


@pytest.mark.parametrize("layout", ["map", "map with channels last", "tokens"])
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_logits_are_those_of_the_official_head(case, layout, same):
    queries = {} if case["num_of_groups"] < 0 else {"num_queries": case["num_of_groups"]}
    channels_last = layout == "map with channels last"
    head = MLDecoder(
        case["num_features"], case["num_classes"], channels_last=channels_last, **queries
    )
    head.load_state_dict({n: official_tensor(n, shape) for n, shape in case["params"].items()})
    shape = (2, case["num_features"], *case["map"])
    features = ((torch.arange(torch.Size(shape).numel()) % 241) / 240).view(shape)
    if layout != "map":
        features = features.movedim(1, -1)
    if layout == "tokens":
        features = features.flatten(1, 2)

    with torch.inference_mode():
        logits = head.eval()(features)

    assert logits.shape == (2, case["num_classes"])
    expected = torch.tensor(case["logits"])
    same("head ML-Decoder", logits[:, : expected.shape[1]], expected, atol=1e-5)
    same("head ML-Decoder", logits[:, -1], torch.tensor(case["last"]), atol=1e-5)


# What each family's features are: all pixels of the last map, or all tokens, 1 of them of the class
SEEN = {
    "test_resnet": (5 * 5, 96),
    "test_efficientnet": (5 * 5, 256),
    "test_convnext": (5 * 5, 64),
    "test_vit": (10 * 10 + 1, 64),
    "tresnet_m": (7 * 7, 2048),
    "swin_tiny_patch4_window7_224": (7 * 7, 768),  # channels last
    "mixer_s32_224": (7 * 7, 512),
    "mobilenetv4_conv_small": (7 * 7, 1280),  # has a convolution behind the pooling
    "ghostnet_100": (7 * 7, 1280),
    "caformer_s18": (7 * 7, 512),  # has a head of several layers
    "levit_256d": (4 * 4, 512),
    "efficientvit_b0": (7 * 7, 128),  # timm cannot take its pooling away
    "inception_next_atto": (7 * 7, 320),
}


class Witness(nn.Module):
    """Stands in for a decoder, which cannot run on tensors without values."""

    def forward(self, tokens):
        self.seen = tokens.shape
        return tokens.new_zeros(len(tokens), 20)


@pytest.mark.parametrize("name", SEEN)
def test_the_decoder_sees_the_unpooled_features_of_any_family(name):
    with torch.device("meta"):  # shapes alone: no time for random weights
        model = create_model(name, 20, "ml_decoder").eval()
        head = model.get_submodule(*head_names(model))
        assert head.decoder.embed_standart.in_features == SEEN[name][1]
        head.decoder = Witness()
        size = model.pretrained_cfg["input_size"][-1]
        logits = model(torch.zeros(2, 3, size, size))
    assert head.decoder.seen == (2, *SEEN[name])
    assert logits.shape == (2, 20)
    assert model.num_classes == 20


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_backbone_is_left_as_it_was(name):
    torch.manual_seed(0)
    plain = create_model(name, 20, image_size=96).eval()
    torch.manual_seed(0)
    model = create_model(name, 20, "ml_decoder", image_size=96).train()
    same = plain.state_dict()
    [head] = head_names(model)
    body = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{head}.")}
    assert body.keys() == {n for n in same if not n.startswith(f"{head}.")}
    assert all(torch.equal(tensor, same[n]) for n, tensor in body.items())
    images = torch.rand(2, 3, 96, 96)
    features = plain.forward_features(images)
    assert torch.equal(model.eval()(images), model.get_submodule(head)(features))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lowformer_b0", "permute"),  # makes a map of what its head returns
        ("deit_tiny_distilled_patch16_224", "2 linear heads, not one"),
        ("coat_lite_tiny", r"\[2, 320\], no map and no tokens"),
    ],
)
def test_a_model_that_cannot_have_the_decoder_is_named(name, reason):
    with pytest.raises(UsageError, match=f"{name} can have no ML-Decoder head: .*{reason}"):
        create_model(name, 20, "ml_decoder")


def test_a_size_that_the_model_cannot_take_is_an_error_here_too():
    with pytest.raises(UsageError, match=r"test_vit can have no ML-Decoder head: .*50") as error:
        create_model("test_vit", 2, "ml_decoder", image_size=50)
    assert "\n" not in str(error.value)


def test_it_begins_as_the_official_one_does():
    torch.manual_seed(0)
    decoder = create_model("test_resnet", 601, "ml_decoder").fc.decoder
    attention = decoder.layers[0].multihead_attn
    spread = {
        decoder.query_embed.weight: 1,
        decoder.duplicate_pooling: (2 / (768 * 7 + 100 * 7)) ** 0.5,
        decoder.embed_standart.weight: (1 / (3 * 96)) ** 0.5,
        attention.in_proj_weight: (2 / (768 + 3 * 768)) ** 0.5,
    }
    for tensor, expected in spread.items():
        assert tensor.std().item() == pytest.approx(expected, rel=0.03)
    biases = decoder.duplicate_pooling_bias, attention.in_proj_bias, attention.out_proj.bias
    assert not any(bias.any() for bias in biases)


def test_the_queries_alone_are_not_trained():
    head = MLDecoder(8, 20)
    fixed = {name for name, tensor in head.named_parameters() if not tensor.requires_grad}
    assert fixed == {"decoder.query_embed.weight"}
    head(torch.rand(2, 8, 3, 3)).sum().backward()
    missing = {name for name, tensor in head.named_parameters() if tensor.grad is None}
    assert missing == fixed


def test_dropout_of_a_tenth_is_where_the_official_code_has_it(monkeypatch):
    drawn, attention = [], nn.functional.scaled_dot_product_attention

    def dropped(_, inputs, output):
        drawn.append(inputs[0].shape[-1])

    def attended(*tensors, dropout_p):
        drawn.append(dropout_p)
        return attention(*tensors, dropout_p=dropout_p)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attended)
    head = MLDecoder(8, 20)
    [dropout] = [layer for layer in head.modules() if isinstance(layer, nn.Dropout)]
    dropout.register_forward_hook(dropped)
    features = torch.rand(2, 8, 3, 3)
    first, second = head(features), head(features)
    assert dropout.p == 0.1
    # The queries, the weights of the attention, its result, the hidden layer, its result.
    assert drawn == 2 * [768, 0.1, 768, 2048, 768]
    assert not torch.equal(first, second)
    head.eval()
    assert torch.equal(head(features), head(features))
    assert drawn[10:] == 2 * [768, 0.0, 768, 2048, 768]


def test_every_image_has_a_dropout_of_its_own():
    torch.manual_seed(0)
    first, second = MLDecoder(8, 20)(torch.rand(1, 8, 3, 3).expand(2, -1, -1, -1))
    assert not torch.equal(first, second)
