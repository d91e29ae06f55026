"""``aiotrt serve``: serve models over HTTP and gRPC, with the Open Inference Protocol."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiotrt.cli.build import parse_size
from aiotrt.errors import EngineError, InputError

if TYPE_CHECKING:
    from aiotrt.serving.kserve import ModelSettings, ServerSettings

__all__ = ["register", "run"]

_EXAMPLES: Final = """\
examples:
  aiotrt serve detector.onnx
      http://127.0.0.1:8000/v2/models/detector/infer

  aiotrt serve text=detector.engine direction=classifier.engine --port 9000 --slots 3 --batching
  aiotrt serve --config models.toml --host 0.0.0.0 --token-file token
"""


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "serve",
        help="serve models over HTTP and gRPC",
        description="Serve models over HTTP, and with --grpc-port over gRPC, with the Open Inference Protocol (KServe v2), "
        "which Triton's clients use.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="FILE, or NAME=FILE; the default name is the file's")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="TOML with [server] and [models.NAME]; options override it"
    )
    parser.add_argument("--host", help="the address to bind to (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="default: 8000; 0 for any free port")
    parser.add_argument("--grpc-port", type=int, help="serve gRPC too, at this port (Triton's is 8001); 0 for any free port")
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="a token that clients must send; or AIOTRT_TOKEN")
    parser.add_argument("--max-body", metavar="SIZE", help="maximum size of a request, such as 64M (the default)")
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        help="a host name under which clients call the server; may be repeated",
    )
    parser.add_argument(
        "--cors-origin", metavar="ORIGIN", action="append", help="a site whose pages may call it; * for all; may be repeated"
    )
    parser.add_argument(
        "--drain-delay", metavar="SECONDS", type=float, help="delay from SIGTERM until the server stops accepting requests"
    )
    parser.add_argument(
        "--drain-timeout", metavar="SECONDS", type=float, help="time after that for requests to finish (default: 30)"
    )
    parser.add_argument(
        "--keep-alive-timeout", metavar="SECONDS", type=float, help="time for which a connection may be idle (default: 75)"
    )
    parser.add_argument(
        "--shared-memory", action="store_true", default=None, help="let clients register shared memory for their tensors"
    )
    parser.add_argument("--access-log", action="store_true", default=None, help="log each request on standard output")
    parser.add_argument(
        "--docs", action="store_true", default=None, help="show the API at /docs, with scripts from a public CDN"
    )
    models = parser.add_argument_group("for the models given as arguments")
    models.add_argument(
        "--device", help="auto (the default), host, cuda, cuda:N, several with commas, or cuda:* for all GPUs"
    )
    models.add_argument("--slots", type=int, help="requests on the device at once (default: 2)")
    models.add_argument("--max-queue", type=int, help="requests that may wait before 503 (default: 1024)")
    models.add_argument("--threads", type=int, help="CPU threads of one run, with --device host (default: 1)")
    models.add_argument("--batching", action="store_true", help="batch requests, which are items without a batch dimension")
    models.add_argument(
        "--shape",
        metavar="SHAPE",
        action="append",
        default=[],
        help="a shape to capture at start, such as 1x3x640x640; for models with one input",
    )
    parser.set_defaults(run=run, errors=True)  # the server continues after failed requests


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the process."""
    from aiotrt.serving.kserve import serve

    settings = settings_from(arguments)
    # Otherwise gRPC's library logs a line on standard error for each client error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    loading = ", ".join(model.name for model in settings.models if model.is_loaded)

    def started(address: str) -> None:
        print(f"starting at {address} (in a browser, a status page); loading {loading or 'nothing yet'}", flush=True)
        if settings.token is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            print("no token is set: any client that can reach this address may use it", flush=True)

    def grpc_started(address: str) -> None:
        print(f"gRPC at {address}", flush=True)

    def loaded() -> None:
        print(f"serving {', '.join(model.name for model in settings.models)}", flush=True)

    try:
        return serve(settings, started=started, grpc_started=grpc_started, loaded=loaded)
    except InputError as error:
        if arguments.shape:  # the message is for a caller of the model: name the option
            raise InputError(f"--shape {' '.join(arguments.shape)}: {error}") from error
        raise
    except OSError as error:
        raise EngineError(f"cannot serve at {settings.host} port {settings.port}: {error}") from error


def settings_from(arguments: argparse.Namespace) -> ServerSettings:
    """Combine the command line with the configuration file.

    Raises:
        InputError: a setting in one of them is invalid.
        EngineError: a model's file is missing.
    """
    from aiotrt.serving.kserve import ServerSettings, read_config, token_from

    server, models = read_config(arguments.config) if arguments.config is not None else ({}, [])
    names = ("host", "port", "grpc_port", "token_file", "drain_delay", "drain_timeout", "keep_alive_timeout")
    for name in (*names, "shared_memory", "access_log", "docs"):
        if getattr(arguments, name) is not None:
            server[name] = getattr(arguments, name)
    for name in ("allowed_host", "cors_origin"):
        if getattr(arguments, name):
            server[f"{name}s"] = getattr(arguments, name)
    if arguments.max_body is not None:
        server["max_body"] = parse_size(arguments.max_body, "--max-body")
    models += [_model(text, arguments) for text in arguments.models]
    token = token_from(server.pop("token_file", None))
    settings = ServerSettings(tuple(models), token=token, **server)
    for model in settings.models:
        if not model.path.is_file():
            raise EngineError(f"model {model.name!r}: there is no file {model.path}")
    return settings


def _model(text: str, arguments: argparse.Namespace) -> ModelSettings:
    from aiotrt.serving.kserve import ModelSettings

    # A path may contain "=", a name may not: the first "=" ends the name, unless the whole text is a file.
    name, _, file = ("", "", text) if "=" not in text or Path(text).is_file() else text.partition("=")
    path = Path(file)
    options: dict[str, Any] = {
        option: getattr(arguments, option)
        for option in ("device", "slots", "max_queue", "threads")
        if getattr(arguments, option) is not None
    }
    if "," in options.get("device", ""):
        options["device"] = options["device"].split(",")
    if arguments.batching:
        options["batching"] = True
    try:
        warmup = [tuple(map(int, shape.split("x"))) for shape in arguments.shape]
    except ValueError as error:
        raise InputError(f"--shape: expected a shape such as 1x3x640x640, got {' '.join(arguments.shape)!r}") from error
    return ModelSettings(name or path.stem, path, warmup, dict(options))
