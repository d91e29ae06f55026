"""``aiotrt video detect``: run a detector on videos, and write annotated videos and JSON lines."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

import aiotrt
from aiotrt.errors import EngineError, InputError
from aiotrt.run import run as run_coroutine

if TYPE_CHECKING:
    from aiotrt.video import PipelineStatus, Sink, Source

__all__ = ["register", "run"]

_EXAMPLES: Final = """\
examples:
  aiotrt video detect street.mp4 --weights rf-detr-seg-nano.pth --out street-found.mp4
      RF-DETR-Seg-Nano from the package rfdetr, boxes, masks and labels drawn

  aiotrt video detect rtsp://door/live yard.mp4 --model detector.engine --size 384 --out 'found-{source}.mp4' --json -
      an engine or ONNX file with a DETR's outputs; two sources; a line of JSON for each frame on standard output

Without --weights and --model, RF-DETR has random weights, and its detections are meaningless. Boxes and masks are scaled to
the size of the first source's frames, which --json includes. The exit status is 1 if a source, a frame or an output failed;
the others are processed all the same.
"""


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the parser."""
    outer = subparsers.add_parser("video", help="run a model on videos", description="Run a model on videos.")
    inner = outer.add_subparsers(title="commands", metavar="COMMAND", required=True, prog=outer.prog)
    parser = inner.add_parser(
        "detect",
        help="detect objects",
        description="Detect objects in videos, and write annotated videos and JSON lines.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="a file, a URL such as rtsp://..., or a camera's number"
    )
    parser.add_argument("--model", metavar="FILE", type=Path, help=".onnx, .engine or .plan (default: RF-DETR-Seg-Nano)")
    parser.add_argument("--weights", metavar="FILE", type=Path, help="a checkpoint of RF-DETR-Seg-Nano")
    parser.add_argument("--size", metavar="PIXELS", type=int, help="height and width of the model's input (default: 312)")
    parser.add_argument(
        "--precision", choices=["fp32", "fp16"], help="precision of the model (default: fp16 on CUDA, else fp32)"
    )
    parser.add_argument("--labels", metavar="FILE", type=Path, help="names of the classes, one on each line, from class 0")
    parser.add_argument("--threshold", metavar="SCORE", type=float, default=0.5, help="the minimum score (default: 0.5)")
    parser.add_argument(
        "--top", metavar="N", type=int, default=32, help="the maximum number of objects in a frame (default: 32)"
    )
    parser.add_argument("--out", metavar="FILE", help="annotated video; {source} is replaced by the source's name")
    parser.add_argument("--json", metavar="FILE", help="a line of JSON for each frame; - for standard output")
    parser.add_argument("--device", default="auto", help="auto (the default), host, cuda or cuda:N")
    parser.add_argument("--slots", metavar="N", type=int, default=3, help="frames on the device at once (default: 3)")
    parser.add_argument(
        "--policy", choices=["every_frame", "latest"], help="default: every frame of files, the latest of others"
    )
    parser.add_argument("--max-fps", metavar="RATE", type=float, help="the maximum number of frames a second of each source")
    parser.add_argument("--frames", metavar="N", type=int, help="stop after N frames of each source")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Detect objects, and print the counts of each source."""
    from aiotrt import video
    from aiotrt.video.pipeline import number_duplicates

    for name, least in (("top", 1), ("slots", 1), ("frames", 1), ("size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: expected at least {least}")
    if arguments.model is not None and arguments.weights is not None:
        raise InputError("--weights is for RF-DETR, and --model for another model: give one of the two")
    if arguments.out is not None and len(arguments.sources) > 1 and "{source}" not in arguments.out:
        raise InputError(f"--out {arguments.out}: put {{source}} into the name, because there are several sources")
    labels = _labels(arguments)
    given = [int(source) if source.isdecimal() else source for source in arguments.sources]
    sources = [video.open(source, limit=arguments.frames) for source in given]
    number_duplicates(sources)
    _check_outputs(arguments, [source.name for source in sources])
    status = run_coroutine(_detect(arguments, given, sources, labels))
    output = sys.stderr if arguments.json == "-" else sys.stdout
    for name, source in status.sources.items():
        counts = [f"{source.completed} frames"]
        counts += [f"{number} {reason}" for reason, number in {**source.drops, **source.reports}.items()]
        counts += [f"{sink.failed} failed by {sink.name}" for sink in source.sinks if sink.failed]
        print(f"{name}: {', '.join(counts)}" + (f"; {source.error}" if source.error else ""), file=output)
    failed = any(source.error or source.failed or any(s.failed for s in source.sinks) for source in status.sources.values())
    return 1 if failed or status.reports else 0


def _labels(arguments: argparse.Namespace) -> list[str]:
    """Read the names of the classes."""
    if arguments.labels is None:
        return []
    try:
        return list(arguments.labels.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeError) as error:
        raise InputError(f"--labels {arguments.labels}: {getattr(error, 'strerror', None) or error}") from error


def _check_outputs(arguments: argparse.Namespace, sources: Sequence[str]) -> None:
    """Check that no output overwrites a file in use, before the model is loaded.

    Args:
        arguments: of the command.
        sources: the names of the sources, which are part of the videos' names.

    Raises:
        InputError: an output is also a source, another output or a file of an option, or its folder does not exist.
    """
    from aiotrt.video import VideoFile

    taken = {_place(source): f"the source {source}" for source in arguments.sources}
    for option in ("model", "weights", "labels"):
        if (file := getattr(arguments, option)) is not None:
            taken[_place(str(file))] = f"the file of --{option}"
    outputs = []
    if arguments.out is not None:
        outputs += [("out", VideoFile(arguments.out).path_of(name), f"also the video of {name!r}") for name in sources]
    if arguments.json not in (None, "-"):
        outputs.append(("json", arguments.json, ""))
    for option, output, what in outputs:
        given = f"--{option} {getattr(arguments, option)}"
        if not (folder := Path(output).parent).is_dir():
            raise InputError(f"{given}: there is no folder {folder}")
        if (place := _place(output)) in taken:
            raise InputError(f"{given}: that is {taken[place]}, which would be overwritten")
        taken[place] = what


def _place(file: str) -> Path:
    """Return a path that identifies the file; FFmpeg ignores a leading ``file:``."""
    return Path(file.removeprefix("file:")).resolve()


async def _probe(given: Sequence[int | str]) -> tuple[str, tuple[int, int], int | None]:
    """Return name, height and width, and the declared number of frames of the first source that has a frame.

    Raises:
        SourceError: no source has a frame; the error of the first one.
    """
    from aiotrt import video

    failures = []
    for source in given:
        try:
            async with video.open(source, reconnect=video.Backoff(attempts=0)) as probe:
                frame = await probe.take()
                if frame is not None:
                    height, width = frame.shape[:2]
                    return probe.name, (height, width), probe.frames
            raise video.SourceError(f"{probe.name}: it contains no frame")
        except video.SourceError as error:
            failures.append(error)
    raise failures[0]


async def _detect(
    arguments: argparse.Namespace, given: Sequence[int | str], sources: Sequence[Source], labels: Sequence[str]
) -> PipelineStatus:
    from aiotrt import video

    policy = None
    if arguments.policy is not None or arguments.max_fps is not None:
        policy = video.Policy(arguments.policy or "every_frame", max_fps=arguments.max_fps)
    name, (height, width), total = await _probe(given)
    if arguments.frames is not None:
        total = min(total or arguments.frames, arguments.frames)
    source, dtype = _model(arguments)
    try:
        model = await aiotrt.load(
            source,
            device=arguments.device,
            slots=arguments.slots,
            preprocess=video.Preprocess(arguments.size or 312, dtype),
            postprocess=video.Postprocess(height, width, top=arguments.top),
            warmup=[torch.zeros(height, width, 3, dtype=torch.uint8).numpy()],
        )
    except (EngineError, InputError) as error:
        if arguments.model is None or str(arguments.model) in str(error):
            raise
        raise EngineError(f"{arguments.model}: cannot be used as a detector: {error}") from error
    async with model:
        for reason in model.statistics().fallbacks:
            print(f"warning: {reason}", file=sys.stderr)
        sinks = _sinks(arguments, (height, width), labels, {name: total} if total else {})
        async with video.Pipeline(model, sources, sinks, policy=policy) as pipeline:
            await pipeline.wait()
        return pipeline.status()


def _model(arguments: argparse.Namespace) -> tuple[Any, torch.dtype]:
    """Return the model to load, and the dtype of its input."""
    from aiotrt.video import rfdetr

    device = (
        "cpu" if arguments.device == "host" or not torch.cuda.is_available() else arguments.device.replace("auto", "cuda")
    )
    half = arguments.precision == "fp16" or (arguments.precision is None and device != "cpu")
    dtype = torch.float16 if half else torch.float32
    if arguments.model is not None:
        return arguments.model, dtype
    return rfdetr.exported(rfdetr.network(arguments.weights), device, dtype), dtype


def _sinks(
    arguments: argparse.Namespace, size: tuple[int, int], labels: Sequence[str], totals: dict[str, int]
) -> list[Sink]:
    from aiotrt import video

    def found(output: Any) -> video.Detections:
        return video.detections(output, size, threshold=arguments.threshold)

    sinks: list[Sink] = []
    if arguments.out is not None:
        sinks.append(video.VideoFile(arguments.out, video.Annotator(found, labels=labels)))
    if arguments.json is not None:
        file = sys.stdout if arguments.json == "-" else arguments.json
        sinks.append(video.JsonLines(file, lambda output: {"size": size, "found": video.jsonable(found(output))}))
    if not arguments.quiet and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        sinks.append(video.Progress(totals))
    return sinks
