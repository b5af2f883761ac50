"""`minikin distill --workers N --address ...`: one student, trained by workers of a cluster together.

Each worker is a rank of one PyTorch process group: it computes its rows of every batch and the gradients are
averaged (`training.distributed`). When one dies the others cannot go on: all are started again from the last
checkpoint, which every machine must see. On one machine PyTorch's own launcher does this (`cli.distill`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minikin import events
from minikin.cluster.pool import LOSSES, Cluster, WorkerLost, result_of
from minikin.errors import MinikinError
from minikin.recipes import Distill

GRACE_S = 15.0  # after one rank failed: whose death was it?


def distill(recipe: Distill, out: Path, cluster: Cluster, *, resume: bool = False) -> Iterator[events.Event]:
    """Distil into a folder that all machines share; the first rank's events, Done last.

    Ctrl-C ends it at once: it goes on from the last checkpoint (every `recipe.save_minutes`).
    Raises what `distillation.distill` raises, and Lost when workers keep dying.
    """
    with cluster.joined() as ray:
        share, count = cluster.share(ray), cluster.count(ray)
        for attempt in range(1, LOSSES + 1):
            ranks = [ray.remote(**share)(Rank).remote(k, count) for k in range(count)]
            try:
                rendezvous = result_of(ray, ranks[0].rendezvous.remote())
                first, *others = (
                    rank.run.options(num_returns="streaming").remote(recipe, out, resume, rendezvous)
                    for rank in ranks
                )
                for ref in first:
                    yield result_of(ray, ref)
                for rank in others:
                    for ref in rank:
                        result_of(ray, ref)
                return
            except (WorkerLost, RuntimeError, ray.exceptions.RayError) as e:
                if not _has_dead_rank(ray, ranks) or attempt == LOSSES:
                    raise
                resume = resume or (out / "checkpoint.safetensors").exists()
                yield events.Note(f"A worker died ({type(e).__name__}); all go on from the checkpoint.", True)
            finally:
                for rank in ranks:
                    ray.kill(rank)


def _has_dead_rank(ray: Any, ranks: list[Any]) -> bool:
    """Whether a failure is a worker's death, first seen by its peers, rather than an error of the work."""
    for rank in ranks:
        ref = rank.__ray_ready__.remote()
        try:
            ray.get(ref, timeout=GRACE_S)
        except ray.exceptions.GetTimeoutError:
            continue  # it still waits for the dead one
        except ray.exceptions.RayError:
            return True
    return False


class Rank:
    """One process of the group; its events travel as they are."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def rendezvous(self) -> tuple[str, int]:
        """Where the ranks meet: this machine, and a port that this process has open from here on.

        The group that it begins later at this port takes the same store; a port that was only found free
        could be another's by then, and no rank would have died of it.
        """
        import ray
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        return ray.util.get_node_ip_address(), self.store.port

    def run(
        self, recipe: Distill, out: Path, resume: bool, rendezvous: tuple[str, int]
    ) -> Iterator[events.Event]:  # fmt: skip
        from minikin.studio import Studio

        os.environ |= {
            "RANK": str(self.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(self.count),
            "MASTER_ADDR": rendezvous[0], "MASTER_PORT": str(rendezvous[1]),
        }  # fmt: skip
        try:
            studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)
            for event in studio.distilling(recipe, out, resume=resume):
                if self.rank == 0 and not isinstance(event, events.ImageReady):
                    yield event
        except (MinikinError, RuntimeError):
            raise
        except KeyboardInterrupt as e:
            raise RuntimeError("interrupted") from e
