"""A real Slurm cluster of one node with two fake GPUs, for tests: Debian's packages, root, no systemd.

    python tests/slurm/cluster.py start DIR        python tests/slurm/cluster.py stop DIR

It has accounting, with one account (`project`) and two QOS (`normal` and `urgent`), and a partition (`urgent`)
that preempts the jobs of the others. State, database, logs and the munge key are in DIR. Slurm's programs look for
their files in /etc/slurm and nowhere else, so they are put there, if there are no others. What `start` installed
and wrote, `stop` removes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ETC = Path("/etc/slurm")
OURS = "# the test cluster of "
NAME = "discobeta-test"
MARK = "test-cluster"  # a file in the folder: `start` made it, `stop` may remove it
PACKAGES = ["slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server-core", "mariadb-client"]
DAEMONS = ["slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged"]  # in the order in which they are stopped
PROGRAMS = [*DAEMONS, "slurmstepd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct", "sacctmgr"]
PROGRAMS += ["mariadb-install-db", "my_print_defaults"]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# The node says that it has more than this machine has, so that jobs may ask for what they ask for on a real one.
SLURM_CONF = """\
{ours}{folder}
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
{accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=1
MinJobAge=7200
KillWait=2
MpiDefault=none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=512000 Gres=gpu:a100:2 Feature=a100
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE
PartitionName=gpu Nodes={host} MaxTime=INFINITE
PartitionName=urgent Nodes={host} MaxTime=INFINITE PriorityTier=2
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits,qos"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
SLURMDBD_CONF = """\
{ours}{folder}
DbdHost=localhost
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""
GRES_CONF = """\
{ours}{folder}
AutoDetect=off
Name=gpu Type=a100 File=/dev/null
Name=gpu Type=a100 File=/dev/zero
"""
CONFIGURATION = {"slurm.conf": SLURM_CONF, "gres.conf": GRES_CONF, "slurmdbd.conf": SLURMDBD_CONF}


class CannotRun(Exception):
    """Why there can be no test cluster here."""


class Cluster:
    """`with Cluster(folder): ...`; the folder must not exist yet."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the node is idle. Raises CannotRun with nothing changed, or with everything undone."""
        refuse_where_it_cannot_run()
        if self.folder.exists():
            raise CannotRun(f"{self.folder} exists already; the cluster needs a folder of its own")
        self.folder.mkdir(parents=True)
        (self.folder / MARK).touch()
        try:
            install(self.folder / "installed")
            self._configure()
            self._launch()
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the daemons and the processes of every job; remove the folder, the configuration, installed packages.

        Nothing happens if `start` did not make the folder.
        """
        if not (self.folder / MARK).exists():
            return
        if owner(ETC / "slurm.conf") == str(self.folder) and alive(self.folder / "slurmctld.pid"):
            subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=60)
            wait_for(lambda: not output("squeue", "--noheader"), 20)
        for daemon in DAEMONS:
            end(self.folder / f"{daemon}.pid")
        for pid in processes_of_jobs():  # one that has lost its parent escapes proctrack/linuxproc
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in CONFIGURATION:
            if owner(ETC / name) == str(self.folder):
                (ETC / name).unlink()
        installed = self.folder / "installed"
        if installed.exists():
            quietly("apt-get", "purge", "--yes", "--quiet", *installed.read_text().split())
        shutil.rmtree(self.folder)

    @contextmanager
    def without_accounting(self) -> Iterator[None]:
        """The same node and jobs, under a controller that keeps no accounts."""
        try:
            self._restart_controller(NO_ACCOUNTING)
            yield
        finally:
            self._restart_controller(ACCOUNTING)

    def _restart_controller(self, accounting: str) -> None:
        end(self.folder / "slurmctld.pid")
        self._configure(accounting)
        quietly("slurmctld")
        self._wait_until_idle()

    def _configure(self, accounting: str = ACCOUNTING) -> None:
        ETC.mkdir(exist_ok=True)
        names = {"ours": OURS, "name": NAME, "folder": self.folder, "host": socket.gethostname().partition(".")[0]}
        for name, text in CONFIGURATION.items():
            (ETC / name).touch(mode=0o600)  # slurmdbd wants it
            (ETC / name).write_text(text.format(accounting=accounting.format(**names), **names))

    def _launch(self) -> None:
        here = self.folder
        here.chmod(0o755)
        for name in ("state", "spool"):
            (here / name).mkdir()
        key = here / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        # --force: munged objects to being root, and to a folder below a /tmp that others may write to
        munged = ["--force", "--num-threads=2", f"--socket={here}/munge.socket", f"--pid-file={here}/munged.pid"]
        munged += [f"--key-file={here}/munge.key", f"--seed-file={here}/munge.seed", f"--log-file={here}/munged.log"]
        quietly("munged", *munged)
        self._launch_database()
        quietly("slurmctld", "-c")
        quietly("slurmd")

    def _launch_database(self) -> None:
        here = self.folder
        mariadb = ["--no-defaults", "--user=root", f"--datadir={here}/database"]
        quietly("mariadb-install-db", *mariadb, "--skip-test-db")
        mariadb += [f"--socket={here}/mariadb.socket", "--skip-networking", f"--pid-file={here}/mariadbd.pid"]
        mariadb += [f"--log-error={here}/mariadbd.log"]
        silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen([shutil.which("mariadbd", path=PATH), *mariadb], start_new_session=True, **silent)
        wait_for((here / "mariadb.socket").exists, 30)
        quietly("slurmdbd", MYSQL_UNIX_PORT=f"{here}/mariadb.socket")
        if not wait_for(lambda: output("sacctmgr", "--noheader", "show", "stats"), 30):
            raise RuntimeError("slurmdbd does not answer\n" + self._logs())
        for words in ("cluster " + NAME, "account project", "qos urgent", "user root account=project"):
            quietly("sacctmgr", "--immediate", "add", *words.split())
        quietly("sacctmgr", "--immediate", "modify", "user", "root", "set", "qos+=urgent")

    def _wait_until_idle(self) -> None:
        if not wait_for(lambda: output("sinfo", "--noheader", "--format=%T", "--partition=main") == "idle", 30):
            raise RuntimeError("the node did not become idle\n" + self._logs())

    def _logs(self) -> str:
        logs = [(self.folder / f"{daemon}.log") for daemon in DAEMONS]
        return "\n".join(f"{log.name}:\n{log.read_text()[-1500:]}" for log in logs if log.exists())


def refuse_where_it_cannot_run() -> None:
    """Raise CannotRun unless this is Debian or Ubuntu, we are root, and there is no Slurm that is not ours."""
    if os.geteuid() != 0:
        raise CannotRun("starting Slurm's daemons takes root")
    for name in CONFIGURATION:
        folder = owner(ETC / name)
        if folder == "":
            raise CannotRun(f"{ETC / name} is there and not of a test cluster: this machine belongs to a cluster")
        if folder and any(alive(Path(folder) / f"{daemon}.pid") for daemon in DAEMONS):
            stop = f"python tests/slurm/cluster.py stop {folder}"
            raise CannotRun(f"the test cluster of {folder} runs; stop it with: {stop}")
    for process in Path("/proc").glob("[0-9]*"):
        if name_of(process.name) in ("slurmctld", "slurmd", "slurmdbd"):
            raise CannotRun(f"{name_of(process.name)} runs (process {process.name}), and is of no test cluster")
    if missing() and shutil.which("apt-get") is None:
        raise CannotRun(f"no {missing()[0]}, and no apt-get to install it")


def missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def install(record: Path) -> None:
    """Install what is missing, and note in `record` which packages that were."""
    if not missing():
        return
    before = packages()
    words = ["install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
    try:
        try:
            quietly("apt-get", *words)
        except subprocess.CalledProcessError:
            quietly("apt-get", "update", "--quiet")
            quietly("apt-get", *words)
    except subprocess.CalledProcessError as error:
        raise CannotRun(f"apt-get install {' '.join(PACKAGES)} failed: {error.stderr.strip()[-300:]}") from None
    finally:
        record.write_text("\n".join(sorted(packages() - before)))
    if missing():
        raise CannotRun(f"the packages {' '.join(PACKAGES)} hold no {missing()[0]}")


def packages() -> set[str]:
    lines = output("dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package}\n").splitlines()
    return {line.split()[1] for line in lines if line.startswith("ii")}


def owner(path: Path) -> str | None:
    """The folder of the test cluster that wrote this file; "" if something else did, None if there is none."""
    if not path.exists():
        return None
    first = path.read_text().partition("\n")[0]
    return first.removeprefix(OURS) if first.startswith(OURS) else ""


def pid_in(path: Path) -> int | None:
    """The process that the pid file names, if it is still the daemon that wrote it."""
    try:
        pid = int(path.read_text())
    except (OSError, ValueError):
        return None
    return pid if name_of(pid) == path.stem else None


def name_of(pid: int | str) -> str | None:
    """Of a process that runs: in a container, one that has ended may stay listed, with nobody to collect it."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return None
    return None if fields["State"].strip().startswith(("Z", "X")) else fields["Name"].strip()


def processes_of_jobs() -> list[int]:
    """What runs on the test cluster or has been left behind by it, by its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"SLURM_CLUSTER_NAME={NAME}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def alive(path: Path) -> bool:
    return pid_in(path) is not None


def end(path: Path) -> None:
    pid = pid_in(path)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    if not wait_for(lambda: not alive(path), 20):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return bool(met)


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def quietly(*command: str, **variables: str) -> None:
    """Run; what it says is in the exception, if it fails."""
    # RUNLEVEL: the services of installed packages are not started
    environment = os.environ | {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"} | variables
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    try:
        if arguments.action == "stop" and not (arguments.folder / MARK).exists():
            raise CannotRun(f"{arguments.folder} is not the folder of one")
        getattr(Cluster(arguments.folder), arguments.action)()
    except CannotRun as error:
        print(f"no test cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
