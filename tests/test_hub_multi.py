"""Repositories of several checkpoints: the four of the data file to the loopback Hub and back, dry runs, checkpoints
that are not what they should be, files of repositories and flags that are wrong."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dinov3_world import D_SAE, ROOT, SCRIPT, World, chosen_ids, make_world, push, python_blocks, run, run_id
from loopback_card import card_errors
from loopback_collections import Collection
from loopback_hub import LoopbackHub, client_env, closed_endpoint

from mechint.config.publish_sweep import CollectionSpec, PublishSweepConfig, RepoSpec
from mechint.errors import MechintError
from mechint.hub.bundle import StagedFile
from mechint.hub.collections import collection_of
from mechint.hub.metrics_source import read_records
from mechint.hub.multi import Repository, choose, preflight, read_repositories, run_ids_of
from mechint.hub.multi_bundle import bundle_of
from mechint.hub.multi_card import error_text, readme
from mechint.provenance import sha256_file

EXISTING = "osunlp/sae-v-67ab8c4fdf179d117db28195"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("dinov3"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", orgs=("osunlp",)) as hub:
        yield hub


def flat_words(text: str) -> str:
    """Output without the frames of tables and the breaks of lines."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", text).split())


# --- the four repositories --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_repositories_go_up_and_load_back_in_a_new_process(world: World, hub: LoopbackHub, tmp_path: Path):
    before = [{"_id": f"{i:024x}", "id": f"osunlp/old{i}", "type": "model"} for i in range(6)]
    hub.collections[EXISTING] = Collection(EXISTING, "SAE-V", "osunlp", items=list(before))
    env = hub.env(tmp_path / "hf", token=hub.token)
    done = push(world, env, tmp_path)
    assert done.returncode == 0, done.stderr
    specs = world.described["repos"]
    for index, spec in enumerate(specs):
        files = hub.files(spec["repo"])
        chosen = {layer: chosen_ids(index, layer) for layer in spec["layers"]}
        paths = [f"layer_{layer}/{name}/sae.pt" for layer, names in chosen.items() for name in names]
        own = {".gitattributes", "README.md", "manifest.jsonl", "bundle_metadata.json"}
        assert set(files) == {*paths, *own}
        for path in paths:
            source = world.runs / path.split("/")[1] / "checkpoint" / "sae.pt"
            assert files[path] == source.read_bytes(), "the format has a header of its own: it goes up byte for byte"
        rows = [json.loads(line) for line in files["manifest.jsonl"].decode().splitlines()]
        assert [row["path"] for row in rows] == paths
        for row in rows:
            record = world.records[row["run_id"]]
            assert (row["l0"], row["nmse"]) == tuple(
                record["summary"][key] for key in ("eval/l0", "eval/normalized_mse")
            )
            assert row["layer"] == record["config"]["val_data"]["layer"]
            assert row["activation"]["params"]["key"] == spec["activation"]
            assert row["sha256"] == sha256_file(world.runs / row["run_id"] / "checkpoint" / "sae.pt")
            assert row["size"] == len(files[row["path"]])
        card = files["README.md"].decode()
        assert card_errors(card, "model") == ([], []) and "license: mit" in card.split("---")[1]
        first = rows[0]
        line = f"| {first['run_id']} | {first['layer']} | {first['l0']:.1f} | 0.500 | `{first['path']}` |"
        assert "| Run ID | Layer | L0 | NMSE | Path |" in card and line in card
        assert all(f"**{name}:**" in card for name in ("Homepage", "Code", "Preprint", "Demos", "Contact"))
        assert str(world.root) not in "".join(files[name].decode() for name in own)
        # after the upload one checkpoint of the new commit was downloaded and compared
        assert hub.seen("", rf"/{spec['repo']}/resolve/\w+/{paths[-1]}")
        assert f"left out of {spec['repo']}: {run_id(index, spec['layers'][0], 'x')}" in done.stderr
    names = [spec["repo"] for spec in specs]
    assert [item["id"] for item in hub.collections[EXISTING].items] == [*(item["id"] for item in before), *names]
    made = next(c for slug, c in hub.collections.items() if slug != EXISTING)
    # the title of 71 characters is more than a Hub takes: its words are shown, and the short one is used
    assert made.title == "SAEs for Open-Ended Visual Scientific Discovery" and made.owner == "osunlp"
    assert [item["id"] for item in made.items] == names
    assert "(71 characters)" in done.stderr and "less than or equal to" in done.stderr

    heads = [hub.history(name)[0].sha for name in names]
    again = push(world, env, tmp_path)
    assert again.returncode == 0, again.stderr
    assert [hub.history(name)[0].sha for name in names] == heads, "the same content makes no commit"
    assert again.stdout.count("unchanged: ") == 4 and again.stdout.count("(exists), 0 added") == 2
    assert len(hub.collections) == 2

    snippets = [next(b for b in python_blocks(hub.files(n)["README.md"].decode()) if "mechint" in b) for n in names]
    code = "\n".join(f"{snippet}\nprint(isinstance(sae, SAE), sae.cfg.d_in, sae.cfg.d_sae)" for snippet in snippets)
    loaded = run(["-c", code], hub.env(tmp_path / "stranger"), tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split("\n")[:4] == [f"True {spec['d_model']} {D_SAE}" for spec in specs]
    section = (ROOT / "docs" / "publish.md").read_text().split("## Multi-checkpoint repos")[1]
    example = "\n".join(python_blocks(section)[:3]).replace("<run-id>", run_id(2, 23, "6"))
    counted = example + "\nimport pathlib\nprint(best['run_id'], len(list(pathlib.Path(folder).rglob('sae.pt'))))"
    shown = run(["-c", counted], hub.env(tmp_path / "reader"), tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == [run_id(2, 23, "0"), "36"]
    assert not hub.seen("OUTSIDE")


@pytest.mark.slow
def test_a_dry_run_shows_all_of_it_and_touches_no_network(world: World, tmp_path: Path):
    closed = closed_endpoint()
    env = client_env(closed, tmp_path / "hf") | {"WANDB_BASE_URL": closed, "WANDB_API_KEY": "k" * 40, "COLUMNS": "200"}
    env |= {"HTTP_PROXY": closed, "HTTPS_PROXY": closed, "ALL_PROXY": closed, "NO_PROXY": ""}
    code = (
        "import runpy, socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('the network was touched')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = run(["-c", code, str(SCRIPT), *world.flags, "--metrics", str(world.metrics), "--dry-run"], env, tmp_path)
    assert done.returncode == 0, done.stderr
    words = flat_words(done.stdout)
    for line in (
        "mech publish",
        "DRY RUN — no files uploaded",
        "Kind: checkpoints",
        f"Target: {closed}/osunlp/SAE_DINOv3_",
    ):
        assert words.count(line) == 4, line
    assert words.count("Files that would be uploaded Staged name Source path Size README.md (generated)") == 4
    assert "layer_23/l23run06/sae.pt" in words and "manifest.jsonl (generated)" in words
    assert f"existing collection {EXISTING}: would hold osunlp/SAE_DINOv3_ViT-S-16_IN1K" in words
    assert "collection 'Towards Open-Ended Visual Scientific Discovery" in words
    for spec in world.described["repos"]:
        folder = tmp_path / "published" / spec["repo"].replace("/", "--")
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "manifest.jsonl", "selection.png"]
        assert (folder / "selection.png").read_bytes().startswith(b"\x89PNG")
        assert len((folder / "manifest.jsonl").read_text().splitlines()) == 36
    assert not list((tmp_path / "published").rglob("*.pt"))


def test_one_repository_of_several_and_fewer_a_layer(world: World, tmp_path: Path):
    env = client_env(closed_endpoint(), tmp_path / "hf")
    name = "SAE_DINOv3_TopK_ViT-L-16_IN1K"
    done = push(world, env, tmp_path, "--dry-run", "--only", name, "--max-per-layer", "3", "-o", "out")
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "out" / f"osunlp--{name}" / "manifest.jsonl").read_text().splitlines()
    ]
    assert [row["run_id"] for row in rows if row["layer"] == 13] == [run_id(3, 13, which) for which in "036"]
    assert len(rows) == 18 and len(list((tmp_path / "out").iterdir())) == 1


