"""`mechint serve`: the sharing service with its workers."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config.serve import ServeConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ServeConfig, argv, prog="mechint serve")
    from mechint.errors import MechintError

    try:
        from mechint.server.embedded import serve, settings_of
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mechint"):
            raise
        raise MechintError(f"{error.name} is missing: pip install 'mechint[server]'") from None
    return serve(settings_of(config), config.workers)
