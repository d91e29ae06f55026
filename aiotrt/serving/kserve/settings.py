"""The settings of ``aiotrt serve``, from the command line and from a TOML file."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, TypeAlias, cast, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from aiotrt.batching.queue import Batching
from aiotrt.errors import InputError
from aiotrt.model import Model, load

__all__ = ["ModelSettings", "ServerSettings", "read_config", "read_text", "token_from"]

#: The options of `load` that a file may set: no functions, and none that the server sets itself.
_OPTIONS: Final = frozenset(
    (
        "device", "slots", "overlap", "max_queue", "graphs", "graph_cache_entries", "graph_cache_bytes", "hang_timeout",
        "retry", "progress", "threads", "runtime", "precision", "profiles", "sha256", "allow_host_code", "batching",
    )
)  # fmt: skip
#: The types of the options that `load` does not check at once, so that a string such as "no" is never taken for true.
_TYPES: Final[Mapping[str, tuple[str, tuple[type, ...]]]] = {
    "device": ("a string, or a list of strings", (str, list, tuple)),
    "runtime": ("a string", (str, NoneType)),
    "precision": ("a string", (str, NoneType)),
    "sha256": ("a string", (str, NoneType)),
    "graphs": ("true or false", (bool,)),
    "allow_host_code": ("true or false", (bool,)),
    "profiles": ("a list of tables", (list, tuple, Mapping, NoneType)),
    "batching": ("true, false or a table", (bool, Mapping)),
}
#: The flags of a model in a file, with their defaults.
_FLAGS: Final = {"load": True, "heed_timeout": False, "images": False, "decode_on_device": False}
Count: TypeAlias = Annotated[int, Field(gt=0)]
Duration: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pause: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: The pattern of an origin in the form that browsers send: without a path.
_ORIGIN: Final = r"^(\*|[a-z][a-z0-9+.-]*://[^/?#\s]+)$"
#: The pattern of a model's name: characters that need no quoting in a URL.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ModelSettings:
    """One model.

    Attributes:
        name: the name under which it is served.
        path: its file.
        warmup: shapes to capture ahead: for a single input a list of shapes, else a list of objects from name to shape.
        options: the options of `aiotrt.load`. ``batching`` is an object with the options of `Batching`, or true for their
            defaults; without it, requests are not stacked.
        is_loaded: whether it is loaded when the server starts; else a client has to load it.
        heeds_timeout: whether Triton's parameter ``timeout``, in microseconds, is a deadline. False by default, as in
            Triton, because clients send values such as 30 that are no real deadlines.
        labels: a text file with the name of a class in each line, for the classification extension.
        takes_images: whether strings sent for inputs of UINT8 with 1, 3 or 4 channels are image files, which are decoded.
        decodes_on_device: whether images for inputs of 3 channels are decoded to the model's device, JPEG files by its GPU.
    """

    name: str
    path: Path
    warmup: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    is_loaded: bool = True
    heeds_timeout: bool = False
    labels: Path | None = None
    takes_images: bool = False
    decodes_on_device: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"model name {self.name!r}: expected letters, digits, '.', '_' and '-', beginning with a letter or digit; "
                "give it one with NAME=FILE"
            )
        unknown = set(self.options) - _OPTIONS
        if unknown:
            raise InputError(
                f"model {self.name!r}: unknown option {min(unknown)!r}; there are {', '.join(sorted(_OPTIONS))}"
            )
        if not isinstance(self.warmup, (list, tuple)):
            raise InputError(f"model {self.name!r}: warmup must be a list of shapes, got {self.warmup!r}")
        for option, value in self.options.items():
            said, types = _TYPES.get(option, ("", (object,)))
            if not isinstance(value, types):
                raise InputError(f"model {self.name!r}: {option} must be {said}, got {value!r}")
        if self.decodes_on_device and not self.takes_images:
            raise InputError(f"model {self.name!r}: decode_on_device = true needs images = true")
        self.maker()  # raises for wrong options now, and not only when a client loads the model

    @property
    def batching(self) -> Batching:
        """How its requests are queued. They are stacked to batches only if the option ``batching`` is set."""
        options = self.options.get("batching", False)
        if not isinstance(options, Mapping):
            return Batching(stack=options)
        known = [f.name for f in dataclasses.fields(Batching)]
        unknown = set(options) - set(known)
        if unknown:
            raise InputError(f"batching has no option {min(unknown)!r}; there are {', '.join(known)}")
        try:
            return Batching(**options)
        except TypeError as error:
            raise InputError(f"batching: {error}") from error

    def maker(self) -> Callable[[], Model]:
        """Return a function that makes the model, after checking its options."""
        try:
            entries = [
                # A tuple around the shape, because `load` takes a tuple for the model's inputs: the shape is the only one.
                {name: _shape(shape) for name, shape in entry.items()} if isinstance(entry, Mapping) else (_shape(entry),)
                for entry in self.warmup
            ]
        except TypeError as error:
            raise InputError(f"model {self.name!r}: warmup must be a list of shapes, got {self.warmup!r}") from error

        def make() -> Model:
            return load(self.path, warmup=entries, **{**self.options, "batching": self.batching})

        try:
            _ = make()  # checks the options; a `Model` that was not opened holds no resources
        except InputError as error:
            raise InputError(f"model {self.name!r}: {error}") from error
        return make


@dataclass(frozen=True)
class ServerSettings:
    """The settings of the server.

    Attributes:
        models: the models that it serves.
        host: the address that it binds to.
        port: the port for HTTP, 0 for any free one.
        grpc_port: the port for gRPC, 0 for any free one; None for HTTP only.
        token: the token that clients must send as ``Authorization: Bearer``; None if they need no token.
        max_body: the maximum size of one request, in bytes.
        max_json: the maximum size of one request's JSON, in bytes. Parsing it holds the interpreter lock, for some 10 ms
            for 4 MiB.
        max_bodies: the maximum size of all requests and answers in memory together, in bytes. Bytes that have not arrived
            do not count.
        body_timeout: seconds that a client may take to send a body.
        keep_alive_timeout: seconds for which a connection may be idle between requests. It must be longer than a proxy's own
            timeout, often 60, because the proxy would otherwise send requests into connections that are being closed.
        max_deadline: seconds after which a request is answered 504, even if its client allows more.
        max_connections: the maximum number of connections; requests over further ones are answered 503.
        drain_delay: seconds between SIGTERM and the end of accepting, in which load balancers can poll `/readyz`.
        drain_timeout: seconds that running requests may take to finish after that.
        allowed_hosts: the host names by which clients may call the server, in addition to those of this machine. Empty for
            any name, if the server has a token or binds to another address than the loopback address.
        cors_origins: the sites whose pages may call the server, such as ``https://example.com``; ``*`` for all.
        repository: whether clients may load and unload the models in `models`; they can never load others.
        shared_memory: whether clients may register shared memory, of this machine or its GPUs, for tensors. They can then
            read and write all shared memory to which this process has access.
        strict_readiness: whether the server is not ready after a client has unloaded a model that was loaded at the start.
        access_log: whether each request is logged on standard output.
        docs: whether ``/docs`` shows the API. The page's scripts come from a public content delivery network.
    """

    models: tuple[ModelSettings, ...]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000
    grpc_port: Annotated[int, Field(ge=0, lt=65536)] | None = None
    token: str | None = field(default=None, repr=False)
    max_body: Count = 64 << 20
    max_json: Count = 4 << 20
    max_bodies: Count = 1 << 30
    body_timeout: Duration = 30.0
    keep_alive_timeout: Duration = 75.0
    max_deadline: Duration = 60.0
    max_connections: Count = 1000
    drain_delay: Pause = 0.0
    drain_timeout: Pause = 30.0
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[Annotated[str, Field(pattern=_ORIGIN)]] = ()
    repository: bool = True
    shared_memory: bool = False
    strict_readiness: bool = False
    access_log: bool = False
    docs: bool = False

    def __post_init__(self) -> None:
        _check(self)
        names = [model.name for model in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"model {twice!r} is named twice; give one of them another name with NAME=FILE")
        if not names:
            raise InputError("no model to serve: name a file, or a --config with [models.NAME]")


def read_config(path: Path) -> tuple[dict[str, Any], list[ModelSettings]]:
    """Read a configuration file: the options of ``[server]``, and the models of ``[models.NAME]``.

    Paths in the file are relative to its folder.

    Raises:
        InputError: the file is missing, is not TOML, or contains an unknown table or option.
    """
    try:
        found = tomllib.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    server, models = found.pop("server", {}), found.pop("models", {})
    tables = [server, models, *(models.values() if isinstance(models, dict) else ())]
    if found or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path}: expected the tables [server] and [models.NAME], and no others")
    if "token" in server:
        raise InputError(f"{path}: a token does not belong into a file that is shown around; use token_file")
    known = {f.name for f in dataclasses.fields(ServerSettings)} - {"models", "token"} | {"token_file"}
    unknown = set(server) - known
    if unknown:
        raise InputError(f"{path}: [server] has an unknown option {min(unknown)!r}; there are {', '.join(sorted(known))}")
    if "token_file" in server:
        if not isinstance(server["token_file"], str):
            raise InputError(f"{path}: token_file must be a string, got {server['token_file']!r}")
        server["token_file"] = path.parent / server["token_file"]
    settings = []
    for name, options in models.items():
        file = options.pop("path", None)
        if not isinstance(file, str):
            raise InputError(f"{path}: [models.{name}] needs a path")
        warmup, labels = options.pop("warmup", ()), options.pop("labels", None)
        flags = [options.pop(option, default) for option, default in _FLAGS.items()]
        for option, value in zip(_FLAGS, flags, strict=True):
            if not isinstance(value, bool):
                raise InputError(f"model {name!r}: {option} must be true or false, got {value!r}")
        if not isinstance(labels, str | None):
            raise InputError(f"model {name!r}: labels must be the name of a file, got {labels!r}")
        is_loaded, heeds, images, on_device = flags
        labels = None if labels is None else path.parent / labels
        settings.append(
            ModelSettings(name, path.parent / file, warmup, options, is_loaded, heeds, labels, images, on_device)
        )
    return server, settings


def token_from(file: Path | None) -> str | None:
    """Return the token in a file, or without a file the one in the environment variable ``AIOTRT_TOKEN``, or None.

    There is no option for the token itself, because all users of the machine can read command lines.

    Raises:
        InputError: the file cannot be read, or the token is too short or not printable ASCII.
    """
    try:
        token = os.environ.get("AIOTRT_TOKEN") if file is None else read_text(file)
    except InputError as error:
        raise InputError(f"token file {error}") from error
    if token is None:
        return None
    token = token.strip()  # a client's token is stripped too
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise InputError("the token must have at least 16 printable ASCII characters")
    return token


def _check(settings: ServerSettings) -> None:
    """Check that each setting has its type, and is within the type's bounds.

    Raises:
        InputError: a setting has another type or is out of bounds.
    """
    for name, kind in get_type_hints(ServerSettings, include_extras=True).items():
        value = getattr(settings, name)
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input should ")
            raise InputError(f"{name} must {said}, got {value!r}") from None


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        InputError: the file cannot be read; the message names it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8") from error


def _shape(extents: Iterable[object]) -> tuple[int, ...]:
    shape = tuple(extents)
    if not all(isinstance(extent, int) and not isinstance(extent, bool) for extent in shape):
        raise TypeError
    return cast("tuple[int, ...]", shape)
