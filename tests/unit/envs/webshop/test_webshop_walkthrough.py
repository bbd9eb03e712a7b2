"""The site page by page: what is shown, what can be clicked, where each action leads."""

import pytest
from webshop_cases import CHAIR, LAMP, SHIRT, TEA, goal, make_shop, row

from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.webshop.product import parse_products
from megatron_spear.envs.webshop.session import MAX_ACTION, Session, parse_action
from megatron_spear.envs.webshop.shop import Shop

TASK = goal().instruction
HEAD = f"Instruction: [SEP] {TASK} [SEP] Back to Search"
BUTTONS = "Description [SEP] Features [SEP] Reviews [SEP] Buy Now"


class Visit:
    """A visit to the hand-made shop; ``do`` gives the page's text after actions."""

    def __init__(self, shop=None, show_attributes=False, **changes):
        self.session = Session(
            shop or make_shop(), goal(**changes), 0, show_attributes=show_attributes
        )

    def do(self, *actions):
        for action in actions:
            assert self.session.act(action), action
        return self.session.page.text()

    @property
    def clickables(self):
        return list(self.session.page.clickables())


def test_the_first_page():
    visit = Visit()
    assert visit.do() == f"WebShop [SEP] Instruction: [SEP] {TASK} [SEP] Search"
    assert visit.session.admissible() == ["search[...]"]


def test_results():
    visit = Visit()
    text = visit.do("search[desk lamp or linen shirt]")
    assert text == (
        f"{HEAD} [SEP] Page 1 (Total results: 2) [SEP] Next > [SEP] {LAMP} [SEP] "
        f"Brass Desk Lamp [SEP] $24.99 [SEP] {SHIRT} [SEP] Linen Summer Shirt [SEP] $100.0"
    )
    assert visit.session.admissible() == [
        "click[back to search]",
        "click[next >]",
        f"click[{LAMP.lower()}]",
        f"click[{SHIRT.lower()}]",
    ]


def test_no_results():
    text = Visit().do("search[bicycle]")
    assert text == f"{HEAD} [SEP] Page 1 (Total results: 0) [SEP] Next >"


def test_ten_results_a_page():
    rows = [row(f"B{number:02}", "same thing") for number in range(23)]
    visit = Visit(Shop(parse_products(rows, {}, "rows")))
    first = visit.do("search[thing]")
    assert "Page 1 (Total results: 23) [SEP] Next > [SEP] B00" in first
    assert "B09" in first and "B10" not in first
    second = visit.do("click[next >]")
    assert "Page 2 (Total results: 23) [SEP] < Prev [SEP] Next > [SEP] B10" in second
    assert visit.clickables[:4] == ["back to search", "< prev", "next >", "b10"]
    third = visit.do("click[next >]")
    assert third.endswith("B22 [SEP] same thing [SEP] $20.0")
    # Behind the last page there is nothing, and one can go on.
    assert visit.do("click[next >]").endswith(
        "Page 4 (Total results: 23) [SEP] < Prev [SEP] Next >"
    )
    assert visit.do("click[< prev]") == third
    assert visit.do("click[< prev]", "click[< prev]") == first
    assert not visit.session.act("click[< prev]")


def test_back_from_a_product_leads_to_its_page_of_results():
    rows = [row(f"B{number:02}", "same thing") for number in range(23)]
    visit = Visit(Shop(parse_products(rows, {}, "rows")))
    second = visit.do("search[thing]", "click[next >]")
    assert visit.do("click[b12]", "click[< prev]") == second


def test_a_product():
    visit = Visit()
    text = visit.do("search[lamp]", f"click[{LAMP}]")
    assert text == (
        f"{HEAD} [SEP] < Prev [SEP] color [SEP] navy blue [SEP] black | gold [SEP] size [SEP] "
        f"small [SEP] large [SEP] Brass Desk Lamp [SEP] Price: $24.99 [SEP] Rating: N.A. [SEP] "
        f"{BUTTONS}"
    )
    assert visit.clickables == [
        "back to search",
        "< prev",
        "description",
        "features",
        "reviews",
        "buy now",
        "navy blue",
        "black | gold",
        "small",
        "large",
    ]


