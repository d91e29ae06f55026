"""``aiotrt build``: build a TensorRT engine from an ONNX file."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aiotrt.building import build, check_sidecar
from aiotrt.building.files import check_readable
from aiotrt.building.profiles import OpenShapesError, Profile, Range
from aiotrt.errors import InputError

__all__ = ["register", "run"]

_EXAMPLES: Final = """\
examples:
  aiotrt build classifier.onnx
      static shapes; writes classifier.engine

  aiotrt build detector.onnx -o detector.engine --precision fp16 \\
      --profile x:1x3x32x32,1x3x640x640,4x3x960x960
      input x is dynamic: smallest, usual and largest shape

  aiotrt build detector.onnx --profile x:1x3x320x320 --profile x:8x3x320x320
      two profiles, each of one shape

  aiotrt build detector.onnx --runtime tensorrt_rtx --compute-capability sm89 --compute-capability sm120
      for two kinds of GPU, on a machine that has none
"""
_UNITS: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "build",
        help="build a TensorRT engine from an ONNX file",
        description="Build a TensorRT engine from an ONNX file. Ctrl-C stops it and leaves nothing behind.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="the engine (default: MODEL.engine)")
    parser.add_argument("--runtime", choices=["tensorrt", "tensorrt_rtx"], help="the builder (default: the installed one)")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: the types in the file")
    parser.add_argument(
        "--profile",
        metavar="INPUT:SHAPES",
        action="append",
        nargs="+",
        default=[],
        help="smallest, usual and largest shape of each dynamic input, or one shape; several make several profiles",
    )
    parser.add_argument(
        "--compute-capability",
        metavar="SM",
        action="append",
        default=[],
        help="a GPU to build for, such as sm89 (TensorRT-RTX; default: every one it supports from Ampere on)",
    )
    parser.add_argument("--optimization-level", metavar="0-5", type=int, help="0 builds fast, 5 runs fast (default: 3)")
    parser.add_argument("--workspace", metavar="SIZE", help="the maximum scratch memory of a layer, such as 512M or 2G")
    parser.add_argument("--timing-cache", metavar="FILE", type=Path, help="a file that keeps kernel timings between builds")
    parser.add_argument("--device", metavar="N", type=int, help="the GPU to build on")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the engine's record instead of a summary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Build the engine, and print a summary."""
    check_readable(arguments.model)  # before `with_suffix`, which fails for a folder such as "." or "/"
    # The bar is optional: it is omitted without rich, and if standard error is not a terminal.
    bar = not arguments.quiet and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    try:
        engine = build(
            arguments.model,
            arguments.out or arguments.model.with_suffix(".engine"),
            runtime=arguments.runtime,
            precision=arguments.precision,
            profiles=[parse_profile(entries) for entries in arguments.profile],
            compute_capabilities=arguments.compute_capability,
            timing_cache=arguments.timing_cache,
            workspace_bytes=None if arguments.workspace is None else parse_size(arguments.workspace, "--workspace"),
            optimization_level=arguments.optimization_level,
            device=arguments.device,
            progress=bar,
        )
    except OpenShapesError as error:  # suggest the command's option, not the Python argument
        example = " ".join(shlex.quote(f"{name}:{_written(shapes)}") for name, shapes in error.example.items())
        raise InputError(f"{error.what}, for instance --profile {example}") from error
    sidecar = check_sidecar(engine)
    assert sidecar is not None, "build wrote it"
    if arguments.json:
        print(sidecar.to_json(), end="")
        return 0
    for line in sidecar.mended:
        print(f"repaired: {line}")
    print(f"{engine}: {sidecar.engine['size'] / 1e6:.1f} MB in {sidecar.seconds:.1f} s, {sidecar}")
    return 0


def parse_profile(entries: Sequence[str]) -> Profile:
    """Parse a profile: ``x:1x3x32x32,1x3x640x640,4x3x960x960`` for each input, or one shape that is used for all three.

    Raises:
        InputError: an entry has another form, or names an input again.
    """
    profile: Profile = {}
    for entry in entries:
        name, _, text = entry.rpartition(":")  # from the right: some exporters have colons in names
        shapes = text.split(",")
        if not name or len(shapes) not in (1, 3) or not all(re.fullmatch(r"\d+(x\d+)*", shape) for shape in shapes):
            raise InputError(
                f"--profile {entry!r}: expected INPUT:SMALLEST,USUAL,LARGEST as in x:1x3x32x32,1x3x640x640,4x3x960x960, or "
                "INPUT:SHAPE; the model comes before the profiles"
            )
        if name in profile:
            raise InputError(
                f"--profile: input {name!r} is given twice in one profile; repeat --profile for another profile"
            )
        low, usual, high = (tuple(map(int, shape.split("x"))) for shape in (shapes if len(shapes) == 3 else shapes * 3))
        profile[name] = low, usual, high
    return profile


def _written(shapes: Range) -> str:
    return ",".join("x".join(map(str, shape)) for shape in shapes)


def parse_size(text: str, option: str) -> int:
    """Parse a number of bytes such as ``512M`` or ``2G``, the value of `option`.

    Raises:
        InputError: the text has another form.
    """
    match = re.fullmatch(r"(\d+)([kmg]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise InputError(f"{option} {text!r}: expected a number of bytes, such as 512M or 2G")
    return int(match[1]) * _UNITS[match[2]]
