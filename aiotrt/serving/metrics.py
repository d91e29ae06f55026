"""Metrics for Prometheus. They are read from `Model.statistics` at each scrape, so there are no counters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from aiotrt.model import Model, Statistics

__all__ = ["ModelsCollector"]

_OUTCOMES: Final = ("completed", "failed", "cancelled", "rejected", "expired")
_STATES: Final = ("free", "claimed", "preparing", "in_flight", "readable", "draining", "broken")
#: Field of `Statistics`, name of the metric, and its description.
_COUNTERS: Final = (
    ("replays", "aiotrt_graph_replays", "Launches of captured graphs."),
    ("fallback_runs", "aiotrt_graph_fallback_runs", "Launches that were not one graph."),
    ("captures", "aiotrt_graph_captures", "Graphs, or what stands in for one, that were built."),
    ("hits", "aiotrt_graph_hits", "Requests, or batches, whose graph was there."),
    ("misses", "aiotrt_graph_misses", "Requests, or batches, for which a graph had to be built first."),
    ("evictions", "aiotrt_graph_evictions", "Graphs that were given up for others."),
    ("padding", "aiotrt_batch_padding", "Rows of batches that held no item of their own."),
)
_GAUGES: Final = (
    ("waiting", "aiotrt_queue_waiting", "Callers in line for a slot."),
    ("graphs", "aiotrt_graphs", "Graphs that are kept now."),
    ("graph_bytes", "aiotrt_graph_bytes", "Bytes of device memory that they keep."),
)


class ModelsCollector(Collector):
    """A collector of the statistics of each model.

    Args:
        models: returns the models that are open now, by name.
        names: returns the names of all models, open or not.
    """

    def __init__(self, models: Callable[[], Mapping[str, Model]], names: Callable[[], Iterable[str]]) -> None:
        self._models = models
        self._names = names

    def describe(self) -> Iterable[Metric]:
        """Return no metrics: without this method the registry would call `collect` at once, before any model is open."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics with their present values."""
        models = dict(self._models())
        now = {name: model.statistics() for name, model in models.items()}
        ready = GaugeMetricFamily("aiotrt_model_ready", "Whether a call now could succeed.", labels=["model"])
        for name in self._names():
            ready.add_metric([name], name in models and models[name].is_ready)
        yield ready
        degraded = GaugeMetricFamily(
            "aiotrt_model_degraded", "Whether some of its devices broke, and others go on.", labels=["model"]
        )
        for name, model in models.items():
            degraded.add_metric([name], model.is_degraded)
        yield degraded
        requests = CounterMetricFamily("aiotrt_requests", "Calls and leases, by outcome.", labels=["model", "outcome"])
        slots = GaugeMetricFamily("aiotrt_slots", "Slots, by state.", labels=["model", "state"])
        fallbacks = GaugeMetricFamily(
            "aiotrt_graph_fallbacks", "Different reasons for which something runs without a graph.", labels=["model"]
        )
        batches = CounterMetricFamily("aiotrt_batches", "Batches, by how many items they held.", labels=["model", "items"])
        sizes = HistogramMetricFamily("aiotrt_batch_size", "Items of a batch.", labels=["model"])
        for name, statistics in now.items():
            if statistics.batches:
                sizes.add_metric([name], *_histogram(statistics.batches))
            for items, count in statistics.batches.items():
                batches.add_metric([name, str(items)], count)
            for outcome in _OUTCOMES:
                requests.add_metric([name, outcome], getattr(statistics, outcome))
            for state in _STATES:
                slots.add_metric([name, state], getattr(statistics, state))
            fallbacks.add_metric([name], len(statistics.fallbacks))
        yield from (requests, slots, fallbacks, batches, sizes)
        for field, title, text in _COUNTERS:
            counter = CounterMetricFamily(title, text, labels=["model"])
            for name, statistics in now.items():
                counter.add_metric([name], getattr(statistics, field))
            yield counter
        for field, title, text in _GAUGES:
            gauge = GaugeMetricFamily(title, text, labels=["model"])
            for name, statistics in now.items():
                gauge.add_metric([name], getattr(statistics, field))
            yield gauge
        yield from _devices(now)
        yield from _hub(now)


def _devices(now: Mapping[str, Statistics]) -> Iterable[Metric]:
    """Yield the metrics of each model's devices; most models have one. With batching, a device's requests are batches."""
    ready = GaugeMetricFamily("aiotrt_device_ready", "Whether a call could run there.", labels=["model", "device"])
    requests = CounterMetricFamily(
        "aiotrt_device_requests", "Calls, leases or batches, by device and outcome.", labels=["model", "device", "outcome"]
    )
    slots = GaugeMetricFamily("aiotrt_device_slots", "Slots, by device and state.", labels=["model", "device", "state"])
    held = GaugeMetricFamily(
        "aiotrt_device_graph_bytes", "Bytes of device memory that graphs keep, by device.", labels=["model", "device"]
    )
    for name, statistics in now.items():
        for one in statistics.devices or (statistics,):
            ready.add_metric([name, one.device], not one.is_broken)
            held.add_metric([name, one.device], one.graph_bytes)
            for outcome in _OUTCOMES:
                requests.add_metric([name, one.device, outcome], getattr(one, outcome))
            for state in _STATES:
                slots.add_metric([name, one.device, state], getattr(one, state))
    yield from (ready, requests, slots, held)


def _histogram(counts: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Return a Prometheus histogram of the numbers of batches by size: the cumulative buckets, and the sum of the sizes."""
    buckets: list[tuple[str, float]] = []
    bound = 1
    while not buckets or bound < 2 * max(counts):
        buckets.append((str(float(bound)), float(sum(count for size, count in counts.items() if size <= bound))))
        bound *= 2
    total = float(sum(counts.values()))
    return [*buckets, ("+Inf", total)], float(sum(size * count for size, count in counts.items()))


def _hub(now: Mapping[str, Statistics]) -> Iterable[Metric]:
    """Yield the metrics of the hub. All models on a loop share its hub, so each model's statistics have the same numbers."""
    polls = max((statistics.polls for statistics in now.values()), default=0)
    wakes = max((statistics.wakes for statistics in now.values()), default=0)
    yield CounterMetricFamily("aiotrt_completion_polls", "Event queries that the loop's hub made.", value=polls)
    yield CounterMetricFamily("aiotrt_completion_wakes", "Times that the hub's timer fired.", value=wakes)
    launches = sum(statistics.replays + statistics.fallback_runs for statistics in now.values())
    yield GaugeMetricFamily(
        "aiotrt_polls_per_completion", "Event queries for each launch, since the start.", value=polls / max(launches, 1)
    )
