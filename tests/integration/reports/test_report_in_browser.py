"""The report in a real browser: what is drawn, what can be clicked, what cannot do harm."""

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_pages import DRAWN, NEEDS_BROWSER, ROWS, Open, search_list, set_field

from megatron_spear.report.write import ReportWriter
from megatron_spear.testing.browser import Browser, Page
from megatron_spear.testing.hostile_texts import hostile_text
from megatron_spear.testing.recorded_runs import made_run
from megatron_spear.tracking.recorded_files import read_step, write_step

pytestmark = NEEDS_BROWSER


def test_the_curves_have_a_point_for_each_value(opened: Open, report: Path) -> None:
    page = opened(report)
    lines = page.value(
        "[...document.querySelectorAll('[data-chart] [data-line]')].map((line) => ["
        "line.closest('[data-chart]').dataset.chart, line.dataset.line, "
        "line.querySelector('path.line').getAttribute('d').match(/[ML]/g).length])"
    )
    points = {(chart, line): count for chart, line, count in lines}
    assert len({chart for chart, _ in points}) == page.value(
        "document.querySelectorAll('.drawing').length"
    )
    assert points["Success", "training"] == 12 and points["Success", "panel"] == 3
    assert points["Drift in a step", "on-policy rows"] == 11, "step 2 has none"
    assert points["Time by phase", "rollout"] == 12
    assert (
        page.value("document.querySelectorAll('[data-chart=\"Time by phase\"] .area').length") == 3
    )


def test_a_chart_answers_mouse_keyboard_and_buttons(opened: Open, report: Path) -> None:
    page = opened(report)
    chart = "document.querySelector('[data-chart=\"Schedules\"]')"
    page.value(f"{chart}.querySelector('.drawing').focus()")
    page.key("End")
    tip = "document.querySelector('#tip').textContent"
    assert page.value(tip) == (
        "step 12 (weight)\ngamma, of the replay loss: 1\nmu, of the intrinsic reward: 0.88"
    )
    page.key("ArrowLeft")
    assert page.value(tip).startswith("step 11 ")
    width = f"Number({chart}.querySelector('.drawing').getAttribute('width'))"
    before = page.value(width)
    page.resize(1000, 800)
    page.wait(f"{width} !== {before}")
    page.key("ArrowLeft")
    assert page.value(tip).startswith("step 10 "), "drawn anew, it keeps focus and cursor"
    page.value(f"{chart}.querySelector('.drawing').scrollIntoView({{block: 'center'}})")
    box = page.value(
        f"(({{x, y}}) => [x, y])({chart}.querySelector('.drawing').getBoundingClientRect())"
    )
    page.hover(box[0] + 54, box[1] + 100)
    page.wait(f"{tip}.startsWith('step 1 ')")
    page.value(f"{chart}.querySelector('.key').click()")
    assert page.value(f"{chart}.querySelectorAll('[data-line]').length") == 1
    gap = "document.querySelector('[data-chart=\"Log-prob gap of engine and trainer\"]')"
    path = f"{gap}.querySelector('path.line').getAttribute('d')"
    logarithmic = page.value(path)
    page.value(f"{gap}.querySelector('button.small').click()")
    assert page.value(path) != logarithmic
    page.value(set_field(".tools select", "5"))
    page.wait("document.querySelectorAll('path.raw').length > 5")


def test_filters_order_and_pages(opened: Open, report: Path) -> None:
    page = opened(report, "#tab=trajectories")
    page.wait(ROWS)
    assert page.value("document.querySelector('#count').textContent") == (
        "288 of 288 recorded trajectories"
    )
    assert page.value(ROWS) == 50
    _press(page, "next")
    assert "page 2 of 6" in page.value("document.querySelector('.where').textContent")
    columns = _block(report, "listing")["trajectories"]
    for fragment, keeps in (
        ("kind=look_at_obj_in_light", lambda row: row["kind"] == "look_at_obj_in_light"),
        ("won=true&from=3&to=5", lambda row: row["won"] and 3 <= row["step"] <= 5),
        ("status=failed_engine", lambda row: row["status"] == "failed_engine"),
        ("low=1.02&high=1.05", lambda row: row["total"] and 1.02 <= row["total"] <= 1.05),
        ("mark=overlong", lambda row: "overlong" in row["marks"]),
        ("text=HEAT", lambda row: "heat" in row["kind"]),
    ):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        page.value(f"void (location.hash = 'tab=trajectories&{fragment}')")
        expected = f"{sum(bool(keeps(row)) for row in rows)} of 288"
        page.wait(f"document.querySelector('#count')?.textContent.startsWith('{expected} ')")
    page.value("void (location.hash = 'tab=trajectories&replayed=yes&sort=total')")
    page.wait(f"document.querySelector('#count').textContent.startsWith('44 of') && {ROWS} === 44")
    rewards = page.value(
        "[...document.querySelectorAll('[data-label=reward]')].map((c) => +c.textContent)"
    )
    assert rewards == sorted(rewards, reverse=True)


