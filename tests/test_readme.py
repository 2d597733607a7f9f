"""The numbers in README are those of the checked-in results."""
import json

import pytest

import readme_tables
from readme_tables import ROOT, TABLES, marked


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_readme(name):
    assert marked(name).findall((ROOT / "README.md").read_text()) == [TABLES[name](ROOT)]   # else: python tests/readme_tables.py --write


def test_results_table(tmp_path):
    score = {"value": 1.005, "spread": 0.1, "oracle": 0.5, "R": 2.01}
    part = {"W": score, "MAE": score, "AUC_low": {"value": 0.75}, "marginals": {"lit_percent": {"value": 5.0, "real": 5.25}}}
    own = {"value": 1.0, "spread": None, "floor": 0.5, "R": None}
    result = {"script": "fm", "detector": "zn", "rows": {"seen": 7, "unseen": 8}, "parameters": 9, "train_seconds": 90, "command": "python fm.py",
              "ms_per_response": {"1": 2.0, "256": 0.1234}, "seen": part, "unseen": part | {"W": own, "MAE": own}}
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/fm-zn.json").write_text(json.dumps(result))
    (tmp_path / "weights/fm-zp.json").write_text(json.dumps(result | {"detector": "zp", "unseen": None}))
    head, line, *rows = readme_tables.results(tmp_path).splitlines()
    assert len(rows) == 3 and len({text.count("|") for text in (head, line, *rows)}) == 1
    assert rows[0] == "| fm | ZN | seen | 7 | 1.00 ± 0.10 | 0.50 | 2.01 | 1.00 (0.50) | 0.750 | - | 5.00 (5.25) | 0.123 | 9 | 1.5 | `python fm.py` |"
    assert "| unseen | 8 | 1.00 ± - | 0.50 | - | 1.00 (0.50) |" in rows[1] and rows[2].startswith("| fm | ZP | seen |")


def test_marked_finds_one_section():
    text = "a\n<!-- sweep -->\nold\n<!-- /sweep -->\nb\n<!-- check -->\nc\n<!-- /check -->\n"
    assert marked("sweep").sub(lambda _: "new\n", text) == text.replace("old", "new")
