"""UserError: the one exception that a user may read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line: what is wrong, which field or file, and how to mend it.

    `launch/` prints it without a traceback and exits with code 2. Everything else that is raised
    is a defect of ours and keeps its traceback.
    """

    def __init__(self, what: str, *, field: str = "", mend: str = ""):
        self.what, self.field, self.mend = what, field, mend
        line = f"{field}: {what}" if field else what
        super().__init__(f"{line}. {mend}" if mend else line)
