"""Bring results/ and README.md's table up to date with finished runs (for this project's maintainers).

    python results/publish.py                        # runs/cifar10-full*, -laptop* and -quick*
    python results/publish.py --runs FOLDER ...

report.template.md says in braces which number it wants; report.md is that page with the numbers filled in:

    {laptop finetune}                  a row's value; of several seeds, mean and standard deviation
    {laptop m_probe training.angle}    another entry of the row
    {report infonce_probe}             the same row in the coursework report
    {laptop: versions.torch}           an entry of the run itself
    {laptop finetune - m_joint_probe}  how much higher one row is than another, in points, seed by seed
    {table}                            all rows of analysis.TABLE, with their commands and times

What stands between <!-- needs laptop finetune_adamw --> and <!-- end --> is left out without such a row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analysis  # noqa: E402
import multimodal  # noqa: E402
import video  # noqa: E402
import vit  # noqa: E402

spec = importlib.util.spec_from_file_location("stage1", ROOT / "ssl.py")  # by another name: see README.md
stage1 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage1)
# row -> its number in the coursework report
REPORTED = analysis.REPORTED | multimodal.REPORTED | video.REPORTED | stage1.REPORTED

PLACEHOLDER = re.compile(r"\{(laptop|full|quick|report)(:?) (\S+?)(?: (-|\S+?))?(?: (\S+?))?\}")
NEEDS = re.compile(r"<!-- needs (\S+) (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)

# the rows of README.md's table
ROWS = ["pixels_probe", "untrained_probe", "infonce_probe", "infonce_longer_probe"]
ROWS += ["m_probe", "m_infonce_probe", "m_joint_probe"]
ROWS += ["finetune_scratch", "finetune_m_infonce", "finetune_infonce_longer", "finetune"]
ROWS += ["video_report_1", "video_report_2", "video_encoder_1", "video_encoder_2"]
ROWS += [
    "fusion_tiny",
    "fusion_tiny_image_only",
    "fusion_tiny_text_only",
    "fusion_tiny_shuffled",
    "fusion_blip",
]
ROWS += ["cka_before", "cka_after"]
# the rows of laptop's length that `bash run_all.sh questions` makes, not `bash run_all.sh laptop`
QUESTIONS = {"infonce_longer_probe", "m_infonce_probe", "infonce_adamw_probe"}
QUESTIONS |= {"finetune_scratch", "finetune_infonce_longer", "finetune_m_infonce"}
QUESTIONS |= {"finetune_adamw", "finetune_scratch_adamw", "fusion_tiny_shuffled", "fusion_tiny_1"}
QUESTIONS |= {f"video_{name}" for name in ("muon", "random", "balanced", "repeats")}
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
    if key in ("seed", "device", "precision", "provenance", "commit") and key not in results:
        found = dict.fromkeys(str(row[key]) for row in results["rows"].values() if key in row)
        return ", ".join(found) or None
    return look_up(results, key)


def of_profile(runs: dict[str, dict], profile: str) -> list[dict]:
    """The results.json of a profile's runs, one a seed."""
    return [results for name, results in runs.items() if profile in name.split("-")]


def entry(runs: dict[str, dict], profile: str, row: str, key: str = "value") -> str:
    """One number as text; runs: name of a run -> its results.json; row "": an entry of the run itself."""
    if profile == "report":
        found = [REPORTED.get(row)]
    else:
        parts = of_profile(runs, profile)
        found = [look_up(r, f"rows.{row}.{key}") if row else of_the_run(r, key) for r in parts]
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


def difference(runs: dict[str, dict], profile: str, row: str, control: str) -> str:
    """How much higher `row` is than `control`, in points (CKA, entropy: plain). Each seed's two rows are
    compared with each other: what the seed does to both falls out."""
    scale, digits = (1, 4) if row.startswith(("cka", "maps")) else (100, 2)
    found = []
    for results in of_profile(runs, profile):
        values = [look_up(results, f"rows.{which}.value") for which in (row, control)]
        if None not in values:
            found.append(scale * (values[0] - values[1]))
    if not found:
        return "not measured"
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):+.{digits}f}{spread}"


def number(runs: dict[str, dict], profile: str, row: str) -> str:
    """A row's number, with a q if `questions` makes it."""
    found = entry(runs, profile, row)
    by_questions = profile == "laptop" and row in QUESTIONS and found != "not measured"
    return f"{found} q" if by_questions else found


