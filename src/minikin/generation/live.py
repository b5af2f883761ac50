"""Live generation: prompt and strengths change while images are generated; the newest request wins.

    with studio.live(preset="lcm-lora", steps=1) as live:
        live.change(prompt="a photo of <tom> on the beach")      # from any thread
        live.change(strengths={"tom": 0.6})
        for result in live:                                      # in one thread, until close()
            ...

A request that a newer one replaces before it is started is never started; one that is replaced while it runs is
abandoned within one step. A finished image is always given out, even when a newer request waits: somebody who
goes on typing would see nothing otherwise. An error in a request (a concept's name half typed) is given out as
a sentence, and generation goes on with the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from minikin import events
from minikin.errors import MinikinError
from minikin.models.prompt import with_strengths
from minikin.recipes import Paint

log = logging.getLogger(__name__)

Generate = Callable[[Paint], Iterator[events.Event]]


@dataclass(frozen=True)
class LiveRequest:
    """The `number`th change, at `time` (time.perf_counter, seconds)."""

    number: int
    recipe: Paint
    time: float


@dataclass(frozen=True)
class LiveResult:
    """The image of a request, or the `problem` with it; `seconds` since the request."""

    image: Image.Image | None
    request: LiveRequest
    seconds: float
    problem: str = ""


class Live:
    """One live session: call `change` in any thread, iterate in one; `close` ends the iteration.

    generate  runs a recipe; yields progress after every step and an ImageReady (`Studio.painting`)
    recipe    of the first request; nothing is generated while its prompt is empty
    """

    def __init__(self, generate: Generate, recipe: Paint) -> None:
        self._generate = generate
        self._changed = threading.Condition()
        self._recipe = recipe.model_copy(update={"n": 1, "batch": 1})
        self._strengths: dict[str, float] = {}
        self._newest: LiveRequest | None = None
        self._started = 0  # number of the newest request that was started
        self._closed = False
        if recipe.prompt.strip():
            self.change()

    def change(self, /, strengths: Mapping[str, float] | None = None, **changes: Any) -> int:
        """Request an image with these changes: `strengths` by concept, and fields of `recipes.Paint`.

        A strength replaces the one in the prompt for the rest of the session. Returns the request's number.
        Raises BadRecipe; the request before it then stays.
        """
        with self._changed:
            self._recipe = Paint.make(**{**self._recipe.model_dump(), **changes, "n": 1, "batch": 1})
            self._strengths |= strengths or {}
            number = self._newest.number + 1 if self._newest else 1
            prompt = with_strengths(self._recipe.prompt, self._strengths)
            recipe = self._recipe.model_copy(update={"prompt": prompt})
            self._newest = LiveRequest(number, recipe, time.perf_counter())
            self._changed.notify_all()
        return number

    def close(self) -> None:
        """End the iteration, within one step."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[LiveResult]:
        while (request := self._next()) is not None:
            yield from self._run(request)

    def _next(self) -> LiveRequest | None:
        """The newest request once there is one that was not started; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_newer())
            if self._closed or self._newest is None:
                return None
            self._started = self._newest.number
            return self._newest

    def _has_newer(self) -> bool:
        newest = self._newest
        return newest is not None and newest.number > self._started and bool(newest.recipe.prompt.strip())

    def _is_outdated(self) -> bool:
        with self._changed:
            return self._closed or self._has_newer()

    def _run(self, request: LiveRequest) -> Generator[LiveResult, None, None]:
        try:
            image = self._image(request)
        except MinikinError as e:
            yield LiveResult(None, request, time.perf_counter() - request.time, str(e))
            return
        except Exception:  # whatever it is, the next request is generated
            log.exception("live generation")
            problem = "Something unexpected went wrong with this image; the log says what."
            yield LiveResult(None, request, time.perf_counter() - request.time, problem)
            return
        if image is not None:
            yield LiveResult(image, request, time.perf_counter() - request.time)

    def _image(self, request: LiveRequest) -> Image.Image | None:
        """The image, or None when it was abandoned for a newer request."""
        run = self._generate(request.recipe)
        try:
            for event in run:
                if isinstance(event, events.ImageReady):
                    image: Image.Image = event.image
                    return image
                if self._is_outdated():
                    return None
        finally:
            run.close()  # type: ignore[attr-defined]  # a generator; waits until its worker has stopped
        return None
