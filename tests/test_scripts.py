"""Users' own scripts: as `python script.py` and torchrun run them, and told the truth about."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.jobs import (
    SCRIPT,
    assert_no_process_left,
    finish,
    ftlaunch,
    process_name,
    processes_of,
    rank_process,
    said,
    start,
    summary_of,
    wait_until,
)

METHODS = ["exec", "fork"]


@pytest.fixture
def here(tmp_path):
    """A working folder, away from the output."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def write(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def run(here: Path, *arguments: object, nodes: int = 2, **options):
    out = here.parent / "out"
    result = ftlaunch("--nodes", nodes, "-o", out, *arguments, cwd=here, command=SCRIPT, **options)
    assert_no_process_left(out)
    return result


def logs(here: Path, num_ranks: int = 2) -> list[str]:
    folder = here.parent / "out" / "logs"
    return [(folder / f"rank-{rank:05d}.log").read_text() for rank in range(num_ranks)]


# -- as python script.py ------------------------------------------------------------------------

DESCRIBE = """
    import json, os, sys
    from helper import VALUE

    class Local:
        pass

    print(json.dumps({
        "argv": sys.argv, "name": __name__, "file": __file__, "cwd": os.getcwd(),
        "first": sys.path[0], "helper": VALUE, "main": sys.modules["__main__"].Local is Local,
        "package": __package__, "spec": __spec__ is None, "tty": sys.stdin.read(),
        "annotations": (lambda x: x).__annotations__,
        "rank": os.environ["RANK"], "world": os.environ["WORLD_SIZE"],
        "own": [name for name in os.environ if name in ("FTLAUNCH_EVENT_FD", "FTLAUNCH_LISTEN_FD")],
    }))
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_script_is_run_as_python_runs_it(here, method):
    elsewhere = here.parent / "else where"
    elsewhere.mkdir()
    write(elsewhere, DESCRIBE)
    write(elsewhere, "VALUE = 7", "helper.py")
    result = run(
        here, f"cluster.start_method={method}", "../else where/script.py", "--nodes", "3", "a=b"
    )
    assert result.returncode == 0, said(result)
    found = [json.loads(log.splitlines()[-1]) for log in logs(here)]
    python = subprocess.run(
        [sys.executable, "../else where/script.py", "--nodes", "3", "a=b"],
        cwd=here,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = json.loads(python.stdout)
    assert found[0] == expected
    assert [each["rank"] for each in found] == ["0", "1"]
    # Rank 0's output is the terminal's.
    assert expected == json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", METHODS)
def test_a_module_is_run_as_python_m_runs_it(here, method):
    (here / "package").mkdir()
    write(here / "package", "")
    text = "import sys; print(__name__, __package__, __spec__.name, sys.argv[1:])"
    write(here / "package", text, "tool.py")
    result = run(here, f"cluster.start_method={method}", "-m", "package.tool", "-x", "--nodes=9")
    assert result.returncode == 0, said(result)
    assert logs(here) == ["__main__ package package.tool ['-x', '--nodes=9']\n"] * 2


def test_variables_that_a_script_sets_before_its_imports_are_obeyed(here):
    script = """
        import os
        os.environ["OMP_NUM_THREADS"] = "1"  # ours would be the number of cores
        os.environ["HF_HOME"] = "/somewhere"
        import torch
        print("threads", torch.get_num_threads())
    """
    write(here, script)
    result = run(here, "script.py", nodes=1)
    assert result.returncode == 0, said(result)
    assert "threads 1" in result.stdout


@pytest.mark.parametrize(
    ("setting", "method", "threads"),
    [("", "fork", "1"), ("os.environ['OMP_NUM_THREADS'] = '2'", "exec", "2")],
)
def test_ranks_with_a_core_each_share_an_import_that_comes_first(here, setting, method, threads):
    script = f"""
        import os
        {setting}
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        number = torch.ones(1)
        dist.all_reduce(number)
        print("sum", int(number), "threads", torch.get_num_threads())
        dist.destroy_process_group()
    """
    write(here, script)
    cores = sorted(os.sched_getaffinity(0))[:2]
    nodes = len(cores) + 1
    out = here.parent / "out"
    command = ("taskset", "--cpu-list", ",".join(map(str, cores)), *SCRIPT)
    result = ftlaunch("--nodes", nodes, "-o", out, "script.py", cwd=here, command=command)
    assert_no_process_left(out)
    assert result.returncode == 0, said(result)
    assert json.loads((out / "plan.json").read_text())["start_method"] == method
    assert f"sum {nodes} threads {threads}" in result.stdout


def test_what_fails_while_it_is_imported_for_all_fails_for_its_own_reason(here):
    write(here, "import torch")
    result = run(here, "cluster.start_method=fork", "script.py", env={"TORCH_LOGS": "unheard-of"})
    assert result.returncode == 1, said(result)
    assert "Invalid log settings: unheard-of" in result.stderr + result.stdout


@pytest.mark.parametrize("method", METHODS)
def test_generators_without_a_seed_differ_between_ranks(here, method):
    script = """
        import torch
        import datasets
        import multiprocessing
        import random
        import numpy
        secret = hash(bytes(multiprocessing.current_process().authkey))
        print("drew", numpy.random.rand(), random.random(), torch.rand(1).item(), secret)
    """
    write(here, script)
    result = run(here, f"cluster.start_method={method}", "cluster.show_output=all", "script.py")
    assert result.returncode == 0, said(result)
    drawn = [line.split()[-4:] for line in result.stdout.splitlines() if "drew" in line]
    assert len(drawn) == 2
    assert all(first != second for first, second in zip(*drawn, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_spawned_children_of_a_script_find_its_main_module(here, method):
    script = """
        import multiprocessing

        def double(x):
            return 2 * x

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                print(pool.map(double, [1, 2, 3]))
    """
    write(here, script)
    result = run(here, f"cluster.start_method={method}", "script.py", nodes=1)
    assert result.returncode == 0, said(result)
    assert "[2, 4, 6]" in result.stdout


# -- what is shown ------------------------------------------------------------------------------


def test_whose_output_is_shown(here):
    write(here, "import os; print('I am', os.environ['RANK'], end='')")
    assert "I am 0" in run(here, "script.py").stdout
    assert "I am 1" not in run(here, "script.py").stdout
    every = run(here, "cluster.show_output=all", "script.py").stdout
    assert "[node0:0] I am 0" in every
    assert "[node1:1] I am 1" in every
    assert "I am" not in run(here, "cluster.show_output=none", "script.py").stdout


def test_a_gigabyte_in_the_log_is_no_gigabyte_in_memory(here):
    script = """
        import os
        block = b"x" * 999 + b"\\n"
        for _ in range(1000):
            os.write(1, block * 1000)
        print("the end")
    """
    write(here, script)
    peak = 0

    def watch() -> None:
        nonlocal peak
        for pid in processes_of(here.parent / "out"):
            # Not the rank, and nobody else's job.
            with contextlib.suppress(OSError):
                if process_name(pid) in ("ftlaunch-agent", "ftlaunch-forks", "ftlaunch"):
                    peak = max(peak, resident_bytes(pid))

    out = here.parent / "out"
    with start("--nodes", 1, "-o", out, "script.py", cwd=here, command=SCRIPT) as process:
        while process.poll() is None:
            watch()
            time.sleep(0.05)
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                os.read(process.stdout.fileno(), 1 << 20)
        result = finish(process, 60)
    assert result.returncode == 0
    assert 0 < peak < 150e6
    log = out / "logs" / "rank-00000.log"
    assert log.stat().st_size == 1_000_000_000 + len("the end\n")
    log.unlink()


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# -- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_is_told_without_our_frames(here, method):
    script = """
        import os, time

        def fail():
            raise ValueError("boom")

        if os.environ["RANK"] == "1":
            fail()
        time.sleep(600)
    """
    path = write(here, script)
    result = run(here, f"cluster.start_method={method}", "cluster.grace_seconds=0", "script.py")
    assert result.returncode == 1
    lines = said(result).splitlines()
    verdict = lines.index("error: rank 1 on node1 failed: ValueError: boom")
    assert lines[verdict + 1 :] == [
        "    Traceback (most recent call last):",
        f'      File "{path}", line 8, in <module>',
        "        fail()",
        f'      File "{path}", line 5, in fail',
        '        raise ValueError("boom")',
        "    ValueError: boom",
        f"log: {here.parent / 'out' / 'logs' / 'rank-00001.log'}",
        "",
    ] or lines[verdict + 1 : -1][-1].startswith("log: ")
    assert "ftlaunch" not in logs(here)[1].replace(str(here.parent), "")
    failure = summary_of(here.parent / "out")["failure"]
    assert (failure["rank"], failure["cause"], failure["code"]) == (1, "exception", 1)


def test_exit_codes_are_the_scripts_own(here):
    write(here, "import os, sys; sys.exit(7 if os.environ['RANK'] == '1' else 0)")
    result = run(here, "script.py")
    assert result.returncode == 7
    assert "rank 1 on node1 failed: exit code 7" in said(result)
    write(here, "raise SystemExit(0)")
    assert run(here, "script.py").returncode == 0
    write(here, "import sys; sys.exit('a reason')")
    result = run(here, "script.py", nodes=1)
    assert result.returncode == 1
    assert "a reason" in said(result)


def test_a_crash_is_told_with_the_python_stack(here):
    script = """
        import ctypes, os, time
        def crash():
            ctypes.string_at(0)
        if os.environ["RANK"] == "1":
            crash()
        time.sleep(600)
    """
    write(here, script)
    result = run(here, "--max-restarts", 0, "cluster.grace_seconds=0", "script.py")
    assert result.returncode == 128 + signal.SIGSEGV
    assert "rank 1 on node1 failed: segmentation fault (SIGSEGV)" in said(result)
    assert "in crash" in said(result)


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_crash_of_libraries_after_the_scripts_end_is_no_failure(here, method, code):
    script = f"""
        import os, sys
        class Library:
            def __del__(self):
                if os.environ["RANK"] == "1":
                    os.abort()
        library = Library()
        sys.exit({code})
    """
    write(here, script)
    result = run(here, f"cluster.start_method={method}", "script.py")
    assert result.returncode == code, said(result)
    assert "restart" not in result.stdout
    if not code:
        assert (
            "warning: rank 1 on node1: aborted (SIGABRT) while its interpreter was taken down; its "
            "script had ended by then, with exit code 0\n"
        ) in result.stdout


def test_a_killed_rank_of_a_script_is_started_again(here):
    script = """
        import os, signal
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"])
    """
    write(here, script)
    result = run(here, "script.py")
    assert result.returncode == 0, said(result)
    assert "killed by SIGKILL; restart 1 of 3" in result.stdout
    assert "attempt 1" in result.stdout


def test_a_stop_while_the_ranks_of_a_failure_are_ended(here):
    script = """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
        if os.environ["RANK"] == "1":
            while not os.path.exists("go"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    """
    write(here, script)
    out = here.parent / "out"
    arguments = ("--nodes", 2, "-o", out, "cluster.grace_seconds=4", "script.py")
    with start(*arguments, cwd=here, command=SCRIPT) as process:
        wait_until(lambda: all("deaf" in text for text in _texts(out)), 30, "both ranks")
        (here / "go").touch()
        # Rank 0 is given its four seconds.
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        result = finish(process, 30)
    assert result.returncode == 143, said(result)
    assert (
        "warning: rank 1 on node1: killed by SIGKILL; a stop was asked for, so it is not started "
        f"again; log: {out}/logs/rank-00001.log\n"
    ) in result.stdout
    summary = summary_of(out)
    assert "killed by SIGKILL" in summary["remarks"][0]
    assert (summary["status"], summary["stop_signal"]) == ("stopped", "SIGTERM")
    assert summary["restarts"] == 0
    assert_no_process_left(out)


def test_a_crash_after_a_stop_is_a_failure(here):
    script = """
        import os, signal, time
        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
    """
    write(here, script)
    out = here.parent / "out"
    arguments = ("--nodes", 2, "-o", out, "cluster.grace_seconds=1", "script.py")
    with start(*arguments, cwd=here, command=SCRIPT) as process:
        wait_until(lambda: all("ready" in text for text in _texts(out)), 30, "both ranks")
        process.send_signal(signal.SIGTERM)
        result = finish(process, 30)
    # Not 143, though a crash without a stop would be restarted.
    assert result.returncode == 128 + signal.SIGSEGV, said(result)
    summary = summary_of(out)
    assert (summary["status"], summary["stop_signal"]) == ("failed", "SIGTERM")
    assert summary["failure"]["rank"] == 1
    assert_no_process_left(out)


def test_signals_reach_the_script(here):
    script = """
        import signal, sys, time

        def stop(number, frame):
            print("asked to stop by", number, flush=True)
            sys.exit(0)

        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise
    """
    write(here, script)
    for number, word, code in (
        (signal.SIGTERM, "asked to stop by 15", 0),
        (signal.SIGINT, "interrupted", 130),
    ):
        out = here.parent / f"out-{number}"
        with start("--nodes", 2, "-o", out, "script.py", cwd=here, command=SCRIPT) as process:
            wait_until(lambda: all("ready" in text for text in _texts(out)), 30, "both ranks")  # noqa: B023
            process.send_signal(number)
            result = finish(process, 30)
        assert result.returncode == code, said(result)
        assert all(word in text for text in _texts(out))
        assert_no_process_left(out)


def _texts(out: Path) -> list[str]:
    paths = [out / "logs" / f"rank-{rank:05d}.log" for rank in range(2)]
    return [path.read_text() if path.exists() else "" for path in paths]


@pytest.mark.parametrize("gap", [0.02])
def test_the_first_of_two_failures_is_named(here, gap):
    script = f"""
        import os, time
        start = float(os.environ["START"])
        time.sleep(max(0, start - time.monotonic()))
        if os.environ["RANK"] == "0":
            time.sleep({gap})
        raise ValueError("rank " + os.environ["RANK"])
    """
    write(here, script)
    for _ in range(5):
        begin = str(time.monotonic() + 2.0)
        result = run(here, "script.py", env={"START": begin})
        assert "rank 1 on node1 failed: ValueError: rank 1" in said(result)
        assert "as a consequence: rank 0" in said(result)


def test_a_rank_that_ignores_sigterm_and_its_family(here):
    script = """
        import os, signal, subprocess, sys, time
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["RANK"] == "0":
            time.sleep(1)
            raise ValueError("boom")
        time.sleep(600)
    """
    write(here, script)
    started = time.monotonic()
    result = run(here, "cluster.grace_seconds=1", "script.py")
    assert result.returncode == 1
    assert time.monotonic() - started < 15
    assert "rank 0 on node0 failed: ValueError: boom" in said(result)


def test_a_rank_that_leaves_while_another_waits_for_it(here):
    script = """
        import os, time

        def wait_for_the_other():
            time.sleep(600)

        if os.environ["RANK"] == "0":
            wait_for_the_other()
    """
    write(here, script)
    result = run(
        here, "--max-restarts", 0, "cluster.grace_seconds=0", "cluster.stall_timeout_seconds=2",
        "script.py",
    )  # fmt: skip
    assert result.returncode == 1
    assert "no progress for" in said(result)
    assert "wait_for_the_other" in said(result)


def test_a_stopped_rank_is_named(here):
    script = """
        import os, signal, time
        if os.environ["RANK"] == "2":
            raise SystemExit(0)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
    """
    write(here, script)
    result = run(
        here, "--max-restarts", 0, "cluster.grace_seconds=0", "cluster.stall_timeout_seconds=2",
        "script.py", nodes=3,
    )  # fmt: skip
    assert "rank 1 on node1 failed: no progress" in said(result)
    assert "does not answer: its process is stopped by a signal" in said(result)


def test_what_a_script_leaves_behind_is_ended_and_told(here):
    script = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
        os.chdir("/")
    """
    write(here, script)
    result = run(here, "script.py", nodes=1)
    assert result.returncode == 0, said(result)
    assert "1 process(es) that the script had started outlived their rank" in said(result)


def test_a_terminal_that_blocks_is_not_the_end(here):
    """As under `| less`: nobody reads for longer than the heartbeats may be silent."""
    script = """
        import time
        for number in range(3000):
            print("x" * 100)
        time.sleep(4)
        print("the end")
    """
    write(here, script)
    out = here.parent / "out"
    command = ["--nodes", 2, "-o", out, "cluster.heartbeat_timeout_seconds=1", "script.py"]
    with start(*command, cwd=here, command=SCRIPT) as process:
        time.sleep(5)
        result = finish(process, 30)
    assert result.returncode == 0, said(result)[-1000:]
    assert "the end" in result.stdout
    assert "restart" not in result.stdout


def test_names_that_are_no_utf8_reach_the_script_and_the_verdict(here):
    script = """
        import sys
        assert sys.argv[1] == "caf\\udce9"
        raise ValueError(sys.argv[1])
    """
    write(here, script)
    result = run(here, "script.py", b"caf\xe9".decode(errors="surrogateescape"), nodes=1)
    assert result.returncode == 1
    assert "rank 0 on node0 failed: ValueError: caf" in said(result)
    assert "caf\udce9" in summary_of(here.parent / "out")["failure"]["title"]


# -- mistakes -----------------------------------------------------------------------------------


def mistake(result, *words):
    assert result.returncode == 2, said(result)
    assert "Traceback" not in said(result)
    for word in words:
        assert word in said(result), said(result)


def test_scripts_that_cannot_be_run(here):
    mistake(run(here, "nowhere.py"), "nowhere.py", "No such file", str(here))
    (here / "folder.py").mkdir()
    mistake(run(here, "folder.py"), "is a folder")
    mistake(run(here, "-m", "not a module"), "-m 'not a module'", "package.module")
    write(here, "print(")
    result = run(here, "script.py", nodes=1)
    assert result.returncode == 1
    assert "SyntaxError" in said(result)
    if os.getuid() != 0:
        (here / "script.py").chmod(0)
        mistake(run(here, "script.py"), "script.py", "Permission denied")


def test_training_keys_mean_nothing_to_a_script(here):
    write(here, "")
    mistake(run(here, "train.seed=1", "script.py"), "train is set", "behind its name")
    mistake(run(here, "--model", "x", "script.py"), "--model is set", "behind its name")
    (here / "job.yaml").write_text("train: {max_steps: 3}\ncluster: {nodes: 2}\n")
    mistake(run(here, "--config", "job.yaml", "script.py"), "train is set")
    fault = ftlaunch("rehearse", "--fault", "kill-rank:1@step5", "script.py", cwd=here)
    mistake(fault, "kill-rank:1@20s")


def test_the_dry_run_of_a_script(here):
    write(here, "")
    result = run(here, "--dry-run", "script.py", "--x")
    assert result.returncode == 0
    assert "script.py" in result.stdout
    assert "nothing was started" in result.stdout
    assert not (here.parent / "out").exists()


def test_more_ranks_than_cores_are_allowed_and_said(here):
    write(here, "")
    result = run(here, "--devices", 8, "script.py", nodes=1)
    assert result.returncode == 0, said(result)
    assert "8 ranks share" in result.stdout


def test_a_training_jobs_folder_is_not_a_scripts(here):
    out = here.parent / "out"
    out.mkdir()
    (out / ".ftlaunch").touch()
    (out / "metrics.jsonl").write_text("")
    write(here, "")
    mistake(run(here, "script.py"), "holds a training job", "--output-dir")


def test_more_arguments_than_can_be_handed_over(here):
    write(here, "")
    command = [*SCRIPT, "-o", str(here.parent / "out"), "script.py", *["x" * 100] * 2000]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60)
    mistake(done, "bytes", "Put them into a file")


