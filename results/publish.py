"""Bring results/ and README.md's table up to date with finished runs (for this project's maintainers).

    python results/publish.py                        # runs/cifar10-full*, -laptop* and -quick*
    python results/publish.py --runs FOLDER ...

report.template.md says in braces which number it wants; report.md is that page with the numbers filled in:

    {laptop finetune}                  a row's value; of several seeds, mean and standard deviation
    {laptop m_probe training.angle}    another entry of the row
    {report finetune}                  the same row in the coursework report
    {laptop: versions.torch}           an entry of the run itself
    {table}                            all rows of analysis.TABLE, with their commands and times

What stands between <!-- needs laptop finetune_adamw --> and <!-- end --> is left out without such a row.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analysis  # noqa: E402
import multimodal  # noqa: E402
import vit  # noqa: E402

PLACEHOLDER = re.compile(r"\{(laptop|full|quick|report)(:?) (\S+?)(?: (\S+?))?\}")
NEEDS = re.compile(r"<!-- needs (\S+) (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)

# the rows of README.md's table
ROWS = [
    "pixels_probe",
    "untrained_probe",
    "infonce_probe",
    "infonce_longer_probe",
    "m_probe",
    "m_joint_probe",
]
ROWS += ["finetune_scratch", "finetune_infonce_longer", "finetune", "video_encoder_1", "video_encoder_2"]
ROWS += ["fusion_tiny", "fusion_tiny_image_only", "fusion_tiny_text_only", "fusion_blip"]
ROWS += ["cka_before", "cka_after"]
# the rows of laptop's length that `bash run_all.sh questions` makes, not `bash run_all.sh laptop`
QUESTIONS = {"infonce_longer_probe", "m_infonce_probe", "finetune_scratch", "finetune_infonce_longer"}
QUESTIONS |= {f"video_{name}" for name in ("random", "balanced", "repeats")}
QUESTIONS |= {f"video_report_{name}" for name in ("1", "1_probe", "2")}


def look_up(results: dict, path: str):
    """The entry at a path like "training.angle" or "attentions.1"; None where there is none."""
    for step in path.split("."):
        if results is None:
            return None
        results = results[int(step)] if isinstance(results, list) else results.get(step)
    return results


def of_the_run(results: dict, key: str):
    """An entry of a run: its own, or what its rows say."""
    if key in ("seed", "device", "precision", "provenance") and key not in results:
        found = dict.fromkeys(str(row[key]) for row in results["rows"].values() if key in row)
        return ", ".join(found) or None
    return look_up(results, key)


def entry(runs: dict[str, dict], profile: str, row: str, key: str = "value") -> str:
    """One number as text; runs: name of a run -> its results.json; row "": an entry of the run itself."""
    found, reported = [], analysis.REPORTED | multimodal.REPORTED
    for name, results in runs.items():
        if profile == "report":
            found.append(look_up(results, f"rows.{row}.report") or reported.get(row))
        elif profile in name.split("-"):
            found.append(look_up(results, f"rows.{row}.{key}") if row else of_the_run(results, key))
    found = [value for value in found if value is not None]
    if not found:
        return "not measured"
    if key == "command":
        return found[0]
    if row and key == "seconds":
        return f"{found[0] / 60:.1f} min"  # of the first seed
    if not row or isinstance(found[0], str):
        texts = [f"{value / 60:.0f} min" if key == "seconds" else str(value) for value in found]
        return ", ".join(dict.fromkeys(texts))
    return analysis.in_words(row, *found)


def number(runs: dict[str, dict], profile: str, row: str) -> str:
    """A row's number, with a q if `questions` makes it."""
    found = entry(runs, profile, row)
    by_questions = profile == "laptop" and row in QUESTIONS and found != "not measured"
    return f"{found} q" if by_questions else found


def filled(template: str, runs: dict[str, dict]) -> str:
    """The page that the template describes."""

    def fill(placeholder: re.Match) -> str:
        profile, colon, first, second = placeholder.groups()
        if colon:
            return entry(runs, profile, "", first)
        return entry(runs, profile, first, second or "value")

    def if_there(section: re.Match) -> str:
        profile, row, text = section.groups()
        return "" if entry(runs, profile, row) == "not measured" else text

    template = NEEDS.sub(if_there, template)
    return PLACEHOLDER.sub(fill, template.replace("{table}", whole_table(runs)))


