"""How long work reports its progress: one shape of callback for the whole package."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, such as "encoding", how much of it is done, and the total.

What is counted depends on the stage: samples, pixels, files, passes or steps. The total is None
where it is not known in advance.
"""
