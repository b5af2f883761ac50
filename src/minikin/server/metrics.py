"""Counters for Prometheus. Labels come from fixed sets: the series stay few, however many clients come."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

_P = "minikin_"
REQUESTS = Counter(_P + "requests", "Answers by route and status", ["route", "status"])
REJECTED = Counter(_P + "requests_rejected", "Refused before they were accepted, by code", ["reason"])
JOBS = Counter(_P + "jobs", "Jobs by kind and outcome", ["kind", "outcome"])
PICTURES = Counter(_P + "pictures", "Finished images")
QUEUE = Gauge(_P + "queue_depth", "Jobs that wait")
RUNNING = Gauge(_P + "in_flight", "Jobs that run")
WAIT = Histogram(_P + "queue_wait_seconds", "From accepted to begun")
ENGINE = Histogram(_P + "engine_seconds", "One batch")
BATCH = Histogram(_P + "batch_size", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32))
OOM = Counter(_P + "oom", "Batches that did not fit into memory")
LOST = Counter(_P + "engines_lost", "Engines that ended with work in hand")


def text() -> bytes:
    return generate_latest(REGISTRY)
