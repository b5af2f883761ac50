"""A calculation, not a measurement: the needs of 10^6 concepts and 1,000 GPUs, and the first bottleneck.

    python -m benchmarks.fleet_model [--gpus 1000] [--concepts 1000000] [--set image_s=0.5 ...]

Every assumption is a field of `Installation`, with its source; change them for your own. Nothing here ran on
1,000 GPUs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12


@dataclass(frozen=True)
class Installation:
    """Assumptions; bytes and seconds."""

    gpus: int = 1000
    concepts: int = 1_000_000
    concept_bytes: float = 32 * KB  # SD 1.5, fp16: the format's own limit
    photos_bytes: float = 5 * 1.5 * MB  # five photos of a telephone, scaled down
    image_bytes: float = 420 * KB  # 512 x 512, PNG
    base_bytes: float = 2.1 * GB  # SD 1.5 in fp16, U-Net, VAE and text encoder
    teach_s: float = 240.0  # assumed: 400 steps, batch 8, 512 px, on one data-centre GPU
    image_s: float = 0.5  # assumed: 4 steps with an accelerator, batched, 512 px
    gpu_hour: float = 2.0  # dollars, assumed
    storage_month: float = 0.023 * 1e-9  # dollars a byte and month: an object store's list price
    shared_bandwidth: float = 10 * GB  # a second, of the shared folder, all readers together
    gpus_per_node: int = 8
    node_disk: float = 2 * GB  # a second, read from the node's own disk
    start_s: float = 12.0  # process, imports, Ray; measured on two cores: 8 to 15 s
    driver_lines_s: float = (
        46_000.0  # prompts that one driver reads, checks, hashes: measured, benchmarks.fleet
    )
    records_s: float = 185_000.0  # manifest records that it writes: measured, 16 at once, of one core's time
    requests_s: float = 150.0  # a gateway process: measured, 6.7 ms a request (docs/measurements.md, Load)
    worker_concepts: int = 512  # kept ready in a worker
    concept_ready_s: float = 0.004  # read 32 KB, check, encode
    zipf: float = 1.0  # skew of concept popularity; 0 for uniform
    utilisation: float = 0.8  # of the GPUs when serving
    mtbf_hours: float = 2000.0  # of one GPU's worker: preemptions, faults


def harmonic(n: int, s: float) -> float:
    """sum of k^-s for k = 1..n, by Euler-Maclaurin beyond 1,000 terms."""
    head = sum(math.pow(k, -s) for k in range(1, min(n, 1000) + 1))
    if n <= 1000:
        return head
    tail = math.log(n / 1000) if s == 1 else (math.pow(n, 1 - s) - math.pow(1000, 1 - s)) / (1 - s)
    return head + tail + (math.pow(n, -s) - math.pow(1000, -s)) / 2


def hits(cached: int, concepts: int, s: float) -> float:
    """Share of requests whose concept is among the `cached` most popular: the hit rate of an ideal cache."""
    return harmonic(min(cached, concepts), s) / harmonic(concepts, s)


def erlang_c(servers: int, load: float) -> float:
    """Probability of waiting in M/M/c; `load` in servers. Erlang's B by its recursion, then C."""
    b = 1.0
    for k in range(1, servers + 1):
        b = load * b / (k + load * b)
    rho = load / servers
    return b / (1 - rho * (1 - b)) if rho < 1 else 1.0


def teaching(s: Installation) -> dict[str, float]:
    hours = s.concepts * s.teach_s / 3600
    wall = hours / s.gpus
    deaths = hours / s.mtbf_hours
    return {
        "GPU hours": hours, "wall hours": wall, "dollars": hours * s.gpu_hour,
        "workers that die during it": deaths,
        "GPU hours lost to them (25 steps of 400, and a start, each)":
            deaths * (s.teach_s * 25 / 400 + s.start_s + cold_start(s)) / 3600,
        "photos, TB": s.concepts * s.photos_bytes / TB,
        "photos read, share of the shared folder's bandwidth":
            s.gpus / s.teach_s * s.photos_bytes / s.shared_bandwidth,
        "concepts, GB": s.concepts * s.concept_bytes / GB,
        "concepts, dollars a month": s.concepts * s.concept_bytes * s.storage_month,
        "the same as full checkpoints, TB": s.concepts * s.base_bytes / TB,
        "concepts written a second": s.gpus / s.teach_s,
    }  # fmt: skip


