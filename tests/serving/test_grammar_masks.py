"""Grammars followed in another process: what the library's own sampler gives, and what would end or hang it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from apex_quant import embedded_model
from apex_quant.serving.grammar_masks import Masks, masked
from apex_quant.serving.grammars import GrammarError, check_grammar, schema_grammar

ENOUGH = 120.0  # seconds that nothing here takes


def chain(rules: int, rule: str) -> str:
    """`rules` of the form `rule`, each of which goes on with the next."""
    lines = [f"r{i} ::= " + rule.format(next=f"r{i + 1}") for i in range(1, rules)]
    return "\n".join(["root ::= r1", *lines, f'r{rules} ::= "a"'])


GROWING: dict[str, Any] = {
    "$defs": {
        "x": {
            "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": count} for count in (1, 2)],
        }
    },
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/x"}},
    "required": ["x"],
}
UNSATISFIABLE = {"type": "string", "pattern": "^[^\\x00-\\UFFFFFFFF]$"}
ATTACKS = {
    "allows nothing": 'root ::= "a" [^\\x00-\\UFFFFFFFF]',
    "allows nothing, by a schema": schema_grammar(UNSATISFIABLE),
    "left recursion in 2^40 ways": chain(40, "{next} | {next}"),
    "2^40 ways at the start": chain(40, '{next} "a" | {next} "b"'),
    "twice as many ways with each token": 'root ::= "a" root "b" | "a" root "c"',
    "twice as many, by a schema": schema_grammar(GROWING),
}


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    from apex_quant.native.bindings import bindings

    bindings()
    from llama_cpp import Llama

    model = Llama(str(embedded_model()), n_ctx=512, n_threads=1, verbose=False)
    yield model
    model.close()


@pytest.fixture
def masks(llama: Any) -> Iterator[Masks]:
    found = Masks(embedded_model(), llama.n_vocab(), seconds=ENOUGH, memory=256 << 20)
    yield found
    found.close()


def said(llama: Any, grammar: str, *, seed: int = 1, **words: Any) -> str:
    from llama_cpp import LlamaGrammar

    found = llama("Say: ", max_tokens=48, grammar=LlamaGrammar.from_string(grammar), seed=seed, **words)
    text: str = found["choices"][0]["text"]
    return text


def test_the_text_is_what_the_librarys_own_sampler_gives(
    llama: Any, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_cpp.llama_grammar import JSON_GBNF

    texts = [said(llama, JSON_GBNF, seed=seed, repeat_penalty=1.3) for seed in (1, 2)]
    monkeypatch.setattr(llama, "generate", masked(llama.generate, masks))
    assert [said(llama, JSON_GBNF, seed=seed, repeat_penalty=1.3) for seed in (1, 2)] == texts
    assert texts[0] != texts[1]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_no_more_than_its_own_process(
    name: str, llama: Any, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_grammar(ATTACKS[name])  # nothing in its text gives it away
    monkeypatch.setattr(llama, "generate", masked(llama.generate, masks))
    assert said(llama, 'root ::= "yes"') == "yes"
    masks.seconds = 1.0
    with pytest.raises(GrammarError):
        # the token that goes on for ever is the likely one
        said(llama, ATTACKS[name], logit_bias=dict.fromkeys(llama.tokenize(b"a[", add_bos=False), 50.0))
    masks.seconds = ENOUGH
    assert said(llama, 'root ::= "yes"') == "yes"


def test_a_grammar_that_cannot_be_read(masks: Masks) -> None:
    for bad in ("root ::= nowhere", "# nothing", "root ::= ("):
        with pytest.raises(GrammarError, match="cannot be read"):
            masks.begin(bad)


def test_what_it_allows(llama: Any, masks: Masks) -> None:
    mask = masks.begin('root ::= "a" | "b"')
    scores = np.arange(llama.n_vocab(), dtype=np.float32)
    prompt = np.array([1, 2, 3], np.int32)
    left = np.flatnonzero(np.isfinite(mask(prompt, scores)))
    assert sorted(llama.detokenize([int(token)]) for token in left) == [b"a", b"b"]
    after = np.flatnonzero(np.isfinite(mask(np.append(prompt, left[0]), scores)))
    assert mask.error is None
    assert llama.token_eos() in after


def test_it_ends_with_whoever_asks_even_in_the_midst_of_an_answer(masks: Masks) -> None:
    masks.begin('root ::= "a"')
    process = masks._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.write(json.dumps({"grammar": ATTACKS["left recursion in 2^40 ways"]}).encode() + b"\n")
    process.stdin.close()  # as the system does for one that died
    assert process.wait(timeout=ENOUGH) == 0
