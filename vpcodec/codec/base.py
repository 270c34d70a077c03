"""What both codecs share: the model, its properties, and the checks of token files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, load_backend
from ..entropy import CoderSet
from ..hub import DEFAULT_MODEL, DEFAULT_MODELS, bundled_coder, open_model
from ..media.files import atomic_output
from ..model_folder import ModelError, ModelFolder
from ..progress import Progress
from ..tokenfile import OtherWeightsError, TokenFileError, TokenHeader, TokenReader
from .digits import SpecialTokens, join_tokens, split_tokens

if TYPE_CHECKING:  # what `from_pretrained` returns; here they are not imported
    from .audio import AudioCodec
    from .image import ImageCodec

Source = str | os.PathLike[str] | BinaryIO


# the bundled models
SpeechModel = Literal["speech-3k", "speech-6k", "speech-1k", "speech-vp-16384"]
ImageModel = Literal["image-fsp"]


class Codec(ABC):
    """A model that is ready to encode and decode.

    `Codec.from_pretrained` and `Codec(...)` return the subclass for the model's modality:
    `AudioCodec`, which has `sample_rate`, `frame_rate`, `bitrate`, `latency` and streams
    (`encoder_stream`, `decoder_stream`), or `ImageCodec`, which has `bits_per_pixel`.

    A codec can be copied, pickled and sent to other processes, which need the model's folder under
    the same path: a pickle holds the path, the backend and its options.

    Args:
        model: the folder, from `vpcodec.hub.open_model`.
        backend: what runs it, from `vpcodec.backends.load_backend`.

    Raises:
        ModelError: the model is for another modality than the subclass.
    """

    modality: ClassVar[str] = ""  # "audio" or "image" in subclasses
    _classes: ClassVar[dict[str, type[Codec]]] = {}

    def __init_subclass__(cls, *, modality: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if modality is not None:
            cls.modality = modality
            Codec._classes[modality] = cls

    def __new__(cls, model: ModelFolder, backend: Backend) -> Self:
        modality = model.config.modality
        if cls.modality not in ("", modality):
            raise ModelError(
                f"{model.config.name} is a model for {modality}, not for {cls.modality}"
            )
        chosen: Any = cls if cls.modality else cls._classes[modality]
        return super().__new__(chosen)  # type: ignore[no-any-return]

    def __init__(self, model: ModelFolder, backend: Backend) -> None:
        self.model = model
        self.config: Any = model.config
        self.backend = backend

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.model, self.backend)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self._rate}, backend {self.backend.name}>"

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name: SpeechModel,
        *,
        backend: str = ...,
        threads: int | None = ...,
        device: str = ...,
        note: Callable[[str], None] | None = ...,
    ) -> AudioCodec: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name: ImageModel,
        *,
        backend: str = ...,
        threads: int | None = ...,
        device: str = ...,
        note: Callable[[str], None] | None = ...,
    ) -> ImageCodec: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = ...,
        *,
        backend: str = ...,
        threads: int | None = ...,
        device: str = ...,
        note: Callable[[str], None] | None = ...,
    ) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        backend: str = "onnx",
        threads: int | None = None,
        device: str = "auto",
        note: Callable[[str], None] | None = None,
    ) -> Codec:
        """Load a model by one of the names that `vpcodec.hub.open_model` takes.

        Args:
            name: which model; None: the default of the class, speech-3k for `Codec`.
            backend: "onnx" (needs no torch) or "torch".
            threads: CPU threads; None: on ONNX Runtime one for streams, else the cores that the
                process may use, at most 4; on PyTorch its own setting.
            device: "cpu", "cuda" or "auto".
            note: called with a line of text before a step that takes a while.

        Returns:
            The codec.

        Raises:
            ModelError: unknown or damaged model, or one for another modality.
            ValueError: unknown backend.
        """
        if name is None:
            name = DEFAULT_MODELS.get(cls.modality, DEFAULT_MODEL)
        model = open_model(name, note=note)
        return cls(model, load_backend(backend, model, threads=threads, device=device))

    @property
    def name(self) -> str:
        """The model's name, as in token files."""
        return self.model.config.name

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that identify the weights and configuration."""
        return self.model.fingerprint

    @property
    def space(self) -> bytes:
        """16 bytes that identify the token space, encoder and quantizer, in token files."""
        return self.model.space

    @property
    def coder(self) -> CoderSet | None:
        """The entropy coders of token files; None if the model has no entropy tables."""
        return self.model.coder

    @property
    def hop_length(self) -> int:
        """Samples per token, or the side in pixels of the square that a token stands for."""
        return self.model.config.hop_length

    @property
    def codebook_size(self) -> int:
        """K; tokens are integers from 0 to K - 1."""
        return self.model.config.codebook_size

    @property
    def token_levels(self) -> tuple[int, ...]:
        """Number of values of each digit of a token; their product is codebook_size.

        Grids (FSP, FSQ) have a digit per dimension, LFQ has one per bit, and a stored codebook (VP,
        VQ, SimVQ) only one: its codes have no structure that a token shows.
        """
        levels: tuple[int, ...] = self.model.config.quantizer.token_levels
        return levels

    @property
    def special_tokens(self) -> SpecialTokens:
        """Ids after the codebook, for language models: `bos`, `eos` and `pad`."""
        return SpecialTokens.after(self.codebook_size)

    def split_tokens(self, tokens: Any) -> Any:
        """Tokens to their digits: token = digit_0 + level_0 (digit_1 + level_1 (digit_2 + ...)).

        Args:
            tokens: (...) integers in [0, codebook_size); an array, or a tensor of torch.

        Returns:
            (..., D) int64, D = len(token_levels), of the same kind.

        Raises:
            ValueError: what is no integer, or a token out of range, with its place.
        """
        return split_tokens(tokens, self.token_levels)

    def join_tokens(self, digits: Any) -> Any:
        """Digits to tokens, the inverse of `split_tokens`.

        Args:
            digits: (..., D) integers; digit i in [0, token_levels[i]).

        Returns:
            (...) int64.

        Raises:
            ValueError: another shape, what is no integer, or a digit out of range, with its place.
        """
        return join_tokens(digits, self.token_levels)

    @property
    @abstractmethod
    def _rate(self) -> str:
        """The model's rate in words."""

    @abstractmethod
    def encode(self, signal: NDArray[Any], /) -> NDArray[np.int64]:
        """Samples or pixels to int64 tokens, channels first."""

    @abstractmethod
    def decode(self, tokens: NDArray[np.integer[Any]], /) -> NDArray[Any]:
        """Tokens to samples or pixels."""

    @abstractmethod
    def token_header(self, tokens: Any) -> TokenHeader:
        """The header of a token file with tokens of this model."""

    @abstractmethod
    def encode_file(
        self,
        source: Source,
        target: Source,
        *,
        name: str = "stdin",
        progress: Progress | None = None,
    ) -> Any:
        """File or stream to token file or stream; returns statistics."""

    @abstractmethod
    def decode_file(
        self,
        source: Source | TokenReader,
        target: Source,
        *,
        recover: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Token file or stream to file or stream; returns statistics."""

    @abstractmethod
    def _fits(self, header: TokenHeader) -> bool:
        """Whether tokens have the modality and the rates of this model."""

    def _read(
        self, source: Source | TokenReader, stack: ExitStack, *, recover: bool, force: bool
    ) -> TokenReader:
        """A reader at its first block, with tokens that this model may decode."""
        if isinstance(source, TokenReader):
            reader = source
        elif isinstance(source, (str, os.PathLike)):
            reader = TokenReader(stack.enter_context(open(source, "rb")), recover=recover)
        else:
            reader = TokenReader(source, recover=recover)
        header = reader.header
        same = self.model.knows(header.fingerprint)
        if (other := self.model.revision_of(header.fingerprint)) and not (same or force):
            raise TokenFileError(
                f"made by {header.model!r}, another revision of {self.name!r}, which is at "
                f"{other.model}"
            )
        if header.codebook_size != self.codebook_size or not self._fits(header):
            raise TokenFileError(
                f"made by the model {header.model!r}, whose tokens {self.name!r} cannot decode"
            )
        if not (same or force):
            raise OtherWeightsError(
                f"made by other weights (model {header.model!r}, token space "
                f"{header.fingerprint.hex()[:8]}; this is {self.name!r}, "
                f"{self.space.hex()[:8]})"
            )
        if reader.coder is None:
            own, bundled = self.coder if same else None, bundled_coder(header)
            reader.coder = own.joined(bundled) if own and bundled else own or bundled
        return reader


class CountedOutput:
    """A binary output that counts its bytes; errors call it `name`."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.bytes = 0

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            if error.filename is None:
                error.filename = self._name
            raise
        self.bytes += len(data)


def open_target(target: Source, stack: ExitStack) -> CountedOutput:
    """A stream, or a file that appears complete when `stack` ends, or not at all."""
    if isinstance(target, (str, os.PathLike)):
        return CountedOutput(stack.enter_context(atomic_output(target)), os.fspath(target))
    return CountedOutput(target, "stdout")
