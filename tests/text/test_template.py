"""Chat templates against transformers' recorded renderings, and what happens with those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from apex_quant import embedded_model, open_model
from apex_quant.errors import InputError
from apex_quant.text import ChatTemplate, Document, builtin, render, render_all
from apex_quant.text.documents import document_of
from apex_quant.text.renderer import MAX_TEMPLATE, Renderer, TemplateRaised
from tests.text.record_golden import CONVERSATIONS, HERE, TOKENS, requests

GOLDEN: dict[str, dict[str, str | None]] = json.loads((HERE / "golden.json").read_text("utf-8"))


def source(name: str) -> str:
    return (HERE / "templates" / f"{name}.jinja").read_text("utf-8")


def document(name: str) -> Document:
    made = document_of(CONVERSATIONS[name], name)
    assert made is not None
    return made


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_renders_as_transformers_does(name: str) -> None:
    asked = requests()
    assert set(GOLDEN[name]) == set(asked)
    with Renderer(source(name), {**TOKENS, "documents": None, "add_generation_prompt": False}, name) as renderer:
        for case, expected in GOLDEN[name].items():
            if expected is None:
                with pytest.raises(TemplateRaised):
                    renderer.render(asked[case])
            else:
                assert renderer.render(asked[case]) == expected, case


def test_every_template_has_a_golden_result() -> None:
    assert sorted(GOLDEN) == sorted(path.stem for path in (HERE / "templates").glob("*.jinja"))


def test_the_richest_form_that_loses_nothing_is_taken() -> None:
    """(template, conversation) -> the note, and what the text must hold."""
    cases = {
        ("angle_tags", "tools"): ("", '"arguments": {"city": "Málaga <b>"'),
        ("headers", "system"): ("", "Be brief."),
        # says the system's words only when the last message is a user's
        ("brackets", "system"): ("it leaves out what the system says", "Be brief."),
        ("brackets", "tools"): ("can only concatenate str", "get_tide"),
        ("turns", "system"): ("System role not supported", "Be brief."),
        ("turns", "tools"): ("System role not supported", "<tool_call>"),
    }
    for (name, conversation), (note, held) in cases.items():
        with ChatTemplate(source(name), tokens=TOKENS) as template:
            text = template.render(document(conversation))
            assert held in text, (name, conversation)
            assert note in "".join(template.notes), (name, conversation)
            assert bool(template.notes) == bool(note)
            assert text.startswith(("<s>", "<|im_start|>"))  # by the template, in whatever form


def test_a_template_that_raises_falls_back_once_told() -> None:
    with ChatTemplate("{{ raise_exception('never') }}") as template:
        texts = [template.render(document("chat")), template.render(document("system"))]
        assert template.notes == ["chat template: 2 x plain transcript without the template (it says: never)"]
    assert texts[1] == "system: Be brief.\n\n\nuser: Hi\n\nassistant:  Hello \n"
    assert texts == [render(document("chat"), None), render(document("system"), None)]


def test_plain_transcripts_hold_tools_calls_and_results() -> None:
    text = render(document("tools"), None)
    for held in ('{"name": "get_tide"', "Málaga <b>", "error: <no sea>", "system: Use functions.", "21 °C."):
        assert held in text


def test_texts_are_not_templated() -> None:
    made = Document("long", text="{{ as it is }}\n")
    assert render(made, None) == "{{ as it is }}\n"
    with ChatTemplate("<{{ messages[0].content }}>") as template:
        assert render(made, template) == "{{ as it is }}\n"


def test_documents_do_not_leak_into_each_other() -> None:
    keeper = "{% set _ = messages.append({'content': 'kept'}) %}{{ messages | length }}{{ messages[0].content }}"
    one = Document("chat", messages=({"role": "user", "content": "word"},))
    with ChatTemplate(keeper) as template:
        assert [template.render(one) for _ in range(3)] == ["2word"] * 3


def test_renderer_comes_back_after_it_was_closed() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    one = Document("chat", messages=({"role": "user", "content": "word"},))
    assert render_all([one, one], template) == ["word", "word"]
    assert render_all([one], template) == ["word"]


def test_the_embedded_model_renders_the_built_in_corpus() -> None:
    with open_model(embedded_model()) as model:
        template = ChatTemplate.of(model)
        assert template is not None
        assert template.tokens["eos_token"] == "<|endoftext|>"
        documents = builtin()
        texts = render_all(documents, template)
    conversations = [text for text, made in zip(texts, documents, strict=True) if made.messages]
    assert conversations
    assert all(text.startswith("<|im_start|>") and text.endswith("<|im_end|>\n") for text in conversations)
    assert not any("plain transcript" in note for note in template.notes)


def write_model(path: Path, **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in keys.items():
        {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)](
            "tokenizer." + key.replace("__", "."), value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_templates_of_a_model(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.gguf",
        chat_template="{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ messages[-1].content }}",
        chat_template__tool_use="tools {{ tools | tojson }}{{ messages | tojson }}",
        ggml__tokens=["<s>", "</s>"],
        ggml__bos_token_id=0,
        ggml__eos_token_id=1,
        ggml__unknown_token_id=7,
    )
    with open_model(path) as model, ChatTemplate.of(model) or pytest.fail("no template") as template:
        assert template.render(Document("chat", messages=({"role": "user", "content": "hi"},))) == "<s></s>Falsehi"
        assert template.render(document("tools")).startswith('tools [{"type": "function"')
        assert template.notes == []


def test_models_without_a_usable_template(tmp_path: Path) -> None:
    with open_model(write_model(tmp_path / "none.gguf", ggml__tokens=["a"])) as model:
        assert ChatTemplate.of(model) is None
    refused = {
        "number.gguf": (3, r"number\.gguf: tokenizer\.chat_template must be a string"),
        "long.gguf": ("x" * (MAX_TEMPLATE + 1), r"long\.gguf: \d+ characters"),
    }
    for name, (value, message) in refused.items():
        path = write_model(tmp_path / name, chat_template=value)
        with open_model(path) as model, pytest.raises(InputError, match=message):
            ChatTemplate.of(model)


def test_a_broken_template_is_named_with_its_line() -> None:
    with ChatTemplate("fine\n{% if %}", name="the chat template of m.gguf") as template:
        with pytest.raises(InputError, match=r"of m\.gguf is not a valid jinja2 template: line 2") as caught:
            template.render(document("chat"))
        assert "plain transcripts" in str(caught.value.hint)
