"""The page of a study, results/<study>/report.html: its question and answer first, then everything behind the answer.

One file that needs nothing else: figures are inside, nothing is fetched, and the policy in its head lets a browser run
no script and load no file but what is written here, whatever stands in a response of a model. Tables and figures are
those that `outputs` names. Equal results give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from discobeta.design.arms import CORNERS, Arm
from discobeta.design.config import read_by
from discobeta.design.stages import STAGES
from discobeta.design.study import Run
from discobeta.design.yaml_text import as_yaml
from discobeta.errors import UserError, telling
from discobeta.files import write_text
from discobeta.folders import claim
from discobeta.report import outputs
from discobeta.report.answer import Cell, Finding, cost_ratios, findings, headline, neutrality
from discobeta.report.collect import collect, config_text, provenance
from discobeta.report.effects import short_label
from discobeta.report.figures import save
from discobeta.report.html import (
    Content,
    Element,
    add,
    boxed,
    cell_of,
    document,
    folded,
    grid,
    paragraphs,
    plain,
    table_of,
    tag,
)
from discobeta.report.measures import METRICS, Metric, one_line
from discobeta.report.outputs import Output
from discobeta.report.render import NOTHING, capitalised, number
from discobeta.report.results import Found, Results, seeds_text
from discobeta.report.style import label_of

NAME = "report.html"
STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
CAPTIONS = Path(__file__).parents[3] / "workflow" / "report"
"""The texts beside tables and figures; of a package without its repository the page has none."""

LARGEST_SVG = 400_000
"""Bytes of a figure: one that is larger is put into the page as PNG."""

WIDE = 5.5
"""Inches: what is wider has a row of its own."""

PROMPTS = 4
"""How many prompts of a stage are shown with the responses to them."""

LONGEST_TEXT = 2_000
"""Characters of a prompt or a response."""

FIRST = ("effects", "reward-kl-")
"""What the names of figures begin with that stand beside the answer."""

QUESTION = (
    "Preference alignment assumes that a response's reward is a number, and that one β weighs the reference against "
    "the feedback for every prompt. Disco makes the reward a Gaussian; dynamic β (LeDPO) lets the reference model "
    "scale β for each prompt. Does either help, do they add up, and what do they cost?"
)


def write(results: Results, *, drawn: bool = False) -> Path:
    """The page, into the study's directory. drawn: whether the figures of these results stand there already."""
    directory, study = results.study.directory, results.study
    there = [study.figures_directory / name for output in outputs.figures(study) for name in output.files if drawn]
    if absent := next((path for path in there if not path.is_file()), None):
        raise UserError(f"{absent} is not there: `discobeta figures` draws it")
    text = page(results, results.study.figures_directory if drawn else None)
    claim(directory, "discobeta page", [NAME])
    write_text(directory / NAME, text)
    return directory / NAME


def page(results: Results, drawn: Path | None = None) -> str:
    """The page as a text. drawn: the folder with the figures of these results, if they have been drawn."""
    study = results.study
    with tempfile.TemporaryDirectory() as temporary:
        folder = drawn or Path(temporary)
        figures = {output: _figure(output, results, folder, drawn is not None) for output in outputs.figures(study)}
    tables = {output: output.make(results) for output in outputs.tables(study)}
    beside = [output for output in figures if output.name.startswith(FIRST)]
    sections = [
        _answer(results, [figures[output] for output in beside]),
        *(_stage(stage, tables, figures, beside) for stage in study.stages),
        *_across(tables, figures, beside),
        _responses(results),
        _runs(results),
        _made_of(results),
    ]
    sections = [section for section in sections if section is not None]
    style, script = STYLE.read_text(encoding="utf-8"), SCRIPT.read_text(encoding="utf-8")
    links = [tag("li", tag("a", section.find("h2").text, href=f"#{section.get('id')}")) for section in sections]
    body = tag(
        "body",
        tag("a", "Skip to the answer", href="#answer", class_="skip"),
        tag("header", tag("p", "discobeta", class_="kicker"), tag("h1", study.name), _facts(results)),
        tag("nav", tag("ul", links), aria_label="Sections"),
        tag("main", _missing(results), sections),
        tag("script"),
    )
    body.find("script").text = script  # as it is: `add` would take control characters for text
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="discobeta page"),
        tag("title", f"{study.name}: Disco and dynamic β"),
        tag("style"),
    )
    head.find("style").text = style
    return document(tag("html", head, body, lang="en"))


