"""`snakemake --profile slurm` on a real controller: a whole study, and a run to which everything happens.

Nothing here is imitated but the GPUs and the size of the node (cluster.py). A study that went through Slurm is
compared, byte for byte, with the same study computed without Slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import DAEMONS, CannotRun, Cluster, name_of, owner, processes_of_jobs, wait_for
from harness import RUNS, Clone, Watcher, jobs, until

pytest.importorskip("snakemake_executor_plugin_slurm")

# One seed, few samples, every state of a head: 26 jobs.
ARMS = "arms=[baseline, disco-idle_beta-absent, disco-used_beta-used]"
SMALL = ["--config", "seeds=[1]", ARMS, "dpo={num_eval_generations: 16}", "ppo={num_eval_generations: 16}"]
TRAINING = ["train_rm", "train_dpo", "train_ppo"]
ON_GPU = [*TRAINING, "sft", "reference", "answers", "evaluate"]
ON_CPU = ["world_corpus", "world_pairs", "prepare", "prepare_prompts"]

# One run of about ten seconds of training, with a checkpoint in most of them.
ONE_RUN = [
    "--config",
    "seeds=[1]",
    "stages=[rm]",
    "arms=[baseline]",
    "rm={max_steps: 200, save_steps: 20}",
    "--",
    "tables",
]
RUN = RUNS / "rm" / "baseline" / "seed-1"
LOG = Path("results/smoke/logs/rm/baseline/seed-1.log")


@pytest.fixture(scope="session", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "state")
    before = daemons()
    try:
        cluster.start()
    except CannotRun as error:
        pytest.skip(f"no test cluster here: {error}")
    yield cluster
    cluster.stop()
    assert not cluster.folder.exists()
    assert owner(Path("/etc/slurm/slurm.conf")) is None
    assert wait_for(lambda: not processes_of_jobs(), 10)
    assert daemons() <= before


def daemons() -> set[str]:
    names = {name_of(path.name) for path in Path("/proc").glob("[0-9]*")}
    return names & {"slurmstepd", *DAEMONS}


@pytest.fixture(scope="session")
def tree(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone.of_the_tree(tmp_path_factory.mktemp("tree") / "clone")


@pytest.fixture(scope="session")
def local(tree: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The small study, computed by Snakemake's local executor."""
    clone = tree.copy_without_runs(tmp_path_factory.mktemp("local") / "clone")
    clone.run(*SMALL, slurm=False)
    return clone


@pytest.fixture(scope="session")
def submitted(tree: Clone, overdue: Training, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, Watcher]:
    """The same study through Slurm, and who watched it."""
    clone = tree.copy_without_runs(tmp_path_factory.mktemp("slurm") / "clone")
    with Watcher() as watch:
        clone.run(*SMALL)
    return clone, watch


@pytest.fixture(scope="session")
def overdue(local: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A run that stands still until its time limit, a minute: it is started first, and looked at later."""
    clone = local.copy_without_runs(tmp_path_factory.mktemp("overdue") / "clone")
    clone.change_profile("runtime: min(720 * attempt, 1440)", "runtime: attempt")
    training = Training(clone)
    os.kill(training.pid, signal.SIGSTOP)
    yield training
    training.snakemake.kill()


@pytest.fixture(scope="session")
def undisturbed(local: Clone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the one run computes without Slurm, and when nothing happens to it."""
    clone = local.copy_without_runs(tmp_path_factory.mktemp("undisturbed") / "clone")
    clone.run(*ONE_RUN, slurm=False)
    return clone.computed()


@pytest.fixture(scope="session")
def disturbed(local: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Training]]:
    """Runs to which something has happened in the middle. They end side by side: most of it is Snakemake's waiting."""
    found = {}
    try:
        for name, fault in FAULTS.items():
            clone = local.copy_without_runs(tmp_path_factory.mktemp(name) / "clone")
            if name == "memory":
                clone.change_profile("mem_mb: 32000 * attempt", "mem_mb: 1500 * attempt")
                clone.change_profile("# gpu_model: ", "gpu_model: ")
            if name == "sacct":
                clone.change_profile("slurm-status-command: squeue", "slurm-status-command: sacct")
            found[name] = Training(clone)
            fault(found[name])
        yield found
    finally:
        for training in found.values():
            training.snakemake.kill()


