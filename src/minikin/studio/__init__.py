"""Studio: one base, its concepts, one lock. Commands are generators of events, with short forms on top."""

from minikin.studio.studio import Studio

__all__ = ["Studio"]
