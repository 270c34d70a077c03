"""Where things lie that tests use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
RECIPES = ROOT / "recipes"
RESOURCES = ROOT / "tests" / "resources"
SPEECH = RESOURCES / "speech.wav"  # about 5 s of generated speech, 22,050 Hz mono
SHARED = ROOT.parent / "shared"  # recordings, pictures and cases that are not part of the project