def test_a_product_without_options_and_with_a_range_of_prices():
    text = Visit().do("search[chair]", f"click[{CHAIR.lower()}]")
    assert "< Prev [SEP] Oak Dining Chair [SEP] Price: $60.0 to $80.0 [SEP]" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("description", " [SEP] About the Brass Desk Lamp."),
        ("features", " [SEP] First of Brass Desk Lamp [SEP] Second"),
        ("reviews", ""),
    ],
)
def test_sub_pages(name, shown):
    visit = Visit()
    item = visit.do("search[lamp]", f"click[{LAMP}]", "click[large]")
    assert visit.do(f"click[{name}]") == f"{HEAD} [SEP] < Prev{shown}"
    assert visit.clickables == ["back to search", "< prev"]
    assert visit.do("click[< prev]") == item
    assert visit.session.chosen == {"size": "large"}


def test_the_attributes_page_is_there_when_asked_for():
    visit = Visit(show_attributes=True)
    assert "Reviews [SEP] Attributes [SEP] Buy Now" in visit.do("search[lamp]", f"click[{LAMP}]")
    assert visit.do("click[attributes]") == (
        f"{HEAD} [SEP] < Prev [SEP] easy assembly [SEP] energy saving [SEP] garden [SEP] "
        "desk lamps [SEP] Home & Garden › Lighting › Lamps"
    )
    plain = Visit()
    plain.do("search[lamp]", f"click[{LAMP}]")
    assert not plain.session.act("click[attributes]")


def test_a_product_without_a_description():
    assert (
        Visit().do("search[tea]", f"click[{TEA}]", "click[description]") == f"{HEAD} [SEP] < Prev"
    )


def test_options_replace_one_another():
    visit = Visit()
    visit.do("search[lamp]", f"click[{LAMP}]", "click[small]", "click[navy blue]")
    assert visit.session.chosen == {"size": "small", "color": "navy blue"}
    visit.do("click[large]", "click[large]")
    assert visit.session.chosen == {"size": "large", "color": "navy blue"}


@pytest.mark.parametrize("away", ["search[lamp]", "click[< prev]", "click[back to search]"])
def test_leaving_a_product_forgets_its_options(away):
    visit = Visit()
    visit.do("search[lamp]", f"click[{LAMP}]", "click[small]", away)
    assert visit.session.chosen == {}
    assert visit.session.product is None


def test_one_may_search_from_every_page():
    visit = Visit()
    results = visit.do("search[chair]")
    for actions in (
        ["search[lamp]"],
        ["search[lamp]", f"click[{LAMP}]"],
        ["search[lamp]", f"click[{LAMP}]", "click[features]"],
    ):
        assert visit.do(*actions, "search[chair]") == results


def test_back_to_search_from_every_page():
    visit = Visit()
    first = visit.do()
    for actions in (
        ["search[lamp]"],
        ["search[lamp]", f"click[{LAMP}]"],
        ["search[lamp]", f"click[{LAMP}]", "click[reviews]"],
    ):
        assert visit.do(*actions, "click[Back to Search]") == first


