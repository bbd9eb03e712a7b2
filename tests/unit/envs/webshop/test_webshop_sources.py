"""The official files as they lie on a disk, and what is said of broken ones."""

import json

import pytest
from webshop_cases import LAMP, ROWS, row, write_files

from megatron_spear.envs.webshop.sources import (
    file_sha256,
    load_human_goals,
    load_products,
    load_synthetic_goals,
)
from megatron_spear.errors import DataError


def test_products_and_goals(tmp_path):
    paths = write_files(tmp_path)
    products = load_products(paths["products"], paths["attributes"], None)
    assert [product.asin for product in products] == [entry["asin"] for entry in ROWS]
    assert len(load_human_goals(products, paths["instructions"])) == 2
    assert len(load_synthetic_goals(products, paths["attributes"])) == 6


def test_the_first_rows_count_before_any_is_passed_over(tmp_path):
    rows = [row("nan", "x"), *ROWS]
    paths = write_files(tmp_path, rows=rows)
    products = load_products(paths["products"], paths["attributes"], 2)
    assert [product.asin for product in products] == [LAMP]


def test_no_goals_for_these_products(tmp_path):
    paths = write_files(tmp_path, human={"B0ELSEWHER": []})
    products = load_products(paths["products"], paths["attributes"], None)
    with pytest.raises(DataError, match="no goal for any of the products"):
        load_human_goals(products, paths["instructions"])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"[{", "is no JSON"),
        (b"{}", "expected a list"),
        (b"[]", "got no products"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b'[{"asin": "B1"}]', "product 0 cannot be read"),
    ],
)
def test_broken_products(tmp_path, contents, message):
    paths = write_files(tmp_path)
    paths["products"].write_bytes(contents)
    with pytest.raises(DataError, match=message):
        load_products(paths["products"], paths["attributes"], None)


def test_attributes_that_are_a_list(tmp_path):
    paths = write_files(tmp_path)
    paths["attributes"].write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(DataError, match="expected a map by asin"):
        load_products(paths["products"], paths["attributes"], None)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"docs/webshop\.md"):
        load_products(tmp_path / "none.json", tmp_path / "none.json", None)
    with pytest.raises(DataError, match="cannot be read"):
        file_sha256(tmp_path / "none.json")


def test_sha256_of_a_file(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert file_sha256(file).startswith("ba7816bf")
