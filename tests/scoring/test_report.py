from __future__ import annotations

import base64
import io
import json
import math
import re
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_browser
from PIL import Image

from vpcodec.metrics.base import Metric
from vpcodec.scoring import report
from vpcodec.scoring.report import Example, choose_examples, write_report
from vpcodec.scoring.scores import ORIGINAL, Row, Scores, Summary, SystemScores
from vpcodec.terminal import escape

RATE = 16_000
HOSTILE = [
    "</script><script>window.pwned=1</script>.wav",
    "<img src=x onerror=window.pwned=1>\".wav'",
    "new\nline\tand & <!--data--><!--title-->.wav",
    "ünï \u2028\u202e code \U0001f3b5.wav",
    "lost\udcff\x1b]0;pwned\x07.wav",
    "__proto__",
]


def metric(name: str, better: str = "higher", unit: str = "", modality: str = "audio") -> Metric:
    return Metric(
        name=name, label=name.upper(), unit=unit, better=better, modality=modality, source="book"
    )


def make_scores(
    values: dict[str, dict[str, list[float]]],
    *,
    metrics: list[Metric] | None = None,
    files: list[str] | None = None,
    counts: dict[str, np.ndarray] | None = None,
    modality: str = "audio",
    failed: list[str] | None = None,
    settings: dict[str, str] | None = None,
) -> Scores:
    """System -> metric -> values of the files."""
    names = list(dict.fromkeys(name for system in values.values() for name in system))
    n_files = max(len(found) for system in values.values() for found in system.values())
    files = files or [f"clip{i:02}.wav" for i in range(n_files)]
    systems, rows = [], []
    for system, table in values.items():
        used = (counts or {}).get(system)
        systems.append(
            SystemScores(
                name=system,
                identity="1",
                delay=0.0065,
                summaries={name: Summary.of(found) for name, found in table.items()},
                codebook={}
                if used is None
                else {"tokens": 9, "entropy": 2.5, "perplexity": 5.7, "cvu": 0.7, "used": 0.9},
                counts=used,
                codebook_size=None if used is None else len(used),
            )
        )
        for i, file in enumerate(files):
            row = {name: found[i] for name, found in table.items()}
            rows.append(Row(system, file, 0.0, 1.0, None, "", row))
    return Scores(
        modality=modality,
        systems=systems,
        rows=rows,
        metrics=metrics or [metric(name, modality=modality) for name in names if name != "bitrate"],
        unavailable={},
        failed=failed or [],
        settings=settings or {"References": "folder"},
    )


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return wave.astype(np.float32)[None]


def written(folder: Path, scores: Scores, examples: list[Example] = (), **options: Any) -> str:
    write_report(folder / "report.html", scores, list(examples), **options)
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags with their attributes, and the text of each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))


def embedded(page: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text, parse_constant=refuse)


def unpack(address: str, modality: str) -> bytes:
    head = f"data:{modality};base64,"
    assert address.startswith(head)
    return base64.b64decode(address[len(head) :], validate=True)


def sound(address: str) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(unpack(address, "audio/wav"))) as file:
        assert file.getsampwidth() == 2
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()).T / 2**15, file.getframerate()


def unpack_png(address: str) -> Image.Image:
    image = Image.open(io.BytesIO(unpack(address, "image/png")))
    image.load()
    return image


def indices(address: str) -> np.ndarray:
    """The places in the row of colours, low frequencies first."""
    image = unpack_png(address)
    assert image.mode == "P"
    return np.asarray(image)[::-1].astype(int)


def one_example(folder: Path, example: Example, modality: str = "audio") -> dict[str, Any]:
    scores = make_scores(
        {name: {"a": [1.0]} for name in example.decoded}, files=[example.file], modality=modality
    )
    return embedded(written(folder, scores, [example]))["examples"][0]


def audio_example(reference: np.ndarray, decoded: np.ndarray, rate: int = RATE) -> Example:
    return Example("best", "clip.wav", "", rate, reference, {"codec": decoded})


