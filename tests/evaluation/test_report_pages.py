"""Pages as those hear them who do not see them."""

from qadapter.evaluation.page import document, table


def test_a_page_has_one_main_part_and_header_cells_say_something():
    page = document("A title", table(["", "base"], [["accuracy", "0.5"]]))
    assert page.count("<main>") == page.count("</main>") == 1
    assert '<td></td><th scope="col">base</th>' in page
