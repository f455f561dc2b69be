"""What a node cannot go on from."""


class NodeError(RuntimeError):
    """A node's command failed, or left what cannot be used; the message says which and why.

    Attributes:
        status: the command's exit status; None where no command's end is why.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class CertificateError(NodeError):
    """A release was made, and its certificate failed; the message names the checks."""


CERTIFICATE_FAILED = "certificate failed: "
"""How the message of a CertificateError begins, by which an ending is told (`launch/causes.py`)."""
