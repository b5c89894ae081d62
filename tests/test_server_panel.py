"""The panel in a real browser: a real server and worker, and a Hub on the loopback address.

Needs Chromium (`apt-get install chromium`) and the playwright package; MECHINT_REQUIRE_BROWSER=1 makes their absence a
failure, which is what CI sets.
"""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser import FAINT, NAMELESS, WIDE, Visitor, chromium, expect
from safetensors.torch import load_file

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from live_server import SAES, Server, wait_until
from serving import SlowHub
from small_run import make_small_run
from test_server_api import TOKEN, USER, saelens_folder

from mechint.config import ReportConfig
from mechint.report.html import make_report
from mechint.runs import Run
from mechint.server import library
from mechint.server.models import SharedSAE, utc_now
from mechint.server.settings import settings_from

pytestmark = pytest.mark.slow

REPO, PRIVATE, HOSTILE_REPO = "jbloom/GPT2-Small-SAEs", f"{USER}/private-saes", "jbloom/hostile"
BAD = "<img src=x onerror=window.hacked=1>"
LONG = "a-very-long-name-without-any-blank-in-it-" * 5
KEY = "a-key-of-more-than-sixteen-characters"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlowHub]:
    folder = tmp_path_factory.mktemp("hub")
    for layer in (1, 6, 10):  # of 6 MB, so that a download can be stopped in the middle
        saelens_folder(folder / "repo" / f"layer_{layer}", layer=layer, seed=layer, d_sae=1024)
    (folder / "repo" / "README.md").write_text("# SAEs\n\nSAEs trained on GPT-2 Small\n")
    saelens_folder(folder / "bad" / BAD, layer=2)
    (folder / "bad" / "README.md").write_text(f"# Bad\n\nSAEs of {BAD.replace('<', '&lt;')} and {BAD[1:]}\n")
    with SlowHub(folder, user=USER, token=TOKEN) as found:
        found.add_repo(REPO, folder / "repo")
        found.add_repo(PRIVATE, folder / "repo", private=True)
        found.add_repo(HOSTILE_REPO, folder / "bad")
        yield found


