"""The one exception of the config room: a stage file, override or recipe that cannot be used."""


class ConfigError(ValueError):
    """One or more problems with what the user wrote; `problems` holds one message each.

    All problems found together are reported together, so that a file is repaired in one go.
    """

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
