"""Text and JSON files of users, which of many files exist, and writing a file whole or not at all.

No torch here: compute_iou.py must start fast.
"""
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.errors import UserError, shorten

FREE_SPACE = "Free some space, or choose another --snapshot-dir"


@contextmanager
def atomic_write(path: str | Path, advice: str = FREE_SPACE) -> Iterator[Path]:
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


def write_text(path: str | Path, text: str, advice: str = FREE_SPACE) -> None:
    """Raises UserError, with ``advice``."""
    with atomic_write(path, advice) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object, advice: str = FREE_SPACE) -> None:
    """Raises UserError, with ``advice``."""
    write_text(path, json.dumps(value, indent=1) + "\n", advice)


def claim_folder(record: Path, facts: Mapping[str, object], files: Sequence[Path], overwrite: bool, run) -> None:
    """What different calls write must not mix: ``record`` says with which settings the files beside it were made.

    facts: those of this call, for a JSON file. files: what it will write; with ``overwrite`` they are removed, without
    they are refused where the facts were others. run: a lib.runtime.Run. Raises UserError.
    """
    facts = json.loads(json.dumps(facts))
    before = read_json(record) if record.exists() else None
    if before is not None and not isinstance(before, dict):
        raise UserError(f"{record} does not say what the pictures beside it are: choose another --out, or remove it")
    there = [file for file in files if file.exists()] if before != facts or overwrite else []
    if there and not overwrite:
        differs = [f"{key} was {before.get(key)}, is {value}" for key, value in facts.items()
                   if before.get(key) != value] if before else ["they were not written by this script"]
        raise UserError(f"{record.parent} holds pictures of the same names, {there[0]} among them: "
                        f"{'; '.join(differs)}. Choose another --out, or replace them with --overwrite")
    run.barrier()
    if run.is_main and (before != facts or overwrite):
        for file in there:
            file.unlink()
        write_json(record, facts, "Choose another --out")
    run.barrier()


@contextmanager
def replaced_folder(folder: Path, is_made: Callable[[], bool]) -> Iterator[Path]:
    """Yields a draft beside ``folder``, which then takes its place as a whole; what fails leaves ``folder`` as it was.

    is_made: whether another process has made the folder meanwhile; the draft is then dropped. Raises UserError where
    files cannot be written.
    """
    draft = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield draft
        draft.chmod(0o755)  # mkdtemp's folders are private
        if not is_made():
            if folder.exists():
                shutil.rmtree(folder)
            draft.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name a folder that can") from error
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)


def make_folder(folder: str | Path, advice: str) -> None:
    """Raises UserError, with ``advice``, where the folder cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"cannot write into {shorten(folder)}: {reason}. {advice}") from None
    check_writable(Path(folder) / "probe", advice)


def remove(path: str | Path, advice: str) -> None:
    """Remove a file, if it is there. Raises UserError, with ``advice``, where that fails."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot replace {path}: {error.strerror}. {advice}") from None


def check_writable(path: str | Path, advice: str = "Choose another name") -> None:
    """Raises UserError, with ``advice``, where a later atomic_write of ``path`` would fail: for use before the work."""
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder. {advice}")
    probe = path.with_name(f".new-{path.name}")
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of the run may do the same
    except OSError as error:
        raise UserError(f"cannot write {shorten(path)}: {error.strerror or error}. {advice}") from None


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shorten(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text that are not empty, without surrounding spaces. Raises UserError where none is left."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path}: the list is empty; it should hold one image a line")
    return lines


def read_json(path: str | Path):
    """What a JSON file holds. Raises UserError, with line and column where the text is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: not usable: its brackets are nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: not usable: {error}") from None


def missing_files(paths: Iterable[str | Path]) -> list[int]:
    """The positions of those paths that are no files.

    Each folder is read once, instead of a question for every file: for 25,000 files on a network drive that is the
    difference between a second and minutes.
    """
    folders: dict[str, set[str]] = {}
    missing = []
    for position, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = _names_of_files(folder)
        # Asked once more before it counts as missing: the file system may ignore case.
        if name not in folders[folder] and not os.path.isfile(path):
            missing.append(position)
    return missing


def _names_of_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()
