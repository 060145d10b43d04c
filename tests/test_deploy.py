"""Unattended: the systemd unit under a real user manager, and the Slurm script between stand-ins for
srun and scontrol."""
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import checkpoint
import forked
from run import records
import train
from conftest import ROOT, copy_sources
from helpers import assert_same_run, last, loaded

UNIT = ROOT / "deploy" / "holdfast@.service"
LIMIT = 600                         # seconds that a busy machine may take for any of this


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(0o755)
    return path


# ---- systemd ----

def home_of(folder):
    """A home folder with a checkout at holdfast, its Python where the unit looks for it."""
    python = folder / "holdfast" / ".venv" / "bin" / "python"
    executable(python, f"""
        #!/bin/sh
        exec {sys.executable} "$@"
        """)
    return folder


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd here")
    done = subprocess.run(["systemd-analyze", "--user", "verify", UNIT], text=True, capture_output=True,
                          env={**os.environ, "HOME": str(home_of(tmp_path)), "XDG_RUNTIME_DIR": str(tmp_path)})
    # with a wrong value it ends with 0 too, and says so
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stderr


def can_have_its_own_manager():
    if not shutil.which("systemctl") or not shutil.which("unshare") or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/run"], capture_output=True).returncode == 0


MANAGED = """
    # in a mount namespace of its own: a user manager wants /run/systemd/system and a runtime folder
    mount -t tmpfs none /run
    mkdir -p /run/systemd/system /run/user/0
    export XDG_RUNTIME_DIR=/run/user/0
    systemd --user &
    manager=$!
    trap 'kill -TERM $manager; wait $manager' EXIT
    until systemctl --user list-units >/dev/null 2>&1; do sleep 0.2; done
    """


def managed(home, script):
    """Run a shell script beside a systemd user manager; its output."""
    return subprocess.run(["unshare", "-m", "--kill-child", "bash", "-uc", textwrap.dedent(MANAGED) + script], text=True,
                          env={**os.environ, "HOME": str(home)}, capture_output=True, timeout=LIMIT)


def installed(home):
    """The unit as it is, with a drop-in that only shortens the pause between two tries."""
    folder = home / ".config" / "systemd" / "user"
    (folder / "holdfast@.service.d").mkdir(parents=True)
    shutil.copy(UNIT, folder)
    (folder / "holdfast@.service.d" / "quick.conf").write_text("[Service]\nRestartSec=0.1\n")
    return home


# starts in order, each as the exit code or the signal that ends it; starts that the unit makes of them;
# how the unit ends
CASES = {
    "finished": ("0", 1, "inactive"),
    "faults": ("1 70 -9 134 1 70 1 1 1 0", 10, "inactive"),
    "refused": ("1 2 0", 2, "failed"),
    "limit": ("1 75 0", 2, "inactive"),
    "asked": ("-9 143 0", 2, "inactive"),
}


@pytest.mark.slow
def test_the_unit_restarts_what_may_pass_and_leaves_what_was_refused_or_asked_for(tmp_path):
    if not can_have_its_own_manager():
        pytest.skip("no systemd user manager can be started here")
    home = installed(home_of(tmp_path))
    executable(home / "holdfast" / "train.py", """
        import os, sys
        config = sys.argv[sys.argv.index("--config") + 1]
        assert "--resume" in sys.argv
        with open(config + ".starts", "a") as log:
            log.write("start\\n")
        number = len(open(config + ".starts").readlines())
        end = int(open(config).read().split()[number - 1])
        if end < 0:
            os.kill(os.getpid(), -end)
        sys.exit(end)
        """)
    configs = home / "holdfast" / "configs" / "local"
    configs.mkdir(parents=True)
    for name, (ends, _, _) in CASES.items():
        (configs / f"{name}.yaml").write_text(ends)
    done = managed(home, f"""
        for name in {' '.join(CASES)}; do
            systemctl --user start holdfast@$name
        done
        for name in {' '.join(CASES)}; do
            until state=$(systemctl --user show -P ActiveState holdfast@$name)
                  [ $state = inactive ] || [ $state = failed ]; do sleep 0.2; done
            echo "$name $state"
        done
        """)
    assert done.returncode == 0, done.stdout + done.stderr
    states = dict(line.split() for line in done.stdout.splitlines())
    for name, (_, starts, state) in CASES.items():
        begun = (configs / f"{name}.yaml.starts").read_text().count("start")
        assert (begun, states[name]) == (starts, state), name


