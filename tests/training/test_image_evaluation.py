from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

from paths import ROOT

from vpcodec.codec.image import ImageCodec
from vpcodec.models import ImageAutoencoder
from vpcodec.recipe import load_recipe
from vpcodec.recipe.image import EvalConfig
from vpcodec.scoring.workers import IMAGE_METRICS, measure_image
from vpcodec.tokenfile import ImageHeader, write_tokens
from vpcodec.training.evaluation import Evaluation, EvaluationError
from vpcodec.training.image.evaluation import HeldOutImages, codec_of
from vpcodec.training.selection import SHOWN

pytestmark = pytest.mark.slow

MODEL = load_recipe(ROOT / "recipes" / "image_debug.yaml").model  # blocks of 32 pixels, hop 8


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def toy_codec(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens 0, 1, 2, 3, 0, ...; the pixels, somewhat coarser."""
    rows, columns = (-(-side // 8) for side in pixels.shape[:2])
    return np.arange(rows * columns).reshape(rows, columns) % 4, pixels // 16 * 16


@pytest.fixture
def make() -> Iterator[Callable[..., Evaluation]]:
    made = []

    def make(data: Path | str, **options) -> Evaluation:
        made.append(Evaluation(HeldOutImages(EvalConfig(data=str(data), **options), MODEL)))
        return made[-1]

    yield make
    for evaluation in made:
        evaluation.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, shape in enumerate([(64, 96), (70, 100), (20, 40)]):
        write(tmp_path / "held out" / f"{number}.png", picture(*shape, seed=number))
    return tmp_path / "held out"


def test_images_are_cut_at_their_centre_to_whole_blocks_or_left_small(tmp_path, make):
    image = picture(140, 110)
    write(tmp_path / "a.png", image)
    write(tmp_path / "b.png", image[:20, :40])
    write(tmp_path / "c.png", image[:32, :, 0])
    items = make(tmp_path, max_side=100).items
    np.testing.assert_array_equal(items[0], image[22:118, 7:103])
    np.testing.assert_array_equal(items[1], image[:20, 4:36])
    np.testing.assert_array_equal(items[2], image[:32, 7:103, :1].repeat(3, 2))
    [small, *_] = make(tmp_path, max_side=5).items
    np.testing.assert_array_equal(small, image[67:72, 52:57])


def test_the_results_are_means_over_the_images(folder, make):
    evaluation = make(folder)
    assert len(evaluation.items) == 3 and evaluation.missing == []
    evaluation.start(7, toy_codec)
    [(step, values)] = evaluation.results(wait=60.0)
    single = [measure_image(item, toy_codec(item)[1]) for item in evaluation.items]
    for name in IMAGE_METRICS:
        assert values[name] == pytest.approx(np.mean([row[name] for row in single]))
    assert step == 7 and values["unscored"] == 0
    assert values["entropy"] == pytest.approx(2, abs=1e-2)
    assert values["perplexity"] == pytest.approx(4, abs=0.1)
    assert values["cvu"] == pytest.approx(4 / 125, rel=0.1)
    assert set(values) >= set(SHOWN) & {"psnr", "ssim", "ms_ssim", "bits_per_pixel"}


def test_bits_per_pixel_are_those_of_token_files(folder, tmp_path, make):
    evaluation = make(folder)
    evaluation.start(0, toy_codec)
    n_bytes = n_pixels = 0
    for item in evaluation.items:
        height, width = item.shape[:2]
        header = ImageHeader(
            model=MODEL.name,
            fingerprint=bytes(16),
            channels=1,
            hop_length=8,
            codebook_size=125,
            width=width,
            height=height,
            components=3,
        )
        write_tokens(tmp_path / "a.tok", toy_codec(item)[0].reshape(1, -1), header)
        n_bytes += (tmp_path / "a.tok").stat().st_size
        n_pixels += height * width
    [(_, values)] = evaluation.results(wait=60.0)
    assert values["bits_per_pixel"] == pytest.approx(8 * n_bytes / n_pixels)


def test_files_that_cannot_be_used_are_left_out_and_named_once(folder, make):
    (folder / "broken.png").write_bytes(b"no image at all")
    evaluation = make(folder)
    assert len(evaluation.items) == 3
    [line] = evaluation.skipped
    assert line.count("broken.png") == 1 and "not an image" in line


@pytest.mark.parametrize("data", ["missing", "*.jpg", "empty", "broken"])
def test_data_without_an_image_are_refused_by_name(tmp_path, data, make):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image at all")
    with pytest.raises(EvaluationError, match=data.replace("*", r"\*")) as error:
        make(tmp_path / data)
    assert "\n" not in str(error.value)


def test_pixels_of_another_shape_reach_the_caller(folder, make):
    with pytest.raises(ValueError, match="shapes"):
        make(folder).start(1, lambda x: (toy_codec(x)[0], x[:-1]))


@pytest.fixture(scope="module")
def model() -> ImageAutoencoder:
    torch.manual_seed(0)
    return ImageAutoencoder(MODEL).eval()


@pytest.fixture
def codec(model) -> ImageCodec:
    """The model, without what a folder of it needs."""

    @torch.no_grad()
    def run(function: Callable, x: np.ndarray) -> tuple[np.ndarray, None]:
        return function(torch.from_numpy(x)).numpy(), None

    backend = SimpleNamespace(
        encode=lambda x, state: run(model.encode, x), decode=lambda x, state: run(model.decode, x)
    )
    return ImageCodec(SimpleNamespace(config=MODEL, space=bytes(16)), backend)


@pytest.mark.parametrize("shape", [(64, 96), (75, 133), (1, 1), (20, 64)])
def test_the_models_function_codes_as_the_codec_does(model, codec, one_thread, shape):
    image = picture(*shape)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, decoded = codec_of(model, "cpu")(image)
    expected = codec.encode(image)
    assert tokens.dtype == np.int64 and decoded.dtype == np.uint8
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(decoded, codec.decode(expected, shape).astype(int), atol=1)
    assert decoded.shape == image.shape and len(np.unique(decoded)) > 1
