"""A Ray cluster of some nodes on this machine, in a process of its own: `ray_cluster.py 2`.

Prints its address; then removes a node, the last one, for every line that it reads, without a word
to that node; ends with its input.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass


@dataclass
class Cluster:
    """A Ray cluster of two nodes with a core each.

    Attributes:
        process: That keeps it.
        environment: For a command that is to use it, the token that it asks for included.
    """

    process: subprocess.Popen[str]
    environment: dict[str, str]

    def remove_node(self) -> None:
        """Ends a node as a power failure would."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("remove\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "removed\n"


def main() -> None:
    from ray import cluster_utils

    # Each node has an address of its own, so that a command joins the head, which stays.
    head = {"num_cpus": 0}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    count = int(sys.argv[1])
    nodes = [cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{2 + n}") for n in range(count)]
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        sys.stdout.write("removed\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
