"""The errors that kvgeom raises on purpose: each says what was asked, what was found, what to do."""


class KvgeomError(Exception):
    """Base of every error that kvgeom raises on purpose; its message is one line."""


class InputError(KvgeomError):
    """The user gave something that cannot be used: a path, a file, a number, a model."""


class ModelError(KvgeomError):
    """A model was loaded, but it lacks what is needed (a cache, a chat template, a module)."""


class DownloadError(KvgeomError):
    """Something that had to be fetched did not arrive, or is not what its hash says."""
