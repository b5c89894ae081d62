"""Directions: their formulas on tensors with known answers, their files, and what they do to the built-in model."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mechint import steering
from mechint.builtin import world
from mechint.errors import MechintError
from mechint.models import LanguageModel, load_model
from mechint.sae import StandardSAE
from mechint.steering import Direction

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("builtin/pythia-tiny", device="cpu")


# --- formulas ---


def test_quality_is_the_sidecars_formula():
    positive, negative = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, -2.0, -2.0, 2.0])
    spread = 1.0 + 3.0**0.5  # population standard deviations: 1 and sqrt(3)
    assert steering.extraction_quality(positive, negative) == pytest.approx((2 - -1) / (spread + 1e-8), rel=1e-12)
    assert steering.extraction_quality(torch.tensor([1.0]), torch.tensor([0.0])) == pytest.approx(1e8)


def test_mean_difference_is_exact_and_a_direction_has_unit_norm():
    positive, negative = torch.tensor([[3.0, 1.0], [1.0, 5.0]]), torch.tensor([[-1.0, -1.0]])
    raw = steering.mean_difference(positive, negative)
    assert raw.tolist() == [3.0, 4.0]
    direction = steering.make_direction(raw, name="x")
    assert direction.info == {"name": "x", "hidden_dim": 2, "direction_norm": 5.0}
    torch.testing.assert_close(direction.vector, torch.tensor([0.6, 0.8]))
    for bad in (torch.zeros(3), torch.tensor([1.0, float("nan")])):
        with pytest.raises(MechintError, match="has no direction"):
            steering.make_direction(bad)


def test_probe_looks_past_what_both_classes_share():
    """Class noise along e1 is large: the difference of means follows it by chance, the probe does not."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 8, generator=generator) * torch.tensor([0.05] + [30.0] + [1.0] * 6)
    positive, negative = noise[:100].clone(), noise[100:].clone()
    positive[:, 0] += 1
    negative[:, 0] -= 1
    truth = torch.eye(8)[0]
    probe = steering.make_direction(steering.probe_weights(positive, negative)).vector
    mean = steering.make_direction(steering.mean_difference(positive, negative)).vector
    assert float(probe @ truth) > 0.95 > float(mean @ truth)
    assert steering.extraction_quality(positive @ probe, negative @ probe) > 5
    # in other units of activation the probe is the same
    raw = steering.probe_weights(positive, negative)
    torch.testing.assert_close(steering.probe_weights(positive * 100, negative * 100) * 100, raw, rtol=1e-3, atol=1e-3)
    with pytest.raises(MechintError, match="same activation"):
        steering.probe_weights(torch.ones(3, 4), torch.ones(3, 4))


