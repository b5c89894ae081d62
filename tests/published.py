"""Small bundles as they lie on the Hub, and scripts in fresh processes that load them."""

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mechint.steering import Direction, make_direction, save_direction

PRELUDE = """
import json, os, sys
import torch
from mechint.errors import MechintError
out = {}

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except MechintError as told:
        return str(told)
    return "nothing was raised"
"""
HOOK = "blocks.3.hook_resid_post"
D_IN, D_SAE, K = 6, 20, 5
RUN51, VECTOR = "myorg/sae-run51-gpt2-medium", "myorg/sv-sentiment-gpt2-medium-l8"


def run(script: str, env: dict[str, str], cwd: Path) -> dict[str, Any]:
    """Run a script that fills the dict `out` in a fresh process, and return it."""
    code = PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def metadata_of(files: dict[str, bytes], **said: Any) -> bytes:
    """bundle_metadata.json of these files."""
    hashes = {name: {"sha256": hashlib.sha256(value).hexdigest(), "size": len(value)} for name, value in files.items()}
    return json.dumps({**said, "files": hashes}).encode()


def platform_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of the mech platform's TopKSAE, with biases that let negative entries be among the largest."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(D_SAE, D_IN, generator=draw),
        "encoder.bias": torch.randn(D_SAE, generator=draw) - 3.0,
        "decoder.weight": torch.randn(D_IN, D_SAE, generator=draw),
        "decoder.bias": torch.randn(D_IN, generator=draw),
    }


def platform_bundle(seed: int = 0) -> dict[str, bytes]:
    """What `publish-sae --run-id 51` uploads, small."""
    sidecar = {"dtype": "torch.float32", "input_dim": D_IN, "k": K, "n_features": D_SAE, "training": None}
    files = {
        "sae_weights.safetensors": save(platform_tensors(seed)),
        "sae_weights.safetensors.json": json.dumps(sidecar).encode(),
        "environment.json": b"{}",
        "feature_analysis.json": b"{}",
        "README.md": b"# a card\n",
    }
    spec = {"parameters": {"model": "gpt2-medium", "hook_site": "blocks.8.hook_resid_pre"}}
    return files | {
        "bundle_metadata.json": metadata_of(files, kind="sae", run_id=51, license="research-only", spec=spec)
    }


def a_direction(width: int = 128, **info: Any) -> Direction:
    raw = torch.randn(width, generator=torch.Generator().manual_seed(3))
    said = {"name": "from-the-sidecar", "model": "gpt2-medium", "hook_site": "blocks.8.hook_resid_pre"}
    return make_direction(raw * 12 / raw.norm(), **said | info)


def vector_bundle(folder: Path, **info: Any) -> dict[str, bytes]:
    """What `publish-steering` uploads; the sidecar claims a licence and a kind of its own."""
    claims = {"license": "do-what-you-want", "kind": "sae", "extraction_quality": 1.5} | info
    path = save_direction(a_direction(**claims), folder)
    files = {
        name: (path.parent / name).read_bytes() for name in ("direction.safetensors", "direction.safetensors.json")
    }
    said = {"name": "sentiment-gpt2-medium-l8", "kind": "steering", "license": "research-only"}
    return files | {"bundle_metadata.json": metadata_of(files, **said), "README.md": b"# a card\n"}
