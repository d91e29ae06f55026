"""The cache of engines: one build for each content, options, TensorRT and GPU, however many processes ask."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aiotrt.building import build, cache_directory, cached_engine, check_sidecar, sidecar_path
from aiotrt.building.files import check_private, make_private
from aiotrt.building.profiles import Examples
from aiotrt.errors import EngineError, InputError
from tests.building import models

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx; it runs without a GPU")

PROGRAM = """
import logging, sys
from aiotrt.building import cached_engine
logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("aiotrt.building").setLevel(logging.INFO)
def report(progress): print("step", flush=True)
shapes = ((1, 3, 48, 32), (1, 3, 48, 320), (2, 3, 48, 640))
print("ready", flush=True)
sys.stdin.readline()
print(cached_engine(sys.argv[1], profiles={"x": shapes}, progress=report), flush=True)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start() -> subprocess.Popen[str]:
    """A process that will ask for the recogniser when it is told to."""
    process = models.run(PROGRAM, models.ocr("recogniser"), stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_cache_that_others_may_write_to_is_refused(cache: Path) -> None:
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    with pytest.raises(EngineError, match=rf"{cache}: is writable for every user; .*AIOTRT_CACHE_DIR.* chmod 700"):
        cached_engine(models.ocr("classifier"))
    assert list(cache.iterdir()) == []
    cache.chmod(0o1777)  # as /tmp is: in it, others may make what is not there yet
    with pytest.raises(EngineError, match="is writable for every user"):
        cached_engine(models.ocr("classifier"))


def test_a_cache_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    owner = cache.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    if owner == 0:  # root's is everybody's
        check_private(cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "stat", lambda self: os.stat_result((0o40700, 0, 0, 0, 999, 0, 0, 0, 0, 0)))
            with pytest.raises(EngineError, match="belongs to another user"):
                check_private(cache)
    else:
        with pytest.raises(EngineError, match="belongs to another user"):
            check_private(cache)


def test_folders_above_the_cache_are_made_for_this_user_too(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [(tmp_path / part).stat().st_mode & 0o777 for part in ("a", "a/b", "a/b/c")] == [0o700] * 3


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_directory() == cache
    monkeypatch.delenv("AIOTRT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/aiotrt")
    for useless in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert cache_directory() == Path.home() / ".cache" / "aiotrt"


def test_an_engine_is_built_once(tmp_path: Path, cache: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    engine = cached_engine(path)
    built = engine.stat().st_mtime_ns
    assert engine.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert check_sidecar(engine) is not None
    assert cached_engine(str(path), runtime="tensorrt_rtx") == engine
    path.rename(tmp_path / "b.onnx")  # the name is for people, the content is what counts
    assert cached_engine(tmp_path / "b.onnx").stem.split("-")[1] == engine.stem.split("-")[1]
    long = (tmp_path / "b.onnx").rename(tmp_path / f"{'模' * 80}.onnx")
    assert cached_engine(long).stem.split("-")[1] == engine.stem.split("-")[1]
    assert engine.stat().st_mtime_ns == built


def test_what_makes_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.relu(tmp_path / "a.onnx", (None, 8))
    options: list[dict[str, Any]] = [
        {"profiles": {"x": (1, 8)}},
        {"profiles": {"x": (2, 8)}},
        {"profiles": iter([{"x": (1, 8)}, {"x": (2, 8)}])},
        {"profiles": {"x": (1, 8)}, "precision": "fp16"},
        {"profiles": {"x": (1, 8)}, "compute_capabilities": iter(["sm89"])},
        {"profiles": {"x": (1, 8)}, "optimization_level": 0},
        {"profiles": {"x": (1, 8)}, "workspace_bytes": 1 << 20},
    ]
    engines = [cached_engine(path, **entry) for entry in options]
    monkeypatch.setattr("aiotrt.building.cache.gpu_record", lambda device: {"name": "L4", "compute_capability": "8.9"})
    engines.append(cached_engine(path, **options[0]))
    models.relu(path, (None, "m"))
    engines.append(cached_engine(path, profiles={"x": (1, 8)}))
    assert len(set(engines)) == len(engines)
    same: list[dict[str, Any]] = [
        {"profiles": [{"x": [[1, 8]] * 3}]},
        {"profiles": {"x": (1, 8)}, "timing_cache": "elsewhere"},
    ]
    assert {cached_engine(path, **entry) for entry in same} == {engines[-1]}


def test_a_damaged_engine_is_built_again(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    engine = cached_engine(path)
    good = engine.read_bytes()
    for damage in (good[:-1], good[:-1] + b"?", b""):
        engine.write_bytes(damage)
        assert cached_engine(path) == engine
        assert check_sidecar(engine) is not None
    sidecar_path(engine).unlink()
    cached_engine(path)
    assert check_sidecar(engine) is not None


def test_an_engine_of_what_the_file_became_meanwhile_is_not_kept_for_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(path: Path, *arguments: Any, **options: Any) -> Path:
        models.relu(path, (1, 16))
        return build(path, *arguments, **options)

    path = models.relu(tmp_path / "a.onnx", (1, 8))
    monkeypatch.setattr("aiotrt.building.cache.build", changed)
    engine = cached_engine(path)
    monkeypatch.undo()
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(engine.parent))
    assert cached_engine(models.relu(path, (1, 8))) == engine
    sidecar = check_sidecar(engine)
    assert sidecar is not None
    assert sidecar.inputs[0]["shape"] == [1, 8]


def test_two_processes_at_once_build_once(cache: Path) -> None:
    processes = [start(), start()]
    for process in processes:
        go(process)
    outputs = [process.communicate(timeout=50) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [output.splitlines() for output, _ in outputs]
    assert lines[0][-1] == lines[1][-1]
    assert sum("step" in output for output in lines) == 1, "one of them built"
    assert sum("another process is building" in output for output, _ in outputs) == 1, "and the other waited"
    assert len(list(cache.glob("*.engine"))) == 1


def test_a_builder_that_is_killed_is_no_obstacle(cache: Path) -> None:
    first, second = start(), start()
    go(first)
    assert first.stdout is not None
    while first.stdout.readline() != "step\n":
        assert first.poll() is None
    go(second)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=50)
    output, errors = second.communicate(timeout=50)
    assert second.returncode == 0, errors
    assert check_sidecar(Path(output.splitlines()[-1])) is not None


@pytest.mark.parametrize("place", ["file/cache", "/proc/aiotrt"])
def test_a_cache_that_cannot_be_written_to(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.relu(tmp_path / "a.onnx")
    (tmp_path / "file").touch()
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(tmp_path / place))
    with pytest.raises(EngineError) as caught:
        cached_engine(path)
    for text in (str(path), str(tmp_path / place), "Set AIOTRT_CACHE_DIR", "aiotrt.build"):
        assert text in str(caught.value)


def test_a_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    path = models.relu(tmp_path / "a.onnx")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match=r"No space left on device.*Set AIOTRT_CACHE_DIR"):
        cached_engine(path)
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}
    monkeypatch.undo()
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(cache))
    assert cached_engine(path).parent == cache, "the lock was let go"


