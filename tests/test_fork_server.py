"""The parent of the ranks: real processes, started both ways, and everything that can happen to them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ftlaunch.cluster.agent import sweep
from ftlaunch.cluster.events import (
    Exited,
    Kill,
    Killed,
    Leave,
    Prepare,
    RankStart,
    Spawn,
    Started,
    StartMethod,
)
from ftlaunch.cluster.fork_link import JOB_VARIABLE, ForkLink
from ftlaunch.cluster.linux import processes_with, read_process
from tests.jobs import wait_until

METHODS: list[StartMethod] = ["fork", "exec"]
TARGET = '''
    import json, os, signal, socket, subprocess, sys, time

    def main():
        what, *arguments = sys.argv[1:]
        return globals()[what](*arguments)

    def code(number, *rest):
        return int(number)

    def die(number):
        os.kill(os.getpid(), int(number))

    def sleep():
        print("sleeping", flush=True)
        time.sleep(600)

    def stubborn():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleep()

    def family():
        """A child in the session, one that has left it, and one that was adopted."""
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", deaf])
        subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
        print("family", flush=True)
        time.sleep(600)

    def daemon():
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        return 0

    def describe(*arguments):
        links = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                links[name] = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                pass
        print(json.dumps({
            "descriptors": links,
            "argv": sys.argv,
            "cwd": os.getcwd(),
            "mine": os.environ["MINE"],
            "base": os.environ["BASE"],
            "session": os.getsid(0) == os.getpid(),
            "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            "sigchld": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
            "threads": len(os.listdir("/proc/self/task")),
            "timer": signal.getitimer(signal.ITIMER_REAL)[0],
            "loaded": "decimal" in sys.modules,
        }))
        return 0
'''


class Agent:
    """What an agent does with a fork server, for a test."""

    def __init__(
        self, folder: Path, method: StartMethod, *, grace: float = 0.0, preload=()
    ) -> None:
        self.folder = folder
        (folder / "target.py").write_text(textwrap.dedent(TARGET))
        self.prepare = Prepare(
            start_method=method,
            env={"PYTHONPATH": str(folder), "BASE": "base"},
            preload=list(preload),
            grace_seconds=grace,
        )
        self.link = ForkLink.open(self.prepare)
        self.pipes: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self.expect(type(None), until=lambda event: event.kind == "server_ready")

    def start(self, rank: int, *arguments: str, working_dir: str | None = None) -> Path:
        log = self.send_start(rank, *arguments, working_dir=working_dir)
        started = self.expect(Started)
        self.pids[rank] = started.pid
        return log

    def send_start(self, rank: int, *arguments: str, working_dir: str | None = None) -> Path:
        log = self.folder / f"{rank}.log"
        reading, writing = os.pipe()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        start = RankStart(
            rank=rank,
            title="",
            module="target",
            arguments=list(arguments),
            env={"MINE": f"mine {rank}"},
            working_dir=working_dir,
            log_path=str(log),
            inherits_listener=False,
            shows_output=False,
        )
        assert self.link.send(Spawn(rank=start), [descriptor, writing])
        os.close(descriptor)
        os.close(writing)
        self.pipes[rank] = reading
        return log

    def expect(self, kind, seconds: float = 20.0, until=None):
        while True:
            event = self.link.receive(seconds)
            assert event is not None, "the fork server is gone"
            if isinstance(event, kind) or (until is not None and until(event)):
                return event

    def leave(self) -> None:
        self.link.send(Kill(at_once=True))
        self.link.send(Leave())
        self.link.close()
        self.close_pipes()
        self.link.wait(5.0)

    def close_pipes(self) -> None:
        for pipe in self.pipes.values():
            os.close(pipe)
        self.pipes.clear()


@pytest.fixture
def job(monkeypatch):
    """A job's mark; whatever carries it at the end is a leak."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(JOB_VARIABLE, mark)
    yield mark
    wait_until(lambda: not others(mark), 5, "every process of the job is gone")


def others(mark: str) -> list[int]:
    return [p.pid for p in processes_with(JOB_VARIABLE, mark) if p.pid != os.getpid()]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(params=METHODS)
def agent(request, tmp_path, job):
    agent = Agent(tmp_path, request.param)
    yield agent
    agent.leave()


def said_in(log: Path, word: str) -> None:
    wait_until(lambda: word in log.read_text(), 20, f"{word!r} in {log.name}")


