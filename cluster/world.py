"""Where this process sits among the ranks of a job. The only reader and writer of rank variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ftlaunch.cluster.errors import JobError

# The names torchrun made customary, so that a user's own script finds them too.
_VARIABLES = {
    "rank": "RANK",
    "size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
    "node_rank": "GROUP_RANK",
    "num_nodes": "GROUP_WORLD_SIZE",
    "master_port": "MASTER_PORT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process of a job: `rank` of `size`, `local_rank` of `local_size` on `node_rank` of `num_nodes`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    num_nodes: int
    master_address: str
    master_port: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size
        assert 0 <= self.local_rank < self.local_size <= self.size
        assert 0 <= self.node_rank < self.num_nodes <= self.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def to_environment(self) -> dict[str, str]:
        env = {variable: str(getattr(self, field)) for field, variable in _VARIABLES.items()}
        return {**env, "MASTER_ADDR": self.master_address}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> World:
        """JobError when a variable is missing: the process was not started by an agent."""
        missing = [v for v in (*_VARIABLES.values(), "MASTER_ADDR") if v not in environ]
        if missing:
            raise JobError(f"not started by an ftlaunch agent: {', '.join(missing)} not set")
        numbers = {field: int(environ[variable]) for field, variable in _VARIABLES.items()}
        return cls(master_address=environ["MASTER_ADDR"], **numbers)

    @classmethod
    def alone(cls) -> World:
        """A job of one process."""
        return cls(
            rank=0,
            size=1,
            local_rank=0,
            local_size=1,
            node_rank=0,
            num_nodes=1,
            master_address="127.0.0.1",
            master_port=0,
        )
