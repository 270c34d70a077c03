"""Scoring of files, from Python and from the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ENOUGH, MODULE, run

from vpcodec.media.audio import load, save
from vpcodec.media.image import save_image
from vpcodec.metrics import neural
from vpcodec.scoring.bench import Bench, Job, cache_key
from vpcodec.scoring.run import Scoring, build_systems, score
from vpcodec.scoring.scores import ORIGINAL, Row
from vpcodec.scoring.systems import Coded, ScoreError, System

pytestmark = pytest.mark.slow

LIGHT = ("snr", "si_sdr")  # need no package


@pytest.fixture
def folders(tmp_path, monkeypatch, speech) -> Path:
    """`ref` with four clips, `same` with equal ones, `late` with ones delayed by 37 samples and
    `noisy` with ones of 20 dB; the current folder is above."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for i in range(4):
        clip = speech[:, 16_000 * i : 16_000 * i + 20_000]
        noise = random.normal(size=clip.shape).astype(np.float32)
        noise *= 0.1 * np.sqrt(np.mean(clip**2) / np.mean(noise**2))
        late = np.concatenate([np.zeros((1, 37), np.float32), clip], 1)
        for name, samples in {
            "ref": clip, "same": clip, "late": late, "noisy": clip + noise
        }.items():  # fmt: skip
            folder = Path(name, "sub" if i == 3 else "")
            folder.mkdir(parents=True, exist_ok=True)
            save(folder / f"{i}.wav", samples, 16_000, subtype="FLOAT")
    return tmp_path


def systems(*decoded: str) -> list[System]:
    return build_systems("ref", decoded)


def test_a_folder_against_itself_is_perfect(folders):
    found = score("ref", "same", metrics=LIGHT)
    assert [system.name for system in found.systems] == ["same"]
    summary = found.systems[0].summaries["si_sdr"]
    assert (summary.n, summary.missing) == (4, 0) and summary.mean > 100
    assert found.systems[0].delay == 0
    assert [row.file for row in found.rows] == ["0.wav", "1.wav", "2.wav", "sub/3.wav"]
    assert not found.failed


def test_noise_of_20_db_is_20_db(folders):
    found = score("ref", "noisy", metrics=LIGHT)
    assert found.systems[0].summaries["snr"].mean == pytest.approx(20, abs=0.01)


def test_a_constant_delay_is_found_reported_and_removed(folders):
    found = score("ref", "late", metrics=LIGHT).systems[0]
    assert found.delay == pytest.approx(37 / 16_000)
    assert found.summaries["snr"].mean > 100
    as_it_is = score("ref", "late", metrics=LIGHT, align="none").systems[0]
    assert as_it_is.delay is None and as_it_is.summaries["snr"].mean < 10


@pytest.mark.parametrize("align", ["codec", "file"])
@pytest.mark.parametrize("what", ["out of reach", "another recording"])
def test_no_delay_is_removed_where_nothing_is_known_of_it(folders, speech, align, what):
    """And that is said; speech that was 150 ms late had 89 ms removed."""
    late = np.concatenate([np.zeros((1, 2_400), np.float32), speech], 1)
    other = np.random.default_rng(9).normal(0, 0.1, speech.shape).astype(np.float32)
    save("a.wav", speech, 16_000, subtype="FLOAT")
    save("b.wav", {"out of reach": late, "another recording": other}[what], 16_000)
    found = score("a.wav", "b.wav", metrics=LIGHT, align=align)
    assert found.systems[0].delay == 0 and found.rows[0].delay == 0
    (note,) = found.notes
    assert note.startswith("b.wav: no delay was removed")
    assert note in found.to_text() and found.to_dict()["notes"] == [note]


def test_of_files_of_which_nothing_is_known_the_number_is_said(folders, speech):
    Path("a").mkdir()
    Path("b").mkdir()
    for name, delay in (("1", 0), ("2", 100), ("3", 4_800)):
        save(f"a/{name}.wav", speech, 16_000, subtype="FLOAT")
        late = np.concatenate([np.zeros((1, delay), np.float32), speech], 1)
        save(f"b/{name}.wav", late, 16_000, subtype="FLOAT")
    found = score("a", "b", metrics=LIGHT, align="file")
    assert [round(row.delay * 16_000) for row in found.rows] == [0, 100, 0]
    assert "b: no delay was removed from 1 of 3 files" in found.to_text()
    assert not score("a/1.wav", "b/2.wav", metrics=LIGHT).notes


