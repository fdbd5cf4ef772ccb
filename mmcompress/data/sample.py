"""One sample: a key, its texts and labels, and where its pictures, frames or sound lie. All are decoded when asked for."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmcompress.data.sound import Waveform, decode_sound, resampled, windows
from mmcompress.errors import UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"})
# Decoders of rarer formats are a way in for hostile files and no benefit to models that see a few hundred pixels.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# A picture of this many pixels takes 192 MB decoded; the next one may be a decompression bomb.
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
# Six minutes at two frames a second, which is as much as models are given; each frame is some dozens of tokens at least.
MAX_FRAMES = 768
FRAME_RATE = 2.0


@dataclass(frozen=True)
class Stored:
    """Bytes on disk: a whole file, or a stretch of an archive."""

    path: Path
    size: int
    offset: int = 0
    name: str = ""
    """What to call it in an error: the file's path, or the archive's path with the member."""

    @classmethod
    def at(cls, path: Path) -> Stored:
        """Return the whole file at `path`. Raises UsageError when there is none."""
        if not path.is_file():
            raise UsageError(f"no file at '{path}'", hint="check the path")
        return cls(path, path.stat().st_size)

    def __str__(self) -> str:
        return self.name or str(self.path)

    def read(self) -> bytes:
        """Return the bytes. Raises UsageError when they are too many, cannot be read, or some are missing."""
        if self.size > MAX_BYTES:
            raise UsageError(
                f"{self} has {self.size:,} bytes; at most {MAX_BYTES:,} are read", hint="shrink or remove the file"
            )
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise UsageError(f"{self} cannot be read: {error.strerror}", hint="restore the file") from error
        if len(content) != self.size:
            raise UsageError(
                f"{self} has {len(content):,} bytes, expected {self.size:,}",
                hint="the file changed; open the data again",
            )
        return content


@dataclass(frozen=True)
class Audio:
    """A recording, not decoded."""

    stored: Stored
    sampling_rate: int | None = None
    """Samples per second as the metadata says, None where it says nothing. Decoding believes the file itself."""


Picture = Stored | Image.Image
"""Where an image lies, or the image itself for data made in memory."""


@dataclass(frozen=True)
class Video:
    """Frames of one size, one after the other, not decoded. Raises UsageError for none, for too many, and for a bad rate."""

    frames: tuple[Picture, ...] = field(repr=False)
    rate: float = FRAME_RATE
    """Frames per second."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.frames) <= MAX_FRAMES:
            raise UsageError(
                f"a video has {len(self.frames)} frames; from 1 to {MAX_FRAMES} are taken",
                hint="take every second or third frame, and write as many fewer frames per second",
            )
        if not 0 < self.rate < 1000:
            raise UsageError(f"a video has {self.rate:g} frames per second", hint="use a positive number, such as 2")

    def decoded(self, key: str) -> Video:
        """Return it with its frames as RGB pictures; `key` names its sample. Raises UsageError for frames of different sizes."""
        images: list[Image.Image] = []
        for number, frame in enumerate(self.frames):
            images.append(seen(frame))
            if images[-1].size != images[0].size:
                first, other = (f"{image.width} x {image.height}" for image in (images[0], images[-1]))
                name = f" ({frame})" if isinstance(frame, Stored) else ""
                raise UsageError(
                    f"frame {number + 1} of sample '{key}'{name} has {other} pixels, the first has {first}",
                    hint="draw all frames of a video at one size",
                )
        return Video(tuple(images), self.rate)


