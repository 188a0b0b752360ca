"""A launcher process that resolves many SGLang configurations, with the real plugins loaded.

Starting SGLang costs more than ten seconds, resolving a configuration a few hundredths of one. And
plugins patch SGLang for the whole process, which must not be the one that runs the other tests.
"""

from __future__ import annotations

import atexit
import base64
import functools
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}


OMITTED = object()
"""Stands for a field of `TINY` that a config must not have."""


class Outcome(NamedTuple):
    """``end`` is "resolved" or the exception's name; ``text`` what it said or exited with."""

    end: str
    text: str
    fields: dict[str, Any]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without the flag's variables, on the CPU engine."""
    kept = {k: v for k, v in os.environ.items() if k not in ("SGLANG_MEMORY_BACKEND",)}
    return {**kept, "SGLANG_USE_CPU_ENGINE": "1", **extra}


def write_model(folder: Path, architecture: str, model_type: str, **config: Any) -> str:
    """Write a config.json, and no weights: nothing here may get as far as loading them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"architectures": [architecture], "model_type": model_type, **TINY, **config}
    content = {name: value for name, value in content.items() if value is not OMITTED}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


class Launcher:
    def __init__(self, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def command_line(self, *argv: str, **env: str) -> Outcome:
        return self._ask({"argv": ["--device", "cpu", *argv], "env": env})

    def engine(self, env: dict[str, str] | None = None, **kwargs: Any) -> Outcome:
        """Do what `sgl.Engine(**kwargs)` does before it starts processes."""
        return self._ask({"engine": {"device": "cpu", **kwargs}, "env": env or {}})

    def record(self, env: dict[str, str] | None = None, **kwargs: Any) -> Outcome:
        """Do what `sgl.Engine(server_args=ServerArgs(**kwargs))` does before it starts any."""
        return self._ask({"record": {"device": "cpu", **kwargs}, "env": env or {}})

    def run(self, code: str) -> dict[str, Any]:
        """Run `code` there and return what it left in its variable ``answer``."""
        outcome = self._ask({"code": code, "env": {}})
        assert outcome.end == "ran", outcome.text
        return outcome.fields

    def warnings(self, *argv: str, **env: str) -> list[str]:
        """What the plugin warns of while this command line is resolved."""
        request = {"argv": ["--device", "cpu", *argv], "env": env}
        return self.run(f"from __main__ import _warnings\nanswer = _warnings({request!r})")

    def _ask(self, request: dict[str, Any]) -> Outcome:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


@functools.cache
def shared_launcher() -> Launcher:
    """Return the one launcher of this test run."""
    launcher = Launcher()
    atexit.register(launcher.close)
    return launcher


def _build(request: dict[str, Any]) -> Any:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    if "argv" in request:
        return prepare_server_args(request["argv"])
    if "engine" in request:
        return Engine.server_args_class(**request["engine"])
    return ServerArgs(**request["record"])


def _fields(server_args: Any) -> dict[str, Any]:
    from sglang.srt.arg_groups import overrides

    from sglang_jenga.boot.flags import backend_of

    copy = pickle.loads(pickle.dumps(server_args))
    config = overrides.resolving_view(copy)
    model = overrides.model_config_of(copy)
    return {
        "backend": backend_of(copy),
        "shown": copy.resolved_dict().get("memory_backend"),
        "radix_cache_backend": config.radix_cache_backend,
        "radix_eviction_policy": config.radix_eviction_policy,
        "disable_hybrid_swa_memory": config.disable_hybrid_swa_memory,
        "chunk": config.chunked_prefill_size,
        "mixed_chunk": config.enable_mixed_chunk,
        "post_capture": overrides.post_capture_kv_sizing_planned(copy),
        "hybrid": model.is_hybrid_swa,
        "window_layers": model.swa_attention_layer_ids,
        "full_layers": model.full_attention_layer_ids,
        "pickle": base64.b64encode(pickle.dumps(server_args)).decode(),
    }


def _answer(request: dict[str, Any]) -> Outcome:
    before = dict(os.environ)
    os.environ.update(request["env"])
    try:
        if "code" in request:
            scope: dict[str, Any] = {}
            exec(request["code"], scope)
            return Outcome("ran", "", scope["answer"])
        server_args = _build(request)
        server_args.resolve_once()
        return Outcome("resolved", "", _fields(server_args))
    except SystemExit as end:
        return Outcome("SystemExit", str(end.code), {})
    except Exception as error:
        return Outcome(type(error).__name__, str(error), {})
    finally:
        os.environ.clear()
        os.environ.update(before)


def _warnings(request: dict[str, Any]) -> list[str]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("sglang_jenga").addHandler(handler)
    try:
        outcome = _answer(request)
    finally:
        logging.getLogger("sglang_jenga").removeHandler(handler)
    assert outcome.end == "resolved", outcome
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import sglang.srt.entrypoints.engine  # noqa: F401  as in a process that builds an Engine
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))._asdict()), file=answers, flush=True)


if __name__ == "__main__":
    main()
