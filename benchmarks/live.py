"""Live streams: processor time per piece, and how losses of packets are concealed.

python benchmarks/live.py speed [SPEECH] [--model speech-3k]
python benchmarks/live.py losses SPEECH [--model speech-3k] [--every 4]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vpcodec import AudioCodec, Codec
from vpcodec.media.audio import Resampler, find_audio, load, resample, save
from vpcodec.scoring.systems import PACKET_SECONDS, Loss, decode_with_losses

PIECE = 0.02  # s
LOSSES = ((0.05, 1), (0.10, 1), (0.05, 3), (0.10, 3))  # share of packets, packets in a row
BURST = 0.06  # s
OTHER_RATES = (48_000, 44_100, 8_000)  # of microphones and telephones, Hz
OPUS_KBIT = 8
WIDEBAND = ["--set-ctl-int", "4008=1103", "--set-ctl-int", "4024=3001"]  # bandwidth, speech
SPEECH = Path(__file__).parents[1] / "tests" / "resources" / "speech.wav"


def measure_speed(codec: AudioCodec, samples: np.ndarray, seconds: float) -> dict[str, float]:
    """Milliseconds per piece of 20 ms on one thread: median, 99th percentile, and the largest."""
    step = round(PIECE * codec.sample_rate)
    repeats = -(-round(seconds * codec.sample_rate) // samples.shape[1])
    samples = np.tile(samples, repeats)[:, : round(seconds * codec.sample_rate)]
    encoder, decoder = codec.encoder_stream(), codec.decoder_stream()
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for start in range(0, samples.shape[1], step):
        began = time.perf_counter()
        tokens = encoder.push(samples[:, start : start + step])
        between = time.perf_counter()
        decoder.push(tokens)
        ended = time.perf_counter()
        times["encode"].append(1000 * (between - began))
        times["decode"].append(1000 * (ended - between))
    found = {}
    for name, values in times.items():
        values = values[50:]  # the first second warms up
        for quantile in (50, 99, 100):
            found[f"{name} p{quantile} ms"] = float(np.percentile(values, quantile))
    return found


def measure_resampling(codec: AudioCodec) -> dict[str, str]:
    """Milliseconds that resamplers hold back, least to most, with pieces of 20 ms."""
    found = {}
    for rate in OTHER_RATES:
        for name, pair in (("to", (rate, codec.sample_rate)), ("from", (codec.sample_rate, rate))):
            resampler, given, held = Resampler(*pair, 1), 0, []
            pieces = np.diff(np.round(np.arange(100) * PIECE * pair[0])).astype(int)
            n = 0
            for piece in pieces:
                given += piece
                n += resampler.process(np.zeros((1, piece), np.float32)).shape[1]
                held.append(1000 * (given / pair[0] - n / pair[1]))
            settled = held[50:]
            found[f"{name} {rate} Hz"] = f"{min(settled):.0f} to {max(settled):.0f} ms held back"
    return found


def conceal(codec: AudioCodec, tokens: np.ndarray, lost: np.ndarray, method: str) -> np.ndarray:
    """The samples (1, T) of tokens (1, N) of which some are lost."""
    if method == "push_lost":
        return decode_with_losses(codec, tokens, lost)
    last = np.maximum.accumulate(np.where(lost, 0, np.arange(len(lost))))
    samples = codec.decode(tokens[:, last])
    if method == "silence":
        samples = samples * ~np.repeat(lost, codec.hop_length)
    return samples


def opus(clip: np.ndarray, share: float) -> np.ndarray:
    """A clip (T,) at 16 kHz through Opus in wideband, with random packets of 20 ms lost."""
    with tempfile.TemporaryDirectory() as folder:
        clear, coded, heard = (Path(folder, name) for name in ("a.wav", "a.opus", "b.wav"))
        save(clear, clip[None], 16_000)
        run = partial(subprocess.run, check=True, capture_output=True)
        run(["opusenc", "--quiet", "--bitrate", f"{OPUS_KBIT}", *WIDEBAND, clear, coded])
        run(["opusdec", "--quiet", "--rate", "16000", "--packet-loss", f"{100 * share:g}"]
            + [coded, heard])  # fmt: skip
        return load(heard)[0]


def measure_losses(codec: AudioCodec, clips: list[np.ndarray]) -> list[dict[str, Any]]:
    """STOI and PLCMOS of each method at each loss, and of the intact stream."""
    from pystoi import stoi
    from speechmos import plcmos

    def judge(original: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
        heard = np.clip(samples[0, : len(original)], -1, 1)
        return stoi(original, heard, 16_000), plcmos.run(heard, 16_000)["plcmos"]

    frames = max(1, round(PACKET_SECONDS * codec.frame_rate))
    coded = [(clip[0], codec.encode(clip)) for clip in clips]
    rows: list[dict[str, Any]] = []
    scores = [judge(clip, codec.decode(tokens)) for clip, tokens in coded]
    rows.append({"loss": "none", "method": "", "stoi": scores})
    if shutil.which("opusenc") and shutil.which("opusdec"):
        for share in (0, *(share for share, burst in LOSSES if burst == 1)):
            scores = [judge(clip, opus(clip, share)) for clip, _ in coded]
            rows.append({"loss": f"{share:.0%} x1", "method": f"Opus {OPUS_KBIT}k", "stoi": scores})
    for share, burst in LOSSES:
        for method in ("silence", "last token", "push_lost"):
            scores = []
            for number, (clip, tokens) in enumerate(coded):
                n_frames = tokens.shape[1]
                packets = Loss(share, burst).draw(-(-n_frames // frames), seed=number)
                lost = np.repeat(packets, frames)[:n_frames]
                scores.append(judge(clip, conceal(codec, tokens, lost, method)))
            rows.append({"loss": f"{share:.0%} x{burst}", "method": method, "stoi": scores})
    for row in rows:
        row["stoi"], row["plcmos"] = (float(x) for x in np.mean(row["stoi"], 0))
    return rows


def measure_recovery(codec: AudioCodec, clips: list[np.ndarray]) -> dict[str, float]:
    """SNR against the intact decoder, in dB, from 100 to 300 ms after a burst of 60 ms."""
    hop, found = codec.hop_length, []
    n = round(BURST * codec.frame_rate)
    after, length = round(0.1 * codec.sample_rate), round(0.2 * codec.sample_rate)
    for clip in clips:
        tokens = codec.encode(clip)
        intact = codec.decode(tokens)
        for start in range(60, tokens.shape[1] - n - (after + length) // hop, 150):
            lost = np.zeros(tokens.shape[1], bool)
            lost[start : start + n] = True
            begin = (start + n) * hop + after
            window = slice(begin, begin + length)
            error = conceal(codec, tokens, lost, "push_lost") - intact
            energy = np.square(intact[:, window]).mean()
            if energy > 1e-6:  # not in pauses
                noise = np.square(error[:, window]).mean() + 1e-12
                found.append(float(10 * np.log10(energy / noise)))
    return {
        "bursts": len(found),
        "median dB": float(np.median(found)),
        "share above 20 dB": float(np.mean(np.array(found) > 20)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "losses"])
    parser.add_argument("speech", nargs="?", type=Path, default=SPEECH, help="file or folder")
    parser.add_argument("--model", default="speech-3k")
    parser.add_argument("--seconds", type=float, default=60, help="of audio, for speed")
    parser.add_argument("--every", type=int, default=1, help="take every n-th file of the folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    codec = Codec.from_pretrained(options.model, threads=1)
    paths = [options.speech]
    if options.speech.is_dir():
        paths = [options.speech / name for name in sorted(find_audio(options.speech))]
    clips = []
    for path in paths[:: options.every]:
        samples, rate = load(path)
        clip = resample(samples[:1], rate, codec.sample_rate)
        clips.append(clip[:, : clip.shape[1] // codec.hop_length * codec.hop_length])
    document: dict[str, Any] = {"model": codec.name, "files": len(clips)}
    if options.what == "speed":
        document |= measure_speed(codec, np.concatenate(clips, 1), options.seconds)
        document |= measure_resampling(codec)
    else:
        document["losses"] = measure_losses(codec, clips)
        document["recovery"] = measure_recovery(codec, clips)
    if options.json:
        print(json.dumps(document, indent=1))
        return
    for name, value in document.items():
        if name != "losses":
            print(f"{name}: {value if not isinstance(value, float) else f'{value:.2f}'}")
            continue
        print(f"{'loss':8} {'method':12} {'STOI':>6} {'PLCMOS':>7}")
        for row in document["losses"]:
            figures = f"{row['stoi']:6.3f} {row['plcmos']:7.2f}"
            print(f"{row['loss']:8} {row['method']:12} {figures}")


if __name__ == "__main__":
    main()
