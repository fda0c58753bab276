"""The picture: a bar per variant, of what it sends."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from fp8dist.plan.picture import plot
from tests.unit.plan.test_report import PLAN


def test_bars_are_as_long_as_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saved)
    path = tmp_path / "new" / "plan.png"
    plot(PLAN, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xlabel() == "MB that a rank sends per step"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bfloat16", "rowwise"]
    assert [bar.get_width() for bar in axes.patches[:2]] == [80, 40]  # weights
    # Scales, 0.04 MB of 80, are too thin to be seen.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["weights"]
    assert [text.get_text() for text in axes.texts] == ["80.0 MB", "40.0 MB (0.50 of bfloat16)"]