# -- what a rank is -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_is_as_good_as_a_fresh_process(method, tmp_path, job):
    agent = Agent(tmp_path, method, preload=["decimal"] if method == "fork" else [])
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    log = agent.start(3, "describe", "a b", "ü", working_dir=str(elsewhere))
    assert agent.expect(Exited).code == 0
    found = json.loads(log.read_text())
    agent.leave()
    program = "target" if method == "fork" else "-c"
    assert found["argv"] == [program, "describe", "a b", "ü"]
    assert found["cwd"] == str(elsewhere)
    assert (found["mine"], found["base"]) == ("mine 3", "base")
    assert found["session"]
    assert found["sigint"]
    assert found["sigterm"]
    assert found["sigchld"]
    assert found["threads"] == 1
    assert found["timer"] == 0
    assert found["loaded"] == (method == "fork")
    # Nothing, the log twice, the pipe to the agent; one more is the listing of the folder itself.
    links = found["descriptors"]
    assert links["0"] == "/dev/null"
    assert links["1"] == links["2"] == str(log)
    rest = [link for name, link in links.items() if name not in "012"]
    assert [link.partition(":")[0] for link in rest if "/proc/" not in link] == ["pipe"], links


def test_exits(agent):
    agent.start(0, "code", "7")
    event = agent.expect(Exited)
    assert (event.rank, event.code, event.signal) == (0, 7, None)
    before = time.monotonic()
    agent.start(1, "die", "9")
    event = agent.expect(Exited)
    assert (event.rank, event.code, event.signal) == (1, None, 9)
    assert before < event.time < time.monotonic()


def test_many_ranks_at_once(agent):
    logs = [agent.start(rank, "sleep") for rank in range(8)]
    for log in logs:
        said_in(log, "sleeping")
    started = time.monotonic()
    agent.link.send(Kill(at_once=True))
    agent.expect(Killed)
    assert time.monotonic() - started < 5
    assert [pid for pid in agent.pids.values() if alive(pid)] == []


def alive(pid: int | None) -> bool:
    assert pid is not None
    process = read_process(pid)
    return process is not None and process.is_alive


# -- death --------------------------------------------------------------------------------------


def test_children_and_grandchildren_go_with_their_rank(agent, job):
    said_in(agent.start(0, "family"), "family")
    wait_until(lambda: len(others(job)) >= 5, 10, "the family")
    os.kill(agent.pids[0], signal.SIGKILL)
    assert agent.expect(Exited).signal == 9
    wait_until(lambda: len(others(job)) == 1, 5, "only the fork server is left")


def test_a_daemon_outlives_its_rank_but_not_the_last_one(agent, job):
    said_in(agent.start(0, "sleep"), "sleeping")
    agent.start(1, "daemon")
    event = agent.expect(Exited)
    assert (event.rank, event.code) == (1, 0)
    assert event.left_behind == 1
    assert len(others(job)) == 3
    agent.link.send(Kill(at_once=True))
    agent.expect(Killed)
    wait_until(lambda: len(others(job)) == 1, 5, "the daemon is gone")


@pytest.mark.parametrize("method", METHODS)
def test_grace(method, tmp_path, job):
    agent = Agent(tmp_path, method, grace=1.0)
    said_in(agent.start(0, "sleep"), "sleeping")
    said_in(agent.start(1, "stubborn"), "sleeping")
    started = time.monotonic()
    agent.link.send(Kill(at_once=False))
    first, second = agent.expect(Exited), agent.expect(Exited)
    assert (first.rank, first.signal) == (0, signal.SIGTERM)
    assert (second.rank, second.signal) == (1, signal.SIGKILL)
    agent.expect(Killed)
    assert 0.9 < time.monotonic() - started < 3
    agent.leave()


def test_a_stopped_rank_can_be_killed(agent):
    said_in(agent.start(0, "sleep"), "sleeping")
    os.kill(agent.pids[0], signal.SIGSTOP)
    agent.link.send(Kill(at_once=False))
    agent.expect(Killed, 5)
    assert not alive(agent.pids[0])


def test_an_agent_that_vanishes_takes_its_ranks_along_and_leaves_the_others(tmp_path, job):
    one, two = (Agent(folder, "exec") for folder in _folders(tmp_path))
    assert one.link.server_pid is not None
    assert two.link.server_pid is None  # there is one server
    said_in(one.start(0, "family"), "family")
    said_in(two.start(1, "sleep"), "sleeping")
    one.link.close()
    wait_until(lambda: not alive(one.pids[0]), 5, "the ranks of the agent are gone")
    assert alive(two.pids[1])
    two.leave()
    one.link.wait(5.0)
    wait_until(lambda: not others(job), 5, "everything is gone")


