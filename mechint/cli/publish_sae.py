"""`mechint publish-sae`, `scripts/push_run.py`."""

import inspect
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config.publish import PublishSaeConfig, PushRunConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(PublishSaeConfig, argv, prog="mechint publish-sae", description=inspect.getdoc(PublishSaeConfig))
    from mechint.hub.commands import publish_sae

    return publish_sae(config)


@command
def push_run(argv: Sequence[str]) -> int:
    config = parse(PushRunConfig, argv, prog="push_run.py", description=inspect.getdoc(PushRunConfig))
    from mechint.hub.commands import publish_sae

    return publish_sae(PublishSaeConfig.from_dict(config.to_dict()))
