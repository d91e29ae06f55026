"""One of the compared servers, until a signal ends it: ``python -m benchmarks.serving_rivals plain|litserve|aiotrt ...``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.serving_rivals.work import MODELS, Heart, Job


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_rivals")
    parser.add_argument("program", choices=["plain", "litserve", "aiotrt"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--file", type=Path, help="the model's; without it, it is torch's")
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--settings", type=json.loads, required=True, help="what was tuned, as JSON")
    parser.add_argument("--http", default="auto", help="uvicorn's parser")
    parser.add_argument("--loop", default="auto", help="uvicorn's event loop")
    arguments = parser.parse_args()
    job = Job(arguments.model, arguments.file, arguments.device, arguments.settings)
    options: dict[str, Any] = {"http": arguments.http, "loop": arguments.loop, "access_log": False, "log_level": "warning"}
    # Each is imported where it is asked for: none is charged with what another imports.
    if arguments.program == "litserve":
        from benchmarks.serving_rivals.lit import serve

        serve(job, arguments.port, **options)
        return
    if arguments.program == "aiotrt":
        from benchmarks.serving_rivals.ours import application
    else:
        from benchmarks.serving_rivals.plain import application
    app = application(job)
    app.add_middleware(Heart)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, **options)


if __name__ == "__main__":
    main()
