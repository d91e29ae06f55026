"""A model server that existing clients can use: the Open Inference Protocol (KServe v2) over HTTP and gRPC.

`serve` runs it, as ``aiotrt serve`` does; `create_app` makes the application, for servers other than uvicorn and for tests.
`aiotrt.serving.kserve.grpc_server.GrpcServer` serves a `Service` over gRPC, and needs ``aiotrt[grpc]``.
"""

from __future__ import annotations

from aiotrt.serving.kserve.app import create_app
from aiotrt.serving.kserve.server import serve
from aiotrt.serving.kserve.service import Service
from aiotrt.serving.kserve.settings import ModelSettings, ServerSettings, read_config, token_from

__all__ = ["ModelSettings", "ServerSettings", "Service", "create_app", "read_config", "serve", "token_from"]