def _policy(style: str, script: str) -> str:
    """Nothing from anywhere but images in the page, and of scripts and styles only these."""
    allowed = {
        name: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for name, text in (("style-src", style), ("script-src", script))
    }
    rules = {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", **allowed}
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _section(id: str, title: str, *content: Content, class_: str | None = None) -> Element:
    return tag("section", tag("h2", title), *content, id=id, class_=class_)


# --- what the page is about


def _facts(results: Results) -> Element:
    study, made_by = results.study, provenance(results)
    measured = sum(found.absence is None for found in results.found.values())
    data = "the embedded world, whose truth is known" if study.world else study.data(study.draws()[0]).get("dataset")
    base = "trained by the study" if study.sft else study.model.get("model_name_or_path")
    facts: list[tuple[str, str]] = [
        ("Runs", f"{measured} of {len(results.found)}"),
        ("Seeds", seeds_text(study.seeds)),
        ("Data", str(data)),
        ("Base", str(base)),
        ("Commit", made_by["commit"]),
        ("Config", made_by["config"]),
    ]
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts], class_="facts")


def _missing(results: Results) -> Element | None:
    """What does not count, by name, before anything else is read."""
    absent = [run for run, found in results.found.items() if found.absence]
    if not absent:
        return None
    stages = dict.fromkeys(run.stage for run in absent)
    said = [tag("li", tag("strong", stage), f": {_absent_in(results, stage)}") for stage in stages]
    count = f"{len(absent)} of {len(results.found)} runs do not count yet and are in no number of this page."
    listed = tag("ul", said)
    shown = listed if sum(len("".join(item.itertext())) for item in said) < 600 else folded("Which", listed)
    return tag("div", tag("p", tag("strong", count)), shown, class_="missing", role="note")


def _absent_in(results: Results, stage: str) -> str:
    of_stage = [run for run in results.found if run.stage == stage]
    reasons = {results.absence(run) for run in of_stage}
    if len(reasons) == 1 and len(of_stage) > 1:
        return f"all of its {len(of_stage)} runs ({reasons.pop()})"
    return results.describe_missing(of_stage)


# --- the answer


def _answer(results: Results, figures: list[Element]) -> Element:
    return _section(
        "answer", "Question and answer", tag("p", QUESTION, class_="question"),
        *_four_arms(results), *_said(results), tag("div", figures, class_="figures") if figures else None,
    )  # fmt: skip