def interrupt(training: Training) -> None:
    """Snakemake cancels its jobs and gives up its lock; the same command is given again."""
    training.snakemake.send_signal(signal.SIGINT)
    assert training.snakemake.wait(120) != 0
    assert wait_for(lambda: state(training.job) == "CANCELLED", 30)
    training.snakemake = training.clone.start(*ONE_RUN)


def kill(training: Training) -> None:
    training.snakemake.kill()
    training.snakemake.wait(30)


def kill_and_cancel(training: Training) -> None:
    """Snakemake leaves its lock behind: the same command is refused, and goes on after --unlock."""
    kill(training)
    slurm("scancel", training.job)
    assert wait_for(lambda: state(training.job) == "CANCELLED", 30)
    assert training.clone.start(*ONE_RUN).wait(120) == 1
    assert "--unlock" in training.clone.said()
    training.clone.run("--unlock", *ONE_RUN)
    training.snakemake = training.clone.start(*ONE_RUN)


FAULTS = {
    "fails": lambda training: os.kill(training.pid, signal.SIGKILL),
    "sacct": lambda training: os.kill(training.pid, signal.SIGKILL),  # and Slurm is asked by sacct
    "cancelled": lambda training: slurm("scancel", training.job),
    "memory": lambda training: os.kill(training.pid, signal.SIGUSR1),  # in_every_job.py: it takes 2 GiB more
    "requeued": lambda training: slurm("scontrol", "requeue", training.job),
    "interrupted": interrupt,
    "killed": kill_and_cancel,
    "left": kill,
}


@pytest.fixture
def fresh(local: Clone, tmp_path: Path) -> Clone:
    return local.copy_without_runs(tmp_path / "clone")


class Training:
    """The one run, in the middle of being trained on the cluster: it has written a checkpoint, and goes on."""

    def __init__(self, clone: Clone):
        self.clone = clone
        self.snakemake = clone.start(*ONE_RUN)
        checkpoints = clone.folder / RUN / "checkpoints"
        until(lambda: any(checkpoints.glob("step-*.pt")), 120, self.snakemake, clone)
        (told,) = clone.seen()
        self.job, self.pid = told["SLURM_JOB_ID"], told["pid"]
        assert not (clone.folder / RUN / "provenance.json").exists()

    def ends(self) -> None:
        """The last call of Snakemake for it succeeds."""
        assert self.snakemake.wait(300) == 0, self.clone.said()[-3000:]


# --- a whole study


def test_results_are_those_of_the_local_executor(local: Clone, submitted: tuple[Clone, Watcher]):
    clone, _ = submitted
    computed = clone.computed()
    assert sum(name.endswith("metrics.json") for name in computed) == 3 + 3 + 3
    assert sum(name.endswith("adapter_model.safetensors") for name in computed) == 3 + 3 + 3
    # rm, dpo, ppo, the same with all 16 settings, effects, comparisons, neutrality, metrics
    assert sum(name.endswith(".csv") for name in computed) == 3 + 3 + 4
    assert computed == local.computed()


def test_every_job_went_through_slurm_once_save_the_local_ones(submitted: tuple[Clone, Watcher]):
    clone, _ = submitted
    assert Counter(job["rule"] for job in clone.jobs()) == {
        "train_rm": 3, "train_dpo": 3, "train_ppo": 3, "evaluate": 9,
        "sft": 1, "reference": 1, "answers": 2, "world_corpus": 1, "world_pairs": 1, "prepare": 1, "prepare_prompts": 1,
    }  # fmt: skip
    assert {job["JobState"] for job in clone.jobs()} == {"COMPLETED"}


def test_two_gpus_hold_two_jobs_at_a_time(submitted: tuple[Clone, Watcher]):
    """From what was seen while they ran, and from the times that the controller noted."""
    clone, watch = submitted
    on_gpus = clone.jobs(*ON_GPU)
    assert watch.most_gpu_jobs == 2
    assert max(sum(a["StartTime"] <= b["StartTime"] < a["EndTime"] for a in on_gpus) for b in on_gpus) == 2


