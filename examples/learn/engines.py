"""The engines that can serve the policy and take new weights: the embedded one, and vLLM on the CPU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from safetensors.numpy import load_file, save_file

from hermes_atropos.servers import VLLMGenerateServer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "compat" / "engines"))

__all__ = ["ENGINES", "MODEL", "Engine", "command", "environ", "free_port"]

ENGINES = ("embedded", "vllm")

#: The name under which the policy is served.
MODEL = "policy"


def command(engine: str, checkpoint: Path, port: int) -> list[str]:
    """What starts an engine."""
    if engine == "embedded":
        program = [sys.executable, "-m", "hermes_atropos.embedded", "--checkpoint", str(checkpoint)]
        return [*program, "--port", str(port), "--served-model-name", MODEL]
    from serving import COMMAND

    return [*COMMAND["vllm"](str(for_vllm(checkpoint))), "--host", "127.0.0.1", "--port", str(port)]


def environ(engine: str) -> dict[str, str]:
    """Its environment variables, beside those of this process."""
    if engine == "embedded":
        return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    from install import install
    from serving import ENVIRON

    install("vllm")
    return ENVIRON


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class Engine:
    """A running engine, from the side of whoever brings it weights: vLLM's development endpoints.

    Args:
        kind: which one.
        url: where it listens, without a path.
    """

    def __init__(self, kind: str, url: str) -> None:
        self._kind = kind
        self._url = url
        # The address is this machine's own: no proxy of the process's environment stands between.
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def wait(self, seconds: float = 600) -> None:
        """Until it answers.

        Raises:
            TimeoutError: it does not.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if self._client.get("/v1/models").is_success:
                    return
            time.sleep(0.2)
        raise TimeoutError(f"the engine at {self._client.base_url} did not answer within {seconds:g} s: see its log")

    def has(self, checkpoint: Path, version: str) -> bool:
        """See to it that it serves a checkpoint, which it calls ``version``; False where it can't be reached."""
        try:
            if self._get("/weight_info")["weight_version"] != version:
                self._push(checkpoint, version)
        except httpx.TransportError:
            return False
        return True

    def draws(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """So many first tokens of answers to ``ids``, drawn as those of rollouts are, and their logprobs."""
        config = APIServerConfig(base_url=f"{self._url}/v1", model_name=MODEL, health_check=False)
        asked = VLLMGenerateServer(config).tokens_and_logprobs_completion(
            input_ids=ids, n=count, max_tokens=1, temperature=1.0
        )
        _, tokens, logprobs, _ = asyncio.run(asked)
        return [token for [token] in tokens], [logprob for [logprob] in logprobs]

    def _push(self, checkpoint: Path, version: str) -> None:
        folder = for_vllm(checkpoint) if self._kind == "vllm" else checkpoint
        self._post("/pause?mode=abort")
        self._post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
        self._post("/update_weight_version", new_version=version)
        self._post("/reset_prefix_cache")
        self._post("/resume")

    def _get(self, path: str) -> Any:
        return self._client.get(path).raise_for_status().json()

    def _post(self, path: str, **body: Any) -> None:
        self._client.post(path, json=body).raise_for_status()


def for_vllm(checkpoint: Path) -> Path:
    """The checkpoint with an output head of its own.

    vLLM 0.32 on the CPU leaves a head that is tied to the embeddings as it was when it is given new weights.
    """
    folder = checkpoint / "untied"
    if not folder.exists():
        new = checkpoint / "untied.new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(checkpoint, new, ignore=shutil.ignore_patterns("untied*", "trainer.pt", "*.safetensors"))
        weights = load_file(checkpoint / "model.safetensors")
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, new / "model.safetensors")
        config = json.loads((new / "config.json").read_text())
        (new / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        new.rename(folder)
    return folder
