"""Reaching a node over ssh: the command, and what its failures mean. The user's own configuration holds.

One plain `ssh` for each host. It never asks: a password or an unknown host is a failure, which is
told at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.transport import Way

CONNECT_SECONDS = 8
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    # A forwarded port can be taken once only, and nobody sits at a terminal.
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    # An existing shared connection is used; one that we open would outlive the job.
    "ControlMaster": "no",
    "LogLevel": "ERROR",
}
# What a job takes along of our environment: what says how Python, the libraries and the network
# behave. Paths of programs and what a shell keeps for itself are the node's own.
_EXPORTED = (
    "ASCEND_*",
    "CUDA_*",
    "FTLAUNCH_*",
    "GLOO_*",
    "HCCL_*",
    "HF_*",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LANG",
    "LC_*",
    "LD_LIBRARY_PATH",
    "MKL_*",
    "MS_*",
    "NCCL_*",
    "NO_PROXY",
    "OMP_*",
    "PYTHON*",
    "TOKENIZERS_*",
    "TORCH_*",
    "TRANSFORMERS_*",
    "TZ",
    "UCX_*",
    "VIRTUAL_ENV",
    "WANDB_*",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
# What ssh says, and what is to be done about it.
_ADVICE = {
    "host key verification failed": "the host is not known: run `ssh {host} true` once by hand and "
    "accept its key",
    "permission denied": "no key of yours is accepted there, and a job answers no password prompt: "
    "put your public key there (ssh-copy-id {host}), load it into ssh-agent if it has a passphrase",
    "could not resolve hostname": "no such host: correct the name, or add it to ~/.ssh/config",
    "connection refused": "no ssh server listens there: start sshd, or correct the port",
    "timed out": "the host is down, or a firewall is in between",
    "no route to host": "the host is down, or not in this network",
    "network is unreachable": "this machine has no way to the host's network",
}


def ssh_way(host: str) -> Way:
    """UserError where there is no ssh."""
    program = shutil.which("ssh")
    if program is None:
        raise UserError(
            "there is no ssh on this machine, by which the hosts are to be reached. Install the "
            "OpenSSH client, or run on this machine alone with --cluster local."
        )
    options = [f"-o{name}={value}" for name, value in _OPTIONS.items()]
    return Way(
        name=host, kind="ssh", words=(program, "-T", "-x", "-a", *options, "--", host), quoted=True
    )


def exported(environ: Mapping[str, str], more: tuple[str, ...]) -> dict[str, str]:
    """What the nodes are given of our environment. `more`: names that a user adds, `*` for any end."""
    patterns = (*_EXPORTED, *more)
    return {
        name: value
        for name, value in environ.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def advice(host: str, words: str) -> str:
    """What to do about what ssh has said; "" where it means nothing to us."""
    lowered = words.lower()
    for sign, remedy in _ADVICE.items():
        if sign in lowered:
            return remedy.format(host=host)
    return ""
