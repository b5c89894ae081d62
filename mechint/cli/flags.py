"""From a config class to flags, and from an error to one line with exit status 2."""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from mechint.config import Config
from mechint.errors import DISK_FULL_ERRNOS, REFUSED_ERRNOS, MechintError, nearest, one_line

ConfigT = TypeVar("ConfigT", bound=Config)


def parse(
    cls: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    presets: Callable[[str, str | None], dict[str, Any]] | None = None,
    config_file: bool = False,
    description: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> ConfigT:
    """Flags over preset over `--config` JSON over `defaults` over the class's own. `--help` prints and ends all.

    `presets` gives the settings of a preset for an architecture (None: not said). `config_file` adds a `--config` flag
    that names a JSON file of settings.

    Raises:
        MechintError: unknown, missing or unusable flags, and what the config class itself refuses.
    """
    argv = _with_values(cls, [_from_home(word) for word in argv])
    default: Any = tyro.MISSING_NONPROP
    if config_file or presets:
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        early.add_argument("--config")
        early.add_argument("--preset")
        early.add_argument("--architecture")
        try:
            known, rest = early.parse_known_args(argv)
        except argparse.ArgumentError as error:
            raise MechintError(f"{one_line(error)}; `{prog} --help` explains the flags") from None
        base: dict[str, Any] = dict(defaults or {})
        if config_file and known.config is not None:
            base |= _read_settings(Path(known.config))
            early_too = {"--preset": known.preset, "--architecture": known.architecture}
            argv = [*rest, *(word for flag in early_too.items() if flag[1] is not None for word in flag)]
        if presets and known.architecture is not None and "architecture" in cls.field_names():
            base["architecture"] = known.architecture
        if presets and known.preset is not None:
            with contextlib.suppress(KeyError):  # an unknown name is for the parser to refuse
                base = {**base, "preset": known.preset, **presets(known.preset, base.get("architecture"))}
        default = cls.from_dict(base, source=known.config or "settings")
    text = description or cls.__doc__
    if config_file:
        text = f"{text}\n\nSettings can also come from --config FILE.json; flags win over it."
    kwargs: dict[str, Any] = {} if default is tyro.MISSING_NONPROP else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(cls, prog=prog, description=text, args=argv, return_unknown_args=True, **kwargs)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise MechintError(f"{_without_box(said.getvalue())}; `{prog} --help` explains the flags") from None
    if unknown:
        word = unknown[0].split("=", 1)[0]
        flags = ["--" + name.replace("_", "-") for name in (*cls.field_names(), *cls.aliases())]
        what = (
            f"unknown flag {word}; {nearest(word, flags)}" if word.startswith("-") else f"{word!r} belongs to no flag"
        )
        raise MechintError(f"{what}; `{prog} --help` explains the flags")
    given = {word.split("=", 1)[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    superseded = cls.superseded(given, dataclasses.asdict(config))
    return (dataclasses.replace(config, **dict.fromkeys(superseded)) if superseded else config).canonical()


def _from_home(word: str) -> str:
    """A word or `--flag=value` with a leading `~` replaced by the home folder, which shells leave after `=`."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value) if value.startswith(("~/", "~\\")) else word


def _with_values(cls: type[Config], argv: Sequence[str]) -> list[str]:
    """`argv` with `--x` and `--no-x` spelled as `--x True` and `--x False` for flags that may also be left open."""
    open_flags = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(cls) if _plain(f.type) == (bool | None)}
    found: list[str] = []
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag = word.replace("_", "-")
        negated = flag.replace("--no-", "--", 1) if flag.startswith("--no-") else None
        if negated in open_flags:
            found += [negated, "False"]
        elif flag in open_flags and after not in ("True", "False", "None"):
            found += [flag, "True"]
        else:
            found.append(word)
    return found


def _plain(kind: Any) -> Any:
    """A field's type without what `Annotated` says of its flag."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _without_box(text: str) -> str:
    """What tyro says in a drawn box, in one line: the complaint, without the help of the flags that it is about."""
    rows = [row.strip("│").rstrip() for row in text.splitlines()[1:]]  # the first one is a title
    ruler = re.compile(r"[ ─╰╯-]*")
    body = list(itertools.takewhile(lambda row: not ruler.fullmatch(row), itertools.dropwhile(ruler.fullmatch, rows)))
    # in a list of missing flags, their names are indented by 4 and their help by 8, beside the frame
    missing = [match[1] for row in body if (match := re.fullmatch(r" {5,6}(\S.*)", row))]
    if missing:
        return "missing: " + ", ".join(missing)
    return one_line(" ".join(body)).rstrip(".")


def _read_settings(path: Path) -> dict[str, Any]:
    from mechint.provenance import read_json

    return read_json(path, "config file")


# A process that leaves its error to the first one waits this long: torchrun ends all others as soon as one has ended.
SILENT_SECONDS = 3.0


def is_first_process() -> bool:
    """Whether this process is the one of a `torchrun` that prints; true without it."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is wrong with a command line is wrong in every process of a `torchrun`: the first one says it."""
    try:
        yield
    except MechintError:
        if is_first_process():
            raise
        time.sleep(SILENT_SECONDS)
        raise SystemExit(2) from None


def split_flags(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of the command line without the flags of these names and their values, and those."""
    others: list[str] = []
    found: list[str] = []
    into = others
    for word in argv:
        if word.startswith("--"):
            name = word[2:].split("=", 1)[0].replace("-", "_")
            into = found if name in names or name.removeprefix("no_") in names else others
        into.append(word)
    return others, found


def settings_file(argv: Sequence[str]) -> dict[str, Any]:
    """What the JSON file of `--config` says; nothing if none is given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    known, _ = early.parse_known_args([_from_home(word) for word in argv])
    return {} if known.config is None else _read_settings(Path(known.config))


def flag_given(argv: Sequence[str], *flags: str) -> bool:
    """Whether one of the flags stands on the command line, as `--flag value` or `--flag=value`."""
    return any(word.split("=", 1)[0].replace("_", "-") in flags for word in argv)


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Make `main(argv)` a command: `argv` defaults to the process's, a user's mistake is one line and status 2, Ctrl-C
    is status 130 and a closed pipe is quiet."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else list(argv)) or 0
        except MechintError as error:
            print(f"error: {one_line(error, limit=1000)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if is_first_process():
                print("stopped by Ctrl-C", file=sys.stderr)
            return 130
        except BrokenPipeError:
            sys.stderr.close()
            return 141
        except OSError as error:  # what the checks did not foresee; other errnos are our own mistakes
            if error.errno not in DISK_FULL_ERRNOS | REFUSED_ERRNOS:
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}; make room there, or give another place", file=sys.stderr)
            return 2

    return wrapped


def print_json(value: Any) -> None:
    """Print JSON as the files of a run directory hold it."""
    print(json.dumps(value, indent=2, sort_keys=True))
