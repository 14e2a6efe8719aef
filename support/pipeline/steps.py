"""Do the work of the pipeline's four steps. Each step asks an AutoGen agent and checks the agent's reply.

A quote must be on its page, and a citation must have a source. If a reply can't be used, the step asks once more. If
the second reply can't be used either, the attempt fails. Import this module only when needed: it imports AutoGen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine.errors import FinalError, NexumError
from nexum_engine.worker import Handler, TaskContext
from pipeline_workflow import (
    Claim,
    DroppedClaim,
    PipelineInput,
    Report,
    Research,
    Source,
    Summary,
    Validation,
    ValidClaim,
)
from support.models import ModelFailed
from support.pipeline.step_tool import StepTool
from support.tools import TOOLS, ToolContext, Web
from support.tools.clean_text import one_line
from support.tools.web.page import heading

MAX_TOOL_ROUNDS = 12
MAX_CLAIMS = 12
MAX_TITLE = 200  # characters
# If a page can't be read but a retry may succeed, attempts 1 to EAGER_ATTEMPTS fail. Later attempts drop the page's
# claims instead.
EAGER_ATTEMPTS = 2
_FINAL_STATUSES = (400, 401, 403, 404, 422)  # HTTP statuses for a wrong key, model or request
_CITATION = re.compile(r"\[(\d+(?:\s*,\s*\d+)*)\]")

RESEARCHER = f"""You are a researcher. Search with web_search, read the promising pages with visit_webpage, and collect
claims that answer the user's query, at most {MAX_CLAIMS}, from more than one page where you can. For each give the
statement in your own words, the url of the page that you read, and a quote from it that proves the statement: one
sentence, copied character for character, because every quote is looked up on its page and dropped if it isn't there.
When you have read enough, reply with JSON alone:
{{"claims": [{{"statement": "...", "url": "https://...", "quote": "..."}}], "note": ""}}
If you found nothing, reply with no claims and say why in note."""

VALIDATOR = """You check evidence. The user sends JSON with numbered claims, each with a statement and a quote. Judge
for each whether the quote alone says what the statement says. Reply with JSON alone, with every number once:
{"verdicts": [{"number": 1, "supported": true, "reason": ""}]}
Where supported is false, give the reason in a few words."""

SUMMARIZER = """You summarize evidence. The user sends JSON with a query and claims, each with a statement, a quote and
the number of its source. Answer the query in one to three paragraphs of prose from these claims alone, and cite the
source of each sentence by its number in square brackets, as in [1]. Reply with the prose alone."""

REPORTER = """You write reports in Markdown. The user sends JSON with a query, a summary with citations like [1], and
the numbered sources. Reply with the report alone: a first line "# " with a title, then the summary's content, in
sections if it is long. Keep the citations, add no facts, and write no list of sources: it is added to your text."""

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class StepFailed(NexumError, RuntimeError):
    """The attempt at a step failed; a retry may succeed."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Verdict(_Strict):
    number: int
    supported: bool
    reason: str = ""


class _Verdicts(_Strict):
    verdicts: list[_Verdict]