def test_the_text_of_turns_is_found(opened: Open, report: Path) -> None:
    step = read_step(report.parent / "run" / "trajectories", 4)
    text = next(t for t in step.trajectories if t.turns).turns[0].observation[:60].upper()
    page = opened(report, "#tab=trajectories")
    page.wait(ROWS)
    search_list(page, text)
    assert page.value("document.querySelector('#count').textContent").startswith("1 of")
    for word in ("valid", "false", "observation", "[["):  # how a body is written, not said
        search_list(page, word)
        assert page.value("document.querySelector('#count').textContent").startswith("0 of"), word


def test_a_trajectory_shows_turns_calls_and_shaded_tokens(opened: Open, report: Path) -> None:
    page = opened(report, "#tab=trajectories&won=true&from=6&to=6&mark=")
    page.wait(ROWS)
    page.click("a.open")
    page.wait("document.querySelector('#turns .turn')")
    name = page.value("new URLSearchParams(location.hash.slice(1)).get('open')")
    _, group, member = name.split("|")
    step = read_step(report.parent / "run" / "trajectories", 6)
    played = next(t for t in step.trajectories if (t.group, t.member) == (group, int(member)))
    turn = played.turns[0]
    assert page.value("document.querySelectorAll('.turn').length") == len(played.turns)
    shown = page.value("[...document.querySelector('.tokens').children].map((t) => t.textContent)")
    assert shown == list(turn.tokens)
    said = page.value("document.querySelector('.turn').textContent")
    assert turn.observation in said and turn.tool_calls[0].arguments in said
    half = turn.versions[0].num_tokens
    assert f"policy version 5 ({half} tokens), then 6" in said
    shade = "document.querySelector('.token').style.backgroundColor"
    legend = "document.querySelector('#scale').textContent"
    shades = {}
    for kind in ("advantage", "probability", "gap", "none"):
        page.value(set_field(".sticky select", kind))
        page.wait(f"location.hash.includes('shade={kind}')")
        page.wait("document.querySelector('.tokens')")
        shades[kind] = (page.value(shade), page.value(legend))
    assert shades["none"][0] == "" and len(set(shades.values())) == 4
    page.value("document.querySelector('.tokens').focus()")
    page.key("ArrowRight")
    tip = page.value("document.querySelector('#tip').textContent")
    probability = float(tip.partition("probability ")[2].partition(",")[0])
    assert probability == pytest.approx(2.718281828 ** (turn.rollout_logprobs[0] or 0), abs=1e-4)
    assert "policy version 5" in tip and f"log-prob {_number(turn.rollout_logprobs[0])}" in tip
    page.value("document.querySelector('.sticky select').focus()")
    page.click("#next")
    page.wait(f"!location.hash.includes(encodeURIComponent({json.dumps(name)}))")


def test_a_replayed_row_leads_to_its_own_record(opened: Open, report: Path) -> None:
    (row, *_) = read_step(report.parent / "run" / "trajectories", 12).replayed
    page = opened(report, "#tab=replay")
    page.wait("document.querySelector('a.origin')")
    assert page.value("document.querySelector('#count').textContent") == "44 of 44 replayed rows"
    cells = page.value("[...document.querySelectorAll('table.list tbody tr')].at(3)"
                       ".textContent")  # fmt: skip
    assert row.prompt_id in cells
    page.click("table.list tbody tr:nth-child(4) a.origin")
    page.wait("document.querySelector('.replays')")
    assert row.prompt_id in page.value("document.querySelector('h2').textContent")
    facts = page.value("document.querySelector('.pairs').textContent")
    assert f"played instep {row.step}," in facts
    replays = page.value("[...document.querySelectorAll('.replays td')].map((c) => c.textContent)")
    assert replays[:5] == ["12", "1", "0.5", "+0.75", f"+{_number(row.advantage)}"]


