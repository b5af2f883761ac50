"""Prometheus counters. Labels come from fixed sets, so the number of series does not grow with clients."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

_P = "minikin_"
REQUESTS = Counter(_P + "requests", "Responses by route and status", ["route", "status"])
REJECTED = Counter(_P + "requests_rejected", "Rejected before admission, by code", ["reason"])
JOBS = Counter(_P + "jobs", "Jobs by kind and outcome", ["kind", "outcome"])
IMAGES = Counter(_P + "pictures", "Finished images")  # word: name of the metric since 0.1
QUEUE = Gauge(_P + "queue_depth", "Jobs that wait")
RUNNING = Gauge(_P + "in_flight", "Jobs that run")
WAIT = Histogram(_P + "queue_wait_seconds", "From admission to start")
ENGINE = Histogram(_P + "engine_seconds", "One batch")
BATCH = Histogram(_P + "batch_size", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32))
OOM = Counter(_P + "oom", "Batches that did not fit into memory")
LOST = Counter(_P + "engines_lost", "Engines that died while they worked on a batch")


def text() -> bytes:
    return generate_latest(REGISTRY)