def _four_arms(results: Results) -> list[Content]:
    answer, study = headline(results), results.study
    if not answer.columns:
        return [tag("p", "Nothing has been measured yet.")]
    if not answer.rows:
        return [tag("p", "This study trains no arm without idle heads.")]
    of = [stage for stage, _ in answer.columns]
    spans = {stage: of.count(stage) for stage in of}
    first = [stage != before for stage, before in zip(of, ["", *of[:-1]], strict=True)]
    titles = [
        tag("th", STAGES[stage].title, tag("span", f" ({stage})", class_="nothing"), scope="colgroup",
            colspan=str(spans[stage]), class_="start")
        for stage in spans
    ]  # fmt: skip
    names = [
        tag("th", one_line(metric.header), scope="col", class_="number start" if begins else "number")
        for (_, metric), begins in zip(answer.columns, first, strict=True)
    ]
    spread = [[cells[place] for _, cells in answer.rows] for place in range(len(answer.columns))]
    body = []
    for arm, cells in answer.rows:
        made, place = [], 0
        while place < len(cells):
            cell, (stage, metric) = cells[place], answer.columns[place]
            start = " start" if first[place] else ""
            if cell.instead:
                made.append(tag("td", cell.instead, class_=f"instead{start}", colspan=str(spans[stage])))
                place += spans[stage]
                continue
            made.append(tag("td", _values(cell, metric, spread[place]), class_=f"number{start}"))
            place += 1
        body.append(tag("tr", tag("th", label_of(arm), scope="row"), made))
    seeds = len(study.seeds)
    caption = (
        f"The arms without idle heads: mean over {seeds} seeds, and every seed as a dot" if seeds > 1
        else "The arms without idle heads, of one seed: no difference between arms is to be believed"
    )  # fmt: skip
    notes = [
        "A column's dots share one scale, from its lowest to its highest value; the thin line is the baseline's mean. "
        "Below a mean stands its difference to the baseline, paired over seeds, and in how many seeds it points that "
        "way. ↑ more is better, ↓ less is better.",
    ]
    if any(metric.name == "excess_kl" for _, metric in answer.columns):
        notes.append(
            "KL(truth ‖ model) is the divergence from the known probabilities of held-out preferences, nats per pair."
        )
    if any(metric.name == "kl_per_sequence" for _, metric in answer.columns):
        notes.append("The KL of a policy to the reference is neither good nor bad: a reward is bought with it.")
    if any(metric.name == "reward_gain" for _, metric in answer.columns):
        notes.append(
            "The truth is not known here, so a policy is judged by its own reward model: reward gains are compared "
            "among the arms with Disco, or among those without it."
        )
    if silent := [stage for stage in study.stages if stage not in spans]:
        notes.append(f"Not measured yet: {', '.join(silent)}.")
    table = tag(
        "table", tag("caption", caption),
        tag("thead", tag("tr", tag("th", "Arm", scope="col", rowspan="2"), titles), tag("tr", names)),
        tag("tbody", body), class_="answer",
    )  # fmt: skip
    return [boxed(table, caption), tag("ul", [tag("li", note) for note in notes], class_="notes")]


def _values(cell: Cell, metric: Metric, column: list[Cell]) -> list[Content]:
    """The mean, a dot for each seed, and what the arm differs by from the baseline."""
    if not cell.values:
        return [tag("span", NOTHING, class_="nothing")]
    parts: list[Content] = [tag("span", number(cell.mean, metric.decimals), class_="mean")]
    if len(cell.values) < cell.expected:
        parts.append(tag("span", f" {len(cell.values)} of {cell.expected} seeds", class_="interval"))
    parts.append(_dots(cell, metric, column))
    if differences := cell.differences:
        mean = sum(differences) / len(differences)
        agreeing = sum((value < 0) == (mean < 0) for value in differences if value)
        sign = "+" if round(mean, metric.decimals) > 0 else ""
        text = f"{sign}{number(mean, metric.decimals)}"
        text += f", {agreeing} of {len(differences)}" if any(differences) and len(differences) > 1 else ""
        parts.append(tag("span", text, class_="difference"))
    return parts


WIDTH, HEIGHT, EDGE = 88, 14, 4


