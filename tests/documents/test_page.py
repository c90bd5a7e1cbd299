"""The page of a study in a real browser: it asks nobody for anything, sorts, fits a phone, darkens, prints whole.

A second document holds the page in a frame of some width, asks it, and writes what it has found where `--dump-dom`
prints it.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from pathlib import Path

import matplotlib.image
import pytest
from page_study import BOTH, MISCHIEF, fill, numbers, page_of, wide
from programs import CannotRun, program
from report_study import results

from discobeta.report import page

PROBE = """<!DOCTYPE html><meta charset="utf-8">
<iframe src="report.html" style="width: {width}px; height: 800px; border: 0"></iframe><pre></pre><script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const found = {{ page: root.scrollWidth, screen: root.clientWidth, title: page.title, broken: [], texts: {{}} }};
  for (const image of page.images) if (!image.complete || !image.naturalWidth) found.broken.push(image.alt);
  found.images = page.images.length;
  const fits = (box) => box.getBoundingClientRect().right <= root.clientWidth + 1;
  found.boxes = Array.from(page.querySelectorAll(".scroll"), fits);
  const table = page.querySelector("table.runs");
  table.closest("details").open = true;
  const heads = Array.from(table.tHead.rows[0].cells);
  const column = (place) => Array.from(table.tBodies[0].rows, (row) => row.cells[place].textContent);
  found.sorted = {{}};
  for (const name of ["Seed", "State", "Seconds"]) {{
    const place = heads.findIndex((head) => head.textContent === name), seen = [column(place)];
    for (let click = 0; click < 2; click++) {{
      heads[place].querySelector("button").click();
      seen.push([heads[place].getAttribute("aria-sort"), column(place)]);
    }}
    found.sorted[name] = seen;
  }}
  const style = event.target.contentWindow.getComputedStyle.bind(event.target.contentWindow);
  found.sticky = style(page.querySelector("table.answer tbody th")).position;
  found.ground = style(page.body).backgroundColor;
  document.querySelector("pre").textContent = JSON.stringify(found);
}});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    try:
        return program("chromium")
    except CannotRun as error:
        pytest.skip(f"no browser here: {error}")