def test_publishing_without_a_token_says_how_to_log_in_before_anything_is_read(
    world: World, hub: LoopbackHub, tmp_path: Path
):
    done = push(world, hub.env(tmp_path / "hf"), tmp_path)
    assert done.returncode == 2 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "published").exists() and not hub.repos


# --- checkpoints that are not what they should be ---------------------------------------------------------------------


@pytest.fixture
def chosen(world: World, tmp_path: Path) -> tuple[Repository, Path]:
    """The repository of ViT-S with two layers' runs in a folder of their own, before the preflight."""
    described = read_repositories(world.repos)
    spec = described.repos[0].with_overrides(layers=(6, 7))
    ids = run_ids_of(spec, world.sweeps)
    runs = tmp_path / "runs"
    for layer in (6, 7):
        for name in chosen_ids(0, layer):
            place = runs / name / "checkpoint"
            place.mkdir(parents=True)
            (place / "sae.pt").write_bytes((world.runs / name / "checkpoint" / "sae.pt").read_bytes())
    records = read_records(world.metrics)
    return choose(spec, ids, records, max_per_layer=6, license="mit", links={}), runs


def rewrite(path: Path, change: Any) -> None:
    """A checkpoint with its first line or tensors changed by `change(header, state)`."""
    with open(path, "rb") as file:
        header = json.loads(file.readline())
        state = torch.load(file, weights_only=True)
    change(header, state)
    with open(path, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)


