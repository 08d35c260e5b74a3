"""Shards by address, each fetched once into a file, through the readers of the webdataset library.

A stream gives neither exact epochs nor a full shuffle, nor any image at once: these need an index,
and so a file. The folder `shards` of the cache holds

https/HOST/SET/train-000000.tar    a shard, where its address says
sets/4f0c7a91d2e8/train-000000.tar a link to it, among those that were asked for together
"""

import fcntl
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from asl.atomic import replacing
from asl.data.cache import cache_folder
from asl.data.shards import CLASS_LIST
from asl.errors import DataError, UsageError

CHUNK = 2**20
END = bytes(1024)  # of every tar file: two blocks of zeros
# What curl's exit status says, where a user can do something about it.
_CURL = {
    6: "there is no such host",
    7: "the host takes no connections",
    18: "the transfer ended early",
    22: "the server has no such file, or does not give it to us",
    28: "the host does not answer",
    52: "the transfer ended early",
    56: "the connection was lost",
    60: "the host's certificate is not to be trusted",
}
log = logging.getLogger("asl")


class _File(NamedTuple):
    address: str
    place: Path  # where it is fetched to
    name: Path  # from the folder of its set


def is_address(data: str | Path) -> bool:
    """Whether that is the address of something elsewhere, not a path."""
    return re.search(r"://|^(pipe|file):", str(data)) is not None


def fetched(pattern: str) -> Path:
    """The folder of the shards at these addresses, in the layout of `readers.webdataset`.

    A `pattern` has braces, and `::` between several, as `webdataset.shardlists.expand_urls` takes
    them. What is not there yet is fetched, by `webdataset.gopen`, one file after the other. Each
    appears when it is whole, so that a start that was killed is gone on with by the next. Of
    several processes one fetches, the others wait for it. What is there is not looked for again.

    Raises `UsageError` for what is no pattern of shards, and `DataError` that names the address and
    says why where one cannot be fetched, or not written.
    """
    store = cache_folder() / "shards"
    files = _files(pattern, store)
    try:
        for folder in dict.fromkeys(file.place.parent for file in files):
            _fetch(folder, [file for file in files if file.place.parent == folder])
        return _linked(files, store)
    except OSError as error:
        raise DataError(f"cannot write into {store}: {error.strerror or error}") from error


def _files(pattern: str, store: Path) -> list[_File]:
    addresses = _expanded(pattern)
    places = [_place(address) for address in addresses]
    # Shards that lie in several folders are told apart by these, as on a disk.
    folders = {place.parent for place in places if place.name != CLASS_LIST}
    files: dict[Path, _File] = {}
    for address, place in zip(addresses, places, strict=True):
        inner = len(folders) > 1 and place.name != CLASS_LIST
        name = Path(place.parent.name if inner else "", place.name)
        if name in files:
            raise UsageError(f"{address} and {files[name].address} would both be called {name}")
        files[name] = _File(address, store / place, name)
    return list(files.values())


def _expanded(pattern: str) -> list[str]:
    from webdataset.gopen import gopen_schemes, rewrite_url  # here, as it imports torch
    from webdataset.shardlists import expand_urls

    try:
        addresses: list[str] = expand_urls(pattern)
        schemes = [urlsplit(rewrite_url(address)).scheme for address in addresses]
    except (AssertionError, KeyError, ValueError) as error:  # braces; a variable that is not set
        raise UsageError(f"{pattern} is no pattern of addresses: {error}") from None
    known = sorted({*gopen_schemes} - {"__default__", "pipe"})  # a pipe would run a command
    for address, scheme in zip(addresses, schemes, strict=True):
        if scheme not in known:
            raise UsageError(
                f"{address} cannot be fetched, only what begins with {', '.join(known)}: "
                "download it, and name the folder"
            )
        if re.search(r"[{}\[\]\s]", address):
            raise UsageError(
                f"{address}: braces without a comma or dots in them, brackets and blanks mean "
                "something else to curl: write %7B, %7D, %5B, %5D, %20"
            )
    return addresses


def _place(address: str) -> Path:
    """Where a file is kept. Passwords and what stands behind a `?` say how it is got, not what."""
    parts = urlsplit(address)
    place = Path(parts.scheme, parts.netloc.rpartition("@")[2], *parts.path.split("/"))
    if ".." in place.parts or not (place.suffix == ".tar" or place.name == CLASS_LIST):
        raise UsageError(f"{address} is no shard: name NAME.tar, or {CLASS_LIST}, and no ..")
    return place


def _fetch(folder: Path, files: Sequence[_File]) -> None:
    """Fetch what is missing of these files of one folder."""
    if all(file.place.is_file() for file in files):  # the folder may be one that we cannot write
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for left in folder.glob(".*.part"):  # by a process that was killed
            left.unlink()
        missing = [file for file in files if not file.place.is_file()]
        if missing:
            # With the bar, and because stdout and the log are those of rank 0 alone.
            said = f"fetching {len(missing):,} of {len(files):,} files into {folder}"
            print(said, file=sys.stderr, flush=True)
        with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for number, (address, place, _) in enumerate(missing, start=1):
                bar.set_description(f"{place.name}, {number:,} of {len(missing):,}")
                with replacing(place) as out:
                    _copy(address, out, bar, is_tar=place.name != CLASS_LIST)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Own the folder until the block ends, or this process does; others wait as long."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process fetches into %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(address: str, out: BinaryIO, bar: "tqdm[Any]", *, is_tar: bool) -> None:
    from webdataset.gopen import gopen

    try:
        pipe = gopen(address)
    except Exception as error:  # the hub's library has its own, for a file that is not there
        program = error.filename if isinstance(error, FileNotFoundError) else None
        reason = f"{program} is not installed" if program else str(error)
        raise _failed(address, reason) from None
    end = b""
    # The library's own way of reading raises with the whole command, which may hold a token.
    with pipe.proc as process:
        try:
            while chunk := process.stdout.read1(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
                end = (end + chunk[-len(END) :])[-len(END) :]
            process.wait()
        finally:
            process.kill()  # does nothing where it has ended
    if process.returncode:
        program = Path(process.args[0]).name
        why = _CURL.get(process.returncode, "") if program == "curl" else ""
        status = f"{program} ended with status {process.returncode}"
        raise _failed(address, f"{status}: {why}" if why else status)
    # Not every server says how long a file is, and some answer with a page of text.
    if is_tar and end != END:
        raise _failed(address, "what came is no tar file, or only the start of one")


def _failed(address: str, reason: str) -> DataError:
    return DataError(
        f"{address} cannot be fetched: {reason}. What was fetched before it stays: to go on, start "
        "again"
    )


def _linked(files: Sequence[_File], store: Path) -> Path:
    """A folder of links to these files alone. Each process makes all links that it needs."""
    content = "\n".join(sorted(f"{name} {place.relative_to(store)}" for _, place, name in files))
    folder = store / "sets" / hashlib.sha256(os.fsencode(content)).hexdigest()[:12]
    for _, place, name in files:
        link = folder / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                link.symlink_to(os.path.relpath(place, link.parent))
    return folder