def filled(template: str, runs: dict[str, dict]) -> str:
    """The page that the template describes."""

    def fill(placeholder: re.Match) -> str:
        profile, colon, first, second, third = placeholder.groups()
        if colon:
            return entry(runs, profile, "", first)
        if second == "-":
            return difference(runs, profile, first, third)
        return entry(runs, profile, first, second or "value")

    def if_there(section: re.Match) -> str:
        profile, row, text = section.groups()
        return "" if entry(runs, profile, row) == "not measured" else text

    template = NEEDS.sub(if_there, template)
    return PLACEHOLDER.sub(fill, template.replace("{table}", whole_table(runs)))


def whole_table(runs: dict[str, dict]) -> str:
    """Every row, with the row it has to beat and by how much it does, its time and its command."""
    profiles = profiles_of(runs)
    heads = ["row", "what it is", "report"]
    for profile in profiles:
        heads += [profile, "above its control", "time"]
    numeric = len(heads) - 2
    lines = [[*heads, "control", "command"], ["---", "---", *["---:"] * numeric, "---", "---"]]
    for row, (what, *controls) in analysis.TABLE.items():
        numbers = [number(runs, profile, row) for profile in ("report", *profiles)]
        if set(numbers) == {"not measured"}:
            continue
        measured = [c for c in controls if {number(runs, p, c) for p in profiles} != {"not measured"}]
        control = measured[0] if measured else ""
        cells = [row, what, numbers[0]]
        for profile, value in zip(profiles, numbers[1:]):
            above = difference(runs, profile, row, control) if control else ""
            cells += [value, above, entry(runs, profile, row, "seconds")]
        if row != "fusion_blip":
            cells = [cell.replace("not measured", "") for cell in cells]
        commands = [entry(runs, profile, row, "command") for profile in profiles]
        command = next((f"`{command}`" for command in commands if command != "not measured"), "not measured")
        lines.append([*cells, control, command])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def profiles_of(runs: dict[str, dict]) -> list[str]:
    """Which of the profiles that have a column there are."""
    return [profile for profile in ("laptop", "full") if of_profile(runs, profile)]


def short_table(runs: dict[str, dict]) -> str:
    """README.md's table, in columns that can be read in an editor."""
    profiles = profiles_of(runs)
    lines = [["row", "what it is", "report", *profiles]]
    for row in ROWS:
        reported, *ours = [number(runs, profile, row) for profile in ("report", *profiles)]
        if {reported, *ours} != {"not measured"}:
            lines.append([row, analysis.TABLE[row][0], reported.replace("not measured", ""), *ours])
    widths = [max(map(len, column)) for column in zip(*lines)]
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
    about += "`bash run_all.sh questions`, which is laptop and more."
    about += " full: one seed.\n" if "full" in profiles else "\n"
    return "\n".join([f"{about}Images: {images}.", "", *texts]) + "\n"


def commits() -> dict[str, dict[str, str]]:
    """The newest commits that changed a .py file -> a hash of each of these files there, as in a row's
    `code`."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True).stdout

    found = {}
    for commit in git("log", "-n40", "--format=%h", "--", "*.py").decode().split():
        found[commit] = {p.name: vit.hash_of(git("show", f"{commit}:{p.name}")) for p in ROOT.glob("*.py")}
    return found


def note_commits(results: dict) -> None:
    """Say in each row of a run which commit's files made it, found by their contents: the newest commit that
    has those of all rows; where there is none, those of the row."""
    known, made_by = commits(), {}
    for name, row in results["rows"].items():
        code = row.pop("code", {})
        made_by[name] = [commit for commit, files in known.items() if files.items() >= code.items()]
    of_all = [commit for commit in known if all(commit in found for found in made_by.values())]
    for name, found in made_by.items():
        results["rows"][name]["commit"] = (of_all or found or ["none: edited files"])[0]


def publish(folders: list[pathlib.Path], out: pathlib.Path) -> None:
    """Write results.json, report.md and README.md's table from the runs in `folders`; copy their pictures."""
    runs = {f.name: vit.read_results(f) for f in folders if (f / "results.json").exists()}
    if not runs:
        sys.exit("there is no finished run in runs/; `bash run_all.sh` makes one")
    for name, results in runs.items():
        if results["dataset"] != "cifar10":
            sys.exit(f"{name} holds results on {results['dataset']} images, not to be published")
        note_commits(results)
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
