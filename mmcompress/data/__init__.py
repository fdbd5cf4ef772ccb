"""Images, texts and audio from folders and tar shards: in a fixed order, streamed, never held in memory.

`open_data(spec)` is the way in; what it returns can be iterated as often as one likes.
"""

from mmcompress.data.classes import ZeroShot, zero_shot_classes
from mmcompress.data.dataset import Dataset, Memory, Source, batches
from mmcompress.data.opening import open_data
from mmcompress.data.sample import Audio, Sample, Stored, Video
from mmcompress.data.sound import Waveform

__all__ = [
    "Audio",
    "Dataset",
    "Memory",
    "Sample",
    "Source",
    "Stored",
    "Video",
    "Waveform",
    "ZeroShot",
    "batches",
    "open_data",
    "zero_shot_classes",
]
