"""File access: no other module of the package opens, lists, renames or locks files.

A place is a local path, or a `gs://`, `s3://` or `az://` URI that `etils.epath` opens through fsspec. An object store
has no rename, no append and no lock: objects are written whole, and exist or not. Every function documents its
guarantees on a disk and in an object store.

Other modules use a `Path` for its names (`folder / "config.json"`, `.name`, `.suffix`) and pass it to these functions.
"""

import contextlib
import errno
import fcntl
import importlib.util
import io
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath

Path = pathlib.PurePath  # used by other modules to join and split names, never to open files
Place = str | os.PathLike[str]

SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # of URIs, and the package that opens them
PARTIAL = ".partial"  # suffix of a file that is being written
WHOLE, PART = ".whole", ".part"  # objects of lines: all lines up to here, further lines


# --- Names ------------------------------------------------------------------------------------------------------------


def path(place: Place) -> Path:
    """Returns a place as a path."""
    found: Path = at(place)
    return found


def expanded(place: Place) -> Path:
    """Returns a place given by a user as a path: `~` is the home folder, `~NAME` that of an existing user."""
    return path(place) if is_remote(place) else path(os.path.expanduser(place))


def absolute(place: Place) -> Path:
    """Returns the absolute path, without following links; a URI unchanged."""
    return path(place) if is_remote(place) else pathlib.Path(place).absolute()


def real(place: Place) -> Path:
    """Returns the canonical path of an existing file or folder: absolute, links followed; anything else unchanged."""
    return path(place) if is_remote(place) or not os.path.exists(place) else path(os.path.realpath(place))


def at(place: Place) -> Any:
    """Returns the object that reads and writes a place.

    Local paths use `pathlib`: `epath` treats unreadable files as missing, and cannot return the size of a file whose
    owner has no name in the system, as in containers.

    Raises:
        OSError: If the package for it is missing.
    """
    text = os.fspath(place)
    if not is_remote(text):
        return pathlib.Path(text)
    package = SCHEMES[text.partition("://")[0]]
    if importlib.util.find_spec(package) is None:
        raise OSError(f"{text}: to open it, pip install {package}")
    return epath.Path(text)


def is_remote(place: Place) -> bool:
    """Says whether a place is in an object store."""
    scheme, separator, _ = os.fspath(place).partition("://")
    return bool(separator) and scheme in SCHEMES


# --- What is there ----------------------------------------------------------------------------------------------------


class Status(NamedTuple):
    """A value that changes when a file does."""

    size: int  # bytes
    modified: int  # ns, of the contents
    changed: int  # ns, of the file itself; an object's is that of its contents


def exists(place: Place) -> bool:
    """Says whether the path exists."""
    return bool(at(place).exists())


def is_file(place: Place) -> bool:
    """Says whether there is a file, or an object."""
    return bool(at(place).is_file())


def is_folder(place: Place) -> bool:
    """Says whether there is a folder; in an object store, whether an object has it as a prefix."""
    return bool(at(place).is_dir())


def is_link(place: Place) -> bool:
    """Says whether a path is a symbolic link; an object store has none."""
    return not is_remote(place) and pathlib.Path(place).is_symlink()


def status(place: Place) -> Status:
    """Returns size and times of a file.

    Raises:
        OSError: If it does not exist, or access is denied.
    """
    if is_remote(place):
        found = at(place).stat()
        return Status(found.length, found.mtime * 10**9, found.mtime * 10**9)
    of = pathlib.Path(place).stat()
    return Status(of.st_size, of.st_mtime_ns, of.st_ctime_ns)


def matching(folder: Place, *patterns: str) -> list[Path]:
    """Returns the matches of any of the patterns (`*.json`, `*/config.json`) in a folder, sorted."""
    return sorted({found for pattern in patterns for found in at(folder).glob(pattern)})