def test_the_original_comes_last_and_keeps_its_values(tmp_path):
    scores = make_scores({ORIGINAL: {"a": [1.0]}, "x": {"a": [2.0]}, "y": {"a": [3.0]}})
    clip = Example("best", "clip00.wav", "", RATE, tone(440), {"x": tone(440), "y": tone(440)})
    data = embedded(written(tmp_path, scores, [clip]))
    assert [system["name"] for system in data["systems"]] == ["x", "y", ORIGINAL]
    assert [values["a"] for values in data["values"]] == [[2], [3], [1]]
    assert [index for index, _ in data["examples"][0]["scores"]] == [0, 1]


def test_facts_are_shown_beside_the_settings(tmp_path):
    scores = make_scores({"x": {"a": [1.0]}}, settings={"files": "1"})
    write_report(tmp_path / "r.html", scores, [], facts={"command": "vpcodec score '<a>'"})
    data = embedded((tmp_path / "r.html").read_text())
    assert data["settings"] == [["files", "1"], ["command", "vpcodec score '<a>'"]]


# ---- choosing examples


def test_best_median_and_worst_are_judged_by_the_first_metric_with_a_better_way():
    scores = make_scores(
        {
            "x": {"none": [9, 8, 7, 6, 5], "empty": [math.nan] * 5, "pesq": [1, 2, 3, 4, 5]},
            "y": {"none": [9, 8, 7, 6, 5], "empty": [math.nan] * 5, "pesq": [3, 2, 3, 2, 5]},
        },
        metrics=[metric("none", ""), metric("empty"), metric("pesq", unit="MOS")],
    )
    assert choose_examples(scores) == [
        ("best", "clip04.wav", "PESQ 5.00 MOS on average of 2 systems"),
        ("median", "clip03.wav", "PESQ 3.00 MOS on average of 2 systems"),
        ("worst", "clip01.wav", "PESQ 2.00 MOS on average of 2 systems"),
    ]


@pytest.mark.parametrize(
    "better, order",
    [("higher", [3, 2, 4]), ("lower", [4, 2, 3]), ("zero", [0, 1, 4])],
)
def test_each_direction_has_its_own_order(better, order):
    scores = make_scores({"x": {"d": [0.1, 0.5, 0.2, 4.0, -7.0]}}, metrics=[metric("d", better)])
    found = choose_examples(scores)
    assert [title for title, _, _ in found] == ["best", "median", "worst"]
    assert [file for _, file, _ in found] == [f"clip{i:02}.wav" for i in order]
    assert found[0][2].endswith("with x")


def test_differences_of_systems_do_not_cancel():
    values = {"x": {"d": [3.0, 1.0]}, "y": {"d": [-3.0, 1.0]}}
    scores = make_scores(values, metrics=[metric("d", "zero")])
    assert [file for _, file, _ in choose_examples(scores)] == ["clip01.wav", "clip00.wav"]


@pytest.mark.parametrize("n, titles", [(1, ["best"]), (2, ["best", "worst"])])
def test_few_files_give_few_examples(n, titles):
    found = choose_examples(make_scores({"x": {"a": [1.0, 2.0][:n]}}))
    assert [title for title, _, _ in found] == titles
    assert len({file for _, file, _ in found}) == n


def test_more_examples_lie_evenly_between_the_best_and_the_worst():
    scores = make_scores({"x": {"a": [float(i) for i in range(9)]}})
    found = [(title, file) for title, file, _ in choose_examples(scores, 5)]
    assert found == [
        ("best", "clip08.wav"),
        ("3 of 9", "clip06.wav"),
        ("median", "clip04.wav"),
        ("7 of 9", "clip02.wav"),
        ("worst", "clip00.wav"),
    ]
    assert len(choose_examples(scores, 50)) == 9
    assert [title for title, _, _ in choose_examples(scores, 1)] == ["best"]


