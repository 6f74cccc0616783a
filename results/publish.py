"""Bring results/ and README.md's table up to date with finished runs (for this project's maintainers).

    python results/publish.py                        # runs/cifar10-full*, -laptop* and -quick*
    python results/publish.py --runs FOLDER ...

report.template.md says in braces which number it wants; report.md is that page with the numbers filled in:

    {laptop finetune}                  a row's value; of several seeds, mean and standard deviation
    {laptop m_probe training.angle}    another entry of the row
    {report finetune}                  the same row in the coursework report
    {laptop: versions.torch}           an entry of the run itself
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analysis  # noqa: E402
import multimodal  # noqa: E402
import vit  # noqa: E402

PLACEHOLDER = re.compile(r"\{(laptop|full|quick|report)(:?) (\S+?)(?: (\S+?))?\}")
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)

# the rows of README.md's table
ROWS = {
    "pixels_probe": "linear probe of raw pixels",
    "untrained_probe": "linear probe of an untrained encoder",
    "infonce_probe": "linear probe after InfoNCE",
    "m_probe": "linear probe after Model M, from scratch",
    "m_joint_probe": "linear probe after Model M with InfoNCE beside it",
    "finetune": "fine-tuned from it (the report: from its Model M)",
    "finetune_scratch": "control: the same training from scratch (laptop: made by `questions`)",
    "video_encoder_1": "pseudo-videos, one temporal block",
    "video_encoder_2": "pseudo-videos, two temporal blocks",
    "fusion_tiny": "with captions by a small captioner, trained here",
    "fusion_tiny_image_only": "control: the same training without captions",
    "fusion_tiny_text_only": "control: captions without the image",
    "fusion_blip": "with captions by BLIP",
    "cka_before": "CKA of CLS across the last attention, before fine-tuning",
    "cka_after": "the same, after",
}


def look_up(results: dict, path: str):
    """The entry at a path like "training.angle" or "attentions.1"; None where there is none."""
    for step in path.split("."):
        if results is None:
            return None
        results = results[int(step)] if isinstance(results, list) else results.get(step)
    return results


def entry(runs: dict[str, dict], profile: str, row: str, key: str = "value") -> str:
    """One number as text; runs: name of a run -> its results.json; row "": an entry of the run itself."""
    found = []
    for name, results in runs.items():
        if profile == "report":
            found.append(look_up(results, f"rows.{row}.report") or multimodal.REPORTED.get(row))
        elif profile in name.split("-"):
            found.append(look_up(results, f"rows.{row}.{key}" if row else key))
    found = [value for value in found if value is not None]
    if not found:
        return "not measured"
    if key == "command":
        return found[0]
    if not row or isinstance(found[0], str):
        texts = [f"{value / 60:.0f} min" if key == "seconds" else str(value) for value in found]
        return ", ".join(dict.fromkeys(texts))
    mean = statistics.mean(found)
    if key == "seconds":
        return f"{mean / 60:.1f} min"
    return analysis.formatted(row, mean, statistics.stdev(found) if len(set(found)) > 1 else None)


def filled(template: str, runs: dict[str, dict]) -> str:
    """The page that the template describes."""

    def fill(placeholder: re.Match) -> str:
        profile, colon, first, second = placeholder.groups()
        if colon:
            return entry(runs, profile, "", first)
        return entry(runs, profile, first, second or "value")

    return PLACEHOLDER.sub(fill, template)


def table(runs: dict[str, dict]) -> str:
    """README.md's table, in columns that can be read in an editor."""
    lines = [["", "report", "laptop", "full"]]
    for row, label in ROWS.items():
        cells = [entry(runs, profile, row) for profile in ("report", "laptop", "full")]
        lines.append([label, cells[0].replace("not measured", ""), *cells[1:]])
    widths = [max(len(line[c]) for line in lines) for c in range(4)]
    texts = []
    for label, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        texts.append("| " + " | ".join([label.ljust(widths[0]), *padded]) + " |")
    texts.insert(
        1, "|-" + "-" * widths[0] + "-|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"
    )
    seeds, images = entry(runs, "laptop", "", "seed"), entry(runs, "laptop", "", "provenance")
    about = f"laptop: mean and standard deviation over seeds {seeds}; one seed where there is no ±."
    about += f"\nImages: {images}."
    return "\n".join([about, "", *texts]) + "\n"


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
    text = BLOCK.sub(lambda block: block[1] + table(runs) + block[2], readme.read_text())
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
