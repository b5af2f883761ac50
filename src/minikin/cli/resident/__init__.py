"""Commands in a process that is ready: the second image from the shell does not wait for imports.

    client.py     gives a command to the resident process (`minikin.cli.entry` asks it first)
    processes.py  the commands ps and stop
    place.py      where the resident process of this user, installation and environment listens
    server.py     the resident process: imports everything once, and forks for each command
    command.py    a command on its way: what the client sends, and how the fork becomes it

A fork runs the command exactly as a process of its own would, with the client's terminal, folder, environment
and limits; so outputs, files, exit codes and signals are the same, and nothing of one command reaches another.
client.py, place.py and command.py import the standard library alone. Linux only: elsewhere forking a process
that has loaded such libraries is not safe.
"""
