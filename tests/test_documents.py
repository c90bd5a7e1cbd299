"""Documents and the files around them: links, navigation, citation, recipes, forms; no page is rendered here."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import discobeta

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def text(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def documents() -> list[str]:
    """Every Markdown file of the repository but those that tests compare with."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results" / "published").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def prose(markdown: str) -> str:
    """Without code: what is in it is no link and no heading."""
    return re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)


def links(markdown: str) -> list[str]:
    """Targets of links and pictures that are no addresses of the web."""
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", re.sub(r"`[^`\n]*`", "`", prose(markdown)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(markdown: str) -> set[str]:
    """A forge's names of headings: lower case, without punctuation, blanks as hyphens, repeats numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", prose(markdown), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = 0
        while (unique := f"{name}-{count}" if count else name) in found:
            count += 1
        found.add(unique)
    return found


def dead_links(name: str, read=text) -> list[str]:
    dead = []
    for link in links(read(name)):
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        if not (target == name or (ROOT / target).exists()) or (
            anchor and (not target.endswith(".md") or anchor not in anchors(read(target)))
        ):
            dead.append(link)
    return dead


# --- pages


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name: str):
    assert dead_links(name) == []


def test_a_dead_link_is_found():
    """By hand: of five links the file that is not there, the heading that is not there, and that of a file without."""
    page = (
        "# A `b` & c\n[1](README.md) [2](no.md) [3](#a-b--c) [4](#a) `[5](x.md)` [6](LICENSE#a)\n```\n[7](y.md)\n```\n"
    )
    assert dead_links("page.md", lambda name: page if name == "page.md" else text(name)) == ["no.md", "#a", "LICENSE#a"]


def navigation(node) -> list[str]:
    """The pages under a part of the navigation of mkdocs.yml."""
    if isinstance(node, str):
        return [node]
    return [page for part in (node.values() if isinstance(node, dict) else node) for page in navigation(part)]


class WithTags(yaml.SafeLoader):
    """Of mkdocs.yml, whose tags name functions of MkDocs' own extensions."""


WithTags.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load(text("mkdocs.yml"), WithTags)


def test_every_page_stands_in_the_navigation_and_every_line_of_it_is_a_page():
    pages = navigation(SITE["nav"])
    assert len(pages) == len(set(pages))
    assert pages[0] == "README.md"
    globs = [page for page in pages if "*" in page]
    assert globs == ["docs/decisions/*.md"]
    mine = [name for name in documents() if not name.startswith("results/")]
    assert {name for name in mine if not fnmatch(name, globs[0])} == set(pages) - set(globs)


def test_the_site_is_strict_and_asks_no_network_for_anything():
    assert SITE["strict"] is True
    assert SITE["theme"]["font"] is False
    assert SITE["plugins"] == ["search"]
    assert [key for key in SITE if key.startswith("extra")] == ["extra_css"]  # and no scripts
    assert all((ROOT / path).is_file() for path in SITE["extra_css"])
    assert {SITE["validation"][key] for key in ("omitted_files", "unrecognized_links", "anchors")} == {"warn"}


def test_the_list_of_documents_names_all_of_them():
    listed = {os.path.normpath(os.path.join("docs", link)) for link in links(text("docs/README.md"))}
    assert {name for name in documents() if name.startswith("docs/")} - {"docs/README.md"} <= listed