def test_texts_of_models_are_inert(opened: Open, folder: Path) -> None:
    run = made_run(folder / "hostile", steps=1, groups=1, members=1)
    (first,) = read_step(run / "trajectories", 1).trajectories
    harm = "</script></bdi><img src=x onerror='window.harmed=1'><script>window.harmed=1</script>"
    unseen = "a\u00ad\u200c\u200d\u3164\U000e0041z Ä\\RGER \U0001f41d"
    texts = [harm, "\u202egnp.exe\u202c", "\ud800", "\x00\x1b[2J", unseen]
    texts += map(hostile_text, range(39))
    turns = tuple(
        replace(first.turns[0], observation=text, text=text, action=text, tokens=(text,),
                rollout_logprobs=(-0.5,), old_logprobs=None, advantages=None)
        for text in texts
    )  # fmt: skip
    nasty = replace(first, prompt=harm, prompt_id=harm, kind=harm, error=harm, turns=turns,
                    segment_marks=((harm,),), left_out=harm)  # fmt: skip
    write_step(
        run / "trajectories", replace(read_step(run / "trajectories", 1), trajectories=(nasty,))
    )
    ReportWriter([run], folder / "hostile.html").write()
    page = opened(folder / "hostile.html", "#tab=trajectories")
    page.wait(ROWS)
    page.click("a.open")
    page.wait("document.querySelectorAll('.turn').length === 44")
    assert page.value("window.harmed") is None
    assert page.value("document.querySelectorAll('main img, main script').length") == 0
    assert page.value("document.querySelector('.said bdi').textContent") == harm
    shown = page.value(
        "[...document.querySelectorAll('.tokens')].slice(1, 5).map((t) => t.textContent)"
    )
    assert shown == [
        "⟦U+202E⟧gnp.exe⟦U+202C⟧",
        "⟦U+D800⟧",
        "␀␛[2J",
        "a⟦U+00AD⟧⟦U+200C⟧⟦U+200D⟧⟦U+3164⟧⟦U+E0041⟧z Ä\\RGER \U0001f41d",
    ]
    page.click("#back")
    page.wait("document.querySelector('#search')")
    search_list(page, "ä\\rger \U0001f41d")
    assert page.value("document.querySelector('#count').textContent").startswith("1 of 1 ")


def test_no_other_program_runs_in_the_page(browser: Browser, report: Path) -> None:
    page = browser.open(report, width=1280, height=900)
    page.wait(DRAWN)
    page.value(
        "(s => { s.textContent = 'window.harmed = 1'; document.body.append(s); })"
        "(document.createElement('script'))"
    )
    page.value("document.body.append(Object.assign(new Image(), {src: 'data:image/gif;base64,'}))")
    page.wait("document.querySelector('body > img')")
    assert page.value("window.harmed") is None
    refused = [error for error in page.errors if "Content Security Policy" in error]
    assert len(refused) == 2, page.errors


def test_ten_thousand_trajectories_are_paged(opened: Open, folder: Path) -> None:
    run = made_run(folder / "large", steps=100, groups=25, members=4, turns=1)
    written = ReportWriter([run], folder / "large.html").write()
    assert written.num_trajectories == 10_000 and not written.notes
    page = opened(folder / "large.html", "#tab=trajectories&page=199")
    page.wait(ROWS)
    assert page.value(ROWS) == 50
    assert page.value("document.querySelector('.where').textContent") == "page 200 of 200"
    assert page.value("document.querySelector('td').textContent") == "1"
    page.click("a.open")
    page.wait("document.querySelector('#view h2')")
    assert page.value("performance.getEntriesByName('drawn')[0].startTime") < 30_000


