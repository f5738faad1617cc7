"""A Ray cluster on this machine, in a process of its own: `python -m tests.ray_cluster NODES`.

Prints the address when it is up, and ends when its standard input does. Ray reads the environment once in
each process, so a test that joins a cluster in another mode cannot hold one itself.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(int(sys.argv[1])):
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
