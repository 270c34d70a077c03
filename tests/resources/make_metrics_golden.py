"""Makes metrics_golden.json from speech.wav and metric_references.py, without vpcodec.

Values of each metric, in the order of its measure, for each degradation of the made speech. Needs
the score and dev extras.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "metrics"))

import metric_references as references

MEASURES = (
    "pesq_wb", "pesq_nb", "stoi", "estoi", "dnsmos", "mel_distance", "stft_distance",
    "log_spectral_distance", "mel_cepstral_distortion", "si_sdr", "snr", "pitch",
    "loudness_difference",
)  # fmt: skip

if __name__ == "__main__":
    clean = references.made_speech()
    golden: dict[str, dict[str, list[float]]] = {}
    for name, degrade in references.DEGRADATIONS.items():
        degraded = degrade(clean)
        golden[name] = {}
        for measure in MEASURES:
            values = getattr(references, measure)(clean, degraded)
            values = values if isinstance(values, tuple) else (values,)
            golden[name][measure] = [round(float(value), 6) for value in values]
    text = json.dumps(golden, indent=1)
    (HERE / "metrics_golden.json").write_text(text + "\n", encoding="utf-8")
