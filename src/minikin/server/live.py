"""/api/live: a websocket for live generation; the latest request replaces older ones (`generation.live`).

Client    {"prompt": "a photo of <tom> in the snow", "preset": "lcm-lora", "steps": 1, "seed": 7,
           "strengths": {"tom": 0.8}, "concepts": {"tom": "sha256:..."}}    the fields that change
Server    {"number": 3, "seconds": 0.04, "prompt": "...", "seed": 7, "image": "<JPEG in base64>"}
          {"number": 4, "problem": "one sentence"}
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, HTTPException, WebSocket, WebSocketDisconnect

from minikin import events
from minikin.errors import BadRecipe, MinikinError
from minikin.generation.content_filter import without_blocked
from minikin.generation.image import GeneratedImage
from minikin.generation.live import Live, LiveResult
from minikin.images.encode import Marking
from minikin.recipes import Paint
from minikin.server.engine import Row
from minikin.server.errors import RequestRejected, sentence_of
from minikin.server.http import b64, client_of, jpeg, parse_json, service_of
from minikin.server.limits import check_paint
from minikin.server.service import Service
from minikin.stream import stream

router = APIRouter(prefix="/api", tags=["native"])
MAX_NAMED = 64  # concepts by content in one session
_EXECUTOR = ThreadPoolExecutor(
    1, thread_name_prefix="minikin-live"
)  # the engine generates one batch at a time anyway


@router.websocket("/live")
async def live(socket: WebSocket) -> None:
    """See the module's docstring."""
    service, client = service_of(socket), client_of(socket)
    try:
        leave = service.live_sessions.enter(client)  # counted from here on, before the handshake
    except RequestRejected as e:
        await socket.close(4429, str(e)[:120])
        return
    try:
        if service.draining:
            await socket.close(4503, "The server is shutting down.")
        else:
            await socket.accept()
            await _session(socket, service, client)
    finally:
        leave()


async def _session(socket: WebSocket, service: Service, client: str) -> None:
    """Receive changes and send images until the client leaves."""
    concepts: dict[str, str] = {}
    run = Live(painter(service, client, concepts), Paint.make(prompt="", base=service.engine.name))
    loop, ready = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
    threading.Thread(target=_paint_all, args=(run, loop, ready, service.marking), daemon=True).start()
    sending = asyncio.create_task(_send(socket, ready))
    try:
        while True:
            problem = _changed(run, await socket.receive_text(), concepts)
            if problem:
                await ready.put({"number": None, "problem": problem})
    except (WebSocketDisconnect, RuntimeError, KeyError):
        pass
    finally:
        run.close()
        sending.cancel()


def painter(
    service: Service, client: str, concepts: dict[str, str]
) -> Callable[[Paint], Iterator[events.Event]]:
    """A function that generates a recipe's image with this client's concepts."""

    def run(recipe: Paint) -> Iterator[events.Event]:
        fields, pinned = service.concept_store.pin(client, recipe.model_dump(), concepts)
        recipe_without_hashes: Paint = Paint.make(**fields)
        check_paint(recipe_without_hashes, service.limits, service.engine.side)
        prepared = service.engine.prepare(
            "paint", service.engine.with_live_engine(recipe_without_hashes), pinned
        )

        def work(emit: Callable[[events.Event], None]) -> Any:
            return service.engine.paint(
                [Row(prepared, recipe.seed)],
                lambda done, _: emit(events.Progress("painting", done, prepared.steps)),
            )

        (image,) = yield from stream(work, _EXECUTOR)
        verdict = None
        if service.filtering:
            (checked,) = without_blocked(service.filtering([GeneratedImage(image, recipe.seed)]))
            image, verdict = checked.image, checked.verdict
        yield events.ImageReady(image, recipe.prompt, recipe.seed, verdict)

    return run


def _changed(run: Live, text: str, concepts: dict[str, str]) -> str:
    """Apply a client's message; returns what is wrong with it, or ""."""
    try:
        changes = parse_json(text.encode("utf-8", "replace"))
        if not isinstance(changes, dict):
            raise BadRecipe('Send a JSON object with what changes, for example {"prompt": "a cat"}.')
        hashes, strengths = changes.pop("concepts", {}), changes.pop("strengths", None)
        if not isinstance(hashes, dict) or not isinstance(strengths or {}, dict):
            raise BadRecipe("concepts and strengths are JSON objects, by name.")
        if strengths and not all(isinstance(v, int | float) and 0 <= v <= 2 for v in strengths.values()):
            raise BadRecipe("A strength lies between 0 and 2; 1 is as taught.")
        if len(concepts | hashes) > MAX_NAMED:
            raise BadRecipe(f"A live session names at most {MAX_NAMED} concepts by content.")
        concepts.update({str(k): str(v) for k, v in hashes.items()})
        run.change(strengths, **changes)
    except MinikinError as e:
        return sentence_of(e)
    except HTTPException as e:
        return str(e.detail)
    return ""


def _paint_all(
    run: Live, loop: asyncio.AbstractEventLoop, ready: asyncio.Queue[dict[str, Any] | None], marking: Marking
) -> None:  # fmt: skip
    """Generate until the session is closed; runs in a thread."""
    for result in run:
        with suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(ready.put_nowait, _message(result, marking))


def _message(result: LiveResult, marking: Marking) -> dict[str, Any]:
    message = {"number": result.request.number, "seconds": round(time.perf_counter() - result.request.time, 4)}
    if result.image is None:
        return {**message, "problem": result.problem}
    recipe = result.request.recipe
    return {
        **message,
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "image": b64(jpeg(result.image, marking, 85)),
    }


async def _send(socket: WebSocket, ready: asyncio.Queue[dict[str, Any] | None]) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):
        while (message := await ready.get()) is not None:
            await socket.send_json(message)
