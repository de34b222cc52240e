"""`import_results`: what others measured, as results of ours, so that it can stand beside them.

import_results("perplexity.log")          # of llama-perplexity: perplexity, --kl-divergence, tasks
import_results("bench.json")              # of llama-bench: -o md, csv, json, jsonl
import_results("apex_i_quality.json")     # as the original project publishes them
import_results("theirs.csv")              # a table with a heading; docs/report.md names the columns

`settings.imported` of each says where it is from: the file's name, its sha256, its form, and the source it states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.pertoken import read_bounded
from apex_quant.evaluation.results import save
from apex_quant.evaluation.schema import ModelInfo, Results
from apex_quant.report.imports_bench import bench_csv, bench_json, bench_markdown
from apex_quant.report.imports_logs import perplexity_log
from apex_quant.report.imports_rows import Row
from apex_quant.report.imports_tables import published_json, table_csv

MAX_BYTES: Final = 64 << 20


class NotImportableError(InputError):
    """A file of none of the forms that can be imported."""


Reader = Callable[[str, str], list[Row] | None]

FORMS: Final[dict[str, Reader]] = {
    "llama-perplexity log": perplexity_log,
    "llama-bench json": bench_json,
    "published json": published_json,
    "llama-bench csv": bench_csv,
    "llama-bench md": bench_markdown,
    "csv": table_csv,
}
"""By name: readers of a text (and the file's name without extension); None when the text is of another form."""


def import_results(
    path: str | Path, *, form: str | None = None, out: str | Path | None = None, force: bool = False
) -> list[Results]:
    """The results in a file of one of FORMS, told from what is in it unless `form` says it. With the folder `out`, each
    is also written there as NAME.json; `force` replaces those that are there.

    Divergences are in nats, accuracies shares with Wilson intervals where the number of tasks is known, speeds tokens
    per second. What a file does not state stays unknown; nothing is estimated. Uncertainties of llama-perplexity are
    standard errors over tokens (`error`), no intervals over chunks.

    Raises UsageError for another `form` or a file that would be replaced, NotImportableError for a file of none of
    them, InputError for one that is broken.
    """
    path = Path(path)
    if form is not None and form not in FORMS:
        raise UsageError(f"no form is called {form!r}", hint=f"known: {', '.join(FORMS)}")
    if _is_model(path):  # refused unread: as a text it would be searched for a long time
        raise NotImportableError(
            f"{path}: a model, not results", hint=f"apex eval {path.name} -o results.json measures it"
        )
    data = read_bounded(path, MAX_BYTES, "results to import")
    text = data.decode("utf-8-sig", "replace")
    stem = path.name.rpartition(".")[0] or path.name
    for name, read in FORMS.items():
        if form in (None, name):
            try:
                rows = read(text, stem)
            except InputError as error:
                raise InputError(f"{path}: {error.message}", hint=error.hint) from None
            if rows is not None:
                source = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "form": name}
                return _as_results(rows, source, path, Path(out) if out is not None else None, force)
    raise NotImportableError(
        f"{path}: nothing that can be imported{f' as {form}' if form else ''}", hint=f"known: {', '.join(FORMS)}"
    )


def _is_model(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would block
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _as_results(
    rows: Sequence[Row], source: Mapping[str, Any], path: Path, out: Path | None, force: bool
) -> list[Results]:
    made = []
    for row in rows:
        about = {**source, "source": row.source or source["file"]}
        results = Results(
            model=ModelInfo(**{"path": row.name, "bytes": row.bytes, "bpw": row.bpw, "tier": row.tier, **row.model}),
            reference=dict(row.reference) if row.reference else None,
            metrics=json.loads(json.dumps(row.metrics)),
            settings={**row.settings, "imported": about},
            warnings=list(row.warnings),
        )
        if out is None:
            results._path = path
        else:
            target = out / f"{_file_name(row.name)}.json"
            if target.exists() and not force:
                raise UsageError(f"{target} exists already", hint="--force replaces it")
            out.mkdir(parents=True, exist_ok=True)
            save(results, target)
        made.append(results)
    return made


def _file_name(name: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "-_.+" else "-" for letter in name.removesuffix(".gguf"))
    return kept.strip(".-")[:150] or "imported"
