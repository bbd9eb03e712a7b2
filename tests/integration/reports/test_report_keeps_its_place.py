"""The report in a real browser: a page that is drawn or loaded anew stays where its reader was."""

import json
import time
from dataclasses import replace
from pathlib import Path

from report_pages import DRAWN, NEEDS_BROWSER, ROWS, Open, search_list, set_field

from megatron_spear.report.write import ReportWriter
from megatron_spear.testing.recorded_runs import made_run
from megatron_spear.tracking.recorded_files import read_step, write_step

pytestmark = NEEDS_BROWSER


def test_an_open_page_follows_a_run_and_keeps_its_place(opened: Open, folder: Path) -> None:
    run = made_run(folder / "live", steps=3, ended=False)
    writer = ReportWriter([run], folder / "live.html", reload_s=2)
    writer.write()
    page = opened(folder / "live.html", "#tab=trajectories&won=true&sort=total")
    page.wait(ROWS)
    page.value("(f => { f.focus(); f.value = 'desk'; window.same = true; })"
               "(document.querySelector('#search'))")  # fmt: skip
    write_step(run / "trajectories", replace(read_step(run / "trajectories", 3), step=4))
    (run / "summary.json").write_text('{"steps": 4}')
    assert writer.write().ended
    time.sleep(2.5)
    assert page.value("window.same"), "nothing that is being filled in is lost"
    before = page.value("document.querySelector('#count').textContent")
    page.value(set_field("#search", "simple"))
    page.wait(f"!window.same && {DRAWN} && document.querySelector('#count')")
    assert page.value("document.querySelector('#count').textContent") != before
    assert page.value("location.hash") == "#tab=trajectories&won=true&sort=total&text=simple"
    assert page.value("document.activeElement.id") == "search", "a field with the focus goes along"
    assert page.value("document.querySelector('#live')") is None, "it has ended"


def test_a_reload_changes_nothing(opened: Open, report: Path) -> None:
    page = opened(report)

    def reload() -> None:
        page.value("window.same = true; location.reload()")
        page.wait(f"!window.same && {DRAWN}")

    chart = "document.querySelector('[data-chart=\"Reward by part\"]')"
    gap = "document.querySelector('[data-chart=\"Log-prob gap of engine and trainer\"]')"
    page.value(f"{chart}.querySelector('.key').click()")
    page.value(f"{gap}.querySelector('.small').click()")
    page.value(f"{gap}.querySelector('.small').focus()")
    reload()
    assert page.value(f"{chart}.querySelector('.key').ariaPressed") == "false"
    assert page.value(f"{chart}.querySelectorAll('[data-line]').length") == 3
    assert page.value(f"{gap}.querySelector('.small').ariaPressed") == "false"
    assert page.value(f"document.activeElement === {gap}.querySelector('.small')")
    page.click("#tab-trajectories")
    page.wait(ROWS)
    search_list(page, "desk 1")
    found = page.value("document.querySelector('#count').textContent")
    reload()
    page.wait("document.querySelector('#search-turns').disabled")
    assert page.value("document.querySelector('#count').textContent") == found
    page.value("window.same = true")
    page.go(report.resolve().as_uri())
    page.wait(f"!window.same && {DRAWN}")
    assert page.value("document.querySelectorAll('.key[aria-pressed=false]').length") == 0, (
        "opened anew, it begins anew"
    )


def test_the_focus_goes_on_where_it_was(opened: Open, report: Path) -> None:
    page = opened(report)
    focused = "(document.activeElement.id || document.activeElement.dataset.focus)"

    def press(selector: str, then: str) -> str:
        page.value(f"document.querySelector({json.dumps(selector)}).focus()")
        page.value("document.activeElement.click()")
        page.wait(then)
        found: str = page.value(focused)
        return found

    assert press("#theme", "location.hash.includes('theme=light')") == "theme"
    assert press("#tab-trajectories", ROWS) == "tab-trajectories"
    panel = "document.querySelector('[role=tabpanel]')"
    assert page.value(f"{panel}.getAttribute('aria-labelledby')") == "tab-trajectories"
    assert page.value("document.querySelector('#tab-replay').getAttribute('aria-controls')") == (
        page.value(f"{panel}.id")
    )
    labels = page.value("[...document.querySelectorAll('form .field span')].map((s) => "
                        "s.textContent)")  # fmt: skip
    assert len(labels) == len(set(labels)) and {"Step to", "Reward to"} <= set(labels)
    sort, order = "[data-focus='sort by total']", "document.querySelector('[aria-sort]').ariaSort"
    assert press(sort, "location.hash.includes('sort=total')") == "sort by total"
    assert page.value(order) == "descending"
    assert press(sort, "location.hash.includes('order=up')") == "sort by total"
    assert page.value(order) == "ascending"
    assert page.value("document.querySelectorAll('[aria-sort]').length") == 1
    below = ".pager:last-child [data-focus={}]"
    assert press(below.format("next"), "location.hash.includes('page=1')") == "next"
    assert page.value("document.activeElement.closest('.pager').matches(':last-child')")
    assert press(below.format("last"), "location.hash.includes('page=5')") == "previous", (
        "the last page has no next one"
    )
    assert press("a.open", "document.querySelector('#next, #previous')") == "view"
