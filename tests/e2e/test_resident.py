"""The resident process: a command in it does what a process of its own does."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikin.cli import entry
from minikin.cli.resident import client, command, place, server
from minikin.perfusion import concept_file
from minikin.training import checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident processes are for Linux alone")
# a client that cannot run a command itself, nor start a resident process
ONLY_THERE = """import sys
sys.modules["torch"] = None
from minikin.cli import entry
entry.client.start = lambda *a: None
entry.main()"""
PAINT = ("paint", "a photo of a cat", "--preset", "lcm-lora", "--steps", "1", "--seed", "3")
TEACH = ("teach", "photos", "--name", "tom", "--category", "cat", "--batch", "2", "--sample-every", "0",
         "--steps", "5000")  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: Any) -> dict[str, str]:
    """Without PYTHONPATH: where it has the working folder, every folder has a process of its own."""
    home = tmp_path_factory.mktemp("resident")
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {
        **usual, "MINIKIN_RESIDENT": "10", "XDG_RUNTIME_DIR": str(home), "MINIKIN_HOME": str(home),
        "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": entry.SPINS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def resident(environment: dict[str, str]) -> Iterator[Path]:
    """A resident process in which commands of `environment` run; its socket."""
    code = "from minikin.cli.resident import place; print(place.socket_path())"
    line = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    path = Path(line.stdout.strip())
    started(path, environment)
    yield path
    answer(environment, "stop")
    wait(lambda: not path.exists())


def started(path: Path, environment: dict[str, str]) -> None:
    """Start a resident process and wait until it answers: a client waits for half a minute alone."""
    client.start(path, environment)
    wait(path.exists)
    wait(lambda: answer(environment, "ps")["resident"])


def wait(condition: Any) -> None:
    """Until it holds; a test that hangs is ended after five minutes."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)


def there(environment: dict[str, str], *arguments: object, **how: Any) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    line = [sys.executable, "-c", ONLY_THERE, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, text=True, **streams)


