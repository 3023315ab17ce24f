"""Tests of queuectl: the command line, the life of a job, policy, and what survives a kill.

Most call `main` in this process; where processes matter, real ones are started, and
killed. Nothing sleeps to wait for something: `wait_until` does, with a deadline.
"""
import ast
import atexit
import contextlib
import ctypes
import functools
import gc
import http.client
import inspect
import io
import json
import logging.handlers
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
import threading
import time
import traceback
import types
import urllib.parse
from collections import Counter

import pytest

import queuectl

if os.name == "posix":
    import fcntl
    import multiprocessing.popen_fork  # as a pool does: here once for all of them
    import pty
    import termios
else:
    import msvcrt

posix = pytest.mark.skipif(os.name != "posix", reason="is about what only POSIX has")
forked = pytest.mark.skipif(os.name != "posix", reason="breaks workers, fresh there")
piped = pytest.mark.skipif(
    os.name != "posix" and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version"),
    reason="wine's console keeps the pipes of who started it")

SCRIPT = os.path.abspath(queuectl.__file__)
HERE = os.path.dirname(SCRIPT)
DAY = 86400

# ======================================================================================
# Fixtures and helpers
# ======================================================================================


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Every test has a folder of its own; its pools do not outlive it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUEUECTL_DB", raising=False)
    yield tmp_path
    for process in list(STARTED):
        kill_all(process)
    for pid in lasting():
        with contextlib.suppress(OSError):
            os.kill(pid, KILL)
    for name in os.listdir(TOOLS):  # or there would be more and more to look at
        if name.endswith(".lasts"):
            with contextlib.suppress(OSError):  # on Windows one is held for a moment
                os.remove(os.path.join(TOOLS, name))


# Makes all less patient than it is by default, so that the tests are quick.
QUICK = """
queuectl.TERM_GRACE, queuectl.RECOVERY_INTERVAL, queuectl.RESTART_INTERVAL = 0.2, 0.05, 0.03
queuectl.IDLE_INTERVAL, queuectl.POLL_INTERVAL, queuectl.BLAME_DELAY = 0.1, 0.02, 0.04
"""
exec(QUICK)  # what is run here waits for pools, too
STARTED = []  # processes
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # as os.kill does it on Windows

def taken(file):
    """Lock a file, whatever the tested program thinks of locks; False if it was."""
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return True
    except OSError:
        return False


# A command that lasts, the same on every system; it is known to live by its lock. One
# that is taken `once` lasts only the first time, and never beside another: `out` gets a
# line a run, and `overlaps` is there if two ran at a time.
LASTS = """
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
    if not taken(alone):
        open("overlaps", "a").close()
    with open("out", "a") as out:
        print("run", file=out)
    if len(open("out").readlines()) > 1:
        sys.exit()
mark = open(os.path.join(os.path.dirname(__file__), "%%d.lasts" %% os.getpid()), "a")
while not taken(mark):  # while somebody looks whether it is
    pass
if "thread" in sys.argv:  # goes on without its main one
    import ctypes, threading
    threading.Thread(target=time.sleep, args=(77,)).start()
    ctypes.CDLL(None).pthread_exit(None)
time.sleep(77)
""" % inspect.getsource(taken)
TOOLS = tempfile.mkdtemp()
atexit.register(shutil.rmtree, TOOLS, ignore_errors=True)
with open(os.path.join(TOOLS, "lasts.py"), "w") as file:
    file.write(LASTS)
LASTING = queuectl.shell_line([sys.executable, "-S", file.name])  # -S starts sooner
ENOUGH = 0.5 if os.name == "posix" else 3  # a timeout within which it starts there, too
# Python compiles a script anew each time that it is run, which takes longer than most of
# what is tested here. So it is done once; processes run, or import, what came of it.
COMPILED = py_compile.compile(
    SCRIPT, os.path.join(TOOLS, "queuectl.pyc"), doraise=True)
if os.name != "posix":
    sleep = '"%s" -c "import time as t; t.sleep(%%1)"' % sys.executable
    for name, line in (("true", "exit /b 0"), ("sleep", sleep)):
        with open(os.path.join(TOOLS, name + ".cmd"), "w") as file:
            file.write("@" + line)
    os.environ["PATH"] += os.pathsep + TOOLS


def lasting():
    """Return the pids of the commands that last."""
    pids = []
    for name in os.listdir(TOOLS):
        if name.endswith(".lasts"):
            with open(os.path.join(TOOLS, name), "a") as mark:
                if not taken(mark):
                    pids.append(int(name.partition(".")[0]))
    return pids


def python(program):
    """Return the shell line that runs a program; it has no double quotes in it."""
    return queuectl.shell_line([sys.executable, "-c", program])


class Answer:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        assert self.out.count("\n") == 1, "JSON is one line: %r" % self.out
        return json.loads(self.out)


class Bytes(io.TextIOWrapper):
    """A text stream over bytes, as sys.stdout is one."""

    def text(self):
        self.flush()
        text = self.buffer.getvalue().decode("utf-8", "backslashreplace")
        return text.replace(os.linesep, "\n")


def cli(*argv, stdin=b""):
    """Run a command in this process."""
    out, err = Bytes(io.BytesIO(), "utf-8"), Bytes(io.BytesIO(), "utf-8")
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


def ok(*argv, stdin=b""):
    answer = cli(*argv, stdin=stdin)
    assert answer.code == 0, answer.err
    return answer


def refused(*argv, stdin=b"", code=1):
    """A command that has to fail, with one line and no traceback; return the line."""
    answer = cli(*argv, stdin=stdin)
    assert answer.code == code, (answer.code, answer.err)
    assert answer.out == "" and answer.err.startswith("queuectl: ")
    assert answer.err.count("\n") == 1, answer.err
    return answer.err


def enqueue(command="true", **fields):
    job = dict(fields, command=command)
    return ok("enqueue", json.dumps(job), "--json").json[0]["id"]


def jobs(*options):
    return {job["id"]: job for job in ok("list", "--json", *options).json}


def database():
    return os.path.realpath(os.environ.get("QUEUECTL_DB", "queuectl.db"))


def sql(query, *values, timeout=60):
    """Read what is asked for again and again without the whole command line."""
    with contextlib.closing(sqlite3.connect(database(), timeout=timeout)) as db:
        return db.execute(query, values).fetchall()


def state(name):
    (found,), = sql("SELECT state FROM jobs WHERE id = ?", name)
    return found


def script(*argv, **options):
    """Run a command as a process of its own."""
    return subprocess.run(
        [sys.executable, COMPILED, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", timeout=60, **options
    )


def become(words, program=""):
    """Be a process of queuectl as if it had just been started; for the child of a fork."""
    code = 1
    gc.freeze()  # or a collection copies all the memory of this process
    try:
        # It inherits nothing; and what still closes a file of the parent's closes no other.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in map(int, os.listdir("/dev/fd")):
            if fd not in (0, 1, 2, null):
                os.dup2(null, fd, inheritable=False)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                interrupt = number == signal.SIGINT
                signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)
        sys.unraisablehook = sys.__unraisablehook__
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, encoding="utf-8") for fd, mode in enumerate("rww"))
        queuectl.ENVIRONMENT = dict(os.environb)
        exec(program, {"queuectl": queuectl})
        code = queuectl.main(words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Forked:
    """A process of queuectl, with what is used here of a Popen.

    It is a fork of this one, which has imported everything: that is ten times as quick.
    """

    def __init__(self, words, program):
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), stdout, stderr)):
                os.dup2(fd, number)
            become(words, program)
        os.close(stdout)
        os.close(stderr)
        self.stdout, self.stderr = open(out, encoding="utf-8"), open(err, encoding="utf-8")

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                ended = os.WIFEXITED(status)
                self.returncode = os.WEXITSTATUS(status) if ended else -os.WTERMSIG(status)
        return self.returncode

    def wait(self, timeout=20):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("queuectl", timeout)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


PROGRAM = "import queuectl, sys\n%s\nsys.exit(queuectl.main())"


def begin(*words, program="", fresh=os.name != "posix"):
    """Start a process of queuectl, by a program that breaks something in it first."""
    if not fresh:
        process = Forked(words, program)
    else:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM % program, *words], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            env=dict(os.environ, PYTHONPATH=TOOLS))
    STARTED.append(process)
    return process


def end(process):
    """Kill a process, if it lives, and let go of it."""
    if process.poll() is None:
        process.send_signal(KILL)
    process.wait(10)
    process.stdout.close()
    process.stderr.close()
    STARTED.remove(process)


def start_pool(*options, count=2, script="", **how):
    """Start a pool and wait for its workers; SCRIPT breaks something in it first."""
    words = ["worker", "start", "--count", str(count), *options]
    pool = begin(*words, program=QUICK + script, **how)
    wait_until(lambda: len(workers_of(pool.pid)) == count or pool.poll() is not None)
    return pool


def drained(count=1):
    """Let a pool run what can run; return how it ended, and what it said."""
    pool = start_pool("--drain", count=count)
    return Answer(pool.wait(60), pool.stdout.read(), pool.stderr.read())


def drain(count=2):
    answer = drained(count)
    assert answer.code in (0, 1), answer.err
    return answer.code


def workers_of(pid):
    return queuectl.living_pools(database()).get(pid, [])


def kill_all(pool):
    """Kill a pool and its workers at once; stopped first, so that none sees another die."""
    with contextlib.suppress(OSError):
        pids = [pool.pid, *workers_of(pool.pid)] if pool.poll() is None else []
        for number in (signal.SIGSTOP, KILL) if os.name == "posix" else (KILL,):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
    end(pool)


def wait_until(condition, timeout=20):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            with open("queuectl.log") as log:
                pytest.fail("never happened:\n" + cli("list").out + log.read())
        time.sleep(0.003)


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def ours(what=""):
    """Return the pids of the processes, no zombies, that live in this folder.

    A worker works elsewhere, between two jobs in /, but has files of the queue open.
    """
    here, pids = os.path.join(os.getcwd(), what).rstrip("/"), []
    for pid in set(filter(str.isdigit, os.listdir("/proc"))) - {str(os.getpid())}:
        with contextlib.suppress(OSError):
            links = ["/proc/%s/fd/%s" % (pid, fd) for fd in os.listdir("/proc/%s/fd" % pid)]
            files = [os.readlink(link) for link in ["/proc/%s/cwd" % pid, *links]]
            pids += [int(pid)] * any((name + "/").startswith(here + "/") for name in files)
    return pids


@pytest.fixture
def clock():
    """A clock that stands until it is moved."""

    class Clock:
        now = 1e9

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def queue(clock):
    with queuectl.Queue("queuectl.db", clock=clock) as queue:
        yield queue


def add(queue, *given, **fields):
    """Enqueue a job through the library; return it."""
    job = dict({"command": "true", "id": "job"}, **fields)
    queue.enqueue([queuectl.checked_job(job, queue.defaults())])
    return queue.job(job["id"])


def claim(queue):
    return queue.claim(1, lambda run: None)


@contextlib.contextmanager
def leased(queue, worker):
    """A claimed run whose lease this process holds."""
    leases = []
    run = queue.claim(worker, lambda run: leases.append(
        queuectl.Lease(run["lease"], run["output_limit"])))
    try:
        yield dict(run, file=leases[0])
    finally:
        with contextlib.suppress(OSError):
            os.close(leases[0].fd)


def result(error="exit 1", **fields):
    """Return the outcome of a run, of the kind that has this error."""
    kinds = {None: "completed", "worker died": "lost", "cancelled": "cancelled",
             "stop --now": "stopped", "stopped": "stopped"}
    failed = queuectl.Outcome(kinds.get(error, "failed"), 1, error, 1e9, b"")
    return failed._replace(**fields)


# ======================================================================================
# The command line
# ======================================================================================


def test_a_job_runs_and_its_output_is_kept():
    ok("enqueue", '{"id":"job1","command":"echo Hello Deepak"}')
    assert drain() == 0
    assert ok("logs", "job1").out == "Hello Deepak\n"
    job = ok("show", "job1", "--json").json
    assert (job["state"], job["attempts"], job["exit_code"], job["error"]) == (
        "completed", 1, 0, None)
    assert [run["attempt"] for run in job["runs"]] == [1]
    assert set(job["runs"][0]) == {
        "attempt", "worker", "pid", "started_at", "finished_at", "exit_code", "error", "run",
        "seconds"}


def test_list_prints_a_line_a_job():
    enqueue(id="a", max_retries=5)
    enqueue("echo 'x'\ntrue", id="b c")
    lines = ok("list").out.splitlines()
    assert [re.split("  +", line)[:3] for line in lines] == [
        ["ID", "STATE", "TRIES"], ["a", "pending", "0/5"], ["b c", "pending", "0/3"]]
    assert lines[2].endswith(r"echo 'x'\ntrue")


def test_status_prints_counts_and_workers():
    enqueue()
    assert ok("status").out.splitlines()[:6] == [
        "Pending: 1", "Processing: 0", "Completed: 0", "Failed: 0", "Dead: 0",
        "Active Workers: 0"]
    told = ok("status", "--json").json
    assert told["jobs"] == {
        "pending": 1, "processing": 0, "completed": 0, "failed": 0, "dead": 0}
    assert told["workers"] == []


def test_list_filters_and_limits():
    for name in "abc":
        enqueue(id=name)
    assert list(jobs("--limit", "2")) == ["a", "b"]
    assert list(jobs("--limit", "0", "--state", "PENDING")) == ["a", "b", "c"]
    assert jobs("--state", "dead") == {}
    assert "did you mean pending" in refused("list", "--state", "pendin", code=2)
    refused("list", "--limit", "-1", code=2)


def test_list_pages_through_more_jobs_than_a_page_holds():
    count = 2 * queuectl.BATCH + 7
    ok("enqueue", "-", stdin=b'{"command":"true"}\n' * count)
    assert len(jobs()) == count
    assert len(ok("list").out.splitlines()) == count + 1


def test_enqueue_takes_arguments_arrays_lines_and_files():
    ok("enqueue", '{"id":"a","command":"true"}', '[{"id":"b","command":"true"}]')
    ok("enqueue", "-", stdin=b'{"id":"c","command":"true"}\n\n{"id":"d","command":"true"}')
    ok("enqueue", "-", stdin=b'\xef\xbb\xbf[{"id":"e",\n"command":"true"}]')
    with open("jobs.jsonl", "w") as file:
        file.write('{"id":"f","command":"true"}\r\n')
    ok("enqueue", "--file", "jobs.jsonl")
    ok("enqueue", "--lines", stdin=b"\xef\xbb\xbfecho g\r\n")
    ok("enqueue", "-", stdin=b"\xef\xbb\xbf\r\n")
    assert list(jobs())[:6] == list("abcdef")
    assert [job["command"] for job in jobs().values()][6:] == ["echo g"]


def test_enqueue_is_all_or_nothing_and_names_the_line():
    lines = b'{"id":"a","command":"true"}\n{"id":"b","comand":"true"}\n'
    assert "line 2: unknown field \"comand\"; did you mean command?" in refused(
        "enqueue", "-", stdin=lines, code=2)
    refused("enqueue", '{"id":"a","command":"true"}', '{"id":"a","command":"true"}')
    assert jobs() == {}


@pytest.mark.parametrize("line, words", [
    ('{"command":"true"},', "Extra data"),
    ('{"command":"true"}{"command":"true"}', "Extra data"),
    ('{"command":"true"},0,{"command":"true"}', "Extra data"),
    ('{"command":"true"', "Expecting ',' delimiter"),
    ('"true"', "a job is a JSON object"),
    ("[", "Expecting ',' delimiter")])
@pytest.mark.parametrize("good", [0, 507])
def test_each_line_is_a_text_by_itself_on_whatever_page(line, words, good):
    given = '{"command":"true"}\n' * good + line + "\n" + '{"command":"true"}\n' * 3
    message = refused("enqueue", "-", stdin=given.encode(), code=2)
    assert "line %d: " % (good + 1) in message and words in message and not jobs()


def test_an_array_may_follow_lines_and_blank_lines_count():
    lines = '{"command":"true"}\n\n' * 300 + '[{"command":"true"},\n\n{"command":"true"}]\n\n'
    ok("enqueue", "-", stdin=lines.encode())
    assert len(jobs()) == 302
    lines = '{"command":"true"}\n\n' * 300 + '{"command":"true"\n,"id":"b"}'
    assert "line 601: " in refused("enqueue", "-", stdin=lines.encode(), code=2)


def test_a_list_can_be_piped_into_another_queue():
    enqueue("exit 1", id="a", env={"X": "1"}, timeout=5, priority=-3, max_retries=1)
    drain()
    first = ok("list", "--json")
    ok("enqueue", "-", "--db", "other.db", stdin=first.out.encode())
    before, after = first.json[0], ok("list", "--json", "--db", "other.db").json[0]
    for field in ("id", "command", "env", "timeout", "priority", "max_retries", "cwd"):
        assert before[field] == after[field]
    assert (after["state"], after["attempts"]) == ("pending", 0)


def test_made_ids_are_short_and_unique():
    ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 1000)
    assert len(jobs()) == 1000 and all(len(name) == 6 for name in jobs())


def test_eaten_quotes_are_explained():
    assert r'"{\"id\":' in refused("enqueue", "{id:job1,command:echo hi}", code=2)
    lines = b'{\n"command": "true"\n}'
    assert "on one line" in refused("enqueue", "-", stdin=lines, code=2)


def test_what_a_refusal_quotes_is_one_line_and_no_bottomless_pit(monkeypatch):
    assert "\x1b" not in refused("list", "a\nb\x1b[2J", code=2)

    def dumps(*_, **__):
        raise RecursionError

    monkeypatch.setattr(queuectl.json, "dumps", dumps)  # which Python is a little deeper
    assert "nested" in refused("enqueue", '{"command":[[]]}', code=2)


def test_every_time_that_is_taken_can_be_shown():
    assert queuectl.iso(queuectl.MAX_TIME) == "9999-12-31T23:59:59Z"
    enqueue(id="x", run_at=queuectl.MAX_TIME)
    assert jobs()["x"]["run_at"] == "9999-12-31T23:59:59Z" and ok("show", "x").out


@posix
def test_a_folder_with_an_odd_name_needs_another_for_its_jobs(home):
    os.mkdir(b"od\xff")
    os.chdir(b"od\xff")
    assert "UTF-8" in refused("enqueue", "--db", "../q.db", "--", "true", code=2)
    ok("enqueue", "--db", "../q.db", "--cwd", "/", "--", "true")
    os.chdir(str(home))


def test_unknown_names_get_the_nearest_one():
    assert "did you mean status" in refused("statuz", code=2)
    assert "did you mean dlq retry" in refused("dlq", "retri", "x", code=2)
    assert "did you mean backoff_base" in refused("config", "get", "backof_base", code=2)


def test_unknown_ids_are_refused_everywhere(queue):
    for command in ("show", "logs", "delete"):
        assert "no job nope" in refused(command, "nope")
    assert "no job nope" in refused("dlq", "retry", "nope")
    assert ok("dlq", "retry", "--all").out == "retried 0 jobs\n"


def test_settings_are_shown_set_and_unset():
    ok("config", "set", "max-retries", "5")
    assert ok("config", "get", "max_retries").out == "5\n"
    assert ok("config", "show", "--json").json["max_retries"] == 5
    assert "max_retries" in ok("config", "show").out
    assert ok("config", "list").out == ok("config", "get").out == ok("config", "show").out
    ok("config", "unset", "MAX_RETRIES")
    assert ok("config", "get", "max_retries").out == "3\n"
    for value in ("-1", "many", "1.5", "1e99"):
        assert "max_retries: " in refused("config", "set", "max_retries", value, code=2)


def test_max_retries_is_fixed_at_enqueue():
    enqueue(id="old")
    ok("config", "set", "max_retries", "7")
    enqueue(id="new")
    assert [job["max_retries"] for job in jobs().values()] == [3, 7]


def test_db_is_taken_before_and_after_the_command_and_from_the_environment(monkeypatch):
    ok("--db", "a.db", "enqueue", '{"id":"x","command":"true"}')
    assert list(jobs("--db", "a.db")) == ["x"]
    monkeypatch.setenv("QUEUECTL_DB", "a.db")
    assert list(jobs()) == ["x"]
    assert not os.path.exists("queuectl.db")


def test_db_is_taken_between_the_words_of_a_command():
    ok("--db", "a.db", "config", "--db=b.db", "set", "max_retries", "5")
    assert ok("config", "--db", "b.db", "get", "max_retries").out == "5\n"
    assert os.listdir(".") == ["b.db"]


@posix
def test_a_link_to_a_queue_is_that_queue():
    enqueue(id="x")
    os.mkdir("sub")
    os.symlink("../queuectl.db", "sub/link.db")
    start_pool("--db", "sub/link.db")
    wait_until(lambda: state("x") == "completed")
    assert ok("worker", "stop").out.startswith("stopped pool")
    assert sorted(os.listdir(".")) == ["queuectl.db", "queuectl.log", "sub"]
    assert os.listdir("sub") == ["link.db"]


@posix
def test_what_is_no_regular_file_is_no_queue():
    os.mkfifo("fifo")
    assert "is not a regular file" in refused("list", "--db", "fifo")
    assert "is not a regular file" in refused("list", "--db", os.devnull)


def test_times_and_output_are_json_too():
    enqueue(python("import sys; sys.stdout.buffer.write(b'\\xff')"), id="x", run_at=0)
    assert jobs()["x"]["run_at"] == "1970-01-01T00:00:00Z"
    drain(1)
    assert ok("logs", "x", "--json").json == {"id": "x", "run": 1, "output": "\\xff"}


def test_words_that_are_no_utf8_are_unknown_ids(queue):
    for command in ("show", "logs", "delete", "cancel"):
        assert "there is no job" in refused(command, "\udcff")


def test_an_odd_pid_file_does_not_make_an_enqueue_fail():
    os.mkdir("queuectl-1.pid")
    enqueue(id="x")
    assert ok("status", "--json").json["workers"] == []


