"""Problems of a source or a sink: the error, and the report that is counted and passed to the listener."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from aiotrt.errors import AiotrtError

__all__ = ["Kind", "Listener", "Report", "SourceError", "UnsupportedError"]


class SourceError(AiotrtError):
    """A source cannot be opened or read: it is missing, is not a video, contains no picture, or was lost permanently.

    Other sources of the same pipeline continue.
    """


class UnsupportedError(SourceError):
    """The GPU cannot decode a source. Opening it again does not help."""


class Kind(Enum):
    """The kind of problem that a report describes."""

    CORRUPT = "corrupt"  #: a packet or picture is damaged
    TRUNCATED = "truncated"  #: a file ended before its declared number of frames or duration
    SEEK = "seek"  #: a file cannot be read from `start`; it is read from the beginning
    HARDWARE = "hardware"  #: a hardware decoder cannot be used; software decodes
    DECODER = "decoder"  #: which decoder is used from here, with ``decode="auto"`` or after damage, and why
    HUGE = "huge"  #: a picture has more than max_pixels, and was skipped
    RESOLUTION = "resolution"  #: the size of the pictures changed
    LOST = "lost"  #: a live source was lost; it will be opened again
    RECONNECTED = "reconnected"  #: a lost source gives frames again
    FAILED = "failed"  #: a source ended with an error
    INFERENCE = "inference"  #: a model rejected a frame, or failed for it
    SINK = "sink"  #: a sink raised for a result, or could not be closed


@dataclass(frozen=True)
class Report:
    """A problem of a source or a sink that does not end the pipeline.

    Attributes:
        kind: the kind of problem.
        source: the source's name; empty for a sink as a whole.
        detail: a description.
        error: the exception, if there is one.
    """

    kind: Kind
    source: str
    detail: str
    error: BaseException | None = None


Listener: TypeAlias = Callable[[Report], None]
