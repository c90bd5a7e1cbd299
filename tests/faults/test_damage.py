"""Whatever is damaged of what a command reads: it says so, or computes what it would have computed without."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from harness import RECORDS, TIMES, run, snapshot
from hostile import ODD_JSON, damages, judge
from hypothesis import strategies as st

from discobeta import cli

STUDY = ["--configfile", "study.yaml"]
PAIRS = [
    "world",
    "pairs",
    "--world",
    "world",
    "--base",
    "world-base",
    "--output",
    "pairs",
    "--train",
    "8",
    "--eval",
    "4",
]
MEASURED = ("metrics.json", "examples.parquet", "generations.jsonl")
TRAINED = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "model/model.safetensors",
    "heads.safetensors",
)
TRAINED += ("heads.json", "log.jsonl", "config.yaml")


def loading(loader: str, directory: str):
    """`discobeta.load_…`, told as the command line tells it; prints what came of it."""

    def load() -> int:
        import discobeta

        try:
            found = getattr(discobeta, loader)(directory)
            model = found.model if hasattr(found, "model") else found
            heads = getattr(found, "heads", None)
            digest = hashlib.sha256()
            for part in (model, heads):
                for name, weight in part.state_dict().items() if hasattr(part, "state_dict") else ():
                    digest.update(name.encode() + weight.numpy().tobytes())
            if loader == "load_reward_model":
                digest.update(repr(found.score(["user red assistant"], ["one ."])).encode())
            print("loaded", digest.hexdigest())
        except Exception as error:
            cli._say(error)
            return 2
        return 0

    return load


READERS = {
    "evaluate rm": (["evaluate", "runs/rm"], ["runs/rm"]),
    "evaluate dpo": (["evaluate", "runs/dpo"], ["runs/dpo", "shared/answers"]),
    "evaluate full": (["evaluate", "runs/full"], ["runs/full", "shared/tokens", "shared/reference"]),
    "evaluate ppo": (["evaluate", "runs/ppo"], ["runs/ppo", "runs/rm", "runs/dpo"]),
    "train rm": (["train", "rm.yaml"], ["runs/rm"]),
    "train dpo": (["train", "dpo.yaml"], ["runs/dpo"]),
    "train sft": (["train", "sft.yaml"], ["runs/sft"]),
    "train full": (["train", "full.yaml"], ["runs/full", "shared/tokens", "shared/reference"]),
    "train ppo": (["train", "ppo.yaml"], ["runs/ppo", "runs/rm", "runs/dpo"]),
    "train new full": (["train", "full.yaml", "--set", "output_dir=runs/new"], ["shared/tokens", "shared/reference"]),
    "train new ppo": (["train", "ppo.yaml", "--set", "output_dir=runs/new"], ["runs/rm", "runs/dpo"]),
    "train from an adapter": (
        ["train", "rm.yaml", "--set", "output_dir=runs/new", "stage=dpo", "adapter_name_or_path=runs/dpo/adapter"],
        ["runs/dpo/adapter"],
    ),
    "prepare": (["prepare", "full.yaml"], ["shared/tokens"]),
    "reference": (["reference", "full.yaml"], ["shared/tokens", "shared/reference"]),
    "answers": (["answers", "dpo.yaml"], ["shared/answers"]),
    "load_policy dpo": (loading("load_policy", "runs/dpo"), ["runs/dpo"]),
    "load_policy ppo": (loading("load_policy", "runs/ppo"), ["runs/ppo"]),
    "load_policy full": (loading("load_policy", "runs/full"), ["runs/full"]),
    "load_reward_model": (loading("load_reward_model", "runs/rm"), ["runs/rm"]),
    "tables": (["tables", *STUDY], ["results/tiny/runs"]),
    "strict tables": (["tables", "--strict", *STUDY], ["results/tiny/runs"]),
    "cost": (["cost", *STUDY, "--measured", "results/tiny/tables"], ["results/tiny/tables"]),
    "compare": (["compare", "runs/rm", "runs/dpo"], ["runs/rm", "runs/dpo"]),
    "corpus": (["world", "corpus", "--output", "world", "--sft-examples", "64"], ["world"]),
    "pairs": (PAIRS, ["world", "world-base"]),
}
"""Name -> the command, and the folders of which a file is damaged."""


def results(folder: Path) -> dict[str, str]:
    """What commands compute, and nothing that holds a time: path -> sha256."""
    found = {}
    for name, (mode, digest) in snapshot(folder).items():
        if mode == "link" and (folder / name).is_file():  # a link stays one, and what it points to is written
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        is_of_a_run = name.startswith("runs") and name.endswith(tuple(f"/{part}" for part in (*MEASURED, *TRAINED)))
        is_shared = name.startswith(("shared", "world", "pairs", "results/tiny/tables"))
        if is_of_a_run or (is_shared and Path(name).name not in (*TIMES, *RECORDS) and "/." not in name):
            found[name] = digest
    return found


def writes(name: str) -> tuple[str, ...]:
    """What the command may change."""
    words, read = READERS[name]
    if not isinstance(words, list) or words[0] in ("compare", "cost"):
        return ()
    return (*read, "runs/new", "shared/tokens", "shared/reference", "pairs", "results/tiny/tables")


OWN = ("train", "evaluate", "prepare", "reference", "answers", "corpus")
"""Commands that answer for the first folder that they read: what is damaged there may not stay so."""

TOLD = ("damaged", "not trained", "stale", "not finished", "not evaluated", "evaluated before it was trained")
"""Words with which a table says that it leaves a run out; none of them stands in a whole one."""


def tells(path: Path) -> bool:
    return path.suffix == ".md" and any(word in path.read_text() for word in TOLD)


@pytest.mark.parametrize("name", READERS)
def test_damage(finished, tmp_path, fuzz, name):
    words, read = READERS[name]
    place, template = tmp_path / "place", tmp_path / "template"
    shutil.copytree(finished, template)
    shutil.rmtree(template / "pairs", ignore_errors=True)
    if name == "cost":
        assert run(["tables", *STUDY], template).status == 0
    shutil.copytree(template, place)
    undamaged = run(words, place)
    assert undamaged.status == (1 if name == "compare" else 0), undamaged.output
    wanted = results(place)
    files = [path.relative_to(template) for folder in read for path in sorted(template.glob(f"{folder}/**/*"))]
    files = [path for path in files if (template / path).is_file() and "notes" not in path.name]
    locks = st.tuples(st.sampled_from([Path(folder, ".running.json") for folder in read]), st.sampled_from(ODD_JSON))

    def attempt(case):
        path, damage = case
        shutil.rmtree(place)
        shutil.copytree(template, place)
        if isinstance(damage, bytes):
            (place / path).write_bytes(damage)
        elif not damage.do(place / path, other_of(path, files, template)):
            return []
        before = snapshot(place, times=True)
        outcome = run(words, place, limit=90)
        found = judge(outcome, place, before, writes(name))
        found = [pair for pair in found if (name, pair[0], outcome.status) != ("compare", "status", 1)]
        if outcome.status == 2 and not names(outcome.output, path) and TOLD[-1] not in outcome.output:
            found.append(("unnamed", f"{path}: {outcome.output[-500:]}"))
        if outcome.status == 0 and name not in ("compare", "cost"):
            now = results(place)
            # what it neither reads nor writes stays damaged, and of all else nothing may differ
            is_its_own = name.startswith(OWN) and "new" not in name and str(path).startswith(read[0])
            wrong = [item for item in wanted if now.get(item) != wanted[item] and (is_its_own or item != str(path))]
            if name == "tables" and any(tells(place / item) for item in wrong):
                wrong = []
            if not isinstance(words, list) and outcome.output.splitlines()[-1] != undamaged.output.splitlines()[-1]:
                wrong.append("what was loaded")
            if wrong:
                found.append(("silently wrong", f"{path} ({damage}): {wrong[:5]}: {outcome.output[-500:]}"))
        return found

    fuzz(
        60,
        st.tuples(st.sampled_from(files), damages) | (locks if read[0].startswith("runs/") else st.nothing()),
        attempt,
    )


def other_of(path: Path, files: list[Path], template: Path) -> Path | None:
    """A file of the same name that is of something else."""
    runs = [Path("runs", run, *path.parts[2:]) for run in ("dpo", "rm", "full", "sft", "ppo")]
    others = [other for other in (*files, *runs) if other.name == path.name and other != path]
    return next((template / other for other in others if (template / other).is_file()), None)


def names(output: str, path: Path) -> bool:
    """Whether the message leads to the file: it names it, or the folder that was written as a whole."""
    return path.name in output or any(str(parent) in output for parent in list(path.parents)[:-1])


# --- other people's folders

TARGETS = [
    ".", "..", "../place", "data", "base", "runs", "runs/rm", "runs/dpo", "runs/dpo/adapter", "runs/sft",
    "runs/full/model",
    "runs/foreign", "shared", "shared/tokens", "shared/reference", "world", "world-base", "world/tokenizer",
    "results",
    "results/tiny/tables", "notes.txt", "data/train.jsonl", "link", "dangling", "loop", "base/new",
    "notes.txt/new", "new/a/b",
    "/dev/null", "/dev/null/new", "/proc", "/proc/new", "x" * 300, "link/../new", "runs/rm/checkpoints", "~",
    "new ", "-",
]  # fmt: skip
WRITERS = {
    "rm": ["train", "rm.yaml", "--set", "output_dir={}"],
    "sft": ["train", "sft.yaml", "--set", "output_dir={}"],
    "full": ["train", "full.yaml", "--set", "output_dir={}"],
    "ppo": ["train", "ppo.yaml", "--set", "output_dir={}"],
    "its reference": ["train", "full.yaml", "--set", "output_dir=runs/new", "reference_path={}"],
    "its tokens": ["train", "full.yaml", "--set", "output_dir=runs/new", "reference_path=null", "tokenized_path={}"],
    "reference": ["reference", "full.yaml", "--set", "reference_path={}"],
    "answers": ["answers", "dpo.yaml", "--set", "reference_answers_path={}"],
    "prepare": ["prepare", "full.yaml", "--set", "cutoff_len=31", "tokenized_path={}"],
    "corpus": ["world", "corpus", "--sft-examples", "64", "--seed", "2", "--output", "{}"],
    "pairs": [*PAIRS[:6], "--train", "8", "--eval", "4", "--seed", "2", "--output", "{}"],
}
RUNS_OF_OURS = ("runs/rm", "runs/dpo", "runs/sft", "runs/full", "runs/ppo", "world-base")


@pytest.mark.parametrize("name", WRITERS)
def test_other_peoples_folders(finished, tmp_path, fuzz, name):
    outer = tmp_path / "outer"
    place = outer / "place"
    others = st.tuples(st.sampled_from(TARGETS), st.sampled_from(["", "seed=9", "overwrite_output_dir=true"]))

    def attempt(case):
        target, more = case
        shutil.rmtree(outer, ignore_errors=True)
        shutil.copytree(finished, place, symlinks=True)
        (outer / "notes.txt").write_text("mine")
        for link, to in (("link", "data"), ("dangling", "nowhere"), ("loop", "loop")):
            (place / link).symlink_to(to)
        before = snapshot(outer, times=True)
        words = [word.format(target) for word in WRITERS[name]]
        if more and "--set" in words:
            words.append(more)
        outcome = run(words, place, limit=90)
        found = judge(outcome, outer, before, ("place", "nowhere", "data", "shared"))
        after = snapshot(outer, times=True)
        is_ours = target in RUNS_OF_OURS or (name in ("corpus", "pairs") and target == "world")
        kept = {
            path
            for path in before
            if not (is_ours and path.startswith(f"place/{target}"))
            and not path.startswith(("place/shared/tokens", "place/shared/ref"))
        }
        lost = [path for path in kept if after.get(path) != before[path]]
        if lost:
            found.append(("foreign files lost", f"{words}: {sorted(lost)[:6]}: {outcome.output[-300:]}"))
        return found

    fuzz(40, others, attempt)
