"""What every command shares: exit codes, suggestions, and where prepared data lies."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ali_dist.recipe import UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
        sys.exit(2)


def did_you_mean(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` not among the `known` ones of its kind, with the nearest of them when one is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}known: {', '.join(known)}")


def cache_folder() -> Path:
    """This host's folder for what can be fetched again: $XDG_CACHE_HOME/ali_dist, else ~/.cache/ali_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "ali_dist"


def local_folder(flag: str, value: str) -> Path:
    """The folder on this host that a flag gives; UserError for an address, which would become a folder of that name."""
    if "://" in value:
        raise UserError(f"{flag} must be a folder of this machine, not an address: copy it to the store afterwards")
    return Path(value).expanduser().absolute()


def data_folder(flag_value: str) -> Path | str:
    """The folder or address of prepared shards: the flag's value, else $ALI_DIST_DATA, else ~/.cache/ali_dist."""
    place = flag_value or os.environ.get("ALI_DIST_DATA") or "~/.cache/ali_dist"
    return place if "://" in place else Path(place).expanduser().absolute()