class PipelineSteps:
    """The four steps. They read pages from `web`; `model_for` makes the model client of a step's agent."""

    def __init__(self, web: Web, model_for: Callable[[str], ChatCompletionClient]) -> None:
        self._web = web
        self._model_for = model_for

    def handlers(self) -> dict[str, Handler]:
        """Return the handler of each node."""
        return {
            "research": self.research,
            "validate": self.validate,
            "summarize": self.summarize,
            "report": self.report,
        }

    async def research(self, task: TaskContext) -> Research:
        """Collect claims from the web. Each claim has a page and a quote from that page."""
        query = PipelineInput.model_validate(task.input).query
        failures: list[str] = []
        tools = [StepTool(tool, self._context(task), failures) for tool in TOOLS.values()]
        found = await self._ask("research", RESEARCHER, query, partial(_parsed, form=Research), tools)
        if not found.claims and failures:
            raise StepFailed(f"research has no claims, because its tools failed: {failures[0]}")
        return Research(claims=list(dict.fromkeys(found.claims))[:MAX_CLAIMS], note=found.note.strip())

    async def validate(self, task: TaskContext) -> Validation:
        """Read every page again. Keep each claim whose quote is on the page and supports the statement."""
        claims = Research.model_validate(task.deps["research"]).claims
        pages = {url: await self._read(url, task) for url in dict.fromkeys(claim.url for claim in claims)}
        dropped: list[DroppedClaim] = []
        standing: list[Claim] = []
        for claim in claims:
            reason = quote_is_missing(claim.quote, *pages[claim.url])
            if reason:
                dropped.append(DroppedClaim(claim=claim, reason=reason))
            else:
                standing.append(claim)
        supported: list[Claim] = []
        for claim, verdict in zip(standing, await self._verdicts(standing), strict=True):
            if verdict.supported:
                supported.append(claim)
            else:
                why = one_line(verdict.reason, MAX_TITLE) or "no reason given"
                dropped.append(DroppedClaim(claim=claim, reason=f"the quote doesn't say what the claim says: {why}"))
        sources = [
            Source(number=number, url=url, title=one_line(heading(pages[url][0]), MAX_TITLE) or url)
            for number, url in enumerate(dict.fromkeys(claim.url for claim in supported), 1)
        ]
        numbers = {source.url: source.number for source in sources}
        kept = [
            ValidClaim(statement=claim.statement, quote=claim.quote, source=numbers[claim.url]) for claim in supported
        ]
        return Validation(sources=sources, kept=kept, dropped=dropped)

    async def summarize(self, task: TaskContext) -> Summary:
        """Write prose from the claims that `validate` kept."""
        query = PipelineInput.model_validate(task.input).query
        validation = Validation.model_validate(task.deps["validate"])
        if not validation.kept:
            return Summary(text=_nothing_stands(task))
        asked = {"query": query, "claims": [claim.model_dump() for claim in validation.kept]}
        return Summary(text=await self._ask("summarize", SUMMARIZER, _json(asked), _citing(validation.sources)))

    async def report(self, task: TaskContext) -> Report:
        """Write the report, and add the numbered sources and the dropped claims."""
        query = PipelineInput.model_validate(task.input).query
        validation = Validation.model_validate(task.deps["validate"])
        summary = Summary.model_validate(task.deps["summarize"]).text
        if validation.kept:
            asked = {
                "query": query,
                "summary": summary,
                "sources": [source.model_dump() for source in validation.sources],
            }
            body = await self._ask("report", REPORTER, _json(asked), _citing(validation.sources))
        else:
            body = f"# {one_line(query, MAX_TITLE)}\n\n{summary}"
        return Report(markdown="\n\n".join([body, *_appendix(validation)]) + "\n")

    # ---- Agents ------------------------------------------------------------------------------------------------------

    async def _ask(
        self,
        step: str,
        system_message: str,
        task: str,
        parse: Callable[[str], T],
        tools: Sequence[BaseTool[Any, Any]] = (),
    ) -> T:
        """Return the parsed reply of the step's agent. If the reply can't be parsed, ask once more.

        Raises FinalError for a failure of the model that a retry can't fix, and StepFailed if a retry may succeed.
        """
        model = self._model_for(step)
        agent = AssistantAgent(
            name=f"{step}_agent",
            model_client=model,
            tools=list(tools),
            system_message=system_message,
            max_tool_iterations=MAX_TOOL_ROUNDS,
        )
        try:
            try:
                return parse(await _reply(agent, task))
            except ValueError as problem:
                again = f"That reply can't be used: {_problem(problem)}. Reply again, in the required form."
                return parse(await _reply(agent, again))
        except ModelFailed as error:
            if getattr(error.__cause__, "status_code", None) in _FINAL_STATUSES:
                raise FinalError(str(error)) from error
            raise StepFailed(str(error)) from error
        except ValueError as problem:
            raise StepFailed(
                f"{step}: two replies of the model could not be used; the second: {_problem(problem)}"
            ) from problem
        finally:
            await model.close()

    async def _verdicts(self, claims: Sequence[Claim]) -> list[_Verdict]:
        if not claims:
            return []
        asked = [
            {"number": number, "statement": claim.statement, "quote": claim.quote}
            for number, claim in enumerate(claims, 1)
        ]

        def parse(reply: str) -> list[_Verdict]:
            verdicts = {verdict.number: verdict for verdict in _parsed(reply, _Verdicts).verdicts}
            missing = [number for number in range(1, len(claims) + 1) if number not in verdicts]
            if missing:
                raise ValueError(f"there is no verdict on claim {', '.join(map(str, missing))}")
            return [verdicts[number] for number in range(1, len(claims) + 1)]

        return await self._ask("validate", VALIDATOR, _json({"claims": asked}), parse)

    # ---- The web -----------------------------------------------------------------------------------------------------

    async def _read(self, url: str, task: TaskContext) -> tuple[str, str]:
        """Return the page's text and "". If the page can't be read, return "" and the reason.

        In the first EAGER_ATTEMPTS attempts, raise StepFailed instead if a retry may be able to read the page.
        """
        try:
            return await TOOLS["visit_webpage"].run({"url": url}, self._context(task)), ""
        except Exception as error:
            if task.attempt <= EAGER_ATTEMPTS and not isinstance(error, FinalError):
                raise StepFailed(f"validate: {error}") from error
            return "", str(error)

    def _context(self, task: TaskContext) -> ToolContext:
        return ToolContext(idempotency_key=task.idempotency_key, attempt=task.attempt, web=self._web)


