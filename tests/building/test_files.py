"""Files are there in full or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import NoReturn

import pytest

from aiotrt.building.files import check_readable, digest, foreign, replacing
from aiotrt.errors import EngineError
from tests.building import models


def write(path: Path, data: bytes) -> None:
    with replacing(path) as put:
        put(data)


def test_a_new_file_takes_its_place_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as put:
        put(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_it_if_the_umask_says_so(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as put:
        put(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match=r"/a: could not be written: No space left on device; free some space"):
        write(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_a_limit_in_the_middle_of_a_large_write(tmp_path: Path) -> None:
    program = """
import pathlib, resource, sys
from aiotrt.building.files import replacing
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with replacing(pathlib.Path(sys.argv[1])) as put:
    put(bytes(1_000_000))
"""
    _, errors = models.run(program, tmp_path / "a").communicate(timeout=50)
    assert "/a: could not be written: File too large; free some space" in errors
    assert not list(tmp_path.iterdir())


def test_an_os_error_of_the_blocks_own_is_not_about_this_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is a directory"):
        write(tmp_path, b"x")
    with pytest.raises(EngineError, match=r"no folder .*missing; create it"):
        write(tmp_path / "missing" / "a", b"x")
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="Not a directory"):
        write(tmp_path / "file" / "a", b"x")
    with pytest.raises(EngineError, match=r"cannot write to /proc|no folder /proc"):
        write(Path("/proc/a.engine"), b"x")


def test_a_folder_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(EngineError, match=r"cannot write to .*Permission denied; make it writable"):
        write(tmp_path / "a", b"x")


def test_names_as_long_as_the_system_allows(tmp_path: Path) -> None:
    names = {"a" * 255, "b" + "模" * 84}
    for name in names:
        write(tmp_path / name, b"x")
    assert {path.name for path in tmp_path.iterdir()} == names


def test_digest_is_sha256_of_one_file_and_tells_several_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"12")
    b.write_bytes(b"3")
    assert digest([a]) == hashlib.sha256(b"12").hexdigest()
    before = digest([a, b])
    a.write_bytes(b"1")
    b.write_bytes(b"23")
    assert digest([a, b]) != before


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        check_readable(tmp_path / "a")
    with pytest.raises(EngineError, match="directory"):
        check_readable(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(EngineError, match="empty"):
        check_readable(tmp_path / "a")
    with pytest.raises(EngineError, match="cannot be read: Not a directory"):
        check_readable(tmp_path / "a" / "b")


def test_what_a_foreign_file_looks_like() -> None:
    assert "git lfs pull" in foreign(b"version https://git-lfs.github.com/spec/v1\n")
    assert "zip" in foreign(b"PK\x03\x04...")
    assert foreign(b"\x08\x08") == ""