def test_the_preflight_names_every_checkpoint_that_cannot_go_up(chosen: tuple[Repository, Path], world: World):
    repository, runs = chosen
    assert len(preflight(repository, runs, "checkpoint/sae.pt", progress=False).checkpoints) == 12
    places = [runs / name / "checkpoint" / "sae.pt" for name in chosen_ids(0, 6)]
    places[0].unlink()
    places[1].write_bytes(places[1].read_bytes()[:-400])
    rewrite(places[2], lambda header, state: state["W_dec"].fill_(float("nan")))
    places[3].write_bytes((world.runs / run_id(1, 6, "4") / "checkpoint" / "sae.pt").read_bytes())  # ViT-B's
    (runs / places[4].parent.parent.name / "config.json").write_text(json.dumps({"val_data": {"layer": 9}}))
    with pytest.raises(MechintError) as caught:
        preflight(repository, runs, "checkpoint/sae.pt", progress=False)
    said = str(caught.value)
    assert "5 of 12 checkpoints cannot be published" in said
    for part in (
        "s06run00: ",
        "not found",
        "s06run01: ",
        "s06run02: ",
        "finite",
        "d_model 8, expected 6",
        "layer 9, not 6",
    ):
        assert part in said, part


def test_a_checkpoint_with_another_activation_than_its_run_says_is_refused(
    chosen: tuple[Repository, Path], world: World
):
    repository, runs = chosen

    def as_topk(header: dict, state: dict) -> None:
        header["cfg"]["activation"] = {"cls": "TopK", "params": {"key": "top-k", "top_k": 3}}

    rewrite(runs / run_id(0, 7, "2") / "checkpoint" / "sae.pt", as_topk)
    with pytest.raises(MechintError, match=r"s07run02: .* has the activation top-k, its run says relu"):
        preflight(repository, runs, "checkpoint/sae.pt", progress=False)


def test_a_checkpoint_that_changes_after_the_check_is_not_published(chosen: tuple[Repository, Path]):
    repository, runs = chosen
    ready = preflight(repository, runs, "checkpoint/sae.pt", progress=False)
    bundle = bundle_of(ready)
    staged = {c.path: StagedFile(c.sha256, c.size) for c in ready.checkpoints}
    assert bundle.card("osunlp/x", staged) == readme(ready, "osunlp/x") and "osunlp/x" in bundle.card(
        "osunlp/x", staged
    )
    staged[ready.checkpoints[3].path] = StagedFile("0" * 64, 1)
    with pytest.raises(MechintError, match=r"sae\.pt changed while it was staged"):
        bundle.card("osunlp/x", staged)


def test_links_to_checkpoints_are_followed(chosen: tuple[Repository, Path], tmp_path: Path):
    repository, runs = chosen
    path = runs / run_id(0, 7, "2") / "checkpoint" / "sae.pt"
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    ready = preflight(repository, runs, "checkpoint/sae.pt", progress=False)
    found = next(c for c in ready.checkpoints if c.candidate.run_id == run_id(0, 7, "2"))
    assert found.path == "layer_7/s07run02/sae.pt" and list(found.files.values()) == [tmp_path / "elsewhere.pt"]


def test_nothing_left_to_choose_from_says_why(world: World):
    spec = read_repositories(world.repos).repos[0].with_overrides(activation="batch-top-k")
    ids = run_ids_of(spec, world.sweeps)
    with pytest.raises(MechintError, match=r"none of 49 runs has .*activation batch-top-k.* 49 x activation relu"):
        choose(spec, ids, read_records(world.metrics), max_per_layer=6, license="mit", links={})


