"""A copy of the workflow in a folder of its own, run by `snakemake --profile slurm`; what Slurm says of its jobs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = Path("results/smoke/runs")

COMPUTED = ["runs/**/*.safetensors", "runs/**/log.jsonl", "runs/**/metrics.json", "runs/**/examples.parquet"]
"""Of a study's folder, the files that hold what was computed; the tables come besides, and no file of costs does."""

# Jobs take seconds here, so their state is asked for soon.
TESTING = ["--slurm-init-seconds-before-status-checks", "1"]


class Clone:
    """The files that a clone has, as they are in the working tree, so that `--profile slurm` is found by its name."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of_the_tree(cls, folder: Path) -> Clone:
        folder.mkdir()
        for name in ("slurm", "workflow", "config", "envs", "src/discobeta"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        # on the path of every job, as the package is, and no part of it
        shutil.copy2(Path(__file__).parent / "in_every_job.py", folder / "src" / "sitecustomize.py")
        return cls(folder)

    def copy_without_runs(self, folder: Path) -> Clone:
        """What the runs share is there, and what Snakemake knows of it; no run is."""
        shutil.copytree(self.folder, folder, symlinks=True)
        shutil.rmtree(folder / "seen", ignore_errors=True)
        for name in ("runs", "tables", "figures", "logs"):
            shutil.rmtree(folder / "results" / "smoke" / name, ignore_errors=True)
        for record in (folder / ".snakemake" / "metadata").glob("*"):
            if base64.b64decode(record.name).startswith(bytes(RUNS)):
                record.unlink()
        return Clone(folder)

    def change_profile(self, old: str, new: str) -> None:
        profile = self.folder / "slurm" / "config.yaml"
        text = profile.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {profile}"
        profile.write_text(text.replace(old, new))

    def start(self, *words: str, slurm: bool = True) -> subprocess.Popen:
        """Snakemake; what it says goes to said.log."""
        command = [sys.executable, "-m", "snakemake", "--configfile", "config/smoke.yaml"]
        command += ["--profile", "slurm", *TESTING] if slurm else ["--cores", "2"]

        def listen() -> None:  # what a shell starts in the background is deaf to an interrupt
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with (self.folder / "said.log").open("w") as said:
            return subprocess.Popen(
                [*command, *words], cwd=self.folder, stdout=said, stderr=subprocess.STDOUT, preexec_fn=listen
            )

    def run(self, *words: str, slurm: bool = True, timeout: float = 900) -> str:
        """What Snakemake said, having succeeded."""
        process = self.start(*words, slurm=slurm)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        assert status == 0, self.said()[-5000:]
        return self.said()

    def said(self) -> str:
        return (self.folder / "said.log").read_text()

    def computed(self) -> dict[str, str]:
        """File -> sha256 of what it says of the study; of tables/metrics.csv, of the rows that are no cost."""
        study = self.folder / "results" / "smoke"
        found = {}
        for path in (path for pattern in COMPUTED for path in study.glob(pattern)):
            found[str(path.relative_to(study))] = path.read_bytes()
        for path in study.glob("tables/*"):
            if path.stem not in ("cost", "config"):
                found[str(path.relative_to(study))] = path.read_bytes()
        lines = found.get("tables/metrics.csv", b"").splitlines()
        found["tables/metrics.csv"] = b"\n".join(line for line in lines if b"cost" not in line)
        return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}

    def jobs(self, *rules: str) -> list[dict]:
        """The jobs that were submitted from here, by submission; of these rules, if any are named."""
        mine = [job for job in jobs() if job["WorkDir"] == str(self.folder)]
        return [job for job in mine if job["rule"] in rules] if rules else mine

    def seen(self) -> list[dict]:
        """What every process of the package has told of itself (in_every_job.py)."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / "seen").glob("*.json"))]


class Watcher:
    """Asks the controller twice a second, in `with Watcher() as watch:`, what it does not say afterwards."""

    def __init__(self):
        self.devices: dict[str, str] = {}  # Slurm's id of a job -> the devices that it was granted
        self.most_gpu_jobs = 0  # that ran at a time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            granted = {job["JobId"]: re.search(r"IDX:([\d,-]+)", job["GRES"]) for job in jobs()}
            now = {job: devices[1] for job, devices in granted.items() if devices}
            self.devices |= now
            self.most_gpu_jobs = max(self.most_gpu_jobs, len(now))


def jobs() -> list[dict]:
    """Every job that the controller remembers, by submission: what `scontrol --details show job` says, and more."""
    command = ["scontrol", "--details", "show", "job", "--oneliner"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = [dict(re.findall(r"([\w:/]+)=(\S*)", line)) for line in done.stdout.splitlines() if "JobId=" in line]
    for job in found:
        size, unit = re.fullmatch(r"([\d.]+)([MG])", job["MinMemoryNode"]).groups()
        job["megabytes"] = round(float(size) * {"M": 1, "G": 1024}[unit])
        job["rule"] = re.sub("_wildcards_.*", "", job.get("Comment", "")).removeprefix("rule_")
    return [{"GRES": ""} | job for job in found]


def until(condition, seconds: float, process: subprocess.Popen, clone: Clone):
    """What `condition` returns, as soon as it is true, while Snakemake runs."""
    deadline = time.monotonic() + seconds
    while not (met := condition()):
        assert process.poll() is None, f"snakemake has ended\n{clone.said()[-3000:]}"
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s\n{clone.said()[-3000:]}"
        time.sleep(0.05)
    return met
