"""Bring results/ and the numbers in README.md up to date with finished runs (for this project's maintainers).

    python results/publish.py                        # runs/cifar10-full*, -laptop* and -quick*
    python results/publish.py --runs FOLDER ...

README.md and results/report.md hold marks that no reader sees, <!--=laptop:finetune-->, each followed by the
number it asks for and <!--/-->. They are filled in here, so no result on those pages is typed.
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
import vit  # noqa: E402

MARK = re.compile(r"<!--=(\S+?)-->.*?<!--/-->", re.DOTALL)


def entry(runs: dict[str, dict], what: str) -> str:
    """What a mark asks for, as text; `runs`: name of a run -> its results.json.

    laptop:finetune                  the row's value; with several seeds, mean and standard deviation
    report:finetune                  the same in the coursework report
    laptop:m_probe:training.angle    another entry of the row
    laptop::versions.torch           an entry of the run itself
    """
    profile, row, key = (what.split(":") + [""])[:3]
    key = "report" if profile == "report" else key or "value"
    found = []
    for results in [r for name, r in runs.items() if profile in ("report", *name.split("-"))]:
        value = results["rows"].get(row) if row else results
        for step in key.split("."):
            if isinstance(value, list):
                value = value[int(step)]
            elif value is not None:
                value = value.get(step)
        found += [] if value is None else [value]
    if not found:
        return "not measured"
    if key == "command":
        return found[0]
    if not row or isinstance(found[0], str):
        return ", ".join(dict.fromkeys(f"{v / 60:.0f} min" if key == "seconds" else str(v) for v in found))
    if key in ("epochs", "memory_gb"):
        return str(max(found))
    mean = statistics.mean(found)
    if key == "seconds":
        return f"{mean / 60:.1f} min"
    return analysis.formatted(row, mean, statistics.stdev(found) if len(set(found)) > 1 else None)


def filled(page: str, runs: dict[str, dict]) -> str:
    """The page with every mark's number brought up to date."""
    return MARK.sub(lambda mark: f"<!--={mark[1]}-->{entry(runs, mark[1])}<!--/-->", page)


def publish(folders: list[pathlib.Path], out: pathlib.Path) -> None:
    """Copy results and pictures of finished runs to results/, and their numbers into results/report.md and
    README.md."""
    runs = {f.name: vit.read_results(f) for f in folders if (f / "results.json").exists()}
    if not runs:
        raise SystemExit("there is no finished run in runs/; `bash run_all.sh` makes one")
    for name, results in runs.items():
        if results["dataset"] != "cifar10":
            raise SystemExit(f"{name} holds results on {results['dataset']} images, not to be published")
    vit.write_file(out / "results.json", (json.dumps(runs, indent=1) + "\n").encode())
    for picture in [f"{name}.png" for name in analysis.FIGURES] + ["learning.gif"]:
        if found := [f / "figures" / picture for f in folders if (f / "figures" / picture).exists()]:
            vit.write_file(out / "figures" / picture, found[0].read_bytes())
    for page in (out / "report.md", out.parent / "README.md"):
        text = filled(page.read_text(), runs)
        vit.write_file(page, text.encode())
        missing = sorted({mark for mark in MARK.findall(text) if entry(runs, mark) == "not measured"})
        print(
            f"{page}: {len(MARK.findall(text))} numbers from {', '.join(runs)}; not measured: "
            f"{', '.join(missing) or 'none'}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", nargs="+", type=pathlib.Path, default=[], metavar="FOLDER", help="finished runs"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "results", help="where to (default: results)"
    )
    args = parser.parse_args()
    names = ("full", "laptop", "quick")
    found = [f for f in sorted((ROOT / "runs").glob("cifar10-*")) if f.name.split("-")[1] in names]
    publish(args.runs or found, args.out)


if __name__ == "__main__":
    main()
