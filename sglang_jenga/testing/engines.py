"""Run many SGLang engines quickly: import once, fork per engine.

An engine's processes are what they are in production - tokenizer manager, scheduler, detokenizer,
over ZMQ - except that they are forked from a process that has imported SGLang instead of spawned to
import it again. A cell of the parity matrix then costs seconds instead of half a minute.

    outputs = run_engine(model, [[prompt, ...], [follow-up, ...]], max_new_tokens=16, page_size=16)
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "max_total_tokens": 8192,
    "max_running_requests": 32,
    "mem_fraction_static": 0.5,  # SGLang guesses a negative one for a CPU without chunked prefill
    "disable_cuda_graph": True,
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "sleep_on_idle": True,  # SGLang's idle loop would take a core from the others
    "random_seed": 1,
    "log_level": "info",
}


class Pictured(NamedTuple):
    """A prompt in text, with the images and videos that stand in it."""

    text: str
    images: Sequence[Any]
    videos: Sequence[Any] = ()


Prompt = list[int] | Pictured
Wave = Sequence[Prompt] | Callable[[list[list[list[int]]]], Sequence[Prompt]]


class Run(NamedTuple):
    """Per wave of prompts the answers' token ids, their cached tokens and the wall seconds."""

    outputs: list[list[list[int]]]
    cached: list[list[int]]
    seconds: list[float]
    log: str

    @property
    def retractions(self) -> int:
        """Requests that were retracted for want of memory or on demand of a test. All ranks with
        the same requests, and all stages, say so: the first are counted. With DP attention each
        rank of --tp is the first of a group of its own."""
        others = r"PP[1-9]|(?<!DP[1-9] )TP[1-9]"
        said = rf"^(?!\[[^\]]*(?:{others})).*#retracted_reqs: (\d+)"
        return sum(map(int, re.findall(said, self.log, re.M)))

    @property
    def hit_tokens(self) -> int:
        """Cached tokens of all prompts that were computed, resumed ones among them."""
        return sum(map(int, re.findall(r"#cached-token: (\d+)", self.log)))

    @property
    def running(self) -> list[int]:
        """Requests of each decode step that the log tells of (all with decode_log_interval=1)."""
        return [int(found) for found in re.findall(r"Decode batch.*?#running-req: (\d+)", self.log)]


class EngineFailed(RuntimeError):
    """The engine raised or died; the message ends with its log."""


def preload() -> None:
    """Import what every engine needs, here and once. Starts no thread and no torch kernel.

    What a jenga engine builds with as well, inert without the flag: loading its machine code takes
    a second in each process.
    """
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from sglang_jenga.cpu import sgl_kernel

    sgl_kernel.install_if_needed()  # torch may have been imported before the variable was set
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.scheduler

    from sglang_jenga.boot import hook_table, rebinding

    rebinding.rebind(hook_table.CPU_SCHEDULER)  # FalconMamba cannot even be imported without
    import sglang.srt.models.registry  # noqa: F401

    import sglang_jenga.boot.construction  # noqa: F401


def run_engine(
    model: str | Path,
    waves: Sequence[Wave],
    *,
    max_new_tokens: int | Sequence[int] = 16,
    sampling: dict[str, Any] | Sequence[dict[str, Any]] = (),
    seconds: float = 300.0,
    env: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    **arguments: Any,
) -> Run:
    """Boot an engine, answer each wave greedily, shut it down.

    Nobody of a wave is admitted before all of it has arrived, so what is batched, evicted and
    retracted is the same in every run, on a busy machine as well. A wave may be a function of the
    answers so far, per wave: a conversation goes on from them. ``sampling``: parameters of all
    prompts or of each, beside ``max_new_tokens``. ``prepare`` runs in the engine's process before
    it boots (to plant a fault).
    """
    preload()
    # SGLang collects garbage as it boots: that would walk through, and copy, all that is shared.
    gc.collect()
    gc.freeze()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="sglang-engine-") as folder:
        log_path = Path(folder) / "log"
        asked = _sampling(max_new_tokens, sampling)
        body = (sender, log_path, str(model), waves, asked, env or {}, prepare, arguments)
        process = context.Process(target=_engine_process, args=body)
        process.start()
        sender.close()
        try:
            if not receiver.poll(seconds):
                raise EngineFailed(f"no answer in {seconds:.0f} s\n{tail(log_path)}")
            try:
                result = receiver.recv()
            except EOFError:
                raise EngineFailed(f"the engine died\n{tail(log_path)}") from None
        finally:
            # The child leads a process group that holds its scheduler and detokenizer.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
        log = log_path.read_text(errors="replace")
    if isinstance(result, str):
        raise EngineFailed(f"{result}\n{log[-4000:]}")
    return Run(*result, log)


