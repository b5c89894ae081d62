"""`mechint publish-all`."""

import inspect
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config.publish import PublishAllConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(PublishAllConfig, argv, prog="mechint publish-all", description=inspect.getdoc(PublishAllConfig))
    from mechint.hub.commands import publish_all

    return publish_all(config)
