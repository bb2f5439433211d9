from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

EXAMPLES = Path(__file__).parents[2] / "examples"


def parsed(override: str) -> object:
    (result,) = OverridesParser.create().parse_overrides([override])
    return result.value()


@pytest.mark.parametrize("value", ["clicks/dt=1", "[a/dt=1,a/dt=2]", "clicks(1).csv"])
def test_values_that_need_quotes_are_answered_with_quotes(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    explain = importlib.import_module("override_errors").explain
    with pytest.raises(OverrideParseException) as failed:
        parsed(f"data.train={value}")
    message = explain(failed.value, EXAMPLES.parent / "conf")
    assert message.startswith(f"data.train: cannot read {value} (")
    assert "\"data.train='PATH'\"" in message
    assert str(parsed("data.train='clicks/dt=1'")) == "clicks/dt=1"