def test_a_card_holds_what_it_is_given_as_text(chosen: tuple[Repository, Path]):
    repository, runs = chosen
    ready = preflight(repository, runs, "checkpoint/sae.pt", progress=False)
    spec = ready.spec.with_overrides(title="A | <b>title</b>", description="[x](javascript:1)\n# no heading")
    odd = Repository(
        spec,
        "my own",
        {"a|b": "javascript:alert(1)", "Ok": "https://a.b/c"},
        ready.gathered,
        ready.chosen,
        ready.checkpoints,
    )
    card = readme(odd)
    assert card_errors(card, "model") == ([], []) and "license: other" in card and "license_name: my-own" in card
    assert "<b>" not in card and "\n# no heading" not in card and not re.search(r"(?<!\\)\]\(javascript", card)
    assert "<https://a.b/c>" in card and "<javascript" not in card


def test_errors_as_people_read_them():
    assert [error_text(v) for v in (0.0418, 0.018, 1.25, 0.0051849, 0.0)] == ["0.042", "0.018", "1.250", "0.00518", "0"]


# --- the file of repositories and the flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"repos": []}, "at least one repository"),
        ({"repos": [{"title": "x"}]}, "needs `repo`"),
        ({"repos": [{"repo": "a/b"}]}, "a/b: give sweep_file, or run_ids"),
        ({"repos": [{"repo": "a b", "run_ids": ["x"]}]}, "user/name"),
        ({"repos": [{"repo": "a/b", "run_ids": ["x"], "layer": [1]}]}, "unknown key 'layer'; nearest: layers"),
        ({"repos": [{"repo": "a/b", "run_ids": ["x"]}] * 2}, "same repository"),
        ({"collections": [{"title": "a", "slug": "b/c"}]}, "either a slug"),
        ({"links": {"a": 1}}, "links should be"),
        ({"wandb": "x"}, "unknown key 'wandb'"),
    ],
)
def test_a_file_of_repositories_that_is_wrong(change: dict[str, Any], says: str, world: World, tmp_path: Path):
    path = tmp_path / "repos.json"
    path.write_text(json.dumps({**world.described, **change}))
    with pytest.raises(MechintError, match=re.escape(says)):
        read_repositories(path)


def test_the_data_file_is_that_of_the_plan():
    described = read_repositories(ROOT / "examples" / "dinov3.json")
    assert [(s.repo, s.d_model, s.layers, s.activation) for s in described.repos] == [
        ("osunlp/SAE_DINOv3_ViT-S-16_IN1K", 384, (6, 7, 8, 9, 10, 11), "relu"),
        ("osunlp/SAE_DINOv3_ViT-B-16_IN1K", 768, (6, 7, 8, 9, 10, 11), "relu"),
        ("osunlp/SAE_DINOv3_ViT-L-16_IN1K", 1024, (13, 15, 17, 19, 21, 23), "relu"),
        ("osunlp/SAE_DINOv3_TopK_ViT-L-16_IN1K", 1024, (13, 15, 17, 19, 21, 23), "top-k"),
    ]
    assert {(s.d_sae, s.objective) for s in described.repos} == {(16384, "matryoshka")}
    assert described.settings.license == "mit" and described.repos[3].tables == ("in1k_run_ids",)


@pytest.mark.parametrize("bad", ["../up", "a/b", "..", "", " a", "a\\b"])
def test_a_run_id_that_is_no_plain_name_is_refused(bad: str, tmp_path: Path):
    with pytest.raises(MechintError, match="plain name"):
        run_ids_of(RepoSpec(repo="a/b", run_ids=("fine", bad)), tmp_path)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({}, "give one of"),
        ({"sweep": Path("s"), "repos": Path("r")}, "give one of"),
        ({"sweep": Path("s")}, "--repo USER/NAME"),
        (
            {"sweep": Path("s"), "repo": "a/b", "metrics": Path("m"), "only": ("x",)},
            "--only, --metrics goes with --repos",
        ),
        ({"repos": Path("r"), "repo": "a/b"}, "--repo goes with a sweep's folder"),
        ({"repos": Path("r"), "format": "saev"}, "--format is for a sweep's folder"),
        ({"repos": Path("r"), "max_per_layer": 1}, "at least 2"),
    ],
)
def test_flags_that_do_not_go_together(settings: dict[str, Any], says: str):
    with pytest.raises(MechintError, match=says):
        PublishSweepConfig(**settings)


def test_collections_by_slug_or_title():
    assert collection_of("osunlp/sae-v", "me") == CollectionSpec(slug="osunlp/sae-v")
    assert collection_of("My SAEs", "me") == CollectionSpec(title="My SAEs", namespace="me")
    assert collection_of("SAEs", "me") == CollectionSpec(title="SAEs", namespace="me")
