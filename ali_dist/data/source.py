"""Where a data set comes from: a path that was given, or files to be downloaded first."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ali_dist.data.download import fetch
from ali_dist.data.index import prepare_command
from ali_dist.data.progress import Progress
from ali_dist.data.types import DatasetSpec
from ali_dist.recipe import UserError


def local_source(spec: DatasetSpec, given: str) -> Path | None:
    """The path given as --source, None for a data set without one; UserError when it is not as it should be."""
    if spec.source is None:
        if given:
            raise UserError(f"{spec.name} comes with a library: leave --source out")
        return None
    source = Path(given).expanduser()
    if not source.exists():
        raise UserError(f"--source {source} does not exist: {spec.name} is made from {spec.source}")
    return source


def addresses(spec: DatasetSpec, data: Path, given: str, mirrors: Sequence[str]) -> dict[str, list[str]]:
    """Name of each file that must be downloaded, and where it may be had, in order; none when the source is a path.

    `given`, when it is an address, is that of the archive, or of the folder of all archives where there are several.
    UserError, which says what to fetch by hand, when there is no address.
    """
    if spec.source is None or (given and not _is_address("--source", given)):
        if mirrors:
            raise UserError("--mirror is for what is downloaded: leave it out")
        return {}
    folders = [mirror for mirror in mirrors if _is_address("--mirror", mirror)]
    if len(folders) < len(mirrors):
        raise UserError(f"--mirror {' '.join(mirrors)}: each must begin with http:// or https://")
    names = spec.archives
    if given and len(names) <= 1:
        name = urlsplit(given).path.rpartition("/")[2]
        if not name:
            raise UserError(f"--source {given} must end in the name of a file")
        return {name: [*(f"{folder.rstrip('/')}/{name}" for folder in folders), given]}
    if given or spec.address:
        folders.append(given or spec.address)
    if not folders or not names:
        place = downloads(spec, data)
        command = prepare_command(data, spec.name).replace("PATH", shlex.quote(str(place)))
        raise UserError(
            f"{spec.name} needs --source: fetch {spec.source}, put it into {place} for instance, then run `{command}`"
        )
    return {name: [f"{folder.rstrip('/')}/{name}" for folder in folders] for name in names}


def downloads(spec: DatasetSpec, data: Path) -> Path:
    """The folder of a data set's downloaded files."""
    return (data / "downloads" / spec.name).absolute()


def download(spec: DatasetSpec, data: Path, files: Mapping[str, list[str]]) -> Path:
    """Fetches what is not there yet: the archive's path, or the folder's when there are several."""
    folder = downloads(spec, data)
    for name, urls in files.items():
        if not (folder / name).exists():
            print(f"fetching {name} into {folder}", flush=True)
        fetch(urls, folder / name, spec.md5.get(name), Progress("bytes"))
    return folder / name if len(files) == 1 else folder


def _is_address(flag: str, word: str) -> bool:
    """UserError for an address of another kind."""
    scheme, colon, _ = word.partition("://")
    if colon and scheme not in ("http", "https"):
        raise UserError(f"{flag} {word}: only http:// and https:// can be downloaded from")
    return bool(colon)