def quote_is_missing(quote: str, page: str, unreadable: str) -> str:
    """Return why a quote is not on its page, or "" if it is there. Each stretch of white space counts as one space."""
    if unreadable:
        return f"its page can't be read again: {one_line(unreadable, MAX_TITLE)}"
    wanted = " ".join(quote.split())
    if not wanted:
        return "it has no quote"
    return "" if wanted in " ".join(page.split()) else "the quote is not on the page"


async def _reply(agent: AssistantAgent, task: str) -> str:
    """Run the agent and return its last message. Raises ValueError if that message holds no text."""
    result = await agent.run(task=task)
    last = result.messages[-1]
    if not isinstance(last, TextMessage) or last.source != agent.name or not last.content.strip():
        raise ValueError("it is empty, or it asks for more tools than it may use")
    return last.content.strip()


def _problem(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place + ': ' if place else ''}{first['msg']}"
    return str(error)


def _parsed(reply: str, form: type[Model]) -> Model:
    """Return the JSON object in a reply, without the fence or the sentence that models often put around the object."""
    start, end = reply.find("{"), reply.rfind("}")
    if start < 0 or end < start:
        raise ValueError("it holds no JSON object")
    return form.model_validate_json(reply[start : end + 1])


def _citing(sources: Sequence[Source]) -> Callable[[str], str]:
    """Return a function that checks prose. The prose must cite at least one source, and only sources that exist."""
    known = {source.number for source in sources}

    def check(reply: str) -> str:
        unknown = sorted(citations(reply) - known)
        if unknown:
            raise ValueError(f"it cites [{unknown[0]}], but the sources are numbered 1 to {len(sources)}")
        if not citations(reply):
            raise ValueError("it cites no source: put the source's number behind each sentence, as in [1]")
        return reply

    return check


def citations(text: str) -> set[int]:
    """Return the source numbers that a text cites, as in [1] or [1, 2]."""
    return {int(number) for match in _CITATION.finditer(text) for number in match[1].split(",")}


def _nothing_stands(task: TaskContext) -> str:
    research = Research.model_validate(task.deps["research"])
    if research.claims:
        return "Validation kept no claim, so there is nothing to report."
    return research.note or "The research found no claims, so there is nothing to report."


def _appendix(validation: Validation) -> list[str]:
    """Return the lists of sources and of dropped claims, in Markdown. No model writes them."""
    parts: list[str] = []
    if validation.sources:
        listed = [f"{source.number}. {source.title}. <{source.url}>" for source in validation.sources]
        parts.append("\n".join(["## Sources", "", *listed]))
    if validation.dropped:
        dropped = [
            f"- {one_line(one.claim.statement, MAX_TITLE)} ({one.claim.url}): {one.reason}"
            for one in validation.dropped
        ]
        parts.append("\n".join(["## Dropped by validation", "", *dropped]))
    return parts


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
