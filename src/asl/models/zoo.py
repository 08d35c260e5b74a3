"""Files of weights that are called by a name: `zoo:NAME` and `hf-hub:OWNER/NAME`.

`zoo:NAME` is `zoo/NAME.safetensors` of this project's clone, whose SHA-256 is in `zoo/SHA256SUMS`.
`hf-hub:OWNER/NAME`, or `hf-hub:OWNER/NAME@REVISION`, is the `model.safetensors` of a repository on
the Hugging Face hub. Its own library fetches it, once, and keeps it.
"""

import hashlib
from functools import cache
from pathlib import Path

from asl.errors import DataError, UsageError

ZOO = Path(__file__).parents[3] / "zoo"
SUMS = "SHA256SUMS"  # as the program sha256sum writes and checks it
HUB_FILE = "model.safetensors"
_ZOO, _HUB = "zoo:", "hf-hub:"


def is_name(path: str | Path) -> bool:
    """Whether `path` names a file of the zoo or of the hub: it is no path then."""
    return str(path).startswith((_ZOO, _HUB))


def local_file(path: str | Path) -> Path:
    """The file that a path or a name stands for. One of the hub is fetched if it is not here.

    Raises `UsageError` for a name that is none, and `DataError` for a file of the zoo that is not
    what was published and for one of the hub that cannot be fetched.
    """
    name = str(path)
    if name.startswith(_ZOO):
        return _of_zoo(name.removeprefix(_ZOO), ZOO)
    if name.startswith(_HUB):
        return _of_hub(name)
    return Path(path)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, or of the one that a name stands for, in hexadecimal digits."""
    with local_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache  # a script reads a checkpoint several times
def _of_zoo(name: str, folder: Path) -> Path:
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except OSError:
        raise UsageError(
            f"zoo:{name} is a file of this project's repository, and the installation at "
            f"{folder.parent} has no zoo/{SUMS}: clone the repository, or give the path of a file"
        ) from None
    sums = {file: digest for digest, file in (line.split() for line in lines)}
    file = f"{name}.safetensors"
    if file not in sums:
        known = ", ".join(Path(each).stem for each in sums)
        raise UsageError(f"there is no zoo:{name}; the zoo has: {known}")
    path = folder / file
    try:
        found = sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if found != sums[file]:
        raise DataError(
            f"{path}: not the file that was published: its SHA-256 is {found}, in {SUMS} stands "
            f"{sums[file]}; get it again, or use a changed file by its path"
        )
    return path


@cache  # each call asks the hub whether the file is still the newest
def _of_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity_error

    repository, _, revision = name.removeprefix(_HUB).partition("@")
    if repository.count("/") != 1:
        raise UsageError(f"{name!r} must be hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION")
    # It would print a line at each of its six tries.
    set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return Path(hf_hub_download(repository, HUB_FILE, revision=revision or None))
    except LocalEntryNotFoundError as error:  # it is an EntryNotFoundError, too
        raise DataError(
            f"{name}: the hub cannot be reached, and the file was not fetched before"
        ) from error
    except EntryNotFoundError as error:
        raise DataError(f"{name}: there is no {HUB_FILE} in that repository") from error
    except Exception as error:  # of the network or of the hub: there are dozens
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{name}: cannot be fetched: {reason}") from error
