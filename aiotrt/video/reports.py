"""What goes wrong with a source or a sink: the error, and the report that is counted and handed to whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from aiotrt.errors import AiotrtError

__all__ = ["Kind", "Listener", "Report", "SourceError"]


class SourceError(AiotrtError):
    """A source cannot be opened or read: it is missing, is no video, has no picture in it, or went away for good.

    Other sources of the same pipeline go on.
    """


class Kind(Enum):
    """What a report is about."""

    CORRUPT = "corrupt"  #: a packet or picture was damaged, and left out
    TRUNCATED = "truncated"  #: a file ended before as many frames came as it says it has
    SEEK = "seek"  #: a file could not be read from where it should be; it is read from the beginning
    HARDWARE = "hardware"  #: a hardware decoder cannot be used; software decodes
    HUGE = "huge"  #: a picture of more than max_pixels was left out
    RESOLUTION = "resolution"  #: pictures have another size from now on
    LOST = "lost"  #: a live source went away; it will be tried again
    RECONNECTED = "reconnected"  #: and is back
    FAILED = "failed"  #: a source ended with an error
    INFERENCE = "inference"  #: a model refused or failed one frame
    SINK = "sink"  #: a sink raised for one result, or could not be opened or closed


@dataclass(frozen=True)
class Report:
    """Something that a source or a sink could not do. Nothing of it ends the pipeline.

    Attributes:
        kind: what it is about.
        source: the source's name; empty for a sink as a whole.
        detail: a sentence.
        error: what was raised, if something was.
    """

    kind: Kind
    source: str
    detail: str
    error: BaseException | None = None


Listener: TypeAlias = Callable[[Report], None]
