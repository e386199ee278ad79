"""Endlex: telemetry that lives in a local journal first.

    import endlex

    run = endlex.init("my-project", "d12", config={"depth": 12})
    run.log({"train/loss": loss}, step=step)
    run.save("checkpoints/step_100", step=100)
    run.finish()

`endlex.run` is the run that `init` returned last, and `endlex.log` and so on act on it. What is
on the disk can be read back: `read_run` yields a run's records, and `read_run_file` returns the id
and names of the run in a directory. `endlex.Api` reads the runs of a server.
"""

from typing import TYPE_CHECKING, Any

from endlex.client.directories import given_run_id, read_run_file
from endlex.client.run import Run, init, of_current
from endlex.protocol import EndlexError
from endlex.reading import read_run

if TYPE_CHECKING:
    from endlex.api import Api
    from endlex.client.environment import describe_environment

    run: Run | None
    __version__: str

__all__ = [
    "Api",
    "EndlexError",
    "Run",
    "alert",
    "describe_environment",
    "finish",
    "given_run_id",
    "init",
    "log",
    "log_file",
    "log_histogram",
    "log_image",
    "log_table",
    "log_text",
    "read_run",
    "read_run_file",
    "run",
    "save",
]

log = of_current(Run.log)
log_text = of_current(Run.log_text)
log_table = of_current(Run.log_table)
log_histogram = of_current(Run.log_histogram)
log_image = of_current(Run.log_image)
log_file = of_current(Run.log_file)
alert = of_current(Run.alert)
save = of_current(Run.save)
finish = of_current(Run.finish)
LATE = {"Api": "endlex.api", "describe_environment": "endlex.client.environment"}


def __getattr__(name: str) -> Any:
    if name == "run":
        return Run.current
    if name in LATE:  # what a trainer rarely needs: importing it takes long
        from importlib import import_module

        return getattr(import_module(LATE[name]), name)
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("endlex")
        except metadata.PackageNotFoundError:
            return "(not installed)"
    raise AttributeError(f"module 'endlex' has no attribute {name!r}")
