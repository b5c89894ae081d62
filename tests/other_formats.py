"""Random SAEs and their files in the formats of other tools, for the tests of those formats."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint.formats import FORMATS, reference_decode, reference_encode
from mechint.formats.folds import variants
from mechint.sae import SAE

# Of those whose files are tested in common: all but the layouts that mechint.sae opens itself.
OTHERS = tuple(sorted(FORMATS.keys() - {"mechint", "saelens", "saelens_pre6"}))


def make(architecture: str, d_in: int = 5, d_sae: int = 7, seed: int = 0, **settings: Any) -> SAE:
    """A random SAE; thresholds differ from each other and are above 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": draw(d_in, d_sae), "W_dec": draw(d_sae, d_in), "b_dec": draw(d_in)}
    names = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}.get(architecture, ("b_enc",))
    tensors |= {name: draw(d_sae) for name in names}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs() * 0.3
    options = {"k": int(torch.randint(1, d_sae + 1, (), generator=generator))} if architecture == "topk" else {}
    if architecture != "topk":
        settings.pop("relu", None)
    metadata = {"hook_name": "blocks.3.hook_resid_post", "model_name": "a/model", "processing": "raw"}
    return SAE.from_tensors(architecture, tensors, "a test", metadata=metadata, **options, **settings)


def write(name: str, loaded: SAE, folder: Path) -> Path:
    """Where it was written."""
    form = FORMATS[name]
    path = folder / (form.file_name or "out")
    assert form.write is not None
    form.write(loaded, path)
    return path


def read(name: str, path: Path) -> SAE:
    form = FORMATS[name]
    assert form.read is not None
    return form.read(path)


def codes(loaded: SAE, n: int = 64, seed: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """`(x, feature_acts, reconstructions)` of random inputs, in float64."""
    x = 2 * torch.randn(n, loaded.d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = reference_encode(loaded, x)
    return x, f, reference_decode(loaded, f, x)


def main_file(path: Path) -> Path:
    """The file with the weights."""
    return path if path.is_file() else max(path.iterdir(), key=lambda file: (file.suffix != ".json", file.name))


def example_of(name: str) -> SAE:
    """A random SAE of the first kind that a format can hold."""
    for architecture in ("standard", "topk", "jumprelu", "gated"):
        for relu in (True, False):
            for found, _ in variants(make(architecture, relu=relu)):
                if FORMATS[name].holds(found) is None:
                    return found
    raise AssertionError(f"{name} holds none of the architectures")


def linear_state(seed: int = 0, d_in: int = 5, d_sae: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "encoder.weight": torch.randn(d_sae, d_in),
        "encoder.bias": torch.randn(d_sae),
        "decoder.weight": torch.randn(d_in, d_sae),
    }


def any_file(name: str, folder: Path) -> Path:
    return write(name, example_of(name), folder)