@posix
def test_the_locale_c_and_an_ascii_terminal_break_no_output():
    enqueue("echo Zoë; echo Zoë ✓ >&2", id="Zoë ✓")
    env = dict(os.environ, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert script("worker", "start", "--drain", env=env).returncode == 0
    for words in ("list", "status", "list --json", "show Zoë\xa0✓", "logs Zoë\xa0✓"):
        words = [word.replace("\xa0", " ") for word in words.split(" ")]
        answer = subprocess.run([sys.executable, COMPILED, *words], env=env, timeout=30,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert (answer.returncode, answer.stderr) == (0, b""), words
        assert answer.stdout


@posix
def test_what_could_steer_a_terminal_is_shown_escaped():
    enqueue("printf '\\033[31m' # \x1b[2J\x07\r\x9b", id="x", max_retries=1)
    enqueue(id="y", cwd=os.getcwd(), env={"A": "\x1b[2J"})
    drain()
    ok("config", "set", "backoff_base", "0")
    for words in (["list"], ["show", "x"], ["show", "y"], ["status"], ["dlq", "list"]):
        assert not set("\x1b\x07\r\x9b") & set(ok(*words).out), words
    assert "\x1b" not in refused("show", "\x1b[2J") + refused("\x1b[2J", code=2)
    assert "\x1b" not in refused("config", "set", "max_retries", "\x1b[2J", code=2)


@posix
def test_closed_streams_are_no_trouble():
    enqueue(id="x")
    line = "%s %s list >&- 2>&-" % (shlex.quote(sys.executable), shlex.quote(SCRIPT))
    assert subprocess.run(line, shell=True).returncode == 0
    assert list(jobs()) == ["x"]


@posix
def test_it_runs_as_a_module_and_as_an_executable_file():
    shutil.copy(SCRIPT, "queuectl.py")
    os.mkdir("bin")
    os.symlink(sys.executable, "bin/python3")
    env = dict(os.environ, PATH=os.path.abspath("bin") + ":" + os.environ["PATH"])
    for words in ["./queuectl.py"], [sys.executable, "-m", "queuectl"]:
        told = subprocess.run([*words, "enqueue", "ls"], env=env, stderr=subprocess.PIPE)
        assert b"not JSON" in told.stderr and told.returncode == 2
        assert subprocess.run([*words, "enqueue", "--", "true"], env=env).returncode == 0
        assert subprocess.run([*words, "worker", "start", "--drain"]).returncode == 0
    assert [job["state"] for job in jobs().values()] == ["completed"] * 2


def test_help_at_every_level():
    assert "examples:" in ok().out and "examples:" in ok("--help").out
    for group in ("worker", "dlq", "config"):
        assert "examples:" in ok(group).out and "examples:" in ok(group, "--help").out
        assert ok("--db", "x", group).out == ok(group, "--json").out == ok(group).out
    for name in queuectl.COMMANDS:
        assert "example: " in ok(*name.split(), "--help").out


@pytest.mark.parametrize("argv", [
    ["list", "--stat", "dead"], ["show"], ["show", "a", "b"], ["enqueue"], ["--nope"],
    ["worker", "start", "--count", "0"], ["worker", "start", "--count", "-1"],
    ["worker", "start", "--count", "two"], ["worker", "start", "--count", "257"],
    ["config", "set", "max_retries"], ["dlq", "retry"], ["dlq", "retry", "a", "--all"],
    ["worker", "begin"], ["worker", "--drain"], ["--json"],
    ["--db"], ["list", "--db"], ["--db", "list"],
    ["enqueue", "--file", "f", '{"command":"true"}'],
], ids=" ".join)
def test_wrong_usage_is_one_line_and_code_2(queue, argv):
    refused(*argv, code=2)


def test_unusable_queues_are_refused_in_words(home):
    os.mkdir("folder.db")
    with open("text.db", "w") as file:
        file.write("this is no database, but long enough to be read as one" * 99)
    sqlite3.connect("foreign.db").execute("CREATE TABLE t (x)").connection.close()
    ok("list", "--db", "newer.db")
    with contextlib.closing(sqlite3.connect("newer.db")) as db:
        db.execute("PRAGMA user_version = 99")
    words = {"folder.db": "is not a regular file", "text.db": "not a database",
             "foreign.db": "not a queue of queuectl", "newer.db": "version 99",
             "no/where.db": "No such file or directory" if os.name == "posix" else "where"}
    for name, word in words.items():
        message = refused("list", "--db", name)
        assert word in message and name.split("/")[0] in message


def version():
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_a_queue_of_version_1_is_refused(queue):
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        db.execute("PRAGMA user_version = 1")
    words = "queuectl.db was made by queuectl 1.0: convert it with queuectl 1.1 first"
    for argv in (["list"], ["enqueue", "--", "true"], ["worker", "start"]):
        assert words in refused(*argv)
    assert version() == 1


def test_a_migration_makes_indexes_and_triggers_anew(monkeypatch):
    ok("enqueue", "--id", "old", "--lock", "one", "--", "true")
    version_2, before = queuectl.SCHEMA_VERSION, schema()
    monkeypatch.setattr(queuectl, "SCHEMA_VERSION", version_2 + 1)
    monkeypatch.setattr(queuectl, "MIGRATIONS", {
        version_2: "ALTER TABLE jobs ADD COLUMN tag TEXT;\n"
                   "ALTER TABLE runs ADD COLUMN tag TEXT;\n"})
    monkeypatch.setattr(queuectl, "SCHEMA", queuectl.SCHEMA.replace(
        "user_version = %d" % version_2, "user_version = %d" % (version_2 + 1)).replace(
        "ON jobs (state, seq)", "ON jobs (state, tag, seq)"))
    with queuectl.Queue("queuectl.db") as queue:
        assert version() == version_2 + 1
        assert queue.job("old")["state"] == "pending"
    after = schema()
    assert {name for name, sql in after.items() if sql != before[name]} == {
        "jobs", "runs", "jobs_rare"}
    assert "tag" in after["jobs"] and "tag, seq" in after["jobs_rare"]
    ok("delete", "old")
    assert ok("status", "--json").json["jobs"]["pending"] == 0  # its trigger is there


def schema():
    """Return the SQL of all that a queue's database holds, by its name."""
    return dict(sql("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"))


def test_a_closed_pipe_is_silent():
    ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 5000)
    with subprocess.Popen([sys.executable, COMPILED, "list"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as listing:
        assert listing.stdout.readline().startswith(b"ID")
        listing.stdout.close()
        assert listing.stderr.read() == b"" and listing.wait(10) == 0


def test_the_file_is_a_program():
    run = functools.partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            encoding="utf-8", timeout=60)
    answer = run([sys.executable, SCRIPT, "--version"])
    assert (answer.returncode, answer.stdout) == (0, "queuectl %s\n" % queuectl.__version__)
    enqueue()
    answer = run([sys.executable, SCRIPT, "show", "nope"])
    assert (answer.returncode, answer.stderr) == (1, "queuectl: there is no job nope\n")


def test_sixty_first_commands_at_once():
    line = '{"id":"job%d","command":"true"}'
    first = [begin("enqueue", line % n) for n in range(60)]
    errors = [process.stderr.read() for process in first]
    assert [process.wait(60) for process in first] == [0] * 60, errors
    assert len(jobs()) == 60
    assert os.listdir(".") == ["queuectl.db"]


# ======================================================================================
# Everyday use
# ======================================================================================


def test_every_field_of_a_job_has_its_option(home):
    ok("enqueue", "--id", "x", "--priority", "-3", "--delay", "1h", "--timeout", "90s",
       "--max-retries", "7", "--cwd", os.path.abspath("/"), "--env", "A=1", "--env", "B=x=y",
       "--", "a", "b")
    job = jobs()["x"]
    assert job["command"] == "a b" and job["cwd"] == os.path.abspath("/") and job["priority"] == -3
    assert job["timeout"] == 90 and job["max_retries"] == 7
    assert job["env"] == {"A": "1", "B": "x=y"} and job["run_at"] > job["created_at"]
    ok("enqueue", "--id", "y", "--run-at", "2030-01-01T00:00:00Z", "--command", "c  d")
    assert jobs()["y"]["run_at"] == "2030-01-01T00:00:00Z"
    assert jobs()["y"]["command"] == "c  d"


@posix
def test_one_word_is_a_shell_line_and_several_are_quoted():
    ok("enqueue", "--id", "one", "--", "echo $((1 + 2))")
    ok("enqueue", "--id", "more", "--", "echo", "a  b", "$HOME", "--json", "--", "it's")
    drain()
    assert ok("logs", "one").out == "3\n"
    assert ok("logs", "more").out == "a  b $HOME --json -- it's\n"


def test_options_come_before_the_fields_of_a_job():
    enqueue("true", id="a", priority=1, delay=3600)
    listing = ok("list", "--json").out.encode()
    ok("enqueue", "-", "--db", "b.db", "--priority", "5", "--delay", "0", stdin=listing)
    job = ok("list", "--json", "--db", "b.db").json[0]
    assert (job["id"], job["priority"]) == ("a", 5) and job["run_at"] == job["created_at"]


@pytest.mark.parametrize("words, told", [
    (["--priority", "high", "--", "x"], "priority"), (["--env", "A", "--", "x"], "--env"),
    (["--delay", "soon", "--", "x"], "delay"), (["--cwd", "no/where", "--", "x"], "cwd"),
    (["--max-retries", "1.5", "--", "x"], "max_retries"), (["--", " "], "command"),
    (["--command", "a", "--", "b"], "give jobs"), (['{"command":"a"}', "--", "b"], "give"),
    (["--id", "x"], "no job"), ([""], "no job"), (["--unique", "--", "x"], "id: missing"),
    (["--delay", "1", "--run-at", "1000000000", "--", "x"], "not both"),
    (["echo hi"], "enqueue -- echo hi"),
])
def test_bad_options_are_refused_by_name(words, told):
    assert told in refused("enqueue", *words, code=2)
    assert jobs() == {}


def test_unique_leaves_what_waits_or_runs_and_starts_anew_what_has_finished(queue):
    for name, verb in (("done", "complete"), ("dead", "fail"), ("runs", None)):
        add(queue, id=name, max_retries=1)
        run = claim(queue)
        if verb:
            getattr(queue, verb)(run, result(None))
    add(queue, id="waits", command="old")
    before = jobs()
    for name in (*before, "new", "new"):
        ok("enqueue", "--unique", "--id", name, "--", "fresh")
    after = jobs()
    assert after["waits"] == before["waits"] and after["runs"] == before["runs"]
    for name in ("done", "dead", "new"):
        assert after[name]["command"] == "fresh" and after[name]["state"] == "pending"
        assert after[name]["attempts"] == 0 and len(after) == 5
    assert "runs is there already, processing" in ok(
        "enqueue", "--unique", "--id", "runs", "--", "x").out
    tally = Counter(job["state"] for job in after.values())
    assert queue.counts() == {state: tally[state] for state in queuectl.STATES}


def test_wait_tells_by_its_exit_code_what_became_of_jobs():
    enqueue(id="good")
    enqueue("exit 1", id="bad", max_retries=1)
    enqueue(id="later", delay=3600)
    drain()
    assert cli("wait", "good").code == 0 and cli("wait", "good", "bad").code == 1
    told = cli("wait", "--timeout", "0.05")
    assert told.code == 124 and told.out == "" and "still waiting" in told.err
    assert "no job x" in refused("wait", "x")
    assert ok("wait", "good", "--json").json["completed"] == 1
    ok("delete", "later")
    assert cli("wait").code == 0  # a death of before is nothing to wait for


def test_wait_ends_as_soon_as_the_job_does():
    pool = start_pool(count=1)
    ok("enqueue", "--id", "x", "--", "sleep 0.1")
    ok("wait", "x", "--timeout", "10")
    assert state("x") == "completed" and pool.poll() is None


def test_progress_is_one_line_with_rate_and_time_left():
    counts = dict(pending=5, processing=2, completed=30, failed=1, dead=2)
    assert queuectl.progress_text(counts, 16, 4.0) == (
        "completed 30, dead 2, running 2, waiting 6, 4.0/s, 2.0s left")
    assert queuectl.progress_text(counts, 0, 4.0).endswith("waiting 6")


def on_terminal(*argv, keys=b"", columns=60):
    """Run a command with a terminal of its own; return exit code and what it shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it
        become(argv)
    size = struct.pack("hhhh", 24, columns, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while True:
            shown += os.read(terminal, 4096)
            if keys and b"\x1b[J" in shown:  # a whole screen: Ctrl-C drops what is not read yet
                os.write(terminal, keys)
                keys = b""
    os.close(terminal)
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1]), shown.decode()


@posix
def test_a_drain_shows_its_progress_on_a_terminal_and_nowhere_else():
    enqueue(id="before")
    drain()
    ok("enqueue", "--id", "x", "--", "sleep 0.6")
    code, shown = on_terminal("worker", "start", "--drain")
    assert code == 0 and "\r\x1b[Kcompleted 0, dead 0, running 1" in shown
    assert shown.endswith("\r\x1b[Kqueuectl: 1 completed, 0 dead\r\n")
    assert max(map(len, shown.split("\r\n"))) < 400
    ok("enqueue", "--id", "y", "--", "true")
    quiet = drained()
    assert quiet.err == "queuectl: 1 completed, 0 dead\n" and "\x1b" not in quiet.out


@posix
def test_a_watched_status_leaves_the_terminal_as_it_was():
    ok("status")
    code, shown = on_terminal("status", "--watch", "0.1", keys=b"\x03")
    assert code == 130 and shown.startswith("\x1b[?1049h") and shown.count("\x1b[H") >= 1
    assert shown.rstrip().endswith("\x1b[?1049l") and "Traceback" not in shown


@posix
def test_a_table_fits_a_terminal_and_is_whole_elsewhere():
    ok("enqueue", "--id", "i" * 80, "--", "echo " + "x" * 200)
    ok("enqueue", "--id", "日本語のジョブ", "--", "echo 日本語")
    for columns in (60, 80, 160):
        lines = on_terminal("list", columns=columns)[1].splitlines()
        assert "i" * 18 + "…  pending" in lines[1]
        starts = [queuectl.display_width(line.partition("pending")[0]) for line in lines[1:]]
        assert starts[0] == starts[1]
        assert max(queuectl.display_width(line) for line in lines[1:]) <= columns
    assert "i" * 80 + "  pending" in ok("list").out and "x" * 200 in ok("list").out


@posix
def test_a_terminal_that_does_not_know_its_size_shows_whole_lines():
    ok("enqueue", "--id", "x", "--", "echo hello")
    assert "echo hello" in on_terminal("list", columns=0)[1]


@posix
def test_states_have_colours_on_a_terminal_that_wants_them(monkeypatch):
    ok("enqueue", "--id", "failed", "--", "true")
    ok("enqueue", "--id", "x", "--max-retries", "1", "--", "echo dead 1/2; exit 3")
    drain()
    red, green = "\x1b[31mdead\x1b[0m", "\x1b[32mcompleted\x1b[0m"
    shown = on_terminal("list", columns=0)[1]
    assert shown.count("\x1b") == 6 and red in shown and green in shown
    assert shown.startswith("\x1b[2mID  ") and red in on_terminal("show", "x")[1]
    assert on_terminal("status", columns=0)[1].count("\x1b") == 4  # none of what is 0
    assert "\x1b" not in ok("list").out + ok("status").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_terminal("list")[1]


def test_follow_shows_a_run_from_its_beginning_to_its_end_byte_for_byte():
    pool = start_pool(count=1)
    line = python("import time; print(*range(2000), sep='.', flush=True); time.sleep(0.2);"
                  " print('end')")
    ok("enqueue", "--id", "x", "--delay", "0.1", "--", line)
    told = ok("logs", "-f", "x").out
    assert told == ".".join(map(str, range(2000))) + "\nend\n"
    assert ok("logs", "-f", "x").out == told == ok("logs", "x").out
    assert pool.poll() is None


def test_logs_of_an_earlier_attempt():
    ok("config", "set", "backoff_base", "0")
    line = python("import os, sys; print(os.environ['QUEUECTL_ATTEMPT']); sys.exit(1)")
    enqueue(line, id="x", max_retries=2)
    drain()
    assert ok("logs", "x").out == "2\n" and ok("logs", "x", "--attempt", "1").out == "1\n"
    assert "no attempt 3" in refused("logs", "x", "--attempt", "3")


def test_delete_by_state_and_age(queue, clock):
    for name in ("old", "new"):
        add(queue, id=name)
        queue.complete(claim(queue), result(None))
        clock.now += 86400
    add(queue, id="waits")
    clock.now += 7 * 86400
    add(queue, id="runs", priority=1)
    claim(queue)
    assert queue.delete_all(queuectl.where(["completed"], before=clock.now - 8.5 * 86400)) == 1
    assert set(jobs()) == {"new", "waits", "runs"}
    listed = ok("delete", "--all", "--dry-run", "--json").json
    assert [job["id"] for job in listed] == ["new", "waits"] and len(jobs()) == 3
    assert ok("delete", "--older-than", "1d", "--json").json == {"deleted": 1, "left": 0}
    assert set(jobs()) == {"waits", "runs"}  # what has not finished has no age
    assert ok("delete", "--state", "dead").out == "deleted 0 jobs\n"
    assert "running" in refused("delete", "--state", "processing")
    ok("delete", "--all")
    assert set(jobs()) == {"runs"} and queue.counts()["processing"] == 1


def test_only_what_has_finished_has_an_age(queue):
    line = refused("delete", "--state", "pending", "--older-than", "1d", code=2)
    assert "finished" in line


@pytest.mark.parametrize("words", [
    [], ["x", "--all"], ["x", "--older-than", "0"], ["--all", "--state", "dead"]])
def test_delete_wants_jobs_or_a_state_or_all(queue, words):
    assert "give ids, or options" in refused("delete", *words, code=2)


def test_dlq_clear_removes_the_dead_and_dlq_list_counts_their_errors():
    for n in range(3):
        enqueue("exit 127", max_retries=1)
    enqueue("exit 3", max_retries=1)
    enqueue(id="good")
    drain()
    assert ok("dlq", "list").out.splitlines()[0] == (
        "Most common errors: 3 x exit 127, 1 x exit 3")
    assert ok("dlq", "list", "--match", "127").out.splitlines()[0] == (
        "Most common errors: 3 x exit 127")
    assert ok("dlq", "purge", "--dry-run").out.count(" dead ") == 4
    assert ok("dlq", "clear").out == "deleted 4 jobs\n" and list(jobs()) == ["good"]
    assert ok("dlq", "clear").out == "deleted 0 jobs\n"


def test_the_space_of_many_deleted_jobs_is_given_back():
    line = b'{"command":"true %s"}\n' % (b"x" * 2500)
    ok("enqueue", "-", stdin=line * 2000)
    full = os.path.getsize("queuectl.db")
    ok("delete", "--all")
    assert os.path.getsize("queuectl.db") < full / 2


def test_keep_prunes_what_finished_longer_ago_page_by_page(queue, clock):
    for n in range(3):
        add(queue, id="done%d" % n)
        queue.complete(claim(queue), result(None))
    add(queue, id="waits")
    clock.now += 100
    assert queue.prune(100, 1) == (0, 5) and len(jobs()) == 4
    assert queue.prune(99, 3) == (1, 5) and set(jobs()) == {"done0", "done1", "waits"}
    assert queue.prune(99, 1) == (2, 5) and set(jobs()) == {"waits"}
    assert queue.prune(99, 5) == (0, 1)  # nothing from there on: the next round


def test_a_pool_prunes_by_and_by():
    ok("config", "set", "keep", "0")
    assert ok("config", "get", "keep").out == "0\n"
    enqueue(id="x")
    pool = start_pool()
    wait_until(lambda: not jobs())
    assert pool.poll() is None
    ok("config", "set", "keep", "forever")
    assert ok("config", "get", "keep").out == "forever\n"


def test_on_dead_gets_the_job_and_its_own_failure_hurts_nothing():
    ok("config", "set", "on_dead", python(
        "import sys; open('dead.json', 'w').write(sys.stdin.read()); sys.exit(5)"))
    enqueue("exit 3", id="x", max_retries=1)
    assert drain() == 1
    told = read("dead.json")
    assert told.endswith("}\n")  # or a shell's `read` would say that there is no line
    told = json.loads(told)
    assert (told["id"], told["state"], told["error"]) == ("x", "dead", "exit 3")
    assert "on_dead for x: exit 5" in read("queuectl.log")
    enqueue("exit 3", id="y", max_retries=1, cwd=os.getcwd())
    ok("config", "set", "on_dead", "no-such-command")
    assert drain() == 1 and state("y") == "dead"


def test_on_dead_is_not_waited_for():
    ok("config", "set", "on_dead", LASTING)
    enqueue("exit 3", max_retries=1)
    enqueue(id="next")
    pool = start_pool(count=1)
    wait_until(lambda: state("next") == "completed" and lasting())
    assert pool.poll() is None


def test_on_dead_is_for_jobs_whose_folder_is_gone_but_not_for_cancelled_ones(queue):
    queue.set("on_dead", python("import sys; open('told', 'a').write(sys.stdin.read())"))
    os.mkdir("gone")
    enqueue(id="x", max_retries=1, cwd="gone")
    os.rmdir("gone")
    assert drain() == 1 and '"id": "x"' in read("told")
    add(queue, id="y")
    queue.cancel(["y"])
    assert not queue.announce(lambda job: pytest.fail("told"))
    add(queue, id="z")
    run = claim(queue)
    queue.cancel(["z"])
    queue.fail(run, result())
    assert not queue.announce(lambda job: pytest.fail("told"))


@posix
def test_few_on_dead_commands_run_at_a_time(queue):
    queue.set("on_dead", LASTING)
    for n in range(queuectl.MAX_HOOKS + 3):
        add(queue, id="x%d" % n, max_retries=1)
        queue.fail(claim(queue), result())
    reaper = reaper_of(queue)
    assert reaper.announce_deaths(queue) == reaper.announce_deaths(queue) == queuectl.MAX_HOOKS
    for hook in reaper.hooks:
        os.killpg(hook.pid, signal.SIGKILL)
        hook.wait(10)
    assert reaper.announce_deaths(queue) == 3 and not queue.announce(print)
    for hook in reaper.hooks:
        os.killpg(hook.pid, signal.SIGKILL)
        hook.wait(10)


def test_follow_of_what_will_not_run_ends():
    enqueue(id="x", delay=3600)
    ok("cancel", "x")
    assert ok("logs", "-f", "x").out == ""
    assert "--follow" in refused("logs", "-f", "--json", "x", code=2)


def test_follow_ends_when_the_worker_died_and_no_pool_is_there(queue):
    add(queue)
    with leased(queue, 1):
        pass
    assert "died" in refused("logs", "-f", "job")


@posix
@pytest.mark.parametrize("words", [["wait"], ["logs", "-f", "x"], ["status", "--watch", "0.2"]])
def test_what_waits_for_a_queue_ends_when_that_is_removed(words):
    enqueue(id="x", delay=3600)
    waiting = begin(*words)
    wait_until(lambda: waiting.pid in ours("queuectl.db-shm"))
    os.remove("queuectl.db")
    assert waiting.wait(10) == 1
    assert waiting.stderr.read().endswith("queuectl.db was removed\n")


def test_wait_does_not_look_again_at_a_job_that_has_ended(queue):
    add(queue, id="b")
    queue.complete(claim(queue), result(None))
    add(queue, id="a")
    run, looks = claim(queue), []

    def tell(counts):
        if looks:
            queue.delete(["b"])
            queue.complete(run, result(None))
        looks.append(counts)

    assert queue.wait(["a", "b"], on_look=tell)["completed"] == 2 == len(looks)


def test_much_is_removed_in_many_short_transactions(queue, monkeypatch):
    monkeypatch.setattr(queuectl, "BATCH", 20)
    monkeypatch.setattr(queuectl, "POLL_INTERVAL", 0)  # after the first a row at a time
    for n in range(300):
        add(queue, id="j%d" % n)
    commits = []
    queue.db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else 0)
    assert queue.delete_all(queuectl.where(["pending"])) == 300
    assert len(commits) > 10


def test_status_tells_what_waits_longest_and_what_is_due_next(queue, clock):
    add(queue, id="low", priority=-1)
    clock.now += 60
    add(queue, id="high", priority=5)
    add(queue, id="later", delay=100)
    assert tuple(queue.oldest_claimable()) == ("low", 1e9)
    claim(queue)
    assert tuple(queue.oldest_claimable()) == ("low", 1e9)
    assert "Oldest Waiting: low, for " in ok("status").out
    claim(queue)
    assert queue.oldest_claimable() is None
    assert tuple(queue.next_due()) == ("later", clock.now + 100)
    told = ok("status", "--json").json
    assert told["oldest_waiting"] is None and told["next_due"] == "2001-09-09T01:49:20Z"
    assert told["next_job"] == "later" and "Next Due: later, due " in ok("status").out


def test_show_says_in_words_why_a_job_is_not_running(queue, clock):
    def why(id, pools=({"job": "a"},)):
        return queuectl.why_waiting(queue, queue.job(id), pools)

    add(queue, id="a")
    add(queue, id="b")
    add(queue, id="c", delay=12)
    assert why("a") == "next in line" and why("b") == "1 job before it"
    assert why("b", ()).startswith("no pool is running") and why("c") == "due in 12s"
    run = claim(queue)
    assert why("a") is None and why("a", [{"job": None}]) == queuectl.DIED
    lease = queuectl.Lease(run["lease"], 10)
    assert why("a", ()) == queuectl.LOST + "; " + queuectl.NO_POOL
    os.close(lease.fd)
    assert why("a", ()) == queuectl.DIED + "; " + queuectl.NO_POOL
    queue.fail(run, result("exit 1"))
    assert why("a") == "try 2 in 2.0s" and why("a", ()).endswith("worker start")
    assert "waiting:     due" in ok("show", "c").out


@piped
def test_a_detached_pool_goes_on_and_its_start_is_told():
    assert script("worker", "start", "--detach", "--count", "2").stdout.startswith("pool ")
    workers = ok("status", "--json").json["workers"]
    assert len(workers) <= 2
    enqueue(id="x")
    ok("wait", "x", "--timeout", "10")
    assert ok("worker", "stop", "--no-wait").out.startswith("stopping pool ")
    ok("worker", "stop")
    assert ok("status", "--json").json["workers"] == []
    lost = script("worker", "start", "--detach", "--db", "no/folder/q.db")
    assert lost.returncode == 1 and lost.stderr.count("\n") == 1


@posix
def test_a_detached_pool_lets_go_of_its_callers_lock():
    line = "exec 9>lock; flock 9; %s %s worker start --detach" % (sys.executable, COMPILED)
    subprocess.run(line, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert subprocess.run(["flock", "-n", "lock", "true"]).returncode == 0
    ok("worker", "stop")


def test_as_a_library():
    with queuectl.Queue("queuectl.db") as queue:
        name = queue.add("echo from a library", priority=2)
        with pytest.raises(queuectl.QueueError, match="unknown field"):
            queue.add("true", colour="red")
        assert queue.wait([name], timeout=0) is None
        drain()
        assert queue.wait([name])["completed"] == 1
        assert queue.output(queue.job(name)).split() == [b"from", b"a", b"library"]


# ======================================================================================
# Statistics and the dashboard
# ======================================================================================


def test_stats_tell_rates_times_and_errors(queue, clock):
    begun = clock.now
    for n in range(20):
        add(queue, id="j%d" % n, command="slow" if n == 7 else "true", max_retries=1)
        run = claim(queue)
        clock.now += 1 + 9 * (n == 7)
        error = "exit 3" if n % 10 == 0 else None
        verb = queue.fail if error else queue.complete
        verb(run, result(error, finished_at=clock.now))
    stats = queuectl.read_stats(queue, begun)
    assert (stats["runs"], stats["completed"], stats["failed"]) == (20, 18, 2)
    assert stats["success_rate"] == 0.9 and stats["retries"] == 0
    assert stats["run_time"] == {"median": 1, "p95": 10, "longest": 10}
    assert stats["slowest_commands"][0] == {
        "command": "slow", "runs": 1, "mean": 10, "longest": 10}
    assert stats["common_errors"] == [{"error": "exit 3", "runs": 2}]
    assert {bin["below"]: bin["runs"] for bin in stats["run_times"] if bin["runs"]} == {
        3: 19, 30: 1}
    assert sum(bar["completed"] for bar in stats["throughput"]) == 18
    assert len(stats["throughput"]) == queuectl.BARS
    assert queuectl.read_stats(queue, clock.now - 3)["runs"] == 4


def test_stats_of_nothing():
    told = ok("stats", "--json").json
    assert told["runs"] == 0 and told["success_rate"] is None
    assert ok("metrics", "--since", "1d").out == (
        "0 runs in 1d: 0 completed, 0 failed (0 retries); 0 interrupted\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_stats_draw_what_the_output_can_show(encoding):
    enqueue(id="x")
    drain()
    told = script("stats", env=dict(os.environ, PYTHONIOENCODING=encoding)).stdout
    assert ("█" in told) == (encoding == "utf-8") and ("#" in told) == (encoding == "ascii")


class Dashboard:
    """A dashboard in a process of its own, and a browser that is none."""

    def __init__(self, *options):
        self.process = begin("dashboard", "--port", "0", *options)
        self.port = int(re.search(r":(\d+)/", self.process.stdout.readline())[1])
        self.own = "127.0.0.1:%d" % self.port

    def ask(self, path, method="GET", body=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        site = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(site):
            site.request(method, path, body, {"Host": self.own, **headers})
            answer = site.getresponse()
            return types.SimpleNamespace(
                status=answer.status, headers=answer.headers, text=answer.read().decode())

    def json(self, path):
        answer = self.ask(path)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)

    def token(self):
        return re.search(r'nonce="(\w+)"', self.ask("/").text)[1]

    def post(self, path, **headers):
        own = {"Origin": "http://" + self.own, "X-Token": self.token()}
        return self.ask(path, "POST", **{**own, **headers})


@pytest.fixture
def dashboard():
    return Dashboard()


@pytest.fixture(scope="module")
def empty_dashboard(tmp_path_factory):
    """One for all tests whose requests change nothing, of a queue without jobs."""
    db = tmp_path_factory.mktemp("empty") / "queuectl.db"
    dashboard = Dashboard("--db", str(db))
    STARTED.remove(dashboard.process)  # it outlives a test
    yield dashboard
    STARTED.append(dashboard.process)
    end(dashboard.process)


NASTY = "<script>alert(1)</script>/../ \"'&é"


def test_the_api_gives_the_documents_of_the_commands(dashboard):
    enqueue(python("import sys; sys.stdout.buffer.write(b'<b>\\xff\\x1b[1m'); sys.exit(3)"),
            id=NASTY, max_retries=1)
    enqueue(id="later", delay=3600)
    drain()
    name = "/api/jobs/" + urllib.parse.quote(NASTY, safe="")
    assert dashboard.json("/api/status") == ok("status", "--json").json
    assert dashboard.json("/api/jobs") == ok("list", "--json").json[::-1]
    assert dashboard.json(name) == ok("show", NASTY, "--json").json
    assert dashboard.json(name + "/output") == ok("logs", NASTY, "--json").json
    assert dashboard.json("/api/stats").keys() == ok("stats", "--json").json.keys()
    assert [job["id"] for job in dashboard.json("/api/jobs?state=dead")] == [NASTY]
    assert [job["id"] for job in dashboard.json("/api/jobs?q=late")] == ["later"]
    assert [job["id"] for job in dashboard.json("/api/jobs?before=later")] == [NASTY]
    assert len(dashboard.json("/api/jobs?limit=1")) == 1


def test_what_a_job_says_is_never_markup(dashboard):
    enqueue("echo '" + "<img src=x onerror=alert(1)>" + "'", id=NASTY)
    drain()
    page = dashboard.ask("/")
    assert NASTY not in page.text and "innerHTML" not in page.text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for path in ("/", "/api/jobs", "/metrics", "/no"):
        headers = dashboard.ask(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY" and (
            path == "/" or "html" not in headers["Content-Type"])


def test_the_page_needs_nothing_from_elsewhere():
    links = re.findall(r"(?:https?:)?//[\w.]+", queuectl.PAGE_HTML)
    assert set(links) == {"http://www.w3.org"}  # the name of SVG, which nobody fetches


@pytest.mark.parametrize("host, status", [
    ("evil.example", 403), ("evil.example:8321", 403), ("localhost.evil.example", 403),
    ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:8321", 200), ("", 403), ("[", 400),
])
def test_other_sites_names_are_refused(empty_dashboard, host, status):
    assert empty_dashboard.ask("/api/status", Host=host).status == status


def test_a_dashboard_knows_its_own_name_however_it_is_spelt():
    site = queuectl.Site("queuectl.db", "MyHost")
    for host in ("myhost:80", "MYHOST:80", "localhost", "127.0.0.1:80", "[::1]:80"):
        site.check_host({"Host": host})
    with pytest.raises(queuectl.QueueError, match="not a name"):
        site.check_host({"Host": "other:80"})


@pytest.mark.parametrize("headers", [
    {"X_Token": "wrong"}, {"X_Token": ""}, {"Origin": "http://evil.example"},
    {"Origin": "null"}, {"Host": "evil.example", "Origin": "http://evil.example"},
])
def test_writes_need_the_pages_token_and_origin(dashboard, headers):
    enqueue(id="x", delay=3600)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    assert dashboard.post("/api/jobs/x/cancel", **headers).status == 403
    assert dashboard.ask("/api/jobs/x/cancel").status == 404  # no action by GET
    assert state("x") == "pending"


def test_the_page_can_cancel_retry_and_delete(dashboard):
    enqueue(id="x", delay=3600)
    assert dashboard.json("/api/jobs/x")["state"] == "pending"
    assert dashboard.post("/api/jobs/x/cancel").status == 200 and state("x") == "dead"
    assert dashboard.json("/api/jobs/x")["state"] == "dead"  # not what was a moment ago
    assert dashboard.post("/api/jobs/x/retry").status == 200 and state("x") == "pending"
    assert dashboard.post("/api/jobs/x/retry").status == 400  # it is not dead
    assert dashboard.post("/api/jobs/x/delete").status == 200 and jobs() == {}
    assert dashboard.post("/api/jobs/x/delete").status == 404
    assert dashboard.post("/api/jobs/x/explode").status == 404


@pytest.mark.parametrize("path, status", [
    ("/no", 404), ("/api", 404), ("/api/jobs/x", 404), ("/api/jobs/%00", 404),
    ("/api/jobs?before=%00", 400), ("/api/jobs?limit=-1", 400), ("/api/jobs?state=x", 400),
    ("/api/stats?since=x", 400), ("/api/jobs/x/output?run=1e9", 404),
    ("/api/jobs?" + "a=1&" * 20, 400), ("/api/jobs?limit=" + "9" * 30, 400),
    pytest.param("/" + "a" * 70000, 414, id="long"), ("/api/status?%", 200),
])
def test_odd_requests_get_an_answer_and_nothing_else(empty_dashboard, path, status):
    assert empty_dashboard.ask(path).status == status
    assert empty_dashboard.ask("/api/status").status == 200


def test_only_runs_that_were_have_an_output(dashboard, queue):
    add(queue, id="x")
    queue.complete(claim(queue), result(None, output=b"hi"))
    assert dashboard.json("/api/jobs/x/output?run=1")["output"] == "hi"
    for run in ("0", "2"):
        assert dashboard.ask("/api/jobs/x/output?run=" + run).status == 404


def test_a_body_and_another_method_are_refused(dashboard):
    own = {"Origin": "http://" + dashboard.own, "X-Token": dashboard.token()}
    assert dashboard.ask("/api/retry", "POST", "x" * 10, **own).status == 413
    assert dashboard.ask("/api/jobs", "DELETE").status == 501


def test_a_slow_client_holds_up_nobody(dashboard):
    with socket.create_connection(("127.0.0.1", dashboard.port)) as slow:
        slow.send(b"GET /api/status HTTP/1.1\r\nHost: loc")
        assert dashboard.ask("/api/status").status == 200
        enqueue(id="x")
        assert drain() == 0


def test_metrics_are_in_the_format_of_prometheus(dashboard):
    enqueue()
    enqueue("exit 1", max_retries=1)
    drain()
    ok("delete", "--all")
    told = dashboard.ask("/metrics").text
    assert 'queuectl_jobs{state="dead"} 0\n' in told
    assert 'queuectl_runs_total{outcome="completed"} 1\n' in told  # it only grows
    assert 'queuectl_runs_total{outcome="failed"} 1\n' in told
    for line in told.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+\{\w+=\"[\w.]+\"\} [\d.]+", line), line


def test_a_queue_that_is_gone_is_an_error_of_the_server(dashboard):
    with open("queuectl.db", "wb") as file:
        file.write(b"no database, but text that is longer than its header" * 99)
    assert dashboard.ask("/api/status").status in (400, 503)
    assert dashboard.process.poll() is None


def test_another_host_warns():
    open_to_all = Dashboard("--host", "0.0.0.0").process
    open_to_all.send_signal(KILL)
    assert "warning" in open_to_all.stderr.read()
    assert "cannot listen" in refused("dashboard", "--host", "no.such.host.example")


# ======================================================================================
# The life of a job
# ======================================================================================


def test_claims_follow_priority_then_age(queue):
    for name, priority in (("a", 0), ("b", 5), ("c", 5), ("d", -1)):
        add(queue, id=name, priority=priority)
    assert [claim(queue)["id"] for _ in range(4)] == ["b", "c", "a", "d"]
    assert claim(queue) is None


def test_a_failed_job_waits_base_to_the_power_of_attempts_and_dies(queue, clock):
    add(queue)
    for wait in (2, 4):
        assert queue.fail(claim(queue), result()) == "failed"
        assert queue.job("job")["run_at"] == clock.now + wait
        clock.now += wait - 0.01
        assert claim(queue) is None
        clock.now += 0.01
    assert queue.fail(claim(queue), result("exit 3")) == "dead"
    job = queue.job("job")
    assert (job["attempts"], job["error"]) == (3, "exit 3")
    assert [run["error"] for run in queue.runs(job)] == ["exit 1", "exit 1", "exit 3"]


@pytest.mark.parametrize("max_retries", [0, 1])
def test_max_retries_0_and_1_mean_one_run(queue, max_retries):
    add(queue, max_retries=max_retries)
    assert queue.fail(claim(queue), result()) == "dead"


def test_retry_starts_again_with_attempts_0_but_a_new_run(queue):
    add(queue, max_retries=1)
    queue.fail(claim(queue), result())
    queue.retry(["job"])
    job = queue.job("job")
    assert (job["state"], job["attempts"], job["error"]) == ("pending", 0, None)
    assert claim(queue)["run"] == 2


def test_release_gives_the_attempt_back(queue):
    add(queue)
    assert queue.release(claim(queue), result("stop --now")) == "pending"
    assert queue.job("job")["attempts"] == 0
    assert claim(queue)["attempt"] == 1


def test_five_deaths_of_its_worker_make_a_job_dead(queue):
    add(queue, max_retries=100)
    for _ in range(4):
        assert queue.release(claim(queue), result("worker died"), True) == "pending"
    assert queue.release(claim(queue), result("worker died")) == "pending"
    assert queue.release(claim(queue), result("worker died"), True) == "dead"
    assert queue.job("job")["error"] == "worker died 5 times"


def test_a_result_of_a_run_that_was_put_back_is_dropped(queue):
    add(queue)
    stale = claim(queue)
    queue.release(stale, result("worker died"))
    current = claim(queue)
    for verb in (queue.complete, queue.fail, queue.release):
        assert verb(stale, result()) is None
    assert queue.job("job")["state"] == "processing"
    assert queue.complete(current, result(None)) == "completed"


def test_a_delayed_job_waits_and_does_not_hold_up_others(queue, clock):
    add(queue, id="later", delay="1d")
    add(queue, id="now")
    assert claim(queue)["id"] == "now"
    assert claim(queue) is None and queue.is_drained() is False
    clock.now += DAY
    assert claim(queue)["id"] == "later"


def test_cancel_makes_a_waiting_job_dead_at_once(queue):
    add(queue, id="pending")
    assert queue.cancel(["pending"]) == 1
    add(queue, id="failed")
    queue.fail(claim(queue), result())
    assert queue.cancel(["failed"]) == 1
    assert [job["error"] for job in queue.jobs(queuectl.where(["dead"]))] == ["cancelled"] * 2
    queue.retry(["failed"])
    queue.complete(claim(queue), result(None))


@pytest.mark.parametrize("verb", ["fail", "release"])
def test_a_cancelled_run_ends_dead_however_it_ends(queue, verb):
    add(queue)
    run = claim(queue)
    assert queue.cancel(["job"]) == queue.cancel(["job"]) == 1
    assert getattr(queue, verb)(run, result()) == "dead"
    assert queue.job("job")["error"] == "cancelled"


def test_a_run_that_completes_before_it_is_cancelled_stays_completed(queue):
    add(queue)
    run = claim(queue)
    queue.cancel(["job"])
    assert queue.complete(run, result(None)) == "completed"


def bring(queue, state):
    """Bring a job into a state; return its run, if it had one."""
    add(queue, max_retries=1 if state == "dead" else 3)
    if state == "pending":
        return dict(seq=queue.job("job")["seq"], run=0, attempt=1, max_retries=3)
    run = claim(queue)
    if state == "completed":
        queue.complete(run, result(None))
    elif state in ("failed", "dead"):
        queue.fail(run, result())
    return run


@pytest.mark.parametrize("verb, states", [
    ("complete", "pending completed failed dead"),
    ("fail", "pending completed failed dead"),
    ("release", "pending completed failed dead"),
    ("retry", "pending processing failed"),
    ("delete", "processing"),
    ("cancel", "completed dead"),
])
def test_forbidden_arrows_change_nothing(clock, verb, states):
    for number, state in enumerate(states.split()):
        with queuectl.Queue("%d.db" % number, clock=clock) as queue:
            run = bring(queue, state)
            before = tuple(queue.job("job"))
            if verb in ("retry", "delete", "cancel"):
                with pytest.raises(queuectl.QueueError):
                    getattr(queue, verb)(["job"])
            else:
                assert getattr(queue, verb)(run, result()) is None
            assert tuple(queue.job("job")) == before


def test_counts_follow_every_transition(queue):
    for name in "abcd":
        add(queue, id=name, max_retries=1)
    queue.complete(claim(queue), result(None))
    queue.fail(claim(queue), result())
    claim(queue)
    queue.delete(["d"])
    rows = queue.db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
    assert {s: n for s, n in queue.counts().items() if n} == dict(map(tuple, rows))


def test_delete_and_retry_are_all_or_nothing():
    enqueue("exit 1", id="dead", max_retries=1)
    drain()
    enqueue(id="fresh")
    assert "fresh is pending, not dead" in refused("dlq", "retry", "dead", "fresh")
    refused("delete", "fresh", "nope")
    assert {name: job["state"] for name, job in jobs().items()} == {
        "dead": "dead", "fresh": "pending"}
    ok("delete", "fresh", "dead", "fresh")
    assert jobs() == {}


# ======================================================================================
# Policy
# ======================================================================================


@pytest.mark.parametrize("base, attempts, longest, wait", [
    (2, 1, 100, 2), (2, 3, 100, 8), (3, 2, 100, 9), (1.5, 2, 100, 2.25), (0, 5, 100, 0),
    (2, 10, 100, 100), (2.0, 5000, 86400, 86400),
])
def test_backoff(base, attempts, longest, wait):
    assert queuectl.backoff(base, attempts, longest) == wait


@pytest.mark.parametrize("given, seconds", [
    (90, 90), (1.5, 1.5), ("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("7D", 604800),
])
def test_durations(given, seconds):
    assert queuectl.parse_duration(given) == seconds


@pytest.mark.parametrize("given", [
    "2001-09-09T01:46:40Z", "2001-09-09T03:46:40+02:00", 1e9, "1000000000"])
def test_moments(given):
    assert queuectl.check_time(given) == 1e9


def test_a_date_without_signs_is_no_moment_of_1970():
    with contextlib.suppress(ValueError):  # older Pythons do not know it
        assert queuectl.check_time("20260131") > 1e9


@pytest.mark.parametrize("field, value", [
    ("command", ""), ("command", "  "), ("command", 5), ("command", "a\0b"),
    ("command", "\ud800"), ("command", ["ls"]), ("id", ""), ("id", 5), ("id", "a\nb"),
    ("id", "x" * 256), ("id", " "), ("id", "\x1b[31m"), ("max_retries", -1),
    ("max_retries", True), ("max_retries", 2.0), ("max_retries", "3"), ("max_retries", 1e400),
    ("priority", 2**63), ("priority", "high"), ("priority", None.__class__.__name__),
    ("timeout", 0), ("timeout", -1), ("timeout", float("nan")), ("timeout", float("inf")),
    ("timeout", "soon"), ("timeout", True), ("delay", -1), ("delay", "1w"), ("delay", {}),
    ("run_at", "tomorrow"), ("run_at", -1), ("run_at", 1e12), ("run_at", []),
    ("run_at", "2026-13-01T00:00:00Z"), ("cwd", "/no/such/folder"), ("cwd", 1), ("cwd", "a\0"),
    ("env", []), ("env", {"A": 1}), ("env", {"": "x"}), ("env", {"A=B": "x"}),
    ("env", {"A": "\0"}), ("evn", {}), ("command", True), ("command", {}), ("command", "\t\n"),
    ("command", 1.5), ("id", True), ("id", []), ("id", "\ud800"), ("id", "a\0"), ("id", "\x7f"),
    ("id", "a\u2028b"), ("id", "\u202e"), ("max_retries", 1000001), ("max_retries", {}),
    ("max_retries", -2**70), ("priority", -2**63 - 1), ("priority", 1.0), ("priority", False),
    ("priority", 1e300), ("priority", []), ("timeout", 1e10), ("timeout", "-5s"), ("timeout", ""),
    ("timeout", "nan"), ("timeout", "inf"), ("timeout", []), ("delay", "s"), ("delay", 1e300),
    ("delay", True), ("delay", float("nan")), ("run_at", "nan"), ("run_at", True),
    ("run_at", "25:00"), ("run_at", float("-inf")), ("run_at", ""), ("cwd", ""), ("cwd", []),
    ("cwd", "\ud800"), ("env", "A=B"), ("env", {"A": None}), ("env", {"\0": "x"}),
    ("env", {"A": "\ud800"}), ("env", {"A": True}), ("Command", "x"), ("", 1),
], ids=lambda value: repr(value)[:30])
def test_bad_fields_are_refused_by_name(field, value):
    job = json.dumps(dict({"command": "true"}, **{field: value}))
    assert field in refused("enqueue", job, code=2)
    assert jobs() == {}


@pytest.mark.parametrize("text", [
    "", "{", "nope", "5", "null", '"text"', "[1]", "{}", "[" * 100000, "{'a': 1}",
    '{"command": "true"', '{"id": "x"}', "9" * 5000, b"\xff\xfe{".decode("latin-1"),
    '{"command": "true", "delay": 1, "run_at": 5}',
], ids=lambda text: text[:20])
def test_what_is_no_job_is_refused(text):
    refused("enqueue", text, code=2)
    refused("enqueue", "-", stdin=b"\n" + text.encode() + b"x", code=2)


@pytest.mark.parametrize("name", [
    "../../etc/passwd", "-x", "CON", "'; drop table jobs; --", "%s", "Zoë", "a b", "x" * 255])
def test_odd_ids_are_kept_faithfully(name):
    enqueue(python("import os, sys;"
                   " sys.stdout.buffer.write(os.environ['QUEUECTL_JOB_ID'].encode())"), id=name)
    assert drain(1) == 0
    assert ok("logs", "--", name).out == name
    ok("delete", "--", name)
    assert jobs() == {}


# ======================================================================================
# Running commands
# ======================================================================================


@pytest.mark.parametrize("command, code, error", [
    ("exit 3", 3, "exit 3"), ("true", 0, None),
    pytest.param("kill -9 $$", None, "signal 9", marks=posix),
    pytest.param("no-such-command", 127, "exit 127", marks=posix),
])
def test_how_commands_end(command, code, error):
    enqueue(command, id="x", max_retries=1)
    assert drain(1) == (1 if error else 0)
    job = jobs()["x"]
    assert (job["exit_code"], job["error"]) == (code, error)


def test_a_command_sees_its_folder_its_environment_and_no_input(home):
    os.mkdir("sub")
    enqueue(python(
        "import os, sys; get = os.environ.get; print(os.getcwd(), get('a'), get('A'),"
        " get('QUEUECTL_JOB_ID'), get('QUEUECTL_ATTEMPT'), flush=True);"
        " print(sys.stdin.read() + 'end', file=sys.stderr)"),
        id="x", cwd="sub", env={"A": "b c"})
    drain(1)
    unknown = None if os.name == "posix" else "b c"  # a or A is the same there
    assert ok("logs", "x").out == "%s %s b c x 1\nend\n" % (home / "sub", unknown)


def test_a_job_that_enqueues_reaches_its_own_queue(home):
    os.mkdir("sub")
    told = python("import os; print(os.environ['QUEUECTL_DB'])")
    ok("--db", "sub/q.db", "enqueue", "--id", "x", "--cwd", "/", "--", told)
    ok("--db", "sub/q.db", "enqueue", "--id", "own", "--env", "QUEUECTL_DB=other", "--", told)
    line = queuectl.shell_line([sys.executable, COMPILED, "enqueue", "--id", "next", "--", "true"])
    ok("--db", "sub/q.db", "enqueue", "--id", "z", "--cwd", "/", "--", line)
    assert start_pool("--db", "sub/q.db", "--drain").wait(20) == 0
    assert ok("--db", "sub/q.db", "logs", "x").out.rstrip() == str(home / "sub" / "q.db")
    assert ok("--db", "sub/q.db", "logs", "own").out.rstrip() == "other"
    assert jobs("--db", "sub/q.db")["next"]["state"] == "completed"


@posix
def test_a_command_that_begins_with_a_minus_is_a_command():
    ok("config", "set", "max_retries", "1")
    ok("enqueue", "--id", "line", "--", "-c true")
    ok("enqueue", "--id", "words", "--", "-x", "y")
    ok("enqueue", "--id", "launched", "--launcher", "env", "--", "-c true")
    drain()
    assert {job["error"] for job in jobs().values()} == {"exit 127"}
    assert "-c" in ok("logs", "line").out and "-x" in ok("logs", "words").out


def test_a_folder_that_vanished_is_a_failure(home):
    os.mkdir("sub")
    enqueue(id="x", cwd="sub", max_retries=1)
    os.rmdir("sub")
    drain(1)
    assert "cannot start" in jobs()["x"]["error"]


@pytest.mark.parametrize("how", ["timeout", "cancel", "stop --now", "kill"])
def test_a_run_that_is_ended_from_outside_ends_with_all_its_processes(how):
    enqueue(LASTING + " tree", id="x", timeout=ENOUGH if how == "timeout" else None, max_retries=1)
    pool = start_pool(count=1)
    wait_until(lambda: len(lasting()) == 2)
    if how == "cancel":
        assert ok("cancel", "x").out == "cancelled x, which is running\n"
    elif how == "stop --now":
        ok("worker", "stop", "--now")
    elif how == "kill":
        os.kill(workers_of(pool.pid)[0], KILL)
        ok("cancel", "x")
    wait_until(lambda: state("x") != "processing")
    assert not lasting()
    error = {"timeout": "timeout %gs" % ENOUGH, "stop --now": None}.get(how, "cancelled")
    job = ok("show", "x", "--json").json
    assert (job["state"], job["error"]) == ("dead" if error else "pending", error)
    assert job["attempts"] == 0 if how == "stop --now" else job["attempts"]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
@posix
def test_what_goes_on_without_its_main_thread_is_ended_with_its_run():
    enqueue("setsid %s thread & exec sleep 77" % LASTING, id="x", max_retries=1)
    pool = start_pool(count=1)
    wait_until(lasting)
    [pid] = lasting()
    wait_until(lambda: queuectl.proc_stat(pid)[0] == b"Z")
    ok("cancel", "x")
    wait_until(lambda: state("x") == "dead")
    assert not lasting()


# As on FreeBSD, whose posix_spawn can't start a session.
NO_SESSION = """
def spawn(*args, setsid=False, spawn=queuectl.os.posix_spawn, **options):
    if setsid:
        raise NotImplementedError
    return spawn(*args, **options)
queuectl.os.posix_spawn = spawn
"""


@posix
def test_where_no_session_can_be_started_a_run_has_a_group_of_its_own():
    enqueue("ps -o pid=,pgid=,sid= -p $$; %s & %s" % (LASTING, LASTING), id="x", timeout=0.3)
    pool = start_pool(script=NO_SESSION, count=1)
    wait_until(lambda: state("x") == "failed")
    pid, group, session = map(int, ok("logs", "x").out.split())
    assert pid == group and session == os.getsid(pool.pid) and not lasting()


def test_a_job_cancelled_while_no_pool_runs_is_ended_by_the_next():
    enqueue("trap '' TERM; " + LASTING if os.name == "posix" else LASTING, id="x")
    pool = start_pool(count=1)
    wait_until(lasting)
    kill_all(pool)
    ok("cancel", "x")
    assert state("x") == "processing" and "No pool is running" in ok("status").out
    assert "no pool is running" in cli("wait", "--timeout", "0").err
    assert lasting() or os.name != "posix"  # there it ends with its worker
    start_pool(count=1, script="queuectl.TERM_GRACE = 0.2")
    wait_until(lambda: state("x") == "dead")
    assert not lasting()
    assert jobs()["x"]["error"] == "cancelled"


def test_output_is_bytes_and_only_its_end_is_kept():
    ok("config", "set", "output_limit", "10")
    for name, what in (("few", "b'\\xff\\0a'"), ("many", "b'0123456789' * 99 + b'abcde'")):
        enqueue(python("import sys; sys.stdout.buffer.write(%s)" % what), id=name)
    drain(1)
    with queuectl.Queue("queuectl.db") as queue:
        assert queue.output(queue.job("few")) == b"\xff\0a"
        assert queue.output(queue.job("many")) == (
            b"[queuectl: 985 bytes of output dropped here]\n56789abcde")


def size_of_runs():
    with contextlib.suppress(FileNotFoundError), os.scandir("queuectl.runs") as entries:
        return sum(os.stat(entry).st_size for entry in entries)
    return 0


@posix
def test_100_megabytes_of_output_cost_no_memory_and_leave_the_end():
    enqueue("head -c 100000000 /dev/zero; echo end", id="x")
    pool = start_pool(count=1, fresh=True)  # as small as it really is
    worker = workers_of(pool.pid)[0]
    wait_until(lambda: state("x") == "completed")
    assert int(re.search(r"VmHWM:\s+(\d+)", read("/proc/%d/status" % worker))[1]) < 60000
    with queuectl.Queue("queuectl.db") as queue:
        output = queue.output(queue.job("x"))
    assert output.startswith(b"[queuectl: ") and output.endswith(b"\0\0\0end\n")
    assert 2**20 <= len(output) < 2**20 + 100


def test_a_job_that_prints_for_ever_keeps_its_folder_under_a_bound():
    enqueue(python("while 1: print('y' * 999, end='')"), id="x", max_retries=1)
    start_pool(count=1)
    sizes = [0]
    wait_until(lambda: sizes.append(size_of_runs()) or max(sizes) > 2**21 > sizes[-1] > 0)
    # Twice the limit, a pipe and a bit; and it was cut back only when it was over that.
    assert max(sizes) <= 2**21 + 2**16 + 2**20
    ok("cancel", "x")
    wait_until(lambda: state("x") == "dead")
    told = ok("logs", "x").out
    assert told.startswith("[queuectl: ") and 2**20 < len(told) < 2**20 + 100


@posix
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace to see the sync")
def test_an_acknowledged_enqueue_is_synced():
    enqueue(id="first")
    job = '{"id":"second","command":"true"}'
    trace = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write,pwrite64", "-o", "trace"]
    with contextlib.closing(sqlite3.connect(database())) as db:
        db.execute("SELECT * FROM jobs").fetchall()  # or the last to close it syncs it, too
        subprocess.run([*trace, sys.executable, SCRIPT, "enqueue", job],
                       stdout=subprocess.PIPE, check=True)
    lines = read("trace").splitlines()
    said = next(n for n, line in enumerate(lines) if "enqueued second" in line)
    logged = [line for line in lines[:said] if "-wal>" in line]
    assert "write" in logged[-2] and "sync(" in logged[-1]


@posix
def test_what_a_job_does_to_its_own_output_loses_nothing_and_keeps_the_order():
    enqueue("echo a; echo b > /dev/stderr; echo c; echo d >&2; echo e > /dev/stdout", id="x")
    enqueue("echo a; echo b | tee /dev/stderr; echo c", id="tee")
    drain()
    assert ok("logs", "x").out == "a\nb\nc\nd\ne\n"
    assert ok("logs", "tee").out == "a\nb\nb\nc\n"


def test_a_job_may_print_what_queuectl_says_of_dropped_output():
    """Not this as well: more digits than Python makes a number of."""
    note = "[queuectl: %s bytes of output dropped here]\n"
    for digits in ("0", "7", "007", "9" * 5000):
        enqueue(python("print('%s' + 3 * 'x')" % (note % digits).replace("\n", "\\n")),
                id=digits[:9])
    assert drain(1) == 0
    for digits in ("0", "7", "007", "9" * 5000):
        assert ok("logs", digits[:9]).out == note % digits + "xxx\n"


def ten(first, last):
    """Return these bytes of an output that numbers its lines of ten bytes each."""
    lines = b"".join(b"%9d\n" % n for n in range(first // 10, last // 10 + 1))
    return lines[first % 10 :][: last - first]


# Prints it from a byte to another, in large pieces.
TEN = "import sys; ten = lambda a, b: [sys.stdout.write(''.join(f'{n:9}' + chr(10)" \
    " for n in range(m // 10, min(b, m + 50000) // 10))) for m in range(a, b, 50000)];"


@posix
def test_logs_show_the_end_at_every_moment():
    ok("config", "set", "output_limit", "100000")
    enqueue(python(TEN + "ten(0, 10**8)"), id="x")
    start_pool(count=1)
    seen = []
    wait_until(lambda: ok("logs", "x").out)
    with queuectl.Queue("queuectl.db") as queue:
        job = queue.job("x")
        while len(seen) < 300 and queue.is_current(job):
            dropped, output = queuectl.split_dropped(queuectl.output_of(queue, job, job["run"]))
            assert len(output) == 100000 or not dropped and len(output) < 100000
            second = output.index(b"\n") + 1  # a whole line: it tells where we are
            assert dropped == int(output[second : second + 10]) * 10 - second
            assert output == ten(dropped, dropped + len(output))
            seen.append(dropped)
    assert seen == sorted(seen) and len(set(seen)) > 10
    ok("worker", "stop", "--now")


@posix
@pytest.mark.parametrize("size", [0, 50, 3 * 10**6])
@pytest.mark.parametrize("whole", [False, True])
def test_what_was_printed_until_its_worker_was_killed_is_kept(size, whole):
    enqueue("[ -e out ] && exit; " + python(TEN + "ten(0, %d)" % size) + "; touch out; " + LASTING,
            id="x")
    pool = start_pool(count=1)
    wait_until(lambda: os.path.exists("out") and lasting())
    if whole:
        kill_all(pool)
        start_pool(count=1)
    else:
        os.kill(workers_of(pool.pid)[0], KILL)
    wait_until(lambda: state("x") == "completed")
    with queuectl.Queue("queuectl.db") as queue:
        job = queue.job("x")
        assert [run["error"] for run in queue.runs(job)] == ["worker died", None]
        dropped = max(0, size - 2**20)
        assert queuectl.split_dropped(queue.output(job, 1)) == (dropped, ten(dropped, size))


@posix
def test_follow_shows_each_byte_over_cut_backs_and_tells_what_it_missed():
    ok("config", "set", "output_limit", "100000")
    os.mkfifo("go")
    enqueue(python(TEN + "[(ten(n * 90000, n * 90000 + 90000), sys.stdout.flush(),"
                   " open('go').read()) for n in range(10)]; ten(900000, 2000000)"), id="x")
    start_pool(count=1)
    with subprocess.Popen([sys.executable, COMPILED, "logs", "-f", "x"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follow:
        patience = threading.Timer(20, follow.kill)
        patience.start()
        for n in range(10):
            assert follow.stdout.read(90000) == ten(n * 90000, n * 90000 + 90000)
            with open("go", "w"):
                pass
        rest, told = follow.communicate(timeout=20)
        patience.cancel()
    missed = sum(map(int, re.findall(rb"(\d+) bytes of output were dropped", told)))
    assert missed and len(rest) + missed == 1100000 and rest.endswith(ten(1900000, 2000000))


class Killed(BaseException):
    """As SIGKILL, from which nothing recovers."""


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_worker_killed_while_it_cuts_back_leaves_the_end(home, monkeypatch, part):
    lease = queuectl.Lease(str(home / "queuectl.runs" / "x"), 1000)
    write = os.write

    def killed(fd, data):
        if len(data) < 2000:
            write(fd, data[: int(part * len(data))])
            raise Killed
        return write(fd, data)

    for first in (0, 80000):  # the second time a note stands at the beginning
        data = ten(first, first + 80000)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(os, "write", killed)
            lease.write(data)
        kept = queuectl.read_output(lease.path, 1000)
        assert queuectl.split_dropped(kept)[1] == data[-1000:]
        lease.size = os.path.getsize(lease.path)
    lease.discard()


@pytest.mark.parametrize("seed", range(3))
def test_a_lease_has_the_end_of_the_output_whatever_the_disk_takes(home, monkeypatch, seed):
    rnd, limit, printed, write = random.Random(seed), 20000, 0, os.write

    def full(fd, data):
        taken = rnd.choice([0, rnd.randrange(1, len(data) + 1), len(data), len(data)])
        if not taken:
            raise OSError(28, "No space left on device")
        return write(fd, data[:taken])

    lease = queuectl.Lease(str(home / "queuectl.runs" / "x"), limit)
    for step in range(200):
        monkeypatch.setattr(os, "write", full if step % 50 > 24 else write)
        size = rnd.choice([1, 10, 1000, 30000, 100000])
        lease.write(ten(printed, printed + size))
        printed += size
        first = max(0, printed - limit)
        kept = first, ten(first, printed)
        assert queuectl.split_dropped(lease.output())[1] == kept[1]
        if step < 25:  # the disk always took it
            assert queuectl.split_dropped(lease.output()) == kept
            on_disk = queuectl.read_output(lease.path, limit)
            assert queuectl.split_dropped(on_disk) == kept
            assert os.path.getsize(lease.path) <= 2 * limit + 2**16
    lease.discard()


def test_a_background_child_holds_up_nothing():
    enqueue(LASTING + " &" if os.name == "posix" else "start /b " + LASTING, id="x")
    assert drain(1) == 0
    wait_until(lasting)  # it was let be


def test_logs_shows_the_output_of_a_running_job():
    enqueue("echo hello&& " + LASTING, id="x")
    start_pool()
    wait_until(lambda: ok("logs", "x").out.split() == ["hello"])


# ======================================================================================
# Pools: stopping, draining, several at once
# ======================================================================================


def leftovers():
    return sorted(set(os.listdir(".")) - {"queuectl.db", "queuectl.log", "out", "lock"})


@posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_lets_the_running_job_finish(number):
    pool = start_pool(count=1)
    enqueue("until [ -e lock ]; do sleep 0.02; done; touch out", id="x")
    enqueue(id="next")
    wait_until(lambda: state("x") == "processing")
    pool.send_signal(getattr(signal, number))
    wait_until(lambda: "asked to stop" in read("queuectl.log"))
    open("lock", "w").close()
    assert pool.wait(10) == 0
    assert (state("x"), state("next")) == ("completed", "pending")
    assert leftovers() == []


def test_worker_stop_stops_all_pools_and_waits_for_them():
    pools = [start_pool(), start_pool(count=1)]
    enqueue("sleep 0.2", id="x")
    wait_until(lambda: state("x") == "processing")
    told = ok("worker", "stop").out
    assert told.startswith("stopped pool ")
    assert sorted(map(int, re.findall(r"\d+", told))) == sorted(pool.pid for pool in pools)
    assert state("x") == "completed"
    assert [pool.wait(10) for pool in pools] == [0, 0]
    assert leftovers() == []


def test_worker_stop_with_no_pool_says_so_and_stops_no_later_one():
    assert ok("worker", "stop").out == "no pool is running\n"
    assert os.listdir(".") == []
    enqueue(id="x")
    start_pool()
    wait_until(lambda: state("x") == "completed")


@posix
def test_two_signals_at_once_are_one():
    """As timeout(1) sends them: to the pool, and to its whole group."""
    pool = start_pool(count=1, script="queuectl.POLL_INTERVAL = 0.2")
    enqueue("sleep 0.3", id="x")
    wait_until(lambda: state("x") == "processing")
    for number in (signal.SIGTERM, signal.SIGINT):
        pool.send_signal(number)
    assert pool.wait(10) == 0 and state("x") == "completed"


@posix
def test_a_second_signal_gives_running_jobs_back():
    enqueue("trap '' TERM; %s & wait; %s" % (LASTING, LASTING), id="x")
    pool = start_pool(count=1, script="queuectl.TERM_GRACE = 0.2")
    wait_until(lasting)
    pool.send_signal(signal.SIGTERM)
    wait_until(lambda: "asked to stop" in read("queuectl.log"))
    # One that came at once would be the same one.
    wait_until(lambda: pool.send_signal(signal.SIGTERM) or pool.poll() is not None)
    assert pool.wait(20) == 0
    job = jobs()["x"]
    assert (job["state"], job["attempts"]) == ("pending", 0)
    assert not lasting()


@posix
def test_a_worker_that_is_asked_to_leave_is_replaced_even_in_a_drain():
    ok("enqueue", "-", stdin=b'{"command":"sleep 0.1"}\n' * 4)
    pool = start_pool("--drain", count=1)
    os.kill(workers_of(pool.pid)[0], signal.SIGTERM)
    assert pool.wait(20) == 0
    assert len(jobs("--state", "completed")) == 4


def test_a_job_can_stop_its_own_pool():
    line = queuectl.shell_line([sys.executable, COMPILED, "worker", "stop"])
    enqueue(line, id="x", timeout=30)
    assert start_pool(count=1).wait(20) == 0
    assert state("x") == "completed"


def test_drain_waits_for_retries_but_not_for_delayed_jobs():
    ok("config", "set", "backoff_base", "0.1")
    enqueue(python("import os; os.path.exists('out') or exit(os.mkdir('out') or 1)"), id="again")
    enqueue(id="later", delay="1h")
    assert drain() == 0
    assert (state("again"), state("later")) == ("completed", "pending")


def test_an_idle_pool_picks_up_at_once():
    start_pool(count=1)
    enqueue(id="x")
    wait_until(lambda: state("x") == "completed", timeout=2)


@posix
def test_a_drain_that_ends_while_the_database_is_locked_says_how_it_ended():
    script = """if 1:
        def finish(self, queue, finish=queuectl.Supervisor.finish, left=[1, 1]):
            if left:
                raise queuectl.sqlite3.OperationalError("database is locked%d" % left.pop())
            return finish(self, queue)
        queuectl.Supervisor.finish = finish"""
    enqueue()
    assert start_pool("--drain", script=script).wait(20) == 0
    enqueue("exit 1", max_retries=1)
    assert start_pool("--drain", script=script).wait(20) == 1


def test_two_pools_run_every_job_exactly_once():
    os.mkdir("out")
    line = '{"command":"mkdir %d","cwd":"out"}\n'  # a second time it fails
    ok("enqueue", "-", stdin="".join(line % n for n in range(300)).encode())
    pools = [start_pool("--drain", count=4) for _ in range(2)]
    assert [pool.wait(50) for pool in pools] == [0, 0]
    assert len(os.listdir("out")) == 300
    assert sql("SELECT error FROM runs WHERE error NOT NULL") == []
    assert {(job["state"], job["attempts"]) for job in jobs().values()} == {("completed", 1)}
    assert leftovers() == []


# ======================================================================================
# Launchers
# ======================================================================================

# An engine's client: it runs its arguments in another session, without what it inherited,
# as on another machine; passes their output on, and ends them when it is asked to end.
CLIENT = """#!%s
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
    path = tmp_path / "client"
    path.write_text(CLIENT)
    path.chmod(0o755)
    return str(path)


def test_a_launcher_is_put_before_the_shell():
    with open("via.py", "w") as file:
        file.write("import subprocess, sys\nprint(sys.argv[1], flush=True)\n"
                   "sys.exit(subprocess.call(sys.argv[2:]))")

    def via(word):
        return "'%s' '%s' '%s'" % (sys.executable, os.path.abspath("via.py"), word)

    ok("config", "set", "launcher", via("a  b"))
    ok("config", "set", "max_retries", "1")
    ok("enqueue", "--id", "x", "--", "exit 3")
    ok("enqueue", "--id", "own", "--launcher", via("own"), "--", "echo told")
    ok("enqueue", "--id", "none", "--launcher", "none", "--", "echo told")
    drain()
    assert [ok("logs", name).out.replace("\r", "") for name in ("x", "own", "none")] == [
        "a  b\n", "own\ntold\n", "told\n"]
    assert jobs()["x"]["exit_code"] == 3 and jobs()["x"]["launcher"] is None
    assert via("own") in ok("show", "own").out


@pytest.mark.parametrize("launcher", ["no-such-program -n1", "nice 'x", " ", "\0"])
def test_bad_launchers_are_refused(launcher):
    assert "launcher" in refused("config", "set", "launcher", launcher, code=2)
    line = json.dumps({"command": "true", "launcher": launcher})
    assert "launcher" in refused("enqueue", line, code=2)


@posix
def test_a_launcher_that_fails_by_itself_is_a_failure_of_the_run(client):
    ok("enqueue", "--id", "x", "--max-retries", "2", "--launcher", client, "--", "true")
    ok("config", "set", "backoff_base", "0")
    with open(client, "w") as file:
        file.write("#!/bin/sh\necho no such node; exit 9\n")
    drain()
    job = jobs()["x"]
    assert (job["state"], job["attempts"], job["error"]) == ("dead", 2, "exit 9")
    assert ok("logs", "x").out == "no such node\n"
    os.remove(client)
    ok("dlq", "retry", "x")
    drain()
    assert jobs()["x"]["error"] == "exit 127" and client in ok("logs", "x").out


@posix
@pytest.mark.parametrize("how", ["timeout", "cancel", "stop --now"])
def test_what_runs_elsewhere_ends_with_its_run(client, how):
    words = ["--timeout", "1"] if how == "timeout" else []
    ok("enqueue", "--id", "x", "--max-retries", "1", "--launcher", client, *words, "--", LASTING)
    start_pool()
    wait_until(lasting)
    if how == "cancel":
        ok("cancel", "x")
    elif how == "stop --now":
        ok("worker", "stop", "--now")
    wait_until(lambda: state("x") in ("dead", "pending"))
    assert not lasting()


@posix
def test_a_launcher_that_had_to_be_killed_is_logged(client):
    with open(client, "w") as file:
        file.write("#!/bin/sh\ntrap '' TERM; while :; do sleep 0.1; done\n")
    ok("enqueue", "--id", "x", "--max-retries", "1", "--timeout", "0.2", "--launcher",
       client, "--", "true")
    start_pool(script="queuectl.TERM_GRACE = 0.2")
    wait_until(lambda: state("x") == "dead")
    wait_until(lambda: "launcher was killed" in read("queuectl.log"))


@posix
def test_a_killed_pools_run_elsewhere_ends_before_it_runs_again(client):
    ok("enqueue", "--id", "x", "--launcher", client, "--", LASTING + " once")
    pool = start_pool(count=1)
    wait_until(lasting)
    kill_all(pool)
    ok("config", "set", "launcher", "none")
    start_pool(count=1)
    wait_until(lambda: state("x") == "completed")
    assert [run["error"] for run in ok("show", "x", "--json").json["runs"]] == [
        "worker died", None]
    assert not os.path.exists("overlaps") and not lasting()


# ======================================================================================
# What is killed
# ======================================================================================

# Kills the worker itself, once, when it has the lease of a claim that is not committed.
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


def runs():
    """Return how often a command began that lasts only once."""
    return read("out").count("run") if os.path.exists("out") else 0


def reaper_of(queue):
    """Return the reaper of a pool that is not this process."""
    reaper = queuectl.Reaper(queue.path, queuectl.open_log(queue.path, "pool"))
    reaper.pid = 0
    return reaper


ORPHANS = {
    "plain": "LASTING once",
    "redirected": "exec >/dev/null 2>&1; LASTING once",
    "all closed": "exec LASTING once closed",
    "unmarked": "exec env -i LASTING once",
    "ignores TERM": "trap '' TERM; LASTING once",
    "own session": "setsid LASTING once; exit $?",  # or it would be the leader, and fork
}
# As on a system without /proc; there one that closed every descriptor is not known.
NO_PROC = """
exists = queuectl.os.path.exists
queuectl.os.path.exists = lambda path: path != "/proc/self/fd" and exists(path)
"""
lsof = pytest.mark.skipif(not shutil.which("lsof"), reason="needs lsof, or /proc")


@pytest.mark.parametrize("victim", ["worker", "pool"])
@pytest.mark.parametrize("kind, script", [("plain", ""), *(
    pytest.param(kind, script, marks=posix) for kind, script in [
        *((kind, "") for kind in ORPHANS if kind != "plain"),
        ("ignores TERM", "queuectl.IDLE_INTERVAL = 60")]),  # who waits is woken
    *(pytest.param(kind, NO_PROC, marks=[posix, lsof])
      for kind in ("unmarked", "own session"))])
def test_a_killed_jobs_orphan_is_ended_before_it_runs_again(kind, script, victim):
    enqueue(ORPHANS[kind].replace("LASTING", LASTING), id="x")
    script += "\nqueuectl.TERM_GRACE = 0.2" * (kind == "ignores TERM")
    pool = start_pool(count=1, script=script)
    wait_until(lambda: lasting() and runs() == 1)
    if victim == "worker":
        os.kill(workers_of(pool.pid)[0], KILL)
    else:
        kill_all(pool)
        assert lasting() or os.name != "posix"  # there they end with their worker
        ok("worker", "stop")  # what belongs to the orphan has to stay
        start_pool(count=1, script=script)
    wait_until(lambda: state("x") == "completed")
    job = ok("show", "x", "--json").json
    assert not os.path.exists("overlaps")
    if victim == "pool":
        assert [name for name in leftovers() if str(pool.pid) in name] == []
    assert not lasting()
    assert job["attempts"] == 1  # the lost attempt was given back
    assert [run["error"] for run in job["runs"]] == ["worker died", None]


# How processes of a run come to be elsewhere than in the group of its leader.
FAMILIES = {
    "plain": "LASTING once",
    "timeout": "timeout 60 LASTING once",
    "setsid": "setsid -w LASTING once",
    "session": python("import subprocess as s; s.call('LASTING once', shell=True,"
                      " start_new_session=True)"),
    "pipe": "LASTING once | cat",
    "job control": "bash -c 'set -m; LASTING once & wait'",
}


@posix
@pytest.mark.skipif(not os.path.exists("/proc/self/cwd"), reason="needs /proc")
@pytest.mark.skipif(not shutil.which("setsid"), reason="needs setsid(1)")
@pytest.mark.parametrize("how", ["timeout", "cancel", "stop --now", "worker", "pool"])
def test_no_process_of_a_run_lives_when_its_job_has_left_processing(how):
    words = ["--timeout", "1.2"] if how == "timeout" else []
    for name, line in FAMILIES.items():
        os.mkdir(name)
        ok("enqueue", "--id", name, "--cwd", name, "--max-retries", "1", *words, "--",
           line.replace("LASTING", LASTING))
    pool = start_pool(count=len(FAMILIES))
    wait_until(lambda: all(os.path.exists(name + "/out") for name in FAMILIES))
    if how == "cancel":
        ok("cancel", *FAMILIES)
    elif how == "stop --now":
        ok("worker", "stop", "--now", "--no-wait")
    elif how == "worker":
        for pid in workers_of(pool.pid):
            os.kill(pid, KILL)
    elif how == "pool":
        kill_all(pool)
        start_pool(count=len(FAMILIES))
    last = {"timeout": "dead", "cancel": "dead", "stop --now": "pending"}.get(how, "completed")

    def over():
        done = list(jobs("--state", last))
        assert not [(name, ours(name)) for name in done if ours(name)]
        return len(done) == len(FAMILIES)

    wait_until(over)
    assert not [name for name in FAMILIES if os.path.exists(name + "/overlaps")]


@posix
@pytest.mark.parametrize("how", ["cancel", "worker", "pool"])
def test_what_a_finished_run_left_is_let_be_when_the_next_is_ended(how):
    ok("config", "set", "backoff_base", "0")
    enqueue("[ -e out ] && exec %s; touch out; %s & exit 1" % (LASTING, LASTING), id="x")
    pool = start_pool(count=1)
    wait_until(lambda: len(lasting()) == 2 and ok("show", "x", "--json").json["runs"][1]["pid"])
    second = ok("show", "x", "--json").json["runs"][1]["pid"]
    left, = set(lasting()) - {second}
    if how == "worker":
        os.kill(workers_of(pool.pid)[0], KILL)
    elif how == "pool":
        kill_all(pool)
        start_pool(count=1)
    ok("cancel", "x")
    wait_until(lambda: state("x") == "dead")
    assert lasting() == [left]
    ok("worker", "stop", "--now")
    assert lasting() == [left]


@posix
@pytest.mark.parametrize("how", ["cp -a", "backup"])
def test_a_pool_on_a_copy_of_a_queue_signals_nothing_of_the_original(how, monkeypatch):
    os.mkdir("a")
    monkeypatch.setenv("QUEUECTL_DB", "a/queuectl.db")
    enqueue(LASTING, id="x", cwd="/")
    pool = start_pool(count=1)
    wait_until(lambda: lasting() and "runs, pid" in read("a/queuectl.log"))
    original, copy = lasting(), "b/queuectl.db"
    if how == "cp -a":
        subprocess.run(["cp", "-a", "a", "b"], check=True)
    else:
        copy = "a/copy.db"
        with contextlib.closing(sqlite3.connect("a/queuectl.db")) as source:
            with contextlib.closing(sqlite3.connect(copy)) as target:
                source.backup(target)
    monkeypatch.setenv("QUEUECTL_DB", copy)
    start_pool(count=1)
    wait_until(lambda: len(lasting()) == 2)  # the copy's job runs as well: it is another
    assert [run["error"] for run in ok("show", "x", "--json").json["runs"]] == [
        "worker died", None]
    assert ok("worker", "stop", "--now").out.startswith("stopped pool")
    assert lasting() == original and "died, ending" not in read(copy[:-3] + ".log")
    monkeypatch.setenv("QUEUECTL_DB", "a/queuectl.db")
    assert len(ok("show", "x", "--json").json["runs"]) == 1 and pool.poll() is None
    ok("worker", "stop", "--now")


@posix
def test_a_worker_that_leaves_a_killed_pool_leaves_what_is_known_of_an_orphan():
    enqueue("exec %s once closed" % LASTING, id="x")
    pool = start_pool()
    wait_until(lambda: lasting() and runs() == 1)
    busy = [w["pid"] for w in ok("status", "--json").json["workers"] if w["job"]]
    for pid in (pool.pid, *busy):
        os.kill(pid, signal.SIGKILL)
    pool.wait(10)
    wait_until(lambda: not workers_of(pool.pid))
    start_pool(count=1)
    wait_until(lambda: state("x") == "completed")
    assert not os.path.exists("overlaps") and not lasting()


@posix
def test_a_pool_whose_queue_is_removed_while_it_ends_an_orphan_ends_too():
    enqueue("trap '' TERM; " + LASTING, id="x")
    pool = start_pool(count=1, script="queuectl.TERM_GRACE = 60")
    wait_until(lasting)
    os.kill(workers_of(pool.pid)[0], signal.SIGKILL)
    wait_until(lambda: "worker died, ending" in read("queuectl.log"))
    group = os.getpgid(lasting()[0])
    os.remove("queuectl.db")
    try:
        assert pool.wait(10) == 1
    finally:
        os.killpg(group, signal.SIGKILL)


TROUBLE = """
def keep_house(self, queue, keep_house=queuectl.Supervisor.maintain):
    if queuectl.os.path.exists("trouble"):
        raise queuectl.sqlite3.OperationalError("trouble")
    return keep_house(self, queue)
queuectl.Supervisor.maintain = keep_house
"""


def test_a_stopping_pool_looks_first_what_its_dead_worker_ran():
    pool = start_pool(count=1, script=TROUBLE)
    open("trouble", "w").close()
    os.kill(workers_of(pool.pid)[0], KILL)
    wait_until(lambda: "died" in read("queuectl.log"))
    ok("worker", "stop", "--no-wait")
    seen = read("queuectl.log").count("trouble")
    wait_until(lambda: read("queuectl.log").count("trouble") > seen + 2)
    assert pool.poll() is None
    os.remove("trouble")
    assert pool.wait(10) == 0


@posix
def test_a_run_that_could_not_be_ended_is_put_back_when_it_has_ended():
    enqueue("[ -e out ] && exit; touch out; exec sleep 0.7", id="x", timeout=0.1)
    pool = start_pool("--drain", count=1, script="queuectl.KILL_GRACE = queuectl.TERM_GRACE = 0.1\n"
                      "queuectl.signal_processes = lambda pids, number: None")
    assert pool.wait(10) == 0 and state("x") == "completed"
    assert "x 1/3 can't be ended: processes [" in read("queuectl.log")


@contextlib.contextmanager
def heir(run):
    """A process that has inherited a lease; its pid."""
    with subprocess.Popen(["sleep", "77"], pass_fds=[run["file"].fd]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def no_signals(monkeypatch, reaper):
    """Let a reaper signal no process."""
    monkeypatch.setattr(reaper, "end_orphan", lambda run, pids: pytest.fail("signalled"))
    monkeypatch.setattr(queuectl, "signal_processes", lambda *_: pytest.fail("signalled"))
    return reaper


@posix
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_a_worker_that_holds_its_lease_is_no_orphan(queue, monkeypatch, removed, own):
    """Also if its own file and its lease were removed, whosever worker it is."""
    add(queue)
    reaper = no_signals(monkeypatch, reaper_of(queue))
    with leased(queue, 1) as run:
        with heir(run) as pid:
            queue.db.execute("UPDATE runs SET worker = ?", (pid,))
            workers = [pid] * own
            if removed:
                os.remove(run["lease"])
            reaper.recover_lost(queue, workers)
        assert queue.job("job")["state"] == "processing"


@posix
def test_a_worker_in_a_container_has_another_number_and_is_no_orphan(queue, monkeypatch):
    add(queue)
    with leased(queue, 7):
        fd = queuectl.lock_file(queuectl.worker_file(queue.path, 1, 7))
        no_signals(monkeypatch, reaper_of(queue)).recover_lost(queue, [])
        os.close(fd)
    assert queue.job("job")["state"] == "processing"


def test_two_pools_of_one_number_are_refused_and_hold_up_nobody(queue):
    """As those of two containers may have it."""
    fd = queuectl.lock_file(queuectl.pool_file(queue.path, os.getpid()))
    with pytest.raises(queuectl.QueueError, match="another process of that number"):
        queuectl.Supervisor(queue.path, 1).run(pytest.fail)
    os.close(fd)


@posix
def test_a_process_with_the_number_of_a_worker_elsewhere_keeps_no_job():
    """The database was copied to this machine without its outputs."""
    enqueue(id="job")
    with queuectl.Queue("queuectl.db") as queue:
        queue.claim(os.getppid(), lambda run: None)
        reaper_of(queue).recover_lost(queue, [])
        assert queue.job("job")["state"] == "pending"


@posix
def test_a_pool_that_is_stopped_now_ends_an_orphan_first():
    enqueue("trap '' TERM; " + LASTING, id="x")
    pool = start_pool(count=1)
    wait_until(lasting)
    os.kill(workers_of(pool.pid)[0], signal.SIGKILL)
    wait_until(lambda: "worker died, ending" in read("queuectl.log"))
    ok("worker", "stop", "--now")
    assert pool.wait(10) == 0 and not lasting() and state("x") == "pending"


@posix
def test_a_pool_that_cannot_read_its_queue_can_be_stopped_now():
    enqueue("trap '' TERM; " + LASTING, id="x")
    pool = start_pool(count=1, script=TROUBLE + "queuectl.TERM_GRACE = 60")
    wait_until(lasting)
    os.kill(workers_of(pool.pid)[0], signal.SIGKILL)
    wait_until(lambda: "worker died, ending" in read("queuectl.log"))
    group = os.getpgid(lasting()[0])
    open("trouble", "w").close()
    try:
        ok("worker", "stop", "--now", "--no-wait")
        assert pool.wait(10) == 0
    finally:
        os.killpg(group, signal.SIGKILL)


def test_a_database_without_write_ahead_logging_works_too():
    enqueue()
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        assert db.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    names = [enqueue() for _ in range(20)]
    drain(4)
    assert set(names) < set(jobs("--state", "completed")) and len(jobs()) == 21
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


# The clock is put back by an hour while a command runs.
CLOCK_PUT_BACK = """
BACK = queuectl.os.path.abspath("back")
def clock():
    return queuectl.time.time() - 3600 * queuectl.os.path.exists(BACK)
def make(*args, queue=queuectl.Queue, **options):
    return queue(*args, clock=clock, **options)
queuectl.Queue = make
"""


@forked
def test_a_clock_put_back_touches_neither_timeouts_nor_run_times():
    enqueue("touch back; sleep 7", id="x", timeout=0.3, max_retries=1)
    start_pool(count=1, script=CLOCK_PUT_BACK)
    wait_until(lambda: state("x") == "dead")
    with queuectl.Queue("queuectl.db") as queue:
        job = queue.job("x")
    assert job["error"] == "timeout 0.3s"
    assert 0.3 <= job["finished_at"] - job["started_at"] < 7


@posix
def test_a_due_time_is_what_the_wall_clock_says_where_it_was_given():
    for zone in ("Asia/Tokyo", "UTC"):
        told = script("enqueue", "--run-at", "2030-01-01T00:00:00", "--json", "--", "true",
                      env=dict(os.environ, TZ=zone))
        hour = {"Asia/Tokyo": "2029-12-31T15", "UTC": "2030-01-01T00"}[zone]
        assert json.loads(told.stdout)[0]["run_at"] == hour + ":00:00Z"


@posix
def test_a_file_system_without_locks_is_said_when_a_pool_starts():
    enqueue()
    script = """if 1:
        import errno
        def flock(fd, how):
            raise OSError(errno.ENOTSUP, "Operation not supported")
        queuectl.fcntl.flock = flock"""
    pool = start_pool(script=script)
    assert pool.wait(10) == 1 and "no locks" in pool.stderr.read()


@posix
def test_the_locale_c_takes_and_runs_what_is_not_ascii():
    os.mkdir("é")
    env = dict(os.environ, LC_ALL="C")
    for words in (["enqueue", "--id", "ü", "--cwd", "é", "--env", "Ä=ß", "--", "echo ö; pwd"],
                  ["worker", "start", "--drain"]):
        told = script("--db", "é/q.db", *words, env=env)
        assert told.returncode == 0, told.stderr
    assert ok("logs", "ü", "--db", "é/q.db").out == "ö\n%s/é\n" % os.getcwd()
    assert ok("show", "ü", "--json", "--db", "é/q.db").json["env"] == {"Ä": "ß"}


@posix
def test_a_background_child_of_a_run_that_just_ended_is_let_be(queue, monkeypatch):
    """The supervisor lists a run, and it completes before it is looked at."""
    add(queue)
    reaper = no_signals(monkeypatch, reaper_of(queue))
    with leased(queue, 1) as run, heir(run) as pid:
        listed = queue.processing_runs()
        assert queuectl.processes_of({run["lease"]: None}) == {run["lease"]: {pid}}
        queue.complete(run, result(None))
        monkeypatch.setattr(queue, "processing_runs", lambda: listed)
        reaper.recover_lost(queue, [])
    assert queue.job("job")["state"] == "completed"


@posix
def test_what_is_forked_during_the_first_look_at_a_run_is_found_by_a_second(monkeypatch):
    ours = (os.getpid(), "lease")  # a worker holds the lease of its run
    looks = iter([[ours], [ours, (77, "lease")]])
    for name in "scan_proc", "scan_with_tools":
        monkeypatch.setattr(queuectl, name, lambda *_: next(looks))
    assert queuectl.processes_of({"lease": 1}) == {"lease": {77}}


@posix
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_scan_leaves_out_what_is_older_than_the_one_that_asks():
    began = int(queuectl.proc_stat("self")[19])
    assert os.getpid() in dict(queuectl.scan_proc(began, set()))
    assert os.getpid() not in dict(queuectl.scan_proc(began + 1, set()))


@posix
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_the_second_look_of_a_scan_is_for_what_came_since_the_first():
    seen = set()
    assert os.getpid() in dict(queuectl.scan_proc(0, seen))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert {child.pid} <= {*dict(queuectl.scan_proc(0, seen))}
    assert {os.getpid(), child.pid}.isdisjoint(dict(queuectl.scan_proc(0, seen)))
    child.communicate()


@posix
@pytest.mark.parametrize("what, script", [
    ("pid file", ""), ("output", ""), ("pid file", NO_PROC)])
def test_files_removed_under_a_running_job_do_not_end_it(what, script):
    pools = [start_pool(count=1, script=script), start_pool(count=1, script=script)]
    enqueue("sleep 0.3", id="x")
    wait_until(lambda: state("x") == "processing")
    if what == "output":
        for name in os.listdir("queuectl.runs"):
            os.remove(os.path.join("queuectl.runs", name))
    else:
        for pool in pools:
            os.remove("queuectl-%d.pid" % pool.pid)
    wait_until(lambda: state("x") != "processing")
    assert (state("x"), len(ok("show", "x", "--json").json["runs"])) == ("completed", 1)
    if what == "pid file":
        assert [pool.wait(10) for pool in pools] == [1, 1]
        assert all("was removed" in pool.stderr.read() for pool in pools)


@posix
def test_an_orphan_that_nobody_can_prove_is_left_until_it_ends(monkeypatch, queue):
    """As without /proc and lsof: a held lock keeps the job from running again."""
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/self/fd" and exists(path))
    monkeypatch.setenv("PATH", os.devnull)
    add(queue)
    with leased(queue, 2**30):
        reaper_of(queue).recover_lost(queue, [])
        assert queue.job("job")["state"] == "processing"
    reaper_of(queue).recover_lost(queue, [])
    assert queue.job("job")["state"] == "pending"


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid(), reason="becoming another needs root")
def test_another_users_run_is_left_alone(queue, monkeypatch):
    add(queue)
    with leased(queue, 1) as run:
        pass
    program = "import os, queuectl; os.setuid(65534); print(queuectl.is_locked(%r))"
    told = subprocess.run([sys.executable, "-c", program % run["lease"]], cwd="/",
                          stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=TOOLS))
    assert told.stdout == b"True\n" and not queuectl.is_locked(run["lease"])
    monkeypatch.setattr(queuectl, "is_locked", lambda path, missing=False: True)
    reaper_of(queue).recover_lost(queue, [])
    assert state("job") == "processing"


@posix
def test_a_pool_that_a_lost_run_started_is_let_be():
    with open("quick.py", "w") as file:  # the pool that it starts runs this again
        file.write("import queuectl\n%squeuectl.__file__ = __file__\nqueuectl.main()" % QUICK)
    line = queuectl.shell_line([sys.executable, "quick.py", "worker", "start", "--detach"])
    enqueue("[ -e out ] || %s; exec %s once" % (line, LASTING), id="x", env={"PYTHONPATH": TOOLS})
    pool = start_pool(count=1)
    wait_until(lambda: lasting() and len(ok("status", "--json").json["workers"]) == 2)
    kill_all(pool)
    wait_until(lambda: state("x") == "completed")
    assert not os.path.exists("overlaps") and not lasting()
    assert ok("worker", "stop").out.startswith("stopped pool ")


@posix
def test_a_stranger_with_the_recorded_pid_survives(queue):
    """The run's number was given to another process after everything had died."""
    with subprocess.Popen(["sleep", "66.25"], start_new_session=True) as stranger:
        add(queue)
        run = queue.claim(stranger.pid, lambda run: None)
        queue.record_pid(dict(run, pid=stranger.pid))
        reaper_of(queue).recover_lost(queue, [])
        assert queue.job("job")["state"] == "pending"
        assert stranger.poll() is None
        stranger.kill()


@forked
def test_a_worker_killed_in_the_midst_of_a_claim_leaves_nothing_in_the_way():
    enqueue(id="x")
    pool = start_pool(count=1, script=KILLED_IN_CLAIM)
    wait_until(lambda: state("x") == "completed")
    assert len(re.findall(r"worker \d+ died", read("queuectl.log"))) == 1
    ok("worker", "stop")
    assert pool.wait(10) == 0 and leftovers() == []


def test_workers_whose_supervisor_was_killed_finish_their_job_and_leave():
    pool = start_pool(count=1)
    enqueue("sleep 0.2", id="x")
    enqueue(id="next")
    wait_until(lambda: state("x") == "processing")
    worker = workers_of(pool.pid)[0]
    os.kill(pool.pid, KILL)
    pool.wait()
    assert workers_of(pool.pid) == [worker]
    # On Windows nothing can be removed just while somebody looks at it.
    wait_until(lambda: not any([workers_of(pool.pid) for _ in range(50)]))
    wait_until(lambda: leftovers() == [])  # the last one takes the pool's file along
    assert (state("x"), state("next")) == ("completed", "pending")
    assert drain() == 0 and leftovers() == []


@pytest.mark.parametrize("text", ["", "1", "999999999", "rubbish", "%d"])
def test_leftover_pid_files_hurt_nobody(text):
    with subprocess.Popen([sys.executable, os.path.join(TOOLS, "lasts.py")]) as stranger:
        for name in ("queuectl-%d.pid" % stranger.pid, "queuectl-1.pid"):
            with open(name, "w") as file:
                file.write(text.replace("%d", str(stranger.pid)))
        assert ok("status", "--json").json["workers"] == []
        assert ok("worker", "stop").out == "no pool is running\n"
        assert drain() == 0 and leftovers() == []
        assert stranger.poll() is None
        stranger.kill()


@posix
def test_a_removed_database_ends_the_pool():
    enqueue(id="x")
    pool = start_pool()
    wait_until(lambda: state("x") == "completed")
    os.remove("queuectl.db")
    assert pool.wait(10) == 1
    assert "was removed" in pool.stderr.read() and "stops: " in read("queuectl.log")
    assert jobs() == {}


@posix
@posix
@pytest.mark.parametrize("way", ["timeout", "orphan"])
def test_a_run_that_is_ended_can_clean_up_by_commands(way):
    line = "trap 'sleep 0.2 && echo cleaned > up; exit 1' TERM; touch on; " + LASTING
    enqueue(line + " & wait", id="x", **({"timeout": 0.2} if way == "timeout" else {}))
    pool = start_pool(count=1, script="queuectl.TERM_GRACE = 9")
    wait_until(lambda: os.path.exists("on"))
    if way == "orphan":
        os.kill(workers_of(pool.pid)[0], KILL)
    wait_until(lambda: os.path.exists("up") and read("up"))


def test_what_never_finished_has_no_age_and_stays(queue):
    add(queue, id="old", max_retries=1)
    queue.enqueue([queuectl.checked_job({"id": "new", "command": "x", "after": "old"},
                                        queue.defaults())])
    queue.fail(claim(queue), result())
    assert ok("delete", "--all", "--older-than", "1d").out == (
        "deleted 0 jobs; 1 left: other jobs wait for them\n")
    assert ok("delete", "--all").out == "deleted 2 jobs\n"


def test_a_job_behind_a_removed_one_died_when_that_was_removed(queue):
    add(queue, id="front")
    add(queue, id="behind", after=["front"])
    before = time.time() - 1
    queue.delete_all(queuectl.where(["pending"], "front"))
    job = queue.job("behind")
    assert job["state"] == "dead" and before < job["updated_at"] < time.time() + 1


def test_the_oldest_waiting_job_is_no_retried_one(queue, clock):
    add(queue, id="retried", max_retries=1)
    queue.fail(claim(queue), result())
    clock.now += 1
    add(queue, id="waits")
    clock.now += 1
    queue.retry(["retried"])
    assert tuple(queue.oldest_claimable()) == ("waits", clock.now - 1)
    assert claim(queue)["id"] == "retried"  # it keeps its place


def test_a_job_waited_until_its_run_not_until_the_next(queue, clock):
    add(queue)
    clock.now += 3
    run = claim(queue)
    queue.fail(run, result())
    assert queuectl.read_stats(queue, clock.now - 60)["waiting_time"]["longest"] is None
    clock.now += 9
    queue.complete(claim(queue), result(None))
    assert queuectl.read_stats(queue, clock.now - 60)["waiting_time"]["longest"] == 7


def test_a_run_takes_no_longer_because_it_ended_as_stopped_services_do():
    enqueue("kill -9 $$" if os.name == "posix" else "exit 137", id="x", max_retries=1)
    pool = start_pool(count=1, script="queuectl.BLAME_DELAY = 0.5")
    wait_until(lambda: state("x") == "dead")
    assert pool.poll() is None and ok("show", "x", "--json").json["seconds"] < 0.45


def test_a_job_that_stops_its_own_pool_is_told_that_it_is_stopping():
    enqueue(queuectl.shell_line([sys.executable, COMPILED, "worker", "stop"]), id="x")
    pool = start_pool(count=1)
    assert pool.wait(10) == 0
    assert "stopping pool %d\n" % pool.pid in ok("logs", "x").out


def test_deaths_while_nobody_wants_to_know_are_not_announced_later(queue):
    add(queue, max_retries=1)
    queue.fail(claim(queue), result())
    reaper_of(queue).announce_deaths(queue)
    queue.set("on_dead", "true")
    assert not queue.announce(pytest.fail)


def test_help_is_a_command_too():
    assert ok("help").out == ok("--help").out
    assert ok("help", "dlq").out == ok("dlq").out
    assert ok("help", "enqueue").out == ok("enqueue", "--help").out
    assert "unknown command foo" in refused("help", "foo", code=2)


def test_no_database_is_made_again_whenever_it_is_removed(queue, monkeypatch):
    def connect(*args, **options):
        os.remove("queuectl.db")
        return real(*args, **options)

    queue.before_fork()  # it is opened again at its next use
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        queue.counts()
    assert not os.path.exists("queuectl.db")


@pytest.mark.parametrize("name", ["a b", "a%41?b#c.db", "ä", "../x.db"])
def test_a_database_may_have_any_name(name):
    if os.name != "posix":
        name = name.replace("?", "")
    ok("enqueue", "--id", "a", "--db", name, "--", "true")
    assert os.path.getsize(name) and jobs("--db", name)


@posix  # elsewhere what is open can't be removed
def test_a_pool_that_nobody_hears_notices_a_removed_database_and_makes_no_new_one():
    pool = start_pool()
    pool.stderr.close()  # what it says breaks a pipe
    os.remove("queuectl.db")
    assert pool.wait(10) == 1
    assert not os.path.exists("queuectl.db")


@posix
def test_a_new_database_is_not_mixed_up_with_a_removed_one():
    enqueue(LASTING, id="x")
    pool = start_pool(count=1)
    wait_until(lasting)
    os.remove("queuectl.db")
    enqueue("echo new", id="x")
    assert drain() == 0
    assert lasting(), "the other pool has to be there for this to test anything"
    assert ok("logs", "x").out == "new\n"
    ok("worker", "stop", "--now")
    assert pool.wait(20) == 1
    assert leftovers() == [] and state("x") == "completed"


@posix
def test_a_new_database_does_not_take_over_the_index_of_a_removed_one(queue):
    add(queue, id="old")  # by a connection that stays, as a pool has one
    os.remove("queuectl.db")
    program = "import os; queuectl.wake_workers = lambda path: os.kill(os.getpid(), 9)"
    process = begin("enqueue", "--id", "new", "--", "true", program=program, fresh=True)
    assert process.wait() == -signal.SIGKILL  # after its commit, before it could tidy up
    queue.close()
    assert list(jobs()) == ["new"]


@posix
def test_two_first_queues_of_a_process_keep_its_locks(queue, monkeypatch):
    real = os.path.exists
    with monkeypatch.context() as patch:  # the other one is made just now
        patch.setattr(os.path, "exists", lambda path: path != queue.path and real(path))
        queuectl.Queue("queuectl.db").close()
    begin("list", fresh=True).wait()  # removes the log if nobody uses it
    add(queue)
    with contextlib.closing(begin("list", "--json", fresh=True).stdout) as listed:
        assert json.loads(listed.read())[0]["id"] == "job"


@pytest.mark.parametrize("failures, code", [(1, 0), (9, 1)])
def test_a_first_command_may_meet_another_one_that_drops_an_old_log(monkeypatch, failures, code):
    def connect(queue, real=queuectl.Queue._connect):
        real(queue)
        if errors:
            raise errors.pop()

    errors = [sqlite3.OperationalError("disk I/O error")] * failures
    monkeypatch.setattr(queuectl.Queue, "_connect", connect)
    answer = cli("enqueue", "--", "true")
    assert answer.code == code and ("disk I/O error" in answer.err) == bool(code)
    assert len(errors) == max(0, failures - 2)


def test_a_queue_has_a_write_ahead_log_also_if_its_making_was_cut_off():
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # writes the first page
    enqueue()
    assert sql("PRAGMA journal_mode") == [("wal",)] and sql("PRAGMA auto_vacuum") == [(2,)]


@pytest.fixture
def small_disk(home, monkeypatch):
    """A disk of 12 MiB, in which the test then is."""
    os.mkdir("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", "disk"]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk needs root")
    monkeypatch.chdir("disk")
    yield
    for pool in list(STARTED):
        kill_all(pool)
    os.chdir(str(home))
    subprocess.run(["umount", "-l", "disk"], check=True)


def fill_the_disk():
    with contextlib.suppress(OSError), open("fill", "wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()


@posix
def test_a_full_disk_refuses_a_batch_whole(small_disk):
    enqueue(id="x")
    line = b'{"command":"echo %s"}\n' % (b"x" * 4000)
    assert "disk is full" in refused("enqueue", "-", stdin=line * 4000)
    assert list(jobs()) == ["x"]


@posix
def test_a_pool_waits_until_a_full_disk_has_room_again(small_disk):
    ok("enqueue", "-", stdin=b'{"command":"sleep 0.05"}\n' * 16)
    pool = start_pool()
    wait_until(lambda: jobs("--state", "completed"))
    fill_the_disk()
    wait_until(lambda: "waiting until it is over" in read("queuectl.log") or
               "disk is full" in cli("enqueue", '{"command":"true"}').err)
    assert pool.poll() is None
    os.remove("fill")
    wait_until(lambda: len(jobs("--state", "completed")) >= 16)
    assert pool.poll() is None


@posix
def test_a_job_that_fills_the_disk_with_its_output_completes(small_disk):
    ok("config", "set", "output_limit", "4000000")  # twice that is more than there is
    with open("fill", "wb") as file:
        file.write(b"x" * 5 * 2**20)
    enqueue(python(TEN + "ten(0, 12000000)"), id="x")
    enqueue("echo next", id="next")
    full = []
    pool = start_pool(count=1)
    wait_until(lambda: full.append(os.statvfs(".").f_bavail == 0)
               or state("next") == "completed")
    assert any(full) and state("x") == "completed" and pool.poll() is None
    with queuectl.Queue("queuectl.db") as queue:
        dropped, output = queuectl.split_dropped(queue.output(queue.job("x")))
    assert output == ten(8000000, 12000000) and dropped == 8000000


@posix
def test_a_read_only_disk_is_said_in_one_line(small_disk):
    enqueue(id="x")
    subprocess.run(["mount", "-o", "remount,ro", os.getcwd()], check=True)
    for argv in (["enqueue", '{"command":"true"}'], ["worker", "start"], ["list"]):
        assert "queuectl" in refused(*argv)
    for argv in (["enqueue", '{"command":"true"}'], ["list"]):
        assert "Read-only file system" in refused(*argv, "--db", "new.db")


@contextlib.contextmanager
def locked():
    """Another program holds the database's write lock."""
    with contextlib.closing(sqlite3.connect("queuectl.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def test_a_command_waits_for_a_lock_but_not_for_ever(monkeypatch):
    enqueue(id="x")
    with locked():
        # Not a fork: SQLite would think there that it is who has the lock.
        waiting = begin("delete", "x", fresh=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.2)
    assert waiting.wait(20) == 0
    assert waiting.stdout.read() == "deleted x\n" and waiting.stderr.read() == ""
    monkeypatch.setattr(queuectl.Queue.__init__, "__defaults__", ("FULL", 0.1, time.time, True))
    with locked():
        assert "database is locked" in refused("enqueue", '{"command":"true"}')
        assert ok("list").out  # reading waits for nobody


def test_a_pool_outlives_a_long_lock():
    pool = start_pool(count=1)
    enqueue("sleep 0.1", id="x")
    wait_until(lambda: state("x") == "processing")
    with locked():
        wait_until(lambda: "database is locked" in read("queuectl.log"))
    wait_until(lambda: state("x") == "completed")
    assert pool.poll() is None


def test_a_stop_while_the_database_is_locked_keeps_the_result_in_hand():
    pool = start_pool(count=1, script="queuectl.IDLE_INTERVAL = 0.1")
    enqueue("sleep 0.1", id="x")
    wait_until(lambda: state("x") == "processing")
    with locked():
        ok("worker", "stop", "--no-wait")
        wait_until(lambda: re.search(r"worker\[.*waiting until", read("queuectl.log")))
        with pytest.raises(subprocess.TimeoutExpired):
            pool.wait(0.2)
    assert pool.wait(20) == 0
    assert state("x") == "completed"


def test_a_timeout_counts_while_the_database_is_locked():
    enqueue(LASTING, id="x", timeout=ENOUGH, max_retries=1)
    start_pool(count=1)
    wait_until(lasting)
    with locked():
        assert lasting(), "it has to last for this to test anything"
        wait_until(lambda: not lasting(), timeout=5)


def test_the_log_can_be_unwritable():
    os.mkdir("queuectl.log")
    enqueue(id="x")
    answer = drained()
    assert answer.code == 0
    assert "cannot write the log" in answer.err and "x 1/3 completed" in answer.err


@posix
def test_a_full_log_is_renamed_and_no_line_is_lost():
    # The workers write on while it is renamed once, some hundred lines.
    line = b'{"command":"sleep 0.01"}\n'
    names = [job["id"] for job in ok("enqueue", "-", "--json", stdin=line * 120).json]
    start_pool(count=3, script="queuectl.LOG_LIMIT = 8000")
    wait_until(lambda: len(jobs("--state", "completed")) == len(names))
    ok("worker", "stop")
    assert 8000 < os.path.getsize("queuectl.log.1")
    logs = read("queuectl.log"), read("queuectl.log.1")
    for name in names:
        assert sum(log.count(" %s 1/3 completed" % name) for log in logs) == 1


@posix
def test_files_are_private_and_jobs_see_the_users_umask():
    before = os.umask(0o002)
    try:
        enqueue("touch out; sleep 30", id="x")
        start_pool(count=1)
        wait_until(lambda: os.path.exists("out"))
    finally:
        os.umask(before)
    for folder, _, names in os.walk("."):
        for name in set(names) - {"out"}:
            assert os.stat(os.path.join(folder, name)).st_mode & 0o777 == 0o600, name
    assert os.stat("out").st_mode & 0o777 == 0o664


@posix
def test_a_job_inherits_no_descriptor_but_its_streams_and_its_lease():
    enqueue("for f in /proc/self/fd/*; do readlink $f; done; true", id="x")
    drain(1)
    files = {line for line in ok("logs", "x").out.split() if "queuectl" in line}
    assert len(files) == 1 and "queuectl.runs" in files.pop()


# ======================================================================================
# No blame, no loss: what the users of comparable tools have met
# ======================================================================================


def errors(name):
    """Return how the runs of a job ended, the first one first."""
    return [error for error, in sql("SELECT runs.error FROM runs JOIN jobs USING (seq)"
                                    " WHERE id = ? ORDER BY runs.run", name)]


def attempts(name):
    (count,), = sql("SELECT attempts FROM jobs WHERE id = ?", name)
    return count


def strike(number, *pids):
    """Signal the commands that last, with their shells, then these processes."""
    for pid in lasting():
        os.killpg(os.getpgid(pid), number)
    for pid in pids:
        os.kill(pid, number)


AS_BY_DEFAULT = "queuectl.BLAME_DELAY = 0.5"  # the pool is struck after its workers
TRAPPED = "trap 'kill $!; exit 143' TERM INT HUP; LASTING & wait"


@posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("command", ["LASTING", "exec LASTING", TRAPPED])
@pytest.mark.parametrize("first", ["command", "pool"])
def test_a_job_ended_with_its_whole_service_is_not_blamed(number, command, first):
    enqueue(command.replace("LASTING", LASTING), id="x", max_retries=1)
    pool, number = start_pool(count=1, script=AS_BY_DEFAULT), getattr(signal, number)
    wait_until(lasting)
    if first == "pool":
        pool.send_signal(number)
    strike(number, *workers_of(pool.pid), *[pool.pid] * (first == "command"))
    assert pool.wait(20) == 0
    assert (state("x"), attempts("x"), errors("x")) == ("pending", 0, ["stopped"])


@posix
def test_what_a_stopped_service_ended_runs_in_the_next_one():
    enqueue(LASTING + " once", id="x", max_retries=1)
    pool = start_pool(count=1, script=AS_BY_DEFAULT)
    wait_until(lasting)
    strike(signal.SIGTERM, *workers_of(pool.pid), pool.pid)
    assert pool.wait(20) == 0 and drain(1) == 0
    assert (state("x"), attempts("x"), errors("x")) == ("completed", 1, ["stopped", None])


@posix
@pytest.mark.parametrize("killed, stop, error", [
    (True, False, "signal 9"), (True, True, "stopped"), (False, True, "stopped")])
def test_what_a_killed_command_left_is_ended_before_its_next_run(killed, stop, error):
    go = "while ! test -e go; do sleep 0.02; done; exit 137"  # as if a child was killed
    enqueue("echo $$ > pid; %s & %s" % (LASTING, go), id="x", max_retries=1)
    pool = start_pool(count=1, script=AS_BY_DEFAULT)
    wait_until(lasting)
    if killed:
        os.kill(int(read("pid")), KILL)
    else:
        open("go", "w").close()
    if stop:
        pool.send_signal(signal.SIGTERM)
    wait_until(lambda: state("x") != "processing")
    assert errors("x") == [error] and not lasting()


@posix
@pytest.mark.parametrize("command, error", [
    ("kill -TERM $$", "signal 15"), ("kill -KILL $$", "signal 9"), ("exit 143", "exit 143")])
def test_a_job_that_ends_itself_by_a_signal_while_its_pool_goes_on_has_failed(command, error):
    enqueue(command, id="x", max_retries=1)
    pool = start_pool(count=1)
    wait_until(lambda: state("x") == "dead")
    assert errors("x") == [error] and attempts("x") == 1 and pool.poll() is None


@posix
def test_a_signal_to_one_worker_and_its_command_alone_is_a_failure_of_the_job():
    enqueue(LASTING, id="x", max_retries=1)
    pool = start_pool(count=1)
    wait_until(lasting)
    before = workers_of(pool.pid)
    strike(signal.SIGTERM, *before)
    wait_until(lambda: state("x") == "dead")
    assert errors("x") == ["signal 15"]
    wait_until(lambda: workers_of(pool.pid) not in ([], before))
    assert pool.poll() is None


# The system refuses to start the first commands of each worker.
REFUSED = """
def refuse(*args, spawn=queuectl.os.posix_spawn, left=list(range(%d)), **options):
    if left and left.pop() is not None:
        raise OSError(queuectl.errno.%s, "refused")
    return spawn(*args, **options)
queuectl.os.posix_spawn = refuse
"""


@forked
@pytest.mark.parametrize("name", ["EAGAIN", "ENOMEM", "EMFILE", "ENFILE"])
def test_a_system_that_has_no_process_to_give_costs_a_job_no_attempt(name):
    enqueue("echo out", id="x", max_retries=1)
    enqueue(id="next", max_retries=1)
    start_pool(count=1, script=REFUSED % (3, name) + "queuectl.IDLE_INTERVAL = 0.1")
    wait_until(lambda: state("next") == "completed")
    assert (state("x"), attempts("x"), ok("logs", "x").out) == ("completed", 1, "out\n")
    assert errors("x") == [None] and errors("next") == [None]
    assert len(re.findall(".*refused.*", read("queuectl.log"))) == 1


@forked
def test_a_pool_that_gets_no_process_can_be_stopped():
    enqueue(id="x", max_retries=1)
    pool = start_pool(count=1, script=REFUSED % (999, "EAGAIN"))
    wait_until(lambda: "refused" in read("queuectl.log"))
    assert ok("worker", "stop").code == 0 and pool.wait(10) == 0
    assert (state("x"), attempts("x")) == ("pending", 0)


@forked
@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "E2BIG"])
def test_a_command_that_cannot_be_started_is_a_failure_of_its_job(name):
    enqueue(id="x", max_retries=1)
    start_pool(count=1, script=REFUSED % (1, name))
    wait_until(lambda: state("x") == "dead")
    assert errors("x")[0].startswith("cannot start: ") and attempts("x") == 1


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may enter any")
def test_a_folder_that_may_not_be_entered_is_a_failure(home):
    os.mkdir("shut")
    enqueue(id="x", cwd="shut", max_retries=1)
    os.chmod("shut", 0)
    assert drain(1) == 1 and "cannot start" in errors("x")[0]
    os.chmod("shut", 0o700)


@posix
def test_six_power_cuts_blame_no_job():
    enqueue(LASTING, id="x", max_retries=1)
    for n in range(7):
        pool = start_pool(count=1)
        wait_until(lambda: len(errors("x")) == n + 1 and lasting())
        if n < 6:
            kill_all(pool)
            strike(KILL)
    assert (state("x"), attempts("x")) == ("processing", 1)
    assert errors("x") == 6 * ["worker died"] + [None]
    ok("worker", "stop", "--now")
    assert (state("x"), attempts("x")) == ("pending", 0)


def test_a_job_whose_worker_dies_five_times_alone_is_dead():
    enqueue(LASTING, id="x", max_retries=1)
    pool = start_pool(count=1)
    for n in range(5):
        assert state("x") != "dead"
        wait_until(lambda: len(errors("x")) == n + 1 and lasting())
        os.kill(workers_of(pool.pid)[0], KILL)
    wait_until(lambda: state("x") == "dead")
    assert ok("show", "x", "--json").json["error"] == "worker died 5 times"
    assert errors("x") == 5 * ["worker died"] and pool.poll() is None and not lasting()


@posix
def test_a_worker_that_dies_with_its_whole_pool_is_not_counted():
    enqueue(LASTING, id="x", max_retries=1)
    for n in range(6):
        # Its supervisor is killed while it waits whether it is.
        pool = start_pool(count=1, script="queuectl.BLAME_DELAY = 60")
        wait_until(lambda: len(errors("x")) == n + 1 and lasting())
        worker = workers_of(pool.pid)[0]
        os.kill(worker, signal.SIGSTOP)
        strike(KILL, worker)
        wait_until(lambda: workers_of(pool.pid) not in ([], [worker]))
        kill_all(pool)
    start_pool(count=1)
    wait_until(lambda: len(errors("x")) == 7)
    assert (state("x"), attempts("x")) == ("processing", 1)


def test_deaths_are_forgotten_when_a_job_is_retried(queue):
    add(queue)
    for _ in range(queuectl.MAX_DEATHS):
        queue.release(claim(queue), result("worker died"), is_blamed=True)
    assert queue.job("job")["error"] == "worker died 5 times"
    queue.retry(["job"])
    assert queue.release(claim(queue), result("worker died"), is_blamed=True) == "pending"


def test_interrupted_runs_are_neither_completed_nor_failed(queue, dashboard):
    for error in (None, "stop --now", "worker died", "stopped", "cancelled"):
        add(queue, id=str(error))
        run = claim(queue)
        if error == "cancelled":
            queue.cancel([error])
        (queue.release if error else queue.complete)(run, result(error))
        if queue.job(str(error))["state"] == "pending":
            queue.cancel([str(error)])
    told = queuectl.read_stats(queue, 0)
    assert [told[name] for name in ("runs", "completed", "failed", "interrupted")] == [5, 1, 0, 4]
    assert told["success_rate"] == 1 and told["common_errors"] == []
    add(queue, id="bad", max_retries=1)
    queue.fail(claim(queue), result("exit 1"))
    assert queuectl.read_stats(queue, 0)["success_rate"] == 0.5
    lines = dashboard.ask("/metrics").text.splitlines()
    for outcome, count in (("completed", 1), ("failed", 1), ("interrupted", 4)):
        assert 'queuectl_runs_total{outcome="%s"} %d' % (outcome, count) in lines


def test_stats_say_that_what_was_stopped_did_not_fail():
    enqueue(id="good")
    assert drain(1) == 0
    enqueue(LASTING, id="x")
    for how in ("stop", "stop", "cancel"):
        pool = start_pool(count=1)
        wait_until(lasting)
        if how == "cancel":
            ok("cancel", "x")
            wait_until(lambda: state("x") == "dead")
        ok("worker", "stop", "--now")
        assert pool.wait(20) == 0
    told = ok("stats").out
    assert "4 runs in 1h: 1 completed, 0 failed (0 retries); 3 interrupted" in told
    assert "100.0 % succeed" in told
    assert errors("x") == ["stop --now", "stop --now", "cancelled"]


def test_a_failed_job_is_due_at_once_when_the_clock_was_set_back(queue, clock):
    add(queue, id="later", delay=600)
    add(queue, id="job")
    queue.fail(claim(queue), result())
    queue.promote_after_clock_step()
    assert queue.job("job")["state"] == "failed"
    clock.now -= 7200
    queue.promote_after_clock_step()
    run = claim(queue)
    assert (run["id"], run["attempt"]) == ("job", 2)
    assert claim(queue) is None and queue.next_due()["run_at"] == clock.now + 7200 + 600
    assert queue.fail(run, result()) == "failed"
    assert queue.next_due()["run_at"] == clock.now + 4
    queue.promote_after_clock_step()
    assert queue.job("job")["state"] == "failed"


@forked
def test_a_pool_retries_at_once_what_failed_before_the_clock_was_set_back():
    ok("config", "set", "backoff_base", "3000")
    enqueue("exit 1", id="x", max_retries=2)
    start_pool(count=1, script=CLOCK_PUT_BACK.replace("3600", "7200"))
    wait_until(lambda: state("x") == "failed")
    open("back", "w").close()
    wait_until(lambda: state("x") == "dead")
    assert errors("x") == ["exit 1", "exit 1"]


# Each verb of a Queue, and what reads it.
VERBS = {
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


def verbs_refused(queue):
    """Tell whether each verb, and no more than that, is refused."""
    for verb in VERBS.values():
        with pytest.raises(queuectl.QueueError, match="open one here"):
            verb(queue)
    return True


def in_a_child(action):
    """Do something in a forked child; return its pid, its exit code is 0 if it is true."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = 0 if action() else 1
    finally:
        os._exit(code)


@posix
def test_a_queue_is_of_no_use_in_a_forked_child(queue):
    add(queue)
    assert os.waitpid(in_a_child(lambda: verbs_refused(queue)), 0)[1] == 0
    assert os.waitpid(in_a_child(lambda: queue.close() is None), 0)[1] == 0
    assert queue.add("true") and len(jobs()) == 2


def test_a_queue_is_of_no_use_in_another_thread(queue):
    add(queue)
    said = []
    for action in (lambda: said.append(verbs_refused(queue)), lambda: next(pages)):
        pages = queue.jobs()
        thread = threading.Thread(target=lambda: said.append(refusal_of(action)))
        thread.start()
        thread.join(20)
    assert said == [True, None, queuectl.QueueError]
    assert queue.add("true")


def refusal_of(action):
    """Return the kind of what an action raises, None without."""
    try:
        action()
    except BaseException as error:
        return type(error)


def test_closing_a_queue_in_another_thread_is_nothing_of_sqlites(queue):
    kinds = []
    thread = threading.Thread(target=lambda: kinds.append(refusal_of(queue.close)))
    thread.start()
    thread.join(20)
    assert kinds[0] in (None, queuectl.QueueError)


def test_a_closed_queue_says_so_and_can_be_closed_again():
    queue = queuectl.Queue("queuectl.db")
    add(queue)
    pages = queue.jobs()
    queue.close()
    queue.close()
    assert verbs_refused(queue)
    with pytest.raises(queuectl.QueueError, match="was closed"):
        next(pages)
    with queue, pytest.raises(queuectl.QueueError, match="was closed"):
        queue.job("job")


@posix
@pytest.mark.parametrize("closed", ["before", "meanwhile", "afterwards"])
def test_what_parent_and_child_acknowledged_is_there_whoever_closes_first(closed):
    parent = queuectl.Queue("queuectl.db")
    names = [parent.add("true") for _ in range(5)]

    def child():
        wait_until(lambda: closed != "before" or os.path.exists("closed"))
        with queuectl.Queue("queuectl.db") as own:
            own.add("true", id="child")
            open("opened", "w").close()
            wait_until(lambda: closed == "afterwards" or os.path.exists("closed"))
            return [own.add("true", id="child%d" % n) for n in range(40)]

    pid = in_a_child(child)
    wait_until(lambda: closed == "before" or os.path.exists("opened"))
    names += [parent.add("true") for _ in range(40)]
    if closed != "afterwards":
        parent.close()
        open("closed", "w").close()
    assert os.waitpid(pid, 0)[1] == 0
    parent.close()
    assert set(jobs()) == {*names, "child", *("child%d" % n for n in range(40))}


@posix
def test_a_child_that_only_ends_takes_nothing_from_what_was_killed_meanwhile():
    """SQLite removes the log of others when it closes what the child inherited."""
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
    env = dict(os.environ, PYTHONPATH=TOOLS)
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=30)
    assert len(jobs()) == 41


@posix
def test_a_child_that_ends_long_after_its_parent_takes_nothing_back():
    """Its end frees the connection that it inherited, with an old log."""
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
    env = dict(os.environ, PYTHONPATH=TOOLS)
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=30)
    assert len(jobs()) == 60
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("verb", ["cancel", "retry", "delete", "wait"])
def test_a_text_is_no_list_of_ids(queue, verb):
    for name in ("text", *"text"[:3]):
        add(queue, id=name)
    with pytest.raises(queuectl.QueueError, match="list"):
        getattr(queue, verb)("text", *[0] * (verb == "wait"))  # which would not end
    assert {job["state"] for job in jobs().values()} == {"pending"} and len(jobs()) == 4


@posix
@pytest.mark.parametrize("how", ["cp -a", "backup"])
def test_a_pool_on_a_copy_leaves_an_orphan_of_the_original_alone(how, home, monkeypatch):
    os.mkdir("a")
    monkeypatch.setenv("QUEUECTL_DB", str(home / "a" / "queuectl.db"))
    enqueue(LASTING, id="x", cwd="/")
    pool = start_pool(count=1)
    wait_until(lasting)
    original, worker = lasting(), workers_of(pool.pid)[0]
    os.kill(pool.pid, signal.SIGSTOP)
    os.kill(worker, KILL)  # nobody but a pool on the copy is there to look for it
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
    wait_until(lambda: len(lasting()) == 2)  # it runs the job, too
    assert set(original) < set(lasting()) and "died, ending" not in read(copy[:-3] + ".log")
    ok("worker", "stop", "--now")
    assert lasting() == original
    monkeypatch.setenv("QUEUECTL_DB", str(home / "a" / "queuectl.db"))
    os.kill(pool.pid, signal.SIGCONT)
    wait_until(lambda: lasting() and lasting() != original)  # its own supervisor ends it
    ok("worker", "stop", "--now")


@posix
def test_a_queue_with_two_names_is_refused_by_commands_and_by_a_starting_pool():
    enqueue(id="x")
    os.link("queuectl.db", "other.db")
    for db in ("queuectl.db", "other.db"):
        for argv in (["enqueue", "--", "true"], ["list"], ["status"], ["worker", "start"],
                     ["delete", "x"], ["wait"], ["config", "show"]):
            assert "hard link" in refused(*argv, "--db", db)
    os.remove("other.db")
    assert list(jobs()) == ["x"] and leftovers() == []


@posix
def test_a_copy_of_links_does_not_stop_a_running_pool():
    enqueue("sleep 0.2", id="x")
    enqueue(id="next")
    pool = start_pool(count=1)
    os.mkdir("snapshot")
    os.link("queuectl.db", "snapshot/queuectl.db")
    os.kill(workers_of(pool.pid)[0], KILL)  # a new worker opens the queue anew
    with contextlib.closing(sqlite3.connect("queuectl.db")) as db:
        done = "SELECT count(*) FROM jobs WHERE state = 'completed'"
        deadline = time.monotonic() + 20
        while db.execute(done).fetchone() != (2,):
            assert time.monotonic() < deadline and pool.poll() is None
    assert "hard link" not in read("queuectl.log")
    os.remove("snapshot/queuectl.db")
    assert ok("worker", "stop").code == 0 and pool.wait(10) == 0


# While a file `broken` is there, or once, no job can be claimed or recorded.
BROKEN = """
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


@forked
@pytest.mark.parametrize("verb", ["claim", "complete"])
def test_an_integrity_error_sends_a_worker_away_and_a_job_goes_on(verb):
    pool = start_pool(count=1, script=BROKEN % (verb, 1, verb))
    worker = workers_of(pool.pid)
    open("broken", "w").close()
    enqueue(id="x", max_retries=1)
    wait_until(lambda: state("x") == "completed")
    assert workers_of(pool.pid) != worker and pool.poll() is None and attempts("x") == 1
    assert "UNIQUE constraint failed" in read("queuectl.log")
    assert "waiting until it is over" not in read("queuectl.log")


@forked
@pytest.mark.parametrize("verb", ["claim", "complete"])
def test_an_integrity_error_that_lasts_is_no_loop(verb):
    pool = start_pool(count=1, script=BROKEN % (verb, 0, verb))
    open("broken", "w").close()
    enqueue(id="x", max_retries=1)
    lines = lambda: len(re.findall(r"worker \d+ died", read("queuectl.log")))
    wait_until(lines)
    begun = time.monotonic()
    wait_until(lambda: lines() >= 4)
    assert time.monotonic() - begun >= 3 * 0.1 - 0.05 and pool.poll() is None
    log = read("queuectl.log")
    assert "waiting until" not in log and log.count("UNIQUE constraint") <= 2 * lines() + 2
    os.remove("broken")
    wait_until(lambda: state("x") == "completed")
    assert attempts("x") == 1


def other_over_it():
    """Move another database over the queue's."""
    ok("--db", "new/queuectl.db", "enqueue", "--id", "new", "--", "true")
    os.replace("new/queuectl.db", "queuectl.db")


@posix
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_another_database_over_that_of_an_idle_pool_ends_it(how):
    os.mkdir("new")
    enqueue(id="x")
    pool = start_pool()
    wait_until(lambda: state("x") == "completed")
    other_over_it()
    assert pool.wait(10) == 1 and pool.stderr.read().count("\n") == 1
    assert not [name for name in os.listdir(".") if name.endswith((".pid", ".runs"))]


# What is wrong with the old file when a result is to be recorded in it.
OLD_FILE = """
def gives(queue, *args, verb=queuectl.Queue._finish):
    if not queuectl.is_same_file(queue.path, queue.file):
        %s
    return verb(queue, *args)
queuectl.Queue._finish = gives
"""


@forked
@pytest.mark.parametrize("trouble", [
    "pass", "raise queuectl.sqlite3.OperationalError('disk I/O error')",
    "raise queuectl.sqlite3.DatabaseError('database disk image is malformed')",
    "raise queuectl.sqlite3.OperationalError('database is locked')",
    "raise OSError(28, 'No space left on device')"])
def test_another_database_ends_a_pool_whatever_result_is_in_hand(trouble):
    os.mkdir("new")
    enqueue("until [ -e go ]; do sleep 0.02; done; exit 1", id="x")
    pool = start_pool(count=1, script=OLD_FILE % trouble)
    wait_until(lambda: state("x") == "processing")
    other_over_it()
    wait_until(lambda: "asked to stop" in read("queuectl.log"))
    open("go", "w").close()
    assert pool.wait(10) == 1


@posix
def test_keep_removes_completed_jobs_alone_and_says_how_many():
    ok("enqueue", "-", stdin=b'{"command":"true"}\n' * 30)
    enqueue("exit 1", id="bad", max_retries=1)
    enqueue(id="waits", delay=3600)
    assert drain() == 1
    ok("cancel", enqueue(id="no"))
    ok("config", "set", "keep", "0")
    start_pool(count=1)
    wait_until(lambda: set(jobs()) == {"bad", "waits", "no"})
    said = lambda: re.findall(r"keep: removed (\d+) jobs?\n", read("queuectl.log"))
    wait_until(said)
    enqueue(id="one")
    wait_until(lambda: sum(map(int, said())) == 31)
    assert len(said()) == 2 and set(jobs()) == {"bad", "waits", "no"}


def test_dead_jobs_are_removed_by_that_name_alone(queue, clock):
    for name in ("done", "dead", "cancelled", "young"):
        clock.now += DAY * (name == "young")
        add(queue, id=name, max_retries=1)
        verb = {"dead": queue.fail, "cancelled": queue.fail}.get(name, queue.complete)
        queue.cancel([name]) if name == "cancelled" else verb(claim(queue), result(None))
    assert queue.prune(0.5 * DAY, 1)[0] == 1 and "done" not in jobs()
    add(queue, id="done")
    queue.complete(claim(queue), result(None))
    clock.now += DAY
    age = "%ds" % (time.time() - clock.now + 1.5 * DAY)
    assert ok("delete", "--older-than", age, "--dry-run", "--json").json == []
    assert ok("delete", "--older-than", "1d").out == "deleted 2 jobs\n"
    assert set(jobs()) == {"dead", "cancelled"}
    assert ok("delete", "--state", "dead", "--older-than", age).out == "deleted 2 jobs\n"
    assert jobs() == {}


@pytest.mark.parametrize("words", [["dlq", "clear"], ["delete", "--state", "dead"]])
def test_dead_jobs_go_with_dlq_clear_or_their_state(queue, words):
    add(queue, id="dead", max_retries=1)
    queue.fail(claim(queue), result())
    add(queue, id="done")
    queue.complete(claim(queue), result(None))
    assert ok(*words).out == "deleted 1 job\n" and list(jobs()) == ["done"]


def test_unique_revives_a_finished_job_and_keeps_its_runs_and_their_output():
    for code in (1, 0):
        enqueue("echo night&& exit %d" % code, id="x%d" % code, max_retries=1)
    enqueue(id="last")
    drain(1)
    before = jobs()
    for name in ("x1", "x0"):
        ok("enqueue", "--unique", "--id", name, "--priority", "3", "--max-retries", "2",
           "--timeout", "9", "--env", "A=1", "--", "echo again")
        job = ok("show", name, "--json").json
        assert job["created_at"] == before[name]["created_at"] and len(job["runs"]) == 1
        assert (job["state"], job["attempts"], job["command"], job["priority"], job["env"],
                job["max_retries"], job["timeout"], job["error"]) == (
            "pending", 0, "echo again", 3, {"A": "1"}, 2, 9, None)
        assert ok("logs", name).out == "night\n"
    assert list(jobs()) == ["x1", "x0", "last"]
    assert drain(1) == 0
    assert errors("x1") == ["exit 1", None] and attempts("x1") == 1
    assert ok("logs", "x1").out == "again\n"
    with queuectl.Queue("queuectl.db") as queue:
        assert queue.output(queue.job("x1"), 1).split() == [b"night"]
    assert ok("stats", "--json").json["runs"] == 5


def test_unique_revives_with_a_delay_and_counts_right(queue, clock):
    add(queue, max_retries=1)
    queue.fail(claim(queue), result())
    ok("enqueue", "--unique", "--id", "job", "--delay", "1h", "--", "true")
    assert queue.counts()["pending"] == 1 and queue.counts()["dead"] == 0
    assert not ok("enqueue", "--unique", "--id", "job", "--", "true").out.startswith("enq")
    assert queue.next_due()["run_at"] > time.time() + 3000 and claim(queue) is None


def test_unique_says_when_a_waiting_job_has_another_command(queue):
    unique = ["enqueue", "--unique", "--id", "x", "--"]
    assert ok(*unique, "old").out == "enqueued x\n"
    assert ok(*unique, "old").out == "x is there already, pending\n"
    assert ok(*unique, "new").out == "x is there already, pending, unchanged\n"
    run = claim(queue)
    assert ok(*unique, "new").out == "x is there already, processing, unchanged\n"
    assert ok(*unique, "old").out == "x is there already, processing\n"
    queue.fail(run, result())
    assert ok(*unique, "new").out == "x is there already, failed, unchanged\n"
    assert queue.job("x")["command"] == "old"
    assert ok(*unique, "new", "--json").code == 0


def test_retry_all_leaves_what_was_cancelled_and_counts_it():
    for name in ("a", "b"):
        enqueue("exit 1", id=name, max_retries=1)
    drain()
    for name in ("c", "d"):
        enqueue(id=name)
        ok("cancel", name)
    told = ok("dlq", "retry", "--all").out
    assert told.startswith("retried 2 jobs; 2 left: cancelled")
    assert [job["state"] for job in jobs().values()] == ["pending"] * 2 + ["dead"] * 2
    assert ok("dlq", "retry", "c").out == "retried c\n"
    assert (state("c"), state("d")) == ("pending", "dead")
    assert ok("dlq", "retry", "--all", "--json").json == {"retried": 0, "left": 1}


@pytest.mark.parametrize("words, told", [
    (["dlq", "retry", "--all"], "retried 0 jobs\n"), (["dlq", "clear"], "deleted 0 jobs\n"),
    (["delete", "--all"], "deleted 0 jobs\n"),
    (["delete", "--older-than", "7d"], "deleted 0 jobs\n"),
    *((["delete", "--state", name], "deleted 0 jobs\n")
      for name in queuectl.STATES if name != "processing")])
def test_a_form_for_many_that_meets_none_is_done(words, told):
    ok("status")
    assert ok(*words).out == told
    enqueue(id="x", delay=99)
    if "pending" not in words and "--all" not in words[:2]:
        assert ok(*words).out == told and list(jobs()) == ["x"]


@posix
@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_command_that_the_system_can_never_start_is_refused_at_the_door(letter):
    line = ": '" + letter * ((131071 - 5) // len(letter.encode())) + "';"
    line += " " * (131071 - len(line.encode()))
    assert "131071" in refused(
        "enqueue", "-", stdin=json.dumps({"command": line + " "}).encode(), code=2)
    assert "131071" in refused("config", "set", "on_dead", line + " ", code=2)
    name = enqueue(line, max_retries=1)
    assert len(jobs()) == 1 and drain(1) == 0 and state(name) == "completed"


@posix
def test_a_variable_that_the_system_can_never_hand_over_is_refused_at_the_door():
    assert "env" in refused("enqueue", "-", code=2, stdin=json.dumps(
        {"command": "true", "env": {"A": "x" * 131070}}).encode())
    name = enqueue(env={"A": "x" * 131069}, max_retries=1)
    assert drain(1) == 0 and state(name) == "completed"


@posix
def test_on_dead_is_told_of_each_death_whatever_is_killed_in_between():
    ok("config", "set", "on_dead", "cat >> told")
    open("told", "w").close()
    lines = ['{"id":"d%d","command":"exit 1","max_retries":1}' % n for n in range(60)]
    ok("enqueue", "-", stdin="\n".join(lines).encode())
    dead = lambda: ok("status", "--json").json["jobs"]["dead"]
    for n in range(4):
        pool = start_pool()
        wait_until(lambda: dead() >= 12 * (n + 1))
        kill_all(pool)
    start_pool()
    told = lambda: re.findall(r'\{"id": "(d\d+)"', read("told"))
    wait_until(lambda: len(set(told())) == 60)
    assert dead() == 60
    assert set(re.findall(r'"state": "(\w+)"', read("told"))) == {"dead"}


# The supervisor is killed as soon as a hook was started, and before that is noted.
KILLED_IN_TELL = """
import subprocess
def popen(*args, popen=subprocess.Popen, **options):
    hook = popen(*args, **options)
    if queuectl.os.path.exists("kill"):
        queuectl.os.remove("kill")
        queuectl.os.kill(queuectl.os.getpid(), queuectl.KILL)
    return hook
subprocess.Popen = popen
"""


@forked
def test_a_supervisor_killed_while_it_tells_has_it_told_again_and_never_less():
    ok("config", "set", "on_dead", "cat >> told; echo >> told")
    open("kill", "w").close()
    pool = start_pool(count=1, script=KILLED_IN_TELL)
    enqueue("exit 1", id="x", max_retries=1)
    assert pool.wait(20) == -KILL
    start_pool(count=1)
    wait_until(lambda: os.path.exists("told") and read("told").count('"id": "x"') == 2)


def test_on_dead_is_told_once_of_a_death_and_not_of_one_that_was_retried(queue):
    queue.set("on_dead", "true")
    told = []
    start = lambda job: told.append(job["id"])
    for name in ("a", "b", "c", "d"):
        add(queue, id=name, max_retries=1)
        queue.cancel(["c"]) if name == "c" else queue.fail(claim(queue), result())
    queue.retry(["a"])
    ok("enqueue", "--unique", "--id", "d", "--", "true")
    while queue.announce(start):
        pass
    assert told == ["b"]
    queue.fail(claim(queue), result())
    while queue.announce(start):
        pass
    assert told == ["b", "a"]


def test_a_death_that_was_not_told_yet_is_no_hindrance_to_the_next(queue):
    queue.set("on_dead", "true")
    told = []
    add(queue, max_retries=1)
    for _ in range(2):
        queue.fail(claim(queue), result())
        queue.retry(["job"])
    assert queue.fail(claim(queue), result()) == "dead"
    while queue.announce(lambda job: told.append(job["id"])):
        pass
    assert told == ["job"]


def test_on_dead_is_not_told_of_a_running_job_that_was_cancelled(queue):
    queue.set("on_dead", "true")
    add(queue)
    run = claim(queue)
    queue.cancel(["job"])
    assert queue.release(run, result("cancelled")) == "dead" and not queue.announce(pytest.fail)


@forked
def test_a_drain_tells_of_its_dead_job_also_when_on_dead_cannot_be_started():
    ok("config", "set", "on_dead", "true")
    enqueue("exit 1", max_retries=1)
    pool = start_pool("--drain", count=1, script="""
import subprocess
def popen(*args, **options):
    raise OSError(queuectl.errno.EAGAIN, "no process")
subprocess.Popen = popen
""")
    assert pool.wait(20) == 1


# ======================================================================================
# Chaos: everything is killed at random; then the reckoning
#
# A long one: CHAOS_SECONDS=60 CHAOS_SEEDS="11 12 13" python -m pytest -s -k chaos
# ======================================================================================

OWN_LOCK = "exec 8>>locks/$QUEUECTL_JOB_ID; flock -n 8 ||" \
    " { echo $QUEUECTL_RUN $(date +%T.%N) >> overlaps; exit 1; }; "
ONCE = "[ -e marks/$QUEUECTL_JOB_ID ] || { : > marks/$QUEUECTL_JOB_ID; "
KINDS = [
    "true", "sleep TIME", "sleep TIME & wait", "exec >/dev/null 2>&1; sleep TIME",
    "trap '' TERM; sleep TIME", ONCE + "exit 1; }",
    ONCE + "grep -qa queuectl /proc/$PPID/cmdline && kill -9 $PPID; }; sleep TIME"]
STRIKES = 10 * ["feed"] + 5 * ["start", "kill worker"] + 3 * ["freeze"] \
    + 2 * ["kill pool", "kill supervisor", "stop service"] + ["stop"]
FAR = 36000  # seconds; jobs delayed so long stay pending
MINE = {"queuectl.db", "queuectl.log", "queuectl.log.1", "locks", "marks", "overlaps"}
READY = "SELECT count(*) FROM jobs WHERE state = 'pending' AND claimable"
SOON = "SELECT count(*) FROM jobs WHERE state = 'pending' AND run_at BETWEEN ? AND ?"


class Chaos:
    """Kill everything of a queue at random, then look whether a job was lost.

    The seed fixes the choices; when they hit, and so what follows, is up to the machine.
    """

    def __init__(self, seed):
        self.rnd, self.tally, self.null = random.Random(seed), Counter(), subprocess.DEVNULL
        self.errors = tempfile.TemporaryFile("w+")
        self.wrong, self.pools, self.stops, self.batches, self.later = [], [], [], [], []

    def rage(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for blow in [blow for blow in self.later if blow[0] < time.monotonic()]:
                self.later.remove(blow)
                self.hit(*blow[1:])
            self.strike(self.rnd.choice(STRIKES))
            time.sleep(self.rnd.uniform(0, 0.25))

    def close(self):
        self.hit(signal.SIGKILL, "at the very end", *ours())
        self.errors.close()
        for batch in self.batches:
            batch.out.close()
        for process in self.pools + self.stops + [batch.process for batch in self.batches]:
            process.wait(10)

    def begin(self, *words, **options):
        command = [sys.executable, "-c", PROGRAM % QUICK, *words]
        options = dict({"stdout": self.null, "stderr": self.errors}, **options)
        return subprocess.Popen(command, start_new_session=True,
                                env=dict(os.environ, PYTHONPATH=TOOLS), **options)

    def ask(self, *words):
        """Run a command of queuectl to its end; return what its JSON says."""
        process = self.begin(*words, "--json", stdout=subprocess.PIPE)
        out = process.communicate(timeout=90)[0]
        told = os.pread(self.errors.fileno(), 2**20, 0).decode().splitlines()[-3:]
        assert process.returncode == 0, (words, process.returncode, told)
        return json.loads(out)

    def workers(self, pool=None):
        every = queuectl.living_pools(database())
        return [pid for one, pids in every.items() if pool in (None, one) for pid in pids]

    def hit(self, number, what, *pids):
        for pid in set(pids) & set(ours()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self.tally[what] += 1

    def until(self, condition, timeout, what):
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return self.wrong.append("after %d s still: %s" % (timeout, what))
            time.sleep(0.01)

    def strike(self, what):
        pids = self.rnd.sample(self.workers() or [0], 1)
        alive = [pool.pid for pool in self.pools if pool.poll() is None]
        pool = self.rnd.choice(alive or [0])
        if what == "feed" and self.few_are_ready():
            self.feed(self.rnd.random() < 0.3)
        elif what == "start" and len(alive) < 3:
            count = str(self.rnd.randint(1, 4))
            self.pools.append(self.begin("worker", "start", "--count", count))
        elif what == "kill worker":
            self.hit(signal.SIGKILL, "workers killed", *pids)
        elif what == "freeze":
            self.hit(signal.SIGSTOP, "workers frozen", *pids)
            at = time.monotonic() + self.rnd.uniform(0, 4)
            self.later.append((at, signal.SIGCONT, "workers thawed", *pids))
        elif what == "kill supervisor":
            self.hit(signal.SIGKILL, "supervisors killed", pool)
        elif what == "kill pool":  # stopped first, so that none sees another die
            self.hit(signal.SIGSTOP, "pools killed whole", pool)
            for number, word in ((signal.SIGSTOP, "stopped"), (signal.SIGKILL, "killed")):
                self.hit(number, word + " with their pool", pool, *self.workers(pool))
        # As systemd does: all at once. One that has no file yet can catch no signal yet.
        elif what == "stop service" and len(alive) == 1 and pool in (
                queuectl.living_pools(database())):
            others = self.pools + self.stops + [batch.process for batch in self.batches]
            runs = set(ours()) - {process.pid for process in others} - set(self.workers())
            self.hit(signal.SIGTERM, "stopped as services are", pool)
            self.hit(signal.SIGTERM, "told so", *self.workers(pool), *runs)
        elif what == "stop":
            how = self.rnd.choice(["", ["--now"]])
            self.stops.append(self.begin("worker", "stop", *how))

    def few_are_ready(self):
        """Whether the calm will not take too long; not known while a frozen one locks the file."""
        with contextlib.suppress(sqlite3.OperationalError):
            return sql(READY, timeout=0.5)[0][0] < 250

    def feed(self, doomed):
        """Enqueue jobs of every kind; or thousands, and kill that at some moment."""
        batch = types.SimpleNamespace(near=set(), far=set(), out=tempfile.TemporaryFile())
        with tempfile.TemporaryFile("w+") as source:
            for n in range(self.rnd.randint(*((2000, 4000) if doomed else (5, 25)))):
                job = {"id": "b%d-%d" % (len(self.batches), n), "command": OWN_LOCK + "true"}
                if doomed and n % 20:
                    job["delay"] = FAR
                elif not doomed:
                    length, delay = "%.2f" % self.rnd.uniform(0.05, 0.4), self.rnd.uniform(-2, 1)
                    job["command"] = OWN_LOCK + self.rnd.choice(KINDS).replace("TIME", length)
                    job.update(delay=max(0, delay), priority=self.rnd.randint(-1, 1))
                (batch.far if job.get("delay") == FAR else batch.near).add(job["id"])
                source.write(json.dumps(job) + "\n")
            source.seek(0)
            batch.process = self.begin("enqueue", "-", stdin=source, stdout=batch.out)
        self.batches.append(batch)
        if doomed:
            blow = signal.SIGKILL, "enqueuers killed", batch.process.pid
            self.later.append((time.monotonic() + self.rnd.uniform(0, 1), *blow))

    def calm(self):
        """End what is half done; run a fresh pool until no job is left."""
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
            self.until(lambda: not sql(READY)[0][0], 60, "jobs are ready")
        last, dead = time.time() + FAR / 2, True
        while dead and not self.wrong:
            self.until(lambda: sql(SOON, time.time(), last) == [(0,)], 30, "delayed jobs")
            drain = self.begin("worker", "start", "--count", "8", "--drain")
            self.until(lambda: drain.poll() is not None, 90, "the drain runs")
            dead = sql("SELECT id, error FROM jobs WHERE state = 'dead'")
            self.wrong += ["%s died: %s" % job for job in dead if "5 times" not in job[1]]
            self.tally["dead and retried"] += len(dead)
            dead and self.ask("dlq", "retry", "--all")
        self.ask("worker", "stop")
        self.until(lambda: not ours(), 10, "processes are left")
        codes = [process.wait(10) for process in self.pools + self.stops]
        self.wrong += ["exit code %d" % code for code in codes if code not in (0, -9)]
        self.wrong += ["left: " + name for name in set(os.listdir(".")) - MINE]

    def reckon(self):
        """Compare what was acknowledged with what is there."""
        states, ran = dict(sql("SELECT id, state FROM jobs")), set(os.listdir("locks"))
        for number, batch in enumerate(self.batches):
            told, code = os.pread(batch.out.fileno(), 1, 0), batch.process.returncode
            every = batch.near | batch.far
            there = every & set(states)
            if there != every and (there or told or not code):
                self.wrong.append("b%d, exit code %d: %d there" % (number, code, len(there)))
            self.tally["killed and there" if code else "acknowledged"] += bool(there)
            self.tally["jobs to run"] += len(batch.near & there)
            self.tally["jobs far off"] += len(batch.far & there)
            self.wrong += ["%s: %s" % (name, states[name]) for name in there if states[name]
                         != ("pending" if name in batch.far else "completed")]
            self.wrong += [name + " never ran" for name in batch.near & there - ran]
        self.wrong += read("overlaps").splitlines() if os.path.exists("overlaps") else []
        counts = sql("SELECT state, count(*) FROM jobs GROUP BY 1 ORDER BY 1")
        if counts != sql("SELECT * FROM counts WHERE jobs ORDER BY 1"):
            self.wrong.append("counts are wrong, right is %s" % counts)
        self.wrong += [row for row, in sql("PRAGMA integrity_check") if row != "ok"]

    def report(self):
        """Print what was struck, and each line that is no INFO, its numbers left out."""
        text = os.pread(self.errors.fileno(), 2**20, 0).decode() + read("queuectl.log")
        lines = [line for line in text.splitlines() if " INFO " not in line]
        wrong = re.compile("Errno|Error|failed")
        self.wrong += filter(wrong.search, lines)
        number = r"\[[\d, ]+\]|\bb\d+-\d+|\b[\da-f]{8}\b|[\d:,-]*\d"
        kinds = Counter(re.sub(number, "#", line) for line in lines)
        self.tally.update({"pools": len(self.pools), "stops": len(self.stops)})
        print("    %s" % dict(self.tally))
        print("".join("%8d %s\n" % (n, x) for x, n in kinds.most_common()), flush=True)


@pytest.mark.skipif(not os.path.exists("/proc/self/cwd"), reason="needs /proc")
@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock(1)")
@pytest.mark.parametrize("seed", os.environ.get("CHAOS_SEEDS", "1").split())
def test_chaos_loses_nothing_and_runs_nothing_twice(seed):
    print("seed", seed)
    os.mkdir("locks")
    os.mkdir("marks")
    ok("config", "set", "backoff_base", "0.9")
    ok("config", "set", "max_retries", "50")
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
# The file itself, and its README
# ======================================================================================


def test_the_source_is_python_3_8():
    ast.parse(read(SCRIPT), feature_version=(3, 8))


def test_a_command_imports_nothing_that_only_pools_need():
    code = "import sys, queuectl; queuectl.main(['status']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE,
                            env=dict(os.environ, PYTHONPATH=TOOLS)).stdout.decode().split()
    needless = {"logging", "multiprocessing", "http.server", "secrets"}
    needless |= {"subprocess"} if os.name == "posix" else set()
    assert not needless & set(loaded)


def readme():
    return read(os.path.join(HERE, "README.md"))


def shell(line):
    """Run a command of the README as it stands there, with this Python."""
    own = '"%s" "%s"' % (sys.executable, COMPILED)
    line = re.sub(r"\bpython3? queuectl\.py", lambda _: own, line)
    return subprocess.run(line, shell=True, stdout=subprocess.PIPE, timeout=60,
                          stderr=subprocess.STDOUT, universal_newlines=True).stdout


def test_the_readme_names_every_command_and_setting():
    for word in [*queuectl.COMMANDS, *queuectl.SETTINGS]:
        assert re.search("`[^`]*" + word, readme()), word


@posix
def test_the_readmes_transcript_is_what_happens():
    text = re.search(r"\n((?:    .*\n)+)", readme())[1].replace("    ", "", 1)
    steps = re.split(r"(?m)^ *\$ ", text)[1:]
    assert len(steps) == 5
    ok("config", "set", "backoff_base", "0.1")  # or what is broken would wait for 2 s
    for step in steps:
        line, _, expected = step.partition("\n")
        told = re.sub(r"\d+\.\ds ago|pool \d+", "…", shell(line)).split()
        assert told == re.sub(r"\d+\.\ds ago|pool \d+", "…", expected).split(), line


def test_the_readmes_library_example_runs():
    text = re.search(r"(?s)## As a library\n\n(.*?)\n\n[^ ]", readme())[1]
    program = "\n".join(line[4:] for line in text.splitlines())
    pool = start_pool(count=1)
    told = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE,
                          env=dict(os.environ, PYTHONPATH=TOOLS))
    assert told.stdout.startswith(b"completed 0 b'hello") and pool.poll() is None


# Where the README says that priorities stand: what goes, and what comes in its place.
WITHOUT_PRIORITIES = [
    (r'(?s)    "priority": .*?\),\n(?=    "run_at")', ""),
    (r"    priority INTEGER NOT NULL DEFAULT 0,\n", ""),
    (r'ORDER = "priority DESC, seq"', 'ORDER = "seq"'),
    (r"(?s)\(priority > \? OR priority = \? AND seq < \?\)\",\n.*?job\[\"seq\"\]\)",
     'seq < ?", job["seq"])'),
    (r'(?s)(def oldest_claimable.*?\n).*?LIMIT 1"\)\n',
     r'\1        return self._row("SELECT id, run_at FROM jobs WHERE " + CLAIMABLE'
     r' + " ORDER BY seq LIMIT 1")\n'),
]


def test_priorities_can_be_taken_away_in_the_places_that_the_readme_names():
    text = read(SCRIPT)
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
    assert "1 job before it" in changed("show", "b") or "no pool" in changed("show", "b")
    assert "Oldest Waiting" in changed("status")
    changed("worker", "start", "--drain")
    assert "priority" not in changed("list", "--json") + changed("enqueue", "--help")


@posix
def test_the_readmes_first_job_runs():
    line = re.search(r"(?m)^    (python3 queuectl.py enqueue .*drain)$", readme())[1]
    assert "1 completed, 0 dead" in shell(line)


def test_the_readmes_tour_works_as_it_stands_there():
    ok("config", "set", "backoff_base", "0")  # or job3 and job4 would take 6 s to die
    pool = None
    for line in re.findall(r"(?m)^    (python .*?)(?:  +#.*)?$", readme()):
        if "worker start" in line:
            pool = start_pool()
            wait_until(lambda: list(jobs("--state", "dead")) == ["job3", "job4"])
        else:
            assert shell(line), line
    assert pool.wait(10) == 0
    assert ok("config", "get", "max_retries").out == "5\n"
    assert set(jobs()) == {"job2", "job3", "job4"}


# ======================================================================================
# Waiting for others, sharing a lock, pausing, editing, many at once
# ======================================================================================

def order_of_runs():
    """Return the ids of the jobs that have run, in the order in which they began."""
    return [id for id, in sql(
        "SELECT id FROM runs JOIN jobs USING (seq) ORDER BY started_at, runs.run")]


def test_a_chain_a_fan_out_and_a_fan_in_run_in_their_order():
    names = ["a", "b", "c", "d", "e"]
    after = {"b": "a", "c": "a", "d": ["b", "c"], "e": ["d"]}
    ok("enqueue", json.dumps([  # the later ones first
        {"id": name, "command": "true", "after": after.get(name)} for name in names[::-1]]))
    assert drain() == 0
    began = order_of_runs()
    assert (began[0], sorted(began[1:3]), began[3:]) == ("a", ["b", "c"], ["d", "e"])
    assert all(job["after"] == [] for job in jobs().values())


@posix
def test_a_job_behind_a_dead_one_stays_until_that_is_retried_and_completed():
    enqueue("test -e mended", id="build", max_retries=1)
    ok("enqueue", "--id", "test", "--after", "build", "--", "true")
    ok("enqueue", "--id", "deploy", "--after", "test", "--after", "build", "--", "true")
    answer = drained()
    assert answer.code == 1 and answer.err == (
        "queuectl: 0 completed, 1 dead; 2 jobs left: test waits for build, which is dead\n")
    words = "waits for build, which is dead"
    assert words in ok("show", "test").out
    assert words + ", and for 1 more job" in ok("show", "deploy").out
    assert "Blocked: 2 jobs; test " + words in ok("status").out
    assert ok("status", "--json").json["blocked"] == 2
    answer = cli("wait", "test", "deploy", "--json")
    assert answer.code == 1 and sorted(answer.json["left"]) == ["deploy", "test"]
    assert words in cli("wait").out and cli("wait", "--timeout", "0").code == 1
    open("mended", "w").close()
    ok("dlq", "retry", "build")
    assert drain() == 0 and order_of_runs() == ["build", "build", "test", "deploy"]


def test_wait_ends_only_when_nothing_of_what_is_left_can_go_on(queue):
    add(queue, id="dead", max_retries=1)
    queue.fail(claim(queue), result())
    add(queue, id="behind", after=["dead"])
    add(queue, id="free")
    for ids in (None, ["behind", "free"], ["free", "behind"]):
        assert queue.wait(ids, 0) is None
    queue.complete(claim(queue), result(None))
    assert queue.wait(["behind", "free"])["left"] == ["behind"]
    queue.retry(["dead"])
    assert queue.wait(["behind"], 0) is None
    queue.complete(claim(queue), result(None))
    assert claim(queue)["id"] == "behind"


def test_a_job_after_a_delayed_one_is_left_by_a_drain_without_a_fault():
    enqueue(id="later", delay="1h")
    enqueue(id="last", after=["later"])
    answer = drained()
    assert answer.code == 0
    assert "0 completed, 0 dead; 2 jobs left: the next is due in 59m" in answer.err
    ok("edit", "later", "--run-at", "now")
    assert drain() == 0 and order_of_runs() == ["later", "last"]


@pytest.mark.parametrize("jobs_given, words", [
    ([("a", ["nope"])], "no job nope"), ([("a", ["a"])], "circle"),
    ([("a", ["b"]), ("b", ["a"])], "circle"),
    ([("a", ["c"]), ("b", ["a"]), ("c", ["b"])], "circle"),
    ([("a", ["first"]), ("b", ["gone"])], "no job gone"),
    ([("a", [""])], "after: "), ([("a", [3])], "after: "), ([("a", {})], "after: ")])
def test_unknown_ids_and_circles_are_refused_and_nothing_is_added(jobs_given, words):
    enqueue(id="first")
    lines = [json.dumps({"id": id, "command": "true", "after": after})
             for id, after in jobs_given]
    code = 2 if words == "after: " else 1
    assert words in refused("enqueue", *lines, code=code)
    assert list(jobs()) == ["first"]


def test_an_edit_can_make_no_circle_and_can_take_a_wait_away(queue):
    add(queue, id="a", after=[])
    add(queue, id="b", after=["a"])
    add(queue, id="c", after=["b"])
    assert "circle" in refused("edit", "a", "--after", "c")
    assert queue.job("a")["after"] is None and queue.job("a")["waits"] == 0
    ok("edit", "c", "--after", "a")
    assert ok("show", "c", "--json").json["after"] == ["a"]
    ok("edit", "c", "--after", "none")
    assert queue.job("c")["claimable"] == 1 and queue.job("b")["claimable"] == 0
    queue.complete(claim(queue), result(None))
    ok("edit", "c", "--after", "a")  # which is completed: nothing to wait for
    assert queue.job("c")["waits"] == 0


def test_a_job_that_others_wait_for_is_deleted_only_with_them(queue):
    for id, after in (("a", []), ("b", ["a"]), ("c", ["b"])):
        add(queue, id=id, after=after, max_retries=1)
    assert "job a can't be deleted, because b waits for it" in refused("delete", "a")
    assert "job b can't be deleted, because c waits for it" in refused("delete", "a", "b")
    queue.cancel(["c"])  # a cancelled one waits, too: it may be retried
    assert "job b can't be deleted, because c waits for it" in refused("delete", "b")
    ok("delete", "a", "b", "c")
    assert jobs() == {} and queue._rows("SELECT * FROM waits") == []
    for id, after in (("a", []), ("b", ["a"])):
        add(queue, id=id, after=after, max_retries=1)
    queue.fail(claim(queue), result())
    assert ok("dlq", "clear").out == "deleted 0 jobs; 1 left: other jobs wait for them\n"
    assert ok("delete", "--state", "pending").out == "deleted 1 job\n"
    add(queue, id="b", after=["a"])
    assert ok("delete", "--all").out == "deleted 2 jobs\n" and jobs() == {}


def test_a_cancelled_follower_that_is_retried_waits_again(queue):
    add(queue, id="a")
    add(queue, id="b", after=["a"])
    queue.cancel(["b"])
    queue.retry(["b"])
    assert queue.job("b")["claimable"] == 0
    queue.complete(claim(queue), result(None))
    assert claim(queue)["id"] == "b"


def test_waits_and_locks_travel_from_queue_to_queue():
    ok("enqueue", "--id", "a", "--lock", "db", "--", "true")
    ok("enqueue", "--id", "b", "--after", "a", "--lock", "db", "--", "true")
    ok("enqueue", "-", "--db", "other.db", stdin=ok("list", "--json").out.encode())
    copied = jobs("--db", "other.db")
    assert (copied["b"]["after"], copied["b"]["lock"]) == (["a"], "db")


def test_a_fan_out_of_thousands_is_freed_at_once(queue):
    add(queue, id="a")
    rows = ({"command": "true", "after": ["a"]} for _ in range(5000))
    queue.enqueue(queuectl.checked_job(row, queue.defaults()) for row in rows)
    run = claim(queue)
    assert claim(queue) is None
    began = time.monotonic()
    queue.complete(run, result(None))
    assert time.monotonic() - began < 2 and queue._rows("SELECT * FROM waits") == []
    assert claim(queue) and claim(queue)


def test_unique_takes_the_waits_of_the_new_job(queue):
    for name in ("a", "b"):
        add(queue, id=name)
    add(queue, id="x", after=["a"])
    queue.cancel(["x"])
    ok("enqueue", "--unique", "--id", "x", "--after", "b", "--", "true")
    assert ok("show", "x", "--json").json["after"] == ["b"]


def locks(queue):
    """Return what may be claimed of each lock."""
    return {job["lock"]: job["id"] for job in queue.jobs() if job["lock"]
            and job["state"] == "pending" and job["claimable"] == 1}


def test_of_the_jobs_of_a_lock_one_runs_at_a_time_the_highest_first(queue):
    for name, priority in (("low", 0), ("mid", 1), ("mid2", 1)):
        add(queue, id=name, lock="db", priority=priority)
    add(queue, id="other", lock="gpu", priority=-1)
    run = claim(queue)
    assert run["id"] == "mid"
    add(queue, id="high", lock="db", priority=2)
    assert claim(queue)["id"] == "other" and claim(queue) is None
    queue.fail(run, result())  # it has no lock while it waits for its next try
    assert claim(queue)["id"] == "high"


LOCK_VERBS = {
    "complete": lambda queue, run: queue.complete(run, result(None)),
    "fail": lambda queue, run: queue.fail(run, result()),
    "dead": lambda queue, run: queue.fail(dict(run, attempt=9), result()),
    "release": lambda queue, run: queue.release(run, result()),
    "cancel": lambda queue, run: (queue.cancel([run["id"]]), queue.fail(run, result())),
}


@pytest.mark.parametrize("verb", LOCK_VERBS)
def test_whatever_ends_a_run_gives_its_lock_to_the_next(queue, verb):
    for name in ("a", "b"):
        add(queue, id=name, lock="db")
    run = claim(queue)
    assert locks(queue) == {}
    LOCK_VERBS[verb](queue, run)
    assert locks(queue) == {"db": "a" if verb == "release" else "b"}


def test_whatever_moves_a_waiting_job_elects_the_first_of_its_lock_anew(queue, clock):
    for name, priority in (("a", 3), ("b", 2), ("c", 1)):
        add(queue, id=name, lock="db", priority=priority)
    add(queue, id="late", lock="db", priority=9, delay=60)
    assert locks(queue) == {"db": "a"}
    queue.cancel(["a"])
    assert locks(queue) == {"db": "b"}
    queue.retry(["a"])
    assert locks(queue) == {"db": "a"}
    queue.delete(["a"])
    assert locks(queue) == {"db": "b"}
    queue.edit("c", {"priority": 5})
    assert locks(queue) == {"db": "c"}
    queue.edit("c", {"lock": "gpu"})
    assert locks(queue) == {"db": "b", "gpu": "c"}
    queue.edit("c", {"lock": None})
    assert locks(queue) == {"db": "b"} and queue.job("c")["claimable"] == 1
    queue.edit("c", {"lock": "db"})
    assert locks(queue) == {"db": "c"}
    clock.now += 61
    queue.promote(clock.now)
    assert locks(queue) == {"db": "late"}
    queue.complete(claim(queue), result(None))
    ok("enqueue", "--unique", "--id", "late", "--lock", "gpu", "--", "true")
    queue.promote(time.time())
    assert locks(queue) == {"db": "c", "gpu": "late"}
    queue.delete_all(queuectl.where(["pending"]))
    assert locks(queue) == {}


@posix
def test_a_lock_holds_over_all_pools_and_whatever_is_killed():
    command = "mkdir held || exit 9; sleep 0.05; rmdir held"
    ok("enqueue", json.dumps([{"command": command, "lock": "l", "max_retries": 1}] * 12))
    enqueue("test -e begun && exit 0; touch begun; " + LASTING, id="killed", lock="l", priority=1)
    pool = start_pool()
    wait_until(lambda: os.path.exists("begun"))
    kill_all(pool)
    pools = [start_pool(), start_pool()]
    wait_until(lambda: ok("status", "--json").json["jobs"]["completed"] == 13)
    assert all(pool.poll() is None for pool in pools) and errors("killed")[0] == "worker died"
    (_, ended), *others = sql("SELECT started_at, finished_at FROM runs ORDER BY started_at")
    assert len(others) == 13 and all(began >= ended for began, _ in others)


def test_a_lock_with_many_behind_it_slows_no_claim(queue):
    rows = ({"command": "true", "lock": "db"} for _ in range(20000))
    queue.enqueue(queuectl.checked_job(row, queue.defaults()) for row in rows)
    rows = ({"command": "true", "id": "x%d" % n, "priority": -1} for n in range(200))
    queue.enqueue(queuectl.checked_job(row, queue.defaults()) for row in rows)
    first, began = claim(queue), time.monotonic()
    for _ in range(100):
        assert claim(queue)["id"].startswith("x")
    assert time.monotonic() - began < 1
    began = time.monotonic()
    queue.complete(first, result(None))
    assert len(claim(queue)["id"]) == 6 and time.monotonic() - began < 0.2


GATE = """
SELECT 'two of a lock', lock FROM jobs WHERE lock NOT NULL AND (state = 'processing'
    OR state = 'pending' AND claimable = 1) GROUP BY lock HAVING COUNT(*) > 1
UNION ALL SELECT 'none of a lock', lock FROM jobs WHERE lock NOT NULL AND (state = 'processing'
    OR state = 'pending' AND claimable > 0) GROUP BY lock
    HAVING SUM(state = 'processing' OR claimable = 1) = 0
UNION ALL SELECT 'not the first of a lock', a.id FROM jobs a JOIN jobs b ON a.lock = b.lock
    WHERE a.state = 'pending' AND a.claimable = 1 AND b.state = 'pending' AND b.claimable = 2
    AND (b.priority > a.priority OR b.priority = a.priority AND b.seq < a.seq)
UNION ALL SELECT 'waits miscounted', id FROM jobs
    WHERE waits <> (SELECT COUNT(*) FROM waits WHERE waits.seq = jobs.seq)
UNION ALL SELECT 'behind a lock without one', id FROM jobs WHERE claimable = 2 AND lock IS NULL
UNION ALL SELECT 'claimable, but waits', id FROM jobs
    WHERE waits > 0 AND state = 'pending' AND claimable > 0
UNION ALL SELECT 'not claimable, but waits for nothing', id FROM jobs
    WHERE waits = 0 AND claimable = 0 AND (state NOT IN ('pending', 'failed') OR run_at <= ?)
UNION ALL SELECT 'waits for what is completed', id FROM jobs JOIN waits ON waits_for = jobs.seq
    WHERE state = 'completed'
UNION ALL SELECT 'waits for nobody', seq FROM waits WHERE waits_for NOT IN (SELECT seq FROM jobs)
UNION ALL SELECT 'counts are wrong', state FROM counts
    WHERE jobs <> (SELECT COUNT(*) FROM jobs WHERE jobs.state = counts.state)
"""


@pytest.mark.parametrize("seed", range(int(os.environ.get("GATE_SEEDS", 6))))
def test_whatever_is_done_in_whatever_order_the_gate_is_right(queue, clock, seed):
    rnd, runs, names = random.Random(seed), [], ["j%d" % n for n in range(12)]

    def some(fields):
        return {name: value() for name, value in fields.items() if rnd.random() < 0.4}

    fields = {"after": lambda: rnd.sample(names, rnd.randint(1, 2)), "max_retries": lambda: 1,
              "lock": lambda: rnd.choice("abc"), "priority": lambda: rnd.randint(-1, 1),
              "delay": lambda: rnd.choice([0, 5, 50])}

    def enqueue_one():
        job = dict(some(fields), id=rnd.choice(names), command="true")
        queue.enqueue([queuectl.checked_job(job, queue.defaults())], unique=rnd.random() < 0.5)

    def claim_one():
        run = claim(queue)
        if run:
            runs.append(run)

    def end_one():
        if runs:
            run = runs.pop(rnd.randrange(len(runs)))
            rnd.choice([lambda: queue.complete(run, result(None)), lambda: queue.release(
                run, result()), lambda: queue.fail(run, result())])()

    def some_states():
        return queuectl.where(rnd.sample(queuectl.STATES, 2), text=rnd.choice(["", "1"]),
                              has_dependents=rnd.choice([None, False]))

    verbs = [enqueue_one, enqueue_one, enqueue_one, claim_one, claim_one, end_one, end_one,
             lambda: queue.edit(rnd.choice(names), queuectl.checked_fields(some(fields), {})),
             lambda: queue.cancel([rnd.choice(names)]), lambda: queue.retry([rnd.choice(names)]),
             lambda: queue.delete(rnd.sample(names, rnd.randint(1, 3)))] + [
             lambda verb=verb: rnd.random() < 0.1 and verb(some_states())
             for verb in (queue.cancel_all, queue.retry_all, queue.delete_all)]
    for _ in range(400):
        clock.now += rnd.choice([0, 0, 1, 10])
        with contextlib.suppress(queuectl.QueueError):
            rnd.choice(verbs)()
        queue.promote(clock.now)
        assert [tuple(row) for row in queue._rows(GATE, clock.now)] == []
    while runs or queue.next_due() or queue.has_claimable():  # nothing is stuck
        clock.now += 10**6
        claim_one()
        if runs:
            queue.complete(runs.pop(), result(None))
    left = [job for job in queue.jobs() if job["state"] not in ("completed", "dead")]
    assert {job["state"] for job in left} <= {"pending"} and queue.is_drained()
    assert {job["seq"] for job in left} <= queue.blocked_seqs()


@forked
def test_show_says_which_job_has_the_lock():
    enqueue(id="first", lock="db")
    enqueue(id="second", lock="db")
    start_pool(count=1, script="queuectl.Queue.claim = lambda *_: None")
    assert "waits for the lock db: job first has it or gets it first" in ok("show", "second").out
    assert "next in line" in ok("show", "first").out


def test_a_paused_queue_starts_no_job_and_says_so_everywhere():
    enqueue(id="x")
    pool = start_pool()
    wait_until(lambda: state("x") == "completed")
    assert ok("pause").out == "paused; to go on: queuectl.py resume\n" == ok("pause").out
    enqueue(id="y")
    words = "paused; to go on: queuectl.py resume"
    assert words.capitalize() in ok("status").out and words in ok("show", "y").out
    assert ok("status", "--json").json["paused"] is True
    answer = cli("wait")
    assert answer.code == 1 and "1 can't go on: the queue is paused" in answer.out
    answer = drained()
    assert answer.code == 1 and answer.err.splitlines() == [
        "queuectl: the queue is " + words,
        "queuectl: 0 completed, 0 dead; 1 job left: the queue is " + words]
    assert state("y") == "pending" and pool.poll() is None
    assert ok("resume", "--json").json == {"paused": False}
    wait_until(lambda: state("y") == "completed")
    assert "aused" not in ok("status").out


@posix
def test_a_pause_lets_the_running_job_finish_and_a_drain_end():
    enqueue("while ! test -e go; do sleep 0.05; done", id="runs", priority=1)
    enqueue(id="next")
    pool = start_pool("--drain", count=1)
    wait_until(lambda: state("runs") == "processing")
    ok("pause")
    assert cli("wait", "--timeout", "0").code == 124  # one runs
    open("go", "w").close()
    assert pool.wait(20) == 1 and "1 completed, 0 dead; 1 job left" in pool.stderr.read()
    assert (state("runs"), state("next")) == ("completed", "pending")


def test_an_idle_pool_of_a_paused_queue_rests(queue):
    add(queue)
    queue.set_paused(True)
    worker = queuectl.Worker.__new__(queuectl.Worker)
    worker.queue, worker.drain = queue, False
    assert worker.idle_time() == queuectl.IDLE_INTERVAL and claim(queue) is None
    assert queue.is_drained()


def test_edit_changes_what_waits_with_the_options_of_enqueue(queue):
    add(queue, id="x", run_at=time.time() + 3600)
    ok("edit", "x", "--priority", "5", "--timeout", "1m30s", "--env", "A=1", "--", "echo", "b c")
    job = ok("show", "x", "--json").json
    assert (job["priority"], job["timeout"], job["env"]) == (5, 90, {"A": "1"})
    assert job["command"].split()[0] == "echo" and claim(queue) is None
    assert ok("edit", "x", "--run-at", "now", "--json").json["state"] == "pending"
    run = claim(queue)
    assert run["id"] == "x"
    assert "job x is processing" in refused("edit", "x", "--priority", "1")
    queue.fail(run, result())
    ok("edit", "x", "--command", "true", "--run-at", "now")  # a failed one: tried at once
    run = claim(queue)
    assert (run["attempt"], run["command"]) == (2, "true")
    queue.complete(run, result(None))
    assert "job x is completed" in refused("edit", "x", "--priority", "1")
    assert "nothing to change" in refused("edit", "x", code=2)
    assert "no job y" in refused("edit", "y", "--priority", "1")
    assert "priority" in refused("edit", "x", "--priority", "high", code=2)
    refused("edit", "x", "--id", "y", code=2)
    refused("edit", "x", "--run-at", "now", "--delay", "3", code=2)


def test_retry_runs_a_finished_job_again_and_keeps_its_runs():
    enqueue("echo $QUEUECTL_ATTEMPT", id="x") if os.name == "posix" else enqueue("echo 1", id="x")
    enqueue("exit 3", id="y", max_retries=1)
    drain()
    assert ok("retry", "x", "y").out == "retried x\nretried y\n"
    assert "job x is pending, not completed or dead" in refused("retry", "x")
    assert drain() == 1
    assert errors("x") == [None, None] and errors("y") == ["exit 3", "exit 3"]
    assert attempts("x") == 1 and ok("logs", "x").out.split() == ["1"]


def test_many_are_chosen_by_state_and_text_and_listed_by_a_dry_run():
    for name in ("a1", "a2", "b1"):
        enqueue(id=name)
    drain()
    enqueue("exit 1", id="a3", max_retries=1)
    drain()
    for name in ("a4", "b2"):
        enqueue("echo a" if name == "b2" else "true", id=name)
    assert list(jobs("--match", "a")) == ["a1", "a2", "a3", "a4", "b2"]
    assert list(jobs("--match", "a", "--state", "dead", "--state", "completed", "--newest")) == [
        "a3", "a2", "a1"]
    for words in (["cancel"], ["retry"], ["delete"], ["dlq", "retry"]):
        listed = ok(*words, "--match", "a", "--dry-run", "--json").json
        assert [job["id"] for job in listed] == {
            "cancel": ["a4", "b2"], "retry": ["a1", "a2", "a3"], "dlq": ["a3"],
            "delete": ["a1", "a2", "a3", "a4", "b2"]}[words[0]]
    assert len(jobs()) == 6 and state("a4") == "pending"
    assert ok("cancel", "--match", "a").out == "cancelled 2 jobs\n"
    assert ok("retry", "--state", "completed", "--match", "a").out == "retried 2 jobs\n"
    assert ok("retry", "--state", "dead").out == (
        "retried 1 job; 2 left: cancelled ones are retried by id\n")
    assert ok("delete", "--match", "b", "--state", "completed").out == "deleted 1 job\n"
    assert ok("cancel", "--match", "nothing").out == "cancelled 0 jobs\n"
    for words in (["retry", "--state", "pending"], ["cancel", "--state", "dead", "--dry-run"]):
        assert "this is for jobs that are" in refused(*words, code=2)
    for words in (["cancel"], ["retry"], ["delete"], ["dlq", "retry"],
                  ["retry", "x", "--match", "a"], ["cancel", "a1", "--state", "pending"]):
        assert "give ids, or options" in refused(*words, code=2)


def test_cancelling_many_ends_the_running_ones_too(queue):
    add(queue, id="runs")
    run = claim(queue)
    add(queue, id="waits")
    assert ok("cancel", "--state", "processing", "--state", "pending").out == "cancelled 2 jobs\n"
    assert state("waits") == "dead" and queue.complete(run, result(None)) == "completed"


def test_list_says_when_a_job_is_due_and_how_many_more_there_are():
    enqueue(id="later", delay="2h")
    enqueue(id="now")
    lines = ok("list").out.splitlines()
    assert "due in 1h 59m" in lines[1] and "due" not in lines[2]
    answer = ok("list", "--limit", "1")
    assert answer.out.count("\n") == 2
    assert answer.err == "queuectl: 1 more job; --limit 0 lists all\n"
    assert ok("list", "--limit", "2").err == "" == ok("list", "--limit", "1", "--json").err
    assert ok("list", "--limit", "1", "--match", "later").err == ""


@posix
def test_an_empty_list_says_so_on_a_terminal():
    told = "queuectl: made queue %s\r\nno jobs\r\n" % os.path.abspath("queuectl.db")
    assert on_terminal("list", columns=300) == (0, told)
    assert on_terminal("list") == (0, "no jobs\r\n")
    assert on_terminal("dlq", "list") == (0, "no dead jobs\r\n")
    assert ok("list").out.split() == ["ID", "STATE", "TRIES", "CHANGED", "COMMAND"]


def test_the_beginning_of_an_id_is_enough_for_show_and_logs_alone():
    for name in ("backup-1", "backup-2", "report", "rep"):
        enqueue("echo " + name, id=name)
    drain(1)
    answer = ok("logs", "repo")
    assert answer.out.split() == ["report"] and answer.err == "queuectl: repo is report\n"
    assert ok("show", "rep", "--json").json["id"] == "rep"  # whole, so not a beginning
    assert "several jobs begin with backup" in refused("show", "backup")
    for id in ("bac", "ort", "re", "backup-3", "%", "repo%"):
        assert "no job" in refused("show", id)
    for words in (["delete"], ["cancel"], ["retry"], ["wait"], ["edit", "--priority", "1"]):
        assert "no job repo" in refused(*words, "repo")


def test_logs_of_several_stand_each_under_a_line_with_id_and_error():
    enqueue("echo one", id="a")
    enqueue("echo two&& exit 3", id="b", max_retries=1)
    enqueue("exit 4", id="c", max_retries=1)
    drain(1)
    assert ok("logs", "a", "b").out.split("\n") == [
        "==> a: completed", "one", "==> b: exit 3", "two", ""]
    assert ok("dlq", "logs").out.split("\n") == ["==> c: exit 4", "", "==> b: exit 3", "two", ""]
    assert [log["id"] for log in ok("dlq", "logs", "--json").json] == ["c", "b"]
    assert [log["id"] for log in ok("logs", "a", "c", "--json").json] == ["a", "c"]
    refused("logs", "a", "b", "--run", "1", code=2)
    refused("logs", "-f", "a", "b", code=2)


def test_lines_are_commands_and_quiet_prints_nothing():
    lines = b"echo one\r\n\n  \necho {two}\n[3]\n"
    ok("enqueue", "--lines", "--priority", "2", stdin=lines)
    assert [(job["command"], job["priority"]) for job in jobs().values()] == [
        ("echo one", 2), ("echo {two}", 2), ("[3]", 2)]
    with open("list", "wb") as file:
        file.write(b"true\n\xff\n")
    assert "line 2: command" in refused("enqueue", "--lines", "--file", "list", code=2)
    assert ok("enqueue", "--quiet", "--", "true").out == "" and len(jobs()) == 4


@pytest.mark.parametrize("given, expected", [
    ("1h30m", 5400), ("1d2h", 93600), ("1.5h", 5400), ("90", 90), ("1H", 3600), (" 5 ", 5)])
def test_durations_may_have_several_parts(given, expected):
    assert queuectl.parse_duration(given) == expected


@pytest.mark.parametrize("given", ["1h30", "h", "", "1_0", "1 h", "1h 30m", "-1h", "1e3", "1w"])
def test_what_is_no_duration_is_refused(given):
    assert "timeout" in refused("enqueue", "--timeout=" + given, "--", "true", code=2)


def test_the_limit_of_output_may_be_given_in_k_and_m():
    ok("config", "set", "output_limit", "64k")
    assert ok("config", "get", "output_limit").out == "65536\n"
    for value in ("65M", "1G", "-1", "1.5M", "true", ""):
        assert "64M" in refused("config", "set", "output_limit", "--", value, code=2)


@posix
def test_a_pool_on_a_terminal_shows_each_job_and_elsewhere_nothing_of_them():
    enqueue("exit 3", id="x", max_retries=1)
    enqueue("sleep 0.2", id="y")
    code, shown = on_terminal("worker", "start", "--drain", columns=200)
    assert code == 1 and re.search(r"x 1/1 dead \(exit 3\) in", shown)
    assert "y 1/3 runs, pid " in shown and "y 1/3 completed in 0.2" in shown
    enqueue("exit 3", id="z", max_retries=1)
    assert drained().err == "queuectl: 0 completed, 1 dead\n"


@posix
def test_ctrl_c_tells_what_it_waits_for_on_a_terminal():
    enqueue("touch runs; while ! test -e go; do sleep 0.05; done", id="x")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(["worker", "start"])
    wait_until(lambda: os.path.exists("runs"))  # before, it would get the Ctrl-C too
    os.write(terminal, b"\x03")
    shown = b""
    while b"finishing 1 running job; Ctrl-C again ends them now" not in shown:
        shown += os.read(terminal, 4096)
    open("go", "w").close()
    with contextlib.suppress(OSError):
        while True:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0 and state("x") == "completed"
    assert b"pool %d stopped" % pid in shown


def test_what_waits_for_a_removed_job_is_dead_and_says_why(queue):
    add(queue, id="front")
    add(queue, id="x", after=["front"])
    add(queue, id="y", after=["x"])
    queue.delete_all(queuectl.where(text="front"))
    assert (state("x"), queue.job("x")["error"]) == ("dead", "what it waited for was removed")
    assert queue.counts()["dead"] == 1 and ok("show", "y", "--json").json["after"] == ["x"]
    assert queue.next_due() is None  # it is not among those that wait for a time
    queue.retry(["x"])
    assert claim(queue)["id"] == "x"


# ======================================================================================
# install, and what shells complete
# ======================================================================================


INSTALLED_AS = "queuectl" if os.name == "posix" else "queuectl.cmd"


def installed(*argv, **options):
    """Run the command that was installed into `bin`."""
    path = os.path.abspath(os.path.join("bin", INSTALLED_AS))
    return subprocess.run([path, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60, **options)


def test_install_puts_a_command_that_imports_this_very_file_from_anywhere(home):
    os.makedirs("it's 100% mine")
    own = shutil.copy(SCRIPT, os.path.join("it's 100% mine", "queue-ctl.py"))
    for _ in range(2):
        told = subprocess.run([sys.executable, own, "install", "bin"], check=True,
                              stdout=subprocess.PIPE, universal_newlines=True).stdout
    assert told.startswith("installed " + os.path.join(str(home), "bin", "queuectl"))
    assert os.listdir("it's 100% mine/__pycache__")
    for name in ("json.py", "sqlite3.py"):  # of the current directory: none of ours
        with open(name, "w") as file:
            file.write("raise SystemExit(name)")
    assert installed("enqueue", "--id", "a b", "--", "echo  hi").stdout == "enqueued a b\n"
    answer = installed("show", "nope")
    assert answer.stderr == "queuectl: there is no job nope\n" and answer.returncode == 1
    assert jobs()["a b"]["command"] == "echo  hi"


@pytest.mark.parametrize("options", [(), ("--detach",)])
def test_jobs_of_an_installed_command_find_their_own_python_and_environment(options):
    ok("install", "bin")
    look = "import os, sys; print(sys.flags.isolated, os.environ['PYTHONPATH'])"
    enqueue(python(look), id="a")
    env = dict(os.environ, PYTHONPATH="here")
    assert installed("worker", "start", "--drain", *options, env=env).returncode == 0
    ok("wait", "a")
    assert ok("logs", "a").out == "0 here\n"


def test_install_says_where_and_whether_that_is_on_path(home, monkeypatch):
    path = str(home / "bin" / INSTALLED_AS)
    assert ok("install", "bin", "--json").json == {"path": path, "on_path": False}
    assert ok("install", "bin").out.splitlines() == [
        "installed " + path, "%s is not on PATH: add it" % (home / "bin")]
    monkeypatch.setenv("PATH", str(home / "bin"), prepend=os.pathsep)
    assert ok("install", "bin").out == "installed %s\n" % path
    assert os.listdir() == ["bin"] and os.listdir("bin") == [INSTALLED_AS]


@posix
def test_install_without_a_directory_takes_the_users_own(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    before = os.umask(0o077)
    try:
        ok("install")
    finally:
        os.umask(before)
    assert os.stat(".local/bin/queuectl").st_mode & 0o777 == 0o755


def test_install_leaves_alone_what_queuectl_did_not_write(monkeypatch):
    os.mkdir("bin")
    path = os.path.join("bin", INSTALLED_AS)
    shutil.copy(SCRIPT, path)
    assert "not queuectl's" in refused("install", "bin")
    assert read(path) == read(SCRIPT)
    assert "File" in refused("install", path) or os.name != "posix"
    monkeypatch.setattr(queuectl, "__file__", path)
    assert "only a file called NAME.py" in refused("install", "other")
    assert os.listdir() == ["bin"]


def completed(*words):
    """Return what a shell is told of a command line, up to the word that is begun."""
    answer = cli("completion", "--", *words)
    assert (answer.code, answer.err) == (0, "")
    return answer.out.split()


@pytest.mark.parametrize("line, expected", [
    ("dl", "dlq"),
    ("dlq ", "list logs retry clear"),
    ("config set ma", "max_retries"),
    ("config set max_retries ", ""),
    ("config set --db q.db ma", "max_retries"),
    ("config un", "unset"),
    ("list --state ", "pending processing completed failed dead"),
    ("list --state=p", "pending processing"),
    ("list --state = p", "pending processing"),  # as bash tells it
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
def test_a_shell_is_told_what_the_last_word_can_become(
        line, expected, queue, home, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name, end in (("died1", queue.fail), ("done1", queue.complete)):
        add(queue, id=name, max_retries=1)
        with leased(queue, 1) as run:
            end(run, result())
    for name in ("wait1", "a b", "$HOME", "-x", "*", "été"):
        add(queue, id=name)
    ok("enqueue", "--db", "other.db", "--id", "other1", "--", "true")
    for name, text in (("empty.db", ""), ("notes.db", "notes\n" * 999)):
        with open(name, "w") as file:
            file.write(text)
    before = sorted(os.listdir())
    assert completed(*line.split(" ")) == expected.split()
    assert sorted(os.listdir()) == before and os.path.getsize("empty.db") == 0


def test_every_command_and_option_is_completed_without_being_named_again(monkeypatch):
    for name, entry in queuectl.COMMANDS.items():
        *group, last = name.split()
        assert last in completed(*group, ""), name
        options = [each for argument in entry.arguments for each in argument.names if each[0] == "-"]
        assert {*options} <= {*completed(*name.split(), "-")}
    arguments = [queuectl.IDS, queuectl.STATE, queuectl.option("--after", "ID", "")]
    new = queuectl.COMMANDS["show"]._replace(arguments=arguments)
    monkeypatch.setitem(queuectl.COMMANDS, "new one", new)
    enqueue(id="job1")
    assert completed("new", "") == ["one"]
    for words in ("", "--after ", "a --state dead "):
        assert completed("new", "one", *(words + "jo").split()) == ["job1"]


def test_the_newest_ids_are_completed_and_not_too_many(queue):
    for number in range(400):
        add(queue, id="job%d" % number)
    told = completed("show", "")
    assert told[:2] == ["job399", "job398"] and 200 < len(told) < 400
    assert completed("show", "job17") == ["job17" + digit for digit in (*"9876543210", "")]


SHELLS = {
    "bash": "source <(queuectl completion bash); COMP_WORDS=(queuectl %s); COMP_CWORD=%d;"
            " _queuectl; echo ${COMPREPLY[@]}",
    "zsh": "compdef() { }; compadd() { shift; print -l $@ }; source <(queuectl completion"
           " zsh); words=(queuectl %s); CURRENT=$((%d + 1)); _queuectl",
    "fish": "queuectl completion fish | source; complete -C (string join -- ' ' queuectl %s)",
}


@posix
@pytest.mark.parametrize("shell", queuectl.COMPLETIONS)
def test_a_shell_completes_a_line_by_its_script(shell, monkeypatch):
    if not shutil.which(shell):
        pytest.skip("no " + shell)
    ok("install", "bin")
    monkeypatch.setenv("PATH", os.path.abspath("bin"), prepend=os.pathsep)
    ok("enqueue", "--db", "my q.db", "--id", "job1", "--", "true")
    for words, expected in ((["dlq", ""], {"list", "logs", "retry", "clear"}),
                            (["--db", "'my q.db'", "show", "jo"], {"job1"})):
        line = " ".join(map(shlex.quote, words))
        program = SHELLS[shell].replace("%d", str(len(words))).replace("%s", line, 1)
        told = subprocess.run([shell, "-c", program], timeout=60,
                              stdout=subprocess.PIPE, universal_newlines=True).stdout
        assert set(told.split()) == expected


def test_completion_names_its_shells():
    assert "bash, zsh, fish" in refused("completion", code=2)
    assert "zsh" in refused("completion", "csh", code=2)
    assert "complete -o default -F" in ok("completion", "bash").out
    assert ok("completion", "fish", "--json").json == queuectl.COMPLETIONS["fish"]
    assert os.listdir() == []


# ======================================================================================
# What terminals show
# ======================================================================================


def test_the_dead_are_listed_by_their_death_the_latest_first(queue, clock):
    for name in ("first", "second", "third"):
        add(queue, id=name, max_retries=1)
    for name in ("second", "third", "first"):
        clock.now += 1
        queue.cancel([name])
    assert [job["id"] for job in ok("dlq", "list", "--json").json] == [
        "first", "third", "second"]


def test_dlq_list_says_how_many_more_kinds_of_errors_there_are():
    for code in range(1, 6):
        enqueue("exit %d" % code, max_retries=1)
    drain()
    first = ok("dlq", "list").out.splitlines()[0]
    assert first.endswith(" and 2 more") and first.count("1 x exit") == 3


def test_status_says_when_what_is_due_waits_for_a_worker():
    enqueue("while ! test -e go; do sleep 0.05; done" if os.name == "posix" else LASTING, id="runs")
    start_pool(count=1)
    wait_until(lambda: state("runs") == "processing")
    enqueue(id="next", delay=0.05)
    wait_until(lambda: "Next Due: next, was due 0.1s ago, all workers are busy"
               in ok("status").out)
    open("go", "w").close()


@posix
def test_a_watched_status_fits_its_terminal_with_the_counts_on_top():
    pool = start_pool(count=30)
    code, shown = on_terminal("status", "--watch", "0.1", keys=b"\x03", columns=40)
    screen = shown.split("\x1b[H")[1].split("\x1b[J")[0]
    lines = screen.replace("\x1b[K", "").splitlines()
    assert lines[0] == "Pending: 0" and lines[5] == "Active Workers: 30"
    assert len(lines) == 23 and lines[-1] == "  and 14 more"
    assert max(map(len, lines)) < 40 and pool.poll() is None


@posix
def test_show_has_each_line_of_a_command_and_a_table_of_runs():
    enqueue("echo one\nexit 3", id="x", max_retries=2)
    ok("config", "set", "backoff_base", "0")
    drain(1)
    lines = ok("show", "x").out.splitlines()
    at = lines.index("command:     echo one")
    assert lines[at + 1] == "             exit 3"
    assert re.match(r"RUN  TRY  STARTED +TOOK +RESULT$", lines[-3])
    assert re.match(r"2    2    .* ago +\d+ms +exit ", lines[-1])


def test_followed_logs_say_what_is_waited_for_and_how_the_run_ended():
    enqueue("exit 3", id="x", max_retries=1)
    pool = start_pool(count=1)
    assert ok("logs", "-f", "x").err.endswith("queuectl: job x: exit 3\n")
    ok("pause")
    enqueue(id="y")
    follower = begin("logs", "-f", "y")
    assert "job y: the queue is paused" in follower.stderr.readline()
    ok("resume")
    assert follower.wait(20) == 0 and follower.stderr.read() == "" and pool.poll() is None


def test_all_that_people_read_fits_into_80_columns():
    texts = [ok("config", "show").out, ok().out]
    for name in queuectl.COMMANDS:
        texts.append(ok(*name.split(), "--help").out)
    lines = [line for text in texts for line in text.splitlines()]
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("text, columns", [
    ("abc", 3), ("日本", 4), ("é", 1), ("e\u0301", 1), ("", 0)])
def test_wide_characters_take_two_columns(text, columns):
    assert queuectl.display_width(text) == columns
    assert queuectl.truncate(text, 9) == text and queuectl.display_width(queuectl.truncate(text * 9, 5)) <= 5


@pytest.mark.parametrize("seconds, words", [
    (0, "0ms"), (-1, "0ms"), (0.029, "29ms"), (0.9996, "1.0s"), (2.51, "2.5s"),
    (200, "3m 20s"), (3600, "1h"), (86400, "1d")])
def test_durations_read_well(seconds, words):
    assert queuectl.duration_text(seconds, precise=True) == words


# ======================================================================================
# The page
# ======================================================================================


def test_what_the_page_does_to_many_is_what_it_counted(dashboard):
    for name in ("a1", "a2", "b1"):
        enqueue("exit 1", id=name, max_retries=1)
    enqueue("exit 2", id="c", max_retries=1)
    drain()
    enqueue(id="cut", delay=3600)
    ok("cancel", "cut")
    enqueue(id="waits", after=["b1"])
    enqueue(id="a3", delay=3600)
    assert dashboard.json("/api/count") == {"jobs": 7, "retry": 4, "delete": 6}
    assert dashboard.json("/api/count?q=a") == {"jobs": 5, "retry": 2, "delete": 5}
    assert dashboard.json("/api/count?q=exit+2")["jobs"] == 1  # an error, too
    assert dashboard.json("/api/count?state=pending") == {"jobs": 2, "retry": 0, "delete": 2}
    for path in ("retry?state=pending", "retry?state=processing", "delete?state=processing"):
        dashboard.post("/api/" + path)
    assert len(jobs()) == 7 and len(jobs("--state", "dead")) == 5
    dashboard.post("/api/retry?q=a")
    assert sorted(jobs("--state", "dead")) == ["b1", "c", "cut"]
    dashboard.post("/api/delete?state=dead")
    assert sorted(jobs()) == ["a1", "a2", "a3", "b1", "waits"]  # b1 is waited for
    for path in ("retry?state=x", "delete?q=%00"):
        assert dashboard.post("/api/" + path).status == 400


@pytest.mark.parametrize("name", [".", "..", "a/b", "%2e", "?"])
def test_odd_ids_can_be_asked_for_in_the_query(dashboard, name):
    enqueue(id=name)
    query = urllib.parse.urlencode({"id": name})
    assert dashboard.json("/api/jobs/-?" + query)["id"] == name
    assert dashboard.json("/api/jobs/-/output?" + query)["output"] == ""
    assert dashboard.post("/api/jobs/-/cancel?" + query).status == 200


def test_an_output_can_be_asked_for_from_where_it_was_read(dashboard, queue):
    ok("config", "set", "output_limit", "10")
    add(queue, id="x")
    with leased(queue, os.getpid()) as run:
        run["file"].write("0123é".encode()[:-1])
        part = dashboard.json("/api/jobs/x/output?from=1")
        assert (part["output"], part["start"], part["end"]) == ("123", 1, 4)
        run["file"].write("é".encode()[-1:] + b"6789abcdef")
        part = dashboard.json("/api/jobs/x/output?from=4")
        assert (part["output"], part["start"], part["end"]) == ("6789abcdef", 6, 16)
        assert dashboard.json("/api/jobs/x/output?from=16")["output"] == ""
        assert dashboard.ask("/api/jobs/x/output?from=-1").status == 400


def test_a_dashboard_never_makes_a_queue_that_was_removed(dashboard):
    ok("status")
    for name in os.listdir("."):
        if name.startswith("queuectl.db"):
            os.remove(name)
    for path in ("/api/status", "/api/jobs", "/api/stats", "/metrics"):
        answer = dashboard.ask(path)
        assert answer.status == 400 and "there is no queue" in answer.text
    assert not os.path.exists("queuectl.db") and dashboard.ask("/").status == 200


@posix
def test_the_page_names_its_queue_and_nothing_of_it_is_markup(monkeypatch):
    os.mkdir("a<b>'&")
    monkeypatch.chdir("a<b>'&")
    site = queuectl.Site(os.path.abspath("queuectl.db"), "localhost")
    _, kind, page = site.answer("GET", "/", {"Host": "localhost"})
    assert kind == "text/html" and "a&lt;b&gt;&#x27;&amp;" in page and "a<b>" not in page


def test_slow_statistics_hold_up_nothing_else(queue, monkeypatch):
    site, asked = queuectl.Site(queue.path, "localhost"), threading.Event()
    go_on = threading.Event()

    def stats(queue, since):
        asked.set()
        go_on.wait(20)
        return {}

    monkeypatch.setattr(queuectl, "read_stats", stats)
    answers = []
    ask = lambda: answers.append(site.answer("GET", "/api/stats", {"Host": "localhost"}))
    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert asked.wait(20)
    assert site.answer("GET", "/api/status", {"Host": "localhost"})[0] == 200
    go_on.set()
    for thread in asking:
        thread.join(20)
    assert [answer[0] for answer in answers] == [200] * 3


def test_durations_of_runs_are_exact_in_json():
    enqueue("sleep 0.05" if os.name == "posix" else "true", id="x")
    enqueue(id="y", delay=60)
    drain()
    job = ok("show", "x", "--json").json
    assert 0 < job["seconds"] < 5 and job["runs"][0]["seconds"] == job["seconds"]
    assert jobs()["y"]["seconds"] is None and jobs()["x"]["seconds"] == job["seconds"]


@pytest.mark.parametrize("words, told", [
    (["stop"], "did you mean worker stop?"), (["start"], "did you mean worker start?"),
    (["clear"], "did you mean dlq clear?"), (["retyr"], "did you mean retry?"),
    (["run"], "there are: enqueue, "), (["dlq", "rety"], "did you mean dlq retry?"),
    (["enqueue", "echo", "hello"], "to run a command: queuectl.py enqueue -- echo hello"),
    (["enqueue", "ls", "-la"], "to run a command: queuectl.py enqueue -- ls -la"),
    (["enqueue", "--id", "x", '{"command":"a"}', '{"command":"b"}'], "one id can't serve"),
])
def test_a_refusal_says_what_is_meant(words, told):
    assert told in refused(*words, code=2) and not jobs()


def test_every_argument_has_its_help_and_the_usage_begins_with_a_command():
    for name, entry in queuectl.COMMANDS.items():
        for argument in entry.arguments:
            assert argument.options["help"], (name, argument)
    assert ok("enqueue", "--help").out.splitlines()[0].endswith("-- COMMAND...")
    assert "--db PATH" in ok().out and "--json" in ok().out


def test_the_log_has_the_time_base_of_json():
    drain()
    for line in read("queuectl.log").splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|ERROR|WARNING) \w+\[\d+\] ", line)
    stamp = read("queuectl.log")[:20]
    assert abs(queuectl.parse_time(stamp) - time.time()) < 60


# ======================================================================================
# Nothing misleads
# ======================================================================================


@pytest.mark.parametrize("words", [
    "wait", "wait x", "show x", "logs x", "logs -f x", "cancel x", "retry x", "delete x",
    "delete --all", "delete --state dead", "dlq clear", "dlq logs", "dlq retry --all",
    "edit x --priority 1", "retry --state dead", "cancel --match x"])
def test_in_a_wrong_folder_a_command_fails_and_makes_no_queue(words):
    assert "there is no queue " in refused(*words.split())
    assert os.listdir() == []


def test_a_stop_in_a_wrong_folder_is_done_and_makes_no_queue():
    assert ok("worker", "stop").out == "no pool is running\n" and os.listdir() == []


def test_wait_without_ids_is_about_what_is_unfinished_when_it_begins():
    enqueue("exit 1", id="before", max_retries=1)
    drain()
    enqueue(id="now")
    drain()
    assert ok("wait").out == "0 completed, 0 dead\n"
    enqueue(id="next")
    start_pool(count=1)
    assert ok("wait", "--json").json["completed"] in (0, 1)  # it may have ended already


@posix
def test_a_job_that_waits_for_all_does_not_wait_for_itself():
    command = queuectl.shell_line([sys.executable, SCRIPT, "wait", "--timeout", "20"])
    enqueue(command, id="waits", timeout=30)
    enqueue(id="other")
    start_pool()
    wait_until(lambda: state("waits") == "completed")


@pytest.mark.parametrize("text", [
    '{"command":"a","command":"b"}', '[{"id":"x","command":"a","id":"y"}]',
    '{"command":"a","env":{"A":"1","A":"2"}}'])
def test_a_key_that_is_given_twice_is_refused(text):
    assert "given twice" in refused("enqueue", text, code=2)
    assert "line 1: " in refused("enqueue", "-", stdin=text.encode(), code=2) and not jobs()


@posix
def test_a_symlinked_folder_is_kept_by_its_name(monkeypatch):
    os.mkdir("release1")
    os.symlink("release1", "current")
    here = os.path.join(os.environ.get("PWD", os.getcwd()))
    for told, expected in ((os.path.abspath("current"), "current"),
                           (os.path.abspath("elsewhere"), "release1"), ("current", "release1")):
        monkeypatch.chdir("release1")
        monkeypatch.setenv("PWD", told)
        ok("enqueue", "--db", "../q.db", "--id", told, "--", "true")
        monkeypatch.chdir("..")
        cwd = ok("show", told, "--db", "q.db", "--json").json["cwd"]
        assert os.path.basename(cwd) == expected, (told, here)


def test_of_thousands_due_at_once_the_urgent_one_is_claimed_first(queue, clock, monkeypatch):
    monkeypatch.setattr(queuectl, "POLL_INTERVAL", 0.2)  # a claim has a part of it for those due
    rows = [{"command": "true", "delay": 60} for _ in range(3000)]
    rows.append({"command": "true", "delay": 60, "priority": 9, "id": "urgent"})
    queue.enqueue(queuectl.checked_job(row, queue.defaults()) for row in rows)
    clock.now += 61
    first = [claim(queue)["id"] for _ in range(5)]
    assert "urgent" in first


def test_words_and_options_may_be_mixed():
    for name in ("a", "b"):
        enqueue(id=name)
    drain()
    assert ok("wait", "a", "--timeout", "5", "b").out == "2 completed, 0 dead\n"
    ok("enqueue", '{"id":"c","command":"true"}', "--priority", "3", '{"id":"d","command":"true"}')
    assert [jobs()[name]["priority"] for name in "cd"] == [3, 3]
    assert ok("logs", "a", "--json", "--run", "1").json["id"] == "a"


@posix
def test_a_pool_whose_pid_file_was_removed_says_why_and_ends_with_1():
    pool = start_pool(count=1)
    os.remove("queuectl-%d.pid" % pool.pid)
    assert pool.wait(10) == 1
    told = pool.stderr.read()
    assert "its file " in told and "was removed" in told and told.count("\n") == 1


@posix
def test_stopping_a_pool_that_was_stopped_by_ctrl_z_gives_a_hint(monkeypatch, capsys):
    pool = start_pool(count=1)
    os.kill(pool.pid, signal.SIGSTOP)
    waits = []

    def wait_briefly(condition, seconds, pause=0.01):
        waits.append(seconds)
        if len(waits) > 1:
            os.kill(pool.pid, signal.SIGCONT)
            wait_until(condition)
        return condition()

    monkeypatch.setattr(queuectl, "wait_until", wait_briefly)
    answer = ok("worker", "stop")
    assert "kill -CONT %d" % pool.pid in answer.err and answer.out.startswith("stopped pool")
    assert waits[0] == 10 and pool.wait(10) == 0


def test_logs_of_what_printed_nothing_say_why():
    os.mkdir("gone")
    enqueue(id="x", cwd="gone", max_retries=1)
    enqueue(id="waits", delay=60)
    os.rmdir("gone")
    drain()
    answer = ok("logs", "x")
    assert answer.out == "" and "job x: cannot start: " in answer.err
    assert ok("logs", "waits").err == "queuectl: job waits: has not run yet\n"


def test_waiting_for_a_retry_without_a_pool_says_so():
    ok("config", "set", "backoff_base", "100")
    enqueue("exit 1", id="x")
    pool = start_pool(count=1)
    wait_until(lambda: state("x") == "failed")
    ok("worker", "stop")
    assert pool.wait(10) == 0
    answer = cli("wait", "x", "--timeout", "0")
    assert answer.code == 124 and "no pool is running" in answer.err


def test_logs_can_be_those_of_a_run():
    ok("config", "set", "backoff_base", "0")
    enqueue("echo $QUEUECTL_RUN" if os.name == "posix" else "echo %QUEUECTL_RUN%", id="x")
    for _ in range(2):
        drain(1)
        ok("retry", "x")
    drain(1)
    for run in (1, 2, 3):
        assert ok("logs", "x", "--run", str(run)).out.strip().endswith("-%d" % run)
    assert "job x has no run 4" in refused("logs", "x", "--run", "4")
    refused("logs", "x", "--run", "0", code=2)
    refused("logs", "x", "--run", "1", "--attempt", "1", code=2)


# A pool as another user, who may not do what root may.
AS_ANOTHER = """
queuectl.os.geteuid = lambda: 65534
queuectl.os.access = lambda path, mode: queuectl.os.stat(path).st_uid == 65534
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="makes files of others")
@pytest.mark.parametrize("name", ["queuectl.db", "queuectl.log", "queuectl.runs"])
def test_a_file_of_another_user_is_named_with_what_to_do(name):
    enqueue(id="x")
    os.mkdir("queuectl.runs")
    open("queuectl.log", "w").close()
    for other in set(os.listdir()) - {name}:
        os.chown(other, 65534, 65534)
    pool = start_pool(script=AS_ANOTHER)
    assert pool.wait(10) == 1
    told = pool.stderr.read()
    assert name + " belongs to another user: chown it, or run this as that user" in told
    assert told.count("\n") == 1


def test_the_write_ahead_log_gives_its_space_back(queue):
    blob = {"command": "true " + "x" * 8000}
    queue.enqueue(queuectl.checked_job(blob, queue.defaults()) for _ in range(5000))
    assert os.path.getsize("queuectl.db-wal") > 2**25
    queue.db.execute("PRAGMA wal_checkpoint(RESTART)")
    add(queue, id="next")
    assert os.path.getsize("queuectl.db-wal") <= 2**24


def test_a_job_that_waits_in_a_paused_queue_is_all_that_runs_in_it(queue):
    for name in ("waits", "other"):
        add(queue, id=name)
    claim(queue)
    queue.set_paused(True)
    assert queue.wait(timeout=0) is None  # for whoever is no job, one still runs
    assert queue.wait(timeout=0, exclude="waits")["left"] == ["other"]


def test_the_page_lists_the_dead_by_their_deaths_page_by_page(dashboard, queue):
    for name in ("a", "b", "c", "d"):
        add(queue, id=name, max_retries=1)
    for name in ("b", "d", "a"):
        queue.clock.now += 1
        queue.cancel([name])
    ids = lambda query: [job["id"] for job in dashboard.json("/api/jobs?state=dead" + query)]
    assert ids("") == ["a", "d", "b"] and ids("&limit=2") == ["a", "d"]
    assert ids("&before=d") == ["b"] and ids("&before=b") == []
    assert ids("&before=c") == ids("&before=gone") == ["a", "d", "b"]


def test_the_bars_of_the_page_are_whole_minutes(queue, clock):
    clock.now = 1e9 // 60 * 60 + 90  # half a minute after one began
    add(queue, id="x")
    queue.complete(claim(queue), result(None, finished_at=clock.now - 45))
    stats = queuectl.stats_by_the_minute(queue, {})
    assert stats["bar_seconds"] == 60 and len(stats["throughput"]) == 60
    assert [bar["completed"] for bar in stats["throughput"]][-2:] == [1, 0]


def test_each_job_of_a_chain_says_that_it_is_behind_a_dead_one():
    enqueue("exit 1", id="a", max_retries=1)
    for name, front in (("b", "a"), ("c", "b"), ("d", "c")):
        enqueue(id=name, after=[front])
    assert "behind" not in ok("show", "d").out
    drain()
    assert "waits for a, which is dead\n" in ok("show", "b").out
    assert "waits for c, which is pending, behind a dead one" in ok("show", "d").out
    assert "Blocked: 3 jobs; b waits for a, which is dead" in ok("status").out
    answer = cli("logs", "-f", "d")
    assert answer.code == 1 and "job d can't go on: waits for c" in answer.err


def test_edits_make_no_circle_over_waits_of_before():
    for name in ("a", "b", "c"):
        enqueue(id=name)
    ok("edit", "a", "--after", "b")
    ok("edit", "b", "--after", "c")
    for words in (["b", "--after", "a"], ["c", "--after", "a"], ["c", "--after", "c"]):
        assert "circle" in refused("edit", *words)
    assert drain() == 0 and order_of_runs() == ["c", "b", "a"]


def test_what_is_empty_or_could_mean_several_is_refused():
    for words in (["dlq", "clear"], ["delete"], ["dlq", "list"], ["list"]):
        for text in ("", "\udcff"):
            assert "--match" in refused(*words, "--match", text, code=2)
    for name in ("abcd1", "abcd2"):
        enqueue(id=name)
    assert "several jobs begin with abcd: abcd1, abcd2" in refused("show", "abcd")
    assert "--dry-run" in refused("delete", "abcd1", "--dry-run", code=2)
    enqueue(id="none")
    enqueue(id="x", after=["none"])
    assert ok("show", "x", "--json").json["after"] == ["none"]


@pytest.mark.parametrize("left", ["pending", "failed", "later"])
def test_a_drain_that_is_stopped_says_what_it_leaves(left):
    if left == "failed":  # it waits for its retry, as the drain would have done
        enqueue("exit 1", id="y", priority=1)
    enqueue("while ! test -e go; do sleep 0.05; done" if os.name == "posix" else LASTING,
            id="x")
    if left != "failed":
        enqueue(id="y", **({"delay": 60} if left == "later" else {}))
    pool = start_pool("--drain", count=1)
    wait_until(lambda: state("x") == "processing")
    ok("worker", "stop", "--no-wait")
    open("go", "w").close()
    if os.name != "posix":
        ok("worker", "stop", "--now", "--no-wait")
    again = os.name != "posix"  # there the running job is put back, too
    assert pool.wait(20) == (left != "later" or again)
    said = "left: the pool was stopped before" in pool.stderr.read()
    assert said == (left != "later" or again)


def test_a_pool_is_asked_for_what_is_more_than_before_and_only_once(queue, monkeypatch):
    monkeypatch.setattr(queuectl, "wake", lambda pids: None)
    pool, file = queuectl.Supervisor(queue.path, 1), queuectl.pool_file(queue.path, 0)
    pool.pid, pool.log = 0, queuectl.open_log(queue.path, "pool")
    for before, words, after in (("", "stop", "stop"), ("stop", "now", "now"),
                                 ("over", "stop", "over"), ("over", "now", "now"),
                                 ("now", "stop", "now"), ("now", "now", "now")):
        with open(file, "wb") as room:
            room.write(b" " * 16)
        before and queuectl.request_stop(queue.path, 0, before)
        for _ in range(3):  # as `loop` does, for as long as it goes on
            pool.request(words)
        assert queuectl.requested_stop(queue.path, 0) == after
        lines = read("queuectl.log").count("asked to stop")
        assert lines == (before != after), (before, words)
        open("queuectl.log", "w").close()


def test_a_chain_goes_as_a_whole_with_a_form_for_many(queue):
    for name, after in (("a", []), ("b", ["a"]), ("c", ["b"])):
        add(queue, id=name, after=after)
    add(queue, id="other", after=["a"])
    queue.cancel(["a", "b", "c"])
    assert ok("dlq", "clear").out == "deleted 2 jobs; 1 left: other jobs wait for them\n"
    assert set(jobs()) == {"a", "other"}
    queue.cancel(["other"])
    assert ok("dlq", "clear").out == "deleted 2 jobs\n" and jobs() == {}
