"""The exceptions that a user may read: a mistake of theirs, a closed disk, a run that diverged."""

from __future__ import annotations

UNWRITABLE = 74  # exit code: something could not be written
SAVED = 75  # exit code: SIGTERM, what there was to save is; the same command continues
LOST = 76  # exit code: a host stalled or was lost; the same command continues the run


class UserError(Exception):
    """Bad input, reported in one line: what is wrong, which field or file, and how to mend it.

    `launch/` prints it without a traceback and exits with code 2. Everything else that is raised
    is a defect of ours and keeps its traceback.
    """

    def __init__(self, what: str, *, field: str = "", hint: str = ""):
        self.what, self.field, self.hint = what, field, hint
        line = f"{field}: {what}" if field else what
        super().__init__(f"{line}. {hint}" if hint else line)


class CannotWrite(UserError):
    """The disk is full or read-only, or a permission is missing. `launch/` exits with UNWRITABLE.

    Args:
      path: what could not be written; '' where nobody knows.
      reason: the system's words.
      safe: what is intact, in a sentence.
    """

    code = UNWRITABLE

    def __init__(self, path: str, reason: str, safe: str = ""):
        self.reason, self.safe = reason, safe
        hint = f"{safe or 'What was whole before is intact'}. Make room, or let it be written to"
        super().__init__(f"cannot be written ({reason})", field=path or "a file", hint=hint)


class Diverged(Exception):
    """A run stopped by its own policy (`core.stage.Divergence`); the message is one line.

    `launch/` prints it without a traceback and exits with code 3.
    """
