"""docs/reproduction.md from result lines: per experiment what was asked, what is published, what came out, a picture.

Nothing on the page is typed: a number is a line's, a verdict is a rule's, an experiment without lines says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from openxlstm.experiments.choice import FLOOR, Entry, entries, in_order, judged, paired, said
from openxlstm.experiments.plans import PROFILES, Experiment, Plan, Rule
from openxlstm.experiments.results import Line
from openxlstm.tasks import intervals

SOLVED = 0.95  # a seed counts as having solved a task at this accuracy
MET = {True: "Met", False: "Not met", None: "Too few runs to say"}


def page(experiments: Mapping[str, Experiment], lines: Sequence[Line], pictures: Path, command: str) -> str:
    """The whole page; pictures are drawn into `pictures`, a folder beside it.

    Lines of plans that have changed since are left out, and counted.
    """
    found = {
        (name, profile): mine
        for name, experiment in experiments.items()
        for profile in experiment.profiles
        if (mine := lines_of(experiment, profile, lines))
    }
    used = {line.key for mine in found.values() for line in mine}
    return "\n".join(_page(experiments, found, len(lines) - len(used), pictures, command)) + "\n"


def lines_of(experiment: Experiment, profile: str, lines: Sequence[Line]) -> list[Line]:
    """Those that the profile's plan has made, as it is now, in its order of contestants.

    A plan that reads files does not know here which they were: it is lines of the files that were read last.
    """
    source, plan = experiment.runs_of or experiment.name, experiment.profiles[profile].fingerprint
    mine = [
        line for line in lines
        if (line.experiment, line.profile) == (source, profile) and line.plan.partition("-")[0] == plan
    ]  # fmt: skip
    mine = [line for line in mine if line.plan == mine[-1].plan]
    mine = [line for line in mine if not experiment.order or line.model in experiment.order]
    return in_order(mine, experiment.profiles[profile].models)


def _page(
    experiments: Mapping[str, Experiment],
    found: Mapping[tuple[str, str], list[Line]],
    stale: int,
    pictures: Path,
    command: str,
) -> Iterator[str]:
    yield "# Reproduction"
    yield ""
    yield f"Written by `{command}`; no number on this page is typed."
    yield ""
    yield "Every contestant of a table is trained by one loop on the same samples in the same order, on the same"
    yield "budget, with the same grid of rates; parameters are those between embedding and head. The rate is chosen by"
    yield "validation samples, the numbers are of test samples that no choice has seen. In brackets: of accuracies the"
    yield "worst and the best seed, for a task is solved or it is not; of errors and bits per byte the 95 % interval"
    yield "over seeds (Student); of a single run its own (Wilson, or a bootstrap over documents). *Solved*: seeds"
    yield f"with an accuracy of at least {SOLVED}. A verdict is the outcome of rules that stand beside the experiment"
    yield "in the catalogue; what a verdict is silent about is not claimed. A score also stays below a bound where"
    yield "nothing was learned, so that alone makes no verdict *partly*."
    yield ""
    yield "| experiment | profile | runs | verdict |"
    yield "|---|---|---|---|"
    for name, experiment in experiments.items():
        profiles = [profile for profile in PROFILES if (name, profile) in found]
        for profile in profiles:
            mine = found[name, profile]
            yield f"| [{name}](#{name}) | {profile} | {len(mine)} | {said(experiment, profile, mine)} |"
        if not profiles:
            yield f"| {name} | | 0 | not attempted |"
    for profile in PROFILES:  # runs that stand in several tables count once
        runs = {line.key: line for (_, own), mine in found.items() if own == profile for line in mine}
        trained = [line for line in runs.values() if line.model != FLOOR]
        if trained:
            yield ""
            yield f"Profile {profile}, all together: {len(trained):,} runs, {_took(trained)}."
    if stale:
        yield ""
        yield f"{stale} further lines are of plans that have changed since they were measured; they are not shown."
    for name, experiment in experiments.items():
        profiles = [profile for profile in PROFILES if (name, profile) in found]
        if profiles:
            yield from _section(experiment, {profile: found[name, profile] for profile in profiles}, pictures)


def _section(experiment: Experiment, profiles: Mapping[str, list[Line]], pictures: Path) -> Iterator[str]:
    yield ""
    yield f"## {experiment.name}"
    yield ""
    yield f"{experiment.title}. {experiment.question}"
    for claim in experiment.claims:
        yield ""
        yield f"Published: {claim.text} ({claim.source})."
    for profile, lines in profiles.items():
        yield ""
        yield f"**Profile {profile}**: {said(experiment, profile, lines)}."
        yield ""
        for rule, met in judged(experiment, profile, lines):
            yield f"* {MET[met]}: {_rule(rule)}"
        yield ""
        yield from _table(experiment, profile, entries(lines))
        skipped = [line for line in lines if line.skipped]
        for line in skipped:
            yield ""
            yield f"Not finished: {line.label}, rate {line.rate:g}, seed {line.seed}: {line.skipped}."
        yield ""
        yield f"![{experiment.title}, {profile}](images/{_draw(experiment, profile, entries(lines), pictures)})"
        yield ""
        yield _provenance(experiment, profile, lines)


def _rule(rule: Rule) -> str:
    if rule.below is not None:
        return f"*{rule.metric}* of `{rule.model}` is below that of `{rule.below}`, surely (paired, 95 %)."
    bound = f"at least {rule.at_least}" if rule.at_least is not None else f"at most {rule.at_most}"
    if rule.above_floor is not None:
        bound = f"at least {rule.above_floor} more than the best rule without a model"
    seeds = f"in {rule.seeds} seeds or more" if rule.seeds else "in all seeds"
    return f"`{rule.model}` reaches {'scaled ' if rule.scaled else ''}*{rule.metric}* of {bound} {seeds}."


def _table(experiment: Experiment, profile: str, found: Sequence[Entry]) -> Iterator[str]:
    plan = experiment.profiles[profile]
    ordered = sorted(found, key=lambda entry: experiment.order.index(entry.model)) if experiment.order else found
    exact, text = plan.unit == "accuracy", plan.unit == "bits per byte"
    shown = [name for name in experiment.metrics(profile) if any(entry.values(name) for entry in found)]
    last = ["solved"] if exact else [f"{shown[0]}, less {'the row above' if experiment.order else 'the first'}"]
    columns = ["", "parameters", "rate", "seeds", *shown, *(last if exact or text else [])]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for index, entry in enumerate(ordered):
        if entry.is_floor:
            cells = [f"*no model: {entry.label}*", "", "", "", *(_cell(entry, test, exact) for test in shown), ""]
            yield "| " + " | ".join(cells[: len(columns)]) + " |"
            continue
        rates = len({line.rate for line in entry.tried})
        cells = [
            f"{entry.label} `{entry.model}`", f"{entry.lines[0].parameters:,}", f"{entry.rate:g} of {rates}",
            str(len(entry.lines)), *(_cell(entry, test, exact) for test in shown),
        ]  # fmt: skip
        if exact:
            values = entry.values(shown[-1])
            cells.append(f"{sum(value >= SOLVED for value in values)} of {len(entry.lines)}")
        elif text:
            other = ordered[index - 1] if experiment.order else ordered[0]
            cells.append(_difference(entry, other, shown[0], shown[0] == plan.headline) if index else "")
        yield "| " + " | ".join(cells) + " |"


def _difference(ours: Entry, theirs: Entry, metric: str, of_documents: bool) -> str:
    """Paired over seeds; of one seed over documents, if the metric is a mean of theirs and there are several."""
    found = paired(ours, theirs, metric)
    if found is None:
        return "–"
    mean, interval = found
    if interval is not None:
        return f"{mean:+z.3f} ({interval[0]:+z.3f} to {interval[1]:+z.3f})"
    if of_documents:
        others = {line.seed: line for line in theirs.lines if metric in line.metrics}
        one = next(line for line in ours.lines if line.seed in others and metric in line.metrics)
        sizes, before = one.curve["document bytes"], others[one.seed].curve["document bits"]
        drawn = intervals.difference((before, sizes), (one.curve["document bits"], sizes))
        if drawn.low is not None:
            return f"{drawn.value:+z.3f} ({drawn.low:+z.3f} to {drawn.high:+z.3f}, over documents)"
    return f"{mean:+z.3f}"


def _cell(entry: Entry, metric: str, exact: bool) -> str:
    """Mean and spread: of accuracies the worst and the best seed, for they are solved or not; else the interval."""
    mean = entry.mean(metric)
    if mean is None:
        return "–"
    interval = entry.extremes(metric) if exact and len(entry.lines) > 1 else entry.interval(metric)
    return f"{mean:z.3f}" if interval is None else f"{mean:z.3f} ({interval[0]:z.3f} to {interval[1]:z.3f})"


def _provenance(experiment: Experiment, profile: str, lines: Sequence[Line]) -> str:
    plan, lines = experiment.profiles[profile], [line for line in lines if line.model != FLOOR]
    if not lines:
        return "No model has been run."
    first = lines[0]
    commits = sorted({line.git or "no checkout" for line in lines})
    machine = first.machine
    files = " --data FOLDER" if isinstance(plan, Plan) and plan.reads_files else ""
    return (
        f"{len(lines)} runs of {plan.volume}, {_took(lines)}; "
        f"{machine['device']}, {machine['threads']} thread(s) a run, torch {machine['torch']}; commit "
        f"{', '.join(commits)}; plan `{first.plan}`. `xlstm eval {experiment.name} --profile {profile}{files}`"
    )


def _took(lines: Sequence[Line]) -> str:
    """How long, on processors, and on clocks as if no run had had another beside it."""
    wall, cpu = sum(line.wall_s for line in lines), sum(line.cpu_s for line in lines)
    return f"{cpu / 3600:.1f} hours of one core ({wall / 3600:.1f} by the clock, added up)"


def _draw(experiment: Experiment, profile: str, found: Sequence[Entry], folder: Path) -> str:
    """Draw and name the picture. Matplotlib is needed here and only here."""
    from openxlstm.experiments import pictures

    found = [entry for entry in found if not entry.is_floor]
    name = f"{experiment.name}-{profile}"
    plan = experiment.profiles[profile]
    under = f"xlstm eval {experiment.name} --profile {profile}   plan {plan.fingerprint}"
    title = f"{experiment.title}, {profile}"
    if experiment.picture == "length":
        figure = pictures.over_length(title, found, plan.metrics, plan.chance, under)
    elif experiment.picture == "tokens":
        figure = pictures.over_tokens(title, found, under)
    elif experiment.picture == "positions":
        figure = pictures.over_positions(title, found, under)
    else:
        figure = pictures.over_steps(title, found, plan.unit, plan.chance, under)
    pictures.save(figure, folder / name)
    return f"{name}.png"