def test_a_job_that_needs_no_gpu_asks_for_none(submitted: tuple[Clone, Watcher]):
    clone, watch = submitted
    without = {job["JobId"] for job in clone.jobs(*ON_CPU)}
    assert {job["JOB_GRES"] for job in clone.jobs(*ON_CPU)} == {"(null)"}
    assert not without & set(watch.devices)
    assert {told["CUDA_VISIBLE_DEVICES"] for told in clone.seen() if told["SLURM_JOB_ID"] in without} == {None}


def test_a_job_sees_the_device_that_it_was_granted(submitted: tuple[Clone, Watcher]):
    clone, watch = submitted
    seen = {told["SLURM_JOB_ID"]: told["CUDA_VISIBLE_DEVICES"] for told in clone.seen()}
    granted = {job["JobId"]: watch.devices[job["JobId"]] for job in clone.jobs(*ON_GPU)}
    assert {job: seen[job] for job in granted} == granted
    assert {seen[job["JobId"]] for job in clone.jobs(*TRAINING)} == {"0", "1"}


def test_jobs_ask_for_what_the_profile_says(submitted: tuple[Clone, Watcher]):
    """The numbers of slurm/config.yaml at the first attempt; 720 minutes are 12 hours."""
    clone, _ = submitted

    def asked(*rules: str) -> set[tuple]:
        names = ("NumCPUs", "TimeLimit", "megabytes", "JOB_GRES", "Partition")
        return {tuple(job[name] for name in names) for job in clone.jobs(*rules)}

    assert asked(*TRAINING) == {("4", "12:00:00", 32000, "gpu:a100:1", "main")}
    assert asked("sft", "reference", "answers", "evaluate") == {("4", "04:00:00", 32000, "gpu:a100:1", "main")}
    assert asked(*ON_CPU) == {("2", "00:30:00", 8000, "(null)", "main")}


def test_what_stands_in_the_profile_as_a_comment(fresh: Clone, local: Clone):
    """Each `#` taken off: three reward models as one array job, a GPU by --gres, everything that a cluster may want."""
    fresh.change_profile("\n    gpu: 1\n", "\n")
    for line in (
        "    # gres: ",
        "  # slurm_partition: ",
        "  # slurm_account: ",
        "  # qos: ",
        "  # constraint: ",
        "  # slurm_extra: ",
        "# slurm-array-jobs: ",
    ):
        fresh.change_profile(line, line.replace("# ", ""))
    fresh.change_profile("qos: normal", "qos: urgent")  # a job that asks for none has the normal one
    with Watcher() as watch:
        fresh.run(*SMALL, "stages=[rm]", "--", "tables")
    trained = fresh.jobs("train_rm")
    assert (len(trained), len({job["ArrayJobId"] for job in trained})) == (3, 1)
    assert Counter(job["rule"] for job in fresh.jobs()) == {"train_rm": 3, "evaluate": 3}
    names = ("JOB_GRES", "Partition", "Account", "QOS", "Features", "Nice")
    asked = {tuple(job[name] for name in names) for job in fresh.jobs()}
    assert asked == {("gpu:a100:1", "gpu", "project", "urgent", "a100", "100")}
    seen = {told["SLURM_JOB_ID"]: told["CUDA_VISIBLE_DEVICES"] for told in fresh.seen()}
    assert seen == {job["JobId"]: watch.devices[job["JobId"]] for job in fresh.jobs()}
    runs = {name: digest for name, digest in fresh.computed().items() if name.startswith("runs/")}
    assert sum(name.endswith("metrics.json") for name in runs) == 3
    assert runs == {name: digest for name, digest in local.computed().items() if name.startswith("runs/rm/")}


# --- faults, in the middle of training


def check(clone: Clone, undisturbed: dict[str, str], *trained: str) -> None:
    """The run went on from a checkpoint, and what came out is what comes out of an undisturbed one.

    `trained`: how its jobs ended. There is one more, which measures: nothing that was there was made again.
    """
    assert tuple(job["JobState"] for job in clone.jobs("train_rm")) == trained
    assert [job["JobState"] for job in clone.jobs("evaluate")] == ["COMPLETED"]
    assert len(clone.jobs()) == len(trained) + 1
    assert f"resuming from {RUN}/checkpoints/step-" in (clone.folder / LOG).read_text()
    assert clone.computed() == undisturbed


def attempts(clone: Clone) -> list[tuple[str, int]]:
    """The time and the memory that each job of training asked for."""
    return [(job["TimeLimit"], job["megabytes"]) for job in clone.jobs("train_rm")]


