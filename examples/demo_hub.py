"""Publish a run to a Hugging Face Hub on this machine, and load it back as a stranger would: in a fresh process.

    make demo-hub                                        # the newest run of runs/, or a small one that it trains
    python examples/demo_hub.py --run-dir runs/tales-8x

No account and no network: the Hub is tests/loopback_hub.py, which speaks the real protocol to the real client. With an
account, the same commands without HF_ENDPOINT publish to huggingface.co.
"""

import argparse
import os
import shlex
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
site.addsitedir(str(ROOT / "tests"))  # the loopback Hub is a test fixture

USER = "demo"
MODEL, HOOK = "builtin/pythia-tiny", "blocks.3.hook_resid_post"
PROMPT = "Omar was a clever baker who lived in Oslo. So"
# What a stranger types. The rest of the process only writes down what came out, so that it can be compared.
TWO_LINES = """\
from mech_interp.sae.registry import load_pretrained_sae
sae, config = load_pretrained_sae("{repo}")
"""
COMPARE = """
import sys
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[1])["x"]
codes = sae.encode(x)
save_file({"codes": codes.detach(), "decoded": sae.decode(codes).detach()}, sys.argv[2])
for key in ("architecture", "n_features", "input_dim", "hook_site", "model_name", "license", "revision"):
    print(f"{key}: {config[key]}")
"""
VECTOR_LINES = """\
from mech_interp.steering.registry import load_steering_vector
direction, metadata = load_steering_vector("{repo}")
print(tuple(direction.shape), float(direction.norm()), metadata["hook_site"], metadata["license"])
"""


def title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(arguments: list[str], env: dict[str, str], shown: str) -> str:
    """Run a process, show what was typed and what it printed, and return that. Ends the demo if it fails."""
    print(f"$ {shown}", flush=True)
    done = subprocess.run([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True, timeout=900)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"this step ended with status {done.returncode}")
    return done.stdout


def mechint(words: list[str], env: dict[str, str]) -> str:
    """Run a command of mechint."""
    return run(["-m", "mechint", *words], env, f"mechint {shlex.join(words)}")


def find_run(run_dir: Path | None, runs_root: Path, work: Path) -> Path:
    """The run to publish: the given one, the newest finished one, or a small one that is trained here."""
    from mechint.errors import MechintError
    from mechint.runs import latest_run

    if run_dir is not None:
        return run_dir
    try:
        return latest_run(runs_root).path
    except MechintError:
        from small_run import make_small_run

        print(f"no finished run in {runs_root}: training a small one on the built-in world", flush=True)
        return make_small_run(work).path


def write_prompts(folder: Path) -> dict[str, Path]:
    """Sentences about women and about men, one a line; the file of each flag of extract-steering."""
    from mechint.builtin import world

    files = {"--positive": folder / "female.txt", "--negative": folder / "male.txt"}
    for path, names in zip(files.values(), (world.FEMALE_NAMES, world.MALE_NAMES), strict=True):
        path.write_text("".join(f"{name} was a clever baker who lived in Oslo. So\n" for name in names[:24]))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="the run to publish; the newest finished one if not given")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    given = parser.parse_args()

    import torch
    from loopback_hub import LoopbackHub
    from safetensors.torch import load_file, save_file

    from mechint import SAE

    with tempfile.TemporaryDirectory(prefix="demo-hub-") as folder:
        work = Path(folder)
        title("a run to publish")
        run_dir = find_run(given.run_dir, given.runs_root, work)
        local = SAE.load_from_disk(run_dir)
        print(f"{run_dir}: {local.cfg.architecture}, {local.cfg.d_sae} latents of {local.cfg.hook_name}", flush=True)
        repo, vector_repo = f"{USER}/sae-demo", f"{USER}/sv-demo"
        with LoopbackHub(work / "hub", user=USER) as hub:
            # the publisher is logged in; the stranger has no token and an empty cache
            path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
            publisher = hub.env(work / "publisher", token=hub.token) | path
            stranger = hub.env(work / "stranger") | path
            print(f"a Hub on this machine: HF_ENDPOINT={hub.endpoint}", flush=True)

            title("what would be uploaded")
            publish = ["publish-sae", "--run-dir", str(run_dir), "--repo", repo, "--license", "MIT"]
            mechint([*publish, "--dry-run"], publisher)
            title("publish, and once more: the same content makes no second commit")
            mechint(publish, publisher)
            n_commits = len(hub.history(repo))
            mechint(publish, publisher)
            assert len(hub.history(repo)) == n_commits, "the second publish made a commit"

            title("a stranger loads it: a fresh process, no token, an empty cache")
            lines = TWO_LINES.format(repo=repo)
            x = 4 * torch.randn(256, local.cfg.d_in, generator=torch.Generator().manual_seed(0))
            save_file({"x": x}, work / "x.safetensors")
            files = [str(work / "x.safetensors"), str(work / "out.safetensors")]
            started = time.monotonic()
            run(["-c", lines + COMPARE, *files], stranger, "python -c '\n" + lines + "'")
            print(f"{time.monotonic() - started:.1f} s from nothing to an SAE", flush=True)
            theirs = load_file(work / "out.safetensors")
            with torch.no_grad():
                codes = local.encode(x)
                decoded = local.decode(codes)
            for name, ours in (("codes", codes), ("decoded", decoded)):
                difference = float((theirs[name] - ours).norm() / ours.norm())
                print(f"{name}: differ from the local run's by {difference:.1e}, relative", flush=True)
                assert difference < 1e-5, f"{name} differ"

            title("the whole bundle as a folder, every hash checked")
            mechint(["pull", repo, "--output", str(work / "pulled")], stranger)
            mechint(["load-sae", str(work / "pulled")], stranger)

            title("a steering vector of the built-in model: women minus men")
            place = str(work / "vector")
            words = ["--model", MODEL, "--hook", HOOK, "--name", "female-male", "--output", place]
            for flag, name in write_prompts(work).items():
                words += [flag, str(name)]
            mechint(["extract-steering", *words], publisher)
            mechint(["publish-steering", "--vector", place, "--repo", vector_repo], publisher)
            lines = VECTOR_LINES.format(repo=vector_repo)
            run(["-c", lines], stranger, "python -c '\n" + lines + "'")
            words = ["--vector", vector_repo, "--coefficient", "1", "-1", "--max-new-tokens", "24", "--prompt", PROMPT]
            mechint(["apply-steering", *words], stranger)
            outside = hub.seen("OUTSIDE")
            assert not outside, f"something else was asked: {outside[0].path}"
    print("\ndone: published, checked, loaded back; nothing left this machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