def test_all_metrics_offline_are_those_that_need_no_net(folders, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("cache").absolute()))
    neural._session.cache_clear()
    scoring = Scoring("ref/0.wav", build_systems("ref/0.wav", ["same/0.wav"]), metrics="all")
    assert "utmos" not in scoring.job.metrics  # nor in other processes
    arguments = ["score", "ref/0.wav", "same/0.wav", "--jsonl", "x.jsonl", "--metrics"]
    result = run(*arguments, "all")
    left_out = [line for line in result.err.splitlines() if "left out: utmos needs" in line]
    assert len(left_out) == 1
    row = json.loads(Path("x.jsonl").read_text().splitlines()[-1])
    assert "si_sdr" in row and "utmos" not in row
    line = run(*arguments, "all,utmos", check=2).err  # what is named is wanted
    assert line.startswith("vpcodec: utmos needs")


def test_delays_that_differ_need_one_for_each_file(folders):
    for i in range(3):
        samples, rate = load(f"ref/{i}.wav")
        late = np.concatenate([np.zeros((1, 100 * i), np.float32), samples], 1)
        save(f"late/{i}.wav", late, rate, subtype="FLOAT")
    found = score("ref", "late", metrics=LIGHT, align="file")
    assert found.systems[0].summaries["snr"].p5 > 100
    assert [round(row.delay * 16_000) for row in found.rows] == [0, 100, 200, 37]


def test_a_codec_with_a_delay_need_not_put_out_the_end(folders):
    for i in range(3):
        samples, rate = load(f"late/{i}.wav")
        save(f"late/{i}.wav", samples[:, :20_000], rate, subtype="FLOAT")
    found = score("ref", "late", metrics=LIGHT)
    assert found.systems[0].delay == pytest.approx(37 / 16_000)
    assert found.systems[0].summaries["snr"].p5 > 100


def test_what_a_codec_drops_at_the_end_counts(folders):
    for i in range(3):
        samples, rate = load(f"ref/{i}.wav")
        save(f"same/{i}.wav", samples[:, :19_000], rate, subtype="FLOAT")
    assert score("ref", "same", metrics=["snr"]).rows[0].values["snr"] < 40


def test_the_delay_of_a_rate_that_was_not_looked_at_is_that_of_the_others(folders, monkeypatch):
    from vpcodec.media.audio import resample

    monkeypatch.setattr("vpcodec.scoring.run.DELAY_FILES", 2)  # 0.wav and sub/3.wav
    samples, rate = load("ref/1.wav")
    slow = resample(samples, rate, 8000)
    save("ref/1.wav", slow, 8000, subtype="FLOAT")
    late = np.concatenate([np.zeros((1, 18), np.float32), slow], 1)
    save("late/1.wav", late, 8000, subtype="FLOAT")
    found = score("ref", "late", metrics=["snr"])
    assert found.rows[1].values["snr"] > 100 and found.rows[1].delay == 18 / 8000


def test_level_is_matched_on_request_only(folders):
    for i in range(3):
        samples, rate = load(f"ref/{i}.wav")
        save(f"same/{i}.wav", 0.5 * samples, rate, subtype="FLOAT")
    os.remove("same/sub/3.wav")
    plain = score("ref", "same", metrics=["snr"]).systems[0]
    assert plain.summaries["snr"].mean == pytest.approx(6.02, abs=0.01)
    assert score("ref", "same", metrics=["snr"], level=True).systems[0].summaries["snr"].mean > 80


def test_processes_find_what_one_finds(folders):
    alone = score("ref", "late", "noisy", metrics=LIGHT)
    together = score("ref", "late", "noisy", metrics=LIGHT, jobs=2)
    assert [(row.system, row.file, row.delay, row.cache_key) for row in together.rows] == [
        (row.system, row.file, row.delay, row.cache_key) for row in alone.rows
    ]
    for row, expected in zip(together.rows, alone.rows, strict=True):
        assert row.values == pytest.approx(expected.values, rel=1e-6)  # sums by several threads