def whole_table(runs: dict[str, dict]) -> str:
    """Every row, with the row it has to beat, its times and its command; empty: no stage of that profile."""
    lines = ["| row | what it is | report | laptop | full | control | time, laptop | time, full | command |"]
    lines.append("|---|---|---:|---:|---:|---|---:|---:|---|")
    for row, (what, *controls) in analysis.TABLE.items():
        numbers = [number(runs, profile, row) for profile in ("report", "laptop", "full")]
        if row == "m_best_probe" or set(numbers) == {"not measured"}:
            continue
        times = [entry(runs, profile, row, "seconds") for profile in ("laptop", "full")]
        commands = [entry(runs, profile, row, "command") for profile in ("laptop", "full")]
        command = next((f"`{command}`" for command in commands if command != "not measured"), "not measured")
        there = [c for c in controls if {number(runs, p, c) for p in ("laptop", "full")} != {"not measured"}]
        cells = [row, what, *numbers, there[0] if there else "", *times]
        if row != "fusion_blip":
            cells = [cell.replace("not measured", "") for cell in cells]
        lines.append("| " + " | ".join([*cells, command]) + " |")
    return "\n".join(lines)


def short_table(runs: dict[str, dict]) -> str:
    """README.md's table, in columns that can be read in an editor."""
    lines = [["row", "what it is", "report", "laptop", "full"]]
    for row in ROWS:
        cells = [number(runs, profile, row) for profile in ("report", "laptop", "full")]
        lines.append([row, analysis.TABLE[row][0], cells[0].replace("not measured", ""), *cells[1:]])
    widths = [max(len(line[c]) for line in lines) for c in range(5)]
    texts = []
    for name, what, *numbers in lines:
        padded = [text.rjust(width) for text, width in zip(numbers, widths[2:])]
        texts.append("| " + " | ".join([name.ljust(widths[0]), what.ljust(widths[1]), *padded]) + " |")
    rule = ["-" * (width + 2) for width in widths[:2]] + ["-" * (width + 1) + ":" for width in widths[2:]]
    texts.insert(1, "|" + "|".join(rule) + "|")
    seeds, images = entry(runs, "laptop", "", "seed"), entry(runs, "laptop", "", "provenance")
    about = (
        f"laptop: mean ± standard deviation over seeds {seeds}; one seed where there is no ±; q: made by\n"
    )
    about += "`bash run_all.sh questions`, which is laptop and more. full: one seed.\n"
    return "\n".join([f"{about}Images: {images}.", "", *texts]) + "\n"


def publish(folders: list[pathlib.Path], out: pathlib.Path) -> None:
    """Write results.json, report.md and README.md's table from the runs in `folders`; copy their pictures."""
    runs = {f.name: vit.read_results(f) for f in folders if (f / "results.json").exists()}
    if not runs:
        sys.exit("there is no finished run in runs/; `bash run_all.sh` makes one")
    for name, results in runs.items():
        if results["dataset"] != "cifar10":
            sys.exit(f"{name} holds results on {results['dataset']} images, not to be published")
    vit.write_file(out / "results.json", (json.dumps(runs, indent=1) + "\n").encode())
    for picture in [f"{name}.png" for name in analysis.FIGURES] + ["learning.gif"]:
        for folder in folders[::-1]:  # the first that has it wins
            if (folder / "figures" / picture).exists():
                vit.write_file(out / "figures" / picture, (folder / "figures" / picture).read_bytes())
    page = filled((out / "report.template.md").read_text(), runs)
    vit.write_file(out / "report.md", page.encode())
    readme = out.parent / "README.md"
    text = BLOCK.sub(lambda block: block[1] + short_table(runs) + block[2], readme.read_text())
    vit.write_file(readme, text.encode())
    print(f"wrote {out / 'report.md'} and {readme} from {', '.join(runs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="bring results/ and README.md's table up to date with runs")
    parser.add_argument("--runs", nargs="+", type=pathlib.Path, default=[], help="folders of finished runs")
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "results", help="where to (default: results)"
    )
    args = parser.parse_args()
    names = ("full", "laptop", "quick")
    found = [f for f in sorted((ROOT / "runs").glob("cifar10-*")) if f.name.split("-")[1] in names]
    publish(args.runs or found, args.out)


if __name__ == "__main__":
    main()
