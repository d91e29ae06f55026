"""Files that are either there in full or not there at all, and what a file that is not what it should be looks like."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final, TypeAlias

from aiotrt.errors import EngineError, ResourceError

__all__ = [
    "Write", "check_private", "check_readable", "digest", "foreign", "is_inside", "make_private", "replacing", "shortened",
    "unreadable",
]  # fmt: skip

Write: TypeAlias = Callable[[bytes | memoryview], None]

_FOREIGN: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"PK\x03\x04", "a zip archive, such as torch.save and torch.export write"),
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"<", "HTML or XML, perhaps an error page saved by a download"),
    (b"ftrt", "a TensorRT engine"),
    (b"vtrt", "a TensorRT-RTX engine"),
)


def check_readable(path: Path) -> None:
    """Refuse a file that cannot be one.

    Raises:
        EngineError: it is missing, a directory, empty, or may not be read.
        ResourceError: no file descriptor is left.
    """
    try:
        if path.is_dir():
            raise EngineError(f"{path}: is a directory; name the file in it")
        with path.open("rb") as file:
            if not file.read(1):
                raise EngineError(f"{path}: the file is empty; copy or make it again")
    except FileNotFoundError:
        raise EngineError(f"{path}: there is no such file") from None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: object, error: OSError) -> EngineError | ResourceError:
    """The error that a user gets for one of the system's."""
    kind = ResourceError if error.errno in (errno.EMFILE, errno.ENFILE) else EngineError
    return kind(f"{path}: cannot be read: {error.strerror or error}")


def is_inside(location: str) -> bool:
    """Whether a file that an ONNX model names is in the model's folder: as it is written, and not where a link leads.

    Caches of downloads are full of links, and those are the user's own; a model comes from anywhere.
    """
    parts = PurePosixPath(location).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def make_private(folder: Path) -> None:
    """Make a folder for this user alone, and those above it that are missing.

    Raises:
        OSError: as for `Path.mkdir`.
    """
    for missing in reversed([above for above in (folder, *folder.parents) if not above.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def check_private(folder: Path) -> None:
    """Refuse a folder in which another user may swap what aiotrt keeps there: engines and kernels are code.

    Raises:
        EngineError: it belongs to another user than this one and root, or everybody may write to it.
    """
    try:
        status = folder.stat()
    except OSError:  # it is made, or what is wrong is said when it is written to
        return
    if os.name != "posix":
        return
    remedy = "engines are code. Set AIOTRT_CACHE_DIR to a folder of your own"
    if status.st_uid not in (os.geteuid(), 0):
        raise EngineError(f"{folder}: it belongs to another user, who may swap the engines in it, and {remedy}")
    if status.st_mode & stat.S_IWOTH:
        raise EngineError(
            f"{folder}: everybody may write to it and swap the engines in it, and {remedy}, or chmod 700 this one"
        )


def foreign(head: bytes) -> str:
    """What a file that begins with `head` seems to be, as ``" (it looks like ...)"``; empty where there is no telling."""
    for magic, kind in _FOREIGN:
        if head.startswith(magic):
            return f" (it looks like {kind})"
    return ""


def shortened(name: str, size: int) -> str:
    """A name's beginning, in so many bytes at most: file systems count those, and not characters."""
    return os.fsencode(name)[:size].decode(errors="ignore")


def digest(paths: Iterable[Path]) -> str:
    """The SHA-256 of a file, in hexadecimal; of several files, that of their SHA-256s, one after the other."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    return digests[0].hexdigest() if len(digests) == 1 else hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Write]:
    """Give a function that writes to a file, which becomes `path` when the block ends well, and is gone when it does not.

    The file is opened at once, in the same folder: a folder that cannot be written to is found out before the work, and
    the change of name at the end cannot cross file systems. Readers see the old file or the new one, never half of one.

    Raises:
        EngineError: the folder is missing or not writable, `path` is a directory, or the disk is full.
    """
    if path.is_dir():
        raise EngineError(f"{path}: is a directory; name the file to write in it")
    temporary = path.with_name(f".{shortened(path.name, 200)}.{secrets.token_hex(6)}.tmp")
    try:
        # Not tempfile: that makes files which only their owner may read, whatever the umask says.
        file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")
    except FileNotFoundError:
        raise EngineError(f"{path}: there is no folder {path.parent}; create it first") from None
    except OSError as error:
        raise EngineError(
            f"{path}: cannot write to {path.parent}: {error.strerror}; make it writable or name another folder"
        ) from error

    def write(data: bytes | memoryview) -> None:
        with _explained(path):
            file.write(data)

    try:
        try:
            yield write
            with _explained(path):
                file.flush()
                os.fsync(file.fileno())  # or a power cut after the change of name leaves a file of zeros
        finally:
            with contextlib.suppress(OSError):  # it would try to write once more what could not be written
                file.close()
        with _explained(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"{path}: could not be written: {error.strerror}; make room or name another folder. "
            "Nothing was left behind, and a file that was there before is unchanged"
        ) from error
