"""The peers: the packages of each one's environment, and its formats of each precision."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

OURS = "FusionRoute"
TORCH = "torch==2.13.0"  # pip takes the CPU build where it can; the GPU build works too, but has several GB
ENVIRONMENTS = {  # folder → packages; ours is the environment that runs the comparison
    "genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx-ir==0.1.16", "transformers==5.24.0", TORCH),
    "llama": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),
    "openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "transformers==5.5.4", TORCH),
    "optimum": ("optimum-onnx[onnxruntime]==0.1.0", "onnxruntime==1.32.0", "transformers==4.57.6", TORCH),
    "torch": ("transformers==5.24.0", TORCH),
}
# OpenVINO's exporter depends on it. Text models do not need it, and a build for another torch breaks every import.
EXCLUDED = "torchvision"


@dataclass(frozen=True)
class Peer:
    """A runtime: its name, environment (None: this one), module in this folder, and formats (`forms`) by precision."""

    name: str
    environment: str | None
    module: str
    forms: dict[str, tuple[str, ...]] = field(hash=False)


PEERS = (
    Peer(OURS, None, "fusionroute", {"fp32": ("fp32",), "int8": ("int8",), "int4": ("int4",)}),
    Peer("onnxruntime-genai", "genai", "genai", {"fp32": ("fp32",), "int8": ("int8",), "int4": ("block 32", "k_quant_mixed")}),
    Peer("llama.cpp", "llama", "llama", {"fp32": ("F32",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}),
    Peer("OpenVINO", "openvino", "openvino", {"fp32": ("fp32",), "int8": ("int8",), "int4": ("int4",)}),
    Peer("Optimum", "optimum", "optimum", {"fp32": ("fp32",)}),
    Peer("torch", "torch", "torch", {"fp32": ("fp32",)}),
)


def python(work: Path, name: str | None) -> Path:
    """The interpreter of an environment, which is installed at first use."""
    if name is None:
        return Path(sys.executable)
    folder = work / "env" / name
    marker, packages = folder / "packages.txt", "\n".join(ENVIRONMENTS[name])
    if not marker.is_file() or marker.read_text() != packages:  # written last, so an interrupted install is repeated
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]], check=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", EXCLUDED], check=True)
        marker.write_text(packages)
    return folder / "bin/python"