def test_channels_count_alone(folders, speech):
    os.makedirs("stereo")
    os.makedirs("stereo_out")
    clip = speech[:, :16_000]
    save("stereo/a.wav", np.concatenate([clip, clip]), 16_000, subtype="FLOAT")
    save("stereo_out/a.wav", np.concatenate([0.9 * clip, 0.5 * clip]), 16_000, subtype="FLOAT")
    found = score("stereo", "stereo_out", metrics=["snr"]).systems[0].summaries["snr"].mean
    assert found == pytest.approx((20 + 6.0206) / 2, abs=0.01)


def test_other_rates_are_brought_to_that_of_the_reference(folders):
    from vpcodec.media.audio import resample

    for i in range(3):
        samples, rate = load(f"ref/{i}.wav")
        save(f"same/{i}.wav", resample(samples, rate, 48_000), 48_000, subtype="FLOAT")
    found = score("ref", "same", metrics=["snr"]).rows
    assert min(row.values["snr"] for row in found) > 30


class Dying(System):
    """Kills its process on one file."""

    name, spec, modality, identity = "dying", "", "audio", "1"

    def _code(self, source: Path) -> Coded:
        if source.name == "1.wav":
            os._exit(3)
        return Coded(*load(source))


class Odd(System):
    """Fails in another way on each file."""

    name, spec, modality, identity = "odd", "", "audio", "1"

    def _code(self, source: Path) -> Coded:
        samples, rate = load(source)
        match source.name:
            case "0.wav":
                return Coded(np.concatenate([samples, samples]), rate)
            case "1.wav":
                return Coded(np.tile(samples, 3), rate)
            case "2.wav":
                return Coded(np.full_like(samples, np.nan), rate)
        raise ScoreError("the program\nfailed")


def test_a_process_that_dies_costs_only_its_file(folders):
    found = Scoring("ref", [Dying()], metrics=LIGHT, jobs=2).run()
    assert [row.file for row in found.rows] == ["0.wav", "2.wav", "sub/3.wav"]
    assert found.failed == ["1.wav: the process that scored it died"]


def test_files_that_cannot_be_compared_are_named_and_the_rest_goes_on(folders):
    found = Scoring("ref", [Odd(), *systems("same")], metrics=LIGHT).run()
    assert len(found.failed) == 4
    assert found.failed[0] == "odd: 0.wav: 2 channels came out of 1"
    assert "1.wav: 3.75 s came out of 1.25 s" in found.failed[1]
    assert "NaN" in found.failed[2]
    assert "\n" not in found.failed[3] and "the program failed" in found.failed[3]
    assert [row.system for row in found.rows] == ["same"] * 4


def test_an_error_of_a_metric_costs_only_its_file(folders, monkeypatch):
    from vpcodec.metrics import audio

    plain = audio.snr

    def broken(x, y):
        if len(x) == 1000:
            raise RuntimeError("out of\nluck")
        return plain(x, y)

    monkeypatch.setattr(audio, "snr", broken)
    for folder in ("ref", "same"):
        save(f"{folder}/1.wav", np.ones((1, 1000), np.float32), 16_000)
    found = score("ref", "same", metrics=["snr"])
    assert found.failed == ["same: 1.wav: snr: RuntimeError: out of luck"]
    assert len(found.rows) == 3


def test_audio_and_images_do_not_compare(folders, picture):
    save_image("same/0.png", picture(8, 8))
    os.remove("same/0.wav")
    os.rename("same/0.png", "same/0.wav")
    [line] = score("ref", "same", metrics=["snr"]).failed
    assert "0.wav" in line and "image" in line


def test_originals_are_a_system_of_their_own_for_metrics_without_reference(folders):
    pytest.importorskip("speechmos", reason="needs the score extra")
    found = score("ref", "noisy", metrics=["snr", "dnsmos_bak"])
    assert [system.name for system in found.systems] == [ORIGINAL, "noisy"]
    assert list(found.systems[0].summaries) == ["dnsmos_bak"]
    original, noisy = (system.summaries["dnsmos_bak"].mean for system in found.systems)
    assert original > noisy


