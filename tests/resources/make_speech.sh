#!/bin/sh
# Makes speech.wav, the speech sample of the tests, with espeak-ng (22.05 kHz, mono, 16 bit).
set -eu
cd "$(dirname "$0")"
espeak-ng -v en-us -s 165 -w speech.wav \
    "Hello! This codec turns my voice into a few small tokens, and back again."
