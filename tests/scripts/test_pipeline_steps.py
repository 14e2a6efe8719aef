"""The four steps: agents' replies are checked, and claims without proof are dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipelines import QUERY, RUST_PAGE, RUST_QUOTE, ScriptedModel, always, task

from nexum_engine.errors import FinalError
from pipeline_workflow import OFFLINE_PIPELINE, PIPELINE, STEPS, Claim, Research, Validation, drill_version
from support.models import ModelFailed
from support.offline.pipeline import pipeline_model
from support.offline.web import OfflineWeb
from support.pipeline.steps import PipelineSteps, StepFailed, citations, quote_is_missing
from support.tools import Page, SearchHit
from support.tools.web import WebError

TRUE = {"statement": "The Rust Foundation looks after Rust.", "url": RUST_PAGE, "quote": RUST_QUOTE}
FALSE = {**TRUE, "quote": "The Rust Foundation has looked after the language since 1921."}


def offline_steps() -> PipelineSteps:
    web = OfflineWeb()
    return PipelineSteps(web, lambda step: pipeline_model(step, web.topics))


def scripted(*replies: str | Exception) -> tuple[PipelineSteps, ScriptedModel]:
    model = ScriptedModel(*replies)
    return PipelineSteps(OfflineWeb(), always(model)), model


async def all_of(steps: PipelineSteps, query: str = QUERY) -> dict[str, Any]:
    """Run all four steps; return their outputs."""
    outputs: dict[str, Any] = {}
    for step, handler in steps.handlers().items():
        outputs[step] = json.loads((await handler(task(step, dict(outputs), query=query))).model_dump_json())
    return outputs


def validated(kept: int = 1) -> dict[str, object]:
    """Return what the steps summarize and report get from validate: one source, and `kept` equal claims."""
    return {
        "sources": [{"number": 1, "url": RUST_PAGE, "title": "Rust"}],
        "kept": [{"statement": "It is so.", "quote": RUST_QUOTE, "source": 1}] * kept,
        "dropped": [],
    }


class BrokenWeb(OfflineWeb):
    """A web on which every search and every fetch fails."""

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        raise WebError("the search is down")

    def fetch(self, url: str) -> Page:
        raise WebError("the page is down")


# ---- The workflow ----------------------------------------------------------------------------------------------------


def test_each_step_depends_on_all_before_it_and_live_and_offline_never_share_tasks() -> None:
    assert STEPS == ("research", "validate", "summarize", "report")
    assert [node.dependencies for node in PIPELINE.nodes] == [STEPS[:at] for at in range(4)]
    assert PIPELINE.ir_json == OFFLINE_PIPELINE.ir_json
    versions = [PIPELINE, OFFLINE_PIPELINE, drill_version(PIPELINE, "a"), drill_version(PIPELINE, "b")]
    versions.append(drill_version(OFFLINE_PIPELINE, "a"))
    assert len({one.version_hash for one in versions}) == len(versions)


# ---- Offline, from end to end ----------------------------------------------------------------------------------------


async def test_every_quote_of_the_report_is_on_its_cited_page() -> None:
    outputs = await all_of(offline_steps())
    research = Research.model_validate(outputs["research"])
    page = OfflineWeb().fetch(RUST_PAGE).body.decode()
    assert len(research.claims) == 3
    assert all(claim.url == RUST_PAGE and claim.quote in page for claim in research.claims)
    assert outputs["validate"]["dropped"] == []
    report = outputs["report"]["markdown"]
    assert report.startswith(f"# {QUERY}\n")
    assert report.endswith(f"## Sources\n\n1. Rust in systems programming. <{RUST_PAGE}>\n")
    assert all(f"{claim.statement} [1]" in report for claim in research.claims)


async def test_a_comparison_cites_a_page_for_each_side() -> None:
    outputs = await all_of(offline_steps(), "What is the population of Tokyo vs New York?")
    assert len(outputs["validate"]["sources"]) == 2
    assert citations(outputs["summarize"]["text"]) == {1, 2}


async def test_query_without_a_page_ends_in_a_report_that_says_so() -> None:
    outputs = await all_of(offline_steps(), "zebra husbandry")
    assert outputs["research"]["claims"] == []
    assert "No offline page covers this question" in outputs["report"]["markdown"]
    assert "Rust in systems programming" in outputs["report"]["markdown"]


async def test_numbers_in_brackets_on_a_page_are_not_taken_for_citations(tmp_path: Path) -> None:
    (tmp_path / "zorb.md").write_text("# Zorb engines\n\nThe zorb engine was built in 1987 by two sisters.[17]\n")
    web = OfflineWeb(tmp_path)
    steps = PipelineSteps(web, lambda step: pipeline_model(step, web.topics))
    outputs = await all_of(steps, "zorb engine")
    assert "two sisters. [1]" in json.dumps(outputs["report"])


# ---- Validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quote", "page", "missing"),
    [
        ("two words", "some two words here", ""),
        ("two words", "some two\n  words here", ""),
        ("  two\nwords ", "some two words here", ""),
        ("two words", "some Two words here", "the quote is not on the page"),
        ("two words", "some two, words here", "the quote is not on the page"),
        ("two words more", "some two words", "the quote is not on the page"),
        (" \n", "some two words", "it has no quote"),
    ],
)
def test_quote_must_match_verbatim_except_white_space(quote: str, page: str, missing: str) -> None:
    assert quote_is_missing(quote, page, "") == missing


async def test_false_quote_is_dropped_with_the_reason_and_true_one_kept() -> None:
    result = await offline_steps().validate(task("validate", {"research": {"claims": [FALSE, TRUE]}}))
    assert [claim.quote for claim in result.kept] == [RUST_QUOTE]
    assert [(one.claim.quote, one.reason) for one in result.dropped] == [
        (FALSE["quote"], "the quote is not on the page")
    ]
    assert [(source.number, source.url) for source in result.sources] == [(1, RUST_PAGE)]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://offline.example/no-such-page", "there is no such page"),
        ("ftp://offline.example/x", "only http:// and https://"),
        ("rust", "it has no scheme"),
    ],
)
async def test_a_claim_whose_page_cant_be_read_is_dropped_with_the_reason(url: str, reason: str) -> None:
    result = await offline_steps().validate(task("validate", {"research": {"claims": [{**TRUE, "url": url}]}}))
    assert result.kept == []
    assert reason in result.dropped[0].reason


async def test_page_that_is_down_fails_first_attempts_then_drops_its_claims() -> None:
    steps = PipelineSteps(BrokenWeb(), lambda step: pipeline_model(step))
    deps = {"research": {"claims": [TRUE]}}
    for attempt in (1, 2):
        with pytest.raises(StepFailed, match="the page is down"):
            await steps.validate(task("validate", deps, attempt=attempt))
    result = await steps.validate(task("validate", deps, attempt=3))
    assert "the page is down" in result.dropped[0].reason


async def test_quote_that_does_not_support_its_claim_is_dropped() -> None:
    claims = [TRUE, {**TRUE, "statement": "Rust was made by the Rust Foundation."}]
    verdicts = {
        "verdicts": [
            {"number": 2, "supported": False, "reason": "looking after is not making"},
            {"number": 1, "supported": True},
        ]
    }
    steps, model = scripted(json.dumps(verdicts))
    result = await steps.validate(task("validate", {"research": {"claims": claims}}))
    assert [claim.statement for claim in result.kept] == [TRUE["statement"]]
    assert result.dropped[0].reason == "the quote doesn't say what the claim says: looking after is not making"
    assert len(model.sent) == 1


async def test_dropped_claim_is_missing_in_summary_and_listed_in_report() -> None:
    steps = offline_steps()
    deps: dict[str, object] = {"research": {"claims": [FALSE]}}
    for step in STEPS[1:]:
        deps[step] = json.loads((await steps.handlers()[step](task(step, dict(deps)))).model_dump_json())
    report = json.dumps(deps["report"])
    assert "Validation kept no claim" in report
    assert "## Dropped by validation" in report
    assert "the quote is not on the page" in report
    assert "1921" not in json.dumps(deps["summarize"])


# ---- Wrong replies of a model ----------------------------------------------------------------------------------------


async def test_json_in_a_fence_is_read_and_equal_claims_count_once() -> None:
    steps, _ = scripted(f"Here it is:\n```json\n{json.dumps({'claims': [TRUE, TRUE]})}\n```")
    assert (await steps.research(task("research"))).claims == [Claim.model_validate(TRUE)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("I found nothing.", "it holds no JSON object"),
        ('{"claims": [{"statement": "x"}]}', "claims.0.url: Field required"),
        ("{not json}", "Invalid JSON"),
    ],
)
async def test_reply_of_wrong_form_is_requested_again_with_the_reason(wrong: str, told: str) -> None:
    steps, model = scripted(wrong, json.dumps({"claims": [TRUE]}))
    assert len((await steps.research(task("research"))).claims) == 1
    assert told in str(model.sent[1][-1].content)


async def test_two_unusable_replies_fail_the_attempt_and_another_may_succeed() -> None:
    steps, model = scripted("no", "no again")
    with pytest.raises(
        StepFailed, match="two replies of the model could not be used; the second: it holds no JSON object"
    ):
        await steps.research(task("research"))
    assert len(model.sent) == 2


@pytest.mark.parametrize(
    ("wrong", "told"), [("It is so. [7]", "it cites [7]"), ("It is so.", "it cites no source"), ("[1, 2]", "cites [2]")]
)
async def test_a_summary_cites_its_sources_and_no_others(wrong: str, told: str) -> None:
    steps, model = scripted(wrong, "It is so. [1]")
    result = await steps.summarize(task("summarize", {"research": {"claims": [TRUE]}, "validate": validated()}))
    assert result.text == "It is so. [1]"
    assert told in str(model.sent[1][-1].content)


async def test_missing_verdict_is_requested() -> None:
    steps, model = scripted('{"verdicts": []}', '{"verdicts": [{"number": 1, "supported": true}]}')
    result = await steps.validate(task("validate", {"research": {"claims": [TRUE]}}))
    assert len(result.kept) == 1
    assert "there is no verdict on claim 1" in str(model.sent[1][-1].content)


async def test_code_adds_the_sources_of_a_report() -> None:
    steps, _ = scripted("# Title\n\nText. [1]")
    deps = {"research": {"claims": [TRUE]}, "validate": validated(), "summarize": {"text": "Text. [1]"}}
    assert (await steps.report(task("report", deps))).markdown == (
        f"# Title\n\nText. [1]\n\n## Sources\n\n1. Rust. <{RUST_PAGE}>\n"
    )


async def test_no_model_is_called_without_claims() -> None:
    steps, model = scripted(RuntimeError("asked"))
    nothing = {"research": {"claims": []}, "validate": Validation(sources=[], kept=[], dropped=[]).model_dump()}
    assert (await steps.validate(task("validate", nothing))).kept == []
    summary = await steps.summarize(task("summarize", nothing))
    await steps.report(task("report", {**nothing, "summarize": summary.model_dump()}))
    assert model.sent == []


# ---- Errors of a model's server --------------------------------------------------------------------------------------


class Refused(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code


def failure(status: int) -> ModelFailed:
    error = ModelFailed("the model gave no usable answer")
    error.__cause__ = Refused(status)
    return error


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_wrong_key_or_model_is_a_final_failure(status: int) -> None:
    steps, _ = scripted(failure(status))
    with pytest.raises(FinalError, match="no usable answer"):
        await steps.research(task("research"))


@pytest.mark.parametrize("error", [failure(429), failure(500), ModelFailed("the connection broke")])
async def test_busy_or_absent_model_fails_only_the_attempt(error: ModelFailed) -> None:
    steps, _ = scripted(error)
    with pytest.raises(StepFailed) as failed:
        await steps.research(task("research"))
    assert not isinstance(failed.value, FinalError)


async def test_research_with_only_failed_tools_is_retried_not_recorded() -> None:
    steps = PipelineSteps(BrokenWeb(), lambda step: pipeline_model(step))
    with pytest.raises(StepFailed, match="its tools failed: web_search: the search is down"):
        await steps.research(task("research"))
