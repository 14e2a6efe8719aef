"""Define the research pipeline, a workflow of four EFFECT nodes.

    research -> validate -> summarize -> report

Each node depends on all nodes before it, and gets their recorded outputs. `crash_demo.py` starts the pipeline, and
`pipeline_worker.py` runs the nodes.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from nexum_engine.workflow import Workflow, workflow


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class PipelineInput(_Record):
    """The pipeline's input: the query that the report answers."""

    query: str = Field(min_length=1)


class Claim(_Record):
    """A statement with its evidence: a page, and a quote from that page."""

    statement: str
    url: str
    quote: str


class Research(_Record):
    """The output of `research`: claims, or a note that says why there are none."""

    claims: list[Claim]
    note: str = ""


class Source(_Record):
    """A page that `validate` has read, with the number by which the report cites it."""

    number: int
    url: str
    title: str


class ValidClaim(_Record):
    """A claim that `validate` kept: its quote is on the page and supports the statement."""

    statement: str
    quote: str
    source: int


class DroppedClaim(_Record):
    """A claim that `validate` dropped, with the reason. The report lists the claim but doesn't use it."""

    claim: Claim
    reason: str


class Validation(_Record):
    """The output of `validate`: the kept claims, their sources, and the dropped claims."""

    sources: list[Source]
    kept: list[ValidClaim]
    dropped: list[DroppedClaim]


class Summary(_Record):
    """The output of `summarize`: prose that cites sources by number, as in [1]."""

    text: str


class Report(_Record):
    """The output of `report`: the whole report, in Markdown."""

    markdown: str


def _pipeline(workflow_id: str) -> Workflow:
    """Build the pipeline with this workflow id.

    Pipelines with different ids have different version hashes. Workers poll by version hash, so a worker of one
    pipeline takes no steps of another pipeline.
    """
    return (
        workflow(workflow_id, input=PipelineInput)
        .effect("research", Research)
        .effect("validate", Validation)
        .effect("summarize", Summary)
        .effect("report", Report)
        .build()
    )


PIPELINE = _pipeline("research-pipeline")

# Keep offline pipelines in a separate workflow, so that a live run never gets an offline result.
OFFLINE_PIPELINE = _pipeline("research-pipeline-offline")

STEPS = tuple(node.node_id for node in PIPELINE.nodes)


def drill_version(pipeline: Workflow, drill: str | None) -> Workflow:
    """Return a version of the pipeline for one drill. Only workers of that drill take its steps.

    If `drill` is None, return the pipeline itself.
    """
    return pipeline if drill is None else _pipeline(f"{pipeline.workflow_id}-{drill}")
