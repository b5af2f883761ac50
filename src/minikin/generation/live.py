"""Live painting: what a person types and drags, painted as it changes; the latest wish wins.

    with studio.live(preset="turbo", steps=1) as live:
        live.change(prompt="a photo of <tom> on the beach")      # from any thread
        live.change(strengths={"tom": 0.6})
        for shown in live:                                       # in one thread, until close()
            ...

A wish that a newer one replaces before its image is begun is never painted; one that is replaced
while it is painted is left within one step. A finished image is always shown, even when a newer
wish waits: somebody who goes on typing would see nothing otherwise. What is wrong with a wish (a
concept's name half typed) is shown as a sentence, and painting goes on with the next.
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

Verb = Callable[[Paint], Iterator[events.Event]]


@dataclass(frozen=True)
class Wish:
    """What was asked for, as the `number`th change, at time `asked` (time.perf_counter, seconds)."""

    number: int
    recipe: Paint
    asked: float


@dataclass(frozen=True)
class Shown:
    """The image of a wish, or the `problem` that it has; `seconds` since it was asked for."""

    image: Image.Image | None
    wish: Wish
    seconds: float
    problem: str = ""


class Live:
    """One live painting; `change` in any thread, iterate in one, `close` ends the iteration.

    verb     paints a recipe; yields progress after every step and a Image (`Studio.painting`)
    recipe   what is painted until it is changed; nothing is painted while its prompt is empty
    """

    def __init__(self, verb: Verb, recipe: Paint) -> None:
        self._verb = verb
        self._changed = threading.Condition()
        self._recipe = recipe.model_copy(update={"n": 1, "batch": 1})
        self._strengths: dict[str, float] = {}
        self._newest: Wish | None = None
        self._begun = 0  # number of the newest wish that painting was begun for
        self._closed = False
        if recipe.prompt.strip():
            self.change()

    def change(self, strengths: Mapping[str, float] | None = None, **changes: Any) -> int:
        """Wish for something else: `strengths` by concept, and fields of `recipes.Paint`.

        A strength replaces the one in the prompt for as long as this painting lives. Returns the
        number of the wish. Raises BadRecipe; the wish before it then stays.
        """
        with self._changed:
            changed: Paint = Paint.make(**{**self._recipe.model_dump(), **changes, "n": 1, "batch": 1})
            self._strengths |= strengths or {}
            number = self._newest.number + 1 if self._newest else 1
            told = changed.model_copy(update={"prompt": with_strengths(changed.prompt, self._strengths)})
            self._recipe = changed
            self._newest = Wish(number, told, time.perf_counter())
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

    def __iter__(self) -> Iterator[Shown]:
        while (wish := self._next()) is not None:
            yield from self._paint(wish)

    def _next(self) -> Wish | None:
        """The newest wish once there is one that was not begun; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wanted())
            if self._closed or self._newest is None:
                return None
            self._begun = self._newest.number
            return self._newest

    def _wanted(self) -> bool:
        newest = self._newest
        return newest is not None and newest.number > self._begun and bool(newest.recipe.prompt.strip())

    def _outdated(self) -> bool:
        with self._changed:
            return self._closed or self._wanted()

    def _paint(self, wish: Wish) -> Generator[Shown, None, None]:
        try:
            picture = self._picture(wish)
        except MinikinError as e:
            yield Shown(None, wish, time.perf_counter() - wish.asked, str(e))
            return
        except Exception:  # whatever it is, the next wish is painted
            log.exception("painting live")
            said = "Something unexpected went wrong with this image; the log says what."
            yield Shown(None, wish, time.perf_counter() - wish.asked, said)
            return
        if picture is not None:
            yield Shown(picture, wish, time.perf_counter() - wish.asked)

    def _picture(self, wish: Wish) -> Image.Image | None:
        """The image, or None when it was left for a newer wish."""
        run = self._verb(wish.recipe)
        try:
            for event in run:
                if isinstance(event, events.Picture):
                    image: Image.Image = event.image
                    return image
                if self._outdated():
                    return None
        finally:
            run.close()  # type: ignore[attr-defined]  # a generator; waits until its worker has stopped
        return None