@pytest.fixture(scope="module")
def folder(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page of a study stands of which one run is missing."""
    here, there = Path.cwd(), tmp_path_factory.mktemp("study")
    os.chdir(there)
    try:
        made = wide(seeds=[1, 2, 3])
        fill(
            made,
            lambda run: numbers(run) | {"excess_kl": 0.1 + 0.01 * run.seed},
            lambda run: (run.stage, run.arm, run.seed) == ("ppo", BOTH, 3),
        )
        page.write(results(made))
    finally:
        os.chdir(here)
    return there / page_of(made).parent


def open_with(browser: str, folder: Path, name: str, *flags: str) -> subprocess.CompletedProcess:
    words = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    words += ["--allow-file-access-from-files", "--hide-scrollbars", "--enable-logging=stderr"]
    words += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", *flags, f"file://{folder / name}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def console(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(browser: str, folder: Path, width: int, *flags: str) -> dict:
    (folder / f"probe-{width}.html").write_text(PROBE.format(width=width))
    done = open_with(browser, folder, f"probe-{width}.html", "--dump-dom", "--window-size=1400,900", *flags)
    assert console(done) == []
    (found,) = re.findall(r"<pre>(.+?)</pre>", done.stdout, re.DOTALL)
    return json.loads(html.unescape(found))


@pytest.fixture(scope="module")
def phone(browser: str, folder: Path) -> dict:
    return probe(browser, folder, 390)


def test_it_fits_a_phone_and_a_wide_screen(phone: dict, browser: str, folder: Path):
    assert (phone["screen"], phone["page"]) == (390, 390)
    assert phone["boxes"] and all(phone["boxes"])
    wide_screen = probe(browser, folder, 1280)
    assert (wide_screen["screen"], wide_screen["page"]) == (1280, 1280)


def test_its_figures_are_drawn_and_no_response_was_run(phone: dict):
    assert phone["images"] >= 6 and phone["broken"] == []
    assert phone["title"] == "fixture: Disco and dynamic β"  # a response tries to set another


def test_a_click_sorts_and_a_second_one_the_other_way_round(phone: dict):
    for name, key in (("Seed", int), ("State", lambda text: text), ("Seconds", number_of)):
        before, (first, up), (second, down) = phone["sorted"][name]
        there = [text for text in before if key(text) is not None]
        assert (first, second) == ("ascending", "descending")
        assert [key(text) for text in up if text in there] == sorted(map(key, there))
        assert [key(text) for text in down if text in there] == sorted(map(key, there), reverse=True)
        assert len(set(before)) > 1
    assert phone["sorted"]["Seconds"][1][1][-1] == phone["sorted"]["Seconds"][2][1][-1] == "–"  # the missing run


def number_of(text: str) -> float | None:
    return None if text == "–" else float(text)


def test_it_asks_nobody_for_anything(browser: str, folder: Path):
    done, hosts = asked_by(browser, folder, "report.html")
    assert console(done) == []  # which a request that the page's policy refuses would be in
    assert [host for host in hosts if not host.endswith(BROWSERS_OWN)] == []
    assert MISCHIEF[:20] not in done.stdout
    (folder / "asking.html").write_text('<img src="http://elsewhere.invalid/x.png">')
    assert "elsewhere.invalid" in asked_by(browser, folder, "asking.html")[1]


BROWSERS_OWN = (".google.com", ".googleapis.com", ".gvt1.com")
"""Whom Chromium asks for updates whatever is open."""


def asked_by(browser: str, folder: Path, name: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """And the hosts that were asked for something, the browser's own with them."""
    log = folder / f"{name}.json"
    done = open_with(browser, folder, name, "--dump-dom", f"--log-net-log={log}")
    return done, set(re.findall(r'"url":"https?://([^"/:]+)', log.read_text()))


def pixels(browser: str, folder: Path, name: str, *flags: str):
    path = folder / f"{name}.png"
    open_with(browser, folder, "report.html", f"--screenshot={path}", "--window-size=1280,6000", *flags)
    return matplotlib.image.imread(path)[..., :3]


def test_it_is_light_or_dark_as_the_reader_is_and_figures_stand_on_a_light_plate(browser: str, folder: Path):
    light, dark = (
        pixels(browser, folder, f"scheme-{scheme}", f"--blink-settings=preferredColorScheme={scheme}")
        for scheme in (1, 0)
    )
    assert light.mean() > 0.9
    assert dark[:20, :20].mean() < 0.15
    assert dark[:900].mean() < 0.3
    plate = (dark.min(axis=2) > 0.9).mean(axis=1)  # share of each line of pixels that is nearly white
    assert plate.max() > 0.2


def test_on_paper_nothing_is_folded_away_or_cut(browser: str, folder: Path):
    try:
        reader = program("pdftotext")
    except CannotRun as error:
        pytest.skip(f"no reader of PDF here: {error}")
    open_with(browser, folder, "report.html", f"--print-to-pdf={folder / 'page.pdf'}", "--no-pdf-header-footer")
    subprocess.run([reader, "-layout", folder / "page.pdf", folder / "page.txt"], check=True)
    text = " ".join((folder / "page.txt").read_text().split())
    for said in (
        "1 of 39 runs do not count", "Question and answer", "Reward models", "Proximal policy optimisation", "Effects",
        "Neutrality", "Responses of reference and policies", "What made it",
        "Held-out pairs sorted by how sure the model is",  # folded on a screen
        "Tokens per", "Tokens",
    ):  # fmt: skip
        assert said in text, said
    assert "All 39 runs" not in text and "Files:" not in text  # left out
    pages = subprocess.run(["pdfinfo", folder / "page.pdf"], capture_output=True, text=True)
    if pages.returncode == 0:
        assert re.search(r"Page size: +84\d(\.\d+)? x 59\d", pages.stdout)  # A4, lying
