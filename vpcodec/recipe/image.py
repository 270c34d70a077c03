"""Recipes of image tokenizers: the sections of an `ImageRecipe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from ..config import ImageConfig, NotNegative, Positive, Strict, by_type
from .base import (
    Data,
    Discriminator,
    Evaluation,
    HuggingFaceCorpus,
    Losses,
    Recipe,
    Weight,
    one_or_more,
    path_or_mapping,
)

MS_SSIM_SIDE = 176  # pixels: five scales of an 11 x 11 window need more than 160


class ImageCorpus(Strict):
    """Image files of any format and size that Pillow reads (COCO and ImageNet as distributed)."""

    type: Literal["image"] = "image"
    path: str = Field(
        min_length=1,
        description="A folder (searched recursively), a glob such as `coco/train2017/*.jpg`, or "
        "a manifest: .txt with a path per line, or .tsv, .csv, .jsonl with a column `path`; paths "
        "are relative to the manifest.",
    )
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


class HuggingFaceImages(HuggingFaceCorpus):
    """A dataset of the Hugging Face Hub, streamed; needs the package `datasets`."""

    path: str = Field(min_length=1, description="Name on the Hub, such as `ILSVRC/imagenet-1k`.")
    column: str = Field("image", description="Column of the images.")


CorpusConfig = Annotated[
    Annotated[ImageCorpus, Tag("image")] | Annotated[HuggingFaceImages, Tag("huggingface")],
    by_type("image", "image", "huggingface"),
    BeforeValidator(path_or_mapping),
]


class DataConfig(Data):
    """Training images: their sources and augmentation."""

    train: Annotated[tuple[CorpusConfig, ...], BeforeValidator(one_or_more)] = Field(
        (),
        description="Corpora, mixed equally unless they have weights: paths, or mappings as below; "
        "a single one needs no list. null: generated images.",
    )
    crop_size: Annotated[int, Field(ge=16, le=4096)] = Field(
        128,
        description="Side of a training crop, pixels; a multiple of the model's block "
        "(hop times attention window).",
    )
    resize: NotNegative | None = Field(
        None,
        description="Length to scale the shorter side of images to before cropping, pixels; null: "
        "do not scale. Images smaller than a crop are enlarged to its size.",
    )
    flip: bool = Field(True, description="Mirror half of the crops.")
    cache_mb: NotNegative = Field(
        2048,
        description="Memory for decoded images, MiB, for all workers together; other images are "
        "read each time.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.resize is not None and self.resize < self.crop_size:
            raise ValueError(f"resize is {self.resize}, less than crop_size, {self.crop_size}")
        return self


class LossConfig(Losses):
    """Weights of the loss terms of the codec; images are in [-1, 1]."""

    l1: float = Field(1.0, ge=0, description="Mean |x - y|.")
    mse: float = Field(0.0, ge=0, description="Mean (x - y)^2.")
    gradient: float = Field(
        0.0,
        ge=0,
        description="Mean |dx - dy| of horizontal and vertical differences, averaged over "
        "`gradient_scales` scales, each half the size of the one before.",
    )
    gradient_scales: Annotated[int, Field(ge=1, le=8)] = Field(
        3, description="Scales of `gradient`."
    )
    ms_ssim: float = Field(
        0.0,
        ge=0,
        description=f"1 - MS-SSIM; crops of less than {MS_SSIM_SIDE} pixels use as many of its "
        "five scales as fit.",
    )
    lpips: float = Field(
        0.0,
        ge=0,
        description="LPIPS; 0: not loaded. Needs the package `lpips`, which downloads its "
        "backbone.",
    )
    lpips_net: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="Backbone of `lpips`.")

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if not self.l1 + self.mse + self.gradient + self.ms_ssim + self.lpips:
            raise ValueError("at least one of l1, mse, gradient, ms_ssim and lpips needs a weight")
        return self


class DiscriminatorConfig(Discriminator):
    """A patch discriminator, trained against the codec."""

    layers: Annotated[int, Field(ge=1, le=6)] = Field(
        3, description="Number of convolutions that halve width and height."
    )


class EvalConfig(Evaluation):
    """Quality on held-out images during training."""

    data: Annotated[ImageCorpus, BeforeValidator(path_or_mapping)] | None = Field(
        None, description="Corpus of held-out images, as in `data`; null: no evaluation."
    )
    max_side: Positive = Field(
        512, description="Larger images are cropped at their centre to this many pixels each way."
    )
    best: Literal["psnr", "ssim", "ms_ssim"] = Field(
        "psnr", description="Metric by which the best averaged weights are selected."
    )


class ImageRecipe(Recipe):
    """The recipe of an image tokenizer."""

    model: ImageConfig
    data: DataConfig = Field(default_factory=DataConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _crops_fit(self) -> ImageRecipe:
        size, block = self.data.crop_size, self.model.block_size
        if size % block:
            raise ValueError(
                f"data.crop_size must be a multiple of {block}, hop_length times "
                f"attention_window, got {size}"
            )
        if self.adversarial and size < 8 * 2**self.discriminator.layers:
            raise ValueError("data.crop_size is too small for discriminator.layers")
        return self
