"""Engines on loopback, and new weights for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from install import BUILD, python_of

CONTEXT = 16384
STARTS_WITHIN_S = 600


@dataclass(frozen=True)
class Engine:
    """A server under way: ``name`` is ``vllm`` or ``sglang``."""

    name: str
    url: str

    async def update(self, folder: Path, version: str) -> None:
        """New weights, as a trainer brings them: the answers under way are aborted."""
        steps: list[tuple[str, dict[str, Any]]] = (
            [
                ("/pause?mode=abort", {}),
                ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}),
                ("/update_weight_version", {"new_version": version}),
                ("/reset_prefix_cache", {}),
                ("/resume", {}),
            ]
            if self.name == "vllm"
            else [
                ("/pause_generation", {"mode": "abort"}),
                ("/update_weights_from_disk", {"model_path": str(folder), "weight_version": version}),
                ("/continue_generation", {}),
            ]
        )
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            for path, body in steps:
                (await client.post(self.url + path, json=body)).raise_for_status()


@contextlib.contextmanager
def serving(name: str, model: Path, *options: str) -> Iterator[Engine]:
    """The engine with a checkpoint, under the name ``policy``.

    Raises:
        RuntimeError: it ended, or did not answer in time; the log's end is told.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = BUILD / f"{name}.log"
    environ = {**os.environ, **ENVIRON, "PATH": f"{Path(python_of(name)).parent}:{os.environ['PATH']}"}
    command = [*COMMAND[name](str(model)), "--host", "127.0.0.1", "--port", str(port), *options]
    print(f"{name}: starting ({' '.join(options) or 'no options'})", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=BUILD, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, f"{url}/v1/models", log)
        yield Engine(name, url)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # whatever it started is of its own session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        time.sleep(1)
    raise RuntimeError(f"the server did not come up; {log} ends with:\n{log.read_text(errors='replace')[-3000:]}")


# One thread: two would spin for each other. Nothing compiled: it would take the first request 20 s.
ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_SERVER_DEV_MODE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
}

COMMAND = {
    "vllm": lambda model: [
        *(python_of("vllm"), "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "policy"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--enable-scale-out"),
    ],
    "sglang": lambda model: [
        *(python_of("sglang"), "-m", "sglang.launch_server", "--model-path", model, "--served-model-name", "policy"),
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--dtype", "float32", "--context-length", str(CONTEXT), "--max-total-tokens", "60000"),
        *("--mem-fraction-static", "0.2", "--disable-overlap-schedule", "--skip-server-warmup"),
        *("--grammar-backend", "none"),
    ],
}

if __name__ == "__main__":
    sys.exit("run compat/engines/prove.py")
