"""The positive controls of the open port's rows (docs/robustness.md): a bug is planted, and the row's own test
must fail, at the assert that is about it. Another exception, or another assert, does not count.

Rows whose control stands beside them, as H1's, are in BESIDE.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.helpers import planted as bug
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served
from tests.robustness import test_load, test_wire
from tests.robustness import test_open_port as who
from tests.robustness import test_open_port_limits as much
from tests.robustness import test_open_port_values as what
from tests.server import test_forms

pytestmark = [pytest.mark.controls, pytest.mark.usefixtures("quick_disk")]
Patch = pytest.MonkeyPatch


class Stage:
    """What the rows' tests ask for by name, as pytest gives it them; servers are made when they are asked for,
    which is after the bug was planted."""

    def __init__(self, tmp_path: Path, monkeypatch: Patch, caplog: Any, stack: ExitStack) -> None:
        self.tmp_path, self.monkeypatch, self.caplog, self._stack = tmp_path, monkeypatch, caplog, stack

    def _served(self, **how: Any) -> Served:
        return self._stack.enter_context(served(FakeEngine(), self.tmp_path / "s", **how))

    @cached_property
    def port(self) -> Served:
        return self._served(keys=[*who.KEYS.values()])

    @cached_property
    def people(self) -> dict[str, httpx.Client]:
        clients = {name: self.port.client(headers={"X-API-Key": key}) for name, key in who.KEYS.items()}
        return {name: self._stack.enter_context(c) for name, c in clients.items()}

    @cached_property
    def client(self) -> httpx.Client:
        return self.people["ann"]

    @cached_property
    def small(self) -> Served:
        return self._served(limits=replace(much.SMALL, receive_s=1.0))

    @cached_property
    def server(self) -> Served:
        return self._served()

    @property
    def open_(self) -> Served:
        return self.server

    def fails(self, test: Callable[..., None], bound: dict[str, Any], words: str) -> None:
        """A row's test must fail, at an assert that has these words in its source or in what it says."""
        missing = [name for name in inspect.signature(test).parameters if name not in bound]
        arguments = {name: getattr(self, name) for name in missing}
        with pytest.raises(AssertionError) as e:
            test(**bound, **arguments)
        # Not traceback[-1].statement: it parses, and Python 3.11 fails when the log's thread parses beside it.
        last = traceback.extract_tb(e.tb)[-1]
        source = linecache.getlines(last.filename)[(last.lineno or 1) - 1 : last.end_lineno]
        text = f"{''.join(source)}\n{e.value}"
        assert words in text, f"It failed for another reason:\n{text}"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: Patch, caplog: Any) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(tmp_path, monkeypatch, caplog, stack)


# ---- the table ---------------------------------------------------------------------------------


class Control(NamedTuple):
    """The bug `plant` makes `test`, called with `bound`, fail where it has these words."""

    row: str
    plant: Callable[[Patch], None]
    test: Callable[..., None]
    words: str
    bound: dict[str, Any] = {}


H2, H4 = who.test_h02_what_is_anothers_is_not_there, who.test_h04_web_pages_cannot_reach_in
H6 = who.test_h06_the_server_tells_nothing_of_itself
H7, H8 = who.test_h07_interrupting_is_for_ones_own_jobs, who.test_h08_nothing_is_configured_over_http
H9, H10 = what.test_h09_too_much_is_refused_before_it_waits, what.test_h10_prompts_are_read_in_linear_time
H11 = what.test_h11_json_that_is_none
H12, H15 = much.test_h12_bodies_that_are_too_large, much.test_h15_served_bytes_are_an_image_and_nothing_else
H16, H18 = much.test_h16_every_answer_keeps_the_retry_contract, much.test_h18_one_client_cannot_fill_the_line
H17 = much.test_h17_logs_and_metrics_hold_nothing_of_anybody
H19, H20 = much.test_h19_when_to_come_back_is_computed_and_spread, much.test_h20_who_goes_away_cancels
DOOR = much.test_h19_every_call_that_waits_is_asked_at_the_door
OPENAI, NATIVE = {"path": "/v1/images/generations"}, {"path": "/api/paint"}
SAVE_TO = {"requests": {"override_settings": {"outdir_samples": "/"}}}
MANY = {**NATIVE, "body": {"n": 11}, "words": "at most 10 images"}
DEAR = {**NATIVE, "body": {"n": 10, "size": "2048", "steps": 50}, "words": "2097 megapixel-steps"}

