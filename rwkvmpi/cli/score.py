"""rwkvmpi score MODEL INPUT... -o RUN"""

from rwkvmpi.cli.options import task_command

command = task_command(
    "score",
    "Log-probability of every token of INPUT (files, folders, globs: .txt, .jsonl, .parquet, each also .gz or .zst) "
    "under MODEL, and bits per byte of every document. MODEL is a .pth or safetensors file, or 'bundled'.",
    [],
)
