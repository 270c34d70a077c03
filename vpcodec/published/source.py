"""The published models as a source of models for `vpcodec.hub.open_model`."""

from __future__ import annotations

from ..config import ModelConfig
from ..hub import Note
from ..model_folder import ModelFolder
from . import cache, catalog


class PublishedModels:
    """See `vpcodec.hub.Source`; names are as in `catalog.PUBLISHED`, with or without a revision."""

    def owns(self, name: str) -> bool:
        return catalog.is_published(name)

    def open(self, name: str, *, note: Note | None = None) -> ModelFolder:
        return cache.open_published(name, note=note)

    def catalog(self) -> list[tuple[str, ModelConfig]]:
        return [(published.spec, published.config) for published in catalog.PUBLISHED]

    def is_local(self, name: str) -> bool:
        return cache.is_converted(name)
