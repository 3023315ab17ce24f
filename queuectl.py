#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""queuectl: a durable background job queue for shell commands, in one file.

    python queuectl.py enqueue '{"id": "job1", "command": "echo Hello"}'
    python queuectl.py worker start --count 2
    python queuectl.py status

One SQLite file is one queue: `queuectl.db` in the current directory, or what `--db` or
QUEUECTL_DB names. Beside it lie `queuectl.log` and, while pools run, a PID file for
each and `queuectl.runs/` with the output of the jobs that run right now.

The life of a job; each arrow is one verb of `Queue`, one guarded UPDATE:

                     claim              exit 0
    enqueue ─▶ PENDING ─────▶ PROCESSING ─────▶ COMPLETED
                ▲ ▲ ▲            │ │ │
          due   │ │ └─ worker    │ │ └─ failed, attempts = max_retries ─▶ DEAD
                │ │    died,   ◀─┘ │                                      │
                │ │    stop --now  │                                      │
             FAILED ◀── failed ────┘                                      │
                  └────────────────────────── dlq retry ──────────────────┘

What is promised, and by what:

  - An acknowledged job is on the disk: `enqueue` commits with a synced write.
  - Two runs of a job never overlap. The output file of a run is its lease: the worker
    locks it (flock) and the command inherits the lock, so the kernel holds it until the
    last process of the run is gone, whoever was killed. Nobody needs a heartbeat.
  - No job is stuck. A job in PROCESSING whose lease is free belongs to nobody and is
    put back; a lease that is held while its worker is gone belongs to an orphan, which
    is ended first. Every pool looks for both at its start and every two seconds.
  - A job runs at least once. A result that could not be recorded is dropped, and the
    job runs again: commands should be idempotent.

The map, each section using only those above it:

    settings     names, limits, defaults; the one exception
    policy       checking jobs, durations, backoff: pure functions
    platform     locks, processes, PID files: what differs between systems
    queue        the database: the only SQL
    runs         one command: lease, output, ending it
    worker       claim, run, record, again
    supervisor   the log, starting and stopping workers, recovery
    output       values to text
    commands     one function a command
    main         the parser and the exit code
    dashboard    the same documents by HTTP, and the page
"""
import contextlib
import errno
import functools
import itertools
import json
import os
import re
import signal
import sqlite3
import stat
import sys
import time
from datetime import datetime, timedelta

# ======================================================================================
# Settings: names, limits, defaults; the one exception
# ======================================================================================

__version__ = "1.0.0"

STATES = ("pending", "processing", "completed", "failed", "dead")
SCHEMA_VERSION = 1
APPLICATION_ID = 0x71637431  # "qct1", in the header of the database

MAX_INTEGER = 2**63 - 1
MAX_SPAN = 10.0**9  # seconds, some 30 years
EPOCH = datetime(1970, 1, 1)
MAX_TIME = 253402300799.0  # 9999-12-31T23:59:59Z, the last that ISO 8601 text can name
MAX_WORKERS = 256
MAX_HOOKS = 8  # `on_dead` commands that a worker has running at a time
MAX_DEATHS = 5  # of its workers, until a job is taken for what kills them

SLICE = 0.02  # seconds that one transaction takes of a long work
PATIENCE = 30.0  # seconds that a command waits for another program's lock
LOOK_EVERY = 2.0  # seconds between two looks of a supervisor for jobs that nobody runs
IDLE_WAIT = 1.0  # seconds after which an idle worker looks even if nobody woke it
TICK = 0.2  # seconds between two looks of a worker at the command that it runs
GRACE = 3.0  # seconds from SIGTERM to SIGKILL
RESTART_EVERY = 1.0  # seconds between two starts of a worker that keeps dying
DRAINED = 3  # exit code of a worker that found nothing left to do
LOG_LIMIT = 10 * 2**20  # bytes of queuectl.log before it becomes queuectl.log.1


class QueueError(Exception):
    """What the user can mend, in one line; `code` is the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# ======================================================================================
# Policy: checking jobs, durations, backoff; pure functions
# ======================================================================================

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def backoff(base, attempts, longest):
    """Return the seconds to wait after the n-th failed attempt: base ** n, bounded."""
    try:
        return min(float(base) ** attempts, longest)
    except OverflowError:
        return longest


def seconds(value):
    """Return a duration in seconds from a number or text like 90, 90s, 10m, 2h, 7d."""
    if type(value) in (int, float):
        return float(value)
    text = value.strip().lower()
    unit = UNITS.get(text[-1:])
    return float(text[:-1]) * unit if unit else float(text)


def epoch(value):
    """Return epoch seconds from a number or ISO 8601 text, local without a zone."""
    if not isinstance(value, str):
        return seconds(value)
    text = value.strip().upper().replace("Z", "+00:00")
    if not re.fullmatch(r"\d{8}", text):  # 20260131 is a date, no moment of 1970
        with contextlib.suppress(ValueError):
            return float(text)
    return datetime.fromisoformat(text).timestamp()


def storable(text):
    """Tell whether TEXT can be handed to a system call: no NUL, no lone surrogate."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


# A check takes a value from outside and returns what is stored, or raises ValueError
# with the words for what is allowed; `checked` makes a whole sentence of them.


def whole(low, high):
    def check(value):
        if type(value) is not int or not low <= value <= high:
            raise ValueError("a whole number from %d to %d" % (low, high))
        return value

    return check


def within(convert, low, high, allowed):
    def check(value):
        try:
            result = convert(value)
            if low <= result <= high:  # false for NaN, too
                return result
        except (ValueError, TypeError, OverflowError, OSError, AttributeError):
            pass
        raise ValueError(allowed)

    return check


def duration(low, allowed):
    words = "%s, in seconds or like 90s, 10m, 2h, 7d" % allowed
    return within(seconds, low, MAX_SPAN, words)


moment = within(epoch, 0, MAX_TIME,
                "a time: ISO 8601 like 2026-01-31T18:00:00Z, or epoch seconds")


def identifier(value):
    text = value if isinstance(value, str) else ""
    if not 1 <= len(text) <= 255 or not text.isprintable() or text.isspace():
        raise ValueError("text of 1 to 255 printable characters")
    return text


def shell_line(value):
    if not isinstance(value, str) or not value.strip() or not storable(value):
        raise ValueError("a shell command: UTF-8 that is not blank and has no NUL")
    return value


def utf8(native):
    """Return what the system gave as the UTF-8 that it is, whatever the locale says."""
    return os.fsencode(native).decode("utf-8", "surrogateescape")


def native(text):
    """Return text as the system's calls want it; the reverse of `utf8`."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def folder(value):
    given = isinstance(value, str) and storable(value)
    if not given or not os.path.isdir(native(value)):
        raise ValueError("a directory that exists and has a name in UTF-8")
    return utf8(os.path.abspath(native(value)))


def optional(check, word):
    """Return a check that also takes the word, or null, for none."""
    return lambda value: None if value in (None, word) else check(value)


def prefix(value):
    """Check a launcher: the beginning of a command line, such as `srun -Q -n1`."""
    import shlex
    import shutil

    try:
        program = shlex.split(shell_line(value))[0]
        if not shutil.which(program):
            raise ValueError("no program " + program)
    except ValueError as error:
        raise ValueError("the beginning of a command: %s" % error) from None
    return value


def environment(value):
    def fits(name, text):
        named = name and "=" not in name
        return named and isinstance(text, str) and storable(name + text)

    if not isinstance(value, dict) or not all(itertools.starmap(fits, value.items())):
        raise ValueError("an object of texts, with names without = and no NUL")
    return json.dumps(value)


# name: (check, default, meaning)
SETTINGS = {
    "max_retries": (whole(0, 10**6), 3, "failed attempts until a job is dead"),
    "backoff_base": (within(seconds, 0, 10**6, "a number from 0 to 1000000"), 2,
                     "wait after the n-th failed attempt: base ** n seconds"),
    "backoff_max": (duration(0, "a duration"), 86400, "longest such wait, in seconds"),
    "timeout": (optional(duration(0.001, "a duration over 0"), "none"), None,
                "seconds a run may take, for jobs that give none"),
    "output_limit": (whole(0, 2**26), 2**20, "bytes of a run's output that are kept"),
    "launcher": (optional(prefix, "none"), None,
                 "prefix through which runs are started, like srun -Q -n1"),
    "keep": (optional(duration(0, "forever, or a duration"), "forever"), None,
             "seconds that finished jobs are kept; then a pool removes them"),
    "on_dead": (optional(shell_line, "none"), None, "command that gets the JSON of each"
                " job that ends dead on standard input"),
}

FIELDS = {
    "id": identifier,
    "command": shell_line,
    "max_retries": SETTINGS["max_retries"][0],
    "priority": whole(-MAX_INTEGER - 1, MAX_INTEGER),
    "run_at": moment,
    "delay": duration(0, "a duration"),
    "timeout": SETTINGS["timeout"][0],
    "cwd": folder,
    "env": environment,
    # Here `none` is a value: no launcher, whatever the setting is.
    "launcher": lambda value: value if value == "none" else prefix(value),
}

# What JSON shows of a job, in this order. Those that are no field above are queuectl's
# own: taken and ignored, so that one queue's `list --json` is another's `enqueue -`.
PUBLIC = (
    "id command state attempts max_retries priority run_at timeout cwd env launcher"
    " created_at updated_at exit_code error started_at finished_at"
).split()
TIMES = ("run_at", "created_at", "updated_at", "started_at", "finished_at")


def iso(moment):
    """Return epoch seconds as ISO 8601 text in UTC, None as None."""
    if moment is None:
        return None
    # Not by time.gmtime: on Windows that ends with the year 3000.
    return (EPOCH + timedelta(seconds=int(moment))).isoformat() + "Z"


def public(job):
    """Return a job as JSON shows it."""
    shown = {name: job[name] for name in PUBLIC}
    shown.update((name, iso(job[name])) for name in TIMES)
    return dict(shown, env=json.loads(job["env"] or "{}"))


def unknown(what, word, words):
    """Return the refusal of a word, with the likeliest of WORDS, or all of them."""
    from difflib import get_close_matches

    close = get_close_matches(word.lower(), words, 1, 0.5)
    hint = "did you mean %s?" % close[0] if close else "there are: " + ", ".join(words)
    return QueueError("unknown %s; %s" % (what, hint), 2)


def checked(name, check, value):
    """Return what CHECK makes of VALUE; a refusal names field, value and rule."""
    try:
        return check(value)
    except ValueError as allowed:
        given = json.dumps(value, default=str)
        given = given if len(given) <= 60 else given[:57] + "..."
        raise QueueError("%s: %s is not %s" % (name, given, allowed), 2) from None


def checked_job(given, defaults):
    """Return all fields of a job, ready to be stored; those not given from DEFAULTS."""
    if type(given) is not dict:
        raise QueueError('a job is a JSON object like {"command": "echo hi"}', 2)
    job = defaults.copy()
    for name, value in given.items():
        if name in FIELDS:
            if value is not None:
                job[name] = checked(name, FIELDS[name], value)
        elif name not in PUBLIC and name != "runs":
            raise unknown("field " + json.dumps(name), name, FIELDS)
    if job["command"] is None:
        raise QueueError("command: missing; a job needs a shell command", 2)
    if job["delay"] is not None and job["run_at"] is not None:
        raise QueueError("run_at and delay: give one of them, not both", 2)
    return job


ESCAPED = r"{\"id\":\"job1\",\"command\":\"echo hi\"}"
QUOTED = "in cmd \"%s\", in PowerShell '%s'" % (ESCAPED, ESCAPED)


def parsed(text):
    """Return what a JSON text says, or raise QueueError with why it is none."""
    try:
        text = text if isinstance(text, str) else text.decode().lstrip("\ufeff")
        return json.loads(text)
    except ValueError as error:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        start = shown(text.strip()[:60])
        if re.match(r"\s*\{\s*\w", text) and '"' not in text:
            words = "not JSON, the shell took the quotes: %s; write %s"
            raise QueueError(words % (start, QUOTED), 2) from None
        hint = "" if start[:1] in ("{", "[") else "; a command goes behind --"
        hint = "; a job is an object on one line" if start == "{" else hint
        raise QueueError("not JSON: %s: %s%s" % (error, start, hint), 2) from None


def shown(text):
    """Return TEXT on one line, whatever could steer a terminal escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def setting_name(key):
    """Return the name of a setting, spelt with - or _ and in any case."""
    name = key.lower().replace("-", "_")
    if name not in SETTINGS:
        raise unknown("setting " + shown(key), name, SETTINGS)
    return name


# ======================================================================================
# Platform: locks, processes, PID files; what differs between systems
# ======================================================================================

# First for POSIX; what Windows needs otherwise replaces it at the end, name by name.
if os.name == "posix":
    import fcntl
    import select
    import struct

    LEASE_FD = 100  # scripts use the numbers from 3 to 9 for themselves
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    WAKE_SIGNAL = signal.SIGUSR1
    POOL_SIGNALS = (*STOP_SIGNALS, WAKE_SIGNAL)
    TERMINATE, KILL = signal.SIGTERM, signal.SIGKILL
    ENVIRONMENT = dict(os.environb)  # of the pool; reading it for each run takes time
    IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}
    CLOSED_PIPE = (errno.EPIPE,)
    REUSE_ADDRESS = True  # a dashboard's, soon after the last one ended
    read_at, write_at = os.pread, os.pwrite


def nothing(*_):
    """Do nothing, where a system or a signal asks for no more."""


ready_terminal = nothing  # a terminal here takes escape sequences


def create_private(path, flags=os.O_EXCL):
    """Open a new file that only its owner can read, whatever the umask is."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o600)
    os.fchmod(fd, 0o600)
    return fd


open_shared = os.open  # a file that others write, rename and remove meanwhile


def still_names(path, status):
    """Tell whether PATH still names the file that had this status."""
    try:
        return os.path.samestat(os.stat(path), status)
    except (FileNotFoundError, NotADirectoryError):
        return False


