"""Errors that a user meets, the exit codes they become, and nothing else.

FtlaunchError          anything we raise on purpose
├── UserError          the user can mend it: exit code 2, shown without a traceback
└── JobError           the job failed: exit code 1, shown with its verdict
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
# EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on.
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class FtlaunchError(Exception):
    """Base of every error raised on purpose."""


class UserError(FtlaunchError):
    """A mistake in what was asked for.

    The message says, in this order: what is wrong, the value, the rule, what to do.
    """


class JobError(FtlaunchError):
    """A running job failed for a reason that is not the user's input."""
