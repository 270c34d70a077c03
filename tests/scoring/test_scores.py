"""Rows and statistics of scoring."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest

from vpcodec.metrics.registry import METRICS
from vpcodec.scoring.scores import ORIGINAL, Row, Scores, Summary, SystemScores

ROW = Row("opus@6k", "a/b c.wav", 0.0125, 5.4, 4000, "0123456789abcdef", {"stoi": 0.5, "snr": -3.0})


def scores(*systems: SystemScores, rows: list[Row] = ()) -> Scores:
    return Scores("audio", list(systems), list(rows), [METRICS["stoi"]], {}, [], {})


def test_a_summary_is_that_of_numpy():
    values = np.random.default_rng(3).gamma(2, 3, 200)
    found = Summary.of(values)
    assert (found.n, found.missing) == (200, 0)
    assert found.mean == pytest.approx(values.mean())
    assert found.median == pytest.approx(np.median(values))
    assert (found.p5, found.p95) == pytest.approx(tuple(np.percentile(values, [5, 95])))


def test_the_bootstrap_interval_is_that_of_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(4).gamma(2, 3, 46)
    found = Summary.of(values)
    expected = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(5)
    samples = [Summary.of(random.normal(1.0, 2.0, 40)) for _ in range(200)]
    share = np.mean([s.low <= 1.0 <= s.high for s in samples])
    assert 0.88 <= share <= 0.98


def test_the_interval_does_not_change_from_run_to_run_nor_with_the_pieces(monkeypatch):
    values = np.random.default_rng(6).normal(size=50)
    first = Summary.of(values)
    assert Summary.of(values) == first
    monkeypatch.setattr("vpcodec.scoring.scores._PIECE", 1000)
    assert Summary.of(values).low == pytest.approx(first.low, abs=0.05)


def test_missing_values_are_counted_and_left_out():
    found = Summary.of([1.0, math.nan, 3.0, math.nan])
    assert (found.n, found.missing, found.mean) == (2, 2, 2.0)
    nothing = Summary.of([math.nan])
    assert (nothing.n, nothing.missing) == (0, 1)
    assert math.isnan(nothing.mean) and math.isnan(nothing.low) and math.isnan(nothing.p95)
    one = Summary.of([2.5])
    assert one.mean == one.median == one.p5 == 2.5 and math.isnan(one.low)


def test_a_row_comes_back_from_its_line():
    assert Row.from_json(ROW.to_json()) == ROW
    image = Row("x", 'a\n"ü.png', 0.0, None, None, "f", {"psnr": 30.0})
    assert Row.from_json(image.to_json()) == image
    assert "\n" not in image.to_json()


def test_what_has_no_value_is_null_in_a_line():
    row = Row("x", "a.wav", 0.0, 1.0, None, "f", {"pesq_wb": math.nan, "snr": math.inf})
    found = json.loads(row.to_json())
    assert found["pesq_wb"] is None and found["snr"] is None
    assert math.isnan(Row.from_json(row.to_json()).values["pesq_wb"])


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", "null", "{}", ROW.to_json()[:-20], '{"key": 1, "system": 2}']
)
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match="not a row of scores"):
        Row.from_json(line)


def test_the_document_is_json_without_nan():
    system = SystemScores("a", "1", None, {"stoi": Summary.of([math.nan]), "snr": Summary.of([1])})
    text = json.dumps(scores(system).to_dict(), allow_nan=False)
    [found] = json.loads(text)["systems"]
    assert found["metrics"]["stoi"] == {
        **dict.fromkeys(("mean", "low", "high", "median", "p5", "p95")),
        "n": 0,
        "missing": 1,
    }
    assert found["metrics"]["snr"]["mean"] == 1


def test_csv_has_a_line_for_each_system_and_metric():
    codebook = {"tokens": 100, "entropy": 6.5, "perplexity": 90.5, "cvu": 0.5, "used": 0.9}
    first = SystemScores("a,b", "1", 0.0, {"stoi": Summary.of([0.5, 0.7])}, codebook)
    second = SystemScores("c", "1", None, {"stoi": Summary.of([math.nan])})
    rows = list(csv.DictReader(io.StringIO(scores(first, second).to_csv())))
    assert [(row["system"], row["metric"]) for row in rows] == [
        ("a,b", "stoi"), ("a,b", "entropy"), ("a,b", "perplexity"), ("a,b", "cvu"), ("c", "stoi"),
    ]  # fmt: skip
    assert float(rows[0]["mean"]) == pytest.approx(0.6) and rows[0]["n"] == "2"
    assert (rows[1]["mean"], rows[1]["n"], rows[1]["unit"]) == ("6.5", "100", "bit/token")
    assert (rows[4]["mean"], rows[4]["n"], rows[4]["missing"]) == ("", "0", "1")


def test_the_table_of_one_system_shows_every_statistic_and_what_is_missing():
    values = [0.5, 0.7, math.nan]
    rows = [Row("a", f"{i}", 0.0, 1.0, None, "", {"stoi": x}) for i, x in enumerate(values)]
    text = scores(SystemScores("a", "1", 0.01, {"stoi": Summary.of(values)}), rows=rows).to_text()
    [line] = [line for line in text.splitlines() if line.startswith("STOI")]
    assert "0.600" in line and "2 of 3" in line and "higher" in line
    assert "10.00 ms" in text


def test_the_table_of_several_systems_has_a_column_for_each():
    first = SystemScores("b", "1", None, {"dnsmos_ovrl": Summary.of([3.1, 3.3])})
    second = SystemScores(
        "a", "1", 0.0, {"dnsmos_ovrl": Summary.of([2.0, 2.2]), "stoi": Summary.of([0.8, math.nan])}
    )
    lines = scores(first, second).to_text().splitlines()
    assert lines[0].split() == ["b", "a"]
    [line] = [line for line in lines if line.startswith("STOI")]
    assert "0.800" in line
    assert any("a: STOI has no value for 1 of 2" in line for line in lines)


def test_the_originals_stand_beside_the_statistics_of_one_system():
    original = SystemScores(ORIGINAL, "", None, {"dnsmos_ovrl": Summary.of([3.1, 3.3])})
    system = SystemScores("a", "1", 0.0, {"dnsmos_ovrl": Summary.of([2.0, 2.2])})
    rows = [Row(name, f, 0.0, 1.0, None, "", {}) for name in (ORIGINAL, "a") for f in "xy"]
    head, line = scores(original, system, rows=rows).to_text().splitlines()
    assert "median" in head and head.endswith(ORIGINAL)
    assert "2.100" in line and "3.200" in line