@pytest.mark.parametrize(
    ("before", "action"),
    [
        ([], "click[search]"),
        ([], "click[buy now]"),
        ([], f"click[{LAMP}]"),
        ([], "search[]"),
        ([], "search[ ]"),
        ([], "lamp"),
        ([], "Search[lamp]"),
        ([], "please search[lamp]"),
        ([], "search lamp"),
        ([], "search[lamp"),
        ([], "search(lamp)"),
        ([], "search[la\nmp]"),
        ([], "buy[lamp]"),
        ([], "[lamp]"),
        ([], "search[a] click[b]"),
        ([], f"search[{'lamp ' * MAX_ACTION}]"),
        (["search[lamp]"], "click[buy now]"),
        (["search[lamp]"], f"click[{CHAIR}]"),
        (["search[lamp]"], "click[large]"),
        (["search[lamp]"], "click[]"),
        (["search[lamp]", f"click[{LAMP}]"], "click[medium]"),
        (["search[lamp]", f"click[{LAMP}]"], "click[next >]"),
        (["search[lamp]", f"click[{LAMP}]"], "click[color]"),
        (["search[lamp]", f"click[{LAMP}]"], f"click[{LAMP}]"),
        (["search[lamp]", f"click[{LAMP}]", "click[features]"], "click[buy now]"),
        (["search[lamp]", f"click[{LAMP}]", "click[features]"], "click[large]"),
        (["search[lamp]", f"click[{LAMP}]", "click[features]"], "click[reviews]"),
    ],
)
def test_anything_else_changes_nothing(before, action):
    visit = Visit()
    page = visit.do(*before)
    assert not visit.session.buys(action)
    assert not visit.session.act(action)
    assert visit.session.page.text() == page


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("search[Red Shoes]", ("search", "red shoes")),
        ("  click[Buy Now]\n", ("click", "buy now")),
        ("click[buy now] thank you", ("click", "buy now")),
        ("click[a]b]", ("click", "a]b")),
        ("search[a [", None),
        ("search[a] [", ("search", "a")),
        ("search[a[b]]", None),
        ("search[<r>]", ("search", "<r>")),
        ("search[a]\nclick[b]", ("search", "a")),
        ("]search[", None),
        ("[]", None),
        ("", None),
    ],
)
def test_reading_actions(text, parsed):
    assert parse_action(text) == parsed


def test_an_option_with_the_name_of_a_button_is_the_button():
    options = {"style": [{"value": "Reviews"}, {"value": "Next >"}, {"value": ""}]}
    shop = Shop(parse_products([row("B1", "thing", customization_options=options)], {}, "rows"))
    visit = Visit(shop)
    visit.do("search[thing]", "click[b1]", "click[next >]")
    assert visit.session.chosen == {"style": "next >"}
    assert "" not in visit.clickables
    assert visit.do("click[reviews]").endswith("< Prev")


def test_rich_text():
    visit = Visit()
    assert visit.session.page.rich_text() == (
        f"WebShop\nInstruction:\n{TASK}\n[button] Search [button_]\n"
    )
    visit.do("search[desk lamp or linen shirt]", f"click[{LAMP}]")
    visit.do("click[navy blue]", "click[large]")
    assert visit.session.page.rich_text() == (
        f"You have clicked large.\nYou have clicked navy blue.\nInstruction:\n{TASK}\n"
        "[button] Back to Search [button_]\n[button] < Prev [button_]\ncolor\n"
        "  [clicked button] navy blue [clicked button_]\n  [button] black | gold [button_]\n"
        "size\n  [button] small [button_]\n  [clicked button] large [clicked button_]\n"
        "Brass Desk Lamp\nPrice: $24.99\nRating: N.A.\n[button] Description [button_]\n"
        "[button] Features [button_]\n[button] Reviews [button_]\n[button] Buy Now [button_]\n"
    )
    visit.do("click[< prev]")
    assert visit.session.page.rich_text().endswith(
        "Page 1 (Total results: 2)\n[button] Next > [button_]\n\n"
        f"[clicked button] {LAMP} [clicked button_]\nBrass Desk Lamp\n$24.99\n\n"
        f"[button] {SHIRT} [button_]\nLinen Summer Shirt\n$100.0\n"
    )
    visit.do("click[back to search]", "search[lamp]")
    assert f"[button] {LAMP} [button_]" in visit.session.page.rich_text()


def test_random_results_stay_while_one_looks_through_them():
    visit = Visit()
    first = visit.do("search[<r>]")
    assert visit.do("click[next >]", "click[< prev]") == first
    assert "Total results: 4" in first


def test_a_whole_visit_in_the_environment():
    environment = WebshopEnvironment()
    environment._shop = make_shop()
    environment.reset(seed=0, options={"goal": goal().to_fields()})
    rewards = []
    for action in ("search[lamp]", "click[buy]", f"click[{LAMP}]", "click[navy blue]"):
        result = environment.step(action)
        rewards.append((result.reward, result.terminated, result.info["valid"]))
    assert rewards == [(0.0, False, valid) for valid in (True, False, True, True)]
    result = environment.step("click[Buy Now]")
    assert (result.reward, result.terminated, result.truncated) == (1.0, True, False)
    assert result.observation == (
        "Thank you for shopping with us! [SEP] Your score (min 0.0, max 1.0) [SEP] 1.0"
    )
