"""`snakemake --logger discobeta`: Snakemake's own log stays in .snakemake/log, its console is one quiet view.

Snakemake finds its plugins by the name of their package, so this one stands beside ours. It hands over what Snakemake
says; what is shown of it is decided in `discobeta.report.console`.
"""

from __future__ import annotations

import logging
import sys
from itertools import takewhile

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent


class LogHandler(LogHandlerBase):
    """Of a dry run, whose output is what is asked for, everything is shown as ever."""

    def __post_init__(self) -> None:
        from discobeta.report.console import Console

        self.console = None if self.common_settings.dryrun else Console(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.console is not None:
                self._show(record)
            elif text := self.format(record):
                print(text, file=sys.stdout if self.common_settings.stdout else sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def _show(self, record: logging.LogRecord) -> None:
        event, said, console = getattr(record, "event", None), vars(record), self.console
        if event == LogEvent.WORKFLOW_STARTED:
            console.study = _after(sys.argv, "--configfile", "--configfiles") + _after(sys.argv, "--config", "-C")
        elif event == LogEvent.RUN_INFO:
            console.planned(said["stats"])
        elif event == LogEvent.JOB_STARTED:
            console.started(said.get("jobs") or said.get("job_ids") or [])
        elif event == LogEvent.JOB_INFO:
            console.described(said["jobid"], said["rule_name"], said["wildcards"], said["output"])
        elif event == LogEvent.JOB_FINISHED:
            console.finished(said["job_id"])
        elif event == LogEvent.JOB_ERROR:
            console.failed(said["jobid"], said["rule_name"], said["output"], said["log"])
        elif event == LogEvent.ERROR and said.get("exception") in ("CalledProcessError", "RuleException"):
            return  # of a job, whose failure has been shown, with the whole text of its command
        elif record.levelno >= logging.WARNING:
            console.say(record.getMessage())
        elif event is None:
            console.told(record.getMessage())

    def close(self) -> None:
        if getattr(self, "console", None) is not None:
            self.console.close()
        super().close()

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return self.console is not None

    @property
    def has_formatter(self) -> bool:
        return self.console is not None

    @property
    def needs_rulegraph(self) -> bool:
        return False


def _after(words: list[str], *options: str) -> list[str]:
    """One of the options with what follows it, as it was given on the command line; nothing if it was not."""
    place = next((place for place, word in enumerate(words) if word in options), len(words))
    return words[place : place + 1] + list(takewhile(lambda word: not word.startswith("-"), words[place + 1 :]))
