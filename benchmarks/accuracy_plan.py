"""The plan of the accuracy benchmark, from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Entry:
    """One model on one data set: to be tuned, as it ships, or a variant of a tuned one.

    Attributes:
        data (str): name of the data set.
        model (str): name of the model or variant.
        files (dict[str, str]): ``train`` and ``valid`` below the root of the data; empty for data
            that are generated.
        overrides (list[str]): Hydra overrides of every run.
        space (dict[str, list[str]]): choices for each tuned key, in Hydra's syntax; empty for a
            model that is taken as it ships.
        tune_rows (int | None): rows of train, by chance but always the same, that tuning sees.
        of (str | None): the tuned entry whose choices a variant takes over.
        variant (list[str]): what the variant changes, after these choices.
    """

    data: str
    model: str
    files: dict[str, str]
    overrides: list[str]
    space: dict[str, list[str]] = field(default_factory=dict)
    tune_rows: int | None = None
    of: str | None = None
    variant: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``DATA/MODEL``."""
        return f"{self.data}/{self.model}"


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        trials (int): of every tuned model alike.
        seeds (list[int]): of every model once it is tuned.
        entries (list[Entry]): models and variants on all data sets.
    """

    trials: int
    seeds: list[int]
    entries: list[Entry]

    def entry(self, name: str) -> Entry:
        """The entry of that ``DATA/MODEL``."""
        return next(entry for entry in self.entries if entry.name == name)


def load_plan(path: Path) -> Plan:
    """Reads a plan: every model on every data set, and the variants that a data set names.

    Args:
        path (Path): YAML; see ``accuracy.yaml``.

    Returns:
        Plan: the plan.
    """
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    entries = []
    for data, its in raw["data"].items():
        files, common = its.get("files", {}), its["overrides"]
        for model, settings in raw["models"].items():
            entries.append(
                Entry(
                    data,
                    model,
                    files,
                    [*common, *settings["overrides"], *its.get(model, [])],
                    _choices(its.get("space", {}) | settings.get("space", {})),
                    its.get("tune_rows"),
                )
            )
        for variant, settings in its.get("variants", {}).items():
            own = settings["overrides"]
            if "of" in settings:
                of = next(e for e in entries if e.name == f"{data}/{settings['of']}")
                entries.append(Entry(data, variant, files, of.overrides, of=of.name, variant=own))
            else:
                entries.append(Entry(data, variant, files, [*common, *own]))
    return Plan(raw["trials"], raw["seeds"], entries)


def _choices(space: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {
        key: ["null" if choice is None else str(choice).replace(" ", "") for choice in choices]
        for key, choices in space.items()
    }
