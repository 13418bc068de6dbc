"""What the clusters of the tests need of a machine: rights, namespaces, Debian packages.

Missing packages are installed where that is allowed: as root on Debian. Where a cluster cannot
run, its tests are skipped with the reason; under `CI=true` they fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from tests import slurm_bed, ssh_bed
from tests.played_hosts import program_path
from tests.slurm_bed import SlurmBed
from tests.ssh_bed import SshBed

# Debian's package of each program.
PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_SERVICES = {
    "munge": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "openssh-server": "ssh",
}
_INSTALL_SECONDS = 300.0
# Asked by Debian before it starts or stops a service.
_POLICY = Path("/usr/sbin/policy-rc.d")


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmBed]:
    require(slurm_bed.PROGRAMS)
    with SlurmBed() as bed:
        yield bed


@contextlib.contextmanager
def ssh_cluster() -> Iterator[SshBed]:
    require(ssh_bed.PROGRAMS)
    with SshBed() as bed:
        yield bed


def require(programs: Sequence[str]) -> None:
    """Skip, or fail under CI, where `programs` cannot run in namespaces."""
    reason = _obstacle(programs)
    if not reason:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _obstacle(programs: Sequence[str]) -> str:
    if os.geteuid() != 0:
        return "the test clusters need root"
    probe = ["unshare", "--uts", "--mount", "--net", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"the test clusters need namespaces: {done.stderr.strip()}"
    if _missing(programs):
        try:
            _install(programs)
        except (OSError, subprocess.SubprocessError) as error:
            return f"cannot install {', '.join(_missing(programs))}: {error}"
    missing = _missing(programs)
    return f"there is no {', '.join(missing)}" if missing else ""


def _missing(programs: Sequence[str]) -> list[str]:
    return [program for program in programs if not shutil.which(program, path=program_path())]


def _install(programs: Sequence[str]) -> None:
    """Have apt-get install what is missing; no service is started, now or when this machine boots."""
    with _one_at_a_time():
        packages = sorted({PACKAGES[name] for name in _missing(programs) if name in PACKAGES})
        if not packages:
            return
        if not (shutil.which("apt-get") and Path("/etc/debian_version").exists()):
            raise OSError(f"only Debian's packages are known: {', '.join(packages)}")
        with _no_services():
            _apt_get("update")
            _apt_get("install", "--yes", "--no-install-recommends", *packages)
        services = [_SERVICES[name] for name in packages if name in _SERVICES]
        if services and shutil.which("systemctl"):
            command = ["systemctl", "--quiet", "disable", *services]
            subprocess.run(command, capture_output=True, timeout=60, check=False)


def _apt_get(*words: str) -> None:
    done = subprocess.run(
        ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=120", *words],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": program_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
        check=False,
    )
    if done.returncode:
        raise OSError(f"apt-get {words[0]}: {(done.stderr or done.stdout).strip()[-500:]}")


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Forbid packages to start what they bring, unless this machine has a rule of its own."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two test runs do not install at once."""
    with open(Path(tempfile.gettempdir()) / "ftlaunch-tests-install.lock", "a") as lock:
        _lock(lock)
        yield


def _lock(file: IO[str]) -> None:
    deadline = time.monotonic() + 2 * _INSTALL_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return
