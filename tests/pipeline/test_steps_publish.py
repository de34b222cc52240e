"""What report and publish write beside the files: the card, and shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from apex_quant.pipeline import steps_publish
from apex_quant.pipeline.config import load_config
from apex_quant.pipeline.context import Context, PhaseEvent
from apex_quant.pipeline.phases import Item
from apex_quant.pipeline.state import State
from apex_quant.publishable import publishable
from tests.helpers.generic_models import write_generic


class Killed(BaseException):
    """The process ended here."""


def context(work: Path, said: list[str] | None = None, *, shards: str = "48GB") -> Context:
    def listen(event: object) -> None:
        if isinstance(event, PhaseEvent) and said is not None:
            said.append(event.text)

    config = load_config(None, {"source": "Small-BF16.gguf", "publish.repo": "me/Small", "publish.shards": shards})
    return Context(config, work.resolve(), State(work).load(), listen)


class TestCard:
    @pytest.fixture
    def text(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        text = ["first"]

        def card(place: Path, out: Path, **about: object) -> Path:
            out.write_text(text[0])
            return out

        monkeypatch.setattr("apex_quant.report.card.card", card)
        return text

    def ends(self) -> None:
        """Between the card and the state that says that the phase is finished."""

    def write(self, work: Path, said: list[str] | None = None) -> Path:
        (work / "release/report").mkdir(parents=True, exist_ok=True)
        at = context(work, said)
        made = steps_publish._card(at, Item("", {"base_model": None, "repo": None, "family": []}, {}))
        self.ends()
        at.state.save()
        return made

    @pytest.mark.parametrize("where", [(State, "save"), (Path, "replace"), None])
    def test_a_kill_at_any_moment(
        self, tmp_path: Path, text: list[str], where: tuple[type, str] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        card = self.write(tmp_path)
        text[0] = "second"

        def killed(*about: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(*(where or (TestCard, "ends")), killed)
            with pytest.raises(Killed):
                self.write(tmp_path)
        said: list[str] = []
        for text[0] in ("third", "fourth"):
            assert self.write(tmp_path, said) == card
            assert card.read_text() == text[0]
        assert said == []
        assert [path.name for path in (tmp_path / "release").iterdir() if path.is_file()] == ["README.md"]

    def test_an_edited_one_stays(self, tmp_path: Path, text: list[str]) -> None:
        card = self.write(tmp_path)
        card.write_text("mine")
        said: list[str] = []
        assert self.write(tmp_path, said) == tmp_path.resolve() / "release/report/README.md"
        assert card.read_text() == "mine"
        assert len(said) == 1


class TestShards:
    def test_models_alone_are_cut_and_what_was_cut_goes_with_them(self, again: Path, tmp_path: Path) -> None:
        work, release = again / "work", again / "work/release"
        tensors = {f"v.blk.{number}.weight": ((512, 512), "F16") for number in range(8)}
        write_generic(release / "mmproj-Small.gguf", "clip", tensors, **{"/general__file_type": 1})
        at = context(work, shards="2MB")
        steps_publish._split_large(at)
        assert list(release.glob("mmproj*-of-*")) == []
        found = publishable(release)
        assert [file.path for file in found.files if file.kind == "projector"] == ["mmproj-Small.gguf"]
        assert any(file.path.startswith("Small-APEX-Quality-00001-of-") for file in found.files)
        (release / "Small-APEX-Quality.gguf").rename(tmp_path / "moved.gguf")
        (item,) = steps_publish.publish_items(at)
        steps_publish._split_large(at)
        assert not any(file.path.startswith("Small-APEX-Quality-") for file in publishable(release).files)
        assert steps_publish.publish_items(at) == [item]