def test_what_pesq_refuses_is_missing_and_counted(folders):
    pytest.importorskip("pesq", reason="needs the score extra")
    for folder in ("ref", "same"):
        save(f"{folder}/0.wav", np.zeros((1, 16_000), np.float32), 16_000)  # no speech
        save(f"{folder}/1.wav", np.full((1, 1000), 0.1, np.float32), 16_000)  # too short
    found = run("score", "ref", "same", "--metrics", "pesq_wb", "--json").json
    [system] = found["systems"]
    summary = system["metrics"]["pesq_wb"]
    assert (summary["n"], summary["missing"]) == (2, 2) and summary["mean"] > 4.5
    assert found["failed"] == []


# -------------------------------------------------------------------------- resuming


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """The files that are measured, as they are."""
    from vpcodec.scoring.bench import Bench

    done, plain = [], Bench.work

    def counted(self, task):
        done.append(task.file)
        return plain(self, task)

    monkeypatch.setattr(Bench, "work", counted)
    return done


def score_lines(*more: str) -> list[dict]:
    run("score", "ref", "late", "--metrics", "snr", "--jsonl", "rows.jsonl", *more)
    return [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]


def test_lines_name_file_system_and_values(folders):
    lines = score_lines()
    assert [line["key"] for line in lines] == ["0.wav", "1.wav", "2.wav", "sub/3.wav"]
    assert {line["system"] for line in lines} == {"late"}
    assert all(line["snr"] > 100 and line["seconds"] == 1.25 for line in lines)


def test_a_run_that_was_cut_off_goes_on_where_it_was(folders, work):
    lines = score_lines()
    text = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text("".join(text.splitlines(True)[:2]) + '{"key": "2.wa')
    work.clear()
    assert score_lines("--resume") == lines
    assert work == ["2.wav", "sub/3.wav"]
    assert Path("rows.jsonl").read_text() == text


def test_a_file_that_changed_is_scored_again(folders, work):
    score_lines()
    shutil.copy("ref/1.wav", "late/1.wav")
    work.clear()
    assert score_lines("--resume")[1]["snr"] < 100
    assert work == ["1.wav"]


def test_a_new_metric_and_other_settings_score_again(folders, work):
    score_lines()
    work.clear()
    run("score", "ref", "late", "--metrics", "si_sdr", "--jsonl", "rows.jsonl", "--resume")
    run("score", "ref", "late", "--metrics", "si_sdr", "--align", "none", "--jsonl", "rows.jsonl",
        "--resume")  # fmt: skip
    assert len(work) == 8


def test_lines_of_other_systems_stay(folders, work):
    score_lines()
    work.clear()
    run("score", "ref", "noisy", "--metrics", "snr", "--jsonl", "rows.jsonl", "--resume")
    lines = Path("rows.jsonl").read_text().splitlines()
    assert {Row.from_json(line).system for line in lines} == {"late", "noisy"}
    assert len(lines) == 8 and len(work) == 4


