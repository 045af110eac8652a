"""The job: what to read, with which model, on which grid. TOML in, the resolved TOML out.

Every default is written back, so RUN/job.toml says everything that the run was told. Only a part of it decides
what the results are (`identity`); the rest (grid, commits, limits) may change between two starts of one job.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rwkvmpi.errors import UserError

DEFAULT_CHUNK = 1024
AUTO_CHUNK = 0  # until prepare or plan knows what was measured here
MIN_CHUNK = 256  # smaller ones read all weights from memory for little work
MAX_CHUNK = 65536
ROW_ALIGNMENT = 32


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelSection(_Section):
    """The model and the arithmetic: all of it is part of a result's identity."""

    path: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    tokenizer: str = "auto"
    chunk: int = DEFAULT_CHUNK

    @field_validator("chunk", mode="before")
    @classmethod
    def _chunk(cls, value: Any) -> int:
        if value == "auto":
            return AUTO_CHUNK
        try:
            size = int(value)
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} is neither a number nor 'auto'") from None
        if size % ROW_ALIGNMENT or not MIN_CHUNK <= size <= MAX_CHUNK:
            raise ValueError(f"{size} is not a multiple of {ROW_ALIGNMENT} between {MIN_CHUNK} and {MAX_CHUNK}")
        return size


class InputSection(_Section):
    """The documents: files, folders and globs, and the keys of records. from_run: the finished `read` run from whose
    states they go on. shard: "3/16" for the third of sixteen parts of them."""

    paths: list[str] = Field(default_factory=list)
    text_key: str = "text"
    id_key: str = "id"
    from_run: str = ""
    shard: str = ""

    @field_validator("shard")
    @classmethod
    def _shard(cls, value: str) -> str:
        parse_shard(value)
        return value


class TaskSection(_Section):
    """What happens with the last layer's output."""

    name: Literal["score", "embed", "read"] = "score"
    window: int = Field(default=0, ge=0)


class GridSection(_Section):
    """Stages x ring x replicas; 0 lets the planner choose from the world's size. How messages travel between ranks,
    whether they carry checksums, and how many seconds of a neighbour's silence are waited for."""

    stages: int = Field(default=0, ge=0)
    ring: int = Field(default=0, ge=0)
    replicas: int = Field(default=0, ge=0)
    transport: Literal["auto", "mpi", "verbs"] = "auto"
    checksum: Literal["auto", "on", "off"] = "auto"
    deadline: float = Field(default=300.0, ge=1.0)


class RunSection(_Section):
    """Commits, limits, what a bad document does to the job, and what can be seen of it while it runs."""

    commit_every: str = "60"
    max_time: str = ""
    on_error: Literal["record", "stop"] = "record"
    threads: int = Field(default=0, ge=0)
    telemetry: Literal["on", "files", "off"] = "on"
    trace: bool = False

    @field_validator("commit_every", mode="before")
    @classmethod
    def _commit_every(cls, value: Any) -> str:
        parse_commit_every(str(value))
        return str(value)


class Job(_Section):
    """One job, complete. `load` reads a TOML file, `to_toml` writes every value out."""

    model: ModelSection = Field(default_factory=ModelSection)
    input: InputSection = Field(default_factory=InputSection)
    task: TaskSection = Field(default_factory=TaskSection)
    grid: GridSection = Field(default_factory=GridSection)
    run: RunSection = Field(default_factory=RunSection)

    def to_toml(self) -> str:
        """The job as TOML text with every default written out."""
        return tomli_w.dumps(self.model_dump())


def parse_commit_every(text: str) -> tuple[float, int]:
    """'60', '60s', '10m' -> (seconds, 0); '500 chunks' or '500c' -> (inf, chunks). ValueError says what is allowed."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(s|m|c|chunks?)?\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is neither seconds ('60', '10m') nor chunks ('500c')")
    number, unit = float(match[1]), match[2] or "s"
    if unit.startswith("c"):
        if number != int(number):
            raise ValueError(f"{text!r}: a number of chunks is whole")
        return float("inf"), int(number)
    return number * (60 if unit == "m" else 1), 0


def parse_shard(text: str) -> tuple[int, int]:
    """'3/16' -> (3, 16), the third of sixteen parts; '' -> (1, 1), everything. ValueError says what is allowed."""
    if not text:
        return 1, 1
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is no part of a whole: write i/n with i from 1 to n, for instance 3/16")
    return int(match[1]), int(match[2])


def explain(error: ValidationError, where: str) -> UserError:
    """One sentence for the first thing that pydantic found wrong, naming the key, the value and what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(f"{where}: unknown key {key!r}; the keys are listed in jobs/README.md")
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{where}: {key} = {first.get('input')!r}: {message}")


def load_job(path: Path) -> dict[str, Any]:
    """The TOML file as plain values; UserError names the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a job file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def override(values: dict[str, Any], settings: tuple[str, ...]) -> None:
    """Apply `--set section.key=value`; the value is read as TOML, or as a bare string where it is none."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise UserError(f"--set {setting}: write it as section.key=value, for instance grid.ring=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = values.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {setting}: {section} is not a section of the job")
        table[name] = value


def make_job(values: dict[str, Any], where: str) -> Job:
    """Validate plain values into a Job; UserError with one sentence where something is wrong."""
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        raise explain(error, where) from None
    if not job.model.path:
        raise UserError(f"{where}: model.path is missing; name a model file, or 'bundled' for the one that comes along")
    if not job.input.paths:
        raise UserError(f"{where}: input.paths is missing; name the documents to read")
    if job.task.window and job.task.name != "embed":
        raise UserError(f"{where}: task.window belongs to the task embed, not to {job.task.name}")
    return job
