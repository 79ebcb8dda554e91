"""What a run found: a JSON file from the first line on, and the GPU's part of docs/performance.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby
from math import inf, isnan
from pathlib import Path
from typing import Any

from openxlstm.bench import page

TITLES = {
    "mlstm": "mLSTM over a sequence",
    "step": "A decoding step of the mLSTM, in place",
    "slstm": "sLSTM over a sequence",
    "train": "A training step",
    "decode": "Decoding by a CUDA graph",
}
NEEDS = {  # stage: the operations whose parity must be green before it is timed
    "mlstm": ("mlstm",),
    "step": ("mlstm_step",),
    "slstm": ("slstm",),
    "train": ("mlstm",),
    "decode": ("mlstm", "mlstm_step", "slstm"),
    "compilations": (),
    "curve": ("mlstm", "slstm"),
}


class Report:
    """Everything that was found, kept on disk as it comes, so that a run that is cut keeps what it measured."""

    def __init__(self, facts: dict[str, Any], file: Path) -> None:
        self.facts, self.file, self.found = facts, file, list[dict[str, Any]]()
        self.save()

    def add(self, finding: dict[str, Any]) -> None:
        """Take a finding, and keep it."""
        if finding not in self.found:
            self.found.append(finding)
            self.save()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All findings of a kind."""
        return [one for one in self.found if one["kind"] == kind]

    def red(self, operation: str) -> str | None:
        """Why no figure may be taken of an operation."""
        cases = [one for one in self.of("parity") if one["op"] == operation]
        wrong = [one["case"] for one in cases if not one["green"]]
        wrong += [one["case"] for one in self.of("failed") if one["case"].startswith(f"{operation},")]
        if wrong:
            return f"{len(wrong)} configurations of {operation} are not equal to the definition: {'; '.join(wrong[:3])}"
        return None if cases else f"no configuration of {operation} was compared"

    def refuses(self, stage: str) -> str | None:
        """Why a stage may not be timed."""
        return next((why for operation in NEEDS[stage] if (why := self.red(operation))), None)

    @property
    def green(self) -> bool:
        """Nothing was wrong and nothing failed. What was left for want of time is no failure, and is said."""
        return all(one.get("green", True) for one in self.found) and not self.of("failed")

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"facts": self.facts, "found": self.found}, indent=1), encoding="utf-8")
        os.replace(part, self.file)

    def markdown(self) -> str:
        """The part of the page."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        facts = self.facts
        yield "## On a GPU"
        yield ""
        yield f"Written by `{facts['command']}` on {facts['date']}; every number is a measurement of that run."
        yield "Sides take turns, each from a cold second-level cache; medians, fastest and slowest in brackets. *times"
        yield "ours*: the side's median over ours. *of ceiling*: the share of a large bf16 matrix product (FLOP) or of"
        yield "a copy (GB) in the same rounds; of a training step, its FLOP over those of that product."
        yield ""
        yield f"- Device: {facts['device']}; {', '.join(f'{k} {v}' for k, v in facts['versions'].items() if v)}."
        yield f"- Peers: {'; '.join(f'{name} {said}' for name, said in facts['peers'].items())}."
        yield from self._parity()
        missing = {one["peer"]: one["reason"] for one in self.of("missing")}
        yield from (f"- Not compared: {peer}: {reason}." for peer, reason in missing.items())
        yield from (f"- Failed: {one['case']}: {one['reason']}." for one in self.of("failed"))
        yield from (f"- Not run: {one['case']}: {one['reason']}." for one in self.of("left"))
        yield from (f"- Compilations: {one['compilations']}." for one in self.of("fact") if "compilations" in one)
        for one in self.of("curve"):
            losses = ", ".join(f"step {n + 1}: {a:.3f} / {b:.3f}" for n, a, b in one["shown"])
            verdict = f"{'within' if one['green'] else 'beyond'} the {100 * one['limit']:.0f} % that are allowed"
            yield f"- {one['steps']} steps of {one['model']}, loss in bf16 on the GPU / in fp32 on the CPU: {losses};"
            yield f"  at most {100 * one['apart']:.2f} % apart, {verdict}."
        if not self.facts["figures"]:
            yield from (
                f"- Ran, without a clock: {one['row']['case']}: {one['row']['side']}." for one in self.of("row")
            )
            return
        for suite, title in TITLES.items():
            found = [one["row"] for one in self.of("row") if one["suite"] == suite]
            if found:
                yield from ("", f"### {title}")
            for case, sides in groupby(found, key=lambda row: row["case"]):
                yield from page.table(case, sides)

    def _parity(self) -> Iterator[str]:
        for operation in ("mlstm", "mlstm_step", "slstm"):
            cases = [one for one in self.of("parity") if one["op"] == operation]
            if not cases:
                continue
            worst = max(cases, key=lambda one: inf if isnan(one["error"]) else one["error"] / one["limit"])
            green = sum(one["green"] for one in cases)
            yield f"- Parity of `{operation}` with the definition in float64: {green} of {len(cases)} configurations;"
            error = f"{worst['error']:.1e} of {worst['limit']:.0e}"
            yield f"  nearest to its limit: {worst['case']}, {worst['worst']}, {error}."