def same_file(fd, path):
    """Tell whether PATH still names the file that is open as FD."""
    return still_names(path, os.fstat(fd))


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    """Open a file or a folder for a while."""
    fd = open_shared(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def wait_until(condition, seconds):
    """Wait until something holds or the time is over; return whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(TICK / 20)
    return True


def take_lock(fd, shared=False):
    """Take the lock of an open file; False if another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
        return True
    except BlockingIOError:
        return False


@contextlib.contextmanager
def folder_lock(path, patience=0.0):
    """Let one process at a time change which files a folder has; yield whether it may.

    Not for ever: somebody may have started us by `flock FOLDER queuectl.py …`.
    """
    with opened(path) as fd:
        try:
            locked = wait_until(lambda: take_lock(fd), patience)
        except OSError as error:
            words = "%s: the file system has no locks (%s); take a local disk"
            raise QueueError(words % (shown(path), error.strerror)) from None
        yield locked


def sync_folder(path):
    """Write a folder's entries to the disk: a renamed file survives a power cut."""
    with opened(path) as fd:
        os.fsync(fd)


def open_lease(path):
    """Create and lock the output file of a run; return its descriptor.

    The lock belongs to the open file, so that it lives as long as any process that
    inherits the descriptor.
    """
    fd = create_private(path)
    try:
        if not take_lock(fd) or not same_file(fd, path):  # taken for a leftover
            raise FileNotFoundError("%s was removed" % path)
    except OSError:
        os.close(fd)
        raise
    return fd


def lease_is_free(path, missing=True):
    """Tell whether no process holds the lock of a run's output file; MISSING if it is.

    None if it is another user's, so that nobody here can tell. The look is shared, so
    that two who look at once do not take each other for holders.
    """
    try:
        with opened(path) as fd:
            return take_lock(fd, shared=True)
    except FileNotFoundError:
        return missing
    except PermissionError:
        return None


def remove_free(path):
    """Remove an output file that nobody holds; one that is held stays."""
    with contextlib.suppress(OSError), opened(path) as fd:
        if take_lock(fd):
            os.remove(path)


def lock_byte(fd, at, length=1):
    """Lock bytes of a PID file for this process alone; False if another has them.

    Such locks are not inherited by a fork, and end with the process or as soon as it
    closes any descriptor of the file.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, at)
        return True
    except (BlockingIOError, PermissionError):
        return False


def byte_holder(fd, at, length=1):
    """Return the pid of another process that has locked a byte, or None.

    The kernel says who it is, so that no number written in a file is ever trusted. The
    pid is 0 or less where the holder is in another container.
    """
    if sys.platform == "linux":  # the order of the kernel's struct flock
        ask = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, at, length, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi", fcntl.fcntl(fd, fcntl.F_GETLK, ask))
    else:
        ask = struct.pack("qqihh", at, length, 0, fcntl.F_WRLCK, os.SEEK_SET)
        _, _, pid, kind, _ = struct.unpack("qqihh", fcntl.fcntl(fd, fcntl.F_GETLK, ask))
    return None if kind == fcntl.F_UNLCK else pid


class Process:
    """A child process: a worker, or the command of a run."""

    def __init__(self, pid):
        self.pid, self.code = pid, None
        self.forced = False  # whether it was killed, as it did not end when asked

    def poll(self):
        """Return its exit code once it has ended; minus the signal that ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                exited = os.WIFEXITED(status)
                self.code = os.WEXITSTATUS(status) if exited else -os.WTERMSIG(status)
        return self.code

    def end(self, number):
        """Signal its process group, if that is still there and ours."""
        self.forced = number == KILL
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def group_lives(self):
        """Tell whether any process of its group lives.

        The kernel counts those that are dead and not yet reaped, too, which nobody may
        ever do for the orphans of a job in a container without an init.
        """
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        others = [fields for fields in map(process_stat, process_ids()) if fields]
        members = [fields for fields in others if int(fields[2]) == self.pid]
        return not others or any(map(alive, members))

    let_go = nothing  # what it left in the background is let be


@functools.lru_cache(maxsize=None)
def apart():
    """Return what makes a process that is spawned the leader of a session.

    Of a group only on FreeBSD, or where Python was built for macOS before 10.15.
    """
    try:
        # There is no such program; an emulator may only notice in the new process.
        os.waitpid(os.posix_spawn("/", ["/"], {}, setsid=True), 0)
    except NotImplementedError:
        return {"setpgroup": 0}
    except OSError:
        pass
    return {"setsid": True}


def start_shell(line, cwd, env, lease=None, input_fd=None, launcher=()):
    """Start a shell command as the leader of a session, its output to a lease.

    By posix_spawn: Popen takes 0.2 ms longer, and before Python 3.10 a whole one.
    """
    words = [*launcher, "/bin/sh", "-c", line.encode()]
    files = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    if input_fd is not None:
        files[0] = (os.POSIX_SPAWN_DUP2, input_fd, 0)
    if lease:  # a third time, or `exec >/dev/null` in a job would drop the lock
        files[1:] = [(os.POSIX_SPAWN_DUP2, lease.fd, fd) for fd in (1, 2, LEASE_FD)]
    added = {name.encode(): value.encode("utf-8", "surrogateescape")  # odd paths
             for name, value in env.items()}
    os.chdir(native(cwd))
    try:
        return Process(os.posix_spawnp(
            words[0], words, {**ENVIRONMENT, **added},
            file_actions=files, setsigdef=IGNORED_BY_PYTHON, **apart(),
        ))
    finally:
        os.chdir("/")  # an idle worker keeps no file system from being unmounted


def shell_words(words):
    """Return the shell line that runs these words; a single one is a line already."""
    if len(words) == 1:
        return words[0]
    import shlex

    return " ".join(map(shlex.quote, words))


def leave_terminal():
    """Let go of the terminal, or the pipe, that this process was started from."""
    with opened(os.devnull, os.O_RDWR) as null:
        for fd in (0, 1, 2):
            os.dup2(null, fd)


def background():
    """Go on in the background, while the caller's process waits for how it starts.

    Return a function that lets go of the terminal, and lets the caller end with 0. If
    this process ends before, the caller ends with its exit code.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        started = os.read(reader, 1)
        os._exit(0 if started else os.WEXITSTATUS(os.waitpid(pid, 0)[1]) or 1)
    os.setsid()
    for fd in open_descriptors():  # of the caller, such as the lock of a script
        if fd > 2 and fd != writer:
            with contextlib.suppress(OSError):
                os.close(fd)

    def let_go():
        leave_terminal()
        os.write(writer, b"1")
        os.close(writer)

    return let_go


def start_process(function, *args):
    """Run a function in a process of its own, which exits with what it returns."""
    pid = os.fork()
    if pid:
        return Process(pid)
    code = 1
    try:
        code = function(*args)
    finally:
        os._exit(code)


def open_descriptors():
    try:
        return [int(name) for name in os.listdir("/dev/fd")]
    except FileNotFoundError:
        return range(256)


def keep_descriptors():
    """Let no job inherit what the pool was started with, as by `flock 9` in a script.

    Refuse where the number that a lease has in a job is out of reach.
    """
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most <= LEASE_FD:
        words = "only %d open files are allowed (ulimit -n), and a pool needs %d"
        raise QueueError(words % (most, LEASE_FD + 1))
    for fd in open_descriptors():
        with contextlib.suppress(OSError):  # the one that listed them
            os.set_inheritable(fd, fd <= 2)


def process_stat(pid):
    """Return what /proc tells of a process from its state on; nothing if it is gone."""
    with contextlib.suppress(OSError), open("/proc/%d/stat" % pid, "rb") as file:
        return file.read().rpartition(b")")[2].split()
    return []


def alive(fields):
    """Tell whether a process is there and not a zombie, which nobody may ever reap."""
    return bool(fields) and fields[0] not in b"ZX"


def poke(pid):
    """Wake a process of a pool."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, WAKE_SIGNAL)


def run_processes(leases):
    """Return, by lease, the processes that provably belong to its run.

    These are dicts: pid, and whether it holds the lock. Those that closed every
    descriptor still carry the lease's name in their environment; a process that only
    reads the file does neither. One pass for all: reading what every process has open
    takes its time.
    """
    marks = {b"QUEUECTL_RUN=" + os.fsencode(lease): lease for lease in leases}
    files = {}
    for lease in leases:
        try:
            files[file_key(os.stat(lease))] = lease
        except FileNotFoundError:  # somebody removed it under its run
            files[lease + " (deleted)"] = lease
    found = {lease: {} for lease in leases}
    for pid in process_ids():
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            for lease in marked_leases(pid, marks):
                found[lease][pid] = False
            for lease in held_leases(pid, files):
                found[lease][pid] = True
    return found


def signal_processes(pids, number):
    """Signal processes, each with its group where the leader of that is among them.

    A child that a dying worker had just forked is in the group of its whole pool. A
    negative number is that of a group, as kill(2) has it.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(max(pid, 0))
            os.kill(-group if group in pids else pid, number)


def process_ids():
    """Return the pids of all processes; none where their files can't be seen."""
    if not os.path.exists("/proc/self/fdinfo"):  # only Linux tells who holds a lock
        return []
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def marked_leases(pid, marks):
    with open("/proc/%d/environ" % pid, "rb") as file:
        return [marks[mark] for mark in file.read().split(b"\0") if mark in marks]


def file_key(status):
    return status.st_dev, status.st_ino


def held_leases(pid, files):
    for fd in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            path = "/proc/%d/fd/%s" % (pid, fd)
            lease = files.get(file_key(os.stat(path))) or files.get(os.readlink(path))
            if lease and holds_lock(pid, fd):
                yield lease


def holds_lock(pid, fd):
    with open("/proc/%d/fdinfo/%s" % (pid, fd)) as file:
        return any("FLOCK" in line and "WRITE" in line for line in file)


def started_with(pid, moment):
    """Tell whether a process lives that started when a run did: it is no stranger."""
    age = process_age(pid)
    return age is not None and abs(time.time() - age - moment) < 2


def leaderless(group):
    """Tell whether a process group lives whose leader is gone.

    Whether it is a run's can't be proven, but no other gets its number meanwhile.
    """
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return process_age(group) is None


def was_there(pid, moment):
    """Tell, where nobody can see what a process has open, whether it may run a run.

    It is enough that it was there when that started.
    """
    age = None if process_ids() else process_age(pid)
    return age is not None and time.time() - age < moment + 1  # ps has whole seconds


def process_age(pid):
    """Return for how many seconds a process has been there; None if it is not."""
    if not process_ids():
        return age_by_ps(pid)
    fields = process_stat(pid)
    if not alive(fields):
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def age_by_ps(pid):
    """Return what process_age does, where there is no /proc."""
    import subprocess

    words = ["ps", "-o", "stat=", "-o", "etime=", "-p", str(pid)]
    told = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    state, _, elapsed = told.stdout.decode().strip().partition(" ")
    if not elapsed or state.startswith("Z"):
        return None
    days, _, clock = elapsed.strip().rpartition("-")
    age = int(days or 0)
    for part, base in zip(("0:0:" + clock).split(":")[-3:], (24, 60, 60)):
        age = age * base + int(part)
    return age


class Wake:
    """Wait for whichever comes first: a signal, a child's end, or a time.

    `Popen.wait(timeout)` would poll with growing sleeps; this wakes at once.
    """

    def __init__(self):
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait(self, timeout):
        select.select([self.reader], [], [], max(0.0, timeout))
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 2**16)  # what a pipe holds


def catch_signals(handler):
    """Let HANDLER take the signals to stop; leave none ignored, which jobs inherit.

    A shell starts background commands with SIGINT and SIGQUIT ignored, and what is
    ignored stays so through exec; a handler does not.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - IGNORED_BY_PYTHON:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        by_nohup = ignored and number == signal.SIGHUP
        if number in (WAKE_SIGNAL, signal.SIGCHLD) or by_nohup:
            signal.signal(number, nothing)  # wakes only
        elif number in STOP_SIGNALS:
            signal.signal(number, handler)
        elif ignored:
            signal.signal(number, signal.SIG_DFL)


def beside(path, ending):
    """Return the name of one of the files that lie beside a queue's database."""
    return (path[:-3] if path.endswith(".db") else path) + ending


class PoolFile:
    """`queuectl-PID.pid`, by which a pool is found, asked and known to be alive.

    The supervisor locks one byte of it and each worker another: a file without locks is
    a leftover, whatever it says. Its text is the supervisor's pid, for people, and what
    the pool is asked: `stop`, or `now`.
    """

    LOCKS = 2**20  # the first byte to lock; far behind the text, for Windows' sake
    REQUESTS = {"stop": 16, "now": 24}  # where they stand; there is room from the start
    # A row for each slot: the worker, the command that it started last, and when.
    NOTES, ROW, NOTE = 64, 42, b"%-11d %-11d %-17.6f\n"

    def __init__(self, path):
        self.path, self.slot = path, None
        self.pid = int(path[:-4].rpartition("-")[2])
        self.fd = open_shared(path, os.O_RDWR)

    @classmethod
    def create(cls, queue_path):
        path = beside(queue_path, "-%d.pid" % os.getpid())
        text = b"%-15d\n%-7s\n%-7s\n" % (os.getpid(), b"", b"")
        while True:
            # Somebody may take the file for a leftover before it is locked.
            with contextlib.suppress(FileNotFoundError):
                os.close(create_private(path, os.O_TRUNC))
                pool = cls(path)
                write_at(pool.fd, text, 0)
                if pool.hold(0) and same_file(pool.fd, path):
                    return pool
                pool.close()

    @classmethod
    def all(cls, queue_path, own=None):
        """Yield every PID file of a queue; each is closed after its turn.

        A process of a pool hands in its OWN, since closing another descriptor of that
        file would drop its locks.
        """
        folder, stem = os.path.split(beside(queue_path, "-"))
        pattern = re.compile(re.escape(stem) + r"[0-9]+\.pid")
        for name in sorted(filter(pattern.fullmatch, os.listdir(folder))):
            path = os.path.join(folder, name)
            if own is None or own.path != path:
                with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                    pool = cls(path)
                    with contextlib.closing(pool):
                        yield pool
        if own:
            yield own

    def hold(self, slot):
        """Be the supervisor, 0, or the worker of a slot; False if there is one."""
        if lock_byte(self.fd, self.LOCKS + slot):
            self.slot = slot
        return self.slot == slot

    def holder(self, slot, slots=1):
        return byte_holder(self.fd, self.LOCKS + slot, slots)

    def alive(self):
        """Tell whether its supervisor or any of its workers lives."""
        return self.holder(0, 1 + MAX_WORKERS) is not None

    def workers(self):
        """Return the pids of its workers."""
        pids = []
        for slot in range(1, 1 + MAX_WORKERS):
            if self.holder(slot, MAX_WORKERS) is None:
                break
            pids.append(self.holder(slot))
        return [pid for pid in pids if pid is not None]

    def note(self, pid, moment):
        """Write down the command that this worker started, in case both are killed.

        On a full disk nobody knows it before it is recorded in the database.
        """
        with contextlib.suppress(OSError):
            note = self.NOTE % (os.getpid(), pid, moment)
            write_at(self.fd, note, self.NOTES + self.ROW * self.slot)

    def notes(self):
        """Return which command each worker started last, and when, by its own pid."""
        text = read_at(self.fd, self.ROW * (MAX_WORKERS + 1), self.NOTES)
        rows = re.findall(rb"([0-9]+) +([0-9]+) +([0-9.]+) *\n", text)
        return {int(own): (int(pid), float(moment)) for own, pid, moment in rows}

    def ask(self, word):
        """Ask the pool to `stop`, or to stop `now`."""
        write_at(self.fd, word.encode(), self.REQUESTS[word])
        self.poke()

    def processes(self):
        """Return the pids of its supervisor and its workers, but not our own."""
        return [pid for pid in (self.holder(0), *self.workers()) if pid]

    def poke(self):
        for pid in self.processes():
            if pid > 0:  # or it is in another container
                poke(pid)

    def request(self):
        """Return what the pool is asked: "now", "stop" or None.

        A pool whose file was removed can never be asked, and one without a supervisor
        has nobody who looks after it: both stop.
        """
        text = read_at(self.fd, 32, 0)
        if b"now" in text:
            return "now"
        supervised = self.pid == os.getpid() or self.holder(0) is not None
        there = supervised and same_file(self.fd, self.path)
        return "stop" if b"stop" in text or not there else None

    def remove(self):
        """Remove the file, unless another process of the pool lives."""
        first = self.slot == 0 or self.hold(0)
        alone = first and lock_byte(self.fd, self.LOCKS + 1, MAX_WORKERS)
        if alone and same_file(self.fd, self.path):
            os.remove(self.path)

    def close(self):
        os.close(self.fd)


if os.name == "nt":
    import ctypes
    import msvcrt
    import subprocess
    from ctypes import wintypes

    # No signal reaches another process here. What POSIX does by signals is done by a
    # named event (to wake) and a job object (to end a run with all its processes, also
    # when its worker dies: so that a free lock means that no process of the run lives).
    KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
    for name in ("CreateFileW", "CreateEventW", "OpenEventW", "CreateMutexW",
                 "CreateJobObjectW", "GetStdHandle"):
        getattr(KERNEL, name).restype = wintypes.HANDLE
    NOWHERE = wintypes.HANDLE(-1).value
    SHARED = 7  # others may read, write, rename and remove it while it is open
    READ, WRITE, APPEND, SYNCHRONIZE = 0x80000000, 0x40000000, 0x4, 0x100000
    OPEN_EXISTING, CREATION = 3, {os.O_EXCL: 1, os.O_TRUNC: 2, 0: 4}
    CREATE_SUSPENDED, EVENT_MODIFY = 0x4, 0x2
    MOST_HANDLES = 64  # that can be waited for at once
    PLACE = 2**40  # of the lock in an output file: far behind what a job prints
    STOP_SIGNALS = POOL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGBREAK)
    TERMINATE = KILL = signal.SIGTERM
    CLOSED_PIPE = (errno.EPIPE, errno.EINVAL)  # the second in most cases
    REUSE_ADDRESS = False  # or two could listen at the same one
    # Not a virtual environment's: that starts Python once more, under another number.
    PYTHON = getattr(sys, "_base_executable", sys.executable)
    CHILDREN = {}  # pid: handle, of all that were started and not yet seen to end

    def granted(value):
        """Return what a call of the system gave, a handle or success, or raise."""
        if not value or value == NOWHERE:
            raise ctypes.WinError(ctypes.get_last_error())
        return wintypes.HANDLE(value)

    def open_as(path, access, how):
        """Open a file so that others can rename and remove it meanwhile."""
        file = KERNEL.CreateFileW(path, access, SHARED, None, how, 0x80, None)
        if file == NOWHERE:
            error = ctypes.WinError(ctypes.get_last_error())
            raise OSError(error.errno, error.strerror.strip(), path, error.winerror)
        return msvcrt.open_osfhandle(file, os.O_BINARY | os.O_NOINHERIT)

    def create_private(path, flags=os.O_EXCL):
        """Open a new file, or a log to append; the folder says who may read it."""
        return open_as(path, READ | (WRITE if flags else APPEND), CREATION[flags])

    def open_shared(path, flags):
        return open_as(path, READ | WRITE, OPEN_EXISTING)

    def read_at(fd, size, offset):
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)

    def write_at(fd, data, offset):
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)

    def try_lock(fd, at, length):
        """Lock bytes, also behind the end of the file; False if one is taken."""
        os.lseek(fd, at, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, length)
            return True
        except OSError:
            return False

    def take_lock(fd, shared=False):
        return try_lock(fd, PLACE, 1)

    @contextlib.contextmanager
    def folder_lock(path, patience=0.0):
        """Let one process at a time change which files a folder has."""
        name = "Local\\queuectl-" + os.path.normcase(path).replace("\\", "/")[-200:]
        mutex = granted(KERNEL.CreateMutexW(None, False, name))
        waited = KERNEL.WaitForSingleObject(mutex, int(1000 * patience))
        try:
            yield waited in (0, 0x80)  # free, or its owner died
        finally:
            KERNEL.ReleaseMutex(mutex)
            KERNEL.CloseHandle(mutex)

    sync_folder = nothing  # here a folder is no file that could be written

    def number_place(at):
        """Return where the pid of a lock's holder stands: outside what it locks."""
        return PoolFile.NOTES + PoolFile.ROW * (at - PoolFile.LOCKS)

    def lock_byte(fd, at, length=1):
        """Lock bytes of a PID file for this process alone; False if it can't."""
        # Somebody may just be looking whether it is locked.
        locked = wait_until(lambda: try_lock(fd, at, length), TICK / 4)
        if locked and length == 1:
            write_at(fd, b"%-11d" % os.getpid(), number_place(at))
        return locked

    def byte_holder(fd, at, length=1):
        """Return the pid of a process that has locked a byte, or None."""
        if try_lock(fd, at, length):
            msvcrt.locking(fd, msvcrt.LK_UNLCK, length)  # from where try_lock went
            return None
        with contextlib.suppress(ValueError):
            return int(read_at(fd, 11, number_place(at)))
        return 0

    def ready_terminal():
        """Let a console take escape sequences, which Windows 10 has to be asked for."""
        for number in (-11, -12):  # standard output and error
            console, mode = KERNEL.GetStdHandle(number), wintypes.DWORD()
            if KERNEL.GetConsoleMode(wintypes.HANDLE(console), ctypes.byref(mode)):
                KERNEL.SetConsoleMode(wintypes.HANDLE(console), mode.value | 4)

    class Limits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION, of which only the flags matter."""

        _fields_ = [
            ("times", ctypes.c_int64 * 2), ("flags", wintypes.DWORD),
            ("sizes", ctypes.c_size_t * 2), ("active", wintypes.DWORD),
            ("affinity", ctypes.c_size_t), ("priority", wintypes.DWORD * 2),
            ("io", ctypes.c_uint64 * 6), ("memory", ctypes.c_size_t * 4),
        ]

    class Process:
        """A child process: a worker, or the command of a run with its job object."""

        def __init__(self, popen, job=None):
            self.popen, self.pid, self.code, self.job = popen, popen.pid, None, job
            self.forced = False
            CHILDREN[self.pid] = int(popen._handle)

        def poll(self):
            self.code = self.popen.poll()
            if self.code is not None:
                CHILDREN.pop(self.pid, None)
            return self.code

        def end(self, number):
            self.forced = True  # there is no other way here
            KERNEL.TerminateJobObject(self.job, 1)

        def group_lives(self):
            accounts = (wintypes.DWORD * 12)()  # the eleventh: active processes
            KERNEL.QueryInformationJobObject(
                self.job, 1, accounts, ctypes.sizeof(accounts), None)
            return accounts[10] > 0

        def let_go(self):
            set_limits(self.job, 0)
            KERNEL.CloseHandle(self.job)

    def set_limits(job, flags):
        limits = Limits(flags=flags)
        granted(KERNEL.SetInformationJobObject(
            job, 9, ctypes.byref(limits), ctypes.sizeof(limits)))

    def start_shell(line, cwd, env, lease=None, input_fd=None, launcher=()):
        """Start a shell command in a job object that ends with this worker.

        It is suspended until it is in the job: its children might escape.
        """
        console = sys.stdin and sys.stdin.isatty() and lease
        stdin = input_fd if input_fd is not None else subprocess.DEVNULL
        path = lease.path if lease else os.devnull
        output = open_as(path, APPEND | SYNCHRONIZE, OPEN_EXISTING)
        added = {name.upper(): value for name, value in env.items()}  # as os.environ's
        if launcher:
            line = '%s cmd /d /s /c "%s"' % (subprocess.list2cmdline(launcher), line)
        try:
            popen = subprocess.Popen(
                line, shell=not launcher, cwd=cwd, env={**os.environ, **added},
                stdin=None if console else stdin, stdout=output, stderr=output,
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP | CREATE_SUSPENDED)
        finally:
            os.close(output)
        process = wintypes.HANDLE(int(popen._handle))
        try:
            job = granted(KERNEL.CreateJobObjectW(None, None))
            set_limits(job, 0x2000)  # KILL_ON_JOB_CLOSE
            granted(KERNEL.AssignProcessToJobObject(job, process))
        except OSError:
            popen.kill()
            raise
        ctypes.WinDLL("ntdll").NtResumeProcess(process)
        child = Process(popen, job)
        if not lease:
            child.let_go()
        return child

    def shell_words(words):
        """Return the line for cmd that runs these words; a single one is a line."""
        return words[0] if len(words) == 1 else subprocess.list2cmdline(words)

    def start_process(function, *args):
        """Run a function in a process of its own, which exits with what it returns."""
        program = (
            "import json, runpy, sys; _, file, name, args = sys.argv; "
            "names = runpy.run_path(file, run_name='queuectl'); "
            "sys.exit(names[name](*json.loads(args)))")
        words = [PYTHON, "-c", program, os.path.abspath(__file__)]
        return Process(subprocess.Popen([*words, function.__name__, json.dumps(args)]))

    def background():
        """Start this command again, detached, and end with how that starts."""
        if os.environ.pop("QUEUECTL_DETACHED", None):
            return leave_terminal
        popen = subprocess.Popen(
            [PYTHON, os.path.abspath(__file__), *sys.argv[1:]],
            env=dict(os.environ, QUEUECTL_DETACHED="1"), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # Not without any console: each worker would open a new one, to be seen.
            creationflags=subprocess.CREATE_NO_WINDOW)
        for line in popen.stdout:
            told = line.decode("utf-8", "replace").strip()
            started = told.startswith(("pool ", "{"))
            print(told, file=sys.stdout if started else sys.stderr, flush=True)
            if started:
                os._exit(0)
        os._exit(popen.wait() or 1)

    keep_descriptors = nothing  # jobs inherit but what they are given

    def wake_name(pid):
        return "Local\\queuectl-wake-%d" % pid

    def poke(pid):
        """Wake a process of a pool."""
        event = wintypes.HANDLE(KERNEL.OpenEventW(EVENT_MODIFY, False, wake_name(pid)))
        KERNEL.SetEvent(event)  # if that process is gone, this does nothing
        KERNEL.CloseHandle(event)

    class Wake:
        """Wait for whichever comes first: an event, a child's end, or a time."""

        def __init__(self):
            name = wake_name(os.getpid())
            self.event = KERNEL.CreateEventW(None, False, False, name)

        def wait(self, timeout):
            """Wait in short steps, between which Python sees Ctrl-C."""
            deadline = time.monotonic() + timeout
            while True:
                handles = [self.event, *CHILDREN.values()][:MOST_HANDLES]
                array = (wintypes.HANDLE * len(handles))(*handles)
                left = min(max(deadline - time.monotonic(), 0.0), TICK)
                woken = KERNEL.WaitForMultipleObjects(
                    len(handles), array, False, int(1000 * left) + 1)
                if woken < MOST_HANDLES or time.monotonic() >= deadline:
                    return

    def catch_signals(handler):
        """Let HANDLER take the signals to stop, and wake."""
        def wake(number, frame):
            handler(number, frame)
            poke(os.getpid())

        for number in STOP_SIGNALS:
            signal.signal(number, wake)

    process_ids = list  # none: job objects end what a dead worker left,
    process_age = leaderless = nothing  # so that no number has to prove anything


