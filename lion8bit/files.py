"""Writes a file so that it appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_whole(
    path: Path, write: Callable[[IO[bytes]], object], permissions: int = 0o666, *, keep: bool = False
) -> None:
    """Writes a file beside ``path`` and puts it in place when it is complete.

    Args:
        path: the file to write. A symbolic link is replaced, so pass where it leads to.
        write: is given the open file.
        permissions: of the file, before the umask takes its share.
        keep: a file that is there keeps its permissions instead.

    Raises:
        OSError: the file cannot be written; and what ``write`` raises. What was at ``path`` is still there.
    """
    part = path.parent / f".lion8bit-{secrets.token_hex(8)}"
    # Not by `tempfile`, whose files nobody else may read.
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), permissions)
    try:
        with os.fdopen(handle, "wb") as file:
            if keep and path.exists():
                os.chmod(part, path.stat().st_mode & 0o777)
            write(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
