"""`mechint pull USER/REPO`: a published bundle as a folder."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.cli.registry_table import shown
from mechint.config.registry import PullConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(PullConfig, argv, prog="mechint pull")
    from mechint.hub.pull import pull

    done = pull(config.repo, config.output, revision=config.revision)
    for name, size in done.sizes.items():
        print(f"{size:>12}  {'sha256 ok' if name in done.verified else 'as listed'}  {shown(name)}")
    print(f"kind: {shown(done.kind or 'not stated')}")
    print(f"commit: {done.commit}")
    print(f"output: {done.folder}" + ("" if done.changed else "  (was there already)"))
    return 0
