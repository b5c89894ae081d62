"""What a card says of SAELens: it opens the files of a published run, and computes what is computed here."""

import shutil
from pathlib import Path

import pytest
import torch
from hub_material import make_tiny_run

from mechint.hub.bundle import staged
from mechint.hub.sae_bundle import sae_bundle
from mechint.saelens import SAE

sae_lens = pytest.importorskip("sae_lens", reason="peer: `make test-peers` runs it")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_peer_opens_the_bundle_of_a_run(architecture: str, tmp_path: Path):
    run = make_tiny_run(tmp_path, architecture=architecture, latents=False)
    bundle = sae_bundle(run.path)
    with staged(bundle, "me/x") as found:
        assert found.folder is not None
        shutil.copytree(found.folder, tmp_path / "repository")
    card = (tmp_path / "repository" / "README.md").read_text(encoding="utf-8")
    assert "pass its folder to `sae_lens.SAE.load_from_disk`" in card
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path / "repository"), SAE.load_from_disk(tmp_path / "repository")
    x = 4 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert theirs.cfg.architecture() == architecture and theirs.cfg.metadata.hook_name == run.config.hook_name
        torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours(x), rtol=1e-4, atol=1e-4)
