"""What opens documents: a browser, LaTeX, a reader of PDF. On Debian, root installs what is missing."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable

PACKAGES = {
    "chromium": ["chromium"],
    "pdflatex": ["texlive-latex-base", "texlive-latex-recommended"],
    "pdftotext": ["poppler-utils"],
    "pdftoppm": ["poppler-utils"],
}
"""Program -> Debian's packages of it. They stay installed: they are programs for people, and no service."""

OTHER_NAMES = {"chromium": ("chromium-browser", "google-chrome-stable", "google-chrome")}


class CannotRun(Exception):
    """Why a program cannot be had here."""


@functools.cache
def program(name: str) -> str:
    """Its path, after installing it where that may be done. Raises CannotRun."""
    if (found := _found(name)) is not None:
        return found
    if shutil.which("apt-get") is None:
        raise CannotRun(f"no {name}, and no apt-get to install it")
    if os.geteuid() != 0:
        raise CannotRun(f"no {name}, and only root may install it")
    words = ["install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES[name]]
    try:
        try:
            _apt(words)
        except subprocess.CalledProcessError:  # lists of packages that are missing or old
            _apt(["update", "--quiet"])
            _apt(words)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or "").strip()[-300:]
        raise CannotRun(f"apt-get install {' '.join(PACKAGES[name])} failed: {said}") from None
    if (found := _found(name)) is None:
        raise CannotRun(f"no {name}, though its packages are installed")
    return found


def _found(name: str) -> str | None:
    return next(filter(None, map(shutil.which, (name, *OTHER_NAMES.get(name, ())))), None)


def _apt(words: Iterable[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(
        ["apt-get", *words], check=True, capture_output=True, text=True, env=environment, timeout=900,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
