"""Our metrics against SAELens's evaluation of the same SAE, model and tokens. Runs where SAELens is: `make test-peers`.

SAELens opens the SAE from the folder that a run writes for it, and its own `run_evals` computes what it reports. The
tolerance is 1e-4 relative. What SAELens defines differently is asserted to differ as
docs/metrics.md says.
"""

import importlib.util
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import make_small_run

from mechint.data import open_activations
from mechint.eval import Text, evaluate_texts, texts_from_rows
from mechint.inside import Inside, open_inside

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sae_lens") is None, reason="SAELens is not in this environment: `make test-peers`"
)

CONTEXT = 48
N_TEXTS = 24
# Ours, and where SAELens's report has the same.
SAME = {
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "mse_per_token": ("reconstruction_quality", "mse"),
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "explained_variance_legacy": ("reconstruction_quality", "explained_variance_legacy"),
    "cosine": ("reconstruction_quality", "cossim"),
    "l2_ratio": ("shrinkage", "l2_ratio"),
    "relative_reconstruction_bias": ("shrinkage", "relative_reconstruction_bias"),
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_sae": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_zero": ("model_performance_preservation", "ce_loss_with_ablation"),
    "ce_recovered_zero": ("model_performance_preservation", "ce_loss_score"),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return open_inside(make_small_run(tmp_path_factory.mktemp("peer")).path, device="cpu")


@pytest.fixture(scope="module")
def tokens(subject: Inside) -> torch.Tensor:
    """[N_TEXTS, CONTEXT], BOS first: held-out texts that are long enough, cut to one length, as SAELens has them."""
    assert subject.run is not None
    texts = texts_from_rows(open_activations(subject.run.activations_path()))
    rows = [text.tokens[:CONTEXT] for text in texts if len(text.tokens) >= CONTEXT][:N_TEXTS]
    assert len(rows) == N_TEXTS
    return torch.tensor(rows)


def saelens_sae(subject: Inside) -> Any:
    """The run's SAE as SAELens opens it."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    assert subject.run is not None
    sae = SAE.load_from_disk(str(subject.run.sae_dir))
    assert sae.cfg.metadata.hook_name == subject.hook_name
    return sae


def saelens_evaluation(subject: Inside, tokens: torch.Tensor, *, exclude_special_tokens: bool) -> dict[str, Any]:
    """What SAELens's `run_evals` reports, in one batch: some of its metrics are means over batches."""
    from sae_lens.evals import get_eval_everything_config, run_evals  # pyright: ignore[reportMissingImports]
    from sae_lens.training.activation_scaler import ActivationScaler  # pyright: ignore[reportMissingImports]

    store = SimpleNamespace(
        store_batch_size_prompts=len(tokens),
        context_size=tokens.shape[1],
        get_batch_tokens=lambda _: tokens,
        reset_input_dataset=lambda: None,
    )
    config = get_eval_everything_config(len(tokens), 1, 1)
    found, _ = run_evals(
        saelens_sae(subject),
        store,  # type: ignore[arg-type]
        subject.model.bridge,
        ActivationScaler(),
        config,
        exclude_special_tokens=exclude_special_tokens,
    )
    return found


def saelens_kl(subject: Inside, tokens: torch.Tensor, *, ignore: list[int]) -> dict[str, torch.Tensor]:
    """SAELens's KL at every position."""
    from sae_lens.evals import get_recons_loss  # pyright: ignore[reportMissingImports]
    from sae_lens.training.activation_scaler import ActivationScaler  # pyright: ignore[reportMissingImports]

    return get_recons_loss(
        saelens_sae(subject),
        subject.model.bridge,
        ActivationScaler(),
        tokens,
        compute_kl=True,
        compute_ce_loss=False,
        ignore_tokens=ignore,
    )


def mean_row(subject: Inside, tokens: torch.Tensor, first: int) -> torch.Tensor:
    return subject.model.activations(tokens, subject.hook_name)[:, first:].reshape(-1, subject.sae.d_in).mean(dim=0)


def ours(subject: Inside, tokens: torch.Tensor, first: int) -> dict[str, Any]:
    """`first`: the first position that the SAE's reconstruction is put in at."""
    texts = [Text(row, [position >= first for position in range(len(row))]) for row in tokens.tolist()]
    return evaluate_texts(subject, texts, mean=mean_row(subject, tokens, first), n_resamples=0)


def differences(found: dict[str, Any], report: dict[str, Any], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Ours and theirs, where they are not within 1e-4 of each other."""
    pairs = {name: (found[name], report[SAME[name][0]][SAME[name][1]]) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pytest.approx(pair[1], rel=1e-4)}


@pytest.mark.slow
def test_everything_at_all_positions(subject: Inside, tokens: torch.Tensor) -> None:
    found = ours(subject, tokens, 0)
    report = saelens_evaluation(subject, tokens, exclude_special_tokens=False)
    assert differences(found, report, SAME) == {}
    assert found["with_special"]["fvu"] == found["fvu"] and found["fvu"] > 0
    # KL at the positions whose prediction has a target; SAELens's own mean has the last position of each row in it too.
    kl = {name: value.double() for name, value in saelens_kl(subject, tokens, ignore=[]).items()}
    with_sae, with_zero = (float(kl[name][:, :-1].mean()) for name in ("kl_div_with_sae", "kl_div_with_ablation"))
    assert found["kl_clean_sae"] == pytest.approx(with_sae, rel=1e-4)
    assert found["kl_clean_zero"] == pytest.approx(with_zero, rel=1e-4)
    assert found["kl_score_zero"] == pytest.approx((with_zero - with_sae) / with_zero, rel=1e-4)
    behaviour = report["model_behavior_preservation"]
    assert behaviour["kl_div_with_sae"] == pytest.approx(float(kl["kl_div_with_sae"].mean()), rel=1e-4)
    assert behaviour["kl_div_with_sae"] != pytest.approx(found["kl_clean_sae"], rel=1e-4)


@pytest.mark.slow
def test_without_special_tokens(subject: Inside, tokens: torch.Tensor) -> None:
    found = ours(subject, tokens, 1)
    report = saelens_evaluation(subject, tokens, exclude_special_tokens=True)
    without = found["without_special"]
    same = [name for name in SAME if name not in ("ce_zero", "ce_recovered_zero")]
    assert differences(without, report, same) == {}
    kl = saelens_kl(subject, tokens, ignore=[0])["kl_div_with_sae"].double()
    assert without["kl_clean_sae"] == pytest.approx(float(kl[:, 1:-1].mean()), rel=1e-4)
    # SAELens leaves special tokens out of the splice and of the mean, but zeroes them too in the ablation.
    assert differences(without, report, ["ce_zero"]) != {}
    # A difference of definition, not of numbers: zeroed at the special tokens too, ours is theirs.
    all_positions = ours(subject, tokens, 0)["without_special"]["ce_zero"]
    theirs = report["model_performance_preservation"]["ce_loss_with_ablation"]
    assert all_positions == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_the_check_would_see_a_difference(subject: Inside, tokens: torch.Tensor) -> None:
    """A decoder that is 1 % too large is noticed in every metric that it touches."""
    report = saelens_evaluation(subject, tokens, exclude_special_tokens=True)
    with torch.no_grad():
        subject.sae.W_dec.mul_(1.01)
    try:
        found = ours(subject, tokens, 1)["without_special"]
    finally:
        with torch.no_grad():
            subject.sae.W_dec.div_(1.01)
    names = ("mse_per_token", "explained_variance", "explained_variance_legacy", "l2_ratio", "ce_sae")
    assert differences(found, report, names).keys() == set(names)
