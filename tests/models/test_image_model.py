"""The image autoencoder: shapes, locality, precision, gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

from paths import RECIPES

from vpcodec.config import ImageConfig
from vpcodec.models import AudioAutoencoder, ImageAutoencoder, build_model
from vpcodec.models.image import Conv2d
from vpcodec.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "name": "small",
    "dims": (8, 12, 16),
    "encoder_depths": (1, 1, 1),
    "decoder_depths": (1, 1, 1),
    "attention_window": 2,
    "attention_heads": 2,
    "quantizer": {"levels": (5, 5, 5)},
}


def make(**fields) -> ImageAutoencoder:
    torch.manual_seed(0)
    return ImageAutoencoder(ImageConfig(**SMALL | fields)).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"patch_size": 1},
        {"dims": (8,), "encoder_depths": (2,), "decoder_depths": (0,), "patch_size": 4},
        {"encoder_layers": 0, "decoder_layers": 2},
        {"attention_window": 3},
    ],
)
def test_a_token_stands_for_a_square_of_pixels(fields):
    model = make(**fields)
    hop, block = model.config.hop_length, model.config.block_size
    images = noise(2, 3, 2 * block, 3 * block)
    tokens = model.encode(images)
    assert tokens.shape == (2, 2 * block // hop, 3 * block // hop)
    assert tokens.dtype == torch.int64
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    output, quantized = model.train()(images)
    assert output.shape == model.target(images).shape == images.shape
    assert quantized.tokens.shape == tokens.shape


def test_the_model_that_the_recipe_ships_is_small():
    model = build_model(load_recipe(RECIPES / "image.yaml").model)
    assert isinstance(model, ImageAutoencoder) and model.config.hop_length == 8
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert 15_000 <= model.config.codebook_size <= 17_000


def test_build_model_goes_by_the_kind():
    assert isinstance(build_model(load_recipe(RECIPES / "debug.yaml").model), AudioAutoencoder)


@pytest.mark.parametrize("depths", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("window", [2, 5])
def test_a_tile_with_its_halo_has_the_tokens_and_pixels_of_the_whole(depths, window):
    model = make(encoder_depths=depths, decoder_depths=depths, attention_window=window)
    config = model.config
    halos = (config.encoder_halo, config.decoder_halo)
    side = 2 * max(halos) + 3 * window  # tokens
    images = noise(1, 3, side * config.hop_length, side * config.hop_length)
    tokens = model.encode(images)
    whole = model.decode(tokens)
    for halo, first in ((halos[0], window), (halos[1], 2 * window)):
        last = first + 2 * halo + window
        inside = slice(first + halo, last - halo)
        if halo == halos[0]:
            pixels = slice(first * config.hop_length, last * config.hop_length)
            tile = model.encode(images[:, :, pixels, pixels])
            assert torch.equal(tile[:, halo:-halo, halo:-halo], tokens[:, inside, inside])
        if halo == halos[1]:
            tile = model.decode(tokens[:, first:last, first:last])
            cut = slice(halo * config.hop_length, -halo * config.hop_length)
            pixels = slice(inside.start * config.hop_length, inside.stop * config.hop_length)
            torch.testing.assert_close(
                tile[..., cut, cut], whole[..., pixels, pixels], atol=1e-5, rtol=0
            )


def test_what_lies_beyond_the_halo_is_not_seen_and_what_lies_before_it_is():
    """The gradient of one window's latents reaches into the halo and no further."""
    model = make(encoder_depths=(1, 1, 2))
    config = model.config
    window, halo, hop = config.attention_window, config.encoder_halo, config.hop_length
    images = noise(1, 3, 11 * window * hop, 11 * window * hop).requires_grad_()
    first = 5 * window
    model.encoder(images)[:, first : first + window, first : first + window].sum().backward()
    seen = images.grad.abs().amax((0, 1, 2)).nonzero()
    left, right = int(seen.min()) / hop, (int(seen.max()) + 1) / hop
    assert first - halo <= left < first
    assert first + window < right <= first + window + halo


def test_tokens_do_not_depend_on_the_batch():
    model = make()
    images = noise(3, 3, 32, 48)
    together = model.encode(images)
    alone = torch.cat([model.encode(image[None]) for image in images])
    assert torch.equal(together, alone)


def test_under_autocast_tokens_are_those_of_the_float32_quantizer():
    model = make()
    latents = noise(2, 6, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.quantizer.encode(latents)
    assert torch.equal(found, model.quantizer.encode(latents))
    with torch.autocast("cpu", torch.bfloat16):
        output, quantized = model(noise(1, 3, 32, 32))
    assert output.dtype == quantized.latents.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_flat_images_do_not_blow_up_gradients(value):
    model = make().train()
    output, quantized = model(torch.full((2, 3, 32, 32), value))
    ((output - value).abs().mean() + quantized.loss).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert 0 < norm < 1e3


def test_every_parameter_gets_a_gradient():
    model = make().train()
    output, quantized = model(noise(2, 3, 32, 32))
    (output.square().mean() + quantized.loss).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_the_convolution_is_the_usual_one():
    torch.manual_seed(0)
    layer = Conv2d(6, 4, 3)
    usual = torch.nn.Conv2d(6, 4, 3, padding=1)
    with torch.no_grad():
        usual.weight.copy_(layer.weight.view(4, 3, 3, 6).permute(0, 3, 1, 2))
        usual.bias.copy_(layer.bias)
    x = noise(2, 6, 5, 7)
    torch.testing.assert_close(layer(x), usual(x))
