"""Only what was checked and measured as it lies there is published, and the table says of no other bytes that they are
proven."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from apex_quant.errors import InputError, NativeError
from apex_quant.pipeline import jobs
from apex_quant.pipeline.context import PhaseEvent
from apex_quant.pipeline.state import State
from apex_quant.pipeline.status import status
from apex_quant.publishable import publishable
from tests.hub.conftest import hub, token, waits  # noqa: F401 -- fixtures
from tests.hub.mock import MockHub
from tests.pipeline.conftest import ran, small_run

PUBLISH: dict[str, Any] = {"publish": {"repo": "me/Small"}, "yes": True}
OTHER_BYTES: dict[str, Any] = {"quantize": {"override_kv": ["general.description=str:another"]}}


def phases(*names: str) -> dict[str, Any]:
    return {"phases": {"only": list(names)}}


@pytest.mark.usefixtures("waits", "token")
class TestPublishing:
    def test_files_that_were_never_verified(self, hub: MockHub, again: Path) -> None:  # noqa: F811
        state = State(again / "work").load()
        del state.records["verify"]["quality"], state.records["evaluate"]
        state.save()
        with pytest.raises(InputError) as caught:
            small_run(again, **PUBLISH, phases={"skip": ["verify", "evaluate", "report"]})
        assert caught.value.message == (
            "not published: Small-APEX-I-Compact.gguf: phase evaluate has not run; "
            "Small-APEX-Quality.gguf: phase verify has not run"
        )
        assert hub.repos == {}

    def test_without_measurements_verification_is_enough(self, hub: MockHub, again: Path) -> None:  # noqa: F811
        state = State(again / "work").load()
        del state.records["evaluate"]
        state.save()
        small_run(again, **PUBLISH, evaluate={"suite": "none"}, phases={"skip": ["report"]})
        assert "Small-APEX-Quality.gguf" in hub.repos["me/Small"].files

    def test_files_that_were_encoded_again(self, hub: MockHub, again: Path) -> None:  # noqa: F811
        made = small_run(again, **OTHER_BYTES, **phases("recipes", "quantize"))
        assert [(one.verified, one.kld, one.results) for one in made.files] == [(False, None, None)] * 2
        assert [(one.verified, one.kld) for one in status(again / "work").files] == [(False, None)] * 2
        with pytest.raises(InputError, match=r"Quality\.gguf: encoded again since phase verify"):
            small_run(again, **OTHER_BYTES, **PUBLISH, **phases("publish"))
        small_run(again, **OTHER_BYTES, **phases("verify"))
        with pytest.raises(InputError, match=r"Quality\.gguf: encoded again since phase evaluate"):
            small_run(again, **OTHER_BYTES, **PUBLISH, **phases("publish"))
        assert hub.repos == {}
        made = small_run(again, **OTHER_BYTES, **phases("evaluate"))
        assert [(one.verified, one.kld is not None) for one in made.files] == [(True, True)] * 2
        small_run(again, **OTHER_BYTES, **PUBLISH, **phases("publish"))
        assert "Small-APEX-Quality.gguf" in hub.repos["me/Small"].files

    def test_a_report_of_other_results(self, hub: MockHub, again: Path) -> None:  # noqa: F811
        small_run(again, phases={}, report={"formats": ["md"]})
        small_run(again, **OTHER_BYTES, **phases("recipes", "quantize", "verify", "evaluate"))
        with pytest.raises(InputError, match="report and card: of other results"):
            small_run(again, **OTHER_BYTES, **PUBLISH, **phases("publish"))
        assert hub.repos == {}

    def test_a_file_that_was_changed_since(self, hub: MockHub, again: Path) -> None:  # noqa: F811
        with (again / "work/release/Small-APEX-Quality.gguf").open("ab") as file:
            file.write(b"more")
        with pytest.raises(InputError, match=r"Quality\.gguf was changed"):  # no longer asked for, and still there
            small_run(again, tiers=["i-compact"], **PUBLISH, **phases("publish"))

    def test_verifying_alone_releases_no_file(self, hub: MockHub, again: Path) -> None:  # noqa: F811
        """Each phase has a note of its own: a mean KLD above the ceiling is not verify's to forgive."""
        low: dict[str, Any] = {"verify": {"generate": 8, "kld_ceiling": {"i-compact": 1e-6}}}
        small_run(again, **low)
        made = small_run(again, **low, **phases("verify"), force=True)
        assert ran(made) == {"verify": ("quality", "i-compact")}
        assert [one.tier for one in made.quarantined] == ["i-compact"]
        with pytest.raises(InputError, match=r"I-Compact\.gguf: quarantined: mean KLD"):
            publishable(again / "work/release")
        with pytest.raises(InputError, match=r"I-Compact\.gguf: quarantined: mean KLD"):
            small_run(again, **low, **PUBLISH, **phases("publish"))


def test_a_killed_child_is_no_verdict(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ran out while the file wrote its text: status 5, no note, and the same command goes on."""

    def killed(*_: object) -> None:
        raise NativeError("the process that was generating ended with signal SIGKILL", signal=signal.SIGKILL)

    given: dict[str, Any] = {"tiers": ["quality"], "verify": {"generate": 7}, **phases("verify")}
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "generate", killed)
        with pytest.raises(NativeError, match="SIGKILL") as caught:
            small_run(again, **given)
    assert caught.value.exit_code == 5
    assert not list((again / "work/release").glob("*.quarantine.json"))
    assert "quality" not in json.loads((again / "work/state.json").read_text())["phases"]["verify"]
    made = small_run(again, **given)
    assert ran(made) == {"verify": ("quality",)}
    assert made.files[0].verified


@pytest.mark.parametrize(("ended", "number"), [("exit status 1", None), ("signal SIGABRT", signal.SIGABRT)])
def test_a_file_that_the_library_refuses_is_quarantined(
    again: Path, monkeypatch: pytest.MonkeyPatch, ended: str, number: int | None
) -> None:
    """Whether it says so or fails an assertion."""

    def refused(*_: object) -> None:
        raise NativeError(f"the process that was generating ended with {ended}", signal=number)

    monkeypatch.setattr(jobs, "generate", refused)
    made = small_run(again, tiers=["quality"], verify={"generate": 7}, **phases("verify"))
    assert [one.quarantined for one in made.quarantined] == [
        f"llama.cpp cannot run it: the process that was generating ended with {ended}"
    ]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"evaluate": {"suite": "none"}}, "evaluate.suite is none"),
        ({"evaluate": {"only": ["ppl"]}}, "evaluate.only leaves kld out"),
        ({"phases": {"skip": ["evaluate", "report"]}}, "phase evaluate is skipped"),
    ],
)
def test_a_ceiling_that_nothing_is_held_against_is_said(again: Path, given: dict[str, Any], why: str) -> None:
    state = State(again / "work").load()
    del state.records["verify"]["quality"], state.records["evaluate"]
    state.save()
    said: list[PhaseEvent] = []
    made = small_run(
        again, tiers=["quality"], **given, progress=lambda e: said.append(e) if isinstance(e, PhaseEvent) else None
    )
    notes = [event.text for event in said if event.kind == "note" and event.phase == "verify"]
    assert notes == [f"no file's mean KLD is held against the ceiling of its tier: {why}"]
    assert (made.files[0].verified, made.files[0].kld, made.files[0].ceiling) == (True, None, None)


def test_the_ceiling_is_told(again: Path) -> None:
    assert [(one.tier, one.ceiling) for one in status(again / "work").files] == [("quality", 0.3), ("i-compact", 0.9)]
