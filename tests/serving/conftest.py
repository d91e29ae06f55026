"""`make gpu` runs with a machine's own Python, which need not have what serving needs: nothing here is for a GPU."""

from __future__ import annotations

import importlib.util

if any(
    importlib.util.find_spec(name) is None for name in ("fastapi", "httpx", "orjson", "prometheus_client", "tritonclient")
):
    collect_ignore_glob = ["test_*.py"]