def cold_start(s: Installation) -> float:
    """Seconds until every node has the base: all read the shared folder at once, each node once."""
    nodes = s.gpus / s.gpus_per_node
    return max(nodes * s.base_bytes / s.shared_bandwidth, s.base_bytes / s.node_disk)


def painting(s: Installation) -> dict[str, float]:
    rate = s.gpus / s.image_s
    missed = 1 - hits(s.worker_concepts, s.concepts, s.zipf)
    return {
        "images a second": rate,
        "hours for 10^6 prompts": 1e6 / rate / 3600,
        "hours for one of each concept": s.concepts / rate / 3600,
        "images written, GB a second": rate * s.image_bytes / GB,
        "images written, share of the shared folder's bandwidth": rate * s.image_bytes / s.shared_bandwidth,
        "of one driver's core: lines and records": rate / s.driver_lines_s + rate / s.records_s,
        "dollars for 10^6 images": 1e6 * s.image_s / 3600 * s.gpu_hour,
        "start of all workers, seconds": s.start_s + cold_start(s),
        "the same if each GPU read for itself": s.start_s + s.gpus * s.base_bytes / s.shared_bandwidth,
        "requests that miss a worker's own cache": missed,
        "concepts read, MB a second": rate * missed * s.concept_bytes / MB,
        "time lost to making concepts ready": missed * s.concept_ready_s / s.image_s,
        "all concepts in a node's memory, GB": s.concepts * s.concept_bytes / GB,
    }  # fmt: skip


def serving(s: Installation) -> dict[str, float]:
    load = s.gpus * s.utilisation
    rate = load / s.image_s
    waiting = erlang_c(s.gpus, load)
    eight = erlang_c(8, 8 * s.utilisation)
    return {
        "requests a second": rate,
        "gateways needed": rate / s.requests_s,
        "that wait, one queue for all": waiting,
        "mean wait, one queue for all, ms": 1e3 * waiting * s.image_s / (s.gpus * (1 - s.utilisation)),
        "that wait, a gateway for every 8 GPUs": eight,
        "mean wait, a gateway for every 8 GPUs, ms": 1e3 * eight * s.image_s / (8 * (1 - s.utilisation)),
        "replicas that die a day": 24 * s.gpus / s.mtbf_hours,
        "requests replayed a day": 24 * s.gpus / s.mtbf_hours * s.utilisation,
        "capacity out while replicas start":
            (s.start_s + s.base_bytes / s.node_disk) / 3600 / s.mtbf_hours,
    }  # fmt: skip


def parse_arguments() -> Installation:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=Installation.gpus)
    parser.add_argument("--concepts", type=int, default=Installation.concepts)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    installation = Installation(gpus=args.gpus, concepts=args.concepts)
    types = {name: type(value) for name, value in asdict(installation).items()}  # int for counts
    for assignment in args.set:
        name, _, value = assignment.partition("=")
        if name not in types:
            parser.error(f"there is no {name}; known: {', '.join(types)}")
        number = float(value)
        if types[name] is int and not number.is_integer():
            parser.error(f"{name} is a whole number, not {value}")
        installation = replace(installation, **{name: types[name](number)})
    return installation


def main() -> None:
    installation = parse_arguments()
    print("A calculation, from these assumptions:\n")
    for name, value in asdict(installation).items():
        print(f"  {name:18} {value:,.4g}" if value < 1e4 else f"  {name:18} {value:,.0f}")
    for title, part in (("teaching", teaching), ("painting", painting), ("serving", serving)):
        print(f"\n{title}")
        for name, number in part(installation).items():
            print(f"  {number:>12,.0f}  {name}" if number >= 100 else f"  {number:>12.2g}  {name}")


if __name__ == "__main__":
    main()