@pytest.mark.parametrize("method", ["mean-difference", "probe"])
def test_heldout_accuracy_knows_chance_where_quality_does_not(method: str):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 200, generator=generator)  # no difference at all, in a wide space
    positive, negative = x[:20], x[20:]
    raw = steering.mean_difference(positive, negative) if method != "probe" else None
    if raw is not None:
        assert steering.extraction_quality(positive @ raw, negative @ raw) > 1.5
    assert steering.heldout_accuracy(positive, negative, method=method) < 0.75
    apart = positive + 4 * torch.eye(200)[0]
    assert steering.heldout_accuracy(apart + 1, negative - 1, method=method) == 1.0
    assert steering.heldout_accuracy(positive[:1], negative, method=method) is None
    # the cut is fair to a small class: nine in ten are positive, and nothing tells them apart
    assert steering.heldout_accuracy(x[:36], x[36:], method=method) < 0.85


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.floats(-50, 50), st.integers(0, 2**31 - 1))
def test_edits_do_what_they_say_at_the_hook(d_in: int, value: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, d_in, generator=generator) * 20
    unit = steering.make_direction(torch.randn(d_in, generator=generator)).vector
    clamped = steering.clamp_direction(unit, value)(x)
    torch.testing.assert_close(clamped @ unit, torch.full((2, 3), value), atol=2e-4, rtol=1e-4)
    rest = x - (x @ unit)[..., None] * unit
    torch.testing.assert_close(clamped - value * unit, rest, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(steering.ablate_direction(unit)(x), rest, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(steering.add_direction(unit, value)(x), x + value * unit)
    half = x.bfloat16()
    assert steering.clamp_direction(unit, value)(half).dtype == torch.bfloat16
    torch.testing.assert_close(
        steering.clamp_direction(unit, value)(half).float(), steering.clamp_direction(unit, value)(half.float()),
        atol=1e-2, rtol=1e-2,
    )  # fmt: skip


def test_a_latent_is_clamped_and_removed_by_its_own_activation():
    torch.manual_seed(0)
    sae = StandardSAE(6, 10)
    x = torch.randn(2, 4, 6)
    acts = sae.encode(x)
    assert 0 < int((acts[..., 3] > 0).sum()) < 8
    with torch.no_grad():
        contribution = acts[..., 3, None] * sae.W_dec[3]
        torch.testing.assert_close(steering.ablate_latent(sae, 3)(x), x - contribution)
        silent = acts[..., 3] == 0
        assert torch.equal(steering.ablate_latent(sae, 3)(x)[silent], x[silent])
        clamped = steering.clamp_latent(sae, 3, 7.0)(x)
        torch.testing.assert_close(clamped, x - contribution + 7.0 * sae.W_dec[3])
    for wrong in (-1, 10):
        with pytest.raises(MechintError, match=f"latent {wrong} does not exist: the SAE has 10"):
            steering.clamp_latent(sae, wrong, 1.0)


# --- from prompts ---


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_prompt_activations_are_hidden_states(model, prepend_bos: bool):
    """Batched and padded or not, in the given order; the mean leaves BOS out."""
    prompts = ["Rome", "The capital of France is Paris.", "Anna lives in Oslo", "The dog is big and brown"]
    last = steering.prompt_activations(model, prompts, HOOK, prepend_bos=prepend_bos, batch_size=2)
    mean = steering.prompt_activations(model, prompts, HOOK, prepend_bos=prepend_bos, token="mean")
    norms = []
    for i, prompt in enumerate(prompts):
        ids = [model.bos_token_id] * prepend_bos + model.tokenizer(prompt).input_ids
        with torch.no_grad():
            hidden = model.hf_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0]
        own = hidden[int(prepend_bos) :]
        torch.testing.assert_close(last.vectors[i], own[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mean.vectors[i], own.mean(0), atol=1e-4, rtol=1e-4)
        norms += own.norm(dim=-1).tolist()
    assert last.mean_norm == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def one_token(model, names):
    return [name for name in names if len(model.tokenizer(" " + name).input_ids) == 1]


@pytest.fixture(scope="module")
def people(model) -> dict[str, list[str]]:
    """Sentences after which the model says she or he; names, jobs and places of the first 24 and the rest differ."""
    jobs, towns = [job.name for job in world.JOBS], [country.capital for country in world.COUNTRIES]
    found = {}
    for sex, names, shift in (("female", world.FEMALE_NAMES, 0), ("male", world.MALE_NAMES, 7)):
        found[sex] = [
            f"{name} was a clever {jobs[(i + shift) % 50]} who lived in {towns[(3 * i + shift) % len(towns)]}. So"
            for i, name in enumerate(one_token(model, names)[:34])
        ]
    return found


@pytest.fixture(scope="module", params=["mean-difference", "probe"])
def gender(request, model, people) -> Direction:
    train = [people[sex][:24] for sex in ("female", "male")]
    return steering.direction_from_prompts(model, HOOK, *train, classes=("female", "male"), method=request.param)


def she_he(model, prompts, edit) -> torch.Tensor:
    """Probability of " she" and of " he" next, mean over the prompts."""
    words = [model.tokenizer(word).input_ids[0] for word in (" she", " he")]
    rows = [steering.next_log_probs(model, prompt, HOOK, [edit])[0, words] for prompt in prompts]
    return torch.stack(rows).exp().mean(0)


def test_a_direction_turns_she_into_he_and_back(model, people, gender):
    """Measured on names, jobs and places that the direction has not seen."""
    women, men = people["female"][24:], people["male"][24:]
    unit = gender.info["mean_activation_norm"]
    effect = {c: steering.add_direction(gender.vector, c * unit) for c in (-0.5, 0.5)}
    before_women, before_men = she_he(model, women, None), she_he(model, men, None)
    assert before_women[0] > 0.5 > 0.05 > before_women[1]
    assert before_men[1] > 0.5 > 0.05 > before_men[0]
    he, she = she_he(model, women, effect[-0.5]), she_he(model, men, effect[0.5])
    assert he[1] > 0.4 and he[0] < 0.15, he
    assert she[0] > 0.4 and she[1] < 0.15, she
    # with the sign that a sentence has already, nothing turns
    assert she_he(model, women, effect[0.5])[1] < 0.05
    assert she_he(model, men, effect[-0.5])[0] < 0.05


def test_random_directions_of_the_same_length_turn_nothing(model, people, gender):
    generator = torch.Generator().manual_seed(0)
    unit = gender.info["mean_activation_norm"]
    turned = []
    for _ in range(4):
        other = steering.make_direction(torch.randn(gender.d_in, generator=generator)).vector
        turned.append(float(she_he(model, people["female"][24:], steering.add_direction(other, -0.5 * unit))[1]))
    assert sum(turned) / 4 < 0.1


def test_ablating_and_clamping_take_the_difference_out(model, people, gender):
    """log p(she) - log p(he) between women and men: the gap shrinks; clamped to the other side it turns over."""
    women, men = people["female"][24:], people["male"][24:]

    def gap(edit_women, edit_men) -> float:
        w, m = she_he(model, women, edit_women).log(), she_he(model, men, edit_men).log()
        return float((w[0] - w[1]) - (m[0] - m[1]))

    clean = gap(None, None)
    ablate = steering.ablate_direction(gender.vector)
    assert clean > 8
    assert abs(gap(ablate, ablate)) < clean / 3
    sides = gender.info["mean_projections"]
    assert sides["female"] > sides["male"]
    swap = [steering.clamp_direction(gender.vector, 2 * sides[other]) for other in ("male", "female")]
    assert gap(*swap) < 0


def test_the_sidecar_tells_of_its_prompts(gender, model, people):
    info = gender.info
    assert float(gender.vector.norm()) == pytest.approx(1, abs=1e-6) and gender.vector.dtype == torch.float32
    x = [steering.prompt_activations(model, people[sex][:24], HOOK).vectors @ gender.vector for sex in people]
    assert info["extraction_quality"] == pytest.approx(steering.extraction_quality(*x), rel=1e-4)
    assert info["extraction_quality"] > 2 and info["heldout_accuracy"] > 0.9
    assert info["female_prompt_count"] == info["male_prompt_count"] == 24
    assert info["mean_projections"] == pytest.approx({"female": float(x[0].mean()), "male": float(x[1].mean())}, 1e-4)
    assert (info["model"], info["hook_site"], info["hidden_dim"]) == ("builtin/pythia-tiny", HOOK, 128)
    assert (info["processing"], info["prepend_bos"], info["token"]) == ("raw", True, "last")
    if info["source"] == "mean-difference":
        raw = steering.mean_difference(
            *(steering.prompt_activations(model, people[sex][:24], HOOK).vectors for sex in people)
        )
        assert info["direction_norm"] == pytest.approx(float(raw.norm()), rel=1e-5)


def test_sets_that_make_no_direction(model):
    def make(positive, negative, **more):
        return steering.direction_from_prompts(model, HOOK, positive, negative, **more)

    for arguments, message in [
        (([], ["b"]), "the positive prompts are empty"),
        ((["a"], []), "the negative prompts are empty"),
        ((["a", "b"], ["b"]), "1 prompts are in both sets, such as 'b'"),
        ((["a", ""], ["b"]), "the prompt '' has no tokens"),
    ]:
        with pytest.raises(MechintError, match=message):
            make(*arguments)
    with pytest.raises(MechintError, match="both classes are called 'x'"):
        make(["a"], ["b"], classes=("x", "x"))
    with pytest.raises(MechintError, match="nearest: probe"):
        make(["a"], ["b"], method="prob")
    with pytest.raises(MechintError, match="--token 'first' is not known; valid: last, mean"):
        make(["a"], ["b"], token="first")
    with pytest.raises(MechintError, match="has 6 layers"):
        steering.prompt_activations(model, ["a"], "blocks.6.hook_resid_post")
    # the same last token after the same words: no difference where the hook is before attention
    with pytest.raises(MechintError, match="has no direction"):
        steering.direction_from_prompts(model, "blocks.0.hook_resid_pre", ["red is"], ["blue is"])


# --- files ---


@pytest.fixture
def direction() -> Direction:
    torch.manual_seed(0)
    info = {"name": "x-y", "model": "builtin/pythia-tiny", "hook_site": HOOK, "extraction_quality": 1.5}
    return steering.make_direction(torch.randn(128), **info, processing="raw", prepend_bos=True, x_prompt_count=3)


def test_files_are_as_the_readers_of_others_expect(direction, tmp_path):
    path = steering.save_direction(direction, tmp_path / "x-y")
    assert path == tmp_path / "x-y" / "direction.safetensors"
    assert sorted(p.name for p in path.parent.iterdir()) == ["direction.safetensors", "direction.safetensors.json"]
    tensors = load_file(path)
    assert list(tensors) == ["direction"] and tensors["direction"].dtype == torch.float32
    assert tensors["direction"].shape == (128,) and float(tensors["direction"].norm()) == pytest.approx(1, abs=1e-6)
    sidecar = json.loads((path.parent / "direction.safetensors.json").read_text())
    assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {k: v for k, v in sidecar.items() if k != "sha256"} == direction.info
    for place in (path, path.parent):
        loaded = steering.load_direction(place)
        torch.testing.assert_close(loaded.vector, direction.vector)
        assert loaded.info == sidecar and loaded.name == "x-y"
    with pytest.raises(MechintError, match="exists: give another --output"):
        steering.save_direction(direction, path)
    other = steering.make_direction(-direction.vector, name="other")
    steering.save_direction(other, path, overwrite=True)
    assert steering.load_direction(path).name == "other"
    assert float(steering.load_direction(path).vector @ direction.vector) == pytest.approx(-1)


def test_a_file_without_sidecar_opens(direction, tmp_path):
    save_file({"direction": direction.vector.half()}, tmp_path / "mine.safetensors")
    loaded = steering.load_direction(tmp_path / "mine.safetensors")
    assert loaded.info == {} and loaded.vector.dtype == torch.float32
    assert float(loaded.vector.norm()) == pytest.approx(1, abs=1e-6)


def test_broken_files_are_named(direction, tmp_path):
    path = steering.save_direction(direction, tmp_path / "good")

    def broken(message: str, name: str = "bad.safetensors", **tensors) -> None:
        if tensors:
            save_file(tensors, tmp_path / name)
        with pytest.raises(MechintError, match=message):
            steering.load_direction(tmp_path / name)

    broken("direction not found: .*extract-steering", "nowhere")
    broken("has no key 'direction'; it has other", other=torch.ones(3))
    broken(r"one float vector, found float32 \[1, 128\]", direction=direction.vector[None])
    broken(r"one float vector, found int64 \[3\]", direction=torch.ones(3, dtype=torch.int64))
    broken("has norm 2, expected 1", direction=2 * direction.vector)
    broken("has norm nan, expected 1", direction=torch.full((4,), float("nan")))
    (tmp_path / "bad.safetensors").write_bytes(path.read_bytes()[:-40])
    broken("cannot be read as safetensors")
    torch.save({"direction": direction.vector}, tmp_path / "direction.pt")
    broken("is no .safetensors file: .*pickles are not opened", "direction.pt")
    torch.save({"direction": direction.vector}, tmp_path / "bad.safetensors")
    broken("cannot be read as safetensors")
    save_file({"direction": -direction.vector}, path)
    with pytest.raises(MechintError, match="belongs to another direction"):
        steering.load_direction(path)
    steering.sidecar_path(path).write_text('{"hidden_dim": 64}')
    with pytest.raises(MechintError, match="hidden_dim 64, but direction.safetensors is 128 wide"):
        steering.load_direction(path)
    steering.sidecar_path(path).write_text("{")
    with pytest.raises(MechintError, match="sidecar .* cannot be read"):
        steering.load_direction(path)


def test_a_direction_is_held_against_the_model(model, direction):
    steering.check_direction(direction, model, HOOK)
    narrow = steering.make_direction(torch.ones(64), name="narrow")
    with pytest.raises(MechintError, match="narrow is 64 wide, but blocks.3.hook_resid_post .*tiny is 128 wide"):
        steering.check_direction(narrow, model, HOOK)
    centred = dataclasses.replace(direction, info={**direction.info, "processing": "centred"})
    with pytest.raises(MechintError, match="extracted from centred activations, .* processing raw"):
        steering.check_direction(centred, model, HOOK)


# --- texts ---


def test_steered_texts_and_their_numbers(model, people, gender):
    unit = gender.info["mean_activation_norm"]
    edits = {"none": steering.add_direction(gender.vector, 0.0), "add": steering.add_direction(gender.vector, unit / 2)}
    prompts = people["male"][30:32]
    found = steering.steer(model, prompts, HOOK, edits, max_new_tokens=8)
    assert [[one.setting for one in row] for row in found] == [["baseline", "none", "add"]] * 2
    for prompt, (baseline, none, steered) in zip(prompts, found, strict=True):
        assert baseline.prompt == prompt and baseline.text == none.text
        assert baseline.text.startswith(" he") and steered.text.startswith(" she")
        assert baseline.next_kl == 0 and none.next_kl < 1e-6 and steered.next_kl > 1
        ids = model.tokenize([prompt], prepend_bos=True)[0]
        log_probs = model.logits(torch.tensor([ids + list(steered.tokens)]))[0].log_softmax(-1)
        told = [-float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(steered.tokens)]
        assert steered.nll == pytest.approx(sum(told) / 8, rel=1e-4)
        assert steered.nll > baseline.nll
    new = steering.steer(model, prompts, HOOK, edits, max_new_tokens=8, positions="new")
    assert [row[0].text for row in new] == [row[0].text for row in found]
    # the last position alone is edited less, so it moves the prediction otherwise than the whole prompt does
    assert all(0.1 < one[2].next_kl != both[2].next_kl for one, both in zip(new, found, strict=True))
    with pytest.raises(MechintError, match="no prompts"):
        steering.steer(model, [], HOOK, edits)


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_where_an_edit_acts(model, prepend_bos: bool):
    """Never on BOS; "new" begins with the position that the first new token is predicted from."""
    prompt = "Anna lives in Oslo"
    n = len(model.tokenize([prompt], prepend_bos=prepend_bos)[0])
    for positions, expected in (("all", n - prepend_bos), ("new", 1)):
        widths: list[int] = []

        def look(x: torch.Tensor, widths=widths) -> torch.Tensor:
            widths.append(x.shape[1])
            return x

        places = dict(positions=positions, prepend_bos=prepend_bos)
        steering.steer(model, [prompt], HOOK, {"look": look}, max_new_tokens=3, **places)
        assert widths == [expected, 1, 1, expected]  # three tokens, then the numbers of the first one
        steering.next_log_probs(model, prompt, HOOK, [look], **places)
        assert widths[-1] == expected


def test_texts_stand_beside_each_other():
    rows = [
        steering.Steered("A\x1b[31m prompt", "baseline", " one two\nthree four five six", (1,), 0.0, 0.5),
        steering.Steered("A\x1b[31m prompt", "add 0.5", "", (), 1.25, None),
    ]
    page = steering.beside(rows, width=61)
    lines = page.splitlines()
    assert lines[0] == "prompt: A\\x1b[31m prompt"
    assert lines[1] == "baseline".ljust(29) + " | add 0.5"
    assert lines[2] == "0.50 nats/token".ljust(29) + " | no text, next-token KL 1.25"
    assert lines[3] == "-" * 29 + " | " + "-" * 29
    assert lines[4] == "one two ⏎ three four five six".ljust(29) + " | (nothing)"
    assert "\x1b" not in page
    stacked = steering.beside(rows, width=40).splitlines()  # no room for two columns of 28
    assert stacked[1] == "[baseline] 0.50 nats/token" and stacked[-1] == "  (nothing)"
    assert steering.beside(rows, width=61, layout="stacked").splitlines()[1] == stacked[1]
