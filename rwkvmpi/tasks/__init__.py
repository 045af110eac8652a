"""What happens with the last layer's output. A task knows documents and tensors, nothing of ranks or messages."""

from rwkvmpi.tasks.base import Recorder, Task, make_task

__all__ = ["Recorder", "Task", "make_task"]
