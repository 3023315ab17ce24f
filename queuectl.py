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
each and `queuectl.runs/` with a file for each worker and for each job that runs.

The life of a job; each arrow is one verb of `Queue`, one guarded UPDATE:

                     claim              exit 0
    enqueue ─▶ PENDING ─────▶ PROCESSING ─────▶ COMPLETED
                ▲ ▲ ▲            │ │ │
          due   │ │ └─ worker    │ │ └─ failed, attempts = max_retries ─▶ DEAD
                │ │    died,   ◀─┘ │                                      │
                │ │    stop --now  │                                      │
             FAILED ◀── failed ────┘                                      │
                  └────────────────────────── dlq retry ──────────────────┘

Not drawn: `cancel` makes any unfinished job DEAD; `retry` takes a COMPLETED one, too.

What is promised, and by what:

  - An acknowledged job is on the disk: `enqueue` commits with a synced write.
  - Two runs of a job never overlap, and none is stuck. Whatever lives holds a file: it
    has it open and locked (flock), and the kernel lets go when the last process that
    inherited it is gone, whoever was killed. The file of a run is its lease. A job in
    PROCESSING whose lease is free belongs to nobody and is put back; a lease that is
    held while its worker is gone belongs to an orphan, which is ended first. Every pool
    looks for both at its start and every two seconds. There is no heartbeat.
  - A job runs at least once. A result that could not be recorded is dropped, and the
    job runs again: commands should be idempotent.
  - A run that is ended from outside ends with every process that belongs to it.

The map. A section uses those above it.

    settings     names, limits, defaults; the one exception
    policy       checking what comes from outside; durations, backoff
    holds        locked files, waking, asking; what differs between systems
    queue        the database: the only SQL
    runs         one command: its lease, its output, its end
    output       values to text
    pool         a worker; the supervisor; recovery; the log
    commands     one function a command, its name and its arguments above it
    main         the parser and the exit code
    dashboard    the same documents by HTTP, and the page
"""
import _thread
import bisect
import collections
import contextlib
import errno
import functools
import itertools
import json
import operator
import os
import re
import signal
import sqlite3
import stat
import sys
import time
import weakref
from datetime import datetime, timedelta

# ======================================================================================
# Settings: names, limits, defaults; the one exception
# ======================================================================================

__version__ = "1.1.0"

WINDOWS = os.name == "nt"

STATES = ("pending", "processing", "completed", "failed", "dead")
WAITING = ("pending", "failed")
FINISHED = ("completed", "dead")
# The states that a verb leaves. SQL, commands, completion and page take them from here.
TAKES = {
    "cancel": (*WAITING, "processing"), "edit": WAITING, "retry": FINISHED,
    "delete": (*WAITING, *FINISHED), "dlq retry": ("dead",),
}
SCHEMA_VERSION = 2
APPLICATION_ID = 0x71637431  # "qct1", in the header of the database

MAX_INTEGER = 2**63 - 1
MAX_DURATION = 10.0**9  # seconds, some 30 years
EPOCH = datetime(1970, 1, 1)
MAX_TIME = 253402300799.0  # 9999-12-31T23:59:59Z, the last that ISO 8601 text can name
MAX_COMMAND = 8191 if WINDOWS else 131071  # bytes: cmd.exe's, Linux' for an argument
MAX_WORKERS = 256
MAX_HOOKS = 8  # `on_dead` commands that a pool has running at a time
MAX_DEATHS = 5  # of its workers: after so many a job is taken for the cause

BATCH = 500  # rows a read, or a write; a longer one would hold up others
LOCK_TIMEOUT = 30.0  # seconds that a command waits for another program's lock
RECOVERY_INTERVAL = 2.0  # seconds between two looks of a supervisor for jobs that nobody runs
IDLE_INTERVAL = 1.0  # seconds after which an idle worker looks even if nobody woke it
POLL_INTERVAL = 0.2  # seconds between two looks at what is waited for; some look more often
TERM_GRACE = 3.0  # seconds from SIGTERM to SIGKILL
KILL_GRACE = 5.0  # seconds after SIGKILL until a process is taken for one that can't end
BLAME_DELAY = 0.5  # seconds: who lives so long after a death was not killed with it
RESTART_INTERVAL = 1.0  # seconds between two starts of workers that keep dying
EXIT_TROUBLE = 2  # exit code of a worker that left because its queue can't be used
LOG_LIMIT = 10 * 2**20  # bytes of queuectl.log before it becomes queuectl.log.1


class QueueError(Exception):
    """What the user can mend, in one line; `code` is the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# ======================================================================================
# Policy: checking what comes from outside; durations, backoff
# ======================================================================================

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def backoff(base, attempts, longest):
    """Return the seconds to wait after the n-th failed attempt: base ** n, bounded."""
    try:
        return min(float(base) ** attempts, longest)
    except OverflowError:
        return longest


def parse_duration(value):
    """Return a duration in seconds from a number or text like 90, 90s, 1h30m, 7d."""
    if type(value) in (int, float):
        return float(value)
    text, part = value.strip().lower(), r"(\d+\.?\d*|\.\d+)([smhd])"
    if re.fullmatch("(%s)+" % part, text, re.ASCII):
        return sum(float(n) * UNITS[unit] for n, unit in re.findall(part, text))
    return float(re.fullmatch(r"\d+\.?\d*|\.\d+", text, re.ASCII)[0])


def parse_size(value):
    """Return bytes from a whole number or text like 500, 64K, 1M."""
    if type(value) is int:
        return value
    parts = re.fullmatch(r"\s*(\d+)([KM]?)\s*", value.upper(), re.ASCII)
    return int(parts[1]) * {"": 1, "K": 2**10, "M": 2**20}[parts[2]]


def parse_time(value):
    """Return epoch seconds from a number or ISO 8601 text, local without a zone."""
    if not isinstance(value, str):
        return parse_duration(value)
    text = value.strip().upper().replace("Z", "+00:00")
    if text == "NOW":
        return time.time()
    if re.fullmatch(r"\d{9,10}(\.\d*)?", text, re.ASCII):
        return float(text)
    if text.isdecimal():  # 20260131 is meant as a date, 202601311800 no less
        raise ValueError
    return datetime.fromisoformat(text).timestamp()


UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def is_storable(text):
    """Tell whether TEXT can be handed to a system call: no NUL, no lone surrogate."""
    return not UNSTORABLE.search(text)


# A check takes a value from outside and returns what is stored, or raises ValueError
# with the words for what is allowed; `checked` makes a whole sentence of them.


def whole_number(low, high):
    def check(value):
        if type(value) is not int or not low <= value <= high:
            raise ValueError("a whole number from %d to %d" % (low, high))
        return value

    return check


def in_range(convert, low, high, allowed):
    def check(value):
        try:
            result = convert(value)
            if low <= result <= high:  # false for NaN, too
                return result
        except (ValueError, TypeError, OverflowError, OSError, AttributeError):
            pass  # what is neither number nor text, or not such a text
        raise ValueError(allowed)

    return check


def duration_from(low):
    words = "a duration: from %g to %d seconds, also like 90s, 10m, 1h30m, 7d"
    return in_range(parse_duration, low, MAX_DURATION, words % (low, MAX_DURATION))


check_time = in_range(parse_time, 0, MAX_TIME,
                "a time before the year 10000: ISO 8601 like 2026-01-31T18:00:00Z, or"
                " epoch seconds")


def check_id(value):
    if not isinstance(value, str) or not 1 <= len(value) <= 255 or (
            value.isspace() or not value.isprintable()):
        raise ValueError("text of 1 to 255 printable characters")
    return value


def check_command(value):
    if not isinstance(value, str) or not value.strip() or not is_storable(value):
        raise ValueError("a shell command: UTF-8 that is not blank and has no NUL")
    if len(value.encode()) > MAX_COMMAND:
        raise ValueError("at most %d bytes, which is what the system can start"
                         % MAX_COMMAND)
    return value


def current_directory():
    """Return the current directory by the name that the shell knows it by.

    A symlink, like a deployed `current`, leads somewhere else tomorrow.
    """
    told, real = os.environ.get("PWD", ""), os.getcwd()
    with contextlib.suppress(OSError):
        if os.path.isabs(told) and os.path.samefile(told, real):
            return told
    return real


def check_directory(value):
    if not isinstance(value, str) or not is_storable(value) or not os.path.isdir(value):
        raise ValueError("a directory that exists and has a name in UTF-8")
    return os.path.normpath(os.path.join(current_directory(), value))


def optional(check, word):
    """Return a check that also takes the word, or null, for none."""
    def either(value):
        try:
            return None if value in (None, word) else check(value)
        except ValueError as allowed:
            raise ValueError("%s, or %s" % (word, allowed)) from None

    return either


def check_ids(value):
    """Check ids of other jobs; a single one may stand alone."""
    return [check_id(id) for id in (value if isinstance(value, list) else [value])]


def check_launcher(value):
    """Check a launcher: the beginning of a command line, such as `srun -Q -n1`."""
    import shlex
    import shutil

    try:
        program = shlex.split(check_command(value))[0]
        if not shutil.which(program):
            raise ValueError("no program " + printable(program))
    except ValueError as error:
        raise ValueError("the beginning of a command: %s" % error) from None
    return value


def check_env(value):
    def fits(name, text):
        if not name or "=" in name or not isinstance(text, str):
            return False
        return is_storable(name + text) and len((name + text).encode()) < MAX_COMMAND

    if not isinstance(value, dict) or not all(itertools.starmap(fits, value.items())):
        raise ValueError("an object of texts, with names without = and no NUL, each of"
                         " less than %d bytes" % MAX_COMMAND)
    return json.dumps(value)


# name: (check, default, meaning)
SETTINGS = {
    "max_retries": (whole_number(0, 10**6), 3, "failed attempts until a job is dead"),
    "backoff_base": (in_range(parse_duration, 0, 10**6, "a number from 0 to 1000000"), 2,
                     "the wait after n failures: base ** n seconds"),
    "backoff_max": (duration_from(0), 86400, "longest such wait, in seconds"),
    "timeout": (optional(duration_from(0.001), "none"), None,
                "seconds a run may take, if its job has none"),
    "output_limit": (in_range(parse_size, 0, 2**26, "bytes from 0 to 64M, like 500, 64K, 1M"),
                     2**20, "bytes of output that are kept, like 1M"),
    "launcher": (optional(check_launcher, "none"), None,
                 "what runs are started through, like srun"),
    "keep": (optional(duration_from(0), "forever"), None,
             "seconds that completed jobs are kept"),
    "on_dead": (optional(check_command, "none"), None,
                "command started for each job that dies"),
}

# name: (check, default, option of `enqueue`, its help). Each is a column of `jobs` but
# for `delay`, which becomes a `run_at`, and `after`, which becomes rows of `waits`. The
# default of those that have a setting is taken from there.
FIELDS = {
    "id": (check_id, None, "--id ID", "else a short one is made"),
    "command": (check_command, None, "--command LINE", "the same as -- LINE"),
    "max_retries": (SETTINGS["max_retries"][0], None, "--max-retries N",
                    "failed attempts until it is dead"),
    "priority": (whole_number(-MAX_INTEGER - 1, MAX_INTEGER), 0, "--priority N",
                 "higher first (0)"),
    "run_at": (check_time, None, "--run-at TIME", "ISO 8601, epoch seconds, or now"),
    "delay": (duration_from(0), None, "--delay T", "like 90s, 10m, 1h30m, 7d"),
    "timeout": (SETTINGS["timeout"][0], None, "--timeout T",
                "end a run that takes longer"),
    "cwd": (check_directory, None, "--cwd DIR", "where to run it (here)"),
    "env": (check_env, None, "--env NAME=VALUE",
            "a variable for it, can be given again"),
    # Here `none` is a value: no launcher, whatever the setting is.
    "launcher": (lambda value: value if value == "none" else check_launcher(value), None,
                 "--launcher PREFIX", "start it through this: srun"),
    "after": (lambda value: [] if value == "none" else check_ids(value), None,
              "--after ID", "only when that job is completed, can be given again"),
    "lock": (optional(check_id, "none"), None,
             "--lock NAME", "one at a time of those with this name"),
}
COLUMNS = [name for name in FIELDS if name not in ("delay", "after")]

# What JSON shows of a job, in this order. Those that are no field above are queuectl's
# own: taken and ignored, so that one queue's `list --json` is another's `enqueue -`.
PUBLIC = ("id", "command", "state", "attempts", *COLUMNS[2:], "after", "created_at",
          "updated_at", "exit_code", "error", "started_at", "finished_at", "seconds")
TIMES = ("run_at", "created_at", "updated_at", "started_at", "finished_at")


def iso(moment):
    """Return epoch seconds as ISO 8601 text in UTC, None as None."""
    return None if moment is None else iso_second(int(moment))


@functools.lru_cache(BATCH)
def iso_second(second):
    # Not by time.gmtime: on Windows that ends with the year 3000.
    return (EPOCH + timedelta(seconds=second)).isoformat() + "Z"


def with_iso_times(row, *names):
    """Return a row as JSON shows it, the times of these names as text."""
    return dict(row, **{name: iso(row[name]) for name in names})


def public_job(job):
    """Return a job as JSON shows it; the row begins with just that, in that order."""
    found = dict(zip(PUBLIC, job))
    for name in TIMES:
        found[name] = iso(found[name])
    found["env"] = json.loads(found["env"]) if found["env"] else {}
    found["after"] = found["after"].split("\n") if found["after"] else []
    return found


def unknown_word(what, word, words):
    """Return the QueueError for a word, with the likeliest of WORDS, or all of them."""
    from difflib import get_close_matches

    close = [known for known in words if known.endswith(" " + word.lower())] or (
        get_close_matches(word.lower(), words, 1, 0.65))
    hint = "did you mean %s?" % close[0] if close else "there are: " + ", ".join(words)
    return QueueError("unknown %s; %s" % (what, hint), 2)


def checked(name, check, value):
    """Return what CHECK makes of VALUE; a refusal names field, value and rule."""
    try:
        return check(value)
    except ValueError as allowed:
        given = json.dumps(value, default=str)
        given = given[:57] + "..." if len(given) > 60 else given
        raise QueueError("%s: %s is not %s" % (name, given, allowed), 2) from None


def checked_fields(given, fields):
    """Add the fields of a job that are given to others, ready to be stored."""
    for name, value in given.items():
        if name in FIELDS:
            if value is not None:
                fields[name] = checked(name, FIELDS[name][0], value)
        elif name not in (*PUBLIC, "waiting", "runs"):
            raise unknown_word("field " + json.dumps(name), name, FIELDS)
    if fields.get("delay") is not None and fields.get("run_at") is not None:
        raise QueueError("run_at and delay: give one of them, not both", 2)
    return fields


def checked_job(given, defaults):
    """Return all fields of a job, ready to be stored; those not given from DEFAULTS."""
    if type(given) is not dict:
        raise QueueError('a job is a JSON object like {"command": "echo hi"}', 2)
    job = checked_fields(given, defaults.copy())
    if job["command"] is None:
        raise QueueError("command: missing; a job needs a shell command", 2)
    return job


def refuse_duplicate_keys(pairs):
    """Return a JSON object; one that names a key twice would lose the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise QueueError("%s: given twice in one object" % printable(twin), 2)
    return found


ESCAPED = r"{\"id\":\"job1\",\"command\":\"echo hi\"}"
NOT_JSON = "not JSON: %s; to run a command: queuectl.py enqueue -- %s"
QUOTED = "in cmd \"%s\", in PowerShell '%s'" % (ESCAPED, ESCAPED)


DECODER = json.JSONDecoder(object_pairs_hook=refuse_duplicate_keys)  # one for many lines


def parse_json(text):
    """Return what a JSON text says, or raise QueueError with why it is none."""
    try:
        return DECODER.decode(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        start = printable(text.strip()[:60])
        if re.match(r"\s*\{\s*\w", text) and '"' not in text:
            words = "not JSON, the shell took the quotes: %s; write %s"
            raise QueueError(words % (start, QUOTED), 2) from None
        if start[:1] not in ("{", "["):
            raise QueueError(NOT_JSON % (start, start), 2) from None
        hint = "; a job is an object on one line" if start == "{" else ""
        raise QueueError("not JSON: %s: %s%s" % (error, start, hint), 2) from None


def printable(text):
    """Return TEXT on one line, whatever could steer a terminal escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number_text(value):
    """Return a number as text, without a fraction of zero."""
    return "%d" % value if value == int(value) else "%g" % value


def setting_name(key):
    """Return the name of a setting, spelt with - or _ and in any case."""
    name = key.lower().replace("-", "_")
    if name not in SETTINGS:
        raise unknown_word("setting " + printable(key), name, SETTINGS)
    return name


# ======================================================================================
# Holds: locked files, waking, asking; what differs between systems
# ======================================================================================

# Whatever lives holds a file: it has it open and locked. The lock belongs to the open
# file, so the kernel keeps it until the last process that inherited the descriptor is
# gone, and frees it then, however that died. A file that nobody holds is a leftover,
# whatever it says. On Windows a lock is not inherited: there a job object ends a run
# with its worker.

if WINDOWS:
    import ctypes
    import msvcrt
    import subprocess
    from ctypes import wintypes

    import _winapi

    BINARY = os.O_BINARY
    LOCK_OFFSET = 2**40  # far behind the text, which others could not read else
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGBREAK)
    NO_DIRECTORY = (OSError,)  # or one that is just being removed
else:
    import fcntl
    import select

    BINARY = 0
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    WAKE_SIGNAL = signal.SIGURG  # ignored by who does not expect it
    NO_DIRECTORY = (FileNotFoundError,)

REQUESTS = {"stop": 0, "now": 5, "over": 9}  # where in a pool's file each is written


