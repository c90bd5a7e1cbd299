"""What the site consists of (a hook of MkDocs, named in mkdocs.yml).

Pages have the places that they have in the repository, so that the links between them, which are relative, lead to the
same pages here as on the file system or on a forge; README.md is the front page.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = (":(glob)*.md", "docs", "results/published")
LINKED = ("LICENSE", "CITATION.cff", "config", "benchmarks/bench.py")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take a line `Title: folder/*.md` of the navigation for a line for each of these pages, in the order of names."""
    names = found(*PAGES)
    for section in config.nav:
        for title, pages in section.items():
            if isinstance(pages, str) and pages.endswith("/*.md"):
                section[title] = [name for name in names if Path(name).match(pages)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and what they link to, with what the theme has brought along."""
    ours = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in found(*PAGES, *LINKED)]
    return Files([*ours, *(file for file in files if file.src_dir != config.docs_dir)])


def found(*names: str) -> list[str]:
    """Files of the repository, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *names]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file() and name != "docs/pages.py")
