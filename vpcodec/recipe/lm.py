"""Recipes of language models: the sections of an `LMRecipe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..config import LMConfig, Positive, Strict
from .base import Evaluation, OptimConfig, TrainConfig, one_or_more, path_or_mapping


class TokenCorpus(Strict):
    """Tokens of the codec."""

    type: Literal["tokens"] = "tokens"
    path: str = Field(
        min_length=1,
        description="A folder that `vpcodec tokenize` wrote, a folder of token files, a token "
        "file, or a file of records (.parquet, .npz, .jsonl).",
    )


Corpus = Annotated[TokenCorpus, BeforeValidator(path_or_mapping)]


class TokenData(Strict):
    """Training data: tokens, all of which are held in memory."""

    train: Annotated[tuple[Corpus, ...], BeforeValidator(one_or_more)] = Field(
        min_length=1, description="Corpora: paths, or mappings as below; one needs no list."
    )
    batch_size: Positive = Field(16, description="Excerpts per process and (partial) step.")


class LMEvaluation(Evaluation):
    """Bits per token on held-out data during training."""

    data: Corpus | None = Field(
        None, description="Corpus of held-out tokens, as in `data`; null: no evaluation."
    )


class LMRecipe(Strict):
    """The recipe of a language model."""

    model: LMConfig
    data: TokenData
    eval: LMEvaluation = Field(default_factory=LMEvaluation)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    @model_validator(mode="after")
    def _no_decoder(self) -> LMRecipe:
        if self.train.decoder_only:
            raise ValueError("train.decoder_only is for codecs")
        return self
