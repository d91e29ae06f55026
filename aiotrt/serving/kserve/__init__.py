"""A server for models, as other clients know it: the Open Inference Protocol (KServe v2) over HTTP.

`serve` runs it, as ``aiotrt serve`` does; `create_app` is the application, for other servers than uvicorn and for tests.
"""

from __future__ import annotations

from aiotrt.serving.kserve.app import create_app
from aiotrt.serving.kserve.server import serve
from aiotrt.serving.kserve.settings import ModelSettings, ServerSettings, read_config, token_from

__all__ = ["ModelSettings", "ServerSettings", "create_app", "read_config", "serve", "token_from"]
