"""rwkvmpi read MODEL INPUT... -o RUN"""

from rwkvmpi.cli.options import task_command

command = task_command(
    "read",
    "The state of MODEL after the last token of every document of INPUT, for later questions.",
    [],
)
