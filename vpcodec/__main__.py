"""`python -m vpcodec`."""

from .cli import main

main()
