"""/api/live: a websocket that paints while somebody types; the latest wish wins (`generation.live`).

Sent      {"prompt": "a photo of <tom> in the snow", "preset": "turbo", "steps": 1, "seed": 7,
           "strengths": {"tom": 0.8}, "concepts": {"tom": "sha256:..."}}    any of it, as it changes
Received  {"number": 3, "seconds": 0.04, "prompt": "...", "seed": 7, "image": "<JPEG in base64>"}
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
from minikin.generation.content_filter import passed
from minikin.generation.live import Live, Shown
from minikin.images.encode import Marking
from minikin.recipes import Paint
from minikin.server.engine import Row
from minikin.server.errors import sentence_of
from minikin.server.http import b64, client_of, jpeg, parse_json, service_of
from minikin.server.limits import check_paint
from minikin.server.service import Service
from minikin.stream import stream

router = APIRouter(prefix="/api", tags=["native"])
_PAINTER = ThreadPoolExecutor(1, thread_name_prefix="minikin-live")  # the engine takes turns anyway


@router.websocket("/live")
async def live(socket: WebSocket) -> None:
    """See the module's text."""
    service, client = service_of(socket), client_of(socket)
    open_ = socket.app.state.__dict__.setdefault("_live", set())
    if len(open_) >= service.limits.live_sessions or service.draining:
        await socket.close(4429, "Too many are painting live; try again later.")
        return
    await socket.accept()
    open_.add(socket)
    concepts: dict[str, str] = {}
    run = Live(painter(service, client, concepts), Paint.make(prompt="", base=service.engine.name))
    loop, ready = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
    threading.Thread(target=_show, args=(run, loop, ready, service.marking), daemon=True).start()
    sending = asyncio.create_task(_send(socket, ready))
    try:
        while True:
            problem = _changed(run, await socket.receive_text(), concepts)
            if problem:
                await ready.put({"number": None, "problem": problem})
    except (WebSocketDisconnect, RuntimeError, KeyError):
        pass
    finally:
        open_.discard(socket)
        run.close()
        sending.cancel()


def painter(
    service: Service, client: str, concepts: dict[str, str]
) -> Callable[[Paint], Iterator[events.Event]]:
    """A verb that paints with this client's concepts."""

    def verb(recipe: Paint) -> Iterator[events.Event]:
        told, pinned = service.shelf.pin(client, recipe.model_dump(), concepts)
        wanted: Paint = Paint.make(**told)
        check_paint(wanted, service.limits, service.engine.side)
        prepared = service.engine.prepare("paint", service.engine.hastened(wanted), pinned)

        def work(emit: Callable[[events.Event], None]) -> Any:
            return service.engine.paint(
                [Row(prepared, recipe.seed)],
                lambda done, _: emit(events.Progress("painting", done, prepared.steps)),
            )

        (image,) = yield from stream(work, _PAINTER)
        verdict = None
        if service.filtering:
            from minikin.generation.sampler import Painted  # needs PyTorch, as every filter does

            (checked,) = passed(service.filtering([Painted(image, recipe.seed)]))
            image, verdict = checked.image, checked.verdict
        yield events.Picture(image, recipe.prompt, recipe.seed, verdict)

    return verb


def _changed(run: Live, text: str, concepts: dict[str, str]) -> str:
    """Wish for what the message says; what is wrong with it, or ""."""
    try:
        wish = parse_json(text.encode("utf-8", "replace"))
        if not isinstance(wish, dict):
            raise BadRecipe('Send a JSON object with what changes, for example {"prompt": "a cat"}.')
        named, strengths = wish.pop("concepts", {}), wish.pop("strengths", None)
        if not isinstance(named, dict) or not isinstance(strengths or {}, dict):
            raise BadRecipe("concepts and strengths are JSON objects, by name.")
        if strengths and not all(isinstance(v, int | float) and 0 <= v <= 2 for v in strengths.values()):
            raise BadRecipe("A strength lies between 0 and 2; 1 is as taught.")
        concepts.update({str(k): str(v) for k, v in named.items()})
        run.change(strengths, **wish)
    except MinikinError as e:
        return sentence_of(e)
    except HTTPException as e:
        return str(e.detail)
    return ""


def _show(
    run: Live, loop: asyncio.AbstractEventLoop, ready: asyncio.Queue[dict[str, Any] | None], marking: Marking
) -> None:  # fmt: skip
    """Paint until closed, in a thread of its own."""
    for shown in run:
        with suppress(RuntimeError):  # the loop ended first
            loop.call_soon_threadsafe(ready.put_nowait, _message(shown, marking))


def _message(shown: Shown, marking: Marking) -> dict[str, Any]:
    told = {"number": shown.wish.number, "seconds": round(time.perf_counter() - shown.wish.asked, 4)}
    if shown.image is None:
        return {**told, "problem": shown.problem}
    recipe = shown.wish.recipe
    return {**told, "prompt": recipe.prompt, "seed": recipe.seed, "image": b64(jpeg(shown.image, marking, 85))}


async def _send(socket: WebSocket, ready: asyncio.Queue[dict[str, Any] | None]) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):
        while (message := await ready.get()) is not None:
            await socket.send_json(message)
