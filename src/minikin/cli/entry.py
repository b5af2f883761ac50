"""The entry point `minikin`: in the resident process where there is one, else here.

It imports the standard library alone: beside a resident process, starting Python is most of what it does.
"""

from __future__ import annotations

import os
import sys

from minikin.cli.resident import client, place

# Turns that a thread of libgomp waits in a loop before it sleeps. By default they are milliseconds, in which a
# thread holds the core that the other threads wait for on a busy machine (docs/measurements.md).
SPINS = "30000"
COMMANDS = {"paint", "generate", "refine", "inpaint", "redo", "teach", "train"}


def main() -> None:
    """Run the command line; a command that went well here leaves a resident process for the next one."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch loads the library
    here = client.FLAG in sys.argv
    sys.argv[1:] = arguments = [a for a in sys.argv[1:] if a != client.FLAG]
    fits = not here and client.minutes(os.environ) > 0 and not {"-h", "--help"}.intersection(arguments)
    fits = fits and next((a for a in arguments if a[:1] != "-"), "") in COMMANDS
    path, environment = place.socket_path() if fits else None, dict(os.environ)
    if path and (status := client.run_there(path, arguments)) is not None:
        client.end_as(status)
    from minikin.cli.app import main as run_here

    try:
        run_here()
    except SystemExit as e:
        if path and not e.code:
            client.start(path, environment)
        raise
