"""The exceptions that a user may read: a mistake of theirs, and a run that diverged."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, reported in one line: what is wrong, which field or file, and how to mend it.

    `launch/` prints it without a traceback and exits with code 2. Everything else that is raised
    is a defect of ours and keeps its traceback.
    """

    def __init__(self, what: str, *, field: str = "", hint: str = ""):
        self.what, self.field, self.hint = what, field, hint
        line = f"{field}: {what}" if field else what
        super().__init__(f"{line}. {hint}" if hint else line)


class Diverged(Exception):
    """A run stopped by its own policy (`core.stage.Divergence`); the message is one line.

    `launch/` prints it without a traceback and exits with code 3.
    """
