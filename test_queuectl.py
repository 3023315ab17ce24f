"""Tests of queuectl. To find a test, look up its promise or its command here:

    What is promised
        TestAcknowledgedJobsSurvive    an enqueue that returned 0 is on the disk
        TestNeverLostNeverStuck        whatever is killed, a job runs again
        TestRunsNeverOverlap           two runs of a job never overlap
        TestAtLeastOnce                a run without a recorded end is repeated
        TestNotBlamed                  what counts as an attempt, and what does not
        TestEndedFromOutsideEndsWhole  timeout, cancel and stop end all processes
        TestGracefulStop               signals let running jobs finish
        TestOutputIsKept               the last bytes of the output are kept in order
        TestNamesOfFiles               the files beside a database
        TestPrivateFiles               file modes, descriptors, other users
        TestErrorsAreOneLine           bad queues, full disks, locked databases
        TestNothingElseIsSignalled     strangers and copies of a queue are spared
        TestMigration                  a queue of an older version is converted
    Life of a job
        TestLifeOfAJob                 one test for each arrow; the forbidden arrows
    Commands
        TestEnqueue, TestEnqueueUnique, TestList, TestShow, TestLogs, TestWait,
        TestEdit, TestRetry, TestPauseAndResume, TestBackup, TestCancel, TestDelete,
        TestDeadLetterQueue, TestStatus, TestStats, TestWorkerStart, TestDrain,
        TestWorkerStop, TestConfig, TestDashboardCommand, TestInstall, TestCompletion,
        TestSelftest                   one class for each command
        TestRemovedQueue               removing the database ends pools and waits
        TestCommandLine                help, usage, spelling, --db
        TestTerminal                   tables, colours, control characters
    Settings and policy
        TestPolicy                     backoff, durations, times; the bad inputs
        TestKeep                       pools delete old completed jobs
        TestOnDead                     a command is started for each death
    Dependencies and locks
        TestDependencies               jobs wait for the jobs named in `after`
        TestLocks                      jobs that share a lock run one at a time
        TestClockSteps                 what a clock that is set back may not do
        TestGate                       random operations keep the gate right
    Launchers
        TestLaunchers                  commands that run elsewhere
    Differences between systems
        TestSystems                    locales, clocks, the size of the log
    Statistics
        TestStatistics                 rates, run times, waiting times, errors
    The page
        TestServer                     requests, answers, refusals, metrics
        TestApi                        what the API gives and changes
        TestPage                       the parts of the page: verdict, tiles, table
        TestPanel                      the panel of a job, and its output
    The library
        TestLibrary                    the class Queue, in forks and threads
    Chaos
        TestChaos                      random kills; then no job may be lost
    The file itself
        TestSource                     Python 3.8, few imports
        TestReadme                     what the README shows is what happens

Most tests call `main` in this process. Where processes matter, the tests start real
ones and kill them. No test sleeps to wait for something: `wait_until` polls, with a
deadline. Each test has a folder of its own.

Tests marked `mechanism` look into the program: they call private functions or patch
them. All others see what a user sees. `-m "not mechanism"` leaves the former out.
"""
import ast
import atexit
import contextlib
import ctypes
import functools
import gc
import gzip
import http.client
import inspect
import io
import json
import logging.handlers  # pools need it; the forks here then share it
import os
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import urllib.parse
import warnings
import zipfile
from collections import Counter
from xml.etree import ElementTree

import pytest

import queuectl

if os.name == "posix":
    import fcntl
    import multiprocessing.popen_fork  # likewise
    import pty
    import termios
else:
    import msvcrt

# ======================================================================================
# Marks, paths and constants
# ======================================================================================

with warnings.catch_warnings():  # no configuration file registers this marker
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    mechanism = pytest.mark.mechanism

posix_only = pytest.mark.skipif(os.name != "posix", reason="is about POSIX alone")
fork_only = pytest.mark.skipif(
    os.name != "posix", reason="patches workers, which start afresh on this system")
windows_only = pytest.mark.skipif(
    os.name == "posix", reason="is about Windows alone")
not_on_wine = pytest.mark.skipif(
    os.name != "posix" and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version"),
    reason="wine's console keeps the pipes of its parent open")
needs_proc = pytest.mark.skipif(
    os.name != "posix" or not os.path.exists("/proc/self/stat"), reason="needs /proc")
needs_lsof = pytest.mark.skipif(not shutil.which("lsof"), reason="needs lsof")
def can_mount():
    """Tell whether this process may mount file systems, in a namespace of its own."""
    return bool(shutil.which("unshare")) and subprocess.run(
        ["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode == 0


needs_mounts = pytest.mark.skipif(
    os.name != "posix" or not can_mount(), reason="needs the right to mount")
needs_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can act as other users")

SCRIPT = os.path.abspath(queuectl.__file__)
HERE = os.path.dirname(SCRIPT)
DAY = 86400  # seconds
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # what os.kill does on Windows
LIMIT = 1000
# How a byte that is no UTF-8 is shown: on Windows it is in a code page.
BYTE_FF = "\\xff" if os.name == "posix" else b"\xff".decode("mbcs")
SHORT_TIMEOUT = 0.5 if os.name == "posix" else 3  # seconds; a command starts in less

# These constants make the program less patient, so that the tests are quick.
QUICK = """
queuectl.POOL_LOCK_TIMEOUT = queuectl.IDLE_INTERVAL = queuectl.TROUBLE_INTERVAL = 0.1
queuectl.RECOVERY_INTERVAL, queuectl.RESTART_INTERVAL = 0.05, 0.03
queuectl.POLL_INTERVAL, queuectl.WAIT_INTERVAL = 0.02, 0.01
queuectl.STEP_INTERVAL = 0.005
queuectl.TERM_GRACE, queuectl.BLAME_DELAY = 0.2, 0.04
"""
exec(QUICK)  # commands that run in this process wait for pools as well

# ======================================================================================
# A folder for each test, and commands that run until they are ended
# ======================================================================================

TOOLS = tempfile.mkdtemp()  # files that all tests share
atexit.register(shutil.rmtree, TOOLS, ignore_errors=True)
STARTED = []  # the processes that the running test has started


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Give each test a folder of its own, and end its processes after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUEUECTL_DB", raising=False)
    yield tmp_path
    (tmp_path / "go").touch()  # for the commands of a test that has failed before
    for process in list(STARTED):
        kill_pool(process)
    for pid in live_commands():
        with contextlib.suppress(OSError):
            os.kill(pid, KILL)
    for name in os.listdir(TOOLS):  # or live_commands would get slower and slower
        if name.endswith(".alive"):
            with contextlib.suppress(OSError):  # Windows keeps one open for a moment
                os.remove(os.path.join(TOOLS, name))


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers that a test or the program has changed."""
    numbers = signal.valid_signals() - {KILL}
    before = {number: signal.getsignal(number) for number in numbers}
    # Under `nohup` hangups are ignored, and what a test starts would inherit that. A
    # handler is not inherited, and these tests outlive the terminal as before.
    if os.name == "posix" and before[signal.SIGHUP] == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    for number in numbers:
        if signal.getsignal(number) != before[number]:
            signal.signal(number, before[number])
    signal.set_wakeup_fd(-1)


def try_lock(file):
    """Lock a file without the tested program's help. Return False if it is locked."""
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return True
    except OSError:
        return False


# A command that runs until it is ended, on every system. While it lives, it locks a
# file.
# With the argument `once` only its first run lasts. Each run adds a line to `out`, and
# two runs at the same time make a file `overlaps`.
LONG_PROGRAM = """
import os, sys, time
if os.name == "posix":
    import fcntl
else:
    import msvcrt
%s
if "closed" in sys.argv:
    os.closerange(0, 200)
if "tree" in sys.argv:
    import subprocess
    subprocess.Popen([sys.executable, __file__])
if "once" in sys.argv:
    alone = open("lock", "a")
    if not try_lock(alone):
        open("overlaps", "a").close()
    with open("out", "a") as out:
        print("run", file=out)
    if len(open("out").readlines()) > 1:
        sys.exit()
mark = open(os.path.join(os.path.dirname(__file__), "%%d.alive" %% os.getpid()), "a")
while not try_lock(mark):  # live_commands may hold the lock for a moment
    pass
if "thread" in sys.argv:  # the main thread ends, another one goes on
    import ctypes, threading
    threading.Thread(target=time.sleep, args=(77,)).start()
    ctypes.CDLL(None).pthread_exit(None)
time.sleep(77)
""" % inspect.getsource(try_lock)
with open(os.path.join(TOOLS, "long_command.py"), "w") as file:
    file.write(LONG_PROGRAM)
LONG_COMMAND = queuectl.shell_line([sys.executable, "-S", file.name])  # -S is quicker

# A command that runs until there is a file `go`; on Windows, until it is ended.
UNTIL_GO = (
    "while ! test -e go; do sleep 0.05; done" if os.name == "posix" else LONG_COMMAND)

# Python compiles a script at each start, which takes longer than most tests. So the
# program is compiled once, and processes run or import the compiled file.
COMPILED = py_compile.compile(
    SCRIPT, os.path.join(TOOLS, "queuectl.pyc"), doraise=True)

if os.name != "posix":  # commands that the tests take from a POSIX shell
    sleep = '"%s" -c "import time as t; t.sleep(%%1)"' % sys.executable
    for name, line in (("true", "exit /b 0"), ("sleep", sleep)):
        with open(os.path.join(TOOLS, name + ".cmd"), "w") as file:
            file.write("@" + line)
    os.environ["PATH"] += os.pathsep + TOOLS


def live_commands():
    """Return the pids of the long commands that are alive."""
    pids = []
    for name in os.listdir(TOOLS):
        if name.endswith(".alive"):
            with open(os.path.join(TOOLS, name), "a") as mark:
                if not try_lock(mark):
                    pids.append(int(name.partition(".")[0]))
    return pids


def count_starts():
    """Return how often the command LONG_COMMAND once has started."""
    return read_text("out").count("run") if os.path.exists("out") else 0


def python_command(program):
    """Return the shell line that runs a Python program without double quotes."""
    return queuectl.shell_line([sys.executable, "-c", program])


# ======================================================================================
# The command line, called in this process
# ======================================================================================


class Answer:
    """The exit code, the output and the errors of a command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        assert self.out.count("\n") == 1, "JSON is one line: %r" % self.out
        return json.loads(self.out)


class ByteStream(io.TextIOWrapper):
    """A text stream over bytes, like sys.stdout."""

    def text(self):
        self.flush()
        text = self.buffer.getvalue().decode("utf-8", "backslashreplace")
        return text.replace(os.linesep, "\n")


def cli(*argv, stdin=b""):
    """Run a command in this process. Return its answer."""
    out, err = ByteStream(io.BytesIO(), "utf-8"), ByteStream(io.BytesIO(), "utf-8")
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = queuectl.main(list(argv))
            except SystemExit as end:
                code = end.code or 0
    finally:
        sys.stdin = before
    return Answer(code, out.text(), err.text())


def run_ok(*argv, stdin=b""):
    """Run a command that must succeed. Return its answer."""
    answer = cli(*argv, stdin=stdin)
    assert answer.code == 0, answer.err
    return answer


def run_refused(*argv, stdin=b"", code=1):
    """Run a command that must fail with one line of error. Return this line."""
    answer = cli(*argv, stdin=stdin)
    assert answer.code == code, (answer.code, answer.err)
    assert answer.out == "" and answer.err.startswith("queuectl: ")
    assert answer.err.count("\n") == 1, answer.err
    return answer.err


def enqueue(command="true", **fields):
    """Enqueue a job by the command line. Return its id."""
    job = dict(fields, command=command)
    return run_ok("enqueue", json.dumps(job), "--json").json[0]["id"]


def jobs(*options):
    """Return the jobs that `list` prints, by their ids."""
    return {job["id"]: job for job in run_ok("list", "--json", *options).json}


def details_of(name):
    """Return the document that `show` prints about a job."""
    return run_ok("show", name, "--json").json


def read_status():
    """Return the document that `status` prints."""
    return run_ok("status", "--json").json


def configure(name, value):
    """Change a setting of the queue."""
    run_ok("config", "set", name, value)


def drain_answer(count=1):
    """Let a pool run every job that can run. Return the answer of the pool."""
    pool = start_pool("--drain", "--quiet", count=count)
    return Answer(pool.wait(60), pool.stdout.read(), pool.stderr.read())


def drain(count=2):
    """Let a pool run every job that can run. Return its exit code."""
    answer = drain_answer(count)
    assert answer.code in (0, 1), answer.err
    return answer.code


# ======================================================================================
# The database and the files of a queue, read without the program
# ======================================================================================


def queue_path():
    """Return the path of the queue that commands use by default."""
    return os.path.realpath(os.environ.get("QUEUECTL_DB", "queuectl.db"))


def query(statement, *values, timeout=60):
    """Return the rows of an SQL statement; this is quicker than a command."""
    with contextlib.closing(sqlite3.connect(queue_path(), timeout=timeout)) as db:
        return db.execute(statement, values).fetchall()


def state_of(name):
    """Return the state of a job."""
    (state,), = query("SELECT state FROM jobs WHERE id = ?", name)
    return state


def attempts_of(name):
    """Return the number of attempts of a job."""
    (count,), = query("SELECT attempts FROM jobs WHERE id = ?", name)
    return count


def run_errors(name):
    """Return the errors of a job's runs, the first run first."""
    rows = query("SELECT runs.error FROM runs JOIN jobs USING (seq)"
                 " WHERE id = ? ORDER BY runs.run", name)
    return [error for error, in rows]


def run_order():
    """Return the ids of the jobs that have run, in the order of their starts."""
    return [id for id, in query(
        "SELECT id FROM runs JOIN jobs USING (seq) ORDER BY started_at, runs.run")]


def read_text(path):
    """Return the text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def leftover_files():
    """Return the files in this folder that should be gone when no pool runs."""
    return sorted(set(os.listdir(".")) - {"queuectl.db", "queuectl.log", "out", "lock"})


@contextlib.contextmanager
def locked_database():
    """Hold the write lock of the database, as another program may do."""
    with contextlib.closing(sqlite3.connect("queuectl.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


# ======================================================================================
# Processes
# ======================================================================================


def poll_until(condition, timeout):
    """Wait for a condition. Return False if it does not hold before the timeout."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.003)
    return True


def wait_until(condition, timeout=20):
    """Wait for a condition. Fail with the jobs and the log after the timeout."""
    if not poll_until(condition, timeout):
        pytest.fail("never happened:\n" + cli("list").out + read_text("queuectl.log"))


def run_process(*argv, **options):
    """Run a command as a process of its own. Return the completed process."""
    return subprocess.run(
        [sys.executable, COMPILED, *argv], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", timeout=60, **options)


def run_with_mounts(script):
    """Run a shell script in which `queuectl` is the program, and mounts are its own."""
    own = queuectl.shell_line([sys.executable, COMPILED])
    return subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c",
         "queuectl() { %s \"$@\"; }\n%s" % (own, script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)


def python_environment(**variables):
    """Return an environment in which Python imports the compiled program."""
    return dict(os.environ, PYTHONPATH=TOOLS, **variables)


def forget_parent():
    """Drop what the child of a fork inherited but a new process would not have."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in map(int, os.listdir("/dev/fd")):
        if fd not in (0, 1, 2, null):  # a late close then hits no other file
            os.dup2(null, fd, inheritable=False)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            interrupt = number == signal.SIGINT
            signal.signal(
                number, signal.default_int_handler if interrupt else signal.SIG_DFL)
    sys.unraisablehook = sys.__unraisablehook__
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, encoding="utf-8") for fd, mode in enumerate("rww"))


def become_queuectl(argv, program=""):
    """Go on as a new process of queuectl in the child of a fork."""
    code = 1
    gc.freeze()  # or a collection would copy all memory of the parent
    try:
        forget_parent()
        queuectl.ENVIRONMENT = dict(os.environb)
        exec(program, {"queuectl": queuectl})
        code = queuectl.main(argv)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class ForkedProcess:
    """A process of queuectl with the methods of Popen that the tests use.

    It is a fork of this process, which has imported every module. So it starts ten
    times as quickly as a new process.
    """

    def __init__(self, argv, program):
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            stdin = os.open(os.devnull, os.O_RDONLY)
            for number, fd in enumerate((stdin, stdout, stderr)):
                os.dup2(fd, number)
            become_queuectl(argv, program)
        os.close(stdout)
        os.close(stderr)
        self.stdout = open(out, encoding="utf-8")
        self.stderr = open(err, encoding="utf-8")

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                exited = os.WIFEXITED(status)
                self.returncode = (
                    os.WEXITSTATUS(status) if exited else -os.WTERMSIG(status))
        return self.returncode

    def wait(self, timeout=20):
        if not poll_until(lambda: self.poll() is not None, timeout):
            raise subprocess.TimeoutExpired("queuectl", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


PROGRAM = "import queuectl, sys\n%s\nsys.exit(queuectl.main())"


def start_process(*argv, program="", fresh=os.name != "posix"):
    """Start a process of queuectl in which a Python program patches queuectl first."""
    if not fresh:
        process = ForkedProcess(argv, program)
    else:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM % program, *argv], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            env=python_environment())
    STARTED.append(process)
    return process


def end_process(process):
    """Kill a process if it is alive, and close its pipes."""
    if process.poll() is None:
        process.send_signal(KILL)
    process.wait(10)
    process.stdout.close()
    process.stderr.close()
    STARTED.remove(process)


def start_pool(*options, count=2, script="", **how):
    """Start a pool, patched by a script, and wait until its workers are there."""
    argv = ["worker", "start", "--count", str(count), *options]
    pool = start_process(*argv, program=QUICK + script, **how)
    wait_until(
        lambda: len(workers_of(pool.pid)) == count or pool.poll() is not None)
    return pool


def workers_of(pid):
    """Return the pids of the workers of a pool."""
    return queuectl.living_pools(queue_path()).get(pid, [])


def kill_pool(pool):
    """Kill a pool and its workers at the same time."""
    with contextlib.suppress(OSError):
        pids = [pool.pid, *workers_of(pool.pid)] if pool.poll() is None else []
        # They are stopped first, so that none sees another one die.
        for number in (signal.SIGSTOP, KILL) if os.name == "posix" else (KILL,):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
    end_process(pool)


def signal_commands(number, *pids):
    """Signal the groups of the long commands, then these processes."""
    for pid in live_commands():
        os.killpg(os.getpgid(pid), number)
    for pid in pids:
        os.kill(pid, number)


def processes_of_this_test(file=""):
    """Return the pids of the processes that work in this folder or use files of it.

    An idle worker works in /, but has files of the queue open.
    """
    here, pids = os.path.join(os.getcwd(), file).rstrip("/"), []
    for pid in set(filter(str.isdigit, os.listdir("/proc"))) - {str(os.getpid())}:
        with contextlib.suppress(OSError):
            fds = os.listdir("/proc/%s/fd" % pid)
            links = ["/proc/%s/fd/%s" % (pid, fd) for fd in fds]
            links.append("/proc/%s/cwd" % pid)
            if any((os.readlink(link) + "/").startswith(here + "/") for link in links):
                pids.append(int(pid))
    return pids


def fork_and_run(action):
    """Run an action in a forked child, which exits with 0 if the result is true.

    Return the pid of the child.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = 0 if action() else 1
    finally:
        os._exit(code)


def fork_on_terminal(argv, columns=80):
    """Start a command on a terminal of its own. Return its pid and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        size = struct.pack("hhhh", 24, columns, 0, 0)
        fcntl.ioctl(0, termios.TIOCSWINSZ, size)
        # A background process of a script would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become_queuectl(argv)
    return pid, terminal


def read_to_end(terminal):
    """Return what a terminal still shows until its command has ended; close it."""
    shown = b""
    with contextlib.suppress(OSError):  # the command has closed its end
        while True:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    return shown


def run_on_terminal(*argv, keys=b"", columns=60):
    """Run a command on a terminal. Return its exit code and what the terminal shows."""
    pid, terminal = fork_on_terminal(argv, columns)
    shown = b""
    with contextlib.suppress(OSError):  # the command has closed its end
        while True:
            shown += os.read(terminal, 4096)
            # Ctrl-C drops the text that is not read yet, so wait for a whole screen.
            if keys and b"\x1b[J" in shown:
                os.write(terminal, keys)
                keys = b""
    os.close(terminal)
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1]), shown.decode()


# ======================================================================================
# A queue in this process, with a clock that stands still
# ======================================================================================


@pytest.fixture
def clock():
    """Make a clock that stands still until a test moves it."""

    class Clock:
        now = 1e9

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def queue(clock):
    """Open a queue whose time is the clock's."""
    with queuectl.Queue("queuectl.db", clock=clock) as queue:
        yield queue


def add_job(queue, **fields):
    """Enqueue a job through the library. Return its row."""
    job = dict({"command": "true", "id": "job"}, **fields)
    queue.enqueue([queuectl.checked_job(job, queue.defaults())])
    return queue.job(job["id"])


def add_jobs(queue, rows):
    """Enqueue jobs given as dictionaries through the library."""
    queue.enqueue(queuectl.checked_job(row, queue.defaults()) for row in rows)


def claim(queue):
    """Claim the next job for worker 1, without a lease. Return the run."""
    return queue.claim(1, lambda run: None)


def make_outcome(error="exit 1", **fields):
    """Return the outcome of a run, of the kind that has this error."""
    kinds = {None: "completed", "worker died": "lost", "cancelled": "cancelled",
             "stopped": "stopped"}
    outcome = queuectl.Outcome(kinds.get(error, "failed"), 1, error, 1e9, b"")
    return outcome._replace(**fields)


def claim_and_complete(queue):
    """Let the next job be completed. Return its id."""
    run = claim(queue)
    queue.complete(run, make_outcome(None))
    return run.id


@contextlib.contextmanager
def leased_run(queue, worker):
    """Claim a job, and hold the lease of its run in this process."""
    leases = []
    run = queue.claim(worker, lambda run: leases.append(
        queuectl.Lease(run.lease_path, run.output_limit)))
    try:
        yield run, leases[0]
    finally:
        with contextlib.suppress(OSError):
            os.close(leases[0].fd)


@contextlib.contextmanager
def lease_heir(lease):
    """Start a process that inherits a lease. Yield its pid."""
    with subprocess.Popen(["sleep", "77"], pass_fds=[lease.fd]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def make_supervisor(path="queuectl.db"):
    """Return the supervisor of a pool that does not run, to call its methods."""
    return queuectl.Supervisor(
        path, 1, is_drain=False, is_quiet=True, show_progress=None)


def make_reaper(queue):
    """Return the reaper of a pool that does not run, to call its methods."""
    reaper = queuectl.Reaper(queue.path, queuectl.open_log(queue.path, "pool", True))
    reaper.pid = 0  # it is not this process
    return reaper


def forbid_signals(monkeypatch, reaper):
    """Let the test fail if a reaper signals a process. Return the reaper."""
    monkeypatch.setattr(reaper, "end_orphan", lambda *_: pytest.fail("signalled"))
    monkeypatch.setattr(
        queuectl, "signal_processes", lambda *_: pytest.fail("signalled"))
    return reaper


# ======================================================================================
# Scripts that patch a pool, and an output in which every byte is known
# ======================================================================================

# The pool is slow to see that a stop belongs to its whole service, as by default.
DEFAULT_BLAME_DELAY = "queuectl.BLAME_DELAY = 0.5"

# The system has no /proc.
WITHOUT_PROC = """
exists = queuectl.os.path.exists
queuectl.os.path.exists = lambda path: path != "/proc/self/fd" and exists(path)
"""

# The clock is set back by an hour while a file `back` is there.
CLOCK_SET_BACK = """
BACK = queuectl.os.path.abspath("back")
def clock():
    return queuectl.time.time() - 3600 * queuectl.os.path.exists(BACK)
def make(*args, queue=queuectl.Queue, **options):
    return queue(*args, clock=clock, **options)
queuectl.Queue = make
"""

# The supervisor can't read the queue while a file `trouble` is there.
SUPERVISOR_IN_TROUBLE = """
def keep_house(self, queue, keep_house=queuectl.Supervisor.maintain):
    if queuectl.os.path.exists("trouble"):
        trouble = "trouble %s" % queuectl.time.monotonic()  # each is logged
        raise queuectl.sqlite3.OperationalError(trouble)
    return keep_house(self, queue)
queuectl.Supervisor.maintain = keep_house
"""


def numbered_output(first, last):
    """Return these bytes of an output whose lines are numbered and ten bytes long."""
    lines = b"".join(b"%9d\n" % n for n in range(first // 10, last // 10 + 1))
    return lines[first % 10 :][: last - first]


# A Python program that begins with this prints the same lines, in large pieces.
NUMBERED_OUTPUT = "import sys; ten = lambda a, b: [sys.stdout.write(''.join(" \
    "f'{n:9}' + chr(10) for n in range(m // 10, min(b, m + 50000) // 10)))" \
    " for m in range(a, b, 50000)];"


# ======================================================================================
# The dashboard, and a client in place of a browser
# ======================================================================================


class Dashboard:
    """A dashboard in a process of its own, and a client of it."""

    def __init__(self, *options):
        self.process = start_process("dashboard", "--port", "0", *options)
        self.port = int(re.search(r":(\d+)/", self.process.stdout.readline())[1])
        self.own = "127.0.0.1:%d" % self.port

    def ask(self, path, method="GET", body=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        site = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(site):
            site.request(method, path, body, {"Host": self.own, **headers})
            answer = site.getresponse()
            return types.SimpleNamespace(
                status=answer.status, headers=answer.headers,
                text=answer.read().decode())

    def json(self, path):
        answer = self.ask(path)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)

    def own_headers(self):
        token = re.search(r'nonce="(\w+)"', self.ask("/").text)[1]
        return {"Origin": "http://" + self.own, "X-Token": token}

    def post(self, path, **headers):
        return self.ask(path, "POST", **{**self.own_headers(), **headers})


@pytest.fixture
def dashboard():
    """Start a dashboard of the test's queue."""
    return Dashboard()


@pytest.fixture(scope="module")
def empty_dashboard(tmp_path_factory):
    """Start one dashboard of an empty queue for all tests that change nothing."""
    db = tmp_path_factory.mktemp("empty") / "queuectl.db"
    dashboard = Dashboard("--db", str(db))
    STARTED.remove(dashboard.process)  # it outlives a test
    yield dashboard
    STARTED.append(dashboard.process)
    end_process(dashboard.process)


@pytest.fixture
def page(queue):
    """Make a part of the page by its address. Return it as a tree of elements.

    So each test of the page also tests that its markup is well-formed.
    """
    routes = {"/chart": queuectl.chart_route, "/output": queuectl.piece_route}

    def ask(address="/", **options):
        path, _, query = address.partition("?")
        query = dict(urllib.parse.parse_qsl(query.partition("#")[0]))
        if path in routes:
            made = routes[path](queue, query)
        else:
            made = queuectl.make_page(
                queue, query, queuectl.Site(queue.path, "localhost"), **options)
        assert not re.search(r">(\[\]|None|False)<", made)  # an element that is left out
        return ElementTree.fromstring("<body>%s</body>" % made)

    return ask


def words_of(node):
    """Return the text of an element, with single spaces."""
    return " ".join("".join(node.itertext()).split())


def named_part(node, name):
    """Return the element with this id."""
    return node.find(".//*[@id='%s']" % name)


def table_of(page):
    """Return the cells of the table of jobs."""
    return [[words_of(cell) for cell in row] for row in page.findall(".//tbody/tr")]


def alerts_of(node):
    """Return the lines of the page about what needs somebody, folded ones as well."""
    return [row for row in named_part(node, "alerts").iter("li")
            if row.find("details") is None]


def links_of(node):
    """Return the addresses of all links, by their words."""
    return {words_of(link): link.get("href") for link in node.iter("a")}


def buttons_of(node):
    """Return the attributes of all buttons, by their words."""
    return {words_of(button): dict(button.attrib) for button in node.iter("button")
            if not button.get("hidden")}


def let_die(queue, id, error="exit 1", output=b"", **fields):
    """Enqueue a job and let it die of an error."""
    add_job(queue, id=id, max_retries=1, **fields)
    run = claim(queue)
    assert run.id == id
    queue.fail(run, make_outcome(error, output=output, finished_at=queue.clock()))


# An id that is markup, a path and a quotation at the same time.
NASTY_ID = "<script>alert(1)</script>/../ \"'&é"


# ======================================================================================
# What is promised
# ======================================================================================


class TestAcknowledgedJobsSurvive:
    """An enqueue that returned 0 is on the disk."""

    @mechanism
    @posix_only
    @pytest.mark.skipif(
        not shutil.which("strace"), reason="needs strace to see the sync"
    )
    def test_an_acknowledged_job_was_synced_to_the_disk(self):
        enqueue(id="first")
        job = '{"id":"second","command":"true"}'
        trace = [
            "strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write,pwrite64", "-o",
            "trace"]
        with contextlib.closing(sqlite3.connect(queue_path())) as db:
            # Or its process would be the last to close the file, and sync it then.
            db.execute("SELECT * FROM jobs").fetchall()
            subprocess.run([*trace, sys.executable, SCRIPT, "enqueue", job],
                           stdout=subprocess.PIPE, check=True)
        lines = read_text("trace").splitlines()
        reported = next(n for n, line in enumerate(lines) if "enqueued second" in line)
        logged = [line for line in lines[:reported] if "-wal>" in line]
        assert "write" in logged[-2] and "sync(" in logged[-1]

    def test_sixty_first_commands_at_once_lose_no_job(self):
        line = '{"id":"job%d","command":"true"}'
        first = [start_process("enqueue", line % n) for n in range(60)]
        errors = [process.stderr.read() for process in first]
        assert [process.wait(60) for process in first] == [0] * 60, errors
        assert len(jobs()) == 60
        assert os.listdir(".") == ["queuectl.db"]

    @mechanism
    @posix_only
    def test_a_second_queue_of_a_process_keeps_the_firsts_locks(
        self, queue, monkeypatch
    ):
        real = os.path.exists
        with monkeypatch.context() as patch:  # another process makes the database now
            patch.setattr(
                os.path, "exists", lambda path: path != queue.path and real(path))
            queuectl.Queue("queuectl.db").close()
        start_process("list", fresh=True).wait()  # deletes the log if nobody uses it
        add_job(queue)
        with contextlib.closing(
            start_process("list", "--json", fresh=True).stdout
        ) as listed:
            assert json.loads(listed.read())[0]["id"] == "job"

    @mechanism
    @pytest.mark.parametrize("failures, code", [(1, 0), (9, 1)])
    def test_a_first_command_tries_again_when_another_drops_a_log(
        self, monkeypatch, failures, code
    ):
        def connect(queue, real=queuectl.Queue._connect):
            real(queue)
            if errors:
                raise errors.pop()

        errors = [sqlite3.OperationalError("disk I/O error")] * failures
        monkeypatch.setattr(queuectl.Queue, "_connect", connect)
        answer = cli("enqueue", "--", "true")
        assert answer.code == code and ("disk I/O error" in answer.err) == bool(code)
        assert len(errors) == max(0, failures - 2)

    @mechanism
    def test_an_interrupted_creation_still_ends_in_a_write_ahead_log(self):
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # writes the first page
        enqueue()
        assert query("PRAGMA journal_mode") == [("wal",)]
        assert query("PRAGMA auto_vacuum") == [(2,)]

    @posix_only
    @pytest.mark.parametrize("closed", ["before", "meanwhile", "afterwards"])
    def test_jobs_of_parent_and_child_survive_either_closing_first(self, closed):
        parent = queuectl.Queue("queuectl.db")
        names = [parent.add("true") for _ in range(5)]

        def child():
            wait_until(lambda: closed != "before" or os.path.exists("closed"))
            with queuectl.Queue("queuectl.db") as own:
                own.add("true", id="child")
                open("opened", "w").close()
                wait_until(lambda: closed == "afterwards" or os.path.exists("closed"))
                return [own.add("true", id="child%d" % n) for n in range(40)]

        pid = fork_and_run(child)
        wait_until(lambda: closed == "before" or os.path.exists("opened"))
        names += [parent.add("true") for _ in range(40)]
        if closed != "afterwards":
            parent.close()
            open("closed", "w").close()
        assert os.waitpid(pid, 0)[1] == 0
        parent.close()
        assert set(jobs()) == {*names, "child", *("child%d" % n for n in range(40))}

    @posix_only
    def test_the_end_of_a_forked_child_keeps_a_killed_writers_jobs(self):
        """SQLite would delete the log when it closes an inherited connection."""
        program = """
import os, queuectl, signal, sys
queue = queuectl.Queue("queuectl.db")
queue.add("true")
reader, writer = os.pipe()
if not os.fork():
    os.close(writer)
    os.read(reader, 1)
    sys.exit()
queue.close()
if not os.fork():
    queue = queuectl.Queue("queuectl.db")
    for n in range(40):
        queue.add("true")
    os.kill(os.getpid(), signal.SIGKILL)
os.wait()
os.close(writer)
os.wait()
"""
        env = python_environment()
        subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=30)
        assert len(jobs()) == 41

    @posix_only
    def test_a_child_that_ends_after_its_parent_keeps_later_jobs(self):
        """The end of the child closes its inherited connection with an old log."""
        program = """
import os, queuectl, sys
queue = queuectl.Queue("queuectl.db")
for n in range(20):
    queue.add("true")
reader, writer = os.pipe()
if not os.fork():
    os.close(writer)
    os.read(reader, 1)
    sys.exit()
queue.close()
for n in range(20):
    for _ in range(2):
        with queuectl.Queue("queuectl.db") as queue:
            queue.add("true")
os.close(writer)
os.wait()
"""
        env = python_environment()
        subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=30)
        assert len(jobs()) == 60
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    def test_a_database_without_a_write_ahead_log_works(self):
        enqueue()
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            assert db.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
        names = [enqueue() for _ in range(20)]
        drain(4)
        assert set(names) < set(jobs("--state", "completed")) and len(jobs()) == 21
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


# The worker kills itself once, while it holds the lease of an uncommitted claim.
KILLED_IN_CLAIM = """
import os
take = queuectl.Worker.take_lease
def killed(worker, name):
    take(worker, name)
    if not os.path.exists("lock"):
        open("lock", "w").close()
        os.kill(os.getpid(), queuectl.KILL)
queuectl.Worker.take_lease = killed
"""


# While a file `broken` is there, a verb fails; with 1 it fails only once.
VERB_BREAKS = """
def broken(queue, *args, verb=queuectl.Queue.%s):
    mark = queuectl.os.path.dirname(queue.path) + "/broken"
    if queuectl.os.path.exists(mark):
        if %d:
            queuectl.os.remove(mark)
        raise queuectl.sqlite3.IntegrityError("UNIQUE constraint failed")
    return verb(queue, *args)
queuectl.Queue.%s = broken
queuectl.RESTART_INTERVAL = 0.1
"""


class TestNeverLostNeverStuck:
    """Whatever is killed, a job runs again when a pool is there."""

    @fork_only
    def test_a_worker_killed_during_a_claim_blocks_nothing(self):
        enqueue(id="x")
        pool = start_pool(count=1, script=KILLED_IN_CLAIM)
        wait_until(lambda: state_of("x") == "completed")
        assert len(re.findall(r"worker \d+ died", read_text("queuectl.log"))) == 1
        run_ok("worker", "stop")
        assert pool.wait(10) == 0 and leftover_files() == []

    def test_workers_of_a_killed_supervisor_finish_and_leave(self):
        pool = start_pool(count=1)
        enqueue("sleep 0.2", id="x")
        enqueue(id="next")
        wait_until(lambda: state_of("x") == "processing")
        worker = workers_of(pool.pid)[0]
        os.kill(pool.pid, KILL)
        pool.wait()
        assert workers_of(pool.pid) == [worker]
        # Windows removes no file that somebody looks at just then.
        wait_until(lambda: not any([workers_of(pool.pid) for _ in range(50)]))
        # The last worker removes the pool's file.
        wait_until(lambda: leftover_files() == [])
        assert (state_of("x"), state_of("next")) == ("completed", "pending")
        assert drain() == 0 and leftover_files() == []

    @posix_only
    def test_a_worker_that_gets_sigterm_is_replaced(self):
        run_ok("enqueue", "-", stdin=b'{"command":"sleep 0.1"}\n' * 4)
        pool = start_pool("--drain", count=1)
        os.kill(workers_of(pool.pid)[0], signal.SIGTERM)
        assert pool.wait(20) == 0
        assert len(jobs("--state", "completed")) == 4

    @fork_only
    @pytest.mark.parametrize("verb", ["claim", "complete"])
    def test_an_integrity_error_replaces_the_worker_and_the_job_runs(self, verb):
        pool = start_pool(count=1, script=VERB_BREAKS % (verb, 1, verb))
        worker = workers_of(pool.pid)
        open("broken", "w").close()
        enqueue(id="x", max_retries=1)
        wait_until(lambda: state_of("x") == "completed")
        assert workers_of(pool.pid) != worker
        assert pool.poll() is None
        assert attempts_of("x") == 1
        assert "UNIQUE constraint failed" in read_text("queuectl.log")
        assert "waiting until it is over" not in read_text("queuectl.log")

    @fork_only
    @pytest.mark.parametrize("verb", ["claim", "complete"])
    def test_a_lasting_integrity_error_does_not_make_a_busy_loop(self, verb):
        pool = start_pool(count=1, script=VERB_BREAKS % (verb, 0, verb))
        open("broken", "w").close()
        enqueue(id="x", max_retries=1)
        lines = lambda: len(re.findall(r"worker \d+ died", read_text("queuectl.log")))
        wait_until(lines)
        begun = time.monotonic()
        wait_until(lambda: lines() >= 4)
        assert time.monotonic() - begun >= 3 * 0.1 - 0.05 and pool.poll() is None
        log = read_text("queuectl.log")
        assert "waiting until" not in log
        assert log.count("UNIQUE constraint") <= 2 * lines() + 2
        os.remove("broken")
        wait_until(lambda: state_of("x") == "completed")
        assert attempts_of("x") == 1

    def test_a_stopping_pool_puts_back_the_job_of_its_dead_worker(self):
        pool = start_pool(count=1, script=SUPERVISOR_IN_TROUBLE)
        open("trouble", "w").close()
        os.kill(workers_of(pool.pid)[0], KILL)
        wait_until(lambda: "died" in read_text("queuectl.log"))
        run_ok("worker", "stop", "--no-wait")
        seen = read_text("queuectl.log").count("trouble")
        wait_until(lambda: read_text("queuectl.log").count("trouble") > seen + 2)
        assert pool.poll() is None
        os.remove("trouble")
        assert pool.wait(10) == 0

    @mechanism
    @posix_only
    def test_a_process_with_a_foreign_workers_pid_holds_no_job(self):
        """The database was copied from another machine without its run files."""
        enqueue(id="job")
        with queuectl.Queue("queuectl.db") as queue:
            queue.claim(os.getppid(), lambda run: None)
            make_reaper(queue).recover_lost(queue, [])
            assert queue.job("job")["state"] == "pending"

    @pytest.mark.parametrize("text", ["", "1", "999999999", "rubbish", "%d"])
    def test_leftover_pid_files_stop_nothing(self, text):
        with subprocess.Popen(
            [sys.executable, os.path.join(TOOLS, "long_command.py")]
        ) as stranger:
            for name in ("queuectl-%d.pid" % stranger.pid, "queuectl-1.pid"):
                with open(name, "w") as file:
                    file.write(text.replace("%d", str(stranger.pid)))
            assert read_status()["workers"] == []
            assert run_ok("worker", "stop").out == "no pool is running\n"
            assert drain() == 0 and leftover_files() == []
            assert stranger.poll() is None
            stranger.kill()

    def test_a_directory_named_like_a_pid_file_does_no_harm(self):
        os.mkdir("queuectl-1.pid")
        enqueue(id="x")
        assert read_status()["workers"] == []

    def test_a_delayed_job_does_not_delay_others(self, queue, clock):
        add_job(queue, id="later", delay="1d")
        add_job(queue, id="now")
        assert claim(queue).id == "now"
        assert claim(queue) is None and queue.is_drained() is False
        clock.now += DAY
        assert claim(queue).id == "later"

    @mechanism
    def test_the_urgent_one_of_thousands_due_at_once_runs_first(
        self, queue, clock, monkeypatch
    ):
        # A claim spends a part of it on due jobs.
        monkeypatch.setattr(queuectl, "POLL_INTERVAL", 0.2)
        rows = [{"command": "true", "delay": 60} for _ in range(3000)]
        rows.append({"command": "true", "delay": 60, "priority": 9, "id": "urgent"})
        add_jobs(queue, rows)
        clock.now += 61
        first = [claim(queue).id for _ in range(5)]
        assert "urgent" in first

    @mechanism
    def test_a_failed_job_is_due_after_the_clock_was_set_back(self, queue, clock):
        add_job(queue, id="later", delay=600)
        add_job(queue, id="job")
        queue.fail(claim(queue), make_outcome())
        queue.promote_after_clock_step(None)
        assert queue.job("job")["state"] == "failed"
        clock.now -= 7200
        queue.promote_after_clock_step(None)
        run = claim(queue)
        assert (run.id, run.attempt) == ("job", 2)
        assert claim(queue) is None
        assert queue.next_due()["run_at"] == clock.now + 7200 + 600
        assert queue.fail(run, make_outcome()) == "failed"
        assert queue.next_due()["run_at"] == clock.now + 4
        queue.promote_after_clock_step(None)
        assert queue.job("job")["state"] == "failed"

    @mechanism
    def test_a_pool_looks_for_a_clock_step_only_at_its_first_check(
        self, queue, monkeypatch
    ):
        offsets, look = [], queuectl.Queue.promote_after_clock_step

        def record(self, earlier):
            offsets.append(earlier)
            return look(self, earlier)

        monkeypatch.setattr(queuectl.Queue, "promote_after_clock_step", record)
        pool = make_supervisor(queue.path)
        pool.file_status = queue.file_status
        pool.reaper = queuectl.Reaper(queue.path, None)
        pool.queue_trouble = queuectl.Trouble(None)
        for _ in range(2):
            pool.with_queue(pool.maintain)
        assert offsets[0] is None and abs(offsets[1]) < 1e10

    @fork_only
    def test_a_pool_retries_at_once_after_the_clock_was_set_back(self):
        configure("backoff_base", "3000")
        enqueue("exit 1", id="x", max_retries=2)
        start_pool(count=1, script=CLOCK_SET_BACK.replace("3600", "7200"))
        wait_until(lambda: state_of("x") == "failed")
        open("back", "w").close()
        wait_until(lambda: state_of("x") == "dead")
        assert run_errors("x") == ["exit 1", "exit 1"]


# Commands that live on when their worker is killed.
ORPHANS = {
    "plain": "LONG_COMMAND once",
    "redirected": "exec >/dev/null 2>&1; LONG_COMMAND once",
    "all closed": "exec LONG_COMMAND once closed",
    "unmarked": "exec env -i LONG_COMMAND once",
    "ignores TERM": "trap '' TERM; LONG_COMMAND once",
    "own session": "setsid LONG_COMMAND once; exit $?",  # as a leader it would fork
}


class TestRunsNeverOverlap:
    """Two runs of a job never overlap, however the first one ended."""

    def test_two_pools_run_every_job_exactly_once(self):
        os.mkdir("out")
        line = '{"command":"mkdir %d","cwd":"out"}\n'  # fails the second time
        run_ok("enqueue", "-", stdin="".join(line % n for n in range(300)).encode())
        pools = [start_pool("--drain", count=4) for _ in range(2)]
        assert [pool.wait(50) for pool in pools] == [0, 0]
        assert len(os.listdir("out")) == 300
        assert query("SELECT error FROM runs WHERE error NOT NULL") == []
        assert {(job["state"], job["attempts"]) for job in jobs().values()} == {
            ("completed", 1)}
        assert leftover_files() == []

    @pytest.mark.parametrize("victim", ["worker", "pool"])
    @pytest.mark.parametrize("kind, script", [("plain", ""), *(
        pytest.param(kind, script, marks=posix_only) for kind, script in [
            *((kind, "") for kind in ORPHANS if kind != "plain"),
            ("ignores TERM", "queuectl.IDLE_INTERVAL = 60")]),  # it must be woken
        *(pytest.param(kind, WITHOUT_PROC, marks=[posix_only, needs_lsof])
          for kind in ("unmarked", "own session"))])
    def test_an_orphan_is_ended_before_its_job_runs_again(self, kind, script, victim):
        enqueue(ORPHANS[kind].replace("LONG_COMMAND", LONG_COMMAND), id="x")
        script += "\nqueuectl.TERM_GRACE = 0.2" * (kind == "ignores TERM")
        pool = start_pool(count=1, script=script)
        wait_until(lambda: live_commands() and count_starts() == 1)
        if victim == "worker":
            os.kill(workers_of(pool.pid)[0], KILL)
        else:
            kill_pool(pool)
            # On Windows commands end with their worker.
            assert live_commands() or os.name != "posix"
            run_ok("worker", "stop")  # It must not remove the traces of the orphan.
            start_pool(count=1, script=script)
        wait_until(lambda: state_of("x") == "completed")
        job = details_of("x")
        assert not os.path.exists("overlaps")
        if victim == "pool":
            assert [name for name in leftover_files() if str(pool.pid) in name] == []
        assert not live_commands()
        assert job["attempts"] == 1  # the lost attempt was given back
        assert [run["error"] for run in job["runs"]] == ["worker died", None]

    @posix_only
    @pytest.mark.parametrize("killed, stop, error", [
        (True, False, "signal 9"), (True, True, "stopped"), (False, True, "stopped")])
    def test_children_of_a_killed_command_end_before_the_next_run(
        self, killed, stop, error
    ):
        # As if a child was killed.
        go = "while ! test -e go; do sleep 0.02; done; exit 137"
        enqueue("echo $$ > pid; %s & %s" % (LONG_COMMAND, go), id="x", max_retries=1)
        pool = start_pool(count=1, script=DEFAULT_BLAME_DELAY)
        wait_until(live_commands)
        if killed:
            os.kill(int(read_text("pid")), KILL)
        else:
            open("go", "w").close()
        if stop:
            pool.send_signal(signal.SIGTERM)
        wait_until(lambda: state_of("x") != "processing")
        assert run_errors("x") == [error] and not live_commands()

    @posix_only
    def test_a_worker_of_a_killed_pool_keeps_the_traces_of_orphans(self):
        enqueue("exec %s once closed" % LONG_COMMAND, id="x")
        pool = start_pool()
        wait_until(lambda: live_commands() and count_starts() == 1)
        busy = [w["pid"] for w in read_status()["workers"] if w["job"]]
        for pid in (pool.pid, *busy):
            os.kill(pid, signal.SIGKILL)
        pool.wait(10)
        wait_until(lambda: not workers_of(pool.pid))
        start_pool(count=1)
        wait_until(lambda: state_of("x") == "completed")
        assert not os.path.exists("overlaps") and not live_commands()

    @posix_only
    def test_a_pool_started_by_a_lost_run_lives_on(self):
        with open("quick.py", "w") as file:  # The detached pool runs this file again.
            file.write(
                "import queuectl\n%squeuectl.__file__ = __file__\nqueuectl.main()"
                % QUICK)
        line = queuectl.shell_line(
            [sys.executable, "quick.py", "worker", "start", "--detach"])
        enqueue(
            "[ -e out ] || %s; exec %s once" % (line, LONG_COMMAND), id="x",
            env={"PYTHONPATH": TOOLS})
        pool = start_pool(count=1)
        wait_until(lambda: live_commands() and len(read_status()["workers"]) == 2)
        kill_pool(pool)
        wait_until(lambda: state_of("x") == "completed")
        assert not os.path.exists("overlaps") and not live_commands()
        assert run_ok("worker", "stop").out.startswith("stopped pool ")

    def test_the_result_of_a_run_that_was_put_back_is_dropped(self, queue):
        add_job(queue)
        stale = claim(queue)
        queue.release(stale, make_outcome("worker died"))
        current = claim(queue)
        for verb in (queue.complete, queue.fail, queue.release):
            assert verb(stale, make_outcome()) is None
        assert queue.job("job")["state"] == "processing"
        assert queue.complete(current, make_outcome(None)) == "completed"

    @mechanism
    @posix_only
    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("removed", [False, True])
    def test_a_worker_that_holds_its_lease_keeps_its_job(
        self, queue, monkeypatch, removed, own
    ):
        """This holds without its own file and lease, and for workers of other pools."""
        add_job(queue)
        reaper = forbid_signals(monkeypatch, make_reaper(queue))
        with leased_run(queue, 1) as (run, lease):
            with lease_heir(lease) as pid:
                queue.db.execute("UPDATE runs SET worker = ?", (pid,))
                workers = [pid] * own
                if removed:
                    os.remove(run.lease_path)
                reaper.recover_lost(queue, workers)
            assert queue.job("job")["state"] == "processing"

    @mechanism
    @posix_only
    def test_a_worker_in_a_container_keeps_its_job(self, queue, monkeypatch):
        add_job(queue)
        with leased_run(queue, 7):
            fd = queuectl.lock_file(queuectl.worker_file(queue.path, 1, 7))
            forbid_signals(monkeypatch, make_reaper(queue)).recover_lost(queue, [])
            os.close(fd)
        assert queue.job("job")["state"] == "processing"

    @mechanism
    @pytest.mark.parametrize("own", [False, True])
    def test_a_job_is_lost_if_another_worker_has_got_the_pid(self, queue, own):
        """In a container that was killed and started again they have the same."""
        add_job(queue)
        reaper = make_reaper(queue)
        with leased_run(queue, 7):
            pool = reaper.pid if own else 1
            fd = queuectl.lock_file(queuectl.worker_file(queue.path, pool, 7))
        reaper.recover_lost(queue, [7] * own)
        os.close(fd)
        assert queue.job("job")["state"] == "pending"

    @mechanism
    def test_a_death_is_waited_for_before_it_can_be_blamed(self, queue):
        add_job(queue)
        reaper = make_reaper(queue)
        with leased_run(queue, 7):
            pass
        reaper.recover_lost(queue, [7])  # it has died, but was not reaped yet
        assert queue.job("job")["state"] == "processing" and not reaper.recovery_done
        reaper.recover_lost(queue, [])
        assert queue.job("job")["state"] == "pending"

    @mechanism
    def test_a_second_pool_of_the_same_pid_is_refused(self, queue):
        """Pools in two containers may have the same pid."""
        fd = queuectl.lock_file(queuectl.pool_file(queue.path, os.getpid()))
        with pytest.raises(queuectl.QueueError, match="another process with that PID"):
            make_supervisor(queue.path).run(pytest.fail)
        os.close(fd)

    @mechanism
    @posix_only
    def test_an_orphan_that_cannot_be_found_keeps_its_job(self, monkeypatch, queue):
        """Without /proc and lsof, the held lock alone keeps the job from running."""
        exists = os.path.exists
        monkeypatch.setattr(
            os.path, "exists", lambda path: path != "/proc/self/fd" and exists(path))
        monkeypatch.setenv("PATH", os.devnull)
        add_job(queue)
        with leased_run(queue, 2**30):
            make_reaper(queue).recover_lost(queue, [])
            assert queue.job("job")["state"] == "processing"
        make_reaper(queue).recover_lost(queue, [])
        assert queue.job("job")["state"] == "pending"

    @mechanism
    @needs_root
    def test_a_run_of_another_user_keeps_its_job(self, queue, monkeypatch):
        add_job(queue)
        with leased_run(queue, 1) as (run, _):
            pass
        program = "import os, queuectl; os.setuid(65534); print(queuectl.is_locked(%r))"
        answer = subprocess.run([sys.executable, "-c", program % run.lease_path], cwd="/",
                                stdout=subprocess.PIPE, env=python_environment())
        assert answer.stdout == b"True\n" and not queuectl.is_locked(run.lease_path)
        monkeypatch.setattr(queuectl, "is_locked", lambda path, missing=False: True)
        make_reaper(queue).recover_lost(queue, [])
        assert state_of("job") == "processing"

    @posix_only
    @pytest.mark.parametrize("what, script", [
        ("pid file", ""), ("output", ""), ("pid file", WITHOUT_PROC)])
    def test_removed_files_do_not_end_a_running_job(self, what, script):
        pools = [start_pool(count=1, script=script), start_pool(count=1, script=script)]
        enqueue("sleep 0.3", id="x")
        wait_until(lambda: state_of("x") == "processing")
        if what == "output":
            for name in os.listdir("queuectl.runs"):
                os.remove(os.path.join("queuectl.runs", name))
        else:
            for pool in pools:
                os.remove("queuectl-%d.pid" % pool.pid)
        wait_until(lambda: state_of("x") != "processing")
        assert (state_of("x"), len(details_of("x")["runs"])) == ("completed", 1)
        if what == "pid file":
            assert [pool.wait(10) for pool in pools] == [1, 1]
            assert all("was removed" in pool.stderr.read() for pool in pools)


class TestAtLeastOnce:
    """A run whose end was not recorded is repeated."""

    @posix_only
    def test_a_run_ended_with_its_service_runs_in_the_next_one(self):
        enqueue(LONG_COMMAND + " once", id="x", max_retries=1)
        pool = start_pool(count=1, script=DEFAULT_BLAME_DELAY)
        wait_until(live_commands)
        signal_commands(signal.SIGTERM, *workers_of(pool.pid), pool.pid)
        assert pool.wait(20) == 0 and drain(1) == 0
        assert (state_of("x"), attempts_of("x"), run_errors("x")) == (
            "completed", 1, ["stopped", None])

    @posix_only
    def test_a_run_that_could_not_be_ended_is_repeated_after_its_end(self):
        enqueue("[ -e out ] && exit; touch out; exec sleep 0.7", id="x", timeout=0.1)
        pool = start_pool(
            "--drain",
            count=1,
            script="queuectl.KILL_GRACE = queuectl.TERM_GRACE = 0.1\n"
            "queuectl.signal_processes = lambda pids, number: None")
        assert pool.wait(10) == 0 and state_of("x") == "completed"
        assert "x 1/3 can't be ended: processes [" in read_text("queuectl.log")


# A shell that ends its child when it is signalled, and exits as after SIGTERM.
TRAPPING_COMMAND = "trap 'kill $!; exit 143' TERM INT HUP; LONG_COMMAND & wait"


# The system refuses to start the first commands of each worker.
START_REFUSED = """
def refuse(*args, spawn=queuectl.os.posix_spawn, left=list(range(%d)), **options):
    if left and left.pop() is not None:
        raise OSError(queuectl.errno.%s, "refused")
    return spawn(*args, **options)
queuectl.os.posix_spawn = refuse
"""


# A program that ends as one does whose console of Windows is closed.
ENDED_BY_CONSOLE = """
import ctypes, os, time
open("runs", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
ctypes.windll.kernel32.TerminateProcess(ctypes.c_void_p(-1), %d)
"""


class TestNotBlamed:
    """A job is not blamed for what it did not do."""

    @windows_only
    @pytest.mark.parametrize("code", [0xC000013A, 0x40010004])
    def test_a_job_that_ends_with_its_console_keeps_its_attempt(self, code):
        with open("victim.py", "w") as file:
            file.write(ENDED_BY_CONSOLE % code)
        line = queuectl.shell_line([sys.executable, "victim.py"])
        enqueue(line, id="x", max_retries=1)
        pool = start_pool(count=1, script=DEFAULT_BLAME_DELAY)
        wait_until(lambda: os.path.exists("runs"))
        run_ok("worker", "stop", "--no-wait")
        open("go", "w").close()
        assert pool.wait(20) == 0
        assert (state_of("x"), attempts_of("x"), run_errors("x")) == (
            "pending", 0, ["stopped"])

    @posix_only
    @pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
    @pytest.mark.parametrize("command", [
        "LONG_COMMAND", "exec LONG_COMMAND", TRAPPING_COMMAND])
    @pytest.mark.parametrize("first", ["command", "pool"])
    def test_a_job_ended_with_its_whole_service_keeps_its_attempt(
        self, number, command, first
    ):
        enqueue(command.replace("LONG_COMMAND", LONG_COMMAND), id="x", max_retries=1)
        number = getattr(signal, number)
        pool = start_pool(count=1, script=DEFAULT_BLAME_DELAY)
        wait_until(live_commands)
        if first == "pool":
            pool.send_signal(number)
        signal_commands(
            number, *workers_of(pool.pid), *[pool.pid] * (first == "command"))
        assert pool.wait(20) == 0
        assert (state_of("x"), attempts_of("x"), run_errors("x")) == (
            "pending", 0, ["stopped"])

    @posix_only
    @pytest.mark.parametrize("command, error", [
        ("kill -TERM $$", "signal 15"), ("kill -KILL $$", "signal 9"),
        ("exit 143", "exit 143")])
    def test_a_job_that_ends_itself_by_a_signal_has_failed(self, command, error):
        enqueue(command, id="x", max_retries=1)
        pool = start_pool(count=1)
        wait_until(lambda: state_of("x") == "dead")
        assert run_errors("x") == [error]
        assert attempts_of("x") == 1
        assert pool.poll() is None

    @posix_only
    def test_a_job_signalled_without_its_pool_has_failed(self):
        enqueue(LONG_COMMAND, id="x", max_retries=1)
        pool = start_pool(count=1)
        wait_until(live_commands)
        before = workers_of(pool.pid)
        signal_commands(signal.SIGTERM, *before)
        wait_until(lambda: state_of("x") == "dead")
        assert run_errors("x") == ["signal 15"]
        wait_until(lambda: workers_of(pool.pid) not in ([], before))
        assert pool.poll() is None

    @posix_only
    def test_six_power_cuts_blame_no_job(self):
        enqueue(LONG_COMMAND, id="x", max_retries=1)
        for n in range(7):
            pool = start_pool(count=1)
            wait_until(lambda: len(run_errors("x")) == n + 1 and live_commands())
            if n < 6:
                kill_pool(pool)
                signal_commands(KILL)
        assert (state_of("x"), attempts_of("x")) == ("processing", 1)
        assert run_errors("x") == 6 * ["worker died"] + [None]
        run_ok("worker", "stop", "--now")
        assert (state_of("x"), attempts_of("x")) == ("pending", 0)

    @posix_only
    def test_a_worker_that_dies_with_its_pool_is_not_counted(self):
        enqueue(LONG_COMMAND, id="x", max_retries=1)
        for n in range(6):
            # The supervisor is killed before it counts the death of its worker.
            pool = start_pool(count=1, script="queuectl.BLAME_DELAY = 60")
            wait_until(lambda: len(run_errors("x")) == n + 1 and live_commands())
            worker = workers_of(pool.pid)[0]
            os.kill(worker, signal.SIGSTOP)
            signal_commands(KILL, worker)
            wait_until(lambda: workers_of(pool.pid) not in ([], [worker]))
            kill_pool(pool)
        start_pool(count=1)
        wait_until(lambda: len(run_errors("x")) == 7 and live_commands())
        assert (state_of("x"), attempts_of("x")) == ("processing", 1)

    def test_a_job_whose_worker_died_five_times_alone_is_dead(self):
        enqueue(LONG_COMMAND, id="x", max_retries=1)
        pool = start_pool(count=1)
        for n in range(5):
            assert state_of("x") != "dead"
            wait_until(lambda: len(run_errors("x")) == n + 1 and live_commands())
            os.kill(workers_of(pool.pid)[0], KILL)
        wait_until(lambda: state_of("x") == "dead")
        assert details_of("x")["error"] == "worker died 5 times"
        assert run_errors("x") == 5 * ["worker died"]
        assert pool.poll() is None
        assert not live_commands()

    def test_a_retry_forgets_the_deaths_of_workers(self, queue):
        add_job(queue)
        for _ in range(queuectl.MAX_DEATHS):
            queue.release(claim(queue), make_outcome("worker died"), is_blamed=True)
        assert queue.job("job")["error"] == "worker died 5 times"
        queue.retry(["job"])
        died = make_outcome("worker died")
        assert queue.release(claim(queue), died, is_blamed=True) == (
            "pending")

    @fork_only
    @pytest.mark.parametrize("name", ["EAGAIN", "ENOMEM", "EMFILE", "ENFILE"])
    def test_a_system_out_of_processes_costs_a_job_no_attempt(self, name):
        enqueue("echo out", id="x", max_retries=1)
        enqueue(id="next", max_retries=1)
        start_pool(
            count=1, script=START_REFUSED % (3, name) + "queuectl.IDLE_INTERVAL = 0.1")
        wait_until(lambda: state_of("next") == "completed")
        assert (state_of("x"), attempts_of("x"), run_ok("logs", "x").out) == (
            "completed", 1, "out\n")
        assert run_errors("x") == [None] and run_errors("next") == [None]
        assert len(re.findall(".*refused.*", read_text("queuectl.log"))) == 1

    @mechanism
    @pytest.mark.parametrize("number", [1450, 1455])
    def test_a_windows_out_of_memory_costs_a_job_no_attempt(self, queue, number):
        add_job(queue)
        error = OSError(22, "no memory")
        error.winerror = number
        worker = types.SimpleNamespace(
            refusal=queuectl.Trouble(queuectl.open_log(queue.path, "worker", True)),
            lease=types.SimpleNamespace(output=lambda: b""),
            waiter=types.SimpleNamespace(wait=lambda timeout: None))
        outcome = queuectl.Worker.not_started(worker, claim(queue), error)
        assert outcome.kind == "refused"

    @fork_only
    def test_a_pool_that_gets_no_process_can_still_be_stopped(self):
        enqueue(id="x", max_retries=1)
        pool = start_pool(count=1, script=START_REFUSED % (999, "EAGAIN"))
        wait_until(lambda: "refused" in read_text("queuectl.log"))
        assert run_ok("worker", "stop").code == 0 and pool.wait(10) == 0
        assert (state_of("x"), attempts_of("x")) == ("pending", 0)

    @fork_only
    @pytest.mark.parametrize("name", ["ENOENT", "EACCES", "E2BIG"])
    def test_a_command_that_cannot_be_started_is_a_failure(self, name):
        enqueue(id="x", max_retries=1)
        start_pool(count=1, script=START_REFUSED % (1, name))
        wait_until(lambda: state_of("x") == "dead")
        assert run_errors("x")[0].startswith("cannot start: ") and attempts_of("x") == 1

    @posix_only
    @pytest.mark.skipif(
        os.name == "posix" and os.geteuid() == 0, reason="root may enter any"
    )
    def test_a_folder_that_may_not_be_entered_is_a_failure(self, home):
        os.mkdir("shut")
        enqueue(id="x", cwd="shut", max_retries=1)
        os.chmod("shut", 0)
        assert drain(1) == 1 and "cannot start" in run_errors("x")[0]
        os.chmod("shut", 0o700)

    def test_a_folder_that_vanished_is_a_failure(self, home):
        os.mkdir("sub")
        enqueue(id="x", cwd="sub", max_retries=1)
        os.rmdir("sub")
        drain(1)
        assert "cannot start" in jobs()["x"]["error"]

    def test_waiting_for_a_stop_does_not_count_as_run_time(self):
        enqueue(
            "kill -9 $$" if os.name == "posix" else "exit 137", id="x", max_retries=1)
        pool = start_pool(count=1, script="queuectl.BLAME_DELAY = 3")
        wait_until(lambda: state_of("x") == "dead")
        assert pool.poll() is None and details_of("x")["seconds"] < 2.9


# Ways in which processes of a run leave the process group of its leader.
PROCESS_TREES = {
    "plain": "LONG_COMMAND once",
    "timeout": "timeout 60 LONG_COMMAND once",
    "setsid": "setsid -w LONG_COMMAND once",
    "session": python_command(
        "import subprocess as s; s.call('LONG_COMMAND once', shell=True,"
        " start_new_session=True)"
    ),
    "pipe": "LONG_COMMAND once | cat",
    "job control": "bash -c 'set -m; LONG_COMMAND once & wait'",
}


# On FreeBSD posix_spawn can't start a session.
WITHOUT_SESSIONS = """
def spawn(*args, setsid=False, spawn=queuectl.os.posix_spawn, **options):
    if setsid:
        raise NotImplementedError
    return spawn(*args, **options)
queuectl.os.posix_spawn = spawn
"""


class TestEndedFromOutsideEndsWhole:
    """A run that is ended from outside ends with all its processes."""

    @pytest.mark.parametrize("how", ["timeout", "cancel", "stop --now", "kill"])
    def test_a_run_ended_from_outside_ends_with_all_its_processes(self, how):
        enqueue(
            LONG_COMMAND + " tree", id="x",
            timeout=SHORT_TIMEOUT if how == "timeout" else None, max_retries=1)
        pool = start_pool(count=1)
        wait_until(lambda: len(live_commands()) == 2)
        if how == "cancel":
            assert run_ok("cancel", "x").out == "cancelling x: ending its processes\n"
        elif how == "stop --now":
            run_ok("worker", "stop", "--now")
        elif how == "kill":
            os.kill(workers_of(pool.pid)[0], KILL)
            run_ok("cancel", "x")
        wait_until(lambda: state_of("x") != "processing")
        assert not live_commands()
        error = {"timeout": "timeout %gs" % SHORT_TIMEOUT, "stop --now": None}.get(
            how, "cancelled")
        job = details_of("x")
        assert (job["state"], job["error"]) == ("dead" if error else "pending", error)
        assert job["attempts"] == 0 if how == "stop --now" else job["attempts"]

    @needs_proc
    @pytest.mark.skipif(not shutil.which("setsid"), reason="needs setsid(1)")
    @pytest.mark.parametrize("how", [
        "timeout", "cancel", "stop --now", "worker", "pool"])
    def test_no_process_is_left_when_a_job_leaves_processing(self, how):
        words = ["--timeout", "1.2"] if how == "timeout" else []
        for name, line in PROCESS_TREES.items():
            os.mkdir(name)
            run_ok(
                "enqueue", "--id", name, "--cwd", name, "--max-retries", "1", *words,
                "--", line.replace("LONG_COMMAND", LONG_COMMAND))
        pool = start_pool(count=len(PROCESS_TREES))
        wait_until(lambda: all(os.path.exists(name + "/out") for name in PROCESS_TREES))
        if how == "cancel":
            run_ok("cancel", *PROCESS_TREES)
        elif how == "stop --now":
            run_ok("worker", "stop", "--now", "--no-wait")
        elif how == "worker":
            for pid in workers_of(pool.pid):
                os.kill(pid, KILL)
        elif how == "pool":
            kill_pool(pool)
            start_pool(count=len(PROCESS_TREES))
        last = {"timeout": "dead", "cancel": "dead", "stop --now": "pending"}.get(
            how, "completed")

        def over():
            done = list(jobs("--state", last))
            assert not [
                (name, processes_of_this_test(name))
                for name in done
                if processes_of_this_test(name)]
            return len(done) == len(PROCESS_TREES)

        wait_until(over)
        assert not [
            name for name in PROCESS_TREES if os.path.exists(name + "/overlaps")]

    @needs_proc
    def test_a_process_without_its_main_thread_ends_with_its_run(self):
        enqueue(
            "setsid %s thread & exec sleep 77" % LONG_COMMAND, id="x", max_retries=1)
        pool = start_pool(count=1)
        wait_until(live_commands)
        [pid] = live_commands()
        wait_until(lambda: queuectl.proc_stat(pid).state == b"Z")
        run_ok("cancel", "x")
        wait_until(lambda: state_of("x") == "dead")
        assert not live_commands()

    @posix_only
    def test_without_sessions_a_run_has_a_process_group_of_its_own(self):
        enqueue(
            "ps -o pid=,pgid=,sid= -p $$; %s & %s" % (LONG_COMMAND, LONG_COMMAND),
            id="x", timeout=0.3)
        pool = start_pool(script=WITHOUT_SESSIONS, count=1)
        wait_until(lambda: state_of("x") == "failed")
        pid, group, session = map(int, run_ok("logs", "x").out.split())
        assert pid == group and session == os.getsid(pool.pid) and not live_commands()

    def test_a_job_cancelled_without_a_pool_is_ended_by_the_next(self):
        enqueue(
            "trap '' TERM; " + LONG_COMMAND if os.name == "posix" else LONG_COMMAND,
            id="x")
        pool = start_pool(count=1)
        wait_until(live_commands)
        kill_pool(pool)
        run_ok("cancel", "x")
        assert state_of("x") == "processing"
        assert "No pool is running" in run_ok("status").out
        assert "no pool is running" in cli("wait", "--timeout", "0").err
        # On Windows it ends with its worker.
        assert live_commands() or os.name != "posix"
        start_pool(count=1, script="queuectl.TERM_GRACE = 0.2")
        wait_until(lambda: state_of("x") == "dead")
        assert not live_commands()
        assert jobs()["x"]["error"] == "cancelled"

    @posix_only
    @pytest.mark.parametrize("way", ["timeout", "orphan"])
    def test_a_run_that_is_ended_can_clean_up_first(self, way):
        line = (
            "trap 'sleep 0.2 && echo cleaned > up; exit 1' TERM; touch on; "
            + LONG_COMMAND)
        enqueue(
            line + " & wait", id="x", **({"timeout": 0.2} if way == "timeout" else {}))
        pool = start_pool(count=1, script="queuectl.TERM_GRACE = 9")
        wait_until(lambda: os.path.exists("on"))
        if way == "orphan":
            os.kill(workers_of(pool.pid)[0], KILL)
        wait_until(lambda: os.path.exists("up") and read_text("up"))

    def test_a_timeout_works_while_the_database_is_locked(self):
        enqueue(LONG_COMMAND, id="x", timeout=SHORT_TIMEOUT, max_retries=1)
        start_pool(count=1)
        wait_until(live_commands)
        with locked_database():
            assert live_commands(), "it has to last for this to test anything"
            wait_until(lambda: not live_commands(), timeout=5)

    @mechanism
    @posix_only
    def test_a_process_forked_during_a_scan_is_found(self, monkeypatch):
        ours = (os.getpid(), "lease")  # a worker holds the lease of its run
        looks = iter([[ours], [ours, (77, "lease")]])
        for name in "scan_proc", "scan_with_tools":
            monkeypatch.setattr(queuectl, name, lambda *_: next(looks))
        assert queuectl.processes_of({"lease": 1}) == {"lease": {77}}

    @mechanism
    @needs_proc
    def test_a_scan_skips_processes_older_than_the_pool(self):
        began = queuectl.proc_stat("self").started
        assert os.getpid() in dict(queuectl.scan_proc(began, set()))
        assert os.getpid() not in dict(queuectl.scan_proc(began + 1, set()))

    @mechanism
    @needs_proc
    def test_the_second_pass_of_a_scan_looks_only_at_new_processes(self):
        seen = set()
        assert os.getpid() in dict(queuectl.scan_proc(0, seen))
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert {child.pid} <= {*dict(queuectl.scan_proc(0, seen))}
        assert {os.getpid(), child.pid}.isdisjoint(
            dict(queuectl.scan_proc(0, seen)))
        child.communicate()


class TestGracefulStop:
    """A graceful stop loses nothing; a second signal stops at once."""

    @posix_only
    @pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
    def test_a_signal_lets_the_running_job_finish(self, number):
        pool = start_pool(count=1)
        enqueue("until [ -e lock ]; do sleep 0.02; done; touch out", id="x")
        enqueue(id="next")
        wait_until(lambda: state_of("x") == "processing")
        pool.send_signal(getattr(signal, number))
        wait_until(lambda: "asked to stop" in read_text("queuectl.log"))
        open("lock", "w").close()
        assert pool.wait(10) == 0
        assert (state_of("x"), state_of("next")) == ("completed", "pending")
        assert leftover_files() == []

    @posix_only
    def test_two_signals_at_once_count_as_one(self):
        """timeout(1) signals the pool, and then its whole process group."""
        pool = start_pool(count=1, script="queuectl.POLL_INTERVAL = 0.2")
        enqueue("sleep 0.3", id="x")
        wait_until(lambda: state_of("x") == "processing")
        for number in (signal.SIGTERM, signal.SIGINT):
            pool.send_signal(number)
        assert pool.wait(10) == 0 and state_of("x") == "completed"

    @posix_only
    def test_a_second_signal_puts_running_jobs_back(self):
        enqueue("trap '' TERM; %s & wait; %s" % (LONG_COMMAND, LONG_COMMAND), id="x")
        pool = start_pool(count=1, script="queuectl.TERM_GRACE = 0.2")
        wait_until(live_commands)
        pool.send_signal(signal.SIGTERM)
        wait_until(lambda: "asked to stop" in read_text("queuectl.log"))
        # An immediate second signal would merge with the first one.
        wait_until(lambda: pool.send_signal(signal.SIGTERM) or pool.poll() is not None)
        assert pool.wait(20) == 0
        job = jobs()["x"]
        assert (job["state"], job["attempts"]) == ("pending", 0)
        assert not live_commands()

    def test_a_stop_while_the_database_is_locked_keeps_the_result(self):
        pool = start_pool(count=1, script="queuectl.IDLE_INTERVAL = 0.1")
        enqueue("sleep 0.1", id="x")
        wait_until(lambda: state_of("x") == "processing")
        with locked_database():
            run_ok("worker", "stop", "--no-wait")
            wait_until(
                lambda: re.search(r"worker\[.*waiting until", read_text("queuectl.log"))
            )
            with pytest.raises(subprocess.TimeoutExpired):
                pool.wait(0.2)
        assert pool.wait(20) == 0
        assert state_of("x") == "completed"

    @posix_only
    def test_a_pool_stopped_now_ends_an_orphan_first(self):
        enqueue("trap '' TERM; " + LONG_COMMAND, id="x")
        pool = start_pool(count=1)
        wait_until(live_commands)
        os.kill(workers_of(pool.pid)[0], signal.SIGKILL)
        wait_until(lambda: "worker died, ending" in read_text("queuectl.log"))
        run_ok("worker", "stop", "--now")
        assert pool.wait(10) == 0 and not live_commands() and state_of("x") == "pending"

    @posix_only
    def test_a_pool_that_cannot_read_its_queue_can_be_stopped_now(self):
        enqueue("trap '' TERM; " + LONG_COMMAND, id="x")
        script = SUPERVISOR_IN_TROUBLE + "queuectl.TERM_GRACE = 60"
        pool = start_pool(count=1, script=script)
        wait_until(live_commands)
        os.kill(workers_of(pool.pid)[0], signal.SIGKILL)
        wait_until(lambda: "worker died, ending" in read_text("queuectl.log"))
        group = os.getpgid(live_commands()[0])
        open("trouble", "w").close()
        try:
            run_ok("worker", "stop", "--now", "--no-wait")
            assert pool.wait(10) == 0
        finally:
            os.killpg(group, signal.SIGKILL)


def size_of_run_files():
    """Return the size of all files in the folder of runs."""
    with contextlib.suppress(FileNotFoundError), os.scandir("queuectl.runs") as entries:
        return sum(os.stat(entry).st_size for entry in entries)
    return 0


class KilledForTest(BaseException):
    """An exception that no code of the program catches, like SIGKILL."""


class TestOutputIsKept:
    """The last bytes of the output are kept in order, whatever is killed."""

    @mechanism
    def test_the_tail_of_a_run_is_read_from_its_end(self, queue):
        add_job(queue)
        run = claim(queue)
        job = queue.job("job")
        output = b"x" * 10**6 + b"\nlast\n"
        assert queue.tail(job) == b""
        lease = queuectl.Lease(run.lease_path, 2**20)
        lease.write(output)
        assert queue.tail(job) == output[-queuectl.TAIL_SIZE :]
        lease.discard()
        queue.complete(run, make_outcome(None, output=output))
        assert queue.tail(job) is None  # a list does not wait for that much
        assert queue.tail(job, 2**20) == output[-queuectl.TAIL_SIZE :]

    @posix_only
    def test_what_comes_through_a_pipe_after_the_exit_is_kept(self):
        # As `exec > >(tee log)` does: another process writes the last lines.
        command = "(sleep 0.1; echo the reason) & exit 7"
        enqueue(command, id="x", max_retries=1)
        drain(1)
        assert run_ok("logs", "x").out == "the reason\n"
        assert jobs()["x"]["exit_code"] == 7

    @posix_only
    def test_a_process_that_keeps_the_pipe_delays_the_end_by_a_moment(self):
        enqueue("sleep 15 & echo started", id="x", max_retries=1)
        began = time.monotonic()
        drain(1)
        assert time.monotonic() - began < 10 and state_of("x") == "completed"
        assert run_ok("logs", "x").out == "started\n"

    def test_a_job_runs_and_its_output_is_kept(self):
        run_ok("enqueue", '{"id":"job1","command":"echo Hello Deepak"}')
        assert drain() == 0
        assert run_ok("logs", "job1").out == "Hello Deepak\n"
        job = details_of("job1")
        assert (job["state"], job["attempts"], job["exit_code"], job["error"]) == (
            "completed", 1, 0, None)
        assert [run["attempt"] for run in job["runs"]] == [1]
        assert set(job["runs"][0]) == {
            "attempt", "worker", "pid", "started_at", "finished_at", "exit_code",
            "error", "run", "seconds"}

    def test_output_is_bytes_and_only_its_end_is_kept(self):
        configure("output_limit", "10")
        for name, what in (
            ("few", "b'\\xff\\0a'"), ("many", "b'0123456789' * 99 + b'abcde'")
        ):
            enqueue(
                python_command("import sys; sys.stdout.buffer.write(%s)" % what),
                id=name)
        drain(1)
        with queuectl.Queue("queuectl.db") as queue:
            assert queue.output(queue.job("few")) == b"\xff\0a"
            assert queue.output(queue.job("many")) == (
                b"[queuectl: 985 bytes of output dropped here]\n56789abcde")

    @posix_only
    def test_100_megabytes_of_output_cost_no_memory(self):
        enqueue("head -c 100000000 /dev/zero; echo end", id="x")
        pool = start_pool(count=1, fresh=True)  # with the memory of a new process
        worker = workers_of(pool.pid)[0]
        wait_until(lambda: state_of("x") == "completed")
        assert (
            int(re.search(r"VmHWM:\s+(\d+)", read_text("/proc/%d/status" % worker))[1])
            < 60000)
        with queuectl.Queue("queuectl.db") as queue:
            output = queue.output(queue.job("x"))
        assert output.startswith(b"[queuectl: ") and output.endswith(b"\0\0\0end\n")
        assert 2**20 <= len(output) < 2**20 + 100

    def test_endless_output_takes_bounded_disk_space(self):
        enqueue(
            python_command("while 1: print('y' * 999, end='')"), id="x", max_retries=1)
        start_pool(count=1)
        sizes = [0]
        wait_until(
            lambda: sizes.append(size_of_run_files())
            or max(sizes) > 2**21 > sizes[-1] > 0)
        # The bound is twice the limit, a pipe and a bit.
        assert max(sizes) <= 2**21 + 2**16 + 2**20
        run_ok("cancel", "x")
        wait_until(lambda: state_of("x") == "dead")
        printed = run_ok("logs", "x").out
        assert printed.startswith("[queuectl: ") and 2**20 < len(printed) < 2**20 + 100

    @posix_only
    def test_reopening_stderr_loses_no_output_and_no_order(self):
        enqueue(
            "echo a; echo b > /dev/stderr; echo c; echo d >&2; echo e > /dev/stdout",
            id="x")
        enqueue("echo a; echo b | tee /dev/stderr; echo c", id="tee")
        drain()
        assert run_ok("logs", "x").out == "a\nb\nc\nd\ne\n"
        assert run_ok("logs", "tee").out == "a\nb\nb\nc\n"

    def test_a_job_may_print_the_note_of_dropped_output(self):
        """This holds for more digits than Python converts to a number."""
        note = "[queuectl: %s bytes of output dropped here]\n"
        for digits in ("0", "7", "007", "9" * 5000):
            enqueue(
                python_command(
                    "print('%s' + 3 * 'x')" % (note % digits).replace("\n", "\\n")),
                id=digits[:9])
        assert drain(1) == 0
        for digits in ("0", "7", "007", "9" * 5000):
            assert run_ok("logs", digits[:9]).out == note % digits + "xxx\n"

    @posix_only
    @pytest.mark.parametrize("size", [0, 50, 3 * 10**6])
    @pytest.mark.parametrize("whole", [False, True])
    def test_output_printed_before_its_worker_was_killed_is_kept(self, size, whole):
        enqueue(
            "[ -e out ] && exit; "
            + python_command(NUMBERED_OUTPUT + "ten(0, %d)" % size)
            + "; touch out; "
            + LONG_COMMAND,
            id="x")
        pool = start_pool(count=1)
        wait_until(lambda: os.path.exists("out") and live_commands())
        if whole:
            kill_pool(pool)
            start_pool(count=1)
        else:
            os.kill(workers_of(pool.pid)[0], KILL)
        wait_until(lambda: state_of("x") == "completed")
        with queuectl.Queue("queuectl.db") as queue:
            job = queue.job("x")
            assert [run["error"] for run in queue.runs(job)] == ["worker died", None]
            dropped = max(0, size - 2**20)
            assert queuectl.split_dropped(queue.output(job, 1) or b"") == (
                dropped, numbered_output(dropped, size))

    def test_a_background_child_does_not_delay_the_end_of_a_run(self):
        enqueue(
            LONG_COMMAND + " &" if os.name == "posix" else "start /b " + LONG_COMMAND,
            id="x")
        assert drain(1) == 0
        wait_until(live_commands)  # the child lives on

    @mechanism
    @pytest.mark.parametrize("part", [0, 0.5, 1])
    def test_a_worker_killed_while_cutting_back_keeps_the_end(
        self, home, monkeypatch, part
    ):
        lease = queuectl.Lease(str(home / "queuectl.runs" / "x"), LIMIT)
        write = os.write

        def killed(fd, data):
            if len(data) < 2000:
                write(fd, data[: int(part * len(data))])
                raise KilledForTest
            return write(fd, data)

        for first in (0, 80000):  # the second time the file begins with a note
            data = numbered_output(first, first + 80000)
            with monkeypatch.context() as patched, pytest.raises(KilledForTest):
                patched.setattr(os, "write", killed)
                lease.write(data)
            kept = queuectl.read_output(lease.path, LIMIT)
            assert queuectl.split_dropped(kept)[1] == data[-1000:]
            lease.size = os.path.getsize(lease.path)
        lease.discard()

    @mechanism
    def test_output_cut_back_while_it_is_read_is_read_again(self, home, monkeypatch):
        lease = queuectl.Lease(str(home / "queuectl.runs" / "x"), LIMIT)
        lease.write(numbered_output(0, 60000))

        class CutBackWhileRead(io.FileIO):
            def read(self, size=-1):
                if size != -1 or lease.size < 60000:  # a part, or it was cut back
                    return super().read(size)
                beginning = super().read(30000)
                lease.write(numbered_output(60000, 80000))
                return beginning + super().read()

        monkeypatch.setattr(
            queuectl, "open", lambda path, *_: CutBackWhileRead(path), raising=False)
        output = queuectl.read_output(lease.path, LIMIT)
        assert lease.size < 60000  # it was cut back
        assert queuectl.split_dropped(output) == (79000, numbered_output(79000, 80000))
        lease.discard()

    @mechanism
    @pytest.mark.parametrize("seed", range(3))
    def test_a_lease_keeps_the_end_of_the_output_on_a_failing_disk(
        self, home, monkeypatch, seed
    ):
        rnd, limit, printed, write = random.Random(seed), 20000, 0, os.write

        def full(fd, data):
            taken = rnd.choice(
                [0, rnd.randrange(1, len(data) + 1), len(data), len(data)])
            if not taken:
                raise OSError(28, "No space left on device")
            return write(fd, data[:taken])

        lease = queuectl.Lease(str(home / "queuectl.runs" / "x"), limit)
        for step in range(200):
            monkeypatch.setattr(os, "write", full if step % 50 > 24 else write)
            size = rnd.choice([1, 10, 1000, 30000, 100000])
            lease.write(numbered_output(printed, printed + size))
            printed += size
            first = max(0, printed - limit)
            kept = first, numbered_output(first, printed)
            assert queuectl.split_dropped(lease.output())[1] == kept[1]
            if step < 25:  # the disk has taken every write so far
                assert queuectl.split_dropped(lease.output()) == kept
                on_disk = queuectl.read_output(lease.path, limit)
                assert queuectl.split_dropped(on_disk) == kept
                assert os.path.getsize(lease.path) <= 2 * limit + 2**16
        lease.discard()


# The pool runs as another user, without the rights of root.
AS_ANOTHER_USER = """
queuectl.os.geteuid = lambda: 65534
queuectl.os.access = lambda path, mode: queuectl.os.stat(path).st_uid == 65534
"""


class TestNamesOfFiles:
    """The files beside a database can't be taken for those of others."""

    def test_an_applications_log_is_left_alone(self):
        for name in ("app.log", "app.log.1"):
            with open(name, "w") as file:
                file.write("of the application")
        run_ok("enqueue", "--db", "app.db", "--", "true")
        pool = start_pool("--drain", "--db", "app.db", count=1)
        assert pool.wait(20) == 0
        assert read_text("app.log") == read_text("app.log.1") == "of the application"
        assert "completed" in read_text("app.db.queuectl.log")

    def test_databases_of_similar_names_share_nothing(self):
        for name in ("jobs", "jobs.db", "queuectl"):
            run_ok("enqueue", "--db", name, "--id", name, "--", "true")
        assert run_ok("list", "--db", "jobs", "--json").json[0]["id"] == "jobs"
        names = {queuectl.path_beside(os.path.abspath(name), ".log")
                 for name in ("jobs", "jobs.db", "queuectl", "queuectl.db")}
        assert len(names) == 4


class TestPrivateFiles:
    """Nobody else can read a queue, and jobs inherit nothing of it."""

    @posix_only
    def test_files_are_private_and_jobs_keep_the_users_umask(self):
        before = os.umask(0o002)
        try:
            enqueue("touch out; sleep 30", id="x")
            start_pool(count=1)
            wait_until(lambda: os.path.exists("out"))
        finally:
            os.umask(before)
        for folder, _, names in os.walk("."):
            for name in set(names) - {"out"}:
                assert (
                    os.stat(os.path.join(folder, name)).st_mode & 0o777 == 0o600
                ), name
        assert os.stat("out").st_mode & 0o777 == 0o664

    @mechanism
    @posix_only
    def test_a_job_inherits_only_its_streams_and_its_lease(self):
        enqueue("for f in /proc/self/fd/*; do readlink $f; done; true", id="x")
        drain(1)
        files = {line for line in run_ok("logs", "x").out.split() if "queuectl" in line}
        assert len(files) == 1 and "queuectl.runs" in files.pop()

    @needs_root
    @pytest.mark.parametrize("name", ["queuectl.db", "queuectl.log", "queuectl.runs"])
    def test_a_file_of_another_user_is_refused_with_advice(self, name):
        enqueue(id="x")
        os.mkdir("queuectl.runs")
        open("queuectl.log", "w").close()
        for other in set(os.listdir()) - {name}:
            os.chown(other, 65534, 65534)
        pool = start_pool(script=AS_ANOTHER_USER)
        assert pool.wait(10) == 1
        printed = pool.stderr.read()
        assert (
            name + " belongs to another user: chown it, or run this as that user"
            in printed)
        assert printed.count("\n") == 1


@pytest.fixture
def small_disk(home, monkeypatch):
    """Mount a disk of 12 MiB, and run the test on it."""
    os.mkdir("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", "disk"]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk needs root")
    monkeypatch.chdir("disk")
    yield
    for pool in list(STARTED):
        kill_pool(pool)
    os.chdir(str(home))
    subprocess.run(["umount", "-l", "disk"], check=True)


def fill_disk():
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), open("fill", "wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()


class TestErrorsAreOneLine:
    """An error is a single line, and nothing is half done."""

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_result_that_cannot_be_printed_fails_no_change(self):
        with open("/dev/full", "w") as full:
            added, drained, shown = [
                subprocess.run([sys.executable, COMPILED, *words], stdout=full,
                               stderr=subprocess.PIPE, encoding="utf-8", timeout=30)
                for words in (["enqueue", "--id", "x", "--", "true"],
                              ["worker", "start", "--drain"], ["list"])]
        assert (added.returncode, added.stderr) == (
            0, "queuectl: the result could not be printed: No space left on device\n")
        assert drained.returncode == 0 and state_of("x") == "completed"
        assert shown.returncode == 1 and shown.stderr.count("\n") == 1

    @posix_only
    def test_a_pool_without_a_reader_of_its_output_runs_on(self):
        enqueue(id="x")
        reader, writer = os.pipe()
        os.close(reader)
        assert subprocess.run(
            [sys.executable, COMPILED, "worker", "start", "--drain"], stdout=writer,
            timeout=30).returncode == 0
        os.close(writer)
        assert state_of("x") == "completed"

    @posix_only
    def test_a_path_that_sqlite_cannot_take_is_refused_in_words(self):
        folder = "/".join(["x" * 200] * 3)
        os.makedirs(folder)
        assert "longer than SQLite's 504 bytes" in run_refused(
            "enqueue", "--db", folder + "/q.db", "--", "true")
        assert os.listdir(folder) == []

    @needs_mounts
    def test_a_queue_of_a_read_only_mount_is_refused_in_words(self):
        os.mkdir("disk")
        answer = run_with_mounts("""
            mount -t tmpfs none disk; queuectl --db disk/q.db enqueue -- true
            mount -o remount,ro disk; queuectl --db disk/q.db list""")
        assert "is read-only: its mode or its file system" in answer.stderr

    @needs_mounts
    def test_a_database_that_is_mounted_as_one_file_is_refused(self):
        enqueue(id="x")
        open("mounted.db", "w").close()
        answer = run_with_mounts("""
            mount --bind queuectl.db mounted.db
            queuectl --db mounted.db enqueue -- true; echo $?
            mkdir folder; mount --bind . folder
            queuectl --db folder/queuectl.db enqueue --id y -- true""")
        assert answer.stdout == "1\nenqueued y\n" and set(jobs()) == {"x", "y"}
        assert "mount its folder" in answer.stderr

    def test_unusable_queues_are_refused_in_words(self, home):
        os.mkdir("folder.db")
        with open("text.db", "w") as file:
            file.write("this is no database, but long enough to be read as one" * 99)
        sqlite3.connect("foreign.db").execute("CREATE TABLE t (x)").connection.close()
        run_ok("list", "--db", "newer.db")
        with contextlib.closing(sqlite3.connect("newer.db")) as db:
            db.execute("PRAGMA user_version = 99")
        words = {
            "folder.db": "is not a regular file",
            "text.db": "not a database",
            "foreign.db": "not a queue of queuectl",
            "newer.db": "version 99",
            "no/where.db": (
                "No such file or directory" if os.name == "posix" else "where")}
        for name, word in words.items():
            message = run_refused("list", "--db", name)
            assert word in message and name.split("/")[0] in message

    def test_a_damaged_database_is_reported_with_the_next_step(self):
        run_ok("enqueue", "-", stdin=b'{"command": "true"}\n' * 500)
        with open("queuectl.db", "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        words = "queuectl.db: database disk image is malformed; restore a backup\n"
        assert run_refused("list").endswith(words)
        pool = start_process("worker", "start")
        assert pool.wait(10) == 1 and pool.stderr.read().endswith(words)

    @posix_only
    def test_a_pool_ends_when_its_database_gets_damaged(self):
        enqueue(UNTIL_GO, id="x")
        pool = start_pool("--drain", count=1)
        wait_until(lambda: state_of("x") == "processing")
        with open("queuectl.db", "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 40960)
        open("go", "w").close()
        assert pool.wait(15) == 1
        assert "is malformed; restore a backup\n" in pool.stderr.read()

    @pytest.mark.parametrize("table", ["runs", "totals"])
    def test_a_pool_ends_also_where_only_its_workers_find_the_damage(self, table):
        enqueue(id="x")
        (page,), = query("SELECT rootpage FROM sqlite_master WHERE name = ?", table)
        with open("queuectl.db", "r+b") as file:
            file.seek(4096 * (page - 1))
            file.write(b"\xff" * 4096)
        pool = start_process("worker", "start", "--drain", "--count", "2")
        assert pool.wait(15) == 1 and "; restore a backup\n" in pool.stderr.read()

    def test_a_queue_of_version_1_is_refused_and_left_alone(self):
        enqueue(id="x")
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            db.execute("PRAGMA user_version = 1")
        words = "queuectl.db was made by queuectl 1.0: convert it with queuectl 1.1"
        for argv in (["list"], ["enqueue", "--", "true"], ["worker", "start"]):
            assert words in run_refused(*argv)
        assert query("PRAGMA user_version") == [(1,)]

    @posix_only
    def test_a_file_that_is_not_regular_is_refused(self):
        os.mkfifo("fifo")
        assert "is not a regular file" in run_refused("list", "--db", "fifo")
        assert "is not a regular file" in run_refused("list", "--db", os.devnull)

    @posix_only
    def test_a_queue_with_two_hard_links_is_refused(self):
        enqueue(id="x")
        os.link("queuectl.db", "other.db")
        for db in ("queuectl.db", "other.db"):
            for argv in (
                ["enqueue", "--", "true"], ["list"], ["status"], ["worker", "start"],
                ["delete", "x"], ["wait"], ["config", "show"]
            ):
                assert "hard link" in run_refused(*argv, "--db", db)
        os.remove("other.db")
        assert list(jobs()) == ["x"] and leftover_files() == []

    @posix_only
    def test_a_new_hard_link_does_not_stop_a_running_pool(self):
        enqueue("sleep 0.2", id="x")
        enqueue(id="next")
        pool = start_pool(count=1)
        os.mkdir("snapshot")
        os.link("queuectl.db", "snapshot/queuectl.db")
        os.kill(workers_of(pool.pid)[0], KILL)  # The new worker opens the queue anew.
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            done = "SELECT count(*) FROM jobs WHERE state = 'completed'"
            deadline = time.monotonic() + 20
            while db.execute(done).fetchone() != (2,):
                assert time.monotonic() < deadline and pool.poll() is None
        assert "hard link" not in read_text("queuectl.log")
        os.remove("snapshot/queuectl.db")
        assert run_ok("worker", "stop").code == 0 and pool.wait(10) == 0

    @posix_only
    def test_a_symlink_to_a_queue_is_that_queue(self):
        enqueue(id="x")
        os.mkdir("sub")
        os.symlink("../queuectl.db", "sub/link.db")
        start_pool("--db", "sub/link.db")
        wait_until(lambda: state_of("x") == "completed")
        assert run_ok("worker", "stop").out.startswith("stopped pool")
        assert sorted(os.listdir(".")) == ["queuectl.db", "queuectl.log", "sub"]
        assert os.listdir("sub") == ["link.db"]

    @pytest.mark.parametrize("name", ["a b", "a%41?b#c.db", "ä", "../x.db"])
    def test_a_database_may_have_any_name(self, name):
        if os.name != "posix":
            name = name.replace("?", "")
        run_ok("enqueue", "--id", "a", "--db", name, "--", "true")
        assert os.path.getsize(name) and jobs("--db", name)

    @mechanism
    def test_a_refusal_stays_one_line_whatever_it_quotes(self, monkeypatch):
        assert "\x1b" not in run_refused("list", "a\nb\x1b[2J", code=2)

        def dumps(*_, **__):
            raise RecursionError

        # The depth at which Python gives up differs from version to version.
        monkeypatch.setattr(queuectl.json, "dumps", dumps)
        assert "nested" in run_refused("enqueue", '{"command":[[]]}', code=2)

    def test_a_closed_pipe_is_silent(self):
        run_ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 5000)
        with subprocess.Popen(
            [sys.executable, COMPILED, "list"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE
        ) as listing:
            assert listing.stdout.readline().startswith(b"ID")
            listing.stdout.close()
            assert listing.stderr.read() == b"" and listing.wait(10) == 0

    @posix_only
    def test_closed_streams_do_no_harm(self):
        enqueue(id="x")
        line = "%s %s list >&- 2>&-" % (
            shlex.quote(sys.executable), shlex.quote(SCRIPT))
        assert subprocess.run(line, shell=True).returncode == 0
        assert list(jobs()) == ["x"]

    def test_a_command_waits_for_a_locked_database_for_a_while(self, monkeypatch):
        enqueue(id="x")
        with locked_database():
            # In a fork, SQLite would believe that it holds the lock itself.
            waiting = start_process("delete", "x", fresh=True)
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(0.2)
        assert waiting.wait(20) == 0
        assert waiting.stdout.read() == "deleted x\n" and waiting.stderr.read() == ""
        monkeypatch.setattr(queuectl, "LOCK_TIMEOUT", 0.1)
        with locked_database():
            assert "database is locked" in run_refused("enqueue", '{"command":"true"}')
            assert run_ok("list").out  # readers do not wait

    def test_a_pool_waits_while_the_database_is_locked(self):
        pool = start_pool(count=1)
        enqueue("sleep 0.1", id="x")
        wait_until(lambda: state_of("x") == "processing")
        with locked_database():
            wait_until(lambda: "database is locked" in read_text("queuectl.log"))
        wait_until(lambda: state_of("x") == "completed")
        assert pool.poll() is None

    @fork_only
    def test_a_lasting_trouble_of_the_supervisor_is_logged_once(self):
        start_pool(count=1, script="""if 1:
        import os
        def recover_lost(self, *_, real=queuectl.Reaper.recover_lost):
            if os.path.exists("full"):
                with open("tries", "a") as tries:
                    tries.write("x")
                raise queuectl.sqlite3.OperationalError("database or disk is full")
            real(self, *_)
        queuectl.Reaper.recover_lost = recover_lost""")
        open("full", "w").close()
        wait_until(lambda: os.path.exists("tries") and len(read_text("tries")) > 3)
        os.remove("full")
        wait_until(lambda: "INFO" in read_text("queuectl.log").partition("full")[2])
        assert re.findall(r"(?:ERROR|INFO) pool.*] (.*)", read_text("queuectl.log")) == [
            "pool of 1 started", "database or disk is full; waiting until it is over",
            "going on"]

    def test_a_job_that_died_is_a_warning_in_the_log(self):
        enqueue("exit 3", id="x", max_retries=2)
        configure("backoff_base", "0")
        drain()
        log = read_text("queuectl.log")
        assert re.findall(r"(\w+) worker\[\d+\] x (\d/2 (?:failed|dead))", log) == [
            ("INFO", "1/2 failed"), ("WARNING", "2/2 dead")]

    @posix_only
    def test_a_drain_reports_its_end_after_the_database_was_locked(self):
        script = """if 1:
        def finish(self, queue, finish=queuectl.Supervisor.finish, left=[1, 1]):
            if left:
                error = "database is locked%d" % left.pop()
                raise queuectl.sqlite3.OperationalError(error)
            return finish(self, queue)
        queuectl.Supervisor.finish = finish"""
        enqueue()
        assert start_pool("--drain", script=script).wait(20) == 0
        enqueue("exit 1", max_retries=1)
        assert start_pool("--drain", script=script).wait(20) == 1

    @posix_only
    def test_a_full_disk_refuses_a_whole_batch(self, small_disk):
        enqueue(id="x")
        line = b'{"command":"echo %s"}\n' % (b"x" * 4000)
        assert "disk is full" in run_refused("enqueue", "-", stdin=line * 4000)
        assert list(jobs()) == ["x"]

    @posix_only
    def test_a_pool_waits_until_a_full_disk_has_room_again(self, small_disk):
        run_ok("enqueue", "-", stdin=b'{"command":"sleep 0.05"}\n' * 16)
        pool = start_pool()
        wait_until(lambda: jobs("--state", "completed"))
        fill_disk()
        wait_until(lambda: "waiting until it is over" in read_text("queuectl.log") or
                   "disk is full" in cli("enqueue", '{"command":"true"}').err)
        check = cli("status", "--check")
        assert check.code == 1 and check.err.startswith("queuectl: the disk is full")
        assert pool.poll() is None
        run_ok("worker", "stop", "--no-wait")  # it can't record what its jobs returned
        assert "the disk is full" in cli("status", "--check").err
        os.remove("fill")
        pool.wait(20)
        start_pool()
        wait_until(lambda: len(jobs("--state", "completed")) >= 16)

    @posix_only
    def test_a_full_disk_is_named_also_where_no_pool_has_opened_the_queue(
            self, small_disk):
        enqueue(id="x")
        fill_disk()
        for argv in (["list"], ["status", "--check"], ["worker", "start", "--drain"]):
            assert run_refused(*argv).endswith("; the disk is full\n")
        os.remove("fill")
        drain(1)
        assert state_of("x") == "completed"

    @posix_only
    def test_the_reserve_of_root_counts_as_far_as_root_can_use_it(
            self, small_disk, monkeypatch):
        empty = types.SimpleNamespace(f_bavail=0, f_bfree=2**20, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path: empty)
        assert not queuectl.is_disk_full("queuectl.db") and os.listdir(".") == []
        fill_disk()
        assert queuectl.is_disk_full("queuectl.db")

    @posix_only
    def test_a_job_that_fills_the_disk_with_its_output_completes(self, small_disk):
        # Twice this limit is more than the free space.
        configure("output_limit", "4000000")
        with open("fill", "wb") as file:
            file.write(b"x" * 5 * 2**20)
        enqueue(python_command(NUMBERED_OUTPUT + "ten(0, 12000000)"), id="x")
        enqueue("echo next", id="next")
        full = []
        pool = start_pool(count=1)
        wait_until(lambda: full.append(os.statvfs(".").f_bavail == 0)
                   or state_of("next") == "completed")
        assert any(full) and state_of("x") == "completed" and pool.poll() is None
        with queuectl.Queue("queuectl.db") as queue:
            dropped, output = queuectl.split_dropped(queue.output(queue.job("x")))
        assert output == numbered_output(8000000, 12000000) and dropped == 8000000

    @posix_only
    def test_a_read_only_disk_is_reported_in_one_line(self, small_disk):
        enqueue(id="x")
        subprocess.run(["mount", "-o", "remount,ro", os.getcwd()], check=True)
        for argv in (["enqueue", '{"command":"true"}'], ["worker", "start"], ["list"]):
            assert "queuectl" in run_refused(*argv)
        for argv in (["enqueue", '{"command":"true"}'], ["list"]):
            assert "Read-only file system" in run_refused(*argv, "--db", "new.db")

    def test_a_pool_runs_with_an_unwritable_log(self):
        os.mkdir("queuectl.log")
        enqueue(id="x")
        answer = drain_answer()
        assert answer.code == 0
        assert "cannot write the log" in answer.err and "x 1/3 completed" in answer.err

    def test_a_full_log_is_renamed_and_no_line_is_lost(self):
        # The workers go on writing while the log is renamed, after some hundred lines.
        line = b'{"command":"sleep 0.01"}\n'
        names = [
            job["id"] for job in run_ok("enqueue", "-", "--json", stdin=line * 120).json
        ]
        start_pool(count=3, script="queuectl.LOG_LIMIT = 8000")
        wait_until(lambda: len(jobs("--state", "completed")) == len(names))
        run_ok("worker", "stop")
        assert 8000 < os.path.getsize("queuectl.log.1")
        logs = read_text("queuectl.log"), read_text("queuectl.log.1")
        for name in names:
            assert sum(log.count(" %s 1/3 completed" % name) for log in logs) == 1

    def test_the_log_has_the_times_of_json(self):
        drain()
        for line in read_text("queuectl.log").splitlines():
            assert re.match(
                r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|ERROR|WARNING) \w+\[\d+\] ",
                line)
        stamp = read_text("queuectl.log")[:20]
        assert abs(queuectl.parse_time(stamp) - time.time()) < 60

    @posix_only
    def test_a_file_system_without_locks_is_reported_at_the_start(self):
        enqueue()
        script = """if 1:
        import errno
        def flock(fd, how):
            raise OSError(errno.ENOTSUP, "Operation not supported")
        queuectl.fcntl.flock = flock"""
        pool = start_pool(script=script)
        assert pool.wait(10) == 1 and "no locks" in pool.stderr.read()


def log_of(path):
    """Return the path of the log of the queue at PATH."""
    return queuectl.path_beside(os.path.realpath(path), ".log")


class TestNothingElseIsSignalled:
    """Nothing that is not this queue's is ever signalled."""

    @mechanism
    @posix_only
    def test_a_stranger_with_the_recorded_pid_survives(self, queue):
        """The system gave the pid of a dead run to another process."""
        with subprocess.Popen(["sleep", "66.25"], start_new_session=True) as stranger:
            add_job(queue)
            run = queue.claim(stranger.pid, lambda run: None)
            queue.record_pid(run._replace(pid=stranger.pid))
            make_reaper(queue).recover_lost(queue, [])
            assert queue.job("job")["state"] == "pending"
            assert stranger.poll() is None
            stranger.kill()

    @posix_only
    @pytest.mark.parametrize("how", ["cp -a", "backup"])
    def test_a_pool_on_a_copy_signals_nothing_of_the_original(self, how, monkeypatch):
        os.mkdir("a")
        monkeypatch.setenv("QUEUECTL_DB", "a/queuectl.db")
        enqueue(LONG_COMMAND, id="x", cwd="/")
        pool = start_pool(count=1)
        wait_until(
            lambda: live_commands() and "runs, pid" in read_text("a/queuectl.log"))
        original, copy = live_commands(), "b/queuectl.db"
        if how == "cp -a":
            subprocess.run(["cp", "-a", "a", "b"], check=True)
        else:
            copy = "a/copy.db"
            with contextlib.closing(sqlite3.connect("a/queuectl.db")) as source:
                with contextlib.closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
        monkeypatch.setenv("QUEUECTL_DB", copy)
        start_pool(count=1)
        # The job of the copy is another job and runs as well.
        wait_until(lambda: len(live_commands()) == 2)
        assert [run["error"] for run in details_of("x")["runs"]] == [
            "worker died", None]
        assert run_ok("worker", "stop", "--now").out.startswith("stopped pool")
        assert live_commands() == original
        assert "died, ending" not in read_text(log_of(copy))
        monkeypatch.setenv("QUEUECTL_DB", "a/queuectl.db")
        assert len(details_of("x")["runs"]) == 1 and pool.poll() is None
        run_ok("worker", "stop", "--now")

    @posix_only
    @pytest.mark.parametrize("how", ["cp -a", "backup"])
    def test_a_pool_on_a_copy_spares_an_orphan_of_the_original(
        self, how, home, monkeypatch
    ):
        os.mkdir("a")
        monkeypatch.setenv("QUEUECTL_DB", str(home / "a" / "queuectl.db"))
        enqueue(LONG_COMMAND, id="x", cwd="/")
        pool = start_pool(count=1)
        wait_until(live_commands)
        original, worker = live_commands(), workers_of(pool.pid)[0]
        os.kill(pool.pid, signal.SIGSTOP)
        # Only the pool on the copy is left to look for the command.
        os.kill(worker, KILL)
        copy = str(home / ("b" if how == "cp -a" else "a") / "queuectl.db")
        if how == "cp -a":
            subprocess.run(["cp", "-a", "a", "b"], check=True)
        else:
            copy = copy.replace("queuectl", "copy")
            with contextlib.closing(sqlite3.connect("a/queuectl.db")) as source:
                with contextlib.closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
        monkeypatch.setenv("QUEUECTL_DB", copy)
        start_pool(count=1)
        wait_until(lambda: len(live_commands()) == 2)  # The copy's job runs as well.
        assert set(original) < set(live_commands())
        assert "died, ending" not in read_text(log_of(copy))
        run_ok("worker", "stop", "--now")
        assert live_commands() == original
        monkeypatch.setenv("QUEUECTL_DB", str(home / "a" / "queuectl.db"))
        os.kill(pool.pid, signal.SIGCONT)
        # The original's own supervisor ends it.
        wait_until(lambda: live_commands() and live_commands() != original)
        run_ok("worker", "stop", "--now")

    @posix_only
    @pytest.mark.parametrize("how", ["cancel", "worker", "pool"])
    def test_children_of_a_finished_run_outlive_the_next_run(self, how):
        configure("backoff_base", "0")
        enqueue(
            "[ -e out ] && exec %s; touch out; %s & exit 1"
            % (LONG_COMMAND, LONG_COMMAND),
            id="x")
        pool = start_pool(count=1)
        wait_until(
            lambda: len(live_commands()) == 2 and details_of("x")["runs"][1]["pid"])
        second = details_of("x")["runs"][1]["pid"]
        left, = set(live_commands()) - {second}
        if how == "worker":
            os.kill(workers_of(pool.pid)[0], KILL)
        elif how == "pool":
            kill_pool(pool)
            start_pool(count=1)
        run_ok("cancel", "x")
        wait_until(lambda: state_of("x") == "dead")
        assert live_commands() == [left]
        run_ok("worker", "stop", "--now")
        assert live_commands() == [left]

    @mechanism
    @posix_only
    def test_a_child_of_a_run_that_just_completed_is_spared(self, queue, monkeypatch):
        """The run completes after the supervisor listed it."""
        add_job(queue)
        reaper = forbid_signals(monkeypatch, make_reaper(queue))
        with leased_run(queue, 1) as (run, lease), lease_heir(lease) as pid:
            listed = queue.processing_runs()
            assert queuectl.processes_of({run.lease_path: None}) == {run.lease_path: {pid}}
            queue.complete(run, make_outcome(None))
            monkeypatch.setattr(queue, "processing_runs", lambda: listed)
            reaper.recover_lost(queue, [])
        assert queue.job("job")["state"] == "completed"


# The schema of queuectl 1.1, with which a queue in every state is made.
SCHEMA_2 = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    command TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state = 'pending'
        OR state = 'processing'
        OR state = 'completed'
        OR state = 'failed'
        OR state = 'dead'),
    attempts INTEGER NOT NULL DEFAULT 0,
    max_retries INTEGER NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0,
    run_at REAL NOT NULL,
    claimable INTEGER NOT NULL,
    timeout REAL,
    cwd TEXT NOT NULL,
    env TEXT,
    launcher TEXT,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    run INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    error TEXT
, lock TEXT, waits INTEGER NOT NULL DEFAULT 0);
CREATE TABLE runs (
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,
    pid INTEGER,
    started_at REAL NOT NULL,
    finished_at REAL,
    exit_code INTEGER,
    error TEXT,
    output BLOB,
    PRIMARY KEY (seq, run)
) WITHOUT ROWID;
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counts (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE waits (seq INTEGER NOT NULL, waits_for INTEGER NOT NULL,
    PRIMARY KEY (seq, waits_for)) WITHOUT ROWID;
CREATE INDEX waits_for ON waits (waits_for);
CREATE TABLE totals (outcome TEXT PRIMARY KEY, runs INTEGER NOT NULL,
    seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE untold (seq INTEGER PRIMARY KEY);
CREATE INDEX jobs_claimable ON jobs (priority DESC, seq)
    WHERE state = 'pending' AND claimable = 1;
CREATE INDEX jobs_waiting ON jobs (run_at) WHERE claimable = 0 AND waits = 0;
CREATE INDEX jobs_locked ON jobs (lock, claimable, priority DESC, seq)
    WHERE lock NOT NULL AND state = 'pending';
CREATE INDEX jobs_rare ON jobs (state, seq)
    WHERE state <> 'pending' AND state <> 'completed';
CREATE TRIGGER job_moved AFTER UPDATE OF state ON jobs WHEN OLD.state <> NEW.state BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    UPDATE counts SET jobs = jobs + 1 WHERE state = NEW.state; END;
CREATE TRIGGER job_removed AFTER DELETE ON jobs BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    DELETE FROM waits WHERE seq = OLD.seq;
    DELETE FROM runs WHERE seq = OLD.seq; END;
CREATE TRIGGER wait_added AFTER INSERT ON waits BEGIN
    UPDATE jobs SET waits = waits + 1, claimable = 0, state = 'pending'
        WHERE seq = NEW.seq; END;
CREATE TRIGGER wait_ended AFTER DELETE ON waits BEGIN
    UPDATE jobs SET waits = waits - 1 WHERE seq = OLD.seq; END;
CREATE TRIGGER job_completed AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed'
    BEGIN DELETE FROM waits WHERE waits_for = NEW.seq; END;
CREATE TRIGGER front_removed AFTER DELETE ON jobs BEGIN
    UPDATE jobs SET state = 'dead', claimable = 1,
        updated_at = (julianday('now') - 2440587.5) * 86400.0,
        error = 'what it waited for was removed' WHERE state = 'pending'
        AND seq IN (SELECT seq FROM waits WHERE waits_for = OLD.seq);
    DELETE FROM waits WHERE waits_for = OLD.seq; END;
CREATE TRIGGER lock_moved AFTER UPDATE OF state, claimable ON jobs
    WHEN OLD.lock NOT NULL BEGIN
    UPDATE jobs SET claimable = 2
        WHERE lock = OLD.lock AND state = 'pending' AND claimable = 1;
    UPDATE jobs SET claimable = 1
        WHERE seq = (SELECT seq FROM jobs WHERE lock = OLD.lock AND state = 'pending'
            AND claimable = 2 ORDER BY priority DESC, seq LIMIT 1)
        AND NOT EXISTS (SELECT 1 FROM jobs
            WHERE lock = OLD.lock AND state = 'processing'
                AND state <> 'pending' AND state <> 'completed'); END;
CREATE TRIGGER lock_left AFTER DELETE ON jobs WHEN OLD.lock NOT NULL BEGIN
    UPDATE jobs SET claimable = 2
        WHERE lock = OLD.lock AND state = 'pending' AND claimable = 1;
    UPDATE jobs SET claimable = 1
        WHERE seq = (SELECT seq FROM jobs WHERE lock = OLD.lock AND state = 'pending'
            AND claimable = 2 ORDER BY priority DESC, seq LIMIT 1)
        AND NOT EXISTS (SELECT 1 FROM jobs
            WHERE lock = OLD.lock AND state = 'processing'
                AND state <> 'pending' AND state <> 'completed'); END;
INSERT INTO counts VALUES
    ('pending', 4), ('processing', 1), ('completed', 1), ('failed', 1), ('dead', 2);
INSERT INTO totals VALUES
    ('completed', 5, 2.5), ('failed', 2, 1), ('interrupted', 1, 9);
INSERT INTO config VALUES ('token', '00c0ffee'), ('backoff_base', '5');
PRAGMA application_id = 1902343217;
PRAGMA user_version = 2;
PRAGMA journal_mode = WAL;
"""
JOBS_2 = [  # id, state, claimable, lock, run, error, output
    ("done", "completed", 1, None, 1, None, b"out"),
    ("failed", "failed", 0, None, 1, "exit 3", b""),
    ("dead", "dead", 1, None, 1, "exit 4", b"\xff"),
    ("cut", "dead", 1, None, 0, "cancelled", None),
    ("lost", "processing", 1, None, 1, None, None),
    ("first", "pending", 1, "l", 0, None, None),
    ("second", "pending", 2, "l", 0, None, None),
    ("behind", "pending", 0, None, 0, None, None),
    ("chain", "pending", 0, None, 0, None, None)]


def make_queue_of_version_2(path="queuectl.db"):
    """Make a queue as queuectl 1.1 leaves it when all its processes were killed."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(SCHEMA_2)
        for id, state, claimable, lock, run, error, output in JOBS_2:
            db.execute(
                "INSERT INTO jobs (id, command, state, max_retries, run_at, claimable,"
                " cwd, created_at, updated_at, run, lock, error, attempts)"
                " VALUES (?, 'echo new', ?, 3, 1e9, ?, ?, 1e9, 1e9, ?, ?, ?, ?)",
                (id, state, claimable, os.getcwd(), run, lock, error, run))
            if run:
                ended = None if state == "processing" else 1e9 + 2
                db.execute(
                    "INSERT INTO runs SELECT seq, 1, 1, 77, 78, 1e9, ?, ?, ?, ?"
                    " FROM jobs WHERE id = ?",
                    (ended, None if error is None else 3, error, output, id))
        for id, other in (("behind", "dead"), ("chain", "behind")):
            db.execute("INSERT INTO waits SELECT a.seq, b.seq FROM jobs a, jobs b"
                       " WHERE a.id = ? AND b.id = ?", (id, other))


def schema_of_queue():
    """Return the SQL of everything in a queue's database: {name: SQL}."""
    return dict(query("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))


class TestMigration:
    """A queue of an older version is converted."""

    def test_a_queue_of_1_1_is_converted_with_all_that_is_in_it(self):
        make_queue_of_version_2()
        assert {id: job["state"] for id, job in jobs().items()} == {
            row[0]: row[1] for row in JOBS_2}
        assert query("PRAGMA user_version") == [(queuectl.SCHEMA_VERSION,)]
        assert query(WRONG_GATES.replace("?", "0")) == []
        converted = schema_of_queue()
        run_ok("list", "--db", "new.db")
        with contextlib.closing(sqlite3.connect("new.db")) as db:
            new = dict(db.execute(
                "SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))
        assert converted.keys() == new.keys()
        made_anew = query("SELECT name FROM sqlite_master WHERE sql NOT NULL"
                          " AND (type = 'index' OR type = 'trigger')")
        assert all(converted[name] == new[name] for name, in made_anew)
        assert run_ok("logs", "done").out == "out"
        assert details_of("dead")["exit_code"] == 3
        assert run_ok("logs", "dead", "--json").json["output"] == BYTE_FF
        assert run_ok("config", "get", "backoff_base").out == "5\n"
        assert details_of("chain")["after"] == ["behind"]
        assert run_ok("dlq", "retry", "--all").out == (
            "retried 1 job; 1 left: cancelled ones are retried by id (cut);"
            " to retry one: queuectl.py retry cut\n")
        run_ok("edit", "failed", "--run-at", "now")
        assert drain() == 0
        assert {id for id, job in jobs().items() if job["state"] != "completed"} == {
            "cut"}
        assert [run["error"] for run in details_of("lost")["runs"]] == [
            "worker died", None]

    def test_commands_at_once_convert_a_queue(self):
        make_queue_of_version_2()
        commands = [start_process("enqueue", "--", "true") for _ in range(8)]
        assert [each.stderr.read() for each in commands] == [""] * 8
        assert len(jobs()) == len(JOBS_2) + 8

    def test_a_process_of_1_1_fails_instead_of_writing(self):
        make_queue_of_version_2()
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            assert jobs()
            with pytest.raises(sqlite3.OperationalError, match="claimable"):
                db.execute("UPDATE jobs SET state = 'processing' WHERE claimable = 1")

    @posix_only
    @pytest.mark.parametrize("name, file, words", [
        ("queuectl.db", "queuectl-77.pid", "pool 77 of an older queuectl runs: stop it with"
         " queuectl.py worker stop, then try again"),
        ("queuectl.db", "queuectl.runs/worker-77-78", "pool 77 of an older queuectl runs"),
        ("queuectl.db", "queuectl.runs/00c0ffee-5-1", "job lost still runs"),
        ("app.db", "app-77.pid", "stop it with worker stop of that queuectl"),
        ("app.db", "app.log", "job lost is processing")])
    def test_it_is_not_converted_while_1_1_may_run(self, name, file, words):
        make_queue_of_version_2(name)
        os.makedirs("queuectl.runs", exist_ok=True)
        fd = queuectl.lock_file(os.path.abspath(file))
        for argv in (["list"], ["enqueue", "--", "true"], ["worker", "start"]):
            assert words in run_refused("--db", name, *argv)
        os.close(fd)
        os.remove(file)
        if name == "app.db":
            with contextlib.closing(sqlite3.connect(name)) as db:
                assert db.execute("PRAGMA user_version").fetchone() == (2,)
                db.execute("UPDATE jobs SET state = 'pending' WHERE id = 'lost'")
                db.commit()
        assert len(jobs("--db", name)) == len(JOBS_2)

    @fork_only
    @pytest.mark.parametrize("moment", range(8))
    def test_a_killed_conversion_changes_nothing(self, moment):
        make_queue_of_version_2()
        program = """
def killed(self, script, left=[%d]):
    for statement in script.split(";\\n"):
        left[0] -= 1
        if left[0] < 0:
            queuectl.os.kill(queuectl.os.getpid(), 9)
        if queuectl.sqlite3.complete_statement(statement + ";"):
            self.db.execute(statement)
queuectl.Database._execute_all = killed
""" % (2 * moment)
        process = start_process("list", program=program)
        assert process.wait(20) == -9
        with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert len(jobs()) == len(JOBS_2)

    @mechanism
    def test_a_migration_makes_indexes_and_triggers_anew(self, monkeypatch):
        enqueue(id="old", lock="one")
        version, before = queuectl.SCHEMA_VERSION, schema_of_queue()
        monkeypatch.setattr(queuectl, "SCHEMA_VERSION", version + 1)
        monkeypatch.setattr(queuectl, "MIGRATIONS", {
            version: "ALTER TABLE jobs ADD COLUMN of_test TEXT;\n"
                     "ALTER TABLE runs ADD COLUMN of_test TEXT;\n"})
        monkeypatch.setattr(queuectl, "SCHEMA", queuectl.SCHEMA.replace(
            "user_version = %d" % version, "user_version = %d" % (version + 1)).replace(
            "ON jobs (state, seq)", "ON jobs (state, of_test, seq)"))
        with queuectl.Queue("queuectl.db") as queue:
            assert query("PRAGMA user_version") == [(version + 1,)]
            assert queue.job("old")["state"] == "pending"
        after = schema_of_queue()
        assert {name for name, sql in after.items() if sql != before[name]} == {
            "jobs", "runs", "jobs_rare"}
        assert "of_test" in after["jobs"] and "of_test, seq" in after["jobs_rare"]
        run_ok("delete", "old")
        assert read_status()["jobs"]["pending"] == 0  # the trigger that counts is there


# ======================================================================================
# Life of a job
# ======================================================================================


def bring_job_to(queue, state):
    """Bring a job into a state. Return its run, or a made-up one if it has not run."""
    add_job(queue, max_retries=1 if state == "dead" else 3)
    if state == "pending":
        return queue.latest_run(queue.job("job"))
    run = claim(queue)
    if state == "completed":
        queue.complete(run, make_outcome(None))
    elif state in ("failed", "dead"):
        queue.fail(run, make_outcome())
    return run


class TestLifeOfAJob:
    """Each arrow of the picture, and the arrows that do not exist."""

    def test_a_claim_takes_the_highest_priority_then_the_oldest(self, queue):
        for name, priority in (("a", 0), ("b", 5), ("c", 5), ("d", -1)):
            add_job(queue, id=name, priority=priority)
        assert [claim(queue).id for _ in range(4)] == ["b", "c", "a", "d"]
        assert claim(queue) is None

    def test_a_failed_job_waits_longer_each_time_and_then_is_dead(self, queue, clock):
        add_job(queue)
        for wait in (2, 4):
            assert queue.fail(claim(queue), make_outcome()) == "failed"
            assert queue.job("job")["run_at"] == clock.now + wait
            clock.now += wait - 0.01
            assert claim(queue) is None
            clock.now += 0.01
        assert queue.fail(claim(queue), make_outcome("exit 3")) == "dead"
        job = queue.job("job")
        assert (job["attempts"], job["error"]) == (3, "exit 3")
        assert [run["error"] for run in queue.runs(job)] == [
            "exit 1", "exit 1", "exit 3"]

    @pytest.mark.parametrize("max_retries", [0, 1])
    def test_max_retries_0_and_1_mean_one_run(self, queue, max_retries):
        add_job(queue, max_retries=max_retries)
        assert queue.fail(claim(queue), make_outcome()) == "dead"

    @pytest.mark.parametrize("put_back", [
        lambda queue: queue.fail(claim(queue), make_outcome()),
        lambda queue: (queue.complete(claim(queue), make_outcome(None)),
                       queue.retry(["again"])),
        lambda queue: (queue.complete(claim(queue), make_outcome(None)), run_ok(
            "enqueue", "--unique", "--id", "again", "--", "true")),
    ], ids=["failed", "retried", "unique"])
    def test_what_comes_again_goes_behind_its_equals(self, queue, clock, put_back):
        add_job(queue, id="again")
        clock.now += 1
        add_job(queue, id="other")
        clock.now += 1
        put_back(queue)
        clock.now += 100
        assert claim(queue).id == "other"

    @pytest.mark.parametrize("change", ["new", "edit", "unique", "freed", "retry",
                                        "release", "fail"])
    def test_a_clock_set_back_makes_no_job_wait(self, queue, clock, change):
        add_job(queue, id="first")
        add_job(queue, id="job", after=["first"] if change == "freed" else [])
        run = claim(queue)
        if change == "freed":
            clock.now -= 3600
            queue.complete(run, make_outcome(None))
            assert claim(queue).id == "job"
            return
        queue.complete(run, make_outcome(None))
        if change == "edit":
            clock.now -= 3600
            queue.edit("job", {"priority": 5, "lock": "l"})
        elif change in ("release", "fail"):
            run = claim(queue)
            if change == "fail":
                queue.fail(run, make_outcome())
            clock.now -= 3600
            if change == "release":
                queue.release(run, make_outcome("worker died"))
            queue.promote_after_clock_step(None)
        elif change != "new":
            queue.complete(claim(queue), make_outcome(None))
            clock.now -= 3600
            if change == "retry":
                queue.retry(["job"])
            else:
                job = queuectl.checked_job(
                    {"id": "job", "command": "true"}, queue.defaults())
                queue.enqueue([job], unique=True)
        else:
            clock.now -= 3600
        assert claim(queue).id == "job"

    def test_release_gives_the_attempt_back(self, queue):
        add_job(queue)
        assert queue.release(claim(queue), make_outcome("stopped")) == "pending"
        assert queue.job("job")["attempts"] == 0
        assert claim(queue).attempt == 1

    def test_five_counted_deaths_of_workers_make_a_job_dead(self, queue):
        add_job(queue, max_retries=100)
        for _ in range(4):
            assert queue.release(claim(queue), make_outcome("worker died"), True) == (
                "pending")
        assert queue.release(claim(queue), make_outcome("worker died")) == "pending"
        assert queue.release(claim(queue), make_outcome("worker died"), True) == "dead"
        assert queue.job("job")["error"] == "worker died 5 times"

    def test_retry_resets_the_attempts_and_keeps_counting_runs(self, queue):
        add_job(queue, max_retries=1)
        queue.fail(claim(queue), make_outcome())
        queue.retry(["job"])
        job = queue.job("job")
        assert (job["state"], job["attempts"], job["error"]) == ("pending", 0, None)
        assert claim(queue).number == 2

    def test_cancel_makes_a_waiting_job_dead_at_once(self, queue):
        add_job(queue, id="pending")
        assert queue.cancel(["pending"]) == 1
        add_job(queue, id="failed")
        queue.fail(claim(queue), make_outcome())
        assert queue.cancel(["failed"]) == 1
        errors = [job["error"] for job in queue.jobs(queuectl.where(["dead"]))]
        assert errors == ["cancelled", "cancelled"]
        queue.retry(["failed"])
        queue.complete(claim(queue), make_outcome(None))

    @pytest.mark.parametrize("verb", ["fail", "release"])
    def test_a_cancelled_run_that_did_not_complete_ends_dead(self, queue, verb):
        add_job(queue)
        run = claim(queue)
        assert queue.cancel(["job"]) == queue.cancel(["job"]) == 1
        assert getattr(queue, verb)(run, make_outcome()) == "dead"
        assert queue.job("job")["error"] == "cancelled"

    def test_a_cancelled_run_that_completes_is_completed(self, queue):
        add_job(queue)
        run = claim(queue)
        queue.cancel(["job"])
        assert queue.complete(run, make_outcome(None)) == "completed"

    @pytest.mark.parametrize("verb, states", [
        ("complete", "pending completed failed dead"),
        ("fail", "pending completed failed dead"),
        ("release", "pending completed failed dead"),
        ("retry", "pending processing failed"), ("delete", "processing"),
        ("cancel", "completed dead")
    ])
    def test_forbidden_arrows_change_nothing(self, clock, verb, states):
        for number, state in enumerate(states.split()):
            with queuectl.Queue("%d.db" % number, clock=clock) as queue:
                run = bring_job_to(queue, state)
                before = tuple(queue.job("job"))
                if verb in ("retry", "delete", "cancel"):
                    with pytest.raises(queuectl.QueueError):
                        getattr(queue, verb)(["job"])
                else:
                    assert getattr(queue, verb)(run, make_outcome()) is None
                assert tuple(queue.job("job")) == before

    @mechanism
    def test_counts_follow_every_transition(self, queue):
        for name in "abcd":
            add_job(queue, id=name, max_retries=1)
        queue.complete(claim(queue), make_outcome(None))
        queue.fail(claim(queue), make_outcome())
        claim(queue)
        queue.delete(["d"])
        rows = queue.db.execute(
            "SELECT state, count(*) FROM jobs GROUP BY state"
        ).fetchall()
        assert {s: n for s, n in queue.counts().items() if n} == dict(map(tuple, rows))

    def test_delete_and_retry_are_all_or_nothing(self):
        enqueue("exit 1", id="dead", max_retries=1)
        drain()
        enqueue(id="fresh")
        assert "fresh is pending, not dead" in run_refused(
            "dlq", "retry", "dead", "fresh")
        run_refused("delete", "fresh", "nope")
        assert {name: job["state"] for name, job in jobs().items()} == {
            "dead": "dead", "fresh": "pending"}
        run_ok("delete", "fresh", "dead", "fresh")
        assert jobs() == {}

    @pytest.mark.parametrize("command, code, error", [
        ("exit 3", 3, "exit 3"), ("true", 0, None),
        pytest.param("kill -9 $$", None, "signal 9", marks=posix_only),
        pytest.param("no-such-command", 127, "exit 127", marks=posix_only)
    ])
    def test_the_exit_code_of_a_command_decides(self, command, code, error):
        enqueue(command, id="x", max_retries=1)
        assert drain(1) == (1 if error else 0)
        job = jobs()["x"]
        assert (job["exit_code"], job["error"]) == (code, error)

    def test_a_command_has_its_folder_and_environment_but_no_input(self, home):
        os.mkdir("sub")
        enqueue(
            python_command(
                "import os, sys; get = os.environ.get;"
                " print(os.getcwd(), get('a'), get('A'),"
                " get('QUEUECTL_JOB_ID'), get('QUEUECTL_ATTEMPT'), flush=True);"
                " print(sys.stdin.read() + 'end', file=sys.stderr)"),
            id="x",
            cwd="sub",
            env={"A": "b c"})
        drain(1)
        # Names of variables ignore case on Windows.
        unknown = None if os.name == "posix" else "b c"
        assert run_ok("logs", "x").out == "%s %s b c x 1\nend\n" % (
            home / "sub", unknown)

    def test_a_job_that_enqueues_uses_its_own_queue(self, home):
        os.mkdir("sub")
        printed = python_command("import os; print(os.environ['QUEUECTL_DB'])")
        run_ok("--db", "sub/q.db", "enqueue", "--id", "x", "--cwd", "/", "--", printed)
        run_ok(
            "--db", "sub/q.db", "enqueue", "--id", "own", "--env",
            "QUEUECTL_DB=other", "--", printed)
        line = queuectl.shell_line(
            [sys.executable, COMPILED, "enqueue", "--id", "next", "--", "true"])
        run_ok("--db", "sub/q.db", "enqueue", "--id", "z", "--cwd", "/", "--", line)
        assert start_pool("--db", "sub/q.db", "--drain").wait(20) == 0
        assert run_ok("--db", "sub/q.db", "logs", "x").out.rstrip() == str(
            home / "sub" / "q.db")
        assert run_ok("--db", "sub/q.db", "logs", "own").out.rstrip() == "other"
        assert jobs("--db", "sub/q.db")["next"]["state"] == "completed"


# ======================================================================================
# Commands
# ======================================================================================


class TestEnqueue:
    """`enqueue` adds jobs, all or none of them."""

    @posix_only
    def test_a_directory_is_the_one_that_the_shell_means(self, monkeypatch):
        os.makedirs("real/deep")
        os.mkdir("real/beside")
        os.symlink("real/deep", "link")
        monkeypatch.setenv("PWD", os.path.abspath("link"))
        monkeypatch.setenv("QUEUECTL_DB", os.path.abspath("queuectl.db"))
        os.chdir("link")
        # The shell's ../beside is not that of the system.
        assert "a directory that exists" in run_refused(
            "enqueue", "--cwd", "../beside", "--", "true", code=2)
        os.mkdir(os.path.join(os.environ["PWD"], "..", "..", "beside"))
        run_ok("enqueue", "--id", "x", "--cwd", "../beside", "--", "pwd")
        os.chdir("../..")
        assert details_of("x")["cwd"] == os.path.abspath("beside")

    def test_jobs_come_from_arguments_arrays_lines_and_files(self):
        run_ok(
            "enqueue", '{"id":"a","command":"true"}', '[{"id":"b","command":"true"}]')
        run_ok(
            "enqueue", "-",
            stdin=b'{"id":"c","command":"true"}\n\n{"id":"d","command":"true"}')
        run_ok("enqueue", "-", stdin=b'\xef\xbb\xbf[{"id":"e",\n"command":"true"}]')
        with open("jobs.jsonl", "w") as file:
            file.write('{"id":"f","command":"true"}\r\n')
        run_ok("enqueue", "--file", "jobs.jsonl")
        run_ok("enqueue", "--lines", stdin=b"\xef\xbb\xbfecho g\r\n")
        run_ok("enqueue", "-", stdin=b"\xef\xbb\xbf\r\n")
        assert list(jobs())[:6] == list("abcdef")
        assert [job["command"] for job in jobs().values()][6:] == ["echo g"]

    def test_files_of_windows_are_read_as_their_marks_say(self):
        line = '{"id":"ü","command":"true"}\r\n'
        run_ok("enqueue", "-", stdin=line.encode("utf-16"))
        run_ok("enqueue", "-", stdin=b"\xfe\xff" + line.replace("ü", "be").encode(
            "utf-16-be"))
        run_ok("enqueue", "--lines", stdin="echo é\r\necho b\r\n".encode("utf-16"))
        run_ok("enqueue", "--lines", stdin=b"echo c\r\n\x1a")
        run_ok("enqueue", "-", stdin=b"\x1a")
        assert list(jobs())[:2] == ["ü", "be"]
        assert [job["command"] for job in jobs().values()][2:] == [
            "echo é", "echo b", "echo c"]
        assert "looks like UTF-16" in run_refused(
            "enqueue", "-", stdin=b"\xff\xfe{", code=2)

    def test_quotes_that_cmd_takes_apart_get_the_right_hint(self):
        for words in (["'{id:", "x,", "command: echo hi}'"], ["'{id:x}'"], ["{id:x}"]):
            assert "the shell took the quotes" in run_refused("enqueue", *words, code=2)
        assert "cmd takes '...' apart" in run_refused(
            "config", "set", "launcher", "'srun", "-Q", "-n1'", code=2)

    def test_all_jobs_or_none_and_the_bad_line_is_named(self):
        lines = b'{"id":"a","command":"true"}\n{"id":"b","comand":"true"}\n'
        assert "line 2: unknown field \"comand\"; did you mean command?" in run_refused(
            "enqueue", "-", stdin=lines, code=2)
        run_refused(
            "enqueue", '{"id":"a","command":"true"}', '{"id":"a","command":"true"}')
        assert jobs() == {}

    @pytest.mark.parametrize("line, words", [
        ('{"command":"true"},', "Extra data"),
        ('{"command":"true"}{"command":"true"}', "Extra data"),
        ('{"command":"true"},0,{"command":"true"}', "Extra data"),
        ('{"command":"true"', "Expecting ',' delimiter"),
        ('"true"', "a job is a JSON object"),
        ("[", "Expecting ',' delimiter")])
    @pytest.mark.parametrize("good", [0, 507])
    def test_each_line_is_a_json_document_of_its_own(self, line, words, good):
        given = '{"command":"true"}\n' * good + line + "\n" + '{"command":"true"}\n' * 3
        message = run_refused("enqueue", "-", stdin=given.encode(), code=2)
        assert "line %d: " % (good + 1) in message and words in message and not jobs()

    def test_what_is_no_text_is_refused_in_a_line(self):
        for data in (b'{"command": "\xff"}', b'[{"command": "\xff"}]'):
            assert "line 1: not JSON" in run_refused("enqueue", "-", stdin=data, code=2)
        digits = b'{"command": "x", "priority": %s}' % (5000 * b"1")
        run_refused("enqueue", "-", stdin=digits, code=2)

    def test_two_jobs_with_one_id_are_named_both(self):
        enqueue(id="there")
        lines = b"".join(b'{"id": "j%d", "command": "x"}\n' % n for n in (1, 2, 3, 2))
        twins = "%s and %s have the same id: j2"
        assert twins % ("line 4", "line 6") in run_refused(
            "enqueue", "-", stdin=b"\n" + lines.replace(b"}", b"}\n", 1))
        array = b"[%s]" % b",".join(lines.splitlines())
        for words in (["-"], [array.decode()]):
            assert twins % ("job 2", "job 4") in run_refused(
                "enqueue", *words, stdin=array)
        assert "line 3: there is a job there already" in run_refused(
            "enqueue", "-", stdin=lines[:29] + b'\n{"id": "there", "command": "x"}')
        assert list(jobs()) == ["there"]

    def test_an_array_may_follow_lines_and_blank_lines_count(self):
        lines = (
            '{"command":"true"}\n\n' * 300
            + '[{"command":"true"},\n\n{"command":"true"}]\n\n')
        run_ok("enqueue", "-", stdin=lines.encode())
        assert len(jobs()) == 302
        lines = '{"command":"true"}\n\n' * 300 + '{"command":"true"\n,"id":"b"}'
        assert "line 601: " in run_refused("enqueue", "-", stdin=lines.encode(), code=2)

    @pytest.mark.parametrize("text", [
        '{"command":"a","command":"b"}', '[{"id":"x","command":"a","id":"y"}]',
        '{"command":"a","env":{"A":"1","A":"2"}}'])
    def test_a_key_that_is_given_twice_is_refused(self, text):
        assert "given twice" in run_refused("enqueue", text, code=2)
        assert "line 1: " in run_refused("enqueue", "-", stdin=text.encode(), code=2)
        assert not jobs()

    def test_quotes_that_the_shell_removed_are_explained(self):
        assert r'"{\"id\":' in run_refused(
            "enqueue", "{id:job1,command:echo hi}", code=2)
        lines = b'{\n"command": "true"\n}'
        assert "on one line" in run_refused("enqueue", "-", stdin=lines, code=2)

    def test_generated_ids_are_short_and_unique(self):
        run_ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 1000)
        assert len(jobs()) == 1000 and all(len(name) == 6 for name in jobs())

    @pytest.mark.parametrize("name", [
        "../../etc/passwd", "-x", "CON", "'; drop table jobs; --", "%s", "Zoë", "a b",
        "x" * 255])
    def test_odd_ids_are_kept_as_they_are(self, name):
        enqueue(
            python_command(
                "import os, sys;"
                " sys.stdout.buffer.write(os.environ['QUEUECTL_JOB_ID'].encode())"),
            id=name)
        assert drain(1) == 0
        assert run_ok("logs", "--", name).out == name
        run_ok("delete", "--", name)
        assert jobs() == {}

    def test_every_field_has_an_option(self, home):
        run_ok(
            "enqueue", "--id", "x", "--priority", "-3", "--delay", "1h", "--timeout",
            "90s", "--max-retries", "7", "--cwd", os.path.abspath("/"), "--env",
            "A=1", "--env", "B=x=y", "--", "a", "b")
        job = jobs()["x"]
        assert job["command"] == "a b"
        assert job["cwd"] == os.path.abspath("/")
        assert job["priority"] == -3
        assert job["timeout"] == 90 and job["max_retries"] == 7
        assert job["env"] == {"A": "1", "B": "x=y"}
        assert job["run_at"] > job["created_at"]
        run_ok(
            "enqueue", "--id", "y", "--run-at", "2030-01-01T00:00:00Z", "--command",
            "c  d")
        assert jobs()["y"]["run_at"] == "2030-01-01T00:00:00Z"
        assert jobs()["y"]["command"] == "c  d"

    def test_options_win_over_the_fields_of_json(self):
        enqueue("true", id="a", priority=1, delay=3600)
        listing = run_ok("list", "--json").out.encode()
        run_ok(
            "enqueue", "-", "--db", "b.db", "--priority", "5", "--delay", "0",
            stdin=listing)
        job = run_ok("list", "--json", "--db", "b.db").json[0]
        assert (job["id"], job["priority"]) == ("a", 5)
        assert job["run_at"] == job["created_at"]

    @posix_only
    def test_one_word_is_a_shell_line_and_several_are_quoted(self):
        run_ok("enqueue", "--id", "one", "--", "echo $((1 + 2))")
        run_ok(
            "enqueue", "--id", "more", "--", "echo", "a  b", "$HOME", "--json", "--",
            "it's")
        drain()
        assert run_ok("logs", "one").out == "3\n"
        assert run_ok("logs", "more").out == "a  b $HOME --json -- it's\n"

    @posix_only
    def test_a_command_may_begin_with_a_minus(self):
        configure("max_retries", "1")
        run_ok("enqueue", "--id", "line", "--", "-c true")
        run_ok("enqueue", "--id", "words", "--", "-x", "y")
        run_ok("enqueue", "--id", "launched", "--launcher", "env", "--", "-c true")
        drain()
        assert {job["error"] for job in jobs().values()} == {"exit 127"}
        assert "-c" in run_ok("logs", "line").out
        assert "-x" in run_ok("logs", "words").out

    @posix_only
    def test_at_a_terminal_one_ctrl_d_ends_the_jobs(self):
        enqueue()
        pid, terminal = fork_on_terminal(["enqueue", "--lines"])
        shown = b""
        while b"Ctrl-D\r\n" not in shown:
            shown += os.read(terminal, 999)
        os.write(terminal, b"true\n\x04")
        wait_until(lambda: len(jobs()) == 2)
        read_to_end(terminal)
        assert os.waitpid(pid, 0)[1] == 0

    def test_with_lines_each_line_is_a_command(self):
        lines = b"echo one\r\n\n  \necho {two}\n[3]\n"
        run_ok("enqueue", "--lines", "--priority", "2", stdin=lines)
        assert [(job["command"], job["priority"]) for job in jobs().values()] == [
            ("echo one", 2), ("echo {two}", 2), ("[3]", 2)]
        with open("list", "wb") as file:
            file.write(b"true\n\xff\n")
        assert "line 2: command" in run_refused(
            "enqueue", "--lines", "--file", "list", code=2)
        assert run_ok("enqueue", "--quiet", "--", "true").out == "" and len(jobs()) == 4

    @posix_only
    def test_a_terminal_gets_one_line_for_many_jobs(self):
        with open("list", "w") as file:
            file.write("true\n" * 12)
        words = "enqueue", "--lines", "--file", "list"
        assert run_ok(*words).out.count("enqueued ") == 12
        shown = run_on_terminal(*words)[1]
        ids = list(jobs())[12:]
        assert "enqueued 12 jobs (%s … %s)" % (ids[0], ids[-1]) in shown

    def test_a_list_can_be_piped_into_another_queue(self):
        enqueue("exit 1", id="a", env={"X": "1"}, timeout=5, priority=-3, max_retries=1)
        drain()
        first = run_ok("list", "--json")
        run_ok("enqueue", "-", "--db", "other.db", stdin=first.out.encode())
        before, after = (
            first.json[0], run_ok("list", "--json", "--db", "other.db").json[0])
        for field in (
            "id", "command", "env", "timeout", "priority", "max_retries", "cwd"
        ):
            assert before[field] == after[field]
        assert (after["state"], after["attempts"]) == ("pending", 0)

    @posix_only
    def test_a_symlinked_folder_keeps_its_name(self, monkeypatch):
        os.mkdir("release1")
        os.symlink("release1", "current")
        here = os.path.join(os.environ.get("PWD", os.getcwd()))
        for printed, expected in (
            (os.path.abspath("current"), "current"),
            (os.path.abspath("elsewhere"), "release1"), ("current", "release1")
        ):
            monkeypatch.chdir("release1")
            monkeypatch.setenv("PWD", printed)
            run_ok("enqueue", "--db", "../q.db", "--id", printed, "--", "true")
            monkeypatch.chdir("..")
            cwd = run_ok("show", printed, "--db", "q.db", "--json").json["cwd"]
            assert os.path.basename(cwd) == expected, (printed, here)

    @posix_only
    def test_a_folder_whose_name_is_not_utf8_is_refused(self, home):
        os.mkdir(b"od\xff")
        os.chdir(b"od\xff")
        assert "UTF-8" in run_refused(
            "enqueue", "--db", "../q.db", "--", "true", code=2)
        run_ok("enqueue", "--db", "../q.db", "--cwd", "/", "--", "true")
        run_ok("enqueue", "--db", "../q.db", '{"command": "true", "cwd": "/"}')
        os.chdir(str(home))

    @posix_only
    def test_a_removed_folder_is_no_trouble_of_a_job_elsewhere(self, home):
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir(str(home / "gone"))
        path = str(home / "queuectl.db")
        try:
            run_ok("enqueue", "--db", path, '{"command": "true", "cwd": "/"}')
            assert "this directory: No such file" in run_refused(
                "enqueue", "--db", path, '{"command": "true"}')
        finally:
            os.chdir(str(home))
        assert len(jobs()) == 1

    def test_max_retries_is_fixed_at_enqueue(self):
        enqueue(id="old")
        configure("max_retries", "7")
        enqueue(id="new")
        assert [job["max_retries"] for job in jobs().values()] == [3, 7]


class TestEnqueueUnique:
    """`enqueue --unique` spares unfinished jobs and restarts finished ones."""

    @mechanism
    def test_a_job_that_is_gone_at_once_was_enqueued(self, monkeypatch):
        enqueue_jobs = queuectl.Queue.enqueue

        def enqueue_and_delete(queue, *args):
            added = enqueue_jobs(queue, *args)
            queue.delete(["a"])  # as a pool does with `keep` 0
            return added

        monkeypatch.setattr(queuectl.Queue, "enqueue", enqueue_and_delete)
        run_ok("enqueue", "--unique", "--id", "a", "--", "true")

    def test_unfinished_jobs_are_spared_and_finished_ones_restart(self, queue):
        for name, verb in (("done", "complete"), ("dead", "fail"), ("runs", None)):
            add_job(queue, id=name, max_retries=1)
            run = claim(queue)
            if verb:
                getattr(queue, verb)(run, make_outcome(None))
        add_job(queue, id="waits", command="old")
        before = jobs()
        for name in (*before, "new", "new"):
            run_ok("enqueue", "--unique", "--id", name, "--", "fresh")
        after = jobs()
        assert after["waits"] == before["waits"] and after["runs"] == before["runs"]
        for name in ("done", "dead", "new"):
            assert after[name]["command"] == "fresh"
            assert after[name]["state"] == "pending"
            assert after[name]["attempts"] == 0 and len(after) == 5
        assert "runs is there already, processing" in run_ok(
            "enqueue", "--unique", "--id", "runs", "--", "x").out
        tally = Counter(job["state"] for job in after.values())
        assert queue.counts() == {state: tally[state] for state in queuectl.STATES}

    def test_a_restarted_job_keeps_its_runs_and_their_output(self):
        for code in (1, 0):
            enqueue("echo night&& exit %d" % code, id="x%d" % code, max_retries=1)
        enqueue(id="last")
        drain(1)
        before = jobs()
        for name in ("x1", "x0"):
            run_ok(
                "enqueue", "--unique", "--id", name, "--priority", "3",
                "--max-retries", "2", "--timeout", "9", "--env", "A=1", "--",
                "echo again")
            job = details_of(name)
            assert job["created_at"] == before[name]["created_at"]
            assert len(job["runs"]) == 1
            assert (
                job["state"], job["attempts"], job["command"], job["priority"],
                job["env"], job["max_retries"], job["timeout"], job["error"]
            ) == ("pending", 0, "echo again", 3, {"A": "1"}, 2, 9, None)
            assert run_ok("logs", name).out == "night\n"
        assert list(jobs()) == ["x1", "x0", "last"]
        assert drain(1) == 0
        assert run_errors("x1") == ["exit 1", None] and attempts_of("x1") == 1
        assert run_ok("logs", "x1").out == "again\n"
        with queuectl.Queue("queuectl.db") as queue:
            assert queue.output(queue.job("x1"), 1).split() == [b"night"]
        assert run_ok("stats", "--json").json["runs"] == 5

    def test_a_restarted_job_may_have_a_delay(self, queue, clock):
        add_job(queue, max_retries=1)
        queue.fail(claim(queue), make_outcome())
        run_ok("enqueue", "--unique", "--id", "job", "--delay", "1h", "--", "true")
        assert queue.counts()["pending"] == 1 and queue.counts()["dead"] == 0
        assert not run_ok(
            "enqueue", "--unique", "--id", "job", "--", "true"
        ).out.startswith("enq")
        assert queue.next_due()["run_at"] > time.time() + 3000 and claim(queue) is None

    def test_a_job_with_another_command_is_reported_unchanged(self, queue):
        unique = ["enqueue", "--unique", "--id", "x", "--"]
        assert run_ok(*unique, "old").out == "enqueued x\n"
        assert run_ok(*unique, "old").out == "x is there already, pending\n"
        assert run_ok(*unique, "new").out == "x is there already, pending, unchanged\n"
        run = claim(queue)
        assert run_ok(*unique, "new").out == (
            "x is there already, processing, unchanged\n")
        assert run_ok(*unique, "old").out == "x is there already, processing\n"
        queue.fail(run, make_outcome())
        assert run_ok(*unique, "new").out == "x is there already, failed, unchanged\n"
        assert queue.job("x")["command"] == "old"
        assert run_ok(*unique, "new", "--json").code == 0

    def test_one_id_twice_is_one_job_or_refused(self):
        line = '{"id": "a", "command": "%s"}'
        assert run_ok("enqueue", "--unique", *3 * [line % "true"]).out == "enqueued a\n"
        lines = ("%s\n\n%s" % (line % "new", line % "false")).encode()
        run_ok("delete", "a")
        assert "job 1 and job 2 have the same id: a" in run_refused(
            "enqueue", "--unique", line % "x", '{"id": "a", "command": "x", "priority": 1}')
        assert "line 1 and line 3 have the same id: a" in run_refused(
            "enqueue", "--unique", "-", stdin=lines)
        assert jobs() == {}
        assert "line 2: id: missing" in run_refused(
            "enqueue", "--unique", "-", code=2,
            stdin=(line % "x" + '\n{"command": "y"}').encode())

    def test_a_restarted_job_has_the_dependencies_of_the_new_one(self, queue):
        for name in ("a", "b"):
            add_job(queue, id=name)
        add_job(queue, id="x", after=["a"])
        queue.cancel(["x"])
        run_ok("enqueue", "--unique", "--id", "x", "--after", "b", "--", "true")
        assert details_of("x")["after"] == ["b"]


class TestList:
    """`list` prints a line for each job, the oldest first."""

    def test_a_line_has_id_state_tries_and_command(self):
        enqueue(id="a", max_retries=5)
        enqueue("echo 'x'\ttrue", id="b c")
        lines = run_ok("list").out.splitlines()
        assert [re.split("  +", line)[:3] for line in lines] == [
            ["ID", "STATE", "TRIES"], ["a", "pending", "0/5"],
            ["b c", "pending", "0/3"]]
        assert lines[2].endswith(r"echo 'x'\ttrue")

    def test_jobs_are_filtered_by_state_and_limited(self):
        for name in "abc":
            enqueue(id=name)
        assert list(jobs("--limit", "2")) == ["a", "b"]
        assert list(jobs("--limit", "0", "--state", "PENDING")) == ["a", "b", "c"]
        assert jobs("--state", "dead") == {}
        assert "did you mean pending" in run_refused(
            "list", "--state", "pendin", code=2)
        run_refused("list", "--limit", "-1", code=2)

    def test_state_and_match_choose_jobs_in_every_command(self):
        for name in ("a1", "a2", "b1"):
            enqueue(id=name)
        drain()
        enqueue("exit 1", id="a3", max_retries=1)
        drain()
        for name in ("a4", "b2"):
            enqueue("echo a" if name == "b2" else "true", id=name)
        assert list(jobs("--match", "a")) == ["a1", "a2", "a3", "a4", "b2"]
        assert list(
            jobs("--match", "a", "--state", "dead", "--state", "completed", "--newest")
        ) == ["a3", "a2", "a1"]
        for words in (["cancel"], ["retry"], ["delete"], ["dlq", "retry"]):
            listed = run_ok(*words, "--match", "a", "--dry-run", "--json").json
            assert [job["id"] for job in listed] == {
                "cancel": ["a4", "b2"], "retry": ["a1", "a2", "a3"], "dlq": ["a3"],
                "delete": ["a1", "a2", "a3", "a4", "b2"]}[words[0]]
        assert len(jobs()) == 6 and state_of("a4") == "pending"
        assert run_ok("cancel", "--match", "a").out == "cancelled 2 jobs\n"
        assert run_ok("retry", "--state", "completed", "--match", "a").out == (
            "retried 2 jobs\n")
        assert run_ok("retry", "--state", "dead").out == (
            "retried 1 job; 2 left: cancelled ones are retried by id (a4, b2); to retry"
            " one: queuectl.py retry a4\n")
        assert run_ok("delete", "--match", "b", "--state", "completed").out == (
            "deleted 1 job\n")
        assert run_ok("cancel", "--match", "nothing").out == "cancelled 0 jobs\n"
        for words in (
            ["retry", "--state", "pending"],
            ["cancel", "--state", "dead", "--dry-run"]
        ):
            assert "it has to be one of " in run_refused(*words, code=2)
        for words in (
            ["cancel"], ["retry"], ["delete"], ["dlq", "retry"],
            ["retry", "x", "--match", "a"], ["cancel", "a1", "--state", "pending"]
        ):
            assert " ids, or " in run_refused(*words, code=2)
        assert run_refused("dlq", "retry", code=2) == (
            "queuectl: which jobs? name ids, or --all, --match, --error, --since\n")

    def test_more_jobs_than_a_page_holds_are_all_listed(self):
        count = 2 * queuectl.BATCH_SIZE + 7
        run_ok("enqueue", "-", stdin=b'{"command":"true"}\n' * count)
        assert len(jobs()) == count
        assert len(run_ok("list").out.splitlines()) == count + 1

    def test_a_line_says_when_a_job_is_due_and_how_many_are_left_out(self):
        enqueue(id="later", delay="2h")
        enqueue(id="now")
        lines = run_ok("list").out.splitlines()
        assert "due in 2h" in lines[1] and "due" not in lines[2]
        answer = run_ok("list", "--limit", "1")
        assert answer.out.count("\n") == 2
        assert answer.err == "queuectl: 1 newer job; --limit 0 lists all\n"
        answer = run_ok("list", "--limit", "1", "--newest")
        assert answer.err == "queuectl: 1 older job; --limit 0 lists all\n"
        assert (
            run_ok("list", "--limit", "2").err
            == ""
            == run_ok("list", "--limit", "1", "--json").err)
        assert run_ok("list", "--limit", "1", "--match", "later").err == ""

    def test_it_says_why_a_job_failed_or_waits(self):
        run_ok("enqueue", json.dumps([
            {"id": "dead", "command": "exit 3", "max_retries": 1},
            {"id": "failed", "command": "exit 4"},
            {"id": "behind", "command": "true", "after": ["dead", "failed"]},
            {"id": "locks", "command": "true", "lock": "db", "delay": 3620},
            {"id": "first", "command": "true", "lock": "l", "after": ["dead"]},
            {"id": "gone", "command": "true"},
            {"id": "last", "command": "true", "after": ["locks", "gone"]},
            {"id": "far", "command": "true", "after": ["behind"]},
            {"id": "late", "command": "true", "after": ["locks", "failed"]}]))
        run_ok("cancel", "gone")
        configure("backoff_base", "1000")
        pool = start_pool(count=1)
        wait_until(lambda: (state_of("dead"), state_of("failed")) == ("dead", "failed"))
        run_ok("worker", "stop")
        assert pool.wait(10) == 0
        lines = dict(line.split(None, 1) for line in run_ok("list").out.splitlines())
        assert "exit 3" in lines["dead"] and "cancelled" in lines["gone"]
        assert re.search(r"exit 4, again in 16m \d+s", lines["failed"])
        assert "after dead (dead)" in lines["behind"]
        assert "after gone (cancelled)" in lines["last"]
        assert "after behind (blocked)" in lines["far"] and "(" not in lines["late"]
        assert "due in 1h" in lines["locks"]

    def test_since_takes_jobs_that_changed_within_a_time(self, queue, clock):
        for name, age in (("old", 3600), ("new", 0)):
            clock.now = time.time() - age
            add_job(queue, id=name, max_retries=1)
            queue.fail(claim(queue), make_outcome())
        for words in (["list"], ["dlq", "list"], ["dlq", "logs"]):
            found = run_ok(*words, "--json", "--since", "30m").json
            assert [each["id"] for each in found] == ["new"], words
            assert len(run_ok(*words, "--json", "--since", "2h").json) == 2
        run_refused("list", "--since", "soon", code=2)

    @posix_only
    @pytest.mark.parametrize("columns, hidden, titles", [
        (40, 21, "ID STATE COMMAND"), (80, 20, "ID STATE TRIES CHANGED COMMAND")])
    def test_a_terminal_shows_the_newest_that_fit(self, columns, hidden, titles):
        for n in range(40):
            enqueue("echo " + "x" * 200, id="job-with-a-long-name-%02d" % n)
        code, shown = run_on_terminal("list", columns=columns)
        plain = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
        assert code == 0 and plain[0].split() == titles.split()
        assert max(map(len, plain)) <= columns
        assert " ".join(" ".join(plain[-2:]).split()).endswith(
            "no pool is running; to start one: queuectl.py worker start")
        plain = plain[: plain.index("%d older jobs; --limit 0 lists all" % hidden) + 1]
        ids = [line.split()[0] for line in plain[1:-1]]
        assert len(ids) == 40 - hidden == len({*ids}) and ids[-1].startswith("job-with")
        assert ids[-1].endswith("39")
        assert run_on_terminal("list", "--limit", "2")[1].count("job-with") == 2

    @posix_only
    def test_a_long_reason_leaves_room_for_the_command(self):
        first, second = "a" * 30, "b" * 30
        enqueue("echo " + "x" * 30, id=first)
        enqueue("echo " + "x" * 30, id=second, after=[first])
        titles, *lines = run_on_terminal("list", columns=80)[1].splitlines()
        assert "CHANGED" not in titles and titles.index("COMMAND") == 64  # 60, and a colour
        assert lines[1].startswith("bbbbbb") and "after aaaaaaaaaaaa" in lines[1]
        run_ok("cancel", first)
        assert "STATE" not in run_on_terminal("dlq", "list", columns=80)[1]
        assert first + "  dead   0/3" in run_ok("dlq", "list").out

    @posix_only
    def test_a_narrow_terminal_shows_both_ends_of_an_id(self):
        first, second = "a-job-with-a-long-name", "another-job-with-a-long-name"
        enqueue(id=first, delay=3700)
        enqueue(id=second, after=[first])
        lines = run_on_terminal("list", columns=40)[1].splitlines()
        assert lines[1:3] == ["a-job-wi…ong-name  pending  due in 1h",
                              "another-…ong-name  pending  after a-job…"]
        enqueue("echo here", id="x")
        lines = run_on_terminal("list", columns=40)[1].splitlines()
        assert "  WHY or COMM…" in lines[0]
        assert lines[3].split() == ["x", "pending", "$", "echo", "here"]
        assert second + "  pending  0/3" in run_ok("list").out
        assert "due in 1h 2m" in run_ok("list").out
        run_ok("cancel", "x")  # with the room there is a command
        titles, line, *_ = run_on_terminal("dlq", "list", columns=40)[1].splitlines()
        assert line == "x   0/3    cancelled  echo here" and titles.endswith("COMMAND\x1b[0m")

    def test_why_is_the_error_of_a_job_that_waits_to_be_tried_again(self, queue):
        add_job(queue, id="x")
        queue.fail(claim(queue), make_outcome("exit 7"))
        queue.clock.now += 60
        queue.promote(queue.clock.now)
        assert re.search("^x +pending .* exit 7 +true$", run_ok("list").out, re.M)

    @posix_only
    def test_an_empty_list_says_so_on_a_terminal(self):
        path = os.path.abspath("queuectl.db")
        made = ["queuectl: created queue " + path]
        looked = "queuectl: the queue is " + path

        def lines(*argv):
            return run_on_terminal(*argv, columns=200)[1].splitlines()

        assert lines("list") == [*made, "no jobs", looked]
        assert lines("dlq", "list") == ["no dead jobs", looked]
        assert run_ok("list").out == "no jobs\n"
        enqueue(id="x"), enqueue(id="y")
        run_ok("cancel", "y")
        others = "queuectl: others in this queue: 1 pending, 1 dead"
        assert lines("list", "--match", "no") == ["no jobs", others]
        assert lines("dlq", "list", "--match", "no") == ["no dead jobs", others]
        answer = run_ok("list", "--state", "failed")
        assert (answer.out, answer.err) == ("no jobs\n", others + "\n")


class TestShow:
    """`show` explains a job and why it is not running."""

    @mechanism
    def test_it_says_why_a_job_is_not_running(self, queue, clock):
        own_file = queuectl.pool_file("queuectl.db", os.getpid())

        def why(id, has_pool=True):
            fd = queuectl.lock_file(own_file) if has_pool else None
            try:
                return queuectl.why_waiting(queue.job(id), queuectl.look_at(queue))
            finally:
                if fd:
                    queuectl.drop_lock_file(queue.path, fd, own_file)

        add_job(queue, id="a")
        add_job(queue, id="b")
        add_job(queue, id="c", delay=12)
        no_pool = "no pool is running; to start one: queuectl.py worker start"
        assert why("a") == "next in line" and why("b") == "1 job before it"
        assert why("b", has_pool=False).startswith("no pool is running")
        assert why("c") == "due in 12s"
        run = claim(queue)
        worker = queuectl.lock_file(queuectl.worker_file(queue.path, 1, run.worker))
        lease = queuectl.Lease(run.lease_path, run.output_limit)
        assert why("a") is None
        os.close(worker)
        assert why("a") == "its worker died, but its processes still run; the next" \
            " pool ends them and runs the job again"
        assert why("a", has_pool=False) == queuectl.ORPHAN_HINT % "runs the job again" + (
            "; " + no_pool)
        os.close(lease.fd)
        assert why("a", has_pool=False) == queuectl.LOST_HINT % "runs the job again" + (
            "; " + no_pool)
        queue.fail(run, make_outcome("exit 1"))
        assert why("a") == "try 2 is due in 2.0s"
        assert why("a", has_pool=False).endswith("worker start")
        assert "waiting:     due" in run_ok("show", "c").out

    @mechanism
    def test_a_dependency_that_has_just_ended_is_no_reason(self, queue):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        job = queue.job("b")
        claim_and_complete(queue)
        reason = queuectl.why_waiting(job, queuectl.look_at(queue))
        assert reason.startswith("due now")

    @fork_only
    def test_it_says_which_job_has_the_lock(self):
        enqueue(id="first", lock="db")
        enqueue(id="second", lock="db")
        assert "  lock db  " in run_ok("list").out
        start_pool(count=1, script="queuectl.Queue.claim = lambda *_: None")
        assert "waits for the lock db: job first gets it first" in (
            run_ok("show", "second").out)
        assert "next in line" in run_ok("show", "first").out

    @posix_only
    def test_it_begins_with_why_what_was_printed_and_what_to_do(self):
        enqueue("echo one&& echo two&& exit 3", id="a", max_retries=1)
        enqueue(id="b", after=["a"])
        enqueue(id="c")
        drain()
        answer = [re.sub(r"[\d.]+s ago|just now", "…", line)
                  for line in run_ok("show", "a").out.split("\n\n")[0].splitlines()]
        assert answer == [
            "a is dead: exit 3; try 1 of 1; …", "  $ echo one&& echo two&& exit 3",
            "  | one", "  | two", "1 job waits for it: b",
            "to run it again: queuectl.py retry a"]
        assert run_ok("show", "b").out.startswith(
            "b is pending: waits for a, which is dead\n  $ true\n"
            "to go on: queuectl.py retry a\n\n")
        enqueue(id="behind", after=["b"])
        assert "\nto go on: queuectl.py retry a\n\n" in run_ok("show", "behind").out
        assert re.match(r"c is completed: took [\d.<]+m?s; ", run_ok("show", "c").out)

    @posix_only
    def test_on_a_terminal_its_answer_stays_in_sight(self):
        enqueue("exit 3", id="a", max_retries=1)
        drain()
        code, shown = run_on_terminal("show", "a")
        assert code == 0 and shown.count("\n") < 23
        assert "exit 3" in shown and "command:" not in shown and "cwd:" in shown

    @posix_only
    def test_a_terminal_shows_the_whole_command(self):
        enqueue("echo %s end" % ("long " * 20), id="a", timeout=600, env={"B": "two c"})
        lines = run_on_terminal("show", "a", columns=40)[1].splitlines()
        at = lines.index("  $ echo long long long long long long")
        assert lines[at + 3] == "    end"
        assert "timeout:     10m" in lines
        assert any(re.fullmatch(r"created_at:  (\S+ ago|just now)", line) for line in lines)
        assert "env:         B='two c'" in lines
        assert details_of("a")["timeout"] == 600

    @posix_only  # elsewhere a command has one line
    def test_it_prints_every_line_of_a_command_and_a_table_of_runs(self):
        enqueue("echo one\nexit 3", id="x", max_retries=2)
        configure("backoff_base", "0")
        drain(1)
        lines = run_ok("show", "x").out.splitlines()
        at = lines.index("command:     echo one")
        assert lines[at + 1] == "             exit 3"
        assert lines[1:3] == ["  $ echo one", "    exit 3"]
        assert re.match(r"RUN  TRY  STARTED +TOOK +RESULT$", lines[-3])
        assert re.match(r"2    2    (.* ago|just now) +<?\d+ms +exit ", lines[-1])

    def test_durations_of_runs_are_exact_in_json(self):
        enqueue("sleep 0.05" if os.name == "posix" else "true", id="x")
        enqueue(id="y", delay=60)
        drain()
        job = details_of("x")
        assert 0 < job["seconds"] < 5 and job["runs"][0]["seconds"] == job["seconds"]
        assert jobs()["y"]["seconds"] is None
        assert jobs()["x"]["seconds"] == job["seconds"]

    def test_the_latest_possible_time_can_be_shown(self):
        assert queuectl.iso(queuectl.MAX_TIME) == "9999-12-31T23:59:59Z"
        enqueue(id="x", run_at=queuectl.iso(queuectl.MAX_TIME))
        assert jobs()["x"]["run_at"] == "9999-12-31T23:59:59Z"
        assert run_ok("show", "x").out

    def test_the_beginning_of_an_id_is_no_id_but_helps_to_find_it(self):
        for name in ("report", "rep"):
            enqueue(id=name)
        assert details_of("rep")["id"] == "rep"
        for words in (["show"], ["logs"], ["delete"], ["cancel"], ["retry"], ["wait"],
                      ["edit", "--priority", "1"]):
            assert "no job repo; did you mean report?" in run_refused(*words, "repo")


class TestLogs:
    """`logs` prints the output of a run, and follows it."""

    @windows_only
    @pytest.mark.parametrize("page", ["oem", "mbcs", "utf-8"])
    def test_output_in_a_code_page_is_text_in_json(self, page):
        program = "import sys; sys.stdout.buffer.write('Grüße\\n'.encode('%s'))" % page
        enqueue(python_command(program), id="x")
        drain(1)
        assert run_ok("logs", "x", "--json").json["output"] == "Grüße\n"

    def test_an_output_that_takes_text_alone_gets_text(self, monkeypatch):
        enqueue("echo hi", id="x")
        drain(1)
        for words in (["logs", "x"], ["logs", "-f", "x"]):
            out = io.StringIO()  # as in IDLE: without bytes and `reconfigure`
            with contextlib.redirect_stdout(out):
                assert queuectl.main(words) == 0
            assert out.getvalue().strip() == "hi"

    def test_the_output_of_a_running_job_is_shown(self):
        enqueue("echo hello&& " + LONG_COMMAND, id="x")
        start_pool()
        wait_until(lambda: run_ok("logs", "x").out.split() == ["hello"])

    @mechanism
    @posix_only
    def test_the_end_of_the_output_is_there_at_every_moment(self):
        configure("output_limit", "100000")
        enqueue(python_command(NUMBERED_OUTPUT + "ten(0, 10**8)"), id="x")
        start_pool(count=1)
        seen = []
        wait_until(lambda: run_ok("logs", "x").out)
        with queuectl.Queue("queuectl.db") as queue:
            job = queue.job("x")
            while len(seen) < 300 and queue.is_current(queue.latest_run(job)):
                dropped, output = queuectl.split_dropped(
                    queuectl.output_of(queue, job, job["run"]))
                assert len(output) == 100000 or not dropped and len(output) < 100000
                # A whole line names its position in the output.
                second = output.index(b"\n") + 1
                assert dropped == int(output[second : second + 10]) * 10 - second
                assert output == numbered_output(dropped, dropped + len(output))
                seen.append(dropped)
        assert seen == sorted(seen) and len(set(seen)) > 10
        run_ok("worker", "stop", "--now")

    def test_the_logs_of_a_named_run(self):
        configure("backoff_base", "0")
        enqueue(
            "echo $QUEUECTL_RUN" if os.name == "posix" else "echo %QUEUECTL_RUN%",
            id="x")
        for _ in range(2):
            drain(1)
            run_ok("retry", "x")
        drain(1)
        for run in (1, 2, 3):
            assert (
                run_ok("logs", "x", "--run", str(run)).out.strip().endswith("-%d" % run)
            )
        assert "job x has no run 4" in run_refused("logs", "x", "--run", "4")
        run_refused("logs", "x", "--run", "0", code=2)
        assert "logs: give --run or --attempt, not both" in run_refused(
            "logs", "x", "--run", "1", "--attempt", "1", code=2)

    def test_the_logs_of_an_earlier_attempt(self):
        configure("backoff_base", "0")
        line = python_command(
            "import os, sys; print(os.environ['QUEUECTL_ATTEMPT']); sys.exit(1)")
        enqueue(line, id="x", max_retries=2)
        drain()
        assert run_ok("logs", "x").out == "2\n"
        assert run_ok("logs", "x", "--attempt", "1").out == "1\n"
        assert "no attempt 3" in run_refused("logs", "x", "--attempt", "3")

    def test_logs_of_several_jobs_have_a_heading_each(self):
        enqueue("echo one", id="a")
        enqueue("echo two&& exit 3", id="b", max_retries=1)
        enqueue("exit 4", id="c", max_retries=1)
        drain(1)
        assert run_ok("logs", "a", "b").out.split("\n") == [
            "==> a: completed: $ echo one", "one",
            "==> b: exit 3: $ echo two&& exit 3", "two", ""]
        assert run_ok("dlq", "logs").out.split("\n") == [
            "==> c: exit 4: $ exit 4", "(no output)", "==> b: exit 3: $ echo two&& exit 3",
            "two", ""]
        assert [log["id"] for log in run_ok("dlq", "logs", "--json").json] == ["c", "b"]
        assert [log["id"] for log in run_ok("logs", "a", "c", "--json").json] == [
            "a", "c"]
        for words in ["--run", "1"], ["--follow"]:
            assert "logs: %s takes one job\n" % words[0] in run_refused(
                "logs", "a", "b", *words, code=2)

    def test_empty_logs_say_why(self):
        os.mkdir("gone")
        enqueue(id="x", cwd="gone", max_retries=1)
        enqueue(id="waits", delay=60)
        os.rmdir("gone")
        drain()
        answer = run_ok("logs", "x")
        assert answer.out == "" and "job x: no output; cannot start: " in answer.err
        assert run_ok("logs", "waits").err == "queuectl: job waits: has not run yet\n"

    def test_a_run_that_has_printed_nothing_is_reported(self, queue, clock):
        for id, error in (("good", None), ("bad", "exit 3"), ("runs", None)):
            add_job(queue, id=id, max_retries=1)
            run = claim(queue)
            if id != "runs":
                queue.record(run, make_outcome(error))
        clock.now += 16
        why = {id: queuectl.why_silent(queuectl.latest_output(queue, queue.job(id))[0],
                                       clock.now) for id in ("good", "bad", "runs")}
        assert why == {"good": "no output; exit 0", "bad": "no output; exit 3",
                       "runs": "no output yet; it has run for 16s"}
        assert run_ok("logs", "bad").err == "queuectl: job bad: no output; exit 3\n"

    @posix_only
    def test_follow_ends_when_its_reader_is_gone(self):
        enqueue("echo READY; " + LONG_COMMAND, id="x")
        pool = start_pool(count=1)
        wait_until(live_commands)
        follower = subprocess.Popen(
            [sys.executable, COMPILED, "logs", "-f", "x"], stdout=subprocess.PIPE)
        assert follower.stdout.readline() == b"READY\n"
        follower.stdout.close()
        follower.wait(20)
        assert pool.poll() is None and state_of("x") == "processing"

    def test_bytes_that_are_not_utf8_are_escaped_in_json(self):
        enqueue(
            python_command("import sys; sys.stdout.buffer.write(b'\\xff')"), id="x",
            run_at="1970-01-01T00:00:00Z")
        assert jobs()["x"]["run_at"] == "1970-01-01T00:00:00Z"
        drain(1)
        assert run_ok("logs", "x", "--json").json == {
            "id": "x", "run": 1, "output": BYTE_FF}

    def test_follow_shows_a_run_from_beginning_to_end(self):
        pool = start_pool(count=1)
        line = python_command(
            "import time; print(*range(2000), sep='.', flush=True); time.sleep(0.2);"
            " print('end')")
        run_ok("enqueue", "--id", "x", "--delay", "0.1", "--", line)
        printed = run_ok("logs", "-f", "x").out
        assert printed == ".".join(map(str, range(2000))) + "\nend\n"
        assert run_ok("logs", "-f", "x").out == printed == run_ok("logs", "x").out
        assert pool.poll() is None

    @posix_only
    def test_a_job_can_colour_a_terminal_but_not_clear_it(self):
        output = "\x1b[31mred\x1b[0m\ttab\rover\n\x1b[2J\x1b]0;title\x07\x07\x9bend\n"
        enqueue("printf '%s'" % output.replace("\x1b", "\\033"), id="x")
        drain(1)
        shown = run_on_terminal("logs", "x")[1]
        assert shown == "\x1b[31mred\x1b[0m\ttab\rover\r\nend\r\n"
        assert "\x1b[2J" in run_ok("logs", "x").out
        assert "\x1b[2J" not in run_on_terminal("logs", "x", "x")[1]

    @posix_only
    def test_on_a_terminal_the_end_begins_a_line(self):
        enqueue("printf half; exit 3", id="x", max_retries=1)
        enqueue("echo whole; exit 3", id="y", max_retries=1)
        drain(1)
        for id, output in ("x", "half"), ("y", "whole"):
            shown = run_on_terminal("logs", "-f", id)[1]
            assert shown == "%s\r\nqueuectl: job %s: exit 3\r\n" % (output, id)
        assert run_ok("logs", "-f", "x").out == "half"

    @posix_only
    def test_follow_of_a_silent_run_reports_that_until_ctrl_c(self):
        enqueue("sleep 9", id="x")
        start_pool(count=1)
        wait_until(lambda: state_of("x") == "processing")
        pid, terminal = fork_on_terminal(["logs", "-f", "x"])
        assert b"job x: try 1 of 3; no output yet\r\n" == os.read(terminal, 99)[10:]
        os.write(terminal, b"\x03")
        assert read_to_end(terminal) == b"^C\r\n"  # the prompt begins a line
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 130

    @posix_only
    def test_follow_reports_the_bytes_that_it_missed(self):
        configure("output_limit", "100000")
        os.mkfifo("go")
        enqueue(
            python_command(
                NUMBERED_OUTPUT
                + "[(ten(n * 90000, n * 90000 + 90000), sys.stdout.flush(),"
                " open('go').read()) for n in range(10)]; ten(900000, 2000000)"),
            id="x")
        start_pool(count=1)
        with subprocess.Popen([sys.executable, COMPILED, "logs", "-f", "x"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follow:
            patience = threading.Timer(20, follow.kill)
            patience.start()
            for n in range(10):
                assert follow.stdout.read(90000) == numbered_output(
                    n * 90000, n * 90000 + 90000)
                with open("go", "w"):
                    pass
            rest, printed = follow.communicate(timeout=20)
            patience.cancel()
        notes = re.findall(rb"(\d+) bytes of output were dropped", printed)
        missed = sum(map(int, notes))
        assert missed
        assert len(rest) + missed == 1100000
        assert rest.endswith(numbered_output(1900000, 2000000))

    def test_follow_of_a_job_that_will_not_run_ends(self):
        enqueue(id="x", delay=3600)
        run_ok("cancel", "x")
        followed = run_ok("logs", "-f", "x")
        assert followed.out == ""
        assert followed.err == "queuectl: job x: cancelled\n"
        assert "--follow" in run_refused("logs", "-f", "--json", "x", code=2)

    def test_follow_ends_when_the_worker_died_without_a_pool(self, queue):
        add_job(queue)
        with leased_run(queue, 1):
            pass
        assert "died" in run_refused("logs", "-f", "job")
        assert "logs -f" not in run_ok("show", "job").out

    def test_follow_says_what_it_waits_for_and_how_the_run_ended(self):
        enqueue("exit 3", id="x", max_retries=1)
        pool = start_pool(count=1)
        assert run_ok("logs", "-f", "x").err.endswith(
            "queuectl: job x: no output; exit 3\n")
        run_ok("pause")
        enqueue(id="y")
        follower = start_process("logs", "-f", "y")
        assert "job y: paused" in follower.stderr.readline()
        run_ok("resume")
        assert follower.wait(20) == 0
        assert follower.stderr.read() == (
            "queuectl: job y: try 1 of 3\nqueuectl: job y: no output; exit 0\n")
        assert pool.poll() is None

    def test_follow_says_once_why_a_job_cannot_go_on_or_when(self, queue):
        add_job(queue, id="cut")
        queue.cancel(["cut"])
        add_job(queue, id="behind", after=["cut"])
        assert run_refused("logs", "-f", "behind").count("waits for cut") == 1
        add_job(queue, id="x")
        queue.fail(claim(queue), make_outcome("exit 7"))
        assert "x: no output; exit 7, try 1 of 3; again " in run_ok("logs", "-f", "x").err
        add_job(queue, id="y", priority=1)
        queue.release(claim(queue), make_outcome("stopped"))
        assert run_ok("logs", "-f", "y").err.endswith("y: no output; stopped; it will run again\n")


class TestWait:
    """`wait` returns when jobs have ended or can't go on."""

    def test_the_exit_code_says_what_became_of_the_jobs(self):
        enqueue(id="good")
        enqueue("exit 1", id="bad", max_retries=1)
        enqueue(id="later", delay=3600)
        drain()
        assert cli("wait", "good").code == 0 and cli("wait", "good", "bad").code == 1
        answer = cli("wait", "--timeout", "0.05")
        assert answer.code == 124 and answer.out == "" and (
            "gave up after 50ms: 1 to go, 0 running; no pool" in answer.err)
        assert "no job x" in run_refused("wait", "x")
        assert run_ok("wait", "good", "--json").json == {
            "completed": 1, "dead": 0, "removed": 0, "died_before": 0, "left": []}
        run_ok("delete", "later")
        answer = cli("wait")  # whether it died before or after the wait began
        assert answer.code == 1
        assert answer.out == "nothing to wait for; 0 completed, 0 dead, 1 died before\n"
        assert cli("wait", "--json").code == 1
        run_ok("delete", "bad")
        enqueue(id="cut")
        run_ok("cancel", "cut")
        assert cli("wait").code == 0  # a cancelled job does not count

    def test_it_ends_as_soon_as_the_job_does(self):
        pool = start_pool(count=1)
        run_ok("enqueue", "--id", "x", "--", "sleep 0.1")
        run_ok("wait", "x", "--timeout", "10")
        assert state_of("x") == "completed" and pool.poll() is None

    def test_without_ids_it_waits_for_all_unfinished_jobs(self):
        enqueue(id="now")
        drain()
        assert run_ok("wait").out == "nothing to wait for; 0 completed, 0 dead\n"
        enqueue(id="next")
        start_pool(count=1)
        # It may have ended before the wait began.
        assert run_ok("wait", "--json").json["completed"] in (0, 1)

    @pytest.mark.parametrize("keep, state", [(None, "removed"), ("7d", "removed"),
                                             ("0", "completed")])
    def test_a_deleted_job_counts_as_removed(self, queue, keep, state):
        if keep:
            configure("keep", keep)
        add_job(queue, id="build")
        checks = []

        def delete_it(counts):
            if checks:
                queue.delete(["build"])
            checks.append(counts)

        assert queue.wait(["build"], on_check=delete_it)[state] == 1

    def test_it_waits_while_the_queue_is_paused(self, queue):
        add_job(queue)
        queue.set_paused(True)
        assert queue.wait(timeout=0) is None
        assert queue.wait(["job"], timeout=0) is None

    @posix_only
    def test_a_job_cannot_wait_for_itself(self):
        enqueue(id="done")
        drain(1)
        for id, words, after, lock in (
                ("all", [], [], None), ("own", ["own"], [], None),
                ("chain", ["behind-chain"], [], None), ("lock", ["rival"], [], "l")):
            enqueue(queuectl.shell_line(
                [sys.executable, SCRIPT, "wait", "--timeout", "20", *words]),
                id=id, max_retries=1, lock=lock)
        enqueue(id="behind-chain", after=["chain"])
        enqueue(id="rival", lock="l")
        enqueue(queuectl.shell_line([sys.executable, SCRIPT, "wait", "done"]), id="can")
        drain(1)
        assert [id for id, job in jobs().items() if job["state"] == "dead"] == [
            "all", "own", "chain", "lock"]
        for id in ("all", "own", "chain", "lock"):
            assert "would wait for itself" in run_ok("logs", id).out
        assert state_of("can") == state_of("rival") == "completed"

    @posix_only
    def test_a_job_may_wait_for_what_does_not_need_its_end(self):
        waits = queuectl.shell_line(
            [sys.executable, SCRIPT, "wait", "--timeout", "20", "behind", "free"])
        enqueue("test ! -e again || " + waits, id="first")
        enqueue(id="behind", after=["first"])
        drain(1)
        open("again", "w").close()
        enqueue(id="free", after=["behind"])
        run_ok("retry", "first")
        drain(2)
        assert state_of("first") == state_of("free") == "completed"

    @posix_only
    def test_a_job_cannot_start_a_pool_that_it_would_wait_for(self):
        line = queuectl.shell_line(
            [sys.executable, SCRIPT, "worker", "start", "--drain"])
        enqueue(line, id="x", max_retries=1)
        assert drain(1) == 1
        assert run_ok("logs", "x").out == (
            "queuectl: worker start: within job x only with --detach, or the job would"
            " wait for its own pool\n")

    def test_jobs_that_had_ended_count(self, queue):
        add_job(queue, id="done")
        queue.complete(claim(queue), make_outcome(None))
        ended = queue.wait(["done"])
        assert (ended["completed"], ended["dead"], ended["left"]) == (1, 0, [])

    def test_a_job_that_had_ended_may_be_removed_by_keep(self, queue):
        for name in ("done", "last"):
            add_job(queue, id=name)
        queue.complete(claim(queue), make_outcome(None))

        def remove(counts):
            if queue.has_claimable():
                queue.delete(["done"])
                queue.complete(claim(queue), make_outcome(None))

        ended = queue.wait(["done", "last"], 20, remove)
        assert (ended["completed"], ended["left"]) == (2, [])

    def test_it_ends_early_only_when_no_job_left_can_go_on(self, queue):
        add_job(queue, id="dead", max_retries=1)
        queue.fail(claim(queue), make_outcome())
        add_job(queue, id="behind", after=["dead"])
        add_job(queue, id="free")
        for ids in (None, ["behind", "free"], ["free", "behind"]):
            assert queue.wait(ids, 0) is None
        queue.complete(claim(queue), make_outcome(None))
        assert queue.wait(["behind", "free"])["left"] == ["behind"]
        queue.retry(["dead"])
        assert queue.wait(["behind"], 0) is None
        queue.complete(claim(queue), make_outcome(None))
        assert claim(queue).id == "behind"

    @pytest.mark.parametrize("limit, pending, completed", [(2, 1, 1), (1, 2, 0)])
    def test_its_progress_counts_the_jobs_that_it_waits_for(
            self, queue, monkeypatch, limit, pending, completed):
        monkeypatch.setattr(queuectl, "MAX_WATCHED", limit)
        for id in ("done", "runs", "x"):
            add_job(queue, id=id)
        queue.complete(claim(queue), make_outcome(None))
        claim(queue)
        add_job(queue, id="other")
        looks = []
        queue.wait(["done", "runs", "x"], 0, lambda wait: looks.append(wait.counts()))
        assert looks[0] == dict(
            pending=pending, processing=1, completed=completed, failed=0, dead=0)

    @posix_only
    def test_its_progress_is_drawn_again_only_when_it_has_changed(self):
        enqueue(delay=3600)
        code, shown = run_on_terminal("wait", "--timeout", "0.4")
        assert code == 124 and shown.count("\r\x1b[K1 to go, 0 running\r") == 1

    @mechanism
    def test_its_progress_has_the_time_left_unless_jobs_wait_for_theirs(
            self, queue, monkeypatch):
        monkeypatch.setattr(queuectl, "time_left", lambda work, now: "5 s")
        report = queuectl.WaitReport(queue, None, is_named=False)
        for id in "abc":
            add_job(queue, id=id)
        report.wait = queuectl.Wait(queue, "abc", None)
        queue.fail(claim(queue), make_outcome())  # a retry takes little time
        claim(queue)
        assert report.rest() == "3 to go, about 5 s left, 1 running"
        add_job(queue, delay=60)
        assert report.rest() == "3 to go, 1 running"

    @posix_only
    def test_of_a_few_named_jobs_it_names_the_unfinished(self):
        enqueue(id="good")
        enqueue("exit 1", id="bad", max_retries=1)
        drain()
        enqueue(id="later", delay=86400)
        ids = ("later", "bad", "good")
        rest = "waiting for later (due in 1d); 1 completed, 1 dead"
        code, shown = run_on_terminal("wait", *ids, "--timeout", "0", columns=99)
        assert code == 124 and shown.startswith("\r\x1b[K%s\r" % rest)
        assert "gave up: %s; no pool is" % rest in shown
        pid, terminal = fork_on_terminal(["wait", *ids], columns=99)
        assert b"waiting for" in os.read(terminal, 99)
        os.write(terminal, b"\x03")
        assert b"interrupted: " + rest.encode() in read_to_end(terminal)
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 130

    def test_it_remembers_a_job_that_has_ended(self, queue):
        add_job(queue, id="b")
        queue.complete(claim(queue), make_outcome(None))
        add_job(queue, id="a")
        run, looks = claim(queue), []

        def tell(counts):
            if looks:
                queue.delete(["b"])
                queue.complete(run, make_outcome(None))
            looks.append(counts)

        assert queue.wait(["a", "b"], on_check=tell)["completed"] == 2 == len(looks)

    def test_it_says_when_no_pool_is_running(self):
        configure("backoff_base", "100")
        enqueue("exit 1", id="x")
        pool = start_pool(count=1)
        wait_until(lambda: state_of("x") == "failed")
        run_ok("worker", "stop")
        assert pool.wait(10) == 0
        answer = cli("wait", "x", "--timeout", "0")
        assert answer.code == 124 and "no pool is running" in answer.err

    def test_after_a_while_it_reports_why_nothing_happens(self, monkeypatch):
        for name in ("REPORT_DELAY", "PROGRESS_INTERVAL"):
            monkeypatch.setattr(queuectl, name, 0.01)
        enqueue(id="x")
        run_ok("pause")
        lines = cli("wait", "x", "--timeout", "0.1").err.splitlines()
        reason = "paused; to go on: queuectl.py resume"
        assert lines == [  # the reason once, and with the timeout
            "queuectl: " + reason,
            "queuectl: gave up after 0.1s: waiting for x (pending); " + reason]

    def test_it_reports_what_it_waits_for_until_a_job_is_due(self, monkeypatch):
        for name in ("REPORT_DELAY", "PROGRESS_INTERVAL"):
            monkeypatch.setattr(queuectl, name, 0.01)
        enqueue("exit 1", id="bad", max_retries=1)
        drain()
        enqueue(id="later", delay=86400)
        enqueue(id="behind", after=["bad"])
        start_pool(count=1)
        for words in [], ["later"]:
            line, last = cli("wait", *words, "--timeout", "0.2").err.splitlines()
            assert "later (due in 1d)" in line and line.startswith("queuectl: waiting for")
            assert ("behind (after bad (dead))" in line) == (not words)

    @posix_only
    def test_it_reports_the_end_of_a_pause_as_well(self):
        enqueue(UNTIL_GO, id="x")
        run_ok("pause")
        start_pool(count=1)
        wait = start_process("wait", "x", program="queuectl.REPORT_DELAY = 0.01")
        assert wait.stderr.readline().startswith("queuectl: paused")
        run_ok("resume")
        assert wait.stderr.readline() == "queuectl: jobs start again\n"
        open("go", "w").close()
        assert wait.wait(20) == 0

    @posix_only
    def test_while_jobs_run_it_reports_nothing(self, monkeypatch):
        monkeypatch.setattr(queuectl, "REPORT_DELAY", 0)
        enqueue("sleep 0.3", id="x")
        start_pool(count=1)
        answer = cli("wait", "x", "--timeout", "20")
        assert (answer.code, answer.err) == (0, "")


class TestEdit:
    """`edit` changes a job that waits."""

    def test_its_answer_for_a_dead_job_names_the_next_step(self):
        enqueue("exit 1", id="a", max_retries=1)
        assert run_ok("edit", "a", "--priority", "1").out == "edited a\n"
        drain(1)
        assert run_ok("edit", "a", "--command", "true").out == (
            "edited a: still dead; to run it again: queuectl.py retry a\n")

    def test_it_changes_a_waiting_job_by_the_options_of_enqueue(self, queue):
        add_job(queue, id="x", run_at=time.time() + 3600)
        run_ok(
            "edit", "x", "--priority", "5", "--timeout", "1m30s", "--env", "A=1",
            "--", "echo", "b c")
        job = details_of("x")
        assert (job["priority"], job["timeout"], job["env"]) == (5, 90, {"A": "1"})
        assert job["command"].split()[0] == "echo" and claim(queue) is None
        assert run_ok("edit", "x", "--run-at", "now", "--json").json["state"] == (
            "pending")
        run = claim(queue)
        assert run.id == "x"
        assert "to end it first: queuectl.py cancel x\n" in run_refused(
            "edit", "x", "--priority", "1")
        queue.fail(run, make_outcome())
        # A failed job is tried at once.
        run_ok("edit", "x", "--command", "true", "--run-at", "now")
        run = claim(queue)
        assert (run.attempt, run.command) == (2, "true")
        queue.complete(run, make_outcome(None))
        assert "command: queuectl.py enqueue --unique --id x -- COMMAND" in run_refused(
            "edit", "x", "--priority", "1")
        assert "nothing to change" in run_refused("edit", "x", code=2)
        assert "no job y" in run_refused("edit", "y", "--priority", "1")
        assert "priority" in run_refused("edit", "x", "--priority", "high", code=2)
        run_refused("edit", "x", "--id", "y", code=2)
        assert "give it by --command or after --" in run_refused(
            "edit", "x", "--command", "one", "--", "two", code=2)
        run_refused("edit", "x", "--run-at", "now", "--delay", "3", code=2)

    @fork_only
    def test_it_wakes_idle_workers(self):
        start_pool(count=1, script="queuectl.IDLE_INTERVAL = 60")
        for name in ("a", "b", "c"):  # the worker may be awake once, but not each time
            enqueue(id=name, delay=3600)
            run_ok("edit", name, "--run-at", "now")
            wait_until(lambda: state_of(name) == "completed", timeout=10)

    def test_env_adds_or_changes_one_variable_and_none_drops_all(self):
        enqueue(id="x", env={"TOKEN": "secret", "LEVEL": "1"})
        run_ok("edit", "x", "--env", "LEVEL=2", "--env", "NEW=")
        assert details_of("x")["env"] == {"TOKEN": "secret", "LEVEL": "2", "NEW": ""}
        assert "stands alone" in run_refused(
            "edit", "x", "--env", "none", "--env", "A=1", code=2)
        run_ok("edit", "x", "--env", "none")
        assert details_of("x")["env"] == {}

    def test_a_dead_job_is_repaired_and_then_retried(self):
        enqueue("exit 1", id="x", max_retries=1)
        drain()
        died = details_of("x")["updated_at"]
        run_ok("edit", "x", "--command", "true", "--max-retries", "2")
        assert details_of("x")["state"] == "dead"
        assert details_of("x")["updated_at"] == died
        for words in (["--run-at", "now"], ["--delay", "1h"]):
            assert "retry it, then edit its time" in run_refused("edit", "x", *words)
        run_ok("retry", "x")
        assert drain() == 0 and run_errors("x") == ["exit 1", None]


class TestRetry:
    """`retry` runs finished jobs again."""

    CHAIN = {"a": None, "b": ["a"], "c": ["b"]}

    @pytest.mark.parametrize("words", [
        ["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"], ["--state", "completed"],
        ["--match", "true"]])
    @pytest.mark.parametrize("order", ["abc", "cba"])
    def test_a_chain_runs_in_order_again(self, words, order):
        run_ok("enqueue", json.dumps([
            {"id": id, "command": "true", "after": self.CHAIN[id]} for id in order]))
        assert drain() == 0
        run_ok("retry", *words)
        assert [job["waits_for"] for job in jobs().values()] == [
            self.CHAIN[id] or [] for id in order]
        assert drain(count=2) == 0
        began = query("SELECT id FROM runs JOIN jobs USING (seq, run)"
                      " ORDER BY started_at")
        assert began == [("a",), ("b",), ("c",)]

    def test_a_failed_dependent_waits_for_its_dependency_again(self, queue, clock):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        queue.complete(claim(queue), make_outcome(None))
        queue.fail(claim(queue), make_outcome())
        queue.retry(["a"])
        assert state_of("b") == "pending"  # FAILED is what waits for its next try alone
        clock.now += 100
        run = claim(queue)
        assert run.id == "a" and claim(queue) is None
        queue.complete(run, make_outcome(None))
        assert claim(queue).id == "b"

    def test_a_finished_job_runs_again_and_keeps_its_runs(self):
        enqueue("echo $QUEUECTL_ATTEMPT" if os.name == "posix" else "echo 1", id="x")
        enqueue("exit 3", id="y", max_retries=1)
        drain()
        assert run_ok("retry", "x", "y").out == (
            "retried x: pending again, with 0 attempts\n"
            "retried y: pending again, with 0 attempts\n")
        assert "job x is pending, not completed or dead" in run_refused("retry", "x")
        assert drain() == 1
        assert run_errors("x") == [None, None]
        assert run_errors("y") == ["exit 3", "exit 3"]
        assert attempts_of("x") == 1 and run_ok("logs", "x").out.split() == ["1"]

    def test_a_retried_job_goes_behind_its_equals(self, queue, clock):
        add_job(queue, id="retried", max_retries=1)
        queue.fail(claim(queue), make_outcome())
        clock.now += 1
        add_job(queue, id="waits")
        clock.now += 1
        queue.retry(["retried"])
        assert tuple(queuectl.oldest_claimable(queue)) == ("waits", clock.now - 1)
        assert [claim(queue).id, claim(queue).id] == ["waits", "retried"]


class TestPauseAndResume:
    """`pause` lets no pool start a job until `resume`."""

    def test_a_paused_queue_starts_no_job_and_says_so_everywhere(self):
        enqueue(id="x")
        pool = start_pool()
        wait_until(lambda: state_of("x") == "completed")
        words = "paused; to go on: queuectl.py resume"
        assert run_ok("pause").out == words + "\n"
        assert run_ok("pause").out == "already %s\n" % words
        enqueue(id="y")
        assert words.capitalize() in run_ok("status").out
        assert words in run_ok("show", "y").out
        assert read_status()["paused"] is True
        drain = start_pool("--drain", count=1)
        assert drain.stderr.readline() == "queuectl: %s\n" % words
        assert state_of("y") == "pending" and pool.poll() is drain.poll() is None
        assert run_ok("resume", "--json").json == {"paused": False}
        wait_until(lambda: state_of("y") == "completed")
        assert drain.wait(10) == 0
        assert "aused" not in run_ok("status").out

    @fork_only
    def test_a_pool_says_what_others_ask_of_it(self):
        enqueue(UNTIL_GO, id="x")
        pool = start_pool(count=1, script="queuectl.RECOVERY_INTERVAL = 0.1")
        assert pool.stderr.readline().startswith("x 1/3 runs")
        words = "queuectl: paused; to go on: queuectl.py resume"
        for command, line in (["pause"], words), (["resume"], "queuectl: resumed"), (
                ["worker", "stop", "--no-wait"], "queuectl: finishing 1 running job"):
            run_ok(*command)
            assert pool.stderr.readline() == line + "\n"
            assert line[len("queuectl: ") :] in read_text("queuectl.log")
        open("go", "w").close()
        assert pool.wait(10) == 0

    @posix_only
    def test_a_pause_lets_the_running_job_finish_and_a_drain_wait(self):
        enqueue(UNTIL_GO, id="runs", priority=1)
        enqueue(id="next")
        pool = start_pool("--drain", "--quiet", count=1)
        wait_until(lambda: state_of("runs") == "processing")
        run_ok("pause")
        open("go", "w").close()
        wait_until(lambda: state_of("runs") == "completed")
        assert pool.stderr.readline().startswith("queuectl: paused")
        assert pool.poll() is None and state_of("next") == "pending"
        run_ok("resume")
        assert pool.wait(20) == 0 and state_of("next") == "completed"
        assert "2 completed, 0 dead" in pool.stderr.read()

    def test_a_drain_of_a_paused_queue_with_nothing_to_run_ends(self):
        run_ok("pause")
        assert drain_answer().code == 0

    @fork_only
    def test_resume_wakes_idle_workers(self):
        start_pool(count=1, script="queuectl.IDLE_INTERVAL = 60")
        for name in ("a", "b", "c"):  # the worker may be awake once, but not each time
            run_ok("pause")
            enqueue(id=name)
            run_ok("resume")
            wait_until(lambda: state_of(name) == "completed", timeout=10)

    @mechanism
    @posix_only
    @pytest.mark.parametrize("command", ["pause", "resume"])
    def test_workers_get_the_signal_to_look(self, queue, monkeypatch, command):
        woken = []
        before = signal.signal(signal.SIGURG, lambda *_: woken.append(command))
        lock = queuectl.lock_file(queuectl.worker_file(queue.path, 1, os.getpid()))
        try:
            run_ok(command)
        finally:
            os.close(lock)
            signal.signal(signal.SIGURG, before)
        assert woken

    @mechanism
    def test_an_idle_worker_of_a_paused_queue_rests(self, queue):
        add_job(queue)
        queue.set_paused(True)
        worker = queuectl.Worker.__new__(queuectl.Worker)
        worker.queue, worker.draining_pool = queue, None
        assert worker.idle_time() == queuectl.IDLE_INTERVAL and claim(queue) is None
        assert not queue.is_drained()  # a drain waits


class TestBackup:
    """`backup` copies the queue into a new file, from which nothing starts by itself."""

    def test_it_holds_every_job_and_none_that_runs(self):
        enqueue(UNTIL_GO, id="runs", max_retries=1)
        enqueue(id="next")
        start_pool(count=1)
        wait_until(lambda: state_of("runs") == "processing")
        answer = run_ok("backup", "copy.db", "--json").json
        assert answer == {"path": os.path.abspath("copy.db"), "jobs": 2}
        status = run_ok("status", "--db", "copy.db", "--json").json
        assert status["paused"] and status["jobs"]["pending"] == 2
        runs = run_ok("show", "runs", "--db", "copy.db", "--json").json
        assert runs["attempts"] == 0 and runs["runs"][0]["error"] == "stopped"
        assert state_of("runs") == "processing" and not read_status()["paused"]
        if os.name == "posix":
            assert os.stat("copy.db").st_mode & 0o77 == 0

    def test_it_takes_no_name_that_is_there_and_makes_no_queue(self):
        assert "there is no queue" in run_refused("backup", "copy.db")
        enqueue(id="x")
        open("there", "w").close()
        for name in "there", "queuectl.db":
            assert "there is a file %s already" % name in run_refused("backup", name)
        assert "can't copy to no/copy.db: No such" in run_refused("backup", "no/copy.db")
        assert os.path.getsize("there") == 0 and not os.path.exists("copy.db")

    def test_a_damaged_queue_is_not_copied(self):
        """SQLite copies it without an error, and good backups would make room."""
        run_ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 2000)
        (first,), = query("SELECT rootpage FROM sqlite_master WHERE name = 'jobs'")
        with open("queuectl.db", "r+b") as file:
            file.seek(4096 * (first + 40))
            file.write(b"\xff" * 8192)
        assert "copy.db: the queue is damaged" in run_refused("backup", "copy.db")
        assert not [name for name in os.listdir(".") if "copy.db" in name]

    @posix_only
    def test_a_full_disk_leaves_no_part_of_it(self, small_disk):
        run_ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 2000)
        start_pool()  # or the queue itself could not be opened
        fill_disk()
        names = sorted(os.listdir("."))
        assert "can't copy to copy.db" in run_refused("backup", "copy.db")
        assert sorted(os.listdir(".")) == names


class TestCancel:
    """`cancel` makes unfinished jobs dead."""

    @mechanism
    def test_a_job_that_is_gone_at_once_was_cancelled(self, monkeypatch):
        enqueue(id="a")
        cancel = queuectl.Queue.cancel

        def cancel_and_delete(queue, ids):
            cancel(queue, ids)
            queue.delete(ids)

        monkeypatch.setattr(queuectl.Queue, "cancel", cancel_and_delete)
        assert run_ok("cancel", "a").out == "cancelled a\n"

    def test_cancelling_by_state_ends_running_jobs_as_well(self, queue):
        add_job(queue, id="runs")
        run = claim(queue)
        add_job(queue, id="waits")
        assert run_ok("cancel", "--state", "processing", "--state", "pending").out == (
            "cancelled 2 jobs\n")
        assert state_of("waits") == "dead"
        assert queue.complete(run, make_outcome(None)) == "completed"


class TestDelete:
    """`delete` removes jobs that neither run nor are waited for."""

    @mechanism
    def test_what_is_blocked_is_not_sought_again_for_each_row(self, queue):
        add_job(queue, id="root")
        add_jobs(queue, [{"command": "true", "id": "j%d" % n, "after": ["root"]}
                         for n in range(3)])
        queue.cancel(["root"])
        chosen = queuectl.where(blocked_by="cancelled")
        assert "RECURSIVE" in chosen.sql and "RECURSIVE" not in chosen.of_row
        assert queue.delete_all(chosen) == 3 and state_of("root") == "dead"

    @pytest.mark.parametrize("words", [
        [], ["x", "--all"], ["x", "--older-than", "0"], ["--all", "--state", "dead"]])
    def test_it_wants_ids_or_a_state_or_all(self, queue, words):
        assert " ids, or " in run_refused("delete", *words, code=2)

    def test_jobs_are_deleted_by_state_and_age(self, queue, clock):
        for name in ("old", "new"):
            add_job(queue, id=name)
            queue.complete(claim(queue), make_outcome(None))
            clock.now += 86400
        add_job(queue, id="waits")
        clock.now += 7 * 86400
        add_job(queue, id="runs", priority=1)
        claim(queue)
        assert (
            queue.delete_all(
                queuectl.where(["completed"], finished_before=clock.now - 8.5 * DAY))
            == 1)
        assert set(jobs()) == {"new", "waits", "runs"}
        listed = run_ok("delete", "--all", "--dry-run", "--json").json
        assert [job["id"] for job in listed] == ["new", "waits"] and len(jobs()) == 3
        assert run_ok("delete", "--older-than", "1d", "--json").json == {
            "deleted": 1, "left": 0}
        assert set(jobs()) == {"waits", "runs"}  # unfinished jobs have no age
        assert run_ok("delete", "--state", "dead").out == "deleted 0 jobs\n"
        assert "has to be one of pending, failed, completed, dead" in run_refused(
            "delete", "--state", "processing", code=2)
        run_ok("delete", "--all")
        assert set(jobs()) == {"runs"} and queue.counts()["processing"] == 1

    def test_only_finished_jobs_have_an_age(self, queue):
        line = run_refused("delete", "--state", "pending", "--older-than", "1d", code=2)
        assert "finished" in line

    def test_dead_jobs_are_deleted_only_if_they_are_asked_for(self, queue, clock):
        for name in ("done", "dead", "cancelled", "young"):
            clock.now += DAY * (name == "young")
            add_job(queue, id=name, max_retries=1)
            if name == "cancelled":
                queue.cancel([name])
            else:
                verb = queue.fail if name == "dead" else queue.complete
                verb(claim(queue), make_outcome(None))
        assert queue.prune(0.5 * DAY) == 1 and "done" not in jobs()
        add_job(queue, id="done")
        queue.complete(claim(queue), make_outcome(None))
        clock.now += DAY
        age = "%ds" % (time.time() - clock.now + 1.5 * DAY)
        assert run_ok("delete", "--older-than", age, "--dry-run", "--json").json == []
        assert run_ok("delete", "--older-than", "1d").out == (
            "deleted 2 jobs that ended more than 1d ago\n")
        assert set(jobs()) == {"dead", "cancelled"}
        assert run_ok("delete", "--state", "dead", "--older-than", age).out.startswith(
            "deleted 2 jobs that ended more than ")
        assert jobs() == {}

    @pytest.mark.parametrize("words", [["dlq", "clear"], ["delete", "--state", "dead"]])
    def test_dlq_clear_and_state_dead_delete_dead_jobs(self, queue, words):
        add_job(queue, id="dead", max_retries=1)
        queue.fail(claim(queue), make_outcome())
        add_job(queue, id="done")
        queue.complete(claim(queue), make_outcome(None))
        assert run_ok(*words).out == "deleted 1 job\n" and list(jobs()) == ["done"]

    def test_nothing_waits_for_a_completed_job(self, queue):
        add_job(queue, id="done")
        queue.complete(claim(queue), make_outcome(None))
        add_job(queue, id="other")
        add_job(queue, id="last", after=["done", "other"])
        assert "waits for it: last" in run_ok("show", "other").out
        assert "last" not in run_ok("show", "done").out
        assert run_ok("delete", "done").out == "deleted done\n"

    def test_a_job_with_dependents_is_deleted_only_with_them(self, queue):
        for id, after in (("a", []), ("b", ["a"]), ("c", ["b"])):
            add_job(queue, id=id, after=after, max_retries=1)
        words = "job %s can't be deleted, because %s waits for it; to delete both, name"
        assert words % ("a", "b") in run_refused("delete", "a")
        assert words % ("b", "c") in run_refused("delete", "a", "b")
        queue.cancel(["c"])  # a finished dependent protects nothing
        assert run_ok("delete", "b").out == "deleted b\n"
        run_ok("delete", "a", "c")
        assert jobs() == {} and query("SELECT * FROM dependencies") == []
        for id, after in (("a", []), ("b", ["a"])):
            add_job(queue, id=id, after=after, max_retries=1)
        queue.fail(claim(queue), make_outcome())
        left = ("; 1 left: other jobs wait for it (a);"
                " to see which: queuectl.py show a\n")
        assert run_ok("dlq", "clear", "--dry-run").err.endswith("changed" + left)
        assert run_ok("dlq", "clear").out == "deleted 0 jobs" + left
        assert run_ok("delete", "--state", "pending").out == "deleted 1 job\n"
        add_job(queue, id="b", after=["a"])
        assert run_ok("delete", "--all").out == "deleted 2 jobs\n" and jobs() == {}

    def test_a_dry_run_of_ids_refuses_what_the_command_would(self, queue):
        for id, after in ("a", []), ("b", ["a"]):
            add_job(queue, id=id, after=after)
        for words in ["delete", "b", "a"], ["cancel", "a"]:
            answer = run_ok(*words, "--dry-run")
            assert [line.split()[0] for line in answer.out.splitlines()[1:]] == words[1:]
            assert "would be " in answer.err and "nothing is changed" in answer.err
        assert set(read_status()["jobs"].values()) == {0, 2}
        assert "b waits for it" in run_refused("delete", "a", "--dry-run")
        assert "a is pending" in run_refused("retry", "a", "--dry-run")
        for words in ["retry", "a", "b"], ["cancel", "a", "no"], ["delete", "no", "b"]:
            assert "; nothing is changed" in run_refused(*words)
        assert "nothing" not in run_refused("cancel", "no") + run_refused("wait", "a", "no")
        listed = run_ok("delete", "b", "--dry-run", "--json")
        assert listed.json[0]["id"] == "b" and not listed.err

    @posix_only
    def test_a_dry_run_leaves_its_answer_on_the_terminal(self, queue):
        add_jobs(queue, [{"command": "true"}] * 40)
        shown = run_on_terminal("delete", "--all", "--dry-run", columns=80)[1]
        assert shown.count("\r\n") <= 23 and shown.count("pending") == 19
        *_, more, last = shown.splitlines()
        assert "and 21 more" in more
        assert "40 jobs would be deleted; nothing is changed" in last

    @pytest.mark.parametrize("words", [
        ["delete", "--match", "x"], ["delete", "--state", "pending"],
        ["dlq", "clear"], ["dlq", "clear", "--match", "x"], ["delete", "--all"]])
    def test_a_dry_run_lists_what_is_deleted(self, queue, words):
        for n in range(5):
            add_job(queue, id="x%d" % n, after=["x%d" % (n - 1)] if n else [])
        add_job(queue, id="y", after=["x3"])
        if words[0] == "dlq":
            queue.cancel(["x0", "x1", "x2", "x3", "x4"])
        listed = {job["id"] for job in run_ok(*words, "--dry-run", "--json").json}
        before = {*jobs()}
        count = run_ok(*words, "--json").json["deleted"]
        assert before - {*jobs()} == listed and count == len(listed)
        expected = {  # `y` waits for x3, and so, as x3 is unfinished, for all before it
            "delete --match x": {"x4"}, "dlq clear": {"x0", "x1", "x2", "x4"},
            "dlq clear --match x": {"x0", "x1", "x2", "x4"}}
        assert listed == expected.get(" ".join(words), before)

    @mechanism
    def test_a_chain_of_thousands_is_deleted_as_quickly_as_others(self, queue):
        def seconds(chained):
            add_jobs(queue, ({"id": "%d" % n, "command": "true",
                              "after": ["%d" % (n - 1)] if n and chained else None}
                             for n in range(3000)))
            began = time.monotonic()
            chosen = queuectl.split_by_need(queuectl.where(["pending"]))[0]
            assert queue.delete_all(chosen) == 3000
            return time.monotonic() - began

        seconds(False)
        assert seconds(True) < 8 * seconds(False)

    def test_a_chain_is_deleted_as_a_whole(self, queue):
        for name, after in (("a", []), ("b", ["a"]), ("c", ["b"])):
            add_job(queue, id=name, after=after)
        add_job(queue, id="other", after=["a"])
        queue.cancel(["a", "b", "c"])
        assert run_ok("dlq", "clear").out == (
            "deleted 2 jobs; 1 left: other jobs wait for it (a);"
            " to see which: queuectl.py show a\n")
        assert set(jobs()) == {"a", "other"}
        queue.cancel(["other"])
        assert run_ok("dlq", "clear").out == "deleted 2 jobs\n" and jobs() == {}

    def test_an_unfinished_dependent_keeps_an_old_job(self, queue):
        add_job(queue, id="old", max_retries=1)
        add_job(queue, id="new", after="old")
        queue.fail(claim(queue), make_outcome())
        assert run_ok("delete", "--all", "--older-than", "1d").out == (
            "deleted 0 jobs that ended more than 1d ago; 1 left: other jobs wait for"
            " it (old); to see which: queuectl.py show old\n")
        assert run_ok("delete", "--all").out == "deleted 2 jobs\n"

    @pytest.mark.parametrize("words, printed", [
        (["dlq", "retry", "--all"], "retried 0 jobs\n"),
        (["dlq", "clear"], "deleted 0 jobs\n"),
        (["delete", "--all"], "deleted 0 jobs\n"),
        (["delete", "--older-than", "7"], "deleted 0 jobs that ended more than 7s ago\n"),
        *((["delete", "--state", name], "deleted 0 jobs\n")
          for name in queuectl.STATES if name != "processing")
    ])
    def test_a_command_for_many_that_finds_no_job_succeeds(self, words, printed):
        run_ok("status")
        assert run_ok(*words).out == printed
        enqueue(id="x", delay=99)
        if "pending" not in words and "--all" not in words[:2]:
            assert run_ok(*words).out == printed and list(jobs()) == ["x"]

    @mechanism
    def test_many_jobs_are_deleted_in_short_transactions(self, queue, monkeypatch):
        monkeypatch.setattr(queuectl, "BATCH_SIZE", 20)
        # After the first batch, one row at a time.
        monkeypatch.setattr(queuectl, "POLL_INTERVAL", 0)
        for n in range(300):
            add_job(queue, id="j%d" % n)
        commits = []
        queue.db.set_trace_callback(
            lambda sql: commits.append(sql) if sql == "COMMIT" else 0)
        assert queue.delete_all(queuectl.where(["pending"])) == 300
        assert len(commits) > 10

    def test_the_space_of_many_deleted_jobs_is_given_back(self):
        line = b'{"command":"true %s"}\n' % (b"x" * 2500)
        run_ok("enqueue", "-", stdin=line * 2000)
        full = os.path.getsize("queuectl.db")
        run_ok("delete", "--all")
        assert os.path.getsize("queuectl.db") < full / 2


class TestDeadLetterQueue:
    """`dlq` lists, prints, retries and deletes dead jobs."""

    def test_list_counts_the_errors_and_clear_deletes_the_dead_jobs(self):
        for n in range(3):
            enqueue("exit 127", max_retries=1)
        enqueue("exit 3", max_retries=1)
        enqueue(id="good")
        drain()
        assert run_ok("dlq", "list").out.startswith("ID ")
        assert run_ok("dlq", "purge", "--dry-run").out.count(" dead ") == 4
        assert run_ok("dlq", "clear").out == "deleted 4 jobs\n"
        assert list(jobs()) == ["good"]
        assert run_ok("dlq", "clear").out == "deleted 0 jobs\n"

    @posix_only
    def test_a_terminal_is_told_the_most_common_errors(self, queue):
        def first_line(*words):
            shown = run_on_terminal("dlq", "list", *words, columns=80)[1]
            return re.sub(r"\x1b\[\d*m", "", shown).splitlines()[0]

        for code in range(1, 6):
            let_die(queue, "a%d" % code, error="exit %d" % code)
        assert first_line().startswith("ID ")  # a table says it all
        let_die(queue, "b", error="exit 4")
        first = first_line()
        assert first.startswith("Most common errors: exit 4 (2), exit")
        assert first.endswith(" and 2 more") and first.count(" (1)") == 2
        assert first_line("--error", "exit 4") == "Most common errors: exit 4 (2)"
        assert run_ok("dlq", "list").out.startswith("ID ")

    @posix_only
    def test_a_terminal_shows_the_whole_summary_and_the_latest(self, queue):
        for n in range(40):
            let_die(queue, "job%d" % n, error="a long error, number %d" % (n % 20))
        shown = run_on_terminal("dlq", "list", columns=40)[1]
        assert " and 17 more\r\n" in shown and shown.count("\n") <= 23

    def test_list_begins_with_the_latest_death(self, queue, clock):
        for name in ("first", "second", "third"):
            add_job(queue, id=name, max_retries=1)
        for name in ("second", "third", "first"):
            clock.now += 1
            queue.cancel([name])
        assert [job["id"] for job in run_ok("dlq", "list", "--json").json] == [
            "first", "third", "second"]

    @posix_only
    def test_a_terminal_shows_the_latest_that_fit(self):
        run_ok("enqueue", "-", "--quiet", stdin=b'{"command": "true"}\n' * 30)
        run_ok("cancel", "--state", "pending")
        code, shown = run_on_terminal("dlq", "list")
        assert code == 0 and shown.count("cancelled") == 19  # which is no error
        assert shown.count("\n") == 23 and "11 older jobs; --limit 0 lists all" in shown
        assert run_ok("dlq", "list").out.count("\n") == 31
        assert len(run_ok("dlq", "list", "--json", "--limit", "3").json) == 3

    def test_jobs_of_one_error_are_listed_retried_and_removed(self):
        for name, code in (("a", 1), ("b", 12), ("c", 1)):
            enqueue("exit %d" % code, id=name, max_retries=1)
        drain()
        chosen = ["--error", "exit 1"]
        assert {job["id"] for job in run_ok("dlq", "list", "--json", *chosen).json} == {
            "a", "c"}
        assert len(run_ok("dlq", "logs", "--json", *chosen).json) == 2
        assert run_ok("dlq", "retry", *chosen).out == "retried 2 jobs\n"
        assert state_of("b") == "dead"
        assert run_ok("dlq", "clear", *chosen).out == "deleted 0 jobs\n"
        assert run_ok("dlq", "logs", *chosen).out == "no dead jobs\n"

    def test_an_error_that_no_job_has_is_reported_with_those_they_have(self):
        assert cli("dlq", "retry", "--error", "exit").code == 1  # there is no queue
        for code in (4, 4, 4, 5):
            enqueue("exit %d" % code, max_retries=1)
        drain()
        words = "queuectl: no dead job has this very error; there are: exit 4 (3), exit"
        for verb, done in ("retry", "retried"), ("clear", "deleted"):
            answer = run_ok("dlq", verb, "--error", "exit")
            assert answer.out == done + " 0 jobs\n"
            assert answer.err == words + " 5 (1)\n"
            chosen = "--error", "exit 4", "--match", "nothing"
            assert run_ok("dlq", verb, *chosen).err == ""
        for verb in ("list", "logs"):
            answer = run_ok("dlq", verb, "--error", "exit")
            assert answer.out == "no dead jobs\n"
            assert answer.err.startswith(words + " 5 (1)\n")
        assert run_ok("dlq", "retry", "--error", "exit 4").err == ""

    def test_since_selects_the_jobs_that_died_within_that_time(self, queue, clock):
        for name in ("old", "new", "last"):
            add_job(queue, id=name, max_retries=1)
            clock.now = time.time() - (7200 if name == "old" else 60)
            queue.fail(claim(queue), make_outcome())
        assert run_ok("dlq", "retry", "--since", "1h", "--match", "new").out == (
            "retried 1 job\n")
        assert run_ok("dlq", "clear", "--since", "1h", "--dry-run").out.count("\n") == 2
        assert run_ok("dlq", "clear", "--since", "1h").out == "deleted 1 job\n"
        assert run_ok("dlq", "retry", "--since", "0").out == "retried 0 jobs\n"
        assert [job["state"] for job in jobs().values()] == ["dead", "pending"]
        assert "or --all, --match, --error, --since" in run_refused(
            "dlq", "retry", code=2)
        assert "stand alone" in run_refused("dlq", "retry", "old", "--since", "1h",
                                            code=2)

    @posix_only
    def test_cancel_does_not_promise_what_nobody_does(self):
        enqueue(UNTIL_GO, id="lost")
        pool = start_pool(count=1)
        wait_until(lambda: "lost 1/3 runs" in read_text("queuectl.log"))
        kill_pool(pool)
        assert run_ok("cancel", "lost").out == (
            "cancelling lost: its worker died, but its processes still run; the next"
            " pool ends them and makes the job dead; no pool is running; to start one:"
            " queuectl.py worker start\n")
        open("go", "w").close()

    def test_retry_all_leaves_cancelled_jobs_and_counts_them(self):
        for name in ("a", "b"):
            enqueue("exit 1", id=name, max_retries=1)
        drain()
        for name in ("c", "d"):
            enqueue(id=name)
            run_ok("cancel", name)
        printed = run_ok("dlq", "retry", "--all").out
        assert printed.startswith("retried 2 jobs; 2 left: cancelled")
        assert [job["state"] for job in jobs().values()] == [
            "pending", "pending", "dead", "dead"]
        assert run_ok("dlq", "retry", "c").out == (
            "retried c: pending again, with 0 attempts\n")
        assert (state_of("c"), state_of("d")) == ("pending", "dead")
        assert run_ok("dlq", "retry", "--all", "--json").json == {
            "retried": 0, "left": 1}


class TestStatus:
    """`status` prints counts, workers and what waits."""

    def test_it_prints_counts_and_workers(self):
        enqueue()
        assert run_ok("status").out.splitlines()[:6] == [
            "Pending: 1", "Processing: 0", "Completed: 0", "Failed: 0", "Dead: 0",
            "Active Workers: 0"]
        printed = read_status()
        assert printed["jobs"] == {
            "pending": 1, "processing": 0, "completed": 0, "failed": 0, "dead": 0}
        assert printed["workers"] == []

    def test_what_is_overdue_counts_as_waiting_for_a_worker(self, queue, clock):
        add_job(queue, id="runs", priority=1)
        add_job(queue, id="late", delay=10)
        claim(queue)

        def judge():
            status = queuectl.read_status(queue)._replace(pools={1})
            return queuectl.verdict_on(status, clock.now).sentence

        assert judge() == "Keeping up: no job waits for a worker"
        clock.now += 60
        assert judge() == "Working: 1 waiting"

    def test_it_names_the_oldest_waiting_job_and_the_next_due_one(self, queue, clock):
        add_job(queue, id="low", priority=-1)
        clock.now += 60
        add_job(queue, id="high", priority=5)
        add_job(queue, id="later", delay=100)
        assert tuple(queuectl.oldest_claimable(queue)) == ("low", 1e9)
        claim(queue)
        assert tuple(queuectl.oldest_claimable(queue)) == ("low", 1e9)
        assert "Oldest Waiting: low, for " in run_ok("status").out
        claim(queue)
        assert queuectl.oldest_claimable(queue) is None
        run, clock.now = queue.latest_run(queue.job("low")), clock.now + 9
        queue.release(run, make_outcome("stopped", finished_at=clock.now))
        assert tuple(queuectl.oldest_claimable(queue)) == ("low", clock.now)
        claim(queue)
        assert tuple(queue.next_due()) == ("later", clock.now + 91)
        printed = read_status()
        assert printed["oldest_waiting"] is None
        assert printed["next_due"] == "2001-09-09T01:49:20Z"
        assert printed["next_job"] == "later"
        assert "Next Due: later, now\n" in run_ok("status").out

    def test_it_says_when_a_due_job_waits_for_a_worker(self):
        enqueue(UNTIL_GO, id="runs")
        start_pool(count=1)
        wait_until(lambda: state_of("runs") == "processing")
        enqueue(id="next", delay=0.05)
        wait_until(lambda: re.search(
            r"^Next Due: next, late by [\d.]+m?s, as all workers are busy$",
            run_ok("status").out, re.M))
        run_ok("pause")
        assert "Next Due: next, now\n" in run_ok("status").out
        open("go", "w").close()

    @posix_only
    def test_a_worker_whose_pool_was_killed_is_said_to_be_without_it(self):
        enqueue(UNTIL_GO, id="runs")
        pool = start_pool(count=1)
        worker, = workers_of(pool.pid)
        wait_until(lambda: state_of("runs") == "processing")
        line = "  worker %d of pool %d: runs for " % (worker, pool.pid)
        assert line in run_ok("status").out and UNTIL_GO in run_ok("status").out
        os.kill(pool.pid, signal.SIGKILL)
        pool.wait(10)
        shown = run_ok("status").out
        line = "  worker %d, whose pool %d was killed: runs for" % (worker, pool.pid)
        assert line in shown and "The pool was killed; to start another: " in shown
        assert "s; the pool was killed; to start another: " in run_ok("show", "runs").out
        assert read_status()["verdict"] == "The pool was killed"
        open("go", "w").close()

    def test_the_verdict_says_what_a_queue_comes_down_to(self, queue, clock):
        def judge(workers=2, **values):
            status = queuectl.read_status(queue)._replace(
                workers=[dict(pid=1, pool=1, job=None, since=None)] * workers,
                pools={1} if workers else set(), lost=set(), **values)
            verdict = queuectl.verdict_on(status, clock.now)
            return verdict.state, queuectl.verdict_text(verdict)

        assert judge() == ("pending", "No jobs yet")
        add_job(queue, id="x", max_retries=1)
        assert judge(workers=0) == ("dead", "No pool is running: 1 job waits")
        assert judge() == ("processing", "Working: 1 waiting")  # no run has ended
        run = claim(queue)
        assert judge()[1] == "Keeping up: no job waits for a worker"
        clock.now += 90
        queue.fail(run, make_outcome(finished_at=clock.now))
        assert judge() == ("dead", "Ended; 1 dead")
        add_job(queue, id="behind", after=["x"])
        # A pool would not help.
        assert judge(workers=0) == ("dead", "Stuck: 1 job behind dead ones")
        add_job(queue, id="later", delay=60)
        assert judge() == (
            "dead", "Idle: the next job is due in 60 s; 1 dead, 1 blocked")
        assert judge(workers=0)[1] == "No pool is running; 1 dead, 1 blocked"
        add_jobs(queue, [{"command": "true"}] * 4000)
        many = dict(queue.counts(), completed=4)
        assert judge(jobs=many)[1].startswith(
            "Working: 4,000 waiting, done in about 2 d;")  # 90 s each
        assert "done" not in judge()[1]  # by one run nobody can tell
        assert "done" not in judge(jobs=many, growth=[0, 0.5, 1])[1]
        status = queuectl.read_status(queue)._replace(
            run_seconds=2, pools={1}, oldest_waiting=clock.now - 9, growth=[1, 90, 99])
        verdict = queuectl.verdict_on(status, clock.now)
        assert verdict[:2] == (
            "failed", "Falling behind: 4,000 waiting, 90 more a minute")
        assert verdict.advice.endswith("start --count 4")
        for values in {"growth": [0, 90, 99]}, {"oldest_waiting": clock.now - 4}:
            verdict = queuectl.verdict_on(status._replace(**values), clock.now)
            assert verdict.sentence == "Working: 4,000 waiting"
        left = ": 4,000 jobs wait; 1 dead, 1 blocked"
        assert judge(workers=0)[1] == "No pool is running" + left
        queue.set_paused(True)
        assert judge(workers=0) == ("failed", "Paused" + left)

    @mechanism
    def test_a_reason_that_has_just_gone_is_none(self, queue):
        let_die(queue, "a")
        add_job(queue, id="x", after=["a"])
        add_job(queue, id="y", lock="db")
        add_job(queue, id="z", lock="db")
        look, jobs = queuectl.look_at(queue), [queue.job("x"), queue.job("z")]
        look = look._replace(standstill=lambda status: "")
        reasons = lambda: [(queuectl.short_reason(job, look),
                            queuectl.why_waiting(job, look)) for job in jobs]
        assert reasons() == [
            ("after a (dead)", "waits for a, which is dead"),
            ("lock db", "waits for the lock db: job y gets it first")]
        queue.retry(["a"])
        for name in ("a", "x", "y"):
            run = claim(queue)
            assert run.id == name
            queue.complete(run, make_outcome(None))
        queue.delete(["z"])
        assert reasons() == [("", "due now"), ("lock db", "next in line")]

    def test_only_a_queue_without_failures_is_good(self, queue, page):
        add_job(queue, id="cut")
        queue.cancel(["cut"])
        add_job(queue, id="good")
        claim_and_complete(queue)
        verdict = queuectl.verdict_on(queuectl.read_status(queue), 0)
        assert verdict[:2] == ("completed", "Ended: 1 completed, 1 cancelled")
        let_die(queue, "bad")
        verdict = queuectl.verdict_on(queuectl.read_status(queue), 0)
        assert verdict.state == "dead"
        shown = page()
        assert words_of(named_part(shown, "verdict")) == "1 dead"
        assert words_of(named_part(shown, "now").find("p")) == (
            "Ended: 1 completed, 1 cancelled")
        assert shown.find("title").text == "1 dead – Ended – queuectl.db"
        assert page("/?job=bad").find("title").text == "bad dead – queuectl.db"

    def test_jobs_of_one_lock_are_expected_one_after_the_other(self, queue, clock):
        add_jobs(queue, [{"command": "true", "lock": "l"}] * 61)
        run = claim(queue)
        clock.now += 2
        queue.complete(run, make_outcome(None, finished_at=clock.now))
        claim(queue)
        workers = [dict(pid=1, job=None, since=None)] * 4
        status = queuectl.read_status(queue)._replace(
            workers=workers, pools={1}, lost=set())
        status.jobs["completed"] = 5
        assert (status.locked, status.line, status.line_seconds) == (59, 59, 118)
        assert queuectl.verdict_on(status, clock.now)[:2] == (
            "processing", "Keeping up: no job waits for a worker, done in about 118 s")
        clock.now += 3
        assert "done" in queuectl.verdict_on(status, clock.now)[1]
        clock.now += 2  # those behind it may be as long
        assert "done" not in queuectl.verdict_on(status, clock.now)[1]
        add_jobs(queue, [{"command": "true"}] * 40)
        status = queuectl.read_status(queue)._replace(
            workers=workers, pools={1}, growth=[0, 0, 0])
        status.jobs["completed"] = 5
        assert not queuectl.time_left(status, clock.now)
        assert queuectl.verdict_on(status, clock.now).sentence == (  # not those behind it
            "Working: 40 waiting, done in about 20 s")

    def test_jobs_of_a_lock_are_expected_to_take_what_the_last_ones_took(
            self, queue, clock):
        for seconds, fields in [(0.5, {})] * 20 + [(4, {"lock": "l"})] * 5:
            add_job(queue, id=str(clock.now), **fields)
            run = claim(queue)
            clock.now += seconds
            queue.complete(run, make_outcome(None, finished_at=clock.now))
        clock.now += 61  # the rate of the only worker is forgotten
        workers = [dict(pid=1, job=None, since=None)] * 4
        left = lambda: queuectl.time_left(
            queuectl.work_left(queue)._replace(workers=workers, growth=[0] * 3), clock.now)
        add_jobs(queue, [{"command": "true"}] * 20)
        assert left() == "6 s"  # 20 of 1.2 s by 4 workers
        new = ["x%d" % n for n in range(10)]
        add_jobs(queue, [{"command": "true", "id": id, "lock": "new"} for id in new])
        assert left() == "18 s"  # after these, 10 of 1.2 s, one by one
        queue.delete(new)
        add_jobs(queue, [{"command": "true", "lock": "l"}] * 10)
        assert left() == "40 s"  # beside these, 10 of 4 s
        since = clock.now - 60
        workers[:2] = [dict(workers[0], since=since), dict(workers[0], since=since)]
        assert queuectl.time_left(
            queuectl.work_left(queue)._replace(workers=workers, growth=[0] * 3),
            clock.now, of_all=False) == "40 s"
        workers[2] = workers[0]  # most runs are not like those before
        assert not left()

    def test_an_estimate_is_a_range_where_few_jobs_end(self, queue, clock):
        for _ in range(10):
            add_job(queue, id=str(clock.now))
            run = claim(queue)
            clock.now += 1
            queue.complete(run, make_outcome(None, finished_at=clock.now))
            clock.now += 3  # as if other workers were in long runs
        add_jobs(queue, [{"command": "true"}] * 60)
        status = queuectl.read_status(queue)._replace(
            workers=[dict(pid=1, job=None, since=None)], pools={1}, growth=[0] * 3)
        assert queuectl.verdict_on(status, clock.now).sentence == (
            "Working: 60 waiting, done in about 60 s to 4 min")
        status = status._replace(rate=0.01)
        assert "done" not in queuectl.verdict_on(status, clock.now).sentence

    def test_a_pool_with_nothing_but_long_runs_is_held_up(self, queue, clock):
        add_job(queue)
        claim_and_complete(queue)
        add_jobs(queue, [{"command": "true"}] * 9)
        status = queuectl.read_status(queue)._replace(
            pools={1}, workers=[dict(pid=1, job="x", since=clock.now)] * 2)
        clock.now += 30
        assert queuectl.verdict_on(status, clock.now).sentence.startswith("Working")
        clock.now += 1
        verdict = queuectl.verdict_on(status, clock.now)
        assert verdict[:2] == (
            "failed", "Held up: 9 waiting, and all 2 workers in long runs")
        assert verdict.advice.endswith("worker start --count 2")
        status.workers[1] = dict(pid=2, job="y", since=clock.now - 1)
        assert queuectl.verdict_on(status, clock.now).sentence.startswith("Working")

    def test_runs_of_earlier_are_forgotten(self, queue, clock):
        def run_jobs(count, seconds):
            for _ in range(count):
                add_job(queue, id=str(clock.now))
                run = claim(queue)
                clock.now += seconds
                queue.complete(run, make_outcome(None, finished_at=clock.now))
        run_jobs(50, 0.5)
        clock.now += 3600
        run_jobs(3, 2)
        assert queuectl.work_left(queue).run_seconds == (3 * 2 + 2 * 0.5) / 5
        run_jobs(5, 2)
        assert queuectl.work_left(queue).run_seconds == 2

    def test_short_jobs_are_expected_at_the_rate_of_the_last_ones(self, queue, clock):
        add_jobs(queue, [{"command": "true"}] * 60)
        for _ in range(20):
            claim_and_complete(queue)  # in no time; a pool needs some between two runs
            clock.now += 0.5
        status = queuectl.read_status(queue)._replace(
            workers=[dict(pid=1, job=None, since=None)], pools={1})
        assert (status.run_seconds, status.rate) == (0, 2)
        assert queuectl.verdict_on(status, clock.now).sentence == (
            "Working: 40 waiting, done in about 20 s")
        for unknown in {"dependent": 41}, {"growth": [0, 1, 2]}, {"ready": 0}:
            assert not queuectl.time_left(status._replace(**unknown), clock.now)
        status.workers[0].update(since=clock.now - 15)  # this one is no short one
        assert "done" not in queuectl.verdict_on(status, clock.now).sentence
        clock.now += 60  # the pool has stood still
        assert queuectl.work_left(queue).rate is None

    def test_a_job_whose_worker_died_is_lost(self, queue, page):
        add_job(queue, id="a"), add_job(queue, id="b")
        claim(queue)  # by a worker that there never was
        shown = page("/?job=a")
        assert words_of(named_part(shown, "verdict")) == (
            "No pool is running: 1 job waits, 1 without a worker")
        assert {row[1]: row[0] for row in table_of(shown)} == {
            "a": "lost", "b": "pending"}
        assert words_of(named_part(shown, "why")).startswith("lost – its worker died")
        panel = words_of(shown.find("section[@id='job']"))
        assert "· lost" in panel and "Outputlost" in panel
        assert "following" not in panel
        assert "1 without a worker" in words_of(named_part(shown, "running"))

    @mechanism
    def test_a_job_claimed_meanwhile_does_not_seem_lost(self, queue, monkeypatch):
        add_job(queue)
        workers = queuectl.Queue.workers

        def look_then_claim(self):
            found = workers(self)
            with queuectl.Queue("queuectl.db") as other:
                assert claim(other)
            return found

        monkeypatch.setattr(queuectl.Queue, "workers", look_then_claim)
        assert queuectl.read_status(queue).lost == set()

    @mechanism
    def test_a_job_completed_meanwhile_does_not_seem_lost(
        self, queue, page, monkeypatch
    ):
        def complete_then_look(path):
            with queuectl.Queue("queuectl.db") as other:
                other.complete(run, make_outcome(None))
            return {run.worker}

        monkeypatch.setattr(queuectl, "living_workers", complete_then_look)
        for id in ("by status", "by the page"):
            add_job(queue, id=id)
            run = claim(queue)  # its lease is free, as after its end
            if id == "by status":
                assert queuectl.read_status(queue).lost == set()
            else:
                assert "lost" not in words_of(page("/"))

    @pytest.mark.parametrize("at_once, every, growth", [
        (0, 1, [30, 30, 30]), (0, 2, [0, 0, 0]), (40, 31, [-30, 90, 210])])
    def test_a_queue_grows_if_more_is_added_than_ends(
            self, queue, clock, at_once, every, growth):
        for second in range(1, 31):  # one worker needs 2 s for a job
            clock.now += 1
            if second == 25:
                add_jobs(queue, [{"command": "true"}] * at_once)
            if not second % every:
                add_job(queue, id="job%d" % second)
            if at_once and second == 1:
                add_jobs(queue, [{"command": "true"}] * 20)
            if not second % 2:
                run = claim(queue)
                queue.complete(run, make_outcome(None, finished_at=clock.now))
        assert queuectl.work_left(queue).growth == growth
        if not at_once:
            queue.set("keep", 12)
            queue.prune(12)
            assert queuectl.work_left(queue).growth == growth
        clock.now -= 1e6  # whoever sets the clock back learns nothing, but no error
        assert len(queuectl.work_left(queue).growth) == 3

    def test_the_verdict_is_in_json_and_not_in_a_pipe(self, dashboard):
        enqueue()
        printed = read_status()
        assert printed["verdict"] == "No pool is running: 1 job waits"
        assert printed == dashboard.json("/api/status") and "ready" not in printed
        assert printed["verdict"] not in run_ok("status").out

    @posix_only
    def test_a_terminal_shows_the_verdict_and_the_dead_by_error(self):
        enqueue("exit 2", max_retries=1)
        enqueue("printf 'so\\nno \\033[31mfile\\n\\n'; exit 2", max_retries=1)
        for number in range(5):
            enqueue("exit 1%d" % number, max_retries=1)
        drain(1)
        enqueue(id="cut", delay=3600)
        run_ok("cancel", "cut")
        lines = run_on_terminal("status", columns=0)[1].split("\r\n")
        assert "Ended: 1 cancelled; 7 dead" in lines[0] and lines[1] == (
            "Pending:    \x1b[2m0\x1b[0m")
        assert lines[5] == "Dead:       \x1b[31m8\x1b[0m (1 cancelled)"
        assert re.fullmatch(
            r"  2 × exit 2: “no file”, and others, the latest"
            r" ([\d.]+s ago|just now)", lines[6])
        assert lines[7].startswith("  1 × exit 14, ")
        assert lines[10] == "  and 2 more errors; to see all: queuectl.py dlq list"
        assert lines[11] == "Active Workers: 0"
        lines = run_on_terminal("status", columns=50)[1].split("\r\n")
        # The time matters least.
        assert "  2 × exit 2: “no file”, and others" in lines
        assert "    others\r\n" in run_on_terminal("status", columns=28)[1]
        assert "Dead: 8\n" in run_ok("status").out

    def test_with_free_rows_watch_shows_what_ended_last(self, queue, clock):
        for number in range(12):
            add_job(queue, id="job%d" % number)
            claim_and_complete(queue)
            clock.now += 1
        let_die(queue, "bad")
        size = os.terminal_size((80, 24))
        lines = queuectl.watch_lines(["one"], queue, clock.now, 1.0, size)
        assert lines[2].split() == ["LAST", "ENDED", "WHEN", "RESULT"]
        assert [line.split()[0] for line in lines[3:6]] == ["bad", "job11", "job10"]
        assert lines[4].endswith("completed") and "exit 1" in lines[3]
        assert len([line for line in lines if line]) == 13 and len(lines) == 23
        assert len(queuectl.watch_lines(["one"] * 20, queue, 0, 1.0, size)) == 23

    @posix_only
    def test_a_stopping_pool_is_said_to_be_one(self):
        enqueue(UNTIL_GO, id="runs")
        enqueue(id="next")
        pool = start_pool(count=1)
        wait_until(lambda: state_of("runs") == "processing")
        run_ok("worker", "stop", "--no-wait")
        shown = run_on_terminal("status")[1]
        assert shown.startswith("\x1b[33mThe pool is stopping: 1 job waits\x1b[0m;")
        words = "the pool is stopping; to start another: queuectl.py worker start"
        assert words.capitalize() in run_ok("status").out
        assert words in run_ok("show", "next").out
        assert words in run_on_terminal("list", columns=80)[1]
        open("go", "w").close()
        assert pool.wait(10) == 0

    @posix_only
    def test_watch_draws_over_itself_until_ctrl_c(self):
        run_ok("status")
        code, shown = run_on_terminal("status", "--watch", "0.1", keys=b"\x03")
        *pictures, end = shown.split("\x1b[J")
        before, first = pictures[0].split("\x1b[H")
        assert before == "\r\n" * 24  # what stood there is in the scrollback
        pictures[0] = "\x1b[H" + first
        assert code == 130 and all(each.startswith("\x1b[H") for each in pictures)
        assert {each.count("\n") for each in pictures} == {23}  # one more would scroll
        # The last picture stays, and the prompt stands in place of the ^C.
        assert end.endswith("\r\x1b[K") and "\n" not in end and "Traceback" not in shown

    def test_in_a_pipe_watch_ends_each_look_with_a_blank_line(self):
        run_ok("status")
        watch = start_process("status", "--watch", "0.1")
        looks = [watch.stdout.readline() for _ in range(14)]
        assert looks[:7] == looks[7:] and looks.count("\n") == 2 and looks[6] == "\n"

    @posix_only
    def test_the_count_of_pending_jobs_says_which_no_worker_can_take(self, queue):
        enqueue(id="x")
        assert "Pending:    1\r\n" in run_on_terminal("status")[1]
        let_die(queue, "dead")
        enqueue(id="later", delay=60)
        enqueue(id="after", after=["later"])
        assert "Pending:    3 (1 delayed, 1 behind a job)" in run_on_terminal("status")[1]
        assert "Pending: 3\n" in run_ok("status").out
        run_ok("cancel", "x")
        start_pool(count=1)
        assert cli("status", "--check").err == "queuectl: 1 dead\n"  # not when a job is due

    @posix_only
    def test_watch_follows_a_resize_at_once(self):
        run_ok("status")
        pid, terminal = fork_on_terminal(["status", "--watch", "600"])
        os.set_blocking(terminal, False)
        shown = []
        for rows in (24, 12):
            picture = re.compile(b"\x1b\\[H([^\n]*\n){%d}\x1b\\[J" % (rows - 1))
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("hhhh", rows, 80, 0, 0))

            def is_drawn():
                with contextlib.suppress(BlockingIOError):
                    shown.append(os.read(terminal, 4096))
                return picture.search(b"".join(shown))

            wait_until(is_drawn)
        os.set_blocking(terminal, True)
        os.write(terminal, b"\x03")
        read_to_end(terminal)
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 130

    @posix_only
    def test_it_fits_the_terminal_with_the_counts_on_top(self):
        run_ok("enqueue", "-", stdin=b"".join(
            b'{"id": "job%d", "command": "%s"}\n' % (n, UNTIL_GO.encode())
            for n in range(24)))
        pool = start_pool(count=25)
        wait_until(lambda: read_status()["jobs"]["processing"] == 24)
        code, shown = run_on_terminal(
            "status", "--watch", "0.1", keys=b"\x03", columns=40)
        screen = re.sub(r"\x1b\[\d*m", "", shown).split("\x1b[H")[1]
        lines = screen.split("\x1b[J")[0].replace("\x1b[K", "").splitlines()
        assert lines[:3] == ["Keeping up: no job waits for a worker",
                             "Pending:     0", "Processing: 24"]
        assert lines[7] == "pool %d: 25 workers, 1 idle" % pool.pid
        assert lines[8].split() == ["JOB", "FOR", "COMMAND"]
        assert re.match(r"job\d+ +[\d.]+m?s +\S", lines[9])
        assert len(lines) == 23 and lines[-2] == "  and 12 more"
        assert lines[-1].startswith("Ctrl-C: quit · every 0.1s · /")
        assert max(map(len, lines)) <= 40
        once = re.sub(r"\x1b\[\d*m", "", run_on_terminal("status", columns=40)[1])
        assert once.splitlines()[:9] == lines[:9] and once.count("\n") == 23
        with queuectl.Queue("queuectl.db") as queue:
            screen = queuectl.status_screen(
                queuectl.read_status(queue), queuectl.errors_of(queue), time.time(),
                os.terminal_size((40, 12)))
        assert [line.split(":")[0] for line in screen[:3]] == [
            "Keeping up", "Processing", "Active Workers"] and len(screen) == 29
        os.kill(pool.pid, signal.SIGKILL)
        pool.wait(10)
        words = "pool %d: 24 workers, killed" % pool.pid
        wait_until(lambda: words in run_on_terminal("status")[1])
        open("go", "w").close()


class TestStats:
    """`stats` prints rates, run times and errors."""

    def test_stats_of_nothing(self):
        printed = run_ok("stats", "--json").json
        assert printed["runs"] == 0 and printed["success_rate"] is None
        assert run_ok("metrics", "--since", "1d").out == (
            "0 runs in 1d: 0 completed, 0 failed (0 retries); 0 interrupted\n")

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
    def test_bars_use_only_characters_that_the_output_can_show(self, encoding):
        enqueue(id="x")
        drain()
        printed = run_process(
            "stats", env=dict(os.environ, PYTHONIOENCODING=encoding)
        ).stdout
        assert ("█" in printed) == (encoding == "utf-8")
        assert ("#" in printed) == (encoding == "ascii")

    def test_stopped_runs_count_as_interrupted_not_as_failed(self):
        enqueue(id="good")
        assert drain(1) == 0
        enqueue(LONG_COMMAND, id="x")
        for how in ("stop", "stop", "cancel"):
            pool = start_pool(count=1)
            wait_until(live_commands)
            if how == "cancel":
                run_ok("cancel", "x")
                wait_until(lambda: state_of("x") == "dead")
            run_ok("worker", "stop", "--now")
            assert pool.wait(20) == 0
        printed = run_ok("stats").out
        first = "4 runs in 1h: 1 completed, 0 failed (0 retries); 3 interrupted"
        assert first in printed
        assert "100 % succeed; 4/min in the last minute\n" in printed
        assert re.search(r"^(longer|< [\d.]+m?s) +1 +█+$", printed, re.MULTILINE)
        assert LONG_COMMAND not in printed  # an interrupted run tells no run time
        assert run_errors("x") == ["stopped", "stopped", "cancelled"]
        log = read_text("queuectl.log")
        assert re.search(
            r" x 1/3 pending \(stopped\) in [\d.]+m?s, attempt not counted\n", log)


class TestWorkerStart:
    """`worker start` runs jobs until it is stopped."""

    def test_an_idle_pool_picks_up_a_job_at_once(self):
        start_pool(count=1)
        enqueue(id="x")
        wait_until(lambda: state_of("x") == "completed", timeout=2)

    @posix_only
    def test_a_refused_start_leaves_the_signal_handlers_alone(self):
        enqueue()
        os.link("queuectl.db", "other.db")  # a queue with two links is refused
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGURG
        before = [signal.getsignal(number) for number in numbers]
        run_refused("worker", "start")
        assert [signal.getsignal(number) for number in numbers] == before

    @not_on_wine
    def test_a_detached_pool_lives_on_and_reports_its_start(self):
        assert run_process(
            "worker", "start", "--detach", "--count", "2"
        ).stdout.startswith("pool ")
        workers = read_status()["workers"]
        assert len(workers) <= 2
        enqueue(id="x")
        run_ok("wait", "x", "--timeout", "10")
        assert run_ok("worker", "stop", "--no-wait").out.startswith("stopping pool ")
        run_ok("worker", "stop")
        assert read_status()["workers"] == []
        lost = run_process("worker", "start", "--detach", "--db", "no/folder/q.db")
        assert lost.returncode == 1 and lost.stderr.count("\n") == 1

    @posix_only
    def test_a_job_does_not_see_that_its_pool_is_detached(self):
        enqueue("env | grep -c ^QUEUECTL_", id="x")
        assert run_process("worker", "start", "--detach").returncode == 0
        wait_until(lambda: state_of("x") == "completed")
        run_ok("worker", "stop")
        assert run_ok("logs", "x").out == "4\n"  # RUN, DB, JOB_ID and ATTEMPT

    @posix_only
    def test_a_detached_pool_lets_go_of_its_callers_lock(self):
        line = "exec 9>lock; flock 9; %s %s worker start --detach" % (
            sys.executable, COMPILED)
        subprocess.run(line, shell=True, check=True, stdout=subprocess.DEVNULL)
        assert subprocess.run(["flock", "-n", "lock", "true"]).returncode == 0
        run_ok("worker", "stop")

    @fork_only
    def test_a_pool_that_cannot_fork_does_not_spin(self):
        pool = start_process("worker", "start", program=QUICK + """
queuectl.RESTART_INTERVAL = 60
def fork():
    with open("forks", "a") as file:
        file.write("x")
    raise OSError(queuectl.errno.EAGAIN, "no process")
queuectl.os.fork = fork
""")
        wait_until(lambda: os.path.exists("forks"))
        for command in ("pause", "resume"):  # it has come round when it reports that
            run_ok(command)
            wait_until(lambda: command + "d" in read_text("queuectl.log"))
        run_ok("worker", "stop")
        assert pool.wait(10) == 0 and read_text("forks") == "x"
        assert "a worker cannot start: [Errno" in read_text("queuectl.log")

    @posix_only
    def test_a_pool_whose_pid_file_was_removed_ends_with_1(self):
        pool = start_pool(count=1)
        os.remove("queuectl-%d.pid" % pool.pid)
        assert pool.wait(10) == 1
        printed = pool.stderr.read()
        assert "its file " in printed and "was removed" in printed
        assert printed.count("\n") == 1

    @posix_only
    def test_a_pool_whose_pid_file_was_removed_can_stop_now(self):
        enqueue("sleep 60", id="job")
        pool = start_pool(count=1)
        wait_until(lambda: state_of("job") == "processing")
        os.remove("queuectl-%d.pid" % pool.pid)
        wait_until(lambda: "asked to stop" in read_text("queuectl.log"))
        run_ok("worker", "stop", "--now")
        assert pool.wait(10) == 1
        assert (state_of("job"), attempts_of("job")) == ("pending", 0)
        assert read_text("queuectl.log").count("asked to stop") < 3

    @posix_only
    def test_what_becomes_of_each_job_is_printed(self):
        configure("backoff_base", "0.5")
        enqueue("echo no host; exit 3", id="x", max_retries=2)
        enqueue("sleep 0.3", id="y")
        code, shown = run_on_terminal("worker", "start", "--drain", columns=200)
        assert code == 1 and "x 2/2 \x1b[31mdead\x1b[0m (exit 3)" in shown
        shown = re.sub(r"\x1b\[\d*m", "", shown)
        assert re.search(r"x 1/2 failed \(exit 3\) in [\d.<]+m?s, again in 0.[45]s", shown)
        assert re.search(r"x 2/2 dead \(exit 3\) in [\d.<]+m?s: no host\r\n", shown)
        assert "y 1/3 runs, pid " in shown and "y 1/3 completed in 0.3" in shown
        enqueue(id="z")
        answer = run_process("worker", "start", "--drain")
        assert re.fullmatch(r"z 1/3 completed in [\d.<]+m?s\n"
                            r"queuectl: 1 completed, 0 dead\n", answer.stderr)
        assert answer.stdout.count("\n") == 1 and "log queuectl.log;" in answer.stdout

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root")
    def test_root_is_told_whose_queue_it_runs(self):
        enqueue()
        os.chown("queuectl.db", 65534, -1)
        answer = run_process("worker", "start", "--drain", "--quiet")
        assert "belongs to another user (65534), and its commands run as root" in (
            answer.stderr)

    @posix_only
    def test_quiet_prints_the_first_and_the_last_line(self):
        enqueue()
        answer = run_process("worker", "start", "--drain", "--quiet")
        assert answer.stdout.count("\n") == 1
        assert answer.stderr == "queuectl: 1 completed, 0 dead\n"

    def test_another_queue_is_named_in_the_first_line(self):
        answer = run_process("worker", "start", "--drain", "--db", "other.db")
        path = os.path.realpath("other.db")
        assert "log other.db.queuectl.log, queue %s;" % path in answer.stdout

    @posix_only
    def test_a_reader_that_does_not_read_holds_nothing_up(self):
        pool = start_pool(count=2)
        fcntl.fcntl(pool.stderr, 1031, 8192)  # F_SETPIPE_SZ: room for some 200 lines
        run_ok("enqueue", "-", stdin=b'{"command": "true"}\n' * 400)
        wait_until(lambda: read_status()["jobs"]["completed"] == 400)
        run_ok("worker", "stop")
        assert pool.wait(10) == 0
        assert 50 < pool.stderr.read().count("\n") < 400

    @mechanism
    def test_progress_is_one_line_with_what_matters_most_first(self):
        counts = dict(pending=5, processing=2, completed=3000, failed=1, dead=2)

        def progress(width, left="2 s"):
            return queuectl.progress_text("6 waiting", left, counts, width)

        assert progress(99) == (
            "6 waiting, about 2 s left, 2 running, 3,000 completed, 2 dead")
        assert progress(36) == "6 waiting, about 2 s left, 2 running"
        assert progress(35) == "6 waiting, about 2 s left"  # what is behind, neither
        assert progress(9) == progress(1) == "6 waiting"
        assert progress(36, "") == "6 waiting, 2 running"


class TestDrain:
    """`worker start --drain` ends when no job is due."""

    @posix_only
    def test_it_counts_its_own_runs_whatever_keep_and_clock_do(self):
        configure("keep", "0")
        enqueue(id="first", priority=2)
        enqueue(UNTIL_GO, id="second", priority=1)
        enqueue("exit 1", id="bad", max_retries=1)
        pool = start_pool("--drain", count=1, script=CLOCK_SET_BACK)
        wait_until(lambda: {*jobs()} == {"second", "bad"})
        open("back", "w").close()
        open("go", "w").close()
        assert pool.wait(20) == 1
        assert "2 completed, 1 dead" in pool.stderr.read()

    def test_of_two_drains_each_counts_its_own(self):
        for n in range(20):
            enqueue(id="x%d" % n)
        pools = [start_pool("--drain", "--quiet", count=1) for _ in range(2)]
        counts = []
        for pool in pools:
            assert pool.wait(20) == 0
            counts.append(int(re.search(r"(\d+) completed", pool.stderr.read())[1]))
        assert sum(counts) == 20

    def test_json_is_one_document_at_its_end(self):
        enqueue("exit 1", id="dead", max_retries=1)
        enqueue(id="blocked", after=["dead"])
        enqueue(id="later", delay=3600)
        answer = run_process("worker", "start", "--drain", "--json")
        result = json.loads(answer.stdout)
        assert result.pop("pool") > 0 and answer.stderr == ""
        assert answer.returncode == 1
        assert result == {"completed": 0, "dead": 1, "delayed": 1, "blocked": 1}
        assert run_process(
            "worker", "start", "--drain", "--detach", "--json").stdout.count(":") == 2

    def test_it_waits_for_retries_but_not_for_delayed_jobs(self):
        configure("backoff_base", "0.1")
        enqueue(
            python_command(
                "import os; os.path.exists('out') or exit(os.mkdir('out') or 1)"),
            id="again")
        enqueue(id="later", delay="1h")
        assert drain() == 0
        assert (state_of("again"), state_of("later")) == ("completed", "pending")

    def test_a_job_behind_a_delayed_one_is_left_without_an_error(self):
        enqueue(id="later", delay=3620)
        enqueue(id="last", after=["later"])
        answer = drain_answer()
        assert answer.code == 0
        assert answer.err.startswith("queuectl: 0 completed, 0 dead, 1 delayed;"
                                     " 2 jobs left: the next is due in 1h")
        run_ok("edit", "later", "--run-at", "now")
        assert drain() == 0 and run_order() == ["later", "last"]

    @pytest.mark.parametrize("left", ["pending", "failed", "later"])
    def test_a_stopped_drain_says_which_jobs_it_leaves(self, left):
        if left == "failed":  # the drain would have waited for this retry
            enqueue("exit 1", id="y", priority=1)
        enqueue(UNTIL_GO, id="x")
        if left != "failed":
            enqueue(id="y", **({"delay": 60} if left == "later" else {}))
        pool = start_pool("--drain", count=1)
        wait_until(lambda: state_of("x") == "processing")
        run_ok("worker", "stop", "--no-wait")
        open("go", "w").close()
        if os.name != "posix":
            run_ok("worker", "stop", "--now", "--no-wait")
        again = os.name != "posix"  # on Windows the running job is put back as well
        assert pool.wait(20) == (left != "later" or again)
        reported = "left: the pool was stopped early" in pool.stderr.read()
        assert reported == (left != "later" or again)

    @posix_only
    def test_a_stopped_drain_that_leaves_none_says_no_number(self):
        enqueue(UNTIL_GO, id="x")
        other = start_pool(count=1)
        wait_until(lambda: state_of("x") == "processing")
        pool = start_pool("--drain", count=1)
        os.kill(pool.pid, signal.SIGTERM)
        assert pool.wait(20) == 1 and pool.stderr.read() == (
            "queuectl: 0 completed, 0 dead; the pool was stopped early\n")
        open("go", "w").close()
        assert other.poll() is None

    def test_it_ends_soon_after_the_recovery_of_its_last_job(self):
        enqueue(LONG_COMMAND + " once", id="x")
        pool = start_pool("--drain", script="queuectl.RECOVERY_INTERVAL = 60\n"
                          "queuectl.POLL_INTERVAL = 0.5")  # the second run is shorter
        wait_until(count_starts)
        run, = [each for each in read_status()["workers"] if each["job"]]
        os.kill(run["pid"], KILL)
        assert pool.wait(20) == 0 and state_of("x") == "completed"

    @posix_only
    def test_its_progress_counts_the_retries_that_it_waits_for(self):
        configure("backoff_base", "1")
        enqueue("exit 1", id="x", max_retries=2)
        enqueue(delay=3600)
        shown = run_on_terminal("worker", "start", "--drain", columns=99)[1]
        assert "\r\x1b[K0 waiting, 1 to retry, 0 running" in shown

    @posix_only
    def test_progress_is_shown_on_a_terminal_only(self):
        enqueue(id="before")
        drain()
        run_ok("enqueue", "--id", "x", "--", "sleep 0.6")
        enqueue(id="later", delay=86400)  # it does not wait for this one
        code, shown = run_on_terminal("worker", "start", "--drain", columns=99)
        assert code == 0 and "\r\x1b[K0 waiting, 1 running" in shown
        assert shown.endswith("\r\x1b[Kqueuectl: 1 completed, 0 dead, 1 delayed;"
                              " 1 job left: the next is due in 1d\r\n")
        assert max(map(len, shown.split("\r\n"))) < 400
        run_ok("delete", "later")
        run_ok("enqueue", "--id", "y", "--", "true")
        quiet = drain_answer()
        assert quiet.err == "queuectl: 1 completed, 0 dead\n"
        assert "\x1b" not in quiet.out


class TestWorkerStop:
    """`worker stop` stops all pools of a queue."""

    def test_it_stops_all_pools_and_waits_for_them(self):
        pools = [start_pool(), start_pool(count=1)]
        enqueue("sleep 0.2", id="x")
        wait_until(lambda: state_of("x") == "processing")
        printed = run_ok("worker", "stop").out
        assert printed.startswith("stopped pool ")
        assert sorted(map(int, re.findall(r"\d+", printed))) == sorted(
            pool.pid for pool in pools)
        assert state_of("x") == "completed"
        assert [pool.wait(10) for pool in pools] == [0, 0]
        assert leftover_files() == []

    @posix_only
    def test_it_says_for_which_jobs_it_waits(self):
        enqueue(UNTIL_GO, id="long")
        pool = start_pool(count=1)
        wait_until(lambda: state_of("long") == "processing")
        stop = start_process("worker", "stop")
        line = stop.stderr.readline()
        assert re.fullmatch(r"queuectl: waiting for long \(for \d+\.\ds\); to end it:"
                            r" queuectl.py worker stop --now\n", line)
        open("go", "w").close()
        assert stop.wait(10) == 0 == pool.wait(10)
        assert stop.stderr.read() == ""

    @posix_only
    def test_on_ctrl_c_it_says_that_the_pool_still_stops(self, monkeypatch):
        enqueue(UNTIL_GO, id="x")
        start_pool(count=1)
        wait_until(lambda: state_of("x") == "processing")
        monkeypatch.setattr(queuectl, "wait_until", lambda *_: signal.raise_signal(2))
        answer = cli("worker", "stop")
        assert (answer.code, answer.err) == (
            130, "queuectl: the pool still stops; to see it: queuectl.py status\n")

    def test_without_a_pool_it_says_so_and_stops_no_later_pool(self):
        assert run_ok("worker", "stop").out == "no pool is running\n"
        assert os.listdir(".") == []
        enqueue(id="x")
        start_pool()
        wait_until(lambda: state_of("x") == "completed")

    def test_in_a_wrong_folder_it_succeeds_and_makes_no_queue(self):
        assert run_ok("worker", "stop").out == "no pool is running\n"
        assert os.listdir() == []

    def test_a_job_can_stop_its_own_pool(self):
        line = queuectl.shell_line([sys.executable, COMPILED, "worker", "stop"])
        enqueue(line, id="x", timeout=30)
        assert start_pool(count=1).wait(20) == 0
        assert state_of("x") == "completed"

    def test_a_job_that_stops_its_own_pool_does_not_wait_for_it(self):
        enqueue(
            queuectl.shell_line([sys.executable, COMPILED, "worker", "stop"]), id="x")
        pool = start_pool(count=1)
        assert pool.wait(10) == 0
        assert "stopping pool %d\n" % pool.pid in run_ok("logs", "x").out

    @mechanism
    @posix_only
    def test_stopping_a_suspended_pool_gives_a_hint(self, monkeypatch, capsys):
        pool = start_pool(count=1)
        os.kill(pool.pid, signal.SIGSTOP)
        wait_until(lambda: queuectl.is_suspended(pool.pid))
        waits = []

        def wait_briefly(condition, seconds, pause=0.01):
            waits.append(seconds)
            if len(waits) > 1:
                os.kill(pool.pid, signal.SIGCONT)
                wait_until(condition)
            return condition()

        monkeypatch.setattr(queuectl, "wait_until", wait_briefly)
        answer = run_ok("worker", "stop")
        assert "kill -CONT %d" % pool.pid in answer.err
        assert answer.out.startswith("stopped pool")
        assert waits[0] == 1 and pool.wait(10) == 0

    @posix_only
    def test_a_stop_now_ends_suspended_workers_too(self):
        enqueue(LONG_COMMAND, id="x")
        pool = start_pool(script="queuectl.TERM_GRACE = queuectl.KILL_GRACE = 0.8")
        wait_until(lambda: state_of("x") == "processing" and live_commands())
        for worker in workers_of(pool.pid):  # one of them is idle
            os.kill(worker, signal.SIGSTOP)
        answer = run_ok("worker", "stop", "--now")
        assert pool.wait(10) == 0 and "suspended" in answer.err
        assert (state_of("x"), attempts_of("x")) == ("pending", 0)
        assert not live_commands()

    @posix_only
    def test_ctrl_c_says_which_jobs_the_pool_waits_for(self):
        enqueue("touch runs; while ! test -e go; do sleep 0.05; done", id="x")
        pid, terminal = fork_on_terminal(["worker", "start"])
        # Before that, the command would get the Ctrl-C as well.
        wait_until(lambda: os.path.exists("runs"))
        os.write(terminal, b"\x03")
        shown = b""
        while b"finishing 1 running job; Ctrl-C again ends it now" not in shown:
            shown += os.read(terminal, 4096)
        open("go", "w").close()
        shown += read_to_end(terminal)
        assert os.waitpid(pid, 0)[1] == 0 and state_of("x") == "completed"
        assert b"pool %d stopped" % pid in shown

    @posix_only
    def test_ctrl_c_erases_the_progress_of_a_drain(self):
        enqueue("touch runs; while ! test -e go; do sleep 0.05; done", id="x")
        pid, terminal = fork_on_terminal(["worker", "start", "--drain"])
        shown = b""
        while b"1 running" not in shown or not os.path.exists("runs"):
            shown += os.read(terminal, 4096)
        os.write(terminal, b"\x03")
        while b"ends it now" not in shown:
            shown += os.read(terminal, 4096)
        open("go", "w").close()
        shown += read_to_end(terminal)
        # A worker may print a line of its own in between.
        assert b"^C\r\x1b[K" in shown and b"queuectl: finishing 1 running job; " in shown

    @mechanism
    def test_a_request_to_a_pool_is_written_once_and_only_grows(
        self, queue, monkeypatch
    ):
        monkeypatch.setattr(queuectl, "wake", lambda pids: None)
        pool, file = make_supervisor(queue.path), queuectl.pool_file(
            queue.path, 0)
        pool.pid, pool.log = 0, queuectl.open_log(queue.path, "pool", True)
        for before, words, after in (("", "stop", "stop"), ("stop", "now", "now"),
                                     ("over", "stop", "over"), ("over", "now", "now"),
                                     ("now", "now", "now"), ("now", "stop", "now")):
            with open(file, "wb") as room:
                room.write(b" " * 16)
            before and queuectl.request_stop(queue.path, 0, before)
            pool.asked = None
            for _ in range(3):  # the main loop asks again and again
                pool.ask_to_stop(words)
            assert queuectl.requested_stop(queue.path, 0) == after
            lines = read_text("queuectl.log").count("asked to stop")
            assert lines == (before != after), (before, words)
            open("queuectl.log", "w").close()
        os.remove(file)
        for _ in range(3):
            pool.ask_to_stop("now")
        assert read_text("queuectl.log").count("asked to stop now") == 1


class TestConfig:
    """`config` shows and changes settings."""

    @pytest.mark.parametrize("name, value", [
        ("backoff_base", "1.23456789"), ("timeout", "100000.25"), ("keep", "604800"),
        ("backoff_max", "1234567.5")])
    def test_a_value_is_shown_as_it_was_set(self, name, value):
        configure(name, value)
        assert run_ok("config", "get", name, "--json").json == float(value)

    @pytest.mark.parametrize("name, value, shown", [
        ("keep", "5400", "1h30m"), ("keep", "7d", "7d"), ("timeout", "0.5", "0.5s"),
        ("timeout", "100000.25", "100000.25s"), ("keep", "0", "0s"),
        ("keep", "forever", "forever"), ("output_limit", "65536", "64K"),
        ("output_limit", "1025", "1025"), ("backoff_base", "3", "3")])
    def test_people_are_shown_units_that_can_be_set(self, name, value, shown):
        answer = run_ok("config", "set", name, value).out
        assert answer == "%s = %s\n" % (name, shown)
        assert re.search(r"^%s +%s " % (name, shown), run_ok("config", "show").out, re.M)
        assert run_ok("config", "get", name).out == shown + "\n"
        assert run_ok("config", "set", name, shown).out == answer

    @posix_only
    def test_a_terminal_marks_changed_values(self):
        configure("max_retries", "5")
        shown = run_on_terminal("config", "show", columns=40)[1]
        assert re.search(r"^max_retries +5 \*", shown, re.M) and shown.count(" *") == 1
        assert "5 *" not in run_ok("config", "show").out

    def test_settings_are_shown_set_and_unset(self):
        run_ok("config", "set", "max-retries", "5")
        assert run_ok("config", "get", "max_retries").out == "5\n"
        assert run_ok("config", "show", "--json").json["max_retries"] == 5
        assert "max_retries" in run_ok("config", "show").out
        assert (
            run_ok("config", "list").out
            == run_ok("config", "get").out
            == run_ok("config", "show").out)
        run_ok("config", "unset", "MAX_RETRIES")
        assert run_ok("config", "get", "max_retries").out == "3\n"
        for value in ("-1", "many", "1.5", "1e99"):
            assert "max_retries: " in run_refused(
                "config", "set", "max_retries", value, code=2)

    def test_output_limit_may_be_given_in_k_and_m(self):
        configure("output_limit", "64k")
        assert run_ok("config", "get", "output_limit").out == "64K\n"
        for value in ("65M", "1G", "-1", "1.5M", "true", ""):
            assert "64M" in run_refused(
                "config", "set", "output_limit", "--", value, code=2)


class TestDashboardCommand:
    """`dashboard` serves the page."""

    def test_a_host_other_than_this_machine_gets_a_warning(self):
        open_to_all = Dashboard("--host", "0.0.0.0").process
        open_to_all.send_signal(KILL)
        assert "warning" in open_to_all.stderr.read()
        assert "cannot listen" in run_refused(
            "dashboard", "--host", "no.such.host.example")

    def test_it_never_makes_a_queue_that_was_removed(self, dashboard):
        run_ok("status")
        for name in os.listdir("."):
            if name.startswith("queuectl.db"):
                os.remove(name)
        for path in ("/api/status", "/api/jobs", "/api/stats", "/metrics"):
            answer = dashboard.ask(path)
            assert answer.status == 410 and "there is no queue" in answer.text
        assert not os.path.exists("queuectl.db") and dashboard.ask("/").status == 200

    def test_a_damaged_queue_is_an_error_of_the_server(self, dashboard):
        with open("queuectl.db", "wb") as file:
            file.write(b"no database, but text that is longer than its header" * 99)
        assert dashboard.ask("/api/status").status in (400, 503)
        assert dashboard.process.poll() is None


INSTALLED_AS = "queuectl" if os.name == "posix" else "queuectl.cmd"


def run_installed(*argv, **options):
    """Run the command that `install bin` has made. Return the completed process."""
    path = os.path.abspath(os.path.join("bin", INSTALLED_AS))
    return subprocess.run([path, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60, **options)


class TestInstall:
    """`install` makes a command for this file."""

    def test_the_command_imports_this_file_from_any_folder(self, home):
        os.makedirs("it's 100% mine")
        own = shutil.copy(SCRIPT, os.path.join("it's 100% mine", "queue-ctl.py"))
        for _ in range(2):
            printed = subprocess.run(
                [sys.executable, own, "install", "bin"], check=True,
                stdout=subprocess.PIPE, universal_newlines=True
            ).stdout
        assert printed.startswith(
            "installed " + os.path.join(str(home), "bin", "queuectl"))
        assert os.listdir("it's 100% mine/__pycache__")
        # Files of the current folder must not be imported.
        for name in ("json.py", "sqlite3.py"):
            with open(name, "w") as file:
                file.write("raise SystemExit(name)")
        assert run_installed("enqueue", "--id", "a b", "--", "echo  hi").stdout == (
            "enqueued a b\n")
        answer = run_installed("show", "nope")
        assert answer.stderr == "queuectl: there is no job nope\n"
        assert answer.returncode == 1
        assert jobs()["a b"]["command"] == "echo  hi"

    @windows_only
    @pytest.mark.parametrize("value, printed", [("1", b"\xe2"), ("0", b"\\u")])
    def test_the_command_takes_its_encoding_as_the_script_does(self, value, printed):
        os.mkdir("Übung")
        own = shutil.copy(SCRIPT, "Übung")
        subprocess.run([sys.executable, own, "install", "bin"], check=True)
        with open(os.path.join("bin", INSTALLED_AS), "rb") as file:
            assert file.read().isascii() or not sys.executable.isascii()
        enqueue(id="✓")
        answer = subprocess.run(
            [os.path.join("bin", INSTALLED_AS), "list"], stdout=subprocess.PIPE,
            env=dict(os.environ, PYTHONUTF8=value))
        assert answer.returncode == 0 and printed in answer.stdout

    @posix_only
    def test_all_users_find_its_compiled_form(self):
        """Else a service of another user would compile the file at each start."""
        shutil.copy(SCRIPT, "queuectl.py")
        os.chmod("queuectl.py", 0o644)
        subprocess.run([sys.executable, "queuectl.py", "install", "bin"], check=True,
                       stdout=subprocess.DEVNULL, preexec_fn=lambda: os.umask(0o077))
        compiled, = os.listdir("__pycache__")
        assert os.stat("__pycache__").st_mode & 0o777 == 0o755
        assert os.stat("__pycache__/" + compiled).st_mode & 0o44 == 0o44

    @mechanism
    def test_the_path_of_python_is_ascii_in_a_batch_file(self, home):
        user = os.path.join(str(home), "Jörg")
        python, here = os.path.join(user, "100%", "python"), os.path.join(user, "bin")
        assert queuectl.path_in_batch(python, here) == os.path.join(
            "%~dp0..", "100%%", "python")
        assert queuectl.path_in_batch("py%", here) == "py%%"

    @pytest.mark.parametrize("options", [(), ("--detach",)])
    def test_jobs_of_the_command_keep_their_python_environment(self, options):
        run_ok("install", "bin")
        look = "import os, sys; print(sys.flags.isolated, os.environ['PYTHONPATH'])"
        enqueue(python_command(look), id="a")
        env = dict(os.environ, PYTHONPATH="here")
        assert (
            run_installed("worker", "start", "--drain", *options, env=env).returncode
            == 0)
        run_ok("wait", "a")
        assert run_ok("logs", "a").out == "0 here\n"

    def test_it_says_where_and_whether_that_is_on_path(self, home, monkeypatch):
        path = str(home / "bin" / INSTALLED_AS)
        assert run_ok("install", "bin", "--json").json == {
            "path": path, "on_path": False}
        monkeypatch.setenv("SHELL", "/bin/zsh")
        found = run_ok("install", "bin").out.splitlines()
        assert found[0] == "installed " + path
        assert found[1].startswith("%s is not on PATH; to add it, " % (home / "bin"))
        if os.name == "posix":
            assert found[1].endswith(", here and in ~/.zshrc:")
            assert found[2] == '  export PATH=%s:"$PATH"' % (home / "bin")
        monkeypatch.setenv("PATH", str(home / "bin"), prepend=os.pathsep)
        assert run_ok("install", "bin").out == "installed %s\n" % path
        assert os.listdir() == ["bin"] and os.listdir("bin") == [INSTALLED_AS]

    @posix_only
    def test_without_a_folder_it_takes_the_users_own(self, home, monkeypatch):
        monkeypatch.setenv("HOME", str(home))
        before = os.umask(0o077)
        try:
            run_ok("install")
        finally:
            os.umask(before)
        assert os.stat(".local/bin/queuectl").st_mode & 0o777 == 0o755

    @posix_only
    def test_without_a_home_directory_it_makes_no_folder(self, monkeypatch):
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert "there is no home directory" in run_refused("install")
        assert os.listdir() == []

    def test_it_cannot_install_a_copy_within_an_archive(self):
        with zipfile.ZipFile("app.zip", "w") as archive:
            archive.write(SCRIPT, "__main__.py")
        answer = subprocess.run(
            [sys.executable, "app.zip", "install", "bin"], stderr=subprocess.PIPE,
            encoding="utf-8")
        assert answer.returncode == 1 and "unpack it" in answer.stderr
        assert os.listdir() == ["app.zip"]

    @posix_only
    def test_root_hears_what_is_closed_to_other_users(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(sys, "executable", "/bin/sh")
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            inner = os.path.join(folder, "inner")
            os.mkdir(inner)
            own = shutil.copy(SCRIPT, os.path.join(inner, "queuectl.py"))
            monkeypatch.setattr(queuectl, "__file__", own)
            trouble = "queuectl: other users can't run this: %s is closed to them\n" % own

            def report(folder_mode, inner_mode, own_mode):
                for path, mode in zip((folder, inner, own), (
                        folder_mode, inner_mode, own_mode)):
                    os.chmod(path, mode)
                return run_ok("install", folder).err

            assert report(0o755, 0o755, 0o644) == ""
            assert report(0o755, 0o700, 0o644) == report(0o755, 0o755, 0o600) == trouble
            assert report(0o700, 0o700, 0o600) == ""  # nor is the command for others
            link = os.path.join(folder, "python")
            os.symlink(own, link)  # like the interpreter of a virtual environment
            monkeypatch.setattr(sys, "executable", link)
            assert "%s is closed to them" % link in report(0o755, 0o700, 0o644)

    def test_a_file_that_cannot_be_read_is_not_called_gone(self, home):
        own = shutil.copy(SCRIPT, "queuectl.py")
        subprocess.run([sys.executable, own, "install", "bin"], check=True,
                       stdout=subprocess.DEVNULL)
        os.remove(own)
        path = str(home / own)
        assert run_installed("list").stderr == (
            "queuectl: %s is gone: install it again\n" % path)
        os.mkdir(own)  # even root can't read it
        answer = run_installed("list")
        assert answer.returncode == 1 and answer.stderr.count("\n") == 1
        assert answer.stderr.startswith("queuectl: cannot read %s: " % path)

    def test_its_hints_name_the_command_that_was_typed(self):
        run_ok("install", "bin")
        assert run_installed().stdout.startswith("usage: queuectl COMMAND ...")
        assert run_installed("wait", "--x").stderr.endswith(
            "; see: queuectl wait --help\n")
        run_installed("pause")
        env = dict(os.environ, QUEUECTL_DB="other.db")
        assert run_installed("status").stdout.endswith("; to go on: queuectl resume\n")
        assert run_installed("worker", "start", "--detach").stderr == (
            "queuectl: paused; to go on: queuectl resume\n")
        assert run_installed("worker", "stop").returncode == 0
        named = " --db " + queuectl.quoted([queue_path()])
        assert run_installed("resume", "--db", queue_path(), env=env).stdout == (
            "resumed; no pool is running; to start one: queuectl%s worker start\n"
            % named)

    def test_it_overwrites_no_file_of_another_program(self, monkeypatch):
        os.mkdir("bin")
        path = os.path.join("bin", INSTALLED_AS)
        shutil.copy(SCRIPT, path)
        assert "not queuectl's" in run_refused("install", "bin")
        assert read_text(path) == read_text(SCRIPT)
        assert "File" in run_refused("install", path) or os.name != "posix"
        monkeypatch.setattr(queuectl, "__file__", path)
        assert "only a file called NAME.py" in run_refused("install", "other")
        assert os.listdir() == ["bin"]


def complete_line(*words):
    """Return the completions of the last word of a command line."""
    answer = cli("completion", "--", *words)
    assert (answer.code, answer.err) == (0, "")
    return answer.out.split()


# A program for each shell that prints the completions of a line.
SHELL_PROGRAMS = {
    "bash": "source <(queuectl completion bash); COMP_WORDS=(queuectl %s);"
            " COMP_CWORD=%d; _queuectl; echo ${COMPREPLY[@]}",
    "zsh": "compdef() { }; compadd() { shift; print -l $@ };"
           " source <(queuectl completion zsh); words=(queuectl %s);"
           " CURRENT=$((%d + 1)); _queuectl",
    "fish": "queuectl completion fish | source;"
            " complete -C (string join -- ' ' queuectl %s)",
}


class TestCompletion:
    """`completion` completes commands, options, states and ids."""

    @pytest.mark.parametrize("line, expected", [
        ("dl", "dlq"),
        ("dlq ", "list logs retry clear"),
        ("config set ma", "max_retries"),
        ("config set max_retries ", ""),
        ("config set --db q.db ma", "max_retries"),
        ("config un", "unset"),
        ("list --state ", "pending processing completed failed dead"),
        ("list --state=p", "pending processing"),
        ("list --state = p", "pending processing"),  # bash splits the word in this way
        ("--json list --state d", "dead"),
        ("worker start --co", "--count"),
        ("worker start --count ", ""),
        ("metrics --si", "--since"),
        ("enqueue -- ls -", ""),
        ("completion ", "bash zsh fish"),
        ("show d", "done1 died1"),
        ("wait died1 w", "wait1"),
        ("delete --state dead d", "done1 died1"),
        ("--json logs -f w", "wait1"),
        ("dlq retry ", "died1"),
        ("cancel ", "wait1"),
        ("show --db", "--db"),
        ("--db ", ""),
        ("--db other.db show ", "other1"),
        ("show --db=other.db ", "other1"),
        ("show --db './other.db' o", "other1"),
        ("show --db ~/other.db o", "other1"),
        ("nonsense ", ""),
        ("show --db no.db ", ""),
        ("show --db empty.db ", ""),
        ("show --db 'open ", ""),
        ("show --db . ", ""),
        ("show --db notes.db ", ""),
        ("show \udcff", ""),
    ])
    def test_the_last_word_of_a_line_is_completed(self,
            line, expected, queue, home, monkeypatch):
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(home))
        for name, end in (("died1", queue.fail), ("done1", queue.complete)):
            add_job(queue, id=name, max_retries=1)
            with leased_run(queue, 1) as (run, _):
                end(run, make_outcome())
        for name in ("wait1", "a b", "$HOME", "-x", "*", "été"):
            add_job(queue, id=name)
        run_ok("enqueue", "--db", "other.db", "--id", "other1", "--", "true")
        for name, text in (("empty.db", ""), ("notes.db", "notes\n" * 999)):
            with open(name, "w") as file:
                file.write(text)
        before = sorted(os.listdir())
        assert complete_line(*line.split(" ")) == expected.split()
        assert sorted(os.listdir()) == before and os.path.getsize("empty.db") == 0

    @mechanism
    def test_every_command_and_option_is_completed(self, monkeypatch):
        for name, entry in queuectl.COMMANDS.items():
            *group, last = name.split()
            assert last in complete_line(*group, ""), name
            options = [
                each for argument in entry.arguments
                for each in argument.names if each[0] == "-"]
            assert {*options} <= {*complete_line(*name.split(), "-")}
        arguments = [queuectl.IDS, queuectl.state_option(queuectl.STATES),
                     queuectl.option("--after", "ID", "")]
        new = queuectl.COMMANDS["show"]._replace(arguments=arguments)
        monkeypatch.setitem(queuectl.COMMANDS, "new one", new)
        enqueue(id="job1")
        assert complete_line("new", "") == ["one"]
        for words in ("", "--after ", "a --state dead "):
            assert complete_line("new", "one", *(words + "jo").split()) == ["job1"]

    def test_the_newest_ids_are_completed_up_to_a_limit(self, queue):
        for number in range(400):
            add_job(queue, id="job%d" % number)
        printed = complete_line("show", "")
        assert printed[:2] == ["job399", "job398"] and 200 < len(printed) < 400
        assert complete_line("show", "job17") == [
            "job17" + digit for digit in (*"9876543210", "")]

    @posix_only
    @pytest.mark.parametrize("shell", queuectl.COMPLETIONS)
    def test_a_shell_completes_a_line_by_its_script(self, shell, monkeypatch):
        if not shutil.which(shell):
            pytest.skip("no " + shell)
        run_ok("install", "bin")
        monkeypatch.setenv("PATH", os.path.abspath("bin"), prepend=os.pathsep)
        run_ok("enqueue", "--db", "my q.db", "--id", "job1", "--", "true")
        for words, expected in ((["dlq", ""], {"list", "logs", "retry", "clear"}),
                                (["--db", "'my q.db'", "show", "jo"], {"job1"})):
            line = " ".join(map(shlex.quote, words))
            program = (
                SHELL_PROGRAMS[shell]
                .replace("%d", str(len(words)))
                .replace("%s", line, 1))
            printed = subprocess.run(
                [shell, "-c", program], timeout=60, stdout=subprocess.PIPE,
                universal_newlines=True
            ).stdout
            assert set(printed.split()) == expected

    def test_an_unknown_shell_is_refused_with_the_known_ones(self):
        assert "bash, zsh, fish" in run_refused("completion", code=2)
        assert "zsh" in run_refused("completion", "csh", code=2)
        assert "complete -o default -F" in run_ok("completion", "bash").out
        assert run_ok("completion", "fish", "--json").json == (
            queuectl.COMPLETIONS["fish"])
        assert os.listdir() == []


# The replaced database file breaks in some way when a result is recorded in it.
REPLACED_FILE_BREAKS = """
def gives(queue, *args, verb=queuectl.Queue._leave_processing):
    if not queuectl.may_be_same_file(queue.path, queue.file_status):
        %s
    return verb(queue, *args)
queuectl.Queue._leave_processing = gives
"""


def replace_database():
    """Move another database over the database of the queue."""
    run_ok("--db", "new/queuectl.db", "enqueue", "--id", "new", "--", "true")
    os.replace("new/queuectl.db", "queuectl.db")


def trial_files(name):
    """Return the files of this name in the folders of a selftest."""
    return [os.path.join(folder, name) for folder, _, files in os.walk(".")
            if name in files]


class TestSelftest:
    """`selftest` shows that the promises hold on a file system, and leaves nothing."""

    @pytest.mark.skipif(os.name == "nt", reason="in wine it comes near its time limit")
    def test_every_promise_holds_here(self):
        os.mkdir("folder")
        # Within a job of another queue these are set.
        env = dict(os.environ, QUEUECTL_DB="other.db", QUEUECTL_RUN="other")
        db = os.path.join("folder", "q.db")
        answer = run_process("selftest", "--db", db, env=env)
        lines = answer.stdout.splitlines()
        assert [line[15:] for line in lines[:-1]] == [*queuectl.PROMISES], answer
        assert all(re.match(r"ok      \S+ +", line) for line in lines[:-1])
        assert lines[-1] == "9 of 9 promises hold in " + os.path.realpath("folder")
        assert (answer.returncode, answer.stderr) == (0, "")
        assert os.listdir() == ["folder"] and os.listdir("folder") == []

    @mechanism
    def test_a_promise_that_does_not_hold_is_reported(self, monkeypatch):
        monkeypatch.setattr(queuectl, "PROMISES", {
            "first": lambda trial: trial.expect(x=("completed", 1)),
            "second": lambda trial: trial.run("dlq", "retry", "x"),
            "third": lambda trial: os.mkdir(trial.folder),
            "fourth": lambda trial: trial.expect()})
        answer = cli("selftest", "--json")
        assert [result["holds"] for result in answer.json] == [False] * 3 + [True]
        first, second, third, fourth = [result["error"] for result in answer.json]
        assert (first, fourth) == ("the jobs are {}", None) and answer.code == 1
        assert second.startswith("there is no queue ") and "exists" in third
        assert re.search(
            r"FAILED  \S+ +first: the jobs are {}\n", cli("selftest").out)

    @mechanism
    @needs_proc
    def test_a_command_that_hangs_is_ended(self, monkeypatch):
        monkeypatch.setattr(queuectl, "CHECK_TIME", 0.3)
        monkeypatch.setattr(queuectl, "PROMISES", {
            "command": lambda trial: trial.run("dashboard", "--port", "0"),
            "pool": lambda trial: [trial.start("worker", "start"),
                                   trial.wait_for_beats(1)]})
        begun = time.monotonic()
        answer = cli("selftest")
        assert processes_of_this_test() == [] and time.monotonic() - begun < 20
        assert answer.out.count("it took too long") == 2 and answer.code == 1
        assert os.listdir() == []

    @posix_only
    @pytest.mark.parametrize("flock", [
        "def flock(*_): raise OSError(37, 'No locks available')",
        "def flock(*_): pass", "flock = fcntl.lockf"])
    def test_a_file_system_without_locks_is_named(self, flock):
        with open("sitecustomize.py", "w") as file:
            file.write("import fcntl\n%s\nfcntl.flock = flock" % flock)
        env = dict(os.environ, PYTHONPATH=os.getcwd(), PYTHONDONTWRITEBYTECODE="1")
        answer = run_process("selftest", env=env)
        assert answer.returncode == 1 and answer.stdout.count("\n") == 2
        assert "\n0 of 9 promises hold in " in answer.stdout
        assert answer.stdout.endswith("; 8 were not tried: without locks none can hold\n")
        assert re.match(r"FAILED  \S+ +locks hold .*: ", answer.stdout)
        assert "the file system has no locks" in answer.stdout
        assert "; take a local disk\n" in answer.stdout
        assert os.listdir() == ["sitecustomize.py"]

    def test_a_folder_that_cannot_be_used_is_refused_in_words(self):
        assert "nowhere: no folder can be made here: " in run_refused(
            "selftest", "--db", os.path.join("nowhere", "q.db"))
        assert os.listdir() == []

    @needs_mounts
    def test_a_read_only_folder_is_refused_in_words(self):
        os.mkdir("disk")
        answer = run_with_mounts("mount -t tmpfs -o ro none disk; cd disk;"
                                 " queuectl selftest; echo $?")
        assert answer.stdout == "1\n" and answer.stderr.count("\n") == 1
        assert "disk: no folder can be made here: Read-only" in answer.stderr

    @posix_only
    def test_a_full_disk_is_named(self, small_disk):
        fill_disk()
        assert "not enough space to try: selftest takes 8 MB" in run_refused("selftest")
        assert os.listdir() == ["fill"]

    @mechanism
    def test_what_there_is_no_time_for_is_not_tried(self, monkeypatch):
        monkeypatch.setattr(queuectl, "SELFTEST_TIME", queuectl.CHECK_TIME / 2)
        answer = cli("selftest")
        assert answer.code == 1 and "FAILED" not in answer.out
        assert answer.out.splitlines()[-1].startswith("1 of 9 promises hold in ")
        assert answer.out.endswith("; 8 were not tried: there was no time left\n")

    @needs_proc
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_and_leaves_nothing(self, number):
        process = start_process("selftest")
        assert poll_until(lambda: trial_files("beats"), 20)
        process.send_signal(number)
        assert process.wait(10) == 130 and process.stderr.read() == ""
        assert os.listdir() == []
        assert poll_until(lambda: not processes_of_this_test(), 1)


class TestRemovedQueue:
    """Removing or replacing the database ends what works on it."""

    @posix_only
    def test_removing_the_database_ends_the_pool(self):
        enqueue(id="x")
        pool = start_pool()
        wait_until(lambda: state_of("x") == "completed")
        os.remove("queuectl.db")
        assert pool.wait(10) == 1
        assert pool.stderr.read().count("was removed") == 1
        assert re.search(r"ERROR pool.* this pool stops: ", read_text("queuectl.log"))
        assert jobs() == {}

    @fork_only
    def test_a_pool_without_its_database_starts_no_further_worker(self):
        pool = start_pool(count=1, script="queuectl.RECOVERY_INTERVAL = 60")
        enqueue(id="x")
        wait_until(lambda: state_of("x") == "completed")
        os.remove("queuectl.db")  # which the worker notices first
        assert pool.wait(10) == 1
        assert "died" not in read_text("queuectl.log")

    @posix_only  # other systems keep open files from being removed
    def test_a_pool_with_closed_stderr_makes_no_new_database(self):
        pool = start_pool()
        pool.stderr.close()  # what the pool prints breaks the pipe
        os.remove("queuectl.db")
        assert pool.wait(10) == 1
        assert not os.path.exists("queuectl.db")

    @posix_only
    def test_removing_the_queue_ends_a_pool_that_is_ending_an_orphan(self):
        enqueue("trap '' TERM; " + LONG_COMMAND, id="x")
        pool = start_pool(count=1, script="queuectl.TERM_GRACE = 60")
        wait_until(live_commands)
        os.kill(workers_of(pool.pid)[0], signal.SIGKILL)
        wait_until(lambda: "worker died, ending" in read_text("queuectl.log"))
        group = os.getpgid(live_commands()[0])
        os.remove("queuectl.db")
        try:
            assert pool.wait(10) == 1
        finally:
            os.killpg(group, signal.SIGKILL)

    @posix_only
    @pytest.mark.parametrize("how", ["moved", "copied"])
    def test_replacing_the_database_ends_an_idle_pool(self, how):
        os.mkdir("new")
        enqueue(id="x")
        pool = start_pool("--quiet")
        wait_until(lambda: state_of("x") == "completed")
        replace_database()
        assert pool.wait(10) == 1 and pool.stderr.read().count("\n") == 1
        assert not [
            name for name in os.listdir(".") if name.endswith((".pid", ".runs"))]

    @fork_only
    @pytest.mark.parametrize("trouble", [
        "pass", "raise queuectl.sqlite3.OperationalError('disk I/O error')",
        "raise queuectl.sqlite3.DatabaseError('database disk image is malformed')",
        "raise queuectl.sqlite3.OperationalError('database is locked')",
        "raise OSError(28, 'No space left on device')"])
    def test_replacing_the_database_ends_a_pool_with_a_result(self, trouble):
        os.mkdir("new")
        enqueue("until [ -e go ]; do sleep 0.02; done; exit 1", id="x")
        pool = start_pool(count=1, script=REPLACED_FILE_BREAKS % trouble)
        wait_until(lambda: state_of("x") == "processing")
        replace_database()
        wait_until(lambda: "asked to stop" in read_text("queuectl.log"))
        open("go", "w").close()
        assert pool.wait(10) == 1

    @mechanism
    def test_a_removed_database_is_never_made_anew(self, queue, monkeypatch):
        def connect(*args, **options):
            os.remove("queuectl.db")
            return real(*args, **options)

        queue.before_fork()  # The next use opens it again.
        real = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", connect)
        with pytest.raises(sqlite3.OperationalError, match="unable to open"):
            queue.counts()
        assert not os.path.exists("queuectl.db")

    @posix_only
    def test_a_new_database_ignores_the_log_index_of_a_removed_one(self, queue):
        add_job(queue, id="old")  # on a connection that stays open, as in a pool
        os.remove("queuectl.db")
        # The process is killed after its commit, before it can tidy up.
        program = "import os\nqueuectl.wake_workers = lambda _: os.kill(os.getpid(), 9)"
        process = start_process(
            "enqueue", "--id", "new", "--", "true", program=program, fresh=True)
        assert process.wait() == -signal.SIGKILL
        queue.close()
        assert list(jobs()) == ["new"]

    @posix_only
    def test_a_new_database_is_not_mixed_up_with_a_removed_one(self):
        enqueue(LONG_COMMAND, id="x")
        pool = start_pool(count=1)
        wait_until(live_commands)
        os.remove("queuectl.db")
        enqueue("echo new", id="x")
        assert drain() == 0
        assert live_commands(), "this tests nothing without the other pool"
        assert run_ok("logs", "x").out == "new\n"
        run_ok("worker", "stop", "--now")
        assert pool.wait(20) == 1
        assert leftover_files() == [] and state_of("x") == "completed"

    @posix_only
    @pytest.mark.parametrize("words", [
        ["wait"], ["logs", "-f", "x"], ["status", "--watch", "0.2"]])
    def test_removing_the_queue_ends_every_command_that_waits(self, words):
        enqueue(id="x", delay=3600)
        waiting = start_process(*words)
        wait_until(lambda: waiting.pid in processes_of_this_test("queuectl.db-shm"))
        os.remove("queuectl.db")
        assert waiting.wait(10) == 1
        assert waiting.stderr.read().endswith("queuectl.db was removed\n")


class TestCommandLine:
    """What holds for every command."""

    def test_the_file_runs_as_a_program(self):
        run = functools.partial(
            subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", timeout=60)
        answer = run([sys.executable, SCRIPT, "--version"])
        assert (answer.returncode, answer.stdout) == (
            0, "queuectl %s\n" % queuectl.__version__)
        enqueue()
        answer = run([sys.executable, SCRIPT, "show", "nope"])
        assert (answer.returncode, answer.stderr) == (
            1, "queuectl: there is no job nope\n")

    @posix_only
    def test_hints_of_a_script_can_be_pasted(self):
        shutil.copy(SCRIPT, "queuectl.py")
        enqueue(id="x")
        shown = subprocess.run(
            [sys.executable, "queuectl.py", "status"], timeout=60, check=True,
            stdout=subprocess.PIPE).stdout.decode()
        hint = shown.splitlines()[-1].partition("; to start one: ")[2]
        assert hint == os.path.basename(sys.executable) + " queuectl.py worker start"

    @posix_only
    def test_it_runs_as_a_module_and_as_an_executable_file(self):
        shutil.copy(SCRIPT, "queuectl.py")
        os.mkdir("bin")
        os.symlink(sys.executable, "bin/python3")
        env = dict(os.environ, PATH=os.path.abspath("bin") + ":" + os.environ["PATH"])
        for words in ["./queuectl.py"], [sys.executable, "-m", "queuectl"]:
            answer = subprocess.run(
                [*words, "enqueue", "ls"], env=env, stderr=subprocess.PIPE)
            assert b"not JSON" in answer.stderr and answer.returncode == 2
            assert (
                subprocess.run([*words, "enqueue", "--", "true"], env=env).returncode
                == 0)
            assert (
                subprocess.run([*words, "worker", "start", "--drain"]).returncode == 0)
        assert [job["state"] for job in jobs().values()] == ["completed"] * 2

    def test_every_level_has_help(self):
        assert "examples:" in run_ok().out and "examples:" in run_ok("--help").out
        for group in ("worker", "dlq", "config"):
            assert "examples:" in run_ok(group).out
            assert "examples:" in run_ok(group, "--help").out
            assert (
                run_ok("--db", "x", group).out
                == run_ok(group, "--json").out
                == run_ok(group).out)
        for name in queuectl.COMMANDS:
            assert "example: " in run_ok(*name.split(), "--help").out

    def test_help_is_a_command_as_well(self):
        assert run_ok("help").out == run_ok("--help").out
        assert run_ok("help", "dlq").out == run_ok("dlq").out
        assert run_ok("help", "enqueue").out == run_ok("enqueue", "--help").out
        assert "unknown command foo" in run_refused("help", "foo", code=2)

    @mechanism
    def test_every_argument_has_a_help_text(self):
        for name, entry in queuectl.COMMANDS.items():
            for argument in entry.arguments:
                assert argument.options["help"], (name, argument)
        assert run_ok("enqueue", "--help").out.splitlines()[0].endswith("-- COMMAND...")
        assert "--db PATH" in run_ok().out and "--json" in run_ok().out

    @pytest.mark.parametrize("argv", [
        ["list", "--stat", "dead"], ["show"], ["show", "a", "b"], ["enqueue"],
        ["--nope"], ["worker", "start", "--count", "0"],
        ["worker", "start", "--count", "-1"], ["worker", "start", "--count", "two"],
        ["worker", "start", "--count", "257"], ["config", "set", "max_retries"],
        ["dlq", "retry"], ["dlq", "retry", "a", "--all"], ["worker", "begin"],
        ["worker", "--drain"], ["--json"], ["--db"], ["list", "--db"],
        ["--db", "list"], ["enqueue", "--file", "f", '{"command":"true"}']
    ], ids=" ".join)
    def test_wrong_usage_is_one_line_and_exit_code_2(self, queue, argv):
        run_refused(*argv, code=2)

    def test_a_misspelt_name_gets_the_nearest_one(self):
        for word in ("statuz", "stauts"):  # not stats
            assert "did you mean: queuectl.py status\n" in run_refused(word, code=2)
        assert "queuectl.py dlq list\n" in run_refused("dql", "list", code=2)
        assert "mean: queuectl.py dlq retry x\n" in run_refused("dlq", "retri", "x", code=2)
        assert "did you mean backoff_base" in run_refused(
            "config", "get", "backof_base", code=2)

    @pytest.mark.parametrize("words, printed", [
        (["stop"], "mean: queuectl.py worker stop\n"), (["retyr"], "queuectl.py retry\n"),
        (["start"], "mean: queuectl.py worker start\n"), (["run"], "worker start\n"),
        (["ls", "--json"], "py list --json\n"), (["rm", "x"], "queuectl.py delete x\n"),
        (["dlq", "rm", "x"], "delete x\n"), (["worker", "pause"], "py pause\n"),
        (["worker", "resume"], "mean: queuectl.py resume\n"), (["queues"], "py status\n"),
        (["release", "x"], "mean: queuectl.py edit x --run-at now\n"),
        (["retry", "--state", "failed"], "to try one now: queuectl.py edit ID --run-at"),
        (["stop", "x"], "mean: queuectl.py cancel x\n"), (["kill", "x"], "py cancel x\n"),
        (["stop", "workers", "--json"], "mean: queuectl.py worker stop --json\n"),
        (["purge"], ": queuectl.py delete --state completed, or: queuectl.py dlq clear\n"),
        (["purge", "x"], "py delete x\n"), (["clean"], "delete --state completed\n"),
        (["undelete", "x"], "there are: enqueue, "), (["unpause"], "queuectl.py resume\n"),
        (["frobnicate"], "there are: enqueue, "), (["-v"], "mean --version?"),
        (["add", "ls", "-l"], "py enqueue -- ls -l\n"), (["failed"], "list --state failed\n"),
        (["add", "--id", "x", "--", "ls"], "queuectl.py enqueue --id x -- ls\n"),
        (["status", "--json", "x"], "see: queuectl.py status --help\n"),
        (["pause", "now"], "arguments: now; see: queuectl.py pause --help\n"),
        (["list", "--limit", "-1"], "-1 is not a whole number of at least 0\n"),
        (["show", "-x1"], "an id that begins with - stands behind a --"),
        (["logs", "--tail", "5", "x"], "last lines: queuectl.py logs x | tail -n 5\n"),
        (["logs", "-n20", "x1"], "logs x1 | tail -n 20\n"),
        (["logs", "--tail"], "queuectl.py logs ID | tail\n"),
        (["enqueue", "--at", "5m", "--", "x"], "py enqueue --delay 5m -- x\n"),
        (["enqueue", "--at=2031-01-31", "--", "x"], "enqueue --run-at=2031-01-31 -- x\n"),
        (["inspect"], "mean: queuectl.py show ID\n"), (["follow", "x"], "py logs -f x\n"),
        (["follow"], "queuectl.py logs -f ID\n"), (["dlq", "restart"], "py dlq retry\n"),
        (["dlq", "ls"], "dlq list\n"), (["list", "-l"], "see: queuectl.py list --help\n"),
        (["start", "--count", "2"], "mean: queuectl.py worker start --count 2\n"),
        (["workers", "start"], "mean: queuectl.py worker start\n"),
        (["enqueue", "--from", "f"], "mean: queuectl.py enqueue --file f\n"),
        (["dlq", "retry-all"], "mean: queuectl.py dlq retry --all\n"),
        (["enqueue", "--prio", "5", "--", "x"], "py enqueue --priority 5 -- x\n"),
        (["enqueue", "--name=a", "--retries", "3", "--", "x"],
         "mean: queuectl.py enqueue --id=a --max-retries 3 -- x\n"),
        (["enqueue", "--label", "a", "--", "x"], "see: queuectl.py enqueue --help\n"),
        (["list", "pending"], "mean: queuectl.py list --state pending\n"),
        (["list", "--status", "dead"], "mean: queuectl.py list --state dead\n"),
        (["list", "--dead", "--json"], "mean: queuectl.py list --state dead --json\n"),
        (["list", "5"], "mean: queuectl.py list --limit 5\n"),
        (["list", "--sort", "id"], "see: queuectl.py list --help\n"),
        (["list", "--state", "running"], "mean processing?"),
        (["list", "--state", "dead,failed"], "write --state dead --state failed\n"),
        (["edit", "x", "priority=5"], "mean: queuectl.py edit x --priority=5\n"),
        (["worker", "start", "2", "--detach"], "worker start --count 2 --detach\n"),
        (["worker", "start", "--jobs", "4", "-d"], "start --count 4 --detach\n"),
        (["worker", "start", "-j4"], "worker start"), (["worker", "list"], "py status\n"),
        (["worker", "strt"], "py worker start\n"), (["dlq", "rety"], "py dlq retry\n"),
        (["dlq", "requeue", "x"], "py dlq retry x\n"), (["reset"], "delete --all\n"),
        (["cancel", "--all"], "--state pending --state failed --state processing\n"),
        (["enqueue", "--timeut", "4", "--", "x"], "py enqueue --timeout 4 -- x\n"),
        (["config", "set", "backoff-factor", "2"], "mean backoff_base?"),
        (["config", "max-retries", "3"], "queuectl.py config set max_retries 3\n"),
        (["config", "set", "--max-retries", "3"], "queuectl.py config set max-retries 3\n"),
        (["config", "set", "max_retries=3"], "queuectl.py config set max_retries 3\n"),
        (["enqueue", "--lines", "jobs.txt"], "enqueue --lines --file jobs.txt"),
        (["enqueue", "--", "-"], "queuectl.py enqueue -\n"),
        (["retry", "x", "--", "true"], "first: queuectl.py edit x -- true"),
        (["enqueue", "echo", "hello"],
         "to run a command: queuectl.py enqueue -- echo hello"),
        (["enqueue", "ls", "-la"], "to run a command: queuectl.py enqueue -- ls -la"),
        (["enqueue", "--id", "x", "ls", "-la"],
         "to run a command: queuectl.py enqueue --id x -- ls -la"),
        (["worker", "--count", "2"], "worker 2; there are: worker start, worker stop"),
        (["enqueue", "--id", "x", '{"command":"a"}', '{"command":"b"}'],
         "one id can't serve")
    ])
    def test_a_refusal_suggests_the_right_command(self, words, printed):
        assert printed in run_refused(*words, code=2) and not jobs()

    @pytest.mark.parametrize("words, printed", [
        (["delete", "all", "--dry-run"], "mean: queuectl.py delete --all --dry-run\n"),
        (["delete", "done", "--older-than", "7d"],
         "mean: queuectl.py delete --state completed --older-than 7d\n"),
        (["dlq", "retry", "all"], "mean: queuectl.py dlq retry --all\n"),
        (["wait", "all"], "mean: queuectl.py wait\n")
    ])
    def test_a_word_in_place_of_an_id_may_be_an_option(self, queue, words, printed):
        assert printed in run_refused(*words, code=2)
        enqueue(id=words[1] if words[0] != "dlq" else words[2], run_at=2e9)
        assert "did you mean" not in cli(*words, *["--timeout=0"] * ("wait" in words)).err

    @pytest.mark.parametrize("words, printed", [
        (["status", "--json", "x"], "mean: queuectl.py show --json x\n"),
        (["pause", "x"], "mean: queuectl.py edit x --delay 1d\n"),
        (["dlq", "clear", "x"], "mean: queuectl.py delete x\n"),
    ])
    def test_a_line_about_a_job_is_suggested_if_there_is_it(self, words, printed):
        enqueue(id="x")
        assert printed in run_refused(*words, code=2)
        with_db = ["--db", os.path.abspath("queuectl.db"), *words]
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
        assert re.search(" x( --|\n)", run_refused(*with_db, code=2))
        assert "--help" in run_refused(*words, code=2) and not os.listdir()

    def test_an_unknown_id_suggests_the_nearest_one(self):
        names = ["report-of-monday", "flaky", *map("job{}".format, range(200))]
        run_ok("enqueue", json.dumps([{"id": id, "command": "true"} for id in names]))
        assert "job rep; did you mean report-of-monday?" in run_refused("show", "rep")
        assert "no job falky; did you mean flaky?" in run_refused("delete", "falky")
        assert run_refused("cancel", "xyz") == "queuectl: there is no job xyz\n"

    @pytest.mark.parametrize("verb, state, printed", [
        ("retry", "failed", "to try it now: queuectl.py edit x --run-at now\n"),
        ("dlq retry", "completed", "to run it again: queuectl.py retry x\n"),
        ("cancel", "completed", "to remove it: queuectl.py delete x\n"),
    ])
    def test_a_refused_change_names_the_next_step(self, queue, verb, state, printed):
        enqueue(id="x")
        end, error = (queue.fail, "exit 1") if state == "failed" else (queue.complete, None)
        assert end(claim(queue), make_outcome(error)) == state
        assert printed in run_refused(*verb.split(), "x")

    def test_unknown_ids_are_refused_everywhere(self, queue):
        for command in ("show", "logs", "delete"):
            assert "no job nope" in run_refused(command, "nope")
        assert "no job nope" in run_refused("dlq", "retry", "nope")
        assert run_ok("dlq", "retry", "--all").out == "retried 0 jobs\n"

    def test_ids_that_are_not_utf8_are_unknown(self, queue):
        for command in ("show", "logs", "delete", "cancel"):
            assert "there is no job" in run_refused(command, "\udcff")

    def test_empty_texts_are_refused_and_none_is_an_id(self):
        for words in (["dlq", "clear"], ["delete"], ["dlq", "list"], ["list"]):
            for text in ("", "\udcff"):
                assert "--match" in run_refused(*words, "--match", text, code=2)
        enqueue(id="none")
        enqueue(id="x", after=["none"])
        assert details_of("x")["after"] == ["none"]

    def test_words_and_options_may_be_mixed(self):
        for name in ("a", "b"):
            enqueue(id=name)
        drain()
        assert run_ok("wait", "a", "--timeout", "5", "b").out == "2 completed, 0 dead\n"
        run_ok(
            "enqueue", '{"id":"c","command":"true"}', "--priority", "3",
            '{"id":"d","command":"true"}')
        assert [jobs()[name]["priority"] for name in "cd"] == [3, 3]
        assert run_ok("logs", "a", "--json", "--run", "1").json["id"] == "a"

    def test_db_is_an_option_anywhere_or_a_variable(self, monkeypatch):
        run_ok("--db", "a.db", "enqueue", '{"id":"x","command":"true"}')
        assert list(jobs("--db", "a.db")) == ["x"]
        monkeypatch.setenv("QUEUECTL_DB", "a.db")
        assert list(jobs()) == ["x"]
        assert not os.path.exists("queuectl.db")

    def test_db_may_stand_between_the_words_of_a_command(self):
        run_ok("--db", "a.db", "config", "--db=b.db", "set", "max_retries", "5")
        assert run_ok("config", "--db", "b.db", "get", "max_retries").out == "5\n"
        assert os.listdir(".") == ["b.db"]

    @pytest.mark.parametrize("words", [
        "wait", "wait x", "show x", "logs x", "logs -f x", "cancel x", "retry x",
        "delete x", "delete --all", "delete --state dead", "dlq clear", "dlq logs",
        "dlq retry --all", "edit x --priority 1", "retry --state dead",
        "cancel --match x"])
    def test_in_a_wrong_folder_a_command_fails_and_makes_no_queue(self, words):
        assert "there is no queue " in run_refused(*words.split())
        assert os.listdir() == []


class TestTerminal:
    """What a terminal shows."""

    @mechanism
    @posix_only
    def test_a_line_is_not_lost_while_another_process_writes(self):
        terminal, end = pty.openpty()
        writer = os.fork()
        if writer == 0:
            with contextlib.suppress(OSError):
                while True:
                    os.write(end, b"\r\x1b[K0 waiting, 1 running")
            os._exit(0)
        reader = threading.Thread(target=read_to_end, args=(terminal,), daemon=True)
        reader.start()  # after the fork, of which Python warns beside threads
        try:
            with os.fdopen(end, "w", closefd=False) as stream:
                events = [queuectl.poll_events(stream, milliseconds=200)
                          for _ in range(2000)]
        finally:
            os.kill(writer, KILL)
            os.waitpid(writer, 0)
            os.close(end)
        assert all(events)

    @posix_only
    def test_a_table_fits_a_terminal_and_is_whole_elsewhere(self):
        run_ok("enqueue", "--id", "i" * 80, "--", "echo " + "x" * 200)
        run_ok("enqueue", "--id", "日本語のジョブ", "--", "echo 日本語")
        for columns in (60, 80, 160):
            shown = run_on_terminal("list", columns=columns)[1]
            lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
            assert re.match("i{12,}…i{11,}  pending", lines[1])
            starts = [queuectl.display_width(line.partition("pending")[0])
                      for line in lines[1:3]]
            assert starts[0] == starts[1]
            assert max(queuectl.display_width(line) for line in lines[1:]) <= columns
        assert "i" * 80 + "  pending" in run_ok("list").out
        assert "x" * 200 in run_ok("list").out

    @mechanism
    @pytest.mark.parametrize("line, width, lines", [
        ("one two", 7, ["one two"]), ("one two", None, ["one two"]),
        ("one two three", 7, ["one two", "  three"]),
        ("  one two three", 9, ["  one two", "    three"]),
        ("a/path/without/spaces is long", 10, ["a/path/without/spaces", "  is long"]),
        ("to go on: queuectl.py resume", 20, ["to go on:", "  queuectl.py resume"]),
        ("so: queuectl.py enqueue -- 'echo a; b'", 20,
         ["so:", "  queuectl.py enqueue -- 'echo a; b'"]),
        ("none; to start: queuectl.py worker start; more", 30,
         ["none; to start:", "  queuectl.py worker start;", "  more"]),
        ("about 26 s left", 9, ["about", "  26 s", "  left"]),
        ("in 1m 3s; so", 6, ["in", "  1m 3s;", "  so"]),
        ("  name   its meaning", 16, ["  name   its", "         meaning"]),
        ("日本 日本", 8, ["日本", "  日本"])])
    def test_prose_is_broken_between_words_a_command_is_not(self, line, width, lines):
        assert queuectl.wrapped(line, width) == lines

    @mechanism
    def test_a_broken_line_keeps_its_colour(self):
        parts = queuectl.wrapped(queuectl.Line("a red word here", 31, 2, 10), 6)
        assert [str(part) for part in parts] == ["a red", "  word", "  here"]
        coloured = [part[part.start : part.end] for part in parts[:2]]
        assert coloured == ["red", "word"] and not hasattr(parts[2], "colour")

    @posix_only
    def test_only_a_terminal_breaks_lines(self):
        enqueue(id="x")
        words = "no pool is running; to start one: queuectl.py worker start"
        shown = run_on_terminal("show", "x", columns=40)[1].splitlines()
        assert "  start one: queuectl.py worker start" in shown
        assert words in run_ok("show", "x").out
        answer = cli("wait", "x", "--timeout", "0")
        assert words in answer.err and answer.err.count("\n") == 1
        code, shown = run_on_terminal("wait", "x", "--timeout", "0", columns=40)
        assert code == 124 and shown.endswith(
            "queuectl: gave up: waiting for x\r\n  (pending); no pool is running; to\r\n"
            "  start one: queuectl.py worker start\r\n")

    @posix_only
    def test_lines_of_a_pool_are_broken_like_others(self):
        enqueue("exit 3", id="a-job-with-a-long-name", max_retries=1)
        shown = run_on_terminal("worker", "start", "--drain", columns=30)[1]
        lines = re.split(r"\r\n|\r\x1b\[K", re.sub(r"\x1b\[\d*m", "", shown))
        assert "a-job-with-a-long-name 1/1" in lines and max(map(len, lines)) <= 30
        assert "queuectl: 0 completed, 1 dead;" in lines and "  to see it:" in shown

    @posix_only
    def test_a_narrow_terminal_gets_a_short_usage(self):
        for name, words in (("delete", " [OPTION]... ID..."),
                            ("worker start", " [OPTION]..."),
                            ("enqueue", " [OPTION]... JSON...")):
            shown = run_on_terminal(*name.split(), "--help", columns=40)[1]
            usage = " ".join(shown.partition("\r\n\r\n")[0].split())
            assert words in usage and "--db" not in usage
        assert "[--db PATH]" in run_ok("delete", "--help").out

    @posix_only
    def test_json_is_one_line_on_a_terminal_too(self):
        for words in ("status", "list", "config show", "show x"):
            enqueue(id="x" if words == "status" else None)
            shown = run_on_terminal(*words.split(), "--json", columns=40)[1]
            assert shown.count("\n") == 1 and json.loads(shown), words

    @posix_only
    @pytest.mark.parametrize("words", [
        "", "dlq", "status", "list", "dlq list", "stats", "config show", "show build",
        "show test", "wait test", "enqueue echo hi", "nonsense"])
    def test_nothing_is_wider_than_a_narrow_terminal(self, words):
        enqueue("echo %s; exit 3" % ("long " * 20), id="build", max_retries=1)
        enqueue(id="test", after=["build"])
        drain(1)
        shown = run_on_terminal(*words.split(), columns=40)[1]
        plain = re.sub(r"\x1b\[[\d;]*[mK]", "", shown).split("\r\n")
        wide = [line for line in plain if len(line.rpartition("\r")[2]) > 40]
        assert not [line for line in wide if "/" not in line]  # but for a path

    @posix_only
    def test_a_terminal_without_a_size_shows_whole_lines(self):
        run_ok("enqueue", "--id", "x", "--", "echo hello")
        assert "echo hello" in run_on_terminal("list", columns=0)[1]

    @posix_only
    @pytest.mark.parametrize("size, shown", [
        ((0, 0), (80, 24)), ((1, 1), (1, 1)), ((0, 30), (80, 30))])
    def test_a_terminal_that_does_not_know_its_size(self, monkeypatch, size, shown):
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size(size))
        assert queuectl.terminal_size(sys.stdout) == shown
        monkeypatch.setenv("TERM", "dumb")
        assert queuectl.terminal_size(sys.stdout) is None

    @pytest.mark.parametrize("columns", range(-1, 4))
    def test_a_text_is_cut_to_any_width(self, columns):
        assert len(queuectl.truncate("hello", columns)) <= max(columns, 1)

    @posix_only
    def test_a_terminal_that_is_gone_fails_no_drain(self):
        enqueue("read line < go", id="x")
        os.mkfifo("go")
        pid, terminal = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            os.execv(sys.executable,
                     [sys.executable, COMPILED, "worker", "start", "--drain"])
        wait_until(lambda: state_of("x") == "processing")
        os.close(terminal)
        with open("go", "w") as file:
            file.write("\n")
        assert os.waitpid(pid, 0)[1] == 0 and state_of("x") == "completed"

    @posix_only
    def test_states_have_colours_unless_no_color_is_set(self, monkeypatch):
        run_ok("enqueue", "--id", "failed", "--", "true")
        run_ok(
            "enqueue", "--id", "x", "--max-retries", "1", "--", "echo dead 1/2; exit 3")
        drain()
        red, green = "\x1b[31mdead\x1b[0m", "\x1b[32mcompleted\x1b[0m"
        shown = run_on_terminal("list", columns=0)[1]
        assert shown.count("\x1b") == 6 and red in shown and green in shown
        assert shown.startswith("\x1b[2mID  ")
        assert red in run_on_terminal("show", "x")[1]
        # Zeros have no colour, the verdict has one.
        assert run_on_terminal("status", columns=0)[1].count("\x1b[0m") == 6
        assert "\x1b" not in run_ok("list").out + run_ok("status").out
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in run_on_terminal("list")[1]

    @posix_only
    def test_control_characters_are_escaped(self):
        enqueue("printf '\\033[31m' # \x1b[2J\x07\r\x9b", id="x", max_retries=1)
        enqueue(id="y", cwd=os.getcwd(), env={"A": "\x1b[2J"})
        drain()
        configure("backoff_base", "0")
        for words in (
            ["list"], ["show", "x"], ["show", "y"], ["status"], ["dlq", "list"]
        ):
            assert not set("\x1b\x07\r\x9b") & set(run_ok(*words).out), words
        assert "\x1b" not in run_refused("show", "\x1b[2J") + run_refused(
            "\x1b[2J", code=2)
        assert "\x1b" not in run_refused(
            "config", "set", "max_retries", "\x1b[2J", code=2)

    def test_the_first_help_fits_a_terminal_and_names_every_command(self):
        lines = run_ok().out.splitlines()
        assert len(lines) <= 24
        named = sum(queuectl.TOPICS.values(), [])
        assert set(named) == {name.split()[0] for name in queuectl.COMMANDS}
        assert run_ok("-V").out == run_ok("--version").out

    @posix_only
    def test_a_narrow_help_has_each_example_on_its_own_line(self):
        lines = run_on_terminal(columns=40)[1].splitlines()
        assert lines[-3:] == ["examples:", "  queuectl.py enqueue -- echo Hello;",
                              "  queuectl.py worker start"]
        lines = run_on_terminal("delete", "--help", columns=40)[1].splitlines()
        assert lines[lines.index("example:") + 1] == (
            "  queuectl.py delete --state completed --older-than 7d")
        shown = run_on_terminal("enqueue", "--help", columns=40)[1]
        lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()  # 3.14 has colours
        assert lines[:4] == ["usage: ", "  queuectl.py enqueue",
                             "    [OPTION]... -- COMMAND...", "  queuectl.py enqueue"]

    def test_help_gives_defaults_where_they_hold(self):
        assert "(default: 0)" in run_ok("enqueue", "--help").out
        assert "default" not in run_ok("edit", "--help").out.replace(
            "(default: QUEUECTL_DB", "")
        assert "max_retries, backoff_base" in run_ok("config", "set", "--help").out

    def test_every_help_text_fits_into_80_columns(self):
        texts = [run_ok("config", "show").out, run_ok().out]
        for name in queuectl.COMMANDS:
            texts.append(run_ok(*name.split(), "--help").out)
        lines = [line for text in texts for line in text.splitlines()]
        assert max(map(len, lines)) < 80

    @mechanism
    @pytest.mark.parametrize("text, columns", [
        ("abc", 3), ("日本", 4), ("é", 1), ("e\u0301", 1), ("", 0)])
    def test_wide_characters_take_two_columns(self, text, columns):
        assert queuectl.display_width(text) == columns
        assert queuectl.truncate(text, 9) == text
        assert queuectl.display_width(queuectl.truncate(text * 9, 5)) <= 5

    @mechanism
    @pytest.mark.parametrize("per_second, words", [
        (0, "0/s"), (1234, "1,234/s"), (99.9, "100/s"), (5.13, "5.1/s"), (1 / 30, "2/min"),
        (16 / 3600, "16/h"), (1 / 7200, "0.5/h")])
    def test_rates_have_a_unit_in_which_they_are_no_fractions(self, per_second, words):
        assert queuectl.rate_text(per_second) == words

    @mechanism
    @pytest.mark.parametrize("seconds, words", [
        (0, "<1ms"), (-1, "<1ms"), (0.029, "29ms"), (0.0996, "0.1s"), (2.51, "2.5s"),
        (9.96, "10s"), (59.4, "59s"), (59.7, "1m"), (200, "3m 20s"), (3599.6, "1h"),
        (7190, "2h"), (7229, "2h"), (86399, "1d"), (90001, "1d 1h")])
    def test_durations_are_printed_in_suitable_units(self, seconds, words):
        assert queuectl.duration_text(seconds) == words


# ======================================================================================
# Settings and policy
# ======================================================================================


class TestPolicy:
    """Backoff, durations, times, and the table of bad inputs."""

    @mechanism
    @pytest.mark.parametrize("base, attempts, longest, wait", [
        (2, 1, 100, 2), (2, 3, 100, 8), (3, 2, 100, 9), (1.5, 2, 100, 2.25),
        (0, 5, 100, 0), (2, 10, 100, 100), (2.0, 5000, 86400, 86400)])
    def test_the_wait_grows_with_the_attempts_up_to_a_limit(
        self, base, attempts, longest, wait
    ):
        assert queuectl.backoff(base, attempts, longest) == wait

    @mechanism
    @pytest.mark.parametrize("given, seconds", [
        (90, 90), (1.5, 1.5), ("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200),
        ("7D", 604800)])
    def test_durations_are_numbers_or_numbers_with_a_unit(self, given, seconds):
        assert queuectl.parse_duration(given) == seconds

    @mechanism
    @pytest.mark.parametrize("given, expected", [
        ("1h30m", 5400), ("1d2h", 93600), ("1.5h", 5400), ("90", 90), ("1H", 3600),
        (" 5 ", 5)])
    def test_durations_may_have_several_parts(self, given, expected):
        assert queuectl.parse_duration(given) == expected

    @pytest.mark.parametrize("given", [
        "1h30", "h", "", "1_0", "1 h", "1h 30m", "-1h", "1e3", "1w"])
    def test_a_text_that_is_no_duration_is_refused(self, given):
        assert "timeout" in run_refused(
            "enqueue", "--timeout=" + given, "--", "true", code=2)

    @mechanism
    @pytest.mark.parametrize("given", [
        "2001-09-09T01:46:40Z", "2001-09-09T03:46:40+02:00", 1e9, "1000000000"])
    def test_times_are_iso_8601_or_epoch_seconds(self, given):
        assert queuectl.check_time(given) == 1e9

    @mechanism
    def test_a_date_of_digits_alone_is_no_time_in_1970(self):
        with contextlib.suppress(ValueError):  # older Pythons refuse this form
            assert queuectl.check_time("20260131") > 1e9

    @posix_only
    def test_a_time_without_a_zone_is_local(self):
        for zone in ("Asia/Tokyo", "UTC"):
            answer = run_process(
                "enqueue", "--run-at", "2030-01-01T00:00:00", "--json", "--", "true",
                env=dict(os.environ, TZ=zone))
            hour = {"Asia/Tokyo": "2029-12-31T15", "UTC": "2030-01-01T00"}[zone]
            assert json.loads(answer.stdout)[0]["run_at"] == hour + ":00:00Z"

    @pytest.mark.parametrize("field, value", [
        ("command", ""), ("command", "  "), ("command", 5), ("command", "a\0b"),
        ("command", "\ud800"), ("command", ["ls"]), ("id", ""), ("id", 5),
        ("id", "a\nb"), ("id", "x" * 256), ("id", " "), ("id", "\x1b[31m"),
        ("max_retries", -1), ("max_retries", True), ("max_retries", 2.0),
        ("max_retries", "3"), ("max_retries", 1e400), ("priority", 2**63),
        ("priority", "high"), ("priority", None.__class__.__name__), ("timeout", 0),
        ("timeout", -1), ("timeout", float("nan")), ("timeout", float("inf")),
        ("timeout", "soon"), ("timeout", True), ("delay", -1), ("delay", "1w"),
        ("delay", {}), ("run_at", "tomorrow"), ("run_at", -1), ("run_at", 1e12),
        ("run_at", 20260131), ("run_at", 202601311800), ("run_at", 0),
        ("run_at", []), ("run_at", "2026-13-01T00:00:00Z"),
        ("cwd", "/no/such/folder"), ("cwd", 1), ("cwd", "a\0"), ("env", []),
        ("env", {"A": 1}), ("env", {"": "x"}), ("env", {"A=B": "x"}),
        ("env", {"A": "\0"}), ("evn", {}), ("command", True), ("command", {}),
        ("command", "\t\n"), ("command", 1.5), ("id", True), ("id", []),
        ("id", "\ud800"), ("id", "a\0"), ("id", "\x7f"), ("id", "a\u2028b"),
        ("id", "\u202e"), ("max_retries", 1000001), ("max_retries", {}),
        ("max_retries", -2**70), ("priority", -2**63 - 1), ("priority", 1.0),
        ("priority", False), ("priority", 1e300), ("priority", []), ("timeout", 1e10),
        ("timeout", "-5s"), ("timeout", ""), ("timeout", "nan"), ("timeout", "inf"),
        ("timeout", []), ("delay", "s"), ("delay", 1e300), ("delay", True),
        ("delay", float("nan")), ("run_at", "nan"), ("run_at", True),
        ("run_at", "25:00"), ("run_at", float("-inf")), ("run_at", ""), ("cwd", ""),
        ("cwd", []), ("cwd", "\ud800"), ("env", "A=B"), ("env", {"A": None}),
        ("env", {"\0": "x"}), ("env", {"A": "\ud800"}), ("env", {"A": True}),
        ("Command", "x"), ("", 1)], ids=lambda value: repr(value)[:30])
    def test_a_bad_field_is_refused_by_its_name(self, field, value):
        job = json.dumps(dict({"command": "true"}, **{field: value}))
        assert field in run_refused("enqueue", job, code=2)
        assert jobs() == {}

    @pytest.mark.parametrize("words, printed", [
        (["--priority", "high", "--", "x"], "priority"),
        (["--env", "A", "--", "x"], "--env"),
        (["--delay", "soon", "--", "x"], "delay"),
        (["--cwd", "no/where", "--", "x"], "cwd"),
        (["--max-retries", "1.5", "--", "x"], "max_retries"),
        (["--", " "], "command"), (["--command", "a", "--", "b"], "give jobs"),
        (['{"command":"a"}', "--", "b"], "give"), (["--id", "x"], "no job"),
        ([""], "no job"), (["--unique", "--", "x"], "id: missing"),
        (["--delay", "1", "--run-at", "1000000000", "--", "x"], "not both"),
        (["echo hi"], "enqueue -- %s\n" % queuectl.quoted(["echo hi"])),
        (["a && b", "--priority", "5"],
         "enqueue --priority 5 -- %s\n" % queuectl.quoted(["a && b"])),
        (["--timeout", "10x", "--", "a"],
         'timeout: "10x" is not a duration like 90s, 10m, 1h30m, 7d, or none\n'),
        (["--timeout", "0", "--", "a"], "is not a duration from 0.001 to 1000000000 s"),
        (["{bad json"], "not JSON: Expecting"),
        (["--", ""], "the command is empty"), (["--id", " ", "--", "x"], "id is empty"),
        ([r'{\"id\":\"x\"}'], "the backslashes are for cmd"),
        (['{"command": x}'], "at character 13")])
    def test_a_bad_option_is_refused_by_its_name(self, words, printed):
        assert printed in run_refused("enqueue", *words, code=2)
        assert jobs() == {}

    @pytest.mark.parametrize("text", [
        "", "{", "nope", "5", "null", '"text"', "[1]", "{}", "[" * 100000, "{'a': 1}",
        '{"command": "true"', '{"id": "x"}', "9" * 5000, b"\xff\xfe{".decode("latin-1"),
        '{"command": "true", "delay": 1, "run_at": 2000000000}'
    ], ids=lambda text: text[:20])
    def test_a_text_that_is_no_job_is_refused(self, text):
        run_refused("enqueue", text, code=2)
        run_refused("enqueue", "-", stdin=b"\n" + text.encode() + b"x", code=2)

    @mechanism
    @pytest.mark.parametrize("year", [1970, 2400, 3001, 3500, 9998])
    def test_local_times_that_windows_does_not_know_are_taken(self, year):
        class Moment(queuectl.datetime):
            def timestamp(self):
                if not 1971 <= self.year < 3000:
                    raise OSError(22, "Invalid argument")
                return (self - queuectl.EPOCH).total_seconds()

        moment = Moment(year, 3, 1, 12)
        assert queuectl.epoch_seconds(moment) == (
            moment - queuectl.EPOCH).total_seconds()

    @windows_only
    def test_a_line_that_cmd_cannot_run_is_refused(self):
        line = "rem " + "ü" * (queuectl.MAX_COMMAND - 4)
        enqueue(line, id="x", max_retries=1)
        assert "8091 characters" in run_refused("enqueue", "--", line + "ü", code=2)
        for line in ("echo a\necho b", "echo a\r\necho b", "\necho b"):
            assert "single line" in run_refused("enqueue", "--", line, code=2)
            assert "single line" in run_refused(
                "config", "set", "on_dead", line, code=2)
        assert drain(1) == 0 and len(jobs()) == 1

    @windows_only
    def test_a_folder_is_stored_with_its_drive_or_refused(self, home):
        drive = os.path.splitdrive(os.getcwd())[0]
        run_ok("enqueue", "--id", "x", "--cwd", drive, "--", "cd")
        run_ok("enqueue", "--id", "y", "--cwd", drive + "..", "--", "cd")
        assert [job["cwd"] for job in jobs().values()] == [str(home), str(home.parent)]
        assert "a directory on a drive" in run_refused(
            "enqueue", "--cwd", "\\\\?\\" + str(home), "--", "cd", code=2)

    @posix_only
    @pytest.mark.parametrize("letter", ["x", "é"])
    def test_a_command_too_long_for_the_system_is_refused(self, letter):
        line = ": '" + letter * ((131071 - 5) // len(letter.encode())) + "';"
        line += " " * (131071 - len(line.encode()))
        assert "131071" in run_refused(
            "enqueue", "-", stdin=json.dumps({"command": line + " "}).encode(), code=2)
        assert "131071" in run_refused("config", "set", "on_dead", line + " ", code=2)
        name = enqueue(line, max_retries=1)
        assert len(jobs()) == 1 and drain(1) == 0 and state_of(name) == "completed"

    @posix_only
    def test_a_variable_too_long_for_the_system_is_refused(self):
        assert "env" in run_refused("enqueue", "-", code=2, stdin=json.dumps(
            {"command": "true", "env": {"A": "x" * 131070}}).encode())
        name = enqueue(env={"A": "x" * 131069}, max_retries=1)
        assert drain(1) == 0 and state_of(name) == "completed"


class TestKeep:
    """The setting `keep`: pools delete jobs completed long ago."""

    @mechanism
    def test_old_completed_jobs_are_deleted_in_batches(self, queue, clock, monkeypatch):
        monkeypatch.setattr(queuectl, "BATCH_SIZE", 2)
        for n in range(3):
            add_job(queue, id="done%d" % n)
            queue.complete(claim(queue), make_outcome(None))
        add_job(queue, id="waits")
        clock.now += 100
        assert queue.prune(100) == 0 and len(jobs()) == 4
        assert [queue.prune(99), queue.prune(99), queue.prune(99)] == [2, 1, 0]
        assert set(jobs()) == {"waits"}

    @mechanism
    def test_old_jobs_behind_many_others_are_found_at_once(self, queue, clock):
        add_jobs(queue, ({"command": "true", "delay": DAY} for _ in range(20000)))
        for n in range(20):
            add_job(queue, id="done%d" % n)
            queue.complete(claim(queue), make_outcome(None))
        clock.now += 100
        began = time.monotonic()
        assert queue.prune(99) == 20 and time.monotonic() - began < 0.2

    def test_a_pool_deletes_completed_jobs_while_it_runs(self):
        configure("keep", "0")
        assert run_ok("config", "get", "keep").out == "0s\n"
        enqueue(id="x")
        pool = start_pool()
        wait_until(lambda: not jobs())
        assert pool.poll() is None
        configure("keep", "forever")
        assert run_ok("config", "get", "keep").out == "forever\n"

    def test_the_space_of_old_jobs_is_given_back(self, queue):
        add_jobs(queue, [{"command": "true " + "x" * 8000}] * 1200)
        for _ in range(1200):
            queue.complete(claim(queue), make_outcome(None))
        queue.close()
        full = os.path.getsize("queuectl.db")
        configure("keep", "1d")  # the clock of these jobs stands in 2001
        start_pool(count=1)
        wait_until(lambda: not jobs())
        run_ok("worker", "stop")
        assert os.path.getsize("queuectl.db") < full / 2

    @posix_only
    def test_only_completed_jobs_are_deleted_and_their_number_logged(self):
        run_ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 30)
        enqueue("exit 1", id="bad", max_retries=1)
        enqueue(id="waits", delay=3600)
        assert drain() == 1
        run_ok("cancel", enqueue(id="no"))
        configure("keep", "0")
        start_pool(count=1)
        wait_until(lambda: set(jobs()) == {"bad", "waits", "no"})
        reported = lambda: re.findall(
            r"keep: removed (\d+) jobs?\n", read_text("queuectl.log"))
        wait_until(reported)
        enqueue(id="one")
        wait_until(lambda: sum(map(int, reported())) == 31)
        assert len(reported()) == 2 and set(jobs()) == {"bad", "waits", "no"}


# The supervisor is killed after it started a hook and before it records that.
KILLED_IN_HOOK = """
import subprocess
def popen(*args, popen=subprocess.Popen, **options):
    hook = popen(*args, **options)
    if queuectl.os.path.exists("kill"):
        queuectl.os.remove("kill")
        queuectl.os.kill(queuectl.os.getpid(), queuectl.KILL)
    return hook
subprocess.Popen = popen
"""


class TestOnDead:
    """The setting `on_dead`: a command is started for each death."""

    def test_it_gets_the_job_and_its_failure_does_no_harm(self):
        configure("on_dead", python_command(
            "import sys; open('dead.json', 'w').write(sys.stdin.read());"
            " print('connecting'); sys.exit('no smtp')"))
        enqueue("exit 3", id="x", max_retries=1)
        assert drain() == 1
        printed = read_text("dead.json")
        # Without it `read` in a shell would report a missing line.
        assert printed.endswith("}\n")
        job = json.loads(printed)
        assert (job["id"], job["state"], job["error"]) == ("x", "dead", "exit 3")
        assert "on_dead for x: exit 1: no smtp\n" in read_text("queuectl.log")
        enqueue("exit 3", id="y", max_retries=1, cwd=os.getcwd())
        configure("on_dead", "no-such-command")
        assert drain() == 1 and state_of("y") == "dead"

    def test_no_job_waits_for_it(self):
        configure("on_dead", LONG_COMMAND)
        enqueue("exit 3", max_retries=1)
        enqueue(id="next")
        pool = start_pool(count=1)
        wait_until(lambda: state_of("next") == "completed" and live_commands())
        assert pool.poll() is None

    @mechanism
    def test_it_is_started_without_a_folder_but_not_after_a_cancel(self, queue):
        queue.set(
            "on_dead",
            python_command("import sys; open('told', 'a').write(sys.stdin.read())"))
        os.mkdir("gone")
        enqueue(id="x", max_retries=1, cwd="gone")
        os.rmdir("gone")
        assert drain() == 1 and '"id": "x"' in read_text("told")
        add_job(queue, id="y")
        queue.cancel(["y"])
        assert not queue.announce_dead_job(lambda job: pytest.fail("announced"))
        add_job(queue, id="z")
        run = claim(queue)
        queue.cancel(["z"])
        queue.fail(run, make_outcome())
        assert not queue.announce_dead_job(lambda job: pytest.fail("announced"))

    @mechanism
    def test_it_is_not_started_for_a_cancelled_run(self, queue):
        queue.set("on_dead", "true")
        add_job(queue)
        run = claim(queue)
        queue.cancel(["job"])
        assert queue.release(run, make_outcome("cancelled")) == "dead"
        assert not queue.announce_dead_job(pytest.fail)

    @mechanism
    def test_it_is_started_once_a_death_and_not_for_retried_jobs(self, queue):
        queue.set("on_dead", "true")
        announced = []
        start = lambda job: announced.append(job["id"])
        for name in ("a", "b", "c", "d"):
            add_job(queue, id=name, max_retries=1)
            if name == "c":
                queue.cancel(["c"])
            else:
                queue.fail(claim(queue), make_outcome())
        queue.retry(["a"])
        run_ok("enqueue", "--unique", "--id", "d", "--", "true")
        while queue.announce_dead_job(start):
            pass
        assert announced == ["b"]
        queue.fail(claim(queue), make_outcome())
        while queue.announce_dead_job(start):
            pass
        assert announced == ["b", "a"]

    @mechanism
    def test_an_unannounced_death_does_not_hide_the_next(self, queue):
        queue.set("on_dead", "true")
        announced = []
        add_job(queue, max_retries=1)
        for _ in range(2):
            queue.fail(claim(queue), make_outcome())
            queue.retry(["job"])
        assert queue.fail(claim(queue), make_outcome()) == "dead"
        while queue.announce_dead_job(lambda job: announced.append(job["id"])):
            pass
        assert announced == ["job"]

    @mechanism
    def test_deaths_before_it_was_set_are_not_announced(self, queue):
        add_job(queue, max_retries=1)
        queue.fail(claim(queue), make_outcome())
        make_reaper(queue).announce_dead_jobs(queue)
        queue.set("on_dead", "true")
        assert not queue.announce_dead_job(pytest.fail)

    @mechanism
    @posix_only
    def test_few_of_them_run_at_a_time(self, queue):
        queue.set("on_dead", LONG_COMMAND)
        for n in range(queuectl.MAX_HOOKS + 3):
            add_job(queue, id="x%d" % n, max_retries=1)
            queue.fail(claim(queue), make_outcome())
        reaper = make_reaper(queue)
        assert (
            reaper.announce_dead_jobs(queue)
            == reaper.announce_dead_jobs(queue)
            == queuectl.MAX_HOOKS)
        for hook in reaper.hooks:
            os.killpg(hook.pid, signal.SIGKILL)
            hook.wait(10)
        assert reaper.announce_dead_jobs(queue) == 3
        assert not queue.announce_dead_job(print)
        for hook in reaper.hooks:
            os.killpg(hook.pid, signal.SIGKILL)
            hook.wait(10)
        assert reaper.announce_dead_jobs(queue) == 0

    @posix_only
    def test_every_death_is_announced_whatever_is_killed(self):
        configure("on_dead", "cat >> told")
        open("told", "w").close()
        lines = [
            '{"id":"d%d","command":"exit 1","max_retries":1}' % n for n in range(60)]
        run_ok("enqueue", "-", stdin="\n".join(lines).encode())
        dead = lambda: read_status()["jobs"]["dead"]
        for n in range(4):
            pool = start_pool()
            wait_until(lambda: dead() >= 12 * (n + 1))
            kill_pool(pool)
        start_pool()
        announced = lambda: re.findall(r'\{"id": "(d\d+)"', read_text("told"))
        wait_until(lambda: len(set(announced())) == 60)
        assert dead() == 60
        assert set(re.findall(r'"state": "(\w+)"', read_text("told"))) == {"dead"}

    @posix_only
    def test_a_drain_announces_every_death_before_it_ends(self):
        configure("on_dead", "sleep 0.1; echo told >> told")
        lines = b"".join(
            b'{"command":"exit 1","max_retries":1}\n' for _ in range(30))
        run_ok("enqueue", "-", stdin=lines)
        drain()
        wait_until(lambda: read_text("told").count("told") == 30)

    @posix_only
    def test_a_stop_now_does_not_wait_for_those_that_hang(self):
        configure("on_dead", LONG_COMMAND)
        lines = b'{"command":"exit 1","max_retries":1}\n' * (queuectl.MAX_HOOKS + 2)
        run_ok("enqueue", "-", stdin=lines)
        pool = start_pool("--drain")
        wait_until(lambda: read_status()["jobs"]["dead"] == queuectl.MAX_HOOKS + 2)
        run_ok("worker", "stop", "--now")
        pool.wait(10)
        wait_until(lambda: "2 dead jobs left to the next pool" in read_text(
            "queuectl.log"))
        wait_until(lambda: len(live_commands()) == queuectl.MAX_HOOKS)
        for pid in live_commands():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not live_commands())

    @posix_only
    def test_its_queue_is_that_of_the_job(self):
        other = os.path.abspath("jobs.db")
        run_ok("config", "set", "on_dead", "echo $QUEUECTL_DB > told", "--db", other)
        run_ok("enqueue", "--db", other, "--max-retries", "1", "--", "exit 1")
        start_pool("--drain", "--db", other, count=1).wait()
        wait_until(lambda: os.path.exists("told") and read_text("told"))
        assert read_text("told") == other + "\n"

    @posix_only
    def test_it_needs_no_temporary_folder(self):
        configure("on_dead", "cat > told")
        enqueue("exit 1", id="x", max_retries=1)
        pool = start_pool("--drain", count=1, script="""
import tempfile
def find_none():
    raise FileNotFoundError("no usable temporary directory")
tempfile.tempdir, tempfile._get_default_tempdir = None, find_none
""")
        pool.wait()
        wait_until(lambda: os.path.exists("told") and '"id": "x"' in read_text("told"))

    @mechanism
    @posix_only
    def test_one_that_hangs_is_ended_and_lets_the_next_start(self, queue, monkeypatch):
        monkeypatch.setattr(queuectl, "MAX_HOOKS", 1)
        monkeypatch.setattr(queuectl, "HOOK_TIMEOUT", 0.1)
        queue.set("on_dead", LONG_COMMAND)
        for name in ("x", "y"):
            add_job(queue, id=name, max_retries=1)
            queue.fail(claim(queue), make_outcome())
        reaper = make_reaper(queue)

        def told():
            reaper.announce_dead_jobs(queue)
            return re.findall(r"on_dead.*", read_text("queuectl.log"))

        wait_until(lambda: "on_dead for y is ended after 0.1s" in told())
        wait_until(lambda: not reaper.announce_dead_jobs(queue))
        assert told()[:2] == [
            "on_dead: 1 run, 1 dead job wait", "on_dead for x is ended after 0.1s"]
        wait_until(lambda: not live_commands())

    @mechanism
    @posix_only
    def test_what_it_prints_cannot_fill_the_disk(self, queue, monkeypatch):
        monkeypatch.setattr(queuectl, "MAX_HOOK_OUTPUT", 1000)
        queue.set("on_dead", "seq 1000; touch printed; %s; echo over; touch said;"
                  " while test -e go; do sleep 0.05; done; exit 3" % UNTIL_GO)
        add_job(queue, id="x", max_retries=1)
        queue.fail(claim(queue), make_outcome())
        reaper = make_reaper(queue)
        reaper.announce_dead_jobs(queue)
        (hook,) = reaper.hooks.values()
        wait_until(lambda: os.path.exists("printed"))
        reaper.announce_dead_jobs(queue)
        assert os.fstat(hook.output.fileno()).st_size == 0
        open("go", "w").close()
        wait_until(lambda: os.path.exists("said"))
        reaper.announce_dead_jobs(queue)  # nothing is too long now
        os.remove("go")
        wait_until(lambda: not reaper.announce_dead_jobs(queue))
        assert "on_dead for x: exit 3: over\n" in read_text("queuectl.log")

    @fork_only
    def test_a_pool_killed_during_an_announcement_repeats_it(self):
        configure("on_dead", "cat >> told; echo >> told")
        open("kill", "w").close()
        pool = start_pool(count=1, script=KILLED_IN_HOOK)
        enqueue("exit 1", id="x", max_retries=1)
        assert pool.wait(20) == -KILL
        start_pool(count=1)
        wait_until(
            lambda: os.path.exists("told") and read_text("told").count('"id": "x"') == 2
        )

    @fork_only
    def test_beside_a_queue_on_a_network_share_it_is_refused(self):
        configure("on_dead", "echo told > told")
        enqueue("exit 1", max_retries=1)
        pool = start_pool(
            count=1, script="queuectl.is_network_path = lambda path: True")
        wait_until(lambda: "cmd.exe can't run beside" in read_text("queuectl.log"))
        assert run_ok("worker", "stop").code == pool.wait(20) == 0
        assert not os.path.exists("told")

    @fork_only
    def test_a_drain_ends_with_1_when_it_cannot_be_started(self):
        configure("on_dead", "true")
        enqueue("exit 1", max_retries=1)
        pool = start_pool("--drain", count=1, script="""
import subprocess
def popen(*args, **options):
    raise OSError(queuectl.errno.EAGAIN, "no process")
subprocess.Popen = popen
""")
        assert pool.wait(20) == 1


# ======================================================================================
# Dependencies and locks
# ======================================================================================


class TestDependencies:
    """A job waits until all jobs named in `after` are completed."""

    def test_a_chain_a_fan_out_and_a_fan_in_run_in_order(self):
        names = ["a", "b", "c", "d", "e"]
        after = {"b": "a", "c": "a", "d": ["b", "c"], "e": ["d"]}
        given = [{"id": name, "command": "true", "after": after.get(name)}
                 for name in names[::-1]]  # the last job first
        run_ok("enqueue", json.dumps(given))
        assert drain() == 0
        began = run_order()
        assert (began[0], sorted(began[1:3]), began[3:]) == (
            "a", ["b", "c"], ["d", "e"])
        assert sorted(jobs()["d"]["after"]) == ["b", "c"]
        assert jobs()["d"]["waits_for"] == []

    @posix_only
    def test_a_job_behind_a_dead_one_runs_after_its_retry(self):
        enqueue("test -e mended", id="build", max_retries=1)
        run_ok("enqueue", "--id", "test", "--after", "build", "--", "true")
        run_ok(
            "enqueue", "--id", "deploy", "--after", "test", "--after", "build", "--",
            "true")
        answer = drain_answer()
        assert answer.code == 1
        assert answer.err == (
            "queuectl: 0 completed, 1 dead, 2 blocked; 2 jobs left:"
            " test waits for build, which is dead\n")
        words = "waits for build, which is dead"
        assert words in run_ok("show", "test").out
        assert words + ", and for 1 more job" in run_ok("show", "deploy").out
        assert "Blocked: 2 jobs; test " + words in run_ok("status").out
        assert read_status()["blocked"] == 2
        answer = cli("wait", "test", "deploy", "--json")
        assert answer.code == 1 and sorted(answer.json["left"]) == ["deploy", "test"]
        assert words in cli("wait").out and cli("wait", "--timeout", "0").code == 1
        open("mended", "w").close()
        run_ok("dlq", "retry", "build")
        assert drain() == 0 and run_order() == ["build", "build", "test", "deploy"]

    def test_each_job_of_a_chain_says_that_one_before_it_is_dead(self):
        enqueue("exit 1", id="a", max_retries=1)
        for name, front in (("b", "a"), ("c", "b"), ("d", "c")):
            enqueue(id=name, after=[front])
        assert "behind" not in run_ok("show", "d").out
        drain()
        assert "waits for a, which is dead\n" in run_ok("show", "b").out
        assert "waits for c, behind a, which is dead\n" in (
            run_ok("show", "d").out)
        assert ("Blocked: 3 jobs; b waits for a, which is dead; to go on: queuectl.py"
                " retry a\n") in run_ok("status").out
        answer = cli("logs", "-f", "d")
        assert answer.code == 1 and "job d can't go on: waits for c" in answer.err

    def test_a_cancelled_dependent_that_is_retried_waits_again(self, queue):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        queue.cancel(["b"])
        queue.retry(["b"])
        assert queue.job("b")["gate"] == queuectl.CLOSED
        queue.complete(claim(queue), make_outcome(None))
        assert claim(queue).id == "b"

    @pytest.mark.parametrize("jobs_given, words", [
        ([("a", ["nope"])], "no job nope"), ([("a", ["a"])], "circle"),
        ([("a", ["b"]), ("b", ["a"])], "circle"),
        ([("a", ["c"]), ("b", ["a"]), ("c", ["b"])], "circle"),
        ([("a", ["first"]), ("b", ["gone"])], "no job gone"),
        ([("a", [""])], "after: "), ([("a", [3])], "after: "),
        ([("a", {})], "after: ")])
    def test_unknown_ids_and_circles_are_refused(self, jobs_given, words):
        enqueue(id="first")
        lines = [json.dumps({"id": id, "command": "true", "after": after})
                 for id, after in jobs_given]
        code = 2 if words == "after: " else 1
        assert words in run_refused("enqueue", *lines, code=code)
        assert list(jobs()) == ["first"]

    def test_an_edit_makes_no_circle_and_can_remove_a_dependency(self, queue):
        add_job(queue, id="a", after=[])
        add_job(queue, id="b", after=["a"])
        add_job(queue, id="c", after=["b"])
        assert "circle" in run_refused("edit", "a", "--after", "c")
        assert queue.job("a")["after"] is None and queue.job("a")["waits"] == 0
        run_ok("edit", "c", "--after", "a")
        assert details_of("c")["after"] == ["a"]
        run_ok("edit", "c", "--after", "none")
        gates = [queue.job(id)["gate"] for id in ("b", "c")]
        assert gates == [queuectl.CLOSED, queuectl.OPEN]
        queue.complete(claim(queue), make_outcome(None))
        run_ok("edit", "c", "--after", "a")  # it is completed: nothing to wait for
        assert queue.job("c")["waits"] == 0

    def test_completed_jobs_are_part_of_a_circle(self, queue):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        for _ in range(2):
            queue.complete(claim(queue), make_outcome(None))
        assert "circle" in run_refused(
            "enqueue", "--unique", "--id", "a", "--after", "b", "--", "true")
        assert state_of("a") == "completed"
        add_job(queue, id="c")
        run_ok("edit", "c", "--after", "b")
        assert "circle" in run_refused(
            "enqueue", "--unique", "--id", "a", "--after", "c", "--", "true")

    def test_a_dependent_waits_for_a_worker_since_it_was_freed(self, queue, clock):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        add_job(queue, id="later", after=["a"], delay=500)
        run = claim(queue)
        clock.now += 100
        queue.complete(run, make_outcome(None))
        assert tuple(queuectl.oldest_claimable(queue)) == ("b", clock.now)
        assert tuple(queue.next_due()) == ("later", clock.now + 400)

    def test_of_another_queue_it_drops_what_need_not_be_there(self):
        run_ok("enqueue", json.dumps([
            {"id": "a", "command": "true"},
            {"id": "b", "command": "true", "after": ["a"], "delay": 3600},
            {"id": "c", "command": "true", "after": ["a", "b"]}]))
        drain()
        moved = run_ok("list", "--state", "pending", "--json").out.encode()
        answer = run_ok("enqueue", "-", "--db", "other.db", stdin=moved)
        assert answer.err == ("queuectl: this queue has no jobs a: dropped from `after`"
                              " of 2 jobs\n")
        copied = jobs("--db", "other.db")
        assert copied["b"]["after"] == [] and copied["c"]["after"] == ["b"]
        lost = json.loads(moved)[1:]  # without b, which was not completed
        assert "no job b" in run_refused(
            "enqueue", "-", "--db", "third.db", stdin=json.dumps(lost).encode())

    def test_an_option_after_is_never_dropped(self):
        job = '{"command": "true", "after": ["gone"], "waits_for": []}'
        assert "there is no job nosuch" in run_refused("enqueue", job, "--after=nosuch")
        assert "none stands alone" in run_refused(
            "enqueue", job, "--after", "none", "--after", "a", code=2)

    def test_edits_make_no_circle_over_earlier_edits(self):
        for name in ("a", "b", "c"):
            enqueue(id=name)
        run_ok("edit", "a", "--after", "b")
        run_ok("edit", "b", "--after", "c")
        for words in (
            ["b", "--after", "a"], ["c", "--after", "a"], ["c", "--after", "c"]
        ):
            assert "circle" in run_refused("edit", *words)
        assert drain() == 0 and run_order() == ["c", "b", "a"]

    def test_a_dependent_of_a_deleted_job_is_dead_and_says_why(self, queue):
        add_job(queue, id="front")
        add_job(queue, id="x", after=["front"])
        add_job(queue, id="y", after=["x"])
        queue.delete_all(queuectl.where(text="front"))
        assert (state_of("x"), queue.job("x")["error"]) == (
            "dead", "a job that it came after was deleted")
        assert queue.counts()["dead"] == 1 and details_of("y")["after"] == ["x"]
        assert queue.next_due() is None  # it does not wait for a time
        queue.retry(["x"])
        assert claim(queue).id == "x"

    def test_a_dependent_died_when_its_job_was_deleted(self, queue):
        add_job(queue, id="front")
        add_job(queue, id="behind", after=["front"])
        before = time.time() - 1
        queue.delete_all(queuectl.where(["pending"], text="front"))
        job = queue.job("behind")
        assert job["state"] == "dead" and before < job["updated_at"] < time.time() + 1

    def test_dependencies_and_locks_are_kept_by_list_and_enqueue(self):
        run_ok("enqueue", "--id", "a", "--lock", "db", "--", "true")
        run_ok("enqueue", "--id", "b", "--after", "a", "--lock", "db", "--", "true")
        run_ok(
            "enqueue", "-", "--db", "other.db",
            stdin=run_ok("list", "--json").out.encode())
        copied = jobs("--db", "other.db")
        assert (copied["b"]["after"], copied["b"]["lock"]) == (["a"], "db")

    def test_thousands_of_dependents_are_freed_quickly(self, queue):
        add_job(queue, id="a")
        rows = ({"command": "true", "after": ["a"]} for _ in range(5000))
        add_jobs(queue, rows)
        run = claim(queue)
        assert claim(queue) is None
        began = time.monotonic()
        queue.complete(run, make_outcome(None))
        assert time.monotonic() - began < 2
        assert claim(queue) and claim(queue)


def open_jobs_of_locks(queue):
    """Return the id of the job that may be claimed, for each lock."""
    return {job["lock"]: job["id"] for job in queue.jobs() if job["lock"]
            and job["state"] == "pending" and job["gate"] == queuectl.OPEN}


# Each way in which a run ends.
RUN_ENDINGS = {
    "complete": lambda queue, run: queue.complete(run, make_outcome(None)),
    "fail": lambda queue, run: queue.fail(run, make_outcome()),
    "dead": lambda queue, run: queue.fail(run._replace(attempt=9), make_outcome()),
    "release": lambda queue, run: queue.release(run, make_outcome()),
    "cancel": lambda queue, run: (
        queue.cancel([run.id]), queue.fail(run, make_outcome())),
}


class TestLocks:
    """Jobs that share a lock run one at a time."""

    def test_a_second_lock_is_refused_not_dropped(self):
        enqueue(id="x")
        for words in (["enqueue", "--lock", "a", "--lock=b", "--", "true"],
                      ["edit", "x", "--lock", "a", "--lock", "b"]):
            assert "--lock: given twice" in run_refused(*words, code=2)
        assert list(jobs()) == ["x"]
        run_ok("edit", "x", "--lock", "a")
        assert jobs()["x"]["lock"] == "a"

    def test_one_job_of_a_lock_runs_at_a_time_the_highest_first(self, queue):
        for name, priority in (("low", 0), ("mid", 1), ("mid2", 1)):
            add_job(queue, id=name, lock="db", priority=priority)
        add_job(queue, id="other", lock="gpu", priority=-1)
        run = claim(queue)
        assert run.id == "mid"
        add_job(queue, id="high", lock="db", priority=2)
        assert claim(queue).id == "other" and claim(queue) is None
        queue.fail(run, make_outcome())  # it has no lock while it waits for its retry
        assert claim(queue).id == "high"

    @mechanism
    @pytest.mark.parametrize("verb", RUN_ENDINGS)
    def test_whatever_ends_a_run_passes_its_lock_on(self, queue, verb):
        for name in ("a", "b"):
            add_job(queue, id=name, lock="db")
        run = claim(queue)
        assert open_jobs_of_locks(queue) == {}
        RUN_ENDINGS[verb](queue, run)
        assert open_jobs_of_locks(queue) == {"db": "a" if verb == "release" else "b"}

    @mechanism
    def test_whatever_changes_a_waiting_job_passes_its_lock_on(self, queue, clock):
        for name, priority in (("a", 3), ("b", 2), ("c", 1)):
            add_job(queue, id=name, lock="db", priority=priority)
        add_job(queue, id="late", lock="db", priority=9, delay=60)
        assert open_jobs_of_locks(queue) == {"db": "a"}
        queue.cancel(["a"])
        assert open_jobs_of_locks(queue) == {"db": "b"}
        queue.retry(["a"])
        assert open_jobs_of_locks(queue) == {"db": "a"}
        queue.delete(["a"])
        assert open_jobs_of_locks(queue) == {"db": "b"}
        queue.edit("c", {"priority": 5})
        assert open_jobs_of_locks(queue) == {"db": "c"}
        queue.edit("c", {"lock": "gpu"})
        assert open_jobs_of_locks(queue) == {"db": "b", "gpu": "c"}
        queue.edit("c", {"lock": "none"})
        assert open_jobs_of_locks(queue) == {"db": "b"}
        assert queue.job("c")["gate"] == queuectl.OPEN
        queue.edit("c", {"lock": "db"})
        assert open_jobs_of_locks(queue) == {"db": "c"}
        clock.now += 61
        queue.promote(clock.now)
        assert open_jobs_of_locks(queue) == {"db": "late"}
        queue.complete(claim(queue), make_outcome(None))
        run_ok("enqueue", "--unique", "--id", "late", "--lock", "gpu", "--", "true")
        queue.promote(time.time())
        assert open_jobs_of_locks(queue) == {"db": "c", "gpu": "late"}
        queue.delete_all(queuectl.where(["pending"]))
        assert open_jobs_of_locks(queue) == {}

    @posix_only
    def test_a_lock_holds_across_pools_and_kills(self):
        command = "mkdir held || exit 9; sleep 0.05; rmdir held"
        job = {"command": command, "lock": "l", "max_retries": 1}
        run_ok("enqueue", json.dumps([job] * 12))
        enqueue(
            "test -e begun && exit 0; touch begun; " + LONG_COMMAND, id="killed",
            lock="l", priority=1)
        pool = start_pool()
        wait_until(lambda: os.path.exists("begun"))
        kill_pool(pool)
        pools = [start_pool(), start_pool()]
        wait_until(lambda: read_status()["jobs"]["completed"] == 13)
        assert all(pool.poll() is None for pool in pools)
        assert run_errors("killed")[0] == "worker died"
        (_, ended), *others = query(
            "SELECT started_at, finished_at FROM runs ORDER BY started_at")
        assert len(others) == 13 and all(began >= ended for began, _ in others)

    def test_thousands_behind_a_lock_slow_no_claim(self, queue):
        rows = ({"command": "true", "lock": "db"} for _ in range(20000))
        add_jobs(queue, rows)
        rows = (
            {"command": "true", "id": "x%d" % n, "priority": -1} for n in range(200))
        add_jobs(queue, rows)
        first, began = claim(queue), time.monotonic()
        for _ in range(100):
            assert claim(queue).id.startswith("x")
        assert time.monotonic() - began < 1
        began = time.monotonic()
        queue.complete(first, make_outcome(None))
        assert len(claim(queue).id) == 6 and time.monotonic() - began < 0.2


# Each row of this query is a mistake.
WRONG_GATES = """
SELECT 'two of a lock', lock FROM jobs
    WHERE lock NOT NULL AND (state = 'processing' OR state = 'pending' AND gate = 1)
    GROUP BY lock HAVING COUNT(*) > 1
UNION ALL SELECT 'none of a lock', lock FROM jobs
    WHERE lock NOT NULL AND (state = 'processing' OR state = 'pending' AND gate > 0)
    GROUP BY lock HAVING SUM(state = 'processing' OR gate = 1) = 0
UNION ALL SELECT 'not the first of a lock', a.id
    FROM jobs a JOIN jobs b ON a.lock = b.lock
    WHERE a.state = 'pending' AND a.gate = 1 AND b.state = 'pending' AND b.gate = 2
    AND (b.priority > a.priority
        OR b.priority = a.priority AND (b.run_at, b.seq) < (a.run_at, a.seq))
UNION ALL SELECT 'waits miscounted', id FROM jobs
    WHERE waits <> (SELECT COUNT(*) FROM dependencies JOIN jobs AS other
        ON other.seq = waits_for
        WHERE dependencies.seq = jobs.seq AND other.state <> 'completed')
UNION ALL SELECT 'locked without a lock', id FROM jobs WHERE gate = 2 AND lock IS NULL
UNION ALL SELECT 'not waiting, but not open', id FROM jobs
    WHERE state <> 'pending' AND state <> 'failed' AND gate <> 1
UNION ALL SELECT 'open, but it waits for others or a time', id FROM jobs
    WHERE state = 'pending' AND gate > 0 AND (waits > 0 OR run_at > updated_at)
UNION ALL SELECT 'failed, but it waits for others, or is open', id FROM jobs
    WHERE state = 'failed' AND (waits > 0 OR gate <> 0)
UNION ALL SELECT 'closed, though nothing will open it', id FROM jobs
    WHERE waits = 0 AND gate = 0 AND run_at <= ?
UNION ALL SELECT 'depends on nobody', seq FROM dependencies
    WHERE waits_for NOT IN (SELECT seq FROM jobs)
UNION ALL SELECT 'is nobody', seq FROM dependencies
    WHERE seq NOT IN (SELECT seq FROM jobs)
UNION ALL SELECT 'counts are wrong', state FROM counts
    WHERE jobs <> (SELECT COUNT(*) FROM jobs WHERE jobs.state = counts.state)
"""


class RandomOperations:
    """Do random operations on a queue with few jobs, dependencies and locks."""

    NAMES = ["j%d" % n for n in range(12)]

    def __init__(self, queue, seed):
        self.queue, self.rnd, self.runs = queue, random.Random(seed), []
        self.verbs = [
            *[self.enqueue] * 3, *[self.claim] * 2, *[self.end] * 2, self.edit,
            *[lambda verb=verb: verb([self.name()]) for verb in (
                queue.cancel, queue.retry, queue.run_now)],
            lambda: queue.delete(self.rnd.sample(self.NAMES, self.rnd.randint(1, 3))),
            *[lambda verb=verb: self.do_to_many(verb) for verb in (
                queue.cancel_all, queue.retry_all, queue.delete_all,
                queue.run_now_all)]]

    def step(self):
        """Do one operation, whether it is refused or not."""
        with contextlib.suppress(queuectl.QueueError):
            self.rnd.choice(self.verbs)()

    def name(self):
        return self.rnd.choice(self.NAMES)

    def some_fields(self):
        """Return each of these fields with a probability of 0.4."""
        rnd = self.rnd
        fields = {"after": lambda: rnd.sample(self.NAMES, rnd.randint(1, 2)),
                  "max_retries": lambda: 1,
                  "lock": lambda: rnd.choice("abc"),
                  "priority": lambda: rnd.randint(-1, 1),
                  "delay": lambda: rnd.choice([0, 5, 50])}
        return {name: value() for name, value in fields.items() if rnd.random() < 0.4}

    def enqueue(self):
        job = dict(self.some_fields(), id=self.name(), command="true")
        checked = queuectl.checked_job(job, self.queue.defaults())
        self.queue.enqueue([checked], unique=self.rnd.random() < 0.5)

    def edit(self):
        self.queue.edit(self.name(), self.some_fields())

    def claim(self):
        run = claim(self.queue)
        if run:
            self.runs.append(run)

    def end(self):
        if self.runs:
            run = self.runs.pop(self.rnd.randrange(len(self.runs)))
            verb = self.rnd.choice(["complete", "release", "fail"])
            error = None if verb == "complete" else "exit 1"
            getattr(self.queue, verb)(run, make_outcome(error))

    def do_to_many(self, verb):
        if self.rnd.random() < 0.1:
            chosen = queuectl.where(
                self.rnd.sample([*queuectl.STATES], 2), text=self.rnd.choice(["", "1"]))
            verb(self.rnd.choice([chosen, queuectl.split_by_need(chosen)[0]]))

    def complete_one(self):
        """Claim a job if one is claimable, and complete a run."""
        self.claim()
        if self.runs:
            self.queue.complete(self.runs.pop(), make_outcome(None))


class TestClockSteps:
    """A clock that was set back makes nobody wait who named no time."""

    @pytest.mark.parametrize("lock", [None, "l"])
    def test_a_due_job_does_not_stand_behind_new_ones(self, queue, clock, lock):
        for name in ("first", "second"):
            add_job(queue, id=name, lock=lock)
            clock.now += 1
        clock.now -= 3600
        add_job(queue, id="new", lock=lock)
        clock.now += 1
        queue.promote_after_clock_step(None)
        assert queue.job("first")["run_at"] == clock.now
        assert [claim_and_complete(queue) for _ in range(3)] == [
            "new", "first", "second"]

    def test_a_step_back_is_noticed_while_a_pool_runs(self, queue, clock):
        queue.promote_after_clock_step(None)
        add_job(queue, id="old")
        add_job(queue, id="later", run_at=clock.now + 7200)
        queue.promote_after_clock_step(None)
        due = clock.now
        clock.now -= 3600
        queue.promote_after_clock_step(None)
        assert queue.job("old")["run_at"] == clock.now
        assert queue.job("later")["run_at"] == due + 7200

    @pytest.mark.parametrize("change", [
        {"priority": 1}, {"command": "exit 2"}, {"lock": "l"}, {"after": ["done"]}])
    def test_an_edit_does_not_hide_that_a_job_failed_before(self, queue, clock, change):
        add_job(queue, id="done")
        queue.complete(claim(queue), make_outcome(None))
        add_job(queue, id="x")
        queue.fail(claim(queue), make_outcome())
        clock.now -= 86400
        queue.edit("x", change)
        queue.promote_after_clock_step(None)
        assert claim(queue).id == "x"

    def test_an_edit_of_a_failed_job_keeps_the_time_of_its_next_try(self, queue, clock):
        add_job(queue, id="x")
        queue.fail(claim(queue), make_outcome())
        due = queue.job("x")["run_at"]
        add_job(queue, id="first")
        queue.edit("x", {"after": ["first"]})
        queue.complete(claim(queue), make_outcome(None))
        assert queue.job("x")["run_at"] == due > clock.now and claim(queue) is None


class TestGate:
    """The gate decides whether a job may be claimed."""

    @mechanism
    @pytest.mark.parametrize("seed", range(int(os.environ.get("GATE_SEEDS", 6))))
    def test_the_gate_is_right_after_random_operations(self, queue, clock, seed):
        operations = RandomOperations(queue, seed)
        for _ in range(1200):
            clock.now += operations.rnd.choice([0, 0, 0, 0, 1, 1, 10, 10, -30])
            operations.step()
            queue.promote(clock.now)
            queue.promote_after_clock_step(None)
            assert [tuple(row) for row in queue.rows(WRONG_GATES, clock.now)] == []
            # There is an order, so there is no circle.
            queue._in_order([seq for seq, in query("SELECT seq FROM dependencies")])
        # None is stuck.
        while operations.runs or queue.next_due() or queue.has_claimable():
            clock.now += 10**6
            operations.complete_one()
        left = [
            job for job in queue.jobs() if job["state"] not in ("completed", "dead")]
        assert {job["state"] for job in left} <= {"pending"} and queue.is_drained()
        assert {job["seq"] for job in left} <= queue.blocked_seqs()


# ======================================================================================
# Launchers
# ======================================================================================

# The client of an engine runs its arguments in another session, without inherited
# files, as on another machine. It passes on their output, and ends them on SIGTERM.
ENGINE_CLIENT = """#!%s
import os, signal, subprocess, sys
env = {name: value for name, value in os.environ.items() if name != "QUEUECTL_RUN"}
far = subprocess.Popen(sys.argv[1:], env=env, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: os.killpg(far.pid, signal.SIGTERM))
for part in iter(lambda: os.read(far.stdout.fileno(), 4096), b""):
    os.write(1, part)
code = far.wait()
sys.exit(code if code >= 0 else 128 - code)
""" % sys.executable


@pytest.fixture
def client(tmp_path):
    """Write the client as an executable file. Return its path."""
    path = tmp_path / "client"
    path.write_text(ENGINE_CLIENT)
    path.chmod(0o755)
    return str(path)


class TestLaunchers:
    """A launcher starts the command of a job elsewhere."""

    def test_a_launcher_is_put_before_the_shell(self):
        with open("via.py", "w") as file:
            file.write("import subprocess, sys\nprint(sys.argv[1], flush=True)\n"
                       "sys.exit(subprocess.call(sys.argv[2:]))")

        def via(word):
            return "'%s' '%s' '%s'" % (sys.executable, os.path.abspath("via.py"), word)

        configure("launcher", via("a  b"))
        configure("max_retries", "1")
        run_ok("enqueue", "--id", "x", "--", "exit 3")
        run_ok("enqueue", "--id", "own", "--launcher", via("own"), "--", "echo told")
        run_ok("enqueue", "--id", "none", "--launcher", "none", "--", "echo told")
        run_ok("enqueue", "--id", "quoted", "--", 'echo "c  d" && echo e')
        drain()
        assert [
            run_ok("logs", name).out.replace("\r", "").replace(" \n", "\n")
            for name in ("x", "own", "none")] == ["a  b\n", "own\ntold\n", "told\n"]
        assert re.search('c  d"?\\s+e', run_ok("logs", "quoted").out)
        assert jobs()["x"]["exit_code"] == 3 and jobs()["x"]["launcher"] is None
        assert via("own") in run_ok("show", "own").out

    @windows_only
    @pytest.mark.parametrize("launcher", [
        "through", "through.cmd", "'bin\\through.cmd'"])
    def test_a_batch_file_is_a_launcher(self, launcher, monkeypatch, home):
        os.mkdir("bin")
        with open("bin\\through.cmd", "w") as file:
            file.write("@echo through\n@%*\n")
        monkeypatch.setenv("PATH", str(home / "bin"), prepend=os.pathsep)
        enqueue('echo "a  b"', id="x", launcher=launcher)
        drain(1)
        assert run_ok("logs", "x").out.split() == ["through", '"a', 'b"']

    @windows_only
    def test_a_script_without_its_interpreter_is_no_launcher(self, monkeypatch):
        open("through.py", "w").close()
        monkeypatch.setenv("PATHEXT", ".PY", prepend=os.pathsep)
        assert "name its interpreter" in run_refused(
            "config", "set", "launcher", "./through.py", code=2)

    @posix_only
    @pytest.mark.parametrize("launcher", [
        "sh -c", "env X=1 /bin/sh -ec", "nice sh -lc", "env ssh host", "env SSH.EXE h",
        "nice su -c", "env script -qc", "env parallel --", "env sg root"])
    def test_launchers_that_join_words_are_refused(self, launcher):
        assert "write a script" in run_refused(
            "config", "set", "launcher", launcher, code=2)
        assert "write a script" in run_refused(
            "enqueue", "--launcher", launcher, "--", "true", code=2)

    @posix_only
    @pytest.mark.parametrize("launcher", [
        "nice -n 1", "env shell=sh", "./srun -Q -c 4"])
    def test_launchers_that_keep_words_apart_run(self, launcher):
        with open("srun", "w") as file:
            file.write('#!/bin/sh\nshift 3; exec "$@"\n')
        os.chmod("srun", 0o755)
        enqueue("echo 'a  b'; exit 3", id="x", launcher=launcher, max_retries=1)
        drain(1)
        assert run_ok("logs", "x").out == "a  b\n" and jobs()["x"]["exit_code"] == 3

    @posix_only
    @pytest.mark.parametrize("launcher, error", [
        ("env #", "exit 127"), ("env ;", "exit 127"), ("nice # ", "exit 127"),
        ("env & true", "exit 127"), ("env X=$(exit)\n", None)])
    def test_no_launcher_keeps_a_command_from_running(self, launcher, error):
        enqueue("touch ran", id="x", launcher=launcher, max_retries=1)
        drain(1)
        assert details_of("x")["error"] == error
        assert os.path.exists("ran") == (error is None)

    @pytest.mark.parametrize("launcher", ["no-such-program -n1", "nice 'x", " ", "\0"])
    def test_bad_launchers_are_refused(self, launcher):
        assert "launcher" in run_refused("config", "set", "launcher", launcher, code=2)
        line = json.dumps({"command": "true", "launcher": launcher})
        assert "launcher" in run_refused("enqueue", line, code=2)

    @posix_only
    def test_the_log_has_a_line_for_an_odd_directory(self):
        os.mkdir("a\n\x1b[2J")
        enqueue("true", id="x", cwd=os.path.abspath("a\n\x1b[2J"), max_retries=1)
        os.rmdir("a\n\x1b[2J")
        drain(1)
        assert details_of("x")["state"] == "dead"
        assert "\x1b" not in read_text("queuectl.log")

    @posix_only
    def test_a_launcher_that_fails_is_a_failure_of_the_run(self, client):
        run_ok(
            "enqueue", "--id", "x", "--max-retries", "2", "--launcher", client, "--",
            "true")
        configure("backoff_base", "0")
        with open(client, "w") as file:
            file.write("#!/bin/sh\necho no such node; exit 9\n")
        drain()
        job = jobs()["x"]
        assert (job["state"], job["attempts"], job["error"]) == ("dead", 2, "exit 9")
        assert run_ok("logs", "x").out == "no such node\n"
        os.remove(client)
        run_ok("dlq", "retry", "x")
        drain()
        assert jobs()["x"]["error"] == "exit 127" and client in run_ok("logs", "x").out

    @posix_only
    @pytest.mark.parametrize("how", ["timeout", "cancel", "stop --now"])
    def test_a_process_elsewhere_ends_with_its_run(self, client, how):
        words = ["--timeout", "1"] if how == "timeout" else []
        run_ok(
            "enqueue", "--id", "x", "--max-retries", "1", "--launcher", client,
            *words, "--", LONG_COMMAND)
        start_pool()
        wait_until(live_commands)
        if how == "cancel":
            run_ok("cancel", "x")
        elif how == "stop --now":
            run_ok("worker", "stop", "--now")
        wait_until(lambda: state_of("x") in ("dead", "pending"))
        assert not live_commands()

    @posix_only
    def test_a_launcher_that_had_to_be_killed_is_logged(self, client):
        with open(client, "w") as file:
            file.write("#!/bin/sh\ntrap '' TERM; while :; do sleep 0.1; done\n")
        run_ok(
            "enqueue", "--id", "x", "--max-retries", "1", "--timeout", "0.2",
            "--launcher", client, "--", "true")
        start_pool(script="queuectl.TERM_GRACE = 0.2")
        wait_until(lambda: state_of("x") == "dead")
        wait_until(lambda: "launcher was killed" in read_text("queuectl.log"))

    @posix_only
    def test_a_run_elsewhere_of_a_killed_pool_ends_before_the_next(self, client):
        run_ok(
            "enqueue", "--id", "x", "--launcher", client, "--", LONG_COMMAND + " once")
        pool = start_pool(count=1)
        wait_until(live_commands)
        kill_pool(pool)
        configure("launcher", "none")
        start_pool(count=1)
        wait_until(lambda: state_of("x") == "completed")
        assert [run["error"] for run in details_of("x")["runs"]] == [
            "worker died", None]
        assert not os.path.exists("overlaps") and not live_commands()


# ======================================================================================
# Differences between systems
# ======================================================================================


# A program that is a terminal: its children end with it, unless they break away.
IN_JOB_OBJECT = """
import ctypes, subprocess, sys
from ctypes import wintypes
kernel = ctypes.WinDLL("kernel32")
kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = wintypes.HANDLE
job = wintypes.HANDLE(kernel.CreateJobObjectW(None, None))
limits = (wintypes.DWORD * (36 if sys.maxsize > 2**32 else 28))()
limits[4] = 0x2800  # kill on close, breakaway allowed
assert kernel.SetInformationJobObject(job, 9, limits, ctypes.sizeof(limits))
assert kernel.AssignProcessToJobObject(
    job, wintypes.HANDLE(kernel.GetCurrentProcess()))
sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""


class TestSystems:
    """Locales, clocks and file systems."""

    @posix_only
    def test_an_ascii_terminal_breaks_no_output(self):
        enqueue("echo Zoë; echo Zoë ✓ >&2", id="Zoë ✓")
        env = dict(os.environ, LC_ALL="C", PYTHONIOENCODING="ascii")
        assert run_process("worker", "start", "--drain", env=env).returncode == 0
        for words in (
            "list", "status", "list --json", "show Zoë\xa0✓", "logs Zoë\xa0✓"
        ):
            words = [word.replace("\xa0", " ") for word in words.split(" ")]
            answer = subprocess.run(
                [sys.executable, COMPILED, *words], env=env, timeout=30,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert (answer.returncode, answer.stderr) == (0, b""), words
            assert answer.stdout

    @posix_only
    def test_the_locale_c_runs_commands_that_are_not_ascii(self):
        os.mkdir("é")
        env = dict(os.environ, LC_ALL="C")
        for words in (
            ["enqueue", "--id", "ü", "--cwd", "é", "--env", "Ä=ß", "--", "echo ö; pwd"],
            ["worker", "start", "--drain"]
        ):
            answer = run_process("--db", "é/q.db", *words, env=env)
            assert answer.returncode == 0, answer.stderr
        assert run_ok("logs", "ü", "--db", "é/q.db").out == "ö\n%s/é\n" % os.getcwd()
        assert run_ok("show", "ü", "--json", "--db", "é/q.db").json["env"] == {"Ä": "ß"}

    @posix_only
    def test_a_pool_in_another_locale_runs_commands_that_are_not_ascii(self):
        os.mkdir("é")
        enqueue("echo ö $A; pwd", id="x", cwd="é", env={"A": "ß"})
        env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        answer = run_process("worker", "start", "--drain", env=env)
        assert answer.returncode == 0, answer.stderr
        assert run_ok("logs", "x").out == "ö ß\n%s/é\n" % os.getcwd()

    @posix_only
    def test_a_pool_raises_its_limit_of_open_files_or_refuses(self):
        enqueue(id="x")
        limited = lambda limit: subprocess.run(
            ["sh", "-c", "ulimit %s; shift; exec \"$@\"" % limit, "sh", "",
             sys.executable, COMPILED, "worker", "start", "--count", "40", "--drain"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            timeout=60)
        answer = limited("-n 90")
        assert answer.returncode == 1 and answer.stderr == (
            "queuectl: --count 40 needs 104 open files, and this system allows 90: at"
            " most --count 26\n")
        assert limited("-S -n 90").returncode == 0 and state_of("x") == "completed"

    @posix_only
    def test_a_pool_that_cannot_list_processes_does_not_start(self):
        enqueue(id="x")
        pool = start_process("worker", "start", program=QUICK + WITHOUT_PROC + """
queuectl.os.environ["PATH"] = "/nowhere"
""")
        assert pool.wait() == 1
        assert "processes can't be listed" in pool.stderr.read()
        assert state_of("x") == "pending"

    @posix_only
    def test_a_blocked_signal_stops_a_pool(self):
        pool = subprocess.Popen(
            [sys.executable, COMPILED, "worker", "start"], stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.pthread_sigmask(
                signal.SIG_BLOCK, queuectl.STOP_SIGNALS))
        pool.stdout.readline()
        pool.terminate()
        assert pool.wait(20) == 0
        pool.stdout.close()

    @pytest.mark.parametrize(
        "linked", [False, pytest.param(True, marks=posix_only)])
    def test_a_file_beside_the_script_is_not_the_library(self, linked):
        os.mkdir("app")
        for name in ("logging", "select", "token", "json", "subprocess", "sqlite3"):
            with open(os.path.join("app", name + ".py"), "w") as file:
                file.write("raise SystemExit('mine')")
        own = shutil.copy(SCRIPT, os.path.join("app", "queuectl.py"))
        if linked:
            os.symlink(os.path.abspath(own), "link.py")
            own = "link.py"
        for words in (["enqueue", "--id", "x", "--", "exit 0"],
                      ["worker", "start", "--drain"]):
            answer = subprocess.run([sys.executable, own, *words],
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert (answer.returncode, b"mine" in answer.stderr) == (0, False)
        assert state_of("x") == "completed"

    def test_a_worker_imports_nothing_from_the_current_folder(self):
        for name in ("multiprocessing", "random", "pickle", "logging", "struct"):
            with open(name + ".py", "w") as file:
                file.write("open('mine', 'w')")
        run_process("enqueue", "--id", "x", "--", "exit 0")
        assert run_process("worker", "start", "--drain").returncode == 0
        assert state_of("x") == "completed" and not os.path.exists("mine")

    def test_a_command_does_not_read_the_input_of_its_pool(self):
        enqueue(python_command("import sys; print([*sys.stdin])"), id="x")
        subprocess.run([sys.executable, COMPILED, "worker", "start", "--drain"],
                       input=b"secret", stdout=subprocess.PIPE, timeout=60)
        assert run_ok("logs", "x").out.strip() == "[]"

    @mechanism
    def test_a_wait_lasts_until_the_process_is_woken(self):
        waiter, began = queuectl.Waiter(), time.monotonic()
        assert not waiter.wait(0.2) and time.monotonic() - began > 0.15
        queuectl.wake([os.getpid()])
        assert waiter.wait(20) and time.monotonic() - began < 10

    @mechanism
    def test_a_line_that_would_block_is_dropped_on_windows(self, monkeypatch):
        monkeypatch.setattr(queuectl, "WINDOWS", True)
        monkeypatch.setattr(queuectl, "takes_text", lambda stream: False)
        reader, writer = os.pipe()
        with open(writer, "w", encoding="utf-8") as stream:
            for _ in range(50):  # more than a pipe can hold
                queuectl.write_or_drop(stream, 10000 * "x")
            assert os.read(reader, 2**20).startswith(b"xxx")
            os.close(reader)  # now the thread that waits ends

    @mechanism
    def test_a_stop_signal_ends_the_wait_of_a_supervisor(self):
        run_ok("status")
        pool = make_supervisor()
        waiter, began = queuectl.Waiter(), time.monotonic()
        queuectl.catch_signals(pool.count_signal)
        number = queuectl.STOP_SIGNALS[-1]
        threading.Timer(0.3, signal.raise_signal, [number]).start()
        wait_until(lambda: waiter.wait(20) and pool.signals == 1)
        assert time.monotonic() - began < 10

    @mechanism
    def test_a_detached_pool_leaves_a_job_object_where_it_may(self, monkeypatch):
        monkeypatch.setattr(queuectl, "subprocess", types.SimpleNamespace(
            CREATE_NO_WINDOW=1, CREATE_BREAKAWAY_FROM_JOB=2), raising=False)
        given = []

        def start(creationflags):
            given.append(creationflags)
            if creationflags & is_refused:
                raise PermissionError

        for is_refused in (0, 2):
            queuectl.start_outside_job(start)
        assert given == [3, 3, 1]

    @windows_only
    def test_a_detached_pool_outlives_the_job_object_of_its_terminal(self):
        run_ok("status")
        terminal = subprocess.Popen(
            [sys.executable, "-c", IN_JOB_OBJECT, sys.executable, COMPILED, "worker",
             "start", "--detach"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL)
        assert terminal.wait(30) == 0
        enqueue(id="x")
        run_ok("wait", "x", "--timeout", "20")
        run_ok("worker", "stop")

    @fork_only
    def test_a_clock_set_back_changes_no_timeout_and_no_run_time(self):
        enqueue("touch back; sleep 7", id="x", timeout=0.3, max_retries=1)
        start_pool(count=1, script=CLOCK_SET_BACK)
        wait_until(lambda: state_of("x") == "dead")
        with queuectl.Queue("queuectl.db") as queue:
            job = queue.job("x")
        assert job["error"] == "timeout 0.3s"
        assert 0.3 <= job["finished_at"] - job["started_at"] < 7

    @mechanism
    def test_the_write_ahead_log_gives_its_space_back(self, queue):
        blob = {"command": "true " + "x" * 8000}
        add_jobs(queue, [blob] * 5000)
        assert os.path.getsize("queuectl.db-wal") > 2**25
        queue.db.execute("PRAGMA wal_checkpoint(RESTART)")
        add_job(queue, id="next")
        assert os.path.getsize("queuectl.db-wal") <= 2**24


# ======================================================================================
# Statistics
# ======================================================================================


class TestStatistics:
    """Numbers over runs: rates, times and errors."""

    @mechanism
    def test_its_numbers_are_of_one_moment(self, queue, clock, monkeypatch):
        add_job(queue, id="x", max_retries=1)
        queue.fail(claim(queue), make_outcome("exit 3", finished_at=clock.now + 1))
        rows = queuectl.Queue.rows

        def delete_behind(self, *args, **named):
            found = rows(self, *args, **named)
            with queuectl.Queue("queuectl.db") as other:
                other.delete_all(queuectl.where(["dead"]))
            return found

        with queuectl.Queue("queuectl.db", clock=clock) as reader:
            monkeypatch.setattr(reader, "rows", delete_behind.__get__(reader))
            assert queuectl.read_stats(reader, clock.now - 60)["run_time"]["longest"] == 1
        add_job(queue, id="x", max_retries=1)
        queue.fail(claim(queue), make_outcome("exit 3"))
        with queuectl.Queue("queuectl.db") as reader:
            monkeypatch.setattr(reader, "rows", delete_behind.__get__(reader))
            assert [group["id"] for group in queuectl.dead_by_error(reader)] == ["x"]

    def test_rates_times_and_errors_are_counted(self, queue, clock):
        begun = clock.now
        for n in range(20):
            add_job(
                queue, id="j%d" % n, command="slow" if n == 7 else "true", max_retries=1
            )
            run = claim(queue)
            clock.now += 1 + 9 * (n == 7)
            error = "exit 3" if n % 10 == 0 else None
            verb = queue.fail if error else queue.complete
            verb(run, make_outcome(error, finished_at=clock.now))
        stats = queuectl.read_stats(queue, begun)
        assert (stats["runs"], stats["completed"], stats["failed"]) == (20, 18, 2)
        assert stats["success_rate"] == 0.9 and stats["retries"] == 0
        assert stats["run_time"] == {"median": 1, "p95": 10, "longest": 10}
        assert stats["slowest_commands"][0] == {
            "command": "slow", "runs": 1, "mean": 10, "longest": 10}
        assert stats["common_errors"] == [{"error": "exit 3", "runs": 2}]
        assert {
            bin["below"]: bin["runs"] for bin in stats["run_times"] if bin["runs"]
        } == {3: 19, 30: 1}
        assert sum(bar["completed"] for bar in stats["throughput"]) == 18
        assert len(stats["throughput"]) == queuectl.BARS
        assert queuectl.read_stats(queue, clock.now - 3)["runs"] == 4

    def test_a_waiting_time_ends_with_the_first_run(self, queue, clock):
        def longest_wait(queue):
            stats = queuectl.read_stats(queue, clock.now - 60)
            return stats["waiting_time"]["longest"]

        add_job(queue)
        clock.now += 3
        run = claim(queue)
        queue.fail(run, make_outcome())
        assert longest_wait(queue) is None
        clock.now += 9
        queue.complete(claim(queue), make_outcome(None))
        assert longest_wait(queue) == 7

    def test_interrupted_runs_are_neither_completed_nor_failed(self, queue, dashboard):
        for error in (None, "stopped", "worker died", "cancelled"):
            add_job(queue, id=str(error))
            run = claim(queue)
            if error == "cancelled":
                queue.cancel([error])
            (queue.release if error else queue.complete)(run, make_outcome(error))
            if queue.job(str(error))["state"] == "pending":
                queue.cancel([str(error)])
        printed = queuectl.read_stats(queue, 0)
        assert [
            printed[name] for name in ("runs", "completed", "failed", "interrupted")
        ] == [4, 1, 0, 3]
        assert printed["success_rate"] == 1 and printed["common_errors"] == []
        add_job(queue, id="bad", max_retries=1)
        queue.fail(claim(queue), make_outcome("exit 1"))
        assert queuectl.read_stats(queue, 0)["success_rate"] == 0.5
        lines = dashboard.ask("/metrics").text.splitlines()
        for outcome, count in (("completed", 1), ("failed", 1), ("interrupted", 3)):
            assert 'queuectl_runs_total{outcome="%s"} %d' % (outcome, count) in lines

    @mechanism
    def test_the_bars_of_the_page_are_whole_minutes(self, queue, clock):
        clock.now = 1e9 // 60 * 60 + 90  # half a minute after a minute began
        add_job(queue, id="x")
        run = claim(queue)._replace(started_at=clock.now - 60)
        queue.complete(run, make_outcome(None, finished_at=clock.now - 45))
        stats = queuectl.stats_by_minute(queue, {})
        assert stats["bar_seconds"] == 60 and len(stats["throughput"]) == 60
        assert [bar["completed"] for bar in stats["throughput"]][-2:] == [1, 0]


# ======================================================================================
# The page
# ======================================================================================


class TestServer:
    """The dashboard's server: its answers and whom it refuses."""

    @posix_only
    def test_a_folder_that_is_not_utf_8_is_shown(self):
        name = os.fsdecode(b"caf\xe9")
        os.mkdir(name)
        os.chdir(name)
        run_ok("enqueue", "--cwd", "/", "--", "true")  # no job runs in such a folder
        site = Dashboard()
        answer = site.ask("/main")
        assert answer.status == 200 and "udce9" in answer.text

    @mechanism
    def test_an_error_of_its_own_is_an_answer(self, queue, monkeypatch):
        monkeypatch.setattr(queuectl, "read_status", lambda *_: 1 / 0)
        site = queuectl.Site(queue.path, "localhost")
        status, _, text = site.answer("GET", "/api/status", {"Host": "localhost"})
        assert status == 500 and "ZeroDivisionError" in text

    def test_the_api_gives_the_json_of_the_commands(self, dashboard):
        enqueue(
            python_command(
                "import sys; sys.stdout.buffer.write(b'<b>\\xff\\x1b[1m'); sys.exit(3)"
            ),
            id=NASTY_ID,
            max_retries=1)
        enqueue(id="later", delay=3600)
        drain()
        name = "/api/jobs/" + urllib.parse.quote(NASTY_ID, safe="")
        assert dashboard.json("/api/status") == read_status()
        assert dashboard.json("/api/jobs") == run_ok("list", "--json").json[::-1]
        assert dashboard.json(name) == details_of(NASTY_ID)
        assert dashboard.json(name + "/output") == (
            run_ok("logs", NASTY_ID, "--json").json)
        assert dashboard.json("/api/stats").keys() == (
            run_ok("stats", "--json").json.keys())
        assert [job["id"] for job in dashboard.json("/api/jobs?state=dead")] == [
            NASTY_ID]
        assert [job["id"] for job in dashboard.json("/api/jobs?q=LATE")] == ["later"]
        assert [job["id"] for job in dashboard.json("/api/jobs?before=later")] == [
            NASTY_ID]
        assert len(dashboard.json("/api/jobs?limit=1")) == 1

    @pytest.mark.parametrize("path, status", [
        ("/no", 404), ("/api", 404), ("/api/jobs/x", 404), ("/api/jobs/%00", 404),
        ("/api/jobs?before=%00", 400), ("/api/jobs?limit=-1", 400),
        ("/api/jobs?state=x", 400), ("/api/stats?since=x", 400),
        ("/api/jobs?before=gone", 404), ("/api/jobs?state=dead&before=gone", 404),
        ("/api/jobs?error=%00", 400), ("/api/stats?a=%00", 400),
        ("/output", 404), ("/output?id=x", 404), ("/output.log?id=%00", 400),
        ("/question?verb=delete", 200), ("/?state=x&q=%00&before=x&job=x", 200),
        ("/api/jobs/x/output?run=1e9", 404), ("/api/jobs?" + "a=1&" * 20, 400),
        ("/api/jobs?limit=" + "9" * 30, 400),
        pytest.param("/" + "a" * 70000, 414, id="long"), ("/api/status?%", 200)])
    def test_odd_requests_get_an_answer(self, empty_dashboard, path, status):
        assert empty_dashboard.ask(path).status == status
        assert empty_dashboard.ask("/api/status").status == 200

    @pytest.mark.parametrize("host, status", [
        ("evil.example", 403), ("evil.example:8321", 403),
        ("localhost.evil.example", 403), ("localhost:1", 200), ("127.0.0.1", 200),
        ("[::1]:8321", 200), ("", 403), ("[", 400)])
    def test_a_foreign_host_name_is_refused(self, empty_dashboard, host, status):
        assert empty_dashboard.ask("/api/status", Host=host).status == status

    @mechanism
    def test_its_own_name_is_known_in_every_spelling(self):
        site = queuectl.Site("queuectl.db", "MyHost")
        for host in ("myhost:80", "MYHOST:80", "localhost", "127.0.0.1:80", "[::1]:80"):
            site.require_own_host({"Host": host})
        with pytest.raises(queuectl.Refusal, match="not a name"):
            site.require_own_host({"Host": "other:80"})

    @pytest.mark.parametrize("headers", [
        {"X_Token": "wrong"}, {"X_Token": ""}, {"Origin": "http://evil.example"},
        {"Origin": "null"}, {"Host": "evil.example", "Origin": "http://evil.example"}
    ])
    def test_changes_need_the_token_and_origin_of_the_page(self, dashboard, headers):
        enqueue(id="x", delay=3600)
        enqueue(id="y", delay=3600)
        run_ok("cancel", "y")
        before = jobs(), read_status()["paused"]
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        changes = [name.split()[1].replace("ID", "x") for name in queuectl.ROUTES
                   if name.startswith("POST")]
        assert len(changes) == 10
        for path in changes:
            assert dashboard.post(path, **headers).status == 403, path
            assert dashboard.ask(path).status == 404, path  # GET changes nothing
        assert (jobs(), read_status()["paused"]) == before

    def test_the_token_of_an_earlier_dashboard_is_refused(self, dashboard):
        enqueue(id="x", delay=3600)
        earlier = Dashboard().own_headers()["X-Token"]
        answer = dashboard.post("/api/pause", **{"X-Token": earlier})
        assert answer.status == 403 and "reload" in answer.text
        assert not read_status()["paused"]

    def test_its_answers_are_packed_for_those_who_ask(self, empty_dashboard):
        packed = http.client.HTTPConnection("127.0.0.1", empty_dashboard.port, timeout=20)
        with contextlib.closing(packed):
            packed.request("GET", "/", headers={"Accept-Encoding": "gzip, br"})
            answer = packed.getresponse()
            assert answer.headers["Content-Encoding"] == "gzip"
            body = answer.read()
        plain = empty_dashboard.ask("/")
        assert "Content-Encoding" not in plain.headers
        assert gzip.decompress(body).decode() == plain.text
        assert len(body) < len(plain.text) / 2

    @pytest.mark.parametrize("path", [
        "/", "/main", "/chart", "/output?id=x", "/output.log?id=x", "/api/dead", "/api/stats",
        "/question", "/api/jobs"])
    def test_a_rebound_name_reads_nothing(self, empty_dashboard, path):
        answer = empty_dashboard.ask(path, Host="evil.example")
        assert answer.status == 403 and answer.text.startswith('{"error"')

    def test_a_body_and_unknown_methods_are_refused(self, dashboard):
        own = dashboard.own_headers()
        assert dashboard.ask("/api/retry", "POST", "x" * 10, **own).status == 413
        assert dashboard.ask("/api/jobs", "DELETE").status == 501

    @pytest.mark.parametrize("host, status", [("", 413), ("evil.example", 403)])
    def test_the_body_of_a_refused_request_is_no_request(
        self, empty_dashboard, host, status
    ):
        hidden = "GET /api/status HTTP/1.1\r\nHost: %s\r\n\r\n" % empty_dashboard.own
        request = "POST /api/jobs/x/cancel HTTP/1.1\r\nHost: %s\r\n" % (
            host or empty_dashboard.own)
        request += "Content-Length: %d\r\n\r\n" % len(hidden)
        address = "127.0.0.1", empty_dashboard.port
        with socket.create_connection(address, timeout=20) as client:
            client.sendall((request + hidden).encode())
            client.shutdown(socket.SHUT_WR)
            answers = b"".join(iter(lambda: client.recv(4096), b"")).decode()
        assert re.findall(r"HTTP/1\.1 (\d+)", answers) == [str(status)]

    def test_a_slow_client_delays_nobody(self, dashboard):
        with socket.create_connection(("127.0.0.1", dashboard.port)) as slow:
            slow.send(b"GET /api/status HTTP/1.1\r\nHost: loc")
            assert dashboard.ask("/api/status").status == 200
            enqueue(id="x")
            assert drain() == 0

    @mechanism
    def test_slow_statistics_delay_nothing_else(self, queue, monkeypatch):
        site, asked = queuectl.Site(queue.path, "localhost"), threading.Event()
        go_on = threading.Event()

        def stats(queue, since):
            asked.set()
            go_on.wait(20)
            return {}

        monkeypatch.setattr(queuectl, "read_stats", stats)
        answers = []
        ask = lambda: answers.append(
            site.answer("GET", "/api/stats", {"Host": "localhost"}))
        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        assert asked.wait(20)
        assert site.answer("GET", "/api/status", {"Host": "localhost"})[0] == 200
        go_on.set()
        for thread in asking:
            thread.join(20)
        assert [answer[0] for answer in answers] == [200] * 3

    def test_metrics_are_in_the_format_of_prometheus(self, dashboard):
        enqueue()
        enqueue("exit 1", max_retries=1)
        drain()
        run_ok("delete", "--all")
        printed = dashboard.ask("/metrics").text
        assert 'queuectl_jobs{state="dead"} 0\n' in printed
        # The counter never falls.
        assert 'queuectl_runs_total{outcome="completed"} 1\n' in printed
        assert 'queuectl_runs_total{outcome="failed"} 1\n' in printed
        for line in printed.splitlines():
            assert re.fullmatch(
                r"# (HELP|TYPE) \w+ .+|\w+(\{\w+=\"[\w.]+\"\})? [\d.]+", line
            ), line

    def test_metrics_tell_what_keeps_jobs_waiting(self, dashboard):
        def metric(name):
            printed = dashboard.ask("/metrics").text
            assert "# TYPE queuectl_%s gauge\n" % name in printed
            return float(re.search(r"\nqueuectl_%s (.+)" % name, printed)[1])

        assert metric("paused") == metric("blocked_jobs") == 0
        assert metric("oldest_waiting_seconds") == 0  # none waits
        enqueue(id="first")
        run_ok("enqueue", "--after", "first", "--", "true")
        assert 0 < metric("oldest_waiting_seconds") < 60
        run_ok("cancel", "first")
        run_ok("pause")
        assert metric("paused") == metric("blocked_jobs") == 1
        assert metric("oldest_waiting_seconds") == 0


class TestApi:
    """What the dashboard's API gives and changes."""

    def test_an_error_is_taken_exactly(self, dashboard, queue):
        for number, error in enumerate(["exit 1", "exit 1", "exit 127", "killed"]):
            let_die(queue, "j%d" % number, error)
        add_job(queue, id="j4")
        queue.fail(claim(queue), make_outcome("exit 1"))  # it is failed, not dead
        ids = lambda path: [job["id"] for job in dashboard.json("/api/jobs" + path)]
        assert ids("?error=exit+1") == ["j4", "j1", "j0"]
        assert ids("?state=dead&error=exit+1") == ["j1", "j0"]
        assert ids("?error=exit") == []
        assert dashboard.post("/api/retry?error=exit+1").text == "2"
        assert dashboard.post("/api/delete?state=dead&error=exit+127").text == "1"
        assert sorted(jobs("--state", "dead")) == ["j3"]

    def test_it_groups_the_dead_by_their_errors(self, dashboard, queue):
        let_die(queue, "a", "exit 1", b"one\n\x1b[1mlast\x1b[0m\n\n")
        let_die(queue, "b", "exit 127")
        queue.clock.now += 60
        let_die(queue, "c", "exit 127", b"1%\r100%\r\n")
        assert dashboard.json("/api/dead") == [
            {"error": "exit 127", "jobs": 2, "latest": "2001-09-09T01:47:40Z",
             "id": "c", "line": "100%"},
            {"error": "exit 1", "jobs": 1, "latest": "2001-09-09T01:46:40Z",
             "id": "a", "line": "last"}]

    def test_it_can_pause_and_resume(self, dashboard):
        for path, paused in (("pause", True), ("pause", True), ("resume", False)):
            assert dashboard.post("/api/" + path).status == 200
            assert dashboard.json("/api/status")["paused"] is paused

    def test_the_last_bytes_of_an_output_can_be_asked_for(self, dashboard, queue):
        add_job(queue, id="x")
        queue.complete(claim(queue), make_outcome(None, output=b"0123456789"))
        for tail, text in (("3", "789"), ("99", "0123456789"), ("0", "")):
            assert dashboard.json("/api/jobs/x/output?tail=" + tail) == {
                "id": "x", "run": 1, "output": text}
        assert dashboard.ask("/api/jobs/x/output?tail=-1").status == 400

    def test_it_can_cancel_retry_and_delete(self, dashboard):
        enqueue(id="x", delay=3600)
        assert dashboard.json("/api/jobs/x")["state"] == "pending"
        assert dashboard.post("/api/jobs/x/cancel").status == 200
        assert state_of("x") == "dead"
        # The new state, without delay.
        assert dashboard.json("/api/jobs/x")["state"] == "dead"
        assert dashboard.post("/api/jobs/x/retry").status == 200
        assert state_of("x") == "pending"
        assert dashboard.post("/api/jobs/x/retry").status == 400  # it is not dead
        assert dashboard.post("/api/jobs/x/delete").status == 200 and jobs() == {}
        assert dashboard.post("/api/jobs/x/delete").status == 404
        assert dashboard.post("/api/jobs/x/explode").status == 404

    def test_it_changes_as_many_jobs_as_it_counted(self, dashboard):
        for name in ("a1", "a2", "b1"):
            enqueue("exit 1", id=name, max_retries=1)
        enqueue("exit 2", id="c", max_retries=1)
        drain()
        enqueue(id="cut", delay=3600)
        run_ok("cancel", "cut")
        enqueue(id="waits", after=["b1"])
        enqueue(id="a3", delay=3600)
        question = lambda query: [*dashboard.json("/question?verb=" + query).values()][0]
        assert question("retry").startswith("Retry 4 dead jobs?")
        assert question("retry&q=a").startswith("Retry 2 dead jobs with “a” in them?")
        assert question("delete&q=a").startswith("Delete 5 jobs with “a” in them?")
        # An error matches as well.
        assert question("delete&q=exit+2").startswith("Delete 1 job with")
        assert question("retry&state=pending") == "There is nothing to retry."
        for path in (
            "retry?state=pending", "retry?state=processing", "delete?state=processing"
        ):
            dashboard.post("/api/" + path)
        assert len(jobs()) == 7 and len(jobs("--state", "dead")) == 5
        dashboard.post("/api/retry?q=a")
        assert sorted(jobs("--state", "dead")) == ["b1", "c", "cut"]
        dashboard.post("/api/delete?state=dead")
        # Another job waits for b1.
        assert sorted(jobs()) == ["a1", "a2", "a3", "b1", "waits"]
        for path in ("retry?state=x", "delete?q=%00"):
            assert dashboard.post("/api/" + path).status == 400

    def test_it_lists_the_dead_jobs_by_their_deaths(self, dashboard, queue):
        for name in ("a", "b", "c", "d"):
            add_job(queue, id=name, max_retries=1)
        for name in ("b", "d", "a"):
            queue.clock.now += 1
            queue.cancel([name])
        ids = lambda query: [
            job["id"] for job in dashboard.json("/api/jobs?state=dead" + query)]
        assert ids("") == ["a", "d", "b"] and ids("&limit=2") == ["a", "d"]
        assert ids("&before=d") == ["b"] and ids("&before=b") == []
        assert ids("&before=c") == ["a", "d", "b"]  # it is not dead

    @pytest.mark.parametrize("name", [".", "..", "a/b", "%2e", "?"])
    def test_odd_ids_can_be_given_in_the_query(self, dashboard, name):
        enqueue(id=name)
        query = urllib.parse.urlencode({"id": name})
        assert dashboard.json("/api/jobs/-?" + query)["id"] == name
        assert dashboard.json("/api/jobs/-/output?" + query)["output"] == ""
        enqueue(id="other")
        assert dashboard.json("/api/jobs/other?" + query)["id"] == "other"
        assert dashboard.post("/api/jobs/-/cancel?" + query).status == 200

    def test_only_existing_runs_have_an_output(self, dashboard, queue):
        add_job(queue, id="x")
        queue.complete(claim(queue), make_outcome(None, output=b"hi"))
        assert dashboard.json("/api/jobs/x/output?run=1")["output"] == "hi"
        for run in ("0", "2"):
            assert dashboard.ask("/api/jobs/x/output?run=" + run).status == 404


needs_browser = pytest.mark.skipif(
    os.name != "posix" or not shutil.which("chromium"), reason="needs a browser")


def shown_by_browser(address, milliseconds=5000):
    """Return the markup of a page after this time of a browser."""
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-background-networking", "--user-data-dir=" + profile,
             "--virtual-time-budget=%d" % milliseconds, "--dump-dom", address],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60,
            encoding="utf-8").stdout


class TestPage:
    """The parts of the page, made without a browser."""

    def test_a_state_in_its_address_is_spelt_in_any_case(self, queue, page):
        let_die(queue, "a", "exit 1")
        add_job(queue, id="b")
        jobs_part = words_of(named_part(page("/?state=DEAD"), "jobs"))
        assert "1, the latest death first" in jobs_part and " b " not in jobs_part

    def test_nothing_that_a_job_prints_is_markup(self, queue, page):
        add_job(queue, id=NASTY_ID, command=NASTY_ID, lock=NASTY_ID, max_retries=1,
                env={"A": NASTY_ID})
        queue.fail(claim(queue), make_outcome(NASTY_ID, output=NASTY_ID.encode()))
        query = urllib.parse.urlencode({"job": NASTY_ID, "q": NASTY_ID})
        whole = page("/?" + query, is_whole=True)
        assert whole.find("section[@id='job']//h2").text == NASTY_ID
        assert NASTY_ID in words_of(named_part(whole, "output"))
        assert not [*whole.iter("script")] + [*page("/chart").iter("script")]

    def test_its_policy_allows_its_own_script_alone(self, empty_dashboard):
        whole = empty_dashboard.ask("/")
        assert "innerHTML" not in whole.text and "style=" not in whole.text
        policy = whole.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        for path in ("/", "/main", "/chart", "/api/jobs", "/metrics", "/no"):
            headers = empty_dashboard.ask(path).headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")

    @mechanism
    @posix_only
    def test_the_name_of_the_queue_is_escaped(self, monkeypatch):
        os.mkdir("a<b>'&")
        monkeypatch.chdir("a<b>'&")
        queuectl.Queue("queuectl.db").close()
        site = queuectl.Site(os.path.abspath("queuectl.db"), "localhost")
        _, kind, page = site.answer("GET", "/", {"Host": "localhost"})
        assert kind == "text/html"
        assert "a&lt;b&gt;&#x27;&amp;" in page
        assert "a<b>" not in page

    def test_it_loads_nothing_from_elsewhere(self):
        links = re.findall(r"(?:https?:)?//[\w.]+", queuectl.PAGE_HTML)
        # The name of SVG, which no browser fetches.
        assert set(links) == {"http://www.w3.org"}

    def test_it_begins_with_the_verdict_and_what_needs_somebody(self, queue, page):
        let_die(queue, "a", output=b"reading\n\x1b[31mno such\x1b[0m row\r\n\n")
        let_die(queue, "b", "exit 12")
        let_die(queue, "c", "exit 12")
        add_job(queue, id="waits", after=["a"])
        add_job(queue, id="cut")
        queue.cancel(["cut"])
        now = named_part(page(), "now")
        assert words_of(named_part(now, "verdict")) == (
            "Stuck: 1 job behind dead ones")
        assert links_of(now.find("p")) == {"1 blocked": "/?kind=blocked#jobs"}
        assert words_of(now.find("div")) == "Retry the dead ones, or cancel what waits"
        assert [[words_of(part) for part in row] for row in alerts_of(now)] == [
            ["1 dead", "exit 1", "1 waits for it · a · “no such row” · just now",
             "ShowRetry"],
            ["2 dead", "exit 12", "latest just now", "ShowRetry…"]]

    def test_what_costs_most_comes_first_and_leads_to_what_waits(
            self, queue, page, dashboard):
        add_job(queue, id="gone")
        for name in ("e", "f", "g"):
            let_die(queue, name, "exit 2", priority=1)
        for name in ("a", "free"):
            let_die(queue, name, priority=1)
        queue.cancel(["gone"])
        for name, after in (("x", "gone"), ("b", "a"), ("c", "b"), ("d", "c")):
            add_job(queue, id=name, after=[after])
        shown = page()
        assert {row[0] for row in table_of(shown)} == {"dead", "cancelled", "blocked"}
        most, *others = alerts_of(shown)
        assert words_of(most).startswith("2 deadexit 13 wait for them · ")
        assert [words_of(row)[:14] for row in others] == [
            "1 cancelled1 w", "3 deadexit 2la"]
        behind = page(links_of(most)["3 wait for them"])
        assert [row[1] for row in table_of(behind)] == ["d", "c", "b"]
        assert "✕ blocked by exit 1" in links_of(behind)
        offered = buttons_of(named_part(behind, "jobs"))
        assert [*offered] == ["Retry dead…", "Cancel…", "Delete…"]
        assert dashboard.json(offered["Cancel…"]["data-question"])["ask"] == (
            "Cancel 3 jobs blocked by “exit 1”?"
            " Cancelled jobs are dead; each can be retried.")
        assert dashboard.json(offered["Delete…"]["data-question"])["ask"] == (
            "Delete 3 jobs blocked by “exit 1”?"
            " Still waiting to run: 3 of them. Their runs and their output go as well.")
        assert dashboard.post(offered["Retry dead…"]["data-post"]).text == "2"
        assert {row[1]: row[0] for row in table_of(page())}["d"] == "behind a job"
        queue.cancel(["a"])
        assert dashboard.post(
            "/api/delete?blocked_by=cancelled").text == "4"  # b, c, d and x

    def test_what_is_announced_is_the_colour_and_any_harm(
            self, queue, page, monkeypatch):
        kind = lambda: named_part(page(), "now").get("data-kind")
        monkeypatch.setattr(queuectl, "obstacle", lambda status: None)
        add_job(queue, id="a")
        queue.clock.now += 60
        assert (kind(), claim(queue).id) == ("processing", "a")
        assert "Keeping up" in words_of(page()) and kind() == "processing"
        add_job(queue, id="b", max_retries=1)
        queue.fail(claim(queue), make_outcome())
        assert words_of(named_part(page(), "verdict")) == "1 dead" and kind() == "harm"
        load = named_part(page(), "now").find("p")
        assert "Keeping up" in words_of(load.find("span"))

    def test_commands_to_paste_name_the_queue(self, queue, page, monkeypatch):
        def command():
            """Return what the first Copy of the page copies: the text before it."""
            _, code, copy = named_part(page(), "now").find(".//div[button]")
            assert copy.get("data-copy") == ""
            return code.text

        words = [sys.executable, SCRIPT, "--db", queue.path]
        assert command() == queuectl.quoted(words) + " enqueue -- echo hello"
        add_job(queue)
        assert command() == queuectl.quoted(words) + " worker start"
        monkeypatch.setattr(queuectl, "PROGRAM", "queuectl")  # as installed
        line = queuectl.quoted(["queuectl", "--db", queue.path]) + " resume"
        assert ">%s<" % line in queuectl.command_to_copy(queue.path, "resume")

    def test_it_holds_the_command_that_starts_it_again(self, dashboard):
        start, = re.findall('(?s)<div id="start".*?</div>', dashboard.ask("/").text)
        words = words_of(ElementTree.fromstring(start.replace(" hidden", "")))
        assert " --db " in words and words.endswith(
            "queuectl.db dashboard --host 127.0.0.1 --port %dCopy" % dashboard.port)

    def test_an_empty_queue_with_a_pool_needs_no_other(self, queue, page, monkeypatch):
        steps = lambda: [words_of(step) for step in named_part(page(), "now").iter("li")]
        assert [step.split(":")[0] for step in steps()] == ["Add a job", "Run it"]
        monkeypatch.setattr(queuectl, "supervised_pools", lambda path: {7})
        monkeypatch.setattr(queuectl.Queue, "workers", lambda queue: [
            dict(pid=pid, pool=7, job=None, since=None) for pid in (8, 9)])
        assert steps()[1:] == ["2 workers wait for it"]

    def test_tiles_keep_the_search(self, queue, page):
        add_job(queue, id="x")
        tiles = named_part(page("/?q=x&state=pending"), "tiles")
        assert [tile.get("href") for tile in tiles][:2] == [
            "/?q=x#jobs", "/?state=pending&q=x#jobs"]
        assert [tile.get("aria-current") for tile in tiles][:2] == [None, "true"]

    def test_a_paused_queue_without_a_pool_lacks_both(self, queue, page, monkeypatch):
        add_job(queue)
        queue.set_paused(True)
        advice = "No pool is running; to start one: "
        assert advice in words_of(named_part(page(), "now"))
        monkeypatch.setattr(queuectl, "is_locked", lambda path: True)
        monkeypatch.setattr(queuectl, "pools_with_files", lambda path: [7])
        assert "No pool" not in words_of(named_part(page(), "now"))

    def test_show_and_retry_take_the_jobs_of_exactly_one_error(
            self, queue, page, dashboard):
        let_die(queue, "a", "exit 1")
        let_die(queue, "b", "exit 127")
        row = named_part(page(), "alerts").find("li[@data-key='dead exit 1']")
        assert [job[1] for job in table_of(page(links_of(row)["Show"]))] == ["a"]
        let_die(queue, "c", "exit 1")
        row = named_part(page(), "alerts").find("li[@data-key='dead exit 1']")
        retry = buttons_of(row)["Retry…"]
        assert dashboard.json(retry["data-question"])["ask"] == (
            "Retry 2 dead jobs with the error “exit 1”? They get all their tries again.")
        assert dashboard.post(retry["data-post"]).text == "2"
        assert sorted(jobs("--state", "dead")) == ["b"]

    def test_the_most_common_last_line_of_an_error_is_quoted(
            self, queue, clock, page, monkeypatch):
        for id, output in (("a", b"refused"), ("b", b"x" * 99 + b"\nrefused"), ("c", b""),
                           ("d", b"no file")):
            let_die(queue, id, output=output)
            clock.now += 1
        row, = alerts_of(page())
        assert words_of(row[2]) == (
            "“refused”, and others · latest 1 s ago")
        for id in "efg":  # what differs in numbers alone is alike
            let_die(queue, id, output=b"no user %d" % ord(id))
        row, = alerts_of(page())
        assert words_of(row[2]).startswith("“no user 103”, and others · ")
        monkeypatch.setattr(queuectl.Queue.tail, "__defaults__", (99,))  # without b
        row, = alerts_of(page())
        assert words_of(row[2]).startswith("“no user 103”, and others · ")

    def test_one_dead_job_is_retried_without_a_question(self, queue, page, dashboard):
        let_die(queue, "a")
        retry = buttons_of(named_part(page(), "now"))["Retry"]
        assert not {"data-ask", "data-question"} & {*retry}
        assert dashboard.post(retry["data-post"]).status == 200
        assert state_of("a") == "pending"

    def test_only_the_most_common_errors_are_named(self, queue, page):
        for number in range(5):
            let_die(queue, "j%d" % number, "exit %d" % number)
        add_job(queue)
        queue.fail(claim(queue), make_outcome())
        shown = named_part(page(), "alerts")
        assert [words_of(row[0]) for row in shown] == [
            "1 dead", "1 dead", "1 dead", "2 more dead, of 2 errors"
            "1 deadexit 3j3 · just nowShowRetry1 deadexit 4j4 · just nowShowRetry",
            "1 failed"]
        assert len([*shown.iter("summary")]) == 1  # folded once, not twice
        assert {links_of(row)["Show"] for row in alerts_of(page())} == {
            "/?state=failed#jobs",
            *("/?state=dead&error=exit+%d#jobs" % number for number in range(5))}
        queue.delete(["j0"])  # a line for one other error may as well be that error
        assert [*page().iter("summary")] == []

    def test_what_is_tried_again_or_behind_a_lock_has_a_row(self, queue, clock, page):
        for name in ("holds", "next", "last"):
            add_job(queue, id=name, lock="db")
        add_job(queue, id="later", lock="db", delay=3600)
        claim(queue)
        for name, error in (("x", "exit 7"), ("y", "exit 8")):
            add_job(queue, id=name)
            queue.fail(claim(queue), make_outcome(error, output=b"no " + name.encode()))
        clock.now += 540
        rows = [[words_of(part) for part in row] for row in alerts_of(page())]
        assert rows == [
            ["2 failed", "exit 8, exit 7", "“no y” · 9 min late", "ShowRun now…"],
            ["2 behind", "lock db", "held by holds · for 9 min", "Show"]]
        shown = links_of(alerts_of(page())[1])
        assert shown["held by holds"] == "/?job=holds"
        behind = page(shown["Show"])
        assert [row[1] for row in table_of(behind)] == ["last", "next"]
        assert "✕ behind the lock db" in links_of(behind)

    def test_it_can_pause_and_resume(self, queue, page, dashboard):
        assert "Pause" not in buttons_of(page())  # there is nothing to pause
        add_job(queue)
        waits = ": 1 job waits"
        for word, verdict in (("Pause", "Paused" + waits),
                              ("Resume", "No pool is running" + waits)):
            switch = buttons_of(named_part(page(), "queue"))[word]
            assert dashboard.post(switch["data-post"]).status == 200
            assert words_of(named_part(page(), "verdict")) == verdict
            assert "to go on" not in words_of(named_part(page(), "now"))

    def test_tiles_count_and_lead_to_their_jobs(self, queue, clock, page):
        add_job(queue, id="fails")
        queue.fail(claim(queue), make_outcome())
        add_job(queue, id="cut")
        queue.cancel(["cut"])
        add_job(queue, id="ready", delay=0.5)
        clock.now += 1140
        queue.promote(clock.now)
        queue.fail(queue.claim(1, lambda run: None), make_outcome())
        add_job(queue, id="late", delay=3600)
        tiles = named_part(page(), "tiles").findall("a")
        assert [words_of(tile) for tile in tiles] == [
            "all 4 3 to go", "pending 2 longest wait 19 min", "processing 0 of 0 workers",
            "completed 0", "failed 1 next due in 2 s", "dead 1 1 cancelled"]
        assert [row[0] for row in table_of(page(tiles[5].get("href")))] == ["cancelled"]
        current = named_part(page("/?state=dead"), "tiles").find("a[@aria-current='true']")
        assert words_of(current[0]) == "dead"
        waits = named_part(page("/?state=pending"), "jobs")
        assert links_of(waits)["Longest wait: fails"] == "/?state=pending&job=fails"

    def test_a_job_that_waits_to_be_tried_again_shows_its_error(
            self, queue, clock, page):
        add_job(queue, id="x")
        queue.fail(claim(queue), make_outcome("exit 7"))
        clock.now += 60
        queue.promote(clock.now)
        assert table_of(page())[0][:3] == ["pending", "x", "exit 7 true"]
        assert words_of(named_part(page("/?job=x"), "why")) == (
            "pending – exit 7, no pool is running, after try 1 of 3")
        claim(queue)  # nobody knows how this run will end
        assert table_of(page())[0][2] == "true"

    def test_it_shows_what_runs_now(self, queue, clock, page):
        for number in range(queuectl.RUNNING_SHOWN + 2):
            add_job(queue, id="j%d" % number, command="echo %d" % number)
            claim(queue)
        clock.now += 200
        running = named_part(page(), "running")
        assert words_of(running.find("ul/li")) == "j0echo 03 min"
        assert links_of(running)["2 more"] == "/?state=processing#jobs"

    def test_what_runs_is_shown_with_the_last_line_that_it_printed(self, queue, page):
        add_job(queue, id="x")
        with leased_run(queue, os.getpid()) as (_, lease):
            lease.write(b"one\n\x1b[31mrow 7 of 9\x1b[0m\n\n")
            assert words_of(named_part(page(), "running").find("ul/li")).endswith(
                "<1 srow 7 of 9")
            os.utime(lease.path, (time.time() - 300,) * 2)
            assert "no output for 5 min · row 7 of 9" in words_of(page())

    def test_what_has_run_longest_comes_first(self, queue, clock, page):
        add_job(queue, id="a", delay=30)
        for number in range(2):
            add_job(queue, id="j%d" % number)
            claim(queue)
            clock.now += 20
        assert claim(queue).id == "a"
        running = [words_of(line.find("a"))
                   for line in named_part(page(), "running").findall("ul/li")]
        assert running == ["j0", "j1", "a"]

    def test_the_dead_are_listed_with_what_they_printed_last(self, queue, page):
        let_die(queue, "a", output=b"start\nno host db1\n")
        let_die(queue, "b", output=b"no host db2")
        let_die(queue, "c", output=b"x" * 200000)
        for address in ("/", "/?state=dead"):
            assert [row[2] for row in table_of(page(address))] == [
                "exit 1 true", "exit 1 “no host db2” · true",
                "exit 1 “no host db1” · true"]

    def test_its_chart_shows_minutes(self, queue, clock, page):
        nothing = "No run has completed or failed in the last hour"
        assert words_of(page("/chart")) == nothing
        add_job(queue)
        queue.complete(claim(queue), make_outcome(None, finished_at=clock.now + 0.5))
        # By this the script knows that it is old.
        assert named_part(page(), "chart").get("data-ended") == "1"
        chart = page("/chart")
        assert [title.text for title in chart.iter("title")] == [
            "1 completed, 0 failed, 0 min ago"]
        assert ("in the last hour 100 % succeed · median run 0.5 s, 95 % within 0.5 s"
                in words_of(chart))
        assert chart.find("svg/rect").get("class") == "completed part"
        assert chart.find("svg").get("viewBox") == "0 0 10 4"  # since the first run
        assert "10 min ago" in words_of(chart)
        assert chart.find("svg").get("aria-label") == (
            "1 completed, 0 failed in the last hour")

    def test_only_all_is_a_hundred_percent(self):
        assert [queuectl.percent_text(share) for share in (0, .001, 3 / 7, .999, 1)] == [
            "0\xa0%", "1\xa0%", "43\xa0%", "99\xa0%", "100\xa0%"]

    def test_its_chart_leaves_out_what_was_interrupted(self, queue, page):
        add_job(queue)
        queue.release(claim(queue), make_outcome("stopped"))
        assert "No run has completed or failed" in words_of(page("/chart"))

    @posix_only  # elsewhere a command has one line
    def test_its_table_has_a_row_a_job_newest_first(self, queue, clock, page):
        add_job(queue, id="early", command="echo 1\n  echo 2")
        run = claim(queue)
        clock.now += 3
        queue.fail(run, make_outcome(finished_at=clock.now))
        add_job(queue, id="later", delay=60)
        assert table_of(page()) == [
            ["delayed", "later", "true", "", "", "in 60 s"],
            ["failed", "early", "exit 1 echo 1 ⏎ echo 2", "1/3", "3.0 s",
             "retry in 2 s"]]
        titles = [part.get("title") for part in page().find(".//tbody").iter()]
        # That of a row would be read out as its name.
        assert [*filter(None, titles)] == [
            "later", "true", "early", "exit 1 echo 1   echo 2"]

    def test_each_kind_of_job_has_a_word_and_an_icon(self, queue, clock, page):
        add_job(queue, id="cut")
        queue.cancel(["cut"])
        for name, fields in (("holds", {"lock": "l"}), ("locked", {"lock": "l"}),
                             ("behind", {"after": ["holds"]}), ("ready", {}),
                             ("delayed", {"delay": 60})):
            add_job(queue, id=name, **fields)
        assert claim(queue).id == "holds"
        shown = {row[1]: (row[0], row[5]) for row in table_of(page())}
        assert shown == {
            "cut": ("cancelled", "just now"), "holds": ("lost", "for 1 s"),
            "locked": ("behind a lock", "waits 1 s"),
            "ready": ("pending", "waits 1 s"), "delayed": ("delayed", "in 60 s"),
            "behind": ("behind a job", "after holds")}
        icons = [path.get("d") for path in page().iterfind(".//tbody//path")]
        assert sorted(icons) == sorted(
            queuectl.JOB_KINDS[word].icon for word, _ in shown.values())

    def test_a_search_takes_any_case_and_no_wildcards(self, queue, page):
        add_job(queue, id="Early", command="echo 100%_")
        add_job(queue, id="other", command="ls")
        for text in ("ECHO", "early", "0%_", "0%25_"):
            assert [row[1] for row in table_of(page("/?q=" + text))] == ["Early"], text
        for text in ("ech_", "e%25o", "\\"):
            assert table_of(page("/?q=" + text)) == [], text
        nothing = named_part(page("/?q=no"), "jobs")
        assert words_of(nothing.find("p")) == (
            "No job matches “no” (output is not searched) Clear")
        assert links_of(nothing)["Clear"] == "/#jobs"

    def test_the_search_is_a_form_that_keeps_the_other_filters(self, queue, page):
        let_die(queue, "x")
        form = page("/?state=dead&error=exit+1&q=x").find(".//form")
        assert {part.get("name"): part.get("value") for part in form} == {
            "state": "dead", "error": "exit 1", "q": "x"}

    def test_it_leads_to_older_jobs_and_tells_its_place(self, queue, page):
        add_jobs(queue, [{"command": "true", "id": "job%d" % n}
                         for n in range(queuectl.PAGE_ROWS + 1)])
        first = page()
        assert words_of(named_part(first, "pages")) == "1–50 of 51Older"
        assert words_of(named_part(first, "total")) == "51, newest first"
        last = page(links_of(first)["Older"])
        assert [row[1] for row in table_of(last)] == ["job0"]
        assert words_of(named_part(last, "pages")) == "NewestNewer51–51 of 51"
        for name in ("Newest", "Newer"):
            assert table_of(page(links_of(last)[name])) == table_of(first)
        queue.delete(["job1"])  # the other page began behind it
        assert words_of(named_part(page(links_of(first)["Older"]), "pages") or
                        named_part(page(), "total")) == "50, newest first"

    @pytest.mark.parametrize("state", ["", "dead"])
    def test_the_pages_are_the_same_in_both_directions(self, queue, page, state):
        for n in range(130):
            add_job(queue, id="job%d" % n)
        queue.cancel(["job%d" % n for n in range(130)])
        pages = [page("/?state=" + state)]
        for _ in range(2):
            pages.append(page(links_of(pages[-1])["Older"]))
        add_job(queue, id="new", max_retries=1)
        queue.cancel(["new"])
        up = page(links_of(pages[2])["Newer"])
        assert table_of(up) == table_of(pages[1])
        assert "51–100 of 131" in words_of(named_part(up, "pages"))
        top = page(links_of(up)["Newer"])
        assert table_of(top) == table_of(pages[0])  # the new one is not slipped in
        assert [row[1] for row in table_of(page(links_of(top)["Newer"]))][0] == "new"

    @pytest.mark.parametrize("verb", ["retry", "delete"])
    def test_a_page_stays_where_the_job_before_it_goes(self, queue, page, verb):
        for n in range(60):
            add_job(queue, id="job%d" % n)
        queue.cancel(["job%d" % n for n in range(60)])
        address = links_of(page("/?state=dead"))["Older"]
        getattr(queue, verb)(["job10"])
        shown = page(address)
        assert [row[1] for row in table_of(shown)][0] == "job8"  # one has moved up
        assert "51–59 of 59" in words_of(named_part(shown, "pages"))

    def test_a_page_without_jobs_left_is_the_first(self, queue, page):
        add_job(queue, id="a")
        add_job(queue, id="b")
        assert [row[1] for row in table_of(page("/?before=a&first=51"))] == ["b", "a"]

    def test_a_page_far_down_is_found_by_its_number_in_part(self, queue, page):
        add_jobs(queue, [{"command": "true"}] * 600)
        shown = page("/?before=gone&first=551")  # not by counting a million
        assert "501–550 of 600" in words_of(named_part(shown, "pages"))

    def test_a_search_and_an_error_are_counted(self, queue, page):
        for n in range(queuectl.PAGE_ROWS + 2):
            let_die(queue, "job%d" % n, "exit %d" % (1 + n % 51 // 50))
        for query, total in (("q=JOB", 52), ("state=dead&error=exit+1", 51),
                             ("q=job1", 11), ("q=no", 0), ("state=dead&q=exit+2", 1)):
            shown = words_of(named_part(page("/?" + query), "total"))
            assert shown.split(",")[0] == str(total), query

    @pytest.mark.parametrize("address, offered", [
        ("/", ["Retry dead…"]), ("/?q=x", ["Cancel…", "Delete…"]),
        ("/?q=y", ["Retry dead…", "Delete…"]), ("/?q=run", ["Cancel…"]),
        ("/?state=dead", ["Retry dead…", "Delete…"]), ("/?q=x2", ["Delete…"]),
        ("/?state=pending", ["Cancel…", "Delete…"]),
        ("/?state=failed", ["Run now…", "Cancel…", "Delete…"]),
        ("/?kind=delayed", ["Run now…", "Cancel…", "Delete…"]),
        ("/?kind=behind+a+job", ["Cancel…", "Delete…"]),
        ("/?state=processing", ["Cancel…"]), ("/?q=nothing", [])])
    def test_it_offers_for_many_what_can_be_done(self, queue, page, address, offered):
        let_die(queue, "y", "7")
        for name in ("runs", "f"):
            add_job(queue, id=name)
            run = claim(queue)
        queue.fail(run, make_outcome())
        add_job(queue, id="x1"), add_job(queue, id="x2"), add_job(queue, delay=60)
        add_job(queue, id="late", after=["x1"])
        queue.cancel(["x2"])
        assert list(buttons_of(named_part(page(address), "jobs"))) == offered
        add_jobs(queue, [{"command": "true  # x y"}] * queuectl.PAGE_ROWS)
        queue.retry(["y"])  # the only one that is dead and not cancelled
        assert "Retry dead…" not in buttons_of(named_part(page(address), "jobs"))

    def test_a_question_tells_what_stays_and_why(self, queue, page, dashboard):
        let_die(queue, "a")
        let_die(queue, "b")
        add_job(queue, id="cut")
        queue.cancel(["cut"])
        add_job(queue, id="waits", after=["b"])
        offered = buttons_of(named_part(page("/?state=dead"), "jobs"))
        asked = lambda name: dashboard.json(offered[name]["data-question"])
        assert asked("Delete…")["ask"] == (
            "Delete 2 dead jobs? Their runs and their output go as well."
            " 1 job is left out: other jobs wait for it.")
        assert asked("Retry dead…")["ask"] == (
            "Retry 2 dead jobs? They get all their tries again."
            " 1 job is left out: cancelled ones are retried by id.")
        assert dashboard.json("/question?verb=retry&q=cut") == {
            "none": "There is nothing to retry."
            " 1 job is left out: cancelled ones are retried by id."}

    def test_jobs_that_can_not_run_yet_are_counted_and_listed(self, queue, page):
        for name, fields in (
                ("dead", {}), ("runs", {"lock": "db"}), ("later", {"delay": 60}),
                ("behind", {"after": ["runs"]}), ("locked", {"lock": "db"}),
                ("blocked", {"after": ["dead"]}), ("now", {})):
            add_job(queue, id=name, **fields)
        queue.cancel(["dead"])
        assert claim(queue).id == "runs"
        shown = links_of(named_part(page(), "now"))
        listed = {words: [row[:2] for row in table_of(page(address))]
                  for words, address in shown.items() if words[0] == "1"}
        assert listed == {
            "1 delayed": [["delayed", "later"]],
            "1 behind a job": [["behind a job", "behind"]],
            "1 behind a lock": [["behind a lock", "locked"]],
            "1 blocked": [["blocked", "blocked"]],
            "1 waits for it": [["blocked", "blocked"]]}
        assert "✕ delayed" in links_of(page(shown["1 delayed"]))
        assert len(table_of(page("/?kind=odd"))) == 7

    def test_what_waits_can_be_run_now_or_cancelled_at_once(
            self, queue, page, dashboard):
        def ask_and_press(name, address):
            offered = buttons_of(named_part(page(address), "jobs"))[name]
            asked = dashboard.json(offered["data-question"])["ask"]
            return asked, json.loads(dashboard.post(offered["data-post"]).text)

        add_job(queue, id="fails")
        queue.fail(claim(queue), make_outcome())
        add_jobs(queue, [{"id": id, "command": "true", "delay": delay} for id, delay in
                         (("a", 60), ("b", 60), ("due", 0))])
        assert ask_and_press("Run now…", "/?kind=delayed") == (
            "Run 2 jobs (delayed) now? They no longer wait for their time.", 2)
        assert ask_and_press("Run now…", "/?state=failed") == (
            "Run 1 failed job now? They no longer wait for their time.", 1)
        queue.clock.now = time.time()  # that of the dashboard
        queue.promote(queue.clock.now)
        assert {claim(queue).id for _ in range(4)} == {"a", "b", "due", "fails"}
        add_job(queue, id="c")
        assert ask_and_press("Cancel…", "/?q=e") == (
            "Cancel 5 jobs with “e” in them? The processes of 4 running jobs are ended."
            " Cancelled jobs are dead; each can be retried.", 5)
        assert dashboard.json("/question?verb=run") == {
            "none": "There is nothing to run."}
        assert dashboard.ask("/question?verb=drop").status == 400
        assert dashboard.post("/api/cancel?kind=odd").status == 400

    def test_what_ends_after_the_question_is_left(self, queue, dashboard):
        queue.clock.now = time.time()  # that of the dashboard
        let_die(queue, "a")
        until = dashboard.json("/question?verb=delete&state=dead")["until"]
        queue.clock.now = until + 1
        let_die(queue, "b")
        path = "/api/%s?state=dead&until=%r"
        assert dashboard.post(path % ("delete", until)).text == "1"
        assert dashboard.post(path % ("retry", until)).text == "0"
        assert [*jobs()] == ["b"] and jobs()["b"]["state"] == "dead"
        assert dashboard.post("/api/delete?until=x").status == 400
        queue.clock.now = time.time()
        add_job(queue, id="waits")
        until = dashboard.json("/question?verb=cancel&q=a")["until"]
        queue.clock.now = until + 1
        add_job(queue, id="later", command="a")
        assert dashboard.post("/api/cancel?q=a&until=%r" % until).text == "1"
        assert jobs()["later"]["state"] == "pending"

    @pytest.mark.parametrize("query", [
        "delete", "cancel", "run", "delete?until=9e9", "cancel?q=", "delete?state=dead&q=", "delete?stat=dead",
        "cancel?state=dead&error", "retry?errors=exit", "cancel?q=" + "x" * 20000])
    def test_no_mistyped_filter_takes_all_jobs(self, queue, dashboard, query):
        let_die(queue, "d")
        add_job(queue, id="a"), add_job(queue, id="b", delay=60)
        before = jobs()
        assert dashboard.post("/api/" + query).status == 400
        assert jobs() == before

    def test_a_blocked_job_that_is_freed_meanwhile_is_left(self, queue):
        let_die(queue, "a")
        add_job(queue, id="x", after=["a"])
        for filters in ({"blocked": True}, {"blocked_by": "exit 1"}):
            condition = queuectl.where(**filters)
            assert [job["id"] for job in queue.jobs(condition)] == ["x"]
            assert queue.count(condition._replace(sql=condition.of_row)) == 1
            queue.retry(["a"])
            queue.complete(claim(queue), make_outcome(None))
            # What is checked again when a job is changed.
            assert queue.count(condition._replace(sql=condition.of_row)) == 0
            queue.change("UPDATE jobs SET state = 'dead', error = 'exit 1' WHERE id = 'a'")

    def test_what_blocks_others_can_be_retried_at_once(self, queue, page, dashboard):
        for name in ("a", "b", "free"):
            let_die(queue, name)
        for name, after in (("x", "a"), ("y", "b"), ("z", "y")):
            add_job(queue, id=name, after=[after])
        shown = page("/?kind=blocked")
        assert [row[-1] for row in table_of(shown)] == [
            "after y (blocked)", "after b (dead)", "after a (dead)"]
        retry = buttons_of(named_part(shown, "jobs"))["Retry what blocks them…"]
        assert dashboard.json(retry["data-question"])["ask"].startswith(
            "Retry 2 dead jobs (blocking others)?")
        assert dashboard.post(retry["data-post"]).text == "2"
        assert jobs()["free"]["state"] == "dead" and jobs()["a"]["state"] == "pending"

    def test_the_quoted_line_begins_at_its_beginning(self, queue, page):
        let_die(queue, "a", output=b"Traceback: " + 300 * b"x" + b"\n")
        assert "“Traceback: xxx" in words_of(alerts_of(page())[0])
        assert "x…”" in words_of(alerts_of(page())[0])

    def test_failed_jobs_have_the_time_of_their_next_try(self, queue, clock, page):
        add_job(queue, id="soon", delay=60)
        add_job(queue, id="f")
        queue.fail(claim(queue), make_outcome())
        queue.edit("f", {"run_at": clock.now + 3600})
        hints = {name: words_of(part) for name, part in zip(
            ("", *queuectl.STATES), named_part(page(), "tiles"))}
        assert hints["failed"] == "failed 1 next due in 60 min"
        assert hints["pending"] == "pending 1 next due in 60 s"

    def test_what_failed_and_waits_again_has_a_row(self, queue, clock, page):
        for name, error in (("a", "exit 2"), ("b", "exit 3"), ("c", "exit 2")):
            add_job(queue, id=name)
            queue.fail(claim(queue), make_outcome(error))
        add_job(queue, id="first")
        clock.now += 60
        queue.promote(clock.now)
        row, = alerts_of(page())
        assert [words_of(part) for part in row] == [
            "3 to retry", "exit 2, exit 3", "failed before, and wait for a worker", "Show"]
        behind = page(links_of(row)["Show"])
        assert [job[:2] for job in table_of(behind)] == [
            ["pending", "c"], ["pending", "b"], ["pending", "a"]]
        assert "✕ to be retried" in links_of(behind)

    def test_filters_are_shown_and_can_be_removed(self, queue, page):
        let_die(queue, "x")
        shown = page("/?state=dead&error=exit+1&q=x&job=x")
        assert {words: href for words, href in links_of(shown).items() if "✕" in words
                } == {"✕ dead": "/?q=x&error=exit+1&job=x#jobs",
                      "✕ exit 1": "/?state=dead&q=x&job=x#jobs"}
        delete = buttons_of(named_part(shown, "jobs"))["Delete…"]
        assert delete["data-post"] == "/api/delete?state=dead&q=x&error=exit+1"

    def test_a_refresh_is_the_page_without_what_stays(self, dashboard):
        enqueue("echo hi", id="x")
        drain()
        whole, part = dashboard.ask("/?job=x").text, dashboard.ask("/main?job=x").text
        assert "<style" in whole and "hi\n" in whole and "<style" not in part
        assert 'data-next="/output?id=x&amp;run=1"' in part
        for text in (whole, part):
            assert "<title>x completed – queuectl.db</title>" in text
        kind = dashboard.ask("/output.log?id=x").headers["Content-Type"]
        assert kind.startswith("text/plain")

    @mechanism
    def test_all_of_it_is_of_one_moment(self, queue, page, monkeypatch):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        read = queuectl.read_status

        def read_then_complete(*args):
            status = read(*args)
            with queuectl.Queue("queuectl.db") as other:
                claim_and_complete(other)
            return status

        monkeypatch.setattr(queuectl, "read_status", read_then_complete)
        shown = page("/?job=b")
        assert [row[0] for row in table_of(shown)] == ["behind a job", "pending"]
        assert "a (pending)" in links_of(shown.find("section[@id='job']/dl"))

    @mechanism
    def test_the_dead_are_grouped_anew_when_there_are_more(self, queue, monkeypatch):
        site, groupings = queuectl.Site(queue.path, "localhost"), []
        # Whatever it takes to make them, they are kept.
        monkeypatch.setattr(queuectl, "CACHE_SHARE", 1e-9)
        monkeypatch.setattr(queuectl, "dead_by_error", lambda queue: (
            groupings.append(1) or time.sleep(0.05) or []))  # more than a clock's tick
        for _ in range(3):
            assert site.answer("GET", "/main", {"Host": "localhost"})[0] == 200
        assert len(groupings) == 1
        let_die(queue, "a")  # or the sum of the rows would not be that of the tile
        site.answer("GET", "/main", {"Host": "localhost"})
        assert len(groupings) == 2
        own = {"Host": "localhost", "Origin": "http://localhost", "X-Token": site.token}
        assert site.answer("POST", "/api/pause", own)[0] == 200
        # They are anew after each action, which may have changed them.
        site.answer("GET", "/main", {"Host": "localhost"})
        assert len(groupings) == 3

    def test_what_is_made_in_a_moment_is_never_old(self, queue, monkeypatch):
        monkeypatch.setattr(queuectl, "CACHE_SHARE", 1e9)
        site, own = queuectl.Site(queue.path, "localhost"), {"Host": "localhost"}
        let_die(queue, "a")
        add_job(queue, id="b", after=["a"])
        assert "1 waits for it" in site.answer("GET", "/main", own)[2]
        queue.retry(["a"])  # by another process, after which nothing is cleared
        assert "1 waits for it" not in site.answer("GET", "/main", own)[2]

    def test_an_odd_address_is_reported_on_the_page(self, dashboard):
        enqueue()
        whole = dashboard.ask("/?q=%00")
        assert whole.status == 200 and re.search(
            '<section id="trouble"[^>]*><p role="alert">[^<]', whole.text)
        assert dashboard.ask("/main?q=%00").status == 400

    def test_an_unknown_state_is_no_filter(self, queue, page, dashboard):
        add_job(queue, id="a")
        assert [row[1] for row in table_of(page("/?state=bogus"))] == ["a"]
        assert dashboard.ask("/api/jobs?state=bogus").status == 400

    def test_a_removed_queue_is_reported_on_the_page(self):
        site = queuectl.Site(os.path.abspath("none.db"), "localhost")
        status, kind, text = site.answer("GET", "/", {"Host": "localhost"})
        trouble, = re.findall('<section id="trouble"[^>]*>.*?</p>', text)
        assert (status, kind) == (200, "text/html")
        assert "There is no queue" in trouble and "hidden" not in trouble
        step, = re.findall('<div id="anew"[^>]*>.*?</div>', text)
        assert "hidden" not in step and "none.db worker start</code>" in step
        assert site.answer("GET", "/main", {"Host": "localhost"})[0] == 410
        queuectl.Queue("none.db").close()
        text = site.answer("GET", "/", {"Host": "localhost"})[2]
        assert re.search('<div id="anew"[^>]* hidden>', text)

    @mechanism
    def test_its_functions_are_short_and_its_lines_narrow(self):
        text = read_text(SCRIPT)
        begin = text[: text.index("# -- the page: its bricks")].count("\n")
        end = text[: text.index("# -- the server")].count("\n")
        functions = [node for node in ast.walk(ast.parse(text))
                     if isinstance(node, ast.FunctionDef)]
        lengths = [node.end_lineno - node.lineno + 1 for node in functions
                   if begin < node.lineno < end]
        assert max(lengths) <= 25 and sorted(lengths)[len(lengths) // 2] <= 8
        literals = text[text.index("PAGE_CSS = ") : text.index("# Main: ")]
        assert max(map(len, literals.splitlines())) <= 100

    @needs_browser
    def test_a_browser_runs_its_script(self, dashboard):
        enqueue("printf 'a\\033[31mb\\033[0m\\rc<i>'; exit 3", id="x", max_retries=1)
        drain()
        shown = shown_by_browser("http://%s/?job=x" % dashboard.own)
        output, = re.findall('(?s)<pre id="output".*?</pre>', shown)
        assert "c&lt;i&gt;" in output and output.count("<code") == 1
        for place in re.findall('<p id="[^>]* role="status"[^>]*>', shown):
            assert "hidden" not in place  # or its first text would not be announced
        assert '<p role="alert"></p>' in shown and 'class="live' in shown
        assert "succeed" in shown  # the chart, which only the script fetches
        assert 'role="dialog"' in shown  # as the panel covers such a narrow page

    @needs_browser
    @pytest.mark.parametrize("path, script, expected", [
        pytest.param("/", """
            find("q").value = "j1";
            find("q").dispatchEvent(new Event("input", {bubbles: true}));
            """, ">Jobs: 11, newest first</p>", id="a search is announced"),
        pytest.param("/?job=j2", """
            setTimeout(() => find("next").click(), 1000);
            setTimeout(() => {
              const {top, bottom} = rowOf("j1").getBoundingClientRect();
              say(`in view: ${top > 0 && bottom < innerHeight}`);
            }, 3000);
            """, ">In view: true</p>", id="a step shows the row"),
        pytest.param("/?job=j9", """
            setTimeout(() => {
              for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"])
                document.onkeydown(new KeyboardEvent("keydown", {key}));
            }, 1000);
            setTimeout(() => say("at " + find("job").dataset.key), 4000);
            """, ">At j7</p>", id="no step is lost"),
        pytest.param("/?state=pending", """
            for (const words of ["j", "j1"]) {
              find("q").value = words;
              find("q").dispatchEvent(new Event("input", {bubbles: true}));
            }
            setTimeout(() => history.back(), 1500);
            setTimeout(() => say("at " + location.search + find("q").value), 4000);
            """, ">At ?state=pending</p>", id="back from a search"),
        pytest.param("/?job=j2", """
            setTimeout(() => {
              fetch = () => new Promise(() => {});
              find("close").click();
              say("links: " + document.querySelectorAll("#tiles a[href*='job=']").length);
            }, 2000);
            """, ">Links: 0</p>", id="a closed panel stays closed"),
        pytest.param("/?job=j2", """
            setTimeout(() => find("tiles").querySelector("a").click(), 1000);
            setTimeout(() => confirmed("Sure?", "Yes"), 2000);
            setTimeout(() => window.onpopstate(), 2500);
            setTimeout(() => say("open: " + find("sure").open), 3000);
            """, ">Open: false</p>", id="Back means no"),
        pytest.param("/", """
            const push = history.pushState;
            let entries = 0;
            history.pushState = (...all) => { entries += 1; push.apply(history, all); };
            for (const _ of "abc") find("tiles").children[1].click();
            setTimeout(() => say("entries: " + entries), 2000);
            """, ">Entries: 1</p>", id="one entry for an address"),
        pytest.param("/", """
            find("stop").click();
            setTimeout(() => find("tiles").children[1].click(), 1000);
            """, "<title>Frozen at ", id="frozen again"),
        pytest.param("/", 'setTimeout(() => find("stop").click(), 1000);',
                     "<title>Frozen at ", id="a frozen page has a time"),
        pytest.param("/?state=completed", """
            act({question: "/question?verb=cancel&state=completed"});
            """, '<p id="question">There is nothing to cancel.</p>', id="nothing to do"),
        pytest.param("/", """
            fetch = () => new Promise(() => {});
            refresh();
            """, '<p role="alert">The dashboard does not answer.</p>', id="a hang"),
        pytest.param("/", """
            fetch = () => new Promise(() => {});
            setTimeout(() => act({post: "/api/pause"}), 2000);
            """, ">No answer yet: it may still be carried out</p>", id="an action")])
    @needs_browser
    def test_its_script_answers_a_user(self, queue, monkeypatch, path, script, expected):
        add_jobs(queue, [{"command": "true", "id": "j%d" % n} for n in range(20)])
        monkeypatch.setattr(queuectl, "PAGE_HTML", queuectl.PAGE_HTML.replace(
            "refresh();\n</script>", "refresh();\n" + script + "</script>"))
        site = queuectl.Site(queue.path, "127.0.0.1")
        with queuectl.listen(site, "127.0.0.1", 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = "http://127.0.0.1:%d%s" % (server.server_port, path)
            budget = 24000 if "act(" in script else 7000
            assert expected in shown_by_browser(address, budget)
            server.shutdown()


class TestPanel:
    """The panel of a job on the page, and its output."""

    @pytest.mark.parametrize("state, offered, why", [
        ("pending", ["Cancel…", "Delete…"], "pending – no pool is running"),
        ("failed", ["Run now", "Cancel…", "Delete…"], "failed – exit 1, try 2 is due in 2 s;"),
        ("completed", ["Run again…", "Delete…"], "completed – just now, try 1 of 3"),
        ("dead", ["Retry", "Delete…"], "dead – exit 1, just now, try 3 of 3")])
    def test_it_begins_with_the_reason(self, queue, page, state, offered, why):
        add_job(queue)
        for _ in range({"failed": 1, "completed": 1, "dead": 3}.get(state, 0)):
            queue.clock.now += 100
            verb = queue.complete if state == "completed" else queue.fail
            verb(claim(queue), make_outcome(finished_at=queue.clock.now))
        panel = page("/?job=job").find("section[@id='job']")
        assert list(buttons_of(panel)) == [*offered, "Copy"]
        assert words_of(named_part(panel, "why")).startswith(why)
        # Its command stands below the verdict, where it can be copied.
        assert "to start one" not in words_of(panel)
        assert [link.get("id") for link in panel.iter("a")][0] == "close"

    def test_a_running_job_can_only_be_cancelled(self, queue, page, monkeypatch):
        add_job(queue)
        claim(queue)
        monkeypatch.setattr(queuectl, "living_pools", lambda path: {7: [1]})
        monkeypatch.setattr(queuectl, "is_locked", lambda path: True)
        panel = page("/?job=job").find("section[@id='job']")
        assert words_of(named_part(panel, "why")) == "processing – for 1 s, try 1 of 3"
        assert "worker1" in words_of(panel.find("dl"))
        cancel, _, to_end, _ = buttons_of(panel).items()
        assert to_end[0] == "Jump to the end"  # shown by the script
        assert cancel[1]["data-ask"] == "Cancel job? All its processes are ended."
        assert cancel[1]["data-done"] == "Cancelling job"
        queue.cancel(["job"])
        panel = page("/?job=job").find("section[@id='job']")
        assert "Cancel…" not in buttons_of(panel)
        assert "It is being cancelled" in words_of(panel)

    def test_a_job_that_others_wait_for_is_not_deleted(self, queue, page):
        add_job(queue, id="a")
        add_job(queue, id="b", after=["a"])
        panel = page("/?job=a").find("section[@id='job']")
        buttons = buttons_of(panel)
        assert "Delete…" not in buttons
        assert "It can't be deleted: other jobs wait for it" in words_of(panel)
        assert "come after it stay" in buttons["Cancel…"]["data-ask"]

    def test_it_leads_to_the_jobs_above_and_below_it(self, queue, page):
        add_jobs(queue, [{"command": "true", "id": "j%d" % n} for n in range(60)])

        def steps(address):
            links = page(address).findall("section[@id='job']//a")
            return {link.get("id"): link.get("href") for link in links
                    if link.get("id") in ("previous", "next")}

        assert steps("/?job=j59") == {"next": "/?job=j58"}
        assert steps("/?q=j3&job=j35") == {
            "previous": "/?q=j3&job=j36", "next": "/?q=j3&job=j34"}
        assert steps("/?q=j3&job=j50") == {"next": "/?q=j3&job=j39"}
        onward = steps("/?job=j10")["next"]  # from the last row to the next page
        assert onward == "/?before=j10&first=51&job=j9"
        assert steps(onward) == {
            "previous": "/?job=j10", "next": "/?before=j10&first=51&job=j8"}

    def test_a_chain_can_be_followed_both_ways(self, queue, page):
        for name, after in (("a", []), ("b", ["a"]), ("c", ["b"])):
            add_job(queue, id=name, after=after)
        claim_and_complete(queue)
        assert links_of(page("/?job=b").find("section[@id='job']/dl")) == {
            "a (completed)": "/?job=a", "c (behind a job)": "/?job=c"}
        for n in range(queuectl.LINKS_SHOWN + 9):
            add_job(queue, id="d%d" % n, after=["c"])
        facts = page("/?job=c").find("section[@id='job']/dl")
        assert len(links_of(facts)) == 1 + queuectl.LINKS_SHOWN
        assert "d4 (behind a job)and 9 more" in words_of(facts)

    def test_it_names_the_dead_job_that_blocks_it(self, queue, page):
        let_die(queue, "a", priority=1)
        for name, after in (("b", "a"), ("c", "b")):
            add_job(queue, id=name, after=[after])
        panel = page("/?job=c").find("section[@id='job']")
        assert "blocked bya (dead)comes afterb (blocked)" in words_of(panel.find("dl"))
        assert buttons_of(panel)["Retry what blocks it"]["data-post"] == "/api/jobs/-/retry?id=a"
        queue.retry(["a"])
        assert "blocked by" not in words_of(page("/?job=c").find("section[@id='job']"))

    def test_a_dead_job_that_is_retried_meanwhile_blocks_nothing(
            self, queue, page, monkeypatch):
        let_die(queue, "a")
        add_job(queue, id="x", after=["a"])
        earlier = queue.blocked_jobs()
        queue.retry(["a"])
        monkeypatch.setattr(
            queuectl.Queue, "blocked_jobs", lambda queue: earlier)  # from the cache
        panel = named_part(page("/?job=x"), "job")
        assert [*buttons_of(panel)][0] == "Cancel…"

    def test_no_button_takes_the_place_of_another(self, queue, page):
        add_job(queue, delay=60)
        before = buttons_of(page("/?job=job").find("section[@id='job']"))
        queue.cancel(["job"])
        after = buttons_of(page("/?job=job").find("section[@id='job']"))
        keys = [{button.get("data-key") for button in buttons.values()} - {None}
                for buttons in (before, after)]
        assert keys == [{"do-Run now", "do-Cancel…", "do-Delete…"},
                        {"do-Retry", "do-Delete…"}]

    def test_what_runs_once_more_or_destroys_asks_first(self, queue, page):
        add_job(queue, id="x")
        claim_and_complete(queue)
        again = buttons_of(page("/?job=x").find("section[@id='job']"))["Run again…"]
        assert again["data-ask"] == "x is completed. Run it again?"
        assert "class" not in again and again["data-do"] == "Yes, run again"

    def test_the_holder_of_a_lock_can_be_opened(self, queue, page, monkeypatch):
        for name in ("a", "b"):
            add_job(queue, id=name, lock="l")
        claim(queue)
        facts = page("/?job=b").find("section[@id='job']/dl")
        assert "behinda (lost)" in words_of(facts)
        assert links_of(facts)["a (lost)"] == "/?job=a"
        monkeypatch.setattr(queuectl, "obstacle", lambda status: None)
        assert words_of(named_part(page("/?job=b"), "why")) == (
            "behind a lock – waits for the lock l: job a has it")

    def test_a_job_that_is_gone_is_reported_in_it(self, queue, page):
        add_job(queue, id="x")
        gone = named_part(page("/?job=gone&q=x"), "job")
        assert words_of(gone.find(".//h2")) == "There is no job gone"
        assert links_of(gone) == {"→": "/?q=x&job=x", "Close": "/?q=x"}
        assert [*buttons_of(gone)] == []

    def test_run_now_moves_no_job_that_is_due_already(self, queue, dashboard):
        queue.clock.now = time.time() - 100
        for name in ("a", "b"):
            add_job(queue, id=name, delay=1)
        queue.clock.now += 100
        assert dashboard.post("/api/jobs/b/run").status == 200
        assert dashboard.post("/api/jobs/a/run").status == 200
        queue.promote(queue.clock.now)
        assert claim(queue).id == "a"
        answer = dashboard.post("/api/jobs/b/run")
        assert (answer.status, "waits for no time" in answer.text) == (400, True)

    def test_run_now_makes_a_job_due(self, queue, page, dashboard):
        queue.clock.now = time.time()
        enqueue(id="x", delay=3600)
        run_now = buttons_of(page("/?job=x").find("section[@id='job']"))["Run now"]
        assert not queue.has_claimable()
        assert dashboard.post(run_now["data-post"]).status == 200
        assert claim(queue).id == "x"
        assert dashboard.post("/api/jobs/x/run").status == 400  # it runs already

    def test_earlier_runs_can_be_reached(self, queue, page):
        add_job(queue, id="x", max_retries=1)
        for _ in range(20):
            queue.fail(claim(queue), make_outcome())
            queue.retry(["x"])
        def shown(address):
            links = named_part(page(address), "runs")
            marked, = [words_of(link) for link in links if link.get("aria-current")]
            return ([int(words_of(link).split()[1]) for link in links
                     if words_of(link).startswith("run")], marked[:6],
                    {name: link for name, link in links_of(links).items()
                     if not name.startswith("run")})
        numbers, marked, others = shown("/?job=x")
        assert numbers == [*range(20, 11, -1)] and marked == "run 20"
        assert others == {"11 earlier": "/?job=x&run=11"}
        numbers, marked, others = shown("/?job=x&run=11")
        assert numbers == [*range(15, 6, -1)] and marked == "run 11"
        assert others == {"Latest: run 20": "/?job=x&run=20", "6 earlier": "/?job=x&run=6"}
        assert shown("/?job=x&run=1")[0] == [5, 4, 3, 2, 1]

    def test_runs_lead_to_their_outputs(self, queue, page):
        add_job(queue, id="x")
        for text in (b"one", b"two"):
            queue.fail(claim(queue), make_outcome(output=text))
            queue.clock.now += 10
        panel = page("/?job=x", is_whole=True).find("section[@id='job']")
        assert words_of(named_part(panel, "output")) == "two"
        links = links_of(named_part(panel, "runs"))
        assert list(links) == ["run 2 · 2001-09-09 01:46:50 UTC · exit 1 · <1 ms",
                               "run 1 · 2001-09-09 01:46:40 UTC · exit 1 · <1 ms"]
        # By these the script shows them in the zone of the browser.
        assert [time.get("datetime") for time in panel.find("dl").iter("time")] == [
            "2001-09-09T01:46:40Z", "2001-09-09T01:46:50Z"]
        assert named_part(panel, "runs").find("a/time").get("datetime") == (
            "2001-09-09T01:46:50Z")
        earlier = page([*links.values()][1], is_whole=True)
        assert words_of(named_part(earlier, "output")) == "one"

    @pytest.mark.parametrize("printed, shown", [
        (b"a\r\nb\r\n", "a\nb\n"), (b" 1%\r 50%\r100%\nok", "100%\nok"),
        (b"1%\r2%\r", "2%"), (b"\x1b]0;title\x07x\x1b[2K\x1b[?25l\x1b(By", "xBy"),
        (b"\x1b[38;5;" + 5000 * b"1" + b"mx", "x"),
        pytest.param(b"\xff\xc3\xa9", "\\xffé", marks=posix_only), (b"<i>\x1b[1m&\x1b[0m", "<i>&")])
    def test_an_output_reads_as_on_a_terminal(self, printed, shown):
        parts, _ = queuectl.painted(printed, "")
        assert "".join(text for text, _ in parts) == shown

    @pytest.mark.parametrize("codes, style", [
        ("31", "a1 bold"), ("1;92", "a2 bold"), ("0", ""), ("", ""), ("39", "bold"),
        ("37", "bold"), ("5", "a4 bold"), ("38;5;1", "a1 bold"), ("38;5;9", "a1 bold"),
        ("38;5;15", "bold"), ("38;5;196", "a1 bold"), ("38;5;46", "a2 bold"),
        ("38;5;21", "a4 bold"), ("38;5;245", "bold"), ("48;5;2", "a4 b2 bold"),
        ("48;2;31;32;33", "a4 bold"), ("38;2;250;240;10", "a3 bold"),
        ("38;5;196;32", "a2 bold"), ("38;5", "bold"), ("38", "bold"), ("38;2;", "bold"),
        ("22", "a4"), ("4", "a4 bold underlined"), ("0;7", "reversed"), ("7;27", "a4 bold"),
        ("41", "a4 b1 bold"), ("41;49", "a4 bold"), ("0;97;101", "b1"), ("40", "a4 bold"),
        ("01;031", "a1 bold")])
    def test_styles_are_those_of_a_terminal(self, codes, style):
        assert queuectl.style_after(iter(codes.split(";")), "a4 bold") == style

    @posix_only
    def test_an_output_comes_piece_by_piece_as_it_grows(self, queue, page):
        add_job(queue, id="x")
        with leased_run(queue, os.getpid()) as (run, lease):
            def look(address):
                code = page(address)[0]
                return words_of(code), words_of(code.find("i")), code.get("data-next")

            lease.write(b"one\n\x1b[31mtwo\nhal")
            shown, last, following = look("/output?id=x")
            assert (shown, last) == ("one two hal", "hal")
            assert "style=a1&from=13" in following
            assert look(following) == ("hal", "hal", following)  # nothing new
            lease.write("f é".encode()[:-1])
            lease.write("é".encode()[-1:] + b"\n 1%\r 2%\r")
            shown, last, following = look(following)
            assert (shown, last) == ("half é 2%", "2%")
            assert "from=25" in following  # what was written over is not given again
            lease.write(b" 3%\rdone\n")
            assert look(following)[:2] == ("done", "")
            queue.complete(run, make_outcome(None, output=b"one\ntwo\n"))
        assert page("/output?id=x")[0].get("data-next") is None

    def test_the_tail_of_a_long_output_is_shown_and_all_is_saved(self, queue, page):
        output = b"".join(b"line %d\n" % number for number in range(50000))
        add_job(queue, id="x")
        queue.complete(claim(queue), make_outcome(None, output=output))
        code = page("/output?id=x")[0]
        assert len(code.text) < queuectl.PIECE + 100
        note, first, _ = code.text.split("\n", 2)
        assert re.fullmatch(r"\[before this: [\d,]+ bytes in the download\]", note)
        before = int(re.sub(r"\D", "", note))
        assert re.fullmatch(r"line \d+", first)
        assert code.text.endswith("\nline 49999\n")
        assert output[before:].decode().startswith(first)
        panel = page("/?job=x").find("section[@id='job']")
        assert "{:,} bytes keptCopy what is shown".format(len(output)) in words_of(panel)
        saved = panel.find(".//a[@download]")
        assert saved.get("download") == "x-1.log"
        assert saved.get("href") == "/output.log?id=x&run=1"
        assert queuectl.download_route(queue, {"id": "x", "run": "1"}) == output.decode()

    @pytest.mark.parametrize("output, first", [
        ("é" * 300000 + "x", "é"), ("é" * 300000 + "\n", "é"), ("x" * 300000 + "\nlast\n", "last"),
        ("€" * 100000 + "\r\n", "€")])
    def test_a_line_that_is_too_long_is_shown_in_part(self, queue, page, output, first):
        add_job(queue, id="x")
        queue.complete(claim(queue), make_outcome(None, output=output.encode()))
        note, shown = "".join(page("/output?id=x")[0].itertext()).split("\n", 1)
        before = int(re.sub(r"\D", "", note))
        assert shown.startswith(first)
        assert shown == output.encode()[before:].decode().replace("\r", "")

    def test_a_run_without_output_has_no_box(self, queue, page):
        add_job(queue, id="x")
        run = claim(queue)
        assert named_part(page("/?job=x"), "output") is not None  # it may print yet
        queue.complete(run, make_outcome(None))
        panel = page("/?job=x").find("section[@id='job']")
        assert words_of(panel).endswith("It printed nothing")
        assert named_part(panel, "output") is None

    def test_what_was_dropped_is_told_from_what_is_not_shown(self, queue, page):
        add_job(queue, id="x")
        kept = queuectl.kept_end(b"0123456\n" * 25000, 160000)
        queue.complete(claim(queue), make_outcome(None, output=kept))
        assert "Output160,000 bytes kept" in words_of(named_part(page("/?job=x"), "job"))
        assert page("/output?id=x")[0].text.startswith(
            "[before this: 40,000 bytes dropped, 60,008 bytes in the download]\n0123456\n")


# ======================================================================================
# The library
# ======================================================================================

# Each verb of a Queue, and how the test calls it.
QUEUE_VERBS = {
    "add": lambda queue: queue.add("true"),
    "enqueue": lambda queue: queue.enqueue([]),
    "claim": claim,
    "cancel": lambda queue: queue.cancel(["job"]),
    "retry": lambda queue: queue.retry(["job"]),
    "delete": lambda queue: queue.delete(["job"]),
    "delete many": lambda queue: queue.delete_all(queuectl.where()),
    "job": lambda queue: queue.job("job"),
    "jobs": lambda queue: list(queue.jobs()),
    "wait": lambda queue: queue.wait(["job"], 0),
    "counts": lambda queue: queue.counts(),
    "stats": lambda queue: queuectl.read_stats(queue, 0),
    "set": lambda queue: queue.set("keep", 1),
    "settings": lambda queue: queue.settings(),
}


def all_verbs_are_refused(queue):
    """Return True if every verb of a queue is refused."""
    for verb in QUEUE_VERBS.values():
        with pytest.raises(queuectl.QueueError, match="open one here"):
            verb(queue)
    return True


def raised_by(action):
    """Return the class of the exception that an action raises, or None."""
    try:
        action()
    except BaseException as error:
        return type(error)


class TestLibrary:
    """The class Queue in programs of others."""

    @pytest.mark.parametrize("change, text", [
        (lambda queue: queue.edit("x", {"priority": "high"}), "priority"),
        (lambda queue: queue.edit("x", {"id": "y"}), "a job keeps its id"),
        (lambda queue: queue.edit("x", {"colour": 1}), "unknown field"),
        (lambda queue: queue.set("keep", "long"), "keep"),
        (lambda queue: queue.set("colour", 1), "unknown setting"),
        (lambda queue: queue.unset("paused"), "unknown setting")])
    def test_its_values_are_checked_as_those_of_the_commands(self, queue, change, text):
        add_job(queue, id="x")
        before = queue.job("x"), queue.settings()
        with pytest.raises(queuectl.QueueError, match=text):
            change(queue)
        assert (queue.job("x"), queue.settings()) == before

    def test_a_program_can_add_wait_and_read_the_output(self):
        with queuectl.Queue("queuectl.db") as queue:
            name = queue.add("echo from a library", priority=2)
            with pytest.raises(queuectl.QueueError, match="unknown field"):
                queue.add("true", colour="red")
            assert queue.wait([name], timeout=0) is None
            drain()
            assert queue.wait([name])["completed"] == 1
            assert queue.output(queue.job(name)).split() == [b"from", b"a", b"library"]

    @pytest.mark.parametrize("verb", ["cancel", "retry", "delete", "wait"])
    def test_a_text_is_refused_as_a_list_of_ids(self, queue, verb):
        for name in ("text", *"text"[:3]):
            add_job(queue, id=name)
        with pytest.raises(queuectl.QueueError, match="list"):
            # A wait without a timeout would not end.
            getattr(queue, verb)("text", *[0] * (verb == "wait"))
        assert {job["state"] for job in jobs().values()} == {"pending"}
        assert len(jobs()) == 4

    @posix_only
    def test_a_queue_is_refused_in_a_forked_child(self, queue):
        add_job(queue)
        assert os.waitpid(fork_and_run(lambda: all_verbs_are_refused(queue)), 0)[1] == 0
        assert os.waitpid(fork_and_run(lambda: queue.close() is None), 0)[1] == 0
        assert queue.add("true") and len(jobs()) == 2

    def test_a_queue_is_refused_in_another_thread(self, queue):
        add_job(queue)
        reported = []
        for action in (
            lambda: reported.append(all_verbs_are_refused(queue)), lambda: next(pages)
        ):
            pages = queue.jobs()
            thread = threading.Thread(target=lambda: reported.append(raised_by(action)))
            thread.start()
            thread.join(20)
        assert reported == [True, None, queuectl.QueueError]
        assert queue.add("true")

    def test_closing_in_another_thread_raises_no_error_of_sqlite(self, queue):
        kinds = []
        thread = threading.Thread(target=lambda: kinds.append(raised_by(queue.close)))
        thread.start()
        thread.join(20)
        assert kinds[0] in (None, queuectl.QueueError)

    def test_a_closed_queue_says_so_and_can_be_closed_again(self):
        queue = queuectl.Queue("queuectl.db")
        add_job(queue)
        pages = queue.jobs()
        queue.close()
        queue.close()
        assert all_verbs_are_refused(queue)
        with pytest.raises(queuectl.QueueError, match="was closed"):
            next(pages)
        with queue, pytest.raises(queuectl.QueueError, match="was closed"):
            queue.job("job")


# ======================================================================================
# Chaos
#
# For a long run: CHAOS_SECONDS=60 CHAOS_SEEDS="11 12 13" python -m pytest -s -k chaos
# ======================================================================================

# A job takes a lock of its own, so that an overlap of its runs is noted.
OWN_LOCK = "exec 8>>locks/$QUEUECTL_JOB_ID; flock -n 8 ||" \
    " { echo $QUEUECTL_RUN $(date +%T.%N) >> overlaps; exit 1; }; "
# The beginning of a command that does something in the first run of a job only.
FIRST_TIME = "[ -e marks/$QUEUECTL_JOB_ID ] || { : > marks/$QUEUECTL_JOB_ID; "
CHAOS_COMMANDS = [
    "true",
    "sleep TIME",
    "sleep TIME & wait",
    "exec >/dev/null 2>&1; sleep TIME",
    "trap '' TERM; sleep TIME",
    FIRST_TIME + "exit 1; }",
    FIRST_TIME +
    "grep -qa queuectl /proc/$PPID/cmdline && kill -9 $PPID; }; sleep TIME",
]
CHAOS_STRIKES = 10 * ["feed"] + 5 * ["start", "kill worker"] + 3 * ["freeze"] \
    + 2 * ["kill pool", "kill supervisor", "stop service"] + ["stop"]
FAR_DELAY = 36000  # seconds; jobs with this delay stay pending
EXPECTED_FILES = {
    "queuectl.db", "queuectl.log", "queuectl.log.1", "locks", "marks", "overlaps"}
COUNT_READY = "SELECT count(*) FROM jobs WHERE state = 'pending' AND gate"
COUNT_SOON = COUNT_READY.replace("gate", "run_at BETWEEN ? AND ?")


class Chaos:
    """Kill processes of a queue at random, then look for lost jobs.

    The seed fixes the choices. Their moments, and so their effects, depend on the
    machine.
    """

    def __init__(self, seed):
        self.rnd, self.tally = random.Random(seed), Counter()
        self.errors = tempfile.TemporaryFile("w+")
        self.pools, self.stops = [], []  # processes
        self.batches = []  # of enqueued jobs
        self.later = []  # signals to send: time, number, name, pids
        self.wrong = []  # the mistakes that were found

    def rage(self, seconds):
        """Strike at random for some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for blow in [blow for blow in self.later if blow[0] < time.monotonic()]:
                self.later.remove(blow)
                self.hit(*blow[1:])
            self.strike(self.rnd.choice(CHAOS_STRIKES))
            time.sleep(self.rnd.uniform(0, 0.25))

    def close(self):
        """Kill what is left, and close all files."""
        self.hit(signal.SIGKILL, "at the very end", *processes_of_this_test())
        self.errors.close()
        for batch in self.batches:
            batch.out.close()
        for process in (
            self.pools + self.stops + [batch.process for batch in self.batches]
        ):
            process.wait(10)

    def start(self, *words, **options):
        """Start a command of queuectl in a session of its own."""
        command = [sys.executable, "-c", PROGRAM % QUICK, *words]
        options = dict({"stdout": subprocess.DEVNULL, "stderr": self.errors}, **options)
        return subprocess.Popen(command, start_new_session=True,
                                env=python_environment(), **options)

    def ask(self, *words):
        """Run a command of queuectl to its end. Return its JSON document."""
        process = self.start(*words, "--json", stdout=subprocess.PIPE)
        out = process.communicate(timeout=90)[0]
        printed = os.pread(self.errors.fileno(), 2**20, 0).decode().splitlines()[-3:]
        assert process.returncode == 0, (words, process.returncode, printed)
        return json.loads(out)

    def workers(self, pool=None):
        """Return the pids of the workers of a pool, or of all pools."""
        every = queuectl.living_pools(queue_path())
        return [
            pid for one, pids in every.items() if pool in (None, one) for pid in pids]

    def hit(self, number, what, *pids):
        """Signal those of the pids that are processes of this test, and count them."""
        for pid in set(pids) & set(processes_of_this_test()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self.tally[what] += 1

    def until(self, condition, timeout, what):
        """Wait for a condition. Note a mistake after the timeout."""
        if not poll_until(condition, timeout):
            self.wrong.append("after %d s still: %s" % (timeout, what))

    def strike(self, what):
        """Do one of CHAOS_STRIKES, if it makes sense now."""
        pids = self.rnd.sample(self.workers() or [0], 1)
        alive = [pool.pid for pool in self.pools if pool.poll() is None]
        pool = self.rnd.choice(alive or [0])
        if what == "feed" and self.few_are_ready():
            self.feed(self.rnd.random() < 0.3)
        elif what == "start" and len(alive) < 3:
            count = str(self.rnd.randint(1, 4))
            self.pools.append(self.start("worker", "start", "--quiet", "--count", count))
        elif what == "kill worker":
            self.hit(signal.SIGKILL, "workers killed", *pids)
        elif what == "freeze":
            self.hit(signal.SIGSTOP, "workers frozen", *pids)
            at = time.monotonic() + self.rnd.uniform(0, 4)
            self.later.append((at, signal.SIGCONT, "workers thawed", *pids))
        elif what == "kill supervisor":
            self.hit(signal.SIGKILL, "supervisors killed", pool)
        elif what == "kill pool":
            # They are stopped first, so that none sees another one die.
            self.hit(signal.SIGSTOP, "pools killed whole", pool)
            for number, word in (
                (signal.SIGSTOP, "stopped"), (signal.SIGKILL, "killed")
            ):
                self.hit(number, word + " with their pool", pool, *self.workers(pool))
        # systemd signals all processes at once. A pool that has not made its file yet
        # can't catch a signal.
        elif what == "stop service" and len(alive) == 1 and pool in (
                queuectl.living_pools(queue_path())):
            others = self.pools + self.stops + [batch.process for batch in self.batches]
            runs = (
                set(processes_of_this_test())
                - {process.pid for process in others}
                - set(self.workers()))
            self.hit(signal.SIGTERM, "stopped as services are", pool)
            pids = [*self.workers(pool), *runs]
            self.hit(signal.SIGTERM, "stopped with their service", *pids)
        elif what == "stop":
            how = self.rnd.choice(["", ["--now"]])
            self.stops.append(self.start("worker", "stop", *how))

    def few_are_ready(self):
        """Return True if few jobs are ready; False while the database is locked."""
        with contextlib.suppress(sqlite3.OperationalError):
            return query(COUNT_READY, timeout=0.5)[0][0] < 250

    def feed(self, doomed):
        """Enqueue a few jobs of every kind, or thousands by a process to be killed."""
        batch = types.SimpleNamespace(
            near=set(), far=set(), out=tempfile.TemporaryFile())
        with tempfile.TemporaryFile("w+") as source:
            for n in range(self.rnd.randint(*((2000, 4000) if doomed else (5, 25)))):
                job = {
                    "id": "b%d-%d" % (len(self.batches), n),
                    "command": OWN_LOCK + "true"}
                if doomed and n % 20:
                    job["delay"] = FAR_DELAY
                elif not doomed:
                    length, delay = "%.2f" % self.rnd.uniform(
                        0.05, 0.4
                    ), self.rnd.uniform(-2, 1)
                    job["command"] = OWN_LOCK + self.rnd.choice(CHAOS_COMMANDS).replace(
                        "TIME", length)
                    job.update(delay=max(0, delay), priority=self.rnd.randint(-1, 1))
                (batch.far if job.get("delay") == FAR_DELAY else batch.near).add(
                    job["id"])
                source.write(json.dumps(job) + "\n")
            source.seek(0)
            batch.process = self.start("enqueue", "-", stdin=source, stdout=batch.out)
        self.batches.append(batch)
        if doomed:
            blow = signal.SIGKILL, "enqueuers killed", batch.process.pid
            self.later.append((time.monotonic() + self.rnd.uniform(0, 1), *blow))

    def calm(self):
        """End every process that is at work. Then run all jobs in a new pool."""
        for _, *blow in self.later:
            self.hit(*blow)
        others = self.stops + [batch.process for batch in self.batches]
        self.until(lambda: None not in [p.poll() for p in others], 60, "a command runs")
        ending = self.rnd.choice(["killed", "stopped", "kept"])
        self.tally["at the end, pools are " + ending] += 1
        if ending == "killed":
            pids = [pool.pid for pool in self.pools] + self.workers()
            self.hit(signal.SIGKILL, "killed at the end", *pids)
        elif ending == "stopped":
            self.ask("worker", "stop")
        elif None in [pool.poll() for pool in self.pools]:
            self.until(lambda: not query(COUNT_READY)[0][0], 60, "jobs are ready")
        last, dead = time.time() + FAR_DELAY / 2, True
        while dead and not self.wrong:
            self.until(
                lambda: query(COUNT_SOON, time.time(), last) == [(0,)], 30,
                "delayed jobs")
            drain = self.start("worker", "start", "--quiet", "--count", "8", "--drain")
            self.until(lambda: drain.poll() is not None, 90, "the drain runs")
            dead = query("SELECT id, error FROM jobs WHERE state = 'dead'")
            self.wrong += [
                "%s died: %s" % job for job in dead if "5 times" not in job[1]]
            self.tally["dead and retried"] += len(dead)
            dead and self.ask("dlq", "retry", "--all")
        self.ask("worker", "stop")
        self.until(lambda: not processes_of_this_test(), 10, "processes are left")
        codes = [process.wait(10) for process in self.pools + self.stops]
        self.wrong += ["exit code %d" % code for code in codes if code not in (0, -9)]
        self.wrong += [
            "left: " + name for name in set(os.listdir(".")) - EXPECTED_FILES]

    def reckon(self):
        """Compare the acknowledged jobs with the jobs in the queue."""
        states, ran = dict(query("SELECT id, state FROM jobs")), set(
            os.listdir("locks"))
        for number, batch in enumerate(self.batches):
            printed, code = os.pread(batch.out.fileno(), 1, 0), batch.process.returncode
            every = batch.near | batch.far
            there = every & set(states)
            if there != every and (there or printed or not code):
                self.wrong.append(
                    "b%d, exit code %d: %d there" % (number, code, len(there)))
            self.tally["killed and there" if code else "acknowledged"] += bool(there)
            self.tally["jobs to run"] += len(batch.near & there)
            self.tally["jobs far off"] += len(batch.far & there)
            self.wrong += [
                "%s: %s" % (name, states[name])
                for name in there
                if states[name] != ("pending" if name in batch.far else "completed")]
            self.wrong += [name + " never ran" for name in batch.near & there - ran]
        self.wrong += (
            read_text("overlaps").splitlines() if os.path.exists("overlaps") else [])
        counts = query("SELECT state, count(*) FROM jobs GROUP BY 1 ORDER BY 1")
        if counts != query("SELECT * FROM counts WHERE jobs ORDER BY 1"):
            self.wrong.append("counts are wrong, right is %s" % counts)
        self.wrong += [row for row, in query("PRAGMA integrity_check") if row != "ok"]

    def report(self):
        """Print the strikes, and the kinds of lines in the log above INFO."""
        text = os.pread(self.errors.fileno(), 2**20, 0).decode() + read_text(
            "queuectl.log")
        lines = [line for line in text.splitlines() if " INFO " not in line]
        wrong = re.compile("Errno|Error|failed")
        self.wrong += filter(wrong.search, lines)
        number = r"\[[\d, ]+\]|\bb\d+-\d+|\b[\da-f]{8}\b|[\d:,-]*\d"
        kinds = Counter(re.sub(number, "#", line) for line in lines)
        self.tally.update({"pools": len(self.pools), "stops": len(self.stops)})
        print("    %s" % dict(self.tally))
        print("".join("%8d %s\n" % (n, x) for x, n in kinds.most_common()), flush=True)


class TestChaos:
    """Kill all processes of a queue at random, then look for lost jobs."""

    @needs_proc
    @pytest.mark.skipif(not shutil.which("flock"), reason="needs flock(1)")
    @pytest.mark.parametrize("seed", os.environ.get("CHAOS_SEEDS", "1").split())
    def test_chaos_loses_no_job_and_overlaps_no_runs(self, seed):
        print("seed", seed)
        os.mkdir("locks")
        os.mkdir("marks")
        configure("backoff_base", "0.9")
        configure("max_retries", "50")
        chaos = Chaos(int(seed))
        try:
            chaos.rage(float(os.environ.get("CHAOS_SECONDS", 2)))
            chaos.calm()
            chaos.reckon()
            chaos.report()
        finally:
            chaos.close()
        assert chaos.wrong == [], "seed %s" % seed


# ======================================================================================
# The file itself
# ======================================================================================


class TestSource:
    """The program's text."""

    def test_an_older_python_can_read_the_source_and_refuse_it(self):
        ast.parse(read_text(SCRIPT), feature_version=(3, 6))

    def test_no_name_is_defined_twice(self):
        names = Counter()
        for node in ast.parse(read_text(SCRIPT)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names[node.name] += 1
            elif isinstance(node, ast.Assign):
                names.update(name.id for target in node.targets
                             for name in ast.walk(target) if isinstance(name, ast.Name))
        assert [name for name, count in names.items() if count > 1] == []

    def test_a_command_imports_nothing_that_only_pools_need(self):
        code = "import sys, queuectl; queuectl.main(['status']); print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE,
                                env=python_environment()).stdout.decode().split()
        needless = {"logging", "multiprocessing", "http.server", "secrets"}
        needless |= {"subprocess"} if os.name == "posix" else set()
        assert not needless & set(loaded)


def read_readme():
    """Return the text of the README."""
    return read_text(os.path.join(HERE, "README.md"))


def own_command(line):
    """Return a line of the README that runs this program with this Python."""
    own = '"%s" "%s"' % (sys.executable, COMPILED)
    return re.sub(r"\b(python3? queuectl\.py|queuectl)(?= [a-z])", lambda _: own, line)


def run_readme_line(line):
    """Run a command line of the README. Return its output."""
    return subprocess.run(own_command(line), shell=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True,
                          timeout=60).stdout


def readme_block(begin):
    """Return the block of the README that has a line which begins so, as lines."""
    blocks = re.findall(r"(?m)^((?:    .*\n)+)", read_readme())
    block, = [block for block in blocks if re.search(
        "(?m)^ *" + re.escape(begin), block)]
    return textwrap.dedent(block).splitlines()


def readme_words(text):
    """Return the words of each line of a text; times and process numbers are alike."""
    text = re.sub(r"<?\b\d[\d.]*(ms|s|m|h)( ago)?\b|just now|pool \d+", "…", text)
    return sorted(map(str.split, text.splitlines()))


def make_executable(path, lines):
    """Write an executable file."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    os.chmod(path, 0o755)


# The places that the README names: a pattern to find, and its replacement.
WITHOUT_PRIORITIES = [
    (r'(?s)    "priority": .*?\),\n(?=    "run_at")', ""),
    (r"    priority INTEGER NOT NULL DEFAULT 0,\n", ""),
    (r", priority ON jobs\n", " ON jobs\n"),
    (r'ORDER = "priority DESC, run_at, seq"', 'ORDER = "run_at, seq"'),
    (r"(?s)# The priorities of .*?(# The jobs that were due)", r"\1"),
    (r"\{LEVELS\} (SELECT seq FROM) level CROSS JOIN jobs USING \(priority\)",
     r"\1 jobs"),
    (r"(?s)\(priority > :priority\n *OR priority = :priority AND (.*?)\)\"\"\",\n"
     r' *priority=job\["priority"\], ', r'\1""",\n            '),
    (r"(?s)(def oldest_claimable.*?\n).*?(?=def count_delayed)",
     r'\1    return queue.row("SELECT id, run_at FROM jobs WHERE " + CLAIMABLE'
     r' + " ORDER BY run_at, seq LIMIT 1")\n\n\n'),
]


class TestReadme:
    """What the README shows is what happens."""

    def test_it_names_every_command_and_setting(self):
        for word in [*queuectl.COMMANDS, *queuectl.SETTINGS]:
            assert re.search("`[^`]*" + word, read_readme()), word

    def test_it_is_short(self):
        lines = read_readme().splitlines()
        assert len(lines) <= 330 and max(map(len, lines)) <= 100

    @posix_only
    def test_its_transcript_is_what_happens(self):
        text = re.search(r"\n((?:    .*\n)+)", read_readme())[1].replace("    ", "", 1)
        steps = re.split(r"(?m)^ *\$ ", text)[1:]
        assert len(steps) == 4
        configure("backoff_base", "0.1")  # or the failing job would wait for 2 s
        for step in steps:
            line, _, expected = step.partition("\n")
            assert readme_words(run_readme_line(line)) == readme_words(expected), line

    def test_its_demo_shows_what_stands_there(self):
        configure("backoff_base", "0.1")  # or job3 and job4 would take 6 s to die
        lines = readme_block("python queuectl.py status")
        start = lines.index("python queuectl.py worker start --count 2")
        printed = "".join(map(run_readme_line, lines[:start]))
        pool = start_pool(count=2)
        wait_until(lambda: list(jobs("--state", "dead")) == ["job3", "job4"])
        later = "".join(map(run_readme_line, lines[start + 2:]))
        assert pool.wait(10) == 0
        printed += pool.stdout.read() + pool.stderr.read()
        for begin, text in ("enqueued job1", printed), ("Completed: 2", later):
            shown = readme_words("\n".join(readme_block(begin)))
            assert [line for line in shown if line not in readme_words(text)] == []
        assert run_ok("config", "get", "max_retries").out == "5\n"
        assert set(jobs()) == {"job2", "job3", "job4"}

    @posix_only
    def test_its_lines_for_everyday_use_run(self):
        configure("backoff_base", "0")
        with open("commands.txt", "w") as file:
            file.write("true\n\necho two\n")
        lines = re.findall(r"(?m)^\| .* \| `(queuectl .*)` \|$", read_readme())
        assert len(lines) > 25
        for line in lines:
            words = line.split()
            if {"--watch", "dashboard"} & set(words) or words[-2:] == ["--count", "4"]:
                continue  # it would run until it is stopped
            if line == "queuectl retry report":
                run_ok("cancel", "report")
            answer = subprocess.run(own_command(line), shell=True, timeout=60)
            # Some of their programs are not there.
            is_dead = "--drain" in words or words[1] == "wait"
            assert answer.returncode == (1 if is_dead else 0), line
        assert jobs("--match", "echo two") and state_of("report") == "dead"
        assert run_ok("config", "get", "keep").out == "7d\n"

    @posix_only
    def test_its_lines_for_cron_and_ci_run(self):
        _, cron, _, *ci = readme_block("# Cron")
        cron = re.sub(r"^[\d* ]+|cd /srv/queue && |/usr/local/bin/", "", cron)
        assert run_readme_line(cron) == "" == run_readme_line(cron)
        assert list(jobs()) == ["sync"]
        with open("commands.txt", "w") as file:
            file.write("true\necho lost; exit 3\n")
        answer = subprocess.run(
            "\n".join(map(own_command, ci)), shell=True, stdout=subprocess.PIPE)
        assert answer.returncode == 1 and b"\nlost\n" in answer.stdout
        assert list(jobs()) == ["sync"]  # that was another queue

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
    def test_systemd_takes_its_service(self):
        text = "\n".join(readme_block("[Service]"))
        for name, own in {"/usr/local/bin/queuectl": shutil.which("true"),
                          "=queue\n": "=root\n", "/srv/queue": "/tmp"}.items():
            assert name in text
            text = text.replace(name, own)
        with open("queuectl.service", "w") as file:
            file.write(text + "\n")
        answer = subprocess.run(
            ["systemd-analyze", "verify", os.path.abspath("queuectl.service")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        complaints = [line for line in answer.stdout.decode().splitlines()
                      if "queuectl.service:" in line]
        assert complaints == []

    @needs_proc  # as install -D is
    def test_its_service_can_be_installed(self, home):
        shutil.copy(SCRIPT, "queuectl.py")
        script = re.sub(  # what needs root
            r"(?m)^sudo (useradd|systemctl) .*\n| -m 700 -o queue|sudo (-u queue )?", "",
            "\n".join(readme_block("sudo useradd")))
        script = re.sub(r"(?m)(^| )/(?!usr/bin/)", r"\1%s/" % home, script)
        script = script.replace("/usr/bin/python3", shlex.quote(sys.executable))
        subprocess.run("set -e\n" + script, shell=True, check=True)
        os.chdir("srv/queue")
        assert [job["command"] for job in jobs().values()] == ["date"]

    @posix_only
    @pytest.mark.parametrize("launcher", ["srun -Q -n1", "./over-ssh build1"])
    def test_its_launchers_run_commands_as_they_are(self, monkeypatch, launcher):
        make_executable("bin/srun", ["#!/bin/sh", "shift 2", 'exec "$@"'])
        make_executable("bin/ssh", [  # it joins the words, as sshd's shell gets them
            "#!/bin/sh", 'test "$1 $2 $3" = "-o BatchMode=yes build1" || exit 9',
            "shift 3", 'exec sh -c "$*"'])
        make_executable("./over-ssh", readme_block("#!/bin/bash"))
        monkeypatch.setenv("PATH", os.path.abspath("bin"), prepend=os.pathsep)
        if launcher.startswith("srun"):
            run_readme_line(re.search(r"`(\S+ config set launcher .*)`", read_readme())[1])
        else:
            configure("launcher", launcher)
        assert run_ok("config", "get", "launcher").out == launcher + "\n"
        run_ok("enqueue", "--id", "x", "--", "echo", "a  b", "$HOME; *")
        drain(1)
        assert run_ok("logs", "x").out == "a  b $HOME; *\n"

    @posix_only
    def test_its_monitoring_tells_whether_somebody_is_needed(self):
        monitor = re.search(r"`queuectl (status --check)`", read_readme())[1].split()
        code = lambda: cli(*monitor).code
        assert cli(*monitor).err.endswith("queuectl: no pool is running\n")
        enqueue(id="x", max_retries=1)
        assert code() == 1
        start_pool()
        wait_until(lambda: state_of("x") == "completed")
        assert code() == 0
        run_ok("pause")
        assert code() == 1
        run_ok("resume")
        run_ok("enqueue", "--id", "dead", "--max-retries", "1", "--", "exit 1")
        wait_until(lambda: state_of("dead") == "dead")
        assert code() == 1

    @posix_only
    def test_its_backup_can_be_restored(self):
        enqueue(id="kept")
        start_pool()
        wait_until(lambda: state_of("kept") == "completed")
        run_readme_line(re.search(r"`(queuectl backup .*?)`", read_readme())[1])
        backup, = [name for name in os.listdir(".") if name.startswith("backup-")]
        enqueue(id="later")
        run_readme_line("queuectl worker stop")
        script = re.sub("backup-.*?db", backup, "\n".join(readme_block('mv queuectl.db* "')))
        for _ in range(2):  # as well where there is no queue, or an old one
            assert "kept  completed" in run_readme_line(script)
            assert read_status()["paused"] and "later" not in jobs()

    @mechanism
    def test_its_numbers_are_those_of_the_program(self):
        text = " ".join(read_readme().split())
        assert "Eight run at a time, for five minutes at most" in text
        assert (queuectl.MAX_HOOKS, queuectl.HOOK_TIMEOUT) == (8, 300)
        assert "when its worker has died five times" in text and queuectl.MAX_DEATHS == 5
        assert "The log keeps 20 MB" in text and queuectl.LOG_LIMIT == 10 * 2**20

    def test_its_library_example_runs(self):
        program = "\n".join(readme_block("from queuectl import"))
        pool = start_pool(count=1)
        answer = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE,
                                env=python_environment())
        assert answer.stdout.startswith(b"completed b'hello") and pool.poll() is None

    def test_it_names_tests_and_methods_that_there_are(self):
        classes = [value for value in globals().values() if inspect.isclass(value)]
        tests = {name for each in classes for name in (each.__name__, *vars(each))}
        named = re.findall(r"`([Tt]est_?\w+)`", read_readme())
        assert len(named) > 15 and set(named) <= tests
        for owner, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", read_readme()):
            assert hasattr(getattr(queuectl, owner), method), method

    def test_its_promises_are_those_of_selftest(self):
        table = read_readme().partition("| promise | tests |\n| --- | --- |\n")[2]
        promises = re.findall(r"(?m)^\| (.*) \| `", table.partition("\n\n")[0])
        assert promises[:9] == list(queuectl.PROMISES)

    def test_priorities_can_be_removed_where_it_says(self):
        text = read_text(SCRIPT)
        for pattern, place in WITHOUT_PRIORITIES:
            text, count = re.subn(pattern, place, text)
            assert count == 1, pattern
        assert "priority" not in text.replace("PRIORITY", "").lower()
        with open("changed.py", "w", encoding="utf-8") as file:
            file.write(text)
        py_compile.compile("changed.py", "changed.pyc", doraise=True)

        def changed(*argv):
            return subprocess.run([sys.executable, "changed.pyc", *argv], timeout=60,
                                  stdout=subprocess.PIPE, check=True).stdout.decode()

        changed("enqueue", '[{"id":"a","command":"true"},{"id":"b","command":"true"}]')
        assert "1 job before it" in changed("show", "b") or "no pool" in changed(
            "show", "b")
        assert "Oldest Waiting" in changed("status")
        changed("worker", "start", "--drain")
        assert "priority" not in changed("list", "--json") + changed(
            "enqueue", "--help")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
