"""The page's section on run health: what was seen, when, and what to do; or what was looked for."""

from __future__ import annotations

from dpo_studio.console.text import count
from dpo_studio.reports.markup import esc, section
from dpo_studio.runs.detectors import RECENT_PAIRS
from dpo_studio.runs.facts import RunFacts
from dpo_studio.runs.health import HealthFinding, detectors_of, health_of

__all__ = ["health_section"]


def health_section(facts: RunFacts) -> str:
    """Empty for a run without steps: there is nothing that could be well or not."""
    steps = facts.series("loss")[0]
    if not steps:
        return ""
    found = health_of(facts)
    if not found:
        looked_for = "; ".join(detector.title.lower() for detector in detectors_of(facts.saturates))
        said = f"Nothing of what is looked for was seen: {looked_for}."
        few = f" Below {RECENT_PAIRS} pairs a curve shows too little to say more." if _few_pairs(facts) else ""
        return section("health", "Run health", f'<div class="panel"><p>{esc(said + few)}</p></div>')
    body = "".join(_panel(finding, steps[-1]) for finding in found)
    return section("health", "Run health", f'<div class="findings">{body}</div>')


def _few_pairs(facts: RunFacts) -> bool:
    return sum(facts.series("pairs")[1]) < RECENT_PAIRS


def _panel(finding: HealthFinding, last: float) -> str:
    when = f'<span class="number">{_when(finding, last)}</span>'
    saw = esc(finding.saw[0].upper() + finding.saw[1:]).replace(" %", "&nbsp;%")  # no line ends between the two
    return (
        f'<div class="panel finding"><h3>{esc(finding.title)} {when}</h3>'
        f"<p>{saw}.</p>"
        f'<p class="advice"><strong>What to do:</strong> {esc(finding.advice)}.</p></div>'
    )


def _when(finding: HealthFinding, last: float) -> str:
    first = count(finding.first_step)
    if finding.last_step >= last:
        return "at the end" if finding.first_step >= last else f"from step {first} to the end"
    return (
        f"step {first}" if finding.first_step == finding.last_step else f"steps {first} to {count(finding.last_step)}"
    )
