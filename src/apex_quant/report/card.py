"""`card`: a model card for the Hugging Face hub from a folder of files and their results.

card("release/", "release/README.md", base_model="Qwen/Qwen3.5-35B-A3B", license="apache-2.0")

The front matter has the hub's own keys; what nothing states is left out and said. Numbers are those of the results
files with their intervals; the quote block holds only what a paired comparison has shown. A comment at the end says
from which results file each row is, and which JSON pointer each column shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import UsageError
from apex_quant.report.choose import Memory, with_results
from apex_quant.report.entry import Entry
from apex_quant.report.formats import (
    HELD,
    Cell,
    Sources,
    bpw_cell,
    bytes_unit,
    cell,
    code,
    markdown,
    markdown_table,
    measured,
    missing_lines,
    one_line,
    size_cell,
)  # fmt: skip
from apex_quant.report.gather import Gathered, gather
from apex_quant.report.pairs import Pairs
from apex_quant.report.provenance import (
    Header,
    eval_commands,
    header,
    model_name,
    quantize_command,
    run_command,
    versions,
)  # fmt: skip
from apex_quant.report.quantities import QUANTITIES, TASK_KEYS
from apex_quant.report.report import require_entries, write
from apex_quant.report.sentences import Sentences, sentences

MEMORIES: Final = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
"""GiB that graphics cards and machines come with."""
_MAIN: Final = ("kld", "kld_p99_9", "ppl", "tg")
_MORE: Final = ("kld_max", "top1", "router", *TASK_KEYS, "pp")
_HELD: Final = {
    HELD["interval"]: "brackets hold 95 % intervals",
    HELD["error"]: "± is a standard error",
    HELD["deviation"]: "± of speeds is a standard deviation",
}
_REPO: Final = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9._+-]{0,63}", re.ASCII)
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}", re.ASCII)


def card(
    place: str | Path | Sequence[str | Path] | Gathered,
    out: str | Path | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    quantized_by: str | None = None,
    repo: str | None = None,
    reference: str | None = None,
    family: Sequence[str] = (),
    ctx: int | None = None,
) -> Path:
    """Write the card of `place` (a folder with results, and its folder "results") to `out`, by default README.md in it.

    `base_model` (ORG/NAME) and `license` (the hub's name of it) default to what the files' headers say. `repo`: where
    the files go, for commands; its owner is `quantized_by` unless that is given. `ctx`: context in tokens for
    which memory is stated and which commands name; by default 32,768, or what the model was trained on where that is
    less. An existing card is replaced whole.

    Raises UsageError for names that cannot be, where `out` is a folder or cannot be told; InputError where no results
    can be read; as gather() and report().
    """
    for what, name in (("base model", base_model), ("repository", repo)):
        if name is not None and not _REPO.fullmatch(name):
            raise UsageError(f"{name!r} is not a {what}: ORG/NAME is wanted")
    for what, name in (("license", license), ("quantizer", quantized_by)):
        if name is not None and not _WORD.fullmatch(name.lower()):
            raise UsageError(f"{name!r} is not the name of a {what}")
    if out is not None and Path(out).is_dir():
        raise UsageError(f"{out}: a folder; the card is a file", hint=f"-o {Path(out) / 'README.md'}")
    gathered = place if isinstance(place, Gathered) else gather(with_results(place), reference=reference, family=family)
    require_entries(gathered)
    if out is None and not (isinstance(place, str | Path) and Path(place).is_dir()):
        raise UsageError("where should the card go?", hint="-o README.md")
    target = Path(out) if out is not None else Path(str(place)) / "README.md"
    owner = quantized_by or (repo.partition("/")[0] if repo else None)
    return write(
        target, card_text(gathered, base_model=base_model, license=license, quantized_by=owner, repo=repo, ctx=ctx)
    )


def card_text(
    gathered: Gathered,
    *,
    base_model: str | None = None,
    license: str | None = None,
    quantized_by: str | None = None,
    repo: str | None = None,
    ctx: int | None = None,
) -> str:
    """The card's text."""
    pairs, memory = Pairs(), Memory(gathered.entries)
    ctx = memory.usual_ctx() if ctx is None else ctx
    found = sentences(gathered, pairs)
    headers = {entry.label: header(entry.gguf) for entry in gathered.entries}
    known = [one for one in headers.values() if one is not None]
    base = base_model or next((one.base_model for one in known if one.base_model), None)
    stated = next((one.about["general.license"] for one in known if "general.license" in one.about), None)
    licensed = license or (stated.lower() if stated and _WORD.fullmatch(stated.lower()) else None)
    parts = [
        front_matter(known, base, licensed, quantized_by),
        _opening(gathered, base, known),
        _quotes(found),
        _files(gathered, memory, ctx, repo),
        _run(gathered, memory, ctx, repo),
        _measured(gathered),
        _calibration(gathered, known),
        _provenance(gathered, headers),
        _not_measured(gathered, base, licensed),
        _trace(gathered),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(known: Sequence[Header], base: str | None, license: str | None, quantized_by: str | None) -> str:
    """YAML between lines of dashes, with the keys that the hub reads."""
    import yaml

    tags = ["gguf", "quantized", "apex"]
    tags += ["imatrix"] if any(one.uses_imatrix for one in known) else []
    tags += ["moe"] if any(one.is_moe for one in known) else []
    said = next((one.about["general.languages"] for one in known if "general.languages" in one.about), "")
    languages = [word.strip() for word in said.split(",") if _LANGUAGE.fullmatch(word.strip())]
    values: Mapping[str, Any] = {
        "license": license,
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "language": languages or None,
        "quantized_by": quantized_by,
        "tags": tags,
    }
    text = yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
    return f"---\n{text}---"


def _opening(gathered: Gathered, base: str | None, known: Sequence[Header]) -> str:
    name = model_name(gathered) or (base or "a model").rpartition("/")[2]
    of = f"[{markdown(base)}](https://huggingface.co/{base})" if base else markdown(name)
    kinds = (
        "Each tensor has a type of its own, by role and layer; they"
        if any(entry.tier for entry in gathered.entries)
        else "They"
    )
    text = f"# {markdown(one_line(name, 80))} GGUF\n\nQuantized GGUF files of {of}. {kinds} run in stock llama.cpp and "
    text += "what is built on it."
    needs = sorted({one.facts["needs llama.cpp with"] for one in known if "needs llama.cpp with" in one.facts})
    return text + (
        f" The newest tensor types among them need a llama.cpp with {', '.join(map(markdown, needs))}." if needs else ""
    )


def _quotes(found: Sentences) -> str:
    """Only what was shown; nothing where nothing was."""
    if not found.quoted:
        return ""
    lines = [f"> {markdown(sentence)}" for sentence in found.quoted]
    return (
        "\n>\n".join(lines) + f"\n\n{markdown(found.caution)} Compared were files with the best one that is not larger."
    )


def _files(gathered: Gathered, memory: Memory, ctx: int, repo: str | None) -> str:
    entries = [entry for entry in gathered.entries if not entry.is_reference]
    sources = Sources(gathered.entries)
    unit = bytes_unit(entry.bytes or 0 for entry in entries)
    columns = _columns(entries, _MAIN, unit, sources)
    rows = []
    for entry in entries:
        link = f"https://huggingface.co/{repo}/blob/main/{entry.file_name}" if repo else entry.file_name
        safe = re.fullmatch(r"[\w./-]+", entry.file_name, re.ASCII) and "-of-" not in entry.file_name
        name = f"[{markdown(entry.file_name)}]({link})" if safe else code(entry.file_name)
        rows.append([name, *(markdown(make(entry).text) for _, _, make in columns), _for_whom(entry, memory, ctx)])
    heads = ["File", *(title for title, _, _ in columns), f"For memory of (context {ctx:,})"]
    text = "## Files\n\n" + markdown_table(heads, rows)
    text += (
        f"\n\n{_sureness(entries, sources)}The memory is the smallest usual one that holds the whole file, the f16 KV "
        "cache and an allowance for compute buffers; with less, part of the file runs from main memory, slower."
    )
    if "kld" in measured(entries):
        text += " KLD is the divergence from the full-precision model in nats per token: 0 is identical."
    more = _columns(entries, _MORE, None, sources)
    if more:
        rows = [[markdown(entry.label), *(markdown(make(entry).text) for _, _, make in more)] for entry in entries]
        text += "\n\n### More measurements\n\n" + markdown_table(["File", *(title for title, _, _ in more)], rows)
    return text


def _sureness(entries: Sequence[Entry], sources: Sources) -> str:
    """What stands beside the values, of what does."""
    shown = [cell(entry, key, sources) for entry in entries for key in (*_MAIN, *_MORE)]
    held = {one.held for one in shown if one.main is not None}
    parts = [text for kind, text in _HELD.items() if kind in held]
    parts += ["a value with neither has no interval" if parts else "no value has an interval"] if "" in held else []
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}. " if text else ""


def _columns(
    entries: Sequence[Entry], keys: Sequence[str], unit: tuple[float, str] | None, sources: Sources
) -> list[tuple[str, str, Callable[[Entry], Cell]]]:
    """Heading, key and how a cell is made, of what any file has; with `unit` size and bits per weight come first."""
    made: list[tuple[str, str, Callable[[Entry], Cell]]] = []
    if unit is not None:
        made.append((f"Size, {unit[1]}", "bytes", lambda entry: size_cell(entry, unit, sources)))
        made.append(("bpw", "bpw", lambda entry: bpw_cell(entry, sources)))
    for key in measured(entries, keys):
        title = QUANTITIES[key].axis
        made.append((title[0].upper() + title[1:], key, lambda entry, key=key: cell(entry, key, sources)))  # type: ignore[misc]
    return made


def _for_whom(entry: Entry, memory: Memory, ctx: int) -> str:
    """The smallest usual memory that holds the file with its context."""
    kv = memory.kv_bytes(entry, ctx, "f16", "f16")
    if entry.bytes is None:
        return "size not known"
    total = entry.bytes + (kv or 0) + memory.compute_bytes(entry, ctx)
    fits = next((size for size in MEMORIES if total <= size << 30), None)
    text = f"{fits} GiB" if fits is not None else f"{total / 2**30:.0f} GiB"
    return text if kv is not None else f"{text}, KV cache not counted"


def _run(gathered: Gathered, memory: Memory, ctx: int, repo: str | None) -> str:
    entries = [entry for entry in gathered.entries if not entry.is_reference and entry.file_name.endswith(".gguf")]
    if not entries:
        return ""
    middle = entries[len(entries) // 2]
    lines = [run_command(middle.file_name, ctx, repo=repo)]
    text = "## Run\n\n```\n" + "\n".join(lines) + "\n```\n\nAny other file of the table goes in its place."
    text += " `-hff` names the file: `-hf REPO:QUANT` does not find files that are named by tier." if repo else ""
    beyond = memory.beyond(ctx)
    text += f"\n\n**Warning**: {beyond}." if beyond else ""
    unknown = f" Whether the model was trained on contexts of {ctx:,} tokens is not known: no header was at hand."
    return text + (unknown if memory.trained is None else "")


def _measured(gathered: Gathered) -> str:
    """What with, on what, and the commands."""
    lines = []
    groups: dict[str, list[str]] = {}
    for entry in gathered.entries:
        for source in entry.sources:
            said = source.settings
            known = {key: said[key] for key in ("texts", "ctx", "scored", "chunks") if said.get(key) is not None}
            text = ", ".join(f"{key} {_plain(value)}" for key, value in known.items())
            with_ = ", ".join(f"{key} {_plain(value)}" for key, value in versions(entry).items())
            groups.setdefault("; ".join(part for part in (text, with_) if part) or "not stated", []).append(entry.label)
    for said_, labels in groups.items():
        lines.append(f"- {markdown(said_)} ({markdown(', '.join(dict.fromkeys(labels)))})")
    reference = _reference(gathered.about_reference or {})
    commands = [line for entry in gathered.entries for line in eval_commands(entry)]
    shell = f"\n\n```\n{commands[0]}\n```" if commands else ""
    imported = [entry.label for entry in gathered.entries if entry.imported is not None]
    others = f"\n\nNumbers of others, as they published them: {markdown(', '.join(imported))}." if imported else ""
    return "## Measured\n\n" + (f"{reference}\n\n" if reference else "") + "\n".join(lines) + shell + others


def _reference(about: Mapping[str, Any]) -> str:
    """Whose predictions divergences are from, and the file that keeps them: each with its own hash."""
    if not about:
        return ""

    def named(name: Any, digest: Any) -> str:
        return (code(str(name)) if name else "a model") + (f" (sha256 {code(str(digest))})" if digest else "")

    file, own, model = about.get("path") or about.get("name"), about.get("sha256"), about.get("model_sha256")
    if about.get("form", "gguf") == "gguf" and own in (model, None):
        return f"Divergences are from {named(file or 'the reference', model)}."
    if not model:
        return f"Divergences are from the predictions kept in {named(file or 'the reference', own)}."
    kept = f", kept in {named(file, own)}" if file else ""
    return f"Divergences are from the predictions of {named(about.get('model'), model)}{kept}."


def _calibration(gathered: Gathered, known: Sequence[Header]) -> str:
    matrices = {
        (one.facts.get("importance matrix", ""), one.facts.get("importance matrix, sha256", ""),
         one.facts.get("calibration text", ""), one.facts.get("calibration chunks", ""))
        for one in known if one.uses_imatrix
    }  # fmt: skip
    if not matrices:
        return ""
    lines = []
    for name, digest, text, chunks in sorted(matrices):
        line = f"- {code(name) if name else 'importance matrix'}"
        line += f", sha256 {code(digest)}" if digest else ", hash not stated"
        line += f": calibrated on {markdown(text)}" if text else ": text not stated"
        lines.append(line + (f", {markdown(chunks)} chunks" if chunks else ""))
    for one in gathered.coverage:
        every = sum(len(layer.tokens) for layer in one.layers)
        thin = sum(len(layer.uncovered) for layer in one.layers)
        lines.append(f"- {code(one.source)}: {every - thin:,} of {every:,} experts saw at least {one.floor} tokens")
    return "## Calibration\n\n" + "\n".join(lines)


def _provenance(gathered: Gathered, headers: Mapping[str, Header | None]) -> str:
    rows = []
    for entry in gathered.entries:
        found = headers[entry.label]
        facts = dict(found.facts) if found is not None else {}
        recipe = facts.get("recipe, sha256") or entry.results.model.recipe_sha256 or ""
        source = facts.get("source, sha256", "")
        hashes = [code(text) if text else "–" for text in (entry.sha256 or "", recipe, source)]
        rows.append([code(entry.file_name), *hashes])
    text = "## Provenance\n\n" + markdown_table(["File", "sha256", "Recipe, sha256", "Source, sha256"], rows)
    made = [line for entry in gathered.entries if (line := quantize_command(entry, headers[entry.label]))]
    tools = sorted({f"apex-quant {one.facts['apex-quant']}, {one.facts.get('library', '')}" for one in headers.values()
                    if one is not None and "apex-quant" in one.facts})  # fmt: skip
    text += (
        f"\n\nMade with {markdown('; '.join(tools))}:\n\n```\n" + "\n".join(made) + "\n```" if made and tools else ""
    )
    return text


def _not_measured(gathered: Gathered, base: str | None, license: str | None) -> str:
    lines = [f"- {markdown(line)}" for line in missing_lines(gathered)]
    groups: dict[str, list[str]] = {}
    for entry in gathered.entries:
        groups.setdefault(", ".join(entry.not_measured()) or "nothing", []).append(entry.label)
    lines += [f"- {markdown(', '.join(labels))}: {markdown(what)}" for what, labels in groups.items()]
    lines += [f"- {markdown(line)}" for line in _without_interval(gathered.entries)]
    unknown = [what for what, value in (("base model", base), ("license", license)) if value is None]
    lines += [f"- Not stated by any file: {', '.join(unknown)}."] if unknown else []
    return "## Not measured\n\n" + "\n".join(dict.fromkeys(lines))


def _without_interval(entries: Sequence[Entry]) -> list[str]:
    """Which of the values shown have no 95 % interval, and why, where the results say it."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        whys: dict[str, list[str]] = {}
        for key in (*_MAIN, *_MORE):
            number = entry.number(key)
            if number is not None and number.low is None and number.note:
                whys.setdefault(number.note, []).append(QUANTITIES[key].title)
        for why, titles in whys.items():
            groups.setdefault(f"no 95 % interval of {', '.join(titles)} ({why})", []).append(entry.label)
    return [f"{', '.join(labels)}: {what}" for what, labels in groups.items()]


def _trace(gathered: Gathered) -> str:
    """Which results file each row's numbers are from, for those who check; hidden in the page."""
    entries = [entry for entry in gathered.entries if not entry.is_reference]
    sources = Sources(gathered.entries)
    columns: dict[str, str] = {}
    files: dict[str, Any] = {}
    for entry in entries:
        cells = {"bytes": size_cell(entry, (1.0, "B"), sources), "bpw": bpw_cell(entry, sources)}
        cells |= {key: cell(entry, key, sources) for key in (*_MAIN, *_MORE)}
        pointers = {key: one.main.trace.partition("#")[2] for key, one in cells.items() if one.main is not None}
        columns = {**pointers, **columns}
        other = {key: pointer for key, pointer in pointers.items() if columns[key] != pointer}
        files[entry.file_name] = {"results": list(entry.files), **other}
    text = json.dumps({"columns": columns, "files": files}, ensure_ascii=True)
    text = text.replace("--", "-\\u002d").replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- apex-trace\n{text}\n-->"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
