"""Runs of a server, for programs and for the command line: lists, configuration, history, files.

    api = endlex.Api()                                  # ENDLEX_URL and the token, as always
    for run in api.runs("tag:baseline val/bpb < 0.9", sort="val/bpb"):
        print(run.name, run.config["depth"], run.summary["val/bpb"])
    frame = api.run("my-project/d12").history(["train/loss"])    # pandas, or polars
    api.run("my-project/d12").download("best", "checkpoints")

It only reads, unless made with `read_only=False`. The token travels in a header; no message holds
it.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

from endlex.client.directories import server_token, server_url
from endlex.client.transport import Refused, Transport, quoted
from endlex.protocol import CONSOLE, RUN_ID, EndlexError

PAGE = 200
LAST = "last"


class Api:
    """One server's runs.

    Args:
        url: its address; `ENDLEX_URL` if not given.
        token: `ENDLEX_TOKEN`, or the file `~/.config/endlex/token`, if not given.
        read_only: refuse to change anything on the server.

    Raises:
        EndlexError: no server is named, or the address or the token is not one.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, *, read_only: bool = True
    ) -> None:
        named = url or server_url()
        if named is None:
            raise EndlexError("no server is known: give --url or set ENDLEX_URL (http://HOST:8817)")
        self.transport = Transport(named, token or server_token())
        self.url, self.read_only = self.transport.url, read_only

    def runs(
        self,
        query: str = "",
        *,
        project: str | None = None,
        sort: str = "-created",
        archived: bool = False,
        limit: int | None = None,
    ) -> list[RunInfo]:
        """Return the runs that a search finds.

        Args:
            query: as in the dashboard and `endlex ls`.
            sort: `created`, `name`, a metric, `min:METRIC`, a configuration key; "-" in front for
                descending.
            limit: most runs to return; all if not given.

        Raises:
            EndlexError: the search is not one, or the server refuses or cannot be reached.
        """
        asked = {"q": query or None, "project": project, "sort": sort}
        asked["archived"] = "true" if archived else None
        found: list[RunInfo] = []
        while True:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = self.get("/runs", {**asked, "offset": len(found), "limit": size})
            found += [RunInfo(self, run) for run in page["runs"]]
            if not page["runs"] or len(found) >= min(page["total"], limit or page["total"]):
                return found

    def run(self, word: str) -> RunInfo:
        """Return a run by its id, its name, or project/name; a whole one, archived or not.

        Raises:
            EndlexError: there is none, or several have that name; the message lists their ids.
        """
        if RUN_ID.fullmatch(word):
            try:
                return RunInfo(self, self.get(quoted("runs", word)))
            except Refused as refusal:
                if refusal.status != 404:
                    raise
        try:
            named = self.runs() + self.runs(archived=True)
        except Refused as refusal:
            if refusal.status != 403:
                raise
            hint = "names are looked up with the scope read: give a run's id, or another token"
            raise EndlexError(f"{refusal}; {hint}") from refusal
        found = [run for run in named if word in (run.name, f"{run.project}/{run.name}", run.id)]
        if not found:
            raise EndlexError(f"{self.url} has no run {word!r}: `endlex ls` lists what is there")
        if len(found) > 1:
            listed = ", ".join(f"{run.id} ({run.project}/{run.name})" for run in found[:20])
            raise EndlexError(f"{word!r} is the name of {len(found)} runs: give an id of {listed}")
        return RunInfo(self, found[0].whole)

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        """Return what `GET path` answers; query values that are None are left out."""
        return self.send("GET", path, query=query)

    def send(
        self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None
    ) -> Any:
        """Send a request with a JSON body, and return what it answers.

        Raises:
            Retry: no answer, or one that says later.
            Refused: an answer that asking again will not change.
        """
        if self.read_only and method != "GET":
            raise EndlexError("this Api only reads: make it with endlex.Api(read_only=False)")
        given = {name: value for name, value in (query or {}).items() if value is not None}
        answer = self.transport.request(method, path, query=given, json_body=body)
        if answer.content is None:
            raise self.transport.ill_answer()
        return answer.content

    def download(self, path: str, file: IO[bytes]) -> None:
        """Write what `GET path` answers to a file; raises as `send`."""
        with self.transport.download(path) as blocks:
            file.writelines(blocks)