@pytest.fixture(scope="module")
def server(hub: SlowHub, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a worker, a run with its report, and a run that is not finished."""
    folder = tmp_path_factory.mktemp("server")
    run = make_small_run(folder)
    make_report(ReportConfig(runs=(run.path,), figures=False, device="cpu"))
    unfinished = run.path.with_name("unfinished")
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((run.path / "config.json").read_bytes())
    # the server's own login must not stand in for a token that a test leaves out
    with Server(folder, env=hub.env(folder / "hf"), settings={"SHARE_HUB_TOKEN": "0"}, workers=1) as found:
        yield found


@pytest.fixture
def visitor(browser: Any, server: Server, hub: SlowHub) -> Iterator[Visitor]:
    """At an empty library."""
    hub.gate.set()
    hub.body_speed = None
    empty(server)
    found = Visitor(browser, site(server))
    yield found
    hub.gate.set()
    found.context.close()


def site(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def empty(server: Server) -> None:
    while listed := server.get(f"{SAES}?limit=100").json()["data"]:
        server.post(f"{SAES}/delete", {"sae_ids": [sae["id"] for sae in listed]})
    wait_until(lambda: not server.get(f"{SAES}/jobs?live=true").json(), "cancelled jobs to end", server)


def downloaded(server: Server, path: str = "layer_6", **more: Any) -> dict[str, Any]:
    reply = server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": path, **more})
    assert reply.status == 202, reply.text
    return server.wait_sae(reply.json()["id"])


def add_rows(server: Server, rows: list[SharedSAE]) -> None:
    """SAEs that are said to be there, for pages that only list them."""
    service = library.open_service(settings_from(server.env))
    with service.db.write() as session:
        session.add_all(rows)
    service.db.close()


def follow(link: Any) -> None:
    """Click what leads to another page, and wait until that is there with its script."""
    with link.page.expect_navigation():
        link.click()


def names(page: Any) -> list[str]:
    return page.locator("ul.saes h2").all_inner_texts()


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_a_person_downloads_an_sae_browses_it_uploads_it_and_deletes_it(visitor: Visitor, server: Server, hub: SlowHub):
    page = visitor.open("/")
    expect(page.get_by_role("heading", name="The library is empty")).to_be_visible()
    follow(page.get_by_role("main").get_by_role("link", name="Download from the Hub").first)

    # look into the repository
    page.get_by_label("Repository").fill(REPO)
    page.get_by_label("Repository").press("Enter")
    expect(page.get_by_role("heading", name=REPO)).to_be_focused()
    preview = page.locator("#preview")
    expect(preview).to_contain_text("SAEs trained on GPT-2 Small")
    expect(preview).to_contain_text("gpt2")
    assert preview.locator("#paths .mono").all_inner_texts() == ["layer_1", "layer_6", "layer_10"]
    expect(preview.locator("#paths li").nth(1)).to_contain_text("6.3\u00a0MB")

    # download, and watch it without loading the page again
    hub.body_speed = 700_000
    page.get_by_label("layer_6").check()
    page.get_by_label("Name").fill("My layer six")
    page.get_by_role("button", name="Download", exact=True).click()
    page.wait_for_url(site(server) + "/")
    page.evaluate("window.stayed = true")
    row = page.locator("li.sae")
    expect(row.get_by_role("heading")).to_have_text("My layer six")
    expect(row.locator(".badge")).to_have_text("Downloading")
    expect(row.locator(".worktext")).to_have_text(re.compile(r"Downloading: [\d.]+% · [\d.]+\sMB of 6\.3\sMB"))
    assert 0 < row.get_by_role("progressbar", name="Progress of My layer six").evaluate("bar => bar.value") < 90
    assert row.get_by_role("button", name="Upload").count() == 0
    hub.body_speed = None
    expect(row.locator(".badge")).to_have_text("Ready")
    expect(row.locator(".work")).to_be_hidden()
    expect(row).to_contain_text("gpt2, layer 6, residual")
    expect(row).to_contain_text("1,024 features · d_model 768 · standard · 6.3\u00a0MB")
    expect(page.locator("#said")).to_have_text("My layer six: ready")
    assert page.evaluate("window.stayed")
    [sae] = server.get(SAES).json()["data"]
    assert sae["hf_filepath"] == "layer_6" and sae["status"] == "ready"

    # browse it
    follow(row.get_by_role("link", name="My layer six"))
    expect(page.locator(".stats")).to_contain_text("blocks.6.hook_resid_pre")
    expect(page.locator("#about")).to_contain_text("Both were run on the same")
    assert page.get_by_role("link", name="On Neuronpedia").get_attribute("href").endswith("/gpt2-small/6-res-jb")
    page.get_by_label("Search its features").fill("17")
    follow(page.get_by_role("button", name="Browse features"))
    expect(page.locator("table.features tbody tr")).to_have_count(1)
    follow(page.get_by_role("link", name="17", exact=True))
    expect(page.get_by_role("heading", name="Feature 17")).to_be_visible()
    assert page.locator(".relatives li").count() == 8

    # upload it again
    follow(page.get_by_role("link", name="My layer six"))
    page.get_by_role("button", name="Upload My layer six").click()
    dialog = page.get_by_role("dialog", name="Upload My layer six")
    assert dialog.get_by_label("Folder in it").input_value() == "saes/my-layer-six"
    dialog.get_by_label("Repository", exact=True).fill(f"{USER}/shared")
    dialog.get_by_label("Commit message").fill("From the panel")
    dialog.get_by_label("Create the repository").check()
    dialog.get_by_role("button", name="Upload", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("An upload needs a token")
    expect(dialog.get_by_role("alert")).to_contain_text("What to do: provide access_token.")
    dialog.get_by_label("Access token").fill(TOKEN)
    dialog.get_by_role("button", name="Upload", exact=True).click()
    link = dialog.get_by_role("link")
    expect(link).to_have_attribute("href", f"{hub.endpoint}/{USER}/shared/tree/main/saes/my-layer-six")
    assert dialog.get_by_label("Access token").input_value() == ""
    files = hub.files(f"{USER}/shared")
    assert hub.history(f"{USER}/shared")[0].title == "From the panel"
    original = server.data_dir / "saes" / sae["id"] / "original" / "sae_weights.safetensors"
    sent = original.with_name("sent.safetensors")
    sent.write_bytes(files["saes/my-layer-six/sae_weights.safetensors"])
    tensors, before = load_file(sent), load_file(original)
    assert all((tensors[name] == before[name]).all() for name in before)
    sent.unlink()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    shared = f"{hub.endpoint}/{USER}/shared/tree/main/saes/my-layer-six"
    expect(page.locator("#jobs a")).to_have_attribute("href", shared)

    # delete it: only after a confirmation that says which, and how large
    follow(page.get_by_role("link", name="Library").first)
    row.get_by_role("button", name="Delete My layer six").click()
    dialog = page.get_by_role("dialog", name="Delete My layer six?")
    expect(dialog).to_contain_text("Delete its files too (6.3\u00a0MB)")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(row.get_by_role("button", name="Delete My layer six")).to_be_focused()
    assert server.sae(sae["id"])["status"] == "ready"
    row.get_by_role("button", name="Delete My layer six").click()
    dialog.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("heading", name="The library is empty")).to_be_visible()
    assert server.get(f"{SAES}/{sae['id']}").status == 404
    assert not (server.data_dir / "saes" / sae["id"]).exists()
    assert TOKEN not in server.log()
    visitor.check(refusals=True)


def test_the_files_can_be_kept(visitor: Visitor, server: Server):
    sae = downloaded(server)
    page = visitor.open(f"/saes/{sae['id']}")
    page.get_by_role("button", name="Delete").click()
    page.get_by_label("Keep its files").check()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_url(site(server) + "/")
    assert server.get(f"{SAES}/{sae['id']}").status == 404
    assert (server.data_dir / "saes" / sae["id"] / "original").is_dir()
    visitor.check()


def test_a_private_repository_needs_its_token_which_stays_nowhere(visitor: Visitor, server: Server):
    page = visitor.open("/add")
    page.get_by_label("Repository").fill(PRIVATE)
    page.get_by_role("button", name="Preview").click()
    problem = page.locator("#preview-problem")
    expect(problem).to_contain_text(f"Repository not found: {PRIVATE}")
    expect(problem).to_contain_text("What to do: check repo_id, provide access_token.")
    page.locator("#token").fill(TOKEN)
    page.get_by_role("button", name="Preview").click()
    expect(page.get_by_role("heading", name=PRIVATE)).to_be_visible()
    expect(problem).to_be_hidden()
    assert page.locator("#token").input_value() == "" and TOKEN not in page.content() and TOKEN not in page.url
    for path in ("layer_1", "layer_6"):
        page.get_by_label(f"{path} 6.3").check()
    expect(page.get_by_role("textbox", name="Name")).to_be_disabled()
    page.locator("#download-token").fill(TOKEN)
    page.get_by_role("button", name="Download", exact=True).click()
    page.wait_for_url(site(server) + "/")
    expect(page.locator(".badge", has_text="Ready")).to_have_count(2)
    assert sorted(names(page)) == ["private-saes layer_1", "private-saes layer_6"]
    kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]")
    assert kept == ["{}", "{}", ""]
    assert all(TOKEN not in url for url in visitor.asked)
    visitor.check(refusals=True)


def test_failures_are_told_with_their_names_and_remedies(visitor: Visitor, server: Server, hub: SlowHub):
    page = visitor.open("/add")
    page.get_by_label("Repository").fill("jbloom/nothing-there")
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#preview-problem")).to_contain_text("Repository not found: jbloom/nothing-there")
    hub.fail_next(10, 429, match="/api/models/", headers={"Retry-After": "7"})
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#preview-problem")).to_contain_text("Rate limit exceeded")
    expect(page.locator("#preview-problem")).to_contain_text("wait 7 seconds and retry, use access_token")
    hub._failures.clear()
    page.get_by_label("Repository").fill(REPO)
    page.get_by_role("button", name="Preview").click()
    page.get_by_role("button", name="Download", exact=True).click()
    expect(page.locator("#preview").get_by_role("alert")).to_contain_text("No SAE is chosen")
    page.get_by_label("layer_6").check()
    page.get_by_label("Model").fill("gpt2-xl")
    page.get_by_role("button", name="Download", exact=True).click()
    page.wait_for_url(site(server) + "/")
    why = page.locator("li.sae .why")
    expect(why).to_contain_text("Dimension mismatch: the SAE has d_model 768, gpt2-xl has 1600")
    expect(why).to_contain_text("verify model_name matches SAE")
    expect(page.locator("li.sae .badge")).to_have_text("Error")
    visitor.check(refusals=True)


def test_a_download_is_cancelled_and_tried_again(visitor: Visitor, server: Server, hub: SlowHub):
    hub.gate.clear()
    server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_6", "name": "Six"})
    page = visitor.open("/")
    row = page.locator("li.sae")
    expect(row.locator(".worktext")).to_contain_text("Downloading")
    row.get_by_role("button", name="Cancel the work on Six").click()
    hub.gate.set()
    expect(row.locator(".badge")).to_have_text("Error")
    expect(row.locator(".why")).to_have_text("Cancelled")
    row.get_by_role("button", name="Retry Six").click()
    page.get_by_role("dialog", name="Try Six again").get_by_role("button", name="Try again").click()
    expect(row.locator(".badge")).to_have_text("Ready")
    assert row.get_by_role("button", name="Retry").count() == 0
    visitor.check()


def test_an_upload_is_seen_on_its_row_to_its_end(visitor: Visitor, server: Server, hub: SlowHub):
    reply = server.post(f"{SAES}/import/training", {"training_id": "small", "name": "Tales"}).json()
    sae_id = reply["sae_ids"][0]
    server.wait_sae(sae_id)
    page = visitor.open("/")
    row = page.locator("li.sae")
    asked = {"sae_id": sae_id, "repo_id": f"{USER}/missing", "filepath": "tales", "access_token": TOKEN}
    server.post(f"{SAES}/upload", asked)
    expect(row.locator(".why")).to_contain_text(f"The last upload failed. Repository not found: {USER}/missing")
    expect(row.locator(".badge")).to_have_text("Ready")
    hub.gate.clear()
    server.post(f"{SAES}/upload", asked | {"create_repo": True})
    expect(row.locator(".badge")).to_have_text("Uploading")
    expect(row.locator(".worktext")).to_contain_text("Uploading")
    assert row.get_by_role("progressbar").evaluate("bar => bar.value") >= 50
    expect(row.locator(".work")).to_have_attribute("data-channel", "upload")
    page.reload()  # who comes late sees it too
    expect(row.locator(".badge")).to_have_text("Uploading")
    expect(row.get_by_role("button", name="Upload Tales")).to_be_disabled()
    hub.gate.set()
    expect(row.locator(".badge")).to_have_text("Ready")
    expect(page.locator("#said")).to_have_text("Tales: uploaded")
    expect(row.get_by_role("button", name="Upload Tales")).to_be_enabled()
    assert row.locator(".why").count() == 0
    visitor.check()


@pytest.mark.skipif(find_spec("mechint.hub") is None, reason="without mechint.hub no bundles are made")
def test_an_sae_is_published_as_a_repository_of_its_own(visitor: Visitor, server: Server, hub: SlowHub):
    reply = server.post(f"{SAES}/import/training", {"training_id": "small", "name": "Tales"}).json()
    server.wait_sae(reply["sae_ids"][0])
    page = visitor.open("/")
    page.get_by_role("button", name="Upload Tales").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("A repository of its own").check()
    expect(dialog.get_by_label("Folder in it")).to_be_hidden()
    dialog.get_by_role("textbox", name="Repository").fill(f"{USER}/tales")
    dialog.get_by_label("Access token").fill(TOKEN)
    dialog.get_by_label("Create the repository").check()
    dialog.get_by_role("button", name="Upload", exact=True).click()
    expect(dialog.get_by_role("link")).to_have_attribute("href", re.compile(f"/{USER}/tales"))
    assert {"README.md", "cfg.json", "sae_weights.safetensors"} <= hub.files(f"{USER}/tales").keys()
    visitor.check()


# --- live, by whatever way there is -----------------------------------------------------------------------------------


def test_a_lost_connection_comes_back(visitor: Visitor, server: Server, hub: SlowHub):
    opened = []

    def first_ones_end(socket: Any) -> None:
        opened.append(socket)
        if len(opened) < 3:
            socket.close()
        else:
            socket.connect_to_server()

    visitor.page.route_web_socket(re.compile("/ws$"), first_ones_end)
    hub.gate.clear()
    server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_6"})
    page = visitor.open("/")
    wait = page.locator("#connection")
    expect(wait).to_have_text("Not connected; trying again")
    expect(wait).to_have_text("")
    hub.gate.set()
    expect(page.locator("li.sae .badge")).to_have_text("Ready")
    assert len(opened) >= 3


def test_without_a_websocket_the_page_asks_again(visitor: Visitor, server: Server, hub: SlowHub):
    visitor.context.add_init_script(
        "window.WebSocket = class { static OPEN = 1; constructor() { setTimeout(() => this.onclose(), 10); } };"
    )
    hub.gate.clear()
    server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_6"})
    page = visitor.open("/")
    row = page.locator("li.sae")
    expect(row.locator(".worktext")).to_contain_text("of 6.3")
    page.evaluate("window.stayed = true")
    hub.gate.set()
    expect(row.locator(".badge")).to_have_text("Ready")
    assert page.evaluate("window.stayed")
    visitor.check()


# --- the list ---------------------------------------------------------------------------------------------------------


def test_search_filters_order_and_pages(visitor: Visitor, server: Server):
    add_rows(
        server,
        [
            SharedSAE(name=f"SAE {i:02}", source="local" if i % 3 else "trained", status="ready" if i < 40 else "error",
                model_name="gpt2" if i % 2 else "pythia-70m", n_features=512 + i, sae_metadata={},
                error_message="Config file not found: x" if i >= 40 else None)
            for i in range(60)
        ],
    )  # fmt: skip
    page = visitor.open("/?sort=name")
    assert names(page) == [f"SAE {i:02}" for i in range(25)]
    expect(page.locator("#total")).to_have_text("60 SAEs")
    page.evaluate("window.stayed = true")
    page.get_by_label("Search").press_sequentially("pythia", delay=20)
    expect(page.locator("#total")).to_have_text("30 SAEs of 60")
    assert page.evaluate("location.search") == "?q=pythia&sort=name"
    expect(page.get_by_label("Search")).to_be_focused()
    page.get_by_label("Status").select_option("error")
    expect(page.locator("#total")).to_have_text("10 SAEs of 60")
    assert names(page) == [f"SAE {i}" for i in range(40, 60, 2)]
    assert page.evaluate("window.stayed")
    page.get_by_label("Search").fill("no such name")
    expect(page.get_by_role("heading", name="Nothing fits")).to_be_visible()
    follow(page.get_by_role("link", name="Show all 60"))
    page.get_by_label("Order").select_option("features")
    expect(page.locator("li.sae h2").first).to_have_text("SAE 59")
    follow(page.get_by_role("link", name="Next"))
    assert names(page)[0] == "SAE 34" and page.url.endswith("page=2")
    follow(page.get_by_role("link", name="Next"))
    assert len(names(page)) == 10
    visitor.open("/?page=99&source=trained")
    expect(page.locator("#total")).to_have_text("20 SAEs of 60")
    assert len(names(page)) == 20
    visitor.check()


def test_parts_that_did_not_change_stay_when_the_page_is_asked_for_again(visitor: Visitor, server: Server):
    """A click on a part that is replaced between press and release would be lost."""
    add_rows(server, [SharedSAE(name="One", source="local", status="ready", model_name="gpt2", sae_metadata={})])
    page = visitor.open("/")
    page.evaluate("for (const part of document.querySelectorAll('[data-swap]')) part.stayed = true")
    kept = "[...document.querySelectorAll('[data-swap]')].map((part) => Boolean(part.stayed))"
    before = page.evaluate(kept)
    assert before and all(before)
    page.evaluate("refresh()")  # resolves when the parts are in place
    assert page.evaluate(kept) == before
    add_rows(server, [SharedSAE(name="Two", source="local", status="ready", model_name="gpt2", sae_metadata={})])
    page.evaluate("refresh()")
    assert sorted(names(page)) == ["One", "Two"] and not all(page.evaluate(kept))


def test_all_of_it_is_read_without_a_script(visitor: Visitor, server: Server, browser: Any):
    sae = downloaded(server, name="Six")
    downloaded(server, "layer_1", name="One")
    reader = Visitor(browser, site(server), script=False)
    page = reader.open("/")
    page.get_by_label("Search").fill("six")
    with page.expect_navigation():
        page.get_by_label("Search").press("Enter")
    assert names(page) == ["Six"] and "q=six" in page.url
    follow(page.get_by_role("link", name="Six"))
    follow(page.get_by_role("link", name="Features", exact=True))
    page.get_by_label("Order").select_option("density")
    follow(page.get_by_role("button", name="Show"))
    assert page.locator("table.features tbody th").first.inner_text() == "1023"  # fires most often, says its file
    follow(page.get_by_role("link", name="Compare", exact=True))
    page.get_by_label("With").select_option(label="One (gpt2, layer 1, residual)")
    follow(page.get_by_role("button", name="Compare"))
    expect(page.get_by_role("heading", name="Most alike")).to_be_visible()
    reader.open("/add")
    page.locator("#token").fill(TOKEN)
    page.get_by_label("Repository").fill(REPO)
    follow(page.get_by_role("button", name="Preview"))
    expect(page.get_by_role("heading", name=REPO)).to_be_visible()
    assert all(TOKEN not in url for url in reader.asked)
    reader.open("/import")
    expect(page.locator("#runs")).to_contain_text("small")
    assert sae["status"] == "ready"
    reader.check()


# --- runs, features, comparisons --------------------------------------------------------------------------------------


def test_runs_are_imported_and_their_features_read(visitor: Visitor, server: Server):
    page = visitor.open("/import")
    expect(page.locator("#runs li", has_text="unfinished")).to_contain_text("Not finished")
    expect(page.get_by_text("has allowed no folders")).to_be_visible()
    line = page.locator("#runs li", has_text="small")
    page.get_by_role("button", name="Import small").click()
    link = line.get_by_role("link", name="Imported as small")
    expect(link).to_be_visible()
    follow(link)
    expect(page.locator("#status .badge")).to_have_text("Ready")
    expect(page.get_by_role("link", name="Compare with another SAE")).to_be_visible()
    report = page.get_by_role("link", name="Report of its training run").get_attribute("href")
    assert server.get(report).status == 200

    follow(page.get_by_role("link", name="Features", exact=True))
    expect(page.locator("#features")).to_contain_text("512 features")
    shares = page.locator("table.features tbody td:nth-child(4)").all_inner_texts()
    shares = [float(text.strip().rstrip("%")) for text in shares]
    assert len(shares) == 50 and shares == sorted(shares, reverse=True)
    token = page.locator("table.features .token").first.inner_text().strip()
    page.get_by_label("Search").press_sequentially(token, delay=20)
    expect(page.locator("#features > p")).to_have_text(re.compile(r"\d+ features? of 512"))
    # the search finds the word inside of others, too
    exact = page.locator(".token", has_text=re.compile(rf"^\s*{re.escape(token)}\s*$"))
    row = page.locator("table.features tbody tr", has=exact).first
    commonest = {text.strip() for text in row.locator(".token").all_inner_texts()}
    follow(row.locator("a").first)
    contexts = page.locator("ol.contexts li")
    expect(contexts).to_have_count(10)
    # the row names the commonest tokens of twenty contexts, of which the page shows the first ten
    assert commonest & {text.strip() for text in page.locator(".contexts .here").all_inner_texts()}
    assert page.locator(".logits li").count() == 20 and page.locator("svg.bars rect").count() > 3
    visitor.open("/saes/sae_000000000000")
    expect(page.get_by_role("heading", name="SAE not found: sae_000000000000")).to_be_visible()
    visitor.check(refusals=True)


def test_without_the_analysis_the_page_says_which_command_makes_it(visitor: Visitor, server: Server):
    reply = server.post(f"{SAES}/import/training", {"training_id": "small"}).json()
    sae = server.wait_sae(reply["sae_ids"][0])
    record = Run(server.runs_root / "small").path / "latents.json"
    record.rename(record.with_suffix(".away"))
    page = visitor.open(f"/saes/{sae['id']}/features")
    shown = page.get_by_role("main").inner_text()
    record.with_suffix(".away").rename(record)
    assert "mechint report small" in shown
    assert "Unknown" not in visitor.open(f"/saes/{sae['id']}/features/3").get_by_role("main").inner_text()
    page = visitor.open(f"/saes/{sae['id']}/compare")
    expect(page.get_by_role("heading", name="Nothing to compare with")).to_be_visible()
    visitor.check()


def test_a_sweep_is_imported_member_by_member(visitor: Visitor, server: Server):
    import shutil

    sweep = server.runs_root / "grid"
    for name in ("first", "second"):
        shutil.copytree(server.runs_root / "small", sweep / name)
    (sweep / "sweep.json").write_text(json.dumps({"members": [{"name": "first"}, {"name": "second"}]}))
    try:
        page = visitor.open("/import?q=grid")
        details = page.locator("#runs details")
        if details.get_attribute("open") is None:
            page.locator("#runs summary").click()
        page.get_by_role("button", name="Import grid/first").click()
        expect(page.get_by_role("link", name="Imported as first")).to_be_visible()
        expect(page.get_by_role("button", name="Import grid/second")).to_be_visible()
        assert page.get_by_role("button", name="that are not here").count() == 0
        [sae] = server.get(SAES).json()["data"]
        server.wait_sae(sae["id"])
    finally:
        empty(server)
        shutil.rmtree(sweep)
    visitor.check()


def test_a_file_is_imported_from_an_allowed_folder(browser: Any, hub: SlowHub, tmp_path: Path):
    saelens_folder(tmp_path / "files" / "mine", layer=3)
    settings = {"IMPORT_ROOTS": str(tmp_path / "files")}
    with Server(tmp_path / "server", env=hub.env(tmp_path / "hf"), settings=settings, workers=1) as server:
        visitor = Visitor(browser, site(server))
        page = visitor.open("/import")
        expect(page.locator("#runs")).to_contain_text("There are no runs yet")
        page.get_by_label("Path on the server").fill("/etc/passwd")
        page.get_by_label("Name").fill("Mine")
        page.get_by_role("button", name="Import", exact=True).click()
        expect(page.get_by_role("main").get_by_role("alert")).to_contain_text("File not found: /etc/passwd")
        page.get_by_label("Path on the server").fill(str(tmp_path / "files" / "mine"))
        page.get_by_role("button", name="Import", exact=True).click()
        expect(page.get_by_role("heading", name="Mine")).to_be_visible()
        expect(page.locator("#status .badge")).to_have_text("Ready")
        visitor.check(refusals=True)


# --- for everyone -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(server: Server, hub: SlowHub) -> list[str]:
    """A library with everything in it, long and hostile names too: the addresses of its pages."""
    hub.gate.set()
    empty(server)
    run = server.post(f"{SAES}/import/training", {"training_id": "small", "name": BAD, "description": BAD}).json()
    first, second = downloaded(server), downloaded(server, "layer_10", name=LONG, description=f"{LONG}\n{BAD}")
    hostile = server.post(f"{SAES}/download", {"repo_id": HOSTILE_REPO, "filepath": BAD}).json()
    server.post(f"{SAES}/download", {"repo_id": "jbloom/none", "filepath": BAD, "name": BAD})
    trained = server.wait_sae(run["sae_ids"][0])["id"]
    server.wait_sae(hostile["id"])
    going = SharedSAE(name="Going", source="huggingface", hf_repo_id=REPO, status="downloading", progress=40.0,
                sae_metadata={}, created_at=utc_now())  # fmt: skip
    add_rows(server, [going])
    places = ["/", "/?q=nothing+at+all", f"/add?repo_id={REPO}", f"/add?repo_id={HOSTILE_REPO}", "/add?repo_id=a/none"]
    places += ["/import", "/login", f"/saes/{first['id']}", f"/saes/{second['id']}", f"/saes/{hostile['id']}"]
    places += [f"/saes/{trained}", f"/saes/{trained}/features", f"/saes/{trained}/features/5", "/saes/nothing"]
    return [*places, f"/saes/{first['id']}/compare?with={second['id']}", f"/saes/{first['id']}/compare?with={trained}"]


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")])
def test_every_page_fits_and_can_be_read_and_runs_nothing(
    browser: Any, server: Server, full: list[str], width: int, scheme: str
):
    visitor = Visitor(browser, site(server), width=width, scheme=scheme)
    for place in full:
        page = visitor.open(place)
        page.wait_for_selector("html[data-ready=yes]")
        assert page.evaluate(WIDE) <= 0, place
        assert page.evaluate(FAINT) == [], place
        assert page.evaluate(NAMELESS) == [], place
        assert page.evaluate("window.hacked") is None, place
        assert page.locator("main img, main iframe, main script, main [style]").count() == 0, place
        assert page.locator("h1").count() == 1 and page.title().endswith("· mechint"), place
    visitor.open("/")
    for act in ("upload", "delete"):
        page.locator(f"[data-act=open-{act}]").first.click()
        assert page.evaluate(WIDE) <= 0 and page.evaluate(FAINT) == []
        page.keyboard.press("Escape")
    visitor.check(refusals=True)


def test_the_keyboard_is_enough(browser: Any, server: Server, full: list[str]):
    visitor = Visitor(browser, site(server))
    page = visitor.open("/")
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        here = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();"
            " return [e.textContent.trim().split('\\n')[0] || e.id, s.outlineStyle, r.top, r.height]; })()"
        )
        assert here[1] != "none" and here[3] > 0, here
        seen.append(here[0])
    assert seen[:6] == ["Skip to the content", "mechint", "Library", "Download", "Import", "Download from the Hub"]
    assert seen[7] == "q"
    upload = page.locator("[data-act=open-upload]").first
    upload.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(upload).to_be_focused()
    visitor.check()


def test_signing_in_and_out(browser: Any, hub: SlowHub, tmp_path: Path):
    with Server(
        tmp_path / "server", env=hub.env(tmp_path / "hf"), settings={"API_KEY": KEY}, workers=1,
        headers={"Authorization": f"Bearer {KEY}"},
    ) as server:  # fmt: skip
        visitor = Visitor(browser, site(server))
        page = visitor.open("/")
        assert page.url.endswith("/login")
        page.get_by_label("API key").fill("this-is-another-key")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("main").get_by_role("alert")).to_contain_text("This is not the server's API key")
        assert page.get_by_label("API key").input_value() == ""
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="The library is empty")).to_be_visible()
        server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_6", "name": "Six"})
        visitor.open("/")
        expect(page.locator("li.sae .badge")).to_have_text("Ready")
        page.get_by_role("button", name="Delete Six").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
        expect(page.get_by_role("heading", name="The library is empty")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        visitor.open("/import")
        assert page.url.endswith("/login")
        visitor.check(refusals=True)


def test_what_the_pages_say_to_browsers(server: Server):
    empty(server)  # of names that look like what is looked for
    reply = server.get("/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy and reply.headers["x-frame-options"]
    assert reply.headers["cache-control"] == "no-store"
    assert not re.search(r"<script(?! src=\"/static/)|\sstyle=|\son[a-z]+=|https?://(?!127)", reply.text)
    assert server.get("/static/../pages.py").status == 404 and server.get("/static/%2e%2e/pages.py").status == 404
    for path in ("report.css", "panel.css", "panel.js", "icon.svg"):
        assert server.get(f"/static/{path}").status == 200, path
    assert server.get("/nothing-here").json()["code"] == "not_found"
    shown = server.get("/nothing-here", headers={"Accept": "text/html,*/*"})
    assert shown.status == 404 and "There is no such page" in shown.text
    refused = server.post("/add/preview", {"repo_id": REPO}, headers={"Origin": "http://evil.example"})
    assert refused.status == 403