def commands(markdown: str) -> list[str]:
    """Lines of fenced blocks, without what is said beside them."""
    lines = re.findall(r"^```(?:sh|yaml|python)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in lines for line in block.splitlines() if line.strip()]


def test_the_readme_is_the_same_in_both_languages():
    """Commands and settings, the number of sections, what they link to, and the numbers of its tables."""
    english, chinese = text("README.md"), text("README.zh-CN.md")
    assert commands(english) == commands(chinese)
    assert len(re.findall("^## ", english, re.MULTILINE)) == len(re.findall("^## ", chinese, re.MULTILINE))
    aims = [{link for link in links(page) if not link.startswith("README")} for page in (english, chinese)]
    assert aims[0] == aims[1]
    rows = [re.findall(r"\d\.\d+", "".join(re.findall(r"^\|.*$", page, re.MULTILINE))) for page in (english, chinese)]
    assert rows[0] == rows[1] and len(rows[0]) > 10


FOREIGN = {
    "Killed", "Error: Directory cannot be locked", "discobeta: command not found", "snakemake",
    "does not have a deterministic implementation", "CUBLAS_WORKSPACE_CONFIG", "deterministic: true",
}  # fmt: skip
"""What shells, torch and Snakemake say."""


def test_messages_that_troubleshooting_explains_are_said_by_the_code():
    said = {
        node.value
        for path in (ROOT / "src" / "discobeta").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    } | {MAKEFILE}
    explained = re.findall(r"^\*\*(.*?)\*\*", text("docs/troubleshooting.md"), re.MULTILINE)
    quoted = [message for entry in explained for message in re.findall(r"`([^`]+)`", entry)]
    parts = {part.strip(" ,:;") for message in quoted for part in re.split(r"…|\(.*?\)", message)}
    unknown = {part for part in parts - FOREIGN if len(part) > 8 and not any(part in constant for constant in said)}
    assert len(parts) > 30 and not unknown


# --- citation


def test_the_citation_has_what_its_format_asks_for():
    """The required keys of the Citation File Format 1.2.0, and facts that stand elsewhere too."""
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    allowed = {
        "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
        "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
        "repository-code", "title", "type", "url", "version",
    }  # fmt: skip
    assert citation.keys() <= allowed
    for work in (citation, *citation["references"]):
        assert work["authors"] and all("name" in who or "family-names" in who for who in work["authors"])
        assert {"title", "type"} <= work.keys()
    assert (citation["version"], citation["license"]) == (discobeta.__version__, PROJECT["license"])


# --- recipes


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instruction -> its words, of a Dockerfile: comments left out, lines that go on joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.split(None, 1) for line in whole.splitlines() if line.strip()]
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert {name for name, *_ in found} <= known, "not an instruction that is used here"
    return [(name, re.sub(r"\s+", " ", words)) for name, words in found]


def sections(definition: str) -> dict[str, list[str]]:
    """Section of an Apptainer definition -> its lines without comments; the header is ''."""
    found: dict[str, list[str]] = {"": []}
    at = ""
    for line in definition.splitlines():
        if line.startswith("%"):
            at = line[1:].strip()
            assert at in {"arguments", "files", "post", "environment", "runscript", "labels", "help", "test"}
            found[at] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[at].append(line.strip())
    return found


DOCKER, APPTAINER = instructions(text("envs/Dockerfile")), sections(text("envs/apptainer.def"))


def test_every_source_of_a_recipe_is_there_and_sent_to_the_builder():
    copied = [word for name, words in DOCKER if name == "COPY" for word in words.split()[:-1]]
    ignored = [line for line in text(".dockerignore").splitlines() if line]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    sources = [line.split()[0] for line in APPTAINER["files"]]
    assert sources and set(sources) <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "src", "constraints.txt"}
    assert needed <= set(copied) and needed <= set(sources)