def test_lines_that_no_longer_hold_go(folders, work):
    score_lines()
    Path("late/1.wav").write_text("broken")
    os.remove("late/2.wav")
    run("score", "ref", "late", "--metrics", "snr", "--jsonl", "rows.jsonl", "--resume", check=1)
    lines = Path("rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["0.wav", "sub/3.wav"]


def test_values_of_other_metrics_stay_while_they_hold(folders):
    score_lines()
    run("score", "ref", "late", "--metrics", "si_sdr", "--jsonl", "rows.jsonl", "--resume")
    lines = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all({"snr", "si_sdr"} <= set(line) for line in lines)


def test_a_file_of_something_else_is_not_taken_for_lines(folders):
    Path("notes.txt").write_text("my notes\nof years\n")
    command = ("score", "ref", "late", "--metrics", "snr", "--jsonl", "notes.txt", "--resume")
    assert "line 1" in run(*command, check=2).err
    assert Path("notes.txt").read_text() == "my notes\nof years\n"


def test_without_resume_a_file_of_lines_is_replaced(folders, work):
    score_lines()
    work.clear()
    assert len(score_lines()) == 4 and len(work) == 4


# ---------------------------------------------------------------------- command line


def test_models_and_codecs_stand_in_one_table(folders):
    if not shutil.which("opusenc"):
        pytest.skip("needs opusenc of opus-tools")
    command = ("score", "ref", "noisy", "--model", "speech-3k", "--codec", "opus@6k")
    result = run(*command, "--metrics", "snr", "--csv", "out.csv")
    header = result.out.decode().splitlines()[0].split()
    assert header == ["noisy", "speech-3k", "opus@6k"]
    table = {line.split("  ")[0]: line for line in result.out.decode().splitlines()[1:]}
    assert "bit rate" in " ".join(table).lower()
    n_lines = 1 + 3 + 2 + 1 + 3  # head, snr, bit rates, consistency, codebook
    assert Path("out.csv").read_text().count("\n") == n_lines
    found = run(*command, "--metrics", "snr", "--json").json
    _, model, opus = found["systems"]
    assert 0.75 * 2_989 < model["metrics"]["bitrate"]["mean"] < 2_989  # entropy coded
    assert opus["metrics"]["bitrate"]["mean"] > 6_000
    assert model["codebook"]["tokens"] == 4 * 209 and model["codebook_size"] == 250_047
    assert opus["codebook"] == {}


def test_codebook_figures_survive_resuming(folders):
    command = ("score", "ref", "--model", "speech-3k", "--metrics", "snr", "--json")
    first = run(*command, "--jsonl", "rows.jsonl").json
    assert run(*command, "--jsonl", "rows.jsonl", "--resume").json == first


def test_images(folders, picture):
    for i in range(3):
        for folder in ("pictures", "copies"):
            os.makedirs(folder, exist_ok=True)
            save_image(f"{folder}/{i}.png", picture(24, 40 + i))
    command = ("score", "pictures", "copies", "--model", "image-fsp", "--codec", "webp@50")
    found = run(*command, "--json").json
    copies, model, webp = found["systems"]
    assert found["kind"] == "image"
    assert copies["metrics"]["psnr"]["mean"] == 100 and copies["metrics"]["ssim"]["mean"] == 1
    assert 10 < model["metrics"]["psnr"]["mean"] < webp["metrics"]["psnr"]["mean"] < 100
    assert webp["metrics"]["bits_per_pixel"]["mean"] > 0
    assert model["codebook"]["tokens"] == 3 * 3 * 5 + 2 * 3


def test_grey_images_compare_with_formats_that_know_no_grey(folders, picture):
    for folder in ("pictures", "copies"):
        os.makedirs(folder, exist_ok=True)
    pixels = picture(16, 16, 1)
    save_image("pictures/a.png", pixels)
    save_image("copies/a.png", np.repeat(pixels, 3, 2))
    assert score("pictures", "copies").systems[0].summaries["psnr"].mean == 100
    save_image("copies/a.png", picture(16, 16, 3))
    [line] = score("pictures", "copies").failed
    assert "RGB" in line and "grey" in line


def test_the_table_fits_any_terminal(folders):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*MODULE, "score", "ref", "noisy", "late", "--metrics", "snr"]
    result = subprocess.run(command, capture_output=True, env=environment, timeout=ENOUGH)
    assert result.returncode == 0 and b"20.0" in result.stdout and not result.stderr


def test_a_script_needs_no_guard_for_several_processes(folders):
    code = (
        "from vpcodec import score; print(len(score('ref', 'same', metrics=['snr'], jobs=2).rows))"
    )
    result = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, timeout=ENOUGH
    )
    assert (result.stdout, result.stderr) == ("4\n", "")


def test_one_file_against_another_whatever_their_names(folders):
    found = run("score", "ref/0.wav", "noisy/0.wav", "--metrics", "snr", "--json").json
    assert found["systems"][0]["metrics"]["snr"]["mean"] == pytest.approx(20, abs=0.1)


def test_results_can_be_given_a_name(folders):
    command = ("score", "ref", "first=same", "same", "--metrics", "snr", "--json")
    assert [system["name"] for system in run(*command).json["systems"]] == ["first", "same"]


def test_files_without_a_counterpart_are_named_and_end_with_1(folders):
    os.remove("noisy/1.wav")
    result = run("score", "ref", "noisy", "--metrics", "snr", "--json", check=1)
    assert result.json["systems"][0]["metrics"]["snr"]["n"] == 3
    assert "1.wav" in result.err and "no counterpart" in result.err


