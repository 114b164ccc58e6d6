"""Exceptions that C++ raises: of every loader (csrc/io/load_error.h), of a full engine (csrc/engine/request.h), and of
processes that hold a model together (csrc/distributed/communicator.h)."""


class LoadError(Exception):
    """A model file that cannot be used.

    Attributes:
        file: the path of the file.
        item: the tensor or field that is wrong; empty when the file as a whole is.
        reason: what is wrong with it.
    """

    def __init__(self, message: str, file: str, item: str, reason: str) -> None:
        super().__init__(message)
        self.file = file
        self.item = item
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.file, self.item, self.reason)


class QueueFull(RuntimeError):
    """The engine has as many requests as its option max_queue allows."""


class RankError(RuntimeError):
    """A process that holds a part of the model ended, failed or was silent for too long; the message names it. The
    model is of no more use.

    Attributes:
        rank: of that process.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.rank)
