"""What SGLang's CPU engine needs from the environment before several ranks can start.

Both variables are SGLang's. They are set in a scheduler's process, before it makes its groups, and
only where the user has not set them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

THREADS = "SGLANG_CPU_OMP_THREADS_BIND"
"""Cores of each rank, ``"0,1|2,3"``; a rank's entry is that of its gpu id, which every rank of a
machine has its own of, on a CPU too."""
NCCL = "SGLANG_NCCL_SO_PATH"
NO_NCCL = "/nonexistent/no-nccl-without-a-gpu.so"


def prepare(server_args: Any) -> None:
    """Set what several ranks need on a machine without a GPU; nothing for one rank.

    A CUDA build of torch brings NCCL, which SGLang loads and then asks for a GPU; without the
    library it goes on without. And by itself SGLang gives each rank a NUMA node, and stops where
    there are fewer nodes than ranks: the cores are dealt out instead.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.utils import get_cpu_ids_by_node

    from sglang_jenga.cpu.repairs import has_no_gpu

    args = resolving_view(server_args)
    # DP attention divides the ranks of --tp among itself; dp_size counts replicas beside them.
    ranks = args.tp_size * args.pp_size * args.dp_size
    if ranks == 1 or not has_no_gpu():
        return
    os.environ.setdefault(NCCL, NO_NCCL)
    if ranks > len(get_cpu_ids_by_node()):
        here = -(-ranks // args.nnodes)
        cores = sorted(os.sched_getaffinity(0))
        dealt = [",".join(map(str, deal(cores, here, rank))) for rank in range(here)]
        first, step = args.base_gpu_id, args.gpu_id_step
        ids = range(first + (here - 1) * step + 1)
        entries = [dealt[max(0, gpu_id - first) // step] for gpu_id in ids]
        os.environ.setdefault(THREADS, "|".join(entries))


def deal(cores: Sequence[int], ranks: int, rank: int) -> list[int]:
    """The cores of one rank: a run of neighbours, as long as the others' or one longer. Where there
    are more ranks than cores, one core, which other ranks have as well."""
    if ranks >= len(cores):
        return [cores[rank % len(cores)]]
    return list(cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks])