def below(folder: Place) -> list[Path]:
    """Returns everything below a folder, sorted, folders included; links to folders are not followed.

    An object store has no folders: only objects are listed.
    """
    if not is_remote(folder):
        return sorted(pathlib.Path(folder).rglob("*"))
    inside = at(folder).iterdir() if is_folder(folder) else ()
    return sorted(found for here in inside for found in (below(here) if is_folder(here) else [here]))


# --- In ---------------------------------------------------------------------------------------------------------------


def reading(place: Place) -> Any:
    """Opens a file as a binary stream, which the caller closes; only the parts that are read are in memory."""
    return at(place).open("rb")


def read_bytes(place: Place, size: int = -1) -> bytes:
    """Returns the contents of a file, or its first bytes."""
    with reading(place) as stream:
        content: bytes = stream.read(size)
    return content


def read_text(place: Place) -> str:
    """Returns the text of a UTF-8 file, with line feeds as line endings."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(place)), encoding="utf-8").read()


def read_array(place: Place, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Returns numbers from a byte offset of a file on, read-only.

    On a disk they are memory-mapped: only accessed parts are read. In an object store their range is read at once.
    """
    if not is_remote(place):
        return np.memmap(place, dtype, "r", offset, shape).view(np.ndarray)
    with reading(place) as stream:
        stream.seek(offset)
        return np.frombuffer(stream.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@contextlib.contextmanager
def local_copy(place: Place) -> Iterator[str]:
    """Yields a local path to a file or folder, for a library that reads no other; on a disk, the path itself."""
    if not is_remote(place):
        yield os.fspath(place)
        return
    source = at(place)
    with tempfile.TemporaryDirectory() as scratch:
        target = pathlib.Path(scratch) / source.name
        for file in [source] if source.is_file() else below(source):
            copy(file, target / file.relative_to(source))
        yield str(target)


# --- Out --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(place: Place) -> Iterator[BinaryIO]:
    """Writes a file atomically: it is complete at the end of the block; until then any old file stays.

    On a disk the bytes go into `NAME.partial`, are synced and renamed; a block that fails leaves nothing. For an
    object store they are collected on the disk and sent as one object. A missing folder is created.
    A pipe, or `/dev/stdout`, takes the bytes as they come.

    Raises:
        OSError: If it could not be written, naming the file.
    """
    if is_remote(place):
        with tempfile.TemporaryFile() as scratch:
            yield scratch
            scratch.seek(0)
            with at(place).open("wb") as stream:
                shutil.copyfileobj(scratch, stream)
        return
    target = pathlib.Path(place)
    if target.parent == pathlib.Path("/dev") or (target.exists() and not target.is_file()):
        with target.open("wb") as stream:
            yield stream
        return
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and str(error.filename) in ("None", str(partial)):
            error.filename = str(target)
        raise


def write(place: Place, content: str | bytes) -> None:
    """Writes a file atomically, as `writing` does; text as UTF-8."""
    with writing(place) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def local_draft(folder: Place) -> Iterator[str]:
    """Yields a local folder, for a library that writes no other; its files are in `folder` at the end of the block.

    On a disk it is the folder itself, created if needed.
    """
    if not is_remote(folder):
        make_folder(folder)
        yield os.fspath(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield scratch
        for file in filter(is_file, below(scratch)):
            copy(file, at(folder) / file.relative_to(scratch).as_posix())


def make_folder(folder: Place) -> None:
    """Creates a folder and its missing parents; does nothing in an object store."""
    if not is_remote(folder):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)


def copy(source: Place, target: Place) -> None:
    """Copies a file atomically, from any place to any place."""
    with reading(source) as old, writing(target) as new:
        shutil.copyfileobj(old, new)


def remove(place: Place) -> None:
    """Removes a file, or a folder with all its contents, if it exists."""
    here = at(place)
    if is_remote(here):
        for file in [here] if here.is_file() else below(here):
            at(file).unlink(missing_ok=True)
    elif here.is_dir() and not here.is_symlink():
        shutil.rmtree(here)
    else:
        here.unlink(missing_ok=True)


def move(folder: Place, target: Place) -> None:
    """Renames a folder; never overwrites an existing one.

    Atomic on a disk. In an object store everything is copied and then removed: an interrupted move leaves all of it in
    one of the two places, and some of it in the other.

    Raises:
        FileExistsError: If the new name exists.
    """
    if exists(target):
        raise FileExistsError(f"{folder}: cannot be moved to {target}, which is there")
    if not is_remote(folder):
        pathlib.Path(folder).rename(target)
        return
    for file in below(folder):
        copy(file, at(target) / file.relative_to(at(folder)))
    remove(folder)


# --- Lines ------------------------------------------------------------------------------------------------------------
#
# A growing file. In an object store it is a folder of numbered objects: `00000003.whole` holds all lines up to there,
# and `00000004.part` further ones. Each is written once, by one process, as `locked` ensures.


def read_lines(place: Place) -> list[str]:
    """Returns the lines of a file without line endings; omits an unfinished last line.

    Raises:
        FileNotFoundError: If there is no such file, nor any line of one.
    """
    files = parts(place) if is_remote(place) else [place]
    if not files:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(place))
    return [line.decode() for line in b"".join(map(read_bytes, files)).split(b"\n")[:-1]]


