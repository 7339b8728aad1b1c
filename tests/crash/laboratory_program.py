"""A laboratory: keeps one cluster running, and plays the rounds that it is told to on it.

Reads {"seed": …, "fault": …} line by line, and answers each with the result as JSON. Where it has
namespaces of its own it is alone with its network, its processes and its file systems.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import grpc

from lrpilot.v1 import runs_pb2
from lrpilot.v1.runs_pb2_grpc import RunServiceStub
from tests.crash.cluster import (
    PRELOADED,
    PROCESSES,
    Cluster,
    PostgresCluster,
    SqliteCluster,
)
from tests.crash.relay import Network
from tests.crash.rounds import RoundPlan, RoundResult, play

DISK_BYTES = {"sqlite": "48m", "postgresql": "224m"}
"""Size of the file system of the database, where it has one of its own."""

REPLICAS = 3

CALL_S = 20.0


def main() -> None:
    """Play rounds until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=DISK_BYTES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--bug", default="")
    options = parser.parse_args()
    # The processes that are started here have the standard output, and may write to it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    PROCESSES.set_forkserver_preload(PRELOADED)
    if options.namespaces:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    laboratory = _Laboratory(options.store, options.folder, options.namespaces, options.bug)
    try:
        for line in sys.stdin:
            result = laboratory.play(**json.loads(line))
            answers.write(json.dumps(asdict(result)) + "\n")
            answers.flush()
    finally:
        laboratory.close()


class _Laboratory:
    def __init__(self, store: str, folder: Path, has_namespaces: bool, bug: str) -> None:
        self._store, self._folder, self._bug = store, folder, bug
        self._has_namespaces = has_namespaces
        self._network = Network()
        self._cluster: Cluster | None = None
        self._clusters = 0

    def play(self, seed: int, fault: str) -> RoundResult:
        """Play a round, on the cluster of the one before if that left it as it should be."""
        plan = RoundPlan.of(seed, self._store, fault)  # type: ignore[arg-type]
        if self._cluster is None:
            self._cluster = self._make_cluster()
        folder = self._folder / f"round-{seed}-{fault.replace(' ', '-')}"
        result = play(plan, self._cluster, folder)
        if result.violations:
            self._end_cluster()
        else:
            self._forget(str(plan.spec["name"]))
        return result

    def close(self) -> None:
        """Leave nothing behind but the folder."""
        self._end_cluster()
        self._network.close()

    def _make_cluster(self) -> Cluster:
        self._clusters += 1
        folder = self._folder / f"cluster-{self._clusters}"
        disk = folder / "disk"
        disk.mkdir(parents=True)
        if self._has_namespaces:
            size = f"size={DISK_BYTES[self._store]}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(disk)], check=True)
        cluster: Cluster
        if self._store == "sqlite":
            cluster = SqliteCluster(self._network, folder, disk, self._bug)
        else:
            cluster = PostgresCluster(self._network, folder, disk, REPLICAS, self._bug)
        cluster.start()
        return cluster

    def _end_cluster(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is None:
            return
        cluster.close()
        if self._has_namespaces:
            subprocess.run(["umount", "--lazy", str(cluster.disk)], check=True)

    def _forget(self, run: str) -> None:
        """Remove a run, so that the database stays small."""
        assert self._cluster is not None
        with grpc.insecure_channel(self._cluster.servers[0].grpc) as channel:
            stub: RunServiceStub = RunServiceStub(channel)
            request = runs_pb2.DeleteRunRequest(run=run, force=True)
            try:
                stub.DeleteRun(request, timeout=CALL_S)
            except grpc.RpcError:
                # It has an effect on nothing but room.
                self._end_cluster()


if __name__ == "__main__":
    main()