def test_errors_of_the_model_are_the_models(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx", (None, 8))
    with pytest.raises(InputError, match="profiles="):
        cached_engine(path)
    with pytest.raises(InputError, match="precision"):
        cached_engine(path, precision="fp17")
    path.write_bytes(b"")
    with pytest.raises(EngineError, match="empty"):
        cached_engine(path)


def test_without_profiles_the_examples_say_which_shapes_the_engine_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = models.relu(tmp_path / "a.onnx", ("n", 3))
    with pytest.raises(InputError, match="is dynamic: give the"):
        cached_engine(path)
    with caplog.at_level("INFO", "aiotrt.building"):
        engine = cached_engine(path, examples=Examples(((((2, 3),), {}), (((5, 3),), {}))))
    assert "without profiles=, the profile is derived from warmup=" in caplog.text
    sidecar = check_sidecar(engine)
    assert sidecar is not None
    assert [{name: [tuple(shape) for shape in shapes] for name, shapes in p.items()} for p in sidecar.profiles] == [
        {"x": [(2, 3), (2, 3), (5, 3)]}
    ]
    assert cached_engine(path, profiles={"x": ((2, 3), (2, 3), (5, 3))}) == engine
    assert cached_engine(path, examples=Examples(((((4, 3),), {}),))) != engine