def test_files_that_a_system_lacks_and_the_original_are_not_compared():
    nan = math.nan
    scores = make_scores(
        {
            ORIGINAL: {"a": [9.0, 9.0, 9.0, 9.0, 9.0]},
            "x": {"a": [5.0, 4.0, 3.0, 2.0, nan]},
            "y": {"a": [nan, 4.0, 3.0, 2.0, 1.0]},
        }
    )
    assert [file for _, file, _ in choose_examples(scores)] == [
        "clip01.wav",
        "clip02.wav",
        "clip03.wav",
    ]


def test_without_a_judging_metric_there_are_no_examples():
    scores = make_scores({"x": {"a": [1.0], "bitrate": [1.0]}}, metrics=[metric("a", "")])
    assert choose_examples(scores) == []
    rate = make_scores({"x": {"bitrate": [1.0]}}, metrics=[metric("bitrate", "lower")])
    assert choose_examples(rate) == []


# ---- the page without a browser


def test_the_numbers_of_the_page_are_those_of_the_scores(tmp_path):
    values = {"x": {"bitrate": [2990.0, 3010.0], "a": [1.25, 2.75]}, "y": {"a": [0.5, math.nan]}}
    data = embedded(written(tmp_path, make_scores(values), title="Two"))
    assert data["title"] == "Two"
    x, y = data["systems"]
    assert x["summaries"]["bitrate"]["mean"] == 3000
    assert x["summaries"]["a"] == pytest.approx(vars(Summary.of([1.25, 2.75])), rel=1e-5)
    assert y["summaries"]["a"]["missing"] == 1 and y["summaries"]["a"]["low"] is None
    assert data["files"] == ["clip00.wav", "clip01.wav"]
    assert [table["a"] for table in data["values"]] == [[1.25, 2.75], [0.5, None]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # statistics of infinities
def test_what_is_no_number_in_json_is_written_otherwise(tmp_path):
    scores = make_scores({"x": {"a": [math.inf, -math.inf, math.nan], "b": [math.nan] * 3}})
    data = embedded(written(tmp_path, scores))
    assert data["values"][0]["a"] == ["Infinity", "-Infinity", None]
    assert data["systems"][0]["summaries"]["b"]["mean"] is None


def test_hostile_names_stay_text(tmp_path):
    plain = make_scores({"x": {"a": [1.0] * 6}})
    hostile = make_scores(
        {HOSTILE[0]: {"a": [1.0] * 6}},
        files=HOSTILE,
        failed=HOSTILE,
        settings=dict(zip(HOSTILE, HOSTILE)),
    )
    clip = Example(HOSTILE[1], HOSTILE[2], HOSTILE[3], RATE, tone(440), {HOSTILE[0]: tone(440)})
    page = written(tmp_path, hostile, [clip], title=HOSTILE[0])
    assert Outline(page).tags == Outline(written(tmp_path, plain)).tags
    assert ("title", HOSTILE[0]) in Outline(page).texts
    data = embedded(page)
    shown = [*HOSTILE[:3], *map(escape, HOSTILE[3:])]
    assert not re.search("[\x00-\x08\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "".join(data["failed"]))
    assert sorted(data["files"]) == sorted(shown)
    assert data["failed"] == shown
    assert dict(data["settings"]) == dict(zip(shown, shown))
    assert data["systems"][0]["name"] == data["title"] == HOSTILE[0]
    assert data["examples"][0]["file"] == HOSTILE[2]


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = written(tmp_path, make_scores({"x": {"a": [1.0]}}))
    outline = Outline(page)
    assert not [tag for tag, attributes in outline.tags if {"src", "href"} & set(attributes)]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
    addresses = set(re.findall(r"\w+://[^\s\"']+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing loads
    [policy] = [
        attributes["content"]
        for _, attributes in outline.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("style-src") == rules.pop("script-src") == "'unsafe-inline'"
    assert rules.pop("img-src") == rules.pop("media-src") == "data:"
    assert set(rules.values()) == {"'none'"}


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    scores = make_scores({"x": {"a": [1.0]}})
    before = written(tmp_path, scores)
    broken = Example("best", "clip00.wav", "", RATE, tone(440), {"x": tone(440)[0]})
    with pytest.raises((ValueError, IndexError)):
        written(tmp_path, scores, [broken])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "absent" / "report.html", scores, [])


def test_many_files_are_thinned_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_FILES", 4)
    values = [float(i) for i in range(11)]
    data = embedded(written(tmp_path, make_scores({"x": {"a": values}})))
    assert data["n_files"] == 11
    assert data["values"][0]["a"] == [0, 3, 6, 9]


# ---- sounds


def test_sounds_are_the_samples_at_16_bits(tmp_path):
    random = np.random.default_rng(0)
    reference = random.uniform(-1, 1, (2, 4410)).astype(np.float32)
    decoded = 1.5 * reference
    found = one_example(tmp_path, audio_example(reference, decoded, 44_100))
    samples, rate = sound(found["reference"]["sound"])
    assert rate == 44_100 and found["seconds"] == found["whole_seconds"] == 0.1
    np.testing.assert_allclose(samples, reference, atol=2**-15)
    samples, _ = sound(found["decoded"][0]["sound"])
    np.testing.assert_allclose(samples, np.clip(decoded, -1, 1), atol=2**-15)


def test_long_sounds_are_cut_and_many_channels_mixed(tmp_path):
    rate = 1000
    reference = np.stack([tone(50, 25, rate)[0], *np.zeros((2, 25 * rate), np.float32)])
    found = one_example(tmp_path, audio_example(reference, reference, rate))
    samples, _ = sound(found["decoded"][0]["sound"])
    assert samples.shape == (1, 20 * rate)
    np.testing.assert_allclose(samples[0], reference[0, : 20 * rate] / 3, atol=2**-15)
    assert (found["seconds"], found["whole_seconds"]) == (20, 25)


def test_many_sounds_share_what_a_page_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_AUDIO_BYTES", 2 * 2 * RATE * 3)  # 3 s of each of the two
    found = one_example(tmp_path, audio_example(tone(440, 5), tone(440, 5)))
    assert found["seconds"] == 3
    assert sound(found["reference"]["sound"])[0].shape[1] == 3 * RATE


@pytest.mark.parametrize("n", [0, 1, 10])
def test_very_short_sounds_and_broken_ones_have_their_place(tmp_path, n):
    broken = np.full((1, n), np.nan, np.float32)
    found = one_example(tmp_path, audio_example(np.zeros((1, n), np.float32), broken))
    assert sound(found["decoded"][0]["sound"])[0].shape == (1, n)
    assert indices(found["decoded"][0]["picture"]).max() == 0


# ---- spectrograms


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_tone_is_a_line_at_its_frequency(tmp_path, rate, share):
    reference = tone(share * rate / 2, 3, rate)
    found = one_example(tmp_path, audio_example(reference, reference, rate))
    drawn = indices(found["reference"]["picture"])
    bands, columns = drawn.shape
    assert 90 <= bands <= 200 and 100 <= columns <= 600
    assert found["top"] == rate / 2
    brightest = drawn[:, columns // 2].argmax()
    assert abs((brightest + 0.5) / bands - share) < 1.5 / bands
    assert drawn.max() == 64


def test_levels_are_decibels_below_the_loudest_of_the_reference(tmp_path):
    loud = tone(1000) + tone(3000, level=0.005)  # 40 dB less
    found = one_example(tmp_path, audio_example(loud, 0.1 * loud))
    for address, decibels in (
        (found["reference"]["picture"], -40),
        (found["decoded"][0]["picture"], -60),
    ):
        drawn = indices(address)
        band = len(drawn) * 3000 // 8000
        level = drawn[band - 2 : band + 3, drawn.shape[1] // 2].max()
        assert level == pytest.approx(64 * (1 + decibels / 80), abs=1)


def test_differences_say_what_is_lost_and_what_is_added(tmp_path):
    low, high = tone(1000), tone(6000)

    def change(reference: np.ndarray, decoded: np.ndarray, hertz: float) -> float:
        """dB, as it is drawn."""
        found = one_example(tmp_path, audio_example(reference, decoded))
        drawn = indices(found["decoded"][0]["difference"])
        index = drawn[int(len(drawn) * hertz / 8000), drawn.shape[1] // 2]
        return (index / 32 - 1) * report.DIFFERENCE

    step = report.DIFFERENCE / 32
    assert change(low + high, low + 0.1 * high, 1000) == 0
    assert change(low + high, low + 0.1 * high, 6000) == pytest.approx(-20, abs=step)
    assert change(low + 0.1 * high, low + high, 6000) == pytest.approx(20, abs=step)
    same = one_example(tmp_path, audio_example(low, low))["decoded"][0]["difference"]
    assert set(indices(same).ravel()) == {32}


def test_the_difference_of_noises_alike_is_small_everywhere(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.normal(0, 0.1, (2, 1, 4 * RATE)).astype(np.float32)
    found = one_example(tmp_path, audio_example(x, y))
    drawn = indices(found["decoded"][0]["difference"])
    assert np.abs(drawn - 32).mean() < 4  # without means over neighbours it is 9
    assert found["blur"] == pytest.approx([4 / 0.024, 4 * 107 / RATE], rel=1e-3)


def test_colours_are_ordered_by_lightness(tmp_path):
    found = one_example(tmp_path, audio_example(tone(440), tone(440)))

    def lightness(address: str) -> np.ndarray:
        colours = np.array(unpack_png(address).getpalette()[: 3 * 65]).reshape(-1, 3) / 255
        linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    assert (np.diff(lightness(found["reference"]["picture"])) > 0).all()
    difference = lightness(found["decoded"][0]["difference"])
    assert (np.diff(difference[:33]) < 0).all() and (np.diff(difference[32:]) > 0).all()
    assert difference[0] == pytest.approx(difference[-1], abs=0.1)


# ---- images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_are_kept_as_they_are(tmp_path, channels):
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (20, 30, channels), np.uint8)
    decoded = np.clip(reference.astype(int) + random.integers(-9, 10, reference.shape), 0, 255)
    example = Example("best", "x.png", "", None, reference, {"codec": decoded.astype(np.uint8)})
    found = one_example(tmp_path, example, "image")
    for address, pixels in (
        (found["reference"]["picture"], reference),
        (found["decoded"][0]["picture"], decoded),
    ):
        assert np.array_equal(np.asarray(unpack_png(address)).reshape(pixels.shape), pixels)
    error = np.abs(decoded - reference).mean(axis=2)
    shown = np.asarray(unpack_png(found["decoded"][0]["difference"]))
    np.testing.assert_allclose(shown, np.minimum(report.GAIN * error, 255), atol=0.5)
    assert found["size"] == found["whole_size"] == [30, 20]


def test_large_images_show_their_middle(tmp_path):
    reference = np.zeros((700, 600, 3), np.uint8)
    reference[350, 300] = 255
    example = Example("best", "x.png", "", None, reference, {"codec": reference})
    found = one_example(tmp_path, example, "image")
    pixels = np.asarray(unpack_png(found["reference"]["picture"]))
    assert pixels.shape == (512, 512, 3) and pixels[256, 256].all()
    assert (found["size"], found["whole_size"]) == ([512, 512], [600, 700])


# ---- codebooks


def test_a_large_codebook_takes_a_short_histogram(tmp_path):
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, 250_048)
    counts = random.multinomial(400_000, random.permutation(shares / shares.sum()))
    scores = make_scores({"x": {"a": [1.0]}}, counts={"x": counts})
    page = written(tmp_path, scores)
    usage = embedded(page)["systems"][0]["usage"]
    ranks, shares = np.array(usage["ranks"]), np.array(usage["shares"])
    assert len(shares) <= 160 and len(page) < 100_000
    assert ranks[0] == 1 and ranks[-1] == (counts > 0).sum() + 1
    assert (np.diff(shares) <= 0).all()
    assert (shares * np.diff(ranks)).sum() == pytest.approx(1, rel=1e-4)
    assert shares[0] == pytest.approx(counts.max() / counts.sum(), rel=1e-5)


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([0, 0, 0], None),
        ([0, 4, 0], {"ranks": [1, 2], "shares": [1.0]}),
        ([1, 0, 3], {"ranks": [1, 2, 3], "shares": [0.75, 0.25]}),
    ],
)
def test_small_codebooks_are_given_code_by_code(tmp_path, counts, expected):
    scores = make_scores({"x": {"a": [1.0]}}, counts={"x": np.array(counts)})
    assert embedded(written(tmp_path, scores))["systems"][0]["usage"] == expected


# ---- size


@pytest.fixture
def busy(speech) -> tuple[Scores, list[Example]]:
    """Four systems, 46 files, three examples of 6 s; hostile names among them."""
    random = np.random.default_rng(0)
    reference = np.resize(speech, (1, 6 * RATE))
    systems = ["speech-3k", "opus@6k", "opus@8k", HOSTILE[0]]
    values = {}
    for i, name in enumerate(systems):
        quality = random.normal(2 + 0.4 * i, 0.3, 46)
        quality[:i] = math.nan
        values[name] = {
            "bitrate": list(random.normal(3000 * (i + 1), 50, 46)),
            "pesq": list(quality),
            "stoi": list(quality / 5),
            "mel": list(1 / (2 + i) + random.normal(0, 0.02, 46)),
            "gain": list(random.normal(0, 0.5, 46)),
        }
    del values[HOSTILE[0]]["bitrate"]
    metrics = [metric("pesq", unit="MOS"), metric("stoi"), metric("mel", "lower")]
    names = [*HOSTILE, *(f"folder/a rather long name of a clip {i}.flac" for i in range(40))]
    counts = random.multinomial(20_000, random.dirichlet(np.full(4096, 0.3)))
    scores = make_scores(
        values,
        metrics=[*metrics, metric("gain", "zero", unit="LU")],
        files=names,
        counts={"speech-3k": counts},
        failed=[f"{HOSTILE[2]}: truncated"],
    )
    examples = []
    for i, title in enumerate(["best", "median", "worst"]):
        decoded = {
            name: (reference + random.normal(0, 0.01, reference.shape)).astype(np.float32)
            for name in systems
        }
        examples.append(Example(title, names[i], "PESQ 2.31", RATE, reference, decoded))
    return scores, examples


def test_three_examples_of_four_systems_take_less_than_6_mb(tmp_path, busy):
    assert len(written(tmp_path, *busy)) < 6e6


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_browser() is None:
        pytest.skip("needs chromium or google-chrome to draw pages, and there is none")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


SPOILT = """[...document.querySelectorAll("svg *")].flatMap((mark) => [...mark.attributes])
    .filter((attribute) => /NaN|undefined|Infinity/.test(attribute.value))
    .map((attribute) => attribute.value)"""
ROWS = """[...document.querySelectorAll("#results tr")]
    .map((row) => [...row.cells].map((cell) => cell.innerText))"""
BEST = """[...document.querySelectorAll("td.best")]
    .map((cell) => [cell.parentNode.cells[0].firstChild.textContent, cell.cellIndex])"""
FIRST_POINT = """document.querySelector("#files svg").scrollIntoView(),
    document.querySelector("#files .point").getBoundingClientRect().toJSON()"""
CHOOSE_SECOND_UP = """{
    const [, , up] = document.querySelectorAll("#files select");
    up.value = 1;
    up.dispatchEvent(new Event("change"));
}"""
DURATIONS = """Promise.all([...document.querySelectorAll("audio")].map((audio) =>
    audio.readyState ? audio.duration : new Promise((resolve, reject) => {
        audio.onloadedmetadata = () => resolve(audio.duration);
        audio.onerror = () => reject(audio.error.message);
    })))"""
PLAYED = """(async () => {
    const [first, second] = document.querySelectorAll("audio");
    await first.play();
    await second.play();
    while (!second.currentTime) await new Promise(requestAnimationFrame);
    const states = [first.paused, second.paused];
    second.pause();
    return states;
})()"""


def show(browser: Browser, page: str, folder: Path, **options: Any) -> None:
    path = folder / "shown.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path, **options)
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]
    assert browser.evaluate(SPOILT) == []


def overflow(browser: Browser) -> int:
    """Pixels by which the page is wider than the screen."""
    root = "document.documentElement"
    return browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth")


def text(browser: Browser, selector: str) -> list[str]:
    return browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
    )


def total(browser: Browser, selector: str) -> int:
    return browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_the_page_draws_everything_and_plays(tmp_path, busy, browser):
    show(browser, written(tmp_path, *busy), tmp_path)
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert total(browser, "script") == 2
    assert browser.evaluate(DURATIONS) == pytest.approx([6.0] * 15, abs=1e-3)
    assert browser.evaluate(PLAYED) == [True, False]  # one at a time
    loaded = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    assert browser.evaluate(loaded) and total(browser, "img") == 3 * (1 + 2 * 4)

    # four metrics, of three systems with a rate and one without
    assert total(browser, "#rate .chart") == 4
    assert total(browser, "#rate .chart .point") == total(browser, "#rate .chart .interval") == 12
    assert total(browser, "#rate .chart .unknown") == 4
    assert total(browser, "#files .point") == 46 - 1  # one lacks PESQ
    assert total(browser, "#codebooks .usage") == 1
    assert not re.search(
        r"NaN|undefined|null|\[object", browser.evaluate("document.body.innerText")
    )

    assert set(HOSTILE[:3]) == set(text(browser, "#examples .file"))
    assert f"{HOSTILE[2]}: truncated" in text(browser, "#problems li")
    heads = text(browser, "#results thead th")
    assert heads == ["speech-3k", "opus@6k", "opus@8k", HOSTILE[0]]


def test_the_table_shows_means_marks_the_best_and_tells_more_on_demand(tmp_path, browser):
    scores = make_scores(
        {
            ORIGINAL: {"up": [9.0, 9.0]},
            "x": {
                "bitrate": [3000.0, 3000.0],
                "up": [1.0, 2.0],
                "down": [0.25, 0.35],
                "zero": [-0.5, -0.5],
                "nought": [0.5, 0.5],
            },
            "y": {
                "bitrate": [6000.0, 6200.0],
                "up": [2.0, math.nan],
                "down": [0.5, 0.5],
                "zero": [1.5, 1.5],
                "nought": [-1.5, -1.5],
            },
        },
        metrics=[
            metric("up", unit="MOS"),
            metric("down", "lower"),
            metric("zero", "zero"),
            metric("nought", "zero"),
        ],
    )
    show(browser, written(tmp_path, scores), tmp_path)
    rows = {name: cells for name, *cells in browser.evaluate(ROWS)}
    assert [cell.split("\n")[0] for cell in rows["Bit rate\nbit/s"]] == ["3,000", "6,100", "–"]
    [name] = [name for name in rows if name.startswith("UP")]
    assert "higher is better" in name
    assert rows[name][0].startswith("1.500") and rows[name][2].startswith("9.000")
    assert "1 missing" in rows[name][1] and "best" in rows[name][1]
    assert browser.evaluate(BEST) == [["UP", 2], ["DOWN", 1], ["ZERO", 1], ["NOUGHT", 1]]
    assert "median" not in "".join(rows[name])
    browser.evaluate("document.querySelector('#results input').click()")
    assert "median 1.500" in browser.evaluate("document.querySelector('#results').innerText")


def test_the_scatter_names_files_to_mouse_and_keyboard(tmp_path, browser):
    scores = make_scores(
        {"x": {"a": [1.0, 2.0, 3.0]}, "y": {"a": [2.0, 1.0, 4.0]}}, files=HOSTILE[:3]
    )
    show(browser, written(tmp_path, scores), tmp_path)
    assert "x is better than y in 1 of 3 files." in text(browser, "#files p")[-1]
    spot = browser.evaluate(FIRST_POINT)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=spot["x"] + 6, y=spot["y"] + 2)
    assert text(browser, "output .file") == [HOSTILE[0]]
    assert text(browser, "output div") == ["x: 1.000", "y: 2.000"]
    browser.evaluate("document.querySelector('#files svg').focus()")
    seen = []
    for key in ("ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowUp"):  # along y, which lies across
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        seen += text(browser, "output .file")
    assert seen == [HOSTILE[i] for i in (1, 1, 0, 2)]
    browser.evaluate(CHOOSE_SECOND_UP)
    assert total(browser, "#files .point") == 3  # y against itself


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_both_themes(tmp_path, busy, browser, dark):
    show(browser, written(tmp_path, *busy), tmp_path, width=360, height=800, dark=dark)
    assert overflow(browser) <= 0
    assert browser.evaluate("innerWidth") == 360
    table = "document.querySelector('#results .scroll')"
    assert browser.evaluate(f"{table}.scrollWidth > {table}.clientWidth")  # in its own box
    shown = tmp_path / "shot.png"
    browser.screenshot(shown, whole=False)
    pixels = np.asarray(Image.open(shown).convert("L"))
    paper = np.bincount(pixels.ravel()).argmax()
    assert paper < 60 if dark else paper > 230
    assert (np.abs(pixels.astype(int) - paper) > 100).mean() > 0.01  # text upon it


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # statistics of infinities
def test_a_single_system_without_rates_or_sounds_is_a_page_too(tmp_path, browser):
    scores = make_scores({"only": {"a": [3.0, math.inf, 1.0], "b": [1.0, math.nan, 2.0]}})
    show(browser, written(tmp_path, scores), tmp_path, width=360, height=800)
    assert overflow(browser) <= 0
    assert "∞" in text(browser, "#results td")[-2]
    assert total(browser, "#files .point") == 2
    assert total(browser, "#rate") == 0  # nothing to compare
    assert total(browser, "#examples") == total(browser, "#codebooks") == 0
    nothing = make_scores({"only": {"a": [math.nan]}})
    show(browser, written(tmp_path, nothing), tmp_path)
    assert total(browser, "#results td") >= 1


def test_images_are_shown_with_their_differences(tmp_path, picture, browser):
    scores = make_scores(
        {
            "jpeg": {"bits_per_pixel": [0.5, 0.6], "psnr": [30.0, 31.0]},
            "webp": {"bits_per_pixel": [0.5, 0.7], "psnr": [31.0, 32.0]},
        },
        metrics=[metric("psnr", unit="dB", modality="image")],
        modality="image",
    )
    large, small = picture(600, 700), picture(32, 32)
    examples = [
        Example("best", "a.png", "", None, large, {"jpeg": large // 2}),
        Example("worst", "b.png", "", None, small, {"jpeg": small}),
    ]
    show(browser, written(tmp_path, scores, examples), tmp_path, width=360, height=800)
    assert overflow(browser) <= 0
    assert (
        browser.evaluate("[...document.images].map((i) => i.naturalWidth)") == [512] * 3 + [32] * 3
    )
    assert "The middle 512 × 512 of 700 × 600 pixels." in text(browser, "#examples p")[1]
    assert total(browser, "#rate .point") == 2 and total(browser, "audio") == 0
