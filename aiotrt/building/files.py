"""Atomic writes, private folders, checksums, and the recognition of files of a wrong kind."""

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
    (b"PK\x03\x04", "a zip archive, such as the files of torch.save and torch.export"),
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"<", "HTML or XML, perhaps an error page saved by a download"),
    (b"ftrt", "a TensorRT engine"),
    (b"vtrt", "a TensorRT-RTX engine"),
)


def check_readable(path: Path) -> None:
    """Check that a path names a readable file that is not empty.

    Raises:
        EngineError: the file is missing, a directory, empty or not readable.
        ResourceError: no file descriptor is left.
    """
    try:
        if path.is_dir():
            raise EngineError(f"{path}: is a directory; give the path of a file")
        with path.open("rb") as file:
            if not file.read(1):
                raise EngineError(f"{path}: the file is empty; copy or create it again")
    except FileNotFoundError:
        raise EngineError(f"{path}: there is no such file") from None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: object, error: OSError) -> EngineError | ResourceError:
    """Convert an `OSError` of reading a file to the error that the user gets."""
    kind = ResourceError if error.errno in (errno.EMFILE, errno.ENFILE) else EngineError
    return kind(f"{path}: cannot be read: {error.strerror or error}")


def is_inside(location: str) -> bool:
    """Whether a path in an ONNX model stays in the model's folder. Symbolic links are not resolved.

    Links are the user's own, and download caches consist of them; the paths in a model come from an untrusted file.
    """
    parts = PurePosixPath(location).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents, accessible to this user only.

    Raises:
        OSError: as for `Path.mkdir`.
    """
    for missing in reversed([above for above in (folder, *folder.parents) if not above.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def check_private(folder: Path) -> None:
    """Refuse a folder in which another user could replace engines and compiled kernels, because both are code.

    Raises:
        EngineError: the owner is neither this user nor root, or every user may write to the folder.
    """
    try:
        status = folder.stat()
    except OSError:  # missing, or not accessible: a later write creates it or raises
        return
    if os.name != "posix":
        return
    reason = "could replace the engines in it, and engines are code. Set AIOTRT_CACHE_DIR to a folder of your own"
    if status.st_uid not in (os.geteuid(), 0):
        raise EngineError(f"{folder}: belongs to another user, who {reason}")
    if status.st_mode & stat.S_IWOTH:
        raise EngineError(f"{folder}: is writable for every user; another user {reason}, or chmod 700 this one")


def foreign(head: bytes) -> str:
    """Return the likely kind of a file that begins with `head`, as ``" (it looks like ...)"``; empty if unknown."""
    for magic, kind in _FOREIGN:
        if head.startswith(magic):
            return f" (it looks like {kind})"
    return ""


def shortened(name: str, size: int) -> str:
    """Truncate a name to at most `size` bytes. File systems limit a name's bytes and not its characters."""
    return os.fsencode(name)[:size].decode(errors="ignore")


def digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of a file, in hexadecimal; for several files, the SHA-256 of their concatenated digests."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    return digests[0].hexdigest() if len(digests) == 1 else hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Write]:
    """Replace a file atomically: yield a function that writes to a temporary file, and rename that to `path` at the end.

    If the block raises, the temporary file is removed and `path` is unchanged. The temporary file is created at once, in
    the same folder: a folder that is not writable is detected before the work, and the rename cannot cross file systems.
    Readers see the old file or the new one, never a part.

    Raises:
        EngineError: the folder is missing or not writable, `path` is a directory, or the disk is full.
    """
    if path.is_dir():
        raise EngineError(f"{path}: is a directory; give the path of the file to write")
    temporary = path.with_name(f".{shortened(path.name, 200)}.{secrets.token_hex(6)}.tmp")
    try:
        # Not tempfile, which ignores the umask and makes files that only their owner may read.
        file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")
    except FileNotFoundError:
        raise EngineError(f"{path}: there is no folder {path.parent}; create it first") from None
    except OSError as error:
        raise EngineError(
            f"{path}: cannot write to {path.parent}: {error.strerror}; make it writable or choose another folder"
        ) from error

    def write(data: bytes | memoryview) -> None:
        with _explained(path):
            file.write(data)

    try:
        try:
            yield write
            with _explained(path):
                file.flush()
                os.fsync(file.fileno())  # without it, a power failure after the rename can leave a file of zeros
        finally:
            with contextlib.suppress(OSError):  # close() flushes again, and fails again
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
            f"{path}: could not be written: {error.strerror}; free some space or choose another folder. "
            "No partial file remains, and an existing file is unchanged"
        ) from error
