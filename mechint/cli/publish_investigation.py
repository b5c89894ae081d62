"""`mechint publish-investigation`."""

import inspect
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config.publish import PublishInvestigationConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(
        PublishInvestigationConfig,
        argv,
        prog="mechint publish-investigation",
        description=inspect.getdoc(PublishInvestigationConfig),
    )
    from mechint.hub.commands import publish_investigation

    return publish_investigation(config)