def test_a_log_that_cannot_be_written(here):
    write(here, "")
    folder = here.parent / "out" / "logs" / "rank-00000.log"
    folder.mkdir(parents=True)
    (here.parent / "out" / ".ftlaunch").touch()
    mistake(run(here, "script.py", nodes=1), "rank-00000.log: Is a directory", "--output-dir")


def test_a_limit_of_64_descriptors(here):
    write(here, "import os; print('rank', os.environ['RANK'])")
    out = here.parent / "out"
    command = [*SCRIPT, "--nodes", "2", "-o", str(out), "script.py"]
    limited = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", *command]
    done = subprocess.run(limited, cwd=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    command[2] = "16"
    done = subprocess.run(
        limited[:4] + command, cwd=here, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "64 open files" in done.stderr
    assert "ulimit -n" in done.stderr


# -- with torch ---------------------------------------------------------------------------------


def test_the_store_outlives_rank_0(here):
    script = """
        import os, time
        import torch.distributed as dist
        from torch.distributed import TCPStore

        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            os._exit(0)
        time.sleep(1)
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
        store.set("key", "value")
        print("still", store.get("key").decode(), flush=True)
        os._exit(0)
    """
    write(here, script)
    result = run(here, "script.py")
    assert result.returncode == 0, said(result)
    assert "still value" in logs(here)[1]


def test_killing_a_scripts_rank_by_hand_names_it(here):
    write(here, "import time; print('up', flush=True); time.sleep(600)")
    out = here.parent / "out"
    with start(
        "--nodes", 2, "--max-restarts", 0, "-o", out, "script.py", cwd=here, command=SCRIPT
    ) as process:
        wait_until(lambda: all("up" in text for text in _texts(out)), 30, "both ranks")
        os.kill(rank_process(out, 1), signal.SIGKILL)
        result = finish(process, 30)
    assert result.returncode == 137
    assert "rank 1 on node1 failed: killed by SIGKILL" in said(result)