def try_lock(fd, shared=False):
    """Lock an open file unless another has it; a look is SHARED, so looks can meet."""
    try:
        if WINDOWS:
            os.lseek(fd, LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(fd, fcntl.LOCK_NB | kind)
        return True
    except OSError as error:
        if WINDOWS or isinstance(error, (BlockingIOError, PermissionError)):
            return False
        words = "the file system has no locks (%s); take a local disk"
        raise QueueError(words % error.strerror) from None


@contextlib.contextmanager
def open_descriptor(path, flags=os.O_RDONLY):
    """Open a file for a while."""
    fd = os.open(path, flags | BINARY)
    try:
        yield fd
    finally:
        os.close(fd)


def is_same_file(path, status):
    """Tell whether PATH still names the file of this status, as far as is known."""
    try:
        return os.path.samestat(os.stat(path), status)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def wait_until(condition, seconds, pause=POLL_INTERVAL / 10):
    """Wait until something holds or the time is over; return whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
    return True


def lock_file(path):
    """Make a file, or take over a leftover, and hold it; return its descriptor.

    Between opening and locking it somebody may look at it, or take it for a leftover
    and remove it: then it is tried again. For how long is bounded, since another
    process may have that name for good: two containers give their pools one number.
    """
    for _ in range(50):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o600)
        except FileNotFoundError:  # the folder went with the last pool that stopped
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            continue
        status = os.fstat(fd)
        if try_lock(fd) and is_same_file(path, status):
            if status.st_size:
                os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)  # locking went far behind the text on Windows
            return fd
        os.close(fd)
        time.sleep(POLL_INTERVAL / 100)
    raise QueueError("%s is held by another process of that number" % printable(path))


def is_locked(path):
    """Tell whether a living process holds a file."""
    try:
        with open_descriptor(path) as fd:
            return not try_lock(fd, shared=True)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True  # another user's: nobody here can tell


def owner_hint(path):
    """Return what to do about a file that is another user's, nothing if it is not."""
    with contextlib.suppress(OSError, AttributeError):
        if os.stat(path).st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return " belongs to another user: chown it, or run this as that user"
    return ""


def remove_leftover(path):
    """Remove a file that nobody holds, also while others look at it."""
    with contextlib.suppress(OSError):
        if WINDOWS:
            return os.remove(path)  # which refuses what somebody has open
        with open_descriptor(path) as fd:
            free = try_lock(fd, shared=True) and wait_until(lambda: try_lock(fd), POLL_INTERVAL)
            if free and is_same_file(path, os.fstat(fd)):
                os.remove(path)


def path_beside(path, ending):
    """Return the name of one of the files that lie beside a queue's database."""
    return (path[:-3] if path.endswith(".db") else path) + ending


def pool_file(path, pool):
    return path_beside(path, "-%d.pid" % pool)


def worker_file(path, pool, pid):
    return os.path.join(path_beside(path, ".runs"), "worker-%d-%d" % (pool, pid))


def pools_with_files(path):
    """Return the numbers of the pools that have a file, alive or not."""
    home, stem = os.path.split(path_beside(path, "-"))
    names = [name[len(stem) : -4] for name in os.listdir(home)
             if name.startswith(stem) and name.endswith(".pid")]
    return sorted(int(name) for name in names if name.isdecimal())


def workers_with_files(path):
    """Return pool and pid of the workers that have a file, alive or not."""
    found = []
    with contextlib.suppress(*NO_DIRECTORY):
        for name in os.listdir(path_beside(path, ".runs")):
            kind, *numbers = name.split("-")
            if kind == "worker" and len(numbers) == 2 and "".join(numbers).isdecimal():
                found.append(tuple(map(int, numbers)))
    return sorted(found)


def living_pools(path):
    """Return the pools of a queue that live, each with its workers: {pool: [pid]}.

    A worker outlives a supervisor that was killed, until its job has ended.
    """
    found = {pool: [] for pool in pools_with_files(path) if is_locked(pool_file(path, pool))}
    for pool, pid in workers_with_files(path):
        if is_locked(worker_file(path, pool, pid)):
            found.setdefault(pool, []).append(pid)
    return found


def remove_stale_pool_files(path):
    """Remove the files of pools that are gone, with all their workers.

    While a worker lives, it can be asked by it to stop, even if its supervisor is gone.
    """
    living = living_pools(path)
    for pool in pools_with_files(path):
        if pool not in living:
            remove_leftover(pool_file(path, pool))


def wake(pids):
    """Let processes of pools look at once; a hint, no more, and no number is proven."""
    for pid in () if WINDOWS else pids:
        with contextlib.suppress(OSError):
            os.kill(pid, WAKE_SIGNAL)


def wake_workers(path):
    """Let idle workers look at once instead of within a second."""
    with contextlib.suppress(OSError):
        wake(pid for _, pid in workers_with_files(path))


def request_stop(path, pool, word):
    """Write into a pool's file: `stop`, stop `now`, or that its drain is `over`."""
    with contextlib.suppress(FileNotFoundError):
        with open(pool_file(path, pool), "r+b") as file:
            file.seek(REQUESTS[word])
            file.write(word.encode())
    wake([pool])
    wake(pid for owner, pid in workers_with_files(path) if owner == pool)


def requested_stop(path, pool):
    """Return what a pool is asked: "now", "over", "stop" or None.

    A pool whose file was removed can never be asked: it stops.
    """
    try:
        with open_descriptor(pool_file(path, pool)) as fd:
            text = os.read(fd, 16)
    except FileNotFoundError:
        return "stop"
    except OSError:  # too many open files, say: it is asked again
        return None
    words = [word for word in ("now", "over", "stop") if word.encode() in text]
    return words[0] if words else None


def supervisor_is_gone(pool):
    """Tell a worker whether its supervisor is gone."""
    if not WINDOWS:
        return os.getppid() != pool
    import multiprocessing

    return not multiprocessing.parent_process().is_alive()


class Wake:
    """Wait for what comes first: a signal, a child's end, something to read, a time.

    `wait` returns true for the first two, so that who is woken looks at once. On
    Windows no signal reaches another process: who waits looks again and again.
    """

    def __init__(self):
        if not WINDOWS:
            self.reader, writer = os.pipe()
            os.set_blocking(self.reader, False)
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            for number in (WAKE_SIGNAL, signal.SIGCHLD):
                signal.signal(number, lambda *_: None)  # or it would not be noticed

    def wait(self, timeout, *readers):
        if WINDOWS:
            return time.sleep(max(0.0, min(timeout, POLL_INTERVAL / 4)))
        ready = select.select([self.reader, *readers], [], [], max(0.0, timeout))[0]
        return self.reader in ready and os.read(self.reader, 2**16)  # all it holds


def catch_signals(handler):
    """Let HANDLER take the signals to stop, but one that nohup has set to ignore."""
    for number in STOP_SIGNALS:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if WINDOWS or number != signal.SIGHUP or not ignored:
            signal.signal(number, handler)


def inherit_nothing():
    """Let no command inherit what this process was started with, such as a lock."""
    if os.path.isdir("/dev/fd"):  # on Windows nothing is inherited that is not named
        for fd in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # the one that listed them
                os.set_inheritable(fd, fd <= 2)


def shell_line(words):
    """Return the shell line that runs these words; a single one is a line already."""
    if len(words) == 1:
        return words[0]
    if WINDOWS:
        return subprocess.list2cmdline(words)
    import shlex

    return " ".join(map(shlex.quote, words))


# ======================================================================================
# Queue: the database; the only SQL
# ======================================================================================

def in_states(states):
    """Return the condition for them. (Not with IN: SQLite builds its list for each row.)

    Only known ones get into a statement: `index` raises ValueError.
    """
    names = [STATES[STATES.index(state)] for state in states]
    return "(%s)" % (" OR ".join(map("state = '{}'".format, names)) or "0")


ORDER = "priority DESC, seq"  # in which jobs are claimed
# True of every rare state. SQLite uses the index of those, jobs_rare, only in a query
# that says it word by word.
RARE = "state <> 'pending' AND state <> 'completed'"

# Moves the lock of a job that leaves: of those that wait for it alone, the first one
# becomes claimable, unless one of them runs.
ELECT = """
    UPDATE jobs SET claimable = 2
        WHERE lock = OLD.lock AND state = 'pending' AND claimable = 1;
    UPDATE jobs SET claimable = 1
        WHERE seq = (SELECT seq FROM jobs WHERE lock = OLD.lock AND state = 'pending'
            AND claimable = 2 ORDER BY {order} LIMIT 1)
        AND NOT EXISTS (SELECT 1 FROM jobs
            WHERE lock = OLD.lock AND state = 'processing' AND {rare});"""

# A new queue is made by this alone. A queue of an older version goes through MIGRATIONS
# first. Then this adds what it still lacks, all indexes and triggers among it.
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- a deleted job's is never given to another
    id TEXT NOT NULL UNIQUE,
    command TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK ({states}),
    attempts INTEGER NOT NULL DEFAULT 0,    -- claims that count against max_retries
    max_retries INTEGER NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0,
    run_at REAL NOT NULL,                   -- when it is, or was, due next
    claimable INTEGER NOT NULL,             -- 0: it waits for a time, or for others;
                                            -- 2: for its lock alone; else 1, and so if
                                            -- it is not pending or failed
    timeout REAL,
    cwd TEXT NOT NULL,
    env TEXT,
    launcher TEXT,                          -- in place of the setting
    lock TEXT,                              -- name of what one job at a time may use
    waits INTEGER NOT NULL DEFAULT 0,       -- how many rows of `waits` it has
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    run INTEGER NOT NULL DEFAULT 0,         -- number of its latest run; only ever grows
    deaths INTEGER NOT NULL DEFAULT 0,      -- of workers that ran it
    cancelled INTEGER NOT NULL DEFAULT 0,   -- a request, carried out by whoever runs it
    error TEXT                              -- why it is failed or dead
);
CREATE TABLE IF NOT EXISTS runs (
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
CREATE TABLE IF NOT EXISTS waits (          -- one for each job that a job comes after,
    seq INTEGER NOT NULL,                   -- until that is completed
    waits_for INTEGER NOT NULL,
    PRIMARY KEY (seq, waits_for)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS config (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (         -- of all jobs, by state
    state TEXT PRIMARY KEY,
    jobs INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (         -- of all runs there ever were, by outcome
    outcome TEXT PRIMARY KEY,
    runs INTEGER NOT NULL,
    seconds REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS untold (         -- deaths that `on_dead` is to announce yet
    seq INTEGER PRIMARY KEY
);
INSERT OR IGNORE INTO counts VALUES {counts};
INSERT OR IGNORE INTO totals VALUES
    ('completed', 0, 0), ('failed', 0, 0), ('interrupted', 0, 0);
-- It names the runs' files: those of a queue that was removed are never ours.
INSERT OR IGNORE INTO config VALUES ('token', lower(hex(randomblob(4))));

-- Jobs in the order in which they are claimed, those that wait for a time, and the few
-- that are neither waiting nor completed: a claim costs the same with a million others.
-- No IN here or above: SQLite builds its list for each row, half an insert's time.
CREATE INDEX jobs_claimable ON jobs ({order})
    WHERE state = 'pending' AND claimable = 1;
CREATE INDEX jobs_waiting ON jobs (run_at) WHERE claimable = 0 AND waits = 0;
CREATE INDEX jobs_locked ON jobs (lock, claimable, {order})
    WHERE lock NOT NULL AND state = 'pending';
CREATE INDEX jobs_rare ON jobs (state, seq) WHERE {rare};
CREATE INDEX waits_for ON waits (waits_for);

-- Counting a million rows takes a third of a second: triggers keep the counts, and
-- `enqueue`, for which one a row would cost half of its time.
CREATE TRIGGER job_moved AFTER UPDATE OF state ON jobs WHEN OLD.state <> NEW.state BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    UPDATE counts SET jobs = jobs + 1 WHERE state = NEW.state; END;
CREATE TRIGGER job_removed AFTER DELETE ON jobs BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    DELETE FROM waits WHERE seq = OLD.seq;
    DELETE FROM runs WHERE seq = OLD.seq; END;

-- Whatever adds or ends a wait: `waits` is their number, and with 0 the time alone
-- counts. The job that another waits for is its front; one whose front was removed, as
-- `delete --all` does by pages, can't go on.
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

-- Whatever becomes of jobs that share a lock: the first of them may be claimed, and
-- none while one of them runs. A changed lock counts as soon as its job is claimable
-- again. (One for INSERT costs any job a tenth more: `enqueue` moves one of each lock.)
CREATE TRIGGER lock_moved AFTER UPDATE OF state, claimable ON jobs
    WHEN OLD.lock NOT NULL BEGIN {elect} END;
CREATE TRIGGER lock_left AFTER DELETE ON jobs WHEN OLD.lock NOT NULL BEGIN {elect} END;
PRAGMA application_id = {application};
PRAGMA user_version = {version};
""".format(
    order=ORDER, rare=RARE, elect=ELECT.format(order=ORDER, rare=RARE),
    states=in_states(STATES),
    counts=", ".join(map("('{}', 0)".format, STATES)),
    application=APPLICATION_ID, version=SCHEMA_VERSION)

# The steps from an older version of the schema to the next one: {version: SQL}. A step
# has no index and no trigger: those are dropped before the steps and made anew by SCHEMA.
MIGRATIONS = {}

CLAIMABLE = "state = 'pending' AND claimable = 1"
FOR_A_TIME = "claimable = 0 AND waits = 0"  # it waits for nothing else
# `claimable` of what waits for no time: with a lock 2, and `lock_moved` elects one.
OPEN_GATE = "(waits = 0) * (1 + (lock NOT NULL))"
WAITED_FOR = "EXISTS (SELECT 1 FROM waits WHERE waits_for = jobs.seq)"
PAUSED = "EXISTS (SELECT 1 FROM config WHERE key = 'paused')"
# By number, since SQLite takes a tuple in half the time of a dict.
INSERTED = (*COLUMNS, "now")
INSERT_JOB = re.sub(
    r":(\w+)", lambda name: "?%d" % (1 + INSERTED.index(name[1])),
    "INSERT INTO jobs (%s, claimable, created_at, updated_at) VALUES (:%s,"
    " (:run_at <= :now) * (1 + (:lock NOT NULL)), :now, :now)" % (
        ", ".join(COLUMNS), ", :".join(COLUMNS)))
POKE_LOCK = "UPDATE jobs SET claimable = 2 WHERE seq = (SELECT seq FROM jobs WHERE" \
    " lock = ? AND state = 'pending' AND claimable = 2 LIMIT 1)"
RESET = "state = 'pending', attempts = 0, deaths = 0, cancelled = 0, error = NULL"
RESTART = "UPDATE jobs SET %s, %s, claimable = 0, updated_at = :now" \
    " WHERE id = :id AND %s" % (
        RESET, ", ".join("%s = :%s" % (name, name) for name in COLUMNS[1:]),
        in_states(FINISHED))
SECONDS = "round(finished_at - started_at, 3)"  # that a run took, NULL until its end
COLUMN_OF = {
    "error": "jobs.error", "seconds": SECONDS,
    "after": "CASE WHEN waits > 0 THEN (SELECT group_concat(front.id, char(10))"
    " FROM waits JOIN jobs AS front ON front.seq = waits_for"
    " WHERE waits.seq = jobs.seq) END"}
SELECT_JOB = "SELECT %s, seq, run, claimable, waits FROM jobs LEFT JOIN runs USING (seq, run) " \
    % ", ".join("%s AS %s" % (COLUMN_OF.get(name, name), name) for name in PUBLIC)
# How a run ended that was no fault of its job, or that somebody wanted to end.
INTERRUPTED = ("worker died", "stop --now", "stopped", "cancelled")
OUTCOMES = ("completed", "failed", "interrupted")
OUTCOME = """CASE WHEN error IS NULL THEN 'completed'
    WHEN error IN (%s) THEN 'interrupted' ELSE 'failed' END""" % (
    ", ".join(map("'{}'".format, INTERRUPTED)))
BARS = 60  # of the picture of throughput
BINS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # seconds, of run times
NO_JOB = "there is no job "


Condition = collections.namedtuple("Condition", "sql, values")


def where(states=STATES, text="", before=None, cancelled=None, waited_for=None,
          errors=False):
    """Return the condition for jobs of which all that is given is true.

    They are in one of these states, have a text in id or command, or in ERRORS, too,
    finished before a time, were cancelled or not, are waited for by others or not.
    """
    parts = []
    if {*states} != {*STATES}:
        parts.append(in_states(states))
        if not {"pending", "completed"} & {*states}:
            parts.append(RARE)
    if text:
        parts.append("(instr(id, :text) OR instr(command, :text)%s)"
                     % (" OR instr(jobs.error, :text)" * errors))
    if before is not None:
        parts.append(in_states(FINISHED) + " AND updated_at < :before")
    if cancelled is not None:
        parts.append("jobs.error IS %s 'cancelled'" % ("" if cancelled else "NOT"))
    if waited_for is not None:
        parts.append(("" if waited_for else "NOT ") + WAITED_FOR)
    return Condition(" AND ".join(parts or ["1"]), {"text": text, "before": before})


def percentiles(values):
    """Return median, 95th percentile and maximum; None without any."""
    ordered = sorted(values) or [None]
    return {name: ordered[min(int(len(ordered) * part), len(ordered) - 1)]
            for name, part in (("median", 0.5), ("p95", 0.95), ("longest", 1))}


def database_uri(path):
    """Return the name of a database that SQLite does not create if it is gone."""
    name = re.sub("[%?#]", lambda match: "%%%x" % ord(match[0]), path)
    name = name.replace(os.sep, "/")
    return "file://" + "/" * (name[0] != "/") + name + "?mode=rw"


CONNECTED = weakref.WeakSet()  # the queues of this process that have a connection


class Database:
    """One SQLite file, in the hands of one process and one thread.

    It knows nothing of jobs: how the file is made and opened, how a transaction begins
    and ends, and that no connection crosses a fork.
    """

    def __init__(self, path, sync="FULL", lock_timeout=LOCK_TIMEOUT, new=True):
        self.path = os.path.realpath(path)  # one queue, whatever links lead to it
        self.lock_timeout, self.sync, self._db = lock_timeout, sync, None
        self.owner = os.getpid(), _thread.get_ident()
        self._find(new)
        try:
            if not self._is_prepared():
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _find(self, new):
        """Find the file, or make it; refuse one by which jobs would get lost."""
        if not os.path.exists(self.path):
            if not new:  # a pool must not bring back what its user removed
                raise QueueError("there is no queue %s" % printable(self.path))
            # Only a new one: to close another's would drop what this process has locked.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        self.file = os.stat(self.path)
        if not stat.S_ISREG(self.file.st_mode):
            raise QueueError("%s is not a regular file" % printable(self.path))
        # SQLite finds the log by the path. A running pool does not ask again, or
        # `cp -al` would end it.
        if self.sync == "FULL" and self.file.st_nlink > 1:
            words = "%s has another name (a hard link), by which jobs would get lost"
            raise QueueError(words % printable(self.path))
        if owner_hint(self.path):
            raise QueueError(printable(self.path) + owner_hint(self.path))

    @property
    def db(self):
        """The connection, for the process and the thread that opened it."""
        self._check_owner()
        if self._db is None:
            try:
                self._connect()
            except BaseException:
                self._disconnect()  # the next use would find it half set up
                raise
        return self._db

    def _connect(self):
        self.check_exists()
        self._db = sqlite3.connect(
            database_uri(self.path), uri=True, timeout=self.lock_timeout, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._rows("PRAGMA synchronous = " + self.sync)
        self.check_exists()  # or this is another one, just put in its place
        self._rows("PRAGMA fullfsync = ON")  # macOS: sync for real
        self._rows("PRAGMA journal_size_limit = %d" % 2**24)
        CONNECTED.add(self)

    def _check_owner(self):
        if self.owner != (os.getpid(), _thread.get_ident()):
            why = "is another process's or thread's" if self.owner else "was closed"
            raise QueueError("this Queue %s: open one here" % why)

    def close(self):
        """Let go of the file; what is used after that raises QueueError."""
        if self.owner and self.owner[0] == os.getpid():
            self._check_owner()
            self._disconnect()
        self.owner = None

    def _disconnect(self):
        if self._db is not None:
            self._db.close()
            self._db = None

    @staticmethod
    def before_fork():
        """Leave no connection to a child; the next use here opens another.

        SQLite would take the locks that it has here for its own there, and remove a log
        that others write to: acknowledged jobs were lost so.
        """
        here = os.getpid(), _thread.get_ident()
        for queue in list(CONNECTED):
            if queue.owner == here and queue._db and not queue._db.in_transaction:
                queue._disconnect()

    def _is_prepared(self):
        """Tell whether its header says that there is nothing to prepare."""
        try:
            return (self._value("PRAGMA user_version"), self._value(
                "PRAGMA application_id")) == (SCHEMA_VERSION, APPLICATION_ID)
        except sqlite3.OperationalError as error:
            # SQLite drops a log that lies beside an empty database. Of two first
            # commands that do so at once one fails, and may try again.
            if "disk I/O" in str(error):
                return False
            raise

    def _prepare(self):
        """Create the tables of a new queue, or convert a queue of an older version.

        Sixty first commands may get here at once, so the version is read again within
        the transaction. The switch to the write-ahead log waits for no lock, so it is
        tried until it holds. It comes before any table is made: a kill in between would
        leave a queue without that log.
        """
        if self._is_empty() and not wait_until(self._use_wal, self.lock_timeout):
            raise QueueError("%s: another program has locked it" % printable(self.path))
        with self.transaction():
            if self._is_prepared():  # by another process, in the meantime
                return
            if not self._is_empty():
                self._migrate()
            self._execute_all(SCHEMA)

    def _is_empty(self):
        return not self._value("SELECT 1 FROM sqlite_master")

    def _migrate(self):
        """Bring an older version up to what SCHEMA expects, or refuse the database."""
        name, version = printable(self.path), self._value("PRAGMA user_version")
        if self._value("PRAGMA application_id") != APPLICATION_ID:
            raise QueueError("%s is not a queue of queuectl" % name)
        if version < 2:
            words = "%s was made by queuectl 1.0: convert it with queuectl 1.1 first"
            raise QueueError(words % name)
        if version > SCHEMA_VERSION:
            words = "%s has version %d of the schema, and this queuectl knows version"
            words += " %d: take a newer queuectl.py"
            raise QueueError(words % (name, version, SCHEMA_VERSION))
        for kind, made in self._rows(
                "SELECT type, name FROM sqlite_master"
                " WHERE type IN ('index', 'trigger') AND sql NOT NULL"):
            self.db.execute("DROP %s %s" % (kind, made))
        for step in range(version, SCHEMA_VERSION):
            self._execute_all(MIGRATIONS[step])

    def _use_wal(self):
        """Switch to the write-ahead log; false while another program has a lock.

        A pool may still have the index (-shm) of a log whose database was removed. Who
        took it over would fail, or write a log that the next process can't read:
        acknowledged jobs were lost so. SQLite drops such a log, but not its index.
        """
        try:
            self.db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self.db.execute("BEGIN EXCLUSIVE")
            if self._value("PRAGMA journal_mode") != "wal":  # or it is in use already
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path + "-shm")
            self.db.execute("ROLLBACK")
            return self._rows("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise

    def _execute_all(self, script):
        """Execute statements within a transaction; `executescript` commits first."""
        statement = ""
        for line in script.splitlines(True):
            statement += line
            if sqlite3.complete_statement(statement):
                self.db.execute(statement)
                statement = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

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
        deadline, pause = time.monotonic() + self.lock_timeout, 0.00003
        self._rows("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    return self.db.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(pause)
                pause = min(1.5 * pause, 0.02)
        finally:
            self._rows("PRAGMA busy_timeout = %d" % (1000 * self.lock_timeout))

    def _change(self, sql, *values, **named):
        """Execute a statement; how many rows it found to change is the answer."""
        return self.db.execute(sql, named or values).rowcount

    def _rows(self, sql, *values, **named):
        return self.db.execute(sql, named or values).fetchall()

    def _row(self, sql, *values):
        """Return the first row, None without one. A statement with many has a LIMIT.

        All are read: one that is not read to its end would go on within a transaction.
        """
        rows = self._rows(sql, *values)
        return rows[0] if rows else None

    def _value(self, sql, *values):
        row = self._row(sql, *values)
        return row[0] if row else None

    def check_exists(self):
        """Raise QueueError if it is gone: what waits for it would wait for ever."""
        if not is_same_file(self.path, self.file):
            raise QueueError("%s was removed" % printable(self.path))


class Queue(Database):
    """The jobs, their runs and the settings of one queue.

    Every verb that changes a job names the state that it leaves; what it could not move
    was somebody else's, and nothing happens. `clock` returns epoch seconds.
    """

    def __init__(self, path, sync="FULL", lock_timeout=LOCK_TIMEOUT, clock=time.time, new=True):
        super().__init__(path, sync, lock_timeout, new)
        self.clock = clock
        self.token = self._value("SELECT value FROM config WHERE key = 'token'")

    # -- enqueue -----------------------------------------------------------------------

    def defaults(self, cwd=None):
        """Return the fields of a job that gives none: from the settings, as of now."""
        values = self.settings()
        return dict(
            {name: default for name, (_, default, _, _) in FIELDS.items()},
            max_retries=values["max_retries"], timeout=values["timeout"],
            cwd=checked("cwd", check_directory, cwd or current_directory()))

    def add(self, command, **fields):
        """Check and enqueue one job, with the fields of its JSON; return its id."""
        job = checked_job(dict(fields, command=command), self.defaults())
        self.enqueue([job])
        return job["id"]

    def enqueue(self, jobs, unique=False):
        """Add jobs as `checked_job` makes them, all or none; return first and last seq.

        JOBS may be a generator: it is read within the transaction. UNIQUE leaves out a
        job whose id waits or runs, and starts a finished one again: the same job with
        other fields, so that its runs stay.
        """
        now, job, followers, locks = self.clock(), None, [], set()
        values = operator.itemgetter(*INSERTED)

        def rows():
            nonlocal job
            for job in jobs:
                job["now"] = now
                if job["id"] is None:
                    if unique:
                        raise QueueError("id: missing; a unique job needs one", 2)
                    job["id"] = self._new_id()
                if job["run_at"] is None:
                    job["run_at"] = min(now + (job["delay"] or 0), MAX_TIME)
                new = not unique or self._restart(job) is None
                if job["after"] and (new or not job["left"]):
                    followers.append((job["id"], job["after"]))
                if new:
                    if job["lock"]:
                        locks.add(job["lock"])
                    yield values(job)

        with self.transaction():
            self.check_exists()  # a removed file takes jobs, too, and nobody finds them
            try:
                added = self.db.executemany(INSERT_JOB, rows()).rowcount
            except sqlite3.IntegrityError:
                words = "there is a job %s already"
                raise QueueError(words % printable(job["id"])) from None
            count = "UPDATE counts SET jobs = jobs + ? WHERE state = 'pending'"
            self._change(count, added)
            last = self._value("SELECT MAX(seq) FROM jobs") or 0
            self._add_dependencies(followers, new=not unique)  # later ones are there now, too
            self.db.executemany(POKE_LOCK, [(lock,) for lock in locks])
        wake_workers(self.path)
        return last - added + 1, last

    def _add_dependencies(self, followers, new=False):
        """Let jobs wait for others: pairs of an id and the ids that it comes after.

        NEW jobs are in a circle only if one of them waits for one of a higher number.
        """
        suspect = not new
        for id, fronts in followers:
            seq = self.job(id)["seq"]
            for name in fronts:
                front = self._rows("SELECT seq, state FROM jobs WHERE id = ?", name)
                if not front:
                    raise QueueError("after: " + NO_JOB + printable(name))
                if front[0]["state"] != "completed":
                    self._change("INSERT OR IGNORE INTO waits VALUES (?, ?)",
                                 seq, front[0]["seq"])
                    suspect |= front[0]["seq"] >= seq
        if suspect:
            self._refuse_circles()

    def _refuse_circles(self):
        """Raise QueueError if there is no order in which all waits come to an end."""
        followers, waits = collections.defaultdict(list), collections.Counter()
        for seq, front in self._rows("SELECT seq, waits_for FROM waits"):
            followers[front].append(seq)
            waits[seq] += 1
        free = [front for front in followers if not waits[front]]
        while free:
            for seq in followers[free.pop()]:
                waits[seq] -= 1
                if not waits[seq]:
                    free.append(seq)
        for seq in +waits:
            id = self._value("SELECT id FROM jobs WHERE seq = ?", seq)
            raise QueueError("after: in a circle, so that job %s would never run" % id)

    def _restart(self, job):
        """Let a finished job of this id start again; return its seq, None without one.

        An unfinished one is left alone, which is noted in JOB.
        """
        again = self._change(RESTART, **job)
        seq = self._value("SELECT seq FROM jobs WHERE id = ?", job["id"])
        if again:  # what it waited for is among its fields
            self._change("DELETE FROM waits WHERE seq = ?", seq)
        job["left"] = seq is not None and not again
        return seq

    def _new_id(self):
        """Return a short id that no job has, without letters that look alike."""
        while True:
            digits = os.urandom(6)
            name = "".join("23456789bcdfghjkmnpqrstvwxyz"[d % 28] for d in digits)
            if self._value("SELECT 1 FROM jobs WHERE id = ?", name) is None:
                return name

    # -- the life of a job -------------------------------------------------------------

    def claim(self, worker, take_lease):
        """Give the next job to a worker, PENDING to PROCESSING; None without one.

        `take_lease(run)` makes the file of the run and holds it. It is called before
        this is committed, or the run would look like that of a dead worker.
        """
        with self.transaction():
            now = self.clock()
            self.promote(now)
            row = self._row(
                "SELECT seq, id, command, timeout, cwd, env, max_retries, launcher,"
                " attempts + 1 AS attempt, run + 1 AS run FROM jobs"
                " WHERE " + CLAIMABLE + " AND NOT " + PAUSED +
                " ORDER BY " + ORDER + " LIMIT 1")
            if row is None:
                return None
            values = self.settings()
            launcher = row["launcher"] or values["launcher"]
            run = dict(row, worker=worker, pid=None, started_at=now,
                       lease=self.lease_path(row), output_limit=values["output_limit"],
                       launcher=None if launcher == "none" else launcher)
            take_lease(run)
            self.db.execute(
                "UPDATE jobs SET state = 'processing', attempts = :attempt, run = :run,"
                " updated_at = :started_at WHERE seq = :seq AND state = 'pending'", run)
            self.db.execute(
                "INSERT INTO runs (seq, run, attempt, worker, started_at)"
                " VALUES (:seq, :run, :attempt, :worker, :started_at)", run)
            return run

    def promote(self, now):
        """Let jobs be claimed whose time has come, FAILED to PENDING.

        A hundred thousand that become due at once would hold up one claim for seconds:
        what is left after some of them is for the next.
        """
        until = time.monotonic() + POLL_INTERVAL / 10
        while self._change(
                "UPDATE jobs SET state = 'pending', claimable = " + OPEN_GATE +
                " WHERE " + in_states(WAITING) + " AND seq IN (SELECT seq FROM jobs WHERE "
                + FOR_A_TIME + " AND run_at <= ? ORDER BY run_at LIMIT 100)",
                now) == 100 and time.monotonic() < until:
            pass

    def promote_after_clock_step(self):
        """FAILED to PENDING, where the clock was set back behind the failure."""
        now = self.clock()
        self._change(
            "UPDATE jobs SET state = 'pending', claimable = " + OPEN_GATE + ", run_at = ?"
            " WHERE state = 'failed' AND " + RARE + " AND " + FOR_A_TIME +
            " AND updated_at > ?", now, now + 1)

    def complete(self, run, result):
        """PROCESSING to COMPLETED."""
        return self._finish(run, result, "completed", None)

    def fail(self, run, result):
        """PROCESSING to FAILED, to be tried again after the backoff, or to DEAD."""
        if run["attempt"] >= max(1, run["max_retries"]):
            return self._finish(run, result, "dead", result["error"])
        values = self.settings()
        wait = backoff(values["backoff_base"], run["attempt"], values["backoff_max"])
        due = min(self.clock() + wait, MAX_TIME)
        error = result["error"]
        return self._finish(run, result, "failed", error, claimable=0, run_at=due)

    def release(self, run, result, blamed=False):
        """PROCESSING back to PENDING; the attempt, no fault of the job, is given back.

        A job that is BLAMED too often for the death of its worker is DEAD: it may be
        what kills them.
        """
        deaths = self._value("SELECT deaths FROM jobs WHERE seq = ?", run["seq"]) or 0
        deaths += blamed
        if deaths >= MAX_DEATHS:
            error = "worker died %d times" % deaths
            return self._finish(run, result, "dead", error, deaths=deaths)
        rest = run["attempt"] - 1
        return self._finish(run, result, "pending", None, attempts=rest, deaths=deaths)

    def _finish(self, run, result, state, error, **changes):
        """Move a job out of PROCESSING if this run still owns it; record the run."""
        with self.transaction():
            if state != "completed" and self.cancel_requested(run):
                state, error, changes = "dead", "cancelled", {}
            changes.update(state=state, error=error, updated_at=self.clock())
            columns = ", ".join(name + " = ?" for name in changes)
            moved = self._change(
                "UPDATE jobs SET " + columns +
                " WHERE seq = ? AND state = 'processing' AND run = ?",
                *changes.values(), run["seq"], run["run"])
            if not moved:
                return None
            if result["error"] == "refused":  # nothing ran, however often
                self._change("DELETE FROM runs WHERE seq = ? AND run = ?",
                             run["seq"], run["run"])
                return state
            ended = {**run, **result}
            self.db.execute(
                "UPDATE runs SET pid = :pid, started_at = :started_at,"
                " finished_at = :finished_at, exit_code = :exit_code,"
                " error = :error, output = :output"
                " WHERE seq = :seq AND run = :run", ended)
            self.db.execute(
                "UPDATE totals SET runs = runs + 1,"
                " seconds = seconds + :finished_at - :started_at"
                " WHERE outcome = (SELECT " + OUTCOME +
                " FROM (SELECT :error AS error))", ended)
            if state == "dead" and error != "cancelled":
                self._change("INSERT OR IGNORE INTO untold VALUES (?)", run["seq"])
            return state

    def announce(self, start):
        """Hand to START a death that was not announced yet; False without one.

        It is forgotten once START has returned: killed in between, it is announced
        again. START may use Popen within the transaction: its child runs nothing of
        Python, and exec closes the database. A plain fork here would be wrong.
        """
        if self._value("SELECT 1 FROM untold LIMIT 1") is None:
            return False
        with self.transaction():
            seq = self._value("SELECT seq FROM untold LIMIT 1")
            for job in self._rows(SELECT_JOB + "WHERE seq = ? AND state = 'dead'", seq):
                start(job)
            self._change("DELETE FROM untold WHERE seq = ?", seq)
        return True

    def is_current(self, run):
        """Tell whether a run still owns its job."""
        query = "SELECT 1 FROM jobs WHERE seq = ? AND run = ? AND state = 'processing'"
        return bool(self._value(query, run["seq"], run["run"]))

    def cancel_requested(self, run):
        """Tell whether a job is to be cancelled: DEAD as soon as its run has ended."""
        return bool(self._value("SELECT cancelled FROM jobs WHERE seq = ?", run["seq"]))

    def record_pid(self, run):
        """Record the process of a run that has been going on for a while."""
        self._change(
            "UPDATE runs SET pid = ?, started_at = ?"
            " WHERE seq = ? AND run = ? AND finished_at IS NULL",
            run["pid"], run["started_at"], run["seq"], run["run"])

    def edit(self, id, fields):
        """Change fields of a job that waits, PENDING or FAILED.

        They are as `checked_fields` makes them. The job passes the gate again: its
        time, its waits, its lock. One that has to wait for others is no longer FAILED.
        """
        now = self.clock()
        changes = {name: fields[name] for name in COLUMNS if name in fields}
        if "delay" in fields:
            changes["run_at"] = min(now + fields["delay"], MAX_TIME)
        columns = "".join("%s = :%s, " % (name, name) for name in changes)
        query = "UPDATE jobs SET " + columns + "claimable = 0, updated_at = :now"
        with self.transaction():
            words = "job %(id)s is %(state)s, and only one that waits can be changed"
            self._apply([id], [(query, in_states(TAKES["edit"]))], words, **changes)
            if "after" in fields:
                seq = self.job(id)["seq"]
                self._change("DELETE FROM waits WHERE seq = ?", seq)
                self._add_dependencies([(id, fields["after"])])
            self.promote(now)
        wake_workers(self.path)

    # The next three take ids, of which all are changed or none, or a condition.

    def cancel(self, jobs):
        """PENDING or FAILED to DEAD, of a running one a request; return how many."""
        return self._apply(jobs, [
            ("UPDATE jobs SET state = 'dead', error = 'cancelled', claimable = 1,"
             " updated_at = :now", in_states(WAITING)),
            ("UPDATE jobs SET cancelled = 1", "state = 'processing'"),
        ], "job %(id)s is %(state)s already")

    def retry(self, jobs, states=TAKES["retry"]):
        """COMPLETED or DEAD to PENDING with attempts 0; return how many."""
        again = "UPDATE jobs SET %s, claimable = %s, run_at = :now, updated_at = :now"
        return self._apply(jobs, [(again % (RESET, OPEN_GATE), where(states).sql)],
                           "job %(id)s is %(state)s, not " + " or ".join(states))

    def delete(self, jobs):
        """Remove jobs and their runs, but no running ones; return how many.

        One that others wait for is removed by id only together with them.
        """
        change = "DELETE FROM jobs", in_states(TAKES["delete"])
        if isinstance(jobs, Condition):
            count, removed, chained = 0, True, True
            while removed and chained:  # a chain goes from its end
                chained = self._value("SELECT 1 FROM waits LIMIT 1")
                removed = self._apply(jobs, [change])
                count += removed
            self._vacuum()
            return count
        with self.transaction():
            named = self._named(jobs)
            numbers = {job["seq"] for job in named}
            query = "SELECT seq, id FROM jobs JOIN waits USING (seq)"
            for job in named:
                for seq, id in self._rows(query + " WHERE waits_for = ?", job["seq"]):
                    if seq not in numbers:
                        words = "job %s is waited for by %s: name that, too"
                        raise QueueError(words % (printable(job["id"]), printable(id)))
            count = self._apply(jobs, [change], "job %(id)s is running")
        self._vacuum()
        wake_workers(self.path)
        return count

    def _apply(self, jobs, changes, refusal="", **values):
        """Apply changes to jobs, each to those in the states that it leaves."""
        values["now"] = self.clock()
        if isinstance(jobs, Condition):
            count = self._in_pages(jobs, changes, values)
        else:
            with self.transaction():
                named = self._named(jobs)
                for job in named:
                    if not any([self._change(change + " WHERE seq = :seq AND " + state,
                                             **values, seq=job["seq"])
                                for change, state in changes]):
                        raise QueueError(refusal % dict(job, id=printable(job["id"])))
            count = len(named)
        if not self.db.in_transaction:  # or they would see nothing of it yet
            wake_workers(self.path)
        return count

    def _named(self, ids):
        if isinstance(ids, str):
            raise QueueError("ids: a list of them, not one text")
        return [self.job(id) for id in dict.fromkeys(ids)]

    def prune(self, keep, first):
        """Remove the jobs of one page that were completed more than KEEP seconds ago.

        Return how many, and where the next page begins.
        """
        page = self._rows(
            "SELECT seq FROM jobs WHERE seq >= ? ORDER BY seq LIMIT ?", first, BATCH)
        if not page:
            return 0, 1
        last = page[-1]["seq"]
        count = self._change(
            "DELETE FROM jobs WHERE seq BETWEEN ? AND ? AND updated_at < ?"
            " AND state = 'completed'", first, last, self.clock() - keep)
        self._vacuum()
        return count, last + 1

    def _in_pages(self, jobs, changes, values):
        """Apply changes to all jobs that meet a condition; return how many they were.

        In many short transactions: one for a million jobs, or for a few hundred with
        large outputs, would hold up everybody for seconds.
        """
        where = "%s AND (%s)" % (jobs.sql, " OR ".join(state for _, state in changes))
        values = {**values, **jobs.values, "last": 0}
        count, length = 0, BATCH
        while True:
            page = self._rows("SELECT seq FROM jobs WHERE seq > :last AND " + where
                              + " ORDER BY seq LIMIT :length", **values, length=length)
            if not page:
                return count
            began = time.monotonic()
            values.update(first=page[0][0], last=page[-1][0])
            with self.transaction():
                for change, state in changes:
                    count += self._change(
                        "%s WHERE seq BETWEEN :first AND :last AND %s AND %s"
                        % (change, jobs.sql, state), **values)
            took = max(0.001, time.monotonic() - began)  # Windows has a coarse clock
            length = max(1, min(BATCH, int(len(page) * POLL_INTERVAL / 4 / took)))

    def _vacuum(self):
        """Return the space of what was removed to the file system, if it is much."""
        for _ in range(self._value("PRAGMA freelist_count") // 1000):
            # As a script, since `execute` ends it after the first page.
            self.db.executescript("PRAGMA incremental_vacuum(1000)")

    # -- reading -----------------------------------------------------------------------

    def job(self, id):
        """Return one job with what its latest run left."""
        rows = self._rows(SELECT_JOB + "WHERE id = ?", id) if is_storable(id) else []
        if not rows:
            raise QueueError(NO_JOB + printable(id))
        return rows[0]

    def dead_jobs(self, condition, below=None):
        """Yield the dead jobs that meet a condition, the latest death first.

        Those below a job in this order, if its id is given and it is still dead.
        """
        place = self._rows(
            "SELECT updated_at, seq FROM jobs WHERE id = ? AND state = 'dead'", below)
        at, number = place[0] if place else (MAX_TIME, MAX_INTEGER)
        query = "SELECT seq FROM jobs WHERE (updated_at, seq) < (:at, :number) AND "
        query += condition.sql + " ORDER BY updated_at DESC, seq DESC"
        numbers = self._rows(query, **condition.values, at=at, number=number)
        for seq, in numbers:
            yield from self._rows(SELECT_JOB + "WHERE seq = ? AND state = 'dead'", seq)

    def find_job(self, prefix):
        """Return the job of this id, or else the only one whose id begins so."""
        ids = []
        if len(prefix) >= 4 and is_storable(prefix):
            ids = [id for id, in self._rows(
                "SELECT id FROM jobs WHERE id >= ? AND id < ? LIMIT 2",
                prefix, prefix + chr(sys.maxunicode))]
        if len(ids) == 2 and prefix not in ids:
            raise QueueError("several jobs begin with %s: %s, %s" % (
                printable(prefix), *map(printable, ids)))
        return self.job(ids[0] if len(ids) == 1 else prefix)

    def jobs(self, condition=where(), limit=0, newest=False, first=1, last=MAX_INTEGER,
             brief=False):
        """Yield jobs, oldest or NEWEST first; LIMIT 0 is all; BRIEF ones are quicker.

        Each page is a read of its own: a long one keeps the log from its reset.
        """
        left = limit or MAX_INTEGER
        query = "SELECT seq, id, state, command FROM jobs " if brief else SELECT_JOB
        query += "WHERE seq BETWEEN :first AND :last AND " + condition.sql
        query += " ORDER BY seq %s LIMIT :size" % ("DESC" if newest else "")
        while left > 0:
            page = self._rows(query, **condition.values, first=first, last=last,
                              size=min(left, BATCH))
            yield from page
            left = left - len(page) if len(page) == BATCH else 0
            if page and newest:
                last = page[-1]["seq"] - 1
            elif page:
                first = page[-1]["seq"] + 1

    def count(self, condition):
        """Return how many jobs meet a condition."""
        sql = "SELECT COUNT(*) FROM jobs WHERE " + condition.sql
        return self._rows(sql, **condition.values)[0][0]

    def seq_before(self, id):
        """Return the seq before that of a job; if it is gone, one above all."""
        number = self._value("SELECT seq FROM jobs WHERE id = ?", id) or MAX_INTEGER
        return number - 1

    def state(self, id):
        """Return the state of a job, None if it is gone."""
        return self._value("SELECT state FROM jobs WHERE id = ?", id)

    def dependencies(self, job):
        """Return the jobs that one waits for, dead ones first."""
        return self._rows(
            "SELECT id, state FROM waits JOIN jobs ON jobs.seq = waits_for"
            " WHERE waits.seq = ? ORDER BY state = 'dead' DESC, waits_for", job["seq"])

    # The jobs that wait for a dead one, and those with all that wait for them in turn.
    # With EXISTS, or it would look at all dead ones where none is waited for.
    BEHIND_DEAD = ("SELECT waits.seq AS seq, front.id AS front FROM jobs AS front"
               " CROSS JOIN waits ON waits_for = front.seq WHERE front.state = 'dead'"
               " AND " + RARE + " AND EXISTS (SELECT 1 FROM waits)")

    BLOCKED = ("WITH RECURSIVE blocked (seq) AS (SELECT seq FROM (" + BEHIND_DEAD + ")"
               " UNION SELECT waits.seq FROM blocked"
               " JOIN waits ON waits_for = blocked.seq) ")

    def blocked_seqs(self):
        """Return the numbers of the jobs that wait, directly or not, for a dead one."""
        return {seq for seq, in self._rows(self.BLOCKED + "SELECT seq FROM blocked")}

    def first_blocked(self):
        """Return the first that waits for a dead job, that one, and how many wait."""
        row = self._row(
            "SELECT id, front FROM (" + self.BEHIND_DEAD + ") JOIN jobs USING (seq)"
            " WHERE state = 'pending' ORDER BY seq LIMIT 1")
        return row and dict(row, jobs=self._value(
            self.BLOCKED + "SELECT COUNT(*) FROM blocked JOIN jobs USING (seq)"
            " WHERE state = 'pending'"))

    def lock_holder(self, job):
        """Return the id of the job that has the lock of this one, or gets it next."""
        return self._value(
            "SELECT id FROM jobs WHERE lock = ? AND state = 'processing' AND " + RARE +
            " UNION ALL SELECT id FROM jobs WHERE lock = ? AND " + CLAIMABLE,
            job["lock"], job["lock"])

    def runs(self, job):
        """Return the runs of a job, the first one first, without their output."""
        return self._rows(
            "SELECT run, attempt, worker, pid, started_at, finished_at, exit_code,"
            " error, " + SECONDS + " AS seconds FROM runs WHERE seq = ? ORDER BY run",
            job["seq"])

    def output(self, job, run=None):
        """Return the kept output of a run, the latest one; None while it runs."""
        query = "SELECT output FROM runs WHERE seq = ? AND run = ?"
        return self._value(query, job["seq"], run or job["run"])

    def count_ahead(self, job):
        """Return how many jobs are claimed before this one."""
        return self._value(
            "SELECT COUNT(*) FROM jobs WHERE " + CLAIMABLE +
            " AND (priority > ? OR priority = ? AND seq < ?)",
            job["priority"], job["priority"], job["seq"])

    def common_errors(self, condition):
        """Return the errors of jobs, each with its count, the most common first."""
        sql = "SELECT error, COUNT(*) AS jobs FROM jobs WHERE " + condition.sql
        sql += " GROUP BY error ORDER BY jobs DESC"
        return self._rows(sql, **condition.values)

    def processing_runs(self):
        """Return what is running, with the worker that runs it and the lease."""
        rows = self._rows(
            "SELECT seq, run, id, attempts AS attempt, max_retries, worker, pid,"
            " started_at FROM jobs JOIN runs USING (seq, run)"
            " WHERE state = 'processing' AND " + RARE)
        return [dict(row, lease=self.lease_path(row)) for row in rows]

    def lease_path(self, job):
        """Return the path of the file of a job's latest run."""
        name = "%s-%d-%d" % (self.token, job["seq"], job["run"])
        return os.path.join(path_beside(self.path, ".runs"), name)

    def counts(self):
        """Return how many jobs there are in each state."""
        counts = dict(self._rows("SELECT state, jobs FROM counts"))
        return {state: counts[state] for state in STATES}

    def totals(self):
        """Return number and seconds of all runs there ever were, by outcome."""
        rows = self._rows("SELECT outcome, runs, seconds FROM totals")
        return {outcome: (runs, seconds) for outcome, runs, seconds in rows}

    def wait(self, ids=None, timeout=None, on_look=lambda counts: None, but=None):
        """Wait until jobs are completed or dead, or until what is left can't go on.

        Without IDS, all that are unfinished now, BUT for one. Return how many are in
        each state, and the ids that are left; None if it takes longer than TIMEOUT
        seconds. `on_look` is called each time with how many of all jobs are in each
        state. A job that has ended is not looked at again: it may be removed.
        """
        ended = dict.fromkeys((*STATES, "removed"), 0)
        # What `keep` removed was completed; of others nobody can tell any more.
        removed = "removed" if self.settings()["keep"] is None else "completed"
        if ids is None:
            ids = [id for id, in self._rows(
                "SELECT id FROM jobs WHERE state = 'pending' UNION ALL SELECT id"
                " FROM jobs WHERE " + RARE + " AND NOT " + in_states(FINISHED))
                if id != but]
        else:
            ids = [job["id"] for job in self._named(ids)]
        left = collections.deque(ids)

        def over():
            self.check_exists()
            counts, blocked = self.counts(), self.blocked_seqs()
            idle = self.is_paused() and counts["processing"] <= (but is not None)
            on_look(counts)
            for _ in range(len(left)):  # all must end, so one that may go on will do
                job = self._rows("SELECT seq, state FROM jobs WHERE id = ?", left[-1])
                state = job[0]["state"] if job else removed
                if state in (*FINISHED, "removed"):
                    ended[state] += 1
                    left.pop()
                elif idle or job[0]["seq"] in blocked:
                    left.rotate()
                else:
                    return False
            return True

        span = MAX_DURATION if timeout is None else timeout
        return dict(ended, left=[*left]) if wait_until(over, span, POLL_INTERVAL / 2) else None

    def oldest_claimable(self):
        """Return the job that could run and waits longest, and since when, or None.

        Of each priority the first hundred are looked at, not one: a retried job stands
        before others that wait longer.
        """
        first = "SELECT MAX(priority) FROM jobs WHERE " + CLAIMABLE
        return self._row(
            "WITH RECURSIVE level (priority) AS (" + first + " UNION ALL SELECT ("
            + first + " AND jobs.priority < level.priority)"
            " FROM level WHERE priority IS NOT NULL LIMIT 100)"
            " SELECT id, run_at FROM level CROSS JOIN jobs ON seq IN (SELECT seq"
            "  FROM jobs WHERE " + CLAIMABLE + " AND jobs.priority = level.priority"
            "  ORDER BY seq LIMIT 100) ORDER BY run_at, seq LIMIT 1")

    def next_due(self):
        """Return the job that waits for a time and is due next, and when, or None."""
        return self._row("SELECT id, run_at FROM jobs WHERE " + FOR_A_TIME +
                         " ORDER BY run_at, seq LIMIT 1")

    def has_claimable(self):
        """Tell whether there is a job to be claimed."""
        return bool(self._value("SELECT 1 FROM jobs WHERE " + CLAIMABLE + " LIMIT 1"))

    def is_drained(self):
        """Tell whether no job is due, running or waiting for a retry.

        In one statement: between two a job could go from waiting to running.
        """
        return not self._value(
            "SELECT EXISTS (SELECT 1 FROM counts WHERE jobs > 0 AND"
            "  (state = 'processing' OR state = 'failed' AND NOT " + PAUSED + "))"
            " OR NOT " + PAUSED + " AND ("
            "  EXISTS (SELECT 1 FROM jobs WHERE " + CLAIMABLE + ")"
            "  OR EXISTS (SELECT 1 FROM jobs WHERE " + FOR_A_TIME +
            "   AND run_at <= ?))", self.clock())

    def count_ended(self, moment, workers):
        """Return how many jobs that one of these workers ran have ended since then."""
        rows = self._rows(
            "SELECT worker, state FROM runs JOIN jobs USING (seq, run)"
            " WHERE finished_at >= ? AND " + in_states(FINISHED), moment)
        return collections.Counter(
            row["state"] for row in rows if row["worker"] in workers)

    def ids_starting_with(self, begun, states):
        """Return the newest ids that begin so, of jobs in one of these states."""
        query = "SELECT id FROM jobs WHERE substr(id, 1, length(?)) = ? AND "
        query += where(states).sql + " ORDER BY seq DESC LIMIT 300"
        return [id for id, in self._rows(query, begun, begun)]

    # -- statistics --------------------------------------------------------------------

    def stats(self, since):
        """Return the document of `stats` on the runs that finished since a time.

        Counts are of all of them; times, commands and errors of fifty thousand, those
        of the jobs that were enqueued last: a million would take seconds.
        """
        now = self.clock()
        period = max(now - since, 1.0)
        width = -(-period // BARS)  # whole seconds
        rows = self._rows(
            "SELECT MIN(CAST((finished_at - ?) / ? AS INTEGER), ?) AS bar,"
            " SUM(outcome = 'completed') AS completed,"
            " SUM(outcome = 'failed') AS failed,"
            " SUM(outcome = 'interrupted') AS interrupted,"
            " SUM(attempt > 1) AS retries, SUM(finished_at >= ?) AS latest"
            " FROM (SELECT *, " + OUTCOME + " AS outcome FROM runs"
            "  WHERE finished_at >= ?) GROUP BY bar",
            since, width, BARS - 1, now - 60, since)
        latest = sum(row["latest"] for row in rows)
        total = {key: sum(row[key] for row in rows)
                 for key in (*OUTCOMES, "retries")}
        judged = total["completed"] + total["failed"]
        runs = judged + total["interrupted"]
        bars = [{"completed": 0, "failed": 0} for _ in range(BARS)]
        for row in rows:
            bars[row["bar"]] = {key: row[key] for key in ("completed", "failed")}
        return {
            "since": iso(since), "seconds": now - since, "runs": runs, **total,
            "success_rate": total["completed"] / judged if judged else None,
            "per_second": runs / period, "per_second_now": latest / min(60, period),
            **self._sample(since), "bar_seconds": width, "throughput": bars,
        }

    def _sample(self, since):
        """Return what has to be sorted or grouped, from a part of the runs."""
        rows = self._rows(
            "SELECT command, runs.error, finished_at - started_at AS spent,"
            # `run_at` is a later time if the job was put back into the queue since.
            " CASE WHEN jobs.run = runs.run AND started_at >= run_at"
            "  THEN started_at - run_at END AS waited"
            " FROM runs JOIN jobs USING (seq) WHERE finished_at >= ?"
            " ORDER BY seq DESC LIMIT 50000", since)
        commands, bins = collections.defaultdict(list), [0] * (len(BINS) + 1)
        for row in rows:
            commands[row["command"]].append(row["spent"])
            bins[bisect.bisect(BINS, row["spent"])] += 1
        slowest = sorted(
            ({"command": command, "runs": len(times), "mean": sum(times) / len(times),
              "longest": max(times)} for command, times in commands.items()),
            key=lambda entry: -entry["mean"])
        errors = collections.Counter(
            row["error"] for row in rows if row["error"] not in (None, *INTERRUPTED))
        waited = [row["waited"] for row in rows if row["waited"] is not None]
        return {
            "run_time": percentiles(row["spent"] for row in rows),
            "waiting_time": percentiles(waited),
            "run_times": [{"below": top, "runs": count}
                          for top, count in zip([*BINS, None], bins)],
            "slowest_commands": slowest[:5],
            "common_errors": [{"error": error, "runs": count}
                              for error, count in errors.most_common(5)],
        }

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

    def set_paused(self, paused):
        """Let no job be claimed while PAUSED is the last word."""
        self.set("paused", True) if paused else self.unset("paused")
        wake_workers(self.path)

    def is_paused(self):
        return bool(self._value("SELECT " + PAUSED))


if not WINDOWS:
    os.register_at_fork(before=Database.before_fork)


# ======================================================================================
# Runs: one command; its lease, its output, its end
# ======================================================================================

LEASE_FD = 20  # of a lease in a command: scripts use the low numbers for themselves
READ_SIZE = 2**20  # bytes: more than a pipe can hold, so that one read empties it
DROPPED_NOTE = b"[queuectl: %d bytes of output dropped here]\n"
DROPPED_PATTERN = re.compile(re.escape(DROPPED_NOTE).replace(b"%d", rb"([1-9]\d{0,18})"))

if WINDOWS:
    KILL = signal.SIGTERM
    KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
    KERNEL.CreateJobObjectW.restype = wintypes.HANDLE
    KILL_ON_CLOSE, CREATE_SUSPENDED = 0x2000, 0x4

    def succeeded(value):
        """Return what a call of the system gave, or raise."""
        if not value:
            raise ctypes.WinError(ctypes.get_last_error())
        return value

    def set_limits(job, flags):
        # JOBOBJECT_EXTENDED_LIMIT_INFORMATION: two 64-bit times, then the flags.
        limits = (wintypes.DWORD * (36 if sys.maxsize > 2**32 else 28))()
        limits[4] = flags
        succeeded(KERNEL.SetInformationJobObject(job, 9, limits, ctypes.sizeof(limits)))
else:
    KILL = signal.SIGKILL
    ENVIRONMENT = dict(os.environb)  # of the pool; reading it for each run takes time
    # A command starts with all signals as they are by default: what its pool's shell
    # had ignored, and what Python does, passes through exec.
    ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def split_dropped(output):
    """Return how many bytes were dropped before an output, and the output."""
    note = DROPPED_PATTERN.match(output)
    return (int(note[1]), output[note.end() :]) if note else (0, output)


def tail(output, limit):
    """Return the last bytes of an output; what was dropped before them is said."""
    dropped, output = split_dropped(output)
    cut = max(0, len(output) - limit)
    note = DROPPED_NOTE % (dropped + cut) if dropped + cut else b""
    return note + output[cut:]


def read_output(path, limit):
    """Return the last bytes that a run has printed by now; none without its file.

    Its worker may be cutting it back. While it does, the file is longer than it ever is
    otherwise, and afterwards it begins with another note: then it is read again.
    """
    output = b""
    with contextlib.suppress(FileNotFoundError):
        for _ in range(10):
            with open(path, "rb", 0) as file:
                note = file.read(64)
                settled = os.fstat(file.fileno()).st_size <= max_file_size(limit)
                file.seek(0)
                output = file.read()
                file.seek(0)
                if settled and file.read(64).startswith(note):
                    break
            time.sleep(POLL_INTERVAL / 100)
    return tail(output, limit)


def max_file_size(limit):
    """Return how long the file of a run gets before it is cut back."""
    return 2 * limit + 2**16


class Lease:
    """The file of a run: held for as long as any process of it lives, and its output.

    The file ends with the last LIMIT bytes of the output at every moment, also if the
    worker is killed while it cuts it back; it begins with how many were dropped.
    """

    def __init__(self, path, limit):
        self.path, self.limit, self.size = path, limit, 0
        self.unwritten = b""  # what a full disk did not take
        self.fd = lock_file(path)

    def write(self, data):
        """Append output, and cut the file back when it has twice what is kept."""
        self.unwritten += data
        try:
            os.lseek(self.fd, self.size, os.SEEK_SET)
            written = os.write(self.fd, self.unwritten)
            self.unwritten, self.size = self.unwritten[written:], self.size + written
            if self.size > max_file_size(self.limit):
                self.compact()
        except OSError:
            # If more than is kept could not be written, the file is not needed.
            if len(self.unwritten) > self.limit:
                self.unwritten = self.output()
                self.empty()

    def compact(self):
        """Write the end of the file to its beginning, then drop all behind that.

        The two do not overlap: the end is there at every moment.
        """
        kept = self.output()
        os.lseek(self.fd, 0, os.SEEK_SET)
        if os.write(self.fd, kept) == len(kept):
            os.ftruncate(self.fd, len(kept))
            self.size, self.unwritten = len(kept), b""

    def output(self):
        """Return what is kept of the output."""
        if not self.size and not self.unwritten:
            return b""
        os.lseek(self.fd, 0, os.SEEK_SET)
        return tail(os.read(self.fd, self.size) + self.unwritten, self.limit)

    def empty(self):
        """Give its space back: on a full disk the database needs it for the result."""
        os.ftruncate(self.fd, 0)
        self.size = 0

    def discard(self):
        """Remove the file and let go of it, in that order.

        After a claim that was rolled back another worker takes a lease of this name.
        """
        with contextlib.suppress(OSError):
            os.remove(self.path)
        os.close(self.fd)
        if WINDOWS:  # where what is open can't be removed
            remove_leftover(self.path)


class Command:
    """The command of a run, from its start until nothing of it is left."""

    def __init__(self, run, lease, path):
        """Start it, its output going to a pipe; raise OSError if the system refuses."""
        self.lease, self.killed, self.job_object = lease, False, None
        # A job may name another queue, but not say that it is another run.
        env = {"QUEUECTL_DB": path, **json.loads(run["env"] or "{}")}
        env.update(QUEUECTL_JOB_ID=run["id"], QUEUECTL_ATTEMPT=str(run["attempt"]),
                   QUEUECTL_RUN=lease.path)  # by which its processes are known
        # The writing end stays open here while the command lives: with its end closed
        # as well, each run would wake its worker twice.
        if WINDOWS:
            handles = _winapi.CreatePipe(None, 2**16)
            self.reader, self.writer = (msvcrt.open_osfhandle(h, 0) for h in handles)
        else:
            self.reader, self.writer = os.pipe()
            os.set_blocking(self.reader, False)
        try:
            start = self.start_in_job if WINDOWS else self.spawn
            start(run["command"], run["launcher"], run["cwd"], env)
        except BaseException:
            self.close()
            raise

    def spawn(self, line, launcher, cwd, env):
        """Start it as the leader of a session; it inherits the lease.

        By posix_spawn: Popen takes 0.25 ms longer, and before Python 3.10 over a whole
        one, of the two that a run costs.
        """
        words = ["/bin/sh", "-c", "--", line]
        if launcher:  # which the shell splits; the line is its $0, and not split again
            words = ["/bin/sh", "-c", 'exec %s /bin/sh -c -- "$0"' % launcher, line]
        env = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
        # A lease that has this number already would be closed by the exec.
        place = LEASE_FD + (self.lease.fd == LEASE_FD)
        start = functools.partial(
            os.posix_spawn, words[0], words, {**ENVIRONMENT, **env},
            setsigdef=ALL_SIGNALS, setsigmask=(), file_actions=(
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, self.writer, 1),
                (os.POSIX_SPAWN_DUP2, self.writer, 2),
                (os.POSIX_SPAWN_DUP2, self.lease.fd, place)))
        os.chdir(cwd)
        try:
            self.pid = start(setsid=True)
        except NotImplementedError:  # FreeBSD
            self.pid = start(setpgroup=0)
        finally:
            os.chdir("/")  # an idle worker keeps no file system from being unmounted

    def start_in_job(self, line, launcher, cwd, env):
        """Start it in a job object, which ends with this worker.

        It is suspended until it is in there: its children might escape.
        """
        if launcher:
            import shlex

            prefix = subprocess.list2cmdline(shlex.split(launcher))
            line = '%s cmd /d /s /c "%s"' % (prefix, line)
        added = {name.upper(): value for name, value in env.items()}  # as os.environ's
        console = sys.stdin and sys.stdin.isatty()
        self.popen = subprocess.Popen(
            line, shell=not launcher, cwd=cwd, env={**os.environ, **added},
            stdin=None if console else subprocess.DEVNULL, stdout=self.writer,
            stderr=self.writer,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP | CREATE_SUSPENDED)
        self.pid, process = self.popen.pid, wintypes.HANDLE(int(self.popen._handle))
        try:
            handle = succeeded(KERNEL.CreateJobObjectW(None, None))
            self.job_object = wintypes.HANDLE(handle)
            set_limits(self.job_object, KILL_ON_CLOSE)
            succeeded(KERNEL.AssignProcessToJobObject(self.job_object, process))
        except OSError:
            self.popen.kill()
            raise
        ctypes.WinDLL("ntdll").NtResumeProcess(process)

    def poll(self):
        """Return its exit code once it has ended; minus the signal that ended it."""
        if WINDOWS:
            return self.popen.poll()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.pid = None  # from now on the number can be another's
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)

    def read(self):
        """Take over what it has printed by now: one read, or `yes` would never end."""
        with contextlib.suppress(BlockingIOError):
            size = READ_SIZE
            if WINDOWS:  # where reading waits
                handle = msvcrt.get_osfhandle(self.reader)
                size = min(_winapi.PeekNamedPipe(handle, 0)[0], READ_SIZE)
            data = size and os.read(self.reader, size)
            if data:
                self.lease.write(data)

    def wait(self, wake, timeout):
        """Wait for its end, its output, a signal or a time; take over its output."""
        if WINDOWS:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(max(0.0, min(timeout, POLL_INTERVAL / 20)))
        else:
            wake.wait(timeout, self.reader)
        self.read()

    def watch(self, wake, timeout, look):
        """Wait for its end; return its exit code, and its error or why it was ended.

        `look()`, called again and again, says why it has to end now, if it has. If a
        signal killed its leader, all of it ends: what is left would meet the next run.
        Raise Stuck if it can't be ended.
        """
        deadline = time.monotonic() + (timeout or MAX_DURATION)
        next_look, code, reason = time.monotonic() + POLL_INTERVAL, None, None
        while code is None and reason is None:
            self.wait(wake, min(deadline, next_look) - time.monotonic())
            code, now = self.poll(), time.monotonic()
            if code is None and now >= deadline:
                reason = "timeout %ss" % number_text(timeout)
            elif code is None and now >= next_look:
                next_look, reason = now + POLL_INTERVAL, look()
        if reason or code < 0:
            self.end(wake)
        if reason:
            code = self.poll()
        self.read()
        if code is None or code < 0:
            return None, reason or "signal %d" % -code
        return code, reason or ("exit %d" % code if code else None)

    def end(self, wake):
        """End it from outside, or what it left, with every process that belongs to it.

        Its leader, if it lives, is not reaped before: no other gets the number of its
        group then.
        """
        ending, left = Termination(), self.processes()
        while left:
            ending.step(left, self.signal)
            self.killed = ending.killed
            if ending.is_stuck():
                raise Unkillable(sorted(left))
            self.wait(wake, POLL_INTERVAL / 4)
            left = self.processes()

    def processes(self):
        """Return what lives of it."""
        if WINDOWS:
            accounts = (wintypes.DWORD * 12)()  # the eleventh: active processes
            KERNEL.QueryInformationJobObject(
                self.job_object, 1, accounts, ctypes.sizeof(accounts), None)
            return set(range(accounts[10]))
        return processes_of({self.lease.path: self.pid})[self.lease.path]

    def signal(self, pids, number):
        if WINDOWS:  # there is no other way
            KERNEL.TerminateJobObject(self.job_object, 1)
        else:
            signal_processes(pids, number)

    def close(self):
        """Let go of it; what it left running in the background is left running."""
        os.close(self.reader)
        os.close(self.writer)
        if WINDOWS and self.job_object:
            set_limits(self.job_object, 0)
            KERNEL.CloseHandle(self.job_object)


class Unkillable(Exception):
    """The processes of a run that live on after SIGKILL."""


class Termination:
    """How a run is ended: one SIGTERM to all of it, after a grace SIGKILL.

    For a timeout, `cancel`, `stop --now`, and for an orphan, it is the same. The run
    has ended when nothing is left of it, not when its leader has exited. What a trap
    starts to clean up gets no SIGTERM of its own.
    """

    def __init__(self):
        self.kill_at = time.monotonic() + TERM_GRACE
        self.term_sent = self.killed = False

    def step(self, pids, send):
        """Signal what is left of a run."""
        self.killed = time.monotonic() >= self.kill_at
        if self.killed:
            send(pids, KILL)
        elif not self.term_sent:
            send(pids, signal.SIGTERM)
            self.term_sent = True

    def is_stuck(self):
        """Tell whether what is left can't be ended: it is another user's, or hangs."""
        return time.monotonic() >= self.kill_at + KILL_GRACE


def signal_processes(pids, number):
    """Signal processes; at once those whose group's leader is among them.

    A shell that outlived its child for a moment would go on with its next command.
    """
    groups = set()
    for pid in sorted(pids):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(pid)
            if group not in pids or group == os.getpgrp():
                os.kill(pid, number)
            elif group not in groups:
                groups.add(group)
                os.killpg(group, number)


def processes_of(runs):
    """Return the living processes that belong to runs: {lease: {pid}}.

    RUNS is {lease: pid of its command if that is our child, else None}. To a run
    belongs who can write to its lease, or carries the path of that in QUEUECTL_RUN, or
    is in the process group of our child. The path is whole: another queue's process, or
    one of a copy of this queue, is a stranger. No recorded number is trusted. For a run
    of which nothing is left there is a second look: a process may be forked during one.
    """
    found = {lease: set() for lease in runs}
    if WINDOWS or not runs:  # there a job object ends what a killed worker left
        return found
    owner = {pid: lease for lease, pid in runs.items() if pid}
    for lease in runs:  # the second is of a file that was removed
        owner[lease] = owner[lease + " (deleted)"] = lease
    linux = os.path.exists("/proc/self/fd")
    # Of the run of a child of ours all is younger than we are: most others need no look.
    since = int(proc_stat("self")[19]) if linux and all(runs.values()) else 0
    own = os.getpid()  # holds the lease of its run; counted, there were no second look
    seen = set()
    for _ in range(2):
        for pid, trace in (
                scan_proc(since, seen) if linux else scan_with_tools(runs)):
            if trace in owner and pid != own:
                found[owner[trace]].add(pid)
        if all(found.values()):
            break
    return found


# A process that is gone meanwhile, or another user's. Any other error has to be one: it
# would be believed that nothing is left of a run.
GONE_OR_FOREIGN = FileNotFoundError, ProcessLookupError, PermissionError


def proc_stat(pid):
    """Return the fields that /proc tells of a process, from its state on."""
    with open_descriptor("/proc/%s/stat" % pid) as fd:
        return os.read(fd, 4096).rpartition(b")")[2].split()


def scan_proc(since, seen):
    """Yield pid and trace of each living process: group, files it can write, mark.

    Of those that started before SINCE, in ticks after the boot, there are none. Those
    that were looked at are added to SEEN and left out from then on: the system gives no
    number again so soon.
    """
    for pid in {*filter(str.isdigit, os.listdir("/proc"))} - seen:
        with contextlib.suppress(*GONE_OR_FOREIGN):
            state, group, threads, started = operator.itemgetter(0, 2, 17, 19)(
                proc_stat(pid))
            folder, ended = "/proc/%s/" % pid, state in b"ZX"
            if ended and threads == b"1" or int(started) < since:
                seen.add(pid)
                continue
            if ended:  # its main thread; another, which is listed last, lives on
                folder += "task/%s/" % os.listdir(folder + "task")[-1]
            yield int(pid), int(group)
            with open(folder + "environ", "rb", 0) as file:
                marked = (b"\0" + file.read()).split(b"\0QUEUECTL_RUN=")
            for mark in marked[1:]:
                yield int(pid), os.fsdecode(mark.partition(b"\0")[0])
            for fd in os.listdir(folder + "fd"):
                with contextlib.suppress(*GONE_OR_FOREIGN):
                    if os.lstat(folder + "fd/" + fd).st_mode & 0o200:
                        yield int(pid), os.readlink(folder + "fd/" + fd)
            seen.add(pid)


def scan_with_tools(leases):
    """Yield the same where there is no /proc: groups by `ps`, files by `lsof`."""
    import subprocess

    def lines_of(*words):
        with contextlib.suppress(OSError):
            told = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            return map(os.fsdecode, told.stdout.splitlines())
        return ()

    for line in lines_of("ps", "-A", "-o", "pid=", "-o", "pgid=", "-o", "stat="):
        pid, group, state = line.split()[:3]
        if state[0] not in "ZX":
            yield int(pid), int(group)
    pid = access = None
    for kind, *rest in lines_of("lsof", "-F", "pan", "--", *leases):
        value = "".join(rest)
        if kind == "p":
            pid = int(value)
        elif kind == "a":
            access = value
        elif kind == "n" and access in ("u", "w"):
            yield pid, value


# ======================================================================================
# Output: values to text
# ======================================================================================


def notice(message):
    with contextlib.suppress(OSError):  # nobody listens any more
        print("queuectl: %s" % message, file=sys.stderr, flush=True)


def duration_text(seconds):
    """Return a duration in one or two units: 0.2s, 12s, 3m 20s, 2h 5m, 4d 1h."""
    if seconds < 10:
        return "%.1fs" % max(0.0, seconds)
    rest, parts = int(seconds), []
    for unit in "dhms":
        count, rest = divmod(rest, UNITS[unit])
        if count or parts:
            parts.append("%d%s" % (count, unit))
    return " ".join(part for part in parts[:2] if part[0] != "0")


def fine(seconds):
    """Return a duration that may be short: 0ms, 43ms, 2.5s, 3m 20s."""
    return "%.0fms" % max(0, 1000 * seconds) if seconds < 0.9995 else duration_text(seconds)


def relative_time(moment, now):
    """Return a time as people say it: 2m 5s ago, in 4.0s."""
    return duration_text(now - moment) + " ago" if moment <= now else "in " + duration_text(moment - now)


def plural(count, noun):
    """Return a count with its noun: 1 job, 2 jobs."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return "%d %s" % (count, noun if count == 1 else plural)


def setting_text(name, value):
    if value is None:
        return "forever" if name == "keep" else "none"
    return printable(value) if isinstance(value, str) else number_text(value)


def run_table(runs, now):
    """Yield the lines of a table of a job's runs."""
    rows = []
    for run in runs:
        goes_on = run["finished_at"] is None
        rows.append([str(run["run"]), str(run["attempt"]), relative_time(run["started_at"], now),
                     fine(now - run["started_at"] if goes_on else run["seconds"]),
                     "running" if goes_on else printable(run["error"] or "exit 0")])
    return table(["RUN", "TRY", "STARTED", "TOOK", "RESULT"], rows)


def sparkline(values):
    """Return a bar for each value, all to the same scale; one character each."""
    steps, top = drawable(" ▁▂▃▄▅▆▇█", " .:-=+*#@"), max([*values, 1])
    return "".join(steps[-(-value * 8 // top)] for value in values)


def drawable(these, ascii):
    """Return characters for a picture that the standard output can show."""
    try:
        these.encode(sys.stdout.encoding or "ascii")
        return these
    except UnicodeEncodeError:
        return ascii


def stats_lines(stats, width):
    period = duration_text(stats["seconds"])
    yield "%s in %s: %d completed, %d failed (%s); %d interrupted" % (
        plural(stats["runs"], "run"), period, stats["completed"], stats["failed"],
        plural(stats["retries"], "retry"), stats["interrupted"])
    if stats["success_rate"] is None:
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
    yield "throughput  " + sparkline(sums)
    yield " " * 12 + (period + " ago").ljust(len(sums) - 3) + "now"
    yield ""
    yield from histogram(stats["run_times"], width)
    yield "Slowest commands:"
    for row in stats["slowest_commands"]:
        words = (fine(row["mean"]), plural(row["runs"], "run"), printable(row["command"]))
        yield truncate("%8s on average of %s of  %s" % words, width)
    if stats["common_errors"]:
        yield "Most common errors:"
    for row in stats["common_errors"]:
        yield truncate("%8d x %s" % (row["runs"], printable(row["error"])), width)


def histogram(bins, width):
    """Yield a line for each bin of run times, from the first to the last in use."""
    used = [at for at, bin in enumerate(bins) if bin["runs"]]
    most, bar = max(bin["runs"] for bin in bins), drawable("█", "#")
    for bin in bins[used[0] : used[-1] + 1]:
        below = "longer" if bin["below"] is None else "< %gs" % bin["below"]
        length = -(-bin["runs"] * max(1, width - 24) // most)
        yield "%-10s  %s %d" % (below, bar * length, bin["runs"])
    yield ""


DIED = "its worker died; a pool puts it back"
LOST = "its worker died, its processes go on; a pool ends them and puts it back"
RESUME = "paused; to go on: queuectl.py resume"
NO_POOL = "no pool is running; to start one: queuectl.py worker start"


def why_waiting(queue, job, pools):
    """Return in words why a job is not running; None if it runs or has finished."""
    no_pool = "" if pools else "; " + NO_POOL
    if job["state"] == "processing":
        busy = job["id"] in [worker["job"] for worker in pools]
        if busy or not queue.is_current(job):
            return None
        return (LOST if is_locked(queue.lease_path(job)) else DIED) + no_pool
    if job["state"] not in ("pending", "failed"):
        return None
    if job["waits"]:
        fronts = queue.dependencies(job)
        behind = fronts[0]["state"] != "dead" and job["seq"] in queue.blocked_seqs()
        return dependency_text(fronts) + ", behind a dead one" * behind
    if queue.is_paused():
        return "the queue is " + RESUME
    if not job["claimable"]:
        what = "try %d" % (job["attempts"] + 1) if job["attempts"] else "due"
        return "%s %s%s" % (what, relative_time(job["run_at"], queue.clock()), no_pool)
    if not pools:
        return NO_POOL
    first = queue.lock_holder(job) if job["lock"] else job["id"]
    if first != job["id"]:
        return "%s comes first, which has the lock %s, too" % tuple(
            map(printable, (first or "another", job["lock"])))
    ahead = queue.count_ahead(job)
    return plural(ahead, "job") + " before it" if ahead else "next in line"


def dependency_text(fronts):
    """Return in words for which jobs one waits."""
    first, more = fronts[0], plural(len(fronts) - 1, "more job")
    words = "waits for %s, which is %s" % (printable(first["id"]), first["state"])
    return words + (", and for " + more if len(fronts) > 1 else "")


def obstacles(queue):
    """Return in words what keeps jobs from going on until somebody does something."""
    blocked = queue.first_blocked()
    words = [blocked_text(blocked)] if blocked else []
    return words + ["the queue is " + RESUME] * queue.is_paused()


def blocked_text(blocked):
    id, front = printable(blocked["id"]), printable(blocked["front"])
    return "%s waits for %s, which is dead" % (id, front)


def progress_text(counts, done, spent):
    """Return a line on how far a queue is, with DONE jobs more in SPENT seconds."""
    running, waiting = counts["processing"], counts["pending"] + counts["failed"]
    line = "completed %d, dead %d, running %d, waiting %d" % (
        counts["completed"], counts["dead"], running, waiting)
    if done <= 0 or spent <= 0:
        return line
    left = duration_text((running + waiting) * spent / done)
    return line + ", %.1f/s, %s left" % (done / spent, left)


def display_width(text):
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(2 if east_asian_width(c) in "WF" else not combining(c) for c in text)


def truncate(text, width):
    """Return a text, or the beginning of one that takes more columns than WIDTH."""
    if width is None or display_width(text) <= width:
        return text
    text = text[: 3 * width]  # or a long one would be looked at all too often
    while display_width(text) >= width:
        text = text[:-1]
    return text + drawable("…", "~")


def table(titles, rows, width=None):
    """Yield the lines of a table, each cell cut to fit a terminal of this width.

    Widths come from the first page of rows, so that a million can be streamed.
    """
    rows = iter(rows)
    page = list(itertools.islice(rows, BATCH))
    rooms = [max(map(display_width, column)) for column in zip(titles, *page)]
    if width:  # one long id must not push all else off the screen
        rooms = [min(room, max(12, min(40, width // 3))) for room in rooms]
        rooms[-1] = max(8, width - sum(rooms[:-1]) - 2 * len(rooms[:-1]))
    for row in itertools.chain([titles], page, rows):
        cells = [truncate(cell, width and room) for cell, room in zip(row, rooms)]
        yield "  ".join(cell + " " * (room - display_width(cell))
                        for cell, room in zip(cells, rooms)).rstrip()


def job_table(jobs, now, changed, *fields):
    """Return the lines of a table of jobs that ends with these fields."""
    titles = ["ID", "STATE", "TRIES", changed, *map(str.upper, fields)]
    rows = (
        [printable(job["id"]), job["state"],
         "%d/%d" % (job["attempts"], max(1, job["max_retries"])),
         changed_text(job, now), *[printable(job[name]) for name in fields]]
        for job in jobs)
    return table(titles, rows, terminal_width(sys.stdout))


def changed_text(job, now):
    """Return when a job changed, or when one is due that waits for that."""
    if job["claimable"] == 0 and not job["waits"] and job["run_at"] > now:
        return "due " + relative_time(job["run_at"], now)
    return relative_time(job["updated_at"], now)


def terminal_width(stream):
    """Return how many columns a terminal has, None if the stream is not one."""
    try:  # one that nobody told its size says 0
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return None


COLOURS = {"processing": 36, "completed": 32, "failed": 33, "dead": 31}  # as ANSI has


def painter():
    """Return what gives a line the colour of its state: on a terminal that wants it."""
    if terminal_width(sys.stdout) is None or os.environ.get("NO_COLOR"):
        return str
    state = re.compile(r"\b(%s)(?=: [1-9]| +\d+/\d+  )|(?<=^state: {7})(%s)$" % (
        ("|".join(COLOURS),) * 2), re.I)
    heading = re.compile(r"[A-Z]+(  +[A-Z]+)+$")

    def painted(match):
        return "\x1b[%dm%s\x1b[0m" % (COLOURS[match.group().lower()], match.group())

    def paint(line):
        return "\x1b[2m%s\x1b[0m" % line if heading.match(line) else state.sub(
            painted, line, 1)

    return paint


class ProgressLine:
    """A line on a terminal that is drawn again and again; elsewhere nothing of it."""

    def __init__(self):
        self.began = time.monotonic()
        self.first = None  # the counts when it began: only what is done since is shown

    def progress(self, counts):
        width = terminal_width(sys.stderr)
        if width:
            self.first = self.first or counts
            done = {state: max(0, counts[state] - self.first[state])
                    for state in FINISHED}
            spent = time.monotonic() - self.began
            line = progress_text({**counts, **done}, sum(done.values()), spent)[: width - 1]
            print(end="\r\x1b[K" + line, file=sys.stderr, flush=True)

    def close(self):
        """Make room for the result."""
        if self.first is not None:
            print(end="\r\x1b[K", file=sys.stderr, flush=True)


def print_result(args, value, *lines):
    """Print the answer of a command: one JSON document, or else lines for people."""
    for line in [json.dumps(value)] if args.json else map(painter(), lines):
        print(line)


def print_jobs(args, jobs, lines_of, empty=None):
    """Print an array of jobs, or else lines made of them; a million cost no memory.

    Where there are none a terminal shows the words for that.
    """
    if not args.json:
        jobs = iter(jobs)
        first = list(itertools.islice(jobs, 1))
        if not first and empty and terminal_width(sys.stdout):
            return print(empty)
        lines = map(painter(), lines_of(itertools.chain(first, jobs)))
        return sys.stdout.writelines(line + "\n" for line in lines)
    print(end="[")
    jobs, comma = map(public_job, jobs), ""
    for page in iter(lambda: list(itertools.islice(jobs, BATCH)), []):
        print(end=comma + json.dumps(page)[1:-1])
        comma = ", "
    print("]")


# ======================================================================================
# Pool: a worker; the supervisor that starts it and puts back what is lost; the log
# ======================================================================================


def open_log(queue_path, who):
    """Return this process's logger: to the queue's log, or else to standard error."""
    import logging
    import logging.handlers

    path = path_beside(queue_path, ".log")

    def private(path, flags):
        return os.open(path, flags, 0o600)

    class Log(logging.handlers.WatchedFileHandler):
        """Go on in a new file when the supervisor has renamed a full one."""

        def _open(self):
            try:
                return open(path, "a", encoding="utf-8", errors="backslashreplace",
                            opener=private)
            except OSError:  # a full disk must not stop a pool
                return open(os.devnull, "a")

    logging.raiseExceptions = False
    # Python's logging HOWTO, "Optimization": what no line shows is not gathered.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    terminal = logging.StreamHandler()
    try:
        os.close(private(path, os.O_WRONLY | os.O_CREAT))
        handlers = [Log(path)]
        if sys.stderr.isatty():  # over the line of `Live`; of the pool what went wrong
            terminal.setFormatter(logging.Formatter("\r\x1b[K%(message)s"))
            terminal.setLevel("INFO" if who == "worker" else "WARNING")
            handlers.append(terminal)
    except OSError as error:
        handlers = [terminal]
        notice("cannot write the log, logging here instead: %s" % error)
    layout = "%%(asctime)s %%(levelname)s %s[%d] %%(message)s" % (who, os.getpid())
    logging.Formatter.converter = time.gmtime  # as JSON has it
    logging.basicConfig(handlers=handlers, level=logging.INFO, format=layout,
                        datefmt="%Y-%m-%dT%H:%M:%SZ", force=True)
    return logging.getLogger()


def run_label(run):
    """Return job and attempt of a run, for the log."""
    return "%s %d/%d" % (printable(run["id"]), run["attempt"], max(1, run["max_retries"]))


# A stopped service signals all its processes at once, and a shell exits with 128 more.
STOP_ERRORS = ["signal %d" % number for number in (*STOP_SIGNALS, KILL)]
STOP_ERRORS += ["exit %d" % (128 + number) for number in (*STOP_SIGNALS, KILL)]
NO_PROCESS = errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE  # for a process


class Worker:
    """One process of a pool; it runs one job at a time."""

    def __init__(self, path, pool, drain):
        self.path, self.pool, self.drain = path, pool, drain
        self.log = open_log(path, "worker")
        self.queue = self.lease = self.trouble = None
        self.stopped = self.refused = False
        self.wake = Wake()
        catch_signals(self.stop)

    def stop(self, number, frame):
        # Ctrl-C and a hangup reach the whole group: the supervisor counts them, and
        # asks through its file. SIGTERM makes this worker leave after its job.
        if number == signal.SIGTERM:
            self.stopped = True

    def work(self):
        """Run jobs until asked to stop."""
        self.queue = self.with_retries(
            lambda: Queue(self.path, "NORMAL", IDLE_INTERVAL, new=False))
        with self.queue:
            done = None
            while True:
                run = self.with_retries(self.record_and_claim, done)
                done = run and self.execute(run)
                if run is None:
                    if self.should_leave():
                        break
                    if self.drain and self.with_retries(self.queue.is_drained):
                        request_stop(self.path, self.pool, "over")
                    self.wake.wait(self.with_retries(self.pause))

    def with_retries(self, action, *args):
        """Try until it works: a full disk or a lock costs time, never a result."""
        while True:
            try:
                result = action(*args)
                if self.trouble:
                    self.log.info("going on")
                self.trouble = None
                return result
            except (sqlite3.Error, OSError) as error:
                hopeless = isinstance(error, sqlite3.IntegrityError) or self.gone()
                # A result in hand is dropped only for `stop --now`.
                idle = not self.lease or requested_stop(self.path, self.pool) == "now"
                if hopeless or (self.trouble and self.should_leave() and idle):
                    raise QueueError("leaving while there is still: %s" % error)
                if str(error) != self.trouble:
                    self.log.error("%s; waiting until it is over", error)
                self.trouble = str(error)
            self.wake.wait(IDLE_INTERVAL)

    def gone(self):
        return self.queue and not is_same_file(self.path, self.queue.file)

    def pool_stops(self):
        return supervisor_is_gone(self.pool) or requested_stop(self.path, self.pool)

    def should_leave(self):
        return self.stopped or self.pool_stops() or self.gone()

    def pause(self):
        """Return for how long no job is due."""
        if self.queue.is_paused():
            return IDLE_INTERVAL
        due = self.queue.next_due()  # first: what gets due meanwhile is claimable then
        if self.queue.has_claimable():
            return 0
        return min(due["run_at"] - self.queue.clock(), IDLE_INTERVAL) if due else IDLE_INTERVAL

    def record_and_claim(self, done):
        """Record the end of one run and claim the next, in one transaction.

        Killed before its commit, the run whose end is in hand is found without a worker
        and repeated; so is one that was claimed and not yet started. The lease of the
        first is let go of only after the commit: a supervisor would put the job back
        that is just being recorded.
        """
        finished, self.lease = self.lease, None
        leaving = self.should_leave()  # not within: others would wait for that, too
        try:
            with self.queue.transaction():
                state = self.record(*done) if done else None
                run = None if leaving else self.queue.claim(
                    os.getpid(), self.take_lease)
        except BaseException:
            if self.lease:
                self.lease.discard()
            self.lease = finished
            if finished:
                # The disk may be full of it, and the output is in the result. Killed
                # now, the run that is repeated has lost that output, and no more.
                finished.empty()
            raise
        if done:
            finished.discard()
            self.report(state, *done)
        return run

    def take_lease(self, run):
        self.lease = Lease(run["lease"], run["output_limit"])

    def record(self, run, result):
        if result["error"] in ("stop --now", "stopped", "refused"):
            return self.queue.release(run, result)
        if result["error"] is None:
            return self.queue.complete(run, result)
        return self.queue.fail(run, result)

    def report(self, state, run, result):
        """Write a line to the log; a result that came too late is said and dropped."""
        if result["error"] == "refused":  # which was said once
            return
        words = state or "no longer ours, result dropped"
        if result["error"]:
            words += " (%s)" % result["error"]
        spent = result["finished_at"] - run["started_at"]
        self.log.info("%s %s in %.3f s", run_label(run), words, spent)
        if state == "dead":
            wake([self.pool])  # which starts `on_dead`

    def execute(self, run):
        """Run a claimed job; return it with its result."""
        began, finished_at = time.monotonic(), run["started_at"]
        try:
            command = Command(run, self.lease, self.path)
        except (OSError, ValueError) as refusal:
            code, error = None, "cannot start: %s" % refusal
            if getattr(refusal, "errno", None) in NO_PROCESS:
                if not self.refused:
                    self.log.error("%s; waiting for room for a process", error)
                error, self.refused = "refused", True
                self.wake.wait(IDLE_INTERVAL)
        else:
            self.refused = False
            run.update(pid=command.pid, started_at=self.queue.clock())
            try:
                code, error = command.watch(self.wake, run["timeout"], self.look(run))
                finished_at = run["started_at"] + time.monotonic() - began
                if error in STOP_ERRORS and wait_until(self.pool_stops, BLAME_DELAY):
                    error = "stopped"
                    command.end(self.wake)  # of a shell that told of a signal
            except Unkillable as stuck:
                # This worker leaves, so that a supervisor finds a run without a worker
                # as soon as they are gone.
                words = "%s can't be ended: processes %s are left alone"
                raise QueueError(words % (run_label(run), stuck)) from None
            finally:
                command.close()
            if command.killed and run["launcher"]:
                words = "%s: the launcher was killed; what it started may live on"
                self.log.warning(words, run_label(run))
        return run, dict(exit_code=code, error=error, output=self.lease.output(),
                         finished_at=finished_at)

    def look(self, run):
        """Return a function that tells why a run has to end now, None if it has not."""
        noted = False

        def look():
            nonlocal noted
            with contextlib.suppress(sqlite3.Error):
                if not noted:
                    self.queue.record_pid(run)
                    self.log.info("%s runs, pid %d", run_label(run), run["pid"])
                    noted = True
            if requested_stop(self.path, self.pool) == "now":
                return "stop --now"
            with contextlib.suppress(sqlite3.Error):
                return "cancelled" if self.queue.cancel_requested(run) else None

        return look


def worker_main(path, pool, drain, pool_fd):
    """Be a worker, in a process of its own."""
    if not WINDOWS:
        os.close(pool_fd)  # or the pool would seem to live as long as we do
    worker, own = Worker(path, pool, drain), worker_file(path, pool, os.getpid())
    try:
        fd = worker.with_retries(lock_file, own)
        try:
            worker.work()
        finally:
            drop_lock_file(path, fd, own)
            if supervisor_is_gone(pool):  # nobody else does it, if we are the last
                its = pool_file(path, pool)
                wait_until(lambda: remove_stale_pool_files(path) or not os.path.exists(its),
                           POLL_INTERVAL)  # on Windows while somebody looks at it, too
    except (QueueError, OSError) as error:
        worker.log.error("%s", error)
        sys.exit(EXIT_TROUBLE)
    except Exception:
        worker.log.exception("this worker failed")
        sys.exit(1)


def drop_lock_file(path, fd, own):
    """Let go of a process's file and remove it; the last one removes the folder."""
    folder = path_beside(path, ".runs")
    os.close(fd)

    def left():
        remove_leftover(own)
        with contextlib.suppress(OSError):  # not empty, others use it
            os.rmdir(folder)
        with contextlib.suppress(*NO_DIRECTORY):
            if {*os.listdir(folder)} <= {os.path.basename(own)}:
                return False
        return not os.path.exists(own)

    wait_until(left, POLL_INTERVAL)  # on Windows nothing goes while somebody looks at it


class Supervisor:
    """A pool: starts workers, replaces those that die, puts back what nobody runs.

    It has no database, lease or other's file open while it forks: a lock would go with
    the fork, and SQLite must not cross one. (Another program that is started, like
    `on_dead`, closes all that.)
    """

    def __init__(self, path, count, drain=False, on_look=None):
        self.path, self.count, self.drain = os.path.realpath(path), count, drain
        self.on_look = on_look  # is called with the queue, twice a second
        self.pid = os.getpid()
        self.workers = []  # processes
        self.pids = set()  # of all workers there ever were
        self.died = {}  # pid of a worker: when it was found dead
        self.endings = {}  # lease: how the end of an orphan is going on
        self.hooks = {}  # an `on_dead` that runs: the job that died
        self.next_start = self.next_look = 0.0
        self.recovery_done = True  # what dead workers ran
        self.unreadable = False  # the queue, when it was looked at last
        self.next_page = 1  # of the jobs that `keep` may remove
        self.signals, self.signalled = 0, -MAX_DURATION  # how many, and when the last
        self.hook_error = None  # why `on_dead` could not be started
        self.failed = drain  # until `finish` has seen that no job ended dead
        self.result = "the queue could not be read at the end"
        self.stop_reason = None  # why it can't go on

    def run(self, started):
        """Run the pool until it is asked to stop or drained; return the exit code.

        `started()` is called when it can be found and asked.
        """
        self.wake = Wake()
        catch_signals(self.count_signal)
        inherit_nothing()
        with Queue(self.path) as queue:
            self.file, self.began = queue.file, queue.clock()
            if queue.is_paused():
                notice("the queue is " + RESUME)
        for path in (path_beside(self.path, ".runs"), path_beside(self.path, ".log")):
            if owner_hint(path):
                raise QueueError(printable(path) + owner_hint(path))
        own = pool_file(self.path, self.pid)
        self.fd = lock_file(own)
        try:
            os.write(self.fd, b" " * 15 + b"\n")  # room, on a full disk, too
            self.log = open_log(self.path, "pool")
            self.log.info("pool of %d started", self.count)
            started()
            self.loop()
            # A drain has to say how it ended, also while another program has the lock.
            wait_until(lambda: self.with_queue(self.finish) or self.stop_reason,
                       LOCK_TIMEOUT if self.drain else 0, POLL_INTERVAL)
            self.log.info("pool stopped")
        finally:
            request_stop(self.path, self.pid, "stop")  # whatever happened: no worker goes on
            # At its end Python gives up its handlers: a late signal would be exit -15.
            catch_signals(signal.SIG_IGN)
            drop_lock_file(self.path, self.fd, own)
        return 1 if self.failed or self.stop_reason else 0

    def count_signal(self, number, frame):
        """Count it, unless it is the same one: timeout(1) signals us and our group."""
        now = time.monotonic()
        if now - self.signalled > POLL_INTERVAL:
            self.signals, self.signalled = self.signals + 1, now

    def loop(self):
        while True:
            if self.signals:  # the first asks to stop, a second to stop now
                self.ask("stop" if self.signals == 1 else "now")
            self.reap()
            if self.over():
                return
            missing = self.start_missing()
            if time.monotonic() >= self.next_look:
                self.with_queue(self.maintain)
                looked = time.monotonic()
                pause = 0.5 if self.on_look else RECOVERY_INTERVAL
                if not self.recovery_done or not all(
                        ending.is_stuck() for ending in self.endings.values()):
                    pause = POLL_INTERVAL
                self.next_look = looked + pause
            due = min(self.next_look, self.next_start) if missing else self.next_look
            if self.wake.wait(due - time.monotonic()):  # by who wants it to look
                self.next_look = min(self.next_look, looked + POLL_INTERVAL)

    def over(self):
        """Tell whether the pool may leave: what a dead worker ran was looked after.

        Of a queue that was removed nobody can tell any more. What can't be ended is for
        the next pool; so is a queue that can't be read, if this one shall stop now.
        """
        if not self.stop_reason and not os.path.exists(pool_file(self.path, self.pid)):
            self.give_up("its file %s was removed" % pool_file(self.path, self.pid))
        request = requested_stop(self.path, self.pid)
        if not request or self.workers:
            return False
        if not is_same_file(self.path, self.file):
            return True
        if not self.recovery_done:
            return request == "now" and self.unreadable
        return all(ending.is_stuck() for ending in self.endings.values())

    def give_up(self, why):
        self.stop_reason = why
        self.log.info("this pool stops: %s", why)
        notice("this pool stops: " + why)

    def ask(self, word):
        request = requested_stop(self.path, self.pid)
        if not request or (word == "now" and request != "now"):
            self.log.info("asked to stop" + " now" * (word == "now"))
            request_stop(self.path, self.pid, word)
            if word == "stop" and sys.stderr.isatty():
                running = self.with_queue(lambda queue: [
                    run for run in queue.processing_runs() if run["worker"] in self.pids])
                if running:
                    notice("finishing %s; Ctrl-C again ends them now"
                        % plural(len(running), "running job"))

    def reap(self):
        for worker in [one for one in self.workers if one.exitcode is not None]:
            self.workers.remove(worker)
            if worker.exitcode:
                words = "worker %d died: exit code %d"
                self.log.error(words, worker.pid, worker.exitcode)
                self.recovery_done, self.next_look = False, 0.0
                if worker.exitcode != EXIT_TROUBLE:
                    self.died[worker.pid] = time.monotonic()
                self.next_start = time.monotonic() + RESTART_INTERVAL

    def start_missing(self):
        """Start the workers that are missing; return whether some still are.

        Where they keep dying, not too often.
        """
        import multiprocessing

        context = multiprocessing.get_context("spawn" if WINDOWS else "fork")
        while len(self.workers) < self.count and not requested_stop(self.path, self.pid):
            if time.monotonic() < self.next_start:
                return True
            worker = context.Process(
                target=worker_main, args=(self.path, self.pid, self.drain, self.fd))
            try:
                worker.start()
            except OSError as error:  # too many processes or files
                self.log.error("a worker cannot start: %s", error)
                self.next_start = time.monotonic() + RESTART_INTERVAL
                return True
            self.workers.append(worker)
            self.pids.add(worker.pid)
            self.died.pop(worker.pid, None)
        return False

    def with_queue(self, action):
        """Do something with the database; with trouble there, the next look will."""
        try:
            if is_same_file(self.path, self.file):
                with Queue(self.path, "NORMAL", IDLE_INTERVAL, new=False) as queue:
                    self.unreadable = False
                    return action(queue)
            if not self.stop_reason:
                self.give_up("%s was removed" % printable(self.path))
                self.ask("stop")
        except (sqlite3.Error, OSError, QueueError) as error:
            self.recovery_done, self.unreadable = False, True
            self.log.error("%s", error)

    def maintain(self, queue):
        self.recover_lost(queue)
        self.remove_stale_files(queue)
        self.announce_deaths(queue)
        queue.promote_after_clock_step()
        if queue.settings()["keep"] is not None:
            self.prune(queue, queue.settings()["keep"])
        if self.on_look:
            self.on_look(queue)

    def prune(self, queue, keep):
        """Remove old jobs, a page of all jobs a look, and more while there are some."""
        total, count, until = 0, 1, time.monotonic() + POLL_INTERVAL
        while count and time.monotonic() < until:
            count, self.next_page = queue.prune(keep, self.next_page)
            total += count
        if total:
            self.log.info("keep: removed %s", plural(total, "job"))

    def recover_lost(self, queue):
        """Put jobs in PROCESSING back that nobody runs, once nothing of a run lives.

        A claim holds its lease before it is committed, and its worker a file before it
        claims. So what is listed first and is not held afterwards was let go of: its
        worker died, or recorded the end meanwhile and the job is no longer listed. What
        lives of the run of a dead worker is ended first. The lease is looked at again
        within the transaction that puts the job back: nothing holds it then, and who
        could have forked is gone.
        """
        runs = queue.processing_runs()
        own = {self.pid, *(worker.pid for worker in self.workers)}
        living = own.union(*living_pools(self.path).values())
        lost = {}
        for run in runs:
            attended = run["worker"] in living and is_locked(run["lease"])
            if not attended and queue.is_current(run):
                lost[run["lease"]] = run
        found = processes_of(dict.fromkeys(lost))
        self.recovery_done = True
        for lease, run in lost.items():
            if run["worker"] in found[lease]:
                continue  # it is there; somebody removed its file, or the lease
            found[lease] -= own  # a run may have started this very pool
            died = self.died.get(run["worker"], -MAX_DURATION)
            if run["worker"] in own or time.monotonic() < died + BLAME_DELAY:
                # It has not been reaped yet; or is this pool going to be killed, too?
                self.recovery_done = False
                continue
            # It may have ended since it was listed; then its background children go on.
            if found[lease] and queue.is_current(run):
                self.end_orphan(run, found[lease])
            elif not found[lease]:
                self.release(queue, run)
        self.endings = {lease: ending for lease, ending in self.endings.items()
                        if lease in lost}
        workers = {run["worker"] for run in lost.values()}
        self.died = {pid: at for pid, at in self.died.items() if pid in workers}

    def end_orphan(self, run, pids):
        """Signal what a dead worker left running, as its worker would have done."""
        ending = self.endings.get(run["lease"])
        if not ending:
            ending = self.endings[run["lease"]] = Termination()
            self.log.warning("%s worker died, ending %s", run_label(run), sorted(pids))
        killed = ending.killed
        ending.step(pids, signal_processes)
        if ending.killed and not killed:
            words = "%s did not end and is killed: %s"
            self.log.warning(words, run_label(run), sorted(pids))

    def release(self, queue, run):
        output = read_output(run["lease"], queue.settings()["output_limit"])
        result = dict(exit_code=None, error="worker died", output=output,
                      finished_at=queue.clock())
        with queue.transaction():
            state = None if is_locked(run["lease"]) else queue.release(
                run, result, blamed=run["worker"] in self.died)
        if state:
            self.log.warning("%s worker died, %s", run_label(run), state)
            remove_leftover(run["lease"])
            wake_workers(self.path)

    def announce_deaths(self, queue):
        """Start `on_dead` for the jobs that ended dead; return how many of them run.

        Nobody waits for it, it outlives the pool, what it prints is dropped. That it
        failed is logged. A few run at a time, or one that hangs would be started for
        each of a thousand jobs.
        """
        def start(job):
            import subprocess
            import tempfile

            if not line:
                return
            with tempfile.TemporaryFile() as text:
                text.write(json.dumps(public_job(job)).encode() + b"\n")
                text.seek(0)
                self.hooks[subprocess.Popen(
                    line, shell=True, cwd=os.path.dirname(queue.path), stdin=text,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True)] = printable(job["id"])

        for hook in [hook for hook in self.hooks if hook.poll() is not None]:
            id = self.hooks.pop(hook)
            if hook.returncode:
                self.log.error("on_dead for %s: exit %d", id, hook.returncode)
        line = queue.settings()["on_dead"]
        try:
            while len(self.hooks) < MAX_HOOKS and queue.announce(start):
                self.hook_error = None
        except OSError as error:  # the next look tries again
            if self.hook_error != str(error):
                self.log.error("on_dead cannot start: %s", error)
            self.hook_error = str(error)
        return len(self.hooks)

    def remove_stale_files(self, queue):
        """Remove the files that nobody holds any more; rename a full log."""
        folder = path_beside(self.path, ".runs")
        with queue.transaction():  # no run is claimed and lost meanwhile
            leases = {run["lease"] for run in queue.processing_runs()}
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(folder):
                    path = os.path.join(folder, name)
                    if path not in leases:
                        remove_leftover(path)
        remove_stale_pool_files(self.path)
        log = path_beside(self.path, ".log")
        with contextlib.suppress(OSError):  # Windows refuses it while others write
            if os.path.getsize(log) > LOG_LIMIT:
                os.replace(log, log + ".1")

    def finish(self, queue):
        """Tell what became of a drained pool's jobs, and why it left some; clear up."""
        self.result = "pool %d stopped" % self.pid
        if self.drain:
            ended, why = queue.count_ended(self.began, self.pids), obstacles(queue)
            if requested_stop(self.path, self.pid) != "over" and not queue.is_drained():
                why.append("the pool was stopped before")
            self.failed = bool(ended["dead"] or why)
            counts, due = queue.counts(), queue.next_due()
            if due:  # which is left, too, but is no failure
                why.append("the next is due " + relative_time(due["run_at"], queue.clock()))
            self.result = "%d completed, %d dead" % (ended["completed"], ended["dead"])
            if why:
                left = plural(counts["pending"] + counts["failed"], "job")
                self.result += "; %s left: %s" % (left, "; ".join(why))
        self.remove_stale_files(queue)
        wait_until(lambda: not self.announce_deaths(queue), TERM_GRACE)
        return True


# ======================================================================================
# Commands: one function each; its name, meaning, example and arguments above it
# ======================================================================================

COMMANDS = {}  # name: (function, what it does, example, its arguments)


def command(name, meaning, example, *arguments):
    """Make a function the command of that name."""
    def register(function):
        COMMANDS[name] = function, meaning, example, arguments
        return function

    return register


def arg(usage, meaning=None, convert=None, **options):
    """Return what argparse wants to know of an argument like `--limit N`, or a flag."""
    *names, last = usage.split()
    if not last[0].isupper():
        return [*names, last], dict(options, help=meaning, action="store_true")
    return names, dict(options, help=meaning, metavar=last, type=convert)


def state_name(text):
    if text.lower() not in STATES:
        raise unknown_word("state " + printable(text), text, STATES)
    return text.lower()


def some_text(text):
    if not text or not is_storable(text):  # an unset variable's would be in each job
        raise QueueError("--match: a text in UTF-8 that is not empty", 2)
    return text


def count_of(name, low, high=MAX_INTEGER):
    return lambda text: checked(name, whole_number(low, high), as_number(text))


def span_of(name, low):
    return lambda text: checked(name, duration_from(low), text)


def variable(text):
    name, sign, value = text.partition("=")
    if not sign:
        raise QueueError("--env: %s is not NAME=VALUE" % json.dumps(text), 2)
    return name, value


def as_number(text):
    """Return the number that a word of the command line is, or else the word."""
    for convert in (int, float) if "_" not in text else ():
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


REPEATED = ("env", "after")  # options that can be given again


def field_option(name):
    """Return the option of `enqueue` for a field of a job."""
    _, _, usage, meaning = FIELDS[name]
    if name in REPEATED:
        return arg(usage, meaning, variable if name == "env" else None, action="append")
    return arg(usage, meaning, as_number if usage.endswith(" N") else None)


IDS = arg("ids ID", "ids of jobs", nargs="*")
ID = arg("id ID", "id of a job, or its beginning, of four characters or more")
KEY = arg("key KEY", "name of a setting", setting_name)
STATE = arg("--state STATE", "one of %s; can be given again" % ", ".join(STATES),
            state_name, action="append", default=[])
MATCH = arg("--match TEXT", "those with this text in id or command", some_text)
DRY_RUN = arg("--dry-run", "only list what it would take")


@command(
    "enqueue", "add jobs: a command behind --, or JSON",
    "enqueue --id job1 --timeout 10m -- echo Hello",
    arg("jobs JSON", "an object, an array, or - for an array or JSON Lines on standard"
        " input: all or none", nargs="*"),
    arg("--file F", "read the jobs from this file"),
    arg("--unique", "leave an unfinished job of this id alone; start a finished one"
        " again"),
    arg("--lines", "each line of the file, or of standard input, is a command"),
    arg("--quiet", "print no ids"),
    *map(field_option, FIELDS))
def cmd_enqueue(args, queue):
    options, unique, count = enqueue_options(args), [], 0
    if options.keys() & {"delay", "run_at"}:  # the one excludes the other of a job
        options = {"delay": None, "run_at": None, **options}
    defaults = queue.defaults(args.cwd)  # we may be in a folder that is gone

    def made(given):
        nonlocal count
        count += 1
        if args.id and count > 1:
            raise QueueError("--id: one id can't serve several jobs", 2)
        if options and type(given) is dict:  # an option wins over the job's own field
            given = {**given, **options}
        job = checked_job(given, defaults)
        if args.unique:
            unique.append(job)
        return job

    with contextlib.ExitStack() as files:
        if args.file or args.jobs == ["-"]:
            lines = files.enter_context(spool(args.file))
            jobs = read_lines(lines, made, args.lines)
        else:
            jobs = read_arguments(args.jobs or ["{}"], made)
        first, last = queue.enqueue(jobs, args.unique)
    left = {job["id"]: job["command"] for job in unique if job["left"]}
    jobs = queue.jobs(first=first, last=last, brief=not args.json)
    if args.unique:
        jobs = map(queue.job, dict.fromkeys(job["id"] for job in unique))

    def line(job):
        if job["id"] not in left:
            return "enqueued " + printable(job["id"])
        other = ", unchanged" if job["command"] != left[job["id"]] else ""
        return "%s is there already, %s%s" % (printable(job["id"]), job["state"], other)

    if not args.quiet:
        print_jobs(args, jobs, lambda jobs: map(line, jobs), "no jobs were given")


def enqueue_options(args):
    if args.lines and not args.file:
        args.jobs = args.jobs or ["-"]
    sources = ["".join(args.jobs), args.file, args.command, args.words]
    if sum(map(bool, sources)) != 1:
        words = "enqueue: %s (see: queuectl.py enqueue --help)"
        several = "give jobs, a command behind --, or --file"
        raise QueueError(words % (several if any(sources) else "no job"), 2)
    if args.jobs and args.jobs != ["-"] and args.jobs[0].lstrip()[:1] not in ("{", "["):
        words = printable(args.jobs[0]), printable(" ".join(args.jobs))
        raise QueueError(NOT_JSON % words, 2)
    return given_fields(args)


def given_fields(args):
    """Return the job fields that options and a command line give."""
    given = dict(vars(args), env=dict(args.env) if args.env else None)
    given.setdefault("id")  # which `edit` can't change
    given["after"] = "none" if args.after == ["none"] else args.after
    if args.words:
        given["command"] = shell_line(args.words)
    return {name: given[name] for name in FIELDS if given[name] is not None}


def read_arguments(texts, made):
    """Yield the jobs that are made of JSON texts, each an object or an array."""
    for text in texts:
        given = parse_json(text)
        yield from map(made, given if isinstance(given, list) else [given])


def read_lines(lines, made, plain=False):
    """Yield the jobs of an array or of JSON Lines; a refusal names the line.

    PLAIN lines are commands.
    """
    count = 0
    try:
        for page in iter(lambda: list(itertools.islice(lines, BATCH)), []):
            found = [] if plain else parsed_at_once(page)
            for index, line in enumerate(page):
                count += 1
                if found:
                    yield made(found[index])
                elif line.isspace():
                    continue
                elif plain:
                    command = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
                    yield made({"command": command})
                elif line.lstrip()[:1] == b"[":
                    rest = b"".join(page[index:]) + lines.read()
                    return (yield from map(made, parse_json(rest)))
                else:
                    yield made(parse_json(line))
    except QueueError as error:
        raise QueueError("line %d: %s" % (count, error), error.code) from None


def parsed_at_once(lines):
    """Return the objects that lines are, or none if one of them is anything else.

    That takes a third of the time of one by one. No line can guess the number between
    them, so that each is where a line ends.
    """
    mark = int.from_bytes(os.urandom(7), "big")
    try:
        found = parse_json(b"[" + (b",%d," % mark).join(lines) + b"]")
    except QueueError:
        return []
    objects, marks = found[::2], found[1::2]
    sound = marks == [mark] * (len(lines) - 1) and set(map(type, objects)) == {dict}
    return objects if sound else []


@contextlib.contextmanager
def spool(path):
    """Open a file of jobs, or standard input, read to its end.

    Otherwise a slow producer at the other end of a pipe would keep the database locked.
    """
    import shutil
    import tempfile

    with tempfile.SpooledTemporaryFile(2**24) as spool:
        stdin = contextlib.nullcontext(sys.stdin.buffer)
        with open(path, "rb") if path else stdin as source:
            shutil.copyfileobj(source, spool)
        spool.seek(0)
        if spool.read(3) != b"\xef\xbb\xbf":  # which editors on Windows put before UTF-8
            spool.seek(0)
        yield spool


@command("list", "list jobs, oldest first", "list --state pending --limit 20",
         STATE, MATCH,
         arg("--limit N", "at most so many; 0 for all", count_of("--limit", 0),
             default=0),
         arg("--newest", "newest first"))
def cmd_list(args, queue):
    chosen = where(args.state or STATES, args.match)
    list_jobs(args, queue, queue.jobs(chosen, args.limit, args.newest))
    left = queue.count(chosen) - args.limit if args.limit and not args.json else 0
    if left > 0:
        notice(plural(left, "more job") + "; --limit 0 lists all")


def list_jobs(args, queue, jobs):
    print_jobs(args, jobs, lambda jobs: job_table(
        jobs, queue.clock(), "CHANGED", "command"), "no jobs")


@command("show", "show a job and its runs", "show job1", ID)
def cmd_show(args, queue):
    job, now = find_job(queue, args.id), queue.clock()
    fields, runs = public_job(job), queue.runs(job)
    for name in TIMES:
        if job[name] is not None:
            fields[name] += ", " + relative_time(job[name], now)
    fields["env"] = " ".join("%s=%s" % pair for pair in fields["env"].items())
    fields["after"] = ", ".join(fields["after"])
    fields["waiting"] = why_waiting(queue, job, worker_list(queue))
    lines = ["%-12s %s" % (name + ":", ("\n" + 13 * " ").join(
                 map(printable, str(value).split("\n"))))  # a command of several lines
             for name, value in fields.items() if value not in (None, "")]
    lines += ["", *run_table(runs, now)] if runs else []
    print_result(args, job_document(queue, job), *lines)


def find_job(queue, id):
    """Return the job of an id, or of the beginning of one, which is said then."""
    job = queue.find_job(id)
    if job["id"] != id:
        notice("%s is %s" % (printable(id), printable(job["id"])))
    return job


@command("logs", "print the output of the latest run of jobs", "logs -f job1",
         arg("ids ID", "ids of jobs, or their beginnings, of four characters or more",
             nargs="+"),
         arg("-f --follow", "go on until the run ends; wait for the first to begin"),
         arg("--attempt N", "of an earlier attempt, its last run",
             count_of("--attempt", 1)),
         arg("--run N", "of an earlier run", count_of("--run", 1)))
def cmd_logs(args, queue):
    chosen = {name: getattr(args, name) for name in ("run", "attempt")
              if getattr(args, name) is not None}
    alone = len(chosen) + args.follow
    if alone > 1 or (args.follow and args.json) or (alone and len(args.ids) > 1):
        words = "logs: give one of --follow, --run and --attempt, and one job; --follow"
        raise QueueError(words + " can't be had as JSON", 2)
    jobs = [find_job(queue, id) for id in args.ids]
    if args.follow:
        return follow(queue, jobs[0])
    if len(jobs) > 1:
        return print_logs(args, queue, jobs)
    job, run, output = latest_output(queue, jobs[0], chosen)
    if args.json:
        print(json.dumps(output_document(job, run["run"], output)))
    else:
        write_bytes(output)
    if not output and run["error"]:
        notice("job %s: %s" % (printable(job["id"]), printable(run["error"])))


def print_logs(args, queue, jobs):
    """Print the latest output of jobs, each under a line with its id and error."""
    latest = (latest_output(queue, job) for job in jobs)
    if args.json:
        return print(json.dumps(
            [output_document(job, run["run"], output) for job, run, output in latest]))
    for job, run, output in latest:
        ended = run["error"] or ("completed" if run["finished_at"] else "is running")
        print("==> %s: %s" % (printable(job["id"]), printable(ended)))
        write_bytes(output + b"\n" * (not output.endswith(b"\n")))


def latest_output(queue, job, chosen={}):
    """Return a job, its latest run, or that of a number, and the output of that."""
    runs = queue.runs(job)
    for name, number in chosen.items():
        runs = [run for run in runs if run[name] == number]
        if not runs:
            raise QueueError("job %s has no %s %d" % (printable(job["id"]), name, number))
    none = {"run": job["run"], "error": "has not run yet"}
    run = runs[-1] if runs else none
    return job, run, output_of(queue, job, run["run"])


def write_bytes(output):
    sys.stdout.flush()
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def follow(queue, job):
    """Print the output of a job's latest run as it comes, or of the first to come."""
    id, printed = job["id"], 0
    if not job["run"]:
        notice("job %s: %s" % (printable(id), why_waiting(queue, job, worker_list(queue))))
    while not job["run"] and job["state"] != "dead":
        time.sleep(POLL_INTERVAL / 2)
        queue.check_exists()
        job = queue.job(id)
        if job["waits"] and job["seq"] in queue.blocked_seqs():
            raise QueueError("job %s can't go on: %s" % (
                printable(id), why_waiting(queue, job, worker_list(queue))))
    running = True
    while running:
        queue.check_exists()
        running = queue.is_current(job)
        dropped, output = split_dropped(output_of(queue, job, job["run"]))
        if dropped > printed:
            notice("%d bytes of output were dropped here" % (dropped - printed))
        write_bytes(output[max(0, printed - dropped) :])
        printed = max(printed, dropped + len(output))
        if running and not is_locked(queue.lease_path(job)) and queue.is_current(job):
            raise QueueError("the worker of job %s died; a pool puts it back" % id)
        time.sleep(POLL_INTERVAL / 2 if running else 0)
    error = [run["error"] for run in queue.runs(job) if run["run"] == job["run"]]
    if any(error):
        notice("job %s: %s" % (printable(id), printable(error[0])))


def output_of(queue, job, run):
    """Return the output of a run, of one that goes on that so far."""
    output = queue.output(job, run)
    if output is None and run == job["run"]:
        # A run that ended between the two looks has its output in the database now.
        limit = queue.settings()["output_limit"]
        output = read_output(queue.lease_path(job), limit) or queue.output(job, run)
    return output or b""


@command("wait", "wait until jobs, or all, are completed (0) or dead (1)",
         "wait job1 --timeout 10m", IDS,
         arg("--timeout T", "give up with exit code 124", span_of("--timeout", 0)))
def cmd_wait(args, queue):
    states = [queue.job(id)["state"] for id in args.ids] or [
        state for state, count in queue.counts().items() if count]
    if {"pending", "processing", "failed"} & {*states} and not living_pools(queue.path):
        notice(NO_POOL)
    own = os.environ.get("QUEUECTL_JOB_ID") if within_job_of(queue.path) else None
    with contextlib.closing(ProgressLine()) as live:
        counts = queue.wait(args.ids or None, args.timeout, live.progress, but=own)
    if counts is None:
        notice("still waiting for jobs after %s" % duration_text(args.timeout))
        return 124
    words = "%(completed)d completed, %(dead)d dead" % counts
    if counts["removed"]:
        words += ", %d removed before they were seen to end" % counts["removed"]
    if counts["left"]:
        why = "; ".join(obstacles(queue)) or "a moment later they could again"
        words += ", %d can't go on: %s" % (len(counts["left"]), why)
    print_result(args, counts, words)
    return 1 if counts["dead"] or counts["removed"] or counts["left"] else 0


@command("status", "count the jobs, list the workers", "status --watch",
         arg("--watch SECONDS", "show it again and again", span_of("--watch", 0.1),
             nargs="?", const=1.0))
def cmd_status(args, queue):
    terminal = args.watch and not args.json and terminal_width(sys.stdout)
    with contextlib.ExitStack() as screen:
        if terminal:  # another screen, so that this one is as it was afterwards
            print(end="\x1b[?1049h")
            screen.callback(print, end="\x1b[?1049l", flush=True)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        while True:
            queue.check_exists()
            now, status = queue.clock(), read_status(queue)
            lines = list(status_lines(status, now))
            if terminal:
                print(end=screenful(lines))
            else:
                print_result(args, status_document(status), *lines)
            if not args.watch:
                return
            sys.stdout.flush()
            time.sleep(args.watch)


def screenful(lines):
    """Return what draws lines over those on a terminal, as many as it has room for."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    if len(lines) > height - 1:
        rest = len(lines) - height + 2
        lines = lines[: height - 2] + ["  and %d more" % rest]
    lines = map(painter(), (truncate(line, width - 1) for line in lines))
    return "\x1b[H" + "".join(line + "\x1b[K\n" for line in lines) + "\x1b[J"


@command("stats", "show throughput, run times, waiting times and errors",
         "stats --since 1d",
         arg("--since T", "over this time (1h)", span_of("--since", 1), default=3600.0))
def cmd_stats(args, queue):
    stats = queue.stats(queue.clock() - args.since)
    print_result(args, stats, *stats_lines(stats, terminal_width(sys.stdout) or 80))


@command("dashboard", "show a live page of the queue in the browser",
         "dashboard --port 8321",
         arg("--host HOST", "where to listen (127.0.0.1)", default="127.0.0.1"),
         arg("--port N", "0 takes a free one (8321)", count_of("--port", 0, 65535),
             default=8321))
def cmd_dashboard(args):
    serve(args.db, args.host, args.port)


@command("edit", "change a job that waits", "edit job1 --run-at now",
         arg("job ID", "id of a job"),
         *[field_option(name) for name in FIELDS if name != "id"])
def cmd_edit(args, queue):
    fields = checked_fields(given_fields(args), {})
    if not fields:
        raise QueueError("edit: nothing to change (see: queuectl.py edit --help)", 2)
    queue.edit(args.job, fields)
    print_result(args, public_job(queue.job(args.job)), "edited " + printable(args.job))


def check_chosen(args, everything=False):
    """Refuse a command for jobs unless it says in one way which."""
    ways = [bool(args.ids), bool(args.state or args.match), everything]
    if ways.count(True) != 1:
        words = "name jobs, or select them by an option, not both (see --help)"
        raise QueueError(words, 2)
    if args.ids and args.dry_run:
        raise QueueError("--dry-run: is not for jobs that are named", 2)


def chosen_states(args, states):
    """Return the states that are asked for, of those in which a verb can take jobs."""
    for state in args.state:
        if state not in states:
            words = "--state %s: this is for jobs that are %s"
            raise QueueError(words % (state, " or ".join(states)), 2)
    return args.state or states


def for_jobs(args, queue, verb, done, ids, taken, left=None, why=""):
    """Apply a verb to jobs by their ids, or to all that are TAKEN; tell what was done.

    LEFT is the condition for those that a verb for many leaves, and why it does. Only
    `cancel` is not done with a running one when it returns.
    """
    if args.dry_run:
        return list_jobs(args, queue, queue.jobs(taken))
    count = verb(ids or taken)
    if ids:
        running = [id for id in ids if queue.state(id) == "processing"]
        running = running if done == "cancelled" else []
        lines = ["%s %s" % (done, printable(id)) + ", which is running" * (id in running)
                 for id in ids]
        return print_result(args, {done: ids}, *lines)
    words, rest = "%s %s" % (done, plural(count, "job")), left and queue.count(left)
    words += "; %d left: %s" % (rest, why) if rest else ""
    print_result(args, {done: count, **({"left": rest} if left else {})}, words)


@command("pause", "let no further job start; running ones finish", "pause")
def cmd_pause(args, queue):
    queue.set_paused(True)
    print_result(args, {"paused": True}, RESUME)


@command("resume", "let jobs start again", "resume")
def cmd_resume(args, queue):
    queue.set_paused(False)
    print_result(args, {"paused": False}, "resumed")


@command("cancel", "end jobs that wait or run; they become dead", "cancel job1",
         IDS, STATE, MATCH, DRY_RUN)
def cmd_cancel(args, queue):
    check_chosen(args)
    taken = where(chosen_states(args, TAKES["cancel"]), args.match)
    for_jobs(args, queue, queue.cancel, "cancelled", args.ids, taken)


@command("retry", "run finished jobs again, with attempts 0", "retry job1",
         IDS, STATE, MATCH, DRY_RUN)
def cmd_retry(args, queue):
    check_chosen(args)
    retry_jobs(args, queue, TAKES["retry"])


def retry_jobs(args, queue, states):
    chosen = chosen_states(args, states)
    taken, left = [where(chosen, args.match, cancelled=cancelled)
                   for cancelled in (False, True)]
    for_jobs(args, queue, functools.partial(queue.retry, states=states), "retried",
             args.ids, taken, left, "cancelled ones are retried by id")


@command("delete", "remove jobs that do not run",
         "delete --state completed --older-than 7d", IDS, STATE, MATCH,
         arg("--all", "all but running ones"),
         arg("--older-than T", "those that finished longer ago: completed ones, or what"
             " --state or --all names", span_of("--older-than", 0)), DRY_RUN)
def cmd_delete(args, queue):
    aged = args.older_than is not None
    check_chosen(args, args.all or (aged and not args.state and not args.match))
    if aged and {*args.state} - {*FINISHED}:
        raise QueueError("--older-than: only jobs that have finished have an age", 2)
    if "processing" in args.state:
        raise QueueError("delete: a running job can't be deleted; cancel it first")
    # The dead are what people must look at: no bare --older-than takes them.
    bare = ["completed"] if aged and not args.all else []
    states = args.state or bare or TAKES["delete"]
    # What waits for others goes along with --all, but not where only finished ones go.
    delete_jobs(args, queue, args.ids, states, args.all and not aged, args.older_than)


def delete_jobs(args, queue, ids, states, everything=False, age=None):
    before = None if age is None else queue.clock() - age
    taken, left = [where(states, args.match, before, waited_for=waited_for)
                   for waited_for in (None if everything else False, True)]
    for_jobs(args, queue, queue.delete, "deleted", ids, taken, left,
             "other jobs wait for them")


@command("dlq list", "list the dead jobs", "dlq list", MATCH)
def cmd_dlq_list(args, queue):
    chosen = where(["dead"], args.match)
    if not args.json:
        errors = ["%(jobs)d x %(error)s" % row for row in queue.common_errors(chosen)]
        more = " and %d more" % (len(errors) - 3) if len(errors) > 3 else ""
        if errors:
            print("Most common errors: " + printable(", ".join(errors[:3])) + more)
    print_jobs(args, queue.dead_jobs(chosen), lambda jobs: job_table(
        jobs, queue.clock(), "DIED", "error", "command"), "no dead jobs")


@command("dlq logs", "print the latest output of all dead jobs", "dlq logs", MATCH)
def cmd_dlq_logs(args, queue):
    print_logs(args, queue, queue.dead_jobs(where(["dead"], args.match)))


@command("dlq retry", "make dead jobs pending again, with attempts 0", "dlq retry job4",
         IDS, arg("--all", "all but those that were cancelled"), MATCH, DRY_RUN)
def cmd_dlq_retry(args, queue):
    args.state = []
    check_chosen(args, args.all)
    retry_jobs(args, queue, TAKES["dlq retry"])


@command("dlq clear", "remove all dead jobs", "dlq clear", MATCH, DRY_RUN)
def cmd_dlq_clear(args, queue):
    delete_jobs(args, queue, [], ["dead"])


@command("config show", "show all settings", "config show")
def cmd_config_show(args, queue):
    values = queue.settings()
    rows = [
        [name, setting_text(name, values[name]), setting_text(name, default), meaning]
        for name, (_, default, meaning) in SETTINGS.items()]
    print_result(args, values, *table(["SETTING", "VALUE", "DEFAULT", "MEANING"], rows,
                                terminal_width(sys.stdout)))


@command("config get", "print the value of a setting", "config get max_retries",
         arg("key KEY", "all without it", setting_name, nargs="?"))
def cmd_config_get(args, queue):
    if args.key is None:
        return cmd_config_show(args, queue)
    value = queue.settings()[args.key]
    print_result(args, value, setting_text(args.key, value))


@command("config set", "change a setting", "config set max_retries 5", KEY,
         arg("value VALUE", "its new value"))
def cmd_config_set(args, queue):
    queue.set(args.key, checked(args.key, SETTINGS[args.key][0], as_number(args.value)))
    answer_setting(args, queue)


@command("config unset", "go back to a setting's default", "config unset max_retries",
         KEY)
def cmd_config_unset(args, queue):
    queue.unset(args.key)
    answer_setting(args, queue)


def answer_setting(args, queue):
    value = queue.settings()[args.key]
    words = "%s = %s" % (args.key, setting_text(args.key, value))
    print_result(args, {args.key: value}, words)


@command("worker start", "run jobs until stopped", "worker start --count 2",
         arg("--count N", "how many at a time (1)", count_of("--count", 1, MAX_WORKERS),
             default=1),
         arg("--drain", "end when none can run without a later time or help"),
         arg("--detach", "go on in the background"))
def cmd_worker_start(args):
    def started():
        answer_started(args, os.getpid(), "Ctrl-C, or ")

    if args.detach:
        return detached(args)
    watched = args.drain and terminal_width(sys.stderr)
    with contextlib.closing(ProgressLine()) as live:
        tell = (lambda queue: live.progress(queue.counts())) if watched else None
        pool = Supervisor(args.db, args.count, args.drain, tell)
        code = pool.run(started)
    if not pool.stop_reason:  # which was said
        notice(pool.result)
    return code


def answer_started(args, pid, otherwise=""):
    words = "pool %d: %s; to stop: %squeuectl.py worker stop" % (
        pid, plural(args.count, "worker"), otherwise)
    print_result(args, {"pool": pid, "workers": args.count}, words)
    sys.stdout.flush()


def detached(args):
    """Start a pool in the background; tell how it starts, and end with that."""
    import subprocess

    # It belongs to no run, though a job may have started it.
    env = {name: value for name, value in os.environ.items() if name != "QUEUECTL_RUN"}
    words = [sys.executable, os.path.abspath(__file__), "worker", "start", "--json",
             "--db", args.db, "--count", str(args.count), *["--drain"] * args.drain]
    pool = subprocess.Popen(
        words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        # Not without any console: each worker would open a new one, to be seen.
        creationflags=subprocess.CREATE_NO_WINDOW if WINDOWS else 0)
    for line in pool.stdout:
        if line.startswith(b"{"):
            answer_started(args, json.loads(line)["pool"])
            pool.returncode = 0  # it goes on, and nobody waits for it
            return 0
        print(line.decode("utf-8", "replace").rstrip(), file=sys.stderr)
    return pool.wait()


@command("worker stop", "stop all pools of the queue, when their jobs are finished",
         "worker stop",
         arg("--now", "end running jobs; they go back to pending"),
         arg("--no-wait", "return at once"))
def cmd_worker_stop(args):
    stopped = sorted(living_pools(args.db))
    for pool in stopped:
        request_stop(args.db, pool, "now" if args.now else "stop")
    if stopped:
        notice("stopping; running jobs are " + ("ended" if args.now else "finished first"))

    def gone():
        return not {*living_pools(args.db)} & {*stopped}

    # A job that stops its own pool would wait for itself.
    waits = not args.no_wait and not within_job_of(args.db)
    if waits:
        if not wait_until(gone, 10, POLL_INTERVAL / 4):
            notice("still waiting; one that was stopped by Ctrl-Z goes on by kill -CONT "
                + " ".join(map(str, stopped)))
            wait_until(gone, MAX_DURATION, POLL_INTERVAL / 4)
    names = ", ".join("pool %d" % pid for pid in stopped)
    words = ("stopped " if waits else "stopping ") + names
    print_result(args, {"stopped": stopped}, words if stopped else "no pool is running")


# Without -I, Python would import a json.py of the current directory; what -S leaves out
# costs time, and only the packages of others need it.
IMPORTER = [
    "-ISc", "import os, sys; file = sys.argv.pop(1); home, name = os.path.split(file);"
    " sys.path.insert(0, home); os.path.exists(file) or sys.exit('queuectl: ' + file +"
    " ' is gone: install it again'); sys.exit(__import__(name[:-3]).main())"]
INSTALLED = "@rem" if WINDOWS else "#!/bin/sh\n#"
INSTALLED += " written by queuectl install\n"


@command("install", "put a command queuectl, which starts quicker, into a directory",
         "install ~/.local/bin",
         arg("dir DIR", "made if need be (~/.local/bin)", nargs="?",
             default="~/.local/bin"))
def cmd_install(args):
    home = os.path.abspath(os.path.expanduser(args.dir))
    path = os.path.join(home, "queuectl.cmd" if WINDOWS else "queuectl")
    content = command_file(os.path.abspath(__file__))
    os.makedirs(home, exist_ok=True)
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
        if file.read(len(INSTALLED)) != INSTALLED:
            raise QueueError("%s is not queuectl's: remove it first" % printable(path))
    with open(path + ".new", "wb") as file:
        file.write(content)
    os.chmod(path + ".new", 0o755)
    os.replace(path + ".new", path)
    on_path = os.path.realpath(home) in map(os.path.realpath, os.get_exec_path())
    lines = ["installed " + printable(path), printable(home) + " is not on PATH: add it"]
    print_result(args, {"path": path, "on_path": on_path}, *lines[: 2 - on_path])


def command_file(own):
    """Return the content of a file that imports this one; compile it."""
    import py_compile

    if not re.fullmatch(r"[^.]+\.py", os.path.basename(own)):
        raise QueueError("%s: only what is called NAME.py can be imported" % printable(own))
    with contextlib.suppress(OSError):  # root can here, and those who use it can't
        py_compile.compile(own)
    words = [sys.executable, *IMPORTER, own]
    if not WINDOWS:
        return os.fsencode(INSTALLED + 'exec %s "$@"\n' % shell_line(words))
    words = ['"%s"' % word.replace("%", "%%") for word in words]
    try:
        return (INSTALLED + "@%s %%*\n" % " ".join(words)).encode("oem")
    except UnicodeError:
        raise QueueError("%s: not in the console's code page" % printable(own)) from None


# They print what the command itself says; where that is nothing, files are completed.
COMPLETIONS = {"bash": """\
_queuectl() {
    COMPREPLY=($(queuectl completion -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _queuectl queuectl
""", "zsh": """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_queuectl() {
    compadd -- $(queuectl completion -- "${(@)words[2,CURRENT]}" 2>/dev/null) || _files
}
compdef _queuectl queuectl
""", "fish": """\
function _queuectl
    set -l words (commandline -opc | string escape)[2..-1] (commandline -ct)
    set -l found (queuectl completion -- $words 2>/dev/null)
    set -q found[1]; and printf '%s\\n' $found; or __fish_complete_path $words[-1]
end
complete -c queuectl -f -a '(_queuectl)'
"""}
CHOICES = {"STATE": STATES, "KEY": SETTINGS, "SHELL": COMPLETIONS}


@command("completion", "print a script that lets a shell complete commands and ids",
         "completion bash",
         arg("shell SHELL", "in .bashrc: source <(queuectl completion bash)", nargs="?",
             choices=[*COMPLETIONS]))
def cmd_completion(args):
    if args.words:  # those of a command line, up to the one to be completed
        with contextlib.suppress(QueueError, OSError, ValueError, sqlite3.Error):
            for candidate in candidates(args.words, args.db):
                print(candidate)
    elif args.shell:
        script = COMPLETIONS[args.shell]
        print_result(args, script, script.rstrip())
    else:
        raise QueueError("completion: name one of " + ", ".join(COMPLETIONS), 2)


def candidates(words, path):
    """Return what the last of these words of a command line can become."""
    # Of --state=dead bash makes three words, others one.
    *words, begun = [part for word in words for part in word.split("=")]
    name, words = command_named(filter(None, words))
    arguments = [*(COMMANDS[name][3] if name in COMMANDS else ()), *EVERYWHERE]
    kind = kind_wanted(words, arguments)
    if "--" in words:
        return []
    if begun.startswith("-"):
        found = ["--help", *itertools.chain(*(names for names, _ in arguments))]
    elif kind == "ID":
        found = ids_wanted(words, begun, path, TAKES.get(name, STATES))
    elif kind or name in COMMANDS:
        found = CHOICES.get(kind, ())
    else:
        found = [known[len(name) :].split()[0] for known in COMMANDS
                 if known.startswith(name)]
    return [word for word in dict.fromkeys(found) if word.startswith(begun)]


def kind_wanted(words, arguments):
    """Return what comes behind these words, as `arg` was told: STATE, ID; or None."""
    kinds = {name: options.get("metavar") for names, options in arguments
             for name in names}
    places = [kinds[name] for name in kinds if not name.startswith("-")]
    value = None  # of an option
    for word in words:
        if not value and not word.startswith("-"):
            places = places[1:] or places  # the last one may take several
        value = kinds.get(word) if word.startswith("-") else None
    return value or (places or [None])[0]


def ids_wanted(words, begun, path, states):
    """Return ids of the queue that these words name, else of the one at PATH."""
    import shlex

    given = shlex.split(dict(zip(words, words[1:])).get("--db", "")) or [path]
    path = os.path.expanduser(given[0])
    if not os.path.getsize(path):  # it would become a queue
        return []
    with Queue(path, lock_timeout=POLL_INTERVAL, new=False) as queue:
        ids = queue.ids_starting_with(begun, states)
    return [id for id in ids if re.fullmatch(r"(?a)\w[\w.-]*", id)]  # a word anywhere


# What commands and dashboard show alike.


def within_job_of(path):
    """Tell whether this command was started by a job of the queue."""
    runs = os.path.join(path_beside(path, ".runs"), "")
    return os.environ.get("QUEUECTL_RUN", "").startswith(runs)


def worker_list(queue):
    """Return the workers of all pools, with the job that each of them runs."""
    busy = {run["worker"]: run for run in queue.processing_runs()}
    idle = {"id": None, "started_at": None}
    return [
        {"pid": pid, "pool": pool, "job": run["id"], "since": run["started_at"]}
        for pool, workers in living_pools(queue.path).items()
        for pid in workers
        for run in [busy.get(pid, idle)]
    ]


def read_status(queue):
    """Return what `status` shows; its times are epoch seconds yet."""
    none = {"id": None, "run_at": None}
    oldest, due = queue.oldest_claimable() or none, queue.next_due() or none
    return {
        "jobs": queue.counts(), "workers": worker_list(queue),
        "oldest_waiting": oldest["run_at"], "oldest_job": oldest["id"],
        "next_due": due["run_at"], "next_job": due["id"],
        "paused": queue.is_paused(), "blocked": queue.first_blocked(),
    }


def status_document(status):
    """Return what `status --json` prints."""
    workers = [with_iso_times(worker, "since") for worker in status["workers"]]
    return dict(with_iso_times(status, "oldest_waiting", "next_due"), workers=workers,
                blocked=status["blocked"]["jobs"] if status["blocked"] else 0)


def status_lines(status, now):
    jobs, workers, due = status["jobs"], status["workers"], status["next_due"]
    for state, count in jobs.items():
        yield "%s: %d" % (state.capitalize(), count)
    yield "Active Workers: %d" % len(workers)
    if status["oldest_job"]:
        yield "Oldest Waiting: %s, for %s" % (
            printable(status["oldest_job"]), duration_text(now - status["oldest_waiting"]))
    if due is not None:
        late = "was due %s, all workers are busy" if due < now and workers else "due %s"
        yield "Next Due: %s, %s" % (printable(status["next_job"]), late % relative_time(due, now))
    if status["blocked"]:
        yield "Blocked: %s; %s" % (
            plural(status["blocked"]["jobs"], "job"), blocked_text(status["blocked"]))
    if status["paused"]:
        yield RESUME.capitalize()
    elif jobs["pending"] + jobs["processing"] + jobs["failed"] and not workers:
        yield NO_POOL.capitalize()
    for worker in workers:
        doing = "idle"
        if worker["job"]:
            doing = "%s for %s" % (printable(worker["job"]), duration_text(now - worker["since"]))
        yield "  worker %(pid)d of pool %(pool)d: " % worker + doing


def job_document(queue, job):
    """Return what `show --json` prints."""
    runs = [with_iso_times(run, "started_at", "finished_at") for run in queue.runs(job)]
    waiting = why_waiting(queue, job, worker_list(queue))
    return dict(public_job(job), waiting=waiting, runs=runs)


def output_document(job, run, output):
    """Return what `logs --json` prints."""
    text = output.decode("utf-8", "backslashreplace")
    return {"id": job["id"], "run": run, "output": text}


# ======================================================================================
# Main: the parser, the exit code
# ======================================================================================


EVERYWHERE = [arg("--json", "print one JSON document"),
              arg("--db PATH", "the queue (QUEUECTL_DB, or else queuectl.db)")]
USAGES = {
    "enqueue": "queuectl.py enqueue [OPTION]... -- COMMAND...\n"
    "       queuectl.py enqueue [OPTION]... JSON... | - | --file F | --lines",
    "edit": "queuectl.py edit ID [OPTION]... [-- COMMAND...]",
}
ALIASES = {"config list": "config show", "dlq purge": "dlq clear", "metrics": "stats",
           "ls": "list", "rm": "delete"}
# They make a queue where there is none; `wait && deploy` in a wrong folder must not.
MAKERS = ("enqueue", "list", "dlq list", "status", "stats", "config show", "config get",
          "config set", "config unset", "pause", "resume", "worker start", "dashboard")
# They open it themselves, or need none: SQLite must cross neither a fork nor threads.
WITHOUT_QUEUE = ("worker start", "worker stop", "dashboard", "install", "completion")


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
        raise unknown_word("command " + printable(name), name, [*COMMANDS, *ALIASES])
    return name, [*options, *words]


def overview(group):
    """Return the short help of all commands, or of those of a group."""
    chosen = {name: entry for name, entry in COMMANDS.items() if name.startswith(group)}
    lines = ["usage: queuectl.py [--db PATH] %s ..." % (group + " COMMAND").strip(), ""]
    lines += ["  %-14s %s" % (name, entry[1]) for name, entry in chosen.items()]
    lines += ["", "examples:"]
    lines += ["  queuectl.py " + entry[2] for entry in list(chosen.values())[:5]]
    lines += ["", "with each: --help, --json for one JSON document,",
              "           --db PATH for another queue than queuectl.db"]
    return "\n".join(lines)


def parse(name, words):
    """Return function and arguments of one command; no other's parser is built."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            hint = " (see: queuectl.py %s --help)" % name
            if name == "enqueue" and words[0][:1] not in ("{", "[", "-"):
                hint = "; to run a command: queuectl.py enqueue -- " + " ".join(words)
            raise QueueError("%s: %s" % (name, printable(message + hint)), 2)

    function, meaning, example, arguments = COMMANDS[name]
    parser = Parser(
        prog="queuectl.py " + name, usage=USAGES.get(name),
        description=meaning[0].upper() + meaning[1:] + ".",
        epilog="example: queuectl.py " + example, allow_abbrev=False,
        # Asking for the terminal's width imports modules for a fifth of the whole time.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=79),
    )
    for names, options in [*arguments, *EVERYWHERE]:
        parser.add_argument(*names, **options)
    behind = name in ("enqueue", "edit", "completion") and "--" in words
    at = words.index("--") if behind else len(words)
    # The words behind a `--` are no options: only `parse_args` leaves them together.
    mixed = "--" not in words[:at]
    args = (parser.parse_intermixed_args if mixed else parser.parse_args)(words[:at])
    args.words = words[at + 1 :]
    path = args.db or os.environ.get("QUEUECTL_DB") or "queuectl.db"
    args.db = os.path.realpath(path)
    return function, args


def run_command(argv):
    """Run what a command line says; return the exit code."""
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    name, words = command_named(argv)
    if name not in COMMANDS:
        # Where a group is named, its queue may be, too: `--db PATH worker`.
        stray = [word for word in words
                 if not name or not re.match("--db$|--db=|--json$|[^-]", word)]
        if stray and not {"-h", "--help", "--version"} & set(words):
            hint = "no command in: %s (see: queuectl.py --help)"
            raise QueueError(hint % printable(" ".join([*name.split(), *words])), 2)
        print("queuectl " + __version__ if "--version" in words else overview(name))
        return 0
    function, args = parse(name, words)
    try:
        if name in MAKERS and sys.stderr.isatty() and not os.path.exists(args.db):
            with Queue(args.db):
                notice("made queue " + printable(args.db))
        if name in WITHOUT_QUEUE:
            return function(args) or 0
        with Queue(args.db, new=name in MAKERS) as queue:
            return function(args, queue) or 0
    except sqlite3.Error as error:
        raise QueueError("%s: %s" % (printable(args.db), error)) from None


def main(argv=None):
    """Run one command; return its exit code. What goes wrong is one line on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, and its number would be the database's
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if WINDOWS and sys.stderr.isatty():
        os.system("")  # lets a console of Windows 10 take escape sequences
    try:
        code = run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except QueueError as error:
        notice(error)
        return error.code
    except OSError as error:
        closed = errno.EPIPE, errno.EINVAL if WINDOWS else errno.EPIPE
        if error.errno in closed and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the exit would complain
            return 0
        where = printable(str(error.filename or "system error"))
        notice(where + (owner_hint(where) or ": %s" % (error.strerror or error)))
        return 1
    except RecursionError:
        notice("not JSON that a job is made of: nested too deeply")
        return 2
    except KeyboardInterrupt:
        return 130


# ======================================================================================
# Dashboard: the documents of the commands by HTTP, and the page
# ======================================================================================

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'nonce-TOKEN'; script-src"
    " 'nonce-TOKEN'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CACHED = 5.0  # seconds that statistics are given to others who ask for the same


def selected(query, states=STATES, cancelled=None, waited_for=None):
    """Return the condition for the jobs of these states that a query asks for."""
    if "state" in query:
        states = [state for state in states if state == state_name(query["state"])]
    text = query.get("q", "")
    if not is_storable(text + query.get("before", "")):
        raise QueueError("not text", 400)
    return where(states, text, None, cancelled, waited_for, errors=True)


def newest_jobs(queue, query):
    """Return a page of jobs, newest first; `before` is the id to go on from.

    Dead ones stand in the order of their deaths, the latest first.
    """
    limit = min(count_of("limit", 0)(query.get("limit", "50")) or 50, BATCH)
    chosen, before = selected(query), query.get("before", "")
    if query.get("state", "").lower() != "dead":
        last = queue.seq_before(before)
        return list(map(public_job, queue.jobs(chosen, limit, newest=True, last=last)))
    dead = queue.dead_jobs(chosen, below=before)
    return list(map(public_job, itertools.islice(dead, limit)))


def stats_by_the_minute(queue, query):
    """Return `stats`; those of the last hour begin with a full minute.

    So the bars on the page stay where they are from one look to the next.
    """
    since = queue.clock() - span_of("since", 1)(query.get("since", "1h"))
    return queue.stats(since // 60 * 60 + 60 if "since" not in query else since)


def to_retry(query):
    return selected(query, ["dead"], cancelled=False)


def to_delete(query):
    ended = ["pending", "completed", "failed", "dead"]
    return selected(query, ended, waited_for=False)


def counted(queue, query):
    """Return how many jobs a query asks for, and what could be done with how many."""
    asked = {"jobs": selected, "retry": to_retry, "delete": to_delete}
    return {name: queue.count(asked[name](query)) for name in asked}


def job_output(queue, query):
    import codecs

    job = queue.job(query["id"])
    run = count_of("run", 0)(query.get("run", str(job["run"])))
    if "run" in query and not 1 <= run <= job["run"]:
        raise QueueError("no such run", 404)
    output = output_of(queue, job, run)
    if "from" not in query:
        return output_document(job, run, output)
    dropped, output = split_dropped(output)
    start = max(dropped, count_of("from", 0)(query["from"]))
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    runs = run == job["run"] and job["state"] == "processing"
    text = decoder.decode(output[start - dropped :], final=not runs)
    end = dropped + len(output) - len(decoder.getstate()[0])  # half a character is left
    return {"id": job["id"], "run": run, "output": text, "start": start, "end": end}


def metrics(queue, query):
    """Return the numbers of the queue in the text format of Prometheus."""
    status, totals = read_status(queue), queue.totals()
    busy = sum(worker["job"] is not None for worker in status["workers"])
    families = [
        ("jobs", "gauge", "jobs by state", "state", status["jobs"]),
        ("workers", "gauge", "workers of all pools", "state",
         {"busy": busy, "idle": len(status["workers"]) - busy}),
        ("runs_total", "counter", "runs that ended, by outcome", "outcome",
         {outcome: runs for outcome, (runs, _) in totals.items()}),
        ("run_seconds_total", "counter", "seconds of these runs", "outcome",
         {outcome: "%.6f" % seconds for outcome, (_, seconds) in totals.items()}),
    ]
    lines = []
    for name, kind, meaning, label, values in families:
        lines.append("# HELP queuectl_%s %s" % (name, meaning))
        lines.append("# TYPE queuectl_%s %s" % (name, kind))
        lines += ['queuectl_%s{%s="%s"} %s' % (name, label, *pair)
                  for pair in values.items()]
    return "\n".join(lines) + "\n"


# What is asked for: what makes it, of the queue and the query. ID is in the query, and
# may have been from the beginning: browsers take `.` and `..` out of a path. A GET is a
# document, a POST carries out a verb.
ROUTES = {
    "GET /metrics": metrics,
    "GET /api/status": lambda queue, query: status_document(read_status(queue)),
    "GET /api/stats": stats_by_the_minute,
    "GET /api/jobs": newest_jobs,
    "GET /api/jobs/ID": lambda queue, query: job_document(
        queue, queue.job(query["id"])),
    "GET /api/jobs/ID/output": job_output,
    "POST /api/jobs/ID/retry": lambda queue, query: queue.retry([query["id"]]),
    "POST /api/jobs/ID/cancel": lambda queue, query: queue.cancel([query["id"]]),
    "POST /api/jobs/ID/delete": lambda queue, query: queue.delete([query["id"]]),
    "GET /api/count": counted,
    "POST /api/retry": lambda queue, query: queue.retry(to_retry(query)),
    "POST /api/delete": lambda queue, query: queue.delete(to_delete(query)),
}


class Site:
    """What the dashboard answers to requests; `listen` only speaks HTTP."""

    def __init__(self, path, host):
        import secrets
        import socket
        import threading

        self.path, self.names = path, {"localhost", host.lower()}
        if host not in LOOPBACK:  # it is reached by the names of its machine, too
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.token = secrets.token_hex(16)
        self.lock = threading.Lock()
        self.cached = functools.lru_cache(16)(self.document)

    def answer(self, method, target, headers):
        """Return status, type and text; a refusal is one of these, too."""
        from urllib.parse import urlsplit
        import html

        try:
            self.check_host(headers)
            url = urlsplit(target)
            if method == "POST":
                self.check_write(headers)
                return (200, *self.document(method, url, None))
            if url.path == "/":
                page = PAGE_HTML.replace("TOKEN", self.token)
                return 200, "text/html", page.replace("QUEUE", html.escape(self.path))
            if url.path != "/api/stats":
                return (200, *self.document(method, url, None))
            with self.lock:  # with a million runs they take a while: once for all
                return (200, *self.cached(method, url, time.monotonic() // CACHED))
        except (ValueError, QueueError) as error:
            words, code = str(error), getattr(error, "code", 0)
            status = 404 if words.startswith(NO_JOB) else max(400, code)
        except (sqlite3.Error, OSError) as error:
            status, words = 503, str(error)
        return status, "application/json", json.dumps({"error": words})

    def check_host(self, headers):
        """Refuse another site's name that leads here: DNS rebinding."""
        from urllib.parse import urlsplit
        import ipaddress

        name = urlsplit("//" + headers.get("Host", "")).hostname or ""
        if name not in self.names:
            try:
                ipaddress.ip_address(name)
            except ValueError:
                raise QueueError("not a name of this dashboard", 403) from None

    def check_write(self, headers):
        """Refuse what does not come from the page that this dashboard gave."""
        import hmac

        if headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers:
            raise QueueError("an action has no body", 413)
        token = headers.get("X-Token", "").encode()
        if headers.get("Origin") != "http://" + headers["Host"]:
            raise QueueError("not from this page", 403)
        if not hmac.compare_digest(token, self.token.encode()):
            raise QueueError("this page is an earlier dashboard's: reload it", 403)

    def document(self, method, url, turn):
        """Return type and text of what a path names; a job's id is quoted in it.

        What is cached is made anew in the next TURN.
        """
        from urllib.parse import parse_qsl, unquote

        path, query = url.path, dict(parse_qsl(url.query, max_num_fields=10))
        job = re.fullmatch("(/api/jobs/)([^/]*)(/.+)?/?", path)
        if job:
            path = job[1] + "ID" + (job[3] or "")
            query.setdefault("id", unquote(job[2], errors="replace"))
        route = ROUTES.get(method + " " + path)
        if not route:
            raise QueueError("no such page", 404)
        with Queue(self.path, lock_timeout=IDLE_INTERVAL, new=False) as queue:
            value = route(queue, query)
        if isinstance(value, str):
            return "text/plain", value
        return "application/json", json.dumps(value)


def listen(site, host, port):
    """Return a server of HTTP for a site, each of its connections in a thread."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    import socket

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # a slow or vanished client keeps no thread for ever
        server_version, sys_version = "queuectl", ""

        def do_GET(self):
            status, kind, text = site.answer(self.command, self.path, self.headers)
            self.close_connection |= self.command == "POST"  # a body is not read
            self.send_response(status)
            self.send_header("Content-Type", kind + "; charset=utf-8")
            self.send_header("Content-Length", str(len(text.encode())))
            for name, value in HEADERS.items():
                self.send_header(name, value.replace("TOKEN", site.token))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_):
            """Keep quiet: the terminal is the user's."""

    class Server(ThreadingHTTPServer):
        allow_reuse_address = not WINDOWS  # or two could listen at the same one
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request, client):
            """Say nothing: a client went away."""

    return Server((host, port), Handler)


def serve(path, host, port):
    """Serve the dashboard until Ctrl-C."""
    if not host:  # it would listen everywhere
        raise QueueError("--host: name an address, like 127.0.0.1", 2)
    with Queue(path):  # whether it is a queue
        site = Site(path, host)
    try:
        server = listen(site, host, port)
    except (OSError, TypeError, UnicodeError) as error:  # the last two: an odd name
        words = "cannot listen on %s, port %d: %s"
        why = getattr(error, "strerror", None) or error
        raise QueueError(words % (printable(host), port, why)) from None
    with server:
        if host not in LOOPBACK:
            notice("warning: whoever reaches %s can read this queue and change it" % host)
        where = "[%s]" % host if ":" in host else host
        address = "http://%s:%d/" % (where, server.server_port)
        print(address + " (to stop: Ctrl-C)", flush=True)
        server.serve_forever()


PAGE_HTML = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>queuectl</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>
<rect width='16' height='16' rx='3' fill='%231a5fd0'/><path stroke='white' stroke-width='2' d='M3 5h10M3 8h7M3 11h4'/></svg>">
<style nonce="TOKEN">
:root { color-scheme: light dark; --bg: #f5f6f8; --card: #fff; --text: #1b2330; --dim: #566070; --line: #dfe3e9;
  --edge: #87919f; --blue: #1a5fd0; --green: #17733d; --red: #b4232f; --amber: #825600; --pink: #8b3fb0; --cyan: #0b6b7d; }
@media (prefers-color-scheme: dark) { :root { --bg: #10141a; --card: #191f28; --text: #e4e9f0; --dim: #9aa6b6;
  --line: #2b3441; --edge: #6c7888; --blue: #74b0ff; --green: #5ccb8a; --red: #ff8a8f; --amber: #e5b747; --pink: #d2a8ff;
  --cyan: #5fd7e0; } }
* { box-sizing: border-box; margin: 0; } [hidden] { display: none !important; }
.pending { --c: var(--dim); } .processing { --c: var(--blue); } .completed { --c: var(--green); }
.failed { --c: var(--amber); } .dead { --c: var(--red); } .state { color: var(--c); font-weight: 600; }
.a1 { color: var(--red); } .a2 { color: var(--green); } .a3 { color: var(--amber); } .a4 { color: var(--blue); }
.a5 { color: var(--pink); } .a6 { color: var(--cyan); }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px; }
body { margin: 0 auto; max-width: 88rem; padding: 1rem; background: var(--bg); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
header, .row { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: baseline; margin-bottom: .6rem; }
h1 { font-size: 1.15rem; } h2 { font-size: .95rem; } a { color: inherit; text-underline-offset: .2em; }
.dim { color: var(--dim); font-weight: 400; } .end { margin-left: auto; } .mono, pre { font: .84rem/1.5 ui-monospace, monospace; }
.card, button, input { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.card { padding: .8rem; margin-top: .6rem; }
button, input { font: inherit; color: inherit; padding: .25rem .7rem; border-color: var(--edge); }
button { cursor: pointer; } button:disabled { opacity: .5; cursor: default; } button:hover:enabled { border-color: var(--blue); }
input { flex: 1; min-width: 10rem; } ::placeholder { color: var(--dim); opacity: 1; }
#lost { background: var(--red); color: var(--card); padding: .5rem .8rem; border-radius: .5rem; margin-bottom: .6rem; }
#paused { color: var(--amber); font-weight: 600; }
#tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .5rem; }
#tiles button { text-align: left; padding: .5rem .8rem; border: 1px solid var(--line); border-top: 3px solid var(--c); }
#tiles button[aria-pressed=true] { box-shadow: 0 0 0 2px var(--c); }
#tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: 3fr 2fr; column-gap: .6rem; }
svg { display: block; width: 100%; height: 5rem; border-bottom: 1px solid var(--edge); }
.good { fill: var(--blue); } .bad { fill: var(--amber); } .axis { display: flex; justify-content: space-between; font-size: .8rem; }
ul { list-style: none; padding: 0; columns: 20rem; } li, td, th { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .35rem .5rem; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; width: 7rem; } th:first-child { width: 20%; } th:last-child { width: auto; }
th.slim { width: 4.5rem; } td a { text-decoration: none; } tbody tr { cursor: pointer; }
tbody tr:hover, tr[aria-current] { background: color-mix(in srgb, var(--blue) 8%, transparent); }
tr[aria-current] { box-shadow: inset 3px 0 var(--blue); } #none { padding: .8rem .5rem 0; }
#job { position: fixed; inset: 0 0 0 auto; width: min(46rem, 100%); margin: 0; border-radius: 0; overflow: auto;
  overscroll-behavior: contain; box-shadow: 0 0 2rem #0007; } #job h2 { overflow-wrap: anywhere; outline: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--bg); border-radius: .4rem; padding: .6rem; margin-bottom: .7rem; }
#command { max-height: 10rem; overflow: auto; user-select: all; } #output { max-height: 55vh; overflow: auto; margin: .7rem 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin-bottom: .7rem; }
dl div { display: contents; } dt { color: var(--dim); } dd { overflow-wrap: anywhere; }
@media (max-width: 45rem) { body, .card { padding: .6rem; } .two { grid-template-columns: 1fr; } .wide { display: none; }
  #tiles { grid-template-columns: repeat(3, 1fr); } #tiles b { font-size: 1rem; }
  #tiles button { padding: .4rem .5rem; } th:first-child { width: 38%; } }
</style></head><body>
<header><h1>queuectl</h1><span class="mono dim" id="where">QUEUE</span><span id="paused" hidden>paused</span>
<span class="dim end" id="next"></span></header><main>
<div id="lost" role="alert" hidden></div><div id="tiles" role="group" aria-label="Jobs by state"></div>
<div class="two"><section class="card" aria-labelledby="t1"><div class="row"><h2 id="t1">Runs a minute</h2>
<span class="dim" id="ran"></span></div><svg id="rate" role="img" preserveAspectRatio="none"></svg>
<div class="axis dim"><span>1 h ago</span><span id="top"></span><span>now</span></div></section>
<section class="card" aria-labelledby="t2"><div class="row"><h2 id="t2">Run times</h2><span class="dim" id="median"></span></div>
<svg id="times" role="img" preserveAspectRatio="none"></svg>
<div class="axis dim"><span>&lt; 10 ms</span><span>0.1 s</span><span>1 s</span><span>10 s</span><span>100 s</span><span>&gt; 1000 s</span></div>
</section></div>
<section class="card" aria-labelledby="crew"><h2 id="crew">Workers</h2><ul id="workers"></ul></section>
<section class="card" aria-labelledby="t3"><div class="row"><h2 id="t3">Jobs</h2><span class="dim" id="count"></span>
<input id="q" type="search" placeholder="Search id, command, error" aria-label="Search">
<button id="retry" hidden></button><button id="delete" hidden>Delete these…</button></div><div class="row dim" id="errors"></div>
<table aria-labelledby="t3"><thead><tr><th>Id<th>State<th class="slim wide">Tries<th>When<th class="slim wide">Took<th class="wide">Command
</tr></thead><tbody id="rows"></tbody></table><p class="dim" id="none" hidden></p>
<div class="row" id="pages"><button id="newest">Newest</button><button id="older">Older</button></div></section></main>
<aside class="card" id="job" aria-labelledby="name" hidden><div class="row"><h2 class="mono" id="name" tabindex="-1"></h2>
<span class="state" id="state"></span><span class="row end" id="acts"></span></div><pre id="command" tabindex="0" aria-label="Command"></pre>
<dl id="facts"></dl><table aria-label="Runs"><tbody id="runs"></tbody></table>
<pre id="output" tabindex="0" aria-label="Output"></pre></aside>
<script nonce="TOKEN">
"use strict";
const $ = id => document.getElementById(id), SIZE = 50, number = n => n.toLocaleString();
const states = ["pending", "processing", "completed", "failed", "dead"];
let view = new URLSearchParams(), turn = 0, timer, statsAt = 0, printed = {};
const path = (id, what = "", more = "") => "/api/jobs/-" + what + "?id=" + encodeURIComponent(id) + more;

/* Words for values. */
const span = s => s === null ? "" : s < 1 ? Math.round(1000 * s) + " ms" : s < 10 ? s.toFixed(1) + " s" : s < 120 ? Math.round(s) + " s"
  : s < 5400 ? Math.round(s / 60) + " min" : s < 172800 ? Math.round(s / 3600) + " h" : Math.round(s / 86400) + " d";
const since = time => (Date.now() - Date.parse(time)) / 1000;
const ago = time => since(time) < 0 ? "in " + span(-since(time)) : span(since(time)) + " ago";
const moment = time => new Date(time).toLocaleString() + ", " + ago(time);
const took = run => span(run.seconds);
const when = job => job.state === "processing" ? "for " + span(since(job.started_at))
  : job.state === "completed" || job.state === "dead" ? ago(job.updated_at)
  : since(job.run_at) < 0 ? ago(job.run_at) : "waits " + span(since(job.run_at));

/* What is looked at is in the address, so that it can be kept, sent, and gone back from. */
const at = name => view.get(name) || "";
function address(changes) {
  const next = new URLSearchParams(view);
  for (const [name, value] of Object.entries(changes)) value ? next.set(name, value) : next.delete(name);
  return "#" + next; }
const go = changes => { location.hash = address(changes); };
const chosen = more => new URLSearchParams({state: at("state"), q: at("q"), ...more});
async function ask(url, options) {
  const answer = await fetch(url, options), body = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.error || answer.status), {status: answer.status});
  return body; }
async function post(url, question) {
  if (question && !confirm(question)) return;
  await ask(url, {method: "POST", headers: {"X-Token": "TOKEN"}}).catch(error => alert(error.message));
  refresh(); }

/* Nodes are kept, and only what changed in them: nothing flickers, scrolls or loses its selection. */
function make(tag, kind = "", ...children) {
  const node = document.createElement(tag);
  node.className = kind; node.append(...children); return node; }
const text = (node, value) => { if (node.textContent !== String(value)) node.textContent = value; };
const texts = (node, ...values) => values.forEach((value, i) => text(node.children[i], value));
const link = (node, words, changes) => { text(node, words); node.href = address(changes); };
const current = (node, is) => is ? node.setAttribute("aria-current", "true") : node.removeAttribute("aria-current");
function fit(parent, items, key, build, show) { /* by key: who has the focus keeps it when its row moves */
  const old = new Map([...parent.children].map(node => [node.dataset.key, node]));
  items.forEach((item, i) => {
    const name = String(key(item, i)), node = old.get(name) || build();
    old.delete(name); node.dataset.key = name;
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] || null);
    show(node, item, i); });
  old.forEach(node => node.remove()); }
const index = (item, i) => i;
function chart(picture, columns, label) { /* columns of parts, each a kind, a height and its words */
  const svg = tag => document.createElementNS("http://www.w3.org/2000/svg", tag);
  const top = Math.max(4, ...columns.map(parts => parts.reduce((sum, part) => sum + part[1], 0)));
  picture.setAttribute("viewBox", `0 0 ${columns.length} ${top * 1.04}`); picture.setAttribute("aria-label", label);
  const bars = columns.flatMap((parts, x) => { let base = top * 1.04; return parts.map(part => [...part, x, base -= part[1]]); });
  fit(picture, bars, index, () => { const bar = svg("rect"); bar.append(svg("title")); return bar; }, (bar, [kind, height, words, x, y]) => {
    Object.entries({class: kind, x: x + .06, y, width: .88, height}).forEach(pair => bar.setAttribute(...pair));
    text(bar.firstChild, words); });
  return top; }

function showStatus(s) {
  fit($("tiles"), states, index, () => make("button", "", make("b"), make("span")), (tile, state) => {
    texts(tile, number(s.jobs[state]), state); tile.className = state;
    tile.setAttribute("aria-pressed", at("state") === state);
    tile.onclick = () => go({state: at("state") === state ? "" : state, before: ""}); });
  const busy = s.workers.filter(worker => worker.job !== null);
  text($("crew"), s.workers.length ? `Workers: ${busy.length} busy, ${s.workers.length - busy.length} idle`
    : "No pool is running; to start one: queuectl.py worker start");
  fit($("workers"), busy, worker => worker.pid, () => make("li", "", make("a", "mono"), make("span", "dim")), (li, worker) => {
    link(li.firstChild, worker.job, {job: worker.job, run: ""});
    text(li.lastChild, ` for ${span(since(worker.since))}, worker ${worker.pid}`); });
  text($("next"), [s.blocked && number(s.blocked) + " blocked by dead ones", s.oldest_waiting && "longest wait " + span(since(s.oldest_waiting)),
    s.next_due && "next due " + ago(s.next_due)].filter(Boolean).join(" · "));
  $("paused").hidden = !s.paused;
  document.title = `${s.jobs.processing} running, ${s.jobs.dead} dead – ` + $("where").textContent.split(/[\\/]/).pop(); }
function showStats(s) {
  const minute = (bar, i) => `${number(bar.completed)} completed, ${number(bar.failed)} failed, ${i === 59 ? "this minute" : 59 - i + " min ago"}`;
  const top = chart($("rate"), s.throughput.map((bar, i) => [["good", bar.completed, minute(bar, i)], ["bad", bar.failed, minute(bar, i)]]),
    `${s.completed} completed and ${s.failed} failed runs in the last hour`);
  chart($("times"), s.run_times.map(bin => [["good", bin.runs, number(bin.runs) + (bin.below ? " took less than " + span(bin.below) : " took longer")]]),
    "How many runs took how long");
  text($("top"), "top: " + number(top));
  text($("ran"), s.runs ? `${number(s.completed)} completed, ${number(s.failed)} failed; now ${s.per_second_now.toFixed(1)}/s` : "nothing ran in the last hour");
  text($("median"), s.runs ? `median ${span(s.run_time.median)}, 95 % within ${span(s.run_time.p95)}, longest ${span(s.run_time.longest)}` : "");
  fit($("errors"), s.common_errors, entry => entry.error, () => make("a"), (a, entry) =>
    link(a, `${number(entry.runs)} × ${entry.error}`, {q: entry.error, state: "", before: ""})); }
async function bulk(verb) { /* counted when it is asked: with a million jobs that takes a while */
  const query = chosen(), count = (await ask("/api/count?" + query))[verb];
  const which = [at("state") || (verb === "retry" ? "dead" : ""), count === 1 ? "job" : "jobs", at("q") && `with “${at("q")}”`];
  if (!count) alert("There is none to " + verb + ".");
  else await post(`/api/${verb}?` + query, `${verb[0].toUpperCase() + verb.slice(1)} ${number(count)} ${which.filter(Boolean).join(" ")}?`); }
function showJobs(jobs, counts) {
  const page = jobs.slice(0, SIZE), narrowed = at("q") || at("state");
  fit($("rows"), page, job => job.id, () => make("tr", "", make("td", "mono", make("a")), ...["state", "wide", "", "wide"].map(kind => make("td", kind)),
    make("td", "mono wide", make("span", "state"), make("span"))), (tr, job) => {
    const [id, state, tries, time, length, command] = tr.children, error = job.state === "completed" ? "" : job.error;
    link(id.firstChild, job.id, {job: job.id, run: ""}); text(state, job.state);
    text(tries, job.attempts + "/" + Math.max(1, job.max_retries)); text(time, when(job)); text(length, took(job));
    texts(command, error ? error + "  " : "", job.command.replaceAll("\n", " ⏎ "));
    tr.className = job.state; tr.title = job.command; current(tr, at("job") === job.id);
    tr.onclick = event => { if (event.target.tagName !== "A") go({job: job.id, run: ""}); }; });
  const all = states.filter(state => !at("state") || at("state") === state).reduce((sum, state) => sum + counts[state], 0);
  text($("count"), (at("q") ? "" : number(all) + ", ") + "newest first");
  $("none").hidden = page.length > 0; text($("none"), narrowed || at("before") ? "No job is like that." : "No jobs yet: queuectl.py enqueue -- echo hello");
  $("retry").hidden = !counts.dead || !["", "dead"].includes(at("state")); text($("retry"), narrowed ? "Retry these…" : "Retry dead…");
  $("delete").hidden = !narrowed || !page.length || at("state") === "processing";
  $("pages").hidden = jobs.length <= SIZE && !at("before"); $("newest").disabled = !at("before"); $("older").disabled = jobs.length <= SIZE;
  $("older").onclick = () => { go({before: page[SIZE - 1].id}); $("t3").scrollIntoView(); }; }
function showJob(job) {
  const {id, state, command, attempts, max_retries, run_at, created_at, updated_at, started_at, finished_at, seconds, exit_code,
    error, waiting, after, env, runs, ...others} = job, ended = state === "completed" || state === "dead", acts = [
    ["Retry", ended, () => post(path(id, "/retry"))], ["Cancel", !ended, () => post(path(id, "/cancel"), `Cancel ${id}?`)],
    ["Delete", state !== "processing", () => post(path(id, "/delete"), `Delete ${id} and its runs?`)],
    ["Copy", true, () => navigator.clipboard.writeText(command)], ["Close", true, () => go({job: "", run: ""})]];
  fit($("acts"), acts.filter(act => act[1]), act => act[0], () => make("button"), (button, [name, , act]) => { text(button, name); button.onclick = act; });
  const facts = {waiting, error: state === "completed" ? "" : error, tries: `${attempts} of ${Math.max(1, max_retries)}`,
    due: since(run_at) < 0 && !ended ? moment(run_at) : "", enqueued: moment(created_at), after: after.join(", "), ...others,
    env: Object.entries(env).map(pair => pair.join("=")).join(" ")};
  fit($("facts"), Object.entries(facts).filter(fact => fact[1]), fact => fact[0], () => make("div", "", make("dt"), make("dd")), (div, fact) => texts(div, ...fact));
  const run = +at("run") || (runs.length && runs[runs.length - 1].run);
  fit($("runs"), runs.slice().reverse(), entry => entry.run, () => make("tr", "", make("td", "", make("a")), make("td"), make("td"), make("td")), (tr, entry) => {
    const [name, time, length, end] = tr.children;
    link(name.firstChild, "run " + entry.run, {run: entry.run}); text(time, ago(entry.started_at)); text(length, took(entry) || "running");
    text(end, entry.finished_at ? entry.error || "exit 0" : ""); tr.title = moment(entry.started_at); current(tr, entry.run === run);
    tr.onclick = () => go({run: entry.run}); });
  text($("name"), id); text($("state"), state); $("state").className = "state " + state; text($("command"), command);
  return run; }

/* Output is appended as it comes. Colours are shown; of lines that were written over by \r the last. */
function print(box, output) {
  const end = box.scrollTop + box.clientHeight >= box.scrollHeight - 5;
  const plain = /\x1b(?:\[[0-?]*[ -\/]*[@-ln-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[^[\]])/g;
  const lines = (printed.line + output).replace(plain, "").replace(/\r+\n/g, "\n").split("\n").map(line => line.replace(/[^]*\r(?=.)/, ""));
  if (printed.node) printed.node.remove();
  const colour = line => line.split(/\x1b\[([\d;]*)m/).map((part, i) => {
    if (i % 2 === 0) return part && make("span", printed.kind, part);
    for (const n of part.split(";")) printed.kind = +n === 0 ? "" : /^[39][0-6]$/.test(n) ? "a" + n[1] : printed.kind;
    return ""; });
  printed.line = lines.pop();
  if (lines.length) box.append(...colour(lines.join("\n") + "\n"));
  const kind = printed.kind; printed.node = make("span", "", ...colour(printed.line)); printed.kind = kind;
  box.append(printed.node);
  if (end) box.scrollTop = box.scrollHeight; }
async function showOpen(id) {
  const job = await ask(path(id)), first = $("job").hidden;
  if (at("job") !== id) return;
  const run = showJob(job), key = `${id} ${run}`, box = $("output");
  $("job").hidden = false; if (first) $("name").focus({preventScroll: true});
  if (printed.key !== key) { box.replaceChildren(); printed = {key, from: 0, line: "", kind: "", over: false}; }
  if (!run) return text(box, "It has not run yet.");
  if (printed.over) return;
  const running = job.state === "processing" && run === job.runs[job.runs.length - 1].run, mine = printed;
  const {output, start, end} = await ask(path(id, "/output", `&run=${run}&from=${mine.from}`));
  if (mine !== printed || at("job") !== id) return;
  if (start > mine.from) print(box, `[${number(start - mine.from)} bytes of output were dropped here]\n`);
  if (output) print(box, output);
  mine.from = end; mine.over = !running;
  if (mine.over && !box.textContent) text(box, "It has printed nothing."); }
async function refresh() {
  clearTimeout(timer); view = new URLSearchParams(location.hash.slice(1));
  const mine = ++turn, id = at("job");
  if (document.activeElement !== $("q")) $("q").value = at("q");
  if (!id && !$("job").hidden) { $("job").hidden = true; printed = {};
    const row = $("rows").querySelector("[aria-current] a"); if (row) row.focus({preventScroll: true}); }
  try {
    const [status, jobs] = await Promise.all([ask("/api/status"), ask("/api/jobs?" + chosen({before: at("before"), limit: SIZE + 1}))]);
    if (mine !== turn) return;
    showStatus(status); showJobs(jobs, status.jobs);
    if (id) await showOpen(id).catch(error => { if (error.status !== 404) throw error; go({job: "", run: ""}); });
    if (mine === turn && Date.now() > statsAt) { statsAt = Date.now() + 10000; showStats(await ask("/api/stats")); }
    $("lost").hidden = true;
  } catch (error) { $("lost").hidden = false; text($("lost"), error.message + ". What is shown may be old."); }
  if (mine === turn) timer = setTimeout(refresh, document.hidden ? 15000 : 2000); }
$("q").oninput = () => {
  history.replaceState(null, "", address({q: $("q").value, before: ""})); clearTimeout(timer); timer = setTimeout(refresh, 200); };
for (const verb of ["retry", "delete"]) $(verb).onclick = () => bulk(verb).catch(error => alert(error.message));
$("newest").onclick = () => go({before: ""});
window.onhashchange = document.onvisibilitychange = refresh;
document.onkeydown = event => {
  if (event.key === "Escape" && event.target !== $("q") && at("job")) go({job: "", run: ""});
  if (event.key === "/" && event.target === document.body) { event.preventDefault(); $("q").focus(); } };
refresh();
</script></body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
