#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""queuectl: a durable background job queue for shell commands, in one file.

    python queuectl.py enqueue '{"id": "job1", "command": "echo Hello"}'
    python queuectl.py worker start --count 2
    python queuectl.py status

One SQLite file is one queue: `queuectl.db` in the current directory, or the file that
`--db` or QUEUECTL_DB names. Beside it lie `queuectl.log` and, while pools run, a PID
file for each pool, and `queuectl.runs/` with a file for each worker and running job.
Beside another database NAME they are called `NAME.queuectl.log`, and so on.

The life of a job. Each arrow is a method of `Queue`: `enqueue`, `claim`, `complete`,
`fail`, `promote`, `release`, `retry`. It changes a job only if the job is in the state
where the arrow begins:

                     claim              exit 0
    enqueue ─▶ PENDING ─────▶ PROCESSING ─────▶ COMPLETED
                ▲ ▲ ▲            │ │ │
                │ │ └─ worker    │ │ └─ failed, attempts = max_retries ─▶ DEAD
                │ │    died,   ◀─┘ │                                      │
                │ │    stop --now  │                                      │
                │ └─ due ─ FAILED ◀┘ failed                               │
                └────────────────────────── dlq retry ────────────────────┘

Not drawn: `cancel` makes a waiting job DEAD at once. It asks the worker of a running
job to end it; that job becomes DEAD unless it completes first. `retry` and `enqueue
--unique` make a COMPLETED job PENDING as well. A job also becomes DEAD once five
workers have died while they ran it, or if a job that it comes after was deleted.

What is promised, and how it is kept:

  - An acknowledged job is on the disk: `enqueue` commits with a synced write.
  - Two runs of a job never overlap. Each run holds a file, its lease: the worker and
    the command have it open and locked (flock). The kernel frees the lock when the last
    process that inherited the file is gone, even after SIGKILL. There is no heartbeat,
    and a lease never expires.
  - No running job is lost. Every pool looks for lost jobs at its start and every two
    seconds. A job in PROCESSING whose lease is free is put back. If the lease is held
    and the worker is gone, the run is an orphan: its processes are ended first.
  - A job runs at least once. If the result of a run can't be recorded, the job runs
    again: commands should be idempotent.
  - When queuectl ends a run, it ends every process of that run.

The map. A section uses only those above it.

    constants    states, limits, intervals; the error that users see
    policy       settings and fields of jobs, and the checks of their values; JSON
    locks        locked files, waking, requests; what differs between systems
    database     the file, its connection, transactions, the schema
    queue        the jobs: a method for each verb, with its SQL
    statistics   what `status`, `stats` and the page tell of all jobs
    runs         one command: its lease, its output, its end
    output       text for people; why a job waits; the verdict on a queue
    pool         a worker; the reaper; the supervisor; the log
    commands     a function for each command, with its name and arguments above it
    dashboard    the documents of the commands by HTTP, and the page
    main         the parser and the exit code
"""
import os
import sys

if sys.version_info < (3, 8):
    sys.exit("queuectl: this is Python %d.%d; take 3.8 or newer" % sys.version_info[:2])

# A logging.py or a token.py that lies beside this file is not the library's.
if __name__ == "__main__" and __spec__ is None and sys.path and (
        os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__))):
    del sys.path[0]

import _thread
import bisect
import collections
import contextlib
import errno
import functools
import itertools
import json
import operator
import re
import signal
import sqlite3
import stat
import time
import weakref
from datetime import datetime, timedelta

# ======================================================================================
# Constants: states, limits, intervals; the error that users see
# ======================================================================================

__version__ = "1.2.0"

WINDOWS = os.name == "nt"


def program_typed():
    """Return the words by which hints name this program: those that its user types."""
    typed = "".join(sys.argv[:1])
    if os.path.basename(typed) == "queuectl":  # the command that `install` makes
        return "queuectl"
    if re.fullmatch(r"([\w.-]*/)*queuectl\.py", typed):
        python = re.sub(r"(?i)\.exe$", "", os.path.basename(sys.executable))
        return "%s %s" % (python or "python3", typed)
    return "queuectl.py"


# A pool that is detached takes the words over.
PROGRAM = os.environ.get("QUEUECTL_DETACHED") or program_typed()

# The states of a job, in the order of `status`: the phase of its life; its colour on a
# terminal, a code of ANSI; whether its dependents may then go on. A new state needs a
# row here and one of JOB_KINDS, which has its texts, a verb of `Queue` that RUN_KINDS
# names, and a new version of the schema, with a table `jobs` made anew: SQLite can't
# change its CHECK. `gate_rule` decides whether a job in it may be claimed.
State = collections.namedtuple("State", "phase colour is_success", defaults=(False,))
STATES = {
    "pending": State("waiting", None),
    "processing": State("running", 36),
    "completed": State("finished", 32, is_success=True),
    "failed": State("waiting", 33),
    "dead": State("finished", 31),
}
WAITING = tuple(name for name, state in STATES.items() if state.phase == "waiting")
FINISHED = tuple(name for name, state in STATES.items() if state.phase == "finished")
SUCCESSFUL = tuple(name for name, state in STATES.items() if state.is_success)
BLOCKING = tuple(name for name in FINISHED if name not in SUCCESSFUL)  # of dependents
# {command: the states in which it takes a job}.
TAKES = {
    "cancel": (*WAITING, "processing"),
    "edit": (*WAITING, "dead"),
    "retry": FINISHED,
    "delete": (*WAITING, *FINISHED),
    "dlq retry": ("dead",),
    "dlq clear": ("dead",),
}
SCHEMA_VERSION = 3
APPLICATION_ID = 0x71637431  # "qct1", in the header of the database

MAX_INTEGER = 2**63 - 1
MAX_DURATION = 10.0**9  # seconds, some 30 years
EPOCH = datetime(1970, 1, 1)
MAX_TIME = 253402300799.0  # 9999-12-31T23:59:59Z, the last time that ISO 8601 can name
# The longest line that the system can start: in bytes on Linux; for cmd.exe 8191
# characters, in which its own path and option stand as well (Microsoft, KB 830473).
MAX_COMMAND, LENGTH_UNIT = (8091, "characters") if WINDOWS else (131071, "bytes")

# How much.
MAX_WORKERS = 256
MAX_DEATHS = 5  # worker deaths after which their job is taken for the cause
MAX_HOOKS = 8  # `on_dead` commands that a pool runs at a time
MAX_HOOK_OUTPUT = 2**20  # bytes of what such a command prints; then they are dropped
MAX_ERRORS = 100  # most common errors of dead jobs that are listed
SHOWN_ERRORS = 4  # most common errors of dead jobs in `status`
MAX_NAMED = 20  # jobs of which `wait` says what each waits for
MAX_WATCHED = 2000  # jobs of which `wait` counts the states; of more, the whole queue
COUNT_LIMIT = 10000  # rows that are counted where a million would take too long
BATCH_SIZE = 500  # rows of one read or write; more would hold up other processes
TAIL_SIZE = 4000  # bytes at the end of an output of which people see the last lines
MAX_TAILED = 200000  # bytes of an output of which the page shows the last line
SPACE_NEEDED = 2**16  # bytes on the disk that a transaction may take
SELFTEST_SPACE = 2**23  # the same of `selftest`
LOG_LIMIT = 10 * 2**20  # bytes of queuectl.log before it becomes queuectl.log.1

# How often: seconds between two looks or tries.
RECOVERY_INTERVAL = 2.0  # of a pool for lost jobs
PROGRESS_INTERVAL = 0.5  # of `wait` and a drain that show their progress
IDLE_INTERVAL = 1.0  # of an idle worker, which tries to claim unasked
TROUBLE_INTERVAL = 1.0  # of a worker that tries again after an error
RESTART_INTERVAL = 1.0  # of the starts of workers that keep dying
POLL_INTERVAL = 0.2  # of a worker and a pool for a request
WAIT_INTERVAL = 0.1  # of `wait` and `logs -f`
STEP_INTERVAL = 0.05  # whether processes have ended
FILE_INTERVAL = 0.02  # with a file that others probe
SIGNAL_INTERVAL = 0.2  # within it two signals count as one

# How long, in seconds.
LOCK_TIMEOUT = 30.0  # that a command waits for another program's lock
POOL_LOCK_TIMEOUT = 1.0  # the same for a pool and the dashboard, which try again
COMPLETION_TIMEOUT = 0.2  # that TAB waits for another program's lock
WORK_SLICE = 0.05  # that one transaction of many may take
PRUNE_SLICE = 0.2  # that a pool deletes old jobs at a time
TERM_GRACE = 3.0  # from SIGTERM to SIGKILL
KILL_GRACE = 5.0  # after SIGKILL, until a process counts as unkillable
REST_TIMEOUT = 0.5  # that output is read after the exit of a command
BLAME_DELAY = 0.5  # within it a death and a stop count as one event
HOOK_TIMEOUT = 300.0  # after which an `on_dead` command is ended
HOOKS_AT_END = 30.0  # that a pool takes at its end to announce dead jobs
REPORT_DELAY = 10.0  # after which `wait` reports what it waits for
STOP_REPORT_DELAY = 1.0  # after which `worker stop` does
SELFTEST_TIME = 28.0  # that `selftest` takes before it clears up
CHECK_TIME = 10.0  # of them, for one promise

# Exit codes of a worker that left because its queue can't be used now, or for good.
EXIT_UNUSABLE, EXIT_DAMAGED = 2, 3


def batches(items):
    """Yield the items in lists of BATCH_SIZE."""
    items = iter(items)
    while True:
        batch = list(itertools.islice(items, BATCH_SIZE))
        if not batch:
            return
        yield batch


def printable(text):
    """Return TEXT on one line, with all control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class QueueError(Exception):
    """An error that the user can fix. Its message is one line.

    VALUES are formatted into the message and made printable. CODE is the exit code of
    the command: 1 for refused or failed, 2 for wrong usage. JOB is the row of a job
    that stands in the way, mostly by its state.
    """

    def __init__(self, message, *values, code=1, job=None):
        if values:
            message %= tuple(
                value if isinstance(value, (int, float)) else printable(str(value))
                for value in values)
        super().__init__(message)
        self.code, self.job = code, job


# ======================================================================================
# Policy: settings and fields of jobs, and the checks of their values; JSON
# ======================================================================================

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
NUMBER = r"(\d+\.?\d*|\.\d+)"
NUMBER_AND_UNIT = NUMBER + "([smhd])"


def backoff(base, attempts, longest):
    """Return the seconds to wait after that many failed attempts.

    They are base ** attempts, but no more than LONGEST.
    """
    try:
        return min(float(base) ** attempts, longest)
    except OverflowError:
        return longest


def tries_allowed(max_retries):
    """Return how many attempts a job has: 0 and 1 both mean one run."""
    return max(1, max_retries)


def parse_duration(value):
    """Return seconds from a number, or from text like 90, 90s, 1h30m, 7d."""
    if type(value) in (int, float):  # no bool
        return float(value)
    if not isinstance(value, str):
        raise ValueError
    text = value.strip().lower()
    if re.fullmatch("(%s)+" % NUMBER_AND_UNIT, text, re.ASCII):
        parts = re.findall(NUMBER_AND_UNIT, text)
        return sum(float(count) * UNITS[unit] for count, unit in parts)
    if not re.fullmatch(NUMBER, text, re.ASCII):
        raise ValueError
    return float(text)


def parse_size(value):
    """Return bytes from a whole number, or from text like 500, 64K, 1M."""
    if type(value) is int:
        return value
    match = re.fullmatch(r"\s*(\d+)([KM]?)\s*", str(value).upper(), re.ASCII)
    if not match:
        raise ValueError
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]]


def parse_time(value):
    """Return epoch seconds from a number or ISO 8601 text.

    Text without a zone is local time. A number of 9 or 10 digits is epoch seconds, of
    1973 to 2286. Any other number, like 20260131, is meant as a date: refused.
    """
    if type(value) in (int, float) and 10**8 <= value < 10**10:  # no bool
        return float(value)
    if not isinstance(value, str):
        raise ValueError
    text = value.strip().upper().replace("Z", "+00:00")
    if text == "NOW":
        return time.time()
    if re.fullmatch(r"\d{9,10}(\.\d*)?", text, re.ASCII):
        return float(text)
    if text.isdecimal():
        raise ValueError
    return epoch_seconds(datetime.fromisoformat(text))


def epoch_seconds(moment):
    """Return the epoch seconds of a datetime; one without a zone is local time.

    Windows knows local times from 1971 to 3000 only. The calendar is the same every
    400 years.
    """
    try:
        return moment.timestamp()
    except OSError:
        cycles = moment.year // 400 - 5
        twin = moment.replace(year=moment.year - 400 * cycles)
        return twin.timestamp() + cycles * 146097 * 86400.0


def parse_number(text):
    """Convert text to int or float; return the text itself if it is no number."""
    if "_" in text:  # Python would take 1_000
        return text
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


def parse_variable(text):
    """Return name and value of a variable from NAME=VALUE, or `none` as it is."""
    if text == "none":
        return text
    name, sign, value = text.partition("=")
    if not sign:
        raise QueueError("--env: %s is not NAME=VALUE", json.dumps(text), code=2)
    return name, value


UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def is_storable(text):
    """Tell whether a system call can take TEXT: no NUL, no lone surrogate."""
    return not UNSTORABLE.search(text)


# -- checks of values ------------------------------------------------------------------

# A check takes a value from outside and returns the value to store. It refuses a value
# by a ValueError whose text is the rule; `checked` makes a sentence of that.


def whole_number(low, high):
    """Return a check for whole numbers from LOW to HIGH."""
    def check(value):
        is_whole = type(value) is int
        if is_whole and low <= value <= high:
            return value
        if high < MAX_INTEGER or (is_whole and value > high):
            raise ValueError("a whole number from %d to %d" % (low, high))
        if low >= 0:
            raise ValueError("a whole number of at least %d" % low)
        raise ValueError("a whole number")

    return check


def in_range(parse, low, high, rule, range_rule=None):
    """Return a check for values that PARSE turns into a number from LOW to HIGH."""
    def check(value):
        try:
            result = parse(value)
        except (ValueError, OverflowError, OSError):  # the last two: far-off times
            raise ValueError(rule) from None
        if not low <= result <= high:  # NaN is in no range
            raise ValueError(range_rule or rule)
        return result

    return check


def duration_from(low):
    """Return a check for durations of at least LOW seconds."""
    return in_range(
        parse_duration, low, MAX_DURATION, "a duration like 90s, 10m, 1h30m, 7d",
        "a duration from %g to %d seconds" % (low, MAX_DURATION))


check_time = in_range(
    parse_time, 0, MAX_TIME,
    "a time: ISO 8601 like 2026-01-31T18:00 (local) or 2026-01-31T18:00Z, epoch"
    " seconds, or now")


def check_id(value):
    """Check the id of a job, or the name of a lock. Both are printed as they are."""
    if not isinstance(value, str) or not 1 <= len(value) <= 255 or (
            value.isspace() or not value.isprintable()):
        raise ValueError("text of 1 to 255 printable characters")
    return value


def check_ids(value):
    """Check a list of ids, or a single one."""
    return [check_id(id) for id in (value if isinstance(value, list) else [value])]


def check_command(value):
    """Check a line for the shell."""
    if not isinstance(value, str) or not value.strip() or not is_storable(value):
        raise ValueError("a shell command: text in UTF-8 without NUL")
    if system_length(value) > MAX_COMMAND:
        raise ValueError("at most %d %s, which is what the system can start"
                         % (MAX_COMMAND, LENGTH_UNIT))
    if WINDOWS and re.search("[\r\n]", value.rstrip("\r\n")):
        raise ValueError("a single line: cmd.exe would run the first one, and report"
                         " success; join commands by &&, or write a script")
    return value


def system_length(text):
    """Return the length of a text, in the unit in which the system limits it."""
    return len(text.encode("utf-16-le")) // 2 if WINDOWS else len(text.encode())


def current_directory():
    """Return the current directory by the name that the shell knows it by.

    A symlink like a deployed `current` leads to another directory tomorrow.
    """
    name = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(name) and os.path.samefile(name, os.getcwd()):
            return name
    return os.getcwd()


def check_directory(value):
    """Check the path of a directory; return it as an absolute path."""
    if not isinstance(value, str) or not value or not is_storable(value):
        raise ValueError("the path of a directory, in UTF-8")
    # Not by `normpath`, which leaves C:.. relative to a drive on Windows.
    path = os.path.abspath(
        value if os.path.isabs(value) else os.path.join(current_directory(), value))
    if not os.path.isdir(path):
        raise ValueError("a directory that exists")
    if is_network_path(path):
        raise ValueError("a directory on a drive: cmd.exe would run the command in"
                         " C:\\Windows; give the share a letter by `net use`")
    return path


def is_network_path(path):
    """Tell whether cmd.exe can't run in a directory, like \\\\server\\share."""
    return WINDOWS and path.startswith("\\\\")


# Programs that join the words of a command line, or take only one of them. Behind these
# something else would run, or nothing. The job would still be completed.
JOINING = {
    "sh", "bash", "dash", "zsh", "ksh", "fish", "cmd", "powershell", "pwsh", "ssh",
    "rsh", "su", "sg", "runuser", "script", "parallel", "sem", "watch"}
BATCH_ENDINGS = ".cmd", ".bat"
PROGRAM_ENDINGS = (".exe", ".com", *BATCH_ENDINGS)  # what Windows itself can start


def check_launcher(value):
    """Check a launcher: the beginning of a command line, such as `srun -Q -n1`."""
    import shlex
    import shutil

    try:
        words = shlex.split(check_command(value))
        program = shutil.which(words[0])
        if not program:
            raise ValueError("no program " + printable(words[0]))
        if WINDOWS and not program.lower().endswith(PROGRAM_ENDINGS):  # like a .py
            raise ValueError(program + " is no program; name its interpreter before it")
        names = (re.sub(r"(?s).*[/\\]|\.exe$", "", word.lower()) for word in words)
        for name in JOINING.intersection(names):
            raise ValueError("%s joins the words after it, so that the command would"
                             " not run as it is; write a script" % name)
    except ValueError as error:
        raise ValueError("the beginning of a command: %s" % error) from None
    return value


def check_env(value):
    """Check environment variables, an object of texts; return JSON, None for `none`."""
    if value == "none":
        return None

    def fits(name, text):
        if not name or "=" in name or not isinstance(text, str):
            return False
        return is_storable(name + text) and system_length(name + text) < MAX_COMMAND

    if not isinstance(value, dict) or not all(itertools.starmap(fits, value.items())):
        raise ValueError("an object of texts, with names without = and no NUL, each of"
                         " less than %d %s" % (MAX_COMMAND, LENGTH_UNIT))
    return json.dumps(value)


def optional(check, word):
    """Return a check that also takes null, or the word, and returns None for both."""
    def check_or_none(value):
        try:
            return None if value in (None, word) else check(value)
        except ValueError as rule:
            raise ValueError("%s, or %s" % (rule, word)) from None

    return check_or_none


# -- settings, and the fields of a job -------------------------------------------------

# A setting. `unit` is that of its value: "seconds", "bytes" or None. `none` is the word
# that means no value, None where there is always one.
Setting = collections.namedtuple(
    "Setting", "check default meaning unit none", defaults=(None, None))


def optional_setting(check, meaning, unit=None, none="none"):
    return Setting(optional(check, none), None, meaning, unit, none)


SETTINGS = {
    "max_retries": Setting(
        whole_number(0, 10**6), 3, "failed attempts until a job is dead"),
    "backoff_base": Setting(
        in_range(parse_duration, 0, 10**6, "a number from 0 to 1000000"), 2,
        "the wait after n failures: base ** n seconds"),
    "backoff_max": Setting(duration_from(0), 86400, "longest such wait", "seconds"),
    "timeout": optional_setting(
        duration_from(0.001), "how long a run may take if its job has none", "seconds"),
    "output_limit": Setting(
        in_range(parse_size, 0, 2**26, "bytes from 0 to 64M, like 500, 64K, 1M"), 2**20,
        "bytes of a run's output that are kept", "bytes"),
    "launcher": optional_setting(
        check_launcher, "what runs are started through, like srun"),
    "keep": optional_setting(
        duration_from(0), "how long completed jobs are kept", "seconds", "forever"),
    "on_dead": optional_setting(
        check_command, "command for each job that fails for good"),
}

# A field that is given with a job. Its option of `enqueue` and `edit` is `--name
# METAVAR`. The settings max_retries and timeout are the defaults of these fields.
Field = collections.namedtuple("Field", [
    "check",
    "metavar",
    "help",
    "otherwise",  # what a new job has without it, in words
    "parse",  # converts the text of the option to what `check` expects
    "repeats",  # all values of the option are kept
    "default",
    "can_be_none"],  # `edit` can take the value away, and its help says so
    defaults=("none", str, False, None, False))
FIELDS = {
    "id": Field(check_id, "ID", "id of the job", "a short random one"),
    "command": Field(
        check_command, "LINE", "the same as -- LINE", "the words after --"),
    "max_retries": Field(
        SETTINGS["max_retries"].check, "N",
        "failed attempts until the job is dead", "the setting", parse_number),
    "priority": Field(
        whole_number(-MAX_INTEGER - 1, MAX_INTEGER), "N", "higher ones first", "0",
        parse_number, default=0),
    "run_at": Field(check_time, "TIME", "ISO 8601, epoch seconds, or now", "now"),
    "delay": Field(
        duration_from(0), "T", "start after this time, like 90s, 1h30m, 7d"),
    "timeout": Field(
        SETTINGS["timeout"].check, "T", "end a run that takes longer, or none",
        "the setting"),
    "cwd": Field(check_directory, "DIR", "where to run it", "this directory"),
    "env": Field(
        check_env, "NAME=VALUE", "an environment variable; repeatable",
        parse=parse_variable, repeats=True, can_be_none=True),
    "launcher": Field(  # `none` is stored, since it overrides the setting
        lambda value: value if value == "none" else check_launcher(value), "PREFIX",
        "start the command through this, like srun, or none", "the setting"),
    "after": Field(
        lambda value: [] if value == "none" else check_ids(value), "ID",
        "start only when job ID is completed; repeatable", repeats=True,
        can_be_none=True),
    "lock": Field(
        optional(check_id, "none"), "NAME",
        "run at most one job with this lock at a time", repeats=True,
        can_be_none=True),
}
# The fields that are columns of `jobs`: `delay` becomes a `run_at`, `after` rows of
# `dependencies`.
COLUMNS = [name for name in FIELDS if name not in ("delay", "after")]

# The keys of a job in JSON, in this order.
PUBLIC = (
    "id", "command", "state", "attempts",
    *(name for name in COLUMNS if name not in ("id", "command")), "after", "waits_for",
    "created_at", "updated_at", "exit_code", "error", "started_at", "finished_at",
    "seconds")
# Columns of a job that JSON omits.
INTERNAL = ("seq", "run", "gate", "waits", "cancelled")
# The keys that `enqueue` accepts. Keys that are not fields are ignored, so that `list
# --json` and `show --json` can be piped into `enqueue -` of another queue.
KNOWN_KEYS = (*PUBLIC, "delay", "waiting", "runs")
TIMES = ("run_at", "created_at", "updated_at", "started_at", "finished_at")


def iso(moment):
    """Return epoch seconds as ISO 8601 text in UTC, None as None."""
    return None if moment is None else iso_second(int(moment))


@functools.lru_cache(BATCH_SIZE)  # many jobs of a list have the same times
def iso_second(second):
    # Not by time.gmtime, which ends with the year 3000 on Windows.
    return (EPOCH + timedelta(seconds=second)).isoformat() + "Z"


def with_iso_times(row, *names):
    """Return a row as a dict, with the times of these names as text."""
    return dict(row, **{name: iso(row[name]) for name in names})


def public_job(job):
    """Return a job as JSON shows it."""
    document = dict(zip(job.keys(), job))  # three times as quick as name by name
    for name in INTERNAL:
        del document[name]
    for name in TIMES:
        document[name] = iso(document[name])
    document["env"] = json.loads(document["env"]) if document["env"] else {}
    for name in ("after", "waits_for"):
        document[name] = document[name].split("\n") if document[name] else []
    return document


# -- documents of users, and what is wrong with them -----------------------------------


def nearest(word, words):
    """Return the one of WORDS that is spelt most like a word, or nothing."""
    from difflib import get_close_matches

    # `worker 2` is not near `worker stop`: the word of the group proves nothing.
    by_end = {known.split()[-1]: known for known in words}
    end = "".join(word.split()[-1:])
    near = [known for known in by_end if sorted(known) == sorted(end)]  # stauts
    near += get_close_matches(end, by_end, 1, 0.7)
    return "".join(map(by_end.get, near[:1]))


def unknown_word(subject, word, words, meant={}):
    """Return the QueueError for a word that is not in WORDS, with a suggestion.

    MEANT has what people type by the words of other tools: {word: what they mean}.
    """
    hint = meant.get(word.lower()) or nearest(word.lower(), words)
    hint = "did you mean %s?" % hint if hint else "there are: " + ", ".join(words)
    return QueueError("unknown %s; %s", subject, hint, code=2)


def checked(name, check, value):
    """Return what CHECK makes of VALUE; a refusal names field, value and rule."""
    try:
        return check(value)
    except ValueError as rule:
        if isinstance(value, str) and not value.strip():
            message = "the %s is empty; it has to be %s"
            raise QueueError(message, name.lstrip("-"), rule, code=2) from None
        shown = json.dumps(value, default=str)
        shown = shown[:27] + "..." if len(shown) > 30 else shown
        raise QueueError("%s: %s is not %s", name, shown, rule, code=2) from None


def checked_fields(document, defaults={}):
    """Return the fields of a job's JSON, ready to be stored, over those in DEFAULTS."""
    fields = {**defaults}
    for name, value in document.items():
        if name in FIELDS:
            if value is not None:
                fields[name] = checked(name, FIELDS[name].check, value)
        elif name not in KNOWN_KEYS:
            raise unknown_word("field " + json.dumps(name), name, FIELDS)
    if fields.get("delay") is not None and fields.get("run_at") is not None:
        raise QueueError("run_at and delay: give one of them, not both", code=2)
    return fields


def checked_job(document, defaults):
    """Return all fields of a job, ready to be stored; DEFAULTS has the missing ones."""
    if type(document) is not dict:
        raise QueueError('a job is a JSON object like {"command": "echo hi"}', code=2)
    job = checked_fields(document, defaults)
    if job["command"] is None:
        raise QueueError("command: missing; a job needs a shell command", code=2)
    if job["cwd"] is None:  # there is no default: this raises the reason
        job["cwd"] = checked("cwd", check_directory, current_directory())
    job["droppable"] = ()
    if job["after"] and document.get("waits_for") is not None:
        # From `list --json` of another queue: it has the jobs that were not completed.
        # A queue that takes those alone need not know what they came after.
        waits_for = checked("waits_for", check_ids, document["waits_for"])
        job["droppable"] = {*job["after"]} - {*waits_for}
    return job


def object_without_duplicates(pairs):
    """Return a JSON object; raise QueueError if it has a key twice.

    The first of the two values would be lost without a word.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise QueueError("%s: given twice in one object", twin, code=2)
    return result


# Made once: `enqueue` reads up to a million lines.
DECODER = json.JSONDecoder(object_pairs_hook=object_without_duplicates)


def parse_json(text):
    """Return the value of a JSON text or bytes."""
    try:
        return DECODER.decode(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        raise json_error(text.strip(), error) from None


def json_error(text, error):
    """Return the QueueError for a text that is not JSON; it suggests what was meant."""
    start = printable(text[:60])
    example = '{"id":"job1","command":"echo hi"}'
    if re.match(r"\{\s*\w+\s*:", text) and '"' not in text:
        message = "not JSON, the shell took the quotes: %s; write in sh '%s', in cmd" \
            " \"%s\", in PowerShell '%s'"
        escaped = example.replace('"', r'\"')
        return QueueError(message, start, example, escaped, escaped, code=2)
    if re.match(r'\{\s*\\"', text):
        message = "not JSON: the backslashes are for cmd; write here '%s'"
        return QueueError(message, example, code=2)
    if start[:1] not in ("{", "["):
        message = "not JSON: %s; a job is an object like %s; with --lines each line" \
            " is a command"
        return QueueError(message, start, example, code=2)
    hint = "; a job is an object on one line" if start == "{" else ""
    trouble = str(error)  # no UTF-8, or a number of thousands of digits
    if isinstance(error, json.JSONDecodeError):
        trouble = "%s at character %d" % (error.msg, error.pos + 1)
    return QueueError("not JSON: %s: %s%s", trouble, start, hint, code=2)


def number_text(value):
    """Return a number as text, without a fraction of zero."""
    return "%d" % value if value == int(value) else repr(value)


def setting_name(key):
    """Return the name of a setting, spelt with - or _ and in any case."""
    name = key.lower().replace("-", "_")
    if name not in SETTINGS:
        raise unknown_word("setting " + printable(key), name, SETTINGS, {
            "backoff": "backoff_base", "backoff_factor": "backoff_base",
            "retries": "max_retries", "max_attempts": "max_retries",
            "workers": "worker start --count", "max_workers": "worker start --count"})
    return name


# ======================================================================================
# Locks: locked files, waking, requests; what differs between systems
# ======================================================================================

# Every living pool, worker and run holds a file: it has the file open and locked. The
# lock belongs to the open file, so the kernel keeps it until the last process that
# inherited the descriptor is gone. A file that is not locked is a leftover, whatever it
# contains. A pool is named by the PID of its supervisor: parameters called `pool` hold
# that PID. On Windows a lock is not inherited: there a job object ends a run together
# with its worker.

if WINDOWS:
    import codecs
    import ctypes
    import msvcrt
    import subprocess
    from ctypes import wintypes

    import _winapi

    KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
    KERNEL.CreateJobObjectW.restype = wintypes.HANDLE
    KERNEL.CreateEventW.restype = KERNEL.OpenEventW.restype = wintypes.HANDLE
    MAX_WAITED_FOR = 62  # handles that Python can pass to one wait of the system
    EVENT_MODIFY_STATE = 0x2
    BINARY = os.O_BINARY
    LOCK_OFFSET = 2**40  # far behind the text, since locked bytes can't be read
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGBREAK)
    NO_DIRECTORY = (OSError,)  # it is gone, or is just being removed
else:
    import fcntl
    import select

    BINARY = 0
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    WAKE_SIGNAL = signal.SIGURG  # ignored by default: harmless if the PID is another's
    NO_DIRECTORY = (FileNotFoundError,)

# The requests to a pool: `stop` after its running jobs, stop `now` and end these jobs;
# a worker of the pool itself requests `over`: its drain has nothing left to do.
# {request: its offset in the pool's PID file}, the strongest first: of several
# requests the first in this order counts.
REQUESTS = {"now": 5, "over": 9, "stop": 0}
NO_REQUEST = b" " * 15 + b"\n"  # reserves the bytes: a full disk must not block a stop


def try_lock(fd, shared=False):
    """Lock an open file; return False if another process has it locked.

    A probe takes a SHARED lock, so that two probes do not take each other for the
    holder. Windows has no shared lock: a caller has to try again.
    """
    try:
        if WINDOWS:
            os.lseek(fd, LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(fd, fcntl.LOCK_NB | mode)
        return True
    except OSError as error:
        if WINDOWS or isinstance(error, (BlockingIOError, PermissionError)):
            return False
        message = "the file system has no locks (%s); take a local disk"
        raise QueueError(message, error.strerror) from None


@contextlib.contextmanager
def open_descriptor(path, flags=os.O_RDONLY):
    """Open a file within a `with`; give its descriptor."""
    fd = os.open(path, flags | BINARY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_tail(file):
    """Return the last bytes of an open file."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_SIZE))
    return file.read(TAIL_SIZE)


def may_be_same_file(path, status):
    """Tell whether PATH still names the file of this status.

    If that can't be known, for example without permission, it counts as the same.
    """
    try:
        return os.path.samestat(os.stat(path), status)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def wait_until(condition, seconds, pause=FILE_INTERVAL):
    """Call CONDITION until it returns true; return False if it does not in SECONDS."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
    return True


def lock_file(path):
    """Create a file, or take over a leftover, and lock it; return its descriptor.

    Between the opening and the locking another process may look at the file, or take
    it for a leftover and remove it: then this tries again. It gives up after a while,
    since another process may hold that name for good: two containers can give their
    pools the same PID.
    """
    for _ in range(50):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o600)
        except FileNotFoundError:  # the directory went with the last pool that stopped
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            continue
        status = os.fstat(fd)
        if try_lock(fd) and may_be_same_file(path, status):
            if status.st_size:
                os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)  # on Windows locking moved it to LOCK_OFFSET
            return fd
        os.close(fd)
        time.sleep(FILE_INTERVAL / 10)
    message = "%s is held by another process with that PID, maybe in another container"
    raise QueueError(message, path)


def is_locked(path):
    """Tell whether a living process holds a file."""
    try:
        with open_descriptor(path) as fd:
            return not try_lock(fd, shared=True)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True  # another user's: nobody can tell, and it may be held


def remove_leftover(path):
    """Remove a file unless a process holds it. Probes by others may delay that."""
    with contextlib.suppress(OSError):
        if WINDOWS:
            return os.remove(path)  # fails while any process has the file open
        with open_descriptor(path) as fd:
            # The lock is taken as a probe first, then made exclusive once other probes
            # are over.
            is_free = try_lock(fd, shared=True) and wait_until(
                lambda: try_lock(fd), 10 * FILE_INTERVAL)
            if is_free and may_be_same_file(path, os.fstat(fd)):
                os.remove(path)


def is_mount_point(path):
    """Tell whether a file is mounted by itself, as `docker run -v ./q.db:/q.db` does.

    It compares mount IDs (proc(5), fdinfo): `st_dev` does not differ. An O_PATH
    descriptor drops no locks when it is closed. Without /proc it can't be known.
    """
    def mount_of(path):
        with open_descriptor(path, os.O_PATH) as fd:
            with open("/proc/self/fdinfo/%d" % fd) as file:
                return re.search(r"mnt_id:\s*(\d+)", file.read())[1]

    try:
        return mount_of(path) != mount_of(os.path.dirname(path))
    except (AttributeError, OSError, TypeError):  # not Linux
        return False


def owner_hint(path):
    """Return what to do about another user's file; an empty text for one of ours."""
    with contextlib.suppress(OSError, AttributeError):
        if os.stat(path).st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return " belongs to another user: chown it, or run this as that user"
    return ""


def is_open_to_others(path):
    """Tell whether users who are neither owner nor group can reach and read a file."""
    paths = {path, os.path.realpath(path)}
    for path in list(paths):
        while path != os.path.dirname(path):
            path = os.path.dirname(path)
            paths.add(path)
    modes = [os.stat(path).st_mode for path in paths]
    return all(mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH)
               for mode in modes)


# -- the files beside a database -------------------------------------------------------


@functools.lru_cache()
def path_beside(path, ending):
    """Return the path of a file that lies beside a queue's database.

    Beside `queuectl.db` it is `queuectl.log`, beside `app.db` `app.db.queuectl.log`: an
    application's `app.log` must not be taken over, and `jobs` and `jobs.db` must not
    share anything.
    """
    directory, name = os.path.split(path)
    stem = "queuectl" if name == "queuectl.db" else name + ".queuectl"
    return os.path.join(directory, stem + ending)


def pool_file(path, pool):
    return path_beside(path, "-%d.pid" % pool)


def worker_file(path, pool, pid):
    return os.path.join(path_beside(path, ".runs"), "worker-%d-%d" % (pool, pid))


def pools_with_files(path):
    """Return the PIDs of the pools that have a file, alive or not."""
    return pids_in_names(path_beside(path, "-"))


def pids_in_names(prefix):
    """Return the PIDs in the names of the PID files whose paths have this prefix."""
    directory, stem = os.path.split(prefix)
    pids = [name[len(stem) : -4] for name in os.listdir(directory)
            if name.startswith(stem) and name.endswith(".pid")]
    return sorted(int(pid) for pid in pids if pid.isdecimal())


def older_pools(path):
    """Return the PIDs of the living pools, also those of queuectl 1.1.

    A file with such a name may be an application's. It is only probed.
    """
    prefix = (path[:-3] if path.endswith(".db") else path) + "-"
    pools = {pid for pid in pids_in_names(prefix)
             if is_locked("%s%d.pid" % (prefix, pid))}
    return sorted(pools.union(living_pools(path)))


def workers_with_files(path):
    """Return (pool, PID) of each worker that has a file, alive or not."""
    workers = []
    with contextlib.suppress(*NO_DIRECTORY):
        for name in os.listdir(path_beside(path, ".runs")):
            owner, *numbers = name.split("-")
            if owner == "worker" and len(numbers) == 2 and "".join(numbers).isdecimal():
                workers.append(tuple(map(int, numbers)))
    return sorted(workers)


def supervised_pools(path):
    """Return the pools whose supervisors live: others only finish their jobs."""
    return {pool for pool in pools_with_files(path) if is_locked(pool_file(path, pool))}


def living_pools(path):
    """Return the living pools of a queue, each with its workers: {pool: [pid]}.

    A pool with a killed supervisor is among them until its last worker has left.
    """
    pools = {pool: [] for pool in supervised_pools(path)}
    for pool, pid in workers_with_files(path):
        if is_locked(worker_file(path, pool, pid)):
            pools.setdefault(pool, []).append(pid)
    return pools


def is_disk_full(path, needed=SPACE_NEEDED):
    """Tell whether the disk of a file has fewer free bytes than NEEDED."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return False
    if WINDOWS:
        import shutil

        return shutil.disk_usage(folder).free < needed
    disk = os.statvfs(folder)  # `shutil` takes long to import
    is_short = disk.f_bavail * disk.f_frsize < needed
    if not is_short or os.geteuid() != 0:
        return is_short
    import tempfile

    try:  # root has a reserve, of which it can use a part: only a try tells
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(needed))
    except OSError:
        return True
    return False


def file_age(path):
    """Return for how many seconds a file has been as it is; 0 if it is gone."""
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return 0


def living_workers(path):
    """Return the PIDs of the living workers of all pools."""
    return set().union(*living_pools(path).values())


def remove_stale_pool_files(path):
    """Remove the PID files of pools of which no process lives.

    While a worker lives its pool's file stays, so that `worker stop` reaches the
    worker.
    """
    living = living_pools(path)
    for pool in pools_with_files(path):
        if pool not in living:
            remove_leftover(pool_file(path, pool))


def drop_lock_file(path, fd, own_file):
    """Release and remove a process's own file; the last process removes the directory.

    A look by another process can prevent both for a moment: then this tries again.
    """
    directory = path_beside(path, ".runs")
    with contextlib.suppress(OSError):  # on Windows, while it is open
        # Still held, or `worker stop` could return while the file is there.
        if may_be_same_file(own_file, os.fstat(fd)):
            os.remove(own_file)
    os.close(fd)

    def try_remove():
        remove_leftover(own_file)
        with contextlib.suppress(OSError):  # not empty: other processes use it
            os.rmdir(directory)
        with contextlib.suppress(*NO_DIRECTORY):
            if not os.listdir(directory):
                return False
        return not os.path.exists(own_file)

    wait_until(try_remove, 10 * FILE_INTERVAL)


# -- waking and requests ---------------------------------------------------------------

# Waking is a hint: nothing depends on it, since a PID may be out of date. Workers check
# the database every second anyway, supervisors every two.


def wake(pids):
    """Signal processes of pools to look for work now."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if WINDOWS:
                set_event(pid)
            else:
                os.kill(pid, WAKE_SIGNAL)


def event_name(pid):
    """Return the name of the event that wakes a process on Windows."""
    return "queuectl-%d" % pid


def set_event(pid):
    """Wake a process on Windows. One of another session or user has no such event."""
    event = KERNEL.OpenEventW(EVENT_MODIFY_STATE, False, event_name(pid))
    if event:
        KERNEL.SetEvent(wintypes.HANDLE(event))
        _winapi.CloseHandle(event)


def wake_workers(path):
    """Wake the workers of a queue: a job can be claimed."""
    with contextlib.suppress(OSError):
        wake(pid for _, pid in workers_with_files(path))


def request_stop(path, pool, request):
    """Write one of REQUESTS into a pool's file, and wake its processes."""
    with contextlib.suppress(FileNotFoundError):
        with open(pool_file(path, pool), "r+b") as file:
            file.seek(REQUESTS[request])
            file.write(request.encode())
    wake([pool])
    wake(pid for owner, pid in workers_with_files(path) if owner == pool)


def requested_stop(path, pool):
    """Return the request to a pool, one of REQUESTS, or None.

    A pool whose file was removed could never be asked to stop: it stops.
    """
    try:
        with open_descriptor(pool_file(path, pool)) as fd:
            text = os.read(fd, len(NO_REQUEST))
    except FileNotFoundError:
        return "stop"
    except OSError:  # for example too many open files; the next check tries again
        return None
    return next((request for request in REQUESTS if request.encode() in text), None)


def supervisor_is_gone(pool):
    """Tell a worker whether the supervisor that started it is gone."""
    if not WINDOWS:
        return os.getppid() != pool
    import multiprocessing

    return not multiprocessing.parent_process().is_alive()


class Waiter:
    """Waits for a signal, a child's end, something to read or a timeout.

    `wait` returns true after a signal or a child's end: the caller then looks for work.
    On Windows no signal reaches another process: there an event with a name wakes it.
    """

    def __init__(self):
        if WINDOWS:
            name = event_name(os.getpid())
            self.event = KERNEL.CreateEventW(None, False, False, name)
            self.children = set()  # the sentinels of those that lived at the last look
        else:
            self.reader, writer = os.pipe()
            os.set_blocking(self.reader, False)
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            for number in (WAKE_SIGNAL, signal.SIGCHLD):
                signal.signal(number, lambda *_: None)  # without a handler: no wake-up

    def wait(self, timeout, *readers):
        if WINDOWS:
            return self.wait_for_event(timeout)
        ready = select.select([self.reader, *readers], [], [], max(0.0, timeout))[0]
        return self.reader in ready and os.read(self.reader, 2**16)  # all it holds

    def wait_for_event(self, timeout):
        """Wait on Windows; return true after the event, a child's end or Ctrl-C.

        Ctrl-Break ends no wait, and its handler runs only after one: it has to set the
        event. So a long wait consists of short ones.
        """
        until = time.monotonic() + timeout
        while True:
            seconds = max(0.0, until - time.monotonic())
            if self.has_event(min(seconds, POLL_INTERVAL)):
                return True
            if seconds <= POLL_INTERVAL:
                return False

    def has_event(self, seconds):
        """Wait on Windows for some seconds; return true as `wait` does."""
        import multiprocessing

        children = {child.sentinel for child in multiprocessing.active_children()}
        earlier, self.children = self.children, children
        if earlier - children:  # `active_children` leaves out a child that has ended
            return True
        handles = [self.event, *children][:MAX_WAITED_FOR]
        try:
            return _winapi.WAIT_TIMEOUT != _winapi.WaitForMultipleObjects(
                handles, False, round(seconds * 1000))
        except InterruptedError:  # by Ctrl-C
            return True


# -- what else differs between systems -------------------------------------------------


def require_descriptors(count):
    """Raise the limit of open files so that a pool of COUNT workers fits, or refuse.

    A supervisor has one descriptor open for each worker, and workers inherit them.
    """
    if WINDOWS:
        return
    import resource

    spare = 64  # for files of the pool, of SQLite and of commands
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count + spare:
        return
    if hard != resource.RLIM_INFINITY and hard < count + spare:
        raise QueueError("--count %d needs %d open files, and this system allows %d: at"
                         " most --count %d", count, count + spare, hard,
                         max(1, hard - spare))
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + spare, hard))


def poll_events(stream, milliseconds=0):
    """Return the events of poll(2) that an output has now, or within some time.

    In a test it is no file: then it can be written to.
    """
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return select.POLLOUT
    return sum(events for _, events in poll.poll(milliseconds))


def is_reader_gone(stream):
    """Tell whether nobody can read any more what is written to an output."""
    if WINDOWS:
        return False
    return bool(poll_events(stream) & (select.POLLERR | select.POLLHUP))


def is_console(handle):
    """Tell whether a handle of Windows is a console; for `isatty` NUL is one, too."""
    mode = ctypes.byref(wintypes.DWORD())
    return bool(KERNEL.GetConsoleMode(wintypes.HANDLE(handle), mode))


def takes_text(stream):
    """Tell whether an output takes text alone: a console of Windows, or that of IDLE.

    Others take bytes as well.
    """
    if not hasattr(stream, "buffer"):
        return True
    with contextlib.suppress(OSError, ValueError):  # in a test it is no file
        return WINDOWS and is_console(msvcrt.get_osfhandle(stream.fileno()))
    return False


def write_or_drop(stream, line):
    """Write a line to an output; drop it if that would block.

    A reader that has stopped reading must hold up neither a job nor a stop. (O_NONBLOCK
    would hold for all processes on a terminal.) A terminal also can't be written to in
    the moment in which another process of the pool writes to it: that is waited out.
    """
    if WINDOWS:
        write_by_thread(stream, line)
    elif poll_events(stream, milliseconds=2) & select.POLLOUT:
        write_line(stream, line)


def write_by_thread(stream, line):
    """Write a line, on Windows; drop it while an earlier one waits for a reader.

    Windows can't tell whether an output would block.
    """
    import threading

    name = "writes to a reader"
    if name not in {thread.name for thread in threading.enumerate()}:
        writer = threading.Thread(
            target=write_line, args=(stream, line), name=name, daemon=True)
        writer.start()
        writer.join(FILE_INTERVAL)


def write_line(stream, line):
    """Write a line to an output; do nothing if its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        if takes_text(stream):
            print(line, end="", file=stream, flush=True)
        else:  # without the lock of its buffer: the end of this process takes that
            data = line.replace("\n", os.linesep).encode(
                stream.encoding, "backslashreplace")
            getattr(stream.buffer, "raw", stream.buffer).write(data)


def decode_line(error):
    """Decode the rest of a line that is not UTF-8, on Windows: a handler for codecs.

    A command prints in the code page of the console (`oem`) or of Windows (`mbcs`).
    That one is taken which gives more letters.
    """
    end = error.object.find(b"\n", error.start)
    line = error.object[error.start : end if end >= 0 else None]
    texts = [line.decode(page, "replace") for page in ("oem", "mbcs")]
    text = max(texts, key=lambda text: sum(map(str.isalpha, text)))
    return text, error.start + len(line)


# How output that is not UTF-8 becomes text: a name of an error handler.
FOREIGN_BYTES = "backslashreplace"
if WINDOWS:
    FOREIGN_BYTES = "queuectl"
    codecs.register_error(FOREIGN_BYTES, decode_line)


def catch_signals(handler):
    """Let HANDLER take the stop signals; SIGHUP stays ignored under nohup.

    Return the previous handlers: {signal: handler}.
    """
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if not WINDOWS:  # a parent that blocks them would make a pool that can't be stopped
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        is_nohup = not WINDOWS and number == signal.SIGHUP and (
            previous[number] is signal.SIG_IGN)
        if not is_nohup:
            signal.signal(number, handler)
    return previous


def start_outside_job(start):
    """Start a process on Windows that outlives its terminal, if the system allows it.

    The job object of OpenSSH's server or of a runner of tests ends with the terminal.
    That of a run lets nothing out: a timeout ends all that the command has started.
    """
    # With no console at all, each worker would open a visible one.
    flags = subprocess.CREATE_NO_WINDOW
    try:
        return start(creationflags=flags | subprocess.CREATE_BREAKAWAY_FROM_JOB)
    except PermissionError:
        return start(creationflags=flags)


@contextlib.contextmanager
def sheltered_start():
    """Start a worker within this: on Windows it starts as an interpreter of its own.

    Ctrl-C would interrupt its imports with a traceback. So it is ignored here for some
    milliseconds, since children inherit that. The interpreter imports from the current
    directory, where a student may have a random.py. So it starts in the directory of
    its program. (PYTHONSAFEPATH would need Python 3.11, and reach the jobs.)
    """
    if not WINDOWS:
        yield
        return
    here = os.getcwd()
    os.chdir(os.path.dirname(sys.executable))
    KERNEL.SetConsoleCtrlHandler(None, True)
    try:
        yield
    finally:
        KERNEL.SetConsoleCtrlHandler(None, False)
        os.chdir(here)


def inherit_nothing():
    """Pass no inherited descriptor on to commands: one of them may hold a lock."""
    if os.path.isdir("/dev/fd"):  # Windows passes on only what is named
        for fd in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.set_inheritable(fd, fd <= 2)


# ======================================================================================
# Database: the file, its connection, transactions, the schema
# ======================================================================================


def in_states(states, column="state"):
    """Return the SQL condition that a job is in one of these states.

    There is no IN in it, since SQLite builds the list of an IN anew for each row.
    """
    if not {*states} <= {*STATES}:  # nothing else may get into a statement
        raise ValueError("no states: %r" % (states,))
    parts = [f"{column} = '{state}'" for state in states]
    return "(" + (" OR ".join(parts) or "0") + ")"


IS_WAITING, IS_FINISHED, IS_SUCCESS = map(in_states, (WAITING, FINISHED, SUCCESSFUL))
NEW_IS_SUCCESS = in_states(SUCCESSFUL, "NEW.state")  # in a trigger
OLD_IS_SUCCESS = in_states(SUCCESSFUL, "OLD.state")
ORDER = "priority DESC, run_at, seq"  # in which jobs are claimed

# The gate decides whether a waiting job may be claimed. Any other job is OPEN. No verb
# computes it: `gate_rule` is the rule. `insert_job` applies it to a new job, and the
# trigger `gate_moved` to each change. `elect` decides between OPEN and LOCKED.
CLOSED = 0  # its time has not come (see `promote`), or a dependency is not completed
OPEN = 1  # it may be claimed
LOCKED = 2  # only its lock is in the way


def gate_rule(state, waits, run_at, updated_at, lock):
    """Return the rule for the gate of a job, as SQL made of the SQL for its columns.

    The row is its own clock: a job is due if `run_at` <= `updated_at`, and `promote`,
    which lets time pass, sets `updated_at`. So no trigger has to know the time, and a
    job that was due stays due if the clock is set back.
    """
    return f"""CASE WHEN NOT {in_states(WAITING, state)} THEN {OPEN}
        WHEN {state} = 'failed' OR {waits} > 0 OR {run_at} > {updated_at} THEN {CLOSED}
        WHEN {lock} IS NULL THEN {OPEN} ELSE {LOCKED} END"""


GATE = gate_rule("state", "waits", "run_at", "updated_at", "lock")
GATE_OF_NEW = gate_rule(
    "NEW.state", "NEW.waits", "NEW.run_at", "NEW.updated_at", "NEW.lock")


# Most jobs are pending or completed. The index jobs_rare has only the jobs in other,
# rare states, so it stays small. SQLite uses it only for a query that contains all of
# its condition, word by word; likewise jobs_dependent for `waits > 0`.
RARE = "state <> 'pending' AND state <> 'completed'"
UNFINISHED_DEPENDENT = f"waits > 0 AND NOT {IS_FINISHED}"


def elect(row, if_needed="1"):
    """Return the SQL that elects the job that gets the lock of a row next.

    All OPEN jobs with this lock become LOCKED. Then the first of the LOCKED ones
    becomes OPEN, unless a job with the lock is running.
    """
    return f"""UPDATE jobs SET gate = {LOCKED} WHERE {if_needed}
        AND lock = {row}lock AND state = 'pending' AND gate = {OPEN};
    UPDATE jobs SET gate = {OPEN} WHERE {if_needed}
        AND seq = (SELECT seq FROM jobs WHERE lock = {row}lock AND state = 'pending'
            AND gate = {LOCKED} ORDER BY {ORDER} LIMIT 1)
        AND NOT EXISTS (SELECT 1 FROM jobs
            WHERE lock = {row}lock AND state = 'processing' AND {RARE});"""


# A new queue is made by this alone. A queue of an older version goes through MIGRATIONS
# first. Then this adds what it still lacks, all indexes and triggers among it.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- its number; never reused
    id TEXT NOT NULL UNIQUE,
    command TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK ({in_states(STATES)}),
    attempts INTEGER NOT NULL DEFAULT 0,    -- claims that count against max_retries
    max_retries INTEGER NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0,
    run_at REAL NOT NULL,                   -- when it is, or was, due for a worker
    gate INTEGER NOT NULL,                  -- CLOSED, OPEN or LOCKED
    timeout REAL,
    cwd TEXT NOT NULL,
    env TEXT,                               -- JSON
    launcher TEXT,                          -- in place of the setting
    lock TEXT,                              -- jobs that share it run one at a time
    waits INTEGER NOT NULL DEFAULT 0,       -- dependencies that are not completed
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,               -- when it was moved, edited or became due:
                                            -- the clock of its gate
    run INTEGER NOT NULL DEFAULT 0,         -- number of its latest run; only ever grows
    deaths INTEGER NOT NULL DEFAULT 0,      -- of workers that ran it
    cancelled INTEGER NOT NULL DEFAULT 0,   -- 1: `cancel` was called
    error TEXT                              -- why it is failed or dead
);
CREATE TABLE IF NOT EXISTS runs (
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,                -- PID of the worker
    pid INTEGER,                            -- PID and process group of the command
    started_at REAL NOT NULL,
    finished_at REAL,
    kind TEXT,                              -- how it ended, one of RUN_KINDS
    exit_code INTEGER,
    error TEXT,
    PRIMARY KEY (seq, run)
) WITHOUT ROWID;
-- Apart from the runs, and only where something was printed: in a table WITHOUT ROWID
-- each search that passes a row reads all of it, and an output may have megabytes.
CREATE TABLE IF NOT EXISTS outputs (
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    output BLOB NOT NULL,
    PRIMARY KEY (seq, run)
);
CREATE TABLE IF NOT EXISTS dependencies (   -- job `seq` comes after job `waits_for`,
    seq INTEGER NOT NULL,                   -- as long as there are both
    waits_for INTEGER NOT NULL,
    PRIMARY KEY (seq, waits_for)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS config (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL                     -- JSON
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (         -- of all jobs, by state
    state TEXT PRIMARY KEY,
    jobs INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (         -- of all runs there ever were, by total
    total TEXT PRIMARY KEY,
    runs INTEGER NOT NULL,
    seconds REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drains (         -- of the runs that a draining pool ended,
    pool INTEGER NOT NULL,                  -- how many left their job in which state
    state TEXT NOT NULL,
    runs INTEGER NOT NULL,
    PRIMARY KEY (pool, state)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unannounced (    -- jobs that died by a run, and for which
                                            -- `on_dead` has not been started
    seq INTEGER PRIMARY KEY
);
INSERT OR IGNORE INTO counts VALUES {', '.join(f"('{state}', 0)" for state in STATES)};
INSERT OR IGNORE INTO totals VALUES
    ('completed', 0, 0), ('failed', 0, 0), ('interrupted', 0, 0);
-- It is part of the name of each lease, so that a lease of a removed queue in the same
-- place is not taken for one of this queue.
INSERT OR IGNORE INTO config VALUES ('token', lower(hex(randomblob(4))));

-- The jobs to claim in their order, the jobs that wait for a time, the jobs of each
-- lock, those that wait for others, and the few that are neither pending nor completed:
-- a claim costs the same with a million other jobs. Then the completed jobs by age, and
-- the dead ones by age and by error. No IN here: SQLite would build its list for each
-- row.
CREATE INDEX jobs_claimable ON jobs ({ORDER}) WHERE state = 'pending' AND gate = {OPEN};
CREATE INDEX jobs_waiting ON jobs (run_at) WHERE gate = {CLOSED} AND waits = 0;
CREATE INDEX jobs_locked ON jobs (lock, gate, {ORDER})
    WHERE lock NOT NULL AND state = 'pending';
CREATE INDEX jobs_dependent ON jobs (seq) WHERE waits > 0;
CREATE INDEX jobs_rare ON jobs (state, seq) WHERE {RARE};
CREATE INDEX jobs_completed ON jobs (updated_at) WHERE state = 'completed';
CREATE INDEX jobs_dead ON jobs (updated_at, seq) WHERE state = 'dead';
CREATE INDEX jobs_dead_error ON jobs (error, updated_at) WHERE state = 'dead';
CREATE INDEX dependents ON dependencies (waits_for);

-- Counting a million rows takes a third of a second, so triggers keep the counts. New
-- jobs are counted by `enqueue`: a trigger a row would cost half of its time.
CREATE TRIGGER job_moved AFTER UPDATE OF state ON jobs WHEN OLD.state <> NEW.state BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    UPDATE counts SET jobs = jobs + 1 WHERE state = NEW.state; END;

-- `waits` of a job is the number of its dependencies that are not completed. When the
-- last of them is, the job waits for a worker from then on, unless a later time was
-- named. When one leaves COMPLETED, its dependents wait for it again.
CREATE TRIGGER dependency_completed AFTER UPDATE OF state ON jobs
    WHEN {NEW_IS_SUCCESS} AND NOT {OLD_IS_SUCCESS}
        AND EXISTS (SELECT 1 FROM dependencies WHERE waits_for = NEW.seq) BEGIN
    UPDATE jobs SET waits = waits - 1,
        run_at = CASE WHEN state = 'pending' AND waits = 1
            THEN max(run_at, NEW.updated_at) ELSE run_at END,
        updated_at = CASE WHEN state = 'pending' AND waits = 1
            THEN NEW.updated_at ELSE updated_at END
        WHERE seq IN (SELECT seq FROM dependencies WHERE waits_for = NEW.seq); END;
CREATE TRIGGER dependency_reopened AFTER UPDATE OF state ON jobs
    WHEN {OLD_IS_SUCCESS} AND NOT {NEW_IS_SUCCESS} BEGIN
    UPDATE jobs SET waits = waits + 1
        WHERE seq IN (SELECT seq FROM dependencies WHERE waits_for = NEW.seq); END;
CREATE TRIGGER dependency_added AFTER INSERT ON dependencies BEGIN
    UPDATE jobs SET waits = waits + 1 WHERE seq = NEW.seq
        AND NOT (SELECT {IS_SUCCESS} FROM jobs WHERE seq = NEW.waits_for); END;
CREATE TRIGGER dependency_dropped AFTER DELETE ON dependencies BEGIN
    -- Not if that job was deleted: then `job_removed` counts.
    UPDATE jobs SET waits = waits - 1 WHERE seq = OLD.seq
        AND NOT (SELECT {IS_SUCCESS} FROM jobs WHERE seq = OLD.waits_for); END;

-- Keeps the gate of a changed job, and elects anew for its lock. (recursive_triggers is
-- off: the trigger does not fire for its own changes.)
CREATE TRIGGER gate_moved
    AFTER UPDATE OF state, run_at, updated_at, waits, lock, priority ON jobs
    WHEN NEW.lock NOT NULL OR OLD.lock NOT NULL          -- others may get the lock
        OR NEW.run_at > NEW.updated_at                   -- the clock may be behind
        OR NEW.state = 'failed' AND NEW.waits > 0        -- it waits for others, too
        OR NEW.gate <> {GATE_OF_NEW} BEGIN
    -- A waiting job that was due stays due if the clock was set back since.
    UPDATE jobs SET run_at = updated_at WHERE seq = NEW.seq AND {IS_WAITING}
        AND run_at > updated_at
        AND run_at = OLD.run_at AND OLD.run_at <= OLD.updated_at;
    -- A FAILED job waits for its next try alone. One that waits for others is PENDING.
    UPDATE jobs SET state = 'pending'
        WHERE seq = NEW.seq AND state = 'failed' AND waits > 0;
    UPDATE jobs SET gate = {GATE}
        WHERE seq = NEW.seq AND gate <> {GATE};
    {elect("NEW.")} {elect("OLD.", if_needed="OLD.lock IS NOT NEW.lock")} END;

-- A waiting dependent of a job that was deleted before it was completed can't go on, so
-- it dies. `delete --all` deletes dependents first, but in several transactions.
CREATE TRIGGER job_removed AFTER DELETE ON jobs BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = OLD.state;
    UPDATE jobs SET state = 'dead', error = 'a job that it came after was deleted',
        updated_at = (julianday('now') - 2440587.5) * 86400.0
        WHERE NOT {OLD_IS_SUCCESS} AND {IS_WAITING}
        AND seq IN (SELECT seq FROM dependencies WHERE waits_for = OLD.seq);
    UPDATE jobs SET waits = waits - 1 WHERE NOT {OLD_IS_SUCCESS}
        AND seq IN (SELECT seq FROM dependencies WHERE waits_for = OLD.seq);
    DELETE FROM dependencies WHERE waits_for = OLD.seq;
    DELETE FROM dependencies WHERE seq = OLD.seq;
    DELETE FROM outputs WHERE seq = OLD.seq;
    DELETE FROM runs WHERE seq = OLD.seq; END;
CREATE TRIGGER lock_left AFTER DELETE ON jobs WHEN OLD.lock NOT NULL BEGIN
    {elect("OLD.")} END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

# The steps from an older version of the schema to the next one: {older version: SQL}. A
# step has no index and no trigger: those are dropped before the steps and made anew by
# SCHEMA. A process of an older queuectl may still have the database open. If it would
# write what is wrong now, the step renames a column that every claim names, so that the
# process fails instead.
MIGRATIONS = {2: """
ALTER TABLE jobs RENAME COLUMN claimable TO gate;
UPDATE jobs SET cancelled = 1 WHERE state = 'dead' AND error = 'cancelled';
UPDATE jobs SET updated_at = run_at
    WHERE state = 'pending' AND gate <> 0 AND run_at > updated_at;
ALTER TABLE waits RENAME TO dependencies;
ALTER TABLE untold RENAME TO unannounced;
ALTER TABLE totals RENAME COLUMN outcome TO total;
CREATE TABLE outputs (
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    output BLOB NOT NULL,
    PRIMARY KEY (seq, run)
);
INSERT INTO outputs SELECT seq, run, output FROM runs WHERE length(output) > 0;
ALTER TABLE runs RENAME TO runs_2;
CREATE TABLE runs (
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker INTEGER NOT NULL,
    pid INTEGER,
    started_at REAL NOT NULL,
    finished_at REAL,
    kind TEXT,
    exit_code INTEGER,
    error TEXT,
    PRIMARY KEY (seq, run)
) WITHOUT ROWID;
INSERT INTO runs SELECT seq, run, attempt, worker, pid, started_at, finished_at,
    CASE WHEN finished_at IS NULL THEN NULL WHEN error IS NULL THEN 'completed'
        WHEN error = 'cancelled' THEN 'cancelled' WHEN error = 'worker died' THEN 'lost'
        WHEN error = 'stopped' OR error = 'stop --now' THEN 'stopped'
        ELSE 'failed' END, exit_code, error FROM runs_2;
DROP TABLE runs_2;
"""}


def database_uri(path):
    """Return the name of a database that SQLite does not create if it is gone."""
    name = re.sub("[%?#]", lambda match: "%%%x" % ord(match[0]), path)
    name = name.replace(os.sep, "/")
    if not name.startswith("/"):  # a drive of Windows
        name = "/" + name
    return "file://" + name + "?mode=rw"


def is_damage(error):
    """Tell whether an error is SQLITE_CORRUPT or SQLITE_NOTADB.

    Before Python 3.11 it has no code.
    """
    return isinstance(error, sqlite3.Error) and any(
        words in str(error) for words in ("malformed", "not a database"))


def with_cause(error, path):
    """Return the text of an error, and what it comes from if that can be mended."""
    if is_damage(error):
        return "%s; restore a backup" % error
    # On a full disk SQLite can't open a database: a `disk I/O error`.
    is_unsaid = "full" not in str(error) and is_disk_full(path)
    return str(error) + "; the disk is full" * is_unsaid


CONNECTED = weakref.WeakSet()  # the databases of this process that have a connection


class Database:
    """One SQLite file, opened by one thread of one process.

    But for the schema it knows nothing of jobs. It makes and opens the file, and begins
    and ends transactions. SQLite must not cross a fork: before one, the forking thread
    closes its connections that are not in a transaction.

    What is committed survives a power cut. `for_pool` spares that time: what a pool
    commits survives killed processes, and after a power cut a run may be repeated. A
    pool also waits for locks only shortly, since it tries again.
    """

    def __init__(self, path, for_pool=False, lock_timeout=None, create=True):
        self.path = os.path.realpath(path)  # one queue, whatever links lead to it
        self.for_pool = for_pool
        self._db = None
        self.lock_timeout = lock_timeout or (
            POOL_LOCK_TIMEOUT if for_pool else LOCK_TIMEOUT)
        self.owner = os.getpid(), _thread.get_ident()
        self._find_file(create and not for_pool)
        try:
            if not self._is_prepared():
                self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # -- the file and its connection ---------------------------------------------------

    def _find_file(self, create):
        """Find the file, or CREATE a missing one."""
        # SQLite's limit of 512 bytes holds for its journal, PATH-journal.
        if not WINDOWS and len(os.fsencode(self.path)) > 504:
            raise QueueError("%s: this path is longer than SQLite's 504 bytes",
                             self.path)
        if not os.path.exists(self.path):
            if not create:  # a pool must not bring back what its user removed
                raise QueueError("there is no queue %s", self.path)
            # O_EXCL, so that a file that exists is not opened and closed here: by the
            # rules of POSIX that would drop all locks that this process has on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        self.file_status = os.stat(self.path)
        self._refuse_unsafe_file()

    def _refuse_unsafe_file(self):
        """Raise QueueError for a file in which jobs would get lost."""
        if not stat.S_ISREG(self.file_status.st_mode):
            raise QueueError("%s is not a regular file", self.path)
        # SQLite finds the write-ahead log by the path, so that a second name would have
        # a second log. A running pool does not ask again, or `cp -al` would end it.
        if self.file_status.st_nlink > 1 and not self.for_pool:
            message = "%s has a second hard link: jobs added through it would be lost;"
            raise QueueError(message + " remove that link", self.path)
        if not self.for_pool and is_mount_point(self.path):
            message = "%s is mounted as a single file: jobs would be lost, as its log"
            raise QueueError(message + " lies elsewhere; mount its folder", self.path)
        hint = owner_hint(self.path)
        if hint:
            raise QueueError("%s%s", self.path, hint)
        if not os.access(self.path, os.W_OK):
            raise QueueError("%s is read-only: its mode or its file system", self.path)

    def require_file(self):
        """Raise QueueError if the file is gone. A wait for it would never end."""
        if not may_be_same_file(self.path, self.file_status):
            raise QueueError("%s was removed", self.path)

    @property
    def db(self):
        """The connection, for the process and the thread that opened it."""
        self._require_owner()
        if self._db is None:
            try:
                self._connect()
            except BaseException:
                self._disconnect()  # the next use would find it half set up
                raise
        return self._db

    def _require_owner(self):
        if self.owner != (os.getpid(), _thread.get_ident()):
            why = "is another process's or thread's" if self.owner else "was closed"
            raise QueueError("this Queue %s: open one here", why)

    def _connect(self):
        self.require_file()
        self._db = sqlite3.connect(
            database_uri(self.path), uri=True, timeout=self.lock_timeout,
            isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self.rows("PRAGMA synchronous = " + ("NORMAL" if self.for_pool else "FULL"))
        self.require_file()  # another file may just have been put in its place
        self.rows("PRAGMA fullfsync = ON")  # macOS: without it a sync is no sync
        self.rows(f"PRAGMA journal_size_limit = {2**24}")
        CONNECTED.add(self)

    def close(self):
        """Close the connection. Any later use raises QueueError."""
        if self.owner and self.owner[0] == os.getpid():
            self._require_owner()
            self._disconnect()
        self.owner = None  # any later use is refused

    def _disconnect(self):
        if self._db is not None:
            self._db.close()
            self._db = None

    @staticmethod
    def before_fork():
        """Close the connections of this thread; the next use here opens another.

        In the child SQLite would take this process's locks for its own, and remove a
        log that others write to: acknowledged jobs were lost that way.
        """
        here = os.getpid(), _thread.get_ident()
        for database in list(CONNECTED):
            is_idle = database._db and not database._db.in_transaction
            if database.owner == here and is_idle:
                database._disconnect()

    # -- the schema --------------------------------------------------------------------

    def _is_prepared(self):
        """Tell by the header whether the file is a queue of this version."""
        try:
            has_version = self.value("PRAGMA user_version") == SCHEMA_VERSION
            return has_version and (
                self.value("PRAGMA application_id") == APPLICATION_ID)
        except sqlite3.OperationalError as error:
            # SQLite drops a log that lies beside an empty database. If two first
            # commands do so at once, one of them fails here. It tries again in
            # `_prepare`.
            if "disk I/O" in str(error):
                return False
            raise

    def _prepare(self):
        """Create the tables of a new queue, or convert a queue of an older version.

        Many commands may open a new queue at the same time, so the version is read
        again within the transaction. The switch to the write-ahead log waits for no
        lock, so it is tried until it holds. It comes before any table is made: a kill
        in between would leave a queue without that log.
        """
        if self._is_empty() and not wait_until(self._use_wal, self.lock_timeout):
            raise QueueError("%s: another program has locked it", self.path)
        with self.transaction():
            if self._is_prepared():  # by another process, in the meantime
                return
            if not self._is_empty():
                self._migrate()
            self._execute_all(SCHEMA)

    def _is_empty(self):
        return not self.value("SELECT 1 FROM sqlite_master")

    def _use_wal(self):
        """Switch to the write-ahead log; return False while another program has a lock.

        A pool may still have the index (-shm) of a log whose database was removed. A
        process that took that index over would fail, or write a log that the next
        process can't read: acknowledged jobs were lost that way. SQLite drops such a
        log, but not its index, so the index is removed here, under an exclusive lock.
        """
        try:
            self.db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self.db.execute("BEGIN EXCLUSIVE")
            if self.value("PRAGMA journal_mode") != "wal":  # else the index is in use
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path + "-shm")
            self.db.execute("ROLLBACK")
            return bool(self.rows("PRAGMA journal_mode = WAL"))
        except sqlite3.OperationalError as error:
            if not self.is_busy(error):
                raise
            return False

    @staticmethod
    def is_busy(error):
        """Tell whether an error is SQLITE_BUSY. (Before 3.11 it has no code.)"""
        return "locked" in str(error)

    def _migrate(self):
        """Bring an older version up to what SCHEMA expects, or refuse the database."""
        version = self.value("PRAGMA user_version")
        if self.value("PRAGMA application_id") != APPLICATION_ID:
            raise QueueError("%s is not a queue of queuectl", self.path)
        if version < 2:
            message = "%s was made by queuectl 1.0: convert it with queuectl 1.1 first"
            raise QueueError(message, self.path)
        if version > SCHEMA_VERSION:
            message = "%s has version %d of the schema, and this queuectl knows version"
            message += " %d: take a newer queuectl.py"
            raise QueueError(message, self.path, version, SCHEMA_VERSION)
        self._refuse_older_pools()
        for kind, name in self.rows(
                "SELECT type, name FROM sqlite_master"
                " WHERE type IN ('index', 'trigger') AND sql NOT NULL"):
            self.db.execute(f"DROP {kind} {name}")
        for step in range(version, SCHEMA_VERSION):
            self._execute_all(MIGRATIONS[step])

    def _refuse_older_pools(self):
        """Raise QueueError while a pool of an older queuectl lives, or its run may.

        The pool would fail at its next claim, and the run would be missed: beside a
        database of another name its lease is not where this version looks for it.
        """
        for pool in older_pools(self.path):
            how = PROGRAM + " worker stop"
            if os.path.basename(self.path) != "queuectl.db":
                how = "worker stop of that queuectl"
            raise QueueError("pool %d of an older queuectl runs: stop it with %s, then"
                             " try again", pool, how)
        running = self.value("SELECT id FROM jobs WHERE state = 'processing'")
        if running is None:
            return
        leases = path_beside(self.path, ".runs")
        if os.path.basename(self.path) != "queuectl.db":
            raise QueueError("job %s is processing: start and stop a pool of queuectl"
                             " 1.1, then try again", running)
        with contextlib.suppress(*NO_DIRECTORY):
            paths = [os.path.join(leases, name) for name in os.listdir(leases)]
            if any(map(is_locked, paths)):
                raise QueueError("job %s still runs, without its pool of queuectl 1.1:"
                                 " wait for its end, then try again", running)

    def _execute_all(self, script):
        """Execute statements, each ended by a line that ends with `;`.

        Within a transaction: `executescript` would commit first.
        """
        statement = ""
        for line in script.splitlines(True):
            statement += line
            if sqlite3.complete_statement(statement):
                self.db.execute(statement)
                statement = ""
        assert not statement.strip(), "no ; at the end of: " + statement

    # -- transactions and statements ---------------------------------------------------

    @contextlib.contextmanager
    def transaction(self):
        """Begin, commit, or roll back. A transaction within another one joins it.

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

    @contextlib.contextmanager
    def snapshot(self):
        """Let several queries see the same state of the database."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.rollback()

    def _begin(self):
        """Take the write lock; try until `lock_timeout` has passed.

        SQLite's own waiting sleeps for milliseconds. In that time other workers get the
        lock several times.
        """
        deadline = time.monotonic() + self.lock_timeout
        pause = 0.00003
        self.rows("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    return self.db.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    if not self.is_busy(error) or time.monotonic() > deadline:
                        raise
                time.sleep(pause)
                pause = min(1.5 * pause, 0.02)
        finally:
            self.rows("PRAGMA busy_timeout = %d" % (1000 * self.lock_timeout))

    def change(self, sql, *values, **named):
        """Execute a statement; return how many rows it changed."""
        return self.db.execute(sql, named or values).rowcount

    def rows(self, sql, *values, **named):
        return self.db.execute(sql, named or values).fetchall()

    def row(self, sql, *values, **named):
        """Return the first row, or None. A query with many rows needs a LIMIT.

        All rows are read: a query that is not read to its end stays open within its
        transaction.
        """
        rows = self.rows(sql, *values, **named)
        return rows[0] if rows else None

    def value(self, sql, *values, **named):
        row = self.row(sql, *values, **named)
        return row[0] if row else None


if not WINDOWS:
    os.register_at_fork(before=Database.before_fork)


# ======================================================================================
# Queue: the jobs; a method for each verb, with its SQL
# ======================================================================================

# What follows from the way in which a run ended: the method of `Queue` that records it,
# and the total that counts it. A run without a total never began, and is not recorded.
RunKind = collections.namedtuple("RunKind", "verb total")
RUN_KINDS = {
    "completed": RunKind("complete", "completed"),
    "failed": RunKind("fail", "failed"),  # an exit code, a signal, a timeout
    "cancelled": RunKind("fail", "interrupted"),
    "stopped": RunKind("release", "interrupted"),  # with its pool, or its whole service
    "lost": RunKind("release", "interrupted"),  # its worker died
    "refused": RunKind("release", None),  # the system had no process to give
}
TOTALS = ("completed", "failed", "interrupted")
# The SQL for the total of a run.
TOTAL_OF_RUN = "CASE %s END" % " ".join(
    "WHEN kind = '%s' THEN '%s'" % (name, kind.total)
    for name, kind in RUN_KINDS.items() if kind.total)
# The errors of runs and jobs that have one in every case.
WORKER_DIED, STOPPED, CANCELLED = "worker died", "stopped", "cancelled"

# How a run ended.
Outcome = collections.namedtuple("Outcome", [
    "kind",  # one of RUN_KINDS
    "exit_code",  # None without one
    "error",  # the text that is stored and shown; None after success
    "finished_at",  # epoch seconds
    "output"])  # bytes

# One run of a job, until it is recorded.
Run = collections.namedtuple("Run", [
    "seq",  # the number of the job
    "number",  # counts the runs of the job, and only ever grows
    "id",  # of the job
    "attempt",  # is given back when the job is put back
    "max_retries",
    "worker",  # its PID
    "pid",  # of the command
    "started_at",  # epoch seconds
    "lease_path",
    # Only the worker that claimed the job has these.
    "command", "cwd", "env", "timeout", "launcher", "output_limit"],
    defaults=(None,) * 6)

CLAIMABLE = f"state = 'pending' AND gate = {OPEN}"
FOR_A_TIME = f"gate = {CLOSED} AND waits = 0"  # a waiting job; only its time is missing
PAUSED = "EXISTS (SELECT 1 FROM config WHERE key = 'paused')"

# The priorities of the jobs to claim, from the highest one: a search in the index each.
LEVELS = f"""WITH RECURSIVE level (priority) AS (
    SELECT MAX(priority) FROM jobs WHERE {CLAIMABLE}
    UNION ALL SELECT (SELECT MAX(priority) FROM jobs
        WHERE {CLAIMABLE} AND jobs.priority < level.priority)
        FROM level WHERE priority NOT NULL)"""
# The jobs that were due before the clock was set back; neither looks at all jobs.
DUE_IN_FUTURE = [
    f"""{LEVELS} SELECT seq FROM level CROSS JOIN jobs USING (priority)
        WHERE {CLAIMABLE} AND run_at > :now + 1""",
    f"""SELECT seq FROM jobs WHERE lock NOT NULL AND state = 'pending'
        AND gate = {LOCKED} AND run_at > :now + 1"""]

OTHER_COLUMNS = [name for name in COLUMNS if name not in ("id", "run_at")]


@functools.lru_cache(None)
def insert_job(columns):
    """Return the SQL for a new job: its id and times, COLUMNS, then two for the gate.

    The times are `run_at`, `created_at` and `updated_at`; the gate needs the first and
    the last of them again. Other columns keep their default, NULL: to pass None for
    each of them would take a fifth of the time of a large batch.
    """
    names = ("id", "run_at", "created_at", "updated_at", *columns)
    gate = gate_rule("'pending'", waits="0", run_at="?", updated_at="?",
                     lock="''" if "lock" in columns else "NULL")
    values = ", ".join("?" for _ in names)
    return f"INSERT INTO jobs ({', '.join(names)}, gate) VALUES ({values}, {gate})"


# Changes nothing, but fires the trigger `gate_moved` for a lock that has new jobs. (A
# trigger for INSERT would cost any job a tenth more.)
ELECT_BY_TRIGGER = f"""UPDATE jobs SET lock = lock WHERE seq = (SELECT seq FROM jobs
    WHERE lock = ? AND state = 'pending' AND gate = {LOCKED} LIMIT 1)"""
RESET = "state = 'pending', attempts = 0, deaths = 0, cancelled = 0, error = NULL"
RETRY = f"UPDATE jobs SET {RESET}, run_at = :now, updated_at = :now"
GIVEN = ", ".join(f"{name} = :{name}" for name in COLUMNS if name != "id")
RESTART = f"""UPDATE jobs SET {RESET}, updated_at = :now, {GIVEN}
    WHERE id = :id AND {IS_FINISHED}"""

# A change of jobs: SQL, and the condition that a job has to meet. A verb may have two,
# for jobs in different states.
Change = collections.namedtuple("Change", "sql condition")
CANCEL = [
    Change(f"""UPDATE jobs SET state = 'dead', cancelled = 1, error = '{CANCELLED}',
        updated_at = :now""", IS_WAITING),
    Change("UPDATE jobs SET cancelled = 1", "state = 'processing'"),
]
RUN_NOW = "UPDATE jobs SET run_at = min(run_at, :now), updated_at = :now"
DELETE = [Change("DELETE FROM jobs", in_states(TAKES["delete"]))]

RUN_SECONDS = "round(finished_at - started_at, 3)"  # NULL until the run has ended


def dependency_ids(condition="1"):
    """Return the SQL for the ids, a line each, that a job comes after."""
    return f"""(SELECT group_concat(dependency.id, char(10)) FROM dependencies
        JOIN jobs AS dependency ON dependency.seq = waits_for
        WHERE dependencies.seq = jobs.seq AND {condition})"""


COLUMN_OF = {
    "error": "jobs.error",
    "seconds": RUN_SECONDS,
    "after": dependency_ids(),
    "waits_for": "CASE WHEN waits > 0 THEN %s END" % dependency_ids(
        "NOT " + in_states(SUCCESSFUL, "dependency.state")),
}
SELECT_JOB = "SELECT %s FROM jobs LEFT JOIN runs USING (seq, run)" % ", ".join(
    f"{COLUMN_OF.get(name, name)} AS {name}" for name in (*PUBLIC, *INTERNAL))
DEAD_JOB = f"{SELECT_JOB} WHERE seq = ? AND state = 'dead'"

# A job that waits for others is PENDING (see `gate_moved`).
IN_LINE = "jobs.state = 'pending'"
# The jobs that wait for a dead one, each with the id and number of that one. The first
# of the tables keeps it from looking at all dead jobs where no job waits for another.
BEHIND_DEAD = f"""SELECT jobs.seq AS seq, dependency.id AS dependency,
    dependency.seq AS root, dependency.state AS state, dependency.cancelled AS cancelled
    FROM (SELECT 1 FROM jobs WHERE waits > 0 LIMIT 1)
    CROSS JOIN jobs AS dependency
    CROSS JOIN dependencies ON waits_for = dependency.seq
    CROSS JOIN jobs ON jobs.seq = dependencies.seq
    WHERE {in_states(BLOCKING, "dependency.state")}
        AND {RARE.replace("state", "dependency.state")} AND {IN_LINE}"""


def blocked_table(with_root=False):
    """Return the SQL for the table `blocked`: those jobs, and all that wait for them.

    Each has a row; WITH_ROOT, a row for each dead one that it waits for.
    """
    root = ", root" if with_root else ""
    return f"""WITH RECURSIVE blocked (seq{root}) AS (
        SELECT seq{root} FROM ({BEHIND_DEAD})
        UNION SELECT jobs.seq{root} FROM blocked
            CROSS JOIN dependencies ON waits_for = blocked.seq
            CROSS JOIN jobs ON jobs.seq = dependencies.seq
            WHERE {IN_LINE})"""


# 1 if the job with the number :waited needs the end of another one: of that one itself,
# or of its lock. A job needs its unfinished dependencies, and what those need.
NEEDS_END = f"""WITH RECURSIVE needed (seq) AS (
    SELECT seq FROM jobs WHERE seq = :waited AND NOT {IS_FINISHED}
    UNION SELECT waits_for FROM needed JOIN dependencies USING (seq)
        JOIN jobs ON jobs.seq = waits_for WHERE NOT {IS_FINISHED})
    SELECT 1 FROM needed JOIN jobs USING (seq)
        WHERE seq = :seq OR lock = :lock LIMIT 1"""


def no_job(id, near=()):
    """Return the QueueError for an id that no job has; NEAR are ids like it."""
    hint = "; did you mean %s?" % near[0] if near else ""
    return QueueError("there is no job %s%s", id, hint)


# A condition that selects jobs: SQL, its values, and `of_row`, the part of it that
# depends on the row of a job alone, which is checked again when the job is changed. If
# it `spares_needed`, it is narrowed to jobs that need not be kept.
Condition = collections.namedtuple(
    "Condition", "sql values of_row spares_needed", defaults=(False,))
# The filters of `where`, each by the value that it takes. These ask the row of a job.
FILTERS = {
    "text": "(instr(id, :text) OR instr(command, :text))",
    "pattern": r"(id LIKE :pattern ESCAPE '\' OR command LIKE :pattern ESCAPE '\'"
    r" OR jobs.error LIKE :pattern ESCAPE '\')",  # see `like_pattern`
    "error": "jobs.error = :error",
    "finished_before": f"{IS_FINISHED} AND updated_at < :finished_before",
    "changed_since": "updated_at >= :changed_since",
    # A time: those that there were, and of the finished those that had finished.
    "until": f"CASE WHEN {IS_FINISHED} THEN updated_at ELSE created_at END <= :until",
    "cancelled": "cancelled = :cancelled",  # True or False
    "behind_lock": f"lock = :behind_lock AND {IN_LINE} AND gate = {LOCKED}",
    # True: the jobs that wait for one thing; `blocking` are those that others wait for.
    "for_a_time": FOR_A_TIME,  # FAILED ones as well
    "tried": f"{IN_LINE} AND attempts > 0",  # they have failed before
    "delayed": f"{IN_LINE} AND {FOR_A_TIME}",
    "blocking": f"""{in_states(BLOCKING)} AND {RARE} AND EXISTS (
        SELECT 1 FROM dependencies JOIN jobs AS waiting USING (seq)
        WHERE waits_for = jobs.seq AND waiting.state = 'pending')""",
    "locked": f"lock NOT NULL AND {IN_LINE} AND gate = {LOCKED}",
}
# These take jobs that wait for others, and ask those others as well.
DEPENDENT = f"{IN_LINE} AND waits > 0"
FILTERS_BY_OTHERS = {
    # True: those that wait for dead jobs, directly or not. False: the others.
    "blocked": f"(seq IN ({blocked_table()} SELECT seq FROM blocked)) = :blocked",
    # The error of such dead jobs.
    "blocked_by": f"""seq IN ({blocked_table(with_root=True)}
        SELECT blocked.seq FROM blocked JOIN jobs ON jobs.seq = root
        WHERE error = :blocked_by)""",
}


def like_pattern(text):
    """Return the pattern of LIKE for a text, in which only the case of a-z is free."""
    return "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"


def where(states=STATES, **filters):
    """Return the condition for the jobs in one of these states that pass the filters.

    FILTERS are given by their name. None is no filter.
    """
    parts = []
    if {*states} != {*STATES}:
        parts.append(in_states(states))
        if not {"pending", "completed"} & {*states}:
            parts.append(RARE)
    used = {name: value for name, value in filters.items() if value is not None}
    parts += [sql for name, sql in FILTERS.items() if name in used]
    others = [sql for name, sql in FILTERS_BY_OTHERS.items() if name in used]
    if others:
        parts.append(DEPENDENT)
    of_row = " AND ".join(parts or ["1"])
    return Condition(" AND ".join([of_row, *others]), used, of_row)


def split_by_need(condition):
    """Return a condition narrowed to jobs that need not be kept, and to the others.

    A job that is selected has to be kept if it is not completed and an unfinished job
    waits for it that is not selected, or that has to be kept itself.
    """
    # NULL, where a job has no error, is no selection.
    needed = f"""(NOT {IS_SUCCESS} AND seq IN (WITH RECURSIVE needed (seq) AS (
        SELECT waits_for FROM jobs JOIN dependencies USING (seq)
            WHERE {UNFINISHED_DEPENDENT} AND ({condition.sql}) IS NOT 1
        UNION SELECT waits_for FROM needed CROSS JOIN jobs USING (seq)
            JOIN dependencies USING (seq) WHERE {UNFINISHED_DEPENDENT})
        SELECT seq FROM needed))"""
    sql = condition.sql
    return (condition._replace(sql=f"{sql} AND NOT {needed}", spares_needed=True),
            condition._replace(sql=f"{sql} AND {needed}"))


# What `enqueue` did: the numbers of the first and the last new job; of the jobs that
# `unique` did not change, the command that was given: {id: command}; and the ids that
# were dropped from `after`: {id: [id]}.
Added = collections.namedtuple("Added", "first last unchanged dropped")
# A job with the ids that it comes after; a droppable one is dropped if no job has it.
Dependent = collections.namedtuple("Dependent", "id after droppable")


class NewJobs:
    """The jobs of one `enqueue` on their way into the database."""

    def __init__(self, queue, unique, place_name):
        self.queue, self.unique, self.now = queue, unique, queue.clock()
        self.place_name = place_name
        self.id, self.count = None, 0  # of the latest job, and how many there were
        self.given = {}  # of unique jobs: {id: (number, hash of all fields)}
        self.dependents = []
        self.locks = set()  # of the jobs that are inserted
        self.unchanged = {}  # as in `Added`

    def to_insert(self, jobs):
        """Yield columns and values for `insert_job`, for each job to be inserted.

        The caller inserts a job before it asks for the next one. With `unique` a job
        that exists is not yielded: it is restarted here, or left unchanged.
        """
        for job in jobs:
            self.count += 1
            self.id = job["id"]
            run_at = job["run_at"]
            if self.id is None:
                self.id = self.queue._new_id()
            if run_at is None:
                run_at = min(self.now + (job["delay"] or 0), MAX_TIME)
            if self.unique and self.is_given_again(job):
                continue
            exists = self.unique and self.queue.state(self.id) is not None
            if exists:
                restarted = self.queue._restart(dict(job, run_at=run_at, now=self.now))
                if not restarted:
                    self.unchanged[self.id] = job["command"]
                    continue
            if job["after"]:
                self.dependents.append(
                    Dependent(self.id, job["after"], job["droppable"]))
            if not exists:
                if job["lock"]:
                    self.locks.add(job["lock"])
                columns = tuple([c for c in OTHER_COLUMNS if job[c] is not None])
                yield columns, (self.id, run_at, self.now, self.now,
                                *[job[c] for c in columns], run_at, self.now)

    def is_given_again(self, job):
        """Tell whether an earlier one is the same job; refuse another of that id."""
        fields = hash(repr(job))
        number, earlier = self.given.setdefault(self.id, (self.count, fields))
        if earlier != fields:
            raise self.same_id_as(number)
        return number != self.count

    def same_id_as(self, number):
        """Return the QueueError for a job with the id of that with this number."""
        return QueueError("%s and %s have the same id: %s", self.place_name(number),
                          self.place_name(self.count), self.id)


class Queue(Database):
    """The jobs, their runs and the settings of one queue.

    Every verb that changes a job names the state that the job leaves. If the job is no
    longer in that state, another process was quicker, and nothing happens. `clock`
    returns epoch seconds. In SQL `seq` is the number of a job. `draining_pool` is the
    PID of a pool that drains the queue: then the ends of its runs are counted.
    """

    def __init__(self, path, for_pool=False, lock_timeout=None, clock=time.time,
                 create=True, draining_pool=None):
        super().__init__(path, for_pool, lock_timeout, create)
        self.clock, self.draining_pool = clock, draining_pool
        self.token = self.value("SELECT value FROM config WHERE key = 'token'")

    # -- enqueue -----------------------------------------------------------------------

    def defaults(self):
        """Return the default value of each field, by the present settings."""
        values = self.settings()
        cwd = None  # this directory may be gone: then a job has to name another
        with contextlib.suppress(OSError, ValueError):
            cwd = check_directory(current_directory())
        return dict(
            {name: field.default for name, field in FIELDS.items()}, cwd=cwd,
            max_retries=values["max_retries"], timeout=values["timeout"])

    def add(self, command, **fields):
        """Check and enqueue one job, with the fields of its JSON; return its id."""
        job = checked_job(dict(fields, command=command), self.defaults())
        added = self.enqueue([job])
        return self.value("SELECT id FROM jobs WHERE seq = ?", added.last)

    def enqueue(self, jobs, unique=False, place_name="job {}".format):
        """Add jobs as `checked_job` makes them, all or none; return `Added`.

        JOBS may be a generator: it is read within the transaction. A job without an id
        gets one. UNIQUE leaves alone a job whose id is waiting or running, and starts a
        finished one again with the new fields; its earlier runs stay. PLACE_NAME makes
        words of the number of a job, for an error.
        """
        new = NewJobs(self, unique, place_name)
        with self.transaction():
            self.require_file()  # a removed file takes jobs, and nobody would find them
            count = 0
            try:
                # Jobs in a row that have values in the same columns take one statement.
                for columns, rows in itertools.groupby(
                        new.to_insert(jobs), key=operator.itemgetter(0)):
                    count += self.db.executemany(
                        insert_job(columns), (values for _, values in rows)).rowcount
            except sqlite3.IntegrityError:
                raise self._id_taken(new) from None
            self.change(
                "UPDATE counts SET jobs = jobs + ? WHERE state = 'pending'", count)
            last = self.value("SELECT MAX(seq) FROM jobs") or 0
            # Only now, since a job may come after a later one of these jobs.
            dropped = self._add_dependencies(new.dependents, are_new=not unique)
            self.db.executemany(ELECT_BY_TRIGGER, [(lock,) for lock in new.locks])
        wake_workers(self.path)
        return Added(last - count + 1, last, new.unchanged, dropped)

    def _id_taken(self, new):
        """Return the QueueError for the latest of NEW jobs: its id is taken."""
        # All but the latest were inserted, in a row: `count - 1` jobs, up to MAX(seq).
        first = self.value("SELECT MAX(seq) FROM jobs") - (new.count - 2)
        twin = self.seq_of(new.id) - first + 1
        if twin < 1:
            place = new.place_name(new.count) + ": " if new.count > 1 else ""
            return QueueError(place + "there is a job %s already", new.id,
                              job=self.job(new.id))
        return new.same_id_as(twin)

    def _restart(self, job):
        """Start a job again with these fields; return False if it was not finished."""
        restarted = self.change(RESTART, **job)
        if restarted:  # its dependencies are among the new fields
            self.change(
                "DELETE FROM dependencies"
                " WHERE seq = (SELECT seq FROM jobs WHERE id = ?)", job["id"])
        return bool(restarted)

    def _new_id(self):
        """Return a short id that no job has, without letters that look alike."""
        while True:
            digits = os.urandom(6)
            name = "".join("23456789bcdfghjkmnpqrstvwxyz"[d % 28] for d in digits)
            if self.state(name) is None:
                return name

    def _add_dependencies(self, dependents, are_new=False):
        """Let each `Dependent` come after others. Return what was dropped: {id: [id]}.

        New jobs can form a cycle only if one of them comes after a later one.
        """
        may_be_cycle = []
        dropped = {}
        for dependent in dependents:
            seq = self.seq_of(dependent.id)
            for name in dependent.after:
                dependency = self.seq_of(name)
                if dependency is None and name in dependent.droppable:
                    dropped.setdefault(dependent.id, []).append(name)
                    continue
                if dependency is None:
                    raise QueueError("after: %s", no_job(name))
                self.change("INSERT OR IGNORE INTO dependencies VALUES (?, ?)",
                             seq, dependency)
                if dependency >= seq or not are_new:
                    may_be_cycle.append(seq)
        self._in_order(may_be_cycle)  # only to refuse a cycle
        return dropped

    def _in_order(self, seqs):
        """Return jobs and all that they come after, each after its dependencies.

        Completed jobs are no exception. If there is a cycle, there is no such order:
        QueueError is raised.
        """
        order = {}
        entered = set()
        path = [*reversed(seqs)]
        while path:
            seq = path[-1]
            if seq in entered:  # all that it comes after, or it itself, is in the order
                order[path.pop()] = True
                continue
            entered.add(seq)
            for dependency, in self.rows(
                    "SELECT waits_for FROM dependencies WHERE seq = ?", seq):
                if dependency in entered and dependency not in order:
                    words = "after: a circle, in which job %s would never run"
                    id = self.value("SELECT id FROM jobs WHERE seq = ?", seq)
                    raise QueueError(words, id)
                if dependency not in order:
                    path.append(dependency)
        return order

    def seq_of(self, id):
        """Return the number of a job, None if there is none."""
        query = "SELECT seq FROM jobs WHERE id = ?"
        return self.value(query, id) if is_storable(id) else None

    # -- the life of a job -------------------------------------------------------------

    def claim(self, worker, take_lease):
        """Give the next job to a worker, PENDING to PROCESSING; return its run or None.

        `take_lease(run)` creates the file of the run and locks it. It is called before
        the commit, or another process would take the run for that of a dead worker.
        """
        with self.transaction():
            now = self.clock()
            self.promote(now)
            row = self.row(f"""
                SELECT seq, run + 1 AS number, id, attempts + 1 AS attempt,
                    max_retries, command, cwd, env, timeout, launcher FROM jobs
                WHERE {CLAIMABLE} AND NOT {PAUSED} ORDER BY {ORDER} LIMIT 1""")
            if row is None:
                return None
            values, fields = self.settings(), dict(row)
            launcher = fields.pop("launcher") or values["launcher"]
            run = Run(worker=worker, pid=None, started_at=now,
                      lease_path=self.lease_path(row["seq"], row["number"]),
                      launcher=None if launcher == "none" else launcher,
                      output_limit=values["output_limit"], **fields)
            take_lease(run)
            self.change("""
                UPDATE jobs SET state = 'processing', attempts = ?, run = ?,
                    updated_at = ? WHERE seq = ? AND state = 'pending'""",
                run.attempt, run.number, now, run.seq)
            self.change("""
                INSERT INTO runs (seq, run, attempt, worker, started_at)
                VALUES (?, ?, ?, ?, ?)""",
                run.seq, run.number, run.attempt, worker, now)
            return run

    def promote(self, now):
        """Make jobs claimable whose time has come; FAILED becomes PENDING.

        If a hundred thousand jobs become due together, it stops after a while: the
        claim that called it would take seconds. The next claim promotes the rest.
        """
        until = time.monotonic() + WORK_SLICE
        due = f"""SELECT seq FROM jobs WHERE {FOR_A_TIME} AND run_at <= :now
            ORDER BY run_at LIMIT 100"""
        promote = f"""UPDATE jobs SET state = 'pending', updated_at = :now
            WHERE seq IN ({due})"""
        while self.change(promote, now=now) == 100 and time.monotonic() < until:
            pass

    def promote_after_clock_step(self, earlier):
        """Make jobs due again that failed or were due before the clock was set back.

        A job that named no time waits no longer for that. Those that were due would
        stand behind every new job. To look for them may take a while, so it is done
        only at the first look and after a step. Return the offset to the monotonic
        clock; EARLIER is that of the look before, or None.
        """
        self._promote_failed_in_future()
        now = self.clock()
        offset = now - time.monotonic()
        if earlier is None or offset < earlier - 1:
            for overdue in DUE_IN_FUTURE:
                self.change(f"""UPDATE jobs SET run_at = :now, updated_at = :now
                    WHERE seq IN ({overdue})""", now=now)
        return offset

    def _promote_failed_in_future(self):
        """Move jobs whose failure lies in the future from FAILED to PENDING."""
        self.change(f"""
            UPDATE jobs SET state = 'pending', run_at = :now, updated_at = :now
            WHERE state = 'failed' AND {RARE} AND updated_at > :now + 1""",
            now=self.clock())

    def record(self, run, outcome):
        """Record the end of a run, by the verb for its kind.

        This and each of the three verbs return the new state of the job, or None if the
        run no longer owns it.
        """
        verb = getattr(self, RUN_KINDS[outcome.kind].verb)
        return verb(run, outcome)

    def complete(self, run, outcome):
        """PROCESSING to COMPLETED."""
        return self._leave_processing(run, outcome, "completed", None)

    def fail(self, run, outcome):
        """PROCESSING to FAILED, to be tried again after the backoff, or to DEAD."""
        if run.attempt >= tries_allowed(run.max_retries):
            return self._leave_processing(run, outcome, "dead", outcome.error)
        values = self.settings()
        wait = backoff(values["backoff_base"], run.attempt, values["backoff_max"])
        due = min(self.clock() + wait, MAX_TIME)
        return self._leave_processing(run, outcome, "failed", outcome.error, run_at=due)

    def release(self, run, outcome, is_blamed=False):
        """PROCESSING back to PENDING, to be claimed at once. No attempt is counted.

        A job that is blamed too often for the death of its worker is DEAD: it may be
        the cause of these deaths.
        """
        deaths = self.value("SELECT deaths FROM jobs WHERE seq = ?", run.seq) or 0
        if is_blamed:
            deaths += 1
        if deaths >= MAX_DEATHS:
            error = "worker died %d times" % deaths
            return self._leave_processing(run, outcome, "dead", error, deaths=deaths)
        return self._leave_processing(
            run, outcome, "pending", None, attempts=run.attempt - 1, deaths=deaths)

    def _leave_processing(self, run, outcome, state, error, **changes):
        """Move a job out of PROCESSING if this run still owns it; record the run.

        If `cancel` was called for the job, it is DEAD, unless it has completed.
        """
        with self.transaction():
            is_cancelled = state not in SUCCESSFUL and self.cancel_requested(run)
            if is_cancelled:
                state, error, changes = "dead", CANCELLED, {}
            changes.update(state=state, error=error, updated_at=self.clock(),
                           cancelled=is_cancelled)
            columns = ", ".join(f"{name} = ?" for name in changes)
            moved = self.change(f"""
                UPDATE jobs SET {columns}
                WHERE seq = ? AND state = 'processing' AND run = ?""",
                *changes.values(), run.seq, run.number)
            if not moved:
                return None
            self._record_run(run, outcome)
            if state == "dead" and not is_cancelled:
                self.change("INSERT OR IGNORE INTO unannounced VALUES (?)", run.seq)
            if self.draining_pool and state in FINISHED:
                self.change("""
                    INSERT INTO drains VALUES (?, ?, 1)
                    ON CONFLICT (pool, state) DO UPDATE SET runs = runs + 1""",
                    self.draining_pool, state)
            return state

    def _record_run(self, run, outcome):
        total = RUN_KINDS[outcome.kind].total
        if total is None:
            self.change(
                "DELETE FROM runs WHERE seq = ? AND run = ?", run.seq, run.number)
            return
        # If the clock was set back during the run, it took at least no time.
        finished_at = max(run.started_at, outcome.finished_at)
        self.change("""
            UPDATE runs SET pid = ?, started_at = ?, finished_at = ?, kind = ?,
                exit_code = ?, error = ? WHERE seq = ? AND run = ?""",
            run.pid, run.started_at, finished_at, outcome.kind, outcome.exit_code,
            outcome.error, run.seq, run.number)
        if outcome.output:
            self.change("INSERT INTO outputs VALUES (?, ?, ?)",
                         run.seq, run.number, outcome.output)
        self.change(
            "UPDATE totals SET runs = runs + 1, seconds = seconds + ? WHERE total = ?",
            finished_at - run.started_at, total)

    def count_unannounced(self):
        """Return how many dead jobs `on_dead` has not announced."""
        return self.value("SELECT COUNT(*) FROM unannounced")

    def is_current(self, run):
        """Tell whether a run still owns its job."""
        query = "SELECT 1 FROM jobs WHERE seq = ? AND run = ? AND state = 'processing'"
        return bool(self.value(query, run.seq, run.number))

    def cancel_requested(self, run):
        """Tell whether `cancel` was called for a running job: its run has to end."""
        return bool(self.value("SELECT cancelled FROM jobs WHERE seq = ?", run.seq))

    def record_pid(self, run):
        """Record the process of a run that has been going on for a while."""
        self.change("""
            UPDATE runs SET pid = ?, started_at = ?
            WHERE seq = ? AND run = ? AND finished_at IS NULL""",
            run.pid, run.started_at, run.seq, run.number)

    def announce_dead_job(self, start):
        """Pass one unannounced death to START. Return False if there is none.

        The death is forgotten once START has returned. After a kill before that it is
        announced again. START may use Popen within the transaction: its child runs no
        Python, and exec closes the database. A plain fork would carry it over.
        """
        if self.value("SELECT 1 FROM unannounced LIMIT 1") is None:
            return False
        with self.transaction():
            seq = self.value("SELECT seq FROM unannounced LIMIT 1")
            job = self.row(DEAD_JOB, seq)
            if job:  # it may have been retried or deleted
                start(job)
            self.change("DELETE FROM unannounced WHERE seq = ?", seq)
        return True

    # -- what people do with jobs ------------------------------------------------------

    # A verb for ids changes all of these jobs or none, and refuses others. A verb for a
    # condition (`..._all`) takes what meets it, in many short transactions. Both return
    # how many jobs they changed.

    def edit(self, id, fields):
        """Change fields of a job that waits, PENDING or FAILED, or is DEAD.

        FIELDS are those of a job in JSON; `none` drops a value. Variables are added to
        those that the job has. A DEAD job stays so, with its age, until it is retried:
        then its time is set to that moment. Return the changed job.
        """
        fields = checked_fields(fields)
        now = self.clock()  # after a `run_at` of now was read: that is due
        if "id" in fields:
            raise QueueError("id: a job keeps its id", code=2)
        changes = {name: fields[name] for name in COLUMNS if name in fields}
        if "delay" in fields:
            changes["run_at"] = min(now + fields["delay"], MAX_TIME)
        columns = "".join(f"{name} = :{name}, " for name in changes)
        sql = f"""UPDATE jobs SET {columns}
            updated_at = CASE state WHEN 'dead' THEN updated_at ELSE :now END"""
        with self.transaction():
            # The change would hide that a job failed before the clock was set back.
            self._promote_failed_in_future()
            job = self.job(id)
            if job["state"] == "dead" and "run_at" in changes:
                raise QueueError("job %s is dead, and `retry` sets its time to now:"
                                 " retry it, then edit its time", id)
            if changes.get("env") and job["env"]:
                changes["env"] = json.dumps(
                    {**json.loads(job["env"]), **json.loads(changes["env"])})
            self._apply(
                [id], [Change(sql, in_states(TAKES["edit"]))],
                "job %(id)s is %(state)s, not " + " or ".join(TAKES["edit"]), changes)
            if "after" in fields:
                self.change("DELETE FROM dependencies WHERE seq = ?", job["seq"])
                self._add_dependencies([Dependent(id, fields["after"], ())])
            self.promote(now)  # the job may be FAILED, and its time be now
            edited = self.job(id)
        wake_workers(self.path)
        return edited

    def cancel(self, ids):
        """PENDING or FAILED to DEAD; a running job is ended by its worker."""
        return self._apply(ids, CANCEL, "job %(id)s is %(state)s already")

    def cancel_all(self, condition):
        """Cancel the jobs that meet a condition."""
        return self._apply_to_many(condition, CANCEL)

    def retry(self, ids, states=TAKES["retry"]):
        """COMPLETED or DEAD to PENDING, with attempts 0.

        Jobs that come after one another run in that order again.
        """
        return self._apply(ids, [Change(RETRY, in_states(states))],
                           "job %(id)s is %(state)s, not " + " or ".join(states))

    def retry_all(self, condition):
        """Retry the jobs that meet a condition."""
        return self._apply_to_many(
            condition, [Change(RETRY, in_states(TAKES["retry"]))])

    def run_now(self, ids):
        """Make jobs due that wait for their time alone."""
        return self._apply(ids, [Change(RUN_NOW, FOR_A_TIME)],
                           "job %(id)s is %(state)s, and waits for no time")

    def run_now_all(self, condition):
        """Make the jobs due that meet a condition and wait for their time alone."""
        return self._apply_to_many(condition, [Change(RUN_NOW, FOR_A_TIME)])

    def delete(self, ids):
        """Remove jobs that are not running, with their runs.

        A job that is not completed, and for which an unfinished job waits, is removed
        only together with that one.
        """
        with self.transaction():
            jobs = self._named(ids)
            named = {job["seq"] for job in jobs}
            for job in jobs:
                for seq, id in self.waiting_dependents(job):
                    if seq not in named:
                        message = "job %s can't be deleted, because %s waits for it;" \
                            " to delete both, name both"
                        raise QueueError(message, job["id"], id)
            count = self._apply(ids, DELETE, "job %(id)s is running")
        self._vacuum()
        wake_workers(self.path)
        return count

    def delete_all(self, condition):
        """Remove the jobs that meet a condition, dependents first."""
        changes = DELETE
        if condition.spares_needed:  # a dependent may have come since
            is_free = f"""({IS_SUCCESS} OR NOT EXISTS (
                SELECT 1 FROM jobs JOIN dependencies USING (seq)
                WHERE waits_for = :seq AND {UNFINISHED_DEPENDENT}))"""
            changes = [change._replace(condition=f"{change.condition} AND {is_free}")
                       for change in DELETE]
        count = self._apply_to_many(condition, changes, dependents_first=True)
        self._vacuum()
        return count

    def prune(self, keep):
        """Remove a batch of jobs that were completed more than KEEP seconds ago."""
        count = self.change("""
            DELETE FROM jobs WHERE seq IN (SELECT seq FROM jobs
                WHERE state = 'completed' AND updated_at < ?
                ORDER BY updated_at LIMIT ?)""", self.clock() - keep, BATCH_SIZE)
        self._vacuum()
        return count

    def _named(self, ids):
        if isinstance(ids, str):
            raise QueueError("ids: give a list of ids, not a single text")
        return [self.job(id) for id in dict.fromkeys(ids)]

    def _apply(self, ids, changes, refusal, values={}):
        """Apply changes to jobs, all or none.

        If no change applies to a job, QueueError is raised: REFUSAL is formatted with
        the fields of the job.
        """
        values = dict(values, now=self.clock())
        with self.transaction():
            jobs = self._named(ids)
            for job in jobs:
                if not self._apply_to([job["seq"]], changes, values):
                    raise QueueError(refusal % job, job=job)
        if not self.db.in_transaction:  # the workers would see no change before its end
            wake_workers(self.path)
        return len(jobs)

    def _apply_to(self, seqs, changes, values):
        """Apply changes to jobs; return how many were changed."""
        rows = [dict(values, seq=seq) for seq in seqs]
        return sum(
            self.db.executemany(
                f"{change.sql} WHERE seq = :seq AND {change.condition}", rows).rowcount
            for change in changes)

    def _apply_to_many(self, condition, changes, dependents_first=False):
        """Apply changes to all jobs that meet a condition now; return how many.

        In many short transactions: a single one for a million jobs, or for a few
        hundred with large outputs, would hold up all others for seconds. A job that
        meets the condition later, like one that a pool completes in the meantime, is
        left. Jobs come after their dependencies, or before them, so that none is run,
        or left, without the others in between.
        """
        seqs = self._seqs(condition)
        if dependents_first:
            seqs = seqs[::-1]
        changes = [
            change._replace(condition=f"{condition.of_row} AND {change.condition}")
            for change in changes]
        values = dict(condition.values, now=self.clock())
        count = first = 0
        length = BATCH_SIZE
        while first < len(seqs):
            batch = seqs[first : first + length]
            first += length
            began = time.monotonic()
            with self.transaction():
                count += self._apply_to(batch, changes, values)
            took = max(0.001, time.monotonic() - began)  # Windows has a coarse clock
            length = max(1, min(BATCH_SIZE, int(len(batch) * WORK_SLICE / took)))
        wake_workers(self.path)
        return count

    def _seqs(self, condition):
        """Return the numbers of the jobs that meet a condition, dependencies first."""
        from array import array

        with self.snapshot():
            rows = self.db.execute(
                f"SELECT seq FROM jobs WHERE {condition.sql} ORDER BY seq",
                condition.values)
            seqs = array("q", (seq for seq, in rows))  # eight bytes each
            if not self.value(
                    "SELECT 1 FROM dependencies WHERE waits_for > seq LIMIT 1"):
                return seqs  # every job has a higher number than its dependencies
            chosen = {*seqs}
            return array("q", [seq for seq in self._in_order(seqs) if seq in chosen])

    def _vacuum(self):
        """Return the space of removed rows to the file system, if it is much."""
        if self.db.in_transaction:  # the script below would commit it
            return
        for _ in range(self.value("PRAGMA freelist_count") // 1000):
            # As a script, since `execute` ends it after the first page.
            self.db.executescript("PRAGMA incremental_vacuum(1000)")

    # -- one job -----------------------------------------------------------------------

    def job(self, id):
        """Return one job with what its latest run left."""
        query = f"{SELECT_JOB} WHERE id = ?"
        job = self.row(query, id) if is_storable(id) else None
        if job is None:
            raise no_job(id, self._ids_like(id))
        return job

    def _ids_like(self, id):
        """Return ids that begin with this one, or else those spelt like it.

        Only its neighbours in the alphabet are looked at: there may be a million ids.
        """
        from difflib import get_close_matches

        ids = [near for near, in self.rows("""
            SELECT * FROM (SELECT id FROM jobs WHERE id >= :id ORDER BY id LIMIT 50)
            UNION ALL SELECT * FROM (
                SELECT id FROM jobs WHERE id < :id ORDER BY id DESC LIMIT 50)""",
            id=id)] if is_storable(id) else []
        begun = [near for near in ids if near.startswith(id)]
        return begun or get_close_matches(id, ids, 1, 0.7)

    def still_there(self, ids):
        """Yield those of these jobs that have not been deleted in the meantime."""
        for id in dict.fromkeys(ids):
            yield from self.rows(f"{SELECT_JOB} WHERE id = ?", id)

    def ids_starting_with(self, prefix, states):
        """Return the newest ids that start with a prefix, of jobs in these states."""
        if not is_storable(prefix):
            return []
        return [id for id, in self.rows(f"""
            SELECT id FROM jobs WHERE substr(id, 1, length(?)) = ?
            AND {where(states).sql} ORDER BY seq DESC LIMIT 300""", prefix, prefix)]

    def state(self, id):
        """Return the state of a job, None if there is none."""
        query = "SELECT state FROM jobs WHERE id = ?"
        return self.value(query, id) if is_storable(id) else None

    def dependencies(self, job):
        """Return the jobs that a job waits for, dead ones first."""
        return self.rows(f"""
            SELECT id, state, cancelled
            FROM dependencies JOIN jobs ON jobs.seq = waits_for
            WHERE dependencies.seq = ? AND NOT {IS_SUCCESS}
            ORDER BY {in_states(BLOCKING)} DESC, waits_for""", job["seq"])

    def dead_before(self, job):
        """Return the first dead job that a job waits for, directly or not, or None."""
        return self.row(f"""WITH RECURSIVE needed (seq) AS (
            VALUES (?) UNION SELECT waits_for FROM needed JOIN dependencies USING (seq)
                JOIN jobs ON jobs.seq = waits_for WHERE NOT {IS_SUCCESS})
            SELECT id, state, cancelled FROM needed JOIN jobs USING (seq)
            WHERE {in_states(BLOCKING)} ORDER BY seq LIMIT 1""", job["seq"])

    def dependents(self, job, limit):
        """Return the ids of the first jobs that come after a job, and the count."""
        first = self.rows("""
            SELECT id FROM dependencies JOIN jobs USING (seq)
            WHERE waits_for = ? ORDER BY seq LIMIT ?""", job["seq"], limit)
        return [id for id, in first], self.value(
            "SELECT COUNT(*) FROM dependencies WHERE waits_for = ?", job["seq"])

    def waiting_dependents(self, job, limit=-1):
        """Return the first unfinished jobs (`seq`, `id`) that wait for a job.

        Nothing waits for a completed one. A LIMIT below 0 is none.
        """
        if job["state"] in SUCCESSFUL:
            return []
        return self.rows(f"""
            SELECT seq, id FROM dependencies JOIN jobs USING (seq)
            WHERE waits_for = ? AND {UNFINISHED_DEPENDENT}
            ORDER BY seq LIMIT ?""", job["seq"], limit)

    def lock_holder(self, job):
        """Return the id of the job that has the lock of this one, or gets it next."""
        return self.value(f"""
            SELECT id FROM jobs WHERE lock = :lock AND state = 'processing' AND {RARE}
            UNION ALL SELECT id FROM jobs WHERE lock = :lock AND {CLAIMABLE}""",
            lock=job["lock"])

    def count_ahead(self, job):
        """Return how many jobs are claimed before this one."""
        return self.value(f"""
            SELECT COUNT(*) FROM jobs WHERE {CLAIMABLE} AND (priority > :priority
                OR priority = :priority AND (run_at, seq) < (:run_at, :seq))""",
            priority=job["priority"], run_at=job["run_at"], seq=job["seq"])

    def runs(self, job):
        """Return the runs of a job, the first one first, without their output."""
        return self.rows(f"""
            SELECT run, attempt, worker, pid, started_at, finished_at, exit_code,
                error, {RUN_SECONDS} AS seconds FROM runs
            WHERE seq = ? ORDER BY run""", job["seq"])

    def tail(self, job, longest=MAX_TAILED):
        """Return the end of what a job's latest run has printed so far.

        SQLite reads all of a stored output to reach its end: a longer one is not read,
        and None is returned.
        """
        with contextlib.suppress(FileNotFoundError):
            with open(self.lease_path(job["seq"], job["run"]), "rb") as file:
                return read_tail(file)
        return self.value("""
            SELECT CASE WHEN COUNT(*) = 0 THEN x'' WHEN length(output) < ?
                THEN substr(output, ?) END FROM outputs WHERE seq = ? AND run = ?""",
            longest, -TAIL_SIZE, job["seq"], job["run"])

    def output(self, job, number=None):
        """Return the stored output of run NUMBER (default: the latest one), or None.

        An output is stored at the end of the run, if there is any.
        """
        query = "SELECT output FROM outputs WHERE seq = ? AND run = ?"
        return self.value(query, job["seq"], number or job["run"])

    def output_head(self, job, number):
        """Return how long the stored output of run NUMBER is, and how it begins."""
        return self.row("""
            SELECT length(output), substr(output, 1, 100) FROM outputs
            WHERE seq = ? AND run = ?""", job["seq"], number) or (0, b"")

    def lease_path(self, seq, number):
        """Return the path of the lease of run NUMBER of the job SEQ."""
        name = "%s-%d-%d" % (self.token, seq, number)
        return os.path.join(path_beside(self.path, ".runs"), name)

    def latest_run(self, job):
        """Return the latest `Run` of a job, with what is needed to watch it."""
        return Run(
            job["seq"], job["run"], job["id"], job["attempts"], job["max_retries"],
            worker=None, pid=None, started_at=job["started_at"],
            lease_path=self.lease_path(job["seq"], job["run"]))

    # -- many jobs ---------------------------------------------------------------------

    def jobs(self, condition=where(), limit=0, newest=False, first=1, last=MAX_INTEGER,
             brief=False):
        """Yield the jobs that meet a condition, oldest or NEWEST first, LIMIT or all.

        Only jobs with numbers from FIRST to LAST are listed. BRIEF jobs have only their
        id, state and command. Each batch is a read of its own: a long read would keep
        the write-ahead log from its reset.
        """
        wanted = limit or MAX_INTEGER
        select = "SELECT seq, id, state, command FROM jobs" if brief else SELECT_JOB
        query = f"""{select} WHERE seq BETWEEN :first AND :last AND {condition.sql}
            ORDER BY seq {"DESC" if newest else ""} LIMIT :size"""
        while wanted > 0:
            batch = self.rows(query, **condition.values, first=first, last=last,
                               size=min(wanted, BATCH_SIZE))
            yield from batch
            wanted -= len(batch)
            if len(batch) < BATCH_SIZE:
                return
            if newest:
                last = batch[-1]["seq"] - 1
            else:
                first = batch[-1]["seq"] + 1

    def dead_jobs(self, after_id=None, limit=-1, backwards=False, **filters):
        """Yield the dead jobs that pass the filters of `where`, the latest death first.

        If AFTER_ID is a dead job, the list begins after it; BACKWARDS, it goes up from
        this job, which is the first one. A LIMIT below 0 is none.
        """
        condition = where(**filters)  # without RARE, whose index has another order
        place = self.row(
            "SELECT updated_at, seq FROM jobs WHERE id = ? AND state = 'dead'",
            after_id)
        at, number = place if place else (MAX_TIME, MAX_INTEGER)
        side, order = (">=", "ASC") if backwards else ("<", "DESC")
        query = f"""SELECT seq FROM jobs
            WHERE state = 'dead' AND (updated_at, seq) {side} (:at, :number)
            AND {condition.sql}
            ORDER BY updated_at {order}, seq {order} LIMIT :limit"""
        for seq, in self.rows(
                query, **condition.values, at=at, number=number, limit=limit):
            yield from self.rows(DEAD_JOB, seq)

    def count(self, condition):
        """Return how many jobs meet a condition."""
        query = f"SELECT COUNT(*) FROM jobs WHERE {condition.sql}"
        return self.value(query, **condition.values)

    def counts_of(self, condition):
        """Return {state: count} of jobs; `cancelled` ones are not among the dead."""
        return dict(self.rows(f"""
            SELECT CASE WHEN state = 'dead' AND cancelled THEN 'cancelled'
                ELSE state END AS word, COUNT(*)
            FROM jobs WHERE {condition.sql} GROUP BY word""", **condition.values))

    def counts(self):
        """Return how many jobs there are in each state."""
        counts = dict(self.rows("SELECT state, jobs FROM counts"))
        return {state: counts.get(state, 0) for state in STATES}

    def processing_runs(self):
        """Return the present `Run` of each job in PROCESSING."""
        rows = self.rows(f"""
            SELECT seq, run AS number, id, attempts AS attempt, max_retries, worker,
                pid, started_at FROM jobs JOIN runs USING (seq, run)
            WHERE state = 'processing' AND {RARE}""")
        return [Run(lease_path=self.lease_path(row["seq"], row["number"]), **dict(row))
                for row in rows]

    def lost_runs(self, own_workers=()):
        """Return the runs in PROCESSING that have lost their worker or their lease.

        OWN_WORKERS are PIDs of workers that live, even if their files were removed.

        A claim locks the lease before its commit, and a worker locks its own file
        before it claims. So the runs are read first, and the files are tested then. If
        one of the two is unlocked, the worker has died, or it has recorded the end in
        between and no longer owns the job. Within a snapshot it would still own it, and
        seem lost.
        """
        runs = self.processing_runs()
        workers = living_workers(self.path).union(own_workers)

        def is_attended(run):  # another process may have got the PID of a dead worker
            return run.worker in workers and is_locked(run.lease_path)

        return [run for run in runs if not is_attended(run) and self.is_current(run)]

    def workers(self):
        """Return the workers of all pools, each with its job: `pid pool job since`."""
        runs = {run.worker: run for run in self.processing_runs()}
        rows = []
        for pool, workers in living_pools(self.path).items():
            for pid in workers:
                run = runs.get(pid)
                rows.append({"pid": pid, "pool": pool, "job": run and run.id,
                             "since": run and run.started_at})
        return rows

    def blocked_seqs(self):
        """Return the numbers of the jobs that wait, directly or not, for a dead one."""
        rows = self.rows(f"{blocked_table()} SELECT seq FROM blocked")
        return {seq for seq, in rows}

    def blocked_jobs(self):
        """Return `blocked_seqs`, and the first of these jobs as `blocked`."""
        seqs = self.blocked_seqs()
        return {"blocked_seqs": seqs, "blocked": self.first_blocked() if seqs else None}

    def first_blocked(self):
        """Return the first job that waits for a dead one, or None.

        `id` is the job, `dependency` the id of the dead one, `state` and `cancelled`
        are those of the dead one.
        """
        return self.row(f"""
            SELECT jobs.id, dead.* FROM ({BEHIND_DEAD}) AS dead JOIN jobs USING (seq)
            ORDER BY seq LIMIT 1""")

    def next_due(self, states=WAITING):
        """Return the job (`id`, `run_at`) in one of these states that is due next."""
        return self.row(f"""
            SELECT id, run_at FROM jobs WHERE {FOR_A_TIME} AND {in_states(states)}
            ORDER BY run_at, seq LIMIT 1""")

    def has_claimable(self):
        """Tell whether there is a job to claim."""
        return bool(self.value(f"SELECT 1 FROM jobs WHERE {CLAIMABLE} LIMIT 1"))

    def is_drained(self):
        """Tell whether no job may be claimed, is running or waits for a retry.

        Jobs that wait for a later time or for others do not count. This is one
        statement: between two a job could go from waiting to running.
        """
        return not self.value(f"""
            SELECT EXISTS (SELECT 1 FROM counts
                WHERE jobs > 0 AND (state = 'processing' OR state = 'failed'))
            OR EXISTS (SELECT 1 FROM jobs WHERE {CLAIMABLE})
            OR EXISTS (SELECT 1 FROM jobs WHERE {FOR_A_TIME} AND run_at <= ?)""",
            self.clock())

    def clear_drain_counts(self):
        """Forget the counts of pools that are gone; count for this pool from 0."""
        with self.transaction():
            # Within it: a pool that counts has its file before its first count.
            living = {*living_pools(self.path)} - {self.draining_pool}
            for pool, in self.rows("SELECT DISTINCT pool FROM drains"):
                if pool not in living:
                    self.change("DELETE FROM drains WHERE pool = ?", pool)

    def drain_counts(self):
        """Return how many runs that this pool ended left a job in each finished state.

        Lost runs of other pools that it put an end to are among them.
        """
        rows = self.rows(
            "SELECT state, runs FROM drains WHERE pool = ?", self.draining_pool)
        return {**dict.fromkeys(FINISHED, 0), **dict(rows)}

    def wait(self, ids=None, timeout=None, on_check=lambda wait: None):
        """Wait until jobs are completed or dead, or until the rest can't go on.

        Without IDS, wait for all jobs that are unfinished now. Within a job of this
        queue QueueError is raised for what would wait for that very job. Return how
        many ended in each state and how many were `removed`; as `left` the ids of those
        that wait for a dead job; and without IDS as `died_before` how many dead jobs
        there were that nobody cancelled, since what became of a job must not depend on
        how soon it died. Return None after TIMEOUT seconds. `on_check` is called at
        each check with the `Wait`, which can count the jobs by state.
        """
        died_before = 0
        jobs = None if ids is None else self._named(ids)
        own = self.own_job()
        if own:
            self._refuse_waiting_for_itself(own, jobs)
        if jobs is None:
            ids, died_before = self._unfinished_and_dead()
        else:
            ids = [job["id"] for job in jobs if job["state"] not in FINISHED]
        wait = Wait(self, ids, on_check)
        for job in jobs or ():
            if job["state"] in FINISHED:
                wait.ended[job["state"]] += 1
        seconds = MAX_DURATION if timeout is None else timeout
        if not wait_until(wait.check, seconds, WAIT_INTERVAL):
            return None
        return dict(wait.ended, died_before=died_before, left=[*wait.unfinished])

    def own_job(self):
        """Return the job of this queue whose present run has started this process."""
        lease_path = os.environ.get("QUEUECTL_RUN")
        for run in self.processing_runs() if lease_path else ():
            if run.lease_path == lease_path:
                return self.job(run.id)
        return None

    def _refuse_waiting_for_itself(self, own, jobs):
        """Raise QueueError if one of these jobs needs the end of the job OWN."""
        if jobs is None:
            raise QueueError("wait: within job %s name ids, or it would wait for"
                             " itself", own["id"])
        for waited in jobs:
            if self.value(
                    NEEDS_END, waited=waited["seq"], seq=own["seq"], lock=own["lock"]):
                raise QueueError("wait: job %s needs the end of job %s, which would"
                                 " wait for itself", waited["id"], own["id"])

    def _unfinished_and_dead(self):
        """Return the ids of all unfinished jobs, and how many died uncancelled.

        In one statement: a job that dies between two would be in neither.
        """
        rows = self.rows(f"""
            SELECT id, 0 AS is_dead FROM jobs WHERE state = 'pending' UNION ALL
            SELECT id, state = 'dead' FROM jobs
                WHERE {RARE} AND (NOT {IS_FINISHED}
                    OR state = 'dead' AND NOT cancelled)""")
        unfinished = [id for id, is_dead in rows if not is_dead]
        return unfinished, sum(is_dead for _, is_dead in rows)

    # -- settings ----------------------------------------------------------------------

    def settings(self):
        """Return the value of every setting, the default where none was set."""
        stored = dict(self.rows("SELECT key, value FROM config"))
        return {name: json.loads(stored[name]) if name in stored else setting.default
                for name, setting in SETTINGS.items()}

    def set(self, name, value):
        """Check and store the value of a setting. Durations are seconds or texts."""
        name = setting_name(name)
        self._store(name, checked(name, SETTINGS[name].check, value))

    def unset(self, name):
        """Go back to the default of a setting."""
        self._remove(setting_name(name))

    def _store(self, key, value):
        query = "INSERT OR REPLACE INTO config VALUES (?, ?)"
        self.change(query, key, json.dumps(value))

    def _remove(self, key):
        self.change("DELETE FROM config WHERE key = ?", key)

    def set_paused(self, paused):
        """Let no job be claimed from now on, or let jobs be claimed again."""
        if paused:
            self._store("paused", True)
        else:
            self._remove("paused")
        wake_workers(self.path)

    def is_paused(self):
        """Tell whether no job may be claimed."""
        return bool(self.value(f"SELECT {PAUSED}"))

    # -- backup ------------------------------------------------------------------------

    def backup(self, path):
        """Copy the queue, as it is at one moment, into a new file; it may be in use.

        The copy is paused, and its running jobs are pending again, without an attempt
        counted: once it is restored, what has ended since the backup must not start by
        itself. The file gets its name when it is complete and was found sound: SQLite
        copies a damaged database without an error.
        """
        import tempfile

        if os.path.lexists(path):
            raise QueueError("there is a file %s already", path)
        folder, name = os.path.split(os.path.abspath(path))
        file, part = tempfile.mkstemp(prefix=name + ".", dir=folder)  # with mode 0600
        os.close(file)
        try:
            with contextlib.closing(sqlite3.connect(part)) as copy:
                self.db.backup(copy)
                trouble, = copy.execute("PRAGMA quick_check(1)").fetchone()
                if trouble != "ok":
                    raise QueueError("%s: the queue is damaged; restore a backup", path)
            with Queue(part, create=False) as copy:
                copy.set_paused(True)
                for run in copy.lost_runs():
                    copy.release(
                        run, Outcome("stopped", None, STOPPED, copy.clock(), b""))
            os.rename(part, path)
        except BaseException:
            for ending in ("", "-journal", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(part + ending)
            raise


class Wait:
    """The jobs that `Queue.wait` waits for, and what became of them."""

    def __init__(self, queue, ids, on_check):
        self.queue, self.on_check = queue, on_check
        self.unfinished = collections.deque(ids)
        is_large = len(self.unfinished) > MAX_WATCHED
        self.first = queue.counts() if is_large else None
        self.ended = dict.fromkeys((*FINISHED, "removed"), 0)
        self.began = time.monotonic()
        self.seen_at = {}  # {id: when the job was last seen unfinished}

    def check(self):
        """Look which jobs have ended. Return True if no other is left, or can go on.

        A job that was seen to end is not checked again, since it may be removed.
        """
        self.queue.require_file()
        stuck = []
        blocked = None  # it may take a while: read for a job that waits for another
        while self.unfinished:
            id = self.unfinished[-1]
            job = self.queue.row("SELECT seq, state, waits FROM jobs WHERE id = ?", id)
            state = job["state"] if job else self.state_of_gone(id)
            if state in FINISHED or state == "removed":
                self.ended[state] += 1
                self.unfinished.pop()
                continue
            self.seen_at[id] = time.monotonic()
            if job["waits"] and blocked is None:
                blocked = self.queue.blocked_seqs()
            if not job["waits"] or job["seq"] not in blocked:
                break  # this one may go on: the others need no check
            stuck.append(self.unfinished.pop())
        self.unfinished.extendleft(stuck)
        if len(self.unfinished) == len(stuck):
            return True
        self.on_check(self)  # now that what has ended is known
        return False

    def counts(self):
        """Return how many of the jobs are in each state, as `Queue.counts` does.

        Of too many, those of the queue are counted that have not ended before.
        """
        if self.first:
            return {state: max(0, count - self.first[state] * (state in FINISHED))
                    for state, count in self.queue.counts().items()}
        counts = {state: self.ended.get(state, 0) for state in STATES}
        for batch in batches(self.unfinished):
            ids = ", ".join("?" for _ in batch)
            for state, jobs in self.queue.rows(f"""
                    SELECT state, COUNT(*) FROM jobs WHERE id IN ({ids})
                    GROUP BY state""", *batch):
                counts[state] += jobs
        return counts

    def state_of_gone(self, id):
        """Return `completed` for a job that `keep` may have deleted, or `removed`.

        The job was unfinished when the wait began.
        """
        keep = self.queue.settings()["keep"]
        unseen = time.monotonic() - self.seen_at.get(id, self.began)
        return "removed" if keep is None or unseen < keep else "completed"


# ======================================================================================
# Statistics: what `status`, `stats` and the page tell of all jobs
# ======================================================================================


# What is left to do. What has no unit is a number of jobs.
Work = collections.namedtuple("Work", [
    "jobs",  # {state: number}
    "workers",  # as `Queue.workers` lists them
    # Of the jobs that wait:
    "delayed",  # those that wait for their time
    "retries",  # those of them that have failed before
    "dependent",  # those that wait for other jobs
    "ready",  # all others
    "locked",  # those of them that wait for their lock
    "line",  # the longest line of jobs that share a lock
    "line_seconds",  # how long that takes
    "line_began",  # whether one of them has run lately; else its turn has yet to come
    "lock_since",  # when the longest run began that has a lock which others wait for
    # What has happened lately:
    "run_seconds",  # the average of the last runs; None before the first has ended
    "rate",  # jobs that end each second; None if hardly any did in the last minute
    "growth"])  # that of `recent_growth`


def work_left(queue):
    """Return the `Work` that is left in a queue.

    The ready jobs are the kept count without the others, which are few, or have an
    index.
    """
    jobs = queue.counts()
    waiting = sum(map(jobs.get, WAITING))
    # What is overdue is ready, though no worker has seen it.
    delayed, retries = [queue.value(
        f"SELECT COUNT(*) FROM jobs WHERE {kind} AND run_at > ?", queue.clock())
        for kind in (FOR_A_TIME, f"state = 'failed' AND {RARE} AND {FOR_A_TIME}")]
    dependent = queue.value(
        f"SELECT COUNT(*) FROM jobs WHERE {UNFINISHED_DEPENDENT}")
    seconds = queue.value(f"SELECT AVG(spent) FROM ({recent_runs(queue)})")
    return Work(
        jobs=jobs, workers=queue.workers(), ready=waiting - delayed - dependent,
        delayed=delayed, retries=retries, dependent=dependent, run_seconds=seconds,
        rate=ending_rate(queue), growth=recent_growth(queue, seconds or 0),
        **locks_left(queue, seconds or 0))


def recent_runs(queue):
    """Return the SQL for the last runs: at least five, and those of ten minutes.

    They are of the jobs that were enqueued last: no index leads to the runs that ended
    last. Earlier ones may have been of other jobs.
    """
    runs = """SELECT seq, finished_at, finished_at - started_at AS spent FROM runs
        WHERE finished_at NOT NULL ORDER BY seq DESC, run DESC LIMIT 1000"""
    ends = [end for end, in queue.rows(
        f"SELECT finished_at FROM ({runs}) ORDER BY finished_at DESC LIMIT 5")]
    since = min(ends[0] - 600, ends[-1]) if ends else 0
    return f"SELECT * FROM ({runs}) WHERE finished_at >= {since!r}"


def locks_left(queue, run_seconds):
    """Return what a `Work` has about locks."""
    locked, line, lock = queue.row(f"""
        SELECT IFNULL(SUM(locked), 0), IFNULL(MAX(jobs), 0), lock
        FROM (SELECT SUM(gate = {LOCKED}) AS locked, SUM(gate <> {CLOSED}) AS jobs, lock
            FROM (SELECT lock, gate FROM jobs
                WHERE lock NOT NULL AND state = 'pending' LIMIT {COUNT_LIMIT})
            GROUP BY lock)""")
    seconds = line and queue.value(f"""
        SELECT AVG(spent) FROM ({recent_runs(queue)}) JOIN jobs USING (seq)
        WHERE lock = ?""", lock)
    since = queue.value(f"""
        SELECT MIN(started_at) FROM jobs JOIN runs USING (seq, run)
        WHERE state = 'processing' AND {RARE} AND EXISTS (
            SELECT 1 FROM jobs AS behind WHERE behind.lock = jobs.lock
            AND behind.state = 'pending' AND behind.gate = {LOCKED})""")
    return dict(locked=locked, line=line, line_seconds=line * (seconds or run_seconds),
                line_began=bool(seconds or since), lock_since=since)


def recent_growth(queue, run_seconds):
    """Return how many more jobs a minute were added than ended, least first.

    There are three numbers, for the last three periods: a heap that was enqueued at
    once is the growth of one. In each period a few runs end. What ended within
    `keep` was not deleted yet: otherwise the queue would seem to grow.
    """
    keep = queue.settings()["keep"]
    longest = 1800 if keep is None else min(1800, max(keep, 1))
    period = min(max(10, 2 * run_seconds), longest / 3)
    ended_since = " + ".join(f"""
        (SELECT COUNT(*) FROM jobs WHERE state = '{state}' AND updated_at > :moment)
        """ for state in FINISHED)  # each state has an index
    moments = [queue.clock() - count * period for count in (3, 2, 1, 0)]
    # Up to a constant, how many jobs were unfinished then.
    unfinished = [last_seq_at(queue, moment) + queue.value(
        f"SELECT {ended_since}", moment=moment) for moment in moments]
    return sorted(60 / period * (more - less)
                  for less, more in zip(unfinished, unfinished[1:]))


def last_seq_at(queue, moment):
    """Return the number of the last job that was enqueued by then.

    By bisection: to count a million new jobs would take a while.
    """
    low, high = 0, queue.value("SELECT MAX(seq) FROM jobs") or 0
    while low < high:
        middle = (low + high + 1) // 2
        created_at = queue.value("""
            SELECT created_at FROM jobs WHERE seq <= ? ORDER BY seq DESC LIMIT 1""",
            middle)
        if (created_at or 0) <= moment:
            low = middle
        else:
            high = middle - 1
    return low


def ending_rate(queue):
    """Return how many jobs end each second, None if hardly any did lately."""
    ends = " UNION ALL ".join(f"""SELECT * FROM (
        SELECT updated_at FROM jobs WHERE state = '{state}' AND updated_at > :since
        ORDER BY updated_at DESC LIMIT 1000)""" for state in FINISHED)
    count, first = queue.row(
        f"SELECT COUNT(*), MIN(updated_at) FROM ({ends})", since=queue.clock() - 60)
    return count / max(0.001, queue.clock() - first) if count >= 5 else None


def oldest_claimable(queue):
    """Return the job (`id`, `run_at`) that waits longest for a worker, or None.

    It is the first one of its priority, of at most a hundred priorities. A time
    may be long past: the job waits since it was enqueued, or since its last run ended.
    """
    return queue.row(f"""
        {LEVELS} SELECT id, max(run_at, created_at, IFNULL(finished_at, 0)) AS run_at
        FROM (SELECT priority FROM level LIMIT 100) AS level
        CROSS JOIN jobs ON seq = (SELECT seq FROM jobs
            WHERE {CLAIMABLE} AND jobs.priority = level.priority
            ORDER BY run_at, seq LIMIT 1)
        LEFT JOIN runs USING (seq, run)
        ORDER BY run_at, seq LIMIT 1""")


def count_delayed(queue):
    """Return how many jobs wait for their time alone."""
    return queue.value(f"SELECT COUNT(*) FROM jobs WHERE {FOR_A_TIME}")


def count_cancelled(queue):
    """Return how many of the dead jobs somebody cancelled.

    By their error, which has an index, and which only `cancel` gives.
    """
    return queue.value(
        "SELECT COUNT(*) FROM jobs WHERE state = 'dead' AND error = ?", CANCELLED)


def longest_line(queue):
    """Return the `lock` that most `jobs` are behind, or None if no job is behind one.

    `first` is the job before them.
    """
    line = queue.row(f"""
        SELECT lock, COUNT(*) AS jobs FROM (
            SELECT lock FROM jobs WHERE lock NOT NULL AND state = 'pending'
                AND gate = {LOCKED} LIMIT {COUNT_LIMIT})
        GROUP BY lock ORDER BY jobs DESC, lock LIMIT 1""")
    holder = line and queue.lock_holder(line)
    return holder and dict(line, first=queue.job(holder))


def blocked_by_errors(queue):
    """Return how many jobs wait for the dead of each error, if any: {error: jobs}.

    They wait directly or not. They are counted up to ten thousand.
    """
    return dict(queue.rows(f"""
        {blocked_table(with_root=True)}
        SELECT error, COUNT(DISTINCT waiting.seq)
        FROM (SELECT seq, root FROM blocked LIMIT {COUNT_LIMIT}) AS waiting
        JOIN jobs ON jobs.seq = root GROUP BY error"""))


def common_errors(queue, condition):
    """Return the errors of jobs, each with its count, the most common first."""
    return queue.rows(f"""
        SELECT error, COUNT(*) AS jobs FROM jobs WHERE {condition.sql}
        GROUP BY error ORDER BY jobs DESC""", **condition.values)


def dead_by_error(queue):
    """Return the errors of dead jobs as dicts, the most common first.

    `jobs` is their number, `latest` the time of the latest death, `id` that job,
    `is_cancelled` whether somebody cancelled it, and `tails` the ends of what the
    latest jobs printed, which say more than `exit 1`; None is a long one.
    """
    with queue.snapshot():  # or the latest job of an error may be gone
        groups = queue.rows("""
            SELECT error, COUNT(*) AS jobs, MAX(updated_at) AS latest FROM jobs
            WHERE state = 'dead' GROUP BY error ORDER BY jobs DESC, latest DESC
            LIMIT ?""", MAX_ERRORS)
        tails = min(20, 100 // (len(groups) or 1))
        return [with_latest(queue, dict(group), tails) for group in groups]


def with_latest(queue, group, limit):
    """Return a group of `dead_by_error` with what it has of its latest jobs.

    A long output is read only of the first job.
    """
    first, *others = queue.rows("""
        SELECT id, seq, run, cancelled FROM jobs WHERE state = 'dead' AND error IS ?
        ORDER BY updated_at DESC LIMIT ?""", group["error"], limit)
    return dict(group, id=first["id"], is_cancelled=first["cancelled"],
                tails=[queue.tail(first, MAX_INTEGER), *map(queue.tail, others)])


def last_ended(queue, limit):
    """Return the jobs that ended last, latest first; each state has an index."""
    latest = " UNION ALL ".join(f"""SELECT * FROM (
        SELECT id, state, error, updated_at FROM jobs WHERE state = '{state}'
        ORDER BY updated_at DESC LIMIT :limit)""" for state in FINISHED)
    query = f"{latest} ORDER BY updated_at DESC LIMIT :limit"
    return queue.rows(query, limit=limit)


def run_totals(queue):
    """Return number and seconds of all runs there ever were: {total: (n, s)}."""
    rows = queue.rows("SELECT total, runs, seconds FROM totals")
    return {total: (runs, seconds) for total, runs, seconds in rows}


def run_bars(queue, since, width):
    """Return sums of the runs finished since a time, by bars of WIDTH seconds."""
    return queue.rows(f"""
        SELECT MIN(CAST((finished_at - :since) / :width AS INTEGER), :last) AS bar,
            SUM(total = 'completed') AS completed,
            SUM(total = 'failed') AS failed,
            SUM(total = 'interrupted') AS interrupted,
            SUM(attempt > 1) AS retries,
            SUM(finished_at >= :minute_ago) AS latest
        FROM (SELECT *, {TOTAL_OF_RUN} AS total FROM runs
            WHERE finished_at >= :since) GROUP BY bar""",
        since=since, width=width, last=BARS - 1, minute_ago=queue.clock() - 60)


def run_sample(queue, since):
    """Return command, kind, error, run time and wait of runs finished since a time.

    Without interrupted ones, which tell no run time. At most fifty thousand, those
    of the jobs that were enqueued last: a million would take seconds.
    """
    # `run_at` is a later time if the job was put back into the queue since.
    return queue.rows(f"""
        SELECT command, kind, runs.error, finished_at - started_at AS spent,
            CASE WHEN jobs.run = runs.run AND started_at >= run_at
                THEN started_at - max(run_at, created_at) END AS waited
        FROM runs JOIN jobs USING (seq)
        WHERE finished_at >= ? AND {TOTAL_OF_RUN} <> 'interrupted'
        ORDER BY seq DESC LIMIT 50000""", since)


# -- what `stats` shows ----------------------------------------------------------------

BARS = 60  # of the picture of throughput
BINS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # seconds, of run times


def read_stats(queue, since):
    """Return the document of `stats` on the runs that finished since a time.

    Its counts are of all these runs; times, commands and errors are of a sample.
    """
    now = queue.clock()
    period = max(now - since, 1.0)
    width = ceil_div(period, BARS)  # whole seconds
    with queue.snapshot():  # so that the sample has runs if there are any
        rows = run_bars(queue, since, width)
        sample = run_sample(queue, since)
    latest = sum(row["latest"] for row in rows)
    sums = {key: sum(row[key] for row in rows) for key in (*TOTALS, "retries")}
    judged = sums["completed"] + sums["failed"]
    runs = judged + sums["interrupted"]
    bars = [{"completed": 0, "failed": 0} for _ in range(BARS)]
    for row in rows:
        bars[row["bar"]] = {key: row[key] for key in ("completed", "failed")}
    return {
        "since": iso(since), "seconds": now - since, "runs": runs, **sums,
        "success_rate": sums["completed"] / judged if judged else None,
        "per_second": runs / period, "per_second_now": latest / min(60, period),
        **sample_stats(sample),
        "bar_seconds": width, "throughput": bars,
    }


def sample_stats(rows):
    """Return the statistics for which a sample of runs is sorted or grouped."""
    commands = collections.defaultdict(list)
    bins = [0] * (len(BINS) + 1)
    for row in rows:
        commands[row["command"]].append(row["spent"])
        bins[bisect.bisect(BINS, row["spent"])] += 1
    slowest = sorted(
        ({"command": line, "runs": len(times), "mean": sum(times) / len(times),
          "longest": max(times)} for line, times in commands.items()),
        key=lambda entry: -entry["mean"])
    errors = collections.Counter(
        row["error"] for row in rows if row["kind"] == "failed")
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


def ceil_div(a, b):
    """Return a / b, rounded up to a whole number."""
    return -(-a // b)


def percentiles(values):
    """Return median, 95th percentile and maximum; None without any value."""
    ordered = sorted(values) or [None]
    return {name: ordered[min(int(len(ordered) * part), len(ordered) - 1)]
            for name, part in (("median", 0.5), ("p95", 0.95), ("longest", 1))}


# ======================================================================================
# Runs: one command; its lease, its output, its end
# ======================================================================================

LEASE_FD = 20  # of the lease in a command: scripts use low numbers for their files
READ_SIZE = 2**20  # bytes: more than a pipe can hold, so that one read empties it
DROPPED_NOTE = b"[queuectl: %d bytes of output dropped here]\n"
DROPPED_PATTERN = re.compile(
    re.escape(DROPPED_NOTE).replace(b"%d", rb"([1-9]\d{0,18})"))

if WINDOWS:
    KILL = signal.SIGTERM
    KILL_ON_CLOSE, CREATE_SUSPENDED = 0x2000, 0x4
else:
    KILL = signal.SIGKILL
    ENVIRONMENT = dict(os.environb)  # of the pool; to read it for each run takes time
    ENVIRONMENT.pop(b"QUEUECTL_DETACHED", None)
    # A command starts with the default action of all signals. Otherwise what the pool's
    # shell ignored, and what Python ignores, would be ignored after the exec as well.
    ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


# -- the output of a run ---------------------------------------------------------------

# Where its beginning was dropped it starts with DROPPED_NOTE.


def split_dropped(output):
    """Return how many bytes were dropped before an output, and the output."""
    note = DROPPED_PATTERN.match(output)
    return (int(note[1]), output[note.end() :]) if note else (0, output)


def kept_end(output, limit):
    """Return the end of an output: LIMIT bytes of it are kept.

    If bytes were dropped before it, a note with their number comes first.
    """
    dropped, output = split_dropped(output)
    cut = max(0, len(output) - limit)
    note = DROPPED_NOTE % (dropped + cut) if dropped + cut else b""
    return note + output[cut:]


def max_file_size(limit):
    """Return how many bytes the file of a run may have before it is compacted.

    Twice what is kept, so that the copy of the end does not overlap the end, and as
    much more as a pipe holds.
    """
    return 2 * limit + 2**16


def read_output(path, limit):
    """Return the kept end of what a run has printed so far; b"" without its file.

    Its worker may be compacting the file: then this reads it again. While a file is
    compacted it is longer than it may be, and afterwards it starts with another note.
    """
    output = b""
    with contextlib.suppress(FileNotFoundError):
        for _ in range(10):
            with open(path, "rb", 0) as file:
                note = file.read(64)
                is_settled = os.fstat(file.fileno()).st_size <= max_file_size(limit)
                file.seek(0)
                output = file.read()
                file.seek(0)
                if is_settled and file.read(64).startswith(note):
                    break
            time.sleep(FILE_INTERVAL / 10)
    return kept_end(output, limit)


class Lease:
    """The file of a run: locked while any process of the run lives, and its output.

    At every moment the file ends with the end of the output that is kept, even if the
    worker is killed while it compacts the file.
    """

    def __init__(self, path, limit):
        self.path, self.limit = path, limit
        self.size = 0
        self.unwritten = b""  # what a full disk did not take
        self.fd = lock_file(path)

    def write(self, data):
        """Append output. Compact the file when it is longer than it may be."""
        self.unwritten += data
        try:  # on a full disk the end of the output stays in memory
            os.lseek(self.fd, self.size, os.SEEK_SET)
            written = os.write(self.fd, self.unwritten)
            self.unwritten = self.unwritten[written:]
            self.size += written
            if self.size > max_file_size(self.limit):
                self.compact()
        except OSError:
            # If more is unwritten than is kept, nothing of the file is needed.
            if len(self.unwritten) > self.limit:
                self.unwritten = self.output()
                self.empty()

    def compact(self):
        """Copy the end of the file to its beginning, then cut off all behind that.

        The two do not overlap, so the end is there at every moment.
        """
        kept = self.output()
        os.lseek(self.fd, 0, os.SEEK_SET)
        if os.write(self.fd, kept) == len(kept):
            os.ftruncate(self.fd, len(kept))
            self.size = len(kept)
            self.unwritten = b""

    def output(self):
        """Return the kept end of the output."""
        if not self.size and not self.unwritten:
            return b""
        os.lseek(self.fd, 0, os.SEEK_SET)
        return kept_end(os.read(self.fd, self.size) + self.unwritten, self.limit)

    def empty(self):
        """Give the space of the file back: on a full disk the result needs it."""
        os.ftruncate(self.fd, 0)
        self.size = 0

    def discard(self):
        """Remove the file, and only then let go of it.

        After a claim that was rolled back another worker takes a lease of this name.
        """
        with contextlib.suppress(OSError):
            os.remove(self.path)
        os.close(self.fd)
        if WINDOWS:  # an open file can't be removed there
            remove_leftover(self.path)


# -- a command, from its start to its end ----------------------------------------------

# Why a run ended: kind and error, as in `Outcome`.
End = collections.namedtuple("End", "kind error")
EXIT_KINDS = {0: "completed"}  # {exit code: kind}; a run with any other has failed


def exit_end(code):
    """Return the `End` of a run that ended by itself, by its exit code."""
    kind = EXIT_KINDS.get(code, "failed")
    if kind == "completed":
        return End(kind, None)
    return End(kind, "exit %d" % code if code > 0 else "signal %d" % -code)


class Unkillable(Exception):
    """Processes of a run that are still there after SIGKILL."""


class Termination:
    """How a run is ended: one SIGTERM to all its processes, after a grace SIGKILL.

    A timeout, `cancel`, `stop --now` and the end of an orphan all go this way. The run
    has ended when none of its processes is left, not when its leader has exited.
    Processes that a trap starts to clean up get no SIGTERM of their own.
    """

    def __init__(self):
        self.kill_at = time.monotonic() + TERM_GRACE
        self.term_sent = self.kill_sent = False

    def step(self, pids, send):
        """Signal the processes that are left, by `send(pids, signal)`."""
        self.kill_sent = time.monotonic() >= self.kill_at
        if self.kill_sent:
            send(pids, KILL)
        elif not self.term_sent:
            send(pids, signal.SIGTERM)
            self.term_sent = True

    def is_stuck(self):
        """Tell whether it takes too long: what is left seems to be unkillable."""
        return time.monotonic() >= self.kill_at + KILL_GRACE


class RunningCommand:
    """The command of a run, from its start until none of its processes is left.

    This class has what is the same on all systems. A class for a system has:
    `open_pipe`, which sets `reader` and `writer`; `start`, which sets `pid`; `wait`,
    for output, the end, a signal or a timeout; `readable_bytes`; `poll`, which returns
    the exit code or None; `processes` and `send_signal`.
    """

    def __init__(self, run, lease, path):
        """Start the command, with its output going to a pipe.

        Raise OSError if the system refuses to start it.
        """
        self.lease = lease
        self.kill_was_sent = False  # SIGKILL, by `terminate`
        # A job may name another queue. It can't pretend to be another run, since its
        # processes are found by the path of its lease.
        env = {"QUEUECTL_DB": path, **json.loads(run.env or "{}")}
        env.update(QUEUECTL_JOB_ID=run.id, QUEUECTL_ATTEMPT=str(run.attempt),
                   QUEUECTL_RUN=lease.path)
        # The writing end stays open here while the command lives: if its end closed the
        # pipe as well, each run would wake its worker twice.
        self.open_pipe()
        try:
            self.start(run.command, run.launcher, run.cwd, env)
        except BaseException:
            self.close()
            raise

    def read(self):
        """Take over what the command has printed so far; return True at the end.

        With one read: for `yes` a loop would never end.
        """
        with contextlib.suppress(BlockingIOError):
            size = self.readable_bytes()
            data = size and os.read(self.reader, size)
            if data:
                self.lease.write(data)
            return data == b""
        return False

    def watch(self, waiter, timeout, check):
        """Wait for the end of the command; return its exit code and None or an `End`.

        The exit code is -N if signal N ended the command. The `End` is why the
        command was ended from outside: for its timeout, or for what `check()` returned.
        If a signal killed the leader, all its processes are ended, or they would meet
        the next run. Raise Unkillable if one can't be ended.
        """
        deadline = time.monotonic() + (timeout or MAX_DURATION)
        next_check = time.monotonic() + POLL_INTERVAL
        code = end = None
        while code is None and end is None:
            self.wait(waiter, min(deadline, next_check) - time.monotonic())
            self.read()
            code = self.poll()
            now = time.monotonic()
            if code is None and now >= deadline:
                end = End("failed", "timeout %ss" % number_text(timeout))
            elif code is None and now >= next_check:
                next_check = now + POLL_INTERVAL
                end = check()
        if end or code < 0:
            self.terminate(waiter)
        if end:
            code = self.poll()  # only now: `terminate` has the reason
        return code, end

    def read_rest(self, waiter):
        """Read the pipe to its end, for at most REST_TIMEOUT while it is held open.

        A `tee` behind `exec > >(tee log)` gets the last lines after the leader's exit.
        """
        os.close(self.writer)
        self.writer = None
        deadline = time.monotonic() + REST_TIMEOUT
        while not self.read() and time.monotonic() < deadline:
            self.wait(waiter, deadline - time.monotonic())

    def terminate(self, waiter):
        """End every process that belongs to the run, or that the command has left.

        A living leader is not reaped before: as long as it is a zombie, no other
        process gets the number of its group.
        """
        termination = Termination()
        living = self.processes()
        while living:
            termination.step(living, self.send_signal)
            self.kill_was_sent = termination.kill_sent
            if termination.is_stuck():
                raise Unkillable(sorted(living))
            self.wait(waiter, STEP_INTERVAL)
            self.read()  # what prints while it ends must not wait for room in the pipe
            living = self.processes()

    def close(self):
        """Close the pipe. Processes left in the background go on."""
        os.close(self.reader)
        if self.writer is not None:
            os.close(self.writer)


class PosixCommand(RunningCommand):
    """A command in a session of its own, which inherits the lease."""

    def open_pipe(self):
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def readable_bytes(self):
        return READ_SIZE

    def start(self, line, launcher, cwd, env):
        """Start the command by posix_spawn.

        A run costs two milliseconds. Popen would add 0.25, and before Python 3.10 more
        than a whole one.
        """
        argv = ["/bin/sh", "-c", "--", line]
        if launcher:
            import shlex

            # A shell finds the program. It must not read the launcher: behind a # or
            # a ; there the command would not run, and the job would be completed.
            argv = ["/bin/sh", "-c", 'exec "$@"', "sh", *shlex.split(launcher), *argv]
        # Texts of a queue are UTF-8, whatever the locale of the pool is.
        argv = [word.encode() for word in argv]
        cwd = cwd.encode()
        env = {name.encode(): value.encode(errors="surrogateescape")
               for name, value in env.items()}
        # A lease that already has this number would be closed by the exec.
        lease_fd = LEASE_FD if self.lease.fd != LEASE_FD else LEASE_FD + 1
        spawn = functools.partial(
            os.posix_spawn, argv[0], argv, {**ENVIRONMENT, **env},
            setsigdef=ALL_SIGNALS, setsigmask=(), file_actions=(
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, self.writer, 1),
                (os.POSIX_SPAWN_DUP2, self.writer, 2),
                (os.POSIX_SPAWN_DUP2, self.lease.fd, lease_fd)))
        os.chdir(cwd)
        try:
            self.pid = spawn(setsid=True)
        except NotImplementedError:  # FreeBSD
            self.pid = spawn(setpgroup=0)
        finally:
            os.chdir("/")  # an idle worker must not keep a file system mounted

    def poll(self):
        """Return the exit code, or None; -N if signal N has ended the command."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.pid = None  # from now on another process can get this number
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)

    def wait(self, waiter, timeout):
        waiter.wait(timeout, self.reader)

    def processes(self):
        """Return the PIDs of the living processes.

        The leader needs no list of processes: it is our child, and not reaped yet.
        """
        pids = processes_of({self.lease.path: self.pid})[self.lease.path]
        if self.pid and os.waitid(
                os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            pids.add(self.pid)
        return pids

    def send_signal(self, pids, number):
        signal_processes(pids, number)


class WindowsCommand(RunningCommand):
    """A command in a job object, which ends with this worker."""

    job_object = None

    def open_pipe(self):
        handles = _winapi.CreatePipe(None, 2**16)
        self.reader, self.writer = (msvcrt.open_osfhandle(h, 0) for h in handles)

    def readable_bytes(self):  # to read more would wait
        handle = msvcrt.get_osfhandle(self.reader)
        try:
            available = _winapi.PeekNamedPipe(handle, 0)[0]
        except BrokenPipeError:
            return 1  # its end: the read returns nothing
        return min(available, READ_SIZE)

    def start(self, line, launcher, cwd, env):
        """Start the command suspended, until its job object can catch all children."""
        if is_network_path(cwd):  # of an older queue
            raise OSError(errno.EINVAL, "cmd.exe can't run in " + cwd)
        if launcher:
            line = launcher_line(launcher, line, cwd)
        added = {name.upper(): value for name, value in env.items()}  # as os.environ's
        # `timeout 3` needs a console. Anything else that the pool has for its input is
        # not meant for commands, and an open pipe would hang one that reads.
        stdin = _winapi.GetStdHandle(_winapi.STD_INPUT_HANDLE)
        self.popen = subprocess.Popen(
            line, shell=not launcher, cwd=cwd, env={**os.environ, **added},
            stdin=None if is_console(stdin) else subprocess.DEVNULL,
            stdout=self.writer, stderr=self.writer,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP | CREATE_SUSPENDED)
        self.pid = self.popen.pid
        process = wintypes.HANDLE(int(self.popen._handle))
        try:
            handle = self.require_success(KERNEL.CreateJobObjectW(None, None))
            self.job_object = wintypes.HANDLE(handle)
            self.set_limits(KILL_ON_CLOSE)
            self.require_success(
                KERNEL.AssignProcessToJobObject(self.job_object, process))
        except OSError:
            self.popen.kill()
            raise
        ctypes.WinDLL("ntdll").NtResumeProcess(process)

    @staticmethod
    def require_success(value):
        """Return the result of a call of the system, or raise its error."""
        if not value:
            raise ctypes.WinError(ctypes.get_last_error())
        return value

    def set_limits(self, flags):
        # JOBOBJECT_EXTENDED_LIMIT_INFORMATION: two 64-bit times, then the flags.
        limits = (wintypes.DWORD * (36 if sys.maxsize > 2**32 else 28))()
        limits[4] = flags
        self.require_success(KERNEL.SetInformationJobObject(
            self.job_object, 9, limits, ctypes.sizeof(limits)))

    def poll(self):
        return self.popen.poll()

    def wait(self, waiter, timeout):
        """Wait a short while: Windows can't wait for a pipe and a process at once."""
        seconds = max(0.0, min(timeout, STEP_INTERVAL / 5))
        if self.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(seconds)
        else:  # for output of what the command has left
            time.sleep(seconds)

    def processes(self):
        """Return as many numbers as the run has living processes."""
        accounts = (wintypes.DWORD * 12)()  # the eleventh: active processes
        KERNEL.QueryInformationJobObject(
            self.job_object, 1, accounts, ctypes.sizeof(accounts), None)
        return set(range(accounts[10]))

    def send_signal(self, pids, number):
        KERNEL.TerminateJobObject(self.job_object, 1)  # there is no other way

    def close(self):
        super().close()
        if self.job_object:
            self.set_limits(0)
            KERNEL.CloseHandle(self.job_object)


SystemCommand = WindowsCommand if WINDOWS else PosixCommand


# Arguments of Python: it passes a line on to cmd.exe, which does not understand the \"
# of other programs.
TO_SHELL = [
    "-ISc", "import subprocess, sys; code = subprocess.call(sys.argv[1], shell=True);"
    " sys.exit(code - 2**32 * (code >= 2**31))"]


def launcher_line(launcher, line, cwd):
    """Return the line that starts a command through a launcher, on Windows.

    A batch file passes %* on as it stands. A program gets its words as all programs
    read them, and quotes them in the same way for the program that it starts.
    """
    import shlex
    import shutil

    # The system itself would find only an .exe on PATH.
    name, *words = shlex.split(launcher)
    if os.path.dirname(name):
        program = shutil.which(os.path.join(cwd, name))
    else:
        path = cwd + os.pathsep + os.environ.get("PATH", "")
        program = shutil.which(name, path=path)
    words = [program or name, *words]
    if words[0].lower().endswith(BATCH_ENDINGS):
        return '%s cmd /d /s /c "%s"' % (subprocess.list2cmdline(words), line)
    return subprocess.list2cmdline([*words, sys.executable, *TO_SHELL, line])


# -- what belongs to a run, on POSIX ---------------------------------------------------


def signal_processes(pids, number):
    """Signal processes. Signal a whole group at once if its leader is among them.

    A shell that outlives its child for a moment would go on with its next command.
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
    """Return the living processes that belong to runs: {path of a lease: {pid}}.

    RUNS is {path of the lease: PID of the command if that is our child, else None}.
    A process belongs to a run if it can write to the lease, has that path in
    QUEUECTL_RUN, or is in the process group of our child. The whole path counts, so
    that a process of another queue, or of a copy of this one, is a stranger. No
    recorded PID is trusted. If nothing is found of a run, this scans again: a
    process may be forked during the first scan.
    """
    processes = {path: set() for path in runs}
    if WINDOWS or not runs:  # there a job object ends what a killed worker left
        return processes
    # {trace: path of the lease}: a process group by its number, a file by its path.
    owner = {pid: path for path, pid in runs.items() if pid}
    for path in runs:
        owner[path] = owner[path + " (deleted)"] = path  # if it was removed
    has_proc = os.path.exists("/proc/self/fd")
    # All processes of our child's run are younger than this one: others are left out.
    since = proc_stat("self").started if has_proc and all(runs.values()) else 0
    own = os.getpid()  # holds the lease of its run, and does not belong to it
    seen = set()
    for _ in range(2):
        for pid, trace in scan_proc(since, seen) if has_proc else scan_with_tools(runs):
            if trace in owner and pid != own:
                processes[owner[trace]].add(pid)
        if all(processes.values()):
            break
    return processes


def require_process_list():
    """Raise QueueError if this system can't list processes: runs could overlap."""
    if WINDOWS or os.path.exists("/proc/self/fd"):
        return
    if os.getpid() not in {pid for pid, _ in scan_with_tools([])}:
        raise QueueError("processes can't be listed: there is no /proc, and no working"
                         " ps; without them two runs of a job could overlap")


# A process that has just gone, or another user's. Any other error is raised: otherwise
# it would look as if nothing were left of a run.
GONE_OR_FOREIGN = FileNotFoundError, ProcessLookupError, PermissionError


# Fields of /proc/PID/stat (proc(5)). `started` is in ticks after the boot.
ProcStat = collections.namedtuple("ProcStat", "state group threads started")


def proc_stat(pid):
    """Return the `ProcStat` of a process."""
    with open_descriptor("/proc/%s/stat" % pid) as fd:
        # The name of the program, in brackets, may have a blank or a bracket in it.
        fields = os.read(fd, 4096).rpartition(b")")[2].split()
    return ProcStat(
        fields[0], int(fields[2]), threads=int(fields[17]), started=int(fields[19]))


def is_suspended(pid):
    """Tell whether a process was stopped by a signal, as Ctrl-Z sends it."""
    try:
        return proc_stat(pid).state == b"T"
    except OSError:  # without /proc it can't be known
        return False


def scan_proc(since, seen):
    """Yield (PID, trace) for each trace of each living process.

    A trace is the number of the process group, the path in QUEUECTL_RUN, or the path of
    a file that the process can write to. Processes that started before SINCE, in ticks
    after the boot, are left out. Those that were looked at are added to SEEN and left
    out from then on: the system does not give their numbers again so soon.
    """
    for pid in {*filter(str.isdigit, os.listdir("/proc"))} - seen:
        with contextlib.suppress(*GONE_OR_FOREIGN):
            process = proc_stat(pid)
            directory = "/proc/%s/" % pid
            has_ended = process.state in b"ZX"
            if (has_ended and process.threads == 1) or process.started < since:
                seen.add(pid)
                continue
            if has_ended:  # its main thread; the one that is listed last lives on
                directory += "task/%s/" % os.listdir(directory + "task")[-1]
            yield int(pid), process.group
            with open(directory + "environ", "rb", 0) as file:
                marked = (b"\0" + file.read()).split(b"\0QUEUECTL_RUN=")
            for mark in marked[1:]:
                yield int(pid), os.fsdecode(mark.partition(b"\0")[0])
            for fd in os.listdir(directory + "fd"):
                with contextlib.suppress(*GONE_OR_FOREIGN):
                    if os.lstat(directory + "fd/" + fd).st_mode & 0o200:
                        yield int(pid), os.readlink(directory + "fd/" + fd)
            seen.add(pid)


def scan_with_tools(leases):
    """Yield (PID, trace) like `scan_proc`, without /proc, for the files of LEASES.

    Process groups come from `ps`, open files from `lsof`.
    """
    import subprocess

    def lines_of(*argv):
        with contextlib.suppress(OSError):
            result = subprocess.run(
                argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            return map(os.fsdecode, result.stdout.splitlines())
        return ()

    for line in lines_of("ps", "-A", "-o", "pid=", "-o", "pgid=", "-o", "stat="):
        pid, group, state = line.split()[:3]
        if state[0] not in "ZX":
            yield int(pid), int(group)
    pid = access = None
    for line in lines_of("lsof", "-F", "pan", "--", *leases):
        field, value = line[:1], line[1:]
        if field == "p":
            pid = int(value)
        elif field == "a":
            access = value
        elif field == "n" and access in ("u", "w"):
            yield pid, value


# ======================================================================================
# Output: text for people; why a job waits; the verdict on a queue
# ======================================================================================


def duration_text(seconds):
    """Return a duration in two units at most: 43ms, 0.4s, 12s, 3m 20s, 4d 1h.

    Commands show durations so. Where a picture refreshes itself, and for what is only
    estimated, `roughly` is used instead.
    """
    if seconds < 0.0995:
        return "%.0fms" % (1000 * seconds) if seconds >= 0.0005 else "<1ms"
    if seconds < 9.95:
        return "%.1fs" % seconds
    least = 1 if seconds < 3600 else 60 if seconds < 86400 else 3600
    rest = least * round(seconds / least)  # before it is split: 59.7 is 1m, not 60s
    parts = []
    for unit in "dhms":
        count, rest = divmod(rest, UNITS[unit])
        if count or parts:
            parts.append("%d%s" % (count, unit))
    return " ".join(part for part in parts[:2] if part[0] != "0")


def roughly(seconds):
    """Return about how long a duration is, in one unit: 1 s, 19 min, 30 h, 4 d."""
    for least, unit, name in ((172800, "d", "d"), (5400, "h", "h"), (120, "m", "min")):
        if seconds >= least:
            return "%.0f %s" % (seconds / UNITS[unit], name)
    return "%d s" % max(1, seconds)


def rate_text(per_second):
    """Return how often something happens: 340/s, 5.1/s, 2/min, 16/h."""
    for seconds, unit in ((1, "s"), (60, "min"), (3600, "h")):
        count = per_second * seconds
        if not 0 < count < 1:
            break
    return "%s/%s" % ("%.2g" % count if count < 99.5 else grouped(round(count)), unit)


def relative_time(moment, now, text_of=duration_text):
    """Return a time as people say it: 2m 5s ago, in 4.0s."""
    if moment <= now:
        is_recent = now - moment < 0.0995 and text_of is duration_text
        return "just now" if is_recent else text_of(now - moment) + " ago"
    return "in " + text_of(moment - now)


def plural(count, noun):
    """Return a count with its noun: 1 job, 2,000 jobs."""
    many = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return "{:,} {}".format(count, noun if count == 1 else many)


def grouped(count):
    """Return a count with its thousands apart: 3,012."""
    return "{:,}".format(count)


def counts_text(counts):
    """Return the counts, but for zeros, each with its name: 30 completed, 2 dead."""
    return joined(*[count and grouped(count) + " " + name
                    for name, count in counts.items()])


def listed(words, most=3):
    """Return the first words, and how many more there are: a, b, c and 5 more."""
    more = " and %d more" % (len(words) - most) if words[most:] else ""
    return printable(", ".join(words[:most])) + more


def joined(*words, by=", "):
    """Return those of the words that are not empty, joined."""
    return by.join(filter(None, words))


def setting_with_unit(name, value):
    """Return the value of a setting as it can be set: 1h30m, 64K, none."""
    if value is None:
        return SETTINGS[name].none
    text = printable(value) if isinstance(value, str) else number_text(value)
    unit = SETTINGS[name].unit
    if not unit:
        return text
    if unit == "seconds":
        duration = duration_text(value).replace(" ", "")
        is_exact = value >= 10 and parse_duration(duration) == value
        return duration if is_exact else text + "s"
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if value >= size and value % size == 0:
            return "%d%s" % (value // size, letter)
    return text


# -- why no job is started -------------------------------------------------------------

LOST_HINT = "its worker died; the next pool %s"
ORPHAN_HINT = "its worker died, but its processes still run; the next pool ends them" \
    " and %s"
TO_RESUME = "to go on: %s resume" % PROGRAM
TO_START = "to start one: %s worker start" % PROGRAM
TO_ADD_WORKERS = "to add workers: %s worker start --count %%d" % PROGRAM
TO_START_ANOTHER = "to start another: %s worker start" % PROGRAM


def quoted(words):
    """Return the line that a shell takes apart into these words."""
    if WINDOWS:
        return subprocess.list2cmdline(words)
    import shlex

    return " ".join(map(shlex.quote, words))


def in_queue(path, hint):
    """Return a hint whose command names the queue, unless it would find it anyway."""
    if path == os.path.realpath(os.environ.get("QUEUECTL_DB") or "queuectl.db"):
        return hint
    return hint.replace(PROGRAM, "%s --db %s" % (PROGRAM, quoted([path])), 1)


# What `status` shows. Times are epoch seconds. What was not read is None.
Status = collections.namedtuple("Status", [
    *Work._fields,
    "path",  # of the queue
    "paused",  # whether it is
    "is_disk_full",
    "pools",  # their PIDs
    "stopping_pools",  # those of them that stop
    "commands",  # of the running jobs: {id: command}
    "lost",  # the ids of those without a worker
    "oldest_job",  # the job that waits longest for a worker
    "oldest_waiting",  # since when
    "next_job",  # the next job that is due
    "next_due",  # when
    "cancelled",  # how many of the dead jobs somebody has cancelled
    "blocked_seqs",  # the numbers of the jobs that wait for dead ones
    "blocked"],  # the first of them, as `Queue.first_blocked` returns it
    defaults=[None] * (len(Work._fields) + 14))

# What a queue comes down to.
Verdict = collections.namedtuple("Verdict", [
    "state",  # gives the colour
    "sentence",
    "advice",  # the next step, where there is one
    "harm"],  # what is dead or blocked in a queue that works in spite of it
    defaults=("", ""))


def obstacle(status):
    """Return the `Verdict` on a queue in which no job is started; None if jobs are."""
    if status.is_disk_full:  # workers wait with what their jobs have returned
        return Verdict("dead", "The disk is full", "pools go on when there is space")
    if status.paused:
        return Verdict("failed", "Paused", TO_RESUME)
    if not status.pools and status.workers:  # these finish their jobs
        return Verdict("dead", "The pool was killed", TO_START_ANOTHER)
    if not status.pools:
        return Verdict("dead", "No pool is running", TO_START)
    if not status.pools - status.stopping_pools:
        return Verdict("failed", "The pool is stopping", TO_START_ANOTHER)
    return None


def standstill(queue):
    """Return in words why no job is started, and the next step; nothing if jobs are."""
    pools = supervised_pools(queue.path)
    return standstill_text(Status(
        path=queue.path, paused=queue.is_paused(), pools=pools,
        stopping_pools=stopping(queue.path, pools),
        is_disk_full=is_disk_full(queue.path),
        workers=not pools and living_workers(queue.path)))


def standstill_text(status):
    """Return `standstill` for a `Status` that was read before."""
    verdict = obstacle(status)
    return with_advice(verdict, status.path, str.lower) if verdict else ""


def with_advice(verdict, path, first_letter=str):
    """Return a verdict and its advice as one text. FIRST_LETTER sets the case of it."""
    words = verdict_text(verdict)
    words = first_letter(words[0]) + words[1:]
    return joined(words, in_queue(path, verdict.advice), by="; ")


def verdict_text(verdict):
    """Return a verdict as one text, without its advice."""
    return joined(verdict.sentence, verdict.harm, by="; ")


def stopping(path, pools):
    """Return those of the pools that were asked to stop."""
    return {pool for pool in pools if requested_stop(path, pool)}


def blocked_text(blocked):
    """Return in words what `Queue.first_blocked` has found."""
    return "%s waits for %s, which is %s" % (
        blocked["id"], blocked["dependency"], state_word(blocked))


def state_word(job):
    """Return the state of a job; `cancelled` for a dead one that somebody cancelled."""
    return "cancelled" if job["state"] == "dead" and job["cancelled"] else job["state"]


# -- why a job is not running ----------------------------------------------------------

# What people call it, and the texts for that. Most of these functions take a job and a
# `Look`.

# A look at a queue. The page's `Page` is one as well.
Look = collections.namedtuple("Look", [
    "queue", "status", "now",
    "text_of",  # makes the text of a duration
    "standstill"],  # makes that of why no job is started, of a `Status`
    defaults=(duration_text, standstill_text))


def kind_of(job, look):
    """Return which of JOB_KINDS a job is."""
    if job["state"] == "processing" and job["id"] in look.status.lost:
        return "lost"
    if job["state"] != "pending":
        return state_word(job)
    if job["waits"]:
        is_blocked = job["seq"] in look.status.blocked_seqs
        return "blocked" if is_blocked else "behind a job"
    if job["gate"] == LOCKED:
        return "behind a lock"
    return "delayed" if due_text(job, look.now) else "pending"


def why_waiting(job, look):
    """Return in words why a job is not running; None if it runs or has finished."""
    kind = kind_of(job, look)
    if kind == "processing" or job["state"] in FINISHED:
        return None
    return JOB_KINDS[kind].sentence(job, look)


def due_text(job, now, text_of=duration_text):
    """Return when a job is due that waits for this time alone, else nothing."""
    if job["gate"] == CLOSED and not job["waits"] and job["run_at"] > now:
        return relative_time(job["run_at"], now, text_of)
    return ""


def tries_text(job):
    return "try %d of %d" % (job["attempts"], tries_allowed(job["max_retries"]))


def why_delayed(job, look):
    """Return when a job is due, and what will hold it up then."""
    words = "due"
    if job["state"] == "failed":
        words = "try %d is due" % (job["attempts"] + 1)
    words += " " + (due_text(job, look.now, look.text_of) or "now")
    return joined(words, look.standstill(look.status), by="; ")


def place_in_line(job, look):
    """Return why a job that is due does not run: a standstill, or jobs before it."""
    if job["gate"] == CLOSED:
        return why_delayed(job, look)  # it was due before a pool has seen it
    stopped = look.standstill(look.status)
    if stopped:
        return stopped
    ahead = look.queue.count_ahead(job)
    return plural(ahead, "job") + " before it" if ahead else "next in line"


def why_locked(job, look):
    """Return which job has the lock that a job waits for."""
    holder = look.queue.lock_holder(job)
    stopped = look.standstill(look.status)
    if stopped or not holder:  # it may have been the only one since
        return stopped or place_in_line(job, look)
    has = "has it" if look.queue.state(holder) == "processing" else "gets it first"
    return "waits for the lock %s: job %s %s" % (job["lock"], holder, has)


def why_lost(job, look):
    """Return what becomes of a running job without a worker."""
    is_orphan = is_locked(look.queue.latest_run(job).lease_path)
    hint = (ORPHAN_HINT if is_orphan else LOST_HINT) % (
        "makes the job dead" if job["cancelled"] else "runs the job again")
    return joined(hint, look.standstill(look.status), by="; ")


def why_behind(job, look):
    """Return for which jobs a job waits, and whether one of them is dead."""
    dependencies = look.queue.dependencies(job)
    if not dependencies:
        return place_in_line(job, look)  # they have just been completed
    first, *others = dependencies
    dead = first["state"] not in BLOCKING and look.queue.dead_before(job)
    message = "waits for " + first["id"]
    if not dead:
        message += ", which is " + state_word(first)
    if others:
        message += ", and for " + plural(len(others), "more job")
    if dead:
        message += ", behind %s, which is %s" % (dead["id"], state_word(dead))
    return message


def how_it_runs(job, look):
    """Return the try, how long it has taken, and why no other job is started."""
    stopped = "" if look.status.paused else look.standstill(look.status)
    since = "for " + look.text_of(look.now - job["started_at"])
    return joined(tries_text(job), since, stopped, by="; ")


def how_it_ended(job, look):
    """Return how long a completed job took, or the tries of a dead one, and when."""
    spent = tries_text(job)
    if job["state"] in SUCCESSFUL:
        spent = "took " + look.text_of(job["seconds"])
    changed = relative_time(job["updated_at"], look.now, look.text_of)
    return joined(spent, changed, by="; ")


def failed_text(job, look):
    """Return the error of a failed job, and when it is tried again."""
    due = due_text(job, look.now, look.text_of)
    return joined(job["error"], due and "again " + due)


def blocked_by(job, look):
    """Return the first job that a blocked one waits for, and what that one is."""
    dependencies = look.queue.dependencies(job)
    if not dependencies:
        return ""  # they have just been completed
    first = dependencies[0]
    word = state_word(first) if first["state"] in BLOCKING else "blocked"
    return "after %s (%s)" % (first["id"], word)


# What people call a job: the queue knows some of these as one state.
JobKind = collections.namedtuple("JobKind", [
    "state",  # gives the colour
    "icon",  # the lines of a picture of 16 x 16
    "sentence",  # makes the answer of `show`, of a job and a `Look`
    "short",  # makes the few words of a list
    "next_step"],  # what people may want
    defaults=(lambda job, look: "", None))
# What a command does for a job, and the command.
NextStep = collections.namedtuple("NextStep", "purpose command")
RUN_AGAIN = NextStep("to run it again", "retry {}")
GO_ON = NextStep("to go on", "retry {}")
RING = "M8 2a6 6 0 1 1 0 12 6 6 0 0 1 0-12"
JOB_KINDS = {
    "pending": JobKind(  # with an error, if it has failed before
        "pending", RING, place_in_line, lambda job, look: job["error"] or ""),
    "delayed": JobKind(
        "pending", RING + "M8 5v3.5l2.5 1", why_delayed,
        lambda job, look: "due " + due_text(job, look.now, look.text_of)),
    "behind a job": JobKind(
        "pending", "M2 8h7M6 4l4 4-4 4M14 2v12", why_behind,
        lambda job, look: "after " + job["waits_for"].replace("\n", ", ")),
    "behind a lock": JobKind(
        "pending", "M3 7h10v7H3zM5 7V5a3 3 0 0 1 6 0v2", why_locked,
        lambda job, look: "lock " + job["lock"]),
    "blocked": JobKind(
        "dead", "M5 2h6l3 3v6l-3 3H5l-3-3V5zM5 8h6", why_behind, blocked_by),
    "processing": JobKind(
        "processing", "M8 2a6 6 0 1 1-6 6", how_it_runs,
        next_step=NextStep("to follow its output", "logs -f {}")),
    "lost": JobKind(
        "failed", "M8 2a6 6 0 0 1 6 6M8 14a6 6 0 0 1-6-6", why_lost,
        lambda job, look: WORKER_DIED),
    "completed": JobKind(
        "completed", "M2 9l4 4 8-9", how_it_ended, next_step=RUN_AGAIN),
    "failed": JobKind(
        "failed", "M13 10a5.5 5.5 0 1 1 0-4M14 1v5H9", why_delayed, failed_text,
        NextStep("to try it now", "edit {} --run-at now")),
    "dead": JobKind(
        "dead", "M3 3l10 10M13 3 3 13", how_it_ended, lambda job, look: job["error"],
        RUN_AGAIN),
    "cancelled": JobKind(
        "pending", RING + "M4 12l8-8", how_it_ended, lambda job, look: job["error"],
        RUN_AGAIN),
}


def short_reason(job, look):
    """Return the few words of a list on why a job waits or has failed, or nothing."""
    return JOB_KINDS[kind_of(job, look)].short(job, look)


# -- how far a queue is ----------------------------------------------------------------


def verdict_on(status, now):
    """Return the `Verdict` on a queue by its `Status`."""
    verdict = verdict_at_rest(status) or verdict_at_work(status, now)
    harm = harm_text(status)
    if harm and verdict.state in ("processing", "completed"):
        return verdict._replace(state="dead", harm=harm)
    return verdict


def verdict_at_rest(status):
    """Return the `Verdict` on a queue in which no job is started, else None."""
    jobs = status.jobs
    blocked = len(status.blocked_seqs)
    can_go_on = status.oldest_job or status.locked or status.next_job
    if not status.paused:
        if not any(jobs.values()):
            return Verdict("pending", "No jobs yet",
                           "to add one: %s enqueue -- echo hello" % PROGRAM)
        if not count_unfinished(jobs):
            counts = counts_text({"completed": jobs["completed"],
                                  "cancelled": status.cancelled})
            return Verdict("completed", joined("Ended", counts, by=": "))
        if blocked and not can_go_on and not jobs["processing"]:
            sentence = "Stuck: %s behind dead ones" % plural(blocked, "job")
            return Verdict(
                "dead", sentence, "retry the dead ones, or cancel what waits")
    verdict, waiting = obstacle(status), waiting_text(status)
    return verdict and verdict._replace(sentence=joined(
        joined(verdict.sentence, waiting, by=": "), harm_text(status), by="; "))


def verdict_at_work(status, now):
    """Return the `Verdict` on a queue whose jobs a pool starts."""
    ready = grouped(max(1, status.ready - status.locked))
    due = status.next_due
    least, growth, _ = status.growth
    has_waited = now - (status.oldest_waiting or now)
    if least >= 1 and has_waited > 5:  # else workers are free now and then
        more = 1 + int(growth * (status.run_seconds or 0) / 60)
        sentence = "Falling behind: %s waiting, %s more a minute" % (
            ready, grouped(round(growth)))
        return Verdict("failed", sentence, TO_ADD_WORKERS % more)
    if status.oldest_job and has_long_runs_only(status, now):
        sentence = "Held up: %s waiting, and all %s in long runs" % (
            ready, plural(len(status.workers), "worker"))
        return Verdict("failed", sentence, TO_ADD_WORKERS % len(status.workers))
    if status.oldest_job or due is not None and due <= now:
        return Verdict("processing", done_in(
            "Working: " + ready + " waiting", time_left(status, now, of_all=False)))
    if status.locked or status.jobs["processing"]:
        return Verdict("processing", done_in(
            "Keeping up: no job waits for a worker",
            status.locked and time_left(status, now)))
    return Verdict("completed", "Idle: the next job is due "
                   + relative_time(due or now, now, roughly))


def has_long_runs_only(work, now):
    """Tell whether all workers are in runs that are longer than those before them."""
    return work.run_seconds is not None and bool(work.workers) and all(
        now - (worker["since"] or now) > max(30, 10 * work.run_seconds)
        for worker in work.workers)


def done_in(words, left):
    return joined(words, left and "done in about " + left)


def harm_text(status):
    """Return in words how many jobs are dead or blocked: 2 dead, 5 blocked."""
    return counts_text({"dead": status.jobs["dead"] - status.cancelled,
                        "blocked": len(status.blocked_seqs)})


def waiting_text(status):
    """Return in words how many jobs wait for a worker, and how many lost theirs."""
    ready = status.ready - status.locked
    return counts_text({"job waits" if ready == 1 else "jobs wait": ready,
                        "without a worker": len(status.lost)})


def time_left(work, now, of_all=True):
    """Return about how long the waiting jobs will take, nothing if nobody can tell.

    WORK is a `Work` or a `Status`. Jobs that come after others may run one by one.
    Nobody knows when a run ends that takes longer than those before it. Unless the time
    is that OF_ALL, such runs are left out, and so are the jobs behind their lock.
    """
    workers, mean = len(work.workers), work.run_seconds
    jobs = work.ready + work.jobs["processing"]
    ended = sum(map(work.jobs.get, FINISHED))
    if not workers or mean is None or ended < 5:  # too few to know those that follow
        return ""
    if not jobs or work.growth[1] > 0 or work.dependent > jobs:
        return ""
    is_held = is_lock_held_long(work, now)
    if is_held:
        jobs, work = jobs - work.locked, work._replace(line=0, line_seconds=0)
    seconds = expected_seconds(jobs, workers, work)
    usual = max(1, min(seconds, 10 * mean))
    long = sum(now - (worker["since"] or now) > usual for worker in work.workers)
    if 2 * long > workers or of_all and (long or is_held):
        return ""
    seconds = expected_seconds(max(0, jobs - long), workers - long, work)
    return range_text(seconds, jobs / (work.rate or MAX_INTEGER), mean)


def is_lock_held_long(work, now):
    """Tell whether a run has the lock of others for longer than runs with it take."""
    if not work.locked:
        return False
    usual = max(work.run_seconds, work.line_seconds / work.line)
    return now - (work.lock_since or now) > max(1, 2 * usual)


def range_text(seconds, by_rate, mean):
    """Return about how long jobs will take by their runs, or by how many ended lately.

    Where these differ much it is a range, or nothing. Of short runs only the rate tells
    how long they take with all that is around them.
    """
    if mean < 0.1:
        return roughly(max(seconds, by_rate))
    if by_rate > 10 * seconds:
        return ""
    if by_rate > 2 * seconds:
        return roughly(seconds) + " to " + roughly(by_rate)
    return roughly(max(seconds, by_rate))


def expected_seconds(jobs, workers, work):
    """Return how long so many jobs should take.

    Those that share a lock run one after the other, however many workers there are.
    """
    seconds = work.run_seconds * jobs / workers
    line = work.line_seconds
    if work.line and not work.line_began:
        line += work.run_seconds * max(0, jobs - work.line) / workers
    return max(1, work.run_seconds, seconds, line)


def count_unfinished(counts):
    return sum(count for state, count in counts.items() if state not in FINISHED)


def progress_text(rest, left, counts, width):
    """Return a line on the progress of jobs: the REST in words, and the time LEFT.

    COUNTS tells how many run, and have ended. What matters most is first: from the
    first part that does not fit into the width on, all is left out.
    """
    running = grouped(counts["processing"]) + " running"
    parts = [rest, left and "about %s left" % left, running, ended_text(counts)]
    while len(joined(*parts)) > width and parts[1:]:
        parts.pop()
    return joined(*parts)


def ended_text(counts):
    """Return in words how many jobs have ended."""
    return counts_text({state: counts[state] for state in FINISHED})


# -- the output of a run as a terminal would show it -----------------------------------

# Sequences of a terminal: colours and what moves its cursor, as ESC [1;31m; titles, as
# ESC ]0;make BEL; others, as ESC M. Kept as texts: to compile them at each start would
# take time.
SEQUENCE = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[^\[\]])"
COLOURS = r"\x1b\[([0-9;]{0,99})m"
# What a job may not do to the terminal on which its output is read; a colour it may.
UNWANTED = r"(%s)|%s|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]" % (COLOURS, SEQUENCE)


def last_lines(output, count):
    """Return the last lines of an output that are not blank, without their colours."""
    text = split_dropped(output)[1][-TAIL_SIZE:].decode("utf-8", FOREIGN_BYTES)
    lines = re.sub(SEQUENCE, "", text).replace("\r", "\n").split("\n")
    lines = [line.rstrip() for line in lines if line.strip()][-count:]
    return [line if len(line) <= 200 else line[:199] + drawable("…", "~")
            for line in lines]


def last_line(output):
    """Return the last line of an output that is not blank, or nothing."""
    return "".join(last_lines(output or b"", 1)).strip()


# A style is a line of names, which are classes of the page: a1 to a6 for a colour of
# ANSI, b1 to b6 for the colour behind the text, and these.
STYLES = {"1": "bold", "4": "underlined", "7": "reversed"}
STYLE_ENDS = {"22": "bold", "24": "underlined", "27": "reversed"}


def painted(output, style):
    """Return the parts of an output, each with its style, and the style at the end.

    All other sequences are left out. Of a line that was written over after \\r the last
    text is left.
    """
    lines = output.decode("utf-8", FOREIGN_BYTES).split("\n")
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
    parts = []
    for at, part in enumerate(re.split(COLOURS, text)):
        if at % 2:
            style = style_after(iter(part.split(";")), style)
        elif part:
            parts.append((re.sub(SEQUENCE, "", part), style))
    return parts, style


def style_after(codes, style):
    """Return the style after the codes of one sequence."""
    names = {*style.split()}
    for code in codes:
        code = code.lstrip("0")
        colour = re.fullmatch("(3|4|9|10)([0-9])", code)
        if not code:
            names.clear()
        elif code in STYLES:
            names.add(STYLES[code])
        elif code in STYLE_ENDS:
            names.discard(STYLE_ENDS[code])
        elif colour:
            layer, number = "a" if colour[1] in "39" else "b", int(colour[2])
            if number == 8:  # followed by 5;N or by 2;R;G;B
                values = itertools.islice(codes, 3 if next(codes, "") == "2" else 1)
                number = nearest_colour([int(value or 0) for value in values])
            names -= {layer + str(other) for other in range(1, 7)}
            if 1 <= number <= 6:  # white, and black, are the page's own
                names.add(layer + str(number))
    return " ".join(sorted(names))


def nearest_colour(values):
    """Return the colour nearest to one of 256, or to red, green and blue up to 255."""
    if len(values) == 1:
        number = values[0]
        if number < 16:  # one of the first, which terminals have names for
            return number % 8 % 7
        cube = number - 16
        if cube >= 216:  # a grey
            return 0
        values = [cube // 36, cube // 6 % 6, cube % 6]
    bits = [2 * value > max(values) for value in values]
    return sum(bit << at for at, bit in enumerate(bits)) % 7


def overwritten(line):
    """Return how many bytes of a line it has written over itself."""
    return line.rstrip(b"\r").rfind(b"\r") + 1


# -- lines for people ------------------------------------------------------------------

DIM = 2  # a code of ANSI, like the colours of states


class Line(str):
    """A line of text of which one part, from START to END, has a colour."""

    def __new__(cls, text, colour, start=0, end=None):
        line = super().__new__(cls, text)
        line.colour, line.start = colour, start
        line.end = len(text) if end is None else end
        return line


def state_line(before, state, behind):
    """Return a line in which a state has its colour; None is no state."""
    if state is None:
        return before + behind
    start = len(before)
    return Line(before + state + behind, STATES[state].colour, start,
                start + len(state))


def notice(message):
    """Print a line for people on standard error."""
    with contextlib.suppress(OSError):  # its reader is gone
        print(for_standard_error("queuectl: %s" % message), file=sys.stderr, flush=True)


def for_standard_error(line):
    """Return a line as standard error shows it: wrapped and painted on a terminal."""
    lines = wrapped(line, terminal_width(sys.stderr))
    return "\n".join(map(painter(sys.stderr), lines))


# What is not broken into lines: a command up to its end or a gap, as in
# `queuectl logs 'a b' | tail; ...`, a time, as `26 s` or `1m 3s`, or a word.
UNBROKEN = re.escape(PROGRAM) + (
    r"(?= )(?: ?(?:'[^']*'|\"[^\"]*\"|[^ ;)'\"]))*[;)]?"
    r"|\d+(?: (?:s|min|h|d)\b|[dhm] \d+[hms])\S*|\S+")


def wrapped(line, width):
    """Return the lines that a text takes on a terminal, broken between words.

    A command that is longer than a line is left to the terminal, so that it can be
    copied. What stands behind a gap, as in a help, stays behind it.
    """
    if width is None or display_width(line) <= width:
        return [line]
    gaps = [gap.end() for gap in re.finditer(r"\S {2,}", line[: 2 * width // 3])]
    margin = gaps[-1] if gaps else len(line) - len(line.lstrip()) + 2
    parts = []
    start = end = indent = 0
    for word in re.finditer(UNBROKEN, line):
        if end and indent + display_width(line[start : word.end()]) > width:
            parts.append(part_of(line, start, end, indent))
            start = word.start()
            indent = margin
        end = word.end()
    return [*parts, part_of(line, start, end, indent)]


def part_of(line, start, end, indent):
    """Return a part of a line, indented; its coloured part keeps the colour."""
    text = " " * indent + line[start:end]
    shift = indent - start
    if not isinstance(line, Line) or not start < line.end or not line.start < end:
        return text
    return Line(text, line.colour, max(indent, line.start + shift), line.end + shift)


def painter(stream):
    """Return the function that paints a `Line` for a terminal that wants colours."""
    if terminal_width(stream) is None or os.environ.get("NO_COLOR"):
        return str

    def paint(line):
        if not isinstance(line, Line) or line.colour is None:
            return line
        return "%s\x1b[%dm%s\x1b[0m%s" % (
            line[: line.start], line.colour, line[line.start : line.end],
            line[line.end :])

    return paint


def terminal_width(stream):
    """Return how many columns a terminal has, None if the stream is not one."""
    size = terminal_size(stream)
    return size and size.columns


def terminal_size(stream):
    """Return the size of a terminal, None for another stream or a dumb terminal."""
    if os.environ.get("TERM") == "dumb":
        return None
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return None
    # A terminal that does not know its size says 0.
    return os.terminal_size((size.columns or 80, size.lines or 24))


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
    text = text[: 3 * width]  # a very long one would be measured too often
    while text and display_width(text) >= width:
        text = text[:-1]
    return text + drawable("…", "~")


def cut_in_middle(text, width):
    """Return a text, or both ends of one: ids often differ in a number at their end."""
    if width is None or display_width(text) <= width:
        return text
    end = truncate(text[::-1], (width - 1) // 2 + 1)[-2::-1]
    return truncate(text, width - display_width(end)) + end


def drawable(characters, fallback):
    """Return characters for a picture, or FALLBACK if the output can't show them."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
        return characters
    except UnicodeEncodeError:
        return fallback


def table(titles, rows, width=None, state_column=None):
    """Yield the lines of a table, each cell cut to fit a terminal of this width.

    Column widths come from the first batch of rows, so that a million can be streamed.
    A state gets its colour.
    """
    rows = iter(rows)
    batch = list(itertools.islice(rows, BATCH_SIZE))
    widths = [max(map(display_width, column)) for column in zip(titles, *batch)]
    if width:
        widths = fitted(widths, width - 2 * (len(widths) - 1))

    def padded(row):
        for at, room in enumerate(widths):
            cell = (truncate if at else cut_in_middle)(row[at], width and room)
            yield cell + " " * (room - display_width(cell))

    yield Line("  ".join(padded(titles)).rstrip(), DIM)
    for row in itertools.chain(batch, rows):
        cells = list(padded(row))
        line = "  ".join(cells).rstrip()
        if state_column is not None:
            before = "  ".join(cells[:state_column]) + "  "
            state = row[state_column]
            line = state_line(before, state, line[len(before) + len(state) :])
        yield line


def fitted(widths, room):
    """Return the widths of columns that fit into this room.

    First the last column gets narrower, then the widest ones: it has the commands, of
    which twenty columns, or a third of a narrow terminal, still tell them apart.
    """
    least = min(20, room // 3)
    # One long id must not push all else off the screen.
    widths = [min(width, 40) for width in widths[:-1]] + [min(widths[-1], room)]
    while sum(widths) > room:
        at = -1 if widths[-1] > least else widths.index(max(widths))
        widths[at] -= 1
    return widths


# A column of a table of jobs: its title; its rank for a terminal, which shows as many
# as fit (None: not this one); and the function of a job and a `Look` that makes its
# text.
ListColumn = collections.namedtuple("ListColumn", "title rank text")


def last_columns(changed, reason):
    """Return the last columns, of which two have the titles CHANGED and REASON."""
    return [
        ListColumn(changed, 5, lambda job, look: relative_time(
            job["updated_at"], look.now)),
        ListColumn(reason, 2, lambda job, look: printable(short_reason(job, look))),
        ListColumn("COMMAND", 3, lambda job, look: printable(job["command"])),
    ]


LIST_COLUMNS = [
    ListColumn("ID", 0, lambda job, look: job["id"]),
    ListColumn("STATE", 1, lambda job, look: job["state"]),
    ListColumn("TRIES", 4, lambda job, look: "%d/%d" % (
        job["attempts"], tries_allowed(job["max_retries"]))),
    *last_columns("CHANGED", "WHY"),
]
DLQ_COLUMNS = [LIST_COLUMNS[0], LIST_COLUMNS[1]._replace(rank=None),  # it is `dead`
               LIST_COLUMNS[2], *last_columns("DIED", "ERROR")]


def job_table(jobs, look, columns):
    """Return the lines of a table of jobs; a terminal gets the columns that fit."""
    width = terminal_width(sys.stdout)
    if width:
        jobs = iter(jobs)
        first = list(itertools.islice(jobs, BATCH_SIZE))
        jobs = itertools.chain(first, jobs)
        *_, reason, last = columns
        columns = columns_that_fit(columns, first, look, width)
        if last not in columns:
            look = look._replace(text_of=lambda time: duration_text(time).split()[0])
            if reason not in columns:
                columns.append(last)
            elif not all(reason.text(job, look) for job in first):
                columns[-1] = either(reason, last)
    titles = [column.title for column in columns]
    rows = ([column.text(job, look) for column in columns] for job in jobs)
    state_column = titles.index("STATE") if "STATE" in titles else None
    return table(titles, rows, width, state_column)


def columns_that_fit(columns, jobs, look, width):
    """Return the columns that have a text, but those for which there is no room.

    Twenty columns of the terminal are enough for each.
    """
    shown, room = [], width + 2
    for column in sorted(columns, key=lambda column: column.rank or 0):
        widths = [display_width(column.text(job, look)) for job in jobs]
        if any(widths) and column.rank is not None:
            room -= 2 + min(20, max(len(column.title), *widths))
            if room >= 0 or column.rank <= 2:  # what a job is and why
                shown.append(column)
    return [column for column in columns if column in shown]


def either(first, second):
    """Return a column that has the text of the first one, or else of the second."""
    return ListColumn("%s or %s" % (first.title, second.title), 2, lambda job, look: (
        first.text(job, look) or "$ " + second.text(job, look)))


def run_table(runs, now):
    """Return the lines of a table of a job's runs."""
    rows = []
    for run in runs:
        is_running = run["finished_at"] is None
        seconds = now - run["started_at"] if is_running else run["seconds"]
        result = "running" if is_running else printable(run["error"] or "exit 0")
        rows.append([
            str(run["run"]), str(run["attempt"]), relative_time(run["started_at"], now),
            duration_text(seconds), result])
    titles = ["RUN", "TRY", "STARTED", "TOOK", "RESULT"]
    return table(titles, rows, terminal_width(sys.stdout))


def stats_lines(stats, width):
    """Yield what `stats` prints."""
    period = duration_text(stats["seconds"])
    yield "%s in %s: %s completed, %s failed (%s); %s interrupted" % (
        plural(stats["runs"], "run"), period, grouped(stats["completed"]),
        grouped(stats["failed"]), plural(stats["retries"], "retry"),
        grouped(stats["interrupted"]))
    if stats["success_rate"] is None:
        return
    rate = stats["per_second_now"]
    yield joined(
        "%d %% succeed" % (
            100 * stats["completed"] // (stats["completed"] + stats["failed"])),
        rate and rate_text(rate) + " in the last minute", by="; ")
    for name in ("run_time", "waiting_time"):
        times = [duration_text(value or 0) for value in stats[name].values()]
        yield "%s: median %s, 95 %% within %s, longest %s" % (
            name.replace("_", " "), *times)
    yield from throughput_lines(stats["throughput"], period, width)
    errors = [[grouped(row["runs"]), printable(row["error"])]
              for row in stats["common_errors"]]
    if errors:
        yield from [*table(["RUNS", "MOST COMMON ERRORS"], errors, width), ""]
    yield from table(["AVERAGE", "RUNS", "SLOWEST COMMANDS"], [
        [duration_text(row["mean"]), grouped(row["runs"]), printable(row["command"])]
        for row in stats["slowest_commands"]], width)
    yield ""
    yield from table(["RUN TIME", "RUNS", ""], histogram(stats["run_times"], width))


def throughput_lines(bars, period, width):
    """Yield a plot of how many runs ended when, and its axis."""
    counts = [bar["completed"] + bar["failed"] for bar in bars]
    share = ceil_div(len(counts), max(1, width - 12))  # bars a character
    sums = [sum(counts[at : at + share]) for at in range(0, len(counts), share)]
    yield "throughput  " + sparkline(sums)
    yield " " * 12 + (period + " ago").ljust(len(sums) - 3) + "now"
    yield ""


def sparkline(values):
    """Return a bar for each value, all to the same scale; one character each."""
    steps = drawable(" ▁▂▃▄▅▆▇█", " .:-=+*#@")
    top = max([*values, 1])
    return "".join(steps[ceil_div(value * 8, top)] for value in values)


def histogram(bins, width):
    """Yield a row for each bin of run times, from the first to the last in use."""
    used = [at for at, bin in enumerate(bins) if bin["runs"]]
    most = max(bin["runs"] for bin in bins)
    bar = drawable("█", "#")
    for bin in bins[used[0] : used[-1] + 1]:
        below = "< " + duration_text(bin["below"]) if bin["below"] else "longer"
        length = ceil_div(bin["runs"] * max(1, width - 24), most)
        yield below, grouped(bin["runs"]), bar * length


class ProgressLine:
    """A progress line: redrawn in place on a terminal, omitted elsewhere.

    It is redrawn only when it has changed, unless others may PRINT_OVER it.
    """

    def __init__(self, print_over=False):
        self.print_over, self.line = print_over, None

    def close(self):
        """Clear the line, to make room for the result."""
        if self.line:
            self.redraw("")

    def redraw(self, line):
        if line == self.line and not self.print_over:
            return
        self.line = line
        with contextlib.suppress(OSError):  # the terminal is gone
            print(end="\r\x1b[K" + line, file=sys.stderr, flush=True)


class LenientOutput:
    """Standard output of a command whose exit code must not depend on it.

    An `enqueue` that is committed ends with 0 also on a full disk, or `until enqueue`
    would double the job; a pool without a reader runs on. The first error is kept.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *args):
        """Call an action of the stream, unless an earlier one has failed."""
        if self.error:
            return
        try:
            action(*args)
        except OSError as error:
            self.error = error
            # Python would try to write the rest at its end, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def report(self):
        """Report the error, but not that the reader is gone."""
        if self.error and self.error.errno not in (errno.EPIPE, errno.EINVAL):
            notice("the result could not be printed: %s" % self.error.strerror)


def print_result(args, value, *lines):
    """Print the result of a command: one JSON document, or else lines for people."""
    if args.json:
        print(json.dumps(value))
    else:
        print_lines(lines)


def print_lines(lines):
    """Print lines for people, wrapped and painted where that is a terminal."""
    width, paint = terminal_width(sys.stdout), painter(sys.stdout)
    for line in lines:
        for part in wrapped(line, width):
            print(paint(part))


def print_jobs(args, jobs, lines_of, empty):
    """Print jobs: as a JSON array, or else as the lines that `lines_of(jobs)` makes.

    They are streamed: a million cost no memory. If there are none, print EMPTY, and
    return True.
    """
    jobs = iter(jobs)
    first = list(itertools.islice(jobs, 1))
    jobs = itertools.chain(first, jobs)
    if not args.json:
        for line in map(painter(sys.stdout), lines_of(jobs)) if first else [empty]:
            sys.stdout.write(line + "\n")
        return not first
    print(end="[")
    comma = ""
    for batch in batches(map(public_job, jobs)):
        print(end=comma + json.dumps(batch)[1:-1])
        comma = ", "
    print("]")
    return not first


# ======================================================================================
# Pool: a worker; the reaper; the supervisor; the log
# ======================================================================================

# A pool is a supervisor and its workers. What each sign of life proves, and to whom:
#
#   exit code of a process   how it ended; no other gets its PID     its parent
#   getppid()                the supervisor is there                 its workers
#   lock of a PID file       a supervisor lives, or has just died    commands, pools
#                            while a worker was being started
#   lock of a worker file    that worker lives                       commands, pools
#   lock of a lease          the worker of the run lives, or a       commands, pools
#                            process of its command
#   list of processes        which processes belong to a run         worker, pools


def open_private(path, flags):
    return os.open(path, flags, 0o600)


def log_handler(path):
    """Return the handler of `logging` that writes the log of a queue."""
    import logging.handlers

    class Log(logging.handlers.WatchedFileHandler):
        """Go on in a new file when the supervisor has renamed a full one."""

        def emit(self, record):
            super().emit(record)
            if WINDOWS and self.stream:  # an open file can't be renamed there
                self.stream.close()
                self.stream = None

        def _open(self):
            # On Windows a file that is being renamed can't be opened for a moment.
            for _ in range(20 if WINDOWS else 1):
                with contextlib.suppress(OSError):
                    return open(path, "a", encoding="utf-8", errors="backslashreplace",
                                opener=open_private)
                time.sleep(FILE_INTERVAL / 10)
            return open(os.devnull, "a")  # a full disk must not stop a pool

    return Log(path, delay=WINDOWS)


def open_log(queue_path, role, is_quiet):
    """Return the logger of this process: to the queue's log, or else standard error.

    Unless it IS_QUIET, a worker's lines are printed as well, and a pool's warnings.
    """
    import logging

    path = path_beside(queue_path, ".log")
    logging.raiseExceptions = False
    # Python's logging HOWTO, "Optimization": what no line shows is not gathered.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    try:
        os.close(open_private(path, os.O_WRONLY | os.O_CREAT))
        handlers = [log_handler(path)]
        if not is_quiet:
            handlers.append(printing_handler("INFO" if role == "worker" else "WARNING"))
    except OSError as error:
        handlers = [logging.StreamHandler()]
        notice("cannot write the log, logging here instead: %s" % error)
    layout = "%%(asctime)s %%(levelname)s %s[%d] %%(message)s" % (role, os.getpid())
    logging.Formatter.converter = time.gmtime  # as in JSON
    logging.basicConfig(handlers=handlers, level=logging.INFO, format=layout,
                        datefmt="%Y-%m-%dT%H:%M:%SZ", force=True)
    return logging.getLogger()


def printing_handler(level):
    """Return a handler of `logging` that prints lines of this level for people.

    Those on the start or end of a run begin with the job, others as all notices do.
    Those with `is_printed` have been printed before.
    """
    import logging

    start = "\r\x1b[K" if terminal_width(sys.stderr) else ""  # over the progress line

    class Printer(logging.Handler):
        def emit(self, record):
            if not hasattr(record, "is_printed"):
                line = record.msg if type(record.msg) is Line else record.getMessage()
                if type(line) is not Line and record.levelno > logging.INFO:
                    line = "queuectl: " + line
                write_or_drop(sys.stderr, start + for_standard_error(line) + "\n")

    return Printer(level)


def pool_notice(message):
    """Print a line of a pool for people, unless that would block the pool."""
    write_or_drop(sys.stderr, for_standard_error("queuectl: %s" % message) + "\n")


def run_label(run):
    """Return job and attempt of a run, for the log."""
    tries = tries_allowed(run.max_retries)
    return "%s %d/%d" % (run.id, run.attempt, tries)


NOT_COUNTED = ", attempt not counted"  # of a run that was put back


def reason_in(output):
    """Return the last line of an output after a colon, for the log; "" without one."""
    line = last_line(output)
    return line and ": " + truncate(printable(line), 80)


# Exit codes after a signal that a stopped service sends to all its processes at once. A
# shell whose child was killed by a signal exits with 128 more.
STOP_CODES = {
    code for number in (*STOP_SIGNALS, KILL) for code in (-number, 128 + number)}
if WINDOWS:  # after Ctrl-Break or a closed console; after the end of the session
    STOP_CODES |= {0xC000013A, 0x40010004}
# Errors of a start that are not the job's: no processes, no memory.
NO_PROCESS = errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE
WINDOWS_NO_MEMORY = 1450, 1455  # ERROR_NO_SYSTEM_RESOURCES, ERROR_COMMITMENT_LIMIT


class Trouble:
    """An error that a process of a pool waits out. It is logged once, and its end."""

    def __init__(self, log):
        self.log, self.error = log, None

    def begin(self, error):
        """Log the text of an error, unless it lasts since the latest try."""
        if error != self.error:
            self.log.error("%s; waiting until it is over", error)
        self.error = error

    def end(self):
        """Log that the work goes on, if there was an error."""
        if self.error:
            self.log.info("going on")
        self.error = None


class Worker:
    """One process of a pool. It runs one job at a time."""

    def __init__(self, path, pool, draining_pool, is_quiet):
        self.path, self.pool = path, pool
        self.draining_pool = draining_pool  # as for `Queue`
        self.log = open_log(path, "worker", is_quiet)
        self.queue = None
        self.lease = None  # of the present run, until its outcome is recorded
        self.next_lease = None  # of a run whose claim is not yet committed
        self.trouble = Trouble(self.log)  # which `with_retries` waits out
        self.recorded_run = None  # the run whose start was recorded
        self.got_sigterm = False
        self.refusal = Trouble(self.log)  # of the system to give a process
        self.waiter = Waiter()
        catch_signals(self.take_signal)

    def take_signal(self, number, frame):
        """Leave after the present job if the signal is SIGTERM.

        Ctrl-C and a hangup reach the supervisor as well: it requests a stop.
        """
        if number == signal.SIGTERM:
            self.got_sigterm = True

    def work(self):
        """Run jobs until asked to stop."""
        self.queue = self.with_retries(
            lambda: Queue(self.path, for_pool=True, draining_pool=self.draining_pool))
        with self.queue:
            ended = None  # the latest run and its outcome, until they are recorded
            while True:
                run = self.with_retries(self.record_and_claim, ended)
                ended = None
                if run:
                    ended = self.execute(run)
                elif self.should_leave():
                    break
                else:
                    self.rest()

    def rest(self):
        """Wait until there may be something to claim, or end a drain that is over."""
        if self.draining_pool and self.with_retries(self.queue.is_drained):
            request_stop(self.path, self.pool, "over")
        self.waiter.wait(self.with_retries(self.idle_time))

    def with_retries(self, action, *args):
        """Call an action until it works, and return its result.

        A full disk or a locked database costs time, but not the outcome of a run. That
        is dropped only for `stop --now`, or if the database is gone or broken.
        """
        while True:
            try:
                result = action(*args)
            except (sqlite3.Error, OSError) as error:
                if self.should_give_up(error):
                    raise QueueError("leaving while there is still: %s", error)
                self.trouble.begin(with_cause(error, self.path))
                self.waiter.wait(TROUBLE_INTERVAL)
            else:
                self.trouble.end()
                return result

    def should_give_up(self, error):
        """Tell whether `with_retries` has to leave after an error."""
        if isinstance(error, sqlite3.IntegrityError) or is_damage(error):
            return True
        if self.is_database_gone():
            return True
        if not self.trouble.error or not self.should_leave():  # the next try may work
            return False
        has_outcome = self.lease is not None
        return not has_outcome or requested_stop(self.path, self.pool) == "now"

    def is_database_gone(self):
        if not self.queue:  # it may be removed before this worker has opened it
            return not os.path.exists(self.path)
        return not may_be_same_file(self.path, self.queue.file_status)

    def is_pool_stopping(self):
        return supervisor_is_gone(self.pool) or requested_stop(self.path, self.pool)

    def should_leave(self):
        return self.got_sigterm or self.is_pool_stopping() or self.is_database_gone()

    def idle_time(self):
        """Return how many seconds to wait for the next claim."""
        if self.queue.is_paused():
            return IDLE_INTERVAL
        due = self.queue.next_due()  # first: what gets due in between is then claimable
        if self.queue.has_claimable():
            return 0
        if due is None:
            return IDLE_INTERVAL
        return min(due["run_at"] - self.queue.clock(), IDLE_INTERVAL)

    def record_and_claim(self, ended):
        """Record the end of one run and claim the next, in one transaction.

        If the worker is killed before the commit, a pool finds the first run without a
        worker, and the job runs again. The same goes for a run that was claimed and not
        started. The lease of the first run is released only after the commit: otherwise
        a pool would put the job back while its end is being recorded.
        """
        is_leaving = self.should_leave()  # asked before the transaction: others wait
        try:
            with self.queue.transaction():
                state = self.queue.record(*ended) if ended else None
                run = None if is_leaving else self.queue.claim(
                    os.getpid(), self.take_lease)
        except BaseException:
            if self.next_lease:
                self.next_lease.discard()
                self.next_lease = None
            if self.lease:
                # The disk may be full of this output, and the outcome has it as well.
                # If the worker is killed now, the job runs again, and only this is
                # lost.
                self.lease.empty()
            raise
        finished, self.lease, self.next_lease = self.lease, self.next_lease, None
        if ended:
            finished.discard()
            self.report(state, *ended)
        return run

    def take_lease(self, run):
        self.next_lease = Lease(run.lease_path, run.output_limit)

    def report(self, state, run, outcome):
        """Log how a run ended. A result that came too late is logged and dropped."""
        if outcome.kind == "refused":  # already logged
            return
        message = "" if state else "no longer ours, result dropped"
        if outcome.error:
            message += " (%s)" % printable(outcome.error)
        message += " in " + duration_text(outcome.finished_at - run.started_at)
        if state == "pending":
            message += NOT_COUNTED
        elif state == "failed":
            message += self.next_try(run)
        elif state == "dead":
            message += reason_in(outcome.output)
            wake([self.pool])  # which starts `on_dead`
        is_failure = state == "dead" and outcome.kind != "cancelled"
        log = self.log.warning if is_failure else self.log.info
        log(state_line(run_label(run) + " ", state, message))

    def next_try(self, run):
        """Return in words when a failed job runs again; "" if it no longer waits."""
        with contextlib.suppress(sqlite3.Error, QueueError):
            due = due_text(self.queue.job(run.id), self.queue.clock())
            return due and ", again " + due
        return ""

    def execute(self, run):
        """Run a claimed job; return its run and its outcome."""
        try:
            process = SystemCommand(run, self.lease, self.path)
        except (OSError, ValueError) as error:
            return run, self.not_started(run, error)
        self.refusal.end()
        run = run._replace(pid=process.pid, started_at=self.queue.clock())
        try:
            return run, self.attend(run, process)
        finally:
            process.close()

    def attend(self, run, process):
        """Wait until a command has ended, or end it; return the outcome of its run."""
        began = time.monotonic()
        try:
            code, end = process.watch(
                self.waiter, run.timeout, functools.partial(self.check_run, run))
            finished_at = run.started_at + time.monotonic() - began
            if end is None and self.was_stopped_with_pool(code):
                end = End("stopped", STOPPED)
                process.terminate(self.waiter)  # what a shell may have left
            process.read_rest(self.waiter)
        except Unkillable as living:
            # This worker leaves. So a pool finds a run without a worker as soon as
            # these processes are gone.
            message = "%s can't be ended: processes %s are left alone"
            raise QueueError(message, run_label(run), living) from None
        if process.kill_was_sent and run.launcher:
            message = "%s: the launcher was killed; what it started may live on"
            self.log.warning(message, run_label(run))
        kind, error = end or exit_end(code)
        exit_code = code if code is not None and code >= 0 else None
        return Outcome(kind, exit_code, error, finished_at, self.lease.output())

    def was_stopped_with_pool(self, code):
        """Tell whether a command seems to have ended because its service was stopped.

        A stopped service signals all its processes at once: this pool may be about to
        hear of that.
        """
        return code in STOP_CODES and wait_until(self.is_pool_stopping, BLAME_DELAY)

    def not_started(self, run, error):
        """Return the outcome of a run whose command could not be started.

        If the system has no process to give, wait a little before that.
        """
        kind = "failed"
        text = "cannot start: %s" % error
        if isinstance(error, OSError) and error.filename:
            text = "cannot start: %s: %s" % (
                os.fsdecode(error.filename), error.strerror)
        if getattr(error, "errno", None) in NO_PROCESS or (
                getattr(error, "winerror", None) in WINDOWS_NO_MEMORY):
            kind = "refused"
            self.refusal.begin(text)
            self.waiter.wait(TROUBLE_INTERVAL)
        return Outcome(kind, None, text, run.started_at, self.lease.output())

    def check_run(self, run):
        """Return the `End` of a run that has to end now; None if it may go on."""
        if self.recorded_run != run:
            self.record_start(run)
        if requested_stop(self.path, self.pool) == "now":
            return End("stopped", STOPPED)
        with contextlib.suppress(sqlite3.Error):  # the next check asks again
            if self.queue.cancel_requested(run):
                return End("cancelled", CANCELLED)
        return None

    def record_start(self, run):
        """Record the start of a run at its first check: most runs are over before."""
        with contextlib.suppress(sqlite3.Error):  # the next check tries again
            self.queue.record_pid(run)
            self.log.info("%s runs, pid %d", run_label(run), run.pid)
            self.recorded_run = run


def worker_main(path, pool, draining_pool, is_quiet, pool_fd):
    """Run a worker; this is the main function of its process."""
    if not WINDOWS:
        os.close(pool_fd)  # or the supervisor would seem to live as long as this worker
    worker = Worker(path, pool, draining_pool, is_quiet)
    own_file = worker_file(path, pool, os.getpid())
    try:
        fd = worker.with_retries(lock_file, own_file)
        try:
            worker.work()
        finally:
            drop_lock_file(path, fd, own_file)
            if supervisor_is_gone(pool):
                # The last worker removes the file of the pool. On Windows that fails
                # while another process looks at the file.
                wait_until(lambda: try_remove_pool_file(path, pool), 10 * FILE_INTERVAL)
    except (QueueError, OSError) as error:
        if worker.is_database_gone():
            return  # the supervisor reports that, once for all workers
        worker.log.error("%s", error)
        sys.exit(EXIT_DAMAGED if is_damage(error.__context__) else EXIT_UNUSABLE)
    except Exception:
        worker.log.exception("this worker failed")
        sys.exit(1)


def try_remove_pool_file(path, pool):
    """Remove a pool's file if it is stale; return whether it is gone."""
    remove_stale_pool_files(path)
    return not os.path.exists(pool_file(path, pool))


# An `on_dead` command: the id of its job, when to end it, and what it prints, a file.
Hook = collections.namedtuple("Hook", "id end_at output")


class Reaper:
    """What a supervisor does for a queue, for the runs of other pools as well.

    It puts lost jobs back, ends orphans, starts `on_dead`, deletes old jobs, removes
    stale files and renames a full log.
    """

    def __init__(self, path, log):
        self.path, self.log, self.pid = path, log, os.getpid()
        self.worker_died_at = {}  # {PID of a worker of this pool: monotonic time}
        self.recovery_done = True  # for the runs of dead workers
        self.terminations = {}  # {lease path of an orphan: its Termination}
        self.hooks = {}  # {a running process: its Hook}
        self.are_hooks_busy = False  # whether that was logged
        self.hook_trouble = Trouble(log)  # why `on_dead` could not be started

    def is_idle(self):
        """Tell whether no lost run is left, or only runs that can't be ended."""
        return self.recovery_done and all(
            termination.is_stuck() for termination in self.terminations.values())

    def note_worker_death(self, pid, exit_code):
        """Take note that a worker has died; its job is not blamed for a bad queue."""
        self.recovery_done = False
        if exit_code not in (EXIT_UNUSABLE, EXIT_DAMAGED):
            self.worker_died_at[pid] = time.monotonic()

    def recover_lost(self, queue, workers):
        """Put jobs in PROCESSING back that no process runs; end orphans first.

        WORKERS are the PIDs of this pool's living workers. Processes that still belong
        to the run of a dead worker are ended first. The lease is tested again within
        the transaction that puts the job back: if it is unlocked then, no process is
        left that could fork another.
        """
        lost = {run.lease_path: run for run in queue.lost_runs(workers)}
        processes = processes_of(dict.fromkeys(lost))
        self.recovery_done = True
        for path, run in lost.items():
            if run.worker in processes[path]:
                continue  # the worker is there; its file or the lease was removed
            pids = processes[path] - {self.pid, *workers}  # a run may start this pool
            # A living worker has the PID of the dead one: those of containers recur.
            is_reaped = run.worker not in workers or is_locked(
                worker_file(self.path, self.pid, run.worker))
            if not is_reaped or self.worker_died_just_now(run.worker):
                self.recovery_done = False
            elif not pids:
                self.put_back(queue, run)
            elif queue.is_current(run):
                self.end_orphan(run, pids)
            # Otherwise the run has ended in between. Its background children go on.
        self.terminations = {path: termination for path, termination
                             in self.terminations.items() if path in lost}
        dead = {run.worker for run in lost.values()}
        self.worker_died_at = {
            pid: at for pid, at in self.worker_died_at.items() if pid in dead}

    def worker_died_just_now(self, worker):
        """Tell whether this pool may be about to be killed together with a worker.

        Then the job of the worker must not get the blame.
        """
        worker_died_at = self.worker_died_at.get(worker, -MAX_DURATION)
        return time.monotonic() < worker_died_at + BLAME_DELAY

    def end_orphan(self, run, pids):
        """Signal what a dead worker left running, as the worker would have done."""
        termination = self.terminations.get(run.lease_path)
        if not termination:
            termination = self.terminations[run.lease_path] = Termination()
            self.log.warning("%s worker died, ending %s", run_label(run), sorted(pids))
        kill_sent = termination.kill_sent
        termination.step(pids, signal_processes)
        if termination.kill_sent and not kill_sent:
            message = "%s did not end and is killed: %s"
            self.log.warning(message, run_label(run), sorted(pids))

    def put_back(self, queue, run):
        """Put the job of a lost run back, unless something holds the lease again."""
        output = read_output(run.lease_path, queue.settings()["output_limit"])
        outcome = Outcome("lost", None, WORKER_DIED, queue.clock(), output)
        with queue.transaction():
            state = None if is_locked(run.lease_path) else queue.release(
                run, outcome, is_blamed=run.worker in self.worker_died_at)
        if state:
            note = " (%s)" % WORKER_DIED + NOT_COUNTED * (state == "pending")
            self.log.warning(state_line(run_label(run) + " ", state, note))
            remove_leftover(run.lease_path)
            wake_workers(self.path)

    def announce_dead_jobs(self, queue):
        """Start `on_dead` for the jobs that died; return how many of them run.

        No job waits for these commands, and they may outlive the pool. A failure is
        logged. Only a few run at a time: if they hang, there must not be one for each
        of a thousand dead jobs.
        """
        self.reap_hooks()
        line = queue.settings()["on_dead"]
        try:
            while len(self.hooks) < MAX_HOOKS and queue.announce_dead_job(
                    lambda job: line and self.start_hook(line, job)):
                self.hook_trouble.end()
        except OSError as error:  # the next check tries again
            self.hook_trouble.begin("on_dead cannot start: %s" % error)
        self.report_busy_hooks(queue)
        return len(self.hooks)

    def reap_hooks(self):
        """Take note of the `on_dead` commands that have ended; end those that hang."""
        for process, hook in list(self.hooks.items()):
            if process.poll() is not None:
                del self.hooks[process]
                self.report_hook(process.returncode, hook)
            elif time.monotonic() >= hook.end_at:
                self.log.error("on_dead for %s is ended after %s", hook.id,
                               duration_text(HOOK_TIMEOUT))
                self.end_hook(process)
            elif os.fstat(hook.output.fileno()).st_size > MAX_HOOK_OUTPUT:
                hook.output.truncate(0)  # or one that never stops would fill the disk

    def report_hook(self, code, hook):
        """Log the failure of an `on_dead` command that has ended."""
        with hook.output as file:
            if code:
                end = read_tail(file).lstrip(b"\0")  # the part that was truncated
                self.log.error("on_dead for %s: %s%s", hook.id, exit_end(code).error,
                               reason_in(end))

    def end_hook(self, process):
        """Kill an `on_dead` command, on POSIX with its process group."""
        with contextlib.suppress(OSError):
            if WINDOWS:
                process.kill()
            else:
                os.killpg(process.pid, KILL)

    def report_busy_hooks(self, queue):
        """Log that all places for `on_dead` are taken, once for each time."""
        is_busy = len(self.hooks) >= MAX_HOOKS and queue.count_unannounced() > 0
        if is_busy and not self.are_hooks_busy:
            self.log.warning("on_dead: %d run, %s wait", len(self.hooks),
                             plural(queue.count_unannounced(), "dead job"))
        self.are_hooks_busy = is_busy

    def announce_rest(self, queue, is_urgent):
        """Announce the dead jobs that are left, until IS_URGENT() is true."""
        wait_until(lambda: not self.announce_dead_jobs(queue) or is_urgent(),
                   HOOKS_AT_END, STEP_INTERVAL)
        rest = queue.count_unannounced()
        if self.hooks and rest:
            self.log.warning("on_dead: %s left to the next pool",
                             plural(rest, "dead job"))

    def start_hook(self, line, job):
        """Start the `on_dead` command for a job, with the job's JSON as its input."""
        import subprocess
        import tempfile

        if is_network_path(self.path):
            raise OSError(errno.EINVAL, "cmd.exe can't run beside " + self.path)
        # Beside the queue, since a read-only system may have no other place for files.
        directory = path_beside(self.path, ".runs")
        os.makedirs(directory, 0o700, exist_ok=True)  # it goes with the last worker
        with contextlib.ExitStack() as files:
            text, output = (files.enter_context(tempfile.TemporaryFile(dir=directory))
                            for _ in range(2))
            text.write(json.dumps(public_job(job)).encode() + b"\n")
            text.seek(0)
            if not WINDOWS:  # else a hole is left in front when it is truncated
                fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)
            process = subprocess.Popen(
                line, shell=True, cwd=os.path.dirname(self.path), stdin=text,
                stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "QUEUECTL_DB": self.path})
            files.pop_all()
        text.close()
        self.hooks[process] = Hook(job["id"], time.monotonic() + HOOK_TIMEOUT, output)

    def prune(self, queue):
        """Delete jobs that are older than `keep`, some of them if there are many."""
        keep = queue.settings()["keep"]
        if keep is None:
            return
        until = time.monotonic() + PRUNE_SLICE
        total = 0
        count = BATCH_SIZE
        while count == BATCH_SIZE and time.monotonic() < until:
            count = queue.prune(keep)
            total += count
        if total:
            self.log.info("keep: removed %s", plural(total, "job"))

    def remove_stale_files(self, queue):
        """Remove the files that no process holds any more."""
        directory = path_beside(self.path, ".runs")
        with queue.transaction():  # so that no run is claimed or lost in between
            leases = {run.lease_path for run in queue.processing_runs()}
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(directory):
                    path = os.path.join(directory, name)
                    if path not in leases:
                        remove_leftover(path)
        remove_stale_pool_files(self.path)

    def rotate_log(self):
        """Rename a full log. The loggers of all processes notice it."""
        log = path_beside(self.path, ".log")
        with contextlib.suppress(OSError):  # on Windows it is open for a moment
            if os.path.getsize(log) > LOG_LIMIT:
                os.replace(log, log + ".1")


class Supervisor:
    """The process of a pool that starts, replaces and stops its workers.

    It has no database, lease or other's file open while it forks: the lock would go to
    the child with the fork, and a connection of SQLite must not cross one. (Programs
    that it starts, like `on_dead`, close all that by their exec.)
    """

    def __init__(self, path, count, is_drain, is_quiet, show_progress):
        self.path = os.path.realpath(path)
        self.count = count
        self.pid = os.getpid()
        self.is_quiet = is_quiet
        self.draining_pool = self.pid if is_drain else None  # as for `Queue`
        self.show_progress = show_progress  # with the queue, every PROGRESS_INTERVAL
        self.own_file = pool_file(self.path, self.pid)
        self.fd = None  # of that file
        self.file_status = None  # of the database
        self.was_paused = False  # the queue, at the latest check
        self.clock_offset = None  # to the monotonic clock, likewise
        self.waiter = self.log = self.reaper = None
        self.queue_trouble = self.start_trouble = None  # made with the log
        self.workers = []  # their processes
        self.next_start = self.next_check = self.checked_at = 0.0  # monotonic times
        self.kill_at = 0.0  # likewise, for the workers that a stop now has not ended
        self.signals = 0
        self.signalled_at = -MAX_DURATION
        self.asked = None  # the latest request of its own: its file may be removed
        self.has_failed = is_drain  # until `finish` has found that no job died
        self.result = {"pool": self.pid}  # of a drain, as JSON
        self.summary = "the queue could not be read at the end"
        self.stop_reason = None  # why it can't go on

    def run(self, started):
        """Run the pool until it is asked to stop or drained; return the exit code.

        `started()` is called once the pool can be found and asked to stop.
        """
        previous = catch_signals(self.count_signal)
        try:
            self.prepare()
        except BaseException:
            for number, handler in previous.items():
                signal.signal(number, handler)
            raise
        try:
            os.write(self.fd, NO_REQUEST)
            self.log = open_log(self.path, "pool", self.is_quiet)
            self.reaper = Reaper(self.path, self.log)
            self.queue_trouble = Trouble(self.log)
            self.start_trouble = Trouble(self.log)
            self.log.info("pool of %d started", self.count)
            with Queue(self.path, draining_pool=self.draining_pool) as queue:
                queue.clear_drain_counts()
                self.report_pause(queue)
            started()
            self.loop()
            # A drain has to report how it ended, even if another program has the lock.
            wait_until(lambda: self.with_queue(self.finish) or self.stop_reason,
                       LOCK_TIMEOUT if self.draining_pool else 0, POLL_INTERVAL)
            self.log.info("pool stopped")
        finally:
            request_stop(self.path, self.pid, "stop")  # in any case, for the workers
            # At its end Python gives up its handlers: a late signal would be exit -15.
            catch_signals(signal.SIG_IGN)
            drop_lock_file(self.path, self.fd, self.own_file)
        return 1 if self.has_failed or self.stop_reason else 0

    def prepare(self):
        """Check the system, the queue and its files; take the PID file."""
        inherit_nothing()
        require_process_list()
        require_descriptors(self.count)
        with Queue(self.path) as queue:
            self.file_status = queue.file_status
            own = queue.own_job()
            if own:
                raise QueueError("worker start: within job %s only with --detach, or"
                                 " the job would wait for its own pool", own["id"])
        if not WINDOWS and os.geteuid() == 0 and self.file_status.st_uid:
            pool_notice("the queue belongs to another user (%d), and its commands run"
                        " as root" % self.file_status.st_uid)
        for path in (path_beside(self.path, ".runs"), path_beside(self.path, ".log")):
            hint = owner_hint(path)
            if hint:
                raise QueueError("%s%s", path, hint)
        self.fd = lock_file(self.own_file)
        self.waiter = Waiter()

    def count_signal(self, number, frame):
        """Count a signal, but not one that timeout(1) sends twice at the same time."""
        now = time.monotonic()
        if now - self.signalled_at > SIGNAL_INTERVAL:
            self.signals += 1
            self.signalled_at = now
            wake([self.pid])  # on Windows Ctrl-Break does not end a wait by itself

    def loop(self):
        """Look after the workers and the queue until the pool is over."""
        while True:
            if self.signals:  # the first asks to stop, a second to stop now
                self.ask_to_stop("stop" if self.signals == 1 else "now")
            self.collect_workers()
            self.kill_stuck_workers()
            self.check_own_file()
            self.report_request()
            are_missing = self.start_missing()
            if time.monotonic() >= self.next_check:
                self.with_queue(self.maintain)
                self.checked_at = time.monotonic()
                self.next_check = self.checked_at + self.check_interval()
            if self.is_over():  # asked after the check, which may end a recovery
                return
            due = self.next_check
            if are_missing:
                due = min(due, self.next_start)
            if self.waiter.wait(due - time.monotonic()):
                # A worker or a command has woken this pool. However often that happens,
                # it checks the queue only every POLL_INTERVAL.
                self.next_check = min(self.next_check, self.checked_at + POLL_INTERVAL)

    def check_interval(self):
        if not self.reaper.is_idle():
            return POLL_INTERVAL
        return PROGRESS_INTERVAL if self.show_progress else RECOVERY_INTERVAL

    def is_over(self):
        """Tell whether the pool may leave: the runs of its dead workers are recovered.

        If the queue was removed, nothing can be recovered. What can't be ended is left
        to the next pool. So is a queue that can't be read, if this pool has to stop
        now.
        """
        request = requested_stop(self.path, self.pid)
        if not request or self.workers:
            return False
        if self.stop_reason or not may_be_same_file(self.path, self.file_status):
            return True
        if not self.reaper.recovery_done:
            return request == "now" and bool(self.queue_trouble.error)
        return self.reaper.is_idle()

    def check_own_file(self):
        """Stop if the PID file was removed: no command could find this pool.

        It makes the file anew, to be asked to stop now while its last jobs run.
        """
        if os.path.exists(self.own_file):
            return
        if os.path.isdir(os.path.dirname(self.own_file)):
            os.close(self.fd)
            self.fd = lock_file(self.own_file)
            os.write(self.fd, NO_REQUEST)
        self.give_up("its file %s was removed" % self.own_file)

    def give_up(self, why):
        """Stop this pool, which can't go on; report why, once."""
        if self.stop_reason:
            return
        self.stop_reason = why
        self.log.error("this pool stops: %s", why, extra={"is_printed": True})
        pool_notice("this pool stops: " + why)
        self.ask_to_stop("stop")

    def ask_to_stop(self, request):
        """Request a stop of this pool, unless it was requested before."""
        earlier = requested_stop(self.path, self.pid)
        if earlier and (request != "now" or "now" in (earlier, self.asked)):
            return
        self.asked = request
        self.log.info("asked to stop now" if request == "now" else "asked to stop")
        request_stop(self.path, self.pid, request)
        if self.signals and sys.stderr.isatty():
            if not self.show_progress:
                write_or_drop(sys.stderr, "\n")  # below the ^C
            self.announce_stop(request, "; Ctrl-C again ends %s now")

    def report_request(self):
        """Report a stop that another process has requested, once."""
        request = requested_stop(self.path, self.pid)
        is_new = request in ("stop", "now") and request != self.asked
        if is_new and not self.stop_reason:
            self.asked = request
            self.announce_stop(request)

    def tell(self, message, is_quiet):
        """Log a message, and print it, over the progress line, unless IS_QUIET."""
        self.log.info(message)
        if not is_quiet:
            if self.show_progress:
                write_or_drop(sys.stderr, "\r\x1b[K")
            pool_notice(message)

    def own_runs(self):
        """Return the runs of this pool's workers."""
        return self.with_queue(lambda queue: [
            run for run in queue.processing_runs()
            if run.worker in self.worker_pids()]) or []

    def announce_stop(self, request, hint=""):
        """Report what becomes of the running jobs, with a HINT on how to end them."""
        running = len(self.own_runs())
        message = "putting %s back to pending"
        if request == "stop":
            message = "finishing %s"
            message += hint and hint % ("it" if running == 1 else "them")
        self.tell(message % plural(running, "running job"),
                  is_quiet=self.is_quiet or not running)

    def collect_workers(self):
        """Take note of the workers that have ended."""
        ended = [worker for worker in self.workers if worker.exitcode is not None]
        for worker in ended:
            self.workers.remove(worker)
            if worker.exitcode:
                message = "worker %d died: %s"
                self.log.error(message, worker.pid, exit_end(worker.exitcode).error)
                self.reaper.note_worker_death(worker.pid, worker.exitcode)
                if worker.exitcode == EXIT_DAMAGED:  # where only workers look
                    self.give_up(
                        "%s is damaged; restore a backup" % printable(self.path))
                self.next_check = 0.0
                self.next_start = time.monotonic() + RESTART_INTERVAL

    def kill_stuck_workers(self):
        """Kill the workers that outlive a stop now: they are suspended, or hang.

        None takes that long to end its run. What it leaves is an orphan, as after any
        death of a worker.
        """
        if requested_stop(self.path, self.pid) != "now":
            self.kill_at = time.monotonic() + TERM_GRACE + KILL_GRACE + POLL_INTERVAL
        elif time.monotonic() >= self.kill_at:
            for worker in self.workers:
                worker.kill()

    def start_missing(self):
        """Start the workers that are missing; return whether some still are.

        If workers keep dying, new ones are not started too often.
        """
        import multiprocessing

        context = multiprocessing.get_context("spawn" if WINDOWS else "fork")
        while len(self.workers) < self.count and self.check_database() and (
                not requested_stop(self.path, self.pid)):
            if time.monotonic() < self.next_start:
                return True
            worker = context.Process(
                target=worker_main, args=(
                    self.path, self.pid, self.draining_pool, self.is_quiet, self.fd))
            try:
                with sheltered_start():
                    worker.start()
            except OSError as error:  # too many processes or files
                self.start_trouble.begin("a worker cannot start: %s" % error)
                self.next_start = time.monotonic() + RESTART_INTERVAL
                return True
            self.start_trouble.end()
            self.workers.append(worker)
            self.reaper.worker_died_at.pop(worker.pid, None)  # of one with this PID
        return False

    def worker_pids(self):
        return {worker.pid for worker in self.workers}

    def check_database(self):
        """Return whether the database is there; if it is gone, stop this pool.

        A worker that is started without it dies, and so would the next one.
        """
        if may_be_same_file(self.path, self.file_status):
            return True
        self.give_up("%s was removed" % printable(self.path))
        return False

    def with_queue(self, action):
        """Call an action with the queue; return its result, None after an error.

        After an error the next check tries again. If the queue is gone, or this
        queuectl can't use it any more, the pool stops.
        """
        try:
            if self.check_database():
                with Queue(self.path, for_pool=True,
                           draining_pool=self.draining_pool) as queue:
                    result = action(queue)
                self.queue_trouble.end()
                return result
        except QueueError as error:
            if self.check_database():  # else it has given up already
                self.give_up(str(error))
        except (sqlite3.Error, OSError) as error:
            self.reaper.recovery_done = False
            if is_damage(error):  # waiting would not mend it
                self.give_up(
                    "%s: %s" % (printable(self.path), with_cause(error, self.path)))
            else:
                self.queue_trouble.begin(with_cause(error, self.path))

    def maintain(self, queue):
        """Do what is due for the queue at every check."""
        self.report_pause(queue)
        self.reaper.recover_lost(queue, self.worker_pids())
        self.reaper.remove_stale_files(queue)
        self.reaper.rotate_log()
        self.reaper.announce_dead_jobs(queue)
        self.clock_offset = queue.promote_after_clock_step(self.clock_offset)
        self.reaper.prune(queue)
        if self.show_progress:
            self.show_progress(queue)

    def report_pause(self, queue):
        """Report that the queue is paused, once for each pause, and that it goes on."""
        is_paused = queue.is_paused()
        if is_paused != self.was_paused:
            is_waiting = self.draining_pool or not self.checked_at  # it just starts
            self.tell(standstill(queue) if is_paused else "resumed",
                      is_quiet=self.is_quiet and not (is_paused and is_waiting))
        self.was_paused = is_paused

    def finish(self, queue):
        """Set `summary`, the pool's last line, and what a drain has done; clear up.

        Return True, so that the caller does not try again.
        """
        self.summary = "pool %d stopped" % self.pid
        if self.draining_pool:
            self.finish_drain(queue)
        self.reaper.announce_rest(queue, is_urgent=lambda: (
            self.signals > 1 or requested_stop(self.path, self.pid) == "now"))
        self.reaper.remove_stale_files(queue)
        return True

    def finish_drain(self, queue):
        """Set `result` and `summary`: what this pool has done, and what is left.

        Delayed jobs are no failure. Others that are left are one.
        """
        blocked = queue.first_blocked()
        counts = queue.drain_counts()
        counts.update(delayed=count_delayed(queue), blocked=len(queue.blocked_seqs()))
        is_over = requested_stop(self.path, self.pid) == "over"
        was_stopped = not is_over and not queue.is_drained()
        self.result = {"pool": self.pid, **counts}
        has_died = any(counts[state] for state in BLOCKING)
        self.has_failed = bool(has_died or blocked or was_stopped)
        self.summary = ", ".join(
            grouped(count) + " " + name for name, count in counts.items()
            if count or name in FINISHED)
        due = queue.next_due()
        reasons = []
        if blocked:
            reasons.append(blocked_text(blocked))
        if was_stopped:
            reasons.append("the pool was stopped early")
        if due:
            when = relative_time(due["run_at"], queue.clock())
            reasons.append("the next is due " + when)
        waiting = sum(map(queue.counts().get, WAITING))
        if reasons and waiting:
            reasons[0] = "%s left: %s" % (plural(waiting, "job"), reasons[0])
        self.summary = joined(self.summary, *reasons, by="; ")


# ======================================================================================
# Commands: a function for each command, with its name and arguments above it
# ======================================================================================

# A command of the command line.
Entry = collections.namedtuple("Entry", [
    "function",
    "meaning",  # for help
    "example",
    "arguments",  # each an `Argument`
    # It creates a missing queue. Others must not, or `wait && deploy` would deploy in a
    # wrong folder.
    "creates_queue",
    # Its function gets the queue as a second argument. Others need none, or open it
    # themselves, since SQLite must cross neither a fork nor threads.
    "opens_queue",
    "takes_words",  # the words after `--` are a command
    # It fails if its result can't be printed. The exit code of others is about what
    # they have done.
    "must_print",
    "usage",
    "aliases"], defaults=(False, True, False, False, None, ()))
COMMANDS = {}  # {name: Entry}, in the order in which help lists them


def command(name, meaning, example, *arguments, **facts):
    """Make a function the command of that name."""
    def register(function):
        COMMANDS[name] = Entry(function, meaning, example, arguments, **facts)
        return function

    return register


# The states that people mean by the words of other tools.
MEANT_STATES = {
    "running": "processing", "waiting": "pending", "queued": "pending",
    "done": "completed", "finished": "completed", "success": "completed",
    "error": "failed, or dead"}


def command_named(words):
    """Split a command line into the name of a command, or of a group, and the rest.

    There may be no such command. Flags and `--db` may stand before it.
    """
    aliases = {alias: name for name, entry in COMMANDS.items()
               for alias in entry.aliases}
    groups = {name.split()[0] for name in COMMANDS} - {*COMMANDS}
    name = ""
    options = []
    words = iter(words)
    for word in words:
        if word.startswith("-"):
            options.append(word)
            if word == "--db":  # its value is no command
                options += itertools.islice(words, 1)
            continue
        if word == "help" and name in groups:
            options.append("--help")
            continue
        name = (name + " " + word).lstrip()
        if name not in groups:
            break
    return aliases.get(name, name), [*options, *words]


# -- arguments, and what converts their texts ------------------------------------------

# An argument: its names; the word for its value, which help shows and completion knows,
# None for a flag; and what argparse wants to know.
Argument = collections.namedtuple("Argument", "names metavar options")


def flag(names, meaning):
    """Return an option without a value."""
    return Argument(names.split(), None, dict(help=meaning, action="store_true"))


def option(names, metavar, meaning, convert=str, **options):
    """Return an option with a value."""
    return Argument(names.split(), metavar, dict(
        options, help=meaning, metavar=metavar, type=convert))


positional = option  # without a name; argparse tells them apart by the dashes


def field_option(name, note):
    """Return the option for a field of a job; NOTE is added to its help."""
    field = FIELDS[name]
    repeated = {"action": "append"} if field.repeats else {}
    return option("--" + name.replace("_", "-"), field.metavar, field.help + note,
                  field.parse, **repeated)


def state_name(text):
    """Return the name of a state, spelt in any case."""
    if "," in text:
        names = re.split(r"\s*,\s*", text)
        raise QueueError("--state %s: write %s", text, " ".join(
            "--state " + name for name in names), code=2)
    if text.lower() not in STATES:
        raise unknown_word("state " + text, text, STATES, MEANT_STATES)
    return text.lower()


def text_to_match(text):
    """Return a text to search for."""
    if not text or not is_storable(text):  # an unset variable would select all jobs
        raise QueueError("--match: a text in UTF-8 that is not empty", code=2)
    return text


def setting_as_typed(text):
    """Return the name of a setting, spelt as it was typed."""
    setting_name(text)
    return text


def count_from(low, name, high=MAX_INTEGER):
    """Return a converter to a whole number, for the option NAME."""
    return lambda text: checked(name, whole_number(low, high), parse_number(text))


def seconds_from(low, name):
    """Return a converter to a duration, for the option NAME."""
    return lambda text: checked(name, duration_from(low), text)


IDS = positional("ids", "ID", "ids of jobs", nargs="*")
KEY = positional(
    "key", "KEY", "name of a setting: " + ", ".join(SETTINGS), setting_as_typed)


def state_option(states):
    """Return the option that selects jobs by these states."""
    names = ", ".join(states)

    def convert(text):
        if state_name(text) not in states:
            message = "--state %s: it has to be one of %s%s"
            hint = "; a failed job runs again by itself; to try one now: %s" % usage(
                "edit", "ID", "--run-at", "now") if state_name(text) == "failed" else ""
            raise QueueError(message, text, names, hint, code=2)
        return state_name(text)

    return option("--state", "STATE", "one of %s (repeatable)" % names,
                  convert, action="append", default=[])


SINCE, DIED_SINCE = (
    option("--since", "T", "only jobs that %s within T, like 12h" % verb,
           seconds_from(0, "--since")) for verb in ("changed", "died"))
MATCH = option("--match", "TEXT", "only jobs with TEXT in id or command",
               text_to_match)
EVERYWHERE = [
    flag("--json", "print one JSON document"),
    option("--db", "PATH", "the queue (default: QUEUECTL_DB, or queuectl.db)")]
LIMIT = option("--limit", "N", "at most N jobs, or 0 for all (default: all; on a"
               " terminal the newest that fit)", count_from(0, "--limit"))
ERROR = option("--error", "TEXT", "only jobs with this very error")
DRY_RUN = flag("--dry-run", "only list the jobs that would be changed")


# -- what commands and dashboard share -------------------------------------------------


def within_job_of(path):
    """Tell whether a job of the queue that still runs has started this command.

    Unlike `Queue.own_job` this needs no database, which may be gone or broken.
    """
    lease_path = os.environ.get("QUEUECTL_RUN", "")
    folder = os.path.join(path_beside(path, ".runs"), "")
    return lease_path.startswith(folder) and is_locked(lease_path)


def read_status(queue, lost=None, blocked=None):
    """Return the `Status` of a queue.

    Within a snapshot the caller passes the `lost_runs` from before it. It may pass the
    `blocked_jobs`, which take a while in a large queue.
    """
    if lost is None:
        lost = queue.lost_runs()
    none = {"id": None, "run_at": None}
    with queue.snapshot():  # so that the counts agree with the lists
        oldest, due = oldest_claimable(queue) or none, queue.next_due() or none
        pools = supervised_pools(queue.path)
        commands = {job["id"]: job["command"] for job in queue.jobs(
            where(["processing"]), brief=True)}
        return Status(
            *work_left(queue), path=queue.path, commands=commands,
            lost={run.id for run in lost} & {*commands},
            pools=pools, stopping_pools=stopping(queue.path, pools),
            oldest_job=oldest["id"], oldest_waiting=oldest["run_at"],
            next_job=due["id"], next_due=due["run_at"], paused=queue.is_paused(),
            cancelled=count_cancelled(queue), is_disk_full=is_disk_full(queue.path),
            **(blocked or queue.blocked_jobs()))


def look_at(queue):
    """Return a `Look` at the present moment."""
    return Look(queue, read_status(queue), queue.clock())


def status_document(status, now):
    """Return what `status --json` prints."""
    document = {name: getattr(status, name) for name in (
        "jobs", "workers", "oldest_waiting", "oldest_job", "next_due", "next_job",
        "paused")}
    workers = [with_iso_times(worker, "since") for worker in status.workers]
    return dict(with_iso_times(document, "oldest_waiting", "next_due"), workers=workers,
                blocked=len(status.blocked_seqs),
                verdict=verdict_text(verdict_on(status, now)))


def errors_of(queue):
    """Return `dead_by_error` with the most common last line of the tails as `line`.

    `are_alike` tells whether all of them end so, but for numbers. The line is empty
    only if no job has printed anything.
    """
    groups = dead_by_error(queue)
    for group in groups:
        lines = [last_line(tail) for tail in group.pop("tails") if tail is not None]
        shapes = [re.sub(r"\d+", "0", line) for line in lines]
        common = collections.Counter(filter(None, shapes)).most_common(1)
        (shape, alike), = common or [("", 0)]
        line = lines[shapes.index(shape)] if common else ""
        group.update(line=line, are_alike=alike == len(lines))
    return groups


def line_text(group):
    """Return what most of the dead of an error printed last, if any did."""
    others = "" if group["are_alike"] else ", and others"
    return group["line"] and "“%s”%s" % (group["line"], others)


def status_screen(status, groups, now, size):
    """Return what `status` shows on a terminal, where people look.

    Where it is small, zeros, errors and what waits give way to five running jobs.
    """
    running = [*running_lines(status, now, size.columns)]
    room = size.lines - 2 - len(running[:6])
    for detail in (3, 2, 1, 0):
        lines = [part for line in status_head(status, groups, now, size, detail)
                 for part in wrapped(line, size.columns)]
        if len(lines) <= room:
            break
    return lines + running


def status_head(status, groups, now, size, detail):
    """Yield the verdict, the counts and the pools; the rest by the DETAIL, 0 to 3."""
    verdict = verdict_on(status, now)
    yield Line(with_advice(verdict, status.path),
               STATES[verdict.state].colour, 0, len(verdict_text(verdict)))
    digits = max(len(str(count)) for count in status.jobs.values())
    for state, count in status.jobs.items():
        if count or detail == 3:
            yield count_line(state, count, digits, status)
    if detail >= 2:
        died = [group for group in groups if not group["is_cancelled"]]
        yield from error_lines(died, status.path, now, size.columns)
    if detail >= 1:
        yield from waiting_lines(status, now)
    yield from pool_lines(status)


def count_line(state, count, digits, status):
    """Return how many jobs a state has, and how many of them are not what it says."""
    delayed = status.delayed - status.retries
    kinds = {"pending": {"delayed": delayed, "behind a job": status.dependent},
             "dead": {"cancelled": status.cancelled}}
    title = "%-12s" % (state.capitalize() + ":")
    number = str(count).rjust(digits)
    of_them = counts_text(kinds.get(state, {}))
    text = joined(title + number, of_them and "(%s)" % of_them, by=" ")
    colour = STATES[state].colour if count else DIM
    return Line(text, colour, len(title), len(title + number))


def error_lines(groups, path, now, width):
    """Yield a line for each error of dead jobs; the time of the latest if it fits."""
    for group in groups[:SHOWN_ERRORS]:
        line = printable(joined(group["error"], line_text(group), by=": "))
        line = "  %s %s %s" % (grouped(group["jobs"]), drawable("×", "x"), line)
        when = ", the latest " if group["jobs"] > 1 else ", "
        when += relative_time(group["latest"], now)
        has_room = display_width(line + when) <= width
        yield line + when if has_room else truncate(line, max(width, 60))
    more = groups[SHOWN_ERRORS:]
    if more:
        yield in_queue(path, "  and %s; to see all: %s dlq list" % (
            plural(len(more), "more error"), PROGRAM))


def status_lines(status, now):
    """Yield what `status` prints into a pipe or a file."""
    for state, count in status.jobs.items():
        yield "%s: %d" % (state.capitalize(), count)
    yield from waiting_lines(status, now)
    verdict = obstacle(status)
    if verdict and (status.paused or count_unfinished(status.jobs)):
        yield with_advice(verdict, status.path)
    yield from worker_lines(status, now)


def waiting_lines(status, now):
    """Yield how many workers there are, and which jobs wait for what."""
    due = status.next_due
    yield "Active Workers: %d" % len(status.workers)
    if status.oldest_job:
        waited = duration_text(now - status.oldest_waiting)
        yield "Oldest Waiting: %s, for %s" % (status.oldest_job, waited)
    if due is not None:
        when = relative_time(due, now) if due > now else "now"
        if due < now and not obstacle(status):
            when = "late by %s, as all workers are busy" % duration_text(now - due)
        yield "Next Due: %s, %s" % (status.next_job, when)
    if status.blocked:
        yield "Blocked: %s; %s; %s" % (
            plural(len(status.blocked_seqs), "job"), blocked_text(status.blocked),
            step_text(GO_ON, status.blocked["dependency"], status.path))


def worker_lines(status, now):
    """Yield a line for each worker, with the command that it runs."""
    for worker in status.workers:
        doing = "idle"
        if worker["job"]:
            doing = "%s for %s: %s" % (
                worker["job"], duration_text(now - worker["since"]),
                printable(status.commands.get(worker["job"], "")))
        line = "  worker %(pid)d of pool %(pool)d: "
        if worker["pool"] in status.stopping_pools:
            line = "  worker %(pid)d of pool %(pool)d, which is stopping: "
        if worker["pool"] not in status.pools:
            line = "  worker %(pid)d, whose pool %(pool)d was killed: "
        yield line % worker + doing


def pool_lines(status):
    """Yield a line for each pool."""
    pools = {pool: [] for pool in sorted(status.pools)}
    for worker in status.workers:
        pools.setdefault(worker["pool"], []).append(worker["job"])
    for pool, jobs in pools.items():
        idle = jobs.count(None)
        yield joined("pool %d: %s" % (pool, plural(len(jobs), "worker")),
                     idle and grouped(idle) + " idle",
                     pool in status.stopping_pools and "stopping",
                     pool not in status.pools and "killed")


def running_lines(status, now, width):
    """Yield a table of what runs, in place of PIDs."""
    busy = [worker for worker in status.workers if worker["job"]]
    busy.sort(key=operator.itemgetter("since"))
    running = [[worker["job"], duration_text(now - worker["since"]),
                printable(status.commands.get(worker["job"], ""))]
               for worker in busy]
    if running:
        yield from table(["JOB", "FOR", "COMMAND"], running, width)


def ended_lines(queue, now, width, rows):
    """Yield a table of the jobs that ended last, of at most so many rows."""
    ended = [[job["id"], relative_time(job["updated_at"], now),
              printable(job["error"] or job["state"])]
             for job in last_ended(queue, min(10, rows - 2))]
    if ended:
        yield from ["", *table(["LAST ENDED", "WHEN", "RESULT"], ended, width)]


def watch_lines(lines, queue, now, seconds, size):
    """Return the lines that fill the screen of `--watch`, with its end in the last."""
    rows = size.lines - 2
    lines = fitting(lines, size.columns, rows)
    free = rows - len(lines)
    if free > 2:
        lines += ended_lines(queue, now, size.columns, free)
    footer = drawable(" · ", ", ").join([
        "Ctrl-C: quit", "every %gs" % seconds, printable(queue.path)])
    return [*lines, *[""] * (rows - len(lines)), Line(footer, DIM)]


def job_document(queue, job):
    """Return what `show --json` prints."""
    return dict(
        public_job(job), waiting=why_waiting(job, look_at(queue)),
        runs=[with_iso_times(run, "started_at", "finished_at")
              for run in queue.runs(job)])


def output_document(job, number, output):
    """Return what `logs --json` prints of run NUMBER."""
    text = output.decode("utf-8", FOREIGN_BYTES)
    return {"id": job["id"], "run": number, "output": text}


# -- enqueue ---------------------------------------------------------------------------


@command(
    "enqueue", "add jobs: a command after --, or JSON",
    "enqueue --id job1 --timeout 10m -- echo Hello",
    positional("jobs", "JSON", "an object, an array, or - for an array or JSON Lines on"
               " standard input: all or none", nargs="*"),
    option("--file", "F", "read the jobs from this file"),
    flag("--unique", "do nothing if this job is pending, processing or failed; if it is"
         " completed or dead, start it again"),
    flag("--lines", "each line of the file, or of standard input, is a command"),
    flag("--quiet", "print no ids"),
    *[field_option(name, " (default: %s)" % field.otherwise)
      for name, field in FIELDS.items()],
    creates_queue=True, takes_words=True,
    usage="%(prog)s [OPTION]... -- COMMAND...\n"
    "       %(prog)s [OPTION]... JSON...\n"
    "       %(prog)s [OPTION]... - | --file F | --lines")
def cmd_enqueue(args, queue):
    if args.lines and not args.file and not args.jobs:
        args.jobs = ["-"]
    options = enqueue_options(args)
    ids = []
    number = itertools.count()
    defaults = queue.defaults()
    places = Places()

    def check(document):
        if args.id and next(number):
            raise QueueError("--id: one id can't serve several jobs", code=2)
        if options and type(document) is dict:  # an option wins over the job's field
            document = {**document, **options}
        job = checked_job(document, defaults)
        if args.unique:
            ids.append(id_of_unique(job))
        return job

    with contextlib.ExitStack() as files:
        if args.file or args.jobs == ["-"]:
            lines = files.enter_context(spool(args.file))
            read = read_commands if args.lines else read_json_lines
            jobs = read(lines, check, places)
        else:
            # A command after -- is an option for this empty job.
            jobs = read_arguments(args.jobs or ["{}"], check)
        added = queue.enqueue(jobs, args.unique, places.name)
    report_dropped(added.dropped)
    if args.quiet:
        return
    jobs = queue.still_there(ids) if args.unique else queue.jobs(
        first=added.first, last=added.last, brief=not args.json)
    are_many = terminal_width(sys.stdout) and added.last - added.first >= 10
    print_jobs(args, jobs, enqueued_sum if are_many and not args.unique else
               functools.partial(enqueued_lines, unchanged=added.unchanged),
               "no jobs were given")
    if sys.stderr.isatty() and not args.json and standstill(queue):
        notice(standstill(queue))


def id_of_unique(job):
    if not job["id"]:
        raise QueueError("id: missing; a unique job needs one", code=2)
    return job["id"]


def report_dropped(dropped):
    """Report the dependencies that were dropped: {id: [id]}, as in `Added`."""
    ids = sorted({*itertools.chain(*dropped.values())})
    if ids:
        notice("this queue has no jobs %s: dropped from `after` of %s" % (
            listed(ids, 5), plural(len(dropped), "job")))


def enqueued_sum(jobs):
    """Yield how many new jobs there are; a list of them would fill a terminal."""
    first = next(jobs)["id"]
    for count, last in enumerate(jobs, 2):
        pass
    ids = first + drawable(" … ", " ... ") + last["id"]
    yield "enqueued %s (%s)" % (plural(count, "job"), ids)


def enqueued_lines(jobs, unchanged):
    """Yield what became of each job; UNCHANGED is as in `Added`."""
    for job in jobs:
        id = job["id"]
        if id not in unchanged:
            yield "enqueued " + id
        else:
            note = "" if job["command"] == unchanged[id] else ", unchanged"
            yield "%s is there already, %s%s" % (id, job["state"], note)


def enqueue_options(args):
    """Return the job fields that a command line gives, for all its jobs."""
    require_one_source(args)
    fields = given_fields(args)
    if fields.keys() & {"delay", "run_at"}:  # one replaces the other in the JSON
        fields = {"delay": None, "run_at": None, **fields}
    if "after" in fields:  # `waits_for` is about the `after` in the JSON
        fields["waits_for"] = None
    return fields


def require_one_source(args):
    """Refuse a command line unless it gives jobs in one way."""
    sources = ["".join(args.jobs), args.file, args.command, args.words]
    if args.lines and args.jobs and args.jobs != ["-"]:
        raise QueueError("enqueue: --lines reads standard input, or a file: %s", usage(
            "enqueue", "--lines", "--file", args.jobs[0]), code=2)
    if args.words == ["-"]:
        raise QueueError("enqueue: - is no command; to read jobs from standard input:"
                         " %s", usage("enqueue", "-"), code=2)
    if sum(map(bool, sources)) != 1:
        trouble = "no job"
        if any(sources):
            trouble = "give jobs, a command after --, or --file"
        raise QueueError("enqueue: %s; see: %s", trouble, usage("enqueue", "--help"),
                         code=2)
    if args.jobs and args.jobs != ["-"] and args.jobs[0].lstrip()[:1] not in ("{", "["):
        text = " ".join(args.jobs)
        if re.match(r"'\s*[{[]", text):  # cmd passes '…' on, and takes it apart
            parse_json(text.strip("'"))
        if re.search(r"\.(json|jsonl|ndjson)$", text) and os.path.isfile(text):
            raise QueueError("enqueue: to read jobs from a file: %s", usage(
                "enqueue", "--file", text), code=2)
        options = [word for word in args.typed if word not in args.jobs]
        raise QueueError("not JSON: %s; to run a command: %s", args.jobs[0], usage(
            "enqueue", *options, "--", *args.jobs), code=2)


def usage(*words):
    """Return a command line of queuectl that can be pasted into a shell."""
    return "%s %s" % (PROGRAM, quoted(words))


def given_fields(args):
    """Return the job fields that options and a command line give."""
    fields = dict(vars(args))
    fields.setdefault("id")  # `edit` has no --id
    if args.lock and len(args.lock) > 1:  # one of them would be lost
        raise QueueError("--lock: given twice, and a job has one", code=2)
    fields["lock"] = args.lock and args.lock[0]
    fields["after"] = values_or_none("--after", args.after)
    fields["env"] = values_or_none("--env", args.env)
    if isinstance(fields["env"], list):
        fields["env"] = dict(fields["env"])
    if args.words and args.command:
        raise QueueError("command: give it by --command or after --", code=2)
    if args.words:
        fields["command"] = shell_line(args.words)
    return {name: fields[name] for name in FIELDS if fields[name] is not None}


def values_or_none(name, values):
    """Return the values of an option that may be repeated, or its only one, `none`."""
    if "none" not in (values or ()):
        return values
    if len(values) > 1:
        raise QueueError("%s: none stands alone", name, code=2)
    return "none"


def shell_line(words):
    """Return the shell line that runs these words; a single one is a line already."""
    return words[0] if len(words) == 1 else quoted(words)


def read_arguments(texts, check):
    """Yield the checked jobs of JSON texts, each an object or an array."""
    for text in texts:
        value = parse_json(text)
        yield from map(check, value if isinstance(value, list) else [value])


class Places:
    """Where in a batch its jobs stand: `blank` has the lines without a job.

    It is None unless each job has a line.
    """

    def __init__(self):
        self.blank = None

    def name(self, number):
        """Return the place of a job, counted from 1: line 3, or job 3."""
        for line in self.blank or ():
            number += line <= number
        return "%s %d" % ("job" if self.blank is None else "line", number)


def read_commands(lines, check, places):
    """Yield the checked jobs of lines with a command each; a refusal names the line."""
    number = 0
    places.blank = []
    try:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                places.blank.append(number)
                continue
            text = line.decode("utf-8", "surrogateescape")
            yield check({"command": text.rstrip("\r\n")})
    except QueueError as error:
        raise at_line(number, error) from None


def read_json_lines(lines, check, places):
    """Yield the checked jobs of an array or of JSON Lines; a refusal names the line."""
    number = 0
    places.blank = []
    try:
        for batch in batches(lines):
            objects = parse_batch(batch)
            for index, line in enumerate(batch):
                number += 1
                if objects:
                    yield check(objects[index])
                elif line.isspace():
                    places.blank.append(number)
                elif line.lstrip()[:1] == b"[":  # an array: all the rest
                    places.blank = None
                    rest = b"".join(batch[index:]) + lines.read()
                    yield from map(check, parse_json(rest))
                    return
                else:
                    yield check(parse_json(line))
    except QueueError as error:
        raise at_line(number, error) from None


def at_line(number, error):
    """Return an error with the number of the line that it is about."""
    return QueueError("line %d: %s", number, error, code=error.code)


def parse_batch(lines):
    """Return the objects of JSON Lines; an empty list if one line is anything else.

    To parse a batch at once takes a third of the time. A random number stands between
    the lines. No line can contain it, so it proves that each object ends where its line
    does.
    """
    mark = int.from_bytes(os.urandom(7), "big")
    try:
        values = parse_json(b"[" + (b",%d," % mark).join(lines) + b"]")
    except QueueError:
        return []
    objects = values[::2]
    marks = values[1::2]
    is_sound = marks == [mark] * (len(lines) - 1) and set(map(type, objects)) == {dict}
    return objects if is_sound else []


@contextlib.contextmanager
def spool(path):
    """Open a file of jobs, or standard input, read to its end.

    Otherwise a slow producer at the other end of a pipe would keep the database locked.
    """
    import tempfile

    if not path and sys.stdin.isatty():
        notice("reading jobs from standard input, to its end: "
               + ("Ctrl-Z and Enter" if WINDOWS else "Ctrl-D"))
    with tempfile.SpooledTemporaryFile(2**24) as spooled:
        stdin = contextlib.nullcontext(sys.stdin.buffer)
        with open(path, "rb") if path else stdin as source:
            # Unlike `read`, it takes the end that somebody types at its first time.
            for piece in iter(functools.partial(source.read1, 2**16), b""):
                spooled.write(piece)
        convert_utf_16(spooled)
        drop_last_ctrl_z(spooled)
        spooled.seek(0)
        if spooled.read(3) != b"\xef\xbb\xbf":  # editors on Windows put it before UTF-8
            spooled.seek(0)
        yield spooled


def convert_utf_16(file):
    """Make a file UTF-8 if it begins with a byte order mark of UTF-16.

    PowerShell 5 writes that by `>`.
    """
    file.seek(0)
    if file.read(2) not in (b"\xff\xfe", b"\xfe\xff"):
        return
    file.seek(0)
    try:
        data = file.read().decode("utf-16").encode()
    except UnicodeDecodeError as error:
        message = "the file looks like UTF-16 but is not: %s"
        raise QueueError(message, error.reason, code=2) from None
    file.seek(0)
    file.truncate()
    file.write(data)


def drop_last_ctrl_z(file):
    """Cut off a Ctrl-Z at the end of a file, which old programs write on Windows."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - 1))
    if file.read() == b"\x1a":
        file.truncate(size - 1)


# -- look at jobs ----------------------------------------------------------------------


@command("list", "list jobs, oldest first", "list --state pending --limit 20",
         state_option(STATES), MATCH, SINCE, LIMIT, flag("--newest", "newest first"),
         creates_queue=True, must_print=True)
def cmd_list(args, queue):
    chosen = where(args.state or STATES, text=args.match,
                   changed_since=time_since(args, queue))
    note = note_below(args, queue)
    room = room_for_jobs(args, note)
    if room:  # the newest, in their order
        jobs = list(queue.jobs(chosen, room, newest=True))
        jobs = jobs if args.newest else jobs[::-1]
    else:
        jobs = queue.jobs(chosen, args.limit or 0, args.newest)
    is_empty = list_jobs(args, queue, jobs)
    is_newest = room or args.newest
    report_unlisted(args, queue, room, chosen, "older" if is_newest else "newer")
    print_lines([] if is_empty else note)


def note_below(args, queue):
    """Return what a terminal shows below a list of jobs that wait in vain: a line."""
    if args.json or not terminal_width(sys.stdout):
        return []
    counts = queue.counts()
    states = {*WAITING}.intersection(args.state or WAITING)
    reason = any(counts[state] for state in states) and standstill(queue)
    return [Line(reason, DIM)] if reason else []


def room_for_jobs(args, note):
    """Return how many jobs fit between the titles and the prompt of a terminal.

    It is None where --limit says how many jobs are listed, or where all are.
    """
    size = terminal_size(sys.stdout)
    if getattr(args, "limit", None) is not None or args.json or not size:
        return None
    below = sum(len(wrapped(line, size.columns)) for line in note)
    return max(1, size.lines - 3 - below)


def report_unlisted(args, queue, room, condition, age="older"):
    """Report how many jobs that meet a condition were not listed, and their AGE."""
    limit = room or args.limit or 0
    if args.json or not limit:
        return
    unlisted = queue.count(condition) - limit
    if unlisted > 0:
        more = plural(unlisted, age + " job")
        report_below(args, more + "; --limit 0 lists all")


def report_below(args, message):
    """Print what is to be known of a table: below it, or on standard error."""
    if terminal_width(sys.stdout) and not args.json:
        print_lines([Line(message, DIM)])
    elif not args.json:
        notice(message)


def time_since(args, queue):
    """Return the time that --since names, or None."""
    return None if args.since is None else queue.clock() - args.since


def list_jobs(args, queue, jobs, columns=LIST_COLUMNS, empty="no jobs"):
    """Print a table of jobs. If there are none, report others and return True."""
    is_empty = print_jobs(args, jobs, lambda jobs: job_table(
        jobs, look_at(queue), columns), empty)
    others = is_empty and not args.json and counts_text(queue.counts())
    if others:
        notice("others in this queue: " + others)
    elif is_empty:
        report_queue(args)
    return is_empty


def report_queue(args):
    """Report which queue a command has found empty: it may not be the one meant."""
    if not args.json:
        notice("the queue is %s" % printable(args.db))


@command("show", "show a job and its runs", "show job1",
         positional("id", "ID", "id of a job"), must_print=True)
def cmd_show(args, queue):
    job = queue.job(args.id)
    if args.json:
        print_result(args, job_document(queue, job))
    else:
        print_lines(job_lines(job, look_at(queue)))


# The fields that the answer of `show` contains: a terminal gets them once.
ANSWERED = ("id", "command", "state", "error", "exit_code", "waits_for", "waiting",
            "started_at", "finished_at", "seconds")


def job_lines(job, look):
    """Yield what is asked first about a job, then its fields and its runs."""
    yield from answer_lines(job, look)
    yield ""
    is_short = terminal_width(sys.stdout)  # the answer must stay in sight
    for name, value in field_texts(job, look).items():
        if value not in (None, "") and not (is_short and name in ANSWERED):
            yield from field_lines(name, value)
    runs = look.queue.runs(job)
    if runs:
        yield ""
        yield from run_table(runs, look.now)


def field_texts(job, look):
    """Return the fields of a job for people, by name."""
    fields = dict(public_job(job), waiting=why_waiting(job, look))
    is_narrow = (terminal_width(sys.stdout) or 80) < 48
    for name in TIMES:
        if job[name] is not None:
            when = relative_time(job[name], look.now)
            fields[name] = when if is_narrow else fields[name] + ", " + when
    fields["env"] = " ".join(
        name + "=" + quoted([value]) for name, value in fields["env"].items())
    if job["timeout"]:
        fields["timeout"] = setting_with_unit("timeout", job["timeout"])
    for name in ("after", "waits_for"):
        fields[name] = ", ".join(fields[name])
    return fields


def answer_lines(job, look):
    """Yield why a job is what it is, what it printed last, and the next step."""
    queue = look.queue
    error = job["error"] if job["state"] not in ("pending", "processing") else ""
    sentence = JOB_KINDS[kind_of(job, look)].sentence(job, look)
    reason = ": " + printable(joined(error, sentence, by="; "))
    yield state_line(job["id"] + " is ", job["state"], reason)
    first, *others = map(printable, job["command"].split("\n"))
    yield from ["  $ " + first, *("    " + line for line in others)]
    for line in last_lines(queue.tail(job, MAX_INTEGER), 5):
        yield truncate("  | " + printable(line), terminal_width(sys.stdout))
    ids = [id for _, id in queue.waiting_dependents(job)]
    if ids:
        yield "%s wait%s for it: %s" % (
            plural(len(ids), "job"), "s" if len(ids) == 1 else "", listed(ids))
    step = next_step(job, look)
    if step:
        yield step


# What can be done where a verb does not take a job in a state.
END_FIRST = NextStep("to end it first", "cancel {}")
REMOVE = NextStep("to remove it", "delete {}")
REFUSED_COMMANDS = {
    ("retry", "pending"): NextStep("to see why it waits", "show {}"),
    ("retry", "processing"): END_FIRST,
    ("retry", "failed"): JOB_KINDS["failed"].next_step,
    ("retry", "completed"): RUN_AGAIN,
    ("edit", "processing"): END_FIRST,
    ("edit", "completed"): NextStep(
        "to run another command", "enqueue --unique --id {} -- COMMAND"),
    ("cancel", "completed"): REMOVE,
    ("cancel", "dead"): REMOVE,
    ("delete", "processing"): END_FIRST,
    **{("enqueue", state): NextStep("to see it", "show {}") for state in STATES},
}


def with_next_step(name, args, error):
    """Return an error with the next step, if a command has refused a job's state."""
    verb = name.split()[-1]
    step = error.job and REFUSED_COMMANDS.get((verb, error.job["state"]))
    is_one_of_many = hasattr(args, "dry_run") and getattr(args, "ids", "")[1:]
    return QueueError(joined(
        str(error), is_one_of_many and "nothing is changed",
        step and step_text(step, error.job["id"], args.db), by="; "), code=error.code)


def step_text(step, id, path):
    """Return a `NextStep` for a job as a text, with its command."""
    line = "%s %s" % (PROGRAM, step.command.format(quoted([id])))
    return "%s: %s" % (step.purpose, in_queue(path, line))


def next_step(job, look):
    """Return what can be done about a job, as a command, or nothing."""
    id = job["id"]
    kind = kind_of(job, look)
    step = JOB_KINDS[kind].next_step
    dead = kind == "blocked" and look.queue.dead_before(job)
    if dead:
        id = dead["id"]
        step = GO_ON
    is_due_already = kind == "failed" and not due_text(job, look.now)
    if step is None or is_due_already:
        return ""
    return step_text(step, id, look.queue.path)


def field_lines(name, value):
    """Yield a field and its value, which may have several lines."""
    colour = STATES[value].colour if name == "state" else None
    title = name + ":"
    for line in map(printable, str(value).split("\n")):
        yield Line(title.ljust(13) + line, colour, 13)
        title = ""


@command("logs", "print the output of the latest run of jobs", "logs -f job1",
         positional("ids", "ID", "ids of jobs", nargs="+"),
         flag("-f --follow", "go on until the run ends; wait for the first to begin"),
         option("--attempt", "N", "the last run of this attempt (default: the latest)",
                count_from(1, "--attempt")),
         option("--run", "N", "this run (default: the latest)", count_from(1, "--run")),
         must_print=True)
def cmd_logs(args, queue):
    chosen = {name: getattr(args, name) for name in ("run", "attempt")
              if getattr(args, name) is not None}
    options = ["--follow"] * args.follow + ["--" + name for name in chosen]
    if options[1:]:
        raise QueueError("logs: give %s or %s, not both", *options[:2], code=2)
    if options and args.ids[1:]:
        raise QueueError("logs: %s takes one job", *options, code=2)
    if args.follow and args.json:
        raise QueueError("logs: --follow prints no JSON", code=2)
    jobs = [queue.job(id) for id in args.ids]
    if args.follow:
        with contextlib.closing(OutputPrinter()) as printer:
            return follow(queue, jobs[0], printer)
    if len(jobs) > 1:
        return print_logs(args, queue, jobs)
    job = jobs[0]
    run, output = latest_output(queue, job, chosen)
    if args.json:
        print(json.dumps(output_document(job, run["run"], output)))
    else:
        with contextlib.closing(OutputPrinter()) as printer:
            printer.print(output)
    if not output:
        notice("job %s: %s" % (job["id"], why_silent(run, queue.clock())))


def print_logs(args, queue, jobs):
    """Print the latest output of jobs, each under a line with its id and error."""
    latest = ((job, *latest_output(queue, job)) for job in jobs)
    if args.json:
        return print(json.dumps([
            output_document(job, run["run"], output) for job, run, output in latest]))
    for job, run, output in latest:
        end = run["error"] or ("completed" if run["finished_at"] else "running")
        line = "==> %s: %s: $ %s" % tuple(map(printable, (
            job["id"], end, job["command"])))
        print(truncate(line, terminal_width(sys.stdout)))
        output = output or b"(no output)"
        OutputPrinter().print(output if output.endswith(b"\n") else output + b"\n")


NO_RUN = "has not run yet"  # in place of the end of a run


def latest_output(queue, job, chosen={}):
    """Return the latest run of a job, and its output.

    CHOSEN asks for an earlier one: {"run": number} or {"attempt": number}.
    """
    runs = queue.runs(job)
    for name, number in chosen.items():
        runs = [run for run in runs if run[name] == number]
        if not runs:
            raise QueueError("job %s has no %s %d", job["id"], name, number)
    no_run = {"run": job["run"], "error": job["error"] or NO_RUN,
              "started_at": None, "finished_at": None}
    run = runs[-1] if runs else no_run
    return run, output_of(queue, job, run["run"])


def why_silent(run, now):
    """Return in words what is known of a run that has printed nothing."""
    if run["started_at"] is None:
        return printable(run["error"])
    if run["finished_at"] is None:
        return "no output yet; it has run for " + duration_text(now - run["started_at"])
    return "no output; " + printable(run["error"] or "exit 0")


class OutputPrinter:
    """Prints output as the bytes that it is, or as text, harmless for a terminal."""

    def __init__(self):
        import codecs

        self.is_terminal = terminal_width(sys.stdout)
        self.is_in_line = False
        self.takes_text = self.is_terminal or takes_text(sys.stdout)
        self.decoder = codecs.getincrementaldecoder("utf-8")(FOREIGN_BYTES)

    def print(self, output, is_last=True):
        """Print a piece of the output. Of text, half a character waits for the next."""
        self.is_in_line = not output.endswith(b"\n") if output else self.is_in_line
        sys.stdout.flush()
        if self.takes_text:
            text = self.decoder.decode(output, is_last)
            if self.is_terminal:
                text = re.sub(UNWANTED, r"\1", text)
            sys.stdout.write(text.replace("\r\n", "\n"))
            sys.stdout.flush()
        else:
            sys.stdout.buffer.write(output)
            sys.stdout.buffer.flush()

    def close(self):
        """On a terminal, end the line that the output has begun."""
        if self.is_in_line and self.is_terminal:
            self.print(b"\n")

    def notice(self, message):
        """Report something, on a line of its own."""
        self.close()
        notice(message)


def follow(queue, job, printer):
    """Print the output of a job's latest run while it runs; wait for the first run."""
    job = wait_for_run(queue, job)
    run = queue.latest_run(job)
    silent_until = time.monotonic() + STOP_REPORT_DELAY
    printed = 0
    is_running = True
    while is_running:
        queue.require_file()
        is_running = queue.is_current(run)
        dropped, output = split_dropped(output_of(queue, job, run.number))
        if dropped > printed:
            printer.notice("%d bytes of output were dropped here" % (dropped - printed))
        printer.print(output[max(0, printed - dropped) :], is_last=not is_running)
        printed = max(printed, dropped + len(output))
        if is_running and not printed and time.monotonic() > silent_until:
            silent_until = MAX_TIME
            printer.notice(
                "job %s: %s; no output yet" % (printable(run.id), tries_text(job)))
        if run.lease_path in [lost.lease_path for lost in queue.lost_runs()]:
            raise QueueError("the worker of job %s died; a pool puts it back", run.id)
        if is_running and is_reader_gone(sys.stdout):
            return
        if is_running:
            time.sleep(WAIT_INTERVAL)
    ended = [row for row in queue.runs(job) if row["run"] == run.number]
    end = ended[0]["error"] if ended else end_without_run(queue, job)
    if ended and not printed:
        end = why_silent(ended[0], queue.clock())
    for job in queue.still_there([run.id]):
        if job["state"] == "failed" and job["run"] == run.number:
            due = due_text(job, queue.clock()) or "now"
            end = "%s, %s; again %s" % (end, tries_text(job), due)
        if job["state"] == "pending" and job["run"] == run.number:
            end = joined(end, "it will run again", by="; ")
    if end:
        printer.notice("job %s: %s" % (run.id, printable(end)))


def end_without_run(queue, job):
    """Return in words what became of a job that has no run, or none any more."""
    if queue.state(job["id"]) is None:
        return "it was removed"
    return job["error"] or NO_RUN


def wait_for_run(queue, job):
    """Wait until a job has run or runs; return it. Report why it does not run."""
    id = job["id"]
    is_reported = False
    while not job["run"] and job["state"] not in FINISHED:
        if job["waits"] and job["seq"] in queue.blocked_seqs():
            reason = why_waiting(job, look_at(queue))
            raise QueueError("job %s can't go on: %s", id, reason)
        if not is_reported:
            notice("job %s: %s" % (id, why_waiting(job, look_at(queue))))
            is_reported = True
        time.sleep(WAIT_INTERVAL)
        queue.require_file()
        job = queue.job(id)
    if is_reported and job["run"]:
        notice("job %s: %s" % (id, tries_text(job)))
    return job


def output_of(queue, job, number):
    """Return the output of run NUMBER; of a running one what it has printed so far."""
    output = queue.output(job, number)
    if output is None and number == job["run"]:
        # If the run has ended between the two reads, its output is in the database now.
        lease_path = queue.latest_run(job).lease_path
        limit = queue.settings()["output_limit"]
        output = read_output(lease_path, limit) or queue.output(job, number)
    return output or b""


def with_dead_hint(message, dead, path, stream):
    """Return a message; on a terminal with how to see so many DEAD jobs."""
    if not dead or not terminal_width(stream):
        return message
    return "%s; to see %s: %s" % (
        message, "it" if dead == 1 else "them", in_queue(path, usage("dlq", "list")))


@command("wait", "wait until jobs, or all, are completed or dead (1: dead)",
         "wait job1 --timeout 10m",
         positional("ids", "ID", "ids of jobs (default: all that wait or run)",
                    nargs="*"),
         option("--timeout", "T", "give up with exit code 124 (default: never, though"
                " no pool is running)", seconds_from(0, "--timeout")))
def cmd_wait(args, queue):
    with contextlib.closing(ProgressLine()) as progress:
        report = WaitReport(queue, progress, bool(args.ids))
        try:
            counts = queue.wait(args.ids or None, args.timeout, report.update)
        except KeyboardInterrupt:
            report.give_up("interrupted")
            return 130
    if counts is None:
        after = args.timeout and " after " + duration_text(args.timeout)
        report.give_up("gave up" + (after or ""))
        return 124
    message = ", ".join(grouped(counts[state]) + " " + state for state in FINISHED)
    if not any(counts[name] for name in counts if name != "died_before"):
        message = "nothing to wait for; " + message
    if args.ids and counts["dead"]:
        message += " (%s)" % listed([
            "%s: %s" % (job["id"], job["error"])
            for job in queue.still_there(args.ids) if job["state"] == "dead"])
    if counts["died_before"]:
        message += ", %s died before" % grouped(counts["died_before"])
    if counts["removed"]:
        removed = grouped(counts["removed"])
        message += ", %s removed before they were seen to end" % removed
    if counts["left"]:
        blocked = queue.first_blocked()
        why = blocked_text(blocked) if blocked else "what held them up has just ended"
        message += ", %s can't go on: %s" % (grouped(len(counts["left"])), why)
    print_result(args, counts, with_dead_hint(
        message, counts["dead"] + counts["died_before"], args.db, sys.stdout))
    failures = (*BLOCKING, "died_before", "removed", "left")
    return 1 if any(counts[name] for name in failures) else 0


def to_go_text(counts):
    """Return in words for how many jobs `wait` waits, delayed ones too."""
    return grouped(count_unfinished(counts)) + " to go"


class WaitReport:
    """What `wait` prints while it waits: its progress, and why nothing happens."""

    def __init__(self, queue, progress, is_named):
        self.queue, self.progress, self.is_named = queue, progress, is_named
        self.began = self.next_at = time.monotonic()
        self.reason = False  # why nothing happened; True while no job is due
        self.wait = None  # the `Wait`, once it has looked

    def update(self, wait):
        """Show the progress; after a while report a standstill, and its end.

        Somebody at a terminal hears of it soon. A script may be about to start a pool.
        """
        self.wait = wait
        if time.monotonic() < self.next_at:  # to look takes a while in a large queue
            return
        self.next_at = time.monotonic() + PROGRESS_INTERVAL
        delay = REPORT_DELAY
        width = terminal_width(sys.stderr)
        if width:
            self.progress.redraw(self.rest(width - 1))
            delay = STOP_REPORT_DELAY
        if time.monotonic() < self.began + delay:
            return
        reason = why_nothing_ends(self.queue)
        work = work_left(self.queue)
        is_other = reason or work.ready or work.jobs["processing"]
        is_idle = not is_other and count_unfinished(self.wait.counts()) > 0
        if (reason or is_idle) != self.reason:
            self.progress.close()
            words = reason or is_idle and self.rest(by_name=True)
            if words or self.reason is not True:
                notice(words or "jobs start again")
        self.reason = reason or is_idle

    def rest(self, width=MAX_INTEGER, by_name=False):
        """Return in words what has not ended, and what has; few named jobs BY_NAME."""
        counts = self.wait.counts()
        if (self.is_named or by_name) and len(self.wait.unfinished) <= MAX_NAMED:
            look = look_at(self.queue)
            rest = "waiting for " + listed([
                "%s (%s)" % (job["id"], short_reason(job, look) or job["state"])
                for job in self.queue.still_there(self.wait.unfinished)
                if job["state"] not in FINISHED])
            return truncate(joined(rest, ended_text(counts), by="; "), width)
        work = work_left(self.queue)
        # Neither is known when some jobs end, nor when those end that wait for a time.
        is_known = not self.is_named and work.delayed <= work.retries
        left = time_left(work, self.queue.clock()) if is_known else ""
        return progress_text(to_go_text(counts), left, counts, width)

    def give_up(self, how):
        """Report that the wait has ended before the jobs have."""
        self.progress.close()
        if self.wait:
            how += ": " + self.rest()
        notice(joined(how, why_nothing_ends(self.queue), by="; "))


def why_nothing_ends(queue):
    """Return in words why this wait may never end, or nothing."""
    reason = standstill(queue)
    if not reason and queue.own_job() and all(
            worker["job"] for worker in queue.workers()):
        return "no worker is free; one runs this very job"
    return reason


@command("status", "count the jobs, list the workers", "status --watch",
         option("--watch", "SECONDS", "refresh every SECONDS (default: 1) until Ctrl-C",
                seconds_from(0.1, "--watch"), nargs="?", const=1.0),
         flag("--check", "end with 1 if no pool runs, or somebody is needed: a job is"
              " dead, the queue is paused, the disk is full"),
         creates_queue=True, must_print=True)
def cmd_status(args, queue):
    if args.watch:
        return watch_status(args, queue)
    status = print_status(args, queue)
    if not any(status.jobs.values()) and not status.workers:
        report_queue(args)
    problem = args.check and problem_of(status, queue.clock())
    if problem:
        notice(problem)
    return int(bool(problem))


def watch_status(args, queue):
    """Print the status at each refresh; a terminal shows the latest one alone."""
    # What stands on a terminal is scrolled off it, so that no picture overwrites it.
    size = terminal_size(sys.stdout)
    print(end="\n" * (size.lines if size and not args.json else 0))
    try:
        while True:
            queue.require_file()
            size = terminal_size(sys.stdout)
            print_status(args, queue)
            print(end="" if size or args.json else "\n")
            sys.stdout.flush()
            # A terminal that was resized does not wait.
            wait_until(lambda: terminal_size(sys.stdout) != size, args.watch,
                       STEP_INTERVAL)
    except KeyboardInterrupt:
        if terminal_width(sys.stdout):  # the prompt stands in place of the ^C
            print(end="\r\x1b[K")
        return 130


def print_status(args, queue):
    """Print the status of a queue, and return the values of it."""
    now, status = queue.clock(), read_status(queue)
    size = terminal_size(sys.stdout)
    if args.json:
        print_result(args, status_document(status, now))
    elif not size:
        print_lines(status_lines(status, now))
    else:
        lines = status_screen(status, errors_of(queue), now, size)
        if args.watch:
            print(end=screenful(watch_lines(lines, queue, now, args.watch, size)))
        else:
            print_lines(fitting(lines, size.columns, size.lines - 1))
    return status


def problem_of(status, now):
    """Return why somebody has to look after a queue that pools should work on."""
    verdict = verdict_on(status, now)
    if verdict.state in ("failed", "dead"):
        return verdict.harm or with_advice(verdict, status.path, str.lower)
    return "" if status.pools else "no pool is running"


def fitting(lines, columns, rows):
    """Return the lines, wrapped for a terminal, as many as it has ROWS for."""
    lines = [part for line in lines for part in wrapped(line, columns)]
    if len(lines) > rows:
        lines[rows - 1 :] = ["  and %d more" % (len(lines) - rows + 1)]
    return lines


def screenful(lines):
    """Return the text that redraws these lines."""
    width, paint = terminal_width(sys.stdout), painter(sys.stdout)
    # Each line is cleared first: behind its last column that would clear this. A long
    # id would be wrapped by the terminal, and push the first line off the screen.
    lines = ("\x1b[K%s\n" % paint(truncate(line, width)) for line in lines)
    return "\x1b[H" + "".join(lines) + "\x1b[J"


@command("stats", "show throughput, run times, waiting times and errors",
         "stats --since 1d",
         option("--since", "T", "over this time (default: 1h)",
                seconds_from(1, "--since"), default=3600.0),
         creates_queue=True, must_print=True, aliases=("metrics",))
def cmd_stats(args, queue):
    stats = read_stats(queue, queue.clock() - args.since)
    lines = stats_lines(stats, terminal_width(sys.stdout) or 80)
    print_result(args, stats, *lines)


# -- change jobs, by their ids or many at once -----------------------------------------


@command("edit", "change a job that waits or is dead", "edit job1 --run-at now",
         positional("job", "ID", "id of a job"),
         *[field_option(name, ", or none" if field.can_be_none else "")
           for name, field in FIELDS.items() if name != "id"],
         takes_words=True, usage="%(prog)s ID [OPTION]... [-- COMMAND...]")
def cmd_edit(args, queue):
    fields = given_fields(args)
    if not fields:
        message = "edit: nothing to change; see: " + usage("edit", "--help")
        raise QueueError(message, code=2)
    job = queue.edit(args.job, fields)
    answer = "edited " + args.job
    if job["state"] == "dead":
        answer += ": still dead; " + next_step(job, look_at(queue))
    print_result(args, public_job(job), answer)


@command("pause", "let no further job start; running ones finish", "pause",
         creates_queue=True)
def cmd_pause(args, queue):
    already = "already " if queue.is_paused() else ""
    queue.set_paused(True)
    print_result(args, {"paused": True}, already + standstill(queue))


@command("resume", "let jobs start again", "resume", creates_queue=True)
def cmd_resume(args, queue):
    answer = "resumed" if queue.is_paused() else "the queue was not paused"
    queue.set_paused(False)
    answer = joined(answer, standstill(queue), by="; ")
    print_result(args, {"paused": False}, answer)


@command("backup", "copy the queue, paused, into a new FILE; pools may run",
         "backup queue-2026-01-31.db", positional("file", "FILE", "the file to create"))
def cmd_backup(args, queue):
    try:
        queue.backup(args.file)
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or with_cause(error, args.file)
        raise QueueError("can't copy to %s: %s", args.file, reason) from None
    path = os.path.abspath(args.file)
    with Queue(path, create=False) as copy:
        jobs = sum(copy.counts().values())
    print_result(args, {"path": path, "jobs": jobs}, "copied %s to %s" % (
        plural(jobs, "job"), printable(path)))


def require_one_selection(args, *ways):
    """Refuse a command line unless it selects jobs by ids, or in one of these WAYS."""
    count = [bool(way) for way in (args.ids, *ways)].count(True)
    options = ", ".join("--" + name.replace("_", "-") for name in (
        "all", "state", "match", "error", "since", "older_than") if hasattr(args, name))
    if not count:
        raise QueueError("which jobs? name ids, or %s", options, code=2)
    if count > 1:
        raise QueueError("give ids, or some of %s; --all and ids stand alone", options,
                         code=2)


# The jobs that a verb for many is about.
Selection = collections.namedtuple("Selection", [
    "taken",  # the condition for those that it changes
    "spared",  # that for those which it leaves alone, or None
    "reason",  # why it does
    "step",  # the `NextStep` for one of them
    "age"],  # what has been asked of all, in words
    defaults=(None, None, None, ""))


def reason_to_spare(selection, count):
    return selection.reason.format("it" if count == 1 else "them")


def jobs_to_retry(states, **filters):
    return Selection(where(states, cancelled=False, **filters),
                     where(states, cancelled=True, **filters),
                     "cancelled ones are retried by id",
                     NextStep("to retry one", "retry {}"))


def jobs_to_cancel(states, **filters):
    return Selection(where(states, **filters))


def jobs_to_run_now(states, **filters):
    return Selection(where(states, **dict(filters, for_a_time=True)))


def jobs_to_delete(states, **filters):
    chosen = where(states, **filters)
    return Selection(*split_by_need(chosen), "other jobs wait for {}",
                     NextStep("to see which", "show {}"))


def apply_to_named(args, queue, verb, done, answer):
    """Apply a verb to the jobs with the given ids, and print `answer(id)` for each.

    With --dry-run only list them, but refuse what the verb refuses.
    """
    ids = list(dict.fromkeys(args.ids))
    if not args.dry_run:
        verb(ids)
        return print_result(args, {done: ids}, *map(answer, ids))
    with contextlib.suppress(Rehearsed), queue.transaction():
        jobs = [queue.job(id) for id in ids]
        verb(ids)
        raise Rehearsed
    list_dry_run(args, queue, done, jobs, len(jobs))


class Rehearsed(Exception):
    """Ends a transaction that is not to change anything."""


def list_dry_run(args, queue, done, jobs, count, age="", left=""):
    """List the jobs that a verb would change; a terminal gets as many as fit."""
    message = "%s%s would be %s; nothing is changed" % (plural(count, "job"), age, done)
    message = joined(message, left, by="; ")
    room = room_for_jobs(args, [message, ""])
    list_jobs(args, queue, itertools.islice(jobs, room))
    if room and count > room:
        report_below(args, "and %s more" % grouped(count - room))
    report_below(args, message)


def apply_to_many(args, queue, verb, done, selection):
    """Apply a verb to the jobs of a selection; with --dry-run only list them."""
    if args.dry_run:
        jobs, count = queue.jobs(selection.taken), queue.count(selection.taken)
        left = spared_text(queue, selection)
        return list_dry_run(args, queue, done, jobs, count, selection.age, left)
    count = verb(selection.taken)
    result = {done: count}
    if selection.spared:
        result["left"] = queue.count(selection.spared)
    message = "%s %s%s" % (done, plural(count, "job"), selection.age)
    print_result(
        args, result, joined(message, spared_text(queue, selection), by="; "))


def spared_text(queue, selection):
    """Return which jobs a verb for many spares, and the next step for the first."""
    condition = selection.spared
    ids = condition and [job["id"] for job in queue.jobs(condition, 4, brief=True)]
    if not ids:
        return ""
    names = ", ".join(ids[:3]) + (", ..." if ids[3:] else "")
    count = queue.count(condition)
    return "%d left: %s (%s); %s" % (
        count, reason_to_spare(selection, count), names,
        step_text(selection.step, ids[0], queue.path))


@command("cancel", "end jobs that wait or run; they become dead", "cancel job1",
         IDS, state_option(TAKES["cancel"]), MATCH, DRY_RUN)
def cmd_cancel(args, queue):
    require_one_selection(args, args.state or args.match)
    if args.ids:
        return apply_to_named(args, queue, queue.cancel, "cancelled",
                              lambda id: cancel_answer(queue, id))
    apply_to_many(args, queue, queue.cancel_all, "cancelled", jobs_to_cancel(
        args.state or TAKES["cancel"], text=args.match))


def cancel_answer(queue, id):
    """Return what `cancel` prints of a job."""
    for job in queue.still_there([id]):
        if job["state"] == "processing":  # its worker has to end it first
            how = why_waiting(job, look_at(queue)) or "ending its processes"
            return "cancelling %s: %s" % (id, how)
    return "cancelled " + id


@command("retry", "run finished jobs again, with attempts 0", "retry job1",
         IDS, state_option(TAKES["retry"]), MATCH, DRY_RUN)
def cmd_retry(args, queue):
    require_one_selection(args, args.state or args.match)
    retry_jobs(args, queue, args.state or TAKES["retry"], text=args.match)


def retry_jobs(args, queue, states, **filters):
    """Retry the jobs with the given ids, or those in these states."""
    if args.ids:
        answer = "retried %s: pending again, with 0 attempts"
        return apply_to_named(args, queue, lambda ids: queue.retry(ids, states),
                              "retried", lambda id: answer % id)
    apply_to_many(
        args, queue, queue.retry_all, "retried", jobs_to_retry(states, **filters))


@command("delete", "remove jobs that do not run",
         "delete --state completed --older-than 7d", IDS,
         state_option(TAKES["delete"]), MATCH,
         flag("--all", "all but running ones"),
         option("--older-than", "T", "only jobs that finished more than T ago; without"
                " --state or --all only completed ones",
                seconds_from(0, "--older-than")),
         DRY_RUN)
def cmd_delete(args, queue):
    has_age = args.older_than is not None
    has_filter = args.state or args.match
    require_one_selection(args, has_filter, args.all or (has_age and not has_filter))
    if has_age and {*args.state} - {*FINISHED}:
        message = "--older-than: only jobs that have finished have an age"
        raise QueueError(message, code=2)
    if args.ids:
        return apply_to_named(args, queue, queue.delete, "deleted",
                              lambda id: "deleted " + id)
    apply_to_many(args, queue, queue.delete_all, "deleted", selection_to_delete(
        args, None if not has_age else queue.clock() - args.older_than))


def selection_to_delete(args, before):
    """Return the selection of `delete`; jobs that finished BEFORE a time, if given."""
    states = args.state or TAKES["delete"]
    if before is not None and not args.all and not args.state:
        states = ["completed"]  # people must look at the dead before they go
    selection = jobs_to_delete(states, text=args.match, finished_before=before)
    if args.all and before is None:  # jobs go together with their dependents
        selection = selection._replace(taken=where(states))
    if before is not None:  # to many people, 7 means days
        age = setting_with_unit("keep", args.older_than)
        selection = selection._replace(age=" that ended more than %s ago" % age)
    return selection


# -- the dead letter queue -------------------------------------------------------------


@command("dlq list", "list the dead jobs, the latest first", "dlq list --since 12h",
         MATCH, ERROR, DIED_SINCE, LIMIT, creates_queue=True, must_print=True)
def cmd_dlq_list(args, queue):
    filters = dead_filters(args, queue)
    chosen = where(["dead"], **filters)
    summary, note = [], []
    if not args.json and terminal_width(sys.stdout):
        errors = [
            row for row in common_errors(queue, chosen) if row["error"] != CANCELLED]
        if errors and errors[0]["jobs"] > 1:
            summary = ["Most common errors: " + errors_text(errors)]
        note = [Line(in_queue(args.db, purpose + usage("dlq", *line)), DIM)
                for purpose, *line in (("to see what they printed: ", "logs"),
                                       ("to run one again: ", "retry", "ID"))]
    print_lines(summary)
    room = room_for_jobs(args, summary + note)
    dead = queue.dead_jobs(limit=room or args.limit or -1, **filters)
    is_empty = list_jobs(args, queue, dead, DLQ_COLUMNS, "no dead jobs")
    report_unlisted(args, queue, room, chosen)
    print_lines([] if is_empty else note)


def dead_filters(args, queue):
    """Return what selects dead jobs; report their errors if `--error` names another."""
    errors = args.error and common_errors(queue, where(["dead"]))
    if errors and args.error not in [row["error"] for row in errors]:
        notice("no dead job has this very error; there are: " + errors_text(errors))
    return dict(
        text=args.match, error=args.error, changed_since=time_since(args, queue))


def errors_text(errors):
    """Return the most common errors of dead jobs, each with its count."""
    return listed(["%(error)s (%(jobs)d)" % row for row in errors])


@command("dlq logs", "print the latest output of dead jobs", "dlq logs --since 12h",
         MATCH, ERROR, DIED_SINCE, must_print=True)
def cmd_dlq_logs(args, queue):
    dead = queue.dead_jobs(**dead_filters(args, queue))
    first = list(itertools.islice(dead, 1))
    print_logs(args, queue, itertools.chain(first, dead))
    if not first and not args.json:
        print("no dead jobs")


@command("dlq retry", "make dead jobs pending again, with attempts 0", "dlq retry job4",
         IDS, flag("--all", "all but those that were cancelled"), MATCH, ERROR,
         DIED_SINCE, DRY_RUN)
def cmd_dlq_retry(args, queue):
    has_filter = args.match or args.error or args.since is not None
    require_one_selection(args, has_filter, args.all)
    retry_jobs(args, queue, TAKES["dlq retry"], **dead_filters(args, queue))


@command("dlq clear", "remove all dead jobs; also dlq purge", "dlq clear",
         MATCH, ERROR, DIED_SINCE, DRY_RUN, aliases=("dlq purge",))
def cmd_dlq_clear(args, queue):
    apply_to_many(args, queue, queue.delete_all, "deleted", jobs_to_delete(
        TAKES["dlq clear"], **dead_filters(args, queue)))


# -- settings --------------------------------------------------------------------------


@command("config show", "show all settings", "config show",
         creates_queue=True, must_print=True, aliases=("config list",))
def cmd_config_show(args, queue):
    values = queue.settings()
    width = terminal_width(sys.stdout)
    columns = 4 if width is None or width >= 60 else 2
    changed = " *" if width else ""  # a script takes the value as it is
    rows = [
        [name, setting_with_unit(name, values[name])
         + changed * (values[name] != setting.default),
         setting_with_unit(name, setting.default), setting.meaning][:columns]
        for name, setting in SETTINGS.items()]
    titles = ["SETTING", "VALUE", "DEFAULT", "MEANING"][:columns]
    print_result(args, values, *table(titles, rows, width))


@command("config get", "print the value of a setting", "config get max_retries",
         positional("key", "KEY", "name of a setting (default: all)", setting_as_typed,
                    nargs="?"),
         creates_queue=True, must_print=True)
def cmd_config_get(args, queue):
    if args.key is None:
        return cmd_config_show(args, queue)
    name = setting_name(args.key)
    value = queue.settings()[name]
    print_result(args, value, setting_with_unit(name, value))


@command("config set", "change a setting", "config set max_retries 5", KEY,
         positional("value", "VALUE", "its new value, like 5, 90s, 64K, none"),
         creates_queue=True)
def cmd_config_set(args, queue):
    queue.set(args.key, parse_number(args.value))
    print_setting(args, queue)


@command("config unset", "go back to a setting's default", "config unset max_retries",
         KEY, creates_queue=True)
def cmd_config_unset(args, queue):
    queue.unset(args.key)
    print_setting(args, queue)


def print_setting(args, queue):
    """Print the value of a setting, under the name as it was typed."""
    name = setting_name(args.key)
    value = queue.settings()[name]
    message = "%s = %s" % (args.key, setting_with_unit(name, value))
    print_result(args, {name: value}, message)


# -- pools -----------------------------------------------------------------------------


@command("worker start", "run jobs until stopped", "worker start --count 2",
         option("--count", "N", "how many at a time (default: 1)",
                count_from(1, "--count", MAX_WORKERS), default=1),
         flag("--drain", "end when nothing is due, running or waiting for a retry"),
         flag("--detach", "go on in the background"),
         flag("--quiet", "print only the first and the last line"),
         creates_queue=True, opens_queue=False)
def cmd_worker_start(args):
    if args.detach:
        return start_detached(args)
    is_detached = os.environ.pop("QUEUECTL_DETACHED", None)
    # A drain in the foreground prints one JSON document, at its end.
    is_silent = args.json and args.drain and not is_detached

    def started():
        if not is_silent:
            print_started(args, os.getpid(), "Ctrl-C")

    is_quiet = args.quiet or args.json
    has_progress = args.drain and not is_quiet and terminal_width(sys.stderr)
    with contextlib.closing(ProgressLine(print_over=True)) as progress:
        show = has_progress and functools.partial(show_drain, progress)
        pool = Supervisor(args.db, args.count, args.drain, is_quiet, show)
        code = pool.run(started)
    if is_silent:
        print(json.dumps(pool.result))
    elif not pool.stop_reason:  # which was already reported
        pool_notice(with_dead_hint(
            pool.summary, pool.result.get("dead"), args.db, sys.stderr))
    return code


def show_drain(progress, queue):
    """Show how far a drain is."""
    width, work = terminal_width(sys.stderr), work_left(queue)
    if width:
        rest = joined(grouped(work.ready) + " waiting",
                      counts_text({"to retry": work.retries}))
        progress.redraw(progress_text(
            rest, time_left(work, queue.clock()),
            {**work.jobs, **queue.drain_counts()}, width - 1))


def print_started(args, pid, how_to_stop):
    """Print that a pool runs, where, and how to stop it."""
    place = "log " + printable(os.path.basename(path_beside(args.db, ".log")))
    if args.db != os.path.realpath("queuectl.db"):
        place += ", queue " + printable(args.db)
    message = "pool %d: %s, %s; to stop: %s" % (
        pid, plural(args.count, "worker"), place, how_to_stop)
    print_result(args, {"pool": pid, "workers": args.count}, message)
    sys.stdout.flush()


def start_own(*words, cwd=None, **variables):
    """Start Python on this file; it outlives this process, its terminal and run."""
    import subprocess

    # It belongs to no run, even if a job has started it.
    env = {name: value for name, value in os.environ.items() if name != "QUEUECTL_RUN"}
    env.update(variables)
    start = functools.partial(
        subprocess.Popen, [sys.executable, *words], cwd=cwd, env=env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    return start_outside_job(start) if WINDOWS else start()


def start_detached(args):
    """Start a pool in the background; wait until it runs, and report that."""
    words = ["worker", "start", "--json", "--db", args.db, "--count", str(args.count)]
    if args.drain:
        words.append("--drain")
    pool = start_own(os.path.abspath(__file__), *words, QUEUECTL_DETACHED=PROGRAM)
    for line in pool.stdout:
        if line.startswith(b"{"):
            print_started(args, json.loads(line)["pool"],
                          in_queue(args.db, usage("worker", "stop")))
            pool.returncode = 0  # it goes on, and this process does not wait for it
            return 0
        print(line.decode("utf-8", FOREIGN_BYTES).rstrip(), file=sys.stderr)
    return pool.wait()


@command("worker stop", "stop all pools of the queue, when their jobs are finished",
         "worker stop",
         flag("--now", "end running jobs; they go back to pending"),
         flag("--no-wait", "return at once"),
         opens_queue=False)
def cmd_worker_stop(args):
    stopped = sorted(living_pools(args.db))

    def request():
        for pool in stopped:
            request_stop(args.db, pool, "now" if args.now else "stop")

    def are_gone():
        return not {*living_pools(args.db)} & {*stopped}

    request()

    # A job that stops its own pool would wait for itself.
    is_waiting = stopped and not args.no_wait and not within_job_of(args.db)
    try:
        if is_waiting and not wait_until(are_gone, STOP_REPORT_DELAY, STEP_INTERVAL):
            report_stop(args, stopped)
            request()  # a pool that was just starting may have overwritten the first
            wait_until(are_gone, MAX_DURATION, STEP_INTERVAL)
    except KeyboardInterrupt:
        notice(in_queue(args.db, "the pool still stops; to see it: " + usage("status")))
        return 130
    names = ", ".join("pool %d" % pid for pid in stopped)
    message = ("stopped " if is_waiting else "stopping ") + names
    if not stopped:
        message = "no pool is running"
    print_result(args, {"stopped": stopped}, message)
    if not stopped:
        report_queue(args)


def report_stop(args, pools):
    """Report for which jobs a stop waits, and what else may hold it up."""
    with contextlib.suppress(QueueError, sqlite3.Error):
        with Queue(args.db, create=False) as queue:
            running = ["%s (for %s)" % (
                worker["job"], duration_text(queue.clock() - worker["since"]))
                for worker in queue.workers()
                if worker["pool"] in pools and worker["job"]]
            if running:
                hint = in_queue(args.db, usage("worker", "stop", "--now"))
                to_end = "; to end %s: " % ("them" if running[1:] else "it")
                notice("waiting for %s%s" % (
                    listed(running, 5), "" if args.now else to_end + hint))
    if is_disk_full(args.db):  # so the results of jobs can't be saved
        notice("the disk is full")
    workers = living_pools(args.db)
    suspended = [pid for pool in pools for pid in (pool, *workers.get(pool, ()))
                 if is_suspended(pid)]
    if suspended:
        notice("suspended, as by Ctrl-Z; to resume: kill -CONT"
               + "".join(map(" {}".format, suspended)))


# -- install and completion ------------------------------------------------------------

# Without -I, Python would import a json.py of the current directory. What -S leaves out
# costs time, and only packages of others need it. A json.py that lies beside this file
# is not the library's either, so its folder comes last: workers on Windows look for
# this module there. The hook makes one line of an error: `try` is no part of a line.
FILE = "sys.argv.pop(1)"
if WINDOWS:  # its path has escapes: a batch file is read in the present code page
    FILE += ".encode().decode('unicode_escape')"
IMPORTER = [
    "-ISc", "import os, sys, importlib.util as util; file = " + FILE + ";"
    " sys.argv[0] = 'queuectl'; sys.excepthook = lambda kind, error, _: print("
    "'queuectl:', file + ' is gone: install it again' if kind is FileNotFoundError else"
    " 'cannot read %s: %s' % (file, error.strerror), file=sys.stderr);"
    " open(file).close(); sys.excepthook = sys.__excepthook__;"
    " home, name = os.path.split(file[:-3]); sys.path.append(home);"
    " spec = util.spec_from_file_location(name, file);"
    " sys.modules[name] = module = util.module_from_spec(spec);"
    " spec.loader.exec_module(module); sys.exit(module.main())"]


def importing(path):
    """Return the arguments that let Python import this file and run its `main`."""
    if WINDOWS:
        path = path.encode("unicode_escape").decode()
    return [*IMPORTER, path]


INSTALLED = "@rem" if WINDOWS else "#!/bin/sh\n#"
INSTALLED += " written by queuectl install\n"
BATCH = """\
@if defined PYTHONUTF8 goto utf8
@"{0}" {1}
@exit /b %errorlevel%
:utf8
@"{0}" -X utf8=%PYTHONUTF8% {1}
"""


@command("install", "put a command queuectl, which starts quicker, into DIR",
         "install ~/.local/bin",
         positional("dir", "DIR", "directory, created if missing (default:"
                    " ~/.local/bin)", nargs="?", default="~/.local/bin"),
         opens_queue=False)
def cmd_install(args):
    if not os.path.isfile(__file__):
        raise QueueError("%s: a copy within an archive can't be installed: unpack it",
                         __file__)
    home = os.path.expanduser(args.dir)
    if home.startswith("~"):
        raise QueueError("%s: there is no home directory: name a directory", args.dir)
    home = os.path.abspath(home)
    path = os.path.join(home, "queuectl.cmd" if WINDOWS else "queuectl")
    content = command_file(os.path.abspath(__file__), home)
    os.makedirs(home, exist_ok=True)
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
        if file.read(len(INSTALLED)) != INSTALLED:
            raise QueueError("%s is not queuectl's: remove it first", path)
    with open(path + ".new", "wb") as file:
        file.write(content)
    os.chmod(path + ".new", 0o755)
    os.replace(path + ".new", path)
    on_path = os.path.realpath(home) in map(os.path.realpath, os.get_exec_path())
    lines = ["installed " + printable(path)]
    if not on_path:
        place, line = how_to_add(home)
        lines += ["%s is not on PATH; to add it, %s:" % (printable(home), place), line]
    print_result(args, {"path": path, "on_path": on_path}, *lines)
    if not WINDOWS and os.geteuid() == 0 and is_open_to_others(path):
        closed = ["%s is closed to them" % printable(path)
                  for path in (sys.executable, os.path.abspath(__file__))
                  if not is_open_to_others(path)]
        if closed:
            notice("other users can't run this: " + ", ".join(closed))


def how_to_add(home):
    """Return where and how the user's shell puts a directory on PATH: words, a line."""
    shell = os.path.basename(os.environ.get("SHELL", ""))
    if WINDOWS:
        return "in Settings", "  Edit environment variables for your account, Path"
    if shell == "fish":
        return "once", "  fish_add_path " + quoted([home])
    return ("here and in ~/.%src" % ("zsh" if shell == "zsh" else "bash"),
            "  export PATH=%s:\"$PATH\"" % quoted([home]))


def command_file(own, home):
    """Return the content of a file in HOME that imports this one; compile this one."""
    import py_compile

    if not re.fullmatch(r"[^.]+\.py", os.path.basename(own)):
        raise QueueError("%s: only a file called NAME.py can be imported", own)
    earlier = os.umask(0o022)  # else only root may find its directory
    with contextlib.suppress(OSError):  # root can write it, and other users may not
        py_compile.compile(own)
    os.umask(earlier)
    if WINDOWS:
        return batch_file(own, home)
    argv = [sys.executable, *importing(own)]
    return os.fsencode(INSTALLED + 'exec %s "$@"\n' % shell_line(argv))


def batch_file(own, home):
    """Return the content of `queuectl.cmd`, in ASCII as far as that is possible.

    Python ignores PYTHONUTF8 with the option -I.
    """
    words = " ".join(
        '"%s"' % word.replace("%", "%%") for word in importing(own)) + " %*"
    text = INSTALLED + BATCH.format(path_in_batch(sys.executable, home), words)
    try:
        return text.encode("oem")
    except UnicodeError:
        raise QueueError(
            "%s: not in the console's code page", sys.executable) from None


def path_in_batch(path, home):
    """Return how a batch file in HOME names a program: by ASCII if possible.

    Python and HOME are mostly in the same folder of a user, who may be called Jörg.
    """
    if not path.isascii():
        with contextlib.suppress(ValueError):  # on another drive
            relative = os.path.relpath(path, home)
            if relative.isascii():
                return "%~dp0" + relative.replace("%", "%%")
    return path.replace("%", "%%")


# They complete what the command prints, and files where it prints nothing.
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
CHOICES = {"STATE": STATES, "KEY": SETTINGS, "SHELL": COMPLETIONS}  # by metavar


@command("completion", "print a script for a shell to complete commands and ids",
         "completion bash",
         positional("shell", "SHELL", "in .bashrc: source <(queuectl completion bash)",
                    nargs="?", choices=[*COMPLETIONS]),
         opens_queue=False, must_print=True, takes_words=True)
def cmd_completion(args):
    if args.words:  # those of a command line, up to the one to be completed
        with contextlib.suppress(QueueError, OSError, ValueError, sqlite3.Error):
            for candidate in candidates(args.words, args.db):
                print(candidate)
    elif args.shell:
        script = COMPLETIONS[args.shell]
        print_result(args, script, script.rstrip())
    else:
        raise QueueError("completion: name one of " + ", ".join(COMPLETIONS), code=2)


def candidates(words, path):
    """Return what the last of these words of a command line can become."""
    # Of --state=dead bash makes three words, other shells one.
    *words, begun = [part for word in words for part in word.split("=")]
    name, words = command_named(filter(None, words))
    is_command = name in COMMANDS
    arguments = [*(COMMANDS[name].arguments if is_command else ()), *EVERYWHERE]
    metavar = expected_metavar(words, arguments)
    if "--" in words:
        return []
    if begun.startswith("-"):
        choices = ["--help"]
        choices += itertools.chain(*(argument.names for argument in arguments))
    elif metavar == "ID":
        choices = complete_ids(words, begun, path, TAKES.get(name, STATES))
    elif metavar or is_command:
        choices = CHOICES.get(metavar, ())
    else:
        choices = [known[len(name) :].split()[0] for known in COMMANDS
                   if known.startswith(name)]
    return [word for word in dict.fromkeys(choices) if word.startswith(begun)]


def expected_metavar(words, arguments):
    """Return the metavar of the value that comes behind these words, or None."""
    metavars = {
        name: argument.metavar for argument in arguments for name in argument.names}
    places = [metavars[name] for name in metavars if not name.startswith("-")]
    value = None  # of an option
    for word in words:
        if not value and not word.startswith("-"):
            places = places[1:] or places  # the last one may take several
        value = metavars.get(word) if word.startswith("-") else None
    return value or (places or [None])[0]


def complete_ids(words, begun, path, states):
    """Return ids that start with BEGUN, of the queue that `--db` names or at PATH."""
    import shlex

    typed = shlex.split(dict(zip(words, words[1:])).get("--db", "")) or [path]
    path = os.path.expanduser(typed[0])
    if not os.path.getsize(path):  # to open it would make it a queue
        return []
    with Queue(path, lock_timeout=COMPLETION_TIMEOUT, create=False) as queue:
        ids = queue.ids_starting_with(begun, states)
    return [id for id in ids if re.fullmatch(r"(?a)\w[\w.-]*", id)]  # needs no quotes


# -- selftest --------------------------------------------------------------------------

# A job that shows when it runs: again and again it adds its PID to the file `beats`,
# so that two runs that overlap take turns there. It ends when there is a file `over`,
# and soon in any case, since a killed `selftest` can't end it. The job `tree` has a
# child outside its process group.
BEATING_JOB = """
import os, subprocess, sys, time
end = time.monotonic() + 30
if os.environ.pop("QUEUECTL_JOB_ID", None) == "tree":
    subprocess.Popen([sys.executable, "-S", __file__], start_new_session=True)
print("begun", flush=True)
while not os.path.exists("over") and time.monotonic() < end:
    with open("beats", "a") as file:
        print(os.getpid(), file=file)
    time.sleep(0.01)
"""
# A job that notes when it was tried, and fails until there is a file `fixed`.
FAILING_JOB = """
import time
with open("tries", "a") as file:
    print(time.monotonic(), file=file)
open("fixed")
"""
PRINTING_JOB = "for number in range(10**4): print('%9d' % number)"
NO_LOCKS = "the file system has no locks that hold; take a local disk"
NO_SQLITE = "SQLite can't work on this file system (%s); take a local disk"
TOO_SLOW = "it took too long: the disk hangs, or the machine is busy"


class Trial:
    """A queue in a temporary folder, used by commands in processes of their own."""

    def __init__(self, folder, end):
        self.folder, self.path = folder, os.path.join(folder, "queuectl.db")
        self.deadline = min(time.monotonic() + CHECK_TIME, end)
        self.processes = []

    def write(self, name, text=""):
        """Write a file into the folder in which the jobs run."""
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(text)

    def read(self, name):
        """Return the lines that jobs have written to a file there."""
        with contextlib.suppress(FileNotFoundError):
            with open(os.path.join(self.folder, name)) as file:
                return file.read().split()
        return []

    def start(self, *words):
        """Start a command; return its process."""
        words = ["--json", "--db", self.path, *words]
        cache = "pycache_prefix=" + os.path.dirname(self.folder)  # all share it
        program = importing(os.path.abspath(__file__))
        self.processes.append(
            start_own("-X", cache, *program, *words, cwd=self.folder))
        return self.processes[-1]

    def finish(self, process):
        """Wait for a command; return the document that it has printed."""
        import subprocess

        try:
            printed, _ = process.communicate(timeout=self.time_left())
        except subprocess.TimeoutExpired:
            raise QueueError(TOO_SLOW) from None
        lines = printed.decode("utf-8", "replace").splitlines() or ["it was killed"]
        for line in lines:  # its hints and errors are among them
            if line.startswith(("[", "{")):
                return json.loads(line)
        raise QueueError("%s", lines[-1].partition("queuectl: ")[2] or lines[-1])

    def run(self, *words):
        """Run a command to its end; return the document that it prints."""
        return self.finish(self.start(*words))

    def enqueue(self, program, *ids, **fields):
        """Enqueue jobs that run a Python program."""
        self.write("job.py", program)
        command = shell_line([sys.executable, "-S", "job.py"])
        jobs = [dict(fields, id=id, command=command) for id in ids]
        self.run("enqueue", json.dumps(jobs))

    def start_pool(self, count=2):
        """Start a pool. Even if nobody stops it, it leaves when no job is left."""
        return self.start("worker", "start", "--drain", "--count", str(count))

    def drain(self):
        """Let a pool run all jobs."""
        self.finish(self.start_pool())

    def kill(self, *pids):
        """Kill processes of a pool at once."""
        for pid in pids:
            with contextlib.suppress(OSError):  # a worker may have left with its pool
                os.kill(pid, KILL)

    def expect(self, **jobs):
        """Raise QueueError unless these are the jobs: their states and attempts."""
        states = {
            job["id"]: (job["state"], job["attempts"]) for job in self.run("list")}
        require(states == jobs, "the jobs are %s", states)

    def wait_for_beats(self, count):
        """Wait until as many processes of beating jobs have run for a while."""
        def are_there():  # with a single beat an overlap would not show
            beats = collections.Counter(self.read("beats"))
            return sum(number >= 5 for number in beats.values()) >= count

        require(wait_until(are_there, self.time_left()), TOO_SLOW)

    def finish_second_run(self, pool):
        """Let the beating job end in its second run, not before the first has."""
        self.wait_for_beats(2)
        self.write("over")
        self.finish(pool)
        runs = [pid for pid, _ in itertools.groupby(self.read("beats"))]
        require(len(runs) == len({*runs}), "two runs of a job overlapped")

    def time_left(self):
        """Return the seconds that this trial may still take."""
        return max(0.0, self.deadline - time.monotonic())

    def end(self):
        """Ask what still runs to end; return whether nothing runs."""
        pools = []
        with contextlib.suppress(OSError, QueueError):  # no folder, no space, no locks
            self.write("over")
            pools = living_pools(self.path)
            for pool in pools:
                request_stop(self.path, pool, "now")
        return not pools and all(each.poll() is not None for each in self.processes)


def require(condition, message, *values):
    """Raise QueueError with this message if a condition does not hold."""
    if not condition:
        raise QueueError(message, *values)


PROMISES = {}  # {a promise: the function that shows it}, in the order of `selftest`


def promise(text):
    """Make a function show a promise: it raises an error if that does not hold."""
    def register(function):
        PROMISES[text] = function
        return function

    return register


@promise("locks hold within a process and between processes")
def try_locks(trial):
    own_file = pool_file(trial.path, os.getpid())
    fd = lock_file(own_file)
    try:
        require(is_locked(own_file), NO_LOCKS)
        stopped = trial.run("worker", "stop", "--no-wait")["stopped"]
        require(stopped == [os.getpid()], NO_LOCKS)
    finally:
        os.close(fd)
    try:  # the locks of SQLite are others
        with Queue(trial.path, lock_timeout=1) as queue, queue.transaction():
            writer = trial.start("enqueue", "--", "exit 0")
            is_let_in = wait_until(lambda: writer.poll() is not None, 0.5)
            require(not is_let_in, NO_LOCKS)
    except sqlite3.Error as error:
        raise QueueError(NO_SQLITE, error) from None
    trial.finish(writer)


@promise("a job is synced to the disk before it is acknowledged")
def try_sync(trial):
    trial.run("enqueue", "--id", "job", "--", "exit 0")
    with open_descriptor(trial.path, os.O_RDWR) as fd:
        os.fsync(fd)  # an error where nothing can be synced
    trial.expect(job=("pending", 0))


@promise("two pools run jobs in parallel, each job once")
def try_parallel(trial):
    trial.enqueue(BEATING_JOB, "beat1", "beat2")
    ids = ["job%d" % number for number in range(20)]
    jobs = [{"id": id, "command": "mkdir " + id} for id in ids]
    trial.run("enqueue", json.dumps(jobs))  # a second run of one would fail
    pools = [trial.start_pool(1), trial.start_pool(1)]
    trial.wait_for_beats(2)  # each pool has only one worker
    trial.write("over")
    for pool in pools:
        trial.finish(pool)
    trial.expect(**dict.fromkeys(["beat1", "beat2", *ids], ("completed", 1)))


@promise("a failed job is retried after each wait, then dead until dlq retry")
def try_retries(trial):
    trial.run("config", "set", "backoff_base", "0.5")
    trial.enqueue(FAILING_JOB, "job")
    trial.drain()
    times = [float(line) for line in trial.read("tries")]
    waits = [after - before for before, after in zip(times, times[1:])]
    require(len(waits) == 2 and waits[0] > 0.49 and waits[1] > 0.24,
            "it was tried after %s seconds", waits)
    dead = [job["id"] for job in trial.run("dlq", "list")]
    require(dead == ["job"], "the dead letter queue has %s", dead)
    trial.write("fixed")
    trial.run("dlq", "retry", "job")
    trial.drain()
    trial.expect(job=("completed", 1))


@promise("the last bytes of an output are kept, in order")
def try_output(trial):
    trial.run("config", "set", "output_limit", "1000")
    trial.enqueue(PRINTING_JOB, "job")
    trial.drain()
    kept = trial.run("logs", "job")["output"].split()
    last = [*map(str, range(9910, 10000))]
    is_bounded = len(kept) < 120  # with the note of what was dropped
    require(is_bounded and kept[-90:] == last, "kept was %s", kept[:120])


@promise("a timeout ends all processes of a run")
def try_timeout(trial):
    trial.enqueue(BEATING_JOB, "tree", timeout=2, max_retries=1)
    trial.drain()
    trial.expect(tree=("dead", 1))
    beats = trial.read("beats")
    require(len({*beats}) == 2, "it had %d processes, not 2", len({*beats}))
    is_alive = wait_until(lambda: trial.read("beats") != beats, 0.3)
    require(not is_alive, "a process has outlived its run")


@promise("a killed worker's job runs again, without overlap")
def try_killed_worker(trial):
    trial.enqueue(BEATING_JOB, "job")
    pool = trial.start_pool()
    trial.wait_for_beats(1)
    workers = trial.run("status")["workers"]
    trial.kill(*(worker["pid"] for worker in workers if worker["job"]))
    trial.finish_second_run(pool)
    trial.expect(job=("completed", 1))
    kept = trial.run("logs", "job", "--run", "1")["output"].split()
    require(kept == ["begun"], "of the output of the first run was kept: %s", kept)


@promise("a killed pool's jobs run again, and the next pool finds every job")
def try_killed_pool(trial):
    trial.run("enqueue", "--id", "later", "--delay", "1h", "--", "exit 0")
    trial.enqueue(BEATING_JOB, "job")
    pool = trial.start_pool()
    trial.wait_for_beats(1)
    workers = trial.run("status")["workers"]
    trial.kill(pool.pid, *(worker["pid"] for worker in workers))
    pool = trial.start_pool()
    trial.finish_second_run(pool)
    trial.expect(later=("pending", 0), job=("completed", 1))


@promise("a stopped pool finishes its running job and starts no other")
def try_stop(trial):
    trial.enqueue(BEATING_JOB, "running", "next")
    pool = trial.start_pool(count=1)
    trial.wait_for_beats(1)
    trial.run("worker", "stop", "--no-wait")
    trial.write("over")
    trial.finish(pool)
    trial.expect(running=("completed", 1), next=("pending", 0))


@command("selftest", "show that the promises hold on this file system", "selftest",
         opens_queue=False, must_print=True)
def cmd_selftest(args):
    catch_signals(signal.default_int_handler)  # SIGTERM must not leave processes
    results, trials = [], []
    end = time.monotonic() + SELFTEST_TIME
    home = make_trial_folder(args.db)
    try:
        for text, show in PROMISES.items():
            if results and time.monotonic() > end - CHECK_TIME / 2:
                break
            trials.append(Trial(os.path.join(home, str(len(trials))), end))
            results.append(try_promise(text, show, trials[-1]))
            if not args.json:
                print_lines([promise_line(results[-1])])
                sys.stdout.flush()
            if show is try_locks and not results[-1]["holds"]:
                break  # nothing else can hold
    finally:
        catch_signals(lambda *_: None)  # a second Ctrl-C must not cut this short
        clear_up(home, trials)
    holding = sum(result["holds"] for result in results)
    message = "%d of %d promises hold in %s" % (
        holding, len(PROMISES), printable(os.path.dirname(args.db)))
    if len(results) < len(PROMISES):
        why = "there was no time left"
        if not results[0]["holds"]:
            why = "without locks none can hold"
        message += "; %d were not tried: %s" % (len(PROMISES) - len(results), why)
    print_result(args, results, message)
    return 0 if holding == len(PROMISES) else 1


def make_trial_folder(path):
    """Make a temporary folder beside a database; return its path."""
    import tempfile

    directory = os.path.dirname(path)
    if os.path.isdir(directory) and is_disk_full(path, SELFTEST_SPACE):
        raise QueueError("%s: not enough space to try: selftest takes %d MB", directory,
                         SELFTEST_SPACE >> 20)
    try:
        return tempfile.mkdtemp(prefix="queuectl-selftest-", dir=directory)
    except OSError as error:
        raise QueueError("%s: no folder can be made here: %s", directory,
                         error.strerror) from None


def try_promise(text, show, trial):
    """Find out whether a promise holds; return what `selftest --json` prints of it."""
    began, error = time.monotonic(), None
    try:
        os.mkdir(trial.folder)
        show(trial)
    except (QueueError, OSError, sqlite3.Error) as failure:
        error = getattr(failure, "strerror", None) or str(failure)
    seconds = round(time.monotonic() - began, 3)
    return {"promise": text, "holds": not error, "seconds": seconds, "error": error}


def promise_line(result):
    """Return the line of `selftest` about a promise."""
    word, error = ("FAILED", ": " + result["error"]) if result["error"] else ("ok", "")
    return "%-6s  %-5s  %s" % (
        word, duration_text(result["seconds"]), result["promise"] + printable(error))


def clear_up(home, trials):
    """End what trials have left, and remove their folder."""
    import shutil

    wait_until(lambda: all([trial.end() for trial in trials]), 3, STEP_INTERVAL)
    for process in itertools.chain(*(trial.processes for trial in trials)):
        process.kill()
        wait_until(lambda: process.poll() is not None, 0.5)  # not on a disk that hangs
        process.stdout.close()

    def is_removed():
        shutil.rmtree(home, ignore_errors=True)
        return not os.path.exists(home)

    if not wait_until(is_removed, 2, STEP_INTERVAL):
        notice("%s could not be removed" % printable(home))


# ======================================================================================
# Dashboard: the documents of the commands by HTTP, and the page
# ======================================================================================

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'nonce-{{TOKEN}}';"
    " script-src 'nonce-{{TOKEN}}'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CACHE_TIME = 5.0  # seconds for which statistics and counts are cached at most
CACHE_SHARE = 0.005  # of the time, which making one of them anew may take
PAGE_ROWS = 50  # jobs in the table of the page
RUNNING_SHOWN = 5  # jobs under "Running now"
RUNS_SHOWN = 9  # runs of the job in the panel
MAX_QUERY = 10_000  # characters of the values in the query of an address
LINKS_SHOWN = 5  # jobs that the one in the panel comes after, or that come after it
PIECE = 100000  # bytes of an output that the page fetches at most at once


class Refusal(Exception):
    """A request that is refused, with the status of HTTP."""

    def __init__(self, status, words):
        super().__init__(words)
        self.status = status


# -- the documents of the commands -----------------------------------------------------

# A route is a function of the queue and of the query of the address. The id of a job is
# `query["id"]`.


def require_job(queue, id):
    """Refuse an id that no job has."""
    if queue.state(id) is None:
        raise Refusal(404, str(no_job(id)))


# The kinds of jobs that have a filter on the page, each as filters of `where`.
KIND_FILTERS = {
    "delayed": {"delayed": True},
    "behind a job": {"blocked": False},
    "behind a lock": {"locked": True},
    "blocked": {"blocked": True},
    "blocking others": {"blocking": True},
    "to be retried": {"tried": True},
}


def filters_of(query, states=STATES):
    """Return arguments for `where`: what a query asks for, of these states alone."""
    if "state" in query:
        states = [state for state in states if state == state_name(query["state"])]
    named = {name: query.get(name) for name in ("error", "blocked_by", "behind_lock")}
    if "until" in query:
        named["until"] = float(query["until"])
    if "kind" in query:
        if query["kind"] not in KIND_FILTERS:
            raise Refusal(400, "kind: one of " + ", ".join(KIND_FILTERS))
        named.update(KIND_FILTERS[query["kind"]])
    return dict(named, states=states,
                pattern=like_pattern(query["q"]) if query.get("q") else None)


def newest_jobs(queue, query, backwards=False):
    """Return a page of jobs after that in `before`: newest, or latest death, first.

    BACKWARDS, return that job and those above it, going up.
    """
    limit = min(count_from(0, "limit")(query.get("limit", "50")) or 50, BATCH_SIZE)
    filters, before = filters_of(query), query.get("before", "")
    if before:
        require_job(queue, before)
    if filters["states"] == ["dead"]:
        del filters["states"]
        return list(queue.dead_jobs(before, limit, backwards, **filters))
    last = (queue.seq_of(before) or MAX_INTEGER) - 1
    if backwards:
        return list(queue.jobs(where(**filters), limit, first=last + 1))
    return list(queue.jobs(where(**filters), limit, newest=True, last=last))


def stats_by_minute(queue, query):
    """Return `stats`; those of the last hour begin with a full minute."""
    since = queue.clock() - seconds_from(1, "since")(query.get("since", "1h"))
    if "since" not in query:  # or the bars would move at each refresh
        since = since // 60 * 60 + 60
    return read_stats(queue, since)


# What can be done with all jobs that a query leaves.
BulkVerb = collections.namedtuple("BulkVerb", [
    "question",  # before it
    "done",  # said after it
    "takes",  # jobs in these states
    "selection",  # returns the `Selection` of these by filters
    "change"])  # the method of `Queue`
BULK_VERBS = {
    "retry": BulkVerb("Retry {}?", "Retried", TAKES["dlq retry"], jobs_to_retry,
                      Queue.retry_all),
    "run": BulkVerb("Run {} now?", "Due now:", WAITING, jobs_to_run_now,
                    Queue.run_now_all),
    "cancel": BulkVerb("Cancel {}?", "Cancelled", TAKES["cancel"], jobs_to_cancel,
                       Queue.cancel_all),
    "delete": BulkVerb("Delete {}?", "Deleted", TAKES["delete"], jobs_to_delete,
                       Queue.delete_all),
}


def selected_by(verb, query):
    """Return the selection of the jobs of a query that a verb for many takes."""
    verb = BULK_VERBS[verb]
    return verb.selection(**filters_of(query, verb.takes))


def apply_to_query(verb, queue, query):
    """Apply a verb for many to the jobs of a query; return how many it has changed.

    A filter that is misspelt, or was forgotten, must not mean all jobs.
    """
    unknown = query.keys() - {*VIEW_FILTERS, "until"}
    if unknown:
        raise Refusal(400, "no such filter: " + ", ".join(sorted(unknown)))
    if not query.keys() - {"until"} and verb != "retry":
        raise Refusal(400, "by which filter? " + ", ".join(VIEW_FILTERS))
    return BULK_VERBS[verb].change(queue, selected_by(verb, query).taken)


def dead_route(queue, query):
    """Return the dead jobs by their errors, the most common first."""
    names = "error", "jobs", "latest", "id", "line"
    return [with_iso_times({name: group[name] for name in names}, "latest")
            for group in errors_of(queue)]


def run_of(queue, query):
    """Return the job that a query names, and the number of its run."""
    require_job(queue, query.get("id", ""))
    job = queue.job(query["id"])
    run = count_from(0, "run")(query.get("run", str(job["run"])))
    if "run" in query and not 1 <= run <= job["run"]:
        raise Refusal(404, "no such run")
    return job, run


def output_route(queue, query):
    """Return the output of a run as text: all of it, or the last `tail` bytes."""
    job, run = run_of(queue, query)
    output = output_of(queue, job, run)
    if "tail" in query:
        _, output = split_dropped(output)
        output = output[max(0, len(output) - count_from(0, "tail")(query["tail"])) :]
    return output_document(job, run, output)


def download_route(queue, query):
    """Return what is kept of an output, as text to save."""
    _, output = split_dropped(output_of(queue, *run_of(queue, query)))
    return output.decode("utf-8", FOREIGN_BYTES)


def metrics_route(queue, query):
    """Return the numbers of the queue in the text format of Prometheus."""
    status, totals = read_status(queue), run_totals(queue)
    busy = sum(worker["job"] is not None for worker in status.workers)
    now = queue.clock()
    families = [
        ("jobs", "jobs by state", "state", status.jobs),
        ("workers", "workers of all pools", "state",
         {"busy": busy, "idle": len(status.workers) - busy}),
        ("paused", "1 while the queue is paused", "", {"": int(status.paused)}),
        ("blocked_jobs", "jobs that wait for a dead one", "",
         {"": len(status.blocked_seqs)}),
        ("oldest_waiting_seconds", "how long the oldest job waits for a worker", "",
         {"": "%.3f" % max(0, now - (status.oldest_waiting or now))}),
        ("runs_total", "runs that ended, by outcome", "outcome",
         {outcome: runs for outcome, (runs, _) in totals.items()}),
        ("run_seconds_total", "seconds of these runs", "outcome",
         {outcome: "%.6f" % seconds for outcome, (_, seconds) in totals.items()})]
    lines = []
    for name, meaning, label, values in families:
        lines.append("# HELP queuectl_%s %s" % (name, meaning))
        lines.append("# TYPE queuectl_%s %s" % (
            name, "counter" if name.endswith("_total") else "gauge"))
        lines += ["queuectl_%s%s %s" % (
            name, label and '{%s="%s"}' % (label, key), value)
            for key, value in values.items()]
    return "\n".join(lines) + "\n"


# -- the page: its bricks, made here, where they are tested without a browser ----------


class Html(str):
    """Markup. Any other text is escaped when it is put into an element."""


def element(tag, *content, **attributes):
    """Return an element, without content and attributes that are None or False.

    `css` are its classes. Nothing else makes markup, so nothing else has to escape.
    """
    from html import escape

    written = "".join([
        ' %s="%s"' % ("class" if key == "css" else key.replace("_", "-"),
                      escape("true" if value is True else str(value)))
        for key, value in attributes.items()
        if not (value is None or value is False)])
    inside = "".join([
        part if isinstance(part, Html) else escape(str(part))
        for part in content if not (part is None or part is False)])
    if tag == "input":
        return Html("<input%s/>" % written)
    return Html("<%s%s>%s</%s>" % (tag, written, inside, tag))


def link(words, address, css=None, **attributes):
    return element("a", words, href=address, css=css, **attributes)


def button(words, post, css=None, label=None, **data):
    """Return a button whose click the script turns into a POST.

    `ask` is asked before it, or what the address in `question` answers, with `do` on
    the button that goes on. `done` is shown after it.
    """
    data = {"data_" + name: value for name, value in dict(data, css=css).items()}
    return element("button", words, type="button", css=css, aria_label=label,
                   data_post=post, **data)


def copy_button(label, id="", words="Copy"):
    """Return a button that copies the text of an element, or of that before it."""
    return element("button", words, type="button", data_copy=id, aria_label=label)


def ago(moment, page):
    """Return a time as people say it, in one unit: just now, 2 min ago, in 4 s."""
    if 0 <= page.now - moment < 1:
        return "just now"
    return relative_time(moment, page.now, roughly)


def sentence_case(words):
    return words[:1].upper() + words[1:]


def query_of(**fields):
    """Return the query of an address."""
    from urllib.parse import urlencode

    return "?" + urlencode(fields) if fields else ""


def number_or(default, text):
    """Return the number above 0 in a part of an address, or a default."""
    return text.isdecimal() and len(text) < 16 and int(text) or default


# What narrows the list of jobs, each with what stands before its value on the page.
VIEW_FILTERS = {"state": "", "kind": "", "q": "", "error": "",
                "blocked_by": "blocked by ", "behind_lock": "behind the lock "}


class View(collections.namedtuple(
        "View", [*VIEW_FILTERS, "before", "first", "job", "run"])):
    """What the page shows: the query of its address."""

    def filters(self):
        """Return what narrows the list of jobs, as the actions for many take it."""
        return {name: getattr(self, name) for name in VIEW_FILTERS
                if getattr(self, name)}

    def address(self, part="", **changes):
        """Return the address of the page after these changes."""
        fields = self._replace(**changes)._asdict().items()
        return "/" + query_of(**{name: value for name, value in fields if value}) + part

    def only(self, **filters):
        """Return the address of the jobs that these filters leave, from the newest."""
        nothing = dict.fromkeys([*VIEW_FILTERS, "before", "first"], "")
        return self.address("#jobs", **dict(nothing, **filters))

    def open(self, id, **changes):
        """Return the address with the panel of a job."""
        return self.address(job=id, run="", **changes)


class Page(collections.namedtuple("Page", [
        "queue", "view", "now", "status",
        "groups",  # of the dead jobs, as `errors_of` returns them
        "found",  # the jobs of the table, and one more if there are older ones
        "above",  # those of the page above it, from below
        "cache",
        "is_whole"])):  # with the output of the open job; else the script fetches it
    """What the parts of the page are made of. It is a `Look`, too."""

    text_of = staticmethod(roughly)

    def standstill(self, status):
        """Return why no job is started. The next step stands below the verdict."""
        verdict = obstacle(status)
        return verdict.sentence.lower() if verdict else ""


@functools.lru_cache(None)  # a page shows each of them many times
def icon(word):
    """Return the icon of a kind of jobs."""
    return element("svg", element("path", d=JOB_KINDS[word].icon), css="icon",
                   viewBox="0 0 16 16", aria_hidden="true")


# -- the page: the verdict, and what needs somebody ------------------------------------

FIRST_STEPS = ("add a job: %s enqueue -- echo hello" % PROGRAM,
               "run it: %s worker start" % PROGRAM)


def page_header(page):
    """Return the name of the queue, and the buttons that stop it, or this page."""
    folder, name = os.path.split(page.queue.path)
    switch = None
    if page.status.paused:
        switch = button(
            "Resume", "/api/resume", "primary", done="Resumed: jobs start again")
    elif count_in(page, ""):
        switch = button("Pause", "/api/pause", done="Paused: no further job starts")
    path = element("span", element("span", folder + os.sep, css="wide"), name,
                   css="mono dim line", title=page.queue.path)
    skip = count_in(page, "") > 0 and link("Skip to the jobs", "#jobs", "skip button")
    stop = element(
        "button", "Freeze", element("span", " the page"), type="button", id="stop",
        data_keep="yes")
    return element("section", skip, path, switch, stop, css="row", id="queue",
                   aria_label="Queue")


def page_now(page):
    """Return the verdict, and what needs somebody; without jobs, the first steps."""
    status, verdict = page.status, verdict_on(page.status, page.now)
    advice = verdict.advice
    if status.paused:  # there is a button
        advice = "" if status.pools else "no pool is running; " + TO_START
    if count_in(page, ""):
        # What is broken comes first, before what works.
        load = [*load_links(page)]
        if verdict.harm:
            load.insert(0, element("span", verdict.sentence))
        parts = [part for link in load for part in (link, "\xa0· ")][:-1]
        more = [element("p", *parts, css="parts dim") if load else None,
                advice and advice_line(advice, page),
                element("ul", *alerts(page), id="alerts")]
    else:
        steps = [element("li", advice_line(step, page)) for step in FIRST_STEPS]
        if status.pools:
            steps[1:] = [element("li", element("div", waiting_workers(status)))]
        more = [element("ol", *steps)]
    headline = element(
        "h2", verdict.harm or verdict.sentence, id="verdict", tabindex=-1)
    return element("section", headline, *more, id="now", css="card " + verdict.state,
                   data_kind="harm" if verdict.harm else verdict.state)


def waiting_workers(status):
    count = len(status.workers)
    return plural(count, "worker") + (" waits for it" if count == 1 else " wait for it")


def load_links(page):
    """Yield how many jobs run, and how many others can't run yet, as links to them."""
    status, only = page.status, page.view.only
    for count, words, address in (
            (status.jobs["processing"] - len(status.lost), "running",
             only(state="processing")),
            (status.dependent - len(status.blocked_seqs), "behind a job",
             only(kind="behind a job")),
            (len(status.blocked_seqs), "blocked", only(kind="blocked")),
            (status.delayed - status.retries, "delayed", only(kind="delayed")),
            (status.locked, "behind a lock", only(kind="behind a lock"))):
        if count > 0:
            yield link("%s %s" % (grouped(count), words), address)


def advice_line(advice, page):
    """Return an advice; a command in it names the queue, and can be copied."""
    words, _, rest = advice.partition(PROGRAM + " ")
    return element("div", element("span", sentence_case(words)),
                   rest and command_to_copy(page.queue.path, rest), css="row advice")


def command_to_copy(path, rest):
    """Return a command that runs wherever it is pasted, and the button to copy it."""
    program = [PROGRAM] if PROGRAM == "queuectl" else [
        sys.executable, os.path.abspath(__file__)]
    line = quoted([*program, "--db", path]) + " " + rest
    return Html(element("code", line, css="mono") + copy_button("Copy the command"))


def alerts(page):
    """Return lines about what died, is tried again, or is behind a lock.

    Of more than four errors the fourth and all others are folded.
    """
    errors = errors_of_dead(page)
    named = 4 if len(errors) == 4 else 3
    lines = [error_alert(*error, page) for error in errors[:named]]
    if errors[named:]:
        jobs = sum(group["jobs"] for group, _ in errors[named:])
        words = "%s more dead, of %s" % (
            grouped(jobs), plural(len(errors) - named, "error"))
        folded = [error_alert(*error, page) for error in errors[named:]]
        lines.append(element("li", element(
            "details", element("summary", words), element("ul", *folded)),
            data_key="more"))
    return [*lines, *failed_alert(page), *retried_alert(page), *lock_alert(page)]


def errors_of_dead(page):
    """Return the groups of the dead by error, each with how many jobs wait for them.

    Those for which others wait come first. A cancelled job is in none of these, unless
    others wait for it.
    """
    blocked = page.status.blocked_seqs
    waiting = page.cache.get("blocked %d" % len(blocked),
                             lambda: blocked_by_errors(page.queue)) if blocked else {}
    groups = [(group, waiting.get(group["error"], 0)) for group in page.groups
              if not group["is_cancelled"] or group["error"] in waiting]
    return sorted(groups, key=lambda pair: (not pair[1], -pair[0]["jobs"] - pair[1]))


def error_alert(group, behind, page):
    """Return the line about the dead of one error, and about what waits for them."""
    error, is_one = group["error"], group["jobs"] == 1
    chosen = {"state": "dead", "error": error}
    words = joined(is_one and group["id"], line_text(group),
                   ("" if is_one else "latest ") + ago(group["latest"], page), by=" · ")
    waiting = behind > 0 and link(
        "%s %s for %s" % (grouped(behind), "waits" if behind == 1 else "wait",
                          "it" if is_one else "them"), page.view.only(blocked_by=error))
    word, name, retry = "dead", error, bulk_button(
        "Retry…", "retry", chosen, "Retry the dead of " + error)
    if group["is_cancelled"]:  # these are retried by id
        word, name, retry = "cancelled", None, None
    if is_one:
        retry = job_button("Retry", "retry", group["id"], "Retried")
    return alert("%s %s" % (grouped(group["jobs"]), word), name, waiting, words,
                 page.view.only(**chosen), "the dead of " + error, retry)


def retried_alert(page):
    """Yield the line about the jobs that failed, and wait for a worker again."""
    errors = run_totals(page.queue)["failed"][0] and page.cache.get(
        "tried", lambda: common_errors(  # which has to look at all that wait
            page.queue, where(**KIND_FILTERS["to be retried"])))
    if errors:
        names = listed([error for error, _ in errors])
        yield alert(grouped(sum(count for _, count in errors)) + " to retry", names,
                    None, "failed before, and wait for a worker",
                    page.view.only(kind="to be retried"), "the jobs to be retried",
                    css="failed")


def failed_alert(page):
    """Yield the line about the jobs that are tried again later, with the newest one."""
    failed = list(page.queue.jobs(where(["failed"]), 20, newest=True))
    if failed:
        line, count = last_line(page.queue.tail(failed[0])), count_in(page, "failed")
        words = joined(count == 1 and failed[0]["id"], line and "“%s”" % line,
                       next_due(page, "failed"), by=" · ")
        errors = [*dict.fromkeys(job["error"] for job in failed)]
        run_now = bulk_button(
            "Run now…", "run", {"state": "failed"}, "Run now: the failed jobs")
        if count == 1:
            run_now = job_button("Run now", "run", failed[0]["id"], "Due now:")
        yield alert(grouped(count) + " failed", listed(errors), None, words,
                    page.view.only(state="failed"), "the failed jobs", run_now,
                    css="failed")


def lock_alert(page):
    """Yield the line about the lock that most jobs are behind."""
    line = page.status.locked and page.cache.get(
        "line", lambda: longest_line(page.queue))
    if line:
        lock, first = line["lock"], line["first"]
        has = "held by " if first["state"] == "processing" else "next is "
        yield alert(grouped(line["jobs"]) + " behind", "lock " + lock,
                    link(has + first["id"], page.view.open(first["id"])),
                    time_cell(first, page), page.view.only(behind_lock=lock),
                    "what is behind the lock " + lock, css="pending")


def alert(count, name, other, words, address, selection, retry=None, css="dead"):
    """Return a line about a selection of jobs, which the address shows.

    OTHER is a link to others that this is about. It is first: WORDS may be cut.
    """
    show = link("Show", address, "button", aria_label="Show " + selection)
    return element(
        "li", element("b", count, css="hue"),
        element("span", name, css="mono line", title=name or None),
        element("span", other, other and words and " · ", words, css="dim lines",
                title=words),
        element("span", show, retry, css="row"), css=css,
        data_key=joined(css, name if css == "dead" else count.split()[-1], by=" "))


def count_in(page, state):
    """Return how many jobs are in a state, or in all of them."""
    jobs = page.status.jobs
    return jobs.get(state, 0) if state else sum(jobs.values())


# -- the page: the tiles ---------------------------------------------------------------


def page_tiles(page):
    """Return a tile for all jobs and one for those of each state, which shows them."""
    status, cancelled = page.status, page.status.cancelled
    done = percent_text(count_in(page, "completed") / count_in(page, ""))
    hints = {
        "": to_go_text(status.jobs),
        "pending": longest_wait(page),
        "processing": workers_text(status),
        "completed": done + " of all",
        "failed": next_due(page, "failed"),
        "dead": grouped(cancelled) + " cancelled" if cancelled else None}
    return element("nav", *[tile(page, state, hint) for state, hint in hints.items()],
                   id="tiles", aria_label="Jobs by state")


def tile(page, state, hint):
    """Return the tile of a state. It has a hint if there are jobs in that state."""
    count = count_in(page, state)
    return element(
        "a", element("span", state and icon(state), state or "all"), " ",
        element("b", grouped(count)), " ",
        element("span", hint if count or state == "processing" else "", css="dim line"),
        href=page.view.only(state=state, q=page.view.q),
        css=joined("card", state, count and "some", by=" "),
        aria_current=page.view._replace(q="").filters() == (
            {"state": state} if state else {}))


def longest_wait(page):
    """Return how long the first pending job has waited, or when the next is due."""
    if page.status.oldest_job:
        return "longest wait " + roughly(page.now - page.status.oldest_waiting)
    return next_due(page, "pending") or "none is ready"


def next_due(page, state):
    """Return when the next job in a state is due."""
    job = page.queue.next_due([state])
    if not job:
        return None
    if job["run_at"] < page.now:
        return roughly(page.now - job["run_at"]) + " late"
    return "next due " + ago(job["run_at"], page)


def workers_text(status):
    """Return how many running jobs lost their worker, or how many workers there are."""
    lost, workers = len(status.lost), len(status.workers)
    return grouped(lost) + " lost" if lost else "of " + plural(workers, "worker")


# -- the page: what runs now, and the last hour ----------------------------------------


def page_middle(page):
    """Return the place of the chart, which the script fetches, and what runs now."""
    ended = sum(runs for runs, _ in run_totals(page.queue).values())
    chart = element("div", id="chart", data_keep="yes", data_ended=ended)
    hour = element("section", element("h2", "Runs"), chart, css="card")
    return element("div", hour, page_running(page), css="two")


def page_running(page):
    """Return the jobs that have run longest, with their commands and times."""
    runs = sorted(page.queue.processing_runs(), key=lambda run: run.started_at)
    more, lost = len(runs) - RUNNING_SHOWN, len(page.status.lost)
    return element(
        "section", element("h2", "Running now"),
        lost > 0 and element("p", grouped(lost) + " without a worker",
                             css="failed hue"),
        element("ul", *[running_job(run, page) for run in runs[:RUNNING_SHOWN]],
                id="runs-now"),
        not runs and element("p", "No job runs", css="dim none"),
        more > 0 and link(grouped(more) + " more", page.view.only(state="processing"),
                          "dim"), id="running", css="card")


def running_job(run, page):
    """Return a line about a running job."""
    job = page.queue.job(run.id)
    word = kind_of(job, page)
    line = last_line(page.queue.tail(job))
    silent = file_age(run.lease_path)  # which has what the run prints
    if silent > 60:
        line = joined("no output for " + roughly(silent), line, by=" · ")
    seconds = page.now - job["started_at"]
    return element(
        "li", icon(word), link(job["id"], page.view.open(job["id"]), "mono line"),
        element("span", one_line(job["command"]), css="mono dim line"),
        element("b", "<1 s" if seconds < 1 else roughly(seconds)),
        line and element("small", line, css="dim line"),
        data_key=job["id"], css="row " + JOB_KINDS[word].state)


def chart_route(queue, query):
    """Return the chart of the last hour, and in words what its runs were like."""
    stats = stats_by_minute(queue, query)
    if stats["success_rate"] is None:  # at most, some were interrupted
        words = "No run has completed or failed in the last hour"
        return element("p", words, css="dim none")
    bars = [(bar["completed"], bar["failed"]) for bar in stats["throughput"]]
    first = next((at for at, bar in enumerate(bars) if any(bar)), len(bars))
    bars = bars[min(first, len(bars) - 10) :]  # from the first run on
    top = max(4, *map(sum, bars))
    label = "%s completed, %s failed in the last hour" % (
        grouped(stats["completed"]), grouped(stats["failed"]))
    return Html("".join([
        element("p", stats_text(stats), css="dim"),
        element("span", grouped(top) + " runs a minute", css="axis dim"),
        element("svg", *chart_bars(bars, top), viewBox="0 0 %d %d" % (len(bars), top),
                role="img", aria_label=label, preserveAspectRatio="none"),
        chart_axis(len(bars))]))


def chart_axis(minutes):
    """Return what stands below a chart: its times, and what its colours mean."""
    legend = [element("span", state, css="legend " + state)
              for state in ("completed", "failed")]
    return element("div", element("span", "%d min ago" % minutes),
                   element("span", *legend), element("span", "now"), css="axis dim row")


def stats_text(stats):
    """Return in words what the runs of the last hour were like."""
    rate, wait = stats["success_rate"], stats["waiting_time"]["median"]
    times = stats["run_time"]
    return joined(
        grouped(round(60 * stats["per_second_now"])) + " in the last minute",
        "in the last hour %s succeed" % percent_text(rate),
        "median run %s, 95\xa0%% within %s" % (
            short_duration(times["median"]), short_duration(times["p95"])),
        wait is not None and "median wait " + short_duration(wait), by=" · ")


def percent_text(share):
    """Return a share in percent. Only all of it is 100 %, and only nothing 0 %."""
    percent = round(100 * share)
    if share not in (0, 1):
        percent = min(99, max(1, percent))
    return "%d\xa0%%" % percent


def short_duration(seconds):
    """Return a duration in one unit: 5 ms, 0.3 s, 12 min."""
    if seconds >= 10:
        return roughly(seconds)
    return re.sub(r"(?<=\d)(?=[a-z])", " ", duration_text(seconds))


def chart_bars(bars, top):
    """Yield the bars of a chart: completed runs of each minute, failed ones on top."""
    for x, (completed, failed) in enumerate(bars):
        minutes = len(bars) - 1 - x
        title = element("title", "%d completed, %d failed, %d min ago" % (
            completed, failed, minutes))
        part = "" if minutes else " part"  # paler: this minute goes on
        for state, base, height in (
                ("completed", 0, completed), ("failed", completed, failed)):
            if height:
                yield element("rect", title, css=state + part, x="%.2f" % (x + 0.06),
                              y=top - base - height, width=0.88, height=height)


# -- the page: the table of jobs -------------------------------------------------------


def state_cell(job, page):
    word = kind_of(job, page)
    return Html(icon(word) + element("span", word))


def id_cell(job, page):
    return link(job["id"], page.view.open(job["id"]), title=job["id"])


def command_cell(job, page):
    """Return the command, behind the error and, for dead jobs, the last line."""
    error = failure_of(job)
    line = error and job["state"] == "dead" and last_line(page.queue.tail(job))
    line = line and "“%s”" % line
    return element("span", error and element("b", error, css="hue"), error and " ",
                   line and line + " · ", one_line(job["command"]),
                   title=joined(error, line, job["command"], by="\n"))


def tries_cell(job, page):
    most = tries_allowed(job["max_retries"])
    return "%d/%d" % (job["attempts"], most) if job["attempts"] else ""


def took_cell(job, page):
    return "" if job["seconds"] is None else short_duration(job["seconds"])


def time_cell(job, page):
    """Return the time that says most about a job in its state."""
    if job["state"] == "processing":
        return "for " + roughly(page.now - job["started_at"])
    if job["state"] in FINISHED:
        return ago(job["updated_at"], page)
    if job["waits"]:
        reason = short_reason(job, page)
        return element("span", reason, title=reason)
    if job["run_at"] <= page.now:
        return "waits " + roughly(page.now - job["run_at"])
    due = ago(job["run_at"], page)
    return "retry " + due if job["state"] == "failed" else due


# A column of the table: its title, its classes, and what a job shows in it.
Column = collections.namedtuple("Column", "title css cell")
JOB_COLUMNS = [
    Column("State", "hue mid", state_cell),
    Column("Id", "mono", id_cell),
    Column("Command", "mono rest", command_cell),
    Column("Tries", "slim wide num", tries_cell),
    Column("Took", "slim wide num", took_cell),
    Column("When", "mid num", time_cell),
]


def one_line(text):
    return re.sub(r"\s*\n\s*", " ⏎ ", text.strip())


def failure_of(job):
    """Return why a job failed last; nothing if it runs, or if somebody cancelled it."""
    is_shown = job["state"] != "processing" and not job["cancelled"]
    return is_shown and job["error"] or ""


def job_row(job, page):
    cells = [element("td", column.cell(job, page), css=column.css)
             for column in JOB_COLUMNS]
    return element("tr", *cells, data_key=job["id"],
                   css=JOB_KINDS[kind_of(job, page)].state,
                   aria_current=page.view.job == job["id"])


def page_jobs(page):
    """Return the search, the actions for many, and a page of jobs, newest first."""
    rows, counts = page.found[:PAGE_ROWS], counts_in_view(page)
    heads = [element("th", column.title, css=column.css, scope="col")
             for column in JOB_COLUMNS]
    words = " and ".join(map("“{}”".format, page.view.filters().values()))
    return element(
        "section", jobs_header(page, counts),
        element("button", type="button", css="primary", id="new", hidden=True),
        element("table", element("thead", element("tr", *heads)),
                element("tbody", *[job_row(job, page) for job in rows],
                        data_key=page.view.open("")),
                aria_label="Jobs"),
        not rows and element("p", "No job matches %s " % words,
                             page.view.q and "(output is not searched) ",
                             link("Clear", page.view.only()), css="dim"),
        page_links(page, sum(counts.values())), id="jobs", css="card")


def counts_in_view(page):
    """Return {state: count} of the jobs that the filters leave, as `counts_of`."""
    filters, state = page.view.filters(), page.view.state
    if not {*filters} - {"state"}:
        cancelled = page.status.cancelled
        counts = {name: count for name, count in page.status.jobs.items()
                  if state in ("", name)}
        if "dead" in counts:
            counts.update(dead=counts["dead"] - cancelled, cancelled=cancelled)
        return counts
    if len(page.found) <= PAGE_ROWS and not page.view.before:
        return collections.Counter(map(state_word, page.found))
    return page.cache.get(  # it takes a while
        "count" + query_of(**filters),
        lambda: page.queue.counts_of(where(**filters_of(filters))))


def jobs_header(page, counts):
    view = page.view
    order = ", the latest death first" if view.state == "dead" else ", newest first"
    first = view.state == "pending" and page.status.oldest_job
    others = [element("input", type="hidden", name=name, value=value)
              for name, value in view._replace(q="").filters().items()]
    return element(
        "div", element("h2", "Jobs", tabindex=-1),
        element("span", grouped(sum(counts.values())) + order, id="total", css="dim"),
        first and link("Longest wait: " + first, view.open(first), "line"),
        element("form", *others, element(
            "input", id="q", type="search", aria_label="Search jobs",
            placeholder="Search id, command, error", name="q", value=view.q)),
        *filter_links(view),
        element("span", *bulk_buttons(page, counts), css="row end"), css="row")


def filter_links(view):
    """Yield a link that removes it for each filter, but for what the search shows."""
    for name, words in view.filters().items():
        if name != "q":
            words = VIEW_FILTERS[name] + words
            yield link("✕ " + words, view.only(**dict(view.filters(), **{name: ""})),
                       "button filter", aria_label="Remove the filter " + words)


def bulk_buttons(page, counts):
    """Yield what can be done with the jobs that the filters leave: COUNTS by state."""
    view, filters, error = page.view, page.view.filters(), page.view.blocked_by
    kinds = {kind for kind, count in counts.items() if count}
    if kinds and view.kind == "blocked":
        yield bulk_button(
            "Retry what blocks them…", "retry", {"kind": "blocking others"})
    if "dead" in kinds or error and kinds:
        words = Html("Retry" + element("span", " dead") + "…")
        yield bulk_button(words, "retry", {"error": error} if error else filters)
    if kinds and (view.state == "failed" or view.kind == "delayed"):
        yield bulk_button("Run now…", "run", filters)
    if filters and kinds & {*TAKES["cancel"]}:
        yield bulk_button("Cancel…", "cancel", filters)
    if filters and kinds & {"cancelled", *TAKES["delete"]}:
        yield bulk_button("Delete…", "delete", filters)


def bulk_button(words, verb, filters, label=None):
    """Return the button of a verb for many, which asks how many first."""
    return button(words, "/api/" + verb + query_of(**filters),
                  "danger" if verb in ("cancel", "delete") else None, label,
                  question="/question" + query_of(verb=verb, **filters),
                  done=BULK_VERBS[verb].done, do="Yes, " + verb)


def question_route(queue, query):
    """Return the question before a verb for many, or why there is nothing to do."""
    verb = query.get("verb", "retry")
    if verb not in BULK_VERBS:
        raise Refusal(400, "no such verb")
    selection = selected_by(verb, query)
    # Only now, and not for each page: with a million jobs that takes a while.
    count = queue.count(selection.taken)
    spared = selection.spared and queue.count(selection.spared)
    stays = spared and "%s left out: %s." % (
        plural(spared, "job") + (" is" if spared == 1 else " are"),
        reason_to_spare(selection, spared))
    if not count:
        return {"none": joined("There is nothing to %s." % verb, stays, by=" ")}
    words = BULK_VERBS[verb].question.format(jobs_of_query(count, verb, query))
    # What comes, or ends, after the question is left alone.
    return {"ask": joined(words, effect_of(queue, query, verb), stays, by=" "),
            "until": queue.clock()}


def effect_of(queue, query, verb):
    """Return in words what a verb for many means for the jobs that it takes."""
    if verb == "retry":
        return "They get all their tries again."
    if verb == "run":
        return "They no longer wait for their time."
    if verb == "cancel":
        running = queue.count(where(**filters_of(query, ["processing"])))
        ended = running and "The processes of %s are ended." % plural(
            running, "running job")
        return joined(ended, "Cancelled jobs are dead; each can be retried.", by=" ")
    waiting = queue.count(jobs_to_delete(**filters_of(query, WAITING)).taken)
    return joined(waiting and "Still waiting to run: %s of them." % grouped(waiting),
                  "Their runs and their output go as well.", by=" ")


def jobs_of_query(count, verb, query):
    """Return in words which jobs a verb for many takes: 3 dead jobs with “exit 1”."""
    state = query.get("state", "dead" if verb == "retry" else "")
    with_text = joined(
        query.get("error") and "the error “%(error)s”" % query,
        query.get("q") and "“%(q)s” in them" % query, by=" and ")
    return joined(grouped(count), state, "job" if count == 1 else "jobs",
                  "kind" in query and "(%s)" % query["kind"],
                  with_text and "with " + with_text,
                  *["%s“%s”" % (before, query[name])
                    for name, before in VIEW_FILTERS.items()
                    if before and query.get(name)], by=" ")


def page_links(page, total):
    """Return the place of this page among all, and links to others."""
    view, has_more = page.view, len(page.found) > PAGE_ROWS
    if not has_more and not view.before:
        return None
    first = number_or(1, view.first)
    last = first + min(len(page.found), PAGE_ROWS) - 1
    place = "%s–%s of %s" % (grouped(first), grouped(last), grouped(max(last, total)))
    newest = view.address("#jobs", before="", first="")
    return element(
        "nav", view.before and link("Newest", newest, "button"),
        view.before and link("Newer", view.address("#jobs", **newer(page)), "button"),
        element("span", place, css="dim"),
        has_more and link("Older", view.address("#jobs", **older(page)), "button"),
        css="row", id="pages", aria_label="Pages")


def older(page):
    """Return what differs in the address of the next page."""
    return dict(before=page.found[PAGE_ROWS - 1]["id"],
                first=str(number_or(1, page.view.first) + PAGE_ROWS))


def newer(page):
    """Return what differs in the address of the page above."""
    if len(page.above) <= PAGE_ROWS:
        return dict(before="", first="")
    return dict(before=page.above[PAGE_ROWS]["id"],
                first=str(max(1, number_or(1, page.view.first) - PAGE_ROWS)))


# -- the page: the panel of a job ------------------------------------------------------


def page_panel(page):
    """Return the panel of a job: the reason first, the rest of the height to output."""
    job = page.queue.job(page.view.job)
    run = min(number_or(job["run"], page.view.run), job["run"])
    text = element("pre", job["command"], tabindex=0, role="region",
                   aria_label="Command")
    return panel(
        page, job["id"], page_reason(job, page),
        element("div", *job_buttons(job, page), css="row"),
        element("div", text, copy_button("Copy the command"), css="box"),
        element("dl", *[fact(name, value)
                        for name, value in job_facts(job, page).items() if value]),
        run_links(job, run, page), *panel_output(job, run, page))


def panel(page, name, *content):
    """Return the panel below its header, which has the steps to other jobs."""
    title = element("h2", name, id="name", tabindex=-1, css="mono")
    steps = element("nav", *step_links(page), css="row", aria_label="Jobs of the list")
    close = link("Close", page.view.open(""), "button", id="close")
    header = element("div", title, steps, close, css="row top")
    return element("section", header, *content, id="job", css="card",
                   aria_labelledby="name", data_key=page.view.job)


def step_links(page):
    """Yield links to the jobs above and below the open one in the table."""
    first = len(page.above[:1])
    ids = [job["id"] for job in page.above[:1] + page.found]
    # From a job that is not in the table the next one is the first of the table.
    at = ids.index(page.view.job) if page.view.job in ids else first - 1
    for name, arrow, to in (("previous", "←", at - 1), ("next", "→", at + 1)):
        if 0 <= to < len(ids):
            changes = newer(page) if to < first else (
                older(page) if to == first + PAGE_ROWS else {})
            words = "%s job: %s" % (name.capitalize(), ids[to])
            yield link(arrow, page.view.open(ids[to], **changes), "button", id=name,
                       aria_label=words, title="%s (key %s)" % (words, arrow))


def can_run_now(job, page):
    """Tell whether a job waits for nothing but a time."""
    return job["state"] in WAITING and job["run_at"] > page.now and not job["waits"]


def job_buttons(job, page):
    """Yield a button for each verb that is possible, and why there is no Delete.

    What destroys, or runs a command once more, asks first.
    """
    id, state = job["id"], job["state"]
    is_needed = bool(page.queue.waiting_dependents(job, 1))
    if state == "dead":
        yield job_button("Retry", "retry", id, "Retried", "primary")
    dead = job["waits"] and page.queue.dead_before(job)
    if dead:
        yield job_button("Retry what blocks it", "retry", dead["id"], "Retried",
                         "primary")
    if state in SUCCESSFUL:
        yield job_button("Run again…", "retry", id, "Runs again:",
                         ask=id + " is completed. Run it again?")
    if can_run_now(job, page):
        yield job_button("Run now", "run", id, "Due now:", "primary")
    if state in TAKES["cancel"]:
        yield cancel_button(job, is_needed)
    if is_needed:
        yield element("span", "It can't be deleted: other jobs wait for it", css="dim")
    elif state in TAKES["delete"]:
        yield job_button("Delete…", "delete", id, "Deleted", "danger",
                         "Delete %s? Its runs and their output go as well." % id)


def job_button(words, verb, id, done, css=None, ask=None):
    """Return the button of a verb for a job.

    Its key keeps the focus from sliding to another button. The id is in the query, as
    it may be `..`, which no path can have.
    """
    return button(words, "/api/jobs/-/" + verb + query_of(id=id), css,
                  words + " " + id, ask=ask, key="do-" + words,
                  do="Yes, " + words.strip("…").lower(), done=done + " " + id)


def cancel_button(job, is_needed):
    """Return the button that cancels a job, until that has begun.

    It asks first, with what that means.
    """
    is_running = job["state"] == "processing"
    if is_running and job["cancelled"]:
        return element("span", "It is being cancelled", css="dim")
    question = joined(
        "Cancel %s?" % job["id"], is_running and "All its processes are ended.",
        is_needed and "The jobs that come after it stay, and wait until it is retried"
        " and completed.", by=" ")
    return job_button("Cancel…", "cancel", job["id"],
                      "Cancelling" if is_running else "Cancelled", "danger", question)


def page_reason(job, page):
    """Return in words what a job is, and why."""
    word = kind_of(job, page)
    waiting = why_waiting(job, page)
    tries = job["attempts"] and tries_text(job)
    if waiting:
        tries = tries and job["state"] == "pending" and "after " + tries
    words = joined(failure_of(job), waiting or time_cell(job, page), tries)
    return element("p", icon(word), element("b", word, css="hue"), " – " + words,
                   id="why", css=JOB_KINDS[word].state)


# Fields that the panel shows in other places, or as a part of others.
SHOWN_ELSEWHERE = ("id", "command", "run_at")


def job_facts(job, page):
    """Return what the panel lists of a job, by name; empty values are not shown."""
    fields = public_job(job)
    dead = job["waits"] and page.queue.dead_before(job)
    holder = job["gate"] == LOCKED and page.queue.lock_holder(job)
    facts = {
        "behind": holder and job_links([holder], 1, page),
        "blocked by": dead and dead["id"] not in fields["after"] and job_links(
            [dead["id"]], 1, page),
        "comes after": job_links(fields["after"], len(fields["after"]), page),
        "comes before": job_links(*page.queue.dependents(job, LINKS_SHOWN), page),
        "enqueued": time_fact(job["created_at"], page),
        "due": can_run_now(job, page) and time_fact(job["run_at"], page),
        "started": job["started_at"] and time_fact(job["started_at"], page),
        "worker": next((worker["pid"] for worker in page.status.workers
                        if worker["job"] == job["id"]), None)}
    facts.update((name.replace("_", " "), fields[name])
                 for name in COLUMNS if name not in SHOWN_ELSEWHERE)
    facts["timeout"] = fields["timeout"] and duration_text(fields["timeout"])
    facts["env"] = " ".join(map("=".join, fields["env"].items()))
    return facts


def time_fact(moment, page):
    """Return a time relative to now, and as a date."""
    return [ago(moment, page) + " · ", time_element(moment)]


def time_element(moment):
    """Return a time that the script shows in the zone of the browser."""
    words = re.sub("[TZ]", " ", iso(moment)) + "UTC"
    return element("time", words, datetime=iso(moment))


def fact(name, value):
    """Return a line of the list: a name, and a text or links."""
    content = value if isinstance(value, list) else [value]
    return element("div", element("dt", name), element("dd", *content))


def job_links(ids, count, page):
    """Return links to the first of COUNT jobs, with what each of them is."""
    links = [
        link("%s (%s)" % (id, kind_of(page.queue.job(id), page)),
             page.view.open(id)) for id in ids[:LINKS_SHOWN]]
    more = count - LINKS_SHOWN
    return [*links, "and %s more" % grouped(more)] if more > 0 else links


def run_links(job, shown, page):
    """Return links to the runs around that which is shown, the latest one first."""
    runs = page.queue.runs(job)[::-1]
    if not runs:
        return None
    at = sum(run["run"] > shown for run in runs)
    begin = 0 if at < RUNS_SHOWN else at - RUNS_SHOWN // 2
    latest, earlier = runs[0]["run"], runs[begin + RUNS_SHOWN :]
    to_run = lambda run: page.view.address(run=str(run))
    return element(
        "nav", begin > 0 and link("Latest: run %d" % latest, to_run(latest), "button"),
        *[run_link(run, shown, page) for run in runs[begin : begin + RUNS_SHOWN]],
        earlier and link(grouped(len(earlier)) + " earlier",
                         to_run(earlier[0]["run"]), "button") or None,
        css="row", id="runs", aria_label="Runs")


def run_link(run, shown, page):
    """Return a link to the output of a run, with when it began and how it ended."""
    going = "lost" if page.view.job in page.status.lost else "running"
    if run["finished_at"] is not None:
        going = (run["error"] or "exit 0") + " · " + short_duration(run["seconds"])
    return element("a", "run %d · " % run["run"], time_element(run["started_at"]),
                   " · " + going, href=page.view.address(run=str(run["run"])),
                   css="button", aria_current=run["run"] == shown)


# -- the page: the output of a run, piece by piece -------------------------------------


def panel_output(job, run, page):
    """Return the title of an output and its box, which the script fills."""
    if not run:
        return [element("h2", "Not run yet")]
    name = query_of(id=job["id"], run=run)
    size, head = page.queue.output_head(job, run)
    if not head and not is_live(job, run):
        return [element("h2", "It printed nothing")]
    size -= len(head) - len(split_dropped(head)[1])  # without the note on what is not
    words = [element("span", "%s bytes kept" % grouped(size), css="dim")]
    if is_live(job, run):
        words = [element("span", live_text(job, page), css="dim live"),
                 element("button", "Jump to the end", type="button", id="end")]
    header = element(
        "div", element("h2", "Output"), *words,
        copy_button(None, "output", "Copy what is shown"),
        link("Download", "/output.log" + name, "button end",
             download="%s-%d.log" % (job["id"], run)), css="row")
    piece = output_piece(page.queue, job, run) if page.is_whole else element(
        "code", data_next="/output" + name)
    return [header, element(
        "pre", piece, id="output", tabindex=0, role="region", aria_label="Output",
        data_key="%s %s" % (job["id"], run), data_keep="yes")]


def live_text(job, page):
    if job["id"] in page.status.lost:
        return "lost"
    return "following" if page.queue.tail(job) else "nothing printed yet"


def is_live(job, run):
    """Tell whether a run still goes on."""
    return job["state"] == "processing" and run == job["run"]


def piece_route(queue, query):
    """Return the piece of an output that an earlier piece has named."""
    begin = count_from(0, "from")(query.get("from", "0"))
    return output_piece(queue, *run_of(queue, query), begin, query.get("style", ""))


def output_piece(queue, job, run, begin=0, style=""):
    """Return what a run has printed from a place on, and the address of the next piece.

    The next piece begins with the last line if that has no end: the line is given again
    with what follows, so that nobody has to keep half a line, or half a character.
    """
    dropped, output = split_dropped(output_of(queue, job, run))
    start, output = output_from(begin, dropped, output)
    end = output.rfind(b"\n") + 1
    note = "[before this: %s]\n" % joined(
        dropped and grouped(dropped) + " bytes dropped",
        start > dropped and grouped(start - dropped) + " bytes in the download")
    lines, style = styled(output[:end], style)
    last, _ = styled(output[end:], style)
    following = {"id": job["id"], "run": run, "style": style,
                 "from": start + end + overwritten(output[end:])}
    address = is_live(job, run) and "/output" + query_of(**following)
    return element("code", start > begin and note, *lines, element("i", *last),
                   data_next=address)


def output_from(begin, dropped, output):
    """Return what is shown of an output from a place on, and where that begins."""
    # Later, if the beginning was dropped, or if all of it would be too long.
    start = max(begin, dropped, dropped + len(output) - PIECE)
    output = output[start - dropped :]
    if start == begin:
        return start, output
    # In the middle of a line or, if there is no other, of a character.
    rest = output[output.find(b"\n") + 1 :]
    if rest in (b"", output):
        rest = output.lstrip(bytes(range(0x80, 0xC0)))
    return start + len(output) - len(rest), rest


def styled(output, style):
    """Return an output in elements with its styles, and the style at its end."""
    parts, style = painted(output, style)
    return [element("span", text, css=names) if names else text
            for text, names in parts], style


# -- the page: all of it ---------------------------------------------------------------


def make_page(queue, query, site, is_whole=False):
    """Return all of the page but its chart and its output, which may take a while."""
    lost = queue.lost_runs()
    with queue.snapshot():
        blocked = site.cache.get("blocked", queue.blocked_jobs)
        status, now = read_status(queue, lost, blocked), queue.clock()
        # From the cache while there are as many: to group a hundred thousand is slow.
        groups = site.cache.get("dead %d" % status.jobs["dead"],
                                lambda: errors_of(queue))
        view = View(*(query.get(name, "") for name in View._fields))
        state = view.state.lower()  # as `state_name` takes it
        view = view._replace(state=state if state in STATES else "",
                             kind=view.kind if view.kind in KIND_FILTERS else "")
        view = placed(queue, view)
        found, above = rows_from(queue, view), []
        if view.before and not found:  # they are gone: the first page has some
            view = view._replace(before="", first="")
            found = rows_from(queue, view)
        if view.before:
            above = rows_from(queue, view, backwards=True)
        return page_parts(Page(queue, view, now, status, groups, found, above,
                               site.cache, is_whole))


def placed(queue, view):
    """Return a view whose place is in the list: a lost one is found by its number."""
    state, number = queue.state(view.before), number_or(1, view.first) - 1
    if state is not None and (view.state != "dead" or state == "dead"):
        return view
    above = number and newest_jobs(queue, dict(view.filters(), limit=str(number)))
    if not above:
        return view._replace(before="", first="")
    return view._replace(before=above[-1]["id"], first=str(len(above) + 1))


def rows_from(queue, view, backwards=False):
    """Return the jobs of a page, and one more if there are others behind them."""
    query = dict(view.filters(), before=view.before, limit=str(PAGE_ROWS + 1))
    return newest_jobs(queue, query, backwards)


def page_parts(page):
    """Return the title, the parts of the page, and the panel of the open job."""
    parts = [page_now(page)]
    if count_in(page, ""):
        parts += [page_tiles(page), page_middle(page), page_jobs(page)]
    job = page.queue.state(page.view.job) and page.queue.job(page.view.job)
    if job:
        opened, words = page_panel(page), [
            job["id"] + " " + kind_of(job, page)]
    else:
        id, verdict = page.view.job, verdict_on(page.status, page.now)
        opened = id and panel(page, sentence_case(str(no_job(id))), element(
            "p", "It may have been deleted"))
        words = [verdict.harm, verdict.sentence.partition(":")[0]]
    title = joined(*words, os.path.basename(page.queue.path), by=" – ")
    return Html("".join([
        element("title", title), page_header(page), element("main", *parts),
        opened or ""]))


# What answers a request, but for the page itself. A GET returns a document, a POST
# carries out a verb. The id of a job comes from the path, or from the query for ids
# like `..`, which browsers take out of a path.
ROUTES = {
    "GET /chart": chart_route,
    "GET /question": question_route,
    "GET /output": piece_route,
    "GET /output.log": download_route,
    "GET /metrics": metrics_route,
    "GET /api/status": lambda queue, query: status_document(
        read_status(queue), queue.clock()),
    "GET /api/stats": stats_by_minute,
    "GET /api/dead": dead_route,
    "GET /api/jobs": lambda queue, query: [
        public_job(job) for job in newest_jobs(queue, query)],
    "GET /api/jobs/ID": lambda queue, query: job_document(
        queue, queue.job(query["id"])),
    "GET /api/jobs/ID/output": output_route,
    "POST /api/jobs/ID/retry": lambda queue, query: queue.retry([query["id"]]),
    "POST /api/jobs/ID/cancel": lambda queue, query: queue.cancel([query["id"]]),
    "POST /api/jobs/ID/delete": lambda queue, query: queue.delete([query["id"]]),
    "POST /api/jobs/ID/run": lambda queue, query: queue.run_now([query["id"]]),
    **{"POST /api/" + verb: functools.partial(apply_to_query, verb)
       for verb in BULK_VERBS},
    "POST /api/pause": lambda queue, query: queue.set_paused(True),
    "POST /api/resume": lambda queue, query: queue.set_paused(False),
}
# With a million runs they take a while: whoever asks, one request makes them.
SLOW_ROUTES = ("GET /api/stats", "GET /chart")


# -- the server ------------------------------------------------------------------------


class Cached:
    """A value of a `Cache`, which holds until a monotonic time; one thread makes it."""

    def __init__(self):
        import threading

        self.lock, self.until, self.value = threading.Lock(), 0.0, None


class Cache:
    """Values that are slow to make, by their key, each for CACHE_TIME at most.

    One that is made in a moment is made anew at each refresh: only in a large queue may
    the page lag behind.
    """

    def __init__(self):
        self.values = {}

    def get(self, key, make):
        """Return the value of a key, which MAKE returns anew."""
        if len(self.values) > 20:
            self.clear()
        cached = self.values.setdefault(key, Cached())
        with cached.lock:
            began = time.monotonic()
            if began >= cached.until:
                cached.value = make()
                now = time.monotonic()
                cached.until = now + min((now - began) / CACHE_SHARE, CACHE_TIME)
            return cached.value

    def clear(self):
        self.values = {}


class Site:
    """What the dashboard answers to requests; `listen` only speaks HTTP."""

    def __init__(self, path, host):
        import secrets
        import socket

        self.path, self.names = path, {"localhost", host.lower()}
        self.start = "dashboard --host " + quoted([host])
        if host not in LOOPBACK:  # it is reached by the names of its machine as well
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.token = secrets.token_hex(16)
        self.cache = Cache()

    def answer(self, method, target, headers):
        """Return status, type and text of the answer, or of the refusal."""
        from urllib.parse import urlsplit

        try:
            self.require_own_host(headers)
            url = urlsplit(target)
            if method == "POST":
                self.require_own_page(headers)
            return (200, *self.content(method, url))
        except Refusal as refusal:
            status, message = refusal.status, str(refusal)
        except (ValueError, QueueError) as error:
            status, message = (410 if self.is_gone() else 400), str(error)
        except (sqlite3.Error, OSError) as error:
            status, message = 503, with_cause(error, self.path)
            if "locked" in message:
                message = "another program holds the queue: try again"
        except Exception as error:  # or the page would take the dashboard for gone
            status, message = 500, "an error in queuectl: %r" % error
        return status, "application/json", json.dumps({"error": message})

    def content(self, method, url):
        """Return type and text of what an address names."""
        name = method + " " + url.path
        if name == "GET /":
            return "text/html", self.whole_page(url)
        if name == "GET /main":
            return "text/html", self.page(url)
        if name in SLOW_ROUTES:
            return self.cache.get(url, lambda: self.document(method, url))
        try:
            return self.document(method, url)
        finally:
            if method == "POST":  # the page must show what was done
                self.cache.clear()

    def page(self, url, is_whole=False):
        """Return what the script fetches at each refresh."""
        with self.open_queue() as queue:
            return make_page(queue, query_fields(url), self, is_whole)

    def whole_page(self, url):
        """Return the page; of a queue that can't be read, why that is so."""
        try:
            content, trouble = self.page(url, is_whole=True), ""
        except (Refusal, QueueError, sqlite3.Error, OSError) as error:
            content = "<title>queuectl</title><main></main>"
            trouble = with_cause(error, self.path)
        title, end, content = content.partition("</title>")
        parts = {"TOKEN": self.token, "TITLE": title + end, "CONTENT": content,
                 "START": command_to_copy(self.path, self.start),
                 "ANEW": command_to_copy(self.path, "worker start"),
                 "IF_GONE": "" if trouble and self.is_gone() else "hidden",
                 "TROUBLE": element("p", sentence_case(trouble), role="alert")}
        return re.sub("{{([A-Z_]+)}}", lambda name: parts[name[1]], PAGE_HTML)

    def is_gone(self):
        """Tell whether somebody has removed the queue."""
        return not os.path.exists(self.path)

    def open_queue(self):
        return Queue(self.path, lock_timeout=POOL_LOCK_TIMEOUT, create=False)

    def require_own_host(self, headers):
        """Refuse a name of another site that leads here (DNS rebinding)."""
        from urllib.parse import urlsplit
        import ipaddress

        name = urlsplit("//" + headers.get("Host", "")).hostname or ""
        if name not in self.names:
            try:
                ipaddress.ip_address(name)
            except ValueError:
                raise Refusal(403, "not a name of this dashboard") from None

    def require_own_page(self, headers):
        """Refuse a request that does not come from this dashboard's own page."""
        import hmac

        if headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers:
            raise Refusal(413, "an action has no body")
        token = headers.get("X-Token", "").encode()
        if headers.get("Origin") != "http://" + headers["Host"]:
            raise Refusal(403, "not from this page")
        if not hmac.compare_digest(token, self.token.encode()):
            raise Refusal(403, "this page is an earlier dashboard's: reload it")

    def document(self, method, url):
        """Return type and text of what a route makes; the path quotes a job's id."""
        from urllib.parse import unquote

        path, query = url.path, query_fields(url, can_be_empty=method == "GET")
        job = re.fullmatch("(/api/jobs/)([^/]*)(/.+)?/?", path)
        if job:
            path = job[1] + "ID" + (job[3] or "")
            if job[2] != "-":  # else the query has an id that no path can have
                query["id"] = unquote(job[2], errors="replace")
            query.setdefault("id", "")
        route = ROUTES.get(method + " " + path)
        if not route:
            raise Refusal(404, "no such page")
        with self.open_queue() as queue:
            if job:
                require_job(queue, query["id"])
            value = route(queue, query)
        if isinstance(value, str):
            return "text/html" if isinstance(value, Html) else "text/plain", value
        return "application/json", json.dumps(value)


def query_fields(url, can_be_empty=True):
    """Return the fields of an address's query that are not empty."""
    from urllib.parse import parse_qsl

    fields = dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=16))
    text = "".join(fields.values())
    if not is_storable(text) or len(text) > MAX_QUERY:
        raise Refusal(400, "no text, or too long")
    if not (can_be_empty or all(fields.values())):
        raise Refusal(400, "a field is empty")
    return {name: value for name, value in fields.items() if value}


def encoded(text, accepted):
    """Return the body for a text, and its headers: gzip, where that is accepted."""
    import gzip

    body = text.encode(errors="backslashreplace")  # a path may be no UTF-8
    if "gzip" not in accepted:
        return body, {}
    packed = gzip.compress(body, compresslevel=5)  # for slow lines
    return packed, {"Content-Encoding": "gzip"}


def listen(site, host, port):
    """Return an HTTP server for a site, with a thread for each connection."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    import socket

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # seconds: a slow or vanished client must not keep a thread
        server_version, sys_version = "queuectl", ""

        def do_GET(self):
            status, content_type, text = site.answer(
                self.command, self.path, self.headers)
            body, headers = encoded(text, self.headers.get("Accept-Encoding", ""))
            # A body is not read. It must not be taken for the next request.
            self.close_connection |= (
                self.command == "POST" or "Transfer-Encoding" in self.headers
                or self.headers.get("Content-Length", "0") != "0")
            self.send_response(status)
            self.send_header("Content-Type", content_type + "; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in {**HEADERS, **headers}.items():
                self.send_header(name, value.replace("{{TOKEN}}", site.token))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            """Keep quiet: the terminal is the user's."""

    class Server(ThreadingHTTPServer):
        allow_reuse_address = not WINDOWS  # there two could listen at one address
        request_queue_size = 128  # of five, some of thirty would wait for a second
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request, client):
            """Say nothing: a client went away."""

    return Server((host, port), Handler)


@command("dashboard", "show a live page of the queue in the browser",
         "dashboard --port 8321",
         option("--host", "HOST", "where to listen (default: 127.0.0.1)",
                default="127.0.0.1"),
         option("--port", "N", "0 takes a free one (default: 8321)",
                count_from(0, "--port", 65535), default=8321),
         creates_queue=True, must_print=True, opens_queue=False)
def cmd_dashboard(args):
    serve(args.db, args.host, args.port)


def serve(path, host, port):
    """Serve the dashboard until Ctrl-C."""
    if not host:  # that would listen everywhere
        raise QueueError("--host: name an address, like 127.0.0.1", code=2)
    with Queue(path):  # checks that it is a queue
        site = Site(path, host)
    try:
        server = listen(site, host, port)
    except (OSError, TypeError, UnicodeError) as error:  # the last two: an odd host
        why = getattr(error, "strerror", None) or error
        raise QueueError("cannot listen on %s, port %d: %s", host, port, why) from None
    with server:
        if host not in LOOPBACK:
            words = "warning: whoever reaches %s can read this queue and change it"
            notice(words % host)
        name = "[%s]" % host if ":" in host else host
        address = "http://%s:%d/" % (name, server.server_port)
        site.start += " --port %d" % server.server_port
        print(address + " (to stop: Ctrl-C)", flush=True)
        server.serve_forever()


PAGE_CSS = """
:root {
  color-scheme: light dark;
  --bg: light-dark(#f6f8fa, #0d1117); --card: light-dark(#fff, #161b22);
  --text: light-dark(#1f2328, #e6edf3); --dim: light-dark(#59636e, #9aa4af);
  --line: light-dark(#d8dee4, #2b323b); --edge: light-dark(#868f99, #6e7781);
  --blue: light-dark(#0860ca, #6cb6ff); --green: light-dark(#157a34, #4cc764);
  --red: light-dark(#c21c2c, #ff7b72); --amber: light-dark(#8a5c00, #e3b341);
  --pink: light-dark(#8b3fb0, #d2a8ff); --cyan: light-dark(#0b6b7d, #5fd7e0);
}

/* --c is the colour of a state; a1 to a6 are those of a terminal, b1 to b6 those behind it. */
.pending { --c: var(--dim); } .processing { --c: var(--blue); }
.completed { --c: var(--green); } .failed { --c: var(--amber); } .dead { --c: var(--red); }
.hue { color: var(--c); }
.a1 { color: var(--red); } .a2 { color: var(--green); } .a3 { color: var(--amber); }
.a4 { color: var(--blue); } .a5 { color: var(--pink); } .a6 { color: var(--cyan); }
.b1 { --b: var(--red); } .b2 { --b: var(--green); } .b3 { --b: var(--amber); }
.b4 { --b: var(--blue); } .b5 { --b: var(--pink); } .b6 { --b: var(--cyan); }
:is(.b1, .b2, .b3, .b4, .b5, .b6) { background: color-mix(in srgb, var(--b) 25%, transparent); }
.bold { font-weight: 600; } .underlined { text-decoration: underline; }
.reversed { background: var(--text); color: var(--bg); }

* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
/* Without the script nothing answers these, and "Running now" has the whole width. */
body:not(.live) :is(button, .live, .card:has(#chart)) { display: none; }
body:not(.live) .two { grid-template-columns: 1fr; }
noscript p { margin: 0 0 .7rem; }
body {
  margin: 0 auto; max-width: 92rem; padding: .8rem 1.2rem 3rem;
  background: var(--bg); color: var(--text);
  font: .875rem/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
b, h1, h2, th { font-weight: 600; }
h1, h2 { font-size: 1rem; }
.logo {
  width: 1.35em; height: 1.35em; padding: .2em; margin-right: .45em; vertical-align: -.32em;
  border-radius: .3em; background: var(--blue); stroke: var(--card); stroke-width: 2.4; fill: none;
}
a { color: inherit; text-underline-offset: .2em; }
ul { list-style: none; padding: 0; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px; }
.dim, dt, th { color: var(--dim); }
.end { margin-left: auto; }
.mono, pre { font: .92em/1.5 ui-monospace, monospace; }
.row { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; }
.line, td, th, #trouble code { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
/* Two lines at most. */
.lines {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; overflow-wrap: anywhere;
}
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem 1rem; margin-top: .7rem;
}
button, .button, input {
  font: inherit; color: inherit; background: var(--card); text-decoration: none;
  padding: .2rem .65rem; border: 1px solid var(--edge); border-radius: .4rem;
}
button { cursor: pointer; }
button:hover, .button:hover { border-color: var(--text); }
[aria-disabled], [aria-busy] { opacity: .5; cursor: not-allowed; }
.filter { border-radius: 1rem; background: var(--bg); }
.primary, .stopped #stop { background: var(--blue); border-color: var(--blue); color: var(--card); }
.danger { color: var(--red); }
.button { max-width: 100%; overflow-wrap: anywhere; }
.icon {
  width: 1em; height: 1em; fill: none; stroke: var(--c); stroke-width: 2;
  vertical-align: -.12em; margin-right: .4em;
}
#trouble {
  position: sticky; top: .4rem; z-index: 3; margin: 0 0 .7rem;
  background: var(--red); color: var(--card);
}
#trouble:has(:first-child:empty) { display: none; }
/* Striped and grey: what was, is old. */
.left, #trouble:not(:has(:first-child:empty)) ~ #page :is(main, #job) {
  filter: grayscale(1);
  background-image: repeating-linear-gradient(135deg, var(--line) 0 1px, transparent 0 .5rem);
}
/* Without anything good to show it is all of the page. */
body:not(:has(#now)) { display: flex; flex-direction: column; }
body:not(:has(#now)) #trouble {
  position: static; order: 1; width: 100%; max-width: 44rem; margin: 10vh auto;
  padding: 1.4rem 1.8rem;
  background: var(--card); color: var(--text); border-left: 4px solid var(--red);
  font-size: 1.2rem; overflow-wrap: anywhere;
}
body:not(:has(#now)) #trouble :is(p + p, div) {
  margin-top: .4rem; color: var(--dim); font-size: 1rem;
}
#said {
  position: fixed; left: 50%; bottom: 1rem; transform: translateX(-50%); z-index: 2;
  max-width: calc(100% - 2rem); border-radius: .4rem;
  background: var(--text); color: var(--bg); overflow-wrap: anywhere;
}
#said:not(:empty) { padding: .5rem 1rem; }
dialog {
  margin: auto; width: min(30rem, calc(100% - 2rem)); padding: 1.2rem 1.4rem;
  background: var(--card); color: var(--text); overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: .6rem; box-shadow: 0 .5rem 3rem #0006;
}
dialog::backdrop { background: #0007; }
dialog .row { justify-content: flex-end; margin-top: 1.1rem; }
#yes.danger { background: var(--red); border-color: var(--red); color: var(--card); }
/* An answer that takes longer than a moment is announced. */
.busy::before {
  content: ""; position: fixed; inset: 0 0 auto; height: 3px; z-index: 3;
  background: var(--blue); transform-origin: 0;
  animation: busy 8s .3s both cubic-bezier(0, .8, .6, 1);
}
@keyframes busy { from { scale: 0 1; } to { scale: 1 1; } }

header { float: left; min-height: 2rem; margin-right: .7rem; }
#queue { min-height: 2rem; justify-content: end; }
main { clear: both; container-type: inline-size; }
#queue .line { flex: 1 0 5rem; width: 0; line-height: 2; }
#now {
  border-left: 4px solid var(--c); padding: .9rem 1.1rem .8rem;
  background: color-mix(in srgb, var(--c) 5%, var(--card));
}
#verdict { font-size: 1.5rem; line-height: 1.25; outline: 0; }
#verdict::before {
  content: ""; display: inline-block; width: .5em; height: .5em; margin-right: .4em;
  border-radius: 50%; background: var(--c); vertical-align: .1em;
}
#now > p { margin-top: .2rem; }
.parts a { white-space: nowrap; }
.parts span { color: var(--text); }
.advice { margin-top: .25rem; }
.advice code {
  padding: .15rem .5rem; border: 1px solid var(--line); border-radius: .3rem;
  background: var(--card); color: var(--text); overflow-wrap: anywhere;
}
#trouble button { color: var(--text); }
#trouble code { flex: 1 1 12rem; width: 0; }
body:not(:has(#now)) #trouble code { white-space: normal; flex-basis: 100%; }
#now ul .row > * { min-width: 6rem; text-align: center; }
#now :is(button, .button) { padding: .1rem .55rem; }
#now ul:not(:empty) { margin-top: .5rem; }
#now ul { display: grid; grid-template-columns: 7rem fit-content(45%) 1fr auto; gap: 0 .7rem; }
#now li {
  display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; align-items: center;
  padding: .3rem 0; border-top: 1px solid var(--line);
}
#now li:has(> details) { display: block; }
@container (min-width: 58.01rem) {
  li .lines { -webkit-line-clamp: 1; word-break: break-all; }
}
#tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 0 .7rem; }
#tiles a { text-decoration: none; padding: .45rem .9rem .55rem; min-width: 0; }
#tiles a:hover { border-color: var(--edge); }
#tiles :is(b, .dim) { display: block; }
#tiles b { font-size: 1.4rem; line-height: 1.3; }
#tiles .icon { vertical-align: -.1em; stroke: var(--dim); }
#tiles .some .icon { stroke: var(--c); }
#tiles .dead.some :is(b, span:first-child) { color: var(--c); }
#tiles [aria-current] { box-shadow: inset 0 -3px var(--c, var(--edge)); }
/* A queue without jobs: there is nothing but the first steps. */
body:not(:has(#tiles)) #now { max-width: 50rem; margin: 12vh auto; padding: 1.6rem 2rem; }
ol { padding-left: 1.2rem; }
#now ol li { display: list-item; padding: .6rem 0 0; border: 0; }

.two { display: grid; grid-template-columns: 3fr 2fr; column-gap: .7rem; }
.two > * { min-width: 0; min-height: 9.4rem; }
.two > *, #chart { display: flex; flex-direction: column; flex: 1; }
#chart svg {
  width: 100%; flex: 1 0 4.5rem; height: 0; margin-bottom: .15rem;
  border: solid var(--line); border-width: 1px 0;
  background: linear-gradient(var(--line), var(--line)) center / 100% 1px no-repeat;
}
rect, .legend::before { fill: var(--c); background: var(--c); }
/* Framed, so that they differ for those who see no colours as well. */
rect.failed, .legend.failed::before {
  --paler: color-mix(in srgb, var(--c) 45%, var(--card));
  fill: var(--paler); background: var(--paler); stroke: var(--c); border: 2px solid var(--c);
  stroke-width: 2; vector-effect: non-scaling-stroke;
}
rect.part { opacity: .45; }
.axis { justify-content: space-between; font-size: .86em; margin-top: .35rem; }
.legend { margin: 0 .6em; }
.legend::before {
  content: ""; display: inline-block; width: .65em; height: .65em; margin-right: .4em;
  border-radius: .15em; box-sizing: border-box;
}
.none { flex: 1; display: grid; place-content: center; text-align: center; }
#running li { gap: 0 .6rem; padding-top: .25rem; }
#running small { flex: 0 0 100%; padding-left: 1.6rem; }
#running li span { flex: 1 0; }
#running .icon { margin: 0; flex: none; }
#running > a { margin-top: .5rem; padding: .2rem 0; }
#running li a { max-width: 50%; flex: none; }

form { display: flex; flex: 1 1 14rem; min-width: 0; max-width: 34rem; }
#q { flex: 1; min-width: 0; }
.skip:not(:focus) { position: absolute; left: -99rem; }
#total { min-width: 10em; }
::placeholder { color: var(--dim); opacity: 1; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; margin-top: .5rem; }
td, th { text-align: left; padding: .35rem .5rem; border-top: 1px solid var(--line); }
th { width: 14rem; border: 0; }
th.hue, th.mono { color: var(--dim); font: inherit; font-weight: 600; }
td a { text-decoration: none; }
.num { text-align: right; }
.slim { width: 5.5rem; } .mid { width: 9rem; } .rest { width: auto; }
tbody tr, #runs-now li { cursor: pointer; }
/* It takes no room: what it stands over may not move. */
#new {
  position: sticky; top: .5rem; z-index: 1; display: block; height: 2rem;
  margin: 0 auto -2rem; box-shadow: 0 .1rem .6rem #0005;
}
tbody tr:hover, tr[aria-current], #runs-now li:hover {
  background-color: color-mix(in srgb, var(--blue) 9%, transparent);
}
#pages { justify-content: center; margin-top: .7rem; }

/* The job: its output gets all the height that is left. */
#job {
  position: fixed; inset: 0 0 0 auto; width: min(54rem, 100%); margin: 0; border-radius: 0;
  display: flex; flex-direction: column; gap: .7rem; z-index: 1;
  overflow: auto; overscroll-behavior: contain; box-shadow: 0 0 2.5rem #0006;
}
#name { flex: 1; min-width: 0; font-size: 1.15rem; outline: 0; overflow-wrap: anywhere; }
.top {
  position: sticky; top: -.7rem; z-index: 1; flex-wrap: nowrap; align-items: start;
  margin: -.7rem -1rem 0; padding: .7rem 1rem .4rem; background: var(--card);
}
.top > :is(nav, a) { flex: none; flex-wrap: nowrap; }
.box { position: relative; }
.box button { position: absolute; top: .35rem; right: .35rem; padding: .1rem .5rem; }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto; padding: .6rem .7rem;
  background: var(--bg); border: 1px solid var(--line); border-radius: .4rem;
}
code { font: inherit; }
pre i { font-style: normal; }
.box pre { max-height: 9rem; padding-right: 4.5rem; }
#output { flex: 1 0 12rem; height: 0; }
.scrolled span:has(+ #end), body:not(.scrolled) #end { display: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt, dd { align-self: baseline; }
dl div { display: contents; }
dd { overflow-wrap: anywhere; }
dd a { display: inline-block; margin-right: 1em; padding: .15rem 0; }
#runs [aria-current] { box-shadow: inset 0 -3px var(--blue); }

/* Beside the panel there is room for the page, or the page waits below it. */
@media (min-width: 80rem) {
  body:has(#job) { margin-right: 41rem; }
  #job { width: 40rem; box-shadow: none; }
  body:has(#job) .wide { display: none; }
}
@media (max-width: 79.99rem) {
  #job { box-shadow: 0 0 0 100vmax #0006; }
}
@container (max-width: 73rem) {
  th { width: 10rem; } .mid { width: 8.6rem; } .slim { width: 4.5rem; }
  #tiles a { padding: .45rem .6rem .55rem; }
}
@container (max-width: 58rem) {
  #now ul { display: block; }
  #now li { grid-template-columns: auto 1fr auto; gap: .1rem .7rem; }
  #now li > .dim { grid-row: 2; grid-column: 1 / 4; }
  .two { grid-template-columns: 1fr; }
  #tiles { grid-template-columns: repeat(3, 1fr); }
  #running { min-height: 0; }
}
@media (max-width: 60rem) {
  .wide { display: none; }
}
/* On a phone, and beside the panel, a job is two lines: state, id, time above its command. */
@container (max-width: 44rem) {
  thead { position: absolute; left: -99rem; }  /* heard, not seen */
  td.wide { display: none; }
  td { border: 0; padding: .05rem .4rem; }
  tr {
    display: grid; grid-template-columns: auto minmax(5rem, 1fr) fit-content(10rem);
    padding: .35rem 0; border-top: 1px solid var(--line);
  }
  td.rest { grid-row: 2; grid-column: 1 / 4; }
  td.mid { width: auto; white-space: normal; max-height: 3em; }
  td.hue { overflow: visible; }
  tr:is(.dead, .failed) .rest span {
    display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
    overflow: hidden; overflow-wrap: anywhere; white-space: normal;
  }
}
@media (max-width: 44rem) {
  body { padding: .6rem .6rem 3rem; }
  /* What needs somebody and the jobs come before the chart. */
  main { display: flex; flex-direction: column; }
  .two { display: contents; }
  .two > * { order: 1; }
  #running:has(li) { order: 0; }
  #tiles { gap: 0 .4rem; }
  #tiles a { padding: .35rem .6rem; margin-top: .4rem; }
  #tiles b { font-size: 1.2rem; }
  #tiles .dim { display: none; }
  #trouble code { white-space: normal; flex-basis: 100%; overflow-wrap: anywhere; }
  #name { max-height: 4.5em; overflow: auto; }
  form { flex-basis: 10rem; }
  #q { padding: .2rem .4rem; font-size: max(1rem, 16px); }  /* or a phone zooms in */
  button, .button, #now :is(button, .button), summary { padding: .35rem .7rem; }
  :is(.parts, .lines, #running) a { display: inline-block; padding: .3rem 0; }
  #runs { flex-wrap: nowrap; overflow-x: auto; flex: none; padding-bottom: .3rem; }
  #runs a { white-space: nowrap; flex: none; max-width: none; }
}
/* Where there is little height the output comes before the command and the facts. */
@media (max-height: 32rem) {
  #job > :is(.box, dl) { order: 1; }
  #runs { flex-wrap: nowrap; overflow-x: auto; flex: none; padding-bottom: .3rem; }
  #runs a { white-space: nowrap; flex: none; }
}
@media (max-width: 28rem) {
  button span { position: absolute; left: -99rem; }  /* heard, not seen */
  #now li > .mono { grid-row: 2; grid-column: 1 / 4; }
  #now li > .dim { grid-row: 3; }
  #now li > .row { grid-column: 3; }
}
@media (forced-colors: active) {
  #verdict::before, .legend::before, rect { forced-color-adjust: none; }
  [aria-current] { outline: 2px solid; outline-offset: -3px; }
}
"""

# What the page shows is made by `make_page`, `chart_route` and `output_piece`. The script
# fetches them again and again, and lets what is shown become what came. It knows no
# state, no duration, no colour and no text of a job.
PAGE_SCRIPT = r"""
"use strict";
const find = id => document.getElementById(id);
const busy = more => document.body.classList.toggle("busy", (pending += more) > 0);
const parse = text => inZone(new DOMParser().parseFromString(text, "text/html"));
const SILENT = "The dashboard does not answer.";
let fetching, timer, isStopped, pending = 0, lastGood = performance.now(), toastTimer;
let chartAt = -1e9, chartEnded, kind, kindAt, kindTold;
let showing, steps = Promise.resolve(), answerTime = 0;
let textTold = find("q") && find("q").defaultValue;

/* Show times in the zone of the browser; in Swedish the date looks like that of ISO 8601. */
function inZone(page) {
  const local = time => time.toLocaleString("sv"), today = local(new Date()).slice(0, 11);
  for (const time of page.querySelectorAll("time")) {
    time.title = time.textContent;
    time.textContent = local(new Date(time.dateTime)).replace(today, "");
  }
  return page;
}

/* A line that was cut gives no error by itself. An action may take as long as it needs. */
async function get(url, options = {signal: AbortSignal.timeout(20000)}, onAnswer = () => {}) {
  const silent = () => { throw new Error(SILENT); };
  const answer = await fetch(url, options).catch(silent);
  onAnswer();  // what follows may take a while on a slow line
  const body = await answer.text().catch(silent);
  const policy = answer.headers.get("Content-Security-Policy");  // it has the server's token
  if (answer.ok && policy && !policy.includes("{{TOKEN}}")) location.reload();  // a later one's
  if (answer.ok) return body;
  throw Object.assign(new Error(JSON.parse(body).error), {isGone: answer.status === 410});
}

/* Let a node become another. Only what differs is changed: nothing flickers, scrolls or loses
   its selection. Nodes with a key stay the same ones when others come or go before them. */
function become(node, wanted) {
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
    return;
  }
  for (const {name} of [...node.attributes])
    if (!wanted.hasAttribute(name) && !["open", "aria-busy"].includes(name))
      node.removeAttribute(name);
  for (const {name, value} of wanted.attributes)
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  if (!node.hasAttribute("data-keep")) becomeChildren(node, wanted);
}

const key = node => node.dataset && (node.dataset.key || node.id);

function becomeChildren(node, wanted) {
  const children = [...wanted.childNodes], stays = new Set(children.map(key));
  for (const child of [...node.children])  // first, or all behind it would have to move
    if (key(child) && !stays.has(key(child))) child.remove();
  const named = new Map([...node.children].map(child => [key(child), child]));
  children.forEach((child, i) => {
    const there = node.childNodes[i];
    const known = key(child) ? named.get(key(child)) : there && !key(there) && there;
    if (!known || known.nodeName !== child.nodeName) return node.insertBefore(child, there || null);
    if (known !== there && known.contains(document.activeElement))
      while (node.childNodes[i] !== known) node.append(node.childNodes[i]);  // it keeps the focus
    else if (known !== there) node.insertBefore(known, there);
    become(known, child);
  });
  while (node.childNodes.length > children.length) node.lastChild.remove();
}

/* No row moves while somebody points at one or is at one by keyboard, or they would press
   another one. What left a list stays, pale. New rows wait, and those of the table are
   counted. But what needs somebody is shown at once, below the rest. */
function hold(page) {
  const lists = "tbody, #alerts, #runs-now", rows = "tr, li:not(:has(li))";
  for (const list of document.querySelectorAll(lists)) {
    const wanted = [...page.querySelectorAll(lists)].find(other => key(other) === key(list));
    if (!wanted || !list.matches(":hover, :has(:focus-visible)")) continue;
    const came = new Map([...wanted.querySelectorAll(rows)].map(row => [key(row), row]));
    const held = list.cloneNode(true);
    for (const row of held.querySelectorAll(rows)) {
      if (came.has(key(row))) row.replaceWith(came.get(key(row)));
      else row.classList.add("left");
      came.delete(key(row));
    }
    wanted.replaceWith(held);
    if (list.id === "alerts") held.append(...came.values());
    if (!list.id) Object.assign(page.querySelector("#new"),
      {hidden: !came.size, textContent: `Show ${came.size} new`});
  }
}

/* The page is fetched again and again. Only the latest answer counts: no other is waited for. */
async function refresh(isFree) {
  clearTimeout(timer);
  if (find("job") && !new URLSearchParams(location.search).get("job")) closePanel();
  if (fetching) fetching.abort();
  const mine = fetching = new AbortController(), opened = find("job") && find("job").dataset.key;
  setTimeout(() => mine.abort(), 20000);
  const asked = performance.now();  // it may hang
  const silent = setInterval(() => trouble(SILENT), Math.max(5000, 3 * answerTime));
  const isAnswered = () => {
    clearInterval(silent);
    answerTime = performance.now() - asked;
  };
  try {
    const came = parse(await get("/main" + location.search, {signal: mine.signal}, isAnswered)
      .finally(() => clearInterval(silent)));
    if (mine !== fetching) return;
    const focused = document.activeElement;
    cover(came.body);
    if (!isFree) hold(came.body);
    const used = document.querySelector(
      ":is(#tiles, .two > *, tbody):is(:hover, :has(:focus-visible))");
    const top = used && used.getBoundingClientRect().top;
    becomeChildren(find("page"), came.body);
    // What is above it may have grown.
    if (used && used.isConnected) scrollBy(0, used.getBoundingClientRect().top - top);
    document.title = came.title;
    if (isStopped) tellFrozen();
    const search = find("q");
    if (search && search !== focused) search.value = search.defaultValue;
    announce(search);
    moveFocus(opened, focused);
    lastGood = performance.now();
    trouble("");
    chart().catch(() => { chartAt = -1e9; });  // which may take a while: nobody waits for it
    await follow(find("output"));
  } catch (error) {
    if (mine === fetching) trouble(error.message, error.isGone);
  }
  if (mine !== fetching) return;
  if (!isStopped) timer = setTimeout(refresh, document.hidden ? 15000 : 2000);
}

/* What a search has found; and the verdict, to those who do not see its colour, once it has
   lasted. */
function announce(search) {
  if (search && search.value !== textTold && search.value === search.defaultValue) {
    find("told").textContent = "Jobs: " + find("total").textContent;
    textTold = search.value;
  }
  const now = find("now").dataset.kind;
  if (kind !== now) [kind, kindAt] = [now, performance.now()];
  kindTold ??= kind;
  if (kind === kindTold || performance.now() - kindAt < 10000) return;
  find("told").textContent = find("verdict").textContent;
  kindTold = kind;
}

const rowOf = id => id && document.querySelector(`tr[data-key="${CSS.escape(id)}"] a`);

/* At once: nobody may be kept in a panel by a server that is slow, or gone. */
function closePanel() {
  const {key: id} = find("job").dataset, row = rowOf(id);
  find("job").remove();
  for (const link of document.querySelectorAll("#page a")) {  // all others would open it again
    const address = new URL(link.href);
    if (link.textContent === id || address.searchParams.get("job") !== id) continue;
    for (const name of ["job", "run"]) address.searchParams.delete(name);
    link.href = address;
  }
  cover(find("page"));
  (row || find("verdict")).focus({preventScroll: true});
}

function moveFocus(opened, focused) {
  const job = find("job") && find("job").dataset.key;
  let target = focused.isConnected ? null : find("name") || find("verdict");
  if (job !== opened) target = job ? find(focused.id) || find("name") : rowOf(opened) || target;
  const row = job !== opened && opened && rowOf(job);
  if (row) row.closest("tr").scrollIntoView({block: "nearest"});
  if (target) target.focus({preventScroll: true});
}

/* What the panel covers can't be reached, by the Tab key either. */
const narrow = matchMedia("(max-width: 79.99rem)");
function cover(page) {
  const panel = page.querySelector("#job"), isCovered = narrow.matches && Boolean(panel);
  if (panel) [panel.role, panel.ariaModal] = isCovered ? ["dialog", "true"] : [null, null];
  for (const part of page.querySelectorAll("#queue, main > *")) part.inert = isCovered;
}

const sentence = words => words.slice(0, 1).toUpperCase() + words.slice(1);

function trouble(words, isGone) {
  const [alert, age] = find("trouble").children;
  const seconds = Math.round((performance.now() - lastGood) / 1000);
  if (alert.textContent !== sentence(words)) alert.textContent = sentence(words);
  find("start").hidden = words !== SILENT;
  find("anew").hidden = !isGone;
  age.textContent = (find("queue") ? `What is shown is ${seconds} s old. ` : "")
    + (isStopped ? "" : "This page tries again every 2 s.");
  const name = document.title.split(" – ").pop();
  if (words) document.title = sentence(words === SILENT ? "no answer" : words) + " – " + name;
  if (find("job"))  // below it, or the panel's Close would be covered
    find("job").style.top = words && narrow.matches
      ? find("trouble").getBoundingClientRect().bottom + "px" : "";
  if (words) for (const button of document.querySelectorAll("#page [data-post]"))
    button.setAttribute("aria-disabled", true);  // until the next refresh
}

/* Soon if runs have ended, or it would contradict the rest of the page. */
async function chart() {
  const ended = find("chart") && find("chart").dataset.ended;
  const age = performance.now() - chartAt;
  if (!ended || age < (ended === chartEnded ? 10000 : 2500)) return;
  [chartAt, chartEnded] = [performance.now(), ended];
  becomeChildren(find("chart"), parse(await get("/chart")).body);
}

/* Each piece of an output names the address of what follows it, which begins with its last
   line again while that has no end. */
async function follow(box) {
  const piece = box && box.lastElementChild, next = piece && piece.dataset.next;
  if (!next) return;
  const came = parse(await get(next)).body.firstChild, last = piece.querySelector("i");
  const old = last ? last.textContent : "";
  if (piece !== box.lastElementChild) return;
  if (came.dataset.next === next && came.textContent === old) return;
  const atEnd = isAtEnd(box);
  if (last) last.remove();
  box.append(came);
  while (box.childElementCount > 1 && box.textContent.length > 2e6) box.firstChild.remove();
  if (atEnd) toEnd();
}

function show() {
  busy(1);
  return showing = refresh().then(() => busy(-1));
}

/* An entry of the history knows the address before it, so that Close can go back there. */
function go(address, isStep) {
  const [plain, part = ""] = address.split("#");  // to go back to a part would take the focus
  const stays = isStep || new URL(plain, location).href === location.href;
  if (stays) history.replaceState(history.state, "", plain);
  else history.pushState(location.href, "", plain);
  show().then(() => {
    const why = find("trouble").firstElementChild.textContent;
    if (why) return say("not shown yet: " + why);
    if (!find(part)) return;
    bringIntoView(find(part));
    find(part).querySelector("h2").focus({preventScroll: true});
  });
}

function bringIntoView(part) {
  const {top} = part.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) part.scrollIntoView();
}

const isAtEnd = box => !box || box.scrollTop + box.clientHeight >= box.scrollHeight - 5;
function toEnd() { find("output").scrollTop = find("output").scrollHeight; }
document.addEventListener("scroll", () =>
  document.body.classList.toggle("scrolled", !isAtEnd(find("output"))), true);

/* Actions. */
function say(words) {
  find("said").textContent = sentence(words);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { find("said").textContent = ""; }, 6000);
}

function confirmed(question, words, css) {
  const box = find("sure");
  busy(-1);
  find("question").textContent = question;
  find("yes").textContent = words;
  find("yes").className = css || "primary";
  find("yes").hidden = !words;  // there is nothing to do
  find("no").textContent = words ? "No" : "Close";
  box.returnValue = "";
  box.showModal();
  return new Promise(resolve => {
    box.onclose = () => resolve(box.returnValue === "yes");
  }).finally(() => busy(1));
}

async function act({post, question, ask, do: words, done, css}) {
  if (question) {
    const answer = JSON.parse(await get(question));
    if (answer.none) return confirmed(answer.none);
    ask = answer.ask;
    post += (post.includes("?") ? "&until=" : "?until=") + answer.until;
  }
  if (ask && !await confirmed(ask, words, css)) return;
  // Whoever deletes the job in the panel goes on to the next one.
  const onward = find("job") && post.startsWith("/api/jobs/-/delete")
    && (find("next") || find("previous") || find("close"));
  const late = setInterval(() => say("no answer yet: it may still be carried out"), 20000);
  const changed = JSON.parse(
    await get(post, {method: "POST", headers: {"X-Token": "{{TOKEN}}"}})
      .finally(() => clearInterval(late)));
  const jobs = changed === 1 ? " job" : " jobs";
  if (onward) history.replaceState(history.state, "", onward.href);
  say(question ? done + " " + changed.toLocaleString("en") + jobs : done);
  await refresh(true);
}

/* Not by navigator.clipboard, which browsers have on https and on localhost alone. */
function copy(node) {
  getSelection().selectAllChildren(node);
  say(document.execCommand("copy") ? "Copied" : "Selected: copy it with Ctrl+C");
}

function press(button) {
  const {copy: copies, post} = button.dataset;
  if (copies !== undefined) return copy(find(copies) || button.previousElementSibling);
  if (button.id === "new") return refresh(true).then(() => document.querySelector("td a").focus());
  if (button.id === "end") return find("output").focus(toEnd());
  if (button.id === "stop") {
    isStopped = document.body.classList.toggle("stopped");
    button.firstChild.data = "Freeze";
    return isStopped ? tellFrozen(clearTimeout(timer)) : refresh();
  }
  if (button.matches("[aria-disabled], [aria-busy]")) return;
  if (!post) return find("sure").close(button.value);
  busy(1);
  button.setAttribute("aria-busy", true);
  act(button.dataset).catch(error => say(error.message)).then(() => {
    busy(-1);
    button.removeAttribute("aria-busy");
  });
}

/* Also if somebody opens another job while the rest is frozen. */
function tellFrozen() {
  const time = "Frozen at " + new Date().toLocaleTimeString("sv", {timeStyle: "short"});
  find("stop").firstChild.data = time + " · Unfreeze";
  if (!document.title.startsWith(time)) document.title = time + " – " + document.title;
}

const isPlain = event =>
  !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey);

document.onclick = event => {
  const {target} = event;
  const button = target.closest("button"), link = target.closest("a");
  const row = target.closest("tbody tr, #runs-now li");
  if (button) {
    if (event.detail < 2) press(button);  // the second click of two may meet another button
  } else if (link && isPlain(event) && !link.download) {
    event.preventDefault();
    if (link.id === "close" && link.href === history.state) return history.back();
    go(link.href, link.closest(".top nav"));
  } else if (row && !link && !String(getSelection())) {
    const {href} = row.querySelector("a");
    if (isPlain(event)) go(href);
    else if (event.ctrlKey || event.metaKey) window.open(href);
  } else if (narrow.matches && find("close") && !target.closest("#job, #sure, a"))
    find("close").click();
};

document.onsubmit = () => false;  // the search is fetched while it is typed
document.oninput = event => {
  const address = new URL(location.href), isStep = address.searchParams.has("q");
  address.searchParams.set("q", event.target.value);
  for (const name of ["before", "first", event.target.value ? "" : "q"])
    address.searchParams.delete(name);
  // Back leads to what was there before the search.
  if (isStep) history.replaceState(history.state, "", address);
  else history.pushState(null, "", address);
  clearTimeout(timer);
  timer = setTimeout(show, 200);
};

document.onkeydown = event => {
  if (event.target === find("q") || find("sure").open) return;
  const name = {Escape: "close", ArrowLeft: "previous", ArrowRight: "next"}[event.key];
  if (!name || !isPlain(event)) return;
  if (name === "close") {
    if (find(name)) find(name).click();
    else if (new URLSearchParams(location.search).get("job")) history.back();  // not shown yet
    return;
  }
  if (document.activeElement.closest("#runs, pre")) return;  // there they mean something else
  // A step goes on from the job that the one before it shows.
  steps = steps.then(() => {
    if (find(name)) find(name).click();
    return showing;
  });
};

window.onpopstate = () => {
  if (find("sure").open) find("sure").close("no");
  if (find("q")) find("q").value = new URLSearchParams(location.search).get("q") || "";
  show();
};
document.onvisibilitychange = () => isStopped || refresh(true);
narrow.onchange = () => cover(find("page"));
narrow.onchange();
document.body.classList.add("live");
if (find("output")) toEnd();
if (find("name")) find("name").focus();
else if (location.search && find("jobs")) bringIntoView(find("jobs"));
refresh();
"""

PAGE_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,\
<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>\
<rect width='16' height='16' rx='3' fill='%231a5fd0'/>\
<path stroke='white' stroke-width='2' d='M3 5h10M3 8h7M3 11h4'/></svg>">
{{TITLE}}
<style nonce="{{TOKEN}}">""" + PAGE_CSS + """</style>
</head>
<body>
<noscript><p class="card">Without JavaScript this page shows and searches, but it neither acts
nor refreshes itself.</p></noscript>
<section id="trouble" class="card" aria-label="Trouble">{{TROUBLE}}<p></p>\
<div id="start" class="row advice" hidden>It has ended, \
hangs, or the connection is down. To start it: {{START}}</div>\
<div id="anew" class="row advice" {{IF_GONE}}>Put the file back, or start a new queue: \
{{ANEW}}</div>\
</section>
<header class="row"><h1><svg class="logo" viewBox="0 0 16 16" aria-hidden="true">\
<path d="M2 4h12M2 8h8M2 12h11"/></svg>queuectl</h1></header>
<div id="page">{{CONTENT}}</div>
<p id="said" role="status"></p>
<p id="told" role="status" class="skip"></p>
<dialog id="sure" aria-labelledby="question">
<p id="question"></p>
<div class="row">
<button type="button" id="no" value="no"></button>
<button type="button" id="yes" value="yes"></button>
</div>
</dialog>
<script nonce="{{TOKEN}}">""" + PAGE_SCRIPT + """</script>
</body>
</html>
"""


# ======================================================================================
# Main: the parser and the exit code
# ======================================================================================


# The commands and groups, by what people want to do.
TOPICS = {
    "add": ["enqueue"],
    "watch": ["status", "list", "show", "logs", "wait", "stats", "dashboard"],
    "repair": ["edit", "cancel", "retry", "delete", "dlq", "backup"],
    "run": ["worker", "pause", "resume", "config", "selftest", "install",
            "completion"],
}
GROUPS = {"worker": "pools", "dlq": "the dead letter queue", "config": "settings"}


def overview():
    """Return the lines of the help of all commands, which fit on a terminal of 24."""
    lines = ["usage: %s COMMAND ...; also --db PATH, --json, --help" % PROGRAM]
    for topic, names in TOPICS.items():
        for name in names:
            verbs = [known.split()[1] for known in COMMANDS
                     if known.startswith(name + " ")]
            meaning = GROUPS[name] if verbs else COMMANDS[name].meaning
            lines.append("  %-7s %-11s %s" % (
                "" if name != names[0] else topic, name,
                ": ".join([meaning, ", ".join(verbs)]) if verbs else meaning))
    return lines + [
        "examples: {0} enqueue -- echo Hello; {0} worker start".format(PROGRAM)]


def group_overview(group):
    """Return the lines of the short help of the commands of a group."""
    chosen = {name: entry for name, entry in COMMANDS.items()
              if name.startswith(group + " ")}
    return [
        "usage: %s %s COMMAND ...; also --db PATH, --json, --help" % (PROGRAM, group),
        "",
        *("  %-14s %s" % (name, entry.meaning) for name, entry in chosen.items()),
        "", "examples:",
        *("  %s %s" % (PROGRAM, entry.example) for entry in chosen.values())]


# -- what may be meant by a line that is refused ---------------------------------------

# The commands that people mean by the words of other tools. A * stands for the words
# that follow; these are put in place of it, or at the end. Where two commands may be
# meant, both are named.
MEANT = {word: meant for meant, words in {
    "status": "ps, ps -a, ps aux, count, init, queues, workers, worker list, worker status",
    "status --watch": "top, watch",
    "list": "ls, jobs, job, queue, queue list, jobs list, job list, list all, list --all,"
            " list -a, ls -a",
    "list --match": "find *, search *, grep *",
    "show ID": "info, inspect, describe",
    "show": "info *, job *, inspect *, describe *, status *, list *, dlq show *,"
            " dlq list *",
    "show | config get": "get *",
    "logs": "log, cat, output, tail, dlq logs *",
    "logs -f": "follow *",
    "logs -f ID": "follow",
    "stats --since": "stats *",
    "wait": "wait all, wait --all",
    "enqueue": "add, submit, create, new, push, exec, run *, queue *",
    "edit": "update, change, modify",
    "edit * --delay 1d": "hold *, pause *",
    "edit * --run-at now": "resume *, release *",
    "edit * --run-at now | worker start --count": "start *",
    "pause": "hold, suspend, pause all, worker pause",
    "resume": "unpause, continue, resume all, worker resume",
    "cancel": "kill *, kill -9, stop *, abort *, dequeue *, cancel --force, cancel -f",
    "cancel --state pending --state failed --state processing":
        "cancel all, cancel --all, kill --all",
    "retry": "restart *, rerun, requeue, redo",
    "delete": "rm, remove, del, delete --force, delete -f, purge *, clear *, dlq rm,"
              " dlq delete *, dlq remove *, dlq clear *",
    "delete --state completed": "prune, clean, cleanup",
    "delete --state completed | dlq clear": "purge, clear",
    "delete --all": "reset, flush, empty, delete all, purge --all, clear --all",
    "dlq list": "dead, dlq show, dlq ls",
    "dlq retry": "dlq requeue, dlq restart",
    "dlq retry --all": "dlq retry all, dlq retry_all, retry all, retry --all",
    "dlq clear": "dlq delete, dlq flush, dlq empty, dlq clear all, dlq clear --all",
    "config show": "settings, config ls, config edit",
    "config set": "set",
    "config unset": "unset, config reset, config delete",
    "worker start": "start, run, up, worker run, start worker, start workers",
    "worker start --count": "worker start *",
    "worker start --detach": "daemon",
    "worker stop": "stop, down, stop worker, stop workers, worker stop all",
    "worker stop --now": "kill, worker kill",
    "worker stop | worker start": "restart, worker restart",
    "dashboard": "web, ui, serve",
    "dashboard --port": "dashboard *",
    "--version": "version",
    **{"list --state " + state: state for state in STATES if state != "dead"},
    **{"config get " + name: "config " + name for name in SETTINGS},
    **{"config set " + name: "config %s *" % name for name in SETTINGS},
}.items() for word in words.split(", ")}


class Misused(Exception):
    """What is wrong with the words after the name of a command."""


def did_you_mean(lines, of_known_jobs=False):
    """Return a hint that names those of the command lines that are right.

    OF_KNOWN_JOBS, a job that such a line names has to be there.
    """
    right = [usage(*line) for line in lines if is_right(line, of_known_jobs)]
    return right and "did you mean: " + ", or: ".join(right)


def is_right(line, of_known_jobs):
    """Tell whether a command line would be taken, or has only a command's name."""
    name, words = command_named(line)
    if name not in COMMANDS:
        return line == ["--version"]
    if not words:
        return True
    try:
        args = parsed_words(name, words)
        checked_fields(given_fields(args) if COMMANDS[name].takes_words else {})
        ids = jobs_named(name, args)
        if not of_known_jobs or not ids:
            return True
        with Queue(args.db, create=False) as queue:
            return all(queue.state(id) is not None for id in ids)
    except (Misused, QueueError, sqlite3.Error):
        return False


def jobs_named(name, args):
    """Return the ids among the arguments of a command."""
    values = [getattr(args, argument.names[0]) for argument in COMMANDS[name].arguments
              if argument.metavar == "ID" and not argument.names[0].startswith("-")]
    return [id for value in values
            for id in (value if isinstance(value, list) else [value])]


def lines_meant(name, rest, has_word):
    """Return the command lines that are meant by a command and the words after it.

    HAS_WORD tells whether one of these is no option.
    """
    known = [word for word in rest if "%s %s" % (name, word) in MEANT][:1]
    key = " ".join([name, *known])
    if has_word and not known and name + " *" in MEANT:
        key = name + " *"
    rest = [word for word in rest if word not in known]
    is_command = rest and rest[0][:1] not in ("-", "{", "[")
    rest = ["--"] * bool(MEANT.get(key) == "enqueue" and is_command) + rest
    meant = MEANT[key].split(" | ") if key in MEANT else ()
    return [[*before.split(), *rest, *behind.split()]
            for before, _, behind in (line.partition(" *") for line in meant)]


def unknown_command(name, rest):
    """Return the QueueError for the name of a command that there is not."""
    group = name.split()[0] + " "
    known = [each for each in COMMANDS if each.startswith(group)] or list(
        dict.fromkeys(each.split()[0] for each in COMMANDS))
    word = name.lower().replace("-", "_")  # max-retries
    hint = did_you_mean(lines_meant(word, rest, rest and rest[0][:1] != "-"))
    near = "" if word.startswith("un") else nearest(word, known)
    if near and not hint:  # `undelete` is the opposite of what is near it
        hint = did_you_mean([[*near.split(), *rest]])
    hint = hint or "there are: " + ", ".join(known)
    return QueueError("unknown command %s; %s", name, hint, code=2)


def refuse_mistaken(name, words):
    """Refuse words that a command would take for something else than was meant."""
    if name in ("retry", "dlq retry") and "--" in words:
        raise QueueError("%s: it takes no command; to change that of a job first: %s",
                         name, usage("edit", *words), code=2)
    setting = re.match("(--)?([^=]+)(=?)(.*)", words[0], re.S) if words else None
    if name == "config set" and setting and (setting[1] or setting[3]) and (
            setting[2] not in ("json", "db", "help")):
        raise QueueError("config set: did you mean: %s", usage(
            "config", "set", setting[2], *[setting[4]] * bool(setting[3]), *words[1:]),
            code=2)


def refuse_words_for_ids(name, args, queue):
    """Refuse `all` or states in place of ids, unless a job is called so."""
    ids, words = getattr(args, "ids", None) or [""], args.typed
    hint = did_you_mean(lines_meant(name, words, False)) if ids[0] == "all" else ""
    if any("--state" in each.names for each in COMMANDS[name].arguments):
        states = {id: MEANT_STATES.get(id, id) for id in ids}
        words = [each for word in words for each in (
            ["--state", states[word]] if states.get(word) in STATES else [word])]
    if words != args.typed:
        hint = did_you_mean([[*name.split(), *words]])
    if hint and queue.state(ids[0]) is None:
        raise QueueError("there is no job %s; %s", ids[0], hint, code=2)


# The options that people mean by the words of other tools.
MEANT_OPTIONS = {
    "--count": "-c -j -n -p -w --jobs --workers --concurrency --processes --parallel"
               " --num-workers --threads",
    "--limit": "-n -l --max --count --head",
    "--detach": "-d -b -D --background --bg --daemon --daemonize --detached",
    "--drain": "--burst --once --exit --until-empty",
    "--now": "-f --force --kill",
    "--quiet": "-q --silent", "--watch": "-w --follow", "--newest": "-r --reverse",
    "--max-retries": "-r --retry --retries --max-attempts --attempts --tries",
    "--timeout": "-t --time-limit",
    "--delay": "--in --countdown", "--run-at": "--at --eta",
    "--after": "--depends-on --depends --needs", "--id": "--name -i",
    "--port": "-p", "--file": "-f --input --from --from-file",
    "--command": "--cmd -c", "--cwd": "-C --dir --directory --workdir --chdir",
    "--state": "-s --status", "--match": "--filter --grep --search --query --name",
    "--since": "--within", "--error": "--error-text --reason",
    "--older-than": "--age --before --older", "--dry-run": "-n --simulate --dryrun",
}


def first_word(words, parser):
    """Return the place of the first word that is no option, and no value of one."""
    known = parser._option_string_actions
    is_value = False
    for at, word in enumerate(words):
        is_option = word.startswith("-")
        if not is_option and not is_value:
            return at
        if word == "--":
            break
        is_value = is_option and word in known and known[word].nargs != 0
    return len(words)


def option_meant(word, known):
    """Return the words that are meant by an option that is not KNOWN, or nothing."""
    from difflib import get_close_matches

    if "--state" in known and word[2:] in STATES:
        return ["--state", word[2:]]
    near = [name for name, words in MEANT_OPTIONS.items() if word in words.split()]
    near += get_close_matches(word.replace("_", "-"), known, 1, 0.8)
    near += [name for name in known if word[2:] and name.startswith(word)]
    return [name for name in near if name in known][:1]


class RefusedLine:
    """The words after a command's name that its parser has refused."""

    def __init__(self, name, words, parser):
        self.name, self.words, self.parser = name, words, parser
        self.known = parser._option_string_actions
        self.at = first_word(words, parser)
        self.word = "".join(words[self.at : self.at + 1])
        self.unknown = next(
            (word for word in words if word.startswith("-") and word != "--"
             and word.partition("=")[0] not in self.known), "")
        self.corrected = self.with_known_options()

    def hint(self):
        """Return what to type instead."""
        return next(filter(None, self.hints()))

    def hints(self):
        """Yield what may be meant, the likeliest first, and nothing for no idea."""
        yield self.quotes_hint()
        yield self.command_hint()
        yield self.filter_hint()
        for time_option in ("--run-at", "--delay"):  # --at 5m
            words = [re.sub("^--run-at(?![^=])", time_option, word)
                     for word in self.corrected or ()]
            yield words and did_you_mean([[*self.name.split(), *words]])
        yield self.other_tool_hint()
        has_word = self.word and not self.unknown
        yield did_you_mean(lines_meant(self.name, self.words, has_word), True)
        yield "see: " + self.line("--help")

    def line(self, *words):
        return usage(*self.name.split(), *words)

    def with_known_options(self):
        """Return the words with known options in place of others, or nothing."""
        end = self.words.index("--") if "--" in self.words else len(self.words)
        corrected = []
        for word in self.words[:end]:
            name, sign, value = word.partition("=")
            if sign and "--" + name in self.known:  # timeout=5m
                name = "--" + name
            meant = [name]
            if name.startswith("-") and name not in self.known:
                meant = option_meant(name, self.known)
            if not meant:
                return []
            meant[-1] += sign + value
            corrected += meant
        return corrected != self.words[:end] and corrected + self.words[end:]

    def quotes_hint(self):
        if any(word.startswith("'") for word in self.words):
            return "cmd takes '...' apart: write \"...\""

    def command_hint(self):
        """Return how to enqueue a command that stands without its `--`."""
        is_command = self.word[:1] not in ("", "{", "[") and "--" not in self.words
        if self.name == "enqueue" and is_command and not (self.at and self.corrected):
            words = [*self.words[: self.at], "--", *self.words[self.at :]]
            is_valid = is_right([self.name, *words], False)
            return is_valid and "to run a command: " + self.line(*words)

    def filter_hint(self):
        """Return how to list jobs by a number or a state that stands alone."""
        word = self.word.lower()
        name, value = "--state", MEANT_STATES.get(word, word)
        if self.word.isdecimal():
            name, value = "--limit", self.word
        is_filter = name == "--limit" or value in STATES
        if is_filter and name in self.known and not self.unknown:
            words = [*self.words[: self.at], name, value, *self.words[self.at + 1 :]]
            return did_you_mean([[*self.name.split(), *words]])

    def other_tool_hint(self):
        """Return what to do for an option that there is not."""
        if self.name == "logs" and re.match("-n|--tail|--lines", self.unknown):
            ids = [word for word in self.words if not re.match(r"-|\d+$", word)]
            count = re.search(r"(?m)^(?:-n?|--\w+=)?(\d+)$", "\n".join(self.words))
            return "to see the last lines: %s | tail%s" % (
                self.line(*ids or ["ID"]), " -n " + count[1] if count else "")
        if "ID" in self.parser.format_usage() and re.match("-[^-].", self.unknown):
            return "an id that begins with - stands behind a --"


def wrapped_usage(name, width):
    """Return the usage of a command that has its own, or where all would be too long.

    Argparse would not wrap it.
    """
    entry = COMMANDS[name]
    text = entry.usage
    if not text and width < 60:
        text = " ".join(["%(prog)s [OPTION]...", *(
            argument.metavar + "..." * (argument.options.get("nargs", "?") != "?")
            for argument in entry.arguments if argument.names[0][0] != "-")])
    longest = max(map(len, (text or "").split("\n"))) - len("%(prog)s")
    is_wide = text and len(PROGRAM + " " + name) + longest > width
    line = "\n  %(prog)s\n   "  # each below `usage:`
    return re.sub(r"\s*%\(prog\)s", line, text) if is_wide else text


# -- the command line ------------------------------------------------------------------


def make_parser(name):
    """Return the parser of one command; no other command's is built."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Misused(message)

    entry = COMMANDS[name]
    width = min(terminal_width(sys.stdout) or 80, 80) - 1
    parser = Parser(
        prog="%s %s" % (PROGRAM, name), usage=wrapped_usage(name, width),
        description="\n".join(wrapped(
            entry.meaning[0].upper() + entry.meaning[1:] + ".", width)),
        epilog="\n".join(wrapped("example: %s %s" % (PROGRAM, entry.example), width)),
        allow_abbrev=False,
        # To ask for the terminal's width, argparse imports modules for a fifth of the
        # whole time.
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, width=width),
    )
    for argument in [*entry.arguments, *EVERYWHERE]:
        parser.add_argument(*argument.names, **argument.options)
    return parser


def parsed_words(name, words):
    """Return the arguments of a command, or raise Misused."""
    parser = make_parser(name)
    takes_words = COMMANDS[name].takes_words and "--" in words
    end = words.index("--") if takes_words else len(words)
    # `parse_intermixed_args` would take words after a `--` for options.
    parse = parser.parse_args if "--" in words[:end] else parser.parse_intermixed_args
    args = parse(words[:end])
    args.typed = words
    args.words = words[end + 1 :]
    args.db = os.path.realpath(
        args.db or os.environ.get("QUEUECTL_DB") or "queuectl.db")
    return args


def parse_arguments(name, words):
    """Return the arguments of a command, or raise a QueueError with what is meant."""
    refuse_mistaken(name, words)
    try:
        return parsed_words(name, words)
    except Misused as error:
        hint = RefusedLine(name, words, make_parser(name)).hint()
        raise QueueError("%s: %s; %s", name, error, hint, code=2) from None


def run_command(argv):
    """Run one command line; return the exit code."""
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    name, words = command_named(argv)
    is_group = any(each.startswith(name + " ") for each in COMMANDS)
    if name and not is_group and name not in COMMANDS:
        raise unknown_command(name, words)
    if name not in COMMANDS:
        return show_help(name, words)
    entry = COMMANDS[name]
    args = parse_arguments(name, words)
    if not entry.must_print:
        sys.stdout = LenientOutput(sys.stdout)
    try:
        if entry.creates_queue and not os.path.exists(args.db):
            create_queue(args.db)
        if not entry.opens_queue:
            return entry.function(args) or 0
        with Queue(args.db, create=entry.creates_queue) as queue:
            refuse_words_for_ids(name, args, queue)
            return entry.function(args, queue) or 0
    except sqlite3.Error as error:
        raise QueueError("%s: %s", args.db, with_cause(error, args.db)) from None
    except QueueError as error:
        raise with_next_step(name, args, error) from None


def create_queue(path):
    """Create a queue; report that on a terminal, as the folder may be a wrong one."""
    with Queue(path):
        if sys.stderr.isatty():
            notice("created queue " + printable(path))


def show_help(group, words):
    """Print the version, or the help of a group or of all commands."""
    # Where a group is named, its queue may be named as well: `--db PATH worker`.
    stray = [word for word in words
             if not group or not re.match("--db$|--db=|--json$|[^-]", word)]
    if stray and not {"-h", "--help", "-V", "--version"} & set(words):
        hint = "see: " + usage("--help")
        if words == ["-v"]:
            hint = "did you mean --version?"
        words = " ".join([*group.split(), *words])
        raise QueueError("no command in: %s; %s", words, hint, code=2)
    if {"-V", "--version"} & set(words):
        print("queuectl " + __version__)
    else:
        print_lines(group_overview(group) if group else overview())
    return 0


def main(argv=None):
    """Run one command; return its exit code. An error is one line on standard error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the database would get its number
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # IDLE's has none, and needs none
            stream.reconfigure(errors="backslashreplace")
    stdout = sys.stdout
    try:
        if WINDOWS and sys.stderr.isatty():
            os.system("")  # lets a console of Windows 10 take escape sequences
        code = run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        if isinstance(sys.stdout, LenientOutput):
            sys.stdout.report()
        return code
    except QueueError as error:
        notice(error)
        return error.code
    except OSError as error:
        closed_pipe = {errno.EPIPE, errno.EINVAL} if WINDOWS else {errno.EPIPE}
        if error.errno in closed_pipe and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the exit would complain
            return 0
        unnamed = {errno.ENOENT: "this directory", errno.ENOSPC: "the disk"}
        path = str(error.filename or unnamed.get(error.errno, "system error"))
        hint = owner_hint(path) or ": %s" % (error.strerror or error)
        notice(printable(path) + hint)
        return 1
    except RecursionError:
        notice("the JSON is nested too deeply")
        return 2
    except KeyboardInterrupt:
        if terminal_width(sys.stderr):
            print(file=sys.stderr)  # the terminal has shown ^C
        return 130
    finally:
        sys.stdout = stdout


if __name__ == "__main__":
    exit_code = main()
    with contextlib.suppress(OSError, ValueError):  # after an error; that was reported
        sys.stdout.flush()
    os._exit(exit_code)  # Python's own end takes a tenth of a command's time
