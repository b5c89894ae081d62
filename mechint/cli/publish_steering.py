"""`mechint publish-steering`."""

import inspect
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config.publish import PublishSteeringConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(
        PublishSteeringConfig, argv, prog="mechint publish-steering", description=inspect.getdoc(PublishSteeringConfig)
    )
    from mechint.hub.commands import publish_steering

    return publish_steering(config)