def _folders(tmp_path):
    """Two agents with the same preparation, as nodes that are played on one machine."""
    return (tmp_path, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_fork_server_that_is_killed_takes_its_ranks_along(method, tmp_path, job):
    agent = Agent(tmp_path, method)
    said_in(agent.start(0, "sleep"), "sleeping")
    assert agent.link.server_pid is not None
    os.kill(agent.link.server_pid, signal.SIGKILL)
    with pytest.raises(AssertionError, match="gone"):
        agent.expect(Exited, 5)
    assert agent.link.how_it_ended() == "killed by SIGKILL"
    wait_until(lambda: not alive(agent.pids[0]), 5, "the rank is gone")
    # The name is free again: the next one begins at once.
    again = Agent(tmp_path, method)
    assert again.link.server_pid != agent.link.server_pid
    again.leave()
    agent.leave()


@pytest.mark.parametrize("method", METHODS)
def test_the_last_agent_gone_means_the_end(method, tmp_path, job):
    agent = Agent(tmp_path, method)
    server = agent.link.server_pid
    said_in(agent.start(0, "sleep"), "sleeping")
    agent.link.close()
    agent.link.wait(5.0)
    assert not alive(server)
    assert not alive(agent.pids[0])


def test_it_ends_in_the_middle_of_an_import(tmp_path, job):
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(60)\n")
    agent = Agent(tmp_path, "fork", preload=["slow_import"])
    server = agent.link.server_pid
    agent.link.close()
    agent.link.wait(5.0)
    assert not alive(server)


def test_a_server_that_still_imports_holds_up_no_agent(tmp_path, job):
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(3)\n")
    agent = Agent(tmp_path, "fork", preload=["slow_import"])
    before = open_descriptors()
    began = time.monotonic()
    # Together several times what the socket takes.
    for rank in range(12):
        agent.send_start(rank, "code", "0", "x" * 100_000)
    assert time.monotonic() - began < 1.0
    assert agent.link.has_unsent
    while agent.link.has_unsent:
        assert time.monotonic() - began < 20
        assert agent.link.flush()
        time.sleep(0.01)
    assert sorted(agent.expect(Exited).rank for _ in range(12)) == list(range(12))
    agent.close_pipes()
    assert open_descriptors() == before
    agent.leave()


def test_a_preload_that_fails_is_no_failure(tmp_path, job):
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')\n")
    agent = Agent(tmp_path, "fork", preload=["broken", "no_such_module"])
    agent.start(0, "code", "0")
    assert agent.expect(Exited).code == 0
    agent.leave()


def test_no_descriptor_stays_behind(agent):
    server = agent.link.server_pid

    def count() -> int:
        return len(list(Path(f"/proc/{server}/fd").iterdir()))

    agent.start(0, "code", "0")
    agent.expect(Exited)
    before = count()
    for rank in range(1, 30):
        agent.start(rank, "code", "0")
        agent.expect(Exited)
    assert count() == before
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1


def test_a_sweep_leaves_agents_that_are_only_starting(job):
    """They carry the job's mark, and have not come to naming themselves yet."""
    wait = "import time; time.sleep(600)"
    starting = [
        subprocess.Popen([sys.executable, "-c", f"{wait}  # {module}"])
        for module in ("ftlaunch.cluster.agent", "ftlaunch.cluster.fork_server")
    ]
    orphan = subprocess.Popen([sys.executable, "-c", wait])
    try:
        wait_until(lambda: len(others(job)) == 3, 10, "three processes with the mark")
        sweep()
        assert orphan.wait(timeout=5) == -signal.SIGKILL
        assert [process.poll() for process in starting] == [None, None]
    finally:
        for process in (*starting, orphan):
            process.kill()
            process.wait(timeout=5)


def test_nobody_else_is_let_in(tmp_path, job):
    """The socket's name can be read by everyone on the machine; another user is shown out."""
    if os.getuid() != 0:
        pytest.skip("becoming another user takes root")
    agent = Agent(tmp_path, "exec")
    name = agent.link._socket.getpeername()
    code = (
        "import os, socket, sys; os.setuid(65534); "
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.connect(b'\\0' + sys.argv[1].encode()); s.settimeout(5); print(s.recv(100))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name[1:].decode()], capture_output=True, text=True, timeout=20
    )
    assert done.stdout.strip() == "b''", done.stderr
    agent.leave()


def test_the_server_reads_no_foreign_messages(tmp_path, job):
    agent = Agent(tmp_path, "exec")
    agent.link._socket.send(b"nonsense")
    refused = agent.expect(type(None), until=lambda event: event.kind == "refused")
    assert not refused.user
    agent.start(0, "code", "0")
    assert agent.expect(Exited).code == 0
    agent.leave()