class RunInfo:
    """A run of a server; what a list leaves out is requested when it is needed."""

    def __init__(self, api: Api, content: dict[str, Any]) -> None:
        self._api, self._content = api, content
        self.id, self.name, self.project = content["run"], content["name"], content["project"]
        self.status, self.tags = content["status"], content["tags"]
        self.summary: dict[str, Any] = content["summary"]
        """Each metric's last value."""
        self.url = f"{api.url}/runs/{self.id}"
        """The run's page."""

    def __repr__(self) -> str:
        return f"<run {self.project}/{self.name} {self.id} {self.status}>"

    def __getitem__(self, key: str) -> Any:
        """Return one key of what `GET /runs/RUN` answers, such as "created" or "group"."""
        is_known = key in self._content and key != "config"
        return self._content[key] if is_known else self.whole[key]

    @property
    def whole(self) -> dict[str, Any]:
        """All that `GET /runs/RUN` answers."""
        if "sessions" not in self._content:
            self._content = self._api.get(quoted("runs", self.id))
        return self._content

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, whole."""
        return dict(self.whole["config"])

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Each metric's last, min, max, count and last_step, by name."""
        return {metric["name"]: metric for metric in self.whole["metrics"]}

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        """Name, step, state, bytes, aliases and metadata of each, by step."""
        return list(self.whole["checkpoints"])

    def history(
        self, metrics: Sequence[str] = (), *, frame: str | None = None, long: bool = False
    ) -> Any:
        """Return every point, none left out, as a frame with a row per step.

        Args:
            metrics: all if none is named.
            frame: "pandas" or "polars"; the one that is installed if not given.
            long: a row per point instead: metric, step, time, value.

        Raises:
            EndlexError: neither library is installed.
        """
        query = urlencode({"format": "csv", "metric": metrics}, doseq=True)
        content = io.BytesIO()
        self._api.download(f"{quoted('runs', self.id, 'export')}?{query}", content)
        content.seek(0)
        name, library = _frames(frame)
        if name == "pandas":
            words = {"keep_default_na": False, "na_values": {"value": ["NaN"]}}  # "null" is a name
            points = library.read_csv(content, dtype={"metric": str, "value": float}, **words)
            if long:
                return points
            wide = points.pivot(index="step", columns="metric", values="value")
            return wide.rename_axis(columns=None).reset_index()
        kinds = {"metric": library.String, "value": library.Float64}
        points = library.read_csv(content, schema_overrides=kinds)
        return points if long else points.pivot("metric", index="step", values="value").sort("step")

    def texts(
        self, name: str | None = None, limit: int = 100, before_step: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the latest texts, of one name if it is given: id, name, step, time, text.

        Endlex's own texts are returned only by name: run/environment, run/changes, run/exception.
        """
        query = {"name": name, "limit": limit, "before_step": before_step}
        return list(self._api.get(quoted("runs", self.id, "texts"), query)["texts"])

    def console(self) -> str:
        """Return what the run printed, as far as it was kept."""
        pieces: list[dict[str, Any]] = []
        while page := self.texts(CONSOLE, 1000, pieces[-1]["step"] if pieces else None):
            pieces += page
        return "\n".join(piece["text"] for piece in reversed(pieces))

    def download(self, which: str, directory: Path | str) -> list[Path]:
        """Download a checkpoint, verified, and return its files.

        Args:
            which: its name, a step, "last", "best" or another alias.
        """
        from endlex.client.transfers import pull_checkpoint

        chosen = choose_checkpoint(self.checkpoints, which, self.name)
        return pull_checkpoint(self.id, chosen["name"], Path(directory), self._api.transport)

    def update(self, **changes: Any) -> None:
        """Change name, tags, group, notes or archived; the `Api` must not be read-only."""
        self._content = self._api.send("PATCH", quoted("runs", self.id), changes)
        self.name, self.tags = self._content["name"], self._content["tags"]


def _frames(wanted: str | None) -> tuple[str, Any]:
    names = ("pandas", "polars") if wanted is None else (wanted,)
    if wanted not in (None, "pandas", "polars"):
        raise EndlexError(f"frame {wanted!r} must be pandas or polars")
    for name in names:
        with suppress(ModuleNotFoundError):
            return name, importlib.import_module(name)
    raise EndlexError(f"history needs {' or '.join(names)}: pip install {names[0]}")


def choose_checkpoint(
    checkpoints: Sequence[dict[str, Any]], which: str, run: str
) -> dict[str, Any]:
    """Return the published checkpoint that STEP, `last`, `best` or a name means.

    Raises:
        EndlexError: none is meant, or several of one step; the message lists what there is.
    """
    newest = [c for c in checkpoints if c["state"] == "published"]
    if not newest:
        waiting = ", ".join(f"{c['name']} is {c['state']}" for c in checkpoints)
        raise EndlexError(f"run {run} has no published checkpoint{waiting and f' ({waiting})'}")
    newest.sort(key=lambda c: (c["step"], c["created"]))
    named = [c for c in newest if c["name"] == which]
    aliased = [c for c in newest if which in (c.get("aliases") or ())]
    if latest := named or aliased or (newest if which == LAST else []):
        return latest[-1]
    listed = ", ".join(f"{c['name']} (step {c['step']:,})" for c in newest[-20:])
    at_step = [c for c in newest if which.isdecimal() and c["step"] == int(which)]
    if len(at_step) > 1:
        raise EndlexError(f"run {run} has several checkpoints of step {which}: {listed}")
    if not at_step:
        hint = "; no checkpoint has the alias best" if which == "best" else ""
        raise EndlexError(f"run {run} has no checkpoint {which!r}{hint}; there is {listed}")
    return at_step[0]
