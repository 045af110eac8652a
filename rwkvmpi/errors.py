"""The errors that the program tells apart. Everything else is a crash and keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can mend; shown as one sentence without traceback, exit code 2."""


class DocumentError(Exception):
    """One document cannot be read or decoded; it becomes a row with status failed and this sentence."""


class NumericalError(Exception):
    """NaN or Inf in a state or a logit; names the document, the chunk and the layer."""


class FabricError(Exception):
    """A neighbour or the way to it failed in the middle of a run; names both ranks, the port and the remedy. What was
    committed stands, so the exit code is that of a stopped run."""
