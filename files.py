"""Files that are written whole or not at all, JSON, the log of a training, and the error of a user.

A file is written under another name first, so that an old one is never lost.
"""
import functools
import glob
import io
import json
import math
import os
import secrets
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np


class UserError(Exception):
    """A mistake that the user can correct; the message names the file or flag and what was expected there."""


def first_host_only(write):
    """Decorator of writers: all hosts of a run compute the same numbers, and the first one writes them."""
    @functools.wraps(write)
    def wrapped(*args, **kwargs):
        if jax.process_index() == 0:
            write(*args, **kwargs)
    return wrapped


@contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:  # a full disk does not say which file it was
        raise UserError(f"{path}: not written, {error}") from error


@contextmanager
def write_atomic(path):
    """Yield a temporary path beside `path`, which replaces `path` if the block succeeds: a kill or a full
    disk leaves the old file as it was. UserError if `path` is a folder or a device, and for every OSError."""
    path = Path(path).resolve()  # through a link: its target is replaced, not the link
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be written, it is not a regular file")
    name = ".{}.{}.part{}"  # the suffix stays: NumPy and matplotlib look at it
    temporary = path.with_name(name.format(path.stem, secrets.token_hex(4), path.suffix))
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(name.format(glob.escape(path.stem), "*", path.suffix)):
            with suppress(FileNotFoundError):  # another process may clean up as well
                if time.time() - stale.stat().st_mtime > 86400:  # left by a kill, a day ago
                    stale.unlink()
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def plain(value):
    """`value` as JSON can hold it: arrays as lists, paths as text, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX, arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@first_host_only
def write_json(path, value):
    """Write `value` (see `plain`) as an indented JSON file, atomically."""
    with write_atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


@first_host_only
def log_line(folder, record):
    """Append `record`, a dict with a "step", as one line to `folder`/log.jsonl."""
    path = Path(folder, "log.jsonl")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")


def read_log(folder):
    """The records of `folder`/log.jsonl, [] if there is none, without a last line that a kill cut short."""
    path = Path(folder, "log.jsonl")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: damaged, expected a JSON object in each line") from error


@first_host_only
def cut_log(folder, step=-1):
    """Drop the lines of the log past `step`, which a resumed run repeats; a fresh run drops all of them."""
    kept = [record for record in read_log(folder) if record["step"] <= step]
    with write_atomic(Path(folder, "log.jsonl")) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))


def on_disk(stored, path, check):
    """The rows of an HDF5 data set that does not fit into memory, as a NumPy array that reads from disk what
    is asked for: a copy at `path`, made once, of uint16 blocks that `check` returns."""
    if not path.exists():
        with write_atomic(path) as temporary, open(temporary, "wb") as copy:
            for start in range(0, len(stored), 8192):
                copy.write(check(stored[start:start + 8192]).tobytes())
    return np.memmap(path, np.uint16, "r", shape=stored.shape)


class Sink(io.FileIO):
    """A file for HDF5, which crashes at exit after a failed write: the first failure ends all writing."""
    failure = None

    def write(self, data):
        rest = memoryview(data)
        while len(rest) and not self.failure:
            try:
                rest = rest[super().write(rest):]   # a disk that is almost full takes a part
            except OSError as error:
                self.failure = error
        return len(data)

    def truncate(self, size=None):
        try:
            return size if self.failure else super().truncate(size)
        except OSError as error:
            self.failure = error

    def check(self):
        """Raise the failure, if there was one."""
        if self.failure:
            raise self.failure
