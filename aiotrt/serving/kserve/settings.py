"""What ``aiotrt serve`` is told: on the command line, and in a file in TOML."""

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

#: Of `load`, those that make sense in a file: no functions, and nothing that is the server's own.
_OPTIONS: Final = frozenset(
    (
        "device", "slots", "overlap", "max_queue", "graphs", "graph_cache_entries", "graph_cache_bytes", "hang_timeout",
        "retry", "progress", "threads", "runtime", "precision", "profiles", "sha256", "allow_host_code", "batching",
    )
)  # fmt: skip
#: What those must be that `load` does not check at once, so that "no" is never taken for true.
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
#: Of a model in a file, with their defaults.
_FLAGS: Final = {"load": True, "heed_timeout": False, "images": False, "decode_on_device": False}
Count: TypeAlias = Annotated[int, Field(gt=0)]
Duration: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pause: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: As browsers send them: without a path.
_ORIGIN: Final = r"^(\*|[a-z][a-z0-9+.-]*://[^/?#\s]+)$"
#: Of a model: letters that need no quoting in a URL.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ModelSettings:
    """One model.

    Attributes:
        name: under which it is served.
        path: its file.
        warmup: shapes to capture ahead: for a single input a list of shapes, else a list of objects from name to shape.
        options: for `aiotrt.load`; ``batching`` is an object with what `Batching` takes, or true for its defaults; without
            it, nothing is stacked.
        is_loaded: whether it is loaded as the server starts, or only when a client asks for it.
        heeds_timeout: whether Triton's parameter ``timeout``, in microseconds, is a deadline. Clients send it to Triton with
            values that it does not heed by default either, such as 30.
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
        self.maker()  # what is wrong with the options is said now, not when a client loads the model

    @property
    def batching(self) -> Batching:
        """How its requests are queued; each is an item of a batch only if ``batching`` says so."""
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
        """A function that loads it."""
        try:
            entries = [
                # Not the shape by itself: one of a single extent would be taken for an input.
                {name: _shape(shape) for name, shape in entry.items()} if isinstance(entry, Mapping) else (_shape(entry),)
                for entry in self.warmup
            ]
        except TypeError as error:
            raise InputError(f"model {self.name!r}: warmup must be a list of shapes, got {self.warmup!r}") from error

        def make() -> Model:
            return load(self.path, warmup=entries, **{**self.options, "batching": self.batching})

        try:
            _ = make()  # a `Model` that nobody opens holds nothing
        except InputError as error:
            raise InputError(f"model {self.name!r}: {error}") from error
        return make


@dataclass(frozen=True)
class ServerSettings:
    """The server.

    Attributes:
        models: what it serves.
        host: the address that it binds to.
        port: 0 for any that is free.
        grpc_port: the port of the protocol over gRPC, 0 for any free one; None for HTTP only.
        token: what clients must send as ``Authorization: Bearer``; None for no such thing.
        max_body: bytes of one request.
        max_json: bytes of one request's JSON, which is read under the interpreter lock, 4 MiB in some 10 ms.
        max_bodies: bytes of all requests and answers that are in memory at once; what has not arrived does not count.
        body_timeout: seconds that a client may take to send a body.
        keep_alive_timeout: seconds for which a connection may be idle between requests. Make it longer than a proxy
            keeps its own, often 60, or it sends requests into connections that are being closed.
        max_deadline: seconds after which a request is answered 504, whatever its client said.
        max_connections: how many clients at once; more are answered 503.
        drain_delay: seconds between SIGTERM and the end of accepting, for load balancers to see `/readyz`.
        drain_timeout: seconds that requests may take to finish then.
        allowed_hosts: names by which clients may call it, beside those of this machine. Empty for any name where it has a
            token, or binds to another address than this machine's own.
        cors_origins: sites whose pages may call it, such as ``https://example.com``; ``*`` for all.
        repository: whether clients may load and unload the models that are named here; never others.
        shared_memory: whether clients may register shared memory, of this machine or its GPUs, for tensors. They may then
            read and write all shared memory that this process may.
        strict_readiness: whether the server is unready when a client has unloaded a model that was loaded at the start.
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
    """A configuration file: the options of ``[server]``, and the models of ``[models.NAME]``.

    Paths in it are relative to it.

    Raises:
        InputError: it is missing, not TOML, or has something that is not known.
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
    """The token in a file, or in the variable ``AIOTRT_TOKEN``: on the command line everybody could read it.

    Raises:
        InputError: the file cannot be read, or the token is too short to be one.
    """
    try:
        token = os.environ.get("AIOTRT_TOKEN") if file is None else read_text(file)
    except InputError as error:
        raise InputError(f"token file {error}") from error
    if token is None:
        return None
    token = token.strip()  # as those that clients send are
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise InputError("the token must have at least 16 printable ASCII characters")
    return token


def _check(settings: ServerSettings) -> None:
    """Check that each setting is of its type, and within the bounds that this names.

    Raises:
        InputError: one is not.
    """
    for name, kind in get_type_hints(ServerSettings, include_extras=True).items():
        value = getattr(settings, name)
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input should ")
            raise InputError(f"{name} must {said}, got {value!r}") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        InputError: it cannot be read; the message names it.
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
