"""The limit of open files: raised where the system allows it, else told before anything starts."""

from __future__ import annotations

import resource

from ftlaunch.cluster.errors import UserError

# Of the coordinator: pipes to and from each agent, and its own files, those of TensorBoard included.
_PER_NODE = 4
_OWN = 32


def need_descriptors(num_nodes: int) -> None:
    """UserError when this process may not open what `num_nodes` nodes take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OWN + _PER_NODE * num_nodes
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"this shell allows a process {hard} open files; {num_nodes} nodes need {needed}. Raise "
            f"the limit (ulimit -n {max(1024, needed)}), or use fewer nodes."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