def test_recipes_install_the_versions_of_the_constraints():
    """torch's line and the package, each under constraints.txt, with extras that there are, for both variants."""
    run = next(words for name, words in DOCKER if name == "RUN" and "pip install" in words)
    for script in (run, " ".join(APPTAINER["post"])):
        assert """pip install --no-cache-dir $index "$(grep '^torch==' constraints.txt)\"""" in script
        (extras,) = re.findall(r"--constraint constraints\.txt (?:--editable )?'\.\[([\w,]+)\]'", script)
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
        assert not re.search(r"==\d", script)
        assert set(re.findall(r"(\w+)\) index=", script)) == {"cpu", "cuda"}
    assert ("ARG", "VARIANT=cpu") in DOCKER and APPTAINER["arguments"] == ["variant=cpu"]
    (base,) = [words for name, words in DOCKER if name == "FROM"]
    assert f"From: {base}" in APPTAINER[""]
    conda = [str(part) for part in yaml.safe_load(text("envs/cpu.yaml"))["dependencies"]]
    assert f"python={re.match(r'python:([0-9.]+)-', base)[1]}" in conda


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_conda_environments_have_the_versions_of_the_constraints(name: str):
    """And all that the package and its extras name, but trackers that ask for an account and the site's generator."""
    environment = yaml.safe_load(text(f"envs/{name}.yaml"))
    pins = [line for part in environment["dependencies"] if isinstance(part, dict) for line in part["pip"]]
    found = dict(re.match(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)(?:\+cpu)?$", pin).groups() for pin in pins if pin[0] != "-")
    lower = {key.lower(): value for key, value in PINS.items()}
    assert {key: lower.get(key.lower()) for key in found} == found
    extras = [line for extra in ("workflow", "sft", "slurm", "dev") for line in PROJECT["optional-dependencies"][extra]]
    named = {re.match(r"[\w-]+", line)[0].lower() for line in (*PROJECT["dependencies"], *extras)} - {"discobeta"}
    assert {key.lower() for key in found} >= named - {"huggingface_hub"}  # which transformers pins by itself


def test_what_is_declared_is_pinned():
    pinned = {name.lower() for name in PINS}
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {re.match(r"[\w-]+", line)[0].lower() for lines in lists for line in lines}
    assert declared - pinned == {"discobeta", "wandb"}


# --- forms and hooks

FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_are_valid(path: Path):
    """What GitHub asks of a form: name, description and a body with a field to fill in, ids that are unique."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form.keys() <= {"name", "description", "title", "labels", "body"} and form["name"] and form["description"]
    assert {field["type"] for field in form["body"]} <= FIELDS
    filled = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in filled]
    assert filled and len(names) == len(set(names))
    for field in form["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        attributes = field["attributes"]
        assert attributes["value"] if field["type"] == "markdown" else attributes["label"]
        if field["type"] in ("dropdown", "checkboxes"):
            assert attributes["options"]


def test_hooks_before_a_commit_are_the_tools_of_make_lint():
    """Of the same environment, so of the same versions."""
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = {hook["id"]: hook["entry"] for hook in hooks[0]["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks[0]["hooks"])
    assert all(entry.startswith(".venv/bin/") for entry in entries.values())
    recipe = re.search(r"^lint: .*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    linters = re.findall(r"\$\(RUN\) (\w+)", recipe)
    assert {entry.split("/")[-1].split()[0] for entry in entries.values() if "python" not in entry} == set(linters)
    tests = [word for entry in entries.values() for word in entry.split() if word.startswith("tests/")]
    assert len(tests) == 2 and all((ROOT / name).is_file() for name in tests)


# --- an old Python


def test_make_refuses_an_old_python_before_it_downloads_anything(tmp_path: Path):
    """The least version is pyproject.toml's, and one line says what was found."""
    least = re.match(r">=(\d+)\.(\d+)$", PROJECT["requires-python"]).groups()
    assert f"sys.version_info < ({', '.join(least)})" in MAKEFILE
    assert f"Python {'.'.join(least)}" in text("README.md") and f"Python {'.'.join(least)}" in text("README.zh-CN.md")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && { echo "Python 3.9.1"; exit 0; }\n[ "$1" = -c ] && exit 1\ntouch run\n')
    old.chmod(0o755)
    for target in ("ablation", "test", "docs"):
        words = ["make", target, "PYTHON=./old-python", "VENV=environment"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        needs = f"discobeta needs Python {'.'.join(least)} or newer"
        assert said == [f"{needs}; ./old-python is Python 3.9.1: make PYTHON=python3.11 ..."]
        assert done.returncode == 2
        assert {path.name for path in tmp_path.iterdir()} == {
            "Makefile",
            "pyproject.toml",
            "constraints.txt",
            "old-python",
        }
