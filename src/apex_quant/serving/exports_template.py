"""A model's chat template in Ollama's Go form, derived by what it makes of a few conversations, and checked.

Ollama does not run the jinja2 template of a GGUF. For a template that puts fixed text around each turn, that text can
be read off renderings with marks in place of the turns; the Go form made of it is believed only where it makes the
same of other conversations as the model's own. Templates that do more (tools, thinking) are left to Ollama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apex_quant.errors import ApexError
from apex_quant.text.renderer import Renderer, TemplateRaised
from apex_quant.text.template import KEY, special_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_quant.gguf.reader import GGUFModel

Turn = tuple[str, str]
_MARKS = ("QQsystemQQ", "QQfirstQQ", "QQanswerQQ", "QQsecondQQ")


@dataclass(frozen=True)
class Frame:
    """Text before and after the turns of each role, and what asks for an answer."""

    around: dict[str, tuple[str, str]]
    ask: str

    def render(self, turns: Sequence[Turn]) -> str:
        """What the Go template makes of a conversation."""
        return "".join(self.around[role][0] + text + self.around[role][1] for role, text in turns) + self.ask

    def go(self) -> str:
        """The template in Go's language, as Ollama takes it."""
        branches = [
            f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}{{{{ '
            for role, (before, after) in self.around.items()
        ]
        return "{{ range .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}" + _go(self.ask)


def _go(text: str) -> str:
    """Literal text in a Go template; braces must not begin an action."""
    return text.replace("{{", '{{ "{{" }}')


def frame(model: GGUFModel) -> tuple[Frame | None, str]:
    """The frame of a model's template, or None and why there is none."""
    source = model.get(KEY)
    if not isinstance(source, str):
        return None, "the model has no chat template"
    tokens = special_tokens(model)
    # Ollama puts BOS in front itself where the vocabulary says so
    common: dict[str, Any] = {"bos_token": "", "eos_token": "", **tokens} | {"bos_token": ""}
    with Renderer(source, common, f"the chat template of {model.path}") as renderer:

        def render(turns: Sequence[Turn], ask: bool) -> str:
            messages = [{"role": role, "content": text} for role, text in turns]
            return renderer.render({"messages": messages, "add_generation_prompt": ask})

        try:
            found = _read_off(render)
            if found is None:
                return None, "its template does more than put text around turns"
            for turns in _CHECKS:
                if render(turns, True) != found.render(turns):
                    return None, "its template does more than put text around turns"
        except TemplateRaised as error:
            return None, f"its template refuses a conversation: {error}"
        except ApexError as error:
            return None, error.message
    if any('"""' in text for pair in (*found.around.values(), (found.ask,)) for text in pair):
        return None, "its template holds triple quotes"
    return found, ""


_CHECKS: tuple[list[Turn], ...] = (
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Why?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "x"), ("user", "a"), ("assistant", "b\nb"), ("user", "c")],
)


def _read_off(render: Any) -> Frame | None:
    system, first, answer, second = _MARKS
    whole = [("system", system), ("user", first), ("assistant", answer), ("user", second)]
    asked, plain = render(whole, True), render(whole, False)
    alone = render([("user", first)], False)
    if any(text.count(mark) != 1 for text in (asked, plain) for mark in _MARKS) or alone.count(first) != 1:
        return None
    if not asked.startswith(plain):
        return None
    pieces, rest = [], plain
    for mark in _MARKS:
        piece, _, rest = rest.partition(mark)
        pieces.append(piece)
    before_system, to_user, to_answer, to_second = pieces
    before_user, _, after_user = alone.partition(first)
    if not (to_user.endswith(before_user) and to_second.endswith(before_user) and to_answer.startswith(after_user)):
        return None
    if rest != after_user:
        return None
    cut = len(before_user)
    return Frame(
        {
            "system": (before_system, to_user[: len(to_user) - cut]),
            "user": (before_user, after_user),
            "assistant": (to_answer[len(after_user) :], to_second[: len(to_second) - cut]),
        },
        asked[len(plain) :],
    )


def stops(found: Frame) -> list[str]:
    """What ends an answer, and what begins the next turn: where Ollama should stop."""
    after, before = found.around["assistant"][1].strip(), found.around["user"][0].strip()
    return [one for one in dict.fromkeys([after.split("\n")[0], before.split("\n")[0]]) if one]