def answer(environment: dict[str, str], what: str) -> Any:
    line = [sys.executable, "-m", "minikin", what, "--json"]
    out = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def test_images_and_texts_are_those_of_a_process_of_its_own(
    resident: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The same bytes, lines and exit codes, for an image and for an error."""
    for arguments, code in ((PAINT, 0), (("paint", "a photo of <nobody>"), 2)):
        folders = [tmp_path / f"{code}-{k}" for k in range(2)]
        for folder in folders:
            folder.mkdir()
        a = there(environment, *arguments, cwd=folders[0])
        texts = a.communicate()
        line = [sys.executable, "-m", "minikin", "--no-resident", *arguments]
        b = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=folders[1])
        assert (a.returncode, *texts) == (b.returncode, b.stdout, b.stderr) and a.returncode == code
        images = [{p.name: p.read_bytes() for p in (f / "out").glob("*.png")} for f in folders]
        assert images[0] == images[1] and len(images[0]) == (code == 0)


def test_a_traceback_comes_with_debug_alone(
    resident: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    for options, traceback in (((), False), (("--debug",), True)):
        process = there(environment, *options, "paint", "a photo of <nobody>", cwd=tmp_path)
        _, err = process.communicate()
        assert process.returncode and ("Traceback" in err) == traceback, err


def test_commands_in_it_know_nothing_of_each_other(
    resident: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Two at once, in folders of their own, with closed and with piped streams."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    commands = [there(environment, *PAINT, "--json", cwd=folder) for folder in folders]
    outs = [json.loads(c.communicate()[0].splitlines()[-1]) for c in commands]
    assert [o["event"] for o in outs] == ["done", "done"]
    assert len({next((folder / "out").glob("*.png")).read_bytes() for folder in folders}) == 1
    line = f"'{sys.executable}' -c '{ONLY_THERE}' paint 'a cat' --steps 1 --out closed >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment).returncode == 0
    assert len(list((tmp_path / "closed").glob("*.png"))) == 1


def test_ctrl_c_saves_what_was_learned(
    resident: Path, environment: dict[str, str], photo_folder: Path, tmp_path: Path
) -> None:
    if not (tmp_path / "photos").exists():
        (tmp_path / "photos").symlink_to(photo_folder)
    teaching = there(environment, *TEACH, "--json", cwd=tmp_path)
    assert teaching.stdout
    next(line for line in teaching.stdout if '"done": 3' in line or '"step": 3' in line)
    (running,) = answer(environment, "ps")["resident"][0]["commands"]
    assert running["arguments"][:2] == ["teach", "photos"]
    teaching.send_signal(signal.SIGINT)
    teaching.communicate()
    assert teaching.returncode == 130
    assert concept_file.load(tmp_path / "tom.safetensors").is_finite()
    assert checkpoint.read(tmp_path / "tom-teaching" / "checkpoint.safetensors")


def test_a_killed_client_takes_its_command_along_and_stop_waits_for_the_others(
    resident: Path, environment: dict[str, str], photo_folder: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "photos").symlink_to(photo_folder)
    first, second = (there(environment, *TEACH, cwd=folder) for folder in folders)
    wait(lambda: len(answer(environment, "ps")["resident"][0]["commands"]) == 2)
    first.kill()
    wait(lambda: len(answer(environment, "ps")["resident"][0]["commands"]) == 1)
    (facts,) = answer(environment, "stop")["stopped"]
    wait(lambda: not resident.exists())
    assert answer(environment, "ps")["resident"] == [], "it takes no more commands"
    assert there(environment, *PAINT).wait() == 1, "and this client cannot paint itself"
    second.send_signal(signal.SIGKILL)
    wait(lambda: answer(environment, "ps") and not Path(f"/proc/{facts['process']}").exists())
    started(resident, environment)  # for the tests after this one, and for the fixture's end


def test_a_lost_resident_process_is_told_and_the_next_command_runs_without(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The server here takes the command and dies; what it had started is told to end."""
    path = tmp_path / "s.sock"
    sleeper = subprocess.Popen(["sleep", "1000"])
    for answers, status in (((), None), ((sleeper.pid,), 1 << 8)):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        if process := os.fork():
            monkeypatch.setattr(client, "pass_on_signals", lambda process: None)
            assert client.run_there(path, ["paint"]) == status
            os.waitpid(process, 0)
        else:
            connection, _ = listener.accept()
            command.receive(connection)
            for answer in answers:
                command.send(connection, answer)
            os._exit(0)
        listener.close()
        assert client.run_there(path, ["paint"]) is None, "nobody listens"
        path.unlink()
    assert "the resident process was ended" in capsys.readouterr().err
    assert sleeper.wait() == -signal.SIGTERM


def test_a_client_that_waits_too_long_runs_the_command_itself(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Nobody answers here; the one who comes to it later sees that the client has left. Ctrl-C is one line."""
    path, listener = tmp_path / "s.sock", socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    monkeypatch.setattr(client, "ANSWER_S", 0.05)
    assert client.run_there(path, ["paint"]) is None
    connection, _ = listener.accept()
    assert command.receive(connection)[0]["arguments"] == ["paint"] and server._is_closed(connection)

    def interrupted(connection: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "receive", interrupted)
    assert client.run_there(path, ["paint"]) == 130 << 8
    assert capsys.readouterr().err == "\nminikin: interrupted.\n"


def test_a_fork_becomes_what_the_client_was(tmp_path: Path) -> None:
    """Folder, environment, limits, processors, niceness, umask and ignored signals."""
    if process := os.fork():
        assert os.waitpid(process, 0)[1] == 0
        return
    code = 1
    try:
        cores = sorted(os.sched_getaffinity(0))[:1]
        soft = [resource.getrlimit(limit)[0] for limit in command.LIMITS]
        soft[command.LIMITS.index(resource.RLIMIT_NOFILE)] = 123
        wished = command.Command(
            "run", ["paint"], {"A": "b", "TZ": "Etc/GMT+5"}, 0o027, cores, os.nice(0) + 1, soft, [signal.SIGHUP]
        )
        files = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
        command.become(wished, [*files, os.open(tmp_path, os.O_RDONLY)])
        is_now = command.Command.mine("run", ["paint"])
        right = is_now == wished and os.getcwd() == str(tmp_path.resolve())
        code = 0 if right and sys.argv == ["minikin", "paint"] and time.timezone == 5 * 3600 else 2
    finally:
        os._exit(code)


def test_sockets_lie_where_only_the_user_can_enter(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = place.folder()
    assert path and path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    assert place.folder() is None and place.socket_path() is None
    path.rmdir()
    path.symlink_to(tmp_path)
    assert place.folder() is None


def test_who_listens_for_another_user_gets_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    monkeypatch.setattr(client.os, "getuid", lambda: os.geteuid() + 1)
    assert client.connected(tmp_path / "s") is None


def test_another_environment_has_another_process(tmp_path: Path, monkeypatch: Any) -> None:
    before = place.key()
    monkeypatch.setenv("TERM", "other")
    assert place.key() == before
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert place.key() != before
    monkeypatch.delenv("OMP_NUM_THREADS")
    with monkeypatch.context() as m:
        m.setattr(place, "_times", lambda path: [("a.py", 1)])
        assert place.key() != before
    with monkeypatch.context() as m:
        m.setattr(os, "sched_getaffinity", lambda process: {99})
        assert place.key() != before
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / ".#lock").symlink_to(tmp_path / "nowhere")  # as Emacs leaves them
    monkeypatch.setattr(place, "PACKAGE", tmp_path / "package")
    assert place.socket_path()
    monkeypatch.setattr(place, "PACKAGE", tmp_path / "nowhere")
    assert place.socket_path() is None


@pytest.mark.parametrize(
    ("line", "variable", "starts"),
    [("paint x", "10", True), ("paint x --no-resident", "10", False), ("paint x", "0", False),
     ("show x", "10", False), ("--debug teach x", "10", True), ("paint --help", "10", False),
     ("paint x", "off", False), ("paint x", "inf", True), ("paint x", "soon", True)],
)  # fmt: skip
def test_which_commands_start_one(line: str, variable: str, starts: bool, monkeypatch: Any) -> None:
    """After they went well, and never with the flag."""
    starts_of: list[Path] = []
    monkeypatch.setenv("MINIKIN_RESIDENT", variable)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.setattr(place, "socket_path", lambda: Path("/nowhere"))
    monkeypatch.setattr(client, "start", lambda path, environment: starts_of.append(path))
    for code in (3, 0):
        monkeypatch.setattr("minikin.cli.app.main", lambda code=code: sys.exit(code))
        monkeypatch.setattr(sys, "argv", ["minikin", *line.split()])
        with pytest.raises(SystemExit):
            entry.main()
        assert "--no-resident" not in sys.argv and len(starts_of) == (starts and code == 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, entry.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_do_not_wait_in_loops(before: dict[str, str], after: str | None, monkeypatch: Any) -> None:
    """Unless the user says how they wait."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("minikin.cli.app.main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["minikin", "show", "x"])
    entry.main()
    assert os.environ.get("GOMP_SPINCOUNT") == after


def test_it_ends_after_its_time_and_one_is_enough(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(server, "load", lambda: 1)
    path = tmp_path / "s.sock"
    server.main(path, 0.0001)
    assert not path.exists()
    taken = os.open(path.with_suffix(".lock"), os.O_RDWR)
    import fcntl

    fcntl.flock(taken, fcntl.LOCK_EX)
    server.main(path, 1000.0)  # returns at once
    os.close(taken)


def test_the_client_imports_next_to_nothing() -> None:
    code = "import sys; from minikin.cli import entry; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "numpy", "typer", "rich", "pydantic", "PIL", "diffusers"} & {
        n.split(".")[0] for n in names
    }
    assert not heavy
