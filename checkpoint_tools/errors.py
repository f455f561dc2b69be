"""The one exception of this room for folders that cannot be converted."""


class ConversionError(ValueError):
    """A folder is damaged, incomplete or of another kind; says which file or tensor, and why."""
