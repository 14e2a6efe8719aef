"""The research pipeline: four EFFECT nodes, as data. `pipeline_worker.py` binds the work, `crash_demo.py` starts it.

    research -> validate -> summarize -> report

Each node depends on all before it: what it gets is their recorded output.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from nexum_engine.workflow import Workflow, workflow


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class PipelineInput(_Record):
    """What to find out about."""

    query: str = Field(min_length=1)


class Claim(_Record):
    """A statement with its evidence: the page that says so, and the words in which it does."""

    statement: str
    url: str
    quote: str


class Research(_Record):
    """What the researcher found; without claims, why."""

    claims: list[Claim]
    note: str = ""


class Source(_Record):
    """A page that was read again, with the number under which the report cites it."""

    number: int
    url: str
    title: str


class ValidClaim(_Record):
    """A claim whose quote stands on its page."""

    statement: str
    quote: str
    source: int


class DroppedClaim(_Record):
    """A claim that nothing after `validate` may use."""

    claim: Claim
    reason: str


class Validation(_Record):
    """The claims that stand, their sources, and those that fell."""

    sources: list[Source]
    kept: list[ValidClaim]
    dropped: list[DroppedClaim]


class Summary(_Record):
    """Prose that cites sources by number, as in [1]."""

    text: str


class Report(_Record):
    """The whole report, in Markdown."""

    markdown: str


def _pipeline(workflow_id: str) -> Workflow:
    """Build the pipeline under an id. The version hash covers the id, and tasks are polled by that hash alone."""
    return (
        workflow(workflow_id, input=PipelineInput)
        .effect("research", Research)
        .effect("validate", Validation)
        .effect("summarize", Summary)
        .effect("report", Report)
        .build()
    )


PIPELINE = _pipeline("research-pipeline")

# A workflow of its own, so that an offline result is never served to a live run.
OFFLINE_PIPELINE = _pipeline("research-pipeline-offline")

STEPS = tuple(node.node_id for node in PIPELINE.nodes)


def drill_version(pipeline: Workflow, drill: str) -> Workflow:
    """The same pipeline as a version of its own, whose steps no worker takes but those of this drill."""
    return _pipeline(f"{pipeline.workflow_id}-{drill}")