def test_a_missing_package_disables_its_metrics_with_a_line_each(folders, monkeypatch):
    from vpcodec.metrics import base

    plain = base.find_spec
    monkeypatch.setattr(base, "find_spec", lambda n: None if n == "pesq" else plain(n))
    monkeypatch.chdir(folders)
    result = run("score", "ref/0.wav", "same/0.wav", "--json")
    [_, system] = result.json["systems"]
    assert "pesq_wb" not in system["metrics"]
    assert "stoi" in system["metrics"]
    lines = result.err.splitlines()
    assert len(lines) == 2  # pesq_wb and pesq_nb
    assert all("left out: pesq_" in line and "vpcodec[score]" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "originals"),
        (["ref"], "nothing to compare"),
        (["nowhere", "same"], "nowhere"),
        (["ref", "nowhere"], "nowhere"),
        (["ref", "same", "--metrics", "sto"], "stoi"),
        (["ref", "same", "--align", "twice"], "alignment"),
        (["ref", "--codec", "opus@fast"], "opus"),
        (["ref", "--codec", "vorbis@1"], "vorbis"),
        (["ref", "--codec", "webp@50"], "image"),
        (["ref", "--model", "image-fsp"], "image"),
        (["ref", "--model", "no-such-model"], "no-such-model"),
        (["ref", "same", "same"], "twice"),
        (["ref", "same", "--resume"], "--jsonl"),
        (["ref", "same", "--report", "no/where.html"], "no/where.html"),
        (["ref", "same/0.wav"], "folder"),
        (["ref/0.wav", "same/0.wav", "--csv", "no/where.csv"], "no/where.csv"),
        (["text.txt", "same/0.wav"], "text.txt"),
        (["empty", "same"], "empty"),
        (["both", "same"], "separately"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_in_one_line(folders, arguments, words, picture):
    Path("text.txt").write_text("no audio")
    for folder in ("empty", "both"):
        os.mkdir(folder)
    save_image("both/a.png", picture(8, 8))
    shutil.copy("ref/0.wav", "both/0.wav")
    result = run("score", *arguments, check=2)
    assert words in result.err and result.err.count("\n") == 1 and not result.out


def test_the_list_names_every_metric(folders):
    text = run("score", "--list").out.decode()
    found = run("score", "--list", "--json").json
    assert {"pesq_wb", "estoi", "dnsmos_ovrl", "ms_ssim", "cvu"} <= {row["name"] for row in found}
    assert all(row["name"] in text and row["source"] for row in found)


def test_the_peers_of_the_plan_come_out_again(shared_data, tmp_path):
    """Lags and metrics of Opus and Lyra, found elsewhere with an alignment per file."""
    if not shutil.which("opusenc"):
        pytest.skip("needs opusenc of opus-tools")
    pytest.importorskip("pesq", reason="needs the score extra")
    peers = json.loads((shared_data / "peers_dev.json").read_text())
    expected = {(row["file"], row["codec"]): row for row in peers}
    names = ["cmuarctic_aew_a0001.flac", "vctk_p225_011.flac"]
    for name in names:
        shutil.copy(shared_data / "speech_dev" / name, tmp_path / name)
    lyra = shared_data / "lyra_dev" / "3200"
    options = {"metrics": ("pesq_wb", "stoi", "estoi"), "align": "file"}
    found = score(tmp_path, lyra, codecs="opus@6k", **options)
    for row in found.rows:
        peer = expected[row.file, {"3200": "lyra_3200", "opus@6k": "opus_6k"}[row.system]]
        assert round(row.delay * 16_000) == peer["lag"]
        for name in options["metrics"]:
            assert row.values[name] == pytest.approx(peer[name], abs=0.002)
        if row.n_bytes:
            assert row.values["bitrate"] == pytest.approx(peer["bps"], rel=1e-6)


def test_another_speech_recogniser_is_another_cache_key(tmp_path, monkeypatch):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="the metric wer needs it")
    (tmp_path / "a.wav").touch()
    bench = Bench(Job("audio", tmp_path, (), ("wer",)))
    first = cache_key(bench, -1, "a.wav", {})
    assert cache_key(bench, -1, "a.wav", {}) == first
    monkeypatch.setenv("VPCODEC_ASR_MODEL", "somebody/else")
    assert cache_key(bench, -1, "a.wav", {}) != first
