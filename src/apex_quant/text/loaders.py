"""Documents from files: .txt, .jsonl, .parquet, folders of them, the hub, and the text that ships in this package.

Every file is bounded before it is read, and everything in it is checked: broken text is an error that names the file
and the place. Rows without any text, which data sets are full of, are left out and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.gguf.header import open_regular
from apex_quant.text.documents import Document, check_text, document_of

BUILTIN: Final = "builtin"
HUB: Final = "hub:"

MAX_FILE_BYTES: Final = 256 << 20  # a calibration text has a few megabytes
MAX_TOTAL: Final = 512 << 20  # characters of all documents together
MAX_PARQUET_BYTES: Final = 2 << 30  # of which MAX_FILE_BYTES characters are taken
MAX_LINE_BYTES: Final = 16 << 20  # also of a conversation in a .parquet file
MAX_DOCUMENTS: Final = 500_000
MAX_FILES: Final = 20_000
_ROWS: Final = 256  # of a .parquet file, in memory together, fewer when they may be large
_COLUMNS: Final = ("kind", "lang", "text", "messages", "conversations", "prompt", "response", "completion", "tools")

Say = Callable[[str], None]


@dataclass
class Loading:
    """What one call of `load` may still take, and whom it tells what it left out."""

    say: Say
    room: int = MAX_TOTAL
    documents: list[Document] = field(default_factory=list)

    def add(self, document: Document) -> None:
        """Take one document. InputError for too many of them, or too much text."""
        if len(self.documents) == MAX_DOCUMENTS:
            raise InputError(f"{document.source}: more than {MAX_DOCUMENTS} documents", hint="give fewer of them")
        self.room -= document.characters
        if self.room < 0:
            raise InputError(
                f"{document.source}: more than {MAX_TOTAL} characters in all sources together", hint="give less text"
            )
        self.documents.append(document)


def load(spec: Sequence[str | os.PathLike[str]], say: Say | None = None) -> list[Document]:
    """The documents of all sources in order: files, folders, "hub:NAME[:CONFIG[:SPLIT]]" or "builtin".

    A .txt file is one document, a .jsonl or .parquet file one for each row (see documents.document_of), a folder
    all files in it with these endings, sorted. `say` hears what was left out. InputError names file and line.
    """
    if not spec:
        raise UsageError("no source of text was given", hint="name a file, a folder, hub:NAME or builtin")
    loading = Loading(say or (lambda line: None))
    for source in [os.fspath(item) for item in spec]:
        before = len(loading.documents)
        if source == BUILTIN:
            from apex_quant.text.corpus import builtin

            loading.documents += builtin()
        elif source.startswith(HUB):
            from apex_quant.text.hub import load_hub

            load_hub(source.removeprefix(HUB), loading)
        elif Path(source).is_dir():
            _folder(Path(source), loading)
        else:
            load_file(Path(source), loading)
        if len(loading.documents) == before:
            raise InputError(f"{source}: holds no text")
    return loading.documents


def load_file(path: Path, loading: Loading, name: str | None = None) -> None:
    """Add the documents of one file. `name` stands for it in messages."""
    name = name or str(path)
    if path.suffix.lower() not in READERS:
        if not os.path.lexists(path):
            raise InputError(f"{name}: no such file")
        raise InputError(f"{name}: is not text that can be read; known endings: {', '.join(READERS)}")
    reader, most = READERS[path.suffix.lower()]
    fd, size = open_regular(str(path))
    try:
        if size > most:
            raise InputError(f"{name}: {size} bytes, more than the {most} that are read", hint="cut a part out of it")
        reader(fd, size, name, loading)
    finally:
        os.close(fd)


def _folder(folder: Path, loading: Loading) -> None:
    """All files with a known ending, sorted by path; hidden ones and links to folders are not looked at."""
    found: list[Path] = []
    others = 0
    for root, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in READERS:
                found.append(Path(root, name))
            else:
                others += 1
        if len(found) > MAX_FILES:
            raise InputError(f"{folder}: more than {MAX_FILES} files", hint="give a folder with fewer")
    if others:
        loading.say(f"{folder}: {others} files left out, whose endings are none of {', '.join(READERS)}")
    for path in sorted(found):
        load_file(path, loading)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}")


def _read_text(fd: int, size: int, name: str, loading: Loading) -> None:
    """The whole file is one document."""
    raw = _content(fd, size, name)
    at = raw.find(b"\0")
    if at >= 0:
        raise InputError(f"{name}: a NUL byte at byte {at}: not a text file")
    text = _decoded(raw, name, 0)
    if not text.strip():
        raise InputError(f"{name}: is empty")
    loading.add(Document("text", text=text, source=name))


def _read_lines(fd: int, size: int, name: str, loading: Loading) -> None:
    """A document for each line of JSON."""
    blank = 0
    raw = _content(fd, size, name)
    for number, (start, line) in enumerate(_lines(raw), 1):
        where = f"{name}:{number}"
        if b"\0" in line:
            raise InputError(f"{where}: a NUL byte at byte {start + line.index(0)}: not a text file")
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{where}: {len(line)} bytes, at most {MAX_LINE_BYTES} in a line")
        if not line.strip():
            continue
        try:
            row = json.loads(_decoded(line, where, start))
        except RecursionError:
            raise InputError(f"{where}: nested too deeply") from None
        except ValueError as error:
            raise InputError(f"{where}: is not JSON: {error}") from None
        document = document_of(row, where)
        if document is None:
            blank += 1
        else:
            loading.add(document)
    _tell_blank(blank, name, loading)


def _read_parquet(fd: int, size: int, name: str, loading: Loading) -> None:
    """A document for each row, through pyarrow; only the columns that are known are read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ResourceError(
            f"{name}: reading .parquet files needs pyarrow", hint="pip install 'apex-quant[parquet]'"
        ) from None
    blank = number = 0
    room = MAX_FILE_BYTES
    try:
        with os.fdopen(fd, "rb", closefd=False) as file:
            table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
            columns = [column for column in _COLUMNS if column in table.schema_arrow.names]
            if not columns:
                known = ", ".join(map(repr, table.schema_arrow.names[:10]))
                raise InputError(f"{name}: its columns {known} hold no text; known are {', '.join(_COLUMNS[2:])}")
            rows = max(1, min(_ROWS, MAX_FILE_BYTES // max(1, size)))  # one value may stand in every row
            for batch in table.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    document = document_of(row, f"{name}: row {number}")
                    if document is None:
                        blank += 1
                        continue
                    if document.text is None and document.characters > MAX_LINE_BYTES:
                        raise InputError(f"{document.source}: more than {MAX_LINE_BYTES} characters in a conversation")
                    room -= document.characters
                    loading.add(document)
                if room < 0:
                    loading.say(f"{name}: its first {number} of {table.metadata.num_rows} rows are taken")
                    break
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: is not a readable .parquet file: {str(error)[:300]}") from None
    _tell_blank(blank, name, loading)


def _tell_blank(blank: int, name: str, loading: Loading) -> None:
    if blank:
        loading.say(f"{name}: {blank} rows without text left out")


def _content(fd: int, size: int, name: str) -> bytes:
    try:
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(size)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines and where they start, without copying what comes after."""
    start = 0
    while start < len(raw):
        end = raw.find(b"\n", start)
        end = len(raw) if end < 0 else end
        yield start, raw[start:end]
        start = end + 1


def _decoded(raw: bytes, where: str, start: int) -> str:
    try:
        text = raw.decode()
        return check_text(text if start else text.removeprefix("\ufeff"), where)  # without a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {start + error.start} is not UTF-8") from None


# .raw is what perplexity texts are called (wiki.test.raw)
READERS: Final[dict[str, tuple[Callable[[int, int, str, Loading], None], int]]] = {
    ".txt": (_read_text, MAX_FILE_BYTES),
    ".raw": (_read_text, MAX_FILE_BYTES),
    ".md": (_read_text, MAX_FILE_BYTES),
    ".jsonl": (_read_lines, MAX_FILE_BYTES),
    ".parquet": (_read_parquet, MAX_PARQUET_BYTES),
}
