"""A watcher that keeps what it is told, for tests of the supervisor."""

from types import TracebackType
from typing import Self

from megatron_vl.run.folder import StageFolder
from megatron_vl.run.receipt import Receipt


class KeepingWatcher:
    """Keeps the lines said and the stages begun and ended."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def begin(self, stage: StageFolder, attempt: int) -> None:
        self.events.append(("begin", stage.name))

    def tick(self, stage: StageFolder) -> None:
        pass

    def end(self, stage: StageFolder, receipt: Receipt) -> None:
        self.events.append(("end", stage.name))

    def say(self, text: str) -> None:
        self.said.append(text)
