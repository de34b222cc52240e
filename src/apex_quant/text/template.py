"""Chat templates of models: a conversation becomes the text that the model was trained to see.

A template is a jinja2 program in the model's metadata, by whoever made the file. It runs in a process of its own
(sandbox.py); one that attacks or hangs is an error that names it, one that merely refuses a conversation is helped
with a simpler form of it (forms.py), and every such document is counted and told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Self

from apex_quant.errors import InputError
from apex_quant.gguf import GGUFModel
from apex_quant.text.documents import Document
from apex_quant.text.forms import FORMS, PLAIN, missing, plain
from apex_quant.text.renderer import Renderer, TemplateRaised

KEY: Final = "tokenizer.chat_template"
TOOLS_KEY: Final = "tokenizer.chat_template.tool_use"
_TOKENS: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class ChatTemplate:
    """A model's chat template. Holds a process while it is in use: close it, or use it in a `with`.

    `tool_use` is the variant for conversations with tools, where a model has one. `tokens` are the texts of special
    tokens by their names in templates (bos_token, eos_token, ...). `name` says whose it is, for errors.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_use: str | None = None,
        tokens: dict[str, str] | None = None,
        name: str = "the chat template",
    ) -> None:
        self.source = source
        self.tokens = {"bos_token": "", "eos_token": "", **(tokens or {})}
        common: dict[str, Any] = {**self.tokens, "documents": None, "add_generation_prompt": False}
        self._default = Renderer(source, common, name)
        self._tool_use = self._default if tool_use is None else Renderer(tool_use, common, f"{name} for tools")
        self._taken: Counter[str] = Counter()
        self._why: dict[str, str] = {}

    @classmethod
    def of(cls, model: GGUFModel) -> ChatTemplate | None:
        """The template in a model's metadata, or None where it has none. InputError for one that is not text."""
        source, tool_use = (_template(model, key) for key in (KEY, TOOLS_KEY))
        if source is None and tool_use is None:
            return None
        name = f"the chat template of {model.path}"
        return cls(source or tool_use or "", tool_use=tool_use, tokens=special_tokens(model), name=name)

    def render(self, document: Document) -> str:
        """The text of a document. InputError when the template is broken or attacks."""
        if document.text is not None:
            return document.text
        renderer = self._tool_use if document.tools else self._default
        tried: list[Any] = []
        reason = ""
        for form, make in FORMS:
            request = make(document)
            if request in tried:
                continue
            tried.append(request)
            try:
                text = renderer.render(request)
            except TemplateRaised as error:
                reason = reason or f"it says: {error}"
                continue
            lost = missing(document, text)
            if not lost:
                return self._note(form, reason, text)
            reason = reason or f"it leaves out {lost}"
        return self._note(PLAIN, reason, plain(document))

    @property
    def notes(self) -> list[str]:
        """How many documents could not be rendered as they are, in which form they were, and the first reason."""
        return [f"chat template: {count} x {form} ({self._why[form]})" for form, count in self._taken.items()]

    def _note(self, form: str, reason: str, text: str) -> str:
        if form:
            self._taken[form] += 1
            self._why.setdefault(form, reason)
        return text

    def close(self) -> None:
        """End its processes; they start again when needed."""
        self._default.close()
        self._tool_use.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def render(document: Document, template: ChatTemplate | None) -> str:
    """The document's text: by the template, or as a plain transcript without one."""
    return plain(document) if template is None else template.render(document)


def render_all(documents: Iterable[Document], template: ChatTemplate | None) -> list[str]:
    """The texts of many documents, with the template's process ended afterwards."""
    try:
        return [render(document, template) for document in documents]
    finally:
        if template is not None:
            template.close()


def special_tokens(model: GGUFModel) -> dict[str, str]:
    """Texts of bos, eos, unknown and padding tokens by their names in templates, of those the model names."""
    tokens = model.get("tokenizer.ggml.tokens")
    found: dict[str, str] = {}
    for name, key in _TOKENS.items():
        number = model.get(f"tokenizer.ggml.{key}_token_id")
        known = isinstance(tokens, tuple) and isinstance(number, int) and not isinstance(number, bool)
        if known and 0 <= number < len(tokens):
            found[name] = tokens[number].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return found


def _template(model: GGUFModel, key: str) -> str | None:
    source = model.get(key)
    if source is None:
        return None
    if not isinstance(source, str):
        raise InputError(f"{model.path}: {key} must be a string")
    try:
        source.encode()
    except UnicodeEncodeError:
        raise InputError(f"{model.path}: {key} is not UTF-8") from None
    return source
