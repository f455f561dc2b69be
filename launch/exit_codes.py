"""What each exit code of `mvl` means; `docs/exit_codes.md` holds the same table.

The codes are for scripts and people. Nothing inside starts or stops on their strength: a stage
starts because its parent's receipt says done.
"""

OK = 0
ERROR = 1
USAGE = 2
FAILED = 3
HELD = 4
INCOMPLETE = 5
BUSY = 6
FOUND = 7
INTERRUPTED = 130

MEANINGS = {
    OK: "Done: the command did what was asked; for `submit --follow`, every stage is done.",
    ERROR: "A defect of this program; the traceback says where.",
    USAGE: "The command line, a stage file, an override or a run folder cannot be used as it is.",
    FAILED: "A stage failed; its receipt and `mvl logs` say why.",
    HELD: "A stage must not start: its parent is not done or has changed, or a gate held it.",
    INCOMPLETE: "A stage was stopped before its last step; submit the run again to go on.",
    BUSY: "Another `mvl submit` is running this run.",
    FOUND: "A check ran to its end and found something; its output names what.",
    INTERRUPTED: "Stopped by Ctrl-C or SIGTERM; all processes of the run were stopped too.",
}

BY_STATUS = {"done": OK, "failed": FAILED, "held": HELD, "incomplete": INCOMPLETE}
"""The exit code for the status of a receipt."""
