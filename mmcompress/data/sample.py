"""One sample: a key, its texts and labels, and where its picture or sound lies. Both are decoded when asked for."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmcompress.data.sound import Waveform, decode_sound, resampled
from mmcompress.errors import UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"})
# Decoders of rarer formats are a way in for hostile files and no benefit to models that see a few hundred pixels.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# A picture of this many pixels takes 192 MB decoded; the next one may be a decompression bomb.
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Stored:
    """Bytes on disk: a whole file, or a stretch of an archive."""

    path: Path
    size: int
    offset: int = 0
    name: str = ""
    """What to call it in an error: the file's path, or the archive's path with the member."""

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
    picture: Stored | Image.Image | None = field(default=None, repr=False)
    """Where the image lies, or the image itself for data made in memory."""
    question: str = ""
    """What is asked about it; empty where a caption or a transcript is wanted."""
    turns: tuple[tuple[str, str], ...] = ()
    """What was asked and answered before, oldest first."""

    @property
    def image(self) -> Image.Image:
        """The picture as RGB, upright, transparent parts white.

        Raises UsageError when there is none, when it is not a picture, or when it is too large.
        """
        if self.picture is None:
            raise UsageError(f"sample '{self.key}' has no image", hint="use data with an image for every sample")
        return decode(self.picture) if isinstance(self.picture, Stored) else to_rgb(self.picture)

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
        """Bytes of the stored picture and sound; a picture in memory counts 3 bytes a pixel."""
        picture, audio = self.picture, self.audio
        seen = picture.size if isinstance(picture, Stored) else 3 * picture.width * picture.height if picture else 0
        heard = audio.samples.nbytes if isinstance(audio, Waveform) else audio.stored.size if audio else 0
        return seen + heard


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
