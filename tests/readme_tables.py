"""The table of results in README, from weights/*.json: printed, or put between its markers with --write."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)
COLUMNS = ("detector", "particles", "test rows", "W", "oracle", "R", "MAE (oracle)", "AUC low", "lit % (real)", "ms per response",
           "parameters", "training, min", "command")


def number(value, form):
    return "-" if value is None else f"{value:{form}}"


def row(result, part):
    scores = result[part]
    w, mae, lit = scores["W"], scores["MAE"], scores["marginals"]["lit_percent"]
    reference = "oracle" if "oracle" in w else "floor"
    return (result["detector"].upper(), part, f"{result['rows'][part]}", f"{w['value']:.2f} ± {number(w['spread'], '.2f')}",
            number(w[reference], ".2f"), number(w["R"], ".2f"), f"{mae['value']:.2f} ({number(mae[reference], '.2f')})",
            number(scores.get("AUC_low", {}).get("value"), ".3f"), f"{lit['value']:.2f} ({lit['real']:.2f})",
            number(result["ms_per_response"].get("256"), ".3f"), f"{result['parameters']}", number(result["train_seconds"] / 60, ".1f"),
            f"`{result['command']}`")


def table(folder=ROOT / "weights"):
    """Markdown: a row for the seen and one for the unseen particles of each file."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [COLUMNS, ("---",) * len(COLUMNS)] + [row(result, part) for result in results for part in ("seen", "unseen") if result[part]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    print(table(), end="")
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(MARKED.sub(lambda _: table(), readme.read_text()))