def test_a_job_that_fails_is_submitted_anew(disturbed: dict[str, Training], undisturbed: dict[str, str]):
    """By the same call of Snakemake, for twice the time and memory."""
    training = disturbed["fails"]
    training.ends()
    assert attempts(training.clone) == [("12:00:00", 32000), ("1-00:00:00", 64000)]
    check(training.clone, undisturbed, "FAILED", "COMPLETED")


@pytest.mark.parametrize(
    "fault, ended",
    [("sacct", "FAILED"), ("cancelled", "CANCELLED"), ("interrupted", "CANCELLED"), ("killed", "CANCELLED")],
)
def test_a_job_that_ended_too_soon_is_submitted_anew(fault, ended, disturbed: dict[str, Training], undisturbed):
    disturbed[fault].ends()
    check(disturbed[fault].clone, undisturbed, ended, "COMPLETED")


def test_a_job_that_exceeds_its_memory_gets_more(disturbed: dict[str, Training], undisturbed: dict[str, str]):
    """Its GPU is asked for by `gpu_model`."""
    training = disturbed["memory"]
    training.ends()
    assert attempts(training.clone) == [("12:00:00", 1500), ("1-00:00:00", 3000)]
    assert {job["TresPerJob"] for job in training.clone.jobs()} == {"gres:gpu:a100:1"}
    assert "Exceeded job memory limit" in training.clone.said()
    check(training.clone, undisturbed, "FAILED", "COMPLETED")


def test_a_job_that_exceeds_its_time_gets_more(overdue: Training, undisturbed: dict[str, str]):
    overdue.ends()
    assert attempts(overdue.clone) == [("00:01:00", 32000), ("00:02:00", 64000)]
    check(overdue.clone, undisturbed, "TIMEOUT", "COMPLETED")


def test_a_job_that_is_requeued_goes_on(disturbed: dict[str, Training], undisturbed: dict[str, str]):
    """Slurm starts it again under the same number; Snakemake waits."""
    training = disturbed["requeued"]
    training.ends()
    assert [job["Restarts"] for job in training.clone.jobs("train_rm")] == ["1"]
    check(training.clone, undisturbed, "COMPLETED")


def test_snakemake_is_killed_and_its_job_ends_by_itself(disturbed: dict[str, Training], undisturbed: dict[str, str]):
    """What it trained counts: only the measuring is left to do."""
    training = disturbed["left"]
    assert wait_for(lambda: state(training.job) == "COMPLETED", 120)
    training.clone.run("--unlock", *ONE_RUN)
    training.clone.run(*ONE_RUN)
    assert [(job["rule"], job["JobState"]) for job in training.clone.jobs()] == [
        ("train_rm", "COMPLETED"),
        ("evaluate", "COMPLETED"),
    ]
    assert training.clone.computed() == undisturbed


def test_a_job_that_is_preempted_goes_on(fresh: Clone, undisturbed: dict[str, str]):
    """One of a partition that goes first takes both GPUs for a moment."""
    training = Training(fresh)
    urgent = ["--partition=urgent", "--gpus=2", "--mem=100M", "--output=/dev/null", "--chdir=/", "--wrap=sleep 2"]
    slurm("sbatch", *urgent)
    training.ends()
    (other,) = [job for job in jobs() if job["Partition"] == "urgent"]
    assert other["JobState"] == "COMPLETED"
    assert [job["Restarts"] for job in fresh.jobs("train_rm")] == ["1"]
    check(fresh, undisturbed, "COMPLETED")


def test_a_job_that_fails_where_there_is_no_accounting(cluster: Cluster, fresh: Clone, undisturbed: dict[str, str]):
    with cluster.without_accounting():
        training = Training(fresh)
        os.kill(training.pid, signal.SIGKILL)
        training.ends()
        check(fresh, undisturbed, "FAILED", "COMPLETED")


def test_a_node_that_goes_down_and_comes_back(fresh: Clone, undisturbed: dict[str, str]):
    training = Training(fresh)
    try:
        node_is("DOWN")
        until(lambda: state(training.job) == "PENDING", 60, training.snakemake, fresh)
    finally:
        node_is("RESUME")
    training.ends()
    assert [job["Restarts"] for job in fresh.jobs("train_rm")] == ["1"]
    check(fresh, undisturbed, "COMPLETED")


