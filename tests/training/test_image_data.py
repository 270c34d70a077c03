from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="needs the train extra")

from vpcodec.media.image import ImageError
from vpcodec.recipe.image import DataConfig
from vpcodec.training.corpora import DataError
from vpcodec.training.image import data
from vpcodec.training.image.data import ImageCrops, to_rgb

SIZE = 32


def crops(
    train: Any, *, seed: int = 0, process: int = 0, processes: int = 1, **config
) -> ImageCrops:
    """Crops of 32 x 32 pixels, four in a batch, not mirrored."""
    workers = config.get("workers") or 0
    config = {"crop_size": SIZE, "batch_size": 4, "flip": False} | config
    return ImageCrops(
        DataConfig(train=str(train) if isinstance(train, Path) else train, **config),
        hop_length=8,
        seed=seed,
        process=process,
        processes=processes,
        workers=workers,
    )


def pixels(drawn: np.ndarray) -> np.ndarray:
    """A batch as uint8 (B, size, size, 3)."""
    levels = (drawn.transpose(0, 2, 3, 1) + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    return levels.round().astype(np.uint8)


def map_of_places(height: int, width: int) -> np.ndarray:
    """(H, W, 3): each pixel tells its row and column; at most 256 each way."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, rows ^ columns], 2).astype(np.uint8)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def write(path: Path, image: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path, **options)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write(folder / "a.png", noise(50, 70))
    write(folder / "more" / "b.jpg", noise(90, 60, seed=1), quality=90)
    write(folder / "more" / "c.png", noise(20, 40, seed=2))
    return folder


@pytest.mark.parametrize("generated", [False, True])
def test_a_batch_depends_on_seed_and_number_alone(pictures, generated):
    folder = () if generated else pictures
    first = crops(folder, flip=True)
    batches = [first.batch(number) for number in range(4)]
    np.testing.assert_array_equal(crops(folder, flip=True).batch(3), batches[3])
    np.testing.assert_array_equal(first.batch(0), batches[0])
    np.testing.assert_array_equal(list(crops(folder, flip=True).batches(1, 4)), batches[1:])
    assert batches[0].shape == (4, 3, SIZE, SIZE) and batches[0].dtype == np.float32
    assert np.abs(batches[0]).max() <= 1
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(crops(folder, seed=1, flip=True).batch(0), batches[0])
    assert len(np.unique(batches[0], axis=0)) == 4


@pytest.mark.parametrize("resize", [None, 40])
def test_crops_do_not_depend_on_cache_threads_workers_and_processes(pictures, resize):
    options = {"resize": resize, "flip": True}
    expected = [crops(pictures, cache_mb=0, **options).batch(number) for number in range(6)]
    for workers in (0, 2):
        drawn = crops(pictures, workers=workers, **options)
        np.testing.assert_array_equal(list(drawn.batches(0, 6)), expected)
    parts = [crops(pictures, batch_size=2, process=p, processes=2, **options) for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([p.batch(5) for p in parts]), expected[5])


def test_a_crop_is_cut_from_anywhere_as_it_is(tmp_path):
    write(tmp_path / "a.png", map_of_places(SIZE + 3, SIZE + 5))
    places = set()
    for crop in pixels(crops(tmp_path, batch_size=400).batch(0)):
        top, left = crop[0, 0, :2]
        expected = map_of_places(256, 256)[top : top + SIZE, left : left + SIZE]
        np.testing.assert_array_equal(crop, expected)
        places.add((int(top), int(left)))
    assert places == {(top, left) for top in range(4) for left in range(6)}


def test_half_of_the_crops_are_mirrored_unless_that_is_off(tmp_path):
    write(tmp_path / "a.png", map_of_places(SIZE, SIZE))
    batch = pixels(crops(tmp_path, batch_size=200, flip=True).batch(0))
    mirrored = batch[:, 0, 0, 1] > 0
    assert mirrored.mean() == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(batch[mirrored][0], map_of_places(SIZE, SIZE)[:, ::-1])
    assert not pixels(crops(tmp_path, batch_size=200).batch(0))[:, 0, 0, 1].any()


@pytest.mark.parametrize(
    "shape, resize, scaled",
    [
        ((100, 150), 40, (40, 60)),
        ((150, 100), 40, (60, 40)),
        ((20, 30), None, (32, 48)),
        ((20, 30), 64, (64, 96)),
        ((16, 100), None, (32, 200)),
    ],
)
def test_images_are_scaled_so_that_the_shorter_side_fits(tmp_path, shape, resize, scaled):
    """A crop is a part of the whole image as Pillow scales it."""
    rows, columns = np.mgrid[: shape[0], : shape[1]][..., None] / 20
    image = 128 + 50 * np.sin(4 * rows + np.arange(3)) + 50 * np.cos(3 * columns)
    write(tmp_path / "a.png", image.astype(np.uint8))
    whole = Image.open(tmp_path / "a.png").resize(scaled[::-1], Image.Resampling.BICUBIC)
    whole = np.asarray(whole).astype(int)
    views = np.lib.stride_tricks.sliding_window_view(whole, (SIZE, SIZE), (0, 1))
    found = set()
    for crop in pixels(crops(tmp_path, batch_size=20, resize=resize).batch(0)):
        errors = np.abs(views - crop.transpose(2, 0, 1)).max((2, 3, 4))
        assert errors.min() <= 1 < np.median(errors)
        found.add(int(errors.argmin()))
    assert len(found) > 5


def test_a_line_of_pixels_is_no_reason_to_take_much_memory(tmp_path):
    """As a whole it would be enlarged to 32 x 1,280,000 pixels."""
    write(tmp_path / "a.png", np.zeros((1, 40_000, 3), np.uint8))
    drawn = crops(tmp_path)
    assert (drawn.batch(0) == -1).all()
    assert sum(image.nbytes for image in drawn._cache.values()) == 120_000


def test_images_are_upright_rgb_and_what_is_transparent_is_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[0] = 255
    write(tmp_path / "turned" / "a.png", image, exif=exif)
    crop = pixels(crops(tmp_path / "turned").batch(0))[0]
    assert crop[:, -1].min() == 255 and crop[:, :-1].max() == 0
    write(tmp_path / "grey" / "a.png", noise(SIZE, SIZE, 1))
    crop = pixels(crops(tmp_path / "grey").batch(0))[0]
    np.testing.assert_array_equal(crop, noise(SIZE, SIZE, 1).repeat(3, 2))
    half = np.full((SIZE, SIZE, 4), (10, 20, 30, 0), np.uint8)
    half[:, 5:, 3] = 255
    write(tmp_path / "alpha" / "a.png", half)
    crop = pixels(crops(tmp_path / "alpha").batch(0))[0]
    assert (crop[:, :5] == 255).all() and (crop[:, 5:] == (10, 20, 30)).all()


def test_alpha_mixes_with_white():
    image = np.array([[[0, 128], [100, 255], [100, 0], [255, 7]]], np.uint8)
    assert to_rgb(image)[0, :, 0].tolist() == [127, 100, 255, 255]
    colours = noise(9, 9, 4)
    alpha = colours[..., 3:] / 255
    expected = colours[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(to_rgb(colours), expected, atol=0.51)


def test_every_image_is_drawn_equally_likely(tmp_path):
    write(tmp_path / "small.png", np.full((SIZE, SIZE, 3), 10, np.uint8))
    write(tmp_path / "large.png", np.full((10 * SIZE, 10 * SIZE, 3), 200, np.uint8))
    drawn = crops(tmp_path, batch_size=400)
    assert (pixels(drawn.batch(0))[:, 0, 0, 0] == 10).mean() == pytest.approx(0.5, abs=0.08)
    assert drawn.summary == "2 images" and drawn.tokens == 16


def test_corpora_are_mixed_by_weight(tmp_path):
    for name, level in (("few", 10), ("many", 200)):
        write(tmp_path / name / "a.png", np.full((SIZE, SIZE, 3), level, np.uint8))
    train = [{"path": str(tmp_path / "few"), "weight": 3.0}, str(tmp_path / "many")]
    few = pixels(crops(train, batch_size=100).batch(0))[:, 0, 0, 0] == 10
    assert few.mean() == pytest.approx(0.75, abs=0.02)


def test_files_are_opened_when_they_are_drawn(pictures, monkeypatch):
    loaded = []

    def spy(source, **options):
        loaded.append(source)
        return load_image(source, **options)

    load_image = data.load_image
    monkeypatch.setattr(data, "load_image", spy)
    drawn = crops(pictures)
    assert loaded == []
    for number in range(20):
        drawn.batch(number)
    assert len(loaded) == 3  # once each


def test_the_cache_keeps_to_its_size(tmp_path):
    for number in range(8):
        write(tmp_path / f"{number}.png", noise(300, 300, seed=number))  # 0.26 MiB each
    drawn = crops(tmp_path, cache_mb=1)
    for number in range(20):
        drawn.batch(number)
    assert sum(image.nbytes for image in drawn._cache.values()) == 3 * 270_000


def test_images_that_cannot_be_read_are_left_out_and_listed(pictures):
    (pictures / "garbage.jpg").write_bytes(b"no image at all")
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    (pictures / "empty.webp").write_bytes(b"")
    (pictures / "notes.txt").write_text("not an image by its name")
    for workers in (0, 1):
        drawn = crops(pictures, workers=workers)
        assert np.isfinite(list(drawn.batches(0, 8))).all()
        names = sorted(Path(path).name for path in drawn.skipped)
        assert names == ["cut.png", "empty.webp", "garbage.jpg"]


def test_errors_name_what_is_wrong_in_a_line(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match="bad: no image that can be read"):
        crops(tmp_path / "bad").batch(0)
    for name in ("absent", "*.jpg"):
        with pytest.raises(DataError, match="no such folder|no image matches"):
            crops(tmp_path / name)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="empty.txt: no image is listed"):
        crops(tmp_path / "empty.txt")


def test_a_folder_without_images_is_refused_and_named(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: no image in it"):
        crops(tmp_path / "nothing")


def test_globs_and_manifests_choose_files(pictures):
    assert crops(f"{pictures}/**/*.png").summary == "2 images"
    (pictures / "list.csv").write_text("label,path\n1,a.png\n2,more/b.jpg\n3,more/c.png\n")
    assert crops(pictures / "list.csv").summary == "3 images"
    np.testing.assert_array_equal(crops(pictures / "list.csv").batch(0), crops(pictures).batch(0))


def test_the_fingerprint_tells_when_the_names_or_weights_change(pictures):
    def take(folder: Path, weight: float = 1.0, **options) -> str:
        return crops([{"path": str(folder), "weight": weight}], **options).fingerprint

    before = take(pictures)
    assert take(pictures, seed=1, batch_size=2) == before != take(pictures, weight=2.0)
    moved = pictures.rename(pictures.parent / "moved")
    assert take(moved) == before
    (moved / "a.png").rename(moved / "z.png")
    assert take(moved) != before


def test_generated_pictures_differ_and_have_edges_and_colours():
    batch = crops((), batch_size=16, crop_size=64).batch(0)
    assert batch.shape == (16, 3, 64, 64) and crops(()).summary == ""
    assert len(np.unique(batch, axis=0)) == 16
    assert (np.abs(np.diff(batch, axis=3)).max((1, 2, 3)) > 0.2).all()
    assert (batch.std((1, 2, 3)) > 0.05).all()
    assert (np.abs(batch[:, 0] - batch[:, 1]).mean((1, 2)) > 0.02).all()


# Streamed datasets


class FakeDataset:
    """What is used of datasets.IterableDataset."""

    def __init__(self, items: list[dict]) -> None:
        self.items, self.decode = items, True

    def select_columns(self, columns: list[str]) -> FakeDataset:
        assert columns == ["image"]
        return self

    def cast_column(self, column: str, feature: Any) -> FakeDataset:
        self.decode = feature.decode
        return self

    def shuffle(self, seed: int, buffer_size: int) -> FakeDataset:
        return self

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[dict]:
        assert not self.decode
        yield from ({"image": item} for item in self.items)


def test_a_stream_gives_its_images_and_skips_what_is_none(monkeypatch):
    items = []
    for level in (10, 20, 30):
        file = io.BytesIO()
        Image.fromarray(np.full((SIZE, 40, 3), level, np.uint8)).save(file, "PNG")
        items.append({"bytes": file.getvalue(), "path": None})
    bad = [
        {"bytes": b"no image", "path": "b.jpg"},
        {"bytes": None, "path": "none://there"},
        {"bytes": None, "path": None},
        None,
    ]
    items += bad
    package, distributed = ModuleType("datasets"), ModuleType("datasets.distributed")
    package.load_dataset = lambda *arguments, **options: FakeDataset(items)
    package.Image = lambda decode: SimpleNamespace(decode=decode)
    package.distributed = distributed
    distributed.split_dataset_by_node = lambda dataset, rank, world_size: dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setitem(sys.modules, "datasets.distributed", distributed)
    drawn = crops([{"type": "huggingface", "path": "some/pictures"}], batch_size=3)
    assert pixels(drawn.batch(0))[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert drawn.batch(1).shape == (3, 3, SIZE, SIZE)
    assert len(drawn.skipped) == len(bad) and drawn.summary == ""
    assert drawn.skipped[:2] == ["some/pictures: b.jpg", "some/pictures: none://there"]


def test_a_name_that_no_file_can_have_is_skipped(tmp_path):
    Image.fromarray(np.full((SIZE, SIZE, 3), 10, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n\0.png\n")
    drawn = crops([str(tmp_path / "list.txt")], batch_size=8)
    assert (pixels(drawn.batch(0)) == 10).all()


def test_trouble_of_the_file_system_is_waited_for(tmp_path, monkeypatch):
    Image.fromarray(np.full((SIZE, SIZE, 3), 10, np.uint8)).save(tmp_path / "a.png")
    load, troubles = data.load_image, [OSError(28, "No space left on device")]

    def stumble(source):
        if troubles:
            raise ImageError("a.png: No space left on device") from troubles.pop()
        return load(source)

    monkeypatch.setattr(data, "load_image", stumble)
    drawn = crops([str(tmp_path)])
    assert (pixels(drawn.batch(0)) == 10).all()
    assert drawn.skipped == [] and troubles == []


def test_the_real_package_streams_images(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    file = io.BytesIO()
    Image.fromarray(np.full((SIZE, 40, 3), 10, np.uint8)).save(file, "PNG")
    rows = [{"bytes": file.getvalue(), "path": None}] * 4
    table = datasets.Dataset.from_dict({"image": rows, "label": [0] * 4})
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    drawn = crops([{"type": "huggingface", "path": str(tmp_path)}])
    assert (pixels(drawn.batch(0)) == 10).all()
