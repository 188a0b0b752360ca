"""SGLang's configuration in this process, without a server: for code that reads it at run time.

SGLang's functions ask a process-wide context for what the server was started with. `configured`
makes that context of a tiny model's arguments, once per process; `Settings` changes the few fields
that decide how memory is handled.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from sglang_jenga.testing.engines import CPU_ARGUMENTS, preload
from sglang_jenga.testing.tiny_models import write_tiny_model


@contextmanager
def configured() -> Iterator[None]:
    """Import SGLang and, inside, let its functions find the configuration of a server."""
    preload()
    import torch
    from sglang.srt import runtime_context

    torch.set_num_threads(1)
    with runtime_context.use_context(_context()):
        yield


@functools.cache
def _context() -> Any:
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.server_args import ServerArgs

    from sglang_jenga.boot import cpu_table, rebinding

    rebinding.rebind(cpu_table.CPU_DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model("llama", folder)
        server_args = ServerArgs(model_path=str(model), **CPU_ARGUMENTS)
        server_args.resolve_once()
        model_config_of(server_args)  # SGLang keeps it; the folder may go
    ranks = runtime_context.SpawnRanks(world_rank=0)
    return runtime_context.create_context(server_args, role="scheduler", ranks=ranks)


class Settings(NamedTuple):
    """How a server was started, as far as memory goes.

    ``chunk``: tokens of a prompt's chunk, None for prompts in one go. ``strategy``: SGLang's way
    with recurrent states. ``state_chunk``: tokens between two lengths of a prompt at which a kernel
    has a state to keep; ``track_interval``: the same for an answer. ``slide_interval``: tokens that
    a window leaves behind before SGLang asks for them.
    """

    page_size: int = 1
    chunk: int | None = 16
    overlap: bool = True
    radix: bool = True
    mixed_chunk: bool = False
    strategy: str = "no_buffer"
    state_chunk: int = 8
    track_interval: int = 8
    slide_interval: int = 4

    @property
    def tracked(self) -> bool:
        return self.strategy in ("extra_buffer", "extra_buffer_lazy")

    @property
    def lazy(self) -> bool:
        return self.strategy == "extra_buffer_lazy"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, SGLang's code finds these settings in the context that is in use."""
        from sglang.srt import runtime_context
        from sglang.srt.environ import envs

        server_args = runtime_context.get_server_args()
        model_config = runtime_context.process_model_config()
        with ExitStack() as stack:
            stack.enter_context(
                runtime_context.get_schedule().override(
                    page_size=self.page_size,
                    chunked_prefill_size=self.chunk or -1,
                    enable_mixed_chunk=self.mixed_chunk,
                    disable_overlap_schedule=not self.overlap,
                )
            )
            stack.enter_context(
                runtime_context.get_exec().mamba.override(
                    mamba_track_interval=self.track_interval,
                    enable_mamba_extra_buffer=self.tracked,
                    enable_mamba_extra_buffer_lazy=self.lazy,
                )
            )
            stack.enter_context(
                runtime_context.get_parallel().override(pp_max_micro_batch_size=1 << 10)
            )
            stack.enter_context(envs.SGLANG_SWA_EVICTION_INTERVAL.override(self.slide_interval))
            server_args._mamba_cache_chunk_size = max(self.state_chunk, self.page_size)
            model_config.hf_text_config.mamba_chunk_size = self.state_chunk
            yield