@dataclass(frozen=True)
class Sample:
    """One item of a dataset. `image` and `waveform` decode anew at each call, so hold samples rather than pictures."""

    key: str
    """Unique in its dataset and the same in every run: what pairs one evaluation with another."""
    texts: tuple[str, ...] = ()
    """Its captions, its transcript, or the answers accepted to its question."""
    label: str | None = None
    group: str | None = None
    """A coarser label, where the data has one."""
    tags: tuple[str, ...] = ()
    audio: Audio | Waveform | None = None
    """Where the recording lies, or the recording itself for data made in memory."""
    picture: Picture | None = field(default=None, repr=False)
    """Its image; the first where it has several."""
    question: str = ""
    """What is asked about it; empty where a caption or a transcript is wanted."""
    turns: tuple[tuple[str, str], ...] = ()
    """What was asked and answered before, oldest first."""
    further: tuple[Picture, ...] = field(default=(), repr=False)
    """Its images after the first."""
    video: Video | None = None
    """Frames, which stand behind its images."""

    @property
    def image(self) -> Image.Image:
        """The picture as RGB, upright, transparent parts white.

        Raises UsageError when there is none or more than one, when it is not a picture, or when it is too large.
        """
        if self.further or self.video:
            what = f"{1 + len(self.further)} images" if self.further else "video frames"
            raise UsageError(
                f"sample '{self.key}' has {what} where one image is looked at",
                hint="use a vision-language model such as LLaVA or Qwen-VL, or data with one image for every sample",
            )
        if self.picture is None:
            raise UsageError(f"sample '{self.key}' has no image", hint="use data with an image for every sample")
        return seen(self.picture)

    def showing(self, pictures: Sequence[Picture], video: Video | None = None) -> Sample:
        """Return it with these images and frames in place of its own."""
        return replace(self, picture=pictures[0] if pictures else None, further=tuple(pictures[1:]), video=video)

    def redrawn(self, draw: Callable[[Image.Image], Image.Image]) -> Sample:
        """Return it with every image and frame decoded and drawn anew.

        Raises UsageError for one that cannot be decoded, and for frames of two sizes.
        """
        video = self.video.decoded(self.key) if self.video else None
        if video:
            video = Video(tuple(draw(seen(frame)) for frame in video.frames), video.rate)
        return self.showing([draw(seen(picture)) for picture in self.pictures], video)

    def decoded(self) -> Sample:
        """Return it with every image and frame decoded. Raises what `redrawn` raises."""
        return self.redrawn(lambda image: image)

    def one_by_one(self) -> list[Sample]:
        """Return each image, then each frame, as a sample that shows nothing else."""
        shown = (*self.pictures, *(self.video.frames if self.video else ()))
        return [self] if len(shown) == len(self.pictures) == 1 else [self.showing([picture]) for picture in shown]

    def in_windows(self, rate: int, longest: int) -> list[Sample]:
        """Return its recording, at `rate` samples a second, in pieces of at most `longest` samples; see `windows`.

        Raises what `waveform` raises.
        """
        return [replace(self, audio=Waveform(window, rate)) for window in windows(self.waveform(rate), rate, longest)]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All its images, in order."""
        return () if self.picture is None else (self.picture, *self.further)

    @property
    def shown(self) -> bool:
        """Whether there is something to look at."""
        return self.picture is not None or self.video is not None

    def waveform(self, rate: int) -> np.ndarray:
        """Return the recording (N,) as float32 in -1..1, one channel, at `rate` samples a second.

        Raises UsageError when there is none, when it is not a recording, is empty or too long, MissingError without the
        packages that decode and resample.
        """
        if self.audio is None:
            raise UsageError(f"sample '{self.key}' has no audio", hint="use data with a recording for every sample")
        if isinstance(self.audio, Waveform):
            return resampled(self.audio, rate, f"the recording of sample '{self.key}'")
        stored = self.audio.stored
        return resampled(decode_sound(stored.read(), str(stored)), rate, str(stored))

    @property
    def size(self) -> int:
        """Bytes of the stored pictures, frames and sound; a picture in memory counts 3 bytes a pixel."""
        looked = (*self.pictures, *(self.video.frames if self.video else ()))
        audio = self.audio
        heard = audio.samples.nbytes if isinstance(audio, Waveform) else audio.stored.size if audio else 0
        return heard + sum(
            picture.size if isinstance(picture, Stored) else 3 * picture.width * picture.height for picture in looked
        )


def seen(picture: Picture) -> Image.Image:
    """Return a picture as RGB, upright, transparent parts white. Raises what `decode` raises."""
    return decode(picture) if isinstance(picture, Stored) else to_rgb(picture)


def decode(stored: Stored) -> Image.Image:
    """Return the RGB picture in `stored`. Raises UsageError naming the file when it is not a readable picture."""
    content = stored.read()
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its own limit; the check below is stricter and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise UsageError(
                    f"{stored} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded",
                    hint="shrink the picture, or remove it from the data",
                )
            image.load()
            return to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's plugins raise all of these on damaged files (SyntaxError: a broken PNG chunk).
        raise UsageError(
            f"{stored} is not a readable image: {_reason(error, content)}",
            hint="replace or remove the file; readable are " + ", ".join(IMAGE_FORMATS),
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` upright, in RGB, on a white page."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # 16 bits a pixel: convert() would clip everything above 255 to white.
        image = image.point(lambda level: level / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


def _reason(error: Exception, content: bytes) -> str:
    if not content:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"it starts with {content[:8]!r}"
    return str(error)