def test_arms_have_bands(opened: Open, folder: Path) -> None:
    """Runs long enough to be smoothed, with metrics that never change."""
    plain = ("replay.enabled=false",)
    runs = [made_run(folder / f"a{n}", seed=n, steps=60, recorded=False) for n in range(3)]
    runs += [made_run(folder / f"b{n}", seed=n, steps=60, gain=0.8, recorded=False, settings=plain)
             for n in range(2)]  # fmt: skip
    ReportWriter(runs, folder / "arms.html").write()
    page = opened(folder / "arms.html")
    chart = "document.querySelector('[data-chart=\"rollout/success\"]')"
    assert page.value(f"{chart}.querySelectorAll('.band').length") == 2
    keys = page.value(f"[...{chart}.querySelectorAll('.key')].map((k) => k.textContent)")
    assert keys == ["replay.enabled=True (n = 3)", "replay.enabled=False (n = 2)"]
    page.click("input[type=checkbox]")
    page.wait(f"{chart}.querySelectorAll('.faint').length === 5")
    _a_constant_is_a_level_line(page)
    _a_band_that_reaches_below_a_logarithmic_axis_is_whole(page, folder / "arms.html")
    page.click("#tab-trajectories")
    page.wait("document.querySelector('.empty')")
    page.click("#tab-figures")
    page.wait("document.querySelector('.figures')")
    assert "(n = 3)" in page.value("document.querySelector('.figures').textContent")
    assert page.value("document.querySelector('.figures th:nth-child(2)').textContent") == (
        "replay.enabled=True"
    )


def _a_constant_is_a_level_line(page: Page) -> None:
    chart = "document.querySelector('[data-chart=\"reward/intrinsic\"]')"
    for is_log in ("false", "true"):
        assert page.value(f"{chart}.querySelector('.small').ariaPressed") == is_log
        assert page.value(f"{chart}.querySelectorAll('.grid line').length") in range(2, 9)
        points = page.value(f"{chart}.querySelector('g:not(.faint) > .line').getAttribute('d')")
        assert {p.split()[1] for p in re.split("[ML]", points)[1:]} == {"103.0"}, "in the middle"
        page.value(f"{chart}.querySelector('.small').click()")


def _a_band_that_reaches_below_a_logarithmic_axis_is_whole(page: Page, report: Path) -> None:
    page.value(set_field(".tools select", "1"))
    page.wait("location.hash.includes('smooth=1')")
    chart = "document.querySelector('[data-chart=\"replay/age_mean\"]')"
    page.value(f"{chart}.querySelector('.small').click()")
    shape = page.value(f"[...{chart}.querySelectorAll('.band')].at(-1).getAttribute('d')")
    points = [point.split() for point in re.split("[ML]", shape.rstrip("Z"))[1:]]
    low = _block(report, "data")["arms"][1]["bands"]["replay/age_mean"]["low"]
    lower = points[:59:-1]
    assert len(points) == 120 and [x for x, _ in lower] == [x for x, _ in points[:60]]
    below = [height for (_, height), value in zip(lower, low, strict=True) if value <= 0]
    assert len(below) > 5 and set(below) == {"196.0"}, "the bottom of the paper"


def test_the_eleventh_arm_is_told_from_the_first(opened: Open, folder: Path) -> None:
    runs = [made_run(folder / f"arm{n}", seed=n, steps=60, recorded=False) for n in range(11)]
    ReportWriter([], folder / "many.html", groups={run.name: [run] for run in runs}).write()
    page = opened(folder / "many.html")
    for stroke in (".line", ".key line"):
        looks = page.value(
            f"[...document.querySelector('.chart').querySelectorAll('{stroke}')]"
            ".map((l) => [l.style.stroke, l.style.strokeDasharray])"
        )
        assert len(looks) == len({tuple(look) for look in looks}) == 11
        assert looks[0][0] == looks[10][0], "the colours begin again"
    _a_constant_is_a_level_line(page)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(opened: Open, report: Path, width: int) -> None:
    page = opened(report, width=width)
    for tab in ("curves", "trajectories", "replay"):
        page.click(f"#tab-{tab}")
        page.wait(f"document.querySelector('#tab-{tab}').ariaSelected === 'true' && "
                  "document.querySelector('#view').textContent")  # fmt: skip
        assert page.value("document.documentElement.scrollWidth") <= width


def _press(page: Page, text: str) -> None:
    buttons = "[...document.querySelectorAll('.pager button')]"
    page.value(f"{buttons}.find((b) => b.textContent === '{text}').click()")
    page.wait("document.querySelector('.where').textContent.startsWith('page 2')")


def _block(report: Path, name: str) -> Any:
    """A block of a report's data."""
    found = re.search(rf'id="{name}">([^<]*)<', report.read_text(encoding="utf-8"))
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def _number(value: float | None) -> str:
    """A number as the page writes it, below 1."""
    return f"{value:.4g}".replace("-", "−")