def test_a_node_that_is_drained_and_resumed(fresh: Clone, undisturbed: dict[str, str]):
    """The job on it runs to its end, the next one waits for the node."""
    training = Training(fresh)
    try:
        node_is("DRAIN")
        (waiting,) = until(lambda: fresh.jobs("evaluate"), 120, training.snakemake, fresh)
        assert (state(training.job), waiting["JobState"]) == ("COMPLETED", "PENDING")
        until(lambda: "DRAINED" in fresh.jobs("evaluate")[0]["Reason"], 30, training.snakemake, fresh)
    finally:
        node_is("RESUME")
    training.ends()
    assert [(job["rule"], job["JobState"], job["Restarts"]) for job in fresh.jobs()] == [
        ("train_rm", "COMPLETED", "0"),
        ("evaluate", "COMPLETED", "0"),
    ]
    assert fresh.computed() == undisturbed


# --- two live copies of one run


@pytest.fixture
def second(fresh: Clone) -> Iterator[tuple[Training, subprocess.Popen]]:
    """Snakemake is killed, its job lives on, held up for now, and a restart has submitted the same run again."""
    training = Training(fresh)
    os.kill(training.pid, signal.SIGSTOP)
    kill(training)
    fresh.run("--unlock", *ONE_RUN)
    snakemake = fresh.start(*ONE_RUN)
    until(lambda: len(fresh.seen()) == 2, 120, snakemake, fresh)
    yield training, snakemake
    snakemake.kill()


def test_the_second_copy_waits_and_finds_the_run_finished(second, undisturbed: dict[str, str]):
    training, snakemake = second
    os.kill(training.pid, signal.SIGCONT)
    assert snakemake.wait(300) == 0, training.clone.said()[-3000:]
    log = (training.clone.folder / LOG).read_text(errors="replace")
    assert f"is being written by process {training.pid} on" in log and f"Slurm job {training.job}: waiting" in log
    assert "holds this run, finished" in log and "resuming from" not in log
    assert [job["JobState"] for job in training.clone.jobs("train_rm")] == ["COMPLETED", "COMPLETED"]
    assert training.clone.computed() == undisturbed


def test_a_copy_that_stands_still_is_replaced_and_stops_when_it_wakes(second, undisturbed: dict[str, str]):
    training, snakemake = second
    assert snakemake.wait(300) == 0, training.clone.said()[-3000:]
    os.kill(training.pid, signal.SIGCONT)
    assert wait_for(lambda: state(training.job) == "COMPLETED", 30)
    assert (training.clone.folder / RUN / "provenance.json").exists()
    check(training.clone, undisturbed, "COMPLETED", "COMPLETED")


def slurm(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def state(job: str) -> str:
    return next(found["JobState"] for found in jobs() if found["JobId"] == job)


def node_is(state: str) -> None:
    host = os.uname().nodename.partition(".")[0]
    slurm("scontrol", "update", f"NodeName={host}", f"State={state}", "Reason=test")


# --- the cluster of the tests itself


def test_a_second_test_cluster_is_refused(cluster: Cluster, tmp_path: Path):
    second = Cluster(tmp_path / "second")
    with pytest.raises(CannotRun, match=f"the test cluster of {cluster.folder} runs; stop it with: "):
        second.start()
    second.stop()
    assert not second.folder.exists()
    assert owner(Path("/etc/slurm/slurm.conf")) == str(cluster.folder)
    assert wait_for(lambda: state_of_the_node() == "idle", 30)


def test_the_cluster_of_someone_else_is_left_alone(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Recognised by its configuration, or else by its daemons: here, ours, whose configuration is out of sight."""
    monkeypatch.setattr("cluster.ETC", tmp_path)
    other = Cluster(tmp_path / "other")
    with pytest.raises(CannotRun, match=r"slurm(ctl|db)?d runs \(process \d+\), and is of no test cluster"):
        other.start()
    (tmp_path / "slurm.conf").write_text("ClusterName=production\n")
    with pytest.raises(CannotRun, match="this machine belongs to a cluster"):
        other.start()
    other.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["slurm.conf"]
    assert state_of_the_node() == "idle"


def state_of_the_node() -> str:
    command = ["sinfo", "--noheader", "--format=%T", "--partition=main"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