# ======================================================================================
# Queue: the database; the only SQL
# ======================================================================================

SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- a deleted job's is never given to another
    id TEXT NOT NULL UNIQUE,
    command TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending'
        CHECK (state = 'pending' OR state = 'processing' OR state = 'completed'
            OR state = 'failed' OR state = 'dead'),
    attempts INTEGER NOT NULL DEFAULT 0,    -- claims that count against max_retries
    max_retries INTEGER NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0,
    run_at REAL NOT NULL,                   -- when it is, or was, due next
    ready INTEGER NOT NULL,                 -- 0 while it waits for run_at, else 1
    timeout REAL,
    cwd TEXT NOT NULL,
    env TEXT,
    launcher TEXT,                          -- in place of the setting
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    run INTEGER NOT NULL DEFAULT 0,         -- number of its latest run; only ever grows
    deaths INTEGER NOT NULL DEFAULT 0,      -- of workers that ran it
    cancelled INTEGER NOT NULL DEFAULT 0,   -- a request, carried out by whoever runs it
    error TEXT                              -- why it is failed or dead
);
CREATE TABLE runs (
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,                -- pid of the worker
    pid INTEGER,                            -- pid and process group of the command
    started_at REAL NOT NULL,
    finished_at REAL,
    exit_code INTEGER,
    error TEXT,
    output BLOB,
    PRIMARY KEY (seq, run)
) WITHOUT ROWID;
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- Jobs in the order in which they are claimed, those that wait for a time, and the few
-- that are neither waiting nor completed: a claim costs the same with a million others.
-- No IN here or above: SQLite builds its list anew for each row, half an insert's time.
CREATE INDEX jobs_ready ON jobs (priority DESC, seq)
    WHERE state = 'pending' AND ready = 1;
CREATE INDEX jobs_waiting ON jobs (run_at) WHERE ready = 0;
CREATE INDEX jobs_rare ON jobs (state, seq)
    WHERE state <> 'pending' AND state <> 'completed';

