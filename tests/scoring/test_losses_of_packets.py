"""Models over links that lose packets: `vpcodec score --loss`."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import refuse, run

from vpcodec.scoring.systems import Loss, LossyModel, ScoreError, build_system


@pytest.mark.parametrize("text", ["1%", "5%", "10%x3", "50%", "20%x10", "0.5%x2"])
def test_the_share_and_the_bursts_are_those_that_are_asked_for(text):
    loss = Loss.parse(text)
    assert str(loss) == text
    lost = loss.draw(200_000, seed=1)
    assert lost.mean() == pytest.approx(loss.share, rel=0.1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lost, [0]]).astype(int)))
    lengths = edges[1::2] - edges[::2]
    assert (lengths[:-1] == loss.burst).all()
    assert not lost[:2].any()


def test_the_same_seed_loses_the_same_packets():
    loss = Loss(0.1)
    assert np.array_equal(loss.draw(500, 3), loss.draw(500, 3))
    assert not np.array_equal(loss.draw(500, 3), loss.draw(500, 4))


@pytest.mark.parametrize("text", ["", "5", "5%x0", "0%", "51%", "x3", "-5%", "5%x1000", "nan%"])
def test_other_losses_are_refused(text):
    with pytest.raises(ScoreError, match="write 5% or 10%x3"):
        Loss.parse(text)


def test_a_lossy_model_gives_audio_of_the_right_length_and_is_made_from_its_specification(
    speech_wav, tmp_path
):
    plain, lossy = build_system("model:speech-3k"), build_system("lossy:10%x3:speech-3k")
    assert isinstance(lossy, LossyModel) and lossy.name == "speech-3k 10%x3"
    assert lossy.identity != plain.identity
    coded, damaged = plain.code(speech_wav), lossy.code(speech_wav)
    assert damaged.signal.shape == coded.signal.shape and damaged.rate == coded.rate
    assert np.array_equal(damaged.signal, lossy.code(speech_wav).signal)
    assert np.abs(damaged.signal - coded.signal).max() > 0.01
    assert damaged.n_bytes is None


def test_score_has_a_row_for_each_loss(speech_wav):
    found = run(
        *("score", speech_wav, "-m", "speech-3k", "--loss", "5%,20%x3", "--metrics", "stoi"),
        "--json",
    ).json
    stoi = {row["name"]: row["metrics"]["stoi"]["mean"] for row in found["systems"]}
    assert stoi["speech-3k"] > stoi["speech-3k 5%"] > stoi["speech-3k 20%x3"] > 0.3


@pytest.mark.slow
def test_losses_need_a_model_for_live_streams(speech_wav):
    decoded = speech_wav
    assert "none is named" in refuse("score", speech_wav, decoded, "--loss", "5%")
    assert "not for live streams" in refuse("score", speech_wav, "-m", "image-fsp", "--loss", "5%")
    assert "write 5% or" in refuse("score", speech_wav, "-m", "speech-3k", "--loss", "5")