@pytest.mark.slow
def test_a_training_that_is_killed_under_the_unit_goes_on_and_ends_bit_identical(small_corpus, tmp_path):
    if not can_have_its_own_manager():
        pytest.skip("no systemd user manager can be started here")
    home = installed(home_of(tmp_path / "home"))
    train.run(loaded(small_corpus, tmp_path / "alone"))
    loaded(small_corpus, tmp_path)
    checkout = home / "holdfast"
    copy_sources(checkout)
    (checkout / "configs" / "local").mkdir(parents=True)
    shutil.copy(tmp_path / "config.yaml", checkout / "configs" / "local" / "train.yaml")
    saved = tmp_path / "t" / "checkpoints"
    done = managed(home, f"""
        systemctl --user set-environment BGB_MID_EPOCH_MINUTES=0 OMP_NUM_THREADS=1
        systemctl --user start holdfast@train
        until ls {saved}/mid_epoch_*.pt >/dev/null 2>&1; do sleep 0.1; done
        systemctl --user kill --signal=KILL holdfast@train
        while [ $(systemctl --user show -P ActiveState holdfast@train) != inactive ]; do sleep 0.2; done
        """)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line)["kind"] for line in (tmp_path / "t" / "saves.jsonl").open()]
    assert events.count("resume") == 1
    assert_same_run(tmp_path, tmp_path / "alone")


# ---- torchrun ----

PROGRAM = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    import train

    def attempt(args):
        with open(args.config, "a") as log:
            log.write("start\\n")
        return int(open(args.config).readline())

    train.attempt = attempt
    sys.exit(train.main(["--config", sys.argv[2], *sys.argv[3:]]))
    """


@pytest.mark.slow
@pytest.mark.parametrize("code, options, starts, ended", [
    (2, ["2", "75"], 1, 0), (75, ["2", "75"], 1, 0), (1, ["2", "75"], 3, 1), (2, [], 3, 1)])
def test_torchrun_starts_again_what_may_pass_and_not_what_is_given_as_success(tmp_path, code, options, starts, ended):
    program = executable(tmp_path / "program.py", PROGRAM)
    (tmp_path / "log").write_text(f"{code}\n")
    options = ["--success-exit-status", *options] if options else []
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                           "--max-restarts=2", program, ROOT, tmp_path / "log", *options], capture_output=True, text=True,
                          timeout=LIMIT)
    assert (tmp_path / "log").read_text().count("start") == starts, done.stderr
    assert done.returncode == ended and (f"exit code {code}, given as 0" in done.stderr) == (ended == 0)


# ---- a directory whose holder is on its way out ----

HOLDER = """
    import subprocess, sys
    sys.path.insert(0, sys.argv[1])
    import checkpoint
    held = checkpoint.lock(sys.argv[2])
    subprocess.Popen(["sleep", "1000"], pass_fds=[held.fd])
    print("held", flush=True)
    sys.stdin.read()
    """


def test_a_directory_whose_holder_is_gone_but_not_quite_is_a_passing_fault_and_any_other_a_refusal(small_corpus, tmp_path):
    config = loaded(small_corpus, tmp_path)
    place = tmp_path / "t" / "checkpoints"
    place.mkdir(parents=True)
    program = executable(tmp_path / "holder.py", HOLDER)
    holder = forked.Popen([sys.executable, program, ROOT, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(train.Refused, match=f"in use by process {holder.pid}") as caught:
            train.run(config)
        assert not isinstance(caught.value, train.TemporaryFault)
        holder.kill()
        holder.wait()
        with pytest.raises(train.TemporaryFault, match="it is ending: try again"):
            train.run(config)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_process_that_was_killed_and_hangs_in_the_kernel_is_leaving(request):
    assert not records.is_ending(os.getpid())
    freezer = Path("/sys/fs/cgroup/freezer", f"holdfast-{os.getpid()}")
    try:
        freezer.mkdir()
    except OSError:
        pytest.skip("no cgroup freezer to hold a killed process in")
    request.addfinalizer(freezer.rmdir)
    child = subprocess.Popen(["sleep", "1000"])
    try:
        (freezer / "cgroup.procs").write_text(str(child.pid))
        (freezer / "freezer.state").write_text("FROZEN")
        while (freezer / "freezer.state").read_text() != "FROZEN\n":
            time.sleep(0.01)
        assert not records.is_ending(child.pid)
        child.kill()
        assert child.poll() is None and records.is_ending(child.pid)
    finally:
        (freezer / "freezer.state").write_text("THAWED")
        child.kill()
        child.wait()
    assert records.is_ending(child.pid)


# ---- Slurm ----

# runs the tasks of one job step as srun does: signals go to every task, the highest exit code is its own
SRUN = """
    #!%(python)s
    import os, signal, subprocess, sys
    command = [word for word in sys.argv[1:] if not word.startswith("--")]
    tasks = []
    def forward(number, frame):
        for task in tasks:
            task.send_signal(number)
    signal.signal(signal.SIGUSR2, forward)
    open("srun.pid", "w").write(str(os.getpid()))
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        tasks.append(subprocess.Popen(command, env={**os.environ, **place}))
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))
    """
SCONTROL = """
    #!/bin/sh
    case $1 in
        show) echo localhost ;;
        requeue) echo "$2" >> requeued ;;
    esac
    """


def cluster(folder, program, **environment):
    """A checkout with the script, a train.py, and a cluster's commands; the environment of a job."""
    folder.mkdir(parents=True, exist_ok=True)
    executable(folder / "bin" / "srun", SRUN.replace("%(python)s", sys.executable))
    executable(folder / "bin" / "scontrol", SCONTROL)
    executable(folder / "bin" / "python", f"""
        #!/bin/sh
        exec {sys.executable} "$@"
        """)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    (folder / "train.py").write_text(program)
    place = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "localhost",
             "SLURM_NTASKS": "1", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return {**os.environ, **place, **environment}


