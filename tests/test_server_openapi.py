"""schemathesis against a real server: whatever fits the OpenAPI document (or does not) is answered as it says."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")


from live_server import SAES, Server
from loopback_hub import LoopbackHub
from test_server_api import TOKEN, USER, saelens_folder

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With one SAE in the library, so that there is something to be asked about."""
    folder = tmp_path_factory.mktemp("openapi")
    saelens_folder(folder / "repo" / "layer_6")
    with LoopbackHub(folder, user=USER, token=TOKEN) as hub:
        hub.add_repo("jbloom/GPT2-Small-SAEs", folder / "repo")
        with Server(folder, env=hub.env(folder / "hf"), settings={"IMPORT_ROOTS": str(folder)}, workers=1) as found:
            asked = {"repo_id": "jbloom/GPT2-Small-SAEs", "filepath": "layer_6"}
            found.wait_sae(found.post(f"{SAES}/download", asked).json()["id"])
            yield found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_the_server_is_as_its_document_says(server: Server, tmp_path: Path):
    examples = os.environ.get("MECHINT_TEST_EXAMPLES", "8")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"http://127.0.0.1:{server.port}/api/v1/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--max-examples", examples, "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    command += [
        "--request-timeout",
        "60",
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
        "--warnings",
        "off",
    ]
    done = subprocess.run(command, env=server.env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-2000:]
    log = server.log()
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]
    assert server.is_alive()