CONTROLS = (
    Control("H2", bug.jobs_of_all, H2, "/api/jobs/{}"),
    Control("H2", bug.another_status_for_others, H2, "/api/jobs/{}"),
    Control("H2", bug.more_work_for_others, H2, "_apart("),
    Control("H2", bug.images_of_all, H2, "/api/results/{}"),
    Control("H2", bug.one_store_for_all, H2, "/api/concepts/sha256:{}"),
    Control("H2", bug.ended_jobs_of_all, H2, "[200, 404]"),
    Control("H4", bug.any_host, H4, "202 == 421", {"headers": {"Host": "evil.example"}, "status": 421}),
    Control("H4", bug.any_origin, H4, "202 == 403", {"headers": {"Origin": "null"}, "status": 403}),
    Control("H4", bug.any_type, H4, " == 415", {"headers": {"Content-Type": "text/plain"}, "status": 415}),
    Control("H4", bug.a_form_everywhere, test_forms.test_h04_a_form_reaches_uploads_alone, "/sdapi/v1/txt2img"),
    Control("H6", bug.flags_are_told, H6, "/sdapi/v1/cmd-flags"),
    Control("H6", bug.the_base_is_a_path, H6, "/sdapi/v1/options"),
    Control("H6", bug.uvicorn_says_its_name, H6, '"server" not in'),
    Control("H7", bug.interrupt_is_for_all, H7, '["bob"]', {"verb": "interrupt"}),
    Control("H7", bug.a_task_is_anybodys, H7, '["bob"]', {"verb": "skip"}),
    Control("H8", bug.settings_are_taken, H8, "200 == 422", SAVE_TO),
    Control("H8", bug.scripts_are_left_alone, H8, "200 == 422", {"requests": {"script_name": "x"}}),
    Control("H8", bug.settings_are_taken, who.test_h08_options_are_not_written, "200 == 422"),
    Control("H8", bug.saved_where_it_says, who.test_h08_options_are_not_written, "not place.exists()"),
    Control("H9", bug.no_limits, H9, "202 == 422", MANY),
    Control("H9", bug.no_cap_on_cost, H9, "202 == 422", DEAR),
    Control("H9", bug.refused_when_it_waits, H9, "== before", MANY),
    Control("H10", bug.each_tag_looks_at_all_before, H10, "8 * quarter", {"name": "tags"}),
    Control("H11", bug.nan_is_a_number, H11, '{"prompt": NaN}', NATIVE),
    Control("H11", bug.numbers_without_end, H11, '"guidance": 1e999', NATIVE),
    Control("H11", bug.the_last_of_two_keys, H11, '"prompt": "a", "prompt": "b"', NATIVE),
    Control("H11", bug.depth_without_end, H11, '"points": [[', NATIVE),
    Control("H11", bug.json_as_python_reads_it, H11, '{"prompt": NaN}', OPENAI),
    Control("H11", bug.truth_is_one, what.test_h11_values_of_another_type, "not response.is_success",
            {"body": {"prompt": "a", "n": True}}),
    Control("H12", bug.chunks_are_not_counted, H12, "assert response.status_code == 413\n"),
    Control("H12", bug.lengths_are_not_looked_at, H12, "answer.status == 413"),
    Control("H12", bug.forms_of_a_thousand, test_forms.test_h12_a_form_of_65_parts, '"too_many_parts") == ',
            {"path": "/api/recipe"}),
    Control("H15", bug.bytes_as_they_came, H15, 'b"<script" not in'),
    Control("H15", bug.no_nosniff, H15, '"x-content-type-options") == "nosniff"'),
    Control("H15", bug.no_sandbox, H15, '"content-security-policy") == '),
    Control("H15", bug.the_type_of_its_name, H15, '"application/octet-stream"'),
    Control("H16", bug.the_fault_is_told, much.test_h16_something_unexpected_is_told_by_its_reference,
            '"secret" not in', {"path": "/v1/models"}),
    Control("H16", bug.conflict, H16, "409"),
    Control("H16", bug.not_a_word_about_retrying, H16, '429 and int(response.headers.get("retry-after"'),
    Control("H16", bug.everything_may_be_tried_again, H16, '"x-should-retry") == "false"'),
    Control("H17", bug.requests_in_the_log, H17, "not in caplog.text"),
    Control("H18", bug.no_cap_for_one, H18, "16 <= len(taken) <= 17"),
    Control("H18", bug.first_come_first_served, H18, "for id_ in taken) <= 2"),
    Control("H19", bug.always_in_a_minute, H19, "len(set(waits)) > 3"),
    Control("H19", bug.soon_whatever_waits, H19, "10 < min(waits)"),
    Control("H19", bug.the_door_is_open, H19, "who reads the body first says 408"),
    Control("H19", bug.a_route_past_the_door, DOOR, "img2img"),
    Control("H20", bug.nobody_looks_who_is_there, H20, "its caller has left, and it goes on", OPENAI),
    Control("H20", bug.painted_to_the_end, H20, "the engine was not told to stop", OPENAI),
)  # fmt: skip


SECOND_NAME = {  # and H17's counters: test_audit's test_counters_that_do_not_agree
    "H1": who.test_h01_the_secret_is_read_where_somebody_may, "H3": who.test_h03_the_trap_works,
    "H5": who.test_h05_no_route_is_open, "H13": test_wire.test_h13_uvicorn_alone_waits_for_ever,
    "H14": much.test_h14_a_decoder_that_never_ends_is_ended,
    "H21": test_load.test_going_by_names_alone_is_found,
}  # fmt: skip


def test_every_row_has_a_control() -> None:
    assert {c.row for c in CONTROLS} | {*SECOND_NAME} == {f"H{k}" for k in range(1, 22)}


@pytest.mark.parametrize("control", CONTROLS, ids=[f"{c.row}-{c.plant.__name__}" for c in CONTROLS])
def test_a_planted_bug_is_found(stage: Stage, control: Control) -> None:
    control.plant(stage.monkeypatch)
    stage.fails(control.test, control.bound, control.words)


def test_another_failure_is_no_control(stage: Stage) -> None:
    """The control of the controls: what fails elsewhere, otherwise or not at all is not taken for the find."""

    def elsewhere() -> None:
        assert 1 + 1 == 3, "sums"

    def otherwise() -> None:
        raise KeyError("sums")

    with pytest.raises(AssertionError, match="for another reason"):
        stage.fails(elsewhere, {}, "products")
    with pytest.raises(KeyError):
        stage.fails(otherwise, {}, "sums")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        stage.fails(lambda: None, {}, "sums")
    stage.fails(elsewhere, {}, "sums")