def write_lines(place: Place, lines: Iterable[str]) -> None:
    """Replaces the lines of a file atomically: a reader sees either the old or the new ones."""
    text = "".join(f"{line}\n" for line in lines)
    if not is_remote(place):
        write(place, text)
        return
    older = parts(place)
    write(at(place) / f"{1 + number(older):08}{WHOLE}", text)
    for file in older:
        remove(file)


def append_lines(place: Place, lines: Iterable[str]) -> None:
    """Appends lines, flushed to the system on return; a kill in between leaves at most one unfinished line.

    In an object store the lines of a call are one object, which exists whole or not at all.
    """
    text = "".join(f"{line}\n" for line in lines)
    if is_remote(place):
        write(at(place) / f"{1 + number(parts(place)):08}{PART}", text)
        return
    with pathlib.Path(place).open("ab") as stream:
        stream.write(text.encode())


def parts(place: Place) -> list[Path]:
    """Returns the objects with the lines, starting at the newest `.whole` one."""
    found = matching(place, f"*{WHOLE}", f"*{PART}")
    wholes = [i for i, file in enumerate(found) if file.suffix == WHOLE]
    return found[wholes[-1] :] if wholes else found


def number(objects: list[Path]) -> int:
    """Returns the number of the newest object with lines."""
    return int(objects[-1].stem) if objects else 0


# --- Claims and room --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Place, holder: str) -> Iterator[None]:
    """Locks a folder, created if needed, for this process; `.lock` in it names the holder.

    The lock belongs to the process, not to the file: it ends with the process, however that ends. An object store
    would need an object that can only be created if absent, and that expires.

    Raises:
        BlockingIOError: If another process holds it; names the process.
        OSError: In an object store.
    """
    if is_remote(folder):
        raise OSError(f"{folder}: a folder of an object store cannot be held for one run; name a local folder")
    make_folder(folder)
    with (pathlib.Path(folder) / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(f"{holder}\n")
        file.flush()
        yield


def standing(place: Place) -> Path:
    """Returns a path, or its nearest existing parent; a URI unchanged."""
    here = absolute(place)
    return here if is_remote(here) else next(found for found in (here, *here.parents) if exists(found))


def can_write(folder: Place) -> bool:
    """Says whether an existing folder is writable; for an object store only a write can tell."""
    return is_remote(folder) or (is_folder(folder) and os.access(folder, os.W_OK | os.X_OK))


def free_bytes(place: Place) -> float:
    """Returns the free disk space at a path, which need not exist; unlimited for an object store."""
    return math.inf if is_remote(place) else shutil.disk_usage(standing(place)).free
