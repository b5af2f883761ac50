"""JSON of jobs, images and concepts, as clients receive it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minikin.perfusion import operating_points
from minikin.perfusion.concept import Concept
from minikin.perfusion.index import IndexEntry
from minikin.server.concept_store import Entry
from minikin.server.errors import sentence_of
from minikin.server.image_folder import file_name, is_gone
from minikin.server.jobs import Job, stored_verdict
from minikin.server.service import Service


def job_json(service: Service, job: Job) -> dict[str, Any]:
    """A job that is in memory."""
    status = job.status  # read first: when it says the job ended, so does everything read after it
    step, steps, recipe = job.done, job.total, job.prepared.recipe.model_dump()
    error = None if job.error is None else {"code": job.error.code, "message": sentence_of(job.error)}
    position = service.queue.position(job)
    return {
        "id": job.id, "kind": job.request.kind, "status": status, "task": job.request.task or None,
        "queue_position": position if status == "queued" else None,
        "created": job.created, "started": job.started, "completed": job.ended,
        "progress": {"step": step, "steps": steps, "stage": job.stage, "eta_s": _eta(service, job)},
        "results": [
            image_json(p._asdict(), file_name(service.writer.path(p.id), job.request.kind, recipe, p.seed),
                       job.infotexts.get(p.number), job.verdict(p.number))
            for p in job.images if not is_gone(service.writer.path(p.id))
        ],
        "result": job.result, "warnings": list(job.notes), "error": error, "samples": list(job.samples),
        "about": about(job.request.kind, recipe),
        "concepts": {name: pinned.sha256 for name, pinned in job.prepared.concepts.items()},
    }  # fmt: skip


def stored_job_json(
    row: dict[str, Any], images: list[dict[str, Any]], path: Callable[[str], Path] = Path
) -> dict[str, Any]:
    """An older job, from the store; path: of an image's file, by the image's id."""
    error = {"code": row["code"], "message": row["message"]} if row["code"] else None
    return {
        "id": row["id"], "kind": row["kind"], "status": row["status"], "task": row["task"] or None,
        "queue_position": None, "created": row["created"], "started": row["started"], "completed": row["ended"],
        "progress": {"step": 0, "steps": 0, "stage": "", "eta_s": 0.0},
        "results": [
            image_json(p, file_name(path(p["id"]), row["kind"], row["recipe"], p["seed"]),
                       verdict=stored_verdict(row["result"], p["number"]))
            for p in images if not p["swept"] and not is_gone(path(p["id"]))
        ],
        "about": about(row["kind"], row["recipe"]), "result": row["result"], "warnings": row["warnings"],
        "error": error, "concepts": row["concepts"], "samples": [],
    }  # fmt: skip


def about(kind: str, recipe: dict[str, Any]) -> str:
    """What a job makes, for a person: the concept that is taught, the thing to be masked, or the prompt."""
    if kind == "teach":
        return f"<{recipe.get('name', '')}>"
    return str(recipe.get("category" if kind == "masks" else "prompt") or "")


def image_json(
    image: dict[str, Any], name: str, infotext: str | None = None, verdict: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A finished image: `name` for its file; `filter`, the content filter's verdict, None without objection."""
    fields = {k: image[k] for k in ("id", "number", "seed", "width", "height", "sha256")}
    return {
        **fields,
        "name": name,
        "url": f"/api/results/{image['id']}",
        "infotext": infotext,
        "filter": verdict,
    }


def concept_json(entry: Entry, category: str = "") -> dict[str, Any]:
    return {"name": entry.name, "sha256": entry.sha256, "mine": entry.mine, "category": category}


def concept_details(concept: Concept) -> dict[str, Any]:
    """What helps to choose a concept: its category, its operating points, whether it has a preview."""
    return _details(concept.category, concept.points, bool(concept.preview))


def index_entry_details(entry: IndexEntry) -> dict[str, Any]:
    """The same from the library's index, without opening the file; invalid operating points are left out."""
    try:
        points = operating_points.from_json(json.loads(entry.points))
    except (LookupError, ValueError, TypeError, RecursionError):
        points = {}
    return _details(entry.category, points, entry.preview)


def _details(category: str, points: operating_points.Points, preview: bool) -> dict[str, Any]:
    points_json = {
        preset: {
            name: {
                "strength": p.strength,
                "likeness": p.subject_fidelity,  # word: JSON field
                "follows": p.prompt_fidelity,
            }  # word: JSON
            for name, p in by_name.items()
        }
        for preset, by_name in points.items()
    }
    return {"category": category, "points": points_json, "preview": preview}


def _eta(service: Service, job: Job) -> float | None:
    """Estimated seconds until its end, of jobs with several stages until that of this one; None for unknown."""
    if job.over:
        return 0.0
    if job.started is not None and (left := job.pace.left_s()) is not None:
        return round(left, 2)
    if job.prepared.group is None:
        return None
    ahead = sum(o.cost_left for o in service.queue.waiting() if o.created < job.created and job.started is None)
    return round((ahead + job.cost_left) * service.queue.rate_s, 2)
