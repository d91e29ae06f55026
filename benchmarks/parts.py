"""The parts of the suite, by name."""

from __future__ import annotations

from typing import Final

from benchmarks.bench_completion import COMPLETION, THROUGHPUT
from benchmarks.bench_endurance import ENDURANCE
from benchmarks.bench_host_input import HOST_INPUT
from benchmarks.bench_jitter import JITTER
from benchmarks.bench_live_video import LIVE_VIDEO
from benchmarks.bench_loop_lag import LOOP_LAG
from benchmarks.bench_pipeline import PIPELINE
from benchmarks.bench_rfdetr_video import RFDETR_VIDEO
from benchmarks.bench_scaling import SCALING
from benchmarks.bench_stages import STAGES
from benchmarks.rows import Part

__all__ = ["PARTS", "is_judged"]

PARTS: Final[dict[str, Part]] = {
    part.name: part
    for part in (
        COMPLETION,
        STAGES,
        THROUGHPUT,
        HOST_INPUT,
        JITTER,
        SCALING,
        LOOP_LAG,
        PIPELINE,
        RFDETR_VIDEO,
        LIVE_VIDEO,
        ENDURANCE,
    )
}


def is_judged(part: Part, device: str) -> bool:
    """Whether its bars hold there: they are a GPU's, but for memory that grows and frames that are lost anywhere."""
    return device == "cuda" or part in (ENDURANCE, LIVE_VIDEO)