def _dots(cell: Cell, metric: Metric, column: list[Cell]) -> Element:
    """Every seed of a cell on the scale of its column."""
    everything = [value for other in column for value in other.values.values()]
    low, high = min(everything), max(everything)

    def place(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.5
        return f"{EDGE + share * (WIDTH - 2 * EDGE):.1f}"

    middle = f"{HEIGHT / 2:g}"
    baseline = next((other for other in column if other.values and not other.baseline), None)
    lines = [tag("line", x1="0", x2=str(WIDTH), y1=middle, y2=middle, class_="axis")]
    if baseline is not None:
        x = place(baseline.mean)
        lines.append(tag("line", x1=x, x2=x, y1="0", y2=str(HEIGHT), class_="baseline"))
    dots = [tag("circle", cx=place(value), cy=middle, r="2.5", class_="dot") for value in cell.values.values()]
    said = "; ".join(f"seed {seed}: {number(value, metric.decimals)}" for seed, value in sorted(cell.values.items()))
    return tag(
        "svg", tag("title", said), lines, dots,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", width=str(WIDTH), height=str(HEIGHT), role="img", class_="dots",
    )  # fmt: skip


def _said(results: Results) -> list[Content]:
    """What the tests say, in words: by effect, a line for each stage."""
    found = findings(results)
    items: list[Content] = []
    for effect in dict.fromkeys(finding.effect for finding in found):
        of_effect = [finding for finding in found if finding.effect == effect]
        lines = [
            tag("li", tag("span", f"{STAGES[stage].title}: ", class_="stage"), _sentence(part))
            for stage in results.study.stages
            if (part := [finding for finding in of_effect if finding.stage == stage])
        ]
        items.append(tag("li", tag("strong", effect), tag("ul", lines)))
    if not items:
        items.append(tag("li", "No two arms that differ in what they use have been measured: there is no effect yet."))
    expected = len(results.study.seeds)

    def of(count: int) -> str:
        return "" if count == expected else f" ({count} of {expected} seeds)"

    if costs := cost_ratios(results):
        texts = [
            f"{stage}: "
            + ", ".join(f"{short_label(arm)} {number(ratio, 2)}{of(count)}" for arm, ratio, count in of_arms)
            for stage, of_arms in costs.items()
        ]
        said = f", seconds of training over the baseline's: {'; '.join(texts)}."
        items.append(tag("li", tag("strong", "Cost"), said))
    equal, different, total = neutrality(results)
    if total:
        what = "proofs that an idle head changes nothing hold" if results.study.idle_arms == "prove" else (
            "runs with an idle head equal their twin"
        )  # fmt: skip
        text = f": {equal} of {total} {what} byte for byte" + (f"; {different} differ" if different else "") + "."
        items.append(tag("li", tag("strong", "Neutrality"), text))
    note = (
        "An effect is the mean difference that an idea makes, with and without the other, of runs of the same seed; "
        "Disco × LeDPO is what the two do together beyond that. Tested, by sign flips, are NLL and true reward; "
        "decided is what stays below p = 0.05 when corrected for all tests of the stage. The rest is told, not tested."
    )
    return [tag("h3", "In words"), tag("ul", items, class_="findings"), tag("p", note, class_="notes")]


def _sentence(found: list[Finding]) -> list[Content]:
    """What is tested first, then what must be said beside it."""
    if not any(finding.differences for finding in found):
        return ["no seed has all of its runs yet."]
    parts: list[Content] = []
    for finding in sorted(found, key=lambda finding: not finding.is_tested):
        if parts:
            parts.append("; ")
        class_ = f"verdict {finding.verdict}" if finding.verdict else None
        parts.append(tag("span", finding.words, class_=class_) if class_ else finding.words)
    return [*parts, "."]


# --- tables and figures


def _stage(stage: str, tables: dict[Output, Any], figures: dict[Output, Element], shown: list[Output]) -> Element:
    """What is of one stage: its tables, then its figures."""
    parts: list[Content] = [_table(output, table) for output, table in tables.items() if output.stage == stage]
    drawn = [element for output, element in figures.items() if output.stage == stage and output not in shown]
    if drawn:
        parts.append(tag("div", drawn, class_="figures"))
    return _section(f"stage-{stage}", f"{STAGES[stage].title}", parts)


def _across(tables: dict[Output, Any], figures: dict[Output, Element], shown: list[Output]) -> list[Element]:
    """What is of all stages, a section each."""
    found = []
    for output, table in tables.items():
        if output.stage is None and table.panels:
            found.append(_section(f"table-{output.name}", capitalised(output.title), _parts_of(output, table)))
    drawn = [element for output, element in figures.items() if output.stage is None and output not in shown]
    if drawn:
        found.append(_section("figures", "Figures", tag("div", drawn, class_="figures")))
    return found


def _table(output: Output, table: Any) -> Content:
    """The main table of a stage as it is, every other one under its title, and the whole grid folded away."""
    if output.name == output.stage:
        return _parts_of(output, table)
    title = capitalised(output.title)
    if output.name.endswith("-grid"):
        return folded(title, _parts_of(output, table))
    return [tag("h3", title), _parts_of(output, table)]


def _parts_of(output: Output, table: Any) -> list[Content]:
    text = _caption(output)
    explained = folded("How to read it", paragraphs(text), class_="caption") if text else None
    return [*table_of(table), explained, _links("tables", output)]


def _links(folder: str, output: Output) -> Element:
    """The files beside the page."""
    links: list[Content] = ["Files: "]
    for place, name in enumerate(output.files):
        links += [", " if place else None, tag("a", name, href=f"{folder}/{name}")]
    return tag("p", links, class_="files")


def _figure(output: Output, results: Results, folder: Path, is_drawn: bool) -> Element:
    text = _caption(output)
    title = output.title if output.stage is None or output.stage in output.title else f"{output.title}, {output.stage}"
    title = capitalised(title)
    if not is_drawn:
        save(output.make(results), [folder / name for name in output.files if not name.endswith(".pdf")])
    source, width = _image(folder / output.name)
    image = tag(
        "img", src=source, alt=f"{title}. {plain(text)}" if text else title, class_="wide" if width > WIDE else None,
        width=str(round(96 * width)),
    )  # fmt: skip
    caption = tag("figcaption", tag("strong", title), folded("How to read it", paragraphs(text)) if text else None)
    add(caption, _links("figures", output))
    return tag("figure", tag("div", image, class_="plate"), caption, class_="wide" if width > WIDE else None)


def _image(stem: Path) -> tuple[str, float]:
    """A figure as an address that holds it, and its width in inches: as SVG, or as PNG where that would be large."""
    svg = Path(f"{stem}.svg").read_bytes()
    points = re.search(rb'<svg [^>]*?width="([\d.]+)pt"', svg)
    kind, content = ("svg+xml", svg) if len(svg) <= LARGEST_SVG else ("png", Path(f"{stem}.png").read_bytes())
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return address, float(points[1]) / 72 if points else WIDE


def _caption(output: Output) -> str:
    path = CAPTIONS / f"{output.row.caption}.rst"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# --- what the policies answer


def _responses(results: Results) -> Element | None:
    parts: list[Content] = []
    for stage in results.study.stages:
        if STAGES[stage].is_policy:
            parts += _responses_in(results, stage)
    if not parts:
        return None
    note = (
        "The first response of each policy to a few held-out prompts, beside the reference's own; the prompts stand "
        "evenly apart in the order of the file, whatever was answered."
    )
    return _section("responses", "Responses of reference and policies", tag("p", note, class_="notes"), parts)


def _responses_in(results: Results, stage: str) -> list[Content]:
    """Of the first seed of which most arms are measured."""
    runs = [run for run in results.whole_runs(stage) if not run.arm.is_idle and results.is_measured(run)]
    runs = [run for run in runs if (run.directory / "generations.jsonl").is_file()]
    if not runs:
        return []
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    seed = max(results.study.seeds, key=lambda seed: len(by_seed.get(seed, [])))
    runs = sorted(by_seed[seed], key=lambda run: CORNERS.index(run.arm))
    answers = {run: read_answers(run.directory / "generations.jsonl") for run in runs}
    count = min(map(len, answers.values()))
    if not count:
        return []
    places = [place * count // PROMPTS for place in range(PROMPTS)] if count > PROMPTS else range(count)
    return [
        tag("h3", f"{STAGES[stage].title}, seed {seed}"),
        *(_prompt({run: rows[place] for run, rows in answers.items()}) for place in places),
    ]


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of generations.jsonl: of each prompt the first response."""
    rows = []
    with telling(f"{path} cannot be read"):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                if not row.get("sample"):
                    rows.append(row)
    return rows


SHOWN = {"true_reward": "True reward", "reward": "Score of its reward model", "length": "Tokens"}
"""What is said of a response beside its text."""


def _prompt(rows: dict[Run, dict[str, Any]]) -> Element:
    """One prompt, and what the reference and each arm answer."""
    first = next(iter(rows.values()))
    known = [name for name in SHOWN if any(isinstance(row.get(name), int | float) for row in rows.values())]
    reference = ["Reference", _text(first.get("reference_response")), *(_of_reference(rows, name) for name in known)]
    body = [reference]
    for run, row in rows.items():
        body.append([label_of(run.arm), _text(row.get("response")), *(_value(row.get(name), name) for name in known)])
    header = ["", "Response", *(SHOWN[name] for name in known)]
    table = grid(header, body, [False, False, *(True for _ in known)])
    table.set("class", "responses")  # a handful of rows: nothing to sort
    return tag("div", tag("p", _text(first.get("prompt")), class_="prompt"), boxed(table, "Responses"), class_="asked")


def _of_reference(rows: dict[Run, dict[str, Any]], name: str) -> str:
    """What the reference's response has of it; of scores nothing where the arms have several reward models."""
    values = {row.get(f"reference_{name}") for row in rows.values()}
    return _value(values.pop(), name) if len(values) == 1 else "by arm"


def _value(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING
    return number(float(value), 0 if name == "length" else 2)


def _text(text: Any) -> Content:
    words = text if isinstance(text, str) else ""
    if not words.strip():
        return tag("span", "(empty)", class_="nothing")
    if len(words) <= LONGEST_TEXT:
        return words
    return [words[:LONGEST_TEXT], tag("span", f" … {len(words) - LONGEST_TEXT:,} more characters", class_="nothing")]


# --- the runs


def state(found: Found) -> str:
    """What has become of a run, in one word, and why."""
    return found.absence or "counts"


def _runs(results: Results) -> Element:
    study = results.study
    parts: list[Content] = [_all_runs(results)]
    for stage in study.stages:
        whole = [run for run in study.runs() if run.stage == stage and not run.proof]
        groups: dict[tuple[Arm, str], list[Run]] = {}
        for run in whole:
            groups.setdefault((run.arm, run.variant), []).append(run)
        parts.append(tag("h3", STAGES[stage].title, class_="unprinted"))
        parts.append(_settings(results, stage, groups))
        parts += [_group(results, runs) for runs in groups.values()]
    note = "Every number of every run is in tables/metrics.csv; the folder of a run holds its config and its record."
    return _section("runs", "Runs", tag("p", note, class_="notes"), parts)


def _all_runs(results: Results) -> Element:
    header = ["Stage", "Arm", "Variant", "Seed", "Trained", "State", "Commit", "discobeta", "Kernels", "Seconds"]
    header += ["Folder"]
    rows = []
    for run, found in results.found.items():
        facts = found.facts
        rows.append(
            [
                run.stage, run.arm.name, run.variant or NOTHING, str(run.seed),
                results.study.proof_text(run.stage) if run.proof else "whole run",
                tag("span", state(found), class_="absent" if found.absence else None),
                _commit(facts), _fact(facts, "versions", "discobeta"), _fact(facts, "machine", "kernels"),
                number(found.cost.get("seconds", float("nan")), 1), tag("code", str(run.directory)),
            ]
        )  # fmt: skip
    numbers = [name in ("Seed", "Seconds") for name in header]
    counted = sum(found.absence is None for found in results.found.values())
    table = grid(header, rows, numbers, class_="runs")
    return folded(f"All {len(rows)} runs, {counted} of which count", boxed(table, "All runs"), class_="unprinted")


def _commit(facts: dict[str, Any]) -> Content:
    commit = facts.get("commit")
    if not isinstance(commit, str):
        return NOTHING
    return [tag("code", commit[:12]), " (dirty)" if facts.get("dirty") is True else None]


def _fact(facts: dict[str, Any], *path: str) -> str:
    value: Any = facts
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else NOTHING


def _settings(results: Results, stage: str, groups: dict[tuple[Arm, str], list[Run]]) -> Element:
    """The settings of the stage's first arm, and which others have another value."""
    first, *others = [runs[0] for runs in groups.values()]
    configs = {run: results.study.config(run).resolved() for run in (first, *others)}
    rows = []
    for key, value in configs[first].items():
        if key == "output_dir" or stage not in read_by(key):
            continue
        different = [f"{run.name}: {as_yaml(configs[run][key])}" for run in others if configs[run][key] != value]
        rows.append([tag("code", key), as_yaml(value), "; ".join(different)])
    header = ["Key", f"{first.name}, seed {first.seed}", "Others, where they differ"]
    table = boxed(grid(header, rows, [False] * 3, class_="settings"), f"Settings of {stage}")
    return folded(f"Settings of {stage}", table, class_="unprinted")


def _group(results: Results, runs: list[Run]) -> Element:
    """The runs of one arm and variant: what each seed has left."""
    there = [run for run in runs if results.absence(run) is None]
    seeds = f"{len(runs)} seeds" if len(there) == len(runs) else f"{len(there)} of {len(runs)} seeds"
    title = f"{runs[0].name}: {seeds}"
    found = {run: results[run] for run in runs}
    names = [name for name in METRICS if any(name in one.metrics for one in found.values())]
    further = sorted({name for one in found.values() for name in one.metrics if "/" not in name} - set(names))
    rows: list[list[Content]] = [
        ["State", *(state(one) for one in found.values())],
        ["Commit", *(_commit(one.facts) for one in found.values())],
        ["Settings", *(tag("code", _fact(one.facts, "settings")[:12]) for one in found.values())],
        ["Seconds of training", *(_plain_number(one.cost.get("seconds"), 1) for one in found.values())],
    ]
    for name in (*names, *further):
        title_of = METRICS[name].header if name in METRICS else name
        decimals = METRICS[name].decimals if name in METRICS else 4
        values = (_plain_number(one.metrics.get(name), decimals) for one in found.values())
        rows.append([one_line(title_of), *values])
    header = ["", *(f"Seed {run.seed}" for run in runs)]
    table = grid(header, rows, [False, *(True for _ in runs)])
    table.set("class", "group")
    return folded(title, boxed(table, title), class_="unprinted")


def _plain_number(value: float | None, decimals: int) -> Content:
    return cell_of(NOTHING if value is None else number(value, decimals))


# --- what made it


def _made_of(results: Results) -> Element:
    made_by = provenance(results)
    rows = [[name.capitalize(), value] for name, value in made_by.items()]
    trained = sum(map(results.counts, results.found))
    rows.append(["Numbers", f"{len(collect(results)):,} of {trained:,} trained runs and proofs"])
    table = grid(["", ""], rows, [False, False])
    table.remove(table.find("thead"))
    table.set("class", "facts-table")
    config = tag("pre", tag("code", config_text(results.study)), tabindex="0")
    note = (
        "Several commits, versions or kernels mean that the runs were made by different ones. How tables and figures "
        "are to be read, word by word: docs/tables.md and docs/figures.md."
    )
    return _section(
        "provenance", "What made it", boxed(table, "What made it"), tag("p", note, class_="notes"),
        folded("The study's config", config, class_="unprinted"),
    )  # fmt: skip
