"""Writing a file whole or not at all. No torch here: compute_iou.py must start fast."""
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.errors import UserError


@contextmanager
def atomic_write(path: str | Path, advice: str = "Free some space, or choose another --snapshot-dir") -> Iterator[Path]:
    """Yields a temporary path beside ``path``; the file written there is flushed to disk and then renamed to ``path``.

    The temporary name has the suffix of ``path``, and is the same in every run, so that leftovers of a killed process
    are overwritten instead of piling up. Missing folders are made. Raises UserError, with ``advice``, where the file
    cannot be written; an earlier file of that name is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. {advice}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
