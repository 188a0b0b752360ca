"""One side of `bench_host.py`: a cache and the requests on it, led as SGLang's scheduler does.

Every call that touches memory is SGLang's own: `ScheduleBatch.check_decode_mem`,
`alloc_for_decode_default`, `alloc_for_extend`, `match_kv_cache`, `checkpoint_kv_cache`,
`release_kv_cache`. Under jenga the plugin's hooks stand around them, as in a server. What else the
scheduler does (queues, admission budgets, batches' tensors) is done untimed or not at all. Times
are the thread's own: whoever else the processor runs meanwhile is not in them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from time import thread_time
from typing import Any, NamedTuple

from benchmarks.host.cache_sides import Shape, build, request


class Chat(NamedTuple):
    """A request: its prompt and the tokens it is answered with, the first one by the prefill."""

    prompt: list[int]
    answer: list[int]


class HostSide:
    """`seconds[phase, call]`: times, a decode step's or a request's share, in order."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name = name
        self.cache = build(name, shape)
        self.rows = self.cache.req_to_token_pool
        self.allocator = self.cache.token_to_kv_pool_allocator
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.hit_tokens = 0
        self.phase: str | None = None  # None: nothing is recorded
        self._running: list[tuple[Any, Chat]] = []
        self._batch: Any = None
        self._alloc_for_extend, self._alloc_for_decode, self._slide = self._hooked_functions()

    def _hooked_functions(self) -> list[Callable[..., Any]]:
        """SGLang's functions; under jenga as the hooks make them that the plugin has for them."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.mem_cache import allocation

        from sglang_jenga.boot import hook_table

        functions = [
            allocation.alloc_for_extend,
            allocation.alloc_for_decode_default,
            ScheduleBatch.maybe_evict_swa,
        ]
        if self.name != "jenga":
            return functions
        hooks = {hook.target.rpartition(".")[2]: hook.resolved() for hook in hook_table.ROUNDS}
        return [
            functools.partial(hooks[function.__name__], function)
            if function.__name__ in hooks
            else function
            for function in functions
        ]

    def _record(self, call: str, seconds: float) -> float:
        if self.phase is not None:
            self.seconds[self.phase, call].append(seconds)
        return seconds

    def _timed(self, call: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = thread_time()
        result = function(*args, **kwargs)
        self._record(call, thread_time() - begin)
        return result

    # ---- requests begin and end -------------------------------------------------------------

    def admit(self, chats: Sequence[Chat]) -> None:
        """Prefill a batch of new requests; they decode from now on."""
        from sglang.srt.managers.schedule_batch import ForwardMode
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        reqs = [request(str(at), chat.prompt) for at, chat in enumerate(chats)]
        for req in reqs:
            self._timed("match", self._look_up, req)
            req.extend_end = len(req.full_untruncated_fill_ids)
            self.hit_tokens += req.prefix_len
        for req in reqs:
            req.lock = self._timed("lock", self.cache.lock, req.last_node)
            req.kv.cache_protected_len = req.prefix_len
        batch = self._new_batch(reqs, ForwardMode.EXTEND, [req.extend_end for req in reqs])
        batch.prefix_lens = [req.prefix_len for req in reqs]
        batch.extend_lens = [req.extend_len for req in reqs]
        batch.extend_num_tokens = sum(batch.extend_lens)
        begin = thread_time()
        self._alloc_for_extend(batch)
        share = (thread_time() - begin) / len(reqs)
        for req, chat in zip(reqs, chats, strict=True):
            self._record("extend", share)
            self._timed("insert", checkpoint_kv_cache, req, self.cache)
            req.output_ids.append(chat.answer[0])
            self._running.append((req, chat))
        self._batch = None

    def _look_up(self, req: Any) -> None:
        from sglang.srt.mem_cache.common import match_kv_cache

        req.refresh_fill_ids()
        ids = req.full_untruncated_fill_ids
        match_kv_cache(req, self.cache, ids, max_prefix_len=len(ids) - 1)

    def release_ended(self) -> int:
        """Release the requests that have their whole answer; return how many they were."""
        return self._release(lambda req, chat: len(req.output_ids) == len(chat.answer))

    def release_all(self) -> None:
        self._release(lambda req, chat: True)

    def _release(self, ended: Callable[[Any, Chat], bool]) -> int:
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH
        from sglang.srt.mem_cache.common import release_kv_cache

        left = []
        for req, chat in self._running:
            if ended(req, chat):
                req.finished_reason = FINISH_LENGTH(len(req.output_ids))
                self._timed("release", release_kv_cache, req, self.cache, checkpoint=True)
            else:
                left.append((req, chat))
        count = len(self._running) - len(left)
        if count:
            self._running, self._batch = left, None
        return count

    # ---- a decode step ----------------------------------------------------------------------

    def decode(self) -> None:
        """One step of all running requests. Raises RuntimeError if the pool is too small."""
        batch = self._decode_batch()
        begin = thread_time()
        fits = batch.check_decode_mem()
        checked = thread_time()
        if not fits:
            raise RuntimeError(f"{self.name}: the running requests do not fit the pool")
        self._alloc_for_decode(batch, 1)
        ended = thread_time()
        self._record("check", checked - begin)
        self._record("slide", batch.slide_seconds)
        self._record("alloc", ended - checked - batch.slide_seconds)
        self._record("step", ended - begin)
        for req, chat in self._running:
            req.decode_batch_idx += 1
            req.output_ids.append(chat.answer[len(req.output_ids)])
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1

    def _decode_batch(self) -> Any:
        from sglang.srt.managers.schedule_batch import ForwardMode

        if self._batch is None:
            reqs = [req for req, _ in self._running]
            lengths = [req.kv.kv_allocated_len for req in reqs]
            self._batch = self._new_batch(reqs, ForwardMode.DECODE, lengths)
        return self._batch

    def _new_batch(self, reqs: list[Any], mode: Any, lengths: list[int]) -> Any:
        import torch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        rows = torch.tensor([req.kv.req_pool_idx or 0 for req in reqs], dtype=torch.int64)
        seq_lens = torch.tensor(lengths, dtype=torch.int64)
        batch = _batch_class()(
            reqs=reqs,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.cache,
            model_config=_NO_ENCODER,
            device="cpu",
            forward_mode=mode,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            req_pool_indices=rows,
            req_pool_indices_cpu=rows,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.clone(),
        )
        batch.slide = self._slide
        return batch


class _ModelConfig(NamedTuple):
    """What SGLang's allocation functions ask of a model."""

    is_encoder_decoder: bool


_NO_ENCODER = _ModelConfig(is_encoder_decoder=False)


@functools.cache
def _batch_class() -> type:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    class Batch(ScheduleBatch):
        """SGLang's batch; it times the part of an allocation that gives window pages up."""

        slide: Callable[[ScheduleBatch], None] | None = None
        slide_seconds = 0.0

        def maybe_evict_swa(self) -> None:
            begin = thread_time()
            self.slide(self)
            self.slide_seconds = thread_time() - begin

    return Batch
