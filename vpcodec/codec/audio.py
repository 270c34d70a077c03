"""AudioCodec: audio to tokens and back, as arrays, streams or files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from ..backends import Backend, DecoderStream, EncoderStream, architecture_of
from ..checks import check_rate, check_samples, check_tokens, like
from ..config import AudioConfig, AudioModelConfig
from ..media.audio import AudioReader, AudioWriter, RawFormat, Resampler, resample, resampled_length
from ..packets import PacketFormat
from ..progress import Progress
from ..tokenfile import (
    MAX_BLOCK_TOKENS,
    AudioHeader,
    GapError,
    TokenHeader,
    TokenReader,
    TokenWriter,
)
from .base import Codec, Source, open_target
from .batches import PaddedBatch, clips_of, groups, is_batch, padded
from .streams import (
    CausalDecoderStream,
    CausalEncoderStream,
    ResampledDecoderStream,
    ResampledEncoderStream,
    chunk_frames,
    repeat_last,
)

X = TypeVar("X", bound=np.generic)
Y = TypeVar("Y", bound=np.generic)

FILE_BLOCK, PIPE_BLOCK = 2048, 512  # frames per block of a token file
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz
FILE_SECONDS, PIPE_SECONDS = 4.0, 0.5  # of audio, read at once
MAX_GAP = 60.0  # seconds of lost audio that become silence
MAX_READ = 2**22  # samples of all channels, read at once


class AudioCodec(Codec, modality="audio"):
    """An audio model that is ready to encode and decode; see `Codec`.

    `encode` and `decode` take arrays, `encode_file` and `decode_file` files and pipes,
    `encoder_stream` and `decoder_stream` audio and tokens piece by piece.
    """

    config: AudioModelConfig

    @property
    def _rate(self) -> str:
        return f"{self.sample_rate} Hz, {self.frame_rate:.2f} tokens/s, {self.bitrate:.0f} bit/s"

    @property
    def sample_rate(self) -> int:
        """Audio rate of the model, Hz."""
        return self.config.sample_rate

    @property
    def frame_rate(self) -> float:
        """Tokens per second and channel."""
        return self.config.frame_rate

    @property
    def bitrate(self) -> float:
        """Nominal bit/s per channel."""
        return self.config.bitrate

    @property
    def latency(self) -> float | None:
        """Algorithmic latency of streaming, seconds; None: not for live streams."""
        return self.config.latency

    @overload
    def encode(
        self,
        samples: NDArray[Any],
        sample_rate: float | None = ...,
        *,
        padding: Literal[False] = ...,
        batch_size: int | None = ...,
    ) -> NDArray[np.int64]: ...

    @overload
    def encode(
        self,
        samples: Sequence[NDArray[Any]],
        sample_rate: float | None = ...,
        *,
        padding: Literal[False] = ...,
        batch_size: int | None = ...,
    ) -> list[NDArray[np.int64]]: ...

    @overload
    def encode(
        self,
        samples: Any,
        sample_rate: float | None = ...,
        *,
        padding: Literal[True],
        batch_size: int | None = ...,
    ) -> PaddedBatch: ...

    @overload
    def encode(
        self,
        samples: Any,
        sample_rate: float | None = ...,
        *,
        padding: bool = ...,
        batch_size: int | None = ...,
    ) -> Any: ...

    def encode(
        self,
        samples: Any,
        sample_rate: float | None = None,
        *,
        padding: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """Audio to tokens: one clip, or a list of clips of any lengths.

        Args:
            samples: (T,) or (C, T) float, nominally in [-1, 1], or int16 or int32, which are scaled
                to that; channels are coded separately. Tensors of torch will do. Or a list of such
                clips, or a `PaddedBatch` of them.
            sample_rate: in Hz, a whole number; None: the model's. Other rates are resampled.
            padding: return a `PaddedBatch`, filled up with `special_tokens.pad`; all clips need the
                same number of channels.
            batch_size: clips of a list that go through the graph together; None: one after the
                other. The tokens do not depend on it, beyond float rounding. Models that are not
                native are always run clip by clip.

        Returns:
            (C, N) int64 tokens; N = ceil(T' / hop_length), T' being the length at the model's rate.
            For a list, a list of these, none of them padded. Tensors for tensors.

        Raises:
            ValueError: wrong shape or dtype, samples that are NaN or infinite, or more than 255
                channels; of a list, with the number of the clip.
        """
        rate = self.sample_rate if sample_rate is None else check_rate(sample_rate)
        given = clips_of(samples)

        def prepared(clip: Any) -> NDArray[np.float32]:
            checked = check_samples(clip)
            return (
                resample(checked, rate, self.sample_rate) if rate != self.sample_rate else checked
            )

        def together(clips: list[NDArray[np.float32]]) -> list[NDArray[np.int64]]:
            rows, places = _stacked(clips, "constant")
            stream = self._encoder_stream(self.backend, len(rows))
            tokens = np.concatenate([stream.push(rows), stream.flush()], 1)
            hop = self.hop_length
            return [tokens[place, : -(-clip.shape[1] // hop)] for place, clip in zip(places, clips)]

        found = self._in_groups(given, prepared, together, is_batch(samples), batch_size)
        return _handed_back(found, given, samples, padding, self.special_tokens.pad)

    @overload
    def decode(
        self,
        tokens: NDArray[np.integer[Any]],
        n_samples: int | None = ...,
        *,
        first_frame: int = ...,
        padding: Literal[False] = ...,
        batch_size: int | None = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def decode(
        self,
        tokens: Sequence[NDArray[np.integer[Any]]],
        n_samples: Sequence[int] | None = ...,
        *,
        first_frame: int = ...,
        padding: Literal[False] = ...,
        batch_size: int | None = ...,
    ) -> list[NDArray[np.float32]]: ...

    @overload
    def decode(
        self,
        tokens: Any,
        n_samples: int | Sequence[int] | None = ...,
        *,
        first_frame: int = ...,
        padding: Literal[True],
        batch_size: int | None = ...,
    ) -> PaddedBatch: ...

    @overload
    def decode(
        self,
        tokens: Any,
        n_samples: int | Sequence[int] | None = ...,
        *,
        first_frame: int = ...,
        padding: bool = ...,
        batch_size: int | None = ...,
    ) -> Any: ...

    def decode(
        self,
        tokens: Any,
        n_samples: Any = None,
        *,
        first_frame: int = 0,
        padding: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """Tokens to audio: of one clip, or of a list of clips of any lengths.

        Args:
            tokens: (N,) or (C, N) integers in [0, codebook_size); or a list of these, or a
                `PaddedBatch` as `encode` returns it.
            n_samples: length to cut to, at the model's rate; None: N * hop_length. For a list, a
                list of lengths.
            first_frame: the number of the first token in its recording, for a part from the middle
                of it: a decoder with noise has the noise of the whole there.
            padding: return a `PaddedBatch`, filled up with zeros.
            batch_size: as for `encode`.

        Returns:
            (C, n_samples) float32 in [-1, 1] at the model's rate; for a list, a list of these, each
            trimmed to its own length. Tensors for tensors.

        Raises:
            ValueError: wrong shape or dtype, a token out of range (with its place), n_samples
                beyond the tokens; of a list, with the number of the clip.
        """
        given, batch = clips_of(tokens), is_batch(tokens)
        lengths = list(n_samples) if batch and n_samples is not None else [n_samples] * len(given)
        if len(lengths) != len(given):
            raise ValueError(f"{len(lengths)} lengths for {len(given)} clips")

        def prepared(clip: Any) -> NDArray[np.int64]:
            return check_tokens(clip, "(C, N)", self.codebook_size)

        def together(clips: list[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
            rows, places = _stacked(clips, "edge")  # as a stream ends: with its last token again
            stream = self._decoder_stream(self.backend, len(rows), first_frame)
            samples = stream.flush(rows)
            hop = self.hop_length
            return [samples[place, : clip.shape[1] * hop] for place, clip in zip(places, clips)]

        found = self._in_groups(given, prepared, together, batch, batch_size)
        for i, n in enumerate(lengths):
            if n is not None and not 0 <= n <= found[i].shape[1]:
                with _numbered(i if batch else None):
                    raise ValueError(
                        f"n_samples is {n}, but the tokens hold 0 to {found[i].shape[1]} samples"
                    )
            found[i] = found[i][:, :n]
        return _handed_back(found, given, tokens, padding, 0)

    def _in_groups(
        self,
        given: list[Any],
        prepared: Callable[[Any], NDArray[X]],
        together: Callable[[list[NDArray[X]]], list[NDArray[Y]]],
        batch: bool,
        batch_size: int | None,
    ) -> list[NDArray[Y]]:
        """The results for all clips, of which those of a group are computed together."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        size = 1 if batch_size is None or architecture_of(self.config) else batch_size
        shapes = [(1, *clip.shape)[-2:] if batch else (1, 0) for clip in given]
        found: dict[int, NDArray[Y]] = {}
        for numbers in groups(shapes, size):
            clips = []
            for i in numbers:
                with _numbered(i if batch else None):
                    clips.append(prepared(given[i]))
            found |= zip(numbers, together(clips))
        return [found[i] for i in range(len(given))]

    def encode_file(
        self,
        source: Source,
        target: Source,
        *,
        raw: RawFormat | None = None,
        truncated: str = "refuse",
        mono: bool = False,
        name: str = "stdin",
        progress: Progress | None = None,
    ) -> FileStats:
        """Audio file (or binary stream) to token file (or stream), in constant memory.

        Args:
            source: path of any audio file that libsndfile or ffmpeg reads, or a stream.
            target: path of the token file, which appears complete or not at all, or a stream.
            raw: layout of headerless PCM.
            truncated: "refuse" audio that ends early, or "keep" what is there.
            mono: mix the channels down to their mean.
            name: of a stream, for error messages.
            progress: told the samples that are done.

        Raises:
            AudioError: the source cannot be read.
            OSError: source or target cannot be opened or written.
        """
        with ExitStack() as stack:
            reader = stack.enter_context(
                AudioReader(source, raw=raw, name=name, truncated=truncated)
            )
            channels = 1 if mono else reader.channels
            header = AudioHeader(
                model=self.name,
                fingerprint=self.space,
                sample_rate=self.sample_rate,
                original_rate=reader.sample_rate,
                channels=channels,
                n_samples=reader.n_samples,
                hop_length=self.hop_length,
                codebook_size=self.codebook_size,
                block_frames=FILE_BLOCK if _is_file(reader) else PIPE_BLOCK,
            )
            resampler = Resampler(reader.sample_rate, self.sample_rate, channels)
            backend = self.backend if _is_file(reader) else self.backend.for_streams
            stream = self._encoder_stream(backend, channels)
            output = open_target(target, stack)
            writer = TokenWriter(output, header, coder=self.coder)
            n_samples = 0
            seconds = FILE_SECONDS if _is_file(reader) else PIPE_SECONDS
            at_once = min(round(seconds * reader.sample_rate), MAX_READ // reader.channels)
            for block in reader.blocks(max(1, at_once)):
                n_samples += block.shape[1]
                if mono:
                    block = block.mean(0, keepdims=True)
                writer.write(stream.push(resampler.process(block)))
                if progress:
                    progress("encoding", n_samples, reader.n_samples)
            writer.write(stream.push(resampler.flush()))
            writer.write(stream.flush())
            writer.close(n_samples)
            return FileStats(
                n_samples,
                reader.sample_rate,
                channels,
                writer.n_frames,
                output.bytes,
                cut=reader.cut,
            )

    def decode_file(
        self,
        source: Source | TokenReader,
        target: Source,
        *,
        rate: float | None = None,
        subtype: str | None = None,
        raw: str | None = None,
        recover: bool = False,
        max_gap: float = MAX_GAP,
        force: bool = False,
        progress: Progress | None = None,
    ) -> FileStats:
        """Token file (or binary stream) to audio file (or stream), in constant memory.

        Args:
            source: path of a token file, a stream, or a reader at its first block.
            target: path of the audio file, which appears complete or not at all, or a stream.
            rate: sample rate of the output, Hz; None: that of the original audio, or the next that
                Opus has.
            subtype: libsndfile's name of the sample format; None: 16 bits or the format's own.
            raw: write headerless PCM of this encoding (s16, s24, s32, f32).
            recover: replace damaged blocks with silence instead of stopping (a reader has its own
                setting).
            max_gap: seconds in a row that may be replaced.
            force: decode tokens of other weights all the same.
            progress: told the samples that are done, at the model's rate.

        Raises:
            TokenFileError: damaged file, or tokens of another model.
            GapError: more than `max_gap` seconds in a row are lost.
            AudioError: the target cannot hold the audio.
            OSError: source or target cannot be opened or written.
        """
        with ExitStack() as stack:
            tokens = self._read(source, stack, recover=recover, force=force)
            header = cast(AudioHeader, tokens.header)  # as `_fits` found
            rate = _output_rate(target, header.original_rate) if rate is None else check_rate(rate)
            resampler = Resampler(self.sample_rate, rate, header.channels)
            writer = stack.enter_context(
                AudioWriter(
                    target, sample_rate=rate, channels=header.channels, subtype=subtype, raw=raw
                )
            )
            stream = self._decoder_stream(self.backend, header.channels)
            done = silent = 0  # samples at the model's rate: written, and lost but not yet written

            def put(samples: NDArray[np.float32]) -> None:
                nonlocal done
                done += samples.shape[1]
                writer.write(resampler.process(samples))
                if progress:
                    progress("decoding", done, header.model_samples)

            def put_silence(n_samples: int) -> None:
                step = chunk_frames(self.config) * self.hop_length
                for start in range(0, n_samples, step):
                    put(np.zeros((header.channels, min(step, n_samples - start)), np.float32))

            def length(n_samples: int) -> int:
                return resampled_length(n_samples, header.original_rate, self.sample_rate)

            for block in tokens:
                if block.tokens is None:
                    if not silent:
                        put(stream.flush())
                        lost_from = block.start_frame / self.frame_rate
                    silent += block.n_frames * self.hop_length
                    if silent > max_gap * self.sample_rate:
                        raise GapError(
                            f"more than {max_gap:g} s in a row are lost, from {lost_from:.2f} s on"
                        )
                    continue
                if silent:
                    put_silence(silent)
                    silent = 0
                    stream = self._decoder_stream(self.backend, header.channels, block.start_frame)
                last = block.start_frame + block.n_frames == tokens.n_frames
                if last and tokens.n_samples is not None:
                    put(stream.flush(block.tokens)[:, : length(tokens.n_samples) - done])
                else:
                    put(stream.push(block.tokens))
            n_frames, n_samples = tokens.totals()
            end = length(n_samples)
            put_silence(min(silent, end - done))
            put(stream.flush()[:, : end - done])
            writer.write(resampler.flush(resampled_length(n_samples, header.original_rate, rate)))
            return FileStats(
                n_samples,
                header.original_rate,
                header.channels,
                n_frames,
                tokens.total_bytes,
                tokens.n_damaged,
            )

    def _fits(self, header: TokenHeader) -> bool:
        return (
            isinstance(header, AudioHeader)
            and header.sample_rate == self.sample_rate
            and header.hop_length == self.hop_length
        )

    def encoder_stream(
        self, channels: int = 1, *, sample_rate: float | None = None
    ) -> EncoderStream:
        """A stream that takes audio piece by piece.

        Args:
            channels: of the audio.
            sample_rate: of the audio, Hz, a whole number; None: the model's. Other rates are
                resampled, with the result of `encode`, which adds to the latency
                (docs/streaming.md).

        Raises:
            AudioError: a rate that cannot be resampled.
        """
        stream = self._encoder_stream(self.backend.for_streams, channels)
        if sample_rate is None or sample_rate == self.sample_rate:
            return stream
        return ResampledEncoderStream(stream, check_rate(sample_rate), self.sample_rate, channels)

    def decoder_stream(
        self, channels: int = 1, *, first_frame: int = 0, sample_rate: float | None = None
    ) -> DecoderStream:
        """A stream that takes tokens piece by piece, and conceals those that are lost.

        Args:
            channels: of the tokens.
            first_frame: as for `decode`.
            sample_rate: of the audio that comes out, Hz, a whole number; None: the model's.

        Raises:
            AudioError: a rate that cannot be resampled.
        """
        stream = self._decoder_stream(self.backend.for_streams, channels, first_frame)
        if sample_rate is None or sample_rate == self.sample_rate:
            return stream
        return ResampledDecoderStream(stream, self.sample_rate, check_rate(sample_rate), channels)

    def _encoder_stream(self, backend: Backend, channels: int) -> EncoderStream:
        if architecture := architecture_of(self.config):
            return architecture.encoder_stream(self.config, backend, channels)
        config = cast(AudioConfig, self.config)  # of what is not registered
        return CausalEncoderStream(config, backend, channels)

    def _decoder_stream(
        self, backend: Backend, channels: int, first_frame: int = 0
    ) -> DecoderStream:
        if architecture := architecture_of(self.config):
            return architecture.decoder_stream(self.config, backend, channels)
        config = cast(AudioConfig, self.config)
        return CausalDecoderStream(config, backend, channels, first_frame, predict=self._predict)

    def _predict(self, tokens: NDArray[np.int64], n_frames: int) -> NDArray[np.int64]:
        """(C, N) tokens -> (C, n_frames) that may follow; N > 0."""
        if self.coder is None:
            return repeat_last(tokens, n_frames)
        return self.coder.predict(tokens, n_frames)

    def token_header(
        self,
        tokens: Any,
        *,
        n_samples: int | None = None,
        original_rate: int | None = None,
    ) -> AudioHeader:
        """The header of a token file with tokens of this model, for `write_tokens`.

        Args:
            tokens: (N,) or (C, N) integers in [0, codebook_size).
            n_samples: per channel, at `original_rate`; None: as many as are in the tokens.
            original_rate: of the source, Hz; None: the model's.

        Raises:
            ValueError: as `decode`, or n_samples that are not those of so many tokens.
        """
        tokens = check_tokens(tokens, "(C, N)", self.codebook_size)
        header = AudioHeader(
            model=self.name,
            fingerprint=self.space,
            sample_rate=self.sample_rate,
            original_rate=original_rate or self.sample_rate,
            channels=len(tokens),
            n_samples=n_samples,
            hop_length=self.hop_length,
            codebook_size=self.codebook_size,
            block_frames=min(FILE_BLOCK, MAX_BLOCK_TOKENS // len(tokens)),
        )
        if n_samples is None:
            header = header.with_total(header.samples_in(tokens.shape[1]))
        if header.n_frames != tokens.shape[1]:
            raise ValueError(
                f"{header.n_samples} samples are {header.n_frames} tokens, not {tokens.shape[1]}"
            )
        return header

    def packet_format(
        self, frames: int = 3, *, channels: int = 1, redundancy: int = 0
    ) -> PacketFormat:
        """The packets that carry this model's tokens over a live link.

        Args:
            frames: tokens per channel and packet.
            channels: of the audio.
            redundancy: packets before that each packet repeats.
        """
        return PacketFormat(self.space, self.codebook_size, channels, frames, redundancy)


def _stacked(
    clips: Sequence[NDArray[X]], mode: Literal["constant", "edge"]
) -> tuple[NDArray[X], list[slice]]:
    """The channels of all clips in one array, padded to the longest, and where each clip is."""
    if len(clips) == 1:
        return clips[0], [slice(None)]
    longest = max(clip.shape[1] for clip in clips)
    rows = [
        np.pad(clip, ((0, 0), (0, longest - clip.shape[1])), mode=mode)
        if clip.shape[1]
        else np.zeros((len(clip), longest), clip.dtype)
        for clip in clips
    ]
    ends = np.cumsum([0, *(len(clip) for clip in clips)])
    return np.concatenate(rows), [slice(a, b) for a, b in pairwise(ends.tolist())]


def _handed_back(
    found: list[NDArray[Any]], given: list[Any], batch: Any, padding: bool, filler: int
) -> Any:
    """Results as the caller wants them: padded, as a list, or alone."""
    if padding:
        return padded(found, filler, given[0] if given else None)
    results = [like(result, clip) for result, clip in zip(found, given)]
    return results if is_batch(batch) else results[0]


@contextmanager
def _numbered(number: int | None) -> Iterator[None]:
    """Name the clip of a list in errors about it."""
    try:
        yield
    except ValueError as error:
        if number is None:
            raise
        raise type(error)(f"clip {number}: {error}") from None


def _output_rate(target: Source, original: int) -> int:
    """The rate of the original, or where Opus lacks it the next, or 48 kHz."""
    is_opus = isinstance(target, (str, os.PathLike)) and str(target).lower().endswith(".opus")
    return next((rate for rate in OPUS_RATES if rate >= original), 48_000) if is_opus else original


def _is_file(reader: AudioReader) -> bool:
    """Whether pieces may be long: not for a pipe, which would wait for them, nor many channels."""
    return reader.n_samples is not None and reader.channels <= 8


@dataclass(frozen=True)
class FileStats:
    """Statistics of `encode_file` or `decode_file`.

    Attributes:
        n_samples: per channel, at the original rate.
        sample_rate: the original rate, Hz.
        channels: of the audio.
        n_frames: tokens per channel.
        n_bytes: size of the token file.
        damaged: blocks replaced by silence.
        cut: in what way audio that was kept is cut short; None: it is not.
    """

    n_samples: int
    sample_rate: int
    channels: int
    n_frames: int
    n_bytes: int
    damaged: int = 0
    cut: str | None = None

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return self.n_samples / self.sample_rate

    @property
    def bitrate(self) -> float:
        """Real bit/s of all channels, file overhead included; 0 for empty audio."""
        return 8 * self.n_bytes / self.seconds if self.n_samples else 0.0