@pytest.mark.parametrize("code, requeued", [
    (0, False), (2, False), (75, True), (140, True), (143, False), (130, False), (1, True), (70, True), (137, True)])
def test_a_slurm_job_requeues_itself_when_it_was_cut_and_not_when_it_was_refused_or_ended(tmp_path, code, requeued):
    # a month of planned restarts is no fault
    place = cluster(tmp_path, f"import sys; sys.exit({code})", SLURM_RESTART_COUNT="30")
    done = subprocess.run(["bash", ROOT / "deploy/slurm.sh", "c.yaml"], env=place, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == code and not done.stderr, done.stderr
    asked = (tmp_path / "requeued").read_text().split() if (tmp_path / "requeued").exists() else []
    assert asked == ["1234"] * requeued


@pytest.mark.slow
def test_a_slurm_job_requeues_itself_after_twenty_faults_in_a_row_and_a_job_that_saved_begins_the_count_anew(tmp_path):
    place = cluster(tmp_path, "import os, sys; sys.exit(int(os.environ['CODE']))")
    requeued = tmp_path / "requeued"
    for code, often, times in ((1, 20, 20), (75, 1, 21), (70, 20, 41), (1, 1, 41)):
        for _ in range(often):
            subprocess.run(["bash", ROOT / "deploy/slurm.sh", "c.yaml"], env={**place, "CODE": str(code)},
                           stdout=subprocess.DEVNULL, timeout=LIMIT)
        assert len(requeued.read_text().split()) == times


@pytest.mark.slow
def test_two_processes_under_slurm_save_at_usr2_and_go_on_in_the_next_job(small_corpus, tmp_path):
    loaded(small_corpus, tmp_path)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; sys.exit(train.main())"
    place = cluster(tmp_path / "checkout", program, SLURM_NTASKS="2", BGB_MID_EPOCH_MINUTES="0")
    command = ["bash", str(ROOT / "deploy/slurm.sh"), str(tmp_path / "config.yaml")]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, env=place, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + LIMIT
    while not list((tmp_path / "t" / "checkpoints").glob("mid_epoch_*.pt")):
        assert job.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(int((tmp_path / "checkout" / "srun.pid").read_text()), signal.SIGUSR2)
    code = job.wait(LIMIT)
    said = (tmp_path / "log").read_text()
    assert code == 140 and "stopped by SIGUSR2, saved" in said, said
    assert (tmp_path / "checkout" / "requeued").read_text().split() == ["1234"]
    assert checkpoint.find_resume(tmp_path / "t" / "checkpoints") is not None

    again = subprocess.run(command, env=place, capture_output=True, text=True, timeout=LIMIT)
    assert again.returncode == 0 and "resumed: epoch" in again.stdout, again.stdout + again.stderr
    assert last(tmp_path)["epoch"] == 2
    assert (tmp_path / "checkout" / "requeued").read_text().split() == ["1234"]