-- Counting a million rows takes a third of a second: triggers keep the counts, and
-- `enqueue`, for which one a row would cost half of its time.
CREATE TABLE counts (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counts VALUES
    ('pending', 0), ('processing', 0), ('completed', 0), ('failed', 0), ('dead', 0);
CREATE TRIGGER job_moved AFTER UPDATE OF state ON jobs WHEN OLD.state <> NEW.state BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    UPDATE counts SET jobs = jobs + 1 WHERE state = NEW.state;
END;
CREATE TRIGGER job_removed AFTER DELETE ON jobs BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
END;
"""

RARE = "state <> 'pending' AND state <> 'completed'"  # or jobs_rare would not be used
JOB = """SELECT jobs.*, exit_code, started_at, finished_at
         FROM jobs LEFT JOIN runs USING (seq, run) """
BRIEF = "SELECT seq, id, state, updated_at FROM jobs "
BARS = 60  # of the picture of throughput
BINS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # seconds, of run times
NO_JOB = "there is no job "
PAGE = 500  # rows a read; a long read would keep the write-ahead log from being reset


def in_state(state):
    """Return the end of a WHERE for jobs in a state, or for all."""
    rare = "" if state in ("pending", "completed") else " AND " + RARE
    return " AND state = '%s'" % STATES[STATES.index(state)] + rare if state else ""


def missing(path):
    """Tell whether there is no database at PATH yet; an empty file is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return True
    if not stat.S_ISREG(status.st_mode):  # or /dev/null would be replaced by a queue
        raise QueueError("%s is no file, so not a queue" % shown(path))
    return status.st_size == 0


def create_database(path):
    """Make a whole queue beside PATH and move it there: nobody ever sees half of one.

    Sixty first commands at once would else fail: switching a database to write-ahead
    logging does not wait for others.
    """
    home = os.path.dirname(path)
    with folder_lock(home, PATIENCE) as locked:
        if not missing(path):
            return  # another first command was quicker
        if not locked:
            raise QueueError("%s: another program has locked this folder" % shown(home))
        draft = path + ".new"
        # The log of a database that was removed would be taken for the new one's.
        for leftover in (draft, path + "-wal", path + "-shm", path + "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(leftover)
        fd = create_private(draft)
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA application_id = %d" % APPLICATION_ID)
            db.execute("PRAGMA user_version = %d" % SCHEMA_VERSION)
            db.executescript("BEGIN;" + SCHEMA + "COMMIT;")
            # Names the runs' files: those of a queue that was removed are never ours.
            db.execute("INSERT INTO config VALUES ('token', ?)", (os.urandom(4).hex(),))
        os.fsync(fd)
        os.close(fd)
        os.replace(draft, path)
        sync_folder(home)


class Queue:
    """The jobs, their runs and the settings in one SQLite file.

    Every verb that changes a job names the state that it leaves; what it could not move
    was somebody else's, and nothing happens. `clock` returns epoch seconds.
    """

    def __init__(self, path, sync="FULL", patience=PATIENCE, clock=time.time, new=True):
        self.path = os.path.realpath(path)  # one queue, whatever links lead to it
        self.clock, self.patience = clock, patience
        if missing(self.path):
            if not new:  # a pool must not bring back what its user removed
                raise QueueError("%s was removed" % shown(self.path))
            create_database(self.path)
        self.file = os.stat(self.path)
        self.db = sqlite3.connect(self.path, timeout=patience, isolation_level=None)
        try:
            self._check_version()
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA synchronous = %s" % sync)
            self.db.execute("PRAGMA fullfsync = ON")  # macOS: sync for real
            self.token = self._value("SELECT value FROM config WHERE key = 'token'")
        except BaseException:
            self.db.close()
            raise

    def _check_version(self):
        if self._value("PRAGMA application_id") != APPLICATION_ID:
            raise QueueError("%s is not a queue of queuectl" % shown(self.path))
        version = self._value("PRAGMA user_version")
        if version != SCHEMA_VERSION:
            words = "%s has version %d of the schema, and this queuectl knows version"
            words += " %d: take a newer queuectl.py"
            raise QueueError(words % (shown(self.path), version, SCHEMA_VERSION))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.db.close()

    @contextlib.contextmanager
    def transaction(self):
        """Begin, commit, or roll back; a verb used within another's joins it.

        IMMEDIATE takes the write lock before anything is read, so that what a verb has
        read is still true when it writes.
        """
        if self.db.in_transaction:
            yield
            return
        self._begin()
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            self.db.rollback()  # if SQLite has not done so
            raise

    def _begin(self):
        """Take the write lock, however often others are quicker.

        SQLite's own waiting sleeps for milliseconds, several turns of other workers.
        """
        deadline, pause = time.monotonic() + self.patience, 0.0001
        while True:
            try:
                return self._at_once("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)

    def _at_once(self, sql, *values):
        """Execute a statement, or fail at once where another has the write lock."""
        self.db.execute("PRAGMA busy_timeout = 0")
        try:
            return self.db.execute(sql, values)
        finally:
            self.db.execute("PRAGMA busy_timeout = %d" % (1000 * self.patience))

    def _change(self, sql, *values):
        """Execute a statement; how many rows it found to change is the answer."""
        return self.db.execute(sql, values).rowcount

    def _rows(self, sql, *values):
        return self.db.execute(sql, values).fetchall()

    def _value(self, sql, *values):
        row = self.db.execute(sql, values).fetchone()
        return row[0] if row else None

    def wake(self, own=None):
        """Let idle workers look at once instead of within a second; a hint, no more."""
        with contextlib.suppress(OSError):
            for pool in PoolFile.all(self.path, own):
                pool.poke()

    def gone(self):
        """Tell whether the file was removed, or replaced by another queue's."""
        return not still_names(self.path, self.file)

    def check_there(self):
        """Raise QueueError if it is gone: what waits for it would wait for ever."""
        if self.gone():
            raise QueueError("%s was removed" % shown(self.path))

    # -- enqueue -----------------------------------------------------------------------

    def defaults(self, cwd=None):
        """Return the fields of a job that gives none: from the settings, as of now."""
        values = self.settings()
        return dict(
            dict.fromkeys(FIELDS), priority=0,
            max_retries=values["max_retries"], timeout=values["timeout"],
            cwd=checked("cwd", folder, cwd or utf8(os.getcwd())))

    def add(self, command, **fields):
        """Check and enqueue one job, with the fields of its JSON; return its id."""
        job = checked_job(dict(fields, command=command), self.defaults())
        self.enqueue([job])
        return job["id"]

    def enqueue(self, jobs, unique=False):
        """Add jobs as `checked_job` makes them, all or none; return first and last seq.

        JOBS may be a generator: it is read within the transaction. UNIQUE leaves out a
        job whose id waits or runs, and starts one anew that has finished.
        """
        now, job = self.clock(), None

        def rows():
            nonlocal job
            for job in jobs:
                if unique and self._under_way(job["id"]):
                    continue
                job["now"] = now
                if job["id"] is None:
                    job["id"] = self._new_id()
                if job["run_at"] is None:
                    job["run_at"] = min(now + (job["delay"] or 0), MAX_TIME)
                yield job

        with self.transaction():
            try:
                added = self.db.executemany(
                    "INSERT INTO jobs (id, command, max_retries, priority, run_at,"
                    " ready, timeout, cwd, env, launcher, created_at, updated_at)"
                    " VALUES (:id, :command, :max_retries, :priority, :run_at,"
                    " :run_at <= :now, :timeout, :cwd, :env, :launcher, :now, :now)",
                    rows()).rowcount
            except sqlite3.IntegrityError:
                words = "there is a job %s already"
                raise QueueError(words % shown(job["id"])) from None
            count = "UPDATE counts SET jobs = jobs + ? WHERE state = 'pending'"
            self._change(count, added)
            last = self._value("SELECT MAX(seq) FROM jobs") or 0
        self.wake()
        return last - added + 1, last

    def _under_way(self, id):
        """Tell whether a job waits or runs; one that has finished makes room."""
        if id is None:
            raise QueueError("id: missing; a unique job needs one", 2)
        state = self._value("SELECT state FROM jobs WHERE id = ?", id)
        if state in ("completed", "dead"):
            self.delete([id])
        return state in ("pending", "failed", "processing")

    def _new_id(self):
        """Return a short id that no job has, without letters that look alike."""
        while True:
            digits = os.urandom(6)
            name = "".join("23456789bcdfghjkmnpqrstvwxyz"[d % 28] for d in digits)
            if self._value("SELECT 1 FROM jobs WHERE id = ?", name) is None:
                return name

    # -- the life of a job -------------------------------------------------------------

    def claim(self, worker, take_lease):
        """Give the next ready job to a worker, PENDING to PROCESSING; None without one.

        `take_lease(path)` creates and locks the output file of the run. It is called
        before anything is written: a claim that were committed before its lock is held
        would be taken for a dead worker's.
        """
        with self.transaction():
            now = self.clock()
            self.promote(now)
            row = self.db.execute(
                "SELECT seq, id, command, timeout, cwd, env, max_retries, launcher,"
                " attempts + 1 AS attempt, run + 1 AS run FROM jobs"
                " WHERE state = 'pending' AND ready = 1"
                " ORDER BY priority DESC, seq LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            values = self.settings()
            launcher = row["launcher"] or values["launcher"]
            run = dict(row, worker=worker, pid=None, started_at=now,
                       lease=self.lease(row), output_limit=values["output_limit"],
                       launcher=None if launcher == "none" else launcher)
            take_lease(run["lease"])
            self.db.execute(
                "UPDATE jobs SET state = 'processing', attempts = :attempt, run = :run,"
                " updated_at = :started_at WHERE seq = :seq AND state = 'pending'", run)
            self.db.execute(
                "INSERT INTO runs (seq, run, attempt, worker, started_at)"
                " VALUES (:seq, :run, :attempt, :worker, :started_at)", run)
            return run

    def promote(self, now):
        """Make jobs ready whose time has come, FAILED to PENDING; a few at a time.

        A hundred thousand that become due at once would else hold up one claim.
        """
        due = self._rows(
            "SELECT seq FROM jobs WHERE ready = 0 AND run_at <= ?"
            " ORDER BY run_at LIMIT 100", now)
        self.db.executemany(
            "UPDATE jobs SET state = 'pending', ready = 1 WHERE seq = ? AND ready = 0"
            " AND (state = 'pending' OR state = 'failed')", due)

    def complete(self, run, result):
        """PROCESSING to COMPLETED."""
        return self._leave(run, result, "completed", None)

    def fail(self, run, result):
        """PROCESSING to FAILED, to be tried again after the backoff, or to DEAD."""
        if run["attempt"] >= max(1, run["max_retries"]):
            return self._leave(run, result, "dead", result["error"])
        values = self.settings()
        wait = backoff(values["backoff_base"], run["attempt"], values["backoff_max"])
        due = min(self.clock() + wait, MAX_TIME)
        return self._leave(run, result, "failed", result["error"], ready=0, run_at=due)

    def release(self, run, result):
        """PROCESSING back to PENDING; the attempt, no fault of the job, is given back.

        A job whose worker died too often is DEAD: it may be what kills them.
        """
        deaths = self._value("SELECT deaths FROM jobs WHERE seq = ?", run["seq"]) or 0
        deaths += result["error"] == "worker died"
        if deaths >= MAX_DEATHS:
            error = "worker died %d times" % deaths
            return self._leave(run, result, "dead", error, deaths=deaths)
        rest = run["attempt"] - 1
        return self._leave(run, result, "pending", None, attempts=rest, deaths=deaths)

    def owned(self, run):
        """Tell whether a run still owns its job."""
        query = "SELECT 1 FROM jobs WHERE seq = ? AND run = ? AND state = 'processing'"
        return bool(self._value(query, run["seq"], run["run"]))

    def cancelled(self, run):
        """Tell whether a job is to be cancelled: DEAD as soon as its run has ended."""
        return bool(self._value("SELECT cancelled FROM jobs WHERE seq = ?", run["seq"]))

    def _leave(self, run, result, state, error, **changes):
        """Move a job out of PROCESSING if this run still owns it; record the run."""
        with self.transaction():
            if state != "completed" and self.cancelled(run):
                state, error, changes = "dead", "cancelled", {}
            changes.update(state=state, error=error, updated_at=self.clock())
            columns = ", ".join(name + " = ?" for name in changes)
            moved = self._change(
                "UPDATE jobs SET " + columns +
                " WHERE seq = ? AND state = 'processing' AND run = ?",
                *changes.values(), run["seq"], run["run"])
            if moved:
                self.db.execute(
                    "UPDATE runs SET pid = :pid, started_at = :started_at,"
                    " finished_at = :finished_at, exit_code = :exit_code,"
                    " error = :error, output = :output"
                    " WHERE seq = :seq AND run = :run", {**run, **result})
            return state if moved else None

    def note_pid(self, run):
        """Record the process of a run that has been going on for a while.

        It waits for no lock: meanwhile nobody would watch the command.
        """
        self._at_once(
            "UPDATE runs SET pid = ?, started_at = ?"
            " WHERE seq = ? AND run = ? AND finished_at IS NULL",
            run["pid"], run["started_at"], run["seq"], run["run"])

    def cancel(self, ids):
        """PENDING or FAILED to DEAD; of a running job only a request; all or none.

        Return the state of each job by its id.
        """
        with self.transaction():
            self._each(ids, self._cancel, "job %(id)s is %(state)s already")
            states = {id: self.job(id)["state"] for id in ids}
        self.wake()
        return states

    def _cancel(self, job):
        return self._change(
            "UPDATE jobs SET state = 'dead', error = 'cancelled', ready = 1,"
            " updated_at = ? WHERE seq = ? AND state IN ('pending', 'failed')",
            self.clock(), job["seq"],
        ) or self._change(
            "UPDATE jobs SET cancelled = 1 WHERE seq = ? AND state = 'processing'",
            job["seq"])

    def retry(self, ids):
        """DEAD to PENDING with attempts 0, all or none."""
        self._each(ids, self._revive, "job %(id)s is %(state)s, not dead")
        self.wake()

    def retry_all(self):
        """Retry every dead job; return how many there were."""
        pages = self._pages("dead", what=BRIEF)
        count = sum(self._in_slices(self._revive, page) for page in pages)
        self.wake()
        return count

    def _revive(self, job):
        now = self.clock()
        return self._change(
            "UPDATE jobs SET state = 'pending', attempts = 0, deaths = 0,"
            " cancelled = 0, error = NULL, ready = 1, run_at = ?, updated_at = ?"
            " WHERE seq = ? AND state = 'dead'", now, now, job["seq"])

    def delete(self, ids):
        """Remove jobs and their runs, all or none; a running one is refused."""
        self._each(ids, self._remove, "job %(id)s is running")

    def _each(self, ids, verb, refusal):
        """Apply a verb to each of these jobs, all or none."""
        with self.transaction():
            for job in [self.job(id) for id in dict.fromkeys(ids)]:
                if not verb(job):
                    raise QueueError(refusal % dict(job, id=shown(job["id"])))

    def delete_all(self, states, before=MAX_INTEGER, dry_run=False):
        """Remove jobs in these states that last changed before then, or count them."""
        count = 0
        for state in states:
            for page in self._pages(state, what=BRIEF):
                old = [job for job in page if job["updated_at"] < before]
                count += len(old) if dry_run else self._in_slices(self._remove, old)
        self._give_back()
        return count

    def prune(self, keep, first):
        """Remove the jobs of one page that finished more than KEEP seconds ago.

        Return how many, and where the next page begins.
        """
        before = self.clock() - keep
        page = next(self._pages(first=first, what=BRIEF))
        finished = [job for job in page if job["state"] in ("completed", "dead")]
        old = [job for job in finished if job["updated_at"] < before]
        count = self._in_slices(self._remove, old)
        self._give_back()
        return count, page[-1]["seq"] + 1 if page else 1

    def _in_slices(self, verb, jobs):
        """Apply a verb to many jobs, in many transactions; return how many it met.

        A transaction takes some ms and no more: a million jobs, or a few with large
        outputs, would hold up everybody for seconds.
        """
        count, left = 0, list(reversed(jobs))
        while left:
            with self.transaction():
                until = time.monotonic() + SLICE
                while left:
                    count += verb(left.pop())
                    if time.monotonic() >= until:
                        break
        return count

    def _remove(self, job):
        """Delete a job that is still in the state that was read, and its runs."""
        removed = self._change(
            "DELETE FROM jobs WHERE seq = ? AND state = ? AND updated_at = ?"
            " AND state <> 'processing'", job["seq"], job["state"], job["updated_at"])
        if removed:
            self._change("DELETE FROM runs WHERE seq = ?", job["seq"])
        return removed

    def _give_back(self):
        """Return the space of what was removed to the file system, if it is much."""
        for _ in range(self._value("PRAGMA freelist_count") // 1000):
            # As a script, since `execute` ends it after the first page.
            self.db.executescript("PRAGMA incremental_vacuum(1000)")

    # -- reading -----------------------------------------------------------------------

    def job(self, id):
        """Return one job with what its latest run left."""
        rows = self._rows(JOB + "WHERE id = ?", id) if storable(id) else []
        if not rows:
            raise QueueError(NO_JOB + shown(id))
        return rows[0]

    def jobs(self, state=None, limit=0, **pages):
        """Yield jobs, oldest first; LIMIT 0 is all."""
        pages = self._pages(state, min(limit or PAGE, PAGE), **pages)
        return itertools.islice(itertools.chain.from_iterable(pages), limit or None)

    def newest(self, state=None, text="", before="", limit=50):
        """Return jobs that came before one, newest first, with a text in id or command.

        If that one was deleted meanwhile, the newest of all.
        """
        return self._rows(
            JOB + "WHERE seq < COALESCE((SELECT seq FROM jobs WHERE id = ?), ?)"
            " AND (instr(id, ?) OR instr(command, ?))"  # an empty text is in each
            + in_state(state) + " ORDER BY seq DESC LIMIT ?",
            before, MAX_INTEGER, text, text, limit)

    def _pages(self, state=None, size=PAGE, first=1, last=MAX_INTEGER, what=JOB):
        """Yield jobs a page at a time; a long read keeps the log from its reset."""
        where = "WHERE seq BETWEEN ? AND ?" + in_state(state)
        while True:
            page = self._rows(what + where + " ORDER BY seq LIMIT ?", first, last, size)
            yield page
            if len(page) < size:
                return
            first = page[-1]["seq"] + 1

    def runs(self, job):
        """Return the runs of a job, the first one first, without their output."""
        return self._rows(
            "SELECT run, attempt, worker, pid, started_at, finished_at, exit_code,"
            " error FROM runs WHERE seq = ? ORDER BY run", job["seq"])

    def output(self, job, run=None):
        """Return the kept output of a run, the latest one; None while it runs."""
        query = "SELECT output FROM runs WHERE seq = ? AND run = ?"
        return self._value(query, job["seq"], run or job["run"])

    def ahead(self, job):
        """Return how many ready jobs are claimed before this one."""
        return self._value(
            "SELECT COUNT(*) FROM jobs WHERE state = 'pending' AND ready = 1"
            " AND (priority > ? OR priority = ? AND seq < ?)",
            job["priority"], job["priority"], job["seq"])

    def common_errors(self):
        """Return the most common errors of dead jobs, each with its count."""
        return self._rows(
            "SELECT error, COUNT(*) AS jobs FROM jobs WHERE state = 'dead'"
            " AND " + RARE + " GROUP BY error ORDER BY jobs DESC LIMIT 3")

    def processing(self):
        """Return what is running, with the worker that runs it and the lease."""
        rows = self._rows(
            "SELECT seq, run, id, attempts AS attempt, max_retries, worker, pid,"
            " started_at FROM jobs JOIN runs USING (seq, run)"
            " WHERE state = 'processing' AND " + RARE)
        return [dict(row, lease=self.lease(row)) for row in rows]

    def lease(self, job):
        """Return the path of the output file of a job's latest run."""
        name = "%s-%d-%d" % (self.token, job["seq"], job["run"])
        return os.path.join(beside(self.path, ".runs"), name)

    def counts(self):
        """Return how many jobs there are in each state."""
        counts = dict(self._rows("SELECT state, jobs FROM counts"))
        return {state: counts[state] for state in STATES}

    def wait(self, ids=None, timeout=None, tell=lambda counts: None):
        """Wait until jobs, all without IDS, are completed or dead; return their counts.

        None if that takes longer than TIMEOUT seconds. `tell` is called with the counts
        at each look. A job that has ended is not looked at again: it may be removed.
        """
        deadline = time.monotonic() + (MAX_SPAN if timeout is None else timeout)
        states = dict.fromkeys(ids or ())
        while True:
            self.check_there()
            for id, state in states.items():
                if state not in ("completed", "dead"):
                    states[id] = self.job(id)["state"]
            known = list(states.values())
            named = {state: known.count(state) for state in STATES}
            counts = self.counts() if ids is None else named
            tell(counts)
            if not counts["pending"] + counts["processing"] + counts["failed"]:
                return counts
            if time.monotonic() >= deadline:
                return None
            time.sleep(TICK / 2)

    def oldest_ready(self):
        """Return since when the job waits that has been ready longest, None without."""
        return self._value(
            "WITH RECURSIVE level (priority) AS ("
            " SELECT MAX(priority) FROM jobs WHERE state = 'pending' AND ready = 1"
            " UNION ALL SELECT (SELECT MAX(priority) FROM jobs WHERE state = 'pending'"
            "  AND ready = 1 AND jobs.priority < level.priority)"
            " FROM level WHERE priority IS NOT NULL LIMIT 100)"
            " SELECT MIN((SELECT run_at FROM jobs WHERE state = 'pending' AND ready = 1"
            "  AND jobs.priority = level.priority ORDER BY seq LIMIT 1)) FROM level")

    def next_due(self):
        """Return when the next job is due: 0 if one is ready, None if none waits."""
        ready = "SELECT 1 FROM jobs WHERE state = 'pending' AND ready = 1 LIMIT 1"
        if self._value(ready):
            return 0
        return self._value("SELECT MIN(run_at) FROM jobs WHERE ready = 0")

    def drained(self):
        """Tell whether no job is ready, running or waiting for a retry."""
        counts, due = self.counts(), self.next_due()
        busy = counts["processing"] or counts["failed"]
        return not busy and (due is None or due > self.clock())

    def dead_since(self, moment, workers):
        """Tell whether a job that one of these workers ran became dead since then."""
        rows = self.db.execute(
            "SELECT worker FROM jobs JOIN runs USING (seq, run)"
            " WHERE state = 'dead' AND " + RARE + " AND finished_at >= ?", (moment,))
        return any(row["worker"] in workers for row in rows)

    # -- statistics --------------------------------------------------------------------

    def stats(self, since):
        """Return the document of `stats` on the runs that finished since a time.

        Counts are of all of them. What needs sorting is taken from the latest fifty
        thousand: a million would take seconds.
        """
        now = self.clock()
        period = max(now - since, 1.0)
        rows = self._rows(
            "SELECT MIN(CAST((finished_at - ?) / ? AS INTEGER), ?) AS bar,"
            " SUM(error IS NULL) AS completed, SUM(error IS NOT NULL) AS failed,"
            " SUM(attempt > 1) AS retries, SUM(finished_at >= ?) AS latest"
            " FROM runs WHERE finished_at >= ? GROUP BY bar",
            since, period / BARS, BARS - 1, now - 60, since)
        latest = sum(row["latest"] for row in rows)
        total = {key: sum(row[key] for row in rows)
                 for key in ("completed", "failed", "retries")}
        runs = total["completed"] + total["failed"]
        bars = [{"completed": 0, "failed": 0} for _ in range(BARS)]
        for row in rows:
            bars[row["bar"]] = {key: row[key] for key in ("completed", "failed")}
        return {
            "since": iso(since), "seconds": now - since, "runs": runs, **total,
            "success_rate": total["completed"] / runs if runs else None,
            "per_second": runs / period, "per_second_now": latest / min(60, period),
            **self._sample(since), "bar_seconds": period / BARS, "throughput": bars,
        }

    def _sample(self, since):
        """Return what has to be sorted or grouped, from the latest runs."""
        self.db.execute("DROP TABLE IF EXISTS temp.recent")
        self.db.execute(
            "CREATE TEMP TABLE recent AS SELECT command, runs.error,"
            " finished_at - started_at AS spent,"
            " CASE WHEN jobs.run = runs.run"
            "  THEN MAX(started_at - run_at, 0) END AS waited"
            " FROM runs JOIN jobs USING (seq) WHERE finished_at >= ?"
            " ORDER BY seq DESC LIMIT 50000", (since,))
        slowest = self._rows(
            "SELECT command, COUNT(*) AS runs, AVG(spent) AS mean,"
            " MAX(spent) AS longest FROM recent"
            " GROUP BY command ORDER BY mean DESC LIMIT 5")
        errors = self._rows(
            "SELECT error, COUNT(*) AS runs FROM recent WHERE error IS NOT NULL"
            " GROUP BY error ORDER BY runs DESC LIMIT 5")
        between = "SELECT COUNT(*) FROM recent WHERE spent >= ? AND spent < ?"
        bins = zip([-MAX_SPAN, *BINS], [*BINS, None])
        return {
            "run_time": self._spread("spent"), "waiting_time": self._spread("waited"),
            "run_times": [
                {"below": high, "runs": self._value(between, low, high or MAX_SPAN)}
                for low, high in bins],
            "slowest_commands": list(map(dict, slowest)),
            "common_errors": list(map(dict, errors)),
        }

    def _spread(self, what):
        """Return median, 95th percentile and maximum of a column; None without any."""
        known = " FROM recent WHERE %s IS NOT NULL" % what
        count = self._value("SELECT COUNT(*)" + known)
        ordered = "SELECT " + what + known + " ORDER BY %s LIMIT 1 OFFSET ?" % what
        return {name: self._value(ordered, min(int(count * part), count - 1))
                for name, part in (("median", 0.5), ("p95", 0.95), ("longest", 1))}

    # -- settings ----------------------------------------------------------------------

    def settings(self):
        """Return the value of every setting, the default where none was set."""
        given = dict(self._rows("SELECT key, value FROM config"))
        return {name: json.loads(given[name]) if name in given else default
                for name, (_, default, _) in SETTINGS.items()}

    def set(self, name, value):
        query = "INSERT OR REPLACE INTO config VALUES (?, ?)"
        self._change(query, name, json.dumps(value))

    def unset(self, name):
        self._change("DELETE FROM config WHERE key = ?", name)


# ======================================================================================
# Runs: one command; its lease, its output, its end
# ======================================================================================


class Lease:
    """The output file of a run, locked for as long as any process of the run lives."""

    def __init__(self, path):
        self.path = path
        self.cut, self.dropped = b"", 0  # what cut_back kept, and how much it did not
        try:
            self.fd = open_lease(path)
        except (FileNotFoundError, FileExistsError):
            # The folder went with the last pool that stopped; or a worker was killed in
            # the midst of this very claim, and every other would fail on what it left.
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            remove_free(path)
            self.fd = open_lease(path)

    def cut_back(self, limit):
        """Keep the end of an output that has grown past a bound; a disk is finite."""
        size = os.fstat(self.fd).st_size
        if size > max(4 * limit, 2**24):
            kept = read_at(self.fd, limit, size - limit)
            size = os.fstat(self.fd).st_size  # it may have grown, and that is lost, too
            os.ftruncate(self.fd, 0)  # the command appends: its next write lands at 0
            self.dropped += len(self.cut) + size - len(kept)
            self.cut = kept

    def output(self, limit):
        """Return the last bytes of the output; what was dropped before them is said."""
        size = os.fstat(self.fd).st_size
        kept = self.cut + read_at(self.fd, limit, max(0, size - limit))
        kept = kept[max(0, len(kept) - limit) :]
        dropped = self.dropped + len(self.cut) + size - len(kept)
        note = b"[queuectl: %d bytes of output dropped here]\n" % dropped
        return note + kept if dropped else kept

    def discard(self):
        """Let go of the file; a background child may go on writing to it, unseen."""
        with contextlib.suppress(OSError):
            os.remove(self.path)
        os.close(self.fd)


def read_tail(path, limit):
    """Return the last bytes of a file, none if it is not there."""
    with contextlib.suppress(FileNotFoundError), opened(path) as fd:
        return read_at(fd, limit, max(0, os.fstat(fd).st_size - limit))
    return b""


def start_command(run, lease):
    """Start the command of a run; raise OSError where the system refuses."""
    env = json.loads(run["env"] or "{}")
    env.update(QUEUECTL_JOB_ID=run["id"], QUEUECTL_ATTEMPT=str(run["attempt"]))
    env["QUEUECTL_RUN"] = lease.path  # by which run_processes knows its processes
    launcher = ()
    if run["launcher"]:
        import shlex

        launcher = shlex.split(run["launcher"])
    return start_shell(run["command"], run["cwd"], env, lease, launcher=launcher)


def watch(process, wake, timeout, look):
    """Wait for a command; return its exit code, and its error or why it was ended.

    `look()` is called again and again; it says why the command has to end now, if it
    has. Then that gets SIGTERM and, after a grace, SIGKILL, with its whole process
    group; only when that is gone does this return.
    """
    reason, deadline = None, time.monotonic() + (timeout or MAX_SPAN)
    while process.poll() is None or (reason and process.group_lives()):
        pause = TICK if reason is None else TICK / 10  # a group's end wakes nobody
        wake.wait(min(pause, deadline - time.monotonic()))
        if process.poll() is not None and reason is None:
            break
        asked, late = look(), time.monotonic() >= deadline
        if late or (asked and reason is None):
            process.end(KILL if reason else TERMINATE)
            reason = reason or asked or "timeout %ss" % number(timeout)
            deadline = time.monotonic() + GRACE
    process.let_go()
    code, error = how_it_ended(process.code)
    return code, reason or error


class Hooks:
    """The `on_dead` commands of a process; that one fails is logged, no more."""

    def __init__(self, log):
        self.log, self.running = log, []

    def start(self, queue, id):
        """Start the command, if one is set, with a dead job's JSON as its input.

        Nobody waits for it, and it outlives its pool; what it prints is dropped.
        """
        import tempfile

        try:
            line, job = queue.settings()["on_dead"], queue.job(id)
            if not line or job["state"] != "dead" or job["error"] == "cancelled":
                return
            self.wait_for_room(MAX_HOOKS)
            with tempfile.TemporaryFile() as text:
                text.write(json.dumps(public(job)).encode())
                text.seek(0)
                folder = os.path.dirname(queue.path)
                hook = start_shell(line, folder, {}, input_fd=text.fileno())
                self.running.append(hook)
        except (sqlite3.Error, QueueError, OSError) as error:
            self.log.error("on_dead for %s: %s", shown(id), error)

    def reap(self):
        for hook in self.running:
            if hook.poll():
                self.log.error("on_dead: %s", how_it_ended(hook.code)[1])
        self.running = [hook for hook in self.running if hook.code is None]
        return len(self.running)

    def wait_for_room(self, most):
        """Wait a while until fewer than so many run.

        A command that hangs would else be started for each of a thousand dead jobs.
        """
        wait_until(lambda: self.reap() < most, GRACE)


def how_it_ended(code):
    """Return exit code and error of a command by what `Process.poll` says."""
    if code < 0:
        return None, "signal %d" % -code
    return code, "exit %d" % code if code else None


def number(value):
    """Return a number as text, without a fraction of zero."""
    return "%d" % value if value == int(value) else "%g" % value


# ======================================================================================
# Worker: claim, run, record, again
# ======================================================================================


class Worker:
    """One process of a pool; it runs one job at a time."""

    def __init__(self, path, pool, slot, drain, log):
        self.path, self.drain, self.log = path, drain, log
        self.pool, self.hooks = pool, Hooks(log)
        self.queue = self.lease = self.trouble = None
        self.stopped = False
        catch_signals(self.stop)
        self.wake = Wake()
        if not pool.hold(slot):
            raise QueueError("worker %d is there already" % slot)

    def stop(self, number, frame):
        if number == signal.SIGTERM:  # what a terminal's mean, the supervisor says
            self.stopped = True

    def work(self):
        """Run jobs until asked to stop or drained; return whether it was the latter."""
        self.queue = self.patiently(
            lambda: Queue(self.path, "NORMAL", IDLE_WAIT, new=False))
        with self.queue:
            done = None
            while True:
                run = self.patiently(self.turn, done)
                if run:
                    done = run, self.execute(run)
                elif self.leaving():
                    return False
                elif self.drain and self.queue.drained():
                    return True
                else:
                    done = None
                    self.wake.wait(self.pause())

    def patiently(self, action, *args):
        """Try until it works: a full disk or a lock costs time, never a result."""
        while True:
            try:
                result = action(*args)
                if self.trouble:
                    self.log.info("going on")
                self.trouble = None
                return result
            except (sqlite3.Error, OSError) as error:
                if self.trouble and self.giving_up():
                    raise QueueError("leaving while there is still: %s" % error)
                if str(error) != self.trouble:
                    self.log.error("%s; waiting until it is over", error)
                self.trouble = str(error)
            self.wake.wait(IDLE_WAIT)

    def giving_up(self):
        """Tell whether to leave in trouble; a result in hand is kept until `now`."""
        return self.leaving() and (not self.lease or self.pool.request() == "now")

    def leaving(self):
        return self.stopped or self.pool.request() or (self.queue and self.queue.gone())

    def pause(self):
        due = self.queue.next_due()
        return IDLE_WAIT if due is None else min(due - self.queue.clock(), IDLE_WAIT)

    def turn(self, done):
        """Record the end of one run and claim the next, in one transaction."""
        finished, self.lease = self.lease, None
        try:
            with self.queue.transaction():
                state = self.record(*done) if done else None
                leaving = self.leaving()
                run = None if leaving else self.queue.claim(os.getpid(), self.take)
        except BaseException:
            if self.lease:
                self.lease.discard()
            self.lease = finished
            raise
        if done:
            finished.discard()
            self.report(state, *done)
        self.hooks.reap()
        return run

    def take(self, path):
        self.lease = Lease(path)

    def record(self, run, result):
        if result["error"] == "stop --now":
            return self.queue.release(run, result)
        if result["error"] is None:
            return self.queue.complete(run, result)
        return self.queue.fail(run, result)

    def report(self, state, run, result):
        """Write a line to the log; a result that came too late is said and dropped."""
        words = state or "no longer ours, result dropped"
        if result["error"]:
            words += " (%s)" % result["error"]
        spent = result["finished_at"] - run["started_at"]
        self.log.info("%s %s in %.3f s", about(run), words, spent)
        if state == "dead":
            self.hooks.start(self.queue, run["id"])

    def execute(self, run):
        """Run a claimed job; return its result."""
        began = time.monotonic()
        try:
            process = start_command(run, self.lease)
        except (OSError, ValueError) as refusal:
            code, error = None, "cannot start: %s" % refusal
        else:
            # Not when it was claimed: by this moment its process is told from others.
            run.update(pid=process.pid, started_at=self.queue.clock())
            self.pool.note(run["pid"], run["started_at"])
            code, error = self.attend(process, run)
            if process.forced and run["launcher"]:
                words = "%s: the launcher was killed; what it started may live on"
                self.log.warning(words, about(run))
        return dict(
            exit_code=code, error=error,
            output=self.lease.output(run["output_limit"]),
            finished_at=run["started_at"] + time.monotonic() - began)

    def attend(self, process, run):
        """Wait for a command, its output and the requests that concern it in view."""
        noted = False

        def look():
            nonlocal noted
            self.lease.cut_back(run["output_limit"])
            with contextlib.suppress(sqlite3.Error):
                if not noted:
                    self.queue.note_pid(run)
                    self.log.info("%s goes on, pid %d", about(run), run["pid"])
                    noted = True
            if self.pool.request() == "now":
                return "stop --now"
            with contextlib.suppress(sqlite3.Error):
                return "cancelled" if self.queue.cancelled(run) else None

        return watch(process, self.wake, run["timeout"], look)


def about(run):
    """Return job and attempt of a run, for the log."""
    return "%s %d/%d" % (shown(run["id"]), run["attempt"], max(1, run["max_retries"]))


# ======================================================================================
# Supervisor: the log, starting and stopping workers, recovery
# ======================================================================================


class LogFile:
    """A stream for `logging` that processes share; a full one becomes PATH.1."""

    def __init__(self, path, limit=LOG_LIMIT):
        self.path, self.limit = os.path.abspath(path), limit
        self.fd = create_private(path, 0)

    def write(self, text):
        if not same_file(self.fd, self.path):
            self.reopen()  # another process renamed it, or somebody removed it
        os.write(self.fd, text.encode("utf-8", "backslashreplace"))
        if os.fstat(self.fd).st_size > self.limit:
            self.rotate()

    flush = nothing  # each line was written at once

    def rotate(self):
        """Rename a full log, once, however many processes see that it is full."""
        with folder_lock(os.path.dirname(self.path)) as locked:
            if locked and same_file(self.fd, self.path):
                os.replace(self.path, self.path + ".1")
        self.reopen()

    def reopen(self):
        fresh = create_private(self.path, 0)  # if this fails, the old one is still ours
        os.close(self.fd)
        self.fd = fresh


def open_log(queue_path, who):
    """Return this process's logger: to the queue's log, or else to standard error."""
    import logging

    logging.raiseExceptions = False  # a full disk must not stop a pool
    # Python's logging HOWTO, "Optimization": what no line shows is not gathered.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    try:
        stream = LogFile(beside(queue_path, ".log"))
    except OSError as error:
        stream = sys.stderr
        say("cannot write the log, logging here instead: %s" % error)
    layout = "%%(asctime)s %%(levelname)s %s[%d] %%(message)s" % (who, os.getpid())
    logging.basicConfig(stream=stream, level=logging.INFO, format=layout, force=True)
    return logging.getLogger()


def say(message):
    with contextlib.suppress(OSError):  # nobody listens any more
        print("queuectl: %s" % message, file=sys.stderr, flush=True)


class Supervisor:
    """A pool: starts workers, replaces those that die, looks after what they left.

    It holds no database open while it forks: SQLite must not cross a fork.
    """

    def __init__(self, path, count, drain=False, tell=None):
        self.path, self.count, self.drain = os.path.realpath(path), count, drain
        self.tell = tell  # is called with the queue twice a second
        self.runs = beside(self.path, ".runs")
        self.workers = {}  # slot: process
        self.pids = set()  # of all workers there ever were
        self.started = {}  # slot: when its worker was started last
        self.drained = set()  # slots whose worker found nothing left to do
        self.orphans = {}  # lease: when the processes of its run get SIGKILL
        self.unseen = False  # whether a worker died and nobody looked yet what it ran
        self.next_look = 0.0
        self.looked = True  # whether the last look could be finished
        self.next_page = 1  # of the jobs that `keep` may remove
        self.signals, self.signalled = 0, -MAX_SPAN  # how many, and when the last
        self.removed = False

    def run(self, started):
        """Run the pool until it is asked to stop or drained; return the exit code.

        `started()` is called when it can be found and asked.
        """
        catch_signals(self.count_signal)
        keep_descriptors()
        self.wake = Wake()
        with Queue(self.path) as queue, folder_lock(os.path.dirname(self.path)):
            self.file, self.began = queue.file, queue.clock()
        self.pool = PoolFile.create(self.path)
        try:
            self.log = open_log(self.path, "pool")
            self.hooks = Hooks(self.log)
            self.log.info("pool of %d started", self.count)
            started()
            self.loop()
            failed = self.patiently(self.finish) or self.removed
            self.log.info("pool stopped")
        finally:
            self.pool.ask("stop")  # whatever happened here, no worker goes on alone
            for number in POOL_SIGNALS:  # at its end Python gives up its handlers
                signal.signal(number, signal.SIG_IGN)
            self.pool.remove()
            with contextlib.suppress(OSError):  # not empty, other pools use it
                os.rmdir(self.runs)
        return 1 if failed else 0

    def count_signal(self, number, frame):
        """Count it, unless it is the same one: timeout(1) signals us and our group."""
        now = time.monotonic()
        if now - self.signalled > TICK:
            self.signals, self.signalled = self.signals + 1, now

    def loop(self):
        self.staff()
        while True:
            if self.signals:  # the first asks to stop, a second to stop now
                self.ask("stop" if self.signals == 1 else "now")
            self.reap()
            if time.monotonic() >= self.next_look:
                self.looked = self.patiently(self.keep_house)
                pause = 0.5 if self.tell else LOOK_EVERY
                self.next_look = time.monotonic() + (TICK if self.orphans else pause)
            if not self.unseen:  # or a new worker's first note would replace the last
                self.staff()
            ended = self.pool.request() or len(self.drained) == self.count
            if ended and not self.workers and not self.looking():
                return
            self.wake.wait(self.next_look - time.monotonic())

    def looking(self):
        """Tell whether orphans, or what a dead worker ran, have to be looked for.

        Of a queue that was removed nobody can tell any more; and where it can't be read
        the next pool has to, if this one shall stop now.
        """
        can_tell = self.looked or self.pool.request() != "now"
        return (self.orphans or self.unseen) and can_tell and not self.removed

    def ask(self, word):
        if self.pool.request() not in (word, "now"):
            self.log.info("asked to %s", {"now": "stop now"}.get(word, word))
            self.pool.ask(word)

    def reap(self):
        for slot, process in list(self.workers.items()):
            code = process.poll()
            if code is None:
                continue
            del self.workers[slot]
            if code == DRAINED:
                self.drained.add(slot)
                self.pool.poke()  # the others may be waiting for what this one ran
            elif code:
                self.log.error("worker %d died: %s", slot, how_it_ended(code)[1])
                self.unseen, self.next_look = True, 0.0

    def staff(self):
        """Start the workers that are missing; one that keeps dying not too often."""
        now = time.monotonic()
        for slot in range(1, self.count + 1):
            if slot in self.workers or slot in self.drained or self.pool.request():
                continue
            due = self.started.get(slot, -MAX_SPAN) + RESTART_EVERY
            if now >= due:
                self.started[slot] = now
                try:
                    args = self.path, self.pool.path, slot, self.drain
                    self.workers[slot] = start_process(work, *args)
                    self.pids.add(self.workers[slot].pid)
                except OSError as error:  # too many processes or files
                    self.log.error("worker %d cannot start: %s", slot, error)
            self.next_look = min(self.next_look, max(due, now))

    def patiently(self, action):
        """Do something with the database; with trouble there, the next look will."""
        try:
            if not self.gone():
                with Queue(self.path, "NORMAL", IDLE_WAIT, new=False) as queue:
                    return action(queue)
        except (sqlite3.Error, OSError, QueueError) as error:
            self.log.error("%s", error)

    def gone(self):
        """Notice that the database was removed or replaced; the pool then stops."""
        removed = not still_names(self.path, self.file)
        if removed and not self.removed:
            self.removed = True
            self.ask("stop")
            say("%s was removed; this pool stops" % shown(self.path))
        return removed

    def keep_house(self, queue):
        self.look(queue)
        self.tidy(queue)
        self.hooks.reap()
        keep = queue.settings()["keep"]
        removed = keep is not None  # one page at least, and more while they are old
        until = time.monotonic() + TICK
        while removed and time.monotonic() < until:
            removed, self.next_page = queue.prune(keep, self.next_page)
        if self.tell:
            self.tell(queue)
        return True

    def look(self, queue):
        """Look for jobs in PROCESSING that nobody runs."""
        # First the runs, then the workers: one that claimed a run was there before it.
        runs = queue.processing()
        workers, pools, notes = set(), {os.getpid()}, {}
        for pool in PoolFile.all(self.path, self.pool):
            workers.update(pool.workers())
            pools.update(pool.processes())
            notes.update(pool.notes())
        lost = {run["lease"]: run for run in runs if not attended(run, workers)}
        found = run_processes(lost) if lost else {}
        for path, run in lost.items():
            # A worker whose PID file was removed still holds its lease; in a container
            # it calls itself by another number. A pool that the run started is let be.
            holders = {pid for pid, holds in found[path].items() if holds}
            if holders.isdisjoint({*workers, run["worker"]}):
                self.identify(queue, run, *notes.get(run["worker"], (None, 0)))
                self.rescue(queue, run, found[path].keys() - pools)
        leases = {run["lease"] for run in runs}
        self.orphans = {key: at for key, at in self.orphans.items() if key in leases}
        self.unseen = False

    def identify(self, queue, run, pid, moment):
        """Record the command of a run that was killed before its worker did so."""
        noted = moment >= run["started_at"]  # or it is an earlier run's
        if not run["pid"] and noted and started_with(pid, moment):
            run.update(pid=pid, started_at=moment)
            with queue.transaction():  # it waits for others, as note_pid alone does not
                queue.note_pid(run)

    def rescue(self, queue, run, processes):
        """Put a job back whose worker is gone, once none of its processes is left."""
        processes |= by_number(run, not processes and queue.cancelled(run))
        # It may have ended since it was listed; its background children are let be.
        if processes and queue.owned(run):
            self.end_orphan(run, processes)
        elif not processes:
            with queue.transaction():
                free = lease_is_free(run["lease"])
                state = free and queue.release(run, self.remains(queue, run))
            if state:
                self.log.warning("%s worker died, %s", about(run), state)
                remove_free(run["lease"])
                queue.wake(self.pool)
            if state == "dead":
                self.hooks.start(queue, run["id"])

    def end_orphan(self, run, processes):
        """Signal what a dead worker left running: SIGTERM, after a grace SIGKILL."""
        due, now = self.orphans.get(run["lease"]), time.monotonic()
        if due is None or now >= due:
            self.orphans[run["lease"]] = now + GRACE
            words = "did not end and was killed:" if due else "worker died, ending"
            self.log.warning("%s %s %s", about(run), words, sorted(processes))
            signal_processes(processes, KILL if due else TERMINATE)

    def remains(self, queue, run):
        """Return the result of a run whose worker died."""
        output = read_tail(run["lease"], queue.settings()["output_limit"])
        return dict(exit_code=None, error="worker died", output=output,
                    finished_at=queue.clock())

    def tidy(self, queue):
        """Remove output files of no run, and PID files of killed pools.

        Not one whose notes may be the only trace of what a lost run has started.
        """
        with queue.transaction():  # no claim is under way meanwhile
            runs = queue.processing()
            leases = {run["lease"] for run in runs}
            workers = {run["worker"] for run in runs}
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(self.runs):
                    path = os.path.join(self.runs, name)
                    if path not in leases:
                        remove_free(path)
            for pool in PoolFile.all(self.path, self.pool):
                dead = pool is not self.pool and not pool.alive()
                if dead and workers.isdisjoint(pool.notes()):
                    pool.remove()

    def finish(self, queue):
        """Tell whether a drained pool leaves a job that ended dead."""
        self.tidy(queue)
        return self.drain and queue.dead_since(self.began, self.pids)


def attended(run, workers):
    """Tell whether a run may well have its worker: its lease is held, and it is there.

    Another user's lease can't be looked at: that is a matter of that user's pools.
    """
    free = lease_is_free(run["lease"], missing=False)
    there = run["worker"] in workers or was_there(run["worker"], run["started_at"])
    return free is None or (not free and there)


def by_number(run, unproven):
    """Return what is known of a lost run by its recorded number alone.

    It is a process that started with it; or, if that is gone and something holds the
    lease yet, its process group. The group is no proof, so that only a user's `cancel`
    takes it for one, and only where there is no better.
    """
    pid = run["pid"]
    if pid and started_with(pid, run["started_at"]):
        return {pid}
    held = lease_is_free(run["lease"]) is False
    return {-pid} if pid and unproven and held and leaderless(pid) else set()


def work(path, pool_path, slot, drain):
    """Be a worker, in a process of its own; return its exit code."""
    log = open_log(path, "worker-%d" % slot)
    try:
        worker = Worker(path, PoolFile(pool_path), slot, drain, log)
        drained = worker.work()
        worker.hooks.wait_for_room(1)  # or their failure would not be logged
        return DRAINED if drained else 0
    except (QueueError, OSError) as error:
        log.error("%s", error)
    except Exception:
        log.exception("worker %d failed", slot)
    return 1


# ======================================================================================
# Output: values to text
# ======================================================================================


def dated(row, *names):
    """Return a row as JSON shows it, the times of these names as text."""
    return dict(row, **{name: iso(row[name]) for name in names})


def span(seconds):
    """Return a duration in one or two units: 0.2s, 12s, 3m 20s, 2h 5m, 4d 1h."""
    if seconds < 10:
        return "%.1fs" % max(0.0, seconds)
    rest, parts = int(seconds), []
    for unit in "dhms":
        count, rest = divmod(rest, UNITS[unit])
        if count or parts:
            parts.append("%d%s" % (count, unit))
    return " ".join(parts[:2])


def fine(seconds):
    """Return a duration that may be short: 0.043s, 2.5s, 3m 20s."""
    return "%.2gs" % seconds if seconds < 10 else span(seconds)


def when(moment, now):
    """Return a time as people say it: 2m 5s ago, in 4.0s."""
    return span(now - moment) + " ago" if moment <= now else "in " + span(moment - now)


def many(count, noun):
    """Return a count with its noun: 1 job, 2 jobs."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return "%d %s" % (count, noun if count == 1 else plural)


def setting_text(name, value):
    if value is None:
        return "forever" if name == "keep" else "none"
    return shown(value) if isinstance(value, str) else number(value)


def run_line(run, now):
    """Return a line on one run: its attempt, when it was, how it ended."""
    words = "run %(run)d: attempt %(attempt)d, " % run
    if run["finished_at"] is None:
        return words + "running for " + span(now - run["started_at"])
    spent = span(run["finished_at"] - run["started_at"])
    end = shown(run["error"] or "exit 0")
    return words + "%s, %s after %s" % (when(run["started_at"], now), end, spent)


def plot(values):
    """Return a bar for each value, all to the same scale; one character each."""
    steps, top = blocks(" ▁▂▃▄▅▆▇█", " .:-=+*#@"), max([*values, 1])
    return "".join(steps[-(-value * 8 // top)] for value in values)


def blocks(these, ascii):
    """Return characters for a picture that the standard output can show."""
    try:
        these.encode(sys.stdout.encoding or "ascii")
        return these
    except UnicodeEncodeError:
        return ascii


def stats_lines(stats, width):
    period = span(stats["seconds"])
    yield "%s in %s: %d completed, %d failed, %s" % (
        many(stats["runs"], "run"), period, stats["completed"], stats["failed"],
        many(stats["retries"], "retry"))
    if not stats["runs"]:
        return
    rates = stats["per_second_now"], stats["per_second"], period
    yield "%.1f %% succeed; %.2f/s in the last minute, %.2f/s in %s" % (
        100 * stats["success_rate"], *rates)
    for name, title in (("run_time", "run time"), ("waiting_time", "waiting time")):
        spread = [fine(value or 0) for value in stats[name].values()]
        yield "%s: median %s, 95 %% within %s, longest %s" % (title, *spread)
    bars = [bar["completed"] + bar["failed"] for bar in stats["throughput"]]
    share = -(-len(bars) // max(1, width - 12))  # bars a character
    sums = [sum(bars[at : at + share]) for at in range(0, len(bars), share)]
    yield "throughput  " + plot(sums)
    yield ""
    yield from histogram(stats["run_times"], width)
    for row in stats["slowest_commands"]:
        words = (fine(row["mean"]), many(row["runs"], "run"), shown(row["command"]))
        yield ("slow: %8s on average of %s: %s" % words)[:width]
    for row in stats["common_errors"]:
        yield ("error: %d x %s" % (row["runs"], shown(row["error"])))[:width]


def histogram(bins, width):
    """Yield a line for each bin of run times, from the first to the last in use."""
    used = [at for at, bin in enumerate(bins) if bin["runs"]]
    most, bar = max(bin["runs"] for bin in bins), blocks("█", "#")
    for bin in bins[used[0] : used[-1] + 1]:
        below = "longer" if bin["below"] is None else "< %gs" % bin["below"]
        length = -(-bin["runs"] * max(1, width - 24) // most)
        yield "%-10s  %s %d" % (below, bar * length, bin["runs"])
    yield ""


DIED = "its worker died; a pool puts it back"
LOST = "no pool seen from here runs it; one puts it back when its processes have ended"
NO_POOL = "no pool is running; to start one: queuectl.py worker start"


def why_waiting(queue, job, pools):
    """Return in words why a job is not running, None if that is no question."""
    no_pool = "" if pools else "; " + NO_POOL
    if job["state"] == "processing":
        busy = job["id"] in [worker["job"] for worker in pools]
        if busy or not queue.owned(job):
            return None
        free = lease_is_free(queue.lease(job), missing=False)
        return (DIED if free else LOST) + no_pool
    if job["state"] not in ("pending", "failed"):
        return None
    if not job["ready"]:
        what = "try %d" % (job["attempts"] + 1) if job["attempts"] else "due"
        return "%s %s%s" % (what, when(job["run_at"], queue.clock()), no_pool)
    if not pools:
        return NO_POOL
    ahead = queue.ahead(job)
    return many(ahead, "job") + " before it" if ahead else "next in line"


def progress(counts, done, spent):
    """Return a line on how far a queue is, with DONE jobs more in SPENT seconds."""
    running, waiting = counts["processing"], counts["pending"] + counts["failed"]
    line = "completed %d, dead %d, running %d, waiting %d" % (
        counts["completed"], counts["dead"], running, waiting)
    if done <= 0 or spent <= 0:
        return line
    left = span((running + waiting) * spent / done)
    return line + ", %.1f/s, %s left" % (done / spent, left)


def table(titles, rows, width=None):
    """Yield the lines of a table, cut to a width; the last column is not padded.

    Widths come from the first page of rows, so that a million can be streamed.
    """
    rows = iter(rows)
    page = list(itertools.islice(rows, PAGE))
    widths = [max(map(len, column)) for column in zip(titles, *page)]
    layout = "  ".join("%%-%ds" % width for width in widths[:-1]) + "  %s"
    first = len(layout % tuple(titles)) - len(titles[-1])  # what is never cut
    for row in itertools.chain([titles], page, rows):
        yield (layout % tuple(row))[: width and max(width, first + 8)]


def job_table(jobs, now, changed, *fields):
    """Return the lines of a table of jobs that ends with these fields."""
    titles = ["ID", "STATE", "TRIES", changed, *map(str.upper, fields)]
    rows = (
        [shown(job["id"]), job["state"],
         "%d/%d" % (job["attempts"], max(1, job["max_retries"])),
         when(job["updated_at"], now), *[shown(job[name]) for name in fields]]
        for job in jobs)
    return table(titles, rows, terminal_width(sys.stdout))


def terminal_width(stream):
    """Return how many columns there are, None if the stream is no terminal."""
    try:  # one that nobody told its size says 0
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return None


COLOURS = {"processing": 36, "completed": 32, "failed": 33, "dead": 31}  # as ANSI has


def painter():
    """Return what gives a line the colour of its state: on a terminal that wants it."""
    if terminal_width(sys.stdout) is None or os.environ.get("NO_COLOR"):
        return str
    state = re.compile(r"\b(%s)(?=: [1-9]| +\d+/\d+  )" % "|".join(COLOURS), re.I)

    def painted(match):
        return "\x1b[%dm%s\x1b[0m" % (COLOURS[match.group().lower()], match.group())

    return lambda line: state.sub(painted, line, 1)


class Live:
    """A line on a terminal that is drawn again and again; elsewhere nothing of it."""

    def __init__(self):
        self.began = time.monotonic()
        self.first = None  # how many jobs were done when it began

    def progress(self, counts):
        width = terminal_width(sys.stderr)
        if width:
            done = counts["completed"] + counts["dead"]
            self.first = done if self.first is None else self.first
            spent = time.monotonic() - self.began
            line = progress(counts, done - self.first, spent)[: width - 1]
            print(end="\r\x1b[K" + line, file=sys.stderr, flush=True)

    def close(self):
        """Leave the last line as it is and go on below it."""
        if self.first is not None:
            print(file=sys.stderr)


def answer(args, value, *lines):
    """Print the answer of a command: one JSON document, or else lines for people."""
    for line in [json.dumps(value)] if args.json else map(painter(), lines):
        print(line)


def answer_jobs(args, jobs, lines):
    """Print an array of jobs, or else lines made of them; a million cost no memory."""
    if not args.json:
        for line in map(painter(), lines):
            print(line)
        return
    print(end="[")
    for index, job in enumerate(jobs):
        print(end=(", " if index else "") + json.dumps(public(job)))
    print("]")


# ======================================================================================
# Commands: one function each
# ======================================================================================


def cmd_enqueue(args, queue):
    options, names = enqueue_options(args), []
    defaults = queue.defaults(args.cwd)  # we may be in a folder that is gone

    def made(given):
        job = checked_job(overridden(given, options), defaults)
        if args.unique:
            names.append(job["id"])
        return job

    with contextlib.ExitStack() as files:
        if args.file or args.jobs == ["-"]:
            jobs = read_lines(files.enter_context(spooled(args.file)), made)
        else:
            jobs = read_arguments(args.jobs or ["{}"], made)
        first, last = queue.enqueue(jobs, args.unique)
    if args.unique:
        jobs = [queue.job(name) for name in names]
    else:
        jobs = queue.jobs(first=first, last=last, what=JOB if args.json else BRIEF)
    answer_jobs(args, jobs, (
        "enqueued " + shown(job["id"]) if job["seq"] >= first
        else "%s is there already, %s" % (shown(job["id"]), job["state"])
        for job in jobs))


def enqueue_options(args):
    """Return the job fields that options and a command line give."""
    sources = [args.jobs, args.file, args.command, args.words]
    if sum(map(bool, sources)) != 1:
        words = "enqueue: %s (see: queuectl.py enqueue --help)"
        several = "give jobs, a command behind --, or --file"
        raise QueueError(words % (several if any(sources) else "no job"), 2)
    given = dict(vars(args), env=dict(args.env) if args.env else None)
    if args.words:
        given["command"] = shell_words(args.words)
    return {name: given[name] for name in FIELDS if given[name] is not None}


def overridden(given, options):
    """Return a job with what options say in place of its own fields."""
    if not options or type(given) is not dict:
        return given
    if "delay" in options or "run_at" in options:
        given = dict(given, delay=None, run_at=None)
    return {**given, **options}


def read_arguments(texts, made):
    """Yield the jobs that are made of JSON texts, each an object or an array."""
    for text in texts:
        given = parsed(text)
        yield from map(made, given if isinstance(given, list) else [given])


def read_lines(lines, made):
    """Yield the jobs of an array or of JSON Lines; a refusal names the line."""
    count = 0
    try:
        for count, line in enumerate(lines, 1):
            if line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[":
                yield from map(made, parsed(line + lines.read()))
            elif not line.isspace():
                yield made(parsed(line))
    except QueueError as error:
        raise QueueError("line %d: %s" % (count, error), error.code) from None


@contextlib.contextmanager
def spooled(path):
    """Open a file of jobs, or standard input, read to its end.

    A slow producer at the other end of a pipe would else keep the database locked.
    """
    import shutil
    import tempfile

    with tempfile.SpooledTemporaryFile(2**24) as spool:
        stdin = contextlib.nullcontext(sys.stdin.buffer)
        with open(native(path), "rb") if path else stdin as source:
            shutil.copyfileobj(source, spool)
        spool.seek(0)
        yield spool


def cmd_list(args, queue):
    jobs = queue.jobs(args.state, args.limit)
    answer_jobs(args, jobs, job_table(jobs, queue.clock(), "CHANGED", "command"))


def cmd_dlq_list(args, queue):
    if not args.json:
        errors = ["%(jobs)d x %(error)s" % row for row in queue.common_errors()]
        print(shown(", ".join(errors)), end="\n" if errors else "")
    jobs = queue.jobs("dead")
    answer_jobs(args, jobs, job_table(jobs, queue.clock(), "DIED", "error", "command"))


def cmd_show(args, queue):
    job, now = queue.job(args.id), queue.clock()
    fields, runs = public(job), queue.runs(job)
    for name in TIMES:
        if job[name] is not None:
            fields[name] += ", " + when(job[name], now)
    fields["env"] = " ".join("%s=%s" % pair for pair in fields["env"].items())
    fields["waiting"] = why_waiting(queue, job, worker_list(queue))
    lines = ["%-12s %s" % (name + ":", shown(str(value)))
             for name, value in fields.items() if value not in (None, "")]
    lines += [run_line(run, now) for run in runs]
    answer(args, job_document(job, runs), *lines)


def cmd_logs(args, queue):
    if args.follow:
        if args.json or args.attempt:
            raise QueueError("logs: --follow goes with neither --json nor --attempt", 2)
        return follow(queue, args.id)
    job = queue.job(args.id)
    if not job["run"]:
        say("job %s has not run yet" % shown(job["id"]))
    run = run_of(queue, job, args.attempt) if args.attempt else None
    if args.json:
        print(json.dumps(output_document(queue, job, run)))
    else:
        write_bytes(output_of(queue, job, run))


def run_of(queue, job, attempt):
    """Return the number of the latest run that was a job's n-th attempt."""
    runs = [run["run"] for run in queue.runs(job) if run["attempt"] == attempt]
    if not runs:
        raise QueueError("job %s has no attempt %d" % (shown(job["id"]), attempt))
    return runs[-1]


def write_bytes(output):
    sys.stdout.flush()
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def follow(queue, id):
    """Print the output of a job's latest run as it comes, or of the first to come.

    The open file outlives its name: what is in it when the run has ended is the rest.
    """
    job = queue.job(id)
    while not job["run"] and job["state"] != "dead":
        time.sleep(TICK / 2)
        queue.check_there()
        job = queue.job(id)
    path = queue.lease(job)
    try:
        file = os.fdopen(open_shared(path, os.O_RDONLY), "rb")
    except FileNotFoundError:
        return write_bytes(queue.output(job) or b"")
    with file:
        running = True
        while running:
            queue.check_there()
            running = queue.owned(job)
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)
                say("the output was cut back here; some of it is not shown")
            for chunk in iter(lambda: file.read(2**16), b""):
                write_bytes(chunk)
            if running and lease_is_free(path, missing=False) and queue.owned(job):
                raise QueueError("the worker of job %s died; a pool puts it back" % id)
            time.sleep(TICK / 2 if running else 0)


def cmd_wait(args, queue):
    states = [queue.job(id)["state"] for id in args.ids]
    waiting = "pending" in states if states else queue.counts()["pending"]
    if waiting and not worker_list(queue):
        say(NO_POOL)
    with contextlib.closing(Live()) as live:
        counts = queue.wait(args.ids or None, args.timeout, live.progress)
    if counts is None:
        say("still waiting for jobs after %s" % span(args.timeout))
        return 124
    answer(args, counts, "%(completed)d completed, %(dead)d dead" % counts)
    return 1 if counts["dead"] else 0


def cmd_status(args, queue):
    terminal = args.watch and not args.json and terminal_width(sys.stdout)
    with contextlib.ExitStack() as screen:
        if terminal:  # another screen, so that this one is as it was afterwards
            print(end="\x1b[?1049h")
            screen.callback(print, end="\x1b[?1049l", flush=True)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        while True:
            queue.check_there()
            print(end="\x1b[H\x1b[J" if terminal else "")
            now, status = queue.clock(), read_status(queue)
            answer(args, status_document(status), *status_lines(status, now))
            if not args.watch:
                return
            sys.stdout.flush()
            time.sleep(args.watch)


def read_status(queue):
    """Return what `status` shows; its times are epoch seconds yet."""
    return {
        "jobs": queue.counts(), "workers": worker_list(queue),
        "oldest_waiting": queue.oldest_ready(), "next_due": queue.next_due() or None,
    }


def status_document(status):
    """Return what `status --json` prints."""
    workers = [dated(worker, "since") for worker in status["workers"]]
    return dict(dated(status, "oldest_waiting", "next_due"), workers=workers)


def status_lines(status, now):
    jobs, workers, oldest, due = status.values()
    for state, count in jobs.items():
        yield "%s: %d" % (state.capitalize(), count)
    yield "Active Workers: %d" % len(workers)
    for worker in workers:
        doing = "idle"
        if worker["job"]:
            doing = "%s for %s" % (shown(worker["job"]), span(now - worker["since"]))
        yield "  worker %(pid)d of pool %(pool)d: " % worker + doing
    if oldest is not None:
        yield "Oldest Waiting: " + span(now - oldest)
    if due is not None:
        yield "Next Due: " + when(due, now)
    if jobs["pending"] + jobs["failed"] and not workers:
        yield NO_POOL.capitalize()


def job_document(job, runs):
    """Return what `show --json` prints."""
    runs = [dated(run, "started_at", "finished_at") for run in runs]
    return dict(public(job), runs=runs)


def output_document(queue, job, run):
    """Return what `logs --json` prints."""
    text = output_of(queue, job, run).decode("utf-8", "backslashreplace")
    return {"id": job["id"], "run": run or job["run"], "output": text}


def output_of(queue, job, run):
    """Return the output of a run, without one of the latest, so far."""
    output = queue.output(job, run)
    if output is None and (run or job["run"]) == job["run"]:
        # A run that ended between the two looks has its output in the database now.
        limit = queue.settings()["output_limit"]
        output = read_tail(queue.lease(job), limit) or queue.output(job, run)
    return output or b""


def cmd_stats(args, queue):
    stats = queue.stats(queue.clock() - args.since)
    answer(args, stats, *stats_lines(stats, terminal_width(sys.stdout) or 80))


def worker_list(queue):
    """Return the workers of all pools, with the job that each of them runs."""
    busy = {run["worker"]: run for run in queue.processing()}
    idle = {"id": None, "started_at": None}
    return [
        {"pid": pid, "pool": pool.pid, "job": run["id"], "since": run["started_at"]}
        for pool in PoolFile.all(queue.path)
        for pid in pool.workers()
        for run in [busy.get(pid, idle)]
    ]


def cmd_cancel(args, queue):
    states = queue.cancel(args.ids)
    words = {"dead": "cancelled %s", "processing": "cancelling %s, which is running"}
    lines = [words[state] % shown(id) for id, state in states.items()]
    answer(args, {"cancelled": states}, *lines)


def cmd_delete(args, queue):
    aged = args.older_than is not None
    chosen = args.state or args.all or aged
    if args.ids and not chosen and not args.dry_run:
        queue.delete(args.ids)
        lines = ["deleted " + shown(id) for id in args.ids]
        return answer(args, {"deleted": args.ids}, *lines)
    if args.ids or not chosen or (args.state and args.all):
        words = "delete: name jobs and nothing else, or give --state S or --all"
        raise QueueError(words, 2)
    if aged and args.state not in (None, "completed", "dead"):
        raise QueueError("--older-than: only jobs that have finished have an age", 2)
    if args.state == "processing":
        raise QueueError("delete: a running job can't be deleted; cancel it first")
    states = ["completed", "dead"] if aged else set(STATES) - {"processing"}
    states = [args.state] if args.state else states
    delete_all(args, queue, states, args.older_than or 0)


def delete_all(args, queue, states, age=0):
    before = queue.clock() - age if age else MAX_INTEGER
    count = queue.delete_all(states, before, args.dry_run)
    if not count and not args.dry_run:
        raise QueueError("no job to delete")
    verb = "would delete" if args.dry_run else "deleted"
    answer(args, {verb.replace(" ", "_"): count}, verb + " " + many(count, "job"))


def cmd_dlq_clear(args, queue):
    delete_all(args, queue, ["dead"])


def cmd_dlq_retry(args, queue):
    if bool(args.ids) == args.all:
        raise QueueError("dlq retry: name jobs, or give --all", 2)
    if args.ids:
        queue.retry(args.ids)
        lines = ["retried " + shown(id) for id in args.ids]
        return answer(args, {"retried": args.ids}, *lines)
    count = queue.retry_all()
    if not count:
        raise QueueError("no job is dead")
    answer(args, {"retried": count}, "retried " + many(count, "job"))


def cmd_config_show(args, queue):
    values = queue.settings()
    rows = [
        [name, setting_text(name, values[name]), setting_text(name, default), meaning]
        for name, (_, default, meaning) in SETTINGS.items()]
    answer(args, values, *table(["SETTING", "VALUE", "DEFAULT", "MEANING"], rows))


def cmd_config_get(args, queue):
    if args.key is None:
        return cmd_config_show(args, queue)
    value = queue.settings()[args.key]
    answer(args, value, setting_text(args.key, value))


def cmd_config_set(args, queue):
    value = checked(args.key, SETTINGS[args.key][0], as_number(args.value))
    queue.set(args.key, value)
    answer_setting(args, value)


def cmd_config_unset(args, queue):
    queue.unset(args.key)
    answer_setting(args, SETTINGS[args.key][1])


def answer_setting(args, value):
    words = "%s = %s" % (args.key, setting_text(args.key, value))
    answer(args, {args.key: value}, words)


def cmd_dashboard(args):
    serve(args.db, args.host, args.port)


def cmd_worker_start(args):
    let_go = background() if args.detach else None

    def started():
        words = "pool %d: %s; to stop: %squeuectl.py worker stop" % (
            os.getpid(), many(args.count, "worker"), "" if let_go else "Ctrl-C, or ")
        answer(args, {"pool": os.getpid(), "workers": args.count}, words)
        sys.stdout.flush()
        if let_go:
            let_go()

    watched = args.drain and not args.detach and terminal_width(sys.stderr)
    with contextlib.closing(Live()) as live:
        tell = (lambda queue: live.progress(queue.counts())) if watched else None
        return Supervisor(args.db, args.count, args.drain, tell).run(started)


def cmd_worker_stop(args):
    stopped = []
    for pool in filter(PoolFile.alive, PoolFile.all(args.db)):
        stopped.append(pool.pid)
        pool.ask("now" if args.now else "stop")
    if stopped:
        say("stopping; running jobs are " + ("ended" if args.now else "finished first"))
    # A job that stops its own pool would wait for itself.
    runs = os.path.join(beside(args.db, ".runs"), "")
    within = os.environ.get("QUEUECTL_RUN", "").startswith(runs)
    mine = [pid for pid in stopped if not within and not args.no_wait]
    while any(pool.alive() for pool in PoolFile.all(args.db) if pool.pid in mine):
        time.sleep(0.05)
    verb = "stopping " if args.no_wait else "stopped "
    words = verb + ", ".join("pool %d" % pid for pid in stopped)
    answer(args, {"stopped": stopped}, words if stopped else "no pool is running")


# ======================================================================================
# Main: the parser, the exit code
# ======================================================================================


def arg(usage, meaning=None, convert=None, **options):
    """Return what argparse wants to know of an argument like `--limit N`, or a flag."""
    *names, last = usage.split()
    if not last.isupper():
        return [*names, last], dict(options, help=meaning, action="store_true")
    return names, dict(options, help=meaning, metavar=last, type=convert)


def state_name(text):
    if text.lower() not in STATES:
        raise unknown("state " + shown(text), text, STATES)
    return text.lower()


def count_of(name, low, high):
    return lambda text: checked(name, whole(low, high), as_number(text))


def span_of(name, low):
    return lambda text: checked(name, duration(low, "a duration"), text)


def variable(text):
    name, sign, value = text.partition("=")
    if not sign:
        raise QueueError("--env: %s is not NAME=VALUE" % json.dumps(text), 2)
    return name, value


def as_number(text):
    """Return the number that a word of the command line is, or else the word."""
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


IDS = arg("ids ID", nargs="*")
ID = arg("id ID")
KEY = arg("key KEY", convert=setting_name)
DRY_RUN = arg("--dry-run", "say only how many would go")
EVERYWHERE = [arg("--json", "print one JSON document"),
              arg("--db PATH", "the queue (queuectl.db)")]

# command: (function, what it does, example, its arguments)
COMMANDS = {
    "enqueue": (
        cmd_enqueue, "add jobs: a command behind --, or JSON",
        "enqueue --id job1 --timeout 10m -- echo Hello",
        arg("jobs JSON", "an object, an array, or - for an array or JSON Lines on "
            "standard input: all or none", nargs="*"),
        arg("--file F", "read the jobs from this file"),
        arg("--command LINE", "the same as -- LINE"),
        arg("--id ID", "else a short one is made"),
        arg("--unique", "leave a job of this id alone that waits or runs; start one "
            "anew that has finished"),
        arg("--priority N", "higher first (0)", as_number),
        arg("--delay T", "like 90s, 10m, 2h, 7d"),
        arg("--run-at TIME", "ISO 8601, or epoch seconds"),
        arg("--timeout T", "end a run that takes longer"),
        arg("--max-retries N", "failed attempts until it is dead", as_number),
        arg("--cwd DIR", "where to run it (here)"),
        arg("--launcher PREFIX", "start it through this: srun"),
        arg("--env NAME=VALUE", "a variable for it, can be given again", variable,
            action="append")),
    "list": (
        cmd_list, "list jobs, oldest first", "list --state pending --limit 20",
        arg("--state STATE", "one of " + ", ".join(STATES), state_name),
        arg("--limit N", "at most so many; 0 for all",
            count_of("--limit", 0, MAX_INTEGER), default=0)),
    "show": (cmd_show, "show a job and its runs", "show job1", ID),
    "logs": (
        cmd_logs, "print the output of a job's latest run", "logs -f job1", ID,
        arg("-f --follow", "go on until the run ends; wait for the first to begin"),
        arg("--attempt N", "of an earlier run", count_of("--attempt", 1, MAX_INTEGER))),
    "wait": (
        cmd_wait, "wait until jobs, or all, are completed (0) or dead (1)",
        "wait job1 --timeout 10m", IDS,
        arg("--timeout T", "give up with exit code 124", span_of("--timeout", 0))),
    "status": (
        cmd_status, "count the jobs, list the workers", "status --watch",
        arg("--watch SECONDS", "show it again and again", span_of("--watch", 0.1),
            nargs="?", const=1.0)),
    "stats": (
        cmd_stats, "show throughput, run times, waiting times and errors",
        "stats --since 1d",
        arg("--since T", "over this time (1h)", span_of("--since", 1), default=3600.0)),
    "dashboard": (
        cmd_dashboard, "show a live page of the queue in the browser",
        "dashboard --port 8321",
        arg("--host HOST", "where to listen (127.0.0.1)", default="127.0.0.1"),
        arg("--port N", "0 takes a free one (8321)", count_of("--port", 0, 65535),
            default=8321)),
    "cancel": (
        cmd_cancel, "end jobs that wait or run; they become dead", "cancel job1",
        arg("ids ID", nargs="+")),
    "delete": (
        cmd_delete, "remove jobs that do not run",
        "delete --state completed --older-than 7d", IDS,
        arg("--state STATE", "all in this state", state_name),
        arg("--all", "all but running ones"),
        arg("--older-than T", "of them those that finished longer ago",
            span_of("--older-than", 0)), DRY_RUN),
    "dlq list": (cmd_dlq_list, "list the dead jobs", "dlq list"),
    "dlq retry": (
        cmd_dlq_retry, "make dead jobs pending again, with attempts 0",
        "dlq retry job4", IDS, arg("--all")),
    "dlq clear": (cmd_dlq_clear, "remove all dead jobs", "dlq clear", DRY_RUN),
    "config show": (cmd_config_show, "show all settings", "config show"),
    "config get": (
        cmd_config_get, "print the value of a setting", "config get max_retries",
        arg("key KEY", convert=setting_name, nargs="?")),
    "config set": (
        cmd_config_set, "change a setting", "config set max_retries 5", KEY,
        arg("value VALUE")),
    "config unset": (
        cmd_config_unset, "go back to a setting's default",
        "config unset max_retries", KEY),
    "worker start": (
        cmd_worker_start, "run jobs until stopped", "worker start --count 2",
        arg("--count N", "how many at a time (1)", count_of("--count", 1, MAX_WORKERS),
            default=1),
        arg("--drain", "end when no job is left"),
        arg("--detach", "go on in the background")),
    "worker stop": (
        cmd_worker_stop, "stop all pools of the queue, when their jobs are finished",
        "worker stop",
        arg("--now", "end running jobs; they go back to pending"),
        arg("--no-wait", "return at once")),
}
ALIASES = {"config list": "config show", "dlq purge": "dlq clear", "metrics": "stats"}
# SQLite must cross neither a fork nor threads, and `worker stop` makes no queue.
WITHOUT_QUEUE = ("worker start", "worker stop", "dashboard")


def command_named(words):
    """Split a command line into the name of a command, or of a group, and the rest.

    Options before the command count as if they stood behind it.
    """
    firsts = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    groups = [name for name in firsts if name not in COMMANDS]
    name, options, words = "", [], iter(words)
    for word in words:
        if word.startswith("-"):
            options += [word, *itertools.islice(words, word == "--db")]
            continue
        name = (name + " " + word).lstrip()
        if name not in groups:
            break
    name = ALIASES.get(name, name)
    if name and name not in COMMANDS and name not in groups:
        group = name.split(" ")[0] + " "
        known = [command for command in COMMANDS if command.startswith(group)]
        raise unknown("command " + shown(name), name, known or firsts)
    return name, [*options, *words]


def overview(group):
    """Return the short help of all commands, or of those of a group."""
    chosen = {name: entry for name, entry in COMMANDS.items() if name.startswith(group)}
    lines = ["usage: queuectl.py [--db PATH] %s ..." % (group + " COMMAND").strip(), ""]
    lines += ["  %-14s %s" % (name, entry[1]) for name, entry in chosen.items()]
    lines += ["", "examples:"]
    lines += ["  queuectl.py " + entry[2] for entry in list(chosen.values())[:5]]
    return "\n".join(lines + ["", "More on each: queuectl.py COMMAND --help"])


def parse(name, words):
    """Return function and arguments of one command; no other's parser is built."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            hint = " (see: queuectl.py %s --help)" % name
            raise QueueError("%s: %s%s" % (name, shown(message), hint), 2)

    function, meaning, example, *arguments = COMMANDS[name]
    parser = Parser(
        prog="queuectl.py " + name, description=meaning[0].upper() + meaning[1:] + ".",
        epilog="example: queuectl.py " + example, allow_abbrev=False,
        # Asking for the terminal's width imports modules for a fifth of the whole time.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=88),
    )
    for names, options in [*arguments, *EVERYWHERE]:
        parser.add_argument(*names, **options)
    at = words.index("--") if name == "enqueue" and "--" in words else len(words)
    args = parser.parse_args(words[:at])
    args.words = words[at + 1 :]
    queue = args.db and native(args.db)
    args.db = os.path.realpath(queue or os.environ.get("QUEUECTL_DB") or "queuectl.db")
    return function, args


def run_command(argv):
    """Run what a command line says; return the exit code."""
    name, words = command_named(argv)
    if name not in COMMANDS:
        if words and not {"-h", "--help", "--version"} & set(words):
            hint = "no command in: %s (see: queuectl.py --help)"
            raise QueueError(hint % shown(" ".join(words)), 2)
        print("queuectl " + __version__ if "--version" in words else overview(name))
        return 0
    function, args = parse(name, words)
    try:
        if name in WITHOUT_QUEUE:
            return function(args) or 0
        with Queue(args.db) as queue:
            return function(args, queue) or 0
    except sqlite3.Error as error:
        raise QueueError("%s: %s" % (shown(args.db), error)) from None


def main(argv=None):
    """Run one command; return its exit code. What goes wrong is one line on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, and its number would be the database's
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    ready_terminal()
    try:
        code = run_command(map(utf8, sys.argv[1:]) if argv is None else argv)
        sys.stdout.flush()
        return code
    except QueueError as error:
        say(error)
        return error.code
    except OSError as error:
        if error.errno in CLOSED_PIPE and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the exit would complain
            return 0
        where = shown(str(error.filename or "system error"))
        say("%s: %s" % (where, error.strerror or error))
        return 1
    except RecursionError:
        say("not JSON that a job is made of: nested too deeply")
        return 2
    except KeyboardInterrupt:
        return 130


# ======================================================================================
# Dashboard: the documents of the commands by HTTP, and the page
# ======================================================================================

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'nonce-TOKEN'; script-src"
    " 'nonce-TOKEN'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
CACHED = 1.0  # seconds that a document is given to others who ask for the same


class Refusal(Exception):
    """What is wrong with a request: an HTTP status and words."""


def stats_since(queue, query):
    return queue.stats(queue.clock() - span_of("since", 1)(query.get("since", "1h")))


def newest_jobs(queue, query):
    """Return a page of jobs, newest first; `before` is the id to go on from."""
    state = state_name(query["state"]) if "state" in query else None
    limit = count_of("limit", 0, MAX_INTEGER)(query.get("limit", "50")) or 50
    text, before = query.get("q", ""), query.get("before", "")
    if not storable(text + before):
        raise Refusal(400, "not text")
    return list(map(public, queue.newest(state, text, before, min(limit, PAGE))))


def one_job(queue, query):
    job = queue.job(query["id"])
    return job_document(job, queue.runs(job))


def job_output(queue, query):
    job, run = queue.job(query["id"]), None
    if "run" in query:
        run = count_of("run", 0, MAX_INTEGER)(query["run"])
        if not 1 <= run <= job["run"]:
            raise Refusal(404, "no such run")
    return output_document(queue, job, run)


def metrics(queue, query):
    """Return the numbers of the queue in the text format of Prometheus."""
    status, stats = read_status(queue), queue.stats(0)
    busy = sum(worker["job"] is not None for worker in status["workers"])
    times = ["NaN" if t is None else "%.6f" % t for t in stats["run_time"].values()]
    families = {
        "jobs gauge state": status["jobs"],
        "workers gauge state": {"busy": busy, "idle": len(status["workers"]) - busy},
        "runs gauge outcome": {name: stats[name] for name in ("completed", "failed")},
        "run_seconds summary quantile": dict(zip(("0.5", "0.95", "1"), times)),
    }
    lines = []
    for family, values in families.items():
        name, kind, label = family.split()
        lines.append("# TYPE queuectl_%s %s" % (name, kind))
        for value, count in values.items():
            lines.append('queuectl_%s{%s="%s"} %s' % (name, label, value, count))
    return "\n".join([*lines, "queuectl_run_seconds_count %d\n" % stats["runs"]])


def act(verb, queue, query):
    """Carry out a verb of the queue on one job."""
    getattr(queue, verb)([query["id"]])
    return {verb: query["id"]}


# path: what a GET of it returns, made of the queue and the query; ID is in the query
DOCUMENTS = {
    "/metrics": metrics,
    "/api/status": lambda queue, query: status_document(read_status(queue)),
    "/api/stats": stats_since,
    "/api/jobs": newest_jobs,
    "/api/jobs/ID": one_job,
    "/api/jobs/ID/output": job_output,
}
# path: what a POST to it does
ACTIONS = {"/api/jobs/ID/" + verb: functools.partial(act, verb)
           for verb in ("retry", "cancel", "delete")}
ACTIONS["/api/dlq/retry"] = lambda queue, query: {"retried": queue.retry_all()}


class Site:
    """What the dashboard answers to requests; its Handler only speaks HTTP."""

    def __init__(self, path, host):
        import secrets
        import threading

        self.path, self.host = path, host.lower()  # as a request's name is compared
        self.token = secrets.token_hex(16)
        self.lock = threading.Lock()
        self.cached = functools.lru_cache(16)(self.document)  # outputs may be large

    def answer(self, method, target, headers):
        """Return status, type and text: what `get` or `post` return, or why not."""
        from urllib.parse import urlsplit

        try:
            self.check_host(headers)
            return (200, *method(urlsplit(target), headers))
        except Refusal as refusal:
            status, words = refusal.args
        except (ValueError, QueueError) as error:
            status, words = 404 if NO_JOB in str(error) else 400, str(error)
        except (sqlite3.Error, OSError) as error:
            status, words = 503, str(error)
        return status, "application/json", json.dumps({"error": words})

    def check_host(self, headers):
        """Refuse another site's name that leads here: DNS rebinding."""
        from urllib.parse import urlsplit
        import ipaddress

        name = urlsplit("//" + headers.get("Host", "")).hostname or ""
        if name not in ("localhost", self.host):
            try:
                ipaddress.ip_address(name)
            except ValueError:
                raise Refusal(403, "not a name of this dashboard") from None

    def check_write(self, headers):
        """Refuse what does not come from the page that this dashboard gave."""
        import hmac

        if headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers:
            raise Refusal(413, "an action has no body")
        token = headers.get("X-Token", "").encode()
        if headers.get("Origin") != "http://" + headers["Host"]:
            raise Refusal(403, "not from this page")
        if not hmac.compare_digest(token, self.token.encode()):
            raise Refusal(403, "this page is an earlier dashboard's: load it anew")

    def get(self, url, headers):
        if url.path == "/":
            return "text/html", PAGE_HTML.replace("TOKEN", self.token)
        with self.lock:  # what many ask for is made once
            return self.cached(url, time.monotonic() // CACHED)

    def document(self, url, _):
        from urllib.parse import parse_qsl

        query = dict(parse_qsl(url.query, max_num_fields=10))
        return self.run(DOCUMENTS, url.path, query)

    def post(self, url, headers):
        self.check_write(headers)
        answer = self.run(ACTIONS, url.path, {})
        with self.lock:
            self.cached.cache_clear()  # or the page would show what was
        return answer

    def run(self, routes, path, query):
        """Return type and text of what a path names; a job's id is quoted in it."""
        from urllib.parse import unquote

        job = re.fullmatch("(/api/jobs/)([^/]*)(/.+)?/?", path)
        if job:
            path = job[1] + "ID" + (job[3] or "")
            query["id"] = unquote(job[2], errors="replace")
        if path not in routes:
            raise Refusal(404, "no such page")
        with Queue(self.path, patience=IDLE_WAIT) as queue:
            value = routes[path](queue, query)
        if isinstance(value, str):
            return "text/plain", value
        return "application/json", json.dumps(value)


def handler(site):
    """Return the class that handles the requests to a site."""
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # a slow or vanished client keeps no thread for ever
        server_version, sys_version = "queuectl", ""

        def do_GET(self):
            self.reply(*site.answer(site.get, self.path, self.headers))

        def do_POST(self):
            self.close_connection = True  # a body, which is refused, is not read
            self.reply(*site.answer(site.post, self.path, self.headers))

        def reply(self, status, kind, text):
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind + "; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in HEADERS.items():
                self.send_header(name, value.replace("TOKEN", site.token))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Keep quiet: the terminal is the user's."""

    return Handler


def listen(host, port, handler):
    """Return a server of HTTP, each of its connections in a thread."""
    from http.server import ThreadingHTTPServer
    import socket

    class Server(ThreadingHTTPServer):
        allow_reuse_address = REUSE_ADDRESS
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def get_request(self):
            try:
                return super().get_request()
            except OSError:  # too many open files; it would be asked again at once
                time.sleep(TICK)
                raise

        def handle_error(self, request, client):
            """Say nothing: a client went away."""

    return Server((host, port), handler)


def serve(path, host, port):
    """Serve the dashboard until Ctrl-C."""
    if not host:  # it would listen everywhere
        raise QueueError("--host: name an address, like 127.0.0.1", 2)
    with Queue(path):  # whether it is a queue
        site = Site(path, host)
    try:
        server = listen(host, port, handler(site))
    except (OSError, TypeError, UnicodeError) as error:  # the last two: an odd name
        words = "cannot listen on %s, port %d: %s"
        why = getattr(error, "strerror", None) or error
        raise QueueError(words % (shown(host), port, why)) from None
    with server:
        if host not in ("127.0.0.1", "::1", "localhost"):
            say("warning: whoever reaches %s can read this queue and change it" % host)
        where = "[%s]" % host if ":" in host else host
        address = "http://%s:%d/" % (where, server.server_port)
        print(address + " (to stop: Ctrl-C)", flush=True)
        server.serve_forever()


PAGE_HTML = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>queuectl</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style nonce="TOKEN">
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #1c2430; --dim: #5c6675;
  --line: #dde2e9; --blue: #1f6feb; --green: #1a7f45; --red: #c62f3b; --amber: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --bg: #11151b; --card: #1a2029; --text: #e3e8ef; --dim: #97a3b4;
  --line: #2c3542; --blue: #6cabff; --green: #57c785; --red: #ff7b81; --amber: #e3b341; } }
.pending { --c: var(--dim); } .processing { --c: var(--blue); } .completed { --c: var(--green); }
.failed { --c: var(--amber); } .dead { --c: var(--red); } .st { color: var(--c); font-weight: 600; }
.ok { fill: var(--green); } .bad { fill: var(--red); } .bar { fill: var(--blue); }
* { box-sizing: border-box; margin: 0; } [hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--bg); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; gap: 1rem; align-items: baseline; margin-bottom: .8rem; }
h1 { font-size: 1.2rem; } h2 { font-size: .95rem; margin-bottom: .6rem; } p { margin: 1em 0; }
.dim { color: var(--dim); font-weight: 400; } .mono, pre { font-family: ui-monospace, monospace; font-size: .85rem; }
.card, button, input { background: var(--card); border: 1px solid var(--line); }
.card { margin-top: .6rem; border-radius: .6rem; padding: .8rem; } svg { width: 100%; height: 7rem; display: block; }
button, input { font: inherit; color: inherit; border-radius: .4rem; padding: .3rem .7rem; }
button { cursor: pointer; } button:disabled { opacity: .45; cursor: default; } input { flex: 1; min-width: 9rem; }
#lost { background: var(--red); color: var(--card); padding: .5rem .8rem; border-radius: .5rem; margin-bottom: .8rem; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: .6rem; }
.tiles button { text-align: left; padding: .8rem; border-radius: .6rem; border-top: 3px solid var(--c); min-width: 0; }
.tiles button[aria-pressed=true] { outline: 2px solid var(--blue); }
.tiles b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: 3fr 2fr; column-gap: .6rem; }
.bars { display: flex; gap: .6rem; flex-wrap: wrap; align-items: center; margin-bottom: .6rem; }
ul { padding: 0; list-style: none; } li, td, th { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; }
td, th { padding: .35rem .5rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; color: var(--dim); width: 7.2rem; } th:last-child { width: auto; }
th:nth-child(1) { width: 24%; } th:nth-child(3) { width: 4.2rem; } #runs td:first-child { width: 50%; }
#rows tr { cursor: pointer; } [aria-selected=true] { background: color-mix(in srgb, var(--blue) 14%, transparent); }
pre { max-height: 24rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--bg);
  padding: .6rem; border-radius: .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; margin-bottom: .6rem; }
dl div { display: contents; } dt { color: var(--dim); } dd { overflow-wrap: anywhere; }
@media (max-width: 44rem) { .two { grid-template-columns: 1fr; } .wide { display: none; } th:nth-child(1) { width: 38%; }
  .tiles { grid-template-columns: repeat(3, 1fr); gap: .4rem; } body, .card { padding: .6rem; } }
</style></head><body>
<header><h1>queuectl</h1><span class="dim" id="rate"></span></header>
<div id="lost" role="alert" hidden></div><div class="tiles" id="tiles"></div>
<div class="two"><section class="card"><h2>Throughput, last hour <span class="dim" id="peak"></span></h2>
<svg id="throughput" role="img" preserveAspectRatio="none"></svg></section>
<section class="card"><h2>Run times <span class="dim" id="median"></span></h2>
<svg id="times" role="img" preserveAspectRatio="none"></svg><div class="dim" id="range"></div></section></div>
<section class="card"><h2 id="crew">Workers</h2><ul id="workers"></ul></section>
<section class="card" id="detail" aria-label="job" hidden>
<div class="bars"><h2 id="name" class="mono"></h2><span id="acts"></span> <button id="close">Close</button></div>
<dl id="facts"></dl><table><tbody id="runs"></tbody></table><pre id="output" tabindex="0"></pre></section>
<section class="card"><div class="bars"><h2>Jobs</h2><input id="q" type="search" placeholder="id or command"
aria-label="search"><button id="retryall">Retry all dead</button></div>
<table><thead><tr><th>Id<th>State<th class="wide">Tries<th class="wide">Changed<th>Command</tr></thead>
<tbody id="rows"></tbody></table><p class="dim" id="none" hidden>No job here.</p>
<div class="bars"><button id="newer">Newer</button><button id="older">Older</button></div></section>
<script nonce="TOKEN">
"use strict";
const $ = id => document.getElementById(id), path = id => "/api/jobs/" + encodeURIComponent(id);
const states = ["pending", "processing", "completed", "failed", "dead"];
let filter = "", trail = [], before = "", last = "", open = null, turn = 0, timer;
const span = s => s === null ? "–" : s < 10 ? Number(s.toPrecision(2)) + " s"
  : s < 120 ? Math.round(s) + " s" : Math.round(s / 60) + " min";
function ago(time) {
  const past = Math.round((Date.now() - Date.parse(time)) / 1000), s = Math.abs(past);
  const [unit, name] = s < 60 ? [1, " s"] : s < 3600 ? [60, " min"] : s < 86400 ? [3600, " h"] : [86400, " d"];
  return past < 0 ? "in " + Math.floor(s / unit) + name : Math.floor(s / unit) + name + " ago"; }
async function ask(url, options) {
  const answer = await fetch(url, options), body = await answer.json();
  if (!answer.ok) throw new Error(body.error || answer.status);
  return body; }
async function post(url, question, then) {
  if (question && !confirm(question)) return;
  await ask(url, {method: "POST", headers: {"X-Token": "TOKEN"}}).then(then, error => alert(error.message));
  setTimeout(refresh, 50); }
function make(tag, kind = "", ...children) {
  const node = document.createElement(tag);
  node.className = kind; node.append(...children); return node; }
const row = (...kinds) => make("tr", "", ...kinds.map(kind => make("td", kind)));
const text = (node, value) => { if (node.textContent !== String(value)) node.textContent = value; };
const texts = (node, ...values) => values.forEach((value, i) => text(node.children[i], value));
/* Nodes are kept and only their text changes: nothing flickers, scrolls or loses its selection. */
function fit(parent, items, build, show) {
  while (parent.children.length < items.length) parent.append(build());
  while (parent.children.length > items.length) parent.lastChild.remove();
  items.forEach((item, i) => show(parent.children[i], item)); }
function bars(svg, parts, columns, label) {
  const top = Math.max(1, ...parts.map(([kind, x, from, n]) => from + n)), unit = 98 / top;
  svg.setAttribute("viewBox", `0 0 ${columns} 100`); svg.setAttribute("aria-label", label);
  fit(svg, parts, () => document.createElementNS("http://www.w3.org/2000/svg", "rect"), (rect, [kind, x, from, n]) => {
    const shape = {class: kind, x: x + .08, y: 100 - unit * (from + n), width: .84, height: unit * n};
    Object.entries(shape).forEach(pair => rect.setAttribute(...pair)); });
  return top; }
function showStatus(s) {
  fit($("tiles"), states, () => make("button", "", make("b"), make("span")), (tile, state) => {
    texts(tile, s.jobs[state].toLocaleString(), state);
    tile.className = state; tile.setAttribute("aria-pressed", filter === state);
    tile.onclick = () => { filter = filter === state ? "" : state; home(); }; });
  text($("crew"), s.workers.length ? "Workers: " + s.workers.length
    : "No pool is running; to start one: queuectl.py worker start");
  fit($("workers"), s.workers, () => make("li"), (li, w) =>
    text(li, `worker ${w.pid}: ` + (w.job === null ? "idle" : `${w.job}, begun ${ago(w.since)}`)));
  const old = s.oldest_waiting && "longest wait began " + ago(s.oldest_waiting);
  text($("rate"), [old, s.next_due && "next due " + ago(s.next_due)].filter(Boolean).join(", "));
  $("retryall").disabled = !s.jobs.dead; }
function showStats(s) {
  const ran = s.throughput.flatMap((b, x) => [["ok", x, 0, b.completed], ["bad", x, b.completed, b.failed]]);
  const times = s.run_times.map((bin, x) => ["bar", x, 0, bin.runs]), {median, p95, longest} = s.run_time;
  const ended = `${s.completed} completed and ${s.failed} failed runs in the last hour`;
  const top = bars($("throughput"), ran, s.throughput.length, ended);
  bars($("times"), times, times.length, "histogram of run times");
  text($("peak"), s.runs ? `${s.completed} completed, ${s.failed} failed; now ${s.per_second_now.toFixed(1)}/s; `
    + `highest bar ${top} a minute` : "nothing ran");
  text($("median"), s.runs ? `median ${span(median)}, 95 % within ${span(p95)}` : "");
  text($("range"), "under 10 ms … over 1000 s, longest " + span(longest)); }
function showJobs(jobs) {
  fit($("rows"), jobs, () => row("mono", "st", "wide", "wide", "mono"), (tr, job) => {
    const tries = job.attempts + "/" + Math.max(1, job.max_retries);
    texts(tr, job.id, job.state, tries, ago(job.updated_at), job.command);
    tr.className = job.state; tr.title = job.error || ""; tr.tabIndex = 0;
    tr.setAttribute("aria-selected", open === job.id); tr.onclick = () => select(job.id);
    tr.onkeydown = event => { if (event.key === "Enter") select(job.id); }; });
  $("none").hidden = jobs.length > 0; $("older").disabled = jobs.length < 50; $("newer").disabled = !trail.length;
  last = jobs.length ? jobs[jobs.length - 1].id : ""; }
function showJob(job, {output}) {
  const {id, state} = job, acts = [
    ["Retry", state === "dead", () => post(path(id) + "/retry")],
    ["Cancel", state !== "dead" && state !== "completed", () => post(path(id) + "/cancel", `Cancel ${id}?`)],
    ["Delete", state !== "processing", () => post(path(id) + "/delete", `Delete ${id} and its runs?`, shut)]];
  fit($("acts"), acts, () => make("button"), (button, [name, can, act]) => {
    text(button, name); button.disabled = !can; button.onclick = act; });
  const env = Object.entries(job.env).map(pair => pair.join("=")).join(" ");
  const facts = Object.entries({...job, id: "", runs: "", env}).filter(([, v]) => v !== null && v !== "");
  fit($("facts"), facts, () => make("div", "", make("dt"), make("dd")), (fact, [name, value]) =>
    texts(fact, name.replace("_", " "), value));
  fit($("runs"), job.runs, () => row("", "", ""), (tr, r) => texts(tr, `run ${r.run}, attempt ${r.attempt}`,
    ago(r.started_at), r.finished_at ? r.error || "exit 0" : "running"));
  text($("name"), id); $("detail").hidden = false;
  const box = $("output"), atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 5;
  text(box, output || "no output"); if (atEnd) box.scrollTop = box.scrollHeight; }
async function showOpen(id) {
  try { const both = await Promise.all([ask(path(id)), ask(path(id) + "/output")]); if (open === id) showJob(...both); }
  catch (error) { if (open === id) text($("output"), error.message); } }
function home() { trail = []; before = ""; refresh(); }
function select(id) { open = id; refresh().then(() => $("detail").scrollIntoView({block: "nearest"})); }
function shut() { open = null; $("detail").hidden = true; refresh(); }
async function refresh() {
  clearTimeout(timer);
  const mine = ++turn, query = new URLSearchParams({state: filter, q: $("q").value, before});
  try {
    const [status, jobs, stats] = await Promise.all([
      ask("/api/status"), ask("/api/jobs?" + query), mine % 5 === 1 ? ask("/api/stats") : null]);
    if (mine !== turn) return;
    showStatus(status); showJobs(jobs); if (stats) showStats(stats);
    if (open !== null) await showOpen(open);
    $("lost").hidden = true; document.title = `queuectl: ${status.jobs.processing} running, ${status.jobs.dead} dead`;
  } catch (error) {
    $("lost").hidden = false; text($("lost"), `The queue can't be reached: ${error.message}. What is shown is old.`); }
  if (mine === turn) timer = setTimeout(refresh, document.hidden ? 15000 : 2000); }
$("q").oninput = home; $("close").onclick = shut; document.onvisibilitychange = refresh;
$("retryall").onclick = () => post("/api/dlq/retry", "Retry all dead jobs?");
$("older").onclick = () => { trail.push(before); before = last; refresh(); };
$("newer").onclick = () => { before = trail.pop(); refresh(); };
document.onkeydown = event => { if (event.key === "Escape" && open !== null) shut(); }; refresh();
</script></body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
