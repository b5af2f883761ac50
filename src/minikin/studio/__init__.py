"""Studio: one base, its concepts, one lock. Verbs are generators of events, with simple calls on top."""

from minikin.studio.studio import Studio

__all__ = ["Studio"]