def _engine_process(
    sender: Any,
    log_path: Path,
    model: str,
    waves: Sequence[Wave],
    sampling: dict[str, Any] | list[dict[str, Any]],
    env: dict[str, str],
    prepare: Callable[[], None] | None,
    arguments: dict[str, Any],
) -> None:
    lead_processes(log_path, env)
    try:
        engine = forking_engine()
        arrivals = Arrivals()
        _admit_together(arrivals)
        if prepare is not None:
            prepare()
        server = engine.Engine(model_path=model, **(CPU_ARGUMENTS | arguments))
        outputs, cached, seconds = [], [], []
        for wave in waves:
            if callable(wave):
                wave = wave(outputs)
            start = time.perf_counter()
            arrivals.expect(len(wave))
            answers = server.generate(**_asked(wave), sampling_params=sampling)
            outputs.append([answer["output_ids"] for answer in answers])
            cached.append([answer["meta_info"]["cached_tokens"] for answer in answers])
            seconds.append(time.perf_counter() - start)
        for _ in range(IDLE_ROUNDS):
            server.get_server_info()
        sender.send((outputs, cached, seconds))
    except BaseException:
        sender.send(traceback.format_exc())
    finally:
        sender.close()


def _asked(wave: Sequence[Prompt]) -> dict[str, Any]:
    """What an engine is called with; a wave is of tokens or of pictured texts."""
    if not all(isinstance(prompt, Pictured) for prompt in wave):
        return {"input_ids": list(wave)}
    # With None for the first prompt SGLang would take the lists of the others for one image each.
    asked = {
        "prompt": [prompt.text for prompt in wave],
        "image_data": [list(prompt.images) for prompt in wave],
    }
    if any(prompt.videos for prompt in wave):
        asked["video_data"] = [list(prompt.videos) for prompt in wave]
    return asked


def _sampling(
    max_new_tokens: int | Sequence[int], extra: dict[str, Any] | Sequence[dict[str, Any]]
) -> dict[str, Any] | list[dict[str, Any]]:
    """Sampling parameters of all prompts, or of each where the caller tells them apart."""
    common = {"temperature": 0, "ignore_eos": True}
    if isinstance(extra, dict):
        common |= extra
        extra = ()
    if isinstance(max_new_tokens, int):
        common["max_new_tokens"] = max_new_tokens
        return [common | one for one in extra] if extra else common
    each = extra or [{}] * len(max_new_tokens)
    return [
        common | {"max_new_tokens": count} | one
        for count, one in zip(max_new_tokens, each, strict=True)
    ]


MOST_RANKS = 64
IDLE_ROUNDS = 3
"""Each answers a question to the scheduler. A rank that compares itself with its peers after every
round has, when the last is answered, seen all of them finish the first and log what they do there.
"""


class Arrivals:
    """How many requests have arrived so far of those that the test sends, shared by all ranks.

    Ranks of one tensor parallel group, and stages of a pipeline, receive the same ones, and look at
    their own count alone: so they decide alike. Those of a data parallel group receive a part each.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._expected = context.Value("i", 0)
        self._received = context.Array("i", MOST_RANKS, lock=False)  # one writer each

    def expect(self, count: int) -> None:
        self._expected.value += count

    def note(self) -> None:
        from sglang.srt.runtime_context import get_device

        self._received[get_device().gpu_id] += 1

    def complete(self) -> bool:
        from sglang.srt.runtime_context import get_device, get_parallel

        parallel = get_parallel()
        if parallel.dp_size * parallel.attn_dp_size == 1:
            return self._received[get_device().gpu_id] >= self._expected.value
        ranks = parallel.attn_tp_size * parallel.pp_size  # that receive the same ones
        return sum(self._received) >= self._expected.value * ranks


def _admit_together(arrivals: Arrivals) -> None:
    """Hold back admission while some of the expected requests are on their way."""
    from sglang.srt.managers.schedule_batch import NextBatchPlan
    from sglang.srt.managers.scheduler import Scheduler

    receive, admit = Scheduler.handle_generate_request, Scheduler.get_new_batch_prefill

    def received(self: Any, *args: Any, **kwargs: Any) -> None:
        receive(self, *args, **kwargs)
        arrivals.note()

    def admitted(self: Any, running_batch: Any) -> Any:
        if not arrivals.complete():
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        return admit(self, running_batch)

    Scheduler.handle_generate_request = received
    Scheduler.get_new_batch_prefill = admitted


def lead_processes(log_path: Path, env: dict[str, str]) -> None:
    """Make this process, just forked, the leader of a group that an engine's processes join. It
    ends with its parent, writes to the log, and has ``env`` besides."""
    os.setpgid(0, 0)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    with log_path.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(env)


def forking_engine() -> Any:
    """SGLang's module of engines, whose processes are forked from this one."""
    import torch
    from sglang.srt.entrypoints import engine

    torch.set_num_threads(1)  # torch may be older here than OMP_NUM_THREADS
    engine.mp.set_start_method("fork", force=True)
    engine.mp.set_start_method = lambda *args, **kwargs: None
    return engine


def _die_with_parent(parent: int) -> None:
    """A killed test run must not leave its engines behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def tail(path: Path) -> str:
    return path.read_text(errors="replace")[-4000:] if path.exists() else ""
